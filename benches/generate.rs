//! Whole calls, beside candle-transformers' own loop on the same weights: prefill, decode, time to first token.
//!
//! Criterion measures each alone. The table at the end measures the engines in turns, so that a change of the machine's
//! pace reaches all of them, and takes medians.

mod common;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_generate::{GenerationConfig, Generator, candle_core};
use candle_nn::VarBuilder;
use candle_transformers::{
    generation::{LogitsProcessor, Sampling},
    models::llama::{Cache, Config, Llama, LlamaConfig},
};
use common::{ids, median, smol_shaped};
use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use std::{
    fs,
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

    fn prompt(&self, len: usize) -> Vec<u32> {
        ids(len, self.vocab_size)
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
