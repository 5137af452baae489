//! An event as streams deliver it: what filters look at, and its bytes, rendered once for everybody.

use super::codec::{DeleteReason, Event, Record};
use super::command::{Blob, Labels, Value};
use super::json::push_string;
use crate::revision::Revision;
use crate::vector::{CollectionSpec, Vector};
use base64::Engine as _;
use bytes::Bytes;
use std::fmt::Write as _;
use std::io::Write as _;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// An event as the ring keeps it. Its frame is made when the first stream takes it: of most events nobody wants one.
#[derive(Clone, Debug)]
pub struct Recent {
    /// Its revision; of an ephemeral one, the head when it was published.
    pub revision: Revision,
    /// About how much memory it keeps alive, for the ring's bound. Noted, as what it is summed from is long out of the
    /// processor's caches when the event goes.
    pub weight: usize,
    source: Source,
    frame: OnceLock<Arc<Frame>>,
}

/// One event on its way to streams.
#[derive(Debug)]
pub struct Frame {
    /// As in [`Recent`].
    pub revision: Revision,
    /// As in [`Recent`].
    pub weight: usize,
    source: Source,
    plain: OnceLock<Rendered>,
    with_vector: OnceLock<Rendered>,
}

#[derive(Clone, Debug)]
enum Source {
    /// An event of a record, by its place.
    Logged(Arc<Record>, usize),
    Ephemeral(Arc<Ephemeral>),
}

/// An event that reaches live streams only.
#[derive(Clone, Debug)]
pub struct Ephemeral {
    /// Unix milliseconds.
    pub ts_ms: u64,
    /// Its type.
    pub event_type: Box<str>,
    /// The key it is about.
    pub key: Option<Box<str>>,
    /// The collection it is about.
    pub collection: Option<Box<str>>,
    /// What streams filter by.
    pub labels: Option<Box<Labels>>,
    /// Further members of its JSON object, as text: `"data":1`. May be empty.
    pub members: String,
    /// Whether only streams that name its type get it.
    pub on_request: bool,
}

/// What a filter looks at.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named after the filters")]
pub struct Facets<'a> {
    pub event_type: &'a str,
    pub key: Option<&'a str>,
    pub collection: Option<&'a str>,
    pub labels: Option<&'a Labels>,
    /// Only for streams that name the type.
    pub on_request: bool,
}

fn weight(source: &Source) -> usize {
    const OVERHEAD: usize = 400;
    let Facets { key, labels, .. } = source.facets();
    let labels = labels.map_or(0, |l| l.job_id.iter().chain(&l.tags).map(|label| label.len()).sum());
    OVERHEAD
        + 2 * (key.map_or(0, str::len) + labels)
        + match source {
            Source::Logged(record, at) => match &record.events[*at] {
                // The value is the state's own as long as it is current; what is rendered from it is not.
                Event::StateUpdated { entry, patch, .. } => {
                    2 * entry.value.len() + patch.as_ref().map_or(0, |p| p.len())
                }
                Event::Published { data, .. } => 2 * data.as_ref().map_or(0, |d| d.len()),
                Event::VectorWritten { vector, meta, .. } => {
                    vector.as_ref().map_or(0, |v| v.as_slice().len() * 16) + 2 * meta.text().len()
                }
                _ => 0,
            },
            Source::Ephemeral(event) => 2 * event.members.len(),
        }
}

#[derive(Debug)]
struct Rendered {
    /// The SSE frame as a chunk of an HTTP/1.1 body, and where in it the frame is.
    chunk: Bytes,
    sse: Range<usize>,
    /// Where its JSON begins; it ends before the two newlines.
    json_from: usize,
}

impl Recent {
    /// The events of a record.
    pub fn of_record(record: &Arc<Record>) -> impl Iterator<Item = Self> + '_ {
        (0..record.events.len())
            .map(|at| Self::new(record.first_revision.plus(at as u64), Source::Logged(Arc::clone(record), at)))
    }

    /// An ephemeral event published at `head`.
    #[must_use]
    pub fn ephemeral(event: Ephemeral, head: Revision) -> Self {
        Self::new(head, Source::Ephemeral(Arc::new(event)))
    }

    fn new(revision: Revision, source: Source) -> Self {
        Self { revision, weight: weight(&source), source, frame: OnceLock::new() }
    }

    /// The one frame for all streams.
    #[must_use]
    pub fn frame(&self) -> &Arc<Frame> {
        self.frame.get_or_init(|| {
            let Self { revision, weight, .. } = *self;
            let (plain, with_vector) = (OnceLock::new(), OnceLock::new());
            Arc::new(Frame { revision, weight, source: self.source.clone(), plain, with_vector })
        })
    }

    /// Whether it is in the log.
    #[must_use]
    pub fn is_logged(&self) -> bool {
        self.source.is_logged()
    }

    /// Whether the next event begins a new record.
    #[must_use]
    pub fn ends_record(&self) -> bool {
        match &self.source {
            Source::Logged(record, at) => *at + 1 == record.events.len(),
            Source::Ephemeral(_) => true,
        }
    }

    /// What filters look at.
    #[must_use]
    pub fn facets(&self) -> Facets<'_> {
        self.source.facets()
    }
}

impl Source {
    fn is_logged(&self) -> bool {
        matches!(self, Self::Logged(..))
    }

    fn facets(&self) -> Facets<'_> {
        let facets =
            |event_type, key, collection, labels| Facets { event_type, key, collection, labels, on_request: false };
        match self {
            Self::Ephemeral(event) => Facets {
                event_type: &event.event_type,
                key: event.key.as_deref(),
                collection: event.collection.as_deref(),
                labels: event.labels.as_deref(),
                on_request: event.on_request,
            },
            Self::Logged(record, at) => {
                let event = &record.events[*at];
                let name = type_name(event);
                match event {
                    Event::StateUpdated { key, entry, .. } => {
                        facets(name, Some(key.as_str()), None, entry.labels.as_deref())
                    }
                    Event::StateDeleted { key, labels, .. } => {
                        facets(name, Some(key.as_str()), None, labels.as_deref())
                    }
                    Event::Published { key, labels, .. } => {
                        facets(name, key.as_ref().map(|k| k.as_str()), None, labels.as_deref())
                    }
                    Event::CollectionCreated { collection, .. } | Event::CollectionDeleted { collection, .. } => {
                        facets(name, None, Some(collection.as_str()), None)
                    }
                    Event::VectorWritten { collection, labels, .. }
                    | Event::VectorDeleted { collection, labels, .. } => {
                        facets(name, None, Some(collection.as_str()), labels.as_deref())
                    }
                }
            }
        }
    }
}

impl Frame {
    /// Whether it is in the log.
    #[must_use]
    pub fn is_logged(&self) -> bool {
        self.source.is_logged()
    }

    /// When it was written, in Unix milliseconds.
    #[must_use]
    pub fn ts_ms(&self) -> u64 {
        match &self.source {
            Source::Logged(record, _) => record.ts_ms,
            Source::Ephemeral(event) => event.ts_ms,
        }
    }

    fn rendered(&self, include_vector: bool) -> &Rendered {
        let has_vector = match &self.source {
            Source::Logged(record, at) => matches!(record.events[*at], Event::VectorWritten { vector: Some(_), .. }),
            Source::Ephemeral(_) => false,
        };
        if include_vector && has_vector {
            self.with_vector.get_or_init(|| self.render(true))
        } else {
            self.plain.get_or_init(|| self.render(false))
        }
    }

    /// The SSE frame.
    #[must_use]
    pub fn sse(&self, include_vector: bool) -> &[u8] {
        let rendered = self.rendered(include_vector);
        &rendered.chunk[rendered.sse.clone()]
    }

    /// The same, shared.
    #[must_use]
    pub fn sse_bytes(&self, include_vector: bool) -> Bytes {
        let rendered = self.rendered(include_vector);
        rendered.chunk.slice(rendered.sse.clone())
    }

    /// The SSE frame as a chunk of an HTTP/1.1 body: what a thousand streams send is made once.
    #[must_use]
    pub fn sse_chunk(&self, include_vector: bool) -> &Bytes {
        &self.rendered(include_vector).chunk
    }

    /// The JSON of its `data:` line.
    #[must_use]
    pub fn json(&self, include_vector: bool) -> &str {
        let rendered = self.rendered(include_vector);
        let json = &rendered.chunk[rendered.json_from..rendered.sse.end - 2];
        std::str::from_utf8(json).expect("rendered from text")
    }

    fn render(&self, include_vector: bool) -> Rendered {
        let facets = self.source.facets();
        let mut out = String::with_capacity(256);
        push_fmt(&mut out, format_args!("event: {}\nid: {}\ndata: ", facets.event_type, self.revision));
        let json_from = out.len();
        out.push_str("{\"ts\":");
        push_ts(&mut out, self.ts_ms());
        out.push_str(",\"type\":");
        push_string(&mut out, facets.event_type);
        if let Some(key) = facets.key {
            out.push_str(",\"key\":");
            push_string(&mut out, key);
        }
        if let Some(collection) = facets.collection {
            out.push_str(",\"collection\":");
            push_string(&mut out, collection);
        }
        push_fmt(&mut out, format_args!(",\"revision\":{}", self.revision));
        match &self.source {
            Source::Logged(record, at) => push_members(&mut out, &record.events[*at], include_vector),
            Source::Ephemeral(event) => {
                if !event.members.is_empty() {
                    out.push(',');
                    out.push_str(&event.members);
                }
                push_labels(&mut out, event.labels.as_deref());
            }
        }
        out.push_str("}\n\n");
        let mut chunk = Vec::with_capacity(out.len() + CHUNK_FRAMING_BYTES);
        begin_chunk(&mut chunk, out.len());
        let from = chunk.len();
        chunk.extend_from_slice(out.as_bytes());
        let sse = from..chunk.len();
        chunk.extend_from_slice(END_OF_CHUNK);
        Rendered { chunk: chunk.into(), sse, json_from: from + json_from }
    }
}

/// What ends a chunk of an HTTP/1.1 body.
pub const END_OF_CHUNK: &[u8] = b"\r\n";
/// Most bytes that a chunk has beyond its content.
pub const CHUNK_FRAMING_BYTES: usize = size_of::<usize>() * 2 + 2 * END_OF_CHUNK.len();

/// Appends what a chunk of so many bytes begins with.
pub fn begin_chunk(out: &mut Vec<u8>, length: usize) {
    // Writing to a vector cannot fail.
    write!(out, "{length:x}\r\n").ok();
}

/// Appends formatted text.
pub fn push_fmt(out: &mut String, arguments: std::fmt::Arguments<'_>) {
    out.write_fmt(arguments).expect("writing to a String cannot fail");
}

/// Appends a number; several times faster than formatting it, and every answer has some.
pub fn push_u64(out: &mut String, n: u64) {
    out.push_str(itoa::Buffer::new().format(n));
}

/// Appends Unix seconds with a millisecond fraction.
pub fn push_ts(out: &mut String, ts_ms: u64) {
    push_fmt(out, format_args!("{}.{:03}", ts_ms / 1000, ts_ms % 1000));
}

fn type_name(event: &Event) -> &str {
    match event {
        Event::StateUpdated { .. } => "state_updated",
        Event::StateDeleted { .. } => "state_deleted",
        Event::Published { event_type, .. } => event_type.as_str(),
        Event::CollectionCreated { .. } => "collection_created",
        Event::CollectionDeleted { .. } => "collection_deleted",
        Event::VectorWritten { created: true, .. } => "vector_added",
        Event::VectorWritten { created: false, .. } => "vector_updated",
        Event::VectorDeleted { .. } => "vector_deleted",
    }
}

fn push_members(out: &mut String, event: &Event, include_vector: bool) {
    match event {
        Event::StateUpdated { prev_revision, entry, patch, .. } => {
            push_fmt(out, format_args!(",\"prev_revision\":{prev_revision},"));
            match patch {
                Some(patch) => {
                    out.push_str("\"patch\":");
                    out.push_str(patch);
                }
                None => push_value(out, &entry.value),
            }
            push_labels(out, entry.labels.as_deref());
            if let Some(at) = entry.expires_at_ms {
                push_fmt(out, format_args!(",\"expires_at_ms\":{at}"));
            }
        }
        Event::StateDeleted { prev_revision, reason, .. } => {
            let reason = match reason {
                DeleteReason::Deleted => "deleted",
                DeleteReason::Expired => "expired",
            };
            push_fmt(out, format_args!(",\"prev_revision\":{prev_revision},\"reason\":\"{reason}\""));
        }
        Event::Published { data, labels, .. } => {
            out.push_str(",\"data\":");
            out.push_str(data.as_deref().unwrap_or("null"));
            push_labels(out, labels.as_deref());
        }
        Event::CollectionCreated { spec, .. } | Event::CollectionDeleted { spec, .. } => push_spec(out, *spec),
        Event::VectorWritten { id, vector, meta, .. } => {
            out.push_str(",\"id\":");
            push_string(out, id.as_str());
            if !meta.is_empty() {
                out.push_str(",\"meta\":");
                out.push_str(meta.text());
            }
            if let Some(vector) = vector
                && include_vector
            {
                out.push_str(",\"vector\":");
                push_numbers(out, Vector::as_slice(vector));
            }
        }
        Event::VectorDeleted { id, labels, .. } => {
            out.push_str(",\"id\":");
            push_string(out, id.as_str());
            push_labels(out, labels.as_deref());
        }
    }
}

fn push_spec(out: &mut String, spec: CollectionSpec) {
    push_fmt(out, format_args!(",\"dim\":{},\"metric\":\"{}\"", spec.dim, spec.metric.as_str()));
}

/// Appends `"value":…`, or `"value_base64":…,"content_type":…` for bytes.
pub fn push_value(out: &mut String, value: &Value) {
    match value {
        Value::Json(text) => {
            out.push_str("\"value\":");
            out.push_str(text);
        }
        Value::Bytes(blob) => push_blob(out, blob),
    }
}

fn push_blob(out: &mut String, blob: &Blob) {
    out.push_str("\"value_base64\":\"");
    base64::engine::general_purpose::STANDARD.encode_string(&blob.data, out);
    out.push_str("\",\"content_type\":");
    push_string(out, &blob.content_type);
}

/// Appends `,"meta":{…}` when there are labels.
pub fn push_labels(out: &mut String, labels: Option<&Labels>) {
    let Some(labels) = labels else { return };
    out.push_str(",\"meta\":{");
    if let Some(job_id) = &labels.job_id {
        out.push_str("\"job_id\":");
        push_string(out, job_id);
    }
    if !labels.tags.is_empty() {
        if labels.job_id.is_some() {
            out.push(',');
        }
        out.push_str("\"tags\":[");
        for (at, tag) in labels.tags.iter().enumerate() {
            if at > 0 {
                out.push(',');
            }
            push_string(out, tag);
        }
        out.push(']');
    }
    out.push('}');
}

/// Appends `[1.5,2.0]`.
pub fn push_numbers(out: &mut String, numbers: &[f32]) {
    out.push('[');
    for (at, number) in numbers.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        push_number(out, *number);
    }
    out.push(']');
}

/// Appends the shortest text that reads back as the same float.
pub fn push_number(out: &mut String, number: impl zmij::Float) {
    out.push_str(zmij::Buffer::new().format(number));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_renders_as_one_data_line_of_json() {
        let record = Arc::new(crate::engine::codec::tests::specimen());
        let rendered: Vec<_> = Recent::of_record(&record)
            .map(|event| (event.facets().event_type.to_owned(), Arc::clone(event.frame())))
            .collect();
        for (event_type, frame) in &rendered {
            let sse = std::str::from_utf8(frame.sse(true)).unwrap();
            let lines: Vec<_> = sse.split('\n').collect();
            assert_eq!(lines.len(), 5, "{sse:?}");
            assert_eq!(lines[0], format!("event: {event_type}"));
            assert_eq!(lines[1], format!("id: {}", frame.revision));
            let json: serde_json::Value = serde_json::from_str(frame.json(true)).unwrap();
            assert_eq!(json["type"], **event_type);
            assert_eq!(json["ts"], 1_733_950_000.123);
            assert_eq!(json["revision"], frame.revision.0);
        }
        assert_eq!(
            rendered[0].1.json(false),
            r#"{"ts":1733950000.123,"type":"state_updated","key":"k","revision":7,"prev_revision":0,"patch":{}}"#
        );
        assert_eq!(
            rendered[1].1.json(false),
            r#"{"ts":1733950000.123,"type":"state_updated","key":"é","revision":8,"prev_revision":5,"value_base64":"aGk=","content_type":"text/plain","meta":{"job_id":"j1","tags":["a","b"]},"expires_at_ms":99}"#
        );
        assert!(rendered[6].1.json(true).contains(r#""vector":[1.0,-2.5]"#));
        assert!(!rendered[6].1.json(false).contains("vector\":["));
    }

    #[test]
    fn numbers_read_back_as_the_same_floats() {
        let numbers = [0.1f32, -0.0, 1e-45, -1.5e-7, f32::MAX, 1e16, 16_777_216.0, 123_456.79, 1.0];
        let mut out = String::new();
        push_numbers(&mut out, &numbers);
        let back: Vec<f32> = serde_json::from_str(&out).unwrap();
        assert_eq!(back.iter().map(|n| n.to_bits()).collect::<Vec<_>>(), numbers.map(f32::to_bits));
    }
}
