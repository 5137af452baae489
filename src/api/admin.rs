//! Health, metrics, snapshots and backups on request.

use super::App;
use super::answer::json;
use super::error::{ApiError, ApiResult};
use super::extract::{Head, Params, accepted};
use crate::engine::frame::push_fmt;
use crate::engine::snapshot::Pace;
use crate::error::{Error, Rejection};
use crate::keys::Right;
use crate::logging::dropped_lines;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::Frame;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// `GET /v1/health`
pub async fn health(State(app): State<App>, uri: Uri) -> ApiResult {
    Params::parse(&uri, &[])?;
    let (status, word) = if app.engine.is_poisoned() {
        (StatusCode::SERVICE_UNAVAILABLE, "poisoned")
    } else if app.engine.feed().is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining")
    } else {
        (StatusCode::OK, "ok")
    };
    let mut out = String::new();
    push_fmt(
        &mut out,
        format_args!(
            "{{\"status\":\"{word}\",\"version\":\"{}\",\"revision\":{},\"oldest\":{},\"uptime_s\":{},\"durability\":\"{}\"}}",
            crate::VERSION,
            app.engine.head(),
            app.engine.feed().oldest(),
            app.started.elapsed().as_secs(),
            app.durability
        ),
    );
    Ok(json(status, out))
}

/// `POST /v1/admin/snapshot`
pub async fn snapshot(State(app): State<App>, uri: Uri) -> ApiResult {
    Params::parse(&uri, &[])?;
    // Others wait here, and not on threads that are needed otherwise.
    let place = Arc::clone(&app.snapshots).acquire_owned().await.map_err(|_| ApiError::Internal)?;
    let engine = app.engine.clone();
    let take = move || {
        let _place = place;
        engine.snapshot(Pace::Gentle)
    };
    let taken = tokio::task::spawn_blocking(take).await.map_err(|_| ApiError::Internal)?;
    let taken = taken.map_err(|error| {
        tracing::error!(%error, "the snapshot failed");
        match error {
            Error::Poisoned => Rejection::Poisoned.into(),
            error if error.is_storage_full() => {
                Rejection::StorageFull("the disk has no room for a snapshot; free some space and try again".into())
                    .into()
            }
            _ => ApiError::Internal,
        }
    })?;
    let body = format!("{{\"revision\":{},\"bytes\":{},\"took_ms\":{}}}", taken.revision, taken.bytes, taken.took_ms);
    Ok(json(StatusCode::OK, body))
}

/// Pieces of a backup that wait to be sent, and what is in one: a block is as large as a value may be.
const BACKUP_PIECES: usize = 4;
const BACKUP_PIECE_BYTES: usize = 256 << 10;
/// A reader of a backup that takes no piece for so long is cut: the log is held for it.
const BACKUP_STALL: Duration = Duration::from_secs(60);

/// `GET /v1/admin/backup`
pub async fn backup(State(app): State<App>, method: Method, uri: Uri) -> ApiResult {
    Params::parse(&uri, &[])?;
    // Nobody knows its length before.
    let body = if method == Method::HEAD { BackupBody(mpsc::channel(1).1) } else { begin_backup(app)? };
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment; filename=\"kiss-vdb.backup\""));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response.into())
}

/// Has a thread take a backup, unless one is being taken.
fn begin_backup(app: App) -> Result<BackupBody, Rejection> {
    let permit = Arc::clone(&app.backups).try_acquire_owned();
    let permit = permit.map_err(|_| Rejection::Overloaded("a backup is being taken; retry when it is done"))?;
    let (send, blocks) = mpsc::channel(BACKUP_PIECES);
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let started = Instant::now();
        let send = |piece| runtime.block_on(send.send_timeout(piece, BACKUP_STALL)).is_ok();
        let send_block = |block: Vec<u8>| {
            let mut block = Bytes::from(block);
            while !block.is_empty() {
                if !send(Some(block.split_to(block.len().min(BACKUP_PIECE_BYTES)))) {
                    return false;
                }
            }
            true
        };
        match app.engine.backup(send_block) {
            Ok(Some(taken)) if send(None) => tracing::info!(
                revision = taken.revision.0,
                keys = taken.keys,
                vectors = taken.vectors,
                took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                "backup"
            ),
            Ok(_) => tracing::warn!("a backup was cut short: its reader went away or stalled, or the server stops"),
            Err(error) => tracing::error!(%error, "the backup failed"),
        }
    });
    Ok(BackupBody(blocks))
}

/// What the thread that takes a backup has ready: blocks, and behind the last `None`. Without that the answer is cut short, so
/// that nobody takes it for a whole one.
#[derive(Debug)]
struct BackupBody(mpsc::Receiver<Option<Bytes>>);

impl http_body::Body for BackupBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(context).map(|piece| match piece {
            Some(block) => block.map(|block| Ok(Frame::data(block))),
            None => Some(Err(io::Error::other("the backup was given up"))),
        })
    }
}

/// Values read off the engine at the moment they are asked for.
#[derive(Debug)]
struct Gauges(App);

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let engine = &self.0.engine;
        let (keys, keys_with_ttl) = engine.key_counts();
        let (key_bytes, vector_bytes) = engine.memory_bytes();
        let collections = engine.collections();
        let vectors: usize = collections.iter().map(|(_, c)| c.read(|c| c.len())).sum();
        let pending: usize = collections.iter().map(|(_, c)| c.read(|c| c.graph_counts().tail)).sum();
        let stats = &engine.feed().stats;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: f64| -> std::fmt::Result {
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
        };
        let bytes = Some(&Unit::Bytes);
        #[expect(clippy::cast_precision_loss, reason = "gauges are f64 by definition")]
        {
            gauge("kiss_revision", "Newest revision applied", None, engine.head().0 as f64)?;
            gauge("kiss_durable_revision", "Newest revision on disk", None, engine.durable().0 as f64)?;
            gauge("kiss_oldest_revision", "Oldest revision in the log", None, engine.feed().oldest().0 as f64)?;
            gauge("kiss_keys", "Keys", None, keys as f64)?;
            gauge("kiss_keys_with_ttl", "Keys with a deadline", None, keys_with_ttl as f64)?;
            gauge("kiss_key_memory", "Approximate memory of keys", bytes, key_bytes as f64)?;
            gauge("kiss_vector_memory", "Approximate memory of vectors", bytes, vector_bytes as f64)?;
            let answers = engine.answer_bytes() as f64;
            gauge("kiss_answer_memory", "Approximate memory of answers remembered for retries", bytes, answers)?;
            gauge("kiss_collections", "Collections", None, collections.len() as f64)?;
            gauge("kiss_vectors", "Vectors in all collections", None, vectors as f64)?;
            gauge("kiss_vectors_pending", "Vectors not linked yet, which searches scan", None, pending as f64)?;
            gauge("kiss_log", "Disk taken by log segments", bytes, engine.log().bytes() as f64)?;
            gauge("kiss_streams", "Open event streams", None, load(&stats.streams) as f64)?;
            gauge("kiss_streams_behind", "Of these, those that read the log", None, load(&stats.behind) as f64)?;
            let walks = super::WALKS_MAX - self.0.walks.available_permits();
            gauge("kiss_streams_in_snapshot", "Of these, those that walk a snapshot", None, walks as f64)?;
            gauge("kiss_connections", "Open connections", None, load(&self.0.connections) as f64)?;
            gauge(
                "kiss_poisoned",
                "1 after a failed write: restart the server",
                None,
                f64::from(u8::from(engine.is_poisoned())),
            )?;
            let is_full = f64::from(u8::from(engine.is_storage_full()));
            gauge("kiss_storage_full", "1 while the disk has no room for writes", None, is_full)?;
            gauge("kiss_uptime_seconds", "Seconds since the start", None, self.0.started.elapsed().as_secs_f64())?;
            gauge("process_resident_memory", "Resident memory", bytes, resident_bytes() as f64)?;
        }
        let mut counter = |name: &str, help: &str, value: u64| -> std::fmt::Result {
            let metric = ConstCounter::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        counter("kiss_log_lines_dropped", "Lines of the log dropped, as stderr took them too slowly", dropped_lines())?;
        counter("kiss_stream_events", "Events handed to streams", load(&stats.delivered))?;
        counter("kiss_stream_ring_misses", "Times a stream had to read the log", load(&stats.ring_misses))?;
        counter("kiss_stream_resets", "Streams told that their position cannot be honoured", load(&stats.resets))
    }
}

/// Resident memory as the kernel counts it; 0 where it does not say.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// `GET /v1/metrics`
pub async fn metrics(State(app): State<App>, head: Head) -> ApiResult {
    Params::parse(&head.uri, &[])?;
    head.need_everything(Right::Read)?;
    let mut registry = Registry::default();
    app.engine.metrics().register(&mut registry);
    registry.register_collector(Box::new(Gauges(app)));
    let mut out = String::new();
    prometheus_client::encoding::text::encode(&mut out, &registry).map_err(|_| ApiError::Internal)?;
    // Prometheus asks for it; whoever does not may know the older format alone.
    if accepted(&head.headers, "application/openmetrics-text").is_some() {
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        return Ok(([(header::CONTENT_TYPE, content_type)], out).into_response().into());
    }
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], as_plain_text(&out)).into_response().into())
}

/// Prometheus' own format, from OpenMetrics: a counter is called as its samples are, and there are no units and no end.
fn as_plain_text(metrics: &str) -> String {
    let mut out = String::with_capacity(metrics.len());
    let mut lines = metrics.lines().peekable();
    let counter = |line: &str| Some(line.strip_prefix("# TYPE ")?.strip_suffix(" counter")?.to_owned());
    while let Some(line) = lines.next() {
        let described = line.strip_prefix("# HELP ").and_then(|_| lines.peek()).and_then(|next| counter(next));
        if let Some(name) = counter(line) {
            push_fmt(&mut out, format_args!("# TYPE {name}_total counter\n"));
        } else if let Some(name) = described {
            push_fmt(&mut out, format_args!("# HELP {name}_total {}\n", &line["# HELP ".len() + name.len() + 1..]));
        } else if !line.starts_with("# UNIT ") && line != "# EOF" {
            push_fmt(&mut out, format_args!("{line}\n"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn counters_are_called_as_their_samples_in_plain_text() {
        let metrics = "# HELP a Things done.\n# TYPE a counter\na_total 3\n# HELP b_bytes Size.\n# TYPE b_bytes gauge\n\
                       # UNIT b_bytes bytes\nb_bytes 1\n# EOF\n";
        let plain = "# HELP a_total Things done.\n# TYPE a_total counter\na_total 3\n# HELP b_bytes Size.\n# TYPE b_bytes gauge\n\
                     b_bytes 1\n";
        assert_eq!(super::as_plain_text(metrics), plain);
    }
}
