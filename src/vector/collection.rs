//! One collection: its rows, who lives in which slot, and the exact scan over them.
//!
//! Invariants
//! - `ids` maps each live id to exactly one slot, and that slot's `died` is [`ALIVE`].
//! - A slot is in exactly one of: live, dead (waiting for searches that may still see it), free.
//! - Applying a record twice changes nothing the second time: what is older than an id's revision is skipped, so
//!   recovery may replay from any checkpoint.
//!
//! Deliberately absent: locks. The engine shares a collection behind one lock and scans it in slices.

use super::chunks::Chunks;
use super::codes::encode;
use super::distance::{dot_f64, kernels, l2_squared_f64};
use super::filter::{any_at, integer};
use super::graph::Graph;
use super::meta_index::MetaIndex;
use super::storage::{Growth, NewChunk, RowStore, SlotEntry, SlotLog};
use super::topk::{Candidate, TopK};
use super::{CollectionSpec, Hit, META_BYTES_MAX, Metric, Slot, VectorId, VectorMeta};
use crate::disk::File;
use crate::error::Error;
use crate::revision::Revision;
use rayon::prelude::*;
use roaring::RoaringBitmap;
use std::collections::btree_map::Entry;
use std::collections::hash_map;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Rows fetched ahead of the one that is scored.
const ROWS_AHEAD: usize = 4;
/// `died` of a slot that is live.
const ALIVE: Revision = Revision(u64::MAX);
/// Norms outside this range make f32 scores inexact or infinite; such rows are scored in f64.
const NORM_RANGE: Range<f32> = 1e-18..1e18;
/// Distances below this have squares that f32 holds with fewer digits, or not at all.
const L2_MIN: f32 = 1e-18;
/// Cosines from here on, of vectors that point (almost) one way or opposite ones, are told apart by less than f32 sums leave right.
const COSINE_NEAR: f32 = 1.0 - 4e-6;
/// A slot log is rewritten when it is larger than this and more than half of it is history.
const REWRITE_BYTES_MIN: u64 = 4 << 20;
/// What a slot costs in memory beside its row, id and metadata text: revisions, norm, map entry, headers.
const SLOT_OVERHEAD_BYTES: usize = 140;

/// Metadata put into the index under one hold of the lock: some tens of microseconds.
const SLICE_META_BYTES: usize = 8 << 10;
/// Numbers looked at for the mean of a collection.
const CENTRE_NUMBERS: usize = 1 << 18;
/// Slots moved from one list to another under one hold of the lock, where each takes a microsecond or more.
const CODED_SLOTS: usize = 32;

/// A set of vectors of one dimension and one metric.
#[derive(Debug)]
pub struct Collection {
    spec: CollectionSpec,
    created: Revision,
    rows: RowStore,
    /// Up to where the files say that they are complete.
    checkpoint: Revision,
    /// Up to where they are: later than that where nothing changed since.
    complete: Revision,
    changes: Changes,
    /// Only what has files has use for the names of what was deleted.
    has_files: bool,
    ids: BTreeMap<VectorId, Slot>,
    slots: Chunks<SlotState>,
    free: Vec<Slot>,
    /// Slots that are neither live nor linked, each with the first search that cannot know it.
    dead: VecDeque<(Slot, SearchNumber)>,
    /// Newest revision that changed this collection.
    revision: Revision,
    /// Bytes of ids and metadata of occupied slots.
    text_bytes: usize,
    /// Live slots.
    live: RoaringBitmap,
    /// Updated in the background: an edit takes microseconds and more, and the writer does not wait for it.
    meta_index: MetaIndex,
    /// Slots that the index lacks, or holds with their old metadata: a filter looks at the metadata itself.
    unindexed: RoaringBitmap,
    /// The part of `unindexed` that may be indexed now, as no running search needs the old metadata any more. A search that does
    /// would find such a slot in the index neither as it was nor as it is.
    due: RoaringBitmap,
    /// Metadata that was replaced while searches ran that see it, of each slot the oldest first, with what replaced it.
    replaced: HashMap<u32, VecDeque<(Revision, VectorMeta)>>,
    /// The slots of those, in the order of the changes, each with the first search that does not see it.
    replaced_order: VecDeque<(SearchNumber, u32)>,
    /// The old metadata that the index still holds of slots in `unindexed`.
    outdated: HashMap<u32, VectorMeta>,
    /// Slots whose metadata is too large for the index.
    unindexable: RoaringBitmap,
    graph: Option<Arc<Graph>>,
    /// Live slots from before there was a graph, not yet in it.
    uncoded: RoaringBitmap,
    /// Slots in the graph's memory and not yet linked, oldest first; the first `claimed` are being linked.
    tail: VecDeque<u32>,
    claimed: usize,
    /// Linked slots that died, until a repair pass takes them.
    buried: Vec<u32>,
    /// Linked slots that are live.
    linked: usize,
    /// Links, deaths and repairs, to tell how old a graph file is.
    graph_changes: u64,
}

/// What changed since a checkpoint. Slots rather than ids, and nothing that is hashed: the writer notes every vector, and a table
/// of a million would be filled anew under it.
#[derive(Debug, Default)]
pub struct Changes {
    /// Of ids that were written. Those who have left one since are in `gone` or in another slot.
    pub slots: RoaringBitmap,
    /// Ids that were deleted, and may be back.
    pub gone: BTreeSet<VectorId>,
}

impl Changes {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.gone.is_empty()
    }
}

/// Searches are numbered as they begin.
pub type SearchNumber = u64;

/// What a write has to know of searches and of durability before it reuses a slot.
#[derive(Clone, Copy, Debug)]
pub struct Horizon {
    /// The number the next search gets.
    pub next: SearchNumber,
    /// The oldest search or linker's job that is running; `next` when none is.
    pub oldest: SearchNumber,
    /// The same of searches alone, who look at metadata.
    pub oldest_search: SearchNumber,
    /// What was freed after this revision could come back in a crash.
    pub durable: Revision,
}

/// Where a slot stands with the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No link leads to it, and nobody is making one.
    Outside,
    /// In the tail.
    Waiting,
    /// Links may lead to it.
    Linked,
}

#[derive(Debug)]
struct SlotState {
    born: Revision,
    died: Revision,
    /// Euclidean length of the row for cosine; NaN where f32 cannot be trusted with it.
    norm: f32,
    stage: Stage,
    /// Last change of the id that lives here: `born`, or a later change of its metadata.
    revision: Revision,
    id: VectorId,
    meta: VectorMeta,
}

/// How far the graph is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Live slots that are linked.
    pub linked: usize,
    /// Slots in the tail.
    pub tail: usize,
    /// Live slots from before the graph, not yet in its memory.
    pub uncoded: usize,
    /// Linked slots that died and wait for a repair pass.
    pub buried: usize,
    /// Slots neither live nor free: to be repaired around, or still known to a search.
    pub garbage: usize,
    /// No slot is free: the next vector takes a new one.
    pub is_full: bool,
    /// Counts up with every change.
    pub changes: u64,
}

/// A vector as `get` and `list` return it.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Its id.
    pub id: VectorId,
    /// Last change of the vector or its metadata.
    pub revision: Revision,
    /// Its metadata.
    pub meta: VectorMeta,
    /// Its numbers as they were sent, when asked for.
    pub vector: Option<Vec<f32>>,
}

/// A query vector made ready for a metric.
#[derive(Clone, Debug)]
pub struct Query {
    numbers: Vec<f32>,
    /// Of length one, it is that as far as f32 goes.
    length: f64,
}

impl Query {
    /// The numbers, at length one for cosine.
    #[must_use]
    pub fn numbers(&self) -> &[f32] {
        &self.numbers
    }

    /// For cosine the vector is brought to length one, in f64. It must have passed `Vector::check`.
    #[must_use]
    pub fn new(spec: CollectionSpec, vector: &[f32]) -> Self {
        if spec.metric != Metric::Cosine {
            return Self { numbers: vector.to_vec(), length: 1.0 };
        }
        let norm = (kernels().squares_f64)(vector).sqrt();
        // The cast: a component of a unit vector fits f32.
        let numbers: Vec<f32> = vector.iter().map(|&n| (f64::from(n) / norm) as f32).collect();
        let length = (kernels().squares_f64)(&numbers).sqrt();
        Self { numbers, length }
    }
}

/// A scan's question and what it has found so far.
#[derive(Clone, Debug)]
pub struct Scan {
    /// What to look near.
    pub query: Query,
    /// The best so far.
    pub top: TopK,
    /// Instead of one list, the best for each value of a metadata field.
    pub groups: Option<Groups>,
}

/// The best vectors for each value of a metadata field, of the values that have the best. Takes as much memory as some more values than
/// are wanted, however many there are: where the first pass had to forget some, it tells which are wanted, and a second finds their
/// vectors.
#[derive(Clone, Debug)]
pub struct Groups {
    /// The field's path.
    path: Vec<Box<str>>,
    /// None below this.
    min_score: Option<f32>,
    /// How many values are wanted.
    wanted: usize,
    /// How many vectors are kept for each value: one, once some were forgotten.
    size: usize,
    has_forgotten: bool,
    /// Whether no value is taken in any more: the second pass.
    is_closed: bool,
    /// By the value's JSON text.
    best: HashMap<String, (serde_json::Value, TopK)>,
    /// In the first pass, the worst that was kept when some were forgotten: what is worse changes nothing.
    floor: Option<Candidate>,
    /// Met under the collection's lock, and yet to be parsed without it.
    met: Vec<(Candidate, VectorMeta)>,
}

/// Values that the first pass keeps beyond the wanted ones, before it forgets the worst.
const SPARE_GROUPS: usize = 1024;

impl Groups {
    /// For the first pass.
    #[must_use]
    pub fn new(path: &[Box<str>], min_score: Option<f32>, wanted: usize, size: usize) -> Self {
        let (path, best, met) = (path.to_vec(), HashMap::new(), Vec::new());
        let (has_forgotten, is_closed, floor) = (false, false, None);
        Self { path, min_score, wanted, size, has_forgotten, is_closed, best, floor, met }
    }

    /// For a second pass, if it takes one to find `size` for each: the wanted values, with nothing in them.
    #[must_use]
    pub fn emptied(mut self, size: usize) -> Option<Self> {
        if !self.has_forgotten || size == self.size {
            return None;
        }
        self.forget_worst();
        let empty = TopK::new(size, self.min_score);
        self.best.values_mut().for_each(|(_, top)| *top = empty.clone());
        Some(Self { size, is_closed: true, floor: None, ..self })
    }

    /// The groups in the order of their best, with the value they share.
    pub fn into_sorted(self) -> impl Iterator<Item = (serde_json::Value, TopK)> {
        let best = self.best.into_iter();
        let mut groups: Vec<_> =
            best.filter_map(|(name, (value, top))| Some((top.best()?.clone(), name, value, top))).collect();
        groups.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        groups.into_iter().map(|(_, _, value, top)| (value, top))
    }

    fn meet(&mut self, score: f32, slot: Slot, id: &VectorId, meta: &VectorMeta) {
        let is_worse = |floor: &Candidate| score < floor.score || (score == floor.score && *id > floor.id);
        if self.min_score.is_none_or(|min| score >= min) && !self.floor.as_ref().is_some_and(is_worse) {
            self.met.push((Candidate { score, id: id.clone(), slot }, meta.clone()));
        }
    }

    /// Looks at the metadata of what was met, until it is over.
    fn take_in(&mut self, is_over: impl Fn() -> bool) {
        let path = std::mem::take(&mut self.path);
        for (candidate, meta) in std::mem::take(&mut self.met) {
            if is_over() {
                break;
            }
            any_at(&meta.parse(), &path, &mut |value| {
                match value {
                    serde_json::Value::Array(list) => list.iter().for_each(|value| self.offer(value, &candidate)),
                    value => self.offer(value, &candidate),
                }
                false
            });
            self.forget_some();
        }
        self.path = path;
    }

    fn forget_some(&mut self) {
        if !self.is_closed && self.best.len() > 2 * self.wanted + SPARE_GROUPS {
            self.forget_worst();
        }
    }

    fn offer(&mut self, value: &serde_json::Value, Candidate { score, id, slot }: &Candidate) {
        // `1` and `1.0` are one value, as for filters.
        let name = match value {
            serde_json::Value::Object(_) | serde_json::Value::Array(_) | serde_json::Value::Null => return,
            serde_json::Value::Number(number) => integer(number).map_or_else(|| value.to_string(), |n| n.to_string()),
            _ => value.to_string(),
        };
        let top = match self.best.entry(name) {
            hash_map::Entry::Occupied(known) => &mut known.into_mut().1,
            hash_map::Entry::Vacant(_) if self.is_closed => return,
            hash_map::Entry::Vacant(free) => &mut free.insert((value.clone(), TopK::new(self.size, self.min_score))).1,
        };
        // Offered twice for an array that repeats a value: the heap would keep both.
        if !top.holds(*slot) {
            top.offer(*score, *slot, id);
        }
    }

    /// Keeps the values that have the best vectors, and of each the best: what it had more may go on in one that is forgotten.
    fn forget_worst(&mut self) {
        self.keep_one();
        let mut all: Vec<(Candidate, String)> =
            self.best.iter().filter_map(|(name, (_, top))| Some((top.best()?.clone(), name.clone()))).collect();
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        self.floor = self.wanted.checked_sub(1).and_then(|last| all.get(last)).map(|(worst, _)| worst.clone());
        for (_, name) in all.drain(self.wanted.min(all.len())..) {
            self.best.remove(&name);
        }
    }

    /// Takes in what another part of the scan kept.
    #[must_use]
    pub fn merge(mut self, other: Self) -> Self {
        let other_has_forgotten = other.has_forgotten;
        for (name, (value, top)) in other.best {
            // No slot is in two parts.
            match self.best.entry(name) {
                hash_map::Entry::Vacant(free) => drop(free.insert((value, top))),
                hash_map::Entry::Occupied(mut mine) => mine.get_mut().1.add(top),
            }
        }
        if other_has_forgotten || self.has_forgotten {
            self.keep_one();
        }
        self.forget_some();
        self
    }

    fn keep_one(&mut self) {
        self.has_forgotten = true;
        if self.size > 1 && !self.is_closed {
            self.size = 1;
            self.best.values_mut().for_each(|(_, top)| top.keep_one());
        }
    }
}

impl Scan {
    /// Looks at the metadata of what was met under the collection's lock, now that it is not held.
    pub fn take_in(&mut self, is_over: impl Fn() -> bool) {
        if let Some(groups) = &mut self.groups {
            groups.take_in(is_over);
        }
    }
}

/// What a collection takes that holds nothing (measured: 11 KiB).
const EMPTY_BYTES: usize = 12 << 10;

impl Collection {
    /// Opens or creates the files in `dir` (which exists), or lives in memory when there is none. The slot log is
    /// returned apart: appending to it must not need the collection's lock.
    pub fn open(dir: Option<&Path>, spec: CollectionSpec, created: Revision) -> Result<(Self, Option<SlotLog>), Error> {
        let mut collection = Self {
            spec,
            created,
            rows: RowStore::open(dir.map(|d| d.join("rows.f32")), spec.dim)?,
            checkpoint: created,
            complete: created,
            changes: Changes::default(),
            has_files: dir.is_some(),
            ids: BTreeMap::new(),
            slots: Chunks::new(),
            free: Vec::new(),
            dead: VecDeque::new(),
            revision: created,
            text_bytes: 0,
            live: RoaringBitmap::new(),
            meta_index: MetaIndex::default(),
            unindexed: RoaringBitmap::new(),
            due: RoaringBitmap::new(),
            replaced: HashMap::new(),
            replaced_order: VecDeque::new(),
            outdated: HashMap::new(),
            unindexable: RoaringBitmap::new(),
            graph: None,
            uncoded: RoaringBitmap::new(),
            tail: VecDeque::new(),
            claimed: 0,
            buried: Vec::new(),
            linked: 0,
            graph_changes: 0,
        };
        let Some(dir) = dir else { return Ok((collection, None)) };
        let opened = SlotLog::open(dir.join("slots.log"), spec, created)?;
        collection.load(opened.entries)?;
        collection.checkpoint = collection.checkpoint.max(opened.checkpoint);
        collection.complete = collection.checkpoint;
        collection.revision = collection.revision.max(opened.newest);
        Ok((collection, Some(opened.log)))
    }

    fn load(&mut self, entries: Vec<SlotEntry>) -> Result<(), Error> {
        let nobody = VectorId::new("-").expect("one byte is a valid id");
        let mut places: HashMap<VectorId, Slot> = HashMap::with_capacity(entries.len());
        // The last word on each id counts; a slot named by two ids belongs to the later one.
        for entry in entries {
            let id = match &entry {
                SlotEntry::Live { id, .. } | SlotEntry::Gone { id } => id,
            };
            if let Some(old) = places.remove(id) {
                self.slots[old.index()] = SlotState::free(nobody.clone());
            }
            let SlotEntry::Live { id, slot, born, revision, norm, meta, .. } = entry else { continue };
            while self.slots.len() <= slot.index() {
                self.slots.push(SlotState::free(nobody.clone()));
            }
            let state = &mut self.slots[slot.index()];
            if state.died == ALIVE {
                places.remove(&state.id);
            }
            places.insert(id.clone(), slot);
            *state = SlotState { born, died: ALIVE, norm, stage: Stage::Outside, revision, id, meta };
        }
        let used = self.slots.len() - self.slots.iter().rev().take_while(|state| state.died != ALIVE).count();
        self.slots.truncate(used);
        self.rows.check_length(used)?;
        self.rows.grow(self.rows.growth(used).allocate()?);
        let occupied = self.slots.iter().filter(|state| state.died == ALIVE);
        self.text_bytes = occupied.map(|state| state.id.as_str().len() + state.meta.text().len()).sum();
        let (live, free): (Vec<Slot>, Vec<Slot>) =
            (0..used).map(to_slot).partition(|slot| self.slots[slot.index()].died == ALIVE);
        self.free = free.into_iter().rev().collect();
        self.live = live.iter().map(|slot| slot.0).collect();
        self.unindexed = self.live.clone();
        self.due = self.live.clone();
        let mut sorted: Vec<(VectorId, Slot)> = places.into_iter().collect();
        sorted.par_sort_unstable();
        // Sorted, a map is built in one go.
        self.ids = sorted.into_iter().collect();
        Ok(())
    }

    /// Dimension and metric.
    #[must_use]
    pub fn spec(&self) -> CollectionSpec {
        self.spec
    }

    /// The revision that created it; names its directory.
    #[must_use]
    pub fn created(&self) -> Revision {
        self.created
    }

    /// Newest revision that changed it.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Up to where its files say that they are complete.
    #[must_use]
    pub fn checkpoint(&self) -> Revision {
        self.checkpoint
    }

    /// From where on the log has what the files have not; `None` when that is nothing.
    #[must_use]
    pub fn behind(&self) -> Option<Revision> {
        (!self.changes.is_empty()).then_some(self.complete)
    }

    /// Live vectors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Slots in use or once used: what a scan walks.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// Bytes that so many slots take whatever lives in them: rows, bookkeeping, and their part of the graph.
    fn bytes_of(&self, slots: usize) -> usize {
        let graph = self.graph.as_ref().map_or(0, |graph| graph.nodes().bytes_of(slots) + graph.nodes().table_bytes());
        slots * (self.rows.stride() + SLOT_OVERHEAD_BYTES) + graph
    }

    /// Approximate bytes of memory: rows, graph, ids, metadata and its index, and the bookkeeping for each slot.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.bytes_of(self.slots.len()) + self.text_bytes + self.meta_index.memory_bytes()
    }

    /// What the live vectors are charged against the memory budget: room that deletes made is free again.
    #[must_use]
    pub fn charged_bytes(&self) -> usize {
        EMPTY_BYTES + self.bytes_of(self.ids.len()) + self.text_bytes + self.meta_index.memory_bytes()
    }

    /// Average bytes of an id and its metadata: what looking at metadata costs.
    #[must_use]
    pub fn text_bytes_average(&self) -> usize {
        self.text_bytes / self.ids.len().max(1)
    }

    /// What rows lack for `more` vectors beyond those there are: allocate it, and give it to [`Collection::grow`].
    #[must_use]
    pub fn growth(&self, more: usize) -> Growth {
        self.rows.growth(self.slots.len() + more)
    }

    /// Room in the graph, if there is one, for as many vectors as there are rows for.
    pub fn reserve_graph(&self) -> Result<(), Error> {
        self.graph.as_ref().map_or(Ok(()), |graph| graph.nodes().reserve(self.rows.capacity()))
    }

    /// Rows there is room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.rows.capacity()
    }

    /// Has the memory of rows of some slots given to this process now. Keep it small: the writer waits.
    pub fn populate(&self, slots: Range<usize>) {
        self.rows.populate(slots);
    }

    /// Takes allocated chunks into use.
    pub fn grow(&mut self, chunks: Vec<NewChunk>) {
        self.rows.grow(chunks);
    }

    /// Applies a vector write. The room must have been allocated.
    pub fn put(&mut self, id: &VectorId, numbers: &[f32], meta: &VectorMeta, revision: Revision, horizon: Horizon) {
        if self.free.is_empty() {
            self.reclaim(1, horizon);
        }
        let slot = self.free.last().copied().unwrap_or_else(|| to_slot(self.slots.len()));
        // One way through the map: each looks at a dozen ids in memory that is not at hand.
        let old = match self.ids.entry(id.clone()) {
            Entry::Vacant(place) if revision > self.checkpoint => {
                place.insert(slot);
                None
            }
            Entry::Occupied(mut place) if revision > self.checkpoint.max(self.slots[place.get().index()].revision) => {
                Some(place.insert(slot))
            }
            // The files already held what this revision did.
            _ => return,
        };
        self.revision = self.revision.max(revision);
        let state = SlotState {
            born: revision,
            died: ALIVE,
            norm: self.norm(numbers),
            stage: Stage::Outside,
            revision,
            id: id.clone(),
            meta: meta.clone(),
        };
        if self.free.pop().is_some() {
            self.slots[slot.index()] = state;
        } else {
            self.slots.push(state);
        }
        self.rows.write(slot, numbers);
        self.text_bytes += id.as_str().len() + meta.text().len();
        self.live.insert(slot.0);
        self.unindexed.insert(slot.0);
        self.due.insert(slot.0);
        self.code(slot);
        if let Some(old) = old {
            self.bury(old, revision, horizon);
        }
        self.changes.slots.insert(slot.0);
    }

    /// Puts a live slot that is outside into the graph's memory and the tail.
    fn code(&mut self, slot: Slot) {
        let Some(graph) = &self.graph else { return };
        // SAFETY: the slot is outside: no link leads to it, it is not in the tail, and it was free, which it is only when no
        // search or linker was left that could know its last tenant. The collection's write lock keeps others away.
        unsafe { self.write_code(graph, slot) };
        self.slots[slot.index()].stage = Stage::Waiting;
        self.tail.push_back(slot.0);
    }

    /// # Safety
    /// As [`super::nodes::Nodes::write`].
    unsafe fn write_code(&self, graph: &Graph, slot: Slot) {
        let row = self.rows.row(slot);
        let metric = self.spec.metric;
        let state = &self.slots[slot.index()];
        let mut code = vec![0; self.spec.dim];
        let figures = encode(metric, row, graph.centre(), &mut code);
        graph.note_figures(figures);
        // SAFETY: this function's contract.
        unsafe { graph.nodes().write(slot.0, state.born, ALIVE, &code, figures) };
    }

    /// Writes the rows of some occupied slots into a graph that nobody else has yet; each slot once.
    ///
    /// # Safety
    /// The graph is not shared with a search or linker, and no other thread writes the same slots.
    pub unsafe fn code_into(&self, graph: &Graph, slots: &[(u32, Revision)]) {
        for &(slot, _) in slots {
            // SAFETY: nobody reads the graph: this function's contract.
            unsafe { self.write_code(graph, Slot(slot)) };
        }
    }

    /// Applies a change of metadata alone; the row stays where it is.
    pub fn set_meta(&mut self, id: &VectorId, meta: &VectorMeta, revision: Revision, horizon: Horizon) {
        let Some(&slot) = self.ids.get(id) else { return };
        if self.is_known(slot, revision) {
            return;
        }
        self.revision = self.revision.max(revision);
        let state = &mut self.slots[slot.index()];
        self.text_bytes = self.text_bytes + meta.text().len() - state.meta.text().len();
        let old = std::mem::replace(&mut state.meta, meta.clone());
        state.revision = revision;
        self.forget_replaced(horizon);
        if horizon.oldest_search < horizon.next {
            self.replaced.entry(slot.0).or_default().push_back((revision, old.clone()));
            self.replaced_order.push_back((horizon.next, slot.0));
        }
        self.outdate(slot, old);
        self.changes.slots.insert(slot.0);
    }

    /// Forgets metadata that no search sees any more.
    pub fn forget_replaced(&mut self, horizon: Horizon) {
        while let Some(&(first_without, slot)) = self.replaced_order.front()
            && first_without <= horizon.oldest_search
        {
            self.replaced_order.pop_front();
            let Some(versions) = self.replaced.get_mut(&slot) else { continue };
            versions.pop_front();
            if versions.is_empty() {
                self.replaced.remove(&slot);
                if self.unindexed.contains(slot) {
                    self.due.insert(slot);
                }
            }
        }
    }

    /// Whether some of it is kept.
    #[must_use]
    pub fn has_replaced(&self) -> bool {
        !self.replaced_order.is_empty()
    }

    /// A slot's metadata as a search sees it that began at `at`.
    fn meta_at(&self, slot: Slot, at: Revision) -> &VectorMeta {
        let state = &self.slots[slot.index()];
        if state.revision <= at {
            return &state.meta;
        }
        let versions = self.replaced.get(&slot.0).into_iter().flatten();
        versions.into_iter().find(|(replaced_by, _)| *replaced_by > at).map_or(&state.meta, |(_, meta)| meta)
    }

    /// Applies a delete.
    pub fn delete(&mut self, id: &VectorId, revision: Revision, horizon: Horizon) {
        let Some(&slot) = self.ids.get(id) else { return };
        if self.is_known(slot, revision) {
            return;
        }
        self.revision = self.revision.max(revision);
        self.ids.remove(id);
        self.bury(slot, revision, horizon);
        if self.has_files {
            self.changes.gone.insert(id.clone());
        }
    }

    /// Whether the files already held what this revision did.
    fn is_known(&self, slot: Slot, revision: Revision) -> bool {
        revision <= self.checkpoint || self.slots[slot.index()].revision >= revision
    }

    fn norm(&self, numbers: &[f32]) -> f32 {
        if self.spec.metric != Metric::Cosine {
            return 1.0;
        }
        // The cast: out of range becomes infinite and then NaN below.
        let norm = (kernels().squares_f64)(numbers).sqrt() as f32;
        if NORM_RANGE.contains(&norm) { norm } else { f32::NAN }
    }

    fn bury(&mut self, slot: Slot, revision: Revision, horizon: Horizon) {
        let state = &mut self.slots[slot.index()];
        state.died = revision;
        self.text_bytes -= state.id.as_str().len() + state.meta.text().len();
        self.live.remove(slot.0);
        self.uncoded.remove(slot.0);
        if let (Some(graph), Stage::Waiting | Stage::Linked) = (&self.graph, state.stage) {
            graph.nodes().bury(slot.0, revision);
        }
        match state.stage {
            Stage::Outside => self.dead.push_back((slot, horizon.next)),
            // Whoever links the tail finds it dead.
            Stage::Waiting => {}
            Stage::Linked => {
                self.linked -= 1;
                self.graph_changes += 1;
                self.buried.push(slot.0);
            }
        }
    }

    /// Frees up to so many dead slots that no search can know any more, and whose death no crash can undo. Returns
    /// whether it freed any.
    pub fn reclaim(&mut self, most: usize, horizon: Horizon) -> bool {
        let mut freed = 0;
        while freed < most
            && let Some(&(slot, first_without)) = self.dead.front()
            && horizon.oldest >= first_without
            && horizon.durable >= self.slots[slot.index()].died
        {
            self.dead.pop_front();
            let meta = std::mem::replace(&mut self.slots[slot.index()].meta, VectorMeta::empty());
            self.outdate(slot, meta);
            self.slots[slot.index()].born = ALIVE;
            self.free.push(slot);
            freed += 1;
        }
        freed > 0
    }

    /// The index has a slot as it was.
    fn outdate(&mut self, slot: Slot, meta: VectorMeta) {
        if self.unindexed.insert(slot.0) && !self.unindexable.remove(slot.0) {
            self.outdated.insert(slot.0, meta);
        }
        if self.replaced.contains_key(&slot.0) {
            self.due.remove(slot.0);
        } else {
            self.due.insert(slot.0);
        }
    }

    /// Brings some slots of the index up to date; false when all are that may be. One hold of the lock takes what was there of a slot
    /// out and puts what is there in, so that a filter on a field that did not change never misses it.
    pub fn index_some(&mut self) -> bool {
        let mut bytes = 0;
        while bytes < SLICE_META_BYTES {
            let Some(slot) = self.due.min() else { return false };
            self.due.remove(slot);
            self.unindexed.remove(slot);
            if let Some(old) = self.outdated.remove(&slot) {
                bytes += old.text().len();
                self.meta_index.remove(Slot(slot), &old);
            }
            let state = &self.slots[slot as usize];
            bytes += state.meta.text().len() + SLICE_META_BYTES / CODED_SLOTS;
            if !state.is_free() && !self.meta_index.insert(Slot(slot), &state.meta) {
                self.unindexable.insert(slot);
            }
        }
        true
    }

    /// The index over metadata.
    #[must_use]
    pub fn meta_index(&self) -> &MetaIndex {
        &self.meta_index
    }

    /// Those of some slots whose metadata the index does not hold as it is.
    #[must_use]
    pub fn not_indexed(&self, slots: &RoaringBitmap) -> RoaringBitmap {
        (&self.unindexed | &self.unindexable) & slots
    }

    /// Bytes of the metadata of these; where there are many, as much as they may have.
    #[must_use]
    pub fn not_indexed_bytes(&self, slots: &RoaringBitmap) -> usize {
        const FEW: u64 = 64;
        let count = self.unindexed.intersection_len(slots) + self.unindexable.intersection_len(slots);
        match count {
            0 => 0,
            1..=FEW => {
                self.not_indexed(slots).iter().map(|slot| self.slots[slot as usize].meta.text().len() + 16).sum()
            }
            _ => usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(META_BYTES_MAX),
        }
    }

    /// Whether the index is behind, or dead slots wait to be freed.
    #[must_use]
    pub fn has_upkeep(&self) -> bool {
        !self.due.is_empty() || !self.dead.is_empty() || self.has_replaced()
    }

    /// Live slots.
    #[must_use]
    pub fn live(&self) -> &RoaringBitmap {
        &self.live
    }

    /// The metadata that some slots had at `at`.
    pub fn metas_at(&self, slots: &[u32], at: Revision) -> Vec<VectorMeta> {
        slots.iter().map(|&slot| self.meta_at(Slot(slot), at).clone()).collect()
    }

    /// Some live slots, evenly: enough to tell where the vectors lie.
    #[must_use]
    pub fn sample(&self) -> Vec<u32> {
        let rows = (CENTRE_NUMBERS / self.spec.dim).max(64);
        self.live.iter().step_by(self.ids.len() / rows + 1).collect()
    }

    /// Adds the rows of some slots up.
    pub fn add_rows(&self, slots: &[u32], sums: &mut [f64]) {
        for &slot in slots {
            sums.iter_mut().zip(self.rows.row(Slot(slot))).for_each(|(sum, &n)| *sum += f64::from(n));
        }
    }

    /// Starts a graph over what is here; everything live has yet to be put into it.
    pub fn start_graph(&mut self, graph: Arc<Graph>) -> Result<(), Error> {
        graph.nodes().reserve(self.rows.capacity().max(self.slots.len()))?;
        self.uncoded = self.live.clone();
        self.graph = Some(graph);
        Ok(())
    }

    /// Starts with a graph whose `known` slots are linked already, each if it still holds what was born then. Slots that
    /// died meanwhile are buried.
    pub fn adopt_graph(&mut self, graph: Arc<Graph>, known: &[(u32, Revision)]) -> Result<(), Error> {
        graph.nodes().reserve(self.rows.capacity().max(self.slots.len()))?;
        self.uncoded = &self.live - known.iter().map(|&(slot, _)| slot).collect::<RoaringBitmap>();
        for &(slot, born) in known {
            let state = &mut self.slots[slot as usize];
            if state.born != born || state.stage != Stage::Outside {
                // The caller's search number keeps slots from being reused. If it had not: linked anew, at worst.
                if state.died == ALIVE {
                    self.uncoded.insert(slot);
                }
                continue;
            }
            state.stage = Stage::Linked;
            if state.died == ALIVE {
                self.linked += 1;
            } else {
                graph.nodes().bury(slot, state.died);
                self.buried.push(slot);
            }
        }
        let slots = &self.slots;
        self.dead.retain(|(slot, _)| slots[slot.index()].stage == Stage::Outside);
        self.graph = Some(graph);
        Ok(())
    }

    /// The graph, once everything live is in its memory, and the slots that are there but not linked.
    #[must_use]
    pub fn searchable(&self) -> Option<(Arc<Graph>, Vec<u32>)> {
        let graph = self.graph.as_ref().filter(|graph| self.uncoded.is_empty() && !graph.is_unfit())?;
        Some((Arc::clone(graph), self.tail.iter().copied().collect()))
    }

    /// The graph, searchable or not.
    #[must_use]
    pub fn graph(&self) -> Option<&Arc<Graph>> {
        self.graph.as_ref()
    }

    /// Puts some slots into the graph's memory; false when all are there.
    pub fn code_some(&mut self) -> bool {
        for _ in 0..CODED_SLOTS {
            let Some(slot) = self.uncoded.min() else { return false };
            self.uncoded.remove(slot);
            self.code(Slot(slot));
        }
        true
    }

    /// Takes slots from the tail to link them; [`Collection::finish_links`] must follow.
    #[must_use]
    pub fn claim_links(&mut self, most: usize) -> Vec<u32> {
        let claimed: Vec<u32> = self.tail.iter().skip(self.claimed).take(most).copied().collect();
        self.claimed += claimed.len();
        claimed
    }

    /// Reports claimed slots: linked, or found dead and left out.
    pub fn finish_links(&mut self, slots: &[(u32, bool)], horizon: Horizon) {
        for &(slot, is_linked) in slots {
            let state = &mut self.slots[slot as usize];
            if is_linked {
                state.stage = Stage::Linked;
                self.graph_changes += 1;
                if state.died == ALIVE {
                    self.linked += 1;
                } else {
                    self.buried.push(slot);
                }
            } else {
                state.stage = Stage::Outside;
            }
        }
        while let Some(&slot) = self.tail.front()
            && self.claimed > 0
            && self.slots[slot as usize].stage != Stage::Waiting
        {
            self.tail.pop_front();
            self.claimed -= 1;
            if self.slots[slot as usize].stage == Stage::Outside {
                // Found dead. Only now: a search that begins while the slot is in the tail scans it.
                self.dead.push_back((Slot(slot), horizon.next));
            }
        }
    }

    /// Takes the buried slots for a repair pass; [`Collection::finish_repair`] must follow.
    #[must_use]
    pub fn take_buried(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.buried)
    }

    /// No link leads to these slots any more.
    pub fn finish_repair(&mut self, slots: &[u32], horizon: Horizon) {
        self.graph_changes += slots.len() as u64;
        for &slot in slots {
            if let Some(graph) = &self.graph {
                graph.nodes().set_links(slot, &[]);
            }
            self.slots[slot as usize].stage = Stage::Outside;
            self.dead.push_back((Slot(slot), horizon.next));
        }
    }

    /// The live linked slots of a range, each with the revision it was born at.
    #[must_use]
    pub fn linked_slots(&self, range: Range<usize>) -> Vec<(u32, Revision)> {
        let range = self.clip(range);
        let is_linked = |state: &SlotState| state.stage == Stage::Linked && state.died == ALIVE;
        let in_range = range.map(|at| (at, &self.slots[at]));
        in_range.filter(|(_, state)| is_linked(state)).map(|(at, state)| (to_slot(at).0, state.born)).collect()
    }

    /// At most so many live slots that are linked, evenly; fewer where most are not. Looks at eight times as many.
    #[must_use]
    pub fn sample_linked(&self, count: usize) -> Vec<u32> {
        let (live, looks) = (self.live.len(), 8 * count as u64);
        // The cast: slots are counted in u32.
        let slots = (0..looks).filter_map(|look| self.live.select((look * live / looks) as u32));
        let mut linked: Vec<u32> = slots.filter(|&slot| self.slots[slot as usize].stage == Stage::Linked).collect();
        linked.dedup();
        linked.iter().step_by(linked.len().div_ceil(count).max(1)).copied().collect()
    }

    /// Whether a link may lead to a slot.
    #[must_use]
    pub fn may_be_linked(&self, slot: u32) -> bool {
        self.slots.get(slot as usize).is_some_and(|state| state.stage != Stage::Outside)
    }

    /// Slots linked, waiting to be, and neither live nor free.
    #[must_use]
    pub fn graph_counts(&self) -> GraphCounts {
        GraphCounts {
            linked: self.linked,
            tail: self.tail.len(),
            uncoded: usize::try_from(self.uncoded.len()).unwrap_or(usize::MAX),
            buried: self.buried.len(),
            garbage: self.slots.len() - self.ids.len() - self.free.len(),
            is_full: self.free.is_empty(),
            changes: self.graph_changes,
        }
    }

    /// Whether a slot holds a live vector born then.
    #[must_use]
    pub fn is_born(&self, slot: u32, born: Revision) -> bool {
        self.slots.get(slot as usize).is_some_and(|state| state.died == ALIVE && state.born == born)
    }

    /// The numbers in a slot that the caller knows to be occupied.
    #[must_use]
    pub fn row(&self, slot: u32) -> &[f32] {
        self.rows.row(Slot(slot))
    }

    /// The revision and metadata of a live id.
    #[must_use]
    pub fn peek(&self, id: &str) -> Option<(Revision, &VectorMeta)> {
        let state = &self.slots[self.ids.get(id)?.index()];
        Some((state.revision, &state.meta))
    }

    /// Where a live id's vector is.
    #[must_use]
    pub fn slot_of(&self, id: &VectorId) -> Option<u32> {
        self.ids.get(id).map(|slot| slot.0)
    }

    /// A live vector.
    #[must_use]
    pub fn get(&self, id: &str, include_vector: bool) -> Option<Item> {
        self.ids.get(id).map(|&slot| self.item(slot, include_vector))
    }

    fn item(&self, slot: Slot, include_vector: bool) -> Item {
        let state = &self.slots[slot.index()];
        Item {
            id: state.id.clone(),
            revision: state.revision,
            meta: state.meta.clone(),
            vector: include_vector.then(|| self.rows.row(slot).to_vec()),
        }
    }

    /// Live vectors in order of id, after `after`, and their slots.
    pub fn list(&self, after: Option<&str>, limit: usize, include_vector: bool) -> impl Iterator<Item = (u32, Item)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        let listed = self.ids.range::<str, _>((from, Unbounded)).take(limit);
        listed.map(move |(_, &slot)| (slot.0, self.item(slot, include_vector)))
    }

    /// The ids of those of some slots that are live.
    #[must_use]
    pub fn ids_of(&self, slots: &[u32]) -> Vec<VectorId> {
        let states = slots.iter().map(|&slot| &self.slots[slot as usize]);
        states.filter(|state| state.died == ALIVE).map(|state| state.id.clone()).collect()
    }

    fn clip(&self, slots: Range<usize>) -> Range<usize> {
        slots.start..slots.end.min(self.slots.len())
    }

    /// Scores every vector in a slice of slots that was live at `at`, for all scans in one pass over memory.
    pub fn scan(&self, slots: Range<usize>, at: Revision, scans: &mut [Scan]) {
        for slot in self.clip(slots) {
            for scan in &mut *scans {
                self.scan_slot(to_slot(slot), at, scan);
            }
        }
    }

    /// Scores those of some slots that were live at `at`.
    pub fn scan_slots(&self, slots: &[u32], at: Revision, scan: &mut Scan) {
        let (begun, rest) = slots.split_at(slots.len().min(ROWS_AHEAD));
        begun.iter().for_each(|&slot| self.rows.prefetch(Slot(slot)));
        let mut next = rest.iter();
        for &slot in slots {
            if let Some(&next) = next.next() {
                self.rows.prefetch(Slot(next));
            }
            self.scan_slot(Slot(slot), at, scan);
        }
    }

    #[inline]
    fn scan_slot(&self, slot: Slot, at: Revision, scan: &mut Scan) {
        let state = &self.slots[slot.index()];
        if !(state.born <= at && at < state.died) {
            return;
        }
        let score = self.score(&scan.query, slot);
        match &mut scan.groups {
            Some(groups) => groups.meet(score, slot, &state.id, self.meta_at(slot, at)),
            None => scan.top.offer(score, slot, &state.id),
        }
    }

    /// The score of one row, never NaN, within f32.
    fn score(&self, query: &Query, slot: Slot) -> f32 {
        let row = self.rows.row(slot);
        let norm = self.slots[slot.index()].norm;
        let kernels = kernels();
        let fast = match self.spec.metric {
            Metric::Cosine => ((kernels.dot)(&query.numbers, row) / norm).clamp(-1.0, 1.0),
            Metric::Dot => (kernels.dot)(&query.numbers, row),
            Metric::L2 => 0.0 - (kernels.l2_squared)(&query.numbers, row).sqrt(),
        };
        let is_coarse = match self.spec.metric {
            // A vector and its multiples are level, and first.
            Metric::Cosine => fast.abs() >= COSINE_NEAR,
            Metric::Dot => false,
            // Squares of tiny differences are none in f32, or coarse.
            Metric::L2 => fast > -L2_MIN,
        };
        if fast.is_finite() && !is_coarse { fast } else { self.score_in_f64(query, row) }
    }

    /// Where f32 does not do: rows whose length or sum, or whose squared distance, does not fit it, and what lies almost where the
    /// query does. Rare, and slow on purpose.
    #[cold]
    fn score_in_f64(&self, query: &Query, row: &[f32]) -> f32 {
        let score = match self.spec.metric {
            Metric::Cosine => {
                let lengths = dot_f64(row, row).sqrt() * query.length;
                (dot_f64(&query.numbers, row) / lengths).clamp(-1.0, 1.0)
            }
            Metric::Dot => dot_f64(&query.numbers, row),
            Metric::L2 => 0.0 - l2_squared_f64(&query.numbers, row).sqrt(),
        };
        // The cast: clamped to what f32 holds.
        score.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
    }

    /// A found slot as a hit. The slot must have been visible to the search, which began at `at`, and still be guarded by it.
    #[must_use]
    pub fn hit(&self, slot: Slot, score: f32, include_vector: bool, at: Revision) -> Hit {
        let state = &self.slots[slot.index()];
        Hit {
            id: state.id.clone(),
            score,
            meta: self.meta_at(slot, at).clone(),
            vector: include_vector.then(|| self.rows.row(slot).to_vec()),
        }
    }

    /// Takes what changed since the last call: what the next checkpoint has to write. O(1).
    #[must_use]
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Gives changes back whose checkpoint failed.
    pub fn restore_changes(&mut self, changes: Changes) {
        self.changes.slots |= changes.slots;
        self.changes.gone.extend(changes.gone);
    }

    /// What a checkpoint writes for these slots, as they are now; nothing for those that nobody lives in any more. What became of
    /// them is newer than the checkpoint, so that the log replays it; it is synced after this, before the checkpoint is written.
    #[must_use]
    pub fn entries_in(&self, slots: &[u32]) -> Vec<SlotEntry> {
        slots.iter().filter(|&&slot| self.live.contains(slot)).map(|&slot| self.entry_in(Slot(slot))).collect()
    }

    /// What a checkpoint writes for these ids, as they are now.
    #[must_use]
    pub fn entries_of(&self, ids: &[VectorId]) -> Vec<SlotEntry> {
        let entry = |id: &VectorId| {
            let slot = self.ids.get(id);
            slot.map_or_else(|| SlotEntry::Gone { id: id.clone() }, |&slot| self.entry_in(slot))
        };
        ids.iter().map(entry).collect()
    }

    fn entry_in(&self, slot: Slot) -> SlotEntry {
        let state = &self.slots[slot.index()];
        SlotEntry::Live {
            id: state.id.clone(),
            slot,
            born: state.born,
            revision: state.revision,
            norm: state.norm,
            row_crc: Some(self.rows.row_crc(slot)),
            meta: state.meta.clone(),
        }
    }

    /// The checksum of the numbers that `id` has had since `born`, if it still has them; for `kiss-vdb check`.
    #[must_use]
    pub fn row_crc_of(&self, id: &VectorId, born: Revision) -> Option<u32> {
        let slot = *self.ids.get(id)?;
        (self.slots[slot.index()].born == born).then(|| self.rows.row_crc(slot))
    }

    /// Whether a slot log of this size is mostly history and should be written anew.
    #[must_use]
    pub fn wants_rewrite(&self, log_bytes: u64) -> bool {
        let live_bytes = (self.ids.len() * 32 + self.text_bytes) as u64;
        log_bytes > REWRITE_BYTES_MIN && log_bytes > 2 * live_bytes
    }

    /// A handle to sync the rows by, without the collection's lock. `None` in memory.
    pub fn sync_handle(&self) -> Result<Option<File>, Error> {
        self.rows.sync_handle()
    }

    /// The files are complete up to here, and say so.
    pub fn set_checkpoint(&mut self, revision: Revision) {
        self.checkpoint = revision;
        self.complete = revision;
    }

    /// The files are complete up to here, as nothing has changed: they say what they said.
    pub fn set_complete(&mut self, revision: Revision) {
        self.complete = self.complete.max(revision);
    }
}

impl SlotState {
    /// Nobody lives or lived here since it was freed.
    fn is_free(&self) -> bool {
        self.born == ALIVE
    }

    fn free(id: VectorId) -> Self {
        Self {
            born: ALIVE,
            died: Revision::ZERO,
            norm: 1.0,
            stage: Stage::Outside,
            revision: Revision::ZERO,
            id,
            meta: VectorMeta::empty(),
        }
    }
}

fn to_slot(index: usize) -> Slot {
    Slot(u32::try_from(index).expect("a collection holds fewer than 2^32 vectors"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// More values than are kept, in several parts, against all values with all their vectors.
    #[test]
    fn groups_are_those_of_all_values_though_few_are_kept() {
        let mut random = 1_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let vectors: Vec<(f32, VectorId, Vec<u64>)> = (0..6000)
            .map(|n| {
                let score = next(500) as f32 - 250.0;
                (score, VectorId::new(&format!("{n:05}")).unwrap(), (0..1 + next(3)).map(|_| next(4000)).collect())
            })
            .collect();
        let mut all: BTreeMap<u64, Vec<(f32, &str)>> = BTreeMap::new();
        for (score, id, values) in &vectors {
            for value in values.iter().collect::<std::collections::BTreeSet<_>>() {
                all.entry(*value).or_default().push((*score, id.as_str()));
            }
        }
        let better = |a: &(f32, &str), b: &(f32, &str)| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1));
        all.values_mut().for_each(|vectors| vectors.sort_by(better));
        let mut expected: Vec<(u64, Vec<(f32, &str)>)> = all.into_iter().collect();
        expected.sort_by(|(a_value, a), (b_value, b)| {
            better(&a[0], &b[0]).then_with(|| a_value.to_string().cmp(&b_value.to_string()))
        });
        for (wanted, size, min_score) in
            [(1, 1, None), (7, 3, None), (40, 2, None), (40, 2, Some(245.0)), (3, 100, None)]
        {
            let pass = |empty: Groups| {
                let parts = vectors.chunks(1500).enumerate().map(|(part, chunk)| {
                    let mut groups = empty.clone();
                    for (slices, slice) in chunk.chunks(100).enumerate() {
                        for (at, (score, id, values)) in slice.iter().enumerate() {
                            let meta = VectorMeta::new(&json!({ "of": values }).to_string()).unwrap();
                            groups.meet(*score, Slot((part * 1500 + slices * 100 + at) as u32), id, &meta);
                        }
                        groups.take_in(|| false);
                        assert!(groups.best.len() <= 2 * wanted + SPARE_GROUPS);
                    }
                    groups
                });
                parts.fold(empty.clone(), Groups::merge)
            };
            let first = pass(Groups::new(&["of".into()], min_score, wanted, size));
            let groups = first.clone().emptied(size).map_or(first, pass);
            let found: Vec<(Value, Vec<(f32, String)>)> = groups
                .into_sorted()
                .take(wanted)
                .map(|(value, top)| {
                    let vectors = top.into_sorted().into_iter().map(|c| (c.score, c.id.as_str().to_owned()));
                    (value, vectors.collect())
                })
                .collect();
            let is_in = |(score, _): &&(f32, &str)| min_score.is_none_or(|min| *score >= min);
            let expected: Vec<(Value, Vec<(f32, String)>)> = expected
                .iter()
                .map(|(value, vectors)| {
                    let kept = vectors.iter().filter(is_in).take(size).map(|(score, id)| (*score, (*id).to_owned()));
                    (json!(value), kept.collect::<Vec<_>>())
                })
                .filter(|(_, vectors)| !vectors.is_empty())
                .take(wanted)
                .collect();
            assert_eq!(found, expected, "{wanted} groups of {size}, at least {min_score:?}");
        }
    }
}
