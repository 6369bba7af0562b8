//! The green-list watermark (<https://arxiv.org/abs/2306.04634>) and its detector; transformers finds the same marks.

use super::{History, LogitsProcessor, pick, twister::Twister};
use crate::error::{Error, Problem, Result};
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, sync::Arc};

/// A watermark's parameters. Whoever wants to find the mark needs the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WatermarkingConfig {
    /// The part of the vocabulary that is green, between 0 and 1.
    pub greenlist_ratio: f64,
    /// What is added to the scores of green tokens, logits or with beams log-probabilities.
    pub bias: f64,
    /// The secret.
    pub hashing_key: i64,
    /// What the green list depends on.
    pub seeding_scheme: SeedingScheme,
    /// The tokens before a token that its list depends on.
    pub context_width: usize,
}

/// What a green list depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SeedingScheme {
    /// The last token.
    Lefthash,
    /// The last tokens and the candidate itself: of the 40 best tokens, those are green that are on their own list.
    Selfhash,
}

/// The watermark of a config: a green list, or DeepMind's SynthID, which is read and written but not built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Watermarking {
    /// A green list.
    Greenlist(WatermarkingConfig),
    /// SynthID (<https://doi.org/10.1038/s41586-024-08025-4>).
    SynthId {
        /// The size of its n-grams.
        ngram_len: u64,
        /// Its secrets.
        keys: Vec<i64>,
        /// Its other parameters.
        #[serde(flatten)]
        rest: serde_json::Map<String, serde_json::Value>,
    },
}

/// Raises green tokens (`watermarking_config`).
#[derive(Debug, Clone)]
pub struct Watermark {
    lists: Lists,
    bias: f32,
}

/// Tells watermarked texts from others.
///
/// ```
/// use candle_generate::logits::{WatermarkDetector, WatermarkingConfig};
///
/// let detector = WatermarkDetector::new(WatermarkingConfig::default(), 2048)?;
/// let detection = detector.detect(&[17, 4, 99, 1200])?;
/// assert!(!detection.prediction);
/// # Ok::<(), candle_generate::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct WatermarkDetector {
    /// The z-score above which a text counts as watermarked; 3 at first.
    pub z_threshold: f64,
    /// Whether an n-gram is counted once, however often it occurs.
    pub ignore_repeated_ngrams: bool,
    /// Left out where a text begins with it.
    pub bos_token_id: Option<u32>,
    lists: Lists,
    ratio: f64,
    vocab_size: usize,
}

/// What a detector found in one text.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Detection {
    /// Tokens, or n-grams, that were looked at.
    pub num_tokens_scored: usize,
    /// How many of them are green.
    pub num_green_tokens: usize,
    /// The same as a part.
    pub green_fraction: f64,
    /// By how many standard deviations that is more than an unmarked text has.
    pub z_score: f64,
    /// The probability that an unmarked text has so many.
    pub p_value: f64,
    /// Whether the z-score is above the threshold.
    pub prediction: bool,
}

/// Candidates that `selfhash` looks at.
const CANDIDATES: usize = 40;
/// Entries of the table that `selfhash` hashes tokens by, a prime.
const TABLE: usize = 1_000_003;

impl WatermarkingConfig {
    /// All that is wrong with it.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let problem = |field: &str, value: String, accepted: &str| Problem {
            field: format!("watermarking_config.{field}"),
            value,
            reason: format!("accepted is {accepted}"),
        };
        let mut problems = Vec::new();
        // HF: the config accepts 0 and 1, its processor does not.
        if !(self.greenlist_ratio > 0.0 && self.greenlist_ratio < 1.0) {
            problems.push(problem("greenlist_ratio", self.greenlist_ratio.to_string(), "a number above 0 and below 1"));
        }
        if !(self.bias as f32).is_finite() {
            problems.push(problem("bias", self.bias.to_string(), "a finite number"));
        }
        if self.context_width == 0 {
            problems.push(problem("context_width", "0".into(), "an integer from 1 up"));
        }
        problems
    }
}

impl Default for WatermarkingConfig {
    fn default() -> Self {
        Self { greenlist_ratio: 0.25, bias: 2.0, hashing_key: 15_485_863, seeding_scheme: SeedingScheme::Lefthash, context_width: 1 }
    }
}

impl From<WatermarkingConfig> for Watermarking {
    fn from(config: WatermarkingConfig) -> Self {
        Self::Greenlist(config)
    }
}

impl Watermark {
    /// The processor of a config.
    ///
    /// # Errors
    /// [`Error::Config`] lists the values out of range.
    pub fn new(config: &WatermarkingConfig) -> Result<Self> {
        Ok(Self { lists: Lists::new(config)?, bias: config.bias as f32 })
    }
}

impl LogitsProcessor for Watermark {
    fn name(&self) -> &str {
        "watermarking_config"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        let (tokens, len) = (history.tokens, scores.len());
        // HF: a row shorter than the context is left unmarked.
        if tokens.len() < self.lists.width {
            return Ok(());
        }
        let green = match &self.lists.table {
            None => self.lists.generator(tokens).permutation(len, self.lists.size(len)),
            Some(_) => {
                let mut window = tokens[tokens.len() + 1 - self.lists.width..].to_vec();
                let green = |&id: &u32| {
                    window.push(id);
                    let green = self.lists.green(&window, id, len);
                    window.pop();
                    green
                };
                pick::top(scores, CANDIDATES).into_iter().map(|(id, _)| id).filter(green).collect()
            }
        };
        for id in green {
            if let Some(score) = scores.get_mut(id as usize) {
                *score += self.bias;
            }
        }
        Ok(())
    }
}

impl WatermarkDetector {
    /// A detector for texts of a model with `vocab_size` logits, which transformers has in `config.vocab_size`.
    ///
    /// # Errors
    /// [`Error::Config`] lists the values out of range.
    pub fn new(config: WatermarkingConfig, vocab_size: usize) -> Result<Self> {
        Ok(Self {
            z_threshold: 3.0,
            ignore_repeated_ngrams: false,
            bos_token_id: None,
            lists: Lists::new(&config)?,
            ratio: config.greenlist_ratio,
            vocab_size,
        })
    }

    /// Looks at a text's ids, best without the prompt's.
    ///
    /// # Errors
    /// [`Error::Prompt`] if nothing follows the first `context_width` tokens.
    pub fn detect(&self, tokens: &[u32]) -> Result<Detection> {
        let tokens = match tokens.split_first() {
            Some((first, rest)) if Some(*first) == self.bos_token_id => rest,
            _ => tokens,
        };
        if tokens.len() <= self.lists.width {
            let least = self.lists.width.saturating_add(1);
            return Err(Error::Prompt(format!("a text of {} tokens has none to score; at least {least} are needed", tokens.len())));
        }
        let own = usize::from(self.lists.table.is_none());
        let mut counts: HashMap<&[u32], usize> = HashMap::new();
        for ngram in tokens.windows(self.lists.width + own) {
            *counts.entry(ngram).or_default() += 1;
        }
        let (mut scored, mut green) = (0, 0);
        for (ngram, count) in counts {
            let count = if self.ignore_repeated_ngrams { 1 } else { count };
            let target = ngram.last().copied().unwrap_or_default();
            scored += count;
            if self.lists.green(&ngram[..ngram.len() - own], target, self.vocab_size) {
                green += count;
            }
        }
        let (total, found) = (scored as f64, green as f64);
        let z_score = (found - self.ratio * total) / (total * self.ratio * (1.0 - self.ratio)).sqrt();
        Ok(Detection {
            num_tokens_scored: scored,
            num_green_tokens: green,
            green_fraction: found / total,
            z_score,
            p_value: 0.5 * erfc(z_score / std::f64::consts::SQRT_2),
            prediction: z_score > self.z_threshold,
        })
    }
}

/// The green lists of a key.
#[derive(Clone)]
struct Lists {
    ratio: f64,
    key: i64,
    width: usize,
    /// Of `selfhash` only.
    table: Option<Arc<[u32]>>,
}

impl Lists {
    fn new(config: &WatermarkingConfig) -> Result<Self> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(Error::Config(problems));
        }
        let table = || Twister::new(config.hashing_key as u64).permutation(TABLE, TABLE).into();
        Ok(Self {
            ratio: config.greenlist_ratio,
            key: config.hashing_key,
            width: config.context_width,
            table: (config.seeding_scheme == SeedingScheme::Selfhash).then(table),
        })
    }

    fn size(&self, vocab_size: usize) -> usize {
        (vocab_size as f64 * self.ratio) as usize
    }

    fn green(&self, tokens: &[u32], id: u32, vocab_size: usize) -> bool {
        (id as usize) < vocab_size && self.generator(tokens).draws(id, vocab_size, self.size(vocab_size))
    }

    /// The generator of the list that `tokens` lead to.
    fn generator(&self, tokens: &[u32]) -> Twister {
        let last = tokens.last().copied().unwrap_or_default();
        let seed = match &self.table {
            // HF: whatever the width, it is the last token alone.
            None => i128::from(self.key) * i128::from(last),
            Some(table) => {
                let hash = |id: u32| i64::from(table[id as usize % TABLE]) + 1;
                let window = &tokens[tokens.len().saturating_sub(self.width)..];
                let seeds = window.iter().map(|&id| self.key.wrapping_mul(hash(id)).wrapping_mul(hash(last)));
                i128::from(seeds.min().unwrap_or_default())
            }
        };
        Twister::new(seed.rem_euclid(i128::from(u64::MAX)) as u64)
    }
}

/// The key is a secret.
impl std::fmt::Debug for Lists {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lists").field("ratio", &self.ratio).field("width", &self.width).finish_non_exhaustive()
    }
}

/// The complementary error function: its series where it is large, its continued fraction where it is small.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let scale = (-x * x).exp() / std::f64::consts::PI.sqrt();
    if x < 2.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..60 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        1.0 - 2.0 * scale * sum
    } else {
        scale / (x + (1..=60).rev().fold(0.0, |tail, n| f64::from(n) / 2.0 / (x + tail)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::logits::processed;
    use serde_json::json;

    const TEXT: [u32; 48] = [
        974, 534, 1515, 1941, 268, 53, 1921, 1062, 959, 785, 1926, 1951, 1626, 616, 949, 621, 1597, 62, 262, 652, 175, 1233, 127, 1103,
        1936, 1587, 1748, 1617, 1821, 549, 1497, 399, 146, 556, 2027, 888, 1056, 1786, 1233, 1725, 5, 6, 5, 6, 5, 6, 5, 6,
    ];

    fn config(json: serde_json::Value) -> WatermarkingConfig {
        serde_json::from_value(json).unwrap()
    }

    // Of transformers 5.23.0: WatermarkLogitsProcessor after the ids 7, 3, 41, and WatermarkDetector.

    #[test]
    fn green_tokens_are_those_of_the_reference() {
        let scores: Vec<f32> = (0..50).map(|id| (id * 37 % 50) as f32 / 10.0).collect();
        let left = vec![15, 21, 25, 27, 30, 31, 37, 39, 41, 42, 46, 48];
        let own = vec![3, 10, 13, 14, 16, 22, 25, 47];
        let half = vec![0, 2, 8, 10, 13, 14, 15, 17, 19, 20, 23, 24, 26, 28, 30, 33, 34, 37, 39, 40, 41, 42, 43, 46, 47];
        for (json, green) in [
            (json!({}), left),
            (json!({"seeding_scheme": "selfhash", "context_width": 2}), own),
            (json!({"hashing_key": -7, "greenlist_ratio": 0.5}), half),
            (json!({"context_width": 4}), vec![]),
        ] {
            let watermark = Watermark::new(&config(json)).unwrap();
            let marked = processed(&watermark, &History::new(&[7, 3, 41], 1, 9), &scores);
            let raised: Vec<_> = (0..50).filter(|&id| marked[id] != scores[id]).collect();
            assert_eq!(raised, green);
            assert!(raised.iter().all(|&id| marked[id] == scores[id] + 2.0));
        }
    }

    #[test]
    fn detection_is_that_of_the_reference() {
        let cases = [
            (json!({}), false, 47, 13, 0.42107596053325946, 0.33684980749154503),
            (json!({}), true, 42, 10, -0.1781741612749496, 0.5707068993316804),
            (json!({"seeding_scheme": "selfhash"}), false, 48, 10, -0.6666666666666666, 0.7475074624530771),
            (json!({"context_width": 2, "greenlist_ratio": 0.5}), true, 42, 20, -0.3086066999241838, 0.6211896381583017),
            (json!({"hashing_key": -7}), false, 47, 9, -0.9263671131731709, 0.8228723855580283),
            (
                json!({"seeding_scheme": "selfhash", "context_width": 3, "greenlist_ratio": 0.4, "hashing_key": 99}),
                true,
                42,
                18,
                0.377964473009227,
                0.3527284930556368,
            ),
        ];
        for (json, once, scored, green, z_score, p_value) in cases {
            let mut detector = WatermarkDetector::new(config(json), 2048).unwrap();
            detector.ignore_repeated_ngrams = once;
            let found = detector.detect(&TEXT).unwrap();
            assert_eq!((found.num_tokens_scored, found.num_green_tokens, found.prediction), (scored, green, false));
            assert!((found.z_score - z_score).abs() < 1e-12 && (found.p_value - p_value).abs() < 1e-12, "{found:?}");
            assert_eq!(found.green_fraction, green as f64 / scored as f64);
            detector.bos_token_id = Some(1);
            let begun: Vec<u32> = [&[1], &TEXT[..]].concat();
            assert_eq!(detector.detect(&begun).unwrap(), found);
            assert!(matches!(detector.detect(&TEXT[..1]), Err(Error::Prompt(_))) || scored == 48);
            assert!(matches!(detector.detect(&[1]), Err(Error::Prompt(_))));
        }
    }

    #[test]
    fn p_values_reach_far() {
        for (z, p) in [
            (-3.0, 0.9986501019683699),
            (-0.5, 0.691462461274013),
            (0.0, 0.5),
            (1.0, 0.15865525393145707),
            (2.5, 0.006209665325776139),
            (3.0, 0.0013498980316300957),
            (9.0, 1.1285884059538425e-19),
            (40.0, 0.0),
        ] {
            assert!((0.5 * erfc(z / std::f64::consts::SQRT_2) - p).abs() <= 1e-11 * p, "{z}");
        }
    }

    #[test]
    fn values_out_of_range_are_listed() {
        let wrong = config(json!({"greenlist_ratio": 1.0, "bias": 1e300, "context_width": 0}));
        let Err(Error::Config(problems)) = Watermark::new(&wrong) else { panic!("accepted") };
        let fields: Vec<_> = problems.iter().map(|problem| problem.field.rsplit('.').next().unwrap()).collect();
        assert_eq!(fields, ["greenlist_ratio", "bias", "context_width"]);
        assert!(!format!("{:?}", Watermark::new(&WatermarkingConfig::default()).unwrap()).contains("15485863"));
    }
}
