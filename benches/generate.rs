//! Whole calls, beside candle-transformers' own loop on the same weights: prefill, decode, time to first token.
//!
//! Criterion measures each alone. The table at the end measures the engines in turns, so that a change of the machine's
//! pace reaches all of them, and takes medians.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_generate::{GenerationConfig, Generator, candle_core};
use candle_nn::VarBuilder;
use candle_transformers::{
    generation::{LogitsProcessor, Sampling},
    models::llama::{Cache, Config, Llama, LlamaConfig},
};
use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, json};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Tokens decoded by a measured call; it ends at the position that the measurement is named after.
const DECODED: usize = 16;
/// Turns of the table.
const TURNS: usize = 5;
/// Greedy tokens that all engines must agree on before anything is measured.
const CHECKED: usize = 32;

fn main() -> Result<()> {
    let small = smol_shaped(false)?;
    let models = [
        Bench::new("storyteller", 2048, Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/storyteller"), &[])?,
        Bench::new("smollm2-135m", 49152, small, &[("ours, bf16 file", smol_shaped(true)?)])?,
    ];
    let mut criterion = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(500)).configure_from_args();
    for model in &models {
        model.agree()?;
        model.measure(&mut criterion);
    }
    criterion.final_summary();
    for model in &models {
        model.table()?;
    }
    Ok(())
}

/// What one greedy call gave and took.
struct Call {
    tokens: Vec<u32>,
    /// From the call to its first token.
    first: Duration,
    /// From the first token to the last.
    decode: Duration,
}

trait Engine {
    /// Continues `prompt` greedily by exactly `count` tokens.
    fn call(&self, prompt: &[u32], count: usize) -> Result<Call>;
}

struct Ours(Generator);

impl Ours {
    fn load(folder: &Path) -> Result<Self> {
        // A config of nothing: no end token, so that every call runs to its end.
        Ok(Self(Generator::from_pretrained(folder)?.with_config(GenerationConfig::default())))
    }
}

impl Engine for Ours {
    fn call(&self, prompt: &[u32], count: usize) -> Result<Call> {
        let config = GenerationConfig::greedy().max_new_tokens(count);
        let start = Instant::now();
        let mut first = None;
        let mut tokens = Vec::with_capacity(count);
        for piece in self.0.stream(prompt, &config)? {
            first.get_or_insert_with(|| start.elapsed());
            tokens.extend(piece?.tokens);
        }
        let first = first.context("no token")?;
        Ok(Call { tokens, first, decode: start.elapsed() - first })
    }
}

/// candle-transformers' model in the loop of candle's own llama example.
struct Candle {
    model: Llama,
    config: Config,
}

impl Candle {
    fn load(folder: &Path) -> Result<Self> {
        let config: LlamaConfig = serde_json::from_slice(&fs::read(folder.join("config.json"))?)?;
        let config = config.into_config(false);
        // SAFETY: nobody changes the file while the benchmark runs.
        let weights = unsafe { VarBuilder::from_mmaped_safetensors(&[folder.join("model.safetensors")], DType::F32, &Device::Cpu)? };
        Ok(Self { model: Llama::load(weights, &config)?, config })
    }
}

impl Engine for Candle {
    fn call(&self, prompt: &[u32], count: usize) -> Result<Call> {
        // Its tables of angles depend on the model alone; ours are not made in the call either.
        let mut cache = Cache::new(true, DType::F32, &self.config, &Device::Cpu)?;
        let start = Instant::now();
        let mut pick = LogitsProcessor::from_sampling(0, Sampling::ArgMax);
        let mut next = |tokens: &[u32], position| -> Result<u32> {
            let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
            Ok(pick.sample(&self.model.forward(&input, position, &mut cache)?.squeeze(0)?)?)
        };
        let mut tokens = vec![next(prompt, 0)?];
        let first = start.elapsed();
        while let (Some(&last), true) = (tokens.last(), tokens.len() < count) {
            tokens.push(next(&[last], prompt.len() + tokens.len() - 1)?);
        }
        Ok(Call { tokens, first, decode: start.elapsed() - first })
    }
}

/// One kind of call and what of it is measured.
#[derive(Clone, Copy)]
enum Task {
    /// Decoding the last tokens before a position.
    Decode(usize),
    /// Computing a prompt of so many tokens.
    Prefill(usize),
    /// The first token of a short prompt.
    First(usize),
}

impl Task {
    const ALL: [Self; 4] = [Self::Decode(64), Self::Decode(1024), Self::Prefill(512), Self::First(8)];

    fn name(self) -> String {
        match self {
            Self::Decode(position) => format!("decode at {position}"),
            Self::Prefill(len) => format!("prefill of {len}"),
            Self::First(len) => format!("first token after {len}"),
        }
    }

    /// The length of the prompt, and the tokens to ask for.
    fn size(self) -> (usize, usize) {
        match self {
            Self::Decode(position) => (position - DECODED - 1, DECODED + 1),
            Self::Prefill(len) | Self::First(len) => (len, 1),
        }
    }

    fn time(self, call: &Call) -> Duration {
        match self {
            Self::Decode(_) => call.decode,
            Self::Prefill(_) | Self::First(_) => call.first,
        }
    }

    /// The tokens that the time is for.
    fn tokens(self) -> usize {
        match self {
            Self::Decode(_) => DECODED,
            Self::Prefill(len) => len,
            Self::First(_) => 1,
        }
    }

    fn figure(self, time: Duration) -> String {
        match self {
            Self::First(_) => format!("{:.2} ms", time.as_secs_f64() * 1e3),
            _ => format!("{:.1} tokens/s", self.tokens() as f64 / time.as_secs_f64()),
        }
    }
}

/// A model in every engine.
struct Bench {
    name: &'static str,
    vocab_size: u32,
    /// candle-transformers comes last.
    engines: Vec<(&'static str, Box<dyn Engine>)>,
}

impl Bench {
    fn new(name: &'static str, vocab_size: u32, folder: PathBuf, others: &[(&'static str, PathBuf)]) -> Result<Self> {
        let mut engines: Vec<(_, Box<dyn Engine>)> = vec![("ours", Box::new(Ours::load(&folder)?))];
        for (name, folder) in others {
            engines.push((*name, Box::new(Ours::load(folder)?)));
        }
        engines.push(("candle-transformers", Box::new(Candle::load(&folder)?)));
        Ok(Self { name, vocab_size, engines })
    }

    /// Ids that look like nothing in particular, the same for every engine.
    fn prompt(&self, len: usize) -> Vec<u32> {
        (0..len as u32).map(|at| at.wrapping_mul(2_654_435_761) % (self.vocab_size - 6) + 6).collect()
    }

    fn agree(&self) -> Result<()> {
        let mut reference: Option<Vec<u32>> = None;
        for (engine, run) in &self.engines {
            let tokens = run.call(&self.prompt(48), CHECKED)?.tokens;
            ensure!(tokens.len() == CHECKED, "{}, {engine}: {} tokens", self.name, tokens.len());
            let reference = reference.get_or_insert_with(|| tokens.clone());
            ensure!(tokens == *reference, "{}, {engine}: {tokens:?} differs from {reference:?}", self.name);
        }
        Ok(())
    }

    fn measure(&self, criterion: &mut Criterion) {
        for task in Task::ALL {
            let mut group: BenchmarkGroup<'_, WallTime> = criterion.benchmark_group(format!("{}, {}", self.name, task.name()));
            group.throughput(Throughput::Elements(task.tokens() as u64));
            let (len, count) = task.size();
            let prompt = self.prompt(len);
            for (name, engine) in &self.engines {
                group.bench_function(*name, |bencher| {
                    bencher.iter_custom(|times| (0..times).map(|_| task.time(&engine.call(&prompt, count).expect("a call"))).sum());
                });
            }
            group.finish();
        }
    }

    fn table(&self) -> Result<()> {
        println!("\n{} (medians of {TURNS} turns)", self.name);
        for task in Task::ALL {
            let (len, count) = task.size();
            let prompt = self.prompt(len);
            let mut times = vec![Vec::new(); self.engines.len()];
            for _ in 0..TURNS {
                for ((_, engine), times) in self.engines.iter().zip(&mut times) {
                    times.push(task.time(&engine.call(&prompt, count)?));
                }
            }
            let medians: Vec<Duration> = times.into_iter().map(median).collect();
            let theirs = medians.last().copied().unwrap_or_default();
            for ((name, _), time) in self.engines.iter().zip(&medians) {
                let ratio = theirs.as_secs_f64() / time.as_secs_f64();
                println!("  {:<22} {name:<20} {:>16}  {ratio:5.2}x", task.name(), task.figure(*time));
            }
        }
        Ok(())
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// A folder with a random checkpoint of SmolLM2-135M's shape, made once. Both files hold the same values, which bf16 can hold.
fn smol_shaped(half: bool) -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(if half { "smollm2-shaped-bf16" } else { "smollm2-shaped-f32" });
    let weights = folder.join("model.safetensors");
    if weights.exists() {
        return Ok(folder);
    }
    fs::create_dir_all(&folder)?;
    let (hidden, kv, mlp, layers, vocab) = (576, 192, 1536, 30, 49152);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": mlp, "max_position_embeddings": 2048, "num_attention_heads": 9, "num_hidden_layers": layers,
        "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": true, "vocab_size": vocab,
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
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    // A half-written file never has the name.
    let partial = folder.join("partial");
    write_safetensors(&partial, &tensors, half)?;
    fs::rename(partial, weights)?;
    Ok(folder)
}

/// Writes random matrices and vectors of ones, holding none of them in memory.
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
    for (_, shape) in tensors {
        for _ in 0..shape.iter().product() {
            let value = if shape.len() == 1 { 1.0 } else { rng.random_range(-0.05..0.05) };
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
