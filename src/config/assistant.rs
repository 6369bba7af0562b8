//! The model that writes drafts.

use crate::{model::Model, text::Tokenizer};
use std::sync::Arc;

/// A model that writes drafts, with its tokenizer where that is known. A `&Generator` becomes one.
#[derive(Debug, Clone)]
pub struct Assistant {
    /// The model.
    pub model: Arc<dyn Model>,
    /// Tells whether its vocabulary is the other model's.
    pub tokenizer: Option<Tokenizer>,
}

impl From<Arc<dyn Model>> for Assistant {
    fn from(model: Arc<dyn Model>) -> Self {
        Self { model, tokenizer: None }
    }
}
