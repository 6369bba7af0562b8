//! Rotary frequencies: `config.json`'s rope fields to radians per position.

use super::fields::{Fields, WIDTH};
use crate::{
    error::{Error, Result},
    kernels::Rope,
};
use std::f64::consts::PI;

const KNOWN: &str = "default, linear, llama3, yarn";

/// The rotation of heads of `head_dim` dimensions in a model made for `trained` positions.
pub(crate) fn rope(config: &Fields, head_dim: usize, trained: usize) -> Result<Rope> {
    if !head_dim.is_multiple_of(2) {
        return Err(config.error("head_dim", head_dim, "rotary positions need an even number of dimensions"));
    }
    // HF: 4.x writes `rope_theta` beside `rope_scaling`, 5.x both into `rope_parameters`. The reference reads all forms, in this order.
    let nested = match config.object("rope_scaling")? {
        Some(fields) => Some(fields),
        None => config.object("rope_parameters")?,
    };
    let fields = nested.as_ref().unwrap_or(config);
    let theta = fields.positive("rope_theta", config.positive("rope_theta", 10_000.0)?)?;
    let inv_freq = inv_freq(theta, head_dim);
    let Some(fields) = nested else {
        return Ok(Rope { inv_freq, scale: 1.0 });
    };
    if fields.has("full_attention") || fields.has("sliding_attention") {
        return Err(Error::Unsupported("rope_parameters for each layer type".into()));
    }
    let original = || {
        // HF: a field beside the rope's own comes first, as Phi-3 has it.
        let inner = fields.size("original_max_position_embeddings", trained, WIDTH)?;
        config.size("original_max_position_embeddings", inner, WIDTH)
    };
    match fields.text("rope_type", fields.text("type", "default")?)? {
        "default" => Ok(Rope { inv_freq, scale: 1.0 }),
        "linear" => {
            let factor = fields.required_positive("factor")? as f32;
            Ok(Rope { inv_freq: inv_freq.iter().map(|freq| freq / factor).collect(), scale: 1.0 })
        }
        "llama3" => Ok(Rope { inv_freq: llama3(&fields, &inv_freq, original()? as f64)?, scale: 1.0 }),
        "yarn" => yarn(&fields, theta, head_dim, trained as f64, original()? as f64),
        other => Err(Error::Unsupported(format!("rope_type {other:?}; known: {KNOWN}"))),
    }
}

/// `theta^(2i / dim)` of each pair, rounded where the reference's f32 arithmetic rounds; the power itself in f64, so that
/// it does not depend on the platform's mathematics library.
fn powers(theta: f64, dim: usize) -> impl Iterator<Item = f32> {
    let base = f64::from(theta as f32);
    (0..dim).step_by(2).map(move |i| base.powf(f64::from(i as f32 / dim as f32)) as f32)
}

fn inv_freq(theta: f64, dim: usize) -> Vec<f32> {
    powers(theta, dim).map(|power| 1.0 / power).collect()
}

/// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
fn llama3(fields: &Fields, inv_freq: &[f32], original: f64) -> Result<Vec<f32>> {
    let factor = fields.required_positive("factor")? as f32;
    let low = fields.required_positive("low_freq_factor")?;
    let high = fields.required_positive("high_freq_factor")?;
    if high <= low {
        return Err(fields.error("high_freq_factor", high, &format!("a number above low_freq_factor = {low} is accepted")));
    }
    let stretch = |&freq: &f32| {
        let wavelength = (2.0 * PI) as f32 / freq;
        if wavelength < (original / high) as f32 {
            freq
        } else if wavelength > (original / low) as f32 {
            freq / factor
        } else {
            let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
            (1.0 - smooth) * freq / factor + smooth * freq
        }
    };
    Ok(inv_freq.iter().map(stretch).collect())
}

/// YaRN, <https://arxiv.org/abs/2309.00071>: pairs that turn often in the original context are kept, those that turn
/// seldom are stretched by `factor`, with a ramp between.
fn yarn(fields: &Fields, theta: f64, dim: usize, trained: f64, original: f64) -> Result<Rope> {
    let factor = fields.optional_positive("factor", None)?.unwrap_or(trained / original);
    let mscale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    let scale = match (
        fields.optional_positive("attention_factor", None)?,
        fields.optional_positive("mscale", None)?,
        fields.optional_positive("mscale_all_dim", None)?,
    ) {
        (Some(scale), ..) => scale,
        (None, Some(numerator), Some(denominator)) => mscale(numerator) / mscale(denominator),
        _ => mscale(1.0),
    };
    let fast = fields.optional_positive("beta_fast", None)?.unwrap_or(32.0);
    let slow = fields.optional_positive("beta_slow", None)?.unwrap_or(1.0);
    // The pair that turns `rotations` times in the original context.
    let pair = |rotations: f64| (dim as f64 * (original / (rotations * 2.0 * PI)).ln()) / (2.0 * theta.ln());
    let (mut low, mut high) = (pair(fast), pair(slow));
    if fields.flag("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let blend = |(i, power): (usize, f32)| {
        let keep = 1.0 - ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        1.0 / (factor as f32 * power) * (1.0 - keep) + 1.0 / power * keep
    };
    Ok(Rope { inv_freq: powers(theta, dim).enumerate().map(blend).collect(), scale: scale as f32 })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn of(config: Value) -> Result<Rope> {
        rope(&Fields::new(config.as_object().unwrap().clone()), 8, 64)
    }

    #[track_caller]
    fn is(config: Value, inv_freq: [f32; 4], scale: f32) {
        assert_eq!(of(config).unwrap(), Rope { inv_freq: inv_freq.to_vec(), scale });
    }

    // Expected values are those of transformers 5.23.0 on these configs, with heads of 8 dimensions.

    #[test]
    fn every_form_of_theta_is_read() {
        is(json!({}), [1.0, 0.1, 0.01, 0.001], 1.0);
        let frequencies = [1.0, 0.03760603, 0.0014142134, 5.3182957e-05];
        is(json!({"rope_theta": 500000.0, "rope_scaling": null}), frequencies, 1.0);
        is(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500000}}), frequencies, 1.0);
        is(json!({"rope_theta": 500000.0, "rope_parameters": {"rope_type": "default"}}), frequencies, 1.0);
    }

    #[test]
    fn linear() {
        let frequencies = [0.33333334, 0.033333335, 0.0033333332, 0.00033333336];
        is(json!({"rope_scaling": {"type": "linear", "factor": 3.0}}), frequencies, 1.0);
        is(json!({"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}), frequencies, 1.0);
    }

    #[test]
    fn llama3() {
        let mut fields = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
        fields["original_max_position_embeddings"] = json!(128);
        let frequencies = [1.0, 0.21147424, 0.00559017, 0.001182177];
        is(json!({"rope_theta": 500.0, "rope_scaling": fields}), frequencies, 1.0);
        fields["original_max_position_embeddings"] = json!(7);
        is(json!({"rope_theta": 500.0, "rope_scaling": fields, "original_max_position_embeddings": 128}), frequencies, 1.0);
    }

    #[test]
    fn yarn() {
        let mut fields = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512});
        is(json!({"rope_parameters": fields}), [1.0, 0.0625, 0.0025, 0.00025], 1.1386294);
        for (field, value) in [("mscale", 0.7), ("mscale_all_dim", 1.2), ("beta_fast", 16.0), ("beta_slow", 2.0)] {
            fields[field] = json!(value);
        }
        fields["truncate"] = json!(false);
        is(json!({"rope_parameters": fields}), [1.0, 0.0756644, 0.0025, 0.00025], 0.94057155);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let message = |config| of(config).unwrap_err().to_string();
        assert_eq!(
            message(json!({"rope_scaling": {"type": "spiral", "factor": 2.0}})),
            r#"unsupported: rope_type "spiral"; known: default, linear, llama3, yarn"#
        );
        assert_eq!(
            message(json!({"rope_scaling": {"type": "linear"}})),
            "cannot load config.json: factor = null: a number above 0 is accepted"
        );
        assert_eq!(message(json!({"rope_theta": -1})), "cannot load config.json: rope_theta = -1: a number above 0 is accepted");
        assert_eq!(
            message(json!({"rope_scaling": "linear"})),
            r#"cannot load config.json: rope_scaling = "linear": an object is accepted"#
        );
        let mut fields = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0});
        assert!(of(json!({"rope_scaling": fields})).is_err());
        fields["high_freq_factor"] = json!(5.0);
        assert!(of(json!({"rope_scaling": fields})).is_ok());
        assert!(rope(&Fields::new(Default::default()), 7, 64).is_err());
    }
}
