//! A model of one's own: counts of n-grams behind the trait `Model`, and every search runs on it.
//!
//! `cargo run --release --example ngram -- --text my_notes.txt --prompt "The"`

use anyhow::Result;
use candle_generate::{
    Cache, Feed, Forward, GenerationConfig, Generator, Model, ModelInfo, Start, Strategy, Tokenizer, Values, Want,
    config::{Assistant, DolaLayers},
    model::downcast,
};
use clap::Parser;
use std::{
    collections::HashMap,
    fs,
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
};

/// Numbers of a hidden state.
const WIDTH: usize = 32;

/// How often each token followed each context of up to `order` tokens.
#[derive(Debug)]
struct Ngrams {
    info: ModelInfo,
    order: usize,
    counts: HashMap<Vec<u32>, HashMap<u32, f32>>,
}

/// What a row remembers: its tokens.
#[derive(Clone)]
struct Tokens(Vec<u32>);

impl Ngrams {
    fn new(text: &[u32], vocab_size: usize, order: usize) -> Self {
        let mut info = ModelInfo::new("ngrams", vocab_size);
        info.layers = order;
        let mut counts: HashMap<Vec<u32>, HashMap<u32, f32>> = HashMap::new();
        for (end, &token) in text.iter().enumerate() {
            for start in end.saturating_sub(order)..=end {
                *counts.entry(text[start..end].to_vec()).or_default().entry(token).or_default() += 1.0;
            }
        }
        Self { info, order, counts }
    }

    /// Longer contexts refine what shorter ones say.
    fn logits(&self, tokens: &[u32], order: usize) -> Vec<f32> {
        let mut p = vec![1.0 / self.info.vocab_size as f32; self.info.vocab_size];
        for len in 0..=order.min(tokens.len()) {
            let Some(next) = self.counts.get(&tokens[tokens.len() - len..]) else { break };
            let total: f32 = next.values().sum();
            p.iter_mut().for_each(|p| *p /= total + 1.0);
            next.iter().for_each(|(&token, count)| p[token as usize] += count / (total + 1.0));
        }
        p.into_iter().map(f32::ln).collect()
    }

    /// What was said last weighs most.
    fn state(tokens: &[u32]) -> Vec<f32> {
        let mut state = vec![0.1; WIDTH];
        tokens.iter().rev().take(8).enumerate().for_each(|(ago, &token)| state[token as usize % WIDTH] += 0.5f32.powi(ago as i32));
        state
    }
}

impl Cache for Tokens {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn fork(&self) -> Box<dyn Cache> {
        Box::new(self.clone())
    }

    fn truncate(&mut self, len: usize) -> candle_generate::Result<()> {
        self.0.truncate(len);
        Ok(())
    }
}

impl Model for Ngrams {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&self, rows: &[Start<'_>]) -> candle_generate::Result<Vec<Box<dyn Cache>>> {
        Ok(rows.iter().map(|_| Box::new(Tokens(Vec::new())) as Box<dyn Cache>).collect())
    }

    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> candle_generate::Result<Forward> {
        let (mut logits, mut hidden) = (Vec::new(), Vec::new());
        for (index, Feed { tokens, cache }) in rows.iter_mut().enumerate() {
            let seen = &mut downcast::<Tokens>(&mut **cache)?.0;
            seen.extend_from_slice(tokens);
            let ends = |count: usize| seen.len() + 1 - count.min(tokens.len())..=seen.len();
            match want {
                Want::Nothing => {}
                Want::Hidden => hidden.extend(ends(tokens.len()).flat_map(|end| Self::state(&seen[..end]))),
                Want::Layers(layers) => logits.extend(layers.iter().flat_map(|&layer| self.logits(seen, layer))),
                _ => {}
            }
            let count = match want {
                Want::Nothing => 0,
                Want::All => tokens.len(),
                Want::Each(counts) => counts[index],
                _ => 1,
            };
            logits.extend(ends(count).flat_map(|end| self.logits(&seen[..end], self.order)));
        }
        let hidden = if hidden.is_empty() { Values::Nothing } else { Values::Host(hidden) };
        Ok(Forward { logits: Values::Host(logits), hidden, ..Forward::default() })
    }
}

/// Continues a prompt with n-grams of a text, by every search
#[derive(Debug, Parser)]
struct Cli {
    /// What to count; unless set, this crate's architecture page
    #[arg(long)]
    text: Option<PathBuf>,
    /// The text to continue
    #[arg(long, default_value = "A row")]
    prompt: String,
    /// Tokens of a context
    #[arg(long, default_value_t = 3)]
    order: usize,
    /// The most tokens to generate
    #[arg(long, default_value_t = 24)]
    max_new_tokens: usize,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/storyteller");
    let tokenizer = Tokenizer::from_folder(folder)?.ok_or_else(|| anyhow::anyhow!("{folder} has no tokenizer"))?;
    let text = cli.text.clone().unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/ARCHITECTURE.md").into());
    let text = tokenizer.encode(&fs::read_to_string(text)?, false)?;
    let vocab_size = tokenizer.vocab_size();
    let generator = Generator::new(Ngrams::new(&text, vocab_size, cli.order), Some(tokenizer.clone()));
    let prompt = tokenizer.encode(&cli.prompt, false)?;

    let strategy = |strategy| GenerationConfig::new().strategy(strategy);
    let phrase = tokenizer.variants("beams")?;
    let pairs = Assistant::from(Arc::new(Ngrams::new(&text, vocab_size, 1)) as Arc<dyn Model>);
    let searches = [
        ("greedy", GenerationConfig::greedy()),
        ("sampling", GenerationConfig::sampling().seed(1)),
        ("beams", GenerationConfig::beam(4)),
        ("drawn beams", strategy(Strategy::BeamSample { num_beams: 4 }).seed(1)),
        ("diverse beams", strategy(Strategy::DiverseBeam { num_beams: 4, num_beam_groups: 2, diversity_penalty: 1.0 })),
        ("forced phrase", strategy(Strategy::ConstrainedBeam { num_beams: 4, force_words_ids: vec![phrase], force_words: vec![] })),
        ("contrastive", strategy(Strategy::Contrastive { penalty_alpha: 0.3, top_k: 4 })),
        ("DoLa", strategy(Strategy::Dola { dola_layers: DolaLayers::Layers(vec![0, 1]), do_sample: false })),
        ("guidance", GenerationConfig::greedy().guidance_scale(1.5)),
        ("prompt lookup", GenerationConfig::greedy().prompt_lookup_num_tokens(4)),
        ("draft model", GenerationConfig::greedy().assistant_model(pairs)),
    ];
    let mut out = io::stdout().lock();
    for (name, config) in searches {
        let output = generator.generate(prompt.as_slice(), &config.max_new_tokens(cli.max_new_tokens))?;
        let drafts =
            output.usage.acceptance().map(|share| format!(" ({:.0}% of the drafted tokens kept)", share * 100.0)).unwrap_or_default();
        writeln!(out, "{name:14} {}{}{drafts}", cli.prompt, output.text().replace('\n', " "))?;
    }
    Ok(())
}
