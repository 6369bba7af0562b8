//! Draws that look beyond the scores of a step: XTC, which flips a coin, and mirostat, which remembers surprise.

use super::{
    Scores,
    pick::{row_seed, sample, uniform},
    rank,
    scan::Peaks,
    softmax::Softmax,
};

/// How sampling draws a token from processed scores.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Draw {
    /// From their softmax.
    #[default]
    Plain,
    /// Excludes the top choices now and then (`xtc_probability`,
    /// <https://github.com/oobabooga/text-generation-webui/pull/6335>): of all tokens at least as likely as `threshold`, only the
    /// least likely is left.
    Xtc {
        /// How often, in [0, 1].
        probability: f32,
        /// In [0, 1].
        threshold: f32,
    },
    /// Keeps the mean surprise at `tau` (mirostat 2, <https://arxiv.org/abs/2007.14966>): tokens more surprising than a bound are
    /// left out, and the bound follows what was drawn.
    Mirostat {
        /// Bits, above 0.
        tau: f32,
        /// How fast the bound moves, above 0.
        eta: f32,
    },
}

/// What a row's draws remember.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Surprise {
    /// Mirostat's bound in bits, once it has drawn.
    bound: Option<f32>,
}

/// XTC's coin has a seed of its own, so that it says nothing about the draw of the same step.
const COIN: u64 = 0x5854_4321;

impl Draw {
    /// Draws the token of step `step`; scores that it leaves out become negative infinity. `None` if there is none to draw.
    pub fn draw(&self, scores: &mut Scores<'_>, seed: u64, step: u64, surprise: &mut Surprise) -> Option<u32> {
        let u = uniform(seed, step);
        match *self {
            Self::Plain => scores.sample(u),
            Self::Xtc { probability, threshold } => {
                if uniform(row_seed(seed, COIN), step) < f64::from(probability) {
                    exclude(scores.values_mut(), threshold);
                }
                scores.sample(u)
            }
            Self::Mirostat { tau, eta } => {
                let scores = scores.values_mut();
                let bound = surprise.bound.unwrap_or(2.0 * tau);
                bind(scores, bound);
                let token = sample(scores, u)?;
                if let (Some(row), Some(&score)) = (Softmax::of(scores), scores.get(token as usize)) {
                    // Finite whatever `eta` is: infinities would cancel to no bound at all.
                    surprise.bound = Some((bound - eta * (bits(&row, score) - tau)).clamp(f32::MIN, f32::MAX));
                }
                Some(token)
            }
        }
    }
}

/// `-log2` of the probability.
fn bits(row: &Softmax, score: f32) -> f32 {
    -row.log_probability(score) / std::f32::consts::LN_2
}

/// Leaves of the tokens at least as likely as `threshold` the least likely one.
fn exclude(scores: &mut [f32], threshold: f32) {
    let Some(row) = Softmax::of(scores) else { return };
    let likely = |score: f32| row.probability(score) >= threshold;
    // At least this likely is more likely than the next number below.
    let mut keys = rank::above(scores, &Peaks::of(scores), row.score(f64::from(threshold)).next_down().next_down(), |score| -score);
    keys.retain(|&key| likely(scores[rank::id(key)]));
    let Some(&least) = keys.iter().max() else { return };
    for key in keys.into_iter().filter(|&key| key != least) {
        scores[rank::id(key)] = f32::NEG_INFINITY;
    }
}

/// Leaves out what surprises by more than `bound` bits, but never the most likely token.
fn bind(scores: &mut [f32], bound: f32) {
    let Some(row) = Softmax::of(scores) else { return };
    for score in scores {
        if bits(&row, *score) > bound && *score < row.max {
            *score = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const INF: f32 = f32::INFINITY;

    fn drawn(draw: &Draw, scores: &mut [f32], seed: u64, step: u64, surprise: &mut Surprise) -> Option<u32> {
        Scores::over(scores, |scores| draw.draw(scores, seed, step, surprise))
    }

    fn logs(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn xtc_leaves_the_least_likely_of_the_likely() {
        let of = |threshold| {
            let mut scores = logs(&[0.1, 0.4, 0.05, 0.25, 0.2]);
            exclude(&mut scores, threshold);
            scores.iter().map(|&score| score > -INF).collect::<Vec<_>>()
        };
        assert_eq!(of(0.15), [true, false, true, false, true]);
        assert_eq!(of(0.099), [true, false, true, false, false]);
        assert_eq!(of(0.3), [true; 5], "one alone is no choice");
        assert_eq!(of(0.5), [true; 5]);
        assert_eq!(of(0.0), [false, false, true, false, false]);
        let mut even = vec![1.0; 4];
        exclude(&mut even, 0.25);
        assert_eq!(even, [-INF, -INF, -INF, 1.0], "one is left of equals");
    }

    #[test]
    fn xtc_flips_its_coin() {
        let draw = Draw::Xtc { probability: 0.3, threshold: 0.2 };
        let excluded = |step| {
            let mut scores = logs(&[0.5, 0.3, 0.2]);
            drawn(&draw, &mut scores, 7, step, &mut Surprise::default()).unwrap();
            scores[0] == -INF
        };
        let count = (0..2000).filter(|&step| excluded(step)).count();
        assert!((540..660).contains(&count), "{count} of 2,000 where 600 are expected, standard deviation 20");
        let never = Draw::Xtc { probability: 0.0, threshold: 0.0 };
        let mut scores = logs(&[0.5, 0.5]);
        assert_eq!(
            drawn(&never, &mut scores.clone(), 1, 1, &mut Surprise::default()),
            drawn(&Draw::Plain, &mut scores, 1, 1, &mut Surprise::default())
        );
    }

    #[test]
    fn mirostat_binds_and_learns() {
        let mut scores = logs(&[0.5, 0.25, 0.125, 0.0625, 0.0625]);
        let mut surprise = Surprise::default();
        // The bound begins at 2 * tau = 2 bits: a half and a quarter stay, two thirds and one third of what is left.
        let token = drawn(&Draw::Mirostat { tau: 1.0, eta: 0.5 }, &mut scores, 3, 0, &mut surprise).unwrap();
        assert_eq!(scores.iter().filter(|&&score| score > -INF).count(), 2);
        let expected = [2.0 - 0.5 * (1.5f32.log2() - 1.0), 2.0 - 0.5 * (3f32.log2() - 1.0)][token as usize];
        assert!((surprise.bound.unwrap() - expected).abs() < 1e-5, "{surprise:?}");
        let wild = Draw::Mirostat { tau: 1.0, eta: f32::MAX };
        for step in 0..9 {
            drawn(&wild, &mut logs(&[0.9, 0.1]), 3, step, &mut surprise).unwrap();
            assert!(surprise.bound.unwrap().is_finite());
        }
        let mut scores = logs(&[0.5, 0.5]);
        bind(&mut scores, -3.0);
        assert_eq!(scores.iter().filter(|&&score| score > -INF).count(), 2, "the most likely stay whatever the bound");
    }

    #[test]
    fn mirostat_keeps_to_its_surprise() {
        let row: Vec<f32> = (0..1000).map(|rank| -1.1 * ((rank + 1) as f32).ln()).collect();
        let (draw, mut surprise) = (Draw::Mirostat { tau: 4.0, eta: 0.1 }, Surprise::default());
        let mut total = 0.0;
        for step in 0..1000 {
            let mut scores = row.clone();
            let token = drawn(&draw, &mut scores, 11, step, &mut surprise).unwrap();
            if step >= 500 {
                total += bits(&Softmax::of(&scores).unwrap(), scores[token as usize]);
            }
        }
        assert!((total / 500.0 - 4.0).abs() < 0.1, "{}", total / 500.0);
    }
}
