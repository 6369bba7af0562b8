//! Searches: rows in, rows out, over one forward pass. None knows a model family, a tokenizer or a device.

mod single;

use crate::{
    config::Strategy,
    error::{Error, Result},
    logits,
    model::{Cache, Feed, Model, Room, Start, Want},
    plan::Plan,
    rows::Row,
};
use std::time::{Duration, Instant};

/// A way to choose tokens. One value serves one call.
pub trait Search: Send {
    /// Makes every live row one or more tokens longer, or ends it. Each has at least one pending token.
    fn step(&mut self, turn: &mut Turn<'_>) -> Result<()>;
}

/// What a search works with during one step.
pub struct Turn<'a> {
    /// The live rows. A search may fork, drop and reorder them.
    pub rows: &'a mut Vec<Row>,
    /// The call's plan.
    pub plan: &'a Plan,
    /// The model.
    pub model: &'a dyn Model,
    /// When the call began.
    pub started: Instant,
    /// Time spent in forward passes so far.
    pub forward: &'a mut Duration,
}

/// The search of a strategy that has been built.
pub fn new(strategy: &Strategy) -> Result<Box<dyn Search>> {
    match strategy {
        Strategy::Greedy => Ok(Box::new(single::Single::Greedy)),
        Strategy::Sample => Ok(Box::new(single::Single::Sample)),
        other => Err(Error::Unsupported(format!("the mode {} is not built yet", other.name()))),
    }
}

/// Fresh caches, as many as asked for.
pub fn start(model: &dyn Model, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
    let caches = model.start(rows)?;
    if caches.len() != rows.len() {
        return Err(Error::Unsupported(format!("the model made {} caches, {} were asked for", caches.len(), rows.len())));
    }
    Ok(caches)
}

impl Turn<'_> {
    /// Computes the pending tokens of every row in one pass; the logits after each row's last, row after row.
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        self.restart()?;
        if let Some(row) = self.rows.iter().find(|row| row.pending().is_empty()) {
            let (held, len) = (row.cache.len(), row.tokens.len());
            return Err(Error::Unsupported(format!(
                "the model's cache holds {held} positions of a row of {len} tokens, the last not computed"
            )));
        }
        let clock = Instant::now();
        let mut feeds: Vec<_> = self
            .rows
            .iter_mut()
            .map(|row| {
                let from = row.cache.len();
                Feed { tokens: row.tokens.get(from..).unwrap_or_default(), cache: row.cache.as_mut() }
            })
            .collect();
        let logits = self.model.forward(&mut feeds, Want::Last)?.into_host()?;
        *self.forward += clock.elapsed();
        let expected = self.rows.len() * self.model.info().vocab_size;
        if logits.len() != expected {
            return Err(Error::Unsupported(format!("the model returned {} logits, {expected} were expected", logits.len())));
        }
        Ok(logits)
    }

    /// Runs the processors over the scores of one row.
    pub fn process(&self, row: &Row, scores: &mut [f32]) -> Result<()> {
        logits::run(&self.plan.processors, &row.history(), scores)
    }

    // Without a cache, every step computes the whole row.
    fn restart(&mut self) -> Result<()> {
        if self.plan.use_cache {
            return Ok(());
        }
        let starts: Vec<_> =
            self.rows.iter().map(|row| Start { source: row.source.as_deref().unwrap_or_default(), room: Room::Grow }).collect();
        let caches = start(self.model, &starts)?;
        for (row, cache) in self.rows.iter_mut().zip(caches) {
            row.cache = cache;
        }
        Ok(())
    }
}
