//! What threads without work read ahead: the beginnings of their pieces of the product that follows.
//!
//! A step of decoding is reading weights, but while threads wait for each other, normalise or look at keys and values, nobody reads any.
//! Products follow each other in the same order in every pass, so each weight remembers which was next the last time.

use super::{isa::prefetch, target::Cut, threads::part};
use std::{
    cell::Cell,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// Bytes that a thread reads ahead at most: half of a small second-level cache.
pub(super) const MOST: usize = 256 << 10;

/// Panels that are read side by side, as by tiles.
const SIDE: usize = 4;

const LINE: usize = 64;

/// Where a product reads its weights. Nothing depends on it but time, so it may be out of date, and made of parts that do not belong
/// together.
#[derive(Debug, Default)]
pub(super) struct Stream {
    start: AtomicUsize,
    /// Bytes of a panel.
    panel: AtomicUsize,
    panels: AtomicUsize,
    pieces: AtomicUsize,
    /// Panels that stay together in a piece.
    step: AtomicUsize,
}

impl Stream {
    fn values(&self) -> [&AtomicUsize; 5] {
        [&self.start, &self.panel, &self.panels, &self.pieces, &self.step]
    }

    fn set(&self, values: [usize; 5]) {
        self.values().iter().zip(values).for_each(|(own, value)| own.store(value, Relaxed));
    }

    fn get(&self) -> [usize; 5] {
        self.values().map(|value| value.load(Relaxed))
    }

    /// What one of so many threads reads first: up to `MOST`, and not more than its range.
    fn beginning(&self, thread: usize, threads: usize) -> Beginning {
        let [start, panel, panels, pieces, step] = self.get();
        let range = part(pieces, 1, threads, thread);
        let piece = part(panels, step.max(1), pieces.max(1), range.start);
        let panel = panel.next_multiple_of(LINE);
        let bytes = MOST.min(range.len().saturating_mul(piece.len()).saturating_mul(panel));
        Beginning { start: start.wrapping_add(piece.start.wrapping_mul(panel)), panel, bytes }
    }
}

/// Some panels, one after another.
struct Beginning {
    start: usize,
    panel: usize,
    /// As many as are read of them.
    bytes: usize,
}

impl Beginning {
    /// The lines after the first so many bytes, some at a time, panels side by side.
    fn after(&self, asked: usize) -> impl Iterator<Item = [usize; SIDE]> {
        let &Self { start, panel, bytes } = self;
        let tile = SIDE.wrapping_mul(panel).max(1);
        let (mut from, mut at) = (start.wrapping_add(asked / tile * tile), asked % tile / SIDE);
        (asked..bytes).step_by(SIDE * LINE).map(move |_| {
            let lines = std::array::from_fn(|side| from.wrapping_add(side.wrapping_mul(panel)).wrapping_add(at));
            at += LINE;
            if at >= panel {
                (from, at) = (from.wrapping_add(tile), 0);
            }
            lines
        })
    }
}

/// The product before, which is told what follows it.
#[derive(Debug, Clone, Default)]
pub(super) struct Trail(Arc<Mutex<Arc<Stream>>>);

impl Trail {
    /// A product of `panels`, each of so many bytes, begins. `next` is where it remembers what follows.
    pub fn step<L>(&self, next: &Arc<Stream>, panels: &[L], panel: usize, cut: &Cut) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.set([panels.as_ptr().addr(), panel, size_of_val(panels) / panel.max(1), cut.chunks, cut.step]);
        last.clone_from(next);
    }
}

/// What is read ahead at present.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    next: Stream,
    /// How often it was set.
    turn: AtomicUsize,
}

impl Ahead {
    /// From now on it is this.
    pub fn set(&self, next: &Stream) {
        self.next.set(next.get());
        self.turn.fetch_add(1, Relaxed);
    }

    /// Asks for what a thread reads first, until all of it is asked for or it is `enough`.
    pub fn read(&self, thread: usize, threads: usize, enough: impl Fn() -> bool) {
        // The turn, and the bytes of it that were asked for.
        thread_local!(static ASKED: Cell<(usize, usize)> = const { Cell::new((0, 0)) });
        let turn = self.turn.load(Relaxed);
        let (last, asked) = ASKED.get();
        let mut asked = if last == turn { asked } else { 0 };
        for lines in self.next.beginning(thread, threads).after(asked) {
            if enough() {
                break;
            }
            lines.into_iter().for_each(prefetch);
            asked += SIDE * LINE;
        }
        ASKED.set((turn, asked));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(values: [usize; 5]) -> Stream {
        let stream = Stream::default();
        stream.set(values);
        stream
    }

    fn lines(stream: &Stream, thread: usize, threads: usize) -> Vec<usize> {
        let beginning = stream.beginning(thread, threads);
        let lines: Vec<_> = beginning.after(0).collect();
        // From anywhere it goes on as it would have.
        (0..lines.len()).for_each(|i| assert_eq!(beginning.after(i * SIDE * LINE).next(), Some(lines[i])));
        lines.into_flattened()
    }

    #[test]
    fn a_thread_reads_the_beginning_of_its_range() {
        // 24 panels of 640 bytes in 6 pieces, two for each of three threads: each line once, four panels side by side.
        let whole = stream([1 << 20, 640, 24, 6, 2]);
        for thread in 0..3 {
            let mut lines = lines(&whole, thread, 3);
            let first = (1 << 20) + thread * 8 * 640;
            assert_eq!(lines[..5], [first, first + 640, first + 2 * 640, first + 3 * 640, first + LINE]);
            lines.sort_unstable();
            assert!(lines.into_iter().eq((0..8 * 640 / LINE).map(|line| first + line * LINE)));
        }
        assert!(lines(&stream([0, 640, 24, 1, 2]), 0, 3).is_empty(), "the piece is another's");
        assert_eq!(lines(&stream([0, 64 << 10, 100, 2, 2]), 1, 2).len(), MOST / LINE);
        for odd in [[0; 5], [1, 0, 8, 2, 2], [1, 64, 0, 2, 2], [usize::MAX, 1 << 40, 1 << 20, 1, 9]] {
            assert!((0..2).all(|thread| lines(&stream(odd), thread, 2).len() <= MOST / LINE));
        }
    }

    #[test]
    fn weights_learn_what_follows_them() {
        let (trail, streams) = (Trail::default(), [Arc::<Stream>::default(), Arc::default()]);
        let panels = [[0u8; 100], [0; 100]];
        let cut = Cut { bands: 1, chunks: 2, step: 2 };
        for _ in 0..2 {
            (0..2).for_each(|i| trail.step(&streams[i], &panels[i], 10, &cut));
        }
        assert_eq!(streams[0].get(), [panels[1].as_ptr().addr(), 10, 10, 2, 2]);
        assert_eq!(streams[1].get(), [panels[0].as_ptr().addr(), 10, 10, 2, 2]);
    }

    #[test]
    fn reading_goes_on_where_it_stopped() {
        let ahead = Ahead::default();
        ahead.set(&stream([0, 640, 8, 1, 2]));
        let steps = |most: usize| {
            let left = Cell::new(most);
            ahead.read(0, 1, || left.replace(left.get().saturating_sub(1)) == 0);
            most - left.get()
        };
        assert_eq!([steps(5), steps(100), steps(100)], [5, 15, 0], "20 steps");
        ahead.set(&stream([0, 640, 8, 1, 2]));
        assert_eq!(steps(100), 20, "anew");
    }
}
