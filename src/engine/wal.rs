//! The log on disk: preallocated segments of checksummed frames, one writer, many readers.
//!
//! ```text
//! Wal (sequencer's)  append ─▶ sync ─▶ publish ──┐          Segment.end: how far readers may look
//! Log (shared)       segments ◀──────────────────┘─▶ read_after(revision)   streams, JSON history
//! ```
//!
//! Invariants
//! - Frames are contiguous, their revisions too; a gap frame names the revisions a crash of a relaxed mode gave up.
//! - Readers never look past `Segment::end`, which moves only after the bytes before it are as durable as the mode says.
//! - A frame says how far the log was durable when it was written. So a bad frame at the end is a torn tail when nothing
//!   valid behind it claims that its revision was durable, and damage when something does.
//! - A segment is created beside, synced and renamed, before the one before it is sealed. A sealed last segment
//!   therefore means that a file is missing.
//!
//! Zeros are written ahead of the end, by `zeros.rs`.
//!
//! Deliberately absent: compression, per-record syncing, retries. A failed write or sync is final (see `sequencer.rs`).

use super::codec::{Record, decode_record, encode_record};
use super::zeros::{Spare, ZeroAhead, write_zeros};
use crate::disk::{self, File};
use crate::error::Error;
use crate::faults::{self, Bug};
use crate::revision::Revision;
use crate::turns;
use crate::wire::{Put, Reader};
use memmap2::MmapMut;
use parking_lot::{Mutex, RwLock};
use rayon::prelude::*;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// First bytes of a segment.
const MAGIC: &[u8; 8] = b"KISSVLOG";
/// Format version of segments and records. Those of version 1 carry no answers.
const VERSION: u32 = 2;
/// Bytes before the first frame.
pub const SEGMENT_HEADER_BYTES: usize = 64;
/// Bytes before a frame's payload.
pub const FRAME_HEADER_BYTES: usize = 32;
/// Frames start at multiples of this, so that a search for frames behind a bad one has few places to try.
const FRAME_ALIGN: usize = 8;
/// Bytes of a segment that one thread reads at a time, when the log is opened.
const READ_BYTES: usize = 4 << 20;
/// Zeros a new segment begins with.
const FIRST_ZEROS_BYTES: u64 = 256 << 10;
/// Space in the last segment that only deletes may use once the disk is full, and at most a quarter of a segment.
const KEPT_FOR_DELETES_BYTES: u64 = 256 << 10;
/// Capacity the frame buffer keeps from batch to batch.
const BUFFER_BYTES_KEPT: usize = 4 << 20;
/// Distance between entries of the sparse index.
const INDEX_STEP_BYTES: u64 = 64 << 10;
/// Smallest and largest segment. The lab wants many segments and little to copy.
const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = if cfg!(test) { 8 << 10 } else { 512 << 10 }..=64 << 20;
/// Segments that `MAX_LOG_MB` is divided into, so that dropping one drops little history.
const SEGMENTS_WANTED: u64 = 8;
/// Revisions reserved at a time in the relaxed modes.
pub const RESERVED_REVISIONS: u64 = 1 << 20;
/// A restored history goes on behind the next multiple of this: what the original wrote after the backup is not known, but no
/// database writes so much (at 100,000 a second it takes four months), and JavaScript still counts 8,000 restores exactly.
const RESTORE_STEP: u64 = 1 << 40;

#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Record = 1,
    /// No payload: carries how far the log is durable.
    Mark = 2,
    /// Payload: u64, revisions up to here may be handed out without being durable.
    Reserve = 3,
    /// Payload: u64, revisions from `first_revision` to here were lost in a crash of a relaxed mode.
    Gap = 4,
    /// No payload: the next segment exists.
    Seal = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Record, Self::Mark, Self::Reserve, Self::Gap, Self::Seal].into_iter().find(|&k| k as u8 == byte)
    }
}

/// Revisions lost in a crash of a relaxed mode, both ends included. `to` itself, one beyond the reservation, was never handed
/// out: it is the head after the crash, from which a client may resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// First lost.
    pub from: Revision,
    /// Last lost.
    pub to: Revision,
}

#[derive(Clone, Copy, Debug)]
struct FrameHeader {
    length: u32,
    crc: u32,
    first_revision: Revision,
    count: u32,
    kind: Kind,
    durable: Revision,
}

impl FrameHeader {
    /// Reads a header that could be one; the checksum is a separate question.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let header = Self {
            length: reader.u32("length").ok()?,
            crc: reader.u32("crc").ok()?,
            first_revision: reader.revision("revision").ok()?,
            count: reader.u32("count").ok()?,
            kind: Kind::from_byte(reader.byte("kind").ok()?)?,
            durable: {
                reader.take(3, "reserved").ok()?;
                reader.revision("durable").ok()?
            },
        };
        Some(header)
    }

    fn frame_bytes(&self) -> usize {
        (FRAME_HEADER_BYTES + self.length as usize).next_multiple_of(FRAME_ALIGN)
    }
}

/// A frame found whole.
struct WholeFrame<'a> {
    header: FrameHeader,
    payload: &'a [u8],
}

/// The frame at the front of `bytes`, if whole and its checksum holds.
fn frame_at(bytes: &[u8], salt: u32) -> Option<WholeFrame<'_>> {
    let header = FrameHeader::parse(bytes)?;
    let payload = bytes.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES.checked_add(header.length as usize)?)?;
    let crc = crc32c::crc32c_append(salt, &bytes[8..FRAME_HEADER_BYTES]);
    (crc32c::crc32c_append(crc, payload) == header.crc || faults::is_on(Bug::SkipChecksum))
        .then_some(WholeFrame { header, payload })
}

/// Builds frames for one segment's salt into a buffer that is kept from batch to batch.
#[derive(Debug)]
struct FrameBuffer {
    bytes: Vec<u8>,
}

impl FrameBuffer {
    fn push(&mut self, kind: Kind, first: Revision, count: u32, durable: Revision, payload: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        self.bytes.put_u64(0);
        self.bytes.put_revision(first);
        self.bytes.put_u32(count);
        self.bytes.extend_from_slice(&[kind as u8, 0, 0, 0]);
        self.bytes.put_revision(durable);
        payload(&mut self.bytes);
        let length = self.bytes.len() - start - FRAME_HEADER_BYTES;
        let length = u32::try_from(length).expect("a record is bounded far below 4 GiB");
        self.bytes[start..start + 4].copy_from_slice(&length.to_le_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(FRAME_ALIGN), 0);
    }

    /// Empties the buffer; what an unusually large batch made it grow to is given back.
    fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(BUFFER_BYTES_KEPT);
    }

    /// Fills in the checksums, which depend on the segment the frames go to.
    fn fill_checksums(&mut self, salt: u32) {
        let mut at = 0;
        while at < self.bytes.len() {
            let header = FrameHeader::parse(&self.bytes[at..]).expect("a frame just built");
            let crc =
                crc32c::crc32c_append(salt, &self.bytes[at + 8..at + FRAME_HEADER_BYTES + header.length as usize]);
            self.bytes[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
            at += header.frame_bytes();
        }
    }
}

/// One file of the log.
#[derive(Debug)]
pub struct Segment {
    first_revision: Revision,
    /// `None` when the segment lives in memory.
    path: Option<PathBuf>,
    file: File,
    /// The newest segment's file by a description of its own, from before anything was written: for [`Log::sync`]. The system tells each
    /// of a failed write once, and none that comes later, so the writer and whoever syncs beside it have one each. The lock is
    /// held to copy or drop it.
    aside: Mutex<Option<Arc<File>>>,
    salt: u32,
    /// Bytes allocated.
    size: u64,
    /// Readers look no further. Moved by the writer alone, after the bytes are there.
    end: AtomicU64,
    /// Where to start reading; grows on demand, never past `end`. A lock of its own, held over page-cache reads: readers
    /// of one segment wait for the first of them to index it instead of all doing so.
    index: Mutex<Index>,
}

/// Sparse index of a segment: an entry about every [`INDEX_STEP_BYTES`].
#[derive(Debug, Default)]
struct Index {
    entries: Vec<IndexEntry>,
    /// How far frames were walked.
    walked: u64,
}

#[derive(Clone, Copy, Debug)]
struct IndexEntry {
    first_revision: Revision,
    ts_ms: u64,
    at: u64,
}

fn segment_header(version: u32, first_revision: Revision, salt: u32, size: u64) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.put_u32(version);
    header.put_u32(salt);
    header.put_revision(first_revision);
    header.put_u64(size);
    header.resize(SEGMENT_HEADER_BYTES - 4, 0);
    header.put_u32(crc32c::crc32c(&header));
    header
}

/// [`KEPT_FOR_DELETES_BYTES`] of a segment of this size.
fn kept_for_deletes(segment_bytes: u64) -> u64 {
    KEPT_FOR_DELETES_BYTES.min(segment_bytes / 4)
}

fn segment_path(dir: &Path, first_revision: Revision) -> PathBuf {
    dir.join(format!("{:020}.log", first_revision.0))
}

/// Where the next segment is made ahead of time. A name like a segment's, of a revision that does not exist.
fn spare_path(dir: &Path) -> PathBuf {
    segment_path(dir, Revision::ZERO).with_extension("tmp")
}

/// A number that differs from segment to segment, so that a frame left over from another file is never taken for ours.
fn new_salt() -> u32 {
    use std::hash::{BuildHasher, Hasher};
    // The cast: any 32 of the 64 random bits do.
    std::hash::RandomState::new().build_hasher().finish() as u32
}

impl Segment {
    /// Creates a segment whose first bytes are `frames` (without their checksums yet), of the spare if there is one. Tells where
    /// the next frame goes.
    fn create(
        dir: Option<&Path>,
        first_revision: Revision,
        size: u64,
        mut frames: FrameBuffer,
        spare: Option<Spare>,
    ) -> Result<(Self, u64), AppendError> {
        let salt = new_salt();
        frames.fill_checksums(salt);
        let header = segment_header(VERSION, first_revision, salt, size);
        let end = (header.len() + frames.bytes.len()) as u64;
        let begin = |file: &File| -> io::Result<()> {
            file.write_all_at(&header, 0)?;
            file.write_all_at(&frames.bytes, header.len() as u64)?;
            file.sync()
        };
        let fill = |file: &File| -> io::Result<()> {
            if !file.allocate(0, size)? {
                // Some file systems cannot preallocate; the log then grows into a hole and finds a full disk when it writes.
                file.set_length(size)?;
            }
            write_zeros(file, end, (end + FIRST_ZEROS_BYTES).min(size))?;
            begin(file)
        };
        let mut aside = None;
        let (path, file) = match dir {
            None => {
                let path = Path::new("in-memory log");
                let file = File::in_memory().and_then(|file| fill(&file).map(|()| file));
                (None, file.map_err(Error::io("cannot get memory for", path)).map_err(AppendError::before_anything)?)
            }
            Some(dir) => {
                let path = segment_path(dir, first_revision);
                let (beside, file) = match spare {
                    Some(Spare { path, file }) => (path, begin(&file).map(|()| file)),
                    None => {
                        let beside = path.with_extension("tmp");
                        let file = File::create(&beside).and_then(|file| fill(&file).map(|()| file));
                        (beside, file)
                    }
                };
                // The directory is opened before there is no way back: files may be what is missing.
                let file = file.and_then(|file| Ok((file, File::open_to_write(&beside)?, disk::Dir::open(dir)?)));
                let (file, beside_it, named_in) = file.map_err(|e| {
                    // What is left of it would only take the space that is missing.
                    disk::remove_file(&beside).ok();
                    AppendError::before_anything(Error::io("cannot create", &path)(e))
                })?;
                // From here on a start may find it.
                let named = disk::rename(&beside, &path).and_then(|()| named_in.sync());
                named.map_err(Error::io("cannot name", &path)).map_err(AppendError::Failed)?;
                aside = Some(Arc::new(beside_it));
                (Some(path), file)
            }
        };
        let segment = Self {
            first_revision,
            path,
            file,
            salt,
            size,
            end: AtomicU64::new(end),
            aside: Mutex::new(aside),
            index: Mutex::new(Index { entries: Vec::new(), walked: SEGMENT_HEADER_BYTES as u64 }),
        };
        Ok((segment, end))
    }

    /// The file by a description of its own; see `aside`.
    fn open_aside(path: &Path) -> Result<Arc<File>, Error> {
        File::open_to_write(path).map(Arc::new).map_err(Error::io("cannot open", path))
    }

    fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open_to_write(path).map_err(Error::io("cannot open", path))?;
        let length = file.length().map_err(Error::io("cannot stat", path))?;
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        if length < bytes.len() as u64 {
            return Err(Error::corrupt(path, length, "the file ends inside its header"));
        }
        file.read_exact_at(&mut bytes, 0).map_err(Error::io("cannot read", path))?;
        let mut reader = Reader(&bytes[MAGIC.len()..]);
        let fields =
            (|| Ok((reader.u32("version")?, reader.u32("salt")?, reader.revision("revision")?, reader.u64("size")?)))();
        let (version, salt, first_revision, size) =
            fields.map_err(|e: crate::wire::Malformed| Error::corrupt(path, 0, e.0))?;
        if bytes[..MAGIC.len()] == *MAGIC && !(1..=VERSION).contains(&version) {
            return Err(Error::corrupt(
                path,
                8,
                format!(
                    "format version {version}; this program reads up to {VERSION}: unless it is damaged, use the release that wrote it"
                ),
            ));
        }
        if bytes[..] != segment_header(version, first_revision, salt, size)[..] {
            return Err(Error::corrupt(path, 0, "the segment header does not match its checksum"));
        }
        let name = path.file_stem().and_then(|n| n.to_str()).and_then(|n| n.parse().ok());
        if name != Some(first_revision.0) {
            return Err(Error::corrupt(
                path,
                16,
                format!("the file name does not fit its first revision {first_revision}"),
            ));
        }
        if length != size {
            return Err(Error::corrupt(
                path,
                length.min(size),
                format!("the file has {length} bytes, it was created with {size}"),
            ));
        }
        Ok(Self {
            first_revision,
            path: Some(path.to_owned()),
            file,
            salt,
            size,
            end: AtomicU64::new(0),
            aside: Mutex::default(),
            index: Mutex::new(Index { entries: Vec::new(), walked: SEGMENT_HEADER_BYTES as u64 }),
        })
    }

    /// Writes the frame that says that the next segment exists, at the end of the frames.
    fn seal(&self, at: u64, next: Revision) -> Result<(), Error> {
        let mut seal = FrameBuffer { bytes: Vec::new() };
        seal.push(Kind::Seal, next, 0, next.prev(), |_| ());
        seal.fill_checksums(self.salt);
        let written = self.file.write_all_at(&seal.bytes, at).and_then(|()| self.file.sync());
        written.map_err(Error::io("cannot seal", self.name()))?;
        self.end.store(at + seal.bytes.len() as u64, Ordering::Release);
        Ok(())
    }

    /// Writes what is there once more, and syncs it.
    fn write_again(&self, from: u64, end: u64) -> Result<(), Error> {
        let mut bytes = vec![0; 1 << 20];
        let mut at = from;
        let mut again = || {
            while at < end && !faults::is_on(Bug::TrustCache) {
                // The cast: at most the buffer's length.
                let part = &mut bytes[..(end - at).min(1 << 20) as usize];
                self.file.read_exact_at(part, at)?;
                self.file.write_all_at(part, at)?;
                at += part.len() as u64;
            }
            self.file.sync()
        };
        again().map_err(Error::io("cannot write again", self.name()))
    }

    /// The same for the seal, with which a sealed segment ends.
    fn write_seal_again(&self) -> Result<(), Error> {
        let end = self.end.load(Ordering::Acquire);
        self.write_again(end.saturating_sub(FRAME_HEADER_BYTES as u64), end)
    }

    fn name(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new("in-memory log"))
    }

    /// The whole segment, and where the last of its data ends. Only what was ever written is read: most of a log's first
    /// segment is a hole. (One made of a spare is all zeros: reading those takes some tens of milliseconds.)
    fn read_data(&self) -> Result<(MmapMut, usize), Error> {
        let size =
            usize::try_from(self.size).map_err(|_| Error::corrupt(self.name(), 24, "the segment is too large"))?;
        // Zeroed memory that is not touched costs nothing. Not of the heap, which would keep it for a while and put other things there.
        let mut bytes = MmapMut::map_anon(size).map_err(Error::io("cannot get memory for", self.name()))?;
        let mut at = 0;
        let mut data_end = 0;
        while let Some(data) = self.file.data_from(at, self.size) {
            // Both ends are at most `size`, which is a usize.
            let (start, end) = (data.start as usize, data.end as usize);
            let range = &mut bytes[start..end];
            // By all cores: where memory comes from a host page by page, most of the time goes into touching it for the first time.
            let read = if range.len() <= READ_BYTES {
                self.file.read_exact_at(range, data.start)
            } else {
                let pieces = range.par_chunks_mut(READ_BYTES).enumerate();
                pieces.try_for_each(|(n, piece)| self.file.read_exact_at(piece, data.start + (n * READ_BYTES) as u64))
            };
            read.map_err(Error::io("cannot read", self.name()))?;
            data_end = end;
            at = data.end.max(data.start + 1);
        }
        Ok((bytes, data_end))
    }

    /// Bytes `[at, at + length)`, cut at `end`.
    fn read(&self, at: u64, length: usize) -> Result<Vec<u8>, Error> {
        let end = self.end.load(Ordering::Acquire);
        // The cast: at most `length`, which is a usize.
        let length = (end.saturating_sub(at)).min(length as u64) as usize;
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at).map_err(Error::io("cannot read", self.name()))?;
        Ok(bytes)
    }

    /// Calls `visit` for each frame from `at` on until it says stop or the end is reached; returns where it stopped.
    /// Reads about `chunk` bytes at a time, more where a frame is larger.
    fn walk(
        &self,
        mut at: u64,
        chunk: usize,
        mut visit: impl FnMut(u64, &WholeFrame<'_>) -> Result<bool, Error>,
    ) -> Result<u64, Error> {
        let mut want = chunk;
        loop {
            let bytes = self.read(at, want)?;
            if bytes.is_empty() {
                return Ok(at);
            }
            let mut inside = 0;
            while inside < bytes.len() {
                let Some(found) = frame_at(&bytes[inside..], self.salt) else { break };
                let next = inside + found.header.frame_bytes();
                if !visit(at + inside as u64, &found)? {
                    return Ok(at + inside as u64);
                }
                inside = next;
            }
            if inside == 0 {
                // Either the frame is larger than what was read, or it is damaged.
                let header = FrameHeader::parse(&bytes);
                let needs = header.map_or(0, |h| h.frame_bytes());
                if needs <= bytes.len() || bytes.len() < want {
                    return Err(Error::corrupt(self.name(), at, "a frame does not match its checksum"));
                }
                want = needs;
                continue;
            }
            at += inside as u64;
            want = chunk;
        }
    }

    /// Where to start reading to find the first frame behind the last index entry that is `wanted`.
    fn seek(&self, wanted: impl Fn(&IndexEntry) -> bool) -> u64 {
        let mut index = self.index.lock();
        if index.walked < self.end.load(Ordering::Acquire) {
            let from = index.walked;
            // A frame that is damaged is met, and told, by whoever reads that far.
            let _met_later = self.walk(from, 1 << 20, |at, found| {
                let last = index.entries.last().map(|entry| entry.at);
                if found.header.kind == Kind::Record && last.is_none_or(|last| at - last >= INDEX_STEP_BYTES) {
                    let ts_ms = Reader(found.payload).u64("ts").unwrap_or(0);
                    index.entries.push(IndexEntry { first_revision: found.header.first_revision, ts_ms, at });
                }
                index.walked = at + found.header.frame_bytes() as u64;
                Ok(true)
            });
        }
        let behind = index.entries.partition_point(wanted);
        behind.checked_sub(1).map_or(SEGMENT_HEADER_BYTES as u64, |i| index.entries[i].at)
    }
}

/// The segments, shared between the writer and everybody who reads history.
#[derive(Debug)]
pub struct Log {
    /// Oldest first, at least one. Written when a segment is added or dropped, so readers hardly ever wait.
    segments: RwLock<Vec<Arc<Segment>>>,
    gaps: RwLock<Vec<Gap>>,
    /// Revisions after which everything is still needed: of backups under way.
    holds: Mutex<Vec<Revision>>,
}

/// See [`Log::hold`].
#[derive(Debug)]
pub struct Hold {
    log: Arc<Log>,
    revision: Revision,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut holds = self.log.holds.lock();
        if let Some(mine) = holds.iter().position(|held| *held == self.revision) {
            holds.swap_remove(mine);
        }
    }
}

/// Records read for a stream.
#[derive(Debug, Default)]
pub struct History {
    /// In order. The first may begin before what was asked for, when a batch contains it.
    pub records: Vec<Arc<Record>>,
    /// Up to where this reading is complete.
    pub reached: Revision,
}

impl Log {
    /// Oldest revision that can be read.
    #[must_use]
    pub fn oldest(&self) -> Revision {
        self.segments.read()[0].first_revision
    }

    /// Bytes of disk the segments take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.segments.read().iter().map(|s| s.size).sum()
    }

    /// Whether `revision` was given up in a crash of a relaxed mode.
    #[must_use]
    pub fn is_lost(&self, revision: Revision) -> bool {
        // The last of the range was never handed out before the crash; it is the head after it.
        self.gaps.read().iter().any(|g| g.from <= revision && revision < g.to)
    }

    /// Lost ranges, oldest first.
    #[must_use]
    pub fn gaps(&self) -> Vec<Gap> {
        self.gaps.read().clone()
    }

    /// Syncs the newest segment, beside the writer: for snapshots in the relaxed modes. Older ones were synced when the
    /// writer left them.
    pub fn sync(&self) -> Result<(), Error> {
        let Some(active) = self.segments.read().last().cloned() else { return Ok(()) };
        let aside = active.aside.lock().clone();
        aside.map_or(Ok(()), |file| file.sync().map_err(Error::io("cannot sync", active.name())))
    }

    /// Adds lost ranges known from a snapshot: their frames may have gone with old segments.
    pub fn add_gaps(&self, gaps: &[Gap]) {
        let mut known = self.gaps.write();
        for gap in gaps {
            if !known.contains(gap) {
                known.push(*gap);
            }
        }
        known.sort_by_key(|g| g.from);
    }

    /// Records after `revision`, about `bytes_max` bytes of them; `None` when the log no longer reaches back that far.
    /// `head` is what may be seen. Blocking: reads from the page cache or disk.
    pub fn read_after(&self, revision: Revision, head: Revision, bytes_max: usize) -> Result<Option<History>, Error> {
        let mut reached = revision;
        let mut records = Vec::new();
        let mut bytes = 0;
        while reached < head && bytes < bytes_max {
            let (segment, next_first) = {
                let segments = self.segments.read();
                let after = segments.partition_point(|s| s.first_revision <= reached.next());
                if after == 0 {
                    if records.is_empty() {
                        return Ok(None);
                    }
                    break;
                }
                (Arc::clone(&segments[after - 1]), segments.get(after).map(|s| s.first_revision))
            };
            let from = segment.seek(|entry| entry.first_revision <= reached.next());
            // The index leads to somewhat before what is asked for.
            let chunk = bytes_max.saturating_add(INDEX_STEP_BYTES as usize).min(256 << 10);
            let walked = segment.walk(from, chunk, |at, found| {
                let header = &found.header;
                if header.kind != Kind::Record {
                    return Ok(true);
                }
                let last = Revision(header.first_revision.0 + u64::from(header.count) - 1);
                if last <= reached {
                    return Ok(true);
                }
                if last > head {
                    return Ok(false);
                }
                let record = decode_record(header.first_revision, header.count, found.payload)
                    .map_err(|e| Error::corrupt(segment.name(), at, e.0))?;
                bytes += found.header.frame_bytes();
                records.push(Arc::new(record));
                reached = last;
                Ok(bytes < bytes_max)
            });
            if let Err(error) = walked {
                if records.is_empty() {
                    return Err(error);
                }
                // What lies before damage is read; who goes on from there meets it.
                break;
            }
            if bytes >= bytes_max || reached >= head {
                break;
            }
            match next_first {
                // Revisions between the end of this segment and the next are a gap.
                Some(first) => reached = reached.max(first.prev().min(head)),
                // The writer may have sealed this segment since: look again, unless nothing can have changed.
                None if self.segments.read().last().is_some_and(|s| Arc::ptr_eq(s, &segment)) => {
                    reached = head;
                }
                None => {}
            }
        }
        Ok(Some(History { records, reached }))
    }

    /// The newest revision written at or before a time: what `since=<time>` resumes after. `None` when everything in the
    /// log is later. Blocking.
    pub fn revision_at(&self, ts_ms: u64) -> Result<Option<Revision>, Error> {
        Ok(self.newest_at(ts_ms)?.map(|(revision, _)| revision))
    }

    /// The same, and when it was written.
    fn newest_at(&self, ts_ms: u64) -> Result<Option<(Revision, u64)>, Error> {
        let segments = self.segments.read().clone();
        for segment in segments.iter().rev() {
            let from = segment.seek(|entry| entry.ts_ms <= ts_ms);
            let mut newest = None;
            segment.walk(from, 256 << 10, |_, found| {
                if found.header.kind != Kind::Record {
                    return Ok(true);
                }
                let record_ts = Reader(found.payload).u64("ts").unwrap_or(u64::MAX);
                if record_ts > ts_ms {
                    return Ok(false);
                }
                newest = Some((Revision(found.header.first_revision.0 + u64::from(found.header.count) - 1), record_ts));
                Ok(true)
            })?;
            if newest.is_some() {
                return Ok(newest);
            }
        }
        Ok(None)
    }

    /// Keeps what is after `revision` from being dropped, as long as the hold lives.
    pub fn hold(self: &Arc<Self>, revision: Revision) -> Hold {
        self.holds.lock().push(revision);
        Hold { log: Arc::clone(self), revision }
    }

    /// Drops the oldest segments while there are more than `bytes_max` of them and `covered` (a durable snapshot's
    /// revision) includes all they hold. Returns how many went.
    pub fn drop_oldest(&self, bytes_max: u64, covered: Revision) -> Result<usize, Error> {
        let covered = self.holds.lock().iter().fold(covered, |covered, held| covered.min(*held));
        let mut dropped = 0;
        while self.bytes() > bytes_max {
            let gone = {
                let segments = self.segments.read();
                let Some(next) = segments.get(1) else { break };
                if next.first_revision > covered.next() && !faults::is_on(Bug::DropUncovered) {
                    break;
                }
                Arc::clone(&segments[0])
            };
            // One by one and synced, so that no older segment can outlive a newer one.
            let dir = gone.path.as_deref().and_then(Path::parent);
            if let (Some(dir), 0) = (dir, dropped) {
                // A sync that failed, the last time, may have left the removal of one before to be made durable.
                disk::sync_dir(dir).map_err(Error::io("cannot sync", dir))?;
            }
            if let Some(path) = &gone.path {
                disk::remove_file(path).map_err(Error::io("cannot remove", path))?;
            }
            // Gone, also where the sync fails.
            self.segments.write().remove(0);
            dropped += 1;
            if let Some(dir) = dir {
                disk::sync_dir(dir).map_err(Error::io("cannot sync", dir))?;
            }
        }
        Ok(dropped)
    }
}

/// What went wrong with an append.
#[derive(Debug)]
pub enum AppendError {
    /// No room for another segment, no file to open for it, or no room for the batch in this one. Nothing of it is there; try again when there is.
    Full(Error),
    /// The disk failed. What was written may or may not be there: stop writing.
    Failed(Error),
}

impl AppendError {
    /// Of something that went wrong before anything could be found: want of space or of files passes.
    fn before_anything(error: Error) -> Self {
        if error.is_storage_full() || error.is_out_of_files() { Self::Full(error) } else { Self::Failed(error) }
    }
}

impl From<AppendError> for Error {
    fn from(error: AppendError) -> Self {
        let (AppendError::Full(error) | AppendError::Failed(error)) = error;
        error
    }
}

/// The writer's end of the log. Owned by the sequencer.
#[derive(Debug)]
pub struct Wal {
    dir: Option<PathBuf>,
    log: Arc<Log>,
    active: Arc<Segment>,
    /// Where the next frame goes.
    at: u64,
    /// Behind this nothing was synced yet.
    synced: u64,
    /// `None` when the log lives in memory.
    zeros: Option<ZeroAhead>,
    /// The newest revision appended.
    appended: Revision,
    /// The newest revision known to be on disk.
    durable: Revision,
    /// The newest revision a frame on disk vouches for.
    vouched: Revision,
    reserved: Revision,
    /// When the newest record that was found at the start was written, by its own account; zero where there was none.
    newest_ts_ms: u64,
    segment_bytes: u64,
    frames: FrameBuffer,
}

/// What opening the log found.
#[derive(Debug)]
pub struct OpenedWal {
    /// Ready to append.
    pub wal: Wal,
    /// For readers.
    pub log: Arc<Log>,
    /// Bytes of a torn tail that were cut off.
    pub torn_bytes: u64,
}

/// Where a log ends that was opened.
struct LogEnd {
    /// Where the next frame goes in the newest segment.
    at: u64,
    /// The newest revision.
    head: Revision,
    /// Revisions up to here may have been handed out.
    reserved: Revision,
    torn_bytes: u64,
}

/// The number (from one) of the first segment that has to be read to know all that comes after a revision.
fn first_needed(segments: &[Segment], replay_after: Revision) -> Result<usize, Error> {
    let mut first_needed = segments.partition_point(|s| s.first_revision <= replay_after.next());
    if first_needed == 0 {
        let first = &segments[0];
        let detail =
            format!("the log begins at revision {}, but what is after {replay_after} is needed", first.first_revision);
        return Err(Error::corrupt(first.name(), 16, detail));
    }
    // A crash before, or within, the seal of the segment before leaves that to be mended, needed or not.
    while first_needed > 1 && segments[first_needed - 2].sealed_for()?.is_none() {
        first_needed -= 1;
    }
    Ok(first_needed)
}

impl Wal {
    /// Opens the log in `dir`, or a new one in memory when there is none. Every record after `replay_after` is handed
    /// to `replay` in order. A torn tail is cut; anything else that is not as it was written, or that ends before `shown`, which
    /// other files show to have been durable, is an error that names file and offset, and leaves the files as they are.
    pub fn open(
        dir: Option<&Path>,
        max_log_bytes: u64,
        replay_after: Revision,
        shown: Revision,
        mut replay: impl FnMut(Record) -> Result<(), Error>,
    ) -> Result<OpenedWal, Error> {
        let segment_bytes = (max_log_bytes / SEGMENTS_WANTED).clamp(*SEGMENT_BYTES.start(), *SEGMENT_BYTES.end());
        let paths = dir.map(list_segments).transpose()?.unwrap_or_default();
        if paths.is_empty() {
            if replay_after > Revision::ZERO {
                let dir = dir.unwrap_or(Path::new("log"));
                return Err(Error::corrupt(dir, 0, "there is a snapshot but no log segment"));
            }
            let first = Revision::ZERO.next();
            let (segment, at) = Segment::create(dir, first, segment_bytes, FrameBuffer { bytes: Vec::new() }, None)?;
            let end = LogEnd { at, head: Revision::ZERO, reserved: Revision::ZERO, torn_bytes: 0 };
            return Ok(Self::assemble(dir, segment_bytes, vec![Arc::new(segment)], Vec::new(), end));
        }
        let segments = paths.iter().map(|p| Segment::open(p)).collect::<Result<Vec<_>, _>>()?;
        let first_needed = first_needed(&segments, replay_after)?;
        let mut scan = Scan {
            next: segments[first_needed - 1].first_revision,
            shown,
            gaps: Vec::new(),
            reserved: Revision::ZERO,
            sealed: false,
            vouched_end: 0,
            unvouched: VecDeque::new(),
            ts_ms: 0,
        };
        // Those before were synced when the next one was begun.
        let last = segments.last().expect("there is at least one segment");
        last.file.refresh().map_err(Error::io("cannot sync", last.name()))?;
        *last.aside.lock() = last.path.as_deref().map(Segment::open_aside).transpose()?;
        if let Some(dir) = dir {
            disk::sync_dir(dir).map_err(Error::io("cannot sync", dir))?;
        }
        let mut at = 0;
        let mut torn_bytes = 0;
        for (index, segment) in segments.iter().enumerate() {
            if index + 1 < first_needed {
                // Not replayed, so not read now: whoever reads this history checks it then. It was sealed, and all of
                // it up to its zeros may be looked at.
                segment.check_seal(segments[index + 1].first_revision)?;
                continue;
            }
            if segment.first_revision != scan.next {
                return Err(Error::corrupt(
                    segment.name(),
                    16,
                    format!(
                        "the segment begins at revision {}, {} was expected: a segment is missing",
                        segment.first_revision, scan.next
                    ),
                ));
            }
            let next = segments.get(index + 1).map(|s| s.first_revision);
            (at, torn_bytes) = scan.segment(segment, next, replay_after, &mut replay)?;
        }
        if scan.sealed {
            return Err(Error::corrupt(last.name(), at, "the segment is sealed, but the one after it is missing"));
        }
        let head = scan.next.prev();
        if head < shown {
            let detail = format!(
                "the log ends at revision {head}, but a snapshot or a collection's files show {shown}: its end is missing"
            );
            return Err(Error::corrupt(last.name(), at, detail));
        }
        // Of what is replayed the end may so far be in the page cache only, if the system kept it, and taken for clean after a sync
        // that failed: another alone would do nothing. It is about to be shown, so it is written again, and synced.
        if let [.., before, last] = &segments[..]
            && head < last.first_revision
        {
            before.write_seal_again()?;
        }
        last.write_again(scan.vouched_end as u64, at)?;
        let segments = segments.into_iter().map(Arc::new).collect();
        let end = LogEnd { at, head, reserved: scan.reserved, torn_bytes };
        let mut opened = Self::assemble(dir, segment_bytes, segments, scan.gaps, end);
        opened.wal.newest_ts_ms = match scan.ts_ms {
            // The newest segment has none yet. Whoever reads the others is told of damage there.
            0 => opened.log.newest_at(u64::MAX).ok().flatten().map_or(0, |(_, ts_ms)| ts_ms),
            ts_ms => ts_ms,
        };
        if scan.reserved > head {
            // A crash in a relaxed mode: revisions up to the reservation may have been seen, and are given up.
            opened.wal.give_up(Gap { from: head.next(), to: scan.reserved.next() })?;
        }
        Ok(opened)
    }

    fn assemble(
        dir: Option<&Path>,
        segment_bytes: u64,
        segments: Vec<Arc<Segment>>,
        gaps: Vec<Gap>,
        end: LogEnd,
    ) -> OpenedWal {
        let LogEnd { at, head, reserved, torn_bytes } = end;
        let active = Arc::clone(segments.last().expect("there is at least one segment"));
        let log = Arc::new(Log { segments: RwLock::new(segments), gaps: RwLock::new(gaps), holds: Mutex::default() });
        let mut wal = Self {
            dir: dir.map(Path::to_owned),
            log: Arc::clone(&log),
            active,
            at,
            synced: at,
            zeros: dir.map(|dir| ZeroAhead::start(spare_path(dir), segment_bytes)),
            appended: head,
            durable: head,
            vouched: Revision::ZERO,
            reserved,
            newest_ts_ms: 0,
            segment_bytes,
            frames: FrameBuffer { bytes: Vec::new() },
        };
        wal.begin_zeros(at);
        OpenedWal { wal, log, torn_bytes }
    }

    fn give_up(&mut self, gap: Gap) -> Result<(), Error> {
        self.log.gaps.write().push(gap);
        self.reserved = Revision::ZERO;
        self.frames.bytes.clear();
        self.frames.push(Kind::Gap, gap.from, 0, self.durable, |out| out.put_revision(gap.to));
        self.flush()?;
        self.sync()?;
        // Only now: a segment begun for this frame must be named after the first revision given up.
        self.appended = gap.to;
        self.durable = gap.to;
        self.reserved = gap.to;
        self.publish();
        Ok(())
    }

    /// Records that follow are no older: what comes after a time is looked for by that.
    #[must_use]
    pub fn newest_ts_ms(&self) -> u64 {
        self.newest_ts_ms
    }

    /// The newest revision in the log, lost ones included.
    #[must_use]
    pub fn head(&self) -> Revision {
        self.appended
    }

    /// Adds a record to the batch being built.
    pub fn stage(&mut self, record: &Record) {
        let count = u32::try_from(record.events.len()).expect("a record's events are bounded by its bytes");
        let durable = self.durable;
        self.frames.push(Kind::Record, record.first_revision, count, durable, |out| encode_record(record, out));
        self.appended = record.last_revision();
    }

    /// Forgets the batch being built: nothing of it was written. `head` is the newest revision before it.
    pub fn unstage(&mut self, head: Revision) {
        self.frames.clear();
        self.appended = head;
    }

    /// Makes sure revisions up to `until` may be handed out without being durable (relaxed modes). Syncs.
    pub fn reserve(&mut self, until: Revision) -> Result<(), AppendError> {
        if until <= self.reserved || faults::is_on(Bug::ReuseRevision) {
            return Ok(());
        }
        assert!(self.frames.bytes.is_empty(), "reserve before staging");
        let before = std::mem::replace(&mut self.reserved, until.plus(RESERVED_REVISIONS));
        self.push_reserve();
        let result = self.flush().and_then(|()| self.sync());
        if result.is_err() {
            // It is not on disk, so it does not count.
            self.reserved = before;
            self.frames.clear();
        }
        result
    }

    fn push_reserve(&mut self) {
        let reserved = self.reserved;
        self.frames.push(Kind::Reserve, self.appended.next(), 0, self.durable, |out| out.put_revision(reserved));
    }

    /// Ends a reservation: everything handed out is on disk. For an orderly stop.
    pub fn release(&mut self) -> Result<(), AppendError> {
        self.frames.bytes.clear();
        self.sync()?;
        if self.reserved > self.appended {
            self.reserved = self.appended;
            self.push_reserve();
        }
        self.frames.push(Kind::Mark, self.appended.next(), 0, self.durable, |_| ());
        self.flush()?;
        self.sync()
    }

    /// Writes a mark when frames on disk do not yet say how far the log is durable: it tells damage of the last records
    /// from a torn tail. Not synced: it only has to get there some time.
    pub fn mark(&mut self) -> Result<(), AppendError> {
        if self.vouched >= self.durable || !self.frames.bytes.is_empty() {
            return Ok(());
        }
        self.frames.push(Kind::Mark, self.appended.next(), 0, self.durable, |_| ());
        let result = self.flush();
        // Where there was no room for it, it must not be left before the next batch.
        self.frames.clear();
        self.publish();
        result
    }

    /// Writes the staged batch, into a new segment when it does not fit. Nothing is durable until [`Wal::sync`].
    pub fn flush(&mut self) -> Result<(), AppendError> {
        let length = self.frames.bytes.len() as u64;
        if self.at + length + FRAME_HEADER_BYTES as u64 > self.active.size {
            self.rotate(length)?;
        }
        self.frames.fill_checksums(self.active.salt);
        if let Some(zeros) = &mut self.zeros {
            zeros.claim(self.at + length);
        }
        if let Err(cause) = self.active.file.write_all_at(&self.frames.bytes, self.at) {
            let error = Error::io("cannot write to", self.active.name())(cause);
            let is_undone = error.is_storage_full() && self.take_back(length).is_ok();
            return Err(if is_undone { AppendError::Full(error) } else { AppendError::Failed(error) });
        }
        self.at += length;
        if let Some(zeros) = &mut self.zeros {
            zeros.advance(self.at, self.active.size);
        }
        self.vouched = self.durable;
        self.frames.clear();
        Ok(())
    }

    /// Undoes a write that the disk had no room for, which file systems that copy on write, or cannot preallocate, tell as late
    /// as that: part of it may be there. Once zeros are durable in its place, the log is what it was before, the batch can be
    /// refused, and its revisions can be handed out again. If that fails too, there is no way back.
    fn take_back(&self, length: u64) -> io::Result<()> {
        write_zeros(&self.active.file, self.at, self.at + length)?;
        self.active.file.sync()
    }

    /// Has the disk begin with what was written: until [`Wal::sync`] there is time for what nobody waits for.
    pub fn begin_sync(&self) {
        self.active.file.begin_sync(self.synced..self.at);
    }

    /// Syncs what was written.
    pub fn sync(&mut self) -> Result<(), AppendError> {
        let synced = turns::note_sync(|| self.active.file.sync());
        let synced = synced.map_err(Error::io("cannot sync", self.active.name()));
        if !faults::is_on(Bug::IgnoreFailedSync) {
            synced.map_err(AppendError::Failed)?;
        }
        self.synced = self.at;
        self.durable = self.appended;
        Ok(())
    }

    /// An error when the newest segment is not where it would be looked for.
    pub fn check_place(&self) -> Result<(), Error> {
        let Some(path) = self.active.path.as_deref() else { return Ok(()) };
        let cause = if self.active.file.is_removed(path) {
            std::io::Error::other("it was removed while the server ran, and with it what it held")
        } else if let Some(moved) = disk::is_moved(path) {
            moved
        } else {
            return Ok(());
        };
        Err(Error::io("cannot write to", path)(cause))
    }

    /// Whether there is nothing but zeros behind the last frame; for the lab. What is there could come back to life.
    #[cfg(test)]
    pub(crate) fn is_clean(&self) -> Result<bool, Error> {
        let at = usize::try_from(self.at).expect("a segment fits memory");
        Ok(self.active.read_data()?.0[at..].iter().all(|&b| b == 0))
    }

    /// Lets readers see what was written.
    pub fn publish(&self) {
        self.active.end.store(self.at, Ordering::Release);
    }

    /// Whether the log is down to its reserve and cannot get another segment. Tries to get one.
    pub fn is_full(&mut self) -> Result<bool, Error> {
        if self.at + kept_for_deletes(self.active.size) <= self.active.size {
            return Ok(false);
        }
        match self.rotate(0) {
            Ok(()) => Ok(false),
            // The append will meet it too, if there is still no file then, and can say so.
            Err(AppendError::Full(e)) if e.is_out_of_files() => Ok(false),
            Err(AppendError::Full(_)) => Ok(true),
            Err(AppendError::Failed(e)) => Err(e),
        }
    }

    /// Starts a new segment with room for `length` bytes, then seals the old one.
    fn rotate(&mut self, length: u64) -> Result<(), AppendError> {
        // Everything before a segment boundary is on disk, whatever the mode: recovery relies on it.
        let synced = self.active.file.sync().map_err(Error::io("cannot sync", self.active.name()));
        synced.map_err(AppendError::Failed)?;
        let staged_from = self.staged_from();
        let mut carried = FrameBuffer { bytes: Vec::new() };
        let oldest = self.log.oldest();
        for gap in self.log.gaps.read().iter().filter(|g| g.to >= oldest) {
            carried.push(Kind::Gap, gap.from, 0, staged_from.prev(), |out| out.put_revision(gap.to));
        }
        if self.reserved >= staged_from {
            let reserved = self.reserved;
            carried.push(Kind::Reserve, staged_from, 0, staged_from.prev(), |out| out.put_revision(reserved));
        }
        let needed = (SEGMENT_HEADER_BYTES + carried.bytes.len() + 2 * FRAME_HEADER_BYTES) as u64 + length;
        let size = self.segment_bytes.max((needed + kept_for_deletes(self.segment_bytes)).next_multiple_of(4096));
        let replaces_empty = staged_from == self.active.first_revision;
        let spare = self.zeros.as_mut().and_then(|zeros| zeros.take_spare(size));
        let is_zero = spare.is_some();
        let (segment, at) = Segment::create(self.dir.as_deref(), staged_from, size, carried, spare)?;
        if let Some(zeros) = &mut self.zeros {
            zeros.claim(self.active.size);
        }
        if !replaces_empty {
            // The new segment exists: from here on there is no way back but a restart.
            self.active.seal(self.at, staged_from).map_err(AppendError::Failed)?;
        }
        let segment = Arc::new(segment);
        {
            let mut segments = self.log.segments.write();
            if replaces_empty {
                segments.pop();
            }
            segments.push(Arc::clone(&segment));
        }
        // It was synced, and is not written to any more.
        *self.active.aside.lock() = None;
        self.active = segment;
        self.at = at;
        self.synced = at;
        self.begin_zeros(if is_zero { size } else { at + FIRST_ZEROS_BYTES });
        Ok(())
    }

    fn begin_zeros(&mut self, zeroed: u64) {
        if let (Some(zeros), Some(path)) = (&mut self.zeros, &self.active.path) {
            zeros.begin(path.clone(), self.at, zeroed.min(self.active.size), self.active.size);
        }
    }

    /// First revision of the batch being built, or the next one when nothing is staged.
    fn staged_from(&self) -> Revision {
        let mut at = 0;
        while let Some(header) = self.frames.bytes.get(at..).and_then(FrameHeader::parse) {
            if header.kind == Kind::Record {
                return header.first_revision;
            }
            at += header.frame_bytes();
        }
        self.appended.next()
    }
}

/// Makes the log of a restored directory: no records, and a gap behind `head`, as after a crash of a relaxed mode. Revisions
/// that the original handed out after the backup, or a block of them at least, are never handed out again, and a stream that
/// has seen one is told.
pub fn create_behind(dir: &Path, head: Revision) -> Result<Gap, Error> {
    let gap = Gap { from: head.next(), to: Revision((head.0 / RESTORE_STEP + 1) * RESTORE_STEP) };
    let mut frames = FrameBuffer { bytes: Vec::new() };
    frames.push(Kind::Gap, gap.from, 0, head, |out| out.put_revision(gap.to));
    Segment::create(Some(dir), gap.from, *SEGMENT_BYTES.start(), frames, None)?;
    Ok(gap)
}

fn list_segments(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut paths = Vec::new();
    for path in disk::list(dir).map_err(Error::io("cannot list", dir))? {
        match path.extension().and_then(|e| e.to_str()) {
            Some("log") => paths.push(path),
            // A segment whose creation was cut short; it never counted.
            Some("tmp") => disk::remove_file(&path).map_err(Error::io("cannot remove", &path))?,
            _ => {}
        }
    }
    Ok(paths)
}

/// What recovery knows while it walks the segments.
struct Scan {
    /// The revision the next record must begin with.
    next: Revision,
    /// Other files show that the log was durable up to here.
    shown: Revision,
    gaps: Vec<Gap>,
    reserved: Revision,
    sealed: bool,
    /// End of the last frame that a later frame confirms as durable.
    vouched_end: usize,
    /// The frames after it: the revision that a later frame has to confirm, and the frame's end.
    unvouched: VecDeque<(Revision, usize)>,
    /// The newest record's time.
    ts_ms: u64,
}

impl Scan {
    /// Walks one segment; `next_first` is where the one after it begins, if there is one. Returns where its frames end and
    /// how many bytes of a torn tail were cut.
    fn segment(
        &mut self,
        segment: &Segment,
        next_first: Option<Revision>,
        replay_after: Revision,
        replay: &mut impl FnMut(Record) -> Result<(), Error>,
    ) -> Result<(u64, u64), Error> {
        let path = segment.name();
        let (bytes, data_end) = segment.read_data()?;
        let mut at = SEGMENT_HEADER_BYTES;
        self.sealed = false;
        // Its header too is durable only once a frame says so.
        self.vouched_end = 0;
        self.unvouched.clear();
        while !self.sealed {
            let Some(found) = frame_at(&bytes[at..], segment.salt) else { break };
            self.frame(&found, path, at as u64, replay_after, replay)?;
            at += found.header.frame_bytes();
            while let Some(&(revision, end)) = self.unvouched.front()
                && revision <= found.header.durable
            {
                self.vouched_end = end;
                self.unvouched.pop_front();
            }
            let revision = if found.header.kind == Kind::Record { self.next.prev() } else { self.next };
            self.unvouched.push_back((revision, at));
        }
        segment.end.store(at as u64, Ordering::Release);
        if self.sealed {
            return Ok((at as u64, 0));
        }
        let used = bytes[..data_end].iter().rposition(|&b| b != 0).map_or(0, |last| last + 1).max(at);
        if let Some(next_first) = next_first {
            // The next segment was created and the crash came before, or within, the seal of this one.
            if next_first != self.next || used - at > FRAME_HEADER_BYTES {
                return Err(Error::corrupt(
                    path,
                    at as u64,
                    "a frame does not match its checksum, and the log goes on behind it",
                ));
            }
            segment.seal(at as u64, next_first)?;
            return Ok((at as u64, 0));
        }
        if used == at {
            return Ok((at as u64, 0));
        }
        if is_vouched_behind(&bytes[at..], used - at, segment.salt, self.next) {
            let detail = format!(
                "revision {} does not match its checksum, and a later frame says that it was durable",
                self.next
            );
            return Err(Error::corrupt(path, at as u64, detail));
        }
        if self.next <= self.shown {
            let detail = format!(
                "revision {} does not match its checksum, and a snapshot or a collection's files show {}",
                self.next, self.shown
            );
            return Err(Error::corrupt(path, at as u64, detail));
        }
        // Nobody was ever told of what is here. Zeros, so that no frame behind can come back to life later.
        if faults::is_on(Bug::KeepTornTail) {
            return Ok((at as u64, 0));
        }
        write_zeros(&segment.file, at as u64, used as u64)
            .and_then(|()| segment.file.sync())
            .map_err(Error::io("cannot cut the torn tail of", path))?;
        Ok((at as u64, (used - at) as u64))
    }

    fn frame(
        &mut self,
        found: &WholeFrame<'_>,
        path: &Path,
        at: u64,
        replay_after: Revision,
        replay: &mut impl FnMut(Record) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let header = &found.header;
        let until = |what| Reader(found.payload).revision(what).map_err(|e| Error::corrupt(path, at, e.0));
        match header.kind {
            Kind::Mark => {}
            Kind::Seal => self.sealed = true,
            Kind::Reserve => self.reserved = until("reservation")?,
            Kind::Gap => {
                let gap = Gap { from: header.first_revision, to: until("gap")? };
                if gap.from == self.next {
                    self.next = gap.to.next();
                }
                if !self.gaps.contains(&gap) {
                    self.gaps.push(gap);
                }
            }
            Kind::Record => {
                if header.first_revision != self.next {
                    let detail =
                        format!("the record has revision {}, {} was expected", header.first_revision, self.next);
                    return Err(Error::corrupt(path, at, detail));
                }
                let record = decode_record(header.first_revision, header.count, found.payload)
                    .map_err(|e| Error::corrupt(path, at, e.0))?;
                self.next = record.last_revision().next();
                self.ts_ms = record.ts_ms;
                let is_left_out = faults::is_on(Bug::ShortReplay)
                    && record.first_revision == replay_after.next()
                    && replay_after > Revision::ZERO;
                if record.last_revision() > replay_after && !is_left_out {
                    replay(record)?;
                }
            }
        }
        Ok(())
    }
}

impl Segment {
    /// The revision the next segment begins with, as this one's seal says; `None` when there is no whole seal. Lets readers
    /// look up to that end.
    fn sealed_for(&self) -> Result<Option<Revision>, Error> {
        let end = self.find_end()?;
        self.end.store(end, Ordering::Release);
        let bytes = self.read(end.saturating_sub(FRAME_HEADER_BYTES as u64), FRAME_HEADER_BYTES)?;
        let seal = frame_at(&bytes, self.salt).filter(|found| found.header.kind == Kind::Seal);
        Ok(seal.map(|found| found.header.first_revision))
    }

    /// Whether the segment ends in a seal that names the next one: if not, a segment is missing between the two.
    fn check_seal(&self, next_first: Revision) -> Result<(), Error> {
        let sealed_for = self.sealed_for()?;
        let at = self.end.load(Ordering::Acquire);
        match sealed_for {
            Some(expected) if expected == next_first => Ok(()),
            Some(expected) => {
                let detail = format!(
                    "the next segment begins at revision {next_first}, {expected} was expected: a segment is missing"
                );
                Err(Error::corrupt(self.name(), at, detail))
            }
            None => Err(Error::corrupt(self.name(), at, "the segment does not end in a seal")),
        }
    }

    /// End of the frames of a sealed segment: where the seal, the last bytes that are not zero, ends.
    fn find_end(&self) -> Result<u64, Error> {
        let mut to = self.size;
        let mut bytes = vec![0u8; 1 << 16];
        while to > 0 {
            let from = to.saturating_sub(bytes.len() as u64);
            // The cast: at most the buffer's length.
            let part = &mut bytes[..(to - from) as usize];
            self.file.read_exact_at(part, from).map_err(Error::io("cannot read", self.name()))?;
            if let Some(last) = part.iter().rposition(|&b| b != 0) {
                return Ok((from + last as u64 + 1).next_multiple_of(FRAME_ALIGN as u64));
            }
            to = from;
        }
        Ok(0)
    }
}

/// One, as a polynomial over GF(2) in the order of a CRC32C's bits. Shifted to the right by n it is x to the nth power, below 32.
const X: u32 = 1 << 31;
/// Castagnoli's polynomial in that order.
const CASTAGNOLI: u32 = 0x82f6_3b78;

/// Of two polynomials, modulo Castagnoli's.
fn product(a: u32, mut b: u32) -> u32 {
    (0..32).fold(0, |sum, n| {
        let term = if a & (X >> n) == 0 { 0 } else { b };
        b = (b >> 1) ^ if b & 1 == 0 { 0 } else { CASTAGNOLI };
        sum ^ term
    })
}

/// What zeros, so many bytes of them, make of a checksum of what is before them: a product with a power of x, so that checksums of two
/// parts give that of both (as zlib's `crc32_combine` does).
fn past_zeros(crc: u32, powers: &[u32; usize::BITS as usize], bytes: usize) -> u32 {
    let bits = (0..powers.len()).filter(|n| bytes >> n & 1 == 1);
    bits.fold(crc, |crc, n| product(powers[n], crc))
}

/// Whether a frame that begins within the first `used` bytes of a damaged tail says that `next` was durable. Those bytes may be a value
/// made of what looks like frames, each as long as all that follows: a checksum is not taken of the bytes, but of two checksums of what
/// lies before them.
fn is_vouched_behind(bytes: &[u8], used: usize, salt: u32, next: Revision) -> bool {
    let could_be = |header: &FrameHeader| header.durable >= next && header.durable < header.first_revision;
    let found = |at: usize| Some((at, FrameHeader::parse(&bytes[at..]).filter(could_be)?));
    let mut places = (0..used).step_by(FRAME_ALIGN).filter_map(found).peekable();
    if places.peek().is_none() {
        return false;
    }
    // Of the bytes before each place.
    let mut before = vec![0];
    before.extend(bytes.chunks_exact(FRAME_ALIGN).scan(0, |crc, chunk| {
        *crc = crc32c::crc32c_append(*crc, chunk);
        Some(*crc)
    }));
    let checksum_before = |at: usize| {
        let place = at / FRAME_ALIGN;
        crc32c::crc32c_append(before[place], &bytes[place * FRAME_ALIGN..at])
    };
    // x to the 8th, 16th, 32nd power, and so on.
    let mut powers = [X >> 8; usize::BITS as usize];
    for n in 1..powers.len() {
        powers[n] = product(powers[n - 1], powers[n - 1]);
    }
    places.any(|(at, header)| {
        let (from, to) = (at + 8, at.saturating_add(FRAME_HEADER_BYTES).saturating_add(header.length as usize));
        if to > bytes.len() {
            return false;
        }
        // What came before, the salt in its place, led to the checksum at the end.
        let crc = past_zeros(salt ^ checksum_before(from), &powers, to - from) ^ checksum_before(to);
        crc == header.crc || faults::is_on(Bug::SkipChecksum)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::codec::Event;
    use crate::engine::command::EventType;
    use proptest::prelude::{any, prop_assert_eq, proptest};

    fn record(first: u64, events: usize, bytes: usize) -> Record {
        let event = |n: usize| Event::Published {
            event_type: EventType::new("t").unwrap(),
            key: None,
            data: Some(format!("\"{}{}\"", "x".repeat(bytes), first + n as u64).into()),
            labels: None,
        };
        Record {
            first_revision: Revision(first),
            ts_ms: 1000 + first,
            events: (0..events).map(event).collect(),
            answer: None,
        }
    }

    proptest! {
        #[test]
        fn a_frame_behind_damage_is_known_by_its_checksum(
            salt in any::<u32>(), before in 0..9_usize, length in 0..40_usize, damaged in any::<bool>(),
        ) {
            let mut frames = FrameBuffer { bytes: Vec::new() };
            frames.push(Kind::Record, Revision(12), 1, Revision(11), |out| out.resize(out.len() + length, b'x'));
            frames.fill_checksums(salt);
            let mut bytes = vec![b'x'; before * FRAME_ALIGN];
            bytes.append(&mut frames.bytes);
            if damaged {
                bytes[before * FRAME_ALIGN + 9] ^= 1;
            }
            for (next, is_vouched) in [(11, !damaged), (12, false)] {
                prop_assert_eq!(is_vouched_behind(&bytes, bytes.len(), salt, Revision(next)), is_vouched);
            }
        }
    }

    fn open(dir: &Path, after: u64) -> Result<(OpenedWal, Vec<u64>), Error> {
        let mut seen = Vec::new();
        let opened = Wal::open(Some(dir), 8 << 20, Revision(after), Revision(after), |record| {
            seen.extend(record.iter().map(|(revision, _)| revision.0));
            Ok(())
        })?;
        Ok((opened, seen))
    }

    fn append(wal: &mut Wal, record: &Record) {
        wal.stage(record);
        wal.flush().unwrap();
        wal.sync().unwrap();
        wal.publish();
    }

    fn only_segment(dir: &Path) -> PathBuf {
        let paths = list_segments(dir).unwrap();
        assert_eq!(paths.len(), 1);
        paths[0].clone()
    }

    #[test]
    fn what_was_appended_is_replayed_in_order_and_numbers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, seen) = open(dir.path(), 0).unwrap();
        assert!(seen.is_empty());
        append(&mut opened.wal, &record(1, 1, 10));
        append(&mut opened.wal, &record(2, 3, 10));
        append(&mut opened.wal, &record(5, 1, 10));
        let (opened, seen) = open(dir.path(), 0).unwrap();
        assert_eq!(seen, [1, 2, 3, 4, 5]);
        assert_eq!(opened.wal.head(), Revision(5));
        assert_eq!(open(dir.path(), 4).unwrap().1, [5]);
        // A record is replayed whole when a snapshot stands in its middle; apply skips what is known.
        assert_eq!(open(dir.path(), 3).unwrap().1, [2, 3, 4, 5]);
    }

    #[test]
    fn a_tail_torn_at_any_byte_is_cut_and_never_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        append(&mut opened.wal, &record(1, 1, 10));
        let from = usize::try_from(opened.wal.at).unwrap();
        append(&mut opened.wal, &record(2, 2, 20));
        let to = usize::try_from(opened.wal.at).unwrap();
        drop(opened);
        let path = only_segment(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for cut in from..to {
            // What a lost write looks like on a preallocated file: zeros from somewhere on.
            let mut torn = whole.clone();
            torn[cut..to].fill(0);
            if torn == whole {
                continue;
            }
            std::fs::write(&path, &torn).unwrap();
            let (mut opened, seen) = open(dir.path(), 0).unwrap();
            assert_eq!(seen, [1], "cut at {cut}");
            append(&mut opened.wal, &record(2, 1, 3));
            drop(opened);
            assert_eq!(open(dir.path(), 0).unwrap().1, [1, 2], "cut at {cut}");
        }
    }

    #[test]
    fn a_bad_frame_before_something_durable_stops_the_start_and_touches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        append(&mut opened.wal, &record(1, 1, 10));
        let from = usize::try_from(opened.wal.at).unwrap();
        append(&mut opened.wal, &record(2, 1, 10));
        let to = usize::try_from(opened.wal.at).unwrap();
        // The mark says that 2 was durable.
        opened.wal.mark().unwrap();
        drop(opened);
        let path = only_segment(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for at in SEGMENT_HEADER_BYTES..to {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            std::fs::write(&path, &damaged).unwrap();
            match open(dir.path(), 0) {
                Err(Error::Corrupt { path: named, offset, .. }) => {
                    assert_eq!(named, path);
                    assert!(
                        offset as usize <= at && (at < from || offset as usize >= from),
                        "flip at {at}: offset {offset}"
                    );
                }
                // Padding between frames is not covered by a checksum, and means nothing.
                Ok((_, seen)) => assert_eq!(seen, [1, 2], "flip at {at}"),
                Err(other) => panic!("flip at {at}: {other}"),
            }
            assert_eq!(std::fs::read(&path).unwrap(), damaged, "flip at {at}: the file was changed");
        }
        for at in 0..SEGMENT_HEADER_BYTES {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            std::fs::write(&path, &damaged).unwrap();
            assert!(open(dir.path(), 0).is_err(), "flip at {at} of the header");
        }
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(open(dir.path(), 0).is_err(), "a file cut short is not a torn tail");
    }

    /// Flips a bit at `at`.
    fn assert_damage_stops_the_start(dir: &Path, shown: u64, at: usize) {
        let path = only_segment(dir);
        let mut damaged = std::fs::read(&path).unwrap();
        damaged[at] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        assert!(matches!(open(dir, shown), Err(Error::Corrupt { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), damaged, "the file was changed");
    }

    /// What follows on a restored history is far away: it is behind the frame all the same.
    #[test]
    fn a_bad_gap_before_something_durable_stops_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let gap = create_behind(dir.path(), Revision(5)).unwrap();
        let (mut opened, _) = open(dir.path(), 5).unwrap();
        append(&mut opened.wal, &record(gap.to.0 + 1, 1, 10));
        append(&mut opened.wal, &record(gap.to.0 + 2, 1, 10));
        drop(opened);
        assert_damage_stops_the_start(dir.path(), 5, SEGMENT_HEADER_BYTES + FRAME_HEADER_BYTES);
    }

    /// No frame vouches for the last record; a snapshot does.
    #[test]
    fn a_bad_tail_that_a_snapshot_shows_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        append(&mut opened.wal, &record(1, 1, 10));
        let at = usize::try_from(opened.wal.at).unwrap();
        append(&mut opened.wal, &record(2, 1, 10));
        drop(opened);
        assert_damage_stops_the_start(dir.path(), 2, at + FRAME_HEADER_BYTES);
        // Shown by nothing, nobody was told of it.
        assert_eq!(open(dir.path(), 1).unwrap().0.wal.head(), Revision(1));
    }

    #[test]
    fn segments_rotate_and_a_missing_one_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        for n in 1..=60 {
            append(&mut opened.wal, &record(n, 1, 100_000));
        }
        drop(opened);
        let paths = list_segments(dir.path()).unwrap();
        assert!(paths.len() >= 4, "{}", paths.len());
        assert_eq!(open(dir.path(), 0).unwrap().1, (1..=60).collect::<Vec<_>>());
        for (place, gone) in paths.iter().enumerate() {
            let bytes = std::fs::read(gone).unwrap();
            std::fs::remove_file(gone).unwrap();
            assert!(open(dir.path(), 0).is_err(), "{} is missing", gone.display());
            // Also where a snapshot covers the hole: streams read there. Of the oldest nobody can know.
            if place > 0 {
                assert!(open(dir.path(), 60).is_err(), "{} is missing below a snapshot", gone.display());
            }
            std::fs::write(gone, bytes).unwrap();
        }
        assert_eq!(open(dir.path(), 0).unwrap().1.len(), 60);
    }

    /// A crash between creating a segment and sealing the one before it, or within the seal, is no damage.
    #[test]
    fn a_missing_or_torn_seal_is_mended() {
        for torn in [0, 1, 9, 20, 31] {
            let dir = tempfile::tempdir().unwrap();
            let (mut opened, _) = open(dir.path(), 0).unwrap();
            for n in 1..=20 {
                append(&mut opened.wal, &record(n, 1, 100_000));
            }
            drop(opened);
            let first = list_segments(dir.path()).unwrap()[0].clone();
            let mut bytes = std::fs::read(&first).unwrap();
            let seal_end = bytes.iter().rposition(|&b| b != 0).unwrap() / FRAME_ALIGN * FRAME_ALIGN + FRAME_ALIGN;
            let seal = seal_end - FRAME_HEADER_BYTES;
            bytes[seal + torn..seal_end].fill(0);
            std::fs::write(&first, &bytes).unwrap();
            let second: u64 =
                list_segments(dir.path()).unwrap()[1].file_stem().unwrap().to_str().unwrap().parse().unwrap();
            // A snapshot right at the boundary: the segment itself need not be replayed.
            assert_eq!(open(dir.path(), second - 1).unwrap().1.first(), Some(&second), "torn at {torn}");
            std::fs::write(&first, &bytes).unwrap();
            assert_eq!(open(dir.path(), 0).unwrap().1.len(), 20, "torn at {torn}");
            let (opened, _) = open(dir.path(), 20).unwrap();
            let history = opened.log.read_after(Revision(0), Revision(20), usize::MAX).unwrap().unwrap();
            assert_eq!(history.records.len(), 20, "torn at {torn}: history of a segment that is not replayed");
            bytes[seal - 100] ^= 1;
            std::fs::write(&first, &bytes).unwrap();
            assert!(open(dir.path(), 0).is_err(), "torn at {torn}: damage before the seal is damage");
        }
    }

    #[test]
    fn a_record_larger_than_a_segment_gets_one_of_its_own_size() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        append(&mut opened.wal, &record(1, 1, 3 << 20));
        append(&mut opened.wal, &record(2, 1, 10));
        append(&mut opened.wal, &record(3, 1, 3 << 20));
        drop(opened);
        let (opened, seen) = open(dir.path(), 0).unwrap();
        assert_eq!(seen, [1, 2, 3]);
        let history = opened.log.read_after(Revision(0), Revision(3), usize::MAX).unwrap().unwrap();
        assert_eq!(history.records.len(), 3);
    }

    #[test]
    fn what_lies_before_damage_is_read_however_often_the_damage_was_met() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        for n in 1..=20 {
            append(&mut opened.wal, &record(n, 1, 100_000));
        }
        drop(opened);
        // Covered by a snapshot, so that it is not read at the start.
        let (opened, _) = open(dir.path(), 20).unwrap();
        let first = list_segments(dir.path()).unwrap()[0].clone();
        let mut bytes = std::fs::read(&first).unwrap();
        bytes[600_000] ^= 1;
        std::fs::write(&first, &bytes).unwrap();
        for _ in 0..3 {
            for bytes_max in [450_000, usize::MAX] {
                let history = opened.log.read_after(Revision(0), Revision(20), bytes_max).unwrap().unwrap();
                assert_eq!((history.records.len(), history.reached), (5, Revision(5)));
            }
            match opened.log.read_after(Revision(5), Revision(20), 450_000) {
                Err(Error::Corrupt { offset, .. }) => assert!((500_000..600_000).contains(&offset), "offset {offset}"),
                other => panic!("damage was overlooked: {other:?}"),
            }
        }
    }

    #[test]
    fn history_can_be_read_from_any_revision_and_from_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        let mut next = 1;
        while next < 400 {
            let events = 1 + (next as usize % 3);
            append(&mut opened.wal, &record(next, events, 20_000));
            next += events as u64;
        }
        let head = opened.wal.head();
        assert!(opened.log.segments.read().len() > 3);
        for after in 0..head.0 {
            let mut reached = Revision(after);
            let mut seen = Vec::new();
            while reached < head {
                let history = opened.log.read_after(reached, head, 50_000).unwrap().unwrap();
                assert!(history.reached > reached, "no progress after {reached}");
                let fresh = history.records.iter().flat_map(|r| r.iter().map(|(n, _)| n).collect::<Vec<_>>());
                seen.extend(fresh.filter(|n| *n > reached));
                reached = history.reached;
            }
            assert!(seen.iter().map(|r| r.0).eq(after + 1..=head.0), "after {after}");
        }
        for (ts_ms, expected) in [(0, 0), (1001, 2), (1003, 2), (1004, 5), (u64::MAX, head.0)] {
            // Record n has the time 1000 + n; records begin at 1, 3, 4, 6, …
            let found = opened.log.revision_at(ts_ms).unwrap().unwrap_or_default().0;
            let by_scan = opened.log.read_after(Revision(0), head, usize::MAX).unwrap().unwrap();
            let by_scan =
                by_scan.records.iter().filter(|r| r.ts_ms <= ts_ms).map(|r| r.last_revision().0).max().unwrap_or(0);
            assert_eq!(found, by_scan, "at {ts_ms}, expected about {expected}");
        }
    }

    #[test]
    fn old_segments_go_only_when_covered_and_then_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        for n in 1..=60 {
            append(&mut opened.wal, &record(n, 1, 100_000));
        }
        let log = &opened.log;
        assert_eq!(log.drop_oldest(2 << 20, Revision(0)).unwrap(), 0, "nothing is covered");
        assert!(log.drop_oldest(2 << 20, Revision(60)).unwrap() > 0);
        assert!(log.oldest() > Revision(1) && log.bytes() <= 2 << 20);
        assert!(log.read_after(Revision(0), Revision(60), 1000).unwrap().is_none());
        assert!(log.read_after(log.oldest().prev(), Revision(60), 1000).unwrap().is_some());
        let oldest = log.oldest();
        drop(opened);
        assert!(open(dir.path(), 0).is_err(), "the log no longer reaches back to the start");
        assert_eq!(open(dir.path(), oldest.0).unwrap().0.log.oldest(), oldest);
    }

    #[test]
    fn revisions_handed_out_in_a_relaxed_mode_are_given_up_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let (mut opened, _) = open(dir.path(), 0).unwrap();
        opened.wal.reserve(Revision(10)).unwrap();
        append(&mut opened.wal, &record(1, 1, 10));
        drop(opened);
        let (mut opened, seen) = open(dir.path(), 0).unwrap();
        assert_eq!(seen, [1]);
        let head = opened.wal.head();
        assert!(head > Revision(10));
        assert!(opened.log.is_lost(Revision(2)) && opened.log.is_lost(head.prev()));
        assert!(!opened.log.is_lost(Revision(1)) && !opened.log.is_lost(head), "ends of the gap can be resumed from");
        append(&mut opened.wal, &record(head.0 + 1, 1, 10));
        let history = opened.log.read_after(Revision(0), head.next(), usize::MAX).unwrap().unwrap();
        assert_eq!(history.records.len(), 2);
        // An orderly stop gives the rest of the reservation back.
        opened.wal.release().unwrap();
        drop(opened);
        let (opened, _) = open(dir.path(), 0).unwrap();
        assert_eq!(opened.wal.head(), head.next());
        assert!(opened.log.is_lost(head.prev()), "gaps are remembered");
    }
}
