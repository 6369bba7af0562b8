//! Splits work over rayon's threads where that pays. No result depends on the split.

use rayon::prelude::*;
use std::ops::Range;

/// Multiply-adds that a thread should have at least: handing over costs a microsecond.
const GRAIN: usize = 1 << 16;

/// How many threads `work` multiply-adds are worth.
pub(super) fn worth(work: usize) -> usize {
    match work / GRAIN {
        0 | 1 => 1,
        parts => parts.min(rayon::current_num_threads()),
    }
}

/// `f(0), f(1), ...` for `count` items of `work` multiply-adds in all.
pub(super) fn map<T: Send>(count: usize, work: usize, f: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
    if count > 1 && worth(work) > 1 { (0..count).into_par_iter().map(f).collect() } else { (0..count).map(f).collect() }
}

/// `f(i, chunk)` for each chunk of `size` values, each chunk `work` multiply-adds.
pub(super) fn chunks<T: Send>(data: &mut [T], size: usize, work: usize, f: impl Fn(usize, &mut [T]) + Send + Sync) {
    let count = data.len().div_ceil(size.max(1));
    if count > 1 && worth(count * work) > 1 {
        let least = (GRAIN / work.max(1)).max(1);
        data.par_chunks_mut(size).enumerate().with_min_len(least).for_each(|(i, chunk)| f(i, chunk));
    } else {
        data.chunks_mut(size.max(1)).enumerate().for_each(|(i, chunk)| f(i, chunk));
    }
}

/// Part `i` of `parts` nearly equal ranges of `0..count`, cut at multiples of `step`.
pub(super) fn part(count: usize, step: usize, parts: usize, i: usize) -> Range<usize> {
    let steps = count.div_ceil(step);
    let cut = |i: usize| (steps * i / parts * step).min(count);
    cut(i)..cut(i + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_tile_the_range() {
        for (count, step, parts) in [(1, 4, 1), (9, 4, 2), (36, 4, 5), (3, 4, 8), (0, 4, 2)] {
            let ranges: Vec<_> = (0..parts).map(|i| part(count, step, parts, i)).collect();
            assert_eq!(ranges.iter().cloned().flatten().collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
        }
        assert_eq!([0, 1].map(|i| part(36, 4, 2, i)), [0..16, 16..36]);
    }

    #[test]
    fn many_threads_do_what_one_does() {
        let squares = map(1000, usize::MAX, |i| i * i);
        assert_eq!(squares, (0..1000).map(|i| i * i).collect::<Vec<_>>());
        let (mut one, mut many) = (vec![0; 1001], vec![0; 1001]);
        let f = |i: usize, chunk: &mut [usize]| chunk.iter_mut().enumerate().for_each(|(j, v)| *v = i * 10 + j);
        chunks(&mut one, 10, 1, f);
        chunks(&mut many, 10, 1 << 20, f);
        assert_eq!(one, many);
        assert_eq!(one[1000], 1000);
    }
}
