//! HTTP: the whole route table, and what every request passes through.
//!
//! ```text
//! serve.rs  connection ─▶ CORS ─▶ guard: key, metrics ─▶ route ─▶ handler ─▶ Command ─▶ Engine
//!                                                                    ▲
//!                                       extract.rs: query, body, conditions, vectors
//! ```
//!
//! Invariants
//! - Only this folder knows axum and status codes; status codes stand in `error.rs` alone.
//! - No handler does a step of a commit: a client that hangs up drops the handler, and the commit must not notice.
//! - Every input is bounded where it is read: body, depth, names, lists.
//!
//! Deliberately absent: sessions, cookies, templates, content negotiation beyond `/v1/events`.

pub mod admin;
pub mod docs;
pub mod error;
pub mod events;
pub mod extract;
pub mod serve;
pub mod state;
pub mod vectors;

use crate::config::Config;
use crate::engine::Engine;
use crate::engine::metrics::{RequestLabels, RouteLabels};
use crate::error::Rejection;
use crate::revision::Revision;
use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use error::ApiError;
use http_body::Body as _;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::cors::{AllowOrigin, CorsLayer};

/// What handlers share. Cheap to clone.
#[derive(Clone, Debug)]
pub struct App {
    /// The database.
    pub engine: Engine,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// For the health answer.
    pub durability: &'static str,
    /// When the server started.
    pub started: Instant,
    /// Open connections.
    pub connections: Arc<AtomicU64>,
    /// Snapshots being walked for streams, at most [`WALKS_MAX`].
    pub walks: Arc<Semaphore>,
    /// KiB of request bodies held in memory at a time; see [`App::admit`].
    bodies_kib: Arc<Semaphore>,
    api_key: Option<Arc<str>>,
}

/// Snapshots walked for streams at the same time; more wait before their stream opens.
pub const WALKS_MAX: usize = 64;
/// Bodies in memory together: this, and never less than four of the largest.
const BODIES_BYTES_MIN: usize = 256 << 20;
/// Bodies smaller than this are not counted: the connection limit bounds them.
const BODY_FREE_BYTES: u64 = 64 << 10;
/// How long a large body waits for others to go.
const BODY_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

impl App {
    /// Over an open engine.
    #[must_use]
    pub fn new(engine: Engine, config: &Config) -> Self {
        Self {
            engine,
            max_body_bytes: config.max_body_bytes,
            durability: if config.data_dir.is_some() { config.fsync.as_str() } else { "ephemeral" },
            started: Instant::now(),
            connections: Arc::new(AtomicU64::new(0)),
            walks: Arc::new(Semaphore::new(WALKS_MAX)),
            bodies_kib: Arc::new(Semaphore::new(BODIES_BYTES_MIN.max(4 * config.max_body_bytes) >> 10)),
            api_key: config.api_key.as_deref().map(Into::into),
        }
    }

    /// Room for a request's body, held until it is answered. A body of unknown length counts as the largest.
    async fn admit(&self, announced_bytes: Option<u64>) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
        let largest = self.max_body_bytes as u64;
        let bytes = announced_bytes.unwrap_or(largest).min(largest);
        if bytes <= BODY_FREE_BYTES {
            return Ok(None);
        }
        let kib = u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
        let permit = tokio::time::timeout(BODY_PATIENCE, Arc::clone(&self.bodies_kib).acquire_many_owned(kib)).await;
        match permit {
            Ok(Ok(permit)) => Ok(Some(permit)),
            _ => Err(Rejection::Overloaded("too many large bodies at once; retry in a moment").into()),
        }
    }
}

/// Every route there is. A test holds `openapi.yaml` against this list.
pub const ROUTES: &[(&str, &str)] = &[
    ("GET", "/"),
    ("GET", "/docs"),
    ("GET", "/openapi.yaml"),
    ("GET", "/v1/health"),
    ("GET", "/v1/metrics"),
    ("POST", "/v1/admin/snapshot"),
    ("GET", "/v1/state"),
    ("GET", "/v1/state/{key}"),
    ("PUT", "/v1/state/{key}"),
    ("PATCH", "/v1/state/{key}"),
    ("DELETE", "/v1/state/{key}"),
    ("POST", "/v1/batch"),
    ("GET", "/v1/events"),
    ("POST", "/v1/events"),
    ("GET", "/v1/vector"),
    ("GET", "/v1/vector/{collection}"),
    ("POST", "/v1/vector/{collection}"),
    ("DELETE", "/v1/vector/{collection}"),
    ("POST", "/v1/vector/{collection}/add"),
    ("POST", "/v1/vector/{collection}/upsert"),
    ("POST", "/v1/vector/{collection}/update"),
    ("POST", "/v1/vector/{collection}/delete"),
    ("GET", "/v1/vector/{collection}/get"),
    ("GET", "/v1/vector/{collection}/list"),
    ("POST", "/v1/vector/{collection}/count"),
    ("POST", "/v1/vector/{collection}/search"),
];

/// The service. Built once.
pub fn router(app: App, config: &Config) -> Router {
    let router = Router::new()
        .route("/", get(docs::console))
        .route("/docs", get(docs::docs))
        .route("/openapi.yaml", get(docs::openapi))
        .route("/v1/health", get(admin::health))
        .route("/v1/metrics", get(admin::metrics))
        .route("/v1/admin/snapshot", post(admin::snapshot))
        .route("/v1/state", get(state::list))
        .route("/v1/state/{*key}", get(state::get).put(state::put).patch(state::patch).delete(state::delete))
        .route("/v1/batch", post(state::batch))
        .route("/v1/events", get(events::events).post(events::publish))
        .route("/v1/vector", get(vectors::collections))
        .route("/v1/vector/{collection}", get(vectors::info).post(vectors::create).delete(vectors::drop_collection))
        .route("/v1/vector/{collection}/add", post(vectors::add))
        .route("/v1/vector/{collection}/upsert", post(vectors::upsert))
        .route("/v1/vector/{collection}/update", post(vectors::update))
        .route("/v1/vector/{collection}/delete", post(vectors::delete))
        .route("/v1/vector/{collection}/get", get(vectors::get))
        .route("/v1/vector/{collection}/list", get(vectors::list))
        .route("/v1/vector/{collection}/count", post(vectors::count))
        .route("/v1/vector/{collection}/search", post(vectors::search))
        .fallback(|| async { ApiError::RouteNotFound })
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed })
        .layer(axum::middleware::from_fn_with_state(app.clone(), guard))
        .with_state(app);
    // Outside the guard: a preflight carries no key.
    match cors(config) {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

fn cors(config: &Config) -> Option<CorsLayer> {
    if config.cors_origins.is_empty() {
        return None;
    }
    let origin = if config.cors_origins.iter().any(|o| o == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(config.cors_origins.iter().filter_map(|o| HeaderValue::from_str(o).ok()))
    };
    let headers = [
        header::AUTHORIZATION,
        header::CONTENT_TYPE,
        header::ACCEPT,
        header::CACHE_CONTROL,
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        HeaderName::from_static("last-event-id"),
    ];
    let methods = [Method::GET, Method::PUT, Method::POST, Method::PATCH, Method::DELETE];
    Some(
        CorsLayer::new()
            .allow_origin(origin)
            .allow_methods(methods)
            .allow_headers(headers)
            .expose_headers([header::ETAG, header::RETRY_AFTER])
            .max_age(std::time::Duration::from_secs(3600)),
    )
}

/// Checks the key and counts the request.
async fn guard(State(app): State<App>, path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let is_allowed = match &app.api_key {
        Some(key) if request.uri().path() != "/v1/health" => bearer(&request).is_some_and(|given| same(given, key)),
        _ => true,
    };
    let response = if !is_allowed {
        ApiError::Unauthorized.into_response()
    } else {
        match app.admit(request.body().size_hint().upper()).await {
            Ok(_room) => next.run(request).await,
            Err(error) => error.into_response(),
        }
    };
    // The route, never the path: clients must not choose label values.
    let route = path.as_ref().map_or("(none)", |p| p.as_str()).replace("{*key}", "{key}");
    let method = match method {
        Method::GET | Method::PUT | Method::POST | Method::PATCH | Method::DELETE | Method::HEAD => {
            method.as_str().to_owned()
        }
        _ => "(other)".to_owned(),
    };
    let metrics = app.engine.metrics();
    let status = response.status().as_u16();
    metrics
        .request_seconds
        .get_or_create(&RouteLabels { route: route.clone(), method: method.clone() })
        .observe(started.elapsed().as_secs_f64());
    metrics.requests.get_or_create(&RequestLabels { route, method, status }).inc();
    response
}

fn bearer(request: &Request) -> Option<&str> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// Compares without telling by its time how much was right.
fn same(given: &str, key: &str) -> bool {
    let difference = given.bytes().zip(key.bytes()).fold(given.len() ^ key.len(), |d, (a, b)| d | usize::from(a ^ b));
    difference == 0
}

/// A JSON answer.
pub fn json(status: StatusCode, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A JSON answer with its revision as `ETag`.
pub fn json_with_etag(status: StatusCode, body: String, revision: Revision) -> Response {
    let mut response = json(status, body);
    let etag = HeaderValue::from_str(&format!("\"{revision}\"")).expect("digits in quotes are a header value");
    response.headers_mut().insert(header::ETAG, etag);
    response
}
