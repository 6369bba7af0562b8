//! The types of fields that numbers, strings and lists do not cover, and how each type is read from JSON.

use super::Strategy;
use crate::{
    error::Problem,
    logits::{PenaltyScope, Watermarking},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A whole number of any width, as the setters take it. Negative ones can be set, so that a mistake is reported with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int(i64);

/// A seed: what a setter takes, so that a plain `7` is one. Negative numbers are taken bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed(u64);

/// One value or a list, kept in the form in which it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One value.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// When a beam search ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EarlyStopping {
    /// When no better candidate exists.
    Never,
    /// As soon as `num_beams` candidates are finished (`true`), or when a better one is unlikely (`false`).
    #[serde(untagged)]
    When(bool),
}

/// The layers that DoLa contrasts with the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DolaLayers {
    /// The lower half.
    Low,
    /// The upper half.
    High,
    /// These.
    #[serde(untagged)]
    Layers(Vec<usize>),
}

impl DolaLayers {
    /// The layers of a model with `layers` of them whose head is tied to the embeddings or not; 0 are the embeddings. May be empty.
    // HF: 4.55.4's choice. What tied embeddings say is what they were fed, so they are left out; layers that a list names beyond the
    // last but one are passed over.
    pub(crate) fn resolve(&self, layers: usize, tied: bool) -> Vec<usize> {
        let half = layers / 2;
        let first = match (tied, layers) {
            (true, 3..) => 2,
            (true, 2) => 1,
            _ => 0,
        };
        match self {
            Self::Low if first == half => vec![first],
            Self::Low => (first..if layers <= 40 { half } else { 20 }).step_by(2).collect(),
            Self::High => (if layers <= 40 { half } else { layers - 20 }..layers).step_by(2).collect(),
            Self::Layers(list) => list.iter().copied().filter(|&layer| layer < layers).collect(),
        }
    }
}

/// Words to steer towards: the next token of every keyword not yet produced is raised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boost {
    /// The keywords.
    pub words: Vec<String>,
    /// What is added to the score; 5 unless set.
    #[serde(default = "five")]
    pub bias: f64,
    /// Boosting stops this many tokens before the row's end; 10 unless set.
    #[serde(default = "ten")]
    pub stop: usize,
}

impl Boost {
    /// Boosts `words` with the default bias and stop.
    pub fn new<S: Into<String>>(words: impl IntoIterator<Item = S>) -> Self {
        Self { words: words.into_iter().map(Into::into).collect(), bias: five(), stop: ten() }
    }
}

/// A type that a field of the config has.
pub(super) trait Field: Sized {
    /// The values accepted, as an error names them.
    const ACCEPTS: &'static str;

    fn read(value: &Value) -> Option<Self>;

    fn write(&self) -> Value;
}

/// The value of `key`; null is unset, and what does not fit the type is a problem.
pub(super) fn read<T: Field>(key: &str, value: &Value, problems: &mut Vec<Problem>) -> Option<T> {
    if value.is_null() {
        return None;
    }
    let read = T::read(value);
    if read.is_none() {
        problems.push(Problem { field: key.to_owned(), value: shown(value), reason: format!("accepted is {}", T::ACCEPTS) });
    }
    read
}

/// JSON for an error message, cut where it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}..", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

macro_rules! serde_fields {
    ($($type:ty: $accepts:literal,)*) => {$(
        impl Field for $type {
            const ACCEPTS: &'static str = $accepts;

            fn read(value: &Value) -> Option<Self> {
                Self::deserialize(value).ok()
            }

            fn write(&self) -> Value {
                json!(self)
            }
        }
    )*};
}

serde_fields! {
    bool: "true or false",
    i64: "an integer",
    u64: "an integer from 0 up",
    // HF: an integer where a float belongs is an error there when the processor is built; it means the same number.
    f64: "a number",
    String: "a string",
    Value: "any value",
    Vec<String>: "a list of strings",
    BTreeMap<u32, f64>: "an object from token ids to numbers",
    Vec<u32>: "a list of token ids",
    Vec<u64>: "a list of integers from 0 up",
    Vec<Vec<u32>>: "a list of lists of token ids",
    (i64, f64): "a list of an integer and a number",
    OneOrMany<i64>: "a token id or a list of token ids",
    OneOrMany<String>: "a string or a list of strings",
    Vec<OneOrMany<String>>: "a list of phrases, each a string or a list of strings",
    EarlyStopping: "true, false or \"never\"",
    DolaLayers: "\"low\", \"high\" or a list of layers",
    PenaltyScope: "\"all\", \"generated\" or {\"last\": n}",
    Watermarking: "{\"greenlist_ratio\": a number, \"bias\": a number, \"hashing_key\": an integer, \"seeding_scheme\": \"lefthash\" or \"selfhash\", \"context_width\": an integer from 1 up}",
    Boost: "{\"words\": a list of strings, \"bias\": a number, \"stop\": an integer from 0 up}",
    Strategy: "a mode with its parameters, such as {\"mode\": \"beam\", \"num_beams\": 4}",
}

impl Field for Vec<(Vec<u32>, f64)> {
    const ACCEPTS: &'static str = "a list of pairs of a list of token ids and a number";

    /// HF: a file saved from a dict with tuple keys has text such as `"(5, 6)"` for them, which transformers cannot load back.
    fn read(value: &Value) -> Option<Self> {
        let Value::Object(object) = value else { return Self::deserialize(value).ok() };
        let pair = |(key, bias): (&String, &Value)| {
            let ids = key.strip_prefix('(')?.strip_suffix(')')?;
            let ids = ids.strip_suffix(',').unwrap_or(ids).split(',').map(|id| id.trim().parse().ok());
            Some((ids.collect::<Option<_>>()?, bias.as_f64()?))
        };
        object.iter().map(pair).collect()
    }

    /// JSON has no infinities: the largest finite number stands for them, and becomes one as `f32`.
    fn write(&self) -> Value {
        json!(self.iter().map(|(ids, bias)| (ids, bias.clamp(f64::MIN, f64::MAX))).collect::<Vec<_>>())
    }
}

impl Field for Vec<Vec<Vec<u32>>> {
    const ACCEPTS: &'static str = "a list of phrases, each a list of token ids or a list of such lists";

    fn read(value: &Value) -> Option<Self> {
        let phrase = |entry: &Value| {
            let one = Vec::<u32>::deserialize(entry).map(|ids| vec![ids]);
            one.or_else(|_| Vec::<Vec<u32>>::deserialize(entry)).ok()
        };
        value.as_array()?.iter().map(phrase).collect()
    }

    fn write(&self) -> Value {
        let phrase = |alternatives: &Vec<Vec<u32>>| match alternatives.as_slice() {
            [ids] => json!(ids),
            alternatives => json!(alternatives),
        };
        self.iter().map(phrase).collect()
    }
}

impl From<bool> for EarlyStopping {
    fn from(value: bool) -> Self {
        Self::When(value)
    }
}

impl From<Seed> for u64 {
    fn from(value: Seed) -> Self {
        value.0
    }
}

impl From<u64> for Seed {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl From<i32> for Seed {
    fn from(value: i32) -> Self {
        Self(value as u64)
    }
}

impl From<Int> for i64 {
    fn from(value: Int) -> Self {
        value.0
    }
}

macro_rules! ints {
    ($($type:ty)*) => {$(
        impl From<$type> for Int {
            fn from(value: $type) -> Self {
                Self(i64::try_from(value).unwrap_or(i64::MAX))
            }
        }
    )*};
}

ints!(i32 u32 i64 u64 usize);

macro_rules! one_or_many {
    ($($from:ty => $type:ty;)*) => {$(
        impl From<$from> for OneOrMany<$type> {
            fn from(value: $from) -> Self {
                Self::One(value.into())
            }
        }

        impl From<Vec<$from>> for OneOrMany<$type> {
            fn from(values: Vec<$from>) -> Self {
                Self::Many(values.into_iter().map(Into::into).collect())
            }
        }

        impl<const N: usize> From<[$from; N]> for OneOrMany<$type> {
            fn from(values: [$from; N]) -> Self {
                Self::Many(values.into_iter().map(Into::into).collect())
            }
        }
    )*};
}

one_or_many! {
    i32 => i64;
    u32 => i64;
    i64 => i64;
    &str => String;
    String => String;
}

fn five() -> f64 {
    5.0
}

fn ten() -> usize {
    10
}

#[cfg(test)]
mod tests {
    use super::*;

    // The lists that `_dola_decoding` of transformers 4.55.4 makes.
    #[test]
    fn layers_of_dola_are_those_of_the_reference() {
        for (layers, tied, low, high) in [
            (1, true, vec![0], vec![0]),
            (2, true, vec![1], vec![1]),
            (2, false, vec![0], vec![1]),
            (3, true, vec![], vec![1]),
            (3, false, vec![0], vec![1]),
            (4, true, vec![2], vec![2]),
            (12, true, vec![2, 4], vec![6, 8, 10]),
            (12, false, vec![0, 2, 4], vec![6, 8, 10]),
            (48, true, vec![2, 4, 6, 8, 10, 12, 14, 16, 18], vec![28, 30, 32, 34, 36, 38, 40, 42, 44, 46]),
        ] {
            assert_eq!(DolaLayers::Low.resolve(layers, tied), low, "{layers} {tied}");
            assert_eq!(DolaLayers::High.resolve(layers, tied), high, "{layers} {tied}");
        }
        assert_eq!(DolaLayers::Layers(vec![3, 0, 4, 9, 3]).resolve(4, true), [3, 0, 3]);
    }
}
