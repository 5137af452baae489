//! Background work on collections: putting vectors into the graph, repairing around deleted ones, filling the index over
//! metadata, loading and saving graph files.
//!
//! Threads: `linker-N`, one for each core, at low priority: when writes and searches want all cores, linking waits, the
//! tail grows, and at [`TAIL_MAX`] vector writes wait for it. The queue holds each collection that has work once; its
//! lock is held to push or pop.
//!
//! Each piece of work is small: the collection's lock is held for tens of microseconds at a time, and a shutdown waits
//! for one piece.

use super::collections::SharedCollection;
use crate::vector::graph::Scratch;
use crate::vector::plan::GRAPH_FROM;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

/// Vectors waiting to be linked before vector writes wait for them. A search scans the tail: at 384 numbers 50,000 take
/// it half a millisecond.
pub const TAIL_MAX: usize = 50_000;
/// Lower priority than anything that answers a client.
const NICE: i32 = 10;

/// What collections share with the engine.
#[derive(Debug)]
pub struct Background {
    /// How far the log is durable, for the reuse of slots: what a crash of a relaxed mode could undo must not have been
    /// overwritten. `u64::MAX` in `always` mode, where everything applied is durable.
    pub durable: AtomicU64,
    /// From so many vectors on a collection gets a graph.
    pub graph_from: usize,
    queue: Mutex<Queue>,
    has_work: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Weak<SharedCollection>>,
    is_stopped: bool,
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
        Arc::new(Self { durable, graph_from, queue: Mutex::default(), has_work: Condvar::new() })
    }

    /// A collection has work; it must not be in the queue already.
    pub fn push(&self, collection: Weak<SharedCollection>) {
        self.queue.lock().waiting.push_back(collection);
        self.has_work.notify_one();
    }

    fn pop(&self) -> Option<Weak<SharedCollection>> {
        let mut queue = self.queue.lock();
        loop {
            if queue.is_stopped {
                return None;
            }
            if let Some(collection) = queue.waiting.pop_front() {
                return Some(collection);
            }
            self.has_work.wait(&mut queue);
        }
    }

    /// Starts the threads.
    #[must_use]
    pub fn start(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        (0..threads)
            .map(|number| {
                let background = Arc::clone(self);
                super::spawn(&format!("linker-{number}"), move || background.run())
            })
            .collect()
    }

    fn run(&self) {
        // On Linux this is the thread's own priority. Without it, linking only competes more.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "linkers run at normal priority");
        }
        let mut scratch = Scratch::default();
        while let Some(collection) = self.pop() {
            if let Some(collection) = collection.upgrade() {
                collection.work(&mut scratch);
            }
        }
    }

    /// Ends the threads after their current piece of work.
    pub fn stop(&self) {
        self.queue.lock().is_stopped = true;
        self.has_work.notify_all();
    }
}
