//! Tokenizers older than tokenizer.json: SentencePiece models, as the class of a checkpoint puts them to use.

mod codes;
mod fast;
mod model;
mod normal;
mod proto;
mod slow;

pub(super) use slow::Slow;

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
    /// The class that a checkpoint names, or else that of its family.
    pub fn of(folder: &Path, config: &Map<String, Value>) -> Result<Self> {
        let model = object(&folder.join("config.json"))?.unwrap_or_default();
        let text = |object: &Map<String, Value>, key: &str| object.get(key).and_then(Value::as_str).map(str::to_owned);
        let family = text(&model, "model_type").unwrap_or_default();
        let name = text(config, "tokenizer_class").or_else(|| text(&model, "tokenizer_class")).unwrap_or_default();
        Ok(match (name.trim_end_matches("Fast"), family.as_str()) {
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
        })
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
    let class = Class::of(folder, config)?;
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
