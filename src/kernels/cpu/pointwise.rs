//! Operations on each token or value alone: norms, activations, caps.

use super::{
    isa::{Isa, Level, Task},
    math, threads,
};
use crate::kernels::{Activation, Norm, NormKind};

/// What a transcendental function costs in multiply-adds.
const FUNCTION: usize = 16;

/// Values of a piece where tokens do not matter.
const PIECE: usize = 4096;

pub(super) fn norm(level: Level, norm: &Norm<Vec<f32>>, x: &[f32], width: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    threads::chunks(&mut y, width, width * 4, |i, y| {
        y.copy_from_slice(&x[i * width..][..width]);
        level.run(Normalise { norm, first: 0, x: y });
    });
    y
}

/// Normalises the columns of each token that begin at `first`, as many as the norm has weights, each `group` of them alone.
pub(super) fn norm_part(level: Level, norm: &Norm<Vec<f32>>, x: &mut [f32], width: usize, first: usize, group: usize) {
    threads::chunks(x, width, norm.weight.len() * 4, |_, x| {
        for (i, x) in x[first..first + norm.weight.len()].chunks_exact_mut(group).enumerate() {
            level.run(Normalise { norm, first: i * group, x });
        }
    });
}

pub(super) fn activate(level: Level, activation: Activation, x: &mut [f32], width: usize) {
    threads::chunks(x, width, width * FUNCTION, |_, x| level.run(Activate { activation, x }));
}

/// `activation(gate) * up` of tokens `[gate | up]`.
pub(super) fn gate(level: Level, activation: Activation, x: &[f32], width: usize) -> Vec<f32> {
    let half = width / 2;
    let mut y = vec![0.0; x.len() / 2];
    threads::chunks(&mut y, half, half * FUNCTION, |i, y| {
        let (gate, up) = x[i * width..][..width].split_at(half);
        y.copy_from_slice(gate);
        level.run(Activate { activation, x: y });
        y.iter_mut().zip(up).for_each(|(y, up)| *y *= up);
    });
    y
}

/// `cap * tanh(x / cap)`
pub(super) fn softcap(level: Level, cap: f32, x: &mut [f32]) {
    threads::chunks(x, PIECE, PIECE * FUNCTION, |_, x| level.run(Cap { cap, x }));
}

/// The softmax of each token.
pub(super) fn softmax(level: Level, x: &mut [f32], width: usize) {
    threads::chunks(x, width, width * FUNCTION, |_, x| level.run(Softmax { x }));
}

struct Normalise<'a> {
    norm: &'a Norm<Vec<f32>>,
    /// The first weight.
    first: usize,
    x: &'a mut [f32],
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
    use super::super::isa::tests::vectorised;
    use super::*;

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
        close(&norm(Level::best(), &parameters, &x, 4), &rms);
        parameters.kind = NormKind::Layer;
        parameters.bias = Some(vec![0.1, 0.2, 0.3, 0.4]);
        let layer = [0.310_558_38, -0.536_954_4, 2.967_073, 0.470_186_14, -0.069_029_31, 0.791_602_55, -2.742_527_7, -0.107_087_94];
        close(&norm(Level::best(), &parameters, &x, 4), &layer);
    }

    #[test]
    fn a_norm_of_parts_is_that_of_each() {
        let x: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin()).collect();
        for (kind, bias) in [(NormKind::RmsOnce, None), (NormKind::Layer, Some(x[8..20].to_vec()))] {
            let parameters = Norm { kind, weight: x[20..32].to_vec(), bias, eps: 1e-5 };
            let mut y = x.clone();
            // Two tokens of 20; columns 3 to 15 in groups of 4.
            norm_part(Level::best(), &parameters, &mut y, 20, 3, 4);
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
                    assert_eq!(y[columns.clone()], norm(Level::best(), &alone, &x[columns], 4));
                }
                assert_eq!(y[token * 20..][..3], x[token * 20..][..3]);
                assert_eq!(y[token * 20 + 15..][..5], x[token * 20 + 15..][..5]);
            }
        }
    }

    #[test]
    fn a_cap_is_torchs() {
        let mut x = [-100.0, -1.0, 0.0, 40.0];
        softcap(Level::best(), 30.0, &mut x);
        close(&x, &[-29.923_74, -0.999_629_8, 0.0, 26.101_85]);
    }

    #[test]
    fn a_token_has_the_same_bits_in_any_company_and_instruction_set() {
        // 700 tokens of 130 are split over threads.
        let x: Vec<f32> = (0..700 * 130).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 100.0).collect();
        let parameters = Norm { kind: NormKind::Layer, weight: x[..130].to_vec(), bias: Some(x[5..135].to_vec()), eps: 1e-6 };
        let pass = |level, x: &[f32]| {
            let mut y = norm(level, &parameters, x, 130);
            activate(level, Activation::Gelu, &mut y, 130);
            let mut y = gate(level, Activation::Silu, &y, 130);
            softcap(level, 1.5, &mut y);
            norm_part(level, &Norm { weight: parameters.weight[..60].to_vec(), bias: None, ..parameters.clone() }, &mut y, 65, 5, 12);
            softmax(level, &mut y, 65);
            y
        };
        let expected = pass(Level::PORTABLE, &x);
        for level in vectorised() {
            assert!(pass(level, &x) == expected, "{level:?}");
        }
        for token in [0, 1, 350, 699] {
            assert_eq!(pass(Level::best(), &x[token * 130..][..130]), expected[token * 65..][..65]);
        }
    }
}
