//! Tokenizers older than tokenizer.json: byte-level BPE from vocab.json and merges.txt, as their class puts it together.

use super::{
    special::{content, object, read},
    tokenizer::guard,
};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path};
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

/// How Qwen2Tokenizer cuts a text, which no file says.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The roles of special tokens, in the order in which tokens that the vocabulary lacks are appended to it.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The classes that read these two files.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Class {
    Gpt2,
    Qwen2,
}

impl Class {
    /// The class that a checkpoint names, or else that of its family.
    pub fn of(folder: &Path, config: &Map<String, Value>) -> Result<Option<Self>> {
        if let Some(name) = config.get("tokenizer_class").and_then(Value::as_str) {
            return Ok(match name.trim_end_matches("Fast") {
                "GPT2Tokenizer" => Some(Self::Gpt2),
                "Qwen2Tokenizer" => Some(Self::Qwen2),
                _ => None,
            });
        }
        let model = object(&folder.join("config.json"))?.unwrap_or_default();
        Ok(match model.get("model_type").and_then(Value::as_str) {
            Some("codegen" | "gpt2" | "gpt_neo" | "gptj" | "opt" | "phi" | "starcoder2") => Some(Self::Gpt2),
            Some("qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe") => Some(Self::Qwen2),
            _ => None,
        })
    }

    /// The roles that a class fills with `<|endoftext|>` where no file says anything of them.
    fn defaults(self) -> [&'static str; 3] {
        match self {
            Self::Gpt2 => ["bos_token", "eos_token", "unk_token"],
            Self::Qwen2 => ["eos_token", "unk_token", "pad_token"],
        }
    }

    fn pre_tokenizer(self, prefix: bool) -> Value {
        let bytes = |regex| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex});
        match self {
            Self::Gpt2 => bytes(true),
            Self::Qwen2 => {
                let split = json!({"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false});
                json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
            }
        }
    }
}

/// Reads the two files, and the special tokens by role that the class gives besides those that files name; none if the
/// files are not there or are those of another class.
pub(super) fn open(folder: &Path) -> Result<Option<(Tokenizer, BTreeMap<String, String>)>> {
    let (path, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    let (Some(vocab), Some(lines)) = (object(&path)?, read(&merges)?) else { return Ok(None) };
    let lines = String::from_utf8(lines).map_err(|error| Error::load(&merges, error))?;
    let config = object(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let Some(class) = Class::of(folder, &config)? else { return Ok(None) };
    let mut config = settings(folder, &config)?;
    let mut named = BTreeMap::new();
    for role in class.defaults() {
        if !config.contains_key(role) {
            config.insert(role.into(), "<|endoftext|>".into());
            named.insert(role.to_owned(), "<|endoftext|>".to_owned());
        }
    }

    let merged: Vec<&str> = lines.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()).collect();
    let file = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": (class == Class::Qwen2).then(|| json!({"type": "NFC"})),
        "pre_tokenizer": class.pre_tokenizer(flag(&config, "add_prefix_space")),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merged},
    });
    let mut inner = guard(|| Tokenizer::from_bytes(file.to_string())).map_err(|reason| Error::load(&path, reason))?;
    // HF: tokens are numbered in this order after the vocabulary, whatever ids the files give them.
    let tokens = added(folder, &config, class == Class::Qwen2)?;
    guard(|| inner.add_tokens(tokens)).map_err(|reason| Error::load(&path, reason))?;
    if let Some(frame) = frame(&inner, &config) {
        let frame: PostProcessorWrapper = serde_json::from_value(frame).map_err(|error| Error::load(&path, error))?;
        inner.with_post_processor(Some(frame));
    }
    Ok(Some((inner, named)))
}

pub(super) fn flag(config: &Map<String, Value>, name: &str) -> bool {
    config.get(name) == Some(&Value::Bool(true))
}

/// The config with what special_tokens_map.json says, where that file counts.
pub(super) fn settings(folder: &Path, config: &Map<String, Value>) -> Result<Map<String, Value>> {
    let mut config = config.clone();
    if !config.contains_key("added_tokens_decoder") {
        config.extend(object(&folder.join("special_tokens_map.json"))?.unwrap_or_default());
    }
    Ok(config)
}

/// The tokens that stand outside of the model: those with ids of their own, then special ones by role, then further ones. With `plain`,
/// special ones match by their names alone.
pub(super) fn added(folder: &Path, config: &Map<String, Value>, plain: bool) -> Result<Vec<AddedToken>> {
    let path = folder.join("tokenizer_config.json");
    let specials = specials(&path, config)?;
    let mut numbered: Vec<(u64, AddedToken)> = Vec::new();
    if let Some(Value::Object(tokens)) = config.get("added_tokens_decoder") {
        for (id, value) in tokens {
            let number =
                id.parse().map_err(|_| Error::load(&path, format!("added_tokens_decoder has the id {id:?}; a number is accepted")))?;
            numbered.push((number, token(&path, id, value, false)?));
        }
    } else {
        let path = folder.join("added_tokens.json");
        for (text, id) in object(&path)?.unwrap_or_default() {
            let number = id.as_u64().ok_or_else(|| Error::load(&path, format!("{text:?} has the id {id}; a number is accepted")))?;
            let special = specials.iter().any(|token| token.content == text);
            numbered.push((number, AddedToken::from(text, special).normalized(!special)));
        }
    }
    numbered.sort_by_key(|(id, _)| *id);
    let mut tokens: Vec<AddedToken> = numbered.into_iter().map(|(_, token)| token).collect();
    for mut special in specials {
        // HF: Qwen2Tokenizer adds its special tokens once more, by their names alone, which undoes how files match them.
        if plain {
            special = AddedToken::from(special.content, true);
        }
        match tokens.iter_mut().find(|token| token.content == special.content) {
            Some(token) if plain => *token = special,
            // HF: with added_tokens.json, additional special tokens of special_tokens_map.json are not special there, an
            // oversight that shows them in texts; here they are.
            Some(token) => token.special = true,
            None => tokens.push(special),
        }
    }
    Ok(tokens)
}

fn specials(path: &Path, config: &Map<String, Value>) -> Result<Vec<AddedToken>> {
    let own = config.keys().map(String::as_str).filter(|key| key.ends_with("_token") && !ROLES.contains(key));
    let mut tokens = Vec::new();
    for role in ROLES.into_iter().chain(own) {
        match config.get(role) {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(value) => tokens.push(token(path, role, value, true)?),
        }
    }
    for key in ["extra_special_tokens", "additional_special_tokens"] {
        match config.get(key) {
            Some(Value::Array(values)) => {
                for value in values {
                    tokens.push(token(path, key, value, true)?);
                }
            }
            Some(Value::Object(values)) => {
                for (role, value) in values {
                    tokens.push(token(path, role, value, true)?);
                }
            }
            _ => {}
        }
    }
    Ok(tokens)
}

/// A token as a file writes it, with how it is matched.
fn token(path: &Path, key: &str, value: &Value, special: bool) -> Result<AddedToken> {
    let text = content(path, key, value)?;
    let set = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = set("special").unwrap_or(special) || special;
    let token = AddedToken::from(text, special).single_word(set("single_word").unwrap_or(false));
    let token = token.lstrip(set("lstrip").unwrap_or(false)).rstrip(set("rstrip").unwrap_or(false));
    Ok(token.normalized(set("normalized").unwrap_or(!special)))
}

/// What add_bos_token and add_eos_token put around a text.
// HF: only these files obey the two; tokenizer.json says itself how a text is framed, and they are not looked at.
pub(super) fn frame(inner: &Tokenizer, config: &Map<String, Value>) -> Option<Value> {
    let token = |wanted: &str, role: &str| {
        let value = config.get(role).filter(|_| flag(config, wanted))?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((text.to_owned(), inner.token_to_id(text)?))
    };
    let (bos, eos) = (token("add_bos_token", "bos_token"), token("add_eos_token", "eos_token"));
    let piece = |(text, _): &(String, u32)| json!({"SpecialToken": {"id": text, "type_id": 0}});
    let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let around = |name| [bos.as_ref().map(piece), Some(sequence(name)), eos.as_ref().map(piece)].into_iter().flatten().collect::<Vec<_>>();
    let known: Map<_, _> =
        bos.iter().chain(&eos).map(|(text, id)| (text.clone(), json!({"id": text, "ids": [id], "tokens": [text]}))).collect();
    let pair = [around("A"), around("B")].concat();
    let frame = json!({"type": "TemplateProcessing", "single": around("A"), "pair": pair, "special_tokens": known});
    (bos.is_some() || eos.is_some()).then_some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let usual = [
            ("vocab.json", r#"{"a": 0, "b": 1, "ab": 2}"#),
            ("merges.txt", "#version: 0.2\na b\n"),
            ("config.json", r#"{"model_type": "gpt2"}"#),
        ];
        for (name, text) in usual.iter().chain(files) {
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn the_class_names_its_tokens_and_numbers_those_that_the_vocabulary_lacks() {
        let (tokenizer, named) = open(folder(&[]).path()).unwrap().unwrap();
        assert_eq!(tokenizer.encode_fast("ab<|endoftext|>", true).unwrap().get_ids(), [2, 3]);
        assert_eq!(named.keys().collect::<Vec<_>>(), ["bos_token", "eos_token", "unk_token"]);
        let silent = r#"{"bos_token": null, "eos_token": "</s>", "unk_token": null, "add_bos_token": true, "add_eos_token": true}"#;
        let (tokenizer, named) = open(folder(&[("tokenizer_config.json", silent)]).path()).unwrap().unwrap();
        assert_eq!(tokenizer.encode_fast("b", true).unwrap().get_ids(), [1, 3], "there is no beginning to add");
        assert!(named.is_empty());
    }

    #[test]
    fn other_classes_and_half_a_pair_are_no_tokenizer() {
        assert!(open(folder(&[("tokenizer_config.json", r#"{"tokenizer_class": "RobertaTokenizer"}"#)]).path()).unwrap().is_none());
        assert!(open(folder(&[("config.json", r#"{"model_type": "llama"}"#)]).path()).unwrap().is_none());
        let half = folder(&[]);
        fs::remove_file(half.path().join("merges.txt")).unwrap();
        assert!(open(half.path()).unwrap().is_none());
    }

    #[test]
    fn damage_names_the_file() {
        for (file, text, part) in [
            ("vocab.json", r#"{"a": -1}"#, "vocab.json"),
            ("vocab.json", r#"["a"]"#, "vocab.json"),
            ("merges.txt", "a c", "vocab.json"),
            ("merges.txt", "a b c", "vocab.json"),
            ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "y"}}}"#, r#"the id "x"; a number is accepted"#),
            ("tokenizer_config.json", r#"{"eos_token": 5}"#, "eos_token = 5"),
            ("added_tokens.json", r#"{"x": "y"}"#, r#""x" has the id "y"; a number is accepted"#),
        ] {
            let error = open(folder(&[(file, text)]).path()).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
