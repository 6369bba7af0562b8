//! The special tokens that a checkpoint's files name.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fs, io, path::Path};

/// What tokenizer_config.json and special_tokens_map.json say about special tokens.
#[derive(Debug, Default)]
pub(super) struct Special {
    /// By role: `bos_token`, `eos_token`, `image_token`, ...
    pub named: BTreeMap<String, String>,
    /// Further ones, without a role.
    pub extra: Vec<String>,
}

impl Special {
    pub(super) fn from_folder(folder: &Path) -> Result<Self> {
        let mut special = Self::default();
        let path = folder.join("tokenizer_config.json");
        let config = object(&path)?.unwrap_or_default();
        special.extend(&path, &config)?;
        // HF: special_tokens_map.json is the older file; it is read only where the config does not hold the added
        // tokens itself, and wins then.
        if !config.contains_key("added_tokens_decoder") {
            let path = folder.join("special_tokens_map.json");
            special.extend(&path, &object(&path)?.unwrap_or_default())?;
        }
        Ok(special)
    }

    fn extend(&mut self, path: &Path, file: &Map<String, Value>) -> Result<()> {
        for (key, value) in file {
            match (key.as_str(), value) {
                (_, Value::Null | Value::Bool(_)) => {}
                ("additional_special_tokens" | "extra_special_tokens", Value::Array(tokens)) => {
                    for token in tokens {
                        self.extra.push(content(path, key, token)?);
                    }
                }
                ("extra_special_tokens", Value::Object(tokens)) => {
                    for (role, token) in tokens {
                        self.named.insert(role.clone(), content(path, role, token)?);
                    }
                }
                (role, token) if role.ends_with("_token") => {
                    self.named.insert(key.clone(), content(path, role, token)?);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A token is written as a string, or as an object that also says how it is matched.
pub(super) fn content(path: &Path, key: &str, token: &Value) -> Result<String> {
    token
        .as_str()
        .or_else(|| token.get("content")?.as_str())
        .map(str::to_owned)
        .ok_or_else(|| Error::load(path, format!("{key} = {token}: a string, or an object with a string \"content\", would be accepted")))
}

/// The object that a JSON file holds; none if there is no such file.
pub(super) fn object(path: &Path) -> Result<Option<Map<String, Value>>> {
    read(path)?.map(|bytes| serde_json::from_slice(&bytes).map_err(|error| Error::load(path, error))).transpose()
}

/// A file's bytes; none if there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::load(path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn strings_objects_lists_and_roles_of_their_own() {
        let config = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null, "add_bos_token": true,
            "image_token": "<img>", "extra_special_tokens": ["<x>"], "model_max_length": 7}"#;
        let special = Special::from_folder(folder(&[("tokenizer_config.json", config)]).path()).unwrap();
        let named: Vec<_> = special.named.iter().map(|(role, token)| (role.as_str(), token.as_str())).collect();
        assert_eq!(named, [("bos_token", "<s>"), ("eos_token", "</s>"), ("image_token", "<img>")]);
        assert_eq!(special.extra, ["<x>"]);
    }

    #[test]
    fn the_older_file_wins_unless_the_config_holds_the_added_tokens() {
        let map = ("special_tokens_map.json", r#"{"eos_token": "<end>"}"#);
        let old = folder(&[("tokenizer_config.json", r#"{"eos_token": "</s>"}"#), map]);
        assert_eq!(Special::from_folder(old.path()).unwrap().named["eos_token"], "<end>");
        let new = folder(&[("tokenizer_config.json", r#"{"eos_token": "</s>", "added_tokens_decoder": {}}"#), map]);
        assert_eq!(Special::from_folder(new.path()).unwrap().named["eos_token"], "</s>");
    }

    #[test]
    fn damage_names_the_file_and_the_token() {
        let cases = [(r#"{"eos_token": 5}"#, "eos_token = 5"), (r#"["eos"]"#, "map"), (r#"{"eos"#, "EOF")];
        for (text, expected) in cases {
            let error = Special::from_folder(folder(&[("tokenizer_config.json", text)]).path()).unwrap_err();
            assert_eq!(error.kind(), "load");
            let message = error.to_string();
            assert!(message.contains("tokenizer_config.json") && message.contains(expected), "{message}");
        }
    }
}
