//! Typed, bounded reading of `config.json`.

use crate::error::{Error, Result};
use candle_core::DType;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The largest width, vocabulary or position table that is believed. Bounds keep products of sizes inside `usize`, and
/// nothing is allocated by a size before the file's tensors confirm it.
pub(crate) const WIDTH: usize = 1 << 24;
/// The largest number of layers or heads, and the largest head, that is believed.
pub(crate) const COUNT: usize = 1 << 12;

/// A JSON object whose fields have defaults. An absent field has its default. A null means *none* where a size or number is
/// optional, nothing for flags and strings, and is refused elsewhere.
pub(crate) struct Fields {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    /// Reads `config.json` of a folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read(&path).map_err(|error| Error::load(&path, error))?;
        let map = serde_json::from_slice(&text).map_err(|error| Error::load(&path, error))?;
        Ok(Self { path, map })
    }

    #[cfg(test)]
    pub fn new(map: Map<String, Value>) -> Self {
        Self { path: "config.json".into(), map }
    }

    /// An object inside this one, if it is there and neither null nor empty.
    pub fn object(&self, name: &str) -> Result<Option<Self>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok((!map.is_empty()).then(|| Self { path: self.path.clone(), map: map.clone() })),
            Some(value) => Err(self.error(name, value, "an object is accepted")),
        }
    }

    /// The same with the fields of `other`, which come first.
    pub fn updated(mut self, other: Self) -> Self {
        self.map.extend(other.map);
        self
    }

    /// Whether a field is there and not null.
    pub fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// The name that a field has: another that the reference reads in its place, if that is there, or its own.
    pub fn either<'a>(&self, other: &'a str, name: &'a str) -> &'a str {
        if self.has(other) { other } else { name }
    }

    /// A number from 1 to `max`.
    pub fn size(&self, name: &str, default: usize, max: usize) -> Result<usize> {
        match self.map.get(name) {
            None => Ok(default),
            Some(value) => self.parse_size(name, value, max),
        }
    }

    /// A number from 1 to `max`, or none if the field is null.
    pub fn optional_size(&self, name: &str, default: Option<usize>, max: usize) -> Result<Option<usize>> {
        match self.map.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => self.parse_size(name, value, max).map(Some),
        }
    }

    /// A whole number, zero included.
    pub fn number(&self, name: &str, default: usize) -> Result<usize> {
        match self.map.get(name) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
                .ok_or_else(|| self.error(name, value, "whole numbers from 0 are accepted")),
        }
    }

    /// A number above zero.
    pub fn positive(&self, name: &str, default: f64) -> Result<f64> {
        match self.map.get(name) {
            None => Ok(default),
            Some(value) => self.parse_positive(name, value),
        }
    }

    /// A number above zero, or none if the field is null.
    pub fn optional_positive(&self, name: &str, default: Option<f64>) -> Result<Option<f64>> {
        match self.map.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => self.parse_positive(name, value).map(Some),
        }
    }

    /// A number above zero that has no default.
    pub fn required_positive(&self, name: &str) -> Result<f64> {
        self.parse_positive(name, self.map.get(name).unwrap_or(&Value::Null))
    }

    /// A list of `count` numbers above zero.
    pub fn positives(&self, name: &str, count: usize) -> Result<Vec<f64>> {
        let value = self.map.get(name).unwrap_or(&Value::Null);
        let list = value.as_array().filter(|list| list.len() == count);
        let list = list.ok_or_else(|| self.error(name, value, &format!("a list of {count} numbers is accepted")))?;
        list.iter().map(|value| self.parse_positive(name, value)).collect()
    }

    /// True or false.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(value) => Err(self.error(name, value, "true and false are accepted")),
        }
    }

    /// A string.
    pub fn text<'a>(&'a self, name: &str, default: &'a str) -> Result<&'a str> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::String(value)) => Ok(value),
            Some(value) => Err(self.error(name, value, "a string is accepted")),
        }
    }

    /// A list of whole numbers, zero included, if it is there and not null.
    pub fn numbers(&self, name: &str) -> Result<Option<Vec<usize>>> {
        let number = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_array()
                .and_then(|list| list.iter().map(number).collect())
                .map(Some)
                .ok_or_else(|| self.error(name, value, "a list of whole numbers is accepted")),
        }
    }

    /// A list of strings, if it is there and not null.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<&str>>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_array()
                .and_then(|list| list.iter().map(Value::as_str).collect())
                .map(Some)
                .ok_or_else(|| self.error(name, value, "a list of strings is accepted")),
        }
    }

    /// The type that the checkpoint was meant to run in; f32 where it says nothing.
    pub fn dtype(&self) -> Result<DType> {
        // HF: `torch_dtype` up to 4.x, `dtype` since.
        match self.text("dtype", self.text("torch_dtype", "float32")?)? {
            "float32" => Ok(DType::F32),
            "bfloat16" => Ok(DType::BF16),
            "float16" => Ok(DType::F16),
            other => Err(self.error("dtype", other, "float32, bfloat16 and float16 are accepted")),
        }
    }

    /// An error about a field.
    pub fn error(&self, name: &str, value: impl std::fmt::Display, reason: &str) -> Error {
        Error::load(&self.path, format!("{name} = {value}: {reason}"))
    }

    fn parse_size(&self, name: &str, value: &Value, max: usize) -> Result<usize> {
        value
            .as_u64()
            .and_then(|size| usize::try_from(size).ok())
            .filter(|size| (1..=max).contains(size))
            .ok_or_else(|| self.error(name, value, &format!("whole numbers from 1 to {max} are accepted")))
    }

    fn parse_positive(&self, name: &str, value: &Value) -> Result<f64> {
        // Checked as f32 too: what is below its smallest or above its largest value would be zero or infinite in use.
        let usable = |value: &f64| *value as f32 > 0.0 && (*value as f32).is_finite();
        value.as_f64().filter(usable).ok_or_else(|| self.error(name, value, "a number above 0 is accepted"))
    }
}
