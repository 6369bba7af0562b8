//! Looks at every value that the mode uses, and remembers all that is wrong.

use super::{Beams, Capacity, Length, Merged, Origin, Record, Seeds};
use crate::{
    config::{EarlyStopping, GenerationConfig, OneOrMany, Strategy},
    error::{Error, Problem, Result},
    model::ModelInfo,
    text::{StopStrings, Tokenizer},
};
use serde_json::json;
use std::{collections::HashSet, fmt::Display, time::Duration};

/// The modes that this version offers.
fn built(strategy: &Strategy) -> bool {
    match strategy {
        Strategy::Greedy
        | Strategy::Sample
        | Strategy::Beam { .. }
        | Strategy::BeamSample { .. }
        | Strategy::DiverseBeam { .. }
        | Strategy::ConstrainedBeam { .. } => true,
        Strategy::Contrastive { .. } | Strategy::Dola { .. } | Strategy::PromptLookup { .. } | Strategy::Assisted { .. } => false,
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

    /// The mode, and what no mode offers yet.
    pub fn mode(&mut self) {
        let config = self.config;
        if let Some(strategy) = &self.merged.contradicted {
            let reason = format!("the flags set beside it mean {}; accepted is one of the two", json!(self.strategy));
            self.refuse("strategy", json!(strategy), reason);
        }
        if !built(self.strategy) {
            self.unsupported.push(format!("the mode {} is not built yet", self.strategy.name()));
        }
        self.whole("num_beams", config.num_beams, 1);
        self.number("assistant_ensemble_weight", config.assistant_ensemble_weight, "a number above 0 and below 1", |x| x > 0.0 && x < 1.0);
        let asked = [
            ("guidance_scale", config.guidance_scale.is_some_and(|scale| scale != 1.0)),
            ("token_healing", config.token_healing == Some(true)),
            ("watermarking_config", config.watermarking_config.is_some()),
            ("is_assistant", config.is_assistant == Some(true)),
            ("use_mtp", config.use_mtp == Some(true)),
            ("output_attentions", config.output_attentions == Some(true)),
            ("output_hidden_states", config.output_hidden_states == Some(true)),
        ];
        self.unsupported.extend(asked.into_iter().filter(|(_, asked)| *asked).map(|(field, _)| format!("{field} is not built yet")));
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
