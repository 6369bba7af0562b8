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
    threads::chunks(&mut y, width, width * 4, |i, y| level.run(Normalise { norm, x: &x[i * width..][..width], y }));
    y
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

struct Normalise<'a> {
    norm: &'a Norm<Vec<f32>>,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Task for Normalise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { norm, x, y } = self;
        let count = x.len() as f32;
        let mean = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => math::sum(x, |x, sum| sum + x) / count,
        };
        for (y, x) in y.iter_mut().zip(x) {
            *y = x - mean;
        }
        let factor = 1.0 / (math::sum(y, |y, sum| y.mul_add(y, sum)) / count + norm.eps).sqrt();
        for (y, weight) in y.iter_mut().zip(&norm.weight) {
            *y = *y * factor * weight;
        }
        if let Some(bias) = &norm.bias {
            for (y, bias) in y.iter_mut().zip(bias) {
                *y += bias;
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
