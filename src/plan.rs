//! What a call will do: config, model and tokenizer looked at together, validated once.

use crate::{
    config::{GenerationConfig, Strategy},
    error::Result,
    logits::LogitsProcessor,
    model::{ModelInfo, Room},
    stop::StoppingCriteria,
    text::Tokenizer,
};
use std::{fmt, sync::Arc, time::Duration};

/// Everything the loop needs, decided before the first forward pass.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The mode.
    pub strategy: Strategy,
    /// The processors, in the order in which they run.
    pub processors: Vec<Arc<dyn LogitsProcessor>>,
    /// Names the keywords of `keyword_boost`, in the order of its processor.
    pub keywords: Option<Keywords>,
    /// When a row ends by its length.
    pub length: Length,
    /// The ids that end a row and stay in its tokens; never in its text if they are special.
    pub eos: Vec<u32>,
    /// Further ids that end a row and are left out of its text.
    pub stop_token_ids: Vec<u32>,
    /// Strings that end a row.
    pub stop_strings: Vec<String>,
    /// Whether the text keeps the stop string.
    pub include_stop_string: bool,
    /// The time after which rows end.
    pub max_time: Option<Duration>,
    /// The user's own criteria.
    pub criteria: Vec<Arc<dyn StoppingCriteria>>,
    /// Rows per prompt.
    pub num_return_sequences: usize,
    /// Where rows' seeds come from.
    pub seeds: Seeds,
    /// What results carry besides tokens and text.
    pub record: Record,
    /// Whether keys and values are kept; if not, every step computes the whole row.
    pub use_cache: bool,
    /// The room of a fresh cache, where the config asks for a fixed one.
    pub room: Room,
    /// Tokens of a prompt computed in one pass.
    pub prefill_chunk_size: Option<usize>,
    /// Prepended to the prompt where a text prompt encodes to nothing.
    pub bos: Option<u32>,
    /// The first id of an encoder-decoder model's rows.
    pub decoder_start: Option<u32>,
    /// What `explain()` prints.
    pub explanation: Explanation,
}

/// When a row ends by its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// Generated tokens.
    New(usize),
    /// Prompt and generated tokens.
    Total(usize),
}

impl Length {
    /// The number of tokens, prompt included, at which a row with a prompt of `prompt_len` ends.
    pub fn max_length(self, prompt_len: usize) -> usize {
        match self {
            Self::New(count) => prompt_len.saturating_add(count),
            Self::Total(len) => len,
        }
    }
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
}

/// The keywords of `keyword_boost`.
#[derive(Debug, Clone)]
pub struct Keywords {
    /// As the config has them.
    pub words: Vec<String>,
    /// The processor, which also tells which were produced.
    pub boost: crate::logits::KeywordBoost,
}

/// The outcome of a config: mode, processors in order, and where each value came from. `Display` prints it.
#[derive(Debug, Clone, Default)]
pub struct Explanation {
    /// The mode's name.
    pub mode: String,
    /// Names of the processors, in order.
    pub processors: Vec<String>,
    /// Every field that has a value.
    pub settings: Vec<Setting>,
    /// Things worth knowing: positions past the trained context, fields about speed alone, ...
    pub notes: Vec<String>,
}

/// One effective field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The field's name.
    pub field: String,
    /// Its value, as JSON.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
    /// Whether the mode uses it.
    pub used: bool,
}

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The call's config.
    Call,
    /// The model's generation_config.json or config.json.
    Model,
    /// The reference's default.
    Default,
}

impl Plan {
    /// Takes each value from `call`, else from `model` (the checkpoint's own config), else the reference's default, and
    /// reports all that is wrong at once.
    pub fn new(call: &GenerationConfig, model: &GenerationConfig, info: &ModelInfo, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        let _ = (call, model, info, tokenizer);
        Err(crate::Error::Unsupported("not built yet".into()))
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.mode)
    }
}
