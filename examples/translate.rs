//! Translates texts with an encoder-decoder model; unless another is given, dates into those of ISO 8601.
//!
//! ```console
//! $ cargo run --release --example translate -- "date: the 3rd of March, 2021"
//! 2021-03-03
//! $ cargo run --release --example translate -- --model google-t5/t5-small --task-prefix "translate English to German: " "How are you?"
//! $ cargo run --release --example translate -- --model facebook/nllb-200-distilled-600M --from eng_Latn --to deu_Latn - < lines.txt
//! ```

mod common;

use anyhow::{Context, Result, ensure};
use candle_generate::{GenerationConfig, Output, config::EarlyStopping};
use clap::Parser;
use std::io::{self, BufRead, Write};

/// Writes dates like 2021-03-03.
const DATES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/date-normaliser");

/// Texts computed together.
const BATCH: usize = 16;

/// Translates texts with an encoder-decoder model
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    source: common::Source,
    /// The texts to translate; `-` reads them from stdin, one a line
    #[arg(default_value = "date: the 3rd of March, 2021")]
    texts: Vec<String>,
    /// Put before every text, for models that are told what to do
    #[arg(long, default_value = "", value_name = "TEXT")]
    task_prefix: String,
    /// The language of the texts, by the model's own code
    #[arg(long, value_name = "CODE")]
    from: Option<String>,
    /// The language to translate into, by the model's own code
    #[arg(long, value_name = "CODE")]
    to: Option<String>,
    /// Translations that are followed at once
    #[arg(long, default_value_t = 5)]
    beams: usize,
    /// Translations to print of each text, the best first, with their scores
    #[arg(long, default_value_t = 1, value_name = "COUNT")]
    alternatives: usize,
    /// No sequence of so many tokens twice, 0 for no limit; 3 for a model of one's own, since dates repeat themselves
    #[arg(long, value_name = "SIZE")]
    no_repeat_ngram_size: Option<usize>,
    /// The most tokens of a translation
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
}

impl Cli {
    fn config(&self) -> GenerationConfig {
        let size = self.no_repeat_ngram_size.unwrap_or(if self.source.model.is_some() { 3 } else { 0 });
        let config = match self.beams {
            1 => GenerationConfig::greedy(),
            beams => GenerationConfig::beam(beams).early_stopping(EarlyStopping::When(true)).num_return_sequences(self.alternatives),
        };
        let config = config.no_repeat_ngram_size(size).max_new_tokens(self.max_new_tokens);
        let config = self.from.iter().fold(config, |config, code| config.src_lang(code.clone()));
        self.to.iter().fold(config, |config, code| config.tgt_lang(code.clone()))
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    common::quiet(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(cli.alternatives <= cli.beams, "--alternatives {}: as many as there are beams are accepted, {}", cli.alternatives, cli.beams);
    let generator = cli.source.load_or(DATES)?;
    let model = generator.model().info();
    ensure!(model.is_encoder_decoder, "{} has no encoder: an encoder-decoder model is accepted, such as t5 or marian", model.name);
    let config = cli.config();
    let mut texts: Box<dyn Iterator<Item = io::Result<String>>> = match cli.texts[..] {
        [ref text] if text == "-" => Box::new(io::stdin().lock().lines()),
        ref texts => Box::new(texts.iter().cloned().map(Ok)),
    };
    loop {
        let batch: Vec<String> = texts.by_ref().take(BATCH).collect::<io::Result<_>>().context("the texts cannot be read")?;
        if batch.is_empty() {
            return Ok(());
        }
        let prompts = batch.iter().map(|text| format!("{}{text}", cli.task_prefix));
        print(&generator.generate_batch(prompts, &config)?, cli.alternatives)?;
    }
}

fn print(output: &Output, alternatives: usize) -> Result<()> {
    let mut out = io::stdout().lock();
    for (index, sequence) in output.sequences.iter().enumerate() {
        if let (Some(score), 2..) = (sequence.score, alternatives) {
            // A line between the texts.
            if index > 0 && index % alternatives == 0 {
                writeln!(out)?;
            }
            write!(out, "{score:.3}  ")?;
        }
        writeln!(out, "{}", sequence.text)?;
    }
    out.flush()?;
    Ok(())
}
