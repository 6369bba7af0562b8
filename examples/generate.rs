//! Tells a story, printed as it is generated.
//!
//! `cargo run --release --example generate -- --prompt "There was once a king" --seed 7`

mod common;

use anyhow::Result;
use candle_generate::{GenerationConfig, Generator};
use clap::Parser;
use std::io::{self, Write};

/// Continues a prompt, printed as it is generated
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    source: common::Source,
    /// The text to continue
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// The most tokens to generate
    #[arg(long, default_value_t = 200)]
    max_new_tokens: usize,
    /// Below 1 likelier tokens gain, above 1 unlikelier ones
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    /// Draw from the likeliest tokens whose probabilities add up to this
    #[arg(long, default_value_t = 0.95)]
    top_p: f64,
    /// Draw from this many of the likeliest tokens; 0 means all
    #[arg(long, default_value_t = 50)]
    top_k: usize,
    /// Above 1, makes tokens that have been seen less likely
    #[arg(long, default_value_t = 1.1)]
    repetition_penalty: f64,
    /// The same seed tells the same story again
    #[arg(long, default_value_t = 2)]
    seed: u64,
    /// Always take the likeliest token
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "top_k", "num_return_sequences"])]
    greedy: bool,
    /// How many stories to tell
    #[arg(long, default_value_t = 1)]
    num_return_sequences: usize,
    /// Print what the settings come to, and generate nothing
    #[arg(long)]
    explain: bool,
}

impl Cli {
    fn config(&self) -> GenerationConfig {
        let config = if self.greedy {
            GenerationConfig::greedy()
        } else {
            GenerationConfig::sampling()
                .temperature(self.temperature)
                .top_p(self.top_p)
                .top_k(self.top_k)
                .num_return_sequences(self.num_return_sequences)
                .seed(self.seed)
        };
        config.repetition_penalty(self.repetition_penalty).max_new_tokens(self.max_new_tokens)
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    common::quiet(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    let generator = cli.source.load()?;
    let config = cli.config();
    if cli.explain {
        writeln!(io::stdout(), "{}", generator.explain(&config)?)?;
        return Ok(());
    }
    tell(&generator, &config, &cli.prompt)
}

fn tell(generator: &Generator, config: &GenerationConfig, prompt: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let mut stream = generator.stream(prompt, config)?;
    write!(out, "{prompt}")?;
    // Several stories grow at the same time: the first is printed as it comes, the others after it.
    for piece in stream.by_ref() {
        let piece = piece?;
        if piece.row == 0 {
            write!(out, "{}", piece.text)?;
            out.flush()?;
        }
    }
    writeln!(out)?;
    let output = stream.into_output()?;
    for sequence in output.sequences.iter().skip(1) {
        writeln!(out, "\n---\n\n{}", sequence.full_text)?;
    }
    let (tokens, speed) = (output.usage.generated_tokens, output.timings.tokens_per_second(&output.usage));
    eprintln!("\n{tokens} tokens, {speed:.0} per second");
    Ok(())
}
