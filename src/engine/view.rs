//! A consistent walk over the keys at one revision, while writers go on.
//!
//! The walk takes the state's read lock for a slice of keys at a time. Whatever a writer changes ahead of the walk, it
//! first leaves here as it was (copy on write); the walk prefers that to what the state holds by then. Memory: what was
//! changed ahead of the walk and not yet reached, so a walk should be quick. Those for streams are bounded, each by keys and
//! all together by bytes: beyond that one is overrun, and worthless.
//!
//! Locks: `inner`, taken by the writer for each key it changes while a walk is on, and by the walk once a slice; and the
//! list of walks, [`Views`].

use super::codec::{Entries, Entry};
use super::command::Key;
use super::prefixes::Prefixes;
use super::state::{State, entry_bytes};
use crate::revision::Revision;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry::Vacant;
use std::ops::Bound;
use std::sync::{Arc, Weak};

/// Keys looked at under one hold of the state's lock: some tens of microseconds.
pub const SLICE_KEYS: usize = 512;
/// Bytes of entries after which a slice ends: what is in it, its walk keeps alive until it has sent it.
const SLICE_BYTES: usize = 256 << 10;
/// Old versions one bounded walk may keep.
const STREAM_KEPT_MAX: usize = 200_000;
/// Bytes of old entries that all bounded walks together may keep.
const STREAMS_KEPT_BYTES_MAX: usize = 256 << 20;

/// The state's keys at one revision.
#[derive(Debug)]
pub struct View {
    revision: Revision,
    /// The walk visits the keys that begin with one of these.
    prefixes: Prefixes,
    /// Whether writers may give the walk up when it would keep too many old entries.
    is_bounded: bool,
    inner: Mutex<Inner>,
}

/// The walks under way. A lock of its own, so that a walk can begin under the state's read lock; the writer takes it for
/// each key it changes, nearly always to find it empty.
#[derive(Debug, Default)]
pub struct Views(Mutex<Vec<Weak<View>>>);

impl Views {
    fn add(&self, view: &Arc<View>) {
        self.0.lock().push(Arc::downgrade(view));
    }

    /// Lets every walk keep what a key held before a change.
    pub fn remember(&self, key: &Key, old: Option<&Arc<Entry>>) {
        let mut views = self.0.lock();
        if views.is_empty() {
            return;
        }
        let mut bytes = 0;
        views.retain(|view| {
            let kept = view.upgrade().and_then(|view| view.remember(key, old));
            bytes += kept.unwrap_or(0);
            kept.is_some()
        });
        if bytes > STREAMS_KEPT_BYTES_MAX {
            let bounded = views.iter().filter_map(Weak::upgrade).filter(|view| view.is_bounded);
            if let Some(largest) = bounded.max_by_key(|view| view.inner.lock().bytes) {
                largest.inner.lock().overrun = true;
                views.retain(|view| !std::ptr::eq(view.as_ptr(), Arc::as_ptr(&largest)));
            }
        }
    }
}

/// What keys ahead of a walk held at its revision; `None` = they did not exist.
pub type Kept = BTreeMap<Key, Option<Arc<Entry>>>;

/// About what keeping one takes; the key alone where it did not exist.
fn kept_bytes(key: &Key, old: Option<&Arc<Entry>>) -> usize {
    old.map_or(size_of::<Key>() + key.as_str().len(), |old| entry_bytes(key, old))
}

#[derive(Debug, Default)]
struct Inner {
    preimages: Kept,
    /// Of the entries in `preimages`.
    bytes: usize,
    /// The last key walked; changes up to it need not be kept.
    passed: Option<Key>,
    overrun: bool,
}

impl View {
    /// Begins a walk at the state's current revision. One that is bounded may be overrun.
    pub fn begin(state: &RwLock<State>, prefixes: Prefixes, is_bounded: bool) -> Arc<Self> {
        // Nothing is applied while this is held, so the revision and what is remembered from here on fit together.
        let state = state.read();
        let inner = Mutex::new(Inner::default());
        let view = Arc::new(Self { revision: state.revision(), prefixes, is_bounded, inner });
        state.views().add(&view);
        view
    }

    /// The revision the walk shows.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Keeps what a key held before a change. Called by the writer, under the state's write lock. The bytes it keeps, where they are
    /// bounded; `None` once overrun. What it kept until then stays: freeing it would take the writer long.
    fn remember(&self, key: &Key, old: Option<&Arc<Entry>>) -> Option<usize> {
        let mut inner = self.inner.lock();
        if inner.overrun {
            return None;
        }
        let is_ahead = inner.passed.as_ref().is_none_or(|passed| key > passed) && self.prefixes.begin(key.as_str());
        if is_ahead && let Vacant(free) = inner.preimages.entry(key.clone()) {
            free.insert(old.cloned());
            inner.bytes += kept_bytes(key, old);
            inner.overrun = self.is_bounded && inner.preimages.len() > STREAM_KEPT_MAX;
        }
        Some(if self.is_bounded { inner.bytes } else { 0 })
    }

    /// Old versions kept so far.
    pub fn kept(&self) -> usize {
        self.inner.lock().preimages.len()
    }

    /// Whether more was changed ahead of the walk than may be kept: the walk must be given up.
    pub fn is_overrun(&self) -> bool {
        self.inner.lock().overrun
    }

    /// Ends the walk, and gives out what it kept: freeing that can take long.
    #[must_use]
    pub fn give_up(&self) -> Kept {
        let mut inner = self.inner.lock();
        inner.overrun = true;
        inner.bytes = 0;
        std::mem::take(&mut inner.preimages)
    }

    /// Appends the next entries in key order, from `from` on, as they were at this view's revision, and returns where to
    /// go on; `None` at the end. With `prefix`, ends after the last key that begins with it.
    pub fn slice(&self, state: &RwLock<State>, from: &str, prefix: &str, found: &mut Entries) -> Option<String> {
        let state = state.read();
        let mut inner = self.inner.lock();
        let mut current: Entries = Vec::with_capacity(SLICE_KEYS);
        // Where this slice ends; `None`: with the range.
        let mut last: Option<Key> = None;
        let mut bytes = 0;
        let first = if from < prefix { prefix } else { from };
        for (key, entry) in state.range_from(Bound::Included(first)) {
            if !key.as_str().starts_with(prefix) {
                break;
            }
            if current.len() == SLICE_KEYS || bytes >= SLICE_BYTES {
                last = current.last().map(|(key, _)| key.clone());
                break;
            }
            bytes += entry_bytes(key, entry);
            current.push((key.clone(), Arc::clone(entry)));
        }
        drop(state);
        // Old versions within this slice, which ends earlier where there are very many.
        let mut slice = Kept::new();
        let mut bytes = 0;
        while let Some((key, _)) = inner.preimages.range::<str, _>((Bound::Included(first), Bound::Unbounded)).next() {
            if !key.as_str().starts_with(prefix) || last.as_ref().is_some_and(|last| key > last) {
                break;
            }
            if slice.len() == SLICE_KEYS || bytes >= SLICE_BYTES {
                last = slice.last_key_value().map(|(key, _)| key.clone());
                break;
            }
            let key = key.clone();
            let old = inner.preimages.remove(&key).flatten();
            bytes += kept_bytes(&key, old.as_ref());
            slice.insert(key, old);
        }
        inner.bytes -= bytes;
        for (key, entry) in current {
            if last.as_ref().is_none_or(|last| key <= *last) {
                slice.entry(key).or_insert(Some(entry));
            }
        }
        found.extend(slice.into_iter().filter_map(|(key, entry)| Some((key, entry?))));
        // The smallest text after the last.
        let next = format!("{}\0", last.as_ref()?.as_str());
        inner.passed = last;
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::codec::{DeleteReason, Event, Record};
    use crate::engine::command::Value;
    use smallvec::smallvec;

    fn key(n: usize) -> Key {
        Key::new(&format!("k{n:05}")).unwrap()
    }

    fn put(n: usize, revision: u64) -> Event {
        let entry = Entry {
            value: Value::Json(revision.to_string().into()),
            revision: Revision(revision),
            created_revision: Revision(revision),
            expires_at_ms: None,
            labels: None,
        };
        Event::StateUpdated { key: key(n), prev_revision: Revision(0), entry: Arc::new(entry), patch: None }
    }

    fn delete(n: usize) -> Event {
        Event::StateDeleted { key: key(n), prev_revision: Revision(0), reason: DeleteReason::Deleted, labels: None }
    }

    fn apply(state: &RwLock<State>, event: Event) {
        let mut state = state.write();
        let first_revision = state.revision().next();
        state.apply(&Record { first_revision, ts_ms: 0, events: smallvec![event], answer: None });
    }

    /// A walk that showed what was written, or missed what was deleted, after it began would not be at one revision.
    #[test]
    fn a_walk_shows_the_keys_of_its_revision_whatever_is_written_meanwhile() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % below
        };
        for round in 0..20 {
            let state = RwLock::new(State::default());
            for n in 0..3000 {
                if random(2) == 0 {
                    apply(&state, put(n, n as u64 + 1));
                }
            }
            let expected: Vec<_> = state.read().range("", None, 0).map(|(k, e)| (k.clone(), Arc::clone(e))).collect();
            let view = View::begin(&state, Prefixes::from_iter([""]), false);
            let mut found = Vec::new();
            let mut from = Some(String::new());
            while let Some(at) = from {
                for _ in 0..random(400) {
                    let n = random(3000);
                    let revision = state.read().revision().0 + 1;
                    apply(&state, if random(2) == 0 { put(n, revision) } else { delete(n) });
                }
                from = view.slice(&state, &at, "", &mut found);
            }
            assert_eq!(found, expected, "round {round}");
        }
    }

    #[test]
    fn a_slow_walk_is_overrun_rather_than_keeping_everything() {
        let state = RwLock::new(State::default());
        (0..100).for_each(|n| apply(&state, put(n, n as u64 + 1)));
        let view = View::begin(&state, Prefixes::from_iter(["k"]), true);
        (0..STREAM_KEPT_MAX).for_each(|n| apply(&state, put(n, n as u64 + 101)));
        assert!(!view.is_overrun());
        apply(&state, put(STREAM_KEPT_MAX, 1));
        assert!(view.is_overrun());
        let kept = view.kept();
        apply(&state, delete(0));
        assert_eq!((kept, view.kept()), (STREAM_KEPT_MAX + 1, kept), "the writer frees nothing, and adds nothing");
        assert_eq!(view.give_up().len(), kept);
    }

    /// A key of 1 MiB each.
    fn put_large(n: usize) -> Event {
        let Event::StateUpdated { key, entry, .. } = put(n, 1) else { unreachable!() };
        let entry = Entry { value: Value::Json("1".repeat(1 << 20).into()), ..(*entry).clone() };
        Event::StateUpdated { key, prev_revision: Revision(0), entry: Arc::new(entry), patch: None }
    }

    #[test]
    fn of_walks_that_keep_too_many_bytes_together_the_largest_is_overrun() {
        let state = RwLock::new(State::default());
        let many = STREAMS_KEPT_BYTES_MAX >> 20;
        (0..=many).for_each(|n| apply(&state, put_large(n)));
        let all = View::begin(&state, Prefixes::from_iter([""]), true);
        let one = View::begin(&state, Prefixes::from_iter([key(0).as_str()]), true);
        let snapshot = View::begin(&state, Prefixes::from_iter([""]), false);
        (0..=many).for_each(|n| apply(&state, delete(n)));
        assert_eq!([&all, &one, &snapshot].map(|view| view.is_overrun()), [true, false, false]);
        let mut found = Vec::new();
        assert_eq!(one.slice(&state, "", key(0).as_str(), &mut found), None);
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn a_slice_ends_early_where_old_versions_or_bytes_are_many() {
        let state = RwLock::new(State::default());
        let count = 3 * SLICE_KEYS;
        (0..count).for_each(|n| apply(&state, put(n, n as u64 + 1)));
        let view = View::begin(&state, Prefixes::from_iter([""]), true);
        // Of these there is nothing in the state any more, and behind them one key.
        (0..count - 1).for_each(|n| apply(&state, delete(n)));
        let mut from = Some(String::new());
        let mut all = Vec::new();
        while let Some(at) = from {
            let mut found = Vec::new();
            from = view.slice(&state, &at, "", &mut found);
            assert!(found.len() <= SLICE_KEYS + 1, "{}", found.len());
            all.extend(found.into_iter().map(|(key, _)| key));
        }
        assert_eq!(all, (0..count).map(key).collect::<Vec<_>>());

        (0..4).for_each(|n| apply(&state, put_large(n)));
        let view = View::begin(&state, Prefixes::from_iter([""]), true);
        let mut found = Vec::new();
        assert!(view.slice(&state, "", "", &mut found).is_some());
        assert_eq!(found.len(), 1);
    }
}
