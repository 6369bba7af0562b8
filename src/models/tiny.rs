//! Tiny random checkpoint folders for tests.
#![allow(clippy::unwrap_used)]

use super::{
    families,
    fields::Fields,
    spec::{Cross, DecoderSpec, Encoder, Extent, Head, Layout, Linear, Mlp, Norm, NormKind, Positions, Projection, QkNorm, Qkv},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};
use tempfile::TempDir;

/// One of each family, and of each variant that is computed differently.
pub(crate) const FAMILIES: [&str; 38] = [
    "gpt2",
    "gpt_neox",
    "gpt_neox-serial",
    "opt",
    "opt-post",
    "bloom",
    "bloom-normed",
    "falcon",
    "falcon-new",
    "falcon-alibi",
    "phi",
    "phi-norms",
    "stablelm",
    "stablelm-parallel",
    "stablelm-norms",
    "starcoder2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "t5",
    "t5-gated",
    "mt5",
    "umt5",
    "bart",
    "mbart",
    "marian",
    "marian-apart",
    "pegasus",
    "m2m_100",
];

/// What the encoders of tests read.
pub(crate) const SOURCE: [u32; 5] = [7, 31, 2, 19, 44];

/// Tensors by name, with shape and values.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A folder with `config.json` and `model.safetensors` (F32) of a family.
pub(crate) fn folder(family: &str) -> TempDir {
    write(&config(family), Dtype::F32)
}

/// A folder with a config and random weights that fit it.
pub(crate) fn write(config: &Value, dtype: Dtype) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    save(&folder.path().join("model.safetensors"), &tensors(config), dtype);
    folder
}

/// 61 ids, 3 layers, 32 dimensions; windows of 4 where the family has windows, of 6 where all layers have them.
pub(crate) fn config(family: &str) -> Value {
    let (model_type, variant) = family.split_once('-').unwrap_or((family, ""));
    let more = match (model_type, variant) {
        ("gpt_neox", "serial") => json!({"use_parallel_residual": false}),
        ("opt", "post") => json!({"do_layer_norm_before": false, "word_embed_proj_dim": 24}),
        ("bloom", "normed") => json!({"apply_residual_connection_post_layernorm": true}),
        ("falcon", "new") => json!({"new_decoder_architecture": true, "num_kv_heads": 2}),
        ("falcon", "alibi") => json!({"alibi": true, "multi_query": false, "parallel_attn": false, "bias": true}),
        ("stablelm", "parallel") => json!({"use_parallel_residual": true, "use_qkv_bias": true}),
        ("phi" | "stablelm", "norms") => json!({"qk_layernorm": true}),
        ("starcoder2" | "mistral", _) => json!({"sliding_window": 6}),
        ("gemma3_text", _) => json!({"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("phi3", _) => json!({
            "sliding_window": 6, "original_max_position_embeddings": 20, "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 4.0, 8.0]},
        }),
        ("t5", "gated") => {
            json!({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": false, "num_decoder_layers": 3, "num_layers": 2})
        }
        ("marian", "apart") => json!({"share_encoder_decoder_embeddings": false, "vocab_size": 57, "decoder_vocab_size": 61}),
        ("smollm3", _) => json!({"no_rope_layer_interval": 2}),
        ("mixtral", _) => json!({"sliding_window": 6, "num_local_experts": 4}),
        ("qwen3_moe", _) => json!({
            "sliding_window": 6, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "mlp_only_layers": [1],
        }),
        _ => json!({}),
    };
    let mut config = match model_type {
        "gpt2" => json!({"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}),
        "bloom" => json!({"model_type": "bloom", "vocab_size": 61, "hidden_size": 36, "n_layer": 3, "n_head": 6}),
        "t5" | "mt5" | "umt5" => json!({
            "model_type": model_type, "vocab_size": 61, "d_model": 32, "d_ff": 48, "num_layers": 3, "num_heads": 4, "d_kv": 6,
            "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9,
        }),
        "bart" | "mbart" | "marian" | "pegasus" | "m2m_100" => json!({
            "model_type": model_type, "vocab_size": 61, "d_model": 32, "encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "encoder_layers": 2,
            "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 4, "max_position_embeddings": 40,
            "scale_embedding": true,
        }),
        _ => json!({
            "model_type": model_type, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 40,
            "query_pre_attn_scalar": 8, "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1,
        }),
    };
    if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
        config.extend(more);
    }
    config
}

/// The tensors that a config asks for, with the same random values each time.
pub(crate) fn tensors(config: &Value) -> Tensors {
    let spec = families::spec(&Fields::new(config.as_object().unwrap().clone())).unwrap();
    let mut random = Random { rng: ChaCha8Rng::seed_from_u64(7), tensors: Tensors::new() };
    random.add(format!("{}{}.weight", spec.base, spec.embedding), vec![spec.vocab, spec.outer()]);
    random.stack(&spec, spec.encoder.as_ref().map(|encoder| &encoder.cross));
    if let Some(Encoder { stack, .. }) = spec.encoder.as_deref() {
        if stack.aliases.is_empty() {
            random.add(format!("{}{}.weight", stack.base, stack.embedding), vec![stack.vocab, stack.hidden]);
        }
        random.stack(stack, None);
    }
    if let Head::Own(Linear { name, bias }) = spec.head {
        random.add(format!("{name}.weight"), vec![spec.vocab, spec.outer()]);
        if bias {
            random.add(format!("{name}.bias"), vec![spec.vocab]);
        }
    }
    if let Some(name) = spec.logits_bias {
        random.add(name.to_owned(), vec![1, spec.vocab]);
    }
    random.tensors
}

/// Writes a safetensors file.
pub(crate) fn save(path: &Path, tensors: &Tensors, dtype: Dtype) {
    let bytes = |value: &f32| match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::BF16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
        _ => vec![0; dtype.bitsize() / 8],
    };
    let data: Vec<(&String, &Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(name, (shape, values))| (name, shape, values.iter().flat_map(bytes).collect())).collect();
    let views = data.iter().map(|(name, shape, data)| (name, TensorView::new(dtype, shape.to_vec(), data).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

struct Random {
    rng: ChaCha8Rng,
    tensors: Tensors,
}

impl Random {
    /// Values large enough for logits that differ.
    fn add(&mut self, name: String, shape: Vec<usize>) {
        let values = (0..shape.iter().product()).map(|_| self.rng.random_range(-0.5..0.5)).collect();
        self.tensors.insert(name, (shape, values));
    }

    fn norm(&mut self, norm: Norm, name: &str, width: usize) {
        if norm.kind == NormKind::LayerBare {
            return;
        }
        self.add(format!("{name}.weight"), vec![width]);
        if norm.kind == NormKind::Layer {
            self.add(format!("{name}.bias"), vec![width]);
        }
    }

    /// All but the table and the head.
    fn stack(&mut self, spec: &DecoderSpec, cross: Option<&Cross>) {
        let table = |name: &str| format!("{}{name}.weight", spec.base);
        if let Some(name) = spec.embedding_norm {
            self.norm(spec.norm, &format!("{}{name}", spec.base), spec.hidden);
        }
        if let Some(Projection { width, inward, outward }) = spec.projection {
            self.add(table(inward), vec![spec.hidden, width]);
            self.add(table(outward), vec![width, spec.hidden]);
        }
        if let Positions::Learned { name, skip, len } = spec.positions {
            self.add(table(name), vec![skip + len, spec.hidden]);
        }
        for index in 0..spec.attention.len() {
            self.layer(spec, cross, index);
        }
        if let Some(name) = spec.final_norm {
            self.norm(spec.norm, &format!("{}{name}", spec.base), spec.hidden);
        }
    }

    fn layer(&mut self, spec: &DecoderSpec, cross: Option<&Cross>, index: usize) {
        let attention = &spec.attention[index];
        let (width, kv_width) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        let mut linears = vec![(spec.out, spec.hidden, width)];
        match spec.qkv {
            Qkv::Split([q, k, v]) => {
                linears.extend([(q, width, spec.hidden), (k, kv_width, spec.hidden), (v, kv_width, spec.hidden)]);
            }
            Qkv::Fused(qkv) | Qkv::Grouped(qkv) => linears.push((qkv, width + 2 * kv_width, spec.hidden)),
        }
        match spec.mlp {
            Mlp::Plain { up, down, inner, .. } => linears.extend([(up, inner, spec.hidden), (down, spec.hidden, inner)]),
            Mlp::Gated { gate, up, down, inner, .. } => {
                linears.extend([(gate, inner, spec.hidden), (up, inner, spec.hidden), (down, spec.hidden, inner)]);
            }
            Mlp::GatedFused { gate_up, down, inner, .. } => {
                linears.extend([(gate_up, 2 * inner, spec.hidden), (down, spec.hidden, inner)]);
            }
        }
        let prefix = format!("{}{}{index}.", spec.base, spec.layer);
        if let Some(Cross { norm, query, key, value, out, .. }) = cross {
            linears.extend([(*query, width, spec.hidden), (*key, kv_width, spec.hidden), (*value, kv_width, spec.hidden)]);
            linears.push((*out, spec.hidden, width));
            self.norm(spec.norm, &format!("{prefix}{norm}"), spec.hidden);
        }
        if let Positions::Relative { name, buckets, each, .. } = spec.positions
            && (each || index == 0)
        {
            self.add(format!("{prefix}{name}.weight"), vec![buckets, attention.heads]);
        }
        if let Some(experts) = spec.experts.as_ref().filter(|experts| experts.layers[index]) {
            // Beside the dense part, which is not read then.
            self.add(format!("{prefix}{}.weight", experts.router), vec![experts.count, spec.hidden]);
            for expert in 0..experts.count {
                for (name, shape) in [
                    (experts.gate, [experts.inner, spec.hidden]),
                    (experts.up, [experts.inner, spec.hidden]),
                    (experts.down, [spec.hidden, experts.inner]),
                ] {
                    self.add(format!("{prefix}{}{expert}.{name}.weight", experts.expert), shape.to_vec());
                }
            }
        }
        for (Linear { name, bias }, outputs, inputs) in linears {
            let shape = if spec.layout == Layout::Conv1d { [inputs, outputs] } else { [outputs, inputs] };
            self.add(format!("{prefix}{name}.weight"), shape.to_vec());
            if bias {
                self.add(format!("{prefix}{name}.bias"), vec![outputs]);
            }
        }
        if let Some(QkNorm { query, key, norm, extent }) = spec.qk_norm {
            for (name, heads) in [(query, attention.heads), (key, attention.kv_heads)] {
                let (name, dim) = (format!("{prefix}{name}"), attention.head_dim);
                match extent {
                    Extent::Head => self.norm(norm, &name, dim),
                    Extent::OwnHead => (0..heads).for_each(|head| self.norm(norm, &format!("{name}.{head}"), dim)),
                    Extent::Token => self.norm(norm, &name, heads * dim),
                }
            }
        }
        let add = |norm| {
            self.norm(spec.norm, &format!("{prefix}{norm}"), spec.hidden);
            Ok(())
        };
        spec.residual.try_map(add).unwrap();
    }
}
