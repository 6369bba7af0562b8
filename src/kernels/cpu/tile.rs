//! The product that everything is made of: rows times panels, inputs ascending.
//!
//! A panel is 16 outputs: one [`Line`] for each input. Every output is accumulated alone, inputs ascending, with one fused
//! multiply-add each, starting from its own sum. So its bits depend neither on the shape of the tile nor on where a long
//! product is cut.

use super::{
    isa::{Isa, Task},
    line::{LANES, Line},
};

/// The sums of `R` rows with `C` panels.
pub(super) type Sums<const R: usize, const C: usize> = [[[f32; LANES]; C]; R];

/// Adds to `sums` the products of rows with panels. The inputs of `rows` lie in one piece, those of the panels in `steps`.
pub(super) struct Tile<'a, L, const R: usize, const C: usize> {
    pub rows: [&'a [f32]; R],
    pub steps: &'a [[&'a [L]; C]],
    pub sums: Sums<R, C>,
}

impl<L: Line, const R: usize, const C: usize> Task for Tile<'_, L, R, C> {
    type Out = Sums<R, C>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Sums<R, C> {
        // Loops, not closures: those would be compiled for the baseline where they are not inlined.
        let mut sums = [[isa.load(&self.sums[0][0]); C]; R];
        for (sums, from) in sums.iter_mut().zip(&self.sums) {
            for (sum, from) in sums.iter_mut().zip(from) {
                *sum = isa.load(from);
            }
        }
        let mut at = 0;
        for panels in self.steps {
            let inputs = panels[0].len();
            // All of one length, so that no access below is checked.
            let (mut panels, mut rows) = (*panels, self.rows);
            for panel in &mut panels {
                *panel = &panel[..inputs];
            }
            for row in &mut rows {
                *row = &row[at..at + inputs];
            }
            for i in 0..inputs {
                let mut lines = [panels[0][i].widen(isa); C];
                for c in 1..C {
                    lines[c] = panels[c][i].widen(isa);
                }
                for r in 0..R {
                    for c in 0..C {
                        sums[r][c] = isa.mul_add(lines[c], rows[r][i], sums[r][c]);
                    }
                }
            }
            at += inputs;
        }
        let mut out = self.sums;
        for (sums, to) in sums.iter().zip(&mut out) {
            for (sum, to) in sums.iter().zip(to) {
                isa.store(*sum, to);
            }
        }
        out
    }
}

/// The largest number of rows of a tile.
pub(super) const ROWS: usize = 6;

/// Calls a function generic over `<const R: usize, const C: usize>` with the tile that suits `rows` in 1..=[`ROWS`].
///
/// 16 registers of 8 lanes hold 12 sums, 2 halves of a line and an input; fewer rows take more panels, so that at least 8
/// sums are in flight (2 multiply-adds a cycle, 4 cycles each). 32 registers of 16 lanes hold 24 sums and 4 lines.
macro_rules! tiled {
    ($level:expr, $rows:expr, $self:ident.$f:ident($($argument:expr),* $(,)?)) => {
        match ($level.is_wide(), $rows) {
            (false, 1) => $self.$f::<1, 4>($($argument),*),
            (false, 2) => $self.$f::<2, 2>($($argument),*),
            (false, 3) => $self.$f::<3, 1>($($argument),*),
            (false, 4) => $self.$f::<4, 1>($($argument),*),
            (false, 5) => $self.$f::<5, 1>($($argument),*),
            (false, _) => $self.$f::<6, 1>($($argument),*),
            (true, 1) => $self.$f::<1, 8>($($argument),*),
            (true, 2) => $self.$f::<2, 4>($($argument),*),
            (true, 3) => $self.$f::<3, 4>($($argument),*),
            (true, 4) => $self.$f::<4, 4>($($argument),*),
            (true, 5) => $self.$f::<5, 4>($($argument),*),
            (true, _) => $self.$f::<6, 4>($($argument),*),
        }
    };
}
pub(super) use tiled;
