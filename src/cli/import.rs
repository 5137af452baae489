//! `import`: rows in batches, several under way, with a note of how far all is acknowledged.
//!
//! ```text
//! a thread reads rows, makes requests ─▶ bounded queue ─▶ N connections ─▶ Done: the longest acknowledged beginning
//! ```
//! Putting a row twice changes nothing but revisions, so what was under way when it broke is simply sent again.

use super::backup::{bytes_bar, is_stream};
use super::output::Output;
use super::rows::{Format, Naming, Row, Rows};
use super::{Interrupted, ServerFlags, get, path, post, usage};
use crate::client::{CannotConnect, Client, Refused, Target};
use crate::engine::json::JSON;
use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use hyper::Method;
use indicatif::ProgressBar;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// A batch is sent when it has so many bytes, whatever its rows: well below the server's limit for a body.
const BATCH_BYTES: usize = 8 << 20;
/// Rows a batch may have: what the server takes.
const BATCH_ROWS_MAX: u64 = 1000;
/// How a batch begins.
const NO_OPS: &str = "{\"ops\":[";
/// How often the note of progress is written.
const NOTE_EVERY: Duration = Duration::from_millis(200);
/// Tries of one batch before the import gives up, and the wait after the first; it doubles.
const TRIES: u32 = 8;
const RETRY: Duration = Duration::from_millis(250);

/// Flags of `kiss-vdb import`.
#[derive(Args, Debug)]
#[command(
    after_help = "Reads what export writes: lines of keys, collections and vectors. .npy (f32, f16, u8) and .fvecs hold vectors alone: they need \
--collection, and get running ids. A collection that is not there is made by its line, or by --metric. \
Rows of one key or id are not kept in order: with repeats use --in-flight 1.

FILE.import notes the rows that are acknowledged. After a failure the same command with --resume goes on from there; what \
was under way is sent again, which changes nothing but revisions. From stdin: --skip ROWS, which the failure names.

Examples:
  kiss-vdb import everything.ndjson
  kiss-vdb import base.npy --collection docs --metric cosine --ids doc-
  zstd -dc big.ndjson.zst | kiss-vdb import - --in-flight 8"
)]
pub struct ImportArgs {
    /// The file; - reads stdin
    file: PathBuf,
    /// How it is written; without, by its name
    #[arg(long, value_enum)]
    format: Option<FormatFlag>,
    /// Where vectors go that name no collection
    #[arg(long, value_parser = super::collection)]
    collection: Option<String>,
    /// cosine, dot or l2: makes a collection that is not there
    #[arg(long)]
    metric: Option<String>,
    /// Numbers in a vector of such a collection; without, those of its first vector
    #[arg(long, requires = "metric")]
    dim: Option<usize>,
    /// What running ids begin with: doc- gives doc-0, doc-1, …
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    ids: String,
    /// Number of the first running id
    #[arg(long, value_name = "N", default_value_t = 0)]
    first_id: u64,
    /// Rows in a batch
    #[arg(long, value_name = "ROWS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=BATCH_ROWS_MAX))]
    batch: u64,
    /// Batches under way at a time, each on its own connection
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    in_flight: u8,
    /// Go on where FILE.import says
    #[arg(long, conflicts_with = "skip")]
    resume: bool,
    /// Pass over so many rows
    #[arg(long, value_name = "ROWS", default_value_t = 0)]
    skip: u64,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatFlag {
    Ndjson,
    Npy,
    Fvecs,
}

/// Rows that are gathered for one request.
struct Batch {
    /// Rows before it.
    first: u64,
    rows: u64,
    body: String,
    /// Bytes of the file read up to its end.
    bytes: u64,
}

/// Rows on their way.
struct Request {
    first: u64,
    rows: u64,
    bytes: u64,
    method: Method,
    target: String,
    content_type: String,
    body: Bytes,
}

/// How far everything is acknowledged.
struct Done {
    rows: u64,
    bytes: u64,
    /// Acknowledged ahead of the rest: first row, then rows and bytes.
    ahead: BTreeMap<u64, (u64, u64)>,
    note: Option<Note>,
    noted: Instant,
    /// Whoever runs it was told that the server does not answer.
    has_told: bool,
}

/// `FILE.import`: rows acknowledged, and the length of the file they are of.
struct Note {
    path: PathBuf,
    length: u64,
}

impl Note {
    fn of(file: &Path) -> anyhow::Result<Self> {
        let length = file.metadata().with_context(|| format!("cannot read {}", file.display()))?.len();
        let mut path = file.as_os_str().to_owned();
        path.push(".import");
        Ok(Self { path: path.into(), length })
    }

    fn read(&self) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(&self.path)
            .with_context(|| format!("there is nothing to go on from: cannot read {}", self.path.display()))?;
        let note: serde_json::Value = serde_json::from_str(&text).context("the note of progress is damaged")?;
        ensure!(note["bytes"] == self.length, "the file has changed since {} was written", self.path.display());
        note["rows"].as_u64().context("the note of progress is damaged")
    }

    /// Renamed into place, so that a crash leaves the one before.
    fn write(&self, rows: u64) -> std::io::Result<()> {
        let beside = self.path.with_extension("import.part");
        std::fs::write(&beside, format!("{{\"rows\":{rows},\"bytes\":{}}}\n", self.length))?;
        std::fs::rename(beside, &self.path)
    }
}

impl Done {
    fn add(&mut self, first: u64, rows: u64, bytes: u64) -> std::io::Result<()> {
        self.ahead.insert(first, (rows, bytes));
        while let Some((rows, bytes)) = self.ahead.remove(&self.rows) {
            self.rows += rows;
            self.bytes = bytes;
        }
        if self.noted.elapsed() >= NOTE_EVERY {
            self.noted = Instant::now();
            self.write_note()?;
        }
        Ok(())
    }

    fn write_note(&self) -> std::io::Result<()> {
        self.note.as_ref().map_or(Ok(()), |note| note.write(self.rows))
    }
}

/// `kiss-vdb import`
pub async fn import(args: ImportArgs) -> anyhow::Result<()> {
    let is_stdin = is_stream(&args.file);
    let note = if is_stdin { None } else { Some(Note::of(&args.file)?) };
    let skip = match (&note, args.resume) {
        (Some(note), true) => note.read()?,
        (None, true) => return Err(usage("stdin cannot be resumed: --skip ROWS passes over what was acknowledged")),
        (_, false) => args.skip,
    };
    let target = args.server.target()?;
    let bar = bytes_bar(note.as_ref().map(|note| note.length), "acknowledged");
    let done = Done { rows: skip, bytes: 0, ahead: BTreeMap::new(), note, noted: Instant::now(), has_told: false };
    let guard = Guard {
        done: Arc::new(Mutex::new(done)),
        skip,
        is_stdin,
        stop: Arc::default(),
        has_succeeded: false,
        bar: bar.clone(),
    };
    let (done, stop) = (Arc::clone(&guard.done), Arc::clone(&guard.stop));
    let started = Instant::now();
    let (send, requests) = mpsc::channel(usize::from(args.in_flight));
    let requests = Arc::new(tokio::sync::Mutex::new(requests));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..args.in_flight {
        let (requests, done, client) = (Arc::clone(&requests), Arc::clone(&done), Client::new(&target));
        tasks.spawn(send_requests(client, requests, done, bar.clone()));
    }
    drop(requests);
    let json = args.server.json;
    tasks.spawn_blocking(move || read_rows(&args, skip, &target, &send, &done, &stop));
    // After a failure what is under way still counts: the note must not send again what the server has.
    let mut failure = None;
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended.map_err(anyhow::Error::from).and_then(|result| result) {
            guard.stop.store(true, Ordering::Relaxed);
            failure.get_or_insert(error);
        }
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let rows = guard.succeed()?;
    show(rows - skip, started.elapsed(), json)
}

fn show(rows: u64, took: Duration, json: bool) -> anyhow::Result<()> {
    let mut out = Output::new();
    let took_ms = super::millis(took);
    if json {
        out.line(&format!("{{\"rows\":{rows},\"took_ms\":{took_ms}}}"))?;
    } else {
        // The cast: a rate for people.
        let rate = rows as f64 / took.as_secs_f64();
        out.line(&format!("{rows} rows in {:.1} s, {rate:.0} a second", took.as_secs_f64()))?;
    }
    Ok(out.flush()?)
}

/// Leaves the note of progress behind, however the import ends, and tells how to go on.
struct Guard {
    done: Arc<Mutex<Done>>,
    /// Rows passed over.
    skip: u64,
    is_stdin: bool,
    /// Tells the reader to end.
    stop: Arc<AtomicBool>,
    has_succeeded: bool,
    bar: ProgressBar,
}

impl Guard {
    /// All is acknowledged: the note goes.
    fn succeed(mut self) -> anyhow::Result<u64> {
        let mut done = self.done.lock();
        if let Some(note) = done.note.take()
            && note.path.exists()
        {
            std::fs::remove_file(&note.path).with_context(|| format!("cannot remove {}", note.path.display()))?;
        }
        let rows = done.rows;
        drop(done);
        self.has_succeeded = true;
        Ok(rows)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        self.stop.store(true, Ordering::Relaxed);
        if self.has_succeeded {
            return;
        }
        let done = self.done.lock();
        if done.rows == self.skip {
            // Nothing was acknowledged: what is noted, if anything, holds.
            return;
        }
        let how = if self.is_stdin { format!("--skip {}", done.rows) } else { "--resume".to_owned() };
        match done.write_note() {
            Ok(()) => eprintln!("kiss-vdb: {} rows are acknowledged; {how} goes on from there", done.rows),
            Err(error) => eprintln!("kiss-vdb: {} rows are acknowledged; --skip {0} goes on ({error})", done.rows),
        }
    }
}

/// A connection's work.
async fn send_requests(
    mut client: Client,
    requests: Arc<tokio::sync::Mutex<mpsc::Receiver<Request>>>,
    done: Arc<Mutex<Done>>,
    bar: ProgressBar,
) -> anyhow::Result<()> {
    loop {
        let request = requests.lock().await.recv().await;
        let Some(Request { first, rows, bytes, method, target, content_type, body }) = request else { return Ok(()) };
        let headers = [("content-type", &*content_type)];
        let mut tries = 0;
        loop {
            tries += 1;
            let sent = client.send(method.clone(), &target, &headers, body.clone()).await;
            let result = sent.and_then(|answer| Ok(answer.accepted()?));
            match result {
                Ok(_) => break,
                Err(error) if tries < TRIES && is_passing(&error) => {
                    if !std::mem::replace(&mut done.lock().has_told, true) {
                        bar.suspend(|| eprintln!("kiss-vdb: {error:#}; trying again for half a minute"));
                    }
                    tokio::time::sleep(RETRY * (1 << (tries - 1))).await;
                }
                Err(error) => return Err(error.context(format!("rows {} to {}", first + 1, first + rows))),
            }
        }
        let mut done = done.lock();
        done.add(first, rows, bytes)?;
        bar.set_position(done.bytes);
    }
}

/// Whether sending it again may help: it changes nothing if it was written already.
fn is_passing(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| match cause.downcast_ref::<Refused>() {
        Some(Refused(answer)) => matches!(answer.status.as_u16(), 429 | 503),
        None => cause.is::<CannotConnect>() || cause.is::<hyper::Error>(),
    })
}

/// Reads the file, on a thread of its own.
fn read_rows(
    args: &ImportArgs,
    skip: u64,
    target: &Target,
    send: &mpsc::Sender<Request>,
    done: &Mutex<Done>,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let name = args.file.to_string_lossy();
    let format = match args.format {
        Some(FormatFlag::Ndjson) => Format::Ndjson,
        Some(FormatFlag::Npy) => Format::Npy,
        Some(FormatFlag::Fvecs) => Format::Fvecs,
        None if name.ends_with(".npy") => Format::Npy,
        None if name.ends_with(".fvecs") => Format::Fvecs,
        None => Format::Ndjson,
    };
    let file: Box<dyn BufRead> = if name == "-" {
        Box::new(BufReader::with_capacity(1 << 20, std::io::stdin()))
    } else {
        let file = File::open(&args.file).with_context(|| format!("cannot read {name}"))?;
        Box::new(BufReader::with_capacity(1 << 20, file))
    };
    let naming = Naming { collection: args.collection.clone(), ids: args.ids.clone(), first_id: args.first_id };
    let called = if name == "-" { "stdin".to_owned() } else { name.into_owned() };
    let mut rows = Rows::open(file, format, naming).with_context(|| called.clone())?;
    let mut maker = Maker {
        args,
        client: Client::new(target),
        runtime: Handle::current(),
        send,
        done,
        known: HashSet::new(),
        batch: None,
    };
    while rows.read < skip {
        ensure!(rows.skip()?, "the file has {} rows, {skip} were to be passed over", rows.read);
    }
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, super::millis);
        let first = rows.read;
        let Some(row) = rows.next(now_ms).with_context(|| called.clone())? else { break };
        if !maker.take(row, first, rows.bytes)? {
            return Ok(());
        }
    }
    maker.flush()?;
    Ok(())
}

/// Makes batches of rows.
struct Maker<'a> {
    args: &'a ImportArgs,
    client: Client,
    runtime: Handle,
    send: &'a mpsc::Sender<Request>,
    done: &'a Mutex<Done>,
    /// Collections that exist.
    known: HashSet<String>,
    batch: Option<Batch>,
}

impl Maker<'_> {
    /// False when nobody sends any more: they have the reason.
    fn take(&mut self, row: Row, first: u64, bytes: u64) -> anyhow::Result<bool> {
        let op = match row {
            Row::Collection { name, dim, metric } => {
                self.create(&name, dim, &metric)?;
                None
            }
            Row::Expired => None,
            Row::Key(op) => Some(op),
            Row::Large { target, content_type, body } => {
                let (method, body) = (Method::PUT, body.into());
                let request = Request { first, rows: 1, bytes, method, target, content_type, body };
                return Ok(self.flush()? && self.send.blocking_send(request).is_ok());
            }
            Row::Vector { collection, dim, op } => {
                if !self.known.contains(&collection) {
                    self.make_sure_of(&collection, dim)?;
                }
                Some(op)
            }
        };
        let more_bytes = op.as_ref().map_or(0, String::len);
        let fits = |batch: &Batch| batch.rows < self.args.batch && batch.body.len() + more_bytes < BATCH_BYTES;
        if !self.batch.as_ref().is_some_and(fits) && !self.flush()? {
            return Ok(false);
        }
        let batch = self.batch.get_or_insert_with(|| Batch { first, rows: 0, body: NO_OPS.to_owned(), bytes });
        if let Some(op) = op {
            if batch.body.len() > NO_OPS.len() {
                batch.body.push(',');
            }
            batch.body.push_str(&op);
        }
        batch.rows += 1;
        batch.bytes = bytes;
        Ok(true)
    }

    fn flush(&mut self) -> anyhow::Result<bool> {
        let Some(mut batch) = self.batch.take() else { return Ok(true) };
        if batch.body.len() == NO_OPS.len() {
            self.done.lock().add(batch.first, batch.rows, batch.bytes)?;
            return Ok(true);
        }
        batch.body.push_str("]}");
        let Batch { first, rows, body, bytes } = batch;
        let (method, target, content_type) = (Method::POST, "/v1/batch".to_owned(), JSON.to_owned());
        let request = Request { first, rows, bytes, method, target, content_type, body: body.into() };
        Ok(self.send.blocking_send(request).is_ok())
    }

    fn create(&mut self, name: &str, dim: usize, metric: &str) -> anyhow::Result<()> {
        let body = serde_json::json!({ "dim": dim, "metric": metric }).to_string();
        self.runtime.block_on(post(&mut self.client, &path("/v1/vector/", name), body))?;
        self.known.insert(name.to_owned());
        Ok(())
    }

    /// A collection that a vector goes to without a line that makes it.
    fn make_sure_of(&mut self, name: &str, dim: Option<usize>) -> anyhow::Result<()> {
        match self.runtime.block_on(get(&mut self.client, &path("/v1/vector/", name))) {
            Ok(_) => {
                self.known.insert(name.to_owned());
                Ok(())
            }
            Err(error) if error.downcast_ref::<Refused>().is_some_and(|r| r.0.status.as_u16() == 404) => {
                let (Some(metric), Some(dim)) = (&self.args.metric, self.args.dim.or(dim)) else {
                    return Err(error.context(format!("collection {name:?}")));
                };
                self.create(name, dim, metric)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Noting rows beyond one that is not acknowledged would lose it on a resume.
    #[test]
    fn only_the_beginning_that_is_acknowledged_counts() {
        let mut done =
            Done { rows: 0, bytes: 0, ahead: BTreeMap::new(), note: None, noted: Instant::now(), has_told: false };
        for (first, rows, expected) in [(100, 100, 0), (300, 1, 0), (0, 100, 200), (200, 100, 301)] {
            done.add(first, rows, first + rows).unwrap();
            assert_eq!(done.rows, expected);
        }
        assert_eq!(done.bytes, 301);
    }
}
