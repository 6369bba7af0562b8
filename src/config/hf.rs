//! Hugging Face's generation_config.json: read, written, and its flat flags turned into a [`Strategy`] and back.

use super::{EarlyStopping, GenerationConfig, Strategy};
use crate::error::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::{Map, Value};
use std::{fs, path::Path};

const FILE: &str = "generation_config.json";

/// Fields that transformers does not have. In a config.json such a key means something else.
const OURS: [&str; 11] = [
    "strategy",
    "include_stop_string",
    "stop_token_ids",
    "seed",
    "seeds",
    "penalty_scope",
    "penalty_exempt_ids",
    "bad_words",
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
            let mut object = value.as_object().cloned().unwrap_or_default();
            object.retain(|key, _| !OURS.contains(&key.as_str()));
            Self::from_json(&Value::Object(object))
        };
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
            penalty_alpha: None,
            dola_layers: None,
            prompt_lookup_num_tokens: None,
            assistant_early_exit: None,
            use_mtp: None,
            ..self
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
        if config.constraints.is_some() || config.force_words_ids.is_some() {
            return Self::ConstrainedBeam { num_beams, force_words_ids: config.force_words_ids.clone().unwrap_or_default() };
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
        if config.assistant_early_exit.is_some() {
            Self::Assisted { assistant_early_exit: config.assistant_early_exit.map(|layer| count(Some(layer), 0)), do_sample }
        } else if config.prompt_lookup_num_tokens.is_some() {
            let prompt_lookup_num_tokens = count(config.prompt_lookup_num_tokens, 0);
            Self::PromptLookup { prompt_lookup_num_tokens, max_matching_ngram_size: count(config.max_matching_ngram_size, 2), do_sample }
        } else if config.use_mtp == Some(true) {
            Self::Assisted { assistant_early_exit: None, do_sample }
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
            Self::ConstrainedBeam { force_words_ids, .. } => flags.force_words_ids(force_words_ids),
            Self::Contrastive { penalty_alpha, top_k } => flags.penalty_alpha(penalty_alpha).top_k(top_k),
            Self::Dola { dola_layers, .. } => flags.dola_layers(dola_layers),
            Self::PromptLookup { prompt_lookup_num_tokens, max_matching_ngram_size, .. } => {
                flags.prompt_lookup_num_tokens(prompt_lookup_num_tokens).max_matching_ngram_size(max_matching_ngram_size)
            }
            Self::Assisted { assistant_early_exit: Some(layer), .. } => flags.assistant_early_exit(layer),
            Self::Assisted { assistant_early_exit: None, .. } => flags.use_mtp(true),
        }
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
