//! Collections as the engine shares them: every lock around vectors. The background work on one is in [`super::upkeep`], its
//! checkpoints in [`super::checkpoint`].
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
use super::linker::Background;
use super::search::{SEARCH_TIME_MAX, Search, SearchTicket};
use super::upkeep::{Done, Upkeep};
use crate::disk;
use crate::error::{Error, Rejection};
use crate::revision::Revision;
use crate::vector::collection::{Collection, Horizon, Item, SearchNumber};
use crate::vector::graph::{Graph, Pass};
use crate::vector::graph_file::{self, GraphFile};
use crate::vector::plan::{self};
use crate::vector::storage::{SlotEntry, SlotLog};
use crate::vector::{CollectionSpec, VectorId, VectorMeta};
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

/// Ids encoded under one hold of the lock during a checkpoint, and bytes of rows read there for their checksums.
const CHECKPOINT_IDS: usize = 1000;
const CHECKPOINT_BYTES: usize = 256 << 10;
/// Numbers, and rows, copied under one hold of the lock: some tens of microseconds.
const COPIED_NUMBERS: usize = 16 << 10;
const COPIED_ROWS: usize = 64;
/// Changes applied under one hold of the lock: tens of microseconds.
const APPLIED_CHANGES: usize = 16;
/// The graph file is written anew when a part of this size of the graph has changed.
const SAVE_PART: u64 = 20;
/// Slots looked at under one hold of the lock where each takes nanoseconds.
const LISTED_SLOTS: usize = 4096;
/// Vector writes wait while so many slots, and this part of all, are dead and not yet free: growth has a bound.
const GARBAGE_FROM: usize = 2048;
const GARBAGE_PART: usize = 10;

/// A collection, shared between the writer, searches, linkers and checkpoints.
#[derive(Debug)]
pub struct SharedCollection {
    pub(super) me: Weak<Self>,
    pub(super) spec: CollectionSpec,
    pub(super) created: Revision,
    pub(super) inner: RwLock<Collection>,
    pub(super) growing: Mutex<()>,
    pub(super) applying: RwLock<()>,
    pub(super) searches: Mutex<Searches>,
    pub(super) upkeep: Mutex<Upkeep>,
    pub(super) done: Mutex<Vec<(SearchNumber, Done)>>,
    pub(super) log: Mutex<Option<SlotLog>>,
    pub(super) dir: Option<PathBuf>,
    pub(super) background: Arc<Background>,
    /// In the background's queue.
    pub(super) is_queued: AtomicBool,
    /// [`Collection::has_replaced`] as of the last change.
    pub(super) has_replaced: AtomicBool,
    /// See [`SharedCollection::slots_done`].
    pub(super) slots_done: AtomicU64,
    /// Jobs that are not done.
    pub(super) jobs_out: AtomicUsize,
    /// A sync of the rows failed: no more checkpoints until a restart.
    pub(super) rows_failed: AtomicBool,
    /// Slots the tail may hold before vector writes wait: [`super::linker::TAIL_MAX`], or more while the graph catches up with vectors that
    /// were there before it. Never grows.
    pub(super) tail_limit: AtomicUsize,
    /// [`Collection::charged_bytes`] as of the last change.
    pub(super) charged: AtomicUsize,
    /// [`crate::vector::collection::GraphCounts::changes`] at the last save.
    pub(super) saved_changes: Mutex<u64>,
    /// Effort of searches that do not say, as measured ([`plan::usual_effort`]).
    pub(super) usual_effort: AtomicUsize,
}

#[derive(Debug, Default)]
pub(super) struct Searches {
    pub(super) next: SearchNumber,
    pub(super) running: BTreeSet<SearchNumber>,
    /// Those of them that look at metadata: no linker's job does.
    pub(super) reading: BTreeSet<SearchNumber>,
}

impl Searches {
    pub(super) fn begin(&mut self) -> SearchNumber {
        let number = self.next;
        self.next += 1;
        self.running.insert(number);
        number
    }
}

/// See [`SharedCollection::pin_slots`].
struct SlotPin<'a> {
    collection: &'a SharedCollection,
    number: SearchNumber,
}

impl Drop for SlotPin<'_> {
    fn drop(&mut self) {
        self.collection.end_search(self.number);
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
            upkeep: Mutex::new(Upkeep::begin(dir.is_some())),
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
        let _pin = self.pin_slots();
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
        (items, revision)
    }

    /// Ids that a checkpoint encodes under one hold of the lock.
    pub(super) fn ids_at_a_time(&self) -> usize {
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
    pub(super) fn write<T>(&self, apply: impl FnOnce(&mut Collection, Horizon) -> T) -> T {
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

    pub(super) fn horizon(&self) -> Horizon {
        let durable = Revision(self.background.durable.load(Ordering::Acquire));
        let searches = self.searches.lock();
        let oldest = |running: &BTreeSet<SearchNumber>| running.first().copied().unwrap_or(searches.next);
        let (oldest, oldest_search) = (oldest(&searches.running), oldest(&searches.reading));
        Horizon { next: searches.next, oldest, oldest_search, durable }
    }

    /// From here on no slot that is live now is reused, until what this gives is dropped.
    fn pin_slots(&self) -> SlotPin<'_> {
        SlotPin { collection: self, number: self.begin() }
    }

    pub(super) fn begin(&self) -> SearchNumber {
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
            let (graph, vectors, until) = (c.searchable(), c.len(), Instant::now() + SEARCH_TIME_MAX);
            SearchTicket { collection, at, number, until, graph, vectors, usual_effort, live }
        })
    }

    /// Puts the collection into the background's queue, unless it is there.
    pub(super) fn wake(&self) {
        if !self.is_queued.swap(true, Ordering::AcqRel) {
            self.background.push(Weak::clone(&self.me));
        }
    }

    pub(super) fn linked_slots(&self) -> Vec<u32> {
        let slots = self.read(Collection::slot_count);
        let slices = (0..slots).step_by(LISTED_SLOTS);
        slices
            .flat_map(|start| self.read(|c| c.linked_slots(start..start + LISTED_SLOTS)))
            .map(|(slot, _)| slot)
            .collect()
    }

    /// Takes the graph file into use, if there is one that fits. Searches are exact until then.
    pub(super) fn load_graph(&self) {
        let Some(dir) = &self.dir else { return };
        let started = Instant::now();
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
        let _pin = self.pin_slots();
        let graph = Arc::new(Graph::new(self.spec.metric, self.spec.dim, self.centre()));
        if let Err(error) = graph.nodes().reserve(self.read(Collection::slot_count).max(file.slots())) {
            tracing::warn!(%error, "no memory for the graph file; searches stay exact");
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
