//! The one writer: a thread that owns order.
//!
//! ```text
//! drain what waits ─▶ decide each ─▶ prepare ─▶ stage ─▶ flush ─▶ sync ─▶ apply ─▶ publish ─▶ reply   keys
//!                                                                   └─▶ apply ─▶ publish ─▶ reply   vectors
//! ```
//!
//! One batch at a time; while the disk syncs, the next one gathers in the queue, so the batch grows with the load and a
//! sync is shared by all that wait. Nothing is visible before it is durable, rejections included: one may rest on what an
//! earlier command of the same batch decided.
//!
//! Invariants
//! - Revisions are handed out here alone, consecutively, and only for what is staged.
//! - After a failed write or sync nothing is written any more (`poisoned`): the kernel may have dropped the pages and
//!   would report success on a second try.
//! - A client that hangs up changes nothing: its answer goes nowhere, its commit stands.

use super::Inner;
use super::answers::RetryAnswer;
use super::codec::{Events, Record};
use super::collections::no_room;
use super::command::{Command, Committed, Key, Op};
use super::prepare::Preparer;
use super::state::{Decider, Decision, Overlay, apply_beside_readers};
use super::wal::{AppendError, Wal};
use crate::config::Fsync;
use crate::error::{Error, Rejection};
use crate::faults::{self, Bug};
use crate::revision::Revision;
use crate::turns::{self, Turn};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Target of the trace events that tell each effect in order; `tests/order.rs` reads them.
pub const EFFECTS: &str = "kiss_vdb::effects";
/// Commands one batch may gather. Bounds how long the first waits for the last to be decided.
const COMMIT_COMMANDS_MAX: usize = 4096;
/// Operations after which a batch takes no further command, for the same reason.
const COMMIT_OPS_MAX: usize = 16_384;
/// Vectors after which a batch takes no further slow command. A vector takes a hundred times as long as a key to write and apply,
/// so other writes wait for about this many at most, and slow ones share a sync all the same.
const COMMIT_VECTORS: usize = 64;
/// While other writes arrive (the last not longer ago than this), slow ones wait for the next so long, to share its batch.
/// Started alone, they would delay it by all that they take.
const FAST_RECENT: Duration = Duration::from_millis(1);
const SLOW_WAIT: Duration = Duration::from_micros(200);
/// How long slow commands that still wait at a stop go on being committed: who sent them has been given as long to hear of it before.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// Bytes after which a batch decides no further command: bounds memory and how long its first command waits.
const COMMIT_BYTES_MAX: usize = 32 << 20;
/// Keys expired in one batch; more follow in the next.
const EXPIRIES_MAX: usize = 1000;
/// Who answered so many commands at once lets their senders go first. With fewer it would, beside programs that keep all cores busy,
/// only give the core to one of these (`docs/experiments.md`).
const MANY_COMMANDS: usize = 16;
/// Housekeeping: whether the log is still there, a mark in it, the clock, a sync in `interval` mode.
const TICK: Duration = Duration::from_secs(1);
/// How often a full disk is asked again whether it has room.
const FULL_RETRY: Duration = Duration::from_millis(500);
/// A clock that is behind the log by more is worth a word.
const AHEAD_MS_MAX: u64 = 1000;

/// What the engine asks of its writer.
#[derive(Debug)]
pub enum Request {
    /// Decide and commit; how slow it is ([`super::Engine`]'s guess).
    Commit(Waiting, usize),
    /// Commit what came before, write everything to disk, end.
    Stop,
}

/// A command and where its answer goes.
pub type Waiting = (Command, oneshot::Sender<Result<Committed, Rejection>>);
type Reply = (oneshot::Sender<Result<Committed, Rejection>>, Result<Committed, Rejection>);

/// What was decided for a batch, or for a part of it: what is staged, and what will be answered.
#[derive(Default)]
struct Decided {
    records: Vec<Arc<Record>>,
    answers: Vec<Reply>,
}

impl Decided {
    /// Stages the record of what a command did.
    fn stage(&mut self, wal: &mut Wal, mut record: Record) -> Arc<Record> {
        while faults::is_on(Bug::SplitBatch) && record.events.len() > 1 {
            let first = Record { events: Events::from_iter([record.events.remove(0)]), answer: None, ..record };
            record.first_revision = record.first_revision.next();
            self.push(wal, first);
        }
        self.push(wal, record)
    }

    fn push(&mut self, wal: &mut Wal, record: Record) -> Arc<Record> {
        let record = Arc::new(record);
        wal.stage(&record);
        self.records.push(Arc::clone(&record));
        record
    }

    /// Removes keys whose deadline has passed, in a record of their own.
    fn expire(&mut self, staging: &mut Staging<'_>, decider: &mut Decider<'_>, due: Vec<Key>) {
        let first_revision = decider.next;
        let events = decider.decide_expiry(due);
        if !events.is_empty() {
            self.stage(staging.wal, Record { first_revision, ts_ms: staging.ts_ms, events, answer: None });
        }
    }

    /// Decides a command and stages the record of what it does.
    fn decide(
        &mut self,
        staging: &mut Staging<'_>,
        decider: &mut Decider<'_>,
        mut command: Command,
    ) -> Result<Committed, Rejection> {
        let retry = command.retry.take();
        let first_revision = decider.next;
        let Decision { events, outcomes } = decider.decide(command)?;
        if events.is_empty() {
            let unchanged = first_revision.prev();
            return Ok(Committed { outcomes, first_revision: unchanged, last_revision: unchanged });
        }
        if let Err(error) = staging.preparer.prepare(decider.state, first_revision, &events) {
            decider.take_back(first_revision);
            if error.is_storage_full() {
                staging.rows_full.store(true, Ordering::Relaxed);
            }
            return Err(no_room(&error));
        }
        let last_revision = first_revision.plus(events.len() as u64 - 1);
        let answer = retry.map(|retry| Box::new(RetryAnswer { retry: *retry, outcomes: outcomes.clone() }));
        let record = self.stage(staging.wal, Record { first_revision, ts_ms: staging.ts_ms, events, answer });
        decider.remember(&record);
        Ok(Committed { outcomes, first_revision, last_revision })
    }
}

/// Where what is decided goes.
struct Staging<'a> {
    wal: &'a mut Wal,
    preparer: &'a mut Preparer,
    rows_full: &'a AtomicBool,
    /// The batch's time.
    ts_ms: u64,
}

fn answer_all(answers: Vec<Reply>) {
    for (reply, answer) in answers {
        tracing::trace!(target: EFFECTS, committed = answer.is_ok(), "reply");
        // A client that has hung up gets no answer; its commit stands.
        reply.send(answer).ok();
    }
}

/// See the module.
#[derive(Debug)]
pub struct Sequencer {
    inner: Arc<Inner>,
    wal: Wal,
    preparer: Preparer,
    queue: Receiver<Request>,
    /// Slow commands (about vectors, or patches of large values) in the order they came, and how slow: each batch takes a few,
    /// behind everything else. At most [`super::QUEUE_COMMANDS_MAX`]; more are refused, so that other writes never wait behind them.
    slow: VecDeque<(Waiting, usize)>,
    fsync: Fsync,
    /// When other writes were last committed.
    last_fast: Instant,
    last_tick: Instant,
    unsynced: bool,
    full_since_check: Option<Instant>,
    /// Whether the last batch found no file left to open for the log.
    is_out_of_files: bool,
    last_ts_ms: u64,
}

impl Sequencer {
    /// Ready to run on its thread.
    #[must_use]
    pub fn new(inner: Arc<Inner>, wal: Wal, preparer: Preparer, queue: Receiver<Request>, fsync: Fsync) -> Self {
        let last_ts_ms = wal.newest_ts_ms();
        let ahead_ms = last_ts_ms.saturating_sub(inner.clock.now_ms());
        if ahead_ms > AHEAD_MS_MAX {
            tracing::warn!(
                ahead_ms,
                "the clock is behind the log's last record, whose time events have until it has caught up"
            );
        }
        Self {
            inner,
            wal,
            preparer,
            queue,
            slow: VecDeque::new(),
            fsync,
            last_fast: Instant::now(),
            last_tick: Instant::now(),
            unsynced: false,
            full_since_check: None,
            is_out_of_files: false,
            last_ts_ms,
        }
    }

    /// Runs until told to stop, or until every handle to the engine is gone.
    pub fn run(mut self) {
        loop {
            turns::look_at_requests(Turn::Fair);
            let first = match self.queue.recv_timeout(self.patience()) {
                Ok(request) => Some(request),
                Err(RecvTimeoutError::Disconnected) if self.slow.is_empty() => break,
                Err(_) => None,
            };
            let has_come = first.is_some();
            let (commands, stop) = self.gather(first);
            if commands.is_empty() && has_come && !stop && self.last_fast.elapsed() < FAST_RECENT {
                continue;
            }
            let are_many = commands.len() >= MANY_COMMANDS;
            self.commit(commands);
            if are_many {
                // Those just answered are about to ask again: let them, so that the next batch is larger. Measured at 64
                // connections on two cores: a seventh more writes a second, and half the p99.
                std::thread::yield_now();
            }
            self.tick();
            if stop {
                let deadline = Instant::now() + STOP_PATIENCE;
                while !self.slow.is_empty() && Instant::now() < deadline {
                    self.commit(Vec::new());
                }
                break;
            }
        }
        if !self.is_poisoned()
            && let Err(AppendError::Failed(error) | AppendError::Full(error)) = self.wal.release()
        {
            tracing::error!(%error, "the log could not be closed in order");
            // No snapshot either: its sync of the log would be a second one, and report success for what the first one lost.
            self.inner.poison.set();
        }
        if !self.is_poisoned() {
            self.wal.publish();
        }
        // What still waits is told, rather than left hanging.
        let queued = self.queue.try_iter().filter_map(|request| match request {
            Request::Commit(waiting, _) => Some(waiting),
            Request::Stop => None,
        });
        for (_, reply) in self.slow.into_iter().map(|(waiting, _)| waiting).chain(queued) {
            reply.send(Err(Rejection::ShuttingDown)).ok();
        }
    }

    fn is_poisoned(&self) -> bool {
        self.inner.poison.is_set()
    }

    /// How long to wait for a command: until the next deadline or tick, or for company for slow writes.
    fn patience(&self) -> Duration {
        if !self.slow.is_empty() {
            return if self.last_fast.elapsed() < FAST_RECENT { SLOW_WAIT } else { Duration::ZERO };
        }
        let tick = TICK.saturating_sub(self.last_tick.elapsed());
        let Some(deadline) = self.inner.state.read().next_deadline() else { return tick };
        if self.is_poisoned() || self.full_since_check.is_some() || self.is_out_of_files {
            return tick.min(FULL_RETRY);
        }
        let now = self.inner.clock.now_ms();
        tick.min(Duration::from_millis(deadline.saturating_sub(now))).max(Duration::from_millis(1))
    }

    fn gather(&mut self, first: Option<Request>) -> (Vec<Waiting>, bool) {
        let mut commands = Vec::new();
        let mut ops = 0;
        let mut next = first;
        while let Some(request) = next {
            match request {
                Request::Stop => return (commands, true),
                Request::Commit(waiting, 0) => {
                    ops += waiting.0.ops.len();
                    commands.push(waiting);
                }
                Request::Commit(waiting, slowness) if self.slow.len() < super::QUEUE_COMMANDS_MAX => {
                    self.slow.push_back((waiting, slowness));
                }
                Request::Commit((_, reply), _) => {
                    let detail = "too many slow writes are waiting; retry in a moment";
                    reply.send(Err(Rejection::Overloaded(detail))).ok();
                }
            }
            if commands.len() >= COMMIT_COMMANDS_MAX || ops >= COMMIT_OPS_MAX {
                break;
            }
            next = self.queue.try_recv().ok();
        }
        (commands, false)
    }

    /// Commits in one batch, or in several where the commands would write very much. Slow ones go last: what is ahead of
    /// them is answered at the same time, but what comes next does not wait for all of them.
    fn commit(&mut self, commands: Vec<Waiting>) {
        let mut commands = VecDeque::from(commands);
        if !commands.is_empty() {
            self.last_fast = Instant::now();
        }
        let mut has_fast = !commands.is_empty();
        let mut slowness = 0;
        while slowness < COMMIT_VECTORS
            && let Some((waiting, more)) = self.slow.pop_front()
        {
            if has_fast && !waiting.0.ops.iter().any(Op::is_about_vectors) {
                // Patches may take the writer most of a second to decide: too long for what one more sync takes.
                self.commit_all(&mut commands);
                has_fast = false;
            }
            slowness += more;
            commands.push_back(waiting);
        }
        self.commit_all(&mut commands);
    }

    fn commit_all(&mut self, commands: &mut VecDeque<Waiting>) {
        self.commit_batch(commands);
        while !commands.is_empty() {
            self.commit_batch(commands);
        }
    }

    fn commit_batch(&mut self, commands: &mut VecDeque<Waiting>) {
        if self.is_poisoned() {
            commands.drain(..).for_each(|(_, reply)| drop(reply.send(Err(Rejection::Poisoned))));
            return;
        }
        let head = self.wal.head();
        let now_ms = self.inner.clock.now_ms();
        self.last_ts_ms = self.last_ts_ms.max(now_ms);
        let ready = self.is_full().and_then(|is_full| self.reserve(head).map(|()| is_full));
        let is_full = match ready {
            Ok(is_full) => is_full,
            Err(error) => {
                let answers = commands.drain(..).map(|(_, reply)| (reply, Err(Rejection::Poisoned))).collect();
                self.refuse(error, head, answers);
                return;
            }
        };
        let parts = self.decide(commands, head, now_ms, is_full);
        if faults::is_on(Bug::PublishBeforeDurable) {
            parts.iter().for_each(|part| self.make_visible(&part.records));
        }
        match self.write(&parts) {
            Ok(()) => parts.into_iter().for_each(|part| self.finish(part)),
            Err(error) => self.refuse(error, head, parts.into_iter().flat_map(|part| part.answers).collect()),
        }
        if faults::is_on(Bug::AnswerBeforeSync) {
            self.wal.sync().ok();
        }
    }

    /// What is durable becomes visible, and is then answered.
    fn finish(&mut self, Decided { records, answers }: Decided) {
        if faults::is_on(Bug::StaleRead) && !records.is_empty() {
            answer_all(answers);
            std::thread::sleep(Duration::from_millis(5));
            self.make_visible(&records);
            return;
        }
        if !faults::is_on(Bug::PublishBeforeDurable) {
            self.make_visible(&records);
        }
        answer_all(answers);
    }

    /// In the relaxed modes, revisions are reserved on disk before they are handed out. Without room for that none are.
    fn reserve(&mut self, head: Revision) -> Result<(), AppendError> {
        if self.fsync == Fsync::Always {
            return Ok(());
        }
        // An upper bound of what one batch can hand out.
        self.wal.reserve(head.plus(super::wal::RESERVED_REVISIONS / 2))
    }

    fn is_full(&mut self) -> Result<bool, AppendError> {
        // While full, ask again now and then; while not, asking costs a comparison.
        let is_making_room = || self.inner.is_making_room.load(Ordering::Acquire);
        if self.full_since_check.is_some_and(|since| since.elapsed() < FULL_RETRY || is_making_room()) {
            return Ok(true);
        }
        let is_full = self.wal.is_full().map_err(AppendError::Failed)?;
        if is_full {
            self.note_full(None);
        } else if self.full_since_check.take().is_some() {
            self.inner.storage_full.store(false, Ordering::Relaxed);
            tracing::info!("there is disk space again: writes go on");
        }
        Ok(is_full)
    }

    fn note_full(&mut self, error: Option<&Error>) {
        if self.full_since_check.is_none() {
            let error = error.map(tracing::field::display);
            tracing::error!(error, "the disk is full: writes that need space are refused until there is some");
        }
        self.full_since_check = Some(Instant::now());
        self.inner.storage_full.store(true, Ordering::Relaxed);
    }

    /// Decides commands one after the other. Vector writes come last and are a part of their own: they take long to apply,
    /// and what is before them need not wait for it.
    fn decide(&mut self, commands: &mut VecDeque<Waiting>, head: Revision, now_ms: u64, is_full: bool) -> [Decided; 2] {
        // Even the reserve for deletes: a segment made for them would take what the snapshot needs.
        let is_making_room = self.inner.is_making_room.load(Ordering::Acquire);
        let mut parts = [Decided::default(), Decided::default()];
        let mut overlay = Overlay::with_capacity(commands.len());
        let state = self.inner.state.read();
        // Summed up once: that walks over all collections.
        let memory_left = (self.inner.memory_bytes_max > 0).then(|| {
            let (keys, vectors) = state.memory_bytes();
            self.inner.memory_bytes_max.saturating_sub(keys + vectors)
        });
        let mut decider = Decider {
            state: &state,
            overlay: &mut overlay,
            now_ms,
            memory_left,
            collections_max: self.inner.collections_max,
            record_bytes_max: self.inner.record_bytes_max,
            rewritten: 0,
            next: head.next(),
            bytes: 0,
        };
        let mut staging = Staging {
            wal: &mut self.wal,
            preparer: &mut self.preparer,
            rows_full: &self.inner.rows_full,
            ts_ms: self.last_ts_ms,
        };
        // On a full disk the reserve is for deletes; expired keys are gone for readers anyway, their events wait.
        let due = if is_full { Vec::new() } else { state.due(now_ms, EXPIRIES_MAX) };
        let are_more_due = due.len() == EXPIRIES_MAX;
        parts[0].expire(&mut staging, &mut decider, due);
        let mut at = 0;
        while let Some((command, reply)) = commands.pop_front() {
            if at == 0 && command.ops.iter().any(Op::is_about_vectors) {
                at = 1;
            }
            let part = &mut parts[at];
            let answer = if let Some(known) = command.retry.as_ref().and_then(|retry| decider.remembered(retry)) {
                known
            } else if is_full && (is_making_room || !command.ops.iter().all(Op::frees_space)) {
                let detail = "the disk is full; free space on it, and writes resume by themselves";
                Err(Rejection::StorageFull(detail.into()))
            } else {
                if are_more_due {
                    let due = decider.due_in(&command);
                    part.expire(&mut staging, &mut decider, due);
                }
                part.decide(&mut staging, &mut decider, command)
            };
            part.answers.push((reply, answer));
            if decider.bytes >= COMMIT_BYTES_MAX {
                break;
            }
        }
        parts
    }

    fn write(&mut self, parts: &[Decided]) -> Result<(), AppendError> {
        let records = parts.iter().map(|part| part.records.len()).sum::<usize>();
        if records == 0 {
            return Ok(());
        }
        let started = Instant::now();
        self.wal.flush()?;
        tracing::trace!(target: EFFECTS, records, "append");
        let is_synced = self.fsync == Fsync::Always && !faults::is_on(Bug::AnswerBeforeSync);
        if is_synced {
            self.wal.begin_sync();
        }
        // What no client waits for is done here: in `always` mode, while the disk works.
        self.inner.feed.make_room();
        if is_synced {
            self.wal.sync()?;
            tracing::trace!(target: EFFECTS, "sync");
            self.inner.metrics.fsync_seconds.observe(started.elapsed().as_secs_f64());
        } else {
            self.unsynced = true;
        }
        self.is_out_of_files = false;
        self.wal.publish();
        self.inner.metrics.batch_records.observe(records as f64);
        Ok(())
    }

    fn make_visible(&mut self, records: &[Arc<Record>]) {
        if records.is_empty() {
            return;
        }
        {
            let mut state = self.inner.state.write();
            self.preparer.hand_over(&mut state);
            for record in records {
                state = apply_beside_readers(&self.inner.state, state, record);
                let (first, last) = (record.first_revision.0, record.last_revision().0);
                tracing::trace!(target: EFFECTS, first, last, "apply");
            }
        }
        self.inner.feed.publish(records);
        tracing::trace!(target: EFFECTS, records = records.len(), "publish");
    }

    fn refuse(&mut self, error: AppendError, head: Revision, answers: Vec<Reply>) {
        self.wal.unstage(head);
        self.preparer.give_up();
        let rejection = match error {
            // Nothing is full, and the next batch tries again.
            AppendError::Full(error) if error.is_out_of_files() => {
                if !std::mem::replace(&mut self.is_out_of_files, true) {
                    tracing::warn!(%error, "no file left to open for the log: writes are refused until there is one");
                }
                Rejection::OUT_OF_FILES
            }
            AppendError::Full(error) => {
                self.note_full(Some(&error));
                Rejection::StorageFull("the disk is full; free space and try again".into())
            }
            AppendError::Failed(error) => {
                self.inner.poison(&error);
                Rejection::Poisoned
            }
        };
        // A client that has hung up gets no answer.
        answers.into_iter().for_each(|(reply, _)| drop(reply.send(Err(rejection.clone()))));
    }

    /// Once a second: see that the log is still there, sync in `interval` mode, mark how far the log is durable, lean the clock.
    fn tick(&mut self) {
        if self.is_poisoned() || self.inner.is_making_room.load(Ordering::Relaxed) {
            self.last_tick = Instant::now();
            return;
        }
        if self.last_tick.elapsed() < TICK {
            return;
        }
        self.last_tick = Instant::now();
        if let Err(error) = self.wal.check_place() {
            self.inner.poison(&error);
            return;
        }
        self.inner.clock.lean();
        if self.unsynced && self.fsync == Fsync::Interval {
            self.unsynced = false;
            if let Err(AppendError::Failed(error) | AppendError::Full(error)) = self.wal.sync() {
                self.inner.poison(&error);
                return;
            }
            self.inner.background.durable.fetch_max(self.wal.head().0, Ordering::AcqRel);
        }
        match self.wal.mark() {
            // A mark is a courtesy to the next recovery; without room it waits.
            Ok(()) | Err(AppendError::Full(_)) => {}
            Err(AppendError::Failed(error)) => self.inner.poison(&error),
        }
    }
}
