//! Finds the best tokens of a row without sorting it.
//!
//! Tokens are handled as `u64` keys, rank above id, so that one integer comparison orders them: the smallest key is the
//! best, and of equals the lower id. // HF: torch's sort and topk leave the order of equals open.

use super::scan::Peaks;

/// The key of a token; lower ranks are better.
fn key(rank: f32, id: usize) -> u64 {
    let bits = (rank + 0.0).to_bits(); // + 0.0 makes both zeros one
    let ordered = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(ordered) << 32 | id as u64
}

/// The rank in a key.
pub(super) fn rank(key: u64) -> f32 {
    let ordered = (key >> 32) as u32;
    f32::from_bits(if ordered >> 31 == 0 { !ordered } else { ordered & !(1 << 31) })
}

/// The id in a key.
pub(super) fn id(key: u64) -> usize {
    key as u32 as usize
}

/// The `n` largest scores and their ids, best first; fewer if fewer are above negative infinity.
pub(super) fn top(scores: &[f32], peaks: &Peaks, n: usize) -> Vec<(u32, f32)> {
    let mut keys = best(scores, peaks, n);
    keys.sort_unstable();
    keys.into_iter().map(id).filter_map(|id| Some((id as u32, *scores.get(id)?))).collect()
}

/// The keys of the `n` largest scores in no order, ranked by `-score`; fewer if fewer are above negative infinity.
fn best(scores: &[f32], peaks: &Peaks, n: usize) -> Vec<u64> {
    // The n largest are at least as large as the n largest peaks, and few others are.
    let mut keys = above(scores, peaks, peaks.nth(n).next_down(), |score| -score);
    first(&mut keys, n);
    keys.truncate(n);
    keys
}

/// The `n`-th largest score; negative infinity if fewer are above it.
pub(super) fn nth(scores: &[f32], peaks: &Peaks, n: usize) -> f32 {
    let keys = best(scores, peaks, n);
    if keys.len() < n { f32::NEG_INFINITY } else { keys.into_iter().max().map_or(f32::NEG_INFINITY, |worst| -rank(worst)) }
}

/// The keys of all scores above `cutoff`, ranked by `by`.
pub(super) fn above(scores: &[f32], peaks: &Peaks, cutoff: f32, by: impl Fn(f32) -> f32) -> Vec<u64> {
    let mut keys = Vec::new();
    for (from, block) in peaks.above(scores, cutoff) {
        let tokens = block.iter().enumerate().filter(|&(_, &score)| score > cutoff);
        keys.extend(tokens.map(|(offset, &score)| key(by(score), from + offset)));
    }
    keys
}

/// The index, were the keys sorted, of the first that together with `before` and all better ones has a mass for which
/// `reached` is true; their number if none has. All better ones are moved to the front. A binary search by partial
/// selection, so about `2n` steps in all.
pub(super) fn reach(keys: &mut [u64], mut before: f64, mass: impl Fn(u64) -> f32, reached: impl Fn(f64) -> bool) -> usize {
    let (mut start, mut end) = (0, keys.len());
    while start < end {
        let middle = (end - start) / 2;
        let open = &mut keys[start..end];
        open.select_nth_unstable(middle);
        let including = before + open[..=middle].iter().map(|&key| f64::from(mass(key))).sum::<f64>();
        if reached(including) {
            end = start + middle;
        } else {
            (start, before) = (start + middle + 1, including);
        }
    }
    start
}

/// Moves the `n` best keys to the front.
pub(super) fn first(keys: &mut [u64], n: usize) {
    if n < keys.len() {
        keys.select_nth_unstable(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_and_return() {
        let ranks = [f32::NEG_INFINITY, f32::MIN, -2.5, -1e-45, 0.0, 1e-45, 2.5, f32::MAX, f32::INFINITY];
        for pair in ranks.windows(2) {
            assert!(key(pair[0], 9) < key(pair[1], 0));
        }
        for rank_ in ranks {
            assert_eq!((rank(key(rank_, 7)), id(key(rank_, 7))), (rank_, 7));
        }
        assert_eq!(key(-0.0, 3), key(0.0, 3));
        assert!(key(1.0, 3) < key(1.0, 4));
    }

    #[test]
    fn largest_equals_a_sort() {
        for (len, n, levels) in [(0, 3, 5), (10, 0, 5), (10, 3, 2), (10, 20, 5), (1_000, 1, 1_000), (5_000, 50, 7), (5_000, 4_990, 9_999)] {
            let scores: Vec<f32> = (0..len).map(|i| ((i * 7_919 + 13) % 10_007 % levels) as f32 - 3.0).collect();
            let mut sorted: Vec<u64> = scores.iter().enumerate().map(|(id, &score)| key(-score, id)).collect();
            sorted.sort_unstable();
            sorted.truncate(n);
            let mut keys = best(&scores, &Peaks::of(&scores), n);
            keys.sort_unstable();
            assert_eq!(keys, sorted, "{len} {n} {levels}");
        }
        assert!(top(&[f32::NEG_INFINITY, f32::NAN], &Peaks::of(&[f32::NEG_INFINITY, f32::NAN]), 2).is_empty());
        let nth = |scores: &[f32]| nth(scores, &Peaks::of(scores), 2);
        assert_eq!(nth(&[1.0, f32::NAN, 3.0, 2.0]), 2.0);
        assert_eq!(nth(&[1.0, f32::NEG_INFINITY]), f32::NEG_INFINITY);
    }

    #[test]
    fn reach_finds_the_first_with_enough_mass() {
        let weights = [5.0f32, 1.0, 3.0, 1.0, 2.0];
        let order = [0, 2, 4, 1, 3];
        for (goal, index) in [(0.0, 0), (5.0, 0), (5.5, 1), (8.0, 1), (10.0, 2), (11.0, 3), (12.0, 4), (12.5, 5)] {
            for before in [0.0, 2.0] {
                let mut keys = above(&weights, &Peaks::of(&weights), f32::NEG_INFINITY, |weight| -weight);
                assert_eq!(reach(&mut keys, before, |key| -rank(key), |mass| mass >= goal + before), index, "{goal}");
                let mut ids: Vec<usize> = keys[..index].iter().map(|&key| id(key)).collect();
                ids.sort_unstable();
                let mut better = order[..index].to_vec();
                better.sort_unstable();
                assert_eq!(ids, better, "{goal}");
            }
        }
        assert_eq!(reach(&mut [], 0.0, |_| 0.0, |_| true), 0);
    }
}
