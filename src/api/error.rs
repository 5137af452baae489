//! The only place with status codes: what went wrong, as `application/problem+json` (RFC 9457).

use super::answer::Answer;
use crate::engine::frame::push_fmt;
use crate::engine::json::push_string;
use crate::error::Rejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

/// Why a request got no success.
#[derive(Debug)]
pub enum ApiError {
    /// The engine or a parser refused it.
    Rejected(Rejection),
    /// No such path.
    RouteNotFound,
    /// The path exists, not with this method; axum adds `Allow`.
    MethodNotAllowed,
    /// No or a wrong key; the text says which.
    Unauthorized(&'static str),
    /// More than a limit by caller allows.
    RateLimited {
        /// What there were too many of.
        what: &'static str,
        /// When to come back.
        retry_after_s: u64,
    },
    /// A body of a type the route does not take; the text says which it takes.
    UnsupportedMediaType(&'static str),
    /// The body did not arrive in time.
    BodyTimeout,
    /// Something the operator has to look at; the client learns no more.
    Internal,
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

impl ApiError {
    /// Why a caller was not let in, for the audit.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unauthorized(reason) => reason,
            _ => "",
        }
    }
}

/// What handlers return.
pub type ApiResult<T = Answer> = Result<T, ApiError>;

/// Shorthand for a 400.
pub fn invalid(detail: impl Into<String>) -> ApiError {
    ApiError::Rejected(Rejection::InvalidArgument(detail.into()))
}

fn status_and_code(rejection: &Rejection) -> (StatusCode, &'static str) {
    match rejection {
        Rejection::InvalidArgument(_) => (StatusCode::BAD_REQUEST, "invalid_argument"),
        Rejection::DimensionMismatch { .. } => (StatusCode::BAD_REQUEST, "dimension_mismatch"),
        Rejection::InvalidVector(_) => (StatusCode::BAD_REQUEST, "invalid_vector"),
        Rejection::KeyNotFound(_) => (StatusCode::NOT_FOUND, "key_not_found"),
        Rejection::CollectionNotFound(_) => (StatusCode::NOT_FOUND, "collection_not_found"),
        Rejection::VectorNotFound(_) => (StatusCode::NOT_FOUND, "vector_not_found"),
        Rejection::RevisionConflict { .. } | Rejection::ConflictWithin { .. } => {
            (StatusCode::CONFLICT, "revision_conflict")
        }
        Rejection::AlreadyExists(_) => (StatusCode::CONFLICT, "already_exists"),
        Rejection::PreconditionFailed { .. } => (StatusCode::PRECONDITION_FAILED, "precondition_failed"),
        Rejection::RevisionCompacted { .. } | Rejection::RevisionLost { .. } => {
            (StatusCode::GONE, "revision_compacted")
        }
        Rejection::RetryMismatch { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused"),
        Rejection::Forbidden(_) => (StatusCode::FORBIDDEN, "forbidden"),
        Rejection::PayloadTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large"),
        Rejection::StorageFull(_) => (StatusCode::INSUFFICIENT_STORAGE, "storage_full"),
        Rejection::Overloaded(_) => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
        Rejection::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        Rejection::Poisoned => (StatusCode::SERVICE_UNAVAILABLE, "poisoned"),
        Rejection::InBatch { rejection, .. } => status_and_code(rejection),
    }
}

/// Members beyond the standard ones, as JSON text with a leading comma each.
fn members(rejection: &Rejection) -> String {
    let mut out = String::new();
    match rejection {
        Rejection::DimensionMismatch { expected, got } => {
            push_fmt(&mut out, format_args!(",\"expected\":{expected},\"got\":{got}"));
        }
        Rejection::RevisionConflict { expected, actual } | Rejection::ConflictWithin { expected, before: actual } => {
            push_fmt(&mut out, format_args!(",\"expected\":{expected},\"actual\":{actual}"));
        }
        Rejection::PreconditionFailed { actual } => push_fmt(&mut out, format_args!(",\"actual\":{actual}")),
        Rejection::RevisionCompacted { oldest, head } => {
            push_fmt(&mut out, format_args!(",\"reason\":\"compacted\",\"oldest\":{oldest},\"head\":{head}"));
        }
        Rejection::RevisionLost { oldest, head } => {
            push_fmt(&mut out, format_args!(",\"reason\":\"lost\",\"oldest\":{oldest},\"head\":{head}"));
        }
        Rejection::PayloadTooLarge { limit_bytes, .. } => {
            push_fmt(&mut out, format_args!(",\"limit_bytes\":{limit_bytes}"))
        }
        Rejection::InBatch { index, rejection } => {
            out = members(rejection);
            push_fmt(&mut out, format_args!(",\"op\":{index}"));
        }
        _ => {}
    }
    out
}

/// An error as it goes out.
struct Problem {
    status: StatusCode,
    retry_after_s: Option<u64>,
    /// `application/problem+json`
    body: String,
}

impl ApiError {
    /// As a whole HTTP/1.1 answer that ends its connection, for one that never gets as far as a request.
    #[must_use]
    pub fn into_last_words(self) -> String {
        let Problem { status, retry_after_s, body } = self.into_problem();
        let reason = status.canonical_reason().unwrap_or("Error");
        let retry_after = retry_after_s.map_or_else(String::new, |seconds| format!("retry-after: {seconds}\r\n"));
        format!(
            "HTTP/1.1 {} {reason}\r\ncontent-type: {PROBLEM_JSON}\r\n{retry_after}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
            status.as_u16(),
            body.len()
        )
    }

    fn into_problem(self) -> Problem {
        let mut retry_after_s = None;
        let (status, code, detail, members) = match self {
            Self::Rejected(rejection) => {
                let (status, code) = status_and_code(&rejection);
                if matches!(code, "overloaded" | "shutting_down") {
                    retry_after_s = Some(1);
                }
                (status, code, rejection.to_string(), members(&rejection))
            }
            Self::RouteNotFound => {
                let detail = "there is no such route; GET /docs lists them".to_owned();
                (StatusCode::NOT_FOUND, "route_not_found", detail, String::new())
            }
            Self::MethodNotAllowed => {
                let detail = "the route does not take this method; the Allow header lists those it takes".to_owned();
                (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", detail, String::new())
            }
            Self::Unauthorized(detail) => (StatusCode::UNAUTHORIZED, "unauthorized", detail.to_owned(), String::new()),
            Self::RateLimited { what, retry_after_s: seconds } => {
                retry_after_s = Some(seconds);
                let detail = format!("too many {what}; come back in {seconds} s");
                (StatusCode::TOO_MANY_REQUESTS, "rate_limited", detail, String::new())
            }
            Self::UnsupportedMediaType(takes) => {
                let detail = format!("this route takes a body {takes}");
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail, String::new())
            }
            Self::BodyTimeout => {
                let detail = "the body did not arrive in time; send it without pauses".to_owned();
                (StatusCode::REQUEST_TIMEOUT, "request_timeout", detail, String::new())
            }
            Self::Internal => {
                let detail = "the server could not do this; its log says why".to_owned();
                (StatusCode::INTERNAL_SERVER_ERROR, "internal", detail, String::new())
            }
        };
        let mut body = String::with_capacity(160 + detail.len());
        push_fmt(&mut body, format_args!("{{\"type\":\"urn:kiss-vdb:problem:{code}\",\"title\":"));
        push_string(&mut body, status.canonical_reason().unwrap_or("Error"));
        push_fmt(&mut body, format_args!(",\"status\":{},\"detail\":", status.as_u16()));
        push_string(&mut body, &detail);
        push_fmt(&mut body, format_args!(",\"code\":\"{code}\"{members}}}"));
        Problem { status, retry_after_s, body }
    }
}

const PROBLEM_JSON: &str = "application/problem+json";

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Problem { status, retry_after_s, body } = self.into_problem();
        let mut response = (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response();
        if let Some(seconds) = retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            // Which of the two was not taken, the coding or the type, is in the detail (RFC 9110, 12.5.3).
            response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        response
    }
}
