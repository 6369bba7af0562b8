//! What benches share: checkpoints of real shapes, prompts, medians.
// No bench uses all of it.
#![allow(dead_code)]

use anyhow::Result;
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, json};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Duration,
};

/// Ids that look like nothing in particular, the same for every engine.
pub fn ids(len: usize, vocab_size: u32) -> Vec<u32> {
    (0..len as u32).map(|at| at.wrapping_mul(2_654_435_761) % (vocab_size - 6) + 6).collect()
}

pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// A folder with a random checkpoint of SmolLM2-135M's shape, made once. Both files hold the same values, which bf16 can hold.
pub fn smol_shaped(half: bool) -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(if half { "smollm2-shaped-bf16" } else { "smollm2-shaped-f32" });
    SMOL.write(&folder, half)?;
    Ok(folder)
}

/// The sizes of a model whose heads have 64 dimensions and whose head is its embeddings.
pub struct Shape {
    pub family: &'static str,
    pub architecture: &'static str,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub mlp: usize,
    pub layers: usize,
    pub vocab: usize,
    pub rope_theta: f64,
    pub eps: f64,
    /// Whether queries, keys and values have biases.
    pub biases: bool,
}

/// SmolLM2-135M.
pub const SMOL: Shape = Shape {
    family: "llama",
    architecture: "LlamaForCausalLM",
    hidden: 576,
    heads: 9,
    kv_heads: 3,
    mlp: 1536,
    layers: 30,
    vocab: 49152,
    rope_theta: 100_000.0,
    eps: 1e-5,
    biases: false,
};

impl Shape {
    /// Writes a random checkpoint into `folder`, unless it is there.
    pub fn write(&self, folder: &Path, half: bool) -> Result<()> {
        let weights = folder.join("model.safetensors");
        if weights.exists() {
            return Ok(());
        }
        fs::create_dir_all(folder)?;
        let (hidden, kv, mlp, layers, vocab) = (self.hidden, self.kv_heads * 64, self.mlp, self.layers, self.vocab);
        let config = json!({
            "architectures": [self.architecture], "model_type": self.family, "hidden_act": "silu", "hidden_size": hidden,
            "intermediate_size": mlp, "max_position_embeddings": 16384, "num_attention_heads": self.heads, "num_hidden_layers": layers,
            "num_key_value_heads": self.kv_heads, "rms_norm_eps": self.eps, "rope_theta": self.rope_theta, "tie_word_embeddings": true,
            "vocab_size": vocab, "use_sliding_window": false, "sliding_window": 16384, "max_window_layers": layers,
            "torch_dtype": if half { "bfloat16" } else { "float32" },
        });
        fs::write(folder.join("config.json"), serde_json::to_vec_pretty(&config)?)?;

        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
        for layer in 0..layers {
            let shapes = [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![mlp, hidden]),
                ("mlp.up_proj", vec![mlp, hidden]),
                ("mlp.down_proj", vec![hidden, mlp]),
            ];
            tensors.extend(shapes.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
            let biases = [("q", hidden), ("k", kv), ("v", kv)].into_iter().filter(|_| self.biases);
            tensors.extend(biases.map(|(name, len)| (format!("model.layers.{layer}.self_attn.{name}_proj.bias"), vec![len])));
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        // A half-written file never has the name.
        let partial = folder.join("partial");
        write_safetensors(&partial, &tensors, half)?;
        fs::rename(partial, weights)?;
        Ok(())
    }
}

/// A folder with a random f32 checkpoint of t5-small's shape, made once.
pub fn t5_shaped() -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("t5-small-shaped-f32");
    let weights = folder.join("model.safetensors");
    if weights.exists() {
        return Ok(folder);
    }
    fs::create_dir_all(&folder)?;
    let (hidden, mlp, layers, vocab) = (512, 2048, 6, 32128);
    let config = json!({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": true, "d_model": hidden, "d_kv": 64,
        "d_ff": mlp, "num_layers": layers, "num_heads": 8, "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1, "initializer_factor": 1.0, "vocab_size": vocab, "decoder_start_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 0, "tie_word_embeddings": true, "feed_forward_proj": "relu",
    });
    fs::write(folder.join("config.json"), serde_json::to_vec_pretty(&config)?)?;

    let mut tensors = vec![("shared.weight".to_owned(), vec![vocab, hidden])];
    for (stack, parts) in [("encoder", &["SelfAttention"][..]), ("decoder", &["SelfAttention", "EncDecAttention"])] {
        for block in 0..layers {
            let name = |part: usize, tensor: String| format!("{stack}.block.{block}.layer.{part}.{tensor}.weight");
            for (part, attention) in parts.iter().enumerate() {
                for matrix in ["q", "k", "v", "o"] {
                    tensors.push((name(part, format!("{attention}.{matrix}")), vec![hidden, hidden]));
                }
                tensors.push((name(part, "layer_norm".into()), vec![hidden]));
            }
            if block == 0 {
                tensors.push((name(0, "SelfAttention.relative_attention_bias".into()), vec![32, 8]));
            }
            tensors.push((name(parts.len(), "DenseReluDense.wi".into()), vec![mlp, hidden]));
            tensors.push((name(parts.len(), "DenseReluDense.wo".into()), vec![hidden, mlp]));
            tensors.push((name(parts.len(), "layer_norm".into()), vec![hidden]));
        }
        tensors.push((format!("{stack}.final_layer_norm.weight"), vec![hidden]));
    }
    let partial = folder.join("partial");
    write_safetensors(&partial, &tensors, false)?;
    fs::rename(partial, weights)?;
    Ok(folder)
}

/// Writes random matrices and biases, and norms of ones, holding none of them in memory.
fn write_safetensors(path: &Path, tensors: &[(String, Vec<usize>)], half: bool) -> Result<()> {
    let (dtype, width) = if half { ("BF16", 2) } else { ("F32", 4) };
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * width;
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for (name, shape) in tensors {
        for _ in 0..shape.iter().product() {
            let value = if name.ends_with("norm.weight") { 1.0 } else { rng.random_range(-0.05..0.05) };
            let value = bf16::from_f32(value);
            if half {
                out.write_all(&value.to_le_bytes())?;
            } else {
                out.write_all(&value.to_f32().to_le_bytes())?;
            }
        }
    }
    out.flush()?;
    Ok(())
}
