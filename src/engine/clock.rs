//! The engine's time: Unix milliseconds that never jump.
//!
//! Starts from the wall clock, then runs on the monotonic one and leans towards the wall clock slowly. A wall clock set
//! wrong, by hand or by NTP, therefore neither kills a fresh key nor keeps a stale one: ten seconds stay ten seconds,
//! give or take a twentieth. After a restart the wall clock is believed again.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The correction changes by at most this much for each second that passes.
const SLEW_US_PER_S: i64 = 50_000;

/// Held up for longer than this between two looks at a clock, a difference says nothing.
const LOOK_MAX: Duration = Duration::from_millis(1);

/// See the module. Reading it costs one look at the monotonic clock.
///
/// It counts in microseconds and cuts off once, where milliseconds are told: unless it leans, it reaches a key's deadline when
/// the wall clock does.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    started_us: u64,
    correction_us: AtomicI64,
    /// The latest time told: leaning back must not bring a key back that was told to be gone.
    latest_ms: AtomicU64,
}

fn wall_us() -> u64 {
    // A clock before 1970 counts as 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, micros)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Clock {
    /// Starts from the wall clock.
    #[must_use]
    pub fn start() -> Self {
        loop {
            let started = Instant::now();
            let started_us = wall_us();
            if started.elapsed() < LOOK_MAX {
                return Self { started, started_us, correction_us: AtomicI64::new(0), latest_ms: AtomicU64::new(0) };
            }
        }
    }

    /// Unix milliseconds; never less than was told before.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        let now = self.us_at(self.started.elapsed()) / 1_000;
        self.latest_ms.fetch_max(now, Ordering::Relaxed).max(now)
    }

    /// Unix microseconds so long after the start.
    fn us_at(&self, elapsed: Duration) -> u64 {
        let correction = self.correction_us.load(Ordering::Relaxed);
        self.started_us.saturating_add(micros(elapsed)).saturating_add_signed(correction)
    }

    /// Leans towards the wall clock. Call it about once a second.
    pub fn lean(&self) {
        let before = self.started.elapsed();
        let wall_us = wall_us();
        if self.started.elapsed().saturating_sub(before) < LOOK_MAX {
            self.lean_by(wall_us.cast_signed().saturating_sub(self.us_at(before).cast_signed()));
        }
    }

    fn lean_by(&self, difference_us: i64) {
        let step = difference_us.clamp(-SLEW_US_PER_S, SLEW_US_PER_S);
        self.correction_us.fetch_add(step, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_of_the_wall_clock_moves_time_by_a_twentieth_at_most() {
        let clock = Clock::start();
        for jump in [i64::MAX, -1_000_000_000_000, 1_000_000] {
            let before = clock.us_at(Duration::ZERO);
            clock.lean_by(jump);
            let moved = clock.us_at(Duration::ZERO).cast_signed() - before.cast_signed();
            assert_eq!(moved, jump.clamp(-50_000, 50_000));
        }
    }

    #[test]
    fn it_leans_towards_the_wall_clock_and_never_tells_an_earlier_time() {
        for ahead_us in [20_000, -20_000] {
            let mut clock = Clock::start();
            clock.started_us = clock.started_us.saturating_add_signed(ahead_us);
            let told = clock.now_ms();
            while clock.correction_us.load(Ordering::Relaxed) == 0 {
                clock.lean();
            }
            let correction = clock.correction_us.load(Ordering::Relaxed);
            assert!((correction + ahead_us).abs() < 5_000, "{ahead_us}: {correction}");
            clock.lean_by(-50_000);
            assert!(clock.now_ms() >= told);
        }
    }

    #[test]
    fn a_millisecond_begins_when_the_wall_clock_begins_it() {
        let mut clock = Clock::start();
        clock.started_us = 999_600;
        assert_eq!(clock.us_at(Duration::from_micros(399)) / 1_000, 999);
        assert_eq!(clock.us_at(Duration::from_micros(400)) / 1_000, 1_000);
        clock.lean_by(300);
        assert_eq!(clock.us_at(Duration::from_micros(100)) / 1_000, 1_000);
    }
}
