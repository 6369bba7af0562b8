//! The random permutations of torch's CPU generator, which reference watermarks are drawn with.

/// MT19937 (<https://doi.org/10.1145/272991.272995>), seeded as torch seeds it: with the lower half of the seed.
pub(super) struct Twister {
    state: [u32; SIZE],
    next: usize,
}

const SIZE: usize = 624;
const SHIFT: usize = 397;

impl Twister {
    pub(super) fn new(seed: u64) -> Self {
        let mut state = [seed as u32; SIZE];
        for at in 1..SIZE {
            let last = state[at - 1];
            state[at] = (last ^ (last >> 30)).wrapping_mul(0x6c07_8965).wrapping_add(at as u32);
        }
        Self { state, next: SIZE }
    }

    /// The first `count` entries of a permutation of `0..len`, as `torch.randperm` draws it: an entry is final once it was drawn.
    pub(super) fn permutation(mut self, len: usize, count: usize) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..len as u32).collect();
        for at in 0..count.min(len.saturating_sub(1)) {
            let other = at + self.below(len - at);
            ids.swap(at, other);
        }
        ids.truncate(count);
        ids
    }

    /// Whether `id` is among these, in no memory: only its own place is followed.
    pub(super) fn draws(mut self, id: u32, len: usize, count: usize) -> bool {
        let mut place = id as usize;
        for at in 0..count.min(len.saturating_sub(1)) {
            let other = at + self.below(len - at);
            if place == other {
                return true;
            } else if place == at {
                place = other;
            }
        }
        place < count.min(len)
    }

    /// HF: torch takes the remainder, which is not quite uniform.
    fn below(&mut self, bound: usize) -> usize {
        self.word() as usize % bound
    }

    fn word(&mut self) -> u32 {
        if self.next == SIZE {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        for at in 0..SIZE {
            let mixed = (self.state[at] & 0x8000_0000) | (self.state[(at + 1) % SIZE] & 0x7fff_ffff);
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[at] = self.state[(at + SHIFT) % SIZE] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_are_those_of_torch() {
        // torch 2.15: torch.randperm(len, generator=torch.Generator().manual_seed(seed))
        assert_eq!(Twister::new(15_485_863).permutation(10, 10), [8, 5, 7, 0, 2, 6, 9, 1, 4, 3]);
        let long = [450_552, 996_343, 763_030, 525_888, 852_897, 241_199, 415_633, 701_064];
        assert_eq!(Twister::new(5).permutation(1_000_003, 8), long);
        let whole = Twister::new(u64::MAX - 1).permutation(50, 50);
        assert_eq!(whole[..8], [0, 46, 19, 33, 23, 29, 8, 4]);
        assert_eq!(whole[42..], [13, 30, 36, 17, 38, 2, 43, 1, 22, 18][2..]);
    }

    #[test]
    fn membership_is_that_of_the_list() {
        for (len, count) in [(50, 0), (50, 12), (50, 50), (1, 1), (1, 0), (7, 6)] {
            let list = Twister::new(9).permutation(len, count);
            for id in 0..len as u32 {
                assert_eq!(Twister::new(9).draws(id, len, count), list.contains(&id), "{id} of {count} in {len}");
            }
        }
    }
}
