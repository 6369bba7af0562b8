//! The outcome of a config, for people: most questions of why a flag was ignored are answered here.

use super::{Merged, Origin};
use crate::{config::Strategy, logits::LogitsProcessor, model::ModelInfo};
use std::{fmt, sync::Arc};

/// The outcome of a config: mode, processors in order, and where each value came from. `Display` prints it.
#[derive(Debug, Clone, Default)]
pub struct Explanation {
    /// The mode's name.
    pub mode: String,
    /// Names of the processors, in order.
    pub processors: Vec<String>,
    /// Every field that has a value. A default that the mode does not use is left out.
    pub settings: Vec<Setting>,
    /// Things worth knowing: positions past the trained context, unknown keys, ...
    pub notes: Vec<String>,
}

/// One effective field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The field's name.
    pub field: String,
    /// Its value, as JSON.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
    /// Why it is not used, if it is not.
    pub unused: Option<String>,
}

impl Explanation {
    pub(super) fn new(merged: &Merged, info: &ModelInfo, processors: &[Arc<dyn LogitsProcessor>], eos: &[u32]) -> Self {
        let entries = merged.config.entries().into_iter();
        let settings = entries.map(|(field, value)| Setting {
            origin: merged.origin(&field),
            unused: unused(&field, merged, info, eos),
            value: value.to_string(),
            field,
        });
        Self {
            mode: merged.strategy.name().to_owned(),
            processors: processors.iter().map(|processor| processor.name().to_owned()).collect(),
            settings: settings.filter(|setting| setting.origin != Origin::Default || setting.unused.is_none()).collect(),
            notes: notes(merged, info, eos),
        }
    }
}

/// Why this call does not use a field that has a value.
fn unused(field: &str, merged: &Merged, info: &ModelInfo, eos: &[u32]) -> Option<String> {
    let (config, strategy) = (&merged.config, &merged.strategy);
    let by_mode = || Some(format!("not used by {}", strategy.name()));
    match field {
        "max_length" if config.max_new_tokens.is_some() => Some("max_new_tokens decides".into()),
        "min_length" if config.min_new_tokens.is_some() => Some("min_new_tokens decides".into()),
        "min_length" | "min_new_tokens" if eos.is_empty() => Some("no end token is known".into()),
        "seed" if strategy.samples() && config.seeds.is_some() => Some("seeds decides".into()),
        "top_k" if matches!(strategy, Strategy::Contrastive { .. }) => None,
        "temperature" | "top_k" | "top_p" | "min_p" | "top_h" | "typical_p" | "epsilon_cutoff" | "eta_cutoff" | "seed" | "seeds"
            if !strategy.samples() =>
        {
            by_mode()
        }
        "length_penalty" | "early_stopping" if strategy.num_beams() == 1 => by_mode(),
        "num_beam_groups" | "diversity_penalty" if !matches!(strategy, Strategy::DiverseBeam { .. }) => by_mode(),
        "penalty_alpha" if !matches!(strategy, Strategy::Contrastive { .. }) => by_mode(),
        "dola_layers" if !matches!(strategy, Strategy::Dola { .. }) => by_mode(),
        "prompt_lookup_num_tokens" | "max_matching_ngram_size" if !matches!(strategy, Strategy::PromptLookup { .. }) => by_mode(),
        "use_mtp"
        | "is_assistant"
        | "assistant_early_exit"
        | "num_assistant_tokens"
        | "num_assistant_tokens_schedule"
        | "assistant_confidence_threshold"
        | "assistant_lookbehind"
        | "target_lookbehind"
        | "assistant_ensemble_weight"
        | "speculation_type"
            if !matches!(strategy, Strategy::Assisted { .. }) =>
        {
            by_mode()
        }
        "penalty_scope" | "penalty_exempt_ids" if config.repetition_penalty == Some(1.0) => Some("repetition_penalty is off".into()),
        "processed_log_probs" if config.log_probs.is_none() => Some("log_probs is not set".into()),
        "include_stop_string" if config.stop_strings.is_none() => Some("stop_strings is not set".into()),
        "decoder_start_token_id" if !info.is_encoder_decoder => Some("for encoder-decoder models".into()),
        "cache_implementation" | "max_cache_len" if config.use_cache == Some(false) => Some("use_cache is false".into()),
        "max_cache_len" if !matches!(config.cache_implementation.as_deref(), None | Some("static")) => Some("for the static cache".into()),
        "cache_config" => Some("no cache here has parameters".into()),
        "pad_token_id" if !matches!(strategy, Strategy::DiverseBeam { .. }) => Some("nothing is padded".into()),
        "return_dict_in_generate" => Some("results always are structs".into()),
        "compile_config" | "disable_compile" | "low_memory" | "continuous_batching_config" => Some("about speed alone".into()),
        _ => None,
    }
}

fn notes(merged: &Merged, info: &ModelInfo, eos: &[u32]) -> Vec<String> {
    let config = &merged.config;
    let mut notes = Vec::new();
    if config.max_new_tokens.is_none() && merged.origin("max_length") == Origin::Default {
        let limit = info.context.positions().map(|len| format!(", within the model's {len} positions")).unwrap_or_default();
        notes.push(format!("neither max_new_tokens nor max_length is set: 20 tokens are generated{limit}"));
    }
    let unreachable = match (config.min_new_tokens, config.min_length, config.max_new_tokens, config.max_length) {
        (Some(min), _, Some(max), _) | (None, Some(min), None, Some(max)) => min > max,
        _ => false,
    };
    if unreachable {
        notes.push("the smallest length is above the largest: rows end at the largest".into());
    }
    if eos.is_empty() {
        notes.push("no end token is known: rows end by length, time or a stop of the user's".into());
    }
    if !merged.set_aside.is_empty() {
        notes.push(format!("the call's strategy sets aside what the model's file says about {}", merged.set_aside.join(", ")));
    }
    if !merged.unknown.is_empty() {
        notes.push(format!("keys without a meaning here: {}", merged.unknown.join(", ")));
    }
    notes
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mode: {}", self.mode)?;
        match self.processors.as_slice() {
            [] => writeln!(f, "processors: none")?,
            names => writeln!(f, "processors: {}", names.join(", "))?,
        }
        let short = |value: &str| match value.char_indices().nth(LONGEST) {
            Some((end, _)) => format!("{}..", value.get(..end).unwrap_or_default()),
            None => value.to_owned(),
        };
        let field_width = self.settings.iter().map(|setting| setting.field.len()).max().unwrap_or(0);
        let value_width = self.settings.iter().map(|setting| short(&setting.value).chars().count()).max().unwrap_or(0);
        for Setting { field, value, origin, unused } in &self.settings {
            let used = unused.as_deref().unwrap_or("used");
            writeln!(f, "  {field:field_width$}  {:value_width$}  {:7}  {used}", short(value), origin.as_str())?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

/// Characters of a value that are printed.
const LONGEST: usize = 40;
