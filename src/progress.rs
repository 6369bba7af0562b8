//! Progress of long work, as a callback that can cancel. The library itself never writes to the terminal.

use crate::error::{Error, Result};
use std::{fmt, ops::ControlFlow, sync::Arc};

/// How far long work has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Units done.
    pub done: u64,
    /// Units in all.
    pub total: u64,
}

/// The kinds of long work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Files are downloaded, in bytes.
    Download,
    /// Weights are read, in bytes.
    Load,
    /// Prompts are computed, in tokens.
    Prefill,
}

/// Called now and then during long work, on the thread that does it; [`ControlFlow::Break`] makes the call end with [`Error::Cancelled`].
///
/// ```
/// use candle_generate::{Generator, OnProgress};
/// use std::ops::ControlFlow;
///
/// let progress = OnProgress::new(|progress| {
///     eprintln!("{:?}: {} of {}", progress.stage, progress.done, progress.total);
///     ControlFlow::Continue(())
/// });
/// Generator::builder("examples/models/storyteller").progress(progress).load()?;
/// # Ok::<(), candle_generate::Error>(())
/// ```
#[derive(Clone)]
pub struct OnProgress(Arc<dyn Fn(Progress) -> ControlFlow<()> + Send + Sync>);

impl OnProgress {
    /// Wraps a callback.
    pub fn new(callback: impl Fn(Progress) -> ControlFlow<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(callback))
    }

    pub(crate) fn report(&self, stage: Stage, done: u64, total: u64) -> Result<()> {
        match (self.0)(Progress { stage, done, total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }
}

impl fmt::Debug for OnProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnProgress")
    }
}
