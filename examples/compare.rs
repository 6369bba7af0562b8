//! One prompt under every strategy: what each says, how fast, and how likely the model itself finds it.
//!
//! `cargo run --release --example compare -- --prompt "There was once a king" --markdown`

mod common;

use anyhow::Result;
use candle_generate::{Error, GenerationConfig, Generator, Prompt};
use clap::Parser;
use serde_json::{Value, json};
use std::io::{self, Write};

/// Continues one prompt with every strategy and compares them
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    source: common::Source,
    /// The text to continue
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// The most tokens to generate
    #[arg(long, default_value_t = 40)]
    max_new_tokens: usize,
    /// The word that the beams of forced phrases have to produce
    #[arg(long, default_value = "forest")]
    word: String,
    /// What is drawn depends on it
    #[arg(long, default_value_t = 2)]
    seed: u64,
    /// Print a table in Markdown
    #[arg(long)]
    markdown: bool,
}

/// What a strategy came to.
struct Line {
    strategy: &'static str,
    settings: String,
    result: Result<Cells, String>,
}

struct Cells {
    tokens: usize,
    milliseconds: f64,
    per_second: f64,
    /// The mean log-probability of a token, by the model alone.
    mean: f64,
    text: String,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    common::quiet(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    let generator = cli.source.load()?;
    let prompt = Prompt::from(generator.encode(cli.prompt.as_str())?);
    // The first call finds the weights cold; its time would say nothing of its strategy.
    generator.generate(&prompt, &GenerationConfig::greedy().max_new_tokens(1))?;
    let mut lines = Vec::new();
    for (strategy, settings) in strategies(&generator, &cli.word)? {
        let result = match compare(&generator, &prompt, &settings, cli) {
            Ok(cells) => Ok(cells),
            Err(Error::Unsupported(reason)) => Err(reason),
            Err(error) => return Err(error.into()),
        };
        lines.push(Line { strategy, settings: written(&settings), result });
    }
    let mut out = io::stdout().lock();
    if cli.markdown {
        markdown(&mut out, &cli.prompt, &lines)?
    } else {
        table(&mut out, &cli.prompt, &lines)?
    }
    Ok(())
}

/// Every strategy by its name and the fields of generation_config.json that choose it.
fn strategies(generator: &Generator, word: &str) -> Result<Vec<(&'static str, Value)>> {
    let phrase = generator.tokenizer().map(|tokenizer| tokenizer.variants(word)).transpose()?;
    let mut list = vec![
        ("greedy", json!({})),
        ("greedy, penalised", json!({"repetition_penalty": 1.2, "no_repeat_ngram_size": 3})),
        ("sampling", json!({"do_sample": true, "temperature": 0.8, "top_p": 0.95})),
        ("beam search", json!({"num_beams": 4})),
        ("beam sampling", json!({"num_beams": 4, "do_sample": true, "temperature": 1.2})),
        ("diverse beams", json!({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0})),
    ];
    list.extend(phrase.map(|phrase| ("forced phrase", json!({"num_beams": 4, "force_words_ids": [phrase]}))));
    list.extend([
        ("contrastive search", json!({"penalty_alpha": 0.6, "top_k": 4})),
        ("DoLa", json!({"dola_layers": "high", "repetition_penalty": 1.2})),
        ("guidance", json!({"guidance_scale": 1.5})),
        ("prompt lookup", json!({"prompt_lookup_num_tokens": 5})),
    ]);
    Ok(list)
}

fn compare(generator: &Generator, prompt: &Prompt, settings: &Value, cli: &Cli) -> candle_generate::Result<Cells> {
    // What chooses a mode or shapes its scores in the model's own file would hide what the strategy does.
    let neutral = json!({"do_sample": false, "num_beams": 1, "top_k": 50, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0});
    let mut fields = neutral.as_object().cloned().unwrap_or_default();
    fields.extend(settings.as_object().cloned().unwrap_or_default());
    let config = GenerationConfig::from_json(&Value::Object(fields))?.max_new_tokens(cli.max_new_tokens).seed(cli.seed);
    let output = generator.generate(prompt, &config)?;
    let score = generator.score(prompt, [output.tokens()])?;
    Ok(Cells {
        tokens: output.usage.generated_tokens,
        milliseconds: output.timings.total.as_secs_f64() * 1e3,
        per_second: output.timings.tokens_per_second(&output.usage),
        mean: score.first().map_or(f64::NAN, |score| score.mean()),
        text: output.text().to_owned(),
    })
}

/// `num_beams 4, do_sample`: fields that are true stand alone, and ids are left to the word that they spell.
fn written(settings: &Value) -> String {
    let field = |(name, value): (&String, &Value)| match value {
        Value::Bool(true) | Value::Array(_) => name.clone(),
        Value::String(text) => format!("{name} {text}"),
        value => format!("{name} {value}"),
    };
    settings.as_object().into_iter().flatten().map(field).collect::<Vec<_>>().join(", ")
}

fn table(out: &mut impl Write, prompt: &str, lines: &[Line]) -> io::Result<()> {
    const WIDTH: usize = 72;
    let name = lines.iter().map(|line| line.strategy.len()).max().unwrap_or(0);
    let indent = name + 39;
    writeln!(out, "{prompt:?}\n")?;
    writeln!(out, "{:name$}  {:>6}  {:>8}  {:>8}  {:>7}  text", "strategy", "tokens", "ms", "tokens/s", "log p")?;
    for Line { strategy, result, .. } in lines {
        match result {
            Ok(cells) => {
                let Cells { tokens, milliseconds, per_second, mean, text } = cells;
                write!(out, "{strategy:name$}  {tokens:>6}  {milliseconds:>8.1}  {per_second:>8.0}  {mean:>7.3}  ")?;
                writeln!(out, "{}", wrap(text, WIDTH).join(&format!("\n{:indent$}", "")))?;
            }
            Err(reason) => writeln!(out, "{strategy:name$}  skipped: {reason}")?,
        }
    }
    writeln!(out, "\nlog p: the mean log-probability of a token, by the model alone")
}

fn markdown(out: &mut impl Write, prompt: &str, lines: &[Line]) -> io::Result<()> {
    writeln!(out, "| strategy | settings | tokens/s | log p | {} ... |", cell(prompt))?;
    writeln!(out, "| --- | --- | ---: | ---: | --- |")?;
    for Line { strategy, settings, result } in lines {
        match result {
            Ok(Cells { per_second, mean, text, .. }) => {
                writeln!(out, "| {strategy} | {} | {per_second:.0} | {mean:.2} | {} |", cell(settings), cell(text.trim()))?
            }
            Err(reason) => writeln!(out, "| {strategy} | {} | | | skipped: {} |", cell(settings), cell(reason))?,
        }
    }
    Ok(())
}

/// Text that stays in its cell and means nothing to Markdown.
fn cell(text: &str) -> String {
    let mut cell = String::new();
    for c in text.chars() {
        match c {
            '\n' => cell.push_str("<br>"),
            '<' => cell.push_str("&lt;"),
            '&' => cell.push_str("&amp;"),
            c if c.is_control() => cell.push(' '),
            c if "\\`*_{}[]|~#".contains(c) => cell.extend(['\\', c]),
            c => cell.push(c),
        }
    }
    cell
}

/// Lines of at most `width` characters, but for longer words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => line.extend([" ", word]),
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stay_cells() {
        assert_eq!(cell("a|b\n<i>*_x_*</i>\r&"), "a\\|b<br>&lt;i>\\*\\_x\\_\\*&lt;/i> &amp;");
    }

    #[test]
    fn text_is_wrapped_between_words() {
        assert_eq!(wrap("one two  three\nfour", 8), ["one two", "three", "four"]);
        assert_eq!(wrap("incomprehensible a", 4), ["incomprehensible", "a"]);
        assert_eq!(wrap(" ", 4), [""]);
    }
}
