//! Where a product goes: its outputs, cut into pieces for the threads, and what is done with them while they are at hand.

use super::{
    CpuOps,
    ahead::Stream,
    inputs::Writer,
    isa::{Isa, Level, Task, by_vectors},
    line::{F32, LANES},
    peaks::{BLOCK, Highest},
    pointwise::Gate,
    scratch::{local, values},
    threads::{Shares, Team, part},
    tile::ROWS,
};
use crate::kernels::Activation;
use std::{ops::Range, sync::Arc};

/// The outputs of a product, `(rows, width)`.
pub(super) struct Target<'a> {
    rows: usize,
    width: usize,
    bias: Option<&'a [f32]>,
    /// What is read after the weight.
    next: &'a Arc<Stream>,
    then: Then<'a>,
}

/// What is done with outputs and their bias.
pub(super) enum Then<'a> {
    /// They are written here.
    Write(Shares<'a, f32>),
    /// They are written to the first, and the largest of each block of a row is noted in the second, as [`Highest`] does.
    Peaks(Shares<'a, f32>, Shares<'a, f32>),
    /// They are added to this.
    Onto(Shares<'a, f32>),
    /// Panels are gates and what they open, by turns: their products are inputs of another product.
    Gate(Activation, Writer<'a>),
}

/// Pieces of outputs: bands of rows, in each of them chunks of panels.
pub(super) struct Cut {
    pub bands: usize,
    /// Chunks of a band.
    pub chunks: usize,
    /// Panels that stay together.
    pub step: usize,
}

/// How outputs are to be cut.
pub(super) struct Bands {
    /// Rows that are computed together, at most.
    pub most: usize,
    /// How few they may become so that there are enough pieces for many threads.
    pub least: usize,
    /// Rows of a tile.
    pub step: usize,
    /// Panels of a tile.
    pub panels: usize,
    /// Panels that are computed together where many rows of them are not written but go on: so many stay in the cache.
    pub group: usize,
}

impl Bands {
    /// For products by vectors of many rows.
    pub(super) fn of(level: Level) -> Self {
        let (most, panels) = if level.is_wide() { (256, 4) } else { (96, 1) };
        Self { most, least: 96, step: ROWS, panels, group: 8 }
    }
}

impl<'a> Target<'a> {
    pub(super) fn new(rows: usize, width: usize, bias: Option<&'a [f32]>, next: &'a Arc<Stream>, then: Then<'a>) -> Self {
        Self { rows, width, bias, next, then }
    }

    /// Has threads compute all outputs, each the panels of some rows by `f`. A panel is so many of `lines`, with so many inputs. Threads
    /// that wait meanwhile read the beginning of the next weight.
    ///
    /// # Safety
    /// `f` accesses no other outputs of its place than those that it is given.
    pub(super) unsafe fn fill<L>(
        &self,
        ops: &CpuOps,
        lines: &[L],
        panel: usize,
        inputs: usize,
        bands: &Bands,
        f: impl Fn(Range<usize>, Range<usize>, &Place<'_>) + Sync,
    ) {
        let bytes = panel * size_of::<L>();
        let cut = self.cut(&ops.team, inputs, bytes, bands);
        if self.rows > ROWS {
            // Many rows take longer than reading.
            ops.team.ahead().set(&Stream::default());
        } else {
            ops.trail.step(self.next, lines, bytes, &cut);
            ops.team.ahead().set(self.next);
        }
        let Cut { bands: count, chunks, step } = cut;
        let panels = self.width.div_ceil(LANES);
        ops.team.run(count * chunks, |i| {
            let (rows, panels) = (part(self.rows, bands.step, count, i / chunks), part(panels, step, chunks, i % chunks));
            let goes_on = ops.team.goes_on(count * chunks, i);
            if let Then::Write(y) | Then::Peaks(y, _) = &self.then {
                f(rows.clone(), panels.clone(), &Place { goes_on, ..Place::of(y, self.width, self.width) });
                // SAFETY: bands and parts of the panels do not overlap, so nobody else has these outputs.
                return unsafe { self.finish(rows, panels) };
            }
            let group = if rows.len() > ROWS { bands.group } else { panels.len().max(1) };
            for panel in panels.clone().step_by(group) {
                let goes_on = goes_on || panel + group < panels.end;
                let panels = panel..panels.end.min(panel + group);
                local(rows.len() * panels.len(), |own| {
                    let (y, width) = (Shares::new(values(own)), panels.len() * LANES);
                    f(rows.clone(), panels.clone(), &Place { y: &y, stride: width, width, row: rows.start, panel, goes_on });
                    // SAFETY: as above.
                    unsafe { self.pass_on(ops.level, rows.clone(), panels, own) };
                });
            }
        });
    }

    /// How all outputs are cut.
    fn cut(&self, team: &Team, inputs: usize, bytes: usize, bands: &Bands) -> Cut {
        let (rows, panels) = (self.rows, self.width.div_ceil(LANES));
        let wanted = match team.worth(self.width * inputs * rows) {
            1 => 1,
            // Some more pieces than threads, which are not equally fast.
            threads if rows > ROWS => threads * 8,
            // But long ones, as memory is read best in long streams.
            threads => threads * (panels * bytes / (threads * STREAM)).clamp(1, 4),
        };
        // Few rows take panels otherwise, and what is left of them costs little.
        let step = if rows > ROWS { bands.panels } else { 2 };
        let step = match self.then {
            Then::Peaks(..) => step.next_multiple_of(BLOCK / LANES),
            Then::Gate(..) => step.next_multiple_of(2),
            _ => step,
        };
        // Narrow outputs have too few panels for many threads, but can have more bands.
        let chunks = panels.div_ceil(step).max(1);
        let count = rows.div_ceil(bands.most).max(wanted.div_ceil(chunks).min(rows / bands.least)).max(1);
        Cut { bands: count, chunks: wanted.div_ceil(count).min(chunks), step }
    }

    /// Adds the bias to outputs that are written, and notes peaks.
    ///
    /// # Safety
    /// No other thread accesses these outputs meanwhile, or their peaks.
    unsafe fn finish(&self, rows: Range<usize>, panels: Range<usize>) {
        let (y, peaks) = match &self.then {
            Then::Write(y) if self.bias.is_some() => (y, None),
            Then::Peaks(y, peaks) => (y, Some(peaks)),
            _ => return,
        };
        let columns = panels.start * LANES..self.width.min(panels.end * LANES);
        for row in rows {
            // SAFETY: as of this function.
            let y = unsafe { y.slice(row * self.width + columns.start..row * self.width + columns.end) };
            if let Some(bias) = self.bias {
                y.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, bias)| *y += bias);
            }
            if let Some(peaks) = peaks {
                let first = row * self.width.div_ceil(BLOCK) + columns.start / BLOCK;
                // SAFETY: as of this function: pieces are whole blocks.
                let peaks = unsafe { peaks.slice(first..first + y.len().div_ceil(BLOCK)) };
                by_vectors(Highest { values: y, peaks });
            }
        }
    }

    /// Takes outputs, whole panels of them, to where they go.
    ///
    /// # Safety
    /// No other thread accesses what these outputs go to.
    unsafe fn pass_on(&self, level: Level, rows: Range<usize>, panels: Range<usize>, own: &mut [F32]) {
        let (own, stride) = (values(own), panels.len() * LANES);
        let columns = panels.start * LANES..self.width.min(panels.end * LANES);
        if let Some(bias) = self.bias {
            let rows = own.chunks_exact_mut(stride);
            rows.for_each(|y| y.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, bias)| *y += bias));
        }
        match &self.then {
            Then::Write(_) | Then::Peaks(..) => {}
            Then::Onto(onto) => {
                for (row, y) in rows.zip(own.chunks_exact(stride)) {
                    // SAFETY: as of this function.
                    let onto = unsafe { onto.slice(row * self.width + columns.start..row * self.width + columns.end) };
                    level.run(Add { y, onto });
                }
            }
            Then::Gate(activation, to) => {
                let first = columns.start / 2;
                own.chunks_exact_mut(stride).for_each(|y| level.run(Gate { activation: *activation, y }));
                // SAFETY: as of this function.
                unsafe { to.put(level, rows, first..to.width().min(first + stride / 2), own, stride) };
            }
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }
}

struct Add<'a> {
    y: &'a [f32],
    onto: &'a mut [f32],
}

impl Task for Add<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        self.onto.iter_mut().zip(self.y).for_each(|(onto, y)| *onto += y);
    }
}

/// Where a kernel writes its outputs.
pub(super) struct Place<'a> {
    y: &'a Shares<'a, f32>,
    /// From a row to the next.
    stride: usize,
    /// Outputs of a row.
    width: usize,
    /// The first row and panel.
    row: usize,
    panel: usize,
    /// Whether the thread goes on with the panels that follow.
    goes_on: bool,
}

impl<'a> Place<'a> {
    /// `width` outputs of each row, `stride` values from one to the next.
    pub(super) fn of(y: &'a Shares<'a, f32>, stride: usize, width: usize) -> Self {
        Self { y, stride, width, row: 0, panel: 0, goes_on: false }
    }

    /// Panels of outputs.
    pub(super) fn panels(&self) -> usize {
        self.width.div_ceil(LANES)
    }

    /// Whether the thread that computes these panels goes on with those that follow.
    pub(super) fn goes_on(&self) -> bool {
        self.goes_on
    }

    /// From a row to the next, in values.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// The outputs of so many panels in a row; the last one may be cut off.
    ///
    /// # Safety
    /// No other thread accesses them meanwhile.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn outputs(&self, row: usize, panel: usize, count: usize) -> &mut [f32] {
        let (start, first) = ((row - self.row) * self.stride, (panel - self.panel) * LANES);
        // SAFETY: as of this function.
        unsafe { self.y.slice(start + first..start + self.width.min(first + count * LANES)) }
    }

    /// Where the outputs of a whole panel begin in the first of some rows; nothing if they are not all inside.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn corner(&self, rows: Range<usize>, panel: usize) -> Option<*mut f32> {
        let first = (panel - self.panel) * LANES;
        if rows.is_empty() || first + LANES > self.width {
            return None;
        }
        let (start, last) = (rows.start - self.row, rows.end - 1 - self.row);
        self.y.pointer(start * self.stride + first..last * self.stride + first + LANES)
    }

    /// # Safety
    /// As of [`Self::outputs`].
    #[inline(always)]
    pub(super) unsafe fn load<I: Isa, const C: usize>(&self, isa: I, row: usize, panel: usize) -> [I::Lanes; C] {
        // SAFETY: as of this function.
        let y = unsafe { self.outputs(row, panel, C) };
        if let Ok(lines) = <&[[f32; LANES]; C]>::try_from(y.as_chunks::<LANES>().0) {
            return load(isa, lines);
        }
        let mut own = [[0.0; LANES]; C];
        own.as_flattened_mut()[..y.len()].copy_from_slice(y);
        load(isa, &own)
    }

    /// # Safety
    /// As of [`Self::outputs`].
    #[inline(always)]
    pub(super) unsafe fn store<I: Isa, const C: usize>(&self, isa: I, sums: &[I::Lanes; C], row: usize, panel: usize) {
        // SAFETY: as of this function.
        let y = unsafe { self.outputs(row, panel, C) };
        if let Ok(lines) = <&mut [[f32; LANES]; C]>::try_from(&mut *y.as_chunks_mut::<LANES>().0) {
            for c in 0..C {
                isa.store(sums[c], &mut lines[c]);
            }
            return;
        }
        let mut own = [[0.0; LANES]; C];
        for c in 0..C {
            isa.store(sums[c], &mut own[c]);
        }
        y.copy_from_slice(&own.as_flattened()[..y.len()]);
    }
}

#[inline(always)]
fn load<I: Isa, const C: usize>(isa: I, lines: &[[f32; LANES]; C]) -> [I::Lanes; C] {
    let mut lanes = [isa.load(&lines[0]); C];
    for c in 1..C {
        lanes[c] = isa.load(&lines[c]);
    }
    lanes
}

/// Bytes of a stream of weights that are worth a piece of their own.
const STREAM: usize = 128 << 10;

#[cfg(test)]
mod tests {
    use super::{super::ops, *};

    #[test]
    fn bands_become_smaller_for_more_threads() {
        let (bands, next) = (Bands { most: 256, least: 96, step: ROWS, panels: 4, group: 8 }, Arc::default());
        for (threads, rows, width, expected) in [
            (2, 512, 576, (2, 8)),
            (8, 512, 576, (5, 9)),
            (8, 512, 4096, (2, 32)),
            (8, 100, 576, (1, 9)),
            (2, 200, 576, (2, 8)),
            (1, 512, 576, (2, 1)),
            (8, 6, 576, (1, 8)),
        ] {
            let target = Target::new(rows, width, None, &next, Then::Write(Shares::new(&mut [])));
            let cut = target.cut(&ops(Level::PORTABLE, threads).team, 576, 576 * 64, &bands);
            assert_eq!((cut.bands, cut.chunks), expected, "{threads} threads, {rows} rows of {width}");
        }
    }
}
