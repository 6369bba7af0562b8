//! Text generation on candle: the Rust `model.generate()`.
//!
//! A [`Generator`] is a loaded checkpoint in Hugging Face's format; a [`GenerationConfig`] has the fields of
//! `generation_config.json`; the tokens are those of transformers.
//!
//! ```
//! use candle_generate::{GenerationConfig, Generator};
//!
//! let generator = Generator::from_pretrained("examples/models/storyteller")?;
//! let config = GenerationConfig::greedy().max_new_tokens(8);
//!
//! // One prompt: text, ids or messages.
//! let output = generator.generate("Once upon a time", &config)?;
//! assert_eq!(output.text(), " there lived a man who had three s");
//!
//! // Piece by piece; dropping the stream ends the call.
//! for piece in generator.stream("Once upon a time", &config)? {
//!     print!("{}", piece?.text);
//! }
//!
//! // Prompts of any lengths, several draws of each: every row is what it would be alone with its seed.
//! let config = GenerationConfig::sampling().temperature(0.8).top_p(0.95).num_return_sequences(2).max_new_tokens(8).seed(7);
//! let output = generator.generate_batch(["The", "There was once a king"], &config)?;
//! assert_eq!(output.sequences.iter().map(|row| row.prompt).collect::<Vec<_>>(), [0, 0, 1, 1]);
//!
//! // What a call will do, and where each value came from.
//! println!("{}", generator.explain(&config)?);
//! # Ok::<(), candle_generate::Error>(())
//! ```
//!
//! The [`guide`] has the rest with examples: [which strategy when](guide::strategies), [every parameter](guide::parameters),
//! [recipes](guide::recipes), [from symptom to setting](guide::symptoms), [streaming from threads and async code](guide::streaming),
//! [models and processors of your own](guide::extending), [loading](guide::loading) and [what differs from transformers](guide::differences).
//!
//! | to | see |
//! | --- | --- |
//! | load a folder, or download from the hub | [`Generator::from_pretrained`] |
//! | load with options, limits, progress | [`Generator::builder`] |
//! | set what is generated | [`GenerationConfig`], [`Strategy`] |
//! | read results | [`Output`], [`Sequence`], [`FinishReason`] |
//! | score given texts | [`Generator::score`], [`Generator::score_texts`], [`Score`] |
//! | see what happened at each step | [`Generator::inspect`], [`Step`], [`Beam`] |
//! | stream | [`Generator::stream`], [`Stream`], [`Piece`] |
//! | chat | [`Generator::chat`], [`Chat`], [`Message`], [`Messages`] |
//! | compute a beginning once | [`Generator::prefix`] |
//! | draft and check several tokens at once | [`GenerationConfig::assistant_model`], [`GenerationConfig::prompt_lookup_num_tokens`] |
//! | mark texts and find the mark | [`logits::WatermarkingConfig`], [`logits::WatermarkDetector`] |
//! | shape scores, end rows | [`LogitsProcessor`], [`StoppingCriteria`], [`CancelToken`] |
//! | bring a model | [`Model`], [`Cache`]; [`Foreign`] for those of candle-transformers |
//! | handle errors | [`Error`] |
//!
//! On the CPU, in f32 and bf16 arithmetic, a row's logits are the same bits alone and in a batch, cached and computed anew, in one
//! pass and in chunks, on any number of threads.
#![warn(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod cache;
mod chat;
pub mod config;
mod device;
mod error;
mod foreign;
mod generator;
pub mod guide;
mod heal;
mod hub;
mod kernels;
pub mod logits;
mod memory;
pub mod model;
mod models;
mod output;
pub mod plan;
mod prefix;
mod progress;
mod rows;
mod run;
mod score;
mod search;
pub mod stop;
pub mod text;
mod trace;

/// The tensor library, in the version that this crate is built on.
pub use candle_core;
pub use chat::{Chat, Reply};
pub use config::{Assistant, GenerationConfig, Strategy};
pub use device::device;
pub use error::{Error, Problem, Result};
pub use foreign::Foreign;
pub use generator::{Builder, Generator};
pub use kernels::{AttnImplementation, Instructions};
pub use logits::{History, LogitsProcessor};
pub use memory::Memory;
pub use model::{Cache, Context, Feed, Forward, Model, ModelInfo, Room, Start, Values, Want};
pub use models::Kernels;
pub use output::{FinishReason, Output, Piece, Sequence, Timings, TokenLogProb, Usage};
pub use plan::Plan;
pub use progress::{OnProgress, Progress, Stage};
pub use run::Stream;
pub use score::Score;
pub use stop::{CancelToken, StoppingCriteria};
pub use text::{Message, Messages, Prompt, Tokenizer};
pub use trace::{Beam, Candidate, Effect, Step};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
