//! A conversation in the terminal. Ctrl-C ends an answer, not the program; /help lists the commands.
//!
//! `cargo run --release --example chat -- --system "You are a storyteller."`

mod common;

use anyhow::{Context, Result, bail, ensure};
use candle_generate::{CancelToken, Chat, FinishReason, GenerationConfig, Generator, Output, Reply};
use clap::Parser;
use serde_json::{Map, Value};
use std::{
    io::{self, BufRead, IsTerminal, Write},
    path::PathBuf,
    process,
    sync::{Arc, Mutex, PoisonError},
};

const HELP: &str = "\
/system [TEXT]        what the assistant is told before the conversation; shows it without a text
/regenerate           answers the last message once more
/rewind [TURNS]       forgets the last turns, one unless told
/history              shows the conversation
/config [SETTINGS]    sets generation settings: temperature=0.7, or an object as in generation_config.json; null unsets.
                      Shows without settings what an answer will do
/stats                what the last answer took
/save FILE            writes the conversation as JSON
/load FILE            takes up a conversation that was saved
/quit                 ends, as does Ctrl-D
A message that begins with a slash is written with two.";

/// Talks with a model in the terminal
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    source: common::Source,
    /// What the assistant is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// The settings, as generation_config.json has them, over the model's own
    #[arg(long, value_name = "JSON", default_value = "{}")]
    generation_config: String,
    /// A conversation to go on with
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    common::quiet(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    let generator = cli.source.load()?;
    let mut session = Session {
        chat: generator.chat(),
        generator,
        settings: Map::new(),
        config: GenerationConfig::new(),
        last: None,
        interrupt: Interrupt::new()?,
    };
    session.set(&cli.generation_config).context("--generation-config")?;
    if let Some(path) = &cli.load {
        session.chat.load(path)?;
    }
    if let Some(text) = &cli.system {
        session.chat.system(text);
    }
    session.talk()
}

struct Session {
    generator: Generator,
    chat: Chat,
    /// What was set by hand, from which `config` follows.
    settings: Map<String, Value>,
    config: GenerationConfig,
    last: Option<Output>,
    interrupt: Interrupt,
}

impl Session {
    /// Reads lines until there are no more. What goes wrong with one of them is told, and the next one is read.
    fn talk(&mut self) -> Result<()> {
        let (mut input, mut out) = (io::stdin().lock(), io::stdout());
        let asks = input.is_terminal() && out.is_terminal();
        if asks {
            eprintln!("/help lists the commands");
        }
        let mut line = Vec::new();
        loop {
            self.interrupt.rest();
            if asks {
                write!(out, "> ")?;
                out.flush()?;
            }
            line.clear();
            if input.read_until(b'\n', &mut line)? == 0 {
                if asks {
                    writeln!(out)?;
                }
                return Ok(());
            }
            let text = String::from_utf8_lossy(&line);
            match self.take(text.trim(), &mut out) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // Nobody reads any more.
                Err(error) if error.is::<io::Error>() => return Err(error),
                Err(error) => eprintln!("{error:#}"),
            }
        }
    }

    /// Does what a line says; whether there is to be another one.
    fn take(&mut self, line: &str, out: &mut impl Write) -> Result<bool> {
        let message = match line.strip_prefix('/') {
            None => line,
            Some(rest) if rest.starts_with('/') => rest,
            Some(command) => {
                let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
                return self.command(name, rest.trim(), out);
            }
        };
        if !message.is_empty() {
            let config = self.config.clone().cancel(self.interrupt.begin());
            self.last = Some(print(self.chat.stream(message, &config)?, out)?);
        }
        Ok(true)
    }

    fn command(&mut self, name: &str, rest: &str, out: &mut impl Write) -> Result<bool> {
        match name {
            "quit" => return Ok(false),
            "help" => writeln!(out, "{HELP}")?,
            "system" if rest.is_empty() => match self.chat.messages().first().filter(|first| first.role() == Some("system")) {
                Some(system) => writeln!(out, "{}", system.content().unwrap_or_default())?,
                None => writeln!(out, "nothing")?,
            },
            "system" => self.chat.system(rest),
            "regenerate" => {
                let config = self.config.clone().cancel(self.interrupt.begin());
                self.last = Some(print(self.chat.restream(&config)?, out)?);
            }
            "rewind" => {
                let turns = if rest.is_empty() { 1 } else { rest.parse().with_context(|| format!("{rest:?} is no number of turns"))? };
                let users = self.chat.messages().iter().enumerate().filter(|(_, message)| message.role() == Some("user"));
                let asked: Vec<usize> = users.map(|(index, _)| index).collect();
                ensure!(
                    (1..=asked.len()).contains(&turns),
                    "there are {} turns; at least one and at most all of them can be forgotten",
                    asked.len()
                );
                self.chat.rewind(asked[asked.len() - turns]);
            }
            "history" => {
                for message in self.chat.messages() {
                    let content = message.value("content").map(|content| content.as_str().map_or(content.to_string(), str::to_owned));
                    writeln!(out, "{}: {}", message.role().unwrap_or("?"), content.unwrap_or_default())?;
                }
            }
            "config" if rest.is_empty() => write!(out, "{}", self.generator.explain(&self.config)?)?,
            "config" => self.set(rest)?,
            "stats" => self.stats(out)?,
            "save" | "load" if rest.is_empty() => bail!("/{name} needs the name of a file"),
            // What a file is at fault for is no reason to end.
            "save" => self.chat.save(rest)?,
            "load" => self.chat.load(rest)?,
            _ => bail!("there is no command /{name}; /help lists them"),
        }
        Ok(true)
    }

    /// Sets some fields, if the model can honour what comes of it.
    fn set(&mut self, text: &str) -> Result<()> {
        let changes = match text.split_once('=') {
            Some((field, value)) if !text.starts_with('{') => {
                let value = value.trim();
                let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
                Map::from_iter([(field.trim().to_owned(), value)])
            }
            _ => serde_json::from_str(text).context("FIELD=VALUE or a JSON object is accepted")?,
        };
        let mut settings = self.settings.clone();
        settings.extend(changes);
        settings.retain(|_, value| !value.is_null());
        let config = GenerationConfig::from_json(&settings.clone().into())?;
        ensure!(config.unknown.is_empty(), "there is no setting {}", config.unknown.keys().cloned().collect::<Vec<_>>().join(", "));
        self.generator.explain(&config)?;
        (self.settings, self.config) = (settings, config);
        Ok(())
    }

    fn stats(&self, out: &mut impl Write) -> Result<()> {
        let Some(Output { usage, timings, sequences, .. }) = &self.last else { bail!("there was no answer yet") };
        let (prompt, reused, generated) = (usage.prompt_tokens, usage.reused_tokens, usage.generated_tokens);
        write!(out, "{prompt} tokens of the conversation, {reused} of them reused; {generated} generated")?;
        if let Some(finish) = sequences.first().map(|sequence| sequence.finish) {
            write!(out, ", ended by {}", finish.as_str())?;
        }
        if let Some(seed) = sequences.first().and_then(|sequence| sequence.seed) {
            write!(out, ", with the seed {seed}")?;
        }
        writeln!(out)?;
        let (first, speed) = (timings.first_token.as_secs_f64(), timings.tokens_per_second(usage));
        eprintln!("the first after {first:.3} s, {speed:.0} per second");
        Ok(())
    }
}

/// Prints an answer as it comes.
fn print(mut reply: Reply<'_>, out: &mut impl Write) -> Result<Output> {
    for piece in reply.by_ref() {
        let piece = piece?;
        if piece.row == 0 {
            write!(out, "{}", piece.text)?;
            out.flush()?;
        }
    }
    writeln!(out)?;
    let output = reply.into_output()?;
    if let Some(reason @ (FinishReason::Length | FinishReason::Cancelled | FinishReason::Time)) =
        output.sequences.first().map(|sequence| sequence.finish)
    {
        eprintln!("({})", reason.as_str());
    }
    Ok(output)
}

/// What Ctrl-C ends: the answer that is being given, or the second time in a row the program.
#[derive(Clone, Default)]
struct Interrupt(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    answer: Option<CancelToken>,
    pressed: bool,
}

impl Interrupt {
    /// Listens from now on.
    fn new() -> Result<Self> {
        let interrupt = Self::default();
        let listening = interrupt.clone();
        ctrlc::set_handler(move || listening.press())?;
        Ok(interrupt)
    }

    /// A token for an answer that begins.
    fn begin(&self) -> CancelToken {
        let token = CancelToken::new();
        self.with(|state| *state = State { answer: Some(token.clone()), pressed: false });
        token
    }

    /// No answer is being given.
    fn rest(&self) {
        self.with(|state| *state = State::default());
    }

    fn press(&self) {
        self.with(|state| match &state.answer {
            _ if state.pressed => process::exit(130),
            Some(answer) if !answer.is_cancelled() => answer.cancel(),
            _ => {
                state.pressed = true;
                eprintln!("\nCtrl-C once more ends the program, as does Ctrl-D");
            }
        });
    }

    fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
