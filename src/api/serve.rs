//! Connections: an accept loop of our own over hyper-util, because every limit on a connection belongs to us.
//!
//! - Heads must arrive within [`HEAD_TIMEOUT`], bodies within a timeout of their own (`extract.rs`).
//! - A reader that accepts no byte for [`STALL_TIMEOUT`] is cut, a stream's by `live.rs`, others by the kernel; over HTTP/2, where a connection
//!   can live on while one of its answers stands still, the connection is cut after twice that.
//! - Beyond `max_connections` a connection is answered 503 and closed (with a certificate only closed), so that the rest goes on.
//! - HTTP/1.1 and, by prior knowledge, HTTP/2 without TLS; with a certificate both over TLS, as ALPN says.
//! - Connections are accepted, and wait for their first bytes, on a runtime of one thread. From there a few at a time go to the
//!   threads that serve requests: when thousands of streams come back at once they wait in a line of their own, and
//!   not in front of whoever is connected already, nor of connections that want something else.
//!
//! On a stop: no more connections are accepted, streams end, what was begun is finished within [`DRAIN_TIMEOUT`].

use super::auth::NoPlace;
use super::error::ApiError;
use super::extract::Head;
use super::live::{StreamThreads, take_stream};
use super::whole::{self, Served};
use super::{App, Service, rest};
use crate::error::Rejection;
use axum::body::Body;
use axum::http::{HeaderValue, Method, Version, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;

/// A request's head must be complete by then; keeps slow senders from holding connections.
/// Also how long a connection may be idle between requests, at least: [`whole`] looks after twice that at the latest.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// A connection whose peer takes no byte for this long is cut.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// What was begun may take this long after a stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections the kernel holds until they are accepted.
const BACKLOG: u32 = 4096;
/// Connections on their way to the threads that serve requests: so many that ask for events, and as many others.
const TURNS: usize = 8;
/// A stream that began with its connection keeps its turn for so long (the timer makes 1 to 2 ms of it): 4,000 to 5,000 in a second. With no
/// pause the threads between a connection and its stream wake each other for microseconds at a time for as long as there are
/// more, and Linux lets its own thread behind a sync wait meanwhile, 60 ms and longer: each write with it.
const STREAM_TURN: Duration = Duration::from_millis(1);
/// How a request for events begins: a stream, or a page.
const ASKS_FOR_EVENTS: &[u8] = b"GET /v1/events";
/// How often, and how many times, it is looked whether a connection's first one or two bytes have become more.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const LOOKS: usize = 100;
/// How long a client that sends no more has to take the last answer of a connection and to end its side, or one that is refused
/// for there being too many.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a client that goes on sending what nobody wants, the rest of a large body, has to come to its end and read the answer.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is told that no connection can be accepted: tried twenty times a second, it would fill the log.
const TOLD_EVERY: Duration = Duration::from_secs(10);
/// Connections that are being told that there are too many.
const REFUSALS_MAX: usize = 64;
/// Largest request head; keys and filters travel in it. Also hyper's largest buffer, and the largest body that [`whole`] takes.
pub const HEAD_BYTES_MAX: usize = 64 << 10;
/// Pieces in which an HTTP/2 answer is handed over, those of its frames. One that moves on by less in twice [`STALL_TIMEOUT`] is cut.
const WATCHED_BYTES: usize = 16 << 10;
/// Streams one HTTP/2 connection may have open.
const H2_STREAMS_MAX: u32 = 256;

/// Takes the address; nobody is let in before [`listen`].
pub fn bind(address: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restarted server must not wait for the old connections' TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Has the kernel hold connections until they are accepted.
pub fn listen(socket: TcpSocket) -> std::io::Result<TcpListener> {
    socket.listen(BACKLOG)
}

/// Raises the limit of open files as far as allowed, and returns it.
pub fn raise_file_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // Where this is refused, the lower limit holds and bounds the connections.
    setrlimit(Resource::Nofile, raised).ok();
    crate::engine::open_files_max()
}

/// One of the open connections, as long as it lives.
#[derive(Debug)]
pub struct Connected {
    app: App,
    /// Whose, where there is a limit by address.
    address: Option<IpAddr>,
    /// Closed when the last connection is gone.
    _alive: mpsc::Sender<Infallible>,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.app.connections.fetch_sub(1, Ordering::Relaxed);
        if let Some(address) = self.address {
            self.app.auth.connection_gone(address);
        }
    }
}

/// Where connections live once they have begun to speak.
#[derive(Debug)]
pub struct Runtimes {
    /// Threads that serve requests.
    pub requests: Handle,
    /// Threads for streams.
    pub streams: StreamThreads,
}

/// What a connection needs, shared by all.
struct Server {
    service: Service,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    tls: Option<TlsAcceptor>,
    runtimes: Runtimes,
    other_turns: Arc<Semaphore>,
    stream_turns: Arc<Semaphore>,
    stop: watch::Receiver<bool>,
}

/// Serves until `stop` turns true, then drains. Accepts on this runtime, answers on the others.
pub async fn serve(
    listener: TcpListener,
    service: Service,
    app: App,
    max_connections: usize,
    tls: Option<TlsAcceptor>,
    runtimes: Runtimes,
    mut stop: watch::Receiver<bool>,
) {
    let mut http1 = http1::Builder::new();
    http1.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX);
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .keep_alive_timeout(STALL_TIMEOUT);
    let [other_turns, stream_turns] = [(); 2].map(|()| Arc::new(Semaphore::new(TURNS)));
    let server =
        Arc::new(Server { service, http1, http2, tls, runtimes, other_turns, stream_turns, stop: stop.clone() });
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    let (alive, mut all_gone) = mpsc::channel(1);
    let mut told = None;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of files, say. The connection waits in the kernel; give others time to go.
                if told.is_none_or(|told: Instant| told.elapsed() > TOLD_EVERY) {
                    told = Some(Instant::now());
                    tracing::warn!(%error, "cannot accept a connection");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let is_refused = app.connections.fetch_add(1, Ordering::Relaxed) >= max_connections as u64;
        let address = app.auth.connection_place(peer.ip());
        let mut connected = Connected { app: app.clone(), address: None, _alive: alive.clone() };
        match address {
            Ok(address) => connected.address = address,
            Err(NoPlace) => {
                let refusal = ApiError::RateLimited { what: "connections from this address", retry_after_s: 1 };
                server.refuse(&refusals, tcp, refusal);
                continue;
            }
        }
        if is_refused {
            app.engine.metrics().connections_refused.inc();
            server.refuse(&refusals, tcp, Rejection::Overloaded("too many connections; retry in a moment").into());
            continue;
        }
        tune(&tcp);
        tokio::spawn(Arc::clone(&server).begin(tcp, peer.ip(), connected));
    }
    drop((listener, alive));
    app.engine.feed().drain();
    if tokio::time::timeout(DRAIN_TIMEOUT, all_gone.recv()).await.is_err() {
        tracing::warn!("some connections were still at work and are cut off");
    }
}

impl Server {
    /// Says that there are too many connections, without spending a request on it. While many are being told so, others are
    /// closed without a word: those who are refused must not use up the files that refusing was to save. So are those who
    /// expect TLS, whose handshake it would spoil.
    fn refuse(&self, refusals: &Arc<Semaphore>, stream: TcpStream, refusal: ApiError) {
        if self.tls.is_none()
            && let Ok(place) = Arc::clone(refusals).try_acquire_owned()
        {
            tokio::spawn(async move {
                tell_refusal(stream, refusal).await;
                drop(place);
            });
        }
    }

    /// Waits for a connection's first bytes, and for its turn.
    async fn begin(self: Arc<Self>, tcp: TcpStream, peer: IpAddr, connected: Connected) {
        let mut stop = self.stop.clone();
        // The wait for the first byte is ours, and needs neither a turn nor a thread that serves requests.
        let protocol = tokio::select! {
            protocol = tokio::time::timeout(HEAD_TIMEOUT, self.protocol(&tcp)) => protocol.ok().flatten(),
            _ = stop.wait_for(|stop| *stop) => None,
        };
        let Some(protocol) = protocol else { return };
        let turns = if protocol == Protocol::Events { &self.stream_turns } else { &self.other_turns };
        let turn = tokio::select! {
            turn = Arc::clone(turns).acquire_owned() => turn.ok(),
            _ = stop.wait_for(|stop| *stop) => None,
        };
        let Some(turn) = turn else { return };
        // Without the runtime it was accepted on. What fails here is a connection that is gone.
        let Ok(tcp) = tcp.into_std() else { return };
        let requests = self.runtimes.requests.clone();
        requests.spawn(async move {
            if let Ok(tcp) = TcpStream::from_std(tcp) {
                self.connection(tcp, protocol, peer, connected, turn).await;
            }
        });
    }

    /// Waits for the first bytes and tells which protocol they begin; `None` when there are none.
    async fn protocol(&self, tcp: &TcpStream) -> Option<Protocol> {
        let mut first = [0; ASKS_FOR_EVENTS.len()];
        for _ in 0..LOOKS {
            let count = tcp.peek(&mut first).await.ok().filter(|&count| count > 0)?;
            if self.tls.is_some() {
                return Some(Protocol::Tls);
            }
            if let Some(protocol) = Protocol::of(&first[..count]) {
                return Some(protocol);
            }
            // Less than three bytes in the first packet: nobody does. An end behind them is not seen by peeking.
            if tcp.ready(Interest::READABLE).await.ok()?.is_read_closed() {
                return None;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Some(Protocol::Http1)
    }

    async fn connection(
        &self,
        mut tcp: TcpStream,
        protocol: Protocol,
        peer: IpAddr,
        connected: Connected,
        turn: OwnedSemaphorePermit,
    ) {
        let service = self.service.of(peer);
        match protocol {
            Protocol::Http1 | Protocol::Events => {
                let mut turn = Some(turn);
                // Its turn is over when what its client had sent is read and seen to: told by the socket only behind the
                // thread's other tasks, many would come at once otherwise, and stand in front of requests all the same.
                let seen = |is_stream| {
                    let turn = turn.take();
                    if is_stream && protocol == Protocol::Events {
                        tokio::spawn(async move {
                            tokio::time::sleep(STREAM_TURN).await;
                            drop(turn);
                        });
                    }
                };
                match whole::serve(&mut tcp, &service, self.stop.clone(), seen).await {
                    Served::Over => {}
                    Served::Stream(stream) => self.runtimes.streams.spawn(tcp, stream, connected),
                    Served::Rest(rest) => {
                        drop(turn);
                        let (read, write) = tcp.split();
                        let io = tokio::io::join(Rewound { rest, read }, write);
                        Box::pin(self.http1(io, service)).await;
                        Box::pin(close(&mut tcp)).await;
                    }
                }
            }
            // Boxed, so that the many others need not have room for them.
            Protocol::Http2 => {
                drop(turn);
                Box::pin(self.http2(tcp, service)).await;
            }
            Protocol::Tls => {
                drop(turn);
                Box::pin(self.tls(tcp, service)).await;
            }
        }
    }

    async fn tls(&self, tcp: TcpStream, service: Service) {
        let Some(tls) = &self.tls else { return };
        let mut stop = self.stop.clone();
        let shaken = tokio::select! {
            shaken = tokio::time::timeout(HEAD_TIMEOUT, tls.accept(tcp)) => shaken,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        // A handshake that fails is the client's affair.
        let Ok(Ok(mut stream)) = shaken else { return };
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            Box::pin(self.http2(stream, service)).await;
        } else {
            self.http1(&mut stream, service).await;
            Box::pin(close(&mut stream)).await;
        }
    }

    /// Has hyper answer a connection's requests: over TLS, and what is not for [`whole`].
    async fn http1(&self, io: impl AsyncRead + AsyncWrite + Unpin, service: Service) {
        let answer = service_fn(|request: hyper::Request<hyper::body::Incoming>| async {
            Ok::<_, Infallible>(answer_with_body(&service, request).await)
        });
        let mut connection = pin!(self.http1.serve_connection(TokioIo::new(io), answer));
        let mut stop = self.stop.clone();
        tokio::select! {
            // At a stop, too, hyper has to have seen first what has come: it ends a connection that has said nothing.
            biased;
            // A broken connection is the client's affair.
            _ = &mut connection => return,
            _ = stop.wait_for(|stop| *stop) => {}
        }
        connection.as_mut().graceful_shutdown();
        connection.await.ok();
    }

    async fn http2(&self, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, service: Service) {
        // Each answer's last look by hyper, which looks again when the client has taken what there was.
        let looks = Looks::default();
        let noted = looks.clone();
        let answer = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let (service, last) = (service.clone(), noted.begin());
            async move {
                let response = answer_with_body(&service, request).await;
                Ok::<_, Infallible>(response.map(|body| Body::new(Watched::new(body, last))))
            }
        });
        let mut connection = self.http2.serve_connection(TokioIo::new(io), answer);
        let mut stop = self.stop.clone();
        let is_stop = tokio::select! {
            // A broken connection is the client's affair.
            _ = &mut connection => return,
            over = looks.over() => match over {
                Over::Stalled => return,
                Over::Idle => false,
            },
            _ = stop.wait_for(|stop| *stop) => true,
        };
        Pin::new(&mut connection).graceful_shutdown();
        if is_stop && looks.had_requests() {
            // Cut by whoever stops the server, when it takes too long.
            connection.await.ok();
            return;
        }
        // One that has not even sent its preface is not ended by being told. A request that was on its way is answered.
        while tokio::time::timeout(LAST_WORDS_TIMEOUT, &mut connection).await.is_err() {
            if !looks.has_answers() || looks.is_stalled() {
                return;
            }
        }
    }
}

/// When hyper last looked at an answer; `None` while it is being made.
type Look = Mutex<Option<Instant>>;

/// The last looks at each answer of an HTTP/2 connection. A client may open no window for an
/// answer and yet keep its connection alive, so that the kernel's [`STALL_TIMEOUT`] never ends it: then the answer, and what it
/// holds, would stay. Nor does anything else end one that asks for nothing, or never becomes HTTP/2.
/// The lock is held to add an answer and, when there are many and every half minute, to look through them.
#[derive(Clone, Debug, Default)]
struct Looks(Arc<Mutex<Answers>>);

#[derive(Debug, Default)]
struct Answers {
    had_requests: bool,
    looks: Vec<Weak<Look>>,
}

/// Why a connection is to end.
enum Over {
    /// An answer has not been looked at for long.
    Stalled,
    /// There was nothing to answer for long.
    Idle,
}

impl Looks {
    /// A request has come.
    fn begin(&self) -> Arc<Look> {
        let look = Arc::<Look>::default();
        let mut answers = self.0.lock();
        answers.had_requests = true;
        if answers.looks.len() >= 2 * H2_STREAMS_MAX as usize {
            // At least half of them are over.
            answers.looks.retain(|look| look.strong_count() > 0);
        }
        answers.looks.push(Arc::downgrade(&look));
        look
    }

    fn had_requests(&self) -> bool {
        self.0.lock().had_requests
    }

    fn has_answers(&self) -> bool {
        self.0.lock().looks.iter().any(|look| look.strong_count() > 0)
    }

    /// Whether an answer has not been looked at for long. A stream that is well is looked at with each heartbeat.
    fn is_stalled(&self) -> bool {
        let is_stalled = |look: Arc<Look>| {
            let last = *look.lock();
            last.is_some_and(|last| last.elapsed() > 2 * STALL_TIMEOUT)
        };
        self.0.lock().looks.iter().filter_map(Weak::upgrade).any(is_stalled)
    }

    /// Ready when the connection is to end.
    async fn over(&self) -> Over {
        let mut idle_since = Instant::now();
        loop {
            tokio::time::sleep(STALL_TIMEOUT / 2).await;
            if self.is_stalled() {
                return Over::Stalled;
            }
            let looks = &mut self.0.lock().looks;
            // Those that came and went since the last look are still noted.
            if !looks.is_empty() {
                idle_since = Instant::now();
            }
            looks.retain(|look| look.strong_count() > 0);
            if idle_since.elapsed() >= HEAD_TIMEOUT {
                return Over::Idle;
            }
        }
    }
}

/// An answer that notes when it is looked at. It is handed over in pieces: hyper looks for the next when the one before is sent, and
/// what it has been handed nobody can look after.
struct Watched {
    body: Body,
    /// The rest of what the body had ready.
    left: Bytes,
    last: Arc<Look>,
}

impl Watched {
    fn new(body: Body, last: Arc<Look>) -> Self {
        *last.lock() = Some(Instant::now());
        Self { body, left: Bytes::new(), last }
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        *self.last.lock() = Some(Instant::now());
        if self.left.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose()?.map(http_body::Frame::into_data) {
                Some(Ok(data)) => self.left = data,
                Some(Err(other)) => return Poll::Ready(Some(Ok(other))),
                None => return Poll::Ready(None),
            }
        }
        let count = self.left.len().min(WATCHED_BYTES);
        Poll::Ready(Some(Ok(http_body::Frame::data(self.left.split_to(count)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        let (hint, left) = (self.body.size_hint(), self.left.len() as u64);
        let mut sum = http_body::SizeHint::new();
        sum.set_lower(hint.lower() + left);
        if let Some(upper) = hint.upper() {
            sum.set_upper(upper + left);
        }
        sum
    }
}

/// A connection on which something has been read that is to be read again.
struct Rewound<R> {
    rest: Bytes,
    read: R,
}

impl<R: AsyncRead + Unpin> AsyncRead for Rewound<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if self.rest.is_empty() {
            return Pin::new(&mut self.read).poll_read(cx, buf);
        }
        let count = buf.remaining().min(self.rest.len());
        buf.put_slice(&self.rest.split_to(count));
        if self.rest.is_empty() {
            // Even an empty end of it keeps all of it in memory.
            self.rest = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

/// An answer for hyper: a stream is its body.
async fn answer_with_body(service: &Service, request: hyper::Request<hyper::body::Incoming>) -> Response {
    let is_head = request.method() == Method::HEAD;
    let is_http1 = request.version() < Version::HTTP_2;
    let (request, rest) = rest::lend(request);
    let (head, payload) = Head::take(request);
    let mut response = service.answer(head, payload).await.into_response();
    if let Some(stream) = take_stream(&mut response).filter(|_| !is_head) {
        *response.body_mut() = Body::new(stream);
    }
    if !rest.read().await && is_http1 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http1,
    /// HTTP/1.1 too, and its first request is for events.
    Events,
    Http2,
    Tls,
}

impl Protocol {
    /// What begins like this, without TLS; `None` when that is not to be told yet. HTTP/2 begins with `PRI`, which no method of
    /// HTTP/1.1 does.
    fn of(first: &[u8]) -> Option<Self> {
        const PRIOR: &[u8] = b"PRI";
        match first {
            // Who sends less of it at first waits with the others.
            _ if first.starts_with(ASKS_FOR_EVENTS) => Some(Self::Events),
            _ if first.starts_with(PRIOR) => Some(Self::Http2),
            _ if PRIOR.starts_with(first) => None,
            _ => Some(Self::Http1),
        }
    }
}

fn tune(stream: &TcpStream) {
    // Answers are written whole; waiting to fill a segment would only delay them.
    stream.set_nodelay(true).ok();
    // A peer that vanished without a word is noticed in the end.
    rustix::net::sockopt::set_socket_keepalive(stream, true).ok();
    set_patience(stream, Some(STALL_TIMEOUT));
}

/// When the kernel closes a connection whose data the peer does not take, also when its window is closed; `None` leaves that
/// to us.
pub fn set_patience(stream: &TcpStream, patience: Option<Duration>) {
    let patience_ms = patience.map_or(0, |patience| u32::try_from(patience.as_millis()).unwrap_or(u32::MAX));
    // Without it there are the system's timeouts, many minutes.
    rustix::net::sockopt::set_tcp_user_timeout(stream, patience_ms).ok();
}

async fn tell_refusal(mut stream: TcpStream, refusal: ApiError) {
    let message = refusal.into_last_words();
    let tell = async {
        // The client may be gone already.
        if stream.write_all(message.as_bytes()).await.is_ok() {
            close(&mut stream).await;
        }
    };
    tokio::time::timeout(LAST_WORDS_TIMEOUT, tell).await.ok();
}

/// Ends a connection whose last answer is sent. Closed while something is unread that its client has sent, it would be reset, and
/// the answer might be lost on the way.
pub async fn close<T: AsyncRead + AsyncWrite + Unpin>(stream: &mut T) {
    let close = async {
        stream.shutdown().await?;
        let mut ignored = [0; 4096];
        while tokio::time::timeout(LAST_WORDS_TIMEOUT, stream.read(&mut ignored)).await?? > 0 {}
        std::io::Result::Ok(())
    };
    // What a client gone cannot be told is its own affair.
    tokio::time::timeout(LINGER_TIMEOUT, close).await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body::Body as _;
    use http_body_util::BodyExt;

    #[test]
    fn answers_that_are_over_are_not_looked_after() {
        let looks = Looks::default();
        let kept: Vec<Watched> = (0..H2_STREAMS_MAX).map(|_| Watched::new(Body::empty(), looks.begin())).collect();
        for _ in 0..10_000 {
            drop(Watched::new(Body::empty(), looks.begin()));
        }
        let answers = &looks.0.lock().looks;
        let live = answers.iter().filter(|last| last.strong_count() > 0).count();
        assert!(live == kept.len() && answers.len() <= 2 * H2_STREAMS_MAX as usize, "{live} of {}", answers.len());
    }

    /// What is handed over whole would wait in hyper, where nobody sees that its reader stands still.
    #[tokio::test]
    async fn an_http2_answer_is_handed_over_in_pieces() {
        let whole = Bytes::from((0..200_000_u32).map(|n| n as u8).collect::<Vec<_>>());
        let mut body = Watched::new(Body::from(whole.clone()), Looks::default().begin());
        let mut all = Vec::new();
        while all.len() < whole.len() {
            assert_eq!(body.size_hint().exact(), Some((whole.len() - all.len()) as u64));
            assert!(!body.is_end_stream());
            let piece = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert!((1..=WATCHED_BYTES).contains(&piece.len()));
            all.extend_from_slice(&piece);
        }
        assert!(body.is_end_stream() && body.frame().await.is_none() && all == whole);
    }

    #[test]
    fn first_bytes_tell_which_line_a_connection_waits_in() {
        for (first, protocol) in [
            ("GET /v1/events", Some(Protocol::Events)),
            ("GET /v1/events?since=0 HTTP/1.1", Some(Protocol::Events)),
            ("GET /v1/event", Some(Protocol::Http1)),
            ("GET /v1/state/", Some(Protocol::Http1)),
            ("HEAD /v1/events", Some(Protocol::Http1)),
            ("POST /v1/event", Some(Protocol::Http1)),
            ("PUT /v1/state/", Some(Protocol::Http1)),
            ("P", None),
            ("PR", None),
            ("PRI", Some(Protocol::Http2)),
            ("PRI * HTTP/2.0", Some(Protocol::Http2)),
        ] {
            assert_eq!(Protocol::of(first.as_bytes()), protocol, "{first}");
        }
    }
}
