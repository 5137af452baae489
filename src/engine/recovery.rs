//! From a data directory to a state: lock it, load the newest good snapshot, replay the log over it, tidy up.
//!
//! Replay is the same `apply` as commit. Whatever does not fit together is an error that names file and offset; then
//! nothing has been changed but a torn tail that was cut, and nobody was ever told of what was in that.

use super::Paths;
use super::collections::SharedCollection;
use super::linker::Background;
use super::prepare::Preparer;
use super::snapshot::{self, Snapshot};
use super::state::State;
use super::wal::{OpenedWal, Wal};
use crate::disk::{self, Held};
use crate::error::Error;
use crate::revision::Revision;
use std::collections::BTreeMap;
use std::fs::{Metadata, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a long recovery says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Every file and directory is called by a revision, written with so many digits.
const REVISION_DIGITS: usize = 20;

/// The file in a data directory that whoever uses it holds a lock on.
pub(super) const LOCK: &str = "LOCK";
/// Tries to take it while others take it away.
const LOCK_TRIES: usize = 100;
/// The file in a data directory that says: a restore has begun here, and is not done.
pub(super) const RESTORING: &str = "RESTORING";

/// What recovery hands to the engine.
#[derive(Debug)]
pub struct Recovered {
    /// Everything durable, applied.
    pub state: State,
    /// The log, ready to append and to read.
    pub wal: OpenedWal,
    /// Revision and replay point of the snapshots on disk that are known to be good.
    pub replay_needed: Vec<(Revision, Revision)>,
    /// Held as long as the engine lives; see [`lock`].
    pub lock: Option<Arc<Held>>,
}

impl Paths {
    /// The layout below a data directory.
    #[must_use]
    pub fn below(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            log: dir.join("log"),
            snapshots: dir.join("snapshots"),
            vectors: dir.join("vectors"),
        }
    }

    /// What is below the directory, which is there.
    pub(super) fn create(&self) -> Result<(), Error> {
        for dir in [&self.log, &self.snapshots, &self.vectors] {
            disk::create_dir_all(dir).map_err(Error::opening("cannot create", dir))?;
        }
        let parent = self.dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        for dir in [self.dir.as_path(), parent] {
            disk::sync_dir(dir).map_err(Error::io("cannot sync", dir))?;
        }
        Ok(())
    }
}

/// Takes the data directory for this process, and makes it where it is not there. The lock goes with the process, however it
/// ends.
pub(super) fn lock(dir: &Path) -> Result<Arc<Held>, Error> {
    let path = dir.join(LOCK);
    for _ in 0..LOCK_TRIES {
        if dir.is_symlink() && !dir.exists() {
            let cause = std::io::Error::other("it is a link to what is not there; is its disk mounted?");
            return Err(Error::io("cannot use", dir)(cause));
        }
        disk::create_dir_all(dir).map_err(Error::opening("cannot create", dir))?;
        let file = match OpenOptions::new().write(true).create(true).truncate(false).open(&path) {
            // The directory went in between, like the lock below.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            opened => opened.map_err(Error::opening("cannot open", &path))?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Locked(dir.to_owned())),
            Err(TryLockError::Error(e)) => return Err(Error::io("cannot lock", &path)(e)),
        }
        // A restore that failed takes its lock's file away: whoever had opened it before holds a lock on nothing.
        let is_same = |found: Metadata| file.metadata().is_ok_and(|held| held.ino() == found.ino());
        if path.metadata().is_ok_and(is_same) {
            let held = Held::take(dir, file).map_err(Error::io("cannot lock", dir))?;
            return held.map(Arc::new).ok_or_else(|| Error::Locked(dir.to_owned()));
        }
    }
    Err(Error::Locked(dir.to_owned()))
}

/// Refuses a directory that somebody else fills, before anything is made or removed there: their files would be called
/// damaged, and those that look like left-overs removed. Only what recovery would open or remove is looked at: a list of
/// keys or a certificate may lie in a data directory.
fn refuse_foreign(paths: &Paths) -> Result<(), Error> {
    let foreign = |found: &Path| Err(Error::Foreign { dir: paths.dir.clone(), found: found.to_owned() });
    // What is in each: endings of the names it looks at, `None` for directories.
    let parts: [(&Path, &[Option<&str>]); 3] = [
        (&paths.log, &[Some("log"), Some("tmp")]),
        (&paths.snapshots, &[Some("snap"), Some("tmp")]),
        (&paths.vectors, &[None]),
    ];
    if paths.dir.exists() && !paths.dir.is_dir() {
        return foreign(&paths.dir);
    }
    for (part, endings) in parts {
        if !part.exists() {
            continue;
        }
        if !part.is_dir() {
            return foreign(part);
        }
        for path in disk::list(part).map_err(Error::io("cannot list", part))? {
            let ending = path.extension().and_then(|ending| ending.to_str());
            let is_looked_at = if endings == [None] { path.is_dir() } else { endings.contains(&ending) };
            let is_numbered = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .is_some_and(|stem| stem.len() == REVISION_DIGITS && stem.bytes().all(|byte| byte.is_ascii_digit()));
            if is_looked_at && !is_numbered {
                return foreign(&path);
            }
        }
    }
    Ok(())
}

/// Recovers a data directory, or starts empty in memory when there is none.
pub fn recover(paths: Option<&Paths>, max_log_bytes: u64, background: &Arc<Background>) -> Result<Recovered, Error> {
    let Some(paths) = paths else {
        let wal = Wal::open(None, max_log_bytes, Revision::ZERO, Revision::ZERO, |_| Ok(()))?;
        return Ok(Recovered { state: State::default(), wal, replay_needed: Vec::new(), lock: None });
    };
    refuse_foreign(paths)?;
    let lock = lock(&paths.dir)?;
    let mark = paths.dir.join(RESTORING);
    if mark.try_exists().map_err(Error::io("cannot look for", &mark))? {
        return Err(Error::HalfRestored(paths.dir.clone()));
    }
    recover_locked(paths, lock, max_log_bytes, background)
}

/// Recovers a data directory that is this process's already.
pub(super) fn recover_locked(
    paths: &Paths,
    lock: Arc<Held>,
    max_log_bytes: u64,
    background: &Arc<Background>,
) -> Result<Recovered, Error> {
    paths.create()?;
    let started = Instant::now();
    let snapshot = newest_good_snapshot(&paths.snapshots)?;
    let (revision, replay_after) =
        snapshot.as_ref().map_or((Revision::ZERO, Revision::ZERO), |s| (s.revision, s.replay_after));
    let replay_needed = snapshot.iter().map(|s| (s.revision, s.replay_after)).collect();
    let gaps = snapshot.as_ref().map(|s| s.gaps.clone()).unwrap_or_default();
    let (mut state, missing) = match snapshot {
        Some(snapshot) => load(snapshot, &paths.vectors, background)?,
        None => (State::default(), Vec::new()),
    };
    if revision == Revision::ZERO && !has_segments(&paths.log)? && !is_empty(&paths.vectors)? {
        return Err(Error::corrupt(&paths.log, 0, "there are vectors but neither log nor snapshot: both are missing"));
    }
    let mut preparer = Preparer::new(Some(paths.vectors.clone()), background);
    let mut progress = Progress { started, last: started, records: 0 };
    let checkpoints = state.collections().values().map(|collection| collection.read(|c| c.checkpoint()));
    let shown = checkpoints.max().unwrap_or(Revision::ZERO).max(revision);
    let wal = Wal::open(Some(&paths.log), max_log_bytes, replay_after, shown, |record| {
        preparer.prepare(&state, record.first_revision, &record.events)?;
        preparer.hand_over(&mut state);
        state.apply(&record);
        // Their files are closed now, or there could be too many. They are removed at the end, when the log is known to be durable.
        drop(state.take_dropped());
        let (first, last) = (record.first_revision.0, record.last_revision().0);
        tracing::trace!(target: super::sequencer::EFFECTS, first, last, "apply");
        progress.count(record.last_revision());
        Ok(())
    })?;
    wal.log.add_gaps(&gaps);
    if wal.torn_bytes > 0 {
        tracing::info!(bytes = wal.torn_bytes, "cut a torn tail off the log: writes that were never acknowledged");
    }
    if progress.records > 0 {
        state.pack();
    }
    state.skip_to(wal.wal.head());
    check_checkpoints(&state, wal.wal.head(), &missing)?;
    remove_orphans(&state, &paths.vectors)?;
    let keys = state.key_counts().0;
    tracing::info!(
        revision = state.revision().0,
        snapshot = revision.0,
        keys,
        replayed = progress.records,
        took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "recovered"
    );
    Ok(Recovered { state, wal, replay_needed, lock: Some(lock) })
}

/// A collection's files cannot be ahead of the log: then the log lost its end. And they can be missing only if the log
/// deleted the collection after the snapshot.
fn check_checkpoints(state: &State, head: Revision, missing: &[Revision]) -> Result<(), Error> {
    for collection in state.collections().values() {
        if missing.contains(&collection.created()) {
            let path = Path::new("vectors").join(format!("{:020}", collection.created().0));
            return Err(Error::corrupt(&path, 0, "the collection's files are missing"));
        }
        let checkpoint = collection.read(|c| c.checkpoint());
        if checkpoint > head
            && let Some(dir) = collection.dir()
        {
            return Err(Error::corrupt(
                dir,
                0,
                format!("its files show revision {checkpoint}, but the log ends at {head}"),
            ));
        }
    }
    Ok(())
}

/// The newest snapshot that can be read. A damaged one is passed over, loudly, when there is an older one: the log is
/// kept from the older one on.
fn newest_good_snapshot(dir: &Path) -> Result<Option<Snapshot>, Error> {
    let mut first_error = None;
    for path in snapshot::list(dir)?.iter().rev() {
        match snapshot::read(path) {
            Ok(snapshot) => return Ok(Some(snapshot)),
            Err(error) => {
                tracing::error!(%error, "a snapshot cannot be used; trying an older one");
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok(None), Err)
}

/// The snapshot's state, and the collections whose files are missing.
fn load(snapshot: Snapshot, vectors: &Path, background: &Arc<Background>) -> Result<(State, Vec<Revision>), Error> {
    let mut collections = BTreeMap::new();
    let mut missing = Vec::new();
    for saved in &snapshot.collections {
        if saved.checkpoint > saved.created && !SharedCollection::dir_below(vectors, saved.created).exists() {
            missing.push(saved.created);
            collections
                .insert(saved.name.clone(), SharedCollection::open(None, saved.spec, saved.created, background)?);
            continue;
        }
        let collection = SharedCollection::open(Some(vectors), saved.spec, saved.created, background)?;
        let checkpoint = collection.read(|c| c.checkpoint());
        // The files may show a later checkpoint than the snapshot saw, never an earlier one.
        if checkpoint < saved.checkpoint
            && let Some(dir) = collection.dir()
        {
            let detail = format!("it shows revision {checkpoint}, but the snapshot saw {}", saved.checkpoint);
            return Err(Error::corrupt(&dir.join("slots.log"), 0, detail));
        }
        collections.insert(saved.name.clone(), collection);
    }
    let mut state = State::from_snapshot(snapshot.entries, collections, snapshot.revision);
    state.load_answers(snapshot.answers);
    Ok((state, missing))
}

/// Directories of collections that are gone, or whose creation never became durable.
fn remove_orphans(state: &State, vectors: &Path) -> Result<(), Error> {
    let live: Vec<&Path> = state.collections().values().filter_map(|c| c.dir()).collect();
    for path in disk::list(vectors).map_err(Error::io("cannot list", vectors))? {
        if path.is_dir() && !live.contains(&path.as_path()) {
            // What is called so was named anew by a removal that was cut short.
            let is_gone = path.extension().is_some_and(|e| e == "gone");
            let removed = if is_gone { disk::remove_dir_all(&path) } else { snapshot::remove_collection(&path) };
            removed.map_err(Error::io("cannot remove", &path))?;
        }
    }
    Ok(())
}

/// Files that are being made do not count.
fn has_segments(log: &Path) -> Result<bool, Error> {
    let files = disk::list(log).map_err(Error::io("cannot list", log))?;
    Ok(files.iter().any(|path| path.extension().is_some_and(|ending| ending == "log")))
}

fn is_empty(dir: &Path) -> Result<bool, Error> {
    Ok(disk::list(dir).map_err(Error::io("cannot list", dir))?.is_empty())
}

struct Progress {
    started: Instant,
    last: Instant,
    records: u64,
}

impl Progress {
    fn count(&mut self, revision: Revision) {
        self.records += 1;
        // Looking at the clock for each record would cost as much as replaying it.
        if self.records.is_multiple_of(1024) && self.last.elapsed() >= PROGRESS_EVERY {
            self.last = Instant::now();
            tracing::info!(
                records = self.records,
                revision = revision.0,
                seconds = self.started.elapsed().as_secs(),
                "replaying the log"
            );
        }
    }
}
