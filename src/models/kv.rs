//! The cache of a decoder's row: its keys and values, and how many positions they may take.

use crate::{
    error::{Error, Result},
    kernels::{Store, StoreShape},
    model::{Cache, Room},
};

/// Keys and values of one row.
#[derive(Clone)]
pub(crate) struct Kv<S> {
    pub store: S,
    /// The shape the store was made for, by which a cache of another model is told.
    pub shape: StoreShape,
    room: Room,
}

impl<S: Store> Kv<S> {
    pub fn new(store: S, shape: StoreShape, room: Room) -> Self {
        Self { store, shape, room }
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
            _ => self.store.truncate(len),
        }
    }
}
