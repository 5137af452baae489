//! A small HTTP client for the command line, the demo, the benchmark and the tests: one connection, requests one after
//! another, and SSE.
//!
//! Not a general client: no redirects, no pool. One [`Client`] is one keep-alive connection, which is what a load
//! generator has to control.

mod tls;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Body;
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use std::path::Path;
use tls::Tls;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Every server takes as much: the least that MAX_BODY_MB may be.
const BODY_ALWAYS_TAKEN: u64 = 1 << 20;

/// Where a server is: `http://host:port` or `https://host:port`, and the key it wants.
#[derive(Clone, Debug)]
pub struct Target {
    authority: String,
    api_key: Option<String>,
    tls: Option<Tls>,
}

impl Target {
    /// Parses `http://host:port` or `https://host:port`; a path is refused. https believes the system's authorities.
    pub fn new(url: &str, api_key: Option<String>) -> anyhow::Result<Self> {
        Self::trusting(url, api_key, None)
    }

    /// As `new`; https believes the certificates of this file, and no others.
    pub fn trusting(url: &str, api_key: Option<String>, ca_cert: Option<&Path>) -> anyhow::Result<Self> {
        let wrong = || format!("the URL is http://host:port or https://host:port, not {url:?}");
        let parsed: Uri = url.parse().ok().with_context(wrong)?;
        let authority = parsed.authority().with_context(wrong)?;
        let host = authority.host();
        let default_port = match parsed.scheme_str() {
            Some("http") => 80,
            Some("https") => 443,
            _ => bail!(wrong()),
        };
        // What is neither host nor port is a user's name, or no number.
        let is_plain = authority.as_str() == host || authority.port_u16().is_some();
        ensure!(is_plain && !host.is_empty() && !authority.as_str().contains('@'), wrong());
        ensure!(parsed.path() == "/" && parsed.query().is_none(), wrong());
        let is_key = |key: &String| HeaderValue::from_str(key).is_ok();
        ensure!(api_key.as_ref().is_none_or(is_key), "the key is a line of ASCII, without control characters");
        let tls = if default_port == 443 { Some(Tls::new(host, ca_cert)?) } else { None };
        Ok(Self { authority: format!("{host}:{}", authority.port_u16().unwrap_or(default_port)), api_key, tls })
    }

    /// `http://host:port`, or with https.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http{}://{}", if self.tls.is_some() { "s" } else { "" }, self.authority)
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        let mut builder = Request::builder().method(method).uri(path).header("host", &self.authority);
        if let Some(key) = &self.api_key {
            builder = builder.header("authorization", format!("Bearer {key}"));
        }
        let mut request = builder.body(Full::new(body))?;
        for (name, value) in headers {
            request.headers_mut().insert(HeaderName::from_bytes(name.as_bytes())?, HeaderValue::from_str(value)?);
        }
        Ok(request)
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let connected = TcpStream::connect(&self.authority).await;
        let stream = connected.map_err(|cause| CannotConnect { url: self.url(), cause })?;
        stream.set_nodelay(true)?;
        match &self.tls {
            None => speak(stream).await,
            Some(tls) => speak(tls.shake(stream, &self.url()).await?).await,
        }
    }

    /// Sends a request and waits for the head of its answer.
    async fn ask(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        request: Request<Full<Bytes>>,
    ) -> anyhow::Result<Response<Incoming>> {
        let bytes = request.body().size_hint().exact().unwrap_or_default();
        sender.send_request(request).await.map_err(|error| {
            let url = self.url();
            if error.is_parse() {
                let text = format!("{url} does not speak plain HTTP; if it speaks TLS, the URL begins with https://");
                return WrongServer(text).into();
            }
            if bytes > BODY_ALWAYS_TAKEN { HungUp { url, bytes, cause: error }.into() } else { error.into() }
        })
    }

    /// Opens a stream: `query` begins with `?` or is empty.
    pub async fn events(&self, query: &str, last_event_id: Option<u64>) -> anyhow::Result<EventStream> {
        let id = last_event_id.map(|id| id.to_string());
        let mut headers = vec![("accept", "text/event-stream")];
        headers.extend(id.as_deref().map(|id| ("last-event-id", id)));
        let mut sender = self.connect().await?;
        let request = self.request(Method::GET, &format!("/v1/events{query}"), &headers, Bytes::new())?;
        let response = self.ask(&mut sender, request).await?;
        if response.status() != StatusCode::OK {
            return Err(Refused(Box::new(Answer::read(response).await?)).into());
        }
        Ok(EventStream { body: response.into_body(), _sender: sender, parser: Parser::default() })
    }

    /// Asks for an answer that is too large to read whole.
    pub async fn download(&self, path: &str) -> anyhow::Result<Download> {
        let mut sender = self.connect().await?;
        let request = self.request(Method::GET, path, &[], Bytes::new())?;
        let response = self.ask(&mut sender, request).await?;
        if response.status() != StatusCode::OK {
            return Err(Refused(Box::new(Answer::read(response).await?)).into());
        }
        Ok(Download { body: response.into_body(), _sender: sender })
    }
}

async fn speak<S>(stream: S) -> anyhow::Result<SendRequest<Full<Bytes>>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // Ends with the sender; a broken connection shows as the request's error.
    tokio::spawn(async move { connection.await.ok() });
    Ok(sender)
}

/// An answer being read piece by piece.
#[derive(Debug)]
pub struct Download {
    body: Incoming,
    _sender: SendRequest<Full<Bytes>>,
}

impl Download {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> anyhow::Result<Option<Bytes>> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

/// Nobody listens there.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to {url}: {cause}")]
pub struct CannotConnect {
    url: String,
    cause: std::io::Error,
}

/// Somebody answers there, to whom nothing can be said: they speak something else, or cannot be trusted. The text says
/// what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongServer(String);

/// The connection broke under a large request: who takes less refuses, and may not wait until it could be heard.
#[derive(Debug, thiserror::Error)]
#[error("{url} hung up on a request of {bytes} bytes; is that more than its MAX_BODY_MB?")]
pub struct HungUp {
    url: String,
    bytes: u64,
    #[source]
    cause: hyper::Error,
}

/// An answer that is not a success.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", .0.status, String::from_utf8_lossy(&.0.body))]
pub struct Refused(pub Box<Answer>);

impl Refused {
    /// The problem document; `None` when the answer is not one of this server's.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        serde_json::from_slice(&self.0.body).ok()
    }
}

/// What a refusal says.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct Problem {
    /// The stable name of the reason.
    pub code: String,
    /// To people.
    pub detail: String,
}

/// An answer, read whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The body as JSON, if the status is a success.
    pub fn success(&self) -> anyhow::Result<serde_json::Value> {
        self.clone().accepted()?.json()
    }

    /// This answer, if the status is a success.
    pub fn accepted(self) -> Result<Self, Refused> {
        if self.status.is_success() { Ok(self) } else { Err(Refused(Box::new(self))) }
    }

    async fn read(response: Response<Incoming>) -> anyhow::Result<Self> {
        let (parts, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Self { status: parts.status, headers: parts.headers, body })
    }
}

/// One keep-alive connection, opened when needed and again after it broke.
#[derive(Debug)]
pub struct Client {
    target: Target,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    /// For a server; connects at the first request.
    #[must_use]
    pub fn new(target: &Target) -> Self {
        Self { target: target.clone(), sender: None }
    }

    /// Sends a request and reads the answer. JSON bodies; see [`Client::send`] for others.
    pub async fn call(&mut self, method: Method, path: &str, body: impl Into<Bytes>) -> anyhow::Result<Answer> {
        self.send(method, path, &[("content-type", "application/json")], body).await
    }

    /// Sends a request with these headers and reads the answer.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> anyhow::Result<Answer> {
        let request = self.target.request(method, path, headers, body.into())?;
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.target.connect().await?,
        };
        sender.ready().await?;
        let answer = Answer::read(self.target.ask(&mut sender, request).await?).await?;
        self.sender = Some(sender);
        Ok(answer)
    }
}

/// One event of a stream, or an id-only frame (`event` and `data` empty).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerEvent {
    /// Its type.
    pub event: String,
    /// The id it carried itself, if any.
    pub id: Option<u64>,
    /// Its data.
    pub data: String,
}

impl ServerEvent {
    /// The data as JSON.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_str(&self.data).with_context(|| format!("not JSON: {}", self.data))
    }
}

/// An open stream.
#[derive(Debug)]
pub struct EventStream {
    body: Incoming,
    _sender: SendRequest<Full<Bytes>>,
    parser: Parser,
}

impl EventStream {
    /// The next frame, id-only ones included; `None` when the server ended the stream.
    pub async fn next_frame(&mut self) -> anyhow::Result<Option<ServerEvent>> {
        loop {
            if let Some(event) = self.parser.next()? {
                return Ok(Some(event));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => bail!("the stream broke: {error}"),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.parser.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }

    /// The next event that has a type.
    pub async fn next_event(&mut self) -> anyhow::Result<Option<ServerEvent>> {
        loop {
            match self.next_frame().await? {
                Some(frame) if frame.event.is_empty() => {}
                other => return Ok(other),
            }
        }
    }

    /// The last id seen: what to resume with.
    #[must_use]
    pub fn last_id(&self) -> Option<u64> {
        self.parser.last_id
    }

    /// What the server asked to wait before reconnecting, in milliseconds.
    #[must_use]
    pub fn retry_ms(&self) -> Option<u64> {
        self.parser.retry_ms
    }
}

/// The part of the event-stream format (WHATWG HTML, 9.2.6) that this server uses: lines end in a line feed.
#[derive(Debug, Default)]
struct Parser {
    buffer: Vec<u8>,
    at: usize,
    /// No frame ends before here: a large one comes in many pieces, and is looked through once.
    searched: usize,
    last_id: Option<u64>,
    retry_ms: Option<u64>,
}

impl Parser {
    fn next(&mut self) -> anyhow::Result<Option<ServerEvent>> {
        let from = self.searched.max(self.at);
        let Some(end) = self.buffer[from..].windows(2).position(|w| w == b"\n\n") else {
            self.buffer.drain(..self.at);
            self.at = 0;
            self.searched = self.buffer.len().saturating_sub(1);
            return Ok(None);
        };
        let rest = &self.buffer[self.at..];
        let end = from - self.at + end;
        let mut event = ServerEvent::default();
        for line in std::str::from_utf8(&rest[..end])?.split('\n') {
            match line.split_once(": ").unwrap_or((line, "")) {
                ("event", value) => value.clone_into(&mut event.event),
                ("data", value) => event.data.push_str(value),
                ("id", value) => event.id = Some(value.parse()?),
                ("retry", value) => self.retry_ms = Some(value.parse()?),
                _ => {}
            }
        }
        self.last_id = event.id.or(self.last_id);
        self.at += end + 2;
        Ok(Some(event))
    }
}
