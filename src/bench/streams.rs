//! The SSE phase: many streams, publishers on a schedule, and an account of every event.
//!
//! - The value of a published key ends in `@` and the event's sequence number, from which every receiver knows when
//!   the event was due. Latency is counted from then, on one clock.
//! - Each publisher waits for one answer before it sends the next, so its events are ordered; with several publishers
//!   the order is checked for each of them. Ids must increase on every stream whoever published.
//! - Every stream must get every event it watches exactly once. Anything else fails the whole run.

use super::load::{Endpoint, Head, Tally};
use crate::turns::{self, Turn};
use anyhow::{Context, anyhow, bail, ensure};
use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::TcpStream as BlockingStream;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::LocalSet;

/// Bytes taken from a socket at once; one buffer serves all streams of a thread.
const READ_BYTES: usize = 256 << 10;
/// A stream's answer and first frame must be there by then.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// After the last publish, what has not arrived by then is lost.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(15);
/// Between the last stream's opening and the first event.
const SETTLE: Duration = Duration::from_millis(200);

/// Whose streams are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Peer {
    /// This database
    Kiss,
    /// nginx with nchan: publishers at /pub/KEY, subscribers at /sub/KEY
    Nchan,
}

/// What to open and what to publish.
#[derive(Clone, Debug)]
pub(super) struct StreamLoad {
    pub(super) endpoint: Endpoint,
    pub(super) streams: usize,
    pub(super) threads: usize,
    pub(super) publishers: u64,
    /// Events a second, all keys together; infinite: as fast as answers come.
    pub(super) rate: f64,
    /// How many, all keys together.
    pub(super) events: u64,
    /// Further streams that never read.
    pub(super) stuck: usize,
    /// Streams resume after this revision, all at once, instead of one after the other from now on.
    pub(super) resume_after: Option<u64>,
    pub(super) peer: Peer,
    /// Bytes of a published value.
    pub(super) value_bytes: usize,
    /// Each stream watches a key of its own; else all watch one.
    pub(super) own_keys: bool,
}

/// What went wrong with the events; all zero when the server keeps its promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Faults {
    pub(super) lost: u64,
    /// Duplicates, and events that came after a later one of the same publisher.
    pub(super) out_of_order: u64,
    pub(super) ids_not_increasing: u64,
    pub(super) resets: u64,
    /// Streams that the server ended.
    pub(super) ended: u64,
}

impl Faults {
    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    fn join(&mut self, other: &Self) {
        self.lost += other.lost;
        self.out_of_order += other.out_of_order;
        self.ids_not_increasing += other.ids_not_increasing;
        self.resets += other.resets;
        self.ended += other.ended;
    }
}

/// What the phase measured.
#[derive(Debug)]
pub(super) struct StreamReport {
    /// Of every event on every stream, from when it was due.
    pub(super) delivery: Tally,
    /// Of each PUT, from when it was due.
    pub(super) publish: Tally,
    pub(super) faults: Faults,
}

impl StreamLoad {
    fn due(&self, start: Instant, sequence: u64) -> Instant {
        start + Duration::from_secs_f64(sequence as f64 / self.rate)
    }

    fn key(&self, stream: u64) -> String {
        if self.own_keys { format!("bench:stream:{stream}") } else { "bench:stream".to_owned() }
    }

    /// The stream whose key an event changes; 0 when there is one key.
    fn stream_of(&self, sequence: u64) -> u64 {
        if self.own_keys { sequence % self.streams as u64 } else { 0 }
    }

    /// Each key has one publisher when keys are many; one key is shared by all publishers in turn.
    fn publisher_of(&self, sequence: u64) -> u64 {
        if self.own_keys { self.stream_of(sequence) % self.publishers } else { sequence % self.publishers }
    }

    /// What a stream expects: the first sequence number of each of its publishers, and the distance to the next.
    fn ledger(&self, stream: u64) -> Ledger {
        let (next, step) = if self.own_keys {
            (vec![stream], self.streams as u64)
        } else {
            ((0..self.publishers).collect(), self.publishers)
        };
        Ledger { next, step, events: self.events, peer: self.peer, last_id: 0, faults: Faults::default() }
    }

    fn subscribe_request(&self, stream: u64) -> Vec<u8> {
        let mut request = Vec::new();
        let path = match self.peer {
            Peer::Kiss => format!("/v1/events?key={}", self.key(stream)),
            Peer::Nchan => format!("/sub/{}", self.key(stream)),
        };
        self.endpoint.request(&mut request, "GET", &path, b"");
        request.truncate(request.len() - 2);
        request.extend_from_slice(b"accept: text/event-stream\r\n");
        if let Some(revision) = self.resume_after {
            request.extend_from_slice(format!("last-event-id: {revision}\r\n").as_bytes());
        }
        request.extend_from_slice(b"\r\n");
        request
    }

    /// A stream of the first key whose reader never reads, with as little room in between as the system allows.
    fn open_stuck(&self) -> anyhow::Result<BlockingStream> {
        let mut stream = BlockingStream::connect(&self.endpoint.authority).context("cannot connect")?;
        rustix::net::sockopt::set_socket_recv_buffer_size(&stream, 1)?;
        stream.write_all(&self.subscribe_request(0))?;
        Ok(stream)
    }

    /// Opens the streams, calls `opened`, publishes, waits for the arrivals.
    pub(super) fn run(&self, opened: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<StreamReport> {
        ensure!(
            self.streams > 0 && self.threads > 0 && self.publishers > 0,
            "streams, threads and publishers are at least 1"
        );
        let _stuck = (0..self.stuck).map(|_| self.open_stuck()).collect::<anyhow::Result<Vec<_>>>()?;
        let threads = self.threads.min(self.streams);
        let shared = Arc::new(Shared::default());
        let (ready, all_ready) = mpsc::channel();
        let receivers: Vec<_> = (0..threads)
            .map(|index| {
                let (load, shared, ready) = (self.clone(), Arc::clone(&shared), ready.clone());
                std::thread::spawn(move || load.receive_share(index, threads, &shared, &ready))
            })
            .collect();
        drop(ready);
        let bar = super::progress_bar("streams");
        bar.set_message("opening");
        for _ in 0..threads {
            all_ready.recv().map_err(|_| anyhow!("the streams could not be opened"))??;
        }
        opened()?;
        let start = Instant::now() + SETTLE;
        shared.start.set(start).map_err(|_| anyhow!("started twice"))?;
        let publishers: Vec<_> = (0..self.publishers)
            .map(|index| {
                let load = self.clone();
                std::thread::spawn(move || load.publish(index, start))
            })
            .collect();
        let mut published = None;
        while !receivers.iter().all(std::thread::JoinHandle::is_finished) {
            let spent = Instant::now().saturating_duration_since(start).as_secs_f64();
            bar.set_position((spent * self.rate / self.events as f64 * super::PROGRESS_STEPS as f64) as u64);
            bar.set_message(format!("{} delivered", shared.delivered.load(Ordering::Relaxed)));
            if publishers.iter().all(std::thread::JoinHandle::is_finished) {
                let begun = *published.get_or_insert_with(Instant::now);
                if begun.elapsed() > ARRIVAL_TIMEOUT {
                    shared.over.notify_waiters();
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bar.finish_and_clear();
        let mut report = StreamReport { delivery: Tally::new(), publish: Tally::new(), faults: Faults::default() };
        for publisher in publishers {
            report.publish.join(&publisher.join().map_err(|_| anyhow!("a publisher panicked"))??);
        }
        for receiver in receivers {
            let (tally, faults) = receiver.join().map_err(|_| anyhow!("a receiver panicked"))??;
            report.delivery.join(&tally);
            report.faults.join(&faults);
        }
        Ok(report)
    }

    /// Publishes everything before any stream is open.
    pub(super) fn publish_all(&self) -> anyhow::Result<()> {
        let start = Instant::now();
        std::thread::scope(|scope| {
            let publishers: Vec<_> =
                (0..self.publishers).map(|index| scope.spawn(move || self.publish(index, start))).collect();
            for publisher in publishers {
                publisher.join().map_err(|_| anyhow!("a publisher panicked"))??;
            }
            Ok(())
        })
    }

    /// All streams resume at once; when each event was there, from the beginning of it all.
    pub(super) fn storm(&self) -> anyhow::Result<(Tally, Faults)> {
        // Those who come back are elsewhere, and take no core from who writes and who serves.
        turns::take(Turn::Last);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::new(Shared::default());
        shared.start.set(Instant::now()).map_err(|_| anyhow!("started twice"))?;
        let thread = Rc::new(ReceiverThread::new(self, &shared));
        LocalSet::new().block_on(&runtime, async {
            let resume = |stream: u64, thread: Rc<ReceiverThread>| async move {
                let opened = tokio::time::timeout(OPEN_TIMEOUT, Receiver::open(&thread.load, stream)).await;
                opened.with_context(|| format!("stream {stream} was not answered"))??.run(Rc::clone(&thread)).await
            };
            let streams: Vec<_> = (0..self.streams as u64)
                .map(|stream| tokio::task::spawn_local(resume(stream, Rc::clone(&thread))))
                .collect();
            tokio::spawn({
                let shared = Arc::clone(&shared);
                async move {
                    tokio::time::sleep(OPEN_TIMEOUT).await;
                    shared.over.notify_waiters();
                }
            });
            for stream in streams {
                stream.await.context("a stream's task panicked")??;
            }
            anyhow::Ok(())
        })?;
        Ok((thread.tally.borrow().clone(), *thread.faults.borrow()))
    }

    /// One publisher: blocking, as its sleep is then exact to a few microseconds.
    fn publish(&self, publisher: u64, start: Instant) -> anyhow::Result<Tally> {
        // Refused only on kernels that don't know it; then wake-ups are some 50 µs late.
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1)).ok();
        let mut stream = BlockingStream::connect(&self.endpoint.authority).context("cannot connect to publish")?;
        stream.set_nodelay(true)?;
        let (mut tally, mut request) = (Tally::new(), Vec::new());
        for sequence in (0..self.events).filter(|&s| self.publisher_of(s) == publisher) {
            let due = self.due(start, sequence);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let key = self.key(self.stream_of(sequence));
            let marker = format!("@{sequence}");
            let padding = self.value_bytes.saturating_sub(marker.len());
            let (method, path) = match self.peer {
                Peer::Kiss => ("PUT", format!("/v1/state/{key}")),
                Peer::Nchan => ("POST", format!("/pub/{key}")),
            };
            let body = format!("{{\"value\":\"{}{marker}\"}}", "x".repeat(padding));
            self.endpoint.request(&mut request, method, &path, body.as_bytes());
            exchange(&mut stream, &request).context("cannot publish")?;
            tally.record(due.elapsed());
            tally.elapsed = start.elapsed();
        }
        Ok(tally)
    }

    /// One receiver thread with its share of the streams.
    fn receive_share(
        &self,
        index: usize,
        threads: usize,
        shared: &Arc<Shared>,
        ready: &mpsc::Sender<anyhow::Result<()>>,
    ) -> anyhow::Result<(Tally, Faults)> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = Rc::new(ReceiverThread::new(self, shared));
        LocalSet::new().block_on(&runtime, async {
            let mut tasks = Vec::new();
            for stream in (index..self.streams).step_by(threads) {
                match tokio::time::timeout(OPEN_TIMEOUT, Receiver::open(self, stream as u64)).await {
                    Ok(Ok(receiver)) => tasks.push(tokio::task::spawn_local(receiver.run(Rc::clone(&thread)))),
                    Ok(Err(error)) => return report_unopened(ready, &error.context(format!("stream {stream}"))),
                    Err(_) => {
                        return report_unopened(
                            ready,
                            &anyhow!("stream {stream} was not answered within {OPEN_TIMEOUT:?}"),
                        );
                    }
                }
            }
            ready.send(Ok(())).context("nobody waits for the streams")?;
            for task in tasks {
                task.await.context("a stream's task panicked")??;
            }
            Ok(())
        })?;
        Ok((thread.tally.borrow().clone(), *thread.faults.borrow()))
    }
}

fn report_unopened(ready: &mpsc::Sender<anyhow::Result<()>>, error: &anyhow::Error) -> anyhow::Result<()> {
    // Nobody listens after the first failure, which has been told then.
    ready.send(Err(anyhow!("{error:#}"))).ok();
    bail!("{error:#}")
}

/// Writes a key and tells the revision it got.
pub(super) fn revision_of_a_write(endpoint: &Endpoint) -> anyhow::Result<u64> {
    let mut stream = BlockingStream::connect(&endpoint.authority).context("cannot connect")?;
    let mut request = Vec::new();
    endpoint.request(&mut request, "PUT", "/v1/state/bench:before", b"{\"value\":0}");
    let answer = exchange(&mut stream, &request)?;
    number_after(&answer, b"\"revision\":").context("an answer without a revision")
}

/// Sends a request and reads the answer, which must be a success.
fn exchange(stream: &mut BlockingStream, request: &[u8]) -> anyhow::Result<Vec<u8>> {
    stream.write_all(request)?;
    let (mut input, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let read = stream.read(&mut part)?;
        ensure!(read > 0, "the server closed the connection");
        input.extend_from_slice(&part[..read]);
        if let Some(head) = Head::parse(&input)?
            && input.len() >= head.head_bytes + head.body_bytes
        {
            ensure!((200..300).contains(&head.status), "{}", String::from_utf8_lossy(&input));
            return Ok(input);
        }
    }
}

/// What all threads of the phase share.
#[derive(Debug, Default)]
struct Shared {
    start: std::sync::OnceLock<Instant>,
    delivered: AtomicU64,
    /// Told when what is still missing counts as lost.
    over: Notify,
}

/// What the streams of one thread share.
struct ReceiverThread {
    load: StreamLoad,
    shared: Arc<Shared>,
    tally: RefCell<Tally>,
    faults: RefCell<Faults>,
    input: RefCell<Vec<u8>>,
    text: RefCell<Vec<u8>>,
}

impl ReceiverThread {
    fn new(load: &StreamLoad, shared: &Arc<Shared>) -> Self {
        Self {
            load: load.clone(),
            shared: Arc::clone(shared),
            tally: RefCell::new(Tally::new()),
            faults: RefCell::default(),
            input: RefCell::new(vec![0; READ_BYTES]),
            text: RefCell::default(),
        }
    }

    /// Takes what a socket has: false when it has ended.
    fn take(&self, receiver: &mut Receiver) -> anyhow::Result<bool> {
        let mut input = self.input.borrow_mut();
        let read = match receiver.stream.try_read(&mut input) {
            Ok(0) => return Ok(false),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error).context("a stream broke"),
        };
        self.account(receiver, &input[..read])?;
        Ok(!receiver.chunks.is_ended())
    }

    /// Enters what was left and what has come into the stream's ledger.
    fn account(&self, receiver: &mut Receiver, input: &[u8]) -> anyhow::Result<()> {
        let now = Instant::now();
        let mut text = self.text.borrow_mut();
        text.clear();
        text.append(&mut receiver.rest);
        receiver.chunks.decode(input, &mut text)?;
        let mut tally = self.tally.borrow_mut();
        let (mut at, mut count) = (0, 0);
        while let Some(bytes) = frame_bytes(&text[at..], &mut receiver.last_frame_bytes) {
            if let Some(sequence) = receiver.ledger.enter(&text[at..at + bytes])? {
                let start = self.shared.start.get().context("an event before the first was published")?;
                tally.record(now.saturating_duration_since(self.load.due(*start, sequence)));
                tally.elapsed = start.elapsed();
                count += 1;
            }
            at += bytes;
        }
        self.shared.delivered.fetch_add(count, Ordering::Relaxed);
        receiver.rest.extend_from_slice(&text[at..]);
        Ok(())
    }
}

/// One open stream.
struct Receiver {
    stream: TcpStream,
    chunks: ChunkDecoder,
    /// The beginning of a frame whose end has not arrived.
    rest: Vec<u8>,
    last_frame_bytes: usize,
    ledger: Ledger,
}

impl Receiver {
    /// Returns when the first frame is there: from then on the server owes it every event.
    async fn open(load: &StreamLoad, stream: u64) -> anyhow::Result<Self> {
        let request = load.subscribe_request(stream);
        let mut socket = TcpStream::connect(&load.endpoint.authority).await.context("cannot connect")?;
        socket.set_nodelay(true)?;
        socket.write_all(&request).await?;
        let (mut input, mut text, mut chunks) = (Vec::new(), Vec::new(), ChunkDecoder::default());
        let mut head: Option<Head> = None;
        while !text.ends_with(b"\n\n") {
            socket.readable().await?;
            let before = input.len();
            match socket.try_read_buf(&mut input) {
                Ok(0) => bail!("the server closed it at once: {}", String::from_utf8_lossy(&input)),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            if head.is_some() {
                chunks.decode(&input[before..], &mut text)?;
            } else if let Some(found) = Head::parse(&input)? {
                ensure!(found.status == 200, "it was refused: {}", String::from_utf8_lossy(&input));
                if load.peer == Peer::Nchan {
                    // Not chunked: the body ends with the connection.
                    chunks.state = ChunkState::Data(usize::MAX);
                }
                chunks.decode(&input[found.head_bytes..], &mut text)?;
                head = Some(found);
            }
        }
        Ok(Self { stream: socket, chunks, rest: text, last_frame_bytes: 0, ledger: load.ledger(stream) })
    }

    async fn run(mut self, thread: Rc<ReceiverThread>) -> anyhow::Result<()> {
        thread.account(&mut self, &[])?;
        let mut ended = false;
        let mut over = std::pin::pin!(thread.shared.over.notified());
        while !ended && !self.ledger.is_complete() {
            tokio::select! {
                biased;
                readable = self.stream.readable() => {
                    readable?;
                    ended = !thread.take(&mut self)?;
                }
                () = &mut over => break,
            }
        }
        let mut faults = self.ledger.close();
        faults.ended += u64::from(ended);
        thread.faults.borrow_mut().join(&faults);
        Ok(())
    }
}

/// The length of the first frame of `text` with its empty line; `None` when its end is missing. Most frames are as long
/// as the one before, which saves the search.
fn frame_bytes(text: &[u8], last: &mut usize) -> Option<usize> {
    if *last >= 2 && text.get(*last - 2..*last) == Some(b"\n\n") {
        return Some(*last);
    }
    let end = text.windows(2).position(|w| w == b"\n\n")? + 2;
    *last = end;
    Some(end)
}

/// What one stream has received and still expects.
#[derive(Debug)]
struct Ledger {
    /// The next sequence number of each publisher.
    next: Vec<u64>,
    /// From one sequence number of a publisher to its next.
    step: u64,
    /// Sequence numbers there will be, all together.
    events: u64,
    peer: Peer,
    last_id: u64,
    faults: Faults,
}

impl Ledger {
    /// Accounts for a frame; the sequence number if it is an event of ours.
    fn enter(&mut self, frame: &[u8]) -> anyhow::Result<Option<u64>> {
        let is_event = match self.peer {
            Peer::Kiss => frame.starts_with(b"event: state_updated\n"),
            Peer::Nchan => frame.contains(&b'@'),
        };
        self.faults.resets += u64::from(frame.starts_with(b"event: reset\n"));
        if !is_event {
            return Ok(None);
        }
        if self.peer == Peer::Kiss {
            let id = number_after(frame, b"\nid: ")
                .with_context(|| format!("an event without an id: {}", String::from_utf8_lossy(frame)))?;
            self.faults.ids_not_increasing += u64::from(id <= self.last_id);
            self.last_id = id;
        }
        let marker = frame.iter().rposition(|&b| b == b'@');
        let sequence = marker.and_then(|at| number(&frame[at + 1..])).context("an event that nobody published")?;
        let slot = (sequence % self.next.len() as u64) as usize;
        let next = &mut self.next[slot];
        if sequence < *next {
            self.faults.out_of_order += 1;
        } else {
            self.faults.lost += (sequence - *next) / self.step;
            *next = sequence + self.step;
        }
        Ok(Some(sequence))
    }

    fn is_complete(&self) -> bool {
        self.next.iter().all(|&next| next >= self.events)
    }

    /// What never came is lost.
    fn close(self) -> Faults {
        let missing = self.next.iter().map(|&next| self.events.saturating_sub(next).div_ceil(self.step));
        Faults { lost: self.faults.lost + missing.sum::<u64>(), ..self.faults }
    }
}

fn number(text: &[u8]) -> Option<u64> {
    let digits = text.iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(&text[..digits]).ok()?.parse().ok()
}

fn number_after(text: &[u8], name: &[u8]) -> Option<u64> {
    let at = text.windows(name.len()).position(|w| w == name)?;
    number(&text[at + name.len()..])
}

/// Undoes `transfer-encoding: chunked` (RFC 9112, 7.1), however the bytes are cut.
#[derive(Debug, Default)]
struct ChunkDecoder {
    state: ChunkState,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ChunkState {
    /// Reading a size; what it is so far.
    #[default]
    Start,
    Size(usize),
    /// In a chunk; bytes to go.
    Data(usize),
    /// Behind a chunk, before its line feed.
    DataEnd,
    Ended,
}

impl ChunkDecoder {
    fn is_ended(&self) -> bool {
        self.state == ChunkState::Ended
    }

    fn decode(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> anyhow::Result<()> {
        while let Some(&byte) = input.first() {
            let mut used = 1;
            self.state = match self.state {
                ChunkState::Ended => return Ok(()),
                ChunkState::Data(left) => {
                    used = left.min(input.len());
                    out.extend_from_slice(&input[..used]);
                    if used == left { ChunkState::DataEnd } else { ChunkState::Data(left - used) }
                }
                ChunkState::DataEnd if byte == b'\n' => ChunkState::Start,
                ChunkState::Size(0) if byte == b'\n' => ChunkState::Ended,
                ChunkState::Size(size) if byte == b'\n' => ChunkState::Data(size),
                state if byte == b'\r' => state,
                ChunkState::Start => ChunkState::Size(hex(byte)?),
                ChunkState::Size(size) => ChunkState::Size(size << 4 | hex(byte)?),
                ChunkState::DataEnd => bail!("a chunk is longer than it says"),
            };
            input = &input[used..];
        }
        Ok(())
    }
}

fn hex(byte: u8) -> anyhow::Result<usize> {
    char::from(byte).to_digit(16).map(|d| d as usize).with_context(|| format!("byte {byte} in the size of a chunk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined_wherever_the_bytes_are_cut() {
        let wire = b"3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n";
        for cut in 0..wire.len() {
            let (mut decoder, mut out) = (ChunkDecoder::default(), Vec::new());
            decoder.decode(&wire[..cut], &mut out).unwrap();
            decoder.decode(&wire[cut..], &mut out).unwrap();
            assert_eq!(out, b"abc0123456789abcdef", "cut at {cut}");
            assert!(decoder.is_ended());
        }
        assert!(ChunkDecoder::default().decode(b"1\r\nab", &mut Vec::new()).is_err());
    }

    #[test]
    fn frames_are_found_whether_or_not_they_are_as_long_as_the_last() {
        let text = b"id: 1\n\nid: 2\n\nid: 10\n\nid: 3";
        let (mut at, mut last, mut lengths) = (0, 0, Vec::new());
        while let Some(bytes) = frame_bytes(&text[at..], &mut last) {
            lengths.push(bytes);
            at += bytes;
        }
        assert_eq!(lengths, [7, 7, 8]);
    }

    fn frame(id: u64, sequence: u64) -> Vec<u8> {
        format!("event: state_updated\nid: {id}\ndata: {{\"value\":\"xx@{sequence}\"}}\n\n").into_bytes()
    }

    fn faults_of(mut ledger: Ledger, received: &[(u64, u64)]) -> Faults {
        for &(id, sequence) in received {
            assert_eq!(ledger.enter(&frame(id, sequence)).unwrap(), Some(sequence));
        }
        ledger.close()
    }

    #[test]
    fn a_lost_repeated_or_reordered_event_does_not_go_unseen() {
        let load = StreamLoad {
            endpoint: Endpoint::new("http://h:1", None).unwrap(),
            streams: 2,
            threads: 1,
            publishers: 1,
            rate: 4.0,
            events: 4,
            resume_after: None,
            stuck: 0,
            peer: Peer::Kiss,
            value_bytes: 10,
            own_keys: false,
        };
        let one = |received: &[(u64, u64)]| faults_of(load.ledger(0), received);
        let none = Faults::default();
        assert!(one(&[(5, 0), (6, 1), (7, 2), (9, 3)]).is_none());
        assert_eq!(one(&[(5, 0), (6, 1), (7, 2)]), Faults { lost: 1, ..none });
        assert_eq!(one(&[(5, 0), (6, 1), (9, 3)]), Faults { lost: 1, ..none });
        assert_eq!(one(&[(5, 0), (6, 1), (7, 1), (8, 2), (9, 3)]), Faults { out_of_order: 1, ..none });
        assert_eq!(one(&[(5, 0), (6, 1), (6, 2), (9, 3)]), Faults { ids_not_increasing: 1, ..none });
        let two = StreamLoad { publishers: 2, ..load.clone() };
        assert!(faults_of(two.ledger(0), &[(1, 1), (2, 0), (3, 2), (4, 3)]).is_none());
        let own = StreamLoad { own_keys: true, ..load };
        assert!(faults_of(own.ledger(1), &[(2, 1), (4, 3)]).is_none());
        assert_eq!(faults_of(own.ledger(1), &[(4, 3)]), Faults { lost: 1, ..none });
    }
}
