//! A data directory from a backup.
//!
//! The file is checked to its end before anything is made. Then the walk is loaded and the records behind it are applied,
//! by the same `apply` as commit and recovery; vectors go to their files, the rest to a first snapshot. At the end the
//! directory is opened as a start would, and counted.
//!
//! From its first file on the directory is locked, and a file in it says that it holds half of a restore: no server starts on that.
//!
//! Revisions go on behind a gap, as after a crash of a relaxed mode, but a wide one: see [`super::wal::create_behind`].

use super::Paths;
use super::backup::{Block, Blocks, Contents, ReadError, verify};
use super::collections::SharedCollection;
use super::linker::Background;
use super::prepare::Preparer;
use super::recovery::{LOCK, RESTORING, lock, recover_locked};
use super::snapshot;
use super::state::State;
use super::wal::{self, Gap};
use crate::disk::{self, Held};
use crate::error::Error;
use crate::revision::Revision;
use crate::vector::CollectionName;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a restore made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The revision that keys and vectors show.
    pub revision: Revision,
    /// The first write gets this one.
    pub next_revision: Revision,
    /// Keys.
    pub keys: u64,
    /// Collections.
    pub collections: u64,
    /// Vectors in all of them.
    pub vectors: u64,
}

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The directory is somebody's.
    #[error("{} is not empty; a restore makes a new directory or fills an empty one", .0.display())]
    NotEmpty(PathBuf),
    /// The backup cannot be used.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The system refused something.
    #[error(transparent)]
    Engine(#[from] Error),
    /// The caller did not want to go on.
    #[error("interrupted; nothing was restored")]
    Interrupted,
}

/// Restores `file` into `dir`. `go_on` is told bytes read of bytes in all, twice over, and says whether to go on. After an
/// error `dir` is as it was. Blocking.
pub fn restore(file: &Path, dir: &Path, go_on: impl Fn(u64, u64) -> bool) -> Result<Restored, RestoreError> {
    refuse_used(dir)?;
    let contents = verify(file, |read, of| go_on(read, 2 * of))?.ok_or(RestoreError::Interrupted)?;
    let existed = dir.exists();
    let lock = lock(dir).inspect_err(|_| {
        if !existed {
            std::fs::remove_dir(dir).ok();
        }
    })?;
    // The check took its time: others may have come and gone. From here on nobody does.
    refuse_used(dir)?;
    let paths = Paths::below(dir);
    build(file, &paths, contents, &lock, go_on).inspect_err(|_| {
        // What cannot be removed is refused by the next restore, and by a start as long as the mark is there.
        for part in [&paths.log, &paths.snapshots, &paths.vectors] {
            if disk::remove_dir_all(part).is_err_and(|error| error.kind() != ErrorKind::NotFound) {
                return;
            }
        }
        if disk::sync_dir(dir).is_err() {
            return;
        }
        disk::remove_file(&dir.join(RESTORING)).ok();
        disk::remove_file(&dir.join(LOCK)).ok();
        if !existed {
            std::fs::remove_dir(dir).ok();
        }
    })
}

/// A restore fills nothing that holds something, but for the lock's file of one that was killed before it began, and what a new file
/// system holds.
pub fn refuse_used(dir: &Path) -> Result<(), RestoreError> {
    if dir.exists()
        && !disk::list(dir)
            .map_err(Error::io("cannot list", dir))?
            .iter()
            .all(|path| path.ends_with(LOCK) || path.ends_with("lost+found"))
    {
        return Err(RestoreError::NotEmpty(dir.to_owned()));
    }
    Ok(())
}

fn build(
    file: &Path,
    paths: &Paths,
    contents: Contents,
    lock: &Arc<Held>,
    go_on: impl Fn(u64, u64) -> bool,
) -> Result<Restored, RestoreError> {
    let mark = paths.dir.join(RESTORING);
    disk::File::create(&mark).map_err(Error::opening("cannot create", &mark))?;
    // Syncs the directory, so that the mark is there before anything else.
    paths.create()?;
    // Nothing is linked here: the server does it, as for any collection without a graph file.
    let background = Background::new();
    let state = load(file, paths, contents, &background, go_on)?;
    let revision = state.revision();
    let mut vectors = 0;
    for collection in state.collections().values() {
        collection.checkpoint(|| revision, || Ok(()))?;
        vectors += collection.read(|c| c.len()) as u64;
    }
    let gap = wal::create_behind(&paths.log, revision)?;
    snapshot::write_first(&paths.snapshots, &state)?;
    let restored = Restored {
        revision,
        next_revision: gap.to.next(),
        keys: state.key_counts().0 as u64,
        collections: state.collections().len() as u64,
        vectors,
    };
    drop(state);
    check(paths, lock, restored, gap)?;
    disk::remove_file(&mark).map_err(Error::io("cannot remove", &mark))?;
    disk::sync_dir(&paths.dir).map_err(Error::io("cannot sync", &paths.dir))?;
    Ok(restored)
}

/// The walk, and the records behind it.
fn load(
    file: &Path,
    paths: &Paths,
    contents: Contents,
    background: &Arc<Background>,
    go_on: impl Fn(u64, u64) -> bool,
) -> Result<State, RestoreError> {
    let mut blocks = Blocks::open(file)?;
    let damaged = |blocks: &Blocks, detail: &str| ReadError::from(blocks.damaged(detail));
    let Block::Header { walked_from } = blocks.read_next()? else {
        return Err(damaged(&blocks, "the first block is not a header").into());
    };
    let mut answers = Vec::new();
    let mut entries = Vec::new();
    let mut collections: BTreeMap<CollectionName, Arc<SharedCollection>> = BTreeMap::new();
    let mut current: Option<Arc<SharedCollection>> = None;
    let mut preparer = Preparer::new(Some(paths.vectors.clone()), background);
    let mut found = Contents { revision: walked_from, ..Contents::default() };
    let mut state: Option<State> = None;
    loop {
        let block = blocks.read_next()?;
        if let Block::Records(_) | Block::End(_) = &block
            && state.is_none()
        {
            let entries = std::mem::take(&mut entries);
            let mut loaded = State::from_snapshot(entries, std::mem::take(&mut collections), walked_from);
            loaded.load_answers(std::mem::take(&mut answers));
            state = Some(loaded);
        }
        match (block, &mut state) {
            (Block::Answers(all), None) => answers = all,
            (Block::Entries(some), None) => {
                found.keys += some.len() as u64;
                entries.extend(some.into_iter().map(|(key, entry)| (key, Arc::new(entry))));
            }
            (Block::Collection { name, spec, created }, None) => {
                found.collections += 1;
                let collection = SharedCollection::open(Some(&paths.vectors), spec, created, background)?;
                current = Some(Arc::clone(&collection));
                collections.insert(name, collection);
            }
            (Block::Vectors(some), None) => {
                let Some(collection) = &current else {
                    return Err(damaged(&blocks, "vectors of no collection").into());
                };
                found.vectors += some.len() as u64;
                collection.reserve(some.len())?;
                for (id, revision, vector, meta) in &some {
                    if vector.as_slice().len() != collection.spec().dim {
                        return Err(damaged(&blocks, "a vector of another dimension than its collection").into());
                    }
                    collection.put(id, vector.as_slice(), meta, *revision);
                }
            }
            (Block::Records(some), Some(state)) => {
                found.records += some.len() as u64;
                for record in some {
                    if record.first_revision != state.revision().next() {
                        return Err(damaged(&blocks, "records are missing").into());
                    }
                    preparer.prepare(state, record.first_revision, &record.events)?;
                    preparer.hand_over(state);
                    state.apply(&record);
                    // At once: there could be more of them than files that may be open.
                    for collection in state.take_dropped() {
                        if let Some(dir) = collection.dir() {
                            snapshot::remove_collection(dir).map_err(Error::io("cannot remove", dir))?;
                        }
                    }
                }
            }
            (Block::End(_), Some(_)) => break,
            _ => return Err(damaged(&blocks, "a block out of place").into()),
        }
        let (read, of) = blocks.progress();
        if !go_on(of + read, 2 * of) {
            return Err(RestoreError::Interrupted);
        }
    }
    let state = state.expect("made before the last block");
    found.revision = state.revision();
    if found != contents {
        let detail = format!("it holds {found:?}, its end says {contents:?}");
        return Err(damaged(&blocks, &detail).into());
    }
    Ok(state)
}

/// Opens the directory as a start would.
fn check(paths: &Paths, lock: &Arc<Held>, restored: Restored, gap: Gap) -> Result<(), Error> {
    let recovered = recover_locked(paths, Arc::clone(lock), u64::MAX, &Background::new())?;
    let state = &recovered.state;
    let vectors: usize = state.collections().values().map(|c| c.read(|c| c.len())).sum();
    let counts = (state.key_counts().0 as u64, state.collections().len() as u64, vectors as u64);
    if counts != (restored.keys, restored.collections, restored.vectors) || recovered.wal.wal.head() != gap.to {
        return Err(Error::corrupt(&paths.dir, 0, "what was restored does not open as what was written"));
    }
    Ok(())
}
