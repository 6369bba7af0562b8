//! Searches: rows in, rows out, over one forward pass. None knows a model family, a tokenizer or a device.

mod beam;
mod contrastive;
mod dola;
mod draft;
mod group;
mod hypotheses;
mod phrases;
mod single;
mod speculative;

use crate::{
    config::Strategy,
    error::{Error, Result},
    logits::{self, Scores},
    model::{Cache, Feed, Forward, Model, PEAK, Room, Start, Values, Want},
    output::{FinishReason, Piece},
    plan::Plan,
    rows::Row,
    trace::Beam,
};
use std::{
    ops::Range,
    sync::Mutex,
    time::{Duration, Instant},
};

/// A way to choose tokens. One value serves one call.
pub trait Search: Send {
    /// Makes every live row one or more tokens longer, or ends it. Each has at least one pending token. Rows whose
    /// `finish` is set are taken away after the step, with the `number` that they have then.
    fn step(&mut self, turn: &mut Turn<'_>) -> Result<()>;

    /// Rows that a prompt begins with: forks of one computed prompt, numbered one after another.
    fn width(&self, plan: &Plan) -> usize {
        plan.num_return_sequences
    }

    /// Whether a row that begins with `tokens` can be searched. Asked before anything is computed.
    fn check(&self, _tokens: &[u32], _plan: &Plan) -> Result<()> {
        Ok(())
    }

    /// What the passes over all but the last tokens of prompts return.
    fn prefill(&self) -> Want<'static> {
        Want::Nothing
    }

    /// Takes what such a pass returned; `parts` are the prompts' indices and how many tokens of each were computed.
    fn read(&mut self, _parts: &[(usize, usize)], _forward: Forward) -> Result<()> {
        Ok(())
    }

    /// What became certain in a step, before ended rows are taken away.
    fn pieces(&mut self, rows: &mut [Row]) -> Vec<Piece> {
        rows.iter_mut().map(Row::piece).collect()
    }

    /// The beams of every step so far, if there are any and they are inspected.
    fn tree(&mut self) -> Vec<Vec<Beam>> {
        Vec::new()
    }

    /// Ends all live rows as they are.
    fn cancel(&mut self, rows: &mut Vec<Row>, _plan: &Plan) -> Result<()> {
        rows.iter_mut().try_for_each(|row| row.end(FinishReason::Cancelled))
    }
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
pub fn new(plan: &Plan) -> Result<Box<dyn Search>> {
    if let Some(draft) = &plan.draft {
        return Ok(Box::new(speculative::Speculative::new(draft, plan.strategy.samples())));
    }
    match &plan.strategy {
        Strategy::Greedy => Ok(Box::new(single::Single::Greedy)),
        Strategy::Sample => Ok(Box::new(single::Single::Sample)),
        Strategy::Contrastive { penalty_alpha, top_k } => Ok(Box::new(contrastive::Contrastive::new(*penalty_alpha, *top_k))),
        Strategy::Dola { dola_layers, do_sample } => Ok(Box::new(dola::Dola::new(dola_layers.clone(), *do_sample))),
        Strategy::Beam { .. } | Strategy::BeamSample { .. } | Strategy::DiverseBeam { .. } | Strategy::ConstrainedBeam { .. } => {
            Ok(Box::new(beam::Beam::default()))
        }
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

/// A row's pending tokens.
pub fn feed(row: &mut Row) -> Feed<'_> {
    own_feed(&row.tokens, row.cache.as_mut())
}

fn own_feed<'a>(tokens: &'a [u32], cache: &'a mut dyn Cache) -> Feed<'a> {
    Feed { tokens: tokens.get(cache.len()..).unwrap_or_default(), cache }
}

/// One pass, whose time is added to `clock`.
pub fn compute(model: &dyn Model, feeds: &mut [Feed<'_>], want: Want<'_>, clock: &mut Duration) -> Result<Forward> {
    let started = Instant::now();
    let forward = model.forward(feeds, want)?;
    *clock += started.elapsed();
    Ok(forward)
}

/// `f` of each item. The model's threads share them, unless code of the user's may be among it.
pub fn each<T: Send, R: Send>(model: &dyn Model, plan: &Plan, items: Vec<T>, f: impl Fn(T) -> Result<R> + Sync) -> Result<Vec<R>> {
    if items.len() < 2 || plan.custom {
        return items.into_iter().map(f).collect();
    }
    let (todo, done): (Vec<_>, Vec<_>) = items.into_iter().map(|item| (Mutex::new(Some(item)), Mutex::new(None))).unzip();
    model.spread(todo.len(), &|i| {
        // Once each, whatever is called.
        let item = todo.get(i).and_then(|item| item.lock().ok()?.take());
        if let Some(result) = item.map(&f)
            && let Ok(mut done) = done[i].lock()
        {
            *done = Some(result);
        }
    });
    let lost = || Err(Error::Unsupported("the model did not do all that it was to spread".into()));
    done.into_iter().map(|result| result.into_inner().ok().flatten().unwrap_or_else(lost)).collect()
}

/// Rows of logits in host memory, in the number that is expected.
pub fn host(logits: Values, rows: usize, vocab_size: usize) -> Result<Vec<f32>> {
    let (logits, expected) = (logits.into_host()?, rows * vocab_size);
    if logits.len() != expected {
        return Err(Error::Unsupported(format!("the model returned {} logits, {expected} were expected", logits.len())));
    }
    Ok(logits)
}

/// The logits of some rows, with the largest of each block of a row if they are known.
pub struct Logits {
    values: Vec<f32>,
    peaks: Vec<f32>,
    vocab_size: usize,
}

impl Logits {
    /// Those of each row.
    pub fn rows(&mut self) -> impl Iterator<Item = Scores<'_>> {
        let mut peaks = self.peaks.chunks(self.vocab_size.div_ceil(PEAK).max(1));
        self.values.chunks_exact_mut(self.vocab_size).map(move |values| Scores::known(values, peaks.next().unwrap_or_default()))
    }

    /// Those of some rows, and the largest of each block of them or none.
    pub fn part(&mut self, rows: Range<usize>) -> (&mut [f32], &[f32]) {
        let part = |size: usize| rows.start * size..rows.end * size;
        let peaks = self.peaks.get(part(self.vocab_size.div_ceil(PEAK))).unwrap_or_default();
        (&mut self.values[part(self.vocab_size)], peaks)
    }
}

impl Turn<'_> {
    /// Computes the pending tokens of every row in one pass; the logits after each row's last, row after row. Second contexts are
    /// computed in the same pass, and their logits left in their rows for the processors.
    pub fn logits(&mut self) -> Result<Logits> {
        let (rows, vocab_size) = (self.rows.len(), self.model.info().vocab_size);
        let Forward { logits, mut peaks, .. } = self.pass(Want::Last)?;
        let guides = self.rows.iter().filter(|row| row.guide.is_some()).count();
        let mut values = host(logits, rows + guides, vocab_size)?;
        let expected = (rows + guides) * vocab_size.div_ceil(PEAK);
        if !peaks.is_empty() && peaks.len() != expected {
            return Err(Error::Unsupported(format!("the model returned {} peaks of logits, {expected} were expected", peaks.len())));
        }
        let unconditional = values.split_off(rows * vocab_size);
        peaks.truncate(rows * vocab_size.div_ceil(PEAK));
        let guides = self.rows.iter_mut().filter_map(|row| row.guide.as_mut());
        guides.zip(unconditional.chunks_exact(vocab_size)).for_each(|(guide, logits)| guide.logits = logits.into());
        Ok(Logits { values, peaks, vocab_size })
    }

    /// As [`Turn::logits`], of rows without second contexts: for each row those of early layers and then its own.
    pub fn layers(&mut self, layers: &[usize]) -> Result<Vec<f32>> {
        let logits = self.pass(Want::Layers(layers))?.logits;
        host(logits, self.rows.len() * (layers.len() + 1), self.model.info().vocab_size)
    }

    /// Sees to it that every row has pending tokens, as it has before every pass.
    fn ready(&mut self) -> Result<()> {
        self.restart()?;
        if let Some(row) = self.rows.iter().find(|row| row.pending().is_empty()) {
            let (held, len) = (row.cache.len(), row.tokens.len());
            return Err(Error::Unsupported(format!(
                "the model's cache holds {held} positions of a row of {len} tokens, the last not computed"
            )));
        }
        Ok(())
    }

    // Feeds what is pending: the rows, then the second contexts.
    fn pass(&mut self, want: Want<'_>) -> Result<Forward> {
        self.ready()?;
        let pending: Vec<_> = self.rows.iter().map(Row::guide_pending).collect();
        let (mut feeds, mut guides) = (Vec::with_capacity(self.rows.len()), Vec::new());
        for (row, tokens) in self.rows.iter_mut().zip(&pending) {
            if let Some(guide) = &mut row.guide {
                guides.push(Feed { tokens, cache: guide.cache.as_mut() });
            }
            feeds.push(own_feed(&row.tokens, row.cache.as_mut()));
        }
        feeds.extend(guides);
        compute(self.model, &mut feeds, want, self.forward)
    }

    /// Runs the processors over the scores of one row.
    pub fn process(&self, row: &Row, scores: &mut [f32]) -> Result<()> {
        Scores::over(scores, |scores| logits::run(&self.plan.processors, &row.history(), scores))
    }

    // Without a cache, every step computes the whole row.
    fn restart(&mut self) -> Result<()> {
        if self.plan.use_cache {
            return Ok(());
        }
        let starts: Vec<_> = (self.rows.iter())
            .map(|row| Start { source: row.source.as_deref().unwrap_or_default(), len: row.tokens.len(), room: Room::Grow })
            .collect();
        let caches = start(self.model, &starts)?;
        for (row, cache) in self.rows.iter_mut().zip(caches) {
            row.cache = cache;
        }
        let len = |row: &Row| Some(row.guide.as_ref()?.prompt.len() + row.generated().len());
        let starts: Vec<_> = self.rows.iter().filter_map(len).map(|len| Start { len, ..Start::default() }).collect();
        let caches = start(self.model, &starts)?;
        for (guide, cache) in self.rows.iter_mut().filter_map(|row| row.guide.as_mut()).zip(caches) {
            guide.cache = cache;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{config::GenerationConfig, model::ModelInfo};
    use std::thread;

    /// A model that spreads, on a thread of its own and backwards, all that it is given, half of it or more than that.
    struct Spreading(fn(usize) -> usize);

    impl Model for Spreading {
        fn info(&self) -> &ModelInfo {
            unreachable!()
        }

        fn start(&self, _: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
            unreachable!()
        }

        fn forward(&self, _: &mut [Feed<'_>], _: Want<'_>) -> Result<Forward> {
            unreachable!()
        }

        fn spread(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
            thread::scope(|scope| scope.spawn(|| (0..(self.0)(count)).rev().for_each(work)).join().unwrap());
        }
    }

    #[test]
    fn items_are_spread_and_stay_in_order() {
        let plan = |config: &GenerationConfig| Plan::new(config, &GenerationConfig::new(), &ModelInfo::new("toy", 9), None).unwrap();
        let (own, custom) = (plan(&GenerationConfig::new()), plan(&GenerationConfig::new().prefix_allowed_tokens_fn(|_, _| vec![1])));
        let model = Spreading(|count| count);
        let caller = thread::current().id();
        let here = |plan, items: Vec<u32>| each(&model, plan, items, |item| Ok((item, thread::current().id() == caller))).unwrap();
        assert_eq!(here(&own, vec![4, 5, 6]), [(4, false), (5, false), (6, false)]);
        assert_eq!(here(&custom, vec![4, 5]), [(4, true), (5, true)], "the user's code stays on the thread of the call");
        assert_eq!(here(&own, vec![4]), [(4, true)], "one row is not worth it");
        let refuse = |item: u32| if item > 1 { Err(Error::Unsupported(item.to_string())) } else { Ok(item) };
        assert_eq!(each(&model, &own, vec![1, 2, 3], refuse).unwrap_err().to_string(), Error::Unsupported("2".into()).to_string());
        let lost = each(&Spreading(|count| count / 2), &own, vec![1, 2, 3], Ok).unwrap_err().to_string();
        assert!(lost.contains("spread"), "{lost}");
        assert_eq!(each(&Spreading(|count| count * 2), &own, vec![1, 2, 3], Ok).unwrap(), [1, 2, 3]);
    }
}
