//! The threads of the operations: a team that a pass holds for itself, whose members spin for work while it lasts and sleep afterwards.
//!
//! An operation is cut into pieces. Each thread has a range of them, neighbours one after another, so that it reads memory in one stream;
//! who has done its own takes the last of another's, so that a thread which the system has stopped delays one piece and nothing else. Who
//! finds nothing left reads ahead what its range of the next product begins with. No result depends on who does what, or on how many
//! there are.

use super::ahead::Ahead;
use std::{
    any::Any,
    cell::UnsafeCell,
    marker::PhantomData,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*, fence},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long who has the team spins for the others before it sleeps: about twice what waking costs.
const SPIN: Duration = Duration::from_micros(50);

/// How long the others spin for what comes next: longer than a token takes to be chosen greedily.
const REST: Duration = Duration::from_micros(200);

/// Multiply-adds that a piece should have at least: handing over costs some tenths of a microsecond.
const GRAIN: usize = 1 << 13;

/// Threads that work on one pass at a time. All models with as many threads share them.
#[derive(Debug)]
pub(crate) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// The physical cores that this process may use.
pub(crate) fn cores() -> usize {
    num_cpus::get().min(num_cpus::get_physical()).max(1)
}

impl Team {
    /// A team of so many threads, the caller's among them.
    pub(crate) fn of(threads: usize) -> Arc<Self> {
        static TEAMS: Mutex<Vec<(usize, Weak<Team>)>> = Mutex::new(Vec::new());
        let mut teams = lock(&TEAMS);
        teams.retain(|(_, team)| team.strong_count() > 0);
        match teams.iter().find(|(count, _)| *count == threads).and_then(|(_, team)| team.upgrade()) {
            Some(team) => team,
            None => {
                let team = Arc::new(Self::new(threads));
                teams.push((threads, Arc::downgrade(&team)));
                team
            }
        }
    }

    fn new(threads: usize) -> Self {
        let posts = (0..threads.max(1)).map(|_| Apart::default()).collect();
        let shared = Arc::new(Shared { posts, ..Shared::default() });
        let worker = |number| {
            let shared = shared.clone();
            // A thread that the system refuses is one less.
            thread::Builder::new().name(format!("generate-{number}")).spawn(move || shared.serve(number)).ok()
        };
        let workers = (1..threads).map_while(worker).collect();
        Self { shared, workers }
    }

    /// The members of the team.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Has the team for the time of `work`, after those who asked before. Operations outside of it, and those that an operation
    /// begins, are done by their caller alone.
    pub(super) fn hold<R>(&self, work: impl FnOnce() -> R) -> R {
        if self.is_held() {
            return work();
        }
        let _turn = Turn::new(&self.shared);
        self.wake();
        work()
    }

    /// [`Self::run`] outside of a pass: with the team if nobody else has it or waits for it, otherwise alone.
    pub(super) fn spread(&self, count: usize, f: impl Fn(usize) + Sync) {
        let turn = Turn::at_once(&self.shared);
        if turn.is_some() {
            self.wake();
        }
        self.run(count, f);
    }

    fn wake(&self) {
        if self.shared.asleep.load(Relaxed) > 0 {
            self.shared.call();
        }
    }

    /// What threads without work read ahead from now on.
    pub(super) fn ahead(&self) -> &Ahead {
        &self.shared.ahead.0
    }

    /// How many pieces `work` multiply-adds are worth: one, or one for each thread.
    pub(super) fn worth(&self, work: usize) -> usize {
        (work / GRAIN).clamp(1, self.threads())
    }

    /// Whether a thread that has done piece `i` of `count` goes on with the one after it.
    pub(super) fn goes_on(&self, count: usize, i: usize) -> bool {
        // The first thread whose range does not begin before that one.
        let thread = ((i + 1) * self.shared.posts.len()).div_ceil(count);
        self.shared.range(count, thread).start > i + 1
    }

    /// `f(0)`, `f(1)`, ... for `count` pieces, in any order.
    pub(super) fn run(&self, count: usize, f: impl Fn(usize) + Sync) {
        let is_one = count < 2 || self.workers.is_empty() || u32::try_from(count).is_err();
        // Only the holder gets as far as the flag, so nobody else can set it in between.
        if is_one || !self.is_held() || self.shared.own.0.busy.swap(true, Relaxed) {
            return (0..count).for_each(f);
        }
        self.shared.run(count, &f);
    }

    /// Whether the caller has the team.
    fn is_held(&self) -> bool {
        self.shared.holder.load(Relaxed) == number()
    }

    /// `f(i, chunk)` for each chunk of `size` values, each chunk `work` multiply-adds.
    pub(super) fn chunks<T: Send>(&self, data: &mut [T], size: usize, work: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let (len, size) = (data.len(), size.max(1));
        let data = Shares::new(data);
        self.each(len.div_ceil(size), work, |i| {
            // SAFETY: chunks do not overlap, and each is done once.
            f(i, unsafe { data.slice(i * size..len.min((i + 1) * size)) });
        });
    }

    /// `f(0)`, `f(1)`, ... for `count` things, each of `work` multiply-adds, neighbours one after another.
    pub(super) fn each(&self, count: usize, work: usize, f: impl Fn(usize) + Sync) {
        // Some more pieces than threads, which are not equally fast.
        let pieces = self.worth(count * work).min(count);
        let pieces = if pieces > 1 { (pieces * 4).min(count) } else { pieces };
        self.run(pieces, |piece| part(count, 1, pieces, piece).for_each(&f));
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ending.store(true, Relaxed);
        self.shared.call();
        for worker in self.workers.drain(..) {
            // It ended, and that is all there is to know.
            let _ = worker.join();
        }
    }
}

/// Part `i` of `parts` nearly equal ranges of `0..count`, cut at multiples of `step`.
pub(super) fn part(count: usize, step: usize, parts: usize, i: usize) -> Range<usize> {
    let steps = count.div_ceil(step);
    let cut = |i: usize| (steps * i / parts * step).min(count);
    cut(i)..cut(i + 1)
}

/// What several threads write in different places.
pub(super) struct Shares<'a, T> {
    data: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: all access goes through `slice`, whose callers answer for its exclusiveness.
unsafe impl<T: Send> Sync for Shares<'_, T> {}

impl<'a, T> Shares<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), of: PhantomData }
    }

    /// # Safety
    /// No other slice with a value of this range is alive.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the data, as just checked; exclusive, as the caller says.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }

    /// Where values begin that are all inside.
    #[cfg(target_arch = "x86_64")]
    pub fn pointer(&self, range: Range<usize>) -> Option<*mut T> {
        // SAFETY: inside the data, as just checked.
        (range.start <= range.end && range.end <= self.len).then(|| unsafe { self.data.add(range.start) })
    }
}

/// Values on cache lines of their own: two, as they are fetched in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

/// What the members of a team share.
#[derive(Debug, Default)]
struct Shared {
    /// One for each thread.
    posts: Box<[Apart<Post>]>,
    ahead: Apart<Ahead>,
    own: Apart<Own>,
    /// Threads that sleep for want of work.
    asleep: AtomicUsize,
    /// How often sleepers were called.
    calls: Mutex<usize>,
    alarm: Condvar,
    /// Whether the holder sleeps until nothing is left.
    waiting: AtomicBool,
    done: Condvar,
    ending: AtomicBool,
    /// What the first piece that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    queue: Mutex<Queue>,
    moved: Condvar,
    /// The thread that has the team, by its [`number`].
    holder: AtomicUsize,
}

/// What the holder alone looks at.
#[derive(Debug, Default)]
struct Own {
    /// Whether an operation is under way.
    busy: AtomicBool,
    /// Pieces of all operations so far.
    total: AtomicUsize,
}

/// A thread's share of an operation. All of it lies in one cache line, which goes from the holder to the thread once, and back once.
#[derive(Debug, Default)]
struct Post {
    /// Its pieces that nobody has taken yet: the first in the upper half, the end in the lower.
    pieces: AtomicU64,
    /// Written while nobody has a piece of this post, read by who has taken one and has not yet reported it.
    task: UnsafeCell<Option<Task>>,
    /// All pieces that the thread has ever done and reported, whosever they were. Nobody else writes it.
    done: AtomicUsize,
}

impl Post {
    fn split(pieces: u64) -> Range<usize> {
        (pieces >> 32) as usize..(pieces & u64::from(u32::MAX)) as usize
    }

    fn is_open(&self) -> bool {
        !Self::split(self.pieces.load(Relaxed)).is_empty()
    }

    /// Takes the first piece, or the last.
    fn take(&self, first: bool) -> Option<usize> {
        let next = |pieces| (!Self::split(pieces).is_empty()).then(|| if first { pieces + (1 << 32) } else { pieces - 1 });
        let Range { start, end } = Self::split(self.pieces.fetch_update(AcqRel, Relaxed, next).ok()?);
        Some(if first { start } else { end - 1 })
    }
}

#[derive(Debug, Clone, Copy)]
struct Task {
    /// Alive until every piece is done.
    f: *const (dyn Fn(usize) + Sync),
}

// SAFETY: a post's `task` is written by the holder alone while nobody has a piece of that post, and read between taking one and reporting
// it as done: never at the same time, and `pieces` and `done` order the two. What it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing belongs to a thread.
unsafe impl Send for Shared {}

impl Shared {
    fn run(&self, count: usize, f: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes. The pointer is followed only until every piece is done, which this waits for.
        let task = Task { f: unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f) } };
        let total = self.own.0.total.load(Relaxed).wrapping_add(count);
        self.own.0.total.store(total, Relaxed);
        // The holder's own post last: writes arrive in this order, and others wait for them. Whoever is early may take pieces of one while
        // the next is not written.
        for (thread, Apart(post)) in self.posts.iter().enumerate().rev() {
            let Range { start, end } = self.range(count, thread);
            // SAFETY: the holder calls this, one operation at a time: every piece of the last one is reported, and of this one none of
            // this post can be taken yet, so nobody reads.
            unsafe { *post.task.get() = Some(task) };
            post.pieces.store((start as u64) << 32 | end as u64, Release);
        }
        // Who falls asleep at this moment is called for the next operation: until then others do its pieces.
        if self.asleep.load(Relaxed) > 0 {
            self.call();
        }
        self.work(0);
        let done = || self.posts.iter().fold(0usize, |sum, Apart(post)| sum.wrapping_add(post.done.load(Acquire))) == total;
        self.ahead.0.read(0, self.posts.len(), done);
        if !spin(SPIN, done) {
            let mut calls = lock(&self.calls);
            self.waiting.store(true, Relaxed);
            // Whoever reports pieces looks afterwards whether anybody waits.
            fence(SeqCst);
            while !done() {
                calls = self.done.wait(calls).unwrap_or_else(PoisonError::into_inner);
            }
            self.waiting.store(false, Relaxed);
        }
        self.own.0.busy.store(false, Relaxed);
        let panic = lock(&self.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// The pieces of `count` that are a thread's.
    fn range(&self, count: usize, thread: usize) -> Range<usize> {
        part(count, 1, self.posts.len(), thread)
    }

    /// Does pieces until nobody has any, a thread's own first, and reports them.
    fn work(&self, thread: usize) {
        let mut done = 0;
        let others = || (1..self.posts.len()).map(|i| (thread + i) % self.posts.len());
        let first = || Some((thread, self.posts[thread].0.take(true)?));
        let last = || others().find_map(|other| Some((other, self.posts[other].0.take(false)?)));
        while let Some((of, piece)) = first().or_else(last) {
            // SAFETY: a piece was taken and is not reported, so the task is that of the piece and stays.
            if let Some(Task { f }) = unsafe { *self.posts[of].0.task.get() } {
                // SAFETY: as above, and so what it points to is alive.
                let f = unsafe { &*f };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(piece))) {
                    lock(&self.panic).get_or_insert(panic);
                }
            }
            done += 1;
        }
        if done > 0 {
            let Apart(own) = &self.posts[thread];
            own.done.store(own.done.load(Relaxed).wrapping_add(done), Release);
            // The holder says that it waits before a last look at what is done.
            fence(SeqCst);
            if self.waiting.load(Relaxed) {
                let _calls = lock(&self.calls);
                self.done.notify_all();
            }
        }
    }

    /// What a worker does all its life.
    fn serve(&self, thread: usize) {
        let is_open = || self.posts[thread].0.is_open();
        while !self.ending.load(Relaxed) {
            self.work(thread);
            self.ahead.0.read(thread, self.posts.len(), is_open);
            if !spin(REST, is_open) {
                let mut calls = lock(&self.calls);
                let heard = *calls;
                self.asleep.fetch_add(1, Relaxed);
                while *calls == heard && !is_open() && !self.ending.load(Relaxed) {
                    calls = self.alarm.wait(calls).unwrap_or_else(PoisonError::into_inner);
                }
                self.asleep.fetch_sub(1, Relaxed);
            }
        }
    }

    /// Wakes who sleeps.
    fn call(&self) {
        *lock(&self.calls) += 1;
        self.alarm.notify_all();
    }
}

/// Spins until something is so; false if that takes longer than is good for others on the processor.
fn spin(most: Duration, so: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..64 {
            if so() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() > most {
            return false;
        }
    }
}

/// Who holds the team, by numbers as at a counter.
#[derive(Debug, Default)]
struct Queue {
    next: u64,
    serving: u64,
}

/// The time in which a thread has the team.
struct Turn<'a>(&'a Shared);

impl<'a> Turn<'a> {
    fn new(shared: &'a Shared) -> Self {
        let mut queue = lock(&shared.queue);
        let own = queue.next;
        queue.next += 1;
        while queue.serving != own {
            queue = shared.moved.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        Self::begin(shared)
    }

    /// The turn, if nobody else has one or waits for one.
    fn at_once(shared: &'a Shared) -> Option<Self> {
        let mut queue = lock(&shared.queue);
        if queue.serving < queue.next {
            return None;
        }
        queue.next += 1;
        Some(Self::begin(shared))
    }

    fn begin(shared: &'a Shared) -> Self {
        shared.holder.store(number(), Relaxed);
        Self(shared)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.holder.store(0, Relaxed);
        let mut queue = lock(&self.0.queue);
        queue.serving += 1;
        // Waking costs a call of the system even if nobody waits.
        if queue.serving < queue.next {
            self.0.moved.notify_all();
        }
    }
}

/// A number that no other thread has, and that is not 0.
fn number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    thread_local!(static OWN: usize = NEXT.fetch_add(1, Relaxed));
    OWN.with(|number| *number)
}

/// Nothing that is locked here is left half-done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn parts_tile_the_range() {
        for (count, step, parts) in [(1, 4, 1), (9, 4, 2), (36, 4, 5), (3, 4, 8), (0, 4, 2)] {
            let ranges: Vec<_> = (0..parts).map(|i| part(count, step, parts, i)).collect();
            assert_eq!(ranges.iter().cloned().flatten().collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
        }
        assert_eq!([0, 1].map(|i| part(36, 4, 2, i)), [0..16, 16..36]);
    }

    #[test]
    fn every_piece_is_done_once() {
        for threads in [1, 2, 5, 70] {
            let team = Team::new(threads);
            assert_eq!(team.threads(), threads);
            team.hold(|| {
                for count in (0..300).chain([10_000]) {
                    let times: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                    team.run(count, |i| _ = times[i].fetch_add(1, Relaxed));
                    assert!(times.iter().all(|times| times.load(Relaxed) == 1));
                }
            });
        }
    }

    #[test]
    fn a_thread_has_neighbours_until_its_range_ends() {
        let team = Team::new(3);
        let ends = |count: usize| (0..count).filter(|&i| !team.goes_on(count, i)).collect::<Vec<_>>();
        assert_eq!([ends(9), ends(4), ends(2), ends(1)], [vec![2, 5, 8], vec![0, 1, 3], vec![0, 1], vec![0]]);
        for count in 1..200 {
            let expected: Vec<_> =
                (0..3).map(|thread| part(count, 1, 3, thread)).filter(|range| !range.is_empty()).map(|range| range.end - 1).collect();
            assert_eq!(ends(count), expected);
        }
    }

    #[test]
    fn sleepers_wake() {
        let team = Team::new(3);
        for _ in 0..20 {
            thread::sleep(4 * REST);
            let others = AtomicU64::new(0);
            let own = thread::current().id();
            // Whoever is first waits for another.
            team.hold(|| {
                team.run(2, |_| {
                    if thread::current().id() != own {
                        others.fetch_add(1, SeqCst);
                    } else {
                        while others.load(SeqCst) == 0 {
                            thread::yield_now();
                        }
                    }
                });
            });
        }
    }

    #[test]
    fn many_threads_do_what_one_does() {
        let f = |i: usize, chunk: &mut [usize]| chunk.iter_mut().enumerate().for_each(|(j, v)| *v = i * 10 + j);
        let fill = |team: &Team, work| {
            let mut data = vec![0; 1001];
            team.hold(|| team.chunks(&mut data, 10, work, f));
            data
        };
        let (one, many) = (Team::new(1), Team::new(4));
        let expected = fill(&one, 1);
        assert_eq!(expected[1000], 1000);
        assert!(fill(&many, 1) == expected && fill(&many, 1 << 20) == expected && fill(&many, 900) == expected);
    }

    #[test]
    fn callers_wait_for_each_other() {
        let team = Team::new(3);
        let inside = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        team.hold(|| {
                            assert_eq!(inside.fetch_add(1, SeqCst), 0);
                            let sum = AtomicUsize::new(0);
                            team.run(40, |i| _ = sum.fetch_add(i, Relaxed));
                            assert_eq!(sum.load(Relaxed), 780);
                            inside.fetch_sub(1, SeqCst);
                        });
                    }
                });
            }
        });
    }

    #[test]
    fn spreading_does_not_wait_for_a_pass() {
        let team = Team::new(3);
        let (inside, done) = (AtomicBool::new(false), AtomicUsize::new(0));
        let spread = || team.spread(40, |_| _ = done.fetch_add(1, SeqCst));
        spread();
        assert_eq!(done.load(SeqCst), 40);
        thread::scope(|scope| {
            scope.spawn(|| {
                team.hold(|| {
                    inside.store(true, SeqCst);
                    let start = Instant::now();
                    while done.load(SeqCst) < 80 && start.elapsed() < Duration::from_secs(20) {
                        thread::yield_now();
                    }
                    assert_eq!(done.load(SeqCst), 80, "it waited");
                });
            });
            while !inside.load(SeqCst) {
                thread::yield_now();
            }
            spread();
        });
        spread();
        team.hold(spread);
        assert_eq!(done.load(SeqCst), 160);
    }

    #[test]
    fn what_an_operation_begins_is_done_by_its_caller() {
        let team = Team::new(3);
        let done = AtomicUsize::new(0);
        let inner = || {
            let caller = thread::current().id();
            team.run(5, |_| {
                assert_eq!(thread::current().id(), caller);
                done.fetch_add(1, Relaxed);
            });
        };
        inner();
        team.hold(|| team.hold(|| team.run(10, |_| inner())));
        assert_eq!(done.load(Relaxed), 55);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3);
        for _ in 0..10 {
            let result = catch_unwind(AssertUnwindSafe(|| team.hold(|| team.run(9, |i| assert!(i != 5, "five")))));
            assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"five"));
            let sum = AtomicUsize::new(0);
            team.hold(|| team.run(9, |i| _ = sum.fetch_add(i, Relaxed)));
            assert_eq!(sum.load(Relaxed), 36);
        }
    }

    #[test]
    fn models_share_a_team() {
        let (one, two) = (Team::of(61), Team::of(61));
        assert!(Arc::ptr_eq(&one, &two));
        assert!(!Arc::ptr_eq(&one, &Team::of(60)));
    }
}
