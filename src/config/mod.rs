//! What a user sets: the fields of Hugging Face's generation_config.json, each of which can be unset.

mod assistant;
mod hf;
mod recipe;
mod strategy;
mod value;

pub use assistant::Assistant;
pub use strategy::{Drafts, Strategy};
pub use value::{Boost, DolaLayers, EarlyStopping, Int, OneOrMany, Seed};

use crate::{
    error::Problem,
    logits::{LogitsProcessor, PenaltyScope, PrefixFunction, Watermarking},
    stop::{CancelToken, StoppingCriteria},
    text::Prompt,
};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fmt, sync::Arc};
use value::Field;

/// Declares the config: for each line a public `Option` field and a setter of the same name, and all that has to go through the whole list.
/// `as` names what the setter takes, where that is not the field's own type.
macro_rules! fields {
    (@param $type:ty) => { $type };
    (@param $type:ty, $param:ty) => { $param };
    ($($(#[$doc:meta])* $name:ident: $type:ty $(as $param:ty)?,)*) => {
        /// All settings of a call. A field that is `None` is unset: the model's own config or the reference's default decides.
        /// [Parameters](crate::guide::parameters) has types, defaults and ranges of all fields.
        ///
        /// ```
        /// use candle_generate::GenerationConfig;
        ///
        /// let config = GenerationConfig::sampling().temperature(0.7).top_p(0.95).max_new_tokens(64);
        /// assert_eq!(config.top_k, None);
        /// ```
        #[derive(Clone, Default)]
        #[non_exhaustive]
        pub struct GenerationConfig {
            $($(#[$doc])* pub $name: Option<$type>,)*
            /// The user's own processors; see [`GenerationConfig::logits_processor`]. Not part of the file.
            pub logits_processors: Vec<Arc<dyn LogitsProcessor>>,
            /// The user's own reasons to end a row. Not part of the file.
            pub stopping_criteria: Vec<Arc<dyn StoppingCriteria>>,
            /// From the prompt's index and the row's ids to the ids that may follow. Not part of the file.
            pub prefix_allowed_tokens_fn: Option<PrefixFunction>,
            /// The model that writes drafts. Not part of the file.
            pub assistant_model: Option<Assistant>,
            /// What guided rows are led away from, with `guidance_scale`: one prompt for all, or one for each; unless set, each
            /// prompt's last token. Not part of the file.
            pub negative_prompts: Vec<Prompt>,
            /// Ends the calls that carry it from another thread. Not part of the file.
            pub cancel: Option<CancelToken>,
            /// Keys of the file that have no field here. They are written back.
            pub unknown: Map<String, Value>,
        }

        impl GenerationConfig {
            /// The fields above by name and type, in the order of their declaration.
            #[cfg(test)]
            pub(crate) const FIELDS: &[(&str, &str)] = &[$((stringify!($name), stringify!($type)),)*];

            $($(#[$doc])*
            #[must_use]
            pub fn $name(mut self, $name: impl Into<fields!(@param $type $(, $param)?)>) -> Self {
                let value: fields!(@param $type $(, $param)?) = $name.into();
                self.$name = Some(value.into());
                self
            })*

            /// Takes the value of one key; whether the key is a field.
            fn read(&mut self, key: &str, value: &Value, problems: &mut Vec<Problem>) -> bool {
                match key {
                    $(stringify!($name) => self.$name = value::read(key, value, problems),)*
                    _ => return false,
                }
                true
            }

            /// The fields that are set, in the order of their declaration.
            pub(crate) fn entries(&self) -> Map<String, Value> {
                let mut entries = Map::new();
                $(if let Some(value) = &self.$name {
                    entries.insert(stringify!($name).to_owned(), value.write());
                })*
                entries
            }

            /// This config, with what it leaves unset taken from `other`. Keys that have no field are not taken.
            pub(crate) fn or(mut self, other: &Self) -> Self {
                $(if self.$name.is_none() {
                    self.$name.clone_from(&other.$name);
                })*
                if self.logits_processors.is_empty() {
                    self.logits_processors.clone_from(&other.logits_processors);
                }
                if self.stopping_criteria.is_empty() {
                    self.stopping_criteria.clone_from(&other.stopping_criteria);
                }
                if self.negative_prompts.is_empty() {
                    self.negative_prompts.clone_from(&other.negative_prompts);
                }
                if self.cancel.is_none() {
                    self.cancel.clone_from(&other.cancel);
                }
                if self.assistant_model.is_none() {
                    self.assistant_model.clone_from(&other.assistant_model);
                }
                if self.prefix_allowed_tokens_fn.is_none() {
                    self.prefix_allowed_tokens_fn.clone_from(&other.prefix_allowed_tokens_fn);
                }
                self
            }
        }
    };
}

fields! {
    /// The mode as one value: it stands above the flags that choose a mode in the model's file, and may not contradict those set beside it.
    strategy: Strategy,

    /// Tokens of prompt and text together, at most; for encoder-decoder models those of the decoder. 20 more than the prompt unless set.
    max_length: i64 as Int,
    /// Generated tokens, at most. Wins over `max_length`.
    max_new_tokens: i64 as Int,
    /// No end before prompt and text have this many tokens.
    min_length: i64 as Int,
    /// No end before this many tokens were generated. Wins over `min_length`.
    min_new_tokens: i64 as Int,
    /// When a beam search ends.
    early_stopping: EarlyStopping,
    /// Seconds after which rows end with the token they are at.
    max_time: f64,
    /// Strings that end a row.
    stop_strings: OneOrMany<String>,
    /// Whether the text keeps the stop string that ended it.
    include_stop_string: bool,
    /// Ids that end a row as the end token does, and are left out of its text.
    stop_token_ids: Vec<u32>,

    /// Whether tokens are drawn.
    do_sample: bool,
    /// The number of beams; 1 is no beam search.
    num_beams: i64 as Int,
    /// Groups of a diverse beam search (<https://arxiv.org/abs/1610.02424>).
    num_beam_groups: i64 as Int,
    /// What a group pays for a token that an earlier group chose at the same step.
    diversity_penalty: f64,
    /// Exponent of the length that a beam's score is divided by.
    length_penalty: f64,
    /// Constraint objects of transformers; kept only to recognise the mode.
    constraints: Value,
    /// Phrases that a beam search has to produce: of each entry one alternative.
    force_words_ids: Vec<Vec<Vec<u32>>>,
    /// The same as strings, each tokenised with a leading space and without; of a list of strings one has to be produced.
    force_words: Vec<OneOrMany<String>>,
    /// The weight of the degeneration penalty of contrastive search (<https://arxiv.org/abs/2202.06417>).
    penalty_alpha: f64,
    /// The layers that DoLa contrasts with the last one (<https://arxiv.org/abs/2309.03883>).
    dola_layers: DolaLayers,
    /// Tokens of a draft that is looked up in the row itself.
    prompt_lookup_num_tokens: i64 as Int,
    /// The longest n-gram that prompt lookup matches.
    max_matching_ngram_size: i64 as Int,
    /// Whether heads for several tokens write the draft.
    use_mtp: bool,
    /// The layer whose logits write the draft.
    assistant_early_exit: i64 as Int,
    /// Whether this config is that of a model which writes drafts.
    is_assistant: bool,
    /// Tokens of a draft that `assistant_model` writes, at first; 20 unless set.
    num_assistant_tokens: i64 as Int,
    /// How the number of drafted tokens changes from step to step: `constant`, `heuristic` or `heuristic_transient`.
    num_assistant_tokens_schedule: String,
    /// A draft ends with a token less likely than this; 0.4 unless set, 0 is off. Adapts to what is kept.
    assistant_confidence_threshold: f64,
    /// Tokens of the draft model's text looked at where tokenizers differ.
    assistant_lookbehind: i64 as Int,
    /// Tokens of the model's text looked at where tokenizers differ.
    target_lookbehind: i64 as Int,
    /// The draft model's weight in a mixture of both models.
    assistant_ensemble_weight: f64,
    /// The kind of draft model.
    speculation_type: String,

    /// Divides the logits before a draw.
    temperature: f64,
    /// Draws among the `top_k` most likely tokens; 0 is off.
    top_k: i64 as Int,
    /// Draws among the most likely tokens that together reach this probability.
    top_p: f64,
    /// Draws among tokens at least this likely, relative to the most likely one.
    min_p: f64,
    /// Draws within this part of the entropy.
    top_h: f64,
    /// Draws among the tokens whose surprise is nearest to the entropy.
    typical_p: f64,
    /// Drops tokens below this probability.
    epsilon_cutoff: f64,
    /// Drops tokens below a probability that depends on the entropy.
    eta_cutoff: f64,
    /// Draws among scores within so many standard deviations of the best.
    top_n_sigma: f64,
    /// How often XTC leaves out the most likely tokens; 0 is off.
    xtc_probability: f64,
    /// The probability from which XTC counts a token as likely; 0.1 unless set.
    xtc_threshold: f64,
    /// Mirostat's surprise, in bits: replaces all other ways to shape a draw but `temperature`.
    mirostat_tau: f64,
    /// How fast mirostat adapts; 0.1 unless set.
    mirostat_eta: f64,
    /// The seed of the first row; the other rows' are derived from it.
    seed: u64 as Seed,
    /// One seed for each row of the call, or with beams for each prompt. Wins over `seed`.
    seeds: Vec<u64>,

    /// What seen tokens pay; 1 is off.
    repetition_penalty: f64,
    /// Which tokens count as seen.
    penalty_scope: PenaltyScope,
    /// Ids that never pay.
    penalty_exempt_ids: Vec<u32>,
    /// What a generated token pays for each time it was generated; 0 is off.
    frequency_penalty: f64,
    /// What a generated token pays once; 0 is off.
    presence_penalty: f64,
    /// What a token pays that continues a repetition; 0 is off.
    dry_multiplier: f64,
    /// The factor for each further token of the repetition; 1.75 unless set.
    dry_base: f64,
    /// The length up to which repetitions are free; 2 unless set.
    dry_allowed_length: i64 as Int,
    /// Strings that no repetition reaches across: line ends, colons, quotes and asterisks unless set.
    dry_sequence_breakers: Vec<String>,
    /// What tokens of the source gain; 1 is off.
    encoder_repetition_penalty: f64,
    /// No n-gram of this size twice; 0 is off.
    no_repeat_ngram_size: i64 as Int,
    /// No n-gram of this size from the source; 0 is off.
    encoder_no_repeat_ngram_size: i64 as Int,
    /// Token sequences that must not appear.
    bad_words_ids: Vec<Vec<u32>>,
    /// Strings that must not appear, tokenised with a leading space and without.
    bad_words: OneOrMany<String>,
    /// Added to the score of the last id of each sequence, after its other ids.
    sequence_bias: Vec<(Vec<u32>, f64)>,
    /// Added to the scores of these ids.
    logit_bias: BTreeMap<u32, f64>,
    /// Words to steer towards.
    keyword_boost: Boost,
    /// Ids never chosen.
    suppress_tokens: Vec<u32>,
    /// Ids not chosen first.
    begin_suppress_tokens: Vec<u32>,
    /// The first id after a single one, as multilingual encoder-decoder models need.
    forced_bos_token_id: i64 as Int,
    /// The last id of a row that reaches its largest length.
    forced_eos_token_id: OneOrMany<i64>,
    /// After so many generated tokens, the factor by which the end becomes more likely with each token.
    exponential_decay_length_penalty: (i64, f64),
    /// Whether scores that are not finite are replaced.
    remove_invalid_values: bool,
    /// Whether processed scores are made log-probabilities.
    renormalize_logits: bool,
    /// The weight of classifier-free guidance; 1 is off.
    guidance_scale: f64,
    /// Whether the prompt's last token may be extended.
    token_healing: bool,
    /// The watermark's parameters: a [`WatermarkingConfig`](crate::logits::WatermarkingConfig).
    watermarking_config: Watermarking,

    /// Rows per prompt.
    num_return_sequences: i64 as Int,
    /// Log-probabilities of the chosen tokens, with this many alternatives.
    log_probs: i64 as Int,
    /// Whether `log_probs` are those of the processed scores, not of the model's own.
    processed_log_probs: bool,
    /// Whether results carry the processed scores of every step.
    output_scores: bool,
    /// Whether results carry the raw logits of every step.
    output_logits: bool,
    /// Whether results carry attentions.
    output_attentions: bool,
    /// Whether results carry hidden states.
    output_hidden_states: bool,
    /// Without effect: results always are structs.
    return_dict_in_generate: bool,

    /// Without effect: nothing is padded.
    pad_token_id: i64 as Int,
    /// The prompt where there is none.
    bos_token_id: i64 as Int,
    /// The ids that end a row; a negative one is no token.
    eos_token_id: OneOrMany<i64>,
    /// The first id of an encoder-decoder model's rows, or one for each prompt; `bos_token_id` unless set.
    decoder_start_token_id: OneOrMany<i64>,
    /// What an encoder-decoder model's rows go on with after it: one list of ids for all, or one for each prompt. They may begin with it.
    decoder_input_ids: Vec<Vec<u32>>,
    /// The language of prompts, by its code in the tokenizer's [`languages`](crate::Tokenizer::languages); unless set, the one that
    /// tokenizer_config.json names.
    src_lang: String,
    /// The language of results, by its code: what the decoder begins with, in place of the model's `forced_bos_token_id`, or for Marian
    /// the token before a prompt.
    tgt_lang: String,

    /// Whether keys and values are kept from step to step.
    use_cache: bool,
    /// How they are kept: `dynamic` grows with use, `static` takes its room at once.
    cache_implementation: String,
    /// Parameters of other caches.
    cache_config: Value,
    /// The positions that a static cache takes room for.
    max_cache_len: i64 as Int,
    /// Tokens of a prompt computed in one pass.
    prefill_chunk_size: i64 as Int,
    /// Without effect: about speed alone.
    compile_config: Value,
    /// Without effect: about speed alone.
    disable_compile: bool,
    /// Without effect: about speed alone.
    low_memory: bool,
    /// Without effect: about speed alone.
    continuous_batching_config: Value,
}

impl GenerationConfig {
    /// Nothing set: the model's own config decides everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a processor. It runs after the built-in ones that are not about sampling, or in place of the one whose name it has.
    #[must_use]
    pub fn logits_processor(mut self, processor: impl LogitsProcessor + 'static) -> Self {
        self.logits_processors.push(Arc::new(processor));
        self
    }

    /// Adds a reason to end a row.
    #[must_use]
    pub fn stopping_criteria(mut self, criteria: impl StoppingCriteria + 'static) -> Self {
        self.stopping_criteria.push(Arc::new(criteria));
        self
    }

    /// Sets what guided rows are led away from, for every prompt of the call.
    #[must_use]
    pub fn negative_prompt(self, prompt: impl Into<Prompt>) -> Self {
        self.negative_prompts([prompt])
    }

    /// Sets what guided rows are led away from, one for each prompt of the call.
    #[must_use]
    pub fn negative_prompts<P: Into<Prompt>>(mut self, prompts: impl IntoIterator<Item = P>) -> Self {
        self.negative_prompts = prompts.into_iter().map(Into::into).collect();
        self
    }

    /// Ends calls with this config when the token says so.
    #[must_use]
    pub fn cancel(mut self, token: CancelToken) -> Self {
        self.cancel = Some(token);
        self
    }

    /// Drafts are written by a smaller model of the same vocabulary, usually `&` its generator, and checked several at a time: the
    /// outcome is the model's own, only faster.
    #[must_use]
    pub fn assistant_model(mut self, assistant: impl Into<Assistant>) -> Self {
        self.assistant_model = Some(assistant.into());
        self
    }

    /// Sets the function from the prompt's index and the row's ids to the ids that may follow.
    #[must_use]
    pub fn prefix_allowed_tokens_fn(mut self, function: impl Fn(usize, &[u32]) -> Vec<u32> + Send + Sync + 'static) -> Self {
        self.prefix_allowed_tokens_fn = Some(Arc::new(function));
        self
    }

    /// Whether code of the user's runs within a step.
    pub(crate) fn runs_code(&self) -> bool {
        !(self.logits_processors.is_empty() && self.stopping_criteria.is_empty() && self.prefix_allowed_tokens_fn.is_none())
    }
}

impl fmt::Debug for GenerationConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        map.entries(self.to_json().as_object().into_iter().flatten());
        if !self.logits_processors.is_empty() {
            map.entry(&"logits_processors", &self.logits_processors);
        }
        if !self.stopping_criteria.is_empty() {
            map.entry(&"stopping_criteria", &self.stopping_criteria);
        }
        if let Some(assistant) = &self.assistant_model {
            map.entry(&"assistant_model", &assistant.model);
        }
        if !self.negative_prompts.is_empty() {
            map.entry(&"negative_prompts", &self.negative_prompts);
        }
        if self.prefix_allowed_tokens_fn.is_some() {
            map.entry(&"prefix_allowed_tokens_fn", &"..");
        }
        map.finish()
    }
}
