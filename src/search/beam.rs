//! Beam search, also with draws and in groups that avoid each other's tokens: the most likely sequences of each prompt.

use super::{
    Search, Turn,
    group::{Ground, Group, Rules},
    phrases::{Forced, check_room},
};
use crate::{
    config::Strategy,
    error::{Error, Result},
    output::{FinishReason, Piece},
    plan::Plan,
    rows::{Row, Shown},
    trace,
};
use std::{cmp::Ordering, collections::BTreeMap, mem};

/// The prompts under way.
#[derive(Default)]
pub(super) struct Beam {
    prompts: BTreeMap<usize, Prompt>,
    /// The beams of every step, if they are inspected.
    tree: Vec<Vec<trace::Beam>>,
}

/// The search of one prompt. It knows nothing of the others, so that a prompt in a batch is what it is alone.
struct Prompt {
    /// One, but in diverse search.
    groups: Vec<Group>,
    /// What a stream has been given of the sequence that will be the best.
    shown: Shown,
    num_return_sequences: usize,
}

impl Search for Beam {
    fn step(&mut self, turn: &mut Turn<'_>) -> Result<()> {
        let mut logits = turn.logits()?;
        let mut from = 0;
        for rows in by_prompt(mem::take(turn.rows)) {
            let logits = logits.part(from..from + rows.len());
            from += rows.len();
            let index = rows[0].prompt;
            let mut prompt = self.prompts.remove(&index).unwrap_or_else(|| Prompt::new(turn.plan, &rows[0]));
            let live = prompt.step(rows, logits, turn)?;
            if turn.plan.record.trace {
                self.tree.push(prompt.groups.iter_mut().flat_map(|group| mem::take(&mut group.grown)).collect());
            }
            if live.is_empty() {
                turn.rows.extend(prompt.finished()?);
            } else {
                turn.rows.extend(live);
                self.prompts.insert(index, prompt);
            }
        }
        Ok(())
    }

    /// A prompt begins as one row, whose candidates become its beams.
    // HF: there it begins as `num_beams` equal rows, of which all but the first have the score -1e9 and never win.
    fn width(&self, _: &Plan) -> usize {
        1
    }

    fn check(&self, tokens: &[u32], plan: &Plan) -> Result<()> {
        check_room(tokens, plan)
    }

    /// The best sequence comes as it becomes certain; the others come whole, when the prompt is done.
    fn pieces(&mut self, rows: &mut [Row]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for rows in rows.chunk_by_mut(|a, b| a.prompt == b.prompt) {
            match self.prompts.get_mut(&rows[0].prompt) {
                Some(prompt) => pieces.extend(prompt.piece(rows)),
                None => pieces.extend(rows.iter_mut().map(Row::piece)),
            }
        }
        pieces
    }

    fn tree(&mut self) -> Vec<Vec<trace::Beam>> {
        mem::take(&mut self.tree)
    }

    /// Beams, as they are, compete with what is finished.
    fn cancel(&mut self, rows: &mut Vec<Row>, plan: &Plan) -> Result<()> {
        for mut live in by_prompt(mem::take(rows)) {
            live.iter_mut().try_for_each(|row| row.end(FinishReason::Cancelled))?;
            let mut prompt = self.prompts.remove(&live[0].prompt).unwrap_or_else(|| Prompt::new(plan, &live[0]));
            let mut live = live.into_iter();
            prompt.groups.iter_mut().for_each(|group| group.close(&mut live, plan));
            rows.extend(prompt.finished()?);
        }
        Ok(())
    }
}

impl Prompt {
    /// `row` is the prompt.
    fn new(plan: &Plan, row: &Row) -> Self {
        let (groups, rules) = match plan.strategy {
            Strategy::DiverseBeam { num_beam_groups, .. } => (num_beam_groups, Rules::Scored),
            Strategy::ConstrainedBeam { .. } => (1, Rules::Scored),
            _ => (1, Rules::Ranked),
        };
        let size = plan.strategy.num_beams() / groups.max(1);
        Self {
            groups: (0..groups).map(|group| Group::new(size, group * size, rules, Forced::new(plan, row))).collect(),
            shown: Shown::default(),
            num_return_sequences: plan.num_return_sequences,
        }
    }

    /// The next beams of all groups; none once all are done.
    fn step(&mut self, rows: Vec<Row>, (logits, peaks): (&mut [f32], &[f32]), turn: &Turn<'_>) -> Result<Vec<Row>> {
        let begins = rows[0].generated().is_empty();
        let mut ground = Ground {
            plan: turn.plan,
            model: turn.model,
            started: turn.started,
            vocab_size: logits.len() / rows.len(),
            logits,
            peaks,
            shared: begins && self.groups.len() > 1,
            rows: rows.into_iter().map(Some).collect(),
            taken: Vec::new(),
        };
        let (mut live, mut from) = (Vec::new(), 0);
        for group in &mut self.groups {
            let beams = group.beams();
            live.extend(group.step(from, &mut ground)?);
            from += if begins { 0 } else { beams };
        }
        Ok(live)
    }

    /// What became certain of the sequence that will be the best: what everything that can still be returned begins with.
    fn piece(&mut self, rows: &[Row]) -> Option<Piece> {
        let (first, others) = rows.split_first()?;
        let mut kept: Vec<&Row> = self.groups.iter().rev().flat_map(Group::kept).collect();
        kept.sort_by(|a, b| best_first(a, b));
        kept.truncate(self.num_return_sequences);
        let piece = first.common_piece(others.iter().chain(kept), &mut self.shown);
        (!piece.text.is_empty() || !piece.tokens.is_empty()).then_some(Piece { row: first.prompt * self.num_return_sequences, ..piece })
    }

    /// What is returned, best first.
    // HF: where fewer sequences exist than were asked for, the reference fills up with bare prompts or forbidden tokens, scored -1e9 or
    // less; here only those that exist are returned.
    fn finished(self) -> Result<Vec<Row>> {
        let mut stuck = None;
        let mut rows = Vec::new();
        // HF: of equal scores the later group's comes first.
        for group in self.groups.into_iter().rev() {
            let (kept, error) = group.finished();
            rows.extend(kept);
            stuck = error.or(stuck);
        }
        rows.sort_by(best_first);
        rows.truncate(self.num_return_sequences);
        for (rank, row) in rows.iter_mut().enumerate() {
            row.number = row.prompt * self.num_return_sequences + rank;
        }
        match rows.first_mut() {
            Some(best) => best.shown = self.shown,
            None => return Err(stuck.unwrap_or_else(nothing_possible)),
        }
        Ok(rows)
    }
}

fn nothing_possible() -> Error {
    Error::Processor { processor: "model".into(), reason: "no token has a score above negative infinity".into() }
}

fn best_first(a: &Row, b: &Row) -> Ordering {
    let score = |row: &Row| row.score.unwrap_or(f32::NEG_INFINITY);
    score(b).total_cmp(&score(a))
}

/// The rows of each prompt, which stand together; never an empty part.
fn by_prompt(rows: Vec<Row>) -> Vec<Vec<Row>> {
    let mut parts: Vec<Vec<Row>> = Vec::new();
    for row in rows {
        match parts.last_mut() {
            Some(part) if part[0].prompt == row.prompt => part.push(row),
            _ => parts.push(vec![row]),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        config::GenerationConfig,
        model::{Cache, Feed, Forward, Model, ModelInfo, Start, Values, Want},
        search,
    };
    use std::time::{Duration, Instant};

    /// Logits that follow from all tokens of a row.
    struct Toy(ModelInfo);

    /// The tokens fed so far.
    #[derive(Clone)]
    struct Fed(Vec<u32>);

    impl Cache for Fed {
        fn len(&self) -> usize {
            self.0.len()
        }

        fn fork(&self) -> Box<dyn Cache> {
            Box::new(self.clone())
        }

        fn truncate(&mut self, len: usize) -> Result<()> {
            self.0.truncate(len);
            Ok(())
        }
    }

    impl Model for Toy {
        fn info(&self) -> &ModelInfo {
            &self.0
        }

        fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
            Ok(rows.iter().map(|_| Box::new(Fed(Vec::new())) as Box<dyn Cache>).collect())
        }

        fn forward(&self, rows: &mut [Feed<'_>], _: Want<'_>) -> Result<Forward> {
            let mut logits = Vec::new();
            for row in rows {
                let fed: &mut Fed = crate::model::downcast(row.cache)?;
                fed.0.extend(row.tokens);
                let state = fed.0.iter().fold(7u64, |state, &token| (state ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                logits.extend((0..self.0.vocab_size as u64).map(|id| (state.rotate_left(id as u32 * 5) >> 40) as f32 / 4e6));
            }
            Ok(Values::Host(logits).into())
        }
    }

    /// The rows of a call, each with tokens and score, and how many rows each step computed.
    fn searched(strategy: Strategy, config: &GenerationConfig, prompts: &[&[u32]]) -> (Vec<Row>, Vec<usize>) {
        let model = Toy(ModelInfo::new("toy", 12));
        let mut plan = Plan::new(config, &GenerationConfig::new(), model.info(), None).unwrap();
        plan.strategy = strategy;
        let mut search = search::new(&plan).unwrap();
        let mut rows = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let mut row = Row::new(prompt.to_vec(), None, Box::new(Fed(Vec::new())), &plan, None).unwrap();
            (row.prompt, row.number) = (index, index);
            rows.push(row);
        }
        let (mut done, mut widths) = (Vec::new(), Vec::new());
        while !rows.is_empty() {
            widths.push(rows.len());
            let mut forward = Duration::ZERO;
            let mut turn = Turn { rows: &mut rows, plan: &plan, model: &model, started: Instant::now(), forward: &mut forward };
            search.step(&mut turn).unwrap();
            done.extend(rows.extract_if(.., |row| row.finish.is_some()));
        }
        done.sort_by_key(|row| row.number);
        (done, widths)
    }

    #[test]
    fn one_beam_is_greedy_search() {
        let config = GenerationConfig::new().max_new_tokens(30).eos_token_id(3).repetition_penalty(1.0);
        let prompts: Vec<Vec<u32>> = (0..12).map(|seed| (0..seed % 4 + 1).map(|at| (seed * 5 + at) % 12).collect()).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let (greedy, _) = searched(Strategy::Greedy, &config, &prompts);
        let (beam, _) = searched(Strategy::Beam { num_beams: 1 }, &config.early_stopping(true), &prompts);
        assert!(greedy.iter().any(|row| row.finish == Some(FinishReason::Eos)));
        for (beam, greedy) in beam.iter().zip(&greedy) {
            assert_eq!((&beam.tokens, beam.finish, beam.prompt), (&greedy.tokens, greedy.finish, greedy.prompt));
        }
    }

    #[test]
    fn prompts_begin_as_one_row_and_leave_when_they_are_done() {
        let config = GenerationConfig::new().max_new_tokens(3).num_beams(5).num_return_sequences(2);
        let (rows, widths) = searched(Strategy::Beam { num_beams: 5 }, &config, &[&[1, 2], &[4]]);
        assert_eq!(widths, [2, 10, 10]);
        assert_eq!(rows.iter().map(|row| (row.number, row.prompt)).collect::<Vec<_>>(), [(0, 0), (1, 0), (2, 1), (3, 1)]);
        assert!(rows[0].score > rows[1].score && rows.iter().all(|row| row.cache.is_empty() && row.beam_indices.len() == 3));
    }

    #[test]
    fn an_exhaustive_search_finds_the_best() {
        // As many beams as there are sequences of two tokens.
        let config = GenerationConfig::new().max_new_tokens(2).num_beams(144).num_return_sequences(144).length_penalty(0.0);
        let (rows, _) = searched(Strategy::Beam { num_beams: 144 }, &config, &[&[1, 2]]);
        assert_eq!(rows.len(), 144, "12 beams, each with 12 tokens");
        let total: f32 = rows.iter().map(|row| row.score.unwrap().exp()).sum();
        assert!((total - 1.0).abs() < 1e-5, "{total}");
        assert!(rows.windows(2).all(|pair| pair[0].score >= pair[1].score && pair[0].tokens != pair[1].tokens));
    }
}
