//! The named operations the decoder is written over: one trait, a twin in candle's operations, and fused ones for the CPU.
//!
//! Activations are `(tokens, width)`: the new tokens of all rows one after another, no padding. Only [`Ops::attend`],
//! [`Ops::fill`] and [`Ops::cross`] know rows. Every other operation treats each token alone, so nothing depends on which rows share a pass.

pub(crate) mod candle;
pub(crate) mod cpu;
mod route;

pub use cpu::Instructions;
#[cfg(test)]
pub(crate) use cpu::by_all_vectors;
pub(crate) use cpu::{BLOCK, Highest, Loop, by_vectors, filled};
pub(crate) use route::Picks;

use crate::{
    error::Result,
    model::{Forward, Room, Values},
};
use candle_core::DType;
use half::bf16;
use std::{ops::Range, sync::Arc};

/// The operations of a decoder on one kind of device and arithmetic.
pub(crate) trait Ops: Send + Sync + 'static {
    /// Activations, `(tokens, width)`.
    type Act;
    /// A matrix `(outputs, inputs)` with an optional bias, laid out as the operations like it.
    type Weight: Send + Sync;
    /// A vector of parameters.
    type Vector: Send + Sync;
    /// Cosines and sines of the tokens of one pass.
    type Angles;
    /// The keys and values of one row, all layers.
    type Store: Store;

    /// Runs a whole pass of operations where they have their threads at hand. Operations work outside of it too, only slower.
    fn pass<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        work()
    }

    /// `work(0)`, `work(1)`, ... for `count` pieces, in any order, on threads if there are some.
    fn spread(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(work);
    }

    /// Packs `parts`, stacked along their outputs, as one weight; `bias` has one value per output. `done` is told which bytes of the
    /// parts are not needed any more.
    fn weight(&self, parts: &[Matrix<'_>], bias: Option<&[f32]>, done: &dyn Fn(&[u8])) -> Result<Self::Weight>;
    /// As [`Self::weight`], for [`Self::gated`]: the first half of the outputs are gates.
    fn gated_weight(&self, parts: &[Matrix<'_>], bias: Option<&[f32]>, done: &dyn Fn(&[u8])) -> Result<Self::Weight> {
        self.weight(parts, bias, done)
    }
    /// Bytes that `weight` takes in memory.
    fn weight_bytes(&self, weight: &Self::Weight) -> u64;
    /// Takes a vector of parameters.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector>;
    /// An empty store.
    fn store(&self, shape: StoreShape, room: Room) -> Result<Self::Store>;

    /// Row `ids[i]` of `table` for each token; ids are inside the table.
    fn embed(&self, table: &Self::Weight, ids: &[u32]) -> Result<Self::Act>;
    /// `x * weight^T + bias`, of `x` normalised if `norm` says how.
    fn linear(&self, norm: Option<&Norm<Self::Vector>>, weight: &Self::Weight, x: &Self::Act) -> Result<Self::Act>;
    /// `onto + x * weight^T + bias`.
    fn linear_onto(&self, weight: &Self::Weight, x: &Self::Act, onto: Self::Act) -> Result<Self::Act> {
        self.add(onto, &self.linear(None, weight, x)?)
    }
    /// Normalises each token.
    fn norm(&self, norm: &Norm<Self::Vector>, x: &Self::Act) -> Result<Self::Act>;
    /// Normalises some columns of each token, from `first` on: `group` of them at a time, each group alone. The norm has a weight
    /// for each of these columns.
    fn norm_part(&self, norm: &Norm<Self::Vector>, x: Self::Act, first: usize, group: usize) -> Result<Self::Act>;
    /// `x + y`.
    fn add(&self, x: Self::Act, y: &Self::Act) -> Result<Self::Act>;
    /// `x * factor`.
    fn scale(&self, x: Self::Act, factor: f32) -> Result<Self::Act>;
    /// `activation(x)`.
    fn activate(&self, activation: Activation, x: Self::Act) -> Result<Self::Act>;
    /// `(activation(gate) * up) * down^T + bias`, where `[gate | up]` is what the first of the weights, a gated one, makes of `x`, normalised
    /// if `norm` says how, and `down` is the second.
    fn gated(
        &self,
        norm: Option<&Norm<Self::Vector>>,
        weights: [&Self::Weight; 2],
        activation: Activation,
        x: &Self::Act,
    ) -> Result<Self::Act>;
    /// `x` and what [`Self::gated`] makes of it.
    fn gated_onto(
        &self,
        norm: &Norm<Self::Vector>,
        weights: [&Self::Weight; 2],
        activation: Activation,
        x: Self::Act,
    ) -> Result<Self::Act> {
        let y = self.gated(Some(norm), weights, activation, &x)?;
        self.add(x, &y)
    }
    /// Which experts each token goes to: those with the `top` largest values of the softmax of `logits`, `(tokens, experts)`, which
    /// are their shares, or with `renormalise` these divided by their sum. One entry for each expert.
    fn route(&self, logits: &Self::Act, top: usize, renormalise: bool) -> Result<Vec<Picks>>;
    /// The sum of the outputs of experts, each with the tokens it has and their shares, for each of `count` tokens, in the order of
    /// `parts`.
    fn mix(&self, count: usize, parts: &[(Picks, Self::Act)]) -> Result<Self::Act>;
    /// The rotary angles of a pass: each row's rotation and the positions of its new tokens. All turn equally many pairs.
    fn angles(&self, rows: &[(&Rope, Range<usize>)]) -> Result<Self::Angles>;
    /// Self-attention. Each token of `qkv` is `[heads * head_dim | kv_heads * head_dim | kv_heads * head_dim]`.
    /// Rotates queries and keys where `angles` are given, appends keys and values of `layer` to each row's store, and
    /// returns `(tokens, heads * head_dim)`. The store's length grows only with [`Store::grow`], after the last layer.
    fn attend(
        &self,
        attention: &Attention,
        layer: usize,
        qkv: Self::Act,
        angles: Option<&Self::Angles>,
        rows: &mut [Span<&mut Self::Store>],
    ) -> Result<Self::Act>;
    /// Appends keys and values of `layer`, `[kv_heads * head_dim | kv_heads * head_dim]` a token, to each row's store.
    fn fill(&self, attention: &Attention, layer: usize, kv: &Self::Act, rows: &mut [Span<&mut Self::Store>]) -> Result<()>;
    /// The attention of `queries`, `heads * head_dim` a token, to all that `layer` of its row's store holds. Every row's has something.
    fn cross(&self, attention: &Attention, layer: usize, queries: &Self::Act, rows: &[Span<&Self::Store>]) -> Result<Self::Act>;
    /// The tokens `indices` of `x`.
    fn select(&self, x: &Self::Act, indices: &[usize]) -> Result<Self::Act>;
    /// `x` as a caller of the model sees it.
    fn values(&self, x: Self::Act) -> Result<Values>;
    /// `x * head^T`, each value `v` becoming `cap * tanh(v / cap)` where there is a cap.
    fn logits(&self, head: &Self::Weight, x: &Self::Act, softcap: Option<f32>) -> Result<Forward>;
}

/// The keys and values of one row. A clone shares them: writing copies only the last page, while it is shared.
pub(crate) trait Store: Clone + Send + Sync + 'static {
    /// Positions held.
    fn len(&self) -> usize;
    /// Counts the `count` positions that every layer has now written.
    fn grow(&mut self, count: usize);
    /// Forgets positions from `len` on; `len` is at most the length.
    fn truncate(&mut self, len: usize) -> Result<()>;
    /// Takes this room in place of what it has.
    fn furnish(&mut self, room: Room) -> Result<()>;
}

/// The sizes of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StoreShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// A matrix as the checkpoint has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    /// Little-endian values of `dtype`, row-major.
    pub bytes: &'a [u8],
    /// F32, BF16 or F16.
    pub dtype: DType,
    /// Outputs.
    pub outputs: usize,
    /// Inputs.
    pub inputs: usize,
    /// Whether the file has it as `(inputs, outputs)`, like GPT-2's Conv1D.
    pub transposed: bool,
}

impl Matrix<'_> {
    /// Some of the outputs of a matrix `(outputs, inputs)`.
    pub fn rows(self, rows: Range<usize>) -> Self {
        debug_assert!(!self.transposed && rows.end <= self.outputs);
        let width = self.inputs * self.dtype.size_in_bytes();
        Self { bytes: &self.bytes[rows.start * width..rows.end * width], outputs: rows.len(), ..self }
    }
}

/// A normalisation of each token.
#[derive(Debug, Clone)]
pub(crate) struct Norm<V> {
    pub kind: NormKind,
    pub weight: V,
    pub bias: Option<V>,
    pub eps: f32,
}

/// What a norm divides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormKind {
    /// The root of the mean square; in half precision rounded before the weights are multiplied.
    Rms,
    /// The root of the mean square, rounded once, after the weights are multiplied.
    RmsOnce,
    /// The standard deviation, after taking the mean away.
    Layer,
}

/// A function of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `x * Phi(x)` with the error function.
    Gelu,
    /// GELU approximated by tanh, `gelu_new` and `gelu_pytorch_tanh`.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
}

/// Rotary position embedding: which dimensions turn, and how fast.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rope {
    /// Radians per position of each pair; pair `i` is dimensions `i` and `i + inv_freq.len()` of a head.
    pub inv_freq: Vec<f32>,
    /// Factor on cosines and sines (1 but for yarn and longrope).
    pub scale: f32,
}

/// The shape of an attention.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// `cap * tanh(score / cap)` before the softmax.
    pub softcap: Option<f32>,
    pub sight: Sight,
    pub bias: Bias,
}

/// How attention is computed. The results differ by rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttnImplementation {
    /// All scores of a token, their softmax, then the sum of the values: memory grows with the length.
    Eager,
    /// Some positions at a time, joined by an online softmax (<https://arxiv.org/abs/2205.14135>): the same memory at every length.
    Flash,
}

/// The positions that a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    /// Itself and those before it.
    Causal,
    /// Itself and those before it, so many together.
    Window(usize),
    /// All, also those after it.
    Full,
}

impl Sight {
    /// What the token at `position` sees of `len` positions.
    pub fn of(self, position: usize, len: usize) -> Range<usize> {
        match self {
            Self::Causal => 0..position + 1,
            Self::Window(window) => (position + 1).saturating_sub(window)..position + 1,
            Self::Full => 0..len,
        }
    }
}

/// What is added to the scores, by which attention tells positions apart.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Bias {
    /// Nothing.
    None,
    /// One for each head.
    Alibi(Arc<[Alibi]>),
    /// By distance; layers may share it.
    Relative(Arc<Relative>),
}

impl Bias {
    /// That of one head, for the token at `position`.
    pub fn of(&self, head: usize, position: usize) -> HeadBias<'_> {
        match self {
            Self::None => HeadBias::None,
            Self::Alibi(alibi) => alibi.get(head).map_or(HeadBias::None, |&alibi| HeadBias::Alibi(alibi)),
            Self::Relative(relative) => HeadBias::Relative(relative.head(head), position),
        }
    }
}

/// What is added to the scores of one head and token.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HeadBias<'a> {
    /// Nothing.
    None,
    Alibi(Alibi),
    /// By distance, and where the token stands.
    Relative(&'a [f32], usize),
}

impl HeadBias<'_> {
    /// Adds to the scores of the keys from `first` on.
    #[inline(always)]
    pub fn add(self, scores: &mut [f32], first: usize) {
        let scores = (first..).zip(scores);
        match self {
            Self::None => {}
            Self::Alibi(alibi) => scores.for_each(|(position, score)| *score += alibi.at(position)),
            Self::Relative(table, token) => {
                let reach = table.len() / 2;
                scores.for_each(|(position, score)| *score += table[(position + reach).saturating_sub(token).min(2 * reach)]);
            }
        }
    }
}

/// A number for each head and distance of a key from its query (<https://arxiv.org/abs/1910.10683>).
#[derive(Debug, PartialEq)]
pub(crate) struct Relative {
    /// For each head those of the distances from `-reach` to `reach`; farther keys count as that far.
    biases: Vec<f32>,
    /// Distances of a head.
    width: usize,
}

impl Relative {
    /// `bias` gives the number of a head and distance.
    pub fn new(heads: usize, reach: usize, bias: impl Fn(usize, isize) -> f32) -> Self {
        let distances = -(reach as isize)..=reach as isize;
        let biases = (0..heads).flat_map(|head| distances.clone().map(move |distance| (head, distance)));
        Self { biases: biases.map(|(head, distance)| bias(head, distance)).collect(), width: 2 * reach + 1 }
    }

    fn head(&self, head: usize) -> &[f32] {
        &self.biases[head * self.width..][..self.width]
    }
}

/// What a head adds to its scores so that near positions weigh more, <https://arxiv.org/abs/2108.12409>: `slope * position` of
/// the key. Only differences matter to the softmax, so the token's own position need not be taken away.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Alibi {
    pub slope: f32,
    /// Factor on what is added.
    pub scale: f32,
    /// Whether slope, position and their product are rounded to bf16.
    pub coarse: bool,
}

impl Alibi {
    /// What is added to the score of a key at `position`.
    #[inline(always)]
    pub fn at(self, position: usize) -> f32 {
        let position = position as f32;
        let bias = if self.coarse { round(round(self.slope) * round(position)) } else { self.slope * position };
        bias * self.scale
    }
}

/// The nearest bf16.
#[inline(always)]
fn round(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// One row's part of a pass.
pub(crate) struct Span<S> {
    /// Index of its first new token among the pass's tokens.
    pub first: usize,
    /// Number of new tokens.
    pub count: usize,
    /// The row's keys and values. Where new ones are written, the first new token's position is its length.
    pub store: S,
}
