//! Prompts of different lengths in one call, several samples of each, with log-probabilities.

mod common;

use anyhow::Result;
use candle_generate::{GenerationConfig, Generator, Sequence};
use clap::Parser;
use std::io::{self, Write};

/// Continues several prompts at once and prints how likely every token was
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    source: common::Source,
    /// A text to continue; may be given several times
    #[arg(long = "prompt", default_values = ["The", "Once upon a time there was a little girl who lived in a"])]
    prompts: Vec<String>,
    /// Samples of each prompt
    #[arg(long, default_value_t = 2)]
    num_return_sequences: usize,
    /// The most tokens to generate for each sample
    #[arg(long, default_value_t = 12)]
    max_new_tokens: usize,
    /// Likelier alternatives shown for each token
    #[arg(long, default_value_t = 2)]
    log_probs: usize,
    /// The seed of the first row; the others' follow from it
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    common::quiet(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    let generator = cli.source.load()?;
    let config = GenerationConfig::sampling()
        .temperature(0.8)
        .num_return_sequences(cli.num_return_sequences)
        .max_new_tokens(cli.max_new_tokens)
        .log_probs(cli.log_probs)
        .seed(cli.seed);
    let output = generator.generate_batch(cli.prompts.iter().map(String::as_str), &config)?;
    let mut out = io::stdout().lock();
    for sequence in &output.sequences {
        print(&mut out, &generator, sequence)?;
    }
    let usage = output.usage;
    eprintln!(
        "{} prompt tokens, {} generated, {:.0} per second",
        usage.prompt_tokens,
        usage.generated_tokens,
        output.timings.tokens_per_second(&usage)
    );
    Ok(())
}

fn print(out: &mut impl Write, generator: &Generator, sequence: &Sequence) -> Result<()> {
    let name = |id| match generator.tokenizer() {
        Some(tokenizer) => Ok(format!("{:?}", tokenizer.decode(&[id], false)?)),
        None => Ok::<_, candle_generate::Error>(id.to_string()),
    };
    writeln!(out, "prompt {}, row {}, ended by {}", sequence.prompt, sequence.row, sequence.finish.as_str())?;
    if let Some(seed) = sequence.seed {
        writeln!(out, "seed {seed} gives this row again, alone")?;
    }
    writeln!(out, "{}", sequence.full_text)?;
    for token in sequence.log_probs.iter().flatten() {
        write!(out, "  {:<14} {:7.3}   likeliest:", name(token.id)?, token.log_prob)?;
        for &(id, log_prob) in &token.top {
            write!(out, " {} {log_prob:.3}", name(id)?)?;
        }
        writeln!(out)?;
    }
    writeln!(out)?;
    Ok(())
}
