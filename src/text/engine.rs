//! The two libraries whose tokens checkpoints have: tokenizers, and sentencepiece.

use super::{spm::Slow, tokenizer::guard};
use std::collections::HashSet;
use tokenizers::DecoderWrapper;

/// What turns text into ids and back.
pub(super) enum Engine {
    /// The reference's too, for most checkpoints.
    Tokenizers(Box<tokenizers::Tokenizer>),
    /// Where the reference uses sentencepiece itself.
    Sentencepiece(Slow),
}

impl Engine {
    /// The ids of a text that is read. Sentencepiece has no frame of its own.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        match self {
            Self::Tokenizers(inner) => Ok(guard(|| inner.encode_fast(text, add_special_tokens))?.get_ids().to_vec()),
            Self::Sentencepiece(inner) => Ok(inner.encode(text, false)),
        }
    }

    /// The ids of a text as the model writes it.
    pub fn encode_written(&self, text: &str) -> Result<Vec<u32>, String> {
        match self {
            Self::Tokenizers(_) => self.encode(text, false),
            Self::Sentencepiece(inner) => Ok(inner.encode(text, true)),
        }
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, String> {
        match self {
            Self::Tokenizers(inner) => guard(|| inner.decode(ids, skip_special_tokens)),
            Self::Sentencepiece(inner) => Ok(inner.decode(ids, skip_special_tokens)),
        }
    }

    /// Whether the bytes of a text are those of its tokens, one after another.
    pub fn joins(&self) -> bool {
        matches!(self, Self::Tokenizers(inner) if matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))))
    }

    /// Whether decoded text loses the white space at its ends.
    pub fn trims(&self) -> bool {
        matches!(self, Self::Sentencepiece(_))
    }

    pub fn token(&self, id: u32) -> Option<String> {
        match self {
            Self::Tokenizers(inner) => inner.id_to_token(id),
            Self::Sentencepiece(inner) => inner.token(id).map(str::to_owned),
        }
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Tokenizers(inner) => inner.token_to_id(token),
            Self::Sentencepiece(inner) => inner.id(token),
        }
    }

    /// All tokens and their ids, in no order.
    pub fn vocabulary(&self) -> Vec<(String, u32)> {
        match self {
            Self::Tokenizers(inner) => inner.get_vocab(true).into_iter().collect(),
            Self::Sentencepiece(inner) => inner.vocabulary().map(|(token, id)| (token.to_owned(), id)).collect(),
        }
    }

    /// The number of tokens, with those that were added to the vocabulary or without.
    pub fn vocab_size(&self, added: bool) -> usize {
        match self {
            Self::Tokenizers(inner) => inner.get_vocab_size(added),
            Self::Sentencepiece(inner) => inner.vocabulary().count(),
        }
    }

    pub fn special(&self) -> HashSet<u32> {
        match self {
            Self::Tokenizers(inner) => {
                let added = inner.get_added_tokens_decoder();
                added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect()
            }
            Self::Sentencepiece(inner) => inner.special().collect(),
        }
    }
}
