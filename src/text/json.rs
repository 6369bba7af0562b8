//! Values of a template, written as Python's `json.dumps` writes them.

use super::jinja::fault;
use minijinja::{Error, Value, value::ValueKind};

/// Levels of lists and mappings within each other; serde_json reads as many.
const DEPTH: usize = 128;

/// The arguments of `json.dumps` that change what is written.
pub(super) struct Style {
    ascii: bool,
    /// One level's.
    indent: Option<String>,
    /// Between items, and between a key and its value.
    separators: (String, String),
    sort: bool,
}

impl Style {
    pub(super) fn new(ascii: bool, indent: Option<String>, separators: Option<(String, String)>, sort: bool) -> Self {
        let item = if indent.is_some() { "," } else { ", " };
        Self { ascii, indent, separators: separators.unwrap_or((item.into(), ": ".into())), sort }
    }
}

pub(super) fn dumps(value: &Value, style: Style) -> Result<String, Error> {
    let mut writer = Writer { style, text: String::new(), depth: 0 };
    writer.value(value)?;
    Ok(writer.text)
}

struct Writer {
    style: Style,
    text: String,
    depth: usize,
}

impl Writer {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.text.push_str(&scalar(value)),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<_> = value.try_iter()?.collect();
                self.nest('[', ']', &items, |writer, item| writer.value(item))?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let name = key.as_str().map_or_else(|| scalar(&key), str::to_owned);
                    items.push((name, value.get_item(&key)?));
                }
                if self.style.sort {
                    items.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.nest('{', '}', &items, |writer, (name, value)| {
                    writer.string(name);
                    writer.text.push_str(&writer.style.separators.1);
                    writer.value(value)
                })?;
            }
            kind => return Err(fault(format!("tojson: {kind} has no JSON"))),
        }
        Ok(())
    }

    fn nest<T>(&mut self, open: char, close: char, items: &[T], write: impl Fn(&mut Self, &T) -> Result<(), Error>) -> Result<(), Error> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err(fault(format!("tojson: more than {DEPTH} levels")));
        }
        self.text.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.text.push_str(&self.style.separators.0);
            }
            self.line();
            write(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.line();
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self) {
        if let Some(indent) = &self.style.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(indent.as_str(), self.depth));
        }
    }

    fn string(&mut self, string: &str) {
        self.text.push('"');
        for character in string.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                ' '..='~' => self.text.push(character),
                '\u{7f}'.. if !self.style.ascii => self.text.push(character),
                _ => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        self.text.push_str(&format!("\\u{unit:04x}"));
                    }
                }
            }
        }
        self.text.push('"');
    }
}

fn scalar(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float),
        _ => value.to_string(),
    }
}

/// Python's shortest spelling of a float: with an exponent below 1e-4 and from 1e16 on.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{number:e}");
    match scientific.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
        Some((digits, exponent)) if !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => format!("{number:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_spelt_as_python_spells_them() {
        let floats = [1.0, -0.0, 0.1, 1e15, 1e16, 1.5e300, 1e-4, 1e-5, 2.5e-7, 123_456.789, f64::INFINITY];
        let expected =
            ["1.0", "-0.0", "0.1", "1000000000000000.0", "1e+16", "1.5e+300", "0.0001", "1e-05", "2.5e-07", "123456.789", "Infinity"];
        assert_eq!(floats.map(float), expected);
    }

    #[test]
    fn control_characters_are_escaped() {
        let text = Value::from("\"\\/\n\u{8}\u{1}\u{7f}é😀");
        let dump = |ascii| dumps(&text, Style::new(ascii, None, None, false)).unwrap();
        assert_eq!(dump(false), "\"\\\"\\\\/\\n\\b\\u0001\u{7f}é😀\"");
        assert_eq!(dump(true), "\"\\\"\\\\/\\n\\b\\u0001\\u007f\\u00e9\\ud83d\\ude00\"");
    }

    #[test]
    fn what_has_no_json_is_an_error() {
        assert!(dumps(&Value::UNDEFINED, Style::new(false, None, None, false)).is_err());
    }
}
