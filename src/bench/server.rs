//! What is measured, and the yardsticks: a server of our own, a bare HTTP handler, and the disk's sync.

use super::load::Tally;
use anyhow::{Context, anyhow, bail, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// The core a pinned server runs on, and the one for the generator.
pub(super) const SERVER_CORE: usize = 0;
pub(super) const GENERATOR_CORE: usize = 1;
/// A server that has not ended this long after SIGTERM is killed; its own drain and snapshot take less.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// What a bare server answers: as long as the answer to a GET of 100 bytes.
const BARE_ANSWER: &str = r#"{"key":"bench:00000000","value":"0123456789012345678901234567890123456789012345","revision":1,"created_revision":1}"#;
/// And one of a batch's results.
const BARE_RESULT: &str = r#"{"key":"bench:00000000","revision":100000,"created":false}"#;
/// The sync probe's file: large enough never to grow during the probe.
const PROBE_FILE_BYTES: u64 = 16 << 20;
/// The sync probe's append, like a small PUT's record.
const PROBE_RECORD_BYTES: usize = 200;
/// `f_type` of tmpfs (Linux, statfs(2)): a sync there costs nothing.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// A server started by us, as a process of its own, stopped when dropped.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    /// Kept open: a server may fail when it cannot print.
    _stdout: BufReader<ChildStdout>,
    pub(super) url: String,
}

impl Server {
    /// Runs this very program with these arguments and waits for the line that names the URL.
    pub(super) fn start(arguments: &[String], pin: bool) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        // An EPHEMERAL of the caller's would win over our data directory.
        command.args(arguments).env_remove("EPHEMERAL").stdin(Stdio::null()).stdout(Stdio::piped());
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "warn");
        }
        // A child inherits the affinity; every thread it starts does, too.
        if pin {
            pin_to(SERVER_CORE)?;
        }
        let child = command.spawn();
        if pin {
            pin_to(GENERATOR_CORE)?;
        }
        let mut child = child.context("cannot start the server")?;
        let mut stdout = BufReader::new(child.stdout.take().context("the server has no stdout")?);
        let mut banner = String::new();
        stdout.read_line(&mut banner)?;
        let url = banner.split_whitespace().find(|word| word.starts_with("http://")).map(str::to_owned);
        let mut server = Self { child, _stdout: stdout, url: url.unwrap_or_default() };
        if server.url.is_empty() {
            server.kill();
            bail!("the server did not start; its first line was {banner:?}");
        }
        Ok(server)
    }

    /// SIGTERM, and wait. An error when it does not end, or not with success.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the server ended with {status}");
                return Ok(());
            }
            ensure!(begun.elapsed() < STOP_TIMEOUT, "the server did not end within {STOP_TIMEOUT:?} of SIGTERM");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL.
    pub(super) fn crash(mut self) {
        self.kill();
    }

    /// Its resident memory in bytes.
    pub(super) fn resident_bytes(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().context("VmRSS")?;
        Ok(kib << 10)
    }

    /// Seconds of processor time of its threads whose name begins so; of one that is running, up to the last tick.
    pub(super) fn cpu_seconds(&self, threads: &str) -> anyhow::Result<f64> {
        let mut seconds = 0.0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let thread = thread?.path();
            if std::fs::read_to_string(thread.join("comm"))?.starts_with(threads) {
                let text = std::fs::read_to_string(thread.join("schedstat"))?;
                let nanoseconds: u64 = text.split(' ').next().unwrap_or_default().parse().context("schedstat")?;
                seconds += nanoseconds as f64 / 1e9;
            }
        }
        Ok(seconds)
    }

    fn kill(&mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Server {
    /// For the ways out by an error; after `stop` there is nothing left to kill.
    fn drop(&mut self) {
        self.kill();
    }
}

pub(super) fn pin_to(core: usize) -> anyhow::Result<()> {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).with_context(|| format!("cannot pin to core {core}"))
}

/// Times appends of 200 bytes, each synced, to a file whose blocks are already written: the least a durable write costs.
/// Pinned, it runs on the server's core: what shares that core then slows both.
pub(super) fn measure_fsync(dir: &Path, seconds: f64, pin: bool) -> anyhow::Result<Tally> {
    if pin {
        pin_to(SERVER_CORE)?;
    }
    let tally = time_appends(dir, seconds);
    if pin {
        pin_to(GENERATOR_CORE)?;
    }
    tally
}

fn time_appends(dir: &Path, seconds: f64) -> anyhow::Result<Tally> {
    if rustix::fs::statfs(dir).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC) {
        eprintln!("kiss-vdb: {} is in memory, so syncs there cost nothing; choose a disk with --dir", dir.display());
    }
    let file = tempfile::tempfile_in(dir).with_context(|| format!("cannot write in {}", dir.display()))?;
    let zeros = vec![0; 1 << 20];
    for at in (0..PROBE_FILE_BYTES).step_by(zeros.len()) {
        file.write_all_at(&zeros, at)?;
    }
    file.sync_all()?;
    let mut tally = Tally::new();
    let record = [b'x'; PROBE_RECORD_BYTES];
    let offsets = (0..PROBE_FILE_BYTES - record.len() as u64).step_by(record.len()).cycle();
    let start = Instant::now();
    for offset in offsets {
        let begun = Instant::now();
        file.write_all_at(&record, offset)?;
        file.sync_data()?;
        tally.record(begun.elapsed());
        tally.elapsed = start.elapsed();
        if tally.elapsed.as_secs_f64() >= seconds {
            break;
        }
    }
    Ok(tally)
}

/// `kiss-vdb bench-bare`: the least a server on this stack can do, GET answers a constant and PUT reads the body first.
/// Ours divided by this is the figure that machines of different speed agree on.
pub fn run_bare(args: &super::BareArgs) -> anyhow::Result<()> {
    let workers = args.worker_threads.as_deref().unwrap_or("0");
    let workers: usize = workers.parse().map_err(|_| anyhow!("worker_threads = {workers:?} is not a number"))?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if workers > 0 {
        runtime.worker_threads(workers);
    }
    runtime.enable_all().build()?.block_on(async {
        let answer = || async { ([(CONTENT_TYPE, "application/json")], BARE_ANSWER) };
        let answer_read = |_body: Bytes| async { ([(CONTENT_TYPE, "application/json")], BARE_ANSWER) };
        // As long as the answers to a batch and a page of a hundred.
        let results: &str =
            format!("{{\"results\":[{}],\"first_revision\":1,\"last_revision\":100}}", [BARE_RESULT; 100].join(","))
                .leak();
        let page: &str =
            format!("{{\"items\":[{}],\"next_cursor\":null,\"revision\":1}}", [BARE_ANSWER; 100].join(",")).leak();
        let answer_batch = move |_body: Bytes| async move { ([(CONTENT_TYPE, "application/json")], results) };
        let answer_list = move || async move { ([(CONTENT_TYPE, "application/json")], page) };
        let router = Router::new()
            .route("/v1/state/{key}", get(answer).put(answer_read).patch(answer_read))
            .route("/v1/batch", post(answer_batch))
            .route("/v1/state", get(answer_list));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "bare server ready at http://{}", listener.local_addr()?)?;
        out.flush()?;
        drop(out);
        // A socket that cannot be told is only slower.
        let listener = listener.tap_io(|stream| stream.set_nodelay(true).unwrap_or_default());
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            served = axum::serve(listener, router) => served.context("the bare server failed"),
            _ = terminate.recv() => Ok(()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bare_answer_is_as_long_as_a_real_one() {
        assert_eq!(BARE_ANSWER.len(), 115);
        assert!(serde_json::from_str::<serde_json::Value>(BARE_ANSWER).is_ok());
    }

    #[test]
    fn the_sync_probe_counts_what_it_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let tally = measure_fsync(dir.path(), 0.0, false).unwrap();
        assert_eq!(tally.latency.len(), 1);
    }
}
