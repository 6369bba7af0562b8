//! The one decoder: every decoder-only family, over whichever operations it is loaded with.

use super::{
    kv::Kv,
    layers::{Layer, Loader},
    rope::Rotation,
    spec::{DecoderSpec, Head, Positions, Projection},
    weights::Weights,
};
use crate::{
    error::{Error, Result},
    kernels::{Norm, Ops, Span, Store, StoreShape},
    model::{Cache, Context, Feed, Forward, Model, ModelInfo, Start, Values, Want, downcast},
    progress::OnProgress,
};
use std::{ops::Range, sync::Arc};

/// A decoder-only model.
pub(crate) struct Decoder<O: Ops> {
    ops: O,
    info: ModelInfo,
    shape: StoreShape,
    embedding: O::Weight,
    embedding_scale: Option<f32>,
    embedding_norm: Option<Norm<O::Vector>>,
    /// Between the widths of embeddings and layers, in and out.
    projection: Option<[O::Weight; 2]>,
    positions: Place<O>,
    layers: Vec<Layer<O>>,
    norm: Option<Norm<O::Vector>>,
    /// The embeddings where there is none.
    head: Option<O::Weight>,
    softcap: Option<f32>,
    /// Lengths past which all tokens of a row are rotated otherwise.
    crossings: Arc<[usize]>,
    /// The length past which tokens stay rotated as they were written.
    steady: usize,
}

/// How tokens are told where they stand.
enum Place<O: Ops> {
    /// With the number of its vectors that are not used.
    Table(O::Weight, usize),
    /// Rotations, and which of them a layer has.
    Rope(Vec<Rotation>, Vec<Option<usize>>),
    /// The attention's biases tell.
    Alibi,
}

impl<O: Ops> Decoder<O> {
    /// Loads a checkpoint, layer by layer. `info` says what `ops` are: device, type, page and bytes of a position.
    pub fn load(ops: O, info: ModelInfo, spec: &DecoderSpec, weights: &Weights, progress: Option<&OnProgress>) -> Result<Self> {
        let mut loader = Loader::new(&ops, spec, weights, progress);
        let (vocab, outer, hidden) = (spec.vocab, spec.outer(), spec.hidden);
        let Ends { table, head, bias } = ends(spec, weights)?;
        let embedding = loader.matrix(table, vocab, outer, bias.filter(|_| head.is_none()))?;
        let embedding_norm = spec.embedding_norm.map(|name| loader.norm(name)).transpose()?;
        let projection = match spec.projection {
            Some(Projection { inward, outward, .. }) => {
                Some([loader.matrix(inward, hidden, outer, None)?, loader.matrix(outward, outer, hidden, None)?])
            }
            None => None,
        };
        let (positions, context) = match &spec.positions {
            &Positions::Learned { name, skip, len } => {
                (Place::Table(loader.matrix(name, skip + len, hidden, None)?, skip), Context::Hard(len))
            }
            Positions::Rope { rotations, layers, trained } => (Place::Rope(rotations.clone(), layers.clone()), Context::Soft(*trained)),
            Positions::Alibi { trained } => (Place::Alibi, trained.map_or(Context::Unlimited, Context::Soft)),
        };
        loader.report()?;
        let mut layers = Vec::with_capacity(spec.attention.len());
        for (index, attention) in spec.attention.iter().enumerate() {
            layers.push(loader.layer(index, attention)?);
            loader.report()?;
        }
        let norm = spec.final_norm.map(|name| loader.norm(name)).transpose()?;
        let head = head.map(|name| loader.matrix(name, vocab, outer, bias)).transpose()?;
        loader.finish()?;

        let (layers_len, tied) = (spec.attention.len(), matches!(spec.head, Head::Tied(_)));
        let info = ModelInfo { context, layers: layers_len, tied, weight_bytes: loader.weight_bytes(), ..info };
        let shape = spec.shape();
        let (embedding_scale, softcap) = (spec.embedding_scale, spec.softcap);
        let rotations = match &positions {
            Place::Rope(rotations, _) => &rotations[..],
            Place::Table(..) | Place::Alibi => &[],
        };
        let crossings = rotations.iter().filter_map(Rotation::crossing).collect();
        let steady = rotations.iter().map(Rotation::steady).min().unwrap_or(usize::MAX);
        Ok(Self {
            ops,
            info,
            shape,
            embedding,
            embedding_scale,
            embedding_norm,
            projection,
            positions,
            layers,
            norm,
            head,
            softcap,
            crossings,
            steady,
        })
    }

    fn check(&self, tokens: &[u32], cache: &Kv<O::Store>) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::Prompt("a row without new tokens; at least one is needed".into()));
        }
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= self.info.vocab_size) {
            return Err(Error::Prompt(format!("id {id} is outside the vocabulary; ids below {} are accepted", self.info.vocab_size)));
        }
        if cache.shape != self.shape {
            return Err(Error::Unsupported("a cache of another model was fed to this one".into()));
        }
        let len = cache.store.len().saturating_add(tokens.len());
        match self.info.context {
            Context::Hard(most) if len > most => {
                Err(Error::Prompt(format!("{len} tokens do not fit into the model's positions; at most {most} do")))
            }
            _ => cache.check(tokens.len()),
        }
    }

    fn wanted(&self, want: Want<'_>, rows: usize) -> Result<()> {
        match want {
            Want::Each(counts) if counts.len() != rows => {
                Err(Error::Unsupported(format!("{} numbers of logits for {rows} rows; one for each is accepted", counts.len())))
            }
            Want::Layers(layers) => match layers.iter().find(|&&layer| layer >= self.layers.len()) {
                Some(layer) => {
                    let last = self.layers.len() - 1;
                    Err(Error::Unsupported(format!("the state after layer {layer}; layers 0 to {last} are accepted")))
                }
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// The tokens of a pass as vectors, and the angles of each rotation.
    fn embed(&self, pass: &Pass<'_>) -> Result<(O::Act, Vec<O::Angles>)> {
        let x = self.ops.embed(&self.embedding, &pass.ids)?;
        let x = match self.embedding_scale {
            Some(scale) => self.ops.scale(x, scale)?,
            None => x,
        };
        let x = match &self.projection {
            Some([inward, _]) => self.ops.linear(inward, &x)?,
            None => x,
        };
        let x = match &self.embedding_norm {
            Some(norm) => self.ops.norm(norm, &x)?,
            None => x,
        };
        match &self.positions {
            Place::Table(table, skip) => {
                let positions = pass.rows.iter().flat_map(|row| row.positions.clone());
                let places: Vec<u32> = positions.map(|position| (skip + position) as u32).collect();
                Ok((self.ops.add(x, &self.ops.embed(table, &places)?)?, Vec::new()))
            }
            Place::Rope(rotations, _) => {
                let angles = |rotation: &Rotation| {
                    let ropes: Vec<_> = pass.rows.iter().map(|row| rotation.at(row.reach)).collect();
                    let turns: Vec<_> = ropes.iter().zip(&pass.rows).map(|(rope, row)| (&**rope, row.positions.clone())).collect();
                    self.ops.angles(&turns)
                };
                Ok((x, rotations.iter().map(angles).collect::<Result<_>>()?))
            }
            Place::Alibi => Ok((x, Vec::new())),
        }
    }

    /// From the width of the layers to that of the head.
    fn outward(&self, x: O::Act) -> Result<O::Act> {
        match &self.projection {
            Some([_, outward]) => self.ops.linear(outward, &x),
            None => Ok(x),
        }
    }

    /// Which rotation a layer has.
    fn rotation(&self, layer: usize) -> Option<usize> {
        match &self.positions {
            Place::Rope(_, layers) => layers.get(layer).copied().flatten(),
            Place::Table(..) | Place::Alibi => None,
        }
    }

    /// Runs a pass and returns what is wanted of it.
    fn compute(&self, pass: &Pass<'_>, rows: &mut [Span<'_, O::Store>]) -> Result<Forward> {
        let ops = &self.ops;
        let (mut x, angles) = self.embed(pass)?;
        let mut early = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Want::Layers(layers) = pass.want {
                let places = layers.iter().enumerate().filter(|(_, wanted)| **wanted == index);
                early.extend(places.map(|(place, _)| (place, ops.select(&x, &pass.read))));
            }
            let angles = self.rotation(index).and_then(|rotation| angles.get(rotation));
            let mut mixed = layer.attend(ops, index, &x, angles, rows)?;
            if index + 1 == self.layers.len() {
                // The caches are complete: from here on only tokens that something is wanted of matter.
                if pass.want == Want::Nothing {
                    return Ok(Forward::default());
                }
                if pass.want != Want::Hidden && pass.read.len() < pass.ids.len() {
                    x = ops.select(&x, &pass.read)?;
                    mixed = ops.select(&mixed, &pass.read)?;
                }
            }
            x = layer.finish(ops, x, &mixed)?;
        }
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let x = match &self.norm {
            Some(norm) => ops.norm(norm, &x)?,
            None => x,
        };
        let x = self.outward(x)?;
        match pass.want {
            Want::Hidden => {
                let logits = ops.logits(head, &ops.select(&x, &pass.read)?, self.softcap)?;
                let x = if pass.new.len() < pass.ids.len() { ops.select(&x, &pass.new)? } else { x };
                Ok(Forward { logits, hidden: ops.values(x)? })
            }
            Want::Layers(_) => {
                let mut layers = Vec::with_capacity(early.len() + 1);
                early.sort_by_key(|(place, _)| *place);
                for (_, state) in early {
                    layers.push(ops.logits(head, &self.outward(state?)?, None)?.into_host()?);
                }
                layers.push(ops.logits(head, &x, self.softcap)?.into_host()?);
                let row = |row: usize| layers.iter().flat_map(move |logits| &logits[row * self.info.vocab_size..][..self.info.vocab_size]);
                Ok(Values::Host((0..pass.read.len()).flat_map(row).copied().collect()).into())
            }
            _ => Ok(ops.logits(head, &x, self.softcap)?.into()),
        }
    }
}

/// The tokens of a pass, all rows' one after another: the new ones and, in rows that are computed anew, those before them.
struct Pass<'a> {
    ids: Vec<u32>,
    rows: Vec<Row>,
    want: Want<'a>,
    /// The indices of the tokens whose logits are wanted.
    read: Vec<usize>,
    /// The indices of the new tokens.
    new: Vec<usize>,
}

/// Where the tokens of a row stand.
struct Row {
    positions: Range<usize>,
    /// The length that decides how they are rotated.
    reach: usize,
}

impl<O: Ops> Model for Decoder<O> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        let start = |row: &Start<'_>| {
            let store = self.ops.store(self.shape, row.room)?;
            Ok(Box::new(Kv::new(store, self.shape, row, self.crossings.clone(), self.steady)) as Box<dyn Cache>)
        };
        rows.iter().map(start).collect()
    }

    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> Result<Forward> {
        self.wanted(want, rows.len())?;
        // HF: a row whose angles change is computed anew from its first token, as Phi-3 does in the reference. Other families there
        // go on with keys that were rotated for short rows.
        let mut anew = Vec::with_capacity(rows.len());
        for Feed { tokens, cache } in rows.iter_mut() {
            let cache = downcast::<Kv<O::Store>>(&mut **cache)?;
            self.check(tokens, cache)?;
            anew.push(if cache.stale(tokens.len()) { Some(self.ops.store(self.shape, cache.room)?) } else { None });
        }
        let mut pass = Pass { ids: Vec::new(), rows: Vec::with_capacity(rows.len()), want, read: Vec::new(), new: Vec::new() };
        let mut spans = Vec::with_capacity(rows.len());
        for (index, (Feed { tokens, cache }, anew)) in rows.iter_mut().zip(&mut anew).enumerate() {
            let cache = downcast::<Kv<O::Store>>(&mut **cache)?;
            let (reach, count) = (cache.reach(tokens.len()), tokens.len());
            let (held, store) = match anew {
                Some(store) => (&cache.tokens[..], store),
                None => (&[][..], &mut cache.store),
            };
            let (first, len) = (pass.ids.len(), store.len());
            pass.ids.extend_from_slice(held);
            pass.ids.extend_from_slice(tokens);
            let end = pass.ids.len();
            pass.rows.push(Row { positions: len..len + end - first, reach });
            let read = match want {
                Want::Nothing => 0,
                Want::Last | Want::Hidden | Want::Layers(_) => 1,
                Want::All => count,
                Want::Each(counts) => counts[index].min(count),
            };
            pass.read.extend(end - read..end);
            pass.new.extend(end - count..end);
            spans.push(Span { first, count: end - first, store });
        }
        if pass.ids.is_empty() {
            return Ok(Forward::default());
        }

        let forward = self.ops.pass(|| self.compute(&pass, &mut spans))?;
        // Only now, so that a pass that fails leaves every cache as it was.
        for (Feed { tokens, cache }, anew) in rows.iter_mut().zip(anew) {
            let cache = downcast::<Kv<O::Store>>(&mut **cache)?;
            let anew = anew.map(|mut store| {
                store.grow(cache.tokens.len() + tokens.len());
                store
            });
            cache.grow(tokens, anew);
        }
        Ok(forward)
    }
}

/// The names of what stands before and after the layers.
struct Ends {
    table: &'static str,
    /// None if the table serves as one.
    head: Option<&'static str>,
    /// What the head's bias is named after.
    bias: Option<&'static str>,
}

fn ends(spec: &DecoderSpec, weights: &Weights) -> Result<Ends> {
    let (Head::Own(linear) | Head::Tied(linear)) = spec.head;
    // HF: GPT-NeoX's head is called `embed_out` in files, but `lm_head` by 5.x itself.
    let there = |name: &&str| weights.contains(&format!("{name}.weight"));
    let name = [linear.name, "lm_head"].into_iter().find(there).unwrap_or(linear.name);
    let (table, bias) = (spec.embedding, linear.bias.then_some(name));
    if let Head::Own(_) = spec.head {
        return Ok(Ends { table, head: Some(name), bias });
    }
    let [embedding, own] = [table, name].map(|name| format!("{name}.weight"));
    // HF: the file outvotes `tie_word_embeddings`. A tied head that it has all the same is used if it differs from the
    // embeddings, and serves as embeddings if those are missing.
    Ok(match (weights.contains(&embedding), weights.contains(&own)) {
        (true, true) if !weights.equal(&embedding, &own)? => Ends { table, head: Some(name), bias },
        (false, true) => Ends { table: name, head: None, bias },
        _ => Ends { table, head: None, bias },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::model::{Feed, Start, Want};
    use crate::models::{LoadOptions, load, tiny};
    use safetensors::Dtype;

    const HEAD: &str = "lm_head.weight";
    const TABLE: &str = "model.embed_tokens.weight";

    /// Logits of a tiny gemma2, whose head is tied, with some tensors changed.
    fn logits(change: impl FnOnce(&mut tiny::Tensors)) -> Vec<f32> {
        let config = tiny::config("gemma2");
        let folder = tiny::write(&config, Dtype::F32);
        let mut tensors = tiny::tensors(&config);
        change(&mut tensors);
        tiny::save(&folder.path().join("model.safetensors"), &tensors, Dtype::F32);
        let model = load(folder.path(), &LoadOptions::default()).unwrap();
        let mut cache = model.start(&[Start::default()]).unwrap().remove(0);
        model.forward(&mut [Feed { tokens: &[1, 2, 3], cache: &mut *cache }], Want::Last).unwrap().logits.into_host().unwrap()
    }

    #[test]
    fn the_file_outvotes_the_tie() {
        let tied = logits(|_| {});
        let copied = logits(|tensors| drop(tensors.insert(HEAD.into(), tensors[TABLE].clone())));
        assert_eq!(copied, tied);
        let moved = logits(|tensors| {
            let table = tensors.remove(TABLE).unwrap();
            tensors.insert(HEAD.into(), table);
        });
        assert_eq!(moved, tied);
        let negated = logits(|tensors| {
            let (shape, values) = tensors[TABLE].clone();
            tensors.insert(HEAD.into(), (shape, values.iter().map(|value| -value).collect()));
        });
        assert_eq!(negated, tied.iter().map(|logit| -logit).collect::<Vec<_>>());
    }
}
