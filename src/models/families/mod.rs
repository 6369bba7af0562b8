//! The known families: `config.json` to a [`DecoderSpec`], one short function each.

mod classic;
mod rotary;
mod seq2seq;

use super::{
    fields::{COUNT, Fields},
    spec::{DecoderSpec, Head, Linear},
};
use crate::{
    error::{Error, Result},
    kernels::{Activation, Attention, Sight},
};

type Family = fn(&Fields) -> Result<DecoderSpec>;

const FAMILIES: [(&str, Family); 29] = [
    ("gpt2", classic::gpt2),
    ("gpt_neox", classic::gpt_neox),
    ("opt", classic::opt),
    ("bloom", classic::bloom),
    ("falcon", classic::falcon),
    ("phi", classic::phi),
    ("stablelm", classic::stablelm),
    ("starcoder2", classic::starcoder2),
    ("llama", rotary::llama),
    ("mistral", rotary::mistral),
    ("qwen2", rotary::qwen2),
    ("qwen3", rotary::qwen3),
    ("gemma", rotary::gemma),
    ("gemma2", rotary::gemma2),
    ("gemma3", rotary::gemma3),
    ("gemma3_text", rotary::gemma3_text),
    ("phi3", rotary::phi3),
    ("smollm3", rotary::smollm3),
    ("olmo2", rotary::olmo2),
    ("mixtral", rotary::mixtral),
    ("qwen3_moe", rotary::qwen3_moe),
    ("t5", seq2seq::t5),
    ("mt5", seq2seq::mt5),
    ("umt5", seq2seq::umt5),
    ("bart", seq2seq::bart),
    ("mbart", seq2seq::mbart),
    ("marian", seq2seq::marian),
    ("pegasus", seq2seq::pegasus),
    ("m2m_100", seq2seq::m2m_100),
];

/// What the decoder of a checkpoint is made of.
pub(crate) fn spec(config: &Fields) -> Result<DecoderSpec> {
    let name = config.text("model_type", "")?;
    if config.has("quantization_config") {
        return Err(Error::Unsupported("quantization_config: weights quantised by other tools are not read".into()));
    }
    match FAMILIES.iter().find(|(family, _)| *family == name) {
        Some((_, family)) => {
            let spec = family(config)?;
            let both = spec.encoder.is_some();
            match config.flag("is_encoder_decoder", both)? {
                flag if flag == both => Ok(spec),
                flag => Err(Error::Unsupported(format!("model_type {name:?} with is_encoder_decoder = {flag}"))),
            }
        }
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
            attention.sight = Sight::Window(window);
        }
    }
    Ok(())
}

fn activation(config: &Fields, field: &str, default: &str) -> Result<Activation> {
    activation_named(config, field, config.text(field, default)?)
}

/// The activation that part of a field names.
fn activation_named(config: &Fields, field: &str, name: &str) -> Result<Activation> {
    match name {
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
        let window = |attention: &Attention| if let Sight::Window(window) = attention.sight { Some(window) } else { None };
        spec.attention.iter().map(window).collect()
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
            let (Mlp::Plain { inner, .. } | Mlp::Gated { inner, .. } | Mlp::GatedFused { inner, .. }) = spec.mlp;
            let len = match spec.positions {
                Positions::Learned { len, .. } | Positions::Rope { trained: len, .. } | Positions::Waves { trained: len, .. } => len,
                Positions::Relative { reach, .. } => reach,
                Positions::Alibi { trained } => trained.unwrap_or(0),
            };
            [spec.vocab, spec.hidden, inner, spec.attention.len(), heads, kv_heads, head_dim, len]
        };
        assert_eq!(sizes("gpt2"), [50257, 768, 3072, 12, 12, 12, 64, 1024]);
        assert_eq!(sizes("llama"), [32000, 4096, 11008, 32, 32, 32, 128, 2048]);
        assert_eq!(sizes("qwen2"), [151936, 4096, 22016, 32, 32, 32, 128, 32768]);
        assert_eq!(sizes("gemma2"), [256000, 2304, 9216, 26, 8, 4, 256, 8192]);
        assert_eq!(sizes("mistral"), [32000, 4096, 14336, 32, 32, 8, 128, 131072]);
        assert_eq!(sizes("qwen3"), [151936, 4096, 22016, 32, 32, 32, 128, 32768]);
        assert_eq!(sizes("gemma"), [256000, 3072, 24576, 28, 16, 16, 256, 8192]);
        assert_eq!(sizes("gemma3_text"), [262208, 2304, 9216, 26, 8, 4, 256, 131072]);
        assert_eq!(sizes("phi3"), [32064, 3072, 8192, 32, 32, 32, 96, 4096]);
        assert_eq!(sizes("smollm3"), [128256, 2048, 11008, 36, 16, 4, 128, 32768]);
        assert_eq!(sizes("olmo2"), [50304, 4096, 11008, 32, 32, 32, 128, 2048]);
        assert_eq!(sizes("mixtral"), [32000, 4096, 14336, 32, 32, 8, 128, 131072]);
        assert_eq!(sizes("qwen3_moe"), [151936, 2048, 6144, 24, 32, 4, 64, 32768]);
        assert_eq!(sizes("gpt_neox"), [50432, 6144, 24576, 44, 64, 64, 96, 2048]);
        assert_eq!(sizes("opt"), [50272, 768, 3072, 12, 12, 12, 64, 2048]);
        assert_eq!(sizes("bloom"), [250880, 64, 256, 2, 8, 8, 8, 0]);
        assert_eq!(sizes("falcon"), [65024, 4544, 18176, 32, 71, 1, 64, 2048]);
        assert_eq!(sizes("phi"), [51200, 2048, 8192, 24, 32, 32, 64, 2048]);
        assert_eq!(sizes("stablelm"), [50304, 2560, 6912, 32, 32, 32, 80, 4096]);
        assert_eq!(sizes("starcoder2"), [49152, 3072, 12288, 30, 24, 2, 128, 4096]);
        assert_eq!(sizes("t5"), [32128, 512, 2048, 6, 8, 8, 64, 128]);
        assert_eq!(sizes("mt5"), [250112, 512, 1024, 8, 6, 6, 64, 128]);
        assert_eq!(sizes("umt5"), [250112, 512, 1024, 8, 6, 6, 64, 128]);
        assert_eq!(sizes("bart"), [50265, 1024, 4096, 12, 16, 16, 64, 1024]);
        assert_eq!(sizes("mbart"), [50265, 1024, 4096, 12, 16, 16, 64, 1024]);
        assert_eq!(sizes("marian"), [58101, 1024, 4096, 12, 16, 16, 64, 1024]);
        assert_eq!(sizes("pegasus"), [50265, 1024, 4096, 12, 16, 16, 64, 1024]);
        assert_eq!(sizes("m2m_100"), [128112, 1024, 4096, 12, 16, 16, 64, 1024]);
        let tied = |name: &&str| *name != "gemma3" && matches!(of(&json!({"model_type": name})).unwrap().head, Head::Tied(_));
        let tied: Vec<_> = FAMILIES.into_iter().map(|(name, _)| name).filter(tied).collect();
        let expected = ["gpt2", "opt", "bloom", "falcon", "starcoder2", "gemma", "gemma2", "gemma3_text", "smollm3"];
        assert_eq!(tied[..9], expected);
        assert_eq!(tied[9..], ["t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "m2m_100"]);
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
        for family in ["mistral", "phi3", "mixtral", "qwen3_moe"] {
            assert_eq!(windows(&with(family, json!({})).unwrap()), [Some(6); 3]);
            assert_eq!(windows(&with(family, json!({"sliding_window": null})).unwrap()), [None; 3]);
            let absent = windows(&with(family, json!({"sliding_window": "absent"})).unwrap())[0];
            assert_eq!(absent, ["mistral", "qwen3_moe"].contains(&family).then_some(4096));
        }
        assert_eq!(windows(&with("qwen3_moe", json!({"use_sliding_window": false})).unwrap()), [None; 3]);
        assert_eq!(windows(&with("gemma3_text", json!({})).unwrap()), [Some(4), None, Some(4)]);
        assert_eq!(windows(&with("smollm3", json!({})).unwrap()), [None, Some(4), None]);
        assert_eq!(windows(&with("smollm3", json!({"use_sliding_window": false})).unwrap()), [None; 3]);
        let types = json!(["sliding_attention", "full_attention", "full_attention"]);
        assert_eq!(windows(&with("gemma2", json!({"layer_types": types})).unwrap()), [Some(4), None, None]);
        assert_eq!(windows(&with("qwen2", json!({"layer_types": types})).unwrap()), [Some(4), None, None]);
        let reason = "cannot load config.json: sliding_window = null: layers with sliding attention need a number";
        refused("gemma2", json!({"sliding_window": null}), reason);
        refused("qwen2", json!({"layer_types": types, "use_sliding_window": false}), reason);
        let reason = r#"cannot load config.json: layer_types = ["full_attention"]: one for each of 3 layers is accepted"#;
        refused("gemma2", json!({"layer_types": ["full_attention"]}), reason);
    }

    fn turns(spec: &DecoderSpec) -> Vec<Option<usize>> {
        match &spec.positions {
            Positions::Rope { layers, .. } => layers.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn pairs(spec: &DecoderSpec) -> Vec<Vec<f32>> {
        match &spec.positions {
            Positions::Rope { rotations, .. } => rotations.iter().map(|rotation| rotation.at(1).inv_freq.clone()).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn rotations_follow_the_layers() {
        assert_eq!(turns(&with("llama", json!({})).unwrap()), [Some(0); 3]);
        assert_eq!(turns(&with("smollm3", json!({})).unwrap()), [Some(0), None, Some(0)]);
        assert_eq!(turns(&with("smollm3", json!({"no_rope_layers": [0, 1, 1]})).unwrap()), [None, Some(0), Some(0)]);
        let reason = "cannot load config.json: no_rope_layers = [1]: one for each of 3 layers is accepted";
        refused("smollm3", json!({"no_rope_layers": [1]}), reason);
        assert_eq!(turns(&with("gemma3_text", json!({})).unwrap()), [Some(1), Some(0), Some(1)]);
        // Full attention: a base of a million, a quarter of the speed; windows: a base of ten thousand.
        let (full, sliding) = (vec![0.25, 0.007_905_695, 0.00025, 7.905694e-6], vec![1.0, 0.1, 0.01, 0.001]);
        assert_eq!(pairs(&with("gemma3_text", json!({})).unwrap()), [full.clone(), sliding.clone()]);
        let parameters = json!({
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        });
        let new = with("gemma3_text", json!({"rope_scaling": "absent", "rope_parameters": parameters})).unwrap();
        assert_eq!(pairs(&new), [full, sliding]);
        let old = with("gemma3_text", json!({"rope_scaling": null, "rope_theta": 1e4, "rope_local_base_freq": 16.0})).unwrap();
        assert_eq!(pairs(&old), [[1.0, 0.1, 0.01, 0.001], [1.0, 0.5, 0.25, 0.125]]);
        // Three quarters of a head of 8.
        assert_eq!(pairs(&with("phi3", json!({})).unwrap())[0].len(), 3);
    }

    #[test]
    fn experts_follow_the_layers() {
        let experts = |family, changes| with(family, changes).unwrap().experts.unwrap();
        let qwen = experts("qwen3_moe", json!({}));
        assert_eq!((qwen.layers, qwen.count, qwen.top, qwen.inner, qwen.renormalise), (vec![true, false, true], 5, 3, 20, false));
        let qwen = experts("qwen3_moe", json!({"mlp_only_layers": null, "decoder_sparse_step": 2, "norm_topk_prob": true}));
        assert_eq!((qwen.layers, qwen.renormalise), (vec![false, true, false], true));
        assert_eq!(experts("qwen3_moe", json!({"num_local_experts": 7})).count, 7);
        let qwen = of(&json!({"model_type": "qwen3_moe"})).unwrap().experts.unwrap();
        assert_eq!((qwen.count, qwen.top, qwen.inner), (128, 8, 768));
        let mixtral = of(&json!({"model_type": "mixtral"})).unwrap().experts.unwrap();
        assert_eq!((mixtral.layers, mixtral.count, mixtral.top, mixtral.inner, mixtral.renormalise), (vec![true; 32], 8, 2, 14336, true));
        let reason = "cannot load config.json: num_experts_per_tok = 6: at most the number of experts, 4, is accepted";
        refused("mixtral", json!({"num_experts_per_tok": 6}), reason);
    }

    #[test]
    fn a_text_inside_another_model_is_read() {
        let mut text = tiny::config("gemma3_text");
        text["tie_word_embeddings"] = json!(false);
        let spec = of(&json!({"model_type": "gemma3", "text_config": text})).unwrap();
        assert_eq!(
            (spec.base, spec.head, spec.hidden),
            ("language_model.model.", Head::Tied(Linear { name: "language_model.lm_head", bias: false }), 32)
        );
        let reason = "cannot load config.json: text_config = null: an object is accepted";
        refused("gemma3_text", json!({"model_type": "gemma3"}), reason);
    }

    #[test]
    fn gemma_means_the_tanh() {
        let activation = |value: &str| match with("gemma", json!({"hidden_act": value})).unwrap().mlp {
            Mlp::Gated { activation, .. } => activation,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            [activation("gelu"), activation("absent"), activation("relu")],
            [Activation::GeluTanh, Activation::GeluTanh, Activation::Relu]
        );
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
        let known = "known are gpt2, gpt_neox, opt, bloom, falcon, phi, stablelm, starcoder2, llama, mistral, \
            qwen2, qwen3, gemma, gemma2, gemma3, gemma3_text, phi3, smollm3, olmo2, mixtral, qwen3_moe, \
            t5, mt5, umt5, bart, mbart, marian, pegasus, m2m_100";
        refused("llama", json!({"model_type": "lama"}), &format!("cannot load config.json: model_type = \"lama\": {known}"));
        refused("llama", json!({"model_type": "absent"}), &format!("cannot load config.json: model_type = \"\": {known}"));
        refused("llama", json!({"is_encoder_decoder": true}), "unsupported: model_type \"llama\" with is_encoder_decoder = true");
        refused("bart", json!({"is_encoder_decoder": false}), "unsupported: model_type \"bart\" with is_encoder_decoder = false");
        assert!(matches!(with("llama", json!({"quantization_config": {}})), Err(Error::Unsupported(_))));
        assert!(with("llama", json!({"quantization_config": null})).is_ok());
        let reason =
            "cannot load config.json: hidden_act = mish: silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh and relu are accepted";
        refused("qwen2", json!({"hidden_act": "mish"}), reason);
    }
}
