//! Greedy search and sampling: one token a row and step, each row for itself.

use super::{Search, Turn, each};
use crate::{
    error::{Error, Result},
    logits::{self, Draw, Scores},
    plan::{Plan, Record},
    rows::Row,
};
use std::time::Instant;

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
        let (single, plan, started) = (*self, turn.plan, turn.started);
        let rows = turn.rows.iter_mut().zip(logits.rows()).collect();
        each(turn.model, plan, rows, |(row, mut scores)| {
            let raw = plan.record.needs_raw().then(|| scores.values().to_vec());
            single.take(row, raw.as_deref(), &mut scores, plan, started)
        })?;
        Ok(())
    }
}

impl Single {
    /// Makes `row` longer by a token of `scores`; `raw` are the model's own logits where they are recorded.
    pub fn take(self, row: &mut Row, raw: Option<&[f32]>, scores: &mut Scores<'_>, plan: &Plan, started: Instant) -> Result<()> {
        logits::run(&plan.processors, &row.history(), scores)?;
        let token = self.choose(scores, row, &plan.draw)?;
        if plan.record != Record::default() {
            row.record(token, &plan.record, raw, scores.values());
        }
        row.push(token, plan, started)
    }

    fn choose(self, scores: &mut Scores<'_>, row: &mut Row, draw: &Draw) -> Result<u32> {
        let token = match self {
            Self::Greedy => scores.argmax(),
            Self::Sample => draw.draw(scores, row.seed, row.generated().len() as u64, &mut row.surprise),
        };
        token.ok_or_else(|| Error::Processor { processor: "model".into(), reason: "no token has a score above negative infinity".into() })
    }
}
