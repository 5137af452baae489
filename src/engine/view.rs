//! A consistent walk over the keys at one revision, while writers go on.
//!
//! The walk takes the state's read lock for a slice of keys at a time. Whatever a writer changes ahead of the walk, it
//! first leaves here as it was (copy on write); the walk prefers that to what the state holds by then. Memory: what was
//! changed ahead of the walk and not yet reached, so a walk should be quick; [`View::is_overrun`] bounds the slow ones.
//!
//! Locks: `inner`, taken by the writer for each key it changes while a walk is on, and by the walk once a slice; and the
//! list of walks, [`Views`].

use super::codec::{Entries, Entry};
use super::command::Key;
use super::state::State;
use crate::revision::Revision;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Weak};

/// Keys looked at under one hold of the state's lock: some tens of microseconds.
pub const SLICE_KEYS: usize = 512;

/// The state's keys at one revision.
#[derive(Debug)]
pub struct View {
    revision: Revision,
    /// What will be walked: keys that begin with one of these.
    prefixes: Vec<String>,
    /// Most old versions kept; beyond that the view is overrun and worthless.
    preimages_max: usize,
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
        if !views.is_empty() {
            views.retain(|view| view.upgrade().map(|view| view.remember(key, old)).is_some());
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// What keys ahead of the walk held at `revision`; `None` = they did not exist.
    preimages: BTreeMap<Key, Option<Arc<Entry>>>,
    /// The last key walked; changes up to it need not be kept.
    passed: Option<Key>,
    overrun: bool,
}

impl View {
    /// Begins a walk at the state's current revision.
    pub fn begin(state: &RwLock<State>, prefixes: Vec<String>, preimages_max: usize) -> Arc<Self> {
        // Nothing is applied while this is held, so the revision and what is remembered from here on fit together.
        let state = state.read();
        let inner = Mutex::new(Inner::default());
        let view = Arc::new(Self { revision: state.revision(), prefixes, preimages_max, inner });
        state.views().add(&view);
        view
    }

    /// The revision the walk shows.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Keeps what a key held before a change. Called by the writer, under the state's write lock.
    fn remember(&self, key: &Key, old: Option<&Arc<Entry>>) {
        if !self.prefixes.iter().any(|p| key.as_str().starts_with(p.as_str())) {
            return;
        }
        let mut inner = self.inner.lock();
        if inner.overrun || inner.passed.as_ref().is_some_and(|passed| key <= passed) {
            return;
        }
        if inner.preimages.len() >= self.preimages_max {
            inner.overrun = true;
            inner.preimages.clear();
            return;
        }
        inner.preimages.entry(key.clone()).or_insert_with(|| old.cloned());
    }

    /// Old versions kept so far.
    pub fn kept(&self) -> usize {
        self.inner.lock().preimages.len()
    }

    /// Whether more was changed ahead of the walk than may be kept: the walk must be given up.
    pub fn is_overrun(&self) -> bool {
        self.inner.lock().overrun
    }

    /// Appends the next entries in key order, from `from` on, as they were at this view's revision, and returns where to
    /// go on; `None` at the end. With `prefix`, ends after the last key that begins with it.
    pub fn slice(&self, state: &RwLock<State>, from: &str, prefix: &str, found: &mut Entries) -> Option<String> {
        let state = state.read();
        let mut inner = self.inner.lock();
        let mut current: Entries = Vec::with_capacity(SLICE_KEYS);
        let mut is_end = true;
        let first = if from < prefix { prefix } else { from };
        for (key, entry) in state.range_from(Bound::Included(first)) {
            if !key.as_str().starts_with(prefix) {
                break;
            }
            if current.len() == SLICE_KEYS {
                is_end = false;
                break;
            }
            current.push((key.clone(), Arc::clone(entry)));
        }
        drop(state);
        let last = current.last().map(|(key, _)| key.clone());
        // Old versions within this slice; at the end of the range, all that are left in it.
        let mut old = BTreeMap::new();
        while let Some((key, _)) = inner.preimages.range::<str, _>((Bound::Included(first), Bound::Unbounded)).next() {
            let within = key.as_str().starts_with(prefix) && (is_end || last.as_ref().is_some_and(|last| key <= last));
            if !within {
                break;
            }
            let key = key.clone();
            let preimage = inner.preimages.remove(&key).flatten();
            old.insert(key, preimage);
        }
        for (key, entry) in current {
            old.entry(key).or_insert(Some(entry));
        }
        found.extend(old.into_iter().filter_map(|(key, entry)| Some((key, entry?))));
        if is_end {
            return None;
        }
        let last = last?;
        // The smallest text after `last`.
        let next = format!("{}\0", last.as_str());
        inner.passed = Some(last);
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
            let view = View::begin(&state, vec![String::new()], usize::MAX);
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
        let view = View::begin(&state, vec!["k".into()], 10);
        (0..10).for_each(|n| apply(&state, delete(n)));
        assert!(!view.is_overrun());
        apply(&state, delete(11));
        assert!(view.is_overrun());
    }
}
