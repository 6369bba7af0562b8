//! Hugging Face's generation_config.json: read, written, and its flat flags turned into a [`Strategy`] and back.

use super::{Drafts, EarlyStopping, GenerationConfig, Strategy};
use crate::error::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::{Map, Value};
use std::{fs, path::Path};

const FILE: &str = "generation_config.json";

/// Fields that transformers does not have. In a config.json such a key means something else.
const OURS: [&str; 13] = [
    "decoder_input_ids",
    "strategy",
    "include_stop_string",
    "stop_token_ids",
    "seed",
    "seeds",
    "penalty_scope",
    "penalty_exempt_ids",
    "bad_words",
    "force_words",
    "keyword_boost",
    "log_probs",
    "processed_log_probs",
];

impl GenerationConfig {
    /// Reads a JSON object with Hugging Face's names. Null is unset, unknown keys are kept, and all values of a wrong type
    /// are reported at once. Ranges are looked at when a plan is made, since some fields matter in some modes only.
    pub fn from_json(value: &Value) -> Result<Self> {
        let Value::Object(object) = value else {
            return Err(Error::config("generation_config", value, "accepted is an object of fields"));
        };
        let (mut config, mut problems) = (Self::default(), Vec::new());
        for (key, value) in object {
            if !config.read(key, value, &mut problems) {
                config.unknown.insert(key.clone(), value.clone());
            }
        }
        if problems.is_empty() { Ok(config) } else { Err(Error::Config(problems)) }
    }

    /// Reads the config of a checkpoint's folder: generation_config.json, or without one what config.json says about generation.
    pub fn from_pretrained(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        if !folder.is_dir() {
            return Err(Error::load(folder, "not a folder; accepted is a folder with a generation_config.json or a config.json"));
        }
        // HF: a generation_config.json that does not parse is passed over there; here it is an error.
        let (path, is_model) = (folder.join(FILE), folder.join("config.json"));
        let (path, lift) = if path.exists() { (path, false) } else { (is_model, true) };
        let text = fs::read_to_string(&path).map_err(|error| Error::load(&path, error))?;
        let json = serde_json::from_str(&text).map_err(|error| Error::load(&path, error))?;
        let config = if lift { Self::from_model_config(&json) } else { Self::from_json(&json) };
        config.map_err(|error| Error::load(&path, error))
    }

    /// Lifts the generation fields out of a config.json, as old BART checkpoints need. `task_specific_params` is not applied.
    fn from_model_config(model: &Value) -> Result<Self> {
        let lift = |value: &Value| {
            let mut value = value.clone();
            if let Value::Object(object) = &mut value {
                object.retain(|key, _| !OURS.contains(&key.as_str()));
            }
            Self::from_json(&value)
        };
        let mut model = model.clone();
        if let Some(object) = model.as_object_mut() {
            for (key, id) in assumed(object.get("model_type").and_then(Value::as_str).unwrap_or_default()) {
                object.entry(*key).or_insert_with(|| (*id).into());
            }
        }
        let model = &model;
        let mut config = lift(model)?;
        // HF: only the first of these that is there counts, and only for fields that the outer level leaves unset.
        let filled = |value: &&Value| value.as_object().is_some_and(|object| !object.is_empty());
        let nested = ["decoder", "generator", "text_config"].iter().find_map(|name| model.get(name).filter(filled));
        // HF: the flag that old BART checkpoints have for it.
        if config.unknown.get("force_bos_token_to_be_generated") == Some(&Value::Bool(true)) {
            config.forced_bos_token_id = config.bos_token_id;
        }
        if let Some(nested) = nested {
            config = config.or(&lift(nested)?);
        }
        config.unknown.clear();
        Ok(config)
    }

    /// The fields that are set and the unknown keys, as a JSON object. A typed strategy is written as Hugging Face's flags too.
    pub fn to_json(&self) -> Value {
        let mut object = self.clone().flat().entries();
        if let Some(strategy) = &self.strategy {
            object.insert("strategy".into(), serde_json::json!(strategy));
        }
        object.extend(self.unknown.clone());
        Value::Object(object)
    }

    /// Writes generation_config.json into `folder`, which is created if need be.
    // HF: refuses to save what it would warn about, such as a temperature beside do_sample = false; here every config can be saved.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let mut json = self.to_json();
        json.sort_all_objects();
        let path = folder.join(FILE);
        fs::create_dir_all(folder).map_err(|error| Error::load(folder, error))?;
        fs::write(&path, format!("{json:#}\n")).map_err(|error| Error::load(&path, error))
    }

    /// What transformers assumes for fields that neither the call nor the model's file sets.
    pub(crate) fn defaults() -> Self {
        Self {
            max_length: Some(20),
            min_length: Some(0),
            early_stopping: Some(EarlyStopping::When(false)),
            do_sample: Some(false),
            num_beams: Some(1),
            num_beam_groups: Some(1),
            diversity_penalty: Some(0.0),
            length_penalty: Some(1.0),
            temperature: Some(1.0),
            top_k: Some(50),
            top_p: Some(1.0),
            typical_p: Some(1.0),
            epsilon_cutoff: Some(0.0),
            eta_cutoff: Some(0.0),
            repetition_penalty: Some(1.0),
            encoder_repetition_penalty: Some(1.0),
            no_repeat_ngram_size: Some(0),
            encoder_no_repeat_ngram_size: Some(0),
            num_return_sequences: Some(1),
            num_assistant_tokens: Some(20),
            num_assistant_tokens_schedule: Some("constant".into()),
            assistant_confidence_threshold: Some(0.4),
            use_cache: Some(true),
            ..Self::default()
        }
    }

    /// This config with its typed strategy written as flags; flags set beside it stay.
    pub(crate) fn flat(mut self) -> Self {
        match self.strategy.take() {
            Some(strategy) => self.or(&strategy.flags()),
            None => self,
        }
    }

    /// This config without the flags that choose a mode.
    pub(crate) fn without_mode(self) -> Self {
        Self {
            strategy: None,
            do_sample: None,
            num_beams: None,
            num_beam_groups: None,
            diversity_penalty: None,
            constraints: None,
            force_words_ids: None,
            force_words: None,
            penalty_alpha: None,
            dola_layers: None,
            prompt_lookup_num_tokens: None,
            assistant_early_exit: None,
            use_mtp: None,
            assistant_model: None,
            ..self
        }
    }

    /// Only what makes greedy search or sampling one with drafts.
    pub(crate) fn drafts(&self) -> Self {
        Self {
            prompt_lookup_num_tokens: self.prompt_lookup_num_tokens,
            max_matching_ngram_size: self.max_matching_ngram_size,
            assistant_early_exit: self.assistant_early_exit,
            use_mtp: self.use_mtp,
            assistant_model: self.assistant_model.clone(),
            ..Self::default()
        }
    }
}

impl Strategy {
    /// The mode that the flags of a config with defaults choose.
    // HF: 5.23.0's rules; the modes it moved to remote code are chosen as 4.55.4 does.
    pub(crate) fn infer(config: &GenerationConfig) -> Self {
        let do_sample = config.do_sample == Some(true);
        let num_beams = count(config.num_beams, 1);
        let num_beam_groups = count(config.num_beam_groups, 1);
        let (penalty_alpha, top_k) = (config.penalty_alpha.unwrap_or(0.0), count(config.top_k, 0));
        if config.constraints.is_some() || config.force_words_ids.is_some() || config.force_words.is_some() {
            let (force_words_ids, force_words) = (config.force_words_ids.clone(), config.force_words.clone());
            return Self::ConstrainedBeam {
                num_beams,
                force_words_ids: force_words_ids.unwrap_or_default(),
                force_words: force_words.unwrap_or_default(),
            };
        }
        if num_beams != 1 {
            return if num_beam_groups > 1 {
                Self::DiverseBeam { num_beams, num_beam_groups, diversity_penalty: config.diversity_penalty.unwrap_or(0.0) }
            } else if do_sample {
                Self::BeamSample { num_beams }
            } else {
                Self::Beam { num_beams }
            };
        }
        if !do_sample && penalty_alpha > 0.0 && top_k > 1 {
            return Self::Contrastive { penalty_alpha, top_k };
        }
        // Drafts and DoLa extend greedy search and sampling only; beside other modes their flags do nothing.
        if let Some(layer) = config.assistant_early_exit {
            Self::Assisted { drafts: Drafts::EarlyExit(count(Some(layer), 0)), do_sample }
        } else if config.prompt_lookup_num_tokens.is_some() {
            let prompt_lookup_num_tokens = count(config.prompt_lookup_num_tokens, 0);
            Self::PromptLookup { prompt_lookup_num_tokens, max_matching_ngram_size: count(config.max_matching_ngram_size, 2), do_sample }
        } else if config.use_mtp == Some(true) {
            Self::Assisted { drafts: Drafts::Mtp, do_sample }
        } else if config.assistant_model.is_some() {
            Self::Assisted { drafts: Drafts::Assistant, do_sample }
        } else if let Some(dola_layers) = config.dola_layers.clone() {
            Self::Dola { dola_layers, do_sample }
        } else if do_sample {
            Self::Sample
        } else {
            Self::Greedy
        }
    }

    /// The flags that choose this mode. Flags of other modes are set to what turns them off, where there is such a value.
    pub(crate) fn flags(&self) -> GenerationConfig {
        let flags = GenerationConfig::new()
            .do_sample(self.samples())
            .num_beams(self.num_beams())
            .num_beam_groups(1)
            .diversity_penalty(0.0)
            .penalty_alpha(0.0);
        match self.clone() {
            Self::Greedy | Self::Sample | Self::Beam { .. } | Self::BeamSample { .. } => flags,
            Self::DiverseBeam { num_beam_groups, diversity_penalty, .. } => {
                flags.num_beam_groups(num_beam_groups).diversity_penalty(diversity_penalty)
            }
            Self::ConstrainedBeam { force_words_ids, force_words, .. } => GenerationConfig {
                force_words_ids: (force_words.is_empty() || !force_words_ids.is_empty()).then_some(force_words_ids),
                force_words: (!force_words.is_empty()).then_some(force_words),
                ..flags
            },
            Self::Contrastive { penalty_alpha, top_k } => flags.penalty_alpha(penalty_alpha).top_k(top_k),
            Self::Dola { dola_layers, .. } => flags.dola_layers(dola_layers),
            Self::PromptLookup { prompt_lookup_num_tokens, max_matching_ngram_size, .. } => {
                flags.prompt_lookup_num_tokens(prompt_lookup_num_tokens).max_matching_ngram_size(max_matching_ngram_size)
            }
            Self::Assisted { drafts: Drafts::Assistant, .. } => flags,
            Self::Assisted { drafts: Drafts::EarlyExit(layer), .. } => flags.assistant_early_exit(layer),
            Self::Assisted { drafts: Drafts::Mtp, .. } => flags.use_mtp(true),
        }
    }
}

/// The ids that a family's config class has where an encoder-decoder model's config.json leaves them out.
fn assumed(family: &str) -> &'static [(&'static str, i64)] {
    match family {
        "t5" => &[("pad_token_id", 0), ("eos_token_id", 1)],
        "mt5" | "umt5" => &[("pad_token_id", 0), ("eos_token_id", 1), ("decoder_start_token_id", 0)],
        "bart" => {
            &[("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2), ("decoder_start_token_id", 2), ("forced_eos_token_id", 2)]
        }
        "mbart" => &[("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2), ("forced_eos_token_id", 2)],
        "marian" => &[("pad_token_id", 58_100), ("eos_token_id", 0), ("decoder_start_token_id", 58_100), ("forced_eos_token_id", 0)],
        "pegasus" => &[("pad_token_id", 0), ("eos_token_id", 1), ("decoder_start_token_id", 0), ("forced_eos_token_id", 1)],
        "m2m_100" => &[("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2), ("decoder_start_token_id", 2)],
        _ => &[],
    }
}

impl Serialize for GenerationConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Value::Object(object) = self.to_json() else { return Err(ser::Error::custom("a config is an object")) };
        object.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for GenerationConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Map::deserialize(deserializer)?;
        Self::from_json(&Value::Object(object)).map_err(de::Error::custom)
    }
}

/// A flag as a count. What is negative is reported when the plan is made, not here.
fn count(flag: Option<i64>, default: usize) -> usize {
    flag.map_or(default, |value| usize::try_from(value).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::super::{Boost, DolaLayers, OneOrMany};
    use super::*;
    use crate::logits::PenaltyScope;
    use serde_json::json;

    fn config(json: Value) -> GenerationConfig {
        GenerationConfig::from_json(&json).unwrap()
    }

    fn mode(json: Value) -> Strategy {
        Strategy::infer(&config(json).or(&GenerationConfig::defaults()))
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn every_field_comes_back_as_it_was() {
        let json = json!({
            "strategy": {"mode": "greedy"}, "max_length": 20, "max_new_tokens": -1, "early_stopping": "never", "max_time": 0.5,
            "stop_strings": ["a", "b"], "stop_token_ids": [4], "include_stop_string": true, "do_sample": false, "num_beams": 1,
            "num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0, "temperature": 0.7, "top_k": 5,
            "sequence_bias": [[[5], 1.0], [[5, 6], -2.5]], "bad_words_ids": [[1], [2, 3]], "bad_words": "word",
            "keyword_boost": {"words": ["rain"], "bias": 2.0, "stop": 3}, "penalty_scope": {"last": 64},
            "exponential_decay_length_penalty": [15, 1.6], "eos_token_id": [2, 3], "pad_token_id": -1, "forced_eos_token_id": 2,
            "watermarking_config": {"ngram_len": 5, "keys": [654, -400], "sampling_table_size": 65536}, "compile_config": {"mode": "max-autotune"}, "seed": u64::MAX,
            "force_words_ids": [[1, 2], [[3], [4, 5]]], "force_words": ["rain", ["sun", "moon"]], "dola_layers": "low",
            "transformers_version": "4.31.0", "forced_decoder_ids": [[1, 5]], "assistant_model": null, "vendor": {"b": [1, {"a": 2}]},
        });
        let read = config(json.clone());
        assert_eq!(read.to_json(), json);
        assert_eq!(config(read.to_json()).to_json(), json);
        assert_eq!(serde_json::from_value::<GenerationConfig>(serde_json::to_value(&read).unwrap()).unwrap().to_json(), json);
        assert_eq!(read.unknown.len(), 4);
        assert_eq!(read.penalty_scope, Some(PenaltyScope::Last(64)));
        assert_eq!(read.keyword_boost.unwrap().stop, 3);
    }

    #[test]
    fn forms_that_mean_the_same_are_read() {
        let read = config(json!({
            "temperature": 2, "eos_token_id": 2, "stop_strings": "end", "top_p": null, "sequence_bias": {"(5,)": 1.5, "(5, 6)": -1},
            "keyword_boost": {"words": ["sun"]}, "dola_layers": [0, 2], "penalty_scope": "generated",
        }));
        assert_eq!(read.temperature, Some(2.0));
        assert_eq!(read.eos_token_id, Some(OneOrMany::One(2)));
        assert_eq!(read.stop_strings, Some("end".into()));
        assert_eq!(read.top_p, None);
        assert_eq!(read.sequence_bias, Some(vec![(vec![5], 1.5), (vec![5, 6], -1.0)]));
        assert_eq!(read.keyword_boost, Some(Boost::new(["sun"])));
        assert_eq!(read.dola_layers, Some(DolaLayers::Layers(vec![0, 2])));
        assert_eq!(read.penalty_scope, Some(PenaltyScope::Generated));
        let unbounded = GenerationConfig::new().sequence_bias([(vec![5], f64::NEG_INFINITY)]).to_json();
        assert_eq!(config(unbounded).sequence_bias.unwrap()[0].1 as f32, f32::NEG_INFINITY);
    }

    #[test]
    fn all_wrong_types_are_reported_at_once() {
        let wrong = json!({
            "max_length": 2.5, "temperature": "hot", "do_sample": 1, "eos_token_id": "</s>", "early_stopping": "soon", "top_k": 5,
            "bad_words_ids": [[1], 2], "suppress_tokens": [-1], "sequence_bias": {"5": 1.0}, "penalty_scope": "some", "seed": -1,
            "strategy": "beam", "force_words_ids": [3], "keyword_boost": {"words": ["a"], "biass": 1}, "stop_strings": [1], "vendor": "x",
        });
        let Err(Error::Config(problems)) = GenerationConfig::from_json(&wrong) else { panic!("accepted") };
        let fields: Vec<_> = problems.iter().map(|problem| problem.field.as_str()).collect();
        let expected: Vec<_> = wrong.as_object().unwrap().keys().filter(|key| *key != "top_k" && *key != "vendor").collect();
        assert_eq!(fields, expected);
        assert_eq!(problems[1].to_string(), "temperature = \"hot\": accepted is a number");
        assert!(GenerationConfig::from_json(&json!([1])).is_err());
    }

    #[test]
    fn a_folder_is_written_sorted_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let nested = folder.path().join("new");
        let mut saved = GenerationConfig::new().top_k(4).max_new_tokens(3usize).eos_token_id([2, 3]);
        saved.unknown.insert("vendor".into(), json!({"b": 1, "a": 2}));
        saved.save_pretrained(&nested).unwrap();
        let text = fs::read_to_string(nested.join(FILE)).unwrap();
        let expected = "{\n  \"eos_token_id\": [\n    2,\n    3\n  ],\n  \"max_new_tokens\": 3,\n  \"top_k\": 4,\n  \
                        \"vendor\": {\n    \"a\": 2,\n    \"b\": 1\n  }\n}\n";
        assert_eq!(text, expected);
        assert_eq!(GenerationConfig::from_pretrained(&nested).unwrap().to_json(), saved.to_json());
    }

    #[test]
    fn a_typed_strategy_is_written_as_flags() {
        let json = GenerationConfig::beam(4).to_json();
        assert_eq!(json["num_beams"], 4);
        assert_eq!(json["do_sample"], false);
        assert_eq!(json["strategy"], json!({"mode": "beam", "num_beams": 4}));
        assert_eq!(config(json).strategy, Some(Strategy::Beam { num_beams: 4 }));
    }

    #[test]
    fn generation_keys_are_lifted_out_of_a_legacy_config() {
        let bart = r#"{"model_type": "bart", "num_beams": 4, "length_penalty": 2.0, "min_length": 56, "max_length": 142,
            "no_repeat_ngram_size": 3, "early_stopping": true, "forced_eos_token_id": 2, "decoder_start_token_id": 2, "bos_token_id": 0,
            "force_bos_token_to_be_generated": true, "temperature": null, "seed": 42, "strategy": "none",
            "task_specific_params": {"summarization": {"num_beams": 6, "top_k": 3}}}"#;
        let read = GenerationConfig::from_pretrained(folder(&[("config.json", bart)]).path()).unwrap();
        let expected = json!({
            "num_beams": 4, "length_penalty": 2.0, "min_length": 56, "max_length": 142, "no_repeat_ngram_size": 3,
            "early_stopping": true, "forced_bos_token_id": 0, "forced_eos_token_id": 2, "decoder_start_token_id": 2, "bos_token_id": 0,
            "eos_token_id": 2, "pad_token_id": 1,
        });
        assert_eq!(read.to_json(), expected);
    }

    #[test]
    fn ids_that_config_json_leaves_out_are_its_family_s() {
        let of = |text: &str| GenerationConfig::from_pretrained(folder(&[("config.json", text)]).path()).unwrap().to_json();
        assert_eq!(of(r#"{"model_type": "t5"}"#), json!({"pad_token_id": 0, "eos_token_id": 1}));
        let umt5 = json!({"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0});
        assert_eq!(of(r#"{"model_type": "umt5", "eos_token_id": 3}"#), umt5);
        let mbart = json!({"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 9});
        assert_eq!(of(r#"{"model_type": "mbart", "forced_eos_token_id": null, "decoder_start_token_id": 9}"#), mbart);
        assert_eq!(of(r#"{"model_type": "llama"}"#), json!({}));
    }

    #[test]
    fn only_the_first_nested_config_fills_what_the_outer_one_leaves_unset() {
        let outer = r#"{"eos_token_id": 2, "decoder": {}, "generator": {"num_beams": 3, "eos_token_id": 7, "seed": 1}, "text_config": {"top_k": 3}}"#;
        let read = GenerationConfig::from_pretrained(folder(&[("config.json", outer)]).path()).unwrap();
        assert_eq!(read.to_json(), json!({"eos_token_id": 2, "num_beams": 3}));
    }

    #[test]
    fn generation_config_stands_before_config() {
        let files = folder(&[("config.json", r#"{"num_beams": 4}"#), (FILE, r#"{"top_k": 3, "num_beams": null}"#)]);
        assert_eq!(GenerationConfig::from_pretrained(files.path()).unwrap().to_json(), json!({"top_k": 3}));
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        for files in [&[][..], &[(FILE, "{\"top_k\": 3")], &[(FILE, "{\"top_k\": \"x\"}"), ("config.json", "{}")], &[("config.json", "[]")]]
        {
            let folder = folder(files);
            let Err(Error::Load { path, reason }) = GenerationConfig::from_pretrained(folder.path()) else { panic!("accepted {files:?}") };
            assert!(path.starts_with(folder.path()) && path.extension().is_some(), "{path:?}: {reason}");
        }
        assert!(matches!(GenerationConfig::from_pretrained("owner/name"), Err(Error::Load { .. })));
    }

    #[test]
    fn flags_choose_the_mode_as_the_reference_does() {
        assert_eq!(mode(json!({})), Strategy::Greedy);
        assert_eq!(mode(json!({"do_sample": true, "penalty_alpha": 0.6, "num_beam_groups": 2})), Strategy::Sample);
        assert_eq!(mode(json!({"num_beams": 4, "prompt_lookup_num_tokens": 3, "dola_layers": "low"})), Strategy::Beam { num_beams: 4 });
        assert_eq!(mode(json!({"num_beams": 4, "do_sample": true, "penalty_alpha": 0.6})), Strategy::BeamSample { num_beams: 4 });
        assert_eq!(
            mode(json!({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "do_sample": true})),
            Strategy::DiverseBeam { num_beams: 4, num_beam_groups: 2, diversity_penalty: 0.5 }
        );
        assert_eq!(
            mode(json!({"num_beams": 4, "force_words_ids": [[1, 2]]})),
            Strategy::ConstrainedBeam { num_beams: 4, force_words_ids: vec![vec![vec![1, 2]]], force_words: vec![] }
        );
        assert_eq!(
            mode(json!({"num_beams": 4, "force_words": ["rain"], "penalty_alpha": 0.6})),
            Strategy::ConstrainedBeam { num_beams: 4, force_words_ids: vec![], force_words: vec!["rain".into()] }
        );
        assert_eq!(mode(json!({"penalty_alpha": 0.6})), Strategy::Contrastive { penalty_alpha: 0.6, top_k: 50 });
        assert_eq!(mode(json!({"penalty_alpha": 0.6, "top_k": 1})), Strategy::Greedy);
        assert_eq!(
            mode(json!({"prompt_lookup_num_tokens": 3, "dola_layers": "low"})),
            Strategy::PromptLookup { prompt_lookup_num_tokens: 3, max_matching_ngram_size: 2, do_sample: false }
        );
        assert_eq!(mode(json!({"dola_layers": [1], "do_sample": true})), {
            Strategy::Dola { dola_layers: DolaLayers::Layers(vec![1]), do_sample: true }
        });
        assert_eq!(mode(json!({"assistant_early_exit": 2})), Strategy::Assisted { drafts: Drafts::EarlyExit(2), do_sample: false });
        assert_eq!(mode(json!({"use_mtp": true})), Strategy::Assisted { drafts: Drafts::Mtp, do_sample: false });
        assert_eq!(mode(json!({"use_mtp": false})), Strategy::Greedy);
    }

    #[test]
    fn every_mode_comes_back_from_its_flags() {
        for strategy in [
            Strategy::Greedy,
            Strategy::Sample,
            Strategy::Beam { num_beams: 2 },
            Strategy::BeamSample { num_beams: 2 },
            Strategy::DiverseBeam { num_beams: 4, num_beam_groups: 2, diversity_penalty: 1.0 },
            Strategy::ConstrainedBeam { num_beams: 2, force_words_ids: vec![vec![vec![1], vec![2, 3]]], force_words: vec![] },
            Strategy::ConstrainedBeam { num_beams: 2, force_words_ids: vec![], force_words: vec!["a".into(), ["b", "c"].into()] },
            Strategy::ConstrainedBeam { num_beams: 2, force_words_ids: vec![], force_words: vec![] },
            Strategy::Contrastive { penalty_alpha: 0.5, top_k: 4 },
            Strategy::Dola { dola_layers: DolaLayers::High, do_sample: true },
            Strategy::PromptLookup { prompt_lookup_num_tokens: 5, max_matching_ngram_size: 3, do_sample: true },
            Strategy::Assisted { drafts: Drafts::EarlyExit(1), do_sample: false },
            Strategy::Assisted { drafts: Drafts::Mtp, do_sample: true },
        ] {
            assert_eq!(Strategy::infer(&strategy.flags().or(&GenerationConfig::defaults())), strategy);
            assert_eq!(serde_json::from_value::<Strategy>(json!(strategy)).unwrap(), strategy);
        }
    }
}
