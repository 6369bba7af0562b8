//! Operations on each token or value alone: norms, activations, caps.

use super::{
    CpuOps,
    isa::{Isa, Task},
    line::LANES,
    math,
};
use crate::kernels::{Activation, Norm, NormKind};

/// What a transcendental function costs in multiply-adds.
const FUNCTION: usize = 16;

/// Values of a piece where tokens do not matter.
const PIECE: usize = 4096;

/// The norm of each token of `x`, to `y`.
pub(super) fn norm(ops: &CpuOps, norm: &Norm<Vec<f32>>, x: &[f32], width: usize, y: &mut [f32]) {
    ops.team.chunks(y, width, width * 4, |i, y| {
        y.copy_from_slice(&x[i * width..][..width]);
        ops.level.run(Normalise { norm, first: 0, x: y });
    });
}

/// Normalises the columns of each token that begin at `first`, as many as the norm has weights, each `group` of them alone.
pub(super) fn norm_part(ops: &CpuOps, norm: &Norm<Vec<f32>>, x: &mut [f32], width: usize, first: usize, group: usize) {
    ops.team.chunks(x, width, norm.weight.len() * 4, |_, x| {
        for (i, x) in x[first..first + norm.weight.len()].chunks_exact_mut(group).enumerate() {
            ops.level.run(Normalise { norm, first: i * group, x });
        }
    });
}

pub(super) fn activate(ops: &CpuOps, activation: Activation, x: &mut [f32], width: usize) {
    ops.team.chunks(x, width, width * FUNCTION, |_, x| ops.level.run(Activate { activation, x }));
}

/// `x + y`, to `x`.
pub(super) fn add(ops: &CpuOps, x: &mut [f32], y: &[f32]) {
    ops.team.chunks(x, PIECE, PIECE, |i, x| x.iter_mut().zip(&y[i * PIECE..]).for_each(|(x, y)| *x += y));
}

/// `cap * tanh(x / cap)`
pub(super) fn softcap(ops: &CpuOps, cap: f32, x: &mut [f32]) {
    ops.team.chunks(x, PIECE, PIECE * FUNCTION, |_, x| ops.level.run(Cap { cap, x }));
}

/// The softmax of each token.
pub(super) fn softmax(ops: &CpuOps, x: &mut [f32], width: usize) {
    ops.team.chunks(x, width, width * FUNCTION, |_, x| ops.level.run(Softmax { x }));
}

/// The norm of `x`, in place.
pub(super) struct Normalise<'a> {
    pub norm: &'a Norm<Vec<f32>>,
    /// The first weight.
    pub first: usize,
    pub x: &'a mut [f32],
}

impl Task for Normalise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { norm, first, x } = self;
        let count = x.len() as f32;
        if norm.kind == NormKind::Layer {
            let mean = math::sum(x, |x, sum| sum + x) / count;
            for x in x.iter_mut() {
                *x -= mean;
            }
        }
        let factor = 1.0 / (math::sum(x, |x, sum| x.mul_add(x, sum)) / count + norm.eps).sqrt();
        for (x, weight) in x.iter_mut().zip(&norm.weight[first..]) {
            *x = *x * factor * weight;
        }
        if let Some(bias) = &norm.bias {
            for (x, bias) in x.iter_mut().zip(&bias[first..]) {
                *x += bias;
            }
        }
    }
}

struct Activate<'a> {
    activation: Activation,
    x: &'a mut [f32],
}

impl Task for Activate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        // One loop each, or the choice is made for each value.
        match self.activation {
            Activation::Silu => self.x.iter_mut().for_each(|x| *x = math::activate(Activation::Silu, *x)),
            Activation::Gelu => self.x.iter_mut().for_each(|x| *x = math::activate(Activation::Gelu, *x)),
            Activation::GeluTanh => self.x.iter_mut().for_each(|x| *x = math::activate(Activation::GeluTanh, *x)),
            Activation::Relu => self.x.iter_mut().for_each(|x| *x = math::activate(Activation::Relu, *x)),
        }
    }
}

/// `activation(gate) * up` of lines that are gates and what they open by turns, to the first half.
pub(super) struct Gate<'a> {
    pub activation: Activation,
    pub y: &'a mut [f32],
}

impl Task for Gate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let lines = self.y.as_chunks_mut::<LANES>().0;
        // One loop each, or the choice is made for each value.
        match self.activation {
            Activation::Silu => gate(lines, |x| math::activate(Activation::Silu, x)),
            Activation::Gelu => gate(lines, |x| math::activate(Activation::Gelu, x)),
            Activation::GeluTanh => gate(lines, |x| math::activate(Activation::GeluTanh, x)),
            Activation::Relu => gate(lines, |x| math::activate(Activation::Relu, x)),
        }
    }
}

#[inline(always)]
fn gate(lines: &mut [[f32; LANES]], f: impl Fn(f32) -> f32) {
    for i in 0..lines.len() / 2 {
        let (gate, up) = (lines[2 * i], lines[2 * i + 1]);
        for lane in 0..LANES {
            lines[i][lane] = f(gate[lane]) * up[lane];
        }
    }
}

struct Cap<'a> {
    cap: f32,
    x: &'a mut [f32],
}

impl Task for Cap<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        for x in self.x {
            *x = self.cap * math::tanh(*x / self.cap);
        }
    }
}

struct Softmax<'a> {
    x: &'a mut [f32],
}

impl Task for Softmax<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let mut max = f32::NEG_INFINITY;
        for x in self.x.iter() {
            max = if *x > max { *x } else { max };
        }
        for x in self.x.iter_mut() {
            *x = math::exp(*x - max);
        }
        let sum = math::sum(self.x, |x, sum| sum + x);
        for x in self.x.iter_mut() {
            *x /= sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            isa::{Level, tests::vectorised},
            ops,
        },
        *,
    };

    fn normed(level: Level, parameters: &Norm<Vec<f32>>, x: &[f32], width: usize) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        norm(&ops(level, 2), parameters, x, width, &mut y);
        y
    }

    fn close(ours: &[f32], theirs: &[f32]) {
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert!((ours - theirs).abs() <= 4e-7 * theirs.abs().max(1.0), "{ours} is not {theirs}");
        }
    }

    #[test]
    fn norms_are_torchs() {
        let x = [1.0, -2.0, 3.0, 0.5, 100.0, 101.0, 99.0, 100.5];
        let mut parameters = Norm { kind: NormKind::Rms, weight: vec![1.0, 0.5, 2.0, -1.0], bias: None, eps: 1e-5 };
        let rms = [0.529_812_16, -0.529_812_16, 3.178_873, -0.264_906_08, 0.998_724_34, 0.504_355_8, 1.977_474_2, -1.003_718];
        close(&normed(Level::best(None), &parameters, &x, 4), &rms);
        parameters.kind = NormKind::Layer;
        parameters.bias = Some(vec![0.1, 0.2, 0.3, 0.4]);
        let layer = [0.310_558_38, -0.536_954_4, 2.967_073, 0.470_186_14, -0.069_029_31, 0.791_602_55, -2.742_527_7, -0.107_087_94];
        close(&normed(Level::best(None), &parameters, &x, 4), &layer);
    }

    #[test]
    fn a_norm_of_parts_is_that_of_each() {
        let x: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin()).collect();
        for (kind, bias) in [(NormKind::RmsOnce, None), (NormKind::Layer, Some(x[8..20].to_vec()))] {
            let parameters = Norm { kind, weight: x[20..32].to_vec(), bias, eps: 1e-5 };
            let mut y = x.clone();
            // Two tokens of 20; columns 3 to 15 in groups of 4.
            norm_part(&ops(Level::best(None), 2), &parameters, &mut y, 20, 3, 4);
            for token in 0..2 {
                for group in 0..3 {
                    let at = |start: usize| start..start + 4;
                    let alone = Norm {
                        kind,
                        weight: parameters.weight[at(group * 4)].to_vec(),
                        bias: parameters.bias.as_ref().map(|bias| bias[at(group * 4)].to_vec()),
                        eps: 1e-5,
                    };
                    let columns = at(token * 20 + 3 + group * 4);
                    assert_eq!(y[columns.clone()], normed(Level::best(None), &alone, &x[columns], 4));
                }
                assert_eq!(y[token * 20..][..3], x[token * 20..][..3]);
                assert_eq!(y[token * 20 + 15..][..5], x[token * 20 + 15..][..5]);
            }
        }
    }

    #[test]
    fn a_cap_is_torchs() {
        let mut x = [-100.0, -1.0, 0.0, 40.0];
        softcap(&ops(Level::best(None), 2), 30.0, &mut x);
        close(&x, &[-29.923_74, -0.999_629_8, 0.0, 26.101_85]);
    }

    #[test]
    fn a_token_has_the_same_bits_in_any_company_and_instruction_set() {
        // 700 tokens of 130 are split over threads.
        let x: Vec<f32> = (0..700 * 130).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 100.0).collect();
        let parameters = Norm { kind: NormKind::Layer, weight: x[..130].to_vec(), bias: Some(x[5..135].to_vec()), eps: 1e-6 };
        let narrow = Norm { weight: parameters.weight[..60].to_vec(), bias: None, ..parameters.clone() };
        let pass = |level, x: &[f32]| {
            let ops = ops(level, 3);
            ops.team.hold(|| {
                let mut y = vec![0.0; x.len()];
                norm(&ops, &parameters, x, 130, &mut y);
                activate(&ops, Activation::Gelu, &mut y, 130);
                activate(&ops, Activation::Silu, &mut y, 130);
                let mut z: Vec<f32> = y.chunks(130).flat_map(|y| &y[..65]).copied().collect();
                let copy = z.clone();
                add(&ops, &mut z, &copy);
                softcap(&ops, 1.5, &mut z);
                norm_part(&ops, &narrow, &mut z, 65, 5, 12);
                softmax(&ops, &mut z, 65);
                z
            })
        };
        let expected = pass(Level::PORTABLE, &x);
        for level in vectorised() {
            assert!(pass(level, &x) == expected, "{level:?}");
        }
        for token in [0, 1, 350, 699] {
            assert_eq!(pass(Level::best(None), &x[token * 130..][..130]), expected[token * 65..][..65]);
        }
    }
}
