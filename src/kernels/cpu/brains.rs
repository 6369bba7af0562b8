//! Products in bf16 arithmetic: weights and rounded inputs of bf16, sums of f32.
//!
//! Sums go in the order of AMX's instruction for it (TDPBF16PS in Intel's manual): of 32 inputs the even ones and the odd ones are summed
//! apart, each from zero by fused multiply-adds, inputs ascending; then both together are added to the output. Vectors do the same,
//! so that a row's bits do not depend on how many rows there are, which decides what multiplies. AVX-512 BF16, for processors that have
//! this but no AMX, sums pair after pair, for all numbers of rows.

#[cfg(target_arch = "x86_64")]
use super::{amx::Amx, isa::Instructions};
use super::{
    CpuOps,
    isa::{Isa, Level, Task},
    line::{BLOCK, Bf16, LANES},
    target::{Bands, Target},
    tile::{ROWS, Sums, tiled},
};
use half::bf16;
use std::ops::Range;

/// `x * weight^T` to `target`, of `x` `(rows, inputs)` and the lines of a weight's panels.
pub(super) fn multiply(ops: &CpuOps, inputs: usize, lines: &[Bf16], x: &[f32], target: &Target<'_>) {
    Unit::of(ops.level, x.len() / inputs).multiply(ops, inputs, lines, x, target);
}

/// Takes very small weights for zeros, as is done with inputs.
pub(super) fn flush(panel: &mut [Bf16]) {
    panel.iter_mut().flat_map(|line| &mut line.0).for_each(|bits| *bits = flushed(*bits));
}

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Unit {
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
    fn of(level: Level, rows: usize) -> Self {
        match level.instructions() {
            Instructions::Avx512Bf16 => Self::Pairs,
            Instructions::Amx if rows >= MANY => Amx::detect().map_or(Self::Vectors, Self::Tiles),
            _ => Self::Vectors,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of(_: Level, _: usize) -> Self {
        Self::Vectors
    }

    fn multiply(self, ops: &CpuOps, inputs: usize, lines: &[Bf16], x: &[f32], target: &Target<'_>) {
        let (rows, depth) = (x.len() / inputs, inputs.next_multiple_of(BLOCK));
        let mut rounded = ops.scratch.take(if self == Self::Vectors { rows * depth } else { rows * depth / 2 });
        match self {
            Self::Vectors => {
                round(ops, x, inputs, depth, &mut rounded);
                Product { level: ops.level, x: &rounded[..], depth, lines, target }.fill(ops);
            }
            Self::Pairs => {
                round(ops, x, inputs, depth, rounded.halves_mut());
                Product { level: ops.level, x: &*rounded.halves_mut(), depth, lines, target }.fill(ops);
            }
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(amx) => {
                round(ops, x, inputs, depth, rounded.halves_mut());
                let x = &*rounded.halves_mut();
                // SAFETY: a block's outputs are those that it is given.
                unsafe {
                    target.fill(&ops.team, inputs, depth / 2 * size_of::<Bf16>(), amx.bands(), |rows, panels| {
                        amx.product(&super::amx::Block { x, lines, depth, target, rows, panels });
                    });
                }
            }
        }
    }
}

/// Rounds `x`, `(rows, inputs)`, to `(rows, depth)`, filled up with zeros.
fn round<T: Brain>(ops: &CpuOps, x: &[f32], inputs: usize, depth: usize, to: &mut [T]) {
    // A value costs less than a multiply-add.
    ops.team.chunks(to, depth, inputs / 4, |row, to| {
        let (to, rest) = to.split_at_mut(inputs);
        ops.level.run(Round { x: &x[row * inputs..][..inputs], to });
        rest.fill(T::ZERO);
    });
}

struct Round<'a, T> {
    x: &'a [f32],
    to: &'a mut [T],
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
fn rounded(x: f32) -> u16 {
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

/// An input as vectors take it, which says how they sum.
trait Brain: Copy + Send + Sync {
    const ZERO: Self;
    /// Of a bf16's bits.
    fn new(bits: u16) -> Self;
    /// Compiles `task` for a level.
    fn run(level: Level, task: impl Task<Out = ()>);
    /// Adds the products of rows with panels over a block of inputs, of lines that are read so many lines ahead.
    fn add<I: Isa, const R: usize, const C: usize>(
        isa: I,
        rows: [&[Self; BLOCK]; R],
        panels: [&[Bf16; BLOCK / 2]; C],
        ahead: usize,
        sums: &mut Sums<I, R, C>,
    );
}

/// Widened, for AMX's order.
impl Brain for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn new(bits: u16) -> Self {
        bf16::from_bits(bits).to_f32()
    }

    fn run(level: Level, task: impl Task<Out = ()>) {
        level.run(task);
    }

    #[inline(always)]
    fn add<I: Isa, const R: usize, const C: usize>(
        isa: I,
        rows: [&[f32; BLOCK]; R],
        panels: [&[Bf16; BLOCK / 2]; C],
        ahead: usize,
        sums: &mut Sums<I, R, C>,
    ) {
        for panel in panels {
            for line in panel {
                isa.prefetch(std::ptr::from_ref(line).wrapping_add(ahead).cast());
            }
        }
        let even = half::<I, R, C, 0>(isa, rows, panels);
        let odd = half::<I, R, C, 1>(isa, rows, panels);
        for r in 0..R {
            for c in 0..C {
                sums[r][c] = isa.mul_add(isa.mul_add(even[r][c], 1.0, odd[r][c]), 1.0, sums[r][c]);
            }
        }
    }
}

/// The sums over the even inputs of a block, or over the odd ones.
#[inline(always)]
fn half<I: Isa, const R: usize, const C: usize, const ODD: usize>(
    isa: I,
    rows: [&[f32; BLOCK]; R],
    panels: [&[Bf16; BLOCK / 2]; C],
) -> Sums<I, R, C> {
    // Loops, not closures: those would be compiled for the baseline where they are not inlined.
    let zero = isa.load(&[0.0; LANES]);
    let (mut sums, mut lines) = ([[zero; C]; R], [zero; C]);
    for i in 0..BLOCK / 2 {
        for c in 0..C {
            lines[c] = isa.brains(&panels[c][i].0, ODD);
        }
        for r in 0..R {
            for c in 0..C {
                sums[r][c] = isa.mul_add(lines[c], rows[r][2 * i + ODD], sums[r][c]);
            }
        }
    }
    sums
}

/// As it is, for products of pairs.
impl Brain for u16 {
    const ZERO: Self = 0;

    #[inline(always)]
    fn new(bits: u16) -> Self {
        bits
    }

    fn run(level: Level, task: impl Task<Out = ()>) {
        level.dots(task);
    }

    #[inline(always)]
    fn add<I: Isa, const R: usize, const C: usize>(
        isa: I,
        rows: [&[u16; BLOCK]; R],
        panels: [&[Bf16; BLOCK / 2]; C],
        ahead: usize,
        sums: &mut Sums<I, R, C>,
    ) {
        for i in 0..BLOCK / 2 {
            for c in 0..C {
                isa.prefetch(std::ptr::from_ref(&panels[c][i]).wrapping_add(ahead).cast());
            }
            for r in 0..R {
                for c in 0..C {
                    sums[r][c] = isa.dot(&panels[c][i].0, [rows[r][2 * i], rows[r][2 * i + 1]], sums[r][c]);
                }
            }
        }
    }
}

/// A product by vectors.
struct Product<'a, T> {
    level: Level,
    /// `(rows, depth)`
    x: &'a [T],
    /// Inputs, whole blocks.
    depth: usize,
    lines: &'a [Bf16],
    target: &'a Target<'a>,
}

/// Rows, then inputs, that stay in the second-level cache while panels pass by.
const BANDS: Bands = Bands { most: 96, step: ROWS };
const DEPTH: usize = 640;

/// Lines of a panel that are asked for before they are read: 2 kB.
const AHEAD: usize = 32;

impl<T: Brain> Product<'_, T> {
    fn fill(&self, ops: &CpuOps) {
        // SAFETY: a block's outputs are those that it is given.
        unsafe {
            let bytes = self.depth / 2 * size_of::<Bf16>();
            self.target.fill(&ops.team, self.depth, bytes, BANDS, |rows, panels| self.block(rows, panels));
        }
    }

    /// # Safety
    /// No other thread accesses these outputs of these rows meanwhile.
    unsafe fn block(&self, band: Range<usize>, panels: Range<usize>) {
        // Few rows: the panels stream by once, as many side by side as the tile has. Many: a panel or four stay in the cache for all
        // rows of the band.
        let few = band.len() <= ROWS;
        let depth = if few { self.depth } else { DEPTH };
        let group = if few { panels.len().max(1) } else { 1 + 3 * usize::from(self.level.is_wide()) };
        for from in (0..self.depth).step_by(depth) {
            let inputs = from..self.depth.min(from + depth);
            for panel in panels.clone().step_by(group) {
                let panels = panel..panels.end.min(panel + group);
                for row in band.clone().step_by(ROWS) {
                    let strip = Strip { product: self, row, panels: panels.clone(), inputs: inputs.clone() };
                    tiled!(self.level, band.end - row, strip.run(self.level));
                }
            }
        }
    }
}

/// Adds the products of `inputs` to the outputs of `panels` for some rows. No other thread accesses these outputs meanwhile.
struct Strip<'a, T> {
    product: &'a Product<'a, T>,
    row: usize,
    panels: Range<usize>,
    inputs: Range<usize>,
}

impl<T: Brain> Strip<'_, T> {
    fn run<const R: usize, const C: usize>(&self, level: Level) {
        T::run(level, Tiles::<T, R, C>(self));
    }
}

/// A strip of `R` rows, `C` panels at a time.
struct Tiles<'a, T, const R: usize, const C: usize>(&'a Strip<'a, T>);

impl<T: Brain, const R: usize, const C: usize> Task for Tiles<'_, T, R, C> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Range { start, end } = self.0.panels;
        let mut panel = start;
        while panel + C <= end {
            self.tile::<I, C>(isa, panel);
            panel += C;
        }
        while panel < end {
            self.tile::<I, 1>(isa, panel);
            panel += 1;
        }
    }
}

impl<T: Brain, const R: usize, const C: usize> Tiles<'_, T, R, C> {
    #[inline(always)]
    fn tile<I: Isa, const N: usize>(&self, isa: I, panel: usize) {
        let &Strip { product, row, ref inputs, .. } = self.0;
        let &Product { depth, x, lines, target, .. } = product;
        let (blocks, stride) = (inputs.len() / BLOCK, depth / 2);
        let mut sums = [[isa.load(&[0.0; LANES]); N]; R];
        let mut rows = [x.as_chunks().0; R];
        let mut panels = [lines.as_chunks().0; N];
        for r in 0..R {
            rows[r] = &x[(row + r) * depth..][inputs.clone()].as_chunks().0[..blocks];
            if inputs.start > 0 {
                for c in 0..N {
                    // SAFETY: the rows and outputs are those of this strip.
                    sums[r][c] = unsafe { target.load(isa, row + r, panel + c) };
                }
            }
        }
        for c in 0..N {
            panels[c] = &lines[(panel + c) * stride..][inputs.start / 2..].as_chunks().0[..blocks];
        }
        for i in 0..blocks {
            let (mut row, mut lines) = ([&rows[0][i]; R], [&panels[0][i]; N]);
            for r in 1..R {
                row[r] = &rows[r][i];
            }
            for c in 1..N {
                lines[c] = &panels[c][i];
            }
            // What comes after the last lines of a panel is the same panel of the next tile.
            let ahead = if (i + 1) * (BLOCK / 2) + AHEAD <= stride { AHEAD } else { AHEAD + (N - 1) * stride };
            T::add(isa, row, lines, ahead, &mut sums);
        }
        for r in 0..R {
            for c in 0..N {
                // SAFETY: as above.
                unsafe { target.store(isa, sums[r][c], row + r, panel + c) };
            }
        }
    }
}
