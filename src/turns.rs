//! Which thread goes first when several want a core, and what they tell each other for that.
//!
//! Linux lets whoever runs go on for a time slice, also when somebody wakes up who has waited for long, and looks again at its
//! next tick: beside programs that keep all cores busy each of the five wake-ups of a durable write waits up to 4 ms. Not so for a
//! thread whose own slice is the shorter one (Linux 6.12 and later; before that it is like any other thread).
//!
//! The writer has such a slice, and so have threads that serve requests, unless there are very many: then the writer is like any
//! thread, for larger batches, and requests are batch work.
//! Measured on two cores: beside two programs that never sleep, one connection wrote 540 to 2,300 keys a second where requests
//! were always batch work and 4,100 to 5,200 like this, sixteen 4,900 to 6,500 and 15,000 to 19,000. But with 64 connections of
//! a program on the same machine, batch work cuts nobody off in the midst of what it sends, so that more comes at once: a tenth
//! more writes and a sixth more reads a second (`docs/experiments.md`).

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The shortest slice there is. The writer works for tens of microseconds and sleeps, and so do most requests.
const SHORT_SLICE: Duration = Duration::from_micros(100);
/// From so many requests a second on, of all threads, they are batch work. 64 busy connections make twice as many on a slow
/// day, sixteen beside busy programs half.
const MANY_REQUESTS: f64 = 30_000.0;
/// How often a thread looks whether there are, at most.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How a thread comes to its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// At once when it wakes, and for a short time.
    First,
    /// Like any thread.
    Fair,
    /// As batch work: when it wakes it does not take the core of whoever runs.
    Behind,
    /// On a core that nobody else wants.
    Last,
}

/// How this thread comes to its turn from now on. Where the system refuses, everything is slower under load and nothing else.
pub fn take(turn: Turn) {
    // SAFETY: it takes and touches no memory; 0 is the calling thread.
    let present = unsafe { libc::sched_getscheduler(0) };
    if matches!(turn, Turn::First | Turn::Fair) && present != libc::SCHED_OTHER && present != libc::SCHED_BATCH {
        // Real time, or idle: so its operator wants it.
        return;
    }
    let (policy, slice) = match turn {
        Turn::First => (libc::SCHED_OTHER, SHORT_SLICE),
        // Zero is what the system gives everyone.
        Turn::Fair => (libc::SCHED_OTHER, Duration::ZERO),
        Turn::Behind => (libc::SCHED_BATCH, Duration::ZERO),
        Turn::Last => (libc::SCHED_IDLE, Duration::ZERO),
    };
    // As nice as the rest of the process, whatever its operator chose (less than 0 only where the process may choose that): what
    // it holds a lock for must not wait long either.
    let changed = rustix::process::getpriority_process(None).map_err(Into::into).and_then(|nice| {
        let attributes = libc::sched_attr {
            size: size_of::<libc::sched_attr>() as u32,
            sched_policy: policy as u32,
            sched_flags: 0,
            sched_nice: nice,
            sched_priority: 0,
            sched_runtime: slice.as_nanos() as u64,
            sched_deadline: 0,
            sched_period: 0,
        };
        // SAFETY: the call reads `size` bytes of `attributes`, which outlive it, and changes nothing of this process but how the
        // calling thread (0) is scheduled.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    });
    if let Err(error) = changed {
        tracing::debug!(%error, ?turn, "a thread runs like any other");
    }
}

/// Whether the log waits for its disk with a batch. One for the process: it has one log.
static IS_SYNCING: AtomicBool = AtomicBool::new(false);

/// Notes that the log waits for its disk while `sync` runs.
pub fn note_sync<T>(sync: impl FnOnce() -> T) -> T {
    IS_SYNCING.store(true, Ordering::Relaxed);
    let synced = sync();
    IS_SYNCING.store(false, Ordering::Relaxed);
    synced
}

/// Whether the log waits for its disk with a batch.
#[must_use]
pub fn is_syncing() -> bool {
    IS_SYNCING.load(Ordering::Relaxed)
}

/// Requests there have been. One counter for all threads: one of them may serve nearly all.
static REQUESTS: AtomicU64 = AtomicU64::new(0);

/// Notes a request that has come.
pub fn note_request() {
    REQUESTS.fetch_add(1, Ordering::Relaxed);
}

/// When a thread last looked how many requests there are.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    requests: u64,
    turn: Turn,
}

impl Look {
    /// The next look, unless it is too early for one.
    fn next(self, at: Instant, requests: u64, when_many: Turn) -> Option<Self> {
        let elapsed = at.duration_since(self.at);
        let rate = requests.saturating_sub(self.requests) as f64 / elapsed.as_secs_f64();
        let turn = if rate < MANY_REQUESTS { Turn::First } else { when_many };
        (elapsed >= LOOK_EVERY).then_some(Self { at, requests, turn })
    }
}

/// For the writer, and for threads that serve requests when they are about to sleep: this thread's turn is the first, or while
/// there are many requests `when_many`, which it has to begin with.
pub fn look_at_requests(when_many: Turn) {
    thread_local!(static LAST: Cell<Option<Look>> = const { Cell::new(None) });
    let (now, requests) = (Instant::now(), REQUESTS.load(Ordering::Relaxed));
    let Some(last) = LAST.get() else {
        LAST.set(Some(Look { at: now, requests, turn: when_many }));
        return;
    };
    if let Some(look) = last.next(now, requests, when_many) {
        LAST.set(Some(look));
        if look.turn != last.turn {
            take(look.turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Policy and niceness of this thread, as the system tells them.
    fn as_told() -> (i32, i32) {
        let line = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, fields) = line.rsplit_once(") ").unwrap();
        let fields: Vec<&str> = fields.split(' ').collect();
        (fields[38].parse().unwrap(), fields[16].parse().unwrap())
    }

    /// This thread's time slice in nanoseconds; zero where the system knows none for a thread.
    fn slice() -> u64 {
        let size = size_of::<libc::sched_attr>();
        // SAFETY: all zeros are a value of it, and the call writes at most `size` bytes.
        let attributes = unsafe {
            let mut attributes: libc::sched_attr = std::mem::zeroed();
            assert_eq!(libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0), 0);
            attributes
        };
        attributes.sched_runtime
    }

    /// A thread that became nicer than its process would be starved with what it holds.
    #[test]
    fn a_turn_is_what_the_system_says_it_is_and_as_nice_as_before() {
        let in_a_thread = || {
            let nice = rustix::process::getpriority_process(None).unwrap().max(3);
            rustix::process::setpriority_process(None, nice).unwrap();
            let usual = slice();
            // The last is last: only who may be less nice gets out of it again.
            let turns = [Turn::Behind, Turn::First, Turn::Fair, Turn::Last];
            let told = turns.map(|turn| {
                take(turn);
                (as_told(), slice())
            });
            if told.iter().all(|((policy, _), _)| *policy == libc::SCHED_OTHER) {
                eprintln!("this system lets no thread choose: not tested");
                return;
            }
            let expected = [libc::SCHED_BATCH, libc::SCHED_OTHER, libc::SCHED_OTHER, libc::SCHED_IDLE];
            assert_eq!(told.map(|(told, _)| told), expected.map(|policy| (policy, nice)));
            if usual != 0 {
                let short = u64::try_from(SHORT_SLICE.as_nanos()).unwrap();
                assert_eq!(told.map(|(_, slice)| slice)[..3], [usual, short, usual]);
            }
        };
        std::thread::spawn(in_a_thread).join().unwrap();
    }

    /// Whoever runs a server on idle cores alone wants all of it there.
    #[test]
    fn what_an_operator_chose_stays() {
        let in_a_thread = || {
            take(Turn::Last);
            if as_told().0 == libc::SCHED_OTHER {
                eprintln!("this system lets no thread choose: not tested");
                return;
            }
            take(Turn::First);
            take(Turn::Fair);
            assert_eq!(as_told().0, libc::SCHED_IDLE);
        };
        std::thread::spawn(in_a_thread).join().unwrap();
    }

    #[test]
    fn requests_are_batch_work_only_while_there_are_very_many() {
        let at = Instant::now();
        let after = |ms| at + Duration::from_millis(ms);
        let first = Look { at, requests: 1000, turn: Turn::Behind };
        assert!(first.next(after(9), 1_000_000, Turn::Behind).is_none());
        let calm = first.next(after(10), 1000 + 299, Turn::Behind).unwrap();
        assert_eq!(calm.turn, Turn::First);
        let busy = calm.next(after(20), calm.requests + 301, Turn::Behind).unwrap();
        assert_eq!(busy.turn, Turn::Behind);
        // A thread that has slept for long looks at all of it.
        assert_eq!(busy.next(after(10_020), busy.requests + 200_000, Turn::Behind).unwrap().turn, Turn::First);
    }
}
