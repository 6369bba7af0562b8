//! The distribution of a row of scores: its maximum, its normaliser, its entropy.

use super::scan::{Peaks, exp};

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
        Self::within(scores, &Peaks::of(scores))
    }

    /// As [`Self::of`], of scores whose peaks are known.
    pub fn within(scores: &[f32], peaks: &Peaks) -> Option<Self> {
        // Of two zeros either may be found, and the sign shows in what it is taken from: it is 0, never -0.
        let max = peaks.max() + 0.0;
        (max.is_finite() && !peaks.nan()).then(|| Self { max, sum: peaks.masses(scores, max).iter().sum() })
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
        self.sum.ln() - Peaks::of(scores).moment(scores, self.max) / self.sum
    }
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
    fn the_largest_of_two_zeros_is_positive() {
        for scores in [[-0.0, 0.0], [0.0, -0.0], [-0.0, -1.0]] {
            assert!(Softmax::of(&scores).unwrap().max.is_sign_positive(), "{scores:?}");
        }
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
        assert_eq!(Peaks::of(&[f32::NAN, -1.0, -f32::NAN]).max(), -1.0);
        assert_eq!(Peaks::of(&[f32::NAN]).max(), -inf);
    }
}
