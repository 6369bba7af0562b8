//! One span of an attention: scores, their softmax and the weighted sum of values, for all queries of a job.

use super::{
    attention::{Job, Query},
    brains::rounded,
    isa::{Isa, Level, Task},
    line::{F32, LANES},
    math,
    scratch::halves,
    tile::{ROWS, Sums, Tiles, is_wide, multiply, tiled},
};
use crate::{
    cache::PAGE,
    kernels::{Attention, Bias},
};
use std::{marker::PhantomData, ops::Range};

/// One span of a job. Positions count from the span's start.
pub(super) struct Work<'a> {
    pub job: &'a Job<'a>,
    pub start: usize,
    /// Positions, whole pages.
    pub len: usize,
    /// All queries of the job, with what they see of the span.
    pub queries: &'a [Query],
    /// `(queries, len)`: products, then weights.
    pub scores: &'a mut [f32],
    /// The outcome.
    pub part: &'a mut [f32],
}

/// Pages whose keys stay in the first-level cache while all queries pass by: 16 kB at a head of 64.
const GROUP: usize = 4;

impl Work<'_> {
    pub fn run(&mut self, level: Level) {
        self.reset();
        let count = self.queries.len();
        let strips = (0..count).step_by(ROWS).map(|first| (first, ROWS.min(count - first)));
        let [groups, panels] = self.groups(level);
        for pages in groups {
            for (first, rows) in strips.clone() {
                tiled!(level, rows, self.score(level, first, pages.clone()));
            }
        }
        level.run(Soften::<false>(self));
        for panels in panels {
            for (first, rows) in strips.clone() {
                tiled!(level, rows, self.sum(level, first, panels.clone()));
            }
        }
    }

    /// The pages of the span, and the panels of values, that all queries pass by together.
    pub fn groups(&self, level: Level) -> [impl Iterator<Item = Range<usize>> + use<>; 2] {
        // Few queries read everything once.
        let (pages, panels) = (self.len / PAGE, self.job.dims() / LANES);
        let (group, together) = if self.is_read_once() { (pages, panels) } else { (GROUP, if level.is_wide() { 4 } else { 1 }) };
        [(pages, group), (panels, together)].map(|(all, size)| {
            let size = size.max(1);
            (0..all).step_by(size).map(move |first| first..all.min(first + size))
        })
    }

    /// The pages that some queries see something of.
    #[inline(always)]
    pub fn pages(&self, queries: Range<usize>) -> Range<usize> {
        let (mut start, mut end) = (self.len, 0);
        for query in &self.queries[queries] {
            if !query.seen.is_empty() {
                (start, end) = (start.min(query.seen.start), end.max(query.seen.end));
            }
        }
        start / PAGE..end.div_ceil(PAGE)
    }

    /// Keeps the sums of some panels for the queries from `first` on.
    #[inline(always)]
    pub fn keep<I: Isa, const R: usize, const C: usize>(&mut self, isa: I, first: usize, panel: usize, sums: &Sums<I, R, C>) {
        let stride = self.job.stride();
        for r in 0..R {
            let to = self.part[(first + r) * stride + panel * LANES..][..C * LANES].as_chunks_mut().0;
            for c in 0..C {
                isa.store(sums[r][c], &mut to[c]);
            }
        }
    }

    /// The outcome of no position.
    pub fn reset(&mut self) {
        let dims = self.job.dims();
        for part in self.part.chunks_exact_mut(self.job.stride()) {
            part.fill(0.0);
            part[dims] = f32::NEG_INFINITY;
        }
    }

    /// Asks for the keys and values of `count` of the `pages` where they are read once: pages lie anywhere, so the processor cannot look
    /// ahead.
    #[inline(always)]
    pub fn ask<I: Isa>(&self, isa: I, pages: &Range<usize>, page: usize, count: usize) {
        let Work { job, start, .. } = *self;
        if self.is_read_once() {
            for page in page..pages.end.min(page + count) {
                for line in job.row.store.page(start / PAGE + page).head(job.layer, job.head) {
                    isa.prefetch((&raw const *line).cast());
                }
            }
        }
    }

    fn is_read_once(&self) -> bool {
        self.queries.len() <= ROWS
    }

    /// The products of `R` queries with those of the pages that one of them sees, a page being a panel of 16 positions.
    fn score<const R: usize, const C: usize>(&mut self, level: Level, first: usize, pages: Range<usize>) {
        Score::<Ascending, R, C> { work: self, first, pages, pairs: None, order: PhantomData }.at(level);
    }

    /// The sums of `panels` of the values, with the weights of `R` queries.
    fn sum<const R: usize, const C: usize>(&mut self, level: Level, first: usize, panels: Range<usize>) {
        level.run(Sum::<R, C> { work: self, first, panels });
    }
}

/// How scores are summed over dimensions.
pub(super) trait Order {
    /// Whether pairs of dimensions are multiplied, by [`Level::dots`].
    const PAIRS: bool = false;

    /// Adds the products of queries with keys. Must be `#[inline(always)]`.
    fn add<I: Isa, const R: usize, const C: usize>(isa: I, queries: [&[f32]; R], keys: [&[F32]; C], sums: &mut Sums<I, R, C>);
}

/// Dimensions ascending.
struct Ascending;

impl Order for Ascending {
    #[inline(always)]
    fn add<I: Isa, const R: usize, const C: usize>(isa: I, queries: [&[f32]; R], keys: [&[F32]; C], sums: &mut Sums<I, R, C>) {
        multiply::<I, _, R, C, _>(isa, queries, keys, (), sums);
    }
}

/// The products of `R` queries with the keys of those pages that one of them sees.
pub(super) struct Score<'a, 'b, O, const R: usize, const C: usize> {
    pub work: &'a mut Work<'b>,
    pub first: usize,
    pub pages: Range<usize>,
    /// All queries in whole lines, and all keys, [`Work::key_lines`] of each page, where those of the pass are not what is multiplied.
    pub pairs: Option<(&'a [f32], &'a [F32])>,
    pub order: PhantomData<O>,
}

impl<O: Order, const R: usize, const C: usize> Score<'_, '_, O, R, C> {
    pub fn at(self, level: Level) {
        if O::PAIRS { level.dots(self) } else { level.run(self) }
    }
}

impl<O: Order, const R: usize, const C: usize> Task for Score<'_, '_, O, R, C> {
    type Out = ();
    const NARROW: bool = !is_wide(R, C);
    const WIDE: bool = is_wide(R, C);

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let seen = self.work.pages(self.first..self.first + R);
        self.pages = self.pages.start.max(seen.start)..self.pages.end.min(seen.end);
        if self.pairs.is_none() {
            self.work.ask(isa, &self.pages, self.pages.start, C);
        }
        self.walk::<I, C>(isa, self.pages.clone());
    }
}

impl<O: Order, const R: usize, const C: usize> Tiles for Score<'_, '_, O, R, C> {
    #[inline(always)]
    fn tile<I: Isa, const N: usize>(&mut self, isa: I, page: usize) {
        let Self { ref mut work, first, pairs, .. } = *self;
        let (job, dim) = (work.job, work.job.attention.head_dim);
        let (mut rows, mut panels) = ([&[][..]; R], [&[][..]; N]);
        match pairs {
            Some((queries, keys)) => {
                let width = queries.len() / work.queries.len();
                for r in 0..R {
                    rows[r] = &queries[(first + r) * width..][..dim.div_ceil(2)];
                }
                for c in 0..N {
                    panels[c] = &keys[(page + c) * work.key_lines()..][..dim.div_ceil(2)];
                }
            }
            None => {
                work.ask(isa, &self.pages, page + N, N);
                for r in 0..R {
                    rows[r] = job.values_of(&work.queries[first + r]);
                }
                for c in 0..N {
                    panels[c] = job.row.store.page(work.start / PAGE + page + c).keys(job.layer, job.head);
                }
            }
        }
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        O::add(isa, rows, panels, &mut sums);
        for r in 0..R {
            let to = work.scores[(first + r) * work.len + page * PAGE..][..N * PAGE].as_chunks_mut().0;
            for c in 0..N {
                isa.store(sums[r][c], &mut to[c]);
            }
        }
    }
}

/// Turns the scores of all queries, whole pages of them, into weights `e^(score - max)`, 0 where they do not see; notes the largest
/// score and the sum of the weights. If `PAIRS`, weights are then rounded to bf16, and lie two by two from the query's first on.
pub(super) struct Soften<'a, 'b, const PAIRS: bool>(pub &'a mut Work<'b>);

impl<const PAIRS: bool> Task for Soften<'_, '_, PAIRS> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self(work) = self;
        let (dims, stride) = (work.job.dims(), work.job.stride());
        for (i, query) in work.queries.iter().enumerate() {
            let Range { start, end } = query.seen;
            if start >= end {
                continue;
            }
            // Whole pages, so that a position is always in the same lane.
            let (first, last) = (start / PAGE * PAGE, end.next_multiple_of(PAGE));
            let scores = &mut work.scores[i * work.len..][..work.len];
            prepare(work.job, i, &mut scores[first..last], work.start + first);
            // What an unwritten or later position holds is hidden.
            scores[first..start].fill(f32::NEG_INFINITY);
            scores[end..last].fill(f32::NEG_INFINITY);
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for line in scores[first..last].as_chunks::<LANES>().0 {
                for (lane, &score) in lanes.iter_mut().zip(line) {
                    *lane = if score > *lane { score } else { *lane };
                }
            }
            let max = math::fold(lanes, |a, b| if b > a { b } else { a });
            let mut lanes = [0.0; LANES];
            if PAIRS {
                for at in (first..last).step_by(STEP) {
                    let mut weights = [[0.0; LANES]; STEP / LANES];
                    let count = STEP.min(last - at);
                    let weights = &mut weights[..count / LANES];
                    weights.copy_from_slice(scores[at..at + count].as_chunks().0);
                    weigh(weights, max, &mut lanes);
                    halves(scores)[at..at + count].iter_mut().zip(weights.as_flattened()).for_each(|(to, x)| *to = rounded(*x));
                }
            } else {
                weigh(scores[first..last].as_chunks_mut().0, max, &mut lanes);
            }
            work.part[i * stride + dims] = max;
            work.part[i * stride + dims + 1] = math::fold(lanes, |a, b| a + b);
        }
    }
}

/// Weights that are rounded at a time, in the first-level cache.
const STEP: usize = 256;

/// Turns scores into weights, and adds them up.
#[inline(always)]
fn weigh(lines: &mut [[f32; LANES]], max: f32, sums: &mut [f32; LANES]) {
    for line in lines {
        for (score, sum) in line.iter_mut().zip(&mut *sums) {
            *score = math::decay(*score - max);
            *sum += *score;
        }
    }
}

/// Scales, caps and biases the scores of query `i` from position `first` on.
#[inline(always)]
fn prepare(job: &Job<'_>, i: usize, scores: &mut [f32], first: usize) {
    let Attention { scale, softcap, ref bias, .. } = *job.attention;
    for score in scores.iter_mut() {
        *score *= scale;
    }
    if let Some(cap) = softcap {
        for score in scores.iter_mut() {
            *score = cap * math::tanh(*score / cap);
        }
    }
    if !matches!(bias, Bias::None) {
        job.bias(i).add(scores, first);
    }
}

struct Sum<'a, 'b, const R: usize, const C: usize> {
    work: &'a mut Work<'b>,
    first: usize,
    panels: Range<usize>,
}

impl<const R: usize, const C: usize> Task for Sum<'_, '_, R, C> {
    type Out = ();
    const NARROW: bool = !is_wide(R, C);
    const WIDE: bool = is_wide(R, C);

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        self.walk::<I, C>(isa, self.panels.clone());
    }
}

impl<const R: usize, const C: usize> Tiles for Sum<'_, '_, R, C> {
    #[inline(always)]
    fn tile<I: Isa, const N: usize>(&mut self, isa: I, panel: usize) {
        let (mut start, mut end) = (0, self.work.len);
        for query in &self.work.queries[self.first..self.first + R] {
            (start, end) = (start.max(query.seen.start), end.min(query.seen.end));
        }
        end = end.max(start);
        // What all of them see is summed together, what is left before and after alone: the order is the same.
        for r in 0..R {
            let Range { start: from, end: to } = self.work.queries[self.first + r].seen;
            self.alone::<I, N>(isa, r, panel, from..to.min(start));
        }
        self.together::<I, N>(isa, panel, start..end);
        for r in 0..R {
            let Range { start: from, end: to } = self.work.queries[self.first + r].seen;
            self.alone::<I, N>(isa, r, panel, from.max(end)..to);
        }
    }
}

impl<const R: usize, const C: usize> Sum<'_, '_, R, C> {
    /// Adds the values of `positions` to the rows of all queries.
    #[inline(always)]
    fn together<I: Isa, const N: usize>(&mut self, isa: I, panel: usize, positions: Range<usize>) {
        let (work, first) = (&mut *self.work, self.first);
        let stride = work.job.stride();
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        for r in 0..R {
            let from = work.part[(first + r) * stride + panel * LANES..][..N * LANES].as_chunks().0;
            for c in 0..N {
                sums[r][c] = isa.load(&from[c]);
            }
        }
        let Range { start: mut at, end } = positions;
        while at < end {
            // Of a whole page the compiler knows how long it is.
            let count = (PAGE - at % PAGE).min(end - at);
            if count == PAGE {
                Self::page::<I, N>(isa, work, first, panel, at, PAGE, &mut sums);
            } else {
                Self::page::<I, N>(isa, work, first, panel, at, count, &mut sums);
            }
            at += count;
        }
        work.keep(isa, first, panel, &sums);
    }

    /// Adds the values of `count` positions of a page.
    #[inline(always)]
    fn page<I: Isa, const N: usize>(
        isa: I,
        work: &Work<'_>,
        first: usize,
        panel: usize,
        at: usize,
        count: usize,
        sums: &mut Sums<I, R, N>,
    ) {
        let job = work.job;
        let page = job.row.store.page((work.start + at) / PAGE);
        let mut rows = [&[][..]; R];
        for r in 0..R {
            rows[r] = &work.scores[(first + r) * work.len + at..][..count];
        }
        let values = |c| &page.values(job.layer, job.head, panel + c)[at % PAGE..][..count];
        let mut panels = [values(0); N];
        for c in 1..N {
            panels[c] = values(c);
        }
        multiply::<I, _, R, N, _>(isa, rows, panels, (), sums);
    }

    /// Adds the values of `positions` to the row of query `r`.
    #[inline(always)]
    fn alone<I: Isa, const N: usize>(&mut self, isa: I, r: usize, panel: usize, positions: Range<usize>) {
        let (work, i) = (&mut *self.work, self.first + r);
        let (job, stride) = (work.job, work.job.stride());
        for at in positions {
            let (page, weight) = (job.row.store.page((work.start + at) / PAGE), work.scores[i * work.len + at]);
            let sums = work.part[i * stride + panel * LANES..][..N * LANES].as_chunks_mut().0;
            for c in 0..N {
                let value = isa.load(&page.values(job.layer, job.head, panel + c)[at % PAGE].0);
                isa.store(isa.mul_add(value, weight, isa.load(&sums[c])), &mut sums[c]);
            }
        }
    }
}
