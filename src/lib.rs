//! Text generation on candle: the Rust `model.generate()`.
#![warn(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod cache;
pub mod config;
mod error;
mod generator;
mod kernels;
pub mod logits;
mod memory;
pub mod model;
mod models;
mod output;
pub mod plan;
mod progress;
mod rows;
mod run;
mod search;
pub mod stop;
pub mod text;

/// The tensor library, in the version that this crate is built on.
pub use candle_core;
pub use config::{GenerationConfig, Strategy};
pub use error::{Error, Problem, Result};
pub use generator::{Builder, Generator};
pub use logits::{History, LogitsProcessor};
pub use memory::Memory;
pub use model::{Cache, Context, Feed, Forward, Model, ModelInfo, Room, Start, Want};
pub use models::{Kernels, LoadOptions};
pub use output::{FinishReason, Output, Piece, Sequence, Timings, TokenLogProb, Usage};
pub use plan::Plan;
pub use progress::{OnProgress, Progress, Stage};
pub use run::Stream;
pub use stop::{CancelToken, StoppingCriteria};
pub use text::{Message, Messages, Prompt, Tokenizer};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
