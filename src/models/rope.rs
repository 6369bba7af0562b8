//! Rotary frequencies: `config.json`'s rope fields to radians per position.

use super::fields::{Fields, WIDTH};
use crate::{
    error::{Error, Result},
    kernels::Rope,
};
use std::{borrow::Cow, f64::consts::PI};

const KNOWN: &str = "default, linear, dynamic, llama3, yarn, longrope";

/// How the heads of a layer are rotated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Rotation {
    /// The same in every row.
    Fixed(Rope),
    /// Rows longer than `trained` turn more slowly the longer they are. What a token wrote into the cache stays as it was written.
    Dynamic { short: Rope, theta: f64, factor: f64, dim: usize, trained: usize },
    /// Rows longer than `original` turn by `long`, all their tokens: the cache of a row that crosses the length is written anew.
    Long { short: Rope, long: Rope, original: usize },
}

impl Rotation {
    /// The rotation of new tokens of a row that has `len` positions with them.
    pub fn at(&self, len: usize) -> Cow<'_, Rope> {
        match self {
            Self::Fixed(rope) => Cow::Borrowed(rope),
            Self::Dynamic { short, theta, factor, dim, trained } if len > *trained => {
                let stretch = *factor as f32 * len as f32 / *trained as f32 - (factor - 1.0) as f32;
                let power = f64::from(stretch).powf(*dim as f64 / (*dim as f64 - 2.0));
                Cow::Owned(Rope { inv_freq: inv_freq(f64::from(*theta as f32 * power as f32), *dim), scale: short.scale })
            }
            Self::Dynamic { short, .. } => Cow::Borrowed(short),
            Self::Long { short, long, original } => Cow::Borrowed(if len > *original { long } else { short }),
        }
    }

    /// The length past which all tokens of a row turn otherwise.
    pub fn crossing(&self) -> Option<usize> {
        match self {
            Self::Fixed(_) | Self::Dynamic { .. } => None,
            Self::Long { original, .. } => Some(*original),
        }
    }

    /// The length past which a token turns by the row's length when it was written.
    pub fn steady(&self) -> usize {
        match self {
            Self::Dynamic { trained, .. } => *trained,
            Self::Fixed(_) | Self::Long { .. } => usize::MAX,
        }
    }
}

/// What a family says of its rotation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Dimensions of a head.
    pub dim: usize,
    /// The share of them that turns where `config.json` names none; if none, all of them turn whatever it names.
    pub partial: Option<f64>,
    pub theta: f64,
    /// The positions that the model was made for.
    pub trained: usize,
    /// Those before they were stretched, where they are not told and yet not `trained`.
    pub original: Option<usize>,
}

/// The rotation that `config.json` asks for.
pub(crate) fn rope(config: &Fields, heads: Heads) -> Result<Rotation> {
    // HF: 4.x writes `rope_theta` beside `rope_scaling`, 5.x both into `rope_parameters`. The reference reads all forms, in this order.
    let fields = match config.object("rope_scaling")? {
        Some(fields) => Some(fields),
        None => config.object("rope_parameters")?,
    };
    let partial = match heads.partial {
        Some(partial) => Some(config.positive("partial_rotary_factor", partial)?),
        None => None,
    };
    rotation(config, fields.as_ref(), Heads { theta: config.positive("rope_theta", heads.theta)?, partial, ..heads })
}

/// The rotation that `fields`, a part of `config`, ask for; what they leave out is as `heads` say.
pub(crate) fn rotation(config: &Fields, fields: Option<&Fields>, heads: Heads) -> Result<Rotation> {
    let Heads { trained, .. } = heads;
    let own = |name, default| fields.map_or(Ok(default), |fields| fields.positive(name, default));
    let theta = own("rope_theta", heads.theta)?;
    let dim = match heads.partial {
        Some(partial) => (heads.dim as f64 * own("partial_rotary_factor", partial)?) as usize,
        None => heads.dim,
    };
    // HF: an odd number of dimensions is rounded up to whole pairs.
    if dim == 0 || dim.next_multiple_of(2) > heads.dim {
        return Err(config.error(
            "head_dim",
            heads.dim,
            &format!("rotary positions cannot turn {dim} dimensions of a head, only whole pairs"),
        ));
    }
    let plain = Rope { inv_freq: inv_freq(theta, dim), scale: 1.0 };
    let Some(fields) = fields else {
        return Ok(Rotation::Fixed(plain));
    };
    if fields.has("full_attention") || fields.has("sliding_attention") {
        return Err(Error::Unsupported("rope_parameters for each layer type".into()));
    }
    let original = || {
        // HF: a field beside the rope's own comes first, as Phi-3 has it.
        let inner = match heads.original {
            Some(original) => original,
            None => fields.size("original_max_position_embeddings", trained, WIDTH)?,
        };
        config.size("original_max_position_embeddings", inner, WIDTH)
    };
    Ok(match fields.text("rope_type", fields.text("type", "default")?)? {
        "default" => Rotation::Fixed(plain),
        "linear" => {
            let factor = fields.required_positive("factor")? as f32;
            Rotation::Fixed(Rope { inv_freq: plain.inv_freq.iter().map(|freq| freq / factor).collect(), scale: 1.0 })
        }
        "dynamic" => {
            if dim <= 2 {
                return Err(config.error("head_dim", heads.dim, "rope_type \"dynamic\" needs more than 2 dimensions that turn"));
            }
            Rotation::Dynamic { short: plain, theta, factor: at_least_one(fields)?, dim, trained }
        }
        "llama3" => Rotation::Fixed(Rope { inv_freq: llama3(fields, &plain.inv_freq, original()? as f64)?, scale: 1.0 }),
        // HF: Phi-3's first configs call it "su", or "yarn" with longrope's factors.
        "longrope" | "su" => longrope(fields, theta, dim, trained, original()?)?,
        "yarn" if fields.has("short_factor") => longrope(fields, theta, dim, trained, original()?)?,
        "yarn" => Rotation::Fixed(yarn(fields, theta, dim, trained as f64, original()? as f64)?),
        other => return Err(Error::Unsupported(format!("rope_type {other:?}; known: {KNOWN}"))),
    })
}

/// A stretch below 1 would take the dynamic base below zero.
fn at_least_one(fields: &Fields) -> Result<f64> {
    let factor = fields.required_positive("factor")?;
    if factor >= 1.0 { Ok(factor) } else { Err(fields.error("factor", factor, "a number from 1 is accepted")) }
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

/// LongRoPE, <https://arxiv.org/abs/2402.13753>: each pair is stretched by a number of its own, another one in long rows.
fn longrope(fields: &Fields, theta: f64, dim: usize, trained: usize, original: usize) -> Result<Rotation> {
    let factor = fields.optional_positive("factor", None)?.unwrap_or(trained as f64 / original as f64);
    let scale = match fields.optional_positive("attention_factor", None)? {
        Some(scale) => scale,
        None if factor <= 1.0 => 1.0,
        None if original < 2 => {
            return Err(fields.error("original_max_position_embeddings", original, "longrope needs at least 2"));
        }
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    let set = |name| -> Result<Rope> {
        let stretch = fields.positives(name, dim.div_ceil(2))?;
        let inv_freq = powers(theta, dim).zip(stretch).map(|(power, stretch)| 1.0 / (stretch as f32 * power)).collect();
        Ok(Rope { inv_freq, scale: scale as f32 })
    };
    Ok(Rotation::Long { short: set("short_factor")?, long: set("long_factor")?, original })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{rope as rope_of, *};
    use serde_json::{Value, json};

    const HEADS: Heads = Heads { dim: 8, partial: None, theta: 10_000.0, trained: 64, original: None };

    fn of(config: Value) -> Result<Rotation> {
        rope_of(&Fields::new(config.as_object().unwrap().clone()), HEADS)
    }

    #[track_caller]
    fn is(config: Value, inv_freq: [f32; 4], scale: f32) {
        assert_eq!(of(config).unwrap(), Rotation::Fixed(Rope { inv_freq: inv_freq.to_vec(), scale }));
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
    fn dynamic_follows_the_length() {
        let rope = of(json!({"rope_scaling": {"type": "dynamic", "factor": 3.0}})).unwrap();
        let at = |len: usize| rope.at(len).inv_freq.clone();
        assert_eq!(at(64), [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(at(65), [1.0, 0.09848461, 0.009699219, 0.00095522386]);
        assert_eq!(at(200), [1.0, 0.051374312, 0.0026393195, 0.00013559323]);
        assert_eq!(rope.crossing(), None);
        let message = of(json!({"rope_scaling": {"type": "dynamic", "factor": 0.5}})).unwrap_err().to_string();
        assert_eq!(message, "cannot load config.json: factor = 0.5: a number from 1 is accepted");
        let narrow = Fields::new(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}).as_object().unwrap().clone());
        assert!(rope_of(&narrow, Heads { dim: 2, ..HEADS }).is_err());
    }

    #[test]
    fn longrope() {
        let mut fields = json!({"rope_type": "longrope", "original_max_position_embeddings": 16});
        fields["short_factor"] = json!([1.0, 1.1, 1.3, 1.7]);
        fields["long_factor"] = json!([1.5, 2.5, 5.0, 9.0]);
        let rope = of(json!({"rope_scaling": fields})).unwrap();
        assert_eq!(rope.crossing(), Some(16));
        let short = Rope { inv_freq: vec![1.0, 0.09090909, 0.0076923077, 0.00058823527], scale: 1.2247449 };
        let long = Rope { inv_freq: vec![0.6666667, 0.04, 0.002, 0.00011111111], scale: 1.2247449 };
        assert_eq!([16, 17].map(|len| rope.at(len).into_owned()), [short, long]);
        let scale = |field: &str, value: f64| {
            let mut fields = fields.clone();
            fields[field] = json!(value);
            of(json!({"rope_parameters": fields})).unwrap().at(1).scale
        };
        assert_eq!((scale("factor", 8.0), scale("factor", 0.5), scale("attention_factor", 1.25)), (1.3228756, 1.0, 1.25));
        for kind in ["su", "yarn"] {
            fields["rope_type"] = json!(kind);
            assert_eq!(of(json!({"rope_scaling": fields})).unwrap(), rope);
        }
        fields["long_factor"] = json!([1.5, 2.5]);
        let message = of(json!({"rope_scaling": fields})).unwrap_err().to_string();
        assert_eq!(message, "cannot load config.json: long_factor = [1.5,2.5]: a list of 4 numbers is accepted");
    }

    #[test]
    fn heads_may_turn_in_part() {
        let part = |partial, config: Value| {
            let fields = Fields::new(config.as_object().unwrap().clone());
            rope_of(&fields, Heads { partial, theta: 500.0, ..HEADS }).map(|rope| rope.at(1).inv_freq.clone())
        };
        let frequencies = [1.0, 0.1259921, 0.01587401];
        assert_eq!(part(Some(0.75), json!({})).unwrap(), frequencies);
        assert_eq!(part(Some(1.0), json!({"partial_rotary_factor": 0.75})).unwrap(), frequencies);
        let nested = json!({"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}});
        assert_eq!(part(Some(1.0), nested.clone()).unwrap(), frequencies);
        assert_eq!(part(None, nested).unwrap().len(), 4);
        // 5 of 8 dimensions are 3 pairs.
        assert_eq!(part(Some(0.625), json!({})).unwrap().len(), 3);
        for partial in [0.1, 1.2] {
            assert!(part(Some(partial), json!({})).is_err());
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let message = |config| of(config).unwrap_err().to_string();
        assert_eq!(
            message(json!({"rope_scaling": {"type": "spiral", "factor": 2.0}})),
            r#"unsupported: rope_type "spiral"; known: default, linear, dynamic, llama3, yarn, longrope"#
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
        assert!(rope_of(&Fields::new(Default::default()), Heads { dim: 7, ..HEADS }).is_err());
    }
}
