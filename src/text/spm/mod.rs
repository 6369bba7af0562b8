//! Tokenizers older than tokenizer.json: SentencePiece models, as the class of a checkpoint puts them to use.

mod codes;
mod fast;
mod model;
mod normal;
mod proto;
mod slow;

pub(super) use slow::{Slow, is_space};

use super::{
    engine::Engine,
    files::{self, flag},
    language::{Form, Languages},
    special::{object, read},
};
use crate::error::{Error, Result};
use model::Model;
use proto::Proto;
use serde_json::{Map, Value};
use slow::Voice;
use std::{collections::BTreeMap, path::Path, sync::Arc};
use tokenizers::AddedToken;

/// The model types whose tokenizer.model the reference reads in one way, whatever class they name.
const PLAIN: [&str; 22] = [
    "arctic",
    "ernie4_5",
    "ernie4_5_moe",
    "fuyu",
    "internlm2",
    "internlm3",
    "jamba",
    "llava",
    "llava_next",
    "minicpm3",
    "ministral",
    "ministral3",
    "mistral",
    "mistral3",
    "mixtral",
    "nemotron",
    "persimmon",
    "phi3",
    "phi3_v",
    "phimoe",
    "pixtral",
    "vipllava",
];

/// The classes that read SentencePiece models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    T5,
    MBart,
    MBart50,
    Nllb,
    Pegasus,
    Llama,
    Gemma,
    /// What the reference makes of a model when no class fits.
    Plain,
    Marian,
    M2m100,
}

/// A tokenizer, and what its class says besides the files.
pub(super) struct Opened {
    pub engine: Engine,
    /// Special tokens by role, where no file names them.
    pub named: BTreeMap<String, String>,
    pub languages: Option<Languages>,
}

impl Class {
    /// The class that a checkpoint names, or else that of its family; none for the one class that reads such models and is not here.
    pub fn of(folder: &Path, config: &Map<String, Value>) -> Result<Option<Self>> {
        let model = object(&folder.join("config.json"))?.unwrap_or_default();
        let text = |object: &Map<String, Value>, key: &str| object.get(key).and_then(Value::as_str).map(str::to_owned);
        let family = text(&model, "model_type").unwrap_or_default();
        let name = text(config, "tokenizer_class").or_else(|| text(&model, "tokenizer_class")).unwrap_or_default();
        Ok(Some(match (name.trim_end_matches("Fast"), family.as_str()) {
            ("CodeLlamaTokenizer", _) => return Ok(None),
            (_, family) if PLAIN.contains(&family) => Self::Plain,
            ("T5Tokenizer" | "MT5Tokenizer", _) | ("", "mt5" | "switch_transformers" | "t5" | "umt5") => Self::T5,
            ("MBartTokenizer", _) | ("", "mbart") => Self::MBart,
            ("MBart50Tokenizer", _) => Self::MBart50,
            ("NllbTokenizer", _) | ("", "nllb" | "nllb-moe") => Self::Nllb,
            ("M2M100Tokenizer", _) | ("", "m2m_100") => Self::M2m100,
            ("MarianTokenizer", _) | ("", "marian") => Self::Marian,
            ("PegasusTokenizer", _) | ("", "pegasus") => Self::Pegasus,
            ("LlamaTokenizer", _) => Self::Llama,
            ("GemmaTokenizer", _) | ("", "gemma" | "gemma2" | "gemma3" | "gemma3_text" | "recurrent_gemma") => Self::Gemma,
            _ => Self::Plain,
        }))
    }

    /// The file of the model.
    fn file(self) -> &'static str {
        match self {
            Self::T5 | Self::Pegasus => "spiece.model",
            Self::MBart | Self::MBart50 | Self::Nllb | Self::M2m100 => "sentencepiece.bpe.model",
            Self::Llama | Self::Gemma | Self::Plain => "tokenizer.model",
            Self::Marian => "source.spm",
        }
    }

    /// The special tokens of roles that no file speaks of.
    fn roles(self) -> &'static [(&'static str, &'static str)] {
        const ENDS: [(&str, &str); 3] = [("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")];
        match self {
            Self::T5 | Self::Marian => &ENDS,
            Self::Pegasus => &[ENDS[0], ENDS[1], ENDS[2], ("mask_token", "<mask_2>")],
            Self::MBart | Self::Nllb => {
                &[("bos_token", "<s>"), ENDS[0], ENDS[1], ("sep_token", "</s>"), ENDS[2], ("cls_token", "<s>"), ("mask_token", "<mask>")]
            }
            Self::MBart50 => &[ENDS[0], ENDS[1], ("sep_token", "</s>"), ENDS[2], ("cls_token", "<s>"), ("mask_token", "<mask>")],
            Self::M2m100 => &[("bos_token", "<s>"), ENDS[0], ENDS[1], ("sep_token", "</s>"), ENDS[2]],
            Self::Llama => &[("bos_token", "<s>"), ENDS[0], ENDS[1]],
            Self::Gemma => &[("bos_token", "<bos>"), ("eos_token", "<eos>"), ENDS[1], ENDS[2], ("mask_token", "<mask>")],
            Self::Plain => &[],
        }
    }

    /// The codes of its languages, in the order of their tokens.
    fn codes(self, config: &Map<String, Value>) -> Vec<&'static str> {
        let lists: &[&str] = match self {
            Self::MBart => &[codes::MBART],
            Self::MBart50 => &[codes::MBART, codes::MBART50],
            Self::Nllb => &[codes::NLLB],
            Self::M2m100 if config.get("language_codes").and_then(Value::as_str) == Some("wmt21") => &[codes::WMT21],
            Self::M2m100 => &[codes::M2M100],
            _ => &[],
        };
        lists.iter().flat_map(|list| list.split(' ')).collect()
    }

    /// The languages among the tokens that `id` knows; none if there are none.
    pub fn languages(self, config: &Map<String, Value>, path: &Path, id: impl Fn(&str) -> Option<u32>) -> Result<Option<Languages>> {
        let (form, usual) = match self {
            Self::MBart => (Form::Last, "en_XX"),
            Self::MBart50 => (Form::First, "en_XX"),
            Self::Nllb if flag(config, "legacy_behaviour") => (Form::Last, "eng_Latn"),
            Self::Nllb => (Form::First, "eng_Latn"),
            Self::M2m100 => (Form::First, "en"),
            _ => return Ok(None),
        };
        let token = |code: &str| if self == Self::M2m100 { format!("__{code}__") } else { code.to_owned() };
        let codes: Vec<_> = self.codes(config).into_iter().filter_map(|code| Some((code.to_owned(), id(&token(code))?))).collect();
        let eos = role(config, "eos_token").and_then(|token| id(&token)).or_else(|| id("</s>"));
        let Some(eos) = eos.filter(|_| !codes.is_empty()) else { return Ok(None) };
        let mut languages = Languages { form, codes, source: None, eos };
        let code = config.get("src_lang").and_then(Value::as_str).unwrap_or(usual);
        languages.source = languages.id(code);
        match languages.source {
            // HF: an unknown code there becomes the unknown token; here it is an error that lists those that there are.
            None => Err(Error::load(path, format!("src_lang = {code:?}; accepted is one of {}", languages.list()))),
            Some(_) => Ok(Some(languages)),
        }
    }
}

/// Reads the model that the class of a checkpoint has; none if it is not there.
pub(super) fn open(folder: &Path, config: &Map<String, Value>) -> Result<Option<Opened>> {
    let Some(class) = Class::of(folder, config)? else { return Ok(None) };
    let path = folder.join(class.file());
    let Some(proto) = proto(&path)? else { return Ok(None) };
    let mut config = files::settings(folder, config)?;
    let own = match class {
        Class::Plain => [("bos_token", proto.bos_id, &proto.bos_piece), ("eos_token", proto.eos_id, &proto.eos_piece)]
            .into_iter()
            .chain([("unk_token", proto.unk_id, &proto.unk_piece)])
            .filter(|(_, id, _)| *id >= 0)
            .map(|(role, _, piece)| (role.to_owned(), piece.clone()))
            .collect(),
        _ => class.roles().iter().map(|&(role, token)| (role.to_owned(), token.to_owned())).collect::<Vec<_>>(),
    };
    let mut named = BTreeMap::new();
    for (role, token) in own {
        if !config.contains_key(&role) {
            config.insert(role.clone(), token.clone().into());
            named.insert(role, token);
        }
    }
    let (engine, languages) = match class {
        Class::Marian => marian(folder, &config, proto)?,
        Class::M2m100 => m2m100(folder, &config, proto)?,
        _ => {
            let (mut inner, frame) = fast::build(class, &proto, folder, &config, &path)?;
            let languages = class.languages(&config, &folder.join("tokenizer_config.json"), |token| inner.token_to_id(token))?;
            if languages.is_none() {
                inner.with_post_processor(frame);
            }
            (Engine::Tokenizers(Box::new(inner)), languages)
        }
    };
    Ok(Some(Opened { engine, named, languages }))
}

/// A model's file; none if there is no such file.
fn proto(path: &Path) -> Result<Option<Proto>> {
    read(path)?.map(|bytes| Proto::read(&bytes).map_err(|reason| Error::load(path, reason))).transpose()
}

/// The token of a role.
fn role(config: &Map<String, Value>, role: &str) -> Option<String> {
    config.get(role).and_then(|value| value.as_str().or_else(|| value.get("content")?.as_str())).map(str::to_owned)
}

fn vocabulary(path: &Path) -> Result<Map<String, Value>> {
    object(path)?.ok_or_else(|| Error::load(path, "there is no such file; the ids of a model's pieces are accepted in it"))
}

fn build(path: &Path, proto: Proto) -> Result<Arc<Model>> {
    Model::new(proto).map(Arc::new).map_err(|reason| Error::load(path, reason))
}

/// One language's model for prompts, another's for results; one vocabulary for both unless `separate_vocabs` says otherwise.
fn marian(folder: &Path, config: &Map<String, Value>, proto: Proto) -> Result<(Engine, Option<Languages>)> {
    let path = folder.join("target.spm");
    let written =
        self::proto(&path)?.ok_or_else(|| Error::load(&path, "there is no such file; the model of the target language is accepted"))?;
    let (read, written) = (build(&folder.join("source.spm"), proto)?, build(&path, written)?);
    let unk = role(config, "unk_token").unwrap_or_default();
    let path = folder.join("vocab.json");
    let source = Voice::new(read.clone(), vocabulary(&path)?, &[], &unk, &path)?;
    let separate = flag(config, "separate_vocabs");
    let (target, writer) = if separate {
        let path = folder.join("target_vocab.json");
        (Voice::new(written.clone(), vocabulary(&path)?, &[], &unk, &path)?, written)
    } else {
        // HF: with one vocabulary for both, pieces are written as the source's model does it.
        (Voice { model: written, ..source.clone() }, read)
    };
    let codes = source.ids.iter().filter(|_| !separate);
    let mut codes: Vec<_> = codes.filter_map(|(token, &id)| Some((token.strip_prefix(">>")?.strip_suffix("<<")?.to_owned(), id))).collect();
    codes.sort_unstable();
    let slow = Slow::new(source, target, writer, true, files::added(folder, config, false)?);
    let eos = role(config, "eos_token").and_then(|token| slow.id(&token));
    let eos = eos.ok_or_else(|| Error::load(&path, "it lacks the end token; a vocabulary with it is accepted"))?;
    Ok((Engine::Sentencepiece(slow), Some(Languages { form: Form::Target, codes, source: None, eos })))
}

/// One model for all languages, whose tokens are numbered behind the vocabulary.
fn m2m100(folder: &Path, config: &Map<String, Value>, proto: Proto) -> Result<(Engine, Option<Languages>)> {
    let model = build(&folder.join(Class::M2m100.file()), proto)?;
    let path = folder.join("vocab.json");
    let unk = role(config, "unk_token").unwrap_or_default();
    let codes: Vec<_> = Class::M2m100.codes(config).into_iter().map(|code| format!("__{code}__")).collect();
    let voice = Voice::new(model.clone(), vocabulary(&path)?, &codes, &unk, &path)?;
    let mut added = files::added(folder, config, false)?;
    // HF: they are special there only where special_tokens_map.json lists them; otherwise they show in texts.
    added.extend(codes.into_iter().map(|token| AddedToken::from(token, true)));
    let slow = Slow::new(voice.clone(), voice, model, false, added);
    let languages = Class::M2m100.languages(config, &folder.join("tokenizer_config.json"), |token| slow.id(token))?;
    Ok((Engine::Sentencepiece(slow), languages))
}

#[cfg(test)]
mod tests {
    use crate::text::{Direction, Tokenizer, case};
    use serde_json::{Value, json};
    use std::{fs, path::Path};

    fn model(name: &str) -> Vec<u8> {
        fs::read(Path::new("tests/tokenizers/spm").join(name)).unwrap()
    }

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    #[test]
    fn tokenizer_json_follows_the_source_language_too() {
        let vocab = json!({"<unk>": 0, "</s>": 1, "hi": 2, "en_XX": 3, "de_DE": 4});
        let template = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "en_XX", "type_id": 0}}]);
        let file = |vocab: &Value| {
            let known = json!({"en_XX": {"id": "en_XX", "ids": [3], "tokens": ["en_XX"]}});
            let frame = json!({"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": known});
            let model = json!({"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"});
            json!({"version": "1.0", "added_tokens": [], "post_processor": frame, "model": model}).to_string()
        };
        let open = |vocab: &Value, config: Value| {
            let files = [("tokenizer.json", file(vocab)), ("tokenizer_config.json", config.to_string())];
            Tokenizer::from_folder(folder(&files.each_ref().map(|(name, text)| (*name, text.as_bytes()))).path())
        };
        let encode = |config| open(&vocab, config).unwrap().unwrap().encode("hi", true).unwrap();
        assert_eq!(encode(json!({"tokenizer_class": "MBartTokenizerFast"})), [2, 1, 3]);
        assert_eq!(encode(json!({"tokenizer_class": "MBartTokenizer", "src_lang": "de_DE"})), [2, 1, 4]);
        assert_eq!(encode(json!({"tokenizer_class": "MBart50Tokenizer", "src_lang": "de_DE"})), [4, 2, 1]);
        assert_eq!(encode(json!({"tokenizer_class": "T5Tokenizer"})), [2, 3], "as the file says");
        let error = open(&vocab, json!({"tokenizer_class": "MBartTokenizer", "src_lang": "de"})).err().unwrap().to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains("\"de\"; accepted is one of de_DE, en_XX"), "{error}");
        let without = open(&json!({"<unk>": 0, "hi": 2}), json!({"tokenizer_class": "MBartTokenizer"})).unwrap().unwrap();
        assert_eq!((without.encode("hi", true).unwrap(), without.languages()), (vec![2, 3], vec![]));
    }

    #[test]
    fn prompts_and_results_may_have_vocabularies_of_their_own() {
        let tokenizer = case("marian-separate");
        let (read, written) = (tokenizer.encode("the house", false).unwrap(), tokenizer.encode_target("the house").unwrap());
        assert_ne!(read, written);
        assert_eq!(tokenizer.decode(&written, true).unwrap(), "the house");
        assert_eq!(tokenizer.variants("house").unwrap()[0], tokenizer.encode_target("house").unwrap());
        let framed = tokenizer.encode_as("the house", true, Direction::default()).unwrap();
        assert_eq!(framed, [&read[..], &[tokenizer.eos().unwrap()]].concat());
        assert!(tokenizer.is_special(tokenizer.unk().unwrap()) && tokenizer.pad() == Some(2));
        let space = tokenizer.id("▁").unwrap();
        assert!(tokenizer.extensions("▁").contains(&space) && tokenizer.texts().len() == tokenizer.vocab_size());
        assert!(tokenizer.same_vocabulary(&case("marian-separate")) && !tokenizer.same_vocabulary(&case("marian")));
    }

    #[test]
    fn pegasus_and_nllb_have_the_ids_of_their_weights() {
        let pegasus = case("pegasus");
        let ids = ["<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk_2>", "<unk_102>", "<unk>"].map(|token| pegasus.id(token));
        assert_eq!(ids, [0, 1, 2, 3, 4, 104, 105].map(Some));
        let nllb = case("nllb");
        let first = nllb.id("ace_Arab").unwrap();
        assert_eq!((nllb.language("zul_Latn"), nllb.id("<mask>")), (Some(first + 201), Some(first + 202)));
    }

    #[test]
    fn damage_names_the_file() {
        let unigram = model("unigram.model");
        let config = |family: &str| format!("{{\"model_type\": \"{family}\"}}").into_bytes();
        let (t5, marian, m2m100) = (config("t5"), config("marian"), config("m2m_100"));
        let vocab = br#"{"<unk>": 0, "</s>": 1}"#;
        // The trie claims 4 GB, behind pieces that are right.
        let mut map = unigram.clone();
        map.extend(b"\x1A\x07\x12\x05\xFC\xFF\xFF\xFF\0");
        type Files<'a> = &'a [(&'a str, &'a [u8])];
        let cases: [(Files<'_>, &str); 10] = [
            (&[("config.json", &t5), ("spiece.model", &unigram[..unigram.len() - 3])], "spiece.model: "),
            (&[("config.json", &t5), ("spiece.model", b"")], "spiece.model: it has no pieces"),
            (&[("config.json", &t5), ("spiece.model", &map)], "character map claims"),
            (&[("config.json", &t5), ("spiece.model", &unigram), ("tokenizer_config.json", br#"{"extra_ids": 1e12}"#)], "extra_ids = "),
            (&[("config.json", &marian), ("source.spm", &unigram)], "target.spm: there is no such file"),
            (&[("config.json", &marian), ("source.spm", &unigram), ("target.spm", &unigram)], "vocab.json: there is no such file"),
            (
                &[("config.json", &marian), ("source.spm", &unigram), ("target.spm", &map), ("vocab.json", vocab)],
                "target.spm: the character map",
            ),
            (
                &[("config.json", &m2m100), ("sentencepiece.bpe.model", &unigram), ("vocab.json", br#"{"a": 0}"#)],
                "the unknown token \"<unk>\"",
            ),
            (&[("config.json", &m2m100), ("sentencepiece.bpe.model", &unigram), ("vocab.json", br#"{"a": -1}"#)], "\"a\" has the id -1"),
            (&[("config.json", &config("llama")), ("tokenizer.model", b"IlRoZSI= 0\n")], "tokenizer.model: "),
        ];
        for (files, part) in cases {
            let error = Tokenizer::from_folder(folder(files).path()).err().unwrap();
            assert!(error.kind() == "load" && error.to_string().contains(part), "{error}");
        }
        assert!(Tokenizer::from_folder(folder(&[("config.json", &t5), ("source.spm", &unigram)]).path()).unwrap().is_none());
    }

    #[test]
    fn a_damaged_model_never_panics() {
        let unigram = model("unigram.model");
        let config = br#"{"model_type": "t5"}"#;
        for step in 0..60 {
            let mut bytes = unigram.clone();
            let at = (step * 7919 + 13) % bytes.len();
            bytes[at] ^= 1 << (step % 8);
            if let Ok(Some(tokenizer)) = Tokenizer::from_folder(folder(&[("config.json", config), ("spiece.model", &bytes)]).path()) {
                let _ = tokenizer.encode("the ﬁrst house Ａ", true).map(|ids| tokenizer.decode(&ids, true));
            }
        }
    }
}
