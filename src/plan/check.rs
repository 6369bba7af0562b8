//! Looks at every value that the mode uses, and remembers all that is wrong.

use super::{Beams, Capacity, Draft, Length, Merged, Origin, Record, Seeds};
use crate::{
    config::{Assistant, Drafts, EarlyStopping, GenerationConfig, OneOrMany, Strategy},
    error::{Error, Problem, Result},
    logits::{Breakers, Draw},
    model::ModelInfo,
    text::{StopStrings, Tokenizer},
};
use serde_json::json;
use std::{collections::HashSet, fmt::Display, sync::Arc, time::Duration};

/// What ends repetitions unless the config says otherwise.
const DRY_BREAKERS: [&str; 4] = ["\n", ":", "\"", "*"];

/// The modes that this version offers.
fn built(strategy: &Strategy) -> bool {
    match strategy {
        Strategy::Greedy
        | Strategy::Sample
        | Strategy::Beam { .. }
        | Strategy::BeamSample { .. }
        | Strategy::DiverseBeam { .. }
        | Strategy::ConstrainedBeam { .. }
        | Strategy::Contrastive { .. }
        | Strategy::Dola { .. }
        | Strategy::PromptLookup { .. }
        | Strategy::Assisted { drafts: Drafts::Assistant, .. } => true,
        Strategy::Assisted { .. } => false,
    }
}

/// The merged config beside the model and the tokenizer. Values asked for are checked on the way; what is wrong is remembered until
/// [`Check::finish`].
pub(super) struct Check<'a> {
    pub config: &'a GenerationConfig,
    pub strategy: &'a Strategy,
    merged: &'a Merged,
    info: &'a ModelInfo,
    tokenizer: Option<&'a Tokenizer>,
    problems: Vec<Problem>,
    unsupported: Vec<String>,
}

impl<'a> Check<'a> {
    pub fn new(merged: &'a Merged, info: &'a ModelInfo, tokenizer: Option<&'a Tokenizer>) -> Self {
        Self { config: &merged.config, strategy: &merged.strategy, merged, info, tokenizer, problems: Vec::new(), unsupported: Vec::new() }
    }

    /// All that was wrong, as one error.
    pub fn finish(self) -> Result<()> {
        if !self.problems.is_empty() {
            Err(Error::Config(self.problems))
        } else if !self.unsupported.is_empty() {
            Err(Error::Unsupported(self.unsupported.join("; ")))
        } else {
            Ok(())
        }
    }

    pub fn refuse(&mut self, field: &str, value: impl Display, reason: impl Into<String>) {
        self.problems.push(Problem { field: field.to_owned(), value: value.to_string(), reason: reason.into() });
    }

    /// What is known, but not offered.
    pub fn lacks(&mut self, what: impl Into<String>) {
        self.unsupported.push(what.into());
    }

    /// An integer of at least `least`.
    pub fn whole(&mut self, field: &str, value: Option<i64>, least: usize) -> Option<usize> {
        let value = value?;
        let whole = usize::try_from(value).ok().filter(|&whole| whole >= least);
        if whole.is_none() {
            self.refuse(field, value, format!("accepted is an integer from {least} up"));
        }
        whole
    }

    /// A number in the range that `fits` tells and `accepted` describes.
    pub fn number(&mut self, field: &str, value: Option<f64>, accepted: &str, fits: impl Fn(f32) -> bool) -> Option<f32> {
        let value = value?;
        let fits = fits(value as f32);
        if !fits {
            self.refuse(field, value, format!("accepted is {accepted}"));
        }
        fits.then_some(value as f32)
    }

    /// Token ids inside the vocabulary.
    // HF: an id outside of it is an error of some fields there, and silently does nothing in others; here it is an error of all.
    pub fn ids(&mut self, field: &str, ids: impl IntoIterator<Item = i64>) -> Vec<u32> {
        let size = self.info.vocab_size;
        let known = |id: i64| u32::try_from(id).ok().filter(|&id| (id as usize) < size);
        let (mut kept, mut strange) = (Vec::new(), Vec::new());
        for id in ids {
            match known(id) {
                Some(id) => kept.push(id),
                None => strange.push(id),
            }
        }
        if !strange.is_empty() {
            strange.truncate(8);
            self.refuse(field, json!(strange), format!("accepted are token ids below {size}, the size of the vocabulary"));
        }
        kept
    }

    /// The tokenisations of each word, with a leading space and without.
    pub fn words(&mut self, field: &str, words: &[String]) -> Vec<Vec<Vec<u32>>> {
        let Some(tokenizer) = self.tokenizer else {
            self.refuse(field, json!(words), "strings need a tokenizer, and the generator has none");
            return Vec::new();
        };
        let mut tokenised = Vec::new();
        for word in words {
            match tokenizer.variants(word) {
                Ok(variants) if !word.is_empty() && !variants.is_empty() => {
                    self.ids(field, variants.iter().flatten().map(|&id| id.into()));
                    tokenised.push(variants);
                }
                Ok(_) => self.refuse(field, json!(word), "accepted are words that encode to at least one token"),
                Err(error) => self.refuse(field, json!(word), error.to_string()),
            }
        }
        tokenised
    }

    /// What repetitions do not reach across.
    pub fn breakers(&mut self) -> Breakers {
        let field = "dry_sequence_breakers";
        let set = self.config.dry_sequence_breakers.as_deref();
        let strings = set.map_or_else(|| DRY_BREAKERS.map(String::from).to_vec(), <[String]>::to_vec);
        let Some(tokenizer) = self.tokenizer else {
            if set.is_some_and(|set| !set.is_empty()) {
                self.refuse(field, json!(set), "strings need a tokenizer, and the generator has none");
            }
            return Breakers::default();
        };
        if strings.iter().any(String::is_empty) {
            self.refuse(field, json!(set), "accepted are strings that are not empty");
            return Breakers::default();
        }
        let breaks = |text: &str| strings.iter().any(|breaker| text.contains(breaker.as_str()));
        let tokens = tokenizer.texts().iter().filter(|(_, text)| breaks(text)).map(|&(id, _)| id).collect();
        let several = strings.iter().flat_map(|breaker| tokenizer.variants(breaker).unwrap_or_default());
        Breakers { tokens: Arc::new(tokens), sequences: several.filter(|sequence| sequence.len() > 1).collect() }
    }

    /// How a token is drawn.
    pub fn draw(&mut self) -> Draw {
        let config = self.config;
        let part = |x: f32| (0.0..=1.0).contains(&x);
        let probability = self.number("xtc_probability", config.xtc_probability, "a number from 0 to 1", part);
        let threshold = self.number("xtc_threshold", config.xtc_threshold.or(Some(0.1)), "a number from 0 to 1", part);
        let positive = |x: f32| x > 0.0 && x.is_finite();
        let tau = self.number("mirostat_tau", config.mirostat_tau, "a number of bits above 0", positive);
        let eta = self.number("mirostat_eta", config.mirostat_eta.or(Some(0.1)), "a number above 0", positive);
        let draw = match (tau, eta, probability, threshold) {
            (Some(tau), Some(eta), ..) => Draw::Mirostat { tau, eta },
            (None, _, Some(probability), Some(threshold)) if probability > 0.0 => Draw::Xtc { probability, threshold },
            _ => Draw::Plain,
        };
        let field = match draw {
            Draw::Plain => return draw,
            Draw::Xtc { .. } => "xtc_probability",
            Draw::Mirostat { .. } => "mirostat_tau",
        };
        match self.strategy {
            Strategy::Sample => draw,
            other if other.samples() => {
                let reason = format!("accepted with the mode sample, where a row draws one token a step; this is {}", other.name());
                self.refuse(field, self.config.entries().get(field).cloned().unwrap_or_default(), reason);
                Draw::Plain
            }
            _ => Draw::Plain,
        }
    }

    /// Whether mirostat stands in place of the processors of a draw.
    pub fn draws_by_surprise(&self) -> bool {
        self.config.mirostat_tau.is_some()
    }

    /// The mode, and what no mode offers yet.
    pub fn mode(&mut self) {
        let config = self.config;
        if let Some(strategy) = &self.merged.contradicted {
            let reason = match strategy {
                Strategy::Assisted { drafts: Drafts::Assistant, .. } if config.assistant_model.is_none() => {
                    "it needs an assistant_model, and none is set".into()
                }
                _ => format!("the flags set beside it mean {}; accepted is one of the two", json!(self.strategy)),
            };
            self.refuse("strategy", json!(strategy), reason);
        }
        if !built(self.strategy) {
            self.unsupported.push(format!("the mode {} is not built yet", self.strategy.name()));
        }
        self.own_fields();
        self.whole("num_beams", config.num_beams, 1);
        self.number("assistant_ensemble_weight", config.assistant_ensemble_weight, "a number above 0 and below 1", |x| x > 0.0 && x < 1.0);
        let assisted = matches!(self.strategy, Strategy::Assisted { .. });
        let asked = [
            ("token_healing of an encoder-decoder model", config.token_healing == Some(true) && self.info.is_encoder_decoder),
            ("is_assistant", config.is_assistant == Some(true)),
            ("use_mtp", config.use_mtp == Some(true)),
            ("speculation_type", assisted && config.speculation_type.is_some()),
            ("assistant_ensemble_weight", assisted && config.assistant_ensemble_weight.is_some()),
            ("output_attentions", config.output_attentions == Some(true)),
            ("output_hidden_states", config.output_hidden_states == Some(true)),
        ];
        self.unsupported.extend(asked.into_iter().filter(|(_, asked)| *asked).map(|(field, _)| format!("{field} is not built yet")));
    }

    /// Where drafts come from.
    pub fn draft(&mut self) -> Option<Draft> {
        let config = self.config;
        let draft = match self.strategy {
            Strategy::PromptLookup { .. } => {
                let num_tokens = self.whole("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens, 1).unwrap_or(1);
                // HF: 0 means 2 there, too.
                let size = config.max_matching_ngram_size.unwrap_or(2);
                Draft::Lookup { num_tokens, ngram: self.whole("max_matching_ngram_size", Some(size), 1).unwrap_or(2) }
            }
            Strategy::Assisted { drafts: Drafts::Assistant, .. } => {
                let assistant = config.assistant_model.clone()?;
                self.assistant(&assistant);
                // HF: these three come from the assistant's own generation_config.json there; a call has one config here.
                let num_tokens = self.whole("num_assistant_tokens", config.num_assistant_tokens, 1).unwrap_or(1);
                let threshold = config.assistant_confidence_threshold;
                let within = |x: f32| (0.0..=1.0).contains(&x);
                let threshold = self.number("assistant_confidence_threshold", threshold, "a number from 0 to 1", within).unwrap_or(0.0);
                let adaptive = match config.num_assistant_tokens_schedule.as_deref() {
                    None | Some("constant") => false,
                    // HF: "heuristic" goes on with the last length in the next call; here no call depends on an earlier one.
                    Some("heuristic" | "heuristic_transient") => true,
                    Some(name) => {
                        self.refuse(
                            "num_assistant_tokens_schedule",
                            json!(name),
                            "accepted are constant, heuristic and heuristic_transient",
                        );
                        false
                    }
                };
                Draft::Model { assistant, num_tokens, adaptive, threshold }
            }
            _ => return None,
        };
        if config.use_cache == Some(false) {
            self.refuse("use_cache", false, "drafts are checked on top of the cache; accepted is true");
        }
        Some(draft)
    }

    /// The ids of both models have to mean the same. Tokenizers tell; without both of them only the number of logits does, which
    /// tables padded to different sizes have different.
    fn assistant(&mut self, assistant: &Assistant) {
        let (own, other) = (self.info, assistant.model.info());
        let reason = match (self.tokenizer, &assistant.tokenizer) {
            _ if other.is_encoder_decoder && !own.is_encoder_decoder => {
                "it has an encoder, which this model has not; accepted is a decoder-only model".to_owned()
            }
            // HF: such a model reads the encoder's states there, if its class can; otherwise it writes without the source.
            _ if own.is_encoder_decoder && !other.is_encoder_decoder => {
                "it has no encoder to read the source; accepted is an encoder-decoder model".to_owned()
            }
            _ if other.vocab_size == 0 => "it has no logits; accepted is a model with a vocabulary".to_owned(),
            (Some(own), Some(other)) if own.same_vocabulary(other) => return,
            (Some(_), Some(_)) => "its tokenizer has another vocabulary; accepted is a model with the same".to_owned(),
            _ if own.vocab_size == other.vocab_size => return,
            _ => format!(
                "it has {} logits, this model {}; accepted are as many, or a generator whose tokenizer shows that the vocabulary is the same",
                other.vocab_size, own.vocab_size
            ),
        };
        self.refuse("assistant_model", &other.name, reason);
    }

    /// What the strategy's own fields may be.
    fn own_fields(&mut self) {
        match self.strategy {
            Strategy::Contrastive { penalty_alpha, top_k } => {
                self.number("penalty_alpha", Some(*penalty_alpha), "a finite number above 0", f32::is_finite);
                if *top_k > self.info.vocab_size {
                    let size = self.info.vocab_size;
                    self.refuse("top_k", top_k, format!("contrastive search has as many candidates; the vocabulary has {size} ids"));
                }
                // HF: an error there too: every candidate is computed beside the others on a cache that they share.
                if self.config.use_cache == Some(false) {
                    self.refuse("use_cache", false, "contrastive search needs the cache; accepted is true");
                }
            }
            // HF: an error there too.
            Strategy::Dola { .. } if self.info.is_encoder_decoder => {
                self.unsupported.push("dola_layers with encoder-decoder models; accepted with decoder-only models".into());
            }
            Strategy::Dola { .. } if self.info.layers == 0 => {
                self.unsupported.push(format!("dola_layers: {} tells no layers", self.info.name));
            }
            // HF: ends in an error about an empty list of tensors there.
            Strategy::Dola { dola_layers, .. } if dola_layers.resolve(self.info.layers, self.info.tied).is_empty() => {
                let last = self.info.layers - 1;
                self.refuse(
                    "dola_layers",
                    json!(dola_layers),
                    format!("no layer is left; accepted is a list with layers from 0 to {last}"),
                );
            }
            _ => {}
        }
    }

    /// The weight of classifier-free guidance where there is any.
    pub fn guidance(&mut self) -> Option<f32> {
        let config = self.config;
        if config.guidance_scale.is_none() && !config.negative_prompts.is_empty() {
            self.refuse("negative_prompts", config.negative_prompts.len(), "they do nothing without guidance_scale; accepted is one of it");
        }
        let scale =
            self.number("guidance_scale", config.guidance_scale, "a finite number", f32::is_finite).filter(|&scale| scale != 1.0)?;
        let single = matches!(self.strategy, Strategy::Greedy | Strategy::Sample) || self.strategy.num_beams() > 1;
        if !single || self.info.is_encoder_decoder {
            let what = if single { "encoder-decoder models" } else { self.strategy.name() };
            self.unsupported
                .push(format!("guidance_scale with {what}; accepted with greedy search, sampling and beams of decoder-only models"));
        }
        Some(scale)
    }

    /// The ids that end a row.
    // HF: a negative end token is a warning there, and the way to have none where the model's file has one; ids that the model cannot
    // produce do nothing.
    pub fn eos(&self) -> Vec<u32> {
        let mut seen = HashSet::new();
        let ids = self.config.eos_token_id.as_ref().map_or(&[][..], OneOrMany::as_slice);
        let known = ids.iter().filter_map(|&id| u32::try_from(id).ok());
        known.filter(|&id| (id as usize) < self.info.vocab_size && seen.insert(id)).collect()
    }

    pub fn length(&mut self) -> Length {
        if let Some(value) = self.config.max_new_tokens {
            // HF: wins over max_length even where max_length is the call's and this the model's.
            Length::New(self.whole("max_new_tokens", Some(value), 1).unwrap_or(1))
        } else if self.merged.origin("max_length") == Origin::Default {
            Length::Unset { context: self.info.context.positions() }
        } else {
            Length::Total(self.whole("max_length", self.config.max_length, 1).unwrap_or(1))
        }
    }

    pub fn stop_token_ids(&mut self) -> Vec<u32> {
        self.ids("stop_token_ids", self.config.stop_token_ids.iter().flatten().map(|&id| id.into()))
    }

    pub fn stops(&mut self) -> StopStrings {
        let strings = self.config.stop_strings.as_ref().map_or(&[][..], OneOrMany::as_slice);
        if self.tokenizer.is_none() && !strings.is_empty() {
            self.refuse("stop_strings", json!(strings), "strings need a tokenizer, and the generator has none");
        }
        if strings.iter().any(String::is_empty) {
            self.refuse("stop_strings", json!(strings), "accepted are strings that are not empty");
        }
        let filled = strings.iter().filter(|text| !text.is_empty());
        StopStrings::new(filled, self.config.include_stop_string == Some(true)).unwrap_or_default()
    }

    // HF: 0 ends rows with their first token there, and here too; a negative time does the same there.
    pub fn max_time(&mut self) -> Option<Duration> {
        let value = self.config.max_time?;
        let time = Duration::try_from_secs_f64(value).ok();
        if time.is_none() {
            self.refuse("max_time", value, "accepted is a number of seconds from 0 up");
        }
        time
    }

    pub fn num_return_sequences(&mut self) -> usize {
        let rows = self.whole("num_return_sequences", self.config.num_return_sequences, 1).unwrap_or(1);
        let beams = self.strategy.num_beams();
        if rows > 1 && beams == 1 && !self.strategy.samples() {
            let reason =
                format!("{} gives one sequence; accepted is 1, or any number with do_sample or that many num_beams", self.strategy.name());
            self.refuse("num_return_sequences", rows, reason);
        } else if beams > 1 && rows > beams {
            self.refuse("num_return_sequences", rows, format!("accepted is at most num_beams, which is {beams}"));
        }
        rows
    }

    pub fn beams(&mut self, eos: &[u32]) -> Beams {
        let config = self.config;
        let (mut length_penalty, mut pad) = (1.0, None);
        if self.strategy.num_beams() > 1 {
            self.number("length_penalty", config.length_penalty, "a finite number", f32::is_finite);
            length_penalty = config.length_penalty.unwrap_or(1.0);
        }
        if let Strategy::DiverseBeam { num_beams, num_beam_groups, diversity_penalty } = *self.strategy {
            if num_beams % num_beam_groups.max(1) != 0 {
                self.refuse("num_beam_groups", num_beam_groups, format!("accepted is a divisor of num_beams, which is {num_beams}"));
            }
            let accepted = "a number above 0, or all groups would be the same";
            self.number("diversity_penalty", Some(diversity_penalty), accepted, |x| x > 0.0 && x.is_finite());
            if config.do_sample == Some(true) {
                self.refuse("do_sample", true, "groups of beams do not draw; accepted is false, or num_beam_groups = 1");
            }
            let known = config.pad_token_id.and_then(|id| u32::try_from(id).ok());
            pad = known.filter(|&id| (id as usize) < self.info.vocab_size).or(eos.first().copied());
        }
        Beams { length_penalty, early_stopping: config.early_stopping.unwrap_or(EarlyStopping::When(false)), pad }
    }

    /// Without a seed a fresh one, so that results can tell it.
    pub fn seeds(&mut self) -> Seeds {
        match &self.config.seeds {
            Some(seeds) if seeds.is_empty() => {
                self.refuse("seeds", "[]", "accepted is one seed for each row of the call");
                Seeds::One(0)
            }
            Some(seeds) => Seeds::Each(seeds.clone()),
            None => Seeds::One(self.config.seed.unwrap_or_else(rand::random)),
        }
    }

    pub fn record(&mut self) -> Record {
        let config = self.config;
        Record {
            log_probs: self.whole("log_probs", config.log_probs, 0).map(|count| count.min(self.info.vocab_size)),
            processed_log_probs: config.processed_log_probs == Some(true),
            scores: config.output_scores == Some(true),
            logits: config.output_logits == Some(true),
            trace: false,
        }
    }

    pub fn capacity(&mut self) -> Capacity {
        let config = self.config;
        let len = self.whole("max_cache_len", config.max_cache_len, 1);
        let fixed = match config.cache_implementation.as_deref() {
            None => len.is_some(),
            Some("static") => true,
            // HF: all static there, the sliding ones deprecated and "hybrid" ignored; sliding layers are found from the model.
            Some("dynamic" | "hybrid" | "hybrid_chunked" | "sliding_window") => false,
            Some(name @ ("offloaded" | "offloaded_static" | "offloaded_hybrid" | "offloaded_hybrid_chunked" | "quantized" | "paged")) => {
                self.unsupported.push(format!("cache_implementation {name} is not built yet; dynamic and static are"));
                false
            }
            Some(name) => {
                self.refuse("cache_implementation", json!(name), "accepted are dynamic, static, hybrid, hybrid_chunked and sliding_window");
                false
            }
        };
        match len {
            _ if !fixed || config.use_cache == Some(false) => Capacity::Grow,
            // HF: grows with the call there; here a length that was asked for is kept to, and what does not fit is refused.
            Some(len) => Capacity::Fixed(len),
            None => Capacity::Row,
        }
    }

    pub fn prefill_chunk_size(&mut self) -> Option<usize> {
        let size = self.whole("prefill_chunk_size", self.config.prefill_chunk_size, 1);
        if let (Some(size), Some(false)) = (size, self.config.use_cache) {
            self.refuse("prefill_chunk_size", size, "chunks need the cache; accepted with use_cache = true");
        }
        size
    }

    pub fn token_healing(&mut self) -> bool {
        let heals = self.config.token_healing == Some(true);
        if heals && self.tokenizer.is_none() {
            self.refuse("token_healing", true, "it needs a tokenizer, and the generator has none");
        }
        heals
    }

    pub fn decoder_input_ids(&mut self) -> Vec<Vec<u32>> {
        let (field, prompts) = ("decoder_input_ids", self.config.decoder_input_ids.clone().unwrap_or_default());
        if self.config.decoder_input_ids.is_some() && !self.info.is_encoder_decoder {
            self.refuse(field, json!(prompts), "for encoder-decoder models; a decoder-only model continues its prompt");
        } else if self.config.decoder_input_ids.is_some() && (prompts.is_empty() || prompts.iter().any(Vec::is_empty)) {
            self.refuse(field, json!(prompts), "accepted is a list of ids, or one for each prompt, none of them empty");
        }
        self.ids(field, prompts.iter().flatten().map(|&id| id.into()));
        prompts
    }

    pub fn decoder_start(&mut self) -> Vec<u32> {
        let config = self.config;
        if !self.info.is_encoder_decoder {
            return Vec::new();
        }
        match (&config.decoder_start_token_id, config.bos_token_id) {
            (Some(ids), _) if ids.as_slice().is_empty() => {
                self.refuse("decoder_start_token_id", "[]", "accepted is a token id, or one for each prompt");
                Vec::new()
            }
            (Some(ids), _) => self.ids("decoder_start_token_id", ids.as_slice().iter().copied()),
            (None, Some(bos)) => self.ids("bos_token_id", [bos]),
            (None, None) => {
                self.refuse("decoder_start_token_id", "null", "an encoder-decoder model needs it, or bos_token_id");
                Vec::new()
            }
        }
    }
}
