//! vocab.json with merges.txt gives the ids and texts of transformers: the folders made by tokenizers/make.py.
#![allow(clippy::unwrap_used, clippy::panic)]

use candle_generate::{Tokenizer, text::Detokenizer};
use std::{fs, path::PathBuf};

#[derive(serde::Deserialize)]
struct Line {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

fn check(name: &str, lines: usize) -> Tokenizer {
    let folder: PathBuf = ["tests/tokenizers", name].iter().collect();
    let tokenizer = Tokenizer::from_folder(&folder).unwrap().unwrap();
    let file = fs::read_to_string(folder.join("lines.jsonl")).unwrap();
    assert_eq!(file.lines().count(), lines);
    for line in file.lines() {
        let Line { text, ids, decoded } = serde_json::from_str(line).unwrap();
        assert_eq!(tokenizer.encode(&text, true).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), decoded, "{text:?}");
        let mut stream = Detokenizer::new(&tokenizer, &[]).unwrap();
        let pieces: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces + &stream.finish().unwrap(), decoded, "{text:?} streamed");
    }
    tokenizer
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
