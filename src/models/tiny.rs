//! Tiny random checkpoint folders for tests.
#![allow(clippy::unwrap_used)]

use super::{
    families,
    fields::Fields,
    spec::{DecoderSpec, Extent, Head, Layout, Linear, Mlp, NormKind, Positions, QkNorm, Qkv, Residual},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};
use tempfile::TempDir;

/// One of each family.
pub(crate) const FAMILIES: [&str; 13] =
    ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "mixtral", "qwen3_moe"];

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
    let more = match family {
        "mistral" => json!({"sliding_window": 6}),
        "gemma3_text" => json!({"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        "phi3" => json!({
            "sliding_window": 6, "original_max_position_embeddings": 20, "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 4.0, 8.0]},
        }),
        "smollm3" => json!({"no_rope_layer_interval": 2}),
        "mixtral" => json!({"sliding_window": 6, "num_local_experts": 4}),
        "qwen3_moe" => json!({
            "sliding_window": 6, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "mlp_only_layers": [1],
        }),
        _ => json!({}),
    };
    let mut config = match family {
        "gpt2" => json!({"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}),
        _ => json!({
            "model_type": family, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
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
    let table = |name: &str| format!("{}{name}.weight", spec.base);
    random.add(table(spec.embedding), vec![spec.vocab, spec.hidden]);
    if let Positions::Learned { name, len } = spec.positions {
        random.add(table(name), vec![len, spec.hidden]);
    }
    for index in 0..spec.attention.len() {
        random.layer(&spec, index);
    }
    random.norm(&spec, &format!("{}{}", spec.base, spec.final_norm));
    if let Head::Own(name) = spec.head {
        random.add(format!("{name}.weight"), vec![spec.vocab, spec.hidden]);
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

    fn norm(&mut self, spec: &DecoderSpec, name: &str) {
        self.add(format!("{name}.weight"), vec![spec.hidden]);
        if spec.norm.kind == NormKind::Layer {
            self.add(format!("{name}.bias"), vec![spec.hidden]);
        }
    }

    fn layer(&mut self, spec: &DecoderSpec, index: usize) {
        let attention = &spec.attention[index];
        let (width, kv_width) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        let mut linears = vec![(spec.out, spec.hidden, width)];
        match spec.qkv {
            Qkv::Split([q, k, v]) => {
                linears.extend([(q, width, spec.hidden), (k, kv_width, spec.hidden), (v, kv_width, spec.hidden)]);
            }
            Qkv::Fused(qkv) => linears.push((qkv, width + 2 * kv_width, spec.hidden)),
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
        if let Some(QkNorm { query, key, extent, .. }) = spec.qk_norm {
            let [width, kv_width] = match extent {
                Extent::Head => [attention.head_dim; 2],
                Extent::Token => [width, kv_width],
            };
            self.add(format!("{prefix}{query}.weight"), vec![width]);
            self.add(format!("{prefix}{key}.weight"), vec![kv_width]);
        }
        let norms = match spec.residual {
            Residual::Pre { attention, mlp } | Residual::Post { attention, mlp } => vec![attention, mlp],
            Residual::PrePost { attention, mlp } => [attention, mlp].concat(),
        };
        for norm in norms {
            self.norm(spec, &format!("{prefix}{norm}"));
        }
    }
}
