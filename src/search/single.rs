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
        for (index, scores) in logits.chunks_exact_mut(vocab_size).enumerate() {
            let raw = turn.plan.record.needs_raw().then(|| scores.to_vec());
            self.take(turn, index, raw.as_deref(), scores)?;
        }
        Ok(())
    }
}

impl Single {
    /// Makes the row at `index` longer by a token of `scores`; `raw` are the model's own logits where they are recorded.
    pub fn take(self, turn: &mut Turn<'_>, index: usize, raw: Option<&[f32]>, scores: &mut [f32]) -> Result<()> {
        turn.process(&turn.rows[index], scores)?;
        let row = &mut turn.rows[index];
        let token = self.choose(scores, row, &turn.plan.draw)?;
        row.record(token, &turn.plan.record, raw, scores);
        row.push(token, turn.plan, turn.started)
    }

    fn choose(self, scores: &mut [f32], row: &mut Row, draw: &Draw) -> Result<u32> {
        let token = match self {
            Self::Greedy => pick::argmax(scores),
            Self::Sample => draw.draw(scores, row.seed, row.generated().len() as u64, &mut row.surprise),
        };
        token.ok_or_else(|| Error::Processor { processor: "model".into(), reason: "no token has a score above negative infinity".into() })
    }
}
