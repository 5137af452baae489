//! A backup: the whole database at one revision as one stream of bytes, taken while writers go on.
//!
//! ```text
//! hold the log ─▶ walk keys and vectors, a slice under the lock at a time ─▶ the log from there to the head ─▶ end
//! ```
//! The walk alone is of no one revision: what is written meanwhile it sees or misses. The records behind it say what that
//! was, and applying them over the walk gives exactly the state at the last of them, as replaying the log over a snapshot
//! does. Memory: a slice and what waits to be sent, however large the database and slow the reader.
//!
//! Rejected: one revision by copy on write, as streams' snapshots have. That keeps old versions of keys for as long as the
//! reader takes, and dead vectors too, whose slots writers then wait for.
//!
//! Invariants
//! - Every checksum goes on from the one before, so that a block cut out, moved or doubled is found like a flipped bit.
//! - A file without its end block is not a backup.
//!
//! Deliberately absent: history before the backup, the graphs (they are made anew).

use super::Engine;
use super::answers::Remembered;
use super::codec::{
    Entries, Entry, Record, decode_entry, decode_record, encode_entry, encode_record, numbers, put_spec, spec,
};
use super::collections::SharedCollection;
use super::command::Key;
use super::snapshot::{answers_until, put_answers, read_answers};
use super::view::SLICE_KEYS;
use crate::error::Error;
use crate::revision::Revision;
use crate::vector::collection::Item;
use crate::vector::{CollectionName, CollectionSpec, Vector, VectorId, VectorMeta};
use crate::wire::{Malformed, Put, Reader};
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"KISSBACK";
const VERSION: u32 = 1;
/// Rows are gathered into blocks of about this size.
const BLOCK_BYTES: usize = 256 << 10;
/// Log read at a time.
const LOG_BYTES: usize = 1 << 20;
/// Bytes read from a file at a time.
const READ_BYTES: usize = 256 << 10;

mod kind {
    pub const HEADER: u8 = 1;
    pub const ANSWERS: u8 = 2;
    pub const ENTRIES: u8 = 3;
    pub const COLLECTION: u8 = 4;
    pub const VECTORS: u8 = 5;
    pub const RECORDS: u8 = 6;
    pub const END: u8 = 7;
    pub const GIVEN_UP: u8 = 8;
}

/// What a backup holds, as its end says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The revision it restores to.
    pub revision: Revision,
    /// Keys walked.
    pub keys: u64,
    /// Collections walked.
    pub collections: u64,
    /// Vectors walked.
    pub vectors: u64,
    /// Records written meanwhile.
    pub records: u64,
}

/// Why a backup ended before its end.
enum Stopped {
    /// Whoever reads it went away.
    ReaderGone,
    /// The server is stopping.
    Draining,
    Failed(Error),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Builds blocks and sends them.
struct Out<S> {
    send: S,
    crc: u32,
    block: Vec<u8>,
}

impl<S: FnMut(Vec<u8>) -> bool> Out<S> {
    fn begin(&mut self, kind: u8) {
        self.block.clear();
        self.block.put_u64(0);
        self.block.put_byte(kind);
    }

    fn send(&mut self, bytes: Vec<u8>) -> Result<(), Stopped> {
        if (self.send)(bytes) { Ok(()) } else { Err(Stopped::ReaderGone) }
    }

    fn end(&mut self) -> Result<(), Stopped> {
        let mut block = std::mem::take(&mut self.block);
        let content = &block[8..];
        let length = u32::try_from(content.len()).expect("rows and records are bounded far below 4 GiB");
        self.crc = crc32c::crc32c_append(self.crc, content);
        block[..4].copy_from_slice(&length.to_le_bytes());
        block[4..8].copy_from_slice(&self.crc.to_le_bytes());
        self.send(block)
    }

    /// Ends a block of rows that is large enough, and begins the next.
    fn next_if_full(&mut self, kind: u8) -> Result<(), Stopped> {
        if self.block.len() >= BLOCK_BYTES {
            self.end()?;
            self.begin(kind);
        }
        Ok(())
    }
}

impl Engine {
    /// Takes a backup and hands it to `send`, block by block; that says whether to go on. `None` when it said no. After an
    /// error, or when the server stops, what was sent ends with the reason and is no backup. Blocking.
    pub fn backup(&self, send: impl FnMut(Vec<u8>) -> bool) -> Result<Option<Contents>, Error> {
        let mut out = Out { send, crc: 0, block: Vec::new() };
        let (reason, result) = match self.write_backup(&mut out) {
            Ok(contents) => return Ok(Some(contents)),
            Err(Stopped::ReaderGone) => return Ok(None),
            Err(Stopped::Draining) => ("the server was stopping", Ok(None)),
            Err(Stopped::Failed(error)) => ("the server could not read everything; its log says why", Err(error)),
        };
        out.begin(kind::GIVEN_UP);
        out.block.put_text(reason);
        // The reader may be gone too.
        out.end().ok();
        result
    }

    fn write_backup<S: FnMut(Vec<u8>) -> bool>(&self, out: &mut Out<S>) -> Result<Contents, Stopped> {
        // Before anything is walked: from here on the log keeps what is written meanwhile.
        let _hold = self.inner.log.hold(self.head());
        let (walked_from, collections, answers) = {
            let state = self.inner.state.read();
            let collections = state.collections().iter().map(|(name, c)| (name.clone(), Arc::clone(c)));
            (state.revision(), collections.collect::<Vec<_>>(), answers_until(&state, state.revision(), self.now_ms()))
        };
        let mut magic = MAGIC.to_vec();
        magic.put_u32(VERSION);
        out.send(magic)?;
        out.begin(kind::HEADER);
        out.block.put_revision(walked_from);
        out.block.put_u64(self.now_ms());
        out.block.put_text(crate::VERSION);
        out.end()?;
        out.begin(kind::ANSWERS);
        put_answers(&mut out.block, &answers);
        out.end()?;
        drop(answers);
        let mut contents = Contents { collections: collections.len() as u64, ..Contents::default() };
        contents.keys = self.walk_keys(out)?;
        for (name, collection) in &collections {
            contents.vectors += self.walk_vectors(out, name, collection)?;
        }
        // A record of many vectors that was being applied while they were walked may be there in part: the log behind has all of
        // it, once it counts.
        for (_, collection) in &collections {
            drop(collection.settled());
        }
        contents.revision = self.head();
        // In the relaxed modes what is in a backup should be no newer than what a crash leaves. A poisoned server cannot
        // sync, and is backed up as it shows itself.
        match self.inner.sync_log() {
            Ok(()) | Err(Error::Poisoned) => {}
            Err(error) => return Err(error.into()),
        }
        contents.records = self.walk_log(out, walked_from, contents.revision)?;
        out.begin(kind::END);
        out.block.put_revision(contents.revision);
        for count in [contents.keys, contents.collections, contents.vectors, contents.records] {
            out.block.put_u64(count);
        }
        out.end()?;
        Ok(contents)
    }

    fn go_on(&self) -> Result<(), Stopped> {
        if self.feed().is_draining() { Err(Stopped::Draining) } else { Ok(()) }
    }

    /// Entries whose deadline has passed are among them: their end is an event yet to come.
    fn walk_keys<S: FnMut(Vec<u8>) -> bool>(&self, out: &mut Out<S>) -> Result<u64, Stopped> {
        let mut count = 0;
        let mut after: Option<Key> = None;
        out.begin(kind::ENTRIES);
        loop {
            self.go_on()?;
            let slice: Entries = {
                let state = self.inner.state.read();
                let from = after.as_ref().map_or(Bound::Unbounded, |key| Bound::Excluded(key.as_str()));
                state.range_from(from).take(SLICE_KEYS).map(|(key, entry)| (key.clone(), Arc::clone(entry))).collect()
            };
            let Some((last, _)) = slice.last() else { break };
            after = Some(last.clone());
            count += slice.len() as u64;
            for (key, entry) in &slice {
                out.block.put_text(key.as_str());
                encode_entry(entry, &mut out.block);
                out.next_if_full(kind::ENTRIES)?;
            }
        }
        out.end()?;
        Ok(count)
    }

    /// A collection deleted meanwhile is walked to its end all the same: the log behind deletes it.
    fn walk_vectors<S: FnMut(Vec<u8>) -> bool>(
        &self,
        out: &mut Out<S>,
        name: &CollectionName,
        collection: &SharedCollection,
    ) -> Result<u64, Stopped> {
        out.begin(kind::COLLECTION);
        out.block.put_text(name.as_str());
        put_spec(&mut out.block, collection.spec());
        out.block.put_revision(collection.created());
        out.end()?;
        let slice_vectors = collection.rows_at_a_time();
        let mut count = 0;
        let mut after: Option<VectorId> = None;
        out.begin(kind::VECTORS);
        loop {
            self.go_on()?;
            let (slice, _) = collection.list(after.as_ref().map(VectorId::as_str), slice_vectors, true, || ());
            let Some(last) = slice.last() else { break };
            after = Some(last.id.clone());
            count += slice.len() as u64;
            for Item { id, revision, meta, vector } in &slice {
                out.block.put_text(id.as_str());
                out.block.put_revision(*revision);
                out.block.put_blob(bytemuck::cast_slice(vector.as_deref().unwrap_or_default()));
                out.block.put_text(meta.text());
                out.next_if_full(kind::VECTORS)?;
            }
        }
        out.end()?;
        Ok(count)
    }

    fn walk_log<S: FnMut(Vec<u8>) -> bool>(
        &self,
        out: &mut Out<S>,
        from: Revision,
        to: Revision,
    ) -> Result<u64, Stopped> {
        let mut count = 0;
        let mut reached = from;
        out.begin(kind::RECORDS);
        while reached < to {
            self.go_on()?;
            let history = self.inner.log.read_after(reached, to, LOG_BYTES)?;
            let history = history.expect("the log is held from there on");
            assert!(history.reached > reached, "the log goes on to what has been applied");
            for record in &history.records {
                let mut payload = Vec::new();
                encode_record(record, &mut payload);
                out.block.put_revision(record.first_revision);
                out.block.put_u32(u32::try_from(record.events.len()).expect("bounded by the record's bytes"));
                out.block.put_blob(&payload);
                out.next_if_full(kind::RECORDS)?;
            }
            count += history.records.len() as u64;
            reached = history.reached;
        }
        out.end()?;
        Ok(count)
    }
}

/// A backup that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{} is damaged at offset {offset}: {detail}. Nothing was restored; use another backup", path.display())]
pub struct Damaged {
    /// The file, or what a stream is called.
    pub path: PathBuf,
    offset: u64,
    detail: String,
}

/// One block of a backup.
#[derive(Debug)]
pub enum Block {
    /// The first.
    Header {
        /// The revision the walk began at.
        walked_from: Revision,
    },
    /// What was said to clients who may ask again.
    Answers(Vec<Arc<Remembered>>),
    /// Keys, in order.
    Entries(Vec<(Key, Entry)>),
    /// A collection; its vectors follow.
    Collection {
        /// Its name.
        name: CollectionName,
        /// Its shape.
        spec: CollectionSpec,
        /// The revision that created it.
        created: Revision,
    },
    /// Vectors of the last collection.
    Vectors(Vec<(VectorId, Revision, Vector, VectorMeta)>),
    /// What was written meanwhile.
    Records(Vec<Record>),
    /// The last.
    End(Contents),
}

/// A backup's blocks, one in memory at a time, each checked.
#[derive(Debug)]
pub struct Blocks<R = BufReader<File>> {
    path: PathBuf,
    file: R,
    crc: u32,
    /// Where the block read last begins, and where the next.
    at: u64,
    next: u64,
    /// `u64::MAX` for a stream, whose length shows when it ends.
    length: u64,
}

/// What reading a backup can meet.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not as it was written.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The server gave it up.
    #[error("this backup was not finished: {0}")]
    GivenUp(String),
    /// The system refused to read.
    #[error(transparent)]
    Io(#[from] Error),
}

impl Blocks {
    /// Checks magic and version.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let file = File::open(path).map_err(Error::io("cannot open", path))?;
        let length = file.metadata().map_err(Error::io("cannot stat", path))?.len();
        Self::begin(path, BufReader::with_capacity(READ_BYTES, file), length)
    }
}

impl<R: Read> Blocks<R> {
    fn begin(path: &Path, file: R, length: u64) -> Result<Self, ReadError> {
        let mut blocks = Self { path: path.to_owned(), file, crc: 0, at: 0, next: 0, length };
        if blocks.take(MAGIC.len() as u64)? != MAGIC {
            return Err(blocks.damaged("this is not a backup").into());
        }
        let version = blocks.take(4)?;
        let version = Reader(&version).u32("version").map_err(|e| blocks.damaged(e.0))?;
        if version != VERSION {
            blocks.at = MAGIC.len() as u64;
            return Err(blocks.damaged(format!("format version {version}; this program reads {VERSION}")).into());
        }
        Ok(blocks)
    }

    /// Bytes of the file, and how many of them are read.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.next, self.length)
    }

    /// At the block read last.
    pub fn damaged(&self, detail: impl Into<String>) -> Damaged {
        Damaged { path: self.path.clone(), offset: self.at, detail: detail.into() }
    }

    fn take(&mut self, length: u64) -> Result<Vec<u8>, ReadError> {
        // Checked before there is memory for it: the length may be damaged.
        let left = self.length - self.next;
        if length > left {
            return Err(self.damaged(format!("the file ends here: {length} bytes are needed, {left} are left")).into());
        }
        let mut bytes = Vec::new();
        if self.length < u64::MAX {
            bytes.reserve_exact(usize::try_from(length).map_err(|_| self.damaged("a block larger than memory"))?);
        }
        let read = self.file.by_ref().take(length).read_to_end(&mut bytes);
        let read = read.map_err(Error::io("cannot read", &self.path))? as u64;
        if read < length {
            return Err(self.damaged(format!("it ends here: {length} bytes are needed, {read} are left")).into());
        }
        self.next += length;
        Ok(bytes)
    }

    /// The content of the next block, its checksum checked.
    fn next_content(&mut self) -> Result<Vec<u8>, ReadError> {
        self.at = self.next;
        let head = self.take(8)?;
        let mut head = Reader(&head);
        let fields = head.u32("length").and_then(|length| Ok((length, head.u32("checksum")?)));
        let (length, crc) = fields.map_err(|e| self.damaged(e.0))?;
        let content = self.take(length.into())?;
        self.crc = crc32c::crc32c_append(self.crc, &content);
        if self.crc != crc {
            return Err(self.damaged("a block does not match its checksum").into());
        }
        Ok(content)
    }

    /// The next block. After [`Block::End`] there is none.
    pub fn read_next(&mut self) -> Result<Block, ReadError> {
        let content = self.next_content()?;
        let mut reader = Reader(&content);
        let block = read_block(&mut reader).map_err(|e| self.damaged(e.0))?;
        let Some(block) = block else {
            let reason = reader.text("reason").map_err(|e| self.damaged(e.0))?;
            return Err(ReadError::GivenUp(reason.to_owned()));
        };
        if matches!(block, Block::End(_)) {
            self.end()?;
        }
        Ok(block)
    }

    /// Nothing comes behind the last block.
    fn end(&mut self) -> Result<(), ReadError> {
        self.at = self.next;
        if self.file.read(&mut [0]).map_err(Error::io("cannot read", &self.path))? > 0 {
            return Err(self.damaged("it goes on behind its end").into());
        }
        Ok(())
    }
}

/// Reads a file to its end by checksums alone.
pub fn verify(path: &Path, progress: impl FnMut(u64, u64) -> bool) -> Result<Option<Contents>, ReadError> {
    verify_blocks(Blocks::open(path)?, progress)
}

/// As [`verify`], while it passes by; `name` is what errors call it.
pub fn verify_stream(name: &str, stream: impl Read) -> Result<Contents, ReadError> {
    let contents = verify_blocks(Blocks::begin(Path::new(name), stream, u64::MAX)?, |_, _| true)?;
    Ok(contents.expect("nobody stops it"))
}

fn verify_blocks<R: Read>(
    mut blocks: Blocks<R>,
    mut progress: impl FnMut(u64, u64) -> bool,
) -> Result<Option<Contents>, ReadError> {
    loop {
        let content = blocks.next_content()?;
        let mut reader = Reader(&content);
        let found = match reader.clone().byte("kind") {
            Ok(kind::END | kind::GIVEN_UP) => read_block(&mut reader),
            _ => Ok(Some(Block::Entries(Vec::new()))),
        };
        match found.map_err(|e| blocks.damaged(e.0))? {
            Some(Block::End(contents)) => {
                blocks.end()?;
                return Ok(Some(contents));
            }
            Some(_) => {}
            None => {
                let reason = reader.text("reason").map_err(|e| blocks.damaged(e.0))?;
                return Err(ReadError::GivenUp(reason.to_owned()));
            }
        }
        let (read, of) = blocks.progress();
        if !progress(read, of) {
            return Ok(None);
        }
    }
}

/// `None` for one that says that the server gave up; the reason is left in the reader.
fn read_block(reader: &mut Reader<'_>) -> Result<Option<Block>, Malformed> {
    let block = match reader.byte("kind")? {
        kind::HEADER => {
            let walked_from = reader.revision("revision")?;
            reader.u64("created")?;
            reader.text("program")?;
            Block::Header { walked_from }
        }
        kind::ANSWERS => Block::Answers(read_answers(reader)?),
        kind::ENTRIES => {
            let mut entries = Vec::new();
            while !reader.0.is_empty() {
                let key = Key::new(reader.text("key")?).map_err(|e| Malformed(e.to_string()))?;
                entries.push((key, decode_entry(reader)?));
            }
            Block::Entries(entries)
        }
        kind::COLLECTION => Block::Collection {
            name: CollectionName::new(reader.text("collection")?).map_err(|e| Malformed(e.to_string()))?,
            spec: spec(reader)?,
            created: reader.revision("created")?,
        },
        kind::VECTORS => {
            let mut vectors = Vec::new();
            while !reader.0.is_empty() {
                vectors.push(read_vector(reader)?);
            }
            Block::Vectors(vectors)
        }
        kind::RECORDS => {
            let mut records = Vec::new();
            while !reader.0.is_empty() {
                let first_revision = reader.revision("revision")?;
                let count = reader.u32("count")?;
                records.push(decode_record(first_revision, count, reader.blob("record")?)?);
            }
            Block::Records(records)
        }
        kind::END => Block::End(Contents {
            revision: reader.revision("revision")?,
            keys: reader.u64("keys")?,
            collections: reader.u64("collections")?,
            vectors: reader.u64("vectors")?,
            records: reader.u64("records")?,
        }),
        kind::GIVEN_UP => return Ok(None),
        other => return Err(Malformed(format!("unknown kind of block {other}"))),
    };
    reader.end("the block")?;
    Ok(Some(block))
}

fn read_vector(reader: &mut Reader<'_>) -> Result<(VectorId, Revision, Vector, VectorMeta), Malformed> {
    let id = VectorId::new(reader.text("id")?).map_err(|e| Malformed(e.to_string()))?;
    let revision = reader.revision("revision")?;
    let vector = numbers(reader)?.ok_or_else(|| Malformed("a vector without numbers".into()))?;
    let meta = VectorMeta::new(reader.text("meta")?).map_err(|e| Malformed(e.to_string()))?;
    Ok((id, revision, vector, meta))
}
