//! A family that this crate does not have: candle-transformers' Mamba, whose one state is its own, behind `Foreign`.
//!
//! `cargo run --release --example foreign`, or with a folder of <https://huggingface.co/state-spaces/mamba-130m>'s `config.json` and
//! `model.safetensors` and the `tokenizer.json` of its tokenizer, <https://huggingface.co/EleutherAI/gpt-neox-20b>:
//! `-- --folder mamba-130m --prompt "Mamba is"`

use anyhow::{Context, Result};
use candle_generate::{
    Error, Foreign, GenerationConfig, Generator, ModelInfo, Tokenizer,
    candle_core::{DType, Device, Error as TensorError, Tensor},
};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::mamba::{Config, Model as Mamba, State};
use clap::Parser;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Continues a prompt with a Mamba: greedily, by draws, piece by piece
#[derive(Debug, Parser)]
struct Cli {
    /// A checkpoint's folder; unless set, a small model with random weights, which babbles
    #[arg(long)]
    folder: Option<PathBuf>,
    /// The text to continue
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// The most tokens to generate
    #[arg(long, default_value_t = 12)]
    max_new_tokens: usize,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let storyteller = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/storyteller");
    let folder = cli.folder.as_deref().unwrap_or(Path::new(storyteller));
    let tokenizer = Tokenizer::from_folder(folder)?.with_context(|| format!("{} has no tokenizer", folder.display()))?;
    let (config, mamba) = match &cli.folder {
        Some(folder) => read(folder)?,
        None => random(tokenizer.vocab_size())?,
    };

    let vocab_size = config.vocab_size.next_multiple_of(config.pad_vocab_size_multiple);
    let fresh = move || State::new(1, &config, DType::F32, &Device::Cpu);
    let state = fresh()?;
    let model = Foreign::new(
        ModelInfo::new("mamba", vocab_size),
        (mamba, state),
        // A Mamba reads one token at a time.
        |(mamba, state), ids, _position| {
            let ids = ids.flatten_all()?;
            let mut logits = Err(TensorError::msg("no tokens"));
            for place in 0..ids.elem_count() {
                logits = Ok(mamba.forward(&ids.narrow(0, place, 1)?, state)?);
            }
            logits
        },
        move |(_, state)| {
            *state = fresh()?;
            Ok(())
        },
    );
    let generator = Generator::new(model, Some(tokenizer));

    let mut out = io::stdout().lock();
    let greedy = GenerationConfig::greedy().max_new_tokens(cli.max_new_tokens);
    writeln!(out, "greedy    {}{}", cli.prompt, generator.generate(cli.prompt.as_str(), &greedy)?.text().replace('\n', " "))?;
    let sampling = GenerationConfig::sampling().temperature(0.8).seed(1).max_new_tokens(cli.max_new_tokens);
    write!(out, "streaming {}", cli.prompt)?;
    for piece in generator.stream(cli.prompt.as_str(), &sampling)? {
        write!(out, "{}", piece?.text.replace('\n', " "))?;
        out.flush()?;
    }
    writeln!(out)?;
    match generator.generate(cli.prompt.as_str(), &GenerationConfig::beam(4)) {
        Err(Error::Unsupported(reason)) => writeln!(out, "beams     {reason}")?,
        other => anyhow::bail!("beams need forks, and yet: {other:?}"),
    }
    Ok(())
}

/// The checkpoint of a folder.
fn read(folder: &Path) -> Result<(Config, Mamba)> {
    let file = |name: &str| fs::read(folder.join(name)).with_context(|| format!("{name} of {}", folder.display()));
    let config: Config = serde_json::from_slice(&file("config.json")?)?;
    let weights = VarBuilder::from_buffered_safetensors(file("model.safetensors")?, DType::F32, &Device::Cpu)?;
    let mamba = Mamba::new(&config, weights.pp("backbone"))?;
    Ok((config, mamba))
}

/// A small model with the same random weights each time.
fn random(vocab_size: usize) -> Result<(Config, Mamba)> {
    let config = Config { d_model: 64, n_layer: 2, vocab_size, pad_vocab_size_multiple: 8 };
    let weights = VarMap::new();
    let build = || Mamba::new(&config, VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu));
    // The first build tells which tensors there are.
    build()?;
    let mut tensors: Vec<_> = weights.data().lock().map_err(|error| anyhow::anyhow!("{error}"))?.clone().into_iter().collect();
    tensors.sort_by(|one, other| one.0.cmp(&other.0));
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (_, tensor) in tensors {
        let values: Vec<f32> = (0..tensor.elem_count()).map(|_| rng.random_range(-0.3..0.3)).collect();
        tensor.set(&Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?)?;
    }
    let mamba = build()?;
    Ok((config, mamba))
}
