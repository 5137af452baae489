//! Threads with much to do offer their core to others now and then.
//!
//! A write that comes meanwhile is read, decided, synced and answered by several threads, and without a core of their own each
//! of these steps can wait for the scheduler's tick, up to 4 ms: also where another core is free, or has only a linker at idle
//! priority, because a thread that waits is moved late. (Those with a short time slice, see `turns.rs`, do so less, from Linux
//! 6.12 on; the system's own threads behind a sync do.) On one core, with 1,000 streams and 1,600 events a second, the p99 of
//! writes was 75 to 160 ms and that of events 85 to 175; with offers 3 to 12 and 19 to 26. Where nobody waits for the core an
//! offer costs a system call. Each lets go of the rest of a time slice: offered four times as often, streams take up to twice as
//! long beside programs that keep all cores busy, and offered with each stream that begins, some thousands at once, the
//! system's own threads behind a sync were seen to wait for 170 ms.

use std::cell::Cell;

/// Work after which a thread offers its core, in bytes sent: a quarter of a millisecond or so for large sends, a millisecond for those
/// of a short event.
const OFFER_AFTER: usize = 256 << 10;
/// What a send counts for beside its bytes.
const SEND_BYTES: usize = 1 << 10;
/// What a byte parsed counts for: an offer each 16 KiB, some 50 us.
const BYTES_PER_PARSED: usize = 16;

/// Notes a send of so many bytes.
pub fn note_sent(bytes: usize) {
    note(SEND_BYTES + bytes);
}

/// Notes that so much text has been parsed.
pub fn note_parsed(bytes: usize) {
    note(bytes * BYTES_PER_PARSED);
}

fn note(work: usize) {
    thread_local!(static DONE: Cell<usize> = const { Cell::new(0) });
    let done = DONE.get() + work;
    DONE.set(done % OFFER_AFTER);
    if done >= OFFER_AFTER {
        std::thread::yield_now();
    }
}
