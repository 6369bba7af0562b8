//! Configs to start from.

use super::{GenerationConfig, Strategy};

impl GenerationConfig {
    /// Greedy search, whatever mode the model's file has.
    pub fn greedy() -> Self {
        Self::new().strategy(Strategy::Greedy)
    }

    /// Sampling, whatever mode the model's file has.
    pub fn sampling() -> Self {
        Self::new().strategy(Strategy::Sample)
    }

    /// Beam search, whatever mode the model's file has. One beam is greedy search.
    pub fn beam(num_beams: usize) -> Self {
        Self::new().strategy(Strategy::Beam { num_beams })
    }

    /// Stories and verse: a warm draw from the likely part of the distribution that does not repeat itself.
    pub fn creative_writing() -> Self {
        Self::sampling().temperature(0.9).top_p(0.95).repetition_penalty(1.1)
    }

    /// Answers and extraction: greedy, and without a penalty, since names and numbers have to be repeated as they are.
    pub fn factual() -> Self {
        Self::greedy().repetition_penalty(1.0).no_repeat_ngram_size(0)
    }

    /// Several different texts for one prompt: four independent draws, the tail cut off relative to the best token.
    pub fn diverse() -> Self {
        Self::sampling().temperature(1.1).top_k(0).min_p(0.05).num_return_sequences(4)
    }

    /// Long texts: sampling with a large limit, in which no passage of five tokens comes twice.
    pub fn long_form() -> Self {
        Self::sampling().temperature(0.8).top_p(0.95).no_repeat_ngram_size(5).max_new_tokens(512)
    }

    /// Translation and summaries: five beams that end as soon as five are finished, without repeated three-token passages.
    pub fn translation() -> Self {
        Self::beam(5).early_stopping(true).no_repeat_ngram_size(3)
    }
}
