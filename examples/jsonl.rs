//! Offline batch inference: JSON lines in on stdin, one JSON line out on stdout for each, in order.
//!
//! A request is an object with these keys:
//!
//! - `id`: anything; it comes back in the response (`null` if it is left out)
//! - exactly one of `prompt` (a string), `prompts` (strings), `input_ids` (rows of ids, of any lengths) and `messages`
//!   (`[{"role", "content"}]`, rendered by the chat template with its generation prompt)
//! - `generation_config`: Hugging Face's field names, over the model's own generation_config.json; `null` is unset
//! - `seed`: of the first row; 0 unless given
//!
//! The response is `{"id", "sequences", "texts", "finish_reasons", "sequences_scores", "scores", "logits"}`:
//!
//! - `sequences`: the generated ids of each row: no prompt, no padding, the end token included
//! - `texts`: those ids decoded alone, special tokens skipped, nothing trimmed; `null` without a tokenizer
//! - `finish_reasons`: `eos` (also for a further stop token), `length`, `stop_string`, `time` or `cancelled`
//! - `sequences_scores`: a number for each row in the beam modes, else `null`
//! - `scores`, `logits`: `[row][step][vocabulary]` where `output_scores` or `output_logits` is true, else `null`. JSON has
//!   no number for it, so negative infinity is `null`, and `"NaN"` and `"Infinity"` are strings
//!
//! or `{"id", "error": {"kind", "message"}}`, after which the next line is read. A line that is no request is such an error,
//! of kind `request`. Empty lines are skipped.

mod common;

use anyhow::Result;
use candle_generate::{FinishReason, GenerationConfig, Generator, Message, Output, Prompt};
use clap::Parser;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use std::io::{self, BufRead, BufWriter, Write};

/// Answers one JSON line per request line
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    source: common::Source,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    common::quiet(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    let generator = cli.source.load()?;
    let (mut input, mut out) = (io::stdin().lock(), BufWriter::new(io::stdout().lock()));
    let mut line = Vec::new();
    while input.read_until(b'\n', &mut line)? > 0 {
        if !line.trim_ascii().is_empty() {
            serde_json::to_writer(&mut out, &answer(&generator, &line)).map_err(io::Error::from)?;
            out.write_all(b"\n")?;
            // Whatever happens to a later line, this answer is out.
            out.flush()?;
        }
        line.clear();
    }
    Ok(())
}

fn answer(generator: &Generator, line: &[u8]) -> Response {
    let mut id = Value::Null;
    let outcome = (|| {
        let request = Request::parse(line, &mut id)?;
        let output = generator.generate_batch(request.prompts, &request.config)?;
        Outcome::new(generator, output)
    })();
    match outcome {
        Ok(outcome) => Response::Done { id, outcome },
        Err(error) => Response::Failed { id, error },
    }
}

/// A request line, understood.
struct Request {
    prompts: Vec<Prompt>,
    config: GenerationConfig,
}

impl Request {
    /// Understands a line; `id` is set as soon as it is known, for an error's sake.
    fn parse(line: &[u8], id: &mut Value) -> Result<Self, Failure> {
        let request: Value = serde_json::from_slice(line).map_err(|error| Failure::request(format!("the line is not JSON: {error}")))?;
        let Value::Object(mut request) = request else {
            return Err(Failure::request("the line is not a JSON object"));
        };
        *id = request.remove("id").unwrap_or_default();
        // As in a config, null is unset.
        request.retain(|_, value| !value.is_null());
        let prompts = prompts(&mut request)?;
        let config = GenerationConfig::from_json(&request.remove("generation_config").unwrap_or_else(|| Map::new().into()))?;
        let seed = match request.remove("seed") {
            Some(seed) => {
                seed.as_u64().ok_or_else(|| Failure::request(format!("seed = {seed}: an integer from 0 to {} is accepted", u64::MAX)))?
            }
            None => config.seed.unwrap_or(0),
        };
        if !request.is_empty() {
            let unknown: Vec<_> = request.keys().map(String::as_str).collect();
            let accepted = "id, prompt, prompts, input_ids, messages, generation_config and seed are accepted";
            return Err(Failure::request(format!("unknown keys: {}; {accepted}", unknown.join(", "))));
        }
        Ok(Self { prompts, config: config.seed(seed) })
    }
}

/// Takes the one key that holds the prompts.
fn prompts(request: &mut Map<String, Value>) -> Result<Vec<Prompt>, Failure> {
    const KEYS: [&str; 4] = ["prompt", "prompts", "input_ids", "messages"];
    let mut given: Vec<_> = KEYS.into_iter().filter_map(|key| Some((key, request.remove(key)?))).collect();
    let (Some((key, value)), true) = (given.pop(), given.is_empty()) else {
        return Err(Failure::request(format!("exactly one of {} is accepted", KEYS.join(", "))));
    };
    let wrong = |error| Failure::request(format!("{key}: {error}"));
    let prompts: Vec<Prompt> = match key {
        "prompt" => vec![Prompt::from(serde_json::from_value::<String>(value).map_err(wrong)?)],
        "prompts" => serde_json::from_value::<Vec<String>>(value).map_err(wrong)?.into_iter().map(Prompt::from).collect(),
        "input_ids" => serde_json::from_value::<Vec<Vec<u32>>>(value).map_err(wrong)?.into_iter().map(Prompt::from).collect(),
        _ => vec![Prompt::from(messages(value).map_err(wrong)?)],
    };
    if prompts.is_empty() {
        return Err(Failure::request(format!("{key} has no rows: at least one is accepted")));
    }
    Ok(prompts)
}

fn messages(value: Value) -> Result<Vec<Message>, serde_json::Error> {
    let messages: Vec<Message> = serde_json::from_value(value)?;
    match messages.iter().position(|message| message.role().is_none() || message.value("content").is_none()) {
        Some(index) => Err(serde::de::Error::custom(format!("message {index} needs a role and a content"))),
        None => Ok(messages),
    }
}

/// One line out.
#[derive(Serialize)]
#[serde(untagged)]
enum Response {
    Done {
        id: Value,
        #[serde(flatten)]
        outcome: Outcome,
    },
    Failed {
        id: Value,
        error: Failure,
    },
}

#[derive(Serialize)]
struct Outcome {
    sequences: Vec<Vec<u32>>,
    texts: Option<Vec<String>>,
    finish_reasons: Vec<&'static str>,
    sequences_scores: Option<Vec<Number>>,
    scores: Option<Vec<Steps>>,
    logits: Option<Vec<Steps>>,
}

/// `[step][vocabulary]`
type Steps = Vec<Vec<Number>>;

impl Outcome {
    fn new(generator: &Generator, output: Output) -> Result<Self, Failure> {
        let decode = |tokens: &[u32]| generator.tokenizer().map(|tokenizer| tokenizer.decode(tokens, true)).transpose();
        let mut outcome = Self {
            texts: output.sequences.iter().map(|sequence| decode(&sequence.tokens)).collect::<candle_generate::Result<_>>()?,
            finish_reasons: output.sequences.iter().map(|sequence| finish_reason(sequence.finish)).collect(),
            sequences_scores: output.sequences.iter().map(|sequence| sequence.score.map(Number)).collect(),
            sequences: Vec::new(),
            scores: None,
            logits: None,
        };
        for sequence in output.sequences {
            outcome.sequences.push(sequence.tokens);
            if let Some(scores) = sequence.scores {
                outcome.scores.get_or_insert_default().push(steps(scores));
            }
            if let Some(logits) = sequence.logits {
                outcome.logits.get_or_insert_default().push(steps(logits));
            }
        }
        Ok(outcome)
    }
}

fn steps(values: Vec<Vec<f32>>) -> Steps {
    values.into_iter().map(|step| step.into_iter().map(Number).collect()).collect()
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::StopToken => FinishReason::Eos.as_str(),
        other => other.as_str(),
    }
}

/// A score; see the top for what JSON has no number for.
struct Number(f32);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            value if value.is_nan() => serializer.serialize_str("NaN"),
            f32::INFINITY => serializer.serialize_str("Infinity"),
            f32::NEG_INFINITY => serializer.serialize_none(),
            value => serializer.serialize_f32(value),
        }
    }
}

/// Why a request has no result.
#[derive(Serialize)]
struct Failure {
    kind: &'static str,
    message: String,
}

impl Failure {
    fn request(message: impl Into<String>) -> Self {
        Self { kind: "request", message: message.into() }
    }
}

impl From<candle_generate::Error> for Failure {
    fn from(error: candle_generate::Error) -> Self {
        Self { kind: error.kind(), message: error.to_string() }
    }
}
