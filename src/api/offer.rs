//! Threads with much to do offer their core to others now and then.
//!
//! A write that comes meanwhile is read, decided, synced and answered by several threads, and without a core of their own each
//! of these steps can wait for the scheduler's tick, up to 4 ms: also where another core is free, or has only a linker at idle
//! priority, because a thread that waits is moved late. (Those with a short time slice, see `turns.rs`, do so less, from Linux
//! 6.12 on; the system's own threads behind a sync do.) On one core, with 1,000 streams and 1,600 events a second, the p99 of
//! writes was 75 to 160 ms and that of events 85 to 175; with offers 3 to 12 and 19 to 26. Where nobody waits for the core an
//! offer costs a system call. Each lets go of the rest of a time slice: offered four times as often, streams take up to twice as
//! long beside programs that keep all cores busy.
//!
//! A thread that sends sleeps for a moment instead while the log waits for its disk. Between data and flush that wait needs a
//! thread of the system (kblockd), and Linux 6.18 was seen to pass it over for a thread that is always ready, offers or not, for
//! two ticks with each sync and a tenth of a second on end. While 5,000 streams came back to 2,200 events each, the p99 of
//! writes was 0.7 to 140 ms with offers alone, and 0.6 to 1.6 with sleeps, for a tenth to a seventh less sent a second. To sleep
//! only where the log began to wait on the same core is not enough, its thread moves (`docs/experiments.md`).

use crate::turns;
use std::cell::Cell;
use std::time::Duration;

/// Work after which a thread offers its core, in bytes sent: a quarter of a millisecond or so for large sends, a millisecond for those
/// of a short event.
const OFFER_AFTER: usize = 256 << 10;
/// About as long as a flush of the disk; the system makes it up to twice as long.
const SLEEP: Duration = Duration::from_micros(50);
/// What a send counts for beside its bytes.
const SEND_BYTES: usize = 1 << 10;
/// What the end of a stream counts for: some 3 us.
const END_BYTES: usize = 4 << 10;
/// What a byte parsed counts for: an offer each 16 KiB, some 50 us.
const BYTES_PER_PARSED: usize = 16;

/// Notes a send of so many bytes.
pub fn note_sent(bytes: usize) {
    note_stream(SEND_BYTES + bytes);
}

/// Notes that a stream has ended. Thousands do at once.
pub fn note_ended() {
    note_stream(END_BYTES);
}

fn note_stream(work: usize) {
    if is_offer_due(work) {
        if turns::is_syncing() {
            std::thread::sleep(SLEEP);
        } else {
            std::thread::yield_now();
        }
    }
}

/// Notes that so much text has been parsed.
pub fn note_parsed(bytes: usize) {
    if is_offer_due(bytes * BYTES_PER_PARSED) {
        std::thread::yield_now();
    }
}

fn is_offer_due(work: usize) -> bool {
    thread_local!(static DONE: Cell<usize> = const { Cell::new(0) });
    let done = DONE.get() + work;
    DONE.set(done % OFFER_AFTER);
    done >= OFFER_AFTER
}
