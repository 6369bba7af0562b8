//! The one decoder: every family, over whichever operations it is loaded with; with an encoder where the family has one.

use super::{
    encoder::{self, Encoder},
    entry::{Entry, Row},
    kv::Kv,
    layers::{Layer, Loader},
    spec::{DecoderSpec, Head, Projection},
    weights::Weights,
};
use crate::{
    error::{Error, Result},
    kernels::{Norm, Ops, Span, Store, StoreShape},
    model::{Cache, Context, Feed, Forward, Model, ModelInfo, Room, Start, Values, Want, downcast},
    progress::OnProgress,
};
use std::sync::Arc;

/// A decoder, and what reads its sources if it has any.
pub(crate) struct Decoder<O: Ops> {
    ops: O,
    info: ModelInfo,
    shape: StoreShape,
    encoder: Option<Encoder<O>>,
    embedding: O::Weight,
    entry: Entry<O>,
    layers: Vec<Layer<O>>,
    norm: Option<Norm<O::Vector>>,
    /// From the width of the layers to that of the head.
    outward: Option<O::Weight>,
    head_scale: Option<f32>,
    /// The embeddings where there is none.
    head: Option<O::Weight>,
    softcap: Option<f32>,
    /// Lengths past which all tokens of a row are rotated otherwise.
    crossings: Arc<[usize]>,
    /// The length past which tokens stay rotated as they were written.
    steady: usize,
}

impl<O: Ops> Decoder<O> {
    /// Loads a checkpoint, layer by layer. `info` says what `ops` are: device, type, page and bytes of a position.
    pub fn load(ops: O, info: ModelInfo, spec: &DecoderSpec, weights: &Weights, progress: Option<&OnProgress>) -> Result<Self> {
        let mut loader = Loader::new(&ops, spec, weights, progress);
        let (vocab, outer, hidden) = (spec.vocab, spec.outer(), spec.hidden);
        let Ends { table, head, bias } = ends(spec, &loader, weights)?;
        let embedding = loader.matrix(table, vocab, outer, bias.as_deref().filter(|_| head.is_none()))?;
        let (entry, context) = Entry::load(&mut loader, spec)?;
        let outward = match spec.projection {
            Some(Projection { outward, .. }) => Some(loader.matrix(outward, outer, hidden, None)?),
            None => None,
        };
        loader.report()?;
        let encoder = match &spec.encoder {
            Some(encoder) => Some(Encoder::load(&mut loader, &encoder.stack, table)?),
            None => None,
        };
        let cross = spec.encoder.as_ref().map(|encoder| &encoder.cross);
        let mut layers = Vec::with_capacity(spec.attention.len());
        for (index, attention) in spec.attention.iter().enumerate() {
            layers.push(loader.layer(index, attention, cross)?);
            loader.report()?;
        }
        let norm = spec.final_norm.map(|name| loader.norm(name)).transpose()?;
        let head = head.map(|name| loader.matrix(name, vocab, outer, bias.as_deref())).transpose()?;
        loader.finish()?;

        let mut info = ModelInfo { context, tied: matches!(spec.head, Head::Tied(_)), weight_bytes: loader.weight_bytes(), ..info };
        match &encoder {
            Some(encoder) => {
                info.is_encoder_decoder = true;
                info.source_vocab_size = encoder.vocab();
                info.source_context = encoder.context();
                // A source takes what as many of the decoder's own positions take.
                info.source_bytes = info.position_bytes;
            }
            None => info.layers = spec.attention.len(),
        }
        let (crossings, steady) = (entry.crossings(), entry.steady());
        let (shape, head_scale, softcap) = (spec.shape(), spec.head_scale, spec.softcap);
        Ok(Self { ops, info, shape, encoder, embedding, entry, layers, norm, outward, head_scale, head, softcap, crossings, steady })
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

    /// What the layers look at of each row's source; none in a decoder-only model.
    fn read(&self, rows: &[Start<'_>]) -> Result<Vec<Option<Arc<O::Store>>>> {
        let Some(encoder) = &self.encoder else { return Ok(rows.iter().map(|_| None).collect()) };
        let sources: Vec<&[u32]> = rows.iter().map(|row| row.source).collect();
        sources.iter().try_for_each(|source| encoder.check(source))?;
        if sources.is_empty() {
            return Ok(Vec::new());
        }
        let mut stores = sources.iter().map(|_| self.ops.store(self.shape, Room::Grow)).collect::<Result<Vec<_>>>()?;
        self.ops.pass(|| {
            let states = encoder.read(&self.ops, &self.embedding, &sources)?;
            let mut spans = encoder::spans(&sources, stores.iter_mut());
            self.layers.iter().enumerate().try_for_each(|(index, layer)| layer.fill(&self.ops, index, &states, &mut spans))
        })?;
        let filled = stores.into_iter().zip(&sources).map(|(mut store, source)| {
            store.grow(source.len());
            Some(Arc::new(store))
        });
        Ok(filled.collect())
    }

    /// From the last layer's width to that of the head.
    fn outward(&self, x: O::Act) -> Result<O::Act> {
        match &self.outward {
            Some(outward) => self.ops.linear(None, outward, &x),
            None => Ok(x),
        }
    }

    /// The logits of states that the final norm has touched.
    fn logits(&self, x: O::Act) -> Result<Forward> {
        let x = match self.head_scale {
            Some(scale) => self.ops.scale(x, scale)?,
            None => x,
        };
        self.ops.logits(self.head.as_ref().unwrap_or(&self.embedding), &x, self.softcap)
    }

    /// Runs a pass and returns what is wanted of it.
    fn compute(&self, pass: &Pass<'_>, rows: &mut [Span<&mut O::Store>], mut sources: Vec<Span<&O::Store>>) -> Result<Forward> {
        let ops = &self.ops;
        let (mut x, angles) = self.entry.embed(ops, &self.embedding, &pass.ids, &pass.rows)?;
        let mut early = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Want::Layers(layers) = pass.want {
                let places = layers.iter().enumerate().filter(|(_, wanted)| **wanted == index);
                early.extend(places.map(|(place, _)| (place, ops.select(&x, &pass.read))));
            }
            let angles = self.entry.rotation(index).and_then(|rotation| angles.get(rotation));
            let mut mixed = layer.attend(ops, index, &x, angles, rows)?;
            if index + 1 == self.layers.len() {
                // The caches are complete: from here on only tokens that something is wanted of matter.
                if pass.read.is_empty() {
                    return Ok(Forward::default());
                }
                if pass.want != Want::Hidden && pass.read.len() < pass.ids.len() {
                    x = ops.select(&x, &pass.read)?;
                    mixed = ops.select(&mixed, &pass.read)?;
                    for source in &mut sources {
                        let place = |token| pass.read.partition_point(|&read| read < token);
                        let (first, end) = (place(source.first), place(source.first + source.count));
                        (source.first, source.count) = (first, end - first);
                    }
                }
            }
            x = layer.finish(ops, index, x, &mixed, &sources)?;
        }
        let x = match &self.norm {
            Some(norm) => ops.norm(norm, &x)?,
            None => x,
        };
        let x = self.outward(x)?;
        match pass.want {
            Want::Hidden => {
                let forward = self.logits(ops.select(&x, &pass.read)?)?;
                let x = if pass.new.len() < pass.ids.len() { ops.select(&x, &pass.new)? } else { x };
                Ok(Forward { hidden: ops.values(x)?, ..forward })
            }
            Want::Layers(_) => {
                let head = self.head.as_ref().unwrap_or(&self.embedding);
                let mut layers = Vec::with_capacity(early.len() + 1);
                early.sort_by_key(|(place, _)| *place);
                for (_, state) in early {
                    layers.push(ops.logits(head, &self.outward(state?)?, None)?.logits.into_host()?);
                }
                layers.push(self.logits(x)?.logits.into_host()?);
                let row = |row: usize| layers.iter().flat_map(move |logits| &logits[row * self.info.vocab_size..][..self.info.vocab_size]);
                Ok(Values::Host((0..pass.read.len()).flat_map(row).copied().collect()).into())
            }
            _ => self.logits(x),
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

impl<O: Ops> Model for Decoder<O> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        let start = |(row, source): (&Start<'_>, _)| {
            let store = self.ops.store(self.shape, row.room)?;
            Ok(Box::new(Kv::new(store, source, self.shape, row, self.crossings.clone(), self.steady)) as Box<dyn Cache>)
        };
        rows.iter().zip(self.read(rows)?).map(start).collect()
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
        let (mut spans, mut sources) = (Vec::with_capacity(rows.len()), Vec::new());
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
            sources.extend(cache.source.as_deref().map(|store| Span { first, count: end - first, store }));
        }
        if pass.ids.is_empty() {
            return Ok(Forward::default());
        }

        let forward = self.ops.pass(|| self.compute(&pass, &mut spans, sources))?;
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

    fn spread(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        self.ops.spread(count, work);
    }
}

/// What stands before and after the layers.
struct Ends {
    table: &'static str,
    /// None if the table serves as one.
    head: Option<&'static str>,
    /// Of the head.
    bias: Option<Vec<f32>>,
}

fn ends<O: Ops>(spec: &DecoderSpec, loader: &Loader<'_, O>, weights: &Weights) -> Result<Ends> {
    let (Head::Own(linear) | Head::Tied(linear)) = spec.head;
    // HF: GPT-NeoX's head is called `embed_out` in files, but `lm_head` by 5.x itself.
    let name = loader.table(linear.name, &["lm_head"]);
    let table = loader.table(spec.embedding, spec.aliases);
    let bias = match spec.logits_bias.filter(|bias| weights.contains(bias)) {
        Some(bias) => Some(weights.values(bias, &[1, spec.vocab])?),
        None if linear.bias => Some(weights.vector(&format!("{name}.bias"), spec.vocab)?),
        None => None,
    };
    if let Head::Own(_) = spec.head {
        return Ok(Ends { table, head: Some(name), bias });
    }
    // HF: the file outvotes `tie_word_embeddings`. A tied head that it has all the same is used if it differs from the
    // embeddings, and serves as embeddings if those are missing.
    Ok(match (loader.has(table), loader.has(name)) {
        (true, true) if !loader.same(table, name)? => Ends { table, head: Some(name), bias },
        (false, true) => Ends { table: name, head: None, bias },
        _ => Ends { table, head: None, bias },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::model::{Feed, Start, Want};
    use crate::models::{LoadOptions, families, fields::Fields, load, spec::Head, tiny};
    use safetensors::Dtype;

    const HEAD: &str = "lm_head.weight";
    const TABLE: &str = "model.embed_tokens.weight";

    /// Logits of a tiny gemma2, whose head is tied, with some tensors changed.
    fn logits(change: impl FnOnce(&mut tiny::Tensors)) -> Vec<f32> {
        logits_of("gemma2", change)
    }

    fn logits_of(family: &str, change: impl FnOnce(&mut tiny::Tensors)) -> Vec<f32> {
        let config = tiny::config(family);
        let folder = tiny::write(&config, Dtype::F32);
        let mut tensors = tiny::tensors(&config);
        change(&mut tensors);
        tiny::save(&folder.path().join("model.safetensors"), &tensors, Dtype::F32);
        let model = load(folder.path(), &LoadOptions::default()).unwrap();
        let source: &[u32] = if model.info().is_encoder_decoder { &[4, 5] } else { &[] };
        let mut cache = model.start(&[Start { source, ..Start::default() }]).unwrap().remove(0);
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

    #[test]
    fn every_family_reads_bare_names_old_buffers_and_a_copy_of_a_tied_head() {
        for family in tiny::FAMILIES {
            let spec = families::spec(&Fields::new(tiny::config(family).as_object().unwrap().clone())).unwrap();
            let bare = logits_of(family, |tensors| {
                if let Head::Tied(head) = spec.head {
                    let table = tensors[&format!("{}{}.weight", spec.base, spec.embedding)].clone();
                    tensors.insert(format!("{}.weight", head.name), table);
                }
                for part in ["self_attn.rotary_emb.inv_freq", "attention.rotary_emb.inv_freq", "attn.bias", "attention.masked_bias"] {
                    tensors.insert(format!("{}{}0.{part}", spec.base, spec.layer), (vec![1, 1, 2], vec![9.0; 2]));
                }
                let short = |name: &str| name.strip_prefix(spec.base).unwrap_or(name).to_owned();
                *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (short(&name), tensor)).collect();
            });
            assert_eq!(bare, logits_of(family, |_| {}), "{family}");
        }
    }
}
