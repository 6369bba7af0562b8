//! Shapes rows of scores before a token is chosen: plain `f32` slices, no tensor anywhere.
//!
//! A processor is a pure function of the row's own [`History`]; nothing here remembers anything between steps.

mod ban;
mod penalty;
pub mod pick;
mod warp;

pub use ban::*;
pub use penalty::*;
pub use warp::*;

use crate::error::Result;

/// What a row has seen so far: all that a [`LogitsProcessor`] or a stopping criterion may depend on.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct History<'a> {
    /// The row's own ids: the (decoder's) prompt, then what was generated. Never padding.
    pub tokens: &'a [u32],
    /// How many of `tokens` are the prompt.
    pub prompt_len: usize,
    /// The length of `tokens` at which this row ends at the latest.
    pub max_length: usize,
    /// The ids that the encoder processors look at: the encoder's source, or for a decoder-only model the prompt.
    pub source: &'a [u32],
    /// The index of the row's prompt in the call.
    pub prompt: usize,
}

impl<'a> History<'a> {
    /// A history as processors see it; `tokens` starts with the `prompt_len` ids of the prompt.
    pub fn new(tokens: &'a [u32], prompt_len: usize, max_length: usize) -> Self {
        Self { tokens, prompt_len, max_length, source: &tokens[..prompt_len.min(tokens.len())], prompt: 0 }
    }

    /// The ids generated so far.
    pub fn generated(&self) -> &'a [u32] {
        &self.tokens[self.prompt_len.min(self.tokens.len())..]
    }
}

/// Changes the scores of the next token in place. A token is forbidden by `f32::NEG_INFINITY`.
///
/// `scores` holds one finite or infinite value per id of the vocabulary: raw logits in greedy search and sampling,
/// log-probabilities in beam search, as in transformers.
///
/// ```
/// use candle_generate::{History, LogitsProcessor, Result};
///
/// /// Never the same token twice in a row.
/// #[derive(Debug)]
/// struct NoStutter;
///
/// impl LogitsProcessor for NoStutter {
///     fn name(&self) -> &str {
///         "no_stutter"
///     }
///     fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
///         if let Some(score) = history.tokens.last().and_then(|&id| scores.get_mut(id as usize)) {
///             *score = f32::NEG_INFINITY;
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait LogitsProcessor: Send + Sync + std::fmt::Debug {
    /// The name that `explain()` and errors use: for the built-in ones the config field that turns it on.
    fn name(&self) -> &str;

    /// Shapes the scores of one row.
    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()>;
}
