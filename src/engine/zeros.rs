//! Zeros ahead of the log's end, written by a thread of its own.
//!
//! An fdatasync that also has to convert unwritten extents costs the file system's journal; overwriting zeros does not. But
//! whoever writes and syncs the zeros waits for them: done by the writer, a mebibyte of them forty times a second was one
//! batch in a hundred that took a millisecond longer.
//!
//! Invariants
//! - Bytes below `zeroed` are the writer's, those from there on this thread's: the writer claims what it is about to write,
//!   so no zero ever falls on a frame.
//! - Nothing rests on the zeros: a failure here ends them for this segment. The thread has a file description of its own,
//!   because a failed sync is reported once to each, and the writer must not miss it: it fails at its next sync.
//!
//! The lock is never held over I/O. The writer takes it to say that it needs more; it waits only when it overtakes the zeros
//! while a piece is being written there, for that piece.

use crate::disk::File;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use thread_priority::unix::NormalThreadSchedulePolicy;

/// Zeros are kept written this far ahead of the log's end.
pub const AHEAD_BYTES: u64 = 2 << 20;
/// Zeros written and synced at a time: what a sync of the writer may have to wait for.
const PIECE_BYTES: u64 = 128 << 10;

/// The writer's end.
#[derive(Debug)]
pub struct ZeroAhead {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// The zeros reach at least so far.
    known: u64,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Told when no piece is being written any more.
    written: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The segment, not yet opened here.
    path: Option<PathBuf>,
    /// Counts segments.
    segment: u64,
    zeroed: u64,
    /// A piece from `zeroed` on is being written.
    is_writing: bool,
    wanted: u64,
    is_stopped: bool,
}

impl ZeroAhead {
    /// Starts the thread.
    #[must_use]
    pub fn start() -> Self {
        let shared = Arc::<Shared>::default();
        let thread = super::spawn("zeros", {
            let shared = Arc::clone(&shared);
            move || shared.run()
        });
        Self { shared, thread: Some(thread), known: 0 }
    }

    /// Goes over to a segment of `size` bytes that is written up to `at` and zero up to `zeroed`.
    pub fn begin(&mut self, path: PathBuf, at: u64, zeroed: u64, size: u64) {
        {
            let mut state = self.shared.idle();
            state.path = Some(path);
            state.segment += 1;
            state.zeroed = zeroed;
            state.wanted = zeroed;
        }
        self.known = zeroed;
        self.advance(at, size);
    }

    /// Makes everything below `end` the writer's. Must precede every write to the segment.
    pub fn claim(&mut self, end: u64) {
        if end > self.known {
            let mut state = self.shared.idle();
            state.zeroed = state.zeroed.max(end);
            self.known = state.zeroed;
        }
    }

    /// The log of a segment of `size` bytes ends at `at`: zeros are wanted from there on.
    pub fn advance(&mut self, at: u64, size: u64) {
        if self.known >= size || at + AHEAD_BYTES / 2 < self.known {
            return;
        }
        let mut state = self.shared.state.lock();
        state.wanted = (at + AHEAD_BYTES).min(size);
        self.known = state.zeroed;
        drop(state);
        self.shared.changed.notify_one();
    }
}

impl Drop for ZeroAhead {
    fn drop(&mut self) {
        self.shared.state.lock().is_stopped = true;
        self.shared.changed.notify_one();
        self.thread.take().into_iter().for_each(super::join);
    }
}

impl Shared {
    /// The state, while no piece is being written.
    fn idle(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        while state.is_writing {
            self.written.wait(&mut state);
        }
        state
    }

    fn run(&self) {
        super::stand_back(NormalThreadSchedulePolicy::Batch);
        let mut file = None;
        let mut failed_in = None;
        let mut state = self.state.lock();
        while !state.is_stopped {
            if let Some(path) = state.path.take() {
                file = File::open_to_write(&path).ok();
            }
            let Some(file) = file.as_ref().filter(|_| state.zeroed < state.wanted && failed_in != Some(state.segment))
            else {
                self.changed.wait(&mut state);
                continue;
            };
            let from = state.zeroed;
            let to = (from + PIECE_BYTES).min(state.wanted);
            let segment = state.segment;
            state.is_writing = true;
            drop(state);
            let written = write_zeros(file, from, to);
            {
                let mut state = self.state.lock();
                state.is_writing = false;
                state.zeroed = to;
            }
            self.written.notify_one();
            if let Err(error) = written.and_then(|()| file.sync()) {
                tracing::warn!(%error, "no more zeros ahead in this segment of the log");
                failed_in = Some(segment);
            }
            state = self.state.lock();
        }
    }
}

/// Overwrites a range with zeros.
pub fn write_zeros(file: &File, from: u64, to: u64) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut at = from;
    while at < to {
        // The cast: at most the length of ZEROS.
        let length = (to - at).min(ZEROS.len() as u64) as usize;
        file.write_all_at(&ZEROS[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_never_fall_on_what_was_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let mut zeros = ZeroAhead::start();
        for name in ["a", "b"] {
            let path = dir.path().join(name);
            let size = 3 * AHEAD_BYTES + 4097;
            let file = File::create(&path).unwrap();
            file.set_length(size).unwrap();
            let mut at = 100;
            zeros.begin(path.clone(), at, at, size);
            // Steps small and larger than what is zeroed ahead, so that the writer is now behind, now in front.
            for step in [1, 700, 70_000, 3_000_000, 5, 1_000_000, 2_000_000].into_iter().cycle().take(40) {
                let length = usize::try_from(step.min(size - at)).unwrap();
                zeros.claim(at + length as u64);
                file.write_all_at(&vec![7; length], at).unwrap();
                at += length as u64;
                zeros.advance(at, size);
            }
            zeros.claim(size);
            let bytes = std::fs::read(path).unwrap();
            assert_eq!(bytes.len() as u64, size);
            assert!(bytes[..100].iter().all(|&b| b == 0));
            let wrong = bytes[100..].iter().position(|&b| b != 7).map(|p| p + 100);
            assert!(wrong.is_none_or(|p| p as u64 == at), "a zero at {wrong:?}, written up to {at}");
        }
    }
}
