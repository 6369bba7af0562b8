//! The laws: what a row is must not depend on how it was computed. On the CPU in f32 they hold bit for bit.

mod common;

use candle_generate::{
    AttnImplementation, Builder, CancelToken, FinishReason, GenerationConfig, Generator, Instructions, Kernels, Output, candle_core::DType,
};
use common::{STORYTELLER, agree, golden};
use proptest::prelude::*;
use std::sync::LazyLock;

/// The families, each with a checkpoint of random weights.
const FAMILIES: [&str; 4] = ["gpt2", "llama", "qwen2", "gemma2"];

static GENERATORS: LazyLock<Vec<Generator>> = LazyLock::new(|| FAMILIES.map(|family| common::load(golden(family))).into());

fn storyteller() -> Generator {
    common::load(STORYTELLER)
}

/// Prompts of a shape: each row's ids follow from its length and the seed.
fn prompts(lengths: &[usize], seed: u64) -> Vec<Vec<u32>> {
    let id = |row: usize, at: usize| {
        let mixed = (seed ^ ((row as u64) << 32 | at as u64)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        3 + (mixed >> 33) as u32 % 80
    };
    lengths.iter().enumerate().map(|(row, &len)| (0..len).map(|at| id(row, at)).collect()).collect()
}

fn base(sample: bool, tokens: usize) -> GenerationConfig {
    // What is drawn where two shares meet depends on their rounding, and in half precision they often do.
    let config = if sample && common::dtype() == DType::F32 {
        GenerationConfig::sampling().temperature(1.3).top_k(20)
    } else {
        GenerationConfig::greedy()
    };
    config.max_new_tokens(tokens).min_new_tokens(3).repetition_penalty(1.1).seed(7).output_logits(true)
}

fn all_same(left: &Output, right: &Output, law: &str) {
    assert_eq!(left.sequences.len(), right.sequences.len());
    left.sequences.iter().zip(&right.sequences).for_each(|(left, right)| agree(left, right, law));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bits_do_not_depend_on_how_a_row_was_computed(
        family in 0..FAMILIES.len(), lengths in prop::collection::vec(1usize..40, 1..5), seed in any::<u64>(), sample in any::<bool>(), chunk in 1usize..17,
    ) {
        let generator = &GENERATORS[family];
        let prompts = prompts(&lengths, seed);
        let config = base(sample, 12);
        let batch = generator.generate_batch(prompts.clone(), &config).unwrap();
        all_same(&batch, &generator.generate_batch(prompts.clone(), &config.clone().use_cache(false)).unwrap(), "cached = uncached");
        all_same(&batch, &generator.generate_batch(prompts.clone(), &config.clone().prefill_chunk_size(chunk)).unwrap(), "chunked = whole");
        let fixed = config.clone().cache_implementation("static");
        all_same(&batch, &generator.generate_batch(prompts.clone(), &fixed).unwrap(), "static = dynamic");
        for (row, prompt) in batch.sequences.iter().zip(prompts) {
            let config = row.seed.map_or(config.clone(), |seed| config.clone().seed(seed));
            let alone = generator.generate(prompt, &config).unwrap();
            agree(row, &alone.sequences[0], "batched = alone");
        }
    }

    #[test]
    fn a_fork_is_a_fresh_row(family in 0..FAMILIES.len(), len in 1usize..54, seed in any::<u64>()) {
        if common::dtype() != DType::F32 {
            println!("skipped in half precision: several rows of a prompt are drawn");
            return Ok(());
        }
        let generator = &GENERATORS[family];
        let prompt = prompts(&[len], seed).remove(0);
        let config = base(true, 10).seed(seed);
        let forks = generator.generate(prompt.clone(), &config.clone().num_return_sequences(4)).unwrap();
        prop_assert_eq!(forks.sequences.len(), 4);
        for fork in &forks.sequences {
            let fresh = generator.generate(prompt.clone(), &config.clone().seed(fork.seed.unwrap())).unwrap();
            agree(fork, &fresh.sequences[0], "a fork = fresh");
        }
    }

    #[test]
    fn top_k_1_is_greedy(family in 0..FAMILIES.len(), len in 1usize..40, seed in any::<u64>()) {
        let generator = &GENERATORS[family];
        let prompt = prompts(&[len], seed).remove(0);
        let greedy = generator.generate(prompt.clone(), &base(false, 16)).unwrap();
        let sampled = generator.generate(prompt, &base(true, 16).top_k(1).temperature(0.7).seed(seed)).unwrap();
        agree(&greedy.sequences[0], &sampled.sequences[0], "top_k(1) = greedy");
    }

    #[test]
    fn parts_of_a_batch_are_the_batch(family in 0..FAMILIES.len(), lengths in prop::collection::vec(1usize..30, 2..9), seed in any::<u64>()) {
        let prompts = prompts(&lengths, seed);
        let rows = if common::dtype() == DType::F32 { 2 } else { 1 };
        let config = base(true, 8).num_return_sequences(rows);
        let whole = GENERATORS[family].generate_batch(prompts.clone(), &config).unwrap();
        let small = common::builder(golden(FAMILIES[family])).batch_tokens(100).load().unwrap();
        all_same(&whole, &small.generate_batch(prompts, &config).unwrap(), "parts = whole");
    }
}

#[test]
fn streamed_is_collected() {
    let generator = storyteller();
    let prompts = ["Once upon a time", "The", "There was once a king who had three sons."];
    for config in [GenerationConfig::greedy(), GenerationConfig::sampling().seed(3).num_return_sequences(2)] {
        let config = config.max_new_tokens(40).stop_strings(["daughter"]);
        let collected = generator.generate_batch(prompts, &config).unwrap();
        let mut stream = generator.stream_batch(prompts, &config).unwrap();
        let mut texts = vec![String::new(); collected.sequences.len()];
        let mut tokens = vec![Vec::new(); texts.len()];
        let mut finish = vec![None; texts.len()];
        for piece in &mut stream {
            let piece = piece.unwrap();
            assert_eq!(finish[piece.row], None, "a piece after the last one");
            texts[piece.row] += &piece.text;
            tokens[piece.row].extend(piece.tokens);
            finish[piece.row] = piece.finish;
        }
        for (row, sequence) in collected.sequences.iter().enumerate() {
            assert!(!sequence.text.is_empty());
            assert_eq!((&texts[row], &tokens[row], finish[row]), (&sequence.text, &sequence.tokens, Some(sequence.finish)));
        }
        let output = stream.into_output().unwrap();
        assert_eq!(output.usage, collected.usage);
        assert!(output.sequences.iter().zip(&collected.sequences).all(|(left, right)| left.tokens == right.tokens));
    }
}

#[test]
fn the_seed_reproduces_and_twins_differ() {
    let generator = storyteller();
    let config = GenerationConfig::sampling().max_new_tokens(24).seed(11);
    let twins = generator.generate_batch(["Once upon a time"; 4], &config).unwrap();
    let again = generator.generate_batch(["Once upon a time"; 4], &config).unwrap();
    for (row, sequence) in twins.sequences.iter().enumerate() {
        assert_eq!(sequence.tokens, again.sequences[row].tokens);
        assert!(twins.sequences[..row].iter().all(|other| other.tokens != sequence.tokens), "twin prompts drew the same row");
    }
    let seeds: Vec<u64> = twins.sequences.iter().rev().map(|sequence| sequence.seed.unwrap()).collect();
    let listed = generator.generate_batch(["Once upon a time"; 4], &config.clone().seeds(seeds)).unwrap();
    assert!(listed.sequences.iter().zip(twins.sequences.iter().rev()).all(|(left, right)| left.tokens == right.tokens));
    let unset = GenerationConfig::sampling().max_new_tokens(24);
    let (first, second) = (generator.generate("The", &unset).unwrap(), generator.generate("The", &unset).unwrap());
    assert_ne!(first.sequences[0].seed, second.sequences[0].seed, "an unset seed is fresh");
    let replayed = generator.generate("The", &unset.seed(first.sequences[0].seed.unwrap())).unwrap();
    assert_eq!(first.tokens(), replayed.tokens());
}

#[test]
fn sixteen_threads_give_what_each_gives_alone() {
    let generator = storyteller();
    let config = |seed| GenerationConfig::sampling().max_new_tokens(20).seed(seed).output_logits(true);
    let prompt = |thread: u64| ["Once upon a time", "A fox", "There was"][thread as usize % 3];
    let alone: Vec<_> = (0..16).map(|thread| generator.generate(prompt(thread), &config(thread)).unwrap()).collect();
    let threads: Vec<_> = (0..16)
        .map(|thread| {
            let generator = generator.clone();
            std::thread::spawn(move || generator.generate(prompt(thread), &config(thread)).unwrap())
        })
        .collect();
    for (alone, thread) in alone.iter().zip(threads) {
        all_same(alone, &thread.join().unwrap(), "threads = alone");
    }
}

#[test]
fn the_twin_in_candle_operations_agrees() {
    if common::dtype() != DType::F32 {
        println!("skipped: in half precision the golden suite compares with f32");
        return;
    }
    let (mut steps, mut ties) = (0, 0);
    for (family, fast) in FAMILIES.iter().zip(GENERATORS.iter()) {
        let twin = Generator::builder(golden(family)).kernels(Kernels::Candle).load().unwrap();
        let prompts = prompts(&[1, 5, 20, 33], 5);
        let config = base(false, 24).output_scores(true);
        let fast = fast.generate_batch(prompts.clone(), &config).unwrap();
        let twin = twin.generate_batch(prompts, &config).unwrap();
        for (left, right) in fast.sequences.iter().zip(&twin.sequences) {
            let (left_scores, right_scores) = (left.scores.as_ref().unwrap(), right.scores.as_ref().unwrap());
            for step in 0..left.tokens.len().min(right.tokens.len()) {
                steps += 1;
                if left.tokens[step] != right.tokens[step] {
                    let mut best: Vec<f32> = left_scores[step].clone();
                    best.sort_by(|a, b| b.total_cmp(a));
                    assert!(best[0] - best[1] < 1e-4, "{family}: step {step} differs with a clear winner");
                    ties += 1;
                    break;
                }
                for (a, b) in left_scores[step].iter().zip(&right_scores[step]) {
                    assert!(a == b || (a - b).abs() < 1e-4, "{family}: scores {a} and {b} at step {step}");
                }
            }
        }
    }
    assert!(steps > 300 && ties * 1000 <= steps, "{ties} ties in {steps} steps");
}

#[test]
fn neither_threads_nor_instructions_change_a_row() {
    let config = base(true, 8);
    for family in FAMILIES {
        let prompts = prompts(&[1, 40, 17], 11);
        let output = |set: &dyn Fn(Builder) -> Builder| {
            set(common::builder(golden(family))).load().unwrap().generate_batch(prompts.clone(), &config).unwrap()
        };
        let usual = output(&|builder| builder);
        for threads in [1, 2, 5] {
            all_same(&usual, &output(&|builder| builder.threads(threads)), "some threads = others");
        }
        if common::exact() && !common::own_order() {
            for most in [Instructions::Portable, Instructions::Avx2, Instructions::Avx512] {
                if most > Instructions::best() {
                    println!("skipped: this processor has no {most:?}");
                } else {
                    all_same(&usual, &output(&|builder| builder.instructions(most)), "some instructions = others");
                }
            }
        }
    }
}

#[test]
fn eager_attention_is_flash_attention_up_to_rounding() {
    if !common::exact() {
        println!("skipped: both are the kernels' of the CPU");
        return;
    }
    // Longer than what is joined at a time.
    let prompts = prompts(&[700, 30], 3);
    let config = GenerationConfig::greedy().max_new_tokens(4).output_logits(true);
    let output = |attention| {
        let generator = common::builder(STORYTELLER).attn_implementation(attention).load().unwrap();
        assert!(generator.explain(&config).unwrap().to_string().contains(&format!("{attention:?} attention").to_lowercase()));
        let whole = generator.generate_batch(prompts.clone(), &config).unwrap();
        let chunked = generator.generate_batch(prompts.clone(), &config.clone().prefill_chunk_size(100)).unwrap();
        all_same(&whole, &chunked, "chunked = whole");
        whole
    };
    let (eager, flash) = (output(AttnImplementation::Eager), output(AttnImplementation::Flash));
    for (eager, flash) in eager.sequences.iter().zip(&flash.sequences) {
        let is_f32 = common::dtype() == DType::F32;
        assert!(!is_f32 || eager.tokens == flash.tokens);
        let logits = |row: &candle_generate::Sequence| row.logits.clone().unwrap().concat();
        let apart = logits(eager).iter().zip(logits(flash)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < if is_f32 { 1e-4 } else { 0.3 }, "{apart}");
        assert!(eager.row > 0 || apart > 0.0, "700 positions are more than a span");
    }
}

#[test]
fn cancelling_keeps_what_there_is() {
    let generator = storyteller();
    let token = CancelToken::new();
    let config = GenerationConfig::greedy().max_new_tokens(200).cancel(token.clone());
    let mut stream = generator.stream_batch(["Once upon a time", "The"], &config).unwrap();
    let mut tokens = [0, 0];
    for count in 0.. {
        let Some(piece) = stream.next() else { break };
        let piece = piece.unwrap();
        tokens[piece.row] += piece.tokens.len();
        if count == 9 {
            token.cancel();
        }
    }
    let output = stream.into_output().unwrap();
    assert_eq!(output.sequences.iter().map(|sequence| sequence.tokens.len()).collect::<Vec<_>>(), tokens);
    assert!(tokens.iter().all(|&count| (5..8).contains(&count)), "{tokens:?}");
    assert!(output.sequences.iter().all(|sequence| sequence.finish == FinishReason::Cancelled));
    let before = generator.generate_batch(["Once upon a time", "The"], &config).unwrap();
    let drawn = GenerationConfig::sampling().seed(5).cancel(token);
    let seeds = |output: &Output| output.sequences.iter().map(|sequence| sequence.seed).collect::<Vec<_>>();
    let live = GenerationConfig::sampling().seed(5).max_new_tokens(1);
    let prompts = ["Once upon a time", "The"];
    let (never, live) = (generator.generate_batch(prompts, &drawn).unwrap(), generator.generate_batch(prompts, &live).unwrap());
    assert_eq!(seeds(&never), seeds(&live), "a row that never began still tells its seed");
    assert!(before.sequences.len() == 2 && before.sequences.iter().all(|sequence| sequence.tokens.is_empty()));
}
