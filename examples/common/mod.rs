//! What the examples share: which model, how its loading is shown, and what happens when nobody reads the output.
// No example uses all of it.
#![allow(dead_code)]

use anyhow::Result;
use candle_generate::{
    Generator, OnProgress, Stage,
    candle_core::{DType, Device},
    device,
};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

/// The model in this repository, wherever the example is run from.
const STORYTELLER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/storyteller");

/// Which model, and how it computes.
#[derive(Debug, Args)]
pub struct Source {
    /// A checkpoint folder in Hugging Face's format, or a repository on its hub; unless given, a model of this repository
    #[arg(long, value_name = "FOLDER")]
    pub model: Option<PathBuf>,
    /// The type of the arithmetic, whatever type the weights have: f32 on the CPU, the checkpoint's elsewhere
    #[arg(long, value_enum)]
    dtype: Option<Arithmetic>,
    /// Where to compute: cpu, or cuda:0 in a build with the feature cuda
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Arithmetic {
    F32,
    Bf16,
    F16,
}

impl Source {
    /// Loads the model, with a progress bar on stderr: the storyteller unless another is given.
    pub fn load(&self) -> Result<Generator> {
        self.load_or(STORYTELLER)
    }

    /// As `load`, with another model where none is given.
    pub fn load_or(&self, model: &str) -> Result<Generator> {
        let model = self.model.as_deref().unwrap_or(Path::new(model));
        let builder = Generator::builder(model).device(self.device.clone()).progress(bar()?);
        Ok(match self.dtype {
            Some(Arithmetic::F32) => builder.dtype(DType::F32),
            Some(Arithmetic::Bf16) => builder.dtype(DType::BF16),
            Some(Arithmetic::F16) => builder.dtype(DType::F16),
            None => builder,
        }
        .load()?)
    }
}

/// Ends quietly when the reader of stdout has gone, as `head` does.
pub fn quiet(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) => Ok(()),
        other => other,
    }
}

/// Shows the loading of weights and the computing of long prompts on stderr, where that is a terminal.
fn bar() -> Result<OnProgress> {
    let load = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes}")?;
    let prefill = ProgressStyle::with_template("reading the prompt {bar:40} {pos}/{len} tokens")?;
    let bar = ProgressBar::no_length();
    Ok(OnProgress::new(move |progress| {
        if bar.is_finished() {
            bar.reset();
        }
        bar.set_style(if progress.stage == Stage::Load { load.clone() } else { prefill.clone() });
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        if progress.done >= progress.total {
            bar.finish_and_clear();
        }
        ControlFlow::Continue(())
    }))
}
