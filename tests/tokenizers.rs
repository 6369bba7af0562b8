//! Files older than tokenizer.json give the ids and texts of transformers: the folders made by tokenizers/make.py, and the SentencePiece
//! models made by tokenizers/spm.py.
#![allow(clippy::unwrap_used, clippy::panic)]

use candle_generate::{
    Tokenizer,
    text::{Detokenizer, Direction},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

#[derive(serde::Deserialize)]
struct Line {
    text: String,
    ids: Vec<u32>,
    decoded: String,
    src_lang: Option<String>,
    /// The text's ids as the model writes it, where they are not those that it reads.
    target: Option<Vec<u32>>,
}

fn check(name: &str, lines: usize) -> Tokenizer {
    let folder: PathBuf = ["tests/tokenizers", name].iter().collect();
    let tokenizer = Tokenizer::from_folder(&folder).unwrap().unwrap();
    assert_eq!(compare(&tokenizer, &folder.join("lines.jsonl")), (lines, 0));
    tokenizer
}

/// Compares a tokenizer with a file of lines, and tells the lines that differ: how many there are, and how many differ.
fn compare(tokenizer: &Tokenizer, path: &Path) -> (usize, usize) {
    let file = fs::read_to_string(path).unwrap();
    let differs = |line: &&str| {
        let Line { text, ids, decoded, src_lang, target } = serde_json::from_str(line).unwrap();
        let direction = Direction { src_lang: src_lang.map(|code| tokenizer.language(&code).unwrap()), ..Direction::default() };
        let encoded = tokenizer.encode_as(&text, true, direction).unwrap();
        let mut differs = (encoded != ids).then(|| format!("{text:?} has the ids {encoded:?}, not {ids:?}"));
        let mut ids = ids;
        if let Some(target) = target {
            let written = tokenizer.encode_target(&text).unwrap();
            let right = target.starts_with(&written) && target.len() == written.len() + 1;
            differs = differs.or_else(|| (!right).then(|| format!("{text:?} is written as {written:?}, not {target:?}")));
            ids = target;
        }
        let text = tokenizer.decode(&ids, true).unwrap();
        differs = differs.or_else(|| (text != decoded).then(|| format!("{ids:?} are {text:?}, not {decoded:?}")));
        let mut stream = Detokenizer::new(tokenizer, &[]).unwrap();
        let pieces = ids.iter().map(|&id| stream.push(id).unwrap()).collect::<String>() + &stream.finish().unwrap();
        // A replacement character of the text's own looks like a broken character, of which no more is shown than was decoded so far.
        let whole = pieces == decoded || decoded.contains(char::REPLACEMENT_CHARACTER);
        differs = differs.or_else(|| (!whole).then(|| format!("{ids:?} are streamed as {pieces:?}, not {decoded:?}")));
        if let Some(differs) = &differs {
            println!("{}: {differs}", path.display());
        }
        differs.is_some()
    };
    (file.lines().count(), file.lines().filter(differs).count())
}

/// Makes the checkpoint of a case of tokenizers/spm.py.
fn checkpoint(models: &Path, files: &BTreeMap<String, Value>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        match content {
            Value::String(model) => drop(fs::copy(models.join(model), folder.path().join(name)).unwrap()),
            json => fs::write(folder.path().join(name), json.to_string()).unwrap(),
        }
    }
    folder
}

type Cases = BTreeMap<String, BTreeMap<String, Value>>;

/// Compares every case of a folder made by tokenizers/spm.py.
fn sweep(models: &Path, lines: usize) {
    let cases: Cases = serde_json::from_slice(&fs::read(models.join("cases.json")).unwrap()).unwrap();
    assert!(cases.len() >= 15);
    let mut differing = Vec::new();
    for (name, files) in &cases {
        let tokenizer = Tokenizer::from_folder(checkpoint(models, files).path()).unwrap().unwrap();
        let (count, wrong) = compare(&tokenizer, &models.join(format!("{name}.jsonl")));
        assert_eq!(count, lines, "{name}");
        println!("{name}: {wrong} of {count} lines differ");
        differing.extend((wrong > 0).then_some(name));
    }
    assert!(differing.is_empty(), "{differing:?}");
}

fn spm() -> PathBuf {
    PathBuf::from("tests/tokenizers/spm")
}

#[test]
fn sentencepiece_models_give_the_ids_and_texts_of_their_classes() {
    sweep(&spm(), 123);
}

/// For the folder that `tokenizers/spm.py --full` makes, named by SPM_FOLDER.
#[test]
#[ignore = "needs a folder made by tests/tokenizers/spm.py --full"]
fn sentencepiece_models_on_ten_thousand_lines() {
    sweep(Path::new(&std::env::var("SPM_FOLDER").unwrap()), 10_000);
}

#[test]
fn gpt2_with_a_prefix_a_beginning_and_tokens_of_older_files() {
    let tokenizer = check("gpt2", 200);
    let id = |token| tokenizer.id(token).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(521), Some(520), Some(524)));
    assert!(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"].map(id).iter().all(|&id| tokenizer.is_special(id)));
    assert!(!tokenizer.is_special(id("<tool>")));
}

#[test]
fn qwen2_with_an_end_and_tokens_that_say_how_they_match() {
    let tokenizer = check("qwen2", 200);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad(), tokenizer.vocab_size()), (None, Some(522), Some(520), 525));
}

#[test]
fn the_family_says_the_class_where_no_file_does() {
    let tokenizer = check("family", 20);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (None, Some(520), Some(520)));
}
