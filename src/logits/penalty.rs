//! Processors that raise or lower scores.

use super::{History, LogitsProcessor, Scores, decimal};
use crate::error::Result;

/// Adds a bias to the last token of each sequence whose other tokens end the history (`sequence_bias`).
#[derive(Debug, Clone)]
pub struct SequenceBias {
    /// Distinct sequences and their biases.
    pub biases: Vec<(Vec<u32>, f32)>,
}

/// Adds a bias to tokens, whatever came before (`logit_bias`).
#[derive(Debug, Clone)]
pub struct LogitBias {
    /// Ids and what is added to their scores.
    pub biases: Vec<(u32, f32)>,
}

/// Makes generated tokens less likely by each time they were generated (`frequency_penalty`) and once for all
/// (`presence_penalty`).
#[derive(Debug, Clone)]
pub struct CountPenalty {
    /// What a token pays for each time.
    pub frequency: f32,
    /// What it pays once.
    pub presence: f32,
    /// Ids never penalised.
    pub exempt: Vec<u32>,
}

/// Makes seen tokens less likely (`repetition_penalty`, CTRL, <https://arxiv.org/abs/1909.05858>): a positive score is divided, a
/// negative one multiplied, once for each distinct token.
#[derive(Debug, Clone)]
pub struct RepetitionPenalty {
    /// Above 1 discourages.
    pub penalty: f32,
    /// Which tokens count as seen.
    pub scope: PenaltyScope,
    /// Ids never penalised.
    pub exempt: Vec<u32>,
}

/// Which tokens of a row a penalty looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PenaltyScope {
    /// Prompt and generated tokens, as transformers does.
    #[default]
    All,
    /// Generated tokens only.
    Generated,
    /// The last `n` tokens, wherever they come from.
    Last(usize),
}

/// Makes tokens less likely that earlier groups of beams chose at the same step (`diversity_penalty`, <https://arxiv.org/abs/1610.02424>).
#[derive(Debug, Clone)]
pub struct DiversityPenalty {
    /// Subtracted for each of them.
    pub penalty: f32,
}

/// Makes tokens of the source more likely (`encoder_repetition_penalty`): a positive score is multiplied, a negative one divided.
#[derive(Debug, Clone)]
pub struct EncoderRepetitionPenalty {
    /// Above 1 encourages.
    pub penalty: f32,
}

/// Makes the end more likely, exponentially, after some generated tokens (`exponential_decay_length_penalty`): `n` tokens after the
/// start its score `s` gains `abs(s) * (factor^n - 1)`.
#[derive(Debug, Clone)]
pub struct ExponentialDecay {
    /// Generated tokens before it starts.
    pub start: usize,
    /// Factor per token.
    pub factor: f32,
    /// The ids that end a row.
    pub eos: Vec<u32>,
}

/// Raises the next token of every keyword not yet produced (`keyword_boost`).
#[derive(Debug, Clone)]
pub struct KeywordBoost {
    /// Per keyword its tokenisations, each non-empty; any of them counts as produced.
    pub keywords: Vec<Vec<Vec<u32>>>,
    /// What is added to the score.
    pub bias: f32,
    /// Boosting stops this many tokens before the row's end.
    pub stop: usize,
}

impl KeywordBoost {
    /// Which keywords the generated tokens contain, each as a whole token sequence.
    pub fn produced(&self, generated: &[u32]) -> Vec<bool> {
        self.keywords.iter().map(|variants| variants.iter().any(|variant| contains(generated, variant))).collect()
    }
}

impl LogitsProcessor for SequenceBias {
    fn name(&self) -> &str {
        "sequence_bias"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let mut due: Vec<(u32, f32)> = Vec::new();
        for (sequence, bias) in &self.biases {
            if let Some((&last, prefix)) = sequence.split_last()
                && history.tokens.ends_with(prefix)
            {
                due.push((last, *bias));
            }
        }
        // HF: the biases of a token are added up before they meet its score, so that opposite ones cancel exactly.
        due.sort_by_key(|&(id, _)| id);
        for biases in due.chunk_by(|a, b| a.0 == b.0) {
            if let Some(score) = biases.first().and_then(|&(id, _)| scores.get_mut(id as usize)) {
                *score += biases.iter().map(|&(_, bias)| bias).sum::<f32>();
            }
        }
        Ok(())
    }
}

impl LogitsProcessor for LogitBias {
    fn name(&self) -> &str {
        "logit_bias"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        for &(id, bias) in &self.biases {
            if let Some(score) = scores.get_mut(id as usize) {
                *score += bias;
            }
        }
        Ok(())
    }
}

impl LogitsProcessor for CountPenalty {
    fn name(&self) -> &str {
        if self.frequency == 0.0 { "presence_penalty" } else { "frequency_penalty" }
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let mut tokens = history.generated().to_vec();
        tokens.sort_unstable();
        for same in tokens.chunk_by(|a, b| a == b) {
            if let Some(score) = scores.get_mut(same[0] as usize)
                && !self.exempt.contains(&same[0])
            {
                *score -= self.frequency * same.len() as f32 + self.presence;
            }
        }
        Ok(())
    }
}

impl LogitsProcessor for RepetitionPenalty {
    fn name(&self) -> &str {
        "repetition_penalty"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        Scores::over(scores, |scores| self.shape(history, scores))
    }

    fn shape(&self, history: &History<'_>, scores: &mut Scores<'_>) -> Result<()> {
        let tokens = history.tokens;
        let seen = match self.scope {
            PenaltyScope::All => tokens,
            PenaltyScope::Generated => history.generated(),
            PenaltyScope::Last(n) => &tokens[tokens.len().saturating_sub(n)..],
        };
        penalise(scores, seen, &self.exempt, self.penalty);
        Ok(())
    }
}

impl LogitsProcessor for DiversityPenalty {
    fn name(&self) -> &str {
        "diversity_penalty"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let mut taken = history.taken.to_vec();
        taken.sort_unstable();
        for same in taken.chunk_by(|a, b| a == b) {
            if let Some(score) = scores.get_mut(same[0] as usize) {
                *score -= self.penalty * same.len() as f32;
            }
        }
        Ok(())
    }
}

impl LogitsProcessor for EncoderRepetitionPenalty {
    fn name(&self) -> &str {
        "encoder_repetition_penalty"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let penalty = (1.0 / decimal(self.penalty)) as f32;
        Scores::over(scores, |scores| penalise(scores, history.source, &[], penalty));
        Ok(())
    }
}

impl LogitsProcessor for ExponentialDecay {
    fn name(&self) -> &str {
        "exponential_decay_length_penalty"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let steps = history.tokens.len().saturating_sub(history.prompt_len).saturating_sub(self.start);
        if steps == 0 {
            return Ok(());
        }
        // HF: a power that overflows is an error there; here the end becomes as likely as can be.
        let gain = (decimal(self.factor).powf(steps as f64) - 1.0).min(f64::from(f32::MAX)) as f32;
        for (index, &id) in self.eos.iter().enumerate() {
            if let Some(score) = scores.get_mut(id as usize)
                && score.is_finite()
                && !self.eos[..index].contains(&id)
            {
                *score = (*score + score.abs() * gain).min(f32::MAX);
            }
        }
        Ok(())
    }
}

impl LogitsProcessor for KeywordBoost {
    fn name(&self) -> &str {
        "keyword_boost"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        if history.max_length.saturating_sub(history.tokens.len()) <= self.stop {
            return Ok(());
        }
        let generated = history.generated();
        let missing = self.keywords.iter().filter(|variants| !variants.iter().any(|variant| contains(generated, variant)));
        let mut wanted: Vec<u32> = missing.flatten().filter_map(|variant| next(generated, variant)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        for id in wanted {
            if let Some(score) = scores.get_mut(id as usize) {
                *score += self.bias;
            }
        }
        Ok(())
    }
}

/// Moves the score of each distinct token of `seen` away from the best, or towards it if `penalty` is below 1.
fn penalise(scores: &mut Scores<'_>, seen: &[u32], exempt: &[u32], penalty: f32) {
    let mut done = vec![0u64; scores.len().div_ceil(64)]; // a bit per id
    let mut fresh = |id: u32| {
        done.get_mut(id as usize / 64).is_some_and(|word| {
            let bit = 1 << (id % 64);
            let fresh = *word & bit == 0;
            *word |= bit;
            fresh
        })
    };
    for &id in exempt {
        fresh(id);
    }
    for &id in seen {
        // HF: ids that the model has no score for are ignored.
        if fresh(id)
            && let Some(score) = scores.get(id)
        {
            scores.set(id, if score < 0.0 { score * penalty } else { score / penalty });
        }
    }
}

/// Whether `tokens` contain `sequence`, which is never so for an empty one.
fn contains(tokens: &[u32], sequence: &[u32]) -> bool {
    !sequence.is_empty() && tokens.windows(sequence.len()).any(|window| window == sequence)
}

/// The token that continues `variant`, of which `generated` may end with the longest proper prefix or with none.
fn next(generated: &[u32], variant: &[u32]) -> Option<u32> {
    let begun = (1..variant.len()).rev().find(|&len| generated.ends_with(&variant[..len]));
    variant.get(begun.unwrap_or(0)).copied()
}

#[cfg(test)]
mod tests {
    use super::{super::processed, *};

    const INF: f32 = f32::INFINITY;
    const ROW: [f32; 6] = [1.5, -2.0, 0.3, 4.0, -0.7, 0.0];

    /// A history of a prompt of 3 tokens.
    fn history(tokens: &[u32]) -> History<'_> {
        History::new(tokens, 3, 100)
    }

    #[test]
    fn sequence_bias_meets_the_last_token() {
        let biases = |list: &[(&[u32], f32)]| SequenceBias { biases: list.iter().map(|(ids, bias)| (ids.to_vec(), *bias)).collect() };
        let bias =
            biases(&[(&[0], 2.0), (&[1, 2], -3.5), (&[5, 1, 2], 1.25), (&[3, 4], 9.0), (&[2], 0.1), (&[3], -INF), (&[], 1.0), (&[6], 1.0)]);
        assert_eq!(processed(&bias, &history(&[5, 1]), &ROW), [3.5, -2.0, -1.8500001, -INF, -0.7, 0.0]);
        let opposite = biases(&[(&[2], 1e8), (&[1, 2], -1e8)]);
        assert_eq!(processed(&opposite, &history(&[1]), &[0.1; 3]), [0.1; 3]);
    }

    #[test]
    fn logit_bias_acts_whatever_came_before() {
        let bias = LogitBias { biases: vec![(1, 2.5), (3, -INF), (9, 1.0)] };
        assert_eq!(processed(&bias, &history(&[5, 1]), &ROW), [1.5, 0.5, 0.3, -INF, -0.7, 0.0]);
    }

    #[test]
    fn count_penalties_look_at_what_was_generated() {
        let penalty = |frequency, presence| CountPenalty { frequency, presence, exempt: vec![4] };
        let seen = [0, 1, 2, 3, 1, 3, 4, 3, 9];
        assert_eq!(processed(&penalty(0.5, 0.0), &history(&seen), &ROW), [1.5, -2.5, 0.3, 2.5, -0.7, 0.0]);
        assert_eq!(processed(&penalty(0.0, 1.0), &history(&seen), &ROW), [1.5, -3.0, 0.3, 3.0, -0.7, 0.0]);
        assert_eq!(processed(&penalty(0.5, -1.0), &history(&seen), &ROW), [1.5, -1.5, 0.3, 3.5, -0.7, 0.0]);
        assert_eq!(processed(&penalty(0.5, 1.0), &history(&[3, 3, 3]), &ROW), ROW);
    }

    #[test]
    fn repetition_penalty_counts_a_token_once() {
        let penalty = |penalty, scope, exempt: &[u32]| RepetitionPenalty { penalty, scope, exempt: exempt.to_vec() };
        let seen = [0, 1, 1, 3, 5, 7, 9];
        let all = penalty(1.3, PenaltyScope::All, &[]);
        assert_eq!(processed(&all, &history(&seen), &ROW), [1.1538461, -2.6, 0.3, 3.0769231, -0.7, 0.0]);
        let generated = penalty(1.3, PenaltyScope::Generated, &[]);
        assert_eq!(processed(&generated, &history(&seen), &ROW), [1.5, -2.0, 0.3, 3.0769231, -0.7, 0.0]);
        for (n, row) in [
            (0, ROW),
            (4, [1.5, -2.0, 0.3, 3.0769231, -0.7, 0.0]),
            (5, [1.5, -2.6, 0.3, 3.0769231, -0.7, 0.0]),
            (99, [1.1538461, -2.6, 0.3, 3.0769231, -0.7, 0.0]),
        ] {
            assert_eq!(processed(&penalty(1.3, PenaltyScope::Last(n), &[]), &history(&seen), &ROW), row, "{n}");
        }
        let exempt = penalty(1.3, PenaltyScope::All, &[1, 70, u32::MAX]);
        assert_eq!(processed(&exempt, &history(&seen), &ROW), [1.1538461, -2.0, 0.3, 3.0769231, -0.7, 0.0]);
        let reward = penalty(0.8, PenaltyScope::All, &[]);
        assert_eq!(processed(&reward, &history(&[0, 1, 1, 3, 2]), &[1.5, -2.0, -INF, INF]), [1.875, -1.6, -INF, INF]);
    }

    #[test]
    fn encoder_penalty_is_the_inverse_over_the_source() {
        let history = History { source: &[0, 1, 1, 4], ..history(&[2]) };
        let scores = processed(&EncoderRepetitionPenalty { penalty: 1.3 }, &history, &ROW);
        assert_eq!(scores, [1.9499999, -1.5384616, 0.3, 4.0, -0.53846157, 0.0]);
    }

    #[test]
    fn diversity_penalty_counts_every_choice() {
        let history = History { taken: &[3, 0, 3, 9], ..history(&[2]) };
        assert_eq!(processed(&DiversityPenalty { penalty: 0.75 }, &history, &ROW), [0.75, -2.0, 0.3, 2.5, -0.7, 0.0]);
    }

    #[test]
    fn exponential_decay_grows_after_its_start() {
        let decay = |factor| ExponentialDecay { start: 2, factor, eos: vec![1, 3, 4, 3, 9] };
        let row = [1.5, -2.0, 0.3, 4.0, -INF, 0.0];
        assert_eq!(processed(&decay(1.05), &history(&[0; 10]), &row), [1.5, -1.4474368, 0.3, 5.1051264, -INF, 0.0]);
        for len in 1..=5 {
            assert_eq!(processed(&decay(1.05), &history(&[0; 5][..len]), &row), row);
        }
        assert_eq!(processed(&decay(1e9), &history(&[0; 99]), &row), [1.5, f32::MAX, 0.3, f32::MAX, -INF, 0.0]);
    }

    fn boost() -> KeywordBoost {
        KeywordBoost { keywords: vec![vec![vec![1, 2, 3], vec![4]], vec![vec![1, 2, 1, 5], vec![]], vec![vec![7]]], bias: 5.0, stop: 10 }
    }

    #[test]
    fn keywords_count_when_complete() {
        assert_eq!(boost().produced(&[1, 2, 9, 2, 1, 5]), [false, false, false]);
        assert_eq!(boost().produced(&[9, 1, 2, 3, 7]), [true, false, true]);
        assert_eq!(boost().produced(&[4, 1, 2, 1, 5]), [true, true, false]);
        assert_eq!(boost().produced(&[]), [false; 3]);
    }

    #[test]
    fn keyword_boost_raises_what_comes_next() {
        let raised = |tokens: &[u32]| -> Vec<usize> {
            let scores = processed(&boost(), &history(tokens), &[1.0; 8]);
            assert!(scores.iter().all(|&score| score == 1.0 || score == 6.0));
            (0..8).filter(|&id| scores[id] == 6.0).collect()
        };
        assert_eq!(raised(&[0, 0, 0]), [1, 4, 7]); // both keywords want 1, which is raised once
        assert_eq!(raised(&[0, 1, 2]), [1, 4, 7]); // a prompt begins nothing
        assert_eq!(raised(&[0, 0, 0, 1]), [2, 4, 7]);
        assert_eq!(raised(&[0, 0, 0, 1, 2]), [1, 3, 4, 7]);
        assert_eq!(raised(&[0, 0, 0, 1, 2, 1]), [2, 4, 5, 7]); // the longest beginning of [1, 2, 1, 5]
        assert_eq!(raised(&[0, 0, 0, 1, 2, 9]), [1, 4, 7]);
        assert_eq!(raised(&[0, 0, 0, 7, 4]), [1]);
        assert!(raised(&[0, 0, 0, 7, 4, 1, 2, 1, 5]).is_empty());
        let tokens = [0; 90];
        assert_eq!(raised(&tokens[..89]), [1, 4, 7]);
        assert!(raised(&tokens).is_empty());
    }
}
