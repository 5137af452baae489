//! Streams and history: `GET /v1/events` as `text/event-stream` or JSON, and publishing.

use super::App;
use super::answer::json;
use super::auth::{Auth, StreamPlace};
use super::error::{ApiError, ApiResult, invalid};
use super::extract::{Fields, Head, Object, Params, Payload, accepted, parse_object, read_json};
use super::live::Pending;
use super::state::MetaBody;
use super::walk::Walk;
use crate::engine::Engine;
use crate::engine::command::{Command, EventType, KEY_BYTES_MAX, Key, Op};
use crate::engine::feed::{EventFilter, FILTER_TERMS_MAX, ResetReason, Step, Subscription};
use crate::engine::frame::{CHUNK_FRAMING_BYTES, END_OF_CHUNK, Ephemeral, Frame, begin_chunk, push_fmt};
use crate::engine::json::compact;
use crate::error::Rejection;
use crate::faults::{self, Bug};
use crate::keys::{Grant, Right};
use crate::revision::Revision;
use crate::vector::CollectionName;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use http_body::Frame as BodyFrame;
use jiff::Timestamp;
use jiff::civil::DateTime;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::BTreeSet;
use std::hash::BuildHasher;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};

/// How long a client waits before it reconnects, in milliseconds.
const RETRY_MS: u64 = 1000;
/// Clients that are sent away are told to come back within this spread, so that they don't all come at once.
const RETRY_SPREAD_MS: u64 = 2000;
/// Bytes put into one chunk of a stream: enough to share a send among many small events.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Frames put into one chunk.
const CHUNK_FRAMES: usize = 1024;
/// Of so many events delivered the age of one is noted.
const LAG_SAMPLED_OF: u64 = 64;
/// Bytes in one page of JSON history.
const HISTORY_BYTES_MAX: usize = 8 << 20;
/// How long a page of history waits for the log to be read, and how long when it has waited for events before.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(10);
const LATE_PATIENCE: Duration = Duration::from_secs(1);
/// How often a long poll looks at what passes it by.
const RECHECK_EVERY: Duration = Duration::from_secs(5);

/// What the route takes in its query.
pub const PARAMS: &[&str] = &[
    "key",
    "prefix",
    "collection",
    "types",
    "job_id",
    "tag",
    "since",
    "snapshot",
    "include_vector",
    "heartbeat_ms",
    "limit",
    "wait_ms",
    // Looked at before the request gets here.
    "access_token",
];

/// What a query asks to watch.
pub fn filter(params: &Params) -> ApiResult<EventFilter> {
    let mut filter = EventFilter::default();
    for key in params.all("key") {
        filter.keys.insert(Key::new(key)?);
    }
    for prefix in params.all("prefix") {
        if prefix.len() > KEY_BYTES_MAX {
            return Err(invalid(format!("prefix is at most {KEY_BYTES_MAX} bytes")));
        }
        filter.prefixes.insert(prefix);
    }
    for collection in params.all("collection") {
        filter.collections.insert(CollectionName::new(collection)?);
    }
    for name in params.all("types").flat_map(|list| list.split(',')).map(str::trim) {
        let known = crate::engine::command::SERVER_TYPES.contains(&name);
        if !known {
            EventType::new(name)?;
        }
        filter.types.insert(name.into());
    }
    filter.job_ids.extend(params.all("job_id").map(Into::into));
    filter.tags.extend(params.all("tag").map(Into::into));
    if filter.job_ids.contains("") || filter.tags.contains("") {
        return Err(invalid("job_id and tag are not empty"));
    }
    // Those that begin with another of them too.
    let prefixes = params.all("prefix").collect::<BTreeSet<_>>().len();
    let terms = filter.terms() - filter.prefixes.len() + prefixes;
    if terms > FILTER_TERMS_MAX {
        return Err(invalid(format!("a filter has at most {FILTER_TERMS_MAX} terms, this one has {terms}")));
    }
    Ok(filter)
}

/// Keeps a filter within what its sender may read: what it names must be inside, and when it names nothing it watches
/// all that is inside.
fn restrict(grant: &Grant, filter: &mut EventFilter) -> Result<(), Rejection> {
    grant.need(Right::Read)?;
    let Some(within) = &grant.within else { return Ok(()) };
    if filter.watches_all() {
        for collection in within.collections.iter().filter(|c| *c != "*") {
            filter.collections.insert(CollectionName::new(collection)?);
        }
        filter.all_collections = within.collections.iter().any(|c| c == "*");
        within.prefixes.iter().for_each(|prefix| filter.prefixes.insert(prefix));
        return if filter.watches_all() { grant.need_everything(Right::Read) } else { Ok(()) };
    }
    filter.keys.iter().try_for_each(|key| grant.need_key(Right::Read, key.as_str()))?;
    filter.prefixes.iter().try_for_each(|prefix| grant.need_key(Right::Read, prefix))?;
    filter.collections.iter().try_for_each(|name| grant.need_collection(Right::Read, name.as_str()))
}

/// How long a stream may go on.
#[derive(Debug)]
struct Access {
    grant: Arc<Grant>,
    ends_at: Option<Instant>,
}

impl Access {
    fn new(grant: Arc<Grant>, now_ms: u64) -> Self {
        let left = grant.expires_at_ms.map(|at| Duration::from_millis(at.saturating_sub(now_ms)));
        // Beyond what a timer can hold it does not end.
        let ends_at = left.and_then(|left| Instant::now().checked_add(left));
        Self { grant, ends_at }
    }

    fn is_over(&self) -> bool {
        self.grant.is_revoked() || self.ends_at.is_some_and(|at| Instant::now() >= at)
    }
}

/// Where a client wants to resume.
#[derive(Clone, Copy)]
struct Resume {
    after: Revision,
    /// A time before everything in a log that no longer reaches back to its beginning.
    before_oldest: bool,
}

impl Resume {
    fn check(self, engine: &Engine) -> Option<ResetReason> {
        if self.before_oldest {
            return Some(ResetReason::Compacted);
        }
        engine.feed().check_resume(self.after, engine.head())
    }
}

/// What a reconnecting `EventSource` sends.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// An empty one is none, as an `EventSource` means it.
fn last_event_id(headers: &Fields) -> Option<&HeaderValue> {
    headers.first(LAST_EVENT_ID).filter(|value| !value.is_empty())
}

/// Where a client wants to resume, if it says so. `Last-Event-ID` beats `since`.
async fn resume_point(app: &App, headers: &Fields, params: &Params) -> ApiResult<Option<Resume>> {
    let at = |revision| Some(Resume { after: Revision(revision), before_oldest: false });
    if let Some(value) = last_event_id(headers) {
        let id = value.to_str().ok().filter(|v| v.bytes().all(|b| b.is_ascii_digit())).and_then(|v| v.parse().ok());
        let resume = id.map(at).ok_or_else(|| invalid("Last-Event-ID is not an id this server gave out"))?;
        // The id of an empty server: whoever has it has seen nothing, and is told when the first events are gone. As `since`, 0
        // asks for what there is.
        let oldest = app.engine.feed().oldest();
        return Ok(resume.map(|r| Resume { before_oldest: r.after == Revision::ZERO && oldest > Revision(1), ..r }));
    }
    let Some(since) = params.one("since")? else { return Ok(None) };
    if !since.is_empty() && since.bytes().all(|b| b.is_ascii_digit()) {
        return since.parse().map(at).map_err(|_| invalid("since is larger than any revision"));
    }
    let ts_ms = time_ms(since).ok_or_else(|| invalid("since is a revision or a time such as 2026-01-31T12:00:00Z"))?;
    let log = Arc::clone(app.engine.log());
    let found = tokio::task::spawn_blocking(move || log.revision_at(ts_ms)).await.map_err(|_| ApiError::Internal)?;
    let found = found.map_err(|error| {
        tracing::error!(%error, "cannot look up a time in the log");
        ApiError::Internal
    })?;
    let feed = app.engine.feed();
    Ok(Some(match found {
        Some(revision) => Resume { after: revision.min(feed.head()), before_oldest: false },
        None => Resume { after: feed.oldest().prev(), before_oldest: feed.oldest() > Revision(1) },
    }))
}

/// A time as RFC 3339 writes it, in Unix milliseconds, zero if it was before. The parser takes much more than that.
fn time_ms(text: &str) -> Option<u64> {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let has_form = |text: &str, form: &str| {
        let alike = |(byte, form)| if form == b'0' { u8::is_ascii_digit(&byte) } else { byte == form };
        text.len() == form.len() && text.bytes().zip(form.bytes()).all(alike)
    };
    // A plus sign that was not encoded arrives as a space.
    let text = text.replace(' ', "+").to_ascii_uppercase();
    let (whole, rest) = text.split_at_checked("0000-00-00T00:00:00".len())?;
    let (fraction, zone) = rest.split_at(rest.find(['Z', '+', '-'])?);
    let is_fraction = |text: &str| text.len() > 1 && text.starts_with('.') && digits(&text[1..]);
    let is_zone = zone == "Z" || has_form(&zone[1..], "00:00") && &zone[1..3] <= "23" && &zone[4..] <= "59";
    if !has_form(whole, "0000-00-00T00:00:00") || !is_zone || !(fraction.is_empty() || is_fraction(fraction)) {
        return None;
    }
    // Nanoseconds are all that it reads, and the last day of the year 9999 is beyond what it can say.
    let fraction = fraction.get(..10).unwrap_or(fraction);
    let time = format!("{whole}{fraction}{zone}").parse::<Timestamp>();
    let time = time.or_else(|_| whole.parse::<DateTime>().map(|_| Timestamp::MAX)).ok()?;
    Some(u64::try_from(time.as_millisecond()).unwrap_or(0))
}

/// Whether JSON is wanted more than a stream (RFC 9110, 12.5.1); a stream when neither is named, or both alike.
fn wants_json(headers: &Fields) -> bool {
    match (accepted(headers, "application/json"), accepted(headers, "text/event-stream")) {
        (Some(json), Some(stream)) => json > stream,
        (json, _) => json.is_some(),
    }
}

/// Whether this is an `EventSource`: what it accepts, and that it wants no cache's answer, is what the Fetch standard has it say.
#[must_use]
pub fn is_event_source(head: &Head) -> bool {
    let says = |name, value: &str| head.headers.first(name).is_some_and(|found| found == value);
    head.method == Method::GET && says(header::ACCEPT, "text/event-stream") && says(header::CACHE_CONTROL, "no-cache")
}

/// A refusal that passes, as an `EventSource` survives it: any other status than 200 ends it for good.
#[must_use]
pub fn come_back(refusal: Response) -> Response {
    let seconds = refusal.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let retry_ms = seconds.unwrap_or(1_u64) * RETRY_MS + spread_ms();
    let mut response = Response::new(Body::from(format!("retry: {retry_ms}\n: {}\n\n", refusal.status())));
    put_stream_headers(&mut response);
    response
}

fn put_stream_headers(response: &mut Response) {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
}

/// Not the same for all that are sent away at once.
fn spread_ms() -> u64 {
    std::hash::RandomState::new().hash_one(()) % RETRY_SPREAD_MS
}

/// `GET /v1/events`
pub async fn events(State(app): State<App>, head: Head) -> ApiResult {
    let Head { uri, headers, grant, client, .. } = head;
    let (uri, headers) = (&uri, &headers);
    let params = Params::parse(uri, PARAMS)?;
    let mut filter = filter(&params)?;
    if let Some(grant) = &grant {
        restrict(grant, &mut filter)?;
    }
    let resume = resume_point(&app, headers, &params).await?;
    let include_vector = params.flag("include_vector")?;
    // A page of history is over at once, unless it is to wait.
    let lasts = !wants_json(headers) || params.one("wait_ms")?.is_some_and(|wait_ms| wait_ms != "0");
    let place = client.filter(|_| lasts).map_or(Ok(None), |client| Auth::stream_place(&app, client))?;
    let access = grant.map(|grant| Access::new(grant, app.engine.now_ms()));
    if wants_json(headers) {
        return history(&app, &params, filter, resume, include_vector, access.as_ref()).await;
    }
    if params.one("limit")?.is_some() || params.one("wait_ms")?.is_some() {
        return Err(invalid("limit and wait_ms go with Accept: application/json"));
    }
    let heartbeat = Duration::from_millis(params.number_in("heartbeat_ms", 1000..=60_000, 15_000)?);
    let wants_snapshot = params.flag("snapshot")?;
    let feed = app.engine.feed();
    let reset = resume.and_then(|resume| Some((resume.check(&app.engine)?, resume.after)));
    let after = match (resume, reset) {
        (Some(resume), None) if faults::is_on(Bug::ResumeOffByOne) => resume.after.next(),
        (Some(resume), None) => resume.after,
        _ => feed.head(),
    };
    // A client that comes back by its last id has its snapshot; whoever asks anew, by `since` or not, gets one.
    let resumes = last_event_id(headers).is_some() && resume.is_some() && reset.is_none();
    let subscription = feed.subscribe(filter.clone(), after);
    let mut out = format!("retry: {RETRY_MS}\n");
    let phase = if wants_snapshot && !resumes {
        out.push('\n');
        if let Some((reason, requested)) = reset {
            push_reset(&mut out, &app.engine, reason, requested, None);
        }
        Phase::Snapshot(Box::new(Walk::new(&app.engine, filter, &app.walks)))
    } else {
        match reset {
            Some((reason, requested)) => push_reset(&mut out, &app.engine, reason, requested, Some(after)),
            None => push_fmt(&mut out, format_args!("id: {}\n\n", subscription.reached())),
        }
        Phase::Live
    };
    if reset.is_some() {
        feed.stats.resets.fetch_add(1, Ordering::Relaxed);
    }
    let stream = EventStream {
        engine: app.engine.clone(),
        subscription,
        phase,
        first: Some(Bytes::from(out)),
        include_vector,
        walks: wants_snapshot.then(|| Arc::clone(&app.walks)),
        heartbeat,
        last_sent: Instant::now(),
        timer: None,
        access,
        _place: place,
    };
    let mut response = Response::new(Body::empty());
    response.extensions_mut().insert(Pending::new(stream));
    put_stream_headers(&mut response);
    Ok(response.into())
}

/// Appends a `reset` frame; with an id when live events follow it directly.
fn push_reset(out: &mut String, engine: &Engine, reason: ResetReason, requested: Revision, id: Option<Revision>) {
    out.push_str("event: reset\n");
    if let Some(id) = id {
        push_fmt(out, format_args!("id: {id}\n"));
    }
    let feed = engine.feed();
    push_fmt(
        out,
        format_args!(
            "data: {{\"reason\":\"{}\",\"requested\":{requested},\"oldest\":{},\"head\":{}}}\n\n",
            reason.as_str(),
            feed.oldest(),
            feed.head()
        ),
    );
}

/// What a stream says next.
enum Content {
    Frames(Vec<Arc<Frame>>),
    Text(Bytes),
}

fn join<'a>(length: usize, parts: impl Iterator<Item = &'a [u8]>, is_framed: bool) -> Bytes {
    let mut out = Vec::with_capacity(length + CHUNK_FRAMING_BYTES);
    if is_framed {
        begin_chunk(&mut out, length);
    }
    parts.for_each(|part| out.extend_from_slice(part));
    if is_framed {
        out.extend_from_slice(END_OF_CHUNK);
    }
    out.into()
}

#[derive(Debug)]
enum Phase {
    Snapshot(Box<Walk>),
    Live,
    Ended,
}

/// What a stream sends, chunk by chunk. Small on purpose: there may be ten thousand.
#[derive(Debug)]
pub struct EventStream {
    engine: Engine,
    subscription: Subscription,
    phase: Phase,
    first: Option<Bytes>,
    include_vector: bool,
    /// Places for snapshots, where it wants any.
    walks: Option<Arc<Semaphore>>,
    heartbeat: Duration,
    last_sent: Instant,
    /// Fires at the earliest when a heartbeat may be due; pushed back only then, not at every event.
    /// Made when first polled: it belongs to the runtime that the stream runs on.
    timer: Option<Pin<Box<Sleep>>>,
    /// `None` on an open server.
    access: Option<Access>,
    _place: Option<Box<StreamPlace>>,
}

impl EventStream {
    /// The next bytes to send; `None` at the end. Framed, they are a chunk of an HTTP/1.1 body.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>, is_framed: bool) -> Poll<Option<Bytes>> {
        let content = std::task::ready!(self.poll_content(cx));
        self.last_sent = Instant::now();
        if let Some(Content::Frames(frames)) = &content {
            self.sample_lag(frames);
        }
        let include_vector = self.include_vector;
        Poll::Ready(content.map(|content| match content {
            // Most often one event: the very bytes that all streams share.
            Content::Frames(frames) if frames.len() == 1 && is_framed => frames[0].sse_chunk(include_vector).clone(),
            Content::Frames(frames) if frames.len() == 1 => frames[0].sse_bytes(include_vector),
            Content::Frames(frames) => {
                let parts = || frames.iter().map(|frame| frame.sse(include_vector));
                join(parts().map(<[u8]>::len).sum(), parts(), is_framed)
            }
            Content::Text(text) if is_framed => join(text.len(), std::iter::once(&text[..]), true),
            Content::Text(text) => text,
        }))
    }

    /// Notes how old an event is when it goes out: of one in [`LAG_SAMPLED_OF`], because looking at each would cost as much as
    /// sending it, and of level streams only, because history is old by nature.
    fn sample_lag(&self, frames: &[Arc<Frame>]) {
        let delivered = self.engine.feed().stats.delivered.load(Ordering::Relaxed);
        if delivered % LAG_SAMPLED_OF >= frames.len() as u64 || self.subscription.is_behind() {
            return;
        }
        let age_ms = self.engine.now_ms().saturating_sub(frames[0].ts_ms());
        self.engine.metrics().delivery_lag_seconds.observe(age_ms as f64 / 1000.0);
    }

    /// Notes that the reader took some of what was sent.
    pub fn note_taken(&self) {
        if let Phase::Snapshot(walk) = &self.phase {
            walk.note_taken();
        }
    }

    fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Option<Content>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Content::Text(first)));
        }
        if self.access.as_ref().is_some_and(Access::is_over) && !matches!(self.phase, Phase::Ended) {
            return Poll::Ready(Some(Content::Text(self.farewell())));
        }
        match std::mem::replace(&mut self.phase, Phase::Ended) {
            Phase::Ended => return Poll::Ready(None),
            Phase::Snapshot(mut walk) => {
                if walk.poll_place(cx).is_pending() {
                    self.phase = Phase::Snapshot(walk);
                    if self.subscription.poll_draining(cx) {
                        return Poll::Ready(Some(Content::Text(self.farewell())));
                    }
                    return self.poll_silence(cx);
                }
                if let Some(bytes) = self.snapshot_step(walk) {
                    return Poll::Ready(bytes.map(Content::Text));
                }
                // Nothing matched so far: give way, then go on.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Phase::Live => self.phase = Phase::Live,
        }
        match self.subscription.poll_step(cx, CHUNK_FRAMES, CHUNK_BYTES) {
            Poll::Ready(Step::Frames(frames)) => Poll::Ready(Some(Content::Frames(frames))),
            Poll::Ready(Step::Reset(reason, requested)) => {
                let mut out = String::new();
                if let Some(walks) = &self.walks {
                    let walk = Walk::new(&self.engine, self.subscription.filter().clone(), walks);
                    push_reset(&mut out, &self.engine, reason, requested, None);
                    self.phase = Phase::Snapshot(Box::new(walk));
                } else {
                    push_reset(&mut out, &self.engine, reason, requested, Some(self.subscription.reached()));
                }
                self.engine.feed().stats.resets.fetch_add(1, Ordering::Relaxed);
                Poll::Ready(Some(Content::Text(out.into())))
            }
            Poll::Ready(Step::Drained) => Poll::Ready(Some(Content::Text(self.farewell()))),
            Poll::Pending => self.poll_silence(cx),
        }
    }

    /// There is nothing to say: waits until its time is over, or a heartbeat due.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<Option<Content>> {
        // Whoever revoked the key before the waker was known has woken nobody.
        if self.access.as_ref().is_some_and(Access::is_over) {
            return Poll::Ready(Some(Content::Text(self.farewell())));
        }
        self.poll_heartbeat(cx).map(|bytes| Some(Content::Text(bytes)))
    }

    /// The next rows, or the end of the snapshot; `None` when there is nothing to send yet.
    fn snapshot_step(&mut self, mut walk: Box<Walk>) -> Option<Option<Bytes>> {
        if self.engine.feed().is_draining() {
            return Some(Some(self.farewell()));
        }
        let mut out = String::new();
        match walk.step(&self.engine, &mut out) {
            // Cut it: without an id the client starts over.
            Err(()) => return Some(None),
            Ok(Some(revision)) => {
                push_fmt(
                    &mut out,
                    format_args!(
                        "event: snapshot_end\nid: {revision}\ndata: {{\"revision\":{revision},\"count\":{}}}\n\n",
                        walk.count
                    ),
                );
                self.subscription.move_to(revision);
                self.phase = Phase::Live;
            }
            Ok(None) => self.phase = Phase::Snapshot(walk),
        }
        (!out.is_empty()).then(|| Some(out.into()))
    }

    fn poll_heartbeat(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        let heartbeat = self.heartbeat;
        let ends_at = self.access.as_ref().and_then(|access| access.ends_at);
        let no_later = |due: Instant| ends_at.map_or(due, |at| due.min(at));
        let set = || Box::pin(tokio::time::sleep_until(no_later(Instant::now() + heartbeat)));
        let timer = self.timer.get_or_insert_with(set);
        while timer.as_mut().poll(cx).is_ready() {
            if ends_at.is_some_and(|at| Instant::now() >= at) {
                return Poll::Ready(self.farewell());
            }
            let due = self.last_sent + heartbeat;
            if Instant::now() >= due {
                timer.as_mut().reset(no_later(Instant::now() + heartbeat));
                // A stream that waits for its snapshot is at no place it could resume from.
                if matches!(self.phase, Phase::Snapshot(_)) {
                    return Poll::Ready(Bytes::from_static(b":\n\n"));
                }
                return Poll::Ready(format!("id: {}\n\n", self.subscription.reached()).into());
            }
            timer.as_mut().reset(no_later(due));
        }
        Poll::Pending
    }

    fn farewell(&mut self) -> Bytes {
        self.phase = Phase::Ended;
        format!("retry: {}\n\n", RETRY_MS / 2 + spread_ms()).into()
    }
}

impl http_body::Body for EventStream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Self::Error>>> {
        self.poll_chunk(cx, false).map(|bytes| bytes.map(|b| Ok(BodyFrame::data(b))))
    }
}

/// `GET /v1/events` with `Accept: application/json`: a page of history, or a long poll.
async fn history(
    app: &App,
    params: &Params,
    filter: EventFilter,
    resume: Option<Resume>,
    include_vector: bool,
    access: Option<&Access>,
) -> ApiResult {
    if params.flag("snapshot")? || params.one("heartbeat_ms")?.is_some() {
        return Err(invalid("snapshot and heartbeat_ms go with Accept: text/event-stream"));
    }
    let limit = usize::try_from(params.number_in("limit", 1..=1000, 100)?).unwrap_or(1000);
    let wait = Duration::from_millis(params.number_in("wait_ms", 0..=60_000, 0)?);
    let feed = app.engine.feed();
    let after = resume.map_or_else(|| feed.head(), |r| r.after);
    let compacted = || Rejection::RevisionCompacted { oldest: feed.oldest(), head: feed.head() };
    match resume.and_then(|r| r.check(&app.engine)) {
        Some(ResetReason::Future) => return Err(invalid(format!("since is newer than the head, {}", feed.head()))),
        Some(ResetReason::Compacted) => return Err(compacted().into()),
        Some(ResetReason::Lost) => {
            return Err(Rejection::RevisionLost { oldest: feed.oldest(), head: feed.head() }.into());
        }
        None => {}
    }
    let mut subscription = feed.subscribe(filter, after);
    subscription.look_at_everything();
    let deadline = Instant::now() + wait;
    let deadline = access.and_then(|access| access.ends_at).map_or(deadline, |at| deadline.min(at));
    let mut room = None;
    let mut out = String::from("{\"events\":[");
    let mut count = 0;
    while count < limit && out.len() < HISTORY_BYTES_MAX {
        let waits = count == 0 && Instant::now() < deadline;
        let until = if waits {
            deadline.min(Instant::now() + RECHECK_EVERY)
        } else {
            Instant::now() + if wait.is_zero() { CATCH_UP_PATIENCE } else { LATE_PATIENCE }
        };
        let step = next_of_page(&mut subscription, limit - count, waits, access);
        let step = tokio::time::timeout_at(until, step).await;
        if access.is_some_and(Access::is_over) {
            return Err(ApiError::Unauthorized("the key or token has ended meanwhile"));
        }
        match step {
            Ok(Some(Step::Frames(frames))) => {
                subscription.look_at_everything();
                for frame in frames.iter().filter(|f| f.is_logged()) {
                    if count > 0 {
                        out.push(',');
                    }
                    out.push_str(frame.json(include_vector));
                    count += 1;
                }
                app.answers.grow(&mut room, out.len())?;
            }
            // What came before goes out first; who asks for what comes next is told.
            Ok(Some(Step::Reset(_, reached))) if count > 0 => {
                subscription.move_to(reached);
                break;
            }
            Ok(Some(Step::Reset(ResetReason::Compacted, _))) => return Err(compacted().into()),
            // The log is damaged there; the server's log says where.
            Ok(Some(Step::Reset(..))) => return Err(ApiError::Internal),
            // It is told of matches alone, and here sees what did not match; or its time is over, and it may still be reading the log.
            Err(_) if waits => subscription.look_at_everything(),
            Ok(Some(Step::Drained) | None) | Err(_) => break,
        }
    }
    push_fmt(
        &mut out,
        format_args!(
            "],\"next_since\":{},\"head\":{},\"oldest\":{}}}",
            subscription.reached(),
            feed.head(),
            feed.oldest()
        ),
    );
    Ok(json(StatusCode::OK, out))
}

/// What comes next on a page: nothing at the head, unless it `waits` there, nor once the one who asked may no longer read.
async fn next_of_page(
    subscription: &mut Subscription,
    frames_max: usize,
    waits: bool,
    access: Option<&Access>,
) -> Option<Step> {
    std::future::poll_fn(|cx| match subscription.poll_step(cx, frames_max, CHUNK_BYTES) {
        _ if access.is_some_and(Access::is_over) => Poll::Ready(None),
        Poll::Pending if subscription.is_catching_up() => Poll::Pending,
        Poll::Pending if waits => {
            // As a stream does: what does not match moves it on, however much that is.
            subscription.look_at_matches();
            Poll::Pending
        }
        Poll::Pending => Poll::Ready(None),
        Poll::Ready(step) => Poll::Ready(Some(step)),
    })
    .await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PublishBody<'a> {
    #[serde(rename = "type")]
    event_type: String,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    key: Option<String>,
    meta: Option<Object<MetaBody>>,
    #[serde(default)]
    ephemeral: bool,
}

/// `POST /v1/events`
pub async fn publish(State(app): State<App>, head: Head, body: Payload) -> ApiResult {
    Params::parse(&head.uri, &[])?;
    let bytes = read_json(&head.headers, body, app.max_body_bytes).await?;
    let body: PublishBody<'_> = parse_object(&bytes)?;
    let event_type = EventType::new(&body.event_type)?;
    let key = body.key.as_deref().map(Key::new).transpose()?;
    let data = body.data.map(|d| compact(d.get()));
    let labels = body.meta.map_or(Ok(None), |meta| meta.0.labels())?;
    let revision = if body.ephemeral {
        match &key {
            Some(key) => head.need_key(Right::Write, key.as_str())?,
            None => head.need_everything(Right::Write)?,
        }
        if head.retry(&bytes)?.is_some() {
            return Err(invalid("an ephemeral event is not in the log, so it takes no Idempotency-Key"));
        }
        app.engine.feed().publish_ephemeral(Ephemeral {
            ts_ms: app.engine.now_ms(),
            event_type: event_type.as_str().into(),
            key: key.map(|k| k.as_str().into()),
            collection: None,
            labels,
            members: format!("\"data\":{}", data.as_deref().unwrap_or("null")),
            on_request: false,
        })
    } else {
        let op = Op::Event { event_type, key, data: data.map(Into::into), labels };
        app.commit(&head, &bytes, Command::one(op)).await?.last_revision
    };
    Ok(json(StatusCode::CREATED, format!("{{\"revision\":{revision}}}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_rfc_3339() {
        for (text, ms) in [
            ("1970-01-01T00:00:01Z", Some(1000)),
            ("1970-01-01t00:00:00.5z", Some(500)),
            ("1970-01-01T00:00:00.1234567891Z", Some(123)),
            ("1970-01-01T02:00:00+02:00", Some(0)),
            ("1970-01-01T00:00:00 00:30", Some(0)),
            ("1969-12-31T23:00:00-02:00", Some(3_600_000)),
            ("0001-01-01T00:00:00Z", Some(0)),
            ("9999-12-31T23:59:59Z", u64::try_from(Timestamp::MAX.as_millisecond()).ok()),
            ("2020-01-01T00:00Z", None),
            ("20200101T000000Z", None),
            ("2020-01-01", None),
            ("2020-01-01T00:00:00", None),
            ("2020-01-01T00:00:00,5Z", None),
            ("2020-01-01T00:00:00.Z", None),
            ("2020-01-01T00:00:00+25:00", None),
            ("2020-01-01T00:00:00+0200", None),
            ("2020-01-01T00:00:00+02:00:30", None),
            ("2020-01-01T00:00:00Z[UTC]", None),
            ("+002020-01-01T00:00:00Z", None),
            ("2020-13-01T00:00:00Z", None),
            ("9999-12-32T00:00:00Z", None),
            ("2020-01-01T25:00:00Z", None),
            ("é020-01-01T00:00:00Zé", None),
        ] {
            assert_eq!(time_ms(text), ms, "{text}");
        }
    }
}
