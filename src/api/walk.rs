//! Snapshots within streams: a consistent walk over the keys a stream's filter wants, a slice at a time.

use super::events::CHUNK_BYTES;
use super::state::push_entry;
use crate::engine::Engine;
use crate::engine::codec::Entry;
use crate::engine::command::Key;
use crate::engine::feed::EventFilter;
use crate::engine::prefixes::Prefixes;
use crate::engine::state::is_live;
use crate::engine::view::View;
use crate::revision::Revision;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::PollSemaphore;

/// Slices of a snapshot looked at before other tasks of the thread get their turn.
const SLICES_PER_POLL: usize = 4;
/// Named keys are looked up rather than walked where their values are no larger than this, so that nothing of them is kept.
const SMALL_BYTES_MAX: usize = CHUNK_BYTES;
/// A deadline is past by so much that nothing decided before it can still be on its way.
const LONG_PAST_MS: u64 = 60_000;
/// How often it is looked whether a walk may keep its place.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A walk that sends nothing for so long loses its place; those whose reader is seen to take anything are cut by [`super::live`].
const WALK_STALL: Duration = Duration::from_secs(300);
/// While no place is free, a walk keeps its own as long as it sends something within the first, and no longer than the second.
const WALK_STALL_AMONG_MANY: Duration = Duration::from_secs(30);
const WALK_MAX_AMONG_MANY: Duration = Duration::from_secs(600);

/// A snapshot being sent: the keys there are at its revision, also those whose deadline has just passed. Their `state_deleted` is
/// behind it, or a change that prolongs them, which is worth nothing to whoever has not seen what it changes. (On a disk that is
/// full or fails, keys stay for long whose deadline has passed: those are left out.)
#[derive(Debug)]
pub struct Walk {
    filter: EventFilter,
    /// Found and not sent.
    rows: std::vec::IntoIter<(Key, Arc<Entry>)>,
    /// Where `rows` are the last, the revision they are of.
    whole_at: Option<Revision>,
    /// While there is more than `rows`.
    view: Option<Arc<View>>,
    /// When it began, in Unix milliseconds.
    began_ms: u64,
    /// Prefixes still to walk, last first; none of them lies within another.
    prefixes: Vec<String>,
    from: String,
    /// Rows so far.
    pub count: u64,
    /// Where it needs one.
    place: Option<Arc<WalkPlace>>,
    /// While it is in line for one.
    line: Option<PollSemaphore>,
}

/// One of [`super::WALKS_MAX`]: each walk makes every write keep an old version, and a slow one keeps many. A walk that stands still
/// loses its place and with it its view, and so does one that takes long while others wait; its stream is cut, unless everything
/// was found by then.
#[derive(Debug)]
pub struct WalkPlace {
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    view: Mutex<Weak<View>>,
    has_moved: AtomicBool,
}

impl WalkPlace {
    #[must_use]
    fn take(permit: OwnedSemaphorePermit) -> Arc<Self> {
        let walks = Arc::clone(permit.semaphore());
        let place = Arc::new(Self {
            permit: Mutex::new(Some(permit)),
            view: Mutex::default(),
            has_moved: AtomicBool::new(true),
        });
        let watched = Arc::downgrade(&place);
        tokio::spawn(async move {
            let begun = Instant::now();
            let mut moved = begun;
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                let Some(place) = watched.upgrade() else { return };
                if place.has_moved.swap(false, Ordering::Relaxed) {
                    moved = Instant::now();
                }
                let is_overrun = place.view.lock().upgrade().is_some_and(|view| view.is_overrun());
                let (stalled, age) = (moved.elapsed(), begun.elapsed());
                let is_in_the_way =
                    walks.available_permits() == 0 && (stalled >= WALK_STALL_AMONG_MANY || age >= WALK_MAX_AMONG_MANY);
                if is_overrun || stalled >= WALK_STALL || is_in_the_way {
                    place.lose();
                    return;
                }
            }
        });
        place
    }

    fn lose(&self) {
        if let Some(view) = self.view.lock().upgrade() {
            let_go(&view);
        }
        self.permit.lock().take();
    }

    /// Notes that the reader took something. False when the place is lost.
    pub fn hold(&self) -> bool {
        self.has_moved.store(true, Ordering::Relaxed);
        self.permit.lock().is_some()
    }
}

/// Ends a view. What it kept is freed on a thread that may take long: streams and requests would wait.
fn let_go(view: &View) {
    let kept = view.give_up();
    if let (false, Ok(runtime)) = (kept.is_empty(), Handle::try_current()) {
        runtime.spawn_blocking(|| drop(kept));
    }
}

impl Drop for Walk {
    fn drop(&mut self) {
        self.end_view();
    }
}

impl Walk {
    /// Of what the filter wants, in line for one of the places if it needs any.
    #[must_use]
    pub fn new(engine: &Engine, filter: EventFilter, places: &Arc<Semaphore>) -> Self {
        let names = filter.keys.iter().map(Key::as_str).chain(filter.prefixes.iter());
        let mut prefixes: Vec<String> = names.collect::<Prefixes>().iter().rev().map(str::to_owned).collect();
        let are_only_collections = filter.all_collections || !filter.collections.is_empty();
        if prefixes.is_empty() && !are_only_collections {
            prefixes.push(String::new());
        }
        let mut walk = Self {
            filter,
            rows: Vec::new().into_iter(),
            whole_at: None,
            view: None,
            began_ms: 0,
            prefixes,
            from: String::new(),
            count: 0,
            place: None,
            line: None,
        };
        walk.line = walk.needs_place(engine).then(|| PollSemaphore::new(Arc::clone(places)));
        walk
    }

    /// Ready when it may begin. Its stream is open meanwhile, because a refusal would end an `EventSource` for good.
    pub fn poll_place(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(line) = &mut self.line {
            self.place = ready!(line.poll_acquire(cx)).map(WalkPlace::take);
            self.line = None;
        }
        Poll::Ready(())
    }

    /// Notes that the reader took some of what was sent.
    pub fn note_taken(&self) {
        if let Some(place) = &self.place {
            place.hold();
        }
    }

    /// Whether it takes a place: when it walks the keys, rather than look up a few small ones.
    fn needs_place(&self, engine: &Engine) -> bool {
        match engine.small_snapshot(&self.filter) {
            Some((entries, _)) => entries.iter().map(|(_, entry)| entry.value.len()).sum::<usize>() > SMALL_BYTES_MAX,
            None => !self.prefixes.is_empty(),
        }
    }

    /// Appends some rows; the revision once they are complete, an error when the view was overrun.
    pub fn step(&mut self, engine: &Engine, out: &mut String) -> Result<Option<Revision>, ()> {
        let has_place = self.place.as_ref().is_none_or(|place| place.hold());
        if !has_place && self.whole_at.is_none() {
            return Err(());
        }
        for _ in 0..SLICES_PER_POLL {
            self.push_rows(out);
            if out.len() >= CHUNK_BYTES {
                break;
            }
            if self.whole_at.is_some() {
                return Ok(self.whole_at);
            }
            self.look_further(engine)?;
        }
        Ok(None)
    }

    /// The next rows: a slice of the walk, or without a place all of those that the filter names.
    fn look_further(&mut self, engine: &Engine) -> Result<(), ()> {
        let mut found = Vec::new();
        if self.began_ms == 0 {
            self.began_ms = engine.now_ms();
            let named = if self.place.is_none() { engine.small_snapshot(&self.filter) } else { None };
            if let Some((entries, revision)) = named {
                (found, self.whole_at) = (entries, Some(revision));
            } else {
                let view = engine.begin_view(self.prefixes.iter().map(String::as_str).collect());
                if let Some(place) = &self.place {
                    *place.view.lock() = Arc::downgrade(&view);
                }
                self.view = Some(view);
            }
        }
        if let Some(view) = &self.view {
            if let Some(prefix) = self.prefixes.last() {
                match engine.view_slice(view, &self.from, prefix, &mut found) {
                    Some(next) => self.from = next,
                    None => {
                        self.prefixes.pop();
                        self.from.clear();
                    }
                }
            }
            if view.is_overrun() {
                return Err(());
            }
            if self.prefixes.is_empty() {
                self.whole_at = Some(view.revision());
                self.end_view();
            }
        }
        self.rows = found.into_iter();
        Ok(())
    }

    /// Has writers keep nothing more for it.
    fn end_view(&mut self) {
        if let Some(place) = &self.place {
            // First: whoever watches the place takes a view that is let go for one that is overrun.
            *place.view.lock() = Weak::new();
        }
        if let Some(view) = self.view.take() {
            let_go(&view);
        }
    }

    /// Appends rows until there are enough for a chunk.
    fn push_rows(&mut self, out: &mut String) {
        while out.len() < CHUNK_BYTES
            && let Some((key, entry)) = self.rows.next()
        {
            let is_past = !is_live(&entry, self.began_ms.saturating_sub(LONG_PAST_MS));
            if !is_past && self.filter.wants_entry(key.as_str(), entry.labels.as_deref()) {
                self.push_row(out, &key, &entry);
            }
        }
    }

    fn push_row(&mut self, out: &mut String, key: &Key, entry: &Entry) {
        out.push_str("event: snapshot\ndata: ");
        push_entry(out, key.as_str(), entry, true);
        out.push_str("\n\n");
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Resolved;
    use crate::engine::command::{Command, Condition, Op, Value};
    use std::task::Waker;

    fn engine() -> (Engine, crate::engine::Threads) {
        let flags = [("ephemeral", "true".to_owned())];
        Engine::open(&Resolved::collect(Some("/dev/null".into()), |_| None, flags).unwrap().build().unwrap()).unwrap()
    }

    async fn put(engine: &Engine, key: &str, bytes: usize) -> Revision {
        let value = Value::Json(format!("\"{}\"", "x".repeat(bytes)).into());
        let key = Key::new(key).unwrap();
        let op = Op::Put { key, value, ttl_ms: None, labels: None, condition: Condition::default() };
        engine.submit(Command::one(op)).await.unwrap().last_revision
    }

    fn filter(keys: &[&str], prefixes: &[&str]) -> EventFilter {
        EventFilter {
            keys: keys.iter().map(|key| Key::new(key).unwrap()).collect(),
            prefixes: prefixes.iter().copied().collect(),
            ..EventFilter::default()
        }
    }

    /// One that may begin.
    fn walk(engine: &Engine, filter: EventFilter) -> Walk {
        let mut walk = Walk::new(engine, filter, &Arc::new(Semaphore::new(1)));
        assert!(walk.poll_place(&mut Context::from_waker(Waker::noop())).is_ready());
        walk
    }

    /// The keys it shows, each chunk no larger than it may be.
    fn shown(engine: &Engine, filter: EventFilter) -> Vec<String> {
        let mut walk = walk(engine, filter);
        let mut all = String::new();
        loop {
            let mut out = String::new();
            let end = walk.step(engine, &mut out).unwrap();
            assert!(out.len() < 2 * CHUNK_BYTES, "{}", out.len());
            all.push_str(&out);
            if end.is_some() {
                break;
            }
        }
        let keys = all.split("{\"key\":\"").skip(1).map(|row| row.split('"').next().unwrap().to_owned());
        keys.collect()
    }

    #[tokio::test]
    async fn named_keys_and_prefixes_are_shown_once_in_order_however_large() {
        let (engine, threads) = engine();
        for key in ["a", "a1", "a2", "b", "b/1", "c", "d"] {
            put(&engine, key, 10).await;
        }
        assert!(walk(&engine, filter(&["a", "c"], &[])).place.is_none());
        assert_eq!(shown(&engine, filter(&["c", "a", "no"], &[])), ["a", "c"]);
        assert_eq!(shown(&engine, filter(&["a", "b/1"], &["b", "c"])), ["a", "b", "b/1", "c"]);
        for key in ["a", "a1", "c"] {
            put(&engine, key, CHUNK_BYTES / 2).await;
        }
        assert!(walk(&engine, filter(&["a", "c"], &[])).place.is_some());
        assert_eq!(shown(&engine, filter(&["c", "a", "no"], &[])), ["a", "c"]);
        threads.stop();
    }

    /// All rows would arrive and their end would not.
    #[tokio::test]
    async fn a_walk_that_has_found_everything_is_not_cut() {
        let (engine, threads) = engine();
        for n in 0..4 {
            put(&engine, &format!("k{n}"), CHUNK_BYTES / 2).await;
        }
        let mut walk = walk(&engine, EventFilter::default());
        let place = Arc::clone(walk.place.as_ref().unwrap());
        let mut out = String::new();
        assert_eq!(walk.step(&engine, &mut out), Ok(None));
        assert!(walk.whole_at.is_some(), "one slice");
        // As whoever watches the place would look.
        assert!(place.view.lock().upgrade().is_none());
        place.lose();
        let end = (0..4).find_map(|_| walk.step(&engine, &mut String::new()).unwrap());
        assert_eq!((end, walk.count), (Some(Revision(4)), 4));
        threads.stop();
    }

    #[tokio::test]
    async fn a_walk_that_lost_its_place_before_the_end_is_cut() {
        let (engine, threads) = engine();
        for n in 0..8 {
            put(&engine, &format!("k{n}"), 2 * CHUNK_BYTES).await;
        }
        let mut walk = walk(&engine, EventFilter::default());
        let place = Arc::clone(walk.place.as_ref().unwrap());
        let mut out = String::new();
        assert_eq!(walk.step(&engine, &mut out), Ok(None));
        place.lose();
        assert!(walk.view.as_ref().unwrap().is_overrun(), "writers keep nothing more");
        assert_eq!(walk.step(&engine, &mut out), Err(()));
        threads.stop();
    }
}
