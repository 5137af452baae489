//! Keys: put, patch, get, delete, list, and batches over everything.

use super::App;
use super::answer::{Answer, Json, LARGE_BYTES, etag, json};
use super::error::{ApiError, ApiResult, invalid};
use super::extract::{
    BodyType, Head, Object, Params, Payload, aside, body_type, condition, etags, meta, must_be_json, parse_json,
    parse_list, parse_object, path_tail, read_body, read_json, vector,
};
use super::offer;
use super::render::{
    PAGE_BYTES_MAX, decode_cursor, outcome_json, push_deadline, push_list, push_next_cursor, push_outcome,
};
use super::serve::HEAD_BYTES_MAX;
use crate::engine::codec::Entry;
use crate::engine::command::{
    BATCH_OPS_MAX, Blob, CONTENT_TYPE_BYTES_MAX, Command, Condition, EventType, KEY_BYTES_MAX, Key, Labels, Op,
    Outcome, PATCH_BYTES_MAX, Value, VectorWrite, check_ttl,
};
use crate::engine::frame::{push_fmt, push_labels, push_u64, push_value};
use crate::engine::json::{JSON, check_value_depth, compact, present, push_string};
use crate::error::Rejection;
use crate::keys::Right;
use crate::revision::Revision;
use crate::vector::{CollectionName, VectorId};
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::IntoResponse;
use base64::Engine as _;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::sync::Arc;

/// Where keys begin in the path.
pub const PREFIX: &str = "/v1/state/";

/// `job_id` and `tags` as clients send them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetaBody {
    job_id: Option<String>,
    #[serde(default)]
    tags: Option<Vec<String>>,
}

impl MetaBody {
    /// Checks the limits.
    pub fn labels(self) -> Result<Option<Box<Labels>>, Rejection> {
        Labels::new(self.job_id.as_deref(), &self.tags.unwrap_or_default())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PutBody<'a> {
    #[serde(borrow)]
    value: &'a RawValue,
    ttl_ms: Option<u64>,
    if_revision: Option<Revision>,
    meta: Option<Object<MetaBody>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeleteBody {
    if_revision: Option<Revision>,
}

fn key_of(uri: &Uri) -> ApiResult<Key> {
    Ok(Key::new(&path_tail(uri, PREFIX)?)?)
}

/// Appends an entry's JSON object.
pub fn push_entry(out: &mut String, key: &str, entry: &Entry, include_value: bool) {
    out.push_str("{\"key\":");
    push_string(out, key);
    if include_value {
        out.push(',');
        push_value(out, &entry.value);
    }
    push_behind_value(out, entry);
}

fn push_behind_value(out: &mut String, entry: &Entry) {
    out.push_str(",\"revision\":");
    push_u64(out, entry.revision.0);
    out.push_str(",\"created_revision\":");
    push_u64(out, entry.created_revision.0);
    push_deadline(out, entry.expires_at_ms);
    push_labels(out, entry.labels.as_deref());
    out.push('}');
}

/// The same in pieces, for a large value of JSON: its text is not copied.
fn entry_pieces(key: &str, entry: &Arc<Entry>) -> [Bytes; 3] {
    let mut before = String::from("{\"key\":");
    push_string(&mut before, key);
    before.push_str(",\"value\":");
    let mut behind = String::new();
    push_behind_value(&mut behind, entry);
    [before.into(), Bytes::from_owner(Held(Arc::clone(entry))), behind.into()]
}

/// What a key holds, shared with the state rather than copied.
struct Held(Arc<Entry>);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        match &self.0.value {
            Value::Json(text) => text.as_bytes(),
            Value::Bytes(blob) => &blob.data,
        }
    }
}

async fn commit_one(app: &App, head: &Head, body: &[u8], op: Op) -> ApiResult {
    let command = Command::one(op);
    let _room = app.answers.room(app.engine.patched_bytes(&command))?;
    let committed = app.commit(head, body, command).await?;
    let outcome = &committed.outcomes[0];
    let status = match outcome {
        Outcome::Put { created: true, .. } | Outcome::Patched { created: true, .. } => StatusCode::CREATED,
        _ => StatusCode::OK,
    };
    let body = outcome_json(outcome);
    // What is gone has no tag.
    let revision = Some(committed.last_revision).filter(|_| !matches!(outcome, Outcome::Deleted { .. }));
    Ok(Answer::Json(Json { status, body, revision }))
}

/// `PUT /v1/state/{key}`
pub async fn put(State(app): State<App>, head: Head, body: Payload) -> ApiResult {
    let Head { uri, headers, .. } = &head;
    let key = key_of(uri)?;
    let content_type = match body_type(headers)? {
        BodyType::Json => return put_json(&app, key, &head, body).await,
        BodyType::MergePatch => "application/merge-patch+json".to_owned(),
        BodyType::Other(content_type) => content_type,
    };
    let params = Params::parse(uri, &["ttl_ms", "if_revision", "job_id", "tag"])?;
    if content_type.len() > CONTENT_TYPE_BYTES_MAX {
        return Err(invalid(format!("the Content-Type is longer than {CONTENT_TYPE_BYTES_MAX} bytes")));
    }
    let tags: Vec<&str> = params.all("tag").collect();
    let data = read_body(headers, body, app.max_body_bytes).await?;
    // A small body is a part of what came with it, head or buffer, and kept as such it would keep all of that.
    let kept = if data.len() <= HEAD_BYTES_MAX { Bytes::copy_from_slice(&data) } else { data.clone() };
    let op = Op::Put {
        key,
        ttl_ms: params.number("ttl_ms")?.map(check_ttl).transpose()?,
        labels: Labels::new(params.one("job_id")?, &tags)?,
        condition: condition(headers, params.revision("if_revision")?)?,
        value: Value::Bytes(Box::new(Blob { content_type: content_type.into(), data: kept })),
    };
    commit_one(&app, &head, &data, op).await
}

async fn put_json(app: &App, key: Key, head: &Head, body: Payload) -> ApiResult {
    let Head { uri, headers, .. } = head;
    Params::parse(uri, &[])?;
    let bytes = read_body(headers, body, app.max_body_bytes).await?;
    let body: PutBody<'_> = parse_object(&bytes)?;
    let op = Op::Put {
        key,
        value: Value::Json(compact(body.value.get()).into()),
        ttl_ms: body.ttl_ms.map(check_ttl).transpose()?,
        labels: body.meta.map_or(Ok(None), |meta| meta.0.labels())?,
        condition: condition(headers, body.if_revision)?,
    };
    commit_one(app, head, &bytes, op).await
}

/// `PATCH /v1/state/{key}`
pub async fn patch(State(app): State<App>, head: Head, body: Payload) -> ApiResult {
    let Head { uri, headers, .. } = &head;
    let key = key_of(uri)?;
    let params = Params::parse(uri, &["ttl_ms", "if_revision"])?;
    if let BodyType::Other(_) = body_type(headers)? {
        return Err(ApiError::UnsupportedMediaType(
            "of Content-Type: application/merge-patch+json or application/json",
        ));
    }
    let bytes = read_body(headers, body, app.max_body_bytes.min(PATCH_BYTES_MAX)).await?;
    let patch: &RawValue = parse_json(&bytes)?;
    let op = Op::Patch {
        key,
        patch: compact(patch.get()).into(),
        ttl_ms: params.number("ttl_ms")?.map(check_ttl).transpose()?,
        condition: condition(headers, params.revision("if_revision")?)?,
    };
    commit_one(&app, &head, &bytes, op).await
}

/// `GET /v1/state/{key}`
pub async fn get(State(app): State<App>, head: Head) -> ApiResult {
    let Head { uri, headers, .. } = &head;
    let key = path_tail(uri, PREFIX)?;
    Key::check(&key)?;
    head.need_key(Right::Read, &key)?;
    let params = Params::parse(uri, &["raw"])?;
    let is_raw = params.flag("raw")?;
    let entry = app.engine.get(&key).ok_or_else(|| Rejection::KeyNotFound(key.to_string()))?;
    let actual = entry.revision;
    if etags(headers, &header::IF_MATCH)?.is_some_and(|tags| !tags.matches(actual)) {
        return Err(Rejection::PreconditionFailed { actual }.into());
    }
    if etags(headers, &header::IF_NONE_MATCH)?.is_some_and(|tags| tags.matches(entry.revision)) {
        // Without a type: a cache would take it for the value's, which may be any.
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag(entry.revision))]).into_response().into());
    }
    if !is_raw {
        if matches!(&entry.value, Value::Json(text) if text.len() > LARGE_BYTES) {
            return Ok(Answer::pieces(entry_pieces(&key, &entry), entry.revision));
        }
        // Bytes grow by a third, as base64.
        let _room = app.answers.room(entry.value.len() / 3 * 4)?;
        let mut out = String::with_capacity(128 + key.len() + entry.value.len());
        aside(entry.value.len(), || push_entry(&mut out, &key, &entry, true));
        return Ok(Answer::Json(Json { status: StatusCode::OK, body: out, revision: Some(entry.revision) }));
    }
    let content_type = match &entry.value {
        Value::Json(_) => HeaderValue::from_static(JSON),
        // It came in as a header value, so it is one.
        Value::Bytes(blob) => {
            HeaderValue::from_str(&blob.content_type).unwrap_or(HeaderValue::from_static("application/octet-stream"))
        }
    };
    let headers = [
        (header::ETAG, etag(entry.revision)),
        (header::CONTENT_TYPE, content_type),
        // Stored bytes are somebody's upload: a browser must neither guess their type nor run them here.
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox")),
    ];
    Ok((headers, Bytes::from_owner(Held(entry))).into_response().into())
}

/// `DELETE /v1/state/{key}`
pub async fn delete(State(app): State<App>, head: Head, body: Payload) -> ApiResult {
    let Head { uri, headers, .. } = &head;
    let key = key_of(uri)?;
    let params = Params::parse(uri, &["if_revision"])?;
    let asked = params.revision("if_revision")?;
    let bytes = read_body(headers, body, app.max_body_bytes).await?;
    let mut body = DeleteBody::default();
    if !bytes.is_empty() {
        // A condition in the body that was overlooked would delete what its sender wants to keep.
        must_be_json(headers)?;
        body = parse_object(&bytes)?;
    }
    if asked.is_some() && body.if_revision.is_some() {
        return Err(invalid("give if_revision in the query or in the body, not in both"));
    }
    let condition = condition(headers, asked.or(body.if_revision))?;
    commit_one(&app, &head, &bytes, Op::Delete { key, condition }).await
}

/// `GET /v1/state`
pub async fn list(State(app): State<App>, head: Head) -> ApiResult {
    let params = Params::parse(&head.uri, &["prefix", "limit", "cursor", "keys_only"])?;
    let prefix = params.one("prefix")?.unwrap_or_default();
    head.need_key(Right::Read, prefix)?;
    if prefix.len() > KEY_BYTES_MAX {
        return Err(invalid(format!("prefix is at most {KEY_BYTES_MAX} bytes")));
    }
    let limit = usize::try_from(params.number_in("limit", 1..=1000, 100)?).unwrap_or(1000);
    let after = params.one("cursor")?.filter(|cursor| !cursor.is_empty()).map(decode_cursor).transpose()?;
    let keys_only = params.flag("keys_only")?;
    let (items, mut has_more, revision) = app.engine.list(prefix, after.as_deref(), limit);
    let bytes = if keys_only { 0 } else { items.iter().map(|(_, entry)| entry.value.len()).sum() };
    let _room = app.answers.room(bytes.min(PAGE_BYTES_MAX))?;
    let mut out = String::from("{\"items\":[");
    let mut last = None;
    aside(bytes, || {
        for (key, entry) in &items {
            if out.len() > PAGE_BYTES_MAX {
                has_more = true;
                break;
            }
            if last.is_some() {
                out.push(',');
            }
            push_entry(&mut out, key.as_str(), entry, !keys_only);
            last = Some(key.as_str());
        }
    });
    out.push_str("],");
    push_next_cursor(&mut out, last.filter(|_| has_more));
    push_fmt(&mut out, format_args!(",\"revision\":{revision}}}"));
    Ok(json(StatusCode::OK, out))
}

/// One operation as clients send it: every field of every kind, because a tagged enum would re-parse values into
/// numbers. Which fields an operation takes is checked after.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchOp<'a> {
    op: &'a str,
    key: Option<String>,
    #[serde(borrow, default, deserialize_with = "present")]
    value: Option<&'a RawValue>,
    value_base64: Option<String>,
    content_type: Option<String>,
    #[serde(borrow, default, deserialize_with = "present")]
    patch: Option<&'a RawValue>,
    ttl_ms: Option<u64>,
    if_revision: Option<Revision>,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
    #[serde(rename = "type")]
    event_type: Option<String>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    collection: Option<String>,
    id: Option<String>,
    #[serde(borrow)]
    vector: Option<&'a RawValue>,
    vector_base64: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchBody<'a> {
    #[serde(borrow)]
    ops: Vec<Object<BatchOp<'a>>>,
}

/// What an operation asks to be stored, compact.
fn stored(raw: &RawValue) -> Result<Box<str>, Rejection> {
    check_value_depth(raw.get())?;
    Ok(compact(raw.get()).into())
}

impl BatchOp<'_> {
    fn refuse_fields_but(&self, taken: &[&str]) -> Result<(), Rejection> {
        let given = [
            ("key", self.key.is_some()),
            ("value", self.value.is_some()),
            ("value_base64", self.value_base64.is_some()),
            ("content_type", self.content_type.is_some()),
            ("patch", self.patch.is_some()),
            ("ttl_ms", self.ttl_ms.is_some()),
            ("if_revision", self.if_revision.is_some()),
            ("meta", self.meta.is_some()),
            ("type", self.event_type.is_some()),
            ("data", self.data.is_some()),
            ("collection", self.collection.is_some()),
            ("id", self.id.is_some()),
            ("vector", self.vector.is_some()),
            ("vector_base64", self.vector_base64.is_some()),
        ];
        match given.iter().find(|(name, is_given)| *is_given && !taken.contains(name)) {
            Some((name, _)) => {
                Err(Rejection::invalid(format!("{} takes no field {name}; it takes {}", self.op, taken.join(", "))))
            }
            None => Ok(()),
        }
    }

    fn need<T>(&self, field: Option<T>, name: &str) -> Result<T, Rejection> {
        field.ok_or_else(|| Rejection::invalid(format!("{} needs the field {name}", self.op)))
    }

    fn labels(&self) -> Result<Option<Box<Labels>>, Rejection> {
        let Some(raw) = self.meta else { return Ok(None) };
        let meta: Object<MetaBody> =
            serde_json::from_str(raw.get()).map_err(|e| Rejection::invalid(format!("meta: {e}")))?;
        meta.0.labels()
    }

    fn value(&self) -> Result<Value, Rejection> {
        match (&self.value, &self.value_base64) {
            (Some(raw), None) => {
                if self.content_type.is_some() {
                    return Err(Rejection::invalid("content_type goes with value_base64"));
                }
                stored(raw).map(Value::Json)
            }
            (None, Some(text)) => {
                let content_type = self.content_type.as_deref().unwrap_or("application/octet-stream");
                let is_ascii = content_type.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
                if content_type.is_empty() || content_type.len() > CONTENT_TYPE_BYTES_MAX || !is_ascii {
                    return Err(Rejection::invalid(format!(
                        "content_type is 1 to {CONTENT_TYPE_BYTES_MAX} bytes of printable ASCII"
                    )));
                }
                let data = base64::engine::general_purpose::STANDARD
                    .decode(text)
                    .map_err(|_| Rejection::invalid("value_base64 is not standard base64 with padding"))?;
                Ok(Value::Bytes(Box::new(Blob { content_type: content_type.into(), data: data.into() })))
            }
            _ => Err(Rejection::invalid("put needs value or value_base64, one of them")),
        }
    }

    fn parse(self) -> Result<Op, Rejection> {
        let write = match self.op {
            "vector_add" => VectorWrite::Add,
            "vector_upsert" => VectorWrite::Upsert,
            "vector_update" => VectorWrite::Update,
            _ => return self.parse_other(),
        };
        self.refuse_fields_but(&["collection", "id", "vector", "vector_base64", "meta", "if_revision"])?;
        Ok(Op::WriteVector {
            write,
            collection: CollectionName::new(self.need(self.collection.as_deref(), "collection")?)?,
            id: VectorId::new(self.need(self.id.as_deref(), "id")?)?,
            vector: vector(self.vector, self.vector_base64.as_deref())?,
            meta: meta(self.meta)?,
            if_revision: self.if_revision,
        })
        .and_then(super::vectors::check_write)
    }

    fn parse_other(self) -> Result<Op, Rejection> {
        let key = |op: &Self| Key::new(op.need(op.key.as_deref(), "key")?);
        let condition = Condition { if_revision: self.if_revision, ..Condition::default() };
        match self.op {
            "put" => {
                self.refuse_fields_but(&[
                    "key",
                    "value",
                    "value_base64",
                    "content_type",
                    "ttl_ms",
                    "if_revision",
                    "meta",
                ])?;
                Ok(Op::Put {
                    key: key(&self)?,
                    value: self.value()?,
                    ttl_ms: self.ttl_ms.map(check_ttl).transpose()?,
                    labels: self.labels()?,
                    condition,
                })
            }
            "patch" => {
                self.refuse_fields_but(&["key", "patch", "value", "ttl_ms", "if_revision"])?;
                if self.patch.is_some() && self.value.is_some() {
                    return Err(Rejection::invalid("patch takes the merge patch in the field patch; leave out value"));
                }
                let patch = self.need(self.patch.or(self.value), "patch")?;
                if patch.get().len() > PATCH_BYTES_MAX {
                    return Err(Rejection::PayloadTooLarge { what: "a patch", limit_bytes: PATCH_BYTES_MAX });
                }
                Ok(Op::Patch {
                    key: key(&self)?,
                    patch: stored(patch)?,
                    ttl_ms: self.ttl_ms.map(check_ttl).transpose()?,
                    condition,
                })
            }
            "delete" => {
                self.refuse_fields_but(&["key", "if_revision"])?;
                Ok(Op::Delete { key: key(&self)?, condition })
            }
            "event" => {
                self.refuse_fields_but(&["type", "data", "key", "meta"])?;
                Ok(Op::Event {
                    event_type: EventType::new(self.need(self.event_type.as_deref(), "type")?)?,
                    key: self.key.as_deref().map(Key::new).transpose()?,
                    data: self.data.map(stored).transpose()?,
                    labels: self.labels()?,
                })
            }
            "vector_delete" => {
                self.refuse_fields_but(&["collection", "id", "if_revision"])?;
                Ok(Op::DeleteVector {
                    collection: CollectionName::new(self.need(self.collection.as_deref(), "collection")?)?,
                    id: VectorId::new(self.need(self.id.as_deref(), "id")?)?,
                    if_revision: self.if_revision,
                })
            }
            other => Err(Rejection::invalid(format!(
                "unknown op {other:?}; there are put, patch, delete, event, vector_add, vector_upsert, vector_update, vector_delete"
            ))),
        }
    }
}

/// `POST /v1/batch`
pub async fn batch(State(app): State<App>, head: Head, body: Payload) -> ApiResult {
    Params::parse(&head.uri, &[])?;
    let bytes = read_json(&head.headers, body, app.max_body_bytes).await?;
    let body: BatchBody<'_> = parse_list::<_, BatchOp<'_>>(&bytes, "ops")?;
    if body.ops.is_empty() || body.ops.len() > BATCH_OPS_MAX {
        return Err(invalid(format!("a batch has 1 to {BATCH_OPS_MAX} ops, this one has {}", body.ops.len())));
    }
    let parse = |(index, Object(op)): (usize, Object<BatchOp<'_>>)| {
        let text = op.vector.map_or(0, |raw| raw.get().len()) + op.vector_base64.as_ref().map_or(0, String::len);
        let parsed = op.parse().map_err(|e| e.at(index));
        offer::note_parsed(text);
        parsed
    };
    let ops: Result<Vec<Op>, Rejection> = aside(bytes.len(), || body.ops.into_iter().enumerate().map(parse).collect());
    let command = Command::batch(ops?);
    let _room = app.answers.room(app.engine.patched_bytes(&command))?;
    let committed = app.commit(&head, &bytes, command).await?;
    let mut out = String::from("{\"results\":[");
    push_list(&mut out, &committed.outcomes, push_outcome);
    push_fmt(
        &mut out,
        format_args!(
            "],\"first_revision\":{},\"last_revision\":{}}}",
            committed.first_revision, committed.last_revision
        ),
    );
    Ok(json(StatusCode::OK, out))
}
