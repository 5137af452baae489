//! Files and directories, as the log, the snapshots and the collections use them: every file that data is in passes through here.
//! (`LOCK`, and the secret of tokens, which is made anew where it is missing or cut short, do not.)
//!
//! Plain calls to the system, on real files. In tests each operation is first told to the lab, if the thread is in one
//! (`src/lab/`): it writes down what was done and in which order, and may make the operation fail. Nothing of that is
//! compiled into the program.
//!
//! Writes to the mapped rows of a collection pass by: the lab looks at that file itself.

use crate::faults::{self, Bug};
use parking_lot::RwLock;
use rustix::fs::{Advice, FallocateFlags, MemfdFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::{Metadata, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What is about to be done; for the lab.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named after the calls")]
pub enum DiskOp<'a> {
    Open(&'a Path),
    /// Makes the file, or empties it where it exists.
    Create(&'a Path),
    OpenOrCreate(&'a Path),
    Read,
    Write {
        at: u64,
        bytes: &'a [u8],
    },
    /// Blocks for a range; the file grows to hold it.
    Allocate {
        at: u64,
        bytes: u64,
    },
    SetLength(u64),
    Sync,
    Rename {
        from: &'a Path,
        to: &'a Path,
    },
    Remove(&'a Path),
    List(&'a Path),
    /// With all that is missing above it.
    CreateDir(&'a Path),
    /// With all that is in it.
    RemoveDir(&'a Path),
    SyncDir(&'a Path),
}

/// An open file.
#[derive(Debug)]
pub struct File {
    file: std::fs::File,
    #[cfg(test)]
    lab: Option<crate::lab::Watched>,
}

impl DiskOp<'_> {
    /// The name it is about.
    fn path(&self) -> Option<&Path> {
        match *self {
            DiskOp::Open(path)
            | DiskOp::Create(path)
            | DiskOp::OpenOrCreate(path)
            | DiskOp::Rename { to: path, .. } => Some(path),
            DiskOp::Remove(path)
            | DiskOp::List(path)
            | DiskOp::CreateDir(path)
            | DiskOp::RemoveDir(path)
            | DiskOp::SyncDir(path) => Some(path),
            DiskOp::Read | DiskOp::Write { .. } | DiskOp::Allocate { .. } | DiskOp::SetLength(_) | DiskOp::Sync => None,
        }
    }
}

/// A directory that is this process's alone. Should it be moved, or something be mounted in its place, no operation on a name below it
/// succeeds any more: it would be done to what stands there now, which may be another database.
#[derive(Debug)]
pub struct Held {
    place: (PathBuf, (u64, u64)),
    _lock: std::fs::File,
    _dir: std::fs::File,
}

/// What is held, by path, with the device and the number of the directory. One, but in tests. Known to the whole process, as whoever
/// names a file has nothing but its path; the lock is held to copy an entry, not while the system is asked.
static HELD: RwLock<Vec<(PathBuf, (u64, u64))>> = RwLock::new(Vec::new());

fn identity(of: &Metadata) -> (u64, u64) {
    (of.dev(), of.ino())
}

impl Held {
    /// Takes a directory by the locked file in it, and by the directory itself, as the file may be removed. `None` when another process
    /// has it.
    pub fn take(path: &Path, lock: std::fs::File) -> io::Result<Option<Self>> {
        let dir = std::fs::File::open(path)?;
        // Not every file system locks directories.
        if matches!(dir.try_lock(), Err(TryLockError::WouldBlock)) {
            return Ok(None);
        }
        let place = (path.to_owned(), identity(&dir.metadata()?));
        HELD.write().push(place.clone());
        Ok(Some(Self { place, _lock: lock, _dir: dir }))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.write().retain(|place| *place != self.place);
    }
}

/// What stands at the path of a held directory is another one.
#[derive(Debug, thiserror::Error)]
#[error("{} is not the directory it was when it was locked: it was moved, or something else mounted in its place", .0.display())]
struct Moved(PathBuf);

/// An error when what has this name is no longer in the directory that is held, or when that cannot be known.
fn check_held(path: &Path) -> io::Result<()> {
    let held = HELD.read();
    let innermost = held.iter().filter(|(dir, _)| path.starts_with(dir)).max_by_key(|(dir, _)| dir.as_os_str().len());
    let Some((dir, taken)) = innermost.cloned() else { return Ok(()) };
    drop(held);
    match dir.metadata() {
        Ok(found) if identity(&found) == taken => Ok(()),
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Err(error),
        _ => Err(io::Error::other(Moved(dir))),
    }
}

/// Whether the directory that this name is in is held, and no longer in its place.
pub fn is_moved(path: &Path) -> Option<io::Error> {
    check_held(path).err().filter(|error| error.get_ref().is_some_and(|cause| cause.is::<Moved>()))
}

/// Looks whether the name still leads where it should, and tells the lab. Both may refuse.
fn tell(op: DiskOp<'_>) -> io::Result<()> {
    op.path().map_or(Ok(()), check_held)?;
    #[cfg(test)]
    crate::lab::tell(op)?;
    Ok(())
}

impl File {
    fn open_with(op: DiskOp<'_>, path: &Path, options: &std::fs::OpenOptions) -> io::Result<Self> {
        tell(op)?;
        Ok(Self {
            file: options.open(path)?,
            #[cfg(test)]
            lab: crate::lab::watch(path),
        })
    }

    /// For reading.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_with(DiskOp::Open(path), path, std::fs::OpenOptions::new().read(true))
    }

    /// For reading and writing; it must exist.
    pub fn open_to_write(path: &Path) -> io::Result<Self> {
        Self::open_with(DiskOp::Open(path), path, std::fs::OpenOptions::new().read(true).write(true))
    }

    /// For reading and writing; an empty file where there is none.
    pub fn open_or_create(path: &Path) -> io::Result<Self> {
        let mut options = std::fs::OpenOptions::new();
        Self::open_with(DiskOp::OpenOrCreate(path), path, options.read(true).write(true).create(true).truncate(false))
    }

    /// For reading and writing; empty, whatever was there.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut options = std::fs::OpenOptions::new();
        Self::open_with(DiskOp::Create(path), path, options.read(true).write(true).create(true).truncate(true))
    }

    /// A file in memory, without a name.
    pub fn in_memory() -> io::Result<Self> {
        let file = rustix::fs::memfd_create("kiss-vdb", MemfdFlags::CLOEXEC)?.into();
        Ok(Self {
            file,
            #[cfg(test)]
            lab: None,
        })
    }

    /// A second handle to the same open file.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            #[cfg(test)]
            lab: self.lab.clone(),
        })
    }

    /// The system's file, to map it.
    #[must_use]
    pub fn as_system(&self) -> &std::fs::File {
        &self.file
    }

    #[inline]
    #[cfg_attr(not(test), expect(unused_variables, reason = "without a lab there is nobody to tell"))]
    fn tell(&self, op: DiskOp<'_>) -> io::Result<()> {
        #[cfg(test)]
        if let Some(lab) = &self.lab {
            lab.tell(op, &self.file)?;
        }
        Ok(())
    }

    /// Bytes in the file.
    pub fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Reads the whole buffer's worth from an offset.
    pub fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.tell(DiskOp::Read)?;
        self.file.read_exact_at(bytes, at)
    }

    /// Writes all of it at an offset.
    pub fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.tell(DiskOp::Write { at, bytes })?;
        self.file.write_all_at(bytes, at)
    }

    /// Makes everything written durable, and the length. Times of access and change may be lost.
    pub fn sync(&self) -> io::Result<()> {
        if faults::is_on(Bug::SkipFsync) {
            return Ok(());
        }
        self.tell(DiskOp::Sync)?;
        self.file.sync_data()
    }

    /// Has the system begin with what [`Self::sync`] will do with a range, and does not wait for it. Nothing rests on it: the sync
    /// writes what is left, and tells of what the disk refused.
    pub fn begin_sync(&self, range: Range<u64>) {
        // No length would be all of the file.
        debug_assert!(!range.is_empty());
        let (from, length) = (range.start as libc::off64_t, (range.end - range.start) as libc::off64_t);
        // SAFETY: it takes and touches no memory.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), from, length, libc::SYNC_FILE_RANGE_WRITE) };
    }

    /// Makes what is written durable, and forgets what is not: a process before may have been told by a failed sync that some is not on
    /// the disk, where the system goes on to show it. ext4 is worse: what is written where it once failed to write to blocks got ahead
    /// of time never counts, whatever later syncs say, as long as it remembers these pages. The system is asked; it may keep some.
    pub fn refresh(&self) -> io::Result<()> {
        self.sync()?;
        Ok(rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    /// Whether it was removed from `path`, where it was made: what is written to it goes when it is closed. Some file systems count no
    /// links, so its place is looked at too.
    #[must_use]
    pub fn is_removed(&self, path: &Path) -> bool {
        let is_here = |held: &Metadata| path.metadata().is_ok_and(|found| found.ino() == held.ino());
        self.file.metadata().is_ok_and(|held| held.nlink() == 0 && !is_here(&held))
    }

    /// Cuts, or grows by a hole.
    pub fn set_length(&self, bytes: u64) -> io::Result<()> {
        self.tell(DiskOp::SetLength(bytes))?;
        self.file.set_len(bytes)
    }

    /// Gets blocks for a range, so that writing there cannot run out of space. False where the file system cannot do that.
    pub fn allocate(&self, at: u64, bytes: u64) -> io::Result<bool> {
        self.tell(DiskOp::Allocate { at, bytes })?;
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), at, bytes) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The first range from `at` on, and below `end`, that is not a hole. Where holes cannot be known, all of it.
    #[must_use]
    pub fn data_from(&self, at: u64, end: u64) -> Option<Range<u64>> {
        let from = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(from) => from,
            Err(Errno::NXIO) => return None,
            Err(_) => at,
        };
        let to = rustix::fs::seek(&self.file, SeekFrom::Hole(from)).unwrap_or(end).min(end);
        (from < end).then(|| from..to.max(from))
    }
}

impl Read for File {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.tell(DiskOp::Read)?;
        self.file.read(bytes)
    }
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        #[cfg(test)]
        {
            let at = io::Seek::stream_position(&mut self.file)?;
            self.tell(DiskOp::Write { at, bytes })?;
        }
        // All of it: then what the lab was told is what was done.
        self.file.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives a file or directory another name, in place of what has that name.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    tell(DiskOp::Rename { from, to })?;
    std::fs::rename(from, to)
}

/// Removes a file.
pub fn remove_file(path: &Path) -> io::Result<()> {
    tell(DiskOp::Remove(path))?;
    std::fs::remove_file(path)
}

/// Creates a directory and what is missing above it.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    if !path.is_dir() {
        tell(DiskOp::CreateDir(path))?;
    }
    std::fs::create_dir_all(path)
}

/// Removes a directory and all in it.
pub fn remove_dir_all(path: &Path) -> io::Result<()> {
    tell(DiskOp::RemoveDir(path))?;
    std::fs::remove_dir_all(path)
}

/// An open directory, to make its names durable.
#[derive(Debug)]
pub struct Dir<'a> {
    path: &'a Path,
    file: std::fs::File,
}

impl<'a> Dir<'a> {
    /// It must exist.
    pub fn open(path: &'a Path) -> io::Result<Self> {
        tell(DiskOp::Open(path))?;
        Ok(Self { path, file: std::fs::File::open(path)? })
    }

    /// Makes its names durable: which files it holds, and under which name.
    pub fn sync(&self) -> io::Result<()> {
        if faults::is_on(Bug::SkipDirSync) {
            return Ok(());
        }
        tell(DiskOp::SyncDir(self.path))?;
        self.file.sync_all()
    }
}

/// Makes the names in a directory durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    Dir::open(path)?.sync()
}

/// What a directory holds, by name.
pub fn list(path: &Path) -> io::Result<Vec<PathBuf>> {
    tell(DiskOp::List(path))?;
    let mut paths: Vec<_> = std::fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}
