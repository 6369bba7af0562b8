//! Weights in panels of 16 outputs, in the type of the file, and their products.

use super::{
    CpuOps,
    ahead::Stream,
    arena::{HUGE, Lines},
    brains,
    inputs::{Form, Inputs},
    line::{Bf16, F16, F32, LANES, Line},
    product::Product,
    target::{Target, Then},
    threads::Team,
};
use crate::{error::Result, kernels::Matrix};
use candle_core::{DType, Error};
use std::sync::Arc;

/// A weight `(outputs, inputs)`: panel `p` holds outputs `16 p ..`, lines of them with the inputs ascending; the last one is filled up
/// with zeros.
#[derive(Debug)]
pub(crate) struct Weight {
    panels: Panels,
    bias: Option<Vec<f32>>,
    outputs: usize,
    inputs: usize,
    /// What is read after it.
    next: Arc<Stream>,
}

#[derive(Debug)]
enum Panels {
    F32(Lines<F32>),
    Bf16(Lines<Bf16>),
    F16(Lines<F16>),
}

/// Bytes of a file that are packed before they are let go.
const SLAB: usize = 8 << 20;

impl Weight {
    /// Packs `parts`, stacked along their outputs, in their own type, or in f32 if they differ; for arithmetic in half precision in its
    /// type. Tells `done` which bytes are not needed any more.
    pub(super) fn pack(ops: &CpuOps, parts: &[Matrix<'_>], bias: Option<&[f32]>, done: &dyn Fn(&[u8])) -> Result<Self> {
        let sources = sources(parts, bias)?.into_iter().map(Some).collect();
        Self::new(ops, parts, sources, bias.map(<[f32]>::to_vec), done)
    }

    /// As [`Self::pack`], with a panel of the first half of the outputs, the gates, before each panel of the other half. Both are filled
    /// up with zeros.
    pub(super) fn pack_gated(ops: &CpuOps, parts: &[Matrix<'_>], bias: Option<&[f32]>, done: &dyn Fn(&[u8])) -> Result<Self> {
        let sources = sources(parts, bias)?;
        if !sources.len().is_multiple_of(2) {
            return Err(Error::Msg(format!("{} outputs are not as many gates as there are others", sources.len())).into());
        }
        let half = sources.len() / 2;
        let panel = |first: usize| (first..first + LANES).map(move |output| (output < half).then_some(output));
        let both = |first| panel(first).chain(panel(first).map(move |output| output.map(|output| half + output)));
        let order: Vec<_> = (0..half).step_by(LANES).flat_map(both).collect();
        let bias = bias.map(|bias| order.iter().map(|output| output.map_or(0.0, |output| bias[output])).collect());
        Self::new(ops, parts, order.into_iter().map(|output| output.map(|output| sources[output])).collect(), bias, done)
    }

    fn new(
        ops: &CpuOps,
        parts: &[Matrix<'_>],
        sources: Vec<Option<Source<'_>>>,
        bias: Option<Vec<f32>>,
        done: &dyn Fn(&[u8]),
    ) -> Result<Self> {
        let (outputs, inputs) = (sources.len(), parts[0].inputs);
        let same = parts.iter().all(|part| part.dtype == parts[0].dtype);
        let panels = match if same { parts[0].dtype } else { DType::F32 } {
            _ if ops.dtype == DType::BF16 => Panels::Bf16(lines(ops, &sources, inputs, brains::flush, done)?),
            // HF: the reference rounds the result of each operation to f16. Here weights are, and everything else is f32.
            _ if ops.dtype == DType::F16 => Panels::F16(lines(ops, &sources, inputs, |_| (), done)?),
            DType::BF16 => Panels::Bf16(lines(ops, &sources, inputs, |_| (), done)?),
            DType::F16 => Panels::F16(lines(ops, &sources, inputs, |_| (), done)?),
            _ => Panels::F32(lines(ops, &sources, inputs, |_| (), done)?),
        };
        Ok(Self { panels, bias, outputs, inputs, next: Arc::default() })
    }

    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(super) fn bytes(&self) -> u64 {
        let panels = match &self.panels {
            Panels::F32(lines) => size_of_val(&**lines),
            Panels::Bf16(lines) => size_of_val(&**lines),
            Panels::F16(lines) => size_of_val(&**lines),
        };
        (panels + self.bias.as_ref().map_or(0, |bias| size_of_val(bias.as_slice()))) as u64
    }

    /// Row `ids[i]` for each token, to `(ids.len(), inputs)`.
    pub(super) fn rows(&self, team: &Team, ids: &[u32], rows: &mut [f32]) {
        match &self.panels {
            Panels::F32(lines) => self.gather(team, lines, ids, rows),
            Panels::Bf16(lines) => self.gather(team, lines, ids, rows),
            Panels::F16(lines) => self.gather(team, lines, ids, rows),
        }
    }

    /// The form that so many rows of inputs are to have.
    pub(super) fn form(&self, ops: &CpuOps, rows: usize) -> Form {
        match self.panels {
            Panels::Bf16(_) if ops.dtype == DType::BF16 => brains::form(ops.level, rows),
            _ => Form::Strips,
        }
    }

    /// `x * weight^T + bias`, of `(rows, inputs)`.
    pub(super) fn product(&self, ops: &CpuOps, x: &Inputs<'_>, then: Then<'_>) {
        let target = Target::new(x.rows(), self.outputs, self.bias.as_deref(), &self.next, then);
        match &self.panels {
            Panels::F32(lines) => self.multiply(ops, lines, x, &target),
            Panels::Bf16(lines) if ops.dtype == DType::BF16 => brains::multiply(ops, self.inputs, lines, x, &target),
            Panels::Bf16(lines) => self.multiply(ops, lines, x, &target),
            Panels::F16(lines) => self.multiply(ops, lines, x, &target),
        }
    }

    fn gather<L: Line>(&self, team: &Team, lines: &[L], ids: &[u32], rows: &mut [f32]) {
        // A value costs a cache line, about what 16 multiply-adds cost.
        team.chunks(rows, self.inputs, self.inputs * LANES, |i, row| {
            let id = ids[i] as usize;
            debug_assert!(id < self.outputs);
            let panel = &lines[id / LANES * L::count(self.inputs)..][..L::count(self.inputs)];
            for (input, value) in row.iter_mut().enumerate() {
                *value = L::get(panel, id % LANES, input);
            }
        });
    }

    fn multiply<L: Line>(&self, ops: &CpuOps, lines: &[L], x: &Inputs<'_>, target: &Target<'_>) {
        Product::<_, false> { level: ops.level, lines, stride: L::count(self.inputs), inputs: self.inputs, x: x.wide() }.fill(ops, target);
    }
}

/// Where an output comes from: a row of a matrix.
type Source<'a> = (&'a Matrix<'a>, usize);

/// The sources of all outputs of `parts`, one part after another.
fn sources<'a>(parts: &'a [Matrix<'a>], bias: Option<&[f32]>) -> Result<Vec<Source<'a>>> {
    let Some(first) = parts.first() else { return Err(Error::Msg("a weight needs at least one matrix".into()).into()) };
    for part in parts {
        check(part, first.inputs)?;
    }
    let Some(outputs) = parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.outputs)) else {
        return Err(Error::Msg("the outputs of a weight overflow".into()).into());
    };
    if bias.is_some_and(|bias| bias.len() != outputs) {
        return Err(Error::Msg(format!("a bias of {} values does not fit {outputs} outputs", bias.map_or(0, <[f32]>::len))).into());
    }
    Ok(parts.iter().flat_map(|part| (0..part.outputs).map(move |row| (part, row))).collect())
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

/// Packs the rows of `sources`, each thread its own panels, which `finish` has last.
fn lines<L: Line>(
    ops: &CpuOps,
    sources: &[Option<Source<'_>>],
    inputs: usize,
    finish: fn(&mut [L]),
    done: &dyn Fn(&[u8]),
) -> Result<Lines<L>> {
    let (size, panels, team) = (L::count(inputs), sources.len().div_ceil(LANES), &ops.team);
    let no_memory = || Error::Msg(format!("no memory for a weight of {} x {inputs}", sources.len()));
    let mut lines = panels.checked_mul(size).and_then(|count| ops.weights.lines::<L>(count).ok()).ok_or_else(no_memory)?;
    // Slab by slab, so that a file and its weight are never both in memory.
    let slab = (SLAB / inputs.saturating_mul(LANES * 4)).max(team.threads());
    for (lines, sources) in lines.chunks_mut(slab.saturating_mul(size)).zip(sources.chunks(slab * LANES)) {
        team.hold(|| {
            // Each huge page by one thread first: several would all clear one, for one of them to be taken.
            team.chunks(lines, HUGE / size_of::<L>(), HUGE, |_, page| page[..1].fill(L::ZERO));
            team.chunks(lines, size, inputs * LANES * 4, |i, panel| {
                fill(panel, &sources[i * LANES..], inputs);
                finish(panel);
            });
        });
        let mut rows: Vec<_> = sources.iter().flatten().map(|&(part, row)| (part.bytes.as_ptr().addr(), row, part)).collect();
        rows.sort_unstable_by_key(|&(part, row, _)| (part, row));
        for run in rows.chunk_by(|(one, row, _), (other, next, _)| (one, row + 1) == (other, *next)) {
            let ((_, row, part), width) = (run[0], inputs * run[0].2.dtype.size_in_bytes());
            match part.transposed {
                false => done(&part.bytes[row * width..(row + run.len()) * width]),
                true if row + run.len() == part.outputs => done(part.bytes),
                true => {}
            }
        }
    }
    Ok(lines)
}

/// Writes every value of a panel of zeros, of the first outputs of `sources`.
fn fill<L: Line>(panel: &mut [L], sources: &[Option<Source<'_>>], inputs: usize) {
    /// Inputs at a time, so that their lines stay in the first-level cache.
    const STEP: usize = 256;
    for first in (0..inputs).step_by(STEP) {
        let (panel, count) = (&mut panel[first / L::INPUTS..], STEP.min(inputs - first));
        for (lane, source) in sources.iter().take(LANES).enumerate() {
            let &Some((part, row)) = source else { continue };
            let size = part.dtype.size_in_bytes();
            let (start, stride) = if part.transposed { (row, part.outputs) } else { (row * inputs, 1) };
            L::fill(panel, lane, count, part.dtype, part.bytes, (start + first * stride) * size, stride * size);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{
        super::{
            isa::{Level, tests::vectorised},
            noise, ops,
            peaks::BLOCK,
            threads::Shares,
        },
        *,
    };
    use half::{bf16, f16};

    const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

    /// Values that each type holds exactly, and their bytes, unaligned.
    struct File {
        values: Vec<f32>,
        bytes: Vec<u8>,
        dtype: DType,
        outputs: usize,
        inputs: usize,
    }

    impl File {
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
            pack(&[self.matrix()], None).unwrap()
        }
    }

    fn pack(parts: &[Matrix<'_>], bias: Option<&[f32]>) -> Result<Weight> {
        Weight::pack(&ops(Level::PORTABLE, 2), parts, bias, &|_| ())
    }

    fn product(weight: &Weight, level: Level, threads: usize, x: &[f32]) -> Vec<f32> {
        let (ops, mut y) = (ops(level, threads), vec![f32::NAN; x.len() / weight.inputs * weight.outputs]);
        apply(weight, &ops, x, Then::Write(Shares::new(&mut y)));
        y
    }

    fn apply(weight: &Weight, ops: &CpuOps, x: &[f32], then: Then<'_>) {
        let form = weight.form(ops, x.len() / weight.inputs);
        ops.team.hold(|| weight.product(ops, &Inputs::of(ops, form, x, weight.inputs, None), then));
    }

    fn best(weight: &Weight, x: &[f32]) -> Vec<f32> {
        product(weight, Level::best(None), 2, x)
    }

    #[test]
    fn products_are_right_and_their_bits_fixed() {
        for dtype in DTYPES {
            let few = [(1, 1, 7), (63, 31, 7), (64, 576, 3), (65, 1, 7), (130, 31, 7), (130, 576, 1)];
            // Beyond what is computed at once: 640 inputs, 96 or 256 rows; some rows, which widen lines themselves, and more.
            let more = [(17, 1300, 7), (97, 700, 20), (17, 1300, 50), (33, 31, 100), (17, 31, 300)];
            for (outputs, inputs, most) in few.into_iter().chain(more) {
                let source = File::new(dtype, outputs, inputs);
                let weight = source.weight();
                for rows in (1..=most.min(7)).chain([most]) {
                    let x = noise(rows * inputs, 11);
                    let y = product(&weight, Level::PORTABLE, 2, &x);
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
                        assert!(product(&weight, level, 2, &x) == y, "{level:?} {dtype:?} {outputs} x {inputs}, {rows} rows");
                    }
                }
            }
        }
    }

    #[test]
    fn threads_and_company_change_no_bit() {
        let weight = File::new(DType::BF16, 100, 700).weight();
        let x = noise(101 * 700, 3);
        let all = best(&weight, &x);
        for row in [0, 5, 95, 96, 100] {
            assert_eq!(best(&weight, &x[row * 700..][..700]), all[row * 100..][..100]);
        }
        for threads in [1, 5] {
            assert!(product(&weight, Level::best(None), threads, &x) == all);
            assert_eq!(product(&weight, Level::best(None), threads, &x[..700]), all[..100]);
        }
    }

    #[test]
    fn a_product_is_added_onto_what_is_there() {
        let weight = File::new(DType::F32, 100, 700).weight();
        let (x, there) = (noise(101 * 700, 3), noise(101 * 100, 4));
        for rows in [1, 4, 101] {
            let (ops, mut onto) = (ops(Level::best(None), 2), there[..rows * 100].to_vec());
            apply(&weight, &ops, &x[..rows * 700], Then::Onto(Shares::new(&mut onto)));
            let expected: Vec<f32> = best(&weight, &x[..rows * 700]).iter().zip(&there).map(|(y, there)| there + y).collect();
            assert!(onto == expected);
        }
    }

    #[test]
    fn a_product_notes_the_peaks_of_its_rows() {
        for (outputs, inputs) in [(1, 3), (64, 3), (130, 31), (1_000, 700)] {
            let bias = noise(outputs, 5);
            let weight = pack(&[File::new(DType::F32, outputs, inputs).matrix()], Some(&bias)).unwrap();
            for (rows, level) in [1, 4, 7, 101].into_iter().flat_map(|rows| Level::all().into_iter().map(move |level| (rows, level))) {
                let (x, ops, mut y) = (noise(rows * inputs, 3), ops(level, 2), vec![f32::NAN; rows * outputs]);
                let mut peaks = vec![f32::NAN; rows * outputs.div_ceil(BLOCK)];
                apply(&weight, &ops, &x, Then::Peaks(Shares::new(&mut y), Shares::new(&mut peaks)));
                assert!(y == product(&weight, level, 2, &x));
                let blocks = y.chunks(outputs).flat_map(|row| row.chunks(BLOCK));
                assert!(
                    blocks.map(|block| block.iter().copied().fold(f32::NEG_INFINITY, f32::max)).eq(peaks),
                    "{outputs} {rows} {level:?}"
                );
            }
        }
    }

    #[test]
    fn bf16_arithmetic_packs_bf16_of_every_file() {
        let (x, bias, there) = (noise(101 * 70, 3), noise(100, 4), noise(101 * 100, 5));
        for dtype in DTYPES {
            let source = File::new(dtype, 100, 70);
            let weight =
                Weight::pack(&CpuOps { dtype: DType::BF16, ..ops(Level::PORTABLE, 2) }, &[source.matrix()], Some(&bias), &|_| ()).unwrap();
            assert_eq!(weight.bytes(), 112 * 96 * 2 + 100 * 4);
            let ops = CpuOps { dtype: DType::BF16, ..ops(Level::best(None), 2) };
            for rows in [1, 4, 101] {
                let mut onto = there[..rows * 100].to_vec();
                apply(&weight, &ops, &x[..rows * 70], Then::Onto(Shares::new(&mut onto)));
                for (i, &onto) in onto.iter().enumerate() {
                    let (x, w) = (&x[i / 100 * 70..][..70], &source.values[i % 100 * 70..][..70]);
                    let sum: f32 = x.iter().zip(w).map(|(&x, &w)| bf16::from_f32(x).to_f32() * w).sum();
                    assert!((onto - (there[i] + bias[i % 100] + sum)).abs() < 1e-4, "{dtype:?}, {rows} rows");
                }
            }
        }
    }

    #[test]
    fn f16_arithmetic_packs_f16_of_every_file() {
        let x = noise(7 * 70, 3);
        for dtype in DTYPES {
            let source = File::new(dtype, 100, 70);
            let weight = Weight::pack(&CpuOps { dtype: DType::F16, ..ops(Level::PORTABLE, 2) }, &[source.matrix()], None, &|_| ()).unwrap();
            assert_eq!(weight.bytes(), 112 * 70 * 2);
            for (i, y) in best(&weight, &x).into_iter().enumerate() {
                let (x, w) = (&x[i / 100 * 70..][..70], &source.values[i % 100 * 70..][..70]);
                let sum = x.iter().zip(w).fold(0.0, |sum: f32, (&x, &w)| f16::from_f32(w).to_f32().mul_add(x, sum));
                assert!(y == sum, "{dtype:?}");
            }
        }
    }

    #[test]
    fn a_file_is_let_go_as_it_is_packed() {
        let (source, seen) = (File::new(DType::BF16, 100, 70_000), std::cell::RefCell::new(Vec::new()));
        let done = |bytes: &[u8]| seen.borrow_mut().push((bytes.as_ptr() as usize, bytes.len()));
        Weight::pack(&ops(Level::PORTABLE, 2), &[source.matrix().rows(0..30), source.matrix().rows(30..100)], None, &done).unwrap();
        let mut at = source.bytes[1..].as_ptr() as usize;
        assert!(seen.borrow().len() > 3, "{seen:?}");
        for &(start, len) in seen.borrow().iter() {
            assert_eq!(start, at);
            at += len;
        }
        assert_eq!(at, source.bytes.as_ptr_range().end as usize);
    }

    #[test]
    fn parts_are_stacked_and_the_bias_is_added_last() {
        let parts = [File::new(DType::F16, 20, 40), File::new(DType::F16, 5, 40), File::new(DType::F16, 30, 40)];
        let mixed = [File::new(DType::F16, 20, 40), File::new(DType::F32, 5, 40), File::new(DType::BF16, 30, 40)];
        let bias = noise(55, 1);
        let x = noise(80, 2);
        for parts in [parts, mixed] {
            let apart: Vec<_> = parts.iter().map(|part| best(&part.weight(), &x)).collect();
            let matrices = parts.each_ref().map(File::matrix);
            let stacked = pack(&matrices, Some(&bias)).unwrap();
            let y = best(&stacked, &x);
            for row in 0..2 {
                let expected = apart.iter().zip(&parts).flat_map(|(y, part)| &y[row * part.outputs..][..part.outputs]);
                let expected: Vec<f32> = expected.zip(&bias).map(|(y, bias)| y + bias).collect();
                assert_eq!(y[row * 55..][..55], expected);
            }
        }
    }

    #[test]
    fn a_transposed_file_gives_the_same_weight() {
        let source = File::new(DType::F32, 37, 300);
        let mut bytes = vec![0];
        for (input, output) in (0..300).flat_map(|input| (0..37).map(move |output| (input, output))) {
            bytes.extend(source.values[output * 300 + input].to_le_bytes());
        }
        let transposed = Matrix { bytes: &bytes[1..], transposed: true, ..source.matrix() };
        let x = noise(300, 4);
        let weight = pack(&[transposed], None).unwrap();
        assert_eq!(best(&weight, &x), best(&source.weight(), &x));
    }

    #[test]
    fn rows_come_out_as_they_went_in() {
        for dtype in DTYPES {
            let source = File::new(dtype, 50, 33);
            let mut rows = vec![f32::NAN; 4 * 33];
            source.weight().rows(&Team::of(2), &[49, 0, 17, 17], &mut rows);
            let expected: Vec<f32> = [49, 0, 17, 17].iter().flat_map(|i| &source.values[i * 33..][..33]).copied().collect();
            assert_eq!(rows, expected);
        }
    }

    #[test]
    fn the_type_of_the_file_is_kept() {
        // 50 outputs take 4 panels of 16; bf16 has inputs up to 64.
        assert_eq!(DTYPES.map(|dtype| File::new(dtype, 50, 33).weight().bytes()), [64 * 33 * 4, 64 * 64 * 2, 64 * 33 * 2]);
        let source = File::new(DType::BF16, 50, 33);
        assert_eq!(pack(&[source.matrix()], Some(&[0.0; 50])).unwrap().bytes(), 64 * 64 * 2 + 50 * 4);
    }

    #[test]
    fn lying_matrices_are_refused() {
        let source = File::new(DType::F32, 4, 6);
        let refuse = |matrix, bias| pack(&[source.matrix(), matrix], bias).unwrap_err().to_string();
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
