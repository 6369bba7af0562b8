//! Where a product goes: its outputs, cut into pieces for the threads, and what is done with them at the end.

use super::{
    isa::{Isa, Level, by_vectors},
    line::LANES,
    peaks::{BLOCK, Highest},
    threads::{Shares, Team, part},
    tile::ROWS,
};
use std::ops::Range;

/// The outputs of a product, `(rows, width)`.
pub(super) struct Target<'a> {
    y: Shares<'a, f32>,
    rows: usize,
    width: usize,
    bias: Option<&'a [f32]>,
    then: Then<Shares<'a, f32>>,
}

/// What is done with outputs and their bias while they are at hand.
pub(super) enum Then<T> {
    Nothing,
    /// They are added to this, and are scratch themselves.
    Onto(T),
    /// The largest of each block of a row is noted, as [`Highest`] does.
    Peaks(T),
}

impl<T> Then<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Then<U> {
        match self {
            Self::Nothing => Then::Nothing,
            Self::Onto(to) => Then::Onto(f(to)),
            Self::Peaks(to) => Then::Peaks(f(to)),
        }
    }
}

/// Pieces of outputs: bands of rows, in each of them chunks of panels.
pub(super) struct Cut {
    pub count: usize,
    /// Rows of a band.
    pub band: usize,
    /// Chunks of a band.
    pub chunks: usize,
    /// Panels that stay together.
    pub step: usize,
}

/// How outputs are to be cut.
pub(super) struct Bands {
    /// Rows that are computed together, at most.
    pub most: usize,
    /// Rows of a tile.
    pub step: usize,
    /// Panels of a tile.
    pub panels: usize,
}

impl Bands {
    /// For products by vectors of many rows.
    pub(super) fn of(level: Level) -> Self {
        Self { most: 96, step: ROWS, panels: if level.is_wide() { 4 } else { 1 } }
    }
}

impl<'a> Target<'a> {
    pub(super) fn new(y: &'a mut [f32], width: usize, bias: Option<&'a [f32]>, then: Then<&'a mut [f32]>) -> Self {
        Self { rows: y.len() / width.max(1), y: Shares::new(y), width, bias, then: then.map(Shares::new) }
    }

    /// Has threads compute all outputs, each the panels of some rows by `f`. A panel is `inputs` inputs in `bytes` bytes of memory.
    ///
    /// # Safety
    /// `f` accesses no other outputs than those that it is given.
    pub(super) unsafe fn fill(
        &self,
        team: &Team,
        inputs: usize,
        bytes: usize,
        bands: Bands,
        f: impl Fn(Range<usize>, Range<usize>) + Sync,
    ) {
        let Cut { count, band, chunks, step } = self.cut(team, inputs, bytes, &bands);
        let (rows, panels) = (self.rows, self.width.div_ceil(LANES));
        team.run(count * chunks, |i| {
            let (at, chunk) = (i / chunks * band, i % chunks);
            let (rows, panels) = (at.min(rows)..rows.min(at + band), part(panels, step, chunks, chunk));
            f(rows.clone(), panels.clone());
            // SAFETY: bands and parts of the panels do not overlap, so nobody else has these outputs.
            unsafe { self.finish(rows, panels) };
        });
    }

    /// How all outputs are cut.
    pub(super) fn cut(&self, team: &Team, inputs: usize, bytes: usize, bands: &Bands) -> Cut {
        let (rows, panels) = (self.rows, self.width.div_ceil(LANES));
        let count = rows.div_ceil(bands.most).max(1);
        let band = rows.div_ceil(count).next_multiple_of(bands.step);
        let wanted = match team.worth(self.width * inputs * rows) {
            1 => 1,
            // Some more pieces than threads, which are not equally fast.
            threads if rows > ROWS => threads * 8,
            // But long ones, as memory is read best in long streams.
            threads => threads * (panels * bytes / (threads * STREAM)).clamp(1, 4),
        };
        // Few rows take panels otherwise, and what is left of them costs little.
        let step = if rows > ROWS { bands.panels } else { 2 };
        let step = if let Then::Peaks(_) = self.then { step.next_multiple_of(BLOCK / LANES) } else { step };
        Cut { count, band, chunks: wanted.div_ceil(count).min(panels.div_ceil(step).max(1)), step }
    }

    /// Adds the bias, then does what is to be done.
    ///
    /// # Safety
    /// No other thread accesses these outputs meanwhile, or what is done with them.
    unsafe fn finish(&self, rows: Range<usize>, panels: Range<usize>) {
        if let (None, Then::Nothing) = (self.bias, &self.then) {
            return;
        }
        let columns = panels.start * LANES..self.width.min(panels.end * LANES);
        for row in rows {
            let place = row * self.width + columns.start..row * self.width + columns.end;
            // SAFETY: as of this function.
            let y = unsafe { self.y.slice(place.clone()) };
            if let Some(bias) = self.bias {
                y.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, bias)| *y += bias);
            }
            match &self.then {
                Then::Nothing => {}
                // SAFETY: as of this function.
                Then::Onto(onto) => unsafe { onto.slice(place) }.iter_mut().zip(y).for_each(|(onto, y)| *onto += *y),
                Then::Peaks(peaks) => {
                    let first = row * self.width.div_ceil(BLOCK) + columns.start / BLOCK;
                    // SAFETY: as of this function: pieces are whole blocks.
                    let peaks = unsafe { peaks.slice(first..first + y.len().div_ceil(BLOCK)) };
                    by_vectors(Highest { values: y, peaks });
                }
            }
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Outputs of a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// # Safety
    /// No other thread accesses the outputs of this panel in this row meanwhile.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn outputs(&self, row: usize, panel: usize) -> &mut [f32] {
        // SAFETY: as of this function.
        unsafe { self.y.slice(row * self.width + panel * LANES..row * self.width + self.width.min((panel + 1) * LANES)) }
    }

    /// Where the outputs of a whole panel begin in the first of some rows; nothing if they are not all inside.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn corner(&self, rows: Range<usize>, panel: usize) -> Option<*mut f32> {
        if rows.is_empty() || (panel + 1) * LANES > self.width {
            return None;
        }
        self.y.pointer(rows.start * self.width + panel * LANES..(rows.end - 1) * self.width + (panel + 1) * LANES)
    }

    /// # Safety
    /// As of [`Self::outputs`].
    #[inline(always)]
    pub(super) unsafe fn load<I: Isa>(&self, isa: I, row: usize, panel: usize) -> I::Lanes {
        // SAFETY: as of this function.
        let y = unsafe { self.outputs(row, panel) };
        if let Ok(y) = <&[f32; LANES]>::try_from(&*y) {
            return isa.load(y);
        }
        let mut lanes = [0.0; LANES];
        lanes[..y.len()].copy_from_slice(y);
        isa.load(&lanes)
    }

    /// # Safety
    /// As of [`Self::outputs`].
    #[inline(always)]
    pub(super) unsafe fn store<I: Isa>(&self, isa: I, sums: I::Lanes, row: usize, panel: usize) {
        // SAFETY: as of this function.
        let y = unsafe { self.outputs(row, panel) };
        if let Ok(y) = <&mut [f32; LANES]>::try_from(&mut *y) {
            return isa.store(sums, y);
        }
        let mut lanes = [0.0; LANES];
        isa.store(sums, &mut lanes);
        y.copy_from_slice(&lanes[..y.len()]);
    }
}

/// Bytes of a stream of weights that are worth a piece of their own.
const STREAM: usize = 128 << 10;
