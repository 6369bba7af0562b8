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

/// The tokenizer of a case of tests/tokenizers/spm.
#[cfg(test)]
pub(crate) fn case(name: &str) -> Tokenizer {
    let models = std::path::Path::new("tests/tokenizers/spm");
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(models.join("cases.json")).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (file, content) in cases[name].as_object().unwrap() {
        match content.as_str() {
            Some(model) => drop(std::fs::copy(models.join(model), folder.path().join(file)).unwrap()),
            None => std::fs::write(folder.path().join(file), content.to_string()).unwrap(),
        }
    }
    Tokenizer::from_folder(folder.path()).unwrap().unwrap()
}
