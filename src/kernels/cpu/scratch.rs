//! Memory of activations, used again and again within a pass: fresh memory costs a page fault for every 4 kB.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

/// Values that a spare may have to be kept beyond its pass: those of a decoding step.
const KEPT: usize = 1 << 16;

/// Memory that nobody uses at the moment.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Mutex<Vec<Vec<f32>>>);

impl Scratch {
    /// So many values, whatever they are.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = spares.iter().enumerate().filter(|(_, spare)| spare.len() >= len).min_by_key(|(_, spare)| spare.len());
        let values = match fitting.map(|(at, _)| at) {
            Some(at) => spares.swap_remove(at),
            None => vec![0.0; len],
        };
        Buffer { values, len, home: self.clone() }
    }

    /// Gives back what a long pass has needed.
    pub(super) fn shrink(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|spare| spare.len() <= KEPT);
    }
}

/// Values, whose memory is kept for others.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// At least as many as are used.
    values: Vec<f32>,
    len: usize,
    home: Arc<Scratch>,
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut clone = self.home.take(self.len);
        clone.copy_from_slice(self);
        clone
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.0.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.values));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again() {
        let scratch = Arc::new(Scratch::default());
        let (small, large) = (scratch.take(10), scratch.take(KEPT + 1));
        let places = (small.as_ptr(), large.as_ptr());
        assert_eq!(large[..], vec![0.0; KEPT + 1]);
        drop((large, small));
        let (mut one, other) = (scratch.take(9), scratch.take(20));
        assert_eq!((one.as_ptr(), other.as_ptr()), places, "the smallest that fits");
        one.fill(3.0);
        assert_eq!((one.clone()[..].to_vec(), other.len()), (vec![3.0; 9], 20));
        drop((one, other));
        scratch.shrink();
        assert_eq!(scratch.0.lock().unwrap().len(), 2, "a step's stay");
    }
}
