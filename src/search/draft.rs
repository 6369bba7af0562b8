//! Who writes drafts: the row's own text, or a smaller model.

use super::{Turn, compute, host, speculative::DRAFT, start};
use crate::{
    error::Result,
    logits::{self, History, Scores, pick},
    model::{Cache, Context, Feed, Model, Room, Start, Want},
    plan::{Capacity, Draft, Plan},
    rows::Row,
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

/// Prompt tokens that the draft model reads in one pass unless the config says otherwise.
const PASS: usize = 512;

/// Tokens that may follow a row's.
#[derive(Default)]
pub(super) struct Drafted {
    pub tokens: Vec<u32>,
    /// The distributions that they were drawn from, as scores; none if they were not drawn.
    pub scores: Vec<Vec<f32>>,
    /// The probability of each, where a threshold looks at it.
    confidence: Vec<f32>,
}

pub(super) enum Drafter {
    Lookup(Lookup),
    Writer(Writer),
}

impl Drafter {
    pub fn new(draft: &Draft, sample: bool) -> Self {
        match draft {
            &Draft::Lookup { num_tokens, ngram } => Self::Lookup(Lookup { num_tokens, ngram }),
            Draft::Model { assistant, num_tokens, adaptive, threshold } => Self::Writer(Writer {
                model: assistant.model.clone(),
                num_tokens: *num_tokens,
                adaptive: *adaptive,
                threshold: *threshold,
                sample,
                rows: HashMap::new(),
            }),
        }
    }

    /// A draft for each row, possibly an empty one.
    pub fn draft(&mut self, turn: &mut Turn<'_>) -> Result<Vec<Drafted>> {
        match self {
            Self::Lookup(lookup) => {
                let turn = &*turn;
                Ok(turn.rows.iter().map(|row| lookup.draft(row, turn)).collect())
            }
            Self::Writer(writer) => writer.draft(turn),
        }
    }

    /// Takes what became of a row's draft: so many of its tokens were kept, and the row now has `len` tokens and one more.
    pub fn learn(&mut self, number: usize, len: usize, draft: &Drafted, matches: usize) -> Result<()> {
        match self {
            Self::Lookup(_) => Ok(()),
            Self::Writer(writer) => writer.learn(number, len, draft, matches),
        }
    }
}

/// Tokens that fit between a row's and its end, beside the one that is chosen in any case.
fn fit(row: &Row, plan: &Plan) -> usize {
    let room = match plan.capacity {
        Capacity::Fixed(positions) => positions.saturating_sub(row.tokens.len()),
        Capacity::Grow | Capacity::Row => usize::MAX,
    };
    room.min(row.max_length.saturating_sub(row.tokens.len() + 1))
}

/// Copies what followed the row's last tokens earlier on (<https://github.com/apoorvumang/prompt-lookup-decoding>).
pub(super) struct Lookup {
    num_tokens: usize,
    ngram: usize,
}

impl Lookup {
    // HF: the longest n-gram first, and the first place where it stands and something allowed follows. That the end cuts a draft,
    // and what no processor would leave, is the same there; but there the processors of the draw take part, over equal scores.
    fn draft(&self, row: &Row, turn: &Turn<'_>) -> Drafted {
        let (tokens, most) = (row.tokens.as_slice(), fit(row, turn.plan).min(self.num_tokens));
        let mut first = None;
        for size in (1..=self.ngram.min(tokens.len().saturating_sub(1))).rev() {
            let (earlier, last) = (&tokens[..tokens.len() - 1], &tokens[tokens.len() - size..]);
            for from in earlier.windows(size).enumerate().filter(|&(_, ngram)| ngram == last).map(|(at, _)| at + size) {
                let chosen = &tokens[from..from.saturating_add(most).min(tokens.len())];
                let allowed = allowed(chosen, row, turn, &mut first);
                if allowed > 0 {
                    let end = chosen.iter().position(|token| turn.plan.eos.contains(token)).unwrap_or(allowed);
                    return Drafted { tokens: chosen[..end.min(allowed)].to_vec(), ..Drafted::default() };
                }
            }
        }
        Drafted::default()
    }
}

/// How many of the tokens the processors would leave after the row, each after the ones before it. `first` keeps what they leave
/// right after it.
fn allowed(tokens: &[u32], row: &Row, turn: &Turn<'_>, first: &mut Option<Vec<f32>>) -> usize {
    let processors = &turn.plan.processors[..turn.plan.shaping.min(turn.plan.processors.len())];
    if processors.is_empty() {
        return tokens.len();
    }
    let mut text = row.tokens.clone();
    let left = |text: &[u32]| {
        let mut scores = vec![1.0; turn.model.info().vocab_size];
        let history = History { tokens: text, ..row.history() };
        if Scores::over(&mut scores, |scores| logits::run(processors, &history, scores)).is_err() {
            scores.fill(f32::NEG_INFINITY);
        }
        scores
    };
    for (count, &token) in tokens.iter().enumerate() {
        let score = match count {
            0 => first.get_or_insert_with(|| left(&text)).get(token as usize).copied(),
            _ => left(&text).get(token as usize).copied(),
        };
        if score.is_none_or(|score| score <= f32::MIN) {
            return count;
        }
        text.push(token);
    }
    tokens.len()
}

/// A model that writes drafts.
pub(super) struct Writer {
    model: Arc<dyn Model>,
    num_tokens: usize,
    adaptive: bool,
    threshold: f32,
    sample: bool,
    rows: HashMap<usize, Notes>,
}

/// What the draft model remembers of a row.
struct Notes {
    /// `None` if it cannot follow the row: an id that it does not know, or more positions than it has.
    cache: Option<Box<dyn Cache>>,
    num_tokens: usize,
    threshold: f32,
    /// Of the tokens that were checked, the most likely first: how likely, and whether they were kept.
    outcomes: Vec<(f32, bool)>,
}

/// A row that is being drafted.
struct Page {
    index: usize,
    notes: Notes,
    /// The row's tokens and the draft's.
    text: Vec<u32>,
    draft: Drafted,
    /// Tokens that the draft may have.
    most: usize,
}

impl Writer {
    fn draft(&mut self, turn: &mut Turn<'_>) -> Result<Vec<Drafted>> {
        let mut known = std::mem::take(&mut self.rows);
        let mut fresh = self.meet(turn, &known)?;
        let mut pages = Vec::with_capacity(turn.rows.len());
        for (index, row) in turn.rows.iter().enumerate() {
            let notes = known.remove(&row.number).unwrap_or_else(|| self.notes(fresh.get_mut(&row.prompt)));
            let mut page = Page { index, notes, text: row.tokens.clone(), draft: Drafted::default(), most: 0 };
            page.most = self.most(&mut page, row, turn.plan);
            pages.push(page);
        }
        while self.write(&mut pages, turn)? {}
        let mut drafts = Vec::with_capacity(pages.len());
        for (page, row) in pages.into_iter().zip(turn.rows.iter()) {
            self.rows.insert(row.number, page.notes);
            drafts.push(page.draft);
        }
        Ok(drafts)
    }

    /// Reads the prompts of rows that are new, each once.
    fn meet(&self, turn: &mut Turn<'_>, known: &HashMap<usize, Notes>) -> Result<HashMap<usize, Box<dyn Cache>>> {
        let mut prompts: BTreeMap<usize, &Row> = BTreeMap::new();
        for row in turn.rows.iter().filter(|row| !known.contains_key(&row.number) && self.follows(&row.tokens) && self.reads(row)) {
            prompts.entry(row.prompt).or_insert(row);
        }
        let rows: Vec<&Row> = prompts.into_values().collect();
        let starts: Vec<_> = rows
            .iter()
            .map(|row| Start { source: row.source.as_deref().unwrap_or_default(), len: row.prompt_len, room: Room::Grow })
            .collect();
        if starts.is_empty() {
            return Ok(HashMap::new());
        }
        let mut caches = start(self.model.as_ref(), &starts)?;
        let pass = turn.plan.prefill_chunk_size.unwrap_or(PASS);
        read(self.model.as_ref(), &rows, &mut caches, pass, turn.forward)?;
        Ok(rows.into_iter().map(|row| row.prompt).zip(caches).collect())
    }

    fn notes(&self, prompt: Option<&mut Box<dyn Cache>>) -> Notes {
        let cache = prompt.map(|cache| cache.fork());
        Notes { cache, num_tokens: self.num_tokens, threshold: self.threshold, outcomes: Vec::new() }
    }

    /// Whether the draft model can read these tokens.
    fn follows(&self, tokens: &[u32]) -> bool {
        let info = self.model.info();
        let fits = !matches!(info.context, Context::Hard(positions) if tokens.len() > positions);
        fits && tokens.iter().all(|&id| (id as usize) < info.vocab_size)
    }

    /// Whether the draft model can read the row's source, if it has one.
    fn reads(&self, row: &Row) -> bool {
        row.source.as_deref().is_none_or(|source| self.model.info().check_source(row.prompt, source).is_ok())
    }

    /// Tokens that the row's draft may have.
    fn most(&self, page: &mut Page, row: &Row, plan: &Plan) -> usize {
        let held = page.notes.cache.as_ref().map_or(0, |cache| cache.len());
        if !self.follows(row.tokens.get(held..).unwrap_or_default()) {
            page.notes.cache = None;
        }
        // The last token of a draft is never fed.
        let positions = match self.model.info().context {
            Context::Hard(positions) => (positions + 1).saturating_sub(row.tokens.len()),
            Context::Soft(_) | Context::Unlimited => usize::MAX,
        };
        if page.notes.cache.is_none() { 0 } else { page.notes.num_tokens.min(positions).min(fit(row, plan)) }
    }

    /// One more token for every draft that is open, in one pass; whether there was any.
    fn write(&self, pages: &mut [Page], turn: &mut Turn<'_>) -> Result<bool> {
        let mut feeds = Vec::new();
        let mut open = Vec::new();
        for Page { index, notes, text, draft, most } in pages.iter_mut() {
            if let Some(cache) = &mut notes.cache
                && draft.tokens.len() < *most
            {
                let from = cache.len();
                feeds.push(Feed { tokens: text.get(from..).unwrap_or_default(), cache: cache.as_mut() });
                open.push(*index);
            }
        }
        if open.is_empty() {
            return Ok(false);
        }
        let forward = compute(self.model.as_ref(), &mut feeds, Want::Last, turn.forward)?;
        let own = self.model.info().vocab_size;
        let all = host(forward.logits, open.len(), own)?;
        for (index, scores) in open.into_iter().zip(all.chunks_exact(own)) {
            // Ids that only one of the tables has are padding.
            let mut scores = scores.to_vec();
            scores.resize(turn.model.info().vocab_size, f32::NEG_INFINITY);
            if !self.choose(&mut pages[index], &turn.rows[index], scores, turn.plan) {
                pages[index].most = 0;
            }
        }
        Ok(true)
    }

    /// Adds a token to a draft; whether it goes on.
    fn choose(&self, page: &mut Page, row: &Row, mut scores: Vec<f32>, plan: &Plan) -> bool {
        // What goes wrong here goes wrong on a guess: the row itself may never come there.
        let history = History { tokens: &page.text, ..row.history() };
        let step = (page.text.len() - row.prompt_len) as u64;
        let token = Scores::over(&mut scores, |scores| {
            logits::run(&plan.processors, &history, scores).ok()?;
            if self.sample { scores.sample(pick::uniform_of(row.seed, DRAFT, step)) } else { scores.argmax() }
        });
        let Some(token) = token else { return false };
        page.text.push(token);
        page.draft.tokens.push(token);
        let confidence = match scores.get(token as usize) {
            Some(&score) if page.notes.threshold > 0.0 => (f64::from(score) - pick::log_sum_exp(&scores)).exp() as f32,
            _ => 1.0,
        };
        page.draft.confidence.push(confidence);
        if self.sample {
            page.draft.scores.push(scores);
        }
        // HF: an unlikely token is the last of its draft, but part of it. So the end of a draft tells nothing of what comes next,
        // and sampling stays exact.
        confidence >= page.notes.threshold && !plan.eos.contains(&token) && !plan.stop_token_ids.contains(&token)
    }

    fn learn(&mut self, number: usize, len: usize, draft: &Drafted, matches: usize) -> Result<()> {
        let Some(notes) = self.rows.get_mut(&number) else { return Ok(()) };
        if let Some(cache) = notes.cache.as_mut().filter(|cache| cache.len() > len) {
            cache.truncate(len)?;
        }
        if self.adaptive {
            notes.num_tokens = if matches == draft.tokens.len() { notes.num_tokens + 2 } else { notes.num_tokens.saturating_sub(1).max(1) };
        }
        if notes.threshold > 0.0 {
            for (place, &confidence) in draft.confidence.iter().enumerate().take(matches + 1) {
                let at = notes.outcomes.partition_point(|&(other, _)| other > confidence);
                notes.outcomes.insert(at, (confidence, place < matches));
            }
            if let Some(best) = threshold(&notes.outcomes) {
                notes.threshold = best;
            }
        }
        Ok(())
    }
}

/// Feeds all but the last token of each row, `pass` tokens at a time.
fn read(model: &dyn Model, rows: &[&Row], caches: &mut [Box<dyn Cache>], pass: usize, clock: &mut Duration) -> Result<()> {
    loop {
        let mut budget = pass;
        let mut feeds = Vec::new();
        for (row, cache) in rows.iter().zip(caches.iter_mut()) {
            let from = cache.len();
            let take = budget.min((row.tokens.len() - 1).saturating_sub(from));
            if take > 0 {
                budget -= take;
                feeds.push(Feed { tokens: &row.tokens[from..from + take], cache: cache.as_mut() });
            }
        }
        let before: usize = feeds.iter().map(|feed| feed.cache.len()).sum();
        if feeds.is_empty() {
            return Ok(());
        }
        compute(model, &mut feeds, Want::Nothing, clock)?;
        if feeds.iter().map(|feed| feed.cache.len()).sum::<usize>() <= before {
            // A model that keeps nothing: every pass computes the whole row.
            return Ok(());
        }
    }
}

/// The threshold that would have parted the tokens best so far, of which the most likely stand first: a kept token below it costs
/// three times what a lost one above it does. `None` while there is little to go by.
// HF: as there, with scikit-learn's roc_curve.
fn threshold(outcomes: &[(f32, bool)]) -> Option<f32> {
    let kept = outcomes.iter().filter(|(_, kept)| *kept).count();
    let lost = outcomes.len() - kept;
    if outcomes.len() <= 5 || kept == 0 || lost == 0 {
        return None;
    }
    let (mut best, mut above) = (None, (0, 0));
    for (at, &(confidence, is_kept)) in outcomes.iter().enumerate() {
        if is_kept {
            above.0 += 1;
        } else {
            above.1 += 1;
        }
        if outcomes.get(at + 1).is_some_and(|&(next, _)| next == confidence) {
            continue;
        }
        let cost = above.1 as f64 / lost as f64 + 3.0 * (1.0 - above.0 as f64 / kept as f64);
        if best.is_none_or(|(least, _)| cost < least) {
            best = Some((cost, confidence));
        }
    }
    best.map(|(_, confidence)| confidence)
}

#[cfg(test)]
mod tests {
    use super::*;

    // By hand: of the first six, 0.6 lets one of three lost tokens pass and stops no kept one.
    #[test]
    fn the_threshold_is_that_of_the_reference() {
        let outcomes = [(0.95, true), (0.9, true), (0.7, false), (0.6, true), (0.5, false), (0.2, false)];
        assert_eq!(threshold(&outcomes), Some(0.6));
        let early = [(0.95, true), (0.9, false), (0.9, false), (0.6, false), (0.5, false), (0.2, false)];
        assert_eq!(threshold(&early), Some(0.95));
        assert_eq!(threshold(&outcomes[1..]), None);
        assert_eq!(threshold(&[(0.5, true); 9]), None);
    }
}
