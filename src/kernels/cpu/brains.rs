//! Products in bf16 arithmetic: weights and rounded inputs of bf16, sums of f32.
//!
//! Sums go in the order of AMX's instruction for it (TDPBF16PS in Intel's manual): of 32 inputs the even ones and the odd ones are summed
//! apart, each from zero by fused multiply-adds, inputs ascending; then both together are added to the output. Vectors do the same,
//! so that a row's bits do not depend on how many rows there are, which decides what multiplies. AVX-512 BF16, for processors that have
//! this but no AMX, sums pair after pair, for all numbers of rows.

use super::{
    CpuOps,
    inputs::{Form, Inputs},
    isa::{Isa, Level, Task},
    line::{BLOCK, Bf16, Dots},
    product::Product,
    scratch::halves,
    target::{Place, Target},
};
#[cfg(target_arch = "x86_64")]
use super::{amx::Amx, isa::Instructions};
use half::bf16;

/// `x * weight^T` to `target`, of the lines of a weight's panels.
pub(super) fn multiply(ops: &CpuOps, inputs: usize, lines: &[Bf16], x: &Inputs<'_>, target: &Target<'_>) {
    Unit::of(ops.level, x.rows()).multiply(ops, inputs, lines, x, target);
}

/// The form of so many rows of inputs.
pub(super) fn form(level: Level, rows: usize) -> Form {
    Unit::of(level, rows).form()
}

/// Takes very small weights for zeros, as is done with inputs.
pub(super) fn flush(panel: &mut [Bf16]) {
    panel.iter_mut().flat_map(|line| &mut line.0).for_each(|bits| *bits = flushed(*bits));
}

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Unit {
    /// Fused multiply-adds in AMX's order.
    Vectors,
    /// Products of pairs, by AVX-512 BF16.
    Pairs,
    #[cfg(target_arch = "x86_64")]
    Tiles(Amx),
}

/// Rows from which on tiles are faster than vectors, which read weights in longer streams.
#[cfg(target_arch = "x86_64")]
const MANY: usize = 4;

impl Unit {
    #[cfg(target_arch = "x86_64")]
    pub(super) fn of(level: Level, rows: usize) -> Self {
        match level.instructions() {
            Instructions::Avx512Bf16 => Self::Pairs,
            Instructions::Amx if rows >= MANY => Amx::detect().map_or(Self::Vectors, Self::Tiles),
            _ => Self::Vectors,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn of(_: Level, _: usize) -> Self {
        Self::Vectors
    }

    fn form(self) -> Form {
        match self {
            Self::Vectors => Form::Rounded,
            Self::Pairs => Form::Pairs,
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(_) => Form::Halves,
        }
    }

    /// Whether these are tiles.
    pub(super) fn is_tiles(self) -> bool {
        !matches!(self, Self::Vectors | Self::Pairs)
    }

    /// The products of rows by tiles, `shape` being their number and inputs, with all panels of `place`, by one thread.
    ///
    /// # Safety
    /// No other thread accesses these outputs meanwhile.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(super) unsafe fn alone<'a>(
        self,
        level: Level,
        shape: (usize, usize),
        x: impl Fn(usize) -> &'a [f32],
        lines: &[Bf16],
        place: &Place<'_>,
    ) {
        #[cfg(target_arch = "x86_64")]
        if let Self::Tiles(amx) = self {
            // SAFETY: as of this function.
            unsafe { amx.alone(level, shape, x, lines, place) };
        }
    }

    fn multiply(self, ops: &CpuOps, inputs: usize, lines: &[Bf16], x: &Inputs<'_>, target: &Target<'_>) {
        let depth = inputs.next_multiple_of(BLOCK);
        match self {
            Self::Vectors => {
                Product::<_, true> { level: ops.level, lines, stride: depth / 2, inputs: depth, x: x.wide() }.fill(ops, target);
            }
            Self::Pairs => {
                let (lines, pairs) = (Dots::of(lines), depth / 2);
                Product::<_, false> { level: ops.level, lines, stride: pairs, inputs: pairs, x: x.wide() }.fill(ops, target);
            }
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(amx) => {
                let x = x.halves();
                // SAFETY: a block's outputs are those that it is given.
                unsafe {
                    target.fill(ops, lines, depth / 2, inputs, &amx.bands(), |rows, panels, place| {
                        amx.product(&super::amx::Block { x, lines, depth, place, rows, panels });
                    });
                }
            }
        }
    }
}

/// Rounds values to bf16, where they are.
pub(super) struct RoundHere<'a>(pub &'a mut [f32]);

impl Task for RoundHere<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        self.0.iter_mut().for_each(|x| *x = f32::new(rounded(*x)));
    }
}

/// Rounds values to bf16.
pub(super) struct Round<'a, T> {
    pub x: &'a [f32],
    pub to: &'a mut [T],
}

impl<T: Brain> Task for Round<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        for (to, x) in self.to.iter_mut().zip(self.x) {
            *to = T::new(rounded(*x));
        }
    }
}

/// The bits of the nearest bf16, of the even one of two; what is no number stays none.
// HF: the reference rounds the result of each operation to bf16, and reads weights as they are. Here inputs of products are rounded,
// and everything else is f32, which is nearer to exact results.
#[inline(always)]
pub(super) fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = if x.is_nan() { bits | 0x40_0000 } else { bits + 0x7fff + (bits >> 16 & 1) };
    flushed((nearest >> 16) as u16)
}

/// Zero for what is less than 2^-56. Then products are multiples of 2^-126, and so is every sum: none is denormal, for which units take
/// zero and vectors do not.
#[inline(always)]
fn flushed(bits: u16) -> u16 {
    const LEAST: u16 = (127 - 56) << 7;
    if bits & 0x7fff < LEAST { 0 } else { bits }
}

/// A rounded input, as a kernel takes it.
pub(super) trait Brain: Copy + Send + Sync {
    const ZERO: Self;
    /// How many of them take the place of an f32.
    const IN_F32: usize;
    /// Memory that holds them.
    fn of(memory: &mut [f32]) -> &mut [Self];
    /// Of a bf16's bits.
    fn new(bits: u16) -> Self;
}

/// Widened.
impl Brain for f32 {
    const ZERO: Self = 0.0;
    const IN_F32: usize = 1;

    fn of(memory: &mut [f32]) -> &mut [Self] {
        memory
    }

    #[inline(always)]
    fn new(bits: u16) -> Self {
        bf16::from_bits(bits).to_f32()
    }
}

/// As it is.
impl Brain for u16 {
    const ZERO: Self = 0;
    const IN_F32: usize = 2;

    fn of(memory: &mut [f32]) -> &mut [Self] {
        halves(memory)
    }

    #[inline(always)]
    fn new(bits: u16) -> Self {
        bits
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{
        super::{isa::tests::vectorised, line::LANES, noise, ops, target::Then, threads::Shares},
        *,
    };
    use std::ops::Range;

    /// Every unit of this processor, Pairs also by widening; says what this processor cannot test.
    fn units() -> Vec<(Unit, Level)> {
        let levels: Vec<_> = [Level::PORTABLE].into_iter().chain(vectorised()).collect();
        let mut all: Vec<_> = levels.iter().flat_map(|&level| [(Unit::Vectors, level), (Unit::Pairs, level)]).collect();
        #[cfg(target_arch = "x86_64")]
        all.extend(levels.last().and_then(|&level| Some((Unit::Tiles(Amx::detect()?), level))));
        all
    }

    /// Whether this processor's own order of sums is used, which the reference need not share.
    fn is_own(unit: Unit, level: Level) -> bool {
        unit == Unit::Pairs && level != Level::PORTABLE && level.instructions() == super::super::isa::Instructions::Avx512Bf16
    }

    /// A weight and rows that it is multiplied by.
    struct Case {
        inputs: usize,
        outputs: usize,
        x: Vec<f32>,
        lines: Vec<Bf16>,
    }

    impl Case {
        fn new(rows: usize, outputs: usize, inputs: usize, x: impl Fn(usize, usize) -> f32, w: impl Fn(usize, usize) -> f32) -> Self {
            let stride = inputs.next_multiple_of(BLOCK) / 2;
            let mut lines = vec![Bf16([0; 2 * LANES]); outputs.div_ceil(LANES) * stride];
            for (output, input) in (0..outputs).flat_map(|output| (0..inputs).map(move |input| (output, input))) {
                let bits = bf16::from_f32(w(output, input)).to_bits();
                lines[output / LANES * stride + input / 2].0[output % LANES * 2 + input % 2] = bits;
            }
            flush(&mut lines);
            Self { inputs, outputs, x: (0..rows * inputs).map(|i| x(i / inputs, i % inputs)).collect(), lines }
        }

        fn noise(rows: usize, outputs: usize, inputs: usize) -> Self {
            let (x, w) = (noise(rows * inputs, 5), noise(outputs * inputs, 6));
            Self::new(rows, outputs, inputs, |row, i| x[row * inputs + i], |output, i| w[output * inputs + i])
        }

        fn product(&self, (unit, level): (Unit, Level), threads: usize, rows: Range<usize>) -> Vec<f32> {
            let (ops, x) = (ops(level, threads), &self.x[rows.start * self.inputs..rows.end * self.inputs]);
            let mut y = vec![f32::NAN; rows.len() * self.outputs];
            let next = Default::default();
            let target = Target::new(rows.len(), self.outputs, None, &next, Then::Write(Shares::new(&mut y)));
            ops.team.hold(|| {
                unit.multiply(&ops, self.inputs, &self.lines, &Inputs::of(&ops, unit.form(), x, self.inputs, None), &target);
            });
            y
        }

        fn all(&self, unit: (Unit, Level)) -> Vec<f32> {
            self.product(unit, 2, 0..self.x.len() / self.inputs)
        }

        fn x(&self, row: usize, i: usize) -> f32 {
            if i < self.inputs { f32::new(rounded(self.x[row * self.inputs + i])) } else { 0.0 }
        }

        fn w(&self, output: usize, i: usize) -> f32 {
            let stride = self.inputs.next_multiple_of(BLOCK) / 2;
            f32::new(self.lines[output / LANES * stride + i / 2].0[output % LANES * 2 + i % 2])
        }

        /// An output by the book: in the order of a unit.
        fn output(&self, unit: Unit, row: usize, output: usize) -> f32 {
            let mut sum = 0.0f32;
            for first in (0..self.inputs).step_by(BLOCK) {
                let product = |sum: f32, i: usize| self.w(output, i).mul_add(self.x(row, i), sum);
                sum = match unit {
                    Unit::Pairs => (first..first + BLOCK).step_by(2).fold(sum, |sum, i| product(product(sum, i + 1), i)),
                    _ => {
                        let half = |odd| (first + odd..first + BLOCK).step_by(2).fold(0.0, product);
                        sum + (half(0) + half(1))
                    }
                };
            }
            sum
        }

        /// Compares with the book, and with exact sums.
        fn check(&self, unit: (Unit, Level)) {
            for (i, y) in self.all(unit).into_iter().enumerate() {
                let (row, output) = (i / self.outputs, i % self.outputs);
                let products = (0..self.inputs).map(|i| f64::from(self.x(row, i)) * f64::from(self.w(output, i)));
                let (exact, size) = products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()));
                let most = (self.inputs + 34) as f64 * 2f64.powi(-24) * size;
                assert!((f64::from(y) - exact).abs() <= most, "{unit:?} {} inputs: {y} for {exact}", self.inputs);
                if !is_own(unit.0, unit.1) {
                    let expected = self.output(unit.0, row, output);
                    assert!(y == expected, "{unit:?} {} x {}, row {row}: {y} for {expected}", self.outputs, self.inputs);
                }
                assert!(!y.is_subnormal());
            }
        }
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        let bits = (0..=u16::MAX).flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| u32::from(high) << 16 | low));
        let x: Vec<f32> = bits.map(f32::from_bits).collect();
        let expected = x.iter().map(|&x| match bf16::from_f32(x) {
            small if small.to_f32().abs() < 2f32.powi(-56) => 0,
            other => other.to_bits(),
        });
        let expected: Vec<u16> = expected.collect();
        for level in Level::all() {
            let ops = ops(level, 2);
            for (inputs, depth) in [(x.len() / 3, x.len() / 3), (1, 32), (33, 64)] {
                let [narrow, wide] = [Form::Halves, Form::Rounded].map(|form| Inputs::of(&ops, form, &x[..3 * inputs], inputs, None));
                let (narrow, wide) = (narrow.halves(), wide.wide());
                for (row, expected) in expected.chunks_exact(inputs).take(3).enumerate() {
                    let (found, rest) = narrow[row * depth..][..depth].split_at(inputs);
                    assert!(found == expected && rest.iter().all(|&bits| bits == 0), "{level:?} {inputs}");
                }
                // Three rows are a strip.
                let mut wide = wide.iter().enumerate();
                let same = wide.all(|(i, wide)| wide.to_bits() == u32::from(narrow[i % 3 * depth + i / 3]) << 16);
                assert!(same, "{level:?} {inputs}");
            }
        }
    }

    #[test]
    fn units_sum_by_the_book() {
        // The last three reach beyond what is computed at once: 640 inputs, 96 or 256 rows.
        let shapes = [(1, 1, 7), (63, 31, 7), (64, 576, 3), (65, 33, 20), (130, 64, 35), (17, 1300, 7), (33, 31, 100), (50, 40, 300)];
        for unit in units() {
            for (outputs, inputs, most) in shapes {
                for rows in (1..=most.min(7)).chain([most]) {
                    Case::noise(rows, outputs, inputs).check(unit);
                }
            }
        }
    }

    #[test]
    fn threads_and_company_change_no_bit() {
        for unit in units() {
            for (outputs, inputs) in [(16, 1), (50, 63), (97, 700)] {
                let case = Case::noise(67, outputs, inputs);
                let all = case.all(unit);
                let some = [0..2, 3..7, 5..20, 10..26, 1..18, 20..53, 2..66, 33..67];
                for rows in (0..67).map(|row| row..row + 1).chain(some) {
                    let found = case.product(unit, 2, rows.clone());
                    assert!(found == all[rows.start * outputs..rows.end * outputs], "{unit:?} {outputs} x {inputs}: {rows:?}");
                }
                for threads in [1, 5] {
                    assert!(case.product(unit, threads, 0..67) == all, "{unit:?} {outputs} x {inputs}: {threads} threads");
                }
            }
        }
    }

    #[test]
    fn what_multiplies_follows_from_the_processor_alone() {
        for level in Level::all() {
            let (few, many) = (Unit::of(level, 1), Unit::of(level, 100));
            let case = Case::noise(100, 40, 70);
            assert!(case.product((few, level), 2, 0..1) == case.product((many, level), 2, 0..100)[..40], "{level:?}");
            assert_eq!((few == Unit::Pairs, many == Unit::Pairs), (is_own(Unit::Pairs, level), is_own(Unit::Pairs, level)));
        }
    }

    #[test]
    fn infinities_stay_and_numbers_are_none_where_they_are_none() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        for unit in units() {
            for rows in [1, 4, 17, 33] {
                // One row, one output and one input are special; all else is 1, so other sums are 70 but for these.
                for (x, w, expected) in
                    [(inf, 2.0, inf), (inf, -2.0, -inf), (inf, 0.0, nan), (nan, 1.0, nan), (0.0, nan, nan), (1e30, -1e30, -inf)]
                {
                    for at in [0, 1, 40, 69] {
                        let one = |is_special, value| if is_special { value } else { 1.0 };
                        let row = rows / 2;
                        let case = Case::new(rows, 40, 70, |r, i| one(r == row && i == at, x), |o, i| one(o == 21 && i == at, w));
                        for (i, y) in case.all(unit).into_iter().enumerate() {
                            let expected = match (i / 40 == row, i % 40 == 21) {
                                (true, true) => expected,
                                (true, false) => 69.0 + case.x(row, at),
                                (false, true) => 69.0 + case.w(21, at),
                                _ => 70.0,
                            };
                            let same = y == expected || y.is_nan() && expected.is_nan() || (y / expected - 1.0).abs() < 1e-6;
                            assert!(same, "{unit:?} {x} * {w} at {at}: {y} at {i} for {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_denormal() {
        let small = |exponent: i32| 2f32.powi(exponent);
        for unit in units() {
            // Nearly all of 2^-56 is taken for zero, and 2^-56 is not.
            for (x, w, expected) in [(small(-56), small(-56), small(-112)), (0.99 * small(-56), 1e9, 0.0), (1e9, -0.99 * small(-56), 0.0)] {
                assert_eq!(Case::new(5, 3, 1, |_, _| x, |_, _| w).all(unit), [expected; 15], "{unit:?}");
            }
            // Sums that nearly cancel each other out, of the smallest products.
            let (x, w) = (noise(40 * 130, 8), noise(33 * 130, 9));
            let size = |x: f32| x.signum() * (1.0 + x.abs()) * small(-56);
            let tiny = Case::new(40, 33, 130, |row, i| size(x[row * 130 + i]), |output, i| size(w[output * 130 + i]));
            tiny.check(unit);
            // Sizes as far apart as sums of them fit.
            let wild = |x: f32| x * (x * 60.0).exp2();
            Case::new(40, 33, 130, |row, i| wild(x[row * 130 + i]), |output, i| wild(w[output * 130 + i])).check(unit);
        }
    }
}
