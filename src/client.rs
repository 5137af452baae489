//! A small HTTP client for the command line, the demo, the benchmark and the tests: one connection, requests one after
//! another, and SSE.
//!
//! Not a general client: no TLS, no redirects, no pool. One [`Client`] is one keep-alive connection, which is what a
//! load generator has to control.

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Where a server is: `http://host:port`, and the key it wants.
#[derive(Clone, Debug)]
pub struct Target {
    authority: String,
    api_key: Option<String>,
}

impl Target {
    /// Parses `http://host:port`; a path is refused.
    pub fn new(url: &str, api_key: Option<String>) -> anyhow::Result<Self> {
        let rest = url
            .strip_prefix("http://")
            .with_context(|| format!("the URL is http://host:port, not {url}; for https go through a proxy"))?;
        let authority = rest.trim_end_matches('/');
        ensure!(!authority.is_empty() && !authority.contains('/'), "the URL is http://host:port");
        let authority = if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
        Ok(Self { authority, api_key })
    }

    /// `http://host:port`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.authority)
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
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // Ends with the sender; a broken connection shows as the request's error.
        tokio::spawn(async move { connection.await.ok() });
        Ok(sender)
    }

    /// Opens a stream: `query` begins with `?` or is empty.
    pub async fn events(&self, query: &str, last_event_id: Option<u64>) -> anyhow::Result<EventStream> {
        let id = last_event_id.map(|id| id.to_string());
        let mut headers = vec![("accept", "text/event-stream")];
        headers.extend(id.as_deref().map(|id| ("last-event-id", id)));
        let mut sender = self.connect().await?;
        let request = self.request(Method::GET, &format!("/v1/events{query}"), &headers, Bytes::new())?;
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(Refused(Box::new(Answer::read(response).await?)).into());
        }
        Ok(EventStream { body: response.into_body(), _sender: sender, parser: Parser::default() })
    }

    /// Asks for an answer that is too large to read whole.
    pub async fn download(&self, path: &str) -> anyhow::Result<Download> {
        let mut sender = self.connect().await?;
        let response = sender.send_request(self.request(Method::GET, path, &[], Bytes::new())?).await?;
        if response.status() != StatusCode::OK {
            return Err(Refused(Box::new(Answer::read(response).await?)).into());
        }
        Ok(Download { body: response.into_body(), _sender: sender })
    }
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

/// An answer that is not a success.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", .0.status, String::from_utf8_lossy(&.0.body))]
pub struct Refused(pub Box<Answer>);

impl Refused {
    /// What the server says to people; the whole answer when it is not one of ours.
    #[must_use]
    pub fn detail(&self) -> String {
        let detail = self.0.json().ok().and_then(|problem| Some(problem.get("detail")?.as_str()?.to_owned()));
        detail.unwrap_or_else(|| self.to_string())
    }
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
        let answer = Answer::read(sender.send_request(request).await?).await?;
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
