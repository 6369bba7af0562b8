//! The chat templates of a checkpoint.

use super::{
    Message, Messages,
    special::{Special, object, read},
};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fs, io, path::Path};

/// Stands behind the message to continue, so that its end is found in the rendering.
const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// The names under which a message's reasoning is passed on, the usual one first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A checkpoint's chat templates. They are compiled when they are rendered, so that a faulty one spoils nothing else.
#[derive(Debug, Clone, Default)]
pub struct Templates {
    /// By name; `default` is the one for every day.
    named: BTreeMap<String, String>,
    /// Special tokens by role, which are variables of every template.
    tokens: BTreeMap<String, String>,
}

impl Templates {
    /// Reads the templates of tokenizer_config.json, or else those of chat_template.jinja and additional_chat_templates/.
    /// There need not be any.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let tokens = Special::from_folder(folder)?.named;
        // HF: files of their own win over the config's templates, all of them over all of them.
        let mut named = files(folder)?;
        if named.is_empty() {
            named = configured(&folder.join("tokenizer_config.json"))?;
        }
        Ok(Self { named, tokens })
    }

    /// Whether the checkpoint has none.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// The prompt that a conversation makes. It holds the special tokens already.
    ///
    /// # Errors
    /// [`Error::Template`] if there is no template, or it refuses the conversation; [`Error::Prompt`] if there is nothing to render or
    /// to continue; [`Error::Unsupported`] without the feature `chat`.
    pub fn render(&self, messages: &Messages) -> Result<String> {
        if cfg!(not(feature = "chat")) {
            return engine::render("", "", &Map::new());
        }
        let (name, template) = self.choose(messages)?;
        if messages.messages.is_empty() {
            return Err(Error::Prompt("there are no messages; at least one is needed".into()));
        }
        let mut turns: Vec<_> = messages.messages.iter().map(turn).collect();
        let continued = match turns.last_mut() {
            Some(last) if messages.continue_final_message => {
                if messages.add_generation_prompt {
                    return Err(Error::Prompt(
                        "continue_final_message and add_generation_prompt exclude each other: a message is continued, or a new one begun"
                            .into(),
                    ));
                }
                Some(mark(last)?)
            }
            _ => None,
        };
        let mut variables: Map<_, _> = self.tokens.iter().map(|(role, token)| (role.clone(), token.as_str().into())).collect();
        variables.extend(messages.variables.clone());
        variables.extend([
            ("messages".into(), turns.into_iter().map(Value::Object).collect()),
            ("tools".into(), messages.tools.clone().into()),
            ("documents".into(), messages.documents.clone().into()),
            ("add_generation_prompt".into(), messages.add_generation_prompt.into()),
        ]);
        let text = engine::render(name, template, &variables)?;
        match continued {
            Some(content) => cut(text, &content),
            None => Ok(text),
        }
    }

    fn choose<'a>(&'a self, messages: &'a Messages) -> Result<(&'a str, &'a str)> {
        let known = || match self.named.keys().map(String::as_str).collect::<Vec<_>>().join(", ") {
            names if names.is_empty() => "the checkpoint has none: a template's text would be accepted".to_owned(),
            names => format!("the checkpoint's templates are: {names}"),
        };
        let find = |name| self.named.get_key_value(name).map(|(name, template)| (name.as_str(), template.as_str()));
        match messages.template.as_deref() {
            // HF: a name that is not known renders as itself there; only what has a tag can be meant as a template.
            Some(name) if name.contains('{') => Ok(find(name).unwrap_or(("template", name))),
            Some(name) => find(name).ok_or_else(|| Error::Template(format!("there is no template named {name:?}; {}", known()))),
            None => {
                let tools = messages.tools.as_ref().and_then(|_| find("tool_use"));
                tools.or_else(|| find("default")).ok_or_else(|| Error::Template(format!("there is no default template; {}", known())))
            }
        }
    }
}

/// A message as templates see it.
// HF: keys without a value are left out, and reasoning goes by all of its names.
fn turn(message: &Message) -> Map<String, Value> {
    let mut turn: Map<_, _> =
        message.object().iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|key| turn.get(*key)).cloned() {
        if !turn.contains_key("thinking") {
            turn.shift_insert(0, "thinking".into(), reasoning.clone());
        }
        turn.insert("reasoning_content".into(), reasoning);
    }
    turn
}

/// Puts the mark behind the last text of a message, and gives that text.
fn mark(turn: &mut Map<String, Value>) -> Result<String> {
    let text = match turn.get_mut("content") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    };
    let text = text.ok_or_else(|| Error::Prompt("continue_final_message: the last message has no text that could be continued".into()))?;
    let content = text.clone();
    text.push_str(MARK);
    Ok(content)
}

/// The rendering up to the mark. A template that trims the content trims the mark's space, and so the text before it.
fn cut(mut text: String, content: &str) -> Result<String> {
    match text.rfind(MARK.trim_end()) {
        Some(end) if text.contains(content.trim()) => {
            let preserved = text[end..].starts_with(MARK);
            text.truncate(end);
            if !preserved {
                text.truncate(text.trim_end().len());
            }
            Ok(text)
        }
        _ => Err(Error::Template(
            "continue_final_message: the last message is not in the rendering as it is; the template changes or drops it".into(),
        )),
    }
}

fn files(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut paths = vec![("default".to_owned(), folder.join("chat_template.jinja"))];
    let additional = folder.join("additional_chat_templates");
    let entries = match fs::read_dir(&additional) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::load(&additional, error)),
    };
    for entry in entries.into_iter().flatten() {
        let path = entry.map_err(|error| Error::load(&additional, error))?.path();
        if let (Some(name), true) =
            (path.file_stem().and_then(|name| name.to_str()), path.extension().is_some_and(|extension| extension == "jinja"))
        {
            paths.push((name.to_owned(), path));
        }
    }
    let mut named = BTreeMap::new();
    for (name, path) in paths {
        if let Some(bytes) = read(&path)? {
            named.insert(name, String::from_utf8(bytes).map_err(|error| Error::load(&path, error))?);
        }
    }
    Ok(named)
}

fn configured(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut config = object(path)?.unwrap_or_default();
    let damaged =
        || Error::load(path, "chat_template: a string, or a list of objects with the strings \"name\" and \"template\", would be accepted");
    match config.remove("chat_template") {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(template)) => Ok(BTreeMap::from([("default".to_owned(), template)])),
        Some(Value::Array(list)) => {
            let text = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
            list.iter().map(|entry| text(entry, "name").zip(text(entry, "template")).ok_or_else(damaged)).collect()
        }
        Some(_) => Err(damaged()),
    }
}

#[cfg(feature = "chat")]
use super::jinja as engine;

#[cfg(not(feature = "chat"))]
mod engine {
    use super::{Error, Map, Result, Value};

    pub(super) fn render(_: &str, _: &str, _: &Map<String, Value>) -> Result<String> {
        Err(Error::Unsupported("messages need a chat template, which this build cannot render; the feature `chat` adds it".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn templates(named: &[&str]) -> Templates {
        Templates { named: named.iter().map(|name| ((*name).to_owned(), format!("{{{{ '{name}' }}}}"))).collect(), ..Default::default() }
    }

    #[test]
    fn a_template_is_chosen_by_name_tools_or_default() {
        let (many, hi) = (templates(&["default", "tool_use", "rag"]), Messages::new([Message::user("hi")]));
        let name = |templates: &Templates, messages: &Messages| templates.choose(messages).map(|(name, _)| name.to_owned());
        assert_eq!(name(&many, &hi).unwrap(), "default");
        assert_eq!(name(&many, &hi.clone().tools([])).unwrap(), "tool_use");
        assert_eq!(name(&many, &hi.clone().tools([]).template("rag")).unwrap(), "rag");
        assert_eq!(name(&templates(&["default"]), &hi.clone().tools([])).unwrap(), "default");
        assert_eq!(many.choose(&hi.clone().template("{{ x }}")).unwrap().1, "{{ x }}");
        let message = |result: Result<String>| result.unwrap_err().to_string();
        assert!(
            message(name(&many, &hi.clone().template("ragg"))).contains("\"ragg\"; the checkpoint's templates are: default, rag, tool_use")
        );
        assert!(message(name(&templates(&["rag"]), &hi)).contains("no default template; the checkpoint's templates are: rag"));
        assert!(message(name(&templates(&[]), &hi)).contains("the checkpoint has none"));
    }

    #[cfg(feature = "chat")]
    #[test]
    fn messages_that_cannot_be_rendered_are_a_prompt_s_fault() {
        let templates = templates(&["default"]);
        let none = Message::new("assistant", Value::Null);
        let continued = Messages::new([Message::assistant("a")]).continue_final_message(true);
        for messages in [Messages::new([]), Messages::new([none]).continue_final_message(true), continued.add_generation_prompt(true)] {
            assert_eq!(templates.render(&messages).unwrap_err().kind(), "prompt");
        }
    }

    #[test]
    fn reasoning_goes_by_all_its_names_and_nulls_are_dropped() {
        let message = Message::user("a").with("reasoning", "b").with("tool_calls", Value::Null);
        assert_eq!(
            Value::Object(turn(&message)).to_string(),
            json!({"thinking": "b", "role": "user", "content": "a", "reasoning": "b", "reasoning_content": "b"}).to_string()
        );
    }

    #[test]
    fn damage_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let check = |expected: &str| {
            let error = Templates::from_folder(folder.path()).unwrap_err();
            assert!(error.kind() == "load" && error.to_string().contains(expected), "{error}");
        };
        assert!(Templates::from_folder(folder.path()).unwrap().is_empty());
        for config in [r#"{"chat_template": 5}"#, r#"{"chat_template": [{"name": "default"}]}"#] {
            fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
            check("tokenizer_config.json: chat_template");
        }
        fs::write(folder.path().join("chat_template.jinja"), [0xFF]).unwrap();
        check("chat_template.jinja");
    }

    #[cfg(not(feature = "chat"))]
    #[test]
    fn without_the_feature_rendering_is_unsupported() {
        let error = templates(&[]).render(&Messages::new([Message::user("a")])).unwrap_err();
        assert!(error.kind() == "unsupported" && error.to_string().contains("feature `chat`"), "{error}");
    }
}
