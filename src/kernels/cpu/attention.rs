//! Attention over pages: cache write, scores, softmax and the weighted sum of values.
//!
//! The positions of a row are cut into spans of 256 by absolute position. A span's scores, softmax and sum are computed for
//! itself and the spans are joined in ascending order, so a token's result depends on nothing but the positions it sees.

use super::{
    CpuOps,
    isa::{Instructions, Isa, Level, Task},
    line::LANES,
    math,
    span::Work,
    threads::Shares,
};
use crate::{
    cache::{PAGE, Pages},
    error::Result,
    kernels::{Attention, HeadBias, Span, Store},
};
use std::{cell::RefCell, ops::Range, sync::Arc};

/// Positions of a span, a whole number of pages: 128 kB of keys and values at a head of 64.
pub(super) const SPAN: usize = 256;

/// About as many queries share a reading of a span.
const QUERIES: usize = 48;

/// The same in bf16 arithmetic, which lays out anew what it reads.
const MORE_QUERIES: usize = 96;

/// A row whose positions are read.
pub(super) struct Reader<'a> {
    /// Its first token among the pass's.
    first: usize,
    count: usize,
    /// The position of its first token.
    start: usize,
    /// Positions that are there.
    len: usize,
    pub store: &'a Pages,
}

impl<'a> Reader<'a> {
    /// A row that reads what it held and has just written.
    pub(super) fn own(span: &'a Span<&mut Pages>) -> Self {
        let start = span.store.len();
        Self { first: span.first, count: span.count, start, len: start + span.count, store: span.store }
    }

    /// A row that reads another's positions.
    pub(super) fn other(span: &Span<&'a Pages>) -> Self {
        Self { first: span.first, count: span.count, start: 0, len: span.store.len(), store: span.store }
    }

    /// Positions that are there.
    pub fn len(&self) -> usize {
        self.len
    }
}

/// Writes the keys and values of all tokens, the last of their `width` columns, to their rows' stores.
pub(super) fn write(
    ops: &CpuOps,
    attention: &Attention,
    layer: usize,
    x: &[f32],
    width: usize,
    rows: &mut [Span<&mut Pages>],
) -> Result<()> {
    let (dim, kv_heads) = (attention.head_dim, attention.kv_heads);
    // Every page that is written to, with the first token that goes there and the positions that it and those after it have in the page.
    let mut pages = Vec::with_capacity(rows.len());
    for row in rows {
        debug_assert_eq!((row.store.shape().kv_heads, row.store.shape().head_dim), (kv_heads, dim));
        let (start, end) = (row.store.len(), row.store.len() + row.count);
        for (page, first) in row.store.tail(row.count)?.iter_mut().zip((start / PAGE * PAGE..).step_by(PAGE)) {
            let positions = start.max(first)..end.min(first + PAGE);
            pages.push((page, row.first + positions.start - start, positions.start - first..positions.end - first));
        }
    }
    let most = pages.iter().map(|(.., positions)| positions.len()).max().unwrap_or_default();
    // Each value of a key goes to a cache line of its own, which costs as much as some 32 multiply-adds.
    ops.team.chunks(&mut pages, 1, most * kv_heads * dim * 32, |_, pages| {
        for (page, token, positions) in pages {
            let page = Arc::make_mut(page);
            for (token, position) in (*token..).zip(positions.clone()) {
                let token = &x[token * width..][..width];
                let (keys, values) = token[width - 2 * kv_heads * dim..].split_at(kv_heads * dim);
                for (head, (key, value)) in keys.chunks(dim).zip(values.chunks(dim)).enumerate() {
                    page.write(layer, head, position, key, value);
                }
            }
        }
    });
    Ok(())
}

/// The attention of all tokens, whose queries are the first of their `width` columns, to `y`, `(tokens, heads * head_dim)`.
pub(super) fn attend(ops: &CpuOps, attention: &Attention, layer: usize, x: &[f32], width: usize, rows: &[Reader<'_>], y: &mut [f32]) {
    let Attention { heads, kv_heads, .. } = *attention;
    let block = match ops.halves {
        // Whole tiles.
        true => (MORE_QUERIES / (heads / kv_heads)).next_multiple_of(16).max(16),
        false => (QUERIES / (heads / kv_heads)).max(1),
    };
    let blocks = rows.iter().flat_map(|row| (0..row.count).step_by(block).map(move |first| (row, first..row.count.min(first + block))));
    let jobs: Vec<_> = blocks
        .flat_map(|(row, tokens)| (0..kv_heads).map(move |head| Job { attention, layer, x, width, row, tokens: tokens.clone(), head }))
        .collect();
    let work = jobs.iter().map(Job::work).sum();
    let y = Shares::new(y);
    let wanted = ops.team.worth(work);
    if wanted == 1 || jobs.len() >= 4 * wanted {
        let some = |work: &mut Workspace, job: &Job<'_>| {
            work.all.resize(work.all.len().max(job.values()), 0.0);
            work.part.resize(work.part.len().max(job.values()), 0.0);
            let (all, part) = (&mut work.all[..job.values()], &mut work.part[..job.values()]);
            for (i, start) in job.spans(ops.span).enumerate() {
                job.span(ops, start, if i == 0 { all } else { part }, &mut work.queries, &mut work.scores);
                if i > 0 {
                    ops.level.run(Join { job, all, next: part });
                }
            }
            // SAFETY: no other job has these queries.
            unsafe { job.finish(ops.level, all, &y) };
        };
        let pieces = if wanted == 1 { 1 } else { jobs.len() };
        ops.team.run(pieces, |piece| {
            let jobs = &jobs[jobs.len() * piece / pieces..jobs.len() * (piece + 1) / pieces];
            Workspace::with(|work| jobs.iter().for_each(|job| some(work, job)));
        });
        return;
    }
    // A few queries that see much: each span is a piece of its own.
    let spans: Vec<_> = jobs.iter().flat_map(|job| job.spans(ops.span).map(move |start| (job, start))).collect();
    let places: Vec<_> = spans.iter().scan(0, |end, (job, _)| Some(std::mem::replace(end, *end + job.values()))).collect();
    let total = spans.iter().map(|(job, _)| job.values()).sum();
    let mut parts = ops.scratch.take(total);
    {
        let parts = Shares::new(&mut parts);
        ops.team.run(spans.len(), |i| {
            let (job, start) = spans[i];
            // SAFETY: every piece has a place of its own.
            let part = unsafe { parts.slice(places[i]..places[i] + job.values()) };
            Workspace::with(|work| job.span(ops, start, part, &mut work.queries, &mut work.scores));
        });
    }
    let mut rest = &mut parts[..];
    for job in &jobs {
        let (own, others) = rest.split_at_mut(job.spans(ops.span).len() * job.values());
        rest = others;
        let (all, own) = own.split_at_mut(job.values());
        own.chunks_exact(job.values()).for_each(|next| ops.level.run(Join { job, all, next }));
        // SAFETY: no other job has these queries.
        unsafe { job.finish(ops.level, all, &y) };
    }
}

/// What a thread computes with.
#[derive(Default)]
struct Workspace {
    queries: Vec<Query>,
    /// `(queries, span)`: products, then weights.
    scores: Vec<f32>,
    all: Vec<f32>,
    part: Vec<f32>,
}

impl Workspace {
    fn with<R>(work: impl FnOnce(&mut Self) -> R) -> R {
        thread_local!(static OWN: RefCell<Workspace> = RefCell::default());
        // Nothing that works with it does so within itself; a new one would do as well.
        OWN.with(|own| match own.try_borrow_mut() {
            Ok(mut own) => work(&mut own),
            Err(_) => work(&mut Self::default()),
        })
    }
}

/// Queries of one row that share a key-value head.
pub(super) struct Job<'a> {
    pub attention: &'a Attention,
    pub layer: usize,
    x: &'a [f32],
    width: usize,
    pub row: &'a Reader<'a>,
    /// Of the row's.
    tokens: Range<usize>,
    pub head: usize,
}

/// One head of one token.
pub(super) struct Query {
    /// Where its values begin.
    x: usize,
    /// The positions it sees, counted from a span's start.
    pub seen: Range<usize>,
}

impl Job<'_> {
    fn group(&self) -> usize {
        self.attention.heads / self.attention.kv_heads
    }

    fn queries(&self) -> usize {
        self.tokens.len() * self.group()
    }

    /// Dimensions of a head, up to a whole line.
    pub fn dims(&self) -> usize {
        self.attention.head_dim.next_multiple_of(LANES)
    }

    /// The outcome of some positions, for each query: the values' sum with weights `e^(score - max)`, the largest score, and the sum of the
    /// weights.
    pub fn stride(&self) -> usize {
        self.dims() + 2
    }

    /// Values of an outcome.
    fn values(&self) -> usize {
        self.queries() * self.stride()
    }

    /// The token of query `i`, counted from the row's first, and the head.
    fn place(&self, i: usize) -> (usize, usize) {
        (self.tokens.start + i / self.group(), self.head * self.group() + i % self.group())
    }

    /// The queries of a token and the part of `span` that they see.
    fn queries_of(&self, token: usize, span: &Range<usize>) -> impl Iterator<Item = Query> + use<> {
        let Attention { sight, head_dim, .. } = *self.attention;
        let Range { start, end } = sight.of(self.row.start + token, self.row.len);
        let seen = start.clamp(span.start, span.end) - span.start..end.clamp(span.start, span.end) - span.start;
        let group = self.group();
        let first = (self.row.first + token) * self.width + self.head * group * head_dim;
        (0..group).map(move |head| Query { x: first + head * head_dim, seen: seen.clone() })
    }

    #[inline(always)]
    pub fn values_of(&self, query: &Query) -> &[f32] {
        &self.x[query.x..][..self.attention.head_dim]
    }

    /// What is added to the scores of query `i`.
    pub fn bias(&self, i: usize) -> HeadBias<'_> {
        let (token, head) = self.place(i);
        self.attention.bias.of(head, self.row.start + token)
    }

    /// What the queries see together: what the first and the last see.
    fn seen(&self) -> Range<usize> {
        let of = |token: usize| self.attention.sight.of(self.row.start + token, self.row.len);
        of(self.tokens.start).start..of(self.tokens.end.max(1) - 1).end
    }

    fn work(&self) -> usize {
        self.seen().len() * self.queries() * self.attention.head_dim * 2
    }

    /// The beginnings of the spans that a query sees something of; the first one always.
    fn spans(&self, span: usize) -> impl ExactSizeIterator<Item = usize> + use<> {
        let Range { start, end } = self.seen();
        let first = start / span;
        (first..end.div_ceil(span).max(first + 1)).map(move |i| i * span)
    }

    /// The outcome of the positions of a span.
    fn span(&self, ops: &CpuOps, start: usize, part: &mut [f32], queries: &mut Vec<Query>, scores: &mut Vec<f32>) {
        // Whole pages, not more than there are.
        let len = ops.span.min(self.row.len.next_multiple_of(PAGE) - start);
        let span = start..start + len;
        queries.clear();
        queries.extend(self.tokens.clone().flat_map(|token| self.queries_of(token, &span)));
        scores.resize(scores.len().max(queries.len() * len), 0.0);
        let mut work = Work { job: self, start, len, queries, scores, part };
        match (ops.halves, ops.level.instructions()) {
            (true, Instructions::Avx512Bf16) => work.run_in_dots(ops.level),
            (true, _) => work.run_in_halves(ops.level),
            (false, _) => work.run(ops.level),
        }
    }

    /// Writes the result.
    ///
    /// # Safety
    /// No other thread accesses the results of these queries meanwhile.
    unsafe fn finish(&self, level: Level, all: &[f32], y: &Shares<'_, f32>) {
        for (i, all) in all.chunks_exact(self.stride()).enumerate() {
            let (token, head) = self.place(i);
            let to = ((self.row.first + token) * self.attention.heads + head) * self.attention.head_dim;
            // SAFETY: as of this function.
            let y = unsafe { y.slice(to..to + self.attention.head_dim) };
            level.run(Divide { x: all, by: all[self.dims() + 1], y });
        }
    }
}

struct Divide<'a> {
    x: &'a [f32],
    by: f32,
    y: &'a mut [f32],
}

impl Task for Divide<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        self.y.iter_mut().zip(self.x).for_each(|(y, x)| *y = x / self.by);
    }
}

/// Adds the outcome of the span that follows.
struct Join<'a> {
    job: &'a Job<'a>,
    all: &'a mut [f32],
    next: &'a [f32],
}

impl Task for Join<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let (dims, stride) = (self.job.dims(), self.job.stride());
        for (all, next) in self.all.chunks_exact_mut(stride).zip(self.next.chunks_exact(stride)) {
            if next[dims] == f32::NEG_INFINITY {
                continue;
            }
            let max = if next[dims] > all[dims] { next[dims] } else { all[dims] };
            let (old, new) = (math::exp(all[dims] - max), math::exp(next[dims] - max));
            for (x, y) in all[..dims].iter_mut().zip(next) {
                *x = *x * old + y * new;
            }
            all[dims] = max;
            all[dims + 1] = all[dims + 1] * old + next[dims + 1] * new;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{
        isa::{Instructions, Level, tests::vectorised},
        noise, ops,
        scratch::Scratch,
    };
    use super::*;
    use crate::{
        kernels::{Alibi, Bias, Ops, Relative, Rope, Sight, StoreShape},
        model::Room,
    };

    /// An attention, rotated or not, as the decoder uses it.
    struct Case {
        attention: Attention,
        rope: Option<Rope>,
        level: Level,
        threads: usize,
        halves: bool,
    }

    impl Case {
        fn new(heads: usize, kv_heads: usize, head_dim: usize, pairs: usize) -> Self {
            let scale = 1.7 / (head_dim as f32).sqrt();
            let attention = Attention { heads, kv_heads, head_dim, scale, softcap: None, sight: Sight::Causal, bias: Bias::None };
            let inv_freq = (0..pairs).map(|i| 0.3f32.powi(i as i32)).collect();
            Self {
                attention,
                rope: (pairs > 0).then_some(Rope { inv_freq, scale: 1.1 }),
                level: Level::best(None),
                threads: 2,
                halves: false,
            }
        }

        fn width(&self) -> usize {
            (self.attention.heads + 2 * self.attention.kv_heads) * self.attention.head_dim
        }

        fn tokens(&self, count: usize, seed: u64) -> Vec<f32> {
            noise(count * self.width(), seed)
        }

        fn store(&self) -> Pages {
            let Attention { kv_heads, head_dim, .. } = self.attention;
            Pages::new(StoreShape { layers: 2, kv_heads, head_dim }, Room::Grow, Scratch::small()).unwrap()
        }

        /// One pass: the new tokens of each row, and its store.
        fn pass(&self, rows: &mut [(&[f32], &mut Pages)]) -> Vec<f32> {
            let ops = CpuOps { halves: self.halves, ..ops(self.level, self.threads) };
            let data: Vec<f32> = rows.iter().flat_map(|(tokens, _)| *tokens).copied().collect();
            let counts: Vec<_> = rows.iter().map(|(tokens, _)| tokens.len() / self.width()).collect();
            let turns =
                |rope| rows.iter().zip(&counts).map(|((_, store), count)| (rope, store.len()..store.len() + count)).collect::<Vec<_>>();
            let angles = self.rope.as_ref().map(|rope| ops.angles(&turns(rope)).unwrap());
            let mut first = 0;
            let mut spans = Vec::new();
            for ((_, store), &count) in rows.iter_mut().zip(&counts) {
                spans.push(Span { first, count, store: &mut **store });
                first += count;
            }
            let mut qkv = ops.act(data.len() / self.width(), self.width());
            qkv.data.copy_from_slice(&data);
            let y = ops.pass(|| ops.attend(&self.attention, 1, qkv, angles.as_ref(), &mut spans)).unwrap();
            spans.iter_mut().for_each(|span| span.store.grow(span.count));
            y.data.to_vec()
        }

        /// Feeds `tokens` in pieces of `sizes`, the last size repeated.
        fn feed(&self, tokens: &[f32], sizes: &[usize]) -> Vec<f32> {
            let (mut store, mut y, mut rest) = (self.store(), Vec::new(), tokens);
            let mut sizes = sizes.iter().copied();
            let mut size = 1;
            while !rest.is_empty() {
                size = sizes.next().unwrap_or(size);
                let (now, later) = rest.split_at((size * self.width()).min(rest.len()));
                y.extend(self.pass(&mut [(now, &mut store)]));
                rest = later;
            }
            y
        }

        /// The definition, in f64.
        fn reference(&self, tokens: &[f32]) -> Vec<f64> {
            let &Attention { heads, kv_heads, head_dim: dim, scale, softcap, sight, .. } = &self.attention;
            let head = |token: usize, head: usize| -> Vec<f64> {
                let mut x: Vec<f64> = tokens[token * self.width() + head * dim..][..dim].iter().map(|&x| f64::from(x)).collect();
                if let Some(rope) = self.rope.as_ref().filter(|_| head < heads + kv_heads) {
                    let pairs = rope.inv_freq.len();
                    for (i, freq) in rope.inv_freq.iter().enumerate() {
                        let (sin, cos) = f64::from(token as f32 * freq).sin_cos();
                        let (a, b) = (x[i], x[i + pairs]);
                        x[i] = (a * cos - b * sin) * f64::from(rope.scale);
                        x[i + pairs] = (b * cos + a * sin) * f64::from(rope.scale);
                    }
                }
                x
            };
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let mut y = Vec::new();
            for (token, q) in (0..tokens.len() / self.width()).flat_map(|token| (0..heads).map(move |q| (token, q))) {
                let kv = q / (heads / kv_heads);
                let seen: Vec<usize> = sight.of(token, tokens.len() / self.width()).collect();
                let score = |&at: &usize| {
                    let score = dot(&head(token, q), &head(at, heads + kv)) * f64::from(scale);
                    let bias = |at| {
                        let mut bias = [0.0];
                        self.attention.bias.of(q, token).add(&mut bias, at);
                        f64::from(bias[0])
                    };
                    (bias(at) - bias(token) + softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())).exp()
                };
                let weights: Vec<f64> = seen.iter().map(score).collect();
                let values: Vec<Vec<f64>> = seen.iter().map(|&at| head(at, heads + kv_heads + kv)).collect();
                let total: f64 = weights.iter().sum();
                y.extend((0..dim).map(|d| weights.iter().zip(&values).map(|(weight, value)| weight * value[d]).sum::<f64>() / total));
            }
            y
        }
    }

    /// Grouped, rotated in part, capped, windowed (inside a page, over pages, over spans), one head for all, a ragged head, biased.
    /// In f32 and in bf16 arithmetic.
    fn cases() -> impl Iterator<Item = (Case, usize)> {
        shapes().into_iter().chain(shapes().into_iter().map(|(case, count)| (Case { halves: true, ..case }, count)))
    }

    fn shapes() -> Vec<(Case, usize)> {
        let mut capped = Case::new(6, 2, 8, 4);
        capped.attention.softcap = Some(0.5);
        capped.attention.sight = Sight::Window(5);
        let mut windowed = Case::new(2, 1, 4, 1);
        windowed.attention.sight = Sight::Window(270);
        let mut narrow = Case::new(2, 2, 4, 0);
        narrow.attention.sight = Sight::Window(20);
        let biased = |coarse| {
            let mut case = Case::new(3, 1, 4, 0);
            case.attention.bias = Bias::Alibi([0.25, 0.01, 0.7].map(|slope| Alibi { slope, scale: 0.5, coarse }).into());
            case
        };
        let mut distant = Case::new(4, 2, 8, 0);
        distant.attention.bias = Bias::Relative(Relative::new(4, 9, |head, distance| (head as f32 - 1.5) * distance as f32 / 9.0).into());
        vec![
            (Case::new(9, 3, 16, 8), 40),
            (Case::new(4, 4, 20, 3), 35),
            (capped, 40),
            (windowed, 530),
            (narrow, 530),
            (Case::new(8, 1, 32, 16), 18),
            (biased(false), 270),
            (biased(true), 270),
            (distant, 270),
        ]
    }

    #[test]
    fn attention_is_what_it_is_defined_to_be() {
        for (case, count) in cases() {
            let tokens = case.tokens(count, 5);
            let (ours, exact) = (case.feed(&tokens, &[count]), case.reference(&tokens));
            assert_eq!(ours.len(), exact.len());
            for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
                // A bf16 has 8 bits, and what is rounded is below 1.
                let most = if case.halves { 0.02 } else { 1e-5 };
                assert!((f64::from(*ours) - exact).abs() < most, "{:?} value {i}: {ours} for {exact}", case.attention);
            }
            let wide = Case { halves: false, ..case }.feed(&tokens, &[count]);
            assert_eq!(wide != ours, case.halves, "rounded where it is asked for, and nowhere else");
        }
    }

    #[test]
    fn cached_chunked_and_whole_are_the_same_bits() {
        for (case, count) in cases() {
            let tokens = case.tokens(count, 6);
            let whole = case.feed(&tokens, &[count]);
            for sizes in [&[1][..], &[7], &[count - 1, 1], &[3, 16, 1, 1, 48]] {
                assert!(case.feed(&tokens, sizes) == whole, "{:?} in pieces of {sizes:?}", case.attention);
            }
        }
    }

    #[test]
    fn instruction_sets_and_threads_change_no_bit() {
        for (mut case, count) in cases() {
            let tokens = case.tokens(count, 7);
            case.level = Level::PORTABLE;
            let expected = case.feed(&tokens, &[count]);
            for level in vectorised() {
                // Which sums in an order of its own.
                if case.halves && level.instructions() == Instructions::Avx512Bf16 {
                    continue;
                }
                case.level = level;
                assert!(case.feed(&tokens, &[count]) == expected, "{level:?} {:?}", case.attention);
            }
            for threads in [1, 5] {
                case.threads = threads;
                assert!(case.feed(&tokens, &[count - 1, 1]) == expected, "{threads} threads");
            }
        }
    }

    #[test]
    fn a_row_is_the_same_beside_others() {
        for (case, _) in cases() {
            let rows = [(30, 1), (1, 9), (0, 20), (16, 17)].map(|(held, new)| (case.tokens(held + new, held as u64 + 1), held, new));
            let mut stores: Vec<Pages> = Vec::new();
            for (tokens, held, _) in &rows {
                stores.push(case.store());
                let held = &tokens[..held * case.width()];
                if !held.is_empty() {
                    case.pass(&mut [(held, stores.last_mut().unwrap())]);
                }
            }
            let mut pass: Vec<_> =
                rows.iter().zip(&mut stores).map(|((tokens, held, _), store)| (&tokens[held * case.width()..], store)).collect();
            let together = case.pass(&mut pass);
            let size = case.attention.heads * case.attention.head_dim;
            let alone = rows.iter().flat_map(|(tokens, held, _)| case.feed(tokens, &[tokens.len()]).split_off(held * size));
            assert!(alone.eq(together), "{:?}", case.attention);
        }
    }

    #[test]
    fn a_source_is_read_as_its_own_tokens_read_it() {
        let mut case = Case::new(6, 2, 20, 0);
        case.attention.sight = Sight::Full;
        for (count, halves) in [(1, false), (35, false), (300, false), (35, true), (300, true)] {
            case.halves = halves;
            let tokens = case.tokens(count, 9);
            let whole = case.feed(&tokens, &[count]);
            for (ours, exact) in whole.iter().zip(case.reference(&tokens)) {
                assert!((f64::from(*ours) - exact).abs() < if halves { 0.02 } else { 1e-5 }, "{ours} for {exact}");
            }
            let (ops, mut store) = (CpuOps { halves: case.halves, ..ops(case.level, 2) }, case.store());
            let part = |columns: Range<usize>| {
                let data: Vec<f32> = tokens.chunks(case.width()).flat_map(|token| &token[columns.clone()]).copied().collect();
                let mut x = ops.act(count, columns.len());
                x.data.copy_from_slice(&data);
                x
            };
            ops.fill(&case.attention, 1, &part(120..200), &mut [Span { first: 0, count, store: &mut store }]).unwrap();
            store.grow(count);
            let queries = part(0..120);
            assert!(ops.cross(&case.attention, 1, &queries, &[Span { first: 0, count, store: &store }]).unwrap().data[..] == whole);
            let rows = [Span { first: 0, count: 0, store: &store }, Span { first: 0, count, store: &store }];
            assert!(ops.cross(&case.attention, 1, &queries, &rows).unwrap().data[..] == whole);
        }
    }

    #[test]
    fn forks_go_their_own_ways() {
        let case = Case::new(4, 2, 8, 4);
        let (stem, left, right) = (case.tokens(21, 1), case.tokens(4, 2), case.tokens(4, 3));
        let mut one = case.store();
        case.pass(&mut [(&stem, &mut one)]);
        let mut two = one.clone();
        let forked = case.pass(&mut [(&left, &mut one), (&right, &mut two)]);
        let fresh = [&left, &right].map(|branch| {
            let tokens = [stem.as_slice(), branch].concat();
            case.feed(&tokens, &[25]).split_off(21 * 32)
        });
        assert_eq!(forked, fresh.concat());
        // A rewound row forgets its branch.
        one.truncate(21).unwrap();
        assert_eq!(case.pass(&mut [(&right, &mut one)]), fresh[1]);
    }

    #[test]
    fn extreme_scores_stay_numbers() {
        let mut case = Case::new(1, 1, 4, 0);
        case.attention.scale = 1.0;
        // Query 1e15; keys 1e15, -1e15, 0, 1e-30; values 1, 2, 3, 4.
        let token = |key: f32, value: f32| [[1e15; 4], [key / 4.0; 4], [value; 4]].concat();
        let tokens = [token(1e15, 1.0), token(-1e15, 2.0), token(0.0, 3.0), token(1e-30, 4.0)].concat();
        assert_eq!(case.feed(&tokens, &[4]), [1.0; 16]);
        let low = [token(-1e15, 1.0), token(-1e15, 3.0)].concat();
        assert_eq!(case.feed(&low, &[2]), [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn nothing_to_see_is_no_panic() {
        let mut case = Case::new(6, 2, 20, 0);
        case.attention.sight = Sight::Full;
        let store = case.store();
        for (count, halves) in [(1, false), (40, false), (1, true), (40, true)] {
            let ops = CpuOps { halves, ..ops(case.level, 2) };
            let mut queries = ops.act(count, 120);
            queries.data.fill(1.0);
            let y = ops.cross(&case.attention, 1, &queries, &[Span { first: 0, count, store: &store }]).unwrap();
            assert!(y.data.len() == count * 120 && y.data.iter().all(|y| y.is_nan()));
        }
    }

    #[test]
    fn what_memory_held_before_does_not_matter() {
        for (case, count) in cases() {
            let (tokens, memory) = (case.tokens(count, 8), Scratch::small());
            let Attention { kv_heads, head_dim, .. } = case.attention;
            let shape = StoreShape { layers: 2, kv_heads, head_dim };
            let mut used = [0; 40].map(|_| memory.take(2 * kv_heads * 2 * head_dim.next_multiple_of(LANES) * PAGE));
            used.iter_mut().for_each(|used| used.fill(f32::NAN));
            drop(used);
            let mut store = Pages::new(shape, Room::Grow, memory).unwrap();
            assert!(case.pass(&mut [(&tokens, &mut store)]) == case.feed(&tokens, &[count]), "{:?}", case.attention);
        }
    }

    #[test]
    fn a_later_token_does_not_touch_an_earlier_one() {
        let case = Case::new(2, 1, 4, 2);
        let mut tokens = case.tokens(10, 8);
        let clean = case.feed(&tokens, &[10]);
        tokens[6 * case.width()..].fill(f32::INFINITY);
        let spoilt = case.feed(&tokens, &[10]);
        assert_eq!(spoilt[..6 * 8], clean[..6 * 8]);
        assert!(spoilt[6 * 8..].iter().all(|x| x.is_nan()));
    }
}
