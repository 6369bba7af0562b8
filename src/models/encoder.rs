//! What reads the sources of an encoder-decoder model: all of a batch in one pass, whatever their lengths.

use super::{
    entry::{Entry, Row},
    layers::{Layer, Loader},
    spec::DecoderSpec,
};
use crate::{
    error::{Error, Result},
    kernels::{Norm, Ops, Span, StoreShape},
    model::{Context, Room},
};

/// The encoder of a model.
pub(crate) struct Encoder<O: Ops> {
    /// The decoder's where there is none.
    embedding: Option<O::Weight>,
    entry: Entry<O>,
    layers: Vec<Layer<O>>,
    norm: Option<Norm<O::Vector>>,
    vocab: usize,
    context: Context,
    shape: StoreShape,
}

impl<O: Ops> Encoder<O> {
    /// Loads what `spec` names; `table` is the name of the decoder's embeddings.
    pub fn load<'a>(loader: &mut Loader<'a, O>, spec: &'a DecoderSpec, table: &str) -> Result<Self> {
        let own = loader.table(spec.embedding, spec.aliases);
        let embedding = match !loader.has(own) || loader.same(own, table)? {
            true => None,
            false => Some(loader.matrix(own, spec.vocab, spec.hidden, None)?),
        };
        let decoder = loader.turn(spec);
        let (entry, context) = Entry::load(loader, spec)?;
        let mut layers = Vec::with_capacity(spec.attention.len());
        for (index, attention) in spec.attention.iter().enumerate() {
            layers.push(loader.layer(index, attention, None)?);
            loader.report()?;
        }
        let norm = spec.final_norm.map(|name| loader.norm(name)).transpose()?;
        loader.turn(decoder);
        // One layer's keys and values are all that is ever needed.
        Ok(Self { embedding, entry, layers, norm, vocab: spec.vocab, context, shape: StoreShape { layers: 1, ..spec.shape() } })
    }

    /// The number of ids it knows.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// How long a source may be.
    pub fn context(&self) -> Context {
        self.context
    }

    /// Refuses a source that cannot be read.
    pub fn check(&self, source: &[u32]) -> Result<()> {
        if source.is_empty() {
            return Err(Error::Prompt("a row without a source, which an encoder-decoder model needs".into()));
        }
        if let Some(id) = source.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Error::Prompt(format!("id {id} is outside the encoder's vocabulary; ids below {} are accepted", self.vocab)));
        }
        match self.context {
            Context::Hard(most) if source.len() > most => Err(Error::Prompt(format!(
                "a source of {} tokens does not fit into the encoder's positions; at most {most} do",
                source.len()
            ))),
            _ => Ok(()),
        }
    }

    /// The states of all tokens of the sources, one source after another. `table` are the decoder's embeddings.
    pub fn read(&self, ops: &O, table: &O::Weight, sources: &[&[u32]]) -> Result<O::Act> {
        let rows: Vec<_> = sources.iter().map(|source| Row { positions: 0..source.len(), reach: source.len() }).collect();
        let (mut x, angles) = self.entry.embed(ops, self.embedding.as_ref().unwrap_or(table), &sources.concat(), &rows)?;
        let mut stores = sources.iter().map(|_| ops.store(self.shape, Room::Grow)).collect::<Result<Vec<_>>>()?;
        let mut spans = spans(sources, stores.iter_mut());
        for (index, layer) in self.layers.iter().enumerate() {
            let angles = self.entry.rotation(index).and_then(|rotation| angles.get(rotation));
            // Nothing is ever counted as written, so each layer's keys and values take the place of the last one's.
            let mixed = layer.attend(ops, 0, &x, angles, &mut spans)?;
            x = layer.finish(ops, index, x, &mixed, &[])?;
        }
        match &self.norm {
            Some(norm) => ops.norm(norm, &x),
            None => Ok(x),
        }
    }
}

/// The part of each source in a pass over all of them.
pub(crate) fn spans<S>(sources: &[&[u32]], stores: impl Iterator<Item = S>) -> Vec<Span<S>> {
    let mut end = 0;
    let span = |(source, store): (&&[u32], S)| {
        let first = end;
        end += source.len();
        Span { first, count: source.len(), store }
    };
    sources.iter().zip(stores).map(span).collect()
}
