//! Collections as the engine shares them: every lock around vectors, exact search, and checkpoints.
//!
//! Locks, and why each
//! - `inner` (read/write): the writer applies a record under it for microseconds; a search holds it for one slice of
//!   [`SLICE_ROWS`] rows at a time, so that a long scan never makes the writer wait longer than one slice takes.
//! - `searches`: revisions of running searches. The writer asks for the oldest before it reuses a slot.
//! - `log`: the slot log, taken by the one checkpoint at a time. Never held together with `inner` over I/O.

use crate::error::{Error, Rejection};
use crate::revision::Revision;
use crate::vector::collection::{Collection, Query, Scan};
use crate::vector::filter::{Filter, any_at};
use crate::vector::storage::{NewChunk, SlotLog, encode_frame};
use crate::vector::topk::TopK;
use crate::vector::{CollectionSpec, Hit, VectorId, VectorMeta};
use parking_lot::{Mutex, RwLock};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows scanned under one hold of the lock: some tens of microseconds.
pub const SLICE_ROWS: usize = 2048;
/// Ids encoded under one hold of the lock during a checkpoint.
const CHECKPOINT_IDS: usize = 1000;
/// Scans of fewer numbers than this run where they are: handing them to other threads would take longer.
pub const INLINE_NUMBERS: usize = 1 << 18;

/// A collection, shared between the writer, searches and checkpoints.
#[derive(Debug)]
pub struct SharedCollection {
    spec: CollectionSpec,
    created: Revision,
    inner: RwLock<Collection>,
    searches: Mutex<BTreeMap<Revision, usize>>,
    log: Mutex<Option<SlotLog>>,
    dir: Option<PathBuf>,
}

/// One search, valid for its collection.
#[derive(Clone, Debug)]
pub struct Search {
    /// What to look near.
    pub query: Query,
    /// Which vectors count.
    pub filter: Option<Filter>,
    /// Hits wanted, 1 to `K_MAX`.
    pub k: usize,
    /// Hits to leave out at the front.
    pub offset: usize,
    /// Leaves out what scores lower.
    pub min_score: Option<f32>,
    /// Hits carry their numbers.
    pub include_vector: bool,
    /// Keep the best `size` hits for each value at this metadata path; `k` then counts groups.
    pub group: Option<Grouping>,
}

/// How hits are grouped.
#[derive(Clone, Debug)]
pub struct Grouping {
    /// A dotted path into the metadata.
    pub path: Vec<Box<str>>,
    /// Hits kept in each group.
    pub size: usize,
}

/// What a search found.
#[derive(Clone, Debug)]
pub enum Found {
    /// Best first.
    Hits(Vec<Hit>),
    /// Groups in the order of their best hit, with the value they share.
    Groups(Vec<(serde_json::Value, Vec<Hit>)>),
}

impl SharedCollection {
    /// Opens or creates the collection's directory below `vectors`, or lives in memory.
    pub fn open(vectors: Option<&Path>, spec: CollectionSpec, created: Revision) -> Result<Arc<Self>, Error> {
        let dir = vectors.map(|v| v.join(format!("{:020}", created.0)));
        if let (Some(dir), Some(vectors)) = (&dir, vectors)
            && !dir.exists()
        {
            std::fs::create_dir_all(dir).map_err(Error::io("cannot create", dir))?;
            std::fs::File::open(vectors).and_then(|d| d.sync_all()).map_err(Error::io("cannot sync", vectors))?;
        }
        let (collection, log) = Collection::open(dir.as_deref(), spec, created)?;
        Ok(Arc::new(Self {
            spec,
            created,
            inner: RwLock::new(collection),
            searches: Mutex::new(BTreeMap::new()),
            log: Mutex::new(log),
            dir,
        }))
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

    /// Prepares room for `more` vectors beyond those applied. Does I/O without the lock.
    pub fn reserve(&self, more: usize) -> Result<(), Error> {
        let chunks: Vec<NewChunk> = self.inner.read().allocate(more)?;
        if !chunks.is_empty() {
            self.inner.write().grow(chunks);
        }
        Ok(())
    }

    /// Applies a write of numbers and metadata; returns by how many bytes the collection grew.
    pub fn put(&self, id: &VectorId, numbers: &[f32], meta: &VectorMeta, revision: Revision) -> isize {
        let oldest = self.searches.lock().keys().next().copied();
        self.change(|inner| inner.put(id, numbers, meta, revision, oldest))
    }

    /// Applies a write of metadata alone.
    pub fn set_meta(&self, id: &VectorId, meta: &VectorMeta, revision: Revision) -> isize {
        self.change(|inner| inner.set_meta(id, meta, revision))
    }

    /// Applies a delete.
    pub fn delete(&self, id: &VectorId, revision: Revision) -> isize {
        self.change(|inner| inner.delete(id, revision))
    }

    fn change(&self, apply: impl FnOnce(&mut Collection)) -> isize {
        let mut inner = self.inner.write();
        let before = inner.memory_bytes();
        apply(&mut inner);
        inner.memory_bytes().cast_signed() - before.cast_signed()
    }

    /// Ids that satisfy a filter now.
    #[must_use]
    pub fn matching(&self, filter: &Filter) -> Vec<VectorId> {
        let mut found = Vec::new();
        for slice in self.slices() {
            self.inner.read().matching(slice, filter, &mut found);
        }
        found
    }

    fn slices(&self) -> Vec<std::ops::Range<usize>> {
        let slots = self.inner.read().slot_count();
        (0..slots).step_by(SLICE_ROWS).map(|start| start..(start + SLICE_ROWS).min(slots)).collect()
    }

    /// How many numbers a scan reads: what decides where it runs.
    #[must_use]
    pub fn scan_numbers(&self) -> usize {
        self.inner.read().slot_count() * self.spec.dim
    }

    /// Keeps everything visible at `at` in place until the ticket is dropped. The caller holds the state's read lock, so
    /// nothing newer is applied in between.
    pub fn begin_search(self: &Arc<Self>, at: Revision) -> SearchTicket {
        *self.searches.lock().entry(at).or_insert(0) += 1;
        SearchTicket { collection: Arc::clone(self), at }
    }

    fn scan_all(&self, searches: &[Search], at: Revision) -> Vec<Scan> {
        let scans: Vec<Scan> = searches
            .iter()
            .map(|search| {
                // Grouping may have to look at every match before it has k groups.
                let limit = if search.group.is_some() { usize::MAX } else { search.offset + search.k };
                Scan {
                    query: search.query.clone(),
                    filter: search.filter.clone(),
                    top: TopK::new(limit, search.min_score),
                }
            })
            .collect();
        let scan_slice = |mut scans: Vec<Scan>, slice: std::ops::Range<usize>| {
            self.inner.read().scan(slice, at, &mut scans);
            scans
        };
        if self.scan_numbers() * searches.len() < INLINE_NUMBERS {
            return self.slices().into_iter().fold(scans, scan_slice);
        }
        let merge = |a: Vec<Scan>, b: Vec<Scan>| {
            a.into_iter().zip(b).map(|(a, b)| Scan { top: a.top.merge(b.top), ..a }).collect()
        };
        self.slices().into_par_iter().fold(|| scans.clone(), scan_slice).reduce(|| scans.clone(), merge)
    }

    fn finish(&self, search: &Search, scan: Scan) -> Found {
        let candidates = scan.top.into_sorted();
        let inner = self.inner.read();
        let hit = |c: &crate::vector::topk::Candidate| inner.hit(c.slot, c.score, search.include_vector);
        let Some(grouping) = &search.group else {
            return Found::Hits(candidates.iter().skip(search.offset).take(search.k).map(hit).collect());
        };
        let mut groups: Vec<(serde_json::Value, Vec<Hit>)> = Vec::new();
        let mut places: std::collections::HashMap<String, usize> = std::collections::HashMap::new();
        for candidate in &candidates {
            let hit = hit(candidate);
            for value in group_values(&hit.meta, &grouping.path) {
                let place = *places.entry(value.to_string()).or_insert_with(|| {
                    groups.push((value, Vec::new()));
                    groups.len() - 1
                });
                if groups[place].1.len() < grouping.size {
                    groups[place].1.push(hit.clone());
                }
            }
        }
        Found::Groups(groups.into_iter().skip(search.offset).take(search.k).collect())
    }

    /// Writes what changed since the last checkpoint to the collection's files. `head` tells the newest revision applied;
    /// `sync_log` makes all that was applied durable in the log, so that the files never show what the log could lose.
    /// Returns whether anything was written. Blocking; the collection's lock is held for slices only.
    pub fn checkpoint(
        &self,
        head: impl FnOnce() -> Revision,
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let mut log = self.log.lock();
        let Some(log) = log.as_mut() else { return Ok(false) };
        // The head is read first: what is applied in between is then in both, the files and the replay.
        let revision = head();
        let changes = self.inner.write().take_changes();
        if changes.is_empty() {
            return Ok(false);
        }
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
        changes: &[VectorId],
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (previous, rewrite, rows) = {
            let inner = self.inner.read();
            (inner.checkpoint().0, inner.wants_rewrite(log.bytes()), inner.sync_handle()?)
        };
        let sync_rows = || match (&rows, &self.dir) {
            (Some(rows), Some(dir)) => rows.sync_data().map_err(Error::io("cannot sync the rows in", dir)),
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
                successor.write(&encode_frame(if is_last { revision } else { previous }, &entries))?;
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
            frames.extend_from_slice(&encode_frame(if is_last { revision } else { previous }, &entries));
        }
        sync_log()?;
        sync_rows()?;
        log.append(&frames)
    }
}

fn group_values(meta: &VectorMeta, path: &[Box<str>]) -> Vec<serde_json::Value> {
    let mut values = Vec::new();
    any_at(&meta.parse(), path, &mut |value| {
        match value {
            serde_json::Value::Array(list) => values.extend(list.iter().cloned()),
            other => values.push(other.clone()),
        }
        false
    });
    values.retain(|v| !v.is_object() && !v.is_array() && !v.is_null());
    values.sort_by_key(ToString::to_string);
    values.dedup();
    values
}

/// The right to search at one revision. Dropping it lets the slots go.
#[derive(Debug)]
pub struct SearchTicket {
    collection: Arc<SharedCollection>,
    at: Revision,
}

impl Drop for SearchTicket {
    fn drop(&mut self) {
        let mut searches = self.collection.searches.lock();
        if let Some(count) = searches.get_mut(&self.at) {
            *count -= 1;
            if *count == 0 {
                searches.remove(&self.at);
            }
        }
    }
}

impl SearchTicket {
    /// Runs the searches. O(rows x dim) each, all in one pass over memory; several threads when it is worth it.
    #[must_use]
    pub fn run(&self, searches: &[Search]) -> Vec<Found> {
        let scans = self.collection.scan_all(searches, self.at);
        searches.iter().zip(scans).map(|(search, scan)| self.collection.finish(search, scan)).collect()
    }

    /// The revision searched at.
    #[must_use]
    pub fn at(&self) -> Revision {
        self.at
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
