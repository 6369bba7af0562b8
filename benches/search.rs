//! What a step of each search costs beside steps of plain rows, and the memory that beams take.
//!
//! All of a line is measured in turns on one model, so that a change of the machine's pace reaches everything alike.

mod common;

use anyhow::Result;
use candle_generate::{GenerationConfig, Generator, Strategy};
use common::{ids, median, smol_shaped};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Steps of a call that are measured.
const STEPS: usize = 16;
const TURNS: usize = 5;
const VOCAB: u32 = 49152;

fn main() -> Result<()> {
    // `-- memory` leaves the times out.
    if !std::env::args().any(|arg| arg == "memory") {
        times()?;
    }
    memory()
}

fn times() -> Result<()> {
    let greedy = || GenerationConfig::greedy().max_new_tokens(STEPS + 1);
    let beams = Strategy::Beam { num_beams: 4 };
    let contrastive = Strategy::Contrastive { penalty_alpha: 0.6, top_k: 4 };
    let calls = [
        ("greedy", greedy(), 1),
        ("greedy, 4 prompts", greedy(), 4),
        ("4 beams", greedy().strategy(beams), 1),
        ("contrastive, 4 candidates", greedy().strategy(contrastive), 1),
    ];
    for (file, half) in [("f32", false), ("bf16", true)] {
        let generator = Generator::from_pretrained(smol_shaped(half)?)?.with_config(GenerationConfig::default());
        println!("\nSmolLM2-135M's shape, {file} file: milliseconds a step, medians of {TURNS} turns");
        for position in [64, 1024] {
            let len = position - STEPS - 1;
            let prompts = ids(4 * len, VOCAB);
            let mut times = vec![Vec::new(); calls.len()];
            for _ in 0..TURNS {
                for ((_, config, count), times) in calls.iter().zip(&mut times) {
                    let prompts = prompts.chunks(len).take(*count);
                    let timings = generator.generate_batch(prompts, config)?.timings;
                    // The first step computes what is left of the prompts.
                    times.push((timings.total - timings.first_token) / STEPS as u32);
                }
            }
            let medians: Vec<_> = times.into_iter().map(median).collect();
            for ((name, ..), time) in calls.iter().zip(&medians) {
                let ratio = time.as_secs_f64() / medians[1].as_secs_f64();
                println!("  at {position:<5} {name:<26} {:>8.2}  {ratio:5.2} x 4 prompts", time.as_secs_f64() * 1e3);
            }
        }
    }
    Ok(())
}

/// Peak memory of a call above what the model takes.
fn memory() -> Result<()> {
    let generator = Generator::from_pretrained(smol_shaped(true)?)?.with_config(GenerationConfig::default());
    let prompt = ids(1024, VOCAB);
    println!("\nPeak memory above the model's, 1,024 positions of prompt and {STEPS} tokens");
    let one_row = generator.model().info().position_bytes * (1024 + STEPS as u64);
    println!("  cache of one row, reckoned {:>8.1} MiB", mib(one_row as usize));
    let mut first = 0;
    for (name, beams) in [("greedy", 1), ("4 beams", 4), ("8 beams", 8)] {
        let config = GenerationConfig::new().num_beams(beams).max_new_tokens(STEPS);
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        generator.generate(prompt.as_slice(), &config)?;
        let peak = MEMORY.peak_usage() - before;
        if beams == 1 {
            first = peak;
        }
        println!("  {name:<25} {:>8.1} MiB  {:5.2} x greedy", mib(peak), peak as f64 / first as f64);
    }
    Ok(())
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / (1 << 20) as f64
}
