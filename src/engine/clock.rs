//! The engine's time: Unix milliseconds that never jump.
//!
//! Starts from the wall clock, then runs on the monotonic one and leans towards the wall clock slowly. A wall clock set
//! wrong, by hand or by NTP, therefore neither kills a fresh key nor keeps a stale one: ten seconds stay ten seconds,
//! give or take a twentieth. After a restart the wall clock is believed again.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The correction changes by at most this many milliseconds for each second that passes.
const SLEW_MS_PER_S: i64 = 50;

/// See the module. Reading it costs one look at the monotonic clock.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    wall_ms: u64,
    correction_ms: AtomicI64,
    /// The latest time told: leaning back must not bring a key back that was told to be gone.
    latest_ms: AtomicU64,
}

fn wall_ms() -> u64 {
    // A clock before 1970 counts as 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Clock {
    /// Starts from the wall clock.
    #[must_use]
    pub fn start() -> Self {
        Self {
            started: Instant::now(),
            wall_ms: wall_ms(),
            correction_ms: AtomicI64::new(0),
            latest_ms: AtomicU64::new(0),
        }
    }

    /// Unix milliseconds; never less than was told before.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let correction = self.correction_ms.load(Ordering::Relaxed);
        let now = self.wall_ms.saturating_add(elapsed).saturating_add_signed(correction);
        self.latest_ms.fetch_max(now, Ordering::Relaxed).max(now)
    }

    /// Leans towards the wall clock. Call it about once a second.
    pub fn lean(&self) {
        self.lean_towards(wall_ms());
    }

    fn lean_towards(&self, wall_ms: u64) {
        let difference = wall_ms.cast_signed().saturating_sub(self.now_ms().cast_signed());
        let step = difference.clamp(-SLEW_MS_PER_S, SLEW_MS_PER_S);
        self.correction_ms.fetch_add(step, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_of_the_wall_clock_moves_time_by_a_twentieth_at_most() {
        let clock = Clock::start();
        for jump in [i64::MAX / 2, -1_000_000_000, 1_000] {
            let before = clock.now_ms();
            clock.lean_towards(wall_ms().saturating_add_signed(jump));
            let moved = clock.now_ms().cast_signed() - before.cast_signed();
            assert!(moved.abs() <= SLEW_MS_PER_S + 10, "{jump}: moved {moved}");
        }
    }
}
