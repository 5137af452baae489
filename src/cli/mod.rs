//! The command line: one verb for each thing a person or a script does with a running server.
//!
//! ```text
//! main.rs ─▶ CliVerb ─▶ run: a runtime, ctrl-c, exit codes ─▶ one file a noun ─▶ client ─▶ HTTP
//! ```
//! Invariants
//! - stdout carries the answer and nothing else; what is for people only goes to stderr.
//! - With `--json` the answer is the server's own JSON, one line each.
//! - Exit codes are those of [`Exit`], and no others.
//! - A reader that goes away (`| head`) ends a command quietly.
//!
//! Deliberately absent: configuration files, an interactive shell, a way to believe any certificate.

pub mod backup;
pub mod event;
pub mod export;
pub mod import;
pub mod key;
pub mod output;
pub mod rows;
pub mod shell;
pub mod top;
pub mod vector;

use crate::client::{Answer, CannotConnect, Client, HungUp, Refused, Target, WrongServer};
use crate::engine::command::Key;
use crate::engine::json::JSON;
use crate::vector::CollectionName;
use clap::{Args, Subcommand};
use hyper::header::HeaderValue;
use hyper::{Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Where a server is when nothing says so.
const DEFAULT_URL: &str = "http://127.0.0.1:9917";
/// A segment of a path: a key keeps its slashes.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');

/// The table at the end of `--help`.
pub const EXIT_CODES: &str = "\
Exit codes of commands that talk to a server:
  0  done                                4  conflict: --if-revision, or it exists
  1  refused or failed otherwise         5  the key is missing, wrong or lacks the right
  2  wrong usage, or a value not taken   6  no server answers there, or none to trust
  3  there is no such key or vector    130  interrupted

The server is --url, else KISS_URL, else http://127.0.0.1:9917; its key --api-key, else API_KEY.
https trusts the system's certificates, or those of --ca-cert, else KISS_CA_CERT, alone.";

/// What the program ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Conflict = 4,
    Forbidden = 5,
    NoServer = 6,
    Interrupted = 130,
}

/// Verbs that talk to a running server, or work on its files.
#[derive(Subcommand)]
pub enum CliVerb {
    /// Print what a key holds
    Get(key::GetArgs),
    /// Set a key
    Put(key::PutArgs),
    /// Change a key by a JSON merge patch
    Patch(key::PatchArgs),
    /// Delete a key
    Del(key::DelArgs),
    /// List keys in order
    List(key::ListArgs),
    /// Follow what happens, across restarts of the server
    Watch(event::WatchArgs),
    /// Publish an event
    Publish(event::PublishArgs),
    /// Search a collection for the nearest vectors
    Search(vector::SearchArgs),
    /// Put a vector into a collection
    Upsert(vector::UpsertArgs),
    /// Write keys and vectors out as lines of JSON
    Export(export::ExportArgs),
    /// Read keys and vectors in: lines of JSON, .npy or .fvecs
    Import(import::ImportArgs),
    /// Take a consistent copy of a running server into one file
    Backup(backup::BackupArgs),
    /// Make a data directory of a backup
    Restore(backup::RestoreArgs),
    /// Watch a server work: rates, latencies, streams, events
    Top(top::TopArgs),
    /// Print a completion script for a shell
    Completions(shell::CompletionsArgs),
    /// Print the manual page
    Man,
}

impl CliVerb {
    /// Where it goes; `None` for those that need no server.
    fn server(&self) -> Option<&ServerFlags> {
        Some(match self {
            Self::Get(args) => &args.server,
            Self::Put(args) => &args.server,
            Self::Patch(args) => &args.server,
            Self::Del(args) => &args.server,
            Self::List(args) => &args.server,
            Self::Watch(args) => &args.server,
            Self::Publish(args) => &args.server,
            Self::Search(args) => &args.server,
            Self::Upsert(args) => &args.server,
            Self::Export(args) => &args.server,
            Self::Import(args) => &args.server,
            Self::Backup(args) => &args.server,
            Self::Top(args) => &args.server,
            Self::Restore(_) | Self::Completions(_) | Self::Man => return None,
        })
    }
}

/// Flags of every verb that talks to a server.
#[derive(Args, Clone, Debug, Default)]
pub struct ServerFlags {
    /// The server: http://host:port or https://host:port [env KISS_URL, default http://127.0.0.1:9917]
    #[arg(long, value_name = "URL", help_heading = "Server")]
    url: Option<String>,
    /// Its key; other users of this machine see flags, so prefer the environment [env API_KEY]
    #[arg(long, value_name = "KEY", help_heading = "Server")]
    api_key: Option<String>,
    /// Certificates (PEM) to trust for https, instead of the system's [env KISS_CA_CERT]
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    ca_cert: Option<PathBuf>,
    /// Print the server's JSON as it is, one line for each answer or event
    #[arg(long, help_heading = "Server")]
    pub json: bool,
}

/// A variable of the environment; an empty one is what shells make of an unset one.
fn variable(name: &str) -> anyhow::Result<Option<String>> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    value.map(|value| value.into_string().map_err(|_| usage(format!("{name} (environment) is not UTF-8")))).transpose()
}

impl ServerFlags {
    fn key(&self) -> anyhow::Result<Option<String>> {
        if self.api_key.is_some() { Ok(self.api_key.clone()) } else { variable("API_KEY") }
    }

    fn has_key(&self) -> bool {
        self.key().is_ok_and(|key| key.is_some())
    }

    fn target(&self) -> anyhow::Result<Target> {
        let url = if self.url.is_some() { self.url.clone() } else { variable("KISS_URL")? };
        let url = url.unwrap_or_else(|| DEFAULT_URL.to_owned());
        let ca_cert = self
            .ca_cert
            .clone()
            .or_else(|| std::env::var_os("KISS_CA_CERT").filter(|p| !p.is_empty()).map(PathBuf::from));
        Target::trusting(&url, self.key()?, ca_cert.as_deref()).map_err(|error| usage(format!("{error:#}")))
    }

    fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::new(&self.target()?))
    }
}

/// Wrong usage that clap cannot know of.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// ctrl-c.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

fn usage(text: impl Into<String>) -> anyhow::Error {
    Usage(text.into()).into()
}

/// Runs a verb. `command` is the whole program's, for its completions and manual.
pub fn run(verb: CliVerb, command: clap::Command) -> ExitCode {
    let server = verb.server().cloned().unwrap_or_default();
    let result = match verb {
        CliVerb::Restore(args) => backup::restore(&args),
        CliVerb::Completions(args) => shell::completions(&args, command),
        CliVerb::Man => shell::man(command),
        verb => talk(verb),
    };
    let exit = result.map_or_else(|error| report(&error, &server), |()| Exit::Done);
    ExitCode::from(exit as u8)
}

fn talk(verb: CliVerb) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let verb = async {
        match verb {
            CliVerb::Get(args) => key::get(args).await,
            CliVerb::Put(args) => key::put(args).await,
            CliVerb::Patch(args) => key::patch(args).await,
            CliVerb::Del(args) => key::del(args).await,
            CliVerb::List(args) => key::list(args).await,
            CliVerb::Watch(args) => event::watch(args).await,
            CliVerb::Publish(args) => event::publish(args).await,
            CliVerb::Search(args) => vector::search(args).await,
            CliVerb::Upsert(args) => vector::upsert(args).await,
            CliVerb::Export(args) => export::export(args).await,
            CliVerb::Import(args) => import::import(args).await,
            CliVerb::Backup(args) => backup::backup(args).await,
            CliVerb::Top(args) => top::top(args).await,
            CliVerb::Restore(_) | CliVerb::Completions(_) | CliVerb::Man => unreachable!("they need no server"),
        }
    };
    let result = runtime.block_on(async {
        tokio::select! {
            result = verb => result,
            // What was begun is dropped, and cleans up after itself.
            _ = tokio::signal::ctrl_c() => Err(Interrupted.into()),
        }
    });
    // A thread may still wait for stdin.
    runtime.shutdown_background();
    result
}

/// Says what went wrong, in one line, and chooses the exit code.
fn report(error: &anyhow::Error, server: &ServerFlags) -> Exit {
    let refused = error.chain().find_map(|cause| cause.downcast_ref::<Refused>());
    let problem = refused.and_then(Refused::problem);
    let (exit, text) = match (refused, problem) {
        (None, _) => (exit(error), format!("kiss-vdb: {error:#}")),
        (Some(Refused(answer)), Some(problem)) => {
            let (exit, words) = meaning(&problem.code, server.has_key());
            // Contexts, if any, then what there is to say in place of the whole answer.
            let context: String =
                error.chain().take_while(|cause| !cause.is::<Refused>()).map(|cause| format!("{cause}: ")).collect();
            let said = if server.json {
                String::from_utf8_lossy(&answer.body).into_owned()
            } else {
                format!("kiss-vdb: {context}{}", words.unwrap_or(&problem.detail))
            };
            (exit, said)
        }
        (Some(Refused(answer)), None) => {
            let exit = match answer.status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Exit::Forbidden,
                _ => Exit::Failed,
            };
            let status = answer.status;
            (
                exit,
                format!("kiss-vdb: {status}: that is no answer of KISS VDB; is the URL right? (--url, else KISS_URL)"),
            )
        }
    };
    if exit != Exit::Done {
        // Nobody is left to be told when stderr is gone too.
        writeln!(std::io::stderr(), "{text}").unwrap_or(());
    }
    exit
}

/// What a server's refusal means to who typed a command, by its code; with words in place of the server's own where those
/// speak of HTTP.
fn meaning(code: &str, has_key: bool) -> (Exit, Option<&'static str>) {
    match code {
        "invalid_argument"
        | "dimension_mismatch"
        | "invalid_vector"
        | "payload_too_large"
        | "unsupported_media_type" => (Exit::Usage, None),
        "key_not_found" | "vector_not_found" => (Exit::NotFound, None),
        "collection_not_found" => (
            Exit::NotFound,
            Some(
                "there is no such collection; kiss-vdb import makes one, by --metric or a line such as {\"collection\":\"docs\",\"dim\":3,\"metric\":\"cosine\"}",
            ),
        ),
        "revision_conflict" | "already_exists" | "precondition_failed" => (Exit::Conflict, None),
        "unauthorized" if has_key => (
            Exit::Forbidden,
            Some(
                "this server does not know the key, or it has expired; give another by --api-key, or better by the variable API_KEY",
            ),
        ),
        "unauthorized" => {
            (Exit::Forbidden, Some("this server needs a key: give it by --api-key, or better by the variable API_KEY"))
        }
        "forbidden" => (Exit::Forbidden, None),
        "route_not_found" | "method_not_allowed" => (
            Exit::Failed,
            Some(
                "this server does not know this command; is it older than this program? kiss-vdb --version, and top shows the server's",
            ),
        ),
        _ => (Exit::Failed, None),
    }
}

fn exit(error: &anyhow::Error) -> Exit {
    for cause in error.chain() {
        if cause.is::<Usage>() {
            return Exit::Usage;
        }
        if cause.is::<Interrupted>() {
            return Exit::Interrupted;
        }
        if cause.is::<HungUp>() {
            return Exit::Failed;
        }
        if cause.is::<CannotConnect>() || cause.is::<WrongServer>() || cause.is::<hyper::Error>() {
            return Exit::NoServer;
        }
        if cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
            return Exit::Done;
        }
    }
    Exit::Failed
}

/// A key as the server takes it: an empty one would be no path.
fn key(text: &str) -> Result<String, String> {
    Key::check(text).map(|()| text.to_owned()).map_err(|rejection| rejection.to_string())
}

/// A collection's name, likewise.
fn collection(text: &str) -> Result<String, String> {
    CollectionName::new(text).map(|name| name.as_str().to_owned()).map_err(|rejection| rejection.to_string())
}

/// A type that bytes are stored under: with JSON's own, or none, what is sent is a request's JSON and says what to store.
fn content_type(text: &str) -> Result<String, String> {
    match text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        JSON | "" => {
            Err("JSON is stored as a value, without --content-type; bytes have a type of their own".to_owned())
        }
        _ if HeaderValue::from_str(text).is_err() => Err("a type is a line of ASCII".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// A path with a key, name or id in it.
fn path(prefix: &str, name: &str) -> String {
    format!("{prefix}{}", utf8_percent_encode(name, PATH))
}

/// A query of those parts that have a value.
fn query<'a>(parts: impl IntoIterator<Item = (&'a str, Option<String>)>) -> String {
    let mut query = form_urlencoded::Serializer::new(String::from("?"));
    for (name, value) in parts {
        if let Some(value) = value {
            query.append_pair(name, &value);
        }
    }
    let query = query.finish();
    if query == "?" { String::new() } else { query }
}

async fn get(client: &mut Client, path: &str) -> anyhow::Result<Answer> {
    Ok(client.call(Method::GET, path, "").await?.accepted()?)
}

async fn post(client: &mut Client, path: &str, body: String) -> anyhow::Result<Answer> {
    Ok(client.call(Method::POST, path, body).await?.accepted()?)
}

/// The argument, or with `-` all of stdin.
async fn argument_or_stdin(argument: &str) -> anyhow::Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let read = || std::io::read_to_string(std::io::stdin());
    tokio::task::spawn_blocking(read).await?.map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidData => usage("what came from stdin is not UTF-8"),
        _ => anyhow::Error::from(error).context("cannot read stdin"),
    })
}

/// Checks that a text is JSON; it is sent as it stands, so that numbers stay as they were written.
fn json(text: &str, what: &str) -> anyhow::Result<Box<serde_json::value::RawValue>> {
    serde_json::from_str(text.trim())
        .map_err(|error| usage(format!("{what} is not JSON ({error}): {}", short(text, 60))))
}

/// The beginning of a text.
fn short(text: &str, chars: usize) -> String {
    let mut short: String = text.chars().take(chars).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// `10m`, `1h30m`, `500ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time such as 500ms, 30s, 10m, 1h30m or 7d");
    let mut rest = text;
    let mut total_ms = 0u64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let unit_end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit_ms = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let part = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_ms)).ok_or_else(wrong)?;
        total_ms = total_ms.checked_add(part).ok_or_else(wrong)?;
        rest = tail;
    }
    if total_ms == 0 { Err(wrong()) } else { Ok(Duration::from_millis(total_ms)) }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, ms) in [("500ms", 500), ("30s", 30_000), ("10m", 600_000), ("1h30m", 5_400_000), ("7d", 604_800_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "10", "m", "10x", "0s", "-1s", "1.5h", "99999999999999999999d", "18446744073709551615d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
