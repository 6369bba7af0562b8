//! What transformers' searches find is what this crate's find: the lines that golden/search.py wrote beside the checkpoints.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_generate::{FinishReason, GenerationConfig, Generator, Output, Prompt, Sequence};
use serde::Deserialize;
use serde_json::Value;
use std::{fs, path::Path};

/// The largest difference of a score, and above 1 the largest part of it: a negative `length_penalty` multiplies rounding errors.
const TOLERANCE: f32 = 1e-4;

/// A line of a file; search.py says what its fields are.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    input_ids: Vec<Vec<u32>>,
    generation_config: Value,
    sequences: Option<Vec<Vec<Vec<u32>>>>,
    finish: Option<Vec<Vec<String>>>,
    sequences_scores: Option<Vec<Vec<f32>>>,
    beam_indices: Option<Vec<Vec<Vec<usize>>>>,
    scores: Option<Vec<Vec<Top>>>,
    /// Whether the line is 4.55.4's, which writes the first of several end tokens for any of them.
    #[serde(skip)]
    old: bool,
}

/// The files of a folder.
const FILES: [&str; 4] = ["search.jsonl", "search-4.55.4.jsonl", "guidance.jsonl", "contrasts-4.55.4.jsonl"];

/// Ids with their values, best first.
type Top = Vec<(usize, f32)>;

#[test]
fn gpt2() {
    run_folder("gpt2", &FILES);
}

#[test]
fn llama() {
    run_folder("llama", &FILES);
}

#[test]
fn qwen2() {
    run_folder("qwen2", &FILES);
}

#[test]
fn gemma2() {
    run_folder("gemma2", &FILES[..3]);
}

#[test]
fn t5() {
    run_folder("t5", &FILES[..2]);
}

#[test]
fn bart() {
    run_folder("bart", &FILES[..2]);
}

#[test]
fn bart_with_a_legacy_config() {
    run_folder("bart-legacy", &FILES[..1]);
}

#[test]
fn marian() {
    run_folder("marian", &FILES[..1]);
}

/// Runs every case, as a batch and each prompt alone.
fn run_folder(name: &str, files: &[&str]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let generator = Generator::from_pretrained(&folder).unwrap();
    let (mut count, mut wrong) = (0, Vec::new());
    for &file in files {
        for line in fs::read_to_string(folder.join(file)).unwrap().lines() {
            let mut case: Case = serde_json::from_str(line).unwrap();
            case.old = file == "search-4.55.4.jsonl";
            count += 1;
            let found = [("batched", case.batched(&generator)), ("alone", case.alone(&generator))];
            wrong.extend(found.into_iter().filter_map(|(how, found)| Some(format!("{name}/{} {how}: {}", case.name, found.err()?))));
        }
    }
    println!("{name}: {count} cases");
    assert!(count > 0 && wrong.is_empty(), "{} of {count} differ from the reference:\n{}", wrong.len(), wrong.join("\n"));
}

impl Case {
    fn config(&self) -> GenerationConfig {
        let mut config = GenerationConfig::from_json(&self.generation_config).unwrap().output_scores(true);
        if let Some(ids) = config.unknown.shift_remove("negative_prompt_ids") {
            config = config.negative_prompt(serde_json::from_value::<Vec<u32>>(ids).unwrap());
        }
        config
    }

    /// The config of one prompt: of what has a value for each, its own.
    fn own(&self, prompt: usize) -> GenerationConfig {
        let mut config = self.config();
        if let Some(begins) = config.decoder_input_ids.as_mut().filter(|begins| begins.len() > 1) {
            *begins = vec![begins[prompt].clone()];
        }
        config
    }

    fn batched(&self, generator: &Generator) -> Result<(), String> {
        let prompts = self.input_ids.iter().cloned().map(Prompt::from);
        let output = generator.generate_batch(prompts, &self.config()).map_err(|error| error.to_string())?;
        self.check(&output, 0)
    }

    fn alone(&self, generator: &Generator) -> Result<(), String> {
        for (index, prompt) in self.input_ids.iter().enumerate() {
            let output = generator.generate(prompt.clone(), &self.own(index)).map_err(|error| error.to_string())?;
            self.check(&output, index)?;
        }
        Ok(())
    }

    /// Compares an output whose first prompt is prompt `first` of the case.
    fn check(&self, output: &Output, first: usize) -> Result<(), String> {
        let ranks = self.sequences.as_ref().map_or(1, |sequences| sequences[first].len());
        let prompts = if first > 0 { 1 } else { output.sequences.len().div_ceil(ranks) };
        same("number of sequences", &output.sequences.len(), &(prompts * ranks))?;
        for (row, sequence) in output.sequences.iter().enumerate() {
            let (prompt, rank) = (first + row / ranks, row % ranks);
            same("place", &(sequence.prompt, sequence.row), &(row / ranks, row))?;
            self.check_sequence(sequence, prompt, rank).map_err(|reason| format!("prompt {prompt}, rank {rank}: {reason}"))?;
        }
        Ok(())
    }

    fn check_sequence(&self, sequence: &Sequence, prompt: usize, rank: usize) -> Result<(), String> {
        if let (Some(sequences), Some(finish)) = (&self.sequences, &self.finish) {
            let (ours, theirs) = (&sequence.tokens, &sequences[prompt][rank]);
            same("number of tokens", &ours.len(), &theirs.len())?;
            same("finish", &sequence.finish.as_str(), &finish[prompt][rank].as_str())?;
            let kept = ours.len() - usize::from(self.old && sequence.finish == FinishReason::Eos);
            same("tokens", &ours[..kept], &theirs[..kept])?;
        }
        if let Some(theirs) = &self.sequences_scores {
            near("score", sequence.score.ok_or("no score")?, theirs[prompt][rank])?;
        }
        if let Some(theirs) = &self.beam_indices {
            same("beam indices", sequence.beam_indices.as_ref().ok_or("no beam indices")?, &theirs[prompt][rank])?;
        }
        let ours = sequence.scores.as_ref().ok_or("no scores")?;
        same("steps with scores", &ours.len(), &sequence.tokens.len())?;
        if let (Some(theirs), 0) = (&self.scores, rank) {
            same("steps with scores", &ours.len(), &theirs[prompt].len())?;
            for (step, (ours, theirs)) in ours.iter().zip(&theirs[prompt]).enumerate() {
                for &(id, value) in theirs {
                    near(&format!("score of id {id} at step {step}"), ours[id], value)?;
                }
            }
        }
        Ok(())
    }
}

fn near(what: &str, ours: f32, theirs: f32) -> Result<(), String> {
    if (ours - theirs).abs() <= TOLERANCE * theirs.abs().max(1.0) {
        Ok(())
    } else {
        Err(format!("{what}: {ours}, the reference: {theirs}"))
    }
}

fn same<T: PartialEq + std::fmt::Debug + ?Sized>(what: &str, ours: &T, theirs: &T) -> Result<(), String> {
    if ours == theirs { Ok(()) } else { Err(format!("{what}: {ours:?}, the reference: {theirs:?}")) }
}
