//! Snapshots within streams: a consistent walk over the keys a stream's filter wants, a slice at a time.

use super::App;
use super::error::ApiResult;
use super::events::CHUNK_BYTES;
use super::state::push_entry;
use crate::engine::Engine;
use crate::engine::codec::Entry;
use crate::engine::command::Key;
use crate::engine::feed::EventFilter;
use crate::engine::state::is_live;
use crate::engine::view::View;
use crate::error::Rejection;
use crate::revision::Revision;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

/// Slices of a snapshot looked at before other tasks of the thread get their turn.
const SLICES_PER_POLL: usize = 4;
/// How long a stream that wants a snapshot waits until it may walk one.
const WALK_PATIENCE: Duration = Duration::from_secs(10);
/// A walk that sends nothing for this long gives its place up.
const WALK_STALL: Duration = Duration::from_secs(30);

/// A snapshot being sent.
#[derive(Debug)]
pub struct Walk {
    filter: EventFilter,
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

/// One of [`super::WALKS_MAX`]: many walks at once would make every write keep many old versions. A walk whose reader takes
/// nothing for long loses its place and is cut, so that nobody keeps the others out: over HTTP/2 a reader can stand still while
/// its connection looks alive.
#[derive(Debug)]
pub struct WalkPlace {
    permit: Mutex<Option<OwnedSemaphorePermit>>,
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
        let place = Arc::new(Self { permit: Mutex::new(Some(permit)), has_moved: AtomicBool::new(true) });
        let watched = Arc::downgrade(&place);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(WALK_STALL).await;
                let Some(place) = watched.upgrade() else { return };
                if !place.has_moved.swap(false, Ordering::Relaxed) {
                    place.permit.lock().take();
                    return;
                }
            }
        });
        place
    }

    /// Notes that the reader took something. False when the place is lost.
    fn hold(&self) -> bool {
        self.has_moved.store(true, Ordering::Relaxed);
        self.permit.lock().is_some()
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
        Self { filter, view: None, prefixes, from: String::new(), count: 0, place: None }
    }

    /// Whether it walks the keys, rather than looking up a few.
    #[must_use]
    pub fn needs_view(&self) -> bool {
        !self.prefixes.is_empty() && (self.filter.keys.is_empty() || !self.filter.prefixes.is_empty())
    }

    /// Appends rows of the next slices; the revision once it is complete, an error when the view was overrun.
    pub fn step(&mut self, engine: &Engine, out: &mut String) -> Result<Option<Revision>, ()> {
        if self.place.as_ref().is_some_and(|place| !place.hold()) {
            return Err(());
        }
        if self.view.is_none()
            && let Some((entries, revision)) = engine.small_snapshot(&self.filter)
        {
            for (key, entry) in &entries {
                self.push_row(out, key, entry);
            }
            return Ok(Some(revision));
        }
        let view = Arc::clone(self.view.get_or_insert_with(|| engine.begin_view(self.prefixes.clone())));
        let now_ms = engine.now_ms();
        for _ in 0..SLICES_PER_POLL {
            let Some(prefix) = self.prefixes.last() else {
                return if view.is_overrun() { Err(()) } else { Ok(Some(view.revision())) };
            };
            let mut found = Vec::new();
            match engine.view_slice(&view, &self.from, prefix, &mut found) {
                Some(next) => self.from = next,
                None => {
                    self.prefixes.pop();
                    self.from.clear();
                }
            }
            for (key, entry) in &found {
                if is_live(entry, now_ms) && self.filter.wants_entry(key.as_str(), entry.labels.as_deref()) {
                    self.push_row(out, key, entry);
                }
            }
            if view.is_overrun() {
                return Err(());
            }
            if out.len() >= CHUNK_BYTES {
                break;
            }
        }
        Ok(None)
    }

    fn push_row(&mut self, out: &mut String, key: &Key, entry: &Entry) {
        out.push_str("event: snapshot\ndata: ");
        push_entry(out, key.as_str(), entry, true);
        out.push_str("\n\n");
        self.count += 1;
    }
}
