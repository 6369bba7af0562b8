//! The kernels of the CPU: two layers of SmolLM2-135M's sizes with hardly a vocabulary, so that nothing else counts, by instructions
//! and by types of weights.

#[allow(unused)]
mod common;

use candle_generate::{
    Cache, Feed, Generator, Instructions, Model, Start, Want,
    candle_core::{DType, Device},
};
use common::{SMOL, Shape, ids};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use std::path::Path;

const VOCAB: usize = 512;

/// Rows, positions that each has already, and new tokens of each.
const PASSES: [(&str, usize, usize, usize); 5] = [
    ("one row", 1, 64, 1),
    ("four rows", 4, 64, 1),
    ("prefill of 512", 1, 0, 512),
    ("one row at 4,096", 1, 4096, 1),
    ("four rows of 5", 4, 64, 5),
];

fn passes(criterion: &mut Criterion) {
    for half in [false, true] {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(if half { "two-layers-bf16" } else { "two-layers-f32" });
        Shape { layers: 2, vocab: VOCAB, ..SMOL }.write(&folder, half).expect("the checkpoint is written");
        let arithmetics = if half { &[DType::F32, DType::BF16][..] } else { &[DType::F32] };
        for &dtype in arithmetics {
            let file = if half { "bf16" } else { "f32" };
            let mut group = criterion.benchmark_group(format!("two layers, {file} file, {} arithmetic", dtype.as_str()));
            let all = [Instructions::Avx2, Instructions::Avx512, Instructions::Avx512Bf16, Instructions::Amx];
            for most in all.into_iter().filter(|&most| most <= Instructions::best()) {
                let generator = Generator::builder(&folder).device(Device::Cpu).dtype(dtype).instructions(most).load().expect("it loads");
                for (name, rows, held, new) in PASSES {
                    let caches = caches(&**generator.model(), rows, held);
                    let tokens = ids(new, VOCAB as u32);
                    group.throughput(Throughput::Elements((rows * new) as u64));
                    group.bench_function(format!("{name}, {most:?}"), |bencher| {
                        let forks = || caches.iter().map(|cache| cache.fork()).collect::<Vec<_>>();
                        bencher.iter_batched(forks, |caches| feed(&**generator.model(), caches, &tokens), BatchSize::LargeInput);
                    });
                }
            }
        }
    }
}

/// Caches of so many positions.
fn caches(model: &dyn Model, rows: usize, held: usize) -> Vec<Box<dyn Cache>> {
    let mut caches = model.start(&vec![Start::default(); rows]).expect("caches are made");
    for chunk in ids(held, VOCAB as u32).chunks(512) {
        caches = feed(model, caches, chunk);
    }
    caches
}

fn feed(model: &dyn Model, mut caches: Vec<Box<dyn Cache>>, tokens: &[u32]) -> Vec<Box<dyn Cache>> {
    let mut feeds: Vec<_> = caches.iter_mut().map(|cache| Feed { tokens, cache: &mut **cache }).collect();
    model.forward(&mut feeds, Want::Last).expect("the pass is computed");
    caches
}

criterion_group!(benches, passes);
criterion_main!(benches);
