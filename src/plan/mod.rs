//! What a call will do: config, model and tokenizer looked at together, validated once.

mod chain;
mod check;
mod explain;
mod force;
mod language;
mod merge;

pub use explain::{Explanation, Setting};
pub use merge::Origin;

use crate::{
    config::{Assistant, EarlyStopping, GenerationConfig, Strategy},
    error::Result,
    logits::{Draw, KeywordBoost, LogitsProcessor},
    model::{ModelInfo, Room},
    stop::{CancelToken, StoppingCriteria},
    text::{Direction, StopStrings, Tokenizer},
    trace::Tracer,
};
use chain::Chain;
use check::Check;
use merge::Merged;
use std::{sync::Arc, time::Duration};

/// Alternatives of an inspected step, unless `log_probs` says how many.
const ALTERNATIVES: usize = 8;

/// Everything the loop needs, decided before the first forward pass.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The mode.
    pub strategy: Strategy,
    /// The processors, in the order in which they run.
    pub processors: Vec<Arc<dyn LogitsProcessor>>,
    /// How sampling draws a token from the processed scores.
    pub draw: Draw,
    /// So many processors, the first, are not about the draw.
    pub shaping: usize,
    /// Where drafts come from, in the modes that have them.
    pub draft: Option<Draft>,
    /// What a constrained beam search has to produce: of each entry one alternative, those of `force_words_ids` first.
    pub phrases: Vec<Vec<Vec<u32>>>,
    /// Names the keywords of `keyword_boost`, in the order of its processor.
    pub keywords: Option<Keywords>,
    /// When a row ends by its length.
    pub length: Length,
    /// The ids that end a row and stay in its tokens; never in its text if they are special.
    pub eos: Vec<u32>,
    /// Further ids that end a row and are left out of its text.
    pub stop_token_ids: Vec<u32>,
    /// Strings that end a row.
    pub stops: StopStrings,
    /// The time after which rows end.
    pub max_time: Option<Duration>,
    /// The user's own criteria.
    pub criteria: Vec<Arc<dyn StoppingCriteria>>,
    /// Whether code of the user's runs within a step: it may be bound to the thread of the call, or use the model itself.
    pub custom: bool,
    /// Ends the call from another thread.
    pub cancel: Option<CancelToken>,
    /// Rows per prompt.
    pub num_return_sequences: usize,
    /// How beams are ranked and when they are done.
    pub beams: Beams,
    /// Where rows' seeds come from.
    pub seeds: Seeds,
    /// What results carry besides tokens and text.
    pub record: Record,
    /// Whether keys and values are kept; if not, every step computes the whole row.
    pub use_cache: bool,
    /// The room of a fresh cache.
    pub capacity: Capacity,
    /// Tokens of a prompt computed in one pass.
    pub prefill_chunk_size: Option<usize>,
    /// Whether the last token of each prompt may become a longer one.
    pub token_healing: bool,
    /// Prepended to the prompt where a text prompt encodes to nothing.
    pub bos: Option<u32>,
    /// The first id of an encoder-decoder model's rows: one for all, or one for each prompt. Empty for other models.
    pub decoder_start: Vec<u32>,
    /// What follows it: the same for all, or for each prompt its own.
    pub decoder_input_ids: Vec<Vec<u32>>,
    /// The languages that prompts are encoded with.
    pub direction: Direction,
    /// Under classifier-free guidance what rows begin with in their second context: one for all, or one for each prompt; each prompt's
    /// last token if there is none.
    pub negative: Option<Vec<Vec<u32>>>,
    /// What `explain()` prints.
    pub explanation: Explanation,
}

/// Where drafts come from: tokens that may follow, checked several at a time.
#[derive(Debug, Clone)]
pub enum Draft {
    /// From the row itself: what followed its last tokens earlier on.
    Lookup {
        /// Tokens of a draft.
        num_tokens: usize,
        /// The most tokens that have to be the same.
        ngram: usize,
    },
    /// From another model.
    Model {
        /// The model.
        assistant: Assistant,
        /// Tokens of a draft, at first.
        num_tokens: usize,
        /// Whether drafts become longer with success and shorter without.
        adaptive: bool,
        /// A draft ends with a token less likely than this, at first; 0 is off.
        threshold: f32,
    },
}

/// When a row ends by its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// Generated tokens.
    New(usize),
    /// Prompt and generated tokens.
    Total(usize),
    /// Nothing was set: 20 generated tokens, within the model's context where it has one.
    Unset {
        /// Positions that the model was made for.
        context: Option<usize>,
    },
}

impl Length {
    /// The number of tokens, prompt included, at which a row with a prompt of `prompt_len` ends.
    pub fn max_length(self, prompt_len: usize) -> usize {
        match self {
            Self::New(count) => prompt_len.saturating_add(count),
            Self::Total(len) => len,
            Self::Unset { context } => prompt_len.saturating_add(20).min(context.unwrap_or(usize::MAX)),
        }
    }
}

/// How much room a row's cache takes when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capacity {
    /// None at first.
    Grow,
    /// All that the row can need.
    Row,
    /// This many positions.
    Fixed(usize),
}

impl Capacity {
    /// The room for a row that ends at `max_length` tokens. Its last token is never fed, so that it needs no position.
    pub fn room(self, max_length: usize) -> Room {
        match self {
            Self::Grow => Room::Grow,
            Self::Row => Room::Reserve(max_length.saturating_sub(1)),
            Self::Fixed(len) => Room::Reserve(len),
        }
    }
}

/// How beams are ranked and when they are done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Beams {
    /// The power of a sequence's length that its score is divided by.
    pub length_penalty: f64,
    /// When a search with beams ends.
    pub early_stopping: EarlyStopping,
    /// What a group of beams that is done is taken to choose.
    pub pad: Option<u32>,
}

/// Where rows' seeds come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seeds {
    /// The first row's seed; the others' are hashes of it and the row's number.
    One(u64),
    /// One for each row of the call.
    Each(Vec<u64>),
}

/// What results carry besides tokens and text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Record {
    /// Log-probabilities of the chosen tokens, with this many alternatives.
    pub log_probs: Option<usize>,
    /// Whether log-probabilities are those of the processed scores, not of the model's own.
    pub processed_log_probs: bool,
    /// Processed scores of every step.
    pub scores: bool,
    /// Raw logits of every step.
    pub logits: bool,
    /// What happened at every step.
    pub trace: bool,
}

impl Record {
    /// Whether the model's own logits have to outlive the processors.
    pub fn needs_raw(&self) -> bool {
        self.logits || self.trace || (self.log_probs.is_some() && !self.processed_log_probs)
    }
}

/// The keywords of `keyword_boost`.
#[derive(Debug, Clone)]
pub struct Keywords {
    /// As the config has them.
    pub words: Vec<String>,
    /// The processor, which also tells which were produced.
    pub boost: KeywordBoost,
}

impl Plan {
    /// Takes each value from `call`, else from `model` (the checkpoint's own config), else the reference's default, and
    /// reports all that is wrong at once.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) lists the fields that cannot be honoured; [`Error::Unsupported`](crate::Error::Unsupported) what
    /// is known but not built.
    pub fn new(call: &GenerationConfig, model: &GenerationConfig, info: &ModelInfo, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        let merged = Merged::new(call, model);
        let mut check = Check::new(&merged, info, tokenizer);
        check.mode();
        let eos = check.eos();
        let Chain { processors, shaping, keywords, guided } = Chain::new(&mut check, &eos);
        let config = &merged.config;
        let plan = Self {
            strategy: merged.strategy.clone(),
            shaping,
            draft: check.draft(),
            phrases: check.phrases(&eos),
            keywords,
            draw: check.draw(),
            length: check.length(),
            stop_token_ids: check.stop_token_ids(),
            stops: check.stops(),
            max_time: check.max_time(),
            criteria: config.stopping_criteria.clone(),
            custom: config.runs_code(),
            cancel: config.cancel.clone(),
            num_return_sequences: check.num_return_sequences(),
            beams: check.beams(&eos),
            seeds: check.seeds(),
            record: check.record(),
            use_cache: config.use_cache != Some(false),
            capacity: check.capacity(),
            prefill_chunk_size: check.prefill_chunk_size(),
            token_healing: check.token_healing(),
            bos: config.bos_token_id.and_then(|id| u32::try_from(id).ok()),
            decoder_start: check.decoder_start(),
            decoder_input_ids: check.decoder_input_ids(),
            direction: check.direction(),
            negative: guided.then(Vec::new),
            explanation: Explanation::new(&merged, info, &processors, &eos),
            processors,
            eos,
        };
        check.finish()?;
        Ok(plan)
    }

    /// Rows of a prompt.
    pub fn width(&self) -> usize {
        self.num_return_sequences.max(self.strategy.num_beams())
    }

    /// What looks at the steps of its rows, if they are inspected.
    pub(crate) fn tracer(&self) -> Option<Arc<Tracer>> {
        let count = self.record.log_probs.unwrap_or(ALTERNATIVES);
        let tracer =
            || Tracer { processors: self.processors.clone(), mode: self.strategy.name(), log_probs: self.strategy.num_beams() > 1, count };
        self.record.trace.then(|| Arc::new(tracer()))
    }

    /// The model that writes drafts.
    pub fn assistant(&self) -> Option<&ModelInfo> {
        match &self.draft {
            Some(Draft::Model { assistant, .. }) => Some(assistant.model.info()),
            _ => None,
        }
    }

    /// Candidates of a row that are computed beside each other.
    pub fn candidates(&self) -> usize {
        if let Strategy::Contrastive { top_k, .. } = self.strategy { top_k } else { 1 }
    }

    /// The room of a fresh cache for a row that ends at `max_length` tokens.
    pub fn room(&self, max_length: usize) -> Room {
        // A candidate is computed before it is chosen, the last one too.
        self.capacity.room(max_length.saturating_add(usize::from(self.candidates() > 1)))
    }

    /// What the row of a prompt begins with in an encoder-decoder model.
    // HF: the start token is put before all rows of a batch or before none, as none or some have it; here before each that lacks it.
    pub fn begin(&self, index: usize) -> Option<Vec<u32>> {
        let start = *self.decoder_start.get(index).or(self.decoder_start.first())?;
        let prompt = self.decoder_input_ids.get(index).or(self.decoder_input_ids.first()).map_or(&[][..], Vec::as_slice);
        let start = if prompt.first() == Some(&start) { None } else { Some(start) };
        Some(start.into_iter().chain(prompt.iter().copied()).collect())
    }

    /// What the second context of a row begins with, if it has one.
    pub fn negative(&self, index: usize, prompt: &[u32]) -> Option<Arc<[u32]>> {
        let negative = self.negative.as_ref()?;
        let last = &prompt[prompt.len().saturating_sub(1)..];
        Some(negative.get(index).or(negative.first()).map_or(last, Vec::as_slice).into())
    }
}

#[cfg(test)]
mod tests;
