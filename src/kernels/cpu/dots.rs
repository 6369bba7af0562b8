//! One span of an attention in bf16 arithmetic by AVX-512 BF16: queries, keys, values and weights are bf16, products are summed pair after
//! pair, of dimensions and then of positions, and everything else is as in f32.
//!
//! Positions that a query does not see have the weight 0, so its sums are the same beside queries that see more, as long as the values
//! there are numbers: infinity times 0 is none.

use super::{
    halves::written,
    inputs::round,
    isa::{Isa, Level, Task},
    line::{F32, LANES},
    scratch::{halves, local, values},
    span::{Order, Score, Soften, Work},
    tile::{ROWS, Sums, Tiles, is_wide, tiled},
};
use crate::cache::PAGE;
use std::{marker::PhantomData, ops::Range};

impl Work<'_> {
    /// As [`Self::run`], of queries, keys and values that are rounded to bf16.
    pub fn run_in_dots(&mut self, level: Level) {
        self.reset();
        if self.len == 0 {
            return;
        }
        let (count, job) = (self.queries.len(), self.job);
        let strips = (0..count).step_by(ROWS).map(|first| (first, ROWS.min(count - first)));
        let [groups, panels] = self.groups(level);
        let lines = job.attention.head_dim.div_ceil(2 * LANES);
        local(count * lines, |own| {
            let to = halves(values(own)).chunks_exact_mut(lines * 2 * LANES);
            to.zip(self.queries).for_each(|(to, query)| round(level, job.values_of(query), to));
            let queries = values(own);
            for pages in groups {
                for (first, rows) in strips.clone() {
                    tiled!(level, rows, self.score_dots(level, first, pages.clone(), queries));
                }
            }
        });
        level.run(Soften::<true>(self));
        self.hide(&(0..self.len), 2);
        for panels in panels {
            for (first, rows) in strips.clone() {
                tiled!(level, rows, self.sum_dots(level, first, panels.clone()));
            }
        }
    }

    fn score_dots<const R: usize, const C: usize>(&mut self, level: Level, first: usize, pages: Range<usize>, queries: &[f32]) {
        Score::<Pairs, R, C> { work: self, first, pages, queries, order: PhantomData }.at(level);
    }

    fn sum_dots<const R: usize, const C: usize>(&mut self, level: Level, first: usize, panels: Range<usize>) {
        let pages = self.pages(first..first + R);
        level.dots(Sum::<R, C> { work: self, first, panels, pages });
    }
}

/// Pair after pair.
struct Pairs;

impl Order for Pairs {
    const PAIRS: bool = true;

    #[inline(always)]
    fn add<I: Isa, const R: usize, const C: usize>(isa: I, queries: [&[f32]; R], keys: [&[F32]; C], sums: &mut Sums<I, R, C>) {
        dots(isa, queries, keys, sums);
    }
}

/// The sums of the values of pages that one of `R` queries sees, with their weights.
struct Sum<'a, 'b, const R: usize, const C: usize> {
    work: &'a mut Work<'b>,
    first: usize,
    panels: Range<usize>,
    pages: Range<usize>,
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
        let (work, first) = (&mut *self.work, self.first);
        let job = work.job;
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        for page in self.pages.clone() {
            let mut rows = [&[][..]; R];
            for r in 0..R {
                rows[r] = &work.scores[(first + r) * work.len + page * (PAGE / 2)..][..PAGE / 2];
            }
            let mut panels = [written(job, work.start / PAGE + page, panel); N];
            for c in 1..N {
                panels[c] = written(job, work.start / PAGE + page, panel + c);
            }
            dots(isa, rows, panels, &mut sums);
        }
        work.keep(isa, first, panel, &sums);
    }
}

/// Adds the products of rows of pairs with panels of bf16 values, held as f32.
#[inline(always)]
fn dots<I: Isa, const R: usize, const C: usize>(isa: I, rows: [&[f32]; R], panels: [&[F32]; C], sums: &mut Sums<I, R, C>) {
    // Loops, not closures: those would be compiled for the baseline where they are not inlined.
    let (mut twos, count) = ([panels[0].as_chunks::<2>().0; C], panels[0].len());
    for c in 0..C {
        twos[c] = &panels[c].as_chunks().0[..count / 2];
    }
    let mut pairs = rows;
    for r in 0..R {
        pairs[r] = &rows[r][..count / 2];
    }
    for i in 0..count / 2 {
        let mut lines = [isa.load(&[0.0; LANES]); C];
        for c in 0..C {
            let [first, second] = &twos[c][i];
            lines[c] = isa.couple(isa.load(&first.0), isa.load(&second.0));
        }
        for r in 0..R {
            for c in 0..C {
                sums[r][c] = isa.dot(lines[c], pairs[r][i], sums[r][c]);
            }
        }
    }
    if !count.is_multiple_of(2) {
        for c in 0..C {
            let line = isa.couple(isa.load(&panels[c][count - 1].0), isa.load(&[0.0; LANES]));
            for r in 0..R {
                sums[r][c] = isa.dot(line, rows[r][count / 2], sums[r][c]);
            }
        }
    }
}
