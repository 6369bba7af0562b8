//! Text at the door and at the exit: prompts, the tokenizer, and text that appears token by token.

mod tokenizer;

pub use tokenizer::Tokenizer;
