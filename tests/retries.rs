//! `Idempotency-Key`: what would break is a client that lost an answer, asks again, and does it twice.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{BINARY, Duration, Server, call, ok};
use kiss_vdb::client::{Answer, Client};
use serde_json::json;

async fn send(c: &mut Client, key: &str, line: &str) -> Answer {
    let mut parts = line.splitn(3, ' ');
    let (method, path) = (parts.next().unwrap().parse().unwrap(), parts.next().unwrap());
    let headers = [("content-type", "application/json"), ("idempotency-key", key)];
    c.send(method, path, &headers, parts.next().unwrap_or_default().to_owned()).await.unwrap()
}

fn text(answer: &Answer) -> (u16, String, Option<String>) {
    let etag = answer.headers.get("etag").map(|v| v.to_str().unwrap().to_owned());
    (answer.status.as_u16(), String::from_utf8_lossy(&answer.body).into_owned(), etag)
}

/// Every kind of write; each is asked twice, then again after a kill and after an orderly restart.
#[tokio::test]
async fn the_same_request_gets_the_same_answer_and_happens_once_also_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start_in(dir.path(), &[]);
    let c = &mut server.client();
    for n in 0..4 {
        ok(c, &format!("PUT /v1/state/k{n} {{\"value\":{{\"n\":{n}}}}}")).await;
    }
    ok(c, r#"POST /v1/vector/docs {"dim":2,"metric":"l2"}"#).await;
    let items: Vec<_> =
        (0..30).map(|n| format!("{{\"id\":\"v{n}\",\"vector\":[{n},1],\"meta\":{{\"n\":{n}}}}}")).collect();
    ok(c, &format!("POST /v1/vector/docs/add {{\"items\":[{}]}}", items.join(","))).await;
    let lines = [
        r#"PUT /v1/state/new {"value":1,"ttl_ms":3600000}"#,
        r#"PUT /v1/state/k0 {"value":2,"if_revision":1}"#,
        r#"PATCH /v1/state/k1 {"m":1}"#,
        "DELETE /v1/state/k2",
        r#"POST /v1/events {"type":"log","data":1}"#,
        r#"POST /v1/batch {"ops":[{"op":"put","key":"b","value":1},{"op":"event","type":"log"},{"op":"delete","key":"k3"}]}"#,
        r#"POST /v1/vector/more {"dim":3,"metric":"dot"}"#,
        r#"POST /v1/vector/docs/add {"id":"one","vector":[1,2]}"#,
        r#"POST /v1/vector/docs/update {"id":"v1","meta":{"x":1}}"#,
        r#"POST /v1/vector/docs/upsert {"items":[{"id":"v2","vector":[9,9]}]}"#,
        r#"POST /v1/vector/docs/delete {"id":"v3"}"#,
        r#"POST /v1/vector/docs/delete {"ids":["v4","nope"]}"#,
        r#"POST /v1/vector/docs/delete {"filters":{"n":{"$gte":20}}}"#,
    ];
    let mut first = Vec::new();
    for (n, line) in lines.iter().enumerate() {
        let answer = send(c, &format!("key-{n}"), line).await;
        assert!(answer.status.is_success(), "{line}: {}", String::from_utf8_lossy(&answer.body));
        first.push(text(&answer));
    }
    let head = ok(c, "GET /v1/health").await["revision"].clone();
    for round in ["at once", "after a kill", "after a stop", "after a snapshot and a kill"] {
        let c = &mut server.client();
        for (n, line) in lines.iter().enumerate() {
            let again = text(&send(c, &format!("key-{n}"), line).await);
            assert_eq!(again, first[n], "{round}: {line}");
        }
        assert_eq!(ok(c, "GET /v1/health").await["revision"], head, "{round}: nothing happened twice");
        match round {
            "at once" => server.kill(),
            "after a kill" => assert!(server.stop()),
            "after a stop" => {
                ok(c, "POST /v1/admin/snapshot").await;
                server.kill();
            }
            _ => return,
        }
        server = Server::start_in(dir.path(), &[]);
    }
}

#[tokio::test]
async fn another_request_under_the_key_is_refused_and_a_refusal_is_not_remembered() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    assert_eq!(send(c, "k", r#"PUT /v1/state/a {"value":1}"#).await.status, 201);
    for other in [
        r#"PUT /v1/state/a {"value":2}"#,
        r#"PUT /v1/state/b {"value":1}"#,
        r#"POST /v1/events {"type":"log"}"#,
        "DELETE /v1/state/a",
    ] {
        let answer = send(c, "k", other).await;
        assert_eq!(answer.status, 422, "{other}");
        assert_eq!(answer.json().unwrap()["code"], "idempotency_key_reused");
    }
    // Refused the first time, asked anew the second: by then it may be done.
    assert_eq!(send(c, "r", r#"PUT /v1/state/c {"value":1,"if_revision":7}"#).await.status, 409);
    ok(c, r#"PUT /v1/state/a {"value":1}"#).await;
    assert_eq!(send(c, "r", r#"PUT /v1/state/c {"value":1,"if_revision":0}"#).await.status, 201);
    for bad in ["", "x".repeat(256).as_str()] {
        assert_eq!(send(c, bad, r#"PUT /v1/state/a {"value":1}"#).await.status, 400, "{bad:?}");
    }
    let answer = send(c, "e", r#"POST /v1/events {"type":"log","ephemeral":true}"#).await;
    assert_eq!(answer.status, 400, "what is not logged cannot be remembered");
}

/// What was made may be gone, or full, when its client asks again.
#[tokio::test]
async fn the_answer_to_making_a_collection_outlives_it() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let line = r#"POST /v1/vector/short {"dim":2,"metric":"l2"}"#;
    let first = text(&send(c, "c", line).await);
    ok(c, r#"POST /v1/vector/short/add {"id":"a","vector":[1,2]}"#).await;
    assert_eq!(text(&send(c, "c", line).await), first, "while it holds something");
    ok(c, "DELETE /v1/vector/short").await;
    assert_eq!(text(&send(c, "c", line).await), first, "and when it is gone");
}

/// Many at once under one key, in one batch or in several: one of them happens.
#[tokio::test]
async fn a_key_used_by_many_at_once_counts_once() {
    let server = Server::start(&[]);
    let mut tasks = Vec::new();
    for n in 0..64 {
        let mut c = server.client();
        tasks.push(tokio::spawn(async move {
            let key = format!("k{}", n % 4);
            text(&send(&mut c, &key, r#"POST /v1/events {"type":"log"}"#).await)
        }));
    }
    let mut answers = std::collections::BTreeSet::new();
    for task in tasks {
        answers.insert(task.await.unwrap());
    }
    assert_eq!(answers.len(), 4, "{answers:?}");
    assert_eq!(ok(&mut server.client(), "GET /v1/health").await["revision"], 4);
}

/// Two senders who choose the same key do not meet.
#[tokio::test]
async fn keys_for_retries_belong_to_their_sender() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.toml");
    let secrets = ["one", "two"].map(|name| {
        let output = std::process::Command::new(BINARY).args(["keys", "create", name, "--file"]).arg(&file).output();
        String::from_utf8(output.unwrap().stdout).unwrap().trim().to_owned()
    });
    let server = Server::start_in(&dir.path().join("data"), &["--keys-file", file.to_str().unwrap()]);
    for (n, secret) in secrets.into_iter().enumerate() {
        let target = kiss_vdb::client::Target::new(&server.target.url(), Some(secret)).unwrap();
        let answer = send(&mut Client::new(&target), "k", r#"POST /v1/events {"type":"log"}"#).await;
        assert_eq!(answer.json().unwrap(), json!({"revision": n + 1}));
    }
}

/// A client whose connection breaks after it has sent a request knows nothing; asking again tells.
#[tokio::test]
async fn a_client_that_lost_the_answer_learns_it() {
    use tokio::io::AsyncWriteExt;
    let server = Server::start(&[]);
    let body = r#"{"value":1,"if_revision":0}"#;
    let head = "PUT /v1/state/a HTTP/1.1\r\nhost: h\r\nidempotency-key: once\r\ncontent-type: application/json\r\n";
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let authority = server.target.url().strip_prefix("http://").unwrap().to_owned();
    let mut socket = tokio::net::TcpStream::connect(authority).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    drop(socket);
    let c = &mut server.client();
    for _ in 0..200 {
        if call(c, "GET /v1/state/a").await.status == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let answer = send(c, "once", &format!("PUT /v1/state/a {body}")).await;
    assert_eq!(text(&answer), (201, r#"{"key":"a","revision":1,"created":true}"#.into(), Some("\"1\"".into())));
    assert_eq!(call(c, &format!("PUT /v1/state/a {body}")).await.status, 409, "without the key it is another request");
}
