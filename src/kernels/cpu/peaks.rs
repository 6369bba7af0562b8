//! The largest value of each block of a row of scores: what choosing a token looks at first, and often all that it looks at.

use super::{isa::Loop, line::LANES};

/// Values of a block; the last one of a row may have fewer.
pub(crate) const BLOCK: usize = 64;

/// Writes the largest value of each block of `values`; NaN of a block that has one.
pub(crate) struct Highest<'a> {
    pub values: &'a [f32],
    pub peaks: &'a mut [f32],
}

impl Loop for Highest<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let (blocks, rest) = self.values.as_chunks();
        for (peak, block) in self.peaks.iter_mut().zip(blocks) {
            *peak = highest(block);
        }
        if let (Some(peak), false) = (self.peaks.get_mut(blocks.len()), rest.is_empty()) {
            *peak = highest(&filled(rest));
        }
    }
}

/// What is left after whole blocks, filled up with negative infinity.
#[inline(always)]
pub(crate) fn filled(rest: &[f32]) -> [f32; BLOCK] {
    let mut block = [f32::NEG_INFINITY; BLOCK];
    block[..rest.len()].copy_from_slice(rest);
    block
}

#[inline(always)]
fn highest(block: &[f32; BLOCK]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    // Of each lane the last NaN, 0 without one.
    let mut nan = [0.0; LANES];
    for chunk in block.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
            nan[i] = if chunk[i].is_nan() { chunk[i] } else { nan[i] };
        }
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
            nan[i] += nan[i + width];
        }
    }
    lanes[0] + nan[0]
}
