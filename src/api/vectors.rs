//! Collections and vectors: create, write, delete, get, list, count, search.

use super::App;
use super::answer::json;
use super::error::{ApiError, ApiResult, invalid};
use super::extract::{
    Head, Object, Params, Payload, aside, meta, must_be_json, parse_list, parse_object, read_body, read_json,
    unique_names, vector,
};
use super::offer;
use super::render::{PAGE_BYTES_MAX, decode_cursor, outcome_json, push_list, push_next_cursor, push_outcome};
use crate::engine::Engine;
use crate::engine::collections::SharedCollection;
use crate::engine::command::{Command, Op, Outcome, VectorSelection, VectorWrite};
use crate::engine::frame::{push_fmt, push_number, push_numbers};
use crate::engine::json::{names_no_number, push_string};
use crate::engine::search::{Found, Grouping, Plan, Search, SearchAnswer};
use crate::error::Rejection;
use crate::keys::Right;
use crate::revision::Revision;
use crate::vector::collection::{Item, Query};
use crate::vector::filter::{Filter, parse_path};
use crate::vector::plan::EF_MAX;
use crate::vector::{CollectionName, CollectionSpec, Hit, K_MAX, Metric, OFFSET_MAX, Vector, VectorId, VectorMeta};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::HashSet;

/// Items one request may write or delete: they are one log record.
const ITEMS_MAX: usize = 10_000;
/// Searches in one request.
const QUERIES_MAX: usize = 256;
/// Hits kept in one group.
const GROUP_SIZE_MAX: usize = 100;
/// Searches with `group_by` in one request: each keeps a list for every value it meets.
const GROUPED_MAX: usize = 8;
/// Numbers of vectors one answer may carry (`include_vector`): 10,000,000 are 100 MB of JSON.
const ANSWER_NUMBERS_MAX: usize = 10_000_000;
/// Bytes of vectors and metadata one answer may carry: as much as the numbers are.
const ANSWER_BYTES_MAX: usize = ANSWER_NUMBERS_MAX * NUMBER_BYTES;
/// Text of a number, on average: a digit before the point, eight after it, a comma.
const NUMBER_BYTES: usize = 12;
/// Most scores one request may ask to keep: `queries` times (`offset` + `k`). Bounds memory for a search.
const KEPT_MAX: usize = 500_000;
/// Bytes of a hit beside its id, numbers and metadata.
const HIT_BYTES: usize = 40;

fn name(path: Result<Path<String>, axum::extract::rejection::PathRejection>) -> ApiResult<CollectionName> {
    let Path(text) = path.map_err(|_| invalid("the collection's name in the path is not UTF-8"))?;
    Ok(CollectionName::new(&text)?)
}

type NamePath = Result<Path<String>, axum::extract::rejection::PathRejection>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateBody {
    dim: usize,
    metric: String,
}

/// `POST /v1/vector/{collection}`
pub async fn create(State(app): State<App>, path: NamePath, head: Head, body: Payload) -> ApiResult {
    let collection = name(path)?;
    Params::parse(&head.uri, &[])?;
    let bytes = read_json(&head.headers, body, app.max_body_bytes).await?;
    let body: CreateBody = parse_object(&bytes)?;
    let spec = CollectionSpec::new(body.dim, Metric::parse(&body.metric)?)?;
    let committed =
        app.commit(&head, &bytes, Command::one(Op::CreateCollection { collection: collection.clone(), spec })).await?;
    let Outcome::Collection { created, .. } = committed.outcomes[0] else { return Err(ApiError::Internal) };
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    let mut out = String::new();
    if created {
        // What it was when it was made, also for a client that asks again when it is full, or gone.
        let revision = committed.last_revision;
        let empty = Shape { count: 0, has_graph: false, indexed: 0, memory_bytes: 0, revision };
        push_collection(&mut out, collection.as_str(), spec, &empty);
        return Ok(json(status, out));
    }
    // It may be deleted by now; then say so rather than invent an answer.
    let shared = app.engine.collection(collection.as_str())?;
    if head.need_collection(Right::Read, collection.as_str()).is_err() {
        // As it was made: what it holds by now is for who may read it.
        let revision = shared.created();
        let untold = Shape { count: 0, has_graph: false, indexed: 0, memory_bytes: 0, revision };
        push_collection(&mut out, collection.as_str(), spec, &untold);
        return Ok(json(status, out));
    }
    push_info(&mut out, &app.engine, collection.as_str(), &shared);
    Ok(json(status, out))
}

/// What a collection's object tells besides its name and what it was made as.
struct Shape {
    count: usize,
    has_graph: bool,
    indexed: usize,
    memory_bytes: usize,
    revision: Revision,
}

fn push_collection(out: &mut String, name: &str, spec: CollectionSpec, shape: &Shape) {
    let Shape { count, has_graph, indexed, memory_bytes, revision } = shape;
    let kind = if *has_graph { "graph" } else { "exact" };
    let pending = count.saturating_sub(*indexed);
    out.push_str("{\"collection\":");
    push_string(out, name);
    push_fmt(
        out,
        format_args!(
            ",\"dim\":{},\"metric\":\"{}\",\"count\":{count},\"index\":{{\"kind\":\"{kind}\",\"indexed\":{indexed},\"pending\":{pending}}},\"memory_bytes\":{memory_bytes},\"revision\":{revision}}}",
            spec.dim,
            spec.metric.as_str()
        ),
    );
}

fn push_info(out: &mut String, engine: &Engine, name: &str, collection: &SharedCollection) {
    let shape = engine.look_at(collection, |c| Shape {
        count: c.len(),
        has_graph: c.graph().is_some(),
        indexed: c.graph().map_or(c.len(), |_| c.graph_counts().linked),
        memory_bytes: c.memory_bytes(),
        revision: c.revision(),
    });
    push_collection(out, name, collection.spec(), &shape);
}

/// `GET /v1/vector`
pub async fn collections(State(app): State<App>, head: Head) -> ApiResult {
    head.grant.as_ref().map_or(Ok(()), |grant| grant.need(Right::Read))?;
    Params::parse(&head.uri, &[])?;
    let mut out = String::from("{\"collections\":[");
    let mut all = app.engine.collections();
    all.retain(|(name, _)| head.need_collection(Right::Read, name).is_ok());
    push_list(&mut out, all, |out, (name, c)| push_info(out, &app.engine, &name, &c));
    push_fmt(&mut out, format_args!("],\"revision\":{}}}", app.engine.head()));
    Ok(json(StatusCode::OK, out))
}

/// `GET /v1/vector/{collection}`
pub async fn info(State(app): State<App>, path: NamePath, head: Head) -> ApiResult {
    let collection = name(path)?;
    head.need_collection(Right::Read, collection.as_str())?;
    Params::parse(&head.uri, &[])?;
    let shared = app.engine.collection(collection.as_str())?;
    let mut out = String::new();
    push_info(&mut out, &app.engine, collection.as_str(), &shared);
    Ok(json(StatusCode::OK, out))
}

/// A body that says nothing.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoFields {}

/// `DELETE /v1/vector/{collection}`
pub async fn drop_collection(State(app): State<App>, path: NamePath, head: Head, body: Payload) -> ApiResult {
    let collection = name(path)?;
    Params::parse(&head.uri, &[])?;
    let bytes = read_body(&head.headers, body, app.max_body_bytes).await?;
    if !bytes.is_empty() {
        // A condition that was overlooked would delete what its sender wants to keep.
        must_be_json(&head.headers)?;
        let NoFields {} = parse_object(&bytes)?;
    }
    let committed = app.commit(&head, &bytes, Command::one(Op::DeleteCollection { collection })).await?;
    Ok(json(StatusCode::OK, outcome_json(&committed.outcomes[0])))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ItemBody<'a> {
    id: String,
    #[serde(borrow)]
    vector: Option<&'a RawValue>,
    vector_base64: Option<String>,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
    if_revision: Option<Revision>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WriteBody<'a> {
    id: Option<String>,
    #[serde(borrow)]
    vector: Option<&'a RawValue>,
    vector_base64: Option<String>,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
    if_revision: Option<Revision>,
    items: Option<Vec<ListItem>>,
}

/// What each kind of write must carry.
pub fn check_write(op: Op) -> Result<Op, Rejection> {
    if let Op::WriteVector { write, vector, meta, .. } = &op {
        match write {
            VectorWrite::Update if vector.is_none() && meta.is_none() => {
                return Err(Rejection::invalid("update needs vector, vector_base64 or meta"));
            }
            VectorWrite::Add | VectorWrite::Upsert if vector.is_none() => {
                return Err(Rejection::invalid("vector or vector_base64 is missing"));
            }
            _ => {}
        }
    }
    Ok(op)
}

/// What an [`ItemBody`] says.
struct ItemWrite {
    id: VectorId,
    vector: Option<Vector>,
    meta: Option<VectorMeta>,
    if_revision: Option<Revision>,
}

impl ItemWrite {
    fn parse(body: &ItemBody<'_>) -> Result<Self, Rejection> {
        Ok(Self {
            id: VectorId::new(&body.id)?,
            vector: vector(body.vector, body.vector_base64.as_deref())?,
            meta: meta(body.meta)?,
            if_revision: body.if_revision,
        })
    }

    fn into_op(self, write: VectorWrite, collection: CollectionName) -> Result<Op, Rejection> {
        let Self { id, vector, meta, if_revision } = self;
        check_write(Op::WriteVector { write, collection, id, vector, meta, if_revision })
    }
}

/// One of a list's items, parsed as soon as it is read: its text is at hand then. Between items the core is offered.
struct ListItem(Result<ItemWrite, Rejection>);

impl<'de> Deserialize<'de> for ListItem {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Object(body) = Object::<ItemBody<'_>>::deserialize(deserializer)?;
        let write = ItemWrite::parse(&body);
        let text = body.vector.map_or(0, |raw| raw.get().len()) + body.vector_base64.map_or(0, |text| text.len());
        offer::note_parsed(text);
        Ok(Self(write))
    }
}

/// What is wrong with a body that could not be read. What is no number there was to be one of a vector's.
fn about_vectors(bytes: &[u8], error: ApiError) -> ApiError {
    if aside(bytes.len(), || names_no_number(bytes)) {
        return Rejection::InvalidVector("JSON has no NaN and no Infinity, and a vector's numbers are finite".into())
            .into();
    }
    error
}

async fn write(app: App, write: VectorWrite, path: NamePath, head: Head, body: Payload) -> ApiResult {
    let collection = name(path)?;
    Params::parse(&head.uri, &[])?;
    let bytes = read_json(&head.headers, body, app.max_body_bytes).await?;
    let body: WriteBody<'_> = parse_list::<_, ItemBody<'_>>(&bytes, "items").map_err(|e| about_vectors(&bytes, e))?;
    let Some(items) = body.items else {
        let id = body.id.ok_or_else(|| invalid("id is missing; or give several as items"))?;
        let WriteBody { vector, vector_base64, meta, if_revision, .. } = body;
        let item = ItemWrite::parse(&ItemBody { id, vector, vector_base64, meta, if_revision })?;
        let committed = app.commit(&head, &bytes, Command::one(item.into_op(write, collection)?)).await?;
        return Ok(json(StatusCode::OK, outcome_json(&committed.outcomes[0])));
    };
    if body.id.is_some()
        || body.vector.is_some()
        || body.vector_base64.is_some()
        || body.meta.is_some()
        || body.if_revision.is_some()
    {
        return Err(invalid("give one item or items, not both"));
    }
    if items.is_empty() || items.len() > ITEMS_MAX {
        return Err(invalid(format!("items holds 1 to {ITEMS_MAX} items, these are {}", items.len())));
    }
    let ops: Result<Vec<Op>, Rejection> = items
        .into_iter()
        .enumerate()
        .map(|(index, item)| item.0.and_then(|item| item.into_op(write, collection.clone())).map_err(|e| e.at(index)))
        .collect();
    let committed = app.commit(&head, &bytes, Command::batch(ops?)).await?;
    let mut out = String::from("{\"results\":[");
    push_list(&mut out, &committed.outcomes, push_outcome);
    push_fmt(&mut out, format_args!("],\"revision\":{}}}", committed.last_revision));
    Ok(json(StatusCode::OK, out))
}

/// `POST /v1/vector/{collection}/add`
pub async fn add(State(app): State<App>, path: NamePath, head: Head, body: Payload) -> ApiResult {
    write(app, VectorWrite::Add, path, head, body).await
}

/// `POST /v1/vector/{collection}/upsert`
pub async fn upsert(State(app): State<App>, path: NamePath, head: Head, body: Payload) -> ApiResult {
    write(app, VectorWrite::Upsert, path, head, body).await
}

/// `POST /v1/vector/{collection}/update`
pub async fn update(State(app): State<App>, path: NamePath, head: Head, body: Payload) -> ApiResult {
    write(app, VectorWrite::Update, path, head, body).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeleteBody {
    id: Option<String>,
    if_revision: Option<Revision>,
    ids: Option<Vec<String>>,
    #[serde(default, deserialize_with = "unique_names")]
    filters: Option<serde_json::Value>,
}

/// `POST /v1/vector/{collection}/delete`
pub async fn delete(State(app): State<App>, path: NamePath, head: Head, body: Payload) -> ApiResult {
    let collection = name(path)?;
    // Before any look at what matches.
    head.need_collection(Right::Write, collection.as_str())?;
    Params::parse(&head.uri, &[])?;
    let bytes = read_json(&head.headers, body, app.max_body_bytes).await?;
    let body: DeleteBody = parse_object(&bytes)?;
    if body.if_revision.is_some() && body.id.is_none() {
        return Err(invalid("if_revision goes with id"));
    }
    let op = match (body.id, body.ids, body.filters) {
        (Some(id), None, None) => {
            Op::DeleteVector { collection, id: VectorId::new(&id)?, if_revision: body.if_revision }
        }
        (None, Some(ids), None) => {
            if ids.len() > ITEMS_MAX {
                return Err(invalid(format!("ids holds at most {ITEMS_MAX}")));
            }
            let ids: Result<Vec<_>, _> = ids.iter().map(|id| VectorId::new(id)).collect();
            let mut ids = ids?;
            // Named twice is deleted once, and not missing the second time.
            let mut seen = HashSet::new();
            ids.retain(|id| seen.insert(id.clone()));
            Op::DeleteVectors { collection, selection: VectorSelection { ids, filter: None, deleted_before: 0 } }
        }
        (None, None, Some(filters)) => {
            // Its answer tells what is written there, question by question.
            head.need_collection(Right::Read, collection.as_str())?;
            return delete_matching(&app, &head, &bytes, collection, Filter::parse(&filters)?).await;
        }
        _ => return Err(invalid("give one of id, ids or filters")),
    };
    let committed = app.commit(&head, &bytes, Command::one(op)).await?;
    Ok(json(StatusCode::OK, outcome_json(&committed.outcomes[0])))
}

/// Deletes what matches, in commands of at most [`ITEMS_MAX`]: one command for a million would keep every other write
/// waiting. Looking at every vector's metadata is not the writer's work; it checks the found ones again. The last command
/// answers for all, so only it is remembered: whoever asks again after half of it deletes the other half.
async fn delete_matching(app: &App, head: &Head, body: &[u8], collection: CollectionName, filter: Filter) -> ApiResult {
    if let Some(known) = head.retry(body)?.and_then(|retry| app.engine.remembered(&retry)) {
        return Ok(json(StatusCode::OK, outcome_json(&known?.outcomes[0])));
    }
    let (ticket, at) = app.engine.begin_match(collection.as_str())?;
    let (ids, filter) = app.engine.on_pool(move || ticket.ids_matching(&filter).map(|ids| (ids, filter))).await??;
    let mut all = Outcome::VectorsDeleted { deleted: 0, missing: Vec::new(), revision: app.engine.head() };
    let mut chunks = ids.chunks(ITEMS_MAX).peekable();
    while let Some(ids) = chunks.next() {
        let deleted_before = if let Outcome::VectorsDeleted { deleted, .. } = all { deleted } else { 0 };
        let selection = VectorSelection { ids: ids.to_vec(), filter: Some((filter.clone(), at)), deleted_before };
        let command = Command::one(Op::DeleteVectors { collection: collection.clone(), selection });
        let committed = match chunks.peek() {
            Some(_) => app.commit_part(head, command).await?,
            None => app.commit(head, body, command).await?,
        };
        all = committed.outcomes.into_iter().next().ok_or(ApiError::Internal)?;
    }
    Ok(json(StatusCode::OK, outcome_json(&all)))
}

fn push_item(out: &mut String, item: &Item) {
    out.push_str("{\"id\":");
    push_string(out, item.id.as_str());
    if let Some(vector) = &item.vector {
        out.push_str(",\"vector\":");
        push_numbers(out, vector);
    }
    push_fmt(out, format_args!(",\"meta\":{},\"revision\":{}}}", item.meta.text(), item.revision));
}

/// `GET /v1/vector/{collection}/get`
pub async fn get(State(app): State<App>, path: NamePath, head: Head) -> ApiResult {
    let collection = name(path)?;
    head.need_collection(Right::Read, collection.as_str())?;
    let params = Params::parse(&head.uri, &["id"])?;
    let id = VectorId::new(params.one("id")?.ok_or_else(|| invalid("the query parameter id is missing"))?)?;
    let shared = app.engine.collection(collection.as_str())?;
    let item = app.engine.look_at(&shared, |c| c.get(id.as_str(), true));
    let item = item.ok_or_else(|| Rejection::VectorNotFound(id.as_str().to_owned()))?;
    let mut out = String::new();
    push_item(&mut out, &item);
    Ok(json(StatusCode::OK, out))
}

/// `GET /v1/vector/{collection}/list`
pub async fn list(State(app): State<App>, path: NamePath, head: Head) -> ApiResult {
    let collection = name(path)?;
    head.need_collection(Right::Read, collection.as_str())?;
    let params = Params::parse(&head.uri, &["limit", "cursor", "include_vector"])?;
    let limit = usize::try_from(params.number_in("limit", 1..=1000, 100)?).unwrap_or(1000);
    let include_vector = params.flag("include_vector")?;
    let after = params.one("cursor")?.filter(|cursor| !cursor.is_empty()).map(decode_cursor).transpose()?;
    let shared = app.engine.collection(collection.as_str())?;
    let (mut items, revision) = app.engine.list_vectors(&shared, after.as_deref(), limit + 1, include_vector);
    let mut has_more = items.len() > limit;
    items.truncate(limit);
    let numbers = items.iter().filter_map(|item| item.vector.as_ref()).map(|vector| vector.len()).sum::<usize>();
    let text_bytes = numbers * NUMBER_BYTES + items.iter().map(|item| item.meta.text().len()).sum::<usize>();
    let _room = app.answers.room(text_bytes.min(PAGE_BYTES_MAX))?;
    let mut out = String::from("{\"items\":[");
    let mut count = 0;
    aside(text_bytes, || {
        for item in &items {
            if out.len() > PAGE_BYTES_MAX {
                has_more = true;
                break;
            }
            if count > 0 {
                out.push(',');
            }
            push_item(&mut out, item);
            count += 1;
        }
    });
    items.truncate(count);
    out.push_str("],");
    push_next_cursor(&mut out, items.last().filter(|_| has_more).map(|item| item.id.as_str()));
    push_fmt(&mut out, format_args!(",\"revision\":{revision}}}"));
    Ok(json(StatusCode::OK, out))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CountBody {
    #[serde(default, deserialize_with = "unique_names")]
    filters: Option<serde_json::Value>,
}

/// `POST /v1/vector/{collection}/count`
pub async fn count(State(app): State<App>, path: NamePath, head: Head, body: Payload) -> ApiResult {
    let collection = name(path)?;
    head.need_collection(Right::Read, collection.as_str())?;
    Params::parse(&head.uri, &[])?;
    let bytes = read_json(&head.headers, body, app.max_body_bytes).await?;
    // No body at all counts everything.
    let body: CountBody = if bytes.is_empty() { CountBody { filters: None } } else { parse_object(&bytes)? };
    let (count, revision) = match body.filters.as_ref().map(Filter::parse).transpose()? {
        None => {
            let shared = app.engine.collection(collection.as_str())?;
            app.engine.look_at(&shared, |c| (c.len(), c.revision()))
        }
        Some(filter) => {
            let (ticket, revision) = app.engine.begin_match(collection.as_str())?;
            (app.engine.on_pool(move || ticket.count_matching(&filter)).await??, revision)
        }
    };
    Ok(json(StatusCode::OK, format!("{{\"count\":{count},\"revision\":{revision}}}")))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SearchBody<'a> {
    #[serde(borrow)]
    vector: Option<&'a RawValue>,
    vector_base64: Option<String>,
    id: Option<String>,
    k: Option<usize>,
    #[serde(default, deserialize_with = "unique_names")]
    filters: Option<serde_json::Value>,
    include_meta: Option<bool>,
    include_vector: Option<bool>,
    min_score: Option<f32>,
    offset: Option<usize>,
    exact: Option<bool>,
    ef: Option<usize>,
    explain: Option<bool>,
    group_by: Option<String>,
    group_size: Option<usize>,
    #[serde(borrow)]
    queries: Option<Vec<Object<SearchBody<'a>>>>,
}

/// Hits asked for when `k` is not given.
const K_DEFAULT: usize = 10;

impl SearchBody<'_> {
    fn has_own_fields(&self) -> bool {
        let Self {
            vector,
            vector_base64,
            id,
            k,
            filters,
            include_meta,
            include_vector,
            min_score,
            offset,
            exact,
            ef,
            explain,
            group_by,
            group_size,
            queries: _,
        } = self;
        vector.is_some()
            || vector_base64.is_some()
            || id.is_some()
            || k.is_some()
            || filters.is_some()
            || include_meta.is_some()
            || include_vector.is_some()
            || min_score.is_some()
            || offset.is_some()
            || exact.is_some()
            || ef.is_some()
            || explain.is_some()
            || group_by.is_some()
            || group_size.is_some()
    }

    /// The search, once the collection is known: `id` stands for that vector.
    fn prepare(&self, collection: &SharedCollection) -> Result<Search, Rejection> {
        let k = self.k.unwrap_or(K_DEFAULT);
        if k == 0 || k > K_MAX {
            return Err(Rejection::invalid(format!("k is 1 to {K_MAX}")));
        }
        let offset = self.offset.unwrap_or(0);
        if offset > OFFSET_MAX {
            return Err(Rejection::invalid(format!("offset is at most {OFFSET_MAX}")));
        }
        if self.ef.is_some_and(|ef| ef == 0 || ef > EF_MAX) {
            return Err(Rejection::invalid(format!("ef is 1 to {EF_MAX}")));
        }
        if self.min_score.is_some_and(|s| !s.is_finite()) {
            return Err(Rejection::invalid("min_score is a finite number"));
        }
        let spec = collection.spec();
        let given = vector(self.vector, self.vector_base64.as_deref())?;
        let (query, stored) = match (given, &self.id) {
            (Some(vector), None) => (vector, None),
            (None, Some(id)) => {
                let id = VectorId::new(id)?;
                let item = collection.read(|c| c.get(id.as_str(), true));
                let Some(Item { vector: Some(numbers), revision, .. }) = item else {
                    return Err(Rejection::VectorNotFound(id.as_str().to_owned()));
                };
                (Vector::new(numbers)?, Some((id, revision)))
            }
            _ => return Err(Rejection::invalid("give vector, vector_base64 or id, one of them")),
        };
        query.check(spec)?;
        let group = match (&self.group_by, self.group_size) {
            (None, None) => None,
            (None, Some(_)) => return Err(Rejection::invalid("group_size goes with group_by")),
            (Some(path), size) => {
                let size = size.unwrap_or(1);
                if size == 0 || size > GROUP_SIZE_MAX {
                    return Err(Rejection::invalid(format!("group_size is 1 to {GROUP_SIZE_MAX}")));
                }
                Some(Grouping { path: parse_path(path)?, size })
            }
        };
        Ok(Search {
            query: Query::new(spec, query.as_slice()),
            stored,
            filter: self.filters.as_ref().map(Filter::parse).transpose()?,
            k,
            offset,
            min_score: self.min_score,
            include_vector: self.include_vector.unwrap_or(false),
            is_exact: self.exact.unwrap_or(false),
            ef: self.ef,
            group,
        })
    }
}

fn push_hit(out: &mut String, hit: &Hit, include_meta: bool) {
    out.push_str("{\"id\":");
    push_string(out, hit.id.as_str());
    out.push_str(",\"score\":");
    push_number(out, hit.score);
    if include_meta {
        out.push_str(",\"meta\":");
        out.push_str(hit.meta.text());
    }
    if let Some(vector) = &hit.vector {
        out.push_str(",\"vector\":");
        push_numbers(out, vector);
    }
    out.push('}');
}

/// Appends `"hits":[…]` or `"groups":[…]`.
fn push_found(out: &mut String, found: &Found, include_meta: bool) {
    match found {
        Found::Hits(hits) => {
            out.push_str("\"hits\":[");
            push_list(out, hits, |out, hit| push_hit(out, hit, include_meta));
        }
        Found::Groups(groups) => {
            out.push_str("\"groups\":[");
            push_list(out, groups, |out, (value, hits)| {
                push_fmt(out, format_args!("{{\"value\":{value},\"hits\":["));
                push_list(out, hits, |out, hit| push_hit(out, hit, include_meta));
                out.push_str("]}");
            });
        }
    }
    out.push(']');
}

/// Appends the hits or groups and, when asked for, how they were found.
fn push_answer(out: &mut String, answer: &SearchAnswer, query: &SearchBody<'_>) {
    push_found(out, &answer.found, query.include_meta.unwrap_or(false));
    if query.explain == Some(true) {
        let Plan { way, given_up, ef, vectors, matches, scored, expanded, tail } = answer.plan;
        push_fmt(out, format_args!(",\"explain\":{{\"plan\":\"{}\"", way.as_str()));
        if let Some(given_up) = given_up {
            push_fmt(out, format_args!(",\"given_up\":\"{}\"", given_up.as_str()));
        }
        if expanded > 0 {
            push_fmt(out, format_args!(",\"ef\":{ef}"));
        }
        push_fmt(
            out,
            format_args!(
                ",\"vectors\":{vectors},\"matches\":{matches},\"scored\":{scored},\"expanded\":{expanded},\"tail\":{tail}}}"
            ),
        );
    }
}

/// Hits a search may answer with.
fn hits_max(search: &Search) -> usize {
    search.k * search.group.as_ref().map_or(1, |g| g.size)
}

fn hit_count(found: &Found) -> usize {
    match found {
        Found::Hits(hits) => hits.len(),
        Found::Groups(groups) => groups.iter().map(|(_, hits)| hits.len()).sum(),
    }
}

/// Bytes of what hits carry beside numbers, about.
fn hit_bytes(answers: &[SearchAnswer], body: &SearchBody<'_>) -> usize {
    let of_answer = |(at, answer): (usize, &SearchAnswer)| {
        let query = body.queries.as_ref().map_or(body, |queries| &queries[at].0);
        let of_hit = |hit: &Hit| {
            let meta = if query.include_meta == Some(true) { hit.meta.text().len() } else { 0 };
            HIT_BYTES + hit.id.as_str().len() + meta
        };
        let of_hits = |hits: &[Hit]| hits.iter().map(of_hit).sum::<usize>();
        match &answer.found {
            Found::Hits(hits) => of_hits(hits),
            Found::Groups(groups) => {
                groups.iter().map(|(value, hits)| value.as_str().map_or(0, str::len) + of_hits(hits)).sum()
            }
        }
    };
    answers.iter().enumerate().map(of_answer).sum()
}

/// Numbers of the vectors that hits carry.
fn number_count(found: &Found) -> usize {
    let count =
        |hits: &[Hit]| hits.iter().filter_map(|hit| hit.vector.as_ref()).map(|vector| vector.len()).sum::<usize>();
    match found {
        Found::Hits(hits) => count(hits),
        Found::Groups(groups) => groups.iter().map(|(_, hits)| count(hits)).sum(),
    }
}

impl SearchBody<'_> {
    /// The one search, or each of `queries`, within what one answer may carry.
    fn prepare_all(&self, shared: &SharedCollection) -> Result<Vec<Search>, Rejection> {
        let prepared = match &self.queries {
            None => vec![self.prepare(shared)?],
            Some(queries) => self.prepare_each(queries, shared)?,
        };
        let kept = |search: &Search| (search.offset + search.k) * search.group.as_ref().map_or(1, |group| group.size);
        if prepared.iter().map(kept).sum::<usize>() > KEPT_MAX {
            let what = "a search, or all queries together, keep at most";
            return Err(Rejection::invalid(format!("{what} {KEPT_MAX} hits: offset + k, times group_size, each")));
        }
        let carried: usize = prepared.iter().filter(|s| s.include_vector).map(hits_max).sum();
        if carried * shared.spec().dim > ANSWER_NUMBERS_MAX {
            let detail = "with include_vector an answer carries at most";
            return Err(Rejection::invalid(format!("{detail} {ANSWER_NUMBERS_MAX} numbers; ask for fewer")));
        }
        Ok(prepared)
    }

    fn prepare_each(&self, queries: &[Object<Self>], shared: &SharedCollection) -> Result<Vec<Search>, Rejection> {
        if self.has_own_fields() {
            return Err(Rejection::invalid("give one query or queries, not both"));
        }
        if queries.is_empty() || queries.len() > QUERIES_MAX {
            return Err(Rejection::invalid(format!("queries holds 1 to {QUERIES_MAX}")));
        }
        let prepare = |(index, Object(query)): (usize, &Object<Self>)| {
            if query.queries.is_some() {
                return Err(Rejection::invalid("queries do not nest").at(index));
            }
            let prepared = query.prepare(shared).map_err(|e| e.at(index));
            offer::note_parsed(query.vector.map_or(0, |raw| raw.get().len()));
            prepared
        };
        let prepared = queries.iter().enumerate().map(prepare).collect::<Result<Vec<_>, _>>()?;
        if prepared.iter().filter(|s| s.group.is_some()).count() > GROUPED_MAX {
            return Err(Rejection::invalid(format!("at most {GROUPED_MAX} of queries may have group_by")));
        }
        Ok(prepared)
    }
}

/// `POST /v1/vector/{collection}/search`
pub async fn search(State(app): State<App>, path: NamePath, head: Head, body: Payload) -> ApiResult {
    let collection = name(path)?;
    head.need_collection(Right::Read, collection.as_str())?;
    Params::parse(&head.uri, &[])?;
    let bytes = read_json(&head.headers, body, app.max_body_bytes).await?;
    let body: SearchBody<'_> =
        parse_list::<_, SearchBody<'_>>(&bytes, "queries").map_err(|e| about_vectors(&bytes, e))?;
    let prepare = |shared: &SharedCollection| aside(bytes.len(), || body.prepare_all(shared));
    let (answers, revision, took_us) = app.engine.search(collection.as_str(), prepare).await?;
    let mut out = String::with_capacity(1024);
    out.push('{');
    let numbers = answers.iter().map(|answer| number_count(&answer.found)).sum::<usize>();
    let text_bytes = numbers * NUMBER_BYTES + hit_bytes(&answers, &body);
    if text_bytes > ANSWER_BYTES_MAX {
        return Err(invalid(format!(
            "the answer would be larger than {ANSWER_BYTES_MAX} bytes; ask for fewer hits, or without include_meta"
        )));
    }
    let _room = app.answers.room(text_bytes)?;
    aside(text_bytes, || match &body.queries {
        None => push_answer(&mut out, &answers[0], &body),
        Some(queries) => {
            out.push_str("\"results\":[");
            push_list(&mut out, answers.iter().zip(queries), |out, (answer, Object(query))| {
                out.push('{');
                push_answer(out, answer, query);
                out.push('}');
            });
            out.push(']');
        }
    });
    push_fmt(&mut out, format_args!(",\"took_us\":{took_us},\"revision\":{revision}}}"));
    let queries: Vec<&SearchBody<'_>> =
        body.queries.as_ref().map_or_else(|| vec![&body], |queries| queries.iter().map(|q| &q.0).collect());
    for (answer, query) in answers.iter().zip(queries) {
        let hits = hit_count(&answer.found);
        app.engine.publish_search(collection.as_str(), query.k.unwrap_or(K_DEFAULT), hits, took_us);
    }
    Ok(json(StatusCode::OK, out))
}
