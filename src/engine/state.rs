//! The state: what you get by applying records in order. And `decide`: what a command would do to it.
//!
//! Invariants
//! - `decide` changes nothing; it reads the state through an [`Overlay`] that holds what earlier commands of the same
//!   commit batch decided, so that the second of two commands sees the first before either is on disk.
//! - `apply` cannot fail, reads no clock and does no I/O. It has two callers: the sequencer's commit and recovery.
//! - Every entry with a deadline is in `expiry`, and nothing else is.
//! - A rejected command leaves the overlay as it found it.

use super::answers::{Answers, Remembered, Retry};
use super::codec::{DeleteReason, Entries, Entry, Event, Events, Record};
use super::collections::SharedCollection;
use super::command::{
    Command, Committed, Condition, Key, Labels, Op, Outcome, Outcomes, PATCH_BYTES_MAX, Target, Value, VectorSelection,
    VectorWrite,
};
use super::json::{check_value_depth, merge_patch};
use super::view::Views;
use crate::error::Rejection;
use crate::faults::{self, Bug};
use crate::revision::Revision;
use crate::vector::{CollectionName, CollectionSpec, Vector, VectorId, VectorMeta};
use parking_lot::{Mutex, RwLock, RwLockWriteGuard};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU64;
use std::ops::Bound;
use std::sync::Arc;

/// What a key costs in memory beside its key, value and label bytes: tree node, allocations, headers.
const ENTRY_OVERHEAD_BYTES: usize = 160;

/// Vectors in one record from which on it is applied without the state's lock: fewer take a tenth of a millisecond.
const MANY_VECTORS: usize = 64;

/// Keys, collections and the revision they stand at.
#[derive(Debug, Default)]
pub struct State {
    keys: BTreeMap<Key, Arc<Entry>>,
    /// Deadline and key of every entry that has one.
    expiry: BTreeSet<(NonZeroU64, Key)>,
    collections: BTreeMap<CollectionName, Arc<SharedCollection>>,
    /// Collections whose files were prepared for a record that is not applied yet, by creating revision.
    prepared: HashMap<Revision, Arc<SharedCollection>>,
    /// Deleted collections whose files are still to be removed. A lock of its own, so that taking them needs no write lock
    /// of the state, which only the sequencer takes.
    dropped: Mutex<Vec<Arc<SharedCollection>>>,
    /// Newest revision applied.
    revision: Revision,
    key_bytes: usize,
    /// Consistent walks under way; see `view.rs`.
    views: Views,
    answers: Answers,
}

/// About what a key takes.
pub(super) fn entry_bytes(key: &Key, entry: &Entry) -> usize {
    ENTRY_OVERHEAD_BYTES + key.as_str().len() + entry.value.len() + entry.labels.as_ref().map_or(0, |l| l.len())
}

impl State {
    /// A state loaded from a snapshot: entries in key order, at `revision`.
    #[must_use]
    pub fn from_snapshot(
        entries: Entries,
        collections: BTreeMap<CollectionName, Arc<SharedCollection>>,
        revision: Revision,
    ) -> Self {
        let key_bytes = entries.iter().map(|(key, entry)| entry_bytes(key, entry)).sum();
        let expiry = entries.iter().filter_map(|(key, e)| Some((e.expires_at_ms?, key.clone()))).collect();
        // Collecting from sorted entries builds the tree bottom up, without searching.
        Self { keys: entries.into_iter().collect(), expiry, collections, revision, key_bytes, ..Self::default() }
    }

    /// Newest revision applied.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Makes the tree of keys dense. One that has grown key by key, most of all in order, has half-empty nodes: 24 bytes a key.
    pub fn pack(&mut self) {
        self.keys = std::mem::take(&mut self.keys).into_iter().collect();
    }

    /// Moves the revision past ones that a crash gave up. Only before the first commit.
    pub fn skip_to(&mut self, revision: Revision) {
        self.revision = self.revision.max(revision);
    }

    /// A key's entry, unless its deadline has passed.
    #[must_use]
    pub fn get(&self, key: &str, now_ms: u64) -> Option<&Arc<Entry>> {
        self.keys.get(key).filter(|entry| is_live(entry, now_ms))
    }

    /// Live entries in key order from `after` (exclusive, where given) within `prefix`.
    pub fn range<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        now_ms: u64,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<Entry>)> {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        self.keys
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(move |(key, _)| key.as_str().starts_with(prefix))
            .filter(move |(_, entry)| is_live(entry, now_ms))
    }

    /// Every entry from a key on, expired or not: what views and snapshots walk.
    pub fn range_from<'a>(&'a self, from: Bound<&'a str>) -> impl Iterator<Item = (&'a Key, &'a Arc<Entry>)> {
        self.keys.range::<str, _>((from, Bound::Unbounded))
    }

    /// A collection.
    pub fn collection(&self, name: &str) -> Result<&Arc<SharedCollection>, Rejection> {
        self.collections.get(name).ok_or_else(|| Rejection::CollectionNotFound(name.to_owned()))
    }

    /// All collections by name.
    #[must_use]
    pub fn collections(&self) -> &BTreeMap<CollectionName, Arc<SharedCollection>> {
        &self.collections
    }

    /// Keys there are, and how many of them have a deadline.
    #[must_use]
    pub fn key_counts(&self) -> (usize, usize) {
        (self.keys.len(), self.expiry.len())
    }

    /// Approximate bytes of keys and of vectors. O(collections): theirs also change in the background.
    #[must_use]
    pub fn memory_bytes(&self) -> (usize, usize) {
        (self.key_bytes, self.collections.values().map(|collection| collection.charged_bytes()).sum())
    }

    /// The next deadline.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        self.expiry.first().map(|(at, _)| at.get())
    }

    /// Keys whose deadline has passed, oldest first, at most `limit`.
    #[must_use]
    pub fn due(&self, now_ms: u64, limit: usize) -> Vec<Key> {
        self.expiry.iter().take_while(|(at, _)| at.get() <= now_ms).take(limit).map(|(_, key)| key.clone()).collect()
    }

    /// What clients who ask again are told.
    #[must_use]
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// Remembers what a snapshot remembered. Only before replay.
    pub fn load_answers(&mut self, answers: Vec<Arc<Remembered>>) {
        answers.into_iter().for_each(|answer| self.answers.remember(answer));
    }

    /// Where consistent walks register.
    #[must_use]
    pub fn views(&self) -> &Views {
        &self.views
    }

    /// Hands over a collection whose files exist, for the record that will create it.
    pub fn prepare(&mut self, collection: Arc<SharedCollection>) {
        self.prepared.insert(collection.created(), collection);
    }

    /// Deleted collections whose files can be removed.
    pub fn dropped(&self) -> Vec<Arc<SharedCollection>> {
        self.dropped.lock().clone()
    }

    /// Their files are removed, or left to the next start.
    pub fn forget_dropped(&self, collection: &SharedCollection) {
        self.dropped.lock().retain(|dropped| !std::ptr::eq(&**dropped, collection));
    }

    /// As [`State::dropped`], and forgets them all.
    pub fn take_dropped(&self) -> Vec<Arc<SharedCollection>> {
        std::mem::take(&mut self.dropped.lock())
    }

    /// Applies a record. Called in order, by commit and by recovery; what the state already shows is skipped, so replay
    /// may begin before the snapshot's revision (vectors do: their files have checkpoints of their own).
    pub fn apply(&mut self, record: &Record) {
        let is_known = record.last_revision() <= self.revision;
        let mut events = record.iter().peekable();
        while let Some((revision, event)) = events.next() {
            match event {
                Event::VectorWritten { collection, .. } | Event::VectorDeleted { collection, .. } => {
                    // All that goes to one collection goes there together.
                    let mut changes = vec![(revision, event)];
                    while let Some(next) = events.next_if(|(_, next)| next.vector_collection() == Some(collection)) {
                        changes.push(next);
                    }
                    self.change_collection(collection, &changes);
                }
                _ if is_known => {}
                Event::StateUpdated { key, entry, .. } => self.set(key, Some(entry)),
                Event::StateDeleted { key, .. } => self.set(key, None),
                Event::Published { .. } => {}
                Event::CollectionCreated { collection, .. } => {
                    let created =
                        self.prepared.remove(&revision).expect("files are prepared before their record is applied");
                    self.collections.insert(collection.clone(), created);
                }
                Event::CollectionDeleted { collection, .. } => {
                    if let Some(gone) = self.collections.remove(collection) {
                        self.dropped.get_mut().push(gone);
                    }
                }
            }
        }
        self.note_applied(record);
    }

    /// Has a record count whose changes are applied.
    fn note_applied(&mut self, record: &Record) {
        if record.last_revision() > self.revision
            && let Some(answer) = Remembered::of(record)
        {
            self.answers.remember(answer);
        }
        self.revision = self.revision.max(record.last_revision());
    }

    /// The collection that a record of many vectors is about, if it is about nothing else: to be applied there without this
    /// state's lock. Not where metadata alone is written, which searches under way would see before its time.
    fn target_of_many(&self, record: &Record) -> Option<Arc<SharedCollection>> {
        if record.events.len() < MANY_VECTORS {
            return None;
        }
        let name = record.events.first()?.vector_collection()?;
        let is_one_more = |event: &Event| {
            let is_whole = matches!(event, Event::VectorWritten { vector: Some(_), .. } | Event::VectorDeleted { .. });
            is_whole && event.vector_collection() == Some(name)
        };
        let collection = record.events.iter().all(is_one_more).then(|| self.collections.get(name))??;
        (collection.created() < record.first_revision).then(|| Arc::clone(collection))
    }

    fn change_collection(&self, name: &CollectionName, changes: &[(Revision, &Event)]) {
        // During replay the name may belong to a later collection, or to none any more.
        if let Some(collection) = self.collections.get(name)
            && changes.first().is_some_and(|&(revision, _)| collection.created() < revision)
        {
            collection.apply(changes);
        }
    }

    fn set(&mut self, key: &Key, entry: Option<&Arc<Entry>>) {
        let old = match entry {
            Some(entry) => {
                self.key_bytes += entry_bytes(key, entry);
                if let Some(at) = entry.expires_at_ms {
                    self.expiry.insert((at, key.clone()));
                }
                self.keys.insert(key.clone(), Arc::clone(entry))
            }
            None => self.keys.remove(key),
        };
        if let Some(old) = &old {
            self.key_bytes -= entry_bytes(key, old);
            if let Some(at) = old.expires_at_ms
                && entry.and_then(|e| e.expires_at_ms) != Some(at)
            {
                self.expiry.remove(&(at, key.clone()));
            }
        }
        self.views.remember(key, old.as_ref());
    }
}

/// Applies a record as [`State::apply`] does, while others read. One of many vectors takes milliseconds, for which nobody who asks
/// for keys should wait: its collection takes it in without the state's lock, and then it counts.
pub fn apply_beside_readers<'a>(
    lock: &'a RwLock<State>,
    mut state: RwLockWriteGuard<'a, State>,
    record: &Record,
) -> RwLockWriteGuard<'a, State> {
    let Some(collection) = state.target_of_many(record) else {
        state.apply(record);
        return state;
    };
    drop(state);
    let _unsettled = collection.unsettle();
    collection.apply(&record.iter().collect::<Vec<_>>());
    let mut state = lock.write();
    state.note_applied(record);
    state
}

/// Whether an entry's deadline, if any, is still ahead.
#[must_use]
pub fn is_live(entry: &Entry, now_ms: u64) -> bool {
    entry.expires_at_ms.is_none_or(|at| at.get() > now_ms)
}

/// A map whose hash takes a quarter of the time of std's. Its secret is the process's and its start value its own; none outlives its
/// batch, and nothing tells its order, from which names that collide could be learned.
type Overlaid<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// What the commands of one commit batch decided so far, laid over the state.
#[derive(Debug, Default)]
pub struct Overlay {
    keys: Overlaid<Key, Option<Arc<Entry>>>,
    /// By the creating revision of the collection: a name may be deleted and created anew within one batch.
    vectors: Overlaid<(Revision, VectorId), Option<(Revision, VectorMeta)>>,
    collections: Overlaid<CollectionName, Option<(CollectionSpec, Revision)>>,
    answers: Overlaid<Box<str>, Arc<Remembered>>,
    /// Bytes by which keys and vectors will have grown, below zero where deletes outweigh writes. Those of a deleted collection are not
    /// in it.
    growth: isize,
    /// The same before the last decided command.
    growth_before: isize,
    undo: Vec<Undo>,
}

#[derive(Debug)]
enum Undo {
    Key(Key, Option<Option<Arc<Entry>>>),
    Vector((Revision, VectorId), Option<Option<(Revision, VectorMeta)>>),
    Collection(CollectionName, Option<Option<(CollectionSpec, Revision)>>),
}

impl Overlay {
    /// With room for so many keys.
    #[must_use]
    pub fn with_capacity(keys: usize) -> Self {
        Self { keys: Overlaid::with_capacity_and_hasher(keys, <_>::default()), ..Self::default() }
    }

    fn set_key(&mut self, key: &Key, entry: Option<Arc<Entry>>) {
        let old = self.keys.insert(key.clone(), entry);
        self.undo.push(Undo::Key(key.clone(), old));
    }

    fn set_vector(&mut self, created: Revision, id: &VectorId, vector: Option<(Revision, VectorMeta)>) {
        let place = (created, id.clone());
        let old = self.vectors.insert(place.clone(), vector);
        self.undo.push(Undo::Vector(place, old));
    }

    fn set_collection(&mut self, name: &CollectionName, shape: Option<(CollectionSpec, Revision)>) {
        let old = self.collections.insert(name.clone(), shape);
        self.undo.push(Undo::Collection(name.clone(), old));
    }

    fn begin(&mut self) {
        self.undo.clear();
        self.growth_before = self.growth;
    }

    /// Takes back what the last decided command laid over the state.
    fn roll_back(&mut self) {
        self.growth = self.growth_before;
        fn restore<K: std::hash::Hash + Eq, V>(map: &mut Overlaid<K, V>, key: K, old: Option<V>) {
            match old {
                Some(old) => map.insert(key, old),
                None => map.remove(&key),
            };
        }
        while let Some(undo) = self.undo.pop() {
            match undo {
                Undo::Key(key, old) => restore(&mut self.keys, key, old),
                Undo::Vector(place, old) => restore(&mut self.vectors, place, old),
                Undo::Collection(name, old) => restore(&mut self.collections, name, old),
            }
        }
    }
}

/// What a command would do.
#[derive(Debug)]
pub struct Decision {
    /// Nothing to log when empty: the command found everything as it wanted it.
    pub events: Events,
    /// One for each operation.
    pub outcomes: Outcomes,
}

/// Decides one command after another for a commit batch.
#[derive(Debug)]
pub struct Decider<'a> {
    /// What is applied.
    pub state: &'a State,
    /// What is decided.
    pub overlay: &'a mut Overlay,
    /// The batch's time.
    pub now_ms: u64,
    /// Bytes keys and vectors may grow by, if there is a budget.
    pub memory_left: Option<usize>,
    /// Collections there may be.
    pub collections_max: usize,
    /// Bytes one command may write.
    pub record_bytes_max: usize,
    /// The revision the next event would get.
    pub next: Revision,
    /// Bytes of metadata that updates of this command write again.
    pub rewritten: usize,
    /// About how many bytes were decided so far, also for commands that were refused then.
    pub bytes: usize,
}

/// An update of a vector writes all of its metadata again, however little of it changes: so much those of one command may, two tenths
/// of a second of the writer's time.
const REWRITTEN_BYTES_MAX: usize = 8 << 20;

/// Bytes of metadata times conditions that a delete by filter may look at again, as they changed since it selected: a tenth of a
/// second of the writer's time.
const RECHECKED_MAX: usize = 32 << 20;

/// How far ahead of what is decided the processor fetches.
const PREFETCHED_OPS: usize = 4;

/// About the bytes an event takes in the log and in memory.
fn event_bytes(event: &Event) -> usize {
    ENTRY_OVERHEAD_BYTES
        + match event {
            Event::StateUpdated { entry, patch, .. } => entry.value.len() + patch.as_ref().map_or(0, |p| p.len()),
            Event::Published { data, .. } => data.as_ref().map_or(0, |d| d.len()),
            Event::VectorWritten { vector, meta, .. } => {
                vector.as_ref().map_or(0, |v| size_of_val(v.as_slice())) + meta.text().len()
            }
            _ => 0,
        }
}

impl Decider<'_> {
    /// What is to be said to a request that was answered before; `None` when it is new.
    #[must_use]
    pub fn remembered(&self, retry: &Retry) -> Option<Result<Committed, Rejection>> {
        let known = self.overlay.answers.get(&retry.key).or_else(|| self.state.answers.get(&retry.key, self.now_ms))?;
        Some(known.to(retry))
    }

    /// Lets the next commands of the batch know what was said to this one.
    pub fn remember(&mut self, record: &Record) {
        if let Some(answer) = Remembered::of(record) {
            self.overlay.answers.insert(answer.retry.key.clone(), answer);
        }
    }

    /// Decides a command: all of its operations or none. A rejection leaves the overlay as it was.
    pub fn decide(&mut self, command: Command) -> Result<Decision, Rejection> {
        self.overlay.begin();
        self.rewritten = 0;
        let first = self.next;
        let mut bytes = 0;
        let count = command.ops.len();
        let mut decision = Decision { events: Events::with_capacity(count), outcomes: Outcomes::with_capacity(count) };
        let mut ops = command.ops.into_iter();
        for index in 0.. {
            // Whoever parsed it did so on another core: ask for the next ones while this one is decided.
            ops.as_slice().get(PREFETCHED_OPS).into_iter().for_each(Op::prefetch);
            let Some(op) = ops.next() else { break };
            let target = if count > 1 { op.conditional_target() } else { None };
            self.next = first.plus(decision.events.len() as u64);
            let before = decision.events.len();
            let result = self.decide_op(op, &mut decision.events).and_then(|outcome| {
                bytes += decision.events[before..].iter().map(event_bytes).sum::<usize>();
                if bytes > self.record_bytes_max {
                    let what = "what this request would write";
                    return Err(Rejection::PayloadTooLarge { what, limit_bytes: self.record_bytes_max });
                }
                Ok(outcome)
            });
            match result {
                Ok(outcome) => decision.outcomes.push(outcome),
                Err(mut rejection) => {
                    self.take_back(first);
                    // It took its time all the same.
                    self.bytes += bytes;
                    if let Rejection::RevisionConflict { expected, .. } = rejection
                        && let Some(target) = target.filter(|target| decision.events.iter().any(|e| target.is_of(e)))
                    {
                        // With what this very command did, which never was: revisions of it somebody else will get.
                        rejection = Rejection::ConflictWithin { expected, before: self.revision_of(&target) };
                    }
                    return Err(if command.is_batch { rejection.at(index) } else { rejection });
                }
            }
        }
        self.next = first.plus(decision.events.len() as u64);
        self.bytes += bytes;
        Ok(decision)
    }

    /// Takes back the last command, decided to begin at this revision.
    pub fn take_back(&mut self, first_revision: Revision) {
        self.overlay.roll_back();
        self.next = first_revision;
    }

    /// The revision of a key or vector, zero when absent.
    fn revision_of(&self, target: &Target) -> Revision {
        let revision = match target {
            Target::Key(key) => self.live_entry(key).map(|entry| entry.revision),
            Target::Vector(collection, id) => {
                let vector = self.shape(collection).ok().and_then(|(_, created)| self.vector(collection, created, id));
                vector.map(|(revision, _)| revision)
            }
        };
        revision.unwrap_or(Revision::ZERO)
    }

    /// Decides the removal of keys whose deadline has passed.
    pub fn decide_expiry(&mut self, due: Vec<Key>) -> Events {
        let mut events = Events::new();
        for key in due {
            if let Some(entry) = self.entry(&key)
                && !is_live(&entry, self.now_ms)
            {
                self.expire(&key, &entry, &mut events);
            }
        }
        self.next = self.next.plus(events.len() as u64);
        events
    }

    fn entry(&self, key: &Key) -> Option<Arc<Entry>> {
        if faults::is_on(Bug::LoseCas) {
            return self.state.keys.get(key).cloned();
        }
        match self.overlay.keys.get(key) {
            Some(decided) => decided.clone(),
            None => self.state.keys.get(key).cloned(),
        }
    }

    fn expire(&mut self, key: &Key, entry: &Entry, events: &mut Events) {
        events.push(Event::StateDeleted {
            key: key.clone(),
            prev_revision: entry.revision,
            reason: DeleteReason::Expired,
            labels: entry.labels.clone(),
        });
        self.overlay.set_key(key, None);
    }

    /// Keys of a command whose deadline has passed and that are still there. They are removed first, in a record of their
    /// own: a command's revisions are those of its operations, one after the other.
    #[must_use]
    pub fn due_in(&self, command: &Command) -> Vec<Key> {
        let is_due = |key: &&Key| self.entry(key).is_some_and(|entry| !is_live(&entry, self.now_ms));
        command.ops.iter().filter_map(Op::changed_key).filter(is_due).cloned().collect()
    }

    /// The current entry, unless its deadline has passed.
    fn live_entry(&self, key: &Key) -> Option<Arc<Entry>> {
        self.entry(key).filter(|entry| is_live(entry, self.now_ms))
    }

    fn check_budget(&mut self, bytes: usize, freed: usize) -> Result<(), Rejection> {
        let growth = bytes.cast_signed() - freed.cast_signed();
        let all = self.overlay.growth + growth;
        if growth > 0 && self.memory_left.is_some_and(|left| all > left.cast_signed()) {
            return Err(Rejection::StorageFull(
                "the memory budget MAX_MEMORY_MB is used up; delete keys or vectors, or raise it".into(),
            ));
        }
        self.overlay.growth = all;
        Ok(())
    }

    fn decide_op(&mut self, op: Op, events: &mut Events) -> Result<Outcome, Rejection> {
        match op {
            Op::Put { key, value, ttl_ms, labels, condition } => {
                let old = self.live_entry(&key);
                let write = EntryWrite { value, patch: None, expires_at_ms: self.deadline(ttl_ms), labels };
                let entry = self.write_entry(&key, old.as_deref(), &condition, write, events)?;
                Ok(Outcome::Put {
                    key,
                    revision: entry.revision,
                    created: old.is_none(),
                    expires_at_ms: entry.expires_at_ms,
                })
            }
            Op::Patch { key, patch, ttl_ms, condition } => {
                let old = self.live_entry(&key);
                condition.check(old.as_ref().map_or(Revision::ZERO, |e| e.revision))?;
                let target = match old.as_ref().map(|e| &e.value) {
                    None => None,
                    Some(Value::Json(text)) if text.len() <= PATCH_BYTES_MAX => Some(&**text),
                    Some(Value::Json(_)) => {
                        return Err(Rejection::PayloadTooLarge {
                            what: "a value to patch",
                            limit_bytes: PATCH_BYTES_MAX,
                        });
                    }
                    Some(Value::Bytes(_)) => {
                        return Err(Rejection::invalid(
                            "the key holds bytes, which a JSON merge patch cannot change; PUT it",
                        ));
                    }
                };
                let merged = merge_patch(target, &patch)?;
                if merged.len() > PATCH_BYTES_MAX {
                    // Nobody could patch it any more.
                    return Err(Rejection::PayloadTooLarge {
                        what: "what the patch makes",
                        limit_bytes: PATCH_BYTES_MAX,
                    });
                }
                check_value_depth(&merged)?;
                let write = EntryWrite {
                    value: Value::Json(merged.into()),
                    patch: Some(patch),
                    expires_at_ms: self.deadline(ttl_ms).or(old.as_ref().and_then(|e| e.expires_at_ms)),
                    labels: old.as_ref().and_then(|e| e.labels.clone()),
                };
                let entry = self.write_entry(&key, old.as_deref(), &condition, write, events)?;
                Ok(Outcome::Patched {
                    key,
                    revision: entry.revision,
                    created: old.is_none(),
                    expires_at_ms: entry.expires_at_ms,
                    value: entry.value.clone(),
                })
            }
            Op::Delete { key, condition } => {
                let old = self.live_entry(&key).ok_or_else(|| Rejection::KeyNotFound(key.as_str().to_owned()))?;
                condition.check(old.revision)?;
                let revision = self.next;
                self.overlay.growth -= entry_bytes(&key, &old).cast_signed();
                self.overlay.set_key(&key, None);
                events.push(Event::StateDeleted {
                    key: key.clone(),
                    prev_revision: old.revision,
                    reason: DeleteReason::Deleted,
                    labels: old.labels.clone(),
                });
                Ok(Outcome::Deleted { key, revision })
            }
            Op::Event { event_type, key, data, labels } => {
                events.push(Event::Published { event_type, key, data, labels });
                Ok(Outcome::Published { revision: self.next })
            }
            Op::CreateCollection { collection, spec } => self.create_collection(collection, spec, events),
            Op::DeleteCollection { collection } => {
                let (spec, created) = self.shape(&collection)?;
                let count = self.count_vectors(&collection, created);
                events.push(Event::CollectionDeleted { collection: collection.clone(), spec });
                self.overlay.set_collection(&collection, None);
                Ok(Outcome::CollectionDeleted { count, revision: self.next })
            }
            Op::WriteVector { write, collection, id, vector, meta, if_revision } => {
                self.write_vector(write, collection, id, vector, meta, if_revision, events)
            }
            Op::DeleteVector { collection, id, if_revision } => {
                let shape = self.shape(&collection)?;
                let (revision, meta) = self
                    .vector(&collection, shape.1, &id)
                    .ok_or_else(|| Rejection::VectorNotFound(id.as_str().to_owned()))?;
                check_revision(if_revision, revision)?;
                self.delete_vector(&collection, shape, &id, &meta, events);
                Ok(Outcome::VectorDeleted { id, revision: self.next })
            }
            Op::DeleteVectors { collection, selection } => self.delete_vectors(&collection, selection, events),
        }
    }

    fn deadline(&self, ttl_ms: Option<u64>) -> Option<NonZeroU64> {
        ttl_ms.and_then(|ttl| NonZeroU64::new(self.now_ms.saturating_add(ttl)))
    }

    fn write_entry(
        &mut self,
        key: &Key,
        old: Option<&Entry>,
        condition: &Condition,
        write: EntryWrite,
        events: &mut Events,
    ) -> Result<Arc<Entry>, Rejection> {
        let prev_revision = old.map_or(Revision::ZERO, |e| e.revision);
        condition.check(prev_revision)?;
        let entry = Arc::new(Entry {
            value: write.value,
            revision: self.next,
            created_revision: old.map_or(self.next, |e| e.created_revision),
            expires_at_ms: write.expires_at_ms,
            labels: write.labels,
        });
        self.check_budget(entry_bytes(key, &entry), old.map_or(0, |old| entry_bytes(key, old)))?;
        self.overlay.set_key(key, Some(Arc::clone(&entry)));
        events.push(Event::StateUpdated {
            key: key.clone(),
            prev_revision,
            entry: Arc::clone(&entry),
            patch: write.patch,
        });
        Ok(entry)
    }

    fn create_collection(
        &mut self,
        collection: CollectionName,
        spec: CollectionSpec,
        events: &mut Events,
    ) -> Result<Outcome, Rejection> {
        if let Ok((existing, created)) = self.shape(&collection) {
            if existing != spec {
                return Err(Rejection::AlreadyExists(format!(
                    "the collection {} exists with dim {} and metric {}; delete it first or choose another name",
                    collection.as_str(),
                    existing.dim,
                    existing.metric.as_str()
                )));
            }
            return Ok(Outcome::Collection { created: false, revision: created });
        }
        let planned = self.overlay.collections.values().filter(|shape| shape.is_some()).count();
        if self.state.collections.len() + planned >= self.collections_max {
            return Err(Rejection::StorageFull(format!(
                "there are {} collections, as many as this server may have files open for; delete some, or put what belongs together into one and filter",
                self.collections_max
            )));
        }
        // Those that were deleted have their files open until these are removed.
        if self.state.collections.len() + self.state.dropped.lock().len() + planned >= self.collections_max {
            return Err(Rejection::Overloaded("the files of deleted collections are being removed; retry in a moment"));
        }
        self.check_budget(COLLECTION_OVERHEAD_BYTES, 0)?;
        self.overlay.set_collection(&collection, Some((spec, self.next)));
        events.push(Event::CollectionCreated { collection, spec });
        Ok(Outcome::Collection { created: true, revision: self.next })
    }

    /// A collection's shape and creating revision.
    fn shape(&self, name: &CollectionName) -> Result<(CollectionSpec, Revision), Rejection> {
        match self.overlay.collections.get(name) {
            Some(Some(shape)) => Ok(*shape),
            Some(None) => Err(Rejection::CollectionNotFound(name.as_str().to_owned())),
            None => self.state.collection(name.as_str()).map(|c| (c.spec(), c.created())),
        }
    }

    fn vector(&self, collection: &CollectionName, created: Revision, id: &VectorId) -> Option<(Revision, VectorMeta)> {
        if let Some(decided) = self.overlay.vectors.get(&(created, id.clone())) {
            return decided.clone();
        }
        let collection = self.state.collections.get(collection).filter(|c| c.created() == created)?;
        collection.read(|c| c.peek(id.as_str()).map(|(revision, meta)| (revision, meta.clone())))
    }

    fn count_vectors(&self, collection: &CollectionName, created: Revision) -> usize {
        let applied = self.state.collections.get(collection).filter(|c| c.created() == created);
        let exists = |id: &VectorId| applied.is_some_and(|c| c.read(|c| c.peek(id.as_str()).is_some()));
        let mut count = applied.map_or(0, |c| c.read(|c| c.len()));
        for ((of, id), decided) in &self.overlay.vectors {
            if *of == created {
                match (exists(id), decided.is_some()) {
                    (false, true) => count += 1,
                    (true, false) => count -= 1,
                    _ => {}
                }
            }
        }
        count
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of the operation, each used once")]
    fn write_vector(
        &mut self,
        write: VectorWrite,
        collection: CollectionName,
        id: VectorId,
        vector: Option<Vector>,
        meta: Option<VectorMeta>,
        if_revision: Option<Revision>,
        events: &mut Events,
    ) -> Result<Outcome, Rejection> {
        let (spec, created) = self.shape(&collection)?;
        let old = self.vector(&collection, created, &id);
        match (write, &old) {
            (VectorWrite::Add, Some(_)) => {
                return Err(Rejection::AlreadyExists(format!("the id {:?} exists; use upsert or update", id.as_str())));
            }
            (VectorWrite::Update, None) => return Err(Rejection::VectorNotFound(id.as_str().to_owned())),
            _ => check_revision(if_revision, old.as_ref().map_or(Revision::ZERO, |(revision, _)| *revision))?,
        }
        if let (VectorWrite::Update, Some((_, old))) = (write, &old) {
            self.rewritten += old.text().len();
            if self.rewritten > REWRITTEN_BYTES_MAX {
                let what = "metadata that these updates write again (send them in smaller batches)";
                return Err(Rejection::PayloadTooLarge { what, limit_bytes: REWRITTEN_BYTES_MAX });
            }
        }
        let meta = match (write, &old, meta) {
            (VectorWrite::Update, Some((_, old)), None) => old.clone(),
            (VectorWrite::Update, Some((_, old)), Some(patch)) => {
                let merged = merge_patch(Some(old.text()), patch.text())?;
                check_value_depth(&merged)?;
                VectorMeta::new(&merged)?
            }
            (_, _, meta) => meta.unwrap_or_else(VectorMeta::empty),
        };
        if let Some(vector) = &vector {
            vector.check(spec)?;
        }
        let bytes = vector_bytes(spec, &id, &meta);
        let freed = old.as_ref().map_or(0, |(_, old)| bytes + old.text().len() - meta.text().len());
        self.check_budget(bytes, freed)?;
        self.overlay.set_vector(created, &id, Some((self.next, meta.clone())));
        let labels = Labels::of_vector(&meta);
        events.push(Event::VectorWritten { collection, id: id.clone(), created: old.is_none(), vector, meta, labels });
        Ok(Outcome::VectorWritten { id, revision: self.next, created: old.is_none() })
    }

    fn delete_vector(
        &mut self,
        collection: &CollectionName,
        (spec, created): (CollectionSpec, Revision),
        id: &VectorId,
        meta: &VectorMeta,
        events: &mut Events,
    ) {
        self.overlay.growth -= vector_bytes(spec, id, meta).cast_signed();
        self.overlay.set_vector(created, id, None);
        let labels = Labels::of_vector(meta);
        events.push(Event::VectorDeleted { collection: collection.clone(), id: id.clone(), labels });
    }

    fn delete_vectors(
        &mut self,
        collection: &CollectionName,
        selection: VectorSelection,
        events: &mut Events,
    ) -> Result<Outcome, Rejection> {
        let shape = self.shape(collection)?;
        let before = selection.deleted_before;
        let mut deleted = 0;
        let mut missing = Vec::new();
        let mut rechecked = 0;
        for id in selection.ids {
            match self.vector(collection, shape.1, &id) {
                None => missing.push(id),
                Some((revision, meta)) => {
                    let changed = selection.filter.as_ref().filter(|(_, at)| revision > *at);
                    if let Some((filter, _)) = changed {
                        rechecked += meta.text().len() * (1 + filter.conditions());
                        if rechecked > RECHECKED_MAX {
                            let detail = "what the filter matches is being changed by others; try again";
                            return Err(Rejection::Overloaded(detail));
                        }
                    }
                    if changed.is_none_or(|(filter, _)| filter.matches(&meta.parse())) {
                        self.delete_vector(collection, shape, &id, &meta, events);
                        deleted += 1;
                    }
                }
            }
        }
        if selection.filter.is_some() {
            missing.clear();
        }
        let revision = if deleted == 0 { self.next.prev() } else { self.next.plus(deleted - 1) };
        // The cast: counts a list in memory.
        let deleted = before + deleted as usize;
        Ok(Outcome::VectorsDeleted { deleted, missing, revision })
    }
}

/// What an empty collection costs: its first chunk of rows and its bookkeeping.
const COLLECTION_OVERHEAD_BYTES: usize = 72 << 10;

/// What a vector takes, about.
fn vector_bytes(spec: CollectionSpec, id: &VectorId, meta: &VectorMeta) -> usize {
    spec.dim * size_of::<f32>() + ENTRY_OVERHEAD_BYTES + id.as_str().len() + meta.text().len()
}

struct EntryWrite {
    value: Value,
    patch: Option<Box<str>>,
    expires_at_ms: Option<NonZeroU64>,
    labels: Option<Box<Labels>>,
}

fn check_revision(expected: Option<Revision>, actual: Revision) -> Result<(), Rejection> {
    Condition { if_revision: expected, ..Condition::default() }.check(actual)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::codec::Events;

    fn put(key: &str) -> Op {
        Op::Put {
            key: Key::new(key).unwrap(),
            value: Value::Json("1".into()),
            ttl_ms: Some(10),
            labels: None,
            condition: Condition::default(),
        }
    }

    #[test]
    fn what_a_batch_meets_past_its_deadline_is_no_part_of_it() {
        let mut state = State::default();
        let mut decide = |command: Command, now_ms| {
            let mut overlay = Overlay::default();
            let next = state.revision().next();
            let mut decider = Decider {
                state: &state,
                overlay: &mut overlay,
                now_ms,
                memory_left: None,
                collections_max: 1,
                record_bytes_max: usize::MAX,
                rewritten: 0,
                next,
                bytes: 0,
            };
            let due = decider.due_in(&command);
            let expired = decider.decide_expiry(due);
            let first_revision = decider.next;
            let decision = decider.decide(command).unwrap();
            let told = (expired.len(), first_revision.0 - next.0, decision.events.len());
            let record = |first_revision, events: Events| Record { first_revision, ts_ms: 0, events, answer: None };
            for (first, events) in [(next, expired), (first_revision, decision.events)] {
                if !events.is_empty() {
                    state.apply(&record(first, events));
                }
            }
            told
        };
        assert_eq!(decide(Command::batch(vec![put("a"), put("b")]), 0), (0, 0, 2));
        assert_eq!(decide(Command::batch(vec![put("c"), put("b")]), 9), (0, 0, 2), "nothing is due");
        // Named twice, it goes once.
        assert_eq!(decide(Command::batch(vec![put("c"), put("a"), put("a"), put("d")]), 10), (1, 1, 4));
        assert_eq!(state.revision(), Revision(9));
    }
}
