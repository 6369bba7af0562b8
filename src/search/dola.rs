//! DoLa: greedy search or sampling over what the last layer adds to an early one.

use super::{Search, Turn, each, single::Single};
use crate::{
    config::DolaLayers,
    error::Result,
    logits::{Scores, dola},
};

/// The candidate layers, and how tokens are chosen.
pub(super) struct Dola {
    layers: DolaLayers,
    single: Single,
}

impl Dola {
    pub fn new(layers: DolaLayers, do_sample: bool) -> Self {
        Self { layers, single: if do_sample { Single::Sample } else { Single::Greedy } }
    }
}

impl Search for Dola {
    fn step(&mut self, turn: &mut Turn<'_>) -> Result<()> {
        let info = turn.model.info();
        let (layers, vocab_size) = (self.layers.resolve(info.layers, info.tied), info.vocab_size);
        let mut logits = turn.layers(&layers)?;
        let (single, plan, started) = (self.single, turn.plan, turn.started);
        let rows = turn.rows.iter_mut().zip(logits.chunks_exact_mut(vocab_size * (layers.len() + 1))).collect();
        each(turn.model, plan, rows, |(row, logits)| {
            let (early, scores) = logits.split_at_mut(vocab_size * layers.len());
            let raw = plan.record.needs_raw().then(|| scores.to_vec());
            dola::contrast(scores, early);
            single.take(row, raw.as_deref(), &mut Scores::new(scores), plan, started)
        })?;
        Ok(())
    }
}
