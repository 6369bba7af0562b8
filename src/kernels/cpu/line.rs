//! Sixteen outputs side by side: the unit that weights and pages are stored in.

use super::isa::Isa;
use candle_core::DType;
use half::{bf16, f16};

/// Values of a line. Every reduction runs in this many virtual lanes, whatever the registers' width.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values of one input, a cache line.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct F32(pub [f32; LANES]);

/// Sixteen bf16 values of each of two inputs, a cache line. Those of a lane lie together: widening takes one shift or mask, and
/// units that multiply bf16 want them so.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Bf16(pub [u16; 2 * LANES]);

/// Sixteen f16 values of one input.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct F16(pub [u16; LANES]);

/// Inputs that a panel of bf16 is filled up to: what the units take at once.
pub(crate) const BLOCK: usize = 32;

/// Lines that rows are multiplied by.
pub(crate) trait Factor: Copy + Send + Sync {
    /// Inputs that a line has values of.
    const INPUTS: usize;
    /// Whether a line needs no widening.
    const IS_PLAIN: bool = false;
    /// Whether [`Self::add`] is [`Isa::dot`].
    const DOTS: bool = false;
    /// The lines of two inputs.
    type Pair;

    /// The lines of the first `inputs` two by two, and what the last has where their number is odd.
    fn pairs(panel: &[Self], inputs: usize) -> (&[Self::Pair], &[Self]);
    /// Input 0 or 1 of a pair.
    fn widen<I: Isa>(pair: &Self::Pair, input: usize, isa: I) -> I::Lanes;
    /// The first input of a line.
    fn first<I: Isa>(&self, isa: I) -> I::Lanes;
    /// Adds the products of an input with `x`.
    #[inline(always)]
    fn add<I: Isa>(isa: I, line: I::Lanes, x: f32, sum: I::Lanes) -> I::Lanes {
        isa.mul_add(line, x, sum)
    }
}

/// A line of any type, read as f32. Widening is exact, so the type costs bandwidth and never accuracy.
pub(crate) trait Line: Factor {
    const ZERO: Self;

    /// Lines of a panel of so many inputs.
    fn count(inputs: usize) -> usize;
    /// Copies one lane of a panel, `inputs` values, from `bytes`, little-endian of `dtype`: that of input `i` comes from byte
    /// `start + i * stride`.
    fn fill(panel: &mut [Self], lane: usize, inputs: usize, dtype: DType, bytes: &[u8], start: usize, stride: usize);
    /// The value of an input.
    fn get(panel: &[Self], lane: usize, input: usize) -> f32;
}

impl Factor for F32 {
    const INPUTS: usize = 1;
    const IS_PLAIN: bool = true;
    type Pair = [Self; 2];

    #[inline(always)]
    fn pairs(panel: &[Self], inputs: usize) -> (&[[Self; 2]], &[Self]) {
        panel[..inputs].as_chunks()
    }

    #[inline(always)]
    fn widen<I: Isa>(pair: &[Self; 2], input: usize, isa: I) -> I::Lanes {
        isa.load(&pair[input].0)
    }

    #[inline(always)]
    fn first<I: Isa>(&self, isa: I) -> I::Lanes {
        isa.load(&self.0)
    }
}

impl Line for F32 {
    const ZERO: Self = Self([0.0; LANES]);

    fn count(inputs: usize) -> usize {
        inputs
    }

    /// Takes any type: parts of different types are stacked as f32.
    fn fill(panel: &mut [Self], lane: usize, inputs: usize, dtype: DType, bytes: &[u8], start: usize, stride: usize) {
        let lines = &mut panel[..inputs];
        match dtype {
            DType::BF16 => copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = bf16::from_le_bytes(bytes).to_f32()),
            DType::F16 => copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = f16::from_le_bytes(bytes).to_f32()),
            _ => copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = f32::from_le_bytes(bytes)),
        }
    }

    fn get(panel: &[Self], lane: usize, input: usize) -> f32 {
        panel[input].0[lane]
    }
}

/// A line of bf16 that is multiplied as it is. Two of its inputs are one here, the bits of both, as [`Isa::dot`] takes them.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Dots(F32);

impl Dots {
    pub(crate) fn of(lines: &[Bf16]) -> &[Self] {
        // SAFETY: both are 64 bytes, begin at a multiple of that, and have no invalid values.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len()) }
    }
}

impl Factor for Dots {
    const INPUTS: usize = 1;
    const IS_PLAIN: bool = true;
    const DOTS: bool = true;
    type Pair = [Self; 2];

    #[inline(always)]
    fn pairs(panel: &[Self], inputs: usize) -> (&[[Self; 2]], &[Self]) {
        panel[..inputs].as_chunks()
    }

    #[inline(always)]
    fn widen<I: Isa>(pair: &[Self; 2], input: usize, isa: I) -> I::Lanes {
        pair[input].first(isa)
    }

    #[inline(always)]
    fn first<I: Isa>(&self, isa: I) -> I::Lanes {
        isa.load(&self.0.0)
    }

    #[inline(always)]
    fn add<I: Isa>(isa: I, line: I::Lanes, x: f32, sum: I::Lanes) -> I::Lanes {
        isa.dot(line, x, sum)
    }
}

impl Factor for Bf16 {
    const INPUTS: usize = 2;
    type Pair = Self;

    #[inline(always)]
    fn pairs(panel: &[Self], inputs: usize) -> (&[Self], &[Self]) {
        panel[..inputs.div_ceil(2)].split_at(inputs / 2)
    }

    #[inline(always)]
    fn widen<I: Isa>(pair: &Self, input: usize, isa: I) -> I::Lanes {
        isa.brains(&pair.0, input)
    }

    #[inline(always)]
    fn first<I: Isa>(&self, isa: I) -> I::Lanes {
        isa.brains(&self.0, 0)
    }
}

impl Line for Bf16 {
    const ZERO: Self = Self([0; 2 * LANES]);

    fn count(inputs: usize) -> usize {
        inputs.div_ceil(BLOCK) * (BLOCK / 2)
    }

    /// Takes any type, rounded to the nearest.
    fn fill(panel: &mut [Self], lane: usize, inputs: usize, dtype: DType, bytes: &[u8], start: usize, stride: usize) {
        let mut input = 0;
        let mut next = |bits| {
            panel[input / 2].0[2 * lane + input % 2] = bits;
            input += 1;
        };
        match dtype {
            DType::F32 => each(inputs, bytes, start, stride, |bytes| next(bf16::from_f32(f32::from_le_bytes(bytes)).to_bits())),
            DType::F16 => each(inputs, bytes, start, stride, |bytes| next(bf16::from_f32(f16::from_le_bytes(bytes).to_f32()).to_bits())),
            _ => each(inputs, bytes, start, stride, |bytes| next(u16::from_le_bytes(bytes))),
        }
    }

    fn get(panel: &[Self], lane: usize, input: usize) -> f32 {
        bf16::from_bits(panel[input / 2].0[2 * lane + input % 2]).to_f32()
    }
}

impl Factor for F16 {
    const INPUTS: usize = 1;
    type Pair = [Self; 2];

    #[inline(always)]
    fn pairs(panel: &[Self], inputs: usize) -> (&[[Self; 2]], &[Self]) {
        panel[..inputs].as_chunks()
    }

    #[inline(always)]
    fn widen<I: Isa>(pair: &[Self; 2], input: usize, isa: I) -> I::Lanes {
        isa.halves(&pair[input].0)
    }

    #[inline(always)]
    fn first<I: Isa>(&self, isa: I) -> I::Lanes {
        isa.halves(&self.0)
    }
}

impl Line for F16 {
    const ZERO: Self = Self([0; LANES]);

    fn count(inputs: usize) -> usize {
        inputs
    }

    /// Takes any type, rounded to the nearest.
    fn fill(panel: &mut [Self], lane: usize, inputs: usize, dtype: DType, bytes: &[u8], start: usize, stride: usize) {
        let lines = &mut panel[..inputs];
        match dtype {
            DType::F32 => {
                copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = f16::from_f32(f32::from_le_bytes(bytes)).to_bits())
            }
            DType::BF16 => {
                copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = f16::from_f32(bf16::from_le_bytes(bytes).to_f32()).to_bits())
            }
            _ => copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = u16::from_le_bytes(bytes)),
        }
    }

    fn get(panel: &[Self], lane: usize, input: usize) -> f32 {
        f16::from_bits(panel[input].0[lane]).to_f32()
    }
}

fn copy<L, const SIZE: usize>(lines: &mut [L], bytes: &[u8], start: usize, stride: usize, set: impl Fn(&mut L, [u8; SIZE])) {
    let mut input = 0;
    each(lines.len(), bytes, start, stride, |value| {
        set(&mut lines[input], value);
        input += 1;
    });
}

fn each<const SIZE: usize>(count: usize, bytes: &[u8], start: usize, stride: usize, mut take: impl FnMut([u8; SIZE])) {
    for i in 0..count {
        let from = start + i * stride;
        let mut value = [0; SIZE];
        value.copy_from_slice(&bytes[from..from + SIZE]);
        take(value);
    }
}
