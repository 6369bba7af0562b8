//! The known families: `config.json` to a [`DecoderSpec`], one short function each.

mod classic;
mod rotary;

use super::{
    fields::{COUNT, Fields},
    spec::{DecoderSpec, Head, Linear},
};
use crate::{
    error::{Error, Result},
    kernels::{Activation, Attention},
};

type Family = fn(&Fields) -> Result<DecoderSpec>;

const FAMILIES: [(&str, Family); 11] = [
    ("gpt2", classic::gpt2),
    ("gpt_neox", classic::gpt_neox),
    ("opt", classic::opt),
    ("bloom", classic::bloom),
    ("falcon", classic::falcon),
    ("phi", classic::phi),
    ("stablelm", classic::stablelm),
    ("starcoder2", classic::starcoder2),
    ("llama", rotary::llama),
    ("qwen2", rotary::qwen2),
    ("gemma2", rotary::gemma2),
];

const ENCODER_DECODERS: [&str; 8] = ["t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100"];

/// What the decoder of a checkpoint is made of.
pub(crate) fn spec(config: &Fields) -> Result<DecoderSpec> {
    let name = config.text("model_type", "")?;
    if config.flag("is_encoder_decoder", false)? || ENCODER_DECODERS.contains(&name) {
        return Err(Error::Unsupported(format!("model_type {name:?}: encoder-decoder models are not built yet")));
    }
    if config.has("quantization_config") {
        return Err(Error::Unsupported("quantization_config: weights quantised by other tools are not read".into()));
    }
    match FAMILIES.iter().find(|(family, _)| *family == name) {
        Some((_, family)) => family(config),
        None => {
            let known = FAMILIES.map(|(family, _)| family).join(", ");
            Err(config.error("model_type", format_args!("{name:?}"), &format!("known are {known}")))
        }
    }
}

/// The number of heads of keys and values; as many as there are heads if there is no default.
fn kv_heads(config: &Fields, field: &str, heads: usize, default: Option<usize>) -> Result<usize> {
    let kv_heads = config.optional_size(field, default, COUNT)?.unwrap_or(heads);
    match heads % kv_heads {
        0 => Ok(kv_heads),
        _ => Err(config.error(field, kv_heads, &format!("a divisor of num_attention_heads = {heads} is accepted"))),
    }
}

/// The heads' share of the width.
fn share(config: &Fields, field: &str, hidden: usize, heads: usize) -> Result<usize> {
    match hidden % heads {
        0 => Ok(hidden / heads),
        _ => Err(config.error(field, heads, &format!("a divisor of the hidden size {hidden} is accepted"))),
    }
}

fn head(config: &Fields, tied: bool) -> Result<Head> {
    let head = Linear { name: "lm_head", bias: false };
    Ok(if config.flag("tie_word_embeddings", tied)? { Head::Tied(head) } else { Head::Own(head) })
}

/// Gives `window` to the layers that `layer_types` calls sliding, or `slides` where the field is absent.
fn windows(config: &Fields, attention: &mut [Attention], window: Option<usize>, slides: impl Fn(usize) -> bool) -> Result<()> {
    let types = config.texts("layer_types")?;
    if let Some(types) = types.as_ref().filter(|types| types.len() != attention.len()) {
        return Err(config.error(
            "layer_types",
            format_args!("{types:?}"),
            &format!("one for each of {} layers is accepted", attention.len()),
        ));
    }
    for (layer, attention) in attention.iter_mut().enumerate() {
        let sliding = match types.as_ref().and_then(|types| types.get(layer)) {
            None => slides(layer),
            Some(&"full_attention") => false,
            Some(&"sliding_attention") => true,
            Some(other) => return Err(config.error("layer_types", other, "full_attention and sliding_attention are accepted")),
        };
        if sliding {
            let window = window.ok_or_else(|| config.error("sliding_window", "null", "layers with sliding attention need a number"))?;
            attention.window = Some(window);
        }
    }
    Ok(())
}

fn activation(config: &Fields, field: &str, default: &str) -> Result<Activation> {
    match config.text(field, default)? {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        other => Err(config.error(field, other, "silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh and relu are accepted")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::models::spec::{Mlp, Positions};
    use crate::models::tiny;
    use serde_json::{Value, json};

    fn of(config: &Value) -> Result<DecoderSpec> {
        spec(&Fields::new(config.as_object().unwrap().clone()))
    }

    /// The spec of a tiny config with some fields changed; a field that is a string `absent` is taken away.
    fn with(family: &str, changes: Value) -> Result<DecoderSpec> {
        let mut config = tiny::config(family);
        for (name, value) in changes.as_object().unwrap() {
            match value.as_str() {
                Some("absent") => drop(config.as_object_mut().unwrap().remove(name)),
                _ => config[name] = value.clone(),
            }
        }
        of(&config)
    }

    fn windows(spec: &DecoderSpec) -> Vec<Option<usize>> {
        spec.attention.iter().map(|attention| attention.window).collect()
    }

    #[track_caller]
    fn refused(family: &str, changes: Value, message: &str) {
        assert_eq!(with(family, changes).unwrap_err().to_string(), message);
    }

    #[test]
    fn absent_fields_have_the_reference_s_defaults() {
        let sizes = |name: &str| {
            let spec = of(&json!({"model_type": name})).unwrap();
            let Attention { heads, kv_heads, head_dim, .. } = spec.attention[0];
            let (Mlp::Plain { inner, .. } | Mlp::Gated { inner, .. }) = spec.mlp;
            let len = match spec.positions {
                Positions::Learned { len, .. } | Positions::Rope { trained: len, .. } => len,
                Positions::Alibi { trained } => trained.unwrap_or(0),
            };
            [spec.vocab, spec.hidden, inner, spec.attention.len(), heads, kv_heads, head_dim, len]
        };
        assert_eq!(sizes("gpt2"), [50257, 768, 3072, 12, 12, 12, 64, 1024]);
        assert_eq!(sizes("llama"), [32000, 4096, 11008, 32, 32, 32, 128, 2048]);
        assert_eq!(sizes("qwen2"), [151936, 4096, 22016, 32, 32, 32, 128, 32768]);
        assert_eq!(sizes("gemma2"), [256000, 2304, 9216, 26, 8, 4, 256, 8192]);
        let tied = ["gpt2", "llama", "qwen2", "gemma2"].map(|name| matches!(of(&json!({"model_type": name})).unwrap().head, Head::Tied(_)));
        assert_eq!(tied, [true, false, false, true]);
    }

    #[test]
    fn kv_heads_absent_or_null() {
        let kv_heads = |family, value: Value| with(family, json!({"num_key_value_heads": value})).map(|spec| spec.attention[0].kv_heads);
        assert_eq!(kv_heads("llama", json!("absent")).unwrap(), 4);
        assert_eq!(kv_heads("qwen2", Value::Null).unwrap(), 4);
        assert!(kv_heads("qwen2", json!("absent")).is_err());
        assert_eq!(with("qwen2", json!({"num_key_value_heads": "absent", "num_attention_heads": 64})).unwrap().attention[0].kv_heads, 32);
    }

    #[test]
    fn windows_follow_the_layers() {
        assert_eq!(windows(&with("gemma2", json!({})).unwrap()), [Some(4), None, Some(4)]);
        assert_eq!(windows(&with("qwen2", json!({})).unwrap()), [None, Some(4), Some(4)]);
        assert_eq!(windows(&with("qwen2", json!({"use_sliding_window": false})).unwrap()), [None; 3]);
        assert_eq!(windows(&with("qwen2", json!({"max_window_layers": 0})).unwrap()), [Some(4); 3]);
        assert_eq!(windows(&with("llama", json!({})).unwrap()), [None; 3]);
        let types = json!(["sliding_attention", "full_attention", "full_attention"]);
        assert_eq!(windows(&with("gemma2", json!({"layer_types": types})).unwrap()), [Some(4), None, None]);
        assert_eq!(windows(&with("qwen2", json!({"layer_types": types})).unwrap()), [Some(4), None, None]);
        let reason = "cannot load config.json: sliding_window = null: layers with sliding attention need a number";
        refused("gemma2", json!({"sliding_window": null}), reason);
        refused("qwen2", json!({"layer_types": types, "use_sliding_window": false}), reason);
        let reason = r#"cannot load config.json: layer_types = ["full_attention"]: one for each of 3 layers is accepted"#;
        refused("gemma2", json!({"layer_types": ["full_attention"]}), reason);
    }

    #[test]
    fn scales_and_caps() {
        let scales = |changes| with("gpt2", changes).unwrap().attention.iter().map(|a| a.scale).collect::<Vec<_>>();
        assert_eq!(scales(json!({})), [0.35355338; 3]);
        assert_eq!(scales(json!({"scale_attn_weights": false, "scale_attn_by_inverse_layer_idx": true})), [1.0, 0.5, 0.33333334]);
        let spec = with("gemma2", json!({"query_pre_attn_scalar": 144})).unwrap();
        assert_eq!((spec.attention[2].scale, spec.attention[2].softcap, spec.softcap), (0.083333336, Some(50.0), Some(30.0)));
        assert_eq!(spec.embedding_scale, Some(5.656854));
        let spec = with("gemma2", json!({"attn_logit_softcapping": null, "final_logit_softcapping": null})).unwrap();
        assert_eq!((spec.attention[2].softcap, spec.softcap), (None, None));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let range = "whole numbers from 1 to 4096 are accepted";
        refused("llama", json!({"num_attention_heads": 0}), &format!("cannot load config.json: num_attention_heads = 0: {range}"));
        refused("llama", json!({"num_hidden_layers": 1e30}), &format!("cannot load config.json: num_hidden_layers = 1e+30: {range}"));
        refused("gpt2", json!({"n_layer": -1}), &format!("cannot load config.json: n_layer = -1: {range}"));
        refused("gpt2", json!({"n_head": "4"}), &format!("cannot load config.json: n_head = \"4\": {range}"));
        refused("gpt2", json!({"n_head": 5}), "cannot load config.json: n_head = 5: a divisor of the hidden size 32 is accepted");
        let reason = "cannot load config.json: num_key_value_heads = 3: a divisor of num_attention_heads = 4 is accepted";
        refused("llama", json!({"num_key_value_heads": 3}), reason);
        let reason = "cannot load config.json: num_attention_heads = 6: a divisor of the hidden size 32 is accepted";
        refused("qwen2", json!({"num_attention_heads": 6, "head_dim": null}), reason);
        for field in ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings"] {
            assert!(with("llama", json!({field: u64::MAX})).is_err(), "{field}");
            assert!(with("llama", json!({field: 0})).is_err(), "{field}");
        }
        refused("llama", json!({"rms_norm_eps": 1e-300}), "cannot load config.json: rms_norm_eps = 1e-300: a number above 0 is accepted");
    }

    #[test]
    fn unknown_models_are_refused_by_name() {
        let known = "known are gpt2, gpt_neox, opt, bloom, falcon, phi, stablelm, starcoder2, llama, qwen2, gemma2";
        refused("llama", json!({"model_type": "lama"}), &format!("cannot load config.json: model_type = \"lama\": {known}"));
        refused("llama", json!({"model_type": "absent"}), &format!("cannot load config.json: model_type = \"\": {known}"));
        let reason = "unsupported: model_type \"bart\": encoder-decoder models are not built yet";
        refused("llama", json!({"model_type": "bart"}), reason);
        assert!(matches!(with("llama", json!({"is_encoder_decoder": true})), Err(Error::Unsupported(_))));
        assert!(matches!(with("llama", json!({"quantization_config": {}})), Err(Error::Unsupported(_))));
        assert!(with("llama", json!({"quantization_config": null})).is_ok());
        let reason =
            "cannot load config.json: hidden_act = mish: silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh and relu are accepted";
        refused("qwen2", json!({"hidden_act": "mish"}), reason);
    }
}
