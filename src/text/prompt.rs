//! What a call is asked to continue.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What a call is asked to continue.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Prompt {
    /// Text, encoded with the special tokens that the tokenizer frames a prompt with.
    Text(String),
    /// Ids, used as they are.
    Ids(Vec<u32>),
    /// A conversation, rendered by the checkpoint's chat template.
    Messages(Messages),
}

/// One turn of a conversation: a JSON object, usually with a role and a content, in the order in which its keys were set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message(Map<String, Value>);

/// A conversation, with what its template needs besides.
///
/// In JSON it is an object as in Hugging Face's conversational data sets: `messages`, and where they are set `tools`, `documents`,
/// `chat_template` and `chat_template_kwargs`. How a rendering ends is the caller's, and no part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Messages {
    /// The turns, first to last.
    pub messages: Vec<Message>,
    /// JSON schemas of functions that the model may call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
    /// Documents that the answer may use, usually with a title and a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<Vec<Value>>,
    /// Whether the rendering ends with the header of the assistant's next turn.
    #[serde(skip, default = "yes")]
    pub add_generation_prompt: bool,
    /// Whether the rendering ends with the last message's content, for the model to go on with it.
    #[serde(skip)]
    pub continue_final_message: bool,
    /// The name of one of the checkpoint's templates, or a template's text.
    #[serde(rename = "chat_template", default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Further variables of the template, such as `enable_thinking`.
    #[serde(rename = "chat_template_kwargs", default, skip_serializing_if = "Map::is_empty")]
    pub variables: Map<String, Value>,
}

fn yes() -> bool {
    true
}

impl Message {
    /// A turn of `role`. The content is usually text; for some templates it is a list of parts.
    pub fn new(role: impl Into<String>, content: impl Into<Value>) -> Self {
        Self::default().with("role", role.into()).with("content", content)
    }

    /// What the assistant is told before the conversation.
    pub fn system(content: impl Into<Value>) -> Self {
        Self::new("system", content)
    }

    /// A turn of the user.
    pub fn user(content: impl Into<Value>) -> Self {
        Self::new("user", content)
    }

    /// A turn of the assistant.
    pub fn assistant(content: impl Into<Value>) -> Self {
        Self::new("assistant", content)
    }

    /// Sets a key, such as `tool_calls` or `name`.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.0.insert(key.into(), value.into());
        self
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// The speaker.
    pub fn role(&self) -> Option<&str> {
        self.value("role")?.as_str()
    }

    /// The content, if it is text.
    pub fn content(&self) -> Option<&str> {
        self.value("content")?.as_str()
    }

    pub(super) fn object(&self) -> &Map<String, Value> {
        &self.0
    }
}

impl Messages {
    /// A conversation whose next turn is the assistant's.
    pub fn new(messages: impl Into<Vec<Message>>) -> Self {
        Self {
            messages: messages.into(),
            tools: None,
            documents: None,
            // HF: apply_chat_template leaves it out unless asked; whoever generates wants it.
            add_generation_prompt: true,
            continue_final_message: false,
            template: None,
            variables: Map::new(),
        }
    }

    /// Sets the functions that the model may call.
    pub fn tools(mut self, tools: impl Into<Vec<Value>>) -> Self {
        self.tools = Some(tools.into());
        self
    }

    /// Sets the documents that the answer may use.
    pub fn documents(mut self, documents: impl Into<Vec<Value>>) -> Self {
        self.documents = Some(documents.into());
        self
    }

    /// Sets whether the rendering ends with the header of the assistant's next turn.
    pub fn add_generation_prompt(mut self, yes: bool) -> Self {
        self.add_generation_prompt = yes;
        self
    }

    /// Sets whether the model goes on with the last message; if so, no header of a next turn is added.
    pub fn continue_final_message(mut self, yes: bool) -> Self {
        self.continue_final_message = yes;
        self.add_generation_prompt &= !yes;
        self
    }

    /// Sets the template, by the name it has in the checkpoint or by its text.
    pub fn template(mut self, template: impl Into<String>) -> Self {
        self.template = Some(template.into());
        self
    }

    /// Sets a further variable of the template.
    pub fn variable(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.variables.insert(name.into(), value.into());
        self
    }
}

/// A text is a turn of the user.
impl From<&str> for Message {
    fn from(text: &str) -> Self {
        Self::user(text)
    }
}

/// A text is a turn of the user.
impl From<String> for Message {
    fn from(text: String) -> Self {
        Self::user(text)
    }
}

impl From<Map<String, Value>> for Message {
    fn from(object: Map<String, Value>) -> Self {
        Self(object)
    }
}

impl<M: Into<Vec<Message>>> From<M> for Messages {
    fn from(messages: M) -> Self {
        Self::new(messages)
    }
}

macro_rules! from {
    ($($type:ty => |$prompt:ident| $value:expr),+ $(,)?) => {
        $(impl From<$type> for Prompt {
            fn from($prompt: $type) -> Self {
                $value
            }
        })+
    };
}

from! {
    &str => |text| Self::Text(text.into()),
    &String => |text| Self::Text(text.clone()),
    String => |text| Self::Text(text),
    Vec<u32> => |ids| Self::Ids(ids),
    &Vec<u32> => |ids| Self::Ids(ids.clone()),
    &[u32] => |ids| Self::Ids(ids.into()),
    Messages => |messages| Self::Messages(messages),
    &Messages => |messages| Self::Messages(messages.clone()),
    Vec<Message> => |messages| Self::Messages(messages.into()),
    &[Message] => |messages| Self::Messages(messages.into()),
    &Prompt => |prompt| prompt.clone(),
}

impl<const N: usize> From<[u32; N]> for Prompt {
    fn from(ids: [u32; N]) -> Self {
        Self::Ids(ids.into())
    }
}

impl<const N: usize> From<[Message; N]> for Prompt {
    fn from(messages: [Message; N]) -> Self {
        Self::Messages(messages.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn everything_that_can_be_continued_is_a_prompt() {
        let message = Message::user("hi");
        let messages = Prompt::Messages(Messages::new([message.clone()]));
        assert_eq!(Prompt::from("hi"), Prompt::Text("hi".into()));
        assert_eq!(Prompt::from([1, 2]), Prompt::Ids(vec![1, 2]));
        assert_eq!(Prompt::from(&[1_u32, 2][..]), Prompt::Ids(vec![1, 2]));
        assert_eq!(Prompt::from(vec![message.clone()]), messages);
        assert_eq!(Prompt::from([message]), messages);
    }

    #[test]
    fn a_message_keeps_every_key_in_its_order() {
        let text = r#"{"tool_calls":[{"id":"1"}],"role":"assistant","content":null,"name":"x"}"#;
        let message: Message = serde_json::from_str(text).unwrap();
        assert_eq!((message.role(), message.content(), message.value("name")), (Some("assistant"), None, Some(&json!("x"))));
        assert_eq!(serde_json::to_string(&message).unwrap(), text);
        assert!(serde_json::from_str::<Message>("[1]").is_err());
    }

    #[test]
    fn continuing_a_message_adds_no_header_unless_asked() {
        let messages = Messages::new([Message::assistant("a")]);
        assert!(messages.add_generation_prompt);
        assert!(!messages.clone().continue_final_message(true).add_generation_prompt);
        assert!(messages.continue_final_message(true).add_generation_prompt(true).add_generation_prompt);
    }
}
