//! Snapshots on disk: the keys at one revision, so that recovery need not replay the whole log.
//!
//! Taking one: checkpoint the collections' files, begin a [`View`], write the file beside its name, sync, rename, sync
//! the directory, keep the newest two, then drop log segments that both no longer need. Writers go on meanwhile.
//!
//! A snapshot names the revision from which the log must be replayed over it. That is its own revision, or earlier where
//! a collection's files were behind when it was taken: the keys in it are skipped then, the vectors are not.

use super::Inner;
use super::answers::{Remembered, RetryAnswer};
use super::codec::{Entries, Entry, decode_answer, decode_entry, encode_answer, encode_entry, put_spec, spec};
use super::command::{Committed, Key};
use super::prefixes::Prefixes;
use super::state::State;
use super::view::View;
use super::wal::Gap;
use crate::disk::{self, File};
use crate::error::Error;
use crate::revision::Revision;
use crate::vector::{CollectionName, CollectionSpec};
use crate::wire::{Malformed, Put, Reader};
use std::io::{BufReader, BufWriter, Read, Write};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"KISSSNAP";
/// Version 1 remembers no answers.
const VERSION: u32 = 2;
/// Entries are written in blocks of about this size, each with its checksum.
const BLOCK_BYTES: usize = 64 << 10;
/// Old versions kept for it beyond which it hurries: they are memory.
const KEPT_MAX: usize = 100_000;
/// While a server is at work a snapshot syncs each block and rests: it takes a quarter of a core, and a sync of the log waits
/// behind one block rather than behind all of it.
const REST: Duration = Duration::from_micros(700);
/// Bytes read at a time.
const READ_BYTES: usize = 128 << 10;
/// Snapshots kept: the newest, and one in case the newest turns out damaged.
const KEPT: usize = 2;

/// What a snapshot file holds.
#[derive(Debug)]
pub struct Snapshot {
    /// The revision of its keys and of its list of collections.
    pub revision: Revision,
    /// Replay the log after this revision.
    pub replay_after: Revision,
    /// Ranges of revisions a crash gave up, as far as known.
    pub gaps: Vec<Gap>,
    /// Collections at `revision`, each with the checkpoint its files had reached.
    pub collections: Vec<SavedCollection>,
    /// What was said to clients who may ask again, oldest first.
    pub answers: Vec<Arc<Remembered>>,
    /// In key order.
    pub entries: Entries,
}

/// A collection as a snapshot names it.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedCollection {
    /// Its name.
    pub name: CollectionName,
    /// Its shape.
    pub spec: CollectionSpec,
    /// The revision that created it.
    pub created: Revision,
    /// Its files are complete up to at least here.
    pub checkpoint: Revision,
}

/// What taking a snapshot did.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// The revision it shows.
    pub revision: Revision,
    /// Size of the file; 0 when everything is kept in memory.
    pub bytes: u64,
    /// How long it took.
    pub took_ms: u64,
}

fn put_block(out: &mut impl Write, block: &[u8]) -> std::io::Result<()> {
    let length = u32::try_from(block.len()).expect("a block is cut long before 4 GiB");
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&crc32c::crc32c(block).to_le_bytes())?;
    out.write_all(block)
}

fn snapshot_path(dir: &Path, revision: Revision) -> PathBuf {
    dir.join(format!("{:020}.snap", revision.0))
}

/// How fast a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Leaving disk and cores to writers.
    Gentle,
    /// As fast as it goes: nobody writes any more.
    Fast,
}

/// Takes a snapshot now. One at a time; blocking.
pub(super) fn take(inner: &Inner, pace: Pace) -> Result<Taken, Error> {
    let _one_at_a_time = inner.snapshot_lock.lock();
    take_locked(inner, pace)
}

fn take_locked(inner: &Inner, pace: Pace) -> Result<Taken, Error> {
    let started = Instant::now();
    let collections: Vec<_> = inner.state.read().collections().values().cloned().collect();
    for collection in collections {
        let written = collection.checkpoint(|| inner.state.read().revision(), || inner.sync_log());
        // One that was deleted meanwhile may have lost its files.
        let is_live = || inner.state.read().collections().values().any(|live| Arc::ptr_eq(live, &collection));
        if written.is_err() && is_live() {
            written?;
        }
    }
    let Some(dir) = inner.paths.as_ref().map(|p| p.snapshots.clone()) else {
        let revision = inner.state.read().revision();
        return Ok(Taken { revision, bytes: 0, took_ms: millis(started) });
    };
    let view = View::begin(&inner.state, Prefixes::from_iter([""]), false);
    let (header, revision, replay_after) = header(inner, &view);
    // In the relaxed modes the log may be behind what is applied; a snapshot must not be ahead of it. Behind the header: that a
    // collection is not listed, as it was deleted since, must not be lost either.
    inner.sync_log()?;
    let path = snapshot_path(&dir, revision);
    // A file of this revision is left alone only if it is known to be good and to say the same.
    let is_there = path.exists() && inner.replay_needed.lock().contains(&(revision, replay_after));
    let bytes = if is_there {
        path.metadata().map_or(0, |m| m.len())
    } else {
        write(inner, &view, &dir, &path, &header, pace)?
    };
    drop(view);
    keep_newest(inner, &dir, revision, replay_after)?;
    Ok(Taken { revision, bytes, took_ms: millis(started) })
}

/// Removes the files of deleted collections and, in memory, the oldest history. A kept snapshot may still list such a
/// collection; recovery knows that its files may be missing when the log deletes it later.
pub(crate) fn tidy(inner: &Inner) {
    let dropped = inner.state.read().dropped();
    if !dropped.is_empty() && inner.sync_log().is_err() {
        // A crash could still undo the deletion: the files stay, the next start removes them.
        return;
    }
    for collection in dropped {
        if let Some(dir) = collection.dir()
            && let Err(error) = remove_collection(dir)
            // Replay meets collections again whose files went before the crash.
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, dir = %dir.display(), "cannot remove a deleted collection; the next start will");
        }
        inner.state.read().forget_dropped(&collection);
    }
    if inner.paths.is_none() {
        let revision = inner.state.read().revision();
        if let Err(error) = inner.log.drop_oldest(inner.max_log_bytes, revision) {
            tracing::warn!(%error, "cannot trim the log");
        }
    }
}

/// Renames first and makes that durable, so that a removal cut short leaves nothing that could be taken for a collection.
pub(super) fn remove_collection(dir: &Path) -> std::io::Result<()> {
    let gone = dir.with_extension("gone");
    if gone.exists() {
        // An earlier removal was cut short, and replay made the collection anew before it came to its end again.
        disk::remove_dir_all(&gone)?;
    }
    disk::rename(dir, &gone)?;
    if let Some(parent) = dir.parent() {
        disk::sync_dir(parent)?;
    }
    disk::remove_dir_all(&gone)
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn header(inner: &Inner, view: &View) -> (Vec<u8>, Revision, Revision) {
    // Collections made or deleted after the view was begun are the log's affair; those it lists were there at its
    // revision. A checkpoint may by now be ahead of the view, which only means that replay has less to do.
    let revision = view.revision();
    let state = inner.state.read();
    let (listed, replay_after) = listed(&state, revision);
    let answers = answers_until(&state, revision, inner.clock.now_ms());
    drop(state);
    (encode_header(revision, replay_after, &inner.log.gaps(), &listed, &answers), revision, replay_after)
}

/// The collections of a revision with their checkpoints, and from where the log must be replayed because of them.
fn listed(state: &State, revision: Revision) -> (Vec<SavedCollection>, Revision) {
    let mut replay_after = revision;
    let mut listed = Vec::new();
    for (name, collection) in state.collections() {
        if collection.created() > revision {
            continue;
        }
        let (checkpoint, behind) = collection.read(|c| (c.checkpoint(), c.behind()));
        replay_after = behind.map_or(replay_after, |behind| replay_after.min(behind));
        listed.push(SavedCollection {
            name: name.clone(),
            spec: collection.spec(),
            created: collection.created(),
            checkpoint,
        });
    }
    (listed, replay_after)
}

/// What was said up to a revision to clients who may ask again; what was said later is in the log, and with it whether it
/// came true. What is too old by now to be said again is left out.
pub(super) fn answers_until(state: &State, revision: Revision, now_ms: u64) -> Vec<Arc<Remembered>> {
    let is_kept = |answer: &&Arc<Remembered>| answer.committed.last_revision <= revision && answer.is_recent(now_ms);
    state.answers().iter().filter(is_kept).map(Arc::clone).collect()
}

fn encode_header(
    revision: Revision,
    replay_after: Revision,
    gaps: &[Gap],
    listed: &[SavedCollection],
    answers: &[Arc<Remembered>],
) -> Vec<u8> {
    let mut header = Vec::new();
    header.put_revision(revision);
    header.put_revision(replay_after);
    header.put_u32(u32::try_from(gaps.len()).expect("a gap an unclean restart"));
    for gap in gaps {
        header.put_revision(gap.from);
        header.put_revision(gap.to);
    }
    header.put_u32(u32::try_from(listed.len()).expect("collections fit memory"));
    for saved in listed {
        header.put_text(saved.name.as_str());
        put_spec(&mut header, saved.spec);
        header.put_revision(saved.created);
        header.put_revision(saved.checkpoint);
    }
    put_answers(&mut header, answers);
    header
}

/// Appends answers; backups hold them in the same bytes.
pub(super) fn put_answers(out: &mut Vec<u8>, answers: &[Arc<Remembered>]) {
    out.put_u32(u32::try_from(answers.len()).expect("answers fit memory"));
    for known in answers {
        out.put_u64(known.ts_ms);
        out.put_revision(known.committed.first_revision);
        out.put_revision(known.committed.last_revision);
        encode_answer(&known.retry, &known.committed.outcomes, out);
    }
}

/// Reads what [`put_answers`] wrote.
pub(super) fn read_answers(reader: &mut Reader<'_>) -> Result<Vec<Arc<Remembered>>, Malformed> {
    let mut answers = Vec::new();
    for _ in 0..reader.u32("answers")? {
        let ts_ms = reader.u64("ts")?;
        let first_revision = reader.revision("first_revision")?;
        let last_revision = reader.revision("last_revision")?;
        let RetryAnswer { retry, outcomes } = decode_answer(reader)?;
        let committed = Committed { outcomes, first_revision, last_revision };
        answers.push(Arc::new(Remembered { ts_ms, committed, retry }));
    }
    Ok(answers)
}

/// A snapshot file being written beside its name.
struct Draft {
    file: BufWriter<File>,
    block: Vec<u8>,
    count: u64,
}

impl Draft {
    fn create(beside: &Path, header: &[u8]) -> std::io::Result<Self> {
        let mut file = BufWriter::with_capacity(BLOCK_BYTES, File::create(beside)?);
        file.write_all(MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        put_block(&mut file, header)?;
        Ok(Self { file, block: Vec::with_capacity(BLOCK_BYTES + 4096), count: 0 })
    }

    /// Adds the next entry in key order; true when that filled a block.
    fn push(&mut self, key: &Key, entry: &Entry) -> std::io::Result<bool> {
        self.block.put_text(key.as_str());
        encode_entry(entry, &mut self.block);
        self.count += 1;
        let is_full = self.block.len() >= BLOCK_BYTES;
        if is_full {
            put_block(&mut self.file, &self.block)?;
            self.block.clear();
        }
        Ok(is_full)
    }

    fn sync(&mut self) -> std::io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync()
    }

    /// Ends the file, syncs it and gives it its name. Returns its size.
    fn finish(mut self, beside: &Path, path: &Path, dir: &Path) -> std::io::Result<u64> {
        if !self.block.is_empty() {
            put_block(&mut self.file, &self.block)?;
        }
        // An empty block ends the entries; the count behind it tells a file cut between blocks from a whole one.
        put_block(&mut self.file, &[])?;
        put_block(&mut self.file, &self.count.to_le_bytes())?;
        let file = self.file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.sync()?;
        let bytes = file.length()?;
        disk::rename(beside, path)?;
        disk::sync_dir(dir)?;
        Ok(bytes)
    }
}

fn write(inner: &Inner, view: &View, dir: &Path, path: &Path, header: &[u8], pace: Pace) -> Result<u64, Error> {
    let beside = path.with_extension("tmp");
    let fill = || -> std::io::Result<u64> {
        let mut draft = Draft::create(&beside, header)?;
        let mut from = Some(String::new());
        let mut found = Vec::new();
        while let Some(at) = from {
            from = view.slice(&inner.state, &at, "", &mut found);
            for (key, entry) in found.drain(..) {
                // On a full disk there are no writers to leave anything to, and somebody may wait to shorten the log.
                let is_hurried = inner.stopping.load(Ordering::Relaxed) || inner.storage_full.load(Ordering::Relaxed);
                let is_gentle = pace == Pace::Gentle && !is_hurried;
                if draft.push(&key, &entry)? && is_gentle && view.kept() < KEPT_MAX {
                    draft.sync()?;
                    std::thread::sleep(REST);
                }
            }
        }
        draft.finish(&beside, path, dir)
    };
    fill().map_err(|e| {
        // What is left of it would only take space that may be missing.
        disk::remove_file(&beside).ok();
        Error::io("cannot write the snapshot", path)(e)
    })
}

/// Writes the snapshot of a state that no engine has, in a directory that has none: a restored one. Its collections'
/// files must be complete.
pub(super) fn write_first(dir: &Path, state: &State) -> Result<(), Error> {
    let revision = state.revision();
    let (listed, replay_after) = listed(state, revision);
    assert_eq!(replay_after, revision, "collections are checkpointed before");
    let path = snapshot_path(dir, revision);
    let beside = path.with_extension("tmp");
    let fill = || -> std::io::Result<u64> {
        // Whether they are too old by now, whoever serves them looks.
        let answers = answers_until(state, revision, 0);
        let mut draft = Draft::create(&beside, &encode_header(revision, revision, &[], &listed, &answers))?;
        for (key, entry) in state.range_from(Bound::Unbounded) {
            draft.push(key, entry)?;
        }
        draft.finish(&beside, &path, dir)
    };
    fill().map_err(Error::io("cannot write the snapshot", &path)).map(|_| ())
}

/// Shortens a log on a full disk: what only the older snapshot needs goes, a new one takes its place in the room that makes, and
/// what only the one before needs goes too, down to `MAX_LOG_MB`. A log that found no room does not take any meanwhile, or it would be
/// gone before the snapshot had it. What is left is one snapshot; the next makes it two again.
pub(super) fn make_room(inner: &Inner) -> Result<(), Error> {
    struct Mark<'a>(&'a AtomicBool);
    impl Drop for Mark<'_> {
        fn drop(&mut self) {
            self.0.store(false, Ordering::Release);
        }
    }
    let Some(dir) = inner.paths.as_ref().map(|paths| &paths.snapshots) else { return Ok(()) };
    let _one_at_a_time = inner.snapshot_lock.lock();
    inner.is_making_room.store(true, Ordering::Release);
    let _mark = Mark(&inner.is_making_room);
    keep_one(inner, dir)?;
    take_locked(inner, Pace::Fast)?;
    keep_one(inner, dir)
}

fn keep_one(inner: &Inner, dir: &Path) -> Result<(), Error> {
    // The newest that this process wrote or read. One that is newer and could not be read is nothing to rely on.
    let newest = inner.replay_needed.lock().iter().max().copied();
    let paths = list(dir)?;
    let Some(newest) = newest.and_then(|(newest, _)| paths.iter().find(|path| revision_of(path) == Some(newest)))
    else {
        return Ok(());
    };
    // A process that was killed may not have come to make its name durable.
    disk::sync_dir(dir).map_err(Error::io("cannot sync", dir))?;
    keep(inner, &paths, |path| path == newest)
}

/// Removes all but the newest snapshots, then the log segments that the oldest kept one no longer needs.
fn keep_newest(inner: &Inner, dir: &Path, revision: Revision, replay_after: Revision) -> Result<(), Error> {
    {
        let mut needed = inner.replay_needed.lock();
        needed.retain(|(r, _)| *r != revision);
        needed.push((revision, replay_after));
    }
    let paths = list(dir)?;
    let first_kept = paths.len().saturating_sub(KEPT);
    keep(inner, &paths, |path| paths[first_kept..].contains(path))
}

fn keep(inner: &Inner, paths: &[PathBuf], is_kept: impl Fn(&PathBuf) -> bool) -> Result<(), Error> {
    let mut needed = inner.replay_needed.lock();
    let (kept, gone): (Vec<&PathBuf>, Vec<&PathBuf>) = paths.iter().partition(|path| is_kept(path));
    for path in gone {
        disk::remove_file(path).map_err(Error::io("cannot remove", path))?;
    }
    let kept: Vec<Revision> = kept.into_iter().filter_map(|p| revision_of(p)).collect();
    needed.retain(|(r, _)| kept.contains(r));
    // A kept snapshot that this process neither wrote nor read could need all of the log.
    let known = kept.iter().all(|k| needed.iter().any(|(r, _)| r == k));
    let covered =
        if known { needed.iter().map(|(_, after)| *after).min().unwrap_or(Revision::ZERO) } else { Revision::ZERO };
    let dropped = inner.log.drop_oldest(inner.max_log_bytes, covered)?;
    if dropped > 0 {
        tracing::info!(segments = dropped, oldest = inner.log.oldest().0, "dropped log segments beyond MAX_LOG_MB");
    }
    Ok(())
}

fn revision_of(path: &Path) -> Option<Revision> {
    path.file_stem()?.to_str()?.parse().ok().map(Revision)
}

/// Snapshot files, oldest first. Removes what an interrupted snapshot left behind.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut paths = Vec::new();
    for path in disk::list(dir).map_err(Error::io("cannot list", dir))? {
        match path.extension().and_then(|e| e.to_str()) {
            Some("snap") => paths.push(path),
            Some("tmp") => disk::remove_file(&path).map_err(Error::io("cannot remove", &path))?,
            _ => {}
        }
    }
    Ok(paths)
}

/// Reads a snapshot. Any damage is an error; nothing is changed.
pub fn read(path: &Path) -> Result<Snapshot, Error> {
    let mut blocks = Blocks::open(path)?;
    let header = blocks.next()?;
    let mut snapshot = read_header(&header, blocks.version).map_err(|e| blocks.damaged(e))?;
    if revision_of(path) != Some(snapshot.revision) {
        return Err(Error::corrupt(path, 12, "the file name does not fit its revision"));
    }
    loop {
        let block = blocks.next()?;
        let mut entries = Reader(&block);
        if entries.0.is_empty() {
            break;
        }
        while !entries.0.is_empty() {
            let (key, entry) = read_entry(&mut entries).map_err(|e| blocks.damaged(e))?;
            if snapshot.entries.last().is_some_and(|(last, _)| *last >= key) {
                return Err(blocks.damaged(Malformed("keys are out of order".into())));
            }
            snapshot.entries.push((key, Arc::new(entry)));
        }
    }
    let count = blocks.next()?;
    let count = Reader(&count).u64("count").map_err(|e| blocks.damaged(e))?;
    if count != snapshot.entries.len() as u64 || blocks.left > 0 {
        return Err(blocks.damaged(Malformed("the file does not hold as many entries as it says".into())));
    }
    Ok(snapshot)
}

/// A snapshot's blocks, one in memory at a time.
struct Blocks<'a> {
    path: &'a Path,
    file: BufReader<File>,
    /// Where the block read last begins, and how many bytes are behind it.
    at: u64,
    next: u64,
    left: u64,
    version: u32,
}

impl<'a> Blocks<'a> {
    /// Checks magic and version.
    fn open(path: &'a Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io("cannot open", path))?;
        let left = file.length().map_err(Error::io("cannot stat", path))?;
        let mut blocks =
            Self { path, file: BufReader::with_capacity(READ_BYTES, file), at: 0, next: 0, left, version: 0 };
        if blocks.take(MAGIC.len(), "magic")? != MAGIC {
            return Err(Error::corrupt(path, 0, "this is not a snapshot"));
        }
        blocks.at = blocks.next;
        let version = blocks.take_u32("version")?;
        if version == 0 || version > VERSION {
            return Err(Error::corrupt(
                path,
                8,
                format!(
                    "format version {version}; this program reads up to {VERSION}: unless it is damaged, use the release that wrote it"
                ),
            ));
        }
        blocks.version = version;
        Ok(blocks)
    }

    fn damaged(&self, error: Malformed) -> Error {
        Error::corrupt(self.path, self.at, error.0)
    }

    fn take(&mut self, length: usize, what: &str) -> Result<Vec<u8>, Error> {
        // Checked before there is memory for it: the length may be damaged.
        if length as u64 > self.left {
            return Err(self.damaged(Malformed(format!("{what} needs {length} bytes, {} are left", self.left))));
        }
        let mut bytes = vec![0; length];
        self.file.read_exact(&mut bytes).map_err(Error::io("cannot read", self.path))?;
        self.next += length as u64;
        self.left -= length as u64;
        Ok(bytes)
    }

    fn take_u32(&mut self, what: &str) -> Result<u32, Error> {
        let bytes = self.take(size_of::<u32>(), what)?;
        Reader(&bytes).u32(what).map_err(|e| self.damaged(e))
    }

    fn next(&mut self) -> Result<Vec<u8>, Error> {
        self.at = self.next;
        let length = self.take_u32("block length")?;
        let crc = self.take_u32("block checksum")?;
        let block = self.take(length as usize, "block")?;
        if crc32c::crc32c(&block) != crc {
            return Err(self.damaged(Malformed("a block does not match its checksum".into())));
        }
        Ok(block)
    }
}

fn read_header(bytes: &[u8], version: u32) -> Result<Snapshot, Malformed> {
    let mut reader = Reader(bytes);
    let revision = reader.revision("revision")?;
    let replay_after = reader.revision("replay_after")?;
    let mut gaps = Vec::new();
    for _ in 0..reader.u32("gaps")? {
        gaps.push(Gap { from: reader.revision("gap")?, to: reader.revision("gap")? });
    }
    let mut collections = Vec::new();
    for _ in 0..reader.u32("collections")? {
        collections.push(SavedCollection {
            name: CollectionName::new(reader.text("collection")?).map_err(|e| Malformed(e.to_string()))?,
            spec: spec(&mut reader)?,
            created: reader.revision("created")?,
            checkpoint: reader.revision("checkpoint")?,
        });
    }
    let answers = if version > 1 { read_answers(&mut reader)? } else { Vec::new() };
    reader.end("the snapshot's header")?;
    Ok(Snapshot { revision, replay_after, gaps, collections, answers, entries: Vec::new() })
}

fn read_entry(reader: &mut Reader<'_>) -> Result<(Key, Entry), Malformed> {
    let key = Key::new(reader.text("key")?).map_err(|e| Malformed(e.to_string()))?;
    Ok((key, decode_entry(reader)?))
}
