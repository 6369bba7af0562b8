//! What a call takes in memory, reckoned before it begins.

use crate::{
    model::{ModelInfo, Room},
    plan::Plan,
};
use std::fmt;

/// Bytes that a call holds at its longest. Activations and logits, small beside these, are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Memory {
    /// The model's weights, and those of a model that writes drafts: shared by all calls.
    pub weights: u64,
    /// Keys and values of all rows; a prompt's and a source's are held once, however many rows it has.
    pub cache: u64,
}

impl Memory {
    /// For prompts of so many tokens, and with so many in the source that an encoder reads.
    pub(crate) fn new(plan: &Plan, info: &ModelInfo, prompts: usize, prompt_len: usize, source_len: usize) -> Self {
        let page = info.page.max(1);
        let width = plan.width() as u64;
        let pages = |positions: usize| positions.div_ceil(page) as u64;
        let context = |len: usize, max_length: usize| match plan.room(max_length) {
            Room::Reserve(positions) => width.saturating_mul(pages(positions)),
            Room::Grow => {
                let shared = (len / page) as u64;
                let own = pages(max_length).saturating_sub(shared);
                shared.saturating_add(width.saturating_mul(own))
            }
        };
        let max_length = plan.length.max_length(prompt_len);
        let guide = plan.negative.as_ref().map_or(0, |negative| {
            let len = negative.iter().map(Vec::len).max().unwrap_or(1);
            context(len, len.saturating_add(max_length.saturating_sub(prompt_len)))
        });
        // Candidates share all of a row's pages but the last.
        let candidates = width.saturating_mul(plan.candidates().saturating_sub(1) as u64);
        let pages = context(prompt_len, max_length).saturating_add(guide).saturating_add(candidates);
        let prompt = pages.saturating_mul(page as u64).saturating_mul(position_bytes(plan, info));
        let prompt = prompt.saturating_add(source_bytes(plan, info, source_len));
        let assistant = plan.assistant().map_or(0, |info| info.weight_bytes);
        Self { weights: info.weight_bytes.saturating_add(assistant), cache: prompt.saturating_mul(prompts as u64) }
    }

    /// Weights and cache.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache)
    }
}

/// Bytes of a position of a row: the model's and those of a model that writes drafts, which keeps the same positions.
pub(crate) fn position_bytes(plan: &Plan, info: &ModelInfo) -> u64 {
    info.position_bytes.saturating_add(plan.assistant().map_or(0, |info| info.position_bytes))
}

/// Bytes that a source takes in the caches of all rows that read it.
pub(crate) fn source_bytes(plan: &Plan, info: &ModelInfo, len: usize) -> u64 {
    let each = info.source_bytes.saturating_add(plan.assistant().map_or(0, |info| info.source_bytes));
    (len.next_multiple_of(info.page.max(1)) as u64).saturating_mul(each)
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of weights and {} of cache", self.weights, self.cache)
    }
}
