//! Chat templates against what the reference renders: tests/templates/make.py fills in the expectations.
#![cfg(feature = "chat")]
#![allow(clippy::unwrap_used)]

use candle_generate::text::{Message, Messages, Templates};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{fs, path::Path};

/// The arguments of a call of `apply_chat_template`, and what came of it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    template: Option<String>,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(default)]
    variables: Map<String, Value>,
    expected: Option<String>,
    /// What the template itself raised; empty for other errors.
    error: Option<String>,
}

#[test]
fn renderings_are_the_reference_s() {
    let folder = Path::new("tests/templates");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(cases) = fs::read(folder.join("cases.json")) else { continue };
        let cases: Vec<Case> = serde_json::from_slice(&cases).unwrap();
        let templates = Templates::from_folder(&folder).unwrap();
        for (index, case) in cases.into_iter().enumerate() {
            let case_name = format!("case {index} of {}", folder.display());
            let mut messages = Messages::new(case.messages);
            messages.tools = case.tools;
            messages.documents = case.documents;
            messages.template = case.template;
            messages.add_generation_prompt = case.add_generation_prompt;
            messages.continue_final_message = case.continue_final_message;
            messages.variables = case.variables;
            match (templates.render(&messages), case.expected, case.error) {
                (Ok(text), Some(expected), None) => assert_eq!(text, expected, "{case_name}"),
                (Err(error), None, Some(expected)) => assert!(error.to_string().contains(&expected), "{case_name}: {error}"),
                (Err(error), ..) => panic!("{case_name}: {error}"),
                (Ok(text), ..) => panic!("{case_name} is an error there, not {text:?}"),
            }
            count += 1;
        }
    }
    assert!(count > 40, "only {count} cases were found");
}
