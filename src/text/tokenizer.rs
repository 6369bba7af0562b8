//! The tokenizer of a checkpoint.

use super::{
    engine::Engine,
    files::{self, Class, flag},
    language::{Direction, Form, Languages},
    special::{Special, object, read},
    spm,
};
use crate::error::{Error, Result};
use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, OnceLock},
};
use tokenizers::{AddedToken, ModelWrapper, PostProcessorWrapper, PreTokenizerWrapper};

/// A checkpoint's tokenizer with its special tokens. A clone shares it.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    engine: Engine,
    /// What stands around a text, if it is told languages.
    languages: Option<Languages>,
    /// Special tokens by role, as the checkpoint's files name them.
    named: BTreeMap<String, String>,
    special: HashSet<u32>,
    texts: OnceLock<Vec<(u32, String)>>,
    /// What ids add to any text, each made when it is first asked for; nothing where that depends on the ids around it.
    pieces: Box<[OnceLock<Option<Box<str>>>]>,
    /// A hash of the vocabulary.
    fingerprint: OnceLock<u64>,
    /// Whether decoded text is tidied up.
    tidy: bool,
}

/// What tidying writes for what, in this order.
const TIDY: [(&str, &str); 10] = [
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
];

impl Tokenizer {
    /// Reads tokenizer.json, or else vocab.json and merges.txt with what belongs to them (for the classes GPT2Tokenizer and
    /// Qwen2Tokenizer), or else the SentencePiece models of T5, mBART, NLLB, M2M100, Marian, PEGASUS, Llama, Gemma and those that name no
    /// class of their own; and the special tokens that tokenizer_config.json and special_tokens_map.json name; none if the folder has
    /// no such files.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let mut special = Special::from_folder(folder)?;
        let config_path = folder.join("tokenizer_config.json");
        let config = object(&config_path)?.unwrap_or_default();
        let (mut engine, languages) = if let Some(bytes) = read(&path)? {
            let mut inner = guard(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(|reason| Error::load(&path, reason))?;
            // HF: these two classes obey add_prefix_space, others do not look at it. They also build the rest of the
            // pre-tokenizer anew; here it is what tokenizer.json says, which is the same but for files that say more.
            if let Some(prefix) = config.get("add_prefix_space").and_then(serde_json::Value::as_bool)
                && Class::of(folder, &config)?.is_some()
            {
                let cut = inner.get_pre_tokenizer().cloned().map(|cut| prefixed(cut, prefix));
                inner.with_pre_tokenizer(cut);
            }
            let languages = match spm::Class::of(folder, &config)? {
                Some(class) => class.languages(&config, &config_path, |token| inner.token_to_id(token))?,
                None => None,
            };
            if languages.is_some() {
                inner.with_post_processor(None::<PostProcessorWrapper>);
            }
            (Engine::Tokenizers(Box::new(inner)), languages)
        } else if let Some((inner, named)) = files::open(folder)? {
            special.named.extend(named);
            (Engine::Tokenizers(Box::new(inner)), None)
        } else {
            let Some(opened) = spm::open(folder, &config)? else { return Ok(None) };
            special.named.extend(opened.named);
            (opened.engine, opened.languages)
        };
        // HF: clean_up_tokenization_spaces is passed over for BPE, which it would harm, unless the longer name insists.
        let mut harmless = flag(&config, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output");
        if let Engine::Tokenizers(inner) = &mut engine {
            // HF: tokens named as special are so even where tokenizer.json does not say it. The reference also appends named
            // tokens that the vocabulary lacks, with ids that no model has weights for; here they do not exist.
            let unmarked = special
                .named
                .values()
                .chain(&special.extra)
                .filter(|token| inner.token_to_id(token).is_some() && !inner.get_added_vocabulary().get_vocab().contains_key(*token));
            let unmarked: Vec<_> = unmarked.map(|token| AddedToken::from(token, true)).collect();
            guard(|| inner.add_special_tokens(unmarked)).map_err(|reason| Error::load(&path, reason))?;
            harmless |= !matches!(inner.get_model(), ModelWrapper::BPE(_));
        } else {
            harmless = true;
        }
        let tidy = harmless && flag(&config, "clean_up_tokenization_spaces");
        Ok(Some(Self::new(engine, languages, special.named, tidy)))
    }

    /// The ids of `text`; with `add_special_tokens` as the checkpoint frames a prompt.
    ///
    /// ```
    /// use candle_generate::Tokenizer;
    ///
    /// let tokenizer = Tokenizer::from_folder("examples/models/storyteller")?.expect("it has one");
    /// assert_eq!(tokenizer.encode("Once upon a time", true)?, [1, 1673, 332, 660, 264, 547]);
    /// assert_eq!(tokenizer.decode(&[1, 1673, 332, 660], true)?, "Once upon");
    /// # Ok::<(), candle_generate::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if its file contradicts itself.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        self.encode_as(text, add_special_tokens, Direction::default())
    }

    /// As [`Tokenizer::encode`], of a text in one language that is to become one in another.
    pub fn encode_as(&self, text: &str, add_special_tokens: bool, direction: Direction) -> Result<Vec<u32>> {
        let ids = self.shared.engine.encode(text, add_special_tokens).map_err(Error::Tokenizer)?;
        Ok(match self.shared.languages.as_ref().filter(|_| add_special_tokens) {
            Some(languages) => languages.frame(ids, direction),
            None => ids,
        })
    }

    /// The ids of `text` as the model writes it, without special tokens. That differs from how it reads a text only where prompts and
    /// results have vocabularies of their own.
    pub fn encode_target(&self, text: &str) -> Result<Vec<u32>> {
        self.shared.engine.encode_written(text).map_err(Error::Tokenizer)
    }

    /// The codes of the languages that the model is told, as `src_lang` and `tgt_lang` take them; none for most models.
    pub fn languages(&self) -> Vec<&str> {
        self.shared.languages.iter().flat_map(|languages| &languages.codes).map(|(code, _)| code.as_str()).collect()
    }

    /// The id of a language's token.
    pub fn language(&self, code: &str) -> Option<u32> {
        self.shared.languages.as_ref()?.id(code)
    }

    /// Whether prompts name the language of the result, and not their own.
    pub(crate) fn prompts_name_target(&self) -> bool {
        self.shared.languages.as_ref().is_some_and(|languages| languages.form == Form::Target)
    }

    /// The text of `ids`, as a text of its own: many tokenizers drop the first token's leading space. Ids that it does
    /// not know are left out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if its file contradicts itself.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        // Some decoders cannot decode nothing.
        if !ids.iter().any(|&id| self.token(id).is_some() && !(skip_special_tokens && self.is_special(id))) {
            return Ok(String::new());
        }
        let text = self.shared.engine.decode(ids, skip_special_tokens).map_err(Error::Tokenizer)?;
        Ok(if self.shared.tidy { TIDY.iter().fold(text, |text, (from, to)| text.replace(from, to)) } else { text })
    }

    /// What an id adds to any text that ends in a whole character, nothing if it is no part of a text; `None` if that is not known,
    /// or depends on the ids around it.
    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        let piece = || {
            let text = self.decode(&[id], true).ok()?;
            (!text.contains(char::REPLACEMENT_CHARACTER)).then(|| text.into())
        };
        self.shared.pieces.get(id as usize)?.get_or_init(piece).as_deref()
    }

    /// A text's beginning that tidying will leave as it is, whatever follows.
    pub(super) fn tidied<'a>(&self, text: &'a str) -> &'a str {
        // White space at the end of a text is not its own here.
        let text = if self.shared.engine.trims() { text.trim_end_matches(spm::is_space) } else { text };
        let open = |held: &str| TIDY.iter().any(|(from, _)| from.len() > held.len() && from.starts_with(held));
        let held = text.rmatch_indices(' ').map(|(at, _)| at).take_while(|at| text.len() - at < 4).filter(|&at| open(&text[at..])).last();
        if self.shared.tidy { &text[..held.unwrap_or(text.len())] } else { text }
    }

    /// The tokenisations of `word` without and with a leading space, without special tokens: what to ban or to favour
    /// if the word is to be met wherever it stands.
    pub fn variants(&self, word: &str) -> Result<Vec<Vec<u32>>> {
        let mut variants = Vec::new();
        for text in [word, &format!(" {word}")] {
            let ids = self.encode_target(text)?;
            if !ids.is_empty() && !variants.contains(&ids) {
                variants.push(ids);
            }
        }
        Ok(variants)
    }

    /// The text of every id by itself, special tokens in their own spelling; made at the first call.
    pub(crate) fn texts(&self) -> &[(u32, String)] {
        self.shared.texts.get_or_init(|| {
            let vocabulary = self.shared.engine.vocabulary().into_iter();
            vocabulary.map(|(_, id)| (id, self.decode(&[id], false).unwrap_or_default())).collect()
        })
    }

    /// Whether ids mean the same to both; tokens that were added to the vocabulary may differ. The vocabularies are read once.
    pub fn same_vocabulary(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared) || self.fingerprint() == other.fingerprint()
    }

    fn fingerprint(&self) -> u64 {
        *self.shared.fingerprint.get_or_init(|| {
            let mut hasher = DefaultHasher::new();
            (0..self.shared.engine.vocab_size(false) as u32).for_each(|id| self.token(id).hash(&mut hasher));
            hasher.finish()
        })
    }

    /// The number of tokens it knows, added ones included; a model may have logits for more.
    pub fn vocab_size(&self) -> usize {
        self.shared.engine.vocab_size(true)
    }

    /// The token of an id, in the vocabulary's own spelling.
    pub fn token(&self, id: u32) -> Option<String> {
        self.shared.engine.token(id)
    }

    /// The id of a token, in the vocabulary's own spelling.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.shared.engine.id(token)
    }

    /// The ids of the tokens that begin with `prefix`, in the vocabulary's own spelling. Looks at the whole vocabulary.
    pub fn extensions(&self, prefix: &str) -> Vec<u32> {
        let vocabulary = self.shared.engine.vocabulary().into_iter();
        let mut ids: Vec<u32> = vocabulary.filter(|(token, _)| token.starts_with(prefix)).map(|(_, id)| id).collect();
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

    fn new(mut engine: Engine, languages: Option<Languages>, named: BTreeMap<String, String>, tidy: bool) -> Self {
        if let Engine::Tokenizers(inner) = &mut engine {
            // A prompt is fed as it is: what the file says about batches of training texts must not cut or fill it.
            inner.with_padding(None);
            let _ = inner.with_truncation(None);
        }
        let pieces = if engine.joins() && !tidy { engine.vocab_size(true) } else { 0 };
        let pieces = (0..pieces).map(|_| OnceLock::new()).collect();
        let (special, texts, fingerprint) = (engine.special(), OnceLock::new(), OnceLock::new());
        Self { shared: Arc::new(Shared { engine, languages, named, special, texts, pieces, fingerprint, tidy }) }
    }
}

/// A tokenizer of one's own. It has no bos, eos and pad, for a checkpoint names these in other files.
impl From<tokenizers::Tokenizer> for Tokenizer {
    fn from(inner: tokenizers::Tokenizer) -> Self {
        Self::new(Engine::Tokenizers(Box::new(inner)), None, BTreeMap::new(), false)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).field("named", &self.shared.named).finish_non_exhaustive()
    }
}

/// A pre-tokenizer that puts a space before a text, or does not.
fn prefixed(cut: PreTokenizerWrapper, prefix: bool) -> PreTokenizerWrapper {
    match cut {
        PreTokenizerWrapper::ByteLevel(mut bytes) => {
            bytes.add_prefix_space = prefix;
            bytes.into()
        }
        PreTokenizerWrapper::Sequence(mut cuts) => {
            for cut in cuts.as_mut() {
                *cut = prefixed(cut.clone(), prefix);
            }
            cuts.into()
        }
        other => other,
    }
}

/// Runs work of `tokenizers`, which indexes by what its file says and so panics where the file contradicts itself.
pub(super) fn guard<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
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

    const STORYTELLER: &str = "examples/models/storyteller";

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
        let date = Tokenizer::from_folder("examples/models/date-normaliser").unwrap().unwrap();
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
        let date = Tokenizer::from_folder("examples/models/date-normaliser").unwrap().unwrap();
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

    /// Words with spaces between them, in a folder that asks for tidy text.
    fn words(words: &[&str], config: &str) -> Tokenizer {
        let vocab: serde_json::Map<_, _> = words.iter().enumerate().map(|(id, word)| (word.to_string(), json!(id))).collect();
        let model = json!({"type": "WordLevel", "vocab": vocab, "unk_token": words[0]});
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), json!({"version": "1.0", "added_tokens": [], "model": model}).to_string()).unwrap();
        fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        Tokenizer::from_folder(folder.path()).unwrap().unwrap()
    }

    #[test]
    fn text_is_tidied_where_the_config_says_so_but_not_after_bpe() {
        let config = r#"{"clean_up_tokenization_spaces": true}"#;
        let all = ["do", "n't", ".", "'", "'ve", "s", "n"];
        let (tidy, plain) = (words(&all, config), words(&all, "{}"));
        // Of transformers 5.23.0.
        assert_eq!(tidy.decode(&[0, 1, 3, 5, 4, 2, 6], true).unwrap(), "don't's've. n");
        assert_eq!(plain.decode(&[0, 1, 3, 5, 4, 2, 6], true).unwrap(), "do n't ' s 've . n");
        for number in 0..7u32.pow(4) {
            let ids = [number % 7, number / 7 % 7, number / 49 % 7, number / 343];
            let mut stream = super::super::Detokenizer::new(&tidy, &[]).unwrap();
            let pieces: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            assert_eq!(pieces + &stream.finish().unwrap(), tidy.decode(&ids, true).unwrap(), "{ids:?}");
        }
        let text = |config: &str| {
            let folder = changed(|_| {});
            fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
            let tokenizer = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
            tokenizer.decode(&tokenizer.encode("a . b", false).unwrap(), true).unwrap()
        };
        assert_eq!(text(config), "a . b");
        let insisting =
            r#"{"clean_up_tokenization_spaces": true, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": true}"#;
        assert_eq!(text(insisting), "a. b");
    }

    #[test]
    fn of_the_flags_two_classes_obey_the_prefix_and_tokenizer_json_nothing_else() {
        let encoded = |config: Value| {
            let folder = changed(|_| {});
            fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
            let tokenizer = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
            (tokenizer.encode("time", true).unwrap(), tokenizer.encode(" time", true).unwrap())
        };
        let flags = json!({"add_prefix_space": true, "add_bos_token": false, "add_eos_token": true, "eos_token": "<|eos|>"});
        let (without, with) = encoded(json!({}));
        assert_ne!(without, with);
        assert_eq!(encoded(flags.clone()), (without, with.clone()));
        let mut flags = flags;
        flags["tokenizer_class"] = "GPT2Tokenizer".into();
        assert_eq!(encoded(flags), (with.clone(), with));
    }

    // Of transformers 5.23.0.
    const ENCODED: [u32; 6] = [1, 1673, 332, 660, 264, 547];
}
