//! The load generator: keep-alive connections that send prepared requests and time the answers.
//!
//! It writes and reads sockets itself instead of using [`crate::client::Client`]: it shares a small machine with what
//! it measures, and every microsecond it spends is taken from the server.
//!
//! - Closed loop: each connection sends its next request when it has the answer to the last one.
//! - Open loop: requests fall due on a schedule, whichever connection is free sends them, and the time is counted from
//!   when they were due. A server that stalls is charged for everyone who had to wait.

use crate::turns::{self, Turn};
use anyhow::{Context, anyhow, ensure};
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use std::io::Write;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

/// Largest latency told apart, in nanoseconds: beyond it a phase has failed anyhow.
const LATENCY_NS_MAX: u64 = 120_000_000_000;
/// Decimal digits kept of a latency.
const LATENCY_DIGITS: u8 = 3;
/// An open loop that lags may take this many times its planned length; what is not sent by then is counted as unsent.
const OVERRUN_FACTOR: f64 = 2.0;
/// Largest answer read: the largest list or snapshot asked for is far smaller.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// How often the progress bar looks at the counter.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// Where to send requests, and the head lines each of them carries.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// `host:port`.
    pub(super) authority: String,
    head_lines: String,
}

impl Endpoint {
    pub(super) fn new(url: &str, api_key: Option<&str>) -> anyhow::Result<Self> {
        let authority = url
            .strip_prefix("http://")
            .context("bench speaks plain HTTP: the URL begins with http://")?
            .trim_end_matches('/')
            .to_owned();
        ensure!(!authority.is_empty() && !authority.contains('/'), "the URL is http://host:port");
        let authorization = api_key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        Ok(Self { head_lines: format!("host: {authority}\r\n{authorization}"), authority })
    }

    /// Writes a whole request over what `out` held.
    pub(super) fn request(&self, out: &mut Vec<u8>, method: &str, path: &str, body: &[u8]) {
        out.clear();
        out.extend_from_slice(method.as_bytes());
        out.push(b' ');
        out.extend_from_slice(path.as_bytes());
        out.extend_from_slice(b" HTTP/1.1\r\n");
        out.extend_from_slice(self.head_lines.as_bytes());
        if !body.is_empty() {
            write!(out, "content-type: application/json\r\ncontent-length: {}\r\n", body.len())
                .expect("a Vec takes every byte");
        }
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(body);
    }
}

/// The part of an answer's head that is needed to find its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) status: u16,
    /// Bytes up to and with the empty line.
    pub(super) head_bytes: usize,
    /// `content-length`; 0 when absent.
    pub(super) body_bytes: usize,
}

impl Head {
    /// `None` until the head is complete.
    pub(super) fn parse(input: &[u8]) -> anyhow::Result<Option<Self>> {
        let Some(end) = input.windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(None) };
        let text = std::str::from_utf8(&input[..end]).context("the head of an answer is not text")?;
        let mut lines = text.split("\r\n");
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).and_then(|rest| rest.get(..3));
        let status = status.and_then(|s| s.parse().ok()).ok_or_else(|| anyhow!("not an HTTP/1.1 answer: {text}"))?;
        let mut body_bytes = 0;
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("content-length") {
                body_bytes = value.trim().parse().with_context(|| format!("content-length is {value}"))?;
            }
        }
        ensure!(body_bytes <= ANSWER_BYTES_MAX, "an answer of {body_bytes} bytes");
        Ok(Some(Self { status, head_bytes: end + 4, body_bytes }))
    }
}

/// What one phase measured. Phases of one kind can be merged.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    /// Nanoseconds of the answers that passed their check.
    pub(super) latency: Histogram<u64>,
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
    /// Requests of an open loop that were due and never sent, as the server was too far behind.
    pub(super) unsent: u64,
    /// From the common start to the last answer.
    pub(super) elapsed: Duration,
}

impl Tally {
    pub(super) fn new() -> Self {
        let latency =
            Histogram::new_with_max(LATENCY_NS_MAX, LATENCY_DIGITS).expect("the bounds are constant and valid");
        Self { latency, errors: 0, first_error: None, unsent: 0, elapsed: Duration::ZERO }
    }

    pub(super) fn record(&mut self, latency: Duration) {
        self.latency.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(super) fn fail(&mut self, error: String) {
        self.errors += 1;
        self.first_error.get_or_insert(error);
    }

    /// Adds what ran at the same time.
    pub(super) fn join(&mut self, other: &Self) {
        self.latency.add(&other.latency).expect("all tallies have the same bounds");
        self.errors += other.errors;
        self.unsent += other.unsent;
        self.first_error = self.first_error.take().or_else(|| other.first_error.clone());
        self.elapsed = self.elapsed.max(other.elapsed);
    }

    /// Adds what ran afterwards.
    pub(super) fn append(&mut self, other: &Self) {
        let elapsed = self.elapsed + other.elapsed;
        self.join(other);
        self.elapsed = elapsed;
    }

    /// Answers a second.
    pub(super) fn rate(&self) -> f64 {
        if self.elapsed.is_zero() { 0.0 } else { self.latency.len() as f64 / self.elapsed.as_secs_f64() }
    }

    /// The latency at a quantile (0 to 1), in microseconds.
    pub(super) fn micros(&self, quantile: f64) -> f64 {
        if self.latency.is_empty() { 0.0 } else { self.latency.value_at_quantile(quantile) as f64 / 1000.0 }
    }
}

/// Writes the request with this sequence number.
pub(super) type MakeRequest = dyn Fn(u64, &mut Vec<u8>) + Send + Sync;
/// Looks at an answer: sequence number, status, body.
pub(super) type CheckAnswer = dyn Fn(u64, u16, &[u8]) -> Result<(), String> + Send + Sync;

/// Any success will do.
pub(super) fn expect_success(_sequence: u64, status: u16, body: &[u8]) -> Result<(), String> {
    if (200..300).contains(&status) { Ok(()) } else { Err(format!("{status}: {}", String::from_utf8_lossy(body))) }
}

/// What to send, over how many connections, how fast and how long.
pub(super) struct Load {
    pub(super) endpoint: Endpoint,
    pub(super) connections: usize,
    /// Threads of the generator; each drives its share of the connections.
    pub(super) threads: usize,
    /// Requests a second for an open loop; `None` = closed loop.
    pub(super) rate: Option<f64>,
    /// Ends at whichever comes first.
    pub(super) seconds: Option<f64>,
    pub(super) requests: Option<u64>,
    pub(super) make: Box<MakeRequest>,
    pub(super) check: Box<CheckAnswer>,
}

impl Load {
    /// Requests after which it ends; an open loop's length is a number of requests too.
    fn limit(&self) -> u64 {
        let by_time = match (self.rate, self.seconds) {
            (Some(rate), Some(seconds)) => (rate * seconds).ceil() as u64,
            _ => u64::MAX,
        };
        by_time.min(self.requests.unwrap_or(u64::MAX))
    }

    /// Runs it to its end. Failed requests are in the tally; an error means that it could not run at all.
    pub(super) fn run(self, name: &str) -> anyhow::Result<Tally> {
        ensure!(self.connections > 0 && self.threads > 0, "at least one connection and one thread are needed");
        let threads = self.threads.min(self.connections);
        let run = Arc::new(Run::new(self, threads));
        let generators: Vec<_> = (0..threads)
            .map(|index| {
                let run = Arc::clone(&run);
                std::thread::spawn(move || run.drive_share(index, threads))
            })
            .collect();
        let pacer = run.load.rate.map(|rate| {
            let run = Arc::clone(&run);
            std::thread::spawn(move || run.pace(rate))
        });
        run.show_progress(name, || generators.iter().all(std::thread::JoinHandle::is_finished));
        let mut tally = Tally::new();
        for generator in generators {
            tally.join(&generator.join().map_err(|_| anyhow!("a generator thread panicked"))??);
        }
        if let Some(pacer) = pacer {
            pacer.join().map_err(|_| anyhow!("the pacer panicked"))?;
        }
        Ok(tally)
    }
}

/// A load being run: what its threads share.
struct Run {
    load: Load,
    limit: u64,
    next: AtomicU64,
    answered: AtomicU64,
    /// All connections are open before the first request is sent.
    ready: Barrier,
    start: OnceLock<Instant>,
    /// Open loop: one permit for each request that is due.
    due: Semaphore,
}

impl Run {
    fn new(load: Load, threads: usize) -> Self {
        let parties = threads + usize::from(load.rate.is_some());
        let limit = load.limit();
        let (next, answered) = (AtomicU64::new(0), AtomicU64::new(0));
        Self {
            load,
            limit,
            next,
            answered,
            ready: Barrier::new(parties),
            start: OnceLock::new(),
            due: Semaphore::new(0),
        }
    }

    fn wait_for_start(&self) -> Instant {
        self.ready.wait();
        *self.start.get_or_init(Instant::now)
    }

    /// Hands out permits on schedule. A thread of its own, because the runtime's timer ticks in milliseconds and this
    /// sleep is exact to a few microseconds.
    fn pace(&self, rate: f64) {
        turns::take(Turn::First);
        // Refused only on kernels that don't know it; then wake-ups are some 50 µs late.
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1)).ok();
        let start = self.wait_for_start();
        let mut given = 0;
        while given < self.limit {
            let due = (start.elapsed().as_secs_f64() * rate) as u64 + 1;
            let now = due.min(self.limit).saturating_sub(given);
            self.due.add_permits(usize::try_from(now).unwrap_or(Semaphore::MAX_PERMITS));
            given += now;
            std::thread::sleep(Duration::from_secs_f64(given as f64 / rate).saturating_sub(start.elapsed()));
        }
        // Wakes everyone once more, to find the end.
        self.due.add_permits(self.load.connections);
    }

    /// One generator thread: its own single-threaded runtime with its share of the connections.
    fn drive_share(self: &Arc<Self>, index: usize, threads: usize) -> anyhow::Result<Tally> {
        if self.load.rate.is_some() {
            // What is late by the generator's own fault would be charged to the server.
            turns::take(Turn::First);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let share = (index..self.load.connections).step_by(threads).count();
        let tally = Arc::new(Mutex::new(Tally::new()));
        runtime.block_on(async {
            let mut connections = Vec::with_capacity(share);
            let mut refused = None;
            for _ in 0..share {
                match Connection::open(&self.load.endpoint).await {
                    Ok(connection) => connections.push(connection),
                    Err(error) => refused = Some(error),
                }
            }
            // Also after a failure: the others wait at the same barrier.
            let start = self.wait_for_start();
            if let Some(error) = refused {
                tally.lock().fail(format!("{error:#}"));
            }
            let tasks: Vec<_> = connections
                .into_iter()
                .map(|connection| tokio::spawn(Arc::clone(self).drive(connection, start, Arc::clone(&tally))))
                .collect();
            for task in tasks {
                task.await.context("a connection's task panicked")?;
            }
            anyhow::Ok(())
        })?;
        let tally = tally.lock().clone();
        Ok(tally)
    }

    /// The next request's sequence number and the time it is counted from; `None` at the end.
    async fn next(&self, start: Instant) -> Option<(u64, Instant)> {
        let Some(rate) = self.load.rate else {
            let sequence = self.next.fetch_add(1, Ordering::Relaxed);
            let now = Instant::now();
            let over = self.load.seconds.is_some_and(|s| now.duration_since(start).as_secs_f64() >= s);
            return (sequence < self.limit && !over).then_some((sequence, now));
        };
        self.due.acquire().await.ok()?.forget();
        let sequence = self.next.fetch_add(1, Ordering::Relaxed);
        (sequence < self.limit).then(|| (sequence, start + Duration::from_secs_f64(sequence as f64 / rate)))
    }

    /// Whether an open loop is so late that the rest is given up.
    fn is_hopeless(&self, start: Instant) -> bool {
        self.load
            .rate
            .is_some_and(|rate| start.elapsed().as_secs_f64() > OVERRUN_FACTOR * self.limit as f64 / rate + 1.0)
    }

    async fn drive(self: Arc<Self>, mut connection: Connection, start: Instant, tally: Arc<Mutex<Tally>>) {
        let mut request = Vec::new();
        while let Some((sequence, due)) = self.next(start).await {
            if self.is_hopeless(start) {
                tally.lock().unsent += 1;
                continue;
            }
            (self.load.make)(sequence, &mut request);
            let answer = connection.exchange(&request).await;
            let now = Instant::now();
            let checked = match answer {
                Ok((status, body)) => (self.load.check)(sequence, status, body),
                Err(error) => {
                    // The connection is gone; the others go on.
                    tally.lock().fail(format!("{error:#}"));
                    return;
                }
            };
            self.answered.fetch_add(1, Ordering::Relaxed);
            let mut tally = tally.lock();
            match checked {
                Ok(()) => tally.record(now.duration_since(due)),
                Err(error) => tally.fail(error),
            }
            tally.elapsed = now.duration_since(start);
        }
    }

    fn show_progress(&self, name: &str, is_over: impl Fn() -> bool) {
        let bar = super::progress_bar(name);
        while !is_over() {
            let spent = self.start.get().map_or(0.0, |start| start.elapsed().as_secs_f64());
            let answered = self.answered.load(Ordering::Relaxed);
            let done = match (self.limit, self.load.seconds) {
                (u64::MAX, Some(seconds)) => spent / seconds,
                (limit, _) => answered as f64 / limit as f64,
            };
            bar.set_position((done * super::PROGRESS_STEPS as f64) as u64);
            bar.set_message(format!("{answered} answers"));
            std::thread::sleep(PROGRESS_EVERY);
        }
        bar.finish_and_clear();
    }
}

/// One keep-alive connection.
struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Connection {
    async fn open(endpoint: &Endpoint) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(&endpoint.authority).await;
        let stream = stream.with_context(|| format!("cannot connect to {}", endpoint.authority))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, input: Vec::with_capacity(16 << 10) })
    }

    async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<(u16, &[u8])> {
        self.stream.write_all(request).await.context("cannot send")?;
        self.input.clear();
        let mut head = None;
        loop {
            let read = self.stream.read_buf(&mut self.input).await.context("cannot read the answer")?;
            ensure!(read > 0, "the server closed the connection");
            if head.is_none() {
                head = Head::parse(&self.input)?;
            }
            if let Some(Head { status, head_bytes, body_bytes }) = head
                && self.input.len() >= head_bytes + body_bytes
            {
                return Ok((status, &self.input[head_bytes..head_bytes + body_bytes]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_where_its_head_says() {
        let answer = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\netag: \"1\"\r\n\r\n{}";
        for cut in 0..answer.len() - 2 {
            assert_eq!(Head::parse(&answer[..cut]).unwrap(), None, "cut at {cut}");
        }
        let head = Head::parse(answer).unwrap().unwrap();
        assert_eq!((head.status, head.head_bytes + head.body_bytes), (201, answer.len()));
        assert!(Head::parse(b"HTTP/2 200\r\n\r\n").is_err());
    }

    #[test]
    fn a_request_names_its_length_and_key() {
        let endpoint = Endpoint::new("http://127.0.0.1:1/", Some("k")).unwrap();
        let mut out = b"old".to_vec();
        endpoint.request(&mut out, "PUT", "/a", b"{}");
        let expected = "PUT /a HTTP/1.1\r\nhost: 127.0.0.1:1\r\nauthorization: Bearer k\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        assert!(Endpoint::new("https://a", None).is_err());
    }

    #[test]
    fn tallies_add_up_in_time_or_side_by_side() {
        let mut one = Tally::new();
        one.record(Duration::from_micros(100));
        one.elapsed = Duration::from_secs(1);
        let mut side = one.clone();
        side.join(&one);
        assert_eq!((side.latency.len(), side.elapsed), (2, Duration::from_secs(1)));
        one.append(&side);
        assert_eq!((one.latency.len(), one.elapsed), (3, Duration::from_secs(2)));
    }
}
