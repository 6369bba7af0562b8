//! Each processor alone, the usual sampling pipeline, and the draw, on vocabularies of 50k and 152k.

use candle_generate::{
    GenerationConfig, History, ModelInfo, Plan,
    logits::{Scores, pick},
};
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::hint::black_box;

/// GPT-2's and Qwen2's.
const VOCABULARIES: [usize; 2] = [50_257, 151_936];
/// Ids of the history, of which one in eight is the prompt.
const LENGTH: usize = 1024;

/// Configs that turn on one processor each, and the usual pipeline.
fn configs() -> Vec<(&'static str, GenerationConfig)> {
    let greedy = GenerationConfig::greedy;
    let sampling = || GenerationConfig::sampling().top_k(0);
    vec![
        ("sequence_bias", greedy().sequence_bias([(vec![7, 8], 2.0), (vec![9], -2.0)])),
        ("repetition_penalty", greedy().repetition_penalty(1.1)),
        ("encoder_repetition_penalty", greedy().encoder_repetition_penalty(1.1)),
        ("no_repeat_ngram_size", greedy().no_repeat_ngram_size(3)),
        ("bad_words_ids", greedy().bad_words_ids([vec![7, 8], vec![9]])),
        ("min_new_tokens", greedy().min_new_tokens(2048).max_new_tokens(4096)),
        ("remove_invalid_values", greedy().remove_invalid_values(true)),
        ("suppress_tokens", greedy().suppress_tokens([7, 8, 9])),
        ("renormalize_logits", greedy().renormalize_logits(true)),
        ("temperature", sampling().temperature(0.8)),
        ("top_h", sampling().top_h(0.5)),
        ("top_k", sampling().top_k(50)),
        ("top_p", sampling().top_p(0.95)),
        ("min_p", sampling().min_p(0.05)),
        ("typical_p", sampling().typical_p(0.95)),
        ("epsilon_cutoff", sampling().epsilon_cutoff(3e-4)),
        ("eta_cutoff", sampling().eta_cutoff(3e-4)),
        ("pipeline", sampling().repetition_penalty(1.1).top_k(50).top_p(0.95).temperature(0.8)),
    ]
}

fn processors(criterion: &mut Criterion) {
    for vocab_size in VOCABULARIES {
        let scores = scores(vocab_size);
        let tokens: Vec<u32> = scores[..LENGTH].iter().map(|score| (score.to_bits() >> 3) % vocab_size as u32).collect();
        let history = History::new(&tokens, LENGTH / 8, 2 * LENGTH);
        let model = GenerationConfig::default().eos_token_id(0);
        let info = ModelInfo::new("bench", vocab_size);
        let mut group = criterion.benchmark_group("processors");
        for (name, config) in configs() {
            let plan = Plan::new(&config, &model, &info, None).expect(name);
            assert!(!plan.processors.is_empty(), "{name} is off");
            group.bench_function(BenchmarkId::new(name, vocab_size), |bencher| {
                bencher.iter_batched_ref(
                    || scores.clone(),
                    |scores| {
                        let shape =
                            |scores: &mut Scores<'_>| plan.processors.iter().try_for_each(|processor| processor.shape(&history, scores));
                        Scores::over(scores, shape).expect(name);
                    },
                    BatchSize::LargeInput,
                );
            });
        }
        group.finish();
    }
}

fn picks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pick");
    for vocab_size in VOCABULARIES {
        let scores = scores(vocab_size);
        group.bench_function(BenchmarkId::new("argmax", vocab_size), |bencher| bencher.iter(|| pick::argmax(black_box(&scores))));
        group.bench_function(BenchmarkId::new("sample", vocab_size), |bencher| bencher.iter(|| pick::sample(black_box(&scores), 0.5)));
        group.bench_function(BenchmarkId::new("top 5", vocab_size), |bencher| bencher.iter(|| pick::top(black_box(&scores), 5)));
    }
    group.finish();
}

/// Scores of a few likely tokens and a long tail: the probability falls with the square of the rank.
fn scores(vocab_size: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    (0..vocab_size).map(|_| -2.0 * rng.random::<f32>().max(f32::MIN_POSITIVE).ln()).collect()
}

criterion_group!(benches, processors, picks);
criterion_main!(benches);
