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

#[cfg(test)]
mod tests {
    use crate::{
        config::GenerationConfig,
        error::{Error, Result},
        model::ModelInfo,
        plan::Plan,
        text::{Direction, Tokenizer, case},
    };
    use serde_json::{Value, json};

    fn plan(call: Value, model: Value, tokenizer: Option<&Tokenizer>) -> Result<Plan> {
        let config = |fields: Value| GenerationConfig::from_json(&fields).unwrap();
        Plan::new(&config(call), &config(model), &ModelInfo::new("test", 2048), tokenizer)
    }

    fn forced(plan: Result<Plan>) -> String {
        format!("{:?}", plan.unwrap().processors)
    }

    #[test]
    fn codes_become_what_the_prompt_and_the_result_begin_with() {
        let tokenizer = case("mbart50");
        let (french, romanian) = (tokenizer.language("fr_XX").unwrap(), tokenizer.language("ro_RO").unwrap());
        let plan = plan(json!({"src_lang": "fr_XX", "tgt_lang": "ro_RO"}), json!({"forced_bos_token_id": 5}), Some(&tokenizer)).unwrap();
        assert_eq!(plan.direction, Direction { src_lang: Some(french), tgt_lang: None });
        assert_eq!(format!("{:?}", plan.processors), format!("[ForcedBos {{ id: {romanian} }}]"));
        let ids = tokenizer.encode_as("hello", true, plan.direction).unwrap();
        assert_eq!((ids.first(), ids.last()), (Some(&french), tokenizer.eos().as_ref()));
        assert_ne!(tokenizer.encode("hello", true).unwrap(), ids, "its own file says de_DE");
    }

    #[test]
    fn marian_reads_the_target_with_the_prompt() {
        let tokenizer = case("marian");
        assert_eq!(tokenizer.languages(), ["de", "fr"]);
        let plan = plan(json!({"tgt_lang": "fr"}), json!({}), Some(&tokenizer)).unwrap();
        assert!(plan.processors.is_empty());
        assert_eq!(
            tokenizer.encode_as("hello", true, plan.direction).unwrap(),
            tokenizer.encode(">>fr<< hello", true).unwrap(),
            "as the text that names it"
        );
    }

    #[test]
    fn the_nearer_of_tgt_lang_and_forced_bos_counts() {
        let tokenizer = case("m2m100");
        let german = tokenizer.language("de").unwrap();
        let check = |call, model, id: u32| assert_eq!(forced(plan(call, model, Some(&tokenizer))), format!("[ForcedBos {{ id: {id} }}]"));
        check(json!({"tgt_lang": "de"}), json!({"forced_bos_token_id": 7}), german);
        check(json!({"forced_bos_token_id": 7}), json!({"tgt_lang": "de"}), 7);
        check(json!({"forced_bos_token_id": german, "tgt_lang": "de"}), json!({}), german);
        let error = plan(json!({"forced_bos_token_id": 7, "tgt_lang": "de"}), json!({}), Some(&tokenizer)).unwrap_err().to_string();
        assert!(error.contains("forced_bos_token_id") && error.contains("tgt_lang is de"), "{error}");
    }

    #[test]
    fn codes_that_say_nothing_are_refused() {
        let cases = [
            ("m2m100", json!({"src_lang": "de_DE"}), "src_lang", "accepted is one of af, am, ar"),
            ("mbart", json!({"tgt_lang": "de"}), "tgt_lang", "accepted is one of ar_AR, cs_CZ"),
            ("marian", json!({"tgt_lang": "it"}), "tgt_lang", "accepted is one of de, fr"),
            ("marian", json!({"src_lang": "de"}), "src_lang", "accepted is tgt_lang"),
            ("marian-separate", json!({"tgt_lang": "de"}), "tgt_lang", "no languages"),
            ("t5", json!({"src_lang": "en"}), "src_lang", "no languages"),
            (
                "nllb",
                json!({"tgt_lang": "deu_Latn", "suppress_tokens": [case("nllb").language("deu_Latn")]}),
                "tgt_lang",
                "suppress_tokens",
            ),
        ];
        for (name, call, field, part) in cases {
            let Err(Error::Config(problems)) = plan(call, json!({}), Some(&case(name))) else { panic!("{name} accepts it") };
            assert!(problems.len() == 1 && problems[0].field == field && problems[0].reason.contains(part), "{problems:?}");
        }
        assert!(plan(json!({"tgt_lang": "de"}), json!({}), None).is_err());
    }
}
