//! Which value of a field wins, and where it came from.

use crate::config::{Drafts, GenerationConfig, Strategy};
use serde_json::{Map, Value};

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The call's config.
    Call,
    /// The model's generation_config.json or config.json.
    Model,
    /// The reference's default.
    Default,
}

impl Origin {
    /// A stable lower-case name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Model => "model",
            Self::Default => "default",
        }
    }
}

/// The call's config over the model's over the defaults.
pub(super) struct Merged {
    /// The values that win, all of them flat.
    pub config: GenerationConfig,
    /// The mode that they choose.
    pub strategy: Strategy,
    /// The call's typed strategy, if the flags set beside it choose another mode.
    pub contradicted: Option<Strategy>,
    /// Fields of the model's file that choose a mode and gave way to the call's strategy.
    pub set_aside: Vec<String>,
    /// Keys that have no field.
    pub unknown: Vec<String>,
    call: Map<String, Value>,
    model: Map<String, Value>,
}

impl Merged {
    pub fn new(call: &GenerationConfig, model: &GenerationConfig) -> Self {
        let defaults = GenerationConfig::defaults();
        let infer = |config: &GenerationConfig| Strategy::infer(&config.clone().or(&defaults));
        let own = call.clone().flat();
        let flat = model.clone().flat();
        // Drafts extend greedy search and sampling; a typed mode of these two is not contradicted by them.
        let meant = |strategy: &Strategy| infer(&strategy.flags().or(&own.drafts()));
        let contradicted = call.strategy.clone().filter(|strategy| meant(strategy) != infer(&own) || lacks_assistant(strategy, &own));
        let rest = if call.strategy.is_some() { flat.clone().without_mode() } else { flat.clone() };
        let config = own.clone().or(&rest).or(&defaults);
        let (call_entries, model_entries, default_entries) = (own.entries(), rest.entries(), defaults.entries());
        let gave_way = |(field, value): &(String, Value)| {
            !model_entries.contains_key(field) && call_entries.get(field).or(default_entries.get(field)) != Some(value)
        };
        Self {
            strategy: Strategy::infer(&config),
            config,
            contradicted,
            set_aside: flat.entries().into_iter().filter(gave_way).map(|(field, _)| field).collect(),
            unknown: call.unknown.keys().chain(model.unknown.keys()).filter(|key| !METADATA.contains(&key.as_str())).cloned().collect(),
            call: call_entries,
            model: model_entries,
        }
    }

    /// Where the field's value came from.
    pub fn origin(&self, field: &str) -> Origin {
        if self.call.contains_key(field) {
            Origin::Call
        } else if self.model.contains_key(field) {
            Origin::Model
        } else {
            Origin::Default
        }
    }
}

fn lacks_assistant(strategy: &Strategy, config: &GenerationConfig) -> bool {
    matches!(strategy, Strategy::Assisted { drafts: Drafts::Assistant, .. }) && config.assistant_model.is_none()
}

/// Keys that transformers writes for itself.
const METADATA: [&str; 3] = ["transformers_version", "_from_model_config", "_commit_hash"];
