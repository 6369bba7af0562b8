//! Functions of one value and reductions, with the same bits in every lane, vector width and instruction set.
//!
//! Polynomials fitted by weighted minimax; the error of each function is under 2 units in the last place.

use super::line::LANES;
use crate::kernels::Activation;

/// `e^x`; 0 below -104, infinity above 88.73.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Comparisons that are false for NaN, so that NaN stays NaN.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    // 2^n in two factors: n reaches from -150 to 128, an exponent only from -126 to 127.
    let (p, n) = scaled(x);
    p * power(n >> 1) * power(n.wrapping_sub(n >> 1))
}

/// `e^x` as a number near 1 and a power of two.
#[inline(always)]
fn scaled(x: f32) -> (f32, i32) {
    /// 1.5 * 2^23: adding it rounds to an integer, left in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let p = polynomial(r, [0.499_999_94, 0.166_665_18, 0.041_668_423, 0.008_369_063, 0.001_381_388]);
    (p.mul_add(r * r, r) + 1.0, (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32))
}

/// `e^x` of what is not above 0; 0 below -87.
#[inline(always)]
pub(super) fn decay(x: f32) -> f32 {
    let (p, n) = scaled(x);
    if x < -87.0 { 0.0 } else { p * power(n) }
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
pub(super) fn fold(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let lanes: [f32; 8] = halve(lanes, &f);
    let lanes: [f32; 4] = halve(lanes, &f);
    let [first, second] = halve(lanes, &f);
    f(first, second)
}

#[inline(always)]
fn halve<const N: usize, const HALF: usize>(lanes: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; HALF] {
    let mut half = [0.0; HALF];
    for i in 0..HALF {
        half[i] = f(lanes[i], lanes[i + HALF]);
    }
    half
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

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Level, Task, tests::vectorised};
    use super::*;

    type Function = (&'static str, fn(f32) -> f32, fn(f64) -> f64, f32);

    /// Name, ours, the reference, and how far from zero there is anything to see.
    const FUNCTIONS: [Function; 4] = [
        ("exp", |x| exp(x), f64::exp, 110.0),
        ("tanh", |x| tanh(x), f64::tanh, 12.0),
        ("erf", |x| erf(x), erf_series, 4.5),
        ("decay", |x| decay(-x.abs()), |x| if x.abs() > 87.0 { 0.0 } else { (-x.abs()).exp() }, 90.0),
    ];

    /// The Taylor series, good to 1e-9 of the result up to 4; the rest is 1 as far as f32 sees.
    fn erf_series(x: f64) -> f64 {
        if x.abs() > 4.0 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..150 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    /// Evenly spaced values, and all magnitudes.
    fn inputs(reach: f32) -> Vec<f32> {
        let even = (-40_000..=40_000).map(|i| reach * i as f32 / 40_000.0);
        let magnitudes = (0..0x7f80).map(|i| f32::from_bits(i << 16 | 0x1234)).flat_map(|x| [x, -x]);
        even.chain(magnitudes).collect()
    }

    /// Distance in units in the last place of the f32 nearest to `exact`.
    fn ulps(ours: f32, exact: f64) -> f64 {
        let near = exact as f32;
        if ours == near {
            return 0.0;
        }
        let unit = f64::from(f32::from_bits(near.abs().to_bits() + 1)) - f64::from(near.abs());
        (f64::from(ours) - exact).abs() / unit
    }

    #[test]
    fn functions_are_accurate() {
        for (name, ours, exact, reach) in FUNCTIONS {
            let worst = inputs(reach)
                .into_iter()
                .map(|x| (ulps(ours(x), exact(f64::from(x))), x))
                .fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a });
            assert!(worst.0 < 2.0, "{name}({}) is {} units off", worst.1, worst.0);
        }
    }

    #[test]
    fn functions_keep_extremes() {
        assert_eq!([0.0, -0.0, f32::NEG_INFINITY, -1e30, -104.0].map(exp), [1.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!([f32::INFINITY, 1e30, 88.8].map(exp), [f32::INFINITY; 3]);
        assert_eq!([f32::INFINITY, 1e30, -1e30].map(tanh), [1.0, 1.0, -1.0]);
        assert_eq!([f32::INFINITY, 1e30, -1e30].map(erf), [1.0, 1.0, -1.0]);
        assert_eq!([0.0, f32::NEG_INFINITY, -1e30].map(decay), [1.0, 0.0, 0.0]);
        assert!([exp(f32::NAN), tanh(f32::NAN), erf(f32::NAN), decay(f32::NAN)].iter().all(|x| x.is_nan()));
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            assert!(activate(activation, f32::NAN).is_nan(), "{activation:?} hides a value that is no number");
            assert_eq!([1e30, -1e30].map(|x| activate(activation, x)), [1e30, 0.0], "{activation:?}");
        }
    }

    #[test]
    fn activations_are_torchs() {
        let x = [-3.0, -0.5, 0.25, 2.0];
        let close = |activation, expected: [f32; 4]| {
            for (x, expected) in x.into_iter().zip(expected) {
                let y = activate(activation, x);
                // Below zero `1 + erf` cancels, here as there.
                assert!((y - expected).abs() <= 2e-7 * x.abs().max(1.0), "{activation:?}({x}) = {y}, not {expected}");
            }
        };
        close(Activation::Silu, [-0.142_277_61, -0.188_770_34, 0.140_544_13, 1.761_594]);
        close(Activation::Gelu, [-0.004_049_867_4, -0.154_268_79, 0.149_676_56, 1.954_5]);
        close(Activation::GeluTanh, [-0.003_637_433, -0.154_286, 0.149_675_35, 1.954_597_7]);
        close(Activation::Relu, [0.0, 0.0, 0.25, 2.0]);
    }

    struct Each<'a>(usize, &'a mut [f32]);

    impl Task for Each<'_> {
        type Out = f32;

        #[inline(always)]
        fn run<I: Isa>(self, _: I) -> f32 {
            match self.0 {
                0 => self.1.iter_mut().for_each(|x| *x = exp(*x)),
                1 => self.1.iter_mut().for_each(|x| *x = tanh(*x)),
                2 => self.1.iter_mut().for_each(|x| *x = erf(*x)),
                _ => self.1.iter_mut().for_each(|x| *x = decay(-x.abs())),
            }
            sum(self.1, |x, sum| if x < 1e30 { x.mul_add(x, sum) } else { sum })
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for (i, (name, .., reach)) in FUNCTIONS.iter().enumerate() {
            let inputs = inputs(*reach);
            let mut expected = inputs.clone();
            let total = Level::PORTABLE.run(Each(i, &mut expected));
            for level in vectorised() {
                // From another start, so that each value is met in another lane.
                for start in [0, 3] {
                    let mut values = inputs[start..].to_vec();
                    let sum = level.run(Each(i, &mut values));
                    assert!(bits(&values) == bits(&expected[start..]), "{name} {level:?}");
                    assert!(start > 0 || sum.to_bits() == total.to_bits(), "sum of {name} {level:?}");
                }
            }
        }
    }

    #[test]
    fn a_sum_runs_in_lanes() {
        let values: Vec<f32> = (0..37).map(|i| 2f32.powi(i % 16)).collect();
        // Lanes 0 to 4 hold three values, the others two.
        assert_eq!(sum(&values, |x, sum| sum + x), 2.0 * 65535.0 + 31.0);
        assert_eq!(fold(std::array::from_fn(|i| i as f32), |a, b| if b > a { b } else { a }), 15.0);
    }
}
