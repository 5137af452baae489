//! A stream over HTTP/1.1 behind the head of its answer: the socket and the stream, nothing else.
//!
//! ```text
//! whole.rs: request ─▶ handler ─▶ head of the answer ─written─▶ Live: chunk, chunk, … end
//!                                    └──────── EventStream ─────────┘
//! ```
//!
//! hyper keeps two buffers of 8 KiB and the state of every handler for as long as a connection lives: 35 KiB for a stream
//! that says nothing. So one whose request came whole is behind its head a socket and a stream, nothing more. A stream over
//! HTTP/2 shares its connection and stays with hyper, as one over TLS does, and one on a connection that hyper has already.

use super::events::EventStream;
use super::offer;
use super::serve::{Connected, STALL_TIMEOUT, set_patience};
use axum::http::header;
use axum::response::Response;
use bytes::{Buf, Bytes};
use futures_util::future::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsRawFd;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Sleep};

/// Chunks written before other tasks of the thread get their turn.
const CHUNKS_PER_POLL: usize = 4;
/// What a client may send behind a request whose answer never ends, before it is cut off.
const IGNORED_BYTES_MAX: usize = 16 << 10;
/// How often it is looked whether a reader that has much to take takes anything.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Bytes that a reader with a window of the usual size takes at once.
const MANY_BYTES: u64 = 32 << 10;
/// What ends a chunked body.
pub const END: &[u8] = b"0\r\n\r\n";

/// An answer's stream, in the extensions of the response, until it is known which protocol carries it. One holder at a
/// time; the lock is there because extensions are shared by type.
#[derive(Clone, Debug)]
pub struct Pending(Arc<Mutex<Option<EventStream>>>);

impl Pending {
    /// Holds a stream.
    #[must_use]
    pub fn new(stream: EventStream) -> Self {
        Self(Arc::new(Mutex::new(Some(stream))))
    }
}

/// Whether an answer has a stream.
#[must_use]
pub fn is_stream(response: &Response) -> bool {
    response.extensions().get::<Pending>().is_some()
}

/// The stream of an answer that has one. axum took its empty body for the whole.
#[must_use]
pub fn take_stream(response: &mut Response) -> Option<EventStream> {
    let stream = response.extensions_mut().remove::<Pending>()?.0.lock().take()?;
    response.headers_mut().remove(header::CONTENT_LENGTH);
    Some(stream)
}

/// Writes a stream to its socket until one of them ends. Small on purpose: there may be ten thousand.
#[derive(Debug)]
pub struct Live {
    tcp: TcpStream,
    stream: EventStream,
    /// What is left of the chunk on its way.
    chunk: Bytes,
    /// Bytes handed to the kernel, and how many there were when it was last asked how many of them are left.
    sent: u64,
    asked_at: u64,
    /// While the kernel has bytes for a reader that was waited for, or that has let many come together.
    reader: Option<Box<Reader>>,
    is_ending: bool,
    ignored: usize,
    _connected: Connected,
}

/// A reader that has much to take. The kernel's own patience ([`set_patience`]) does not do for it: where the window is smaller than
/// what lies ready to be sent, Linux takes one that opens again and again for one that stays closed.
#[derive(Debug)]
struct Reader {
    /// When to look at it again.
    look: Pin<Box<Sleep>>,
    /// Bytes it had taken at the last look.
    taken: u64,
    /// The last look at which it had taken more.
    since: Instant,
}

/// Bytes the kernel still has for the other side.
fn untaken(tcp: &TcpStream) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the socket is open, and the call writes one `c_int`, which outlives it.
    let result = unsafe { libc::ioctl(tcp.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    // Where the system cannot tell, what was handed to it counts as taken.
    if result == 0 { u64::try_from(bytes).unwrap_or(0) } else { 0 }
}

impl Live {
    /// Goes on where the head of the answer ended.
    #[must_use]
    pub fn new(tcp: TcpStream, stream: EventStream, connected: Connected) -> Self {
        Self {
            tcp,
            stream,
            chunk: Bytes::new(),
            sent: 0,
            asked_at: 0,
            reader: None,
            is_ending: false,
            ignored: 0,
            _connected: connected,
        }
    }

    /// Writes what is left of the chunk.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.chunk.is_empty() {
            let sent = self.tcp.try_write(&self.chunk);
            let count = *sent.as_ref().unwrap_or(&0);
            offer::note_sent(count);
            self.sent += count as u64;
            match sent {
                // Freed here: a stream that is level keeps nothing.
                Ok(count) if count == self.chunk.len() => self.chunk = Bytes::new(),
                Ok(count) => self.chunk.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.tcp.poll_write_ready(cx))?,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Nothing can be sent now, or there is nothing to send: ready when nobody will take it.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.reader.is_none() && (!self.chunk.is_empty() || self.has_let_many_come()) {
            set_patience(&self.tcp, None);
            let look = Box::pin(tokio::time::sleep(LOOK_EVERY));
            let taken = self.sent.saturating_sub(untaken(&self.tcp));
            self.reader = Some(Box::new(Reader { look, taken, since: Instant::now() }));
        }
        if self.poll_stuck(cx).is_ready() {
            // What the kernel still has must not stay with it for its own timeouts.
            set_patience(&self.tcp, Some(LOOK_EVERY));
            return Poll::Ready(());
        }
        self.poll_gone(cx)
    }

    /// Asks only now and then: it is a call to the system.
    fn has_let_many_come(&mut self) -> bool {
        if self.sent - self.asked_at < MANY_BYTES {
            return false;
        }
        self.asked_at = self.sent;
        untaken(&self.tcp) >= MANY_BYTES
    }

    /// Ready when the reader has taken nothing for long.
    fn poll_stuck(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(reader) = &mut self.reader else { return Poll::Pending };
        while reader.look.as_mut().poll(cx).is_ready() {
            let (now, left) = (Instant::now(), untaken(&self.tcp));
            let taken = self.sent.saturating_sub(left);
            if left == 0 {
                self.reader = None;
                set_patience(&self.tcp, Some(STALL_TIMEOUT));
                break;
            }
            if taken > reader.taken {
                (reader.taken, reader.since) = (taken, now);
                self.stream.note_taken();
            } else if now - reader.since >= STALL_TIMEOUT {
                return Poll::Ready(());
            }
            reader.look.as_mut().reset(now + LOOK_EVERY);
        }
        Poll::Pending
    }

    /// Ready when the client has gone, or talks where it should listen.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut ignored = [0; 512];
        while ready!(self.tcp.poll_read_ready(cx)).is_ok() {
            match self.tcp.try_read(&mut ignored) {
                Ok(count @ 1..) if self.ignored < IGNORED_BYTES_MAX => self.ignored += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(_) | Err(_) => return Poll::Ready(()),
            }
        }
        Poll::Ready(())
    }

    /// Writes what there is; ready when the stream or its socket has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..CHUNKS_PER_POLL {
            match self.poll_write(cx) {
                Poll::Ready(Ok(())) if self.is_ending => return Poll::Ready(()),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return self.poll_idle(cx),
            }
            match self.stream.poll_chunk(cx, true) {
                Poll::Ready(Some(chunk)) => self.chunk = chunk,
                Poll::Ready(None) => {
                    self.is_ending = true;
                    self.chunk = Bytes::from_static(END);
                }
                Poll::Pending => return self.poll_idle(cx),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Threads of their own for streams over HTTP/1.1, each with a runtime of one thread and all its streams in one task.
///
/// An event for a thousand streams is a thousand sends, one after the other whoever does them. Spread over the threads that
/// serve requests they stood in front of requests, and in each other's way: on two cores one thread delivers sooner
/// (`docs/experiments.md`). With a task for each stream, an event was a thousand times handed to the runtime from outside, each
/// time with a write to wake the thread; one task is woken once, and its streams queue within it.
#[derive(Debug)]
pub struct StreamThreads {
    threads: Vec<StreamThread>,
    next: AtomicUsize,
    /// Dropped last: ends the threads and what still runs on them.
    _stop: watch::Sender<()>,
}

#[derive(Debug)]
struct StreamThread {
    runtime: Handle,
    /// Streams that begin. At most as many as there are connections.
    begun: mpsc::UnboundedSender<Live>,
}

impl StreamThreads {
    /// Starts so many threads, at least one.
    pub fn start(threads: usize) -> io::Result<Self> {
        let (stop, stopped) = watch::channel(());
        let start = |number: usize| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let handle = runtime.handle().clone();
            let (begun, begins) = mpsc::unbounded_channel();
            let mut stopped = stopped.clone();
            let run = move || {
                runtime.block_on(async {
                    // tokio's budget is for one connection, this task has thousands.
                    let streams = tokio::task::unconstrained(serve_streams(begins));
                    tokio::select! {
                        _ = stopped.changed() => {}
                        () = streams => {}
                    }
                });
                runtime.shutdown_background();
            };
            std::thread::Builder::new().name(format!("streams-{number}")).spawn(run)?;
            Ok(StreamThread { runtime: handle, begun })
        };
        let threads = (0..threads.max(1)).map(start).collect::<io::Result<_>>()?;
        Ok(Self { threads, next: AtomicUsize::new(0), _stop: stop })
    }

    /// Gives a stream to one of the threads.
    pub fn spawn(&self, tcp: TcpStream, stream: EventStream, connected: Connected) {
        let thread = &self.threads[self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len()];
        // The socket has to be known to that thread's runtime.
        let _entered = thread.runtime.enter();
        match tcp.into_std().and_then(TcpStream::from_std) {
            // The thread ends only with the server.
            Ok(tcp) => drop(thread.begun.send(Live::new(tcp, stream, connected))),
            Err(error) => tracing::warn!(%error, "a stream could not begin"),
        }
    }
}

/// Takes in streams and serves them, until no more can begin.
async fn serve_streams(mut begins: mpsc::UnboundedReceiver<Live>) {
    // One that panics ends alone.
    let serve = |mut live: Live| AssertUnwindSafe(poll_fn(move |cx| live.poll(cx))).catch_unwind();
    let mut streams = FuturesUnordered::new();
    poll_fn(|cx| {
        while let Poll::Ready(begun) = begins.poll_recv(cx) {
            let Some(live) = begun else { return Poll::Ready(()) };
            streams.push(serve(live));
        }
        // Those that ended need nothing more.
        while let Poll::Ready(Some(_)) = streams.poll_next_unpin(cx) {
            offer::note_ended();
        }
        Poll::Pending
    })
    .await;
}
