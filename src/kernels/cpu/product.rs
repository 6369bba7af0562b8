//! Products by vectors: rows in strips times panels of any type, inputs ascending or in AMX's order.

use super::{
    CpuOps, ahead,
    isa::{Isa, Level, Task},
    line::{BLOCK, F32, Factor, LANES},
    scratch::local,
    target::{Bands, Place, Target},
    tile::{Beside, Fetch, Next, ROWS, Soon, Sums, Tiles, alternate, is_wide, multiply, tiled},
};
use std::ops::Range;

/// Inputs of [`Bands::most`] rows that stay in the second-level cache while all panels pass by: 640 kB where vectors are wide and this
/// cache has 1 MB or more, 240 kB elsewhere.
const DEPTH: usize = 640;

/// Rows up to which lines take about as long to read as to multiply.
const SOME: usize = 8 * ROWS;

/// Rows up to which strips each widen the lines that they read, which costs less than to write them down first; without wide vectors.
const SOME_NARROW: usize = 3 * ROWS;

/// A product, in AMX's order ([`alternate`]) if `AMX`: then of whole blocks of inputs.
pub(super) struct Product<'a, L, const AMX: bool> {
    pub level: Level,
    pub lines: &'a [L],
    /// Lines of a panel.
    pub stride: usize,
    pub inputs: usize,
    /// In strips.
    pub x: &'a [f32],
}

impl<L: Factor, const AMX: bool> Product<'_, L, AMX> {
    pub(super) fn fill(&self, ops: &CpuOps, target: &Target<'_>) {
        debug_assert_eq!(self.x.len(), target.rows() * self.inputs);
        // SAFETY: a block accesses the outputs that it is given.
        unsafe {
            let bands = Bands::of(ops.level);
            target.fill(ops, self.lines, self.stride, self.inputs, &bands, |rows, panels, place| self.block(rows, panels, place));
        }
    }

    /// The outputs of `panels` for the rows `band`.
    ///
    /// # Safety
    /// No other thread accesses these outputs of these rows meanwhile.
    unsafe fn block(&self, band: Range<usize>, panels: Range<usize>, place: &Place<'_>) {
        let &Self { level, inputs, stride, .. } = self;
        // Few rows: the panels stream by once, as many side by side as the tile has. Many: a panel or four stay in the cache for all
        // rows of the band.
        let few = band.len() <= ROWS;
        let depth = if few { inputs } else { inputs.div_ceil(inputs.div_ceil(DEPTH)).next_multiple_of(BLOCK) };
        let group = if few { panels.len().max(1) } else { Bands::of(level).panels };
        // Some: what follows is read meanwhile. For one whole strip of lines that are not widened the processor does that itself.
        let least = if L::IS_PLAIN { 2 * ROWS } else { ROWS + 1 };
        let reads_on = (least..=SOME).contains(&band.len());
        let is_direct = L::IS_PLAIN || band.len() <= if level.is_wide() { SOME } else { SOME_NARROW };
        for from in (0..inputs).step_by(depth) {
            let inputs = from..inputs.min(from + depth);
            for panel in panels.clone().step_by(group) {
                let all = panel..panels.end.min(panel + group);
                let next = match () {
                    () if !reads_on => None,
                    () if all.end < panels.end => Some((all.end, from)),
                    () if inputs.end < self.inputs => Some((panels.start, inputs.end)),
                    () => place.goes_on().then_some((panels.end, 0)),
                };
                let group = Group {
                    band: band.clone(),
                    panels: all.clone(),
                    inputs: inputs.clone(),
                    next: next.map(|(panel, input)| self.beside(panel, input, all.len())),
                };
                // SAFETY: the rows and outputs are those of this block.
                unsafe {
                    if is_direct {
                        self.strips(&self.lines[panel * stride + from / L::INPUTS..all.end * stride], stride, &group, place);
                    } else {
                        // Widened once for all strips.
                        local(all.len() * inputs.len(), |wide| {
                            for (panel, wide) in all.zip(wide.chunks_exact_mut(inputs.len())) {
                                let lines = &self.lines[panel * stride..][from / L::INPUTS..];
                                level.run(Widen { lines, wide });
                            }
                            self.strips(wide, inputs.len(), &group, place);
                        });
                    }
                }
            }
        }
    }

    /// Where the lines of so many panels are from an input on.
    fn beside(&self, panel: usize, input: usize, count: usize) -> Beside {
        let from = self.lines.as_ptr().wrapping_add(panel * self.stride + input / L::INPUTS).cast();
        Beside { from, panel: self.stride * size_of::<L>(), count, pair: 2 * size_of::<L>() / L::INPUTS }
    }

    /// Adds the products of `group`, whose panels' lines begin at multiples of `stride`.
    ///
    /// # Safety
    /// As of [`Self::block`].
    unsafe fn strips<M: Factor>(&self, lines: &[M], stride: usize, group: &Group, place: &Place<'_>) {
        let band = &group.band;
        let (few, whole) = (band.len() <= ROWS, band.len() / ROWS * ROWS);
        for rows in [band.start..band.start + whole, band.start + whole..band.end] {
            if rows.is_empty() {
                continue;
            }
            let count = rows.len().min(ROWS);
            let sweep = Sweep::<M, AMX> { x: self.x, width: self.inputs, place, lines, stride, group, rows };
            match few {
                true if self.level.is_one_stream() => tiled!(self.level, count, sweep.stream(self.level)),
                true => tiled!(self.level, count, sweep.run(self.level)),
                false => tiled!(self.level, count, sweep.again(self.level)),
            }
        }
    }
}

/// Panels that are at hand together, and what they are multiplied with.
struct Group {
    /// Rows.
    band: Range<usize>,
    panels: Range<usize>,
    inputs: Range<usize>,
    /// The panels that follow.
    next: Option<Beside>,
}

/// Adds the products of a group to the outputs for some of its rows: strips of [`ROWS`], or a last one of fewer. No other thread accesses
/// these outputs meanwhile.
struct Sweep<'a, L, const AMX: bool> {
    /// Of all rows.
    x: &'a [f32],
    /// All inputs of a row.
    width: usize,
    place: &'a Place<'a>,
    lines: &'a [L],
    stride: usize,
    group: &'a Group,
    rows: Range<usize>,
}

impl<L: Factor, const AMX: bool> Sweep<'_, L, AMX> {
    /// Lines that are read for several strips.
    fn again<const R: usize, const C: usize>(&self, level: Level) {
        match self.group.next {
            Some(_) => self.columns::<R, C, BESIDE>(level),
            None => self.columns::<R, C, NEVER>(level),
        }
    }

    /// What the strip of rows from `row` on asks for: as large a part of the panels that follow as it is of the band.
    #[inline(always)]
    fn part<const R: usize>(&self, row: usize) -> Option<Beside> {
        let (next, band) = (self.group.next?, &self.group.band);
        let before = |row| next.count * (row - band.start) / band.len();
        let (first, count) = (before(row), before(row + R) - before(row));
        (count > 0).then(|| Beside { from: next.from.wrapping_add(first * next.panel), count, ..next })
    }

    /// Lines that are read once.
    fn run<const R: usize, const C: usize>(&self, level: Level) {
        // Where they come in one stream or block by block, or vectors are wide, the processor does not look far enough ahead.
        match C == 1 || AMX || level.is_wide() {
            true => self.columns::<R, C, SOON>(level),
            false => self.columns::<R, C, NEVER>(level),
        }
    }

    /// The same where memory is read best in one stream: as few panels at a time as keep wide vectors busy, and those that follow are asked
    /// for in the order in which they lie, if that many fit into the cache.
    fn stream<const R: usize, const C: usize>(&self, level: Level) {
        // Of several rows twice the first-level cache: past that four panels side by side are faster.
        let most = if R == 1 { ahead::MOST } else { 96 << 10 };
        match 2 * self.stride * size_of::<L>() <= most {
            true => self.columns::<R, 2, NEXT>(level),
            false if R == 1 => self.columns::<R, 2, SOON>(level),
            false => self.run::<R, C>(level),
        }
    }

    fn columns<const R: usize, const C: usize, const AHEAD: u8>(&self, level: Level) {
        match L::DOTS {
            true => level.dots(Columns::<L, R, C, AHEAD, AMX>(self, 0)),
            false => level.run(Columns::<L, R, C, AHEAD, AMX>(self, 0)),
        }
    }
}

/// Which lines a tile asks for: none, those that come soon after, those of the next tile, a strip's part of the panels that follow.
const NEVER: u8 = 0;
const SOON: u8 = 1;
const NEXT: u8 = 2;
const BESIDE: u8 = 3;

/// Strips of `R` rows, `C` panels at a time, and the first row of the one at hand.
struct Columns<'a, L, const R: usize, const C: usize, const AHEAD: u8, const AMX: bool>(&'a Sweep<'a, L, AMX>, usize);

impl<L: Factor, const R: usize, const C: usize, const AHEAD: u8, const AMX: bool> Task for Columns<'_, L, R, C, AHEAD, AMX> {
    type Out = ();
    const NARROW: bool = !is_wide(R, C) && AHEAD != NEXT;
    // Two panels that ask ahead are also those of `Sweep::stream`.
    const WIDE: bool = is_wide(R, C) || (AHEAD == SOON || AHEAD == NEXT) && C == 2;

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for row in self.0.rows.clone().step_by(R) {
            self.1 = row;
            self.walk::<I, C>(isa, self.0.group.panels.clone());
        }
    }
}

impl<L: Factor, const R: usize, const C: usize, const AHEAD: u8, const AMX: bool> Tiles for Columns<'_, L, R, C, AHEAD, AMX> {
    #[inline(always)]
    fn tile<I: Isa, const N: usize>(&mut self, isa: I, panel: usize) {
        let Self(&Sweep { x, width, place, lines, stride, group: Group { panels, inputs, .. }, .. }, row) = *self;
        let (first, is_last) = (panel - panels.start, panel + N == panels.end);
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        let rows = &x[row * width..][..R * width].as_chunks::<R>().0[inputs.clone()];
        let mut panels = [&lines[..0]; N];
        for c in 0..N {
            panels[c] = &lines[(first + c) * stride..];
        }
        if inputs.start > 0 {
            for r in 0..R {
                // SAFETY: the rows and outputs are those of this strip.
                sums[r] = unsafe { place.load(isa, row + r, panel) };
            }
        }
        match AHEAD {
            NEXT => {
                // At the end of what the thread reads, this tile itself.
                let next = panels[0].as_ptr().wrapping_add(if is_last && !place.goes_on() { 0 } else { N * stride });
                add::<I, L, R, N, AMX>(isa, rows, panels, Next(next.cast()), &mut sums);
            }
            BESIDE => add::<I, L, R, N, AMX>(isa, rows, panels, self.0.part::<R>(row), &mut sums),
            SOON => add::<I, L, R, N, AMX>(isa, rows, panels, Soon((N - 1) * stride * size_of::<L>()), &mut sums),
            _ => add::<I, L, R, N, AMX>(isa, rows, panels, (), &mut sums),
        }
        for r in 0..R {
            // SAFETY: as above.
            unsafe { place.store(isa, &sums[r], row + r, panel) };
        }
    }
}

/// Adds products in the order that is asked for.
#[inline(always)]
fn add<I: Isa, L: Factor, const R: usize, const C: usize, const AMX: bool>(
    isa: I,
    rows: &[[f32; R]],
    panels: [&[L]; C],
    fetch: impl Fetch,
    sums: &mut Sums<I, R, C>,
) {
    match AMX {
        true => alternate(isa, rows, panels, fetch, sums),
        false => multiply(isa, rows, panels, fetch, sums),
    }
}

/// Lines of a panel as f32.
struct Widen<'a, L> {
    lines: &'a [L],
    wide: &'a mut [F32],
}

impl<L: Factor> Task for Widen<'_, L> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (pairs, rest) = L::pairs(self.lines, self.wide.len());
        let (twos, last) = self.wide.as_chunks_mut::<2>();
        for (two, pair) in twos.iter_mut().zip(pairs) {
            isa.store(L::widen(pair, 0, isa), &mut two[0].0);
            isa.store(L::widen(pair, 1, isa), &mut two[1].0);
        }
        for (last, line) in last.iter_mut().zip(rest) {
            isa.store(line.first(isa), &mut last.0);
        }
    }
}
