//! One span of an attention: scores, their softmax and the weighted sum of values, a few queries at a time.

use super::{
    attention::Job,
    isa::{Isa, Level, Task},
    line::LANES,
    math,
    tile::{ROWS, is_wide, multiply, tiled},
};
use crate::{cache::PAGE, kernels::Attention};
use std::ops::Range;

/// One span of a job. Positions count from the span's start.
pub(super) struct Work<'a> {
    pub job: &'a Job<'a>,
    pub start: usize,
    /// Positions, whole pages.
    pub len: usize,
    /// `(queries, len)`: products, then weights.
    pub scores: &'a mut [f32],
    /// The outcome.
    pub part: &'a mut [f32],
}

impl Work<'_> {
    pub fn run(&mut self, level: Level) {
        let count = self.job.queries();
        let dims = self.job.dims();
        for part in self.part.chunks_exact_mut(dims + 2) {
            part.fill(0.0);
            part[dims] = f32::NEG_INFINITY;
        }
        let mut first = 0;
        while first < count {
            let rows = (count - first).min(ROWS);
            tiled!(level, rows, self.score(level, first));
            // What all of them see is summed together, what is left before and after alone: the order is the same.
            let (mut start, mut end) = (0, self.len);
            for i in first..first + rows {
                level.run(Soften { work: self, i });
                let seen = self.seen(i);
                (start, end) = (start.max(seen.start), end.min(seen.end));
            }
            end = end.max(start);
            for i in first..first + rows {
                let seen = self.seen(i);
                tiled!(level, 1, self.sum(level, i, seen.start..seen.end.min(start)));
            }
            tiled!(level, rows, self.sum(level, first, start..end));
            for i in first..first + rows {
                let seen = self.seen(i);
                tiled!(level, 1, self.sum(level, i, seen.start.max(end)..seen.end));
            }
            first += rows;
        }
    }

    /// The positions that a query sees.
    #[inline(always)]
    fn seen(&self, i: usize) -> Range<usize> {
        let Range { start, end } = self.job.query(i).seen;
        start.clamp(self.start, self.start + self.len) - self.start..end.clamp(self.start, self.start + self.len) - self.start
    }

    /// The products of `R` queries with all pages that one of them sees, a page being a panel of 16 positions.
    fn score<const R: usize, const C: usize, const D: usize>(&mut self, level: Level, first: usize) {
        level.run(Score::<R, C> { work: self, first });
    }

    /// Adds the values of `positions` to the rows of `R` queries, with their weights.
    fn sum<const R: usize, const C: usize, const D: usize>(&mut self, level: Level, first: usize, positions: Range<usize>) {
        if !positions.is_empty() {
            level.run(Sum::<R, C> { work: self, first, positions });
        }
    }
}

struct Score<'a, 'b, const R: usize, const C: usize> {
    work: &'a mut Work<'b>,
    first: usize,
}

impl<const R: usize, const C: usize> Task for Score<'_, '_, R, C> {
    type Out = ();
    const NARROW: bool = !is_wide(R, C);
    const WIDE: bool = is_wide(R, C);

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (mut start, mut end) = (self.work.len, 0);
        for i in self.first..self.first + R {
            let seen = self.work.seen(i);
            if !seen.is_empty() {
                (start, end) = (start.min(seen.start), end.max(seen.end));
            }
        }
        let (mut page, end) = (start / PAGE, end.div_ceil(PAGE));
        self.ask(isa, page..end.min(page + C));
        while page + C <= end {
            self.ask(isa, page + C..end.min(page + 2 * C));
            self.pages::<I, C>(isa, page);
            page += C;
        }
        while page < end {
            self.pages::<I, 1>(isa, page);
            page += 1;
        }
    }
}

impl<const R: usize, const C: usize> Score<'_, '_, R, C> {
    /// Asks for the keys and values of pages where they are read once: pages lie anywhere, so the processor cannot look ahead.
    #[inline(always)]
    fn ask<I: Isa>(&self, isa: I, pages: Range<usize>) {
        let job = self.work.job;
        if job.queries() <= ROWS {
            for page in pages {
                for line in job.row.store.page(self.work.start / PAGE + page).head(job.layer, job.head) {
                    isa.prefetch((&raw const *line).cast());
                }
            }
        }
    }

    #[inline(always)]
    fn pages<I: Isa, const N: usize>(&mut self, isa: I, page: usize) {
        let (work, first) = (&mut *self.work, self.first);
        let job = work.job;
        let mut rows = [job.query(first).x; R];
        for r in 1..R {
            rows[r] = job.query(first + r).x;
        }
        let keys = |c| job.row.store.page(work.start / PAGE + page + c).keys(job.layer, job.head);
        let mut panels = [keys(0); N];
        for c in 1..N {
            panels[c] = keys(c);
        }
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        multiply::<I, _, R, N, 0>(isa, rows, panels, &mut sums);
        for r in 0..R {
            let to = work.scores[(first + r) * work.len + page * PAGE..][..N * PAGE].as_chunks_mut().0;
            for c in 0..N {
                isa.store(sums[r][c], &mut to[c]);
            }
        }
    }
}

/// Turns the scores of query `i`, whole pages of them, into weights `e^(score - max)`, 0 where it does not see; notes the largest
/// score and the sum of the weights.
struct Soften<'a, 'b> {
    work: &'a mut Work<'b>,
    i: usize,
}

impl Task for Soften<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { work, i } = self;
        let Range { start, end } = work.seen(i);
        if start >= end {
            return;
        }
        // Whole pages, so that a position is always in the same lane.
        let first = start / PAGE * PAGE;
        let scores = &mut work.scores[i * work.len..][first..end.next_multiple_of(PAGE)];
        let Attention { scale, softcap, .. } = *work.job.attention;
        for score in scores.iter_mut() {
            *score *= scale;
        }
        if let Some(cap) = softcap {
            for score in scores.iter_mut() {
                *score = cap * math::tanh(*score / cap);
            }
        }
        work.job.query(i).bias.add(scores, work.start + first);
        // Also hides what an unwritten or later position holds.
        scores[..start - first].fill(f32::NEG_INFINITY);
        scores[end - first..].fill(f32::NEG_INFINITY);
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
        let (dims, stride) = (work.job.dims(), work.job.stride());
        work.part[i * stride + dims] = max;
        work.part[i * stride + dims + 1] = math::sum(scores, |score, sum| sum + score);
    }
}

struct Sum<'a, 'b, const R: usize, const C: usize> {
    work: &'a mut Work<'b>,
    first: usize,
    positions: Range<usize>,
}

impl<const R: usize, const C: usize> Task for Sum<'_, '_, R, C> {
    type Out = ();
    const NARROW: bool = !is_wide(R, C);
    const WIDE: bool = is_wide(R, C);

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (mut panel, end) = (0, self.work.job.dims() / LANES);
        while panel + C <= end {
            self.panels::<I, C>(isa, panel);
            panel += C;
        }
        while panel < end {
            self.panels::<I, 1>(isa, panel);
            panel += 1;
        }
    }
}

impl<const R: usize, const C: usize> Sum<'_, '_, R, C> {
    #[inline(always)]
    fn panels<I: Isa, const N: usize>(&mut self, isa: I, panel: usize) {
        let (work, first, positions) = (&mut *self.work, self.first, &self.positions);
        let (job, stride) = (work.job, work.job.stride());
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        for r in 0..R {
            let from = work.part[(first + r) * stride + panel * LANES..][..N * LANES].as_chunks().0;
            for c in 0..N {
                sums[r][c] = isa.load(&from[c]);
            }
        }
        let mut at = positions.start;
        while at < positions.end {
            let page = job.row.store.page((work.start + at) / PAGE);
            let count = (PAGE - at % PAGE).min(positions.end - at);
            let mut rows = [&[][..]; R];
            for r in 0..R {
                rows[r] = &work.scores[(first + r) * work.len + at..][..count];
            }
            let values = |c| &page.values(job.layer, job.head, panel + c)[at % PAGE..][..count];
            let mut panels = [values(0); N];
            for c in 1..N {
                panels[c] = values(c);
            }
            multiply::<I, _, R, N, 0>(isa, rows, panels, &mut sums);
            at += count;
        }
        for r in 0..R {
            let to = work.part[(first + r) * stride + panel * LANES..][..N * LANES].as_chunks_mut().0;
            for c in 0..N {
                isa.store(sums[r][c], &mut to[c]);
            }
        }
    }
}
