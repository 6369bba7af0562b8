//! Memory of activations, keys and values, used again and again: fresh memory costs a page fault for every 4 kB. It begins at cache
//! lines, by which matrix units read and write.

use super::line::{Bf16, F32, LANES, Line};
use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

/// Has `work` use memory of this thread, so many lines, whatever is in them.
pub(super) fn local<R>(count: usize, work: impl FnOnce(&mut [F32]) -> R) -> R {
    // Several, as work may ask for more within itself.
    thread_local!(static SPARES: RefCell<Vec<Vec<F32>>> = const { RefCell::new(Vec::new()) });
    let mut own = SPARES.with_borrow_mut(Vec::pop).unwrap_or_default();
    own.resize(own.len().max(count), F32::ZERO);
    let result = work(&mut own[..count]);
    SPARES.with_borrow_mut(|spares| spares.push(own));
    result
}

/// The same memory as twice as many values of 16 bits.
pub(super) fn halves(values: &mut [f32]) -> &mut [u16] {
    // SAFETY: a value is two of 16 bits, any bits are a number, and the alignment is more than enough; exclusive as `values` is.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len() * 2) }
}

/// The values of lines.
pub(super) fn values(lines: &mut [F32]) -> &mut [f32] {
    // SAFETY: a line is 16 values and nothing else; exclusive as `lines` is.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LANES) }
}

/// The same memory as lines of bf16.
pub(super) fn brains(lines: &[F32]) -> &[Bf16] {
    // SAFETY: both are 64 bytes, begin at a multiple of that, and have no invalid values.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len()) }
}

/// Lines that are kept while nothing is generated: 32 MB.
const KEPT: usize = (32 << 20) / size_of::<F32>();

/// Memory that nobody uses at the moment.
#[derive(Debug)]
pub(crate) struct Scratch {
    spares: Mutex<Vec<Vec<F32>>>,
    /// Lines of all spares, at most.
    most: usize,
}

impl Scratch {
    /// For activations: within a pass all memory is kept.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { spares: Mutex::default(), most: usize::MAX })
    }

    /// For keys and values, which live as long as a generation.
    pub(crate) fn small() -> Arc<Self> {
        Arc::new(Self { spares: Mutex::default(), most: KEPT })
    }

    /// So many values, whatever they are.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let mut spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        let count = len.div_ceil(LANES);
        let fitting = spares.iter().enumerate().filter(|(_, spare)| spare.len() >= count).min_by_key(|(_, spare)| spare.len());
        let lines = match fitting.map(|(at, _)| at) {
            Some(at) => spares.swap_remove(at),
            None => {
                drop(spares);
                vec![F32([0.0; LANES]); count]
            }
        };
        Buffer { lines, len, home: self.clone() }
    }

    /// Gives back most of what a long pass has needed.
    pub(super) fn shrink(&self) {
        let mut spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        spares.sort_unstable_by_key(Vec::len);
        let mut total = 0;
        spares.retain(|spare| {
            total += spare.len();
            total <= KEPT
        });
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
    pub(crate) fn lines(&self) -> &[F32] {
        &self.lines
    }

    pub(crate) fn lines_mut(&mut self) -> &mut [F32] {
        &mut self.lines
    }

    /// The same memory as twice as many values of 16 bits.
    pub(super) fn halves(&self) -> &[u16] {
        // SAFETY: a line is 32 values of 16 bits, any bits are a number, and the alignment is more than enough.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), 2 * self.len) }
    }

    /// The same memory as twice as many values of 16 bits.
    pub(super) fn halves_mut(&mut self) -> &mut [u16] {
        halves(self)
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
        let mut spares = self.home.spares.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: usize = spares.iter().map(Vec::len).sum();
        if kept + self.lines.len() <= self.home.most {
            spares.push(std::mem::take(&mut self.lines));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again() {
        let scratch = Scratch::new();
        let (small, large) = (scratch.take(10), scratch.take(100_000));
        let places = (small.as_ptr(), large.as_ptr());
        assert_eq!(large[..], vec![0.0; 100_000]);
        drop((large, small));
        let (mut one, other) = (scratch.take(9), scratch.take(20));
        assert_eq!((one.as_ptr(), other.as_ptr()), places, "the smallest that fits");
        one.fill(3.0);
        assert_eq!((one.clone()[..].to_vec(), other.len()), (vec![3.0; 9], 20));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let count = |scratch: &Scratch| scratch.spares.lock().unwrap().len();
        let half = KEPT / 2 * LANES;
        let three = |scratch: &Arc<Scratch>| drop([half; 3].map(|len| scratch.take(len)));
        let (pass, small) = (Scratch::new(), Scratch::small());
        three(&pass);
        three(&small);
        assert_eq!((count(&pass), count(&small)), (3, 2));
        pass.shrink();
        assert_eq!(count(&pass), 2);
        drop([5; 3].map(|len| small.take(len)));
        assert_eq!(count(&small), 2, "no room for a third, however small");
    }
}
