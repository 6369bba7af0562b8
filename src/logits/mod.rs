//! Shapes rows of scores before a token is chosen: plain `f32` slices, no tensor anywhere.
//!
//! A processor is a pure function of the row's own [`History`]; nothing here remembers anything between steps.

mod ban;
pub(crate) mod dola;
mod draw;
mod dry;
mod guidance;
mod penalty;
pub mod pick;
mod rank;
mod scan;
mod scores;
mod softmax;
mod twister;
mod warp;
mod watermark;

pub use ban::*;
pub use draw::*;
pub use dry::*;
pub use guidance::*;
pub use penalty::*;
pub use scores::Scores;
pub use warp::*;
pub use watermark::*;

use crate::error::{Error, Result};
use std::sync::Arc;

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
    /// The logits of the row's second context, where there is classifier-free guidance; otherwise empty.
    pub unconditional: &'a [f32],
    /// The tokens that earlier groups of a diverse beam search chose at this step.
    pub taken: &'a [u32],
}

impl<'a> History<'a> {
    /// A history as processors see it; `tokens` starts with the `prompt_len` ids of the prompt.
    pub fn new(tokens: &'a [u32], prompt_len: usize, max_length: usize) -> Self {
        let source = &tokens[..prompt_len.min(tokens.len())];
        Self { tokens, prompt_len, max_length, source, prompt: 0, unconditional: &[], taken: &[] }
    }

    /// The ids generated so far.
    pub fn generated(&self) -> &'a [u32] {
        &self.tokens[self.prompt_len.min(self.tokens.len())..]
    }
}

/// Changes the scores of the next token in place. A token is forbidden by `f32::NEG_INFINITY`.
///
/// `scores` holds one finite or infinite value per id of the vocabulary: raw logits in greedy search and sampling,
/// log-probabilities in beam search, as in transformers. A processor is pure: it may run for any row in any order, and more than
/// once for a step.
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

    /// Shapes the scores of one row, `(vocab_size,)`.
    ///
    /// # Errors
    /// Whatever it gives ends the call with that error.
    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()>;

    /// Does the same to scores that remember the largest of each block: for processors that change, or look for, few of them. What
    /// generation calls; by default it is [`process`](Self::process).
    ///
    /// # Errors
    /// As of [`process`](Self::process).
    fn shape(&self, history: &History<'_>, scores: &mut Scores<'_>) -> Result<()> {
        self.process(history, scores.values_mut())
    }
}

/// Runs `processors` in their order. An error if in the end no token is left or a score is NaN; it names the processor
/// after which that was so for good, or `model` if it was so from the start.
pub(crate) fn run(processors: &[Arc<dyn LogitsProcessor>], history: &History<'_>, scores: &mut Scores<'_>) -> Result<()> {
    let (mut state, mut culprit) = (State::of(scores), "model");
    for processor in processors {
        processor.shape(history, scores)?;
        let now = State::of(scores);
        if now != state {
            (state, culprit) = (now, processor.name());
        }
    }
    let reason = match state {
        State::Sound => return Ok(()),
        State::Empty => "every token is forbidden; allow at least one, or loosen what forbids the others",
        State::NaN => "a score is NaN; remove_invalid_values replaces those of a model by 0",
    };
    Err(Error::Processor { processor: culprit.into(), reason: reason.into() })
}

/// What can be wrong with a row of scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Sound,
    /// Nothing is above negative infinity.
    Empty,
    NaN,
}

impl State {
    fn of(scores: &mut Scores<'_>) -> Self {
        let (_, peaks) = scores.parts();
        match peaks.max() {
            _ if peaks.nan() => Self::NaN,
            f32::NEG_INFINITY => Self::Empty,
            _ => Self::Sound,
        }
    }
}

/// The decimal number that an `f32` of a config stands for.
///
/// HF: the reference computes with thresholds in f64 and rounds last: `1 - 0.8` is f32's 0.2, while 1 less f32's 0.8 is
/// below it and would keep one more of five equal tokens.
fn decimal(value: f32) -> f64 {
    // The fewest decimals that name it; both numbers of the quotient are exact, so it is the nearest to that decimal.
    let shortest = (0..10).map(|decimals| 10f64.powi(decimals)).map(|unit| (f64::from(value) * unit).round() / unit);
    let named = |&decimal: &f64| decimal as f32 == value && value.abs() < 1e6;
    shortest.into_iter().find(named).unwrap_or_else(|| value.to_string().parse().unwrap_or(f64::from(value)))
}

#[cfg(test)]
fn processed(processor: &dyn LogitsProcessor, history: &History<'_>, scores: &[f32]) -> Vec<f32> {
    let mut scores = scores.to_vec();
    let result = processor.process(history, &mut scores);
    assert!(result.is_ok(), "{result:?}");
    scores
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const INF: f32 = f32::INFINITY;

    fn outcome(processors: &[Arc<dyn LogitsProcessor>], scores: &[f32]) -> Option<String> {
        match run(processors, &History::new(&[1, 2], 1, 9), &mut Scores::new(&mut scores.to_vec())) {
            Err(Error::Processor { processor, .. }) => Some(processor),
            result => {
                result.unwrap();
                None
            }
        }
    }

    #[test]
    fn run_names_who_left_no_token() {
        let bad: Arc<dyn LogitsProcessor> = Arc::new(BadWords { words: vec![vec![0], vec![1]] });
        let rest: Arc<dyn LogitsProcessor> = Arc::new(Suppress { ids: vec![2] });
        let forced: Arc<dyn LogitsProcessor> = Arc::new(PrefixAllowed { function: Arc::new(|_, _| vec![1]) });
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(outcome(&[bad.clone(), rest.clone()], &[1.0; 4]), None);
        assert_eq!(outcome(&[bad.clone(), rest.clone()], &[1.0; 3]), name("suppress_tokens"));
        assert_eq!(outcome(&[rest.clone(), bad.clone(), rest.clone()], &[1.0; 3]), name("bad_words_ids"));
        assert_eq!(outcome(&[bad.clone(), rest.clone(), forced], &[1.0; 3]), None);
        assert_eq!(outcome(&[bad, rest], &[-INF; 3]), name("model"));
        assert_eq!(outcome(&[], &[-INF; 3]), name("model"));
        assert_eq!(outcome(&[], &[]), name("model"));
    }

    #[test]
    fn run_names_who_made_nan() {
        let infinite: Arc<dyn LogitsProcessor> = Arc::new(SequenceBias { biases: vec![(vec![1], -INF)] });
        let top: Arc<dyn LogitsProcessor> = Arc::new(TopP { top_p: 0.5, min_tokens_to_keep: 1 });
        let repair: Arc<dyn LogitsProcessor> = Arc::new(RemoveInvalid);
        assert_eq!(outcome(&[infinite.clone(), top.clone()], &[0.0, INF]).as_deref(), Some("sequence_bias"));
        assert_eq!(outcome(&[infinite.clone(), top.clone()], &[f32::NAN, 0.0]).as_deref(), Some("model"));
        assert_eq!(outcome(&[infinite, repair, top], &[f32::NAN, 0.0]), None);
    }

    #[test]
    fn decimals_are_what_was_written() {
        assert_eq!([decimal(0.8), decimal(1.05), decimal(1e-9), decimal(2.0)], [0.8, 1.05, 1e-9, 2.0]);
        let shares = (0..=1_000).map(|i| i as f32 / 1_000.0);
        for value in (0..0x7f80).map(|i| f32::from_bits(i << 16 | 0x4321)).chain(shares).flat_map(|value| [value, -value]) {
            assert_eq!(decimal(value), value.to_string().parse::<f64>().unwrap(), "{value}");
        }
    }

    #[test]
    fn no_tensor_anywhere() {
        let sources = [
            include_str!("mod.rs"),
            include_str!("ban.rs"),
            include_str!("dola.rs"),
            include_str!("guidance.rs"),
            include_str!("penalty.rs"),
            include_str!("pick.rs"),
            include_str!("rank.rs"),
            include_str!("scan.rs"),
            include_str!("scores.rs"),
            include_str!("softmax.rs"),
            include_str!("twister.rs"),
            include_str!("warp.rs"),
            include_str!("watermark.rs"),
        ];
        for package in [concat!("candle", "_core"), concat!("candle", "_nn")] {
            assert!(sources.iter().all(|source| !source.contains(package)));
        }
    }
}
