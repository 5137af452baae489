//! Zeros ahead of the log's end, written by a thread of its own.
//!
//! An fdatasync that also has to convert unwritten extents costs the file system's journal; overwriting zeros does not. But
//! whoever writes and syncs the zeros waits for them: done by the writer, a mebibyte of them forty times a second was one
//! batch in a hundred that took a millisecond longer. So does whoever syncs the same file meanwhile: one sync in ten took twice
//! as long. Therefore the next segment is made ready while this one is in its second half, all zeros, as a file of its own, and
//! only a log's first segment after a start, or one that follows before that was done, has its zeros written ahead in it.
//!
//! Invariants
//! - Bytes below `zeroed` are the writer's, those from there on this thread's: the writer claims what it is about to write,
//!   so no zero ever falls on a frame.
//! - Nothing rests on the zeros: a failure here ends them for this segment. The thread has a file description of its own,
//!   because a failed sync is reported once to each, and the writer must not miss it: it fails at its next sync. (A spare's
//!   description goes over to the writer; one whose sync failed does not.)
//! - The spare's path is either the thread's or the writer's. The thread begins one when the writer has asked and none is left;
//!   taking one takes back what was asked, and the writer asks again only in the segment that the spare has become.
//!
//! The lock is never held over I/O. The writer takes it to say that it needs more; it waits only when it overtakes the zeros
//! while a piece is being written there, for that piece and the offers in it.

use crate::disk::{self, File};
use crate::turns::{self, Turn};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Zeros are kept written this far ahead of the log's end.
pub const AHEAD_BYTES: u64 = 2 << 20;
/// Zeros written and synced at a time: what a sync of the writer may have to wait for.
const PIECE_BYTES: u64 = 128 << 10;
/// Zeros written between two offers of the core.
const BYTES_PER_OFFER: usize = 16 << 10;

/// A file for the next segment: of its size, and zero, on disk.
#[derive(Debug)]
pub struct Spare {
    /// Where it is until it has a name. A start removes what is there.
    pub path: PathBuf,
    /// Its handle.
    pub file: File,
}

/// The writer's end.
#[derive(Debug)]
pub struct ZeroAhead {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    spare_bytes: u64,
    /// A spare was asked for since the segment began.
    has_asked: bool,
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
    /// A spare is to be made, unless there is one.
    is_spare_wanted: bool,
    /// The spare, made.
    spare: Option<Spare>,
    is_stopped: bool,
}

/// A spare that is being made.
#[derive(Debug)]
struct Unfinished {
    spare: Spare,
    zeroed: u64,
}

impl ZeroAhead {
    /// Starts the thread, for a log whose segments have `segment_bytes` as a rule; the next one is made at `spare`.
    #[must_use]
    pub fn start(spare: PathBuf, segment_bytes: u64) -> Self {
        let shared = Arc::<Shared>::default();
        let thread = super::spawn("zeros", {
            let shared = Arc::clone(&shared);
            move || shared.run(&spare, segment_bytes)
        });
        Self { shared, thread: Some(thread), spare_bytes: segment_bytes, has_asked: false, known: 0 }
    }

    /// Goes over to a segment of `size` bytes that is written up to `at` and zero up to `zeroed`.
    pub fn begin(&mut self, path: PathBuf, at: u64, zeroed: u64, size: u64) {
        {
            let mut state = self.shared.idle();
            state.path = (zeroed < size).then_some(path);
            state.segment += 1;
            state.zeroed = zeroed;
            state.wanted = zeroed;
        }
        // Whether there is work or not: the thread lets go of the segment before.
        self.shared.changed.notify_one();
        self.known = zeroed;
        self.has_asked = false;
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

    /// The file for a segment of `size` bytes, if there is one. It has to have its name before [`Self::begin`]. One of another
    /// size is given up: its room may be needed.
    pub fn take_spare(&mut self, size: u64) -> Option<Spare> {
        let spare = {
            let mut state = self.shared.state.lock();
            let spare = state.spare.take();
            if spare.is_some() {
                // Asked for while this one was left over, and not looked at yet: the thread would make the next in its place.
                state.is_spare_wanted = false;
            }
            spare?
        };
        if size == self.spare_bytes {
            return Some(spare);
        }
        give_up(&spare.path, None);
        None
    }

    /// The log of a segment of `size` bytes ends at `at`: zeros are wanted from there on, and behind the middle the next segment.
    pub fn advance(&mut self, at: u64, size: u64) {
        if at > size / 2 && !self.has_asked {
            self.has_asked = true;
            self.shared.state.lock().is_spare_wanted = true;
            self.shared.changed.notify_one();
        }
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

    fn run(&self, spare_path: &Path, spare_bytes: u64) {
        turns::take(Turn::Behind);
        let mut file = None;
        let mut segment = 0;
        let mut failed_in = None;
        let mut unfinished = None;
        let mut state = self.state.lock();
        while !state.is_stopped {
            if segment != state.segment {
                // The segment before is let go of also where there is nothing to do in this one: a file that is removed
                // keeps its blocks as long as somebody has it open.
                segment = state.segment;
                file = state.path.take().and_then(|path| File::open_to_write(&path).ok());
            }
            let is_behind = state.zeroed < state.wanted && failed_in != Some(segment);
            let Some(file) = file.as_ref().filter(|_| is_behind) else {
                let is_wanted = std::mem::take(&mut state.is_spare_wanted) && state.spare.is_none();
                if unfinished.is_none() && !is_wanted {
                    self.changed.wait(&mut state);
                    continue;
                }
                drop(state);
                unfinished = match unfinished {
                    Some(spare) => go_on(spare, spare_bytes),
                    None => begin_spare(spare_path, spare_bytes),
                };
                state = self.state.lock();
                state.spare = unfinished.take_if(|spare| spare.zeroed == spare_bytes).map(|made| made.spare);
                continue;
            };
            let from = state.zeroed;
            let to = (from + PIECE_BYTES).min(state.wanted);
            state.is_writing = true;
            drop(state);
            let written = write_zeros_aside(file, from, to);
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
        let spare = state.spare.take().or(unfinished.map(|unfinished| unfinished.spare));
        drop(state);
        if let Some(spare) = spare {
            give_up(&spare.path, None);
        }
    }
}

fn begin_spare(path: &Path, size: u64) -> Option<Unfinished> {
    // Where a file cannot be preallocated, its zeros could use up the room that the log's own writes need.
    let unsupported = || io::ErrorKind::Unsupported.into();
    let file = File::create(path).and_then(|file| file.allocate(0, size)?.then_some(file).ok_or_else(unsupported));
    match file {
        Ok(file) => Some(Unfinished { spare: Spare { path: path.to_owned(), file }, zeroed: 0 }),
        Err(error) => {
            give_up(path, Some(&error));
            None
        }
    }
}

/// Writes a piece of it, on to the disk: what is left for the end would hold up syncs of other files.
fn go_on(mut unfinished: Unfinished, size: u64) -> Option<Unfinished> {
    let Unfinished { spare, zeroed } = &mut unfinished;
    let to = (*zeroed + PIECE_BYTES).min(size);
    if let Err(error) = write_zeros_aside(&spare.file, *zeroed, to).and_then(|()| spare.file.sync()) {
        give_up(&spare.path, Some(&error));
        return None;
    }
    *zeroed = to;
    Some(unfinished)
}

/// Without a spare the writer makes the next segment, and is told of a full disk. The room is given back: others may need it.
fn give_up(path: &Path, error: Option<&io::Error>) {
    if let Some(error) = error {
        tracing::debug!(%error, "no file was made ahead for the log's next segment");
    }
    if let Err(error) = disk::remove_file(path) {
        tracing::debug!(%error, "the file for the log's next segment was not removed");
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

/// The same, offering the core in between: where the system gets its memory from a host, page by page, 64 KiB take 170 us, and
/// whoever serves a request waited for as much.
fn write_zeros_aside(file: &File, from: u64, to: u64) -> io::Result<()> {
    for at in (from..to).step_by(BYTES_PER_OFFER) {
        write_zeros(file, at, to.min(at + BYTES_PER_OFFER as u64))?;
        std::thread::yield_now();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_never_fall_on_what_was_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let mut zeros = ZeroAhead::start(dir.path().join("spare"), 1 << 20);
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

    fn wait_for_spare(zeros: &ZeroAhead) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while zeros.shared.state.lock().spare.is_none() {
            assert!(std::time::Instant::now() < deadline, "no spare was made");
            std::thread::yield_now();
        }
    }

    /// At the end of a segment, with the next one made.
    fn with_spare(dir: &Path, size: u64) -> ZeroAhead {
        let mut zeros = ZeroAhead::start(dir.join("spare"), size);
        let path = dir.join("a");
        File::create(&path).unwrap().set_length(size).unwrap();
        zeros.begin(path, 0, size, size);
        zeros.advance(size, size);
        wait_for_spare(&zeros);
        zeros
    }

    #[test]
    fn the_next_segment_is_made_ready_in_the_second_half_of_this_one() {
        let dir = tempfile::tempdir().unwrap();
        let size = (1 << 20) + 4096;
        let mut zeros = ZeroAhead::start(dir.path().join("spare"), size);
        let path = dir.path().join("a");
        File::create(&path).unwrap().set_length(size).unwrap();
        zeros.begin(path, 0, 0, size);
        zeros.advance(size / 2, size);
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(zeros.take_spare(size).is_none(), "not asked for yet");
        zeros.advance(size / 2 + 1, size);
        wait_for_spare(&zeros);
        let spare = zeros.take_spare(size).unwrap();
        let bytes = std::fs::read(&spare.path).unwrap();
        assert!(bytes.len() as u64 == size && bytes.iter().all(|&b| b == 0));
        let path = dir.path().join("b");
        std::fs::rename(&spare.path, &path).unwrap();
        // All of it is zero: what is written is all that changes.
        zeros.begin(path, 100, size, size);
        zeros.claim(size);
        spare.file.write_all_at(&[7; 5], 100).unwrap();
        zeros.advance(size - 1, size);
        drop(zeros);
        assert_eq!(std::fs::read(dir.path().join("b")).unwrap()[100..105], [7; 5]);
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| name == "a" || name == "b"), "what nobody took is removed: {names:?}");
    }

    /// A spare that was left over is taken in the second half of a segment: what was asked for there must not be made in its place
    /// before it has its name.
    #[test]
    fn what_was_taken_is_the_writers() {
        let dir = tempfile::tempdir().unwrap();
        let size = 256 << 10;
        let large = 8 << 20;
        for round in 0..20 {
            let mut zeros = with_spare(dir.path(), size);
            // A segment of another size came next; in its second half the thread has zeros to write ahead.
            let path = dir.path().join("large");
            File::create(&path).unwrap().set_length(large).unwrap();
            zeros.begin(path, 0, 0, large);
            zeros.advance(large / 2 + 1, large);
            let spare = zeros.take_spare(size).unwrap();
            spare.file.write_all_at(&[7; 4096], 0).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(10 * (round % 3)));
            let path = dir.path().join("b");
            std::fs::rename(&spare.path, &path).unwrap();
            zeros.begin(path.clone(), 4096, size, size);
            drop(zeros);
            assert_eq!(std::fs::read(&path).unwrap()[..4096], [7; 4096]);
        }
    }

    #[test]
    fn a_spare_of_another_size_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let size = 256 << 10;
        let mut zeros = with_spare(dir.path(), size);
        assert!(dir.path().join("spare").exists());
        assert!(zeros.take_spare(2 * size).is_none());
        assert!(!dir.path().join("spare").exists(), "its room is free");
    }
}
