//! `kiss-vdb demo`: what this database is for, told by a real server in a minute, with every claim checked.
//!
//! The story starts this very program as a server of its own (`serve`, a free port, a temporary directory) and talks
//! to it as any client would: HTTP and event streams, nothing from inside. What is printed after `←` and `«` came from
//! that server just now. A check mark stands only behind a condition that was tested; the first that does not hold
//! ends the demo with that condition and a failing exit status.
//!
//! - The server and its directory are gone on every way out, Ctrl-C included: [`Stage`] kills and removes on drop.
//! - The user's settings are kept away from that server, so the story is the same on every machine.
//! - `--fast` leaves out the pauses, not the checks.
//!
//! The sentences of act 4 and their embeddings (`demo/embed.py`) are compiled in: the demo needs no file and no network.

use crate::client::{Answer, Client, EventStream, ServerEvent, Target};
use crate::config::SETTINGS;
use crate::npy;
use anyhow::{Context, bail, ensure};
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::ChildStdout;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

/// Longest wait for one answer or one frame; a machine busy with other things is slow, not wrong.
const PATIENCE: Duration = Duration::from_secs(30);
/// Columns of a line: fits the usual terminal and a README.
const WIDTH: usize = 100;
/// Frames read ahead of the story; when full, the reader waits and the server feels it, as with any slow client.
const FRAMES_QUEUED: usize = 1024;
/// Numbers in one embedding of all-MiniLM-L6-v2.
const DIM: usize = 384;
/// Sentences sent in one request.
const ITEMS_PER_BATCH: usize = 50;
/// How far a score may be from the one computed here: f32 sums in another order differ by less.
const SCORE_TOLERANCE: f64 = 1e-5;
/// Rounds of delete, search, upsert, search.
const FRESHNESS_ROUNDS: usize = 25;
/// Orders written while nobody listens, and while the stream comes back.
const ORDERS_WHILE_AWAY: usize = 40;
const ORDERS_WHILE_RESUMING: usize = 10;
/// The server is killed once its stream has shown this many of the writes.
const EVENTS_BEFORE_KILL: usize = 500;
/// Clients that write keys when the server is killed; one more writes vectors.
const KEY_WRITERS: usize = 3;

/// The flags of `kiss-vdb demo`. It runs a server of its own: the settings of `serve` don't touch it.
#[derive(clap::Args, Debug)]
pub struct DemoArgs {
    /// Leave out the pauses
    #[arg(long)]
    fast: bool,
}

/// Runs the demo; an error is the first claim that did not hold.
pub fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let terminal = Terminal::new(args.fast);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut hangup = signal(SignalKind::hangup())?;
        let mut terminate = signal(SignalKind::terminate())?;
        // The story owns the server and the directory: dropping it here is what cleans up.
        tokio::select! {
            told = Story::tell(terminal) => told,
            _ = tokio::signal::ctrl_c() => bail!("interrupted; the demo's server is stopped and its directory removed"),
            _ = terminate.recv() => bail!("terminated; the demo's server is stopped and its directory removed"),
            _ = hangup.recv() => bail!("the terminal is gone; the demo's server is stopped and its directory removed"),
        }
    })
}

/// Where the story is printed.
#[derive(Clone, Copy)]
struct Terminal {
    colour: bool,
    fast: bool,
}

/// SGR parameters (ECMA-48), by what they stand for here.
mod ink {
    pub const HEADING: &str = "1;36";
    pub const REQUEST: &str = "1";
    pub const FRAME: &str = "33";
    pub const HELD: &str = "32";
    pub const QUIET: &str = "2";
    pub const PLAIN: &str = "";
}

impl Terminal {
    fn new(fast: bool) -> Self {
        // https://no-color.org: set and not empty means no colour.
        let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
        Self { colour: std::io::stdout().is_terminal() && !refused && !dumb, fast }
    }

    fn line(self, ink: &str, text: &str) {
        let mut out = std::io::stdout().lock();
        // A closed pipe (`| head`) ends the reading, not the checking: the exit status still tells.
        if self.colour && !ink.is_empty() {
            writeln!(out, "\x1b[{ink}m{text}\x1b[0m")
        } else {
            writeln!(out, "{text}")
        }
        .ok();
    }

    /// A line of at most [`WIDTH`] columns; what does not fit is cut, visibly.
    fn clipped(self, ink: &str, text: &str) {
        self.line(ink, &clip(text, WIDTH));
    }

    /// Lines of at most [`WIDTH`] columns; those after the first line up behind `first`.
    fn wrapped(self, ink: &str, first: &str, text: &str) {
        let indent = first.chars().count();
        for (n, line) in wrap(text, WIDTH - indent).iter().enumerate() {
            if n == 0 {
                self.line(ink, &format!("{first}{line}"));
            } else {
                self.line(ink, &format!("{:indent$}{line}", ""));
            }
        }
    }

    fn blank(self) {
        self.line(ink::PLAIN, "");
    }

    async fn pause(self, ms: u64) {
        if !self.fast {
            sleep(Duration::from_millis(ms)).await;
        }
    }
}

fn clip(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}

/// Breaks a text into lines of at most a width, behind a space or a comma where there is one in the latter half.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some((end, _)) = rest.char_indices().nth(width) {
        let at = rest[..end].rfind([' ', ',']).map(|at| at + 1).filter(|at| *at > end / 2).unwrap_or(end);
        lines.push(rest[..at].trim_end().to_owned());
        rest = &rest[at..];
    }
    lines.push(rest.to_owned());
    lines
}

fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

/// A child process, killed and reaped when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Either fails only if the child is gone, which is what is wanted.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Our own binary, serving.
struct Server {
    process: Process,
    target: Target,
    banner: String,
    /// From the start of the process to its banner: requests are accepted by then.
    ready_after: Duration,
    /// Held open, so that the server never writes into a closed pipe.
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    /// Starts a server on `dir/data` that logs to `dir/server.log`, and waits for its banner.
    async fn start(dir: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let log = std::fs::File::options().create(true).append(true).open(dir.join("server.log"))?;
        let mut command = Command::new(program);
        // The directory has no kiss-vdb.toml, and no setting is taken from the environment.
        command.current_dir(dir);
        for setting in SETTINGS {
            command.env_remove(setting.env);
        }
        command.args(["serve", "--port", "0", "--data-dir"]).arg(dir.join("data"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        // A group of its own: Ctrl-C in a terminal reaches the demo alone, which then stops its server itself.
        command.process_group(0);
        let started = Instant::now();
        let mut process = Process(command.spawn().context("cannot start the server")?);
        let stdout = process.0.stdout.take().context("the server has no stdout")?;
        let mut stdout = BufReader::new(ChildStdout::from_std(stdout)?);
        let mut banner = String::new();
        timeout(PATIENCE, stdout.read_line(&mut banner)).await.context("the server did not say that it is ready")??;
        let ready_after = started.elapsed();
        let url = banner.split_whitespace().find(|word| word.starts_with("http://"));
        let target = Target::new(url.context("the server ended before it was ready")?, None)?;
        Ok(Self { process, target, banner: banner.trim_end().to_owned(), ready_after, _stdout: stdout })
    }

    /// SIGKILL: no handler runs, nothing is flushed.
    fn kill(&mut self) -> anyhow::Result<ExitStatus> {
        self.process.0.kill().context("cannot kill the server")?;
        Ok(self.process.0.wait()?)
    }

    /// SIGTERM, and the time until the process was gone.
    async fn stop(&mut self) -> anyhow::Result<(ExitStatus, Duration)> {
        let began = Instant::now();
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.process.0),
            rustix::process::Signal::TERM,
        )?;
        while began.elapsed() < PATIENCE {
            if let Some(status) = self.process.0.try_wait()? {
                return Ok((status, began.elapsed()));
            }
            sleep(Duration::from_millis(2)).await;
        }
        bail!("the server was asked to stop (SIGTERM) and still runs after {PATIENCE:?}")
    }
}

/// What must be gone in the end. Fields are dropped in this order: the server before its directory.
struct Stage {
    server: Server,
    dir: TempDir,
}

/// A frame and when it arrived.
struct Arrival {
    frame: ServerEvent,
    at: Instant,
}

/// An open stream, read by a task of its own so that arrival times are true. Dropping it drops the connection.
struct Watch {
    frames: mpsc::Receiver<Arrival>,
    last_id: u64,
    _reader: JoinSet<()>,
}

impl Watch {
    /// Opens a stream and reads its first frame, which says where it stands: nothing after that id is missed.
    async fn open(target: &Target, query: &str, last_event_id: Option<u64>) -> anyhow::Result<Self> {
        let stream =
            timeout(PATIENCE, target.events(query, last_event_id)).await.context("the stream did not open")??;
        let (sender, frames) = mpsc::channel(FRAMES_QUEUED);
        let mut reader = JoinSet::new();
        reader.spawn(Self::read(stream, sender));
        let mut watch = Self { frames, last_id: 0, _reader: reader };
        let first = watch.next().await?.context("the stream ended at once")?;
        ensure!(first.frame.event.is_empty(), "the stream opened with {:?}, not with an id", first.frame);
        watch.last_id = first.frame.id.context("the stream's first frame has no id")?;
        Ok(watch)
    }

    async fn read(mut stream: EventStream, sender: mpsc::Sender<Arrival>) {
        // A stream that broke ends here as one that was closed: who needs the difference checks what arrived.
        while let Ok(Some(frame)) = stream.next_frame().await {
            if sender.send(Arrival { frame, at: Instant::now() }).await.is_err() {
                return;
            }
        }
    }

    async fn next(&mut self) -> anyhow::Result<Option<Arrival>> {
        let arrival = timeout(PATIENCE, self.frames.recv()).await;
        let arrival = arrival.with_context(|| format!("the stream was silent for {PATIENCE:?}"))?;
        if let Some(id) = arrival.as_ref().and_then(|a| a.frame.id) {
            self.last_id = id;
        }
        Ok(arrival)
    }

    /// The next event (heartbeats passed over); `None` when the stream ended. A `reset` is a gap, so an error.
    async fn event_or_end(&mut self) -> anyhow::Result<Option<(Value, Arrival)>> {
        loop {
            let Some(arrival) = self.next().await? else { return Ok(None) };
            ensure!(arrival.frame.event != "reset", "the stream lost its place: {}", arrival.frame.data);
            if !arrival.frame.event.is_empty() {
                return Ok(Some((arrival.frame.json()?, arrival)));
            }
        }
    }

    async fn event(&mut self) -> anyhow::Result<(Value, Arrival)> {
        self.event_or_end().await?.context("the stream ended")
    }
}

/// Sends a request; `Value::Null` means no body.
async fn send(client: &mut Client, method: &Method, path: &str, body: &Value) -> anyhow::Result<Answer> {
    let text = if body.is_null() { String::new() } else { body.to_string() };
    let answer = timeout(PATIENCE, client.call(method.clone(), path, text)).await;
    answer.with_context(|| format!("{method} {path} was not answered in {PATIENCE:?}"))?
}

fn revision(answer: &Value) -> anyhow::Result<u64> {
    answer["revision"].as_u64().with_context(|| format!("no revision in {answer}"))
}

/// One sentence of the library, or one query.
#[derive(Deserialize)]
struct Sentence {
    id: String,
    topic: String,
    text: String,
    #[serde(skip)]
    vector: Vec<f32>,
}

/// Sentences (NDJSON) and their embeddings (`.npy`, one row for each line).
fn sentences(ndjson: &str, mut npy: &[u8]) -> anyhow::Result<Vec<Sentence>> {
    let mut all: Vec<Sentence> = ndjson.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let header = npy::Header::read(&mut npy)?;
    ensure!(
        (header.rows, header.width) == (all.len(), DIM) && header.value_bytes() == Some(npy.len()),
        "the .npy file has another shape than the sentences, or is cut short"
    );
    let numbers = header.floats(npy)?;
    for (sentence, row) in all.iter_mut().zip(numbers.chunks_exact(DIM)) {
        sentence.vector = row.to_vec();
    }
    Ok(all)
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Checks hits against a plain scan done here: the same scores in the same order, and each its sentence's own.
fn check_hits(hits: &[Value], query: &[f32], among: &[&Sentence]) -> anyhow::Result<()> {
    let mut best: Vec<f64> = among.iter().map(|s| cosine(query, &s.vector)).collect();
    best.sort_by(|a, b| b.total_cmp(a));
    for (hit, best) in hits.iter().zip(best) {
        let score = hit["score"].as_f64().with_context(|| format!("no score in {hit}"))?;
        let sentence = among.iter().find(|s| hit["id"] == s.id.as_str());
        let own = cosine(query, &sentence.with_context(|| format!("{hit} should not be in this answer"))?.vector);
        let off = (score - best).abs().max((score - own).abs());
        ensure!(off < SCORE_TOLERANCE, "{hit} is off by {off}: a plain scan says {own}, and {best} for this place");
    }
    Ok(())
}

/// What one writer was told before the server died: name and revision of each write that was answered with success.
type Acknowledged = Vec<(String, u64)>;

/// Writes key after key until the server is gone; returns what was acknowledged.
async fn write_keys(target: Target, writer: usize) -> anyhow::Result<Acknowledged> {
    let mut client = Client::new(&target);
    let mut acknowledged = Vec::new();
    loop {
        let key = format!("ledger:{writer}:{:05}", acknowledged.len());
        let body = json!({"value": {"entry": key}});
        // The error is the crash this act is about: the write in flight has no answer and no promise.
        let Ok(answer) = send(&mut client, &Method::PUT, &format!("/v1/state/{key}"), &body).await else {
            return Ok(acknowledged);
        };
        acknowledged.push((key, revision(&answer.success()?)?));
    }
}

/// As [`write_keys`], with vectors into the collection `inbox`.
async fn write_vectors(target: Target, vectors: Vec<Vec<f32>>) -> anyhow::Result<Acknowledged> {
    let mut client = Client::new(&target);
    let mut acknowledged = Vec::new();
    for (n, vector) in vectors.iter().cycle().enumerate() {
        let id = format!("note-{n:05}");
        let body = json!({"id": id, "vector": vector});
        let Ok(answer) = send(&mut client, &Method::POST, "/v1/vector/inbox/add", &body).await else { break };
        acknowledged.push((id, revision(&answer.success()?)?));
    }
    Ok(acknowledged)
}

/// Writes orders and returns their revisions.
async fn write_orders(client: &mut Client, numbers: Range<usize>) -> anyhow::Result<Vec<u64>> {
    let mut revisions = Vec::new();
    for n in numbers {
        let body = json!({"value": {"order": n}});
        revisions
            .push(revision(&send(client, &Method::PUT, &format!("/v1/state/order:{n:03}"), &body).await?.success()?)?);
    }
    Ok(revisions)
}

/// The story so far.
struct Story {
    terminal: Terminal,
    stage: Stage,
    client: Client,
    /// Every claim that was checked, for the summary.
    held: Vec<String>,
    corpus: Vec<Sentence>,
    queries: Vec<Sentence>,
}

impl Story {
    async fn tell(terminal: Terminal) -> anyhow::Result<()> {
        let began = Instant::now();
        let corpus = sentences(include_str!("../demo/corpus.ndjson"), include_bytes!("../demo/corpus.f16.npy"))?;
        let queries = sentences(include_str!("../demo/queries.ndjson"), include_bytes!("../demo/queries.f16.npy"))?;
        let dir = tempfile::Builder::new().prefix("kiss-vdb-demo-").tempdir().context("cannot make a directory")?;
        let server = Server::start(dir.path()).await.inspect_err(|_| show_log(dir.path()))?;
        let client = Client::new(&server.target);
        let stage = Stage { server, dir };
        let mut story = Self { terminal, stage, client, held: Vec::new(), corpus, queries };
        // The log lies in the directory that goes with the story: shown now or never.
        story.acts().await.inspect_err(|_| show_log(story.stage.dir.path()))?;
        let Self { stage: Stage { server, dir }, held, .. } = story;
        drop(server);
        dir.close().context("cannot remove the demo's directory")?;
        summary(terminal, &held, began.elapsed());
        Ok(())
    }

    async fn acts(&mut self) -> anyhow::Result<()> {
        self.terminal.line(ink::HEADING, "KISS VDB: keys, events, streams and vectors in one log");
        self.say("A real server was started for this, on a free port and an empty directory. Its banner:");
        self.terminal.wrapped(ink::QUIET, "   ", &self.stage.server.banner);
        self.say("→ what this demo sends    ← what the server answers    « what its stream delivers    ✓ checked");
        self.terminal.pause(1500).await;
        self.watch_a_job().await.context("act 1 (a job and its watcher) does not hold")?;
        self.compare_and_set().await.context("act 2 (compare-and-set) does not hold")?;
        self.expire().await.context("act 3 (a key that expires) does not hold")?;
        self.search_library().await.context("act 4 (search by meaning) does not hold")?;
        self.drop_and_resume().await.context("act 5 (a stream resumed) does not hold")?;
        self.kill_and_restart().await.context("act 6 (killed and restarted) does not hold")
    }

    fn say(&self, text: &str) {
        self.terminal.line(ink::PLAIN, &format!("   {text}"));
    }

    /// Prints and keeps a claim. Call it only behind the checks it names.
    fn hold(&mut self, claim: String) {
        self.terminal.line(ink::HELD, &format!("   ✓ {claim}"));
        self.held.push(claim);
    }

    fn show_request(&self, who: &str, method: &Method, path: &str, body: &Value) {
        let body = if body.is_null() { String::new() } else { format!("  {body}") };
        self.terminal.clipped(ink::REQUEST, &format!("   → {who}{method} {path}{body}"));
    }

    fn show_answer(&self, who: &str, answer: &Answer) {
        let body = String::from_utf8_lossy(&answer.body);
        let head = format!("   ← {who}{}  ", answer.status.as_u16());
        // What a problem says is worth reading to its end; the rest is known from the request.
        if answer.status.is_success() {
            self.terminal.clipped(ink::PLAIN, &format!("{head}{body}"));
        } else {
            self.terminal.wrapped(ink::PLAIN, &head, &body);
        }
    }

    /// One frame on one line: those of its fields that this story is about, the name first.
    fn show_frame(&self, data: &Value, frame: &ServerEvent, note: &str) {
        let fields = ["key", "collection", "id", "value", "patch", "reason"];
        let shown =
            fields.iter().filter(|name| !data[**name].is_null()).map(|name| format!("\"{name}\":{}", data[*name]));
        let shown = shown.collect::<Vec<_>>().join(",");
        let id = frame.id.map(|id| id.to_string()).unwrap_or_default();
        let line = format!("   « id {id:<4} {}  {{{shown}}}", frame.event);
        let room = WIDTH.saturating_sub(note.chars().count() + 2);
        self.terminal.line(ink::FRAME, format!("{:<room$}  {note}", clip(&line, room)).trim_end());
    }

    /// A request, printed with its answer.
    async fn ask(&mut self, method: Method, path: &str, body: Value) -> anyhow::Result<Answer> {
        self.show_request("", &method, path, &body);
        let answer = send(&mut self.client, &method, path, &body).await?;
        self.show_answer("", &answer);
        Ok(answer)
    }

    /// A request that is not worth a line; must succeed.
    async fn quietly(&mut self, method: Method, path: &str, body: Value) -> anyhow::Result<Value> {
        send(&mut self.client, &method, path, &body).await?.success().with_context(|| format!("{method} {path}"))
    }

    async fn watch(&self, query: &str, last_event_id: Option<u64>) -> anyhow::Result<Watch> {
        let resume = last_event_id.map(|id| format!("   Last-Event-ID: {id}")).unwrap_or_default();
        self.terminal.line(ink::REQUEST, &format!("   → GET /v1/events{query}{resume}"));
        let watch = Watch::open(&self.stage.server.target, query, last_event_id).await?;
        self.terminal.line(ink::FRAME, &format!("   « id {:<4} (open: from here on nothing is missed)", watch.last_id));
        Ok(watch)
    }

    async fn watch_a_job(&mut self) -> anyhow::Result<()> {
        heading(self.terminal, "1 · A job reports its progress, a page watches");
        self.say("A browser opens a stream for one job (an EventSource is all it takes); a worker patches a key.");
        let mut watch = self.watch("?job_id=render-7", None).await?;
        self.terminal.pause(600).await;
        let body = json!({"value": {"progress": 0, "status": "queued"}, "meta": {"job_id": "render-7"}});
        let mut revision_before = revision(&self.ask(Method::PUT, "/v1/state/job:42", body).await?.success()?)?;
        let (data, arrival) = watch.event().await?;
        self.say("The stream's first event, as it came over the wire:");
        self.terminal.line(ink::FRAME, &format!("   « event: {}", arrival.frame.event));
        self.terminal.line(ink::FRAME, &format!("   « id: {}", watch.last_id));
        self.terminal.wrapped(ink::FRAME, "   « data: ", &arrival.frame.data);
        ensure!(watch.last_id == revision_before, "the event's id is not the write's revision {revision_before}");
        ensure!(data["prev_revision"] == 0 && data["key"] == "job:42", "not the event of the write: {data}");
        self.terminal.pause(1200).await;
        let other = json!({"value": 1, "meta": {"job_id": "render-8"}});
        self.quietly(Method::PUT, "/v1/state/job:43", other).await?;
        self.say("Meanwhile another job (render-8) was written: this stream must not show it.");
        let mut slowest = Duration::ZERO;
        for progress in [15, 40, 75, 100] {
            self.terminal.pause(700).await;
            let patch =
                if progress < 100 { json!({"progress": progress}) } else { json!({"progress": 100, "status": "done"}) };
            self.show_request("", &Method::PATCH, "/v1/state/job:42", &patch);
            let sent = Instant::now();
            let answer = send(&mut self.client, &Method::PATCH, "/v1/state/job:42", &patch).await?.success()?;
            let (data, arrival) = watch.event().await?;
            let took = arrival.at - sent;
            slowest = slowest.max(took);
            self.show_frame(&data, &arrival.frame, &format!("{} later", ms(took)));
            ensure!(data["patch"] == patch, "the stream shows another patch than was sent: {data}");
            ensure!(data["key"] == "job:42", "an event of another job: {data}");
            ensure!(data["prev_revision"] == revision_before, "not the next change of this key: {data}");
            revision_before = revision(&answer)?;
            ensure!(arrival.frame.id == Some(revision_before), "the event's id is not the write's revision");
        }
        self.terminal.pause(500).await;
        let answer = self.ask(Method::GET, "/v1/state/job:42", Value::Null).await?;
        let etag = answer.headers.get("etag").and_then(|v| v.to_str().ok()).map(str::to_owned);
        let entry = answer.success()?;
        ensure!(entry["value"] == json!({"progress": 100, "status": "done"}), "the patches did not add up: {entry}");
        self.hold(format!("each patch reached the watcher within {} of being sent", ms(slowest)));
        ensure!(revision(&entry)? == revision_before, "the key has another revision than its last event: {entry}");
        ensure!(etag == Some(format!("\"{revision_before}\"")), "the key's ETag {etag:?} is not {revision_before}");
        self.hold(format!(
            "one number everywhere: {revision_before} is the write's revision, the event's id and the key's ETag"
        ));
        Ok(())
    }

    async fn compare_and_set(&mut self) -> anyhow::Result<()> {
        heading(self.terminal, "2 · Two writers, the same seats: compare-and-set");
        let body = json!({"value": {"free": 5}});
        let base = revision(&self.ask(Method::PUT, "/v1/state/show:seats", body).await?.success()?)?;
        self.say(&format!(
            "Ana wants 3 seats, Ben wants 2. Both read revision {base}, both write, at the same moment."
        ));
        self.terminal.pause(900).await;
        let names = ["Ana", "Ben"];
        let wants = [3, 2];
        let bodies = wants.map(|n| json!({"value": {"free": 5 - n}, "if_revision": base}));
        for (name, body) in names.iter().zip(&bodies) {
            self.show_request(&format!("{name}: "), &Method::PUT, "/v1/state/show:seats", body);
        }
        let mut second = Client::new(&self.stage.server.target);
        let (ana, ben) = tokio::join!(
            send(&mut self.client, &Method::PUT, "/v1/state/show:seats", &bodies[0]),
            send(&mut second, &Method::PUT, "/v1/state/show:seats", &bodies[1]),
        );
        let answers = [ana?, ben?];
        for (name, answer) in names.iter().zip(&answers) {
            self.show_answer(&format!("{name}: "), answer);
        }
        let won: Vec<_> = (0..2).filter(|n| answers[*n].status.is_success()).collect();
        ensure!(won.len() == 1, "exactly one of two writers wins, here {}", won.len());
        let (winner, loser) = (won[0], 1 - won[0]);
        let (after, refusal) = (revision(&answers[winner].json()?)?, answers[loser].json()?);
        ensure!(answers[loser].status.as_u16() == 409, "the loser is told 409, not {}", answers[loser].status);
        ensure!(refusal["code"] == "revision_conflict", "another code than revision_conflict: {refusal}");
        ensure!(
            refusal["expected"] == base && refusal["actual"] == after,
            "expected {base}, actual {after}: {refusal}"
        );
        let name = names[loser];
        self.hold(format!("one won, one was told 409 with expected {base} and actual {after}"));
        self.terminal.pause(900).await;
        self.say(&format!("{name} reads again and retries with what is true now:"));
        let entry = self.ask(Method::GET, "/v1/state/show:seats", Value::Null).await?.success()?;
        let free = entry["value"]["free"].as_i64().with_context(|| format!("no number of seats in {entry}"))?;
        let body = json!({"value": {"free": free - wants[loser]}, "if_revision": revision(&entry)?});
        self.ask(Method::PUT, "/v1/state/show:seats", body).await?.success()?;
        let entry = self.quietly(Method::GET, "/v1/state/show:seats", Value::Null).await?;
        ensure!(entry["value"]["free"] == 0, "5 seats less 3 less 2 is 0: {entry}");
        self.hold("5 seats less 3 less 2 is 0: no update was lost".to_owned());
        Ok(())
    }

    async fn expire(&mut self) -> anyhow::Result<()> {
        heading(self.terminal, "3 · A key that expires, and says so");
        let mut watch = self.watch("?prefix=session:", None).await?;
        let ttl_ms = if self.terminal.fast { 400 } else { 1500 };
        let body = json!({"value": {"user": "ana"}, "ttl_ms": ttl_ms});
        let answer = self.ask(Method::PUT, "/v1/state/session:7", body).await?.success()?;
        ensure!(answer["expires_at_ms"].is_u64(), "no deadline in {answer}");
        // Counted from the answer, which came after the deadline was set. Not by the wall clock, which somebody may set
        // meanwhile: the server's leans towards it, by at most 50 ms a second.
        let deadline = Instant::now() + Duration::from_millis(ttl_ms);
        let (data, arrival) = watch.event().await?;
        self.show_frame(&data, &arrival.frame, "");
        self.say(&format!("Now nobody does anything for {ttl_ms} ms."));
        sleep_until((deadline + Duration::from_millis(100)).into()).await;
        let answer = self.ask(Method::GET, "/v1/state/session:7", Value::Null).await?;
        ensure!(answer.status.as_u16() == 404, "the key outlived its deadline: {}", answer.status);
        ensure!(answer.json()?["code"] == "key_not_found", "another code than key_not_found");
        let (data, arrival) = watch.event().await?;
        let late = arrival.at.saturating_duration_since(deadline);
        self.show_frame(&data, &arrival.frame, &format!("{} after the deadline", ms(late)));
        ensure!(arrival.frame.event == "state_deleted" && data["reason"] == "expired", "not an expiry: {data}");
        ensure!(late < Duration::from_secs(2), "the event came {} after the deadline", ms(late));
        self.hold("gone for readers at its deadline, and its end is an event like any other".to_owned());
        Ok(())
    }

    fn item(sentence: &Sentence) -> Value {
        json!({"id": sentence.id, "vector": sentence.vector, "meta": {"topic": sentence.topic, "text": sentence.text}})
    }

    /// A search of the library: best three, with their metadata.
    async fn search(&mut self, query: &[f32], filters: Option<Value>) -> anyhow::Result<(Vec<Value>, u64)> {
        let mut body = json!({"vector": query, "k": 3, "include_meta": true});
        if let Some(filters) = filters {
            body["filters"] = filters;
        }
        let answer = self.quietly(Method::POST, "/v1/vector/library/search", body).await?;
        let hits = answer["hits"].as_array().with_context(|| format!("no hits in {answer}"))?.clone();
        ensure!(hits.len() == 3, "three hits were asked for and there are more, but these came: {hits:?}");
        Ok((hits, answer["took_us"].as_u64().context("no took_us in the answer")?))
    }

    fn show_hits(&self, asked: &str, took_us: u64, hits: &[Value]) {
        self.terminal.line(ink::REQUEST, &format!("   {:<78} {took_us:>6} µs", clip(&format!("“{asked}”"), 78)));
        for hit in hits {
            let (score, text) =
                (hit["score"].as_f64().unwrap_or(f64::NAN), hit["meta"]["text"].as_str().unwrap_or("?"));
            self.terminal.clipped(ink::PLAIN, &format!("     {score:.3}  {text}"));
        }
    }

    async fn search_library(&mut self) -> anyhow::Result<()> {
        heading(self.terminal, "4 · Search by meaning");
        let body = json!({"dim": DIM, "metric": "cosine"});
        self.ask(Method::POST, "/v1/vector/library", body).await?.success()?;
        let began = Instant::now();
        let batches: Vec<Value> = self
            .corpus
            .chunks(ITEMS_PER_BATCH)
            .map(|c| json!({"items": c.iter().map(Self::item).collect::<Vec<_>>()}))
            .collect();
        let sent = batches.len();
        for batch in batches {
            self.quietly(Method::POST, "/v1/vector/library/upsert", batch).await?;
        }
        let took = began.elapsed();
        self.say(&format!(
            "{} sentences with their embeddings (all-MiniLM-L6-v2) were sent in {sent} requests, {}.",
            self.corpus.len(),
            ms(took)
        ));
        let info = self.ask(Method::GET, "/v1/vector/library", Value::Null).await?.success()?;
        ensure!(info["count"] == self.corpus.len(), "{} vectors were sent: {info}", self.corpus.len());
        self.say("Eight questions, the three sentences nearest to each (cosine), and what the search took:");
        self.terminal.pause(1200).await;
        let queries = std::mem::take(&mut self.queries);
        let asked = self.search_all(&queries).await;
        self.queries = queries;
        asked?;
        self.hold(format!(
            "all {} answers are right: they equal a plain scan over every vector, done by this demo",
            self.queries.len()
        ));
        self.terminal.pause(1200).await;
        self.search_one_topic().await?;
        self.search_what_just_changed().await
    }

    async fn search_all(&mut self, queries: &[Sentence]) -> anyhow::Result<()> {
        for query in queries {
            let (hits, took_us) = self.search(&query.vector, None).await?;
            self.show_hits(&query.text, took_us, &hits);
            check_hits(&hits, &query.vector, &self.corpus.iter().collect::<Vec<_>>())?;
            ensure!(
                hits[0]["meta"]["topic"] == query.topic.as_str(),
                "“{}” is about {}: {}",
                query.text,
                query.topic,
                hits[0]
            );
            self.terminal.pause(700).await;
        }
        Ok(())
    }

    async fn search_one_topic(&mut self) -> anyhow::Result<()> {
        let (query, topic) = (&self.queries[3], "medicine");
        let (vector, text) = (query.vector.clone(), query.text.clone());
        self.say(&format!("The same search narrowed by metadata, \"filters\": {{\"topic\": \"{topic}\"}}:"));
        let (hits, took_us) = self.search(&vector, Some(json!({"topic": topic}))).await?;
        self.show_hits(&text, took_us, &hits);
        ensure!(hits.iter().all(|hit| hit["meta"]["topic"] == topic), "a hit of another topic than {topic}: {hits:?}");
        check_hits(&hits, &vector, &self.corpus.iter().filter(|s| s.topic == topic).collect::<Vec<_>>())?;
        self.hold(format!("the three nearest of topic {topic}, not the nearest three that happen to be of it"));
        self.terminal.pause(1200).await;
        Ok(())
    }

    async fn search_what_just_changed(&mut self) -> anyhow::Result<()> {
        let vector = self.queries[0].vector.clone();
        let before = self.search(&vector, None).await?.0;
        let best = self.corpus.iter().find(|s| before[0]["id"] == s.id.as_str()).context("the best hit is unknown")?;
        let (id, item, text) = (best.id.clone(), Self::item(best), best.text.clone());
        self.say("No index to wait for. The best answer to the first question is deleted, then added again:");
        self.ask(Method::POST, "/v1/vector/library/delete", json!({"id": id})).await?.success()?;
        let without = self.search(&vector, None).await?.0;
        self.terminal.clipped(
            ink::PLAIN,
            &format!("   ← first hit now    {}", without[0]["meta"]["text"].as_str().unwrap_or("?")),
        );
        ensure!(without[0] == before[1], "after the delete the second hit should be first: {without:?}");
        self.show_request(
            "",
            &Method::POST,
            "/v1/vector/library/add",
            &json!({"id": id, "vector": "…", "meta": {"text": text}}),
        );
        self.quietly(Method::POST, "/v1/vector/library/add", item.clone()).await?;
        let again = self.search(&vector, None).await?.0;
        self.terminal.clipped(
            ink::PLAIN,
            &format!("   ← first hit again  {}", again[0]["meta"]["text"].as_str().unwrap_or("?")),
        );
        ensure!(again == before, "after the add the answer should be as before: {again:?}");
        for round in 0..FRESHNESS_ROUNDS {
            self.quietly(Method::POST, "/v1/vector/library/delete", json!({"id": id})).await?;
            let gone = self.search(&vector, None).await?.0;
            ensure!(gone == without, "round {round}: a search right after the delete is stale: {gone:?}");
            self.quietly(Method::POST, "/v1/vector/library/upsert", item.clone()).await?;
            let back = self.search(&vector, None).await?.0;
            ensure!(back == before, "round {round}: a search right after the upsert is stale: {back:?}");
        }
        self.hold(format!(
            "found by the very next search, gone from the very next search: {} of {0} times",
            FRESHNESS_ROUNDS + 1
        ));
        Ok(())
    }

    async fn drop_and_resume(&mut self) -> anyhow::Result<()> {
        heading(self.terminal, "5 · A connection breaks, and nothing is missed");
        let mut watch = self.watch("?prefix=order:", None).await?;
        let mut seen = Vec::new();
        let mut written = Vec::new();
        for n in 1..=3 {
            written.extend(write_orders(&mut self.client, n..n + 1).await?);
            let (data, arrival) = watch.event().await?;
            seen.push(watch.last_id);
            self.show_frame(&data, &arrival.frame, "");
        }
        self.terminal.pause(700).await;
        let last = watch.last_id;
        drop(watch);
        let away = ORDERS_WHILE_AWAY;
        written.extend(write_orders(&mut self.client, 4..4 + away).await?);
        self.say(&format!(
            "The connection is cut after id {last}. {away} more orders are written while nobody listens,"
        ));
        self.say(&format!("and {ORDERS_WHILE_RESUMING} while the stream comes back with the last id it saw:"));
        self.terminal.pause(900).await;
        // Some are written while the stream comes back: between the log and what is live is where one could stumble.
        let mut other = Client::new(&self.stage.server.target);
        let (watch, meanwhile) = tokio::join!(
            self.watch("?prefix=order:", Some(last)),
            write_orders(&mut other, 4 + away..4 + away + ORDERS_WHILE_RESUMING)
        );
        let mut watch = watch?;
        written.extend(meanwhile?);
        while seen.len() < written.len() {
            let (data, arrival) = watch.event().await?;
            seen.push(watch.last_id);
            match seen.len() {
                4 | 5 => self.show_frame(&data, &arrival.frame, ""),
                6 => self.terminal.line(ink::FRAME, "   « …"),
                n if n + 1 >= written.len() => self.show_frame(&data, &arrival.frame, ""),
                _ => {}
            }
        }
        ensure!(seen == written, "written were {written:?}, but the stream showed {seen:?}");
        let (first, end) = (written[0], written[0] + written.len() as u64 - 1);
        ensure!(seen.iter().copied().eq(first..=end), "the ids are not contiguous: {seen:?}");
        let missed = away + ORDERS_WHILE_RESUMING;
        self.hold(format!("all {missed} missed orders came: ids {first} to {end}, none missing, none twice, in order"));
        Ok(())
    }

    /// The answers to all queries, whole: ids, scores to the last digit, metadata.
    async fn answers(&mut self) -> anyhow::Result<Vec<Vec<Value>>> {
        let vectors: Vec<_> = self.queries.iter().map(|q| q.vector.clone()).collect();
        let mut answers = Vec::new();
        for vector in vectors {
            answers.push(self.search(&vector, None).await?.0);
        }
        Ok(answers)
    }

    async fn kill_and_restart(&mut self) -> anyhow::Result<()> {
        heading(self.terminal, "6 · kill -9 in the middle of writes");
        self.quietly(Method::POST, "/v1/vector/inbox", json!({"dim": DIM, "metric": "cosine"})).await?;
        let answers_before = self.answers().await?;
        let mut watch = self.watch("", None).await?;
        let start = watch.last_id;
        let vectors: Vec<_> = self.corpus.iter().map(|s| s.vector.clone()).collect();
        let target = self.stage.server.target.clone();
        let mut key_writers = JoinSet::new();
        for writer in 0..KEY_WRITERS {
            key_writers.spawn(write_keys(target.clone(), writer));
        }
        let mut vector_writer = JoinSet::new();
        vector_writer.spawn(write_vectors(target, vectors));
        self.say(&format!(
            "{KEY_WRITERS} clients write keys and one adds vectors, as fast as each is answered; a stream watches all."
        ));
        let mut seen = Vec::new();
        while let Some((data, arrival)) = watch.event_or_end().await? {
            seen.push(watch.last_id);
            if seen.len() <= EVENTS_BEFORE_KILL && seen.len() % (EVENTS_BEFORE_KILL / 5) == 0 {
                self.show_frame(&data, &arrival.frame, "");
            }
            if seen.len() == EVENTS_BEFORE_KILL {
                let status = self.stage.server.kill()?;
                self.say(&format!("kill -9 while they write: the server is gone ({status})."));
            }
        }
        ensure!(seen.len() >= EVENTS_BEFORE_KILL, "the stream ended by itself after {} events", seen.len());
        let last = watch.last_id;
        let mut keys = Vec::new();
        for acknowledged in key_writers.join_all().await {
            keys.extend(acknowledged?);
        }
        let notes = vector_writer.join_all().await.pop().context("no writer of vectors")??;
        self.say(&format!(
            "Until then {} writes were acknowledged: {} keys, {} vectors.",
            keys.len() + notes.len(),
            keys.len(),
            notes.len()
        ));
        self.terminal.pause(1200).await;

        self.say("The same directory, a new process:");
        self.stage.server = Server::start(self.stage.dir.path()).await?;
        self.client = Client::new(&self.stage.server.target);
        self.terminal.wrapped(ink::QUIET, "   ", &self.stage.server.banner);
        self.show_recovery();
        self.hold(format!("ready again {} after the process was started", ms(self.stage.server.ready_after)));
        let head = revision(&self.ask(Method::GET, "/v1/health", Value::Null).await?.success()?)?;
        self.check_survivors(&keys, &notes).await?;
        let acknowledged: BTreeMap<u64, &str> =
            keys.iter().chain(&notes).map(|(name, at)| (*at, name.as_str())).collect();
        ensure!(acknowledged.len() == keys.len() + notes.len(), "two writes were acknowledged with one revision");
        let (total, highest) = (acknowledged.len() as u64, acknowledged.keys().next_back().copied().unwrap_or(0));
        self.hold(format!(
            "all {} acknowledged keys and {} vectors are there, at their revisions",
            keys.len(),
            notes.len()
        ));
        ensure!(self.answers().await? == answers_before, "the library answers differently after the restart");
        self.hold(format!("the {} questions get the same answers, to the last digit", answers_before.len()));

        ensure!(last <= head, "the stream had shown id {last}, but the restarted server knows only {head}");
        ensure!(highest <= head, "revision {highest} was acknowledged, but the restarted server knows only {head}");
        // Each writer has one write in flight at most: those may be on disk without an answer, nothing else may.
        let unanswered = (head - start).checked_sub(total).context("revisions are missing")?;
        ensure!(unanswered <= KEY_WRITERS as u64 + 1, "{unanswered} revisions nobody wrote");
        if unanswered > 0 {
            self.say(&format!(
                "Written, but killed before the answer: {unanswered}. Kept, since no client was told otherwise."
            ));
        }
        self.say(&format!(
            "The stream comes back with the last id it saw ({last}; the log ends at {head}); somebody writes on:"
        ));
        let mut watch = self.watch("", Some(last)).await?;
        let next = self.ask(Method::PUT, "/v1/state/ledger:after", json!({"value": "alive"})).await?.success()?;
        ensure!(revision(&next)? == head + 1, "the next revision is {}, not {}", revision(&next)?, head + 1);
        while watch.last_id <= head {
            let (data, arrival) = watch.event().await?;
            seen.push(watch.last_id);
            if watch.last_id > head {
                self.show_frame(&data, &arrival.frame, "");
            }
        }
        ensure!(
            seen.iter().copied().eq(start + 1..=head + 1),
            "across the crash the stream showed {seen:?}, not {} to {}",
            start + 1,
            head + 1
        );
        self.hold(format!(
            "the stream across the crash: ids {} to {}, none missing, none twice, none reused",
            start + 1,
            head + 1
        ));
        self.stop(watch).await
    }

    /// The server's own word on its recovery, from its log.
    fn show_recovery(&self) {
        let log = std::fs::read_to_string(self.stage.dir.path().join("server.log")).unwrap_or_default();
        // The first one is the first start's: an empty directory.
        for line in log.lines().filter_map(|line| Some(&line[line.find("recovered revision")?..])).skip(1) {
            self.terminal.clipped(ink::QUIET, &format!("   its log: {line}"));
        }
    }

    /// Every acknowledged key and vector is read back.
    async fn check_survivors(&mut self, keys: &Acknowledged, notes: &Acknowledged) -> anyhow::Result<()> {
        for (key, at) in keys {
            let entry = self.quietly(Method::GET, &format!("/v1/state/{key}"), Value::Null).await?;
            ensure!(entry["value"]["entry"] == key.as_str() && revision(&entry)? == *at, "{key} came back as {entry}");
        }
        for (n, (id, at)) in notes.iter().enumerate() {
            let item = self.quietly(Method::GET, &format!("/v1/vector/inbox/get?id={id}"), Value::Null).await?;
            ensure!(revision(&item)? == *at, "{id} was acknowledged at revision {at} and came back as {item}");
            let sent = &self.corpus[n % self.corpus.len()].vector;
            let back: Vec<f32> = serde_json::from_value(item["vector"].clone())?;
            ensure!(back.len() == DIM && (cosine(sent, &back) - 1.0).abs() < SCORE_TOLERANCE, "{id} is another vector");
        }
        // Not only stored: the last one acknowledged is among the nearest to its own vector, with its copies.
        let (last, _) = notes.last().context("no vector was acknowledged")?;
        let vector = &self.corpus[(notes.len() - 1) % self.corpus.len()].vector;
        let body = json!({"vector": vector, "k": 1 + notes.len() / self.corpus.len()});
        let answer = self.quietly(Method::POST, "/v1/vector/inbox/search", body).await?;
        let found = answer["hits"].as_array().is_some_and(|hits| hits.iter().any(|hit| hit["id"] == last.as_str()));
        ensure!(found, "the last vector acknowledged, {last}, is not found: {answer}");
        Ok(())
    }

    async fn stop(&mut self, mut watch: Watch) -> anyhow::Result<()> {
        self.terminal.pause(700).await;
        let (status, took) = self.stage.server.stop().await?;
        ensure!(status.success(), "asked to stop (SIGTERM), the server ended with {status}");
        ensure!(watch.event_or_end().await?.is_none(), "an event after the stop");
        self.hold(format!("asked to stop (SIGTERM), it ended its streams and exited with status 0 in {}", ms(took)));
        Ok(())
    }
}

fn heading(terminal: Terminal, title: &str) {
    let head = format!("━━ {title} ");
    terminal.blank();
    terminal.line(ink::HEADING, &format!("{head}{}", "━".repeat(WIDTH.saturating_sub(head.chars().count()))));
}

fn summary(terminal: Terminal, held: &[String], took: Duration) {
    heading(terminal, "What held");
    for claim in held {
        terminal.line(ink::HELD, &format!("   ✓ {claim}"));
    }
    let seconds = took.as_secs_f64();
    let line =
        format!("   {} claims checked in {seconds:.1} s; the server and its directory are gone again.", held.len());
    terminal.line(ink::PLAIN, &line);
    heading(terminal, "Now yours, in two terminals");
    for line in [
        "kiss-vdb serve                              # console: http://127.0.0.1:9917/",
        "curl -N http://127.0.0.1:9917/v1/events     # watch everything",
        "curl -X PUT http://127.0.0.1:9917/v1/state/hello -H 'content-type: application/json' \\",
        "     -d '{\"value\": \"world\", \"ttl_ms\": 5000}'",
        "bash demo/demo.sh                           # this story in curl, to paste from",
    ] {
        terminal.line(ink::REQUEST, &format!("   {line}"));
    }
}

/// For a failure: what the server logged last.
fn show_log(dir: &Path) {
    let log = std::fs::read_to_string(dir.join("server.log")).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    eprintln!("\nThe server's log ends with:");
    for line in &lines[lines.len().saturating_sub(12)..] {
        eprintln!("  {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embeddings_belong_to_the_sentences() {
        let corpus = sentences(include_str!("../demo/corpus.ndjson"), include_bytes!("../demo/corpus.f16.npy"))
            .expect("compiled-in data");
        let queries = sentences(include_str!("../demo/queries.ndjson"), include_bytes!("../demo/queries.f16.npy"))
            .expect("compiled-in data");
        assert_eq!((corpus.len(), queries.len()), (200, 8));
        for query in &queries {
            let best = corpus
                .iter()
                .max_by(|a, b| cosine(&query.vector, &a.vector).total_cmp(&cosine(&query.vector, &b.vector)));
            assert_eq!(best.map(|s| s.topic.as_str()), Some(query.topic.as_str()), "{}", query.text);
        }
    }

    #[test]
    fn a_damaged_npy_is_refused() {
        let (text, npy) = (include_str!("../demo/queries.ndjson"), include_bytes!("../demo/queries.f16.npy"));
        for (name, bytes) in [
            ("empty", &[][..]),
            ("no header", &npy[..8]),
            ("header cut", &npy[..20]),
            ("data cut", &npy[..npy.len() - 2]),
            ("another shape", &include_bytes!("../demo/corpus.f16.npy")[..]),
        ] {
            assert!(sentences(text, bytes).is_err(), "{name}");
        }
    }

    #[test]
    fn hits_that_a_scan_does_not_confirm_are_refused() {
        let sentence = |id: &str, vector: &[f32]| Sentence {
            id: id.to_owned(),
            topic: String::new(),
            text: String::new(),
            vector: vector.to_vec(),
        };
        let (a, b) = (sentence("a", &[1.0, 0.0]), sentence("b", &[0.6, 0.8]));
        let check = |hits: &[Value]| check_hits(hits, &[1.0, 0.0], &[&a, &b]);
        assert!(check(&[json!({"id": "a", "score": 1.0}), json!({"id": "b", "score": 0.6})]).is_ok());
        for (name, hits) in [
            ("the second first", [json!({"id": "b", "score": 0.6})]),
            ("a wrong score", [json!({"id": "a", "score": 0.99})]),
            ("a wrong id", [json!({"id": "b", "score": 1.0})]),
            ("an unknown id", [json!({"id": "c", "score": 1.0})]),
            ("no score", [json!({"id": "a"})]),
        ] {
            assert!(check(&hits).is_err(), "{name}");
        }
    }

    #[test]
    fn long_lines_are_cut_visibly_or_wrapped() {
        assert_eq!(clip("abc", 3), "abc");
        assert_eq!(clip("äbcd", 3), "äb…");
        assert_eq!(wrap("abcdef", 3), ["abc", "def"], "nowhere to break");
        assert_eq!(wrap("ab, cd,ef", 5), ["ab,", "cd,ef"]);
        assert_eq!(wrap("ääää", 2), ["ää", "ää"]);
    }
}
