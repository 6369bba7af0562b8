//! The cache of a decoder's row: its keys and values, how many positions they may take, and when they have to be written anew.

use crate::{
    error::{Error, Result},
    kernels::{Store, StoreShape},
    model::{Cache, Room, Start},
};
use std::sync::Arc;

/// Keys and values of one row.
#[derive(Clone)]
pub(crate) struct Kv<S> {
    pub store: S,
    /// What the layers look at of the row's source, in an encoder-decoder model: written once and shared by all forks.
    pub source: Option<Arc<S>>,
    /// The shape the store was made for, by which a cache of another model is told.
    pub shape: StoreShape,
    pub room: Room,
    /// The ids held, where the model has crossings: a row that crosses one is computed from the beginning.
    pub tokens: Vec<u32>,
    /// Lengths past which all keys of a row are rotated otherwise.
    crossings: Arc<[usize]>,
    /// Positions that the row is known to reach.
    ahead: usize,
    /// Past this length keys stay rotated as they were written, for the row's length then.
    steady: usize,
    /// The largest length for which keys held were rotated.
    written: usize,
}

impl<S: Store> Kv<S> {
    pub fn new(store: S, source: Option<Arc<S>>, shape: StoreShape, start: &Start<'_>, crossings: Arc<[usize]>, steady: usize) -> Self {
        Self { store, source, shape, room: start.room, tokens: Vec::new(), crossings, ahead: start.len, steady, written: 0 }
    }

    /// Refuses `count` further positions that were not reserved.
    pub fn check(&self, count: usize) -> Result<()> {
        let needed = self.store.len().saturating_add(count);
        match self.room {
            Room::Reserve(reserved) if needed > reserved => {
                Err(Error::config("max_cache_len", reserved, format!("the row needs {needed} positions; at least that many are accepted")))
            }
            _ => Ok(()),
        }
    }

    /// The length by which `count` further tokens are rotated: the row's with them, or what it is known to reach.
    pub fn reach(&self, count: usize) -> usize {
        self.ahead.max(self.store.len() + count)
    }

    /// Whether the keys held are rotated otherwise than `count` further tokens will be. A row crosses a length upwards by growing,
    /// and downwards when it goes on after a truncation.
    pub fn stale(&self, count: usize) -> bool {
        self.store.len() > 0 && self.crosses(self.reach(count))
    }

    /// Whether the keys held are rotated otherwise than those of a row of `len` tokens.
    fn crosses(&self, len: usize) -> bool {
        self.crossings.iter().any(|&crossing| (self.written > crossing) != (len > crossing))
    }

    /// Takes account of `tokens`, which every layer has now written: to the store, or with all that came before to `anew`.
    pub fn grow(&mut self, tokens: &[u32], anew: Option<S>) {
        let reach = self.reach(tokens.len());
        self.written = if anew.is_some() || self.store.len() == 0 { reach } else { self.written.max(reach) };
        match anew {
            Some(store) => self.store = store,
            None => self.store.grow(tokens.len()),
        }
        if !self.crossings.is_empty() {
            self.tokens.extend_from_slice(tokens);
        }
    }
}

impl<S: Store> Cache for Kv<S> {
    fn len(&self) -> usize {
        self.store.len()
    }

    fn fork(&self) -> Box<dyn Cache> {
        Box::new(self.clone())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        match self.len() {
            held if held < len => Err(Error::Unsupported(format!("a cache of {held} positions cannot be cut to {len}"))),
            _ => {
                self.ahead = self.ahead.min(len);
                self.tokens.truncate(len);
                self.store.truncate(len)
            }
        }
    }

    fn resume(&mut self, len: usize, start: &Start<'_>) -> Result<bool> {
        if self.crosses(start.len) || self.written.max(start.len) > self.steady {
            return Ok(false);
        }
        self.truncate(len)?;
        self.store.furnish(start.room)?;
        (self.room, self.ahead) = (start.room, start.len);
        Ok(true)
    }
}
