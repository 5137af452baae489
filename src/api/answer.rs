//! What requests are answered with, and how many bytes of it may be on their way.

use super::error::ApiResult;
use crate::engine::json::JSON;
use crate::error::Rejection;
use crate::revision::Revision;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::FutureExt;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

/// What a request is answered with.
#[derive(Debug)]
pub enum Answer {
    /// As most are. Written as it is where the request came whole, which measured a thirtieth more small PUTs a second.
    Json(Json),
    /// Anything else.
    Full(Response),
}

/// A JSON answer.
#[derive(Debug)]
pub struct Json {
    /// Its status.
    pub status: StatusCode,
    /// Its text.
    pub body: String,
    /// What it shows has this revision, told as `ETag`.
    pub revision: Option<Revision>,
}

/// A JSON answer.
pub fn json(status: StatusCode, body: String) -> Answer {
    Answer::Json(Json { status, body, revision: None })
}

impl Answer {
    /// Its status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Json(json) => json.status,
            Self::Full(response) => response.status(),
        }
    }

    /// JSON in pieces, whose text stays where it is rather than be copied together.
    pub fn pieces(pieces: impl IntoIterator<Item = Bytes>, revision: Revision) -> Self {
        Self::Full(respond(StatusCode::OK, Body::new(Pieces(pieces.into_iter().collect())), Some(revision)))
    }
}

impl From<Response> for Answer {
    fn from(response: Response) -> Self {
        Self::Full(response)
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        match self {
            Self::Full(response) => response,
            Self::Json(Json { status, body, revision }) => {
                let is_large = body.len() > LARGE_BYTES;
                let mut response = respond(status, Body::from(body), revision);
                if is_large {
                    response.extensions_mut().insert(Large);
                }
                response
            }
        }
    }
}

/// Larger answers are counted while they are on their way; smaller ones the connection limit bounds.
pub const LARGE_BYTES: usize = 64 << 10;

/// Says of a response that its body was made for it, and is large.
#[derive(Clone, Copy)]
struct Large;

fn respond(status: StatusCode, json: Body, revision: Option<Revision>) -> Response {
    let mut response = Response::new(json);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(JSON));
    if let Some(revision) = revision {
        response.headers_mut().insert(header::ETAG, etag(revision));
    }
    response
}

/// A revision as `ETag`.
pub fn etag(revision: Revision) -> HeaderValue {
    HeaderValue::try_from(format!("\"{revision}\"")).expect("digits in quotes are a header value")
}

/// A body in pieces, of known length.
struct Pieces(VecDeque<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
    }
}

/// Bytes of large answers on their way: being made, and until they are taken by their readers, each of whom may need a minute
/// for what a socket holds. Refused beyond a limit rather than made to wait: an answer that waits is in memory, too.
#[derive(Debug)]
pub struct OnTheirWay {
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
}

impl OnTheirWay {
    /// None yet.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes: Arc::default(), bytes_max }
    }

    /// Room for an answer that is about to be made, of about so many bytes; none is needed for a small one. Refused where it is
    /// too much for all together.
    pub fn room(&self, bytes: usize) -> Result<Option<Room>, Rejection> {
        let mut room = None;
        self.grow(&mut room, bytes)?;
        Ok(room)
    }

    /// The same for one that grows while it is made.
    pub fn grow(&self, room: &mut Option<Room>, bytes: usize) -> Result<(), Rejection> {
        if bytes <= LARGE_BYTES || room.as_ref().is_some_and(|room| room.bytes >= bytes) {
            return Ok(());
        }
        if self.take(room, bytes) { Ok(()) } else { Err(TOO_MANY) }
    }

    /// Takes it, and tells whether it was there.
    fn take(&self, room: &mut Option<Room>, bytes: usize) -> bool {
        let room = room.get_or_insert_with(|| Room { bytes: 0, all: Arc::clone(&self.bytes) });
        let more = bytes - std::mem::replace(&mut room.bytes, bytes);
        self.bytes.fetch_add(more, Ordering::Relaxed) + more <= self.bytes_max
    }

    /// Counts an answer, if it is large, until it is sent or given up. Beyond the limit one that `may_be_refused` is, because
    /// its request has changed nothing.
    pub fn count(&self, answer: Answer, may_be_refused: bool) -> ApiResult {
        let is_large = match &answer {
            Answer::Json(json) => json.body.len() > LARGE_BYTES,
            Answer::Full(response) => response.extensions().get::<Large>().is_some(),
        };
        if !is_large {
            return Ok(answer);
        }
        let (parts, mut body) = answer.into_response().into_parts();
        // Made of a text, it is ready, and in one piece; of an answer to HEAD nothing is left.
        let Some(Some(Ok(Ok(text)))) = body.frame().now_or_never().map(|frame| frame.map(|f| f.map(Frame::into_data)))
        else {
            return Ok(Response::from_parts(parts, body).into());
        };
        let mut room = None;
        let has_room = self.take(&mut room, text.len());
        if may_be_refused && !has_room {
            return Err(TOO_MANY.into());
        }
        // With the text itself rather than with the body: hyper lets go of a body when it has the last of its bytes, and holds
        // these until the client has taken them.
        let counted = Bytes::from_owner(Counted { text, _room: room });
        Ok(Response::from_parts(parts, Body::from(counted)).into())
    }
}

const TOO_MANY: Rejection =
    Rejection::Overloaded("too many large answers on their way to slow readers; retry in a moment");

/// What one answer takes of the room there is, until it is dropped.
#[derive(Debug)]
pub struct Room {
    bytes: usize,
    all: Arc<AtomicUsize>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A text that takes room.
struct Counted {
    text: Bytes,
    _room: Option<Room>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(bytes: usize) -> Answer {
        json(StatusCode::OK, "x".repeat(bytes))
    }

    #[test]
    fn large_answers_are_counted_until_they_are_gone_and_refused_beyond_the_limit() {
        let large = LARGE_BYTES + 1;
        let on_their_way = OnTheirWay::new(2 * large);
        // As the connection's loop has it, and as axum's router does.
        let of_router = Answer::Full(answer(large).into_response());
        let held = [answer(large), of_router].map(|answer| on_their_way.count(answer, true).unwrap());
        assert!(on_their_way.count(answer(large), true).is_err(), "a read");
        assert!(on_their_way.count(answer(large - 1), true).is_ok(), "a small one");
        assert!(on_their_way.count(answer(large), false).is_ok(), "a write, which is done");
        assert!(on_their_way.room(large).is_err() && on_their_way.room(large - 1).is_ok(), "one that is being made");
        drop(held);
        let mut room = on_their_way.room(large).unwrap();
        assert!(on_their_way.grow(&mut room, 2 * large).is_ok() && on_their_way.grow(&mut room, 3 * large).is_err());
        drop(room);
        assert_eq!(on_their_way.bytes.load(Ordering::Relaxed), 0);
        assert!(on_their_way.count(answer(large), true).is_ok());
    }
}
