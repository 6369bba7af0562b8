//! Checkpoints that every engine reads: random ones in real shapes with a tokenizer of their size, and the storyteller.

use crate::common::{SMOL, Shape};
use anyhow::{Result, bail, ensure};
use candle_generate::candle_core::{DType, Device, safetensors};
use serde_json::{Map, json};
use std::{collections::HashMap, fs, path::Path};

/// Qwen2.5-0.5B.
const QWEN: Shape = Shape {
    family: "qwen2",
    architecture: "Qwen2ForCausalLM",
    hidden: 896,
    heads: 14,
    kv_heads: 2,
    mlp: 4864,
    layers: 24,
    vocab: 151_936,
    rope_theta: 1_000_000.0,
    eps: 1e-6,
    biases: true,
};

/// The token that begins and ends texts of random models.
const END: &str = "<|endoftext|>";

/// Writes the checkpoint of a name, whose weights are `f32` or `bf16`.
pub fn checkpoint(name: &str, dtype: &str, folder: &Path) -> Result<()> {
    let half = match dtype {
        "bf16" => true,
        "f32" => false,
        _ => bail!("dtype {dtype}; f32 and bf16 are accepted"),
    };
    fs::create_dir_all(folder)?;
    match name {
        "smollm2-135m" => random(&SMOL, half, folder),
        "qwen2.5-0.5b" => random(&QWEN, half, folder),
        "storyteller" => storyteller(half, folder),
        _ => bail!("checkpoint {name}; smollm2-135m, qwen2.5-0.5b and storyteller are accepted"),
    }
}

fn random(shape: &Shape, half: bool, folder: &Path) -> Result<()> {
    shape.write(folder, half)?;
    fs::write(folder.join("tokenizer.json"), tokenizer(shape.vocab)?)?;
    let config = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "unk_token": END });
    fs::write(folder.join("tokenizer_config.json"), config.to_string())?;
    Ok(())
}

/// The storyteller, whose file is bf16; its tokenizer is too.
fn storyteller(half: bool, folder: &Path) -> Result<()> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/storyteller");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(from.join(name), folder.join(name))?;
    }
    let dtype = if half { DType::BF16 } else { DType::F32 };
    let tensors = safetensors::load(from.join("model.safetensors"), &Device::Cpu)?;
    let tensors = tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?))).collect::<Result<HashMap<_, _>>>()?;
    safetensors::save(&tensors, folder.join("model.safetensors"))?;
    Ok(())
}

/// A byte-level BPE with exactly `size` tokens: an end token, the bytes, and pairs and triples of them.
fn tokenizer(size: usize) -> Result<String> {
    let bytes = letters();
    let mut vocab = Map::new();
    let mut merges = Vec::new();
    for token in [END.to_owned()].into_iter().chain(bytes.iter().map(char::to_string)) {
        vocab.insert(token, json!(vocab.len()));
    }
    let mut pairs: Vec<String> = Vec::new();
    let all = || bytes.iter().map(char::to_string);
    let short = all().flat_map(|left| all().map(move |right| (left.clone(), right)));
    for (left, right) in short.take(size.saturating_sub(vocab.len())) {
        let token = format!("{left}{right}");
        vocab.insert(token.clone(), json!(vocab.len()));
        merges.push(json!([left, right]));
        pairs.push(token);
    }
    let long = pairs.iter().flat_map(|left| all().map(move |right| (left.clone(), right)));
    for (left, right) in long.take(size.saturating_sub(vocab.len())) {
        vocab.insert(format!("{left}{right}"), json!(vocab.len()));
        merges.push(json!([left, right]));
    }
    ensure!(vocab.len() == size, "{} tokens instead of {size}", vocab.len());
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let end = json!({
        "id": 0, "content": END, "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false,
    });
    let model = json!({ "type": "BPE", "vocab": vocab, "merges": merges });
    Ok(json!({ "version": "1.0", "added_tokens": [end], "pre_tokenizer": bytes, "decoder": bytes, "model": model }).to_string())
}

/// The characters that stand for bytes in GPT-2's alphabet, byte by byte.
fn letters() -> Vec<char> {
    let mut beyond = (256..).filter_map(char::from_u32);
    let plain = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    (0..=255u8).filter_map(|byte| if plain(&byte) { Some(char::from(byte)) } else { beyond.next() }).collect()
}
