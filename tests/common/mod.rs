//! What the suites share: where checkpoints lie, and where and in which arithmetic they are computed.
//!
//! Suites run on the CPU in f32 with all instructions that it has. `CANDLE_GENERATE_INSTRUCTIONS=avx2` (or portable, avx512, avx512bf16,
//! amx) has them use no more. `CANDLE_GENERATE_DEVICE=cuda:0` and `CANDLE_GENERATE_DTYPE=bf16` (or f16) have them run elsewhere.
//! On a GPU laws hold up to rounding only.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use candle_generate::{
    Builder, Generator, Instructions, Sequence,
    candle_core::{DType, Device},
    device,
};
use std::{
    env,
    path::{Path, PathBuf},
};

pub const STORYTELLER: &str = "examples/models/storyteller";

/// A golden folder.
pub fn golden(name: &str) -> PathBuf {
    Path::new("tests/golden").join(name)
}

/// A checkpoint on the device and in the arithmetic of this run.
pub fn load(folder: impl AsRef<Path>) -> Generator {
    builder(folder).load().unwrap()
}

pub fn builder(folder: impl AsRef<Path>) -> Builder {
    let builder = Generator::builder(folder).device(place()).dtype(dtype());
    match instructions() {
        Some(most) => builder.instructions(most),
        None => builder,
    }
}

fn instructions() -> Option<Instructions> {
    Some(match env::var("CANDLE_GENERATE_INSTRUCTIONS").ok()?.as_str() {
        "portable" => Instructions::Portable,
        "avx2" => Instructions::Avx2,
        "avx512" => Instructions::Avx512,
        "avx512bf16" => Instructions::Avx512Bf16,
        "amx" => Instructions::Amx,
        other => panic!("CANDLE_GENERATE_INSTRUCTIONS={other}: portable, avx2, avx512, avx512bf16 and amx are accepted"),
    })
}

fn place() -> Device {
    device(&env::var("CANDLE_GENERATE_DEVICE").unwrap_or("cpu".into())).unwrap()
}

pub fn dtype() -> DType {
    match env::var("CANDLE_GENERATE_DTYPE").as_deref() {
        Err(_) | Ok("f32") => DType::F32,
        Ok("bf16") => DType::BF16,
        Ok("f16") => DType::F16,
        Ok(other) => panic!("CANDLE_GENERATE_DTYPE={other}: f32, bf16 and f16 are accepted"),
    }
}

/// Whether the arithmetic's results have the same bits in any company.
pub fn exact() -> bool {
    place().is_cpu()
}

/// Whether the instructions have an arithmetic of their own: attention in bf16, and with AVX-512 BF16 its order of sums.
pub fn own_order() -> bool {
    let best = Instructions::best();
    dtype() == DType::BF16 && instructions().map_or(best, |most| most.min(best)) >= Instructions::Avx512Bf16
}

/// How far two computations of one logit may lie apart, as a share of the largest: eight units in the last place that the arithmetic's
/// type keeps of it.
pub fn rounding() -> f32 {
    match dtype() {
        DType::BF16 => 8.0 / 256.0,
        DType::F16 => 8.0 / 2048.0,
        _ => 8.0 / 524_288.0,
    }
}

/// Demands that two computations of one row agree: bit for bit where the arithmetic is exact. Elsewhere logits may differ by rounding,
/// and tokens from where two of them are as good as equal.
pub fn agree(left: &Sequence, right: &Sequence, law: &str) {
    let (ours, theirs) = (left.logits.as_ref().unwrap(), right.logits.as_ref().unwrap());
    assert!(!ours.is_empty(), "{law}: logits were asked for");
    if exact() {
        assert_eq!(left.tokens, right.tokens, "{law}: tokens of row {}", left.row);
        assert_eq!(left.finish, right.finish, "{law}: finish of row {}", left.row);
        assert_eq!(left.text, right.text, "{law}: text of row {}", left.row);
        let bits = |steps: &[Vec<f32>]| -> Vec<u32> { steps.iter().flatten().map(|logit| logit.to_bits()).collect() };
        assert!(bits(ours) == bits(theirs), "{law}: bits of the logits of row {}", left.row);
        return;
    }
    for (step, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        let most = ours.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
        let apart = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart <= rounding() * most, "{law}: logits of row {} are {apart} apart at step {step}, the largest is {most}", left.row);
        if left.tokens[step] != right.tokens[step] {
            let gap = (ours[left.tokens[step] as usize] - ours[right.tokens[step] as usize]).abs();
            assert!(gap <= 4.0 * rounding() * most, "{law}: row {} differs at step {step} by a clear choice, {gap}", left.row);
            return;
        }
    }
    assert_eq!((left.tokens.len(), left.finish), (right.tokens.len(), right.finish), "{law}: end of row {}", left.row);
}
