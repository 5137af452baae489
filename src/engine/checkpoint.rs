//! Checkpoints of one collection: what changed since the last, into its slot log and rows.

use super::collections::SharedCollection;
use crate::error::Error;
use crate::faults::{self, Bug};
use crate::revision::Revision;
use crate::vector::VectorId;
use crate::vector::collection::{Changes, Item};
use crate::vector::storage::{SlotLog, encode_frame};
use std::sync::atomic::Ordering;

/// Bytes of a checkpoint that are held before they are appended: a bulk load may have changed everything since the last.
const FRAMES_BYTES: usize = if cfg!(test) { 4 << 10 } else { 16 << 20 };

impl SharedCollection {
    /// Writes what changed since the last checkpoint to the collection's files. `head` tells the newest revision applied;
    /// `sync_log` makes all that was applied durable in the log, so that the files never show what the log could lose.
    /// Returns whether anything was written. Blocking; the collection's lock is held for slices only.
    pub fn checkpoint(
        &self,
        head: impl FnOnce() -> Revision,
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let is_written = self.checkpoint_slots(head, sync_log)?;
        // After the slots: a graph file that is ahead of them only names vectors that the next start may not know.
        self.save_graph();
        Ok(is_written)
    }

    fn checkpoint_slots(
        &self,
        head: impl FnOnce() -> Revision,
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let mut log = self.log.lock();
        let Some(log) = log.as_mut() else { return Ok(false) };
        if self.rows_failed.load(Ordering::Acquire) {
            return Err(Error::Poisoned);
        }
        log.make_sure()?;
        // The head is read first: what is applied in between is then in both, the files and the replay.
        let revision = head();
        let changes = {
            let mut inner = self.inner.write();
            let changes = inner.take_changes();
            if changes.is_empty() {
                // What changes from here on, a snapshot needs from here on, and not from the last checkpoint: the log may have
                // been shortened since.
                inner.set_complete(revision);
                return Ok(false);
            }
            changes
        };
        let result = self.write_checkpoint(log, revision, &changes, sync_log);
        let mut inner = self.inner.write();
        match result {
            Ok(()) => inner.set_checkpoint(revision),
            Err(_) => inner.restore_changes(changes),
        }
        result.map(|()| true)
    }

    fn write_checkpoint(
        &self,
        log: &mut SlotLog,
        revision: Revision,
        changes: &Changes,
        sync_log: impl Fn() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (previous, newest, rewrite, rows) = {
            let inner = self.inner.read();
            (
                inner.checkpoint(),
                inner.revision(),
                log.is_old() || inner.wants_rewrite(log.bytes()),
                inner.sync_handle()?,
            )
        };
        let sync_rows = || match (&rows, &self.dir) {
            (Some(rows), Some(dir)) if !faults::is_on(Bug::SkipRowsSync) => rows.sync().map_err(|e| {
                // The kernel may have dropped the pages: never sync them again. The log keeps everything since the last
                // checkpoint, and a restart replays it.
                self.rows_failed.store(true, Ordering::Release);
                Error::io("cannot sync the rows in", dir)(e)
            }),
            _ => Ok(()),
        };
        if rewrite {
            let ids_at_a_time = self.ids_at_a_time();
            let mut successor = log.rewrite(self.spec, self.created)?;
            let mut after: Option<VectorId> = None;
            loop {
                let entries = {
                    let inner = self.inner.read();
                    let page = inner.list(after.as_ref().map(VectorId::as_str), ids_at_a_time, false);
                    let page: Vec<Item> = page.map(|(_, item)| item).collect();
                    let ids: Vec<VectorId> = page.into_iter().map(|item| item.id).collect();
                    after = ids.last().cloned();
                    inner.entries_of(&ids)
                };
                let is_last = entries.len() < ids_at_a_time;
                successor.write(&encode_frame(if is_last { revision } else { previous }, newest, &entries))?;
                if is_last {
                    break;
                }
            }
            sync_log()?;
            sync_rows()?;
            return log.replace(successor);
        }
        let before = log.bytes();
        self.append_checkpoint(log, revision, changes, (previous, newest), || sync_log().and_then(|()| sync_rows()))
            // Its beginning would be written again by the next.
            .inspect_err(|_| log.cut(before))
    }

    /// Appends what has changed. `sync` is called before each piece: a frame names no row that is not on disk.
    fn append_checkpoint(
        &self,
        log: &mut SlotLog,
        revision: Revision,
        changes: &Changes,
        (previous, newest): (Revision, Revision),
        sync: impl Fn() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let slots: Vec<u32> = changes.slots.iter().collect();
        let ids_at_a_time = self.ids_at_a_time();
        let gone: Vec<VectorId> = changes.gone.iter().cloned().collect();
        let written = slots.chunks(ids_at_a_time).map(|slots| self.inner.read().entries_in(slots));
        let deleted = gone.chunks(ids_at_a_time).map(|ids| self.inner.read().entries_of(ids));
        let mut pages = written.chain(deleted).peekable();
        let mut frames = Vec::new();
        while let Some(entries) = pages.next() {
            let is_last = pages.peek().is_none();
            frames.extend_from_slice(&encode_frame(if is_last { revision } else { previous }, newest, &entries));
            if is_last || frames.len() >= FRAMES_BYTES {
                sync()?;
                log.append(&frames)?;
                frames.clear();
            }
        }
        Ok(())
    }
}
