//! Answers remembered for retries: a client that lost one asks again under the same `Idempotency-Key` and gets the same.
//!
//! A command with a key carries its answer in its record, so that what was done and what was said about it are durable
//! together: after a crash either both are there or neither. Refusals are not remembered. They changed nothing, so asking
//! again is asking anew.
//!
//! Pure: time comes with the records.

use super::codec::Record;
use super::command::{Committed, Outcome, Outcomes};
use crate::error::Rejection;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

/// How long an answer is remembered.
pub const WINDOW_MS: u64 = 3_600_000;
/// Memory that answers may take; beyond it the oldest of whoever has most go early.
pub const BYTES_MAX: usize = 64 << 20;
/// About what an answer takes beside its texts.
const OVERHEAD_BYTES: usize = 200;

/// What makes a request the same as an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The client's key, behind the name of who sent it.
    pub key: Box<str>,
    /// A hash of the request: another one under the same key is a mistake.
    pub fingerprint: [u8; 16],
}

impl Retry {
    /// Who sent it: what stands before the line feed.
    fn sender(&self) -> &str {
        self.key.split('\n').next().unwrap_or_default()
    }
}

/// What was said to a command.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryAnswer {
    /// The command's key and hash.
    pub retry: Retry,
    /// One for each operation.
    pub outcomes: Outcomes,
}

/// An answer with its place in history.
#[derive(Debug)]
pub struct Remembered {
    /// Unix milliseconds.
    pub ts_ms: u64,
    /// What the command did.
    pub committed: Committed,
    /// Its key and hash.
    pub retry: Retry,
}

impl Remembered {
    /// Of a record that carries its answer.
    #[must_use]
    pub fn of(record: &Record) -> Option<Arc<Self>> {
        let answer = record.answer.as_ref()?;
        Some(Arc::new(Self {
            ts_ms: record.ts_ms,
            committed: Committed {
                outcomes: answer.outcomes.clone(),
                first_revision: record.first_revision,
                last_revision: record.last_revision(),
            },
            retry: answer.retry.clone(),
        }))
    }

    /// The same answer for the same request, a refusal for another.
    pub fn to(&self, retry: &Retry) -> Result<Committed, Rejection> {
        if self.retry.fingerprint == retry.fingerprint {
            Ok(self.committed.clone())
        } else {
            Err(Rejection::RetryMismatch { first_revision: self.committed.first_revision })
        }
    }

    /// Whether it is said again at this time.
    #[must_use]
    pub fn is_recent(&self, now_ms: u64) -> bool {
        self.ts_ms.saturating_add(WINDOW_MS) > now_ms
    }

    fn bytes(&self) -> usize {
        let outcomes: usize = self.committed.outcomes.iter().map(Outcome::memory_bytes).sum();
        OVERHEAD_BYTES + 2 * self.retry.key.len() + outcomes
    }
}

/// The answers of the last [`WINDOW_MS`], and older ones of senders who have written nothing since.
#[derive(Debug, Default)]
pub struct Answers {
    by_key: HashMap<Box<str>, Arc<Remembered>>,
    /// By sender, so that one with many or large answers makes none of another's go.
    by_sender: BTreeMap<Box<str>, Share>,
    bytes: usize,
}

/// What one sender was told, oldest first.
#[derive(Debug, Default)]
struct Share {
    answers: VecDeque<Arc<Remembered>>,
    bytes: usize,
}

impl Answers {
    /// What was said under this key, if it is not too long ago.
    #[must_use]
    pub fn get(&self, key: &str, now_ms: u64) -> Option<&Arc<Remembered>> {
        self.by_key.get(key).filter(|known| known.is_recent(now_ms))
    }

    /// Remembers one more, and forgets what is too old or too much. O(senders) when it is too much.
    pub fn remember(&mut self, new: Arc<Remembered>) {
        let now_ms = new.ts_ms;
        let sender: Box<str> = new.retry.sender().into();
        let bytes = new.bytes();
        self.bytes += bytes;
        self.by_key.insert(new.retry.key.clone(), Arc::clone(&new));
        let share = self.by_sender.entry(sender.clone()).or_default();
        share.bytes += bytes;
        share.answers.push_back(Arc::clone(&new));
        while self.oldest_of(&sender).is_some_and(|oldest| !oldest.is_recent(now_ms)) {
            self.forget_oldest_of(&sender);
        }
        // The newest stays in any case, also where it is by far the largest: its sender is about to be told.
        while self.bytes > BYTES_MAX {
            let may_go = |share: &Share| share.answers.front().is_some_and(|oldest| !Arc::ptr_eq(oldest, &new));
            let shares = self.by_sender.iter().filter(|(_, share)| may_go(share));
            let Some((largest, _)) = shares.max_by_key(|(_, share)| share.bytes) else { return };
            let largest = largest.clone();
            self.forget_oldest_of(&largest);
        }
    }

    fn oldest_of(&self, sender: &str) -> Option<&Arc<Remembered>> {
        self.by_sender.get(sender)?.answers.front()
    }

    fn forget_oldest_of(&mut self, sender: &str) {
        let Some(share) = self.by_sender.get_mut(sender) else { return };
        let Some(gone) = share.answers.pop_front() else { return };
        share.bytes -= gone.bytes();
        self.bytes -= gone.bytes();
        if share.answers.is_empty() {
            self.by_sender.remove(sender);
        }
        // Its key may have been used again since.
        if self.by_key.get(&gone.retry.key).is_some_and(|known| Arc::ptr_eq(known, &gone)) {
            self.by_key.remove(&gone.retry.key);
        }
    }

    /// All of them, of each sender oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Remembered>> {
        self.by_sender.values().flat_map(|share| &share.answers)
    }

    /// Memory they take, about.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::revision::Revision;
    use crate::vector::VectorId;
    use smallvec::smallvec;

    fn answer(key: &str, ts_ms: u64, print: u8) -> Arc<Remembered> {
        let committed = Committed {
            outcomes: smallvec![Outcome::Published { revision: Revision(ts_ms) }],
            first_revision: Revision(ts_ms),
            last_revision: Revision(ts_ms),
        };
        Arc::new(Remembered { ts_ms, committed, retry: Retry { key: key.into(), fingerprint: [print; 16] } })
    }

    #[test]
    fn answers_are_found_for_an_hour_and_only_for_the_same_request() {
        let mut answers = Answers::default();
        answers.remember(answer("a", 1000, 1));
        let known = answers.get("a", 1000 + WINDOW_MS - 1).unwrap();
        assert!(known.to(&Retry { key: "a".into(), fingerprint: [1; 16] }).is_ok());
        assert!(known.to(&Retry { key: "a".into(), fingerprint: [2; 16] }).is_err());
        assert!(answers.get("a", 1000 + WINDOW_MS).is_none(), "too old, though nothing has pushed it out");
        assert!(answers.get("b", 1000).is_none());
    }

    #[test]
    fn what_is_old_or_too_much_goes_and_a_key_used_again_stays() {
        let mut answers = Answers::default();
        answers.remember(answer("s\na", 0, 1));
        answers.remember(answer("s\nb", 10, 1));
        answers.remember(answer("s\na", WINDOW_MS + 5, 2));
        assert_eq!(answers.iter().count(), 2, "the first is too old");
        assert_eq!(answers.get("s\na", WINDOW_MS + 5).unwrap().retry.fingerprint, [2; 16]);
        answers.remember(answer("s\nc", 3 * WINDOW_MS, 1));
        assert_eq!((answers.iter().count(), answers.by_key.len()), (1, 1));
        let one = answers.memory_bytes();
        for n in 0..3 * BYTES_MAX as u64 / one as u64 {
            answers.remember(answer(&format!("s\n{n}"), 3 * WINDOW_MS, 1));
        }
        assert!(answers.memory_bytes() <= BYTES_MAX && answers.memory_bytes() > BYTES_MAX / 2);
        assert_eq!(answers.by_key.len(), answers.iter().count());
    }

    /// Otherwise one sender could make another's retry happen twice.
    #[test]
    fn a_sender_with_many_answers_pushes_out_its_own() {
        let mut answers = Answers::default();
        answers.remember(answer("quiet\na", 1000, 1));
        let one = answers.memory_bytes();
        for n in 0..2 * BYTES_MAX as u64 / one as u64 {
            answers.remember(answer(&format!("loud\n{n}"), 2000, 1));
        }
        assert!(answers.memory_bytes() <= BYTES_MAX);
        assert!(answers.get("quiet\na", 2000).is_some());
        assert!(answers.get("loud\n0", 2000).is_none());
        // One that is larger than all there may be is about to be told, and asked for again.
        let huge = answer("huge\na", 2000, 1);
        let mut huge = Arc::into_inner(huge).unwrap();
        let missing = vec![VectorId::new("v").unwrap(); BYTES_MAX / size_of::<VectorId>()];
        huge.committed.outcomes = smallvec![Outcome::VectorsDeleted { deleted: 0, missing, revision: Revision(1) }];
        answers.remember(Arc::new(huge));
        assert!(answers.get("huge\na", 2000).is_some() && answers.by_key.len() == 1);
        answers.remember(answer("loud\na", 2001, 1));
        assert!(answers.get("loud\na", 2001).is_some() && answers.get("huge\na", 2001).is_none());
    }
}
