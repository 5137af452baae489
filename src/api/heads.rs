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
