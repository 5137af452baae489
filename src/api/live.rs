//! A stream over HTTP/1.1 behind the head of its answer: the socket and the stream, nothing else.
//!
//! ```text
//! hyper: request ─▶ handler ─▶ head of the answer ─written─▶ Live: chunk, chunk, … end
//!                                   └── EventStream waits in a Handoff ──┘
//! ```
//!
//! hyper keeps two buffers of 8 KiB and the state of every handler for as long as a connection lives: 35 KiB for a stream
//! that says nothing. So it parses the request and writes the head, and gives its socket back: its body is parked, and once
//! the head is flushed the connection is taken apart. A stream over HTTP/2 shares its connection and stays with hyper.

use super::events::EventStream;
use super::offer;
use super::serve::Connected;
use bytes::{Buf, Bytes};
use futures_util::future::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use http_body::Frame;
use parking_lot::Mutex;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

/// Chunks written before other tasks of the thread get their turn.
const CHUNKS_PER_POLL: usize = 4;
/// What a client may send behind a request whose answer never ends, before it is cut off.
const IGNORED_BYTES_MAX: usize = 16 << 10;
/// What ends a chunked body.
const END: &[u8] = b"0\r\n\r\n";
/// Up to so many bytes, an answer's head and body are copied into one piece: that is dearer for the kernel in two.
const ONE_PIECE: usize = 1024;

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

    /// The stream, once.
    #[must_use]
    pub fn take(&self) -> Option<EventStream> {
        self.0.lock().take()
    }
}

/// Between a connection's handler, hyper and whoever polls it; all on one task, one after the other.
#[derive(Debug, Default)]
pub struct Handoff {
    stream: Mutex<Option<EventStream>>,
    is_parked: AtomicBool,
    is_flushed: AtomicBool,
    has_read: AtomicBool,
}

impl Handoff {
    /// Keeps a stream and returns the body that stands in for it.
    pub fn park(self: &Arc<Self>, stream: EventStream) -> Parked {
        *self.stream.lock() = Some(stream);
        Parked(Arc::clone(self))
    }

    /// The stream, when hyper has written everything up to it. To be asked when hyper has nothing to do.
    pub fn take(&self) -> Option<EventStream> {
        let is_ready = self.is_parked() && self.is_flushed.load(Ordering::Relaxed);
        is_ready.then(|| self.stream.lock().take()).flatten()
    }

    /// Whether it became a stream.
    pub fn is_parked(&self) -> bool {
        self.is_parked.load(Ordering::Relaxed)
    }

    /// Whether hyper has been given anything of what the client sent, or its end.
    pub fn has_read(&self) -> bool {
        self.has_read.load(Ordering::Relaxed)
    }
}

/// A body that never says anything, and notes that hyper asked: the head is in its buffer then.
#[derive(Debug)]
pub struct Parked(Arc<Handoff>);

impl http_body::Body for Parked {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.is_parked.store(true, Ordering::Relaxed);
        Poll::Pending
    }
}

/// hyper's side of the socket: notes whether all it was given is written.
#[derive(Debug)]
pub struct Socket<I> {
    io: I,
    handoff: Arc<Handoff>,
}

impl<I> Socket<I> {
    /// Over a connected socket, or a TLS session on one.
    #[must_use]
    pub fn new(io: I, handoff: Arc<Handoff>) -> Self {
        Self { io, handoff }
    }

    /// The socket again.
    #[must_use]
    pub fn into_inner(self) -> I {
        self.io
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Socket<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.handoff.has_read.store(true, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Socket<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.handoff.is_flushed.store(false, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.handoff.is_flushed.store(false, Ordering::Relaxed);
        let length = slices.iter().map(|slice| slice.len()).sum::<usize>();
        if length <= ONE_PIECE {
            let mut piece = [0; ONE_PIECE];
            let mut at = 0;
            for slice in slices {
                piece[at..at + slice.len()].copy_from_slice(slice);
                at += slice.len();
            }
            return Pin::new(&mut self.io).poll_write(cx, &piece[..length]);
        }
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    // hyper flushes when its own buffer is empty.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        self.handoff.is_flushed.store(true, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Writes a stream to its socket until one of them ends. Small on purpose: there may be ten thousand.
#[derive(Debug)]
pub struct Live {
    tcp: TcpStream,
    stream: EventStream,
    /// What is left of the chunk on its way.
    chunk: Bytes,
    is_ending: bool,
    ignored: usize,
    _connected: Connected,
}

impl Live {
    /// Goes on where the head of the answer ended.
    #[must_use]
    pub fn new(tcp: TcpStream, stream: EventStream, connected: Connected) -> Self {
        Self { tcp, stream, chunk: Bytes::new(), is_ending: false, ignored: 0, _connected: connected }
    }

    /// Writes what is left of the chunk.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.chunk.is_empty() {
            ready!(self.tcp.poll_write_ready(cx))?;
            let sent = self.tcp.try_write(&self.chunk);
            offer::note_sent(*sent.as_ref().unwrap_or(&0));
            match sent {
                // Freed here: a stream that is level keeps nothing.
                Ok(count) if count == self.chunk.len() => self.chunk = Bytes::new(),
                Ok(count) => self.chunk.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
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
                Poll::Pending => return self.poll_gone(cx),
            }
            match self.stream.poll_chunk(cx, true) {
                Poll::Ready(Some(chunk)) => self.chunk = chunk,
                Poll::Ready(None) => {
                    self.is_ending = true;
                    self.chunk = Bytes::from_static(END);
                }
                Poll::Pending => return self.poll_gone(cx),
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
/// (`docs/benchmarks.md`). With a task for each stream, an event was a thousand times handed to the runtime from outside, each
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
        while let Poll::Ready(Some(_)) = streams.poll_next_unpin(cx) {}
        Poll::Pending
    })
    .await;
}
