//! What is imported: rows of a file, whatever its format, one at a time.

use super::{content_type as content_type_of_bytes, path, query, usage};
use crate::engine::frame::push_fmt;
use crate::engine::json::{JSON, present, push_string};
use crate::npy;
use crate::vector::DIM_MAX;
use anyhow::{Context, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::io::{BufRead, ErrorKind};

/// Text of a value from which on it is sent by itself: well above a batch.
const LARGE_BYTES: usize = 16 << 20;

/// What a row asks for.
#[derive(Debug)]
pub enum Row {
    /// A collection of this shape should exist.
    Collection {
        /// Its name.
        name: String,
        /// Numbers in a vector.
        dim: usize,
        /// `cosine`, `dot` or `l2`.
        metric: String,
    },
    /// An operation of `POST /v1/batch` on a key.
    Key(String),
    /// A value so large that only a `PUT` of its own may hold it.
    Large {
        /// Path and query.
        target: String,
        /// What the body is.
        content_type: String,
        /// The request's body.
        body: Vec<u8>,
    },
    /// A key that has expired since: nothing to do.
    Expired,
    /// An operation on a vector.
    Vector {
        /// Where it goes.
        collection: String,
        /// Its numbers, when the row tells.
        dim: Option<usize>,
        /// The operation.
        op: String,
    },
}

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Lines of JSON.
    Ndjson,
    /// NumPy's.
    Npy,
    /// Each row its length as i32, then so many f32 (corpus-texmex.irisa.fr).
    Fvecs,
}

/// Rows that come from nowhere but numbers get their names here.
#[derive(Clone, Debug)]
pub struct Naming {
    /// The collection of rows that name none.
    pub collection: Option<String>,
    /// What ids begin with, before the row's number.
    pub ids: String,
    /// The first row's number.
    pub first_id: u64,
}

/// A file's rows, in order.
pub struct Rows<R> {
    file: R,
    format: Format,
    header: Option<npy::Header>,
    naming: Naming,
    /// Rows read.
    pub read: u64,
    /// Bytes of them.
    pub bytes: u64,
    buffer: Vec<u8>,
}

/// A line: a key, a vector or a collection, as `export` writes them. Revisions, which the server gives out by itself, are ignored.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    #[serde(borrow)]
    key: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present")]
    value: Option<&'a RawValue>,
    #[serde(borrow)]
    value_base64: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content_type: Option<Cow<'a, str>>,
    expires_at_ms: Option<u64>,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
    #[serde(borrow)]
    collection: Option<Cow<'a, str>>,
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    vector: Option<&'a RawValue>,
    #[serde(borrow)]
    vector_base64: Option<Cow<'a, str>>,
    dim: Option<usize>,
    #[serde(borrow)]
    metric: Option<Cow<'a, str>>,
    #[serde(rename = "revision")]
    _revision: Option<IgnoredAny>,
    #[serde(rename = "created_revision")]
    _created_revision: Option<IgnoredAny>,
}

impl<R: BufRead> Rows<R> {
    /// Reads the header, where there is one.
    pub fn open(mut file: R, format: Format, naming: Naming) -> anyhow::Result<Self> {
        let header = (format == Format::Npy).then(|| npy::Header::read(&mut file)).transpose()?;
        if let Some(npy::Header { width, .. }) = &header {
            ensure!((1..=DIM_MAX).contains(width), "its rows have {width} numbers: a vector has 1 to {DIM_MAX}");
        }
        if format != Format::Ndjson && naming.collection.is_none() {
            return Err(usage("vectors alone do not say where they belong: give --collection"));
        }
        Ok(Self { file, format, header, naming, read: 0, bytes: 0, buffer: Vec::new() })
    }

    /// The next row; `None` at the end. `now_ms` tells what is left of a deadline.
    pub fn next(&mut self, now_ms: u64) -> anyhow::Result<Option<Row>> {
        if !self.fill()? {
            return Ok(None);
        }
        self.read += 1;
        self.bytes += self.buffer.len() as u64;
        let row = match self.format {
            Format::Ndjson => self.line(now_ms),
            Format::Npy | Format::Fvecs => self.numbers(),
        };
        // Wrong usage: the system had no part in it.
        row.map(Some).map_err(|error| usage(format!("row {}: {error:#}", self.read)))
    }

    /// Passes over the next row without looking into it; false at the end.
    pub fn skip(&mut self) -> anyhow::Result<bool> {
        let is_there = self.fill()?;
        self.read += u64::from(is_there);
        self.bytes += self.buffer.len() as u64;
        Ok(is_there)
    }

    /// Gets the next row's bytes into the buffer.
    fn fill(&mut self) -> anyhow::Result<bool> {
        self.buffer.clear();
        let row_bytes = match (self.format, &self.header) {
            (Format::Ndjson, _) => {
                // Empty lines are nobody's rows.
                while self.buffer.trim_ascii().is_empty() {
                    self.buffer.clear();
                    if self.file.read_until(b'\n', &mut self.buffer)? == 0 {
                        return Ok(false);
                    }
                }
                return Ok(true);
            }
            (_, Some(header)) => {
                if self.read == header.rows as u64 {
                    return Ok(false);
                }
                header.width * header.item_bytes
            }
            (_, None) => {
                let mut dim = [0; 4];
                match self.file.read_exact(&mut dim[..1]) {
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(false),
                    other => other?,
                }
                self.file.read_exact(&mut dim[1..]).context("the file ends within a row")?;
                let dim = usize::try_from(i32::from_le_bytes(dim)).unwrap_or(0);
                ensure!((1..=DIM_MAX).contains(&dim), "row {}: {dim} numbers", self.read + 1);
                dim * size_of::<f32>()
            }
        };
        self.buffer.resize(row_bytes, 0);
        self.file
            .read_exact(&mut self.buffer)
            .with_context(|| format!("the file ends within row {}", self.read + 1))?;
        Ok(true)
    }

    fn numbers(&self) -> anyhow::Result<Row> {
        let number = self.naming.first_id + self.read - 1;
        let collection = self.naming.collection.clone().unwrap_or_default();
        let mut op = upsert(&collection, &format!("{}{number}", self.naming.ids));
        op.push_str(",\"vector_base64\":\"");
        let dim = match &self.header {
            Some(header) if header.descr != "<f4" => {
                let floats = header.floats(&self.buffer)?;
                BASE64.encode_string(bytemuck::cast_slice::<f32, u8>(&floats), &mut op);
                header.width
            }
            _ => {
                BASE64.encode_string(&self.buffer, &mut op);
                self.buffer.len() / size_of::<f32>()
            }
        };
        op.push_str("\"}");
        Ok(Row::Vector { collection, dim: Some(dim), op })
    }

    /// The line without space around it, and without the mark that some programs begin a file of UTF-8 with.
    fn text(&self) -> &[u8] {
        let line = self.buffer.strip_prefix(b"\xef\xbb\xbf").filter(|_| self.read == 1).unwrap_or(&self.buffer);
        line.trim_ascii()
    }

    fn line(&self, now_ms: u64) -> anyhow::Result<Row> {
        let line: Line<'_> = serde_json::from_slice(self.text()).context("not a row of JSON")?;
        if let Some(key) = &line.key {
            return key_row(key, &line, now_ms);
        }
        let collection = line.collection.as_deref().or(self.naming.collection.as_deref());
        let collection =
            collection.context("neither a key nor a collection; give --collection for vectors")?.to_owned();
        let Some(id) = &line.id else {
            let (Some(dim), Some(metric)) = (line.dim, &line.metric) else {
                bail!("a collection's row has dim and metric, a vector's an id");
            };
            return Ok(Row::Collection { name: collection, dim, metric: metric.to_string() });
        };
        let mut op = upsert(&collection, id);
        let dim = match (line.vector, &line.vector_base64) {
            (Some(_), Some(_)) => bail!("a vector's row has vector or vector_base64, not both"),
            (Some(vector), None) => {
                push_fmt(&mut op, format_args!(",\"vector\":{}", vector.get()));
                // Numbers have no commas of their own.
                Some(vector.get().bytes().filter(|&b| b == b',').count() + 1)
            }
            (None, Some(data)) => {
                op.push_str(",\"vector_base64\":");
                push_string(&mut op, data);
                Some(BASE64.decode(data.as_bytes()).context("vector_base64")?.len() / size_of::<f32>())
            }
            (None, None) => bail!("a vector's row has vector or vector_base64"),
        };
        if let Some(meta) = line.meta {
            push_fmt(&mut op, format_args!(",\"meta\":{}", meta.get()));
        }
        op.push('}');
        Ok(Row::Vector { collection, dim, op })
    }
}

/// The beginning of an operation.
fn upsert(collection: &str, id: &str) -> String {
    let mut op = String::from("{\"op\":\"vector_upsert\",\"collection\":");
    push_string(&mut op, collection);
    op.push_str(",\"id\":");
    push_string(&mut op, id);
    op
}

fn key_row(key: &str, line: &Line<'_>, now_ms: u64) -> anyhow::Result<Row> {
    if let Some(row) = large_row(key, line, now_ms)? {
        return Ok(row);
    }
    let mut op = String::from("{\"op\":\"put\",\"key\":");
    push_string(&mut op, key);
    match (line.value, &line.value_base64) {
        (Some(_), Some(_)) => bail!("a key's row has value or value_base64, not both"),
        (Some(value), None) => push_fmt(&mut op, format_args!(",\"value\":{}", value.get())),
        (None, Some(data)) => {
            op.push_str(",\"value_base64\":");
            push_string(&mut op, data);
            if let Some(content_type) = &line.content_type {
                op.push_str(",\"content_type\":");
                push_string(&mut op, content_type);
            }
        }
        (None, None) => bail!("a key's row has value or value_base64"),
    }
    if !push_rest(&mut op, line, now_ms) {
        return Ok(Row::Expired);
    }
    Ok(Row::Key(op))
}

/// Ends what puts a key; false when it has expired.
fn push_rest(out: &mut String, line: &Line<'_>, now_ms: u64) -> bool {
    if let Some(expires_at_ms) = line.expires_at_ms {
        let Some(ttl_ms) = ttl_ms(expires_at_ms, now_ms) else { return false };
        push_fmt(out, format_args!(",\"ttl_ms\":{ttl_ms}"));
    }
    if let Some(meta) = line.meta {
        push_fmt(out, format_args!(",\"meta\":{}", meta.get()));
    }
    out.push('}');
    true
}

/// What is left of a deadline.
fn ttl_ms(expires_at_ms: u64, now_ms: u64) -> Option<u64> {
    expires_at_ms.checked_sub(now_ms).filter(|ms| *ms > 0)
}

/// The row as a request of its own, where it is large and can be one: bytes take a third more in a batch, and a server takes
/// values up to its limit for bodies.
fn large_row(key: &str, line: &Line<'_>, now_ms: u64) -> anyhow::Result<Option<Row>> {
    let target = || path("/v1/state/", key);
    match (line.value, &line.value_base64) {
        (Some(value), None) if value.get().len() >= LARGE_BYTES => {
            let mut body = format!("{{\"value\":{}", value.get());
            if !push_rest(&mut body, line, now_ms) {
                return Ok(Some(Row::Expired));
            }
            Ok(Some(Row::Large { target: target(), content_type: JSON.to_owned(), body: body.into() }))
        }
        (None, Some(data)) if data.len() >= LARGE_BYTES => {
            let content_type = line.content_type.as_deref().unwrap_or("application/octet-stream");
            let Ok(content_type) = content_type_of_bytes(content_type) else { return Ok(None) };
            let ttl_ms = match line.expires_at_ms.map(|at| ttl_ms(at, now_ms)) {
                Some(None) => return Ok(Some(Row::Expired)),
                ttl_ms => ttl_ms.flatten(),
            };
            let meta = line.meta.map(|meta| serde_json::from_str::<Meta>(meta.get())).transpose().context("meta")?;
            let Meta { job_id, tags } = meta.unwrap_or_default();
            let parts = [("ttl_ms", ttl_ms.map(|ms| ms.to_string())), ("job_id", job_id)];
            let query = query(parts.into_iter().chain(tags.into_iter().map(|tag| ("tag", Some(tag)))));
            let body = BASE64.decode(data.as_bytes()).context("value_base64")?;
            Ok(Some(Row::Large { target: target() + &query, content_type, body }))
        }
        _ => Ok(None),
    }
}

/// A key's labels.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    job_id: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(bytes: &[u8], format: Format) -> Rows<&[u8]> {
        let naming = Naming { collection: Some("c".into()), ids: "v".into(), first_id: 7 };
        Rows::open(bytes, format, naming).unwrap()
    }

    #[test]
    fn lines_become_what_the_server_takes() {
        for (line, expected) in [
            (r#"{"key":"a","value":null,"revision":9}"#, r#"Key("{\"op\":\"put\",\"key\":\"a\",\"value\":null}")"#),
            (
                r#"{"key":"a","value":1.0e2,"expires_at_ms":1500}"#,
                r#"Key("{\"op\":\"put\",\"key\":\"a\",\"value\":1.0e2,\"ttl_ms\":500}")"#,
            ),
            (r#"{"key":"a","value":1,"expires_at_ms":1000}"#, "Expired"),
            (r#"{"collection":"d","dim":3,"metric":"l2"}"#, r#"Collection { name: "d", dim: 3, metric: "l2" }"#),
            (
                r#"{"id":"x","vector":[1,2.50],"meta":{"a":1}}"#,
                r#"Vector { collection: "c", dim: Some(2), op: "{\"op\":\"vector_upsert\",\"collection\":\"c\",\"id\":\"x\",\"vector\":[1,2.50],\"meta\":{\"a\":1}}" }"#,
            ),
        ] {
            let row = rows(line.as_bytes(), Format::Ndjson).next(1000).unwrap().unwrap();
            assert_eq!(format!("{row:?}"), expected, "{line}");
        }
    }

    #[test]
    fn wrong_rows_are_refused_with_their_number() {
        for (bytes, format) in [
            (&b"{\"key\":\"a\",\"value\":1}\n\n{\"key\":\"b\"}\n"[..], Format::Ndjson),
            (b"{\"key\":\"a\",\"value\":1}\nnonsense\n", Format::Ndjson),
            (b"\xef\xbb\xbf{\"key\":\"a\",\"value\":1}\n{\"key\":\"a\",\"value\":1,\"ttl_ms\":5}\n", Format::Ndjson),
            (b"{\"key\":\"a\",\"value\":1}\n{\"key\":\"a\",\"value\":1,\"value_base64\":\"\"}\n", Format::Ndjson),
            (b"{\"key\":\"a\",\"value\":1}\n{\"id\":\"a\",\"vector\":[1],\"vector_base64\":\"\"}\n", Format::Ndjson),
            (b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0", Format::Fvecs),
        ] {
            let mut rows = rows(bytes, format);
            assert!(rows.next(0).unwrap().is_some());
            let error = format!("{:#}", rows.next(0).unwrap_err());
            assert!(error.contains("row 2"), "{error}");
        }
    }

    #[test]
    fn a_file_of_vectors_that_are_none_is_refused_before_there_is_room_for_one() {
        let dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 99999999999), }\n";
        let bytes = [npy::MAGIC, &[1, 0, dict.len() as u8, 0], dict.as_bytes()].concat();
        let naming = Naming { collection: Some("c".into()), ids: String::new(), first_id: 0 };
        let error = Rows::open(&bytes[..], Format::Npy, naming).err().unwrap().to_string();
        assert!(error.contains("99999999999 numbers"), "{error}");
    }

    #[test]
    fn fvecs_and_npy_give_the_same_vectors() {
        let numbers: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|n| n.to_le_bytes()).collect();
        let fvecs = [&2i32.to_le_bytes()[..], &numbers].concat();
        let dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }\n";
        let npy = [npy::MAGIC, &[1, 0, dict.len() as u8, 0], dict.as_bytes(), &numbers].concat();
        let mut seen = Vec::new();
        for (bytes, format) in [(fvecs, Format::Fvecs), (npy, Format::Npy)] {
            let mut rows = rows(&bytes, format);
            seen.push(format!("{:?}", rows.next(0).unwrap().unwrap()));
            assert!(rows.next(0).unwrap().is_none());
        }
        assert_eq!(seen[0], seen[1]);
        assert!(seen[0].contains(r#"\"id\":\"v7\""#), "{}", seen[0]);
    }
}
