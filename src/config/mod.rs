//! What a user sets: the fields of Hugging Face's generation_config.json, each of which can be unset.

/// All settings of a call. A field that is `None` is unset: the model's own config or the reference's default decides.
#[derive(Debug, Clone, Default)]
pub struct GenerationConfig {}

/// How tokens are searched for.
#[derive(Debug, Clone, PartialEq)]
pub enum Strategy {
    /// The most likely token at every step.
    Greedy,
    /// A draw from the shaped distribution at every step.
    Sample,
}
