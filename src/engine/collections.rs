//! Collections as the engine shares them: every lock around vectors, exact search, and checkpoints.
//!
//! Locks, and why each
//! - `inner` (read/write): the writer applies a record under it for microseconds; a search holds it for one slice of
//!   about [`SLICE_COST`] at a time, so that a long scan never makes the writer wait longer than one slice takes.
//! - `searches`: revisions of running searches. The writer asks for the oldest before it reuses a slot.
//! - `log`: the slot log, taken by the one checkpoint at a time. Never held together with `inner` over I/O.

use crate::error::{Error, Rejection};
use crate::revision::Revision;
use crate::vector::collection::{Collection, Groups, Query, Scan};
use crate::vector::filter::Filter;
use crate::vector::storage::{NewChunk, SlotLog, encode_frame};
use crate::vector::topk::{Candidate, TopK};
use crate::vector::{CollectionSpec, Hit, VectorId, VectorMeta};
use parking_lot::{Mutex, RwLock};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Work done under one hold of the lock, in numbers multiplied: about a hundred microseconds.
const SLICE_COST: usize = 1 << 20;
/// Rows in a slice at most, however cheap they are.
const SLICE_ROWS_MAX: usize = 4096;
/// Ids encoded under one hold of the lock during a checkpoint.
const CHECKPOINT_IDS: usize = 1000;
/// Searches cheaper than this run where they are: handing them to other threads would take longer.
pub const INLINE_COST: usize = 1 << 18;

/// A collection, shared between the writer, searches and checkpoints.
#[derive(Debug)]
pub struct SharedCollection {
    spec: CollectionSpec,
    created: Revision,
    inner: RwLock<Collection>,
    searches: Mutex<BTreeMap<Revision, usize>>,
    log: Mutex<Option<SlotLog>>,
    dir: Option<PathBuf>,
    /// Slots freed after this revision may not be reused yet; see [`Durable`].
    durable: Durable,
    /// A sync of the rows failed: no more checkpoints until a restart.
    rows_failed: AtomicBool,
}

/// How far the log is durable, for the reuse of slots: what a crash of a relaxed mode could undo must not have been
/// overwritten. `u64::MAX` in `always` mode, where everything applied is durable.
pub type Durable = Arc<AtomicU64>;

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
    pub fn open(
        vectors: Option<&Path>,
        spec: CollectionSpec,
        created: Revision,
        durable: &Durable,
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
        Ok(Arc::new(Self {
            spec,
            created,
            inner: RwLock::new(collection),
            searches: Mutex::new(BTreeMap::new()),
            log: Mutex::new(log),
            dir,
            durable: Arc::clone(durable),
            rows_failed: AtomicBool::new(false),
        }))
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
        let durable = Revision(self.durable.load(Ordering::Acquire));
        let reusable = self.searches.lock().keys().next().map_or(durable, |oldest| durable.min(*oldest));
        self.change(|inner| inner.put(id, numbers, meta, revision, reusable))
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
        let before = inner.charged_bytes();
        apply(&mut inner);
        inner.charged_bytes().cast_signed() - before.cast_signed()
    }

    /// Ids that satisfy a filter now.
    #[must_use]
    pub fn matching(&self, filter: &Filter) -> Vec<VectorId> {
        let mut found = Vec::new();
        for slice in self.slices(0, true) {
            self.inner.read().matching(slice, filter, &mut found);
        }
        found
    }

    /// Slices of slots, each of about [`SLICE_COST`] for so many scans, with or without looking at metadata.
    fn slices(&self, scans: usize, looks_at_meta: bool) -> Vec<std::ops::Range<usize>> {
        let (slots, meta_bytes) = self.read(|c| (c.slot_count(), c.text_bytes_average()));
        let rows = (SLICE_COST / self.row_cost(scans, looks_at_meta, meta_bytes)).clamp(16, SLICE_ROWS_MAX);
        (0..slots).step_by(rows).map(|start| start..(start + rows).min(slots)).collect()
    }

    /// In units of one number multiplied. Parsing a byte of metadata costs as much as some tens of those.
    fn row_cost(&self, scans: usize, looks_at_meta: bool, meta_bytes: usize) -> usize {
        const META_BYTE_COST: usize = 32;
        self.spec.dim * scans + if looks_at_meta { (meta_bytes + 16) * META_BYTE_COST } else { 0 } + 1
    }

    /// What these searches cost, in numbers multiplied: decides where they run.
    #[must_use]
    pub fn cost(&self, searches: &[Search]) -> usize {
        let (slots, meta_bytes) = self.read(|c| (c.slot_count(), c.text_bytes_average()));
        slots * self.row_cost(searches.len(), looks_at_meta(searches), meta_bytes)
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
                let groups = search.group.as_ref().map(|grouping| Groups {
                    path: grouping.path.clone(),
                    size: grouping.size,
                    min_score: search.min_score,
                    best: HashMap::new(),
                });
                let top = TopK::new(search.offset + search.k, search.min_score);
                Scan { query: search.query.clone(), filter: search.filter.clone(), top, groups }
            })
            .collect();
        let scan_slice = |mut scans: Vec<Scan>, slice: std::ops::Range<usize>| {
            self.inner.read().scan(slice, at, &mut scans);
            scans
        };
        let slices = self.slices(searches.len(), looks_at_meta(searches));
        if self.cost(searches) < INLINE_COST {
            return slices.into_iter().fold(scans, scan_slice);
        }
        let merge_one = |a: Scan, b: Scan| Scan {
            top: a.top.merge(b.top),
            groups: a.groups.zip(b.groups).map(|(a, b)| a.merge(b)),
            ..a
        };
        let merge = |a: Vec<Scan>, b: Vec<Scan>| a.into_iter().zip(b).map(|(a, b)| merge_one(a, b)).collect();
        slices.into_par_iter().fold(|| scans.clone(), scan_slice).reduce(|| scans.clone(), merge)
    }

    fn finish(&self, search: &Search, scan: Scan) -> Found {
        let inner = self.inner.read();
        let hit = |c: Candidate| inner.hit(c.slot, c.score, search.include_vector);
        let Some(groups) = scan.groups else {
            let best = scan.top.into_sorted().into_iter();
            return Found::Hits(best.skip(search.offset).take(search.k).map(hit).collect());
        };
        let mut groups: Vec<(Candidate, String, serde_json::Value, TopK)> = groups
            .best
            .into_iter()
            .filter_map(|(name, (value, top))| Some((top.best()?.clone(), name, value, top)))
            .collect();
        groups.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        let wanted = groups.into_iter().skip(search.offset).take(search.k);
        Found::Groups(
            wanted.map(|(_, _, value, top)| (value, top.into_sorted().into_iter().map(hit).collect())).collect(),
        )
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

fn looks_at_meta(searches: &[Search]) -> bool {
    searches.iter().any(|s| s.filter.is_some() || s.group.is_some())
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
