//! Passes over whole rows of scores, by the vectors of this processor: most of what choosing a token costs.
//!
//! A row is seen in blocks, so that what looks for few tokens passes over most of it.

use crate::kernels::{BLOCK, Highest, Loop, by_vectors, filled};

/// The largest score of each block, where NaN is none.
#[derive(Debug, Clone)]
pub(super) struct Peaks {
    of: Vec<f32>,
    nan: bool,
}

impl Peaks {
    pub fn of(scores: &[f32]) -> Self {
        let mut of = vec![0.0; scores.len().div_ceil(BLOCK)];
        by_vectors(Highest { values: scores, peaks: &mut of });
        Self::known(scores, of)
    }

    /// Of the largest scores of all blocks, NaN for those that have one.
    pub fn known(scores: &[f32], mut of: Vec<f32>) -> Self {
        let mut nan = false;
        for ((_, block), peak) in blocks(scores).zip(&mut of).filter(|(_, peak)| peak.is_nan()) {
            *peak = block.iter().fold(f32::NEG_INFINITY, |max, &score| larger(max, score));
            nan = true;
        }
        Self { of, nan }
    }

    /// The largest score, or negative infinity.
    pub fn max(&self) -> f32 {
        let (lines, rest) = self.of.as_chunks::<16>();
        let mut lanes = [f32::NEG_INFINITY; 16];
        for line in lines {
            for (lane, &peak) in lanes.iter_mut().zip(line) {
                *lane = larger(*lane, peak);
            }
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &peak| larger(max, peak))
    }

    /// Whether a score is NaN.
    pub fn nan(&self) -> bool {
        self.nan
    }

    /// The largest score of the block of `id`, if there is one.
    pub fn around(&self, id: usize) -> Option<f32> {
        self.of.get(id / BLOCK).copied()
    }

    /// Takes note that the score of `id` was `old`; neither is NaN.
    pub fn changed(&mut self, scores: &[f32], id: usize, old: f32) {
        let (Some(peak), Some(&score)) = (self.of.get_mut(id / BLOCK), scores.get(id)) else { return };
        if score >= *peak {
            *peak = score;
        } else if old == *peak {
            let block = scores[id / BLOCK * BLOCK..].iter().take(BLOCK);
            *peak = block.fold(f32::NEG_INFINITY, |max, &score| larger(max, score));
        }
    }

    /// Takes note that `change` was done to all scores: one that keeps their order.
    pub fn follow(&mut self, change: impl Fn(f32) -> f32) {
        self.of.iter_mut().for_each(|peak| *peak = change(*peak));
    }

    /// The `n`-th largest peak, which at least `n` scores reach; negative infinity if there are fewer, infinity for none.
    pub fn nth(&self, n: usize) -> f32 {
        match n.checked_sub(1) {
            None => f32::INFINITY,
            Some(at) if at < self.of.len() => *self.of.clone().select_nth_unstable_by(at, |a, b| b.total_cmp(a)).1,
            _ => f32::NEG_INFINITY,
        }
    }

    /// The blocks with a score above `floor`, each with the id of its first.
    pub fn above<'a>(&'a self, scores: &'a [f32], floor: f32) -> impl Iterator<Item = (usize, &'a [f32])> {
        blocks(scores).zip(&self.of).filter(move |&(_, &peak)| peak > floor).map(|(block, _)| block)
    }

    /// The same of scores to be changed.
    pub fn above_mut<'a>(&'a self, scores: &'a mut [f32], floor: f32) -> impl Iterator<Item = &'a mut [f32]> {
        scores.chunks_mut(BLOCK).zip(&self.of).filter(move |&(_, &peak)| peak > floor).map(|(block, _)| block)
    }

    /// The blocks without a score above negative infinity.
    pub fn empty<'a>(&'a self, scores: &'a mut [f32]) -> impl Iterator<Item = &'a mut [f32]> {
        scores.chunks_mut(BLOCK).zip(&self.of).filter(move |&(_, &peak)| peak == f32::NEG_INFINITY).map(|(block, _)| block)
    }

    /// Makes scores below `least` negative infinity; but not in blocks that have no others and are not NaN anywhere, which are
    /// left as they are.
    pub fn drop_below(&mut self, scores: &mut [f32], least: f32) {
        by_vectors(DropBelow { scores, peaks: &mut self.of, nan: self.nan, least });
    }

    /// The sum of `exp(score - max)` of each block.
    pub fn masses(&self, scores: &[f32], max: f32) -> Vec<f64> {
        by_vectors(Sums::<false> { scores, peaks: &self.of, max })
    }

    /// The sum of `exp(score - max) * (score - max)`.
    pub fn moment(&self, scores: &[f32], max: f32) -> f64 {
        by_vectors(Sums::<true> { scores, peaks: &self.of, max }).iter().sum()
    }
}

/// The blocks of a row, each with the id of its first score.
pub(super) fn blocks(scores: &[f32]) -> impl Iterator<Item = (usize, &[f32])> {
    (0..).step_by(BLOCK).zip(scores.chunks(BLOCK))
}

/// Takes `max` and then `shift` from each score.
pub(super) fn lower(scores: &mut [f32], max: f32, shift: f32) {
    by_vectors(Lower { scores, max, shift });
}

/// `e^x` for `x <= 0` within 2 units in the last place; 0 for NaN and for what underflows.
///
/// Ours and not libm's, so that the bits are the same on every machine and that loops over it vectorise. The polynomial
/// is Cephes' (`expf`).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// The upper part of ln 2, exact in products with small integers, and what it lacks.
    const LN2: (f32, f32) = (355.0 / 512.0, -2.121_944_4e-4);
    let x = if x > -88.0 { x } else { -88.0 }; // where the power below is 0
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2.0 - n * LN2.1;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    (p * r * r + r + 1.0) * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

#[inline(always)]
fn larger(max: f32, score: f32) -> f32 {
    if score > max { score } else { max }
}

/// The sum of `exp(score - max)` of each block; in `MOMENT` times `score - max`.
struct Sums<'a, const MOMENT: bool> {
    scores: &'a [f32],
    peaks: &'a [f32],
    max: f32,
}

impl<const MOMENT: bool> Loop for Sums<'_, MOMENT> {
    type Out = Vec<f64>;

    #[inline(always)]
    fn run(self) -> Vec<f64> {
        let (blocks, rest) = self.scores.as_chunks();
        let mut sums = vec![0.0; self.peaks.len()];
        for ((sum, block), &peak) in sums.iter_mut().zip(blocks).zip(self.peaks) {
            // Most have nothing after a `top_k`.
            if peak > f32::NEG_INFINITY {
                *sum = sum_of::<MOMENT>(block, self.max);
            }
        }
        if let (Some(sum), Some(&peak), false) = (sums.last_mut(), self.peaks.last(), rest.is_empty())
            && peak > f32::NEG_INFINITY
        {
            *sum = sum_of::<MOMENT>(&filled(rest), self.max);
        }
        sums
    }
}

#[inline(always)]
fn sum_of<const MOMENT: bool>(block: &[f32; BLOCK], max: f32) -> f64 {
    let mut lanes = [0.0f64; 8];
    for chunk in block.as_chunks::<8>().0 {
        let mut weights = [0.0; 8];
        for i in 0..8 {
            let below = chunk[i] - max;
            // 0 also of what is infinitely far below.
            weights[i] = if MOMENT { exp(below) * below.max(f32::MIN) } else { exp(below) };
        }
        for i in 0..8 {
            lanes[i] += f64::from(weights[i]);
        }
    }
    lanes.iter().sum()
}

struct Lower<'a> {
    scores: &'a mut [f32],
    max: f32,
    shift: f32,
}

impl Loop for Lower<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        for score in self.scores {
            *score = (*score - self.max) - self.shift;
        }
    }
}

/// Divides each score.
pub(super) fn divide(scores: &mut [f32], by: f32) {
    by_vectors(Divide { scores, by });
}

struct Divide<'a> {
    scores: &'a mut [f32],
    by: f32,
}

impl Loop for Divide<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        for score in self.scores {
            *score /= self.by;
        }
    }
}

struct DropBelow<'a> {
    scores: &'a mut [f32],
    peaks: &'a mut [f32],
    nan: bool,
    least: f32,
}

impl Loop for DropBelow<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        for (block, peak) in self.scores.chunks_mut(BLOCK).zip(self.peaks) {
            let all = *peak < self.least;
            if *peak > f32::NEG_INFINITY && (self.nan || !all) {
                for score in block {
                    // Adding -0 changes nothing. A choice of what to store would be stored under a mask, which is slow on some processors.
                    *score += if *score < self.least { f32::NEG_INFINITY } else { -0.0 };
                }
            }
            if all {
                *peak = f32::NEG_INFINITY;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::by_all_vectors;

    /// Rows of every length around whole blocks, with what scores can be.
    fn rows() -> impl Iterator<Item = Vec<f32>> {
        [0, 1, 15, 63, 64, 65, 127, 200, 1_000].into_iter().flat_map(|len| {
            let plain: Vec<f32> = (0..len).map(|id| ((id * 7_919 % 1_009) as f32 - 500.0) / 37.0).collect();
            let holes = plain.iter().enumerate().map(|(id, &score)| if id / 70 % 2 == 0 { f32::NEG_INFINITY } else { score }).collect();
            let odd = [f32::NAN, -0.0, 0.0, f32::MIN, f32::MAX, 1e-40, f32::NEG_INFINITY, -f32::NAN];
            let odd = plain.iter().enumerate().map(|(id, &score)| if id % 3 == 0 { odd[id / 3 % 8] } else { score }).collect();
            [plain, holes, odd]
        })
    }

    /// The bits with the portable instructions; those with all others must be the same.
    fn bits<L: Loop>(work: impl Fn() -> L, bits: impl Fn(L::Out) -> Vec<u64>) -> Vec<u64> {
        let all: Vec<_> = by_all_vectors(work).into_iter().map(bits).collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        all.into_iter().next().unwrap_or_default()
    }

    fn wide(values: &[f32]) -> Vec<u64> {
        values.iter().map(|value| u64::from(value.to_bits())).collect()
    }

    struct Blocks<'a>(&'a [f32]);

    impl Loop for Blocks<'_> {
        type Out = Vec<f32>;

        #[inline(always)]
        fn run(self) -> Vec<f32> {
            let mut peaks = vec![0.0; self.0.len().div_ceil(BLOCK)];
            Highest { values: self.0, peaks: &mut peaks }.run();
            peaks
        }
    }

    #[test]
    fn vectors_do_what_plain_loops_do() {
        for row in rows() {
            let possible = |score: &&f32| **score > f32::NEG_INFINITY;
            let peaks = Peaks::of(&row);
            let highest = row.chunks(BLOCK).map(|block| block.iter().filter(possible).fold(f32::NEG_INFINITY, |a, &b| a.max(b)));
            assert!(peaks.of.iter().copied().eq(highest));
            assert_eq!(peaks.nan(), row.iter().any(|score| score.is_nan()));
            let nans = bits(|| Blocks(&row), |peaks| peaks.iter().map(|peak| u64::from(peak.is_nan())).collect());
            assert!(row.chunks(BLOCK).map(|block| u64::from(block.iter().any(|score| score.is_nan()))).eq(nans));
            let peaks_of = |peaks: Vec<f32>| peaks.iter().map(|peak| if peak.is_nan() { 0 } else { u64::from(peak.to_bits()) }).collect();
            bits(|| Blocks(&row), peaks_of);

            let max = peaks.max().min(50.0);
            let of = |sums: Vec<f64>| sums.into_iter().map(f64::to_bits).collect();
            bits(|| Sums::<true> { scores: &row, peaks: &peaks.of, max }, of);
            let masses = bits(|| Sums::<false> { scores: &row, peaks: &peaks.of, max }, of);
            for (block, mass) in row.chunks(BLOCK).zip(masses) {
                let exact: f64 = block.iter().filter(|score| **score <= max).map(|score| f64::from(score - max).exp()).sum();
                let (mass, over) = (f64::from_bits(mass), block.iter().any(|score| *score > max));
                assert!(over || max == f32::NEG_INFINITY || (mass - exact).abs() <= 1e-6 * exact, "{mass} {exact}");
            }

            for least in [f32::NEG_INFINITY, -1.5, 0.0, 1e-40, f32::INFINITY] {
                let (mut dropped, mut after) = (row.clone(), peaks.clone());
                after.drop_below(&mut dropped, least);
                let plain: Vec<f32> = row.iter().map(|&score| if score < least { f32::NEG_INFINITY } else { score }).collect();
                assert_eq!(after.of, Peaks::of(&plain).of);
                for ((left, plain), &peak) in dropped.chunks(BLOCK).zip(plain.chunks(BLOCK)).zip(&after.of) {
                    assert!(wide(left) == wide(plain) || peak == f32::NEG_INFINITY && !after.nan);
                }
            }
            let mut lowered = row.clone();
            lower(&mut lowered, 1.5, 0.25);
            assert!(
                lowered.iter().zip(&row).all(|(new, old)| new.to_bits() == (old - 1.5 - 0.25).to_bits() || new.is_nan() && old.is_nan())
            );
        }
    }

    #[test]
    fn blocks_hold_what_is_above() {
        for row in rows() {
            let peaks = Peaks::of(&row);
            for n in [0, 1, 2, 5, 100] {
                let reach = row.iter().filter(|score| **score >= peaks.nth(n)).count();
                assert!(reach >= n || peaks.nth(n) == f32::NEG_INFINITY, "{n}: {reach}");
            }
            let mut copy = row.clone();
            let blocks: Vec<&[f32]> = peaks
                .above(&row, 3.0)
                .map(|(from, block)| {
                    assert_eq!(wide(&row[from..][..block.len()]), wide(block));
                    block
                })
                .collect();
            assert_eq!(blocks.len(), peaks.above_mut(&mut copy, 3.0).count());
            assert_eq!(blocks.concat().iter().filter(|score| **score > 3.0).count(), row.iter().filter(|score| **score > 3.0).count());
        }
    }
}
