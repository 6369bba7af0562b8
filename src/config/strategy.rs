//! The modes of generation.

use super::{DolaLayers, OneOrMany};
use serde::{Deserialize, Serialize};

/// How tokens are searched for. [Strategies](crate::guide::strategies) tells which is for what.
///
/// ```
/// use candle_generate::{GenerationConfig, Strategy};
///
/// let config = GenerationConfig::new().strategy(Strategy::Beam { num_beams: 4 });
/// let json = config.to_json(); // with the flags that transformers knows beside it
/// assert_eq!((json["strategy"]["mode"].as_str(), json["num_beams"].as_i64()), (Some("beam"), Some(4)));
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum Strategy {
    /// The most likely token at every step.
    Greedy,
    /// A draw from the shaped distribution at every step.
    Sample,
    /// The most likely sequences.
    Beam {
        /// Sequences kept at every step.
        num_beams: usize,
    },
    /// Beams whose candidates are drawn.
    BeamSample {
        /// Sequences kept at every step.
        num_beams: usize,
    },
    /// Groups of beams that avoid each other's tokens (<https://arxiv.org/abs/1610.02424>).
    DiverseBeam {
        /// Sequences kept at every step, in all groups.
        num_beams: usize,
        /// A divisor of `num_beams`.
        num_beam_groups: usize,
        /// What a group pays for a token that an earlier group chose at the same step.
        diversity_penalty: f64,
    },
    /// Beams that have to produce phrases (<https://arxiv.org/abs/1804.06609>).
    ConstrainedBeam {
        /// Sequences kept at every step.
        num_beams: usize,
        /// Of each entry one alternative has to be produced.
        #[serde(default)]
        force_words_ids: Vec<Vec<Vec<u32>>>,
        /// The same as strings, each tokenised with a leading space and without.
        #[serde(default)]
        force_words: Vec<OneOrMany<String>>,
    },
    /// The candidate that is likely and unlike what was said (<https://arxiv.org/abs/2202.06417>).
    Contrastive {
        /// The weight of being unlike.
        penalty_alpha: f64,
        /// Candidates at every step.
        top_k: usize,
    },
    /// The last layer's logits against those of earlier layers (<https://arxiv.org/abs/2309.03883>).
    Dola {
        /// The earlier layers.
        dola_layers: DolaLayers,
        /// Whether tokens are drawn.
        do_sample: bool,
    },
    /// Greedy search or sampling with drafts looked up in the row itself.
    PromptLookup {
        /// Tokens of a draft.
        prompt_lookup_num_tokens: usize,
        /// The longest n-gram that is matched.
        max_matching_ngram_size: usize,
        /// Whether tokens are drawn.
        do_sample: bool,
    },
    /// Greedy search or sampling with drafts that a model writes.
    Assisted {
        /// Who writes them.
        #[serde(default)]
        drafts: Drafts,
        /// Whether tokens are drawn.
        do_sample: bool,
    },
}

/// Who writes the drafts of [`Strategy::Assisted`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Drafts {
    /// The config's `assistant_model`.
    #[default]
    Assistant,
    /// This layer of the model itself (`assistant_early_exit`).
    EarlyExit(usize),
    /// The model's heads for several tokens (`use_mtp`).
    Mtp,
}

impl Strategy {
    /// The mode's name, as it is serialised.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Greedy => "greedy",
            Self::Sample => "sample",
            Self::Beam { .. } => "beam",
            Self::BeamSample { .. } => "beam_sample",
            Self::DiverseBeam { .. } => "diverse_beam",
            Self::ConstrainedBeam { .. } => "constrained_beam",
            Self::Contrastive { .. } => "contrastive",
            Self::Dola { .. } => "dola",
            Self::PromptLookup { .. } => "prompt_lookup",
            Self::Assisted { .. } => "assisted",
        }
    }

    /// Whether tokens are drawn.
    pub fn samples(&self) -> bool {
        match self {
            Self::Sample | Self::BeamSample { .. } => true,
            Self::Dola { do_sample, .. } | Self::PromptLookup { do_sample, .. } | Self::Assisted { do_sample, .. } => *do_sample,
            Self::Greedy | Self::Beam { .. } | Self::DiverseBeam { .. } | Self::ConstrainedBeam { .. } | Self::Contrastive { .. } => false,
        }
    }

    /// Sequences kept at every step; 1 without beams.
    pub fn num_beams(&self) -> usize {
        match self {
            Self::Beam { num_beams }
            | Self::BeamSample { num_beams }
            | Self::DiverseBeam { num_beams, .. }
            | Self::ConstrainedBeam { num_beams, .. } => *num_beams,
            Self::Greedy
            | Self::Sample
            | Self::Contrastive { .. }
            | Self::Dola { .. }
            | Self::PromptLookup { .. }
            | Self::Assisted { .. } => 1,
        }
    }
}
