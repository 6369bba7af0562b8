//! Encoder-decoder models from source to text.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_generate::{GenerationConfig, Generator};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A line of the date-normaliser's `reference.jsonl`.
#[derive(Deserialize)]
struct Reference {
    input: String,
    input_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    greedy_text: String,
    beam4_ids: Vec<u32>,
    beam4_score: f32,
}

/// A line of its `tests.jsonl`.
#[derive(Deserialize)]
struct Test {
    input: String,
    output: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/date-normaliser")
}

fn lines<T: for<'a> Deserialize<'a>>(name: &str) -> Vec<T> {
    let text = std::fs::read_to_string(folder().join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn dates_are_what_the_reference_makes_of_them() {
    let generator = Generator::from_pretrained(folder()).unwrap();
    let references: Vec<Reference> = lines("reference.jsonl");
    assert_eq!(references.len(), 24);
    let inputs: Vec<&str> = references.iter().map(|reference| reference.input.as_str()).collect();
    let greedy = generator.generate_batch(inputs.clone(), &GenerationConfig::greedy()).unwrap();
    let beams = generator.generate_batch(inputs, &GenerationConfig::beam(4)).unwrap();
    for (index, reference) in references.iter().enumerate() {
        assert_eq!(generator.encode(reference.input.as_str()).unwrap(), reference.input_ids);
        let (greedy, beam) = (&greedy.sequences[index], &beams.sequences[index]);
        assert_eq!(greedy.tokens, reference.greedy_ids[1..], "{}", reference.input);
        assert_eq!((&greedy.text, &greedy.full_text), (&reference.greedy_text, &reference.greedy_text));
        assert_eq!(beam.tokens, reference.beam4_ids[1..], "{}", reference.input);
        assert!((beam.score.unwrap() - reference.beam4_score).abs() < 1e-4, "{}: {:?}", reference.input, beam.score);
    }
}

#[test]
fn dates_that_were_held_out_are_all_right() {
    let generator = Generator::from_pretrained(folder()).unwrap();
    let tests: Vec<Test> = lines("tests.jsonl");
    assert_eq!(tests.len(), 20);
    for config in [GenerationConfig::greedy(), GenerationConfig::beam(3)] {
        let output = generator.generate_batch(tests.iter().map(|test| test.input.as_str()), &config).unwrap();
        let texts: Vec<&str> = output.sequences.iter().map(|sequence| sequence.text.as_str()).collect();
        assert_eq!(texts, tests.iter().map(|test| test.output.as_str()).collect::<Vec<_>>());
    }
}
