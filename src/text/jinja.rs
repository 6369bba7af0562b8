//! Chat templates, rendered as Jinja2 renders them.

use super::{clock, json};
use crate::error::{Error, Result};
use minijinja::{
    AutoEscape, Environment, ErrorKind, State, Value, filters,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest, Serde, ValueKind, from_args},
};
use minijinja_contrib::pycompat;
use std::{
    error::Error as _,
    io,
    time::{SystemTime, UNIX_EPOCH},
};

/// Instructions of a rendering: a message takes about a hundred, an endless template stops within a second.
const FUEL: u64 = 5_000_000;
/// Bytes of a rendering: more than any model reads.
const OUTPUT: usize = 64 << 20;
/// Levels of macros that call each other.
const DEPTH: usize = 100;
/// Bytes of a template: several times the longest in use. An expression of as many terms is walked recursively, for which
/// [`STACK`] is enough.
const SOURCE: usize = 1 << 17;
/// Bytes of the stack that a template is compiled and rendered on; only what is used becomes memory.
const STACK: usize = 1 << 28;

type Outcome<T> = std::result::Result<T, minijinja::Error>;

/// Renders `template`, which errors call `name`.
pub(super) fn render(name: &str, template: &str, variables: &serde_json::Map<String, serde_json::Value>) -> Result<String> {
    if template.len() > SOURCE {
        return Err(Error::Template(format!("{name} has {} bytes; at most {SOURCE} are accepted", template.len())));
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || compile_and_render(name, template, variables));
        let thread = thread.map_err(|error| Error::Template(format!("{name} needs a thread: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(Error::Template(format!("{name} made the template engine panic"))))
    })
}

fn compile_and_render(name: &str, template: &str, variables: &serde_json::Map<String, serde_json::Value>) -> Result<String> {
    let explain = |error: minijinja::Error| {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            message = format!("{message}: {inner}");
            cause = inner.source();
        }
        Error::Template(message)
    };
    let environment = environment().map_err(explain)?;
    let source = prepare(template);
    let template = environment.template_from_named_str(name, &source).map_err(explain)?;
    let mut output = Output(Vec::new());
    template.render_captured_to(Value::from(Serde(variables)), &mut output).map_err(explain)?;
    String::from_utf8(output.0).map_err(|error| Error::Template(error.to_string()))
}

fn environment() -> Outcome<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(DEPTH);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> Outcome<Value> { Err(fault(message)) });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        clock::format(&format, now.as_secs())
    });
    // Where minijinja's own differ from Jinja2's: keywords of `default`, the length of nothing, and that strings, mappings,
    // slices and undefined values are sequences, but none is not iterable.
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Iterable | ValueKind::Undefined)
    });
    Ok(environment)
}

/// Brings a template to what minijinja reads: one kind of line ends, and `generation` blocks, which only mark the
/// assistant's text for training, as blocks that render their body.
fn prepare(template: &str) -> String {
    let template = template.replace("\r\n", "\n").replace('\r', "\n");
    let mut source = String::with_capacity(template.len());
    let mut rest = template.as_str();
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        source.push_str(before);
        rest = tag;
        let inner = tag.trim_start_matches(['-', '+']).trim_start();
        for (word, block) in [("generation", "with"), ("endgeneration", "endwith")] {
            let after = inner.strip_prefix(word);
            if let Some(after) = after.filter(|after| after.trim_start().trim_start_matches(['-', '+']).starts_with("%}")) {
                source.push_str(&tag[..tag.len() - inner.len()]);
                source.push_str(block);
                rest = after;
            }
        }
    }
    source + rest
}

/// HF: the filter is Python's `json.dumps`, without Jinja2's escapes for HTML.
fn tojson(value: &Value, positional: Rest<Value>, named: Kwargs) -> Outcome<String> {
    let option = |index: usize, name: &str| -> Outcome<Option<Value>> {
        let value = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => named.get(name)?,
        };
        Ok(value.filter(|value| !value.is_none()))
    };
    let ascii = option(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match option(1, "indent")? {
        Some(indent) if indent.kind() == ValueKind::Number => Some(" ".repeat(usize::try_from(indent).unwrap_or(0).min(64))),
        Some(indent) => Some(indent.to_string()),
        None => None,
    };
    let separators = match option(2, "separators")? {
        Some(pair) => match pair.try_iter()?.map(|part| part.to_string()).collect::<Vec<_>>().as_slice() {
            [item, key] => Some((item.clone(), key.clone())),
            _ => return Err(fault("tojson: separators take two strings".into())),
        },
        None => None,
    };
    let sort = option(3, "sort_keys")?.is_some_and(|value| value.is_true());
    named.assert_all_used()?;
    json::dumps(value, json::Style::new(ascii, indent, separators, sort))
}

fn default(value: &Value, other: Option<Value>, boolean: Option<bool>, named: Kwargs) -> Outcome<Value> {
    let other = other.or(named.get("default_value")?).unwrap_or_else(|| "".into());
    let boolean = boolean.or(named.get("boolean")?).unwrap_or(false);
    named.assert_all_used()?;
    Ok(if value.is_undefined() || boolean && !value.is_true() { other } else { value.clone() })
}

fn length(value: &Value) -> Outcome<usize> {
    if value.is_undefined() { Ok(0) } else { filters::length(value) }
}

/// Methods of Python's strings and lists that templates call.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Outcome<Value> {
    match (value.as_str(), name) {
        (Some(text), "removeprefix") => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        (Some(text), "removesuffix") => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        (Some(text), "partition") => {
            let (separator,): (&str,) = from_args(args)?;
            Ok(strings(text.split_once(separator).map_or([text, "", ""], |(head, tail)| [head, separator, tail])))
        }
        (Some(text), "rpartition") => {
            let (separator,): (&str,) = from_args(args)?;
            Ok(strings(text.rsplit_once(separator).map_or(["", "", text], |(head, tail)| [head, separator, tail])))
        }
        (Some(text), "rsplit") => {
            let (separator, most): (&str, Option<usize>) = from_args(args)?;
            let mut parts: Vec<_> = text.rsplitn(most.map_or(usize::MAX, |most| most.saturating_add(1)), separator).collect();
            parts.reverse();
            Ok(strings(parts))
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn strings<'a>(strings: impl IntoIterator<Item = &'a str>) -> Value {
    strings.into_iter().map(Value::from).collect()
}

pub(super) fn fault(message: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message)
}

/// Collects a rendering up to a limit.
struct Output(Vec<u8>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len().saturating_add(bytes.len()) > OUTPUT {
            return Err(io::Error::other(format!("the rendering is longer than {OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(template: &str) -> Result<String> {
        render("default", template, &serde_json::Map::new())
    }

    #[test]
    fn what_does_not_end_is_stopped() {
        let cases = [
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "fuel"),
            ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion limit"),
            ("{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}", "longer than 67108864 bytes"),
            (
                "{% set ns = namespace(x=1) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
                "more than 128 levels",
            ),
        ];
        for (template, expected) in cases {
            let error = run(template).unwrap_err();
            assert!(error.kind() == "template" && error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn a_long_expression_does_not_overflow_the_stack() {
        let terms = |count: usize| format!("{{{{ {}1 }}}}", "1+".repeat(count));
        assert_eq!(run(&terms(60_000)).unwrap(), "60001");
        let error = run(&terms(100_000)).unwrap_err();
        assert!(error.to_string().contains("at most 131072 are accepted"), "{error}");
    }

    #[test]
    fn errors_name_the_template_and_the_line() {
        for (template, expected) in
            [("a\n{{ x.y.z }}", "default:2"), ("\n\n{% nothing %}", "default:3"), ("{{ raise_exception('stop it') }}", "stop it")]
        {
            let error = run(template).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn generation_blocks_become_plain_ones() {
        let template = "{% generation %}a{%- endgeneration -%}{%generation+%}{% generations %}{{ generation }}{%- endgeneration %}\r\n\rb";
        assert_eq!(prepare(template), "{% with %}a{%- endwith -%}{%with+%}{% generations %}{{ generation }}{%- endwith %}\n\nb");
    }

    #[test]
    fn the_clock_is_there() {
        assert_eq!(run("{{ strftime_now('%d.%m.%Y') | length }}").unwrap(), "10");
    }
}
