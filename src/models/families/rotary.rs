//! Families in llama's line: rotary positions, grouped heads, root-mean-square norms, a gated feed-forward part.

use super::{activation, head, kv_heads, share, windows};
use crate::{
    error::{Error, Result},
    kernels::{Activation, Attention, Bias, Sight},
    models::{
        fields::{COUNT, Fields, WIDTH},
        rope::{Heads, Rotation, rope, rotation},
        spec::{DecoderSpec, Experts, Extent, Head, Layout, Linear, Mlp, Norm, NormKind, Positions, QkNorm, Qkv, Residual},
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

pub(super) fn qwen3(config: &Fields) -> Result<DecoderSpec> {
    let bias = config.flag("attention_bias", false)?;
    let shape = Shape {
        family: "qwen3",
        vocab: 151_936,
        inner: 22_016,
        kv_heads: Some(32),
        head_dim: Some(128),
        positions: 32_768,
        qkv_bias: bias,
        out_bias: bias,
        ..LLAMA
    };
    let mut spec = rotary(config, shape)?;
    window_of_qwen(config, &mut spec)?;
    spec.qk_norm = Some(qk_norm(spec.norm, Extent::Head));
    Ok(spec)
}

pub(super) fn mistral(config: &Fields) -> Result<DecoderSpec> {
    let mut spec = rotary(config, Shape { family: "mistral", inner: 14_336, kv_heads: Some(8), positions: 4096 * 32, ..LLAMA })?;
    window_everywhere(config, &mut spec, Some(4096))?;
    Ok(spec)
}

pub(super) fn gemma(config: &Fields) -> Result<DecoderSpec> {
    let bias = config.flag("attention_bias", false)?;
    let shape = Shape {
        family: "gemma",
        vocab: 256_000,
        hidden: 3072,
        inner: 24_576,
        layers: 28,
        heads: 16,
        kv_heads: Some(16),
        head_dim: Some(256),
        positions: 8192,
        activation: ("hidden_act", "gelu_pytorch_tanh"),
        qkv_bias: bias,
        out_bias: bias,
        tied: true,
        ..LLAMA
    };
    let mut spec = rotary(config, shape)?;
    // HF: the published files say `gelu` and mean its approximation by tanh.
    if let Mlp::Gated { activation: activation @ Activation::Gelu, .. } = &mut spec.mlp {
        *activation = Activation::GeluTanh;
    }
    gemmas(config, spec)
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

/// The text of a Gemma 3 that also sees.
pub(super) fn gemma3(config: &Fields) -> Result<DecoderSpec> {
    let text = config.object("text_config")?.ok_or_else(|| config.error("text_config", "null", "an object is accepted"))?;
    // HF: whether the head is tied stands beside the text's own fields.
    let head = match config.flag("tie_word_embeddings", true)? {
        true => Head::Tied(Linear { name: "language_model.lm_head", bias: false }),
        false => Head::Own(Linear { name: "language_model.lm_head", bias: false }),
    };
    Ok(DecoderSpec { family: "gemma3", base: "language_model.model.", head, ..gemma3_text(&text)? })
}

pub(super) fn gemma3_text(config: &Fields) -> Result<DecoderSpec> {
    let bias = config.flag("attention_bias", false)?;
    let shape = Shape {
        family: "gemma3_text",
        vocab: 262_208,
        hidden: 2304,
        inner: 9216,
        layers: 26,
        heads: 8,
        kv_heads: Some(4),
        head_dim: Some(256),
        positions: 131_072,
        activation: ("hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias: bias,
        out_bias: bias,
        tied: true,
        ..LLAMA
    };
    let mut spec = rotary_in(config, shape, rotation_by_type)?;
    let scale = config.positive("query_pre_attn_scalar", 256.0)?.powf(-0.5) as f32;
    spec.attention.iter_mut().for_each(|attention| attention.scale = scale);
    // HF: what 5.x writes as `_sliding_window_pattern` it does not read again: `layer_types` stands beside it.
    let pattern = config.size("sliding_window_pattern", 6, COUNT)?;
    windows(config, &mut spec.attention, config.optional_size("sliding_window", Some(4096), WIDTH)?, |layer| (layer + 1) % pattern != 0)?;
    if let Positions::Rope { layers, .. } = &mut spec.positions {
        *layers = spec.attention.iter().map(|attention| Some(usize::from(attention.sight != Sight::Causal))).collect();
    }
    // HF: `attn_logit_softcapping` is a field that the reference does not use.
    spec.softcap = config.optional_positive("final_logit_softcapping", None)?.map(|cap| cap as f32);
    spec.residual = SANDWICH;
    let mut spec = gemmas(config, spec)?;
    spec.qk_norm = Some(qk_norm(spec.norm, Extent::Head));
    Ok(spec)
}

/// Gemma 3's rotations, of full attention and of sliding windows.
fn rotation_by_type(config: &Fields, heads: Heads) -> Result<Vec<Rotation>> {
    let parameters = config.object("rope_parameters")?;
    let of = |name| parameters.as_ref().map_or(Ok(None), |parameters| parameters.object(name));
    // HF: what 4.x wrote is about full attention alone, and comes before what 5.x writes. Its kind is not read from `type`, since the
    // default stands in `rope_type` already.
    let scaling = config.object("rope_scaling")?.filter(|scaling| scaling.has("rope_type"));
    let full = match (of("full_attention")?, scaling) {
        (Some(full), Some(scaling)) => Some(full.updated(scaling)),
        (full, scaling) => scaling.or(full),
    };
    let theta = |name, default| config.positive(name, default);
    let full = rotation(config, full.as_ref(), Heads { theta: theta("rope_theta", 1_000_000.0)?, ..heads })?;
    let sliding = of("sliding_attention")?;
    Ok(vec![full, rotation(config, sliding.as_ref(), Heads { theta: theta("rope_local_base_freq", 10_000.0)?, ..heads })?])
}

pub(super) fn phi3(config: &Fields) -> Result<DecoderSpec> {
    let shape = Shape {
        family: "phi3",
        vocab: 32_064,
        hidden: 3072,
        inner: 8192,
        positions: 4096,
        original: Some(4096),
        partial: Some(1.0),
        eps: 1e-5,
        ..LLAMA
    };
    let mut spec = rotary(config, shape)?;
    window_everywhere(config, &mut spec, None)?;
    spec.qkv = Qkv::Fused(Linear { name: "self_attn.qkv_proj", bias: false });
    if let Mlp::Gated { down, inner, activation, .. } = spec.mlp {
        let gate_up = Linear { name: "mlp.gate_up_proj", bias: false };
        spec.mlp = Mlp::GatedFused { gate_up, down, inner, activation };
    }
    Ok(spec)
}

pub(super) fn smollm3(config: &Fields) -> Result<DecoderSpec> {
    let bias = config.flag("attention_bias", false)?;
    let shape = Shape {
        family: "smollm3",
        vocab: 128_256,
        hidden: 2048,
        layers: 36,
        heads: 16,
        kv_heads: Some(4),
        positions: 32_768,
        theta: 2_000_000.0,
        qkv_bias: bias,
        out_bias: bias,
        mlp_bias: config.flag("mlp_bias", false)?,
        tied: true,
        ..LLAMA
    };
    let mut spec = rotary(config, shape)?;
    let count = spec.attention.len();
    let rotated: Vec<bool> = match config.numbers("no_rope_layers")? {
        // HF: in spite of its name, the list has a 1 for each layer with rotary positions.
        Some(list) if list.len() == count => list.iter().map(|&rotated| rotated != 0).collect(),
        Some(list) => {
            return Err(config.error("no_rope_layers", format_args!("{list:?}"), &format!("one for each of {count} layers is accepted")));
        }
        None => {
            let interval = config.size("no_rope_layer_interval", 4, COUNT)?;
            (0..count).map(|layer| (layer + 1) % interval != 0).collect()
        }
    };
    if let Positions::Rope { layers, .. } = &mut spec.positions {
        *layers = rotated.iter().map(|&rotated| rotated.then_some(0)).collect();
    }
    let window = config.optional_size("sliding_window", None, WIDTH)?;
    let slides = config.flag("use_sliding_window", false)? && window.is_some();
    windows(config, &mut spec.attention, window, |layer| slides && !rotated[layer])?;
    Ok(spec)
}

pub(super) fn olmo2(config: &Fields) -> Result<DecoderSpec> {
    let bias = config.flag("attention_bias", false)?;
    let mut spec = rotary(config, Shape { family: "olmo2", vocab: 50_304, eps: 1e-5, qkv_bias: bias, out_bias: bias, ..LLAMA })?;
    spec.norm.kind = NormKind::RmsOnce;
    spec.residual = Residual::Post { attention: "post_attention_layernorm", mlp: "post_feedforward_layernorm" };
    spec.qk_norm = Some(qk_norm(spec.norm, Extent::Token));
    Ok(spec)
}

pub(super) fn mixtral(config: &Fields) -> Result<DecoderSpec> {
    let shape = Shape { family: "mixtral", inner: 14_336, kv_heads: Some(8), positions: 4096 * 32, theta: 1_000_000.0, eps: 1e-5, ..LLAMA };
    let mut spec = rotary(config, shape)?;
    window_everywhere(config, &mut spec, None)?;
    let Mlp::Gated { inner, activation, .. } = spec.mlp else { return Ok(spec) };
    let (count, top) = experts(config, ["num_experts", "num_local_experts"], 8, 2)?;
    spec.experts = Some(Experts {
        layers: vec![true; spec.attention.len()],
        router: "block_sparse_moe.gate",
        expert: "block_sparse_moe.experts.",
        gate: "w1",
        up: "w3",
        down: "w2",
        count,
        top,
        renormalise: true,
        inner,
        activation,
    });
    Ok(spec)
}

pub(super) fn qwen3_moe(config: &Fields) -> Result<DecoderSpec> {
    let bias = config.flag("attention_bias", false)?;
    let shape = Shape {
        family: "qwen3_moe",
        vocab: 151_936,
        hidden: 2048,
        inner: 6144,
        layers: 24,
        kv_heads: Some(4),
        positions: 32_768,
        qkv_bias: bias,
        out_bias: bias,
        ..LLAMA
    };
    let mut spec = rotary(config, shape)?;
    if config.flag("use_sliding_window", false)? {
        window_everywhere(config, &mut spec, Some(4096))?;
    }
    spec.qk_norm = Some(qk_norm(spec.norm, Extent::Head));
    let Mlp::Gated { activation, .. } = spec.mlp else { return Ok(spec) };
    let (count, top) = experts(config, ["num_local_experts", "num_experts"], 128, 8)?;
    let dense = config.numbers("mlp_only_layers")?.unwrap_or_default();
    let step = config.size("decoder_sparse_step", 1, COUNT)?;
    spec.experts = Some(Experts {
        layers: (0..spec.attention.len()).map(|layer| !dense.contains(&layer) && (layer + 1) % step == 0).collect(),
        router: "mlp.gate",
        expert: "mlp.experts.",
        gate: "gate_proj",
        up: "up_proj",
        down: "down_proj",
        count,
        top,
        renormalise: config.flag("norm_topk_prob", false)?,
        inner: config.size("moe_intermediate_size", 768, WIDTH)?,
        activation,
    });
    Ok(spec)
}

/// How many experts there are, and how many of them a token uses.
fn experts(config: &Fields, [other, own]: [&str; 2], count: usize, top: usize) -> Result<(usize, usize)> {
    // HF: these are the same field, which 5.x writes as `num_local_experts`; of both the one that is not the family's own comes first.
    let count = config.size(config.either(other, own), count, COUNT)?;
    let top = config.size("num_experts_per_tok", top, COUNT)?;
    if top > count {
        return Err(config.error("num_experts_per_tok", top, &format!("at most the number of experts, {count}, is accepted")));
    }
    Ok((count, top))
}

fn qk_norm(norm: Norm, extent: Extent) -> QkNorm {
    QkNorm { query: "self_attn.q_norm", key: "self_attn.k_norm", norm, extent }
}

/// Every layer has the window, if there is one.
fn window_everywhere(config: &Fields, spec: &mut DecoderSpec, default: Option<usize>) -> Result<()> {
    let window = config.optional_size("sliding_window", default, WIDTH)?;
    let sight = window.map_or(Sight::Causal, Sight::Window);
    spec.attention.iter_mut().for_each(|attention| attention.sight = sight);
    Ok(())
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
    /// The positions before they were stretched, where the family has a default for them.
    original: Option<usize>,
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
    original: None,
    activation: ("hidden_act", "silu"),
    eps: 1e-6,
    qkv_bias: false,
    out_bias: false,
    mlp_bias: false,
    tied: false,
};

/// The shape of llama, which most families share: rotary positions, grouped heads, root-mean-square norms, a gated MLP.
fn rotary(config: &Fields, shape: Shape) -> Result<DecoderSpec> {
    rotary_in(config, shape, |config, heads| Ok(vec![rope(config, heads)?]))
}

/// As [`rotary`], with rotations of the family's own; all layers have the first.
fn rotary_in(config: &Fields, shape: Shape, rotations: impl FnOnce(&Fields, Heads) -> Result<Vec<Rotation>>) -> Result<DecoderSpec> {
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
    let attention = Attention { heads, kv_heads, head_dim, scale, softcap: None, sight: Sight::Causal, bias: Bias::None };
    let turned = Heads { dim: head_dim, partial: shape.partial, theta: shape.theta, trained, original: shape.original };
    let qkv = |name| Linear { name, bias: shape.qkv_bias };
    let mlp = |name| Linear { name, bias: shape.mlp_bias };
    Ok(DecoderSpec {
        family: shape.family,
        base: "model.",
        vocab: config.size("vocab_size", shape.vocab, WIDTH)?,
        hidden,
        embedding: "embed_tokens",
        aliases: &[],
        embedding_scale: None,
        embedding_norm: None,
        projection: None,
        positions: Positions::Rope { rotations: rotations(config, turned)?, layers: vec![Some(0); layers], trained },
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
        experts: None,
        norm: Norm { kind: NormKind::Rms, eps: config.positive("rms_norm_eps", shape.eps)? as f32 },
        residual: Residual::Pre { attention: "input_layernorm", mlp: "post_attention_layernorm" },
        final_norm: Some("norm"),
        head: head(config, shape.tied)?,
        head_scale: None,
        logits_bias: None,
        softcap: None,
        encoder: None,
    })
}
