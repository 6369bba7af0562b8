//! Rotary positions.

use super::{
    CpuOps,
    brains::RoundHere,
    isa::{Isa, Task},
};
use crate::kernels::{Attention, Rope};
use std::ops::Range;

/// Cosines and sines, `(tokens, pairs)`.
#[derive(Debug)]
pub(crate) struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

impl Angles {
    pub(super) fn new(rows: &[(&Rope, Range<usize>)]) -> Self {
        let pairs = rows.first().map_or(0, |(rope, _)| rope.inv_freq.len());
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for (rope, positions) in rows {
            debug_assert_eq!(rope.inv_freq.len(), pairs);
            // HF: position and frequency are multiplied in f32, which is coarse at large positions, and so it is here.
            let turn = |position: usize| rope.inv_freq.iter().map(move |freq| f64::from(position as f32 * freq));
            cos.extend(positions.clone().flat_map(turn).map(|angle| angle.cos() as f32 * rope.scale));
            sin.extend(positions.clone().flat_map(turn).map(|angle| angle.sin() as f32 * rope.scale));
        }
        Self { cos, sin, pairs }
    }
}

/// Rotates the queries and keys of all tokens. For attention in bf16 all is rounded.
pub(super) fn rotate(ops: &CpuOps, attention: &Attention, angles: &Angles, qkv: &mut [f32]) {
    let (heads, dim, pairs) = (attention.heads + attention.kv_heads, attention.head_dim, angles.pairs);
    debug_assert!(pairs * 2 <= dim);
    ops.team.chunks(qkv, (heads + attention.kv_heads) * dim, heads * dim, |token, qkv| {
        let (cos, sin) = (&angles.cos[token * pairs..][..pairs], &angles.sin[token * pairs..][..pairs]);
        ops.level.run(Rotate { heads: &mut qkv[..heads * dim], dim, cos, sin });
        if ops.halves {
            ops.level.run(RoundHere(qkv));
        }
    });
}

struct Rotate<'a> {
    heads: &'a mut [f32],
    dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Task for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let pairs = self.cos.len();
        for head in self.heads.chunks_exact_mut(self.dim) {
            let (first, second) = head[..2 * pairs].split_at_mut(pairs);
            for ((x, y), (cos, sin)) in first.iter_mut().zip(second).zip(self.cos.iter().zip(self.sin)) {
                (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{isa::Level, ops},
        *,
    };
    use crate::kernels::{Bias, Sight};

    #[test]
    fn rotation_is_the_references() {
        let attention = Attention { heads: 1, kv_heads: 1, head_dim: 8, scale: 1.0, softcap: None, sight: Sight::Causal, bias: Bias::None };
        let rope = Rope { inv_freq: vec![1.0, 0.1, 0.01, 0.001], scale: 1.0 };
        let mut qkv: Vec<f32> = (1..=8).map(|i| i as f32 / 4.0).chain([0.5; 16]).collect();
        rotate(&ops(Level::best(None), 1), &attention, &Angles::new(&[(&rope, 37..38)]), &mut qkv);
        let expected = [0.995_776_1, 0.370_704_26, 0.066_418_47, 0.925_332_4, 0.795_883_06, -1.537_068_1, 1.902_784_5, 2.035_622_6];
        assert!(qkv.iter().zip(expected).all(|(x, y)| (x - y).abs() <= 2e-7), "{qkv:?}");
        assert_eq!(qkv[16..], [0.5; 8], "values do not turn");
    }
}
