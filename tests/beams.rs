//! The laws of beam search: what a prompt's sequences are must not depend on how they were computed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_generate::{
    Cache, CancelToken, Error, Feed, FinishReason, Forward, GenerationConfig, Generator, History, Model, ModelInfo, Output, Result,
    Sequence, Start, Strategy, Values, Want, config::EarlyStopping, model::downcast,
};
use proptest::prelude::*;
use std::{collections::HashMap, path::PathBuf, sync::LazyLock};

const FAMILIES: [&str; 4] = ["gpt2", "llama", "qwen2", "gemma2"];

static GENERATORS: LazyLock<Vec<Generator>> =
    LazyLock::new(|| FAMILIES.map(|family| Generator::from_pretrained(folder(&format!("tests/golden/{family}"))).unwrap()).into());

fn folder(path: &str) -> PathBuf {
    PathBuf::from(path)
}

fn storyteller() -> Generator {
    Generator::from_pretrained(folder("examples/models/storyteller")).unwrap()
}

fn mode(kind: usize) -> GenerationConfig {
    match kind {
        0 => GenerationConfig::beam(4),
        1 => GenerationConfig::new().strategy(Strategy::BeamSample { num_beams: 4 }).seed(5).top_k(20),
        2 => GenerationConfig::new().strategy(Strategy::DiverseBeam { num_beams: 4, num_beam_groups: 2, diversity_penalty: 1.0 }),
        _ => {
            let force_words_ids = vec![vec![vec![50, 61]], vec![vec![72], vec![43, 44]]];
            GenerationConfig::new().strategy(Strategy::ConstrainedBeam { num_beams: 4, force_words_ids, force_words: Vec::new() })
        }
    }
}

fn same(left: &[Sequence], right: &[Sequence], law: &str) {
    assert_eq!(left.len(), right.len(), "{law}");
    for (left, right) in left.iter().zip(right) {
        assert_eq!((&left.tokens, left.finish, &left.text), (&right.tokens, right.finish, &right.text), "{law}: row {}", left.row);
        assert_eq!((&left.beam_indices, left.seed), (&right.beam_indices, right.seed), "{law}: row {}", left.row);
        let bits = |steps: &Option<Vec<Vec<f32>>>| steps.iter().flatten().flatten().map(|value| value.to_bits()).collect::<Vec<u32>>();
        assert!(bits(&left.scores) == bits(&right.scores) && !bits(&left.scores).is_empty(), "{law}: bits of scores of row {}", left.row);
        assert_eq!(left.score.unwrap().to_bits(), right.score.unwrap().to_bits(), "{law}: score of row {}", left.row);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bits_do_not_depend_on_how_a_row_was_computed(
        family in 0..FAMILIES.len(), prompts in prop::collection::vec(prop::collection::vec(4u32..90, 1..30), 1..4), kind in 0usize..4, chunk in 1usize..9,
    ) {
        let generator = &GENERATORS[family];
        let config = mode(kind).max_new_tokens(8).num_return_sequences(3).eos_token_id(vec![5, 60, 70, 80]).repetition_penalty(1.1).output_scores(true);
        let batch = generator.generate_batch(prompts.clone(), &config).unwrap();
        same(&batch.sequences, &generator.generate_batch(prompts.clone(), &config.clone().use_cache(false)).unwrap().sequences, "cached = uncached");
        same(&batch.sequences, &generator.generate_batch(prompts.clone(), &config.clone().prefill_chunk_size(chunk)).unwrap().sequences, "chunked = whole");
        same(&batch.sequences, &generator.generate_batch(prompts.clone(), &config.clone().cache_implementation("static")).unwrap().sequences, "static = dynamic");
        let small = Generator::builder(folder(&format!("tests/golden/{}", FAMILIES[family]))).batch_tokens(60).load().unwrap();
        same(&batch.sequences, &small.generate_batch(prompts.clone(), &config).unwrap().sequences, "parts = whole");
        for (rows, prompt) in batch.sequences.chunks(3).zip(prompts) {
            prop_assert!(rows[0].score >= rows[1].score && rows[1].score >= rows[2].score);
            let config = rows[0].seed.map_or(config.clone(), |seed| config.clone().seed(seed));
            let alone = generator.generate(prompt.clone(), &config).unwrap();
            same(rows, &alone.sequences, "batched = alone");
            // Whether beams that lack a phrase may be returned depends on how many are asked for.
            if kind < 3 {
                let one = generator.generate(prompt, &config.num_return_sequences(1)).unwrap();
                same(&rows[..1], &one.sequences, "one of three = the first");
            }
        }
    }

    #[test]
    fn a_score_is_the_models_log_probability(
        family in 0..FAMILIES.len(), prompt in prop::collection::vec(4u32..90, 1..20), length_penalty in -1.5f64..2.0, groups in any::<bool>(),
    ) {
        // A penalty too small to be seen in the score, so that groups too have the model's own log-probabilities.
        let diverse = Strategy::DiverseBeam { num_beams: 4, num_beam_groups: 2, diversity_penalty: 1e-9 };
        let config = if groups { GenerationConfig::new().strategy(diverse) } else { GenerationConfig::beam(4) };
        let config = config.max_new_tokens(9).num_return_sequences(4).eos_token_id(vec![5, 60, 70]).length_penalty(length_penalty).log_probs(0);
        for sequence in &GENERATORS[family].generate(prompt, &config).unwrap().sequences {
            let sum: f64 = sequence.log_probs.iter().flatten().map(|token| f64::from(token.log_prob)).sum();
            let expected = sum / (sequence.tokens.len() as f64).powf(length_penalty);
            prop_assert!((f64::from(sequence.score.unwrap()) - expected).abs() < 1e-5 * expected.abs().max(1.0), "{sequence:?}");
        }
    }
}

#[test]
fn streamed_is_collected() {
    let generator = storyteller();
    let prompts = ["Once upon a time", "The", "There was once a king who had three sons."];
    let mut early = 0;
    for kind in 0..4 {
        let config = mode(kind).max_new_tokens(24).num_return_sequences(2).stop_strings(["daughter", "king"]);
        let collected = generator.generate_batch(prompts, &config).unwrap();
        let mut stream = generator.stream_batch(prompts, &config).unwrap();
        let mut texts = vec![String::new(); collected.sequences.len()];
        let (mut tokens, mut finish) = (vec![Vec::new(); texts.len()], vec![None; texts.len()]);
        for piece in &mut stream {
            let piece = piece.unwrap();
            assert_eq!(finish[piece.row], None, "a piece after the last one");
            early += usize::from(piece.finish.is_none());
            assert!(piece.row.is_multiple_of(2) || piece.finish.is_some(), "only the best comes in parts");
            texts[piece.row] += &piece.text;
            tokens[piece.row].extend(piece.tokens);
            finish[piece.row] = piece.finish;
        }
        for (row, sequence) in collected.sequences.iter().enumerate() {
            assert!(!sequence.text.is_empty());
            assert_eq!((&texts[row], &tokens[row], finish[row]), (&sequence.text, &sequence.tokens, Some(sequence.finish)));
        }
        let output = stream.into_output().unwrap();
        assert!(output.sequences.iter().zip(&collected.sequences).all(|(left, right)| left.tokens == right.tokens));
    }
    assert!(early > 10, "only {early} pieces came before the end");
}

#[test]
fn cancelling_keeps_what_there_is() {
    let generator = storyteller();
    for kind in 0..4 {
        let token = CancelToken::new();
        let config = mode(kind).max_new_tokens(200).num_return_sequences(3).early_stopping(EarlyStopping::Never).cancel(token.clone());
        let config = config.stopping_criteria(move |history: &History<'_>| {
            if history.generated().len() == 6 {
                token.cancel();
            }
            None
        });
        let mut stream = generator.stream_batch(["Once upon a time", "The"], &config).unwrap();
        let mut texts = [String::new(), String::new()];
        for piece in stream.by_ref().map(Result::unwrap).filter(|piece| piece.row.is_multiple_of(3)) {
            texts[piece.row / 3] += &piece.text;
        }
        let output = stream.into_output().unwrap();
        assert_eq!(output.sequences.len(), 6);
        for (row, sequence) in output.sequences.iter().enumerate() {
            assert_eq!((sequence.row, sequence.prompt, sequence.finish), (row, row / 3, FinishReason::Cancelled));
            assert!(sequence.tokens.len() == 6 && (!row.is_multiple_of(3) || texts[row / 3] == sequence.text));
        }
        let before = generator.generate_batch(["Once upon a time", "The"], &config).unwrap();
        assert!(before.sequences.len() == 2 && before.sequences.iter().all(|sequence| sequence.tokens.is_empty()));
        let dropped = generator.stream("The", &mode(kind).max_new_tokens(50).num_return_sequences(2)).unwrap();
        assert_eq!(tokens(&dropped.into_output().unwrap()), [[0; 0]], "nothing was begun");
    }
}

#[test]
fn stops_end_a_hypothesis_as_an_end_token_does() {
    let generator = storyteller();
    let prompt = "There was once a king who had three sons.";
    let config = GenerationConfig::beam(3).max_new_tokens(20).num_return_sequences(3);
    let free = generator.generate(prompt, &config).unwrap();
    let word = free.sequences[0].tokens[4];
    let as_eos = generator.generate(prompt, &config.clone().eos_token_id(vec![0, i64::from(word)])).unwrap();
    let as_stop = generator.generate(prompt, &config.clone().eos_token_id(vec![0]).stop_token_ids(vec![word])).unwrap();
    assert!(as_stop.sequences.iter().any(|sequence| sequence.finish == FinishReason::StopToken && !sequence.text.is_empty()));
    for (eos, stop) in as_eos.sequences.iter().zip(&as_stop.sequences) {
        assert_eq!((&eos.tokens, eos.score), (&stop.tokens, stop.score));
    }
    let criterion = config
        .clone()
        .eos_token_id(vec![0])
        .stopping_criteria(move |history: &History<'_>| (history.tokens.last() == Some(&word)).then_some(FinishReason::Criteria));
    let as_criterion = generator.generate(prompt, &criterion).unwrap();
    assert!(as_criterion.sequences.iter().any(|sequence| sequence.finish == FinishReason::Criteria));
    assert_eq!(as_criterion.sequences[0].tokens, as_stop.sequences[0].tokens);
    let stopped = generator.generate(prompt, &config.clone().stop_strings([" "])).unwrap();
    assert!(stopped.sequences.iter().any(|sequence| sequence.finish == FinishReason::StopString));
    assert!(stopped.sequences.iter().all(|sequence| !sequence.text.contains(' ')));
    let timed = generator.generate(prompt, &config.max_time(0.0)).unwrap();
    assert_eq!(
        timed.sequences.iter().map(|sequence| (sequence.tokens.len(), sequence.finish)).collect::<Vec<_>>(),
        [(1, FinishReason::Time); 3]
    );
}

/// A model without a memory, whose logits are a table by the last token.
struct Table(ModelInfo, Vec<Vec<f32>>);

struct Count(usize);

impl Cache for Count {
    fn len(&self) -> usize {
        self.0
    }

    fn fork(&self) -> Box<dyn Cache> {
        Box::new(Self(self.0))
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.0 = len;
        Ok(())
    }
}

impl Model for Table {
    fn info(&self) -> &ModelInfo {
        &self.0
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        Ok(rows.iter().map(|_| Box::new(Count(0)) as Box<dyn Cache>).collect())
    }

    fn forward(&self, rows: &mut [Feed<'_>], _: Want<'_>) -> Result<Forward> {
        let mut logits = Vec::new();
        for row in rows {
            downcast::<Count>(row.cache)?.0 += row.tokens.len();
            logits.extend(&self.1[*row.tokens.last().unwrap() as usize]);
        }
        Ok(Values::Host(logits).into())
    }
}

fn table(rows: Vec<Vec<f32>>) -> Generator {
    Generator::new(Table(ModelInfo::new("table", rows.len()), rows), None)
}

fn tokens(output: &Output) -> Vec<Vec<u32>> {
    output.sequences.iter().map(|sequence| sequence.tokens.clone()).collect()
}

#[test]
fn draws_are_without_replacement_and_follow_the_scores() {
    let generator = table(vec![[0.5f32, 0.3, 0.15, 0.05].map(f32::ln).to_vec(); 4]);
    let config = GenerationConfig::new().strategy(Strategy::BeamSample { num_beams: 2 }).top_k(0).max_new_tokens(1).num_return_sequences(2);
    let mut counts: HashMap<Vec<Vec<u32>>, u32> = HashMap::new();
    let calls = 4_000;
    for seed in 0..calls {
        *counts.entry(tokens(&generator.generate(vec![0], &config.clone().seed(seed)).unwrap())).or_default() += 1;
    }
    // Two of four are kept: the first two of four draws. The better of the two comes first.
    let p = [0.5, 0.3, 0.15, 0.05];
    let mut chi_square = 0.0;
    for first in 0..4 {
        for second in first + 1..4 {
            let both = p[first] * p[second] * (1.0 / (1.0 - p[first]) + 1.0 / (1.0 - p[second]));
            let count = counts.remove(&vec![vec![first as u32], vec![second as u32]]).unwrap_or_default();
            chi_square += (f64::from(count) - both * calls as f64).powi(2) / (both * calls as f64);
        }
    }
    assert!(counts.is_empty(), "{counts:?}");
    assert!(chi_square < 20.5, "{chi_square}"); // 5 degrees of freedom, p = 0.001
}

#[test]
fn a_seed_gives_the_prompt_again() {
    let config = mode(1).max_new_tokens(8).num_return_sequences(2).output_scores(true);
    let twins = GENERATORS[1].generate_batch(vec![vec![9, 8, 7]; 3], &config).unwrap();
    assert_ne!(tokens(&twins)[..2], tokens(&twins)[2..4]);
    let seeds: Vec<u64> = twins.sequences.chunks(2).map(|rows| rows[0].seed.unwrap()).collect();
    assert_eq!(seeds[0], 5);
    let listed = GENERATORS[1].generate_batch(vec![vec![9, 8, 7]; 3], &config.clone().seeds(seeds.clone())).unwrap();
    same(&twins.sequences, &listed.sequences, "listed seeds");
    let alone = GENERATORS[1].generate(vec![9, 8, 7], &config.clone().seed(seeds[2])).unwrap();
    same(&twins.sequences[4..], &alone.sequences, "the reported seed");
    let wrong = GENERATORS[1].generate_batch(vec![vec![9, 8, 7]; 3], &config.seeds(vec![1, 2])).unwrap_err();
    assert!(wrong.to_string().contains("3 rows"), "{wrong}");
}

#[test]
fn fewer_candidates_than_beams() {
    let generator = table(vec![vec![0.0, 1.0, 2.0]; 3]);
    // Three sequences of one token are all that there are.
    let config = GenerationConfig::beam(8).max_new_tokens(1).num_return_sequences(8);
    assert_eq!(tokens(&generator.generate(vec![0], &config).unwrap()), [[2], [1], [0]]);
    // A token that is forced leaves one beam, which spreads again.
    let forced = GenerationConfig::beam(3).max_new_tokens(2).num_return_sequences(3).forced_bos_token_id(1i64);
    assert_eq!(tokens(&generator.generate(vec![0], &forced).unwrap()), [[1, 2], [1, 1], [1, 0]]);
    for kind in 0..3 {
        let every = mode(kind).num_return_sequences(4).max_new_tokens(3).eos_token_id(vec![0, 1, 2]);
        assert!(generator.generate(vec![0], &every).unwrap().sequences.iter().all(|sequence| sequence.finish == FinishReason::Eos));
        let dead = mode(kind).max_new_tokens(3).suppress_tokens(vec![0, 1, 2]);
        let error = generator.generate(vec![0], &dead).unwrap_err();
        assert!(matches!(&error, Error::Processor { processor, .. } if processor == "suppress_tokens"), "{error}");
        // After 2 nothing may follow: beams that end there are left behind while others go on.
        let stuck = mode(kind)
            .num_return_sequences(2)
            .max_new_tokens(3)
            .prefix_allowed_tokens_fn(|_, ids| if ids.ends_with(&[2]) { vec![1] } else { vec![0, 2] });
        let stuck = stuck.suppress_tokens(vec![1]);
        let output = generator.generate(vec![0], &stuck).unwrap();
        assert!(output.sequences.iter().all(|sequence| !sequence.tokens[..2].contains(&2)), "{:?}", tokens(&output));
    }
    let broken = table(vec![vec![f32::NAN, 1.0, 2.0]; 3]);
    let error = broken.generate(vec![0], &GenerationConfig::beam(2)).unwrap_err();
    assert!(error.to_string().contains("remove_invalid_values"), "{error}");
    let mended = broken.generate(vec![0], &GenerationConfig::beam(2).max_new_tokens(1).remove_invalid_values(true)).unwrap();
    assert_eq!(tokens(&mended), [[0]], "all are equal then, and the lowest comes first");
}

#[test]
fn forced_words_are_in_the_text_or_named() {
    let generator = storyteller();
    let forced = |words: serde_json::Value| {
        GenerationConfig::from_json(&serde_json::json!({"num_beams": 4, "num_return_sequences": 2, "force_words": words})).unwrap()
    };
    let prompts = ["Once upon a time", "There was once a king who had three sons."];
    let words = forced(serde_json::json!(["castle", ["river", "bread"]])).max_new_tokens(24);
    for sequence in generator.generate_batch(prompts, &words).unwrap().sequences {
        let text = &sequence.text;
        assert!(text.contains("castle") && (text.contains("river") || text.contains("bread")) && sequence.unmet.is_empty(), "{text}");
    }
    // Room for either, not for both.
    let least = |word| generator.tokenizer().unwrap().variants(word).unwrap().iter().map(Vec::len).min().unwrap();
    let room = least("castle").max(least("river"));
    let tight = generator.generate(prompts[0], &forced(serde_json::json!(["castle", "river"])).max_new_tokens(room)).unwrap();
    for sequence in &tight.sequences {
        let lacks: Vec<_> = (0..2).filter(|&index| !sequence.text.contains(["castle", "river"][index])).collect();
        assert!(!lacks.is_empty() && sequence.unmet == lacks, "{sequence:?}");
    }
}

#[test]
fn a_phrase_needs_room() {
    let forced = |ids: &[u32]| GenerationConfig::new().num_beams(2).force_words_ids(vec![vec![ids.to_vec()]]).max_new_tokens(2);
    let error = GENERATORS[1].generate_batch(vec![vec![8, 9], vec![5, 6, 7]], &forced(&[8, 9, 10])).unwrap_err();
    assert!(matches!(&error, Error::Config(problems) if problems[0].field == "force_words_ids"), "{error}");
    assert!(error.to_string().contains("3 more tokens") && error.to_string().contains("room for 2"), "{error}");
    // The prompt has its first token, or all of it.
    assert_eq!(GENERATORS[1].generate(vec![5, 8], &forced(&[8, 9, 10])).unwrap().tokens(), [9, 10]);
    assert!(GENERATORS[1].generate(vec![8, 9, 10], &forced(&[8, 9, 10])).unwrap().sequences[0].unmet.is_empty());
}

#[test]
fn beams_share_the_cache_of_their_prompt() {
    let cache = |config: GenerationConfig| storyteller().memory(&config.max_new_tokens(32), 1, 1_024).unwrap().cache;
    let (one, eight) = (cache(GenerationConfig::greedy()), cache(GenerationConfig::beam(8)));
    assert!(eight > one && eight * 2 < one * 3, "{eight} bytes for 8 beams, {one} for a row");
}
