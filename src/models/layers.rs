//! One layer of the decoder, and how the parts of a model are taken from a checkpoint.

use super::{
    relative,
    spec::{self, DecoderSpec, Extent, Layout, Linear, NormKind, Positions, Qkv, Residual},
    weights::Weights,
};
use crate::{
    error::Result,
    kernels::{self, Activation, Attention, Bias, Matrix, Norm, Ops, Relative, Sight, Span},
    progress::{OnProgress, Stage},
};
use std::sync::Arc;

/// A layer: attention and a feed-forward part, each added to what it was given.
pub(crate) struct Layer<O: Ops> {
    attention: Attention,
    residual: Residual<Norm<O::Vector>>,
    /// Queries, keys and values stacked, so that they are one product.
    qkv: O::Weight,
    qk_norms: Vec<QkNorm<O>>,
    out: O::Weight,
    /// Where there is a source to look at.
    cross: Option<Cross<O>>,
    mlp: Mlp<O>,
}

/// Attention to a source.
struct Cross<O: Ops> {
    attention: Attention,
    norm: Norm<O::Vector>,
    queries: O::Weight,
    /// Keys and values stacked.
    kv: O::Weight,
    out: O::Weight,
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
    pub fn attend(
        &self,
        ops: &O,
        index: usize,
        x: &O::Act,
        angles: Option<&O::Angles>,
        rows: &mut [Span<&mut O::Store>],
    ) -> Result<O::Act> {
        let norm = match &self.residual {
            Residual::Pre { attention, .. }
            | Residual::PrePost { attention: [attention, _], .. }
            | Residual::Normed { attention, .. }
            | Residual::Parallel { attention, .. } => Some(attention),
            Residual::Post { .. } | Residual::Summed { .. } => None,
        };
        let mut qkv = ops.linear(norm, &self.qkv, x)?;
        for QkNorm { norm, first, group } in &self.qk_norms {
            qkv = ops.norm_part(norm, qkv, *first, *group)?;
        }
        ops.attend(&self.attention, index, qkv, angles, rows)
    }

    /// Writes the keys and values of the states of sources, where the layer looks at one.
    pub fn fill(&self, ops: &O, index: usize, states: &O::Act, rows: &mut [Span<&mut O::Store>]) -> Result<()> {
        match &self.cross {
            Some(cross) => ops.fill(&cross.attention, index, &ops.linear(None, &cross.kv, states)?, rows),
            None => Ok(()),
        }
    }

    /// The rest of the layer, each token alone or with its row's source. Where a norm of `x` is needed once more, computing it again
    /// costs less than carrying it along.
    pub fn finish(&self, ops: &O, index: usize, x: O::Act, mixed: &O::Act, sources: &[Span<&O::Store>]) -> Result<O::Act> {
        let out = || ops.linear(None, &self.out, mixed);
        match &self.residual {
            Residual::Pre { mlp, .. } => {
                let mut x = ops.linear_onto(&self.out, mixed, x)?;
                if let Some(cross) = &self.cross {
                    let mixed = cross.mix(ops, index, Some(&cross.norm), &x, sources)?;
                    x = ops.linear_onto(&cross.out, &mixed, x)?;
                }
                self.mlp.onto(ops, mlp, x)
            }
            Residual::Post { attention, mlp } => {
                let x = ops.add(x, &ops.norm(attention, &out()?)?)?;
                let y = self.mlp.compute(ops, None, &x)?;
                ops.add(x, &ops.norm(mlp, &y)?)
            }
            Residual::PrePost { attention: [_, attention], mlp: [before, after] } => {
                let x = ops.add(x, &ops.norm(attention, &out()?)?)?;
                let y = self.mlp.compute(ops, Some(before), &x)?;
                ops.add(x, &ops.norm(after, &y)?)
            }
            Residual::Summed { attention, mlp } => {
                let mut x = ops.norm(attention, &ops.linear_onto(&self.out, mixed, x)?)?;
                if let Some(cross) = &self.cross {
                    let mixed = cross.mix(ops, index, None, &x, sources)?;
                    x = ops.norm(&cross.norm, &ops.linear_onto(&cross.out, &mixed, x)?)?;
                }
                let y = self.mlp.compute(ops, None, &x)?;
                ops.norm(mlp, &ops.add(x, &y)?)
            }
            Residual::Normed { attention, mlp } => {
                let x = ops.norm(mlp, &ops.linear_onto(&self.out, mixed, ops.norm(attention, &x)?)?)?;
                let y = self.mlp.compute(ops, None, &x)?;
                ops.add(x, &y)
            }
            Residual::Parallel { attention, mlp } => {
                let z = self.mlp.compute(ops, Some(mlp.as_ref().unwrap_or(attention)), &x)?;
                ops.add(x, &ops.linear_onto(&self.out, mixed, z)?)
            }
        }
    }
}

impl<O: Ops> Cross<O> {
    /// What tokens take from their sources.
    fn mix(&self, ops: &O, index: usize, norm: Option<&Norm<O::Vector>>, x: &O::Act, sources: &[Span<&O::Store>]) -> Result<O::Act> {
        ops.cross(&self.attention, index, &ops.linear(norm, &self.queries, x)?, sources)
    }
}

impl<O: Ops> Mlp<O> {
    /// What comes of `x`, normalised if `norm` says how.
    fn compute(&self, ops: &O, norm: Option<&Norm<O::Vector>>, x: &O::Act) -> Result<O::Act> {
        match self {
            Self::Plain { up, activation, down } => ops.linear(None, down, &ops.activate(*activation, ops.linear(norm, up, x)?)?),
            Self::Gated { gate_up, activation, down } => ops.gated(norm, [gate_up, down], *activation, x),
            Self::Routed { router, top, renormalise, activation, experts } => {
                let normed = norm.map(|norm| ops.norm(norm, x)).transpose()?;
                let x = normed.as_ref().unwrap_or(x);
                let logits = ops.linear(None, router, x)?;
                let (mut count, mut parts) = (0, Vec::new());
                for (picks, [gate_up, down]) in ops.route(&logits, *top, *renormalise)?.into_iter().zip(experts) {
                    if let Some(&end) = picks.tokens.last() {
                        let y = ops.gated(None, [gate_up, down], *activation, &ops.select(x, &picks.tokens)?)?;
                        count = count.max(end + 1);
                        parts.push((picks, y));
                    }
                }
                // Every token has an expert, so the last token that one has is the last of all. Parts are in the order of the experts:
                // a token's sum has the same order in any company.
                ops.mix(count, &parts)
            }
        }
    }

    /// What comes of `x`, normalised, added to `x`.
    fn onto(&self, ops: &O, norm: &Norm<O::Vector>, x: O::Act) -> Result<O::Act> {
        match self {
            Self::Plain { up, activation, down } => {
                let inner = ops.activate(*activation, ops.linear(Some(norm), up, &x)?)?;
                ops.linear_onto(down, &inner, x)
            }
            Self::Gated { gate_up, activation, down } => ops.gated_onto(norm, [gate_up, down], *activation, x),
            Self::Routed { .. } => {
                let y = self.compute(ops, Some(norm), &x)?;
                ops.add(x, &y)
            }
        }
    }
}

/// [`Ops::weight`] or [`Ops::gated_weight`].
type Pack<O> = fn(&O, &[Matrix<'_>], Option<&[f32]>, &dyn Fn(&[u8])) -> Result<<O as Ops>::Weight>;

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
    /// The biases by distance that all layers share.
    shared: Option<Arc<Relative>>,
}

impl<'a, O: Ops> Loader<'a, O> {
    pub fn new(ops: &'a O, spec: &'a DecoderSpec, weights: &'a Weights, progress: Option<&'a OnProgress>) -> Self {
        Self { ops, spec, weights, progress, read: 0, weight_bytes: 0, shared: None }
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

    /// Goes on with another part of the model; returns the last one.
    pub fn turn(&mut self, spec: &'a DecoderSpec) -> &'a DecoderSpec {
        self.shared = None;
        std::mem::replace(&mut self.spec, spec)
    }

    /// Whether the file has a weight.
    pub fn has(&self, name: &str) -> bool {
        self.weights.contains(&format!("{name}.weight"))
    }

    /// The first of some names under which the file has a table.
    pub fn table(&self, name: &'static str, aliases: &[&'static str]) -> &'static str {
        [name].into_iter().chain(aliases.iter().copied()).find(|name| self.has(name)).unwrap_or(name)
    }

    /// Whether two names mean the same weight.
    pub fn same(&self, one: &str, other: &str) -> Result<bool> {
        Ok(one == other || self.weights.equal(&format!("{one}.weight"), &format!("{other}.weight"))?)
    }

    /// A layer, with attention to a source if `cross` says how.
    pub fn layer(&mut self, index: usize, attention: &Attention, cross: Option<&spec::Cross>) -> Result<Layer<O>> {
        let spec = self.spec;
        let name = |part: &str| format!("{}{index}.{part}", spec.layer);
        let width = attention.heads * attention.head_dim;
        let kv_width = attention.kv_heads * attention.head_dim;
        let qkv = match spec.qkv {
            Qkv::Split([q, k, v]) => self.stack(name, &[(q, width), (k, kv_width), (v, kv_width)], spec.hidden)?,
            Qkv::Fused(qkv) => self.stack(name, &[(qkv, width + 2 * kv_width)], spec.hidden)?,
            Qkv::Grouped(qkv) => self.grouped(name, qkv, attention)?,
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
                gate_up: self.gated(name, &[(gate, inner), (up, inner)], spec.hidden)?,
                activation,
                down: self.stack(name, &[(down, spec.hidden)], inner)?,
            },
            (None, spec::Mlp::GatedFused { gate_up, down, inner, activation }) => Mlp::Gated {
                gate_up: self.gated(name, &[(gate_up, 2 * inner)], spec.hidden)?,
                activation,
                down: self.stack(name, &[(down, spec.hidden)], inner)?,
            },
        };
        let cross = match cross {
            Some(cross) => Some(Cross {
                attention: cross.attention.clone(),
                norm: self.norm(&name(cross.norm))?,
                queries: self.stack(name, &[(cross.query, width)], spec.hidden)?,
                kv: self.stack(name, &[(cross.key, kv_width), (cross.value, kv_width)], spec.hidden)?,
                out: self.stack(name, &[(cross.out, spec.hidden)], width)?,
            }),
            None => None,
        };
        Ok(Layer {
            attention: self.biased(name, attention)?,
            cross,
            residual: spec.residual.try_map(|norm| self.norm(&name(norm)))?,
            qkv,
            qk_norms: self.qk_norms(name, attention)?,
            out: self.stack(name, &[(spec.out, spec.hidden)], width)?,
            mlp,
        })
    }

    /// The attention with the biases by distance that the file has for it.
    fn biased(&mut self, name: impl Fn(&str) -> String, attention: &Attention) -> Result<Attention> {
        let Positions::Relative { name: table, buckets, reach, each } = self.spec.positions else { return Ok(attention.clone()) };
        let relative = match self.shared.take().filter(|_| !each) {
            Some(shared) => shared,
            None => {
                let values = self.weights.values(&format!("{}.weight", name(table)), &[buckets, attention.heads])?;
                let bucket = |distance| relative::bucket(distance, attention.sight == Sight::Full, buckets, reach);
                Arc::new(Relative::new(attention.heads, reach, |head, distance| values[bucket(distance) * attention.heads + head]))
            }
        };
        self.shared = Some(relative.clone());
        Ok(Attention { bias: Bias::Relative(relative), ..attention.clone() })
    }

    fn experts(&mut self, name: impl Fn(&str) -> String + Copy, experts: &spec::Experts) -> Result<Mlp<O>> {
        let (hidden, inner) = (self.spec.hidden, experts.inner);
        let linear = |name| Linear { name, bias: false };
        let router = self.stack(name, &[(linear(experts.router), experts.count)], hidden)?;
        let mut weights = Vec::new();
        for number in 0..experts.count {
            let name = |part: &str| name(&format!("{}{number}.{part}", experts.expert));
            let gate_up = self.gated(name, &[(linear(experts.gate), inner), (linear(experts.up), inner)], hidden)?;
            weights.push([gate_up, self.stack(name, &[(linear(experts.down), hidden)], inner)?]);
        }
        let &spec::Experts { top, renormalise, activation, .. } = experts;
        Ok(Mlp::Routed { router, top, renormalise, activation, experts: weights })
    }

    /// A matrix of `outputs` times `inputs`: a table with a vector for each output, a head, a projection outside of the layers.
    pub fn matrix(&mut self, name: &str, outputs: usize, inputs: usize, bias: Option<&[f32]>) -> Result<O::Weight> {
        let matrix = self.weights.matrix(&format!("{name}.weight"), outputs, inputs, false)?;
        self.pack(O::weight, &[matrix], bias)
    }

    pub fn norm(&self, name: &str) -> Result<Norm<O::Vector>> {
        self.norm_of(self.spec.norm, &[name.to_owned()], self.spec.hidden, 1)
    }

    fn qk_norms(&self, name: impl Fn(&str) -> String, attention: &Attention) -> Result<Vec<QkNorm<O>>> {
        let Some(spec::QkNorm { query, key, norm, extent }) = self.spec.qk_norm else { return Ok(Vec::new()) };
        let Attention { heads, kv_heads, head_dim, .. } = *attention;
        let part = |part, first: usize, heads: usize| {
            let name = name(part);
            let (names, group, times) = match extent {
                Extent::Head => (vec![name], head_dim, heads),
                Extent::OwnHead => ((0..heads).map(|head| format!("{name}.{head}")).collect(), head_dim, 1),
                Extent::Token => (vec![name], heads * head_dim, 1),
            };
            Ok(QkNorm { norm: self.norm_of(norm, &names, group, times)?, first: first * head_dim, group })
        };
        [part(query, 0, heads), part(key, heads, kv_heads)].into_iter().collect()
    }

    /// The parameters of norms of `len` values one after another, and that `times` times.
    fn norm_of(&self, spec::Norm { kind, eps }: spec::Norm, names: &[String], len: usize, times: usize) -> Result<Norm<O::Vector>> {
        let all = |part: &str| -> Result<Vec<f32>> {
            let parts: Vec<_> = names.iter().map(|name| self.weights.vector(&format!("{name}.{part}"), len)).collect::<Result<_>>()?;
            Ok(parts.concat().repeat(times))
        };
        let mut weight = if kind == NormKind::LayerBare { vec![1.0; names.len() * len * times] } else { all("weight")? };
        if kind == NormKind::RmsPlusOne {
            weight.iter_mut().for_each(|value| *value += 1.0);
        }
        let (kind, bias) = match kind {
            NormKind::Rms => (kernels::NormKind::Rms, None),
            NormKind::RmsOnce | NormKind::RmsPlusOne => (kernels::NormKind::RmsOnce, None),
            NormKind::Layer => (kernels::NormKind::Layer, Some(self.ops.vector(&all("bias")?)?)),
            NormKind::LayerUnbiased | NormKind::LayerBare => (kernels::NormKind::Layer, None),
        };
        Ok(Norm { kind, weight: self.ops.vector(&weight)?, bias, eps })
    }

    /// Projections of the same inputs, given with their numbers of outputs, as one weight.
    fn stack(&mut self, name: impl Fn(&str) -> String, parts: &[(Linear, usize)], inputs: usize) -> Result<O::Weight> {
        self.stacked(name, parts, inputs, O::weight)
    }

    /// As [`Self::stack`], gates and what they open.
    fn gated(&mut self, name: impl Fn(&str) -> String, parts: &[(Linear, usize)], inputs: usize) -> Result<O::Weight> {
        self.stacked(name, parts, inputs, O::gated_weight)
    }

    fn stacked(&mut self, name: impl Fn(&str) -> String, parts: &[(Linear, usize)], inputs: usize, pack: Pack<O>) -> Result<O::Weight> {
        let (mut matrices, mut biases) = (Vec::new(), Vec::new());
        for (linear, outputs) in parts {
            let name = name(linear.name);
            let transposed = self.spec.layout == Layout::Conv1d;
            matrices.push(self.weights.matrix(&format!("{name}.weight"), *outputs, inputs, transposed)?);
            if linear.bias {
                biases.extend(self.weights.vector(&format!("{name}.bias"), *outputs)?);
            }
        }
        self.pack(pack, &matrices, (!biases.is_empty()).then_some(&biases))
    }

    /// Queries, keys and values that the file groups by the heads of keys and values, in the order of the attention.
    fn grouped(&mut self, name: impl Fn(&str) -> String, linear: Linear, attention: &Attention) -> Result<O::Weight> {
        let &Attention { heads, kv_heads, head_dim, .. } = attention;
        let (queries, group) = (heads / kv_heads * head_dim, (heads / kv_heads + 2) * head_dim);
        let name = name(linear.name);
        let matrix = self.weights.matrix(&format!("{name}.weight"), kv_heads * group, self.spec.hidden, false)?;
        let part = |start: usize, len: usize| (0..kv_heads).map(move |head| head * group + start..head * group + start + len);
        let parts = || part(0, queries).chain(part(queries, head_dim)).chain(part(queries + head_dim, head_dim));
        let matrices: Vec<_> = parts().map(|rows| matrix.rows(rows)).collect();
        let bias = match linear.bias {
            true => Some(self.weights.vector(&format!("{name}.bias"), kv_heads * group)?),
            false => None,
        };
        let bias = bias.map(|bias| parts().flat_map(|rows| &bias[rows]).copied().collect::<Vec<_>>());
        self.pack(O::weight, &matrices, bias.as_deref())
    }

    fn pack(&mut self, pack: Pack<O>, matrices: &[Matrix<'_>], bias: Option<&[f32]>) -> Result<O::Weight> {
        let weight = pack(self.ops, matrices, bias, &|bytes| self.weights.forget(bytes))?;
        self.read += matrices.iter().map(|matrix| matrix.bytes.len() as u64).sum::<u64>();
        self.weight_bytes += self.ops.weight_bytes(&weight);
        Ok(weight)
    }
}
