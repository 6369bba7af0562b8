//! DRY: makes the token that would continue a repetition less likely, the more the longer the repetition already is.

use super::{History, LogitsProcessor};
use crate::error::Result;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// What a repetition's next token pays (`dry_multiplier`, <https://github.com/oobabooga/text-generation-webui/pull/5677>):
/// `multiplier * base^(length - allowed_length)`, where the last `length` tokens stood before that token already.
#[derive(Debug, Clone)]
pub struct Dry {
    /// Above 0.
    pub multiplier: f32,
    /// At least 1.
    pub base: f32,
    /// Shorter repetitions are free; at least 1.
    pub allowed_length: usize,
    /// What no repetition reaches across.
    pub breakers: Breakers,
}

/// Where repetitions end.
#[derive(Debug, Clone, Default)]
pub struct Breakers {
    /// Ids whose text contains a breaker.
    pub tokens: Arc<HashSet<u32>>,
    /// Breakers that are several tokens.
    pub sequences: Vec<Vec<u32>>,
}

impl Breakers {
    fn is(&self, token: u32) -> bool {
        self.tokens.contains(&token)
    }

    /// How many tokens at the end are none, and end none.
    fn since(&self, tokens: &[u32]) -> usize {
        let ends = |len: usize| {
            let head = &tokens[..len];
            head.last().is_some_and(|&last| self.is(last)) || self.sequences.iter().any(|sequence| head.ends_with(sequence))
        };
        (1..=tokens.len()).rev().take_while(|&len| !ends(len)).count()
    }
}

impl LogitsProcessor for Dry {
    fn name(&self) -> &str {
        "dry_multiplier"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let tokens = history.tokens;
        let most = self.breakers.since(tokens);
        if most < self.allowed_length {
            return Ok(());
        }
        let mut longest: HashMap<u32, usize> = HashMap::new();
        for (back, length) in repeats(tokens, most).into_iter().enumerate().skip(1) {
            let next = tokens[tokens.len() - back];
            if length >= self.allowed_length && !self.breakers.is(next) {
                let longest = longest.entry(next).or_default();
                *longest = length.max(*longest);
            }
        }
        for (token, length) in longest {
            if let Some(score) = scores.get_mut(token as usize) {
                let over = (length - self.allowed_length) as f64;
                let penalty = f64::from(self.multiplier) * f64::from(self.base).powf(over);
                // Beyond all logits, yet not a ban: a row in which everything repeats can go on.
                *score -= penalty.min(1e30) as f32;
            }
        }
        Ok(())
    }
}

/// At `k`, how many tokens, `most` at the most, the beginning without its last `k` tokens ends with that the whole ends with
/// too. The Z-algorithm from behind: linear in the number of tokens.
fn repeats(tokens: &[u32], most: usize) -> Vec<usize> {
    let len = tokens.len();
    let at = |back: usize| tokens[len - 1 - back];
    let mut lengths = vec![0; len];
    let (mut start, mut end) = (0, 0);
    for k in 1..len {
        let known = if k < end { lengths[k - start].min(end - k) } else { 0 };
        let more = (known..most).take_while(|&i| k + i < len && at(i) == at(k + i)).count();
        lengths[k] = known + more;
        if k + lengths[k] > end {
            (start, end) = (k, k + lengths[k]);
        }
    }
    lengths
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn scores(dry: &Dry, tokens: &[u32]) -> Vec<f32> {
        let mut scores = vec![0.0; 10];
        dry.process(&History::new(tokens, 1, 100), &mut scores).unwrap();
        scores
    }

    fn dry(breakers: &[u32], sequences: &[&[u32]]) -> Dry {
        let tokens = Arc::new(breakers.iter().copied().collect());
        let sequences = sequences.iter().map(|sequence| sequence.to_vec()).collect();
        Dry { multiplier: 0.5, base: 2.0, allowed_length: 2, breakers: Breakers { tokens, sequences } }
    }

    #[test]
    fn the_longer_the_repetition_the_more_is_paid() {
        // 1 2 3 was followed by 4 and, for the last two tokens alone, by 5.
        let tokens = [1, 2, 3, 4, 2, 3, 5, 1, 2, 3];
        let found = scores(&dry(&[], &[]), &tokens);
        assert_eq!(found, [0.0, 0.0, 0.0, 0.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn nothing_reaches_across_a_breaker() {
        let tokens = [1, 2, 3, 4, 2, 3, 5, 1, 2, 3];
        assert_eq!(scores(&dry(&[2], &[]), &tokens), [0.0; 10], "one token is left, fewer than are allowed");
        assert_eq!(scores(&dry(&[1], &[]), &tokens)[4..6], [-0.5, -0.5]);
        assert_eq!(scores(&dry(&[4], &[]), &tokens)[4..6], [0.0, -0.5], "a breaker itself is free");
        assert_eq!(scores(&dry(&[], &[&[1, 2]]), &tokens), [0.0; 10]);
        assert_eq!(scores(&dry(&[], &[&[5, 1]]), &tokens)[4..6], [-0.5, -0.5]);
    }

    #[test]
    fn a_long_repetition_is_not_infinite() {
        let found = scores(&Dry { base: 1e30, ..dry(&[], &[]) }, &[7; 5000]);
        assert!(found[7].is_finite() && found[7] < -1e29);
        assert_eq!(scores(&dry(&[], &[]), &[7]), [0.0; 10]);
    }

    proptest! {
        #[test]
        fn repeats_are_what_they_are_by_definition(tokens in prop::collection::vec(0u32..3, 1..40), most in 0usize..12) {
            let len = tokens.len();
            let by_hand = |k: usize| (0..most).take_while(|&i| k + i < len && tokens[len - 1 - i] == tokens[len - 1 - k - i]).count();
            let found = repeats(&tokens, most);
            prop_assert!((1..len).all(|k| found[k] == by_hand(k)), "{found:?}");
        }
    }
}
