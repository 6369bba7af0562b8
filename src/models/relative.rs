//! T5's buckets: which distances between two tokens share a bias.

/// The bucket of a distance from query to key: one for each short distance, then ever wider ones up to `reach`, from where on all share
/// the last. Where keys may come after the query, those before and after have half of the buckets each.
// HF: computed in f32, whose rounding decides at borders.
pub(super) fn bucket(distance: isize, both: bool, buckets: usize, reach: usize) -> usize {
    let (first, buckets, distance) = match both {
        true => (if distance > 0 { buckets / 2 } else { 0 }, buckets / 2, distance.unsigned_abs()),
        false => (0, buckets, distance.min(0).unsigned_abs()),
    };
    let exact = buckets / 2;
    if distance < exact {
        return first + distance;
    }
    let share = (distance as f32 / exact as f32).ln() / (reach as f64 / exact as f64).ln() as f32;
    first + (exact + (share * (buckets - exact) as f32) as usize).min(buckets - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many distances in a row have the same bucket, from -140 to 140.
    fn runs(both: bool) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for distance in -140..=140 {
            let bucket = bucket(distance, both, 32, 128);
            match runs.last_mut().filter(|(last, _)| *last == bucket) {
                Some((_, count)) => *count += 1,
                None => runs.push((bucket, 1)),
            }
        }
        runs
    }

    #[test]
    fn every_distance_is_in_the_bucket_of_the_reference() {
        let before = [(15, 50), (14, 27), (13, 18), (12, 14), (11, 9), (10, 7), (9, 4), (8, 4)];
        let near = (0..8).rev().map(|bucket| (bucket, 1)).chain((17..24).map(|bucket| (bucket, 1)));
        let after = before.iter().rev().map(|&(bucket, count)| (bucket + 16, count));
        assert_eq!(runs(true), before.into_iter().chain(near).chain(after).collect::<Vec<_>>());
        let counts = [28, 14, 12, 10, 10, 8, 7, 6, 6, 5, 4, 4, 3, 3, 2, 3];
        let far = (16..32).rev().zip(counts);
        let near = (1..16).rev().map(|bucket| (bucket, 1)).chain([(0, 141)]);
        assert_eq!(runs(false), far.chain(near).collect::<Vec<_>>());
        let of = |both| (-12..=12).map(|distance| bucket(distance, both, 12, 50)).collect::<Vec<_>>();
        assert_eq!(of(true), [4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 2, 1, 0, 7, 8, 9, 9, 9, 9, 9, 10, 10, 10, 10, 10]);
        assert_eq!(of(false)[..13], [7, 7, 7, 7, 6, 6, 6, 5, 4, 3, 2, 1, 0]);
    }
}
