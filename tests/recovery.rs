//! What was acknowledged is there after any end of the process; what is damaged is refused by name.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Duration, Server, call, contains, ok, timeout};
use hyper::Method;
use kiss_vdb::client::{Client, Target};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.to_str().unwrap().ends_with(extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Everything a client can read: keys, vectors, counts.
async fn image(target: &Target) -> Value {
    let c = &mut Client::new(target);
    let mut items = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = ok(c, &format!("GET /v1/state?limit=1000{cursor}")).await;
        items.extend(page["items"].as_array().unwrap().iter().cloned());
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    let mut collections = Vec::new();
    for info in ok(c, "GET /v1/vector").await["collections"].as_array().unwrap() {
        let name = info["collection"].as_str().unwrap();
        let list = ok(c, &format!("GET /v1/vector/{name}/list?limit=1000&include_vector=true")).await;
        collections.push(json!({"name": name, "dim": info["dim"], "metric": info["metric"], "items": list["items"]}));
    }
    json!({"keys": items, "collections": collections})
}

async fn write_a_bit_of_everything(c: &mut Client) {
    ok(c, r#"PUT /v1/state/a {"value":{"n":1.50},"meta":{"job_id":"j","tags":["t"]}}"#).await;
    ok(c, r#"PATCH /v1/state/a {"m":2}"#).await;
    ok(c, r#"PUT /v1/state/gone {"value":1}"#).await;
    ok(c, "DELETE /v1/state/gone").await;
    ok(c, r#"PUT /v1/state/ttl {"value":1,"ttl_ms":3600000}"#).await;
    c.send("PUT".parse().unwrap(), "/v1/state/bytes", &[("content-type", "text/plain")], "hi").await.unwrap();
    for name in ["v", "w"] {
        ok(c, &format!("POST /v1/vector/{name} {{\"dim\":3,\"metric\":\"cosine\"}}")).await;
        for n in 0..300 {
            ok(
                c,
                &format!("POST /v1/vector/{name}/add {{\"id\":\"{n}\",\"vector\":[{n},1,2.5],\"meta\":{{\"n\":{n}}}}}"),
            )
            .await;
        }
        ok(c, &format!("POST /v1/vector/{name}/update {{\"id\":\"7\",\"meta\":{{\"x\":1}}}}")).await;
        ok(c, &format!("POST /v1/vector/{name}/upsert {{\"id\":\"8\",\"vector\":[9,9,9]}}")).await;
        ok(c, &format!("POST /v1/vector/{name}/delete {{\"filters\":{{\"n\":{{\"$gt\":250}}}}}}")).await;
    }
    ok(c, "DELETE /v1/vector/w").await;
    ok(c, r#"POST /v1/vector/w {"dim":2,"metric":"l2"}"#).await;
    ok(c, r#"POST /v1/vector/w/add {"id":"only","vector":[1,2]}"#).await;
}

#[tokio::test]
async fn everything_is_there_after_a_kill_and_after_a_stop_with_and_without_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &[]);
    write_a_bit_of_everything(&mut server.client()).await;
    let mut before = image(&server.target).await;
    let mut revision = ok(&mut server.client(), "GET /v1/health").await["revision"].clone();
    let mut server = Some(server);
    for (step, end) in ["kill", "snapshot and kill", "snapshot, write and kill", "stop", "kill"].into_iter().enumerate()
    {
        let old = server.take().unwrap();
        if end.contains("snapshot") {
            ok(&mut old.client(), "POST /v1/admin/snapshot").await;
        }
        if end.contains("write") {
            let c = &mut old.client();
            ok(c, r#"POST /v1/vector/v/upsert {"id":"9","vector":[5,5,5]}"#).await;
            ok(c, r#"POST /v1/vector/v/delete {"id":"10"}"#).await;
            ok(c, r#"POST /v1/vector/v/add {"id":"new","vector":[1,1,1]}"#).await;
            ok(c, r#"POST /v1/vector/v/update {"id":"11","meta":{"y":1}}"#).await;
            ok(c, r#"PUT /v1/state/z {"value":1}"#).await;
            before = image(&old.target).await;
            revision = ok(c, "GET /v1/health").await["revision"].clone();
        }
        if end == "stop" {
            assert!(old.stop(), "exit 0");
        } else {
            old.kill();
        }
        let new = Server::start_in(dir.path(), &[]);
        assert_eq!(image(&new.target).await, before, "step {step}: {end}");
        let health = ok(&mut new.client(), "GET /v1/health").await;
        assert_eq!(health["revision"], revision, "step {step}: {end}");
        let found = ok(&mut new.client(), r#"POST /v1/vector/v/search {"id":"8","k":1}"#).await;
        assert_eq!(found["hits"][0]["id"], "8");
        server = Some(new);
    }
}

/// At a start after many deadlines expired keys go a thousand at a time. Batches that meet some of them before their turn have revisions
/// of their own all the same, and each key goes before it is written anew.
#[tokio::test]
async fn batches_among_keys_that_are_due_have_consecutive_revisions() {
    const PAGES: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &[]);
    for page in 0..PAGES {
        let put = |n| format!("{{\"op\":\"put\",\"key\":\"{page:02}/{n:03}\",\"value\":1,\"ttl_ms\":1000}}");
        let ops: Vec<String> = (0..1000).map(put).collect();
        ok(&mut server.client(), &format!("POST /v1/batch {{\"ops\":[{}]}}", ops.join(","))).await;
    }
    let last = ok(&mut server.client(), "GET /v1/health").await["revision"].as_u64().unwrap();
    server.kill();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let server = Server::start_in(dir.path(), &[]);
    let c = &mut server.client();
    let mut met = 0;
    for n in (900..1000).rev() {
        let key = format!("{:02}/{n:03}", PAGES - 1);
        let event = r#"{"op":"event","type":"log"}"#;
        let batch =
            format!("POST /v1/batch {{\"ops\":[{event},{{\"op\":\"put\",\"key\":\"{key}\",\"value\":2}},{event}]}}");
        let answer = ok(c, &batch).await;
        let first = answer["first_revision"].as_u64().unwrap();
        let revisions: Vec<u64> =
            answer["results"].as_array().unwrap().iter().map(|result| result["revision"].as_u64().unwrap()).collect();
        assert_eq!(revisions, [first, first + 1, first + 2], "{answer}");
        assert_eq!((&answer["last_revision"], &answer["results"][1]["created"]), (&json!(first + 2), &json!(true)));
        met += usize::from(first < last + (PAGES * 1000) as u64);
        let path = format!("/v1/events?key={}&since={last}", key.replace('/', "%2F"));
        let page = c.send(Method::GET, &path, &[("accept", "application/json")], "").await.unwrap();
        let history = page.json().unwrap();
        let types: Vec<_> = history["events"].as_array().unwrap().iter().map(|e| e["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["state_deleted", "state_updated"], "{history}");
    }
    eprintln!("{met} batches came before all that was due had gone");
}

/// Writers against a server that is killed again and again, with an oracle of what was acknowledged.
#[tokio::test]
async fn no_acknowledged_write_is_lost_by_kill_9() {
    let rounds = std::env::var("KISS_KILL_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(12);
    let dir = tempfile::tempdir().unwrap();
    // Small segments and frequent snapshots, so that kills hit rotations and snapshots too.
    let arguments = ["--max-log-mb", "8", "--snapshot-interval", "1"];
    let server = Server::start_in(dir.path(), &arguments);
    ok(&mut server.client(), r#"POST /v1/vector/v {"dim":4,"metric":"l2"}"#).await;
    let mut server = Some(server);
    // For each writer: the last acknowledged number, and the number that may or may not have happened.
    let oracle: Arc<Mutex<HashMap<usize, (u64, u64)>>> = Arc::default();
    let mut revision_seen = 0;
    for round in 0..rounds {
        let running = server.take().unwrap();
        let mut stream = running.target.events("?since=0&types=state_updated", Some(revision_seen)).await.unwrap();
        let watcher = tokio::spawn(async move {
            let mut last = stream.last_id().unwrap_or(0);
            while let Ok(Some(event)) = stream.next_event().await {
                if let Some(id) = event.id {
                    assert!(id > last, "{id} after {last}: {event:?}");
                    assert_ne!(event.event, "reset", "{event:?}");
                    last = id;
                }
            }
            last
        });
        let writers: Vec<_> = (0..6)
            .map(|writer| {
                let target = running.target.clone();
                let oracle = Arc::clone(&oracle);
                tokio::spawn(async move {
                    let mut c = Client::new(&target);
                    let start = oracle.lock().unwrap().get(&writer).map_or(0, |(_, tried)| *tried);
                    for n in start + 1.. {
                        oracle.lock().unwrap().entry(writer).or_default().1 = n;
                        let padding = "p".repeat((n % 50) as usize * 40);
                        // One batch: a key, a patched counter, a vector, an expiring key. All or nothing.
                        let ops = format!(
                            "{{\"ops\":[{{\"op\":\"put\",\"key\":\"w{writer}\",\"value\":[{n},\"{padding}\"]}},\
                             {{\"op\":\"patch\",\"key\":\"p{writer}\",\"patch\":{{\"n\":{n}}}}},\
                             {{\"op\":\"vector_upsert\",\"collection\":\"v\",\"id\":\"w{writer}-{}\",\"vector\":[{n},{writer},0,1],\"meta\":{{\"n\":{n}}}}},\
                             {{\"op\":\"put\",\"key\":\"t{writer}\",\"value\":{n},\"ttl_ms\":{}}}]}}",
                            n % 20,
                            1 + n % 30
                        );
                        let Ok(answer) = c.call("POST".parse().unwrap(), "/v1/batch", ops).await else { return };
                        assert!(answer.status.is_success(), "{:?}", answer.body);
                        oracle.lock().unwrap().entry(writer).or_default().0 = n;
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(150 + (round as u64 * 97) % 400)).await;
        running.kill();
        for writer in writers {
            writer.await.unwrap();
        }
        revision_seen = revision_seen.max(watcher.await.unwrap());
        let restarted = Server::start_in(dir.path(), &arguments);
        let c = &mut restarted.client();
        let known = oracle.lock().unwrap().clone();
        for (writer, (acknowledged, tried)) in known {
            if tried == 0 {
                continue;
            }
            let answer = call(c, &format!("GET /v1/state/w{writer}")).await;
            let found = if answer.status == 200 { answer.json().unwrap()["value"][0].as_u64().unwrap() } else { 0 };
            assert!(
                found == acknowledged || found == tried,
                "round {round} writer {writer}: {found}, acknowledged {acknowledged}, tried {tried}"
            );
            if found == 0 {
                continue;
            }
            assert_eq!(ok(c, &format!("GET /v1/state/p{writer}")).await["value"]["n"], found, "half a batch");
            let item = ok(c, &format!("GET /v1/vector/v/get?id=w{writer}-{}", found % 20)).await;
            assert!(
                contains(&item, &json!({"meta":{"n":found},"vector":[found as f64, writer as f64, 0.0, 1.0]})),
                "half a batch: {item}"
            );
            let hit = ok(c, &format!("POST /v1/vector/v/search {{\"vector\":[{found},{writer},0,1],\"k\":1}}")).await;
            assert_eq!(hit["hits"][0]["id"], format!("w{writer}-{}", found % 20));
            // Whether the last one happened is settled now: write on from there.
            oracle.lock().unwrap().insert(writer, (found, tried));
        }
        let head = ok(c, "GET /v1/health").await["revision"].as_u64().unwrap();
        assert!(head >= revision_seen, "a stream saw {revision_seen}, the head is {head}");
        server = Some(restarted);
    }
}

/// Killed while vectors are linked, repaired around, checkpointed: whatever the graph file then says, each acknowledged
/// vector is found, each deleted one is not, and `kiss-vdb check` finds nothing wrong.
#[tokio::test]
async fn vectors_survive_kills_in_the_midst_of_linking_and_repairs() {
    const BATCH: usize = 500;
    let rounds = std::env::var("KISS_KILL_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(6);
    let numbers = |id: usize| -> Vec<f64> {
        (0..16).map(|at| ((id * 31 + at * 17 + id * at * 7) % 211) as f64 / 10.0 + (id % 97) as f64).collect()
    };
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--snapshot-interval", "1"];
    let mut server = Some(Server::start_in(dir.path(), &arguments));
    ok(&mut server.as_ref().unwrap().client(), r#"POST /v1/vector/v {"dim":16,"metric":"l2"}"#).await;
    // Every batch brings new ids and takes the oldest away, so that repairs go on all the time.
    let (mut next, mut oldest) = (0, 0);
    for round in 0..rounds {
        let running = server.take().unwrap();
        let c = &mut running.client();
        for _ in 0..6 {
            let items: Vec<Value> = (next..next + BATCH)
                .map(|id| json!({"id": format!("i{id}"), "vector": numbers(id), "meta": {"n": id}}))
                .collect();
            ok(c, &format!("POST /v1/vector/v/upsert {}", json!({ "items": items }))).await;
            next += BATCH;
            if next - oldest > 3000 {
                let ids: Vec<String> = (oldest..oldest + BATCH).map(|id| format!("i{id}")).collect();
                ok(c, &format!("POST /v1/vector/v/delete {}", json!({ "ids": ids }))).await;
                oldest += BATCH;
            }
        }
        tokio::time::sleep(Duration::from_millis(round as u64 * 137 % 1300)).await;
        running.kill();
        let restarted = Server::start_in(dir.path(), &arguments);
        let c = &mut restarted.client();
        assert_eq!(ok(c, "POST /v1/vector/v/count").await["count"], next - oldest, "round {round}");
        for id in (oldest..next).step_by(173) {
            let body = json!({"vector": numbers(id), "k": 1, "filters": {"n": {"$gte": 0}}});
            let hit = ok(c, &format!("POST /v1/vector/v/search {body}")).await;
            assert_eq!(hit["hits"][0]["score"].as_f64(), Some(0.0), "round {round}, vector {id}: {hit}");
        }
        if oldest > 0 {
            let body = json!({"vector": numbers(oldest - 1), "k": 10, "filters": {"n": {"$lt": oldest}}});
            assert_eq!(ok(c, &format!("POST /v1/vector/v/search {body}")).await["hits"], json!([]));
        }
        server = Some(restarted);
    }
    server.unwrap().kill();
    let check =
        std::process::Command::new(env!("CARGO_BIN_EXE_kiss-vdb")).arg("check").arg(dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success() && said.contains("sound"), "{said}");
    // The log cut in its midst is refused by name, and changed by nobody.
    let segment = files(&dir.path().join("log"), "log").remove(0);
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[5] ^= 1;
    std::fs::write(&segment, &bytes).unwrap();
    let check =
        std::process::Command::new(env!("CARGO_BIN_EXE_kiss-vdb")).arg("check").arg(dir.path()).output().unwrap();
    assert!(!check.status.success() && String::from_utf8_lossy(&check.stderr).contains("damaged"), "{check:?}");
}

#[tokio::test]
async fn a_client_that_hangs_up_does_not_undo_its_write() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let address = server.target.url().trim_start_matches("http://").to_owned();
    for n in 0..200 {
        let body = format!("{{\"value\":{n}}}");
        let request = format!(
            "PUT /v1/state/h{n} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut socket = tokio::net::TcpStream::connect(&address).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut socket, request.as_bytes()).await.unwrap();
        drop(socket);
    }
    // Whatever was committed is whole and numbered without holes: the next write says how many there were.
    let head = ok(c, r#"PUT /v1/state/last {"value":1}"#).await["revision"].as_u64().unwrap();
    let keys = ok(c, "GET /v1/state?limit=1000&keys_only=true").await["items"].as_array().unwrap().len() as u64;
    assert!(keys >= head, "{keys} keys at revision {head}");
}

#[tokio::test]
async fn one_server_owns_a_data_directory() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &[]);
    let said = Server::refuses_to_start(dir.path(), &[]);
    assert!(said.contains("in use by another server") && said.contains(dir.path().to_str().unwrap()), "{said}");
    // As whoever takes the file for one left behind does.
    std::fs::remove_file(dir.path().join("LOCK")).unwrap();
    assert!(Server::refuses_to_start(dir.path(), &[]).contains("in use by another server"));
    server.kill();
    assert!(Server::start_in(dir.path(), &[]).stop(), "the lock goes with the process");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("not mounted"), &link).unwrap();
    assert!(Server::refuses_to_start(&link, &[]).contains("is its disk mounted?"));
}

#[tokio::test]
async fn damage_is_refused_by_name_and_touches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &["--snapshot-interval", "0"]);
    let c = &mut server.client();
    for n in 0..50 {
        ok(c, &format!("PUT /v1/state/k{n} {{\"value\":{n}}}")).await;
    }
    server.kill();
    let log = files(dir.path(), ".log").into_iter().find(|p| p.parent().unwrap().ends_with("log")).unwrap();
    let whole = std::fs::read(&log).unwrap();
    let mut damaged = whole.clone();
    damaged[64 + 40] ^= 1;
    std::fs::write(&log, &damaged).unwrap();
    let said = Server::refuses_to_start(dir.path(), &[]);
    assert!(said.contains(log.to_str().unwrap()) && said.contains("offset 64"), "{said}");
    assert_eq!(std::fs::read(&log).unwrap(), damaged, "the file was changed");
    std::fs::write(&log, &whole).unwrap();
    let server = Server::start_in(dir.path(), &[]);
    assert_eq!(ok(&mut server.client(), "GET /v1/health").await["revision"], 50);
    assert!(server.stop());

    // A damaged newest snapshot: the older one and the log give the same.
    let server = Server::start_in(dir.path(), &[]);
    ok(&mut server.client(), r#"PUT /v1/state/new {"value":1}"#).await;
    let before = image(&server.target).await;
    assert!(server.stop());
    let snapshots = files(dir.path(), ".snap");
    assert_eq!(snapshots.len(), 2, "two are kept");
    let good = std::fs::read(&snapshots[1]).unwrap();
    for at in [0, 9, 30, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&snapshots[1], &bad).unwrap();
        let server = Server::start_in(dir.path(), &["--snapshot-interval", "0"]);
        assert_eq!(image(&server.target).await, before, "flip at {at}");
        server.kill();
    }
    std::fs::remove_file(&snapshots[1]).unwrap();
    let server = Server::start_in(dir.path(), &[]);
    assert_eq!(image(&server.target).await, before, "without it");
    assert!(server.stop());

    // Nothing is made up when the log is gone.
    for log in files(&dir.path().join("log"), ".log") {
        std::fs::remove_file(log).unwrap();
    }
    let said = Server::refuses_to_start(dir.path(), &[]);
    assert!(said.contains("log"), "{said}");
}

#[tokio::test]
async fn vector_files_that_lost_a_checkpoint_are_noticed_and_torn_ones_are_not_needed() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &["--snapshot-interval", "0", "--max-log-mb", "2"]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":3,"metric":"dot"}"#).await;
    for n in 0..100 {
        ok(c, &format!("POST /v1/vector/v/add {{\"id\":\"{n}\",\"vector\":[{n},1,2]}}")).await;
    }
    ok(c, "POST /v1/admin/snapshot").await;
    for n in 0..50 {
        ok(c, &format!("POST /v1/vector/v/upsert {{\"id\":\"{n}\",\"vector\":[{n},2,2]}}")).await;
    }
    let before = image(&server.target).await;
    server.kill();
    let slots = files(dir.path(), "slots.log").remove(0);
    let whole = std::fs::read(&slots).unwrap();
    // A torn frame behind the last checkpoint is what a crash leaves; it costs nothing.
    std::fs::write(&slots, [&whole[..], &[7; 33]].concat()).unwrap();
    let server = Server::start_in(dir.path(), &["--snapshot-interval", "0"]);
    assert_eq!(image(&server.target).await, before);
    server.kill();
    for cut in [10, 40, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&slots, &whole[..cut]).unwrap();
        let said = Server::refuses_to_start(dir.path(), &[]);
        assert!(said.contains("slots.log"), "cut at {cut}: {said}");
    }
    let mut damaged = whole.clone();
    damaged[60] ^= 1;
    std::fs::write(&slots, &damaged).unwrap();
    let said = Server::refuses_to_start(dir.path(), &[]);
    assert!(said.contains("slots.log"), "{said}");
    assert_eq!(std::fs::read(&slots).unwrap(), damaged, "a refused start must not cut the file");
    std::fs::write(&slots, &whole).unwrap();
    let rows = files(dir.path(), "rows.f32").remove(0);
    let numbers = std::fs::read(&rows).unwrap();
    std::fs::write(&rows, &numbers[..100]).unwrap();
    let said = Server::refuses_to_start(dir.path(), &[]);
    assert!(said.contains("rows.f32"), "{said}");
    std::fs::write(&rows, &numbers).unwrap();
    let server = Server::start_in(dir.path(), &[]);
    assert_eq!(image(&server.target).await, before);
}

/// The files of a deleted collection go before the next snapshot: the one that still lists it must not need them.
#[tokio::test]
async fn a_collection_deleted_after_the_snapshot_is_not_missed() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &["--snapshot-interval", "0"]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":2,"metric":"dot"}"#).await;
    ok(c, r#"POST /v1/vector/v/add {"id":"a","vector":[1,2]}"#).await;
    ok(c, "POST /v1/admin/snapshot").await;
    ok(c, r#"POST /v1/vector/v/add {"id":"b","vector":[1,2]}"#).await;
    ok(c, "DELETE /v1/vector/v").await;
    let gone = async {
        while !files(dir.path(), "rows.f32").is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(10), gone).await.expect("the files are removed");
    server.kill();
    let server = Server::start_in(dir.path(), &[]);
    assert_eq!(call(&mut server.client(), "GET /v1/vector/v").await.status, 404);
    // Without the log that says so, the same is damage.
    let lost = tempfile::tempdir().unwrap();
    let server = Server::start_in(lost.path(), &["--snapshot-interval", "0"]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":2,"metric":"dot"}"#).await;
    ok(c, r#"POST /v1/vector/v/add {"id":"a","vector":[1,2]}"#).await;
    ok(c, "POST /v1/admin/snapshot").await;
    server.kill();
    std::fs::remove_dir_all(files(lost.path(), "rows.f32")[0].parent().unwrap()).unwrap();
    let said = Server::refuses_to_start(lost.path(), &[]);
    assert!(said.contains("files are missing"), "{said}");
}

/// A file system in memory. That needs root and mount; where it is not allowed, there is nothing to test.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn of(mib: usize) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        let mounted =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(dir.path()).status();
        if mounted.is_ok_and(|s| s.success()) {
            return Some(Self(dir));
        }
        eprintln!("skipped: cannot mount a small file system");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        std::process::Command::new("umount").arg("-l").arg(self.0.path()).status().ok();
    }
}

/// On a full disk writes resume by themselves.
async fn until_written(c: &mut Client, write: &str, within: Duration) {
    let written = async {
        while !call(c, write).await.status.is_success() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(within, written).await.expect("writes resume by themselves");
}

/// The log grows by everything written between two snapshots. When it fills the disk, a snapshot has no room, and without one
/// nothing of the log may go: the room is made of what the last snapshot covers.
#[tokio::test]
async fn a_log_that_fills_the_disk_is_shortened_and_writes_go_on() {
    let Some(dir) = SmallDisk::of(48) else { return };
    let data = dir.path().join("data");
    // No snapshot but those asked for: the disk must get full.
    let server = Server::start_in(&data, &["--max-log-mb", "8", "--snapshot-interval", "0"]);
    let c = &mut server.client();
    let value = "x".repeat(4000);
    let write = |n: usize| format!("PUT /v1/state/k{} {{\"value\":\"{n} {value}\"}}", n % 1000);
    for n in 0..2000 {
        ok(c, &write(n)).await;
    }
    ok(c, "POST /v1/admin/snapshot").await;
    let mut times_full = 0;
    let mut last = 0;
    for n in 2000..60_000 {
        let filled = call(c, &write(n)).await;
        if filled.status == 507 {
            times_full += 1;
            until_written(c, &write(n), Duration::from_secs(30)).await;
        } else {
            assert!(filled.status.is_success(), "{:?}", filled.body);
        }
        last = n;
        if times_full == 3 {
            break;
        }
    }
    assert_eq!(times_full, 3, "the disk filled only so often by write {last}");
    server.kill();
    let server = Server::start_in(&data, &["--max-log-mb", "8"]);
    let c = &mut server.client();
    for n in last - 999..=last {
        let found = ok(c, &format!("GET /v1/state/k{}", n % 1000)).await;
        assert!(found["value"].as_str().unwrap().starts_with(&format!("{n} ")), "{n}");
    }
}

#[tokio::test]
async fn a_full_disk_refuses_growth_lets_deletes_pass_and_heals() {
    let Some(dir) = SmallDisk::of(24) else { return };
    let data = dir.path().join("data");
    let server = Server::start_in(&data, &["--max-log-mb", "32", "--snapshot-interval", "0"]);
    let c = &mut server.client();
    let ballast = dir.path().join("ballast");
    std::fs::write(&ballast, vec![1; 8 << 20]).unwrap();
    let value = "x".repeat(100_000);
    let mut written = 0;
    let refused = loop {
        let answer = call(c, &format!("PUT /v1/state/k{written} {{\"value\":\"{value}\"}}")).await;
        if !answer.status.is_success() {
            break answer;
        }
        written += 1;
        assert!(written < 1000, "the disk never fills");
    };
    assert_eq!(refused.status, 507, "{:?}", refused.body);
    assert_eq!(refused.json().unwrap()["code"], "storage_full");
    assert!(written > 50, "only {written} written");
    let is_full = async |c: &mut Client| {
        let metrics = call(c, "GET /v1/metrics").await;
        String::from_utf8_lossy(&metrics.body).contains("kiss_storage_full 1.0")
    };
    assert!(is_full(c).await);
    assert_eq!(call(c, "GET /v1/state/k0").await.status, 200, "reads go on");
    ok(c, "DELETE /v1/state/k0").await;
    let mut stream = server.target.events("?key=k1", None).await.unwrap();
    ok(c, "DELETE /v1/state/k1").await;
    let event = timeout(Duration::from_secs(5), stream.next_event()).await.unwrap().unwrap().unwrap();
    assert_eq!(event.event, "state_deleted", "streams go on");
    std::fs::remove_file(&ballast).unwrap();
    until_written(c, &format!("PUT /v1/state/healed {{\"value\":\"{value}\"}}"), Duration::from_secs(5)).await;
    assert!(!is_full(c).await);
    server.kill();
    let server = Server::start_in(&data, &["--max-log-mb", "32"]);
    let c = &mut server.client();
    assert_eq!(call(c, "GET /v1/state/k0").await.status, 404);
    assert_eq!(ok(c, "GET /v1/state/k2").await["value"], value);
    assert_eq!(call(c, "GET /v1/state/healed").await.status, 200);
}

/// What is written to a file without a name is on no disk, whatever a sync says.
#[tokio::test]
async fn a_log_removed_under_the_server_poisons_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let server = Server::start_in(&data, &[]);
    let c = &mut server.client();
    ok(c, r#"PUT /v1/state/k {"value":1}"#).await;
    std::fs::remove_dir_all(&data).unwrap();
    let started = Instant::now();
    while call(c, "GET /v1/health").await.status != 503 {
        assert!(started.elapsed() < Duration::from_secs(60), "it goes on as if nothing had happened");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused = call(c, r#"PUT /v1/state/k {"value":3}"#).await;
    assert_eq!((refused.status.as_u16(), &refused.json().unwrap()["code"]), (503, &json!("poisoned")));
    assert_eq!(ok(c, "GET /v1/state/k").await["value"], 1, "reads go on");
}

/// It would clean up what it has not made.
#[tokio::test]
async fn a_restore_whose_directory_was_moved_touches_nothing_in_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let server = Server::start_in(&at("other"), &[]);
    let c = &mut server.client();
    let filling = "x".repeat(1 << 20);
    for n in 0..40 {
        ok(c, &format!("PUT /v1/state/k{n} {{\"value\":\"{filling}\"}}")).await;
    }
    let backup = call(c, "GET /v1/admin/backup").await;
    std::fs::write(at("backup"), &backup.body).unwrap();
    server.kill();
    let restore = || {
        let mut command = std::process::Command::new(common::BINARY);
        command.arg("restore").arg(at("backup")).arg(at("new")).stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let child = restore();
    while !at("new/RESTORING").exists() {
        std::thread::yield_now();
    }
    std::fs::rename(at("new"), at("moved")).unwrap();
    std::fs::rename(at("other"), at("new")).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("it was moved"), "{said}");
    let server = Server::start_in(&at("new"), &[]);
    ok(&mut server.client(), "GET /v1/state/k39").await;
}

/// What stands where the directory was may be another database: that of whoever moved it, or one mounted there.
#[tokio::test]
async fn a_directory_that_was_moved_is_not_looked_for_in_its_old_place() {
    let dir = tempfile::tempdir().unwrap();
    let (data, moved) = (dir.path().join("data"), dir.path().join("moved"));
    let small = ["--max-log-mb", "1"];
    let first = Server::start_in(&data, &small);
    let c = &mut first.client();
    ok(c, r#"PUT /v1/state/first {"value":1}"#).await;
    std::fs::rename(&data, &moved).unwrap();
    let second = Server::start_in(&data, &small);
    ok(&mut second.client(), r#"PUT /v1/state/second {"value":1}"#).await;
    // More than a segment holds, so that it needs the next before it has looked around.
    let filling = "x".repeat(100 << 10);
    let started = Instant::now();
    let mut written = 0;
    let refused = loop {
        let answer = call(c, &format!("PUT /v1/state/first{written} {{\"value\":\"{filling}\"}}")).await;
        if !answer.status.is_success() {
            break answer;
        }
        written += 1;
        assert!(started.elapsed() < Duration::from_secs(60), "it goes on in another's directory");
    };
    assert_eq!((refused.status.as_u16(), &refused.json().unwrap()["code"]), (503, &json!("poisoned")));
    assert!(written > 0 && ok(c, "GET /v1/state/first").await["value"] == 1, "reads go on");
    assert_eq!(call(c, "POST /v1/admin/snapshot").await.status, 503);
    assert!(first.stop() && second.stop());
    for (dir, keys, key) in [(&data, 1, "second"), (&moved, written + 1, "first")] {
        let server = Server::start_in(dir, &small);
        let c = &mut server.client();
        ok(c, &format!("GET /v1/state/{key}")).await;
        let page = ok(c, "GET /v1/state?keys_only=true&limit=1000").await;
        assert_eq!(page["items"].as_array().unwrap().len(), keys, "{key}");
    }
}

/// A sync that fails in the kernel's name: the server poisons itself, reads go on, and what it acknowledged is there after a restart.
/// Skipped where `fiu-run` is not installed; the lab makes every operation fail without it.
#[tokio::test]
async fn a_disk_that_fails_poisons_and_loses_nothing() {
    use std::process::Command;
    if Command::new("fiu-run").arg("-h").output().is_err() {
        println!("skipped: fiu-run is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("fiu");
    let mut command = Command::new("fiu-run");
    command.arg("-x").arg("-f").arg(&control).args([common::BINARY, "serve", "--port", "0", "--data-dir"]);
    command.arg(dir.path().join("data")).env("RUST_LOG", "off");
    let (server, url) = common::serving(command);
    let c = &mut Client::new(&Target::new(&url, None).unwrap());
    for n in 0..20 {
        ok(c, &format!("PUT /v1/state/k{n} {{\"value\":{n}}}")).await;
    }
    // The process that listens for faults is a child of fiu-run, or fiu-run itself replaced.
    let pid = std::fs::read_dir(dir.path()).unwrap().find_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        Some(name.strip_prefix("fiu-")?.strip_suffix(".in")?.to_owned())
    });
    let pid = pid.expect("the control pipe names the process");
    let fault = ["-c", "enable name=posix/io/sync/fdatasync", &pid];
    assert!(Command::new("fiu-ctrl").arg("-f").arg(&control).args(fault).status().unwrap().success());
    let refused = call(c, r#"PUT /v1/state/late {"value":1}"#).await;
    assert_eq!((refused.status.as_u16(), &refused.json().unwrap()["code"]), (503, &json!("poisoned")));
    assert_eq!(ok(c, "GET /v1/state/k19").await["value"], 19, "reads go on");
    assert_eq!(call(c, "GET /v1/health").await.status, 503);
    let process = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    drop(server);
    let server = Server::start_in(&dir.path().join("data"), &[]);
    let c = &mut server.client();
    for n in 0..20 {
        assert_eq!(ok(c, &format!("GET /v1/state/k{n}")).await["value"], n);
    }
}
