//! What a call returns.

use crate::trace::{Beam, Step};
use serde::Serialize;
use std::time::Duration;

/// The result of a call: its rows in the reference's order, prompt 0's sequences first.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Output {
    /// At least one for each prompt.
    pub sequences: Vec<Sequence>,
    /// The live and the ended beams of every step, if beams were inspected.
    pub beams: Vec<Vec<Beam>>,
    /// Token counts.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

impl Output {
    /// The first sequence's text.
    pub fn text(&self) -> &str {
        self.sequences.first().map_or("", |sequence| &sequence.text)
    }

    /// The first sequence's generated ids.
    pub fn tokens(&self) -> &[u32] {
        self.sequences.first().map_or(&[], |sequence| &sequence.tokens)
    }
}

/// One generated sequence.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Sequence {
    /// The index of its prompt in the call.
    pub prompt: usize,
    /// Its number among the call's sequences.
    pub row: usize,
    /// The generated text as it continues the prompt: a leading space is kept, special tokens are left out, and what
    /// follows a stop string is trimmed. After `token_healing` it begins with what that added to the prompt's last token. Empty
    /// without a tokenizer.
    pub text: String,
    /// The prompt's text followed by `text`.
    pub full_text: String,
    /// The generated ids, the end token included. A healed token belongs to the prompt.
    pub tokens: Vec<u32>,
    /// The number of ids of the (decoder's) prompt.
    pub prompt_len: usize,
    /// Why it ended.
    pub finish: FinishReason,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// The seed that reproduces it alone, where tokens were drawn; with beams that of its prompt.
    pub seed: Option<u64>,
    /// The score that a beam search ranks by.
    pub score: Option<f32>,
    /// For each generated token the beam of its prompt, counted from 0, that it continued; only from searches with beams.
    // HF: counted over the whole batch there.
    pub beam_indices: Option<Vec<usize>>,
    /// Drafted tokens that were checked for it, in the modes with drafts.
    pub drafted: usize,
    /// How many of them it kept.
    pub accepted: usize,
    /// One entry per generated token, where they were asked for.
    pub log_probs: Option<Vec<TokenLogProb>>,
    /// Processed scores, `[step][vocab_size]`, where they were asked for.
    pub scores: Option<Vec<Vec<f32>>>,
    /// Raw logits, `[step][vocab_size]`, where they were asked for.
    pub logits: Option<Vec<Vec<f32>>>,
    /// What happened at every step, where it was inspected.
    pub steps: Option<Vec<Step>>,
    /// The keywords of `keyword_boost`, and whether each was produced.
    pub keywords: Vec<(String, bool)>,
    /// The forced phrases that neither it nor its prompt holds, since room ran out or another setting forbade them: their
    /// indices in `force_words_ids` followed by `force_words`.
    pub unmet: Vec<usize>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// It produced an end token.
    Eos,
    /// It produced one of `stop_token_ids`.
    StopToken,
    /// Its text contains a stop string.
    StopString,
    /// It has the largest length allowed.
    Length,
    /// `max_time` is over.
    Time,
    /// A user's criterion said so.
    Criteria,
    /// The call was cancelled.
    Cancelled,
}

impl FinishReason {
    /// A stable lower-case name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::StopToken => "stop_token",
            Self::StopString => "stop_string",
            Self::Length => "length",
            Self::Time => "time",
            Self::Criteria => "criteria",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The log-probability of a generated token.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TokenLogProb {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub log_prob: f32,
    /// The most likely tokens at this step, best first.
    pub top: Vec<(u32, f32)>,
}

/// One step of a stream.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Piece {
    /// The row's number among the call's sequences.
    pub row: usize,
    /// Text that became certain; may be empty. A row's pieces joined are its text.
    pub text: String,
    /// Ids that became certain since the row's last piece.
    pub tokens: Vec<u32>,
    /// Why the row ended, on its last piece.
    pub finish: Option<FinishReason>,
}

/// Token counts of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Usage {
    /// Ids of all prompts, each counted once.
    pub prompt_tokens: usize,
    /// How many of them were not computed, as a [prefix](crate::Generator::prefix) or an earlier turn of a chat holds them.
    pub reused_tokens: usize,
    /// Ids generated in all sequences.
    pub generated_tokens: usize,
    /// Drafted ids that were checked, in the modes with drafts.
    pub drafted_tokens: usize,
    /// How many of them were kept.
    pub accepted_tokens: usize,
}

impl Usage {
    /// The part of the drafted tokens that was kept; `None` if none was drafted.
    pub fn acceptance(&self) -> Option<f64> {
        (self.drafted_tokens > 0).then(|| self.accepted_tokens as f64 / self.drafted_tokens as f64)
    }
}

/// Where a call's time went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Timings {
    /// Until every prompt of the first part of the batch was computed and its first token chosen.
    pub first_token: Duration,
    /// The whole call.
    pub total: Duration,
    /// In the model's forward passes.
    pub forward: Duration,
}

impl Timings {
    /// Generated tokens per second over the whole call.
    pub fn tokens_per_second(&self, usage: &Usage) -> f64 {
        let seconds = self.total.as_secs_f64();
        if seconds > 0.0 { usage.generated_tokens as f64 / seconds } else { 0.0 }
    }
}
