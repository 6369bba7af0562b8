//! Options of loading.

use super::{BATCH_TOKENS, Generator};
use crate::{
    config::GenerationConfig,
    error::{Error, Result},
    hub::{self, Repo},
    kernels::{AttnImplementation, Instructions},
    models::{self, Kernels, LoadOptions},
    progress::OnProgress,
    run::Setting,
    text::{Templates, Tokenizer},
};
use candle_core::{DType, Device};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// Options of loading. Every one has a default.
///
/// ```
/// use candle_generate::Generator;
///
/// let generator = Generator::builder("examples/models/storyteller").memory_limit(1 << 30).batch_tokens(4096).load()?;
/// assert_eq!(generator.model().info().name, "llama");
/// # Ok::<(), candle_generate::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Builder {
    name: PathBuf,
    hub: hub::Options,
    options: LoadOptions,
    memory_limit: Option<u64>,
    batch_tokens: usize,
}

impl Builder {
    pub(super) fn new(name: &Path) -> Self {
        Self {
            name: name.to_owned(),
            hub: hub::Options::default(),
            options: LoadOptions::default(),
            memory_limit: None,
            batch_tokens: BATCH_TOKENS,
        }
    }

    /// Where the model runs; the CPU unless set.
    pub fn device(mut self, device: Device) -> Self {
        self.options.device = device;
        self
    }

    /// The type of the arithmetic (`F32`, `BF16` or `F16`): on the CPU `F32` unless set, whatever type the file has.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.options.dtype = Some(dtype);
        self
    }

    /// Which implementation of the decoder's operations is used.
    pub fn kernels(mut self, kernels: Kernels) -> Self {
        self.options.kernels = kernels;
        self
    }

    /// Threads that compute on the CPU, 1 to 1024: as many as the process may use physical cores unless set. Models with as many
    /// threads share them; passes of theirs take turns. They sleep while nothing is computed. Candle's operations have threads of
    /// their own (`RAYON_NUM_THREADS`).
    pub fn threads(mut self, threads: usize) -> Self {
        self.options.threads = Some(threads);
        self
    }

    /// The most that kernels for the CPU may use of the processor's instructions: all that it has unless set.
    pub fn instructions(mut self, most: Instructions) -> Self {
        self.options.instructions = Some(most);
        self
    }

    /// How attention is computed: unless set `Flash` by the kernels for the CPU, and `Eager` in candle's operations, which have nothing
    /// else.
    pub fn attn_implementation(mut self, attention: AttnImplementation) -> Self {
        self.options.attn_implementation = Some(attention);
        self
    }

    /// Told about the progress of downloading, of loading and of long prompts; can cancel them. A download that was
    /// cancelled goes on where it ended when it is asked for again.
    pub fn progress(mut self, progress: OnProgress) -> Self {
        self.options.progress = Some(progress);
        self
    }

    /// Bytes that weights and caches may take: a call that needs more is refused before anything is allocated, and a
    /// batch is worked through in parts that fit.
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = Some(bytes);
        self
    }

    /// Tokens of all rows in flight (65,536 unless set), each row counted at its largest length: a larger batch is worked
    /// through in parts. One prompt's rows are never parted.
    pub fn batch_tokens(mut self, tokens: usize) -> Self {
        self.batch_tokens = tokens;
        self
    }

    /// The repository's branch, tag or commit; `main` unless set.
    #[cfg(feature = "hub")]
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.hub.revision = Some(revision.into());
        self
    }

    /// The access token for private and gated repositories; unless set, that of `HF_TOKEN` or of `hf auth login`.
    #[cfg(feature = "hub")]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.hub.token = Some(hub::Token(token.into()));
        self
    }

    /// Whether only the cache is looked at, and no request is sent; unless set, as `HF_HUB_OFFLINE` says.
    #[cfg(feature = "hub")]
    pub fn offline(mut self, offline: bool) -> Self {
        self.hub.offline = Some(offline);
        self
    }

    /// The folder of downloaded repositories; unless set, `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    #[cfg(feature = "hub")]
    pub fn cache_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.hub.cache = Some(folder.into());
        self
    }

    /// Loads.
    ///
    /// # Errors
    /// Those of [`Generator::from_pretrained`], and [`Error::Cancelled`] if the progress callback said so.
    pub fn load(self) -> Result<Generator> {
        let Self { name, hub, options, memory_limit, batch_tokens } = self;
        let folder = match Repo::parse(&name) {
            _ if name.is_dir() => name,
            Some(repo) => hub::folder(&repo, &hub, options.progress.as_ref())?,
            None => {
                let accepted = "a checkpoint folder with config.json, or a repository's name like owner/name, is accepted";
                return Err(Error::load(name, format!("there is no such folder; {accepted}")));
            }
        };
        let config = GenerationConfig::from_pretrained(&folder)?;
        let tokenizer = Tokenizer::from_folder(&folder)?;
        let templates = Templates::from_folder(&folder)?;
        let model = models::load(&folder, &options)?;
        Ok(Generator {
            setting: Setting { model, tokenizer, prefix: None, progress: options.progress, memory_limit, batch_tokens },
            config: Arc::new(config),
            templates: Arc::new(templates),
        })
    }
}
