//! Greedy search and sampling with drafts: one pass checks several tokens of every row, and a row keeps those that it would have
//! chosen itself (<https://arxiv.org/abs/2211.17192>).

use super::{
    Search, Turn, compute,
    draft::{Drafted, Drafter},
    host,
};
use crate::{
    error::{Error, Result},
    logits::pick,
    model::{Feed, Want},
    plan::Draft,
};

/// Lanes of a step's draws beside that of plain sampling, which serves wherever a token is drawn from the model alone.
pub(super) const DRAFT: u64 = 1;
const ACCEPT: u64 = 2;
const REDRAW: u64 = 3;

pub(super) struct Speculative {
    drafter: Drafter,
    /// Whether tokens are drawn.
    sample: bool,
}

impl Speculative {
    pub fn new(draft: &Draft, sample: bool) -> Self {
        Self { drafter: Drafter::new(draft, sample), sample }
    }
}

impl Search for Speculative {
    fn step(&mut self, turn: &mut Turn<'_>) -> Result<()> {
        turn.ready()?;
        let drafts = self.drafter.draft(turn)?;
        let mut logits = check(turn, &drafts)?;
        let mut rest = logits.as_mut_slice();
        for (index, draft) in drafts.iter().enumerate() {
            let (own, others) = rest.split_at_mut((draft.tokens.len() + 1) * turn.model.info().vocab_size);
            self.accept(turn, index, draft, own)?;
            rest = others;
        }
        Ok(())
    }
}

/// The logits after each row's pending tokens and after every token of its draft, row after row, from one pass.
fn check(turn: &mut Turn<'_>, drafts: &[Drafted]) -> Result<Vec<f32>> {
    let tokens: Vec<Vec<u32>> = turn.rows.iter().zip(drafts).map(|(row, draft)| [row.pending(), &draft.tokens].concat()).collect();
    let counts: Vec<usize> = drafts.iter().map(|draft| draft.tokens.len() + 1).collect();
    let rows = turn.rows.iter_mut().zip(&tokens);
    let mut feeds: Vec<_> = rows.map(|(row, tokens)| Feed { tokens, cache: row.cache.as_mut() }).collect();
    let forward = compute(turn.model, &mut feeds, Want::Each(&counts), turn.forward)?;
    host(forward.logits, counts.iter().sum(), turn.model.info().vocab_size)
}

impl Speculative {
    /// Pushes the row's own tokens, one after another as plain decoding does, for as long as they are those of its draft.
    fn accept(&mut self, turn: &mut Turn<'_>, index: usize, draft: &Drafted, logits: &mut [f32]) -> Result<()> {
        let record = turn.plan.record;
        let mut matches = 0;
        for (place, scores) in logits.chunks_exact_mut(turn.model.info().vocab_size).enumerate() {
            let raw = record.needs_raw().then(|| scores.to_vec());
            turn.process(&turn.rows[index], scores)?;
            let row = &mut turn.rows[index];
            let token = self.choose(scores, draft, place, row.seed, row.generated().len() as u64)?;
            row.record(token, &record, raw.as_deref(), scores);
            row.push(token, turn.plan, turn.started)?;
            if draft.tokens.get(place) != Some(&token) {
                break;
            }
            matches += 1;
            if row.finish.is_some() {
                break;
            }
        }
        let row = &mut turn.rows[index];
        row.drafted += draft.tokens.len();
        row.accepted += matches;
        if row.finish.is_none() {
            // The last token is pending; what follows it in the cache was not kept.
            let len = row.tokens.len() - 1;
            if row.cache.len() > len {
                row.cache.truncate(len)?;
            }
            self.drafter.learn(row.number, len, draft, matches)?;
        }
        Ok(())
    }

    fn choose(&self, scores: &[f32], draft: &Drafted, place: usize, seed: u64, step: u64) -> Result<u32> {
        let draw = |lane| pick::uniform_of(seed, lane, step);
        let token = match (draft.tokens.get(place), draft.scores.get(place)) {
            _ if !self.sample => pick::argmax(scores),
            (Some(&token), Some(proposal)) => pick::correct(scores, proposal, token, draw(ACCEPT), draw(REDRAW)),
            // A draft without scores is no draw: the row's own draw agrees with it or not.
            _ => pick::sample(scores, pick::uniform(seed, step)),
        };
        token.ok_or_else(|| Error::Processor { processor: "model".into(), reason: "no token has a score above negative infinity".into() })
    }
}
