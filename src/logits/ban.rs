//! Processors that forbid or force tokens.

use super::{History, LogitsProcessor};
use crate::error::Result;
use std::sync::Arc;

/// No n-gram twice in the history (`no_repeat_ngram_size`).
#[derive(Debug, Clone)]
pub struct NoRepeatNgram {
    /// The size `n`, at least 1.
    pub size: usize,
}

/// No n-gram of the source (`encoder_no_repeat_ngram_size`).
#[derive(Debug, Clone)]
pub struct EncoderNoRepeatNgram {
    /// The size `n`, at least 1.
    pub size: usize,
}

/// Token sequences that must not appear (`bad_words_ids`).
#[derive(Debug, Clone)]
pub struct BadWords {
    /// Non-empty sequences. The end tokens alone are not in it.
    pub words: Vec<Vec<u32>>,
}

/// No end before the row has a length (`min_length`).
#[derive(Debug, Clone)]
pub struct MinLength {
    /// Prompt and generated tokens.
    pub min_length: usize,
    /// The ids that end a row.
    pub eos: Vec<u32>,
}

/// No end before some tokens were generated (`min_new_tokens`).
#[derive(Debug, Clone)]
pub struct MinNewTokens {
    /// Generated tokens.
    pub min_new_tokens: usize,
    /// The ids that end a row.
    pub eos: Vec<u32>,
}

/// From the prompt's index and the row's ids to the ids that may follow.
pub type PrefixFunction = Arc<dyn Fn(usize, &[u32]) -> Vec<u32> + Send + Sync>;

/// Only the tokens that a function allows (`prefix_allowed_tokens_fn`, <https://arxiv.org/abs/2010.00904>).
#[derive(Clone)]
pub struct PrefixAllowed {
    /// The function.
    pub function: PrefixFunction,
}

/// The first token after a single one (`forced_bos_token_id`).
#[derive(Debug, Clone)]
pub struct ForcedBos {
    /// The forced id.
    pub id: u32,
}

/// The last token (`forced_eos_token_id`).
#[derive(Debug, Clone)]
pub struct ForcedEos {
    /// The ids that stay possible, each with score 0.
    pub ids: Vec<u32>,
}

/// Tokens never chosen (`suppress_tokens`).
#[derive(Debug, Clone)]
pub struct Suppress {
    /// The ids.
    pub ids: Vec<u32>,
}

/// Tokens not chosen first (`begin_suppress_tokens`).
#[derive(Debug, Clone)]
pub struct SuppressAtBegin {
    /// The ids.
    pub ids: Vec<u32>,
    /// Whether a first token is forced, so that after a prompt of at most one token the second counts as the first.
    pub after_forced_bos: bool,
}

/// NaN becomes 0, infinities the largest finite values (`remove_invalid_values`).
#[derive(Debug, Clone)]
pub struct RemoveInvalid;

impl LogitsProcessor for NoRepeatNgram {
    fn name(&self) -> &str {
        "NoRepeatNgram"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for EncoderNoRepeatNgram {
    fn name(&self) -> &str {
        "EncoderNoRepeatNgram"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for BadWords {
    fn name(&self) -> &str {
        "BadWords"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for MinLength {
    fn name(&self) -> &str {
        "MinLength"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for MinNewTokens {
    fn name(&self) -> &str {
        "MinNewTokens"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for PrefixAllowed {
    fn name(&self) -> &str {
        "PrefixAllowed"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for ForcedBos {
    fn name(&self) -> &str {
        "ForcedBos"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for ForcedEos {
    fn name(&self) -> &str {
        "ForcedEos"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for Suppress {
    fn name(&self) -> &str {
        "Suppress"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for SuppressAtBegin {
    fn name(&self) -> &str {
        "SuppressAtBegin"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for RemoveInvalid {
    fn name(&self) -> &str {
        "RemoveInvalid"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl std::fmt::Debug for PrefixAllowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrefixAllowed")
    }
}
