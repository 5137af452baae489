//! Snapshots within streams: a consistent walk over the keys a stream's filter wants, a slice at a time.

use super::App;
use super::error::ApiResult;
use super::events::CHUNK_BYTES;
use super::state::push_entry;
use crate::engine::Engine;
use crate::engine::codec::Entry;
use crate::engine::command::Key;
use crate::engine::feed::EventFilter;
use crate::engine::view::View;
use crate::error::Rejection;
use crate::revision::Revision;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

/// Slices of a snapshot looked at before other tasks of the thread get their turn.
const SLICES_PER_POLL: usize = 4;
/// Values of a few named keys, together, from which on a walk needs a place as well.
const SMALL_BYTES_MAX: usize = 1 << 20;
/// How long a stream that wants a snapshot waits until it may walk one.
const WALK_PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether a walk may keep its place.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A walk that sends nothing for so long loses its place; those whose reader is seen to take anything are cut by [`super::live`].
const WALK_STALL: Duration = Duration::from_secs(300);
/// While no place is free, a walk keeps its own as long as it sends something within the first, and no longer than the second.
const WALK_STALL_AMONG_MANY: Duration = Duration::from_secs(30);
const WALK_MAX_AMONG_MANY: Duration = Duration::from_secs(600);

/// A snapshot being sent: the keys there are at its revision, also those whose deadline has just passed. Their `state_deleted` is
/// behind it, or a change that prolongs them, which is worth nothing to whoever has not seen what it changes.
#[derive(Debug)]
pub struct Walk {
    filter: EventFilter,
    /// Found and not sent.
    rows: std::vec::IntoIter<(Key, Arc<Entry>)>,
    /// Where `rows` are the last, the revision they are of.
    whole_at: Option<Revision>,
    /// `None` until the first slice is wanted.
    view: Option<Arc<View>>,
    /// Prefixes still to walk, last first; none of them lies within another.
    prefixes: Vec<String>,
    from: String,
    /// Rows so far.
    pub count: u64,
    /// Where it needs one.
    pub place: Option<Arc<WalkPlace>>,
}

/// One of [`super::WALKS_MAX`]: each walk makes every write keep an old version, and a slow one keeps many. A walk that stands still
/// loses its place and with it its view, and so does one that takes long while others wait; its stream is cut.
#[derive(Debug)]
pub struct WalkPlace {
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    view: Mutex<Weak<View>>,
    has_moved: AtomicBool,
}

impl WalkPlace {
    /// Waits for a place, and not for ever.
    pub async fn wait(app: &App) -> ApiResult<Arc<Self>> {
        let permit = tokio::time::timeout(WALK_PATIENCE, Arc::clone(&app.walks).acquire_owned()).await;
        match permit {
            Ok(Ok(permit)) => Ok(Self::take(permit)),
            _ => Err(Rejection::Overloaded("too many snapshots are being sent; retry in a moment").into()),
        }
    }

    /// Has one.
    #[must_use]
    pub fn take(permit: OwnedSemaphorePermit) -> Arc<Self> {
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
        if let Some(view) = &self.view {
            let_go(view);
        }
    }
}

impl Walk {
    /// Of what the filter wants.
    #[must_use]
    pub fn new(filter: EventFilter) -> Self {
        let mut prefixes: Vec<String> = Vec::new();
        if filter.keys.is_empty() && !filter.prefixes.is_empty() {
            for prefix in &filter.prefixes {
                if !prefixes.last().is_some_and(|last| prefix.starts_with(last.as_str())) {
                    prefixes.push(prefix.to_string());
                }
            }
            prefixes.reverse();
        } else if filter.keys.is_empty() && (filter.all_collections || !filter.collections.is_empty()) {
            // Only collections are watched: there are no entries to show.
        } else {
            prefixes.push(String::new());
        }
        let rows = Vec::new().into_iter();
        Self { filter, rows, whole_at: None, view: None, prefixes, from: String::new(), count: 0, place: None }
    }

    /// Whether it takes a place: when it walks the keys, or looks up a few large ones.
    #[must_use]
    pub fn needs_place(&self, engine: &Engine) -> bool {
        match engine.small_snapshot(&self.filter) {
            Some((entries, _)) => entries.iter().map(|(_, entry)| entry.value.len()).sum::<usize>() > SMALL_BYTES_MAX,
            None => !self.prefixes.is_empty(),
        }
    }

    /// Appends some rows; the revision once they are complete, an error when the view was overrun.
    pub fn step(&mut self, engine: &Engine, out: &mut String) -> Result<Option<Revision>, ()> {
        if self.place.as_ref().is_some_and(|place| !place.hold()) {
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

    /// The next rows: all of them where the filter names its keys, else a slice of the walk.
    fn look_further(&mut self, engine: &Engine) -> Result<(), ()> {
        let mut found = Vec::new();
        if let Some((entries, revision)) = engine.small_snapshot(&self.filter) {
            found = entries;
            self.whole_at = Some(revision);
        } else {
            let view = self.view.get_or_insert_with(|| {
                let view = engine.begin_view(self.prefixes.clone());
                if let Some(place) = &self.place {
                    *place.view.lock() = Arc::downgrade(&view);
                }
                view
            });
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
                // Writers need keep nothing more for it.
                let_go(view);
            }
        }
        self.rows = found.into_iter();
        Ok(())
    }

    /// Appends rows until there are enough for a chunk.
    fn push_rows(&mut self, out: &mut String) {
        while out.len() < CHUNK_BYTES
            && let Some((key, entry)) = self.rows.next()
        {
            if self.filter.wants_entry(key.as_str(), entry.labels.as_deref()) {
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
