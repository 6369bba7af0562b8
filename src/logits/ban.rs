//! Processors that forbid or force tokens.

use super::{History, LogitsProcessor};
use crate::error::{Error, Result};
use std::sync::Arc;

/// No n-gram twice in the history (`no_repeat_ngram_size`, <https://arxiv.org/abs/1705.04304>).
#[derive(Debug, Clone)]
pub struct NoRepeatNgram {
    /// The size `n`, at least 1.
    pub size: usize,
}

/// No n-gram of the source (`encoder_no_repeat_ngram_size`).
#[derive(Debug, Clone)]
pub struct EncoderNoRepeatNgram {
    /// The size `n`, at least 1.
    pub size: usize,
}

/// Token sequences that must not appear (`bad_words_ids`).
#[derive(Debug, Clone)]
pub struct BadWords {
    /// The sequences. The end tokens alone are not in it.
    pub words: Vec<Vec<u32>>,
}

/// No end before the row has a length (`min_length`).
#[derive(Debug, Clone)]
pub struct MinLength {
    /// Prompt and generated tokens.
    pub min_length: usize,
    /// The ids that end a row.
    pub eos: Vec<u32>,
}

/// No end before some tokens were generated (`min_new_tokens`).
#[derive(Debug, Clone)]
pub struct MinNewTokens {
    /// Generated tokens.
    pub min_new_tokens: usize,
    /// The ids that end a row.
    pub eos: Vec<u32>,
}

/// From the prompt's index and the row's ids to the ids that may follow.
pub type PrefixFunction = Arc<dyn Fn(usize, &[u32]) -> Vec<u32> + Send + Sync>;

/// Only the tokens that a function allows (`prefix_allowed_tokens_fn`, <https://arxiv.org/abs/2010.00904>).
#[derive(Clone)]
pub struct PrefixAllowed {
    /// The function.
    pub function: PrefixFunction,
}

/// The first token after a single one (`forced_bos_token_id`).
#[derive(Debug, Clone)]
pub struct ForcedBos {
    /// The forced id.
    pub id: u32,
}

/// The last token (`forced_eos_token_id`).
#[derive(Debug, Clone)]
pub struct ForcedEos {
    /// The ids that stay possible, each with score 0.
    pub ids: Vec<u32>,
}

/// Tokens never chosen (`suppress_tokens`).
#[derive(Debug, Clone)]
pub struct Suppress {
    /// The ids.
    pub ids: Vec<u32>,
}

/// Tokens not chosen first (`begin_suppress_tokens`).
#[derive(Debug, Clone)]
pub struct SuppressAtBegin {
    /// The ids.
    pub ids: Vec<u32>,
    /// Whether a first token is forced, so that after a prompt of at most one token the second counts as the first.
    pub after_forced_bos: bool,
}

/// NaN becomes 0, infinities the largest finite values (`remove_invalid_values`).
#[derive(Debug, Clone)]
pub struct RemoveInvalid;

impl LogitsProcessor for NoRepeatNgram {
    fn name(&self) -> &str {
        "no_repeat_ngram_size"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        complete(history.tokens, history.tokens, self.size, scores);
        Ok(())
    }
}

impl LogitsProcessor for EncoderNoRepeatNgram {
    fn name(&self) -> &str {
        "encoder_no_repeat_ngram_size"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        complete(history.source, history.tokens, self.size, scores);
        Ok(())
    }
}

impl LogitsProcessor for BadWords {
    fn name(&self) -> &str {
        "bad_words_ids"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        for word in &self.words {
            // HF: the tokens before the last may be the whole history.
            if let Some((&last, prefix)) = word.split_last()
                && history.tokens.ends_with(prefix)
            {
                ban(scores, &[last]);
            }
        }
        Ok(())
    }
}

impl LogitsProcessor for MinLength {
    fn name(&self) -> &str {
        "min_length"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        if history.tokens.len() < self.min_length {
            ban(scores, &self.eos);
        }
        Ok(())
    }
}

impl LogitsProcessor for MinNewTokens {
    fn name(&self) -> &str {
        "min_new_tokens"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        if history.generated().len() < self.min_new_tokens {
            ban(scores, &self.eos);
        }
        Ok(())
    }
}

impl LogitsProcessor for PrefixAllowed {
    fn name(&self) -> &str {
        "prefix_allowed_tokens_fn"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let refuse = |reason| Err(Error::Processor { processor: self.name().into(), reason });
        let ids = (self.function)(history.prompt, history.tokens);
        if ids.is_empty() {
            return refuse("the function allowed no token; it has to return at least one id".into());
        }
        let mut allowed = Vec::with_capacity(ids.len());
        for id in ids {
            match scores.get(id as usize) {
                Some(&score) => allowed.push((id, score)),
                None => return refuse(format!("the function allowed id {id}; ids below {} are accepted", scores.len())),
            }
        }
        // HF: the function has the last word, so what it allows comes back if all of it was forbidden before.
        if allowed.iter().all(|&(_, score)| score == f32::NEG_INFINITY) {
            allowed.iter_mut().for_each(|(_, score)| *score = 0.0);
        }
        only(scores, &allowed);
        Ok(())
    }
}

impl LogitsProcessor for ForcedBos {
    fn name(&self) -> &str {
        "forced_bos_token_id"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        // HF: also after the one-token prompt of a decoder-only model.
        if history.tokens.len() == 1 {
            only(scores, &[(self.id, 0.0)]);
        }
        Ok(())
    }
}

impl LogitsProcessor for ForcedEos {
    fn name(&self) -> &str {
        "forced_eos_token_id"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        if history.tokens.len() + 1 == history.max_length {
            only(scores, &self.ids.iter().map(|&id| (id, 0.0)).collect::<Vec<_>>());
        }
        Ok(())
    }
}

impl LogitsProcessor for Suppress {
    fn name(&self) -> &str {
        "suppress_tokens"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        ban(scores, &self.ids);
        Ok(())
    }
}

impl LogitsProcessor for SuppressAtBegin {
    fn name(&self) -> &str {
        "begin_suppress_tokens"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let begin = history.prompt_len + usize::from(self.after_forced_bos && history.prompt_len <= 1);
        if history.tokens.len() == begin {
            ban(scores, &self.ids);
        }
        Ok(())
    }
}

impl LogitsProcessor for RemoveInvalid {
    fn name(&self) -> &str {
        "remove_invalid_values"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        for score in scores {
            *score = if score.is_nan() { 0.0 } else { score.clamp(f32::MIN, f32::MAX) };
        }
        Ok(())
    }
}

impl std::fmt::Debug for PrefixAllowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrefixAllowed")
    }
}

/// Forbids `ids`; those outside the vocabulary are ignored.
fn ban(scores: &mut [f32], ids: &[u32]) {
    for &id in ids {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// Forbids all but `tokens`, which get the scores given.
fn only(scores: &mut [f32], tokens: &[(u32, f32)]) {
    scores.fill(f32::NEG_INFINITY);
    for &(id, value) in tokens {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = value;
        }
    }
}

/// Forbids what would complete an n-gram of `text` at the end of `tokens`. One pass over `text`.
fn complete(text: &[u32], tokens: &[u32], size: usize, scores: &mut [f32]) {
    let Some(tail) = size.checked_sub(1).and_then(|len| tokens.len().checked_sub(len)).map(|start| &tokens[start..]) else {
        return; // the history has no n - 1 tokens yet
    };
    for ngram in text.windows(size) {
        if let Some(last) = ngram.strip_prefix(tail) {
            ban(scores, last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::processed, *};

    const INF: f32 = f32::INFINITY;
    const ROW: [f32; 6] = [1.5, -2.0, 0.3, 4.0, -0.7, 0.0];

    /// The ids of `ROW` that are forbidden after `tokens`, of which 2 are the prompt; the other scores must not change.
    fn banned(processor: &dyn LogitsProcessor, tokens: &[u32]) -> Vec<usize> {
        banned_in(processor, &History::new(tokens, 2, 5))
    }

    fn banned_in(processor: &dyn LogitsProcessor, history: &History<'_>) -> Vec<usize> {
        let scores = processed(processor, history, &ROW);
        assert!(scores.iter().zip(ROW).all(|(&new, old)| new == old || new == -INF));
        (0..ROW.len()).filter(|&id| scores[id] == -INF).collect()
    }

    #[test]
    fn no_ngram_twice() {
        for (size, tokens, ids) in [
            (2, &[1, 2, 1, 3, 9, 1][..], &[2, 3][..]),
            (3, &[1, 2, 4, 1, 2, 0, 1, 2], &[0, 4]),
            (1, &[1, 2, 77], &[1, 2]),
            (2, &[1, 1], &[1]),
            (2, &[1], &[]),
            (9, &[1, 1, 1], &[]),
            (1, &[], &[]),
            (0, &[1, 1], &[]),
            (usize::MAX, &[1, 1], &[]),
        ] {
            assert_eq!(banned(&NoRepeatNgram { size }, tokens), ids, "{size} {tokens:?}");
        }
    }

    #[test]
    fn no_ngram_of_the_source() {
        for (size, source, tokens, ids) in [
            (2, &[1, 2, 1, 3, 0][..], &[4, 1][..], &[2, 3][..]),
            (1, &[1, 2, 70], &[4], &[1, 2]),
            (3, &[1, 2, 1, 3, 0], &[1], &[]),
            (3, &[1, 2, 1, 3, 0], &[1, 2], &[1]),
            (2, &[1], &[1], &[]),
        ] {
            let history = History { source, ..History::new(tokens, 1, 9) };
            assert_eq!(banned_in(&EncoderNoRepeatNgram { size }, &history), ids, "{size} {tokens:?}");
        }
    }

    #[test]
    fn bad_words_may_start_the_history() {
        let words = [&[0][..], &[1, 2], &[5, 1, 3], &[3, 4], &[4, 5, 1, 5], &[], &[99]];
        let words = BadWords { words: words.map(<[u32]>::to_vec).to_vec() };
        assert_eq!(banned(&words, &[5, 1]), [0, 2, 3]);
        assert_eq!(banned(&words, &[4, 5, 1]), [0, 2, 3, 5]);
        assert_eq!(banned(&words, &[]), [0]);
    }

    #[test]
    fn every_eos_waits_for_the_length() {
        let eos = || vec![1, 3, 50];
        let none: [usize; 0] = [];
        assert_eq!(banned(&MinLength { min_length: 4, eos: eos() }, &[5, 1, 0]), [1, 3]);
        assert_eq!(banned(&MinLength { min_length: 3, eos: eos() }, &[5, 1, 0]), none);
        assert_eq!(banned(&MinNewTokens { min_new_tokens: 2, eos: eos() }, &[5, 1, 0]), [1, 3]);
        assert_eq!(banned(&MinNewTokens { min_new_tokens: 2, eos: eos() }, &[5, 1, 0, 0]), none);
    }

    fn allow(function: impl Fn(usize, &[u32]) -> Vec<u32> + Send + Sync + 'static) -> PrefixAllowed {
        PrefixAllowed { function: Arc::new(function) }
    }

    #[test]
    fn prefix_function_has_the_last_word() {
        assert_eq!(banned(&allow(|_, tokens| vec![tokens[1], 0, 0]), &[5, 1]), [2, 3, 4, 5]);
        let history = History { prompt: 3, ..History::new(&[5], 1, 9) };
        assert_eq!(banned_in(&allow(|prompt, _| vec![prompt as u32]), &history), [0, 1, 2, 4, 5]);
        let row = [1.5, -INF, -INF, 4.0];
        assert_eq!(processed(&allow(|_, _| vec![1, 2]), &history, &row), [-INF, 0.0, 0.0, -INF]);
        assert_eq!(processed(&allow(|_, _| vec![1, 3]), &history, &row), [-INF, -INF, -INF, 4.0]);
    }

    #[test]
    fn prefix_function_has_to_allow_something() {
        for (ids, text) in [(vec![], "at least one id"), (vec![0, 6], "id 6; ids below 6")] {
            let result = allow(move |_, _| ids.clone()).process(&History::new(&[5], 1, 9), &mut ROW.to_vec());
            let message = result.map_or_else(|error| error.to_string(), |()| String::new());
            assert!(message.starts_with("logits processor prefix_allowed_tokens_fn: ") && message.contains(text), "{message}");
        }
    }

    #[test]
    fn forced_tokens() {
        let at = |processor: &dyn LogitsProcessor, len: usize| processed(processor, &History::new(&[5; 9][..len], 1, 5), &ROW);
        let bos = ForcedBos { id: 2 };
        assert_eq!(at(&bos, 1), [-INF, -INF, 0.0, -INF, -INF, -INF]);
        assert_eq!(at(&bos, 2), ROW);
        assert_eq!(at(&ForcedBos { id: 6 }, 1), [-INF; 6]);
        let eos = ForcedEos { ids: vec![2, 4, 99] };
        assert_eq!(at(&eos, 4), [-INF, -INF, 0.0, -INF, 0.0, -INF]);
        assert_eq!([at(&eos, 3), at(&eos, 5)], [ROW, ROW]);
    }

    #[test]
    fn suppressed_always_or_at_the_begin() {
        assert_eq!(banned(&Suppress { ids: vec![1, 99] }, &[1]), [1]);
        for (after_forced_bos, prompt_len, len, ids) in [
            (false, 2, 2, &[1, 2][..]),
            (false, 2, 3, &[]),
            (true, 2, 2, &[1, 2]),
            (true, 1, 1, &[]),
            (true, 1, 2, &[1, 2]),
            (true, 1, 3, &[]),
            (false, 1, 1, &[1, 2]),
        ] {
            let begin = SuppressAtBegin { ids: vec![1, 2], after_forced_bos };
            assert_eq!(banned_in(&begin, &History::new(&[1; 3][..len], prompt_len, 9)), ids, "{prompt_len} {len}");
        }
    }

    #[test]
    fn invalid_values_become_finite() {
        let row = [1.5, f32::NAN, INF, -INF, -0.7, -f32::NAN];
        assert_eq!(processed(&RemoveInvalid, &History::new(&[1], 1, 9), &row), [1.5, 0.0, f32::MAX, f32::MIN, -0.7, 0.0]);
    }
}
