//! Families in llama's line: rotary positions, grouped heads, root-mean-square norms, a gated feed-forward part.

use super::{activation, head, kv_heads, share, windows};
use crate::{
    error::{Error, Result},
    kernels::Attention,
    models::{
        fields::{COUNT, Fields, WIDTH},
        rope::{Heads, rope},
        spec::{DecoderSpec, Layout, Linear, Mlp, Norm, NormKind, Positions, Qkv, Residual},
    },
};

pub(super) fn llama(config: &Fields) -> Result<DecoderSpec> {
    let bias = config.flag("attention_bias", false)?;
    rotary(config, Shape { qkv_bias: bias, out_bias: bias, mlp_bias: config.flag("mlp_bias", false)?, ..LLAMA })
}

pub(super) fn qwen2(config: &Fields) -> Result<DecoderSpec> {
    let shape = Shape {
        vocab: 151_936,
        inner: 22_016,
        // HF: where the field is absent the reference takes 32, not the number of heads.
        kv_heads: Some(32),
        positions: 32_768,
        qkv_bias: true,
        family: "qwen2",
        ..LLAMA
    };
    let mut spec = rotary(config, shape)?;
    window_of_qwen(config, &mut spec)?;
    Ok(spec)
}

pub(super) fn gemma2(config: &Fields) -> Result<DecoderSpec> {
    let bias = config.flag("attention_bias", false)?;
    let shape = Shape {
        vocab: 256_000,
        hidden: 2304,
        inner: 9216,
        layers: 26,
        heads: 8,
        kv_heads: Some(4),
        head_dim: Some(256),
        positions: 8192,
        activation: ("hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias: bias,
        out_bias: bias,
        tied: true,
        family: "gemma2",
        ..LLAMA
    };
    let mut spec = rotary(config, shape)?;
    let scale = config.positive("query_pre_attn_scalar", 256.0)?.powf(-0.5) as f32;
    let softcap = config.optional_positive("attn_logit_softcapping", Some(50.0))?.map(|cap| cap as f32);
    for attention in &mut spec.attention {
        *attention = Attention { scale, softcap, ..attention.clone() };
    }
    windows(config, &mut spec.attention, config.optional_size("sliding_window", Some(4096), WIDTH)?, |layer| layer % 2 == 0)?;
    spec.softcap = config.optional_positive("final_logit_softcapping", Some(30.0))?.map(|cap| cap as f32);
    spec.residual = SANDWICH;
    gemmas(config, spec)
}

/// Norms before and after each part of a layer, by gemma's names.
const SANDWICH: Residual = Residual::PrePost {
    attention: ["input_layernorm", "post_attention_layernorm"],
    mlp: ["pre_feedforward_layernorm", "post_feedforward_layernorm"],
};

/// What all gemmas have.
fn gemmas(config: &Fields, spec: DecoderSpec) -> Result<DecoderSpec> {
    if config.flag("use_bidirectional_attention", false)? {
        return Err(Error::Unsupported("use_bidirectional_attention: a model that does not generate".into()));
    }
    let embedding_scale = Some((spec.hidden as f64).sqrt() as f32);
    Ok(DecoderSpec { embedding_scale, norm: Norm { kind: NormKind::RmsPlusOne, ..spec.norm }, ..spec })
}

/// Layers from `max_window_layers` on have a window.
fn window_of_qwen(config: &Fields, spec: &mut DecoderSpec) -> Result<()> {
    let window = match config.flag("use_sliding_window", false)? {
        true => config.optional_size("sliding_window", Some(4096), WIDTH)?,
        false => None,
    };
    let first = config.number("max_window_layers", 28)?;
    windows(config, &mut spec.attention, window, |layer| window.is_some() && layer >= first)
}

/// What families shaped like llama choose; sizes are the reference's defaults for absent fields.
struct Shape {
    family: &'static str,
    vocab: usize,
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    /// As many as heads if none.
    kv_heads: Option<usize>,
    /// The heads' share of the width if none.
    head_dim: Option<usize>,
    positions: usize,
    theta: f64,
    /// The share of a head that turns, where the family reads it.
    partial: Option<f64>,
    /// The field that names it, and which one it is otherwise.
    activation: (&'static str, &'static str),
    eps: f64,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    tied: bool,
}

const LLAMA: Shape = Shape {
    family: "llama",
    vocab: 32_000,
    hidden: 4096,
    inner: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    positions: 2048,
    theta: 10_000.0,
    partial: None,
    activation: ("hidden_act", "silu"),
    eps: 1e-6,
    qkv_bias: false,
    out_bias: false,
    mlp_bias: false,
    tied: false,
};

/// The shape of llama, which most families share: rotary positions, grouped heads, root-mean-square norms, a gated MLP.
fn rotary(config: &Fields, shape: Shape) -> Result<DecoderSpec> {
    let hidden = config.size("hidden_size", shape.hidden, WIDTH)?;
    let heads = config.size("num_attention_heads", shape.heads, COUNT)?;
    let kv_heads = kv_heads(config, "num_key_value_heads", heads, shape.kv_heads)?;
    let head_dim = match config.optional_size("head_dim", shape.head_dim, COUNT)? {
        Some(head_dim) => head_dim,
        None => share(config, "num_attention_heads", hidden, heads)?,
    };
    let trained = config.size("max_position_embeddings", shape.positions, WIDTH)?;
    let layers = config.size("num_hidden_layers", shape.layers, COUNT)?;
    let scale = (head_dim as f64).powf(-0.5) as f32;
    let attention = Attention { heads, kv_heads, head_dim, scale, softcap: None, window: None, alibi: [].into() };
    let turned = Heads { dim: head_dim, partial: shape.partial, theta: shape.theta, trained, original: None };
    let qkv = |name| Linear { name, bias: shape.qkv_bias };
    let mlp = |name| Linear { name, bias: shape.mlp_bias };
    Ok(DecoderSpec {
        family: shape.family,
        base: "model.",
        vocab: config.size("vocab_size", shape.vocab, WIDTH)?,
        hidden,
        embedding: "embed_tokens",
        embedding_scale: None,
        embedding_norm: None,
        projection: None,
        positions: Positions::Rope { rotations: vec![rope(config, turned)?], layers: vec![Some(0); layers], trained },
        layer: "layers.",
        attention: vec![attention; layers],
        layout: Layout::Linear,
        qkv: Qkv::Split([qkv("self_attn.q_proj"), qkv("self_attn.k_proj"), qkv("self_attn.v_proj")]),
        qk_norm: None,
        out: Linear { name: "self_attn.o_proj", bias: shape.out_bias },
        mlp: Mlp::Gated {
            gate: mlp("mlp.gate_proj"),
            up: mlp("mlp.up_proj"),
            down: mlp("mlp.down_proj"),
            inner: config.size("intermediate_size", shape.inner, WIDTH)?,
            activation: activation(config, shape.activation.0, shape.activation.1)?,
        },
        norm: Norm { kind: NormKind::Rms, eps: config.positive("rms_norm_eps", shape.eps)? as f32 },
        residual: Residual::Pre { attention: "input_layernorm", mlp: "post_attention_layernorm" },
        final_norm: Some("norm"),
        head: head(config, shape.tied)?,
        softcap: None,
    })
}
