//! Functions of one value and reductions, with the same bits in every lane, vector width and instruction set.
//!
//! Polynomials fitted by weighted minimax; the error of each function is under 2 units in the last place.

use super::line::LANES;
use crate::kernels::Activation;

/// `e^x`; 0 below -104, infinity above 88.73.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, left in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    // Comparisons that are false for NaN, so that NaN stays NaN.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let p = polynomial(r, [0.499_999_94, 0.166_665_18, 0.041_668_423, 0.008_369_063, 0.001_381_388]);
    let p = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors: n reaches from -150 to 128, an exponent only from -126 to 127.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    p * power(n >> 1) * power(n.wrapping_sub(n >> 1))
}

/// The hyperbolic tangent.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let s = x * x;
    let p = polynomial(s, [-0.333_332_78, 0.133_313_31, -0.053_730_007, 0.020_606_177, -0.005_666_977_3]);
    let small = (p * s).mul_add(x, x);
    let large = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { small } else { large }
}

/// The error function: `x * P(x^2)` near zero, else `1 - e^(t * Q(t))` with `t = |x|`.
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let s = x * x;
    let p = polynomial(s, [0.128_379_15, -0.376_124_8, 0.112_816_826, -0.026_761_722, 0.004_985_944, -0.000_595_375_5]);
    let small = p.mul_add(x, x);
    let t = x.abs();
    // From 4 on the result is 1.
    let t = if t > 4.0 { 4.0 } else { t };
    let q = polynomial(t, [-1.128_514_4, -0.635_718_35, -0.105_261_84, 0.022_889_964, -0.003_214_955_3, 0.000_213_984_92]);
    let large = (1.0 - exp(t * q)).copysign(x);
    if x.abs() < 0.925 { small } else { large }
}

/// A model's activation function.
#[inline(always)]
pub(super) fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + exp(-x)),
        Activation::Gelu => x * 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => {
            // sqrt(2 / pi)
            let inner = 0.797_884_6 * (0.044_715 * x * x).mul_add(x, x);
            x * 0.5 * (1.0 + tanh(inner))
        }
        // A comparison that is false for NaN, so that NaN stays NaN.
        Activation::Relu => {
            if x < 0.0 {
                0.0
            } else {
                x
            }
        }
    }
}

/// The sum of `f(value)`: value `i` goes to lane `i % 16`, and the lanes are summed by [`fold`].
#[inline(always)]
pub(super) fn sum(values: &[f32], add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (lines, rest) = values.as_chunks::<LANES>();
    for line in lines {
        for (lane, &value) in lanes.iter_mut().zip(line) {
            *lane = add(value, *lane);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = add(value, *lane);
    }
    fold(lanes, |a, b| a + b)
}

/// Reduces sixteen lanes to one value by halves: 8 and 8, 4 and 4, 2 and 2, 1 and 1.
#[inline(always)]
pub(super) fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
    }
    lanes[0]
}

/// `2^n` for `n` in -126..=127.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut value = coefficients[N - 1];
    for i in (0..N - 1).rev() {
        value = value.mul_add(x, coefficients[i]);
    }
    value
}
