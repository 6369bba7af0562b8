//! Products by vectors: rows in strips times panels of any type, inputs ascending or in AMX's order.

use super::{
    CpuOps, ahead,
    isa::{Isa, Level, Task},
    line::{BLOCK, F32, Factor, LANES},
    scratch::local,
    target::{Bands, Place, Target},
    tile::{Fetch, Next, ROWS, Soon, Sums, Tiles, alternate, is_wide, multiply, tiled},
};
use std::ops::Range;

/// Inputs of [`Bands::most`] rows that stay in the second-level cache while all panels pass by: 640 kB where vectors are wide and this
/// cache has 1 MB or more, 240 kB elsewhere.
const DEPTH: usize = 640;

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
        for from in (0..inputs).step_by(depth) {
            let depth = from..inputs.min(from + depth);
            for panel in panels.clone().step_by(group) {
                let group = panel..panels.end.min(panel + group);
                // SAFETY: the rows and outputs are those of this block.
                unsafe {
                    if few || L::IS_PLAIN {
                        let lines = &self.lines[panel * stride + from / L::INPUTS..group.end * stride];
                        self.strips(lines, stride, band.clone(), group, depth.clone(), place);
                    } else {
                        // Widened once for all strips.
                        local(group.len() * depth.len(), |wide| {
                            for (panel, wide) in group.clone().zip(wide.chunks_exact_mut(depth.len())) {
                                let lines = &self.lines[panel * stride..][from / L::INPUTS..];
                                level.run(Widen { lines, wide });
                            }
                            self.strips(wide, depth.len(), band.clone(), group, depth.clone(), place);
                        });
                    }
                }
            }
        }
    }

    /// Adds the products of `inputs` to the outputs of `panels`, whose lines for them begin at multiples of `stride`, for the rows `band`.
    ///
    /// # Safety
    /// As of [`Self::block`].
    unsafe fn strips<M: Factor>(
        &self,
        lines: &[M],
        stride: usize,
        band: Range<usize>,
        panels: Range<usize>,
        inputs: Range<usize>,
        place: &Place<'_>,
    ) {
        let (few, whole) = (band.len() <= ROWS, band.len() / ROWS * ROWS);
        for rows in [band.start..band.start + whole, band.start + whole..band.end] {
            if rows.is_empty() {
                continue;
            }
            let (count, panels, inputs) = (rows.len().min(ROWS), panels.clone(), inputs.clone());
            let sweep = Sweep::<M, AMX> { x: self.x, width: self.inputs, place, lines, stride, rows, panels, inputs };
            match few {
                true if self.level.is_one_stream() => tiled!(self.level, count, sweep.stream(self.level)),
                _ => tiled!(self.level, count, sweep.run(self.level, few)),
            }
        }
    }
}

/// Adds the products of `inputs` to the outputs of `panels` for some rows: strips of [`ROWS`], or a last one of fewer. No other thread
/// accesses these outputs meanwhile.
struct Sweep<'a, L, const AMX: bool> {
    /// Of all rows.
    x: &'a [f32],
    /// All inputs of a row.
    width: usize,
    place: &'a Place<'a>,
    lines: &'a [L],
    stride: usize,
    rows: Range<usize>,
    panels: Range<usize>,
    inputs: Range<usize>,
}

impl<L: Factor, const AMX: bool> Sweep<'_, L, AMX> {
    fn run<const R: usize, const C: usize>(&self, level: Level, is_read_once: bool) {
        // Lines that are read once: where they come in one stream or block by block, or vectors are wide, the processor does not look far
        // enough ahead.
        match is_read_once && (C == 1 || AMX || level.is_wide()) {
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
            false => self.run::<R, C>(level, true),
        }
    }

    fn columns<const R: usize, const C: usize, const AHEAD: u8>(&self, level: Level) {
        match L::DOTS {
            true => level.dots(Columns::<L, R, C, AHEAD, AMX>(self, 0)),
            false => level.run(Columns::<L, R, C, AHEAD, AMX>(self, 0)),
        }
    }
}

/// Which lines a tile asks for: none, those that come soon after, those of the next tile.
const NEVER: u8 = 0;
const SOON: u8 = 1;
const NEXT: u8 = 2;

/// Strips of `R` rows, `C` panels at a time, and the first row of the one at hand.
struct Columns<'a, L, const R: usize, const C: usize, const AHEAD: u8, const AMX: bool>(&'a Sweep<'a, L, AMX>, usize);

impl<L: Factor, const R: usize, const C: usize, const AHEAD: u8, const AMX: bool> Task for Columns<'_, L, R, C, AHEAD, AMX> {
    type Out = ();
    const NARROW: bool = !is_wide(R, C) && AHEAD != NEXT;
    // Two panels that ask ahead are also those of `Sweep::stream`.
    const WIDE: bool = is_wide(R, C) || AHEAD != NEVER && C == 2;

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for row in self.0.rows.clone().step_by(R) {
            self.1 = row;
            self.walk::<I, C>(isa, self.0.panels.clone());
        }
    }
}

impl<L: Factor, const R: usize, const C: usize, const AHEAD: u8, const AMX: bool> Tiles for Columns<'_, L, R, C, AHEAD, AMX> {
    #[inline(always)]
    fn tile<I: Isa, const N: usize>(&mut self, isa: I, panel: usize) {
        let Self(&Sweep { x, width, place, lines, stride, ref panels, ref inputs, .. }, row) = *self;
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
