//! What products read: rows of inputs, in the form that their kernels take.

use super::{
    CpuOps,
    brains::{Brain, Round},
    isa::{Isa, Level, Task},
    line::{BLOCK, LANES},
    pointwise::Normalise,
    scratch::{Buffer, local, values},
    threads::Shares,
    tile::ROWS,
};
use crate::kernels::Norm;
use std::ops::Range;

/// How the inputs of a product lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Of every [`ROWS`] rows the values of an input lie together, so that a tile reads them in one stream.
    Strips,
    /// The same, rounded to bf16 and held as f32, each row filled up with zeros to whole blocks.
    Rounded,
    /// The same as bf16, two inputs after each other being one value, the bits of both.
    Pairs,
    /// bf16, filled up likewise, row after row.
    Halves,
}

/// Rows of inputs.
pub(super) struct Inputs<'a> {
    values: Values<'a>,
    rows: usize,
}

enum Values<'a> {
    Own(Buffer),
    /// One row needs no other place.
    Row(&'a [f32]),
}

impl<'a> Inputs<'a> {
    /// Rows that `write` writes, all of them.
    pub fn by(ops: &CpuOps, form: Form, rows: usize, width: usize, write: impl FnOnce(Writer<'_>)) -> Self {
        let depth = width.next_multiple_of(BLOCK);
        let mut values = ops.scratch.take(match form {
            Form::Strips => rows * width,
            Form::Rounded => rows * depth,
            Form::Halves | Form::Pairs => rows * depth / 2,
        });
        let to = match form {
            Form::Strips => To::Strips(Strips { to: Shares::new(&mut values), rows, width }),
            Form::Rounded => To::Rounded(Strips { to: Shares::new(&mut values), rows, width: depth }),
            Form::Pairs => To::Pairs(Strips { to: Shares::new(&mut values), rows, width: depth / 2 }),
            Form::Halves => To::Halves(Shares::new(values.halves_mut())),
        };
        write(Writer { to, width });
        Self { values: Values::Own(values), rows }
    }

    /// The rows of `x`, `(rows, width)`, normalised if `norm` says how.
    pub fn of(ops: &CpuOps, form: Form, x: &'a [f32], width: usize, norm: Option<&Norm<Vec<f32>>>) -> Self {
        let rows = x.len() / width;
        if let (Form::Strips, 1, None) = (form, rows, norm) {
            return Self { values: Values::Row(x), rows };
        }
        Self::by(ops, form, rows, width, |writer| {
            // A value costs about as much as a multiply-add of a line to lay it among others, and less to round it.
            ops.team.each(rows.div_ceil(ROWS), ROWS * width * 8, |strip| {
                let rows = strip * ROWS..rows.min((strip + 1) * ROWS);
                let x = &x[rows.start * width..rows.end * width];
                // SAFETY: each strip is written once.
                let put = |x: &[f32]| unsafe { writer.put(ops.level, rows, 0..width, x, width) };
                match norm {
                    Some(norm) => local(x.len().div_ceil(LANES), |own| {
                        let own = &mut values(own)[..x.len()];
                        own.copy_from_slice(x);
                        own.chunks_exact_mut(width).for_each(|x| ops.level.run(Normalise { norm, first: 0, x }));
                        put(own);
                    }),
                    None => put(x),
                }
            });
        })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// As f32: not [`Form::Halves`].
    pub fn wide(&self) -> &[f32] {
        match &self.values {
            Values::Own(values) => values,
            Values::Row(values) => values,
        }
    }

    /// As bf16: [`Form::Halves`].
    pub fn halves(&self) -> &[u16] {
        match &self.values {
            Values::Own(values) => values.halves(),
            Values::Row(_) => &[],
        }
    }
}

/// Writes rows of inputs, from any thread.
pub(super) struct Writer<'a> {
    to: To<'a>,
    width: usize,
}

enum To<'a> {
    Strips(Strips<'a>),
    Rounded(Strips<'a>),
    Pairs(Strips<'a>),
    Halves(Shares<'a, u16>),
}

impl Writer<'_> {
    /// Inputs of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Writes `columns` of `rows`, which are whole strips: the first of `values` and of what follows each `stride` values after another.
    ///
    /// # Safety
    /// No other thread writes these.
    pub unsafe fn put(&self, level: Level, rows: Range<usize>, columns: Range<usize>, values: &[f32], stride: usize) {
        // Who has the last column fills the row up.
        let depth = self.width.next_multiple_of(BLOCK);
        let end = if columns.end == self.width { depth } else { columns.end };
        let count = columns.len();
        let rounded = values.chunks(stride).map(|x| &x[..count]);
        // SAFETY: as of this function.
        unsafe {
            match &self.to {
                To::Strips(to) => to.put(level, rows, columns, values, stride),
                To::Rounded(to) => to.put_rounded::<f32>(level, rows, columns.start..end, rounded),
                To::Pairs(to) => to.put_rounded::<u16>(level, rows, columns.start..end, rounded),
                To::Halves(to) => {
                    rows.zip(rounded).for_each(|(row, x)| round(level, x, to.slice(row * depth + columns.start..row * depth + end)))
                }
            }
        }
    }
}

/// Rows in strips.
struct Strips<'a> {
    to: Shares<'a, f32>,
    rows: usize,
    width: usize,
}

impl Strips<'_> {
    /// As [`Writer::put`].
    ///
    /// # Safety
    /// As there.
    unsafe fn put(&self, level: Level, rows: Range<usize>, columns: Range<usize>, values: &[f32], stride: usize) {
        debug_assert!(rows.start.is_multiple_of(ROWS) && (rows.end.is_multiple_of(ROWS) || rows.end == self.rows));
        for (row, from) in rows.step_by(ROWS).zip(values.chunks(ROWS * stride)) {
            let count = ROWS.min(self.rows - row);
            let place = row * self.width + columns.start * count..row * self.width + columns.end * count;
            // SAFETY: as of this function.
            let to = unsafe { self.to.slice(place) };
            match count {
                1 => level.run(Interleave::<1> { from, stride, to }),
                2 => level.run(Interleave::<2> { from, stride, to }),
                3 => level.run(Interleave::<3> { from, stride, to }),
                4 => level.run(Interleave::<4> { from, stride, to }),
                5 => level.run(Interleave::<5> { from, stride, to }),
                _ => level.run(Interleave::<ROWS> { from, stride, to }),
            }
        }
    }

    /// As [`Self::put`], of inputs that are rounded before, and held as so many of `T`.
    ///
    /// # Safety
    /// As there.
    unsafe fn put_rounded<'a, T: Brain>(&self, level: Level, rows: Range<usize>, inputs: Range<usize>, x: impl Iterator<Item = &'a [f32]>) {
        debug_assert!(inputs.start.is_multiple_of(T::IN_F32));
        let columns = inputs.start / T::IN_F32..inputs.end / T::IN_F32;
        let stride = columns.len();
        local((rows.len() * stride).div_ceil(LANES), |own| {
            let own = values(own);
            T::of(own).chunks_exact_mut(inputs.len()).zip(x).for_each(|(to, x)| round(level, x, to));
            // SAFETY: as of this function.
            unsafe { self.put(level, rows, columns, own, stride) };
        });
    }
}

/// Rounds values, and fills up with zeros.
pub(super) fn round<T: Brain>(level: Level, x: &[f32], to: &mut [T]) {
    let (to, rest) = to.split_at_mut(x.len());
    level.run(Round { x, to });
    rest.fill(T::ZERO);
}

/// Lays `R` rows side by side.
struct Interleave<'a, const R: usize> {
    from: &'a [f32],
    stride: usize,
    to: &'a mut [f32],
}

impl<const R: usize> Task for Interleave<'_, R> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let to = self.to.as_chunks_mut::<R>().0;
        let mut rows = [&self.from[..to.len()]; R];
        for r in 1..R {
            rows[r] = &self.from[r * self.stride..][..to.len()];
        }
        for i in 0..to.len() {
            for r in 0..R {
                to[i][r] = rows[r][i];
            }
        }
    }
}
