//! The tokenizer of a checkpoint.

use super::special::{Special, read};
use crate::error::{Error, Result};
use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, OnceLock},
};
use tokenizers::AddedToken;

/// A checkpoint's tokenizer with its special tokens. A clone shares it.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    /// Special tokens by role, as the checkpoint's files name them.
    named: BTreeMap<String, String>,
    special: HashSet<u32>,
    texts: OnceLock<Vec<(u32, String)>>,
    /// A hash of the vocabulary.
    fingerprint: OnceLock<u64>,
}

impl Tokenizer {
    /// Reads tokenizer.json, and the special tokens that tokenizer_config.json and special_tokens_map.json name; none if
    /// the folder has no tokenizer.json.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = folder.as_ref().join("tokenizer.json");
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let mut inner = guard(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(|reason| Error::load(&path, reason))?;
        let special = Special::from_folder(folder.as_ref())?;
        // HF: tokens named as special are so even where tokenizer.json does not say it. The reference also appends named
        // tokens that the vocabulary lacks, with ids that no model has weights for; here they do not exist.
        let unmarked = special
            .named
            .values()
            .chain(&special.extra)
            .filter(|token| inner.token_to_id(token).is_some() && !inner.get_added_vocabulary().get_vocab().contains_key(*token));
        let unmarked: Vec<_> = unmarked.map(|token| AddedToken::from(token, true)).collect();
        guard(|| inner.add_special_tokens(unmarked)).map_err(|reason| Error::load(&path, reason))?;
        Ok(Some(Self::new(inner, special.named)))
    }

    /// The ids of `text`; with `add_special_tokens` as the checkpoint frames a prompt.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = guard(|| self.shared.inner.encode_fast(text, add_special_tokens)).map_err(Error::Tokenizer)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, as a text of its own: many tokenizers drop the first token's leading space. Ids that it does
    /// not know are left out.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        // Some decoders cannot decode nothing.
        if !ids.iter().any(|&id| self.token(id).is_some() && !(skip_special_tokens && self.is_special(id))) {
            return Ok(String::new());
        }
        guard(|| self.shared.inner.decode(ids, skip_special_tokens)).map_err(Error::Tokenizer)
    }

    /// The tokenisations of `word` without and with a leading space, without special tokens: what to ban or to favour
    /// if the word is to be met wherever it stands.
    pub fn variants(&self, word: &str) -> Result<Vec<Vec<u32>>> {
        let mut variants = Vec::new();
        for text in [word, &format!(" {word}")] {
            let ids = self.encode(text, false)?;
            if !ids.is_empty() && !variants.contains(&ids) {
                variants.push(ids);
            }
        }
        Ok(variants)
    }

    /// The text of every id by itself, special tokens in their own spelling; made at the first call.
    pub(crate) fn texts(&self) -> &[(u32, String)] {
        self.shared.texts.get_or_init(|| {
            let ids = self.shared.inner.get_vocab(true).into_values();
            ids.map(|id| (id, self.decode(&[id], false).unwrap_or_default())).collect()
        })
    }

    /// Whether ids mean the same to both; tokens that were added to the vocabulary may differ. The vocabularies are read once.
    pub fn same_vocabulary(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared) || self.fingerprint() == other.fingerprint()
    }

    fn fingerprint(&self) -> u64 {
        *self.shared.fingerprint.get_or_init(|| {
            let mut hasher = DefaultHasher::new();
            (0..self.shared.inner.get_vocab_size(false) as u32).for_each(|id| self.token(id).hash(&mut hasher));
            hasher.finish()
        })
    }

    /// The number of tokens it knows, added ones included; a model may have logits for more.
    pub fn vocab_size(&self) -> usize {
        self.shared.inner.get_vocab_size(true)
    }

    /// The token of an id, in the vocabulary's own spelling.
    pub fn token(&self, id: u32) -> Option<String> {
        self.shared.inner.id_to_token(id)
    }

    /// The id of a token, in the vocabulary's own spelling.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// The ids of the tokens that begin with `prefix`, in the vocabulary's own spelling. Looks at the whole vocabulary.
    pub fn extensions(&self, prefix: &str) -> Vec<u32> {
        let vocabulary = self.shared.inner.get_vocab(true);
        let mut ids: Vec<u32> = vocabulary.into_iter().filter(|(token, _)| token.starts_with(prefix)).map(|(_, id)| id).collect();
        ids.sort_unstable();
        ids
    }

    /// Whether an id stands for a special token, which is no part of a text.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.special.contains(&id)
    }

    /// The token that begins a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.role("bos_token")
    }

    /// The token that ends a sequence.
    pub fn eos(&self) -> Option<u32> {
        self.role("eos_token")
    }

    /// The token that fills a sequence up.
    pub fn pad(&self) -> Option<u32> {
        self.role("pad_token")
    }

    /// The token that stands for what the vocabulary lacks.
    pub fn unk(&self) -> Option<u32> {
        self.role("unk_token")
    }

    fn role(&self, role: &str) -> Option<u32> {
        self.id(self.shared.named.get(role)?)
    }

    fn new(mut inner: tokenizers::Tokenizer, named: BTreeMap<String, String>) -> Self {
        // A prompt is fed as it is: what the file says about batches of training texts must not cut or fill it.
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        let added = inner.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect();
        Self { shared: Arc::new(Shared { inner, named, special, texts: OnceLock::new(), fingerprint: OnceLock::new() }) }
    }
}

/// A tokenizer of one's own. It has no bos, eos and pad, for a checkpoint names these in other files.
impl From<tokenizers::Tokenizer> for Tokenizer {
    fn from(inner: tokenizers::Tokenizer) -> Self {
        Self::new(inner, BTreeMap::new())
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).field("named", &self.shared.named).finish_non_exhaustive()
    }
}

/// Runs work of `tokenizers`, which indexes by what its file says and so panics where the file contradicts itself.
fn guard<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its parts contradict each other".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fs;

    const STORYTELLER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/storyteller");

    /// The storyteller's folder with a changed tokenizer.json.
    fn changed(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut file: Value = serde_json::from_slice(&fs::read(Path::new(STORYTELLER).join("tokenizer.json")).unwrap()).unwrap();
        change(&mut file);
        fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        fs::copy(Path::new(STORYTELLER).join("tokenizer_config.json"), folder.path().join("tokenizer_config.json")).unwrap();
        folder
    }

    #[test]
    fn encodes_and_decodes_as_the_reference() {
        let tokenizer = Tokenizer::from_folder(STORYTELLER).unwrap().unwrap();
        assert_eq!(tokenizer.encode("Once upon a time", true).unwrap(), ENCODED);
        assert_eq!(tokenizer.encode("Once upon a time", false).unwrap(), ENCODED[1..]);
        assert_eq!(tokenizer.decode(&ENCODED, true).unwrap(), "Once upon a time");
        assert_eq!(tokenizer.decode(&ENCODED[..1], false).unwrap(), "<|bos|>");
        assert_eq!(tokenizer.decode(&[1, 1_000_000], true).unwrap(), "");
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad(), tokenizer.vocab_size()), (Some(1), Some(2), Some(0), 2048));
        assert!(tokenizer.is_special(5) && !tokenizer.is_special(6));
        assert_eq!((tokenizer.token(2).as_deref(), tokenizer.id("<|eos|>"), tokenizer.token(2048)), (Some("<|eos|>"), Some(2), None));
    }

    #[test]
    fn variants_differ_by_the_leading_space() {
        let tokenizer = Tokenizer::from_folder(STORYTELLER).unwrap().unwrap();
        assert_eq!(
            tokenizer.variants("time").unwrap(),
            [tokenizer.encode("time", false).unwrap(), tokenizer.encode(" time", false).unwrap()]
        );
        assert_eq!(tokenizer.variants("").unwrap(), [tokenizer.encode(" ", false).unwrap()]);
        let date = Tokenizer::from_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/date-normaliser")).unwrap().unwrap();
        assert_eq!(date.variants("may").unwrap().len(), 1, "its normaliser strips spaces");
    }

    #[test]
    fn extensions_begin_as_the_prefix() {
        let tokenizer = Tokenizer::from_folder(STORYTELLER).unwrap().unwrap();
        let tokens = |prefix: &str| tokenizer.extensions(prefix).iter().map(|&id| tokenizer.token(id).unwrap()).collect::<Vec<_>>();
        assert_eq!(tokens("Ġprinc"), ["Ġprincess", "Ġprince"]);
        assert_eq!(tokens("<|"), ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]);
        assert_eq!(tokens("zzz"), [""; 0]);
        assert_eq!(tokenizer.extensions("").len(), 2048);
    }

    #[test]
    fn vocabularies_are_compared() {
        let tokenizer = Tokenizer::from_folder(STORYTELLER).unwrap().unwrap();
        assert!(tokenizer.same_vocabulary(&Tokenizer::from_folder(STORYTELLER).unwrap().unwrap()));
        let date = Tokenizer::from_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/date-normaliser")).unwrap().unwrap();
        assert!(!tokenizer.same_vocabulary(&date));
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_ignored() {
        let folder = changed(|file| {
            file["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
            file["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"});
        });
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
        assert_eq!(tokenizer.encode("Once upon a time", true).unwrap(), ENCODED);
    }

    #[test]
    fn named_tokens_are_special_even_if_the_file_does_not_say_so() {
        let folder = changed(|file| file["added_tokens"] = json!([]));
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
        assert!((0..6).all(|id| tokenizer.is_special(id)), "six are named by tokenizer_config.json");
        assert_eq!(tokenizer.encode("<|user|>", false).unwrap(), [4]);
    }

    #[test]
    fn damage_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Tokenizer::from_folder(folder.path()).unwrap().is_none());
        fs::write(folder.path().join("tokenizer.json"), "{\"version\": \"1.0\", \"model\"").unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err();
        assert!(error.kind() == "load" && error.to_string().contains("tokenizer.json"), "{error}");

        let folder = changed(|file| file["post_processor"]["special_tokens"] = json!({}));
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
        assert_eq!(tokenizer.encode("a", true).unwrap_err().kind(), "tokenizer");
        let folder = changed(|file| file["decoder"] = json!({"type": "Strip", "content": "a", "start": 0, "stop": 9}));
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
        assert_eq!(tokenizer.decode(&tokenizer.encode("a", false).unwrap(), true).unwrap_err().kind(), "tokenizer");
    }

    // Of transformers 5.23.0.
    const ENCODED: [u32; 6] = [1, 1673, 332, 660, 264, 547];
}
