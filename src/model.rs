//! What a model is to the rest of the crate: a value that turns new tokens and caches into logits.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::any::Any;

/// A language model: immutable, shared by any number of threads. All that a sequence remembers is in its [`Cache`].
///
/// [Extending](crate::guide::extending) has a short one that works.
pub trait Model: Send + Sync {
    /// What generation has to know about the model.
    fn info(&self) -> &ModelInfo;

    /// A fresh cache for each row. An encoder-decoder model encodes the sources here, all in one pass; a decoder-only
    /// model ignores them (its prompt is fed through [`Model::forward`]).
    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>>;

    /// Appends each row's new tokens to its cache and computes what `want` asks for. Rows may bring different numbers
    /// of tokens; each brings at least one. A row's result does not depend on the other rows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the model cannot give what is wanted; the caches are as they were then.
    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> Result<Forward>;

    /// `work(0)`, `work(1)`, ... `work(count - 1)`, each once and in any order: what is left to do for each row between passes. A model
    /// with threads of its own shares it out among them. `work` uses no model.
    fn spread(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(work);
    }
}

impl std::fmt::Debug for dyn Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Model").field(&self.info().name).finish()
    }
}

/// What a fresh cache is made for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Start<'a> {
    /// What an encoder reads; empty for decoder-only models.
    pub source: &'a [u32],
    /// The tokens that will be fed before the first is generated, which may come in parts: rotary positions that follow
    /// the length of a row have to know it from the beginning.
    pub len: usize,
    /// The room that the cache takes.
    pub room: Room,
}

/// One row's part of a forward pass.
pub struct Feed<'a> {
    /// The ids that follow what the cache holds; at least one.
    pub tokens: &'a [u32],
    /// The row's memory; `tokens` are in it afterwards.
    pub cache: &'a mut dyn Cache,
}

/// What a forward pass returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Want<'a> {
    /// Nothing: the pass only fills the caches, and [`Forward::logits`] is empty.
    Nothing,
    /// The logits after each row's last new token, `(feeds, vocab_size)`.
    Last,
    /// The logits after every new token, row after row, `(new tokens of all feeds, vocab_size)`.
    All,
    /// The logits after the last so many new tokens of each row, row after row; a number for each feed.
    Each(&'a [usize]),
    /// The logits after each row's last new token, and the hidden states of every new token.
    Hidden,
    /// After each row's last new token: the head's output for the state after each of these layers (0 is the embeddings), which
    /// the final norm has not touched, and last the model's own logits. One more row of logits per feed than there are layers.
    Layers(&'a [usize]),
}

/// How much room a fresh cache takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Room {
    /// None at first: it grows with use.
    #[default]
    Grow,
    /// This many positions at once; more are refused.
    Reserve(usize),
}

/// What one sequence remembers, usually its keys and values.
pub trait Cache: Send + Any {
    /// The number of positions it holds.
    fn len(&self) -> usize;

    /// Whether it holds no position.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A second cache with the same content. Keys and values are shared, not copied.
    fn fork(&self) -> Box<dyn Cache>;

    /// Forgets every position from `len` on; an error if it holds fewer, or if they cannot be forgotten any more.
    fn truncate(&mut self, len: usize) -> Result<()>;

    /// Becomes the cache of another row, started as `start` says, of which it keeps the first `len` positions; whether it can. If
    /// not, it is of no more use, and that row is computed from its first token.
    ///
    /// By default it is truncated, for rows whose room grows. Caches that reserve room, or whose content depends on
    /// [`Start::len`], have their own way.
    fn resume(&mut self, len: usize, start: &Start<'_>) -> Result<bool> {
        Ok(start.room == Room::Grow && (self.len() == len || self.truncate(len).is_ok()) && self.len() == len)
    }
}

/// What a forward pass gives back.
#[derive(Debug, Clone, Default)]
pub struct Forward {
    /// The logits that were wanted, `(rows, vocab_size)`.
    pub logits: Values,
    /// The states after the final norm of every new token, `(tokens, hidden_size)`; empty unless [`Want::Hidden`].
    pub hidden: Values,
    /// Of each row of `logits`, row after row, the largest of every [`PEAK`] logits, the last of them of what is left, and NaN where
    /// one of them is; empty if they are not known. Then choosing a token reads few of the logits.
    pub peaks: Vec<f32>,
}

/// Logits that one of [`Forward::peaks`] stands for.
pub const PEAK: usize = crate::kernels::BLOCK;

/// Rows of numbers.
#[derive(Debug, Clone, Default)]
pub enum Values {
    /// None.
    #[default]
    Nothing,
    /// In host memory, row after row.
    Host(Vec<f32>),
    /// On the model's device, a matrix of any float type.
    Device(Tensor),
}

impl Values {
    /// In host memory, as `f32`, row after row.
    pub fn into_host(self) -> Result<Vec<f32>> {
        Ok(match self {
            Self::Nothing => Vec::new(),
            Self::Host(values) => values,
            Self::Device(values) => values.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
        })
    }
}

impl From<Values> for Forward {
    fn from(logits: Values) -> Self {
        Self { logits, ..Self::default() }
    }
}

/// What generation has to know about a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelInfo {
    /// The architecture's name, for instance `llama`.
    pub name: String,
    /// The number of logits of a position, and one more than the largest id.
    pub vocab_size: usize,
    /// How far positions reach.
    pub context: Context,
    /// The number of layers whose states [`Want::Layers`] can name; 0 if none.
    pub layers: usize,
    /// Whether the config ties the head to the embeddings: the state after the embeddings then names its own token.
    pub tied: bool,
    /// Whether it runs one row at a time and tells no more than the logits after its last token: what needs more is refused before
    /// it begins, and a batch runs prompt after prompt.
    pub single: bool,
    /// Whether prompts are encoded by an encoder and generation starts from a decoder start token.
    pub is_encoder_decoder: bool,
    /// The number of ids that the encoder knows, where there is one.
    pub source_vocab_size: usize,
    /// How far the encoder's positions reach.
    pub source_context: Context,
    /// Bytes that one position of a source takes in the caches of all rows that read it.
    pub source_bytes: u64,
    /// The device the weights are on.
    pub device: Device,
    /// The type of the arithmetic, which need not be the type the weights are stored in.
    pub dtype: DType,
    /// What computes it, for people; empty if nobody says.
    pub operations: String,
    /// Bytes that the weights take in memory.
    pub weight_bytes: u64,
    /// Bytes that one position of one row takes in the cache.
    pub position_bytes: u64,
    /// The number of positions that a cache grows by at a time.
    pub page: usize,
}

/// How far a model's positions reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// Nothing limits them.
    Unlimited,
    /// Trained on this many, but the arithmetic goes on (rotary positions).
    Soft(usize),
    /// A table with this many positions: more cannot be computed.
    Hard(usize),
}

impl Context {
    /// The number of positions the model was made for, where it has one.
    pub fn positions(self) -> Option<usize> {
        match self {
            Self::Unlimited => None,
            Self::Soft(len) | Self::Hard(len) => Some(len),
        }
    }
}

impl ModelInfo {
    /// The facts that have no default; the rest (unlimited context, no layers told, a head of its own, rows beside each other, decoder-only, CPU, f32, a cache of no size) can be set after.
    pub fn new(name: impl Into<String>, vocab_size: usize) -> Self {
        Self {
            name: name.into(),
            vocab_size,
            context: Context::Unlimited,
            layers: 0,
            tied: false,
            single: false,
            is_encoder_decoder: false,
            source_vocab_size: vocab_size,
            source_context: Context::Unlimited,
            source_bytes: 0,
            device: Device::Cpu,
            dtype: DType::F32,
            operations: String::new(),
            weight_bytes: 0,
            position_bytes: 0,
            page: 1,
        }
    }

    /// Refuses what the encoder cannot read as the source of prompt `index`.
    pub(crate) fn check_source(&self, index: usize, source: &[u32]) -> Result<()> {
        let size = self.source_vocab_size;
        if let Some(id) = source.iter().find(|&&id| id as usize >= size) {
            return Err(Error::Prompt(format!("prompt {index} holds the id {id}, the vocabulary has {size}")));
        }
        match self.source_context {
            Context::Hard(limit) if source.len() > limit => {
                Err(Error::Prompt(format!("prompt {index} has {} tokens, but the encoder has {limit} positions", source.len())))
            }
            _ => Ok(()),
        }
    }
}

/// The concrete cache behind a feed, for implementers of [`Model`].
///
/// # Errors
/// [`Error::Unsupported`] for the cache of another model.
pub fn downcast<C: Cache>(cache: &mut dyn Cache) -> Result<&mut C> {
    (cache as &mut dyn Any).downcast_mut::<C>().ok_or_else(|| Error::Unsupported("a cache of another model was fed to this one".into()))
}
