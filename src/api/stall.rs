//! Detects stalled HTTP/2 answers: hyper polls an answer's body only when the client has taken the last piece.
//!
//! A client may open no window for an answer and yet keep its connection alive, so that the kernel's [`STALL_TIMEOUT`] never ends it:
//! the answer, and what it holds, would stay. Nor does anything else end a connection that asks for nothing, or never becomes HTTP/2.

use super::serve::{H2_STREAMS_MAX, HEAD_TIMEOUT, STALL_TIMEOUT};
use axum::body::Body;
use bytes::Bytes;
use parking_lot::Mutex;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Instant;

/// Pieces in which an HTTP/2 answer is handed over, those of its frames. One that moves on by less in twice [`STALL_TIMEOUT`] is cut.
const WATCHED_BYTES: usize = 16 << 10;

/// When hyper last polled an answer; `None` while the answer is being made.
type LastPoll = Mutex<Option<Instant>>;

/// The open answers of one HTTP/2 connection. The lock is held to add an answer and, when there are many and every half minute, to
/// look through them.
#[derive(Clone, Debug, Default)]
pub struct StallWatch(Arc<Mutex<OpenAnswers>>);

#[derive(Debug, Default)]
struct OpenAnswers {
    had_requests: bool,
    polls: Vec<Weak<LastPoll>>,
}

/// Why a connection is to end.
pub enum EndReason {
    /// An answer has not been polled for long.
    Stalled,
    /// There was nothing to answer for long.
    Idle,
}

impl StallWatch {
    /// A request has come.
    pub fn begin(&self) -> Arc<LastPoll> {
        let poll = Arc::<LastPoll>::default();
        let mut answers = self.0.lock();
        answers.had_requests = true;
        if answers.polls.len() >= 2 * H2_STREAMS_MAX as usize {
            // At least half of them are over.
            answers.polls.retain(|poll| poll.strong_count() > 0);
        }
        answers.polls.push(Arc::downgrade(&poll));
        poll
    }

    /// Whether any request has come.
    pub fn had_requests(&self) -> bool {
        self.0.lock().had_requests
    }

    /// Whether any is being answered.
    pub fn has_answers(&self) -> bool {
        self.0.lock().polls.iter().any(|poll| poll.strong_count() > 0)
    }

    /// Whether an answer has not been polled for long. A stream that is well is polled for each heartbeat.
    pub fn is_stalled(&self) -> bool {
        let is_stalled = |poll: Arc<LastPoll>| {
            let last = *poll.lock();
            last.is_some_and(|last| last.elapsed() > 2 * STALL_TIMEOUT)
        };
        self.0.lock().polls.iter().filter_map(Weak::upgrade).any(is_stalled)
    }

    /// Ready when the connection is to end.
    pub async fn over(&self) -> EndReason {
        let mut idle_since = Instant::now();
        loop {
            tokio::time::sleep(STALL_TIMEOUT / 2).await;
            if self.is_stalled() {
                return EndReason::Stalled;
            }
            let polls = &mut self.0.lock().polls;
            // Those that came and went since the last round are still noted.
            if !polls.is_empty() {
                idle_since = Instant::now();
            }
            polls.retain(|poll| poll.strong_count() > 0);
            if idle_since.elapsed() >= HEAD_TIMEOUT {
                return EndReason::Idle;
            }
        }
    }
}

/// An answer that notes when it is polled. It is handed over in pieces: hyper polls for the next when the one before is sent, and
/// nobody can watch what it has been handed.
pub struct Watched {
    body: Body,
    /// The rest of what the body had ready.
    left: Bytes,
    last: Arc<LastPoll>,
}

impl Watched {
    /// Watches an answer that is made.
    pub fn new(body: Body, last: Arc<LastPoll>) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;
    use http_body::Body as _;
    use http_body_util::BodyExt;

    #[test]
    fn answers_that_are_over_are_not_looked_after() {
        let watch = StallWatch::default();
        let kept: Vec<Watched> = (0..H2_STREAMS_MAX).map(|_| Watched::new(Body::empty(), watch.begin())).collect();
        for _ in 0..10_000 {
            drop(Watched::new(Body::empty(), watch.begin()));
        }
        let answers = &watch.0.lock().polls;
        let live = answers.iter().filter(|last| last.strong_count() > 0).count();
        assert!(live == kept.len() && answers.len() <= 2 * H2_STREAMS_MAX as usize, "{live} of {}", answers.len());
    }

    /// What is handed over whole would wait in hyper, where nobody sees that its reader stands still.
    #[tokio::test]
    async fn an_http2_answer_is_handed_over_in_pieces() {
        let whole = Bytes::from((0..200_000_u32).map(|n| n as u8).collect::<Vec<_>>());
        let mut body = Watched::new(Body::from(whole.clone()), StallWatch::default().begin());
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
}
