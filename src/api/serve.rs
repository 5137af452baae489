//! Connections: an accept loop of our own over hyper-util, because every limit on a connection belongs to us.
//!
//! - Heads must arrive within [`HEAD_TIMEOUT`], bodies within a timeout of their own (`extract.rs`).
//! - A reader that accepts no byte for [`STALL_TIMEOUT`] is cut by the kernel, stream or not.
//! - Beyond `max_connections` a connection is answered 503 and closed, so that the rest goes on.
//! - HTTP/1.1 and, by prior knowledge, HTTP/2 without TLS.
//!
//! On a stop: no more connections are accepted, streams end, what was begun is finished within [`DRAIN_TIMEOUT`].

use super::{App, Service};
use axum::body::Body;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

/// A request's head must be complete by then; keeps slow senders from holding connections.
/// Also how long a connection may be idle between requests.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// A connection whose peer takes no byte for this long is cut.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// What was begun may take this long after a stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections the kernel holds until they are accepted.
const BACKLOG: u32 = 4096;
/// Largest request head; keys and filters travel in it.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Streams one HTTP/2 connection may have open.
const H2_STREAMS_MAX: u32 = 256;

/// Binds the address.
pub fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restarted server must not wait for the old connections' TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Raises the limit of open files as far as allowed, and returns it.
pub fn raise_file_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // Where this is refused, the lower limit holds and bounds the connections.
    setrlimit(Resource::Nofile, raised).ok();
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Serves until `stop` turns true, then drains.
pub async fn serve(
    listener: TcpListener,
    service: Service,
    app: App,
    max_connections: usize,
    mut stop: watch::Receiver<bool>,
) {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .keep_alive_timeout(STALL_TIMEOUT);
    let builder = Arc::new(builder);
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of files, say. The connection waits in the kernel; give others time to go.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if app.connections.fetch_add(1, Ordering::Relaxed) >= max_connections as u64 {
            app.connections.fetch_sub(1, Ordering::Relaxed);
            tokio::spawn(refuse(stream));
            continue;
        }
        tune(&stream);
        let service = service.clone();
        let (builder, watcher) = (Arc::clone(&builder), graceful.watcher());
        let app = app.clone();
        let mut stop = stop.clone();
        tokio::spawn(async move {
            // hyper's own timer starts with the first byte, so the wait for that one is ours.
            let mut byte = [0];
            let is_silent = tokio::select! {
                first = tokio::time::timeout(HEAD_TIMEOUT, stream.peek(&mut byte)) => !matches!(first, Ok(Ok(1..))),
                _ = stop.wait_for(|stop| *stop) => true,
            };
            if !is_silent {
                let answer = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
                    let service = service.clone();
                    async move { Ok::<_, Infallible>(service.answer(request.map(Body::new)).await) }
                });
                let connection = builder.serve_connection(TokioIo::new(stream), answer);
                // A broken connection is the client's affair.
                watcher.watch(connection).await.ok();
            }
            app.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
    drop(listener);
    app.engine.feed().drain();
    if tokio::time::timeout(DRAIN_TIMEOUT, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests were still running and are cut off");
    }
}

fn tune(stream: &TcpStream) {
    // Answers are written whole; waiting to fill a segment would only delay them.
    stream.set_nodelay(true).ok();
    // A peer that vanished without a word is noticed in the end.
    rustix::net::sockopt::set_socket_keepalive(stream, true).ok();
    // The kernel closes a connection whose data the peer does not take, also when its window is closed.
    let stall_ms = u32::try_from(STALL_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, stall_ms).ok();
}

/// Says that there are too many connections, without spending a request on it.
async fn refuse(mut stream: TcpStream) {
    const ANSWER: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 157\r\n\r\n{\"type\":\"urn:kiss-vdb:problem:overloaded\",\"title\":\"Service Unavailable\",\"status\":503,\"detail\":\"too many connections; retry in a moment\",\"code\":\"overloaded\"}";
    let answer = async {
        stream.write_all(ANSWER).await?;
        stream.shutdown().await
    };
    // The client may be gone already.
    tokio::time::timeout(Duration::from_secs(1), answer).await.ok();
}
