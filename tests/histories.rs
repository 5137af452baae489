//! Recorded histories under crashes, judged by what the log says afterwards.
//!
//! Clients write, read and compare-and-set a few keys at once while watchers follow with filters of their own and the server is
//! killed with SIGKILL again and again, on one data directory. Everything asked and answered is recorded with its time. At the
//! end the whole log is read, and the recording must fit it:
//! - **Linearizable**: for each key there is one order that agrees with the log and with real time. Writes have their place by
//!   their revision. A read of revision *r* fits from *r* until the next version. An order exists exactly when no operation that
//!   had ended before another began must come after it, because real time is an interval order.
//! - **Watches** keep the nine properties that etcd's robustness tests check: filtered, ordered, unique, atomic, bookmarkable,
//!   resumable, reliable, previous value, is-create.
//! - **Nothing acknowledged is lost**, nothing comes back as something else, and the state is what the log folds to.
//!
//! `KISS_KILL_ROUNDS` sets how often the server is killed, `KISS_SEED` the seed. With the feature `lab` the same checks must
//! find each seeded bug.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Duration, Server, call, ok, timeout};
use kiss_vdb::client::{Client, Target};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::watch;

const CLIENTS: usize = 6;
const KEYS: u64 = 4;

/// A small generator of numbers, so that a seed says all: xorshift64*.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % limit
    }
}

/// One request as its client saw it. Times are nanoseconds of one clock.
#[derive(Clone, Debug)]
struct Call {
    key: String,
    what: What,
    began: u64,
    /// `None`: the answer never came.
    ended: Option<u64>,
}

#[derive(Clone, Debug)]
enum What {
    /// A write that carried this number; the revision it was told, and the one it named as a condition.
    Write { number: u64, revision: Option<u64>, if_revision: Option<u64> },
    /// What a read, or the refusal of a condition, showed: revision, and the value where it was shown. Zero = absent.
    Read { revision: u64, value: Option<Value> },
}

/// One connection of a watcher.
#[derive(Clone, Debug)]
struct Session {
    resumed_at: u64,
    /// Ids and, unless it was a bookmark, the event.
    frames: Vec<(u64, Option<Value>)>,
}

#[derive(Clone, Debug)]
struct Watcher {
    filter: Filter,
    sessions: Vec<Session>,
}

/// What a watcher asks for, and the same judged here.
#[derive(Clone, Debug, Default)]
struct Filter {
    key: Option<&'static str>,
    prefix: Option<&'static str>,
    types: Option<&'static str>,
    job_id: Option<&'static str>,
    collection: Option<&'static str>,
}

impl Filter {
    fn query(&self) -> String {
        let parts = [
            ("key", self.key),
            ("prefix", self.prefix),
            ("types", self.types),
            ("job_id", self.job_id),
            ("collection", self.collection),
        ];
        parts.iter().filter_map(|(name, value)| Some(format!("&{name}={}", (*value)?))).collect()
    }

    fn wants(&self, event: &Value) -> bool {
        let text = |name: &str| event[name].as_str().unwrap_or_default();
        let names_something = self.key.is_some() || self.prefix.is_some() || self.collection.is_some();
        let watched = !names_something
            || self.key.is_some_and(|key| text("key") == key)
            || self.prefix.is_some_and(|prefix| !text("key").is_empty() && text("key").starts_with(prefix))
            || self.collection.is_some_and(|name| text("collection") == name);
        watched
            && self.types.is_none_or(|types| types.split(',').any(|t| t == text("type")))
            && self.job_id.is_none_or(|job| event["meta"]["job_id"] == job || event[GONE]["job_id"] == job)
    }
}

/// Where the judge notes the labels of what a deletion removed: streams go by them, the event does not show them.
const GONE: &str = "(meta)";

/// What a run left behind.
struct History {
    calls: Vec<Call>,
    watchers: Vec<Watcher>,
    /// First and last revision of each acknowledged batch.
    batches: Vec<(u64, u64)>,
    log: Vec<Value>,
    state: BTreeMap<String, (u64, Value)>,
    vectors: BTreeMap<String, u64>,
}

struct Shared {
    start: Instant,
    next: AtomicU64,
    calls: Mutex<Vec<Call>>,
    batches: Mutex<Vec<(u64, u64)>>,
    stop: AtomicBool,
    /// The last revision there will be, once it is known: watchers end there.
    end: AtomicU64,
    target: watch::Receiver<Target>,
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap()
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// Asks at random until told to stop. Answers that never came are recorded as such.
async fn client(shared: Arc<Shared>, seed: u64) {
    let mut random = Random::new(seed);
    let mut target = shared.target.clone();
    let mut known: HashMap<String, u64> = HashMap::new();
    let mut c = Client::new(&target.borrow_and_update().clone());
    while !shared.stop.load(Ordering::Relaxed) {
        let key = format!("reg/{}", random.below(KEYS));
        let number = shared.number();
        let expected = known.get(&key).copied().unwrap_or(0);
        let kind = random.below(20);
        let (method, path, body, if_revision) = match kind {
            0..5 => ("GET", format!("/v1/state/{key}"), String::new(), None),
            5..9 => ("PUT", format!("/v1/state/{key}"), json!({"value":{"n":number}}).to_string(), None),
            9..13 => {
                let body = json!({"value":{"n":number},"if_revision":expected,"meta":{"job_id":"j"}});
                ("PUT", format!("/v1/state/{key}"), body.to_string(), Some(expected))
            }
            13 | 14 => ("PATCH", format!("/v1/state/{key}"), json!({"n":number}).to_string(), None),
            15 => ("DELETE", format!("/v1/state/{key}"), String::new(), None),
            16 => {
                let ops = json!([
                    {"op":"put","key":format!("batch/{}", number % 3),"value":{"n":number}},
                    {"op":"event","type":"log","data":number,"key":"batch/log"},
                    {"op":"put","key":format!("batch/{}", (number + 1) % 3),"value":{"n":number}},
                ]);
                ("POST", "/v1/batch".into(), json!({"ops":ops}).to_string(), None)
            }
            17 => {
                let body = json!({"value":{"n":number},"ttl_ms":20 + random.below(200)});
                ("PUT", format!("/v1/state/ttl/{}", number % 5), body.to_string(), None)
            }
            18 => {
                let body = json!({"id":format!("v{}", number % 7),"vector":[number as f32,1.0],"meta":{"n":number}});
                ("POST", "/v1/vector/docs/upsert".into(), body.to_string(), None)
            }
            // Large enough that segments fill up and follow each other.
            _ => {
                let body = json!({"type":"log","data":"x".repeat(4000)});
                ("POST", "/v1/events".into(), body.to_string(), None)
            }
        };
        let began = shared.now();
        let answer = c.call(method.parse().unwrap(), &path, body).await;
        let ended = answer.is_ok().then(|| shared.now());
        let is_register = path.starts_with("/v1/state/reg/");
        match answer {
            Err(_) => {
                if is_register && method != "GET" {
                    let what = What::Write { number, revision: None, if_revision };
                    shared.calls.lock().unwrap().push(Call { key, what, began, ended });
                }
                // The server is gone; its successor is announced.
                if timeout(Duration::from_secs(20), target.changed()).await.is_err() {
                    return;
                }
                c = Client::new(&target.borrow_and_update().clone());
            }
            Ok(answer) => {
                let status = answer.status.as_u16();
                if status >= 500 {
                    // A server that stops says so; what it was asked may not have happened.
                    continue;
                }
                let body = answer.json().unwrap();
                let revision = body["revision"].as_u64();
                let what = match (status, method) {
                    (200 | 201, "GET") => {
                        What::Read { revision: revision.unwrap(), value: Some(body["value"].clone()) }
                    }
                    (404, _) => What::Read { revision: 0, value: None },
                    (409, _) => What::Read { revision: body["actual"].as_u64().unwrap(), value: None },
                    (200 | 201, _) => What::Write { number, revision, if_revision },
                    _ => panic!("{method} {path}: {status} {body}"),
                };
                if path == "/v1/batch" {
                    let (first, last) =
                        (body["first_revision"].as_u64().unwrap(), body["last_revision"].as_u64().unwrap());
                    shared.batches.lock().unwrap().push((first, last));
                }
                if is_register {
                    let seen = match &what {
                        What::Read { revision, .. } => *revision,
                        What::Write { .. } if method == "DELETE" => 0,
                        What::Write { revision, .. } => revision.unwrap(),
                    };
                    known.insert(key.clone(), seen);
                    shared.calls.lock().unwrap().push(Call { key, what, began, ended });
                }
            }
        }
    }
}

/// Follows from the beginning, and comes back where it was after each end.
async fn watcher(shared: Arc<Shared>, filter: Filter, seed: u64) -> Watcher {
    let mut random = Random::new(seed);
    let mut target = shared.target.clone();
    let mut found = Watcher { filter, sessions: Vec::new() };
    let mut last = 0;
    loop {
        let now = target.borrow_and_update().clone();
        let query = format!("?since=0&heartbeat_ms=1000{}", found.filter.query());
        let resume = (last > 0).then_some(last);
        let Ok(mut stream) = now.events(&query, resume).await else {
            if timeout(Duration::from_secs(20), target.changed()).await.is_err() {
                return found;
            }
            continue;
        };
        let mut session = Session { resumed_at: last, frames: Vec::new() };
        // Now and then it leaves by itself, also in the midst of a batch.
        let patience = 20 + random.below(400);
        loop {
            let frame = timeout(Duration::from_millis(1500), stream.next_frame()).await;
            let Ok(Ok(Some(frame))) = frame else { break };
            let Some(id) = frame.id else { continue };
            assert_ne!(frame.event, "reset", "nothing that was shown may be lost: {}", frame.data);
            let event = (!frame.event.is_empty()).then(|| frame.json().unwrap());
            last = id;
            session.frames.push((id, event));
            let is_done = last >= shared.end.load(Ordering::Relaxed);
            if is_done || session.frames.len() as u64 > patience {
                break;
            }
        }
        found.sessions.push(session);
        if last >= shared.end.load(Ordering::Relaxed) {
            return found;
        }
    }
}

async fn history_of(c: &mut Client) -> Vec<Value> {
    let mut log = Vec::new();
    let mut since = 0;
    loop {
        let path = format!("/v1/events?since={since}&limit=1000");
        let page = c.send("GET".parse().unwrap(), &path, &[("accept", "application/json")], "").await.unwrap();
        let page = page.success().unwrap();
        log.extend(page["events"].as_array().unwrap().iter().cloned());
        since = page["next_since"].as_u64().unwrap();
        if page["events"].as_array().unwrap().is_empty() {
            return log;
        }
    }
}

async fn pages(c: &mut Client, path: &str) -> (Vec<Value>, u64) {
    let (mut items, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = ok(c, &format!("GET {path}limit=1000{cursor}")).await;
        items.extend(page["items"].as_array().unwrap().iter().cloned());
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return (items, page["revision"].as_u64().unwrap()),
        }
    }
}

/// Lets everybody at a server that is killed `rounds` times, and collects what they saw.
async fn record(rounds: usize, round_ms: u64, seed: u64, bug: Option<&str>) -> History {
    let dir = tempfile::tempdir().unwrap();
    // Small segments, so that they follow each other, and a log that keeps them all: the judge needs the whole of it.
    let max_log_mb = (2 * rounds).max(32).to_string();
    let arguments = ["--max-log-mb", &max_log_mb, "--snapshot-interval", "1"];
    let start = || Server::start_with(dir.path(), &arguments, bug.map(|bug| ("KISS_LAB_BUG", bug)));
    let mut server = start();
    // Its answer shows the collection, which a seeded bug may not find yet.
    call(&mut server.client(), r#"POST /v1/vector/docs {"dim":2,"metric":"l2"}"#).await;
    let (announce, target) = watch::channel(server.target.clone());
    let shared = Arc::new(Shared {
        start: Instant::now(),
        next: AtomicU64::new(1),
        calls: Mutex::default(),
        batches: Mutex::default(),
        stop: AtomicBool::new(false),
        end: AtomicU64::new(u64::MAX),
        target,
    });
    let filters = [
        Filter::default(),
        Filter { prefix: Some("reg/"), ..Filter::default() },
        Filter { key: Some("reg/1"), ..Filter::default() },
        Filter { prefix: Some("batch/"), types: Some("state_updated"), ..Filter::default() },
        Filter { job_id: Some("j"), ..Filter::default() },
        Filter { types: Some("state_deleted"), ..Filter::default() },
        Filter { collection: Some("docs"), key: Some("batch/log"), ..Filter::default() },
        Filter { key: Some("nobody"), ..Filter::default() },
    ];
    let clients: Vec<_> =
        (0..CLIENTS as u64).map(|n| tokio::spawn(client(Arc::clone(&shared), seed * 100 + n))).collect();
    let watchers: Vec<_> = filters
        .into_iter()
        .zip(seed * 1000..)
        .map(|(filter, seed)| tokio::spawn(watcher(Arc::clone(&shared), filter, seed)))
        .collect();
    let mut random = Random::new(seed);
    for _ in 0..rounds {
        tokio::time::sleep(Duration::from_millis(round_ms / 2 + random.below(round_ms))).await;
        server.kill();
        server = start();
        announce.send(server.target.clone()).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(round_ms)).await;
    shared.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let c = &mut server.client();
    // Beyond every deadline, and the last event is one that every watcher of everything sees.
    tokio::time::sleep(Duration::from_millis(1300)).await;
    let (items, _) = pages(c, "/v1/state?").await;
    let state = items
        .iter()
        .map(|e| (e["key"].as_str().unwrap().to_owned(), (e["revision"].as_u64().unwrap(), e["value"].clone())));
    let state = state.collect();
    let (items, _) = pages(c, "/v1/vector/docs/list?").await;
    let vectors =
        items.iter().map(|v| (v["id"].as_str().unwrap().to_owned(), v["meta"]["n"].as_u64().unwrap())).collect();
    let log = history_of(c).await;
    shared.end.store(log.len() as u64, Ordering::Relaxed);
    let mut seen = Vec::new();
    for watcher in watchers {
        seen.push(timeout(Duration::from_secs(60), watcher).await.expect("a watcher ends").unwrap());
    }
    let calls = std::mem::take(&mut *shared.calls.lock().unwrap());
    let batches = std::mem::take(&mut *shared.batches.lock().unwrap());
    History { calls, watchers: seen, batches, log, state, vectors }
}

type Verdict = Result<(), String>;

macro_rules! hold {
    ($condition:expr, $($says:tt)+) => {
        if !$condition {
            return Err(format!($($says)+));
        }
    };
}

fn revision(event: &Value) -> u64 {
    event["revision"].as_u64().unwrap()
}

/// A key's versions: revision, and the value unless it was deleted there.
type Versions = BTreeMap<String, Vec<(u64, Option<Value>)>>;

/// The log is whole, and says of each change what was there before.
fn fold(log: &[Value]) -> Result<Versions, String> {
    let mut versions = Versions::new();
    for (event, expected) in log.iter().zip(1..) {
        hold!(revision(event) == expected, "reliable: the log has {} where {expected} was to come", revision(event));
        let kind = event["type"].as_str().unwrap();
        if !kind.starts_with("state_") {
            continue;
        }
        let of_key = versions.entry(event["key"].as_str().unwrap().to_owned()).or_default();
        let before = of_key.last().filter(|(_, value)| value.is_some());
        let prev = event["prev_revision"].as_u64().unwrap();
        hold!(
            prev == before.map_or(0, |(revision, _)| *revision),
            "previous value, is-create: {event} follows {before:?}"
        );
        let value = match (kind, event.get("value"), event.get("patch")) {
            ("state_deleted", ..) => None,
            (_, Some(value), _) => Some(value.clone()),
            (_, None, Some(patch)) => {
                let mut value = before.and_then(|(_, value)| value.clone()).unwrap_or(json!({}));
                for (name, new) in patch.as_object().unwrap() {
                    value[name] = new.clone();
                }
                Some(value)
            }
            _ => return Err(format!("an update without a value: {event}")),
        };
        of_key.push((expected, value));
    }
    Ok(versions)
}

fn check_state(history: &History, versions: &Versions) -> Verdict {
    let folded: BTreeMap<_, _> = versions
        .iter()
        .filter_map(|(key, versions)| {
            let (revision, value) = versions.last()?;
            Some((key.clone(), (*revision, value.clone()?)))
        })
        .collect();
    hold!(folded == history.state, "the state is not what the log folds to: {folded:?} against {:?}", history.state);
    let mut vectors = BTreeMap::new();
    for event in history.log.iter().filter(|e| e["type"] == "vector_added" || e["type"] == "vector_updated") {
        vectors.insert(event["id"].as_str().unwrap().to_owned(), event["meta"]["n"].as_u64().unwrap());
    }
    hold!(vectors == history.vectors, "vectors: {vectors:?} against {:?}", history.vectors);
    Ok(())
}

/// Whether the calls on each key fit its versions and real time.
fn check_linearizable(history: &History, versions: &Versions) -> Verdict {
    // By the number a write carried. Deletes carry none; they are found by their revision.
    let mut written = HashMap::new();
    for event in &history.log {
        let number = event["value"]["n"].as_u64().or_else(|| event["patch"]["n"].as_u64());
        if let (Some(number), Some(key)) = (number, event["key"].as_str())
            && key.starts_with("reg/")
        {
            hold!(written.insert(number, revision(event)).is_none(), "unique: {number} was written twice");
        }
    }
    let none = Vec::new();
    let mut by_key: BTreeMap<&str, Vec<&Call>> = BTreeMap::new();
    for call in &history.calls {
        by_key.entry(&call.key).or_default().push(call);
    }
    for (key, mut calls) in by_key {
        let versions = versions.get(key).unwrap_or(&none);
        let next_after = |revision: u64| versions.iter().map(|(r, _)| *r).find(|r| *r > revision).unwrap_or(u64::MAX);
        calls.sort_by_key(|call| call.began);
        // The earliest place of every call that has ended, by its end.
        let mut ended: Vec<(u64, u64)> = Vec::new();
        for call in calls {
            let after = ended.iter().filter(|(end, _)| *end < call.began).map(|(_, place)| *place).max().unwrap_or(0);
            let (first, last) = match &call.what {
                What::Write { number, revision: told, if_revision } => {
                    let place = match (written.get(number), told) {
                        (Some(place), Some(told)) => {
                            hold!(place == told, "{key}: told {told}, but the log has {number} at {place}");
                            *place
                        }
                        // It may have happened or not; the log knows, but not when it would have ended.
                        (found, None) => {
                            if let Some(place) = found {
                                hold!(
                                    *place > after,
                                    "linearizable: {call:?} took effect at {place}, before {after} had ended"
                                );
                            }
                            continue;
                        }
                        (None, Some(told)) => {
                            let is_delete = versions.iter().any(|(r, value)| r == told && value.is_none());
                            hold!(is_delete, "acknowledged and lost: {call:?}");
                            *told
                        }
                    };
                    if let Some(expected) = if_revision {
                        let event = &history.log[place as usize - 1];
                        hold!(event["prev_revision"] == *expected, "compare-and-set: {call:?} replaced {event}");
                    }
                    (place, place)
                }
                What::Read { revision: 0, .. } => {
                    // Absent: in which of the gaps it may have been, the earliest that real time allows.
                    let mut gaps = std::iter::once(0)
                        .chain(versions.iter().filter(|(_, value)| value.is_none()).map(|(r, _)| *r))
                        .map(|from| (from, next_after(from) - 1));
                    match gaps.find(|(_, last)| *last >= after) {
                        Some(gap) => gap,
                        None => return Err(format!("linearizable: {call:?} found nothing after {after}")),
                    }
                }
                What::Read { revision: seen, value } => {
                    let Some((_, known)) = versions.iter().find(|(r, known)| r == seen && known.is_some()) else {
                        return Err(format!("{call:?} saw what was never there"));
                    };
                    if let Some(value) = value {
                        hold!(known.as_ref() == Some(value), "{call:?} saw another value than {known:?}");
                    }
                    (*seen, next_after(*seen) - 1)
                }
            };
            hold!(last >= after, "linearizable: {call:?} fits up to {last}, but {after} had ended before it began");
            if let Some(end) = call.ended {
                ended.push((end, first));
            }
        }
    }
    Ok(())
}

/// The nine properties of each watcher.
fn check_watches(history: &History) -> Verdict {
    let mut labels = HashMap::new();
    let mut log = history.log.clone();
    for event in &mut log {
        let key = event["key"].as_str().unwrap_or_default().to_owned();
        match event["type"].as_str() {
            Some("state_updated") => drop(labels.insert(key, event["meta"].clone())),
            Some("state_deleted") => event[GONE] = labels.remove(&key).unwrap_or_default(),
            _ => {}
        }
    }
    let wants = |watcher: &Watcher, revision: u64| watcher.filter.wants(&log[revision as usize - 1]);
    for watcher in &history.watchers {
        let of = format!("{:?}", watcher.filter);
        let mut delivered = Vec::new();
        for session in &watcher.sessions {
            let mut at = session.resumed_at;
            for (id, event) in &session.frames {
                match event {
                    Some(event) => {
                        hold!(*id == revision(event), "{of}: the id {id} of {event}");
                        hold!(*id > at, "ordered, unique, resumable: {of}: {id} after {at}");
                        hold!(wants(watcher, *id), "filtered: {of} got {event}");
                        hold!(history.log[*id as usize - 1] == *event, "{of} got {event}, which the log has otherwise");
                        delivered.push(*id);
                    }
                    None => hold!(*id >= at, "bookmarkable: {of}: {id} after {at}"),
                }
                // Everything that matches up to here was delivered: by an event, or promised by a bookmark.
                let missed = (at + 1..=*id).find(|r| (event.is_none() || r != id) && wants(watcher, *r));
                hold!(
                    missed.is_none(),
                    "reliable, resumable, bookmarkable: {of}: {missed:?} is missing between {at} and {id}"
                );
                at = *id;
            }
        }
        hold!(delivered.is_sorted_by(|a, b| a < b), "unique: {of}");
        for (first, last) in &history.batches {
            let wanted = (*first..=*last).filter(|r| wants(watcher, *r));
            let seen = |r: &u64| delivered.binary_search(r).is_ok();
            let (got, missed): (Vec<_>, Vec<_>) = wanted.partition(seen);
            let is_end = delivered.last().is_none_or(|end| end < last);
            hold!(got.is_empty() || missed.is_empty() || is_end, "atomic: {of} got {got:?} and not {missed:?}");
        }
    }
    let everything = &history.watchers[0];
    let reached = everything.sessions.iter().flat_map(|s| &s.frames).map(|(id, _)| *id).max().unwrap_or(0);
    hold!(
        reached == history.log.len() as u64,
        "reliable: who watches everything ends at {reached} of {}",
        history.log.len()
    );
    Ok(())
}

fn judge(history: &History) -> Verdict {
    let versions = fold(&history.log)?;
    check_state(history, &versions)?;
    check_linearizable(history, &versions)?;
    check_watches(history)
}

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn histories_under_kill_9_are_linearizable_and_watches_keep_their_nine_properties() {
    let rounds = usize::try_from(environment("KISS_KILL_ROUNDS", 12)).unwrap();
    let seed = environment("KISS_SEED", u64::from(std::process::id()));
    println!("KISS_SEED={seed}");
    let history = record(rounds, 250, seed, None).await;
    let (reads, writes): (Vec<_>, Vec<_>) = history.calls.iter().partition(|c| matches!(c.what, What::Read { .. }));
    let unknown = writes.iter().filter(|c| c.ended.is_none()).count();
    let frames: usize = history.watchers.iter().flat_map(|w| &w.sessions).map(|s| s.frames.len()).sum();
    let sessions: usize = history.watchers.iter().map(|w| w.sessions.len()).sum();
    println!(
        "{rounds} kills · {} revisions · {} reads, {} writes ({unknown} without an answer) · {} batches · {frames} frames in {sessions} sessions",
        history.log.len(),
        reads.len(),
        writes.len(),
        history.batches.len()
    );
    if let Err(fault) = judge(&history) {
        panic!("{fault} (KISS_SEED={seed})");
    }
    assert!(reads.len() > 100 && writes.len() > 100 && frames > 1000, "too little happened to judge by");
}

/// The judge would notice: each of these is a history that nearly fits.
#[test]
fn the_judge_catches_histories_that_do_not_fit() {
    let event = |revision: u64, prev: u64, n: u64| json!({"type":"state_updated","key":"reg/0","revision":revision,"prev_revision":prev,"value":{"n":n}});
    let write = |number, revision, if_revision, began, ended| Call {
        key: "reg/0".into(),
        what: What::Write { number, revision: Some(revision), if_revision },
        began,
        ended: Some(ended),
    };
    let read = |revision, n: Option<u64>, began, ended| Call {
        key: "reg/0".into(),
        what: What::Read { revision, value: n.map(|n| json!({ "n": n })) },
        began,
        ended: Some(ended),
    };
    let log = vec![event(1, 0, 7), event(2, 1, 8), event(3, 2, 9)];
    let everything = |ids: &[u64]| Watcher {
        filter: Filter::default(),
        sessions: vec![Session {
            resumed_at: 0,
            frames: ids.iter().map(|id| (*id, Some(log[*id as usize - 1].clone()))).collect(),
        }],
    };
    let sound = || History {
        calls: vec![
            write(7, 1, None, 0, 10),
            read(1, Some(7), 5, 12),
            write(8, 2, Some(1), 15, 40),
            read(1, Some(7), 20, 30),
            read(2, Some(8), 22, 28),
            write(9, 3, None, 50, 60),
            read(3, None, 70, 80),
        ],
        watchers: vec![everything(&[1, 2, 3])],
        batches: vec![(2, 3)],
        log: log.clone(),
        state: BTreeMap::from([("reg/0".to_owned(), (3, json!({"n":9})))]),
        vectors: BTreeMap::new(),
    };
    assert_eq!(judge(&sound()), Ok(()));
    type Break = fn(&mut History);
    let broken: &[(&str, &str, Break)] = &[
        ("stale read", "linearizable", |h| h.calls[6].what = What::Read { revision: 2, value: None }),
        ("a read that goes back", "linearizable", |h| h.calls[3].began = 29),
        ("absent after a write", "linearizable", |h| h.calls[6].what = What::Read { revision: 0, value: None }),
        ("another value", "another value", |h| {
            h.calls[1].what = What::Read { revision: 1, value: Some(json!({"n":8})) };
        }),
        ("lost", "acknowledged and lost", |h| {
            h.calls[5].what = What::Write { number: 99, revision: Some(3), if_revision: None };
        }),
        ("two of one compare-and-set", "compare-and-set", |h| {
            h.calls[5].what = What::Write { number: 9, revision: Some(3), if_revision: Some(1) };
        }),
        ("wrong previous", "previous value", |h| h.log[2]["prev_revision"] = json!(1)),
        ("created twice", "is-create", |h| h.log[1]["prev_revision"] = json!(0)),
        ("a hole in the log", "reliable", |h| drop(h.log.remove(1))),
        ("state of its own", "folds", |h| h.state.clear()),
        ("dropped event", "reliable", |h| drop(h.watchers[0].sessions[0].frames.remove(1))),
        ("doubled event", "unique", |h| {
            let twice = h.watchers[0].sessions[0].frames[1].clone();
            h.watchers[0].sessions[0].frames.insert(1, twice);
        }),
        ("swapped events", "reliable", |h| h.watchers[0].sessions[0].frames.swap(1, 2)),
        ("end not reached", "atomic", |h| {
            // Half a batch, and beyond it.
            h.log.push(json!({"type":"log","revision":4,"data":1}));
            let session = Session { resumed_at: 3, frames: vec![(4, Some(h.log[3].clone()))] };
            h.watchers[0].sessions[0].frames.remove(2);
            h.watchers[0].sessions.push(session);
        }),
        ("resumed one too far", "resumable", |h| {
            let frames = vec![h.watchers[0].sessions[0].frames.pop().unwrap()];
            h.watchers[0].sessions[0].frames.pop();
            h.watchers[0].sessions.push(Session { resumed_at: 1, frames });
        }),
        ("a bookmark too far", "bookmarkable", |h| {
            h.watchers[0].sessions[0].frames.truncate(1);
            h.watchers[0].sessions[0].frames.push((3, None));
        }),
        ("not asked for", "filtered", |h| h.watchers[0].filter.key = Some("other")),
    ];
    for (name, says, change) in broken {
        let mut history = sound();
        change(&mut history);
        let fault = judge(&history).expect_err(name);
        assert!(fault.contains(says), "{name}: {fault}");
    }
}

/// The program made wrong on purpose: what the judge says must name the property that is broken.
#[cfg(feature = "lab")]
#[tokio::test(flavor = "multi_thread")]
async fn the_judge_catches_seeded_bugs() {
    let seed = environment("KISS_SEED", u64::from(std::process::id()));
    println!("KISS_SEED={seed}");
    for (bug, says) in
        [("stale_read", "linearizable"), ("lose_cas", "previous value"), ("resume_off_by_one", "is missing between")]
    {
        let history = record(2, 400, seed, Some(bug)).await;
        let fault = judge(&history).expect_err(bug);
        println!("{bug}: {fault}");
        assert!(fault.contains(says), "{bug} was taken for: {fault}");
    }
}
