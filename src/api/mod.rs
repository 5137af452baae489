//! HTTP: the whole route table, and what every request passes through.
//!
//! ```text
//! serve.rs  connection ─▶ whole.rs, or hyper ─▶ CORS ─▶ Guard: key, rate, room, metrics ─▶ route ─▶ handler ─▶ Command ─▶ Engine
//!                                                                                                 ▲
//!                                                                    extract.rs: query, body, conditions, vectors
//! ```
//!
//! Invariants
//! - Only this folder knows axum and status codes; status codes stand in `error.rs` alone.
//! - No handler does a step of a commit: a client that hangs up drops the handler, and the commit must not notice.
//! - Every input is bounded where it is read: body, depth, names, lists.
//!
//! Deliberately absent: sessions, cookies, templates, content negotiation beyond `/v1/events`.

pub mod admin;
pub mod answer;
pub mod auth;
pub mod docs;
pub mod error;
pub mod events;
pub mod extract;
pub mod live;
pub mod offer;
mod render;
mod rest;
pub mod serve;
mod stall;
pub mod state;
pub mod tls;
pub mod vectors;
mod walk;
pub mod whole;

use crate::config::Config;
use crate::engine::Engine;
use crate::engine::command::{Command, Committed};
use crate::engine::metrics::{Metrics, RequestLabels};
use crate::error::{Error, Rejection};
use crate::keys::Right;
use crate::logging::AUDIT;
use crate::turns;
use answer::{Answer, OnTheirWay};
use auth::{Auth, Client, counted_address};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use error::{ApiError, ApiResult};
use extract::{Head, Payload, check_encoding, check_unconditional};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::{Layer, Service as _, ServiceExt};
use tower_http::cors::{AllowOrigin, Cors, CorsLayer};

/// What handlers share. Cloned for every request, so it is one pointer.
#[derive(Clone, Debug)]
pub struct App(Arc<Shared>);

impl std::ops::Deref for App {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// See [`App`].
#[derive(Debug)]
pub struct Shared {
    /// The database.
    pub engine: Engine,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// For the health answer.
    pub durability: &'static str,
    /// When the server started.
    pub started: Instant,
    /// Open connections.
    pub connections: AtomicU64,
    /// Snapshots being walked for streams, at most [`WALKS_MAX`].
    pub walks: Arc<Semaphore>,
    /// Snapshots being taken on request, one at a time.
    pub snapshots: Arc<Semaphore>,
    /// Backups being taken, one at a time.
    pub backups: Arc<Semaphore>,
    /// KiB of request bodies held in memory at a time; see [`App::admit`].
    bodies_kib: Arc<Semaphore>,
    /// Large answers held in memory until their readers have taken them.
    answers: OnTheirWay,
    /// Who may do what.
    pub auth: Auth,
    /// What takes longer is logged.
    slow_request: Option<Duration>,
    /// Numbers requests whose senders did not name them, when one is logged.
    next_request: AtomicU64,
    meters: Meters,
}

/// A request's name: the client's, or ours where one is logged.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest name of a client's that is taken over.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Snapshots walked for streams at the same time; more wait, their streams open.
pub const WALKS_MAX: usize = 32;
/// Large bodies in memory together, and large answers: this, and never less than four of the largest bodies.
const BODIES_BYTES_MIN: usize = 256 << 20;
/// Bodies smaller than this are not counted: the connection limit bounds them.
const BODY_FREE_BYTES: u64 = 64 << 10;
/// How long a large body waits for others to go.
const BODY_PATIENCE: Duration = Duration::from_secs(5);

impl App {
    /// Over an open engine. Fails when the key file cannot be used.
    pub fn new(engine: Engine, config: &Config) -> Result<Self, Error> {
        let meters = Meters::new();
        let bodies_bytes_max = BODIES_BYTES_MIN.max(4 * config.max_body_bytes);
        Ok(Self(Arc::new(Shared {
            engine,
            auth: Auth::new(config)?,
            slow_request: config.slow_request,
            next_request: AtomicU64::new(1),
            meters,
            max_body_bytes: config.max_body_bytes,
            durability: if config.data_dir.is_some() { config.fsync.as_str() } else { "ephemeral" },
            started: Instant::now(),
            connections: AtomicU64::new(0),
            walks: Arc::new(Semaphore::new(WALKS_MAX)),
            snapshots: Arc::new(Semaphore::new(1)),
            backups: Arc::new(Semaphore::new(1)),
            bodies_kib: Arc::new(Semaphore::new(bodies_bytes_max >> 10)),
            answers: OnTheirWay::new(bodies_bytes_max),
        })))
    }

    /// Commits what its sender may do: all of it or nothing. `body` is the request's, for telling a retry by.
    pub async fn commit(&self, head: &Head, body: &[u8], mut command: Command) -> ApiResult<Committed> {
        command.retry = head.retry(body)?;
        self.commit_part(head, command).await
    }

    /// The same for a part of a request that takes several commands: its answer is not remembered.
    pub async fn commit_part(&self, head: &Head, command: Command) -> ApiResult<Committed> {
        if !head.uri.path().starts_with(state::PREFIX) {
            check_unconditional(&head.headers)?;
        }
        if head.grant.as_ref().is_some_and(|grant| grant.is_revoked()) {
            return Err(ApiError::Unauthorized("the key has ended meanwhile"));
        }
        for (index, op) in command.ops.iter().enumerate() {
            head.need_op(op).map_err(|e| if command.is_batch { e.at(index) } else { e })?;
        }
        Ok(self.engine.submit(command).await?)
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

/// The busiest route.
const KEY_ROUTE: &str = "/v1/state/{key}";
const BATCH_ROUTE: &str = "/v1/batch";
const EVENTS_ROUTE: &str = "/v1/events";
const SEARCH_ROUTE: &str = "/v1/vector/{collection}/search";
/// Every route there is, the busiest first, because requests are counted by walking this list. A test holds
/// `openapi.yaml` against it.
pub const ROUTES: &[(&str, &str)] = &[
    ("GET", KEY_ROUTE),
    ("PUT", KEY_ROUTE),
    ("PATCH", KEY_ROUTE),
    ("DELETE", KEY_ROUTE),
    ("GET", "/v1/state"),
    ("POST", BATCH_ROUTE),
    ("GET", EVENTS_ROUTE),
    ("POST", EVENTS_ROUTE),
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
    ("POST", SEARCH_ROUTE),
    ("GET", "/v1/health"),
    ("GET", "/v1/metrics"),
    ("POST", "/v1/token"),
    ("POST", "/v1/admin/snapshot"),
    ("GET", "/v1/admin/backup"),
    ("GET", "/"),
    ("GET", "/console/{file}"),
    ("GET", "/docs"),
    ("GET", "/openapi.yaml"),
];

/// The service. Built once.
pub fn service(app: App, config: &Config) -> Service {
    let key = get(state::get).put(state::put).patch(state::patch).delete(state::delete);
    let router = Router::new()
        .route("/", get(docs::console))
        .route("/console/{file}", get(docs::asset))
        .route("/docs", get(docs::docs))
        .route("/openapi.yaml", get(docs::openapi))
        .route("/v1/health", get(admin::health))
        .route("/v1/metrics", get(admin::metrics))
        .route("/v1/admin/snapshot", post(admin::snapshot))
        .route("/v1/token", post(auth::token))
        .route("/v1/admin/backup", get(admin::backup))
        .route("/v1/state", get(state::list))
        .route("/v1/state/{*key}", key.clone())
        // The empty key, which no pattern of axum's takes, is a bad one like others.
        .route("/v1/state/", key)
        .route(BATCH_ROUTE, post(state::batch))
        .route(EVENTS_ROUTE, get(events::events).post(events::publish))
        .route("/v1/vector", get(vectors::collections))
        .route("/v1/vector/{collection}", get(vectors::info).post(vectors::create).delete(vectors::drop_collection))
        .route("/v1/vector/{collection}/add", post(vectors::add))
        .route("/v1/vector/{collection}/upsert", post(vectors::upsert))
        .route("/v1/vector/{collection}/update", post(vectors::update))
        .route("/v1/vector/{collection}/delete", post(vectors::delete))
        .route("/v1/vector/{collection}/get", get(vectors::get))
        .route("/v1/vector/{collection}/list", get(vectors::list))
        .route("/v1/vector/{collection}/count", post(vectors::count))
        .route(SEARCH_ROUTE, post(vectors::search))
        .fallback(|| async { ApiError::RouteNotFound })
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed })
        .with_state(app.clone());
    let guard = Guard { app, router, peer: IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    // Outside the guard: a preflight carries no key, and a refusal must be readable by the page it is for.
    match cors(config) {
        Some(cors) => Service::Cors(Box::new(cors.layer(guard))),
        None => Service::Plain(guard),
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
        HeaderName::from_static("idempotency-key"),
        REQUEST_ID,
    ];
    let methods = [Method::GET, Method::PUT, Method::POST, Method::PATCH, Method::DELETE];
    Some(
        CorsLayer::new()
            .allow_origin(origin)
            .allow_methods(methods)
            .allow_headers(headers)
            .expose_headers([header::ETAG, header::RETRY_AFTER, REQUEST_ID])
            .max_age(Duration::from_secs(3600)),
    )
}

/// The whole service, as a connection uses it.
#[derive(Clone, Debug)]
pub enum Service {
    /// Without CORS.
    Plain(Guard),
    /// With it.
    Cors(Box<Cors<Guard>>),
}

impl Service {
    /// The same for one connection.
    #[must_use]
    pub fn of(&self, peer: IpAddr) -> Self {
        let mut service = self.clone();
        match &mut service {
            Self::Plain(guard) => guard.peer = peer,
            Self::Cors(cors) => cors.get_mut().peer = peer,
        }
        service
    }

    /// Answers one request.
    pub async fn answer(&self, head: Head, body: Payload) -> Answer {
        match self {
            Self::Plain(guard) => guard.answer(head, body).await,
            Self::Cors(cors) => match cors.clone().oneshot(head.into_plain_request(body)).await {
                Ok(response) => response.into(),
                Err(never) => match never {},
            },
        }
    }
}

/// Checks the key, makes room for the body, counts the request. Not one of axum's middlewares: those box and clone the
/// whole router for each request, which measured a tenth of a small GET.
#[derive(Clone, Debug)]
pub struct Guard {
    app: App,
    router: Router,
    /// Who is at the other end of the connection.
    peer: IpAddr,
}

/// A request about the server itself: told when it is over, also when its client hangs up before.
struct AdminAct<'a> {
    key: Box<str>,
    peer: IpAddr,
    route: &'a str,
    /// `None` until it is answered.
    status: Option<u16>,
}

impl Drop for AdminAct<'_> {
    fn drop(&mut self) {
        let Self { key, peer, route, status } = self;
        tracing::info!(target: AUDIT, action = "admin", key = %key, %peer, route, status);
    }
}

/// Whether the server is well: asked without a key, and however much its asker's address asks besides.
const HEALTH_ROUTE: &str = "/v1/health";

/// What acts on the server itself rather than on what it holds.
fn is_about_server(path: &str) -> bool {
    path.starts_with("/v1/admin/")
}

/// The console and what it is made of.
fn is_page(path: &str) -> bool {
    path == "/" || path.starts_with("/console/")
}

/// What needs no key: whether the server is well, the page that asks for the key, and what a browser asks before it sends one.
fn is_public(path: &str, method: &Method) -> bool {
    path == HEALTH_ROUTE || is_page(path) || *method == Method::OPTIONS
}

impl Guard {
    async fn answer(&self, mut head: Head, body: Payload) -> Answer {
        let started = Instant::now();
        turns::note_request();
        let app = &self.app;
        let meter = app.meters.of(head.uri.path(), &head.method);
        let request_id = head.headers.first(REQUEST_ID).filter(|id| id.len() <= REQUEST_ID_BYTES_MAX).cloned();
        // A long poll takes as long as it was asked to.
        let may_wait = head.uri.path() == EVENTS_ROUTE;
        let is_event_source = may_wait && events::is_event_source(&head);
        let mut admin = None;
        let let_in = self.let_in(&mut head, meter, &mut admin);
        let mut audit = admin.map(|key| AdminAct { key, peer: self.peer, route: meter.route, status: None });
        let answer = match let_in {
            Ok(()) => self.answer_in_bounds(head, body, meter.route).await,
            Err(error) => Err(error),
        };
        let mut answer = answer.unwrap_or_else(|error| error.into_response().into());
        let status = answer.status();
        if let Some(audit) = &mut audit {
            audit.status = Some(status.as_u16());
        }
        if is_event_source && matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            answer = events::come_back(answer.into_response()).into();
        }
        let took = started.elapsed();
        let is_slow = !may_wait && app.slow_request.is_some_and(|slow| took >= slow);
        if is_slow || status.is_server_error() || request_id.is_some() {
            let mut response = answer.into_response();
            self.name_and_log(&mut response, meter, request_id, took, is_slow);
            answer = response.into();
        }
        meter.count(app.engine.metrics(), status.as_u16(), took.as_secs_f64());
        answer
    }

    /// Has the request answered where there is room for its body, and for its answer.
    async fn answer_in_bounds(&self, head: Head, body: Payload, route: &'static str) -> ApiResult {
        let app = &self.app;
        let is_read = matches!(head.method, Method::GET | Method::HEAD);
        // Nobody reads the body of such a one.
        let answer = match app.admit(if is_read { Some(0) } else { body.bytes_max() }).await? {
            None => self.route(head, body, route).await,
            Some(room) => self.route_to_the_end(head, body, route, room).await,
        };
        app.answers.count(answer, is_read || route == SEARCH_ROUTE)
    }

    /// Has the request answered. What is asked of a key goes to its handler directly: matching the path once more, boxing and
    /// telling handlers about their route measured seven hundredths of a small GET.
    async fn route(&self, head: Head, body: Payload, route: &'static str) -> Answer {
        if route != KEY_ROUTE || head.method == Method::HEAD {
            return match self.router.clone().call(head.into_request(body)).await {
                Ok(response) => response.into(),
                Err(never) => match never {},
            };
        }
        let app = State(self.app.clone());
        let answer = match head.method {
            Method::GET => state::get(app, head).await,
            Method::PUT => state::put(app, head, body).await,
            Method::PATCH => state::patch(app, head, body).await,
            Method::DELETE => state::delete(app, head, body).await,
            _ => Err(ApiError::MethodNotAllowed),
        };
        answer.unwrap_or_else(|error| error.into_response().into())
    }

    /// The same for one that needs room: also when its client hangs up, what was asked for may stay in a queue, and takes
    /// its room until it is done.
    async fn route_to_the_end(
        &self,
        head: Head,
        body: Payload,
        route: &'static str,
        room: OwnedSemaphorePermit,
    ) -> Answer {
        let guard = self.clone();
        let answered = tokio::spawn(async move {
            let answer = guard.route(head, body, route).await;
            drop(room);
            answer
        });
        answered.await.unwrap_or_else(|_| ApiError::Internal.into_response().into())
    }

    /// Gives the answer the request's name, its sender's or one of ours, and says what was slow or failed: by the name the
    /// line in the log and the answer find each other.
    fn name_and_log(
        &self,
        response: &mut Response,
        meter: &Meter,
        request_id: Option<HeaderValue>,
        took: Duration,
        is_slow: bool,
    ) {
        let app = &self.app;
        let request_id = request_id.unwrap_or_else(|| {
            let number = app.next_request.fetch_add(1, Ordering::Relaxed);
            HeaderValue::try_from(format!("{:x}-{number}", std::process::id())).expect("digits are a header value")
        });
        let (status, took_ms) = (response.status(), took.as_millis());
        let (route, method) = (meter.route, meter.name);
        if is_slow {
            tracing::warn!(?request_id, method, route, status = status.as_u16(), took_ms, "slow request");
        } else if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(?request_id, method, route, took_ms, "a request failed");
        } else if status.is_server_error() {
            // Full, overloaded, stopping: the metrics count them, and where it matters a line of its own says why.
            tracing::debug!(?request_id, method, route, status = status.as_u16(), took_ms, "refused");
        }
        response.headers_mut().insert(REQUEST_ID, request_id);
    }

    /// Whether the request may pass; if so it carries from here on what its sender may do. Sets `admin` to the name of the
    /// key when it is about the server itself.
    fn let_in(&self, head: &mut Head, meter: &Meter, admin: &mut Option<Box<str>>) -> ApiResult<()> {
        let auth = &self.app.auth;
        auth.check_browser(head)?;
        let path = head.uri.path();
        let is_about_server = is_about_server(path) && head.method != Method::OPTIONS;
        let address = Client::Address(counted_address(self.peer));
        let grant =
            if is_public(path, &head.method) { Ok(None) } else { auth.identify(head, || self.app.engine.now_ms()) };
        let grant = match grant {
            Ok(grant) => grant,
            Err(error) => {
                // Guessing costs the guesser's own budget.
                auth.check_rate(&address)?;
                let (route, reason) = (meter.route, error.reason());
                tracing::info!(target: AUDIT, action = "refused", peer = %self.peer, route, reason);
                return Err(error);
            }
        };
        if is_about_server {
            *admin = Some(grant.as_ref().map_or_else(|| "(open)".into(), |grant| grant.name.clone()));
        }
        let client = grant.as_ref().map_or(address, |grant| Client::Key(grant.name.clone()));
        // A page of the console is twenty files at once.
        if path != HEALTH_ROUTE && !is_page(path) {
            auth.check_rate(&client)?;
        }
        if !is_public(path, &head.method) {
            check_encoding(&head.uri)?;
        }
        if let Some(grant) = grant {
            if is_about_server {
                grant.need(Right::Admin)?;
            }
            head.grant = Some(grant);
        }
        if auth.counts_streams() {
            head.client = Some(client);
        }
        Ok(())
    }
}

impl tower::Service<Request> for Guard {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let guard = self.clone();
        Box::pin(async move {
            let (head, body) = Head::take(request);
            Ok(guard.answer(head, body).await.into_response())
        })
    }
}

/// Counters of each route, found without hashing or allocating.
#[derive(Debug)]
struct Meters {
    routes: Vec<Meter>,
    /// What matches no route.
    other: Meter,
}

/// Counters of one route and method. Labels are the route table's words: clients must not choose them.
#[derive(Debug)]
struct Meter {
    method: Method,
    pattern: Pattern,
    /// The method, or `(other)`, as labels say it.
    name: &'static str,
    route: &'static str,
    /// Answers and how long they took, by status less 100, made when first needed.
    by_status: Vec<OnceLock<(Counter, Histogram)>>,
}

impl Meter {
    fn new(name: &'static str, route: &'static str) -> Self {
        let by_status = (100..600).map(|_| OnceLock::new()).collect();
        Self { method: name.parse().unwrap_or_default(), name, pattern: Pattern::new(route), route, by_status }
    }

    fn count(&self, metrics: &Metrics, status: u16, seconds: f64) {
        let Some(place) = self.by_status.get(usize::from(status).saturating_sub(100)) else { return };
        let (answers, durations) = place.get_or_init(|| {
            let (route, method) = (self.route.to_owned(), self.name.to_owned());
            let labels = RequestLabels { route, method, status };
            (metrics.requests.get_or_create(&labels).clone(), metrics.request_seconds.get_or_create(&labels).clone())
        });
        answers.inc();
        durations.observe(seconds);
    }
}

impl Meters {
    fn new() -> Self {
        let routes = ROUTES.iter().map(|(method, route)| Meter::new(method, route)).collect();
        Self { routes, other: Meter::new("(other)", "(other)") }
    }

    fn of(&self, path: &str, method: &Method) -> &Meter {
        // HEAD is answered by the route of GET.
        let method = if *method == Method::HEAD { &Method::GET } else { method };
        let found = self.routes.iter().find(|m| m.method == *method && m.pattern.matches(path));
        found.unwrap_or(&self.other)
    }
}

/// A route as [`ROUTES`] writes it, taken apart.
#[derive(Debug)]
enum Pattern {
    /// `/v1/state`
    Exact(&'static str),
    /// `/v1/state/{key}`: a key may contain slashes.
    Key(&'static str),
    /// `/v1/vector/{collection}/get`: what is before and after the name.
    Name(&'static str, &'static str),
}

impl Pattern {
    fn new(route: &'static str) -> Self {
        match route.split_once('{') {
            None => Self::Exact(route),
            Some((prefix, "key}")) => Self::Key(prefix),
            Some((prefix, rest)) => Self::Name(prefix, rest.split_once('}').map_or("", |(_, suffix)| suffix)),
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(route) => *route == path,
            Self::Key(prefix) => path.starts_with(prefix),
            Self::Name(prefix, suffix) => path
                .strip_prefix(prefix)
                .and_then(|tail| tail.strip_suffix(suffix))
                .is_some_and(|name| !name.is_empty() && !name.contains('/')),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_counted_under_their_route() {
        for (path, expected) in [
            ("/", "/"),
            ("/v1/state", "/v1/state"),
            ("/v1/state/a", "/v1/state/{key}"),
            ("/v1/state/a/b//c", "/v1/state/{key}"),
            ("/v1/state/", "/v1/state/{key}"),
            ("/v1/vector", "/v1/vector"),
            ("/v1/vector/c", "/v1/vector/{collection}"),
            ("/v1/vector/c/get", "/v1/vector/{collection}/get"),
        ] {
            let found: Vec<_> = ROUTES
                .iter()
                .filter(|(m, route)| *m == "GET" && Pattern::new(route).matches(path))
                .map(|(_, r)| *r)
                .collect();
            assert_eq!(found, [expected], "{path}");
        }
        assert!(!ROUTES.iter().any(|(_, route)| {
            let pattern = Pattern::new(route);
            pattern.matches("/v1/states") || pattern.matches("/nope")
        }));
    }
}
