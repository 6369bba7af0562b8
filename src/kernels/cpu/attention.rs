//! Attention over pages: rotation, cache write, scores, softmax and the weighted sum of values.
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
    kernels::{Attention, Rope, Span, Store},
};
use std::{array::from_fn, ops::Range, sync::Arc};

/// Positions of a span, a whole number of pages: 128 kB of keys and values at a head of 64.
const SPAN: usize = 256;

/// About as many queries share a reading of a span.
const QUERIES: usize = 48;

/// Cosines and sines, `(tokens, pairs)`.
#[derive(Debug)]
pub(crate) struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

impl Angles {
    pub(super) fn new(rope: &Rope, positions: &[usize]) -> Self {
        // HF: position and frequency are multiplied in f32, which is coarse at large positions, and so it is here.
        let angle = |&position: &usize| rope.inv_freq.iter().map(move |freq| f64::from(position as f32 * freq));
        let cos = positions.iter().flat_map(angle).map(|angle| angle.cos() as f32 * rope.scale).collect();
        let sin = positions.iter().flat_map(angle).map(|angle| angle.sin() as f32 * rope.scale).collect();
        Self { cos, sin, pairs: rope.inv_freq.len() }
    }
}

/// Rotates the queries and keys of all tokens.
pub(super) fn rotate(level: Level, attention: &Attention, angles: &Angles, qkv: &mut [f32]) {
    let (heads, dim, pairs) = (attention.heads + attention.kv_heads, attention.head_dim, angles.pairs);
    debug_assert!(pairs * 2 <= dim);
    threads::chunks(qkv, (heads + attention.kv_heads) * dim, heads * dim, |token, qkv| {
        let (cos, sin) = (&angles.cos[token * pairs..][..pairs], &angles.sin[token * pairs..][..pairs]);
        level.run(Rotate { heads: &mut qkv[..heads * dim], dim, cos, sin });
    });
}

/// Writes the keys and values of all tokens to their rows' stores.
pub(super) fn write(attention: &Attention, layer: usize, qkv: &[f32], rows: &mut [Span<'_, Pages>]) -> Result<()> {
    let (dim, kv_heads) = (attention.head_dim, attention.kv_heads);
    let width = (attention.heads + 2 * kv_heads) * dim;
    for row in rows {
        let (start, end) = (row.store.len(), row.store.len() + row.count);
        debug_assert_eq!((row.store.shape().kv_heads, row.store.shape().head_dim), (kv_heads, dim));
        // Writing a key across a page's lines costs about 8 multiply-adds a value.
        threads::chunks(row.store.tail(row.count)?, 1, PAGE * kv_heads * dim * 8, |i, page| {
            let first = (start / PAGE + i) * PAGE;
            let page = Arc::make_mut(&mut page[0]);
            for position in start.max(first)..end.min(first + PAGE) {
                let token = &qkv[(row.first + position - start) * width..][..width];
                let (keys, values) = token[attention.heads * dim..].split_at(kv_heads * dim);
                for (head, (key, value)) in keys.chunks(dim).zip(values.chunks(dim)).enumerate() {
                    page.write(layer, head, position - first, key, value);
                }
            }
        });
    }
    Ok(())
}

/// The attention of all tokens, `(tokens, heads * head_dim)`, after their keys and values are written.
pub(super) fn attend(level: Level, attention: &Attention, layer: usize, qkv: &[f32], rows: &[Span<'_, Pages>]) -> Vec<f32> {
    let Attention { heads, kv_heads, head_dim: dim, .. } = *attention;
    let (group, width) = (heads / kv_heads, (heads + 2 * kv_heads) * dim);
    let block = (QUERIES / group).max(1);
    let mut jobs = Vec::new();
    for row in rows {
        for first in (0..row.count).step_by(block) {
            for head in 0..kv_heads {
                let queries = (first..row.count.min(first + block)).flat_map(|token| (0..group).map(move |g| (token, head * group + g)));
                let queries = queries.map(|(token, head)| {
                    let end = row.store.len() + token + 1;
                    let start = attention.window.map_or(0, |window| end.saturating_sub(window));
                    let token = row.first + token;
                    Query { x: &qkv[token * width + head * dim..][..dim], seen: start..end, to: token * heads + head }
                });
                jobs.push(Job { level, attention, layer, head, store: row.store, queries: queries.collect() });
            }
        }
    }
    let results = threads::map(jobs.len(), jobs.iter().map(Job::work).sum(), |i| jobs[i].attend());
    let mut y = vec![0.0; qkv.len() / width * heads * dim];
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
        (self.part.max[i], self.part.sum[i]) = self.job.level.run(Soften { scores, seen: start - first..end - first, scale, softcap });
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

struct Rotate<'a> {
    heads: &'a mut [f32],
    dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Task for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let pairs = self.cos.len();
        for head in self.heads.chunks_exact_mut(self.dim) {
            let (first, second) = head[..2 * pairs].split_at_mut(pairs);
            for ((x, y), (cos, sin)) in first.iter_mut().zip(second).zip(self.cos.iter().zip(self.sin)) {
                (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
            }
        }
    }
}

/// Turns scores, whole pages of them, into `e^(score - max)`, 0 outside `seen`; returns the max and the sum.
struct Soften<'a> {
    scores: &'a mut [f32],
    seen: Range<usize>,
    scale: f32,
    softcap: Option<f32>,
}

impl Task for Soften<'_> {
    type Out = (f32, f32);

    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> (f32, f32) {
        let Self { scores, seen, scale, softcap } = self;
        for score in scores.iter_mut() {
            *score *= scale;
        }
        if let Some(cap) = softcap {
            for score in scores.iter_mut() {
                *score = cap * math::tanh(*score / cap);
            }
        }
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
