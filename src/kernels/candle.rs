//! The operations in candle's own: any device and float type, the reference that the fused ones are tested against.

use super::{Activation, Attention, Bias, Matrix, Norm, NormKind, Ops, Picks, Rope, Sight, Span, Store, StoreShape, route::pick};
use crate::{
    device::turn,
    error::{Error, Result},
    model::{Forward, Room, Values},
};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{ops::softmax_last_dim, rotary_emb::rope_thd};
use half::f16;
use std::ops::Range;

/// Candle's operations on one device. `dtype` is that of activations; as in the reference's eager code norms, softmax
/// and activation functions are computed in f32 and rounded back.
pub(crate) struct CandleOps {
    device: Device,
    dtype: DType,
    /// The type in which matrices are multiplied. Candle has no bf16 product on the CPU; products there accumulate in
    /// f32 over values already rounded to `dtype`, as the reference's do.
    product: DType,
}

/// A matrix `(outputs, inputs)` and its bias, in the type of products.
pub(crate) struct Weight {
    matrix: Tensor,
    bias: Option<Tensor>,
}

/// Cosines and sines, `(tokens, pairs)`.
pub(crate) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

/// Keys and values of each layer, `(kv_heads, positions, head_dim)`; tensors are shared by clones.
#[derive(Clone)]
pub(crate) struct Tensors {
    layers: Vec<Option<[Tensor; 2]>>,
    len: usize,
}

/// Scores of an attention that are computed at a time.
const SCORES: usize = 1 << 25;

impl CandleOps {
    pub fn new(device: Device, dtype: DType) -> Self {
        let product = if device.is_cpu() { DType::F32 } else { dtype };
        Self { device, dtype, product }
    }

    /// Queries `(heads, count, head_dim)`, the first of which stands at position `start`, on all keys and values.
    fn attend_row(&self, attention: &Attention, start: usize, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let (count, len) = (queries.dim(1)?, keys.dim(1)?);
        // A long prompt in parts, so that memory grows with its length and not with its square.
        let most = (SCORES / (attention.heads * len)).max(1);
        let part = |first| {
            let queries = queries.narrow(1, first, most.min(count - first))?.contiguous()?;
            self.attend_part(attention, start + first, &queries, keys, values)
        };
        match count > most {
            true => Ok(Tensor::cat(&(0..count).step_by(most).map(part).collect::<Result<Vec<_>>>()?, 0)?),
            false => self.attend_part(attention, start, queries, keys, values),
        }
    }

    fn attend_part(&self, attention: &Attention, start: usize, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let Attention { heads, kv_heads, head_dim, .. } = *attention;
        let (count, len) = (queries.dim(1)?, keys.dim(1)?);
        // The heads of a group lie one after another, so a group's queries are the rows of one product.
        let queries = queries.reshape((kv_heads, heads / kv_heads * count, head_dim))?.to_dtype(self.product)?;
        let scores = self.narrow(queries.matmul(&keys.to_dtype(self.product)?.t()?)?)?;
        let mut scores = self.times(&scores, attention.scale)?;
        if let Some(cap) = attention.softcap {
            scores = self.times(&self.times(&scores, 1.0 / cap)?.tanh()?, cap)?;
        }
        let scores = scores.reshape((heads, count, len))?;
        let scores = match attention.bias {
            Bias::None => scores,
            _ => self.narrow((scores + self.biases(attention, start, count, len)?)?)?,
        };
        let mut scores = scores.to_dtype(DType::F32)?;
        // Where the first token sees everything, all do.
        if attention.sight.of(start, len) != (0..len) {
            scores = scores.broadcast_add(&self.mask(attention.sight, start, count, len)?)?;
        }
        let weights = softmax_last_dim(&scores)?.to_dtype(self.dtype)?.to_dtype(self.product)?;
        let weights = weights.reshape((kv_heads, heads / kv_heads * count, len))?;
        let mixed = weights.matmul(&values.to_dtype(self.product)?)?.to_dtype(self.dtype)?;
        Ok(mixed.reshape((heads, count, head_dim))?.transpose(0, 1)?.reshape((count, heads * head_dim))?)
    }

    /// What is added to the scores of `len` keys for `count` tokens from `start` on, `(heads, count, len)`.
    fn biases(&self, attention: &Attention, start: usize, count: usize, len: usize) -> Result<Tensor> {
        let mut biases = vec![0.0; attention.heads * count * len];
        for (row, biases) in biases.chunks_mut(len).enumerate() {
            attention.bias.of(row / count, start + row % count).add(biases, 0);
        }
        Ok(Tensor::from_vec(biases, (attention.heads, count, len), &self.device)?.to_dtype(self.dtype)?)
    }

    /// Zero where the token at `start + row` sees the position, minus infinity elsewhere.
    fn mask(&self, sight: Sight, start: usize, count: usize, len: usize) -> Result<Tensor> {
        let row = |token| (0..len).map(move |position| if sight.of(token, len).contains(&position) { 0.0 } else { f32::NEG_INFINITY });
        let mask: Vec<f32> = (start..start + count).flat_map(row).collect();
        Ok(Tensor::from_vec(mask, (count, len), &self.device)?)
    }

    /// `x` in the type of activations.
    // HF: f16 overflows to infinity there; T5 and BART cut infinities off after each part of a layer, and T5 has its largest product
    // in f32. Here f16 ends at its largest number everywhere.
    fn narrow(&self, x: Tensor) -> Result<Tensor> {
        let most = f16::MAX.to_f64();
        Ok(if self.dtype == DType::F16 { x.clamp(-most, most)? } else { x }.to_dtype(self.dtype)?)
    }

    /// `x * factor`, multiplied in f32 and rounded once, as the reference multiplies by a number.
    fn times(&self, x: &Tensor, factor: f32) -> Result<Tensor> {
        self.narrow(x.to_dtype(DType::F32)?.affine(f64::from(factor), 0.0)?)
    }

    /// `x` in f32, divided by what the norm divides by.
    fn normalise(&self, norm: &Norm<Tensor>, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(DType::F32)?;
        let x = match norm.kind {
            NormKind::Rms | NormKind::RmsOnce => x,
            NormKind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        Ok(x.broadcast_div(&variance.affine(1.0, f64::from(norm.eps))?.sqrt()?)?)
    }

    /// A normalised `x` with the norm's weights.
    fn weigh(&self, norm: &Norm<Tensor>, x: Tensor) -> Result<Tensor> {
        // HF: llama rounds before it multiplies by the weights, gemma, olmo2 and layer norms after.
        let x = match norm.kind {
            NormKind::Rms => x.to_dtype(self.dtype)?.to_dtype(DType::F32)?,
            NormKind::RmsOnce | NormKind::Layer => x,
        };
        let x = x.broadcast_mul(&norm.weight)?;
        let x = match &norm.bias {
            Some(bias) => x.broadcast_add(bias)?,
            None => x,
        };
        Ok(x.to_dtype(self.dtype)?)
    }

    fn function(&self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(DType::F32)?;
        let y = match activation {
            Activation::Silu => x.silu(),
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
            Activation::Relu => x.relu(),
        }?;
        Ok(y.to_dtype(self.dtype)?)
    }

    /// `activation(gate) * up`, where each token of `x` is `[gate | up]`.
    fn gate(&self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        let width = x.dim(1)? / 2;
        let gate = self.function(activation, &x.narrow(1, 0, width)?)?;
        self.narrow((gate * x.narrow(1, width, width)?)?)
    }
}

impl Ops for CandleOps {
    type Act = Tensor;
    type Weight = Weight;
    /// In f32, so that a norm may round its product once.
    type Vector = Tensor;
    type Angles = Angles;
    type Store = Tensors;

    fn pass<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        turn(&self.device, work)
    }

    fn weight(&self, parts: &[Matrix<'_>], bias: Option<&[f32]>, done: &dyn Fn(&[u8])) -> Result<Weight> {
        let part = |part: &Matrix<'_>| -> Result<Tensor> {
            let shape = if part.transposed { [part.inputs, part.outputs] } else { [part.outputs, part.inputs] };
            let matrix = Tensor::from_raw_buffer(part.bytes, part.dtype, &shape, &self.device)?;
            let matrix = if part.transposed { matrix.t()?.contiguous()? } else { matrix };
            done(part.bytes);
            Ok(matrix.to_dtype(self.dtype)?.to_dtype(self.product)?)
        };
        let matrix = Tensor::cat(&parts.iter().map(part).collect::<Result<Vec<_>>>()?, 0)?;
        let bias = match bias {
            Some(bias) => Some(Tensor::new(bias, &self.device)?.to_dtype(self.dtype)?.to_dtype(self.product)?),
            None => None,
        };
        Ok(Weight { matrix, bias })
    }

    fn weight_bytes(&self, weight: &Weight) -> u64 {
        let elements = weight.matrix.elem_count() + weight.bias.as_ref().map_or(0, Tensor::elem_count);
        elements as u64 * self.product.size_in_bytes() as u64
    }

    fn vector(&self, values: &[f32]) -> Result<Tensor> {
        Ok(Tensor::new(values, &self.device)?)
    }

    fn store(&self, shape: StoreShape, _: Room) -> Result<Tensors> {
        Ok(Tensors { layers: vec![None; shape.layers], len: 0 })
    }

    fn embed(&self, table: &Weight, ids: &[u32]) -> Result<Tensor> {
        Ok(table.matrix.index_select(&Tensor::new(ids, &self.device)?, 0)?.to_dtype(self.dtype)?)
    }

    fn linear(&self, norm: Option<&Norm<Tensor>>, weight: &Weight, x: &Tensor) -> Result<Tensor> {
        let normed = norm.map(|norm| self.norm(norm, x)).transpose()?;
        let y = normed.as_ref().unwrap_or(x).to_dtype(self.product)?.matmul(&weight.matrix.t()?)?;
        let y = match &weight.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        };
        self.narrow(y)
    }

    fn norm(&self, norm: &Norm<Tensor>, x: &Tensor) -> Result<Tensor> {
        self.weigh(norm, self.normalise(norm, x)?)
    }

    fn norm_part(&self, norm: &Norm<Tensor>, x: Tensor, first: usize, group: usize) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let len = norm.weight.elem_count();
        let part = x.narrow(1, first, len)?.reshape((tokens, len / group, group))?;
        let part = self.weigh(norm, self.normalise(norm, &part)?.reshape((tokens, len))?)?;
        let [before, after] = [(0, first), (first + len, width - first - len)].map(|(start, len)| x.narrow(1, start, len));
        let parts: Vec<Tensor> = [before?, part, after?].into_iter().filter(|part| part.elem_count() > 0).collect();
        Ok(Tensor::cat(&parts, 1)?)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.narrow((x + y)?)
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        self.narrow(x.affine(f64::from(factor), 0.0)?)
    }

    fn activate(&self, activation: Activation, x: Tensor) -> Result<Tensor> {
        self.function(activation, &x)
    }

    fn gated(&self, norm: Option<&Norm<Tensor>>, [gate_up, down]: [&Weight; 2], activation: Activation, x: &Tensor) -> Result<Tensor> {
        self.linear(None, down, &self.gate(activation, &self.linear(norm, gate_up, x)?)?)
    }

    fn route(&self, logits: &Tensor, top: usize, renormalise: bool) -> Result<Vec<Picks>> {
        let shares = softmax_last_dim(&logits.to_dtype(DType::F32)?)?;
        Ok(pick(&shares.flatten_all()?.to_vec1()?, logits.dim(1)?, top, renormalise))
    }

    fn mix(&self, count: usize, parts: &[(Picks, Tensor)]) -> Result<Tensor> {
        let width = parts.first().map_or(Ok(0), |(_, x)| x.dim(1))?;
        let mut y = Tensor::zeros((count, width), self.dtype, &self.device)?;
        for (picks, x) in parts {
            let tokens: Vec<u32> = picks.tokens.iter().map(|&token| token as u32).collect();
            let shares = Tensor::from_slice(&picks.shares, (tokens.len(), 1), &self.device)?;
            let x = x.to_dtype(DType::F32)?.broadcast_mul(&shares)?.to_dtype(self.dtype)?;
            y = y.index_add(&Tensor::new(tokens, &self.device)?, &x, 0)?;
        }
        Ok(y)
    }

    fn angles(&self, rows: &[(&Rope, Range<usize>)]) -> Result<Angles> {
        let pairs = rows.first().map_or(0, |(rope, _)| rope.inv_freq.len());
        let table = |function: fn(f64) -> f64| -> Result<Tensor> {
            let mut values = Vec::new();
            for (rope, positions) in rows {
                let turn = |position: usize| rope.inv_freq.iter().map(move |freq| f64::from(position as f32 * freq));
                values.extend(positions.clone().flat_map(turn).map(|angle| function(angle) as f32 * rope.scale));
            }
            Ok(Tensor::from_vec(values, ((), pairs), &self.device)?.to_dtype(self.dtype)?)
        };
        Ok(Angles { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    fn attend(
        &self,
        attention: &Attention,
        layer: usize,
        qkv: Tensor,
        angles: Option<&Angles>,
        rows: &mut [Span<&mut Tensors>],
    ) -> Result<Tensor> {
        let Attention { heads, kv_heads, head_dim, .. } = *attention;
        let part = |first: usize, heads: usize| -> Result<Tensor> {
            Ok(qkv.narrow(1, first * head_dim, heads * head_dim)?.reshape(((), heads, head_dim))?)
        };
        let mut queries = part(0, heads)?;
        let mut keys = part(heads, kv_heads)?;
        let values = part(heads + kv_heads, kv_heads)?;
        if let Some(angles) = angles {
            queries = angles.rotate(&queries)?;
            keys = angles.rotate(&keys)?;
        }
        let mut mixed = Vec::with_capacity(rows.len());
        for row in rows {
            let own = |x: &Tensor| x.narrow(0, row.first, row.count)?.transpose(0, 1)?.contiguous();
            let (queries, keys, values) = (own(&queries)?, own(&keys)?, own(&values)?);
            let start = row.store.len;
            let [keys, values] = row.store.append(layer, [keys, values])?;
            mixed.push(self.attend_row(attention, start, &queries, keys, values)?);
        }
        Ok(Tensor::cat(&mixed, 0)?)
    }

    fn fill(&self, attention: &Attention, layer: usize, kv: &Tensor, rows: &mut [Span<&mut Tensors>]) -> Result<()> {
        for row in rows {
            let both = heads(kv, row, attention.head_dim)?;
            let part = |first| both.narrow(0, first, attention.kv_heads)?.contiguous();
            row.store.append(layer, [part(0)?, part(attention.kv_heads)?])?;
        }
        Ok(())
    }

    fn cross(&self, attention: &Attention, layer: usize, queries: &Tensor, rows: &[Span<&Tensors>]) -> Result<Tensor> {
        let mut mixed = Vec::with_capacity(rows.len());
        for row in rows.iter().filter(|row| row.count > 0) {
            let [keys, values] = row.store.layer(layer)?;
            mixed.push(self.attend_row(attention, 0, &heads(queries, row, attention.head_dim)?, keys, values)?);
        }
        // Of no queries, none.
        if mixed.is_empty() { Ok(queries.clone()) } else { Ok(Tensor::cat(&mixed, 0)?) }
    }

    fn select(&self, x: &Tensor, indices: &[usize]) -> Result<Tensor> {
        let indices: Vec<u32> = indices.iter().map(|&index| index as u32).collect();
        Ok(x.index_select(&Tensor::new(indices, &self.device)?, 0)?)
    }

    fn values(&self, x: Tensor) -> Result<Values> {
        Ok(Values::Device(x))
    }

    fn logits(&self, head: &Weight, x: &Tensor, softcap: Option<f32>) -> Result<Forward> {
        let logits = self.linear(None, head, x)?;
        let logits = match softcap {
            Some(cap) => self.times(&self.times(&logits, 1.0 / cap)?.tanh()?, cap)?,
            None => logits,
        };
        Ok(Values::Device(logits).into())
    }
}

impl Angles {
    /// Turns the first dimensions of each head of `(tokens, heads, head_dim)`; the rest, if any, stay.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (turned, head_dim) = (2 * self.cos.dim(1)?, x.dim(2)?);
        let rotate = |x: Tensor| rope_thd(&x.unsqueeze(0)?, &self.cos, &self.sin)?.squeeze(0);
        if turned == head_dim {
            return Ok(rotate(x.clone())?);
        }
        let rest = x.narrow(2, turned, head_dim - turned)?;
        Ok(Tensor::cat(&[rotate(x.narrow(2, 0, turned)?.contiguous()?)?, rest], 2)?)
    }
}

/// The heads of a row's tokens, `(heads, count, head_dim)`.
fn heads<S>(x: &Tensor, row: &Span<S>, head_dim: usize) -> Result<Tensor> {
    Ok(x.narrow(0, row.first, row.count)?.reshape((row.count, (), head_dim))?.transpose(0, 1)?.contiguous()?)
}

impl Tensors {
    /// The keys and values of a layer that was filled.
    fn layer(&self, layer: usize) -> Result<&[Tensor; 2]> {
        self.layers.get(layer).and_then(Option::as_ref).ok_or_else(|| missing(layer))
    }

    /// The keys and values of a layer, followed by new ones.
    fn append(&mut self, layer: usize, new: [Tensor; 2]) -> Result<&[Tensor; 2]> {
        let slot = self.layers.get_mut(layer).ok_or_else(|| missing(layer))?;
        // What lies behind the length was truncated, or left by a pass that failed.
        let joined = match slot.as_ref().filter(|_| self.len > 0) {
            Some([keys, values]) => {
                let join = |held: &Tensor, new: &Tensor| Tensor::cat(&[&held.narrow(1, 0, self.len)?.contiguous()?, new], 1);
                [join(keys, &new[0])?, join(values, &new[1])?]
            }
            None => new,
        };
        Ok(slot.insert(joined))
    }
}

fn missing(layer: usize) -> Error {
    Error::Unsupported(format!("a cache without layer {layer}"))
}

impl Store for Tensors {
    fn len(&self) -> usize {
        self.len
    }

    fn grow(&mut self, count: usize) {
        self.len += count;
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.len = len;
        Ok(())
    }

    // Tensors have the room that they need, whatever is reserved.
    fn furnish(&mut self, _: Room) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        device::tested,
        kernels::{Alibi, Relative},
    };

    fn ops() -> CandleOps {
        CandleOps::new(tested().0, DType::F32)
    }

    fn act(values: &[f32], width: usize) -> Tensor {
        Tensor::from_slice(values, (values.len() / width, width), &tested().0).unwrap()
    }

    fn values(x: Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[track_caller]
    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} is not {expected:?}");
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn parts_are_stacked_and_turned() {
        let (plain, turned) = (bytes(&[1.0, 2.0]), bytes(&[3.0, 5.0, 4.0, 6.0]));
        let matrix = |bytes, outputs, transposed| Matrix { bytes, dtype: DType::F32, outputs, inputs: 2, transposed };
        let weight = ops().weight(&[matrix(&plain, 1, false), matrix(&turned, 2, true)], Some(&[0.5, 0.0, -1.0]), &|_| ()).unwrap();
        // Rows are [1 2], [3 4] and [5 6].
        assert_eq!(values(ops().linear(None, &weight, &act(&[1.0, 10.0], 2)).unwrap()), [21.5, 43.0, 64.0]);
        assert_eq!(values(ops().embed(&weight, &[2, 0]).unwrap()), [5.0, 6.0, 1.0, 2.0]);
        assert_eq!(ops().weight_bytes(&weight), 36);
    }

    #[test]
    fn norms() {
        let norm = |kind, bias: Option<&[f32]>| Norm {
            kind,
            weight: ops().vector(&[1.0, 2.0]).unwrap(),
            bias: bias.map(|bias| ops().vector(bias).unwrap()),
            eps: 0.5,
        };
        let x = act(&[1.0, 3.0, -2.0, 2.0], 2);
        close(&values(ops().norm(&norm(NormKind::Rms, None), &x).unwrap()), &[0.4264014, 2.5584085, -0.942809, 1.885618]);
        let layer = values(ops().norm(&norm(NormKind::Layer, Some(&[0.25, -1.0])), &x).unwrap());
        close(&layer, &[-0.5664966, 0.6329932, -0.692809, 0.885618]);
    }

    #[test]
    fn norms_of_parts() {
        let norm = Norm { kind: NormKind::RmsOnce, weight: ops().vector(&[1.0, 2.0, 3.0, 4.0]).unwrap(), bias: None, eps: 0.5 };
        let x = act(&[9.0, 1.0, 3.0, -2.0, 2.0, 7.0], 6);
        let found = values(ops().norm_part(&norm, x.clone(), 1, 2).unwrap());
        close(&found, &[9.0, 0.4264014, 2.5584085, -2.828_427, 3.771236, 7.0]);
        // The four together: a root of 4.5 + 0.5.
        let found = values(ops().norm_part(&norm, x, 1, 4).unwrap());
        close(&found, &[9.0, 0.4472136, 2.6832816, -2.6832816, 3.5777088, 7.0]);
    }

    #[test]
    fn experts_are_chosen_and_mixed() {
        let logits = act(&[0.0, 2.0f32.ln(), 5.0f32.ln(), 0.0, 0.0, -9.0], 3);
        let picks = ops().route(&logits, 2, false).unwrap();
        assert_eq!(picks.iter().map(|picks| picks.tokens.clone()).collect::<Vec<_>>(), [vec![1], vec![0, 1], vec![0]]);
        close(&picks[1].shares, &[0.25, 0.4999692]);
        close(&ops().route(&logits, 2, true).unwrap()[1].shares, &[2.0 / 7.0, 0.5]);
        let part = |tokens: &[usize], shares: &[f32], x: &[f32]| (Picks { tokens: tokens.into(), shares: shares.into() }, act(x, 2));
        let parts = [part(&[0, 2], &[0.5, 2.0], &[2.0, 4.0, 1.0, -1.0]), part(&[2], &[1.0], &[10.0, 20.0])];
        assert_eq!(values(ops().mix(3, &parts).unwrap()), [1.0, 2.0, 0.0, 0.0, 12.0, 18.0]);
    }

    #[test]
    fn activations() {
        let of = |activation| values(ops().activate(activation, act(&[-1.0, 0.5, 2.0], 3)).unwrap());
        close(&of(Activation::Silu), &[-0.26894143, 0.31122968, 1.761594]);
        close(&of(Activation::Gelu), &[-0.15865525, 0.34573123, 1.9544997]);
        close(&of(Activation::GeluTanh), &[-0.158808, 0.345714, 1.9545977]);
        close(&of(Activation::Relu), &[0.0, 0.5, 2.0]);
        close(&values(ops().gate(Activation::Silu, &act(&[-1.0, 0.5, 3.0, 4.0], 4)).unwrap()), &[-0.8068243, 1.2449187]);
    }

    #[test]
    fn f16_ends_at_its_largest_number() {
        let half = CandleOps::new(tested().0, DType::F16);
        let one = bytes(&[300.0, -300.0]);
        let weight =
            half.weight(&[Matrix { bytes: &one, dtype: DType::F32, outputs: 2, inputs: 1, transposed: false }], None, &|_| ()).unwrap();
        let x = act(&[300.0], 1).to_dtype(DType::F16).unwrap();
        let y = half.linear(None, &weight, &x).unwrap();
        let most = [f16::MAX, f16::MIN];
        let of = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f16>().unwrap();
        assert_eq!(of(y.clone()), most);
        assert_eq!(of(half.add(y.clone(), &y).unwrap()), most);
        assert_eq!(of(half.scale(y.clone(), 2.0).unwrap()), most);
        assert_eq!(of(half.gate(Activation::Relu, &Tensor::cat(&[&y, &y], 1).unwrap()).unwrap()), [f16::MAX, f16::ZERO]);
    }

    #[test]
    fn logits_are_capped() {
        let head = bytes(&[1.0, -3.0]);
        let head = Matrix { bytes: &head, dtype: DType::F32, outputs: 2, inputs: 1, transposed: false };
        let head = ops().weight(&[head], None, &|_| ()).unwrap();
        let logits = |cap| ops().logits(&head, &act(&[2.0], 1), cap).unwrap().logits.into_host().unwrap();
        close(&logits(None), &[2.0, -6.0]);
        close(&logits(Some(4.0)), &[1.8484687, -3.6205935]);
    }

    /// Attention number by number.
    fn plain(attention: &Attention, rope: &Rope, qkv: &[Vec<f32>]) -> Vec<f32> {
        let &Attention { heads, kv_heads, head_dim, scale, softcap, sight, .. } = attention;
        let head = |position: usize, index: usize| {
            let mut x = qkv[position][index * head_dim..][..head_dim].to_vec();
            for (pair, freq) in rope.inv_freq.iter().enumerate().filter(|_| index < heads + kv_heads) {
                let (sin, cos) = (position as f32 * freq).sin_cos();
                let (a, b) = (x[pair], x[pair + rope.inv_freq.len()]);
                x[pair] = (a * cos - b * sin) * rope.scale;
                x[pair + rope.inv_freq.len()] = (b * cos + a * sin) * rope.scale;
            }
            x
        };
        let mut mixed = Vec::new();
        for token in 0..qkv.len() {
            for index in 0..heads {
                let (query, group) = (head(token, index), index / (heads / kv_heads));
                let seen = sight.of(token, qkv.len());
                let score = |position| {
                    let key = head(position, heads + group);
                    let score = query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * scale;
                    let mut bias = [0.0];
                    attention.bias.of(index, token).add(&mut bias, position);
                    (bias[0] + softcap.map_or(score, |cap| cap * (score / cap).tanh())).exp()
                };
                let weights: Vec<f32> = seen.clone().map(score).collect();
                let total: f32 = weights.iter().sum();
                mixed.extend((0..head_dim).map(|dim| {
                    let value = |position| head(position, heads + kv_heads + group)[dim];
                    seen.clone().zip(&weights).map(|(position, weight)| weight / total * value(position)).sum::<f32>()
                }));
            }
        }
        mixed
    }

    #[test]
    fn attention_is_what_it_is_number_by_number() {
        let base = Attention { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.7, softcap: None, sight: Sight::Causal, bias: Bias::None };
        let whole = Rope { inv_freq: vec![1.0, 0.3, 0.1], scale: 1.0 };
        let partial = Rope { inv_freq: vec![1.0, 0.2], scale: 1.25 };
        let (tokens, width) = (7, 48);
        let number = |i: usize| ((i * i * 37 + i * 11) % 101) as f32 / 50.0 - 1.0;
        let qkv: Vec<Vec<f32>> = (0..tokens).map(|token| (0..width).map(|i| number(token * width + i)).collect()).collect();
        for (attention, rope) in [
            (base.clone(), &whole),
            (base.clone(), &partial),
            (Attention { softcap: Some(0.5), ..base.clone() }, &whole),
            (Attention { sight: Sight::Window(3), ..base.clone() }, &whole),
            (
                Attention {
                    bias: Bias::Alibi([0.5, 0.1, 0.7, 0.2].map(|slope| Alibi { slope, scale: 0.8, coarse: true }).into()),
                    ..base.clone()
                },
                &whole,
            ),
            (
                Attention {
                    bias: Bias::Relative(Relative::new(4, 3, |head, distance| (head as isize - distance) as f32 / 3.0).into()),
                    ..base.clone()
                },
                &whole,
            ),
            (Attention { sight: Sight::Window(1), kv_heads: 4, heads: 4, head_dim: 4, ..base.clone() }, &partial),
        ] {
            let expected = plain(&attention, rope, &qkv);
            for chunks in [vec![7], vec![1; 7], vec![4, 1, 2]] {
                let shape = StoreShape { layers: 2, kv_heads: attention.kv_heads, head_dim: attention.head_dim };
                let mut store = ops().store(shape, Room::Grow).unwrap();
                let (mut found, mut first) = (Vec::new(), 0);
                for count in chunks {
                    let angles = ops().angles(&[(rope, first..first + count)]).unwrap();
                    let x = act(&qkv[first..first + count].concat(), width);
                    let mut rows = [Span { first: 0, count, store: &mut store }];
                    found.extend(values(ops().attend(&attention, 1, x, Some(&angles), &mut rows).unwrap()));
                    store.grow(count);
                    first += count;
                }
                close(&found, &expected);
            }
        }
    }
}
