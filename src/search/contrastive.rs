//! Contrastive search: of the most likely tokens the one whose state is least like those before it.

use super::{Search, Turn, compute, feed, host};
use crate::{
    error::{Error, Result},
    logits::pick,
    model::{Cache, Feed, Forward, Want},
    rows::Row,
};
use std::{collections::HashMap, iter::once, mem::take, slice};

/// Contrastive search (<https://arxiv.org/abs/2202.06417>).
pub(super) struct Contrastive {
    alpha: f64,
    top_k: usize,
    /// Numbers of a state; 0 before the first.
    width: usize,
    /// By the prompts' indices: a prompt has one row.
    contexts: HashMap<usize, Context>,
}

/// What a row remembers beside its cache.
#[derive(Default)]
struct Context {
    /// The states of all its tokens, each of length 1.
    states: Vec<f32>,
    /// The logits after its last token.
    logits: Vec<f32>,
}

/// What a row may go on with.
struct Choice {
    raw: Option<Vec<f32>>,
    scores: Vec<f32>,
    /// Ids and probabilities, best first.
    candidates: Vec<(u32, f32)>,
    /// The caches of all candidates but the first, which has the row's.
    caches: Vec<Box<dyn Cache>>,
}

impl Search for Contrastive {
    fn step(&mut self, turn: &mut Turn<'_>) -> Result<()> {
        self.begin(turn)?;
        let mut choices = turn.rows.iter().map(|row| self.candidates(turn, row)).collect::<Result<Vec<_>>>()?;

        let mut feeds = Vec::new();
        for (row, choice) in turn.rows.iter_mut().zip(&mut choices) {
            let caches = once(&mut row.cache).chain(&mut choice.caches);
            let tokens = choice.candidates.iter().map(|(id, _)| slice::from_ref(id));
            feeds.extend(tokens.zip(caches).map(|(tokens, cache)| Feed { tokens, cache: cache.as_mut() }));
        }
        let (count, vocab_size) = (feeds.len(), turn.model.info().vocab_size);
        let forward = compute(turn.model, &mut feeds, Want::Hidden, turn.forward)?;
        let logits = host(forward.logits, count, vocab_size)?;
        let states = self.states(forward.hidden.into_host()?, count)?;

        let mut first = 0;
        for (row, choice) in turn.rows.iter_mut().zip(choices) {
            let Choice { raw, scores, candidates, caches } = choice;
            let states = &states[first * self.width..][..candidates.len() * self.width];
            let context = self.contexts.entry(row.prompt).or_default();
            let chosen = choose(self.alpha, &candidates, states, &context.states, self.width);
            context.states.extend_from_slice(&states[chosen * self.width..][..self.width]);
            context.logits = logits[(first + chosen) * vocab_size..][..vocab_size].to_vec();
            first += candidates.len();
            if let Some(cache) = chosen.checked_sub(1).and_then(|other| caches.into_iter().nth(other)) {
                row.cache = cache;
            }
            let token = candidates[chosen].0;
            row.record(token, &turn.plan.record, raw.as_deref(), &scores);
            row.push(token, turn.plan, turn.started)?;
            if row.finish.is_some() {
                self.contexts.remove(&row.prompt);
            }
        }
        Ok(())
    }

    fn prefill(&self) -> Want<'static> {
        Want::Hidden
    }

    fn read(&mut self, parts: &[(usize, usize)], forward: Forward) -> Result<()> {
        let states = self.states(forward.hidden.into_host()?, parts.iter().map(|(_, count)| count).sum())?;
        let mut rest = states.as_slice();
        for &(prompt, count) in parts {
            let (own, others) = rest.split_at(count * self.width);
            self.contexts.entry(prompt).or_default().states.extend_from_slice(own);
            rest = others;
        }
        Ok(())
    }
}

impl Contrastive {
    pub fn new(alpha: f64, top_k: usize) -> Self {
        Self { alpha, top_k, width: 0, contexts: HashMap::new() }
    }

    /// Computes what is left of the prompts of new rows.
    fn begin(&mut self, turn: &mut Turn<'_>) -> Result<()> {
        let mut fresh: Vec<_> = turn.rows.iter_mut().filter(|row| !self.contexts.get(&row.prompt).is_some_and(Context::begun)).collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let parts: Vec<_> = fresh.iter().map(|row| (row.prompt, row.pending().len())).collect();
        let mut feeds: Vec<_> = fresh.iter_mut().map(|row| feed(row)).collect();
        let mut forward = compute(turn.model, &mut feeds, Want::Hidden, turn.forward)?;
        let vocab_size = turn.model.info().vocab_size;
        let logits = host(take(&mut forward.logits), parts.len(), vocab_size)?;
        self.read(&parts, forward)?;
        for (row, logits) in fresh.iter().zip(logits.chunks_exact(vocab_size)) {
            let context = self.contexts.entry(row.prompt).or_default();
            if row.cache.len() != row.tokens.len() || context.states.len() != row.tokens.len() * self.width {
                return Err(Error::Unsupported("contrastive search with a model whose cache does not keep what it was fed".into()));
            }
            context.logits = logits.to_vec();
        }
        Ok(())
    }

    // HF: forbidden tokens fill up the candidates there where fewer than `top_k` are possible, and can win by being unlike the rest;
    // here they are none.
    fn candidates(&mut self, turn: &Turn<'_>, row: &Row) -> Result<Choice> {
        let mut scores = self.contexts.get_mut(&row.prompt).map(|context| take(&mut context.logits)).unwrap_or_default();
        let raw = turn.plan.record.needs_raw().then(|| scores.clone());
        turn.process(row, &mut scores)?;
        let candidates = pick::likely(&scores, self.top_k);
        let caches = candidates.iter().skip(1).map(|_| row.cache.fork()).collect();
        Ok(Choice { raw, scores, candidates, caches })
    }

    /// The states of `count` tokens, each brought to length 1.
    fn states(&mut self, mut states: Vec<f32>, count: usize) -> Result<Vec<f32>> {
        let width = states.len() / count.max(1);
        if width == 0 || states.len() != width * count || (self.width != 0 && self.width != width) {
            return Err(Error::Unsupported(format!(
                "contrastive search needs hidden states; the model returned {} numbers for {count} tokens",
                states.len()
            )));
        }
        self.width = width;
        for state in states.chunks_exact_mut(width) {
            let norm = dot(state, state).sqrt();
            if norm > 0.0 {
                state.iter_mut().for_each(|value| *value /= norm);
            }
        }
        Ok(states)
    }
}

impl Context {
    /// Whether the whole prompt was computed.
    fn begun(&self) -> bool {
        !self.logits.is_empty()
    }
}

/// The index of the candidate with the best score: its probability against its largest similarity to what came before.
fn choose(alpha: f64, candidates: &[(u32, f32)], states: &[f32], context: &[f32], width: usize) -> usize {
    let mut nearest = vec![f32::NEG_INFINITY; candidates.len()];
    for past in context.chunks_exact(width) {
        for (nearest, state) in nearest.iter_mut().zip(states.chunks_exact(width)) {
            *nearest = nearest.max(dot(past, state));
        }
    }
    let (mut chosen, mut best) = (0, f32::NEG_INFINITY);
    for (index, ((_, probability), nearest)) in candidates.iter().zip(nearest).enumerate() {
        let score = (1.0 - alpha) as f32 * probability - alpha as f32 * nearest;
        if score > best {
            (chosen, best) = (index, score);
        }
    }
    chosen
}

/// In 16 lanes, so that it vectorises; always in the same order.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}
