//! What transformers generates, ids, scores and texts, is what this crate generates: the folders made by golden/make.py.
//! In half precision, logits are those of the reference's f32 up to a stated part, for as long as tokens are the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use candle_generate::{
    GenerationConfig, Generator, Kernels, Message, Output, Prompt, Sequence,
    candle_core::DType,
    config::OneOrMany,
    logits::{WatermarkDetector, Watermarking},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

const FAMILIES: [&str; 29] = [
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "phi",
    "stablelm",
    "starcoder2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "t5",
    "mt5",
    "umt5",
    "bart",
    "mbart",
    "marian",
    "pegasus",
    "m2m_100",
    "storyteller",
];

/// The largest difference of a score.
const TOLERANCE: f32 = 1e-4;

/// The largest difference of a logit in half precision, as a part of the largest logit.
fn share() -> f32 {
    if common::dtype() == DType::F16 { 0.03 } else { 0.15 }
}

/// A line of `cases.jsonl`; make.py says what its fields are.
#[derive(Deserialize)]
struct Case {
    name: String,
    input_ids: Option<Vec<Vec<u32>>>,
    prompts: Option<Vec<String>>,
    generation_config: Value,
    sequences: Option<Vec<Vec<u32>>>,
    finish: Option<Vec<String>>,
    texts: Option<Vec<String>>,
    trimmed: Option<Vec<String>>,
    z_scores: Option<Vec<f64>>,
    scores: Vec<Vec<Scores>>,
    logits: Vec<Vec<Top>>,
}

/// Ids with their values, best first.
type Top = Vec<(usize, f32)>;

/// The processed scores of one step.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scores {
    top: Top,
    #[serde(default)]
    banned: Vec<usize>,
    kept: Option<Vec<usize>>,
}

/// A line of the storyteller's `reference.jsonl`, as far as it is greedy.
#[derive(Deserialize)]
struct Story {
    prompt: String,
    messages: Option<Vec<Message>>,
    input_ids: Vec<u32>,
    output_ids: Vec<u32>,
    text: String,
}

#[test]
fn gpt2() {
    run_family("gpt2");
}

#[test]
fn gpt_neox() {
    run_family("gpt_neox");
}

#[test]
fn opt() {
    run_family("opt");
}

#[test]
fn bloom() {
    run_family("bloom");
}

#[test]
fn falcon() {
    run_family("falcon");
}

#[test]
fn phi() {
    run_family("phi");
}

#[test]
fn stablelm() {
    run_family("stablelm");
}

#[test]
fn starcoder2() {
    run_family("starcoder2");
}

#[test]
fn llama() {
    run_family("llama");
}

#[test]
fn qwen2() {
    run_family("qwen2");
}

#[test]
fn gemma2() {
    run_family("gemma2");
}

#[test]
fn mistral() {
    run_family("mistral");
}

#[test]
fn qwen3() {
    run_family("qwen3");
}

#[test]
fn gemma() {
    run_family("gemma");
}

#[test]
fn gemma3() {
    run_family("gemma3");
}

#[test]
fn phi3() {
    run_family("phi3");
}

#[test]
fn smollm3() {
    run_family("smollm3");
}

#[test]
fn olmo2() {
    run_family("olmo2");
}

#[test]
fn mixtral() {
    run_family("mixtral");
}

#[test]
fn qwen3_moe() {
    run_family("qwen3_moe");
}

#[test]
fn t5() {
    run_family("t5");
}

#[test]
fn mt5() {
    run_family("mt5");
}

#[test]
fn umt5() {
    run_family("umt5");
}

#[test]
fn bart() {
    run_family("bart");
}

#[test]
fn mbart() {
    run_family("mbart");
}

#[test]
fn marian() {
    run_family("marian");
}

#[test]
fn pegasus() {
    run_family("pegasus");
}

#[test]
fn m2m_100() {
    run_family("m2m_100");
}

#[test]
fn storyteller() {
    run_family("storyteller");
}

/// The storyteller's own references: prompts and, with the feature `chat`, conversations.
#[test]
fn storyteller_references() {
    let folder = storyteller_folder();
    let generator = Generator::from_pretrained(folder).unwrap();
    let stories: Vec<Story> = lines(&folder.join("reference.jsonl"));
    assert!(stories.len() >= 7);
    for story in stories {
        let config = GenerationConfig::from_json(&serde_json::json!({"do_sample": false, "max_new_tokens": 64})).unwrap();
        let prompt = match story.messages {
            Some(messages) if cfg!(feature = "chat") => Prompt::from(messages),
            Some(_) => Prompt::from(story.input_ids.clone()),
            None => Prompt::from(story.prompt.as_str()),
        };
        assert_eq!(generator.encode(prompt.clone()).unwrap(), story.input_ids, "{}", story.prompt);
        let output = generator.generate(prompt, &config).unwrap();
        assert_eq!(output.tokens(), story.output_ids, "{}", story.prompt);
        assert_eq!(output.text(), story.text, "{}", story.prompt);
    }
}

#[test]
fn every_folder_belongs_to_a_family() {
    for folder in folders() {
        assert!(FAMILIES.iter().any(|family| belongs(&folder, family)), "no test runs {}", folder.display());
    }
}

/// Runs every case of the family's folders: as a batch, each row alone, and as a batch in candle's operations.
fn run_family(family: &str) {
    let folders: Vec<_> = folders().into_iter().filter(|folder| belongs(folder, family)).collect();
    assert!(!folders.is_empty(), "{family} has no folder");
    let mut wrong = Vec::new();
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let cases: Vec<Case> = lines(&folder.join("cases.jsonl"));
        assert!(!cases.is_empty(), "{name} has no case");
        let checkpoint = if family == "storyteller" { storyteller_folder() } else { &folder };
        let fused = common::load(checkpoint);
        let plain = common::builder(checkpoint).kernels(Kernels::Candle).load().unwrap();
        if common::dtype() != DType::F32 && ["mixtral", "qwen3_moe"].contains(&family) {
            println!("{name}: skipped in half precision, whose rounding sends tokens to other experts");
            continue;
        }
        for case in &cases {
            let mut found = vec![("batched", case.batched(&fused)), ("alone", case.alone(&fused))];
            if common::exact() {
                found.push(("in candle's operations", case.batched(&plain)));
            }
            wrong.extend(found.into_iter().filter_map(|(how, found)| Some(format!("{name}/{} {how}: {}", case.name, found.err()?))));
        }
        println!("{name}: {} cases", cases.len());
    }
    assert!(wrong.is_empty(), "{} differ from the reference:\n{}", wrong.len(), wrong.join("\n"));
}

impl Case {
    fn batched(&self, generator: &Generator) -> Result<(), String> {
        let output = generator.generate_batch(self.rows(), &self.config()).map_err(|error| error.to_string())?;
        self.check(generator, &output, 0)
    }

    fn alone(&self, generator: &Generator) -> Result<(), String> {
        for (row, prompt) in self.rows().into_iter().enumerate() {
            let output = generator.generate(prompt.clone(), &self.own(row)).map_err(|error| error.to_string())?;
            self.check(generator, &output, row)?;
            if let Some(trimmed) = &self.trimmed {
                let stream = generator.stream(prompt, &self.config()).map_err(|error| error.to_string())?;
                let text = stream.map(|piece| piece.map(|piece| piece.text)).collect::<Result<String, _>>();
                let expected = if common::dtype() == DType::F32 { &trimmed[row] } else { &output.sequences[0].text };
                same("streamed text", &text.map_err(|error| error.to_string())?, expected)?;
            }
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Prompt> {
        match (&self.input_ids, &self.prompts) {
            (Some(rows), None) => rows.iter().cloned().map(Prompt::from).collect(),
            (None, Some(rows)) => rows.iter().map(|text| Prompt::from(text.as_str())).collect(),
            _ => panic!("{}: exactly one of input_ids and prompts", self.name),
        }
    }

    /// The config of one row: of what has a value for each, its own.
    fn own(&self, row: usize) -> GenerationConfig {
        let mut config = self.config();
        if let Some(OneOrMany::Many(ids)) = &mut config.decoder_start_token_id {
            *ids = vec![ids[row]];
        }
        if let Some(begins) = config.decoder_input_ids.as_mut().filter(|begins| begins.len() > 1) {
            *begins = vec![begins[row].clone()];
        }
        config
    }

    fn config(&self) -> GenerationConfig {
        GenerationConfig::from_json(&self.generation_config).unwrap().output_scores(true).output_logits(true)
    }

    /// Compares an output whose first sequence is row `first` of the case.
    fn check(&self, generator: &Generator, output: &Output, first: usize) -> Result<(), String> {
        if first == 0 && output.sequences.len() > 1 {
            same("number of sequences", &output.sequences.len(), &self.scores.len())?;
        }
        for (row, sequence) in (first..).zip(&output.sequences) {
            self.check_row(generator, row, sequence).map_err(|reason| format!("row {row}: {reason}"))?;
        }
        Ok(())
    }

    fn check_row(&self, generator: &Generator, row: usize, sequence: &Sequence) -> Result<(), String> {
        if common::dtype() != DType::F32 {
            return self.check_half(row, sequence);
        }
        // What is drawn depends on the random numbers; the distribution of the first step does not.
        if let (Some(sequences), Some(finish)) = (&self.sequences, &self.finish) {
            same("tokens", &sequence.tokens, &sequences[row])?;
            same("finish", &sequence.finish.as_str(), &finish[row].as_str())?;
        }
        if let Some(z_scores) = &self.z_scores {
            let Some(Watermarking::Greenlist(scheme)) = self.config().watermarking_config else { panic!("{}: no watermark", self.name) };
            let detector = WatermarkDetector::new(scheme, generator.model().info().vocab_size).map_err(|error| error.to_string())?;
            let found = detector.detect(&sequence.tokens).map_err(|error| error.to_string())?.z_score;
            if (found - z_scores[row]).abs() > 1e-9 {
                return Err(format!("z-score {found}, the reference {}", z_scores[row]));
            }
        }
        if let (Some(texts), Some(trimmed)) = (&self.texts, &self.trimmed) {
            same("text", &sequence.text, &trimmed[row])?;
            let decoded = generator.tokenizer().unwrap().decode(&sequence.tokens, true).map_err(|error| error.to_string())?;
            same("decoded tokens", &decoded, &texts[row])?;
        }
        let (scores, logits) = (sequence.scores.as_ref().ok_or("no scores")?, sequence.logits.as_ref().ok_or("no logits")?);
        same("steps with scores", &scores.len(), &self.scores[row].len())?;
        same("steps with logits", &logits.len(), &self.logits[row].len())?;
        for (step, (ours, theirs)) in logits.iter().zip(&self.logits[row]).enumerate() {
            check_top(ours, theirs).map_err(|reason| format!("logits of step {step}: {reason}"))?;
        }
        for (step, (ours, theirs)) in scores.iter().zip(&self.scores[row]).enumerate() {
            let banned = |id: &usize| theirs.kept.as_ref().map_or_else(|| theirs.banned.contains(id), |kept| !kept.contains(id));
            let expected: Vec<_> = (0..ours.len()).filter(banned).collect();
            let found: Vec<_> = (0..ours.len()).filter(|&id| ours[id] == f32::NEG_INFINITY).collect();
            same("banned ids", &found, &expected).map_err(|reason| format!("scores of step {step}: {reason}"))?;
            check_top(ours, &theirs.top).map_err(|reason| format!("scores of step {step}: {reason}"))?;
        }
        Ok(())
    }

    /// Compares a row in half precision, up to where it goes another way, which it may where two scores are near.
    fn check_half(&self, row: usize, sequence: &Sequence) -> Result<(), String> {
        for (step, ours) in sequence.logits.as_ref().ok_or("no logits")?.iter().enumerate() {
            let Some(theirs) = self.logits[row].get(step) else { break };
            let most = theirs.iter().fold(0.0f32, |most, (_, logit)| most.max(logit.abs()));
            if let Some((id, logit)) = theirs.iter().find(|(id, logit)| (ours[*id] - logit).abs() > share() * most) {
                return Err(format!("logits of step {step}: id {id} has {}, the reference {logit}", ours[*id]));
            }
            let Some(sequences) = &self.sequences else { break };
            if sequence.tokens[step] != sequences[row][step] {
                let best = &self.scores[row][step].top;
                let gap = best.get(1).map_or(f32::INFINITY, |second| best[0].1 - second.1);
                let near = gap <= 4.0 * share() * most;
                return if near { Ok(()) } else { Err(format!("step {step} differs, where the best score is {gap} above the next")) };
            }
        }
        Ok(())
    }
}

/// The ids of `theirs` have the values given there, and no other id has a better one.
fn check_top(ours: &[f32], theirs: &Top) -> Result<(), String> {
    for &(id, value) in theirs {
        let found = *ours.get(id).ok_or(format!("id {id} of a vocabulary of {}", ours.len()))?;
        if !near(found, value) {
            return Err(format!("id {id} has {found}, the reference {value}"));
        }
    }
    let last = theirs.last().ok_or("the reference is empty")?.1;
    match (0..ours.len()).find(|id| ours[*id] > last + TOLERANCE && theirs.iter().all(|(known, _)| known != id)) {
        Some(id) => Err(format!("id {id} has {}, among the best, but not in the reference", ours[id])),
        None => Ok(()),
    }
}

fn near(a: f32, b: f32) -> bool {
    a == b || (a - b).abs() <= TOLERANCE
}

fn same<T: PartialEq + std::fmt::Debug + ?Sized>(what: &str, ours: &T, theirs: &T) -> Result<(), String> {
    if ours == theirs { Ok(()) } else { Err(format!("{what}: {ours:?}, the reference: {theirs:?}")) }
}

fn lines<T: DeserializeOwned>(path: &Path) -> Vec<T> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let parse = |(number, line)| serde_json::from_str(line).unwrap_or_else(|error| panic!("{}:{}: {error}", path.display(), number + 1));
    text.lines().enumerate().map(parse).collect()
}

fn folders() -> Vec<PathBuf> {
    let entries = fs::read_dir(Path::new("tests/golden")).unwrap();
    let mut folders: Vec<_> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.join("cases.jsonl").is_file()).collect();
    folders.sort();
    folders
}

fn storyteller_folder() -> &'static Path {
    Path::new(common::STORYTELLER)
}

/// `llama-tied` belongs to `llama`.
fn belongs(folder: &Path, family: &str) -> bool {
    let name = folder.file_name().unwrap().to_string_lossy();
    name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}
