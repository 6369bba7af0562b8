//! What happened at each step of a generation, for people to look at.

use crate::logits::{History, LogitsProcessor, Scores, pick};
use serde::Serialize;
use std::sync::Arc;

/// One step of one sequence.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Step {
    /// The chosen token.
    pub token: u32,
    /// Its probability by the model alone.
    pub prob: f32,
    /// Its probability after the processors, in the distribution that it was chosen from.
    pub processed: f32,
    /// The most likely tokens of both distributions, by the model's.
    pub top: Vec<Candidate>,
    /// What each processor did, in their order; last the mode, where it shapes scores itself.
    pub effects: Vec<Effect>,
}

/// A token that could have been chosen.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Candidate {
    /// The token.
    pub token: u32,
    /// Its probability by the model alone.
    pub prob: f32,
    /// Its probability after the processors; 0 if one of them removed it.
    pub processed: f32,
}

/// What one processor did at one step.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Effect {
    /// Its name, or the mode's.
    pub processor: String,
    /// How many tokens' scores it changed and left possible.
    pub changed: usize,
    /// How many tokens it made impossible.
    pub removed: usize,
    /// The most likely of those, by the model alone, with the model's probabilities.
    pub likeliest: Vec<(u32, f32)>,
    /// The token with the best score after it, if before it that was another.
    pub top: Option<u32>,
}

/// One beam of one step of a beam search: one that goes on, or one that ended here.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Beam {
    /// Its index among the beams that go on; none if it ended.
    pub beam: Option<usize>,
    /// The index of the beam of the step before that it continues.
    pub parent: usize,
    /// The token that it is continued by.
    pub token: u32,
    /// The sum of its log-probabilities; of one that ended, the score by which it is ranked.
    pub score: f32,
}

/// How many of the tokens that a processor removed are named.
const NAMED: usize = 5;

/// What looks at the steps of a row.
#[derive(Debug)]
pub(crate) struct Tracer {
    /// The processors, which are pure: running them again over a step's logits shows what each did, and a call that is not looked at
    /// pays nothing for it.
    pub processors: Vec<Arc<dyn LogitsProcessor>>,
    /// The mode's name.
    pub mode: &'static str,
    /// Whether the processors get log-probabilities.
    pub log_probs: bool,
    /// Alternatives of each distribution.
    pub count: usize,
}

impl Tracer {
    /// What happens at a step: `raw` are the model's logits, `processed` what the token was chosen from.
    pub fn step(&self, token: u32, history: &History<'_>, raw: &[f32], processed: &[f32]) -> Step {
        let (own, after) = (Distribution::of(raw), Distribution::of(processed));
        let mut tokens: Vec<u32> = [raw, processed].iter().flat_map(|scores| pick::top(scores, self.count)).map(|(id, _)| id).collect();
        tokens.sort_unstable();
        tokens.dedup();
        let candidate = |token| Candidate { token, prob: own.prob(token), processed: after.prob(token) };
        let mut top: Vec<_> = tokens.into_iter().map(candidate).collect();
        top.sort_by(|a, b| b.prob.total_cmp(&a.prob));
        Step { token, prob: own.prob(token), processed: after.prob(token), top, effects: self.effects(history, &own, processed) }
    }

    fn effects(&self, history: &History<'_>, own: &Distribution<'_>, processed: &[f32]) -> Vec<Effect> {
        let mut effects = Vec::with_capacity(self.processors.len());
        let mut scores = own.scores.to_vec();
        if self.log_probs {
            Scores::over(&mut scores, |scores| scores.log_softmax());
        }
        for processor in &self.processors {
            let before = scores.clone();
            // What failed here has failed in the call itself, which ends with that error.
            if processor.process(history, &mut scores).is_err() {
                break;
            }
            effects.push(Effect::new(processor.name(), &before, &scores, own));
        }
        if scores != processed {
            effects.push(Effect::new(self.mode, &scores, processed, own));
        }
        effects
    }
}

impl Effect {
    fn new(processor: &str, before: &[f32], after: &[f32], own: &Distribution<'_>) -> Self {
        let possible = |score: f32| score > f32::NEG_INFINITY;
        let pairs = || before.iter().zip(after);
        let lost: Vec<f32> = (pairs().zip(own.scores))
            .map(|((&before, &after), &raw)| if possible(before) && !possible(after) { raw } else { f32::NEG_INFINITY })
            .collect();
        let top = pick::argmax(after);
        Self {
            processor: processor.to_owned(),
            changed: pairs().filter(|&(&before, &after)| possible(after) && before != after).count(),
            removed: pairs().filter(|&(&before, &after)| possible(before) && !possible(after)).count(),
            likeliest: pick::top(&lost, NAMED).into_iter().map(|(id, _)| (id, own.prob(id))).collect(),
            top: top.filter(|_| top != pick::argmax(before)),
        }
    }
}

/// Scores with what makes probabilities of them.
struct Distribution<'a> {
    scores: &'a [f32],
    total: f64,
}

impl<'a> Distribution<'a> {
    fn of(scores: &'a [f32]) -> Self {
        Self { scores, total: pick::log_sum_exp(scores) }
    }

    fn prob(&self, token: u32) -> f32 {
        self.scores.get(token as usize).map_or(0.0, |&score| (f64::from(score) - self.total).exp() as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logits::{RepetitionPenalty, Suppress, Temperature, TopK};

    fn tracer(processors: Vec<Arc<dyn LogitsProcessor>>) -> Tracer {
        Tracer { processors, mode: "dola", log_probs: false, count: 2 }
    }

    #[test]
    fn a_step_tells_what_each_processor_did() {
        // probabilities 0.5, 0.25, 0.125, 0.125
        let raw = [8.0f32, 4.0, 2.0, 2.0].map(|weight: f32| (weight / 16.0).ln());
        let tracer = tracer(vec![
            Arc::new(Suppress { ids: vec![0] }),
            Arc::new(Temperature { temperature: 0.5 }),
            Arc::new(TopK { top_k: 1, min_tokens_to_keep: 1 }),
        ]);
        let history = History::new(&[1, 2], 1, 9);
        let mut processed = raw.to_vec();
        for processor in &tracer.processors {
            assert!(processor.process(&history, &mut processed).is_ok());
        }
        let step = tracer.step(1, &history, &raw, &processed);
        let close = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(close(step.prob, 0.25) && close(step.processed, 1.0));
        assert_eq!(step.top.iter().map(|candidate| candidate.token).collect::<Vec<_>>(), [0, 1]);
        assert!(close(step.top[0].prob, 0.5) && step.top[0].processed == 0.0);
        let effects: Vec<_> =
            step.effects.iter().map(|effect| (effect.processor.as_str(), effect.changed, effect.removed, effect.top)).collect();
        assert_eq!(effects, [("suppress_tokens", 0, 1, Some(1)), ("temperature", 3, 0, None), ("top_k", 0, 2, None)]);
        assert_eq!(step.effects[0].likeliest.len(), 1);
        assert!(step.effects[0].likeliest[0].0 == 0 && close(step.effects[0].likeliest[0].1, 0.5));
        assert_eq!(step.effects[2].likeliest.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn beams_give_their_processors_log_probabilities() {
        let penalty: Arc<dyn LogitsProcessor> = Arc::new(RepetitionPenalty { penalty: 4.0, scope: Default::default(), exempt: Vec::new() });
        let (raw, history) = ([3.0, 2.0], History::new(&[0], 1, 9));
        // A positive logit is divided and falls behind; its log-probability is multiplied, and falls too, but by another amount.
        let top = |log_probs| Tracer { log_probs, ..tracer(vec![penalty.clone()]) }.step(0, &history, &raw, &raw).effects[0].top;
        assert_eq!(top(false), Some(1));
        assert_eq!(top(true), None);
    }

    #[test]
    fn what_no_processor_did_the_mode_did() {
        let step = tracer(Vec::new()).step(0, &History::new(&[0], 1, 9), &[1.0, 2.0], &[1.0, f32::NEG_INFINITY]);
        assert_eq!(step.effects.len(), 1);
        assert_eq!((step.effects[0].processor.as_str(), step.effects[0].removed, step.effects[0].top), ("dola", 1, Some(0)));
    }

    #[test]
    fn tokens_beyond_the_scores_have_no_probability() {
        let step = tracer(Vec::new()).step(7, &History::new(&[0], 1, 9), &[0.0, f32::NEG_INFINITY], &[0.0, f32::NEG_INFINITY]);
        assert_eq!((step.prob, step.processed, step.top.len()), (0.0, 0.0, 1));
    }
}
