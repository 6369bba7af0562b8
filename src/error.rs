//! What can go wrong, named by who must act.

use std::path::{Path, PathBuf};

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Messages name the field or the file, the value, and what would be accepted.
///
/// ```
/// use candle_generate::{Error, GenerationConfig, Generator};
///
/// let generator = Generator::from_pretrained("examples/models/storyteller")?;
/// match generator.generate("The", &GenerationConfig::sampling().top_p(1.5)) {
///     Err(Error::Config(problems)) => assert_eq!(problems[0].field, "top_p"), // the request's mistake
///     Err(Error::Memory { needed, .. }) => eprintln!("{needed} bytes are needed"), // a smaller request may do
///     other => drop(other?),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// One or more fields of a [`GenerationConfig`](crate::GenerationConfig) cannot be honoured; all of them are listed.
    #[error("invalid generation config: {}", list(.0))]
    Config(Vec<Problem>),
    /// A prompt cannot be used: empty, too long, or with ids outside the vocabulary.
    #[error("invalid prompt: {0}")]
    Prompt(String),
    /// A file of a checkpoint is missing, damaged or contradicts another one.
    #[error("cannot load {}: {reason}", path.display())]
    Load {
        /// The file, or the folder if no file can be named.
        path: PathBuf,
        /// What is wrong with it, and what would be accepted.
        reason: String,
    },
    /// A file cannot be written.
    #[error("cannot save {}: {reason}", path.display())]
    Save {
        /// The file, or the folder that it belongs in.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// A repository of the hub cannot be downloaded, nor found in the cache.
    #[error("cannot get {repo}: {reason}")]
    Hub {
        /// The repository, `owner/name`.
        repo: String,
        /// What is wrong, and what would help.
        reason: String,
    },
    /// The tokenizer refused to encode or decode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template is missing, does not parse, fails or does not end.
    #[error("chat template: {0}")]
    Template(String),
    /// A logits processor left a row without any token to choose, or met scores that are not numbers.
    #[error("logits processor {processor}: {reason}")]
    Processor {
        /// The processor's name, or `model` if its own logits are at fault.
        processor: String,
        /// What happened, and what would help.
        reason: String,
    },
    /// What was asked for is known, but this build, model or version does not offer it.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The call needs more memory than the limit allows. Nothing was allocated.
    #[error("{needed} bytes are needed, the limit is {limit} bytes: {hint}")]
    Memory {
        /// Bytes of weights and cache at the end of the call.
        needed: u64,
        /// The limit that was set, in bytes.
        limit: u64,
        /// What would fit.
        hint: String,
    },
    /// A progress callback asked to stop.
    #[error("cancelled by the progress callback")]
    Cancelled,
    /// The device has no memory left. The call has ended and given back what it held, so that another can follow.
    #[error("the device is out of memory; fewer prompts at once, fewer tokens or a memory_limit may fit: {0}")]
    OutOfMemory(#[source] candle_core::Error),
    /// A tensor operation failed.
    #[error("tensor: {0}")]
    Tensor(#[source] candle_core::Error),
}

/// One field of a config that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The field's name in `generation_config.json`.
    pub field: String,
    /// The value it has.
    pub value: String,
    /// Why that is refused, and what would be accepted.
    pub reason: String,
}

impl Error {
    pub(crate) fn load(path: impl AsRef<Path>, reason: impl std::fmt::Display) -> Self {
        Self::Load { path: path.as_ref().to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn save(path: impl AsRef<Path>, reason: impl std::fmt::Display) -> Self {
        Self::Save { path: path.as_ref().to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn config(field: &str, value: impl std::fmt::Display, reason: impl Into<String>) -> Self {
        Self::Config(vec![Problem { field: field.to_owned(), value: value.to_string(), reason: reason.into() }])
    }

    /// A stable one-word name of the variant, for logs and protocols.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config(_) => "config",
            Self::Prompt(_) => "prompt",
            Self::Load { .. } => "load",
            Self::Save { .. } => "save",
            Self::Hub { .. } => "hub",
            Self::Tokenizer(_) => "tokenizer",
            Self::Template(_) => "template",
            Self::Processor { .. } => "processor",
            Self::Unsupported(_) => "unsupported",
            Self::Memory { .. } => "memory",
            Self::Cancelled => "cancelled",
            Self::OutOfMemory(_) => "out_of_memory",
            Self::Tensor(_) => "tensor",
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        // Candle wraps the driver's error, whose type only a build for that driver knows; its words are the same everywhere.
        let text = error.to_string();
        if ["OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"].iter().any(|words| text.contains(words)) {
            return Self::OutOfMemory(error);
        }
        Self::Tensor(error)
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} = {}: {}", self.field, self.value, self.reason)
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; ")
}
