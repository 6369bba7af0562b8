//! The product that everything is made of: rows times panels.
//!
//! Every output is accumulated alone, inputs ascending or in AMX's order, by fused multiply-adds, starting from its own sum. So its bits
//! depend neither on the shape of the tile nor on where a long product is cut (in AMX's order: after a whole block of 32 inputs).

use super::{
    isa::Isa,
    line::{BLOCK, Factor, LANES},
};
use std::{hint::black_box, ops::Range};

/// Sums of `R` rows with `C` panels, in registers.
pub(super) type Sums<I, const R: usize, const C: usize> = [[<I as Isa>::Lanes; C]; R];

/// The inputs of `R` rows.
pub(super) trait Rows<const R: usize>: Copy {
    /// Those of the first so many inputs, two by two.
    type Pairs: Copy;

    /// How many there are of each row.
    fn inputs(self) -> usize;
    /// The first `2 * count`.
    fn pairs(self, count: usize) -> Self::Pairs;
    /// Input `2 * i + input` of row `r`.
    fn get(pairs: &Self::Pairs, i: usize, input: usize, r: usize) -> f32;
    /// The last input of row `r`.
    fn last(self, r: usize) -> f32;
}

/// Rows of one length, wherever they are.
impl<const R: usize> Rows<R> for [&[f32]; R] {
    type Pairs = Self;

    #[inline(always)]
    fn inputs(self) -> usize {
        self[0].len()
    }

    #[inline(always)]
    fn pairs(mut self, count: usize) -> Self {
        for row in &mut self {
            *row = &row[..2 * count];
        }
        self
    }

    #[inline(always)]
    fn get(pairs: &Self, i: usize, input: usize, r: usize) -> f32 {
        pairs[r][2 * i + input]
    }

    #[inline(always)]
    fn last(self, r: usize) -> f32 {
        self[r][self[0].len() - 1]
    }
}

/// Rows of a strip: their values of an input lie together, so that a tile reads them in one stream.
impl<const R: usize> Rows<R> for &[[f32; R]] {
    type Pairs = Self;

    #[inline(always)]
    fn inputs(self) -> usize {
        self.len()
    }

    #[inline(always)]
    fn pairs(self, count: usize) -> Self {
        &self[..2 * count]
    }

    #[inline(always)]
    fn get(pairs: &Self, i: usize, input: usize, r: usize) -> f32 {
        pairs[2 * i + input][r]
    }

    #[inline(always)]
    fn last(self, r: usize) -> f32 {
        self[self.len() - 1][r]
    }
}

/// What a tile asks the memory for before it is needed.
pub(super) trait Fetch: Copy {
    /// Asks for as much as the lines `i` of all panels are.
    fn fetch<I: Isa, P, const C: usize>(self, isa: I, panels: &[&[P]; C], i: usize);
}

/// Nothing.
impl Fetch for () {
    #[inline(always)]
    fn fetch<I: Isa, P, const C: usize>(self, _: I, _: &[&[P]; C], _: usize) {}
}

/// What comes 2 kB after each of them. After the end of a panel, that is what the next tile has of it, so many bytes later.
#[derive(Clone, Copy)]
pub(super) struct Soon(pub usize);

impl Fetch for Soon {
    #[inline(always)]
    fn fetch<I: Isa, P, const C: usize>(self, isa: I, panels: &[&[P]; C], i: usize) {
        const BYTES: usize = 2048;
        let over = if i + BYTES / size_of::<P>() < panels[0].len() { 0 } else { self.0 };
        for panel in panels {
            lines(isa, (&raw const panel[i]).cast::<u8>().wrapping_add(BYTES + over), size_of::<P>());
        }
    }
}

/// What lies here, in one stream.
#[derive(Clone, Copy)]
pub(super) struct Next(pub *const u8);

impl Fetch for Next {
    #[inline(always)]
    fn fetch<I: Isa, P, const C: usize>(self, isa: I, _: &[&[P]; C], i: usize) {
        let bytes = C * size_of::<P>();
        lines(isa, self.0.wrapping_add(i * bytes), bytes);
    }
}

/// What lies at the same place in some panels, so many bytes apart.
#[derive(Clone, Copy)]
pub(super) struct Beside {
    pub from: *const u8,
    pub panel: usize,
    pub count: usize,
    /// Bytes of two inputs.
    pub pair: usize,
}

impl Fetch for Option<Beside> {
    #[inline(always)]
    fn fetch<I: Isa, P, const C: usize>(self, isa: I, _: &[&[P]; C], i: usize) {
        if let Some(Beside { from, panel, count, pair }) = self {
            for n in 0..count {
                lines(isa, from.wrapping_add(n * panel + i * pair), pair);
            }
        }
    }
}

#[inline(always)]
fn lines<I: Isa>(isa: I, from: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        isa.prefetch(from.wrapping_add(line));
    }
}

/// Rows, and panels of as many inputs, two inputs at a time.
struct Twos<'a, L: Factor, X: Rows<R>, const R: usize, const C: usize> {
    rows: X,
    values: X::Pairs,
    lines: [&'a [L::Pair]; C],
    /// What an odd number of inputs leaves.
    rest: [&'a [L]; C],
    count: usize,
}

impl<'a, L: Factor, X: Rows<R>, const R: usize, const C: usize> Twos<'a, L, X, R, C> {
    #[inline(always)]
    fn new(rows: X, panels: [&'a [L]; C]) -> Self {
        // Loops, not closures: those would be compiled for the baseline where they are not inlined.
        let (inputs, count) = (rows.inputs(), rows.inputs() / 2);
        let (first, last) = L::pairs(panels[0], inputs);
        let (mut lines, mut rest) = ([first; C], [last; C]);
        for c in 1..C {
            (lines[c], rest[c]) = L::pairs(panels[c], inputs);
        }
        // All of one length, so that no access below is checked.
        for lines in &mut lines {
            *lines = &lines[..count];
        }
        Self { rows, values: rows.pairs(count), lines, rest, count }
    }

    /// Adds the products of one input of pair `i`.
    #[inline(always)]
    fn add<I: Isa>(&self, isa: I, i: usize, input: usize, sums: &mut Sums<I, R, C>) {
        let mut lines = [L::widen(&self.lines[0][i], input, isa); C];
        for c in 1..C {
            lines[c] = L::widen(&self.lines[c][i], input, isa);
        }
        for r in 0..R {
            for c in 0..C {
                sums[r][c] = L::add(isa, lines[c], X::get(&self.values, i, input, r), sums[r][c]);
            }
        }
    }

    /// Adds the products of the first inputs of some pairs of a block, and of the input without another if the block is not full.
    #[inline(always)]
    fn add_even<I: Isa>(&self, isa: I, pairs: Range<usize>, fetch: impl Fetch, sums: &mut Sums<I, R, C>) {
        let is_full = pairs.len() == BLOCK / 2;
        for i in pairs {
            fetch.fetch(isa, &self.lines, i);
            self.add(isa, i, 0, sums);
        }
        if !is_full {
            self.add_rest(isa, sums);
        }
    }

    /// Adds the products of the second inputs of some pairs.
    #[inline(always)]
    fn add_odd<I: Isa>(&self, isa: I, pairs: Range<usize>, sums: &mut Sums<I, R, C>) {
        for i in pairs {
            self.add(isa, i, 1, sums);
        }
    }

    /// Adds the products of an input without another.
    #[inline(always)]
    fn add_rest<I: Isa>(&self, isa: I, sums: &mut Sums<I, R, C>) {
        if self.rows.inputs() > 2 * self.count {
            for c in 0..C {
                if let Some(line) = self.rest[c].first() {
                    let line = line.first(isa);
                    for r in 0..R {
                        sums[r][c] = L::add(isa, line, self.rows.last(r), sums[r][c]);
                    }
                }
            }
        }
    }
}

/// Adds to `sums` the products of rows with panels, all of as many inputs as the rows have.
#[inline(always)]
pub(super) fn multiply<I: Isa, L: Factor, const R: usize, const C: usize, X: Rows<R>>(
    isa: I,
    rows: X,
    panels: [&[L]; C],
    fetch: impl Fetch,
    sums: &mut Sums<I, R, C>,
) {
    let twos = Twos::new(rows, panels);
    for i in 0..twos.count {
        fetch.fetch(isa, &twos.lines, i);
        twos.add(isa, i, 0, sums);
        twos.add(isa, i, 1, sums);
    }
    twos.add_rest(isa, sums);
}

/// As [`multiply`], in the order of AMX's instruction for products of bf16 (TDPBF16PS in Intel's manual): of 32 inputs the even ones and
/// the odd ones are summed apart, each from zero, and then both together are added.
#[inline(always)]
pub(super) fn alternate<I: Isa, L: Factor, const R: usize, const C: usize, X: Rows<R>>(
    isa: I,
    rows: X,
    panels: [&[L]; C],
    fetch: impl Fetch,
    sums: &mut Sums<I, R, C>,
) {
    let twos = Twos::new(rows, panels);
    for from in (0..rows.inputs().div_ceil(2)).step_by(BLOCK / 2) {
        let end = twos.count.min(from + BLOCK / 2);
        let (mut even, mut odd) = ([[isa.load(&[0.0; LANES]); C]; R], [[isa.load(&[0.0; LANES]); C]; R]);
        twos.add_even(isa, from..end, fetch, &mut even);
        // To memory, where the compiler would otherwise keep what the next loop has registers for.
        let even = black_box(even);
        black_box(&mut *sums);
        twos.add_odd(isa, from..end, &mut odd);
        both(isa, even, odd, sums);
    }
}

/// Adds the products of the even inputs, of less than a block of them, to the first sums and those of the odd ones to the others, which
/// [`both`] joins.
#[inline(always)]
pub(super) fn apart<I: Isa, L: Factor, const R: usize, const C: usize, X: Rows<R>>(
    isa: I,
    rows: X,
    panels: [&[L]; C],
    [even, odd]: [&mut Sums<I, R, C>; 2],
) {
    let twos = Twos::new(rows, panels);
    debug_assert!(twos.count < BLOCK / 2);
    twos.add_even(isa, 0..twos.count, (), even);
    twos.add_odd(isa, 0..twos.count, odd);
}

/// Adds the sums over even and over odd inputs.
#[inline(always)]
pub(super) fn both<I: Isa, const R: usize, const C: usize>(isa: I, even: Sums<I, R, C>, odd: Sums<I, R, C>, sums: &mut Sums<I, R, C>) {
    for r in 0..R {
        for c in 0..C {
            sums[r][c] = isa.mul_add(isa.mul_add(even[r][c], 1.0, odd[r][c]), 1.0, sums[r][c]);
        }
    }
}

/// Tiles side by side over a row of panels.
pub(super) trait Tiles {
    /// Computes the tile of `N` panels from `panel` on. Must be `#[inline(always)]`.
    fn tile<I: Isa, const N: usize>(&mut self, isa: I, panel: usize);

    /// Computes all of `panels`: `C` at a time, up to eight; of what is left half as many, and so on.
    #[inline(always)]
    fn walk<I: Isa, const C: usize>(&mut self, isa: I, panels: Range<usize>) {
        let Range { start: mut panel, end } = panels;
        while panel + C <= end {
            self.tile::<I, C>(isa, panel);
            panel += C;
        }
        if C > 4 && panel + 4 <= end {
            self.tile::<I, 4>(isa, panel);
            panel += 4;
        }
        if C > 2 && panel + 2 <= end {
            self.tile::<I, 2>(isa, panel);
            panel += 2;
        }
        if C > 1 && panel < end {
            self.tile::<I, 1>(isa, panel);
        }
    }
}

/// The largest number of rows of a tile.
pub(super) const ROWS: usize = 6;

/// Whether a tile of so many rows and panels is for 32 registers of 16 lanes: one of those below.
pub(super) const fn is_wide(rows: usize, panels: usize) -> bool {
    panels == 8 || panels == 4 && rows > 1
}

/// Calls a function generic over `<const R: usize, const C: usize>` with the tile that suits `rows` in 1..=[`ROWS`]: so many rows and
/// panels.
///
/// 16 registers of 8 lanes hold 12 sums, 2 halves of a line and an input; fewer rows take more panels, so that at least 8
/// sums are in flight (2 multiply-adds a cycle, 4 cycles each). 32 registers of 16 lanes hold 24 sums and 4 lines.
macro_rules! tiled {
    ($level:expr, $rows:expr, $self:ident.$f:ident($($argument:expr),* $(,)?)) => {
        match ($level.is_wide(), $rows) {
            (false, 1) => $self.$f::<1, 4>($($argument),*),
            (false, 2) => $self.$f::<2, 2>($($argument),*),
            (false, 3) => $self.$f::<3, 2>($($argument),*),
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
