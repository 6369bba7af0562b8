//! Tokenizers that the reference itself runs on the sentencepiece library: a model for the pieces, and vocabularies for their ids.

use super::model::Model;
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::Arc,
};
use tokenizers::AddedToken;

/// A tokenizer of MarianTokenizer's or M2M100Tokenizer's making.
#[derive(Debug)]
pub(in crate::text) struct Slow {
    /// Of prompts.
    source: Voice,
    /// Of results.
    target: Voice,
    /// Writes pieces as text.
    writer: Arc<Model>,
    marian: bool,
    /// Tokens that are no pieces of a text, with their ids in prompts.
    added: BTreeMap<String, (u32, AddedToken)>,
}

/// A language's, or all languages', way from text to ids.
#[derive(Debug, Clone)]
pub(super) struct Voice {
    pub model: Arc<Model>,
    pub ids: Arc<HashMap<String, u32>>,
    pub tokens: Arc<BTreeMap<u32, String>>,
    pub unk: u32,
}

/// A part of a text: an added token, or what stands between such.
enum Part<'a> {
    Added(&'a str, u32),
    Text(&'a str),
}

impl Slow {
    /// Puts a tokenizer together. Added tokens that the vocabulary lacks are appended to it.
    pub(super) fn new(source: Voice, target: Voice, writer: Arc<Model>, marian: bool, added: Vec<AddedToken>) -> Self {
        let mut next = source.tokens.last_key_value().map_or(0, |(&id, _)| id.saturating_add(1));
        let mut known = BTreeMap::new();
        for token in added.into_iter().filter(|token| !token.content.is_empty()) {
            let id = source.ids.get(&token.content).copied().unwrap_or_else(|| {
                next = next.saturating_add(1);
                next - 1
            });
            known.entry(token.content.clone()).or_insert((id, token));
        }
        Self { source, target, writer, marian, added: known }
    }

    /// The ids of a text that is read, or of one as the model writes it.
    pub fn encode(&self, text: &str, written: bool) -> Vec<u32> {
        let voice = if written { &self.target } else { &self.source };
        let mut ids = Vec::new();
        for part in self.parts(text) {
            match part {
                Part::Added(token, id) => ids.push(voice.ids.get(token).copied().unwrap_or(id)),
                Part::Text(mut text) => {
                    // A target language is named by a token before the text.
                    if self.marian
                        && text.starts_with(">>")
                        && let Some(end) = text.find("<<")
                    {
                        let (code, rest) = text.split_at(end + 2);
                        ids.push(voice.id(code));
                        text = rest;
                    }
                    ids.extend(voice.model.encode(text).iter().map(|piece| voice.id(piece)));
                }
            }
        }
        ids
    }

    /// The text of ids.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let (mut text, mut pieces) = (String::new(), Vec::new());
        for &id in ids {
            let Some(token) = self.token(id) else { continue };
            if !self.added.get(token).is_some_and(|(_, added)| added.special) {
                pieces.push(token);
            } else if !skip_special_tokens {
                text.push_str(&self.writer.decode(pieces.drain(..)));
                text.push_str(token);
                text.push_str(if self.marian { " " } else { "" });
            }
        }
        text.push_str(&self.writer.decode(pieces));
        if self.marian {
            text = text.replace(super::normal::SPACE, " ");
        }
        text.trim_matches(is_space).to_owned()
    }

    /// The token of an id that the model writes.
    pub fn token(&self, id: u32) -> Option<&str> {
        let added = || self.added.iter().find(|(_, (other, _))| *other == id).map(|(token, _)| token);
        self.target.tokens.get(&id).or_else(added).map(String::as_str)
    }

    /// The id of a token that the model writes.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.target.ids.get(token).or_else(|| Some(&self.added.get(token)?.0)).copied()
    }

    /// All tokens that the model writes, with their ids.
    pub fn vocabulary(&self) -> impl Iterator<Item = (&str, u32)> {
        let added = self.added.iter().filter(|(token, _)| !self.target.ids.contains_key(*token));
        self.target.ids.iter().map(|(token, &id)| (token.as_str(), id)).chain(added.map(|(token, (id, _))| (token.as_str(), *id)))
    }

    /// The ids that are no part of a text that the model writes.
    // HF: these are the ids of what it reads there, which a vocabulary of its own for what it writes may have for pieces.
    pub fn special(&self) -> impl Iterator<Item = u32> {
        let special = self.added.iter().filter(|(_, (_, token))| token.special);
        special.map(|(token, (id, _))| self.target.ids.get(token).copied().unwrap_or(*id))
    }

    /// Cuts a text at added tokens, of those that begin at one place at the longest, and takes the white space that they ask for.
    fn parts<'a>(&self, text: &'a str) -> Vec<Part<'a>> {
        let firsts: BTreeSet<u8> = self.added.keys().filter_map(|token| token.bytes().next()).collect();
        let (mut parts, mut start, mut at) = (Vec::new(), 0, 0);
        while at < text.len() {
            let found = firsts.contains(&text.as_bytes()[at]).then(|| {
                let here = self.added.iter().filter(|(token, _)| text[at..].starts_with(token.as_str()));
                here.max_by_key(|(token, _)| token.len())
            });
            let Some((token, (id, added))) = found.flatten() else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
                continue;
            };
            let before = &text[start..at];
            parts.push(Part::Text(if added.lstrip { before.trim_end() } else { before }));
            parts.push(Part::Added(&text[at..at + token.len()], *id));
            at += token.len();
            start = if added.rstrip { text.len() - text[at..].trim_start().len() } else { at };
            at = start;
        }
        parts.push(Part::Text(&text[start..]));
        parts.retain(|part| !matches!(part, Part::Text("")));
        parts
    }
}

impl Voice {
    /// Reads a vocabulary. `more` tokens are numbered behind it.
    pub fn new(model: Arc<Model>, vocab: Map<String, Value>, more: &[String], unk: &str, path: &Path) -> Result<Self> {
        let mut ids = HashMap::with_capacity(vocab.len());
        for (token, id) in vocab {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let number = number.ok_or_else(|| Error::load(path, format!("{token:?} has the id {id}; a number below 2^32 is accepted")))?;
            ids.insert(token, number);
        }
        let len = ids.len() as u32;
        for (token, id) in more.iter().zip(len..) {
            ids.entry(token.clone()).or_insert(id);
        }
        let reason = || format!("it lacks the unknown token {unk:?}; a vocabulary with it is accepted");
        let unk = ids.get(unk).copied().ok_or_else(|| Error::load(path, reason()))?;
        let tokens = ids.iter().map(|(token, &id)| (id, token.clone())).collect();
        Ok(Self { model, ids: Arc::new(ids), tokens: Arc::new(tokens), unk })
    }

    fn id(&self, piece: &str) -> u32 {
        self.ids.get(piece).copied().unwrap_or(self.unk)
    }
}

/// What Python takes for white space, four characters more than what Unicode does.
pub(in crate::text) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&character)
}
