//! Background work on collections: making memory ready, putting vectors into the graph, repairing around deleted ones, measuring what
//! searches find, filling the index over metadata, loading graph files.
//!
//! Threads
//! - `upkeep`, one, as batch work: everything that takes a collection's lock, in slices of tens of microseconds, and hands out
//!   jobs.
//! - `linker-N`, one for each core, at idle priority: the jobs, which take milliseconds and no lock that anything else waits
//!   for. When writes and searches want all cores, linking waits and the tail grows; at [`TAIL_MAX`] vector writes wait for
//!   it, and searches that meet a long tail do a job each. At a low but not idle priority linkers kept the cores long enough
//!   to multiply the latency of key writes.
//! - `stand-in`, one, as batch work: their jobs, while vector writes wait and linkers get nowhere, as other programs keep all
//!   cores busy.
//!
//! Queues: `waiting` holds each collection that has work once; `jobs` and `stood_in` what collections have given out. Their
//! locks are held to push or pop. A shutdown waits for one job.

use super::collections::SharedCollection;
use super::upkeep::Job;
use super::{Poison, spawn_vital};
use crate::turns::{self, Turn};
use crate::vector::graph::Scratch;
use crate::vector::plan::GRAPH_FROM;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

/// Vectors waiting to be linked before vector writes wait for them. A search scans the tail: at 384 numbers 50,000 take
/// it half a millisecond.
pub const TAIL_MAX: usize = 50_000;

/// How long one stands in for linkers that had no core: each time they are given jobs again, vector writes first wait for those.
const STANDS_IN_MS: u64 = 60_000;

/// What collections share with the engine.
#[derive(Debug)]
pub struct Background {
    /// How far the log is durable, for the reuse of slots: what a crash of a relaxed mode could undo must not have been
    /// overwritten. `u64::MAX` in `always` mode, where everything applied is durable.
    pub durable: AtomicU64,
    /// From so many vectors on a collection gets a graph.
    pub graph_from: usize,
    waiting: Queue<Weak<SharedCollection>>,
    jobs: Queue<Job>,
    /// What the one that stands in for the linkers has to do, and until when jobs go there.
    stood_in: Queue<Job>,
    /// In milliseconds since `started`.
    stands_in_until: AtomicU64,
    /// Whether the linkers are to give up what they have in their hands.
    must_stop: Arc<AtomicBool>,
    started: Instant,
}

/// What one thread gives and another takes, until it is stopped.
#[derive(Debug)]
struct Queue<T> {
    items: Mutex<(VecDeque<T>, bool)>,
    has_some: Condvar,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { items: Mutex::new((VecDeque::new(), false)), has_some: Condvar::new() }
    }
}

impl<T> Queue<T> {
    fn push(&self, item: T) {
        self.items.lock().0.push_back(item);
        self.has_some.notify_one();
    }

    /// For what the others wait for.
    fn push_first(&self, item: T) {
        self.items.lock().0.push_front(item);
        self.has_some.notify_one();
    }

    /// The first that will do.
    fn try_pop(&self, will_do: impl Fn(&T) -> bool) -> Option<T> {
        let items = &mut self.items.lock().0;
        items.iter().position(will_do).and_then(|place| items.remove(place))
    }

    /// Waits for an item; `None` once stopped.
    fn pop(&self) -> Option<T> {
        let mut items = self.items.lock();
        while !items.1 {
            if let Some(item) = items.0.pop_front() {
                return Some(item);
            }
            self.has_some.wait(&mut items);
        }
        None
    }

    /// Ends all waiting and drops what is there.
    fn stop(&self) {
        let dropped = {
            let mut items = self.items.lock();
            items.1 = true;
            std::mem::take(&mut items.0)
        };
        self.has_some.notify_all();
        drop(dropped);
    }
}

impl Background {
    /// While recovering, everything is durable.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::with_graph_from(GRAPH_FROM)
    }

    /// As [`Background::new`], with graphs for smaller collections: for tests.
    #[must_use]
    pub fn with_graph_from(graph_from: usize) -> Arc<Self> {
        let durable = AtomicU64::new(u64::MAX);
        Arc::new(Self {
            durable,
            graph_from,
            waiting: Queue::default(),
            jobs: Queue::default(),
            stood_in: Queue::default(),
            stands_in_until: AtomicU64::new(0),
            must_stop: Arc::default(),
            started: Instant::now(),
        })
    }

    /// A collection has work; it must not be in the queue already.
    pub fn push(&self, collection: Weak<SharedCollection>) {
        self.waiting.push(collection);
    }

    /// Gives a job to the linkers.
    pub fn give_job(&self, job: Job) {
        let jobs = if self.stands_in() {
            &self.stood_in
        } else {
            self.must_stop.store(false, Ordering::Relaxed);
            &self.jobs
        };
        if job.is_populating() { jobs.push_first(job) } else { jobs.push(job) }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn stands_in(&self) -> bool {
        self.now_ms() < self.stands_in_until.load(Ordering::Relaxed)
    }

    /// Has one thread, as batch work, do what linkers would, for a while: programs that keep all cores busy leave them nothing, and
    /// vector writes wait for them. Linkers give up what they have in their hands, also within a walk: such a one was seen to take more
    /// than a minute of the clock.
    pub fn stand_in(&self) {
        let now_ms = self.now_ms();
        if self.stands_in_until.swap(now_ms + STANDS_IN_MS, Ordering::Relaxed) <= now_ms {
            tracing::info!("the linkers get no core: one thread of a higher priority stands in for them");
        }
        self.must_stop.store(true, Ordering::Relaxed);
        while let Some(job) = self.jobs.try_pop(|_| true) {
            self.stood_in.push(job);
        }
    }

    /// A job that nobody has taken yet and that will do.
    pub fn take_job(&self, will_do: impl Fn(&Job) -> bool) -> Option<Job> {
        self.jobs.try_pop(&will_do).or_else(|| self.stood_in.try_pop(&will_do))
    }

    /// Starts the threads.
    #[must_use]
    pub fn start(self: &Arc<Self>, poison: &Poison) -> Vec<JoinHandle<()>> {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let linker = |number| {
            let background = Arc::clone(self);
            spawn_vital(&format!("linker-{number}"), poison, move || background.link())
        };
        let background = Arc::clone(self);
        let upkeep = spawn_vital("upkeep", poison, move || background.keep_up());
        let background = Arc::clone(self);
        let stand_in = spawn_vital("stand-in", poison, move || background.link_in_their_place());
        [upkeep, stand_in].into_iter().chain((0..threads).map(linker)).collect()
    }

    fn keep_up(&self) {
        turns::take(Turn::Behind);
        while let Some(collection) = self.waiting.pop() {
            if let Some(collection) = collection.upgrade() {
                collection.work();
            }
            // Under a bulk load there is always more to do: whoever serves a request on this core shall not wait for the
            // end of a time slice, milliseconds away.
            std::thread::yield_now();
        }
    }

    fn link(&self) {
        turns::take(Turn::Last);
        let mut scratch = Scratch::stopped_by(Arc::clone(&self.must_stop));
        while let Some(job) = self.jobs.pop() {
            if let Some(rest) = job.run(&mut scratch) {
                self.give_job(rest);
            }
        }
    }

    fn link_in_their_place(&self) {
        turns::take(Turn::Behind);
        let mut scratch = Scratch::default();
        while let Some(job) = self.stood_in.pop() {
            job.run(&mut scratch);
        }
    }

    /// Ends the threads after their current piece of work.
    pub fn stop(&self) {
        self.waiting.stop();
        self.jobs.stop();
        self.stood_in.stop();
    }
}
