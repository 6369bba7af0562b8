//! Opens one generation up: a page that shows how likely each token was, what else was, what each processor did, and how beams grew.
//!
//! `cargo run --release --example inspect -- --generation-config '{"num_beams": 4}' --out beams.html`

mod common;

use anyhow::{Context, Result};
use candle_generate::{Error, GenerationConfig, Generator, Output};
use clap::Parser;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::PathBuf,
};

/// The page; `DATA` in it stands for what it shows.
const PAGE: &str = include_str!("inspect.html");

/// Writes a page that shows what happened at every step of a generation
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    source: common::Source,
    /// The text to continue
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// The settings, as generation_config.json has them
    #[arg(long, value_name = "JSON", value_parser = settings,
        default_value = r#"{"do_sample": true, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 2}"#)]
    generation_config: GenerationConfig,
    /// The most tokens to generate
    #[arg(long, default_value_t = 48)]
    max_new_tokens: usize,
    /// Where to write the page; - is stdout
    #[arg(long, value_name = "FILE", default_value = "inspect.html")]
    out: PathBuf,
    /// Write what the page shows as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    common::quiet(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    let generator = cli.source.load()?;
    let config = cli.generation_config.clone().max_new_tokens(cli.max_new_tokens);
    let output = generator.inspect(cli.prompt.as_str(), &config)?;
    let data = data(&generator, &config, &generator.encode(cli.prompt.as_str())?, &output)?;
    let text = if cli.json { data.to_string() } else { page(&data) };
    if cli.out.as_os_str() == "-" {
        writeln!(io::stdout(), "{text}")?;
    } else {
        fs::write(&cli.out, text).with_context(|| format!("cannot write {}", cli.out.display()))?;
        eprintln!("{} shows {} tokens", cli.out.display(), output.usage.generated_tokens);
    }
    Ok(())
}

fn settings(json: &str) -> Result<GenerationConfig, String> {
    let json: Value = serde_json::from_str(json).map_err(|error| error.to_string())?;
    GenerationConfig::from_json(&json).map_err(|error: Error| error.to_string())
}

/// All that the page shows.
fn data(generator: &Generator, config: &GenerationConfig, prompt: &[u32], output: &Output) -> Result<Value> {
    let explanation = generator.explain(config)?;
    let mut ids: BTreeSet<u32> = prompt.iter().copied().collect();
    for step in output.sequences.iter().flat_map(|sequence| sequence.steps.iter().flatten()) {
        ids.insert(step.token);
        ids.extend(step.top.iter().map(|candidate| candidate.token));
        for effect in &step.effects {
            ids.extend(effect.likeliest.iter().map(|&(id, _)| id).chain(effect.top));
        }
    }
    ids.extend(output.beams.iter().flatten().map(|beam| beam.token));
    let names = ids.into_iter().map(|id| Ok((id.to_string(), json!(name(generator, id)?)))).collect::<Result<_>>()?;
    Ok(json!({
        "model": generator.model().info().name,
        "mode": explanation.mode,
        "explanation": explanation.to_string(),
        "prompt": prompt,
        // A script's numbers are too short for seeds.
        "seeds": output.sequences.iter().map(|sequence| sequence.seed.map(|seed| seed.to_string())).collect::<Vec<_>>(),
        "names": Value::Object(names),
        "output": output,
    }))
}

/// The text of one token; its own spelling where that is no text, or part of a character.
fn name(generator: &Generator, id: u32) -> Result<String> {
    let Some((tokenizer, token)) = generator.tokenizer().and_then(|tokenizer| Some((tokenizer, tokenizer.token(id)?))) else {
        return Ok(format!("#{id}"));
    };
    let text = tokenizer.decode(&[id], false)?;
    Ok(match text.as_str() {
        "" => token.replace('\u{2581}', " "),
        text if text.contains('\u{fffd}') => token,
        // Decoders take the first space of a text away.
        text if token.starts_with('\u{2581}') && !text.starts_with(' ') => format!(" {text}"),
        text => text.to_owned(),
    })
}

/// The page. Tokens are hostile text: no `<` of theirs may end the element that holds the data, and the page shows them as text alone.
fn page(data: &Value) -> String {
    PAGE.replacen("DATA", &data.to_string().replace('<', "\\u003c"), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_tokens_stay_data() {
        let page = page(&json!({"names": {"1": "</script><script>alert(1)</script><!--"}}));
        let start = page.find(r#"type="application/json">"#).unwrap();
        let rest = &page[start..];
        let data = &rest[rest.find('>').unwrap() + 1..rest.find("</script>").unwrap()];
        assert!(!data.contains('<') && data.contains("alert(1)"));
        assert_eq!(serde_json::from_str::<Value>(data).unwrap()["names"]["1"], "</script><script>alert(1)</script><!--");
    }

    #[test]
    fn the_page_needs_nothing_from_outside() {
        assert_eq!(PAGE.matches("DATA").count(), 1);
        let page = PAGE.replace("http://www.w3.org/2000/svg", "");
        for outside in ["http:", "https:", "src=", "@import", "url(", "innerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
