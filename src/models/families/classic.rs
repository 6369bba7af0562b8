//! Families with layer norms and a plain feed-forward part, in GPT-2's line.

use super::{activation, head, share};
use crate::{
    error::{Error, Result},
    kernels::Attention,
    models::{
        fields::{COUNT, Fields, WIDTH},
        spec::{DecoderSpec, Layout, Linear, Mlp, Norm, NormKind, Positions, Qkv, Residual},
    },
};

pub(super) fn gpt2(config: &Fields) -> Result<DecoderSpec> {
    if config.flag("add_cross_attention", false)? {
        return Err(Error::Unsupported("add_cross_attention: gpt2 as part of an encoder-decoder model".into()));
    }
    let hidden = config.size("n_embd", 768, WIDTH)?;
    let heads = config.size("n_head", 12, COUNT)?;
    let head_dim = share(config, "n_head", hidden, heads)?;
    let scale = if config.flag("scale_attn_weights", true)? { (head_dim as f64).powf(-0.5) } else { 1.0 };
    let by_layer = config.flag("scale_attn_by_inverse_layer_idx", false)?;
    let attention = |layer: usize| {
        let scale = if by_layer { scale / (layer + 1) as f64 } else { scale };
        Attention { heads, kv_heads: heads, head_dim, scale: scale as f32, softcap: None, window: None }
    };
    Ok(DecoderSpec {
        family: "gpt2",
        base: "transformer.",
        vocab: config.size("vocab_size", 50_257, WIDTH)?,
        hidden,
        embedding: "wte",
        embedding_scale: None,
        positions: Positions::Learned { name: "wpe", len: config.size("n_positions", 1024, WIDTH)? },
        layer: "h.",
        attention: (0..config.size("n_layer", 12, COUNT)?).map(attention).collect(),
        layout: Layout::Conv1d,
        qkv: Qkv::Fused(Linear { name: "attn.c_attn", bias: true }),
        qk_norm: None,
        out: Linear { name: "attn.c_proj", bias: true },
        mlp: Mlp::Plain {
            up: Linear { name: "mlp.c_fc", bias: true },
            down: Linear { name: "mlp.c_proj", bias: true },
            inner: config.optional_size("n_inner", None, WIDTH)?.unwrap_or(4 * hidden),
            activation: activation(config, "activation_function", "gelu_new")?,
        },
        experts: None,
        norm: Norm { kind: NormKind::Layer, eps: config.positive("layer_norm_epsilon", 1e-5)? as f32 },
        residual: Residual::Pre { attention: "ln_1", mlp: "ln_2" },
        final_norm: "ln_f",
        head: head(config, true)?,
        softcap: None,
    })
}
