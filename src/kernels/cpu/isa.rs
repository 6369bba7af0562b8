//! One source, compiled for each instruction set: the same operations in the same order, so the same bits.
//!
//! Kernels are plain loops over sixteen lanes with [`f32::mul_add`], which the compiler turns into full vectors. They are
//! `#[inline(always)]` down from [`Task::run`], or they would be compiled for the baseline.

use super::line::LANES;
use half::f16;

/// Work to be compiled for each instruction set.
pub(super) trait Task {
    type Out;

    /// Must be `#[inline(always)]`.
    fn run<I: Isa>(self, isa: I) -> Self::Out;
}

/// What an instruction set has that the compiler does not find by itself.
pub(crate) trait Isa: Copy {
    /// Widens sixteen f16 values.
    fn halves(self, bits: &[u16; LANES]) -> [f32; LANES];
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
    #[inline(always)]
    fn halves(self, bits: &[u16; LANES]) -> [f32; LANES] {
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, LANES, Task};
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn avx2<T: Task>(task: T) -> T::Out {
        task.run(F16c(()))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn avx512<T: Task>(task: T) -> T::Out {
        task.run(F16c(()))
    }

    /// Made only where F16C is enabled.
    #[derive(Clone, Copy)]
    struct F16c(());

    impl Isa for F16c {
        #[inline(always)]
        fn halves(self, bits: &[u16; LANES]) -> [f32; LANES] {
            let mut wide = [0.0; LANES];
            let (from, to) = (bits.as_ptr().cast::<__m128i>(), wide.as_mut_ptr());
            // SAFETY: the two loads and stores of 8 values cover the two arrays of 16, unaligned access is allowed, and
            // F16C is there: `F16c` is made only under `#[target_feature]`.
            unsafe {
                _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(from)));
                _mm256_storeu_ps(to.add(8), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1))));
            }
            wide
        }
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

    struct Halves([u16; LANES]);

    impl Task for Halves {
        type Out = [f32; LANES];

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Self::Out {
            isa.halves(&self.0)
        }
    }

    #[test]
    fn every_f16_widens_alike() {
        for level in vectorised() {
            for first in (0..=u16::MAX).step_by(LANES) {
                let bits = std::array::from_fn(|i| first + i as u16);
                let (ours, theirs) = (level.run(Halves(bits)), bits.map(|bits| f16::from_bits(bits).to_f32()));
                assert!(ours.iter().zip(theirs).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()), "{level:?} {first}");
            }
        }
    }
}
