//! `get`, `put`, `patch`, `del`, `list`: keys.

use super::backup::is_stream;
use super::output::{Colour, Output, pretty};
use super::{
    ServerFlags, argument_or_stdin, duration, get as get_answer, json, key, millis, path, query, short, usage,
};
use crate::engine::frame::push_fmt;
use crate::engine::json::{present, push_string};
use anyhow::Context;
use base64::Engine as _;
use clap::Args;
use hyper::Method;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

const STATE: &str = "/v1/state/";
/// Keys asked for at a time: the most the server gives.
const PAGE: usize = 1000;

/// Flags of `kiss-vdb get`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kiss-vdb get job:1
  kiss-vdb get job:1 --meta
  kiss-vdb get logo.png --raw > logo.png")]
pub struct GetArgs {
    /// The key
    #[arg(value_parser = key)]
    key: String,
    /// The value's bytes as they are, and nothing else
    #[arg(long, conflicts_with = "meta")]
    raw: bool,
    /// Everything: revisions, deadline, job and tags
    #[arg(long)]
    meta: bool,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// An entry as the server shows it.
#[derive(Deserialize)]
struct EntryView<'a> {
    key: String,
    #[serde(borrow, default, deserialize_with = "present")]
    value: Option<&'a RawValue>,
    value_base64: Option<String>,
    content_type: Option<String>,
    revision: u64,
    created_revision: u64,
    expires_at_ms: Option<i64>,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
}

impl EntryView<'_> {
    /// The value on one line.
    fn one_line(&self) -> String {
        match (&self.value, &self.value_base64) {
            (Some(value), _) => value.get().to_owned(),
            (None, Some(data)) => {
                format!("<{} of {}>", bytes_of(data), self.content_type.as_deref().unwrap_or("unknown type"))
            }
            (None, None) => String::new(),
        }
    }
}

fn bytes_of(base64: &str) -> String {
    let padding = base64.bytes().rev().take_while(|&b| b == b'=').count();
    format!("{} bytes", base64.len() / 4 * 3 - padding)
}

/// `kiss-vdb get`
pub async fn get(args: GetArgs) -> anyhow::Result<()> {
    let mut client = args.server.client()?;
    let mut out = Output::new();
    let path = path(STATE, &args.key);
    if args.raw {
        let answer = get_answer(&mut client, &format!("{path}?raw=true")).await?;
        out.bytes(&answer.body)?;
        return Ok(out.flush()?);
    }
    let answer = get_answer(&mut client, &path).await?;
    if args.server.json {
        return Ok(out.answer(&answer)?);
    }
    let entry: EntryView<'_> = serde_json::from_slice(&answer.body).context("an answer that is no entry")?;
    if args.meta {
        for (name, text) in [
            ("key", Some(entry.key.clone())),
            ("revision", Some(entry.revision.to_string())),
            ("created_revision", Some(entry.created_revision.to_string())),
            ("expires_at", entry.expires_at_ms.map(time)),
            ("meta", entry.meta.map(|meta| meta.get().to_owned())),
            ("content_type", entry.content_type.clone()),
        ] {
            if let Some(text) = text {
                let name = out.paint(Colour::Dim, &format!("{name:<17}"));
                out.line(&format!("{name}{text}"))?;
            }
        }
    }
    match (&entry.value, &entry.value_base64) {
        (Some(value), _) if out.is_terminal => out.line(&pretty(value.get()))?,
        (Some(value), _) => out.line(value.get())?,
        (None, Some(data)) if !out.is_terminal && !args.meta => {
            let data =
                base64::engine::general_purpose::STANDARD.decode(data).context("an answer with broken base64")?;
            out.bytes(&data)?;
        }
        _ => out.line(&format!("{}; --raw prints them", entry.one_line()))?,
    }
    Ok(out.flush()?)
}

fn time(unix_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(unix_ms).map_or_else(|_| unix_ms.to_string(), |time| time.to_string())
}

/// Flags of `kiss-vdb put`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kiss-vdb put job:1 '{\"progress\":0}' --job-id 1 --tag render
  kiss-vdb put greeting --string 'good morning' --ttl 10m
  echo '{\"a\":1}' | kiss-vdb put settings -
  kiss-vdb put logo.png --file logo.png --content-type image/png
  kiss-vdb put lock '\"me\"' --if-revision 0 --ttl 30s   # only if nobody has it: else exit code 4")]
pub struct PutArgs {
    /// The key
    #[arg(value_parser = key)]
    key: String,
    /// JSON; - reads it from stdin
    #[arg(allow_negative_numbers = true, required_unless_present = "file", conflicts_with = "file")]
    value: Option<String>,
    /// The value is a text, not JSON
    #[arg(long)]
    string: bool,
    /// Read the value from a file; - reads stdin
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Store bytes under this type; JSON goes without
    #[arg(long, value_name = "TYPE", value_parser = super::content_type, conflicts_with = "string")]
    content_type: Option<String>,
    /// Gone after this time: 30s, 10m, 1h30m, 7d
    #[arg(long, value_parser = duration)]
    ttl: Option<Duration>,
    /// Only if this is the current revision; 0 = only if absent
    #[arg(long, value_name = "REVISION")]
    if_revision: Option<u64>,
    /// The job it belongs to, for watchers
    #[arg(long)]
    job_id: Option<String>,
    /// A tag, for watchers; may be repeated
    #[arg(long)]
    tag: Vec<String>,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

impl PutArgs {
    async fn bytes(&self) -> anyhow::Result<Vec<u8>> {
        let path = match (&self.file, self.value.as_deref()) {
            (Some(path), _) => Some(path.clone()).filter(|path| !is_stream(path)),
            (None, Some("-")) => None,
            (None, value) => return Ok(value.unwrap_or_default().as_bytes().to_vec()),
        };
        let read = move || -> anyhow::Result<Vec<u8>> {
            let Some(path) = path else {
                let mut bytes = Vec::new();
                std::io::stdin().read_to_end(&mut bytes).context("cannot read stdin")?;
                return Ok(bytes);
            };
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        tokio::task::spawn_blocking(read).await?
    }
}

/// `kiss-vdb put`
pub async fn put(args: PutArgs) -> anyhow::Result<()> {
    let bytes = args.bytes().await?;
    let mut client = args.server.client()?;
    let path = path(STATE, &args.key);
    let answer = if let Some(content_type) = &args.content_type {
        let parts = [
            ("ttl_ms", args.ttl.map(|ttl| millis(ttl).to_string())),
            ("if_revision", args.if_revision.map(|revision| revision.to_string())),
            ("job_id", args.job_id.clone()),
        ];
        let query = query(parts.into_iter().chain(args.tag.iter().map(|tag| ("tag", Some(tag.clone())))));
        client.send(Method::PUT, &format!("{path}{query}"), &[("content-type", content_type)], bytes).await?
    } else {
        let text = String::from_utf8(bytes)
            .map_err(|_| usage("the value is not UTF-8; --content-type stores bytes as they are"))?;
        client.call(Method::PUT, &path, put_body(&args, &text)?).await?
    };
    show_write(&args.server, &answer.accepted()?)
}

fn put_body(args: &PutArgs, text: &str) -> anyhow::Result<String> {
    let mut body = String::from("{\"value\":");
    if args.string {
        push_string(&mut body, text);
    } else {
        let hint = |error| usage(format!("{error}; for a text use --string, for bytes --content-type"));
        let value = json(text, "the value").map_err(hint)?;
        body.push_str(value.get());
    }
    if let Some(ttl) = args.ttl {
        push_fmt(&mut body, format_args!(",\"ttl_ms\":{}", millis(ttl)));
    }
    if let Some(revision) = args.if_revision {
        push_fmt(&mut body, format_args!(",\"if_revision\":{revision}"));
    }
    push_meta(&mut body, args.job_id.as_deref(), &args.tag);
    body.push('}');
    Ok(body)
}

/// Appends `,"meta":{…}` when there is something to say.
pub(super) fn push_meta(out: &mut String, job_id: Option<&str>, tags: &[String]) {
    if job_id.is_none() && tags.is_empty() {
        return;
    }
    let mut meta = serde_json::Map::new();
    if let Some(job_id) = job_id {
        meta.insert("job_id".to_owned(), job_id.into());
    }
    if !tags.is_empty() {
        meta.insert("tags".to_owned(), tags.into());
    }
    push_fmt(out, format_args!(",\"meta\":{}", serde_json::Value::Object(meta)));
}

/// Says what a write did.
pub(super) fn show_write(server: &ServerFlags, answer: &crate::client::Answer) -> anyhow::Result<()> {
    let mut out = Output::new();
    if server.json {
        return Ok(out.answer(answer)?);
    }
    let body = answer.json()?;
    let revision = out.paint(Colour::Green, &format!("revision {}", body["revision"]));
    let what = match (&body["created"], &body["deleted"]) {
        (serde_json::Value::Bool(true), _) => " created",
        (_, serde_json::Value::Bool(true)) => " deleted",
        _ => "",
    };
    out.line(&format!("{revision}{what}"))?;
    Ok(out.flush()?)
}

/// Flags of `kiss-vdb patch`.
#[derive(Args, Debug)]
#[command(
    after_help = "A JSON merge patch (RFC 7396): fields given are set, null removes one, the rest stays. An absent key is made.

Example:
  kiss-vdb patch job:1 '{\"progress\":42}'"
)]
pub struct PatchArgs {
    /// The key
    #[arg(value_parser = key)]
    key: String,
    /// The patch as JSON; - reads it from stdin
    patch: String,
    /// Gone after this time; without, a deadline stays as it is
    #[arg(long, value_parser = duration)]
    ttl: Option<Duration>,
    /// Only if this is the current revision; 0 = only if absent
    #[arg(long, value_name = "REVISION")]
    if_revision: Option<u64>,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// `kiss-vdb patch`
pub async fn patch(args: PatchArgs) -> anyhow::Result<()> {
    let patch = json(&argument_or_stdin(&args.patch).await?, "the patch")?;
    let query = query([
        ("ttl_ms", args.ttl.map(|ttl| millis(ttl).to_string())),
        ("if_revision", args.if_revision.map(|revision| revision.to_string())),
    ]);
    let path = format!("{}{query}", path(STATE, &args.key));
    let headers = [("content-type", "application/merge-patch+json")];
    let answer = args.server.client()?.send(Method::PATCH, &path, &headers, patch.get().to_owned()).await?;
    show_write(&args.server, &answer.accepted()?)
}

/// Flags of `kiss-vdb del`.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  kiss-vdb del job:1   # exit code 3 when there is none")]
pub struct DelArgs {
    /// The key
    #[arg(value_parser = key)]
    key: String,
    /// Only if this is the current revision
    #[arg(long, value_name = "REVISION")]
    if_revision: Option<u64>,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// `kiss-vdb del`
pub async fn del(args: DelArgs) -> anyhow::Result<()> {
    let query = query([("if_revision", args.if_revision.map(|revision| revision.to_string()))]);
    let path = format!("{}{query}", path(STATE, &args.key));
    let answer = args.server.client()?.call(Method::DELETE, &path, "").await?;
    show_write(&args.server, &answer.accepted()?)
}

/// Flags of `kiss-vdb list`.
#[derive(Args, Debug)]
#[command(after_help = "One line for each key: key, tab, value. Pages through everything.

Examples:
  kiss-vdb list job:
  kiss-vdb list --keys-only | wc -l
  kiss-vdb list job: --json | jq -r .value.progress")]
pub struct ListArgs {
    /// Keys that begin with this; without, all
    #[arg(default_value = "", hide_default_value = true)]
    prefix: String,
    /// At most this many
    #[arg(long, value_name = "N")]
    limit: Option<NonZeroUsize>,
    /// Without values
    #[arg(long)]
    keys_only: bool,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// A page of any list.
#[derive(Deserialize)]
pub(super) struct Page<'a> {
    #[serde(borrow)]
    pub(super) items: Vec<&'a RawValue>,
    pub(super) next_cursor: Option<String>,
}

/// `kiss-vdb list`
pub async fn list(args: ListArgs) -> anyhow::Result<()> {
    let mut client = args.server.client()?;
    let mut out = Output::new();
    let mut left = args.limit.map_or(usize::MAX, NonZeroUsize::get);
    let mut cursor = None;
    while left > 0 {
        let query = query([
            ("prefix", Some(args.prefix.clone())),
            ("limit", Some(left.min(PAGE).to_string())),
            ("keys_only", args.keys_only.then(|| "true".to_owned())),
            ("cursor", cursor),
        ]);
        let answer = get_answer(&mut client, &format!("/v1/state{query}")).await?;
        let page: Page<'_> = serde_json::from_slice(&answer.body).context("an answer that is no list")?;
        for item in &page.items {
            if args.server.json {
                out.line(item.get())?;
                continue;
            }
            let entry: EntryView<'_> = serde_json::from_str(item.get())?;
            if args.keys_only {
                out.line(&entry.key)?;
                continue;
            }
            let value = entry.one_line();
            let value = if out.is_terminal { short(&value, 100) } else { value };
            let key = out.paint(Colour::Cyan, &entry.key);
            out.line(&format!("{key}\t{value}"))?;
        }
        left -= page.items.len().min(left);
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    Ok(out.flush()?)
}
