//! Collections as the engine shares them: every lock around vectors, the background work on one collection, checkpoints.
//!
//! Locks, and why each
//! - `inner` (read/write): the writer applies a record under it for microseconds; searches hold it for a slice of a scan or
//!   to make hits, background work for a slice of slots. Nobody holds it for longer than about a hundred microseconds, nor
//!   over I/O.
//! - `searches`: numbers of running searches and linkers. A slot they may know is not reused.
//! - `linking` (read/write): linkers hold it while they link a batch; a repair pass takes it once, so that whoever chose a
//!   link to a slot before it was condemned has written it before the pass begins.
//! - `upkeep`: one thread at a time loads the graph file, begins passes, and moves slots between lists.
//! - `repair`, `search_party`: the passes under way; held to look at them.
//! - `known` in `load_graph`: threads collect there what they have found.
//! - `log`: the slot log, taken by the one checkpoint at a time. Never held together with `inner` over I/O.

use super::linker::{Background, TAIL_MAX};
use super::search::{Search, SearchTicket};
use crate::error::{Error, Rejection};
use crate::revision::Revision;
use crate::vector::collection::{Collection, Horizon, SearchNumber};
use crate::vector::graph::{Graph, Pass, Repair, Scratch};
use crate::vector::graph_file::{self, GraphFile};
use crate::vector::storage::{NewChunk, SlotLog, encode_frame};
use crate::vector::{CollectionSpec, VectorId, VectorMeta};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// Ids encoded under one hold of the lock during a checkpoint.
const CHECKPOINT_IDS: usize = 1000;
/// Slots linked as one piece of work: a few milliseconds.
const LINK_SLOTS: usize = 16;
/// Dead linked slots before a repair pass begins, at least, and as a part of the linked ones: a pass looks at all links, and
/// one that condemns more repairs several links of a slot at once.
const REPAIR_FROM: usize = 128;
const REPAIR_PART: usize = 32;
/// Lost slots are looked for when this part of the graph has changed, in so many passes at most.
const SEARCH_PARTY_PART: u64 = 16;
const SEARCH_PARTIES: usize = 3;
/// Dead slots freed under one hold of the lock.
const RECLAIM_SLOTS: usize = 32;
/// The graph file is written anew when a part of this size of the graph has changed.
const SAVE_PART: u64 = 20;
/// Slots looked at under one hold of the lock where each takes nanoseconds.
const SLICE_SLOTS: usize = 4096;
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
    searches: Mutex<Searches>,
    linking: RwLock<()>,
    upkeep: Mutex<Upkeep>,
    repair: Mutex<Option<Arc<Repair>>>,
    search_party: Mutex<Option<Arc<SearchParty>>>,
    log: Mutex<Option<SlotLog>>,
    dir: Option<PathBuf>,
    background: Arc<Background>,
    /// In the background's queue.
    is_queued: AtomicBool,
    /// A sync of the rows failed: no more checkpoints until a restart.
    rows_failed: AtomicBool,
    /// The graph is catching up with vectors that were there before it: writes need not wait for that.
    is_catching_up: AtomicBool,
    /// [`crate::vector::collection::GraphCounts::changes`] at the last save.
    saved_changes: AtomicU64,
}

#[derive(Debug, Default)]
struct Searches {
    next: SearchNumber,
    running: BTreeSet<SearchNumber>,
}

#[derive(Debug)]
struct Upkeep {
    /// The graph file has yet to be looked at.
    has_to_load: bool,
    /// Changes of the graph when lost slots were last looked for.
    searched_at: u64,
}

/// A pass that looks for every slot, and makes those findable that are not. Old links are given up for better ones, and
/// now and then the last that led somewhere is among them.
#[derive(Debug)]
struct SearchParty {
    pass: Pass,
    found: AtomicUsize,
    /// A pass that found some is followed by another, but not for ever.
    passes_left: usize,
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
            std::fs::create_dir_all(dir).map_err(Error::io("cannot create", dir))?;
            std::fs::File::open(vectors).and_then(|d| d.sync_all()).map_err(Error::io("cannot sync", vectors))?;
        }
        let (collection, log) = Collection::open(dir.as_deref(), spec, created)?;
        if let Some(dir) = &dir {
            std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io("cannot sync", dir))?;
        }
        let has_vectors = !collection.is_empty();
        let shared = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            spec,
            created,
            inner: RwLock::new(collection),
            searches: Mutex::default(),
            linking: RwLock::new(()),
            upkeep: Mutex::new(Upkeep { has_to_load: dir.is_some(), searched_at: 0 }),
            repair: Mutex::new(None),
            search_party: Mutex::new(None),
            log: Mutex::new(log),
            dir,
            background: Arc::clone(background),
            is_queued: AtomicBool::new(false),
            rows_failed: AtomicBool::new(false),
            is_catching_up: AtomicBool::new(true),
            saved_changes: AtomicU64::new(0),
        });
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

    /// Looks at the collection. Keep it short: the writer waits.
    pub fn read<T>(&self, look: impl FnOnce(&Collection) -> T) -> T {
        look(&self.inner.read())
    }

    /// Prepares room for `more` vectors beyond those applied. Does I/O under the read lock only: searches go on.
    pub fn reserve(&self, more: usize) -> Result<(), Error> {
        let chunks: Vec<NewChunk> = self.inner.read().allocate(more)?;
        if !chunks.is_empty() {
            self.inner.write().grow(chunks);
        }
        Ok(())
    }

    /// Applies a write of numbers and metadata; returns by how much the charge against the memory budget changed.
    pub fn put(&self, id: &VectorId, numbers: &[f32], meta: &VectorMeta, revision: Revision) -> isize {
        let horizon = self.horizon();
        self.change(|inner| inner.put(id, numbers, meta, revision, horizon))
    }

    /// Applies a write of metadata alone.
    pub fn set_meta(&self, id: &VectorId, meta: &VectorMeta, revision: Revision) -> isize {
        self.change(|inner| inner.set_meta(id, meta, revision))
    }

    /// Applies a delete.
    pub fn delete(&self, id: &VectorId, revision: Revision) -> isize {
        let horizon = self.horizon();
        self.change(|inner| inner.delete(id, revision, horizon))
    }

    fn change(&self, apply: impl FnOnce(&mut Collection)) -> isize {
        let change = {
            let mut inner = self.inner.write();
            let before = inner.charged_bytes();
            apply(&mut inner);
            inner.charged_bytes().cast_signed() - before.cast_signed()
        };
        self.wake();
        change
    }

    /// Whether a vector write may go ahead, or should wait for the linkers: their tail is full, or too many dead slots are
    /// not free yet.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let (counts, slots) = self.read(|c| (c.graph_counts(), c.slot_count()));
        let is_behind = counts.tail > TAIL_MAX && !self.is_catching_up.load(Ordering::Relaxed);
        let is_littered = counts.is_full && counts.garbage > GARBAGE_FROM.max(slots / GARBAGE_PART);
        !is_behind && !is_littered
    }

    fn horizon(&self) -> Horizon {
        let durable = Revision(self.background.durable.load(Ordering::Acquire));
        let searches = self.searches.lock();
        Horizon { next: searches.next, oldest: searches.running.first().copied().unwrap_or(searches.next), durable }
    }

    fn begin(&self) -> SearchNumber {
        let mut searches = self.searches.lock();
        let number = searches.next;
        searches.next += 1;
        searches.running.insert(number);
        number
    }

    pub(super) fn end_search(&self, number: SearchNumber) {
        self.searches.lock().running.remove(&number);
    }

    /// Keeps everything visible at `at` in place until the ticket is dropped. The caller holds the state's read lock, so
    /// nothing newer is applied in between.
    pub fn begin_search(&self, at: Revision, searches: &[Search]) -> SearchTicket {
        let needs_live = |vectors| searches.iter().any(|search| search.needs_live(vectors));
        self.ticket(at, needs_live)
    }

    /// As [`SharedCollection::begin_search`], for [`SearchTicket::matching`].
    pub fn begin_match(&self, at: Revision) -> SearchTicket {
        self.ticket(at, |_| true)
    }

    fn ticket(&self, at: Revision, needs_live: impl FnOnce(usize) -> bool) -> SearchTicket {
        let collection = self.me.upgrade().expect("whoever calls holds it");
        let number = self.begin();
        let (graph, live) = self.read(|c| (c.searchable(), needs_live(c.len()).then(|| c.live().clone())));
        SearchTicket { collection, at, number, graph, live }
    }

    /// Puts the collection into the background's queue, unless it is there.
    fn wake(&self) {
        if !self.is_queued.swap(true, Ordering::AcqRel) {
            self.background.push(Weak::clone(&self.me));
        }
    }

    /// Does one piece of background work, if there is one, and asks to be called again if there may be more.
    pub fn work(&self, scratch: &mut Scratch) {
        self.is_queued.store(false, Ordering::Release);
        if self.work_once(scratch) {
            self.wake();
        }
    }

    /// Does one piece of background work; false when there is none.
    pub fn work_once(&self, scratch: &mut Scratch) -> bool {
        if let Some(upkeep) = self.upkeep.try_lock()
            && self.keep_up(upkeep)
        {
            return true;
        }
        self.repair_piece(scratch) || self.link_piece(scratch) || self.search_party_piece(scratch)
    }

    /// What one thread at a time does.
    fn keep_up(&self, mut upkeep: parking_lot::MutexGuard<'_, Upkeep>) -> bool {
        if upkeep.has_to_load {
            upkeep.has_to_load = false;
            self.load_graph();
            return true;
        }
        let (has_graph, vectors, counts) = self.read(|c| (c.graph().is_some(), c.len(), c.graph_counts()));
        if !has_graph && vectors >= self.background.graph_from {
            let graph = Arc::new(Graph::new(self.spec.metric, self.spec.dim));
            if let Err(error) = self.inner.write().start_graph(graph) {
                tracing::warn!(%error, "no memory for a graph; searches stay exact");
                return false;
            }
            return true;
        }
        if counts.uncoded > 0 {
            self.inner.write().code_some();
            return true;
        }
        if counts.tail <= TAIL_MAX {
            self.is_catching_up.store(false, Ordering::Relaxed);
        }
        let is_repairing = self.repair.lock().is_some();
        if !is_repairing && counts.buried >= REPAIR_FROM.max(counts.linked / REPAIR_PART) {
            // Others can link and help repairing meanwhile.
            self.wake();
            self.begin_repair();
            return true;
        }
        let changes = counts.changes - upkeep.searched_at;
        if !is_repairing && counts.tail == 0 && changes > counts.linked as u64 / SEARCH_PARTY_PART {
            upkeep.searched_at = counts.changes;
            self.begin_search_party(SEARCH_PARTIES);
            return true;
        }
        let horizon = self.horizon();
        let mut inner = self.inner.write();
        let has_indexed = inner.index_some();
        inner.reclaim(RECLAIM_SLOTS, horizon) || has_indexed
    }

    fn link_piece(&self, scratch: &mut Scratch) -> bool {
        let _linking = self.linking.read();
        let number = self.begin();
        let claimed = {
            let mut inner = self.inner.write();
            inner.graph().cloned().map(|graph| (graph, inner.claim_links(LINK_SLOTS), inner.has_unclaimed()))
        };
        let has_done = match claimed {
            Some((graph, slots, has_more)) if !slots.is_empty() => {
                if has_more {
                    self.wake();
                }
                let linked: Vec<(u32, bool)> =
                    slots.into_iter().map(|slot| (slot, graph.link(slot, scratch))).collect();
                let horizon = self.horizon();
                self.inner.write().finish_links(&linked, horizon);
                true
            }
            _ => false,
        };
        self.end_search(number);
        has_done
    }

    fn begin_repair(&self) {
        let (condemned, graph) = {
            let mut inner = self.inner.write();
            (inner.take_buried(), inner.graph().cloned())
        };
        let Some(graph) = graph else { return };
        // Whoever is linking may still make a link to one of them; after this, nobody.
        drop(self.linking.write());
        let repair = Arc::new(Repair::new(condemned, self.read(Collection::slot_count)));
        graph.drop_entries(|slot| repair.is_condemned(slot));
        *self.repair.lock() = Some(repair);
    }

    fn repair_piece(&self, scratch: &mut Scratch) -> bool {
        let Some(repair) = self.repair.lock().clone() else { return false };
        let Some(piece) = repair.pass.claim() else { return false };
        self.wake();
        let Some(graph) = self.read(|c| c.graph().cloned()) else { return false };
        let number = self.begin();
        for slot in piece.clone() {
            // The cast: slots are counted in u32.
            let slot = slot as u32;
            if !repair.is_condemned(slot) {
                graph.repair(slot, |slot| repair.is_condemned(slot), scratch);
            }
        }
        if repair.pass.finish(&piece) {
            self.end_repair(&graph, &repair);
        }
        self.end_search(number);
        true
    }

    fn end_repair(&self, graph: &Graph, repair: &Repair) {
        let linked = self.linked_slots();
        graph.choose_entries(&linked);
        for slots in repair.slots.chunks(SLICE_SLOTS) {
            let horizon = self.horizon();
            self.inner.write().finish_repair(slots, horizon);
        }
        *self.repair.lock() = None;
    }

    fn linked_slots(&self) -> Vec<u32> {
        let slots = self.read(Collection::slot_count);
        let slices = (0..slots).step_by(SLICE_SLOTS);
        slices
            .flat_map(|start| self.read(|c| c.linked_slots(start..start + SLICE_SLOTS)))
            .map(|(slot, _)| slot)
            .collect()
    }

    /// Does all background work there is, on this thread, and looks for lost vectors whether it is time or not: for tests and
    /// `kiss-vdb check`.
    pub fn settle(&self) {
        let mut scratch = Scratch::default();
        while self.work_once(&mut scratch) {}
        self.begin_search_party(SEARCH_PARTIES);
        while self.work_once(&mut scratch) {}
    }

    fn begin_search_party(&self, passes_left: usize) {
        let pass = Pass::new(self.read(Collection::slot_count));
        *self.search_party.lock() = Some(Arc::new(SearchParty { pass, found: AtomicUsize::new(0), passes_left }));
    }

    fn search_party_piece(&self, scratch: &mut Scratch) -> bool {
        let Some(party) = self.search_party.lock().clone() else { return false };
        let Some(piece) = party.pass.claim() else { return false };
        self.wake();
        let Some(graph) = self.read(|c| c.graph().cloned()) else { return false };
        {
            // It makes links, so a repair must not begin in its midst.
            let _linking = self.linking.read();
            let number = self.begin();
            let slots = self.read(|c| c.linked_slots(piece.clone()));
            let lost =
                slots.iter().filter(|&&(slot, _)| graph.nodes().is_live(slot) && graph.find_again(slot, scratch));
            party.found.fetch_add(lost.count(), Ordering::Relaxed);
            self.end_search(number);
        }
        if party.pass.finish(&piece) {
            let found = party.found.load(Ordering::Relaxed);
            *self.search_party.lock() = None;
            tracing::debug!(found, "looked for lost vectors");
            if found > 0 && party.passes_left > 1 {
                self.begin_search_party(party.passes_left - 1);
                self.wake();
            }
        }
        true
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
        let graph = Arc::new(Graph::new(self.spec.metric, self.spec.dim));
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
        let adopted = self.inner.write().adopt_graph(Arc::clone(&graph), &known);
        self.end_search(number);
        match adopted {
            Ok(()) => tracing::info!(
                slots = known.len(),
                took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                "loaded a graph"
            ),
            Err(error) => tracing::warn!(%error, "no memory for the graph file; searches stay exact"),
        }
        self.saved_changes.store(self.read(|c| c.graph_counts().changes), Ordering::Relaxed);
    }

    /// Writes the graph file when enough has changed. It is a hint: whatever goes wrong is logged, and the next start takes
    /// longer.
    fn save_graph(&self) {
        let (Some(dir), Some(graph)) = (&self.dir, self.read(|c| c.graph().cloned())) else { return };
        let counts = self.read(Collection::graph_counts);
        let changes = counts.changes - self.saved_changes.load(Ordering::Relaxed);
        if changes * SAVE_PART < counts.linked as u64 || counts.uncoded > 0 {
            return;
        }
        let number = self.begin();
        let slots = self.read(Collection::slot_count);
        let slices =
            (0..slots).step_by(SLICE_SLOTS).map(|start| self.read(|c| c.linked_slots(start..start + SLICE_SLOTS)));
        let result = graph_file::write(dir, self.spec, self.created, &graph, slices);
        self.end_search(number);
        match result {
            Ok(()) => self.saved_changes.store(counts.changes, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "the graph file was not written; the next start links anew"),
        }
    }

    /// Looks for faults in the graph, while nothing else happens to the collection.
    #[must_use]
    pub fn validate(&self) -> Option<crate::vector::validate::Report> {
        let graph = self.read(|c| c.graph().cloned())?;
        let linked = self.linked_slots();
        let repair = self.repair.lock().clone();
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
        // The head is read first: what is applied in between is then in both, the files and the replay.
        let revision = head();
        let changes = self.inner.write().take_changes();
        if changes.is_empty() {
            return Ok(false);
        }
        let ids: Vec<VectorId> = changes.iter().cloned().collect();
        let result = self.write_checkpoint(log, revision, &ids, sync_log);
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
        changes: &[VectorId],
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (previous, newest, rewrite, rows) = {
            let inner = self.inner.read();
            (inner.checkpoint().0, inner.revision(), inner.wants_rewrite(log.bytes()), inner.sync_handle()?)
        };
        let sync_rows = || match (&rows, &self.dir) {
            (Some(rows), Some(dir)) => rows.sync_data().map_err(|e| {
                // The kernel may have dropped the pages: never sync them again. The log keeps everything since the last
                // checkpoint, and a restart replays it.
                self.rows_failed.store(true, Ordering::Release);
                Error::io("cannot sync the rows in", dir)(e)
            }),
            _ => Ok(()),
        };
        if rewrite {
            let mut successor = log.rewrite(self.spec, self.created)?;
            let mut after: Option<VectorId> = None;
            loop {
                let entries = {
                    let inner = self.inner.read();
                    let page = inner.list(after.as_ref().map(VectorId::as_str), CHECKPOINT_IDS, false);
                    let ids: Vec<VectorId> = page.into_iter().map(|item| item.id).collect();
                    after = ids.last().cloned();
                    inner.slot_entries(&ids)
                };
                let is_last = entries.len() < CHECKPOINT_IDS;
                successor.write(&encode_frame(if is_last { revision } else { previous }, newest, &entries))?;
                if is_last {
                    break;
                }
            }
            sync_log()?;
            sync_rows()?;
            return log.replace(successor);
        }
        let mut frames = Vec::new();
        let pages: Vec<_> = changes.chunks(CHECKPOINT_IDS).collect();
        for (at, page) in pages.iter().enumerate() {
            let entries = self.inner.read().slot_entries(page);
            let is_last = at + 1 == pages.len();
            frames.extend_from_slice(&encode_frame(if is_last { revision } else { previous }, newest, &entries));
        }
        sync_log()?;
        sync_rows()?;
        log.append(&frames)
    }
}

/// Turns a failure to get room into what the client is told; the operator reads the rest in the server's log.
#[must_use]
pub fn no_room(error: &Error) -> Rejection {
    tracing::warn!(%error, "no room for more vectors");
    Rejection::StorageFull(
        "there is no room for more vectors; delete some or give the server more disk or memory".into(),
    )
}
