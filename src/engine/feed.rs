//! Streams: from committed records to whoever listens.
//!
//! ```text
//! sequencer ─publish─▶ Ring of recent events ◀─read─ Subscription (cursor + topic) ─▶ HTTP body
//!                        │                               ▲        └─ behind the ring: Log
//!                        └─▶ feed thread: match ─▶ Topic ┘ wake
//! ```
//!
//! A subscription is a cursor, not a queue: a position and a filter. Equal filters share a [`Topic`], which knows the
//! positions in the ring that match; topics are found by hashing what the event is about, so a commit costs what it
//! matches and not what is connected. A reader behind the ring reads the log until it has caught up; then it looks at
//! the ring again. It is one loop, so there is no hand-over at which an event could fall between the two.
//!
//! Invariants
//! - Ring revisions never go down; ephemeral events carry the head they were published at.
//! - A topic has noted every matching event from `complete_from` up to the feed's `matched` position.
//! - A subscription's `revision` covers everything up to it: delivered, or not matching.
//!
//! Locks, and why each: `ring` (pushed by the sequencer, read by streams, a few hundred nanoseconds); `registry` (changed
//! when a filter comes or goes, read by the feed thread); in each topic `noted` (pushed by the feed thread, and at its other
//! end by a stream that comes from before; read by its streams) and `waiters` apart from it, so that waking thousands does
//! not keep those already awake from reading; `history` (what was read from the log lately, copied out by those who come to
//! the same place).
//!
//! One thread: matching and waking 10,000 streams takes milliseconds, which must not stand between a write and its answer.

use super::codec::Record;
use super::command::Key;
use super::frame::{Ephemeral, Facets, Frame, Recent};
use super::prefixes::Prefixes;
use super::wal::Log;
use super::{Poison, spawn_vital};
use crate::error::Error;
use crate::revision::Revision;
use crate::vector::CollectionName;
use atomic_waker::AtomicWaker;
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinHandle};

/// Memory that recent events may keep alive for streams that are nearly level with the head, beside the newest batch: from 40,000
/// small events to eight of a megabyte.
const RING_BYTES_MAX: usize = 16 << 20;
/// Positions a topic notes; a stream further behind looks at the ring itself.
const TOPIC_NOTED_MAX: usize = 4096;
/// Events looked at under one hold of the ring's lock.
const RING_SCAN_EVENTS: usize = 2048;
/// Events times topics looked at under one hold of the topics' lock: some milliseconds.
const MATCHES_AT_ONCE: usize = 1 << 16;
/// Streams that read the log at the same time; more wait their turn.
const CATCH_UPS_MAX: usize = 8;
/// Bytes of log looked through at a time for one stream, some milliseconds, where little of it matches.
const CATCH_UP_BYTES: usize = 1 << 20;
/// What a part of it counts for beside its records.
const PART_BYTES: usize = 200;
/// Decoded log that a topic keeps while streams of it are behind.
const HISTORY_BYTES_MAX: usize = 8 << 20;
/// The same of all topics together; beyond it each stream reads the log by itself.
const HISTORIES_BYTES_MAX: usize = 256 << 20;
/// Most keys, prefixes, collections, types, jobs and tags in one filter.
pub const FILTER_TERMS_MAX: usize = 256;

/// What a stream wants to see. An empty set means "any".
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EventFilter {
    /// Exactly these keys,
    pub keys: BTreeSet<Key>,
    /// or keys that begin so,
    pub prefixes: Prefixes,
    /// or events of these collections,
    pub collections: BTreeSet<CollectionName>,
    /// or of any.
    pub all_collections: bool,
    /// And only these types,
    pub types: BTreeSet<Box<str>>,
    /// and only these jobs,
    pub job_ids: BTreeSet<Box<str>>,
    /// and only with one of these tags.
    pub tags: BTreeSet<Box<str>>,
}

impl EventFilter {
    /// Whether it names nothing to watch.
    #[must_use]
    pub fn watches_all(&self) -> bool {
        self.keys.is_empty() && self.prefixes.is_empty() && self.collections.is_empty() && !self.all_collections
    }

    /// How many terms it has, for the limit.
    #[must_use]
    pub fn terms(&self) -> usize {
        self.keys.len()
            + self.prefixes.len()
            + self.collections.len()
            + self.types.len()
            + self.job_ids.len()
            + self.tags.len()
    }

    /// Whether an entry's key and labels pass; types are about events and do not count here.
    #[must_use]
    pub fn wants_entry(&self, key: &str, labels: Option<&super::command::Labels>) -> bool {
        let facets = Facets { event_type: "", key: Some(key), collection: None, labels, on_request: false };
        self.watches(&facets) && self.labels_match(&facets)
    }

    /// Whether an event passes.
    #[must_use]
    pub fn wants(&self, facets: &Facets<'_>) -> bool {
        let type_matches =
            if self.types.is_empty() { !facets.on_request } else { self.types.contains(facets.event_type) };
        type_matches && self.watches(facets) && self.labels_match(facets)
    }

    fn watches(&self, facets: &Facets<'_>) -> bool {
        self.watches_all()
            || facets.key.is_some_and(|key| self.keys.contains(key) || self.prefixes.begin(key))
            || facets.collection.is_some_and(|c| self.all_collections || self.collections.contains(c))
    }

    fn labels_match(&self, facets: &Facets<'_>) -> bool {
        let job_matches = self.job_ids.is_empty()
            || facets.labels.and_then(|l| l.job_id.as_deref()).is_some_and(|job| self.job_ids.contains(job));
        let tag_matches =
            self.tags.is_empty() || facets.labels.is_some_and(|l| l.tags.iter().any(|tag| self.tags.contains(tag)));
        job_matches && tag_matches
    }
}

/// Recent events, by an ever-rising position.
#[derive(Debug)]
struct Ring {
    events: VecDeque<Recent>,
    /// Position of the first one.
    first: u64,
    bytes: usize,
    /// Every logged event after this revision is here.
    complete_after: Revision,
    /// The newest revision published.
    head: Revision,
}

impl Ring {
    /// Drops the oldest. Before a batch comes and not while it does: whoever is level with the head would miss its beginning.
    fn make_room(&mut self) {
        while self.bytes > RING_BYTES_MAX {
            let Some(gone) = self.events.pop_front() else { break };
            self.bytes -= gone.weight;
            self.first += 1;
            self.complete_after = gone.revision;
        }
    }

    fn push(&mut self, event: Recent) {
        self.bytes += event.weight;
        self.events.push_back(event);
    }

    fn end(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    fn get(&self, position: u64) -> Option<&Recent> {
        self.events.get(usize::try_from(position.checked_sub(self.first)?).ok()?)
    }
}

/// Everything published to streams.
#[derive(Debug)]
pub struct Feed {
    ring: RwLock<Ring>,
    registry: Mutex<Registry>,
    /// Topics have noted everything before this position…
    matched: AtomicU64,
    /// …which is everything up to this revision.
    matched_revision: AtomicU64,
    /// Tells the feed thread that there is something to match, or to stop.
    bell: (Mutex<Bell>, Condvar),
    log: Arc<Log>,
    catch_ups: Arc<Semaphore>,
    /// Of all topics' `history`.
    histories_bytes: Arc<AtomicUsize>,
    draining: AtomicBool,
    /// Whether anybody listens: while nobody does, the feed's thread sleeps through commits.
    has_topics: AtomicBool,
    /// Counts for metrics.
    pub stats: FeedStats,
}

/// Counts for metrics.
#[derive(Debug, Default)]
pub struct FeedStats {
    /// Open subscriptions.
    pub streams: AtomicU64,
    /// Frames handed to subscriptions.
    pub delivered: AtomicU64,
    /// Of the open ones, those that read the log.
    pub behind: AtomicU64,
    /// Times a stream had to read the log.
    pub ring_misses: AtomicU64,
    /// Times a stream was told that its position cannot be honoured.
    pub resets: AtomicU64,
    /// Streams that name `vector_search`: searches are published only while there are any.
    pub search_watchers: AtomicU64,
}

#[derive(Debug, Default)]
struct Bell {
    rung: bool,
    stop: bool,
}

/// Streams with equal filters.
#[derive(Debug)]
struct Topic {
    filter: EventFilter,
    noted: Mutex<Noted>,
    waiters: Mutex<HashMap<u64, Arc<Waiter>>>,
    /// What was read from the log lately, newest first: when streams come back together, their cursors coincide.
    history: Mutex<VecDeque<Part>>,
    /// Streams that read the log. While there are none, `history` is empty.
    behind: AtomicUsize,
}

/// What was read from the log for one stream.
#[derive(Debug)]
struct Part {
    read: Read,
    found: Arc<FoundFrames>,
    bytes: KeptBytes,
}

/// Matching frames, and up to where the log was read for them.
type FoundFrames = (Vec<Arc<Frame>>, Revision);

/// Bytes that count among all that topics keep, until this is dropped.
#[derive(Debug)]
struct KeptBytes {
    bytes: usize,
    all: Arc<AtomicUsize>,
}

impl KeptBytes {
    fn new(bytes: usize, all: &Arc<AtomicUsize>) -> Self {
        all.fetch_add(bytes, Ordering::Relaxed);
        Self { bytes, all: Arc::clone(all) }
    }
}

impl Drop for KeptBytes {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What was asked of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Read {
    after: Revision,
    frames_max: usize,
    bytes_max: usize,
}

impl Read {
    /// Frames that match, and about how much memory they keep alive: up to one of the maxima, to `head`, or over [`CATCH_UP_BYTES`]
    /// of the log. `None` when that no longer reaches back so far. Blocking.
    fn find(&self, log: &Log, head: Revision, filter: &EventFilter) -> Result<Option<(FoundFrames, usize)>, Error> {
        let (mut frames, mut reached, mut bytes) = (Vec::new(), self.after, PART_BYTES);
        // In steps, so that little is decoded beyond a maximum.
        for _ in 0..(CATCH_UP_BYTES / self.bytes_max).max(1) {
            if frames.len() >= self.frames_max || bytes >= self.bytes_max || reached >= head {
                break;
            }
            let history = match log.read_after(reached, head, self.bytes_max) {
                Ok(Some(history)) => history,
                // Just now dropped, or damaged: what lies before it goes out first.
                Ok(None) | Err(_) if reached > self.after => break,
                Ok(None) => return Ok(None),
                Err(error) => return Err(error),
            };
            let after = std::mem::replace(&mut reached, history.reached);
            'records: for record in &history.records {
                let (before, mut weight) = (frames.len(), 0);
                for event in Recent::of_record(record) {
                    weight += event.weight;
                    if event.revision > after && filter.wants(&event.facets()) {
                        if frames.len() == self.frames_max {
                            reached = event.revision.prev();
                            break 'records;
                        }
                        frames.push(Arc::clone(event.frame()));
                    }
                }
                if frames.len() > before {
                    // A frame keeps all of its record.
                    bytes += weight;
                }
            }
        }
        Ok(Some(((frames, reached), bytes)))
    }
}

#[derive(Debug)]
struct Noted {
    /// Positions of matching frames, all from `complete_from` on.
    positions: VecDeque<u64>,
    /// Every matching frame at or behind this position is in `positions`.
    complete_from: u64,
}

impl Noted {
    /// With what is noted from `position` on. Kept, what was noted before a gap would be taken for what comes behind it.
    fn begin_anew(&mut self, position: u64) {
        self.positions.clear();
        self.complete_from = position;
    }
}

#[derive(Debug, Default)]
struct Waiter {
    waker: AtomicWaker,
    /// Set until the stream looks again: it needs no second wake-up.
    woken: AtomicBool,
}

impl Waiter {
    fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }
}

type Topics = Vec<Arc<Topic>>;

/// Topics by what they watch. Each is filed under its most telling terms only; the rest of its filter is checked then.
#[derive(Debug, Default)]
struct Registry {
    topics: HashMap<EventFilter, Arc<Topic>>,
    by_key: HashMap<Key, Topics>,
    by_prefix: HashMap<Box<str>, Topics>,
    /// How many prefixes there are of each length: a key is looked up once for each length.
    prefix_lengths: BTreeMap<usize, usize>,
    by_collection: HashMap<CollectionName, Topics>,
    by_job: HashMap<Box<str>, Topics>,
    by_tag: HashMap<Box<str>, Topics>,
    by_type: HashMap<Box<str>, Topics>,
    rest: Topics,
    next_waiter: u64,
}

fn file<K: Hash + Eq + Clone>(map: &mut HashMap<K, Topics>, key: &K, topic: &Arc<Topic>, add: bool) {
    if add {
        map.entry(key.clone()).or_default().push(Arc::clone(topic));
    } else if let Some(list) = map.get_mut(key) {
        list.retain(|t| !Arc::ptr_eq(t, topic));
        if list.is_empty() {
            map.remove(key);
        }
    }
}

impl Registry {
    fn file_topic(&mut self, topic: &Arc<Topic>, add: bool) {
        let filter = &topic.filter;
        if filter.all_collections {
            self.file_under_rest(topic, add);
        }
        if !filter.watches_all() {
            filter.keys.iter().for_each(|k| file(&mut self.by_key, k, topic, add));
            filter.collections.iter().for_each(|c| file(&mut self.by_collection, c, topic, add));
            for prefix in filter.prefixes.iter() {
                file(&mut self.by_prefix, &prefix.into(), topic, add);
                let count = self.prefix_lengths.entry(prefix.len()).or_insert(0);
                *count = if add { *count + 1 } else { *count - 1 };
                if *count == 0 {
                    self.prefix_lengths.remove(&prefix.len());
                }
            }
        } else if !filter.job_ids.is_empty() {
            filter.job_ids.iter().for_each(|j| file(&mut self.by_job, j, topic, add));
        } else if !filter.tags.is_empty() {
            filter.tags.iter().for_each(|t| file(&mut self.by_tag, t, topic, add));
        } else if !filter.types.is_empty() {
            filter.types.iter().for_each(|t| file(&mut self.by_type, t, topic, add));
        } else {
            self.file_under_rest(topic, add);
        }
    }

    /// Looked at for every event.
    fn file_under_rest(&mut self, topic: &Arc<Topic>, add: bool) {
        if add {
            self.rest.push(Arc::clone(topic));
        } else {
            self.rest.retain(|t| !Arc::ptr_eq(t, topic));
        }
    }

    /// Calls `found` for topics that may want the event; a topic can come more than once.
    fn candidates<'a>(&'a self, facets: &Facets<'_>, mut found: impl FnMut(&'a Arc<Topic>)) {
        let mut each = |topics: Option<&'a Topics>| topics.into_iter().flatten().for_each(&mut found);
        each(Some(&self.rest));
        each(self.by_type.get(facets.event_type));
        if let Some(key) = facets.key {
            each(self.by_key.get(key));
            for length in self.prefix_lengths.range(..=key.len()).map(|(length, _)| *length) {
                each(key.get(..length).and_then(|prefix| self.by_prefix.get(prefix)));
            }
        }
        each(facets.collection.and_then(|c| self.by_collection.get(c)));
        if let Some(labels) = facets.labels {
            each(labels.job_id.as_ref().and_then(|j| self.by_job.get(j)));
            labels.tags.iter().for_each(|t| each(self.by_tag.get(t)));
        }
    }
}

/// Why a stream's position cannot be honoured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetReason {
    /// Older than the log.
    Compacted,
    /// Newer than the head.
    Future,
    /// Given up in a crash of a relaxed durability mode, or unreadable.
    Lost,
}

impl ResetReason {
    /// The contract's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compacted => "compacted",
            Self::Future => "future",
            Self::Lost => "lost",
        }
    }
}

/// What a subscription has for its reader.
#[derive(Debug)]
pub enum Step {
    /// Matching frames in order, at least one.
    Frames(Vec<Arc<Frame>>),
    /// The position cannot be honoured; the subscription stands at the head now.
    Reset(ResetReason, Revision),
    /// The server is stopping.
    Drained,
}

impl Feed {
    /// A feed that starts at `head`, and its thread.
    pub fn start(log: Arc<Log>, head: Revision, poison: &Poison) -> (Arc<Self>, std::thread::JoinHandle<()>) {
        let ring = Ring { events: VecDeque::new(), first: 0, bytes: 0, complete_after: head, head };
        let feed = Arc::new(Self {
            ring: RwLock::new(ring),
            registry: Mutex::new(Registry::default()),
            matched: AtomicU64::new(0),
            matched_revision: AtomicU64::new(head.0),
            bell: (Mutex::new(Bell::default()), Condvar::new()),
            log,
            catch_ups: Arc::new(Semaphore::new(CATCH_UPS_MAX)),
            histories_bytes: Arc::default(),
            draining: AtomicBool::new(false),
            has_topics: AtomicBool::new(false),
            stats: FeedStats::default(),
        });
        let thread = {
            let feed = Arc::clone(&feed);
            spawn_vital("feed", poison, move || feed.run())
        };
        (feed, thread)
    }

    /// Drops the oldest of the recent events, for a batch that will be published. Called by the sequencer while the disk works:
    /// what is dropped is long out of the processor's caches.
    pub fn make_room(&self) {
        // Looked at first: most batches need none, and streams are reading.
        if self.ring.read().bytes > RING_BYTES_MAX {
            self.ring.write().make_room();
        }
    }

    /// Publishes committed records, in order. Called by the sequencer alone.
    pub fn publish(&self, records: &[Arc<Record>]) {
        let Some(last) = records.last() else { return };
        {
            let mut ring = self.ring.write();
            for record in records {
                Recent::of_record(record).for_each(|event| ring.push(event));
            }
            ring.head = last.last_revision();
        }
        self.ring_bell();
    }

    /// Publishes an event that is not logged; returns the head it was published at.
    pub fn publish_ephemeral(&self, event: Ephemeral) -> Revision {
        let head = {
            let mut ring = self.ring.write();
            let head = ring.head;
            // Looked at under the lock: whoever listens says so before it looks where the ring ends. Kept for nobody, ephemeral
            // events would push out logged ones, which then have to be read from the log.
            if !self.has_topics.load(Ordering::SeqCst) {
                return head;
            }
            ring.make_room();
            ring.push(Recent::ephemeral(event, head));
            head
        };
        self.ring_bell();
        head
    }

    fn ring_bell(&self) {
        // Whoever subscribes after this look rings the bell itself.
        if !self.has_topics.load(Ordering::SeqCst) {
            return;
        }
        self.bell.0.lock().rung = true;
        self.bell.1.notify_one();
    }

    /// Tells every stream to end.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.wake_all();
    }

    /// Has every stream look around: what it may see has changed, or it has to end.
    pub fn wake_all(&self) {
        let topics: Vec<_> = self.registry.lock().topics.values().cloned().collect();
        for topic in topics {
            topic.waiters.lock().values().for_each(|w| w.wake());
        }
    }

    /// Whether streams are being told to end.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Ends the feed's thread.
    pub fn stop(&self) {
        self.bell.0.lock().stop = true;
        self.bell.1.notify_one();
    }

    fn run(&self) {
        loop {
            {
                let mut bell = self.bell.0.lock();
                while !bell.rung && !bell.stop {
                    self.bell.1.wait(&mut bell);
                }
                if bell.stop {
                    return;
                }
                bell.rung = false;
            }
            while self.match_some() {}
        }
    }

    /// Notes new events in the topics that want them and wakes those topics' streams. False when there was nothing new.
    fn match_some(&self) -> bool {
        let from = self.matched.load(Ordering::Acquire);
        // With each, all topics may have to be looked at, and meanwhile none can begin.
        let at_once = (MATCHES_AT_ONCE / self.registry.lock().topics.len().max(1)).clamp(1, RING_SCAN_EVENTS);
        let (first, start, events) = {
            let ring = self.ring.read();
            let start = from.max(ring.first);
            let skip = usize::try_from(start - ring.first).unwrap_or(usize::MAX);
            (ring.first, start, ring.events.iter().skip(skip).take(at_once).cloned().collect::<Vec<_>>())
        };
        // Where nothing is left, what was there must still be looked for in the log.
        if events.is_empty() && start == from {
            return false;
        }
        let registry = self.registry.lock();
        if start > from {
            // The ring moved on before these were matched: streams must look for themselves.
            registry.topics.values().for_each(|topic| topic.noted.lock().begin_anew(start));
        }
        let mut touched: Topics = if start > from { registry.topics.values().cloned().collect() } else { Vec::new() };
        if !registry.topics.is_empty() {
            for (position, event) in (start..).zip(&events) {
                let facets = event.facets();
                registry.candidates(&facets, |topic| {
                    if topic.filter.wants(&facets)
                        && topic.note(position, first)
                        && !touched.last().is_some_and(|t| Arc::ptr_eq(t, topic))
                    {
                        touched.push(Arc::clone(topic));
                    }
                });
            }
        }
        // A position within a batch is none to resume from.
        if let Some(whole) = events.iter().rev().find(|event| event.ends_record()) {
            self.matched_revision.store(whole.revision.0, Ordering::Release);
        }
        self.matched.store(start + events.len() as u64, Ordering::Release);
        drop(registry);
        touched.sort_by_key(Arc::as_ptr);
        touched.dedup_by(|a, b| Arc::ptr_eq(a, b));
        for topic in touched {
            topic.waiters.lock().values().for_each(|w| w.wake());
        }
        true
    }

    /// Oldest revision a stream can start after, plus one.
    #[must_use]
    pub fn oldest(&self) -> Revision {
        self.log.oldest()
    }

    /// The newest revision published.
    #[must_use]
    pub fn head(&self) -> Revision {
        self.ring.read().head
    }

    /// Why a stream cannot start after `revision`, if it cannot. `applied` is what reads show by now: it may be ahead of
    /// what is published by a moment.
    #[must_use]
    pub fn check_resume(&self, revision: Revision, applied: Revision) -> Option<ResetReason> {
        if revision == Revision::ZERO {
            return None;
        }
        if self.log.is_lost(revision) {
            Some(ResetReason::Lost)
        } else if revision > applied.max(self.head()) {
            Some(ResetReason::Future)
        } else if revision.next() < self.oldest() {
            Some(ResetReason::Compacted)
        } else {
            None
        }
    }

    /// A subscription that delivers what matches after `after`; zero = from the oldest.
    pub fn subscribe(self: &Arc<Self>, filter: EventFilter, after: Revision) -> Subscription {
        let after = if after == Revision::ZERO { self.oldest().prev() } else { after };
        let waiter = Arc::new(Waiter::default());
        let mut registry = self.registry.lock();
        let topic = match registry.topics.get(&filter) {
            Some(topic) => Arc::clone(topic),
            None => {
                // Under the registry's lock nothing is being matched, so this is exact.
                let complete_from = self.matched.load(Ordering::Acquire);
                let topic = Arc::new(Topic {
                    filter: filter.clone(),
                    noted: Mutex::new(Noted { positions: VecDeque::new(), complete_from }),
                    waiters: Mutex::new(HashMap::new()),
                    history: Mutex::default(),
                    behind: AtomicUsize::new(0),
                });
                registry.topics.insert(filter, Arc::clone(&topic));
                registry.file_topic(&topic, true);
                topic
            }
        };
        let id = registry.next_waiter;
        registry.next_waiter += 1;
        topic.waiters.lock().insert(id, Arc::clone(&waiter));
        let is_first = !self.has_topics.swap(true, Ordering::SeqCst);
        drop(registry);
        if is_first {
            // What was published while nobody listened is still to be matched.
            self.ring_bell();
        }
        self.stats.streams.fetch_add(1, Ordering::Relaxed);
        let watches_searches = topic.filter.types.contains("vector_search");
        if watches_searches {
            self.stats.search_watchers.fetch_add(1, Ordering::Relaxed);
        }
        let mut subscription = Subscription {
            feed: Arc::clone(self),
            topic,
            waiter,
            id,
            revision: after,
            position: None,
            began: self.ring.read().end(),
            catching_up: None,
            watches_searches,
            by_ring: false,
            is_behind: false,
        };
        // Now, rather than when it is first polled: ephemeral events have no revision of their own to be found by.
        subscription.locate();
        subscription
    }
}

impl Topic {
    /// Notes a matching position; false when it was noted already (two of the topic's terms matched). What the ring, which begins
    /// at `first`, has no more is forgotten.
    fn note(&self, position: u64, first: u64) -> bool {
        let mut noted = self.noted.lock();
        if noted.positions.back() == Some(&position) {
            return false;
        }
        while let Some(&oldest) = noted.positions.front()
            && (oldest < first || noted.positions.len() == TOPIC_NOTED_MAX)
        {
            noted.positions.pop_front();
            noted.complete_from = oldest + 1;
        }
        noted.positions.push_back(position);
        true
    }

    /// Notes what matches in the last events before those it knows, towards `position`: streams that come back together look
    /// through the ring once for all. False when the ring begins later, or another stream was faster.
    fn reach_back(&self, ring: &RwLock<Ring>, position: u64) -> bool {
        let end = self.noted.lock().complete_from;
        if end <= position {
            // Another stream was faster, and reached further.
            return true;
        }
        let start = position.max(end.saturating_sub(RING_SCAN_EVENTS as u64));
        let found: Vec<u64> = {
            let ring = ring.read();
            if start < ring.first {
                return false;
            }
            let wanted = |&at: &u64| ring.get(at).is_some_and(|event| self.filter.wants(&event.facets()));
            (start..end).filter(wanted).collect()
        };
        let mut noted = self.noted.lock();
        if noted.complete_from != end {
            return false;
        }
        noted.complete_from = start;
        for position in found.into_iter().rev() {
            if noted.positions.len() == TOPIC_NOTED_MAX {
                noted.complete_from = position + 1;
                break;
            }
            noted.positions.push_front(position);
        }
        noted.complete_from < end
    }

    /// Keeps what was read for the other streams of this topic that are behind.
    fn keep_history(&self, read: Read, found: &FoundFrames, bytes: usize, head: Revision, all: &Arc<AtomicUsize>) {
        // What reaches the head may be more for the next one to read. Looked at under the lock, so that nothing is kept once
        // the last stream is level.
        let mut history = self.history.lock();
        let is_shared = self.behind.load(Ordering::Relaxed) > 1;
        if !is_shared || found.1 >= head || bytes > HISTORY_BYTES_MAX || history.iter().any(|part| part.read == read) {
            return;
        }
        if all.load(Ordering::Relaxed) + bytes > HISTORIES_BYTES_MAX {
            return;
        }
        history.push_front(Part { read, found: Arc::new(found.clone()), bytes: KeptBytes::new(bytes, all) });
        while history.iter().map(|part| part.bytes.bytes).sum::<usize>() > HISTORY_BYTES_MAX {
            history.pop_back();
        }
    }
}

type CaughtUp = Result<Option<FoundFrames>, Error>;

/// A cursor over the log with a filter: what a stream holds.
#[derive(Debug)]
pub struct Subscription {
    feed: Arc<Feed>,
    topic: Arc<Topic>,
    waiter: Arc<Waiter>,
    id: u64,
    /// Everything up to here was delivered or does not match.
    revision: Revision,
    /// The next position of the ring to look at; `None` while behind the ring.
    position: Option<u64>,
    /// Where the ring ended when it began. Ephemeral events published before are not for it.
    began: u64,
    catching_up: Option<JoinHandle<Result<CaughtUp, JoinError>>>,
    watches_searches: bool,
    /// Filters the ring itself, up to its very end; see [`Subscription::look_at_everything`].
    by_ring: bool,
    /// Reads the log, and is counted so in its topic.
    is_behind: bool,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // One that is in line for the log reads nothing more.
        if let Some(task) = self.catching_up.take() {
            task.abort();
        }
        self.set_behind(false);
        self.feed.stats.streams.fetch_sub(1, Ordering::Relaxed);
        if self.watches_searches {
            self.feed.stats.search_watchers.fetch_sub(1, Ordering::Relaxed);
        }
        let mut registry = self.feed.registry.lock();
        let mut waiters = self.topic.waiters.lock();
        waiters.remove(&self.id);
        if waiters.is_empty() {
            drop(waiters);
            registry.topics.remove(&self.topic.filter);
            registry.file_topic(&self.topic, false);
            if registry.topics.is_empty() {
                self.feed.has_topics.store(false, Ordering::SeqCst);
            }
        }
    }
}

/// What looking at the ring gave.
enum Look {
    Frames(Vec<Arc<Frame>>),
    /// Nothing that matches yet; the position advanced to what was looked at.
    Nothing,
    /// There is more to look at.
    Again,
    Behind,
}

impl Subscription {
    /// Everything up to here was delivered or does not match: safe to resume after.
    #[must_use]
    pub fn reached(&self) -> Revision {
        self.revision
    }

    /// What this subscription wants to see.
    #[must_use]
    pub fn filter(&self) -> &EventFilter {
        &self.topic.filter
    }

    /// From now on "pending" means that nothing published so far is left, even if the feed's thread has not matched it
    /// yet. Costs a look at every event, so it is for pages of history, not for streams.
    pub fn look_at_everything(&mut self) {
        self.by_ring = true;
    }

    /// The opposite: it is woken by what the feed's thread has matched, and moved on by what has not.
    pub fn look_at_matches(&mut self) {
        self.by_ring = false;
    }

    /// Whether it reads the log, rather than recent events in memory.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.is_behind
    }

    /// Whether the log is being read for this subscription.
    #[must_use]
    pub fn is_catching_up(&self) -> bool {
        self.catching_up.is_some()
    }

    /// Matching frames, about `bytes_max` of them; pending until there are some.
    pub fn poll_step(&mut self, cx: &mut Context<'_>, frames_max: usize, bytes_max: usize) -> Poll<Step> {
        loop {
            if let Some(task) = &mut self.catching_up {
                let result = std::task::ready!(std::pin::Pin::new(task).poll(cx));
                self.catching_up = None;
                if let Some(step) = self.caught_up(result.and_then(|read| read)) {
                    return Poll::Ready(step);
                }
                continue;
            }
            if self.poll_draining(cx) {
                return Poll::Ready(Step::Drained);
            }
            match self.look(frames_max, bytes_max) {
                Look::Frames(frames) => {
                    self.feed.stats.delivered.fetch_add(frames.len() as u64, Ordering::Relaxed);
                    return Poll::Ready(Step::Frames(frames));
                }
                Look::Nothing => return Poll::Pending,
                Look::Again => {}
                Look::Behind => self.start_catch_up(frames_max, bytes_max),
            }
        }
    }

    /// Whether streams are being told to end; whoever waits for something else is woken for that, and for what it wants to see.
    pub fn poll_draining(&self, cx: &mut Context<'_>) -> bool {
        // In this order: a wake-up in between finds the waker, one before is seen to by whoever asks.
        self.waiter.waker.register(cx.waker());
        self.waiter.woken.swap(false, Ordering::AcqRel);
        self.feed.is_draining()
    }

    /// Finds the cursor's place in the ring, if the ring reaches back that far.
    fn locate(&mut self) {
        let ring = self.feed.ring.read();
        if self.revision >= ring.complete_after {
            let from = |at: usize| ring.first + at as u64;
            let reached = from(ring.events.partition_point(|event| event.revision < self.revision));
            let passed = from(ring.events.partition_point(|event| event.revision <= self.revision));
            // In between may be ephemeral events that came after it had begun: while it read the log, or its snapshot.
            self.position = Some(passed.min(self.began).max(reached));
            drop(ring);
            self.set_behind(false);
        }
    }

    /// Notes whether this stream reads the log; when the last of its topic is level, what was kept for them goes.
    fn set_behind(&mut self, is_behind: bool) {
        if self.is_behind == is_behind {
            return;
        }
        self.is_behind = is_behind;
        if is_behind {
            self.feed.stats.behind.fetch_add(1, Ordering::Relaxed);
            self.topic.behind.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.feed.stats.behind.fetch_sub(1, Ordering::Relaxed);
        let mut history = self.topic.history.lock();
        if self.topic.behind.fetch_sub(1, Ordering::Relaxed) == 1 {
            history.clear();
        }
    }

    fn look(&mut self, frames_max: usize, bytes_max: usize) -> Look {
        let Some(position) = self.position else {
            self.locate();
            return if self.position.is_some() { Look::Again } else { Look::Behind };
        };
        // Read before the topic: what is noted later has a later position.
        let matched_revision = Revision(self.feed.matched_revision.load(Ordering::Acquire));
        let matched = self.feed.matched.load(Ordering::Acquire);
        let positions: Vec<u64> = {
            let noted = self.topic.noted.lock();
            if position < noted.complete_from || self.by_ring {
                let can_reach_back = !self.by_ring && noted.positions.len() < TOPIC_NOTED_MAX;
                drop(noted);
                if can_reach_back && self.topic.reach_back(&self.feed.ring, position) {
                    return Look::Again;
                }
                return self.look_at_ring(position, frames_max, bytes_max);
            }
            let from = noted.positions.partition_point(|&p| p < position);
            noted.positions.range(from..).take(frames_max).copied().collect()
        };
        if positions.is_empty() {
            if matched > position {
                self.position = Some(matched);
            }
            // Whichever of both is the newer: what matches up to it was noted before it was stored, and looked for after.
            if matched >= position {
                self.revision = self.revision.max(matched_revision);
            }
            return Look::Nothing;
        }
        let ring = self.feed.ring.read();
        let mut frames = Vec::with_capacity(positions.len());
        let mut bytes = 0;
        for position in positions {
            let Some(event) = ring.get(position) else {
                if frames.is_empty() {
                    self.position = None;
                    return Look::Behind;
                }
                break;
            };
            self.position = Some(position + 1);
            if !self.is_new(event, position) {
                continue;
            }
            self.revision = self.revision.max(event.revision);
            bytes += event.weight;
            frames.push(Arc::clone(event.frame()));
            if bytes >= bytes_max {
                break;
            }
        }
        if frames.is_empty() { Look::Again } else { Look::Frames(frames) }
    }

    /// Whether an event of the ring has not been told yet. A snapshot may have shown what the ring only gets now.
    fn is_new(&self, event: &Recent, position: u64) -> bool {
        if event.is_logged() {
            event.revision > self.revision
        } else {
            // One of before what its snapshot showed would take its id back.
            position >= self.began && event.revision >= self.revision
        }
    }

    /// Filters the ring itself: for a stream whose topic cannot reach back that far.
    fn look_at_ring(&mut self, position: u64, frames_max: usize, bytes_max: usize) -> Look {
        let ring = self.feed.ring.read();
        if position < ring.first {
            self.position = None;
            return Look::Again;
        }
        let end = ring.end().min(position + RING_SCAN_EVENTS as u64);
        let mut frames = Vec::new();
        let mut bytes = 0;
        let mut at = position;
        while at < end && frames.len() < frames_max && bytes < bytes_max {
            let Some(event) = ring.get(at) else { break };
            let is_new = self.is_new(event, at);
            at += 1;
            if is_new && self.topic.filter.wants(&event.facets()) {
                bytes += event.weight;
                frames.push(Arc::clone(event.frame()));
            }
            self.revision = self.revision.max(event.revision);
        }
        self.position = Some(at);
        if !frames.is_empty() {
            return Look::Frames(frames);
        }
        if at == position { Look::Nothing } else { Look::Again }
    }

    fn start_catch_up(&mut self, frames_max: usize, bytes_max: usize) {
        self.position = None;
        self.set_behind(true);
        self.feed.stats.ring_misses.fetch_add(1, Ordering::Relaxed);
        let feed = Arc::clone(&self.feed);
        let topic = Arc::clone(&self.topic);
        let after = self.revision;
        self.catching_up = Some(tokio::spawn(async move {
            let permit = Arc::clone(&feed.catch_ups).acquire_owned().await;
            // After the wait: whoever went first may have read the same.
            let read = Read { after, frames_max, bytes_max };
            if let Some(part) = topic.history.lock().iter().find(|part| part.read == read) {
                return Ok(Ok(Some((*part.found).clone())));
            }
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let head = feed.head();
                let Some((found, bytes)) = read.find(&feed.log, head, &topic.filter)? else { return Ok(None) };
                topic.keep_history(read, &found, bytes, head, &feed.histories_bytes);
                Ok(Some(found))
            })
            .await
        }));
    }

    fn caught_up(&mut self, result: Result<CaughtUp, JoinError>) -> Option<Step> {
        let reason = match result {
            Ok(Ok(Some((frames, reached)))) => {
                self.revision = self.revision.max(reached);
                self.feed.stats.delivered.fetch_add(frames.len() as u64, Ordering::Relaxed);
                return (!frames.is_empty()).then_some(Step::Frames(frames));
            }
            Ok(Ok(None)) => ResetReason::Compacted,
            Ok(Err(error)) => {
                tracing::error!(%error, "a stream cannot read the log");
                ResetReason::Lost
            }
            Err(error) if error.is_panic() => {
                tracing::error!("a thread that read the log for a stream ended in a panic");
                ResetReason::Lost
            }
            // The runtime is shutting down.
            Err(_) => return Some(Step::Drained),
        };
        let requested = self.revision;
        self.move_to(self.feed.head());
        Some(Step::Reset(reason, requested))
    }

    /// Goes on after `revision`, forgetting where it was.
    pub fn move_to(&mut self, revision: Revision) {
        self.revision = revision;
        self.position = None;
        self.catching_up = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::codec::Event;
    use crate::engine::command::EventType;
    use crate::engine::wal::{OpenedWal, Wal};
    use smallvec::smallvec;
    use std::future::poll_fn;
    use std::time::Duration;

    fn start() -> (Arc<Feed>, Wal) {
        let (feed, wal, _) = start_with_thread();
        (feed, wal)
    }

    fn start_with_thread() -> (Arc<Feed>, Wal, std::thread::JoinHandle<()>) {
        let opened = Wal::open(None, 64 << 20, Revision::ZERO, Revision::ZERO, |_| Ok(()));
        let OpenedWal { wal, log, .. } = opened.unwrap();
        let (feed, thread) = Feed::start(log, Revision::ZERO, &Poison::default());
        (feed, wal, thread)
    }

    /// Matching is for the test to begin.
    fn start_stopped() -> (Arc<Feed>, Wal) {
        let (feed, wal, thread) = start_with_thread();
        feed.stop();
        thread.join().unwrap();
        (feed, wal)
    }

    /// As the writer does.
    fn publish(feed: &Feed, wal: &mut Wal, data_bytes: usize) {
        let event = Event::Published {
            event_type: EventType::new("t").unwrap(),
            key: None,
            data: Some(format!("\"{}\"", "x".repeat(data_bytes)).into()),
            labels: None,
        };
        let first_revision = wal.head().next();
        let record = Arc::new(Record { first_revision, ts_ms: 1, events: smallvec![event], answer: None });
        wal.stage(&record);
        wal.flush().unwrap();
        wal.publish();
        feed.make_room();
        feed.publish(&[record]);
    }

    fn ephemeral() -> Ephemeral {
        Ephemeral {
            ts_ms: 1,
            event_type: "t".into(),
            key: None,
            collection: None,
            labels: None,
            members: String::new(),
            on_request: false,
        }
    }

    /// What comes next: revisions, and whether it is logged.
    async fn step(subscription: &mut Subscription) -> Vec<(u64, bool)> {
        let step = poll_fn(|cx| subscription.poll_step(cx, 100, 1 << 20));
        let step = tokio::time::timeout(Duration::from_secs(60), step).await.expect("something was missed");
        let Step::Frames(frames) = step else { panic!("{step:?}") };
        frames.iter().map(|frame| (frame.revision.0, frame.is_logged())).collect()
    }

    /// Takes what comes up to `last`: every event once, in order.
    async fn read(subscription: &mut Subscription, last: u64) {
        while subscription.reached() < Revision(last) {
            let before = subscription.reached().0;
            let frames = step(subscription).await;
            assert_eq!(frames, (before + 1..).map(|n| (n, true)).take(frames.len()).collect::<Vec<_>>());
        }
    }

    /// A cursor that goes over between log and ring, while the ring moves on and is filled for nobody.
    #[tokio::test(flavor = "multi_thread")]
    async fn who_comes_and_goes_misses_nothing() {
        /// Each weighs twice its length: of 800 and more the ring has lost some.
        const EVENT_BYTES: usize = 10_000;
        const EVENTS: u64 = 6_000;
        const LEAD: u64 = 1_000;
        let (feed, mut wal) = start();
        let reached = Arc::new(AtomicU64::new(0));
        let writer = std::thread::spawn({
            let (feed, reached) = (Arc::clone(&feed), Arc::clone(&reached));
            move || {
                for n in 0..EVENTS {
                    while n >= reached.load(Ordering::Acquire) + LEAD {
                        std::thread::yield_now();
                    }
                    publish(&feed, &mut wal, EVENT_BYTES);
                }
            }
        });
        for round in 0.. {
            let from = reached.load(Ordering::Acquire);
            // Now from far behind, now from where it was.
            let first = if round % 8 == 0 { (from + LEAD).min(EVENTS) } else { from };
            while feed.head() < Revision(first) {
                assert!(!writer.is_finished() || feed.head() >= Revision(first), "the writer has ended early");
                std::thread::yield_now();
            }
            let mut subscription = feed.subscribe(EventFilter::default(), Revision(from));
            read(&mut subscription, (from + round % 50).min(EVENTS)).await;
            reached.store(subscription.reached().0, Ordering::Release);
            if subscription.reached() == Revision(EVENTS) {
                break;
            }
        }
        let misses = feed.stats.ring_misses.load(Ordering::Relaxed);
        assert!(misses > 2, "it was to read the log again and again: {misses}");
        writer.join().unwrap();
        feed.stop();
    }

    /// A topic that has noted as much as it may would forget that there is a gap, one old position after the other.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_ring_that_ran_ahead_of_the_matching_leaves_no_gap() {
        const NOTED: u64 = TOPIC_NOTED_MAX as u64 + 100;
        let (feed, mut wal, thread) = start_with_thread();
        let mut subscription = feed.subscribe(EventFilter::default(), Revision::ZERO);
        (0..NOTED).for_each(|_| publish(&feed, &mut wal, 1));
        while feed.matched.load(Ordering::Acquire) < NOTED {
            std::thread::yield_now();
        }
        read(&mut subscription, NOTED).await;
        // From here on matching is for this test to begin.
        feed.stop();
        thread.join().unwrap();
        (0..20).for_each(|_| publish(&feed, &mut wal, 1 << 20));
        assert!(feed.ring.read().first > NOTED, "the ring still has what is to be missed");
        while feed.match_some() {}
        read(&mut subscription, NOTED + 20).await;
    }

    /// A value of half the ring's size and more goes at the next batch, matched or not.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_event_larger_than_the_ring_reaches_whoever_is_level() {
        let (feed, mut wal) = start_stopped();
        let mut subscription = feed.subscribe(EventFilter::default(), Revision::ZERO);
        let waiting = tokio::time::timeout(Duration::from_millis(1), step(&mut subscription)).await;
        assert!(waiting.is_err(), "there is nothing yet");
        publish(&feed, &mut wal, RING_BYTES_MAX / 2);
        feed.make_room();
        assert!(feed.ring.read().events.is_empty());
        while feed.match_some() {}
        read(&mut subscription, 1).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_id_never_goes_back_for_an_ephemeral_event() {
        let (feed, mut wal) = start();
        publish(&feed, &mut wal, 1);
        // As read by who asked between a record's taking effect and its publishing.
        let mut subscription = feed.subscribe(EventFilter::default(), Revision(2));
        feed.publish_ephemeral(ephemeral());
        publish(&feed, &mut wal, 1);
        feed.publish_ephemeral(ephemeral());
        publish(&feed, &mut wal, 1);
        let mut all = Vec::new();
        while all.len() < 2 {
            all.append(&mut step(&mut subscription).await);
        }
        assert_eq!(all, [(2, false), (3, true)]);
        feed.stop();
    }

    /// Streams of one topic that come back together, each to its own place.
    #[tokio::test]
    async fn what_is_noted_is_in_order_and_in_the_ring() {
        let (feed, mut wal) = start_stopped();
        (0..3000).for_each(|_| publish(&feed, &mut wal, 1));
        while feed.match_some() {}
        let subscription = feed.subscribe(EventFilter::default(), Revision(3000));
        for position in [2500, 2200, 2700, 2200, 2100] {
            subscription.topic.reach_back(&feed.ring, position);
            let noted = subscription.topic.noted.lock();
            assert!(noted.positions.iter().copied().eq(noted.complete_from..3000), "{position}");
        }
        (0..200).for_each(|_| {
            publish(&feed, &mut wal, 100_000);
            while feed.match_some() {}
        });
        let first = feed.ring.read().first;
        assert!(first > 3000 && subscription.topic.noted.lock().positions.iter().all(|&noted| noted >= first));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_ephemeral_event_reaches_a_stream_that_reads_the_log() {
        let (before, mut wal) = start();
        (0..3).for_each(|_| publish(&before, &mut wal, 1));
        before.stop();
        // As after a restart: nothing is in the ring.
        let (feed, _) = Feed::start(Arc::clone(&before.log), wal.head(), &Poison::default());
        let mut early = feed.subscribe(EventFilter::default(), Revision(3));
        feed.publish_ephemeral(ephemeral());
        let mut subscription = feed.subscribe(EventFilter::default(), Revision(1));
        let mut slow = feed.subscribe(EventFilter::default(), Revision(1));
        feed.publish_ephemeral(ephemeral());
        assert_eq!(step(&mut subscription).await, [(2, true), (3, true)]);
        assert_eq!(step(&mut subscription).await, [(3, false)], "the first was before it, the second is for it");
        publish(&feed, &mut wal, 1);
        assert_eq!(step(&mut subscription).await, [(4, true)]);
        feed.publish_ephemeral(ephemeral());
        // In their order or not at all: when this one comes to the ring, it is past the second.
        for (subscription, expected) in [
            (&mut early, [(3, false), (3, false), (4, true), (4, false)]),
            (&mut slow, [(2, true), (3, true), (4, true), (4, false)]),
        ] {
            let mut all = Vec::new();
            while all.len() < expected.len() {
                all.append(&mut step(subscription).await);
            }
            assert_eq!(all, expected);
        }
        feed.stop();
    }

    #[tokio::test]
    async fn ephemeral_events_are_kept_for_who_listens_alone() {
        let (feed, mut wal) = start();
        publish(&feed, &mut wal, 1);
        assert_eq!(feed.publish_ephemeral(ephemeral()), Revision(1));
        assert_eq!(feed.ring.read().events.len(), 1);
        let mut subscription = feed.subscribe(EventFilter::default(), Revision(1));
        feed.publish_ephemeral(ephemeral());
        assert_eq!(step(&mut subscription).await, [(1, false)]);
        drop(subscription);
        feed.publish_ephemeral(ephemeral());
        assert_eq!(feed.ring.read().events.len(), 2);
        feed.stop();
    }
}
