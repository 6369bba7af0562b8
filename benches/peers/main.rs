//! The Rust half of the comparison with other engines: ours and candle-transformers' as workers, the probe of the machine, and the
//! checkpoints.
//!
//! `bench.py` beside this file starts each as a process of its own, says when it may work, and prints what comes out. A worker
//! says what it is in a line of JSON, and then answers each line of a request with a line.

mod candle;
#[path = "../common/mod.rs"]
mod common;
mod make;
mod ours;
mod probe;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::{BufRead, Write, stdin, stdout},
    path::Path,
};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["make", shape, dtype, folder] => make::checkpoint(shape, dtype, Path::new(folder)),
        ["probe", threads] => probe::serve(threads.parse()?),
        ["ours", folder, dtype, threads] => {
            let before = Memory::now()?;
            let ours = ours::Ours::load(Path::new(folder), dtype, threads.parse()?)?;
            let hello = Hello { weights: ours.weights(), position: ours.position(), ..Hello::new(before)? };
            serve(hello, |request: Request| measured(|| ours.call(&request)))
        }
        ["candle", folder, dtype] => {
            let before = Memory::now()?;
            let mut candle = candle::Candle::load(Path::new(folder), dtype)?;
            serve(Hello::new(before)?, |request: Request| measured(|| candle.call(&request)))
        }
        // What `cargo bench` without a choice comes to.
        ["--bench"] => {
            println!("python3 benches/peers/bench.py compares with other engines");
            Ok(())
        }
        _ => bail!("{args:?}; make SHAPE DTYPE FOLDER, probe THREADS, ours FOLDER DTYPE THREADS or candle FOLDER DTYPE is accepted"),
    }
}

/// What to generate.
#[derive(Deserialize)]
struct Request {
    /// Ids, all rows equally long.
    prompts: Vec<Vec<u32>>,
    /// The tokens to generate for each.
    new: usize,
    search: Search,
    /// Calls at once, each of all prompts.
    #[serde(default)]
    callers: usize,
    /// Whether forward passes are timed, and the call is streamed.
    #[serde(default)]
    timed: bool,
}

#[derive(Deserialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Search {
    Greedy,
    /// Four of them.
    Beams,
    /// Four candidates and a penalty of 0.6.
    Contrastive,
    /// `top_k` 50, `top_p` 0.95 and a repetition penalty of 1.1.
    Sample,
}

/// What a call gave and took.
#[derive(Serialize, Default)]
struct Reply {
    seconds: f64,
    /// Until the first token.
    first: Option<f64>,
    /// In forward passes after the first token.
    forward: Option<f64>,
    ids: Vec<Vec<u32>>,
    /// The most memory during the call, bytes.
    peak: u64,
}

/// What a worker says first; bytes.
#[derive(Serialize)]
struct Hello {
    before: u64,
    /// The most until it was loaded.
    peak: u64,
    /// What ours reckons for weights and for a position; 0 elsewhere.
    weights: u64,
    position: u64,
}

impl Hello {
    fn new(before: Memory) -> Result<Self> {
        Ok(Self { before: before.resident, peak: Memory::now()?.peak, weights: 0, position: 0 })
    }
}

/// Answers each line of standard input.
fn serve<Q: for<'a> Deserialize<'a>, A: Serialize>(hello: impl Serialize, mut answer: impl FnMut(Q) -> Result<A>) -> Result<()> {
    let say = |line: String| -> Result<()> { Ok(writeln!(stdout().lock(), "{line}").and_then(|()| stdout().flush())?) };
    say(serde_json::to_string(&hello)?)?;
    for line in stdin().lock().lines() {
        match answer(serde_json::from_str(&line?)?) {
            Ok(reply) => say(serde_json::to_string(&reply)?)?,
            Err(error) => say(serde_json::json!({ "error": format!("{error:#}") }).to_string())?,
        }
    }
    Ok(())
}

fn measured(call: impl FnOnce() -> Result<Reply>) -> Result<Reply> {
    // The peak counts from here.
    fs::write("/proc/self/clear_refs", "5")?;
    let reply = call()?;
    Ok(Reply { peak: Memory::now()?.peak, ..reply })
}

/// Of this process, bytes.
struct Memory {
    resident: u64,
    peak: u64,
}

impl Memory {
    fn now() -> Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let field = |name: &str| -> Result<u64> {
            let line =
                status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name} in /proc/self/status"))?;
            Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
        };
        Ok(Self { resident: field("VmRSS:")?, peak: field("VmHWM:")? })
    }
}
