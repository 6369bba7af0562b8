//! The languages of a call: what its prompts are encoded with, and what its results begin with.

use super::{Check, Origin};
use crate::text::Direction;

impl Check<'_> {
    /// The languages that prompts are encoded with.
    pub fn direction(&mut self) -> Direction {
        let src_lang = self.config.src_lang.as_deref();
        if src_lang.is_some() && self.prompts_name_target() {
            let reason = "the model is told the language of results alone; accepted is tgt_lang";
            self.refuse("src_lang", src_lang.unwrap_or_default(), reason);
            return Direction::default();
        }
        let src_lang = self.language("src_lang", src_lang);
        let tgt_lang = self.config.tgt_lang.as_deref().filter(|_| self.prompts_name_target());
        Direction { src_lang, tgt_lang: self.language("tgt_lang", tgt_lang) }
    }

    /// The first id of results, if their language is it. A `forced_bos_token_id` of the model's file gives way to the call's language.
    pub fn target(&mut self) -> Option<u32> {
        let code = self.config.tgt_lang.as_deref().filter(|_| !self.prompts_name_target());
        let id = self.language("tgt_lang", code)?;
        let forced = self.config.forced_bos_token_id.filter(|&forced| forced != i64::from(id));
        match (self.merged.origin("forced_bos_token_id"), self.merged.origin("tgt_lang"), forced) {
            (Origin::Call, Origin::Call, Some(forced)) => {
                self.refuse("forced_bos_token_id", forced, format!("tgt_lang is {}, whose token is {id}", code.unwrap_or_default()));
                None
            }
            (Origin::Call, _, Some(_)) => None,
            _ => Some(id),
        }
    }

    fn prompts_name_target(&self) -> bool {
        self.tokenizer.is_some_and(|tokenizer| tokenizer.prompts_name_target())
    }

    fn language(&mut self, field: &str, code: Option<&str>) -> Option<u32> {
        let code = code?;
        let id = self.tokenizer.and_then(|tokenizer| tokenizer.language(code));
        if id.is_none() {
            let known = self.tokenizer.map(|tokenizer| tokenizer.languages().join(", ")).filter(|known| !known.is_empty());
            let known = known.map(|known| format!("accepted is one of {known}"));
            self.refuse(field, code, known.unwrap_or_else(|| "the model is told no languages; accepted is to leave it unset".into()));
        }
        id
    }
}
