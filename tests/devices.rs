//! A GPU gives what the CPU gives, in every family and mode; threads share it; what does not fit is refused and leaves it usable.
//! Skipped unless `CANDLE_GENERATE_DEVICE` names one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use candle_generate::{
    Assistant, Error, GenerationConfig, Generator, Output, Strategy,
    candle_core::{DType, Tensor},
};
use common::golden;
use std::{fs, thread};

/// Whether there is a device other than the CPU to be tested.
fn there(test: &str) -> bool {
    let there = std::env::var("CANDLE_GENERATE_DEVICE").is_ok_and(|name| name != "cpu");
    if !there {
        println!("skipped, no device is named: {test}");
    }
    there
}

/// Folders of checkpoints, all families.
fn folders() -> Vec<String> {
    let names = fs::read_dir("tests/golden").unwrap().map(|entry| entry.unwrap());
    let names = names.filter(|entry| entry.path().join("config.json").is_file() && entry.path().join("cases.jsonl").is_file());
    let mut names: Vec<_> = names.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Each mode that `generate` knows.
fn modes(generator: &Generator) -> Vec<(&'static str, GenerationConfig)> {
    let new = GenerationConfig::new;
    let phrases = vec![vec![vec![50, 61]], vec![vec![72], vec![43, 44]]];
    let forced = Strategy::ConstrainedBeam { num_beams: 3, force_words_ids: phrases, force_words: Vec::new() };
    let mut modes = vec![
        ("greedy", GenerationConfig::greedy().repetition_penalty(1.2)),
        ("sampling", GenerationConfig::sampling().temperature(1.3).top_k(20).top_p(0.9).num_return_sequences(2).seed(3)),
        ("beams", GenerationConfig::beam(3).num_return_sequences(2)),
        ("drawn beams", new().strategy(Strategy::BeamSample { num_beams: 3 }).seed(5)),
        ("diverse beams", new().strategy(Strategy::DiverseBeam { num_beams: 4, num_beam_groups: 2, diversity_penalty: 1.0 })),
        ("forced phrases", new().strategy(forced)),
        ("contrastive", new().strategy(Strategy::Contrastive { penalty_alpha: 0.6, top_k: 4 })),
        ("prompt lookup", GenerationConfig::greedy().prompt_lookup_num_tokens(3)),
        ("a draft model", GenerationConfig::greedy().assistant_model(Assistant::from(generator))),
        ("static cache", GenerationConfig::greedy().cache_implementation("static")),
        ("in chunks", GenerationConfig::greedy().prefill_chunk_size(2)),
        ("uncached", GenerationConfig::greedy().use_cache(false)),
    ];
    if !generator.model().info().is_encoder_decoder {
        modes.push(("guidance", GenerationConfig::greedy().guidance_scale(1.5)));
    }
    modes
}

fn run(generator: &Generator, config: &GenerationConfig) -> Result<Output, Error> {
    let config = config.clone().max_new_tokens(10).min_new_tokens(3);
    generator.generate_batch([vec![5, 17, 33, 8, 21], vec![9, 4], vec![7, 30, 7, 30, 7, 30, 7]], &config)
}

#[test]
fn every_mode_of_every_family_gives_what_the_cpu_gives() {
    if !there("every mode of every family") || common::dtype() != DType::F32 {
        return;
    }
    let (mut count, mut wrong) = (0, Vec::new());
    for name in folders() {
        let (cpu, gpu) = (Generator::from_pretrained(golden(&name)).unwrap(), common::load(golden(&name)));
        for (mode, (config, on_gpu)) in modes(&cpu).into_iter().zip(modes(&gpu)).map(|((mode, cpu), (_, gpu))| (mode, (cpu, gpu))) {
            let tokens = |output: Output| output.sequences.into_iter().map(|row| row.tokens).collect::<Vec<_>>();
            let [cpu, gpu] = [run(&cpu, &config), run(&gpu, &on_gpu)].map(|output| output.map(tokens).map_err(|error| error.to_string()));
            count += 1;
            if cpu != gpu {
                wrong.push(format!("{name}, {mode}: {gpu:?} instead of {cpu:?}"));
            }
        }
    }
    println!("{count} calls");
    assert!(wrong.is_empty(), "{} of {count} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn every_mode_of_every_family_runs() {
    if !there("every mode of every family in this arithmetic") {
        return;
    }
    for name in folders() {
        let generator = common::load(golden(&name));
        for (mode, config) in modes(&generator) {
            let output = run(&generator, &config);
            assert!(
                output.as_ref().is_ok_and(|output| output.sequences.iter().all(|row| row.tokens.len() >= 3)),
                "{name}, {mode}: {output:?}"
            );
        }
    }
}

#[test]
fn threads_share_a_device() {
    if !there("threads") {
        return;
    }
    // Two models, four threads, and streams that begin on one thread and end on another.
    let generators = ["llama", "gpt2"].map(|name| common::load(golden(name)));
    let config = |thread: usize| GenerationConfig::sampling().seed(thread as u64).max_new_tokens(24).min_new_tokens(24);
    let prompt = |thread: usize| vec![5 + thread as u32, 17, 40];
    let alone: Vec<_> = (0..4).map(|i| generators[i % 2].generate(prompt(i), &config(i)).unwrap().tokens().to_vec()).collect();
    for _ in 0..5 {
        let threads: Vec<_> = (0..4)
            .map(|i| {
                let mut stream = generators[i % 2].stream(prompt(i), &config(i)).unwrap();
                let first: Vec<_> = stream.by_ref().take(2).collect();
                thread::spawn(move || first.into_iter().chain(stream).flat_map(|piece| piece.unwrap().tokens).collect::<Vec<_>>())
            })
            .collect();
        for (alone, thread) in alone.iter().zip(threads) {
            assert_eq!(alone, &thread.join().unwrap());
        }
    }
}

#[test]
fn out_of_memory_is_an_error_after_which_the_next_call_works() {
    if !there("out of memory") {
        return;
    }
    let generator = common::load(golden("llama"));
    let config = GenerationConfig::greedy().max_new_tokens(8);
    let before = generator.generate(vec![5, 17, 40], &config).unwrap();
    let device = &generator.model().info().device;
    let long: Vec<u32> = (0..4000).map(|at| 5 + at % 90).collect();
    // All that is free, in pieces that become smaller.
    let mut filling = Vec::new();
    let mut bytes = 1usize << 32;
    while bytes >= 1 << 20 {
        match Tensor::zeros(bytes, DType::U8, device) {
            Ok(tensor) => filling.push(tensor),
            Err(_) => bytes /= 2,
        }
    }
    let error = generator.generate(long.clone(), &config).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
    assert_eq!(error.kind(), "out_of_memory");
    drop(filling);
    generator.generate(long, &config).unwrap();
    let after = generator.generate(vec![5, 17, 40], &config).unwrap();
    assert_eq!(before.tokens(), after.tokens());
}
