//! Pages: the keys and values of a row, 16 positions of all layers at a time, shared between forks.

use crate::{
    error::{Error, Result},
    kernels::{
        Store, StoreShape,
        cpu::{
            line::{F32, LANES},
            scratch::{Buffer, Scratch},
        },
    },
    model::Room,
};
use std::sync::Arc;

/// Positions of a page: as many as lanes, so that a score vector is a page, and few enough that copying a shared one is cheap.
pub(crate) const PAGE: usize = LANES;

/// Keys and values of one row. A clone shares the pages.
#[derive(Debug, Clone)]
pub(crate) struct Pages {
    shape: StoreShape,
    room: Room,
    pages: Vec<Arc<Page>>,
    len: usize,
    /// Where pages come from.
    memory: Arc<Scratch>,
}

/// 16 positions. For each layer and key-value head, keys then values, both in the form of panels: keys are one panel with a
/// line for each dimension (lanes are positions); values are panels of 16 dimensions with a line for each position.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    lines: Buffer,
    shape: StoreShape,
}

impl Pages {
    /// No positions, and room as asked for.
    pub(crate) fn new(shape: StoreShape, room: Room, memory: Arc<Scratch>) -> Result<Self> {
        let mut pages = Self { shape, room, pages: Vec::new(), len: 0, memory };
        pages.furnish(room)?;
        Ok(pages)
    }

    /// Bytes that a position takes.
    pub(crate) fn position_bytes(shape: StoreShape) -> u64 {
        (Page::lines(shape) * size_of::<F32>()).div_ceil(PAGE) as u64
    }

    pub(crate) fn shape(&self) -> StoreShape {
        self.shape
    }

    /// The page with the next position, and those after it: ready for `count` more positions.
    pub(crate) fn tail(&mut self, count: usize) -> Result<&mut [Arc<Page>]> {
        let len = self.len.saturating_add(count);
        match self.room {
            Room::Reserve(most) if len > most => {
                return Err(Error::config("max_cache_len", most, format!("{len} positions are needed")));
            }
            _ if self.pages.len() < len.div_ceil(PAGE) => {
                self.pages.resize_with(len.div_ceil(PAGE), || Arc::new(Page::new(self.shape, &self.memory)));
            }
            _ => {}
        }
        Ok(&mut self.pages[self.len / PAGE..len.div_ceil(PAGE)])
    }

    pub(crate) fn page(&self, index: usize) -> &Page {
        &self.pages[index]
    }
}

impl Store for Pages {
    fn len(&self) -> usize {
        self.len
    }

    fn grow(&mut self, count: usize) {
        self.len += count;
        debug_assert!(self.len <= self.pages.len() * PAGE);
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            return Err(Error::Unsupported(format!("a cache of {} positions cannot be cut to {len}", self.len)));
        }
        self.len = len;
        if self.room == Room::Grow {
            self.pages.truncate(len.div_ceil(PAGE));
        }
        Ok(())
    }

    fn furnish(&mut self, room: Room) -> Result<()> {
        let count = match room {
            Room::Grow => self.len.div_ceil(PAGE),
            Room::Reserve(positions) => {
                let count = positions.max(self.len).div_ceil(PAGE);
                let refused = || Error::config("max_cache_len", positions, "so much memory cannot be allocated");
                // Asking for all of it at once fails at once where it cannot be had, before any of it is touched.
                let more = count.saturating_sub(self.pages.len()).checked_mul(Page::lines(self.shape)).ok_or_else(refused)?;
                Vec::<F32>::new().try_reserve_exact(more).map_err(|_| refused())?;
                count
            }
        };
        self.pages.resize_with(count, || Arc::new(Page::new(self.shape, &self.memory)));
        self.room = room;
        Ok(())
    }
}

impl Page {
    fn new(shape: StoreShape, memory: &Arc<Scratch>) -> Self {
        Self { lines: memory.take(Self::lines(shape) * LANES), shape }
    }

    /// All lines of a head: its keys and its values.
    pub(crate) fn head(&self, layer: usize, head: usize) -> &[F32] {
        let start = self.start(layer, head);
        &self.lines.lines()[start..start + Self::head_lines(self.shape)]
    }

    /// One panel of keys: a line for each dimension.
    pub(crate) fn keys(&self, layer: usize, head: usize) -> &[F32] {
        let start = self.start(layer, head);
        &self.lines.lines()[start..start + self.shape.head_dim]
    }

    /// Panel `panel` of the values, 16 dimensions: a line for each position.
    pub(crate) fn values(&self, layer: usize, head: usize, panel: usize) -> &[F32] {
        let start = self.start(layer, head) + self.shape.head_dim + panel * PAGE;
        &self.lines.lines()[start..start + PAGE]
    }

    /// Writes the key and value of one position.
    pub(crate) fn write(&mut self, layer: usize, head: usize, position: usize, key: &[f32], value: &[f32]) {
        let start = self.start(layer, head);
        let (keys, values) = self.lines.lines_mut()[start..].split_at_mut(self.shape.head_dim);
        for (line, &key) in keys.iter_mut().zip(key) {
            line.0[position] = key;
        }
        for (line, value) in values.iter_mut().skip(position).step_by(PAGE).zip(value.chunks(LANES)) {
            line.0[..value.len()].copy_from_slice(value);
        }
    }

    fn start(&self, layer: usize, head: usize) -> usize {
        debug_assert!(layer < self.shape.layers && head < self.shape.kv_heads);
        (layer * self.shape.kv_heads + head) * Self::head_lines(self.shape)
    }

    fn lines(shape: StoreShape) -> usize {
        shape.layers * shape.kv_heads * Self::head_lines(shape)
    }

    fn head_lines(shape: StoreShape) -> usize {
        shape.head_dim + shape.head_dim.div_ceil(LANES) * PAGE
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const SHAPE: StoreShape = StoreShape { layers: 2, kv_heads: 3, head_dim: 20 };

    fn append(pages: &mut Pages, count: usize, mark: f32) {
        let start = pages.len();
        for (i, page) in pages.tail(count).unwrap().iter_mut().enumerate() {
            let first = (start / PAGE + i) * PAGE;
            for position in start.max(first)..(start + count).min(first + PAGE) {
                let page = Arc::make_mut(page);
                for (layer, head) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
                    let at = mark + position as f32 + 1000.0 * (layer * 3 + head) as f32;
                    let key: Vec<f32> = (0..20).map(|d| at + 0.01 * d as f32).collect();
                    let value: Vec<f32> = key.iter().map(|key| -key).collect();
                    page.write(layer, head, position % PAGE, &key, &value);
                }
            }
        }
        pages.grow(count);
    }

    fn read(pages: &Pages, position: usize, layer: usize, head: usize, dim: usize) -> (f32, f32) {
        let page = pages.page(position / PAGE);
        let value = page.values(layer, head, dim / LANES)[position % PAGE].0[dim % LANES];
        (page.keys(layer, head)[dim].0[position % PAGE], value)
    }

    #[test]
    fn what_is_written_is_read() {
        let mut pages = Pages::new(SHAPE, Room::Grow, Scratch::small()).unwrap();
        append(&mut pages, 5, 0.0);
        append(&mut pages, 30, 0.0);
        for position in 0..35 {
            for (layer, head) in [(0, 0), (0, 2), (1, 1)] {
                for dim in 0..20 {
                    let key = position as f32 + 1000.0 * (layer * 3 + head) as f32 + 0.01 * dim as f32;
                    assert_eq!(read(&pages, position, layer, head, dim), (key, -key));
                }
            }
        }
    }

    #[test]
    fn forks_share_until_they_write() {
        let mut one = Pages::new(SHAPE, Room::Grow, Scratch::small()).unwrap();
        append(&mut one, 20, 0.0);
        let mut two = one.clone();
        assert!(Arc::ptr_eq(&one.pages[0], &two.pages[0]) && Arc::ptr_eq(&one.pages[1], &two.pages[1]));
        append(&mut two, 1, 0.5);
        assert!(Arc::ptr_eq(&one.pages[0], &two.pages[0]), "a full page stays shared");
        assert!(!Arc::ptr_eq(&one.pages[1], &two.pages[1]), "the last one is copied");
        let own = Arc::as_ptr(&one.pages[1]);
        append(&mut one, 1, 0.25);
        assert_eq!(Arc::as_ptr(&one.pages[1]), own, "and only once");
        assert_eq!([&one, &two].map(|pages| read(pages, 19, 1, 2, 0).0), [5019.0; 2]);
        assert_eq!([&one, &two].map(|pages| read(pages, 20, 1, 2, 0).0), [5020.25, 5020.5]);
    }

    #[test]
    fn truncation_forgets_and_leaves_forks_alone() {
        let mut one = Pages::new(SHAPE, Room::Grow, Scratch::small()).unwrap();
        append(&mut one, 40, 0.0);
        let two = one.clone();
        one.truncate(17).unwrap();
        assert_eq!((one.len(), one.pages.len()), (17, 2));
        append(&mut one, 3, 0.5);
        assert_eq!((read(&one, 17, 0, 0, 0).0, read(&two, 17, 0, 0, 0).0), (17.5, 17.0));
        assert_eq!(one.truncate(21).unwrap_err().to_string(), "unsupported: a cache of 20 positions cannot be cut to 21");
        one.truncate(0).unwrap();
        assert!(one.pages.is_empty());
    }

    #[test]
    fn growth_follows_use_and_a_reserve_is_a_limit() {
        let mut grow = Pages::new(SHAPE, Room::Grow, Scratch::small()).unwrap();
        assert_eq!(grow.pages.capacity(), 0);
        append(&mut grow, 16, 0.0);
        assert_eq!(grow.pages.len(), 1);

        let mut fixed = Pages::new(SHAPE, Room::Reserve(20), Scratch::small()).unwrap();
        assert_eq!(fixed.pages.len(), 2);
        append(&mut fixed, 20, 0.0);
        let error = fixed.tail(1).unwrap_err().to_string();
        assert_eq!(error, "invalid generation config: max_cache_len = 20: 21 positions are needed");
        fixed.truncate(4).unwrap();
        assert_eq!(fixed.pages.len(), 2, "what is reserved stays");
        assert!(Pages::new(SHAPE, Room::Reserve(usize::MAX), Scratch::small()).is_err());
    }

    #[test]
    fn room_of_another_kind_leaves_what_is_held() {
        let mut pages = Pages::new(SHAPE, Room::Grow, Scratch::small()).unwrap();
        append(&mut pages, 20, 0.0);
        let fork = pages.clone();
        pages.furnish(Room::Reserve(40)).unwrap();
        assert_eq!((pages.len(), pages.pages.len()), (20, 3));
        append(&mut pages, 20, 0.5);
        assert!(pages.tail(1).is_err());
        pages.truncate(30).unwrap();
        pages.furnish(Room::Grow).unwrap();
        assert_eq!(pages.pages.len(), 2, "what is reserved goes");
        append(&mut pages, 20, 0.25);
        let keys = [19, 20, 30].map(|position| read(&pages, position, 0, 0, 0).0);
        assert_eq!((keys, read(&fork, 19, 0, 0, 0).0), ([19.0, 20.5, 30.25], 19.0));
        assert!(pages.furnish(Room::Reserve(usize::MAX)).is_err());
        append(&mut pages, 20, 0.0);
    }

    #[test]
    fn a_position_takes_its_share_of_a_page() {
        // 2 layers, 3 heads, 20 keys and 20 values filled up to 32, 4 bytes.
        assert_eq!(Pages::position_bytes(SHAPE), 2 * 3 * (20 + 32) * 4);
    }
}
