//! Classifier-free guidance: what the model says after the prompt, away from what it says without it.

use super::{History, LogitsProcessor, softmax::Softmax};
use crate::error::{Error, Result};

/// Mixes the log-probabilities with those of the row's second context (`guidance_scale`, <https://arxiv.org/abs/2306.17806>).
#[derive(Debug, Clone, Copy)]
pub struct Guidance {
    /// 1 is the row's own distribution, 0 the second context's; above 1 leads further away from the latter.
    pub guidance_scale: f32,
}

impl LogitsProcessor for Guidance {
    fn name(&self) -> &str {
        "guidance_scale"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let unconditional = history.unconditional;
        if unconditional.len() != scores.len() {
            let reason = format!("the second context has {} logits, {} are needed", unconditional.len(), scores.len());
            return Err(Error::Processor { processor: self.name().into(), reason });
        }
        let (Some(own), Some(other)) = (Softmax::of(scores), Softmax::of(unconditional)) else {
            // HF: logits without a distribution make every score NaN there too, which remove_invalid_values can repair.
            scores.fill(f32::NAN);
            return Ok(());
        };
        for (score, &unconditional) in scores.iter_mut().zip(unconditional) {
            let unconditional = other.log_probability(unconditional);
            *score = self.guidance_scale * (own.log_probability(*score) - unconditional) + unconditional;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{super::processed, *};

    // transformers 5.23.0, UnbatchedClassifierFreeGuidanceLogitsProcessor with a model that returns `OTHER`.
    const OWN: [f32; 4] = [1.0, 2.0, -0.5, 0.0];
    const OTHER: [f32; 4] = [0.5, 0.0, 1.0, -1.0];

    const EXPECTED: [(f32, [f32; 4]); 4] = [
        (0.0, [-1.2465672, -1.7465672, -0.7465672, -2.7465672]),
        (0.5, [-1.3536704, -1.1036704, -1.8536704, -2.6036704]),
        (1.5, [-1.5678766, 0.1821234, -4.0678763, -2.3178766]),
        (3.0, [-1.8891859, 2.110_814, -7.389_186, -1.8891859]),
    ];

    fn guided(guidance_scale: f32) -> Vec<f32> {
        let history = History { unconditional: &OTHER, ..History::new(&[1, 2], 2, 9) };
        processed(&Guidance { guidance_scale }, &history, &OWN)
    }

    #[test]
    fn literal_values() {
        for (scale, expected) in EXPECTED {
            for (found, expected) in guided(scale).into_iter().zip(expected) {
                assert!((found - expected).abs() < 1e-6, "{scale}: {found} for {expected}");
            }
        }
    }

    #[test]
    fn what_has_no_distribution_is_told() {
        let history = History { unconditional: &[f32::NAN, 0.0], ..History::new(&[1, 2], 2, 9) };
        let scores = processed(&Guidance { guidance_scale: 2.0 }, &history, &[0.0, 1.0]);
        assert!(scores.iter().all(|score| score.is_nan()));
        let error = Guidance { guidance_scale: 2.0 }.process(&History::new(&[1], 1, 9), &mut [0.0, 1.0]).unwrap_err();
        assert_eq!(error.to_string(), "logits processor guidance_scale: the second context has 0 logits, 2 are needed");
    }
}
