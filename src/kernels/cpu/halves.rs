//! One span of an attention in bf16 arithmetic: queries, keys, values and weights are bf16, the products are those of [`super::brains`]
//! in AMX's order, and everything else is as in f32. AVX-512 BF16 has its own ([`super::dots`]).
//!
//! Positions that a query does not see have the weight 0, so its sums are the same beside queries that see more, as long as the values
//! there are numbers: infinity times 0 is none.

use super::{
    attention::Job,
    brains::{RoundHere, Unit},
    isa::{Isa, Level, Task},
    line::{BLOCK, F32, LANES, Line},
    scratch::{brains, local, values},
    span::{Order, Score, Soften, Work},
    target::Place,
    threads::Shares,
    tile::{ROWS, Sums, Tiles, alternate, apart, both, is_wide, tiled},
};
use crate::cache::PAGE;
use std::{marker::PhantomData, ops::Range};

/// Fewer queries than this read keys and values as they are.
const FEW: usize = 16;

impl Work<'_> {
    /// As [`Self::run`], of queries, keys and values that are rounded to bf16.
    pub fn run_in_halves(&mut self, level: Level) {
        self.reset();
        let (mut start, mut end) = (self.len, 0);
        for query in self.queries.iter().filter(|query| !query.seen.is_empty()) {
            (start, end) = (start.min(query.seen.start), end.max(query.seen.end));
        }
        if start >= end {
            return;
        }
        // Whole blocks of positions, as far as there are pages.
        let positions = start / BLOCK * BLOCK..self.len.min(end.next_multiple_of(BLOCK));
        // To lay keys and values out for tiles costs more than a few queries are worth.
        let count = self.queries.len();
        let by_tiles = count >= FEW && Unit::of(level, count).is_tiles();
        let strips = if by_tiles { 0..0 } else { 0..count }.step_by(ROWS).map(|first| (first, ROWS.min(count - first)));
        if by_tiles {
            self.score_in_halves(level, &positions);
        }
        for (first, rows) in strips.clone() {
            tiled!(level, rows, self.score_few(level, first, &positions));
        }
        level.run(Soften::<false>(self));
        self.hide(&positions, 1);
        if by_tiles {
            self.sum_in_halves(level, &positions);
        }
        for (first, rows) in strips {
            tiled!(level, rows, self.sum_few(level, first, &positions));
        }
    }

    fn score_few<const R: usize, const C: usize>(&mut self, level: Level, first: usize, positions: &Range<usize>) {
        let pages = positions.start / PAGE..positions.end / PAGE;
        Score::<Alternate, R, C> { work: self, first, pages, pairs: None, order: PhantomData }.at(level);
    }

    fn sum_few<const R: usize, const C: usize>(&mut self, level: Level, first: usize, positions: &Range<usize>) {
        for weights in self.scores.chunks_mut(self.len).skip(first).take(R) {
            level.run(RoundHere(&mut weights[positions.clone()]));
        }
        level.run(Sum::<R, C> { work: self, first, positions });
    }

    /// Lines of the keys of a page that are laid out for units.
    pub fn key_lines(&self) -> usize {
        self.job.attention.head_dim.next_multiple_of(BLOCK) / 2
    }

    /// Makes the weights of all queries 0 on pages of which they see nothing. So many lie together.
    pub fn hide(&mut self, positions: &Range<usize>, together: usize) {
        for (query, weights) in self.queries.iter().zip(self.scores.chunks_mut(self.len)) {
            let seen = query.seen.start / PAGE * PAGE..query.seen.end.next_multiple_of(PAGE);
            let seen = if query.seen.is_empty() { positions.end..positions.end } else { seen };
            weights[positions.start / together..seen.start / together].fill(0.0);
            weights[seen.end / together..positions.end / together].fill(0.0);
        }
    }

    /// The products of all queries with the keys of `positions`.
    fn score_in_halves(&mut self, level: Level, positions: &Range<usize>) {
        let Self { job, len, queries, .. } = *self;
        let dim = job.attention.head_dim;
        let pages = positions.start / PAGE..positions.end / PAGE;
        local(pages.len() * self.key_lines(), |keys| {
            level.run(PairKeys { work: self, pages, to: keys });
            let y = Shares::new(&mut self.scores[positions.start..]);
            let x = |i: usize| job.values_of(&queries[i]);
            // SAFETY: nobody else knows these scores.
            unsafe {
                Unit::of(level, queries.len()).alone(level, (queries.len(), dim), x, brains(keys), &Place::of(&y, len, positions.len()))
            };
        });
    }

    /// The sums of the values of `positions`, with the weights of all queries.
    fn sum_in_halves(&mut self, level: Level, positions: &Range<usize>) {
        let Self { job, len, queries, .. } = *self;
        let (dims, stride, depth) = (job.dims(), job.stride(), positions.len().next_multiple_of(BLOCK) / 2);
        local(dims / LANES * depth, |lines| {
            let pages = positions.start / PAGE..positions.end / PAGE;
            level.run(PairValues { work: self, pages, to: lines });
            local(queries.len() * dims / LANES, |sums| {
                let sums = values(sums);
                let y = Shares::new(sums);
                let x = |i: usize| &self.scores[i * len..][positions.clone()];
                // SAFETY: nobody else knows these sums.
                unsafe {
                    let shape = (queries.len(), positions.len());
                    Unit::of(level, queries.len()).alone(level, shape, x, brains(lines), &Place::of(&y, dims, dims));
                }
                for (part, sums) in self.part.chunks_exact_mut(stride).zip(sums.chunks_exact(dims)) {
                    part[..dims].copy_from_slice(sums);
                }
            });
        });
    }
}

/// The sums of values with the weights of `R` queries.
struct Sum<'a, 'b, const R: usize, const C: usize> {
    work: &'a mut Work<'b>,
    first: usize,
    positions: &'a Range<usize>,
}

impl<const R: usize, const C: usize> Task for Sum<'_, '_, R, C> {
    type Out = ();
    const NARROW: bool = !is_wide(R, C);
    const WIDE: bool = is_wide(R, C);

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let panels = self.work.job.dims() / LANES;
        self.walk::<I, C>(isa, 0..panels);
    }
}

impl<const R: usize, const C: usize> Tiles for Sum<'_, '_, R, C> {
    #[inline(always)]
    fn tile<I: Isa, const N: usize>(&mut self, isa: I, panel: usize) {
        let &mut Self { ref mut work, first, positions } = self;
        let job = work.job;
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        for from in positions.clone().step_by(BLOCK) {
            let (mut even, mut odd) = ([[isa.load(&[0.0; LANES]); N]; R], [[isa.load(&[0.0; LANES]); N]; R]);
            for at in (from..positions.end.min(from + BLOCK)).step_by(PAGE) {
                let mut panels = [written(job, (work.start + at) / PAGE, panel); N];
                for c in 1..N {
                    panels[c] = written(job, (work.start + at) / PAGE, panel + c);
                }
                let mut rows = [&[][..]; R];
                for r in 0..R {
                    rows[r] = &work.scores[(first + r) * work.len + at..][..panels[0].len()];
                }
                apart(isa, rows, panels, [&mut even, &mut odd]);
            }
            both(isa, even, odd, &mut sums);
        }
        work.keep(isa, first, panel, &sums);
    }
}

/// AMX's.
struct Alternate;

impl Order for Alternate {
    #[inline(always)]
    fn add<I: Isa, const R: usize, const C: usize>(isa: I, queries: [&[f32]; R], keys: [&[F32]; C], sums: &mut Sums<I, R, C>) {
        alternate(isa, queries, keys, (), sums);
    }
}

/// The values of a page that are written; of others it may hold anything.
fn written<'a>(job: &Job<'a>, page: usize, panel: usize) -> &'a [F32] {
    let count = job.row.len().saturating_sub(page * PAGE).min(PAGE);
    &job.row.store.page(page).values(job.layer, job.head, panel)[..count]
}

/// Lays the keys of pages out two dimensions together, [`Work::key_lines`] of each page.
pub(super) struct PairKeys<'a, 'b> {
    pub work: &'a Work<'b>,
    pub pages: Range<usize>,
    pub to: &'a mut [F32],
}

impl Task for PairKeys<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Work { job, start, .. } = *self.work;
        for (page, to) in self.pages.clone().zip(self.to.chunks_exact_mut(self.work.key_lines())) {
            self.work.ask(isa, &self.pages, page + 1, 1);
            pair(isa, &job.row.store.page(start / PAGE + page).keys(job.layer, job.head)[..job.attention.head_dim], to);
        }
    }
}

/// Lays the values of pages out two positions together, a panel after another; zeros for what is not written, and after the pages.
pub(super) struct PairValues<'a, 'b> {
    pub work: &'a Work<'b>,
    pub pages: Range<usize>,
    pub to: &'a mut [F32],
}

impl Task for PairValues<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Work { job, start, .. } = *self.work;
        let depth = self.to.len() / (job.dims() / LANES);
        for (panel, to) in self.to.chunks_exact_mut(depth).enumerate() {
            let (to, rest) = to.split_at_mut(self.pages.len() * PAGE / 2);
            for (page, to) in self.pages.clone().zip(to.chunks_exact_mut(PAGE / 2)) {
                pair(isa, written(job, start / PAGE + page, panel), to);
            }
            rest.fill(F32::ZERO);
        }
    }
}

/// Lays lines of bf16 values, held as f32, together two by two.
#[inline(always)]
fn pair<I: Isa>(isa: I, from: &[F32], to: &mut [F32]) {
    let (twos, last) = from.as_chunks();
    let (to, rest) = to.split_at_mut(twos.len());
    for (to, [first, second]) in to.iter_mut().zip(twos) {
        isa.store(isa.couple(isa.load(&first.0), isa.load(&second.0)), &mut to.0);
    }
    rest.fill(F32::ZERO);
    if let ([to, ..], [last]) = (rest, last) {
        isa.store(isa.couple(isa.load(&last.0), isa.load(&F32::ZERO.0)), &mut to.0);
    }
}
