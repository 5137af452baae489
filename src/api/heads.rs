//! How long a connection may take for a request's head.
//!
//! hyper asks its timer for a sleep before every head and drops it behind: with a timer of the runtime's each request set and
//! took back one of those, and where it was the only one left also woke the thread that waits for sockets, through the kernel.
//! Measured at 64 connections on one core: a twentieth of a small request. So each connection has one alarm of the runtime's
//! and a note of hyper's deadline; the alarm is set again only when it goes off, to the deadline that is noted then.
//!
//! A wait that begins after the alarm was set ends after it goes off, because all waits are equally long; so none is overlooked.

use hyper::rt::{Sleep, Timer};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// No head is waited for.
const NONE: u64 = u64::MAX;

/// What hyper and whoever polls it share; all on one task, so nothing needs an order. Atomic because hyper's traits ask for it.
#[derive(Debug)]
struct Noted {
    begun: Instant,
    /// Nanoseconds after `begun`, or [`NONE`].
    deadline: AtomicU64,
    is_over: AtomicBool,
}

/// hyper's timer for one connection over HTTP/1.1.
#[derive(Clone, Debug)]
pub struct HeadTimer(Arc<Noted>);

impl HeadTimer {
    /// For a connection that begins now.
    #[must_use]
    pub fn start() -> Self {
        let (deadline, is_over) = (AtomicU64::new(NONE), AtomicBool::new(false));
        Self(Arc::new(Noted { begun: Instant::now(), deadline, is_over }))
    }

    /// To be polled before hyper is: has hyper find the wait over once it is. Waits are as long as `timeout`.
    pub fn poll(&self, alarm: &mut Pin<&mut tokio::time::Sleep>, timeout: Duration, cx: &mut Context<'_>) {
        while alarm.as_mut().poll(cx).is_ready() {
            let deadline = self.0.deadline.load(Ordering::Relaxed);
            let deadline = (deadline != NONE).then(|| self.0.begun + Duration::from_nanos(deadline));
            let now = Instant::now();
            self.0.is_over.store(deadline.is_some_and(|deadline| deadline <= now), Ordering::Relaxed);
            let next = deadline.filter(|&deadline| deadline > now).unwrap_or(now + timeout);
            alarm.as_mut().reset(next.into());
        }
    }

    fn note(&self, deadline: Instant) {
        // The cast: 584 years.
        let deadline = deadline.saturating_duration_since(self.0.begun).as_nanos() as u64;
        self.0.deadline.store(deadline, Ordering::Relaxed);
        self.0.is_over.store(false, Ordering::Relaxed);
    }
}

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(Instant::now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        self.note(deadline);
        Box::pin(Wait(Arc::clone(&self.0)))
    }

    // Not by a second sleep: dropping the first one would take the note back.
    fn reset(&self, _: &mut Pin<Box<dyn Sleep>>, new_deadline: Instant) {
        self.note(new_deadline);
    }
}

/// hyper's wait for one head.
struct Wait(Arc<Noted>);

impl Future for Wait {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.0.is_over.load(Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Sleep for Wait {}

impl Drop for Wait {
    fn drop(&mut self) {
        self.0.deadline.store(NONE, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use std::convert::Infallible;
    use std::future::poll_fn;
    use std::pin::pin;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::time::sleep;

    const TIMEOUT: Duration = Duration::from_millis(400);

    /// Serves a connection whose requests take so long, and returns how it ended and the client's end of it.
    fn serve(takes: Duration) -> (tokio::task::JoinHandle<hyper::Result<()>>, DuplexStream) {
        let (client, io) = tokio::io::duplex(4096);
        let served = tokio::spawn(async move {
            let heads = HeadTimer::start();
            let answer = service_fn(|_| async move {
                sleep(takes).await;
                Ok::<_, Infallible>(hyper::Response::new("ok".to_owned()))
            });
            let mut http1 = http1::Builder::new();
            http1.header_read_timeout(TIMEOUT).timer(heads.clone());
            let mut connection = http1.serve_connection(TokioIo::new(io), answer);
            let mut alarm = pin!(sleep(TIMEOUT));
            poll_fn(|cx| {
                heads.poll(&mut alarm, TIMEOUT, cx);
                Pin::new(&mut connection).poll(cx)
            })
            .await
        });
        (served, client)
    }

    async fn ask(client: &mut DuplexStream) {
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"ok") {
            assert!(client.read_buf(&mut answer).await.unwrap() > 0, "closed instead of answered");
        }
    }

    #[tokio::test]
    async fn half_a_head_is_waited_for_just_so_long() {
        let started = Instant::now();
        let (served, mut client) = serve(Duration::ZERO);
        client.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
        // More of it does not make the wait longer.
        sleep(TIMEOUT / 2).await;
        client.write_all(b" a").await.unwrap();
        assert!(served.await.unwrap().unwrap_err().is_timeout());
        assert!(started.elapsed() >= TIMEOUT && started.elapsed() < 10 * TIMEOUT, "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn each_head_has_its_own_time_and_an_answer_takes_as_long_as_it_takes() {
        let takes = TIMEOUT * 3 / 2;
        let (served, mut client) = serve(takes);
        let mut asked = Instant::now();
        for _ in 0..3 {
            asked = Instant::now();
            ask(&mut client).await;
            sleep(TIMEOUT / 2).await;
        }
        // An idle connection ends like one that has sent half a head: by the error, or without one.
        drop(served.await.unwrap());
        let took = asked.elapsed();
        assert!(took >= takes + TIMEOUT && took < 10 * TIMEOUT, "{took:?}");
    }
}
