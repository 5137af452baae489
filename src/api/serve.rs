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
use super::stall::{EndReason, StallWatch, Watched};
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
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
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
const HANDOVERS_MAX: usize = 8;
/// A stream that began with its connection keeps its place among them for so long (the timer makes 1 to 2 ms of it): 4,000 to 5,000 in a second. With no
/// pause the threads between a connection and its stream wake each other for microseconds at a time for as long as there are
/// more, and Linux lets its own thread behind a sync wait meanwhile, 60 ms and longer: each write with it.
const STREAM_HANDOVER: Duration = Duration::from_millis(1);
/// How a request for events begins: a stream, or a page.
const ASKS_FOR_EVENTS: &[u8] = b"GET /v1/events";
/// How often, and how many times, it is looked whether a connection's first one or two bytes have become more.
const FIRST_BYTES_POLL: Duration = Duration::from_millis(10);
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
/// Streams one HTTP/2 connection may have open.
pub const H2_STREAMS_MAX: u32 = 256;

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
    other_handovers: Arc<Semaphore>,
    stream_handovers: Arc<Semaphore>,
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
    let [other_handovers, stream_handovers] = [(); 2].map(|()| Arc::new(Semaphore::new(HANDOVERS_MAX)));
    let server = Arc::new(Server {
        service,
        http1,
        http2,
        tls,
        runtimes,
        other_handovers,
        stream_handovers,
        stop: stop.clone(),
    });
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

    /// Waits for a connection's first bytes, and for its place among those that are handed over.
    async fn begin(self: Arc<Self>, tcp: TcpStream, peer: IpAddr, connected: Connected) {
        let mut stop = self.stop.clone();
        // The wait for the first byte is ours, and needs neither a place nor a thread that serves requests.
        let protocol = tokio::select! {
            protocol = tokio::time::timeout(HEAD_TIMEOUT, self.protocol(&tcp)) => protocol.ok().flatten(),
            _ = stop.wait_for(|stop| *stop) => None,
        };
        let Some(protocol) = protocol else { return };
        let handovers = if protocol == Protocol::Events { &self.stream_handovers } else { &self.other_handovers };
        let handover = tokio::select! {
            handover = Arc::clone(handovers).acquire_owned() => handover.ok(),
            _ = stop.wait_for(|stop| *stop) => None,
        };
        let Some(handover) = handover else { return };
        // Without the runtime it was accepted on. What fails here is a connection that is gone.
        let Ok(tcp) = tcp.into_std() else { return };
        let requests = self.runtimes.requests.clone();
        requests.spawn(async move {
            if let Ok(tcp) = TcpStream::from_std(tcp) {
                self.connection(tcp, protocol, peer, connected, handover).await;
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
            tokio::time::sleep(FIRST_BYTES_POLL).await;
        }
        Some(Protocol::Http1)
    }

    async fn connection(
        &self,
        mut tcp: TcpStream,
        protocol: Protocol,
        peer: IpAddr,
        connected: Connected,
        handover: OwnedSemaphorePermit,
    ) {
        let service = self.service.of(peer);
        match protocol {
            Protocol::Http1 | Protocol::Events => {
                let mut handover = Some(handover);
                // It is over when what its client had sent is read and seen to: told by the socket only behind the
                // thread's other tasks, many would come at once otherwise, and stand in front of requests all the same.
                let seen = |is_stream| {
                    let handover = handover.take();
                    if is_stream && protocol == Protocol::Events {
                        tokio::spawn(async move {
                            tokio::time::sleep(STREAM_HANDOVER).await;
                            drop(handover);
                        });
                    }
                };
                match whole::serve(&mut tcp, &service, self.stop.clone(), seen).await {
                    Served::Over => {}
                    Served::Stream(stream) => self.runtimes.streams.spawn(tcp, stream, connected),
                    Served::Rest(rest) => {
                        drop(handover);
                        let (read, write) = tcp.split();
                        let io = tokio::io::join(Rewound { rest, read }, write);
                        Box::pin(self.http1(io, service)).await;
                        Box::pin(close(&mut tcp)).await;
                    }
                }
            }
            // Boxed, so that the many others need not have room for them.
            Protocol::Http2 => {
                drop(handover);
                Box::pin(self.http2(tcp, service)).await;
            }
            Protocol::Tls => {
                drop(handover);
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
        let watch = StallWatch::default();
        let noted = watch.clone();
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
            over = watch.over() => match over {
                EndReason::Stalled => return,
                EndReason::Idle => false,
            },
            _ = stop.wait_for(|stop| *stop) => true,
        };
        Pin::new(&mut connection).graceful_shutdown();
        if is_stop && watch.had_requests() {
            // Cut by whoever stops the server, when it takes too long.
            connection.await.ok();
            return;
        }
        // One that has not even sent its preface is not ended by being told. A request that was on its way is answered.
        while tokio::time::timeout(LAST_WORDS_TIMEOUT, &mut connection).await.is_err() {
            if !watch.has_answers() || watch.is_stalled() {
                return;
            }
        }
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
