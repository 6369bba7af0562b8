//! Processors that shape the distribution before a draw.

use super::{History, LogitsProcessor};
use crate::error::Result;

/// Divides by the temperature (`temperature`).
#[derive(Debug, Clone)]
pub struct Temperature {
    /// Above 0.
    pub temperature: f32,
}

/// Keeps the most likely of the top 100 tokens within a budget of entropy (`top_h`, <https://arxiv.org/abs/2509.02510>).
#[derive(Debug, Clone)]
pub struct TopH {
    /// In (0, 1].
    pub top_h: f32,
}

/// Keeps the `k` highest scores and their ties (`top_k`, <https://arxiv.org/abs/1805.04833>).
#[derive(Debug, Clone)]
pub struct TopK {
    /// At least 1.
    pub top_k: usize,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Keeps the smallest set of most likely tokens that reaches a probability (`top_p`, <https://arxiv.org/abs/1904.09751>).
#[derive(Debug, Clone)]
pub struct TopP {
    /// In [0, 1).
    pub top_p: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Keeps tokens at least this likely, relative to the most likely one (`min_p`, <https://arxiv.org/abs/2407.01082>).
#[derive(Debug, Clone)]
pub struct MinP {
    /// In [0, 1].
    pub min_p: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Keeps tokens whose surprise is nearest to the entropy (`typical_p`, <https://arxiv.org/abs/2202.00666>).
#[derive(Debug, Clone)]
pub struct Typical {
    /// In (0, 1).
    pub typical_p: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Drops tokens below a probability (`epsilon_cutoff`, <https://arxiv.org/abs/2210.15191>).
#[derive(Debug, Clone)]
pub struct EpsilonCutoff {
    /// In (0, 1).
    pub epsilon_cutoff: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Drops tokens below a probability that depends on the entropy (`eta_cutoff`, <https://arxiv.org/abs/2210.15191>).
#[derive(Debug, Clone)]
pub struct EtaCutoff {
    /// In (0, 1).
    pub eta_cutoff: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Log-softmax, so that the scores are log-probabilities again (`renormalize_logits`).
#[derive(Debug, Clone)]
pub struct Renormalize;

impl LogitsProcessor for Temperature {
    fn name(&self) -> &str {
        "Temperature"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for TopH {
    fn name(&self) -> &str {
        "TopH"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for TopK {
    fn name(&self) -> &str {
        "TopK"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for TopP {
    fn name(&self) -> &str {
        "TopP"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for MinP {
    fn name(&self) -> &str {
        "MinP"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for Typical {
    fn name(&self) -> &str {
        "Typical"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for EpsilonCutoff {
    fn name(&self) -> &str {
        "EpsilonCutoff"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for EtaCutoff {
    fn name(&self) -> &str {
        "EtaCutoff"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}

impl LogitsProcessor for Renormalize {
    fn name(&self) -> &str {
        "Renormalize"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let _ = (history, scores);
        Ok(())
    }
}
