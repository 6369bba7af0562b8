//! Processors that shape the distribution before a draw.

use super::{History, LogitsProcessor, Scores, decimal, pick, rank, scan::Peaks, softmax::Softmax};
use crate::error::Result;

/// Divides by the temperature (`temperature`).
#[derive(Debug, Clone)]
pub struct Temperature {
    /// Above 0.
    pub temperature: f32,
}

/// Keeps the most likely of the top 100 tokens within a budget of entropy (`top_h`, <https://arxiv.org/abs/2509.02510>).
#[derive(Debug, Clone)]
pub struct TopH {
    /// In (0, 1].
    pub top_h: f32,
}

/// Keeps scores within so many standard deviations of the best (`top_n_sigma`, <https://arxiv.org/abs/2411.07641>). The
/// temperature does not change which.
#[derive(Debug, Clone)]
pub struct TopNSigma {
    /// Above 0.
    pub top_n_sigma: f32,
}

/// Keeps the `k` highest scores and their ties (`top_k`, <https://arxiv.org/abs/1805.04833>).
#[derive(Debug, Clone)]
pub struct TopK {
    /// At least 1.
    pub top_k: usize,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Keeps the smallest set of most likely tokens that reaches a probability (`top_p`, <https://arxiv.org/abs/1904.09751>).
#[derive(Debug, Clone)]
pub struct TopP {
    /// In [0, 1).
    pub top_p: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Keeps tokens at least this likely, relative to the most likely one (`min_p`, <https://arxiv.org/abs/2407.01082>).
#[derive(Debug, Clone)]
pub struct MinP {
    /// In [0, 1].
    pub min_p: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Keeps tokens whose surprise is nearest to the entropy (`typical_p`, <https://arxiv.org/abs/2202.00666>).
#[derive(Debug, Clone)]
pub struct Typical {
    /// In (0, 1).
    pub typical_p: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Drops tokens below a probability (`epsilon_cutoff`, <https://arxiv.org/abs/2210.15191>).
#[derive(Debug, Clone)]
pub struct EpsilonCutoff {
    /// In (0, 1).
    pub epsilon_cutoff: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Drops tokens below the probability `min(eta, sqrt(eta) * exp(-entropy))` (`eta_cutoff`, <https://arxiv.org/abs/2210.15191>).
#[derive(Debug, Clone)]
pub struct EtaCutoff {
    /// In (0, 1).
    pub eta_cutoff: f32,
    /// Tokens kept in any case.
    pub min_tokens_to_keep: usize,
}

/// Log-softmax, so that the scores are log-probabilities again (`renormalize_logits`).
#[derive(Debug, Clone)]
pub struct Renormalize;

impl LogitsProcessor for Temperature {
    fn name(&self) -> &str {
        "temperature"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        Scores::over(scores, |scores| self.shape(history, scores))
    }

    fn shape(&self, _: &History<'_>, scores: &mut Scores<'_>) -> Result<()> {
        scores.divide(self.temperature);
        Ok(())
    }
}

impl LogitsProcessor for TopH {
    fn name(&self) -> &str {
        "top_h"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let best = pick::top(scores, 100);
        let values: Vec<f32> = best.iter().map(|&(_, score)| score).collect();
        let Some(row) = Softmax::of(&values) else { return Ok(()) };
        let terms: Vec<f64> = values.iter().map(|&score| f64::from(row.probability(score))).map(|p| -p * p.ln()).collect();
        let budget = terms.iter().filter(|term| !term.is_nan()).sum::<f64>() * f64::from(self.top_h);
        let mut spent = 0.0;
        let within = terms.iter().take_while(|&term| {
            spent += term; // HF: NaN at a probability of 0 ends it
            spent <= budget
        });
        let kept = within.count().max(1);
        drop_if(scores, |score| !score.is_nan()); // NaN stays, to be reported
        restore(scores, &best[..kept]);
        Ok(())
    }
}

impl LogitsProcessor for TopNSigma {
    fn name(&self) -> &str {
        "top_n_sigma"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let Some(row) = Softmax::of(scores) else { return Ok(()) };
        // Of what is possible: a ban must not move the cutoff.
        let possible = || scores.iter().filter(|score| score.is_finite()).map(|&score| f64::from(score - row.max));
        let (count, sum) = possible().fold((0.0, 0.0), |(count, sum), below| (count + 1.0, sum + below));
        let mean = sum / count;
        let deviation = (possible().map(|below| (below - mean).powi(2)).sum::<f64>() / count).sqrt();
        let cutoff = row.max - (f64::from(self.top_n_sigma) * deviation) as f32;
        Scores::over(scores, |scores| scores.drop_below(cutoff));
        Ok(())
    }
}

impl LogitsProcessor for TopK {
    fn name(&self) -> &str {
        "top_k"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        Scores::over(scores, |scores| self.shape(history, scores))
    }

    fn shape(&self, _: &History<'_>, scores: &mut Scores<'_>) -> Result<()> {
        let (values, peaks) = scores.parts();
        let worst = rank::nth(values, peaks, self.top_k.max(self.min_tokens_to_keep));
        scores.drop_below(worst);
        Ok(())
    }
}

impl LogitsProcessor for TopP {
    fn name(&self) -> &str {
        "top_p"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        Scores::over(scores, |scores| self.shape(history, scores))
    }

    fn shape(&self, _: &History<'_>, scores: &mut Scores<'_>) -> Result<()> {
        let (values, peaks) = scores.parts();
        let Some(row) = Softmax::within(values, peaks) else { return Ok(()) };
        let rest = (1.0 - decimal(self.top_p)) as f32;
        // All tokens less likely than rest / n together do not exceed the rest, so none of them is kept. The half leaves
        // room for rounding.
        let cutoff = row.score(0.5 * f64::from(rest) / values.len() as f64);
        let (mut keys, cutoff) = candidates(values, peaks, cutoff, self.min_tokens_to_keep, |score| score);
        let weight = |key| row.weight(rank::rank(key));
        let below = row.sum - keys.iter().map(|&key| f64::from(weight(key))).sum::<f64>();
        // HF: seen from the least likely token and, of equals, the first; one goes if up to it there is at most 1 - top_p.
        let dropped = rank::reach(&mut keys, below, weight, |mass| (mass / row.sum) as f32 > rest);
        let most = keys.len().saturating_sub(self.min_tokens_to_keep);
        if dropped > most {
            rank::first(&mut keys, most);
        }
        scores.drop_below(cutoff.next_up());
        drop_keys(scores, keys.into_iter().take(dropped.min(most)));
        Ok(())
    }
}

impl LogitsProcessor for MinP {
    fn name(&self) -> &str {
        "min_p"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let Some(row) = Softmax::of(scores) else { return Ok(()) };
        let least = self.min_p * row.probability(row.max);
        let best = pick::top(scores, self.min_tokens_to_keep);
        drop_if(scores, |score| row.probability(score) < least);
        restore(scores, &best);
        Ok(())
    }
}

impl LogitsProcessor for Typical {
    fn name(&self) -> &str {
        "typical_p"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let peaks = Peaks::of(scores);
        let Some(row) = Softmax::within(scores, &peaks) else { return Ok(()) };
        let entropy = row.entropy(scores);
        // A surprise above twice the entropy is further from it than any below it. If moreover all tokens that unlikely
        // together have at most 1 - typical_p, the others reach typical_p before. The half leaves room for rounding.
        let tail = 0.5 * (1.0 - f64::from(self.typical_p)) / scores.len() as f64;
        let cutoff = row.score(tail.min((-2.0 * entropy).exp() * 0.5));
        let distance = |score| (-row.log_probability(score) - entropy as f32).abs();
        let (mut keys, cutoff) = candidates(scores, &peaks, cutoff, self.min_tokens_to_keep, distance);
        let weight = |key| scores.get(rank::id(key)).map_or(0.0, |&score| row.weight(score));
        let last = rank::reach(&mut keys, 0.0, weight, |mass| (mass / row.sum) as f32 >= self.typical_p);
        // HF: all that are as near as the last one stay.
        let limit = keys.get(last).map_or(f32::INFINITY, |&key| rank::rank(key));
        if last < self.min_tokens_to_keep {
            rank::first(&mut keys, self.min_tokens_to_keep);
        }
        Scores::over(scores, |scores| {
            scores.drop_below(cutoff.next_up());
            drop_keys(scores, keys.into_iter().skip(self.min_tokens_to_keep).filter(|&key| rank::rank(key) > limit));
        });
        Ok(())
    }
}

impl LogitsProcessor for EpsilonCutoff {
    fn name(&self) -> &str {
        "epsilon_cutoff"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let Some(row) = Softmax::of(scores) else { return Ok(()) };
        cut(scores, row, self.epsilon_cutoff, self.min_tokens_to_keep);
        Ok(())
    }
}

impl LogitsProcessor for EtaCutoff {
    fn name(&self) -> &str {
        "eta_cutoff"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let Some(row) = Softmax::of(scores) else { return Ok(()) };
        let epsilon = self.eta_cutoff;
        let eta = epsilon.min(epsilon.sqrt() * (-row.entropy(scores)).exp() as f32);
        cut(scores, row, eta, self.min_tokens_to_keep);
        Ok(())
    }
}

impl LogitsProcessor for Renormalize {
    fn name(&self) -> &str {
        "renormalize_logits"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        Scores::over(scores, |scores| self.shape(history, scores))
    }

    fn shape(&self, _: &History<'_>, scores: &mut Scores<'_>) -> Result<()> {
        scores.log_softmax();
        Ok(())
    }
}

/// Keys of the tokens above `cutoff`; if they are fewer than `least`, of all that are possible. Also the cutoff taken.
fn candidates(scores: &[f32], peaks: &Peaks, cutoff: f32, least: usize, by: impl Fn(f32) -> f32) -> (Vec<u64>, f32) {
    let keys = rank::above(scores, peaks, cutoff, &by);
    if keys.len() >= least { (keys, cutoff) } else { (rank::above(scores, peaks, f32::NEG_INFINITY, by), f32::NEG_INFINITY) }
}

/// Drops tokens less likely than `p`, but none of the `least` highest scores and their ties.
fn cut(scores: &mut [f32], row: Softmax, p: f32, least: usize) {
    let safe = rank::nth(scores, &Peaks::of(scores), least);
    drop_if(scores, |score| (score < safe) & (row.probability(score) < p));
}

/// Passes over blocks in which nothing is left to drop, as most are after a `top_k`.
fn drop_if(scores: &mut [f32], unwanted: impl Fn(f32) -> bool) {
    for block in Peaks::of(scores).above_mut(scores, f32::NEG_INFINITY) {
        for score in block {
            *score = if unwanted(*score) { f32::NEG_INFINITY } else { *score };
        }
    }
}

fn drop_keys(scores: &mut Scores<'_>, keys: impl Iterator<Item = u64>) {
    for key in keys {
        scores.set(rank::id(key) as u32, f32::NEG_INFINITY);
    }
}

fn restore(scores: &mut [f32], tokens: &[(u32, f32)]) {
    for &(id, value) in tokens {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::processed, *};
    use proptest::prelude::*;

    const INF: f32 = f32::INFINITY;
    const ROW: [f32; 8] = [0.5, 2.0, 2.0, -1.0, 3.0, 0.0, 1.0, -INF];

    /// The ids of `row` that a warper keeps, whose scores it must not change.
    fn kept(warper: &dyn LogitsProcessor, row: &[f32]) -> Vec<usize> {
        let scores = processed(warper, &History::new(&[1], 1, 9), row);
        assert_eq!(scores.len(), row.len());
        assert!(scores.iter().zip(row).all(|(new, old)| new.to_bits() == old.to_bits() || *new == -INF));
        (0..row.len()).filter(|&id| scores[id] > -INF).collect()
    }

    #[test]
    fn top_n_sigma_counts_deviations_from_the_best() {
        let warper = |top_n_sigma| TopNSigma { top_n_sigma };
        // Of the seven that are possible the mean is 15/14 and the deviation 1.2657.
        assert_eq!(kept(&warper(0.5), &ROW), [4]);
        assert_eq!(kept(&warper(0.8), &ROW), [1, 2, 4]);
        assert_eq!(kept(&warper(1.6), &ROW), [1, 2, 4, 6]);
        assert_eq!(kept(&warper(9.0), &ROW), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(kept(&warper(1.0), &[2.0; 5]), [0, 1, 2, 3, 4]);
        assert_eq!(kept(&warper(1.0), &[-INF, 2.0]), [1]);
        let cooled = ROW.map(|score| score * 10.0);
        assert_eq!(kept(&warper(0.8), &cooled), [1, 2, 4]);
    }

    fn top_k(top_k: usize, min_tokens_to_keep: usize) -> TopK {
        TopK { top_k, min_tokens_to_keep }
    }

    fn top_p(top_p: f32, min_tokens_to_keep: usize) -> TopP {
        TopP { top_p, min_tokens_to_keep }
    }

    fn typical(typical_p: f32, min_tokens_to_keep: usize) -> Typical {
        Typical { typical_p, min_tokens_to_keep }
    }

    #[test]
    fn temperature_divides() {
        let scores = processed(&Temperature { temperature: 0.7 }, &History::new(&[1], 1, 9), &ROW);
        assert_eq!(scores, [0.71428573, 2.857143, 2.857143, -1.4285715, 4.285714, 0.0, 1.4285715, -INF]);
    }

    #[test]
    fn renormalize_gives_log_probabilities() {
        let scores = processed(&Renormalize, &History::new(&[1], 1, 9), &ROW);
        let exact = [-3.203732, -1.703732, -1.703732, -4.703732, -0.70373195, -3.703732, -2.703732, -INF];
        assert!(scores.iter().zip(exact).all(|(score, exact)| *score == exact || (score - exact).abs() < 5e-7), "{scores:?}");
    }

    #[test]
    fn top_h_spends_a_share_of_the_entropy() {
        for (top_h, ids) in [(0.2, &[4][..]), (0.4, &[4]), (0.7, &[1, 2, 4]), (1.0, &[0, 1, 2, 3, 4, 5, 6])] {
            assert_eq!(kept(&TopH { top_h }, &ROW), ids, "{top_h}");
        }
        let flat = [0.0; 200];
        assert_eq!(kept(&TopH { top_h: 1.0 }, &flat).len(), 100);
        assert_eq!(kept(&TopH { top_h: 0.5 }, &flat[..64]), (0..32).collect::<Vec<_>>());
    }

    #[test]
    fn top_k_keeps_ties() {
        for (k, least, ids) in
            [(1, 1, &[4][..]), (2, 1, &[1, 2, 4]), (3, 1, &[1, 2, 4]), (2, 4, &[1, 2, 4, 6]), (50, 1, &[0, 1, 2, 3, 4, 5, 6])]
        {
            assert_eq!(kept(&top_k(k, least), &ROW), ids, "{k} {least}");
        }
        assert_eq!(kept(&top_k(3, 1), &[1.0, -INF, -INF, 2.0]), [0, 3]);
        assert_eq!(kept(&top_k(1, 1), &[-0.0, 0.0, -1.0]), [0, 1]);
    }

    #[test]
    fn top_p_keeps_the_last_of_equals() {
        let all = &[0, 1, 2, 3, 4, 5, 6][..];
        for (p, least, ids) in [
            (0.0, 1, &[4][..]),
            (0.3, 1, &[4]),
            (0.6, 1, &[2, 4]),
            (0.8, 1, &[1, 2, 4]),
            (0.95, 1, &[0, 1, 2, 4, 6]),
            (0.3, 3, &[1, 2, 4]),
            (0.3, 50, all),
            (0.999, 1, all),
        ] {
            assert_eq!(kept(&top_p(p, least), &ROW), ids, "{p} {least}");
        }
    }

    #[test]
    fn top_p_of_equal_tokens_rounds_as_torch() {
        // Not at 0.1, where torch adds up probabilities rounded to f32 and keeps one more of 10.
        let shares = [0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95];
        for (n, counts) in [
            (2, [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]),
            (3, [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]),
            (4, [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]),
            (5, [1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5]),
            (6, [2, 2, 2, 3, 3, 4, 5, 5, 5, 6, 6]),
            (7, [2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7]),
            (8, [2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]),
            (10, [2, 3, 3, 4, 5, 6, 7, 8, 8, 9, 10]),
            (20, [4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 19]),
            (100, [20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 95]),
        ] {
            for (p, count) in shares.into_iter().zip(counts) {
                assert_eq!(kept(&top_p(p, 1), &vec![1.0; n]), (n - count..n).collect::<Vec<_>>(), "{p} of {n}");
            }
        }
    }

    #[test]
    fn min_p_is_relative_to_the_best() {
        for (min_p, least, ids) in [
            (0.0, 1, &[0, 1, 2, 3, 4, 5, 6][..]),
            (0.1, 1, &[1, 2, 4, 6]),
            (0.3, 1, &[1, 2, 4]),
            (0.5, 1, &[4]),
            (1.0, 1, &[4]),
            (1.0, 4, &[1, 2, 4, 6]),
        ] {
            assert_eq!(kept(&MinP { min_p, min_tokens_to_keep: least }, &ROW), ids, "{min_p} {least}");
        }
        assert_eq!(kept(&MinP { min_p: 1.0, min_tokens_to_keep: 1 }, &[2.0, 1.0, 2.0]), [0, 2]);
    }

    #[test]
    fn typical_is_near_the_entropy() {
        for (p, least, ids) in [
            (0.1, 1, &[1, 2][..]),
            (0.3, 1, &[1, 2]),
            (0.5, 1, &[1, 2, 4]),
            (0.8, 1, &[1, 2, 4]),
            (0.95, 1, &[0, 1, 2, 4, 6]),
            (0.1, 4, &[1, 2, 4, 6]),
            (0.3, 3, &[1, 2, 4]),
        ] {
            assert_eq!(kept(&typical(p, least), &ROW), ids, "{p} {least}");
        }
        assert_eq!(kept(&typical(0.2, 1), &[8.0, 0.0, 1.0, 5.0]), [0]);
        assert_eq!(kept(&typical(0.2, 1), &[1.0; 9]).len(), 9);
    }

    #[test]
    fn cutoffs_keep_the_best() {
        for (epsilon_cutoff, least, ids) in
            [(0.01, 1, &[0, 1, 2, 4, 5, 6][..]), (0.1, 1, &[1, 2, 4]), (0.9, 1, &[4]), (0.9, 2, &[1, 2, 4]), (0.9, 4, &[1, 2, 4, 6])]
        {
            assert_eq!(kept(&EpsilonCutoff { epsilon_cutoff, min_tokens_to_keep: least }, &ROW), ids, "{epsilon_cutoff} {least}");
        }
        for (eta_cutoff, least, ids) in [
            (0.0003, 1, &[0, 1, 2, 3, 4, 5, 6][..]),
            (0.05, 1, &[1, 2, 4, 6]),
            (0.1, 1, &[1, 2, 4]),
            (0.9, 1, &[4]),
            (0.9, 4, &[1, 2, 4, 6]),
        ] {
            assert_eq!(kept(&EtaCutoff { eta_cutoff, min_tokens_to_keep: least }, &ROW), ids, "{eta_cutoff} {least}");
        }
        assert_eq!(kept(&EpsilonCutoff { epsilon_cutoff: 0.25, min_tokens_to_keep: 1 }, &[1.0; 4]).len(), 4);
    }

    #[test]
    fn rows_without_a_distribution_pass_through() {
        let warpers: [&dyn LogitsProcessor; 8] = [
            &TopH { top_h: 0.5 },
            &top_k(2, 1),
            &top_p(0.5, 2),
            &MinP { min_p: 0.5, min_tokens_to_keep: 2 },
            &typical(0.5, 2),
            &EpsilonCutoff { epsilon_cutoff: 0.5, min_tokens_to_keep: 2 },
            &EtaCutoff { eta_cutoff: 0.5, min_tokens_to_keep: 2 },
            &Renormalize,
        ];
        for warper in warpers {
            for row in [&[][..], &[-INF], &[-INF; 100], &[f32::NAN, 1.0, 2.0, 3.0], &[-f32::NAN; 70]] {
                let scores = processed(warper, &History::new(&[1], 1, 9), row);
                assert_eq!(scores.iter().any(|score| score.is_nan()), row.iter().any(|score| score.is_nan()), "{warper:?} {row:?}");
                assert_eq!(scores.iter().any(|&score| score > -INF), row.iter().any(|&score| score > -INF), "{warper:?} {row:?}");
            }
            let scores = processed(warper, &History::new(&[1], 1, 9), &[INF, 0.0, -INF]);
            assert_eq!(scores[0], INF, "{warper:?}");
        }
    }

    /// Probabilities in f64, one `exp` a token.
    fn softmax(row: &[f32]) -> Vec<f64> {
        let max = row.iter().copied().fold(-INF, f32::max);
        let weights: Vec<f64> = row.iter().map(|&score| f64::from(score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / sum).collect()
    }

    /// The possible ids among `ids`, ascending.
    fn possible(row: &[f32], ids: impl Iterator<Item = usize>) -> Vec<usize> {
        let mut ids: Vec<usize> = ids.filter(|&id| row[id] > -INF).collect();
        ids.sort_unstable();
        ids
    }

    fn naive_top_k(row: &[f32], k: usize) -> Vec<usize> {
        let mut sorted = row.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let worst = sorted[k.min(row.len()) - 1];
        possible(row, (0..row.len()).filter(|&id| row[id] >= worst))
    }

    fn naive_top_p(row: &[f32], p: f32, least: usize) -> Vec<usize> {
        let probabilities = softmax(row);
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[a].total_cmp(&row[b]));
        let mut mass = 0.0;
        let dropped = order.iter().filter(|&&id| {
            mass += probabilities[id];
            mass <= 1.0 - f64::from(p)
        });
        let dropped = dropped.count().min(row.len().saturating_sub(least));
        possible(row, order.into_iter().skip(dropped))
    }

    fn naive_typical(row: &[f32], p: f32, least: usize) -> Vec<usize> {
        let probabilities = softmax(row);
        let entropy: f64 = probabilities.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
        let distance: Vec<f64> = probabilities.iter().map(|p| (-p.ln() - entropy).abs()).collect();
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| distance[a].total_cmp(&distance[b]));
        let mut mass = 0.0;
        let last = order.iter().filter(|&&id| {
            mass += probabilities[id];
            mass < f64::from(p)
        });
        let limit = distance[order[last.count().min(row.len() - 1)]];
        possible(row, order.into_iter().enumerate().filter(|&(place, id)| place < least || distance[id] <= limit).map(|(_, id)| id))
    }

    /// Rows with many ties: few levels, a spread from flat to peaked, and some forbidden tokens.
    fn rows() -> impl Strategy<Value = Vec<f32>> {
        (1usize..400, 1i32..40, 0.01f32..2.0).prop_flat_map(|(len, levels, step)| {
            let score = prop_oneof![9 => (0..levels).prop_map(move |level| level as f32 * step), 1 => Just(-INF)];
            (prop::collection::vec(score, len), 0..len).prop_map(|(mut row, id)| {
                row[id] = 0.0; // one is always possible
                row
            })
        })
    }

    proptest! {
        #[test]
        fn partial_selection_equals_a_full_sort(row in rows(), k in 1usize..60, p in 0.01f32..0.999, least in 1usize..5) {
            prop_assert_eq!(kept(&top_k(k, least), &row), naive_top_k(&row, k.max(least)));
            prop_assert_eq!(kept(&top_p(p, least), &row), naive_top_p(&row, p, least));
            prop_assert_eq!(kept(&typical(p, least), &row), naive_typical(&row, p, least));
        }
    }
}
