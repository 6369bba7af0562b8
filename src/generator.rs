//! The front door: a model, its tokenizer and its own config, shared by any number of threads.

mod builder;

pub use builder::Builder;

use crate::{
    config::{Assistant, GenerationConfig},
    error::{Error, Result},
    heal::heal,
    memory::Memory,
    model::{Context, Model},
    output::Output,
    plan::{Explanation, Plan},
    prefix::Prefix,
    run::{Run, Setting, Stream},
    score::{self, Score, Task},
    text::{Direction, Prompt, Templates, Tokenizer},
};
use std::{fmt, path::Path, sync::Arc};

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
    /// their index), and where they exist `generation_config.json`, `tokenizer.json` or else `vocab.json` with `merges.txt` or
    /// SentencePiece models, `tokenizer_config.json` and `chat_template.jinja`. No code of a checkpoint is run.
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
        Builder::new(name.as_ref())
    }

    /// Generates with a model of one's own. Without a tokenizer, prompts are ids and results have no text.
    pub fn new(model: impl Model + 'static, tokenizer: Option<Tokenizer>) -> Self {
        let model = Arc::new(model);
        Self {
            setting: Setting { model, tokenizer, prefix: None, progress: None, memory_limit: None, batch_tokens: BATCH_TOKENS },
            config: Arc::default(),
            templates: Arc::default(),
        }
    }

    /// Replaces the model's own config: what a call leaves unset is taken from it.
    pub fn with_config(mut self, config: GenerationConfig) -> Self {
        self.config = Arc::new(config);
        self
    }

    /// Computes a beginning once: a generator whose calls go on from it wherever their prompts begin with the same tokens.
    ///
    /// Prompts are given whole, as to any generator, and give the same results; what they have in common with the beginning is only
    /// not computed again. Any number of threads and rows share its memory, and a beginning may go on from another one.
    /// [`Usage::reused_tokens`](crate::Usage::reused_tokens) tells how much of a call's prompts was there. What reads the states of
    /// whole prompts (contrastive search) and what keeps nothing (`use_cache(false)`) computes them anew.
    ///
    /// ```
    /// use candle_generate::{GenerationConfig, Generator};
    ///
    /// let generator = Generator::from_pretrained("examples/models/storyteller")?;
    /// let tale = generator.prefix("Once upon a time there was a king who had")?;
    /// let config = GenerationConfig::greedy().max_new_tokens(4);
    /// let output = tale.generate("Once upon a time there was a king who had three daughters", &config)?;
    /// assert_eq!((output.usage.prompt_tokens, output.usage.reused_tokens), (16, 12));
    /// # Ok::<(), candle_generate::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of a call with that prompt, and [`Error::Unsupported`] for encoder-decoder models, whose prompts are encoded whole.
    pub fn prefix(&self, prompt: impl Into<Prompt>) -> Result<Self> {
        if self.model().info().is_encoder_decoder {
            return Err(Error::Unsupported("a prefix for an encoder-decoder model, whose prompts are encoded whole".into()));
        }
        let plan = self.plan(&GenerationConfig::greedy().max_new_tokens(1).use_cache(true))?;
        let ids = self.fed(&self.written(prompt.into())?, &plan)?;
        let mut stream = Stream::new(Run::new(self.setting.clone(), plan, vec![ids])?.keep());
        stream.by_ref().try_for_each(|piece| piece.map(drop))?;
        let (_, prefix) = stream.end()?;
        let mut generator = self.clone();
        generator.begin(prefix);
        Ok(generator)
    }

    /// Continues one prompt: text, ids or messages.
    ///
    /// # Errors
    /// [`Error::Config`] lists all that is wrong with the config; [`Error::Prompt`], [`Error::Tokenizer`] and [`Error::Template`] say what is
    /// wrong with the prompt; [`Error::Unsupported`] what is known but not built; [`Error::Memory`] that the call would not fit, before
    /// anything is allocated; [`Error::Processor`] that no token was left to choose.
    pub fn generate(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Output> {
        self.generate_batch([prompt], config)
    }

    /// Continues several prompts of any lengths. Each row is what it would be alone. Sequences come in the order of their prompts.
    ///
    /// # Errors
    /// Those of [`Generator::generate`]; one prompt's mistake refuses the call.
    pub fn generate_batch<P: Into<Prompt>>(&self, prompts: impl IntoIterator<Item = P>, config: &GenerationConfig) -> Result<Output> {
        finish(self.run(prompts, self.plan(config)?)?)
    }

    /// Continues one prompt, piece by piece. Prompt and config are looked at here, each step is made when the next piece is asked for.
    ///
    /// # Errors
    /// Those of [`Generator::generate`]; what goes wrong later is an item of the stream, and its last.
    pub fn stream(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Stream> {
        self.stream_batch([prompt], config)
    }

    /// Continues several prompts, piece by piece; [`Piece::row`](crate::Piece::row) says which row a piece belongs to.
    ///
    /// # Errors
    /// Those of [`Generator::stream`].
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

    /// What a call with this config will do: mode, processors in order, where each value came from, memory for one prompt. Nothing is
    /// computed; `Display` prints it as a table.
    ///
    /// ```
    /// use candle_generate::{GenerationConfig, Generator};
    ///
    /// let generator = Generator::from_pretrained("examples/models/storyteller")?;
    /// let explanation = generator.explain(&GenerationConfig::sampling().temperature(0.7).num_beams(1))?;
    /// assert_eq!((explanation.mode.as_str(), explanation.processors.join(" ")), ("sample", "temperature top_k".into()));
    /// # Ok::<(), candle_generate::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Unsupported`], as a call with the config would give them.
    pub fn explain(&self, config: &GenerationConfig) -> Result<Explanation> {
        let plan = self.plan(config)?;
        let info = self.model().info();
        let memory = self.reckon(&plan, 1, 1);
        let mut explanation = plan.explanation;
        explanation.notes.push(format!("memory for a prompt of one token: {memory}"));
        if !info.operations.is_empty() {
            explanation.notes.push(format!("computed in {} by {}", info.dtype.as_str(), info.operations));
        }
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

    /// Bytes that a call would take at its longest, for `prompts` prompts of `prompt_len` tokens. Nothing is computed.
    ///
    /// # Errors
    /// Those of [`Generator::explain`].
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
            let ids = self.fed(&prompt, &plan)?;
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

    /// The ids that a prompt is fed as, with the special tokens that the tokenizer or the chat template puts around it.
    ///
    /// # Errors
    /// [`Error::Prompt`] for text without a tokenizer, [`Error::Tokenizer`] and [`Error::Template`].
    pub fn encode(&self, prompt: impl Into<Prompt>) -> Result<Vec<u32>> {
        self.ids(&self.written(prompt.into())?, Direction::default())
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

    /// As [`Generator::stream`], and keeps what is computed of the first row for [`Generator::begin`].
    pub(crate) fn turn(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Stream> {
        Ok(Stream::new(self.run([prompt], self.plan(config)?)?.keep()))
    }

    /// Lets calls go on from `prefix`, if there is one, in place of what they have gone on from.
    pub(crate) fn begin(&mut self, prefix: Option<Prefix>) {
        if let Some(prefix) = prefix {
            self.setting.prefix = Some(Arc::new(prefix));
        }
    }

    fn plan(&self, config: &GenerationConfig) -> Result<Plan> {
        let mut plan = Plan::new(config, &self.config, self.model().info(), self.tokenizer())?;
        if plan.negative.is_some() {
            let prompts = if config.negative_prompts.is_empty() { &self.config } else { config };
            let negative = prompts.negative_prompts.iter().map(|prompt| self.fed(&self.written(prompt.clone())?, &plan));
            plan.negative = Some(negative.collect::<Result<_>>()?);
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

    fn ids(&self, prompt: &Written, direction: Direction) -> Result<Vec<u32>> {
        match prompt {
            Written::Ids(ids) => Ok(ids.clone()),
            Written::Text { text, special } => self.reader()?.encode_as(text, *special, direction),
        }
    }

    // The ids of a prompt, or the one to start from where there are none.
    fn fed(&self, prompt: &Written, plan: &Plan) -> Result<Vec<u32>> {
        let mut ids = self.ids(prompt, plan.direction)?;
        if ids.is_empty() {
            ids.extend(plan.bos);
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
        reader.encode_target(&text)
    }

    fn reader(&self) -> Result<&Tokenizer> {
        self.tokenizer().ok_or_else(|| Error::Prompt("a prompt of text needs a tokenizer: none was loaded".into()))
    }

    fn run<P: Into<Prompt>>(&self, prompts: impl IntoIterator<Item = P>, plan: Plan) -> Result<Run> {
        let (mut ids, mut heads) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let mut prompt = self.fed(&self.written(prompt.into())?, &plan)?;
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
