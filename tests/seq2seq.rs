//! Encoder-decoder models from source to text.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_generate::{
    Error, GenerationConfig, Generator, Output, Result,
    config::{DolaLayers, OneOrMany},
};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Checkpoints of random weights, one of each family.
const FAMILIES: [&str; 9] = ["t5", "t5-gated", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "m2m_100"];

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
    PathBuf::from("examples/models/date-normaliser")
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

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Sources of these lengths.
fn sources(lengths: &[usize]) -> Vec<Vec<u32>> {
    lengths
        .iter()
        .enumerate()
        .map(|(row, &len)| (0..len).map(|at| 4 + ((row * 37 + at * at * 11 + at * 5) % 90) as u32).collect())
        .collect()
}

fn same(left: &Output, right: &Output, law: &str) {
    let bits = |output: &Output| {
        let row = |logits: &Vec<Vec<f32>>| logits.iter().flatten().map(|logit| logit.to_bits()).collect::<Vec<_>>();
        output
            .sequences
            .iter()
            .map(|sequence| (sequence.tokens.clone(), sequence.finish, sequence.logits.as_ref().map(row)))
            .collect::<Vec<_>>()
    };
    assert!(!left.sequences.is_empty() && left.sequences.iter().all(|sequence| sequence.logits.is_some()));
    assert!(bits(left) == bits(right), "{law}");
}

#[test]
fn a_row_does_not_depend_on_how_it_was_computed() {
    let sources = sources(&[9, 1, 33, 17]);
    for family in FAMILIES {
        let generator = Generator::from_pretrained(golden(family)).unwrap();
        for config in [GenerationConfig::greedy().repetition_penalty(1.6), GenerationConfig::sampling().seed(5)] {
            let config = config.max_new_tokens(9).output_logits(true).decoder_input_ids([vec![7, 8, 9, 10, 11]]);
            let batch = generator.generate_batch(&sources, &config).unwrap();
            same(&batch, &generator.generate_batch(&sources, &config.clone().use_cache(false)).unwrap(), "cached = uncached");
            same(&batch, &generator.generate_batch(&sources, &config.clone().prefill_chunk_size(2)).unwrap(), "chunked = whole");
            same(&batch, &generator.generate_batch(&sources, &config.clone().cache_implementation("static")).unwrap(), "static = dynamic");
            let small = Generator::builder(golden(family)).batch_tokens(40).load().unwrap();
            same(&batch, &small.generate_batch(&sources, &config).unwrap(), "parts = whole");
            for (row, source) in batch.sequences.iter().zip(&sources) {
                let config = row.seed.map_or(config.clone(), |seed| config.clone().seed(seed));
                let alone = generator.generate(source, &config).unwrap();
                assert_eq!(
                    (&alone.sequences[0].tokens, &alone.sequences[0].logits),
                    (&row.tokens, &row.logits),
                    "{family}: batched = alone"
                );
            }
        }
    }
}

#[test]
fn drafts_change_nothing() {
    let sources = sources(&[9, 33]);
    for family in ["t5", "bart", "marian"] {
        let generator = Generator::from_pretrained(golden(family)).unwrap();
        let plain = GenerationConfig::greedy().max_new_tokens(14).output_logits(true);
        let expected = generator.generate_batch(&sources, &plain).unwrap();
        same(&expected, &generator.generate_batch(&sources, &plain.clone().prompt_lookup_num_tokens(4)).unwrap(), "lookup");
        let assisted = generator.generate_batch(&sources, &plain.clone().assistant_model(&generator)).unwrap();
        same(&expected, &assisted, "assisted");
        assert!(assisted.usage.accepted_tokens > 8, "{family}: {:?}", assisted.usage);
    }
}

#[test]
fn a_score_is_what_the_beam_was_given() {
    let sources = sources(&[9, 20]);
    for family in ["t5", "bart", "marian-apart", "m2m_100"] {
        let generator = Generator::from_pretrained(golden(family)).unwrap();
        let config = GenerationConfig::beam(3).num_return_sequences(3).max_new_tokens(7).bad_words_ids([vec![101]]);
        for sequence in generator.generate_batch(&sources, &config).unwrap().sequences {
            let score = generator.score(&sources[sequence.prompt], [&sequence.tokens]).unwrap().remove(0);
            assert!(
                (score.mean() - f64::from(sequence.score.unwrap())).abs() < 1e-4,
                "{family}: {} for {:?}",
                score.mean(),
                sequence.score
            );
        }
    }
}

#[test]
fn a_decoder_prompt_is_gone_on_with() {
    let generator = Generator::from_pretrained(folder()).unwrap();
    let begin = generator.tokenizer().unwrap().encode("1856-", false).unwrap();
    let config = GenerationConfig::greedy().decoder_input_ids([begin.clone()]);
    let output = generator.generate("date: 10/15/1856", &config).unwrap();
    assert_eq!((output.text(), output.sequences[0].full_text.as_str()), ("10-15", "1856-10-15"));
    assert_eq!(output.sequences[0].prompt_len, begin.len() + 1);
    let stream = generator.stream("date: 10/15/1856", &config.stop_strings(["-15"])).unwrap();
    assert_eq!(stream.map(|piece| piece.unwrap().text).collect::<String>(), "10");
}

#[test]
fn memory_counts_a_source_once() {
    let generator = Generator::from_pretrained(golden("t5")).unwrap();
    let info = generator.model().info();
    assert!(info.is_encoder_decoder && info.source_bytes == info.position_bytes && info.position_bytes > 0);
    let cache = |config: &GenerationConfig, prompts, len| generator.memory(config, prompts, len).unwrap().cache;
    let page = info.position_bytes * info.page as u64;
    let greedy = GenerationConfig::greedy().max_new_tokens(10);
    assert_eq!([1, 16, 17, 100].map(|len| cache(&greedy, 1, len)), [2 * page, 2 * page, 3 * page, 8 * page]);
    assert_eq!(cache(&greedy, 3, 17), 9 * page);
    assert_eq!(cache(&GenerationConfig::beam(4).max_new_tokens(10), 1, 40), (4 + 3) * page);
    let limit = info.weight_bytes + 4 * page;
    let small = Generator::builder(golden("t5")).memory_limit(limit).load().unwrap();
    let all = sources(&[5, 30, 17, 3]);
    let config = greedy.output_logits(true);
    same(&small.generate_batch(&all, &config).unwrap(), &generator.generate_batch(&all, &config).unwrap(), "parts = whole");
    assert!(matches!(small.generate(sources(&[60]).remove(0), &config), Err(Error::Memory { .. })));
    assert!(matches!(small.score(sources(&[60]).remove(0), [[5]]), Err(Error::Memory { .. })));
}

#[track_caller]
fn refused<T>(result: Result<T>, kind: &str, message: &str) {
    let error = result.err().unwrap();
    assert_eq!((error.kind(), error.to_string().contains(message)), (kind, true), "{error}");
}

#[test]
fn what_cannot_be_is_refused() {
    let t5 = Generator::from_pretrained(golden("t5")).unwrap();
    let bart = Generator::from_pretrained(golden("bart")).unwrap();
    let apart = Generator::from_pretrained(golden("marian-apart")).unwrap();
    let llama = Generator::from_pretrained(golden("llama")).unwrap();
    let greedy = GenerationConfig::greedy;
    let source = || sources(&[5]).remove(0);
    refused(t5.generate(Vec::<u32>::new(), &greedy()), "prompt", "prompt 0 is empty");
    refused(t5.generate([5, 103], &greedy()), "prompt", "prompt 0 holds the id 103, the vocabulary has 103");
    refused(apart.generate([5, 102], &greedy()), "prompt", "prompt 0 holds the id 102, the vocabulary has 102");
    refused(bart.generate(vec![5; 65], &greedy()), "prompt", "prompt 0 has 65 tokens, but the encoder has 64 positions");
    refused(bart.score(vec![5; 65], [[5]]), "prompt", "prompt 0 has 65 tokens, but the encoder has 64 positions");
    refused(bart.generate(source(), &greedy().max_new_tokens(64)), "prompt", "the model has 64 positions: at most 63 new tokens fit");
    refused(t5.generate(source(), &greedy().decoder_input_ids([vec![5; 20]]).max_length(21)), "prompt", "nothing is left to generate");
    refused(t5.generate(source(), &greedy().decoder_input_ids([[1], [2]].map(Vec::from))), "config", "decoder_input_ids = 2 of them");
    refused(t5.generate(source(), &greedy().decoder_start_token_id(OneOrMany::Many(vec![1, 2]))), "config", "decoder_start_token_id");
    refused(t5.generate(source(), &greedy().decoder_input_ids([vec![103]])), "config", "decoder_input_ids");
    refused(llama.generate(source(), &greedy().decoder_input_ids([vec![5]])), "config", "a decoder-only model continues its prompt");
    let dates = Generator::from_pretrained(folder()).unwrap();
    refused(dates.generate("date: 1", &greedy().token_healing(true)), "unsupported", "token_healing of an encoder-decoder model");
    refused(t5.generate(source(), &greedy().guidance_scale(1.5)), "unsupported", "guidance_scale with encoder-decoder models");
    refused(
        t5.generate(source(), &GenerationConfig::new().dola_layers(DolaLayers::Low)),
        "unsupported",
        "dola_layers with encoder-decoder models",
    );
    refused(t5.generate(source(), &GenerationConfig::new().assistant_model(&llama)), "config", "it has no encoder to read the source");
    refused(llama.generate(source(), &GenerationConfig::new().assistant_model(&t5)), "config", "it has an encoder");
    refused(t5.perplexity(source()), "unsupported", "the score of a text without a source");
}
