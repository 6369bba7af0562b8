//! Attention over pages: cache write, scores, softmax and the weighted sum of values.
//!
//! The positions of a row are cut into spans of 256 by absolute position. A span's scores, softmax and sum are computed for
//! itself and the spans are joined in ascending order, so a token's result depends on nothing but the positions it sees.

use super::{
    isa::{Isa, Level, Task},
    line::{F32, LANES},
    math, threads,
    tile::{ROWS, Sums, Tile, tiled},
};
use crate::{
    cache::{PAGE, Pages},
    error::Result,
    kernels::{Attention, HeadBias, Span, Store},
};
use std::{array::from_fn, ops::Range, sync::Arc};

/// Positions of a span, a whole number of pages: 128 kB of keys and values at a head of 64.
const SPAN: usize = 256;

/// About as many queries share a reading of a span.
const QUERIES: usize = 48;

/// A row whose positions are read.
pub(super) struct Reader<'a> {
    /// Its first token among the pass's.
    first: usize,
    count: usize,
    /// The position of its first token.
    start: usize,
    /// Positions that are there.
    len: usize,
    store: &'a Pages,
}

impl<'a> Reader<'a> {
    /// A row that reads what it held and has just written.
    pub(super) fn own(span: &'a Span<&mut Pages>) -> Self {
        let start = span.store.len();
        Self { first: span.first, count: span.count, start, len: start + span.count, store: span.store }
    }

    /// A row that reads another's positions.
    pub(super) fn other(span: &Span<&'a Pages>) -> Self {
        Self { first: span.first, count: span.count, start: 0, len: span.store.len(), store: span.store }
    }
}

/// Writes the keys and values of all tokens, the last of their `width` columns, to their rows' stores.
pub(super) fn write(attention: &Attention, layer: usize, x: &[f32], width: usize, rows: &mut [Span<&mut Pages>]) -> Result<()> {
    let (dim, kv_heads) = (attention.head_dim, attention.kv_heads);
    for row in rows {
        let (start, end) = (row.store.len(), row.store.len() + row.count);
        debug_assert_eq!((row.store.shape().kv_heads, row.store.shape().head_dim), (kv_heads, dim));
        // Writing a key across a page's lines costs about 8 multiply-adds a value.
        threads::chunks(row.store.tail(row.count)?, 1, PAGE * kv_heads * dim * 8, |i, page| {
            let first = (start / PAGE + i) * PAGE;
            let page = Arc::make_mut(&mut page[0]);
            for position in start.max(first)..end.min(first + PAGE) {
                let token = &x[(row.first + position - start) * width..][..width];
                let (keys, values) = token[width - 2 * kv_heads * dim..].split_at(kv_heads * dim);
                for (head, (key, value)) in keys.chunks(dim).zip(values.chunks(dim)).enumerate() {
                    page.write(layer, head, position - first, key, value);
                }
            }
        });
    }
    Ok(())
}

/// The attention of all tokens, whose queries are the first of their `width` columns, `(tokens, heads * head_dim)`.
pub(super) fn attend(level: Level, attention: &Attention, layer: usize, x: &[f32], width: usize, rows: &[Reader<'_>]) -> Vec<f32> {
    let Attention { heads, kv_heads, head_dim: dim, .. } = *attention;
    let group = heads / kv_heads;
    let block = (QUERIES / group).max(1);
    let mut jobs = Vec::new();
    for row in rows {
        for first in (0..row.count).step_by(block) {
            for head in 0..kv_heads {
                let queries = (first..row.count.min(first + block)).flat_map(|token| (0..group).map(move |g| (token, head * group + g)));
                let queries = queries.map(|(token, head)| {
                    let position = row.start + token;
                    let token = row.first + token;
                    Query {
                        x: &x[token * width + head * dim..][..dim],
                        seen: attention.sight.of(position, row.len),
                        to: token * heads + head,
                        bias: attention.bias.of(head, position),
                    }
                });
                jobs.push(Job { level, attention, layer, head, store: row.store, queries: queries.collect() });
            }
        }
    }
    let results = threads::map(jobs.len(), jobs.iter().map(Job::work).sum(), |i| jobs[i].attend());
    let mut y = vec![0.0; x.len() / width * heads * dim];
    for (job, result) in jobs.iter().zip(&results) {
        for ((query, row), sum) in job.queries.iter().zip(result.rows.chunks(job.width())).zip(&result.sum) {
            for (y, x) in y[query.to * dim..][..dim].iter_mut().zip(row) {
                *y = x / sum;
            }
        }
    }
    y
}

/// One head of one token.
struct Query<'a> {
    x: &'a [f32],
    /// The positions it sees.
    seen: Range<usize>,
    /// Its place in the result.
    to: usize,
    bias: HeadBias<'a>,
}

/// Queries of one row that share a key-value head.
struct Job<'a> {
    level: Level,
    attention: &'a Attention,
    layer: usize,
    head: usize,
    store: &'a Pages,
    queries: Vec<Query<'a>>,
}

/// The outcome of some positions: for each query the largest score, the sum of `e^(score - max)`, and the values' sum with
/// these weights.
struct Part {
    max: Vec<f32>,
    sum: Vec<f32>,
    rows: Vec<f32>,
}

impl Job<'_> {
    /// Dimensions of a head, up to a whole line.
    fn width(&self) -> usize {
        self.attention.head_dim.next_multiple_of(LANES)
    }

    fn work(&self) -> usize {
        self.queries.iter().map(|query| query.seen.len()).sum::<usize>() * self.attention.head_dim * 2
    }

    fn attend(&self) -> Part {
        let start = self.queries.iter().map(|query| query.seen.start).min().unwrap_or(0) / SPAN;
        let end = self.queries.iter().map(|query| query.seen.end).max().unwrap_or(0).div_ceil(SPAN);
        let mut parts = threads::map(end - start, self.work(), |i| self.span((start + i) * SPAN)).into_iter();
        let count = self.queries.len();
        let mut all = parts.next().unwrap_or_else(|| Part::new(count, self.width()));
        parts.for_each(|part| all.join(&part));
        all
    }

    /// The part of the positions from `start` on, `SPAN` of them.
    fn span(&self, start: usize) -> Part {
        let seen = |i: usize| {
            let Range { start: first, end } = self.queries[i].seen;
            first.clamp(start, start + SPAN) - start..end.clamp(start, start + SPAN) - start
        };
        let mut work = Work {
            job: self,
            pages: start / PAGE,
            seen: (0..self.queries.len()).map(seen).collect(),
            scores: vec![0.0; self.queries.len() * SPAN],
            part: Part::new(self.queries.len(), self.width()),
        };
        for first in (0..self.queries.len()).step_by(ROWS) {
            let count = (self.queries.len() - first).min(ROWS);
            tiled!(self.level, count, work.score(first));
            for i in first..first + count {
                work.soften(i);
            }
            // What all of them see is summed together, what is left before and after alone: the order is the same.
            let seen = &work.seen[first..first + count];
            let start = seen.iter().map(|seen| seen.start).max().unwrap_or(0);
            let end = seen.iter().map(|seen| seen.end).min().unwrap_or(0).max(start);
            for i in first..first + count {
                let range = work.seen[i].start..work.seen[i].end.min(start);
                tiled!(self.level, 1, work.sum(i, range));
            }
            tiled!(self.level, count, work.sum(first, start..end));
            for i in first..first + count {
                let range = work.seen[i].start.max(end)..work.seen[i].end;
                tiled!(self.level, 1, work.sum(i, range));
            }
        }
        work.part
    }
}

impl Part {
    /// Nothing seen.
    fn new(queries: usize, width: usize) -> Self {
        Self { max: vec![f32::NEG_INFINITY; queries], sum: vec![0.0; queries], rows: vec![0.0; queries * width] }
    }

    /// Adds the part that follows.
    fn join(&mut self, next: &Self) {
        let width = self.rows.len() / self.max.len();
        for (i, (row, other)) in self.rows.chunks_mut(width).zip(next.rows.chunks(width)).enumerate() {
            if next.max[i] == f32::NEG_INFINITY {
                continue;
            }
            let max = if next.max[i] > self.max[i] { next.max[i] } else { self.max[i] };
            let (old, new) = (math::exp(self.max[i] - max), math::exp(next.max[i] - max));
            self.sum[i] = self.sum[i] * old + next.sum[i] * new;
            for (x, y) in row.iter_mut().zip(other) {
                *x = *x * old + y * new;
            }
            self.max[i] = max;
        }
    }
}

/// One span of a job. Positions count from the span's start.
struct Work<'a> {
    job: &'a Job<'a>,
    /// The first page.
    pages: usize,
    /// The positions that each query sees.
    seen: Vec<Range<usize>>,
    /// `(queries, SPAN)`: products, then weights.
    scores: Vec<f32>,
    part: Part,
}

impl Work<'_> {
    /// The products of `R` queries with all pages that one of them sees, a page being a panel of 16 positions.
    fn score<const R: usize, const C: usize>(&mut self, first: usize) {
        let seen = self.seen[first..first + R].iter().filter(|seen| !seen.is_empty());
        let (start, end) = seen.fold((SPAN, 0), |(start, end), seen| (start.min(seen.start), end.max(seen.end)));
        let (mut page, end) = (start / PAGE, end.div_ceil(PAGE));
        while page + C <= end {
            self.score_pages::<R, C>(first, page);
            page += C;
        }
        for page in page..end {
            self.score_pages::<R, 1>(first, page);
        }
    }

    fn score_pages<const R: usize, const C: usize>(&mut self, first: usize, page: usize) {
        let job = self.job;
        let rows = from_fn(|r| job.queries[first + r].x);
        let keys = from_fn(|c| job.store.page(self.pages + page + c).keys(job.layer, job.head));
        let sums: Sums<R, C> = job.level.run(Tile { rows, steps: &[keys], sums: [[[0.0; LANES]; C]; R] });
        for (r, sums) in sums.iter().enumerate() {
            let to = &mut self.scores[(first + r) * SPAN + page * PAGE..][..C * PAGE];
            to.copy_from_slice(sums.as_flattened());
        }
    }

    /// Turns the scores of query `i` into weights.
    fn soften(&mut self, i: usize) {
        let Range { start, end } = self.seen[i];
        if start >= end {
            return;
        }
        // Whole pages, so that a position is always in the same lane.
        let first = start / PAGE * PAGE;
        let scores = &mut self.scores[i * SPAN..][first..end.next_multiple_of(PAGE)];
        let Attention { scale, softcap, .. } = *self.job.attention;
        let bias = (self.job.queries[i].bias, self.pages * PAGE + first);
        (self.part.max[i], self.part.sum[i]) =
            self.job.level.run(Soften { scores, seen: start - first..end - first, scale, softcap, bias });
    }

    /// Adds the values of `positions` to the rows of `R` queries, with their weights.
    fn sum<const R: usize, const C: usize>(&mut self, first: usize, positions: Range<usize>) {
        if positions.is_empty() {
            return;
        }
        let (mut panel, end) = (0, self.job.width() / LANES);
        while panel + C <= end {
            self.sum_panels::<R, C>(first, positions.clone(), panel);
            panel += C;
        }
        for panel in panel..end {
            self.sum_panels::<R, 1>(first, positions.clone(), panel);
        }
    }

    fn sum_panels<const R: usize, const C: usize>(&mut self, first: usize, positions: Range<usize>, panel: usize) {
        let (job, width) = (self.job, self.job.width());
        let (from, to) = (positions.start / PAGE, positions.end.div_ceil(PAGE));
        let mut steps: [[&[F32]; C]; SPAN / PAGE] = [[&[]; C]; SPAN / PAGE];
        for (page, step) in (from..to).zip(&mut steps) {
            let inside = positions.start.max(page * PAGE) - page * PAGE..positions.end.min((page + 1) * PAGE) - page * PAGE;
            let page = job.store.page(self.pages + page);
            *step = from_fn(|c| &page.values(job.layer, job.head, panel + c)[inside.clone()]);
        }
        let rows = from_fn(|r| &self.scores[(first + r) * SPAN..][positions.clone()]);
        let place = |r: usize| (first + r) * width + panel * LANES;
        let mut sums = [[[0.0; LANES]; C]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            sums.as_flattened_mut().copy_from_slice(&self.part.rows[place(r)..][..C * LANES]);
        }
        let sums: Sums<R, C> = job.level.run(Tile { rows, steps: &steps[..to - from], sums });
        for (r, sums) in sums.iter().enumerate() {
            self.part.rows[place(r)..][..C * LANES].copy_from_slice(sums.as_flattened());
        }
    }
}

/// Turns scores, whole pages of them, into `e^(score - max)`, 0 outside `seen`; returns the max and the sum.
struct Soften<'a> {
    scores: &'a mut [f32],
    seen: Range<usize>,
    scale: f32,
    softcap: Option<f32>,
    /// With the position of the first score.
    bias: (HeadBias<'a>, usize),
}

impl Task for Soften<'_> {
    type Out = (f32, f32);

    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> (f32, f32) {
        let Self { scores, seen, scale, softcap, bias } = self;
        for score in scores.iter_mut() {
            *score *= scale;
        }
        if let Some(cap) = softcap {
            for score in scores.iter_mut() {
                *score = cap * math::tanh(*score / cap);
            }
        }
        bias.0.add(scores, bias.1);
        // Also hides what an unwritten or later position holds.
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for line in scores.as_chunks::<LANES>().0 {
            for (lane, &score) in lanes.iter_mut().zip(line) {
                *lane = if score > *lane { score } else { *lane };
            }
        }
        let max = math::fold(lanes, |a, b| if b > a { b } else { a });
        for score in scores.iter_mut() {
            *score = math::exp(*score - max);
        }
        (max, math::sum(scores, |score, sum| sum + score))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{Act, CpuOps, isa::tests::vectorised, noise};
    use super::*;
    use crate::{
        kernels::{Alibi, Bias, Ops, Relative, Rope, Sight, StoreShape},
        model::Room,
    };

    /// An attention, rotated or not, as the decoder uses it.
    struct Case {
        attention: Attention,
        rope: Option<Rope>,
        level: Level,
    }

    impl Case {
        fn new(heads: usize, kv_heads: usize, head_dim: usize, pairs: usize) -> Self {
            let scale = 1.7 / (head_dim as f32).sqrt();
            let attention = Attention { heads, kv_heads, head_dim, scale, softcap: None, sight: Sight::Causal, bias: Bias::None };
            let inv_freq = (0..pairs).map(|i| 0.3f32.powi(i as i32)).collect();
            Self { attention, rope: (pairs > 0).then_some(Rope { inv_freq, scale: 1.1 }), level: Level::best() }
        }

        fn width(&self) -> usize {
            (self.attention.heads + 2 * self.attention.kv_heads) * self.attention.head_dim
        }

        fn tokens(&self, count: usize, seed: u64) -> Vec<f32> {
            noise(count * self.width(), seed)
        }

        fn store(&self) -> Pages {
            let Attention { kv_heads, head_dim, .. } = self.attention;
            Pages::new(StoreShape { layers: 2, kv_heads, head_dim }, Room::Grow).unwrap()
        }

        /// One pass: the new tokens of each row, and its store.
        fn pass(&self, rows: &mut [(&[f32], &mut Pages)]) -> Vec<f32> {
            let ops = CpuOps { level: self.level };
            let data: Vec<f32> = rows.iter().flat_map(|(tokens, _)| *tokens).copied().collect();
            let counts: Vec<_> = rows.iter().map(|(tokens, _)| tokens.len() / self.width()).collect();
            let turns =
                |rope| rows.iter().zip(&counts).map(|((_, store), count)| (rope, store.len()..store.len() + count)).collect::<Vec<_>>();
            let angles = self.rope.as_ref().map(|rope| ops.angles(&turns(rope)).unwrap());
            let mut first = 0;
            let mut spans = Vec::new();
            for ((_, store), &count) in rows.iter_mut().zip(&counts) {
                spans.push(Span { first, count, store: &mut **store });
                first += count;
            }
            let qkv = Act { data, width: self.width() };
            let y = ops.attend(&self.attention, 1, qkv, angles.as_ref(), &mut spans).unwrap();
            spans.iter_mut().for_each(|span| span.store.grow(span.count));
            y.data
        }

        /// Feeds `tokens` in pieces of `sizes`, the last size repeated.
        fn feed(&self, tokens: &[f32], sizes: &[usize]) -> Vec<f32> {
            let (mut store, mut y, mut rest) = (self.store(), Vec::new(), tokens);
            let mut sizes = sizes.iter().copied();
            let mut size = 1;
            while !rest.is_empty() {
                size = sizes.next().unwrap_or(size);
                let (now, later) = rest.split_at((size * self.width()).min(rest.len()));
                y.extend(self.pass(&mut [(now, &mut store)]));
                rest = later;
            }
            y
        }

        /// The definition, in f64.
        fn reference(&self, tokens: &[f32]) -> Vec<f64> {
            let &Attention { heads, kv_heads, head_dim: dim, scale, softcap, sight, .. } = &self.attention;
            let head = |token: usize, head: usize| -> Vec<f64> {
                let mut x: Vec<f64> = tokens[token * self.width() + head * dim..][..dim].iter().map(|&x| f64::from(x)).collect();
                if let Some(rope) = self.rope.as_ref().filter(|_| head < heads + kv_heads) {
                    let pairs = rope.inv_freq.len();
                    for (i, freq) in rope.inv_freq.iter().enumerate() {
                        let (sin, cos) = f64::from(token as f32 * freq).sin_cos();
                        let (a, b) = (x[i], x[i + pairs]);
                        x[i] = (a * cos - b * sin) * f64::from(rope.scale);
                        x[i + pairs] = (b * cos + a * sin) * f64::from(rope.scale);
                    }
                }
                x
            };
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let mut y = Vec::new();
            for (token, q) in (0..tokens.len() / self.width()).flat_map(|token| (0..heads).map(move |q| (token, q))) {
                let kv = q / (heads / kv_heads);
                let seen: Vec<usize> = sight.of(token, tokens.len() / self.width()).collect();
                let score = |&at: &usize| {
                    let score = dot(&head(token, q), &head(at, heads + kv)) * f64::from(scale);
                    let bias = |at| {
                        let mut bias = [0.0];
                        self.attention.bias.of(q, token).add(&mut bias, at);
                        f64::from(bias[0])
                    };
                    (bias(at) - bias(token) + softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())).exp()
                };
                let weights: Vec<f64> = seen.iter().map(score).collect();
                let values: Vec<Vec<f64>> = seen.iter().map(|&at| head(at, heads + kv_heads + kv)).collect();
                let total: f64 = weights.iter().sum();
                y.extend((0..dim).map(|d| weights.iter().zip(&values).map(|(weight, value)| weight * value[d]).sum::<f64>() / total));
            }
            y
        }
    }

    /// Grouped, rotated in part, capped, windowed (inside a page, over pages, over spans), one head for all, a ragged head, biased.
    fn cases() -> Vec<(Case, usize)> {
        let mut capped = Case::new(6, 2, 8, 4);
        capped.attention.softcap = Some(0.5);
        capped.attention.sight = Sight::Window(5);
        let mut windowed = Case::new(2, 1, 4, 1);
        windowed.attention.sight = Sight::Window(270);
        let mut narrow = Case::new(2, 2, 4, 0);
        narrow.attention.sight = Sight::Window(20);
        let biased = |coarse| {
            let mut case = Case::new(3, 1, 4, 0);
            case.attention.bias = Bias::Alibi([0.25, 0.01, 0.7].map(|slope| Alibi { slope, scale: 0.5, coarse }).into());
            case
        };
        let mut distant = Case::new(4, 2, 8, 0);
        distant.attention.bias = Bias::Relative(Relative::new(4, 9, |head, distance| (head as f32 - 1.5) * distance as f32 / 9.0).into());
        vec![
            (Case::new(9, 3, 16, 8), 40),
            (Case::new(4, 4, 20, 3), 35),
            (capped, 40),
            (windowed, 530),
            (narrow, 530),
            (Case::new(8, 1, 32, 16), 18),
            (biased(false), 270),
            (biased(true), 270),
            (distant, 270),
        ]
    }

    #[test]
    fn attention_is_what_it_is_defined_to_be() {
        for (case, count) in cases() {
            let tokens = case.tokens(count, 5);
            let (ours, exact) = (case.feed(&tokens, &[count]), case.reference(&tokens));
            assert_eq!(ours.len(), exact.len());
            for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
                assert!((f64::from(*ours) - exact).abs() < 1e-5, "{:?} value {i}: {ours} for {exact}", case.attention);
            }
        }
    }

    #[test]
    fn cached_chunked_and_whole_are_the_same_bits() {
        for (case, count) in cases() {
            let tokens = case.tokens(count, 6);
            let whole = case.feed(&tokens, &[count]);
            for sizes in [&[1][..], &[7], &[count - 1, 1], &[3, 16, 1, 1, 48]] {
                assert!(case.feed(&tokens, sizes) == whole, "{:?} in pieces of {sizes:?}", case.attention);
            }
        }
    }

    #[test]
    fn instruction_sets_and_threads_change_no_bit() {
        for (mut case, count) in cases() {
            let tokens = case.tokens(count, 7);
            case.level = Level::PORTABLE;
            let expected = case.feed(&tokens, &[count]);
            for level in vectorised() {
                case.level = level;
                assert!(case.feed(&tokens, &[count]) == expected, "{level:?} {:?}", case.attention);
            }
            for threads in [1, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert!(pool.install(|| case.feed(&tokens, &[count - 1, 1])) == expected, "{threads} threads");
            }
        }
    }

    #[test]
    fn a_row_is_the_same_beside_others() {
        for (case, _) in cases() {
            let rows = [(30, 1), (1, 9), (0, 20), (16, 17)].map(|(held, new)| (case.tokens(held + new, held as u64 + 1), held, new));
            let mut stores: Vec<Pages> = Vec::new();
            for (tokens, held, _) in &rows {
                stores.push(case.store());
                let held = &tokens[..held * case.width()];
                if !held.is_empty() {
                    case.pass(&mut [(held, stores.last_mut().unwrap())]);
                }
            }
            let mut pass: Vec<_> =
                rows.iter().zip(&mut stores).map(|((tokens, held, _), store)| (&tokens[held * case.width()..], store)).collect();
            let together = case.pass(&mut pass);
            let size = case.attention.heads * case.attention.head_dim;
            let alone = rows.iter().flat_map(|(tokens, held, _)| case.feed(tokens, &[tokens.len()]).split_off(held * size));
            assert!(alone.eq(together), "{:?}", case.attention);
        }
    }

    #[test]
    fn a_source_is_read_as_its_own_tokens_read_it() {
        let mut case = Case::new(6, 2, 20, 0);
        case.attention.sight = Sight::Full;
        for count in [1, 35, 300] {
            let tokens = case.tokens(count, 9);
            let whole = case.feed(&tokens, &[count]);
            for (ours, exact) in whole.iter().zip(case.reference(&tokens)) {
                assert!((f64::from(*ours) - exact).abs() < 1e-5, "{ours} for {exact}");
            }
            let part = |columns: Range<usize>| {
                let data = tokens.chunks(case.width()).flat_map(|token| &token[columns.clone()]).copied().collect();
                Act { data, width: columns.len() }
            };
            let (ops, mut store) = (CpuOps { level: case.level }, case.store());
            ops.fill(&case.attention, 1, &part(120..200), &mut [Span { first: 0, count, store: &mut store }]).unwrap();
            store.grow(count);
            let queries = part(0..120);
            assert!(ops.cross(&case.attention, 1, &queries, &[Span { first: 0, count, store: &store }]).unwrap().data == whole);
            let rows = [Span { first: 0, count: 0, store: &store }, Span { first: 0, count, store: &store }];
            assert!(ops.cross(&case.attention, 1, &queries, &rows).unwrap().data == whole);
        }
    }

    #[test]
    fn forks_go_their_own_ways() {
        let case = Case::new(4, 2, 8, 4);
        let (stem, left, right) = (case.tokens(21, 1), case.tokens(4, 2), case.tokens(4, 3));
        let mut one = case.store();
        case.pass(&mut [(&stem, &mut one)]);
        let mut two = one.clone();
        let forked = case.pass(&mut [(&left, &mut one), (&right, &mut two)]);
        let fresh = [&left, &right].map(|branch| {
            let tokens = [stem.as_slice(), branch].concat();
            case.feed(&tokens, &[25]).split_off(21 * 32)
        });
        assert_eq!(forked, fresh.concat());
        // A rewound row forgets its branch.
        one.truncate(21).unwrap();
        assert_eq!(case.pass(&mut [(&right, &mut one)]), fresh[1]);
    }

    #[test]
    fn extreme_scores_stay_numbers() {
        let mut case = Case::new(1, 1, 4, 0);
        case.attention.scale = 1.0;
        // Query 1e15; keys 1e15, -1e15, 0, 1e-30; values 1, 2, 3, 4.
        let token = |key: f32, value: f32| [[1e15; 4], [key / 4.0; 4], [value; 4]].concat();
        let tokens = [token(1e15, 1.0), token(-1e15, 2.0), token(0.0, 3.0), token(1e-30, 4.0)].concat();
        assert_eq!(case.feed(&tokens, &[4]), [1.0; 16]);
        let low = [token(-1e15, 1.0), token(-1e15, 3.0)].concat();
        assert_eq!(case.feed(&low, &[2]), [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn a_later_token_does_not_touch_an_earlier_one() {
        let case = Case::new(2, 1, 4, 2);
        let mut tokens = case.tokens(10, 8);
        let clean = case.feed(&tokens, &[10]);
        tokens[6 * case.width()..].fill(f32::INFINITY);
        let spoilt = case.feed(&tokens, &[10]);
        assert_eq!(spoilt[..6 * 8], clean[..6 * 8]);
        assert!(spoilt[6 * 8..].iter().all(|x| x.is_nan()));
    }
}
