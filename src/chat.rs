//! A conversation under way: a turn computes only what the turns before it have not computed.

use crate::{
    config::GenerationConfig,
    error::{Error, Result},
    generator::Generator,
    output::{Output, Piece},
    run::Stream,
    text::{Message, Messages},
};
use serde_json::Value;
use std::{
    ffi::OsString,
    fmt, fs,
    io::{Read, Write},
    mem,
    path::Path,
};

/// Bytes of a saved conversation: more than any model reads.
const FILE: u64 = 1 << 28;

/// A conversation, the model that answers, and what is computed of it so far.
///
/// Every turn renders the whole conversation by the chat template and computes what follows the tokens that it has in common with the
/// turn before. So a turn is what [`Generator::generate`] gives for the same messages, whatever the template makes of earlier ones and
/// however they were edited; only less of it is computed ([`Usage::reused_tokens`](crate::Usage::reused_tokens)). The text of the first
/// sequence becomes the assistant's message.
///
/// A turn that fails leaves the conversation as it was. A clone is a fork: both go on from here, each for itself, and share what is
/// computed.
///
/// ```
/// use candle_generate::{GenerationConfig, Generator};
///
/// # #[cfg(feature = "chat")] {
/// let mut chat = Generator::from_pretrained("examples/models/storyteller")?.chat();
/// let config = GenerationConfig::greedy();
/// assert_eq!(chat.send("Hello!", &config)?.text(), "Good day! Shall I tell you a story?");
///
/// let mut fork = chat.clone();
/// let output = chat.send("Tell me a story about a fox.", &config)?;
/// assert!(output.usage.reused_tokens > 10 && chat.messages().len() == 4);
/// assert_eq!(fork.send("Goodbye!", &config)?.text(), fork.messages()[3].content().unwrap());
///
/// // The last answer again, this time drawn.
/// chat.regenerate(&GenerationConfig::sampling().seed(7))?;
/// # }
/// # Ok::<(), candle_generate::Error>(())
/// ```
#[derive(Clone)]
pub struct Chat {
    generator: Generator,
    conversation: Messages,
}

impl Generator {
    /// Begins a conversation. It goes on from this generator's [prefix](Generator::prefix) as calls do.
    ///
    /// ```
    /// use candle_generate::{Generator, Message};
    ///
    /// # #[cfg(feature = "chat")] {
    /// let generator = Generator::from_pretrained("examples/models/storyteller")?;
    /// let system = Message::system("You are a storyteller.");
    /// // Read once, whoever comes to talk.
    /// let prepared = generator.prefix([system.clone()])?;
    /// let mut chat = prepared.chat();
    /// chat.push(system);
    /// # }
    /// # Ok::<(), candle_generate::Error>(())
    /// ```
    pub fn chat(&self) -> Chat {
        Chat { generator: self.clone(), conversation: Messages::new([]) }
    }
}

impl Chat {
    /// Adds a message, and answers. A text is the user's; anything else, such as a tool's result, is a [`Message`].
    ///
    /// ```
    /// use candle_generate::{FinishReason, GenerationConfig, Generator};
    ///
    /// # #[cfg(feature = "chat")] {
    /// let mut chat = Generator::from_pretrained("examples/models/storyteller")?.chat();
    /// let output = chat.send("Hello!", &GenerationConfig::greedy())?;
    /// assert_eq!(output.sequences[0].finish, FinishReason::Eos);
    /// assert_eq!(chat.messages()[1].content(), Some(output.text()));
    /// # }
    /// # Ok::<(), candle_generate::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Generator::generate`]. The message is then not in the conversation.
    pub fn send(&mut self, message: impl Into<Message>, config: &GenerationConfig) -> Result<Output> {
        self.stream(message, config)?.collect()
    }

    /// As [`Chat::send`], piece by piece.
    pub fn stream(&mut self, message: impl Into<Message>, config: &GenerationConfig) -> Result<Reply<'_>> {
        let mut conversation = self.conversation.clone();
        conversation.messages.push(message.into());
        self.answer(conversation, config)
    }

    /// Answers once more: what the assistant said last gives way. Where the last message is another's, it is answered.
    ///
    /// # Errors
    /// Those of [`Generator::generate`]. The last answer then stays.
    pub fn regenerate(&mut self, config: &GenerationConfig) -> Result<Output> {
        self.restream(config)?.collect()
    }

    /// As [`Chat::regenerate`], piece by piece.
    pub fn restream(&mut self, config: &GenerationConfig) -> Result<Reply<'_>> {
        let mut conversation = self.conversation.clone();
        let asked = conversation.messages.iter().rposition(|message| message.role() != Some("assistant"));
        conversation.messages.truncate(asked.map_or(0, |last| last + 1));
        self.answer(conversation, config)
    }

    /// The messages, first to last.
    pub fn messages(&self) -> &[Message] {
        &self.conversation.messages
    }

    /// The messages, and what the template is told besides: tools, documents, variables.
    pub fn conversation(&self) -> &Messages {
        &self.conversation
    }

    /// As [`Chat::conversation`], to be edited at will: the next turn computes what follows the first change. Whether a header of the
    /// assistant's turn is added, or the last message continued, is not looked at: a turn is always a new one of the assistant.
    ///
    /// ```
    /// use candle_generate::Generator;
    ///
    /// let mut chat = Generator::from_pretrained("examples/models/storyteller")?.chat();
    /// chat.conversation_mut().variables.insert("enable_thinking".into(), false.into());
    /// # Ok::<(), candle_generate::Error>(())
    /// ```
    pub fn conversation_mut(&mut self) -> &mut Messages {
        &mut self.conversation
    }

    /// Adds a message that is not answered yet.
    pub fn push(&mut self, message: impl Into<Message>) {
        self.conversation.messages.push(message.into());
    }

    /// Sets what the assistant is told before the conversation, in place of what it was told so far.
    pub fn system(&mut self, text: impl Into<String>) {
        let told = self.messages().first().is_some_and(|message| message.role() == Some("system"));
        self.conversation.messages.splice(..usize::from(told), [Message::system(text.into())]);
    }

    /// Forgets all but the first `len` messages.
    pub fn rewind(&mut self, len: usize) {
        self.conversation.messages.truncate(len);
    }

    /// Writes the conversation as JSON, in the form of [`Messages`]. A file of that name is replaced once all of it is written.
    ///
    /// # Errors
    /// [`Error::Save`] names the file that could not be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut name = path.file_name().map_or_else(OsString::new, OsString::from);
        name.push(".part");
        let part = path.with_file_name(name);
        let write = || {
            let mut file = fs::File::create(&part)?;
            serde_json::to_writer_pretty(&mut file, &self.conversation)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&part, path)
        };
        write().map_err(|error| {
            // Of no use to anybody, if it is there at all.
            let _ = fs::remove_file(&part);
            Error::save(path, error)
        })
    }

    /// Takes up a conversation that was saved, or a list of messages, in place of this one.
    ///
    /// ```
    /// use candle_generate::{Error, Generator};
    ///
    /// let generator = Generator::from_pretrained("examples/models/storyteller")?;
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("chat.json");
    /// let mut chat = generator.chat();
    /// chat.push("Hello!");
    /// chat.save(&path)?;
    ///
    /// let mut other = generator.chat();
    /// other.load(&path)?;
    /// assert_eq!(other.messages(), chat.messages());
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Load`] names the file and what it holds instead of a conversation. The conversation is then as it was.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut bytes = Vec::new();
        let file = fs::File::open(path).map_err(|error| Error::load(path, error))?;
        file.take(FILE + 1).read_to_end(&mut bytes).map_err(|error| Error::load(path, error))?;
        if bytes.len() as u64 > FILE {
            return Err(Error::load(path, format!("it is longer than {FILE} bytes, the most that a conversation may have")));
        }
        self.conversation = parse(&bytes).map_err(|reason| Error::load(path, reason))?;
        Ok(())
    }

    fn answer(&mut self, conversation: Messages, config: &GenerationConfig) -> Result<Reply<'_>> {
        let prompt = conversation.clone().continue_final_message(false).add_generation_prompt(true);
        let stream = self.generator.turn(prompt, config)?;
        Ok(Reply { chat: self, conversation, stream, open: true })
    }
}

impl fmt::Debug for Chat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chat").field("generator", &self.generator).field("conversation", &self.conversation).finish()
    }
}

/// An answer as it comes; the pieces of row 0 are its text.
///
/// When it ends, is [cancelled](crate::CancelToken) or is dropped half-way, what was said so far is the assistant's message, text that
/// no piece has shown yet included. If nothing was said, or the turn failed, the conversation is as it was before the turn.
///
/// ```
/// use candle_generate::{GenerationConfig, Generator};
///
/// # #[cfg(feature = "chat")] {
/// let mut chat = Generator::from_pretrained("examples/models/storyteller")?.chat();
/// for piece in chat.stream("Tell me a story about a fox.", &GenerationConfig::greedy())?.take(5) {
///     print!("{}", piece?.text);
/// }
/// assert_eq!(chat.messages().len(), 2);
/// # }
/// # Ok::<(), candle_generate::Error>(())
/// ```
#[must_use = "an answer is generated as it is read"]
pub struct Reply<'a> {
    chat: &'a mut Chat,
    /// What the answer is added to.
    conversation: Messages,
    stream: Stream,
    /// Whether it may still become a part of the conversation.
    open: bool,
}

impl Reply<'_> {
    /// The result so far, as [`Stream::into_output`] gives it: with it the turn ends.
    pub fn into_output(mut self) -> Result<Output> {
        self.close()
    }

    fn collect(mut self) -> Result<Output> {
        self.try_for_each(|piece| piece.map(drop))?;
        self.close()
    }

    fn close(&mut self) -> Result<Output> {
        let open = mem::take(&mut self.open);
        let (output, prefix) = self.stream.end()?;
        if open {
            if let Some(answer) = output.sequences.first().filter(|answer| !answer.tokens.is_empty()) {
                self.conversation.messages.push(Message::assistant(answer.text.as_str()));
                mem::swap(&mut self.chat.conversation, &mut self.conversation);
            }
            self.chat.generator.begin(prefix);
        }
        Ok(output)
    }
}

impl Iterator for Reply<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.stream.next();
        self.open &= !matches!(piece, Some(Err(_)));
        piece
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        if self.open {
            // Whoever drops an answer does not ask what became of it; if ending it fails, the conversation is as it was.
            let _ = self.close();
        }
    }
}

impl fmt::Debug for Reply<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("stream", &self.stream).finish_non_exhaustive()
    }
}

/// The conversation that a file holds, or why it holds none.
fn parse(bytes: &[u8]) -> Result<Messages, String> {
    let conversation: Messages = match serde_json::from_slice(bytes).map_err(|error| error.to_string())? {
        Value::Array(messages) => {
            let messages: Vec<Message> = serde_json::from_value(messages.into()).map_err(|error| error.to_string())?;
            messages.into()
        }
        value @ Value::Object(_) => serde_json::from_value(value).map_err(|error| error.to_string())?,
        _ => return Err("it holds neither an object with messages nor a list of messages".into()),
    };
    match conversation.messages.iter().position(|message| message.role().is_none()) {
        Some(index) => Err(format!("message {index} has no role: a string such as \"user\" is accepted")),
        None => Ok(conversation),
    }
}
