//! Collections as the engine shares them: every lock around vectors, the background work on one collection, checkpoints.
//!
//! Linkers run at idle priority, so nothing that writes or searches wait for may be locked by them: the upkeep thread
//! hands them jobs, and takes in what they report. Writers, searches and upkeep share the rest.
//!
//! Locks, and why each
//! - `inner` (read/write): the writer applies a record under it for microseconds; searches hold it for a slice of a scan or
//!   to make hits, background work for a slice of slots. Nobody holds it for longer than about a hundred microseconds, nor
//!   over I/O, but for the page faults of the mapped rows: those of a bulk load's rows are mostly taken by upkeep, under a read
//!   lock, 16 KiB at a time; those of the graph's memory by linkers, under no lock of ours. (The kernel's lock of the address space is
//!   held for reading meanwhile, also by a linker that does not get on: whoever maps or unmaps memory, about once a second, waits.)
//! - `applying`: held by the writer while it applies a record of many vectors, for milliseconds, which it does without the state's
//!   lock. Whoever looks at what is live holds it for reading ([`SharedCollection::settled`]), so that nobody sees half of a
//!   record; before the state's lock, which the writer takes last.
//! - `growing`: held over I/O by who allocates rows, the writer or upkeep. Twice at once, what one writes as zeros where the file
//!   system cannot allocate could fall on rows of the other.
//! - `searches`: numbers of running searches and of linkers' jobs. A slot they may know is not reused.
//! - `upkeep`: where the background work stands; one thread at a time.
//! - `done`: what linkers report; held to push or to take all.
//! - `known` in `load_graph`: threads collect there what they have found.
//! - `saved_changes`: held while the graph file is written, so that one thread does it at a time; writers and searches never
//!   take it.
//! - `log`: the slot log, taken by the one checkpoint at a time. Never held together with `inner` over I/O.

use super::codec::Event;
use super::linker::{Background, TAIL_MAX};
use super::search::{Search, SearchTicket};
use crate::disk;
use crate::error::{Error, Rejection};
use crate::faults::{self, Bug};
use crate::revision::Revision;
use crate::vector::collection::{Changes, Collection, Horizon, Item, SearchNumber};
use crate::vector::graph::{Graph, Pass, Repair, Scratch};
use crate::vector::graph_file::{self, GraphFile};
use crate::vector::plan::{self, Way};
use crate::vector::storage::{SlotEntry, SlotLog, encode_frame};
use crate::vector::{CollectionSpec, Metric, VectorId, VectorMeta};
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// Ids encoded under one hold of the lock during a checkpoint, and bytes of rows read there for their checksums.
const CHECKPOINT_IDS: usize = 1000;
const CHECKPOINT_BYTES: usize = 256 << 10;
/// Bytes of a checkpoint that are held before they are appended: a bulk load may have changed everything since the last.
const FRAMES_BYTES: usize = if cfg!(test) { 4 << 10 } else { 16 << 20 };
/// Numbers, and rows, copied under one hold of the lock: some tens of microseconds.
const COPIED_NUMBERS: usize = 16 << 10;
const COPIED_ROWS: usize = 64;
/// Changes applied under one hold of the lock: tens of microseconds.
const APPLIED_CHANGES: usize = 16;
/// Slots linked as one piece of work: a few milliseconds.
const LINK_SLOTS: usize = 16;
/// Dead linked slots before a repair pass begins, at least, and as a part of the linked ones: a pass looks at all links, and
/// one that condemns more repairs several links of a slot at once.
const REPAIR_FROM: usize = 128;
const REPAIR_PART: usize = 32;
/// The usual effort is measured anew when vectors that make this part of a graph were linked; while more than a smaller part of it wait to
/// be, when only this part was linked before.
const MEASURED_PART: usize = 4;
const WAITING_PART: usize = 16;
/// Slots that are one job of that: some milliseconds.
const MEASURED_SLOTS: usize = 8;
/// Lost slots are looked for when this part of the graph has changed, in so many passes at most.
const SEARCH_PARTY_PART: u64 = 16;
const SEARCH_PARTIES: usize = 3;
/// Slots that are one job of a repair or a search party: milliseconds.
const WALK_SLOTS: usize = 64;
/// Jobs a collection has out at a time: enough that no linker waits for the next.
const JOBS_OUT: usize = 32;
/// Dead slots freed under one hold of the lock.
const RECLAIM_SLOTS: usize = 32;
/// The graph file is written anew when a part of this size of the graph has changed.
const SAVE_PART: u64 = 20;
/// Repaired slots moved under one hold of the lock.
const REPAIRED_SLOTS: usize = 256;
/// Rows added up under one hold of the lock.
const CENTRE_ROWS: usize = 16;
/// Slots looked at under one hold of the lock where each takes nanoseconds.
const LISTED_SLOTS: usize = 4096;
/// Rows whose memory is made ready under one hold of the lock and before the core is offered, in bytes (where each page has to
/// come from a host, 50 us), and how much is made ready ahead of the writer, of rows and of the graph: so many bytes, and no more
/// than a part of what the collection has.
const POPULATED_BYTES: usize = 16 << 10;
const AHEAD_BYTES: usize = 4 << 20;
const AHEAD_PART: usize = 16;
/// Vector writes wait while so many slots, and this part of all, are dead and not yet free: growth has a bound.
const GARBAGE_FROM: usize = 2048;
const GARBAGE_PART: usize = 10;

/// A collection, shared between the writer, searches, linkers and checkpoints.
#[derive(Debug)]
pub struct SharedCollection {
    me: Weak<Self>,
    spec: CollectionSpec,
    created: Revision,
    inner: RwLock<Collection>,
    growing: Mutex<()>,
    applying: RwLock<()>,
    searches: Mutex<Searches>,
    upkeep: Mutex<Upkeep>,
    done: Mutex<Vec<(SearchNumber, Done)>>,
    log: Mutex<Option<SlotLog>>,
    dir: Option<PathBuf>,
    background: Arc<Background>,
    /// In the background's queue.
    is_queued: AtomicBool,
    /// [`Collection::has_replaced`] as of the last change.
    has_replaced: AtomicBool,
    /// See [`SharedCollection::slots_done`].
    slots_done: AtomicU64,
    /// Jobs that are not done.
    jobs_out: AtomicUsize,
    /// A sync of the rows failed: no more checkpoints until a restart.
    rows_failed: AtomicBool,
    /// Slots the tail may hold before vector writes wait: [`TAIL_MAX`], or more while the graph catches up with vectors that
    /// were there before it. Never grows.
    tail_limit: AtomicUsize,
    /// [`Collection::charged_bytes`] as of the last change.
    charged: AtomicUsize,
    /// [`crate::vector::collection::GraphCounts::changes`] at the last save.
    saved_changes: Mutex<u64>,
    /// Effort of searches that do not say, as measured ([`plan::usual_effort`]).
    usual_effort: AtomicUsize,
}

#[derive(Debug, Default)]
struct Searches {
    next: SearchNumber,
    running: BTreeSet<SearchNumber>,
    /// Those of them that look at metadata: no linker's job does.
    reading: BTreeSet<SearchNumber>,
}

impl Searches {
    fn begin(&mut self) -> SearchNumber {
        let number = self.next;
        self.next += 1;
        self.running.insert(number);
        number
    }
}

/// Where the background work on a collection stands.
#[derive(Debug, Default)]
struct Upkeep {
    /// The graph file has yet to be looked at.
    has_to_load: bool,
    /// Rows of slots below this have their memory.
    populated: usize,
    /// Slots below this have their memory in the graph, or a linker has the job to get it.
    graph_populated: usize,
    /// Jobs that linkers have and have not reported.
    jobs_out: usize,
    repair: Option<(Arc<Repair>, Walk)>,
    search_party: Option<SearchParty>,
    /// Changes of the graph when lost slots were last looked for.
    searched_at: u64,
    /// Vectors linked since the usual effort was last measured; never before this process did.
    linked_since: Option<usize>,
    measurement: Option<Measurement>,
}

/// Of the usual effort: slots not looked at yet, how many are not done, and what was found so far.
#[derive(Debug)]
struct Measurement {
    slots: Vec<u32>,
    left: usize,
    measured: Measured,
}

/// All slots there were when it began, piece by piece.
#[derive(Debug)]
struct Walk {
    next: usize,
    done: usize,
    end: usize,
}

impl Walk {
    fn over(slots: usize) -> Self {
        Self { next: 0, done: 0, end: slots }
    }

    fn claim(&mut self) -> Option<std::ops::Range<usize>> {
        let piece = self.next..(self.next + WALK_SLOTS).min(self.end);
        self.next = piece.end;
        (!piece.is_empty()).then_some(piece)
    }
}

/// Looks for every slot, and makes those findable that are not. Old links are given up for better ones, and now and then
/// the last that led somewhere is among them.
#[derive(Debug)]
struct SearchParty {
    walk: Walk,
    reached: Reached,
    found: usize,
    /// A party that found some is followed by another, but not for ever.
    parties_left: usize,
}

/// By slot, whether links led there when a search party set out.
#[derive(Debug)]
enum Reached {
    Unknown,
    /// A job is out that finds it.
    Sought,
    Known(Arc<[bool]>),
}

/// Work on a graph that takes no lock which writes or searches wait for, slot by slot, and what came of it so far.
#[derive(Debug)]
enum Piece {
    Populate(std::ops::Range<usize>),
    Link(Vec<(u32, bool)>),
    /// Of so many slots.
    Repair(Arc<Repair>, usize),
    /// Some nanoseconds a link, all of them.
    Reach,
    /// Of so many slots; those that were lost.
    Find(Arc<[bool]>, usize, usize),
    /// Of so many slots; what searches near them find.
    Measure(usize, Measured),
}

/// Hits found by each effort but the largest, and by that.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    found: [usize; plan::EFFORTS.len() - 1],
    of: usize,
}

impl Measured {
    fn add(&mut self, more: Self) {
        self.found.iter_mut().zip(more.found).for_each(|(sum, found)| *sum += found);
        self.of += more.of;
    }
}

/// What became of it.
#[derive(Debug)]
enum Done {
    /// Memory, made ready.
    Populated,
    /// Slots, and whether each was linked.
    Linked(Vec<(u32, bool)>),
    /// So many slots looked at.
    Repaired(usize),
    /// Whether links lead to each slot.
    Reached(Vec<bool>),
    /// So many slots looked at, and found to be lost.
    Found(usize, usize),
    /// So many slots looked at, and what searches near them found.
    Measured(usize, Measured),
}

/// A piece of work for a linker. While it is out, its number keeps the slots it may meet from being reused.
#[derive(Debug)]
pub struct Job {
    collection: Arc<SharedCollection>,
    graph: Arc<Graph>,
    number: SearchNumber,
    piece: Piece,
    /// Slots it has yet to come to, last first.
    left: Vec<u32>,
}

impl Job {
    /// Whether it makes memory ready, which links wait for.
    pub fn is_populating(&self) -> bool {
        matches!(self.piece, Piece::Populate(_))
    }

    /// Whether it is nothing that anybody waits for.
    fn is_measuring(&self) -> bool {
        matches!(self.piece, Piece::Measure(..))
    }

    /// Does it and reports. Where it is to be given up ([`Scratch::stopped_by`]), gives what is left of it for another to do.
    pub fn run(mut self, scratch: &mut Scratch) -> Option<Self> {
        let graph = &*self.graph;
        while let Some(slot) = self.left.pop() {
            let is_done = match &mut self.piece {
                // These come without slots.
                Piece::Populate(_) | Piece::Reach => true,
                Piece::Link(linked) => {
                    // A quarter of a millisecond each. Idle priority alone does not have it give way: beside a bulk load the p99 of
                    // sixteen connections' key writes was 1.0 to 1.2 ms without this, 0.84 to 1.05 with it.
                    std::thread::yield_now();
                    let is_linked = graph.link(slot, scratch);
                    linked.extend(is_linked.map(|is_linked| (slot, is_linked)));
                    is_linked.is_some()
                }
                Piece::Repair(repair, _) => {
                    if !repair.is_condemned(slot) {
                        graph.repair(slot, |slot| repair.is_condemned(slot), scratch);
                    }
                    true
                }
                Piece::Find(reached, _, lost) if graph.nodes().is_live(slot) => {
                    let was_reached = reached.get(slot as usize).is_none_or(|&reached| reached);
                    let was_lost = graph.find_again(slot, was_reached, scratch);
                    *lost += usize::from(was_lost == Some(true));
                    was_lost.is_some()
                }
                Piece::Find(..) => true,
                Piece::Measure(_, measured) if graph.nodes().is_live(slot) => {
                    // A millisecond each; as with links.
                    std::thread::yield_now();
                    let found = graph.found_by_effort(slot, scratch);
                    if let Some((found, of)) = found {
                        measured.add(Measured { found, of });
                    }
                    found.is_some()
                }
                Piece::Measure(..) => true,
            };
            if is_done {
                self.collection.slots_done.fetch_add(1, Ordering::Relaxed);
            } else {
                self.left.push(slot);
            }
            if !self.left.is_empty() && scratch.must_stop() {
                return Some(self);
            }
        }
        let done = match self.piece {
            Piece::Populate(slots) => {
                graph.nodes().populate(slots);
                Done::Populated
            }
            Piece::Link(linked) => Done::Linked(linked),
            Piece::Repair(_, count) => Done::Repaired(count),
            Piece::Reach => match graph.reach(|| {
                // A linker that comes this far has a core.
                self.collection.slots_done.fetch_add(1, Ordering::Relaxed);
                scratch.must_stop()
            }) {
                Some(reached) => Done::Reached(reached),
                None => return Some(self),
            },
            Piece::Find(_, count, lost) => Done::Found(count, lost),
            Piece::Measure(count, measured) => Done::Measured(count, measured),
        };
        self.collection.jobs_out.fetch_sub(1, Ordering::Relaxed);
        self.collection.done.lock().push((self.number, done));
        self.collection.wake();
        None
    }
}

impl SharedCollection {
    /// Opens or creates the collection's directory below `vectors`, or lives in memory.
    pub fn open(
        vectors: Option<&Path>,
        spec: CollectionSpec,
        created: Revision,
        background: &Arc<Background>,
    ) -> Result<Arc<Self>, Error> {
        let dir = vectors.map(|v| Self::dir_below(v, created));
        if let (Some(dir), Some(vectors)) = (&dir, vectors)
            && !dir.exists()
        {
            disk::create_dir_all(dir).map_err(Error::io("cannot create", dir))?;
            disk::sync_dir(vectors).map_err(Error::io("cannot sync", vectors))?;
        }
        let (collection, log) = Collection::open(dir.as_deref(), spec, created)?;
        if let Some(dir) = &dir {
            disk::sync_dir(dir).map_err(Error::io("cannot sync", dir))?;
        }
        let has_vectors = !collection.is_empty();
        let shared = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            spec,
            created,
            inner: RwLock::new(collection),
            growing: Mutex::default(),
            applying: RwLock::default(),
            searches: Mutex::default(),
            upkeep: Mutex::new(Upkeep { has_to_load: dir.is_some(), ..Upkeep::default() }),
            done: Mutex::default(),
            log: Mutex::new(log),
            dir,
            background: Arc::clone(background),
            is_queued: AtomicBool::new(false),
            has_replaced: AtomicBool::new(false),
            slots_done: AtomicU64::new(0),
            jobs_out: AtomicUsize::new(0),
            rows_failed: AtomicBool::new(false),
            tail_limit: AtomicUsize::new(usize::MAX),
            charged: AtomicUsize::new(0),
            saved_changes: Mutex::new(0),
            usual_effort: AtomicUsize::new(plan::EF_DEFAULT),
        });
        shared.write(|_, _| ());
        if has_vectors {
            shared.wake();
        }
        Ok(shared)
    }

    /// Where a collection's files are.
    #[must_use]
    pub fn dir_below(vectors: &Path, created: Revision) -> PathBuf {
        vectors.join(format!("{:020}", created.0))
    }

    /// What the live vectors are charged against the memory budget.
    #[must_use]
    pub fn charged_bytes(&self) -> usize {
        self.charged.load(Ordering::Relaxed)
    }

    /// Dimension and metric.
    #[must_use]
    pub fn spec(&self) -> CollectionSpec {
        self.spec
    }

    /// The revision that created it.
    #[must_use]
    pub fn created(&self) -> Revision {
        self.created
    }

    /// Its directory, unless it lives in memory.
    #[must_use]
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Waits for a record of many vectors that is being applied, and keeps the next from it. To be taken before the state's lock,
    /// which keeps other records from being applied.
    pub fn settled(&self) -> RwLockReadGuard<'_, ()> {
        // A thread that serves requests hands the others over: it may be many milliseconds.
        self.applying.try_read().unwrap_or_else(|| tokio::task::block_in_place(|| self.applying.read()))
    }

    /// Keeps whoever needs it [`settled`](Self::settled) away until the record that is applied meanwhile counts.
    pub fn unsettle(&self) -> RwLockWriteGuard<'_, ()> {
        self.applying.write()
    }

    /// Looks at the collection. Keep it short: the writer waits.
    pub fn read<T>(&self, look: impl FnOnce(&Collection) -> T) -> T {
        look(&self.inner.read())
    }

    /// Prepares room for `more` vectors beyond those applied. Does its I/O with nobody waiting but who needs room too.
    pub fn reserve(&self, more: usize) -> Result<(), Error> {
        {
            let _growing = self.growing.lock();
            let growth = self.read(|c| c.growth(more));
            let chunks = growth.allocate()?;
            if !chunks.is_empty() {
                self.inner.write().grow(chunks);
            }
        }
        // Last: a graph that starts meanwhile makes room for as many slots as there are rows.
        self.inner.read().reserve_graph()
    }

    /// Live vectors in order of id, after `after`, and the newest revision that had changed the collection: all as they were while
    /// what `hold` gives was held. Numbers are copied later, a few at a time, so that nobody waits for all of them: their slots
    /// are not reused meanwhile.
    #[must_use]
    pub fn list<T>(
        &self,
        after: Option<&str>,
        limit: usize,
        include_vector: bool,
        hold: impl FnOnce() -> T,
    ) -> (Vec<Item>, Revision) {
        let held = hold();
        let number = self.begin();
        let (listed, revision) = self.read(|c| (c.list(after, limit, false).collect::<Vec<_>>(), c.revision()));
        drop(held);
        let (slots, mut items): (Vec<u32>, Vec<Item>) = listed.into_iter().unzip();
        if include_vector {
            let rows = self.rows_at_a_time();
            for (slots, items) in slots.chunks(rows).zip(items.chunks_mut(rows)) {
                self.read(|c| {
                    for (&slot, item) in slots.iter().zip(items) {
                        item.vector = Some(c.row(slot).to_vec());
                    }
                });
            }
        }
        self.end_search(number);
        (items, revision)
    }

    /// Ids that a checkpoint encodes under one hold of the lock.
    fn ids_at_a_time(&self) -> usize {
        (CHECKPOINT_BYTES / (self.spec.dim * size_of::<f32>())).clamp(1, CHECKPOINT_IDS)
    }

    /// Rows that are copied under one hold of the lock.
    #[must_use]
    pub fn rows_at_a_time(&self) -> usize {
        (COPIED_NUMBERS / self.spec.dim).clamp(1, COPIED_ROWS)
    }

    /// Applies one write of numbers and metadata: of a backup that is restored, and in tests, for which the next two are. The engine
    /// applies records.
    pub fn put(&self, id: &VectorId, numbers: &[f32], meta: &VectorMeta, revision: Revision) {
        self.write(|inner, horizon| inner.put(id, numbers, meta, revision, horizon));
        self.wake();
    }

    /// Applies one write of metadata alone.
    pub fn set_meta(&self, id: &VectorId, meta: &VectorMeta, revision: Revision) {
        self.write(|inner, horizon| inner.set_meta(id, meta, revision, horizon));
        self.wake();
    }

    /// Applies one delete.
    pub fn delete(&self, id: &VectorId, revision: Revision) {
        self.write(|inner, horizon| inner.delete(id, revision, horizon));
        self.wake();
    }

    /// Applies what a record does to this collection.
    pub fn apply(&self, changes: &[(Revision, &Event)]) {
        for some in changes.chunks(APPLIED_CHANGES) {
            self.write(|inner, horizon| {
                for &(revision, event) in some {
                    match event {
                        Event::VectorWritten { id, vector: Some(vector), meta, .. } => {
                            inner.put(id, vector.as_slice(), meta, revision, horizon);
                        }
                        Event::VectorWritten { id, vector: None, meta, .. } => {
                            inner.set_meta(id, meta, revision, horizon)
                        }
                        Event::VectorDeleted { id, .. } => inner.delete(id, revision, horizon),
                        _ => {}
                    }
                }
            });
        }
        // Once: the upkeep thread would contend with the rest.
        self.wake();
    }

    /// The one way to change the collection: keeps the charge against the memory budget true. The horizon is taken under
    /// the lock, so that no number given out later is behind what this does.
    fn write<T>(&self, apply: impl FnOnce(&mut Collection, Horizon) -> T) -> T {
        let mut inner = self.inner.write();
        let result = apply(&mut inner, self.horizon());
        self.charged.store(inner.charged_bytes(), Ordering::Relaxed);
        self.has_replaced.store(inner.has_replaced(), Ordering::Relaxed);
        result
    }

    /// Whether a vector write may go ahead, or should wait for the linkers: their tail is full, or too many dead slots are
    /// not free yet.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let (counts, slots) = self.read(|c| (c.graph_counts(), c.slot_count()));
        let is_behind = counts.tail > self.tail_limit.load(Ordering::Relaxed);
        // In the relaxed modes dead slots wait for the log to be synced, which may be long; no write should.
        let is_relaxed = self.background.durable.load(Ordering::Relaxed) != u64::MAX;
        let is_littered = counts.is_full && !is_relaxed && counts.garbage > GARBAGE_FROM.max(slots / GARBAGE_PART);
        if is_behind || is_littered {
            // A search that held up the reuse of slots may have ended without telling.
            self.wake();
        }
        !is_behind && !is_littered
    }

    fn horizon(&self) -> Horizon {
        let durable = Revision(self.background.durable.load(Ordering::Acquire));
        let searches = self.searches.lock();
        let oldest = |running: &BTreeSet<SearchNumber>| running.first().copied().unwrap_or(searches.next);
        let (oldest, oldest_search) = (oldest(&searches.running), oldest(&searches.reading));
        Horizon { next: searches.next, oldest, oldest_search, durable }
    }

    fn begin(&self) -> SearchNumber {
        self.searches.lock().begin()
    }

    /// The same for a search, which looks at metadata.
    fn begin_reading(&self) -> SearchNumber {
        let mut searches = self.searches.lock();
        let number = searches.begin();
        searches.reading.insert(number);
        number
    }

    pub(super) fn end_search(&self, number: SearchNumber) {
        let mut searches = self.searches.lock();
        searches.running.remove(&number);
        let has_read = searches.reading.remove(&number);
        drop(searches);
        if has_read && self.has_replaced.load(Ordering::Relaxed) {
            // The index may go on where it waited for this search.
            self.wake();
        }
    }

    /// Keeps everything visible at `at` in place until the ticket is dropped. The caller has it [`settled`](Self::settled) and holds
    /// the state's read lock, so nothing newer is applied in between.
    pub fn begin_search(&self, at: Revision, searches: &[Search]) -> SearchTicket {
        self.ticket(at, |usual, vectors| searches.iter().any(|search| search.needs_live(usual, vectors)))
    }

    /// As [`SharedCollection::begin_search`], for [`SearchTicket::count_matching`].
    pub fn begin_match(&self, at: Revision) -> SearchTicket {
        self.ticket(at, |_, _| true)
    }

    fn ticket(&self, at: Revision, needs_live: impl FnOnce(usize, usize) -> bool) -> SearchTicket {
        let collection = self.me.upgrade().expect("whoever calls holds it");
        let number = self.begin_reading();
        let usual_effort = self.usual_effort.load(Ordering::Relaxed);
        self.read(|c| {
            let live = needs_live(usual_effort, c.len()).then(|| c.live().clone());
            SearchTicket { collection, at, number, graph: c.searchable(), vectors: c.len(), usual_effort, live }
        })
    }

    /// Puts the collection into the background's queue, unless it is there.
    fn wake(&self) {
        if !self.is_queued.swap(true, Ordering::AcqRel) {
            self.background.push(Weak::clone(&self.me));
        }
    }

    /// Does what is due, on the upkeep thread, and asks to be called again if there may be more.
    pub fn work(&self) {
        self.is_queued.store(false, Ordering::Release);
        if self.keep_up() {
            self.wake();
        }
    }

    /// Does a linker's job, if there is one.
    pub fn help(&self) {
        thread_local! {
            static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default();
        }
        // Memory made ready would shorten no tail, nor would a measurement.
        if let Some(job) = self.background.take_job(|job| !job.is_populating() && !job.is_measuring()) {
            SCRATCH.with_borrow_mut(|scratch| job.run(scratch));
        }
    }

    /// Slots that jobs have come to the end of: whether linkers get on. `None` while they have nothing to do.
    pub fn slots_done(&self) -> Option<u64> {
        (self.jobs_out.load(Ordering::Relaxed) > 0).then(|| self.slots_done.load(Ordering::Relaxed))
    }

    /// Does what is due, or a linker's job; false when there is neither. For tests and measurements without threads.
    pub fn work_once(&self, scratch: &mut Scratch) -> bool {
        if self.keep_up() {
            return true;
        }
        let job = self.background.take_job(|_| true);
        let has_job = job.is_some();
        job.and_then(|job| job.run(scratch));
        has_job
    }

    fn keep_up(&self) -> bool {
        let Some(mut upkeep) = self.upkeep.try_lock() else { return false };
        let has_taken = self.take_results(&mut upkeep);
        let has_moved = self.move_slots(&mut upkeep);
        self.hand_out(&mut upkeep) || has_moved || has_taken
    }

    fn take_results(&self, upkeep: &mut Upkeep) -> bool {
        let done = std::mem::take(&mut *self.done.lock());
        let has_some = !done.is_empty();
        let mut linked = Vec::new();
        for (number, done) in done {
            upkeep.jobs_out -= 1;
            self.end_search(number);
            match done {
                Done::Populated => {}
                Done::Linked(slots) => linked.extend(slots),
                Done::Repaired(count) => {
                    if let Some((repair, walk)) = &mut upkeep.repair {
                        walk.done += count;
                        if walk.done == walk.end {
                            self.end_repair(repair);
                            upkeep.repair = None;
                        }
                    }
                }
                Done::Reached(reached) => {
                    if let Some(party) = &mut upkeep.search_party {
                        party.reached = Reached::Known(reached.into());
                    }
                }
                Done::Found(count, lost) => {
                    if let Some(party) = &mut upkeep.search_party {
                        party.walk.done += count;
                        party.found += lost;
                        if party.walk.done == party.walk.end {
                            let (found, left) = (party.found, party.parties_left);
                            tracing::debug!(found, "looked for lost vectors");
                            upkeep.search_party = (found > 0 && left > 1).then(|| self.search_party(left - 1));
                        }
                    }
                }
                Done::Measured(count, measured) => {
                    if let Some(measurement) = &mut upkeep.measurement {
                        measurement.measured.add(measured);
                        measurement.left -= count;
                        if measurement.left == 0 {
                            self.end_measurement(measurement.measured);
                            upkeep.measurement = None;
                        }
                    }
                }
            }
        }
        upkeep.linked_since = upkeep.linked_since.map(|since| since + linked.len());
        if !linked.is_empty() {
            self.write(|inner, horizon| inner.finish_links(&linked, horizon));
        }
        has_some
    }

    /// Makes rows' memory ready for what a bulk load writes next. Getting it from the kernel and clearing it was a third of what
    /// the writer did, and key writes waited for it.
    fn populate(&self, upkeep: &mut Upkeep) -> bool {
        let row_bytes = self.spec.dim * size_of::<f32>();
        let piece = POPULATED_BYTES.div_ceil(row_bytes);
        let (counts, slots, capacity) = self.read(|c| (c.graph_counts(), c.slot_count(), c.capacity()));
        let ahead = (AHEAD_BYTES / row_bytes).min(slots / AHEAD_PART);
        let start = upkeep.populated.max(slots);
        let populated = start..start + piece;
        if !counts.is_full || populated.end > slots + ahead {
            return false;
        }
        if populated.end > capacity && self.reserve(ahead).is_err() {
            // Whoever needs the room is told why there is none.
            return false;
        }
        self.read(|c| c.populate(populated.clone()));
        upkeep.populated = populated.end;
        true
    }

    /// Slots whose memory in the graph is to be made ready for a bulk load. A linker's work: it comes in huge pages, and one that
    /// has to come from a host takes 5 ms to clear: at idle priority the core is given away meanwhile.
    fn graph_to_populate(&self, upkeep: &mut Upkeep, graph: &Graph) -> Option<std::ops::Range<usize>> {
        let (counts, slots) = self.read(|c| (c.graph_counts(), c.slot_count()));
        let ahead = (AHEAD_BYTES / graph.nodes().bytes_of(1)).min(slots / AHEAD_PART);
        let start = upkeep.graph_populated.max(slots);
        let end = (start + ahead / 4).min(graph.nodes().capacity());
        if !counts.is_full || start >= end || end > slots + ahead {
            return None;
        }
        upkeep.graph_populated = end;
        Some(start..end)
    }

    /// Work under the collection's lock, a slice of it.
    fn move_slots(&self, upkeep: &mut Upkeep) -> bool {
        if upkeep.has_to_load {
            upkeep.has_to_load = false;
            self.load_graph();
            return true;
        }
        let (has_graph, vectors, counts) = self.read(|c| (c.graph().is_some(), c.len(), c.graph_counts()));
        if !has_graph && vectors >= self.background.graph_from {
            let graph = Arc::new(Graph::new(self.spec.metric, self.spec.dim, self.centre()));
            if let Err(error) = self.write(|inner, _| inner.start_graph(graph)) {
                tracing::warn!(%error, "no memory for a graph; searches stay exact");
                return false;
            }
            return true;
        }
        let has_populated = self.populate(upkeep);
        if counts.uncoded > 0 {
            self.write(|inner, _| inner.code_some());
            return true;
        }
        if has_graph {
            self.tail_limit.fetch_min(counts.tail.max(TAIL_MAX), Ordering::Relaxed);
        }
        let changes = counts.changes - upkeep.searched_at;
        if upkeep.search_party.is_none() && counts.tail == 0 && changes > counts.linked as u64 / SEARCH_PARTY_PART {
            upkeep.searched_at = counts.changes;
            upkeep.search_party = Some(self.search_party(SEARCH_PARTIES));
        }
        let has_moved = self.read(Collection::has_upkeep)
            && self.write(|inner, horizon| {
                inner.forget_replaced(horizon);
                let has_more = inner.index_some();
                inner.reclaim(RECLAIM_SLOTS, horizon) || has_more
            });
        has_populated || has_moved
    }

    /// Gives linkers what they can do, a little ahead. A repair begins when no job is out: whoever chose a link to a slot
    /// before it was condemned has then made it.
    fn hand_out(&self, upkeep: &mut Upkeep) -> bool {
        let Some(graph) = self.read(|c| c.graph().cloned()) else { return false };
        let counts = self.read(Collection::graph_counts);
        if upkeep.repair.is_none() && counts.buried >= REPAIR_FROM.max(counts.linked / REPAIR_PART) {
            if upkeep.jobs_out > 0 {
                return false;
            }
            upkeep.repair = Some(self.begin_repair(&graph));
        }
        let mut has_handed_out = false;
        while upkeep.jobs_out < JOBS_OUT {
            // Before the slots are looked at: from here on none that is live now is reused.
            let number = self.begin();
            let Some((piece, mut left)) = self.next_piece(upkeep, &graph) else {
                self.end_search(number);
                break;
            };
            upkeep.jobs_out += 1;
            self.jobs_out.fetch_add(1, Ordering::Relaxed);
            has_handed_out = true;
            left.reverse();
            let collection = self.me.upgrade().expect("whoever calls holds it");
            self.background.give_job(Job { collection, graph: Arc::clone(&graph), number, piece, left });
        }
        has_handed_out
    }

    /// The next piece of work, and its slots.
    fn next_piece(&self, upkeep: &mut Upkeep, graph: &Graph) -> Option<(Piece, Vec<u32>)> {
        if let Some(slots) = self.graph_to_populate(upkeep, graph) {
            return Some((Piece::Populate(slots), Vec::new()));
        }
        if let Some((repair, walk)) = &mut upkeep.repair
            && let Some(piece) = walk.claim()
        {
            let count = piece.len();
            // The cast: slots are counted in u32.
            return Some((Piece::Repair(Arc::clone(repair), count), piece.map(|slot| slot as u32).collect()));
        }
        if let Some(slots) = self.to_measure(upkeep) {
            return Some((Piece::Measure(slots.len(), Measured::default()), slots));
        }
        let slots = self.inner.write().claim_links(LINK_SLOTS);
        if !slots.is_empty() {
            return Some((Piece::Link(Vec::with_capacity(slots.len())), slots));
        }
        let party = upkeep.search_party.as_mut()?;
        match &party.reached {
            Reached::Unknown => {
                party.reached = Reached::Sought;
                Some((Piece::Reach, Vec::new()))
            }
            Reached::Sought => None,
            Reached::Known(reached) => {
                let piece = party.walk.claim()?;
                let slots = self.read(|c| c.linked_slots(piece.clone())).into_iter().map(|(slot, _)| slot).collect();
                Some((Piece::Find(Arc::clone(reached), piece.len(), 0), slots))
            }
        }
    }

    /// Slots to measure the usual effort by, when it is time.
    fn to_measure(&self, upkeep: &mut Upkeep) -> Option<Vec<u32>> {
        if upkeep.measurement.is_none() {
            let counts = self.read(Collection::graph_counts);
            let is_growing = counts.tail > counts.linked / WAITING_PART;
            let part = counts.linked / MEASURED_PART * if is_growing { MEASURED_PART - 1 } else { 1 };
            // Where searches look at all vectors anyway, there is nothing to measure.
            let is_walked = plan::choose(plan::EF_DEFAULT, counts.linked, counts.linked) == Way::Graph;
            if !is_walked || upkeep.linked_since.is_some_and(|since| since <= part) {
                return None;
            }
            let slots = self.read(|c| c.sample_linked(plan::MEASURED_VECTORS));
            if slots.is_empty() {
                return None;
            }
            upkeep.linked_since = Some(0);
            upkeep.measurement = Some(Measurement { left: slots.len(), slots, measured: Measured::default() });
        }
        let slots = &mut upkeep.measurement.as_mut()?.slots;
        let slots = slots.split_off(slots.len().saturating_sub(MEASURED_SLOTS));
        (!slots.is_empty()).then_some(slots)
    }

    fn end_measurement(&self, Measured { found, of }: Measured) {
        if of == 0 {
            // All of them have gone meanwhile.
            return;
        }
        let present = self.usual_effort.load(Ordering::Relaxed);
        let usual = plan::usual_effort(&found, of, present);
        tracing::debug!(?found, of, usual, "measured what searches find");
        self.usual_effort.store(usual, Ordering::Relaxed);
    }

    fn begin_repair(&self, graph: &Graph) -> (Arc<Repair>, Walk) {
        let (condemned, slots) = {
            let mut inner = self.inner.write();
            (inner.take_buried(), inner.slot_count())
        };
        graph.choose_entries(&self.linked_slots());
        (Arc::new(Repair::new(condemned, slots)), Walk::over(slots))
    }

    fn end_repair(&self, repair: &Repair) {
        for slots in repair.slots.chunks(REPAIRED_SLOTS) {
            self.write(|inner, horizon| inner.finish_repair(slots, horizon));
        }
    }

    /// About where the vectors lie, for the bytes of a graph of them: the mean of some, where distances allow for it; else empty.
    /// The rows are read a few at a time, as they may have to come from disk.
    fn centre(&self) -> Vec<f32> {
        if self.spec.metric != Metric::L2 {
            return Vec::new();
        }
        let slots = self.read(Collection::sample);
        let mut sums = vec![0f64; self.spec.dim];
        for some in slots.chunks(CENTRE_ROWS) {
            self.read(|c| c.add_rows(some, &mut sums));
        }
        // The cast: a mean of numbers that fit fits. A slot that changed hands meanwhile lies where others do.
        sums.into_iter().map(|sum| (sum / slots.len().max(1) as f64) as f32).collect()
    }

    fn search_party(&self, parties_left: usize) -> SearchParty {
        let walk = Walk::over(self.read(Collection::slot_count));
        SearchParty { walk, reached: Reached::Unknown, found: 0, parties_left }
    }

    /// Does all background work there is, on this thread, and looks for lost vectors whether it is time or not: for tests and
    /// `kiss-vdb check`.
    pub fn settle(&self) {
        let mut scratch = Scratch::default();
        while self.work_once(&mut scratch) {}
        let party = self.search_party(SEARCH_PARTIES);
        self.upkeep.lock().search_party = Some(party);
        while self.work_once(&mut scratch) {}
    }

    fn linked_slots(&self) -> Vec<u32> {
        let slots = self.read(Collection::slot_count);
        let slices = (0..slots).step_by(LISTED_SLOTS);
        slices
            .flat_map(|start| self.read(|c| c.linked_slots(start..start + LISTED_SLOTS)))
            .map(|(slot, _)| slot)
            .collect()
    }

    /// Takes the graph file into use, if there is one that fits. Searches are exact until then.
    fn load_graph(&self) {
        let Some(dir) = &self.dir else { return };
        let started = std::time::Instant::now();
        let file = match GraphFile::read(dir, self.spec, self.created) {
            Ok(Some(file)) => file,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "the graph file cannot be used; the graph is built anew");
                return;
            }
        };
        if self.read(|c| c.graph().is_some()) {
            return;
        }
        // From here on no slot that is live now is reused.
        let number = self.begin();
        let graph = Arc::new(Graph::new(self.spec.metric, self.spec.dim, self.centre()));
        if let Err(error) = graph.nodes().reserve(self.read(Collection::slot_count).max(file.slots())) {
            tracing::warn!(%error, "no memory for the graph file; searches stay exact");
            self.end_search(number);
            return;
        }
        let slots = file.slots();
        let known = Mutex::new(Vec::with_capacity(slots));
        Pass::new(slots).run(|piece, ()| {
            let piece = self.read(|c| {
                let is_known = |slot: usize| {
                    let slot = u32::try_from(slot).ok()?;
                    let born = file.born(slot)?;
                    c.is_born(slot, born).then_some((slot, born))
                };
                let piece: Vec<(u32, Revision)> = piece.filter_map(is_known).collect();
                // SAFETY: nobody else has this graph, and no two pieces overlap.
                unsafe { c.code_into(&graph, &piece) };
                piece
            });
            known.lock().extend(piece);
        });
        let known = known.into_inner();
        file.restore(&graph, &known);
        let adopted = self.write(|inner, _| inner.adopt_graph(Arc::clone(&graph), &known));
        self.end_search(number);
        match adopted {
            Ok(()) => tracing::info!(
                slots = known.len(),
                took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                "loaded a graph"
            ),
            Err(error) => tracing::warn!(%error, "no memory for the graph file; searches stay exact"),
        }
        *self.saved_changes.lock() = self.read(|c| c.graph_counts().changes);
    }

    /// Writes the graph file when enough has changed. It is a hint: whatever goes wrong is logged, and the next start takes
    /// longer.
    pub fn save_graph(&self) {
        let (Some(dir), Some(graph)) = (&self.dir, self.read(|c| c.graph().cloned())) else { return };
        let mut saved_changes = self.saved_changes.lock();
        let counts = self.read(Collection::graph_counts);
        let changes = counts.changes - *saved_changes;
        if changes == 0 || changes * SAVE_PART < counts.linked as u64 || counts.uncoded > 0 {
            return;
        }
        let slots = self.read(Collection::slot_count);
        let slices =
            (0..slots).step_by(LISTED_SLOTS).map(|start| self.read(|c| c.linked_slots(start..start + LISTED_SLOTS)));
        let result = graph_file::write(dir, self.spec, self.created, &graph, slices);
        match result {
            Ok(()) => *saved_changes = counts.changes,
            Err(error) => tracing::warn!(%error, "the graph file was not written; the next start links anew"),
        }
    }

    /// Ids whose numbers are not what they were at the last checkpoint, though nobody changed them: `rows.f32` is damaged.
    /// Reads all rows.
    pub fn damaged_rows(&self) -> Result<Vec<VectorId>, Error> {
        let Some(dir) = &self.dir else { return Ok(Vec::new()) };
        let entries = SlotLog::open(dir.join("slots.log"), self.spec, self.created)?.entries;
        let inner = self.inner.read();
        let mut damaged = BTreeSet::new();
        for entry in entries {
            if let SlotEntry::Live { id, born, row_crc: Some(row_crc), .. } = entry
                && inner.row_crc_of(&id, born).is_some_and(|crc| crc != row_crc)
            {
                damaged.insert(id);
            }
        }
        Ok(damaged.into_iter().collect())
    }

    /// Looks for faults in the graph, while nothing else happens to the collection.
    #[must_use]
    pub fn validate(&self) -> Option<crate::vector::validate::Report> {
        let graph = self.read(|c| c.graph().cloned())?;
        let linked = self.linked_slots();
        let repair = self.upkeep.lock().repair.as_ref().map(|(repair, _)| Arc::clone(repair));
        let inner = self.inner.read();
        let may_be_linked = |slot| inner.may_be_linked(slot) || repair.as_ref().is_some_and(|r| r.is_condemned(slot));
        Some(crate::vector::validate::validate(&graph, &linked, inner.slot_count(), may_be_linked))
    }

    /// Writes what changed since the last checkpoint to the collection's files. `head` tells the newest revision applied;
    /// `sync_log` makes all that was applied durable in the log, so that the files never show what the log could lose.
    /// Returns whether anything was written. Blocking; the collection's lock is held for slices only.
    pub fn checkpoint(
        &self,
        head: impl FnOnce() -> Revision,
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let is_written = self.checkpoint_slots(head, sync_log)?;
        // After the slots: a graph file that is ahead of them only names vectors that the next start may not know.
        self.save_graph();
        Ok(is_written)
    }

    fn checkpoint_slots(
        &self,
        head: impl FnOnce() -> Revision,
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let mut log = self.log.lock();
        let Some(log) = log.as_mut() else { return Ok(false) };
        if self.rows_failed.load(Ordering::Acquire) {
            return Err(Error::Poisoned);
        }
        log.make_sure()?;
        // The head is read first: what is applied in between is then in both, the files and the replay.
        let revision = head();
        let changes = {
            let mut inner = self.inner.write();
            let changes = inner.take_changes();
            if changes.is_empty() {
                // What changes from here on, a snapshot needs from here on, and not from the last checkpoint: the log may have
                // been shortened since.
                inner.set_complete(revision);
                return Ok(false);
            }
            changes
        };
        let result = self.write_checkpoint(log, revision, &changes, sync_log);
        let mut inner = self.inner.write();
        match result {
            Ok(()) => inner.set_checkpoint(revision),
            Err(_) => inner.restore_changes(changes),
        }
        result.map(|()| true)
    }

    fn write_checkpoint(
        &self,
        log: &mut SlotLog,
        revision: Revision,
        changes: &Changes,
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (previous, newest, rewrite, rows) = {
            let inner = self.inner.read();
            (
                inner.checkpoint(),
                inner.revision(),
                log.is_old() || inner.wants_rewrite(log.bytes()),
                inner.sync_handle()?,
            )
        };
        let sync_rows = || match (&rows, &self.dir) {
            (Some(rows), Some(dir)) if !faults::is_on(Bug::SkipRowsSync) => rows.sync().map_err(|e| {
                // The kernel may have dropped the pages: never sync them again. The log keeps everything since the last
                // checkpoint, and a restart replays it.
                self.rows_failed.store(true, Ordering::Release);
                Error::io("cannot sync the rows in", dir)(e)
            }),
            _ => Ok(()),
        };
        if rewrite {
            let ids_at_a_time = self.ids_at_a_time();
            let mut successor = log.rewrite(self.spec, self.created)?;
            let mut after: Option<VectorId> = None;
            loop {
                let entries = {
                    let inner = self.inner.read();
                    let page = inner.list(after.as_ref().map(VectorId::as_str), ids_at_a_time, false);
                    let page: Vec<Item> = page.map(|(_, item)| item).collect();
                    let ids: Vec<VectorId> = page.into_iter().map(|item| item.id).collect();
                    after = ids.last().cloned();
                    inner.entries_of(&ids)
                };
                let is_last = entries.len() < ids_at_a_time;
                successor.write(&encode_frame(if is_last { revision } else { previous }, newest, &entries))?;
                if is_last {
                    break;
                }
            }
            sync_log()?;
            sync_rows()?;
            return log.replace(successor);
        }
        let before = log.bytes();
        self.append_checkpoint(log, revision, changes, (previous, newest), || sync_log().and_then(|()| sync_rows()))
            // Its beginning would be written again by the next.
            .inspect_err(|_| log.cut(before))
    }

    /// Appends what has changed. `sync` is called before each piece: a frame names no row that is not on disk.
    fn append_checkpoint(
        &self,
        log: &mut SlotLog,
        revision: Revision,
        changes: &Changes,
        (previous, newest): (Revision, Revision),
        sync: impl Fn() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let slots: Vec<u32> = changes.slots.iter().collect();
        let ids_at_a_time = self.ids_at_a_time();
        let gone: Vec<VectorId> = changes.gone.iter().cloned().collect();
        let written = slots.chunks(ids_at_a_time).map(|slots| self.inner.read().entries_in(slots));
        let deleted = gone.chunks(ids_at_a_time).map(|ids| self.inner.read().entries_of(ids));
        let mut pages = written.chain(deleted).peekable();
        let mut frames = Vec::new();
        while let Some(entries) = pages.next() {
            let is_last = pages.peek().is_none();
            frames.extend_from_slice(&encode_frame(if is_last { revision } else { previous }, newest, &entries));
            if is_last || frames.len() >= FRAMES_BYTES {
                sync()?;
                log.append(&frames)?;
                frames.clear();
            }
        }
        Ok(())
    }
}

/// Turns a failure to get room into what the client is told; the operator reads the rest in the server's log.
#[must_use]
pub fn no_room(error: &Error) -> Rejection {
    if error.is_out_of_files() {
        return Rejection::OUT_OF_FILES;
    }
    tracing::warn!(%error, "no room for more vectors");
    Rejection::StorageFull(
        "there is no room for more vectors; delete some or give the server more disk or memory".into(),
    )
}
