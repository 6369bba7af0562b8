//! Memory of activations, used again and again within a pass: fresh memory costs a page fault for every 4 kB. It begins at cache lines,
//! by which matrix units read and write.

use super::line::{F32, LANES};
use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

/// Values that a spare may have to be kept beyond its pass: those of a decoding step.
const KEPT: usize = 1 << 16;

/// Memory that nobody uses at the moment.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Mutex<Vec<Vec<F32>>>);

impl Scratch {
    /// So many values, whatever they are.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = len.div_ceil(LANES);
        let fitting = spares.iter().enumerate().filter(|(_, spare)| spare.len() >= count).min_by_key(|(_, spare)| spare.len());
        let lines = match fitting.map(|(at, _)| at) {
            Some(at) => spares.swap_remove(at),
            None => vec![F32([0.0; LANES]); count],
        };
        Buffer { lines, len, home: self.clone() }
    }

    /// Gives back what a long pass has needed.
    pub(super) fn shrink(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|spare| spare.len() <= KEPT / LANES);
    }
}

/// Values, whose memory is kept for others.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// At least as many as are used.
    lines: Vec<F32>,
    len: usize,
    home: Arc<Scratch>,
}

impl Buffer {
    /// The same memory as twice as many values of 16 bits.
    pub(super) fn halves_mut(&mut self) -> &mut [u16] {
        // SAFETY: a line is 32 values of 16 bits, any bits are a number, and the alignment is more than enough; exclusive as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), 2 * self.len) }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: a line is 16 values and nothing else, so there are at least as many.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above; exclusive as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
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
        self.home.0.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.lines));
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
