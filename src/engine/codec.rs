//! Records: what the log holds, and their bytes.
//!
//! `docs/format.md` draws these structures; a golden hex test at the end of this file ties the two together.
//! A record is one decided command: consecutive events with consecutive revisions, a time, and nothing that depends on
//! the state it is applied to. Values and metadata are stored whole, also after a patch, so that replaying needs no
//! merge and an old log means the same to a newer program.

use super::answers::{Retry, RetryAnswer};
use super::command::{Blob, EventType, Key, Labels, Outcome, Outcomes, Value};
use crate::revision::Revision;
use crate::vector::{CollectionName, CollectionSpec, Metric, Vector, VectorId, VectorMeta};
use crate::wire::{Malformed, Put, Reader};
use bytes::Bytes;
use smallvec::SmallVec;
use std::num::NonZeroU64;
use std::sync::Arc;

/// A key's state. Shared between the record that made it, the state and whoever reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it holds.
    pub value: Value,
    /// The revision that last changed it.
    pub revision: Revision,
    /// The revision that created it.
    pub created_revision: Revision,
    /// Unix milliseconds after which it is gone.
    pub expires_at_ms: Option<NonZeroU64>,
    /// `job_id` and `tags`.
    pub labels: Option<Box<Labels>>,
}

/// Most records hold one event, which then has no allocation of its own.
pub type Events = SmallVec<[Event; 1]>;

/// Keys with what they hold, in key order.
pub type Entries = Vec<(Key, Arc<Entry>)>;

/// Why a key went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteReason {
    /// A client asked.
    Deleted,
    /// Its time to live ended.
    Expired,
}

/// One change. Its revision is its record's first plus its place in the record.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of the HTTP contract under the same names")]
pub enum Event {
    /// `patch` is set when the change came as a merge patch; `entry` holds the result either way.
    StateUpdated {
        key: Key,
        prev_revision: Revision,
        entry: Arc<Entry>,
        patch: Option<Box<str>>,
    },
    StateDeleted {
        key: Key,
        prev_revision: Revision,
        reason: DeleteReason,
        labels: Option<Box<Labels>>,
    },
    Published {
        event_type: EventType,
        key: Option<Key>,
        data: Option<Box<str>>,
        labels: Option<Box<Labels>>,
    },
    CollectionCreated {
        collection: CollectionName,
        spec: CollectionSpec,
    },
    CollectionDeleted {
        collection: CollectionName,
        spec: CollectionSpec,
    },
    /// `vector` is absent when only the metadata changed; `meta` is whole either way.
    VectorWritten {
        collection: CollectionName,
        id: VectorId,
        created: bool,
        vector: Option<Vector>,
        meta: VectorMeta,
        labels: Option<Box<Labels>>,
    },
    VectorDeleted {
        collection: CollectionName,
        id: VectorId,
        labels: Option<Box<Labels>>,
    },
}

impl Event {
    /// The collection whose vectors it changes.
    #[must_use]
    pub fn vector_collection(&self) -> Option<&CollectionName> {
        match self {
            Self::VectorWritten { collection, .. } | Self::VectorDeleted { collection, .. } => Some(collection),
            _ => None,
        }
    }
}

/// One decided command: all of it happens or nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Revision of the first event.
    pub first_revision: Revision,
    /// Unix milliseconds.
    pub ts_ms: u64,
    /// At least one.
    pub events: Events,
    /// What was said to the client, if it may ask again.
    pub answer: Option<Box<RetryAnswer>>,
}

impl Record {
    /// Revision of the last event.
    #[must_use]
    pub fn last_revision(&self) -> Revision {
        self.first_revision.plus(self.events.len() as u64 - 1)
    }

    /// Events with their revisions.
    pub fn iter(&self) -> impl Iterator<Item = (Revision, &Event)> {
        self.events.iter().enumerate().map(|(at, event)| (self.first_revision.plus(at as u64), event))
    }
}

mod tag {
    pub const STATE_UPDATED: u8 = 1;
    pub const STATE_DELETED: u8 = 2;
    pub const PUBLISHED: u8 = 3;
    pub const COLLECTION_CREATED: u8 = 4;
    pub const COLLECTION_DELETED: u8 = 5;
    pub const VECTOR_WRITTEN: u8 = 6;
    pub const VECTOR_DELETED: u8 = 7;

    pub const VALUE_JSON: u8 = 1;
    pub const VALUE_BYTES: u8 = 2;
}

mod outcome_tag {
    pub const PUT: u8 = 1;
    pub const PATCHED: u8 = 2;
    pub const DELETED: u8 = 3;
    pub const PUBLISHED: u8 = 4;
    pub const COLLECTION: u8 = 5;
    pub const COLLECTION_DELETED: u8 = 6;
    pub const VECTOR_WRITTEN: u8 = 7;
    pub const VECTOR_DELETED: u8 = 8;
    pub const VECTORS_DELETED: u8 = 9;
}

/// Appends a record's payload: time, then events.
pub fn encode_record(record: &Record, out: &mut Vec<u8>) {
    out.put_u64(record.ts_ms);
    for (at, event) in record.events.iter().enumerate() {
        if let Some(Event::VectorWritten { vector: Some(next), .. }) = record.events.get(at + 1) {
            // Whoever parsed it did so on another core: ask for all its lines while this one is copied.
            next.prefetch();
        }
        encode_event(event, out);
    }
    if let Some(answer) = &record.answer {
        encode_answer(&answer.retry, &answer.outcomes, out);
    }
}

/// Appends an answer; the snapshot stores answers the same way.
pub fn encode_answer(retry: &Retry, outcomes: &Outcomes, out: &mut Vec<u8>) {
    out.put_text(&retry.key);
    out.extend_from_slice(&retry.fingerprint);
    out.put_u32(u32::try_from(outcomes.len()).expect("a request holds thousands of operations at most"));
    outcomes.iter().for_each(|outcome| encode_outcome(outcome, out));
}

fn encode_outcome(outcome: &Outcome, out: &mut Vec<u8>) {
    match outcome {
        Outcome::Put { key, revision, created, expires_at_ms } => {
            out.put_byte(outcome_tag::PUT);
            out.put_text(key.as_str());
            out.put_revision(*revision);
            out.put_byte(u8::from(*created));
            out.put_u64(expires_at_ms.map_or(0, NonZeroU64::get));
        }
        Outcome::Patched { key, revision, created, expires_at_ms, value } => {
            out.put_byte(outcome_tag::PATCHED);
            out.put_text(key.as_str());
            out.put_revision(*revision);
            out.put_byte(u8::from(*created));
            out.put_u64(expires_at_ms.map_or(0, NonZeroU64::get));
            encode_value(value, out);
        }
        Outcome::Deleted { key, revision } => {
            out.put_byte(outcome_tag::DELETED);
            out.put_text(key.as_str());
            out.put_revision(*revision);
        }
        Outcome::Published { revision } => {
            out.put_byte(outcome_tag::PUBLISHED);
            out.put_revision(*revision);
        }
        Outcome::Collection { created, revision } => {
            out.put_byte(outcome_tag::COLLECTION);
            out.put_byte(u8::from(*created));
            out.put_revision(*revision);
        }
        Outcome::CollectionDeleted { count, revision } => {
            out.put_byte(outcome_tag::COLLECTION_DELETED);
            out.put_u64(*count as u64);
            out.put_revision(*revision);
        }
        Outcome::VectorWritten { id, revision, created } => {
            out.put_byte(outcome_tag::VECTOR_WRITTEN);
            out.put_text(id.as_str());
            out.put_revision(*revision);
            out.put_byte(u8::from(*created));
        }
        Outcome::VectorDeleted { id, revision } => {
            out.put_byte(outcome_tag::VECTOR_DELETED);
            out.put_text(id.as_str());
            out.put_revision(*revision);
        }
        Outcome::VectorsDeleted { deleted, missing, revision } => {
            out.put_byte(outcome_tag::VECTORS_DELETED);
            out.put_u64(*deleted as u64);
            out.put_u32(u32::try_from(missing.len()).expect("a request names thousands of ids at most"));
            missing.iter().for_each(|id| out.put_text(id.as_str()));
            out.put_revision(*revision);
        }
    }
}

fn encode_event(event: &Event, out: &mut Vec<u8>) {
    match event {
        Event::StateUpdated { key, prev_revision, entry, patch } => {
            out.put_byte(tag::STATE_UPDATED);
            out.put_text(key.as_str());
            out.put_revision(*prev_revision);
            put_option_text(out, patch.as_deref());
            encode_entry(entry, out);
        }
        Event::StateDeleted { key, prev_revision, reason, labels } => {
            out.put_byte(tag::STATE_DELETED);
            out.put_text(key.as_str());
            out.put_revision(*prev_revision);
            out.put_byte(match reason {
                DeleteReason::Deleted => 0,
                DeleteReason::Expired => 1,
            });
            put_labels(out, labels.as_deref());
        }
        Event::Published { event_type, key, data, labels } => {
            out.put_byte(tag::PUBLISHED);
            out.put_text(event_type.as_str());
            put_option_text(out, key.as_ref().map(Key::as_str));
            put_option_text(out, data.as_deref());
            put_labels(out, labels.as_deref());
        }
        Event::CollectionCreated { collection, spec } => {
            out.put_byte(tag::COLLECTION_CREATED);
            out.put_text(collection.as_str());
            put_spec(out, *spec);
        }
        Event::CollectionDeleted { collection, spec } => {
            out.put_byte(tag::COLLECTION_DELETED);
            out.put_text(collection.as_str());
            put_spec(out, *spec);
        }
        Event::VectorWritten { collection, id, created, vector, meta, labels } => {
            out.put_byte(tag::VECTOR_WRITTEN);
            out.put_text(collection.as_str());
            out.put_text(id.as_str());
            out.put_byte(u8::from(*created));
            let numbers = vector.as_ref().map_or(&[][..], Vector::as_slice);
            out.put_blob(bytemuck::cast_slice(numbers));
            out.put_text(meta.text());
            put_labels(out, labels.as_deref());
        }
        Event::VectorDeleted { collection, id, labels } => {
            out.put_byte(tag::VECTOR_DELETED);
            out.put_text(collection.as_str());
            out.put_text(id.as_str());
            put_labels(out, labels.as_deref());
        }
    }
}

/// Appends an entry; the snapshot stores entries the same way.
pub fn encode_entry(entry: &Entry, out: &mut Vec<u8>) {
    out.put_revision(entry.revision);
    out.put_revision(entry.created_revision);
    out.put_u64(entry.expires_at_ms.map_or(0, NonZeroU64::get));
    put_labels(out, entry.labels.as_deref());
    encode_value(&entry.value, out);
}

fn encode_value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Json(text) => {
            out.put_byte(tag::VALUE_JSON);
            out.put_text(text);
        }
        Value::Bytes(blob) => {
            out.put_byte(tag::VALUE_BYTES);
            out.put_text(&blob.content_type);
            out.put_blob(&blob.data);
        }
    }
}

fn put_option_text(out: &mut Vec<u8>, text: Option<&str>) {
    out.put_byte(u8::from(text.is_some()));
    if let Some(text) = text {
        out.put_text(text);
    }
}

fn put_labels(out: &mut Vec<u8>, labels: Option<&Labels>) {
    out.put_byte(u8::from(labels.is_some()));
    if let Some(labels) = labels {
        put_option_text(out, labels.job_id.as_deref());
        out.put_u32(u32::try_from(labels.tags.len()).expect("tags are at most TAGS_MAX"));
        for tag in &labels.tags {
            out.put_text(tag);
        }
    }
}

/// Appends a collection's dimension and metric.
pub fn put_spec(out: &mut Vec<u8>, spec: CollectionSpec) {
    out.put_u32(u32::try_from(spec.dim).expect("dim is at most DIM_MAX"));
    out.put_byte(match spec.metric {
        Metric::Cosine => 1,
        Metric::Dot => 2,
        Metric::L2 => 3,
    });
}

/// Reads a record's payload of `count` events.
pub fn decode_record(first_revision: Revision, count: u32, payload: &[u8]) -> Result<Record, Malformed> {
    let mut reader = Reader(payload);
    let ts_ms = reader.u64("ts")?;
    // The count is checked against the bytes as they are read; it must not size an allocation by itself.
    let mut events = Events::with_capacity((count as usize).min(payload.len() / 8));
    for _ in 0..count {
        events.push(decode_event(&mut reader)?);
    }
    let answer = if reader.0.is_empty() { None } else { Some(Box::new(decode_answer(&mut reader)?)) };
    reader.end("the record")?;
    if events.is_empty() {
        return Err(Malformed("a record without events".into()));
    }
    Ok(Record { first_revision, ts_ms, events, answer })
}

/// Reads what [`encode_answer`] wrote.
pub fn decode_answer(reader: &mut Reader<'_>) -> Result<RetryAnswer, Malformed> {
    let key = reader.text("idempotency key")?.into();
    let fingerprint = u128::from(reader.u64("fingerprint")?) | u128::from(reader.u64("fingerprint")?) << 64;
    let retry = Retry { key, fingerprint: fingerprint.to_le_bytes() };
    let count = reader.u32("outcomes")? as usize;
    let mut outcomes = Outcomes::with_capacity(count.min(reader.0.len()));
    for _ in 0..count {
        outcomes.push(decode_outcome(reader)?);
    }
    Ok(RetryAnswer { retry, outcomes })
}

fn decode_outcome(reader: &mut Reader<'_>) -> Result<Outcome, Malformed> {
    let count = |reader: &mut Reader<'_>| {
        usize::try_from(reader.u64("count")?).map_err(|_| Malformed("a count beyond this machine".into()))
    };
    Ok(match reader.byte("outcome tag")? {
        outcome_tag::PUT => Outcome::Put {
            key: key(reader)?,
            revision: reader.revision("revision")?,
            created: reader.byte("created")? != 0,
            expires_at_ms: NonZeroU64::new(reader.u64("expires_at_ms")?),
        },
        outcome_tag::PATCHED => Outcome::Patched {
            key: key(reader)?,
            revision: reader.revision("revision")?,
            created: reader.byte("created")? != 0,
            expires_at_ms: NonZeroU64::new(reader.u64("expires_at_ms")?),
            value: decode_value(reader)?,
        },
        outcome_tag::DELETED => Outcome::Deleted { key: key(reader)?, revision: reader.revision("revision")? },
        outcome_tag::PUBLISHED => Outcome::Published { revision: reader.revision("revision")? },
        outcome_tag::COLLECTION => {
            Outcome::Collection { created: reader.byte("created")? != 0, revision: reader.revision("revision")? }
        }
        outcome_tag::COLLECTION_DELETED => {
            Outcome::CollectionDeleted { count: count(reader)?, revision: reader.revision("revision")? }
        }
        outcome_tag::VECTOR_WRITTEN => Outcome::VectorWritten {
            id: vector_id(reader)?,
            revision: reader.revision("revision")?,
            created: reader.byte("created")? != 0,
        },
        outcome_tag::VECTOR_DELETED => {
            Outcome::VectorDeleted { id: vector_id(reader)?, revision: reader.revision("revision")? }
        }
        outcome_tag::VECTORS_DELETED => {
            let deleted = count(reader)?;
            let missing = (0..reader.u32("missing")?).map(|_| vector_id(reader)).collect::<Result<_, _>>()?;
            Outcome::VectorsDeleted { deleted, missing, revision: reader.revision("revision")? }
        }
        other => return Err(Malformed(format!("unknown outcome tag {other}"))),
    })
}

fn decode_event(reader: &mut Reader<'_>) -> Result<Event, Malformed> {
    Ok(match reader.byte("event tag")? {
        tag::STATE_UPDATED => Event::StateUpdated {
            key: key(reader)?,
            prev_revision: reader.revision("prev_revision")?,
            patch: option_text(reader, "patch")?.map(Into::into),
            entry: Arc::new(decode_entry(reader)?),
        },
        tag::STATE_DELETED => Event::StateDeleted {
            key: key(reader)?,
            prev_revision: reader.revision("prev_revision")?,
            reason: match reader.byte("reason")? {
                0 => DeleteReason::Deleted,
                1 => DeleteReason::Expired,
                other => return Err(Malformed(format!("unknown delete reason {other}"))),
            },
            labels: labels(reader)?,
        },
        tag::PUBLISHED => Event::Published {
            event_type: EventType::new(reader.text("type")?).map_err(|e| Malformed(e.to_string()))?,
            key: option_text(reader, "key")?.map(to_key).transpose()?,
            data: option_text(reader, "data")?.map(Into::into),
            labels: labels(reader)?,
        },
        tag::COLLECTION_CREATED => Event::CollectionCreated { collection: collection(reader)?, spec: spec(reader)? },
        tag::COLLECTION_DELETED => Event::CollectionDeleted { collection: collection(reader)?, spec: spec(reader)? },
        tag::VECTOR_WRITTEN => Event::VectorWritten {
            collection: collection(reader)?,
            id: vector_id(reader)?,
            created: reader.byte("created")? != 0,
            vector: numbers(reader)?,
            meta: VectorMeta::new(reader.text("meta")?).map_err(|e| Malformed(e.to_string()))?,
            labels: labels(reader)?,
        },
        tag::VECTOR_DELETED => {
            Event::VectorDeleted { collection: collection(reader)?, id: vector_id(reader)?, labels: labels(reader)? }
        }
        other => return Err(Malformed(format!("unknown event tag {other}"))),
    })
}

/// Reads what [`encode_entry`] wrote.
pub fn decode_entry(reader: &mut Reader<'_>) -> Result<Entry, Malformed> {
    Ok(Entry {
        revision: reader.revision("revision")?,
        created_revision: reader.revision("created_revision")?,
        expires_at_ms: NonZeroU64::new(reader.u64("expires_at_ms")?),
        labels: labels(reader)?,
        value: decode_value(reader)?,
    })
}

fn decode_value(reader: &mut Reader<'_>) -> Result<Value, Malformed> {
    Ok(match reader.byte("value tag")? {
        tag::VALUE_JSON => Value::Json(reader.text("value")?.into()),
        tag::VALUE_BYTES => Value::Bytes(Box::new(Blob {
            content_type: reader.text("content type")?.into(),
            data: Bytes::copy_from_slice(reader.blob("value")?),
        })),
        other => return Err(Malformed(format!("unknown value tag {other}"))),
    })
}

fn option_text<'a>(reader: &mut Reader<'a>, what: &str) -> Result<Option<&'a str>, Malformed> {
    if reader.byte(what)? == 0 { Ok(None) } else { reader.text(what).map(Some) }
}

fn to_key(text: &str) -> Result<Key, Malformed> {
    Key::new(text).map_err(|e| Malformed(e.to_string()))
}

fn key(reader: &mut Reader<'_>) -> Result<Key, Malformed> {
    to_key(reader.text("key")?)
}

fn collection(reader: &mut Reader<'_>) -> Result<CollectionName, Malformed> {
    CollectionName::new(reader.text("collection")?).map_err(|e| Malformed(e.to_string()))
}

fn vector_id(reader: &mut Reader<'_>) -> Result<VectorId, Malformed> {
    VectorId::new(reader.text("id")?).map_err(|e| Malformed(e.to_string()))
}

/// Reads a vector's numbers; `None` where there are none.
pub(super) fn numbers(reader: &mut Reader<'_>) -> Result<Option<Vector>, Malformed> {
    let bytes = reader.blob("vector")?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let (chunks, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(Malformed("a vector of a broken length".into()));
    }
    Vector::new(chunks.iter().map(|b| f32::from_le_bytes(*b)).collect()).map(Some).map_err(|e| Malformed(e.to_string()))
}

/// Reads a collection's dimension and metric.
pub fn spec(reader: &mut Reader<'_>) -> Result<CollectionSpec, Malformed> {
    let dim = reader.u32("dim")? as usize;
    let metric = match reader.byte("metric")? {
        1 => Metric::Cosine,
        2 => Metric::Dot,
        3 => Metric::L2,
        other => return Err(Malformed(format!("unknown metric {other}"))),
    };
    CollectionSpec::new(dim, metric).map_err(|e| Malformed(e.to_string()))
}

fn labels(reader: &mut Reader<'_>) -> Result<Option<Box<Labels>>, Malformed> {
    if reader.byte("labels")? == 0 {
        return Ok(None);
    }
    let job_id = option_text(reader, "job_id")?;
    let count = reader.u32("tags")? as usize;
    let mut tags = Vec::with_capacity(count.min(super::command::TAGS_MAX));
    for _ in 0..count {
        tags.push(reader.text("tag")?);
    }
    Labels::new(job_id, &tags).map_err(|e| Malformed(e.to_string()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use smallvec::smallvec;

    /// One record with every kind of event, and every optional field both ways.
    pub(crate) fn specimen() -> Record {
        let key = |k: &str| Key::new(k).unwrap();
        let labels = || Labels::new(Some("j1"), &["a", "b"]).unwrap();
        let entry = |value, expires_at_ms, labels| {
            Arc::new(Entry { value, revision: Revision(7), created_revision: Revision(3), expires_at_ms, labels })
        };
        let spec = CollectionSpec::new(2, Metric::Cosine).unwrap();
        let collection = CollectionName::new("docs").unwrap();
        let id = VectorId::new("v").unwrap();
        let blob = Blob { content_type: "text/plain".into(), data: Bytes::from_static(b"hi") };
        Record {
            first_revision: Revision(7),
            ts_ms: 1_733_950_000_123,
            events: smallvec![
                Event::StateUpdated {
                    key: key("k"),
                    prev_revision: Revision(0),
                    entry: entry(Value::Json("{\"n\":1.0}".into()), None, None),
                    patch: Some("{}".into()),
                },
                Event::StateUpdated {
                    key: key("é"),
                    prev_revision: Revision(5),
                    entry: entry(Value::Bytes(Box::new(blob)), NonZeroU64::new(99), labels()),
                    patch: None,
                },
                Event::StateDeleted {
                    key: key("k"),
                    prev_revision: Revision(7),
                    reason: DeleteReason::Expired,
                    labels: None,
                },
                Event::Published {
                    event_type: EventType::new("log").unwrap(),
                    key: None,
                    data: None,
                    labels: labels(),
                },
                Event::Published {
                    event_type: EventType::new("log").unwrap(),
                    key: Some(key("k")),
                    data: Some("[1]".into()),
                    labels: None,
                },
                Event::CollectionCreated { collection: collection.clone(), spec },
                Event::VectorWritten {
                    collection: collection.clone(),
                    id: id.clone(),
                    created: true,
                    vector: Some(Vector::new(vec![1.0, -2.5]).unwrap()),
                    meta: VectorMeta::empty(),
                    labels: None,
                },
                Event::VectorWritten {
                    collection: collection.clone(),
                    id: id.clone(),
                    created: false,
                    vector: None,
                    meta: VectorMeta::new("{\"job_id\":\"j1\",\"tags\":[\"a\",\"b\"]}").unwrap(),
                    labels: labels(),
                },
                Event::VectorDeleted { collection: collection.clone(), id, labels: None },
                Event::CollectionDeleted { collection, spec },
            ],
            answer: None,
        }
    }

    /// An answer with every kind of outcome.
    fn every_outcome() -> RetryAnswer {
        let (key, id, revision) = (Key::new("k").unwrap(), VectorId::new("v").unwrap(), Revision(7));
        let blob = Blob { content_type: "text/plain".into(), data: Bytes::from_static(b"hi") };
        let expires_at_ms = NonZeroU64::new(99);
        RetryAnswer {
            retry: Retry { key: "worker\nonce".into(), fingerprint: std::array::from_fn(|at| at as u8) },
            outcomes: smallvec![
                Outcome::Put { key: key.clone(), revision, created: true, expires_at_ms },
                Outcome::Patched {
                    key: key.clone(),
                    revision,
                    created: false,
                    expires_at_ms: None,
                    value: Value::Bytes(Box::new(blob)),
                },
                Outcome::Deleted { key, revision },
                Outcome::Published { revision },
                Outcome::Collection { created: true, revision },
                Outcome::CollectionDeleted { count: 3, revision },
                Outcome::VectorWritten { id: id.clone(), revision, created: true },
                Outcome::VectorDeleted { id: id.clone(), revision },
                Outcome::VectorsDeleted { deleted: 2, missing: vec![id.clone(), id], revision },
            ],
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn records_come_back_as_they_were() {
        let record = specimen();
        let mut bytes = Vec::new();
        encode_record(&record, &mut bytes);
        assert_eq!(decode_record(Revision(7), record.events.len() as u32, &bytes).unwrap(), record);
        let record = Record { answer: Some(Box::new(every_outcome())), ..record };
        let mut bytes = Vec::new();
        encode_record(&record, &mut bytes);
        assert_eq!(decode_record(Revision(7), record.events.len() as u32, &bytes).unwrap(), record);
    }

    #[test]
    fn damaged_records_are_refused_and_never_panic() {
        let mut whole = Vec::new();
        encode_record(&specimen(), &mut whole);
        let record = Record { answer: Some(Box::new(every_outcome())), ..specimen() };
        let mut bytes = Vec::new();
        encode_record(&record, &mut bytes);
        let count = record.events.len() as u32;
        // Cut right behind its events it is a record without an answer.
        for cut in (0..bytes.len()).filter(|cut| *cut != whole.len()) {
            assert!(decode_record(Revision(7), count, &bytes[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                // Any answer but a panic: the frame's checksum is what tells damage.
                decode_record(Revision(7), count, &damaged).ok();
            }
        }
    }

    /// Changing these bytes changes the format: raise the version in `wal.rs` and redraw `docs/format.md`.
    #[test]
    fn the_format_is_pinned() {
        let mut bytes = Vec::new();
        encode_record(&specimen(), &mut bytes);
        assert_eq!(hex(&bytes), include_str!("codec.golden.hex").trim());
    }

    /// The worked example of `docs/format.md` would otherwise drift from the bytes it explains.
    #[test]
    fn the_document_explains_these_very_bytes() {
        let document = include_str!("../../docs/format.md");
        let (_, example) = document.split_once("## Worked example").unwrap();
        let (mut shown, mut at) = (String::new(), 0);
        for row in example.lines().filter(|line| line.contains("| `")) {
            let mut cells = row.split(" | ");
            let offset: usize = cells.next().unwrap().trim_matches(['|', ' ']).parse().unwrap();
            assert_eq!(offset, at, "{row}");
            shown.extend(cells.next().unwrap().chars().filter(char::is_ascii_hexdigit));
            at = shown.len() / 2;
        }
        assert_eq!(shown, include_str!("codec.golden.hex").trim());
    }
}
