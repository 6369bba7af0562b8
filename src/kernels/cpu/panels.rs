//! Weights in panels of 16 outputs, in the type of the file, and their products.

use super::{
    isa::Level,
    line::{Bf16, F16, F32, LANES, Line},
    threads,
    tile::{ROWS, Tile, tiled},
};
use crate::{error::Result, kernels::Matrix};
use candle_core::{DType, Error};
use rayon::prelude::*;
use std::{array::from_fn, marker::PhantomData, ops::Range};

/// A weight `(outputs, inputs)`: panel `p` holds outputs `16 p ..`, one line for each input; the last one is filled up with zeros.
#[derive(Debug)]
pub(crate) struct Weight {
    panels: Panels,
    bias: Option<Vec<f32>>,
    outputs: usize,
    inputs: usize,
}

#[derive(Debug)]
enum Panels {
    F32(Vec<F32>),
    Bf16(Vec<Bf16>),
    F16(Vec<F16>),
}

impl Weight {
    /// Packs `parts`, stacked along their outputs, in their type; in f32 if they differ.
    pub(super) fn pack(parts: &[Matrix<'_>], bias: Option<&[f32]>) -> Result<Self> {
        let Some(first) = parts.first() else { return Err(Error::Msg("a weight needs at least one matrix".into()).into()) };
        let (inputs, dtype) = (first.inputs, first.dtype);
        for part in parts {
            check(part, inputs)?;
        }
        let Some(outputs) = parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.outputs)) else {
            return Err(Error::Msg("the outputs of a weight overflow".into()).into());
        };
        if bias.is_some_and(|bias| bias.len() != outputs) {
            return Err(Error::Msg(format!("a bias of {} values does not fit {outputs} outputs", bias.map_or(0, <[f32]>::len))).into());
        }
        let same = parts.iter().all(|part| part.dtype == dtype);
        let panels = match dtype {
            DType::BF16 if same => Panels::Bf16(lines(parts, outputs, inputs)?),
            DType::F16 if same => Panels::F16(lines(parts, outputs, inputs)?),
            _ => Panels::F32(lines(parts, outputs, inputs)?),
        };
        Ok(Self { panels, bias: bias.map(<[f32]>::to_vec), outputs, inputs })
    }

    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(super) fn bytes(&self) -> u64 {
        let panels = match &self.panels {
            Panels::F32(lines) => size_of_val(lines.as_slice()),
            Panels::Bf16(lines) => size_of_val(lines.as_slice()),
            Panels::F16(lines) => size_of_val(lines.as_slice()),
        };
        (panels + self.bias.as_ref().map_or(0, |bias| size_of_val(bias.as_slice()))) as u64
    }

    /// Row `ids[i]` for each token, `(ids.len(), inputs)`.
    pub(super) fn rows(&self, ids: &[u32]) -> Vec<f32> {
        match &self.panels {
            Panels::F32(lines) => self.gather(lines, ids),
            Panels::Bf16(lines) => self.gather(lines, ids),
            Panels::F16(lines) => self.gather(lines, ids),
        }
    }

    /// `x * weight^T + bias`, `(rows, outputs)`, of `x` `(rows, inputs)`.
    pub(super) fn product(&self, level: Level, x: &[f32]) -> Vec<f32> {
        match &self.panels {
            Panels::F32(lines) => self.multiply(level, lines, x),
            Panels::Bf16(lines) => self.multiply(level, lines, x),
            Panels::F16(lines) => self.multiply(level, lines, x),
        }
    }

    fn gather<L: Line>(&self, lines: &[L], ids: &[u32]) -> Vec<f32> {
        let mut rows = vec![0.0; ids.len() * self.inputs];
        // A value costs a cache line, about what 16 multiply-adds cost.
        threads::chunks(&mut rows, self.inputs, self.inputs * LANES, |i, row| {
            let id = ids[i] as usize;
            debug_assert!(id < self.outputs);
            let panel = &lines[id / LANES * self.inputs..][..self.inputs];
            for (value, line) in row.iter_mut().zip(panel) {
                *value = line.get(id % LANES);
            }
        });
        rows
    }

    fn multiply<L: Line>(&self, level: Level, lines: &[L], x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        let mut y = vec![0.0; rows * self.outputs];
        let panels = self.outputs.div_ceil(LANES);
        let bands = rows.div_ceil(BAND);
        // Several pieces a thread where there is much to do: threads are not equally fast.
        let wanted = match threads::worth(lines.len() * LANES * rows) {
            1 => 1,
            parts if rows > ROWS => parts * 4,
            parts => parts,
        };
        let chunks = wanted.div_ceil(bands.max(1)).min(panels.max(1));
        let product = Product { weight: self, level, lines, x, y: Shared::new(&mut y, self.outputs) };
        let piece = |i: usize| {
            let (band, chunk) = (i / chunks, i % chunks);
            let band = band * BAND..rows.min((band + 1) * BAND);
            // SAFETY: bands and parts of the panels do not overlap, so no two pieces write the same values.
            unsafe { product.block(band, threads::part(panels, 4, chunks, chunk)) };
        };
        if wanted > 1 {
            (0..bands * chunks).into_par_iter().for_each(piece)
        } else {
            (0..bands * chunks).for_each(piece)
        }
        y
    }
}

/// Rows, then inputs, that stay in the second-level cache (96 * 640 values, 240 kB) while all panels pass by.
const BAND: usize = 96;
const DEPTH: usize = 640;

struct Product<'a, L> {
    weight: &'a Weight,
    level: Level,
    lines: &'a [L],
    x: &'a [f32],
    y: Shared<'a>,
}

impl<L: Line> Product<'_, L> {
    /// The outputs of `panels` for the rows `band`.
    ///
    /// # Safety
    /// No other thread accesses these outputs of these rows meanwhile.
    unsafe fn block(&self, band: Range<usize>, panels: Range<usize>) {
        // Few rows: the panels stream by once, as many side by side as the tile has. Many: a panel or four stay in the
        // first-level cache for all rows of the band.
        let few = band.len() <= ROWS;
        let (depth, group) = match few {
            true => (self.weight.inputs, panels.len()),
            false => (self.weight.inputs.div_ceil(self.weight.inputs.div_ceil(DEPTH)), if self.level.is_wide() { 4 } else { 1 }),
        };
        for inputs in (0..self.weight.inputs).step_by(depth.max(1)) {
            let inputs = inputs..self.weight.inputs.min(inputs + depth);
            for panel in panels.clone().step_by(group.max(1)) {
                let group = panel..panels.end.min(panel + group);
                for row in band.clone().step_by(ROWS) {
                    // SAFETY: as of this function; rows and panels are inside its ranges.
                    unsafe { tiled!(self.level, band.end - row, self.strip(row, group.clone(), inputs.clone())) };
                }
            }
        }
        if let Some(bias) = &self.weight.bias {
            let outputs = panels.start * LANES..self.weight.outputs.min(panels.end * LANES);
            for row in band {
                // SAFETY: as of this function.
                let y = unsafe { self.y.slice(row, outputs.clone()) };
                y.iter_mut().zip(&bias[outputs.clone()]).for_each(|(y, bias)| *y += bias);
            }
        }
    }

    /// Adds the products of `inputs` to the outputs of `panels` for `R` rows.
    ///
    /// # Safety
    /// As of [`Self::block`].
    unsafe fn strip<const R: usize, const C: usize>(&self, row: usize, panels: Range<usize>, inputs: Range<usize>) {
        let mut panel = panels.start;
        while panel + C <= panels.end {
            // SAFETY: as of this function.
            unsafe { self.tile::<R, C>(row, panel, inputs.clone()) };
            panel += C;
        }
        for panel in panel..panels.end {
            // SAFETY: as of this function.
            unsafe { self.tile::<R, 1>(row, panel, inputs.clone()) };
        }
    }

    /// # Safety
    /// As of [`Self::block`].
    unsafe fn tile<const R: usize, const C: usize>(&self, row: usize, panel: usize, inputs: Range<usize>) {
        let width = self.weight.inputs;
        let outputs: [_; C] = from_fn(|c| (panel + c) * LANES..self.weight.outputs.min((panel + c + 1) * LANES));
        let mut sums = [[[0.0; LANES]; C]; R];
        if inputs.start > 0 {
            for (r, c) in (0..R).flat_map(|r| (0..C).map(move |c| (r, c))) {
                // SAFETY: as of this function.
                let y = unsafe { self.y.slice(row + r, outputs[c].clone()) };
                sums[r][c][..y.len()].copy_from_slice(y);
            }
        }
        let rows = from_fn(|r| &self.x[(row + r) * width..][inputs.clone()]);
        let panels = from_fn(|c| &self.lines[(panel + c) * width..][inputs.clone()]);
        let sums = self.level.run(Tile { rows, steps: &[panels], sums });
        for (r, c) in (0..R).flat_map(|r| (0..C).map(move |c| (r, c))) {
            // SAFETY: as of this function.
            let y = unsafe { self.y.slice(row + r, outputs[c].clone()) };
            y.copy_from_slice(&sums[r][c][..y.len()]);
        }
    }
}

/// A matrix that several threads write in different places.
struct Shared<'a> {
    data: *mut f32,
    len: usize,
    width: usize,
    of: PhantomData<&'a mut [f32]>,
}

// SAFETY: all access goes through `slice`, whose callers answer for its exclusiveness.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(data: &'a mut [f32], width: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), width, of: PhantomData }
    }

    /// # Safety
    /// No other slice with a value of these `columns` of this `row` is alive.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        let start = row * self.width + columns.start;
        assert!(columns.start <= columns.end && columns.end <= self.width && start + columns.len() <= self.len);
        // SAFETY: inside the matrix, as just checked; exclusive, as the caller says.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), columns.len()) }
    }
}

fn check(part: &Matrix<'_>, inputs: usize) -> Result<()> {
    let size = match part.dtype {
        DType::F32 => 4,
        DType::BF16 | DType::F16 => 2,
        other => return Err(crate::Error::Unsupported(format!("a weight of type {}: f32, bf16 and f16 are known", other.as_str()))),
    };
    let bytes = part.outputs.checked_mul(part.inputs).and_then(|values| values.checked_mul(size));
    if part.inputs != inputs || part.inputs == 0 || bytes != Some(part.bytes.len()) {
        let (have, outputs) = (part.bytes.len(), part.outputs);
        return Err(Error::Msg(format!("a weight of {have} bytes as {outputs} x {} beside one with {inputs} inputs", part.inputs)).into());
    }
    Ok(())
}

/// Packs stacked `parts`, each thread its own panels.
fn lines<L: Line>(parts: &[Matrix<'_>], outputs: usize, inputs: usize) -> Result<Vec<L>> {
    let count = outputs.div_ceil(LANES) * inputs;
    let mut lines = Vec::new();
    if lines.try_reserve_exact(count).is_err() {
        return Err(Error::Msg(format!("no memory for a weight of {outputs} x {inputs}")).into());
    }
    // (part, its row) of each output.
    let sources: Vec<_> = parts.iter().flat_map(|part| (0..part.outputs).map(move |row| (part, row))).collect();
    lines.spare_capacity_mut()[..count].par_chunks_mut(inputs).zip(sources.par_chunks(LANES)).for_each(|(panel, sources)| {
        for (i, panel) in panel.chunks_mut(256).enumerate() {
            panel.fill(std::mem::MaybeUninit::new(L::ZERO));
            // SAFETY: every line has just been written.
            let panel = unsafe { &mut *(std::ptr::from_mut(panel) as *mut [L]) };
            for (lane, &(part, row)) in sources.iter().enumerate() {
                let size = part.dtype.size_in_bytes();
                let (start, stride) = if part.transposed { (row, part.outputs) } else { (row * inputs, 1) };
                L::fill(panel, lane, part.dtype, part.bytes, (start + i * 256 * stride) * size, stride * size);
            }
        }
    });
    // SAFETY: `count` lines are reserved, and the panels that tile them are written.
    unsafe { lines.set_len(count) };
    Ok(lines)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{isa::tests::vectorised, noise};
    use super::*;
    use half::{bf16, f16};

    const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

    /// Values that each type holds exactly, and their bytes, unaligned.
    struct Source {
        values: Vec<f32>,
        bytes: Vec<u8>,
        dtype: DType,
        outputs: usize,
        inputs: usize,
    }

    impl Source {
        fn new(dtype: DType, outputs: usize, inputs: usize) -> Self {
            let values: Vec<f32> = noise(outputs * inputs, 7).iter().map(|&x| f16::from_f32(bf16::from_f32(x).to_f32()).to_f32()).collect();
            let bytes = |value: &f32| match dtype {
                DType::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
                DType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            };
            let bytes = std::iter::once(0).chain(values.iter().flat_map(bytes)).collect();
            Self { values, bytes, dtype, outputs, inputs }
        }

        fn matrix(&self) -> Matrix<'_> {
            Matrix { bytes: &self.bytes[1..], dtype: self.dtype, outputs: self.outputs, inputs: self.inputs, transposed: false }
        }

        fn weight(&self) -> Weight {
            Weight::pack(&[self.matrix()], None).unwrap()
        }
    }

    #[test]
    fn products_are_right_and_their_bits_fixed() {
        for dtype in DTYPES {
            // The last two reach beyond what is computed at once: 640 inputs, 96 rows.
            let shapes = [(1, 1, 7), (63, 31, 7), (64, 576, 3), (65, 1, 7), (130, 31, 7), (130, 576, 1), (17, 1300, 7), (33, 31, 100)];
            for (outputs, inputs, most) in shapes {
                let source = Source::new(dtype, outputs, inputs);
                let weight = source.weight();
                for rows in (1..=most.min(7)).chain([most]) {
                    let x = noise(rows * inputs, 11);
                    let y = weight.product(Level::PORTABLE, &x);
                    for (i, &y) in y.iter().enumerate() {
                        let (x, w) = (&x[i / outputs * inputs..][..inputs], &source.values[i % outputs * inputs..][..inputs]);
                        let exact: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                        assert!(
                            (f64::from(y) - exact).abs() < 1e-5 * (inputs as f64).sqrt(),
                            "{dtype:?} {outputs} x {inputs}: {y} for {exact}"
                        );
                        let fixed = x.iter().zip(w).fold(0.0, |sum: f32, (&x, &w)| w.mul_add(x, sum));
                        assert!(y == fixed, "{dtype:?} {outputs} x {inputs}, {rows} rows: not inputs ascending");
                    }
                    for level in vectorised() {
                        assert!(weight.product(level, &x) == y, "{level:?} {dtype:?} {outputs} x {inputs}, {rows} rows");
                    }
                }
            }
        }
    }

    #[test]
    fn threads_and_company_change_no_bit() {
        let weight = Source::new(DType::BF16, 100, 700).weight();
        let x = noise(101 * 700, 3);
        let all = weight.product(Level::best(), &x);
        for row in [0, 5, 95, 96, 100] {
            assert_eq!(weight.product(Level::best(), &x[row * 700..][..700]), all[row * 100..][..100]);
        }
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let five = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
        for pool in [one, five] {
            assert!(pool.install(|| weight.product(Level::best(), &x)) == all);
            assert_eq!(pool.install(|| weight.product(Level::best(), &x[..700])), all[..100]);
        }
    }

    #[test]
    fn parts_are_stacked_and_the_bias_is_added_last() {
        let parts = [Source::new(DType::F16, 20, 40), Source::new(DType::F16, 5, 40), Source::new(DType::F16, 30, 40)];
        let mixed = [Source::new(DType::F16, 20, 40), Source::new(DType::F32, 5, 40), Source::new(DType::BF16, 30, 40)];
        let bias = noise(55, 1);
        let x = noise(80, 2);
        for parts in [parts, mixed] {
            let apart: Vec<_> = parts.iter().map(|part| part.weight().product(Level::best(), &x)).collect();
            let matrices = parts.each_ref().map(Source::matrix);
            let stacked = Weight::pack(&matrices, Some(&bias)).unwrap();
            let y = stacked.product(Level::best(), &x);
            for row in 0..2 {
                let expected = apart.iter().zip(&parts).flat_map(|(y, part)| &y[row * part.outputs..][..part.outputs]);
                let expected: Vec<f32> = expected.zip(&bias).map(|(y, bias)| y + bias).collect();
                assert_eq!(y[row * 55..][..55], expected);
            }
        }
    }

    #[test]
    fn a_transposed_file_gives_the_same_weight() {
        let source = Source::new(DType::F32, 37, 300);
        let mut bytes = vec![0];
        for (input, output) in (0..300).flat_map(|input| (0..37).map(move |output| (input, output))) {
            bytes.extend(source.values[output * 300 + input].to_le_bytes());
        }
        let transposed = Matrix { bytes: &bytes[1..], transposed: true, ..source.matrix() };
        let x = noise(300, 4);
        let weight = Weight::pack(&[transposed], None).unwrap();
        assert_eq!(weight.product(Level::best(), &x), source.weight().product(Level::best(), &x));
    }

    #[test]
    fn rows_come_out_as_they_went_in() {
        for dtype in DTYPES {
            let source = Source::new(dtype, 50, 33);
            let rows = source.weight().rows(&[49, 0, 17, 17]);
            let expected: Vec<f32> = [49, 0, 17, 17].iter().flat_map(|i| &source.values[i * 33..][..33]).copied().collect();
            assert_eq!(rows, expected);
        }
    }

    #[test]
    fn the_type_of_the_file_is_kept() {
        // 50 outputs take 4 panels of 16.
        assert_eq!(DTYPES.map(|dtype| Source::new(dtype, 50, 33).weight().bytes()), [64 * 33 * 4, 64 * 33 * 2, 64 * 33 * 2]);
        let source = Source::new(DType::BF16, 50, 33);
        assert_eq!(Weight::pack(&[source.matrix()], Some(&[0.0; 50])).unwrap().bytes(), 64 * 33 * 2 + 50 * 4);
    }

    #[test]
    fn lying_matrices_are_refused() {
        let source = Source::new(DType::F32, 4, 6);
        let refuse = |matrix, bias| Weight::pack(&[source.matrix(), matrix], bias).unwrap_err().to_string();
        let short = Matrix { bytes: &source.bytes[2..], ..source.matrix() };
        assert_eq!(refuse(short, None), "tensor: a weight of 95 bytes as 4 x 6 beside one with 6 inputs");
        let narrow = Matrix { inputs: 3, outputs: 8, ..source.matrix() };
        assert_eq!(refuse(narrow, None), "tensor: a weight of 96 bytes as 8 x 3 beside one with 6 inputs");
        let huge = Matrix { outputs: usize::MAX, ..source.matrix() };
        assert!(refuse(huge, None).starts_with("tensor: a weight of 96 bytes"));
        assert_eq!(refuse(source.matrix(), Some(&[0.0; 4])), "tensor: a bias of 4 values does not fit 8 outputs");
        let bytes = Matrix { dtype: DType::U8, ..source.matrix() };
        assert_eq!(refuse(bytes, None), "unsupported: a weight of type u8: f32, bf16 and f16 are known");
    }
}
