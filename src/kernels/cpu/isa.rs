//! One source, compiled for each instruction set: the same operations in the same order, so the same bits.
//!
//! Functions of single values are plain loops, which the compiler turns into full vectors. Products name their vectors
//! ([`Isa::Lanes`]), as that is where it cannot be trusted to. All of it is `#[inline(always)]` down from [`Task::run`],
//! or it would be compiled for the baseline.

use super::line::LANES;
#[cfg(target_arch = "x86_64")]
use super::{amx::Amx, x86};
use half::{bf16, f16};
use std::sync::LazyLock;

/// Work to be compiled for each instruction set.
pub(super) trait Task {
    type Out;
    /// Whether it is ever run with registers of 8 lanes, and of 16: what is not is not compiled for them.
    const NARROW: bool = true;
    const WIDE: bool = true;

    /// Must be `#[inline(always)]`.
    fn run<I: Isa>(self, isa: I) -> Self::Out;
}

/// A plain loop over values, which the compiler turns into vectors.
pub(crate) trait Loop {
    type Out;

    /// Must be `#[inline(always)]`, and so must be all that it calls.
    fn run(self) -> Self::Out;
}

/// Runs `work` with the best instructions of this processor.
pub(crate) fn by_vectors<L: Loop>(work: L) -> L::Out {
    static BEST: LazyLock<Level> = LazyLock::new(|| Level::best(None));
    BEST.run(Plain(work))
}

/// What `work` gives with each instruction set that this processor has, the portable one first.
#[cfg(test)]
pub(crate) fn by_all_vectors<L: Loop>(work: impl Fn() -> L) -> Vec<L::Out> {
    std::iter::once(Level::PORTABLE).chain(tests::vectorised()).map(|level| level.run(Plain(work()))).collect()
}

struct Plain<L>(L);

impl<L: Loop> Task for Plain<L> {
    type Out = L::Out;

    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> L::Out {
        self.0.run()
    }
}

/// Sixteen f32 values in registers, and what products do with them.
pub(crate) trait Isa: Copy {
    type Lanes: Copy;

    fn load(self, values: &[f32; LANES]) -> Self::Lanes;
    fn store(self, lanes: Self::Lanes, to: &mut [f32; LANES]);
    /// `lanes * x + sum` in every lane, rounded once.
    fn mul_add(self, lanes: Self::Lanes, x: f32, sum: Self::Lanes) -> Self::Lanes;
    /// Widens value 0 or 1 of each pair of bf16 values.
    fn brains(self, pairs: &[u16; 2 * LANES], value: usize) -> Self::Lanes;
    /// Widens f16 values.
    fn halves(self, bits: &[u16; LANES]) -> Self::Lanes;
    /// Adds the products of both bf16 values that each lane is with those that `x` is, the second first, rounded twice.
    #[inline(always)]
    fn dot(self, pairs: Self::Lanes, x: f32, sum: Self::Lanes) -> Self::Lanes {
        dot(self, pairs, x, sum)
    }
    /// Lays bf16 values, held as f32, together two by two, as [`Self::dot`] takes them.
    #[inline(always)]
    fn couple(self, first: Self::Lanes, second: Self::Lanes) -> Self::Lanes {
        let mut values = [[0.0; LANES]; 2];
        self.store(first, &mut values[0]);
        self.store(second, &mut values[1]);
        let mut pairs = [0.0; LANES];
        for lane in 0..LANES {
            pairs[lane] = one([values[0][lane], values[1][lane]]);
        }
        self.load(&pairs)
    }
    /// Asks for a cache line that is read soon. Any address will do.
    fn prefetch(self, from: *const u8);
}

/// [`Isa::dot`] by widening.
#[inline(always)]
pub(super) fn dot<I: Isa>(isa: I, pairs: I::Lanes, x: f32, sum: I::Lanes) -> I::Lanes {
    let mut values = [0.0; LANES];
    isa.store(pairs, &mut values);
    let (mut first, mut second) = ([0.0; LANES], [0.0; LANES]);
    for lane in 0..LANES {
        [first[lane], second[lane]] = two(values[lane]);
    }
    let x = two(x);
    isa.mul_add(isa.load(&first), x[0], isa.mul_add(isa.load(&second), x[1], sum))
}

/// The two bf16 values that lie in memory as this value does.
#[inline(always)]
fn two(value: f32) -> [f32; 2] {
    let [a, b, c, d] = value.to_ne_bytes();
    [[a, b], [c, d]].map(|bytes| bf16::from_ne_bytes(bytes).to_f32())
}

/// [`two`] bf16 values as one.
#[inline(always)]
pub(super) fn one(values: [f32; 2]) -> f32 {
    let [[a, b], [c, d]] = values.map(|value| ((value.to_bits() >> 16) as u16).to_ne_bytes());
    f32::from_ne_bytes([a, b, c, d])
}

/// Asks for a cache line, into the second-level cache, that is read later. Any address will do.
pub(super) fn prefetch(from: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of the baseline, and a prefetch of any address does no harm.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(std::ptr::without_provenance(from));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

/// The instructions that kernels may use, each kind with all before it.
///
/// The results are the same bits with each, but for bf16 arithmetic with [`Instructions::Avx512Bf16`] and [`Instructions::Amx`]: attention
/// is in bf16 there, too, and the first sums in an order of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Instructions {
    /// What every processor of the target has.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 BF16: products of bf16.
    Avx512Bf16,
    /// AMX BF16: products of tiles of bf16.
    Amx,
}

impl Instructions {
    /// All that this processor has.
    pub fn best() -> Self {
        Level::best(None).0
    }
}

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level(Instructions);

impl Level {
    /// The baseline of the target.
    pub(super) const PORTABLE: Self = Self(Instructions::Portable);

    /// All that this processor has, the best last.
    pub(super) fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let narrow = || is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl");
            let avx512 = || is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && narrow();
            let bf16 = || is_x86_feature_detected!("avx512bf16");
            let amx = || Amx::detect().is_some();
            let checks: [(Instructions, &dyn Fn() -> bool); 4] = [
                (Instructions::Avx2, &avx2),
                (Instructions::Avx512, &avx512),
                (Instructions::Avx512Bf16, &bf16),
                (Instructions::Amx, &amx),
            ];
            all.extend(checks.iter().take_while(|(_, check)| check()).map(|(set, _)| Self(*set)));
        }
        all
    }

    /// The best that this processor has, but for what is above `most`.
    pub(super) fn best(most: Option<Instructions>) -> Self {
        let mut all = Self::all().into_iter().filter(|level| most.is_none_or(|most| level.0 <= most));
        all.next_back().unwrap_or(Self::PORTABLE)
    }

    /// Whether there are 32 registers of 16 lanes, rather than 16 of 8 or the like.
    pub(super) fn is_wide(self) -> bool {
        self.0 >= Instructions::Avx512
    }

    /// Whether memory is read best in one stream: by wide vectors of AMD's (Zen 5). Intel's (Sapphire Rapids) want several.
    pub(super) fn is_one_stream(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            static IS_AMD: LazyLock<bool> = LazyLock::new(x86::is_amd);
            self.is_wide() && *IS_AMD
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// What it is.
    pub(super) fn instructions(self) -> Instructions {
        self.0
    }

    pub(super) fn run<T: Task>(self, task: T) -> T::Out {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value comes from `all`, which has found AVX2, FMA and F16C.
            Instructions::Avx2 if T::NARROW => unsafe { x86::avx2(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value comes from `all`, which has found AVX-512 F, BW, DQ and VL beside AVX2, FMA and F16C.
            Instructions::Avx512 | Instructions::Avx512Bf16 | Instructions::Amx if T::WIDE => unsafe { x86::avx512(task) },
            _ => {
                // Nothing would be wrong then but slow, which no other test sees.
                #[cfg(test)]
                assert_eq!(self, Self::PORTABLE, "compiled for other registers");
                task.run(Portable)
            }
        }
    }

    /// As [`Self::run`], with [`Isa::dot`] by AVX-512 BF16 if that is what this is.
    pub(super) fn dots<T: Task>(self, task: T) -> T::Out {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value comes from `all`, which has found AVX-512 BF16 beside what `run` needs for AVX-512.
            Instructions::Avx512Bf16 if T::WIDE => unsafe { x86::avx512bf16(task) },
            _ => self.run(task),
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
    fn brains(self, pairs: &[u16; 2 * LANES], value: usize) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        for (lane, pair) in lanes.iter_mut().zip(pairs.as_chunks::<2>().0) {
            *lane = bf16::from_bits(pair[value % 2]).to_f32();
        }
        lanes
    }

    #[inline(always)]
    fn halves(self, bits: &[u16; LANES]) -> [f32; LANES] {
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// All but the portable one; says what this processor cannot test.
    pub(in crate::kernels::cpu) fn vectorised() -> Vec<Level> {
        let levels = Level::all().split_off(1);
        for name in ["avx2", "avx512", "avx512bf16", "amx"].into_iter().skip(levels.len()) {
            eprintln!("skipped: this processor has no {name}");
        }
        levels
    }

    struct Widen([u16; LANES]);

    impl Task for Widen {
        type Out = [[f32; LANES]; 3];

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Self::Out {
            let mut out = [[0.0; LANES]; 3];
            let mut pairs = [0; 2 * LANES];
            for (pair, bits) in pairs.chunks_exact_mut(2).zip(self.0) {
                pair.copy_from_slice(&[bits, !bits]);
            }
            isa.store(isa.brains(&pairs, 0), &mut out[0]);
            isa.store(isa.brains(&pairs, 1), &mut out[1]);
            isa.store(isa.halves(&self.0), &mut out[2]);
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
