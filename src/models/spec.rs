//! An architecture as data: all in which families differ.

use super::rope::Rotation;
use crate::{
    error::Result,
    kernels::{Activation, Attention, StoreShape},
};

/// What a family's decoder is made of, or its encoder. Names are those of the checkpoint's tensors, without `.weight` and `.bias`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DecoderSpec {
    /// The family, `model_type` in `config.json`.
    pub family: &'static str,
    /// What the base model's tensors start with where the checkpoint has a head.
    pub base: &'static str,
    pub vocab: usize,
    pub hidden: usize,
    /// The table of embeddings, and names that files have in its place.
    pub embedding: &'static str,
    pub aliases: &'static [&'static str],
    /// Factor on the embeddings.
    pub embedding_scale: Option<f32>,
    /// A norm of the embeddings, with positions where these are vectors.
    pub embedding_norm: Option<&'static str>,
    /// Where embeddings and head have another width than the layers.
    pub projection: Option<Projection>,
    pub positions: Positions,
    /// What a layer's tensors start with, before the layer's number.
    pub layer: &'static str,
    /// The attention of each layer.
    pub attention: Vec<Attention>,
    /// How projections are stored.
    pub layout: Layout,
    pub qkv: Qkv,
    /// Normalises queries and keys before they are rotated.
    pub qk_norm: Option<QkNorm>,
    pub out: Linear,
    pub mlp: Mlp,
    /// Routed experts, which some layers have instead of `mlp`.
    pub experts: Option<Experts>,
    pub norm: Norm,
    pub residual: Residual,
    pub final_norm: Option<&'static str>,
    pub head: Head,
    /// Factor on what the head is given.
    pub head_scale: Option<f32>,
    /// Added to the logits, where the file has it: the tensor's whole name.
    pub logits_bias: Option<&'static str>,
    /// `cap * tanh(v / cap)` on the logits.
    pub softcap: Option<f32>,
    /// What reads a source, in an encoder-decoder model.
    pub encoder: Option<Box<Encoder>>,
}

/// What an encoder-decoder model has beside its decoder.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Encoder {
    /// The encoder itself. It has no head of its own, and no encoder.
    pub stack: DecoderSpec,
    /// How each layer of the decoder looks at the source, with as many heads as it looks at the row with.
    pub cross: Cross,
}

/// The attention of a decoder's layer to the source, between the one to the row and the feed-forward part. Its norm stands where those
/// of the layer do: before it or, in a layer that norms sums, after.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cross {
    pub attention: Attention,
    pub norm: &'static str,
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub out: Linear,
}

impl DecoderSpec {
    /// What a row's cache holds.
    pub fn shape(&self) -> StoreShape {
        let (kv_heads, head_dim) = self.attention.first().map_or((0, 0), |first| (first.kv_heads, first.head_dim));
        StoreShape { layers: self.attention.len(), kv_heads, head_dim }
    }

    /// The width of embeddings and head.
    pub fn outer(&self) -> usize {
        self.projection.as_ref().map_or(self.hidden, |projection| projection.width)
    }
}

/// How a token knows where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Positions {
    /// A table of `skip + len` vectors, added to the embeddings; the first `skip` are not used.
    Learned { name: &'static str, skip: usize, len: usize },
    /// Queries and keys are rotated: those of layer `i` by the rotation `layers[i]`, if it has one. Trained on `trained` positions.
    Rope { rotations: Vec<Rotation>, layers: Vec<Option<usize>>, trained: usize },
    /// Sines and cosines, added to the embeddings; trained on `trained` positions. Of a file that has the table, its own.
    Waves { waves: Waves, stored: Option<&'static str>, trained: usize },
    /// By numbers for each head and bucket of distances: a tensor of every layer or of the first one, which is all layers' then.
    Relative { name: &'static str, buckets: usize, reach: usize, each: bool },
    /// By the attention's biases alone; trained on `trained` positions, if the config says so.
    Alibi { trained: Option<usize> },
}

/// How the sines and cosines of positions are spaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waves {
    /// Those of "Attention Is All You Need", sines before cosines. The reference has no more than it was trained on.
    Plain,
    /// Fairseq's: the slowest turns once in 2 pi * 10000 positions, the first so many are not used, and there is no last one.
    Fairseq { skip: usize },
}

/// Projections, without biases, between embeddings of `width` and the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Projection {
    pub width: usize,
    pub inward: &'static str,
    pub outward: &'static str,
}

/// How the file stores projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `(outputs, inputs)`
    Linear,
    /// `(inputs, outputs)`, as a convolution of width one.
    Conv1d,
}

/// A projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Linear {
    pub name: &'static str,
    pub bias: bool,
}

/// How the file stores the projections to queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Qkv {
    /// One tensor each.
    Split([Linear; 3]),
    /// One tensor, stacked along the outputs.
    Fused(Linear),
    /// One tensor: for each head of keys and values the heads of its queries, then the keys', then the values'.
    Grouped(Linear),
}

/// The norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QkNorm {
    pub query: &'static str,
    pub key: &'static str,
    pub norm: Norm,
    pub extent: Extent,
}

/// What a norm of queries or keys takes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Each head, all heads with the same weights.
    Head,
    /// Each head, with weights of its own: the head's number follows the name.
    OwnHead,
    /// All heads of a token.
    Token,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mlp {
    /// `down(activation(up(x)))`
    Plain { up: Linear, down: Linear, inner: usize, activation: Activation },
    /// `down(activation(gate(x)) * up(x))`
    Gated { gate: Linear, up: Linear, down: Linear, inner: usize, activation: Activation },
    /// The same, gate and up stacked in one tensor.
    GatedFused { gate_up: Linear, down: Linear, inner: usize, activation: Activation },
}

/// Gated feed-forward parts of which each token uses a few: `sum(share * expert(x))`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Experts {
    /// Whether a layer has them.
    pub layers: Vec<bool>,
    pub router: &'static str,
    /// What an expert's tensors start with, before its number.
    pub expert: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub count: usize,
    /// How many a token uses: those with the largest softmax of the router's output, which is their share.
    pub top: usize,
    /// Whether the shares of the chosen are made to sum to 1.
    pub renormalise: bool,
    pub inner: usize,
    pub activation: Activation,
}

/// The kind of all norms of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Norm {
    pub kind: NormKind,
    pub eps: f32,
}

/// What a norm computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormKind {
    /// `x / rms(x) * w`
    Rms,
    /// `x / rms(x) * w`, in half precision rounded once
    RmsOnce,
    /// `x / rms(x) * (1 + w)`, in half precision rounded once
    RmsPlusOne,
    /// `(x - mean(x)) / std(x) * w + b`
    Layer,
    /// `(x - mean(x)) / std(x) * w`
    LayerUnbiased,
    /// `(x - mean(x)) / std(x)`
    LayerBare,
}

/// What a layer adds to what, and where its norms `N` stand; in a spec they are names. `f` is the attention, then the
/// feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residual<N = &'static str> {
    /// `x + f(norm(x))`
    Pre { attention: N, mlp: N },
    /// `x + norm(f(x))`
    Post { attention: N, mlp: N },
    /// `x + norm(f(norm(x)))`; pairs are the norms before and after.
    PrePost { attention: [N; 2], mlp: [N; 2] },
    /// `norm(x + f(x))`
    Summed { attention: N, mlp: N },
    /// `norm(x) + f(norm(x))`
    Normed { attention: N, mlp: N },
    /// `x + attention(norm(x)) + mlp(norm(x))`; one norm may serve both.
    Parallel { attention: N, mlp: Option<N> },
}

impl<N> Residual<N> {
    /// The same with something else for each norm.
    pub fn try_map<M>(self, mut f: impl FnMut(N) -> Result<M>) -> Result<Residual<M>> {
        Ok(match self {
            Self::Pre { attention, mlp } => Residual::Pre { attention: f(attention)?, mlp: f(mlp)? },
            Self::PrePost { attention: [a, b], mlp: [c, d] } => Residual::PrePost { attention: [f(a)?, f(b)?], mlp: [f(c)?, f(d)?] },
            Self::Post { attention, mlp } => Residual::Post { attention: f(attention)?, mlp: f(mlp)? },
            Self::Summed { attention, mlp } => Residual::Summed { attention: f(attention)?, mlp: f(mlp)? },
            Self::Normed { attention, mlp } => Residual::Normed { attention: f(attention)?, mlp: f(mlp)? },
            Self::Parallel { attention, mlp } => Residual::Parallel { attention: f(attention)?, mlp: mlp.map(f).transpose()? },
        })
    }
}

/// The projection to logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    /// The embeddings; the name is that of a head which the file may have all the same.
    Tied(Linear),
    /// A tensor of its own.
    Own(Linear),
}
