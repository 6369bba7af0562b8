//! Sixteen values side by side: the unit that weights and pages are stored in.

use super::isa::Isa;
use candle_core::DType;
use half::{bf16, f16};

/// Values of a line. Every reduction runs in this many virtual lanes, whatever the registers' width.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values, one cache line.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct F32(pub [f32; LANES]);

/// Sixteen bf16 values.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Bf16(pub [u16; LANES]);

/// Sixteen f16 values.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct F16(pub [u16; LANES]);

/// A line of any type, read as f32. Widening is exact, so the type costs bandwidth and never accuracy.
pub(crate) trait Line: Copy + Send + Sync {
    const ZERO: Self;

    /// Copies values from `bytes`, little-endian of `dtype`: lane `lane` of line `i` comes from byte `start + i * stride`.
    fn fill(lines: &mut [Self], lane: usize, dtype: DType, bytes: &[u8], start: usize, stride: usize);
    fn get(&self, lane: usize) -> f32;
    fn widen<I: Isa>(&self, isa: I) -> I::Lanes;
}

impl Line for F32 {
    const ZERO: Self = Self([0.0; LANES]);

    /// Takes any type: parts of different types are stacked as f32.
    fn fill(lines: &mut [Self], lane: usize, dtype: DType, bytes: &[u8], start: usize, stride: usize) {
        match dtype {
            DType::BF16 => copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = bf16::from_le_bytes(bytes).to_f32()),
            DType::F16 => copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = f16::from_le_bytes(bytes).to_f32()),
            _ => copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = f32::from_le_bytes(bytes)),
        }
    }

    fn get(&self, lane: usize) -> f32 {
        self.0[lane]
    }

    #[inline(always)]
    fn widen<I: Isa>(&self, isa: I) -> I::Lanes {
        isa.load(&self.0)
    }
}

impl Line for Bf16 {
    const ZERO: Self = Self([0; LANES]);

    fn fill(lines: &mut [Self], lane: usize, _: DType, bytes: &[u8], start: usize, stride: usize) {
        copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = u16::from_le_bytes(bytes));
    }

    fn get(&self, lane: usize) -> f32 {
        bf16::from_bits(self.0[lane]).to_f32()
    }

    #[inline(always)]
    fn widen<I: Isa>(&self, isa: I) -> I::Lanes {
        isa.brains(&self.0)
    }
}

impl Line for F16 {
    const ZERO: Self = Self([0; LANES]);

    fn fill(lines: &mut [Self], lane: usize, _: DType, bytes: &[u8], start: usize, stride: usize) {
        copy(lines, bytes, start, stride, |line, bytes| line.0[lane] = u16::from_le_bytes(bytes));
    }

    fn get(&self, lane: usize) -> f32 {
        f16::from_bits(self.0[lane]).to_f32()
    }

    #[inline(always)]
    fn widen<I: Isa>(&self, isa: I) -> I::Lanes {
        isa.halves(&self.0)
    }
}

fn copy<L, const SIZE: usize>(lines: &mut [L], bytes: &[u8], start: usize, stride: usize, set: impl Fn(&mut L, [u8; SIZE])) {
    for (i, line) in lines.iter_mut().enumerate() {
        let from = start + i * stride;
        let mut value = [0; SIZE];
        value.copy_from_slice(&bytes[from..from + SIZE]);
        set(line, value);
    }
}
