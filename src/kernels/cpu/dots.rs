//! One span of an attention in bf16 arithmetic by AVX-512 BF16: queries, keys, values and weights are bf16, products are summed pair after
//! pair, of dimensions and then of positions, and everything else is as in f32.
//!
//! Positions that a query does not see have the weight 0, so its sums are the same beside queries that see more, as long as the values
//! there are numbers: infinity times 0 is none.

use super::{
    halves::{PairKeys, PairValues},
    inputs::round,
    isa::{Isa, Level, Task},
    line::{Dots, F32, LANES},
    scratch::{brains, halves, local, values},
    span::{Order, Score, Soften, Work},
    tile::{ROWS, Sums, Tiles, is_wide, multiply, tiled},
};
use crate::cache::PAGE;
use std::{marker::PhantomData, ops::Range};

impl Work<'_> {
    /// As [`Self::run`], of queries, keys and values that are rounded to bf16.
    pub fn run_in_dots(&mut self, level: Level) {
        self.reset();
        let seen = self.pages(0..self.queries.len());
        if seen.is_empty() {
            return;
        }
        let (count, job) = (self.queries.len(), self.job);
        let strips = (0..count).step_by(ROWS).map(|first| (first, ROWS.min(count - first)));
        let [groups, panels] = self.groups(level);
        let lines = job.attention.head_dim.div_ceil(2 * LANES);
        local(count * lines, |own| {
            let to = halves(values(own)).chunks_exact_mut(lines * 2 * LANES);
            to.zip(self.queries).for_each(|(to, query)| round(level, job.values_of(query), to));
            let queries = &*values(own);
            local(self.len / PAGE * self.key_lines(), |keys| {
                let to = &mut keys[seen.start * self.key_lines()..];
                level.run(PairKeys { work: self, pages: seen.clone(), to });
                for pages in groups {
                    for (first, rows) in strips.clone() {
                        tiled!(level, rows, self.score_dots(level, first, pages.clone(), (queries, keys)));
                    }
                }
            });
        });
        level.run(Soften::<true>(self));
        self.hide(&(0..self.len), 2);
        let depth = seen.len() * PAGE / 2;
        local(job.dims() / LANES * depth, |lines| {
            level.run(PairValues { work: self, pages: seen.clone(), to: lines });
            for panels in panels {
                for (first, rows) in strips.clone() {
                    tiled!(level, rows, self.sum_dots(level, first, panels.clone(), &seen, lines));
                }
            }
        });
    }

    fn score_dots<const R: usize, const C: usize>(&mut self, level: Level, first: usize, pages: Range<usize>, pairs: (&[f32], &[F32])) {
        Score::<Pairs, R, C> { work: self, first, pages, pairs: Some(pairs), order: PhantomData }.at(level);
    }

    fn sum_dots<const R: usize, const C: usize>(
        &mut self,
        level: Level,
        first: usize,
        panels: Range<usize>,
        laid: &Range<usize>,
        lines: &[F32],
    ) {
        level.dots(Sum::<R, C> { work: self, first, panels, laid, lines });
    }
}

/// Pair after pair.
struct Pairs;

impl Order for Pairs {
    const PAIRS: bool = true;

    #[inline(always)]
    fn add<I: Isa, const R: usize, const C: usize>(isa: I, rows: [&[f32]; R], panels: [&[F32]; C], sums: &mut Sums<I, R, C>) {
        // A loop, not a closure: that would be compiled for the baseline where it is not inlined.
        let mut dots = [Dots::of(brains(panels[0])); C];
        for c in 1..C {
            dots[c] = Dots::of(brains(panels[c]));
        }
        multiply(isa, rows, dots, (), sums);
    }
}

/// The sums of the values of pages that one of `R` queries sees, with their weights.
struct Sum<'a, 'b, const R: usize, const C: usize> {
    work: &'a mut Work<'b>,
    first: usize,
    panels: Range<usize>,
    /// The pages whose values are laid out in `lines`.
    laid: &'a Range<usize>,
    lines: &'a [F32],
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
        let &mut Self { ref mut work, first, laid, lines, .. } = self;
        let pages = work.pages(first..first + R);
        // Queries that see nothing here begin at its end.
        let (from, pairs) = (pages.start.min(laid.end) - laid.start, pages.len() * PAGE / 2);
        let mut rows = [&[][..]; R];
        for r in 0..R {
            rows[r] = &work.scores[(first + r) * work.len + pages.start * (PAGE / 2)..][..pairs];
        }
        let mut panels = [&lines[..0]; N];
        for c in 0..N {
            panels[c] = &lines[((panel + c) * laid.len() + from) * (PAGE / 2)..][..pairs];
        }
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        Pairs::add(isa, rows, panels, &mut sums);
        work.keep(isa, first, panel, &sums);
    }
}
