//! Processors that raise or lower scores.

use super::{History, LogitsProcessor};
use crate::error::Result;

/// Adds a bias to the last token of each sequence whose other tokens end the history (`sequence_bias`).
#[derive(Debug, Clone)]
pub struct SequenceBias {
    /// Non-empty sequences and their biases.
    pub biases: Vec<(Vec<u32>, f32)>,
}

/// Makes seen tokens less likely (`repetition_penalty`, CTRL, <https://arxiv.org/abs/1909.05858>).
#[derive(Debug, Clone)]
pub struct RepetitionPenalty {
    /// Above 1 discourages.
    pub penalty: f32,
    /// Which tokens count as seen.
    pub scope: PenaltyScope,
    /// Ids never penalised.
    pub exempt: Vec<u32>,
}

/// Which tokens of a row a penalty looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PenaltyScope {
    /// Prompt and generated tokens, as transformers does.
    #[default]
    All,
    /// Generated tokens only.
    Generated,
    /// The last `n` tokens, wherever they come from.
    Last(usize),
}

/// Makes tokens of the source more likely (`encoder_repetition_penalty`).
#[derive(Debug, Clone)]
pub struct EncoderRepetitionPenalty {
    /// Above 1 encourages.
    pub penalty: f32,
}

/// Makes the end more likely, exponentially, after some generated tokens (`exponential_decay_length_penalty`).
#[derive(Debug, Clone)]
pub struct ExponentialDecay {
    /// Generated tokens before it starts.
    pub start: usize,
    /// Factor per token.
    pub factor: f32,
    /// The ids that end a row.
    pub eos: Vec<u32>,
}

/// Raises the next token of every keyword not yet produced (`keyword_boost`).
#[derive(Debug, Clone)]
pub struct KeywordBoost {
    /// Per keyword its tokenisations, each non-empty; any of them counts as produced.
    pub keywords: Vec<Vec<Vec<u32>>>,
    /// What is added to the score.
    pub bias: f32,
    /// Boosting stops this many tokens before the row's end.
    pub stop: usize,
}

impl KeywordBoost {
    /// Which keywords the generated tokens contain, each as a whole token sequence.
    pub fn produced(&self, generated: &[u32]) -> Vec<bool> {
        let _ = generated;
        Vec::new()
    }
}

impl LogitsProcessor for SequenceBias {
    fn name(&self) -> &str {
        "SequenceBias"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for RepetitionPenalty {
    fn name(&self) -> &str {
        "RepetitionPenalty"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for EncoderRepetitionPenalty {
    fn name(&self) -> &str {
        "EncoderRepetitionPenalty"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for ExponentialDecay {
    fn name(&self) -> &str {
        "ExponentialDecay"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for KeywordBoost {
    fn name(&self) -> &str {
        "KeywordBoost"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}
