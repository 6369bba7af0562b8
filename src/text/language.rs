//! The languages that a tokenizer names to a model, and the tokens around a text that do so.

use std::fmt::Write;

/// The languages of a vocabulary.
#[derive(Debug, Clone)]
pub(super) struct Languages {
    pub form: Form,
    /// Codes and the ids of their tokens.
    pub codes: Vec<(String, u32)>,
    /// The source's token unless a call names another one.
    pub source: Option<u32>,
    /// Ends a text.
    pub eos: u32,
}

/// Where a text's language stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The source's before the text, and the end token behind it; the target's is what the decoder begins with.
    First,
    /// The end token behind the text, and the source's behind that; the target's is what the decoder begins with.
    Last,
    /// The target's before the text.
    Target,
}

/// The languages of a call, as the ids of their tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Direction {
    /// The language of prompts; unless set, the one that the checkpoint's files name.
    pub src_lang: Option<u32>,
    /// The language of results, for models that read it with the prompt.
    pub tgt_lang: Option<u32>,
}

impl Languages {
    /// The id of a language's token.
    pub fn id(&self, code: &str) -> Option<u32> {
        self.codes.iter().find(|(known, _)| known == code).map(|&(_, id)| id)
    }

    /// Puts around a text's ids what the model expects there.
    pub fn frame(&self, ids: Vec<u32>, direction: Direction) -> Vec<u32> {
        let source = direction.src_lang.or(self.source);
        let (first, last) = match self.form {
            Form::First => (source, None),
            Form::Last => (None, source),
            Form::Target => (direction.tgt_lang, None),
        };
        first.into_iter().chain(ids).chain([self.eos]).chain(last).collect()
    }

    /// All codes, for an error.
    pub fn list(&self) -> String {
        let mut list = String::new();
        for (index, (code, _)) in self.codes.iter().enumerate() {
            let _ = write!(list, "{}{code}", if index == 0 { "" } else { ", " });
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_language_stands_where_the_model_looks_for_it() {
        let mut languages = Languages { form: Form::First, codes: vec![("de".into(), 7), ("fr".into(), 8)], source: Some(7), eos: 2 };
        let frame = |languages: &Languages, src_lang, tgt_lang| languages.frame(vec![5, 6], Direction { src_lang, tgt_lang });
        assert_eq!(frame(&languages, None, Some(9)), [7, 5, 6, 2]);
        assert_eq!(frame(&languages, Some(8), None), [8, 5, 6, 2]);
        languages.form = Form::Last;
        assert_eq!(frame(&languages, Some(8), None), [5, 6, 2, 8]);
        languages.form = Form::Target;
        languages.source = None;
        assert_eq!((frame(&languages, None, None), frame(&languages, None, Some(8))), (vec![5, 6, 2], vec![8, 5, 6, 2]));
        assert_eq!((languages.id("fr"), languages.id("it"), languages.list().as_str()), (Some(8), None, "de, fr"));
    }
}
