//! The front door: a model, its tokenizer and its own config, shared by any number of threads.

use crate::{
    config::{Assistant, GenerationConfig},
    error::{Error, Result},
    heal::heal,
    hub::{self, Repo},
    memory::Memory,
    model::{Context, Model},
    models::{self, Kernels, LoadOptions},
    output::Output,
    plan::{Explanation, Plan},
    progress::OnProgress,
    run::{Run, Setting, Stream},
    score::{self, Score, Task},
    text::{Prompt, Templates, Tokenizer},
};
use candle_core::{DType, Device};
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Tokens of all rows in flight unless the builder says otherwise.
const BATCH_TOKENS: usize = 1 << 16;

/// Generates text with one loaded model. A clone shares the model, and any number of threads may generate at once.
///
/// ```
/// use candle_generate::{GenerationConfig, Generator};
///
/// let generator = Generator::from_pretrained("examples/models/storyteller")?;
/// let config = GenerationConfig::sampling().temperature(0.7).top_p(0.95).max_new_tokens(16);
/// let output = generator.generate("Once upon a time", &config)?;
/// println!("{}", output.text());
/// # Ok::<(), candle_generate::Error>(())
/// ```
#[derive(Clone)]
pub struct Generator {
    setting: Setting,
    config: Arc<GenerationConfig>,
    templates: Arc<Templates>,
}

impl Generator {
    /// Loads a folder in Hugging Face's format: `config.json`, `model.safetensors` or else `pytorch_model.bin` (or shards and
    /// their index), and where they exist `generation_config.json`, `tokenizer.json` or else `vocab.json` with `merges.txt`,
    /// `tokenizer_config.json` and `chat_template.jinja`. No code of a checkpoint is run.
    ///
    /// A name that is no folder's but a repository's, `owner/name` or `owner/name@revision`, is looked up on the Hugging Face
    /// hub (feature `hub`). What is not in the cache that Python's huggingface_hub keeps is downloaded into it. A file is
    /// used only when its length, and for large files its sha-256, is right; what breaks off is resumed by the next call.
    /// If the hub is out of reach, what the cache has is used. `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`,
    /// `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HUB_DOWNLOAD_TIMEOUT` and the variables for proxies are honoured.
    ///
    /// # Errors
    /// [`Error::Load`] names the file that is missing, damaged or contradicts another one; [`Error::Hub`] says why a
    /// repository cannot be had.
    pub fn from_pretrained(name: impl AsRef<Path>) -> Result<Self> {
        Self::builder(name).load()
    }

    /// As [`Generator::from_pretrained`], with options.
    pub fn builder(name: impl AsRef<Path>) -> Builder {
        Builder {
            name: name.as_ref().to_owned(),
            hub: hub::Options::default(),
            options: LoadOptions::default(),
            memory_limit: None,
            batch_tokens: BATCH_TOKENS,
        }
    }

    /// Generates with a model of one's own. Without a tokenizer, prompts are ids and results have no text.
    pub fn new(model: impl Model + 'static, tokenizer: Option<Tokenizer>) -> Self {
        Self {
            setting: Setting { model: Arc::new(model), tokenizer, progress: None, memory_limit: None, batch_tokens: BATCH_TOKENS },
            config: Arc::default(),
            templates: Arc::default(),
        }
    }

    /// Replaces the model's own config: what a call leaves unset is taken from it.
    pub fn with_config(mut self, config: GenerationConfig) -> Self {
        self.config = Arc::new(config);
        self
    }

    /// Continues one prompt: text, ids or messages.
    pub fn generate(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Output> {
        self.generate_batch([prompt], config)
    }

    /// Continues several prompts of any lengths. Each row is what it would be alone.
    pub fn generate_batch<P: Into<Prompt>>(&self, prompts: impl IntoIterator<Item = P>, config: &GenerationConfig) -> Result<Output> {
        finish(self.run(prompts, self.plan(config)?)?)
    }

    /// Continues one prompt, piece by piece.
    pub fn stream(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Stream> {
        self.stream_batch([prompt], config)
    }

    /// Continues several prompts, piece by piece; [`Piece::row`](crate::Piece::row) says which row a piece belongs to.
    pub fn stream_batch<P: Into<Prompt>>(&self, prompts: impl IntoIterator<Item = P>, config: &GenerationConfig) -> Result<Stream> {
        Ok(Stream::new(self.run(prompts, self.plan(config)?)?))
    }

    /// As [`Generator::generate`], and looks on: [`Sequence::steps`](crate::Sequence::steps) tells what was likely at each step and what each
    /// processor did to it, [`Output::beams`] how beams grew, ended and fell. Each step's processors run twice for it.
    ///
    /// ```
    /// use candle_generate::{GenerationConfig, Generator};
    ///
    /// let generator = Generator::from_pretrained("examples/models/storyteller")?;
    /// let output = generator.inspect("Once upon a time", &GenerationConfig::sampling().top_k(3).max_new_tokens(2).seed(1))?;
    /// let step = &output.sequences[0].steps.as_ref().unwrap()[0];
    /// assert_eq!((step.effects[0].processor.as_str(), step.effects[0].removed), ("top_k", 2045));
    /// # Ok::<(), candle_generate::Error>(())
    /// ```
    pub fn inspect(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Output> {
        let mut plan = self.plan(config)?;
        plan.record.trace = true;
        finish(self.run([prompt], plan)?)
    }

    /// What a call with this config will do: mode, processors in order, where each value came from, memory for one prompt.
    pub fn explain(&self, config: &GenerationConfig) -> Result<Explanation> {
        let plan = self.plan(config)?;
        let info = self.model().info();
        let memory = self.reckon(&plan, 1, 1);
        let mut explanation = plan.explanation;
        explanation.notes.push(format!("memory for a prompt of one token: {memory}"));
        explanation.notes.extend(match info.context {
            Context::Unlimited => None,
            Context::Soft(len) => Some(format!("the model was made for {len} positions; a longer row runs on, with no promise of sense")),
            Context::Hard(len) => Some(format!("the model has {len} positions; a call that needs more is refused")),
        });
        if let Context::Hard(len) = info.source_context {
            explanation.notes.push(format!("the encoder has {len} positions; a longer source is refused"));
        }
        Ok(explanation)
    }

    /// Bytes that a call would take at its longest, for `prompts` prompts of `prompt_len` tokens.
    pub fn memory(&self, config: &GenerationConfig, prompts: usize, prompt_len: usize) -> Result<Memory> {
        Ok(self.reckon(&self.plan(config)?, prompts, prompt_len))
    }

    /// How likely each continuation is after the prompt, which is computed once.
    ///
    /// A text continues a text as it stands, without a space between them, and has the tokens that the tokenizer gives it there. Where
    /// it would change the prompt's own last token, and after ids, it is encoded by itself. No end token is added. An encoder-decoder
    /// model reads the prompt as the source of what is scored.
    ///
    /// ```
    /// use candle_generate::Generator;
    ///
    /// let generator = Generator::from_pretrained("examples/models/storyteller")?;
    /// let scores = generator.score("Once upon a time", [" there lived a king", " the invoice was paid"])?;
    /// assert!(scores[0].mean() > scores[1].mean());
    /// # Ok::<(), candle_generate::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Prompt`] for an empty prompt or continuation, for ids outside the vocabulary, and for more tokens than a model with a hard
    /// limit has positions.
    pub fn score<C: Into<Prompt>>(&self, prompt: impl Into<Prompt>, continuations: impl IntoIterator<Item = C>) -> Result<Vec<Score>> {
        Ok(self.score_batch([(prompt, continuations)])?.pop().unwrap_or_default())
    }

    /// As [`Generator::score`], for several prompts with continuations of their own. Each score is what it would be alone.
    pub fn score_batch<P, C, I>(&self, tasks: impl IntoIterator<Item = (P, I)>) -> Result<Vec<Vec<Score>>>
    where
        P: Into<Prompt>,
        C: Into<Prompt>,
        I: IntoIterator<Item = C>,
    {
        let plan = self.plan(&GenerationConfig::greedy())?;
        let mut list = Vec::new();
        for (index, (prompt, continuations)) in tasks.into_iter().enumerate() {
            let prompt = self.written(prompt.into())?;
            let ids = self.fed(&prompt, plan.bos)?;
            let continuations = continuations.into_iter().map(|continuation| self.continued(&prompt, continuation.into()));
            let continuations = continuations.collect::<Result<_>>()?;
            let (source, prompt) = match plan.begin(index) {
                Some(begin) => (ids, begin),
                None => (Vec::new(), ids),
            };
            list.push(Task { source, len: prompt.len(), prompt, continuations });
        }
        score::score(&self.setting, &list)
    }

    /// How likely whole texts are. The first token, which for many tokenizers is one that begins every text, is given, not scored.
    ///
    /// A text longer than the model's context is read in windows of it, each moved by half of it, so that every scored token is given at
    /// least half a context of what is before it; every token counts once.
    pub fn score_texts<P: Into<Prompt>>(&self, texts: impl IntoIterator<Item = P>) -> Result<Vec<Score>> {
        let info = self.model().info();
        if info.is_encoder_decoder {
            return Err(Error::Unsupported("the score of a text without a source; an encoder-decoder model scores continuations".into()));
        }
        let (mut windows, mut counts, mut scores) = (Vec::new(), Vec::new(), Vec::new());
        for (index, text) in texts.into_iter().enumerate() {
            let ids = self.encode(text)?;
            if ids.len() < 2 {
                return Err(Error::Prompt(format!(
                    "text {index} has {} tokens: at least 2 are accepted, as the first is given",
                    ids.len()
                )));
            }
            let before = windows.len();
            windows.extend(Task::windows(&ids, info.context));
            counts.push(windows.len() - before);
        }
        let mut parts = score::score(&self.setting, &windows)?.into_iter().flatten();
        for count in counts {
            scores.push(Score::join(parts.by_ref().take(count)));
        }
        Ok(scores)
    }

    /// The perplexity of a text: how many equally likely tokens would be as surprising as its tokens are. See
    /// [`Generator::score_texts`] for what counts.
    pub fn perplexity(&self, text: impl Into<Prompt>) -> Result<f64> {
        Ok(self.score_texts([text])?.first().map_or(f64::NAN, Score::perplexity))
    }

    /// The ids that a prompt is fed as.
    pub fn encode(&self, prompt: impl Into<Prompt>) -> Result<Vec<u32>> {
        self.ids(&self.written(prompt.into())?)
    }

    /// The model.
    pub fn model(&self) -> &Arc<dyn Model> {
        &self.setting.model
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.setting.tokenizer.as_ref()
    }

    /// The chat templates.
    pub fn templates(&self) -> &Templates {
        &self.templates
    }

    /// The model's own config.
    pub fn config(&self) -> &GenerationConfig {
        &self.config
    }

    fn plan(&self, config: &GenerationConfig) -> Result<Plan> {
        let mut plan = Plan::new(config, &self.config, self.model().info(), self.tokenizer())?;
        if let Some(negative) = &mut plan.negative {
            let prompts = if config.negative_prompts.is_empty() { &self.config } else { config };
            for prompt in &prompts.negative_prompts {
                negative.push(self.fed(&self.written(prompt.clone())?, plan.bos)?);
            }
        }
        Ok(plan)
    }

    fn reckon(&self, plan: &Plan, prompts: usize, prompt_len: usize) -> Memory {
        let info = self.model().info();
        let begin = if info.is_encoder_decoder { plan.decoder_input_ids.iter().map(Vec::len).max().unwrap_or(0) + 1 } else { prompt_len };
        Memory::new(plan, info, prompts, begin, if info.is_encoder_decoder { prompt_len } else { 0 })
    }

    // A prompt as it is encoded: conversations are rendered.
    fn written(&self, prompt: Prompt) -> Result<Written> {
        Ok(match prompt {
            Prompt::Ids(ids) => Written::Ids(ids),
            Prompt::Text(text) => Written::Text { text, special: true },
            Prompt::Messages(messages) => Written::Text { text: self.templates.render(&messages)?, special: false },
        })
    }

    fn ids(&self, prompt: &Written) -> Result<Vec<u32>> {
        match prompt {
            Written::Ids(ids) => Ok(ids.clone()),
            Written::Text { text, special } => self.reader()?.encode(text, *special),
        }
    }

    // The ids of a prompt, or the one to start from where there are none.
    fn fed(&self, prompt: &Written, bos: Option<u32>) -> Result<Vec<u32>> {
        let mut ids = self.ids(prompt)?;
        if ids.is_empty() {
            ids.extend(bos);
        }
        Ok(ids)
    }

    // The ids of a continuation. An encoder-decoder model's stands alone.
    fn continued(&self, prompt: &Written, continuation: Prompt) -> Result<Vec<u32>> {
        let text = match continuation {
            Prompt::Ids(ids) => return Ok(ids),
            Prompt::Text(text) => text,
            Prompt::Messages(_) => return Err(Error::Prompt("a continuation is text or ids; messages are accepted as the prompt".into())),
        };
        let reader = self.reader()?;
        if let Written::Text { text: before, .. } = prompt
            && !self.model().info().is_encoder_decoder
        {
            let both = reader.encode(&format!("{before}{text}"), false)?;
            if let Some(rest) = both.strip_prefix(&reader.encode(before, false)?[..]) {
                return Ok(rest.to_vec());
            }
        }
        reader.encode(&text, false)
    }

    fn reader(&self) -> Result<&Tokenizer> {
        self.tokenizer().ok_or_else(|| Error::Prompt("a prompt of text needs a tokenizer: none was loaded".into()))
    }

    fn run<P: Into<Prompt>>(&self, prompts: impl IntoIterator<Item = P>, plan: Plan) -> Result<Run> {
        let (mut ids, mut heads) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let mut prompt = self.fed(&self.written(prompt.into())?, plan.bos)?;
            if plan.token_healing {
                let healed = heal(&self.setting, &self.config, &plan, &prompt, ids.len())?;
                prompt = healed.ids;
                heads.push(healed.head);
            }
            ids.push(prompt);
        }
        Ok(Run::new(self.setting.clone(), plan, ids)?.begin(heads))
    }
}

impl From<&Generator> for Assistant {
    fn from(generator: &Generator) -> Self {
        Self { model: generator.setting.model.clone(), tokenizer: generator.setting.tokenizer.clone() }
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator").field("model", self.model().info()).finish_non_exhaustive()
    }
}

fn finish(mut run: Run) -> Result<Output> {
    while run.step(None)? {}
    run.output()
}

/// A prompt that only needs encoding.
enum Written {
    Ids(Vec<u32>),
    Text {
        text: String,
        /// Whether the tokenizer frames it; a chat template has done so itself.
        special: bool,
    },
}

/// Options of loading. Every one has a default.
#[derive(Debug, Clone)]
pub struct Builder {
    name: PathBuf,
    hub: hub::Options,
    options: LoadOptions,
    memory_limit: Option<u64>,
    batch_tokens: usize,
}

impl Builder {
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
            setting: Setting { model, tokenizer, progress: options.progress, memory_limit, batch_tokens },
            config: Arc::new(config),
            templates: Arc::new(templates),
        })
    }
}
