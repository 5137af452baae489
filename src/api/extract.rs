//! From a request's parts to checked values: query strings, bodies, conditions, path names, vectors.
//!
//! Unknown names are refused everywhere, with the name: a typo such as `ttl` for `ttl_ms` must not be silently ignored.

use super::auth::Client;
use super::error::{ApiError, ApiResult, invalid};
use crate::engine::answers::Retry;
use crate::engine::command::{Condition, ETags, Op};
use crate::engine::json::{DEPTH_MAX, JSON, VALUE_DEPTH_MAX, check_depth, check_surrogates, check_value_depth};
use crate::error::Rejection;
use crate::keys::{Grant, Right};
use crate::revision::Revision;
use crate::vector::{Vector, VectorMeta};
use axum::BoxError;
use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use base64::Engine as _;
use bytes::Bytes;
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use memchr::{memchr, memchr_iter};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashMap;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

/// A request's header fields, in the order they came. There are a handful: to walk them takes less time than to hash a name.
#[derive(Clone, Debug, Default)]
pub struct Fields(Vec<(HeaderName, HeaderValue)>);

impl Fields {
    /// With room for so many.
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// Adds one behind all others.
    pub fn push(&mut self, name: HeaderName, value: HeaderValue) {
        self.0.push((name, value));
    }

    /// Every value of a name.
    pub fn all(&self, name: HeaderName) -> impl Iterator<Item = &HeaderValue> {
        self.0.iter().filter_map(move |(found, value)| (*found == name).then_some(value))
    }

    /// The first value of a name.
    pub fn first(&self, name: HeaderName) -> Option<&HeaderValue> {
        self.all(name).next()
    }
}

impl From<HeaderMap> for Fields {
    fn from(headers: HeaderMap) -> Self {
        let mut fields = Self::with_capacity(headers.len());
        let mut last = None;
        for (name, value) in headers {
            // Further values of a name come without it.
            last = name.or(last);
            if let Some(name) = &last {
                fields.push(name.clone(), value);
            }
        }
        fields
    }
}

impl From<Fields> for HeaderMap {
    fn from(fields: Fields) -> Self {
        let mut headers = Self::with_capacity(fields.0.len());
        for (name, value) in fields.0 {
            headers.append(name, value);
        }
        headers
    }
}

/// A request's body.
#[derive(Debug)]
pub enum Payload {
    /// It came with its head.
    Whole(Bytes),
    /// It may still come.
    Coming(Body),
}

impl Payload {
    /// How long it is, where it said so, or at most.
    pub fn bytes_max(&self) -> Option<u64> {
        match self {
            Self::Whole(bytes) => Some(bytes.len() as u64),
            Self::Coming(body) => body.size_hint().upper(),
        }
    }
}

impl From<Payload> for Body {
    fn from(payload: Payload) -> Self {
        match payload {
            Payload::Whole(bytes) => bytes.into(),
            Payload::Coming(body) => body,
        }
    }
}

impl<S: Sync> FromRequest<S> for Payload {
    type Rejection = std::convert::Infallible;

    async fn from_request(request: Request, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Self::Coming(request.into_body()))
    }
}

/// A request without its body: taken rather than copied, and who sent it.
#[derive(Clone, Debug)]
pub struct Head {
    /// GET, PUT, …
    pub method: Method,
    /// Path and query.
    pub uri: Uri,
    /// All header fields.
    pub headers: Fields,
    /// What its sender may do; `None` on an open server: everything.
    pub grant: Option<Arc<Grant>>,
    /// Whom its streams count for, where there is a limit.
    pub client: Option<Client>,
}

impl Head {
    /// Of nobody known yet.
    pub fn new(method: Method, uri: Uri, headers: Fields) -> Self {
        Self { method, uri, headers, grant: None, client: None }
    }

    /// Takes a request of hyper's apart.
    pub fn take(request: Request) -> (Self, Payload) {
        let (mut parts, body) = request.into_parts();
        (Self::of(&mut parts), Payload::Coming(body))
    }

    fn of(parts: &mut Parts) -> Self {
        let Parts { method, uri, headers, .. } = parts;
        Self::new(std::mem::take(method), std::mem::take(uri), std::mem::take(headers).into())
    }

    /// A request for axum's router, whose handler takes this head as it is.
    pub fn into_request(self, body: Payload) -> Request {
        let mut request = Request::new(body.into());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        request.extensions_mut().insert(self);
        request
    }

    /// A request as others know it.
    pub fn into_plain_request(self, body: Payload) -> Request {
        let mut request = Request::new(body.into());
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers.into();
        request
    }

    /// Refuses a caller without this right to a key.
    pub fn need_key(&self, right: Right, key: &str) -> Result<(), Rejection> {
        self.grant.as_ref().map_or(Ok(()), |grant| grant.need_key(right, key))
    }

    /// Refuses a caller without this right to a collection.
    pub fn need_collection(&self, right: Right, name: &str) -> Result<(), Rejection> {
        self.grant.as_ref().map_or(Ok(()), |grant| grant.need_collection(right, name))
    }

    /// Refuses a caller without this right to everything.
    pub fn need_everything(&self, right: Right) -> Result<(), Rejection> {
        self.grant.as_ref().map_or(Ok(()), |grant| grant.need_everything(right))
    }

    /// What a repetition of this request is known by, if its sender says that it may be repeated: `Idempotency-Key`
    /// (draft-ietf-httpapi-idempotency-key-header-07). Everything that decides what the request does is in the hash.
    pub fn retry(&self, body: &[u8]) -> ApiResult<Option<Box<Retry>>> {
        let mut values = self.headers.all(IDEMPOTENCY_KEY);
        let Some(value) = values.next() else { return Ok(None) };
        let is_right = |key: &&str| (1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&key.len()) && !key.contains('\t');
        let key = value.to_str().ok().filter(is_right);
        let (Some(key), None) = (key, values.next()) else {
            return Err(invalid(format!(
                "Idempotency-Key is one text of 1 to {IDEMPOTENCY_KEY_BYTES_MAX} printable ASCII characters"
            )));
        };
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        let target = self.uri.path_and_query().map_or("", |target| target.as_str());
        let headers = [header::CONTENT_TYPE, header::IF_MATCH, header::IF_NONE_MATCH];
        // By name too: the same value under another is another condition.
        let fields = headers.iter().flat_map(|name| {
            self.headers.all(name.clone()).flat_map(|value| [name.as_str().as_bytes(), value.as_bytes()])
        });
        for part in [self.method.as_str().as_bytes(), target.as_bytes()].into_iter().chain(fields).chain([body]) {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let mut fingerprint = [0; 16];
        fingerprint.copy_from_slice(&hash.finish().as_ref()[..16]);
        // Each sender has keys of its own: nobody is told what was said to another.
        let sender = self.grant.as_ref().map_or("", |grant| &*grant.name);
        Ok(Some(Box::new(Retry { key: format!("{sender}\n{key}").into(), fingerprint })))
    }

    /// Refuses a caller who may not do this.
    pub fn need_op(&self, op: &Op) -> Result<(), Rejection> {
        match op {
            Op::Put { key, .. } | Op::Delete { key, .. } | Op::Event { key: Some(key), .. } => {
                self.need_key(Right::Write, key.as_str())
            }
            // Its answer shows the value.
            Op::Patch { key, .. } => {
                self.need_key(Right::Read, key.as_str())?;
                self.need_key(Right::Write, key.as_str())
            }
            Op::Event { key: None, .. } => self.need_everything(Right::Write),
            Op::CreateCollection { collection, .. }
            | Op::DeleteCollection { collection }
            | Op::WriteVector { collection, .. }
            | Op::DeleteVector { collection, .. }
            | Op::DeleteVectors { collection, .. } => self.need_collection(Right::Write, collection.as_str()),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Head {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        // Another head would be one of nobody, who on an open server may do everything.
        Ok(parts.extensions.remove().expect("the guard gives every request its head, and a handler takes it once"))
    }
}

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Longest `Idempotency-Key`: a UUID is 36, a composed name has room.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// A body must have arrived by then; a slower client is holding memory.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Text up to this size is parsed or written where it is needed, in a fifth of a millisecond or so. Handing over the thread
/// takes two wake-ups of another.
const BYTES_AT_ONCE: usize = 64 << 10;

/// A query string's pairs, all of them known names.
#[derive(Debug)]
pub struct Params(Vec<(String, String)>);

impl Params {
    /// Parses the query of `uri`; names outside `known` are refused.
    pub fn parse(uri: &Uri, known: &[&str]) -> ApiResult<Self> {
        let mut pairs = Vec::new();
        let Some(query) = uri.query() else { return Ok(Self(pairs)) };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            if !known.contains(&&*name) {
                let list = if known.is_empty() {
                    "this route takes none; what goes with a JSON body is a member of it".to_owned()
                } else {
                    format!("there are {}", known.join(", "))
                };
                return Err(invalid(format!("unknown query parameter {name:?}; {list}")));
            }
            if name.contains('\u{fffd}') || value.contains('\u{fffd}') {
                return Err(invalid(format!("the query parameter {name:?} is not UTF-8")));
            }
            pairs.push((name.into_owned(), value.into_owned()));
        }
        Ok(Self(pairs))
    }

    /// Every value of a repeatable parameter.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The value of a parameter that may be given once.
    pub fn one<'a>(&'a self, name: &'a str) -> ApiResult<Option<&'a str>> {
        let mut values = self.all(name);
        let first = values.next();
        if values.next().is_some() {
            return Err(invalid(format!("the query parameter {name} was given more than once")));
        }
        Ok(first)
    }

    /// A whole number.
    pub fn number(&self, name: &str) -> ApiResult<Option<u64>> {
        let Some(text) = self.one(name)? else { return Ok(None) };
        // `parse` would take a leading plus, which in a query string is a space gone wrong.
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        let number = text.parse().ok().filter(|_| digits);
        number
            .map(Some)
            .ok_or_else(|| invalid(format!("the query parameter {name} takes a whole number, not {text:?}")))
    }

    /// A whole number within a range, or a default.
    pub fn number_in(&self, name: &str, range: std::ops::RangeInclusive<u64>, default: u64) -> ApiResult<u64> {
        let number = self.number(name)?.unwrap_or(default);
        if range.contains(&number) {
            Ok(number)
        } else {
            Err(invalid(format!("the query parameter {name} is {} to {}", range.start(), range.end())))
        }
    }

    /// `true` or `false`; absent is false.
    pub fn flag(&self, name: &str) -> ApiResult<bool> {
        match self.one(name)? {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1" | "") => Ok(true),
            Some(other) => Err(invalid(format!("the query parameter {name} takes true or false, not {other:?}"))),
        }
    }

    /// A revision.
    pub fn revision(&self, name: &str) -> ApiResult<Option<Revision>> {
        Ok(self.number(name)?.map(Revision))
    }
}

/// Refuses an address with a percent sign that begins no encoded byte: taken as it is, one key would have two addresses, and some
/// that look encoded would be others than meant.
pub fn check_encoding(uri: &Uri) -> ApiResult<()> {
    let text = uri.path_and_query().map_or("", PathAndQuery::as_str).as_bytes();
    let is_encoded = |at: usize| text.get(at + 1..at + 3).is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit));
    if memchr_iter(b'%', text).all(is_encoded) {
        return Ok(());
    }
    Err(invalid("the address has a % without two hex digits behind it; a % itself is %25"))
}

/// The part of the path after `prefix`, percent-decoded as UTF-8.
pub fn path_tail<'a>(uri: &'a Uri, prefix: &str) -> ApiResult<Cow<'a, str>> {
    let tail = uri.path().strip_prefix(prefix).unwrap_or_default();
    if memchr(b'%', tail.as_bytes()).is_none() {
        return Ok(tail.into());
    }
    let decoded = percent_encoding::percent_decode_str(tail).decode_utf8();
    decoded.map_err(|_| invalid("the path is not UTF-8 after percent-decoding"))
}

/// What a `Content-Type` header says a body is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyType {
    /// `application/json`, or no header.
    Json,
    /// `application/merge-patch+json`.
    MergePatch,
    /// Anything else, as sent.
    Other(String),
}

/// Reads the `Content-Type` header.
pub fn body_type(headers: &Fields) -> ApiResult<BodyType> {
    let Some(value) = headers.first(header::CONTENT_TYPE) else { return Ok(BodyType::Json) };
    if value == JSON {
        return Ok(BodyType::Json);
    }
    let value = value.to_str().map_err(|_| invalid("the Content-Type header is not ASCII"))?;
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    Ok(match essence.as_str() {
        JSON | "" => BodyType::Json,
        "application/merge-patch+json" => BodyType::MergePatch,
        _ => BodyType::Other(value.to_owned()),
    })
}

/// How much the client wants a media type that it names, if it does.
#[must_use]
pub fn accepted(headers: &Fields, wanted: &str) -> Option<f32> {
    let values = headers.all(header::ACCEPT).filter_map(|value| value.to_str().ok());
    let mut parts = values.flat_map(|value| value.split(',')).map(|part| part.split(';').map(str::trim));
    let mut part = parts.find(|part| part.clone().next().is_some_and(|name| name.eq_ignore_ascii_case(wanted)))?;
    let q = part.find_map(|parameter| parameter.strip_prefix("q="));
    Some(q.and_then(|q| q.parse().ok()).unwrap_or(1.0)).filter(|q| *q > 0.0)
}

/// Reads a whole body of at most `limit` bytes.
pub async fn read_body(headers: &Fields, body: Payload, limit: usize) -> ApiResult<Bytes> {
    // Taken as it is, it would be stored as something else than what was meant.
    let codings = headers.all(header::CONTENT_ENCODING).flat_map(|list| list.as_bytes().split(|&b| b == b','));
    if codings.map(<[u8]>::trim_ascii).any(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity")) {
        return Err(ApiError::UnsupportedMediaType("without Content-Encoding"));
    }
    let too_large = || ApiError::Rejected(Rejection::PayloadTooLarge { what: "the body", limit_bytes: limit });
    let body = match body {
        Payload::Whole(bytes) => return if bytes.len() <= limit { Ok(bytes) } else { Err(too_large()) },
        Payload::Coming(body) => body,
    };
    let bytes = body.size_hint().exact();
    // Of known length is only what is sent as it is.
    if bytes.is_none() {
        let mut transfers = headers.all(header::TRANSFER_ENCODING);
        let is_plain =
            transfers.next().is_none_or(|coding| coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
        if !is_plain || transfers.next().is_some() {
            return Err(ApiError::UnsupportedMediaType("without a Transfer-Encoding but chunked"));
        }
    }
    if bytes.is_some_and(|bytes| bytes > limit as u64) {
        return Err(too_large());
    }
    let mut reading = pin!(collect(Limited::new(body, limit)));
    // Most bodies came with their head: those need no timer.
    let read = match poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx))).await {
        Poll::Ready(read) => read,
        Poll::Pending => tokio::time::timeout(BODY_TIMEOUT, reading).await.map_err(|_| ApiError::BodyTimeout)?,
    };
    read.map_err(|error| {
        if error.is::<LengthLimitError>() {
            too_large()
        } else {
            invalid("the body ended early or was not sent as announced")
        }
    })
}

/// A body's bytes; not copied where they came in one piece.
async fn collect(mut body: Limited<Body>) -> Result<Bytes, BoxError> {
    let Some(first) = body.frame().await.transpose()? else { return Ok(Bytes::new()) };
    let first = first.into_data().unwrap_or_default();
    if body.is_end_stream() {
        return Ok(first);
    }
    // What was announced is within the limit, and there is room for it: `App::admit`.
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or_default();
    let mut all = Vec::with_capacity(first.len() + announced);
    all.extend_from_slice(&first);
    while let Some(frame) = body.frame().await.transpose()? {
        all.extend_from_slice(&frame.into_data().unwrap_or_default());
    }
    // It may be kept for long, and where no length was announced it has grown by doubling.
    all.shrink_to_fit();
    Ok(all.into())
}

/// Reads a JSON body's text, after checking its type.
pub async fn read_json(headers: &Fields, body: Payload, limit: usize) -> ApiResult<Bytes> {
    must_be_json(headers)?;
    read_body(headers, body, limit).await
}

/// Refuses a body that is said to be something else.
pub fn must_be_json(headers: &Fields) -> ApiResult<()> {
    match body_type(headers)? {
        BodyType::Json => Ok(()),
        _ => Err(ApiError::UnsupportedMediaType("of Content-Type: application/json")),
    }
}

/// Does work on so many bytes of text. A thread that serves requests first hands over those that wait behind a large one: a
/// thousand vectors of 384 numbers in JSON take it 15 ms.
pub fn aside<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes > BYTES_AT_ONCE { tokio::task::block_in_place(work) } else { work() }
}

/// Parses JSON that is nested no deeper than allowed. Errors name the field and the place.
pub fn parse_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> ApiResult<T> {
    parse_nested(bytes, DEPTH_MAX)
}

fn parse_nested<'a, T: Deserialize<'a>>(bytes: &'a [u8], depth_max: usize) -> ApiResult<T> {
    aside(bytes.len(), || {
        check_depth(bytes, depth_max)?;
        check_surrogates(bytes)?;
        let text = std::str::from_utf8(bytes).map_err(|_| invalid("the body is not UTF-8"))?;
        if text.is_empty() {
            return Err(invalid("the body is empty; this route takes JSON"));
        }
        serde_json::from_str(text)
            .map_err(|error| invalid(format!("the body is not what this route takes: {}", fault::<T>(text, &error))))
    })
}

/// An object and nothing else: derived structs would also take an array, field by field.
#[derive(Debug)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnlyMaps<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OnlyMaps<T> {
            type Value = Object<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(OnlyMaps(PhantomData))
    }
}

/// Parses a body that is an object.
pub fn parse_object<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> ApiResult<T> {
    parse_json::<Object<T>>(bytes).map(|object| object.0)
}

/// Any JSON but null, whose objects name nothing twice: of two conditions under one name only the last would count.
pub fn unique_names<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<serde_json::Value>, D::Error> {
    struct Unique(serde_json::Value);

    impl<'de> Deserialize<'de> for Unique {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(Any).map(Self)
        }
    }

    struct Any;

    impl<'de> Visitor<'de> for Any {
        type Value = serde_json::Value;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("JSON")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(serde_json::Value::Null)
        }
        fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
            Ok(value.into())
        }
        fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
            Ok(value.into())
        }
        fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
            Ok(value.into())
        }
        fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
            Ok(value.into())
        }
        fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
            Ok(value.into())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut list = Vec::new();
            while let Some(Unique(value)) = seq.next_element()? {
                list.push(value);
            }
            Ok(list.into())
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut object = serde_json::Map::new();
            while let Some((name, Unique(value))) = map.next_entry::<String, _>()? {
                if object.contains_key(&name) {
                    return Err(serde::de::Error::custom(format_args!("duplicate field `{name}`")));
                }
                object.insert(name, value);
            }
            Ok(object.into())
        }
    }

    let Unique(value) = Unique::deserialize(deserializer)?;
    Ok((!value.is_null()).then_some(value))
}

/// Parses a body that is an object with a list of objects, which may hold what is as deep as alone in a body. When one of these is the
/// fault, the error names its place as `op`.
pub fn parse_list<'a, T: Deserialize<'a>, I: Deserialize<'a>>(bytes: &'a [u8], list: &str) -> ApiResult<T> {
    /// Object, list and object around what is stored.
    const DEPTH_AROUND: usize = 3;
    let name_item = |error| faulty_item::<I>(bytes, list).map_or(error, ApiError::Rejected);
    let parsed = parse_nested::<Object<T>>(bytes, VALUE_DEPTH_MAX + DEPTH_AROUND);
    parsed.map(|object| object.0).map_err(|error| aside(bytes.len(), || name_item(error)))
}

/// Why the first item of a list in a body is not what it should be. Only for bodies that were refused: parses them anew.
fn faulty_item<'a, I: Deserialize<'a>>(bytes: &'a [u8], list: &str) -> Option<Rejection> {
    let members: HashMap<&str, &RawValue> = serde_json::from_slice(bytes).ok()?;
    let items: Vec<&RawValue> = serde_json::from_str(members.get(list)?.get()).ok()?;
    items.into_iter().enumerate().find_map(|(index, item)| {
        let error = serde_json::from_str::<Object<I>>(item.get()).err()?;
        let fault = fault::<Object<I>>(item.get(), &error);
        Some(Rejection::invalid(format!("it is not what this route takes: {fault}")).at(index))
    })
}

/// What is wrong with JSON, by the name of the member where it is. Only for what was refused: parses it anew.
fn fault<'a, T: Deserialize<'a>>(text: &'a str, error: &serde_json::Error) -> String {
    let words = in_plain_words(error);
    let parsed: Result<T, _> = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text));
    let path = parsed.err().map(|error| error.path().to_string());
    match path.filter(|path| path != "." && !path.contains('?') && !words.contains(&format!("`{path}`"))) {
        Some(path) => format!("{path}: {words}"),
        None => words,
    }
}

/// The parser's words without its type names.
fn in_plain_words(error: &serde_json::Error) -> String {
    let mut text = error.to_string().replace("EOF while parsing", "it ends within");
    for (name, plain) in [
        ("u64", "a whole number from 0"),
        ("usize", "a whole number from 0"),
        ("f32", "a number"),
        ("a borrowed string", "a string"),
    ] {
        text = text.replace(&format!("expected {name}"), &format!("expected {plain}"));
    }
    text
}

/// The conditions of a write: `if_revision` and the `If-Match`, `If-None-Match` headers.
pub fn condition(headers: &Fields, if_revision: Option<Revision>) -> ApiResult<Condition> {
    Ok(Condition {
        if_revision,
        if_match: etags(headers, &header::IF_MATCH)?,
        if_none_match: etags(headers, &header::IF_NONE_MATCH)?,
    })
}

/// Refuses the headers where they are not looked at: a condition that is overlooked is a write that its sender did not want.
pub fn check_unconditional(headers: &Fields) -> ApiResult<()> {
    if [header::IF_MATCH, header::IF_NONE_MATCH].into_iter().any(|name| headers.first(name).is_some()) {
        return Err(invalid("If-Match and If-None-Match are for keys; elsewhere give if_revision, where it is taken"));
    }
    Ok(())
}

/// Parses a list of entity tags. Tags that are not of our form are kept out: they match nothing.
pub fn etags(headers: &Fields, name: &HeaderName) -> ApiResult<Option<ETags>> {
    let mut found = None;
    for value in headers.all(name.clone()) {
        let text = value.to_str().map_err(|_| invalid(format!("the {name} header is not ASCII")))?;
        for tag in text.split(',').map(str::trim) {
            if tag == "*" {
                return Ok(Some(ETags::Any));
            }
            let ETags::These(revisions) = found.get_or_insert_with(|| ETags::These(Vec::new())) else { continue };
            // A weak tag never matches in If-Match, which compares strongly (RFC 9110, 13.1.1).
            let tag = if *name == header::IF_NONE_MATCH { tag.strip_prefix("W/").unwrap_or(tag) } else { tag };
            let inner = tag.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(tag);
            if inner.bytes().all(|b| b.is_ascii_digit()) {
                revisions.extend(inner.parse().map(Revision));
            }
        }
    }
    Ok(found)
}

/// A vector from JSON: `[0.1,…]` as `vector`, or little-endian f32 as `vector_base64`. `None` when neither is given.
pub fn vector(numbers: Option<&RawValue>, base64: Option<&str>) -> Result<Option<Vector>, Rejection> {
    match (numbers, base64) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(Rejection::invalid("give vector or vector_base64, not both")),
        (Some(raw), None) => numbers_of(raw.get()).and_then(Vector::new).map(Some),
        (None, Some(text)) => {
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(text)
                .map_err(|_| Rejection::invalid("vector_base64 is not standard base64 with padding"))?;
            let (chunks, rest) = bytes.as_chunks::<4>();
            if !rest.is_empty() {
                return Err(Rejection::invalid("vector_base64 is not a whole number of 32-bit floats"));
            }
            Vector::new(chunks.iter().map(|b| f32::from_le_bytes(*b)).collect()).map(Some)
        }
    }
}

/// Numbers of a JSON array, rounded once to f32. The text is valid JSON already, so what is neither a comma nor space
/// between two commas is one value.
fn numbers_of(text: &str) -> Result<Vec<f32>, Rejection> {
    let not_numbers = || Rejection::invalid("vector is an array of numbers");
    let inner = text.trim().strip_prefix('[').and_then(|t| t.strip_suffix(']')).ok_or_else(not_numbers)?;
    let mut numbers = Vec::with_capacity(inner.len() / 8);
    let mut rest = inner.as_bytes().trim_ascii();
    while !rest.is_empty() {
        let (number, length) = match short_number(rest) {
            Some(found) => found,
            None => {
                let text = rest.split(|&byte| byte == b',').next().unwrap_or_default().trim_ascii_end();
                let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
                (number.ok_or_else(not_numbers)?, text.len())
            }
        };
        numbers.push(number);
        rest = rest[length..].trim_ascii_start();
        if let [b',', next @ ..] = rest {
            rest = next.trim_ascii_start();
        } else if !rest.is_empty() {
            return Err(not_numbers());
        }
    }
    Ok(numbers)
}

/// The number at the front and its length, if it is one of those nearly all are: up to 19 digits, no exponent, ended by a
/// comma or the end; zeros in front are no digits. Its digits and the quotient are each rounded to f64, so that the result is
/// less than two steps off, and rounding it to f32 is right unless it lies that near to half-way between two f32.
fn short_number(text: &[u8]) -> Option<(f32, usize)> {
    /// The powers of ten that an f64 holds exactly.
    const POWERS: [f64; 23] = [
        1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19,
        1e20, 1e21, 1e22,
    ];
    /// So many always fit 64 bits.
    const DIGITS_MAX: usize = 19;
    const HALF_WAY: u64 = 1 << 28;
    const STEPS_OFF: u64 = 2;
    let negative = text.first() == Some(&b'-');
    let start = usize::from(negative);
    let (mut at, mut digits, mut point) = (start, 0u64, None);
    while let Some(&byte) = text.get(at) {
        match byte {
            b'0'..=b'9' => digits = digits.wrapping_mul(10).wrapping_add(u64::from(byte - b'0')),
            b'.' if point.is_none() => {
                point = Some(at);
                while let Some(eight) = text[at + 1..].first_chunk().and_then(eight_digits) {
                    digits = digits.wrapping_mul(100_000_000).wrapping_add(eight);
                    at += 8;
                }
            }
            b',' => break,
            _ => return None,
        }
        at += 1;
    }
    let decimals = point.map_or(0, |point| at - point - 1);
    let is_zero_or_point = |byte: &u8| matches!(byte, b'0' | b'.');
    let count = at - start - usize::from(point.is_some());
    let leading = || text[start..at].iter().take_while(|byte| is_zero_or_point(byte)).count();
    if count == 0 || (count > DIGITS_MAX && at - start - leading() > DIGITS_MAX) {
        return None;
    }
    let magnitude = digits as f64 / POWERS.get(decimals)?;
    if (magnitude.to_bits() % (2 * HALF_WAY)).abs_diff(HALF_WAY) <= STEPS_OFF {
        return None;
    }
    // The cast rounds.
    let magnitude = magnitude as f32;
    Some((if negative { -magnitude } else { magnitude }, at))
}

/// The number that eight digits are, if they are: neighbours are put together side by side in one word, to pairs, to fours, to
/// eight. After Lemire, "Quickly parsing eight digits" (2018).
fn eight_digits(text: &[u8; 8]) -> Option<u64> {
    // The first digit is the lowest byte: it moves up onto its neighbour, ten, a hundred, ten thousand times as large.
    const PAIR: u64 = 1 + (10 << 8);
    const FOUR: u64 = 1 + (100 << 16);
    const EIGHT: u64 = 1 + (10_000 << 32);
    const HIGH_HALVES: u64 = 0xf0f0_f0f0_f0f0_f0f0;
    const LOW_HALVES: u64 = 0x0f0f_0f0f_0f0f_0f0f;
    let word = u64::from_le_bytes(*text);
    // A digit is 0x30 to 0x39, and stays below 0x40 with six more.
    let with_six = word.wrapping_add(0x0606_0606_0606_0606);
    let is_digits = (word & HIGH_HALVES) | ((with_six & HIGH_HALVES) >> 4) == 0x3333_3333_3333_3333;
    let pairs = (word & LOW_HALVES).wrapping_mul(PAIR) >> 8;
    let fours = (pairs & 0x00ff_00ff_00ff_00ff).wrapping_mul(FOUR) >> 16;
    is_digits.then_some((fours & 0x0000_ffff_0000_ffff).wrapping_mul(EIGHT) >> 32)
}

/// Metadata from JSON: an object, stored compact.
pub fn meta(raw: Option<&RawValue>) -> Result<Option<VectorMeta>, Rejection> {
    match raw.map(RawValue::get) {
        None => Ok(None),
        Some(text) => {
            check_value_depth(text)?;
            // A number no float can hold would hide the whole object from filters.
            if serde_json::from_str::<serde_json::Value>(text).is_err() {
                return Err(Rejection::invalid(
                    "meta holds a number beyond 64-bit floats, or text that is not Unicode",
                ));
            }
            VectorMeta::new(&crate::engine::json::compact(text)).map(Some)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    #[test]
    fn fields_keep_every_value_of_a_name() {
        let names = ["host", "x-a", "x-b"].map(HeaderName::from_static);
        let mut headers = HeaderMap::new();
        for (name, value) in [(1, "1"), (0, "h"), (1, "2"), (2, "3"), (1, "4")] {
            headers.append(names[name].clone(), HeaderValue::from_static(value));
        }
        let fields = Fields::from(headers.clone());
        for name in names {
            assert_eq!(fields.all(name.clone()).collect::<Vec<_>>(), headers.get_all(&name).iter().collect::<Vec<_>>());
            assert_eq!(fields.first(name.clone()), headers.get(&name));
        }
        assert_eq!(fields.first(header::ORIGIN), None);
        assert_eq!(HeaderMap::from(fields), headers);
    }

    /// Many digits, half-way cases, signs, exponents: always what the standard library reads.
    #[test]
    fn numbers_are_read_as_the_standard_library_reads_them() {
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed >> 33
        };
        let mut texts: Vec<String> =
            ["0", "-0", "-0.0", "16777217", "16777217.0", "0.1", "9007199254740993", "1e-3", "1E5"]
                .map(str::to_owned)
                .to_vec();
        for _ in 0..20_000 {
            let (number, digits) =
                (f32::from_bits(0x3000_0000 + (random() as u32 & 0x1fff_ffff)), random() as usize % 12);
            texts.push(format!("-{number:.digits$}"));
            texts.push(format!("{number}"));
            // Half-way between two neighbours, and a little beside.
            let middle = (f64::from(number) + f64::from(f32::from_bits(number.to_bits() + 1))) / 2.0;
            texts.extend([14, 17, 25].map(|digits| format!("{middle:.digits$}")));
            // As languages that have 64-bit floats alone write them.
            texts.push(f64::from(number).to_string());
            texts.extend((-3..=3).map(|steps| f64::from_bits(middle.to_bits().wrapping_add_signed(steps)).to_string()));
        }
        for text in &texts {
            let read = numbers_of(&format!("[ {text} ,{text},{text}]")).unwrap();
            let expected: f32 = text.parse().unwrap();
            assert_eq!(read.iter().map(|n| n.to_bits()).collect::<Vec<_>>(), [expected.to_bits(); 3], "{text}");
        }
    }

    #[test]
    fn vectors_take_numbers_and_nothing_else() {
        for (text, ok) in [
            ("[1,2.5,-3e-2]", true),
            (" [ 1 , 2 ] ", true),
            ("[]", false),
            ("[1e39]", false),
            ("[1e400]", false),
            ("[null]", false),
            ("[\"1\"]", false),
            ("[[1]]", false),
            ("[true]", false),
            ("{\"a\":1}", false),
            ("\"1,2\"", false),
        ] {
            assert_eq!(vector(Some(&raw(text)), None).is_ok(), ok, "{text}");
        }
        assert_eq!(vector(None, Some("AACAPwAAAEA=")).unwrap().unwrap().as_slice(), [1.0, 2.0]);
        assert!(vector(None, Some("AACAPwAA")).is_err());
        assert!(vector(None, Some("AADAfw==")).is_err(), "NaN");
    }

    #[test]
    fn numbers_are_rounded_once() {
        // Through f64 this one would round twice and come out one step higher.
        let text = "[1.00000017881393432617187499]";
        assert_eq!(numbers_of(text).unwrap()[0].to_bits(), 0x3f80_0001);
    }

    #[test]
    fn eight_digits_and_nothing_else() {
        assert_eq!(eight_digits(b"01234567"), Some(1_234_567));
        assert_eq!(eight_digits(b"99999999"), Some(99_999_999));
        for at in 0..8 {
            for byte in 0..=u8::MAX {
                let mut text = *b"24681357";
                text[at] = byte;
                let expected = std::str::from_utf8(&text).ok().filter(|_| byte.is_ascii_digit());
                assert_eq!(eight_digits(&text), expected.map(|text| text.parse().unwrap()), "{text:?}");
            }
        }
    }
}
