//! What a client asks for, already valid: a [`Key`], [`Labels`] or [`Op`] cannot be made with a limit broken.
//!
//! Pure: no clock, no file, no async. Every limit of the write path stands here with its reason, checked once.

use super::answers::Retry;
use super::codec::Event;
use crate::error::Rejection;
use crate::revision::Revision;
use crate::vector::distance::prefetch;
use crate::vector::filter::Filter;
use crate::vector::{CollectionName, CollectionSpec, Vector, VectorId, VectorMeta};
use bytes::Bytes;
use smallvec::SmallVec;
use smol_str::SmolStr;
use std::borrow::Borrow;
use std::num::NonZeroU64;

/// Longest key in bytes. Long enough for paths and composed ids, short enough to keep a million in memory.
pub const KEY_BYTES_MAX: usize = 1024;
/// Longest time to live: 100 years of 365.25 days.
pub const TTL_MS_MAX: u64 = 3_155_760_000_000;
/// Operations in one batch: it is one log record, decided while everybody else waits.
pub const BATCH_OPS_MAX: usize = 1000;
/// Longest `job_id` in bytes; it is kept in memory for each entry and stream.
pub const JOB_ID_BYTES_MAX: usize = 256;
/// Most `tags` of one entry, for the same reason.
pub const TAGS_MAX: usize = 64;
/// Longest tag in bytes.
pub const TAG_BYTES_MAX: usize = 128;
/// Longest event type, in bytes.
pub const EVENT_TYPE_BYTES_MAX: usize = 64;
/// Largest document `PATCH` works on: merging happens on the writer's thread while every other write waits.
pub const PATCH_BYTES_MAX: usize = 4 << 20;
/// Longest content type stored with bytes.
pub const CONTENT_TYPE_BYTES_MAX: usize = 256;

/// Names the server gives to its own events; clients may not publish under them.
pub const SERVER_TYPES: [&str; 11] = [
    "state_updated",
    "state_deleted",
    "vector_added",
    "vector_updated",
    "vector_deleted",
    "collection_created",
    "collection_deleted",
    "vector_search",
    "snapshot",
    "snapshot_end",
    "reset",
];

/// A key: 1 to [`KEY_BYTES_MAX`] bytes of UTF-8 without control characters. Cheap to clone; up to 23 bytes stand in place, so that
/// a lookup goes after no pointer for each of a dozen comparisons.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(SmolStr);

impl Key {
    /// Checks the limits.
    pub fn new(text: &str) -> Result<Self, Rejection> {
        Self::check(text)?;
        Ok(Self(text.into()))
    }

    /// Checks the limits of a text that is only looked up.
    pub fn check(text: &str) -> Result<(), Rejection> {
        if text.is_empty() || text.len() > KEY_BYTES_MAX {
            return Err(Rejection::invalid(format!(
                "a key is 1 to {KEY_BYTES_MAX} bytes, this one has {}",
                text.len()
            )));
        }
        if text.chars().any(char::is_control) {
            return Err(Rejection::invalid("a key may not contain control characters"));
        }
        Ok(())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// What a key holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// JSON text without white space outside strings, number literals as they were sent.
    Json(Box<str>),
    /// Any bytes under the content type they were sent with.
    Bytes(Box<Blob>),
}

/// Bytes and their content type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// As sent in the header, at most [`CONTENT_TYPE_BYTES_MAX`] bytes.
    pub content_type: Box<str>,
    /// The body.
    pub data: Bytes,
}

impl Value {
    /// Bytes this value occupies, for budgets.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Json(text) => text.len(),
            Self::Bytes(blob) => blob.data.len() + blob.content_type.len(),
        }
    }

    /// Whether it holds nothing; JSON never does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `job_id` and `tags`: what streams filter by, beside keys and types.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// The job this belongs to.
    pub job_id: Option<Box<str>>,
    /// Free tags.
    pub tags: Box<[Box<str>]>,
}

impl Labels {
    /// Checks the limits; `None` when there is nothing to keep.
    pub fn new(job_id: Option<&str>, tags: &[impl AsRef<str>]) -> Result<Option<Box<Self>>, Rejection> {
        if let Some(job_id) = job_id
            && (job_id.is_empty() || job_id.len() > JOB_ID_BYTES_MAX)
        {
            return Err(Rejection::invalid(format!("job_id is 1 to {JOB_ID_BYTES_MAX} bytes")));
        }
        if tags.len() > TAGS_MAX {
            return Err(Rejection::invalid(format!("at most {TAGS_MAX} tags")));
        }
        if tags.iter().any(|t| t.as_ref().is_empty() || t.as_ref().len() > TAG_BYTES_MAX) {
            return Err(Rejection::invalid(format!("a tag is 1 to {TAG_BYTES_MAX} bytes")));
        }
        if job_id.is_none() && tags.is_empty() {
            return Ok(None);
        }
        Ok(Some(Box::new(Self {
            job_id: job_id.map(Into::into),
            tags: tags.iter().map(|t| t.as_ref().into()).collect(),
        })))
    }

    /// The labels in a vector's metadata: `job_id` and `tags` where they are strings within the limits, else ignored,
    /// because metadata is free and only streams look at these two.
    #[must_use]
    pub fn of_vector(meta: &VectorMeta) -> Option<Box<Self>> {
        if !meta.text().contains("\"job_id\"") && !meta.text().contains("\"tags\"") {
            return None;
        }
        let object = meta.parse();
        let job_id =
            object.get("job_id").and_then(|v| v.as_str()).filter(|j| !j.is_empty() && j.len() <= JOB_ID_BYTES_MAX);
        let tags: Vec<&str> = match object.get("tags") {
            Some(serde_json::Value::String(tag)) => vec![tag],
            Some(serde_json::Value::Array(tags)) => tags.iter().filter_map(|t| t.as_str()).collect(),
            _ => Vec::new(),
        };
        let tags: Vec<&str> =
            tags.into_iter().filter(|t| !t.is_empty() && t.len() <= TAG_BYTES_MAX).take(TAGS_MAX).collect();
        Self::new(job_id, &tags).ok().flatten()
    }

    /// Bytes these labels occupy, for budgets.
    #[must_use]
    pub fn len(&self) -> usize {
        self.job_id.as_ref().map_or(0, |j| j.len()) + self.tags.iter().map(|t| t.len() + 16).sum::<usize>()
    }

    /// Whether there is neither a job nor a tag.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.job_id.is_none() && self.tags.is_empty()
    }
}

/// The type of an event a client publishes: `[a-z][a-z0-9_.-]{0,63}`, not one of [`SERVER_TYPES`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EventType(Box<str>);

impl EventType {
    /// Checks the form and that the name is free for clients.
    pub fn new(text: &str) -> Result<Self, Rejection> {
        let mut bytes = text.bytes();
        let first_ok = bytes.next().is_some_and(|b| b.is_ascii_lowercase());
        let rest_ok = bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_.-".contains(&b));
        if !first_ok || !rest_ok || text.len() > EVENT_TYPE_BYTES_MAX {
            return Err(Rejection::invalid("an event type is [a-z][a-z0-9_.-]{0,63}, for example progress"));
        }
        if SERVER_TYPES.contains(&text) {
            return Err(Rejection::invalid(format!("the type {text} is the server's own; choose another name")));
        }
        Ok(Self(text.into()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What must hold for a write to happen; everything given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// The current revision; zero = absent.
    pub if_revision: Option<Revision>,
    /// `If-Match`.
    pub if_match: Option<ETags>,
    /// `If-None-Match`.
    pub if_none_match: Option<ETags>,
}

/// The list of an `If-Match` or `If-None-Match` header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ETags {
    /// `*`: any existing one.
    Any,
    /// Revisions; tags that are not ours are left out, they match nothing.
    These(Vec<Revision>),
}

impl ETags {
    /// Whether the current revision (zero = absent) is among them.
    #[must_use]
    pub fn matches(&self, current: Revision) -> bool {
        current != Revision::ZERO
            && match self {
                Self::Any => true,
                Self::These(revisions) => revisions.contains(&current),
            }
    }
}

impl Condition {
    /// Checks against the current revision (zero = absent).
    pub fn check(&self, actual: Revision) -> Result<(), Rejection> {
        if let Some(expected) = self.if_revision
            && expected != actual
        {
            return Err(Rejection::RevisionConflict { expected, actual });
        }
        if self.if_match.as_ref().is_some_and(|tags| !tags.matches(actual))
            || self.if_none_match.as_ref().is_some_and(|tags| tags.matches(actual))
        {
            return Err(Rejection::PreconditionFailed { actual });
        }
        Ok(())
    }
}

/// Checks a time to live.
pub fn check_ttl(ttl_ms: u64) -> Result<u64, Rejection> {
    if ttl_ms == 0 || ttl_ms > TTL_MS_MAX {
        return Err(Rejection::invalid(format!("ttl_ms is 1 to {TTL_MS_MAX} (100 years)")));
    }
    Ok(ttl_ms)
}

/// How a vector write treats an id that exists or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorWrite {
    /// Refuses an id that exists.
    Add,
    /// Replaces vector and metadata, or creates.
    Upsert,
    /// Refuses an absent id; vector and metadata patch are each optional.
    Update,
}

/// Which vectors a bulk delete removes.
#[derive(Clone, Debug)]
pub struct VectorSelection {
    /// Candidates, in the order given.
    pub ids: Vec<VectorId>,
    /// They matched at a revision. Those that changed since are checked again when the delete is decided: what no longer matches
    /// stays.
    pub filter: Option<(Filter, Revision)>,
    /// How many earlier commands of the same request deleted: the last one answers for all.
    pub deleted_before: usize,
}

/// One operation, valid but not yet decided.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the fields are those of the HTTP contract under the same names")]
pub enum Op {
    Put {
        key: Key,
        value: Value,
        ttl_ms: Option<u64>,
        labels: Option<Box<Labels>>,
        condition: Condition,
    },
    /// `patch` is compact JSON, at most [`PATCH_BYTES_MAX`].
    Patch {
        key: Key,
        patch: Box<str>,
        ttl_ms: Option<u64>,
        condition: Condition,
    },
    Delete {
        key: Key,
        condition: Condition,
    },
    Event {
        event_type: EventType,
        key: Option<Key>,
        data: Option<Box<str>>,
        labels: Option<Box<Labels>>,
    },
    CreateCollection {
        collection: CollectionName,
        spec: CollectionSpec,
    },
    DeleteCollection {
        collection: CollectionName,
    },
    WriteVector {
        write: VectorWrite,
        collection: CollectionName,
        id: VectorId,
        vector: Option<Vector>,
        /// The whole metadata; for an update a merge patch.
        meta: Option<VectorMeta>,
        if_revision: Option<Revision>,
    },
    DeleteVector {
        collection: CollectionName,
        id: VectorId,
        if_revision: Option<Revision>,
    },
    DeleteVectors {
        collection: CollectionName,
        selection: VectorSelection,
    },
}

/// What an operation changes.
#[derive(Debug)]
pub enum Target {
    /// A key.
    Key(Key),
    /// A vector of a collection.
    Vector(CollectionName, VectorId),
}

impl Target {
    /// Whether an event is about it.
    #[must_use]
    pub fn is_of(&self, event: &Event) -> bool {
        match (self, event) {
            (Self::Key(target), Event::StateUpdated { key, .. } | Event::StateDeleted { key, .. }) => key == target,
            (
                Self::Vector(of, target),
                Event::VectorWritten { collection, id, .. } | Event::VectorDeleted { collection, id, .. },
            ) => collection == of && id == target,
            _ => false,
        }
    }
}

impl Op {
    /// Whether it only removes: such operations pass when disk or memory are full.
    #[must_use]
    pub fn frees_space(&self) -> bool {
        matches!(
            self,
            Self::Delete { .. }
                | Self::DeleteCollection { .. }
                | Self::DeleteVector { .. }
                | Self::DeleteVectors { .. }
        )
    }

    /// The key whose entry it changes.
    #[must_use]
    pub fn changed_key(&self) -> Option<&Key> {
        match self {
            Self::Put { key, .. } | Self::Patch { key, .. } | Self::Delete { key, .. } => Some(key),
            _ => None,
        }
    }

    /// What it changes, if that has to be at a revision.
    #[must_use]
    pub fn conditional_target(&self) -> Option<Target> {
        match self {
            Self::Put { key, condition, .. } | Self::Patch { key, condition, .. } | Self::Delete { key, condition } => {
                condition.if_revision.map(|_| Target::Key(key.clone()))
            }
            Self::WriteVector { collection, id, if_revision, .. }
            | Self::DeleteVector { collection, id, if_revision } => {
                if_revision.map(|_| Target::Vector(collection.clone(), id.clone()))
            }
            _ => None,
        }
    }

    /// Asks the processor to fetch what deciding it looks at: worth it where another core wrote it.
    pub fn prefetch(&self) {
        if let Self::WriteVector { id, vector, meta, .. } = self {
            prefetch(id.as_str().as_ptr());
            meta.iter().for_each(|meta| prefetch(meta.text().as_ptr()));
            vector.iter().for_each(|vector| prefetch(vector.as_slice().as_ptr().cast()));
        }
    }

    /// Vectors, or keys, it may change: what it costs to decide, write and apply.
    #[must_use]
    pub fn weight(&self) -> usize {
        if let Self::DeleteVectors { selection, .. } = self { selection.ids.len() } else { 1 }
    }

    /// Whether it concerns collections rather than keys.
    #[must_use]
    pub fn is_about_vectors(&self) -> bool {
        !matches!(self, Self::Put { .. } | Self::Patch { .. } | Self::Delete { .. } | Self::Event { .. })
    }
}

/// What one operation did, for the answer.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of the HTTP contract under the same names")]
pub enum Outcome {
    Put {
        key: Key,
        revision: Revision,
        created: bool,
        expires_at_ms: Option<NonZeroU64>,
    },
    /// As put, with the whole value after the patch.
    Patched {
        key: Key,
        revision: Revision,
        created: bool,
        expires_at_ms: Option<NonZeroU64>,
        value: Value,
    },
    Deleted {
        key: Key,
        revision: Revision,
    },
    Published {
        revision: Revision,
    },
    /// `created` is false when the collection was there with this very shape; `revision` is then the one that created it.
    Collection {
        created: bool,
        revision: Revision,
    },
    CollectionDeleted {
        count: usize,
        revision: Revision,
    },
    VectorWritten {
        id: VectorId,
        revision: Revision,
        created: bool,
    },
    VectorDeleted {
        id: VectorId,
        revision: Revision,
    },
    VectorsDeleted {
        deleted: usize,
        missing: Vec<VectorId>,
        revision: Revision,
    },
}

impl Outcome {
    /// About the memory it takes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Put { key, .. } | Self::Deleted { key, .. } => key.as_str().len(),
                Self::Patched { key, value, .. } => key.as_str().len() + value.len(),
                Self::VectorWritten { id, .. } | Self::VectorDeleted { id, .. } => id.as_str().len(),
                Self::VectorsDeleted { missing, .. } => {
                    missing.iter().map(|id| size_of::<VectorId>() + id.as_str().len()).sum()
                }
                Self::Published { .. } | Self::Collection { .. } | Self::CollectionDeleted { .. } => 0,
            }
    }
}

/// What the sequencer decides as one: all operations or none, one record, consecutive revisions.
#[derive(Clone, Debug)]
pub struct Command {
    /// In order; later ones see earlier ones.
    pub ops: Vec<Op>,
    /// Whether a rejection names the operation's index.
    pub is_batch: bool,
    /// Set when the answer is to be remembered.
    pub retry: Option<Box<Retry>>,
}

impl Command {
    /// A single operation.
    #[must_use]
    pub fn one(op: Op) -> Self {
        Self { ops: vec![op], is_batch: false, retry: None }
    }

    /// Several operations, all or nothing.
    #[must_use]
    pub fn batch(ops: Vec<Op>) -> Self {
        Self { ops, is_batch: true, retry: None }
    }
}

/// One outcome an operation: of most commands one.
pub type Outcomes = SmallVec<[Outcome; 1]>;

/// What a decided command did.
#[derive(Clone, Debug)]
pub struct Committed {
    /// In the order of the operations.
    pub outcomes: Outcomes,
    /// First revision of the record; the head when nothing had to be written.
    pub first_revision: Revision,
    /// Last revision of the record.
    pub last_revision: Revision,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_hold_their_limits() {
        for (name, text, ok) in [
            ("empty", String::new(), false),
            ("one byte", "a".into(), true),
            ("longest", "k".repeat(KEY_BYTES_MAX), true),
            ("one too long", "k".repeat(KEY_BYTES_MAX + 1), false),
            ("slashes and spaces", "a/b c/é".into(), true),
            ("newline", "a\nb".into(), false),
            ("delete", "a\u{7f}".into(), false),
            ("c1 control", "a\u{85}".into(), false),
        ] {
            assert_eq!(Key::new(&text).is_ok(), ok, "{name}");
        }
    }

    #[test]
    fn event_types_hold_their_form() {
        for (text, ok) in [
            ("progress", true),
            ("a.b-c_9", true),
            ("", false),
            ("Progress", false),
            ("9a", false),
            ("a b", false),
            ("state_updated", false),
            ("reset", false),
        ] {
            assert_eq!(EventType::new(text).is_ok(), ok, "{text}");
        }
        assert!(EventType::new(&"a".repeat(64)).is_ok());
        assert!(EventType::new(&"a".repeat(65)).is_err());
    }

    #[test]
    fn conditions_hold_all_that_is_given() {
        let r = Revision;
        let these = |n| Some(ETags::These(vec![r(n)]));
        let condition = |if_revision: Option<u64>, if_match, if_none_match| Condition {
            if_revision: if_revision.map(Revision),
            if_match,
            if_none_match,
        };
        assert!(condition(None, None, None).check(r(0)).is_ok());
        assert!(condition(Some(0), None, None).check(r(0)).is_ok());
        assert_eq!(
            condition(Some(0), None, None).check(r(3)),
            Err(Rejection::RevisionConflict { expected: r(0), actual: r(3) })
        );
        assert!(condition(None, these(3), None).check(r(3)).is_ok());
        assert!(condition(None, these(3), None).check(r(4)).is_err());
        assert!(condition(None, Some(ETags::Any), None).check(r(0)).is_err());
        assert!(condition(None, None, Some(ETags::Any)).check(r(0)).is_ok());
        assert!(condition(None, None, Some(ETags::Any)).check(r(9)).is_err());
        assert!(condition(Some(3), None, these(3)).check(r(3)).is_err());
    }

    #[test]
    fn labels_of_a_vector_ignore_what_is_not_theirs() {
        let labels = |text: &str| Labels::of_vector(&VectorMeta::new(text).unwrap());
        assert_eq!(labels(r#"{"a":1}"#), None);
        assert_eq!(labels(r#"{"job_id":7,"tags":[1]}"#), None);
        let found = labels(r#"{"job_id":"j","tags":["x",1,"y"]}"#).unwrap();
        assert_eq!(found.job_id.as_deref(), Some("j"));
        assert_eq!(found.tags.len(), 2);
    }
}
