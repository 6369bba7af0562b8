//! Text at the door and at the exit: prompts, the tokenizer, and text that appears token by token.

mod chat;
#[cfg(feature = "chat")]
mod clock;
mod detok;
mod engine;
mod files;
#[cfg(feature = "chat")]
mod jinja;
#[cfg(feature = "chat")]
mod json;
mod language;
mod prompt;
mod special;
mod spm;
mod stops;
mod tokenizer;

pub use chat::Templates;
pub use detok::Detokenizer;
pub use language::Direction;
pub use prompt::{Message, Messages, Prompt};
pub use stops::{Scan, StopStrings, Watch};
pub use tokenizer::Tokenizer;
