//! A row: one sequence in the making, with all that it remembers. A clone is a fork.

use crate::{
    error::Result,
    logits::{History, Surprise, pick},
    model::Cache,
    output::{FinishReason, Piece, Sequence, TokenLogProb},
    plan::{Plan, Record},
    text::{Detokenizer, Scan, Tokenizer, Watch},
    trace::{Step, Tracer},
};
use std::{sync::Arc, time::Instant};

/// One sequence in the making.
pub struct Row {
    /// Its number among the call's sequences.
    pub number: usize,
    /// The index of its prompt in the call.
    pub prompt: usize,
    /// Prompt and generated ids.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_len: usize,
    /// The length of `tokens` at which it ends.
    pub max_length: usize,
    /// The encoder's source; `None` in a decoder-only model.
    pub source: Option<Arc<[u32]>>,
    /// What its draws depend on.
    pub seed: u64,
    /// What its draws remember.
    pub surprise: Surprise,
    /// Its keys and values.
    pub cache: Box<dyn Cache>,
    /// What it is guided away from.
    pub guide: Option<Guide>,
    /// Why it ended, once it has.
    pub finish: Option<FinishReason>,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// Drafted tokens that were checked for it.
    pub drafted: usize,
    /// How many of them it kept.
    pub accepted: usize,
    /// The score that a beam search ranks it by.
    pub score: Option<f32>,
    /// For each generated token the beam that it continued, in a beam search.
    pub beam_indices: Vec<usize>,
    /// What a stream has already been given.
    pub shown: Shown,
    text: Option<Text>,
    // Shared with forks, as the cache's pages are.
    log_probs: Vec<Arc<TokenLogProb>>,
    scores: Vec<Arc<Vec<f32>>>,
    logits: Vec<Arc<Vec<f32>>>,
    tracer: Option<Arc<Tracer>>,
    steps: Vec<Arc<Step>>,
}

/// The second context of a row under classifier-free guidance: another prompt, followed by the ids that the row generated.
pub struct Guide {
    /// What it begins with in place of the row's prompt.
    pub prompt: Arc<[u32]>,
    /// Its keys and values.
    pub cache: Box<dyn Cache>,
    /// The logits after the row's last token.
    pub logits: Arc<[f32]>,
}

/// The cache of a row that nothing is computed for: it was cancelled before it began, or it has ended.
pub(crate) struct Unfed;

impl Cache for Unfed {
    fn len(&self) -> usize {
        0
    }

    fn fork(&self) -> Box<dyn Cache> {
        Box::new(Self)
    }

    fn truncate(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
}

/// The row's text so far, and what may still become text.
#[derive(Clone)]
struct Text {
    detokenizer: Detokenizer,
    watch: Watch,
    certain: String,
    /// Bytes of `certain` that a healed prompt's last token brought.
    healed: usize,
}

/// What a stream has already been given.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shown {
    bytes: usize,
    tokens: usize,
}

impl Clone for Row {
    fn clone(&self) -> Self {
        Self {
            cache: self.cache.fork(),
            guide: self.guide.clone(),
            tokens: self.tokens.clone(),
            source: self.source.clone(),
            stop_string: self.stop_string.clone(),
            text: self.text.clone(),
            beam_indices: self.beam_indices.clone(),
            log_probs: self.log_probs.clone(),
            scores: self.scores.clone(),
            logits: self.logits.clone(),
            tracer: self.tracer.clone(),
            steps: self.steps.clone(),
            ..*self
        }
    }
}

impl Clone for Guide {
    fn clone(&self) -> Self {
        Self { prompt: self.prompt.clone(), cache: self.cache.fork(), logits: self.logits.clone() }
    }
}

impl Guide {
    /// A context that holds nothing yet.
    pub fn new(prompt: Arc<[u32]>, cache: Box<dyn Cache>) -> Self {
        Self { prompt, cache, logits: Arc::default() }
    }
}

impl Row {
    /// A row that has generated nothing yet; `tokens` are its prompt.
    pub fn new(
        tokens: Vec<u32>,
        source: Option<Arc<[u32]>>,
        cache: Box<dyn Cache>,
        plan: &Plan,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self> {
        let text = tokenizer.map(|tokenizer| Text::new(tokenizer, written(&tokens, source.is_some()), plan)).transpose()?;
        Ok(Self {
            number: 0,
            prompt: 0,
            prompt_len: tokens.len(),
            max_length: plan.length.max_length(tokens.len()),
            tokens,
            source,
            seed: 0,
            surprise: Surprise::default(),
            cache,
            guide: None,
            finish: None,
            stop_string: None,
            drafted: 0,
            accepted: 0,
            score: None,
            beam_indices: Vec::new(),
            shown: Shown::default(),
            text,
            log_probs: Vec::new(),
            scores: Vec::new(),
            logits: Vec::new(),
            tracer: plan.tracer(),
            steps: Vec::new(),
        })
    }

    /// Lets the text begin with what healing added to the prompt's text.
    pub fn begin(&mut self, head: &str) {
        if let Some(text) = &mut self.text {
            text.certain += head;
            text.healed = text.certain.len();
        }
    }

    /// The ids that its cache does not hold yet.
    pub fn pending(&self) -> &[u32] {
        self.tokens.get(self.cache.len()..).unwrap_or_default()
    }

    /// The ids that the cache of its second context does not hold yet; none without one.
    pub fn guide_pending(&self) -> Vec<u32> {
        self.guide
            .as_ref()
            .map_or_else(Vec::new, |guide| guide.prompt.iter().chain(self.generated()).skip(guide.cache.len()).copied().collect())
    }

    /// The length at which its second context ends; 0 without one.
    pub fn guide_length(&self) -> usize {
        self.guide.as_ref().map_or(0, |guide| guide.prompt.len().saturating_add(self.max_length - self.prompt_len))
    }

    /// The ids generated so far.
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// What processors and criteria see of it.
    pub fn history(&self) -> History<'_> {
        let mut history = History::new(&self.tokens, self.prompt_len, self.max_length);
        history.prompt = self.prompt;
        if let Some(source) = &self.source {
            history.source = source;
        }
        if let Some(guide) = &self.guide {
            history.unconditional = &guide.logits;
        }
        history
    }

    /// Appends a token and decides whether the row ends with it.
    pub fn push(&mut self, token: u32, plan: &Plan, started: Instant) -> Result<()> {
        self.tokens.push(token);
        if plan.eos.contains(&token) {
            self.finish = Some(FinishReason::Eos);
        } else if plan.stop_token_ids.contains(&token) {
            self.finish = Some(FinishReason::StopToken);
        }
        if self.finish != Some(FinishReason::StopToken)
            && let Some(text) = &mut self.text
            && let Some(stop) = text.push(token)?
        {
            self.stop_string = Some(stop);
            self.finish.get_or_insert(FinishReason::StopString);
        }
        if self.finish.is_none() {
            self.finish = self.limit(plan, started);
        }
        if self.finish.is_some() {
            self.close()?;
        }
        Ok(())
    }

    /// Ends the row for a reason from outside.
    pub fn end(&mut self, reason: FinishReason) -> Result<()> {
        self.finish = Some(reason);
        self.close()
    }

    /// Keeps what the call wants to know about a step, before its token is pushed: `raw` are the model's logits.
    pub fn record(&mut self, token: u32, record: &Record, raw: Option<&[f32]>, processed: &[f32]) {
        let raw = raw.unwrap_or(processed);
        if let Some(count) = record.log_probs {
            let scores = if record.processed_log_probs { processed } else { raw };
            let total = pick::log_sum_exp(scores);
            let log_prob = |score: f32| (f64::from(score) - total) as f32;
            self.log_probs.push(Arc::new(TokenLogProb {
                id: token,
                log_prob: scores.get(token as usize).map_or(f32::NEG_INFINITY, |&score| log_prob(score)),
                top: pick::top(scores, count).into_iter().map(|(id, score)| (id, log_prob(score))).collect(),
            }));
        }
        if record.scores {
            self.scores.push(Arc::new(processed.to_vec()));
        }
        if record.logits {
            self.logits.push(Arc::new(raw.to_vec()));
        }
        if let Some(tracer) = &self.tracer {
            let step = tracer.step(token, &self.history(), raw, processed);
            self.steps.push(Arc::new(step));
        }
    }

    /// What became certain since the last piece.
    pub fn piece(&mut self) -> Piece {
        let text = self.text.as_ref().map_or("", |text| &text.certain[self.shown.bytes..]).to_owned();
        let tokens = self.generated()[self.shown.tokens..].to_vec();
        self.shown = Shown { bytes: self.shown.bytes + text.len(), tokens: self.shown.tokens + tokens.len() };
        Piece { row: self.number, text, tokens, finish: self.finish }
    }

    /// What became certain of a row that is chosen later: all that the rows `others` have in common with it. `shown` is what was told before.
    pub fn common_piece<'a>(&self, others: impl Iterator<Item = &'a Self>, shown: &mut Shown) -> Piece {
        let certain = |row: &'a Self| row.text.as_ref().map_or("", |text| &text.certain[shown.bytes..]);
        let mut text = self.text.as_ref().map_or("", |text| &text.certain[shown.bytes..]);
        let mut tokens = &self.generated()[shown.tokens..];
        for other in others {
            let same = text.char_indices().zip(certain(other).chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
            text = &text[..same.unwrap_or(text.len().min(certain(other).len()))];
            tokens = &tokens[..tokens.iter().zip(&other.generated()[shown.tokens..]).take_while(|(a, b)| a == b).count()];
        }
        *shown = Shown { bytes: shown.bytes + text.len(), tokens: shown.tokens + tokens.len() };
        Piece { row: self.number, text: text.to_owned(), tokens: tokens.to_vec(), finish: None }
    }

    /// The result of a row that has ended. Its cache goes.
    pub fn finished(self, plan: &Plan, tokenizer: Option<&Tokenizer>) -> Result<Sequence> {
        let (text, healed) = self.text.map(|text| (text.certain, text.healed)).unwrap_or_default();
        let full_text = match tokenizer {
            Some(tokenizer) => tokenizer.decode(written(&self.tokens[..self.prompt_len], self.source.is_some()), true)? + &text[healed..],
            None => text.clone(),
        };
        let generated = self.tokens[self.prompt_len..].to_vec();
        let keywords = plan
            .keywords
            .as_ref()
            .map_or_else(Vec::new, |keywords| keywords.words.iter().cloned().zip(keywords.boost.produced(&generated)).collect());
        let holds = |ids: &Vec<u32>| self.tokens.windows(ids.len()).any(|part| part == ids);
        let unmet = plan.phrases.iter().enumerate().filter(|(_, set)| !set.iter().any(holds)).map(|(index, _)| index).collect();
        Ok(Sequence {
            prompt: self.prompt,
            row: self.number,
            text,
            full_text,
            prompt_len: self.prompt_len,
            finish: self.finish.unwrap_or(FinishReason::Cancelled),
            stop_string: self.stop_string,
            seed: plan.strategy.samples().then_some(self.seed),
            score: self.score,
            drafted: self.drafted,
            accepted: self.accepted,
            beam_indices: (plan.strategy.num_beams() > 1).then_some(self.beam_indices),
            log_probs: plan.record.log_probs.map(|_| owned(self.log_probs)),
            scores: plan.record.scores.then(|| owned(self.scores)),
            logits: plan.record.logits.then(|| owned(self.logits)),
            steps: plan.record.trace.then(|| owned(self.steps)),
            keywords,
            unmet,
            tokens: generated,
        })
    }

    fn limit(&self, plan: &Plan, started: Instant) -> Option<FinishReason> {
        if self.tokens.len() >= self.max_length {
            return Some(FinishReason::Length);
        }
        if plan.max_time.is_some_and(|limit| started.elapsed() > limit) {
            return Some(FinishReason::Time);
        }
        plan.criteria.iter().find_map(|criterion| criterion.check(&self.history()))
    }

    fn close(&mut self) -> Result<()> {
        if let Some(text) = &mut self.text
            && self.stop_string.is_none()
            && let Some(stop) = text.flush()?
        {
            self.stop_string = Some(stop);
            self.finish = Some(FinishReason::StopString);
        }
        Ok(())
    }
}

/// The part of a prompt that is text: all but an encoder-decoder model's start token.
fn written(prompt: &[u32], started: bool) -> &[u32] {
    prompt.get(usize::from(started)..).unwrap_or_default()
}

/// Records of a row that has ended; copied only while another row still has them.
fn owned<T: Clone>(records: Vec<Arc<T>>) -> Vec<T> {
    records.into_iter().map(Arc::unwrap_or_clone).collect()
}

impl Text {
    fn new(tokenizer: &Tokenizer, prompt: &[u32], plan: &Plan) -> Result<Self> {
        let watch = if plan.stops.is_empty() { plan.stops.watch("") } else { plan.stops.watch(&tokenizer.decode(prompt, true)?) };
        Ok(Self { detokenizer: Detokenizer::new(tokenizer, prompt)?, watch, certain: String::new(), healed: 0 })
    }

    /// Takes a token; the stop string that its text completes.
    fn push(&mut self, token: u32) -> Result<Option<String>> {
        let piece = self.detokenizer.push(token)?;
        Ok(self.scan(&piece))
    }

    /// Takes what is still held; the stop string that it completes.
    fn flush(&mut self) -> Result<Option<String>> {
        let piece = self.detokenizer.finish()?;
        let stop = self.scan(&piece);
        self.certain += &self.watch.finish();
        Ok(stop)
    }

    fn scan(&mut self, piece: &str) -> Option<String> {
        let Scan { text, stop } = self.watch.push(piece);
        self.certain += &text;
        stop
    }
}
