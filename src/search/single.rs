//! Greedy search and sampling: one token a row and step, each row for itself.

use super::{Search, Turn};
use crate::{
    error::{Error, Result},
    logits::{Draw, pick},
    rows::Row,
};

/// How the token of a step is chosen.
#[derive(Debug, Clone, Copy)]
pub(super) enum Single {
    /// The largest score.
    Greedy,
    /// A draw from the softmax of the scores.
    Sample,
}

impl Search for Single {
    fn step(&mut self, turn: &mut Turn<'_>) -> Result<()> {
        let mut logits = turn.logits()?;
        let vocab_size = turn.model.info().vocab_size;
        let record = turn.plan.record;
        for (index, scores) in logits.chunks_exact_mut(vocab_size).enumerate() {
            let raw = record.needs_raw().then(|| scores.to_vec());
            turn.process(&turn.rows[index], scores)?;
            let row = &mut turn.rows[index];
            let token = self.choose(scores, row, &turn.plan.draw)?;
            row.record(token, &record, raw.as_deref(), scores);
            row.push(token, turn.plan, turn.started)?;
        }
        Ok(())
    }
}

impl Single {
    fn choose(self, scores: &mut [f32], row: &mut Row, draw: &Draw) -> Result<u32> {
        let token = match self {
            Self::Greedy => pick::argmax(scores),
            Self::Sample => draw.draw(scores, row.seed, row.generated().len() as u64, &mut row.surprise),
        };
        token.ok_or_else(|| Error::Processor { processor: "model".into(), reason: "no token has a score above negative infinity".into() })
    }
}
