//! Seeded bugs: the program made wrong on purpose, so that each test of the lab can show that it would notice.
//!
//! One list. A bug is chosen by name at run time, and only where the lab is compiled in: in unit tests for one thread and
//! those it starts, with the Cargo feature `lab` by the environment variable `KISS_LAB_BUG` for the whole program. Without,
//! [`is_on`] is a constant and the compiler removes what it guards.
//!
//! `docs/reliability.md` names for each the test that catches it.

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Nothing is ever synced.
    SkipFsync,
    /// Directories are never synced: names of files are lost.
    SkipDirSync,
    /// A write is answered before the sync of its batch.
    AnswerBeforeSync,
    /// A record is applied and streamed before it is written.
    PublishBeforeDurable,
    /// A failed sync of the log is taken for a good one.
    IgnoreFailedSync,
    /// What a failed sync left in the page cache is taken for durable by the next process.
    TrustCache,
    /// The relaxed modes hand revisions out without a reservation on disk.
    ReuseRevision,
    /// Replay leaves out the first record behind the snapshot.
    ShortReplay,
    /// Each operation of a batch becomes a record of its own.
    SplitBatch,
    /// Frames behind a torn one stay where they are.
    KeepTornTail,
    /// Old segments go whether a snapshot covers them or not.
    DropUncovered,
    /// A checkpoint does not wait for the rows it names.
    SkipRowsSync,
    /// Frames of the log are taken without looking at their checksum.
    SkipChecksum,
    /// A write is answered before it can be read.
    StaleRead,
    /// The second of two commands in a batch does not see the first: both win a compare-and-set.
    LoseCas,
    /// A stream resumes one event too late.
    ResumeOffByOne,
}

impl Bug {
    /// All, with the names they are chosen by.
    pub const ALL: [(Self, &str); 16] = [
        (Self::SkipFsync, "skip_fsync"),
        (Self::SkipDirSync, "skip_dir_sync"),
        (Self::AnswerBeforeSync, "answer_before_sync"),
        (Self::PublishBeforeDurable, "publish_before_durable"),
        (Self::IgnoreFailedSync, "ignore_failed_sync"),
        (Self::TrustCache, "trust_cache"),
        (Self::ReuseRevision, "reuse_revision"),
        (Self::ShortReplay, "short_replay"),
        (Self::SplitBatch, "split_batch"),
        (Self::KeepTornTail, "keep_torn_tail"),
        (Self::DropUncovered, "drop_uncovered"),
        (Self::SkipRowsSync, "skip_rows_sync"),
        (Self::SkipChecksum, "skip_checksum"),
        (Self::StaleRead, "stale_read"),
        (Self::LoseCas, "lose_cas"),
        (Self::ResumeOffByOne, "resume_off_by_one"),
    ];

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known)| *known == name).map(|(bug, _)| bug)
    }
}

/// Whether the program has this bug now.
#[cfg(not(any(test, feature = "lab")))]
#[inline]
#[must_use]
pub const fn is_on(_: Bug) -> bool {
    false
}

/// Whether the program has this bug now.
#[cfg(any(test, feature = "lab"))]
#[must_use]
pub fn is_on(bug: Bug) -> bool {
    #[cfg(test)]
    if let Some(chosen) = crate::lab::chosen_bug() {
        return chosen == bug;
    }
    static CHOSEN: std::sync::OnceLock<Option<Bug>> = std::sync::OnceLock::new();
    let by_environment = || {
        let name = std::env::var("KISS_LAB_BUG").ok()?;
        Some(Bug::named(&name).unwrap_or_else(|| panic!("KISS_LAB_BUG={name}: there is no such bug")))
    };
    *CHOSEN.get_or_init(by_environment) == Some(bug)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bug_is_named_where_it_is_said_who_catches_it() {
        let page = include_str!("../docs/reliability.md");
        for (bug, name) in Bug::ALL {
            assert!(page.contains(&format!("`{name}`")), "{bug:?}: docs/reliability.md does not name {name}");
            assert_eq!(Bug::named(name), Some(bug));
        }
    }
}
