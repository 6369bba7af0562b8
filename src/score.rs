//! How likely given tokens are to a model: continuations of a prompt, and whole texts.

use crate::{
    error::{Error, Result},
    logits::{self, History, Scores, pick},
    model::{Cache, Context, Feed, Model, ModelInfo, Room, Start, Want},
    prefix,
    progress::Stage,
    run::Setting,
    search,
};
use serde::Serialize;

/// Tokens computed in one pass.
const PASS: usize = 512;

/// Logits that a pass may return, 64 MiB of them: those of a whole text never exist at once.
const LOGITS: usize = 1 << 24;

/// How likely a sequence of tokens is, each given all before it.
///
/// Log-probabilities are natural logarithms, of the model's own distribution: no processor has touched it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Score {
    /// The tokens that were scored.
    pub tokens: Vec<u32>,
    /// The log-probability of each.
    pub log_probs: Vec<f32>,
}

impl Score {
    /// The log-probability of the whole, which falls with length.
    pub fn total(&self) -> f64 {
        self.log_probs.iter().copied().map(f64::from).sum()
    }

    /// The mean log-probability of a token, by which sequences of different lengths compare.
    pub fn mean(&self) -> f64 {
        self.total() / self.tokens.len() as f64
    }

    /// `exp(-mean)`: the number of equally likely tokens that would be as surprising.
    pub fn perplexity(&self) -> f64 {
        (-self.mean()).exp()
    }

    /// The score of consecutive parts of a text as one.
    pub(crate) fn join(parts: impl Iterator<Item = Self>) -> Self {
        let (tokens, log_probs): (Vec<_>, Vec<_>) = parts.map(|part| (part.tokens, part.log_probs)).unzip();
        Self { tokens: tokens.concat(), log_probs: log_probs.concat() }
    }
}

/// A prompt and what is scored after it, in ids.
pub(crate) struct Task {
    /// What an encoder reads; empty for decoder-only models.
    pub source: Vec<u32>,
    /// The (decoder's) prompt.
    pub prompt: Vec<u32>,
    /// What may follow it.
    pub continuations: Vec<Vec<u32>>,
    /// The tokens that are given from the start: the prompt's, or those of the whole text that it begins.
    pub len: usize,
}

impl Task {
    /// The windows of a text: within `context` positions one, else windows of so many tokens, each half a window after the last, of which
    /// the tokens are scored that the last did not hold. A token's condition is so at least half a window long.
    // HF: the strided perplexity of its guide, with a stride of half the context. It counts the overlap by labels; here each token counts once.
    pub fn windows(text: &[u32], context: Context) -> Vec<Self> {
        let width = context.positions().unwrap_or(usize::MAX).max(2);
        let (mut windows, mut start, mut scored) = (Vec::new(), 0usize, 1);
        while scored < text.len() {
            let end = start.saturating_add(width).min(text.len());
            windows.push(Self {
                source: Vec::new(),
                prompt: text[start..scored].to_vec(),
                continuations: vec![text[scored..end].to_vec()],
                len: end - start,
            });
            (start, scored) = (start.saturating_add(width / 2), end);
        }
        windows
    }

    fn check(&self, index: usize, setting: &Setting) -> Result<()> {
        let info = setting.model.info();
        if self.prompt.is_empty() {
            return Err(Error::Prompt(format!("prompt {index} is empty and there is no bos_token_id to start from")));
        }
        if info.is_encoder_decoder {
            info.check_source(index, &self.source)?;
        }
        for (what, ids) in [("", &self.prompt)].into_iter().chain(self.continuations.iter().map(|ids| ("a continuation of ", ids))) {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= info.vocab_size) {
                return Err(Error::Prompt(format!("{what}prompt {index} holds the id {id}, the vocabulary has {}", info.vocab_size)));
            }
        }
        for (number, continuation) in self.continuations.iter().enumerate() {
            if continuation.is_empty() {
                return Err(Error::Prompt(format!("continuation {number} of prompt {index} is empty: at least one token is accepted")));
            }
            // The last token is never fed.
            let (prompt, len) = (self.prompt.len(), continuation.len());
            if let Context::Hard(limit) = info.context
                && prompt + len - 1 > limit
            {
                return Err(Error::Prompt(format!(
                    "prompt {index} has {prompt} tokens and its continuation {number} has {len}, but the model has {limit} positions"
                )));
            }
            let own = self.bytes(info).saturating_add(self.more(continuation, info));
            let needed = info.weight_bytes.saturating_add(own).saturating_add(setting.beside(&self.prompt));
            if let Some(limit) = setting.memory_limit.filter(|&limit| needed > limit) {
                return Err(Error::Memory { needed, limit, hint: "a shorter prompt or continuation would take less".into() });
            }
        }
        Ok(())
    }

    /// Bytes of the prompt's cache and of the source's.
    fn bytes(&self, info: &ModelInfo) -> u64 {
        let source = pages(self.source.len(), info).saturating_mul(info.source_bytes);
        pages(self.prompt.len(), info).saturating_mul(info.position_bytes).saturating_add(source)
    }

    /// Bytes that a continuation's cache takes beside the prompt's.
    fn more(&self, continuation: &[u32], info: &ModelInfo) -> u64 {
        let shared = self.prompt.len() / info.page.max(1) * info.page.max(1);
        pages(self.prompt.len() - shared + continuation.len(), info).saturating_mul(info.position_bytes)
    }
}

/// The scores of each task's continuations.
pub(crate) fn score(setting: &Setting, tasks: &[Task]) -> Result<Vec<Vec<Score>>> {
    for (index, task) in tasks.iter().enumerate() {
        task.check(index, setting)?;
    }
    let model = setting.model.as_ref();
    let tokens = |task: &Task| task.prompt.len() - 1 + task.continuations.iter().map(Vec::len).sum::<usize>();
    let pass = PASS.min(LOGITS / model.info().vocab_size.max(1)).max(1);
    let mut scorer = Scorer { setting, model, pass, done: 0, total: tasks.iter().map(tokens).sum() };
    let (mut scores, mut rest) = (Vec::with_capacity(tasks.len()), tasks);
    while !rest.is_empty() {
        let (part, later) = rest.split_at(scorer.admit(rest));
        scores.extend(scorer.part(part)?);
        rest = later;
    }
    Ok(scores)
}

struct Scorer<'a> {
    setting: &'a Setting,
    model: &'a dyn Model,
    /// Tokens of a pass.
    pass: usize,
    done: usize,
    total: usize,
}

/// One sequence being computed: a prompt, or a prompt and one continuation.
struct Row {
    tokens: Vec<u32>,
    cache: Box<dyn Cache>,
    /// How many of `tokens` were computed.
    fed: usize,
    /// How many of `tokens` are to be computed.
    end: usize,
    /// Bytes that its cache takes at the end, beside those of a prompt that it shares.
    bytes: u64,
    log_probs: Vec<f32>,
}

impl Scorer<'_> {
    /// How many tasks are worked on together: at least one, and as many as fit the limits.
    fn admit(&self, tasks: &[Task]) -> usize {
        let info = self.model.info();
        let (mut tokens, mut bytes) = (0usize, info.weight_bytes.saturating_add(self.setting.beside(&[])));
        let fits = |task: &&Task| {
            let largest = task.continuations.iter().map(|continuation| task.more(continuation, info)).max().unwrap_or(0);
            tokens = tokens.saturating_add(task.source.len() + task.prompt.len());
            bytes = bytes.saturating_add(task.bytes(info));
            tokens <= self.setting.batch_tokens && self.setting.memory_limit.is_none_or(|limit| bytes.saturating_add(largest) <= limit)
        };
        tasks.iter().take_while(fits).count().max(1)
    }

    /// Computes each prompt once, then each continuation on a fork of it.
    fn part(&mut self, tasks: &[Task]) -> Result<Vec<Vec<Score>>> {
        let info = self.model.info();
        let start = |task| {
            let Task { source, prompt, len, .. }: &Task = task;
            (Start { source, len: *len, room: Room::Grow }, &prompt[..])
        };
        let starts: Vec<_> = tasks.iter().map(start).collect();
        let caches = prefix::start(self.setting.prefix.as_deref(), self.model, &starts)?;
        self.total -= caches.iter().map(|(_, held)| held).sum::<usize>();
        // All but a prompt's last token, whose logits are the first that count.
        let rows = tasks.iter().zip(caches).map(|(task, (cache, held))| Row {
            tokens: task.prompt.clone(),
            cache,
            fed: held,
            end: task.prompt.len() - 1,
            bytes: 0,
            log_probs: Vec::new(),
        });
        let mut prompts = Vec::with_capacity(tasks.len());
        self.passes(rows, false, 0, |row| prompts.push(row))?;
        let base = info.weight_bytes.saturating_add(self.setting.beside(&[]));
        let held = tasks.iter().map(|task| task.bytes(info)).fold(base, u64::saturating_add);
        let rows = tasks.iter().zip(&prompts).flat_map(|(task, prompt)| {
            task.continuations.iter().map(move |continuation| Row {
                tokens: [&task.prompt[..], continuation].concat(),
                cache: prompt.cache.fork(),
                fed: prompt.fed,
                end: prompt.fed + continuation.len(),
                bytes: task.more(continuation, info),
                log_probs: Vec::new(),
            })
        });
        let mut log_probs = Vec::new();
        // A row's cache goes with it.
        self.passes(rows, true, held, |row| log_probs.push(row.log_probs))?;
        let mut log_probs = log_probs.into_iter();
        let mut pair = |tokens: &Vec<u32>| log_probs.next().map(|log_probs| Score { tokens: tokens.clone(), log_probs });
        Ok(tasks.iter().map(|task| task.continuations.iter().filter_map(&mut pair).collect()).collect())
    }

    /// Computes rows to their ends, as many to a pass as fit, and hands them over in their order; `held` are the bytes taken already.
    fn passes(&mut self, rows: impl Iterator<Item = Row>, scored: bool, held: u64, mut finish: impl FnMut(Row)) -> Result<()> {
        let limit = self.setting.memory_limit.unwrap_or(u64::MAX);
        let (mut rows, mut live) = (rows.peekable(), Vec::<Row>::new());
        loop {
            let mut tokens: usize = live.iter().map(Row::left).sum();
            let mut bytes = live.iter().map(|row| row.bytes).fold(held, u64::saturating_add);
            while let Some(next) = rows.next_if(|row| live.is_empty() || (tokens < self.pass && bytes.saturating_add(row.bytes) <= limit)) {
                tokens += next.left();
                bytes = bytes.saturating_add(next.bytes);
                live.push(next);
            }
            if live.is_empty() {
                return Ok(());
            }
            self.pass(&mut live, scored)?;
            live.extract_if(.., |row| row.left() == 0).for_each(&mut finish);
        }
    }

    /// One pass, which reaches the end of every row but perhaps the last.
    fn pass(&mut self, rows: &mut [Row], scored: bool) -> Result<()> {
        let mut budget = self.pass;
        let (mut feeds, mut counts, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows.iter_mut().filter(|row| row.left() > 0) {
            let count = row.left().min(budget);
            let (held, to) = (row.cache.len(), row.fed + count);
            // A model that keeps nothing computes the whole row each time.
            let Some(tokens) = row.tokens.get(held..to).filter(|_| held <= row.fed) else {
                return Err(Error::Unsupported(format!(
                    "the model's cache holds {held} positions of a row of which {} were computed",
                    row.fed
                )));
            };
            feeds.push(Feed { tokens, cache: row.cache.as_mut() });
            counts.push(count);
            targets.push((&row.tokens[row.fed + 1..=to], &mut row.log_probs));
            row.fed = to;
            budget -= count;
        }
        let forward = self.model.forward(&mut feeds, if scored { Want::Each(&counts) } else { Want::Nothing })?;
        if scored {
            let vocab_size = self.model.info().vocab_size;
            let mut logits = search::host(forward.logits, counts.iter().sum(), vocab_size)?;
            let mut logits = logits.chunks_exact_mut(vocab_size);
            for (tokens, log_probs) in targets {
                for (&token, scores) in tokens.iter().zip(&mut logits) {
                    logits::run(&[], &History::new(&[], 0, 0), &mut Scores::new(scores))?;
                    log_probs.push((f64::from(scores[token as usize]) - pick::log_sum_exp(scores)) as f32);
                }
            }
        }
        self.done += counts.iter().sum::<usize>();
        self.setting.progress.as_ref().map_or(Ok(()), |progress| progress.report(Stage::Prefill, self.done as u64, self.total as u64))
    }
}

impl Row {
    fn left(&self) -> usize {
        self.end - self.fed
    }
}

/// Positions in whole pages.
fn pages(positions: usize, info: &ModelInfo) -> u64 {
    let page = info.page.max(1);
    (positions.div_ceil(page) * page) as u64
}
