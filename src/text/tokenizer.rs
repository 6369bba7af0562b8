//! The tokenizer of a checkpoint.

use crate::error::{Error, Result};
use std::sync::Arc;

/// A checkpoint's tokenizer with its special tokens. A clone shares it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
}

impl Tokenizer {
    /// The ids of `text`; with `add_special_tokens` as the checkpoint frames a prompt.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, add_special_tokens).map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}
