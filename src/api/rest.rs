//! What is left of a request's body when its answer is made: most often of one that is refused by its head.
//!
//! hyper resets an HTTP/2 stream, and closes an HTTP/1.1 connection, whose body nobody has read to its end. By the first some
//! clients lose the answer (curl 7.88), by the second all lose their connection, unprepared. So a short rest is read first, and
//! where there is more the client is told that the connection ends.
//!
//! An HTTP/2 client may give a body up by a reset without an error. hyper reports the body as ended then; here it counts as broken.

use axum::BoxError;
use axum::body::Body;
use axum::http::header::EXPECT;
use axum::http::{Request, Version};
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// Rests up to this are read.
const REST_BYTES_MAX: usize = 64 << 10;
/// How long an answer waits for them.
const REST_TIMEOUT: Duration = Duration::from_secs(1);

/// Where a body is. The lock is held to say so and to take the rest.
#[derive(Debug, Default)]
enum Place {
    /// With whoever reads it.
    #[default]
    Lent,
    /// Let go of, with more to come perhaps.
    Back(Incoming),
    /// It is at its end.
    Read,
}

/// The rest of a request's body, once whoever had it to read has let it go.
#[derive(Debug)]
pub struct Rest {
    /// `None` where there was no body.
    place: Option<Arc<Mutex<Place>>>,
    /// The client waits to be asked for its body, which reading would do.
    is_expecting: bool,
}

/// A body that is given back when it is let go of.
struct Lent {
    /// `None` at its end.
    body: Option<Incoming>,
    is_http2: bool,
    place: Arc<Mutex<Place>>,
}

/// Takes note of a request's body.
pub fn lend(request: Request<Incoming>) -> (Request<Body>, Rest) {
    let is_expecting = request.headers().contains_key(EXPECT);
    if request.body().is_end_stream() {
        return (request.map(Body::new), Rest { place: None, is_expecting });
    }
    let place = Arc::<Mutex<Place>>::default();
    let is_http2 = request.version() == Version::HTTP_2;
    let request = request.map(|body| Body::new(Lent { body: Some(body), is_http2, place: Arc::clone(&place) }));
    (request, Rest { place: Some(place), is_expecting })
}

impl Rest {
    /// Reads it, if it is short. Whether all of the body is read then.
    pub async fn read(self) -> bool {
        let Some(place) = self.place else { return true };
        let place = std::mem::take(&mut *place.lock());
        let mut rest = match place {
            Place::Lent => return false,
            Place::Read => return true,
            Place::Back(rest) if rest.is_end_stream() => return true,
            Place::Back(rest) => rest,
        };
        if self.is_expecting || rest.size_hint().lower() > REST_BYTES_MAX as u64 {
            return false;
        }
        let read = async {
            let mut bytes = 0;
            while let Some(frame) = rest.frame().await {
                let Ok(frame) = frame else { return false };
                bytes += frame.into_data().map_or(0, |data| data.len());
                if bytes > REST_BYTES_MAX {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(REST_TIMEOUT, read).await.unwrap_or(false)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.place.lock() = self.body.take().map_or(Place::Read, Place::Back);
    }
}

impl http_body::Body for Lent {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        if let Some(frame) = ready!(Pin::new(&mut *body).poll_frame(cx)) {
            return Poll::Ready(Some(frame.map_err(Into::into)));
        }
        let ended = self.body.take();
        let is_cut = self.is_http2 && ended.is_some_and(|body| !body.is_end_stream());
        Poll::Ready(is_cut.then(|| Err("the stream was reset before the end of its body".into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, http_body::Body::size_hint)
    }
}
