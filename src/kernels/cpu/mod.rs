//! The fused operations for the CPU: f32 arithmetic on weights of the file's type, or products of bf16, with the same bits in any company.

#![allow(clippy::needless_range_loop, reason = "tiles are several arrays that rows and panels go through together")]

mod ahead;
#[cfg(target_arch = "x86_64")]
mod amx;
mod arena;
mod attention;
mod brains;
mod dots;
mod halves;
mod inputs;
mod isa;
pub(crate) mod line;
mod math;
mod panels;
mod peaks;
mod pointwise;
mod product;
mod rope;
pub(crate) mod scratch;
mod span;
mod target;
mod threads;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::{Activation, Attention, AttnImplementation, Matrix, Norm, Ops, Picks, Rope, Span, StoreShape, route::pick};
use crate::{
    cache::Pages,
    error::Result,
    model::{Forward, Room, Values},
};
use ahead::Trail;
use arena::Arena;
use attention::Reader;
use brains::RoundHere;
use candle_core::DType;
use inputs::Inputs;
pub use isa::Instructions;
use isa::Level;
#[cfg(test)]
pub(crate) use isa::by_all_vectors;
pub(crate) use isa::{Loop, by_vectors};
use line::LANES;
pub(crate) use peaks::{BLOCK, Highest, filled};
use scratch::{Buffer, Scratch};
use std::{ops::Range, sync::Arc};
use target::Then;
use threads::{Shares, Team};

/// The operations on this processor.
#[derive(Debug, Clone)]
pub(crate) struct CpuOps {
    /// What weights are held in (F32: what the file has), and for BF16 what products multiply. Everything else is computed in f32.
    dtype: DType,
    level: Level,
    team: Arc<Team>,
    /// What weights are made of.
    weights: Arc<Arena>,
    scratch: Arc<Scratch>,
    trail: Trail,
    /// What pages are made of.
    pages: Arc<Scratch>,
    /// Positions whose softmax is computed at once.
    span: usize,
    /// Whether attention multiplies bf16: where products do, and the processor can; otherwise f32 is faster.
    halves: bool,
}

/// Activations, `(tokens, width)`, row-major.
#[derive(Debug, Clone)]
pub(crate) struct Act {
    data: Buffer,
    width: usize,
}

impl CpuOps {
    /// In f32, bf16 or f16 arithmetic, on so many threads, by default as many as there are cores, and with the best instructions of this
    /// processor up to `most`.
    pub(crate) fn new(dtype: DType, threads: Option<usize>, most: Option<Instructions>, attention: AttnImplementation) -> Self {
        let team = Team::of(threads.unwrap_or_else(threads::cores));
        let span = match attention {
            AttnImplementation::Flash => attention::SPAN,
            AttnImplementation::Eager => usize::MAX,
        };
        let level = Level::best(most);
        Self {
            dtype,
            level,
            halves: dtype == DType::BF16 && level.instructions() >= Instructions::Avx512Bf16,
            team,
            weights: Arc::default(),
            scratch: Scratch::new(),
            pages: Scratch::small(),
            trail: Trail::default(),
            span,
        }
    }

    /// What it computes with, for people.
    pub(crate) fn describe(&self) -> String {
        let attention = if self.span == usize::MAX { "eager" } else { "flash" };
        let threads = self.team.threads();
        let s = if threads == 1 { "" } else { "s" };
        format!("fused kernels ({:?}) on {threads} thread{s}, {attention} attention", self.level.instructions())
    }

    /// Activations of `tokens` times `width` values, to be written.
    fn act(&self, tokens: usize, width: usize) -> Act {
        Act { data: self.scratch.take(tokens * width), width }
    }

    /// Rounds what attention reads, where it multiplies bf16.
    fn round(&self, x: &mut Act) {
        if self.halves {
            self.team.chunks(&mut x.data, x.width, x.width / 4, |_, x| self.level.run(RoundHere(x)));
        }
    }

    /// [`Self::round`] of a copy; nothing where there is nothing to round.
    fn rounded(&self, x: &Act) -> Option<Act> {
        self.halves.then(|| {
            let mut x = x.clone();
            self.round(&mut x);
            x
        })
    }

    /// What `down` reads of a gated MLP.
    fn inner(
        &self,
        norm: Option<&Norm<Vec<f32>>>,
        gate_up: &panels::Weight,
        activation: Activation,
        x: &Act,
        down: &panels::Weight,
    ) -> Inputs<'static> {
        debug_assert_eq!(gate_up.outputs(), 2 * down.inputs().next_multiple_of(LANES));
        let inputs = self.inputs(norm, gate_up, x);
        Inputs::by(self, down.form(self, x.tokens()), x.tokens(), down.inputs(), |writer| {
            gate_up.product(self, &inputs, Then::Gate(activation, writer));
        })
    }

    /// `x`, normalised if `norm` says how, as `weight` reads it.
    fn inputs<'a>(&self, norm: Option<&Norm<Vec<f32>>>, weight: &panels::Weight, x: &'a Act) -> Inputs<'a> {
        debug_assert_eq!(weight.inputs(), x.width);
        Inputs::of(self, weight.form(self, x.tokens()), &x.data, x.width, norm)
    }
}

impl Act {
    fn tokens(&self) -> usize {
        self.data.len() / self.width.max(1)
    }
}

impl Ops for CpuOps {
    type Act = Act;
    type Weight = panels::Weight;
    type Vector = Vec<f32>;
    type Angles = rope::Angles;
    type Store = Pages;

    fn pass<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        let result = self.team.hold(work);
        self.scratch.shrink();
        result
    }

    fn spread(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        self.team.spread(count, work);
    }

    fn weight(&self, parts: &[Matrix<'_>], bias: Option<&[f32]>, done: &dyn Fn(&[u8])) -> Result<panels::Weight> {
        panels::Weight::pack(self, parts, bias, done)
    }

    fn gated_weight(&self, parts: &[Matrix<'_>], bias: Option<&[f32]>, done: &dyn Fn(&[u8])) -> Result<panels::Weight> {
        panels::Weight::pack_gated(self, parts, bias, done)
    }

    fn weight_bytes(&self, weight: &panels::Weight) -> u64 {
        weight.bytes()
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(values.to_vec())
    }

    fn store(&self, shape: StoreShape, room: Room) -> Result<Pages> {
        Pages::new(shape, room, self.pages.clone())
    }

    fn embed(&self, table: &panels::Weight, ids: &[u32]) -> Result<Act> {
        let mut x = self.act(ids.len(), table.inputs());
        table.rows(&self.team, ids, &mut x.data);
        Ok(x)
    }

    fn linear(&self, norm: Option<&Norm<Vec<f32>>>, weight: &panels::Weight, x: &Act) -> Result<Act> {
        let mut y = self.act(x.tokens(), weight.outputs());
        weight.product(self, &self.inputs(norm, weight, x), Then::Write(Shares::new(&mut y.data)));
        Ok(y)
    }

    fn linear_onto(&self, weight: &panels::Weight, x: &Act, mut onto: Act) -> Result<Act> {
        debug_assert_eq!(weight.outputs(), onto.width);
        weight.product(self, &self.inputs(None, weight, x), Then::Onto(Shares::new(&mut onto.data)));
        Ok(onto)
    }

    fn gated(&self, norm: Option<&Norm<Vec<f32>>>, [gate_up, down]: [&panels::Weight; 2], activation: Activation, x: &Act) -> Result<Act> {
        let mut y = self.act(x.tokens(), down.outputs());
        down.product(self, &self.inner(norm, gate_up, activation, x, down), Then::Write(Shares::new(&mut y.data)));
        Ok(y)
    }

    fn gated_onto(&self, norm: &Norm<Vec<f32>>, [gate_up, down]: [&panels::Weight; 2], activation: Activation, mut x: Act) -> Result<Act> {
        let inner = self.inner(Some(norm), gate_up, activation, &x, down);
        down.product(self, &inner, Then::Onto(Shares::new(&mut x.data)));
        Ok(x)
    }

    fn norm(&self, norm: &Norm<Vec<f32>>, x: &Act) -> Result<Act> {
        let mut y = self.act(x.tokens(), x.width);
        pointwise::norm(self, norm, &x.data, x.width, &mut y.data);
        Ok(y)
    }

    fn norm_part(&self, norm: &Norm<Vec<f32>>, mut x: Act, first: usize, group: usize) -> Result<Act> {
        pointwise::norm_part(self, norm, &mut x.data, x.width, first, group);
        Ok(x)
    }

    fn add(&self, mut x: Act, y: &Act) -> Result<Act> {
        debug_assert_eq!(x.data.len(), y.data.len());
        pointwise::add(self, &mut x.data, &y.data);
        Ok(x)
    }

    fn scale(&self, mut x: Act, factor: f32) -> Result<Act> {
        x.data.iter_mut().for_each(|x| *x *= factor);
        Ok(x)
    }

    fn activate(&self, activation: Activation, mut x: Act) -> Result<Act> {
        pointwise::activate(self, activation, &mut x.data, x.width);
        Ok(x)
    }

    fn route(&self, logits: &Act, top: usize, renormalise: bool) -> Result<Vec<Picks>> {
        let mut shares = logits.clone();
        pointwise::softmax(self, &mut shares.data, logits.width);
        Ok(pick(&shares.data, logits.width, top, renormalise))
    }

    fn mix(&self, count: usize, parts: &[(Picks, Act)]) -> Result<Act> {
        let width = parts.first().map_or(0, |(_, x)| x.width);
        let mut y = self.act(count, width);
        y.data.fill(0.0);
        for (picks, x) in parts {
            for ((&token, share), x) in picks.tokens.iter().zip(&picks.shares).zip(x.data.chunks(width.max(1))) {
                y.data[token * width..][..width].iter_mut().zip(x).for_each(|(y, x)| *y += x * share);
            }
        }
        Ok(y)
    }

    fn angles(&self, rows: &[(&Rope, Range<usize>)]) -> Result<rope::Angles> {
        Ok(rope::Angles::new(rows))
    }

    fn attend(
        &self,
        attention: &Attention,
        layer: usize,
        mut qkv: Act,
        angles: Option<&rope::Angles>,
        rows: &mut [Span<&mut Pages>],
    ) -> Result<Act> {
        debug_assert_eq!(qkv.width, (attention.heads + 2 * attention.kv_heads) * attention.head_dim);
        match angles {
            Some(angles) => rope::rotate(self, attention, angles, &mut qkv.data),
            None => self.round(&mut qkv),
        }
        attention::write(self, attention, layer, &qkv.data, qkv.width, rows)?;
        let rows: Vec<_> = rows.iter().map(Reader::own).collect();
        let mut y = self.act(qkv.tokens(), attention.heads * attention.head_dim);
        attention::attend(self, attention, layer, &qkv.data, qkv.width, &rows, &mut y.data);
        Ok(y)
    }

    fn fill(&self, attention: &Attention, layer: usize, kv: &Act, rows: &mut [Span<&mut Pages>]) -> Result<()> {
        debug_assert_eq!(kv.width, 2 * attention.kv_heads * attention.head_dim);
        let rounded = self.rounded(kv);
        let kv = rounded.as_ref().unwrap_or(kv);
        attention::write(self, attention, layer, &kv.data, kv.width, rows)
    }

    fn cross(&self, attention: &Attention, layer: usize, queries: &Act, rows: &[Span<&Pages>]) -> Result<Act> {
        debug_assert_eq!(queries.width, attention.heads * attention.head_dim);
        let rows: Vec<_> = rows.iter().map(Reader::other).collect();
        let rounded = self.rounded(queries);
        let queries = rounded.as_ref().unwrap_or(queries);
        let mut y = self.act(queries.tokens(), queries.width);
        attention::attend(self, attention, layer, &queries.data, queries.width, &rows, &mut y.data);
        Ok(y)
    }

    fn select(&self, x: &Act, indices: &[usize]) -> Result<Act> {
        let mut y = self.act(indices.len(), x.width);
        for (y, &index) in y.data.chunks_exact_mut(x.width.max(1)).zip(indices) {
            y.copy_from_slice(&x.data[index * x.width..][..x.width]);
        }
        Ok(y)
    }

    fn values(&self, x: Act) -> Result<Values> {
        Ok(Values::Host(x.data.to_vec()))
    }

    fn logits(&self, head: &panels::Weight, x: &Act, softcap: Option<f32>) -> Result<Forward> {
        let inputs = self.inputs(None, head, x);
        let mut logits = vec![0.0; x.tokens() * head.outputs()];
        let mut peaks = vec![0.0; if softcap.is_none() { x.tokens() * head.outputs().div_ceil(BLOCK) } else { 0 }];
        match softcap {
            Some(cap) => {
                head.product(self, &inputs, Then::Write(Shares::new(&mut logits)));
                pointwise::softcap(self, cap, &mut logits);
            }
            None => head.product(self, &inputs, Then::Peaks(Shares::new(&mut logits), Shares::new(&mut peaks))),
        }
        Ok(Forward { logits: Values::Host(logits), peaks, ..Forward::default() })
    }
}

/// Operations of one level, on so many threads.
#[cfg(test)]
fn ops(level: Level, threads: usize) -> CpuOps {
    CpuOps { dtype: DType::F32, team: Team::of(threads), level, ..CpuOps::new(DType::F32, Some(1), None, AttnImplementation::Flash) }
}

/// Values in -1..1 that look random.
#[cfg(test)]
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(step).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::kernels::{Bias, Sight};

    fn act(ops: &CpuOps, values: &[f32], width: usize) -> Act {
        let mut x = ops.act(values.len() / width, width);
        x.data.copy_from_slice(values);
        x
    }

    #[test]
    fn a_pass_goes_from_ids_to_logits() {
        let ops = CpuOps::new(DType::F32, Some(2), None, AttnImplementation::Flash);
        // Rows 1 0, 0 2 and 3 3 of a tied table.
        let bytes: Vec<u8> = [1.0f32, 0.0, 0.0, 2.0, 3.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let table =
            ops.weight(&[Matrix { bytes: &bytes, dtype: DType::F32, outputs: 3, inputs: 2, transposed: false }], None, &|_| ()).unwrap();
        assert_eq!(ops.weight_bytes(&table), 16 * 2 * 4);
        let logits = ops.pass(|| {
            let x = ops.embed(&table, &[2, 0, 1])?;
            let x = ops.add(ops.scale(x.clone(), 10.0)?, &x)?;
            let x = ops.select(&x, &[2, 0])?;
            Ok([None, Some(50.0)].map(|cap| ops.logits(&table, &x, cap).unwrap().logits.into_host().unwrap()))
        });
        let logits = logits.unwrap();
        assert_eq!(logits[0], [0.0, 44.0, 66.0, 33.0, 66.0, 198.0]);
        for (capped, logit) in logits[1].iter().zip(&logits[0]) {
            assert!((capped - 50.0 * (logit / 50.0).tanh()).abs() < 1e-5);
        }
    }

    #[test]
    fn a_plain_mlp_can_be_activated() {
        let ops = CpuOps::new(DType::F32, Some(2), None, AttnImplementation::Flash);
        let x = act(&ops, &[-1.0, 2.0, -3.0, 4.0], 2);
        assert_eq!(ops.activate(Activation::Relu, x).unwrap().data[..], [0.0, 2.0, 0.0, 4.0]);
    }

    /// An MLP of 20 inputs and outputs, its gates, what they open and its last product, each a weight, and the first two as one.
    struct Mlp([panels::Weight; 4]);

    impl Mlp {
        fn new(ops: &CpuOps, inner: usize, is_biased: bool) -> Self {
            let bytes = |outputs, inputs, seed| noise(outputs * inputs, seed).iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
            let files = [(inner, 20), (inner, 20), (20, inner)];
            let files: Vec<_> = (3..).zip(files).map(|(seed, (outputs, inputs))| (bytes(outputs, inputs, seed), outputs, inputs)).collect();
            let matrix = |i: usize| {
                let (bytes, outputs, inputs) = &files[i];
                Matrix { bytes, dtype: DType::F32, outputs: *outputs, inputs: *inputs, transposed: false }
            };
            let bias = noise(2 * inner, 6);
            let bias = |range: Range<usize>| is_biased.then(|| &bias[range]);
            let [gate, up] = [0, 1].map(|i| ops.weight(&[matrix(i)], bias(i * inner..(i + 1) * inner), &|_| ()).unwrap());
            let both = ops.gated_weight(&[matrix(0), matrix(1)], bias(0..2 * inner), &|_| ()).unwrap();
            Self([gate, up, ops.weight(&[matrix(2)], None, &|_| ()).unwrap(), both])
        }
    }

    #[test]
    fn a_gated_mlp_is_its_parts_to_the_bit() {
        let norm = Norm { kind: super::super::NormKind::Rms, weight: noise(20, 9), bias: None, eps: 1e-5 };
        for (level, dtype) in Level::all().into_iter().flat_map(|level| [DType::F32, DType::BF16].map(|dtype| (level, dtype))) {
            let ops = CpuOps { dtype, ..ops(level, 3) };
            // Gates end within panels, and at their ends; the last one is cut for threads, and the rows of the last two, too.
            for (inner, rows) in [(1, 1), (5, 3), (16, 4), (40, 7), (33, 13), (1_500, 1), (48, 700), (700, 101)] {
                let Mlp([gate, up, down, both]) = Mlp::new(&ops, inner, inner % 2 == 0);
                let x = act(&ops, &noise(rows * 20, 8), 20);
                let y = ops.pass(|| ops.gated(Some(&norm), [&both, &down], Activation::Silu, &x)).unwrap();
                let normed = ops.norm(&norm, &x).unwrap();
                let [gate, up] = [gate, up].map(|weight| ops.linear(None, &weight, &normed).unwrap());
                let mut inner = ops.activate(Activation::Silu, gate).unwrap();
                inner.data.iter_mut().zip(&up.data[..]).for_each(|(gate, up)| *gate *= up);
                let expected = ops.linear(None, &down, &inner).unwrap();
                assert!(y.data[..] == expected.data[..], "{level:?} {dtype:?} {} {rows}", inner.width);
                let onto = ops.pass(|| ops.gated_onto(&norm, [&both, &down], Activation::Silu, x.clone())).unwrap();
                assert!(onto.data[..] == ops.add(x, &expected).unwrap().data[..]);
            }
        }
    }

    #[test]
    fn as_many_gates_as_others() {
        let ops = CpuOps::new(DType::F32, Some(2), None, AttnImplementation::Flash);
        let odd = Matrix { bytes: &[0; 12], dtype: DType::F32, outputs: 3, inputs: 1, transposed: false };
        let error = ops.gated_weight(&[odd], None, &|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "tensor: 3 outputs are not as many gates as there are others");
    }

    #[test]
    fn experts_are_chosen_and_mixed() {
        let ops = CpuOps::new(DType::F32, Some(2), None, AttnImplementation::Flash);
        let logits = act(&ops, &[0.0, 2.0f32.ln(), 5.0f32.ln(), 0.0, 0.0, -9.0], 3);
        let picks = ops.route(&logits, 2, false).unwrap();
        assert_eq!(picks.iter().map(|picks| picks.tokens.clone()).collect::<Vec<_>>(), [vec![1], vec![0, 1], vec![0]]);
        assert!((picks[1].shares[0] - 0.25).abs() < 1e-7 && (picks[1].shares[1] - 0.499_969_2).abs() < 1e-6, "{picks:?}");
        let part = |tokens: &[usize], shares: &[f32], x: &[f32]| (Picks { tokens: tokens.into(), shares: shares.into() }, act(&ops, x, 2));
        let parts = [part(&[0, 2], &[0.5, 2.0], &[2.0, 4.0, 1.0, -1.0]), part(&[2], &[1.0], &[10.0, 20.0])];
        assert_eq!(ops.mix(3, &parts).unwrap().data[..], [1.0, 2.0, 0.0, 0.0, 12.0, 18.0]);
    }

    #[test]
    fn a_full_store_refuses_by_name() {
        let ops = CpuOps::new(DType::F32, Some(2), None, AttnImplementation::Flash);
        let mut store = ops.store(StoreShape { layers: 1, kv_heads: 1, head_dim: 2 }, Room::Reserve(1)).unwrap();
        let (sight, bias) = (Sight::Causal, Bias::None);
        let attention = Attention { heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0, softcap: None, sight, bias };
        let qkv = act(&ops, &[0.5; 12], 6);
        let error = ops.attend(&attention, 0, qkv, None, &mut [Span { first: 0, count: 2, store: &mut store }]).unwrap_err();
        assert_eq!(error.to_string(), "invalid generation config: max_cache_len = 1: 2 positions are needed");
    }
}
