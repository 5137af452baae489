//! Requests over HTTP/1.1 that came whole: head and body, 64 KiB at most, in what was read from the socket. Nearly all are.
//!
//! ```text
//! read ─▶ parse ─ whole ─▶ handler ─▶ write ─▶ read …
//!            │                └─ a stream: write its head, leave the socket to `live.rs`
//!            └─ anything else: leave what was read, and the connection, to hyper
//! ```
//!
//! On one core that is a tenth more durable writes and reads a second than hyper answers, because hyper must be able to do
//! everything at any moment: send while it receives, take bodies in pieces, change protocols. What needs any of that is left to
//! it: chunked and large bodies, `Expect`, HTTP/1.0, `HEAD`, clients that take longer than [`PATIENCE`] to send a request, and
//! whatever could be read in two ways, so that only hyper decides. The parser is hyper's own (httparse), and what is no request
//! to it is refused here, where it can be said why.
//!
//! Invariants
//! - A request is taken when it can be read in one way only: at most one `Content-Length`, of digits, no `Transfer-Encoding`.
//! - One at a time, in order; what a client sends ahead waits in the buffer: a head and a body
//!   of [`BYTES_MAX`] each at most.

use super::Service;
use super::answer::{Answer, Json};
use super::error::invalid;
use super::events::EventStream;
use super::extract::{Fields, Head, Payload};
use super::live::{self, is_stream, take_stream};
use super::serve::{self, HEAD_BYTES_MAX, HEAD_TIMEOUT};
use crate::engine::frame::{END_OF_CHUNK, begin_chunk};
use crate::engine::json::JSON;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::Response;
use bytes::{Buf, Bytes, BytesMut};
use http_body::Body as _;
use http_body_util::BodyExt;
use smallvec::SmallVec;
use std::cell::RefCell;
use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

/// Largest head, and largest body, taken here.
const BYTES_MAX: usize = HEAD_BYTES_MAX;
/// As many fields as hyper takes.
const FIELDS_MAX: usize = 100;
/// Room to read into: most requests are smaller.
const READ_BYTES: usize = 4 << 10;
/// Larger buffers are given back between requests.
const KEPT_BYTES_MAX: usize = 16 << 10;
/// How long the rest of a request may take before hyper waits for it (many clients send head and body one after the other), and an
/// answer to a client that has closed its side.
const PATIENCE: Duration = Duration::from_secs(1);
/// Reads for one request, for the same reason: each begins to parse the head from its beginning.
const READS_MAX: usize = 64;
/// Larger pieces of a body are sent by themselves rather than copied behind the head.
const COPY_BYTES_MAX: usize = 8 << 10;

const NO_REQUEST: &str =
    "this is no HTTP/1.1 request; in its address all but A-Z a-z 0-9 and -._~!$&'()*+,;=:@/? has to be percent-encoded";

/// What became of a connection.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "taken apart at once; a box would be an allocation for each stream")]
pub enum Served {
    /// It is over.
    Over,
    /// It has become a stream, whose head is sent.
    Stream(EventStream),
    /// It goes on with a request for hyper, which begins with these bytes.
    Rest(Bytes),
}

/// Serves a connection as long as its requests come whole. `seen` is called after each read has been handled, whether it was
/// answered, refused or incomplete; its argument says whether the answer is a stream.
pub async fn serve(
    tcp: &mut TcpStream,
    service: &Service,
    mut stop: watch::Receiver<bool>,
    mut seen: impl FnMut(bool),
) -> Served {
    let mut input = BytesMut::new();
    let mut output = Vec::new();
    let stop_flag = stop.clone();
    let mut idle = Idle {
        alarm: pin!(tokio::time::sleep(HEAD_TIMEOUT)),
        stopped: pin!(tokio::task::unconstrained(stop.wait_for(|stop| *stop))),
        stop_flag: &stop_flag,
        is_waiting: false,
        is_stopped: false,
        is_alarm_set: false,
        has_answered: false,
    };
    let mut has_ended = false;
    loop {
        let WholeRequest { head, body, is_last } = match next(tcp, &mut input, has_ended, &mut idle, &mut seen).await {
            Next::Request(request) => request,
            Next::Refused(why) => {
                seen(false);
                let answer = invalid(why).into_last_words();
                if tcp.write_all(answer.as_bytes()).await.is_ok() {
                    Box::pin(serve::close(tcp)).await;
                }
                return Served::Over;
            }
            Next::Rest => return Served::Rest(input.freeze()),
            Next::Over => return Served::Over,
        };
        let mut answer = pin!(service.answer(head, Payload::Whole(body)));
        let mut is_first_look = true;
        let mut leave = None;
        let answered = poll_fn(|cx| {
            let answered = answer.as_mut().poll(cx);
            if std::mem::take(&mut is_first_look) {
                seen(matches!(&answered, Poll::Ready(Answer::Full(response)) if is_stream(response)));
            }
            match answered {
                Poll::Ready(answer) => Poll::Ready(Some(answer)),
                Poll::Pending => {
                    has_ended = has_ended || poll_ended(tcp, &mut input, cx).is_ready();
                    if !has_ended || !input.is_empty() {
                        return Poll::Pending;
                    }
                    // Who sends no more may still listen, for a moment: a long poll ends with a client that has gone.
                    let leave = leave.get_or_insert_with(|| Box::pin(tokio::time::sleep(PATIENCE)));
                    leave.as_mut().poll(cx).map(|()| None)
                }
            }
        });
        let Some(answer) = answered.await else { return Served::Over };
        let is_last = is_last || stop_flag.has_changed().unwrap_or(true);
        let written = match answer {
            Answer::Json(json) => write_json(tcp, json, &mut output, is_last).await,
            Answer::Full(mut response) => {
                if let Some(stream) = take_stream(&mut response) {
                    push_head(&mut output, &response, Framing::Chunked, is_last);
                    return if tcp.write_all(&output).await.is_ok() { Served::Stream(stream) } else { Served::Over };
                }
                write(tcp, response, &mut output, is_last).await
            }
        };
        if written.is_err() {
            return Served::Over;
        }
        if is_last {
            // Boxed: most connections never need the room.
            Box::pin(serve::close(tcp)).await;
            return Served::Over;
        }
        if output.capacity() > KEPT_BYTES_MAX {
            output = Vec::new();
        }
        idle.has_answered = true;
    }
}

/// A request, taken out of the input.
struct WholeRequest {
    head: Head,
    body: Bytes,
    /// Its client wants no other answered.
    is_last: bool,
}

/// What comes next on a connection.
enum Next {
    Request(WholeRequest),
    /// What is none, and why.
    Refused(&'static str),
    /// One that did not come whole.
    Rest,
    /// Nothing.
    Over,
}

/// Reads the next request, unless it is there already.
async fn next<S: Future>(
    tcp: &mut TcpStream,
    input: &mut BytesMut,
    has_ended: bool,
    idle: &mut Idle<'_, S>,
    mut seen: impl FnMut(bool),
) -> Next {
    let mut reads = 0;
    let mut patience = pin!(None);
    loop {
        let missing = match parse(input) {
            Parsed::Request(request) => return Next::Request(request),
            Parsed::Part(missing) => missing,
            Parsed::Refused(why) => return Next::Refused(why),
            Parsed::Other => return Next::Rest,
        };
        if has_ended && input.is_empty() {
            return Next::Over;
        }
        if has_ended || reads == READS_MAX {
            return Next::Rest;
        }
        if reads > 0 {
            // Also where it was nothing but the end of a line: others wait for this one's turn to be over.
            seen(false);
        }
        if input.is_empty() {
            if input.try_reclaim(KEPT_BYTES_MAX + 1) {
                *input = BytesMut::new();
            }
        } else if patience.is_none() {
            patience.set(Some(tokio::time::sleep(PATIENCE)));
        }
        let read = poll_fn(|cx| {
            if let Poll::Ready(bytes) = poll_read(tcp, input, missing, cx) {
                return Poll::Ready(Some(bytes));
            }
            match patience.as_mut().as_pin_mut() {
                Some(patience) => patience.poll(cx).map(|()| None),
                None => {
                    ready!(idle.poll_over(cx));
                    // What has come is answered; at a stop the runtime may tell of it later than of the stop.
                    let has_come = rustix::io::ioctl_fionread(&*tcp).is_ok_and(|bytes| bytes > 0);
                    if has_come { Poll::Pending } else { Poll::Ready(Some(0)) }
                }
            }
        });
        match read.await {
            Some(0) if input.is_empty() => return Next::Over,
            // Half a request and no more is for hyper to refuse.
            Some(0) | None => return Next::Rest,
            Some(_) => reads += 1,
        }
    }
}

/// Reads what is there; nothing at the end and when the connection is broken. Room is made only for what has come.
fn poll_read(tcp: &mut TcpStream, input: &mut BytesMut, room: usize, cx: &mut Context<'_>) -> Poll<usize> {
    if ready!(tcp.poll_read_ready(cx)).is_err() {
        return Poll::Ready(0);
    }
    input.reserve(room);
    pin!(tcp.read_buf(input)).poll(cx).map(|read| read.unwrap_or(0))
}

/// Ready when the client sends no more. What it sends meanwhile belongs to its next requests.
fn poll_ended(tcp: &mut TcpStream, input: &mut BytesMut, cx: &mut Context<'_>) -> Poll<()> {
    while input.len() < BYTES_MAX {
        if ready!(poll_read(tcp, input, READ_BYTES, cx)) == 0 {
            return Poll::Ready(());
        }
    }
    Poll::Pending
}

/// How long a connection may say nothing.
struct Idle<'a, S> {
    alarm: Pin<&'a mut Sleep>,
    /// Ready at a stop. Once polled it wakes this task; to poll it with every request is to take its lock with every request.
    stopped: Pin<&'a mut S>,
    /// The same stop as in `stopped`, only cheap to ask.
    stop_flag: &'a watch::Receiver<bool>,
    is_waiting: bool,
    /// `stopped` has ended, and is not to be polled again.
    is_stopped: bool,
    /// The alarm wakes this task.
    is_alarm_set: bool,
    /// Since the alarm was set.
    has_answered: bool,
}

impl<S: Future> Idle<'_, S> {
    /// Ready when there was no request for [`HEAD_TIMEOUT`], or at the server's stop. The alarm is set again only when it goes off,
    /// so a connection may be idle for up to twice as long; set for each request it would cost a twentieth of a small one.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_stopped {
            return Poll::Ready(());
        }
        if !self.is_waiting || self.stop_flag.has_changed().unwrap_or(true) {
            self.is_waiting = true;
            self.is_stopped = self.stopped.as_mut().poll(cx).is_ready();
            if self.is_stopped {
                return Poll::Ready(());
            }
        }
        // Like the stop, it is polled when there is something to see: it wakes this task as it is.
        if self.is_alarm_set && !self.alarm.is_elapsed() {
            return Poll::Pending;
        }
        // Whatever tokio thinks this task may do now: otherwise it might not wake it.
        while pin!(tokio::task::unconstrained(self.alarm.as_mut())).poll(cx).is_ready() {
            if !std::mem::take(&mut self.has_answered) {
                return Poll::Ready(());
            }
            self.alarm.as_mut().reset(Instant::now() + HEAD_TIMEOUT);
        }
        self.is_alarm_set = true;
        Poll::Pending
    }
}

/// What the input begins with.
enum Parsed {
    Request(WholeRequest),
    /// A part of one, to which at least about so many bytes are missing.
    Part(usize),
    /// What can become none, and why.
    Refused(&'static str),
    /// Something else.
    Other,
}

fn parse(input: &mut BytesMut) -> Parsed {
    // What old clients send behind a body belongs to no request (RFC 9112, 2.2).
    while input.starts_with(b"\r\n") {
        input.advance(2);
    }
    if input.is_empty() {
        return Parsed::Part(READ_BYTES);
    }
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut head = httparse::Request::new(&mut []);
    let head_bytes = match head.parse_with_uninit_headers(input, &mut fields) {
        Ok(httparse::Status::Complete(bytes)) if bytes <= BYTES_MAX => bytes,
        Ok(httparse::Status::Partial) if input.len() < BYTES_MAX => return Parsed::Part(READ_BYTES),
        Err(httparse::Error::HeaderName | httparse::Error::HeaderValue) => {
            return Parsed::Refused("a header's name or value holds a byte that may not stand there");
        }
        Err(httparse::Error::Token | httparse::Error::NewLine | httparse::Error::Version) => {
            return Parsed::Refused(NO_REQUEST);
        }
        _ => return Parsed::Other,
    };
    let (Some(method), Some(target), Some(1)) = (head.method, head.path, head.version) else { return Parsed::Other };
    let method = Method::from_bytes(method.as_bytes()).ok();
    let Some(method) = method.filter(|method| *method != Method::HEAD && *method != Method::CONNECT) else {
        return Parsed::Other;
    };
    if !target.starts_with('/') {
        return Parsed::Other;
    }
    if target.contains('#') {
        // A fragment is no part of a request, and would be left out: another key, say.
        return Parsed::Refused(NO_REQUEST);
    }
    let (body_bytes, is_last) = match ends(head.headers) {
        Ok(ends) => ends,
        Err(Some(why)) => return Parsed::Refused(why),
        Err(None) => return Parsed::Other,
    };
    let whole_bytes = head_bytes + body_bytes;
    if input.len() < whole_bytes {
        return Parsed::Part(whole_bytes - input.len());
    }
    // The parts of a request stay where they were read to; once they are gone, the connection reads there again.
    let place = |part: &[u8]| {
        let at = part.as_ptr().addr() - input.as_ptr().addr();
        at..at + part.len()
    };
    let target = place(target.as_bytes());
    // What has been seen to here is left out: the body knows its length, and no handler asks.
    let is_done = |name: &str| ["content-length", "connection"].iter().any(|done| name.eq_ignore_ascii_case(done));
    let mut fields = SmallVec::<[_; 8]>::new();
    for field in head.headers.iter().filter(|field| !is_done(field.name)) {
        let Ok(name) = HeaderName::from_bytes(field.name.as_bytes()) else { return Parsed::Other };
        fields.push((name, place(field.value)));
    }
    let whole = input.split_to(whole_bytes).freeze();
    let Ok(uri) = Uri::from_maybe_shared(whole.slice(target)) else { return Parsed::Refused(NO_REQUEST) };
    let mut headers = Fields::with_capacity(fields.len());
    for (name, value) in fields {
        let Ok(value) = HeaderValue::from_maybe_shared(whole.slice(value)) else {
            return Parsed::Refused("a header's value holds a byte that may not stand there");
        };
        headers.push(name, value);
    }
    let body = whole.slice(head_bytes..);
    Parsed::Request(WholeRequest { head: Head::new(method, uri, headers), body, is_last })
}

/// How long a request's body is, and whether it is its connection's last request; or why it is none, or nothing where that is not plain.
fn ends(fields: &[httparse::Header<'_>]) -> Result<(usize, bool), Option<&'static str>> {
    let mut body_bytes = None;
    let mut is_last = false;
    for field in fields {
        let is = |name| field.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            match (decimal(field.value), body_bytes) {
                (None, _) => return Err(Some("Content-Length is a whole number of bytes, and below 2^63")),
                (Some(bytes), Some(other)) if bytes != other => {
                    return Err(Some("a request has one Content-Length"));
                }
                (Some(bytes), None) if bytes <= BYTES_MAX => body_bytes = Some(bytes),
                _ => return Err(None),
            }
        } else if is("connection") {
            is_last |=
                field.value.split(|&byte| byte == b',').any(|word| word.trim_ascii().eq_ignore_ascii_case(b"close"));
        } else if is("transfer-encoding") || is("expect") {
            return Err(None);
        }
    }
    Ok((body_bytes.unwrap_or(0), is_last))
}

/// A number below 2^63 written in digits and nothing else: hyper has a use of its own for the last ones.
fn decimal(text: &[u8]) -> Option<usize> {
    let push = |number: usize, digit: &u8| {
        let digit = digit.is_ascii_digit().then(|| usize::from(digit - b'0'))?;
        number.checked_mul(10)?.checked_add(digit).filter(|&number| isize::try_from(number).is_ok())
    };
    if text.is_empty() { None } else { text.iter().try_fold(0, push) }
}

/// How an answer's end is told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// By the status.
    Empty,
    /// By its length.
    Length(u64),
    /// By a last chunk of nothing.
    Chunked,
}

/// Sends a JSON answer.
async fn write_json(tcp: &mut TcpStream, json: Json, output: &mut Vec<u8>, is_last: bool) -> std::io::Result<()> {
    push_status(output, json.status);
    push_field(output, "content-type", JSON.as_bytes());
    if let Some(revision) = json.revision {
        let mut digits = itoa::Buffer::new();
        for part in ["etag: \"", digits.format(revision.0), "\"\r\n"] {
            output.extend_from_slice(part.as_bytes());
        }
    }
    end_head(output, Framing::Length(json.body.len() as u64), is_last);
    if json.body.len() > COPY_BYTES_MAX {
        return tcp.write_all_buf(&mut Buf::chain(&output[..], json.body.as_bytes())).await;
    }
    output.extend_from_slice(json.body.as_bytes());
    tcp.write_all(output).await
}

/// Sends any other answer.
async fn write(tcp: &mut TcpStream, response: Response, output: &mut Vec<u8>, is_last: bool) -> std::io::Result<()> {
    let framing = match response.status() {
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => Framing::Empty,
        _ => response.body().size_hint().exact().map_or(Framing::Chunked, Framing::Length),
    };
    push_head(output, &response, framing, is_last);
    let is_chunked = framing == Framing::Chunked;
    if is_chunked {
        // What comes in pieces may take its time for the first.
        tcp.write_all(output).await?;
        output.clear();
    }
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        // Ended here, a body is cut short and is not taken for the whole.
        let Ok(data) = frame.map_err(std::io::Error::other)?.into_data() else { continue };
        if data.is_empty() || framing == Framing::Empty {
            continue;
        }
        if is_chunked {
            begin_chunk(output, data.len());
            tcp.write_all_buf(&mut Buf::chain(Buf::chain(&output[..], data), END_OF_CHUNK)).await?;
            output.clear();
        } else if data.len() > COPY_BYTES_MAX {
            tcp.write_all_buf(&mut Buf::chain(&output[..], data)).await?;
            output.clear();
        } else {
            output.extend_from_slice(&data);
        }
    }
    if is_chunked {
        output.extend_from_slice(live::END);
    }
    tcp.write_all(output).await
}

/// Begins an answer with its head.
fn push_head(output: &mut Vec<u8>, response: &Response, framing: Framing, is_last: bool) {
    push_status(output, response.status());
    for (name, value) in response.headers().iter().filter(|(name, _)| *name != header::CONTENT_LENGTH) {
        push_field(output, name.as_str(), value.as_bytes());
    }
    end_head(output, framing, is_last);
}

fn push_status(output: &mut Vec<u8>, status: StatusCode) {
    output.clear();
    let reason = status.canonical_reason().unwrap_or_default();
    for part in ["HTTP/1.1 ", status.as_str(), " ", reason, "\r\n"] {
        output.extend_from_slice(part.as_bytes());
    }
}

fn push_field(output: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), b": ", value, b"\r\n"] {
        output.extend_from_slice(part);
    }
}

fn end_head(output: &mut Vec<u8>, framing: Framing, is_last: bool) {
    match framing {
        Framing::Empty => {}
        Framing::Length(bytes) => {
            push_field(output, "content-length", itoa::Buffer::new().format(bytes).as_bytes());
        }
        Framing::Chunked => push_field(output, "transfer-encoding", b"chunked"),
    }
    if is_last {
        push_field(output, "connection", b"close");
    }
    DATE.with_borrow_mut(|date| push_field(output, "date", date.now().as_bytes()));
    output.extend_from_slice(b"\r\n");
}

thread_local! {
    static DATE: RefCell<Date> = const { RefCell::new(Date { second: 0, text: String::new() }) };
}

/// The time as HTTP writes it, made once a second.
struct Date {
    second: u64,
    text: String,
}

impl Date {
    fn now(&mut self) -> &str {
        let second = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        if self.text.is_empty() || self.second != second {
            *self = Self { second, text: httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(second)) };
        }
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn put(fields: &str, body: &str) -> String {
        format!("PUT /v1/state/a?b=c HTTP/1.1\r\nHost: h\r\n{fields}\r\n{body}")
    }

    #[test]
    fn a_whole_request_is_taken_out_and_what_follows_stays() {
        for (fields, last) in [
            ("", false),
            ("connection: Keep-Alive, Upgrade\r\nupgrade: h2c\r\n", false),
            ("Connection: close\r\n", true),
            ("connection: x, Close\r\n", true),
        ] {
            let request = put(&format!("{fields}X-Y:  v \r\nx-y: w\r\nContent-Length: 3\r\n"), "123");
            let mut input = BytesMut::from(format!("{request}GET ").as_bytes());
            let Parsed::Request(request) = parse(&mut input) else { panic!("{fields:?} was not taken") };
            let WholeRequest { head, body, is_last } = request;
            assert_eq!((&head.method, is_last, &input[..]), (&Method::PUT, last, &b"GET "[..]));
            assert_eq!(head.uri.to_string(), "/v1/state/a?b=c");
            assert_eq!(head.headers.all(HeaderName::from_static("x-y")).collect::<Vec<_>>(), ["v", "w"]);
            assert_eq!(head.headers.first(header::CONNECTION).or(head.headers.first(header::CONTENT_LENGTH)), None);
            assert_eq!(&body[..], b"123");
        }
    }

    #[test]
    fn empty_lines_between_requests_are_no_request() {
        let mut input = BytesMut::from(&b"\r\n\r\n"[..]);
        assert!(matches!(parse(&mut input), Parsed::Part(READ_BYTES)) && input.is_empty());
        let mut input = BytesMut::from(format!("\r\n{}", put("", "")).as_bytes());
        assert!(matches!(parse(&mut input), Parsed::Request(..)) && input.is_empty());
    }

    #[test]
    fn every_beginning_of_a_request_is_a_part_and_stays() {
        let request = put("content-length: 3\r\n", "123");
        for length in 0..request.len() {
            let mut input = BytesMut::from(&request.as_bytes()[..length]);
            assert!(matches!(parse(&mut input), Parsed::Part(1..)), "{length} bytes");
            assert_eq!(&input[..], &request.as_bytes()[..length]);
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_hyper_as_it_came() {
        let many = (0..=FIELDS_MAX).map(|n| format!("x{n}: y\r\n")).collect::<String>();
        for request in [
            put("transfer-encoding: chunked\r\n", "0\r\n\r\n"),
            put("transfer-encoding: chunked\r\ncontent-length: 0\r\n", ""),
            put("content-length: 1\r\ncontent-length: 1\r\n", "1"),
            put(&format!("content-length: {}\r\n", BYTES_MAX + 1), "1"),
            put("expect: 100-continue\r\ncontent-length: 1\r\n", "1"),
            put(&many, ""),
            put(&format!("x: {}", "y".repeat(BYTES_MAX)), ""),
            "GET / HTTP/1.0\r\n\r\n".to_owned(),
            "HEAD / HTTP/1.1\r\n\r\n".to_owned(),
            "CONNECT h:80 HTTP/1.1\r\n\r\n".to_owned(),
            "GET http://h/ HTTP/1.1\r\n\r\n".to_owned(),
            "OPTIONS * HTTP/1.1\r\n\r\n".to_owned(),
        ] {
            let mut input = BytesMut::from(request.as_bytes());
            assert!(matches!(parse(&mut input), Parsed::Other), "{request}");
            assert_eq!(&input[..], request.as_bytes(), "it was changed");
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for request in [
            &put("a b: c\r\n", ""),
            &put("a: \x01\r\n", ""),
            &put("content-length: 1\r\ncontent-length: 2\r\n", "1"),
            &put("content-length: +1\r\n", "1"),
            &put("content-length: \r\n", "1"),
            &put("content-length: 9223372036854775808\r\n", "1"),
            &put("content-length: 99999999999999999999\r\n", "1"),
            "nonsense\r\n\r\n",
            "GET /a<b HTTP/1.1\r\n\r\n",
            "GET /a b HTTP/1.1\r\n\r\n",
            "GET /a#b HTTP/1.1\r\n\r\n",
            "\x16\x03\x01\x02\x00\x01",
        ] {
            assert!(matches!(parse(&mut BytesMut::from(request.as_bytes())), Parsed::Refused(_)), "{request:?}");
        }
    }

    #[test]
    fn a_head_says_how_the_answer_ends() {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::CREATED;
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("9"));
        response.headers_mut().insert(header::ETAG, HeaderValue::from_static("\"1\""));
        for (framing, is_last, said) in [
            (Framing::Length(12), false, "content-length: 12\r\n"),
            (Framing::Chunked, false, "transfer-encoding: chunked\r\n"),
            (Framing::Empty, true, "connection: close\r\n"),
        ] {
            let mut output = b"what was said before".to_vec();
            push_head(&mut output, &response, framing, is_last);
            let head = String::from_utf8(output).unwrap();
            let begin = format!("HTTP/1.1 201 Created\r\netag: \"1\"\r\n{said}date: ");
            assert!(head.starts_with(&begin) && head.ends_with(" GMT\r\n\r\n"), "{head}");
        }
    }
}
