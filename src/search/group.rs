//! A group of beams that compete with each other: its candidates, which of them become beams, and when it is done.

use super::{
    each,
    hypotheses::{Hypotheses, penalised},
    phrases::{Forced, Progress},
};
use crate::{
    config::{EarlyStopping, Strategy},
    error::{Error, Result},
    logits::{self, History, Scores, pick},
    model::{Model, PEAK},
    output::FinishReason,
    plan::Plan,
    rows::Row,
    trace::Beam,
};
use std::{iter::repeat_n, mem, time::Instant};

/// The beams of a prompt, or in diverse search a part of them.
pub(super) struct Group {
    size: usize,
    /// Beams of the groups before it.
    offset: usize,
    rules: Rules,
    /// The beams' scores, sums of log-probabilities, best first; none once the group is done.
    scores: Vec<f32>,
    kept: Hypotheses,
    forced: Option<Forced>,
    /// Why beams could not go on.
    stuck: Option<Error>,
    /// What the last step brought forth, if that is inspected.
    pub grown: Vec<Beam>,
}

/// What is decided differently by two generations of transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rules {
    /// Since 4.50: candidates that end, for whatever reason, are kept if they are among the first `size`. The group is done when its
    /// best beam cannot beat what is kept.
    Ranked,
    /// Its scorers before: beams that end by length or time alone are kept whatever their rank, unless the group is done. It is done
    /// when the best candidate, even one that ended, does not beat what is kept.
    Scored,
}

/// A row that ended with a step.
struct Ended {
    row: Row,
    score: f32,
    /// Whether it has all forced phrases.
    complete: bool,
}

/// What the groups of a prompt work with during one step.
pub(super) struct Ground<'a> {
    pub plan: &'a Plan,
    pub model: &'a dyn Model,
    pub started: Instant,
    pub vocab_size: usize,
    /// The prompt's rows, each until its last child takes it.
    pub rows: Vec<Option<Row>>,
    /// The model's logits after each row, which become what processors make of them.
    pub logits: &'a mut [f32],
    /// The largest of each block of them; none if they are not known.
    pub peaks: &'a [f32],
    /// Whether all groups begin with the same row.
    pub shared: bool,
    /// The tokens that the groups chose so far.
    pub taken: Vec<u32>,
}

/// Tokens with their scores, best first.
type Best = Vec<(u32, f32)>;

/// A token that may continue a beam.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub beam: usize,
    pub token: u32,
    pub score: f32,
    /// Its place in the order of scores, or of draws.
    pub rank: usize,
}

impl Group {
    pub fn new(size: usize, offset: usize, rules: Rules, forced: Option<Forced>) -> Self {
        Self { size, offset, rules, scores: vec![0.0], kept: Hypotheses::default(), forced, stuck: None, grown: Vec::new() }
    }

    /// The number of its beams.
    pub fn beams(&self) -> usize {
        self.scores.len()
    }

    /// What is finished, best first.
    pub fn kept(&self) -> &[Row] {
        self.kept.rows()
    }

    /// What is finished, and why there is not more of it.
    pub fn finished(self) -> (Vec<Row>, Option<Error>) {
        (self.kept.into_rows(), self.stuck)
    }

    /// Its next beams, of which row `from` is the first now; none once it is done.
    pub fn step(&mut self, from: usize, ground: &mut Ground<'_>) -> Result<Vec<Row>> {
        let plan = ground.plan;
        if self.scores.is_empty() {
            // HF: a group that is done chooses padding, which the groups after it avoid.
            if let Some(pad) = plan.beams.pad {
                ground.taken.extend(repeat_n(pad, self.size));
            }
            return Ok(Vec::new());
        }
        let scores = from * ground.vocab_size..(from + self.scores.len()) * ground.vocab_size;
        let blocks = ground.vocab_size.div_ceil(PEAK);
        let peaks = from * blocks..(from + self.scores.len()) * blocks;
        let raw = plan.record.needs_raw().then(|| ground.logits[scores.clone()].to_vec());
        let mut own = ground.shared.then(|| ground.logits[scores.clone()].to_vec());
        let best = self.process(
            (own.as_deref_mut().unwrap_or(&mut ground.logits[scores.clone()]), ground.peaks.get(peaks).unwrap_or_default()),
            &ground.rows[from..],
            &ground.taken,
            plan,
            ground.model,
        )?;
        let processed = own.as_deref().unwrap_or(&ground.logits[scores]);
        let mut candidates = self.candidates(processed, best, from, ground);
        let best = candidates.first().map(|candidate| candidate.score);
        if let Some(forced) = &self.forced {
            let score = |beam: usize, token: u32| processed[beam * ground.vocab_size + token as usize] + self.scores[beam];
            candidates = forced.choose(candidates, self.size, plan, score);
        }
        let (mut live, mut late, mut broken, mut states) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        self.scores.clear();
        let mut uses = vec![0; self.size];
        candidates.iter().for_each(|candidate| uses[candidate.beam] += 1);
        for Candidate { beam, token, score, rank } in candidates {
            uses[beam] -= 1;
            let slots = self.size - live.len() - late.len();
            if slots == 0 && rank >= self.size {
                continue;
            }
            let parent = &mut ground.rows[from + beam];
            let Some(mut child) = (if uses[beam] == 0 && !ground.shared { parent.take() } else { parent.clone() }) else { continue };
            let at = beam * ground.vocab_size..(beam + 1) * ground.vocab_size;
            child.record(token, &plan.record, raw.as_ref().map(|raw| &raw[at.clone()]), &processed[at]);
            // HF: groups look their indices up in the first group's there; here they count all beams of the prompt.
            child.beam_indices.push(self.offset + beam);
            child.push(token, plan, ground.started)?;
            let state = self.forced.as_ref().map(|forced| forced.after(beam, token));
            let complete = state.as_ref().is_none_or(Progress::complete);
            match child.finish {
                None if slots > 0 => {
                    ground.taken.push(token);
                    self.grow(Some(self.offset + live.len()), &child, score, plan);
                    self.scores.push(score);
                    live.push(child);
                    states.extend(state);
                }
                Some(FinishReason::Length | FinishReason::Time) if self.rules == Rules::Scored => {
                    ground.taken.push(token);
                    late.push(Ended { row: child, score, complete });
                }
                // HF: what ends without all phrases is dropped.
                Some(_) if rank < self.size && complete => self.keep(child, score, plan),
                Some(_) if rank < self.size => broken.push(Ended { row: child, score, complete }),
                _ => {}
            }
        }
        if let Some(forced) = &mut self.forced {
            forced.go_on(states);
        }
        if live.is_empty() && late.is_empty() && self.kept.rows().is_empty() {
            // HF: where the end is forced on beams that lack a phrase, they go on with forbidden tokens there.
            late = broken;
        }
        if self.done(best, live.first().or(late.first().map(|ended| &ended.row)), plan) {
            live.clear();
        } else {
            self.keep_late(late, plan);
        }
        if live.is_empty() {
            self.scores.clear();
        }
        Ok(live)
    }

    /// Ends its beams, the next of `rows`, as they are.
    pub fn close(&mut self, rows: &mut impl Iterator<Item = Row>, plan: &Plan) {
        let scores = mem::take(&mut self.scores).into_iter().enumerate();
        let complete = |beam| self.forced.as_ref().is_none_or(|forced| forced.complete(beam));
        let late = scores.zip(rows).map(|((beam, score), row)| Ended { row, score, complete: complete(beam) }).collect();
        self.keep_late(late, plan);
    }

    // HF: where fewer than `num_return_sequences` of the last beams have all phrases, those that lack some compete too, and may win
    // over sequences that ended before with all of them.
    fn keep_late(&mut self, late: Vec<Ended>, plan: &Plan) {
        let enough = late.iter().filter(|ended| ended.complete).count() >= plan.num_return_sequences;
        for Ended { row, score, .. } in late.into_iter().filter(|ended| ended.complete || !enough) {
            self.keep(row, score, plan);
        }
    }

    /// Makes the logits after each of `rows` processed log-probabilities; of each the best, so many as are looked at.
    fn process(
        &mut self,
        (logits, peaks): (&mut [f32], &[f32]),
        rows: &[Option<Row>],
        taken: &[u32],
        plan: &Plan,
        model: &dyn Model,
    ) -> Result<Vec<Best>> {
        let size = logits.len() / self.scores.len();
        let histories = rows.iter().flatten().map(|row| History { taken, ..row.history() });
        let mut peaks = peaks.chunks(size.div_ceil(PEAK));
        let scores = logits.chunks_exact_mut(size).map(|scores| Scores::known(scores, peaks.next().unwrap_or_default()));
        let beams = histories.zip(scores).collect();
        let count = if let Strategy::BeamSample { .. } = plan.strategy { 0 } else { self.looked_at(plan) };
        let results = each(model, plan, beams, |(history, mut scores)| {
            if !scores.log_softmax() && scores.values().iter().any(|&score| score != f32::NEG_INFINITY) {
                // HF: one logit that is not a number leaves no log-probability; remove_invalid_values then makes all of them 0.
                scores.values_mut().fill(f32::NAN);
            }
            let result = match logits::run(&plan.processors, &history, &mut scores) {
                // HF: a beam without a possible token is left behind while others go on.
                Err(error) if scores.values().iter().all(|&score| score == f32::NEG_INFINITY) => Ok((Vec::new(), Some(error))),
                result => result.map(|()| (scores.top(count), None)),
            };
            // Others read them.
            scores.values();
            result
        })?;
        let (best, stuck): (_, Vec<_>) = results.into_iter().unzip();
        self.stuck = stuck.into_iter().flatten().next_back().or(self.stuck.take());
        Ok(best)
    }

    /// Candidates of a step.
    // HF: so many that `size` are left when every beam ends in every possible way.
    fn looked_at(&self, plan: &Plan) -> usize {
        let ends = plan.eos.len() + plan.stop_token_ids.len();
        self.size.saturating_mul(2.max(1 + ends))
    }

    /// What may continue the beams, best first; only what can become a beam or be kept.
    fn candidates(&self, processed: &[f32], best: Vec<Best>, from: usize, ground: &Ground<'_>) -> Vec<Candidate> {
        let plan = ground.plan;
        let count = self.looked_at(plan);
        let Some(row) = ground.rows[from..].iter().flatten().next() else { return Vec::new() };
        let mut candidates: Vec<Candidate> = if let Strategy::BeamSample { .. } = plan.strategy {
            // HF: softmax over what all beams have in sum, without replacement; the order of draws decides what is kept.
            let beams = self.scores.iter().zip(processed.chunks_exact(ground.vocab_size));
            let mut sums: Vec<f32> = beams.flat_map(|(sum, scores)| scores.iter().map(move |score| score + sum)).collect();
            let first = (row.generated().len() as u64).wrapping_mul(count as u64);
            let draw = |draw: u64| {
                let at = pick::sample(&sums, pick::uniform(row.seed, first.wrapping_add(draw)))? as usize;
                let score = mem::replace(&mut sums[at], f32::NEG_INFINITY);
                Some((at / ground.vocab_size, (at % ground.vocab_size) as u32, score))
            };
            (0..count as u64).map_while(draw).enumerate().map(Candidate::new).collect()
        } else {
            let beams = self.scores.iter().zip(best).enumerate();
            let mut best: Vec<_> =
                beams.flat_map(|(beam, (sum, best))| best.into_iter().map(move |(token, score)| (beam, token, score + sum))).collect();
            best.sort_by(|a, b| b.2.total_cmp(&a.2));
            best.truncate(count);
            best.into_iter().enumerate().map(Candidate::new).collect()
        };
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.needed(&mut candidates, row, plan);
        candidates
    }

    /// Drops candidates that are sure to be of no use, so that fewer rows are forked.
    fn needed(&self, candidates: &mut Vec<Candidate>, row: &Row, plan: &Plan) {
        let watched = !plan.stops.is_empty() || !plan.criteria.is_empty() || plan.max_time.is_some();
        if watched {
            return;
        }
        let last = self.rules == Rules::Ranked && row.tokens.len() + 1 >= row.max_length;
        let mut live = 0;
        candidates.retain(|candidate| {
            if last || plan.eos.contains(&candidate.token) || plan.stop_token_ids.contains(&candidate.token) {
                return candidate.rank < self.size;
            }
            live += 1;
            live <= self.size
        });
    }

    fn keep(&mut self, row: Row, score: f32, plan: &Plan) {
        let score = penalised(score, row.generated().len(), plan.beams.length_penalty);
        self.grow(None, &row, score, plan);
        self.kept.add(row, score, self.size);
    }

    fn grow(&mut self, beam: Option<usize>, row: &Row, score: f32, plan: &Plan) {
        if plan.record.trace
            && let (Some(&parent), Some(&token)) = (row.beam_indices.last(), row.tokens.last())
        {
            self.grown.push(Beam { beam, parent, token, score });
        }
    }

    /// Whether nothing better is to be expected. `best` is the best candidate of the step, `row` one of the next beams.
    fn done(&self, best: Option<f32>, row: Option<&Row>, plan: &Plan) -> bool {
        let Some(row) = row else { return true };
        let Some(worst) = self.kept.worst(self.size) else { return false };
        let beams = &plan.beams;
        let generated = match beams.early_stopping {
            EarlyStopping::When(true) => return true,
            // HF: longer sequences may win then, so the longest is what is hoped for.
            EarlyStopping::Never if beams.length_penalty > 0.0 => row.max_length - row.prompt_len,
            _ => row.generated().len(),
        };
        let hope = match self.rules {
            Rules::Ranked => self.scores.first().copied(),
            Rules::Scored => best,
        };
        hope.is_none_or(|hope| penalised(hope, generated, beams.length_penalty) <= worst)
    }
}

impl Candidate {
    fn new((rank, (beam, token, score)): (usize, (usize, u32, f32))) -> Self {
        Self { beam, token, score, rank }
    }
}
