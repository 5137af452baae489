//! Two kinds of failure: a [`Rejection`] the client can mend, and an [`Error`] the operator acts on.
//!
//! The third kind, a bug, is an `assert!`. Nothing here knows HTTP: status codes stand in `api/error.rs` alone.

use crate::revision::Revision;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Why a request was refused. Nothing of it is visible; only after [`Rejection::Poisoned`] may it turn up after a restart.
///
/// The text says what the client can do; `api/error.rs` gives each its stable code.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Rejection {
    /// Malformed input: the text names the field and what it takes.
    #[error("{0}")]
    InvalidArgument(String),
    /// A vector of another length than its collection's `dim`.
    #[error("the vector has {got} numbers, the collection takes {expected}")]
    DimensionMismatch {
        /// The collection's `dim`.
        expected: usize,
        /// What was sent.
        got: usize,
    },
    /// A vector that no metric can score.
    #[error("{0}")]
    InvalidVector(String),
    /// The key does not exist.
    #[error("there is no key {0:?}")]
    KeyNotFound(String),
    /// The collection does not exist.
    #[error("there is no collection {0:?}; create it with POST /v1/vector/{0} {{\"dim\":…,\"metric\":…}}")]
    CollectionNotFound(String),
    /// The vector id does not exist in the collection.
    #[error("there is no vector {0:?} in the collection")]
    VectorNotFound(String),
    /// `if_revision` named another revision than the current one.
    #[error("expected revision {expected}, the current one is {actual} (0 = absent); read again and retry")]
    RevisionConflict {
        /// What the client sent.
        expected: Revision,
        /// What is there; zero when absent.
        actual: Revision,
    },
    /// The same, where what was found is an earlier operation's of the same request: its revision will never be.
    #[error(
        "expected revision {expected}, but an earlier operation of this request changes it; before, it is {before} (0 = absent)"
    )]
    ConflictWithin {
        /// What the client sent.
        expected: Revision,
        /// What was there before the request; zero when absent.
        before: Revision,
    },
    /// `add` of an existing id, or a collection that exists with another shape.
    #[error("{0}")]
    AlreadyExists(String),
    /// `If-Match` or `If-None-Match` did not hold.
    #[error("If-Match or If-None-Match does not hold for the current revision {actual} (0 = absent)")]
    PreconditionFailed {
        /// What is there; zero when absent.
        actual: Revision,
    },
    /// History older than the log holds.
    #[error("the log reaches back to revision {oldest} only; start after the one before it, {}, or from a snapshot", oldest.prev())]
    RevisionCompacted {
        /// Oldest readable revision.
        oldest: Revision,
        /// Newest durable revision.
        head: Revision,
    },
    /// History after a revision that was given up.
    #[error(
        "what had this revision was lost in a crash, or came after the backup that this server was restored from; look at the \
         state anew and start after the head, {head}"
    )]
    RevisionLost {
        /// Oldest readable revision.
        oldest: Revision,
        /// Newest durable revision.
        head: Revision,
    },
    /// A key for retries that another request has used.
    #[error(
        "this Idempotency-Key was used by another request (at revision {first_revision}); a new request needs a new key"
    )]
    RetryMismatch {
        /// What the other request wrote first.
        first_revision: Revision,
    },
    /// The caller's key has no right to it.
    #[error("{0}")]
    Forbidden(String),
    /// The input is larger than a limit.
    #[error("{what} is larger than {limit_bytes} bytes")]
    PayloadTooLarge {
        /// What was too large.
        what: &'static str,
        /// The limit.
        limit_bytes: usize,
    },
    /// Disk or memory budget reached. Reads, deletes and streams still work.
    #[error("{0}")]
    StorageFull(String),
    /// Too much is waiting; the client should come back.
    #[error("{0}")]
    Overloaded(&'static str),
    /// The server is stopping.
    #[error("the server is shutting down; retry against its successor")]
    ShuttingDown,
    /// A write or fsync failed; the server reads on but takes no more writes.
    #[error(
        "a write to disk failed, so this server takes no more writes until it is restarted; reads still work. What was being \
         written when it failed may be there after the restart"
    )]
    Poisoned,
    /// An operation of a batch was refused, and with it the batch.
    #[error("operation {index}: {rejection}")]
    InBatch {
        /// Which operation, from 0.
        index: usize,
        /// Why.
        rejection: Box<Rejection>,
    },
}

impl Rejection {
    /// There is none for the log or a collection; nothing is full, and others may be closed.
    pub const OUT_OF_FILES: Self = Self::Overloaded("the server has no file left to open; retry in a moment");

    /// Shorthand for the commonest rejection.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::InvalidArgument(detail.into())
    }

    /// Names the operation of a batch this rejection belongs to.
    #[must_use]
    pub fn at(self, index: usize) -> Self {
        Self::InBatch { index, rejection: Box::new(self) }
    }
}

/// A failure the operator acts on: free space, restore, fix the configuration, restart.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something.
    #[error("{what} {}: {cause}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's word. Not `source`, because the text says it already.
        cause: std::io::Error,
    },
    /// A file holds something it must not. It is left untouched.
    #[error("{} is damaged at offset {offset}: {detail}. No file was changed; restore this file from a copy, or move the data directory aside to start empty", path.display())]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// Bytes from its start.
        offset: u64,
        /// What is wrong there.
        detail: String,
    },
    /// The directory is somebody else's.
    #[error("{} is not a data directory of KISS VDB: {} is nothing that it writes. Nothing was changed; choose another directory (DATA_DIR), or move that away if it is there by mistake", dir.display(), found.display())]
    Foreign {
        /// What was to be the data directory.
        dir: PathBuf,
        /// What shows that it is not.
        found: PathBuf,
    },
    /// The data directory is not ours to write.
    #[error("{what} {}: {cause}. The data directory (DATA_DIR) must be one that the user who runs the server may write, on a disk that may be written to: change its owner, mount the disk anew, or choose another", path.display())]
    NotWritable {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's word.
        cause: std::io::Error,
    },
    /// Another server owns the data directory.
    #[error("the data directory {} is in use by another server or a restore (it is locked); stop that one or choose another DATA_DIR", .0.display())]
    Locked(PathBuf),
    /// A restore was cut short.
    #[error("the data directory {} holds a part of a backup, of which a restore was cut short (its RESTORING file is there); empty it and restore again", .0.display())]
    HalfRestored(PathBuf),
    /// A write or sync failed earlier, so nothing more is written.
    #[error("an earlier write to disk failed; nothing more is written until this server is restarted")]
    Poisoned,
    /// A setting is wrong.
    #[error("{0}")]
    Config(String),
}

impl Error {
    /// Wraps an I/O error with what was attempted and where; for `map_err`.
    pub fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |cause| Self::Io { what, path, cause }
    }

    /// Whether more space, or a higher limit of it, would help.
    #[must_use]
    pub fn is_storage_full(&self) -> bool {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        matches!(self, Self::Io { cause, .. } if matches!(cause.kind(), FileTooLarge | QuotaExceeded | StorageFull))
    }

    /// As [`Error::io`], for what needs a data directory that this user may write.
    pub fn opening(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |cause| match cause.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Self::NotWritable { what, path, cause },
            _ => Self::Io { what, path, cause },
        }
    }

    /// Whether the process has as many files open as it may: that passes.
    #[must_use]
    pub fn is_out_of_files(&self) -> bool {
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        matches!(self, Self::Io { cause, .. } if matches!(cause.raw_os_error(), Some(ENFILE | EMFILE)))
    }

    /// A damaged file.
    pub fn corrupt(path: &Path, offset: u64, detail: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), offset, detail: detail.into() }
    }
}
