//! The tokenizer of a checkpoint.

use crate::error::{Error, Result};
use std::sync::Arc;

/// A checkpoint's tokenizer with its special tokens. A clone shares it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
}

impl Tokenizer {
    /// Reads a folder's tokenizer.json; `None` without one.
    pub fn from_folder(folder: impl AsRef<std::path::Path>) -> Result<Option<Self>> {
        let path = folder.as_ref().join("tokenizer.json");
        if !path.exists() {
            return Ok(None);
        }
        let inner = tokenizers::Tokenizer::from_file(&path).map_err(|error| Error::load(&path, error))?;
        Ok(Some(Self { inner: Arc::new(inner) }))
    }

    /// The ids of `text`; with `add_special_tokens` as the checkpoint frames a prompt.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, add_special_tokens).map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of `word` alone, without and with a leading space.
    pub fn variants(&self, word: &str) -> Result<Vec<Vec<u32>>> {
        let mut variants = vec![self.encode(word, false)?, self.encode(&format!(" {word}"), false)?];
        variants.dedup();
        variants.retain(|ids| !ids.is_empty());
        Ok(variants)
    }
}
