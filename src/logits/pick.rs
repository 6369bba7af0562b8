//! Chooses tokens: the largest score, or a draw that depends on nothing but the row's seed and the step.

use super::{
    rank,
    scan::{self, Peaks, exp},
    softmax::Softmax,
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// The index of the largest score; the first of equals, and never NaN. `None` if no score is above negative infinity.
pub fn argmax(scores: &[f32]) -> Option<u32> {
    argmax_of(scores, &Peaks::of(scores))
}

pub(super) fn argmax_of(scores: &[f32], peaks: &Peaks) -> Option<u32> {
    let max = peaks.max();
    // The first block that has a score above all that are below the maximum has the maximum.
    let (from, block) = peaks.above(scores, max.next_down()).next()?;
    block.iter().position(|&score| score == max).map(|offset| (from + offset) as u32)
}

/// The `n` largest scores and their indices, best first and of equals the lower index first; NaN and negative infinity
/// are left out.
pub fn top(scores: &[f32], n: usize) -> Vec<(u32, f32)> {
    rank::top(scores, &Peaks::of(scores), n)
}

/// The `n` most likely tokens with their probabilities, as [`top`] orders them.
pub fn likely(scores: &[f32], n: usize) -> Vec<(u32, f32)> {
    let total = log_sum_exp(scores);
    top(scores, n).into_iter().map(|(id, score)| (id, (f64::from(score) - total).exp() as f32)).collect()
}

/// An index drawn with probability softmax(`scores`), by inverting the cumulative distribution at `u` in `[0, 1)`, in
/// index order. Positive infinity wins, NaN never. `None` if no score is above negative infinity.
pub fn sample(scores: &[f32], u: f64) -> Option<u32> {
    sample_of(scores, &Peaks::of(scores), u)
}

pub(super) fn sample_of(scores: &[f32], peaks: &Peaks, u: f64) -> Option<u32> {
    let max = peaks.max();
    if max.is_infinite() {
        return argmax_of(scores, peaks);
    }
    let weight = |score: f32| exp(score - max);
    let masses = peaks.masses(scores, max);
    let goal = u * masses.iter().sum::<f64>();
    let mut below = 0.0;
    let mut last = None;
    for ((from, block), mass) in scan::blocks(scores).zip(masses).filter(|(_, mass)| *mass > 0.0) {
        last = Some((from, block));
        if below + mass <= goal {
            below += mass;
            continue;
        }
        for (offset, &score) in block.iter().enumerate() {
            below += f64::from(weight(score));
            if below > goal {
                return Some((from + offset) as u32);
            }
        }
    }
    // Sums in another order may end a rounding error short of the goal.
    let (from, block) = last?;
    block.iter().rposition(|&score| weight(score) > 0.0).map(|offset| (from + offset) as u32)
}

/// A draw from softmax(`p`), made of `id`, a draw from softmax(`q`): `id` itself with probability min(1, p / q), otherwise a
/// draw from what `p` has more than `q` (<https://arxiv.org/abs/2211.17192>). `accept` and `redraw` are uniform in `[0, 1)`.
pub(crate) fn correct(p: &[f32], q: &[f32], id: u32, accept: f64, redraw: f64) -> Option<u32> {
    let (Some(of_p), Some(of_q)) = (Softmax::of(p), Softmax::of(q)) else {
        // One of them is sure of a token: then `id` says nothing.
        return sample(p, redraw);
    };
    let p_of = |score: f32| f64::from(of_p.weight(score)) / of_p.sum;
    let q_of = |score: f32| f64::from(of_q.weight(score)) / of_q.sum;
    let (&p_id, &q_id) = (p.get(id as usize)?, q.get(id as usize)?);
    if accept * q_of(q_id) < p_of(p_id) {
        return Some(id);
    }
    let more = || p.iter().zip(q).map(|(&p, &q)| (p_of(p) - q_of(q)).max(0.0));
    let mut goal = redraw * more().sum::<f64>();
    let mut last = None;
    for (id, weight) in more().enumerate().filter(|&(_, weight)| weight > 0.0) {
        last = Some(id as u32);
        if weight > goal {
            return last;
        }
        goal -= weight;
    }
    // Nothing is left of `p` where both are the same but for rounding.
    last.or_else(|| sample(p, redraw))
}

/// The draw of step `step` of a row, uniform in `[0, 1)` with 53 bits: two words of ChaCha8 at a counted position, so
/// forks carry no state.
pub fn uniform(seed: u64, step: u64) -> f64 {
    uniform_of(seed, 0, step)
}

/// A further draw of the same step; [`uniform`] is that of lane 0.
pub(crate) fn uniform_of(seed: u64, lane: u64, step: u64) -> f64 {
    let mut words = ChaCha8Rng::seed_from_u64(seed);
    words.set_stream(lane);
    words.set_word_pos(2 * u128::from(step));
    (words.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The seed of row `row` of a call: the call's own for row 0, for the others output `row` of SplitMix64
/// (<https://prng.di.unimi.it/splitmix64.c>) started at it.
pub fn row_seed(seed: u64, row: u64) -> u64 {
    if row == 0 {
        return seed;
    }
    let mut hash = seed.wrapping_add(row.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// The natural logarithm of the sum of exponentials, added up in f64; NaN counts as negative infinity.
pub fn log_sum_exp(scores: &[f32]) -> f64 {
    let peaks = Peaks::of(scores);
    let max = peaks.max();
    if max.is_infinite() { f64::from(max) } else { f64::from(max) + peaks.masses(scores, max).iter().sum::<f64>().ln() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INF: f32 = f32::INFINITY;

    #[test]
    fn argmax_takes_the_first() {
        assert_eq!(argmax(&[1.0, 3.0, f32::NAN, 3.0]), Some(1));
        assert_eq!(argmax(&[-0.0, 0.0]), Some(0));
        assert_eq!(argmax(&[-INF, f32::MIN]), Some(1));
        assert_eq!(argmax(&[0.0, INF, INF]), Some(1));
        for none in [&[][..], &[-INF, -INF], &[f32::NAN]] {
            assert_eq!(argmax(none), None);
        }
        let mut row: Vec<f32> = (0..1_000).map(|id| (id % 97) as f32).collect();
        assert_eq!(argmax(&row), Some(96));
        row[999] = 97.0;
        assert_eq!(argmax(&row), Some(999));
    }

    #[test]
    fn top_is_best_first() {
        let row = [1.0, 3.0, -INF, 3.0, f32::NAN, -0.0, 0.0];
        assert_eq!(top(&row, 4), [(1, 3.0), (3, 3.0), (0, 1.0), (5, 0.0)]);
        assert_eq!(top(&row, usize::MAX).len(), 5);
        assert!(top(&row, 0).is_empty());
    }

    #[test]
    fn likely_tells_probabilities() {
        let row = [1.0f32.ln(), -INF, 5.0f32.ln(), 2.0f32.ln()];
        let found = likely(&row, 2);
        assert_eq!(found.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [2, 3]);
        assert!((found[0].1 - 0.625).abs() < 1e-6 && (found[1].1 - 0.25).abs() < 1e-6, "{found:?}");
        assert_eq!(likely(&row, 9).len(), 3, "what is forbidden is no candidate");
    }

    #[test]
    fn sample_inverts_the_distribution() {
        // probabilities 1/8, 0, 5/8, 0, 1/4
        let row = [1.0f32.ln(), -INF, 5.0f32.ln(), f32::NAN, 2.0f32.ln()];
        for (u, id) in [(0.0, 0), (0.12, 0), (0.13, 2), (0.74, 2), (0.76, 4), (1.0 - 1e-16, 4), (1.0, 4)] {
            assert_eq!(sample(&row, u), Some(id), "{u}");
        }
        assert_eq!(sample(&[0.0, INF, INF], 0.9), Some(1));
        assert_eq!(sample(&[-INF, 0.0, -INF], 0.0), Some(1));
        assert_eq!(sample(&[-INF, 0.0, -200.0], 1.0), Some(1));
        assert_eq!(sample(&[f32::MIN; 4], 0.6), Some(2));
        assert_eq!(sample(&[-INF; 3], 0.5), None);
        assert_eq!(sample(&[f32::NAN], 0.5), None);
        let flat = [7.0; 1_000];
        for id in [0, 1, 63, 64, 65, 500, 999] {
            assert_eq!(sample(&flat, (f64::from(id) + 0.5) / 1_000.0), Some(id as u32));
        }
    }

    #[test]
    fn sample_follows_softmax() {
        let row: Vec<f32> = (0..100).map(|id| if id % 10 == 3 { (id as f32 * 0.37).sin() * 2.0 } else { -INF }).collect();
        let sum = log_sum_exp(&row);
        let draws = 4_000;
        let mut counts = vec![0u32; row.len()];
        for step in 0..draws {
            if let Some(id) = sample(&row, uniform(5, step)) {
                counts[id as usize] += 1;
            }
        }
        let mut chi_square = 0.0;
        for (&score, &count) in row.iter().zip(&counts) {
            let expected = (f64::from(score) - sum).exp() * draws as f64;
            assert!(expected > 0.0 || count == 0);
            if expected > 0.0 {
                chi_square += (f64::from(count) - expected).powi(2) / expected;
            }
        }
        assert!(chi_square < 27.88, "{chi_square}"); // 9 degrees of freedom, p = 0.001
    }

    #[test]
    fn draws_are_pinned() {
        let draws = [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(u64::MAX, u64::MAX)];
        assert_eq!(draws, [0.7090754154265618, 0.46592172228961015, 0.40248566366484806, 0.13623943518840775]);
        assert_eq!([row_seed(42, 0), row_seed(42, 1), row_seed(42, 2)], [42, 13_679_457_532_755_275_413, 2_949_826_092_126_892_291]);
    }

    #[test]
    fn corrected_draws_follow_the_target() {
        let p = [2.0f32.ln(), 1.0f32.ln(), 5.0f32.ln(), -INF, 2.0f32.ln()];
        for q in [[0.0, 3.0, -1.0, 0.5, -INF], [-INF, -INF, -INF, 0.0, -INF], [0.0; 5], p] {
            let draws = 20_000;
            let mut counts = [0u32; 5];
            let mut kept = 0;
            for step in 0..draws {
                let [draft, accept, redraw] = [1, 2, 3].map(|lane| uniform_of(3, lane, step));
                let id = sample(&q, draft).unwrap_or_default();
                let token = correct(&p, &q, id, accept, redraw).unwrap_or(3);
                kept += u32::from(token == id);
                counts[token as usize] += 1;
            }
            let expected = [0.2, 0.1, 0.5, 0.0, 0.2].map(|part| part * draws as f64);
            assert_eq!(counts[3], 0);
            let terms = expected.iter().zip(counts).filter(|(expected, _)| **expected > 0.0);
            let chi_square: f64 = terms.map(|(expected, count)| (f64::from(count) - expected).powi(2) / expected).sum();
            assert!(chi_square < 16.27, "{chi_square}"); // 3 degrees of freedom, p = 0.001
            assert!(q != p || kept == draws as u32);
        }
        assert_eq!(correct(&[0.0, INF], &[0.0, 0.0], 0, 0.0, 0.9), Some(1));
        assert_eq!(correct(&[0.0, -INF], &[0.0, INF], 1, 0.0, 0.9), Some(0));
        assert_eq!(correct(&[0.0, -INF], &[-INF, 0.0], 1, 0.0, 0.0), Some(0));
    }

    #[test]
    fn draws_are_one_stream() {
        let mut words = ChaCha8Rng::seed_from_u64(9);
        for step in 0..100 {
            assert_eq!(uniform(9, step), (words.next_u64() >> 11) as f64 * 2f64.powi(-53));
        }
    }

    #[test]
    fn log_sum_exp_is_exact_at_the_edges() {
        assert!((log_sum_exp(&[1.0, 2.0, 3.0]) - 3.407_605_964_444_38).abs() < 1e-7);
        assert_eq!(log_sum_exp(&[1e30, 0.0]), f64::from(1e30f32));
        assert_eq!([log_sum_exp(&[]), log_sum_exp(&[-INF])], [f64::NEG_INFINITY; 2]);
        assert_eq!(log_sum_exp(&[INF, 0.0]), f64::INFINITY);
    }
}
