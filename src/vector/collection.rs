//! One collection: its rows, who lives in which slot, and the exact scan over them.
//!
//! Invariants
//! - `ids` maps each live id to exactly one slot, and that slot's `died` is [`ALIVE`].
//! - A slot is in exactly one of: live, dead (waiting for searches that may still see it), free.
//! - Applying a record twice changes nothing the second time: what is older than an id's revision is skipped, so
//!   recovery may replay from any checkpoint.
//!
//! Deliberately absent: locks. The engine shares a collection behind one lock and scans it in slices.

use super::distance::{dot_f64, kernels, l2_squared_f64};
use super::filter::{Filter, any_at};
use super::storage::{NewChunk, RowStore, SlotEntry, SlotLog};
use super::topk::TopK;
use super::{CollectionSpec, Hit, Metric, Slot, VectorId, VectorMeta};
use crate::error::Error;
use crate::revision::Revision;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// `died` of a slot that is live.
const ALIVE: Revision = Revision(u64::MAX);
/// Norms outside this range make f32 scores inexact or infinite; such rows are scored in f64.
const NORM_RANGE: Range<f32> = 1e-18..1e18;
/// A slot log is rewritten when it is larger than this and more than half of it is history.
const REWRITE_BYTES_MIN: u64 = 4 << 20;
/// What a slot costs in memory beside its row, id and metadata text: revisions, norm, map entry, headers.
const SLOT_OVERHEAD_BYTES: usize = 140;

/// A set of vectors of one dimension and one metric.
#[derive(Debug)]
pub struct Collection {
    spec: CollectionSpec,
    created: Revision,
    rows: RowStore,
    /// Up to where the files are complete.
    checkpoint: Revision,
    /// Ids that changed since then.
    changed: HashSet<VectorId>,
    ids: BTreeMap<VectorId, Slot>,
    slots: Vec<SlotState>,
    free: Vec<Slot>,
    dead: VecDeque<Slot>,
    /// Newest revision that changed this collection.
    revision: Revision,
    /// Bytes of ids and metadata of occupied slots.
    text_bytes: usize,
}

#[derive(Debug)]
struct SlotState {
    born: Revision,
    died: Revision,
    /// Euclidean length of the row for cosine; NaN where f32 cannot be trusted with it.
    norm: f32,
    /// Last change of the id that lives here: `born`, or a later change of its metadata.
    revision: Revision,
    id: VectorId,
    meta: VectorMeta,
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
}

impl Query {
    /// For cosine the vector is brought to length one, in f64. It must have passed `Vector::check`.
    #[must_use]
    pub fn new(spec: CollectionSpec, vector: &[f32]) -> Self {
        if spec.metric != Metric::Cosine {
            return Self { numbers: vector.to_vec() };
        }
        let norm = dot_f64(vector, vector).sqrt();
        // The cast: a component of a unit vector fits f32.
        let numbers = vector.iter().map(|&n| (f64::from(n) / norm) as f32).collect();
        Self { numbers }
    }
}

/// A scan's question and what it has found so far.
#[derive(Clone, Debug)]
pub struct Scan {
    /// What to look near.
    pub query: Query,
    /// Which vectors count.
    pub filter: Option<Filter>,
    /// The best so far.
    pub top: TopK,
    /// Instead of one list, the best for each value of a metadata field.
    pub groups: Option<Groups>,
}

/// The best vectors for each value of a metadata field. Memory: one list for each value met.
#[derive(Clone, Debug)]
pub struct Groups {
    /// The field's path.
    pub path: Vec<Box<str>>,
    /// How many are kept for each value.
    pub size: usize,
    /// None below this.
    pub min_score: Option<f32>,
    /// By the value's JSON text.
    pub best: HashMap<String, (serde_json::Value, TopK)>,
}

impl Groups {
    fn offer(&mut self, meta: &serde_json::Value, score: f32, slot: Slot, id: &VectorId) {
        let mut values = Vec::new();
        any_at(meta, &self.path, &mut |value| {
            match value {
                serde_json::Value::Array(list) => values.extend(list.iter().cloned()),
                other => values.push(other.clone()),
            }
            false
        });
        values.retain(|v| !v.is_object() && !v.is_array() && !v.is_null());
        for value in values {
            // Offered twice for an array that repeats a value: the heap would keep both.
            let name = value.to_string();
            let (size, min_score) = (self.size, self.min_score);
            let (_, top) = self.best.entry(name).or_insert_with(|| (value, TopK::new(size, min_score)));
            if !top.holds(slot) {
                top.offer(score, slot, id);
            }
        }
    }

    /// Takes in what another part of the scan kept.
    #[must_use]
    pub fn merge(mut self, other: Self) -> Self {
        for (name, (value, top)) in other.best {
            match self.best.entry(name) {
                std::collections::hash_map::Entry::Vacant(free) => drop(free.insert((value, top))),
                std::collections::hash_map::Entry::Occupied(mut mine) => {
                    let (value, old) = mine.get().clone();
                    mine.insert((value, old.merge(top)));
                }
            }
        }
        self
    }
}

impl Collection {
    /// Opens or creates the files in `dir` (which exists), or lives in memory when there is none. The slot log is
    /// returned apart: appending to it must not need the collection's lock.
    pub fn open(dir: Option<&Path>, spec: CollectionSpec, created: Revision) -> Result<(Self, Option<SlotLog>), Error> {
        let mut collection = Self {
            spec,
            created,
            rows: RowStore::open(dir.map(|d| d.join("rows.f32")), spec.dim)?,
            checkpoint: created,
            changed: HashSet::new(),
            ids: BTreeMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            dead: VecDeque::new(),
            revision: created,
            text_bytes: 0,
        };
        let Some(dir) = dir else { return Ok((collection, None)) };
        let opened = SlotLog::open(dir.join("slots.log"), spec, created)?;
        collection.load(opened.entries)?;
        collection.checkpoint = collection.checkpoint.max(opened.checkpoint);
        collection.revision = collection.revision.max(opened.newest);
        Ok((collection, Some(opened.log)))
    }

    fn load(&mut self, entries: Vec<SlotEntry>) -> Result<(), Error> {
        // The last word on each id counts; a slot named by two ids belongs to the later one.
        let mut live: BTreeMap<VectorId, (Slot, Revision, f32, VectorMeta)> = BTreeMap::new();
        let mut tenants: BTreeMap<Slot, VectorId> = BTreeMap::new();
        for entry in entries {
            match entry {
                SlotEntry::Live { id, slot, revision, norm, meta } => {
                    if let Some(evicted) = tenants.insert(slot, id.clone())
                        && evicted != id
                        && live.get(&evicted).is_some_and(|e| e.0 == slot)
                    {
                        live.remove(&evicted);
                    }
                    live.insert(id, (slot, revision, norm, meta));
                }
                SlotEntry::Gone { id } => {
                    live.remove(&id);
                }
            }
        }
        let count = live.values().map(|e| e.0.index() + 1).max().unwrap_or(0);
        self.rows.check_length(count)?;
        self.rows.grow(self.rows.allocate(count)?);
        let nobody = VectorId::new("-").expect("one byte is a valid id");
        self.slots = (0..count).map(|_| SlotState::free(nobody.clone())).collect();
        for (id, (slot, revision, norm, meta)) in live {
            self.text_bytes += id.as_str().len() + meta.text().len();
            self.slots[slot.index()] = SlotState { born: revision, died: ALIVE, norm, revision, id: id.clone(), meta };
            self.ids.insert(id, slot);
        }
        self.free = (0..count).rev().map(to_slot).filter(|s| self.slots[s.index()].died != ALIVE).collect();
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

    /// Up to where its files are complete, and whether anything changed since.
    #[must_use]
    pub fn checkpoint(&self) -> (Revision, bool) {
        (self.checkpoint, !self.changed.is_empty())
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

    /// Approximate bytes of memory: rows, ids, metadata and the bookkeeping for each slot.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.slots.len() * (self.rows.stride() + SLOT_OVERHEAD_BYTES) + self.text_bytes
    }

    /// What the live vectors are charged against the memory budget: room that deletes made is free again.
    #[must_use]
    pub fn charged_bytes(&self) -> usize {
        self.ids.len() * (self.rows.stride() + SLOT_OVERHEAD_BYTES) + self.text_bytes
    }

    /// Average bytes of an id and its metadata: what looking at metadata costs.
    #[must_use]
    pub fn text_bytes_average(&self) -> usize {
        self.text_bytes / self.ids.len().max(1)
    }

    /// Room for `more` vectors beyond those there are; give the chunks to [`Collection::grow`]. Does I/O.
    pub fn allocate(&self, more: usize) -> Result<Vec<NewChunk>, Error> {
        self.rows.allocate(self.slots.len() + more)
    }

    /// Takes allocated chunks into use.
    pub fn grow(&mut self, chunks: Vec<NewChunk>) {
        self.rows.grow(chunks);
    }

    /// Applies a vector write. The room must have been allocated. Slots freed after `reusable` are not taken: a running
    /// search may still see them, or (in the relaxed modes) a crash may undo what freed them.
    pub fn put(&mut self, id: &VectorId, numbers: &[f32], meta: &VectorMeta, revision: Revision, reusable: Revision) {
        let old = self.ids.get(id).copied();
        if self.is_known(old, revision) {
            return;
        }
        self.revision = self.revision.max(revision);
        let slot = self.take_slot(reusable, id);
        self.rows.write(slot, numbers);
        let norm = self.norm(numbers);
        self.text_bytes += id.as_str().len() + meta.text().len();
        self.slots[slot.index()] =
            SlotState { born: revision, died: ALIVE, norm, revision, id: id.clone(), meta: meta.clone() };
        self.ids.insert(id.clone(), slot);
        if let Some(old) = old {
            self.bury(old, revision);
        }
        self.changed.insert(id.clone());
    }

    /// Applies a change of metadata alone; the row stays where it is.
    pub fn set_meta(&mut self, id: &VectorId, meta: &VectorMeta, revision: Revision) {
        let Some(&slot) = self.ids.get(id) else { return };
        if self.is_known(Some(slot), revision) {
            return;
        }
        self.revision = self.revision.max(revision);
        let state = &mut self.slots[slot.index()];
        self.text_bytes = self.text_bytes + meta.text().len() - state.meta.text().len();
        state.meta = meta.clone();
        state.revision = revision;
        self.changed.insert(id.clone());
    }

    /// Applies a delete.
    pub fn delete(&mut self, id: &VectorId, revision: Revision) {
        let Some(&slot) = self.ids.get(id) else { return };
        if self.is_known(Some(slot), revision) {
            return;
        }
        self.revision = self.revision.max(revision);
        self.ids.remove(id);
        self.bury(slot, revision);
        self.changed.insert(id.clone());
    }

    /// Whether the files already held what this revision did.
    fn is_known(&self, slot: Option<Slot>, revision: Revision) -> bool {
        revision <= self.checkpoint || slot.is_some_and(|s| self.slots[s.index()].revision >= revision)
    }

    fn norm(&self, numbers: &[f32]) -> f32 {
        if self.spec.metric != Metric::Cosine {
            return 1.0;
        }
        // The cast: out of range becomes infinite and then NaN below.
        let norm = dot_f64(numbers, numbers).sqrt() as f32;
        if NORM_RANGE.contains(&norm) { norm } else { f32::NAN }
    }

    fn bury(&mut self, slot: Slot, revision: Revision) {
        let state = &mut self.slots[slot.index()];
        state.died = revision;
        self.text_bytes -= state.id.as_str().len() + state.meta.text().len();
        self.dead.push_back(slot);
    }

    fn take_slot(&mut self, reusable: Revision, tenant: &VectorId) -> Slot {
        while let Some(&slot) = self.dead.front() {
            let state = &mut self.slots[slot.index()];
            if reusable < state.died {
                break;
            }
            state.meta = VectorMeta::empty();
            self.dead.pop_front();
            self.free.push(slot);
        }
        self.free.pop().unwrap_or_else(|| {
            let slot = to_slot(self.slots.len());
            self.slots.push(SlotState::free(tenant.clone()));
            slot
        })
    }

    /// The revision and metadata of a live id.
    #[must_use]
    pub fn peek(&self, id: &str) -> Option<(Revision, &VectorMeta)> {
        let state = &self.slots[self.ids.get(id)?.index()];
        Some((state.revision, &state.meta))
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

    /// Live vectors in order of id, after `after`.
    #[must_use]
    pub fn list(&self, after: Option<&str>, limit: usize, include_vector: bool) -> Vec<Item> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.ids
            .range::<str, _>((from, Unbounded))
            .take(limit)
            .map(|(_, &slot)| self.item(slot, include_vector))
            .collect()
    }

    /// Live ids in a slice of slots that satisfy a filter, as of now.
    pub fn matching(&self, slots: Range<usize>, filter: &Filter, found: &mut Vec<VectorId>) {
        for slot in self.clip(slots) {
            let state = &self.slots[slot];
            if state.died == ALIVE && filter.matches(&state.meta.parse()) {
                found.push(state.id.clone());
            }
        }
    }

    fn clip(&self, slots: Range<usize>) -> Range<usize> {
        slots.start..slots.end.min(self.slots.len())
    }

    /// Scores every vector in a slice of slots that was live at `at`, for all scans in one pass over memory.
    pub fn scan(&self, slots: Range<usize>, at: Revision, scans: &mut [Scan]) {
        let wants_meta = scans.iter().any(|s| s.filter.is_some() || s.groups.is_some());
        for slot in self.clip(slots).map(to_slot) {
            let state = &self.slots[slot.index()];
            if !(state.born <= at && at < state.died) {
                continue;
            }
            let meta = wants_meta.then(|| state.meta.parse());
            for scan in &mut *scans {
                if let (Some(filter), Some(meta)) = (&scan.filter, &meta)
                    && !filter.matches(meta)
                {
                    continue;
                }
                let score = self.score(&scan.query, slot);
                match (&mut scan.groups, &meta) {
                    (Some(groups), Some(meta)) => groups.offer(meta, score, slot, &state.id),
                    _ => scan.top.offer(score, slot, &state.id),
                }
            }
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
        if fast.is_finite() { fast } else { self.score_in_f64(query, row) }
    }

    /// For rows whose length or sum does not fit f32: rare, and slow on purpose.
    #[cold]
    fn score_in_f64(&self, query: &Query, row: &[f32]) -> f32 {
        let score = match self.spec.metric {
            Metric::Cosine => (dot_f64(&query.numbers, row) / dot_f64(row, row).sqrt()).clamp(-1.0, 1.0),
            Metric::Dot => dot_f64(&query.numbers, row),
            Metric::L2 => 0.0 - l2_squared_f64(&query.numbers, row).sqrt(),
        };
        // The cast: clamped to what f32 holds.
        score.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
    }

    /// A found slot as a hit. The slot must have been visible to the search and still be guarded by it.
    #[must_use]
    pub fn hit(&self, slot: Slot, score: f32, include_vector: bool) -> Hit {
        let state = &self.slots[slot.index()];
        Hit {
            id: state.id.clone(),
            score,
            meta: state.meta.clone(),
            vector: include_vector.then(|| self.rows.row(slot).to_vec()),
        }
    }

    /// Takes the ids that changed since the last call: what the next checkpoint has to write. O(1).
    #[must_use]
    pub fn take_changes(&mut self) -> HashSet<VectorId> {
        std::mem::take(&mut self.changed)
    }

    /// Gives changes back whose checkpoint failed.
    pub fn restore_changes(&mut self, ids: HashSet<VectorId>) {
        self.changed.extend(ids);
    }

    /// What a checkpoint writes for these ids, as they are now.
    #[must_use]
    pub fn slot_entries(&self, ids: &[VectorId]) -> Vec<SlotEntry> {
        let entry = |id: &VectorId| match self.ids.get(id) {
            Some(&slot) => {
                let state = &self.slots[slot.index()];
                let meta = state.meta.clone();
                SlotEntry::Live { id: id.clone(), slot, revision: state.revision, norm: state.norm, meta }
            }
            None => SlotEntry::Gone { id: id.clone() },
        };
        ids.iter().map(entry).collect()
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

    /// The files are complete up to here.
    pub fn set_checkpoint(&mut self, revision: Revision) {
        self.checkpoint = revision;
    }
}

impl SlotState {
    fn free(id: VectorId) -> Self {
        Self { born: ALIVE, died: Revision::ZERO, norm: 1.0, revision: Revision::ZERO, id, meta: VectorMeta::empty() }
    }
}

fn to_slot(index: usize) -> Slot {
    Slot(u32::try_from(index).expect("a collection holds fewer than 2^32 vectors"))
}
