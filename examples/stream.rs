//! Several prompts at once, streamed through a channel: one thread generates, another one prints.

mod common;

use anyhow::{Result, anyhow};
use candle_generate::{GenerationConfig, Output};
use clap::Parser;
use std::{
    io::{self, Write},
    sync::mpsc,
    thread,
};

/// Streams several prompts at once through a channel
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    source: common::Source,
    /// A text to continue; may be given several times
    #[arg(long = "prompt", default_values = ["Once upon a time", "The dragon", "\"Who are you?\" asked the"])]
    prompts: Vec<String>,
    /// The most tokens to generate for each prompt
    #[arg(long, default_value_t = 16)]
    max_new_tokens: usize,
    /// The same seed gives the same texts again
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    common::quiet(run(cli))
}

fn run(cli: Cli) -> Result<()> {
    let generator = cli.source.load()?;
    let config = GenerationConfig::sampling().temperature(0.7).max_new_tokens(cli.max_new_tokens).seed(cli.seed);
    // A stream owns all that it needs, so it moves to a thread as it is.
    let mut stream = generator.stream_batch(cli.prompts, &config)?;
    // The bound makes the generator wait for a slow reader.
    let (sender, receiver) = mpsc::sync_channel(64);
    let worker = thread::spawn(move || -> candle_generate::Result<Output> {
        for piece in stream.by_ref() {
            // Nobody listens any more: dropping the stream ends the call.
            if sender.send(piece?).is_err() {
                break;
            }
        }
        stream.into_output()
    });

    let mut out = io::stdout().lock();
    for piece in receiver {
        write!(out, "{} {:?}", piece.row, piece.text)?;
        match piece.finish {
            Some(reason) => writeln!(out, " ({})", reason.as_str())?,
            None => writeln!(out)?,
        }
    }
    let output = worker.join().map_err(|_| anyhow!("the generating thread panicked"))??;
    for sequence in &output.sequences {
        writeln!(out, "\n{}", sequence.full_text)?;
    }
    Ok(())
}
