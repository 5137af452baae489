//! `kiss-vdb bench`: what a server does on this machine, measured from the outside over HTTP.
//!
//! A run starts a server of its own in a temporary directory (or takes any `--url`), goes through the phases one after
//! another, prints a table or JSON, and fails when a request failed or a stream lost an event.
//!
//! - The server is another process, so that the figures include everything a client pays and nothing else.
//! - Absolute figures of shared machines mean little. `--bare` runs the same load against a handler that does nothing,
//!   right before and after, and prints the ratio; `fsync` prints what the disk takes for a durable append.
//! - Open loop (`--rate`) counts from when a request was due, so a stall is not hidden by the client waiting for it.
//! - Answers are checked: status, recall against the ground truth, every event of every stream.
//!
//! Data flow: [`BenchArgs`] → one function for each phase → [`load`] or [`streams`] → a [`load::Tally`] → a [`Row`].
//! There is deliberately no scripting and no mix of request kinds: one phase measures one thing.

mod beside;
mod dataset;
mod index;
mod load;
mod restart;
mod sends;
mod server;
mod streams;

pub use server::run_bare;

use crate::client::{Client, Target};
use anyhow::{Context, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, ValueEnum};
use dataset::{Case, Dataset, count_found};
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use load::{CheckAnswer, Endpoint, Load, MakeRequest, Tally, expect_success};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use server::Server;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use streams::StreamLoad;

/// A progress bar's length.
const PROGRESS_STEPS: u64 = 1000;
/// Operations in one batch when keys are laid out before a phase; the contract's limit.
const PREFILL_OPS: u64 = 1000;
/// Keys of one page in the list phase: the contract's default.
const LIST_LIMIT: u64 = 100;
/// The collection that is measured; replaced at each run.
const COLLECTION: &str = "kiss-vdb-bench";
/// Made-up vectors, where no data set says how many.
const MADE_UP_VECTORS: usize = 10_000;
/// Queries over made-up vectors.
const MADE_UP_QUERIES: usize = 1000;
/// An index that has not caught up by then is reported as it is.
const INDEX_TIMEOUT: Duration = Duration::from_secs(600);
/// The sync probe needs no more than this.
const FSYNC_SECONDS_MAX: f64 = 2.0;
/// Bytes in a mebibyte.
const MIB: f64 = (1 << 20) as f64;
/// What a second of processor time of the thread that sends is enough for; for streams beside what it is for bare sends.
const PER_CPU_SECOND: &str = "per_cpu_second";

/// One thing that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Phase {
    /// The disk's own sync: append 200 bytes, fdatasync
    Fsync,
    /// PUT of a small value
    Put,
    /// GET of it
    Get,
    /// PATCH of one field
    Patch,
    /// POST /v1/batch of puts
    Batch,
    /// GET of a page of 100 keys
    List,
    /// Vectors in
    Upsert,
    /// Nearest neighbours out
    Search,
    /// What one thread can send to so many sockets, the yardstick for streams; only when asked for
    Sends,
    /// SSE delivery
    Streams,
    /// All streams reconnect at once with an old Last-Event-ID while writers write; only when asked for
    Storm,
    /// Writers beside one snapshot after the other; only when asked for
    Snapshots,
    /// Starts: with nothing, after kill -9, after a stop; and what keys weigh; only when asked for
    Restart,
    /// The vector index in this process, without a server; only when asked for
    Index,
    /// The same under ten turnovers of all vectors, beside a fresh one; only when asked for
    Churn,
}

/// Flags of `kiss-vdb bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Measure this server (key from API_KEY) instead of one started for the run
    #[arg(long)]
    url: Option<String>,
    /// Phases to run, in this order [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<Phase>,
    /// Connections
    #[arg(long, visible_alias = "clients", default_value_t = 64)]
    connections: usize,
    /// Generator threads
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Open loop: requests a second, timed from when they were due [default: closed loop]
    #[arg(long)]
    rate: Option<f64>,
    /// Length of a phase
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Requests of a phase, instead of seconds
    #[arg(long)]
    requests: Option<u64>,
    /// Bytes of a value
    #[arg(long, default_value_t = 100)]
    value_size: usize,
    /// Number of keys
    #[arg(long, default_value_t = 10_000)]
    keys: u64,
    /// Operations of a batch and vectors of an upsert request
    #[arg(long, default_value_t = 100)]
    batch: usize,
    /// Folder with dataset.json and its files [default: made-up vectors]
    #[arg(long, value_name = "DIR")]
    dataset: Option<PathBuf>,
    /// Dimension of made-up vectors
    #[arg(long, default_value_t = 384)]
    dim: usize,
    /// Number of vectors [default: the whole data set; 10000 made-up ones]
    #[arg(short, long)]
    n: Option<usize>,
    /// Neighbours asked for
    #[arg(short, long, default_value_t = 10)]
    k: usize,
    /// Search effort; several = a search phase for each
    #[arg(long, value_delimiter = ',')]
    ef: Vec<u32>,
    /// Ask for exact search
    #[arg(long)]
    exact: bool,
    /// Filters of the data set by name, `none` = unfiltered; several = a search phase for each
    #[arg(long, value_delimiter = ',')]
    filter: Vec<String>,
    /// Send vectors as vector_base64
    #[arg(long)]
    base64: bool,
    /// Open streams
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// Events published a second
    #[arg(long, default_value_t = 100.0)]
    events_per_second: f64,
    /// Connections that publish in turn; one waits for each answer, so more keep the schedule when answers are slow
    #[arg(long, default_value_t = 8)]
    publishers: u64,
    /// Each stream watches its own key, and the events go round
    #[arg(long)]
    own_keys: bool,
    /// Further streams on the same key whose readers never read
    #[arg(long, default_value_t = 0)]
    stuck: usize,
    /// Events that each stream of a storm has missed
    #[arg(long, default_value_t = 2200)]
    missed: u64,
    /// Whose streams are at --url
    #[arg(long, default_value = "kiss")]
    peer: streams::Peer,
    /// Run put, get, patch, batch and list against a handler that does nothing, too, and print the ratio
    #[arg(long)]
    bare: bool,
    /// Server on core 0, generator on core 1
    #[arg(long)]
    pin: bool,
    /// Durability of the server that is started: always, interval or never
    // The same name as the server's own flag, which this replaces here; so is `worker_threads`.
    #[arg(long)]
    fsync: Option<String>,
    /// Threads of the server that is started
    #[arg(long)]
    worker_threads: Option<String>,
    /// Where the temporary data directory is made [default: the system's]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// After `--`: more flags for the server that is started
    #[arg(last = true)]
    serve_flags: Vec<String>,
}

impl BenchArgs {
    fn phases(&self) -> Vec<Phase> {
        let asked = if self.only.is_empty() { Phase::value_variants() } else { &self.only };
        asked.iter().copied().filter(|phase| !self.only.is_empty() || phase.is_usual()).collect()
    }

    fn load_dataset(&self) -> anyhow::Result<Dataset> {
        match &self.dataset {
            Some(dir) => Dataset::load(dir, self.n),
            None => Dataset::made_up(self.n.unwrap_or(MADE_UP_VECTORS), MADE_UP_QUERIES, self.dim),
        }
    }
}

impl Phase {
    /// Runs also when nobody asks for it.
    fn is_usual(self) -> bool {
        !matches!(self, Self::Sends | Self::Storm | Self::Snapshots | Self::Restart | Self::Index | Self::Churn)
    }

    /// Needs no server.
    fn is_in_process(&self) -> bool {
        matches!(self, Self::Index | Self::Churn)
    }
}

/// Flags of `kiss-vdb bench-bare`.
#[derive(Args, Clone, Debug)]
pub struct BareArgs {
    /// Threads; 0 = one for each core
    #[arg(long)]
    worker_threads: Option<String>,
}

/// One line of the report.
#[derive(Debug)]
struct Row {
    name: String,
    tally: Tally,
    /// Things done by one request: operations, vectors.
    units_per_request: f64,
    /// Further figures, by name.
    more: Vec<(&'static str, Value)>,
}

impl Row {
    fn new(name: impl Into<String>, tally: Tally) -> Self {
        Self { name: name.into(), tally, units_per_request: 1.0, more: Vec::new() }
    }

    fn to_json(&self) -> Value {
        let tally = &self.tally;
        let mut row = json!({
            "phase": self.name,
            "requests": tally.latency.len(),
            "errors": tally.errors,
            "unsent": tally.unsent,
            "seconds": tally.elapsed.as_secs_f64(),
            "per_second": tally.rate(),
            "units_per_second": tally.rate() * self.units_per_request,
            "p50_us": tally.micros(0.5),
            "p95_us": tally.micros(0.95),
            "p99_us": tally.micros(0.99),
            "max_us": tally.micros(1.0),
        });
        if let (Some(error), Some(row)) = (&tally.first_error, row.as_object_mut()) {
            row.insert("first_error".to_owned(), json!(error));
        }
        for (name, value) in &self.more {
            row[name] = value.clone();
        }
        row
    }

    fn to_text(&self) -> String {
        let tally = &self.tally;
        let [p50, p95, p99, max] = [0.5, 0.95, 0.99, 1.0].map(|q| time(tally.micros(q)));
        let rate = count(tally.rate() * self.units_per_request);
        let mut line =
            format!("{:<18} {:>10} {rate:>10} {p50:>9} {p95:>9} {p99:>9} {max:>9}  ", self.name, tally.latency.len());
        if self.units_per_request != 1.0 {
            write!(line, "{} requests · ", count(tally.rate())).expect("a String takes every text");
        }
        for (name, value) in &self.more {
            write!(line, "{name} {value} · ").expect("a String takes every text");
        }
        if tally.errors > 0 {
            write!(line, "{} FAILED · ", tally.errors).expect("a String takes every text");
        }
        if tally.unsent > 0 {
            write!(line, "{} never sent · ", tally.unsent).expect("a String takes every text");
        }
        line.trim_end_matches([' ', '·']).to_owned()
    }
}

fn time(micros: f64) -> String {
    match micros {
        ..1e3 => format!("{micros:.0} µs"),
        ..1e6 => format!("{:.2} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

fn count(rate: f64) -> String {
    if rate < 10_000.0 { format!("{rate:.0}/s") } else { format!("{:.1} k/s", rate / 1000.0) }
}

/// Rounded for people, and short in JSON.
fn rounded(value: f64, digits: i32) -> Value {
    let scale = 10_f64.powi(digits);
    json!((value * scale).round() / scale)
}

/// Hidden by itself when stderr is not a terminal.
fn progress_bar(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:<18} {bar:40} {msg}");
    let bar = ProgressBar::new(PROGRESS_STEPS).with_prefix(name.to_owned());
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Runs the phases and prints the report; an error when a request failed or an event went missing.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    crate::api::serve::raise_file_limit();
    for phase in &args.only {
        match phase {
            Phase::Index => index::run(&args.load_dataset()?, args)?,
            Phase::Churn => index::churn(&args.load_dataset()?, args)?,
            _ => {}
        }
    }
    if args.phases().iter().all(Phase::is_in_process) {
        return Ok(());
    }
    let mut bench = Bench::start(args)?;
    let outcome = bench.run_phases();
    // What was measured before a failure is still worth having.
    if outcome.is_ok() || !bench.rows.is_empty() {
        bench.print(outcome.is_ok())?;
    }
    let faults = std::mem::take(&mut bench.faults);
    bench.stop()?;
    outcome?;
    ensure!(faults.is_empty(), "{}", faults.join("; "));
    Ok(())
}

/// A run: the server, and what was found so far.
struct Bench<'a> {
    args: &'a BenchArgs,
    dir: tempfile::TempDir,
    /// `None` = somebody else's, at `--url`.
    server: Option<Server>,
    bare: Option<Server>,
    endpoint: Endpoint,
    target: Target,
    /// Servers started; each has a data directory of its own.
    generation: u32,
    is_prefilled: bool,
    dataset: Option<Arc<Dataset>>,
    rows: Vec<Row>,
    ratios: Vec<(String, f64)>,
    faults: Vec<String>,
}

impl<'a> Bench<'a> {
    fn start(args: &'a BenchArgs) -> anyhow::Result<Self> {
        ensure!(args.batch > 0 && args.keys > 0 && args.k > 0 && args.dim > 0, "batch, keys, k and dim are at least 1");
        ensure!(args.seconds > 0.0 && args.events_per_second > 0.0, "seconds and events a second are more than 0");
        ensure!(args.rate.is_none_or(|rate| rate > 0.0), "the rate is more than 0");
        let place = args.dir.clone().unwrap_or_else(std::env::temp_dir);
        let dir = tempfile::Builder::new().prefix("kiss-vdb-bench-").tempdir_in(&place);
        let dir = dir.with_context(|| format!("cannot make a directory in {}", place.display()))?;
        let server = if args.url.is_none() { Some(start_server(args, &dir, 0)?) } else { None };
        let bare = if args.bare { Some(start_bare(args)?) } else { None };
        let url = args.url.as_deref().or(server.as_ref().map(|s| s.url.as_str())).unwrap_or_default();
        let (endpoint, target) = address(url)?;
        let (is_prefilled, dataset, rows, ratios, faults) = (false, None, Vec::new(), Vec::new(), Vec::new());
        Ok(Self {
            args,
            dir,
            server,
            bare,
            endpoint,
            target,
            generation: 0,
            is_prefilled,
            dataset,
            rows,
            ratios,
            faults,
        })
    }

    fn run_phases(&mut self) -> anyhow::Result<()> {
        for phase in self.args.phases() {
            match phase {
                Phase::Fsync => self.fsync()?,
                Phase::Put => self.put()?,
                Phase::Get => self.get()?,
                Phase::Patch => self.patch()?,
                Phase::Batch => self.batch()?,
                Phase::List => self.list()?,
                Phase::Upsert => self.upsert()?,
                Phase::Search => self.search()?,
                Phase::Sends => self.sends()?,
                Phase::Streams => self.streams()?,
                Phase::Storm => self.storm()?,
                Phase::Snapshots => self.snapshots()?,
                Phase::Restart => self.restart()?,
                Phase::Index | Phase::Churn => {}
            }
        }
        Ok(())
    }

    fn stop(self) -> anyhow::Result<()> {
        if let Some(bare) = self.bare {
            bare.stop()?;
        }
        if let Some(server) = self.server {
            server.stop()?;
        }
        self.dir.close().context("cannot remove the temporary data directory")
    }

    fn add(&mut self, row: Row) {
        if let Some(error) = &row.tally.first_error {
            self.faults.push(format!("{}: {} requests failed, the first with {error}", row.name, row.tally.errors));
        }
        self.rows.push(row);
    }

    fn load(&self, endpoint: &Endpoint, make: Box<MakeRequest>) -> Load {
        let seconds = self.args.requests.is_none().then_some(self.args.seconds);
        let BenchArgs { connections, threads, rate, requests, .. } = *self.args;
        let endpoint = endpoint.clone();
        Load { endpoint, connections, threads, rate, seconds, requests, make, check: Box::new(expect_success) }
    }

    /// Runs a load; where a bare server is there, also against that, half of it before and half after: whatever else
    /// the machine does meanwhile then falls on both. What was synced meanwhile is told for each request.
    fn compare(
        &mut self,
        name: &'static str,
        units_per_request: f64,
        make: impl Fn(&Endpoint) -> Box<MakeRequest>,
    ) -> anyhow::Result<()> {
        let bare = self.bare.as_ref().map(|bare| address(&bare.url)).transpose()?.map(|(endpoint, _)| endpoint);
        let half = |endpoint: &Endpoint| {
            let load = self.load(endpoint, make(endpoint));
            let requests = load.requests.map(|n| n.div_ceil(2));
            Load { seconds: load.seconds.map(|s| s / 2.0), requests, ..load }.run(&format!("{name} bare"))
        };
        let mut before = bare.as_ref().map(&half).transpose()?;
        let synced = self.syncs();
        let ours = self.load(&self.endpoint, make(&self.endpoint)).run(name)?;
        let synced = synced.zip(self.syncs()).map(|(before, after)| after - before).filter(|&syncs| syncs > 0.0);
        let after = bare.as_ref().map(&half).transpose()?;
        if let (Some(bare), Some(after)) = (&mut before, after) {
            bare.append(&after);
            self.ratios.push((format!("{name} / bare {name}"), ours.rate() / bare.rate()));
        }
        let per_request =
            synced.map(|syncs| ("syncs_per_request", rounded(syncs / ours.latency.len().max(1) as f64, 4)));
        self.add(Row { units_per_request, more: per_request.into_iter().collect(), ..Row::new(name, ours) });
        if let Some(bare) = before {
            self.add(Row { units_per_request, ..Row::new(format!("{name} bare"), bare) });
        }
        Ok(())
    }

    /// Syncs of the log so far, where the server at hand tells them.
    fn syncs(&self) -> Option<f64> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        let answer = runtime.block_on(Client::new(&self.target).call(Method::GET, "/v1/metrics", "")).ok()?;
        let metrics = std::str::from_utf8(&answer.body).ok()?;
        metrics.lines().find_map(|line| line.strip_prefix("kiss_fsync_duration_seconds_count "))?.parse().ok()
    }

    fn fsync(&mut self) -> anyhow::Result<()> {
        let tally = server::measure_fsync(self.dir.path(), self.args.seconds.min(FSYNC_SECONDS_MAX), self.args.pin)?;
        self.add(Row::new("fsync", tally));
        Ok(())
    }

    fn put(&mut self) -> anyhow::Result<()> {
        let (keys, bytes) = (self.args.keys, self.args.value_size);
        self.compare("put", 1.0, |endpoint| puts(endpoint.clone(), keys, bytes))
    }

    fn get(&mut self) -> anyhow::Result<()> {
        self.prefill()?;
        let keys = self.args.keys;
        self.compare("get", 1.0, |endpoint| {
            let endpoint = endpoint.clone();
            Box::new(move |sequence, out| {
                endpoint.request(out, "GET", &format!("/v1/state/{}", key(scatter(sequence, keys))), b"")
            })
        })
    }

    fn patch(&mut self) -> anyhow::Result<()> {
        let keys = self.args.keys;
        self.compare("patch", 1.0, |endpoint| {
            let endpoint = endpoint.clone();
            Box::new(move |sequence, out| {
                let path = format!("/v1/state/bench-doc:{:08}", scatter(sequence, keys));
                endpoint.request(out, "PATCH", &path, format!("{{\"progress\":{sequence}}}").as_bytes());
            })
        })
    }

    fn batch(&mut self) -> anyhow::Result<()> {
        let (keys, ops, size) = (self.args.keys, self.args.batch as u64, self.args.value_size);
        self.compare("batch", ops as f64, |endpoint| {
            let endpoint = endpoint.clone();
            Box::new(move |sequence, out| {
                let body = batch_body((0..ops).map(|i| (sequence * ops + i) % keys), size);
                endpoint.request(out, "POST", "/v1/batch", body.as_bytes());
            })
        })
    }

    fn list(&mut self) -> anyhow::Result<()> {
        self.prefill()?;
        let path = format!("/v1/state?prefix=bench:&limit={LIST_LIMIT}");
        self.compare("list", self.args.keys.min(LIST_LIMIT) as f64, |endpoint| {
            let (endpoint, path) = (endpoint.clone(), path.clone());
            Box::new(move |_, out| endpoint.request(out, "GET", &path, b""))
        })
    }

    /// Lays out every key, so that reads find them.
    fn prefill(&mut self) -> anyhow::Result<()> {
        if self.is_prefilled {
            return Ok(());
        }
        let starts = (0..self.args.keys).step_by(PREFILL_OPS as usize);
        let bodies =
            starts.map(|start| batch_body(start..self.args.keys.min(start + PREFILL_OPS), self.args.value_size));
        self.calls(bodies.map(|body| (Method::POST, "/v1/batch".to_owned(), body)))?;
        self.is_prefilled = true;
        Ok(())
    }

    /// Calls that are not measured; the answer to the last.
    fn calls(&self, calls: impl Iterator<Item = (Method, String, String)>) -> anyhow::Result<Value> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut client = Client::new(&self.target);
        let mut last = Value::Null;
        for (method, path, body) in calls {
            let answer = runtime.block_on(client.call(method.clone(), &path, body))?;
            last = answer.success().with_context(|| format!("{method} {path}"))?;
        }
        Ok(last)
    }

    fn dataset(&mut self) -> anyhow::Result<Arc<Dataset>> {
        if let Some(dataset) = &self.dataset {
            return Ok(Arc::clone(dataset));
        }
        let args = self.args;
        let dataset = args.load_dataset()?;
        let dataset = Arc::new(dataset);
        self.dataset = Some(Arc::clone(&dataset));
        Ok(dataset)
    }

    /// Every vector once. The requests are written beforehand: making JSON of floats costs as much as reading it.
    fn upsert(&mut self) -> anyhow::Result<()> {
        let dataset = self.dataset()?;
        self.create_collection(&dataset)?;
        let resident_before = self.resident_bytes()?;
        let (n, batch, base64) = (dataset.base.len(), self.args.batch, self.args.base64);
        let starts: Vec<usize> = (0..n).step_by(batch).collect();
        let prepare = |&start: &usize| {
            let mut request = Vec::new();
            let body = upsert_body(&dataset, start..n.min(start + batch), base64);
            self.endpoint.request(&mut request, "POST", &format!("/v1/vector/{COLLECTION}/upsert"), body.as_bytes());
            request
        };
        let requests: Vec<Vec<u8>> = starts.par_iter().map(prepare).collect();
        let count = requests.len() as u64;
        let load = self.load(&self.endpoint, prepared(requests));
        let connections = load.connections.min(starts.len());
        let tally = Load { seconds: None, requests: Some(count), connections, ..load }.run("upsert")?;
        let mut row =
            Row { units_per_request: n as f64 / count as f64, ..Row::new(format!("upsert of {batch}"), tally) };
        row.more.push(("vectors", json!(n)));
        row.more.extend(self.wait_for_index(n)?);
        if let (Some(before), Some(after)) = (resident_before, self.resident_bytes()?) {
            row.more.push(("resident_bytes_per_vector", rounded(after.saturating_sub(before) as f64 / n as f64, 0)));
        }
        self.add(row);
        Ok(())
    }

    fn create_collection(&self, dataset: &Dataset) -> anyhow::Result<()> {
        let path = format!("/v1/vector/{COLLECTION}");
        let spec = json!({ "dim": dataset.base.width, "metric": dataset.metric }).to_string();
        if self.calls([(Method::GET, path.clone(), String::new())].into_iter()).is_ok() {
            self.calls([(Method::DELETE, path.clone(), String::new())].into_iter())?;
        }
        self.calls([(Method::POST, path, spec)].into_iter())?;
        Ok(())
    }

    /// Waits until the index has taken every vector; how long that was after the last answer, and what it holds.
    fn wait_for_index(&self, n: usize) -> anyhow::Result<Vec<(&'static str, Value)>> {
        let begun = Instant::now();
        loop {
            let info = self.calls([(Method::GET, format!("/v1/vector/{COLLECTION}"), String::new())].into_iter())?;
            ensure!(info["count"] == json!(n), "the collection holds {} of {n} vectors", info["count"]);
            let pending = info["index"]["pending"].as_u64().unwrap_or(0);
            if pending == 0 || begun.elapsed() > INDEX_TIMEOUT {
                let bytes = info["memory_bytes"].as_f64().unwrap_or(0.0) / n as f64;
                return Ok(vec![
                    ("index", info["index"]["kind"].clone()),
                    ("indexed_after_s", rounded(begun.elapsed().as_secs_f64(), 1)),
                    ("memory_bytes_per_vector", rounded(bytes, 0)),
                ]);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn resident_bytes(&self) -> anyhow::Result<Option<u64>> {
        self.server.as_ref().map(Server::resident_bytes).transpose()
    }

    fn search(&mut self) -> anyhow::Result<()> {
        let dataset = self.dataset()?;
        let efs: Vec<Option<u32>> =
            if self.args.ef.is_empty() { vec![None] } else { self.args.ef.iter().copied().map(Some).collect() };
        for case in dataset.cases(&self.args.filter)? {
            for &ef in &efs {
                let row = self.search_case(&dataset, &case, ef)?;
                self.add(row);
            }
        }
        Ok(())
    }

    fn search_case(&self, dataset: &Dataset, case: &Case, ef: Option<u32>) -> anyhow::Result<Row> {
        let path = format!("/v1/vector/{COLLECTION}/search");
        let prepare = |index: usize| {
            let mut request = Vec::new();
            let body = search_body(dataset.queries.row(index), self.args, case.filter.as_ref(), ef);
            self.endpoint.request(&mut request, "POST", &path, body.as_bytes());
            request
        };
        let requests: Vec<Vec<u8>> = (0..dataset.queries.len()).into_par_iter().map(prepare).collect();
        let name = [("search", Some(case.name.clone()).filter(|n| n != "none")), (" ef", ef.map(|ef| ef.to_string()))];
        let name = name.into_iter().filter_map(|(label, value)| match (label, value) {
            ("search", None) => Some("search".to_owned()),
            (label, value) => Some(format!("{label} {}", value?)),
        });
        let name: String = name.collect();
        let recall = Arc::new(Recall::default());
        let load = self.load(&self.endpoint, prepared(requests));
        let check = check_search(Arc::clone(&recall), case.clone(), dataset.queries.len() as u64, self.args.k);
        let tally = Load { check, ..load }.run(&name)?;
        let mut row = Row::new(name, tally);
        if case.truth.is_some() {
            row.more.push(("recall", rounded(recall.share(), 4)));
        }
        row.more.push((
            "hits",
            rounded(recall.hits.load(Ordering::Relaxed) as f64 / row.tally.latency.len().max(1) as f64, 2),
        ));
        row.more.push((
            "server_us",
            rounded(recall.took_us.load(Ordering::Relaxed) as f64 / row.tally.latency.len().max(1) as f64, 0),
        ));
        Ok(row)
    }

    fn sends(&mut self) -> anyhow::Result<()> {
        let args = self.args;
        let (tally, per_second) = sends::measure(args.streams, args.events_per_second, args.seconds, args.pin)?;
        let mut row = Row::new(format!("{} sends", args.streams), tally);
        row.more.push((PER_CPU_SECOND, rounded(per_second, 0)));
        self.add(row);
        Ok(())
    }

    fn streams(&mut self) -> anyhow::Result<()> {
        self.refresh_server()?;
        let args = self.args;
        let load = StreamLoad {
            endpoint: self.endpoint.clone(),
            streams: args.streams,
            threads: args.threads,
            publishers: args.publishers,
            rate: args.events_per_second,
            events: (args.events_per_second * args.seconds).ceil() as u64,
            resume_after: None,
            stuck: args.stuck,
            peer: args.peer,
            value_bytes: args.value_size,
            own_keys: args.own_keys,
        };
        let before = self.resident_bytes()?;
        let mut opened = None;
        let cpu_seconds = || self.server.as_ref().map(|server| server.cpu_seconds("streams-")).transpose();
        let mut cpu_opened = None;
        let report = load.run(|| {
            opened = self.resident_bytes()?;
            cpu_opened = cpu_seconds()?;
            Ok(())
        })?;
        let (after, cpu_after) = (self.resident_bytes()?, cpu_seconds()?);
        let mut row = Row::new(format!("{} streams", args.streams), report.delivery);
        if let (Some(before), Some(after)) = (cpu_opened, cpu_after) {
            row.more.push((PER_CPU_SECOND, rounded(row.tally.latency.len() as f64 / (after - before), 0)));
        }
        if let (Some(before), Some(opened), Some(after)) = (before, opened, after) {
            let kib_each = |bytes: u64| rounded(bytes.saturating_sub(before) as f64 / args.streams as f64 / 1024.0, 1);
            row.more.push(("kib_per_stream_opened", kib_each(opened)));
            row.more.push(("kib_per_stream_after", kib_each(after)));
        }
        let faults = report.faults;
        for (name, faults) in [
            ("lost", faults.lost),
            ("out_of_order", faults.out_of_order),
            ("ids_not_increasing", faults.ids_not_increasing),
            ("resets", faults.resets),
            ("ended", faults.ended),
        ] {
            row.more.push((name, json!(faults)));
        }
        if !faults.is_none() {
            self.faults.push(format!("streams: {faults:?}"));
        }
        self.add(row);
        self.add(Row::new("publish", report.publish));
        Ok(())
    }

    /// A fresh server of our own, so that memory freed by earlier phases does not pass for a stream's.
    fn refresh_server(&mut self) -> anyhow::Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let Some(server) = self.server.take() else { return Ok(()) };
        server.stop()?;
        self.start_anew()?;
        Ok(())
    }

    /// Starts a server of our own with nothing; how long until its first answer.
    fn start_anew(&mut self) -> anyhow::Result<Duration> {
        self.generation += 1;
        self.is_prefilled = false;
        self.start_again()
    }

    /// The same, with what the last one left.
    fn start_again(&mut self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let server = start_server(self.args, &self.dir, self.generation)?;
        (self.endpoint, self.target) = address(&server.url)?;
        self.server = Some(server);
        self.health()?;
        Ok(begun.elapsed())
    }

    fn health(&self) -> anyhow::Result<Value> {
        self.calls([(Method::GET, "/v1/health".to_owned(), String::new())].into_iter())
    }

    fn print(&self, is_complete: bool) -> anyhow::Result<()> {
        let facts = self.facts();
        if self.args.json {
            let report = json!({
                "version": crate::VERSION,
                "cores": std::thread::available_parallelism().map_or(1, usize::from),
                "connections": self.args.connections,
                "rate": self.args.rate,
                "is_complete": is_complete,
                "phases": self.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
                "ratios": facts.iter().map(|(name, value)| (name.clone(), rounded(*value, 3))).collect::<serde_json::Map<_, _>>(),
                "faults": self.faults,
            });
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(());
        }
        let load = self.args.rate.map_or("closed loop".to_owned(), |rate| format!("open loop, {rate} requests/s"));
        println!("kiss-vdb {} · {} connections · {load}", crate::VERSION, self.args.connections);
        println!(
            "{:<18} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9}",
            "phase", "requests", "rate", "p50", "p95", "p99", "max"
        );
        for row in &self.rows {
            println!("{}", row.to_text());
        }
        for (name, value) in facts {
            println!("{name} = {value:.3}");
        }
        Ok(())
    }

    /// The comparisons that can be made of what was measured.
    fn facts(&self) -> Vec<(String, f64)> {
        let p50 = |name: &str| self.rows.iter().find(|row| row.name == name).map(|row| row.tally.micros(0.5));
        let mut facts = self.ratios.clone();
        let sent = |what: &str| {
            let row = self.rows.iter().find(|row| row.name == format!("{} {what}", self.args.streams))?;
            row.more.iter().find(|(name, _)| *name == PER_CPU_SECOND)?.1.as_f64()
        };
        if let (Some(streams), Some(sends)) = (sent("streams"), sent("sends")) {
            facts.push(("streams / sends, each a second of the sending thread".to_owned(), streams / sends));
        }
        // With more connections a PUT waits for others, and the comparison means nothing.
        if self.args.connections == 1
            && let (Some(put), Some(fsync)) = (p50("put"), p50("fsync"))
        {
            facts.push(("put p50 / fsync p50".to_owned(), put / fsync));
            let both = "put p50 / (fsync p50 + bare put p50)".to_owned();
            facts.extend(p50("put bare").map(|bare| (both, put / (fsync + bare))));
        }
        facts
    }
}

fn api_key() -> Option<String> {
    std::env::var("API_KEY").ok().filter(|key| !key.is_empty())
}

fn address(url: &str) -> anyhow::Result<(Endpoint, Target)> {
    Ok((Endpoint::new(url, api_key().as_deref())?, Target::new(url, api_key())?))
}

fn start_server(args: &BenchArgs, dir: &tempfile::TempDir, generation: u32) -> anyhow::Result<Server> {
    let data_dir = dir.path().join(format!("data-{generation}"));
    let mut flags = ["serve", "--port", "0", "--bind-addr", "127.0.0.1", "--data-dir"].map(str::to_owned).to_vec();
    flags.push(data_dir.to_str().context("the directory's name is not UTF-8")?.to_owned());
    for (name, value) in [("--fsync", &args.fsync), ("--worker-threads", &args.worker_threads)] {
        flags.extend(value.iter().flat_map(|value| [name.to_owned(), value.clone()]));
    }
    flags.extend(args.serve_flags.iter().cloned());
    Server::start(&flags, args.pin)
}

fn start_bare(args: &BenchArgs) -> anyhow::Result<Server> {
    let mut flags = vec!["bench-bare".to_owned()];
    flags.extend(args.worker_threads.iter().flat_map(|threads| ["--worker-threads".to_owned(), threads.clone()]));
    Server::start(&flags, args.pin)
}

fn key(index: u64) -> String {
    format!("bench:{index:08}")
}

/// Walks all keys in an order that is not theirs: a large odd prime steps through every remainder but its multiples'.
fn scatter(sequence: u64, keys: u64) -> u64 {
    sequence.wrapping_mul(2_654_435_761) % keys
}

/// PUTs of one key after the other.
fn puts(endpoint: Endpoint, keys: u64, value_bytes: usize) -> Box<MakeRequest> {
    let body = format!("{{\"value\":\"{}\"}}", "v".repeat(value_bytes)).into_bytes();
    Box::new(move |sequence, out| {
        endpoint.request(out, "PUT", &format!("/v1/state/{}", key(sequence % keys)), &body);
    })
}

fn batch_body(keys: impl Iterator<Item = u64>, value_bytes: usize) -> String {
    let value = "b".repeat(value_bytes);
    let ops = keys.map(|index| format!("{{\"op\":\"put\",\"key\":\"{}\",\"value\":\"{value}\"}}", key(index)));
    format!("{{\"ops\":[{}]}}", ops.collect::<Vec<_>>().join(","))
}

fn push_vector(out: &mut String, vector: &[f32], base64: bool) {
    if base64 {
        let bytes: Vec<u8> = vector.iter().flat_map(|v| v.to_le_bytes()).collect();
        write!(out, "\"vector_base64\":\"{}\"", STANDARD.encode(bytes)).expect("a String takes every text");
        return;
    }
    out.push_str("\"vector\":[");
    for (index, value) in vector.iter().enumerate() {
        write!(out, "{}{value}", if index == 0 { "" } else { "," }).expect("a String takes every text");
    }
    out.push(']');
}

fn upsert_body(dataset: &Dataset, rows: std::ops::Range<usize>, base64: bool) -> String {
    let mut out = String::from("{\"items\":[");
    for row in rows.clone() {
        let comma = if row == rows.start { "" } else { "," };
        write!(out, "{comma}{{\"id\":\"{row}\",").expect("a String takes every text");
        push_vector(&mut out, dataset.base.row(row), base64);
        if let Some(meta) = dataset.meta.get(row) {
            write!(out, ",\"meta\":{meta}").expect("a String takes every text");
        }
        out.push('}');
    }
    out.push_str("]}");
    out
}

fn search_body(query: &[f32], args: &BenchArgs, filter: Option<&Value>, ef: Option<u32>) -> String {
    let mut out = String::from("{");
    push_vector(&mut out, query, args.base64);
    write!(out, ",\"k\":{}", args.k).expect("a String takes every text");
    let exact = args.exact.then_some(Value::Bool(true));
    for (name, value) in [("filters", filter.cloned()), ("ef", ef.map(Value::from)), ("exact", exact)] {
        if let Some(value) = value {
            write!(out, ",\"{name}\":{value}").expect("a String takes every text");
        }
    }
    out.push('}');
    out
}

/// Sends these one after another, again and again.
fn prepared(requests: Vec<Vec<u8>>) -> Box<MakeRequest> {
    Box::new(move |sequence, out| {
        out.clear();
        out.extend_from_slice(&requests[(sequence % requests.len() as u64) as usize]);
    })
}

/// What the searches of a phase found, all together.
#[derive(Debug, Default)]
struct Recall {
    found: AtomicU64,
    of: AtomicU64,
    hits: AtomicU64,
    took_us: AtomicU64,
}

impl Recall {
    fn share(&self) -> f64 {
        self.found.load(Ordering::Relaxed) as f64 / self.of.load(Ordering::Relaxed).max(1) as f64
    }
}

#[derive(Deserialize)]
struct SearchAnswer<'a> {
    #[serde(borrow)]
    hits: Vec<SearchHit<'a>>,
    took_us: u64,
}

#[derive(Deserialize)]
struct SearchHit<'a> {
    id: &'a str,
}

fn check_search(recall: Arc<Recall>, case: Case, queries: u64, k: usize) -> Box<CheckAnswer> {
    Box::new(move |sequence, status, body| {
        expect_success(sequence, status, body)?;
        let answer: SearchAnswer<'_> =
            serde_json::from_slice(body).map_err(|error| format!("not a search's answer: {error}"))?;
        recall.hits.fetch_add(answer.hits.len() as u64, Ordering::Relaxed);
        recall.took_us.fetch_add(answer.took_us, Ordering::Relaxed);
        let Some(truth) = &case.truth else { return Ok(()) };
        let ids: Result<Vec<usize>, _> = answer.hits.iter().map(|hit| hit.id.parse()).collect();
        let ids = ids.map_err(|_| "a hit that was never put in".to_owned())?;
        let (found, of) = count_found(truth.row((sequence % queries) as usize), k, &ids);
        recall.found.fetch_add(found as u64, Ordering::Relaxed);
        recall.of.fetch_add(of as u64, Ordering::Relaxed);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: BenchArgs,
    }

    #[test]
    fn a_search_asks_for_what_the_flags_say() {
        let args = Cli::parse_from(["bench", "--exact", "--k", "3"]).args;
        let body = search_body(&[1.0, -0.5], &args, Some(&json!({"year": {"$eq": 2017}})), Some(64));
        let expected =
            json!({"vector": [1, -0.5], "k": 3, "filters": {"year": {"$eq": 2017}}, "ef": 64, "exact": true});
        let parsed: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(parsed, expected);
        let args = Cli::parse_from(["bench", "--base64"]).args;
        assert_eq!(search_body(&[1.0], &args, None, None), r#"{"vector_base64":"AACAPw==","k":10}"#);
    }

    #[test]
    fn the_recall_of_a_phase_is_over_all_its_answers() {
        let recall = Arc::new(Recall::default());
        let dataset = Dataset::made_up(4, 2, 3).unwrap();
        let case = dataset.cases(&[]).unwrap().remove(0);
        let check = check_search(Arc::clone(&recall), case, 2, 2);
        assert!(check(0, 200, br#"{"hits":[{"id":"1","score":1.0}],"took_us":5,"revision":1}"#).is_ok());
        assert!(check(1, 503, b"{}").is_err());
        assert_eq!((recall.hits.load(Ordering::Relaxed), recall.took_us.load(Ordering::Relaxed)), (1, 5));
    }

    #[test]
    fn every_key_is_read_sooner_or_later() {
        let mut seen: Vec<u64> = (0..1000).map(|sequence| scatter(sequence, 1000)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn an_upsert_carries_ids_vectors_and_meta() {
        let mut dataset = Dataset::made_up(2, 1, 1).unwrap();
        dataset.meta = vec!["{}".to_owned(), r#"{"a":1}"#.to_owned()];
        let body: Value = serde_json::from_str(&upsert_body(&dataset, 0..2, false)).unwrap();
        assert_eq!((&body["items"][1]["id"], &body["items"][1]["meta"]["a"]), (&json!("1"), &json!(1)));
        assert_eq!(body["items"][0]["vector"].as_array().unwrap().len(), 1);
    }
}
