//! Families with layer norms: GPT-2's line, and what came of it.

use super::{activation, head, kv_heads, share};
use crate::{
    error::{Error, Result},
    kernels::{Activation, Alibi, Attention, Bias, Sight},
    models::{
        fields::{COUNT, Fields, WIDTH},
        rope::{Heads, rope, rotation, scaling},
        spec::{DecoderSpec, Extent, Head, Layout, Linear, Mlp, Norm, NormKind, Positions, Projection, QkNorm, Qkv, Residual},
    },
};

pub(super) fn gpt2(config: &Fields) -> Result<DecoderSpec> {
    if config.flag("add_cross_attention", false)? {
        return Err(Error::Unsupported("add_cross_attention: gpt2 as part of an encoder-decoder model".into()));
    }
    let hidden = config.size(config.either("hidden_size", "n_embd"), 768, WIDTH)?;
    let mut base = attention(config, hidden, config.either("num_attention_heads", "n_head"), 12)?;
    if !config.flag("scale_attn_weights", true)? {
        base.scale = 1.0;
    }
    let by_layer = config.flag("scale_attn_by_inverse_layer_idx", false)?;
    let scale = |layer: usize| if by_layer { (f64::from(base.scale) / (layer + 1) as f64) as f32 } else { base.scale };
    let layers = config.size(config.either("num_hidden_layers", "n_layer"), 12, COUNT)?;
    let shape = Shape {
        family: "gpt2",
        vocab: config.size("vocab_size", 50_257, WIDTH)?,
        hidden,
        attention: (0..layers).map(|layer| Attention { scale: scale(layer), ..base.clone() }).collect(),
        positions: Positions::Learned {
            name: "wpe",
            skip: 0,
            len: config.size(config.either("max_position_embeddings", "n_positions"), 1024, WIDTH)?,
        },
        qkv: Qkv::Fused(Linear { name: "attn.c_attn", bias: true }),
        out: Linear { name: "attn.c_proj", bias: true },
        mlp: Mlp::Plain {
            up: Linear { name: "mlp.c_fc", bias: true },
            down: Linear { name: "mlp.c_proj", bias: true },
            inner: config.optional_size("n_inner", None, WIDTH)?.unwrap_or(4 * hidden),
            activation: activation(config, "activation_function", "gelu_new")?,
        },
        eps: config.positive("layer_norm_epsilon", 1e-5)?,
        head: head(config, true)?,
    };
    Ok(DecoderSpec {
        base: "transformer.",
        embedding: "wte",
        layer: "h.",
        layout: Layout::Conv1d,
        residual: Residual::Pre { attention: "ln_1", mlp: "ln_2" },
        final_norm: Some("ln_f"),
        ..classic(shape)
    })
}

pub(super) fn gpt_neox(config: &Fields) -> Result<DecoderSpec> {
    let hidden = config.size("hidden_size", 6144, WIDTH)?;
    let bias = config.flag("attention_bias", true)?;
    let attention = attention(config, hidden, "num_attention_heads", 64)?;
    let layers = config.size("num_hidden_layers", 44, COUNT)?;
    let trained = config.size("max_position_embeddings", 2048, WIDTH)?;
    // HF: beside the rope's own object these are the only names that the reference reads; what 4.x wrote has the common ones too,
    // with the same values.
    let heads = Heads {
        dim: attention.head_dim,
        partial: Some(config.positive("rotary_pct", 0.25)?),
        theta: config.positive("rotary_emb_base", 10_000.0)?,
        trained,
        original: None,
    };
    let rotations = vec![rotation(config, scaling(config)?.as_ref(), heads)?];
    let shape = Shape {
        family: "gpt_neox",
        vocab: config.size("vocab_size", 50_432, WIDTH)?,
        hidden,
        positions: Positions::Rope { rotations, layers: vec![Some(0); layers], trained },
        attention: vec![attention; layers],
        qkv: Qkv::Grouped(Linear { name: "attention.query_key_value", bias }),
        out: Linear { name: "attention.dense", bias },
        mlp: Mlp::Plain {
            up: Linear { name: "mlp.dense_h_to_4h", bias: true },
            down: Linear { name: "mlp.dense_4h_to_h", bias: true },
            inner: config.size("intermediate_size", 24_576, WIDTH)?,
            activation: activation(config, "hidden_act", "gelu")?,
        },
        eps: config.positive("layer_norm_eps", 1e-5)?,
        head: match config.flag("tie_word_embeddings", false)? {
            true => Head::Tied(Linear { name: "embed_out", bias: false }),
            false => Head::Own(Linear { name: "embed_out", bias: false }),
        },
    };
    Ok(DecoderSpec {
        base: "gpt_neox.",
        embedding: "embed_in",
        residual: match config.flag("use_parallel_residual", true)? {
            true => Residual::Parallel { attention: "input_layernorm", mlp: Some("post_attention_layernorm") },
            false => SERIAL,
        },
        final_norm: Some("final_layer_norm"),
        ..classic(shape)
    })
}

pub(super) fn opt(config: &Fields) -> Result<DecoderSpec> {
    let hidden = config.size("hidden_size", 768, WIDTH)?;
    let bias = config.flag("enable_bias", true)?;
    let linear = |name| Linear { name, bias };
    let attention = attention(config, hidden, "num_attention_heads", 12)?;
    let before = config.flag("do_layer_norm_before", true)?;
    let shape = Shape {
        family: "opt",
        vocab: config.size("vocab_size", 50_272, WIDTH)?,
        hidden,
        positions: Positions::Learned { name: "embed_positions", skip: 2, len: config.size("max_position_embeddings", 2048, WIDTH)? },
        attention: vec![attention; config.size("num_hidden_layers", 12, COUNT)?],
        qkv: Qkv::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(linear)),
        out: linear("self_attn.out_proj"),
        mlp: Mlp::Plain {
            up: linear("fc1"),
            down: linear("fc2"),
            inner: config.size("ffn_dim", 3072, WIDTH)?,
            activation: activation(config, "activation_function", "relu")?,
        },
        eps: 1e-5,
        head: head(config, true)?,
    };
    let (attention, mlp) = ("self_attn_layer_norm", "final_layer_norm");
    let width = config.optional_size("word_embed_proj_dim", None, WIDTH)?.filter(|&width| width != hidden);
    let mut spec = DecoderSpec {
        base: "model.decoder.",
        projection: width.map(|width| Projection { width, inward: "project_in", outward: "project_out" }),
        residual: if before { Residual::Pre { attention, mlp } } else { Residual::Summed { attention, mlp } },
        final_norm: (before && !config.flag("_remove_final_layer_norm", false)?).then_some("final_layer_norm"),
        ..classic(shape)
    };
    if !config.flag("layer_norm_elementwise_affine", true)? {
        spec.norm.kind = NormKind::LayerBare;
    }
    Ok(spec)
}

pub(super) fn bloom(config: &Fields) -> Result<DecoderSpec> {
    let hidden = config.size(config.either("n_embed", "hidden_size"), 64, WIDTH)?;
    let mut attention = attention(config, hidden, config.either("num_attention_heads", "n_head"), 8)?;
    attention.bias = Bias::Alibi(slopes(attention.heads).map(|slope| Alibi { slope, scale: 1.0, coarse: false }).collect());
    let shape = Shape {
        family: "bloom",
        vocab: config.size("vocab_size", 250_880, WIDTH)?,
        hidden,
        positions: Positions::Alibi { trained: None },
        attention: vec![attention; config.size(config.either("num_hidden_layers", "n_layer"), 2, COUNT)?],
        qkv: Qkv::Grouped(Linear { name: "self_attention.query_key_value", bias: true }),
        out: Linear { name: "self_attention.dense", bias: true },
        mlp: Mlp::Plain {
            up: Linear { name: "mlp.dense_h_to_4h", bias: true },
            down: Linear { name: "mlp.dense_4h_to_h", bias: true },
            inner: 4 * hidden,
            activation: Activation::GeluTanh,
        },
        eps: config.positive("layer_norm_epsilon", 1e-5)?,
        head: head(config, true)?,
    };
    Ok(DecoderSpec {
        base: "transformer.",
        embedding: "word_embeddings",
        embedding_norm: Some("word_embeddings_layernorm"),
        layer: "h.",
        residual: match config.flag("apply_residual_connection_post_layernorm", false)? {
            true => Residual::Normed { attention: "input_layernorm", mlp: "post_attention_layernorm" },
            false => SERIAL,
        },
        final_norm: Some("ln_f"),
        ..classic(shape)
    })
}

pub(super) fn falcon(config: &Fields) -> Result<DecoderSpec> {
    let hidden = config.size(config.either("n_embed", "hidden_size"), 4544, WIDTH)?;
    let bias = config.flag("bias", false)?;
    let new = config.flag("new_decoder_architecture", false)?;
    let mut attention = attention(config, hidden, "num_attention_heads", 71)?;
    if new {
        attention.kv_heads = kv_heads(config, "num_kv_heads", attention.heads, None)?;
    } else if config.flag("multi_query", true)? {
        attention.kv_heads = 1;
    }
    let layers = config.size("num_hidden_layers", 32, COUNT)?;
    let trained = config.size("max_position_embeddings", 2048, WIDTH)?;
    let positions = if config.flag("alibi", false)? {
        // HF: its biases are rounded to bf16 whatever the arithmetic. Its eager attention adds them twice; its default, scaled
        // dot-product attention, once, as the models were trained, and so it is here.
        let biases = slopes(attention.heads).map(|slope| Alibi { slope, scale: attention.scale, coarse: true });
        attention.bias = Bias::Alibi(biases.collect());
        Positions::Alibi { trained: Some(trained) }
    } else {
        rotary(config, attention.head_dim, layers, trained, None)?
    };
    // HF: the new architecture is parallel whatever `parallel_attn` says.
    let residual = if new && config.optional_size("num_ln_in_parallel_attn", None, 2)?.unwrap_or(2) == 2 {
        Residual::Parallel { attention: "ln_attn", mlp: Some("ln_mlp") }
    } else if new || config.flag("parallel_attn", true)? {
        Residual::Parallel { attention: "input_layernorm", mlp: None }
    } else {
        SERIAL
    };
    let shape = Shape {
        family: "falcon",
        vocab: config.size("vocab_size", 65_024, WIDTH)?,
        hidden,
        positions,
        attention: vec![attention; layers],
        qkv: Qkv::Grouped(Linear { name: "self_attention.query_key_value", bias }),
        out: Linear { name: "self_attention.dense", bias },
        mlp: Mlp::Plain {
            up: Linear { name: "mlp.dense_h_to_4h", bias },
            down: Linear { name: "mlp.dense_4h_to_h", bias },
            inner: config.optional_size("ffn_hidden_size", None, WIDTH)?.unwrap_or(4 * hidden),
            activation: activation(config, "activation", "gelu")?,
        },
        eps: config.positive("layer_norm_epsilon", 1e-5)?,
        head: head(config, true)?,
    };
    Ok(DecoderSpec {
        base: "transformer.",
        embedding: "word_embeddings",
        layer: "h.",
        residual,
        final_norm: Some("ln_f"),
        ..classic(shape)
    })
}

pub(super) fn phi(config: &Fields) -> Result<DecoderSpec> {
    let hidden = config.size("hidden_size", 2048, WIDTH)?;
    let mut attention = attention(config, hidden, "num_attention_heads", 32)?;
    attention.kv_heads = kv_heads(config, "num_key_value_heads", attention.heads, None)?;
    let layers = config.size("num_hidden_layers", 24, COUNT)?;
    let linear = |name| Linear { name, bias: true };
    let shape = Shape {
        family: "phi",
        vocab: config.size("vocab_size", 51_200, WIDTH)?,
        hidden,
        positions: rotary(config, attention.head_dim, layers, 2048, Some(0.5))?,
        attention: vec![attention; layers],
        qkv: Qkv::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(linear)),
        out: linear("self_attn.dense"),
        mlp: Mlp::Plain {
            up: linear("mlp.fc1"),
            down: linear("mlp.fc2"),
            inner: config.size("intermediate_size", 8192, WIDTH)?,
            activation: activation(config, "hidden_act", "gelu_new")?,
        },
        eps: config.positive("layer_norm_eps", 1e-5)?,
        head: match config.flag("tie_word_embeddings", false)? {
            true => Head::Tied(linear("lm_head")),
            false => Head::Own(linear("lm_head")),
        },
    };
    let qk_norm = config.flag("qk_layernorm", false)?;
    Ok(DecoderSpec {
        qk_norm: qk_norm.then_some(QkNorm {
            query: "self_attn.q_layernorm",
            key: "self_attn.k_layernorm",
            norm: Norm { kind: NormKind::Layer, eps: shape.eps as f32 },
            extent: Extent::Head,
        }),
        residual: Residual::Parallel { attention: "input_layernorm", mlp: None },
        final_norm: Some("final_layernorm"),
        ..classic(shape)
    })
}

pub(super) fn stablelm(config: &Fields) -> Result<DecoderSpec> {
    let hidden = config.size("hidden_size", 2560, WIDTH)?;
    let mut attention = attention(config, hidden, "num_attention_heads", 32)?;
    attention.kv_heads = kv_heads(config, "num_key_value_heads", attention.heads, Some(32))?;
    let layers = config.size("num_hidden_layers", 32, COUNT)?;
    let bias = config.flag("use_qkv_bias", false)?;
    let linear = |name| Linear { name, bias: false };
    let shape = Shape {
        family: "stablelm",
        vocab: config.size("vocab_size", 50_304, WIDTH)?,
        hidden,
        positions: rotary(config, attention.head_dim, layers, 4096, Some(0.25))?,
        attention: vec![attention; layers],
        qkv: Qkv::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(|name| Linear { name, bias })),
        out: linear("self_attn.o_proj"),
        mlp: Mlp::Gated {
            gate: linear("mlp.gate_proj"),
            up: linear("mlp.up_proj"),
            down: linear("mlp.down_proj"),
            inner: config.size("intermediate_size", 6912, WIDTH)?,
            activation: activation(config, "hidden_act", "silu")?,
        },
        eps: config.positive("layer_norm_eps", 1e-5)?,
        head: head(config, false)?,
    };
    let parallel = config.flag("use_parallel_residual", false)?;
    let residual = if parallel { Residual::Parallel { attention: "input_layernorm", mlp: None } } else { SERIAL };
    let qk_norm = config.flag("qk_layernorm", false)?.then_some(QkNorm {
        query: "self_attn.q_layernorm.norms",
        key: "self_attn.k_layernorm.norms",
        norm: Norm { kind: NormKind::LayerUnbiased, eps: shape.eps as f32 },
        extent: Extent::OwnHead,
    });
    Ok(DecoderSpec { qk_norm, residual, ..classic(shape) })
}

pub(super) fn starcoder2(config: &Fields) -> Result<DecoderSpec> {
    let hidden = config.size("hidden_size", 3072, WIDTH)?;
    let mut attention = attention(config, hidden, "num_attention_heads", 24)?;
    attention.kv_heads = kv_heads(config, "num_key_value_heads", attention.heads, Some(2))?;
    attention.sight = config.optional_size("sliding_window", None, WIDTH)?.map_or(Sight::Causal, Sight::Window);
    let bias = config.flag("use_bias", true)?;
    let linear = |name| Linear { name, bias };
    let layers = config.size("num_hidden_layers", 30, COUNT)?;
    let shape = Shape {
        family: "starcoder2",
        vocab: config.size("vocab_size", 49_152, WIDTH)?,
        hidden,
        positions: rotary(config, attention.head_dim, layers, 4096, None)?,
        attention: vec![attention; layers],
        qkv: Qkv::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(linear)),
        out: linear("self_attn.o_proj"),
        mlp: Mlp::Plain {
            up: linear("mlp.c_fc"),
            down: linear("mlp.c_proj"),
            inner: config.size("intermediate_size", 12_288, WIDTH)?,
            activation: activation(config, "hidden_act", "gelu_pytorch_tanh")?,
        },
        eps: config.positive("norm_epsilon", 1e-5)?,
        head: head(config, true)?,
    };
    Ok(classic(shape))
}

/// The norms that most families have.
const SERIAL: Residual = Residual::Pre { attention: "input_layernorm", mlp: "post_attention_layernorm" };

/// What no two families have in common.
struct Shape {
    family: &'static str,
    vocab: usize,
    hidden: usize,
    attention: Vec<Attention>,
    positions: Positions,
    qkv: Qkv,
    out: Linear,
    mlp: Mlp,
    eps: f64,
    head: Head,
}

/// What most families have in common: the names of llama, and layer norms.
fn classic(shape: Shape) -> DecoderSpec {
    DecoderSpec {
        family: shape.family,
        base: "model.",
        vocab: shape.vocab,
        hidden: shape.hidden,
        embedding: "embed_tokens",
        aliases: &[],
        embedding_scale: None,
        embedding_norm: None,
        projection: None,
        positions: shape.positions,
        layer: "layers.",
        attention: shape.attention,
        layout: Layout::Linear,
        qkv: shape.qkv,
        qk_norm: None,
        out: shape.out,
        mlp: shape.mlp,
        experts: None,
        norm: Norm { kind: NormKind::Layer, eps: shape.eps as f32 },
        residual: SERIAL,
        final_norm: Some("norm"),
        head: shape.head,
        head_scale: None,
        logits_bias: None,
        softcap: None,
        encoder: None,
    }
}

/// Heads that share the width, each with keys and values of its own; `field` says how many.
fn attention(config: &Fields, hidden: usize, field: &str, default: usize) -> Result<Attention> {
    let heads = config.size(field, default, COUNT)?;
    let head_dim = share(config, field, hidden, heads)?;
    let scale = (head_dim as f64).powf(-0.5) as f32;
    Ok(Attention { heads, kv_heads: heads, head_dim, scale, softcap: None, sight: Sight::Causal, bias: Bias::None })
}

/// Rotary positions, the same in all layers, in a model made for `trained` positions unless the config says otherwise; `partial` is
/// the share of a head that turns, where the family reads it.
fn rotary(config: &Fields, head_dim: usize, layers: usize, trained: usize, partial: Option<f64>) -> Result<Positions> {
    let trained = config.size("max_position_embeddings", trained, WIDTH)?;
    let heads = Heads { dim: head_dim, partial, theta: 10_000.0, trained, original: None };
    Ok(Positions::Rope { rotations: vec![rope(config, heads)?], layers: vec![Some(0); layers], trained })
}

/// The slopes of ALiBi: a geometric sequence that begins with its ratio `2^(-8 / heads)`. Where the number of heads is no power
/// of two, the largest power below, and the rest from the sequence for twice as many, every other one.
fn slopes(heads: usize) -> impl Iterator<Item = f32> {
    let whole = 1usize << heads.max(1).ilog2();
    // HF: the ratio is rounded to f32 before its powers are taken.
    let slope = move |heads: usize, power: usize| f64::from((-8.0 / heads as f64).exp2() as f32).powi(power as i32) as f32;
    (1..=whole).map(move |power| slope(whole, power)).chain((whole..heads).map(move |head| slope(2 * whole, 2 * (head - whole) + 1)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn fields(config: Value) -> Fields {
        Fields::new(config.as_object().unwrap().clone())
    }

    #[test]
    fn fields_have_other_names_that_come_first() {
        let spec = bloom(&fields(json!({"n_embed": 32, "hidden_size": 48, "n_head": 2, "num_attention_heads": 4}))).unwrap();
        assert_eq!((spec.hidden, spec.attention[0].heads), (32, 4));
        assert_eq!(bloom(&fields(json!({"n_embed": null, "hidden_size": 48}))).unwrap().hidden, 48);
        let spec = gpt2(&fields(json!({"hidden_size": 48, "n_embd": 96, "num_attention_heads": 2, "n_head": 4}))).unwrap();
        assert_eq!((spec.hidden, spec.attention[0].heads), (48, 2));
        let error = falcon(&fields(json!({"n_embed": 30}))).unwrap_err().to_string();
        assert_eq!(error, "cannot load config.json: num_attention_heads = 71: a divisor of the hidden size 30 is accepted");
    }

    #[test]
    fn a_part_of_each_head_turns() {
        let turned = |family: fn(&Fields) -> Result<DecoderSpec>, config| match family(&fields(config)).unwrap().positions {
            Positions::Rope { rotations, .. } => rotations[0].at(1).inv_freq.clone(),
            _ => Vec::new(),
        };
        assert_eq!(turned(gpt_neox, json!({})).len(), 12);
        assert_eq!(turned(gpt_neox, json!({"rotary_pct": 0.5, "rotary_emb_base": 100}))[12], 0.1);
        assert_eq!(turned(phi, json!({})).len(), 16);
        assert_eq!(turned(phi, json!({"partial_rotary_factor": 0.25})).len(), 8);
        assert_eq!(turned(stablelm, json!({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}})).len(), 10);
        assert_eq!(turned(falcon, json!({})).len(), 32);
        assert!(turned(falcon, json!({"alibi": true})).is_empty());
    }

    #[test]
    fn residuals_follow_the_config() {
        let falcon = |config| falcon(&fields(config)).unwrap().residual;
        let two = Residual::Parallel { attention: "ln_attn", mlp: Some("ln_mlp") };
        let one = Residual::Parallel { attention: "input_layernorm", mlp: None };
        assert_eq!(falcon(json!({})), one);
        assert_eq!(falcon(json!({"parallel_attn": false})), SERIAL);
        assert_eq!(falcon(json!({"new_decoder_architecture": true, "parallel_attn": false})), two);
        assert_eq!(falcon(json!({"new_decoder_architecture": true, "num_ln_in_parallel_attn": 1})), one);
        let opt = |config| opt(&fields(config)).unwrap();
        let spec = opt(json!({"do_layer_norm_before": false, "word_embed_proj_dim": 512}));
        assert!(matches!(spec.residual, Residual::Summed { .. }) && spec.final_norm.is_none());
        assert_eq!((spec.outer(), opt(json!({"word_embed_proj_dim": 768})).projection), (512, None));
        assert_eq!(opt(json!({"_remove_final_layer_norm": true})).final_norm, None);
        assert_eq!(opt(json!({"layer_norm_elementwise_affine": false})).norm.kind, NormKind::LayerBare);
    }

    #[test]
    fn slopes_are_the_references() {
        let of = |heads| slopes(heads).collect::<Vec<_>>();
        assert_eq!(of(1), [0.00390625]);
        assert_eq!(of(3), [0.0625, 0.00390625, 0.25]);
        assert_eq!(of(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        assert_eq!(of(12)[8..], [0.70710677, 0.35355338, 0.17677668, 0.08838834]);
        assert_eq!(of(16)[13..], [0.007_812_498, 0.0055242703, 0.0039062488]);
        assert_eq!(of(71)[68..], [0.6771277, 0.6209289, 0.5693943]);
    }
}
