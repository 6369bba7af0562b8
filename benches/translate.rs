//! An encoder-decoder model of t5-small's shape beside candle-transformers' own T5 loop on the same weights, in turns.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_generate::{GenerationConfig, Generator};
use candle_nn::VarBuilder;
use candle_transformers::{
    generation::LogitsProcessor,
    models::t5::{Config, T5ForConditionalGeneration},
};
use common::{ids, median, t5_shaped};
use std::{
    fs,
    time::{Duration, Instant},
};

const TURNS: usize = 5;
/// New tokens of a call; the first is not measured.
const TOKENS: usize = 65;
const SOURCES: [usize; 3] = [32, 256, 512];

/// What a call chose, and how long the source with the first token, and each further token took.
struct Call {
    tokens: Vec<u32>,
    first: Duration,
    step: Duration,
}

fn main() -> Result<()> {
    let folder = t5_shaped()?;
    let ours = Generator::from_pretrained(&folder)?.with_config(GenerationConfig::default());
    let config: Config = serde_json::from_slice(&fs::read(folder.join("config.json"))?)?;
    // SAFETY: nothing writes to the file that was just made.
    let weights = unsafe { VarBuilder::from_mmaped_safetensors(&[folder.join("model.safetensors")], DType::F32, &Device::Cpu)? };
    let mut theirs = T5ForConditionalGeneration::load(weights, &config)?;

    println!("t5-small's shape, f32, greedy, medians of {TURNS} turns");
    // candle-transformers leaves the tokens of transformers, which are ours, where two are almost as good as each other.
    println!(
        "{:>7} {:>28} {:>28} {:>14} {:>12}",
        "source", "ours: first, each, ms", "candle: first, each, ms", "ratio, each", "same tokens"
    );
    for len in SOURCES {
        let source = ids(len, config.vocab_size as u32);
        let (mut own, mut other) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            own.push(generate(&ours, &source)?);
            other.push(reference(&mut theirs, &source)?);
        }
        let same = own[0].tokens.iter().zip(&other[0].tokens).take_while(|(ours, theirs)| ours == theirs).count();
        let medians = |calls: &[Call]| {
            let of = |time: fn(&Call) -> Duration| median(calls.iter().map(time).collect()).as_secs_f64() * 1e3;
            (of(|call| call.first), of(|call| call.step))
        };
        let ((first, step), (their_first, their_step)) = (medians(&own), medians(&other));
        println!("{len:>7} {first:>18.2} {step:>9.3} {their_first:>18.2} {their_step:>9.3} {:>14.2} {same:>12}", their_step / step);
    }
    Ok(())
}

fn generate(generator: &Generator, source: &[u32]) -> Result<Call> {
    let config = GenerationConfig::greedy().decoder_start_token_id(0).max_new_tokens(TOKENS);
    let output = generator.generate(source, &config)?;
    let first = output.timings.first_token;
    Ok(Call { tokens: output.tokens().to_vec(), first, step: (output.timings.total - first) / (TOKENS as u32 - 1) })
}

/// The loop of candle's own example.
fn reference(model: &mut T5ForConditionalGeneration, source: &[u32]) -> Result<Call> {
    model.clear_kv_cache();
    let mut pick = LogitsProcessor::new(0, None, None);
    let started = Instant::now();
    let encoded = model.encode(&Tensor::new(source, &Device::Cpu)?.unsqueeze(0)?)?;
    let (mut tokens, mut last, mut first) = (Vec::new(), 0, Duration::ZERO);
    for step in 0..TOKENS {
        let logits = model.decode(&Tensor::new(&[last], &Device::Cpu)?.unsqueeze(0)?, &encoded)?.squeeze(0)?;
        last = pick.sample(&logits)?;
        tokens.push(last);
        if step == 0 {
            first = started.elapsed();
        }
    }
    Ok(Call { tokens, first, step: (started.elapsed() - first) / (TOKENS as u32 - 1) })
}
