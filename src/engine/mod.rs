//! The engine: one log, and everything you get by applying it.
//!
//! The way of a write (follow it through the files in this order):
//! ```text
//! Command            command.rs    parsed by api/, every limit checked once
//!   -> Sequencer     sequencer.rs  drains what waits, hands out revisions
//!   -> decide        state.rs      pure: state + overlay + command -> events or a rejection
//!   -> prepare       prepare.rs    files and room for vectors, the only I/O that can be refused
//!   -> Wal           wal.rs        codec.rs encodes; one write, one fdatasync for the batch
//!   -> State::apply  state.rs      infallible; recovery calls the very same (many vectors: beside readers)
//!   -> Feed          feed.rs       shared frames, matched and woken on the feed's own thread
//!   -> reply                       to every waiter of the batch
//! ```
//! `decide` for the second command of a batch sees the first through an [`state::Overlay`] that lives as long as the batch.
//!
//! Invariants
//! - Durable before visible: reads, searches and streams see a record only after its sync (in `FSYNC=always`).
//! - One apply, two callers (of records of many vectors, that of the collection). Time is in the record; expiry is a record the sequencer makes.
//! - Revisions are handed out by one thread, consecutively, and never again.
//!
//! Locks, and why each: `state` (readers for microseconds; the sequencer to apply a batch), `snapshot_lock` (one snapshot
//! at a time), `replay_needed` (bookkeeping of kept snapshots). Those of streams stand in `feed.rs`, of vectors in
//! `collections.rs`, of consistent walks in `view.rs`.
//!
//! Threads: `sequencer`, `zeros` (ahead of the log), `feed`, `snapshots` (periodic), `upkeep`, `linker-N` and `stand-in`
//! (`linker.rs`), and `scan-N`, rayon's pool for large scans. Queues: commands ([`QUEUE_COMMANDS_MAX`]) and searches ([`SEARCHES_WAITING_MAX`]), both refused with `overloaded` when full.
//!
//! Deliberately absent: HTTP, a second writer, a lock held over I/O on the way of a read.

pub mod answers;
pub mod backup;
mod checkpoint;
pub mod clock;
pub mod codec;
pub mod collections;
pub mod command;
pub mod feed;
pub mod frame;
pub mod json;
pub mod linker;
pub mod metrics;
pub mod prefixes;
pub mod prepare;
pub mod recovery;
pub mod restore;
pub mod search;
pub mod sequencer;
pub mod snapshot;
pub mod state;
mod upkeep;
pub mod view;
pub mod wal;
pub mod zeros;

use crate::config::{Config, Fsync};
use crate::error::{Error, Rejection};
use crate::revision::Revision;
use crate::vector::collection::{Collection, Item};
use answers::Retry;
use clock::Clock;
use codec::{Entries, Entry};
use collections::SharedCollection;
use command::{Command, Committed, Op};
use feed::{EventFilter, Feed};
use frame::{Ephemeral, push_fmt};
use linker::Background;
use metrics::{Metrics, PlanLabels};
use parking_lot::{Condvar, Mutex, RwLock};
use prefixes::Prefixes;
use prepare::Preparer;
use search::{Search, SearchAnswer, SearchTicket};
use sequencer::{Request, Sequencer};
use snapshot::Pace;
use state::State;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use view::View;
use wal::Log;

/// Commands waiting for the sequencer. At 100,000 a second this is a tenth of a second of work.
pub const QUEUE_COMMANDS_MAX: usize = 16_384;
/// A record may be at least this large, and twice the largest body: a small batch of patches can write large values.
const RECORD_BYTES_MIN: usize = 64 << 20;
/// How often the files of deleted collections are removed, the log in memory is trimmed, and a log that is too long looked at.
const TIDY_EVERY: Duration = Duration::from_secs(2);
/// Two snapshots are kept, and the log from the older one on: with so many times `MAX_LOG_MB` it is time for the next.
const LOG_OVER: u64 = 2;
/// How long after an attempt that did not help before the next to shorten the log on a full disk.
const ROOM_RETRY: Duration = Duration::from_secs(30);
/// Searches waiting for a thread. Beyond that, waiting longer helps nobody.
pub const SEARCHES_WAITING_MAX: usize = 1024;
/// How often a vector write looks whether there is room, and for how long.
const ROOM_POLL: Duration = Duration::from_millis(2);
const ROOM_TIMEOUT: Duration = Duration::from_secs(30);
/// Linkers that got nowhere for so long have no core.
const STARVED_AFTER: Duration = Duration::from_millis(500);

/// Patches of values with more bytes than this together are slow: the writer reads them, at about 80 MB a second where they are made
/// of small fields.
const SLOW_PATCH_BYTES: usize = 256 << 10;
/// As much as this takes as long as a vector.
const PATCHED_BYTES_LIKE_A_VECTOR: usize = 16 << 10;

/// Collections there may be, however many files may be open.
const COLLECTIONS_MAX: usize = 10_000;
/// Files that a collection keeps open: its rows and its slot log.
pub const COLLECTION_FILES: usize = 2;

/// Collections there may be where so many files may be open: they take a quarter at most, so that connections and the log's
/// next segment always find theirs.
#[must_use]
pub fn collections_max(open_files_max: u64) -> usize {
    let files = usize::try_from(open_files_max).unwrap_or(usize::MAX);
    COLLECTIONS_MAX.min(files / 4 / COLLECTION_FILES)
}

/// Files this process may have open.
#[must_use]
pub fn open_files_max() -> u64 {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Where things are kept below the data directory.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named after the folders")]
pub struct Paths {
    pub dir: PathBuf,
    pub log: PathBuf,
    pub snapshots: PathBuf,
    pub vectors: PathBuf,
}

/// What the threads and handles of one engine share.
#[derive(Debug)]
pub struct Inner {
    state: RwLock<State>,
    feed: Arc<Feed>,
    log: Arc<Log>,
    clock: Clock,
    poison: Poison,
    /// The disk has no room for writes that need some.
    storage_full: AtomicBool,
    /// There was no room for rows of vectors.
    rows_full: AtomicBool,
    /// The log is being shortened on a full disk: what room there is belongs to the snapshot.
    is_making_room: AtomicBool,
    /// The server is stopping in order: whoever takes a snapshot hurries.
    stopping: AtomicBool,
    metrics: Metrics,
    fsync: Fsync,
    memory_bytes_max: usize,
    collections_max: usize,
    /// Largest record one command may become.
    record_bytes_max: usize,
    max_log_bytes: u64,
    paths: Option<Paths>,
    snapshot_lock: Mutex<()>,
    /// Kept snapshots: revision, and after which revision the log must be replayed over each.
    replay_needed: Mutex<Vec<(Revision, Revision)>>,
    searches_waiting: AtomicUsize,
    background: Arc<Background>,
}

impl Inner {
    /// Makes everything applied durable in the log. In `always` mode it is already. Refused once poisoned: a second sync
    /// would report success for pages the kernel has dropped.
    fn sync_log(&self) -> Result<(), Error> {
        if self.poison.is_set() {
            return Err(Error::Poisoned);
        }
        if self.fsync == Fsync::Always {
            return Ok(());
        }
        let applied = self.state.read().revision();
        let result = self.log.sync();
        match &result {
            Ok(()) => drop(self.background.durable.fetch_max(applied.0, Ordering::AcqRel)),
            Err(error) => self.poison(error),
        }
        result
    }

    /// After a failed write or sync.
    fn poison(&self, error: &Error) {
        tracing::error!(%error, "writing to disk failed: no more writes until this server is restarted");
        self.poison.set();
    }
}

/// Set once and for all when a write or a sync failed, or one of the engine's threads ended in a panic: no more writes until
/// the server is restarted, and health says so. Reads go on.
#[derive(Clone, Debug, Default)]
pub struct Poison(Arc<AtomicBool>);

impl Poison {
    /// Whether it is.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A handle to the engine. Cheap to clone; any thread.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
    queue: SyncSender<Request>,
}

/// The engine's threads; stop them in order with [`Threads::stop`].
#[derive(Debug)]
pub struct Threads {
    engine: Engine,
    sequencer: JoinHandle<()>,
    feed: JoinHandle<()>,
    linkers: Vec<JoinHandle<()>>,
    snapshots: JoinHandle<()>,
    /// Ends the wait of the snapshot thread.
    snapshots_stop: Arc<(Mutex<bool>, Condvar)>,
    /// Held until everything is written.
    _lock: Option<Arc<crate::disk::Held>>,
}

impl Engine {
    /// Recovers the data directory and starts the threads. Blocking.
    pub fn open(config: &Config) -> Result<(Self, Threads), Error> {
        let paths = config.data_dir.as_deref().map(Paths::below);
        // A log in memory is for streams that fall behind, and counts against the machine's memory.
        const MEMORY_LOG_BYTES_MAX: u64 = 256 << 20;
        let max_log_bytes =
            if paths.is_some() { config.max_log_bytes } else { config.max_log_bytes.min(MEMORY_LOG_BYTES_MAX) };
        // While recovering, everything is durable; in the relaxed modes the sequencer takes over from there.
        let background = Background::new();
        let poison = Poison::default();
        let recovered = recovery::recover(paths.as_ref(), max_log_bytes, &background)?;
        let log = Arc::clone(&recovered.wal.log);
        let head = recovered.wal.wal.head();
        if config.fsync != Fsync::Always && paths.is_some() {
            background.durable.store(head.0, Ordering::Release);
        }
        let (feed, feed_thread) = Feed::start(Arc::clone(&log), head, &poison);
        let preparer = Preparer::new(paths.as_ref().map(|p| p.vectors.clone()), &background);
        let inner = Arc::new(Inner {
            state: RwLock::new(recovered.state),
            feed,
            log,
            clock: Clock::start(),
            poison,
            storage_full: AtomicBool::new(false),
            rows_full: AtomicBool::new(false),
            is_making_room: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            metrics: Metrics::default(),
            fsync: config.fsync,
            memory_bytes_max: config.max_memory_bytes,
            collections_max: collections_max(open_files_max()),
            record_bytes_max: RECORD_BYTES_MIN.max(2 * config.max_body_bytes),
            max_log_bytes,
            paths,
            snapshot_lock: Mutex::new(()),
            replay_needed: Mutex::new(recovered.replay_needed),
            searches_waiting: AtomicUsize::new(0),
            background,
        });
        let (queue, commands) = sync_channel(QUEUE_COMMANDS_MAX);
        let sequencer = Sequencer::new(Arc::clone(&inner), recovered.wal.wal, preparer, commands, config.fsync);
        let engine = Self { inner, queue };
        let snapshots_stop = Arc::new((Mutex::new(false), Condvar::new()));
        let interval = Duration::from_secs(config.snapshot_interval_s);
        let threads = Threads {
            engine: engine.clone(),
            sequencer: spawn_vital("sequencer", &engine.inner.poison, move || sequencer.run()),
            feed: feed_thread,
            linkers: engine.inner.background.start(&engine.inner.poison),
            snapshots: spawn_vital("snapshots", &engine.inner.poison, {
                let (inner, stop) = (Arc::clone(&engine.inner), Arc::clone(&snapshots_stop));
                move || take_snapshots(&inner, interval, &stop)
            }),
            snapshots_stop,
            _lock: recovered.lock,
        };
        Ok((engine, threads))
    }

    /// Commits a command. Dropping the future does not undo it. One that writes vectors first waits while their collection
    /// has no room for more in its tail; others do not.
    pub async fn submit(&self, command: Command) -> Result<Committed, Rejection> {
        self.wait_for_room(&command).await?;
        let (reply, answer) = oneshot::channel();
        let slowness = self.slowness(&command);
        self.queue.try_send(Request::Commit((command, reply), slowness)).map_err(|e| match e {
            TrySendError::Full(_) => Rejection::Overloaded("too many writes are waiting; retry in a moment"),
            TrySendError::Disconnected(_) => self.ended(),
        })?;
        answer.await.unwrap_or_else(|_| Err(self.ended()))
    }

    /// What to say where the writer is gone. Ended in a panic, it may have written what it did not answer: that is not for
    /// another try, as it is at a stop.
    fn ended(&self) -> Rejection {
        let in_order = self.inner.stopping.load(Ordering::Relaxed) && !self.is_poisoned();
        if in_order { Rejection::ShuttingDown } else { Rejection::Poisoned }
    }

    /// What makes a command slow to decide or apply, so that others pass it: zero for most, else about how many vectors of an
    /// embedding it is worth.
    fn slowness(&self, command: &Command) -> usize {
        if command.ops.iter().any(Op::is_about_vectors) {
            return command.ops.iter().map(Op::weight).sum::<usize>().max(1);
        }
        let bytes = self.patched_bytes(command);
        if bytes > SLOW_PATCH_BYTES { bytes / PATCHED_BYTES_LIKE_A_VECTOR } else { 0 }
    }

    /// Bytes that a command's patches read and write, each a value: as large as it is now, or as the command itself makes it.
    #[must_use]
    pub fn patched_bytes(&self, command: &Command) -> usize {
        if !command.ops.iter().any(|op| matches!(op, Op::Patch { .. })) {
            return 0;
        }
        let mut made = HashMap::new();
        let mut bytes = 0;
        let state = self.inner.state.read();
        for op in &command.ops {
            match op {
                Op::Put { key, value, .. } if command.ops.len() > 1 => drop(made.insert(key, value.len())),
                Op::Patch { key, patch, .. } => {
                    let stored = || state.get(key.as_str(), 0).map_or(0, |entry| entry.value.len());
                    let whole = made.get(key).copied().unwrap_or_else(stored) + patch.len();
                    bytes += whole;
                    if command.ops.len() > 1 {
                        made.insert(key, whole);
                    }
                }
                _ => {}
            }
        }
        // With more it is refused.
        bytes.min(self.inner.record_bytes_max)
    }

    async fn wait_for_room(&self, command: &Command) -> Result<(), Rejection> {
        let mut last = None;
        for op in &command.ops {
            let Op::WriteVector { collection, vector: Some(_), .. } = op else { continue };
            if last == Some(collection) {
                continue;
            }
            last = Some(collection);
            // An unknown collection is for the sequencer to refuse: this command may create it.
            let Ok(shared) = self.collection(collection.as_str()) else { continue };
            let deadline = Instant::now() + ROOM_TIMEOUT;
            let mut seen = (shared.slots_done(), Instant::now());
            while !shared.has_room() {
                let now = Instant::now();
                if now >= deadline {
                    return Err(Rejection::Overloaded("the vector index is behind; retry in a moment"));
                }
                let done = shared.slots_done();
                if done.is_none() || done != seen.0 {
                    seen = (done, now);
                } else if now >= seen.1 + STARVED_AFTER {
                    self.inner.background.stand_in();
                }
                tokio::time::sleep(ROOM_POLL).await;
            }
        }
        Ok(())
    }

    /// What of a collection satisfies a filter, as of now, see [`SearchTicket::count_matching`], and the newest revision that had
    /// changed the collection.
    pub fn begin_match(&self, name: &str) -> Result<(SearchTicket, Revision), Rejection> {
        let collection = self.collection(name)?;
        let _settled = collection.settled();
        let state = self.inner.state.read();
        Ok((collection.begin_match(state.revision()), collection.read(|c| c.revision())))
    }

    /// What was said to a request that was answered before; `None` when it is new.
    #[must_use]
    pub fn remembered(&self, retry: &Retry) -> Option<Result<Committed, Rejection>> {
        Some(self.inner.state.read().answers().get(&retry.key, self.now_ms())?.to(retry))
    }

    /// A key's entry.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Arc<Entry>> {
        // The clock is read only for an entry that has a deadline.
        let entry = self.inner.state.read().get(key, 0).cloned()?;
        if entry.expires_at_ms.is_some() && !state::is_live(&entry, self.now_ms()) { None } else { Some(entry) }
    }

    /// Up to `limit` entries in key order after `after` within `prefix`, whether there are more, and the revision.
    #[must_use]
    pub fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> (Entries, bool, Revision) {
        let now_ms = self.now_ms();
        let state = self.inner.state.read();
        let mut range = state.range(prefix, after, now_ms);
        let items: Vec<_> = range.by_ref().take(limit).map(|(key, entry)| (key.clone(), Arc::clone(entry))).collect();
        (items, range.next().is_some(), state.revision())
    }

    /// Looks at a collection between two records.
    pub fn look_at<T>(&self, collection: &SharedCollection, look: impl FnOnce(&Collection) -> T) -> T {
        let _between = self.between_records(collection);
        collection.read(look)
    }

    /// Live vectors of a collection as of one revision; see [`SharedCollection::list`].
    #[must_use]
    pub fn list_vectors(
        &self,
        collection: &SharedCollection,
        after: Option<&str>,
        limit: usize,
        include_vector: bool,
    ) -> (Vec<Item>, Revision) {
        collection.list(after, limit, include_vector, || self.between_records(collection))
    }

    /// While it is held, nothing is applied to the collection.
    fn between_records<'a>(&'a self, collection: &'a SharedCollection) -> impl Sized + 'a {
        let settled = collection.settled();
        (self.inner.state.read(), settled)
    }

    /// A collection by name.
    pub fn collection(&self, name: &str) -> Result<Arc<SharedCollection>, Rejection> {
        self.inner.state.read().collection(name).cloned()
    }

    /// All collections by name.
    #[must_use]
    pub fn collections(&self) -> Vec<(String, Arc<SharedCollection>)> {
        let state = self.inner.state.read();
        state.collections().iter().map(|(name, c)| (name.as_str().to_owned(), Arc::clone(c))).collect()
    }

    /// Runs searches on one collection, all at the same revision, which is returned with the microseconds it took.
    /// `prepare` makes them once the collection is known; it may look at the collection.
    pub async fn search(
        &self,
        name: &str,
        prepare: impl FnOnce(&SharedCollection) -> Result<Vec<Search>, Rejection>,
    ) -> Result<(Vec<SearchAnswer>, Revision, u64), Rejection> {
        let started = Instant::now();
        let collection = self.collection(name)?;
        let mut searches = prepare(&collection)?;
        let (ticket, at) = {
            let _settled = collection.settled();
            let state = self.inner.state.read();
            // What an id stood for may have changed since; here it cannot.
            collection.read(|c| searches.iter_mut().try_for_each(|search| search.renew(c)))?;
            (collection.begin_search(state.revision(), &searches), state.revision())
        };
        let count = searches.len() as u64;
        let found = if ticket.is_cheap(&searches) {
            ticket.run(&searches)?
        } else {
            self.on_pool(move || ticket.run(&searches)).await??
        };
        let took = started.elapsed();
        self.inner.metrics.searches.inc_by(count);
        for answer in &found {
            self.inner.metrics.search_plans.get_or_create(&PlanLabels { plan: answer.plan.way.as_str() }).inc();
        }
        self.inner.metrics.search_seconds.observe(took.as_secs_f64());
        Ok((found, at, u64::try_from(took.as_micros()).unwrap_or(u64::MAX)))
    }

    /// Has a search done by the threads for that, unless too many are waiting for them.
    pub async fn on_pool<T: Send + 'static>(
        &self,
        search: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Rejection> {
        let waiting = &self.inner.searches_waiting;
        if waiting.fetch_add(1, Ordering::Relaxed) >= SEARCHES_WAITING_MAX {
            waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(Rejection::Overloaded("too many searches are waiting; retry in a moment"));
        }
        let (reply, answer) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        rayon::spawn(move || {
            // A panic is told where it happens and costs the one who asked, not all: the pool would end the process.
            let found = std::panic::catch_unwind(AssertUnwindSafe(search));
            inner.searches_waiting.fetch_sub(1, Ordering::Relaxed);
            // The client may have gone meanwhile.
            found.map(|found| reply.send(found)).ok();
        });
        answer.await.map_err(|_| Rejection::Overloaded("the search was given up; retry"))
    }

    /// Publishes a search to the streams that ask for searches.
    pub fn publish_search(&self, collection: &str, k: usize, hits: usize, took_us: u64) {
        if self.inner.feed.stats.search_watchers.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut members = String::new();
        push_fmt(&mut members, format_args!("\"k\":{k},\"hits\":{hits},\"took_us\":{took_us}"));
        self.inner.feed.publish_ephemeral(Ephemeral {
            ts_ms: self.now_ms(),
            event_type: "vector_search".into(),
            key: None,
            collection: Some(collection.into()),
            labels: None,
            members,
            on_request: true,
        });
    }

    /// A consistent walk over the keys for a stream that wants a snapshot.
    #[must_use]
    pub fn begin_view(&self, prefixes: Prefixes) -> Arc<View> {
        View::begin(&self.inner.state, prefixes, true)
    }

    /// The next slice of a walk; see [`View::slice`].
    pub fn view_slice(&self, view: &View, from: &str, prefix: &str, found: &mut Entries) -> Option<String> {
        view.slice(&self.inner.state, from, prefix, found)
    }

    /// Everything a filter with few keys wants to see, at one revision; `None` when it takes a walk.
    #[must_use]
    pub fn small_snapshot(&self, filter: &EventFilter) -> Option<(Entries, Revision)> {
        if filter.keys.is_empty() || !filter.prefixes.is_empty() {
            return None;
        }
        let state = self.inner.state.read();
        // Whatever its deadline: see `Walk`. At time 0 none has passed.
        let entries = filter.keys.iter().filter_map(|key| Some((key.clone(), Arc::clone(state.get(key.as_str(), 0)?))));
        let wanted = entries.filter(|(key, entry)| filter.wants_entry(key.as_str(), entry.labels.as_deref()));
        Some((wanted.collect(), state.revision()))
    }

    /// The streams.
    #[must_use]
    pub fn feed(&self) -> &Arc<Feed> {
        &self.inner.feed
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &Arc<Log> {
        &self.inner.log
    }

    /// Unix milliseconds by the engine's clock.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.inner.clock.now_ms()
    }

    /// The newest revision applied: durable, in `always` mode.
    #[must_use]
    pub fn head(&self) -> Revision {
        self.inner.state.read().revision()
    }

    /// Whether a failed write ended writing.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.inner.poison.is_set()
    }

    /// Whether the disk is full, so that writes that need space are refused.
    #[must_use]
    pub fn is_storage_full(&self) -> bool {
        self.inner.storage_full.load(Ordering::Relaxed)
    }

    /// Takes a snapshot now. Blocking.
    pub fn snapshot(&self, pace: Pace) -> Result<snapshot::Taken, Error> {
        take_snapshot(&self.inner, pace)
    }

    /// What the threads share, for the lab.
    #[cfg(test)]
    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Counters and histograms.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// The newest revision that is on disk; in `always` mode that is all of them.
    #[must_use]
    pub fn durable(&self) -> Revision {
        self.head().min(Revision(self.inner.background.durable.load(Ordering::Acquire)))
    }

    /// Memory of answers remembered for retries.
    #[must_use]
    pub fn answer_bytes(&self) -> usize {
        self.inner.state.read().answers().memory_bytes()
    }

    /// Keys and keys with a deadline.
    #[must_use]
    pub fn key_counts(&self) -> (usize, usize) {
        self.inner.state.read().key_counts()
    }

    /// Approximate bytes of keys and of vectors.
    #[must_use]
    pub fn memory_bytes(&self) -> (usize, usize) {
        self.inner.state.read().memory_bytes()
    }
}

impl Threads {
    /// Ends the engine in order: commit what waits, snapshot, close the log. Blocking. Streams should be drained before.
    pub fn stop(self) {
        self.engine.inner.stopping.store(true, Ordering::Relaxed);
        *self.snapshots_stop.0.lock() = true;
        self.snapshots_stop.1.notify_all();
        join(self.snapshots);
        // The queue may be full; the sequencer empties it.
        self.engine.queue.send(Request::Stop).ok();
        join(self.sequencer);
        self.engine.inner.background.stop();
        self.linkers.into_iter().for_each(join);
        self.engine.inner.feed.stop();
        join(self.feed);
        if !self.engine.is_poisoned()
            && let Err(error) = self.engine.snapshot(Pace::Fast)
        {
            tracing::error!(%error, "the last snapshot failed; the next start replays the log instead");
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    #[cfg(test)]
    let run = crate::lab::inherited(run);
    std::thread::Builder::new().name(name.into()).spawn(run).expect("the system can start a thread")
}

/// A thread without which the server must not look healthy: its panic poisons the engine.
fn spawn_vital(name: &str, poison: &Poison, run: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    struct Guard(String, Poison);
    impl Drop for Guard {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let thread = &self.0;
                tracing::error!(thread, "a thread ended in a panic: no more writes until this server is restarted");
                self.1.set();
            }
        }
    }
    let guard = Guard(name.into(), poison.clone());
    spawn(name, move || {
        let _guard = guard;
        run();
    })
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread ended in a panic");
    }
}

/// The `snapshots` thread. Tidies every [`TIDY_EVERY`], or every `interval` where that is shorter. Takes snapshots every `interval`;
/// zero is never. Takes one before its time when the log is [`LOG_OVER`] times what it should be, and has grown since the last by as
/// much as it should be.
fn take_snapshots(inner: &Inner, interval: Duration, stop: &(Mutex<bool>, Condvar)) {
    let mut last_revision = Revision::ZERO;
    let mut last_snapshot = Instant::now();
    // The log's bytes after the last: while something holds the log, another snapshot would not shorten it either.
    let mut last_bytes = 0;
    let mut next_try = Instant::now();
    loop {
        {
            let mut stopped = stop.0.lock();
            if !*stopped {
                // A wake-up for another reason only tidies early.
                let pause = if interval.is_zero() { TIDY_EVERY } else { TIDY_EVERY.min(interval) };
                stop.1.wait_for(&mut stopped, pause);
            }
            if *stopped {
                return;
            }
        }
        snapshot::tidy(inner);
        if inner.poison.is_set() {
            continue;
        }
        let is_full = inner.storage_full.load(Ordering::Relaxed) || inner.rows_full.swap(false, Ordering::Relaxed);
        let is_long = inner.log.bytes() > inner.max_log_bytes;
        if is_full && is_long && Instant::now() >= next_try && !make_room(inner) {
            next_try = Instant::now() + ROOM_RETRY;
        }
        let bytes = inner.log.bytes();
        // It may have been shortened since, by making room.
        last_bytes = bytes.min(last_bytes);
        let is_over = bytes > LOG_OVER * inner.max_log_bytes && bytes >= last_bytes + inner.max_log_bytes;
        if interval.is_zero() || (last_snapshot.elapsed() < interval && !is_over) {
            continue;
        }
        last_snapshot = Instant::now();
        // Linking goes on after the last write.
        let collections: Vec<_> = inner.state.read().collections().values().cloned().collect();
        collections.iter().for_each(|collection| collection.save_graph());
        if inner.state.read().revision() == last_revision {
            continue;
        }
        match take_snapshot(inner, Pace::Gentle) {
            Ok(taken) => {
                last_revision = taken.revision;
                tracing::debug!(revision = taken.revision.0, bytes = taken.bytes, took_ms = taken.took_ms, "snapshot");
            }
            Err(error) => tracing::error!(%error, "the snapshot failed; the log keeps everything meanwhile"),
        }
        last_bytes = inner.log.bytes();
    }
}

/// Whether the full disk has more room now.
fn make_room(inner: &Inner) -> bool {
    let before = inner.log.bytes();
    tracing::warn!(
        "the disk is full and the log longer than MAX_LOG_MB: it is shortened as far as a new snapshot allows"
    );
    let result = snapshot::make_room(inner);
    count_snapshot(inner, &result);
    if let Err(error) = &result {
        tracing::warn!(%error, "the log could not be shortened to make room on the full disk");
    }
    result.is_ok() && inner.log.bytes() < before
}

fn take_snapshot(inner: &Inner, pace: Pace) -> Result<snapshot::Taken, Error> {
    let result = snapshot::take(inner, pace);
    count_snapshot(inner, &result);
    result
}

fn count_snapshot<T>(inner: &Inner, result: &Result<T, Error>) {
    let counter = if result.is_ok() { &inner.metrics.snapshots } else { &inner.metrics.snapshot_failures };
    counter.inc();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Resolved;
    use command::{Condition, Key, Value};

    /// 42 KB of patches of one large value once held up all writers for seconds, also where they were refused.
    #[tokio::test]
    async fn patches_of_large_values_are_passed_by_other_writes() {
        let flags = [("ephemeral", "true".to_owned())];
        let config = Resolved::collect(Some("/dev/null".into()), |_| None, flags).unwrap().build().unwrap();
        let (engine, threads) = Engine::open(&config).unwrap();
        let condition = Condition::default;
        let put = |key: &str, value: String| {
            let (key, value) = (Key::new(key).unwrap(), Value::Json(value.into()));
            Command::one(Op::Put { key, value, ttl_ms: None, labels: None, condition: condition() })
        };
        let patch = || {
            let key = Key::new("large").unwrap();
            Command::one(Op::Patch { key, patch: "{}".into(), ttl_ms: None, condition: condition() })
        };
        let fields: Vec<String> = (0..100_000).map(|n| format!("\"k{n}\":{n}")).collect();
        engine.submit(put("large", format!("{{{}}}", fields.join(",")))).await.unwrap();
        let patches = futures_util::future::join_all((0..20).map(|_| engine.submit(patch())));
        let (patched, small) = tokio::join!(patches, engine.submit(put("small", "1".into())));
        let last = patched.into_iter().map(|committed| committed.unwrap().last_revision).max().unwrap();
        let small = small.unwrap().last_revision;
        assert!(small.plus(10) < last, "the put is {small}, the last patch {last}");
        // Also where the value is made by the command itself, and of it nothing may be left.
        let ops: Vec<Op> = [put("new", "x".repeat(60_000)), patch(), patch()].into_iter().flat_map(|c| c.ops).collect();
        let renamed = ops.into_iter().map(|op| match op {
            Op::Patch { patch, ttl_ms, condition, .. } => {
                Op::Patch { key: Key::new("new").unwrap(), patch, ttl_ms, condition }
            }
            other => other,
        });
        assert_eq!(engine.patched_bytes(&Command::batch(renamed.collect())), 2 * 60_000 + 2 + 4);
        threads.stop();
    }

    #[test]
    fn a_panic_of_a_vital_thread_poisons_and_an_orderly_end_does_not() {
        let poison = Poison::default();
        spawn_vital("orderly", &poison, || {}).join().unwrap();
        assert!(!poison.is_set());
        spawn_vital("panics", &poison, || panic!("as the test wants it")).join().unwrap_err();
        assert!(poison.is_set(), "the server would look healthy");
    }
}
