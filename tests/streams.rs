//! Streams: in order, without a gap or a duplicate, resumable from any id, whatever comes and goes meanwhile.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Duration, Server, call, contains, ok, timeout};
use kiss_vdb::client::{Client, EventStream, ServerEvent};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

async fn next(stream: &mut EventStream) -> ServerEvent {
    let event = timeout(Duration::from_secs(20), stream.next_event()).await.expect("an event in time");
    event.unwrap().expect("the stream goes on")
}

async fn frame(stream: &mut EventStream) -> ServerEvent {
    timeout(Duration::from_secs(20), stream.next_frame())
        .await
        .expect("a frame in time")
        .unwrap()
        .expect("the stream goes on")
}

#[tokio::test]
async fn frames_look_as_the_contract_draws_them() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"PUT /v1/state/before {"value":1}"#).await;
    let mut stream = server.target.events("?include_vector=true", None).await.unwrap();
    let open = frame(&mut stream).await;
    assert_eq!(open, ServerEvent { event: String::new(), id: Some(1), data: String::new() });
    assert_eq!(stream.retry_ms(), Some(1000));
    ok(c, r#"PUT /v1/state/k {"value": {"a": 1.0}, "ttl_ms": 60000, "meta": {"job_id": "j", "tags": ["t"]}}"#).await;
    ok(c, r#"PATCH /v1/state/k {"b":2}"#).await;
    ok(c, "DELETE /v1/state/k").await;
    ok(c, r#"POST /v1/vector/v {"dim":2,"metric":"dot"}"#).await;
    ok(c, r#"POST /v1/vector/v/add {"id":"x","vector":[1,2],"meta":{"job_id":"j"}}"#).await;
    ok(c, r#"POST /v1/vector/v/update {"id":"x","meta":{"n":1}}"#).await;
    ok(c, r#"POST /v1/vector/v/delete {"id":"x"}"#).await;
    ok(c, "DELETE /v1/vector/v").await;
    ok(c, r#"POST /v1/events {"type":"progress","key":"k","data":{"p":1}}"#).await;
    let expected = [
        json!({"type":"state_updated","key":"k","revision":2,"prev_revision":0,"value":{"a":1.0},"meta":{"job_id":"j","tags":["t"]}}),
        json!({"type":"state_updated","key":"k","revision":3,"prev_revision":2,"patch":{"b":2}}),
        json!({"type":"state_deleted","key":"k","revision":4,"prev_revision":3,"reason":"deleted"}),
        json!({"type":"collection_created","collection":"v","revision":5,"dim":2,"metric":"dot"}),
        json!({"type":"vector_added","collection":"v","id":"x","revision":6,"meta":{"job_id":"j"},"vector":[1.0,2.0]}),
        json!({"type":"vector_updated","collection":"v","id":"x","revision":7,"meta":{"job_id":"j","n":1}}),
        json!({"type":"vector_deleted","collection":"v","id":"x","revision":8}),
        json!({"type":"collection_deleted","collection":"v","revision":9,"dim":2,"metric":"dot"}),
        json!({"type":"progress","key":"k","revision":10,"data":{"p":1}}),
    ];
    for part in expected {
        let event = next(&mut stream).await;
        let data = event.json().unwrap();
        assert!(contains(&data, &part), "{data}\nexpected {part}");
        assert_eq!(Some(event.event.as_str()), part["type"].as_str());
        assert_eq!(event.id, part["revision"].as_u64());
        assert!(data["ts"].as_f64().unwrap() > 1.7e9);
    }
}

#[tokio::test]
async fn headers_tell_proxies_to_keep_out() {
    let server = Server::start(&[]);
    // A page of the stream cannot be read whole, so ask for the head alone.
    let mut c = server.client();
    let answer = c.send("HEAD".parse().unwrap(), "/v1/events", &[("accept-encoding", "gzip")], "").await.unwrap();
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    assert_eq!(answer.headers["cache-control"], "no-store, no-transform");
    assert_eq!(answer.headers["x-accel-buffering"], "no");
    assert!(answer.headers.get("content-encoding").is_none());
}

#[tokio::test]
async fn filters_select_and_combine() {
    let writes = [
        r#"PUT /v1/state/a/1 {"value":1,"meta":{"job_id":"j1","tags":["red"]}}"#,
        r#"PUT /v1/state/a/2 {"value":1,"meta":{"tags":["blue","red"]}}"#,
        r#"PUT /v1/state/b {"value":1}"#,
        r#"DELETE /v1/state/a/1"#,
        r#"POST /v1/events {"type":"log","key":"b","meta":{"job_id":"j1"}}"#,
        r#"POST /v1/events {"type":"log"}"#,
        r#"POST /v1/vector/v/add {"id":"x","vector":[1],"meta":{"tags":["red"],"job_id":"j2"}}"#,
    ];
    for (query, expected) in [
        ("", vec![2, 3, 4, 5, 6, 7, 8]),
        ("key=b", vec![4, 6]),
        ("key=b&key=a/2", vec![3, 4, 6]),
        ("prefix=a/", vec![2, 3, 5]),
        ("prefix=a/&prefix=a", vec![2, 3, 5]),
        ("prefix=a/&key=a/1&key=b", vec![2, 3, 4, 5, 6]),
        ("collection=v", vec![8]),
        ("collection=v&key=b", vec![4, 6, 8]),
        ("types=log", vec![6, 7]),
        ("types=log,state_deleted", vec![5, 6, 7]),
        ("types=log&key=b", vec![6]),
        ("job_id=j1", vec![2, 5, 6]),
        ("job_id=j1&types=state_updated", vec![2]),
        ("tag=red", vec![2, 3, 5, 8]),
        ("tag=blue&tag=none", vec![3]),
        ("tag=red&prefix=a/", vec![2, 3, 5]),
        ("tag=red&job_id=j2", vec![8]),
    ] {
        // One stream live from the start, one that catches up afterwards: they must agree.
        let server = Server::start(&[]);
        let c = &mut server.client();
        let mut live = server.target.events(&format!("?{query}"), None).await.unwrap();
        frame(&mut live).await;
        ok(c, r#"POST /v1/vector/v {"dim":1,"metric":"dot"}"#).await;
        for line in writes {
            ok(c, line).await;
        }
        let mut resumed = server.target.events(&format!("?{query}&since=1"), None).await.unwrap();
        for (name, stream) in [("live", &mut live), ("resumed", &mut resumed)] {
            for revision in &expected {
                let mut event = next(stream).await;
                if event.event == "collection_created" {
                    event = next(stream).await;
                }
                assert_eq!(event.id, Some(*revision), "{name} {query:?}");
            }
        }
    }
}

#[tokio::test]
async fn many_clients_see_every_event_exactly_once_in_order() {
    // Small segments and a small log budget would drop history; small segments alone make readers cross many.
    let server = Server::start(&["--max-log-mb", "16"]);
    const WRITERS: usize = 4;
    const WRITES: usize = 600;
    const KEYS: usize = 7;
    let readers: Vec<_> = (0..30)
        .map(|reader| {
            let target = server.target.clone();
            tokio::spawn(async move {
                let query = match reader % 3 {
                    0 => "?since=0".to_owned(),
                    1 => format!("?since=0&key=k{}", reader % KEYS),
                    _ => format!("?since=0&prefix=k&tag=w{}", reader % WRITERS),
                };
                let mut seen: Vec<Value> = Vec::new();
                let mut last_id = None;
                'connections: loop {
                    let mut stream = match last_id {
                        None => target.events(&query, None).await.unwrap(),
                        id => target.events(&query, id).await.unwrap(),
                    };
                    // Every reader drops its connection after a different number of events, again and again.
                    for count in 0.. {
                        let event = next(&mut stream).await;
                        last_id = stream.last_id();
                        if event.event == "done" {
                            break 'connections;
                        }
                        assert_eq!(event.event, "state_updated");
                        seen.push(event.json().unwrap());
                        if count == 13 + reader * 7 {
                            continue 'connections;
                        }
                    }
                }
                (reader, seen)
            })
        })
        .collect();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let target = server.target.clone();
            tokio::spawn(async move {
                let mut c = Client::new(&target);
                for n in 0..WRITES {
                    let key = (n * 31 + writer) % KEYS;
                    if n % 10 == 0 {
                        let ops: Vec<String> = (0..3)
                            .map(|i| format!("{{\"op\":\"put\",\"key\":\"k{key}\",\"value\":[{writer},{n},{i}],\"meta\":{{\"tags\":[\"w{writer}\"]}}}}"))
                            .collect();
                        ok(&mut c, &format!("POST /v1/batch {{\"ops\":[{}]}}", ops.join(","))).await;
                    } else {
                        ok(&mut c, &format!("PUT /v1/state/k{key} {{\"value\":[{writer},{n}],\"meta\":{{\"tags\":[\"w{writer}\"]}}}}")).await;
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let c = &mut server.client();
    let done: Vec<String> = (0..KEYS)
        .flat_map(|k| {
            (0..WRITERS).map(move |w| {
                format!("{{\"op\":\"event\",\"type\":\"done\",\"key\":\"k{k}\",\"meta\":{{\"tags\":[\"w{w}\"]}}}}")
            })
        })
        .collect();
    let committed = ok(c, &format!("POST /v1/batch {{\"ops\":[{}]}}", done.join(","))).await;
    let total = committed["first_revision"].as_u64().unwrap() - 1;
    assert_eq!(total as usize, WRITERS * (WRITES + WRITES / 10 * 2));
    for reader in readers {
        let (reader, seen) = timeout(Duration::from_secs(60), reader).await.unwrap().unwrap();
        let revisions: Vec<u64> = seen.iter().map(|e| e["revision"].as_u64().unwrap()).collect();
        assert!(revisions.is_sorted_by(|a, b| a < b), "reader {reader}: order");
        match reader % 3 {
            0 => assert!(revisions.iter().copied().eq(1..=total), "reader {reader}: all of them"),
            1 => {
                // The chain of one key's revisions has no gap.
                let mut previous = 0;
                for event in &seen {
                    assert_eq!(event["prev_revision"], previous, "reader {reader}");
                    previous = event["revision"].as_u64().unwrap();
                }
                let last = ok(c, &format!("GET /v1/state/k{}", reader % KEYS)).await;
                assert_eq!(last["revision"], previous);
            }
            _ => assert_eq!(seen.len(), WRITES + WRITES / 10 * 2, "reader {reader}: all of one writer"),
        }
    }
}

#[tokio::test]
async fn a_snapshot_and_what_follows_fold_to_the_state() {
    let server = Server::start(&[]);
    let mut c = server.client();
    for n in 0..3000 {
        ok(&mut c, &format!("PUT /v1/state/k{n:04} {{\"value\":{{\"n\":0}}}}")).await;
    }
    let target = server.target.clone();
    let writer = tokio::spawn(async move {
        let mut c = Client::new(&target);
        for n in 0..4000usize {
            let key = (n * 7919) % 3500;
            match n % 4 {
                0 => drop(call(&mut c, &format!("DELETE /v1/state/k{key:04}")).await),
                1 => drop(ok(&mut c, &format!("PATCH /v1/state/k{key:04} {{\"p{}\":{n}}}", n % 3)).await),
                _ => drop(ok(&mut c, &format!("PUT /v1/state/k{key:04} {{\"value\":{{\"n\":{n}}}}}")).await),
            }
        }
        ok(&mut c, r#"PUT /v1/state/kzzz {"value":"end"}"#).await;
    });
    let folds: Vec<_> = ["?snapshot=true", "?snapshot=true&prefix=k", "?snapshot=true&prefix=k1&prefix=k2&prefix=kzzz"]
        .into_iter()
        .cycle()
        .take(9)
        .enumerate()
        .map(|(n, query)| {
            let target = server.target.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(20 * n as u64)).await;
                let mut stream = target.events(query, None).await.unwrap();
                let mut state: BTreeMap<String, Value> = BTreeMap::new();
                let mut at = None;
                loop {
                    let event = next(&mut stream).await;
                    let data = event.json().unwrap();
                    let key = data["key"].as_str().unwrap_or_default().to_owned();
                    match event.event.as_str() {
                        "snapshot" => {
                            assert_eq!(event.id, None, "no id before snapshot_end");
                            assert!(at.is_none());
                            state.insert(key, data["value"].clone());
                        }
                        "snapshot_end" => {
                            assert_eq!(data["count"], state.len());
                            assert_eq!(data["revision"].as_u64(), event.id);
                            at = event.id;
                        }
                        "state_updated" => {
                            assert!(event.id > at, "a delta the snapshot already shows");
                            if let Some(patch) = data.get("patch") {
                                let target = state.entry(key.clone()).or_insert_with(|| json!({}));
                                for (name, value) in patch.as_object().unwrap() {
                                    target[name] = value.clone();
                                }
                            } else {
                                state.insert(key.clone(), data["value"].clone());
                            }
                            if key == "kzzz" {
                                return (query, state);
                            }
                        }
                        "state_deleted" => assert!(state.remove(&key).is_some(), "deleted what was not there: {key}"),
                        other => panic!("{other}"),
                    }
                }
            })
        })
        .collect();
    writer.await.unwrap();
    let mut real: BTreeMap<String, Value> = BTreeMap::new();
    let mut cursor = String::new();
    loop {
        let page = ok(&mut c, &format!("GET /v1/state?limit=1000{cursor}")).await;
        for item in page["items"].as_array().unwrap() {
            real.insert(item["key"].as_str().unwrap().to_owned(), item["value"].clone());
        }
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    for fold in folds {
        let (query, state) = timeout(Duration::from_secs(60), fold).await.unwrap().unwrap();
        let mut expected = real.clone();
        if query.contains("k1") {
            expected.retain(|key, _| key.starts_with("k1") || key.starts_with("k2") || key == "kzzz");
        }
        assert!(state == expected, "{query}: the fold differs from the state");
    }
}

/// A snapshot without it would leave its readers with a patch of nothing.
#[tokio::test]
async fn a_snapshot_shows_a_key_that_is_prolonged_behind_it_however_slow_its_reader() {
    let server = Server::start(&[]);
    let mut c = server.client();
    // More than lies between the server and a reader that does not read.
    let filling = "x".repeat(1 << 20);
    for n in 0..24 {
        ok(&mut c, &format!("PUT /v1/state/k{n} {{\"value\":\"{filling}\"}}")).await;
    }
    ok(&mut c, r#"PUT /v1/state/z {"value":{"name":"bob"},"ttl_ms":1500}"#).await;
    let mut walks = server.target.events("?snapshot=true", None).await.unwrap();
    assert_eq!(next(&mut walks).await.event, "snapshot");
    ok(&mut c, r#"PATCH /v1/state/z?ttl_ms=60000 {"beat":1}"#).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut rows = Vec::new();
    let mut event = next(&mut walks).await;
    while event.event == "snapshot" {
        rows.push(event.json().unwrap()["key"].as_str().unwrap().to_owned());
        event = next(&mut walks).await;
    }
    assert_eq!(event.event, "snapshot_end");
    assert_eq!((rows.len(), rows.last().map(String::as_str)), (24, Some("z")));
    assert_eq!(next(&mut walks).await.json().unwrap()["patch"]["beat"], 1);
}

/// A refusal would end an `EventSource` for good.
#[tokio::test]
async fn a_stream_for_whose_snapshot_there_is_no_place_waits_for_one() {
    const PLACES: usize = 32;
    let server = Server::start(&[]);
    let mut c = server.client();
    let filling = "x".repeat(1 << 20);
    for n in 0..12 {
        ok(&mut c, &format!("PUT /v1/state/k{n} {{\"value\":\"{filling}\"}}")).await;
    }
    let request = "GET /v1/events?snapshot=true&heartbeat_ms=1000 HTTP/1.1\r\nhost: h\r\n\r\n";
    let mut stand_still = Vec::new();
    for _ in 0..PLACES {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        let mut stream = socket.connect(address(&server).parse().unwrap()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        until(&mut stream, "event: snapshot\n").await;
        stand_still.push(stream);
    }
    // Open, with signs of life, and at no place to resume from. What fits is looked up beside it.
    let mut waits = connect(&server).await;
    waits.write_all(request.as_bytes()).await.unwrap();
    let said = until(&mut waits, "\r\n:\n\n\r\n").await;
    assert!(said.starts_with("HTTP/1.1 200 OK") && said.contains("retry: 1000"), "{said}");
    assert!(!said.contains("id:") && !said.contains("event:"), "{said}");
    let mut few = server.target.events("?snapshot=true&key=none", None).await.unwrap();
    assert_eq!(next(&mut few).await.event, "snapshot_end");
    // It gets the place of one that leaves.
    stand_still.pop();
    assert!(until(&mut waits, "event: snapshot_end\nid: 12\n").await.contains("event: snapshot\n"));
}

#[tokio::test]
async fn a_snapshot_of_keys_that_are_few_or_none() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"PUT /v1/state/a {"value":1,"meta":{"job_id":"j"}}"#).await;
    ok(c, r#"PUT /v1/state/b {"value":2}"#).await;
    for (query, expected) in [
        ("?snapshot=true&key=b&key=none", vec!["b"]),
        ("?snapshot=true&key=none", vec![]),
        ("?snapshot=true&job_id=j", vec!["a"]),
        ("?snapshot=true&collection=v", vec![]),
        ("?snapshot=true&collection=v&key=a", vec!["a"]),
        ("?snapshot=true&types=state_deleted", vec!["a", "b"]),
    ] {
        let mut stream = server.target.events(query, None).await.unwrap();
        for key in expected {
            let row = next(&mut stream).await;
            assert!(row.event == "snapshot" && row.json().unwrap()["key"] == key, "{query}: {row:?}");
        }
        let end = next(&mut stream).await;
        assert!(end.event == "snapshot_end" && end.id == Some(2), "{query}: {end:?}");
    }
    // With an id that can be honoured the snapshot is not sent again.
    let mut stream = server.target.events("?snapshot=true&key=b", Some(1)).await.unwrap();
    assert_eq!(frame(&mut stream).await.id, Some(1));
    assert_eq!(next(&mut stream).await.event, "state_updated");
}

#[tokio::test]
async fn positions_that_cannot_be_honoured_are_reset_aloud() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"PUT /v1/state/a {"value":1}"#).await;
    let mut stream = server.target.events("", Some(99)).await.unwrap();
    let reset = next(&mut stream).await;
    assert!(
        contains(&reset.json().unwrap(), &json!({"reason":"future","requested":99,"oldest":1,"head":1})),
        "{reset:?}"
    );
    assert_eq!((reset.event.as_str(), reset.id), ("reset", Some(1)));
    ok(c, r#"PUT /v1/state/b {"value":1}"#).await;
    assert_eq!(next(&mut stream).await.id, Some(2));

    let mut stream = server.target.events("?snapshot=true", Some(99)).await.unwrap();
    let reset = next(&mut stream).await;
    assert_eq!((reset.event.as_str(), reset.id), ("reset", None), "no id before the snapshot is complete");
    assert_eq!(next(&mut stream).await.event, "snapshot");
}

#[tokio::test]
async fn history_beyond_the_log_is_compacted_and_says_so() {
    let server = Server::start(&["--max-log-mb", "2", "--snapshot-interval", "0"]);
    let c = &mut server.client();
    let value = "x".repeat(200_000);
    for n in 0..40 {
        ok(c, &format!("PUT /v1/state/k{} {{\"value\":\"{value}\"}}", n % 3)).await;
    }
    ok(c, "POST /v1/admin/snapshot").await;
    ok(c, r#"PUT /v1/state/k0 {"value":0}"#).await;
    ok(c, "POST /v1/admin/snapshot").await;
    let oldest = ok(c, "GET /v1/health").await["oldest"].as_u64().unwrap();
    assert!(oldest > 1, "segments were dropped");
    let mut stream = server.target.events("", Some(1)).await.unwrap();
    let reset = next(&mut stream).await;
    assert!(
        contains(&reset.json().unwrap(), &json!({"reason":"compacted","requested":1,"oldest":oldest,"head":41})),
        "{reset:?}"
    );
    let answer =
        c.send("GET".parse().unwrap(), "/v1/events?since=1", &[("accept", "application/json")], "").await.unwrap();
    assert_eq!(answer.status, 410);
    assert!(contains(&answer.json().unwrap(), &json!({"code":"revision_compacted","oldest":oldest,"head":41})));
    let mut stream = server.target.events("?since=0", None).await.unwrap();
    assert_eq!(next(&mut stream).await.id, Some(oldest), "0 means from the oldest");
    let mut stream = server.target.events("", Some(0)).await.unwrap();
    let reset = next(&mut stream).await;
    assert!(
        contains(&reset.json().unwrap(), &json!({"reason":"compacted","requested":0})),
        "an empty server's id: {reset:?}"
    );
}

#[tokio::test]
async fn heartbeats_carry_the_position_reached() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let mut stream = server.target.events("?key=never&heartbeat_ms=1000", None).await.unwrap();
    assert_eq!(frame(&mut stream).await.id, Some(0));
    for _ in 0..5 {
        ok(c, r#"PUT /v1/state/a {"value":1}"#).await;
    }
    loop {
        let beat = timeout(Duration::from_secs(10), stream.next_frame()).await.unwrap().unwrap().unwrap();
        assert!(beat.event.is_empty() && beat.data.is_empty(), "{beat:?}");
        // Where the writes took longer than a beat, an earlier one came first.
        if beat.id == Some(5) {
            break;
        }
        assert!(beat.id < Some(5), "{beat:?}");
    }
}

#[tokio::test]
async fn ephemeral_events_reach_live_streams_and_skip_the_log() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":1,"metric":"dot"}"#).await;
    ok(c, r#"POST /v1/vector/v/add {"id":"x","vector":[1]}"#).await;
    let mut all = server.target.events("", None).await.unwrap();
    let mut searches = server.target.events("?types=vector_search,tick", None).await.unwrap();
    frame(&mut all).await;
    frame(&mut searches).await;
    ok(c, r#"POST /v1/vector/v/search {"vector":[1],"k":3}"#).await;
    assert_eq!(ok(c, r#"POST /v1/events {"type":"tick","data":1,"key":"k","ephemeral":true}"#).await["revision"], 2);
    let search = next(&mut searches).await;
    assert_eq!(search.id, Some(2));
    assert!(
        contains(&search.json().unwrap(), &json!({"type":"vector_search","collection":"v","k":3,"hits":1})),
        "{search:?}"
    );
    assert!(contains(&next(&mut searches).await.json().unwrap(), &json!({"type":"tick","key":"k","data":1})));
    assert_eq!(next(&mut all).await.event, "tick", "searches come only to streams that name them");
    let history =
        c.send("GET".parse().unwrap(), "/v1/events?since=0", &[("accept", "application/json")], "").await.unwrap();
    assert_eq!(history.json().unwrap()["events"].as_array().unwrap().len(), 2);
    // Whoever comes later, from however far back, has missed them, whether others with the same filter were there or not.
    ok(c, r#"PUT /v1/state/k {"value":1}"#).await;
    for query in ["?since=0", "?since=0&types=vector_added,state_updated,tick"] {
        let mut late = server.target.events(query, None).await.unwrap();
        frame(&mut late).await;
        let types = if query.contains("types") {
            &["vector_added", "state_updated"][..]
        } else {
            &["collection_created", "vector_added", "state_updated"]
        };
        for event in types {
            assert_eq!(next(&mut late).await.event, *event, "{query}");
        }
    }
}

/// After a restart nothing recent is in memory: whoever comes back reads the log first, and is connected all the same.
#[tokio::test]
async fn ephemeral_events_reach_a_stream_that_still_reads_the_log() {
    const EVENTS: u64 = 1000;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &[]);
    let c = &mut server.client();
    let op = json!({"op": "event", "type": "t", "data": "x".repeat(300)});
    ok(c, &format!("POST /v1/batch {}", json!({ "ops": vec![op; EVENTS as usize] }))).await;
    server.kill();
    let server = Server::start_in(dir.path(), &[]);
    let mut back = server.target.events("?since=1", None).await.unwrap();
    frame(&mut back).await;
    ok(&mut server.client(), r#"POST /v1/events {"type":"tick","ephemeral":true}"#).await;
    for revision in 2..=EVENTS {
        assert_eq!(next(&mut back).await.id, Some(revision));
    }
    assert_eq!(next(&mut back).await.event, "tick");
}

/// What passes a long poll by, however much it is, does not leave it behind.
#[tokio::test]
async fn a_long_poll_that_nothing_matches_keeps_up() {
    let server = Server::start(&["--max-log-mb", "1", "--snapshot-interval", "1"]);
    let c = &mut server.client();
    ok(c, r#"PUT /v1/state/first {"value":1}"#).await;
    let poll = |query: &'static str| {
        let mut client = server.client();
        tokio::spawn(async move {
            let answer =
                client.send("GET".parse().unwrap(), query, &[("accept", "application/json")], "").await.unwrap();
            assert_eq!(answer.status, 200, "{:?}", answer.json());
            answer.json().unwrap()
        })
    };
    let patient = poll("/v1/events?since=1&types=late&wait_ms=60000");
    let hasty = poll("/v1/events?since=1&types=never&wait_ms=3000");
    let begun = std::time::Instant::now();
    // More than the ring and the log hold, and until the hasty one is about to be answered.
    let value = "x".repeat(256 << 10);
    let (mut last, mut oldest) = (1, 1);
    while begun.elapsed().as_millis() < 2800 || last < 200 || oldest == 1 {
        let put = ok(c, &format!("PUT /v1/state/big{} {{\"value\":\"{value}\"}}", last % 4)).await;
        last = put["revision"].as_u64().unwrap();
        oldest = ok(c, "GET /v1/health").await["oldest"].as_u64().unwrap();
    }
    let page = hasty.await.unwrap();
    assert_eq!(page["events"], json!([]));
    let number = |name: &str| page[name].as_u64().unwrap();
    // Whoever writes slowly is still at it.
    assert!(number("next_since") > 1 && number("next_since") + 10 > number("head"), "{page}");
    ok(c, r#"POST /v1/events {"type":"late"}"#).await;
    let page = patient.await.unwrap();
    assert_eq!((&page["events"][0]["type"], &page["next_since"]), (&json!("late"), &json!(last + 1)), "{page}");
}

/// How often a stream had to read the log.
async fn ring_misses(c: &mut Client) -> u64 {
    let metrics = String::from_utf8(call(c, "GET /v1/metrics").await.body.to_vec()).unwrap();
    let misses = metrics.lines().find_map(|l| l.strip_prefix("kiss_stream_ring_misses_total ")).unwrap();
    misses.parse().unwrap()
}

#[tokio::test]
async fn a_slow_reader_falls_back_to_the_log_and_misses_nothing() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let mut slow = server.target.events("?since=0", None).await.unwrap();
    frame(&mut slow).await;
    // More than the socket buffers and the ring (16 MiB) hold.
    let value = "x".repeat(1 << 20);
    const EVENTS: u64 = 100;
    for n in 0..EVENTS {
        ok(c, &format!("PUT /v1/state/big{n} {{\"value\":\"{value}\"}}")).await;
    }
    for revision in 1..=EVENTS {
        assert_eq!(next(&mut slow).await.id, Some(revision));
    }
    assert!(ring_misses(c).await > 0, "it was to fall behind the ring");
}

#[tokio::test]
async fn a_batch_larger_than_the_ring_reaches_whoever_is_level_from_memory() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let mut level = server.target.events("", None).await.unwrap();
    frame(&mut level).await;
    // Each weighs twice its length: 20 MiB, where the ring holds 16.
    let value = "x".repeat(1 << 20);
    let ops: Vec<Value> = (0..10).map(|i| json!({"op": "put", "key": format!("big{i}"), "value": value})).collect();
    for round in 0..2 {
        ok(c, &format!("POST /v1/batch {}", json!({ "ops": ops }))).await;
        for revision in 1..=10 {
            assert_eq!(next(&mut level).await.id, Some(round * 10 + revision));
        }
    }
    assert_eq!(ring_misses(c).await, 0, "it was level all the time");
}

#[tokio::test]
async fn streams_that_come_back_together_from_far_behind_get_everything_once() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    // Of `a` there are more than a topic notes, of `b` fewer than one in what is looked through at a time.
    let key_of = |i: u64| match i {
        1 => "b",
        i if i.is_multiple_of(3) => "a",
        _ => "c",
    };
    for _ in 0..20 {
        let ops: Vec<Value> = (0..900).map(|i| json!({"op": "put", "key": key_of(i), "value": i})).collect();
        ok(c, &format!("POST /v1/batch {}", json!({ "ops": ops }))).await;
    }
    for key in ["a", "b", "c"] {
        // The topic begins at the head; then streams come from nearer and from further behind, while it goes on.
        let mut level = server.target.events(&format!("?key={key}"), None).await.unwrap();
        frame(&mut level).await;
        let mut streams = Vec::new();
        for since in [17_900, 9_000, 17_000, 1, 9_000, 899] {
            streams.push((since, server.target.events(&format!("?key={key}&since={since}"), None).await.unwrap()));
        }
        let last = ok(c, &format!(r#"PUT /v1/state/{key} {{"value":"last"}}"#)).await["revision"].as_u64().unwrap();
        for (since, stream) in &mut streams {
            let mut expected = (*since + 1..=18_000).filter(|revision| key_of((revision - 1) % 900) == key);
            loop {
                let id = next(stream).await.id.unwrap();
                if id > 18_000 {
                    assert_eq!((id, expected.next()), (last, None), "{key} since {since}");
                    break;
                }
                assert_eq!(Some(id), expected.next(), "{key} since {since}");
            }
        }
        assert_eq!(next(&mut level).await.id, Some(last));
    }
}

#[tokio::test]
async fn on_a_stop_streams_end_cleanly_and_clients_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &[]);
    ok(&mut server.client(), r#"PUT /v1/state/a {"value":1}"#).await;
    let mut streams = Vec::new();
    for query in ["", "?key=a", "?snapshot=true", "?since=0"] {
        streams.push(server.target.events(query, None).await.unwrap());
    }
    for stream in &mut streams {
        frame(stream).await;
    }
    assert_eq!(next(&mut streams[3]).await.id, Some(1));
    let started = std::time::Instant::now();
    server.signal(rustix::process::Signal::TERM);
    for stream in &mut streams {
        // The end of a chunked body, not a broken connection.
        while timeout(Duration::from_secs(5), stream.next_frame()).await.unwrap().expect("a clean end").is_some() {}
        assert!(stream.retry_ms().is_some_and(|ms| ms != 1000), "told when to come back");
    }
    assert!(server.stop(), "exit 0");
    assert!(started.elapsed() < Duration::from_secs(10), "it waited for what had ended");
    let server = Server::start_in(dir.path(), &[]);
    let mut stream = server.target.events("", streams[3].last_id()).await.unwrap();
    ok(&mut server.client(), r#"PUT /v1/state/b {"value":1}"#).await;
    assert_eq!(next(&mut stream).await.id, Some(2));
}

#[tokio::test]
async fn in_a_relaxed_mode_a_crash_loses_a_range_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &["--fsync", "never"]);
    ok(&mut server.client(), r#"PUT /v1/state/a {"value":1}"#).await;
    server.kill();
    let server = Server::start_in(dir.path(), &["--fsync", "never"]);
    let c = &mut server.client();
    let head = ok(c, "GET /v1/health").await["revision"].as_u64().unwrap();
    assert!(head > 1, "the revisions that may have been seen are given up");
    let mut stream = server.target.events("", Some(2)).await.unwrap();
    let reset = next(&mut stream).await;
    assert!(contains(&reset.json().unwrap(), &json!({"reason":"lost","requested":2,"head":head})), "{reset:?}");
    let answer =
        c.send("GET".parse().unwrap(), "/v1/events?since=2", &[("accept", "application/json")], "").await.unwrap();
    assert_eq!(answer.status, 410);
    // The head after the crash can be read and resumed from.
    let answer = c.send("GET".parse().unwrap(), "/v1/events", &[("accept", "application/json")], "").await.unwrap();
    assert_eq!(answer.json().unwrap()["next_since"], head);
    let mut at_head = server.target.events("", Some(head)).await.unwrap();
    assert_eq!(frame(&mut at_head).await.id, Some(head));
    // Whoever saw all that is there goes on without a word.
    let mut stream = server.target.events("", Some(1)).await.unwrap();
    assert_eq!(ok(c, r#"PUT /v1/state/b {"value":1}"#).await["revision"], head + 1);
    assert_eq!(next(&mut stream).await.id, Some(head + 1));
    // After an orderly stop nothing is given up.
    assert!(server.stop());
    let server = Server::start_in(dir.path(), &["--fsync", "always"]);
    assert_eq!(ok(&mut server.client(), "GET /v1/health").await["revision"], head + 1);
}

fn address(server: &Server) -> String {
    server.target.url().strip_prefix("http://").unwrap().to_owned()
}

async fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(address(server)).await.unwrap()
}

/// What comes until a text has come.
async fn until(stream: &mut TcpStream, text: &str) -> String {
    let mut said = Vec::new();
    let read = async {
        let mut at = 0;
        while memchr::memmem::find(&said[at..], text.as_bytes()).is_none() {
            at = said.len().saturating_sub(text.len());
            said.reserve(64 << 10);
            assert!(stream.read_buf(&mut said).await.unwrap() > 0, "it goes on");
        }
    };
    let in_time = timeout(Duration::from_secs(20), read).await;
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(in_time.is_ok(), "no {text:?} in {} bytes: {:.300}", said.len(), said);
    said
}

/// What a server sends to raw bytes, until it closes or is silent for a second.
async fn raw(server: &Server, request: &str) -> String {
    let mut socket = connect(server).await;
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while let Ok(Ok(1..)) = timeout(Duration::from_secs(1), socket.read_buf(&mut answer)).await {}
    String::from_utf8(answer).unwrap()
}

/// Taken for that of one who comes back, it would leave a client with changes to a state it has not seen.
#[tokio::test]
async fn an_empty_last_event_id_is_none() {
    let server = Server::start(&[]);
    ok(&mut server.client(), r#"PUT /v1/state/a {"value":1}"#).await;
    let begin = "GET /v1/events?since=1&snapshot=true HTTP/1.1\r\nhost: h\r\nlast-event-id:";
    for (id, has_snapshot) in [("", true), ("1", false)] {
        let answer = raw(&server, &format!("{begin}{id}\r\n\r\n")).await;
        assert!(answer.contains("retry: 1000"), "{answer}");
        assert_eq!(answer.contains("event: snapshot_end"), has_snapshot, "{answer}");
    }
}

#[tokio::test]
async fn a_stream_begins_behind_its_head_however_the_request_came() {
    let server = Server::start(&[]);
    ok(&mut server.client(), r#"PUT /v1/state/a {"value":1}"#).await;
    let frames = ["retry: 1000\nid: 0\n\n", "event: state_updated\nid: 1\ndata: {"];
    // Behind an answer on the same connection, even when both requests came in one packet.
    let get = "GET /v1/state/a HTTP/1.1\r\nhost: h\r\n\r\n";
    for before in ["", get] {
        let stream = format!("{before}GET /v1/events?since=0 HTTP/1.1\r\nhost: h\r\n\r\n");
        let answer = raw(&server, &stream).await;
        let (head, body) = answer.rsplit_once("\r\n\r\n13\r\n").unwrap();
        assert!(head.contains("transfer-encoding: chunked") && head.ends_with("GMT"), "{answer}");
        assert_eq!(head.matches("HTTP/1.1 200 OK").count(), if before.is_empty() { 1 } else { 2 }, "{answer}");
        let (first, rest) = body.split_once("\r\n").unwrap();
        assert_eq!(first, frames[0]);
        let (length, event) = rest.split_once("\r\n").unwrap();
        assert_eq!(usize::from_str_radix(length, 16).unwrap() + "\r\n".len(), event.len(), "{answer}");
        assert!(event.starts_with(frames[1]) && event.ends_with("}\n\n\r\n"), "{answer}");
    }
    // HTTP/1.0 knows no chunks.
    let answer = raw(&server, "GET /v1/events?since=0 HTTP/1.0\r\n\r\n").await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(!head.contains("transfer-encoding") && !head.contains("content-length"), "{answer}");
    assert!(body.starts_with(frames[0]) && body.contains(frames[1]), "{answer}");
    // A HEAD has no stream, and the connection goes on.
    let answer = raw(&server, &format!("HEAD /v1/events HTTP/1.1\r\nhost: h\r\n\r\n{get}")).await;
    assert!(answer.contains("text/event-stream") && answer.ends_with(r#""created_revision":1}"#), "{answer}");
    // A client that talks where it should listen is cut off.
    let noise = format!("GET /v1/events HTTP/1.1\r\nhost: h\r\n\r\n{}", "x".repeat(1 << 20));
    raw(&server, &noise).await;
    for _ in 0..100 {
        let metrics = server.client().send("GET".parse().unwrap(), "/v1/metrics", &[], "").await.unwrap();
        if String::from_utf8_lossy(&metrics.body).contains("kiss_streams 0.0") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("a stream is still there though its client has gone");
}
