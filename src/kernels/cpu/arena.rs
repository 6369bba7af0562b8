//! Memory of weights: few large mappings in huge pages, where a pass over all weights waits less for the translation of addresses.

use super::line::Line;
use memmap2::MmapMut;
use std::{
    io,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    slice,
    sync::{Arc, Mutex, PoisonError},
};

/// Bytes of a mapping, unless a weight needs more. Only what is written takes memory.
const MAPPING: usize = 256 << 20;
/// Bytes of a huge page on most systems.
pub(super) const HUGE: usize = 2 << 20;
/// Where weights begin: at pairs of cache lines, as they are fetched.
const ALIGN: usize = 128;

/// The mappings of a model's weights. Each goes with the last weight in it, the one in use not before the arena.
#[derive(Debug, Default)]
pub(super) struct Arena {
    open: Mutex<Option<Open>>,
}

/// The mapping that the next weight goes to.
#[derive(Debug)]
struct Open {
    mapping: Arc<Mapping>,
    /// Bytes from its start on that are given away.
    taken: usize,
}

#[derive(Debug)]
struct Mapping {
    /// Keeps the memory. Who has a part of it accesses it by pointers of its own.
    _map: MmapMut,
    start: *mut u8,
    len: usize,
}

// SAFETY: `start` points into the mapping, which belongs to no thread, and nothing is read or written through it here.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Arena {
    /// So many lines, all zero.
    pub(super) fn lines<L: Line>(&self, len: usize) -> io::Result<Lines<L>> {
        let bytes = len.checked_mul(size_of::<L>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (mapping, from) = match &*open {
            Some(Open { mapping, taken }) if mapping.len - taken >= bytes => (mapping.clone(), *taken),
            _ => (Arc::new(Mapping::new(bytes.max(MAPPING))?), 0),
        };
        // SAFETY: `from` is at most the length of the mapping.
        let first = unsafe { mapping.start.add(from) }.cast();
        let taken = (from + bytes).next_multiple_of(ALIGN).min(mapping.len);
        *open = Some(Open { mapping: mapping.clone(), taken });
        Ok(Lines { _mapping: mapping, first, len, of: PhantomData })
    }
}

impl Mapping {
    /// Of at least so many bytes, from the start of a huge page on.
    fn new(bytes: usize) -> io::Result<Self> {
        release();
        let len = bytes.checked_next_multiple_of(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut map = MmapMut::map_anon(len.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?)?;
        // Where a system has none, small ones do.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let skipped = map.as_ptr().align_offset(HUGE);
        let start = map.get_mut(skipped..).filter(|rest| rest.len() >= len).ok_or(io::ErrorKind::OutOfMemory)?.as_mut_ptr();
        Ok(Self { _map: map, start, len })
    }
}

/// Has the allocator give back what was freed: reading a tokenizer takes tens of megabytes, which would lie idle beside the weights.
fn release() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: nothing is asked of the caller; what is in use stays.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The lines of a weight, as a `Box` has them.
#[derive(Debug)]
pub(super) struct Lines<L> {
    _mapping: Arc<Mapping>,
    first: *mut L,
    len: usize,
    of: PhantomData<L>,
}

// SAFETY: it owns its lines, which no other value of this type has.
unsafe impl<L: Send> Send for Lines<L> {}
// SAFETY: as above; a shared one is only read.
unsafe impl<L: Sync> Sync for Lines<L> {}

impl<L: Line> Deref for Lines<L> {
    type Target = [L];

    fn deref(&self) -> &[L] {
        // SAFETY: inside the mapping, which lives as long; begins at a multiple of 128 bytes, more than lines are aligned to; a line is an
        // array of numbers, for which any bits will do, and the system has made all of them 0.
        unsafe { slice::from_raw_parts(self.first, self.len) }
    }
}

impl<L: Line> DerefMut for Lines<L> {
    fn deref_mut(&mut self) -> &mut [L] {
        // SAFETY: as above; exclusive as `self` is, for every part of a mapping is given away once.
        unsafe { slice::from_raw_parts_mut(self.first, self.len) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{
        super::line::{Bf16, F16, F32},
        *,
    };

    #[test]
    fn weights_lie_one_after_another_and_keep_what_they_hold() {
        let arena = Arena::default();
        let mut a = arena.lines::<F32>(3).unwrap();
        let mut b = arena.lines::<F16>(3).unwrap();
        let mut c = arena.lines::<Bf16>((MAPPING - 512) / 64).unwrap();
        let mut large = arena.lines::<F32>(MAPPING / 64 + 1).unwrap();
        assert!(a.iter().chain(large.iter()).all(|line| line.0 == [0.0; 16]) && b.iter().all(|line| line.0 == [0; 16]));
        a.fill(F32([1.0; 16]));
        b.fill(F16([2; 16]));
        c.fill(Bf16([3; 32]));
        large.fill(F32([4.0; 16]));
        let starts = [a.as_ptr() as usize, b.as_ptr() as usize, c.as_ptr() as usize];
        assert_eq!((starts[0] % HUGE, starts[1] - starts[0], starts[2] - starts[1]), (0, 256, 128));
        assert_eq!(large.as_ptr() as usize % HUGE, 0, "it has a mapping of its own");
        drop((b, arena));
        assert!(a.iter().all(|line| line.0 == [1.0; 16]) && c.iter().all(|line| line.0 == [3; 32]));
        assert!(large.iter().all(|line| line.0 == [4.0; 16]));
    }

    #[test]
    fn a_full_mapping_is_followed_by_another() {
        let arena = Arena::default();
        let whole = arena.lines::<F32>(MAPPING / 64).unwrap();
        let (none, next) = (arena.lines::<F32>(0).unwrap(), arena.lines::<F32>(1).unwrap());
        assert!(none.is_empty() && !whole.as_ptr_range().contains(&next.as_ptr()));
    }

    #[test]
    fn no_memory_is_an_error() {
        let arena = Arena::default();
        assert!(arena.lines::<F32>(usize::MAX).is_err());
        assert!(arena.lines::<F32>(usize::MAX / 128).is_err());
        assert!(arena.lines::<F16>(1).is_ok());
    }
}
