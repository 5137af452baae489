//! A collection's two files: `rows.f32` (the numbers, by slot) and `slots.log` (who lives in which slot).
//!
//! `rows.f32` is memory-mapped in chunks that are preallocated, so a write to a mapped row cannot run out of disk, and
//! that never move. It has no header: what a row means is in `slots.log`, and a row that no entry there names is
//! garbage. `slots.log` is appended at each checkpoint: ids that were written since the last one, each with its slot and the
//! checksum of its row, then those that were deleted, with their end or where they live again. Its last frame's checkpoint is
//! the revision up to which both files are complete; the log replays the rest.
//!
//! Order within a checkpoint, and why: entries are encoded first, then rows are synced, then the frame is appended and
//! synced. A frame therefore never names a row that is not on disk.
//!
//! `unsafe` stands here for mapping files; ARCHITECTURE.md lists where else.

use super::distance::prefetch_numbers;
use super::nodes::populate;
use super::{CollectionSpec, Metric, Slot, VectorId, VectorMeta};
use crate::disk::{self, File};
use crate::error::Error;
use crate::revision::Revision;
use crate::wire::{Malformed, Put, Reader};
use memmap2::{Advice, MmapMut, MmapOptions};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows start at multiples of this: a cache line, and the widest vector register.
const ROW_ALIGN: usize = 64;
/// First chunk, at least: one page for the smallest row times the alignment.
const FIRST_CHUNK_BYTES: usize = 64 << 10;
/// Chunks double up to this size, so that a large collection wastes little and a small one little too.
const CHUNK_BYTES_MAX: usize = 32 << 20;

/// Rows of f32 addressed by slot. Chunks double in size up to [`CHUNK_BYTES_MAX`] and never move.
#[derive(Debug)]
pub struct RowStore {
    dim: usize,
    /// Bytes from one row to the next.
    stride: usize,
    /// Rows in the first chunk: a multiple of 64, so that each chunk starts on a page.
    first_rows: usize,
    /// How often the chunk size doubles after the first two.
    doublings: u32,
    chunks: Vec<MmapMut>,
    /// `None` keeps the rows in anonymous memory.
    file: Option<Arc<(PathBuf, File)>>,
}

/// Chunks that a store lacks: the row each begins with, and its bytes.
#[derive(Debug)]
pub struct Growth {
    chunks: Vec<(usize, usize)>,
    stride: usize,
    file: Option<Arc<(PathBuf, File)>>,
}

/// A chunk that is allocated but not yet part of its store.
#[derive(Debug)]
pub struct NewChunk(MmapMut);

impl RowStore {
    /// Opens or creates the file; `None` keeps everything in memory.
    pub fn open(path: Option<PathBuf>, dim: usize) -> Result<Self, Error> {
        let stride = (dim * size_of::<f32>()).next_multiple_of(ROW_ALIGN);
        let first_rows = (FIRST_CHUNK_BYTES / stride).next_power_of_two().max(64);
        let doublings = (CHUNK_BYTES_MAX / (first_rows * stride)).max(1).ilog2();
        let file = match path {
            None => None,
            Some(path) => {
                let file = File::open_or_create(&path).map_err(Error::io("cannot open", &path))?;
                Some(Arc::new((path, file)))
            }
        };
        Ok(Self { dim, stride, first_rows, doublings, chunks: Vec::new(), file })
    }

    /// Chunk and row within it. Chunk 0 holds `first` rows, chunk i `first << (i-1)` until the size stops doubling.
    fn locate(&self, slot: usize) -> (usize, usize) {
        if slot < self.first_rows {
            return (0, slot);
        }
        let level = (slot / self.first_rows).ilog2();
        if level < self.doublings {
            return (level as usize + 1, slot - (self.first_rows << level));
        }
        let largest = self.first_rows << self.doublings;
        (self.doublings as usize + slot / largest, slot % largest)
    }

    fn chunk_rows(&self, chunk: usize) -> usize {
        let shift = chunk.saturating_sub(1).min(self.doublings as usize);
        self.first_rows << shift
    }

    /// Rows there is room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        (0..self.chunks.len()).map(|c| self.chunk_rows(c)).sum()
    }

    /// Bytes one row occupies.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// What is missing for `rows` rows. Its chunks count once they are allocated and given to [`RowStore::grow`]: in three steps,
    /// so that the slow one, in the middle, needs no lock of the store's. From the first to the last the store must not grow
    /// otherwise.
    #[must_use]
    pub fn growth(&self, rows: usize) -> Growth {
        let mut capacity = self.capacity();
        let mut chunks = Vec::new();
        while capacity < rows {
            let chunk_rows = self.chunk_rows(self.chunks.len() + chunks.len());
            chunks.push((capacity, chunk_rows * self.stride));
            capacity += chunk_rows;
        }
        // Whoever needs a new chunk has filled all before the last.
        if !chunks.is_empty()
            && self.file.is_some()
            && let [full @ .., _] = &self.chunks[..]
        {
            full.iter().for_each(|map| advise(map, Advice::Normal));
        }
        Growth { chunks, stride: self.stride, file: self.file.clone() }
    }

    /// Whether the file is long enough to hold this many rows. In memory there is nothing to miss.
    pub fn check_length(&self, rows: usize) -> Result<(), Error> {
        let Some((path, file)) = self.file.as_deref() else { return Ok(()) };
        let length = file.length().map_err(Error::io("cannot stat", path))?;
        let needed = (rows * self.stride) as u64;
        if length < needed {
            return Err(Error::corrupt(path, length, format!("the file ends here, its rows need {needed} bytes")));
        }
        Ok(())
    }

    /// Takes allocated chunks into use.
    pub fn grow(&mut self, chunks: Vec<NewChunk>) {
        self.chunks.extend(chunks.into_iter().map(|NewChunk(map)| map));
    }

    /// The numbers in a slot.
    #[must_use]
    pub fn row(&self, slot: Slot) -> &[f32] {
        let (chunk, row) = self.locate(slot.index());
        let start = row * self.stride;
        bytemuck::cast_slice(&self.chunks[chunk][start..start + self.dim * size_of::<f32>()])
    }

    /// The checksum of the numbers in a slot. `slots.log` keeps it beside who lives there; a start does not read all rows to
    /// compare, `kiss-vdb check` does.
    #[must_use]
    pub fn row_crc(&self, slot: Slot) -> u32 {
        crc32c::crc32c(bytemuck::cast_slice(self.row(slot)))
    }

    /// Asks the processor to fetch a row: worth it where rows come in no order.
    pub fn prefetch(&self, slot: Slot) {
        prefetch_numbers(self.row(slot));
    }

    /// Replaces the numbers in a slot. The room must have been allocated.
    pub fn write(&mut self, slot: Slot, numbers: &[f32]) {
        assert_eq!(numbers.len(), self.dim);
        let (chunk, row) = self.locate(slot.index());
        let start = row * self.stride;
        self.chunks[chunk][start..start + self.dim * size_of::<f32>()].copy_from_slice(bytemuck::cast_slice(numbers));
    }

    /// Has the memory of some slots given to this process now, rather than when it is first written.
    pub fn populate(&self, mut slots: Range<usize>) {
        slots.end = slots.end.min(self.capacity());
        while !slots.is_empty() {
            let (chunk, row) = self.locate(slots.start);
            let rows = slots.len().min(self.chunk_rows(chunk) - row);
            let map = &self.chunks[chunk];
            populate(|advice| map.advise_range(advice, row * self.stride, rows * self.stride));
            slots.start += rows;
        }
    }

    /// A handle whose `sync_data` writes every changed mapped row to disk, usable without the collection's lock.
    pub fn sync_handle(&self) -> Result<Option<File>, Error> {
        self.file
            .as_deref()
            .map(|(path, file)| file.try_clone().map_err(Error::io("cannot duplicate", path)))
            .transpose()
    }
}

/// How a chunk of a file is read ahead: where nothing is yet, not at all. Else whoever writes the first row there waits for as
/// much zeroed memory as the device is set to read ahead (8 MB and up to 24 ms where it was measured).
fn advise(map: &MmapMut, advice: Advice) {
    if let Err(error) = map.advise(advice) {
        tracing::debug!(%error, ?advice, "rows are read ahead as the system does by itself");
    }
}

impl Growth {
    /// Allocates the chunks, on disk too.
    pub fn allocate(&self) -> Result<Vec<NewChunk>, Error> {
        self.chunks.iter().map(|&(first, bytes)| self.allocate_chunk(first, bytes)).collect()
    }

    fn allocate_chunk(&self, first: usize, bytes: usize) -> Result<NewChunk, Error> {
        let Some((path, file)) = self.file.as_deref() else {
            let map = MmapMut::map_anon(bytes);
            return map.map(NewChunk).map_err(Error::io("cannot get memory for", Path::new("vector rows")));
        };
        let offset = (first * self.stride) as u64;
        let length = file.length().map_err(Error::io("cannot stat", path))?;
        preallocate(file, offset, bytes).map_err(Error::io("cannot grow", path))?;
        // SAFETY: the range was just allocated, the file is never truncated while mapped, and the data directory's lock
        // keeps other servers away from it.
        let map = unsafe { MmapOptions::new().offset(offset).len(bytes).map_mut(file.as_system()) }
            .map_err(Error::io("cannot map", path))?;
        if offset >= length {
            advise(&map, Advice::Random);
        }
        Ok(NewChunk(map))
    }
}

/// Allocates a range of the file on disk, so that a write to its mapping cannot run out of space.
fn preallocate(file: &File, offset: u64, bytes: usize) -> std::io::Result<()> {
    if file.allocate(offset, bytes as u64)? {
        return Ok(());
    }
    // Some file systems cannot preallocate; they get their blocks by writing zeros where nothing is yet.
    let from = file.length()?.max(offset);
    let missing = (offset + bytes as u64).saturating_sub(from);
    file.write_all_at(&vec![0; usize::try_from(missing).unwrap_or(bytes)], from)
}

/// First bytes of a `slots.log`.
const MAGIC: &[u8; 8] = b"KISSSLOT";
/// Format version of `slots.log`.
const VERSION: u32 = 3;
/// One without checksums of rows. It is read; the next checkpoint writes the file anew.
const VERSION_WITHOUT_ROW_CRC: u32 = 2;
/// Magic, version, dim, metric, created revision, CRC32C: also that of a graph file.
pub const HEADER_BYTES: usize = 8 + 4 + 4 + 4 + 8 + 4;
/// Length, CRC32C.
const FRAME_HEADER_BYTES: usize = 8;

/// What a checkpoint says of one id.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of a slot")]
pub enum SlotEntry {
    /// It lives here.
    Live {
        id: VectorId,
        slot: Slot,
        born: Revision,
        revision: Revision,
        norm: f32,
        row_crc: Option<u32>,
        meta: VectorMeta,
    },
    /// It is gone.
    Gone { id: VectorId },
}

/// The file of checkpoints.
#[derive(Debug)]
pub struct SlotLog {
    path: PathBuf,
    file: File,
    header: Vec<u8>,
    version: u32,
    /// Bytes up to the end of the last whole frame; zero while there is not even a header.
    bytes: u64,
    /// What it was opened with may be in the page cache only, written by a process that was killed before its sync.
    is_sure: bool,
}

/// What opening a slot log found.
#[derive(Debug)]
pub struct Opened {
    /// Ready to append.
    pub log: SlotLog,
    /// Revision of the last whole frame; zero when there is none.
    pub checkpoint: Revision,
    /// Newest change of the collection as of that frame.
    pub newest: Revision,
    /// All entries, oldest first.
    pub entries: Vec<SlotEntry>,
}

fn metric_code(metric: Metric) -> u32 {
    match metric {
        Metric::Cosine => 1,
        Metric::Dot => 2,
        Metric::L2 => 3,
    }
}

/// The first bytes of a collection's file.
#[must_use]
pub fn header(magic: &[u8; 8], version: u32, spec: CollectionSpec, created: Revision) -> Vec<u8> {
    let mut header = magic.to_vec();
    header.put_u32(version);
    header.put_u32(u32::try_from(spec.dim).expect("dim is at most DIM_MAX"));
    header.put_u32(metric_code(spec.metric));
    header.put_revision(created);
    header.put_u32(crc32c::crc32c(&header));
    header
}

impl SlotLog {
    /// Opens the file, or creates it empty. What follows the last whole frame does not count, and is cut off by
    /// the next append; whether something is missing, the caller knows from its snapshot.
    pub fn open(path: PathBuf, spec: CollectionSpec, created: Revision) -> Result<Opened, Error> {
        let mut file = File::open_or_create(&path).map_err(Error::io("cannot open", &path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::io("cannot read", &path))?;
        let expected = header(MAGIC, VERSION, spec, created);
        if bytes.len() < HEADER_BYTES {
            // New, or its creation was cut short, or it lost all but that: which of them, the caller knows. The header is
            // written with the first frame, so that a refused start changes nothing.
            let log = Self { path, file, header: expected, version: VERSION, bytes: 0, is_sure: false };
            return Ok(Opened { log, checkpoint: Revision::ZERO, newest: Revision::ZERO, entries: Vec::new() });
        }
        let old = header(MAGIC, VERSION_WITHOUT_ROW_CRC, spec, created);
        let version = if bytes[..HEADER_BYTES] == old[..] { VERSION_WITHOUT_ROW_CRC } else { VERSION };
        if version == VERSION && bytes[..HEADER_BYTES] != expected[..] {
            return Err(Error::corrupt(&path, 0, "the header is damaged or belongs to another collection or version"));
        }
        let mut at = HEADER_BYTES;
        let (mut checkpoint, mut newest) = (Revision::ZERO, Revision::ZERO);
        let mut entries = Vec::new();
        while let Some(frame) = whole_frame(&bytes[at..]) {
            (checkpoint, newest) =
                decode_frame(frame, version, &mut entries).map_err(|e| Error::corrupt(&path, at as u64, e.0))?;
            at += FRAME_HEADER_BYTES + frame.len();
        }
        let log = Self { path, file, header: expected, version, bytes: at as u64, is_sure: false };
        Ok(Opened { log, checkpoint, newest, entries })
    }

    /// Bytes in the file.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is of an older version: then it can only be written anew.
    #[must_use]
    pub fn is_old(&self) -> bool {
        self.version != VERSION
    }

    /// Makes what it was opened with durable, and its name: before anything else relies on that.
    pub fn make_sure(&mut self) -> Result<(), Error> {
        if !self.is_sure {
            self.file.sync().map_err(Error::io("cannot sync", &self.path))?;
            if let Some(dir) = self.path.parent() {
                disk::sync_dir(dir).map_err(Error::io("cannot sync", dir))?;
            }
            self.is_sure = true;
        }
        Ok(())
    }

    /// Appends frames and syncs them. After an error the file may end in a torn frame, which the next append, or the
    /// next open, cuts off; the caller must not count on the checkpoint.
    pub fn append(&mut self, frames: &[u8]) -> Result<(), Error> {
        let start = self.bytes.max(HEADER_BYTES as u64);
        let write = || -> std::io::Result<()> {
            if self.file.length()? != self.bytes {
                self.file.set_length(self.bytes)?;
            }
            if self.bytes == 0 {
                // Synced by itself: frames behind a header that was lost would be damage.
                self.file.write_all_at(&self.header, 0)?;
                self.file.sync()?;
            }
            self.file.write_all_at(frames, start)?;
            self.file.sync()
        };
        write().map_err(Error::io("cannot append to", &self.path))?;
        self.bytes = start + frames.len() as u64;
        Ok(())
    }

    /// Forgets what was appended behind the first `bytes`, for want of what should have followed. The next append cuts it off
    /// where this cannot.
    pub fn cut(&mut self, bytes: u64) {
        self.bytes = bytes;
        if let Err(error) = self.file.set_length(bytes) {
            tracing::debug!(%error, "a slot log stays longer for now");
        }
    }

    /// Starts a successor beside this file; see [`Rewrite`].
    pub fn rewrite(&self, spec: CollectionSpec, created: Revision) -> Result<Rewrite, Error> {
        let path = self.path.with_extension("log.tmp");
        let mut file = File::create(&path).map_err(Error::io("cannot create", &path))?;
        file.write_all(&header(MAGIC, VERSION, spec, created)).map_err(Error::io("cannot write", &path))?;
        Ok(Rewrite { path, file: std::io::BufWriter::new(file) })
    }

    /// Puts a finished successor in this file's place: synced, renamed, directory synced. Rows it names must be synced.
    pub fn replace(&mut self, rewrite: Rewrite) -> Result<(), Error> {
        let Rewrite { path: beside, file } = rewrite;
        let file = file.into_inner().map_err(|e| Error::io("cannot write", &beside)(e.into_error()))?;
        let bytes = file.length().map_err(Error::io("cannot stat", &beside))?;
        file.sync().map_err(Error::io("cannot sync", &beside))?;
        disk::rename(&beside, &self.path).map_err(Error::io("cannot rename", &beside))?;
        // From here on the new file is the one, even if the directory cannot be synced.
        (self.file, self.bytes, self.version) = (file, bytes, VERSION);
        if let Some(dir) = self.path.parent() {
            disk::sync_dir(dir).map_err(Error::io("cannot sync", dir))?;
        }
        Ok(())
    }
}

/// A slot log being written beside the one it will replace.
#[derive(Debug)]
pub struct Rewrite {
    path: PathBuf,
    file: std::io::BufWriter<File>,
}

impl Rewrite {
    /// Appends a frame.
    pub fn write(&mut self, frame: &[u8]) -> Result<(), Error> {
        self.file.write_all(frame).map_err(Error::io("cannot write", &self.path))
    }
}

/// One frame: length and CRC, then checkpoint revision, newest change, count and entries. A checkpoint of many entries is several
/// frames, of which only the last carries its revision; the others repeat the one before.
#[must_use]
pub fn encode_frame(checkpoint: Revision, newest: Revision, entries: &[SlotEntry]) -> Vec<u8> {
    let mut frame = vec![0; FRAME_HEADER_BYTES];
    frame.put_revision(checkpoint);
    frame.put_revision(newest);
    frame.put_u32(u32::try_from(entries.len()).expect("slots are counted in u32"));
    for entry in entries {
        match entry {
            SlotEntry::Live { id, slot, born, revision, norm, row_crc, meta } => {
                frame.put_byte(1);
                frame.put_text(id.as_str());
                frame.put_u32(slot.0);
                frame.put_revision(*born);
                frame.put_revision(*revision);
                frame.put_u32(norm.to_bits());
                frame.put_u32(row_crc.expect("only entries of old files have none, and those are not written"));
                frame.put_text(meta.text());
            }
            SlotEntry::Gone { id } => {
                frame.put_byte(2);
                frame.put_text(id.as_str());
            }
        }
    }
    let length =
        u32::try_from(frame.len() - FRAME_HEADER_BYTES).expect("a checkpoint is written before it reaches 4 GiB");
    let crc = crc32c::crc32c(&frame[FRAME_HEADER_BYTES..]);
    frame[..4].copy_from_slice(&length.to_le_bytes());
    frame[4..8].copy_from_slice(&crc.to_le_bytes());
    frame
}

/// The body of the frame at the front, if it is there whole.
fn whole_frame(bytes: &[u8]) -> Option<&[u8]> {
    let mut reader = Reader(bytes);
    let length = reader.u32("length").ok()?;
    let crc = reader.u32("checksum").ok()?;
    let body = reader.take(length as usize, "frame").ok()?;
    (crc32c::crc32c(body) == crc).then_some(body)
}

fn decode_frame(body: &[u8], version: u32, entries: &mut Vec<SlotEntry>) -> Result<(Revision, Revision), Malformed> {
    let mut reader = Reader(body);
    let checkpoint = reader.revision("checkpoint")?;
    let newest = reader.revision("newest")?;
    for _ in 0..reader.u32("count")? {
        let kind = reader.byte("entry kind")?;
        let id = VectorId::new(reader.text("id")?).map_err(|e| Malformed(e.to_string()))?;
        entries.push(match kind {
            1 => SlotEntry::Live {
                id,
                slot: Slot(reader.u32("slot")?),
                born: reader.revision("born")?,
                revision: reader.revision("revision")?,
                norm: f32::from_bits(reader.u32("norm")?),
                row_crc: (version == VERSION).then(|| reader.u32("row checksum")).transpose()?,
                meta: VectorMeta::new(reader.text("meta")?).map_err(|e| Malformed(e.to_string()))?,
            },
            2 => SlotEntry::Gone { id },
            other => return Err(Malformed(format!("unknown entry kind {other}"))),
        });
    }
    reader.end("the last entry")?;
    Ok((checkpoint, newest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_a_place_of_its_own_and_rows_keep_what_was_written() {
        for dim in [1, 3, 16, 100, 384, 8192] {
            let dir = tempfile::tempdir().unwrap();
            let mut rows = RowStore::open(Some(dir.path().join("rows.f32")), dim).unwrap();
            let count = rows.first_rows * 6 + 3;
            rows.grow(rows.growth(count).allocate().unwrap());
            assert!(rows.capacity() >= count);
            let mut last = (0, usize::MAX);
            for slot in 0..count {
                let (chunk, row) = rows.locate(slot);
                assert!(row < rows.chunk_rows(chunk), "dim {dim} slot {slot}");
                assert!((chunk, row) == (last.0, last.1.wrapping_add(1)) || (chunk, row) == (last.0 + 1, 0));
                last = (chunk, row);
                rows.write(Slot(slot as u32), &vec![slot as f32; dim]);
            }
            drop(rows);
            let mut rows = RowStore::open(Some(dir.path().join("rows.f32")), dim).unwrap();
            rows.grow(rows.growth(count).allocate().unwrap());
            for slot in 0..count {
                assert_eq!(rows.row(Slot(slot as u32)), vec![slot as f32; dim], "dim {dim} slot {slot}");
                assert_eq!(rows.row(Slot(slot as u32)).as_ptr() as usize % ROW_ALIGN, 0);
            }
        }
    }

    #[test]
    fn a_slot_log_cut_at_any_byte_opens_with_the_frames_that_are_whole() {
        let spec = CollectionSpec::new(3, Metric::Dot).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slots.log");
        let id = |n: u32| VectorId::new(&format!("v{n}")).unwrap();
        let live = |n: u32| SlotEntry::Live {
            id: id(n),
            slot: Slot(n),
            born: Revision(1),
            revision: Revision(u64::from(n)),
            norm: 1.0,
            row_crc: Some(0),
            meta: VectorMeta::empty(),
        };
        let mut log = SlotLog::open(path.clone(), spec, Revision(1)).unwrap().log;
        let mut ends = vec![(HEADER_BYTES as u64, 0, 0)];
        for n in 1..4u32 {
            log.append(&encode_frame(
                Revision(u64::from(n) * 10),
                Revision(1),
                &[live(n), SlotEntry::Gone { id: id(n + 9) }],
            ))
            .unwrap();
            ends.push((log.bytes(), u64::from(n) * 10, 2 * n as usize));
        }
        let whole = std::fs::read(&path).unwrap();
        for cut in HEADER_BYTES..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let opened = SlotLog::open(path.clone(), spec, Revision(1)).unwrap();
            let (end, checkpoint, entries) = *ends.iter().rev().find(|e| e.0 <= cut as u64).unwrap();
            assert_eq!((opened.log.bytes(), opened.checkpoint.0, opened.entries.len()), (end, checkpoint, entries));
        }
        std::fs::write(&path, &whole).unwrap();
        assert!(SlotLog::open(path.clone(), spec, Revision(2)).is_err(), "another collection's file must be refused");
    }

    #[test]
    fn a_slot_log_of_the_version_before_is_read_and_written_anew() {
        let spec = CollectionSpec::new(3, Metric::Dot).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slots.log");
        let mut body = Vec::new();
        body.put_revision(Revision(10));
        body.put_revision(Revision(9));
        body.put_u32(1);
        body.put_byte(1);
        body.put_text("v");
        body.put_u32(4);
        body.put_revision(Revision(8));
        body.put_revision(Revision(9));
        body.put_u32(1f32.to_bits());
        body.put_text("{}");
        let mut bytes = header(MAGIC, VERSION_WITHOUT_ROW_CRC, spec, Revision(1));
        bytes.put_u32(u32::try_from(body.len()).unwrap());
        bytes.put_u32(crc32c::crc32c(&body));
        bytes.extend_from_slice(&body);
        std::fs::write(&path, &bytes).unwrap();
        let mut opened = SlotLog::open(path.clone(), spec, Revision(1)).unwrap();
        assert!(opened.log.is_old() && opened.checkpoint == Revision(10));
        let SlotEntry::Live { slot, row_crc: None, .. } = &opened.entries[0] else { panic!("{:?}", opened.entries) };
        assert_eq!(*slot, Slot(4));
        let rewrite = opened.log.rewrite(spec, Revision(1)).unwrap();
        opened.log.replace(rewrite).unwrap();
        assert!(!opened.log.is_old() && !SlotLog::open(path, spec, Revision(1)).unwrap().log.is_old());
    }
}
