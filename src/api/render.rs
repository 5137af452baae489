//! Parts of answers that several routes have in common.

use super::error::{ApiResult, invalid};
use crate::engine::command::{KEY_BYTES_MAX, Key, Outcome};
use crate::engine::frame::{push_fmt, push_u64, push_value};
use crate::engine::json::push_string;
use crate::revision::Revision;
use crate::vector::VectorId;
use base64::Engine as _;
use std::num::NonZeroU64;

/// A page of entries ends early beyond this, so that large values cannot make an answer of gigabytes.
pub const PAGE_BYTES_MAX: usize = 32 << 20;

/// Appends one outcome's JSON object.
pub fn push_outcome(out: &mut String, outcome: &Outcome) {
    let key_and_revision = |out: &mut String, key: &Key, revision: &Revision| {
        out.push_str("{\"key\":");
        push_string(out, key.as_str());
        out.push_str(",\"revision\":");
        push_u64(out, revision.0);
    };
    let id_and_revision = |out: &mut String, id: &VectorId, revision| {
        out.push_str("{\"id\":");
        push_string(out, id.as_str());
        push_fmt(out, format_args!(",\"revision\":{revision}"));
    };
    match outcome {
        Outcome::Put { key, revision, created, expires_at_ms } => {
            key_and_revision(out, key, revision);
            out.push_str(if *created { ",\"created\":true" } else { ",\"created\":false" });
            push_deadline(out, *expires_at_ms);
        }
        Outcome::Patched { key, revision, created, expires_at_ms, value } => {
            key_and_revision(out, key, revision);
            push_fmt(out, format_args!(",\"created\":{created}"));
            push_deadline(out, *expires_at_ms);
            out.push(',');
            push_value(out, value);
        }
        Outcome::Deleted { key, revision } => {
            key_and_revision(out, key, revision);
            out.push_str(",\"deleted\":true");
        }
        Outcome::Published { revision } => push_fmt(out, format_args!("{{\"revision\":{revision}")),
        Outcome::Collection { created, revision } => {
            push_fmt(out, format_args!("{{\"created\":{created},\"revision\":{revision}"));
        }
        Outcome::CollectionDeleted { count, revision } => {
            push_fmt(out, format_args!("{{\"deleted\":true,\"count\":{count},\"revision\":{revision}"));
        }
        Outcome::VectorWritten { id, revision, created } => {
            id_and_revision(out, id, revision);
            push_fmt(out, format_args!(",\"created\":{created}"));
        }
        Outcome::VectorDeleted { id, revision } => {
            id_and_revision(out, id, revision);
            out.push_str(",\"deleted\":true");
        }
        Outcome::VectorsDeleted { deleted, missing, revision } => {
            push_fmt(out, format_args!("{{\"deleted\":{deleted}"));
            if !missing.is_empty() {
                out.push_str(",\"missing\":[");
                push_list(out, missing, |out, id| push_string(out, id.as_str()));
                out.push(']');
            }
            push_fmt(out, format_args!(",\"revision\":{revision}"));
        }
    }
    out.push('}');
}

/// Appends items with commas between.
pub fn push_list<T>(out: &mut String, items: impl IntoIterator<Item = T>, mut push: impl FnMut(&mut String, T)) {
    for (at, item) in items.into_iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        push(out, item);
    }
}

/// One outcome's JSON object.
pub fn outcome_json(outcome: &Outcome) -> String {
    let mut out = String::with_capacity(128);
    push_outcome(&mut out, outcome);
    out
}

/// Appends `,"expires_at_ms":…` where there is a deadline.
pub fn push_deadline(out: &mut String, expires_at_ms: Option<NonZeroU64>) {
    if let Some(at) = expires_at_ms {
        push_fmt(out, format_args!(",\"expires_at_ms\":{at}"));
    }
}

/// Makes a cursor of the last item's name.
pub fn encode_cursor(last: &str) -> String {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(last)
}

/// Bytes a cursor may have beyond a key: two of the last character, to go on behind all keys that begin so.
const CURSOR_BYTES_MORE: usize = 8;

/// Reads a cursor back.
pub fn decode_cursor(cursor: &str) -> ApiResult<String> {
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(cursor).ok();
    let text = bytes
        .and_then(|b| String::from_utf8(b).ok())
        .filter(|t| !t.is_empty() && t.len() <= KEY_BYTES_MAX + CURSOR_BYTES_MORE);
    text.ok_or_else(|| invalid("cursor is not one this server gave out; start again without"))
}

/// Appends `"next_cursor":…`.
pub fn push_next_cursor(out: &mut String, last: Option<&str>) {
    out.push_str("\"next_cursor\":");
    match last {
        Some(last) => push_string(out, &encode_cursor(last)),
        None => out.push_str("null"),
    }
}
