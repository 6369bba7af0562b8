//! One layer of the decoder, and how the parts of a model are taken from a checkpoint.

use super::{
    spec::{self, DecoderSpec, Extent, Layout, Linear, NormKind, Qkv, Residual},
    weights::Weights,
};
use crate::{
    error::Result,
    kernels::{self, Activation, Attention, Matrix, Norm, Ops, Span},
    progress::{OnProgress, Stage},
};

/// A layer: attention and a feed-forward part, each added to what it was given.
pub(crate) struct Layer<O: Ops> {
    attention: Attention,
    before_attention: Option<Norm<O::Vector>>,
    /// Queries, keys and values stacked, so that they are one product.
    qkv: O::Weight,
    qk_norms: Vec<QkNorm<O>>,
    out: O::Weight,
    after_attention: Option<Norm<O::Vector>>,
    before_mlp: Option<Norm<O::Vector>>,
    mlp: Mlp<O>,
    after_mlp: Option<Norm<O::Vector>>,
}

/// The norm of queries or of keys.
struct QkNorm<O: Ops> {
    norm: Norm<O::Vector>,
    /// The first of its columns among queries, keys and values.
    first: usize,
    /// The columns that it takes together.
    group: usize,
}

enum Mlp<O: Ops> {
    Plain {
        up: O::Weight,
        activation: Activation,
        down: O::Weight,
    },
    /// Gate and up stacked, so that they are one product.
    Gated {
        gate_up: O::Weight,
        activation: Activation,
        down: O::Weight,
    },
    /// Gate and up stacked, and down, of each expert.
    Routed {
        router: O::Weight,
        top: usize,
        renormalise: bool,
        activation: Activation,
        experts: Vec<[O::Weight; 2]>,
    },
}

impl<O: Ops> Layer<O> {
    /// Attention up to the mixed values: all that the caches need of the layer.
    pub fn attend(&self, ops: &O, index: usize, x: &O::Act, angles: Option<&O::Angles>, rows: &mut [Span<'_, O::Store>]) -> Result<O::Act> {
        let mut qkv = match &self.before_attention {
            Some(norm) => ops.linear(&self.qkv, &ops.norm(norm, x)?)?,
            None => ops.linear(&self.qkv, x)?,
        };
        for QkNorm { norm, first, group } in &self.qk_norms {
            qkv = ops.norm_part(norm, qkv, *first, *group)?;
        }
        ops.attend(&self.attention, index, qkv, angles, rows)
    }

    /// The rest of the layer, each token alone.
    pub fn finish(&self, ops: &O, x: O::Act, mixed: &O::Act) -> Result<O::Act> {
        let attended = after(ops, self.after_attention.as_ref(), ops.linear(&self.out, mixed)?)?;
        let x = ops.add(x, &attended)?;
        let y = match &self.before_mlp {
            Some(norm) => self.mlp.compute(ops, &ops.norm(norm, &x)?)?,
            None => self.mlp.compute(ops, &x)?,
        };
        ops.add(x, &after(ops, self.after_mlp.as_ref(), y)?)
    }
}

impl<O: Ops> Mlp<O> {
    fn compute(&self, ops: &O, x: &O::Act) -> Result<O::Act> {
        match self {
            Self::Plain { up, activation, down } => ops.linear(down, &ops.activate(*activation, ops.linear(up, x)?)?),
            Self::Gated { gate_up, activation, down } => ops.linear(down, &ops.gate(*activation, ops.linear(gate_up, x)?)?),
            Self::Routed { router, top, renormalise, activation, experts } => {
                let logits = ops.linear(router, x)?;
                let (mut count, mut parts) = (0, Vec::new());
                for (picks, [gate_up, down]) in ops.route(&logits, *top, *renormalise)?.into_iter().zip(experts) {
                    if let Some(&last) = picks.tokens.last() {
                        let own = ops.select(x, &picks.tokens)?;
                        let y = ops.linear(down, &ops.gate(*activation, ops.linear(gate_up, &own)?)?)?;
                        count = count.max(last + 1);
                        parts.push((picks, y));
                    }
                }
                // Every token has an expert, so the last token that one has is the last of all. Parts are in the order of the experts:
                // a token's sum has the same order in any company.
                ops.mix(count, &parts)
            }
        }
    }
}

fn after<O: Ops>(ops: &O, norm: Option<&Norm<O::Vector>>, x: O::Act) -> Result<O::Act> {
    match norm {
        Some(norm) => ops.norm(norm, &x),
        None => Ok(x),
    }
}

/// Takes parts of a model from a checkpoint.
pub(crate) struct Loader<'a, O> {
    ops: &'a O,
    spec: &'a DecoderSpec,
    weights: &'a Weights,
    progress: Option<&'a OnProgress>,
    /// Bytes read so far.
    read: u64,
    /// Bytes that the weights loaded so far take in memory.
    weight_bytes: u64,
}

impl<'a, O: Ops> Loader<'a, O> {
    pub fn new(ops: &'a O, spec: &'a DecoderSpec, weights: &'a Weights, progress: Option<&'a OnProgress>) -> Self {
        Self { ops, spec, weights, progress, read: 0, weight_bytes: 0 }
    }

    /// Bytes that the weights loaded so far take in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Tells how far loading has come, in bytes of the files.
    pub fn report(&self) -> Result<()> {
        self.progress.map_or(Ok(()), |progress| progress.report(Stage::Load, self.read, self.weights.len()))
    }

    /// Tells that loading is done: what was not read is not needed.
    pub fn finish(&mut self) -> Result<()> {
        self.read = self.weights.len();
        self.report()
    }

    pub fn layer(&mut self, index: usize, attention: &Attention) -> Result<Layer<O>> {
        let spec = self.spec;
        let name = |part: &str| format!("{}{index}.{part}", spec.layer);
        let (before_attention, after_attention, before_mlp, after_mlp) = match spec.residual {
            Residual::Pre { attention, mlp } => (Some(attention), None, Some(mlp), None),
            Residual::Post { attention, mlp } => (None, Some(attention), None, Some(mlp)),
            Residual::PrePost { attention, mlp } => (Some(attention[0]), Some(attention[1]), Some(mlp[0]), Some(mlp[1])),
        };
        let width = attention.heads * attention.head_dim;
        let kv_width = attention.kv_heads * attention.head_dim;
        let qkv = match spec.qkv {
            Qkv::Split([q, k, v]) => self.stack(name, &[(q, width), (k, kv_width), (v, kv_width)], spec.hidden)?,
            Qkv::Fused(qkv) => self.stack(name, &[(qkv, width + 2 * kv_width)], spec.hidden)?,
        };
        let routed = spec.experts.as_ref().filter(|experts| experts.layers.get(index) == Some(&true));
        let mlp = match (routed, spec.mlp) {
            (Some(experts), _) => self.experts(name, experts)?,
            (None, spec::Mlp::Plain { up, down, inner, activation }) => Mlp::Plain {
                up: self.stack(name, &[(up, inner)], spec.hidden)?,
                activation,
                down: self.stack(name, &[(down, spec.hidden)], inner)?,
            },
            (None, spec::Mlp::Gated { gate, up, down, inner, activation }) => Mlp::Gated {
                gate_up: self.stack(name, &[(gate, inner), (up, inner)], spec.hidden)?,
                activation,
                down: self.stack(name, &[(down, spec.hidden)], inner)?,
            },
            (None, spec::Mlp::GatedFused { gate_up, down, inner, activation }) => Mlp::Gated {
                gate_up: self.stack(name, &[(gate_up, 2 * inner)], spec.hidden)?,
                activation,
                down: self.stack(name, &[(down, spec.hidden)], inner)?,
            },
        };
        Ok(Layer {
            attention: attention.clone(),
            before_attention: before_attention.map(|norm| self.norm(&name(norm))).transpose()?,
            qkv,
            qk_norms: self.qk_norms(name, attention)?,
            out: self.stack(name, &[(spec.out, spec.hidden)], width)?,
            after_attention: after_attention.map(|norm| self.norm(&name(norm))).transpose()?,
            before_mlp: before_mlp.map(|norm| self.norm(&name(norm))).transpose()?,
            mlp,
            after_mlp: after_mlp.map(|norm| self.norm(&name(norm))).transpose()?,
        })
    }

    fn experts(&mut self, name: impl Fn(&str) -> String + Copy, experts: &spec::Experts) -> Result<Mlp<O>> {
        let (hidden, inner) = (self.spec.hidden, experts.inner);
        let linear = |name| Linear { name, bias: false };
        let router = self.stack(name, &[(linear(experts.router), experts.count)], hidden)?;
        let mut weights = Vec::new();
        for number in 0..experts.count {
            let name = |part: &str| name(&format!("{}{number}.{part}", experts.expert));
            let gate_up = self.stack(name, &[(linear(experts.gate), inner), (linear(experts.up), inner)], hidden)?;
            weights.push([gate_up, self.stack(name, &[(linear(experts.down), hidden)], inner)?]);
        }
        let &spec::Experts { top, renormalise, activation, .. } = experts;
        Ok(Mlp::Routed { router, top, renormalise, activation, experts: weights })
    }

    /// A table with a vector for each of `len` things; also a head.
    pub fn table(&mut self, name: &str, len: usize) -> Result<O::Weight> {
        let matrix = self.weights.matrix(&format!("{name}.weight"), len, self.spec.hidden, false)?;
        self.pack(&[matrix], None)
    }

    pub fn norm(&self, name: &str) -> Result<Norm<O::Vector>> {
        self.norm_of(self.spec.norm, name, self.spec.hidden, 1)
    }

    fn qk_norms(&self, name: impl Fn(&str) -> String, attention: &Attention) -> Result<Vec<QkNorm<O>>> {
        let Some(spec::QkNorm { query, key, norm, extent }) = self.spec.qk_norm else { return Ok(Vec::new()) };
        let Attention { heads, kv_heads, head_dim, .. } = *attention;
        let part = |part, first: usize, heads: usize| {
            let (group, times) = match extent {
                Extent::Head => (head_dim, heads),
                Extent::Token => (heads * head_dim, 1),
            };
            Ok(QkNorm { norm: self.norm_of(norm, &name(part), group, times)?, first: first * head_dim, group })
        };
        [part(query, 0, heads), part(key, heads, kv_heads)].into_iter().collect()
    }

    /// A norm of `len` values, its weights repeated `times` times.
    fn norm_of(&self, spec::Norm { kind, eps }: spec::Norm, name: &str, len: usize, times: usize) -> Result<Norm<O::Vector>> {
        let mut weight = self.weights.vector(&format!("{name}.weight"), len)?;
        if kind == NormKind::RmsPlusOne {
            weight.iter_mut().for_each(|value| *value += 1.0);
        }
        let (kind, bias) = match kind {
            NormKind::Rms => (kernels::NormKind::Rms, None),
            NormKind::RmsOnce | NormKind::RmsPlusOne => (kernels::NormKind::RmsOnce, None),
            NormKind::Layer => (kernels::NormKind::Layer, Some(self.weights.vector(&format!("{name}.bias"), len)?)),
        };
        let bias = bias.map(|bias| self.ops.vector(&bias.repeat(times))).transpose()?;
        Ok(Norm { kind, weight: self.ops.vector(&weight.repeat(times))?, bias, eps })
    }

    /// Projections of the same inputs, given with their numbers of outputs, as one weight.
    fn stack(&mut self, name: impl Fn(&str) -> String, parts: &[(Linear, usize)], inputs: usize) -> Result<O::Weight> {
        let (mut matrices, mut biases) = (Vec::new(), Vec::new());
        for (linear, outputs) in parts {
            let name = name(linear.name);
            let transposed = self.spec.layout == Layout::Conv1d;
            matrices.push(self.weights.matrix(&format!("{name}.weight"), *outputs, inputs, transposed)?);
            if linear.bias {
                biases.extend(self.weights.vector(&format!("{name}.bias"), *outputs)?);
            }
        }
        self.pack(&matrices, (!biases.is_empty()).then_some(&biases))
    }

    fn pack(&mut self, matrices: &[Matrix<'_>], bias: Option<&[f32]>) -> Result<O::Weight> {
        let weight = self.ops.weight(matrices, bias)?;
        self.read += matrices.iter().map(|matrix| matrix.bytes.len() as u64).sum::<u64>();
        self.weight_bytes += self.ops.weight_bytes(&weight);
        Ok(weight)
    }
}
