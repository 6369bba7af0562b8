//! Which of a repository's files make a checkpoint.

use crate::error::{Error, Result};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path},
};

/// The file without which there is no model.
pub(super) const CONFIG: &str = "config.json";

/// The forms in which weights are read, the best first: one of them is enough.
pub(super) const WEIGHTS: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// What a checkpoint may have besides, in files of small size.
const SMALL: [&str; 6] = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// What stands in for tokenizer.json where it is missing.
const OLDER: [&str; 8] = [
    "merges.txt",
    "sentencepiece.bpe.model",
    "source.spm",
    "spiece.model",
    "target.spm",
    "target_vocab.json",
    "tokenizer.model",
    "vocab.json",
];

const TEMPLATES: &str = "additional_chat_templates/";

/// The files to load among `names`: small ones first and the weights last, so that whoever has these has all.
pub(super) fn files<'a>(names: impl Iterator<Item = &'a String>) -> Result<Vec<String>, String> {
    let names: BTreeSet<&str> = names.map(String::as_str).collect();
    let weights = WEIGHTS.iter().find(|name| names.contains(*name));
    let (true, Some(weights)) = (names.contains(CONFIG), weights) else {
        let accepted = WEIGHTS.join(", ");
        return Err(format!("the repository lacks config.json or weights in a form that is read; accepted is one of {accepted}"));
    };
    let older = !names.contains("tokenizer.json");
    let wanted = |name: &&str| {
        SMALL.contains(name)
            || older && OLDER.contains(name)
            || name.strip_prefix(TEMPLATES).is_some_and(|name| name.ends_with(".jinja") && is_inside(name) && !name.contains('/'))
    };
    let small = names.iter().copied().filter(wanted);
    Ok([CONFIG].into_iter().chain(small).chain([*weights]).map(str::to_owned).collect())
}

/// Whether a file lists shards.
pub(super) fn is_index(name: &str) -> bool {
    name.ends_with(".index.json")
}

/// The shards that an index lists.
pub(super) fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(index).map_err(|error| Error::load(index, error))?;
    let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| Error::load(index, error))?;
    let shards: BTreeSet<_> = weight_map.into_values().collect();
    match shards.iter().find(|shard| !is_inside(shard)) {
        // An index comes from strangers: what it names must not be written elsewhere.
        Some(shard) => Err(Error::load(index, format!("shard {shard:?} is outside the folder"))),
        None => Ok(shards),
    }
}

/// Whether a name from a stranger stays in the folder that it is joined to, on any system.
pub(super) fn is_inside(name: &str) -> bool {
    let plain = |part| matches!(part, Component::Normal(_));
    !name.is_empty() && !name.contains(['\\', ':', '\0']) && Path::new(name).components().all(plain)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn picked(names: &[&str]) -> Result<Vec<String>, String> {
        files(names.iter().map(|name| name.to_string()).collect::<Vec<_>>().iter())
    }

    #[test]
    fn one_form_of_weights_and_the_files_that_are_read() {
        let mut names = vec!["README.md", "config.json", "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"];
        names.extend(["tokenizer.json", "vocab.json", "merges.txt", "additional_chat_templates/rag.jinja", "onnx/model.onnx"]);
        names.extend(["additional_chat_templates/../x.jinja", "additional_chat_templates/a.txt", "original/model.safetensors"]);
        assert_eq!(picked(&names).unwrap(), ["config.json", "additional_chat_templates/rag.jinja", "tokenizer.json", "model.safetensors"]);
        let older = ["config.json", "vocab.json", "merges.txt", "pytorch_model.bin", "pytorch_model.bin.index.json"];
        assert_eq!(picked(&older).unwrap(), ["config.json", "merges.txt", "vocab.json", "pytorch_model.bin"]);
    }

    #[test]
    fn no_config_or_no_weights_is_a_reason() {
        for names in [&["model.safetensors"][..], &["config.json", "model.gguf"], &[]] {
            assert!(picked(names).unwrap_err().ends_with("pytorch_model.bin, pytorch_model.bin.index.json"));
        }
    }

    #[test]
    fn shards_stay_in_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors.index.json");
        let read = |shard: &str| {
            let index = serde_json::json!({"weight_map": {"a": shard, "b": "model-2.safetensors", "c": "model-2.safetensors"}});
            std::fs::write(&path, index.to_string()).unwrap();
            shards(&path)
        };
        assert_eq!(
            read("x/model-1.safetensors").unwrap().into_iter().collect::<Vec<_>>(),
            ["model-2.safetensors", "x/model-1.safetensors"]
        );
        for shard in ["../x", "/etc/passwd", "", "a/../../b", "c:\\x", "..\\x"] {
            assert_eq!(
                read(shard).unwrap_err().to_string(),
                format!("cannot load {}: shard {shard:?} is outside the folder", path.display())
            );
        }
    }
}
