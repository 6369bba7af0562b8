//! Runs a call: admits prompts while there is room, steps the search over the live rows, retires the finished ones.

use crate::{
    error::{Error, Result},
    logits::pick,
    memory::{self, Memory},
    model::{Cache, Context, Feed, Model, ModelInfo, Start, Want},
    output::{Output, Piece, Sequence, Timings, Usage},
    plan::{Plan, Seeds},
    prefix::{self, Prefix},
    progress::{OnProgress, Stage},
    rows::{Guide, Row, Unfed},
    search::{self, Search, Turn},
    text::Tokenizer,
};
use std::{
    collections::{BTreeMap, VecDeque},
    mem,
    sync::Arc,
    time::Instant,
};

/// Prompt tokens computed in one pass unless the config says otherwise: enough to be efficient, few enough to report and cancel.
const PASS: usize = 512;

/// Rows of a call: more than anyone means, few enough to be listed.
const ROWS: usize = 1 << 20;

/// What a call works with besides its plan.
#[derive(Clone)]
pub(crate) struct Setting {
    pub model: Arc<dyn Model>,
    pub tokenizer: Option<Tokenizer>,
    /// What rows may begin with.
    pub prefix: Option<Arc<Prefix>>,
    pub progress: Option<OnProgress>,
    /// Bytes that weights and caches may take.
    pub memory_limit: Option<u64>,
    /// Tokens of all rows in flight, each row counted at its largest length.
    pub batch_tokens: usize,
}

/// A call under way.
pub(crate) struct Run {
    setting: Setting,
    plan: Plan,
    search: Box<dyn Search>,
    waiting: VecDeque<Waiting>,
    rows: Vec<Row>,
    done: Vec<Sequence>,
    prompt_tokens: usize,
    reused_tokens: usize,
    /// Whether the first row's cache outlives it.
    keep: bool,
    kept: Option<Prefix>,
    timings: Timings,
    started: Instant,
}

/// A prompt that has not been started.
struct Waiting {
    index: usize,
    /// The (decoder's) prompt.
    tokens: Vec<u32>,
    /// The encoder's source.
    source: Option<Arc<[u32]>>,
    /// What its text begins with: the part of a healed token that its prompt's text lacked.
    head: String,
    /// The prompt of the second context.
    negative: Option<Arc<[u32]>>,
}

impl Run {
    /// Checks every prompt; computes nothing yet.
    pub fn new(setting: Setting, plan: Plan, prompts: Vec<Vec<u32>>) -> Result<Self> {
        let run = Self {
            search: search::new(&plan)?,
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
            waiting: prompts.into_iter().enumerate().map(|(index, ids)| Waiting::new(index, ids, &plan)).collect(),
            setting,
            plan,
            rows: Vec::new(),
            done: Vec::new(),
            reused_tokens: 0,
            keep: false,
            kept: None,
            timings: Timings::default(),
            started: Instant::now(),
        };
        run.check()?;
        Ok(run)
    }

    /// Lets the text of each prompt's rows begin with what healing added to the prompt.
    pub fn begin(mut self, heads: Vec<String>) -> Self {
        for (waiting, head) in self.waiting.iter_mut().zip(heads) {
            waiting.head = head;
        }
        self
    }

    /// Keeps what is computed of the first row, for [`Run::kept`].
    pub fn keep(mut self) -> Self {
        self.keep = true;
        self
    }

    /// Makes every live row longer by one step. Returns whether there was anything left to do.
    pub fn step(&mut self, mut pieces: Option<&mut VecDeque<Piece>>) -> Result<bool> {
        if !self.cancelled() {
            self.admit()?;
        }
        if self.cancelled() {
            self.cancel()?;
        } else if !self.rows.is_empty() {
            let mut turn = Turn {
                rows: &mut self.rows,
                plan: &self.plan,
                model: self.setting.model.as_ref(),
                started: self.started,
                forward: &mut self.timings.forward,
            };
            self.search.step(&mut turn)?;
            if self.timings.first_token.is_zero() {
                self.timings.first_token = self.started.elapsed();
            }
        }
        if let Some(pieces) = &mut pieces {
            pieces.extend(self.search.pieces(&mut self.rows));
        }
        self.retire()?;
        Ok(!(self.rows.is_empty() && self.waiting.is_empty()))
    }

    /// The result, once. Rows that are still live are cut off as they are.
    pub fn output(&mut self) -> Result<Output> {
        self.cancel()?;
        self.retire()?;
        self.timings.total = self.started.elapsed();
        self.done.sort_by_key(|sequence| sequence.row);
        let sum = |count: fn(&Sequence) -> usize| self.done.iter().map(count).sum();
        let usage = Usage {
            prompt_tokens: self.prompt_tokens,
            reused_tokens: self.reused_tokens,
            generated_tokens: sum(|sequence| sequence.tokens.len()),
            drafted_tokens: sum(|sequence| sequence.drafted),
            accepted_tokens: sum(|sequence| sequence.accepted),
        };
        Ok(Output { sequences: mem::take(&mut self.done), beams: self.search.tree(), usage, timings: self.timings })
    }

    /// What is computed of the first row, after [`Run::output`] and if it was to be kept.
    pub fn kept(&mut self) -> Option<Prefix> {
        self.kept.take()
    }

    fn check(&self) -> Result<()> {
        let info = self.setting.model.info();
        if info.vocab_size == 0 {
            return Err(Error::Unsupported("the model has no vocabulary: its vocab_size is 0".into()));
        }
        let rows = self.waiting.len().saturating_mul(self.plan.width());
        if rows > ROWS {
            let reason = format!("the call would have {rows} rows; at most {ROWS} are accepted");
            return Err(Error::config("num_return_sequences", self.plan.num_return_sequences, reason));
        }
        let rows = self.waiting.len() * self.search.width(&self.plan);
        if let Seeds::Each(seeds) = &self.plan.seeds
            && seeds.len() != rows
        {
            return Err(Error::config(
                "seeds",
                format!("{} seeds", seeds.len()),
                format!("the call has {rows} rows and needs one for each"),
            ));
        }
        for (field, count) in
            [("decoder_start_token_id", self.plan.decoder_start.len()), ("decoder_input_ids", self.plan.decoder_input_ids.len())]
        {
            if count > 1 && count != self.waiting.len() {
                let reason = format!("the call has {} prompts: one, or one for each prompt, is accepted", self.waiting.len());
                return Err(Error::config(field, format!("{count} of them"), reason));
            }
        }
        let negatives = self.plan.negative.as_ref().map_or(0, Vec::len);
        if negatives > 1 && negatives != self.waiting.len() {
            let reason = format!("the call has {} prompts: one, or one for each prompt, is accepted", self.waiting.len());
            return Err(Error::config("negative_prompts", format!("{negatives} prompts"), reason));
        }
        for waiting in &self.waiting {
            waiting.check(&self.plan, info)?;
            self.search.check(&waiting.tokens, &self.plan)?;
            self.fits(waiting, if self.prefix().is_some() { &waiting.tokens } else { &[] })?;
        }
        Ok(())
    }

    // Whether a prompt that shares the pages of `shared` with the prefix is within the limit alone.
    fn fits(&self, waiting: &Waiting, shared: &[u32]) -> Result<()> {
        let needed = self.memory(waiting).total().saturating_add(self.setting.beside(shared));
        match self.setting.memory_limit {
            Some(limit) if needed > limit => {
                let hint = "a shorter prompt, fewer new tokens or fewer rows would take less".into();
                Err(Error::Memory { needed, limit, hint })
            }
            _ => Ok(()),
        }
    }

    // What rows can begin with: a search that reads the states of whole prompts has to compute them.
    fn prefix(&self) -> Option<&Prefix> {
        self.setting.prefix.as_deref().filter(|_| self.plan.use_cache && self.search.prefill() == Want::Nothing)
    }

    fn memory(&self, waiting: &Waiting) -> Memory {
        Memory::new(&self.plan, self.setting.model.info(), 1, waiting.tokens.len(), waiting.source_len())
    }

    // Starts waiting prompts in order while they fit beside the live rows; at least one if nothing is live.
    fn admit(&mut self) -> Result<()> {
        let mut tokens: usize = self.rows.iter().map(|row| self.capacity(row.tokens.len(), row.max_length, row.guide_length())).sum();
        let live = self.rows.iter().map(|row| self.bytes(row.max_length.saturating_add(row.guide_length())));
        let mut bytes = live.fold(self.setting.beside(&[]), u64::saturating_add);
        // A source is held once, however many rows read it.
        let sources: BTreeMap<_, _> = self.rows.iter().filter_map(|row| Some((row.prompt, row.source.as_ref()?.len()))).collect();
        for len in sources.into_values() {
            tokens = tokens.saturating_add(len);
            bytes = bytes.saturating_add(memory::source_bytes(&self.plan, self.setting.model.info(), len));
        }
        let mut admitted = Vec::new();
        while let Some(next) = self.waiting.front() {
            let width = self.plan.width();
            let max_length = self.plan.length.max_length(next.tokens.len());
            let more_tokens = width.saturating_mul(self.capacity(next.tokens.len(), max_length, next.guide_length(max_length)));
            let Memory { weights, cache: more_bytes } = self.memory(next);
            tokens = tokens.saturating_add(more_tokens).saturating_add(next.source_len());
            bytes = bytes.saturating_add(more_bytes);
            let over = self.setting.memory_limit.is_some_and(|limit| bytes.saturating_add(weights) > limit);
            let full = over || self.setting.model.info().single || tokens > self.setting.batch_tokens;
            if full && !(self.rows.is_empty() && admitted.is_empty()) {
                break;
            }
            admitted.extend(self.waiting.pop_front());
        }
        if admitted.is_empty() {
            return Ok(());
        }
        self.start(admitted)
    }

    // The tokens that a row is counted as: what it may become, within what the model was made for.
    fn capacity(&self, len: usize, max_length: usize, guide_length: usize) -> usize {
        let most = self.setting.model.info().context.positions().unwrap_or(usize::MAX);
        max_length.min(most).max(len).saturating_add(guide_length.min(most))
    }

    fn bytes(&self, max_length: usize) -> u64 {
        memory::position_bytes(&self.plan, self.setting.model.info()).saturating_mul(max_length as u64)
    }

    // Computes each prompt once, then forks it into its rows.
    fn start(&mut self, admitted: Vec<Waiting>) -> Result<()> {
        let starts: Vec<_> = admitted.iter().map(|waiting| (waiting.start(&self.plan), &waiting.tokens[..])).collect();
        let clock = Instant::now();
        let caches = prefix::start(self.prefix(), self.setting.model.as_ref(), &starts)?;
        // An encoder has read the sources.
        self.timings.forward += clock.elapsed();
        let mut fresh = Vec::with_capacity(admitted.len());
        let guides: Vec<_> = admitted.iter().filter_map(|waiting| waiting.guide_start(&self.plan)).collect();
        let mut guides = search::start(self.setting.model.as_ref(), &guides)?.into_iter();
        for (waiting, (cache, held)) in admitted.into_iter().zip(caches) {
            self.reused_tokens += held;
            if held == 0 {
                // Nothing is shared after all.
                self.fits(&waiting, &[])?;
            }
            let negative = waiting.negative.clone();
            let mut row = waiting.row(cache, &self.plan, self.setting.tokenizer.as_ref())?;
            row.guide = negative.and_then(|prompt| Some(Guide::new(prompt, guides.next()?)));
            fresh.push(row);
        }
        if self.plan.use_cache {
            self.prefill(&mut fresh)?;
        }
        if self.keep
            && self.parts()
            && let Some(row) = fresh.first()
        {
            self.kept = Prefix::new(&row.tokens, row.cache.fork())?;
        }
        fresh.into_iter().for_each(|row| self.fork(row));
        Ok(())
    }

    // The rows that a prompt begins with, each with its number and its seed.
    fn fork(&mut self, prompt: Row) {
        let width = self.search.width(&self.plan);
        for (copy, mut row) in std::iter::repeat_n(prompt, width).enumerate() {
            row.number = row.prompt * width + copy;
            row.seed = match &self.plan.seeds {
                Seeds::One(seed) => pick::row_seed(*seed, row.number as u64),
                Seeds::Each(seeds) => seeds.get(row.number).copied().unwrap_or_default(),
            };
            self.rows.push(row);
        }
    }

    // Whether rows part with their caches as they end, so that only the prompt's can be kept.
    fn parts(&self) -> bool {
        self.plan.strategy.num_beams() > 1
    }

    // Leaves what one pass of the search can take: the last tokens of each prompt, and no more than its very last where
    // the prompt is about to be forked.
    fn prefill(&mut self, rows: &mut [Row]) -> Result<()> {
        let pass = self.plan.prefill_chunk_size.unwrap_or(PASS);
        let pending = |rows: &[Row]| -> usize { rows.iter().map(|row| row.pending().len() + row.guide_pending().len()).sum() };
        let contexts = rows.iter().map(|row| 1 + usize::from(row.guide.is_some())).sum();
        let keep = if self.search.width(&self.plan) > 1 || (self.keep && self.parts()) { contexts } else { pass };
        let total = pending(rows);
        let want = self.search.prefill();
        let mut left = total;
        loop {
            let mut budget = if left > keep { pass } else { 0 };
            let (mut feeds, mut parts) = (Vec::new(), Vec::new());
            for Row { prompt, tokens, cache, guide, .. } in rows.iter_mut() {
                let guide = guide.as_mut().map(|guide| (&*guide.prompt, &mut guide.cache));
                for (tokens, cache) in [(tokens.as_slice(), cache)].into_iter().chain(guide) {
                    let from = cache.len();
                    let take = budget.min(tokens.len().saturating_sub(from + 1));
                    if take > 0 {
                        budget -= take;
                        parts.push((*prompt, take));
                        feeds.push(Feed { tokens: &tokens[from..from + take], cache: cache.as_mut() });
                    }
                }
            }
            if feeds.is_empty() || self.cancelled() {
                return Ok(());
            }
            let clock = Instant::now();
            let forward = self.setting.model.forward(&mut feeds, want)?;
            self.timings.forward += clock.elapsed();
            self.search.read(&parts, forward)?;
            let before = mem::replace(&mut left, pending(rows));
            if left >= before {
                // A model that keeps nothing: every pass computes the whole row.
                return Ok(());
            }
            if let Some(progress) = &self.setting.progress {
                progress.report(Stage::Prefill, (total - left) as u64, total as u64)?;
            }
        }
    }

    fn retire(&mut self) -> Result<()> {
        for mut row in self.rows.extract_if(.., |row| row.finish.is_some()) {
            if self.keep && row.number == 0 {
                let cache = mem::replace(&mut row.cache, Box::new(Unfed));
                // The last token was chosen, not computed: where it stood, the cache may hold a draft's.
                let computed = row.tokens.split_last().map_or(&[][..], |(_, computed)| computed);
                self.kept = Prefix::new(computed, cache)?.or(self.kept.take());
            }
            self.done.push(row.finished(&self.plan, self.setting.tokenizer.as_ref())?);
        }
        Ok(())
    }

    fn cancelled(&self) -> bool {
        self.plan.cancel.as_ref().is_some_and(|cancel| cancel.is_cancelled())
    }

    // Ends everything as it is; prompts that never started give empty rows.
    fn cancel(&mut self) -> Result<()> {
        for waiting in mem::take(&mut self.waiting) {
            let row = waiting.row(Box::new(Unfed), &self.plan, self.setting.tokenizer.as_ref())?;
            self.fork(row);
        }
        self.search.cancel(&mut self.rows, &self.plan)
    }
}

impl Setting {
    /// Bytes that the prefix takes beside a row that shares the pages of these tokens with it.
    pub fn beside(&self, tokens: &[u32]) -> u64 {
        self.prefix.as_ref().map_or(0, |prefix| prefix.bytes(tokens, self.model.info()))
    }
}

impl Waiting {
    fn new(index: usize, ids: Vec<u32>, plan: &Plan) -> Self {
        let negative = plan.negative(index, &ids);
        match plan.begin(index) {
            Some(tokens) => Self { index, tokens, source: Some(ids.into()), head: String::new(), negative },
            None => Self { index, tokens: ids, source: None, head: String::new(), negative },
        }
    }

    // Tokens that an encoder reads.
    fn source_len(&self) -> usize {
        self.source.as_ref().map_or(0, |source| source.len())
    }

    fn check(&self, plan: &Plan, info: &ModelInfo) -> Result<()> {
        let &ModelInfo { vocab_size, context, .. } = info;
        let index = self.index;
        let ids = self.source.as_deref().unwrap_or(&self.tokens);
        let negative = self.negative.as_deref();
        if ids.is_empty() {
            return Err(Error::Prompt(format!("prompt {index} is empty and there is no bos_token_id to start from")));
        }
        if negative.is_some_and(<[u32]>::is_empty) {
            return Err(Error::Prompt(format!(
                "the negative prompt of prompt {index} is empty and there is no bos_token_id to start from"
            )));
        }
        if let Some(source) = &self.source {
            info.check_source(index, source)?;
        }
        if let Some(id) = self.tokens.iter().chain(negative.unwrap_or_default()).find(|&&id| id as usize >= vocab_size) {
            return Err(Error::Prompt(format!("prompt {index} holds the id {id}, the vocabulary has {vocab_size}")));
        }
        let (len, max_length) = (self.tokens.len(), plan.length.max_length(self.tokens.len()));
        if len >= max_length {
            return Err(Error::Prompt(format!(
                "prompt {index} has {len} tokens and max_length is {max_length}: nothing is left to generate"
            )));
        }
        let guide = negative.map(|prompt| ("the negative prompt of prompt", prompt.len(), self.guide_length(max_length)));
        for (what, len, max_length) in [("prompt", len, max_length)].into_iter().chain(guide) {
            if let Context::Hard(limit) = context
                && max_length > limit
            {
                let room = limit.saturating_sub(len);
                return Err(Error::Prompt(format!(
                    "{what} {index} has {len} tokens and may grow to {max_length}, but the model has {limit} positions: at most {room} new tokens fit"
                )));
            }
        }
        Ok(())
    }

    fn start(&self, plan: &Plan) -> Start<'_> {
        let room = plan.room(plan.length.max_length(self.tokens.len()));
        Start { source: self.source.as_deref().unwrap_or_default(), len: self.tokens.len(), room }
    }

    fn guide_start(&self, plan: &Plan) -> Option<Start<'_>> {
        let len = self.negative.as_ref()?.len();
        Some(Start { source: &[], len, room: plan.room(self.guide_length(plan.length.max_length(self.tokens.len()))) })
    }

    // The length at which the second context ends when the row ends at `max_length`; 0 without one.
    fn guide_length(&self, max_length: usize) -> usize {
        self.negative.as_ref().map_or(0, |prompt| prompt.len().saturating_add(max_length.saturating_sub(self.tokens.len())))
    }

    fn row(self, cache: Box<dyn Cache>, plan: &Plan, tokenizer: Option<&Tokenizer>) -> Result<Row> {
        let mut row = Row::new(self.tokens, self.source, cache, plan, tokenizer)?;
        row.prompt = self.index;
        row.begin(&self.head);
        Ok(row)
    }
}

/// The pieces of a call, as they become certain. Dropping it ends the call.
///
/// It is `Send` and owns all that it needs, so it can be moved to a thread.
pub struct Stream {
    run: Run,
    pieces: VecDeque<Piece>,
    more: bool,
}

impl Stream {
    pub(crate) fn new(run: Run) -> Self {
        Self { run, pieces: VecDeque::new(), more: true }
    }

    /// The result so far: the whole one once the iterator has ended; before that, live rows are cut off as they are.
    pub fn into_output(mut self) -> Result<Output> {
        self.run.output()
    }

    /// The result so far, and what is computed of the first row if that was to be kept.
    pub(crate) fn end(&mut self) -> Result<(Output, Option<Prefix>)> {
        Ok((self.run.output()?, self.run.kept()))
    }
}

impl Iterator for Stream {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.pieces.is_empty() && self.more {
            match self.run.step(Some(&mut self.pieces)) {
                Ok(more) => self.more = more,
                Err(error) => {
                    self.more = false;
                    return Some(Err(error));
                }
            }
        }
        self.pieces.pop_front().map(Ok)
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("more", &self.more).finish_non_exhaustive()
    }
}
