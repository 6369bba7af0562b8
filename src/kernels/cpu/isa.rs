//! One source, compiled for each instruction set: the same operations in the same order, so the same bits.
//!
//! Functions of single values are plain loops, which the compiler turns into full vectors. Products name their vectors
//! ([`Isa::Lanes`]), as that is where it cannot be trusted to. All of it is `#[inline(always)]` down from [`Task::run`],
//! or it would be compiled for the baseline.

use super::line::LANES;
#[cfg(target_arch = "x86_64")]
use super::x86;
use half::{bf16, f16};

/// Work to be compiled for each instruction set.
pub(super) trait Task {
    type Out;

    /// Must be `#[inline(always)]`.
    fn run<I: Isa>(self, isa: I) -> Self::Out;
}

/// Sixteen f32 values in registers, and what products do with them.
pub(crate) trait Isa: Copy {
    type Lanes: Copy;

    fn load(self, values: &[f32; LANES]) -> Self::Lanes;
    fn store(self, lanes: Self::Lanes, to: &mut [f32; LANES]);
    /// `lanes * x + sum` in every lane, rounded once.
    fn mul_add(self, lanes: Self::Lanes, x: f32, sum: Self::Lanes) -> Self::Lanes;
    /// Widens bf16 values.
    fn brains(self, bits: &[u16; LANES]) -> Self::Lanes;
    /// Widens f16 values.
    fn halves(self, bits: &[u16; LANES]) -> Self::Lanes;
}

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The baseline of the target.
    pub(super) const PORTABLE: Self = Self(Set::Portable);

    /// All that this processor has, the best last.
    pub(super) fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            all.push(Self(Set::Avx2));
            let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            if wide && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl") {
                all.push(Self(Set::Avx512));
            }
        }
        all
    }

    /// The best that this processor has.
    pub(super) fn best() -> Self {
        Self::all().pop().unwrap_or(Self::PORTABLE)
    }

    /// Whether there are 32 registers of 16 lanes, rather than 16 of 8 or the like.
    pub(super) fn is_wide(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Set::Avx512;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    pub(super) fn run<T: Task>(self, task: T) -> T::Out {
        match self.0 {
            Set::Portable => task.run(Portable),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value comes from `all`, which has found AVX2, FMA and F16C.
            Set::Avx2 => unsafe { x86::avx2(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value comes from `all`, which has found AVX-512 F, BW, DQ and VL beside AVX2, FMA and F16C.
            Set::Avx512 => unsafe { x86::avx512(task) },
        }
    }
}

#[derive(Clone, Copy)]
struct Portable;

impl Isa for Portable {
    type Lanes = [f32; LANES];

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> [f32; LANES] {
        *values
    }

    #[inline(always)]
    fn store(self, lanes: [f32; LANES], to: &mut [f32; LANES]) {
        *to = lanes;
    }

    #[inline(always)]
    fn mul_add(self, lanes: [f32; LANES], x: f32, mut sum: [f32; LANES]) -> [f32; LANES] {
        for (sum, lane) in sum.iter_mut().zip(lanes) {
            *sum = lane.mul_add(x, *sum);
        }
        sum
    }

    #[inline(always)]
    fn brains(self, bits: &[u16; LANES]) -> [f32; LANES] {
        bits.map(|bits| bf16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn halves(self, bits: &[u16; LANES]) -> [f32; LANES] {
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// All but the portable one; says what this processor cannot test.
    pub(in crate::kernels::cpu) fn vectorised() -> Vec<Level> {
        let levels = Level::all().split_off(1);
        for (at, name) in ["avx2", "avx512"].into_iter().enumerate().skip(levels.len()) {
            eprintln!("skipped: instruction set {} ({name}) is not on this processor", at + 1);
        }
        levels
    }

    struct Widen([u16; LANES]);

    impl Task for Widen {
        type Out = [[f32; LANES]; 2];

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Self::Out {
            let mut out = [[0.0; LANES]; 2];
            isa.store(isa.brains(&self.0), &mut out[0]);
            isa.store(isa.halves(&self.0), &mut out[1]);
            out
        }
    }

    #[test]
    fn every_16_bit_value_widens_alike() {
        for level in vectorised() {
            for first in (0..=u16::MAX).step_by(LANES) {
                let bits = std::array::from_fn(|i| first + i as u16);
                let (ours, theirs) = (level.run(Widen(bits)), Level::PORTABLE.run(Widen(bits)));
                let mut pairs = ours.as_flattened().iter().zip(theirs.as_flattened());
                assert!(pairs.all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()), "{level:?} {first}");
            }
        }
    }
}
