//! The distribution of a row of scores: its maximum, its normaliser, its entropy.

/// Scores looked at together. Blocks that hold nothing above negative infinity cost a comparison each, which is what
/// makes everything after a `top_k` cheap.
pub(super) const BLOCK: usize = 64;

/// Probabilities of a row: `exp(score - max) / sum`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    pub max: f32,
    /// Of `exp(score - max)`, at least 1.
    pub sum: f64,
}

impl Softmax {
    /// `None` if the row has no distribution: nothing is above negative infinity, or a score is NaN or positive
    /// infinity. Warpers leave such rows as they are, for [`run`](super::run) to report.
    pub fn of(scores: &[f32]) -> Option<Self> {
        let max = max(scores);
        (max.is_finite() && !scores.iter().fold(false, |nan, score| nan | score.is_nan()))
            .then(|| Self { max, sum: total(scores, |score| exp(score - max)) })
    }

    /// The probability before it is divided by `sum`.
    pub fn weight(&self, score: f32) -> f32 {
        exp(score - self.max)
    }

    pub fn probability(&self, score: f32) -> f32 {
        (f64::from(self.weight(score)) / self.sum) as f32
    }

    /// In the order of operations that torch's `log_softmax` has.
    pub fn log_probability(&self, score: f32) -> f32 {
        (score - self.max) - self.sum.ln() as f32
    }

    /// The score that has the probability `p`.
    pub fn score(&self, p: f64) -> f32 {
        (f64::from(self.max) + (p * self.sum).ln()) as f32
    }

    /// In nats; `scores` are those the distribution was made of.
    pub fn entropy(&self, scores: &[f32]) -> f64 {
        let weighted = total(scores, |score| self.weight(score) * (score - self.max).max(f32::MIN));
        self.sum.ln() - weighted / self.sum
    }
}

/// Makes scores log-probabilities. `false`, and nothing is changed, if the row has no distribution.
pub(crate) fn log_softmax(scores: &mut [f32]) -> bool {
    let Some(row) = Softmax::of(scores) else { return false };
    let shift = row.sum.ln() as f32;
    for score in scores {
        *score = (*score - row.max) - shift;
    }
    true
}

/// The largest score that is not NaN; negative infinity if there is none.
pub(super) fn max(scores: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = scores.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &score) in lanes.iter_mut().zip(chunk) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &score| if score > max { score } else { max })
}

/// Whether any score is above `floor`.
pub(super) fn any_above(scores: &[f32], floor: f32) -> bool {
    scores.iter().fold(false, |any, &score| any | (score > floor))
}

/// The sum of `weight(score)`, added up in f64 in one fixed order; `weight` is 0 at negative infinity.
pub(super) fn total(scores: &[f32], weight: impl Fn(f32) -> f32) -> f64 {
    let mut sum = 0.0;
    for block in scores.chunks(BLOCK).filter(|block| any_above(block, f32::NEG_INFINITY)) {
        let mut weights = [0.0; BLOCK];
        for (out, &score) in weights.iter_mut().zip(block) {
            *out = weight(score);
        }
        let mut lanes = [0.0f64; 8];
        for chunk in weights.as_chunks::<8>().0 {
            for (lane, &weight) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(weight);
            }
        }
        sum += lanes.iter().sum::<f64>();
    }
    sum
}

/// `e^x` for `x <= 0` within 2 units in the last place; 0 for NaN and for what underflows.
///
/// Ours and not libm's, so that the bits are the same on every machine and that loops over it vectorise. The polynomial
/// is Cephes' (`expf`).
#[inline]
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            assert!((f64::from(exp(x)) - exact).abs() <= 2.0 * ulp, "{x}");
        }
        assert_eq!([exp(0.0), exp(-0.0), exp(-88.0), exp(f32::MIN), exp(f32::NEG_INFINITY), exp(f32::NAN)], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn distribution() {
        let scores: Vec<f32> = (0..200).map(|id| if id % 3 == 0 { f32::NEG_INFINITY } else { (id as f32).sin() * 5.0 }).collect();
        let exact: f64 = scores.iter().map(|&score| f64::from(score).exp()).sum();
        let entropy: f64 = scores.iter().map(|&score| f64::from(score).exp() / exact).filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum();
        let row = Softmax::of(&scores).unwrap();
        assert!((row.sum.ln() + f64::from(row.max) - exact.ln()).abs() < 1e-6);
        assert!((row.entropy(&scores) - entropy).abs() < 1e-6);
        assert_eq!(row.score(f64::from(row.probability(1.5))), 1.5);
    }

    #[test]
    fn rows_without_a_distribution() {
        let inf = f32::INFINITY;
        for row in [&[][..], &[-inf, -inf], &[f32::NAN, 1.0], &[1.0, -f32::NAN], &[inf, 0.0]] {
            assert!(Softmax::of(row).is_none(), "{row:?}");
        }
        assert_eq!(max(&[f32::NAN, -1.0, -f32::NAN]), -1.0);
        assert_eq!(max(&[f32::NAN]), -inf);
    }
}
