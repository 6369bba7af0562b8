//! What the machine gives at this moment: read bandwidth, f32 multiply-adds, and the matrix products of a model alone.
//!
//! Written for what the processor has of AVX-512 and AVX2, and in plain Rust elsewhere.

use anyhow::Result;
use half::bf16;
use memmap2::MmapMut;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::{
    hint::{black_box, spin_loop},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

/// Bytes that the bandwidth is read of: more than caches hold.
const BYTES: usize = 512 << 20;
/// Ways to read: streams of a thread, and bytes that each prefetches ahead.
const PATTERNS: [(usize, usize); 6] = [(1, 0), (1, 2048), (2, 1024), (4, 0), (4, 1024), (8, 512)];
/// Readings of each way.
const READINGS: usize = 3;
/// Multiply-adds of a register in a reading of the peak.
const ROUNDS: usize = 1 << 20;
/// Registers that products are summed in at once.
const WIDE: usize = 8;

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    /// Bytes a second.
    Bandwidth,
    /// Operations a second, two for each multiply-add.
    Peak,
    /// Seconds that one token's matrix products take, each `(outputs, inputs)`.
    Products { matrices: Vec<(usize, usize)>, half: bool },
}

#[derive(Serialize)]
struct Reply {
    value: f64,
}

#[derive(Serialize)]
struct Hello {
    instructions: &'static str,
}

/// Answers requests with so many threads.
pub fn serve(threads: usize) -> Result<()> {
    let set = Set::best();
    let mut map = MmapMut::map_anon(BYTES)?;
    // Weights lie in huge pages too, where a system has them.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    // SAFETY: any bytes are numbers.
    let memory = unsafe { map.align_to_mut::<f32>() }.1;
    memory.iter_mut().enumerate().for_each(|(at, value)| *value = (at % 1021) as f32 + 1.0);
    crate::serve(Hello { instructions: set.name() }, |request: Request| {
        let value = match request {
            Request::Bandwidth => bandwidth(set, memory, threads),
            Request::Peak => peak(set, threads),
            Request::Products { matrices, half: true } => products(set, &matrices, threads, |value| bf16::from_f32(value).to_bits()),
            Request::Products { matrices, half: false } => products(set, &matrices, threads, |value| value),
        };
        Ok(Reply { value })
    })
}

fn bandwidth(set: Set, memory: &[f32], threads: usize) -> f64 {
    let share = memory.len() / threads;
    let read = |(streams, ahead): (usize, usize)| {
        let times = together(threads, READINGS, |thread, _| set.run(Read { memory: &memory[thread * share..][..share], streams, ahead }));
        times.iter().sum::<f64>() / READINGS as f64
    };
    // Of the ways the best, but of its readings the mean: where others use the memory too, no step as long as these keeps up with the best.
    let best = PATTERNS.into_iter().map(read).fold(f64::INFINITY, f64::min);
    (share * threads * 4) as f64 / best
}

fn peak(set: Set, threads: usize) -> f64 {
    let times = together(threads, READINGS, |_, _| set.run(Multiply));
    (2 * ROUNDS * WIDE * set.lanes() * threads) as f64 / least(&times)
}

/// Each matrix is packed in panels of `WIDE` registers of outputs, and each output summed over its inputs in order.
fn products<W: Weight>(set: Set, matrices: &[(usize, usize)], threads: usize, convert: impl Fn(f32) -> W) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let panel = WIDE * set.lanes();
    let packed: Vec<(Vec<W>, usize, usize)> = matrices
        .iter()
        .map(|&(outputs, inputs)| {
            let outputs = outputs.next_multiple_of(set.lanes());
            ((0..outputs * inputs).map(|_| convert(rng.random_range(-0.05..0.05))).collect(), outputs, inputs)
        })
        .collect();
    let longest = matrices.iter().map(|matrix| matrix.1).max().unwrap_or(0);
    let x: Vec<f32> = (0..longest).map(|_| rng.random_range(-1.0..1.0)).collect();
    let barrier = Barrier::new(threads);
    let step = |thread: usize, _| {
        for (weights, outputs, inputs) in &packed {
            let registers = outputs / set.lanes();
            let (from, to) = (registers * thread / threads * set.lanes(), registers * (thread + 1) / threads * set.lanes());
            for at in (from..to).step_by(panel) {
                let width = panel.min(to - at);
                // A panel's lines lie one after another; where it begins does not matter to the time.
                set.run(Panel { weights: &weights[at * inputs..][..width * inputs], x: &x[..*inputs], registers: width / set.lanes() });
            }
            barrier.wait();
        }
    };
    let bytes: usize = packed.iter().map(|(weights, ..)| size_of_val(weights.as_slice())).sum();
    // About a second, or two gigabytes.
    let steps = ((2 << 30) / bytes.max(1)).clamp(5, 500);
    let mut times = together(threads, steps, step);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Runs `work` on all threads at once, `rounds` times, and says how long each took.
fn together(threads: usize, rounds: usize, work: impl Fn(usize, usize) + Sync) -> Vec<f64> {
    let barrier = Barrier::new(threads);
    let run = |thread: usize| {
        let round = |round: usize| {
            barrier.wait();
            let start = Instant::now();
            work(thread, round);
            barrier.wait();
            start.elapsed().as_secs_f64()
        };
        (0..rounds).map(round).collect()
    };
    thread::scope(|scope| {
        let run = &run;
        for thread in 1..threads {
            scope.spawn(move || -> Vec<f64> { run(thread) });
        }
        run(0)
    })
}

fn least(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Where threads wait for each other, spinning first: what sleeps wakes up too late to be measured.
struct Barrier {
    threads: usize,
    here: AtomicUsize,
    round: AtomicUsize,
}

impl Barrier {
    fn new(threads: usize) -> Self {
        Self { threads, here: AtomicUsize::new(0), round: AtomicUsize::new(0) }
    }

    fn wait(&self) {
        let round = self.round.load(Ordering::Acquire);
        if self.here.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            self.here.store(0, Ordering::Relaxed);
            self.round.store(round + 1, Ordering::Release);
            return;
        }
        for spins in 0u32.. {
            if self.round.load(Ordering::Acquire) != round {
                return;
            }
            if spins < 100_000 { spin_loop() } else { thread::yield_now() }
        }
    }
}

/// An instruction set that this processor has.
#[derive(Clone, Copy)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Set {
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512",
        }
    }

    fn lanes(self) -> usize {
        match self {
            Self::Portable => <[f32; 4]>::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => __m256::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => __m512::LANES,
        }
    }

    fn run(self, task: impl Task) {
        match self {
            Self::Portable => task.run::<[f32; 4]>(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `best` found AVX2 and FMA.
            Self::Avx2 => unsafe { avx2(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `best` found AVX-512 F.
            Self::Avx512 => unsafe { avx512(task) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(task: impl Task) {
    task.run::<__m256>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn avx512(task: impl Task) {
    task.run::<__m512>();
}

/// Work that is compiled for each instruction set; `#[inline(always)]` all the way, or it would be compiled for the baseline.
trait Task {
    fn run<R: Register>(self);
}

/// A register of f32 values. The x86 ones are used only within functions that enable their instructions.
trait Register: Copy {
    const LANES: usize;
    fn splat(value: f32) -> Self;
    /// The first `LANES` values, which there must be.
    fn load(from: &[f32]) -> Self;
    /// The same, of bf16 bits.
    fn widen(from: &[u16]) -> Self;
    fn mul_add(self, factor: Self, sum: Self) -> Self;
    fn prefetch(from: *const f32);
}

impl Register for [f32; 4] {
    const LANES: usize = 4;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        [value; 4]
    }

    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        std::array::from_fn(|lane| from[lane])
    }

    #[inline(always)]
    fn widen(from: &[u16]) -> Self {
        std::array::from_fn(|lane| bf16::from_bits(from[lane]).to_f32())
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        // In two roundings: without the instruction, one rounding is a call.
        std::array::from_fn(|lane| self[lane] * factor[lane] + sum[lane])
    }

    #[inline(always)]
    fn prefetch(_: *const f32) {}
}

#[cfg(target_arch = "x86_64")]
impl Register for __m256 {
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: AVX is enabled, as `Register` demands.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        let from = &from[..Self::LANES];
        // SAFETY: AVX is enabled, and there are 8 values.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn widen(from: &[u16]) -> Self {
        let from = &from[..Self::LANES];
        // SAFETY: AVX2 is enabled, and there are 8 values.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast())))) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        // SAFETY: FMA is enabled.
        unsafe { _mm256_fmadd_ps(self, factor, sum) }
    }

    #[inline(always)]
    fn prefetch(from: *const f32) {
        // SAFETY: a prefetch of any address does no harm.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Register for __m512 {
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: AVX-512 F is enabled, as `Register` demands.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        let from = &from[..Self::LANES];
        // SAFETY: AVX-512 F is enabled, and there are 16 values.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn widen(from: &[u16]) -> Self {
        let from = &from[..Self::LANES];
        // SAFETY: AVX-512 F is enabled, and there are 16 values.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast())))) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        // SAFETY: AVX-512 F is enabled.
        unsafe { _mm512_fmadd_ps(self, factor, sum) }
    }

    #[inline(always)]
    fn prefetch(from: *const f32) {
        // SAFETY: a prefetch of any address does no harm.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}

/// A value of a weight as the file has it.
trait Weight: Copy + Send + Sync {
    /// Bytes that are prefetched ahead of a panel's line.
    const AHEAD: usize = 4096;
    fn load<R: Register>(from: &[Self]) -> R;
}

impl Weight for f32 {
    #[inline(always)]
    fn load<R: Register>(from: &[Self]) -> R {
        R::load(from)
    }
}

impl Weight for u16 {
    #[inline(always)]
    fn load<R: Register>(from: &[Self]) -> R {
        R::widen(from)
    }
}

/// Reads memory in equal streams side by side.
struct Read<'a> {
    memory: &'a [f32],
    streams: usize,
    ahead: usize,
}

impl Task for Read<'_> {
    #[inline(always)]
    fn run<R: Register>(self) {
        let (mut sums, one) = ([R::splat(0.0); 4], R::splat(1.0));
        let block = 4 * R::LANES;
        let streams: [&[f32]; 8] = {
            let len = self.memory.len() / self.streams;
            std::array::from_fn(|stream| if stream < self.streams { &self.memory[stream * len..][..len] } else { &[][..] })
        };
        let streams = &streams[..self.streams];
        for at in (0..streams[0].len() - block + 1).step_by(block) {
            for stream in streams {
                let from = &stream[at..at + block];
                if self.ahead > 0 {
                    for line in (0..block).step_by(16) {
                        R::prefetch(from.as_ptr().wrapping_add(self.ahead / 4 + line));
                    }
                }
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = R::load(&from[i * R::LANES..]).mul_add(one, *sum);
                }
            }
        }
        black_box(sums);
    }
}

/// Multiplies and adds within registers.
struct Multiply;

impl Task for Multiply {
    #[inline(always)]
    fn run<R: Register>(self) {
        let (factor, addend) = (R::splat(black_box(0.999_999)), R::splat(black_box(1e-6)));
        let mut values = [R::splat(black_box(1.0)); WIDE];
        for _ in 0..ROUNDS {
            for value in &mut values {
                *value = value.mul_add(factor, addend);
            }
        }
        black_box(values);
    }
}

/// The products of a panel of so many registers of outputs.
struct Panel<'a, W> {
    weights: &'a [W],
    x: &'a [f32],
    registers: usize,
}

impl<W: Weight> Panel<'_, W> {
    #[inline(always)]
    fn sum<R: Register, const N: usize>(&self) {
        let mut sums = [R::splat(0.0); N];
        for (line, &x) in self.weights.chunks_exact(N * R::LANES).zip(self.x) {
            let x = R::splat(x);
            for byte in (0..size_of_val(line)).step_by(64) {
                R::prefetch(line.as_ptr().wrapping_byte_add(W::AHEAD + byte).cast());
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = W::load::<R>(&line[i * R::LANES..]).mul_add(x, *sum);
            }
        }
        black_box(sums);
    }
}

impl<W: Weight> Task for Panel<'_, W> {
    #[inline(always)]
    fn run<R: Register>(self) {
        match self.registers {
            8 => self.sum::<R, 8>(),
            7 => self.sum::<R, 7>(),
            6 => self.sum::<R, 6>(),
            5 => self.sum::<R, 5>(),
            4 => self.sum::<R, 4>(),
            3 => self.sum::<R, 3>(),
            2 => self.sum::<R, 2>(),
            _ => self.sum::<R, 1>(),
        }
    }
}
