//! This crate through `generate`, as a user has it; where passes are timed, through `stream` over a model that counts them.

use crate::{Reply, Request, Search};
use anyhow::{Context, Result, ensure};
use candle_generate::{
    Cache, Feed, Forward, GenerationConfig, Generator, Model, ModelInfo, Start, Strategy, Want,
    candle_core::{DType, Device},
};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

pub struct Ours {
    plain: Generator,
    timed: Generator,
    /// Nanoseconds in forward passes of the timed one.
    forward: Arc<AtomicU64>,
}

impl Ours {
    pub fn load(folder: &Path, dtype: &str, threads: usize) -> Result<Self> {
        let dtype = if dtype == "bf16" { DType::BF16 } else { DType::F32 };
        // A config of nothing: no end token, so that every call runs to its end.
        let plain =
            Generator::builder(folder).device(Device::Cpu).dtype(dtype).threads(threads).load()?.with_config(GenerationConfig::default());
        let forward = Arc::default();
        let model = Timed { model: plain.model().clone(), forward: Arc::clone(&forward) };
        let timed = Generator::new(model, plain.tokenizer().cloned());
        Ok(Self { plain, timed, forward })
    }

    pub fn weights(&self) -> u64 {
        self.plain.model().info().weight_bytes
    }

    pub fn position(&self) -> u64 {
        self.plain.model().info().position_bytes
    }

    pub fn call(&self, request: &Request) -> Result<Reply> {
        let config = match request.search {
            Search::Greedy => GenerationConfig::greedy(),
            Search::Beams => GenerationConfig::greedy().strategy(Strategy::Beam { num_beams: 4 }),
            Search::Contrastive => GenerationConfig::greedy().strategy(Strategy::Contrastive { penalty_alpha: 0.6, top_k: 4 }),
            Search::Sample => GenerationConfig::sampling().top_k(50).top_p(0.95).repetition_penalty(1.1).seed(7),
        };
        let config = config.max_new_tokens(request.new);
        if request.timed { self.streamed(request, &config) } else { self.whole(request, &config) }
    }

    fn whole(&self, request: &Request, config: &GenerationConfig) -> Result<Reply> {
        let call = || self.plain.generate_batch(request.prompts.iter().map(Vec::as_slice), config);
        let start = Instant::now();
        let output = thread::scope(|scope| {
            let others: Vec<_> = (1..request.callers).map(|_| scope.spawn(call)).collect();
            let output = call();
            for other in others {
                other.join().ok().context("a call panicked")??;
            }
            Ok::<_, anyhow::Error>(output?)
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let first = Some(output.timings.first_token.as_secs_f64());
        let ids: Vec<_> = output.sequences.into_iter().map(|row| row.tokens).collect();
        ensure!(ids.iter().all(|row| row.len() == request.new), "a row ended early");
        Ok(Reply { seconds, first, ids, ..Reply::default() })
    }

    fn streamed(&self, request: &Request, config: &GenerationConfig) -> Result<Reply> {
        let passes = || self.forward.load(Ordering::Relaxed) as f64 / 1e9;
        let prompt = request.prompts.first().context("no prompt")?;
        let start = Instant::now();
        let mut first = None;
        let mut ids = Vec::with_capacity(request.new);
        for piece in self.timed.stream(prompt.as_slice(), config)? {
            ids.extend(piece?.tokens);
            first.get_or_insert_with(|| (start.elapsed().as_secs_f64(), passes()));
        }
        let seconds = start.elapsed().as_secs_f64();
        let (first, before) = first.context("no token")?;
        Ok(Reply { seconds, first: Some(first), forward: Some(passes() - before), ids: vec![ids], ..Reply::default() })
    }
}

/// A model that counts the time of its passes.
struct Timed {
    model: Arc<dyn Model>,
    forward: Arc<AtomicU64>,
}

impl Model for Timed {
    fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    fn start(&self, rows: &[Start<'_>]) -> candle_generate::Result<Vec<Box<dyn Cache>>> {
        self.model.start(rows)
    }

    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> candle_generate::Result<Forward> {
        let start = Instant::now();
        let result = self.model.forward(rows, want);
        self.forward.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    fn spread(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        self.model.spread(count, work);
    }
}
