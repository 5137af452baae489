//! `watch`, `publish`: events.

use super::key::{push_meta, show_write};
use super::output::{Colour, Output, reader_gone};
use super::{ServerFlags, argument_or_stdin, json, post, query, short};
use crate::client::{CannotConnect, EventStream, Refused, ServerEvent, Target};
use crate::engine::frame::push_fmt;
use crate::engine::json::push_string;
use clap::Args;
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::pin::pin;
use std::time::Duration;

/// The server sends something at least every fifteen seconds; a stream silent for three times as long is dead.
const SILENCE_MAX: Duration = Duration::from_secs(45);
/// The longest wait between two tries to come back.
const WAIT_MAX: Duration = Duration::from_secs(15);
/// What is waited when the server did not say.
const RETRY: Duration = Duration::from_secs(1);

/// Flags of `kiss-vdb watch`.
#[derive(Args, Debug)]
#[command(
    after_help = "Keys, prefixes and collections together are a union; types, jobs and tags narrow it. Each may be repeated. \
After a break or a restart of the server it comes back by itself and goes on where it was, with nothing lost and nothing \
twice; it says so on stderr. A reset says that history was not there any more.

Examples:
  kiss-vdb watch --prefix job: --snapshot
  kiss-vdb watch --job-id 42 --type progress --json | jq .data
  kiss-vdb watch --since 0 --count 10
  kiss-vdb watch --since 2026-01-31T12:00:00Z --collection docs"
)]
pub struct WatchArgs {
    /// This key
    #[arg(long, value_parser = super::key)]
    key: Vec<String>,
    /// Keys that begin with this
    #[arg(long)]
    prefix: Vec<String>,
    /// Vectors of this collection
    #[arg(long, value_parser = super::collection)]
    collection: Vec<String>,
    /// Events of this type
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<String>,
    /// What belongs to this job
    #[arg(long)]
    job_id: Vec<String>,
    /// What has this tag
    #[arg(long)]
    tag: Vec<String>,
    /// What came after a revision (0 = all there is) or a time
    #[arg(long, value_name = "REVISION|TIME")]
    since: Option<String>,
    /// First the entries there are, then what happens to them
    #[arg(long)]
    snapshot: bool,
    /// Numbers of vectors too
    #[arg(long)]
    include_vector: bool,
    /// End after so many events
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

impl WatchArgs {
    fn query(&self) -> String {
        let all = |name, values: &[String]| values.iter().map(|v| (name, Some(v.clone()))).collect::<Vec<_>>();
        let mut parts = all("key", &self.key);
        parts.extend(all("prefix", &self.prefix));
        parts.extend(all("collection", &self.collection));
        parts.extend(all("types", &self.types));
        parts.extend(all("job_id", &self.job_id));
        parts.extend(all("tag", &self.tag));
        parts.push(("since", self.since.clone()));
        parts.push(("snapshot", self.snapshot.then(|| "true".to_owned())));
        parts.push(("include_vector", self.include_vector.then(|| "true".to_owned())));
        query(parts)
    }
}

/// A stream that comes back by itself.
pub(super) struct Following {
    target: Target,
    query: String,
    stream: Option<EventStream>,
    last_id: Option<u64>,
    retry: Duration,
    /// Tries since something was last received.
    tries: u32,
    /// Told of breaks and returns.
    say: fn(&str),
}

impl Following {
    /// Opens the stream; the first time nothing is tried again.
    pub(super) async fn open(target: Target, query: String, say: fn(&str)) -> anyhow::Result<Self> {
        let stream = Some(target.events(&query, None).await?);
        Ok(Self { target, query, stream, last_id: None, retry: RETRY, tries: 0, say })
    }

    /// The next event, however long it takes. An error is one that trying again does not mend.
    pub(super) async fn next(&mut self) -> anyhow::Result<ServerEvent> {
        loop {
            let Some(stream) = &mut self.stream else {
                self.come_back().await?;
                continue;
            };
            let reason = match tokio::time::timeout(SILENCE_MAX, stream.next_frame()).await {
                Ok(Ok(Some(event))) => {
                    self.tries = 0;
                    self.last_id = stream.last_id().or(self.last_id);
                    self.retry = stream.retry_ms().map_or(self.retry, Duration::from_millis);
                    if event.event.is_empty() {
                        continue;
                    }
                    return Ok(event);
                }
                Ok(Ok(None)) => "the server ended the stream".to_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the stream is silent".to_owned(),
            };
            self.retry = stream.retry_ms().map_or(self.retry, Duration::from_millis);
            (self.say)(&format!("{reason}; coming back after {}", self.position()));
            self.stream = None;
        }
    }

    fn position(&self) -> String {
        self.last_id.map_or_else(|| "nothing, from the start".to_owned(), |id| format!("revision {id}"))
    }

    async fn come_back(&mut self) -> anyhow::Result<()> {
        // Doubling, and spread over half of it, so that all who lost a server do not come at once.
        let wait = self.retry.saturating_mul(1 << self.tries.min(10)).min(WAIT_MAX.max(self.retry));
        self.tries += 1;
        tokio::time::sleep(wait.mul_f64(0.5 + random() / 2.0)).await;
        match self.target.events(&self.query, self.last_id).await {
            Ok(stream) => {
                self.stream = Some(stream);
                (self.say)(&format!("back, after {}", self.position()));
                Ok(())
            }
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Whether to try again: nobody there, or one that is not ready.
fn is_passing(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| match cause.downcast_ref::<Refused>() {
        Some(Refused(answer)) => answer.status.is_server_error() || answer.status.as_u16() == 429,
        None => cause.is::<CannotConnect>() || cause.is::<hyper::Error>() || cause.is::<std::io::Error>(),
    })
}

/// In 0 to 1.
fn random() -> f64 {
    // The cast: 32 of the random bits, exact in f64.
    f64::from(std::hash::RandomState::new().hash_one(0u8) as u32) / f64::from(u32::MAX)
}

/// `kiss-vdb watch`
pub async fn watch(args: WatchArgs) -> anyhow::Result<()> {
    let mut out = Output::new();
    let say = |text: &str| eprintln!("kiss-vdb: {text}");
    let mut following = Following::open(args.server.target()?, args.query(), say).await?;
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut reader_gone = pin!(reader_gone());
    while left > 0 {
        let event = tokio::select! {
            event = following.next() => event?,
            // Nobody would notice the next event, whenever it comes.
            () = &mut reader_gone => return Ok(()),
        };
        let line = if args.server.json { json_line(&event) } else { text_line(&out, &event) };
        out.line(&line)?;
        out.flush()?;
        left -= 1;
    }
    Ok(())
}

/// The event's data as the server sent it. Rows of a snapshot and resets do not carry their type; a reader of lines needs
/// it.
fn json_line(event: &ServerEvent) -> String {
    match (event.event.as_str(), event.data.strip_prefix('{')) {
        ("snapshot" | "snapshot_end" | "reset", Some(rest)) => format!("{{\"type\":\"{}\",{rest}", event.event),
        _ => event.data.clone(),
    }
}

/// Revision, type, what it is about, what it says.
pub(super) fn text_line(out: &Output, event: &ServerEvent) -> String {
    // Its members as they were sent: numbers keep their digits, and objects their order.
    let data: HashMap<String, &RawValue> = serde_json::from_str(&event.data).unwrap_or_default();
    let text = |name: &str| -> String {
        data.get(name).and_then(|value| serde_json::from_str(value.get()).ok()).unwrap_or_default()
    };
    let colour = match event.event.as_str() {
        "reset" => Colour::Red,
        "state_deleted" | "vector_deleted" | "collection_deleted" => Colour::Yellow,
        "snapshot" | "snapshot_end" => Colour::Dim,
        _ => Colour::Green,
    };
    let revision = out.paint(
        Colour::Dim,
        data.get("revision").map_or_else(|| event.id.unwrap_or_default().to_string(), |r| r.get().to_owned()).as_str(),
    );
    let event_type = out.paint(colour, &event.event);
    let mut line = format!("{revision}\t{event_type}");
    let (collection, id) = (text("collection"), text("id"));
    let subject = match (collection.as_str(), id.as_str()) {
        ("", _) => text("key"),
        (_, "") => collection,
        _ => format!("{collection}/{id}"),
    };
    if !subject.is_empty() {
        push_fmt(&mut line, format_args!("\t{}", out.paint(Colour::Cyan, &subject)));
    }
    let about = ["value", "patch", "data", "reason", "count", "meta"].into_iter().find_map(|name| data.get(name));
    if let Some(about) = about {
        let about = about.get();
        let about = if out.is_terminal { short(about, 200) } else { about.to_owned() };
        push_fmt(&mut line, format_args!("\t{about}"));
    }
    line
}

/// Flags of `kiss-vdb publish`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kiss-vdb publish progress '{\"done\":42}' --key job:1 --job-id 1
  kiss-vdb publish typing --key chat:7 --ephemeral   # those connected see it; the log does not")]
pub struct PublishArgs {
    /// Its type: a small letter, then small letters, digits and _ . - up to 64
    #[arg(value_name = "TYPE")]
    event_type: String,
    /// What it says, as JSON; - reads it from stdin
    #[arg(allow_negative_numbers = true)]
    data: Option<String>,
    /// The key it is about
    #[arg(long, value_parser = super::key)]
    key: Option<String>,
    /// The job it belongs to
    #[arg(long)]
    job_id: Option<String>,
    /// A tag; may be repeated
    #[arg(long)]
    tag: Vec<String>,
    /// For those connected now only
    #[arg(long)]
    ephemeral: bool,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// `kiss-vdb publish`
pub async fn publish(args: PublishArgs) -> anyhow::Result<()> {
    let mut body = String::from("{\"type\":");
    push_string(&mut body, &args.event_type);
    if let Some(data) = &args.data {
        let data = json(&argument_or_stdin(data).await?, "the data")?;
        push_fmt(&mut body, format_args!(",\"data\":{}", data.get()));
    }
    if let Some(key) = &args.key {
        body.push_str(",\"key\":");
        push_string(&mut body, key);
    }
    push_meta(&mut body, args.job_id.as_deref(), &args.tag);
    if args.ephemeral {
        body.push_str(",\"ephemeral\":true");
    }
    body.push('}');
    let answer = post(&mut args.server.client()?, "/v1/events", body).await?;
    show_write(&args.server, &answer)
}
