//! The contract over HTTP, a table for each endpoint: what would break is a client that relies on it.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Server, call, contains, ok};
use kiss_vdb::client::Client;
use serde_json::{Value, json};

/// One request and what must come back: status, and a part of the JSON body.
struct Row(&'static str, String, u16, Value);

fn row(name: &'static str, line: impl Into<String>, status: u16, part: Value) -> Row {
    Row(name, line.into(), status, part)
}

async fn check(client: &mut Client, rows: Vec<Row>) {
    for Row(name, line, status, part) in rows {
        let answer = call(client, &line).await;
        let body = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status.as_u16(), status, "{name}: {} -> {body}", shown(&line));
        if part.is_null() {
            continue;
        }
        let value = answer.json().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(contains(&value, &part), "{name}: {} -> {body}\nexpected {part}", shown(&line));
        if status >= 400 {
            assert_eq!(answer.headers["content-type"], "application/problem+json", "{name}");
            for member in ["type", "title", "status", "detail", "code"] {
                assert!(value.get(member).is_some(), "{name}: no {member} in {body}");
            }
        }
    }
}

fn shown(line: &str) -> String {
    line.chars().take(200).collect()
}

fn code(code: &str) -> Value {
    json!({ "code": code })
}

#[tokio::test]
async fn state_put_get_delete() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let bad = || code("invalid_argument");
    let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
    check(
        c,
        vec![
            row(
                "create",
                r#"PUT /v1/state/a {"value":{"n":1.0}}"#,
                201,
                json!({"key":"a","revision":1,"created":true}),
            ),
            row("replace", r#"PUT /v1/state/a {"value":[1, 2]}"#, 200, json!({"key":"a","revision":2,"created":false})),
            row("get", "GET /v1/state/a", 200, json!({"key":"a","value":[1,2],"revision":2,"created_revision":1})),
            row("null is a value", r#"PUT /v1/state/null {"value":null}"#, 201, json!({"revision":3})),
            row("null comes back", "GET /v1/state/null", 200, json!({"value":null})),
            row("slash and percent", r#"PUT /v1/state/x/y%20%C3%A9 {"value":1}"#, 201, json!({"key":"x/y é"})),
            row("same key, other escapes", "GET /v1/state/x%2Fy%20%c3%a9", 200, json!({"key":"x/y é"})),
            row("leading slash is part of the key", r#"PUT /v1/state//v1 {"value":1}"#, 201, json!({"key":"/v1"})),
            row("absent", "GET /v1/state/nope", 404, code("key_not_found")),
            row("delete absent", "DELETE /v1/state/nope", 404, code("key_not_found")),
            row("delete", "DELETE /v1/state/null", 200, json!({"key":"null","revision":6,"deleted":true})),
            row("deleted", "GET /v1/state/null", 404, code("key_not_found")),
            row("typo", r#"PUT /v1/state/a {"value":1,"ttl":5}"#, 400, bad()),
            row("typo in the query", r#"PUT /v1/state/a?ttl=5 {"value":1}"#, 400, bad()),
            row("typo in meta", r#"PUT /v1/state/a {"value":1,"meta":{"job":"x"}}"#, 400, bad()),
            row("no value", r#"PUT /v1/state/a {}"#, 400, bad()),
            row("not JSON", r#"PUT /v1/state/a {"value":"#, 400, bad()),
            row("empty body", "PUT /v1/state/a", 400, json!({"detail":"the body is empty; this route takes JSON"})),
            row("an array is no object", r#"PUT /v1/state/a [5,null,null,null]"#, 400, bad()),
            row("nor is it for meta", r#"PUT /v1/state/a {"value":1,"meta":["j",["t"]]}"#, 400, bad()),
            row("half a surrogate pair", r#"PUT /v1/state/a {"value":"\ud800"}"#, 400, bad()),
            row("two documents", r#"PUT /v1/state/a {"value":1} {"value":2}"#, 400, bad()),
            row("wrong type", r#"PUT /v1/state/a {"value":1,"ttl_ms":"5"}"#, 400, bad()),
            row(
                "negative ttl",
                r#"PUT /v1/state/a {"value":1,"ttl_ms":-1}"#,
                400,
                json!({"detail":"the body is not what this route takes: ttl_ms: invalid value: integer `-1`, expected a whole number from 0 at line 1 column 22"}),
            ),
            row("empty cursor", "GET /v1/state?cursor=&limit=1", 200, json!({"items":[{"key":"/v1"}]})),
            row("zero ttl", r#"PUT /v1/state/a {"value":1,"ttl_ms":0}"#, 400, bad()),
            row("longest ttl", r#"PUT /v1/state/ttl {"value":1,"ttl_ms":3155760000000}"#, 201, Value::Null),
            row("longer ttl", r#"PUT /v1/state/ttl {"value":1,"ttl_ms":3155760000001}"#, 400, bad()),
            row("huge ttl", r#"PUT /v1/state/ttl {"value":1,"ttl_ms":18446744073709551615}"#, 400, bad()),
            row("deepest", format!("PUT /v1/state/deep {{\"value\":{}}}", nested(127)), 201, Value::Null),
            row("deeper", format!("PUT /v1/state/deep {{\"value\":{}}}", nested(128)), 400, bad()),
            row("JSON bomb", format!("PUT /v1/state/deep {{\"value\":{}}}", nested(100_000)), 400, bad()),
            row("longest key", format!("PUT /v1/state/{} {{\"value\":1}}", "k".repeat(1024)), 201, Value::Null),
            row("longer key", format!("PUT /v1/state/{} {{\"value\":1}}", "k".repeat(1025)), 400, bad()),
            row("no key", "PUT /v1/state/ {\"value\":1}", 400, bad()),
            row("no key to read", "GET /v1/state/", 400, bad()),
            row("no key by another method", "POST /v1/state/ {}", 405, code("method_not_allowed")),
            row("control character", r#"PUT /v1/state/a%0Ab {"value":1}"#, 400, bad()),
            row("not UTF-8", r#"PUT /v1/state/a%FF {"value":1}"#, 400, bad()),
            row("bad raw flag", "GET /v1/state/a?raw=maybe", 400, bad()),
            row("unknown route", "GET /v1/stat", 404, code("route_not_found")),
            row("wrong method", "POST /v1/state/a {}", 405, code("method_not_allowed")),
        ],
    )
    .await;
    let answer = call(c, "POST /v1/state/a {}").await;
    assert!(answer.headers["allow"].to_str().unwrap().contains("PATCH"));
}

#[tokio::test]
async fn values_come_back_as_they_were_sent() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    for literal in
        ["1.0", "1e400", "-0", "12345678901234567890123", "0.10", "\"\\u00e9\\n\"", "{\"b\":1,\"a\":2,\"b\":3}"]
    {
        ok(c, &format!("PUT /v1/state/n {{\"value\":{literal}}}")).await;
        let raw = call(c, "GET /v1/state/n?raw=true").await;
        assert_eq!(raw.body, literal, "raw");
        assert_eq!(raw.headers["content-type"], "application/json");
        let whole = call(c, "GET /v1/state/n").await;
        assert!(String::from_utf8_lossy(&whole.body).contains(&format!("\"value\":{literal},")), "{literal}");
    }
    let answer = c
        .send(
            "PUT".parse().unwrap(),
            "/v1/state/b?ttl_ms=60000&job_id=7&tag=x&tag=y",
            &[("content-type", "image/png")],
            "\u{0}png",
        )
        .await
        .unwrap();
    assert_eq!(answer.status, 201);
    let entry = ok(c, "GET /v1/state/b").await;
    assert!(
        contains(
            &entry,
            &json!({"value_base64":"AHBuZw==","content_type":"image/png","meta":{"job_id":"7","tags":["x","y"]}})
        ),
        "{entry}"
    );
    assert!(entry["expires_at_ms"].as_u64().unwrap() > 1_700_000_000_000);
    let raw = call(c, "GET /v1/state/b?raw=true").await;
    assert_eq!((raw.headers["content-type"].to_str().unwrap(), &raw.body[..]), ("image/png", &b"\0png"[..]));
}

#[tokio::test]
async fn conditions_by_body_query_and_header() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    check(
        c,
        vec![
            row("only if absent", r#"PUT /v1/state/a {"value":1,"if_revision":0}"#, 201, json!({"revision":1})),
            row(
                "it is there",
                r#"PUT /v1/state/a {"value":2,"if_revision":0}"#,
                409,
                json!({"code":"revision_conflict","expected":0,"actual":1}),
            ),
            row(
                "it is not",
                r#"PUT /v1/state/b {"value":2,"if_revision":9}"#,
                409,
                json!({"code":"revision_conflict","expected":9,"actual":0}),
            ),
            row("swap", r#"PUT /v1/state/a {"value":2,"if_revision":1}"#, 200, json!({"revision":2})),
            row(
                "swap too late",
                r#"PUT /v1/state/a {"value":3,"if_revision":1}"#,
                409,
                json!({"expected":1,"actual":2}),
            ),
            row("patch conflict", r#"PATCH /v1/state/a?if_revision=1 {"x":1}"#, 409, code("revision_conflict")),
            row("delete conflict", "DELETE /v1/state/a?if_revision=1", 409, json!({"expected":1,"actual":2})),
            row("delete absent with a condition", "DELETE /v1/state/zz?if_revision=1", 404, code("key_not_found")),
            row("bad revision", "DELETE /v1/state/a?if_revision=x", 400, code("invalid_argument")),
            row(
                "a condition in the body",
                r#"DELETE /v1/state/a {"if_revision":1}"#,
                409,
                json!({"expected":1,"actual":2}),
            ),
            row("a typo in it", r#"DELETE /v1/state/a {"if_rev":1}"#, 400, code("invalid_argument")),
            row(
                "two conditions",
                r#"DELETE /v1/state/a?if_revision=2 {"if_revision":2}"#,
                400,
                code("invalid_argument"),
            ),
            row("refused ones took no revision", r#"PUT /v1/state/c {"value":1}"#, 201, json!({"revision":3})),
        ],
    )
    .await;
    for (name, method, header, value, status) in [
        ("get, unchanged", "GET", "if-none-match", "\"2\"", 304),
        ("get, in a list", "GET", "if-none-match", "\"9\", W/\"2\"", 304),
        ("get, any", "GET", "if-none-match", "*", 304),
        ("get, changed", "GET", "if-none-match", "\"1\"", 200),
        ("get, this one", "GET", "if-match", "\"1\", \"2\"", 200),
        ("get, another", "GET", "if-match", "\"1\"", 412),
        ("put, any exists", "PUT", "if-none-match", "*", 412),
        ("put, other", "PUT", "if-match", "\"1\"", 412),
        ("put, not one of ours", "PUT", "if-match", "\"abc\"", 412),
        ("put, this one", "PUT", "if-match", "\"2\"", 200),
        ("delete, other", "DELETE", "if-match", "\"2\"", 412),
        ("delete, this one", "DELETE", "if-match", "\"4\"", 200),
        ("put, none exists", "PUT", "if-match", "*", 412),
        ("put, create", "PUT", "if-none-match", "*", 201),
    ] {
        let body = if method == "PUT" { "{\"value\":1}" } else { "" };
        let headers = [("content-type", "application/json"), (header, value)];
        let answer = c.send(method.parse().unwrap(), "/v1/state/a", &headers, body).await.unwrap();
        assert_eq!(answer.status.as_u16(), status, "{name}");
        if status == 304 || status == 200 && method == "GET" {
            assert_eq!(answer.headers["etag"], "\"2\"", "{name}");
            assert_eq!(answer.headers.contains_key("content-type"), status == 200, "{name}");
        }
        if status == 412 {
            assert_eq!(answer.json().unwrap()["code"], "precondition_failed", "{name}");
        }
    }
}

#[tokio::test]
async fn patch_merges_inside_the_commit() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    check(
        c,
        vec![
            row(
                "creates",
                r#"PATCH /v1/state/j {"a":{"b":1.50,"x":null}}"#,
                201,
                json!({"created":true,"value":{"a":{"b":1.5}}}),
            ),
            row(
                "merges",
                r#"PATCH /v1/state/j {"a":{"c":2},"d":3}"#,
                200,
                json!({"value":{"a":{"b":1.5,"c":2},"d":3}}),
            ),
            row("removes", r#"PATCH /v1/state/j {"a":null}"#, 200, json!({"value":{"d":3}})),
            row("replaces", r#"PATCH /v1/state/j [1]"#, 200, json!({"value":[1]})),
            row("not JSON", "PATCH /v1/state/j {", 400, code("invalid_argument")),
            row("unknown query", r#"PATCH /v1/state/j?x=1 {}"#, 400, code("invalid_argument")),
            row("ttl", r#"PATCH /v1/state/t?ttl_ms=100000 {"a":1}"#, 201, Value::Null),
            row("keeps the ttl", r#"PATCH /v1/state/t {"a":2}"#, 200, Value::Null),
        ],
    )
    .await;
    assert!(ok(c, "GET /v1/state/t").await["expires_at_ms"].is_u64());
    ok(c, r#"PUT /v1/state/t {"value":1}"#).await;
    assert!(ok(c, "GET /v1/state/t").await.get("expires_at_ms").is_none(), "a PUT without ttl_ms clears it");
    let merge = [("content-type", "application/merge-patch+json")];
    assert_eq!(c.send("PATCH".parse().unwrap(), "/v1/state/j", &merge, "{}").await.unwrap().status, 200);
    let text = [("content-type", "text/plain")];
    assert_eq!(c.send("PATCH".parse().unwrap(), "/v1/state/j", &text, "{}").await.unwrap().status, 415);
    assert_eq!(c.send("PUT".parse().unwrap(), "/v1/state/bytes", &text, "x").await.unwrap().status, 201);
    assert_eq!(call(c, r#"PATCH /v1/state/bytes {"a":1}"#).await.status, 400, "bytes cannot be merged");

    // What comes of it can be patched again, and put as it was read.
    let long = |field: &str, bytes| format!("PATCH /v1/state/long {{\"{field}\":\"{}\"}}", "x".repeat(bytes));
    ok(c, &long("a", 3 << 20)).await;
    let answer = call(c, &long("b", 3 << 20)).await;
    assert_eq!((answer.status.as_u16(), answer.json().unwrap()["limit_bytes"].as_u64()), (413, Some(4 << 20)));
    assert_eq!(ok(c, r#"PATCH /v1/state/long {"a":null}"#).await["value"], json!({}));
    let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
    assert_eq!(call(c, &format!("PATCH /v1/state/deep {}", nested(128))).await.status, 400);
    assert_eq!(call(c, &format!("PATCH /v1/state/deep {}", nested(127))).await.status, 201);
    assert_eq!(call(c, &format!("PUT /v1/state/deep {{\"value\":{}}}", nested(127))).await.status, 200);

    // Concurrent patches of different fields: none may lose another's.
    let tasks: Vec<_> = (0..8)
        .map(|n| {
            let target = server.target.clone();
            tokio::spawn(async move {
                let mut c = Client::new(&target);
                for i in 0..50 {
                    ok(&mut c, &format!("PATCH /v1/state/shared {{\"f{n}_{i}\":{i}}}")).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(ok(c, "GET /v1/state/shared").await["value"].as_object().unwrap().len(), 400);
}

#[tokio::test]
async fn listing_pages_by_key_bytes() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    for key in ["a/1", "a/2", "a/3", "b", "é", "z"] {
        ok(c, &format!("PUT /v1/state/{} {{\"value\":\"{key}\"}}", key.replace('é', "%C3%A9"))).await;
    }
    let all = ok(c, "GET /v1/state").await;
    let keys: Vec<_> = all["items"].as_array().unwrap().iter().map(|e| e["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!(keys, ["a/1", "a/2", "a/3", "b", "z", "é"]);
    assert!(all["next_cursor"].is_null());
    assert_eq!(all["revision"], 6);
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = ok(c, &format!("GET /v1/state?limit=2&prefix=a/{cursor}")).await;
        seen.extend(page["items"].as_array().unwrap().iter().map(|e| e["key"].as_str().unwrap().to_owned()));
        // What comes and goes beside the walk must not disturb it.
        ok(c, "DELETE /v1/state/b").await;
        ok(c, r#"PUT /v1/state/b {"value":1}"#).await;
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, ["a/1", "a/2", "a/3"]);
    let keys_only = ok(c, "GET /v1/state?keys_only=true&limit=1").await;
    assert!(keys_only["items"][0].get("value").is_none());
    // Behind all keys that begin with the longest there may be, and further than that.
    let behind = format!("GET /v1/state?cursor={}", "enp6".repeat(1032 / 3));
    check(
        c,
        vec![
            row("limit 0", "GET /v1/state?limit=0", 400, code("invalid_argument")),
            row("limit too large", "GET /v1/state?limit=1001", 400, code("invalid_argument")),
            row("bad cursor", "GET /v1/state?cursor=%25", 400, code("invalid_argument")),
            row("behind a longest key", &behind, 200, json!({"next_cursor":null})),
            row("too long a cursor", format!("{behind}eg"), 400, code("invalid_argument")),
            row("twice", "GET /v1/state?limit=1&limit=2", 400, code("invalid_argument")),
            row("unknown", "GET /v1/state?pre=a", 400, code("invalid_argument")),
            row("empty page", "GET /v1/state?prefix=nothing", 200, json!({"items":[],"next_cursor":null})),
        ],
    )
    .await;
}

#[tokio::test]
async fn keys_expire_for_every_read_at_once_and_as_an_event() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let mut stream = server.target.events("?prefix=t", None).await.unwrap();
    let put = ok(c, r#"PUT /v1/state/t1 {"value":1,"ttl_ms":300,"meta":{"job_id":"j"}}"#).await;
    ok(c, r#"PUT /v1/state/t2 {"value":1,"ttl_ms":300}"#).await;
    let deadline = put["expires_at_ms"].as_u64().unwrap();
    stream.next_event().await.unwrap();
    stream.next_event().await.unwrap();
    for _ in 0..2 {
        let event =
            common::timeout(common::Duration::from_secs(10), stream.next_event()).await.unwrap().unwrap().unwrap();
        let data = event.json().unwrap();
        assert!(contains(&data, &json!({"type":"state_deleted","reason":"expired"})), "{data}");
        let late_ms = data["ts"].as_f64().unwrap() * 1000.0 - deadline as f64;
        assert!((-0.001..2000.0).contains(&late_ms), "{late_ms} ms after the deadline");
    }
    assert_eq!(call(c, "GET /v1/state/t1").await.status, 404);
    assert_eq!(ok(c, "GET /v1/state").await["items"].as_array().unwrap().len(), 0);
    // A key written again in time lives on; one written after its deadline is new.
    let first = ok(c, r#"PUT /v1/state/t1 {"value":1,"ttl_ms":1}"#).await;
    assert_eq!(first["created"], true);
    ok(c, r#"PUT /v1/state/t3 {"value":1,"ttl_ms":200}"#).await;
    ok(c, r#"PUT /v1/state/t3 {"value":2}"#).await;
    while call(c, "GET /v1/state/t1").await.status == 200 {}
    let put = ok(c, r#"PUT /v1/state/t1 {"value":1,"if_revision":0}"#).await;
    assert_eq!(put["created"], true);
    loop {
        let event = stream.next_event().await.unwrap().unwrap().json().unwrap();
        if event["key"] == "t1" && event["type"] == "state_updated" && event["revision"] == put["revision"] {
            assert_eq!(event["prev_revision"], 0, "created anew: {event}");
            break;
        }
    }
    tokio::time::sleep(common::Duration::from_millis(300)).await;
    assert_eq!(ok(c, "GET /v1/state/t3").await["value"], 2, "a cleared deadline must not fire");
}

#[tokio::test]
async fn batches_are_all_or_nothing() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":2,"metric":"l2"}"#).await;
    let answer = ok(
        c,
        r#"POST /v1/batch {"ops":[
            {"op":"put","key":"a","value":null,"meta":{"job_id":"j"}},
            {"op":"patch","key":"a","patch":{"x":1}},
            {"op":"put","key":"b","value_base64":"aGk=","content_type":"text/plain","ttl_ms":60000},
            {"op":"delete","key":"b"},
            {"op":"event","type":"log","data":[1],"key":"a"},
            {"op":"vector_add","collection":"v","id":"1","vector":[1,2],"meta":{"n":1}},
            {"op":"vector_update","collection":"v","id":"1","meta":{"m":2}},
            {"op":"vector_upsert","collection":"v","id":"2","vector_base64":"AACAPwAAAEA="},
            {"op":"vector_delete","collection":"v","id":"2","if_revision":9}
        ]}"#,
    )
    .await;
    assert!(contains(&answer, &json!({"first_revision":2,"last_revision":10})), "{answer}");
    assert_eq!(answer["results"].as_array().unwrap().len(), 9);
    assert_eq!(answer["results"][1]["value"], json!({"x":1}));
    assert_eq!(
        ok(c, "GET /v1/vector/v/get?id=1").await,
        json!({"id":"1","vector":[1.0,2.0],"meta":{"n":1,"m":2},"revision":8})
    );
    let many = |n: usize| {
        let ops: Vec<String> = (0..n).map(|i| format!("{{\"op\":\"put\",\"key\":\"m{i}\",\"value\":{i}}}")).collect();
        format!("POST /v1/batch {{\"ops\":[{}]}}", ops.join(","))
    };
    let deep = |n: usize| {
        let value = format!("{}{}", "[".repeat(n), "]".repeat(n));
        let meta = format!("{}1{}", "{\"a\":".repeat(127), "}".repeat(127));
        format!(
            "POST /v1/batch {{\"ops\":[{{\"op\":\"put\",\"key\":\"d\",\"value\":{value}}},{{\"op\":\"vector_upsert\",\"collection\":\"v\",\"id\":\"d\",\"vector\":[1,2],\"meta\":{meta}}}]}}"
        )
    };
    let single = |n: usize| {
        let meta = format!("{}1{}", "{\"a\":".repeat(n), "}".repeat(n));
        format!("POST /v1/vector/v/upsert {{\"id\":\"d\",\"vector\":[1,2],\"meta\":{meta}}}")
    };
    check(c, vec![
        row("a refused op refuses all", r#"POST /v1/batch {"ops":[{"op":"put","key":"x","value":1},{"op":"put","key":"a","value":1,"if_revision":1}]}"#, 409, json!({"code":"revision_conflict","op":1,"expected":1,"actual":3})),
        row("and leaves nothing", "GET /v1/state/x", 404, Value::Null),
        row("later ops see earlier ones", r#"POST /v1/batch {"ops":[{"op":"put","key":"y","value":1},{"op":"put","key":"y","value":2,"if_revision":0}]}"#, 409, json!({"op":1,"expected":0,"actual":0,
            "detail":"operation 1: expected revision 0, but an earlier operation of this request changes it; before, it is 0 (0 = absent)"})),
        row("also what was deleted", r#"POST /v1/batch {"ops":[{"op":"delete","key":"a"},{"op":"put","key":"a","value":2,"if_revision":3}]}"#, 409, json!({"op":1,"expected":3,"actual":3})),
        row("also a vector", r#"POST /v1/batch {"ops":[{"op":"vector_delete","collection":"v","id":"1"},{"op":"vector_upsert","collection":"v","id":"1","vector":[1,2],"if_revision":8}]}"#, 409, json!({"op":1,"expected":8,"actual":8})),
        row("but name no revision of their own", r#"POST /v1/batch {"ops":[{"op":"vector_update","collection":"v","id":"1","meta":{}},{"op":"vector_update","collection":"v","id":"1","meta":{},"if_revision":1}]}"#, 409, json!({"op":1,"actual":8})),
        row("deleted within", r#"POST /v1/batch {"ops":[{"op":"delete","key":"a"},{"op":"delete","key":"a"}]}"#, 404, json!({"code":"key_not_found","op":1})),
        row("unknown op", r#"POST /v1/batch {"ops":[{"op":"incr","key":"a"}]}"#, 400, json!({"op":0})),
        row("foreign field", r#"POST /v1/batch {"ops":[{"op":"delete","key":"a","value":1}]}"#, 400, json!({"op":0})),
        row("unknown field", r#"POST /v1/batch {"ops":[{"op":"delete","key":"z"},{"op":"delete","key":"a","ttl":1}]}"#, 400, json!({"code":"invalid_argument","op":1})),
        row("absent whatever the condition", r#"POST /v1/batch {"ops":[{"op":"vector_update","collection":"v","id":"none","meta":{},"if_revision":7}]}"#, 404, code("vector_not_found")),
        row("there whatever the condition", r#"POST /v1/batch {"ops":[{"op":"vector_add","collection":"v","id":"1","vector":[1,2],"if_revision":0}]}"#, 409, code("already_exists")),
        row("no operation", r#"POST /v1/batch {"ops":[{"op":"delete","key":"z"},null]}"#, 400, json!({"code":"invalid_argument","op":1})),
        row("bad key", r#"POST /v1/batch {"ops":[{"op":"put","key":"ok","value":1},{"op":"put","key":"","value":1}]}"#, 400, json!({"op":1})),
        row("wrong dimension", r#"POST /v1/batch {"ops":[{"op":"vector_add","collection":"v","id":"q","vector":[1]}]}"#, 400, json!({"code":"dimension_mismatch","expected":2,"got":1,"op":0})),
        row("an empty content type", r#"POST /v1/batch {"ops":[{"op":"put","key":"q","value_base64":"","content_type":""}]}"#, 400, json!({"op":0})),
        row("one that is no header", r#"POST /v1/batch {"ops":[{"op":"put","key":"q","value_base64":"","content_type":"text/é"}]}"#, 400, json!({"op":0})),
        row("as deep as a PUT takes", deep(127), 200, Value::Null),
        row("deeper", deep(128), 400, code("invalid_argument")),
        row("metadata as deep", single(127), 200, Value::Null),
        row("metadata deeper", single(128), 400, json!({"detail":"JSON may nest at most 127 deep here"})),
        row("empty", r#"POST /v1/batch {"ops":[]}"#, 400, code("invalid_argument")),
        row("not an object", r#"POST /v1/batch [[{"op":"delete","key":"a"}]]"#, 400, code("invalid_argument")),
        row("largest", many(1000), 200, Value::Null),
        row("larger", many(1001), 400, code("invalid_argument")),
        row("untouched", "GET /v1/state/a", 200, json!({"value":{"x":1}})),
    ]).await;
}

#[tokio::test]
async fn bodies_have_limits_and_types() {
    let server = Server::start(&["--max-body-mb", "1"]);
    let c = &mut server.client();
    let fits = format!("PUT /v1/state/big {{\"value\":\"{}\"}}", "x".repeat((1 << 20) - 12));
    assert_eq!(call(c, &fits).await.status, 201);
    let large = format!("PUT /v1/state/big {{\"value\":\"{}\"}}", "x".repeat(1 << 20));
    let answer = call(&mut server.client(), &large).await;
    assert_eq!(answer.status, 413);
    assert!(contains(&answer.json().unwrap(), &json!({"code":"payload_too_large","limit_bytes":1 << 20})));
    for (method, path) in
        [("POST", "/v1/batch"), ("POST", "/v1/events"), ("POST", "/v1/vector/v"), ("POST", "/v1/vector/v/search")]
    {
        let form = [("content-type", "application/x-www-form-urlencoded")];
        let answer = c.send(method.parse().unwrap(), path, &form, "{}").await.unwrap();
        assert_eq!(answer.status, 415, "{path}");
        assert_eq!(answer.json().unwrap()["code"], "unsupported_media_type");
        let no_type = c.send(method.parse().unwrap(), path, &[], "{").await.unwrap();
        assert_eq!(no_type.status, 400, "{path}: no type means JSON");
    }
    // Stored as it came, it would be read as something else than what was sent.
    let gzip = [("content-type", "text/plain"), ("content-encoding", "gzip")];
    let answer = c.send("PUT".parse().unwrap(), "/v1/state/packed", &gzip, "x").await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.headers["accept-encoding"].to_str().unwrap()), (415, "identity"));
    let identity = [("content-type", "text/plain"), ("content-encoding", "identity")];
    assert_eq!(c.send("PUT".parse().unwrap(), "/v1/state/packed", &identity, "x").await.unwrap().status, 201);
}

#[tokio::test]
async fn vectors_write_and_read() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let bad = || code("invalid_argument");
    check(c, vec![
        row("create", r#"POST /v1/vector/c {"dim":2,"metric":"cosine"}"#, 201, json!({"collection":"c","dim":2,"metric":"cosine","count":0})),
        row("again", r#"POST /v1/vector/c {"dim":2,"metric":"cosine"}"#, 200, Value::Null),
        row("another dim", r#"POST /v1/vector/c {"dim":3,"metric":"cosine"}"#, 409, code("already_exists")),
        row("another metric", r#"POST /v1/vector/c {"dim":2,"metric":"dot"}"#, 409, code("already_exists")),
        row("bad metric", r#"POST /v1/vector/d {"dim":2,"metric":"cos"}"#, 400, bad()),
        row("dim 0", r#"POST /v1/vector/d {"dim":0,"metric":"dot"}"#, 400, bad()),
        row("dim too large", r#"POST /v1/vector/d {"dim":8193,"metric":"dot"}"#, 400, bad()),
        row("bad name", r#"POST /v1/vector/-d {"dim":2,"metric":"dot"}"#, 400, bad()),
        row("long name", format!("POST /v1/vector/{} {{\"dim\":2,\"metric\":\"dot\"}}", "n".repeat(65)), 400, bad()),
        row("add", r#"POST /v1/vector/c/add {"id":"a","vector":[3,4],"meta":{"lang":"es"}}"#, 200, json!({"id":"a","revision":2,"created":true})),
        row("add again", r#"POST /v1/vector/c/add {"id":"a","vector":[3,4]}"#, 409, code("already_exists")),
        row("upsert", r#"POST /v1/vector/c/upsert {"id":"a","vector":[0.1,-0.2],"meta":{"n":1}}"#, 200, json!({"created":false,"revision":3})),
        row("get what was sent", "GET /v1/vector/c/get?id=a", 200, json!({"id":"a","vector":[0.1,-0.2],"meta":{"n":1},"revision":3})),
        row("update meta", r#"POST /v1/vector/c/update {"id":"a","meta":{"n":null,"m":2}}"#, 200, json!({"revision":4})),
        row("merged", "GET /v1/vector/c/get?id=a", 200, json!({"vector":[0.1,-0.2],"meta":{"m":2}})),
        row("update vector", r#"POST /v1/vector/c/update {"id":"a","vector":[1,0],"if_revision":4}"#, 200, json!({"revision":5})),
        row("update conflict", r#"POST /v1/vector/c/update {"id":"a","vector":[1,0],"if_revision":4}"#, 409, json!({"expected":4,"actual":5})),
        row("update absent", r#"POST /v1/vector/c/update {"id":"zz","vector":[1,0]}"#, 404, code("vector_not_found")),
        row("update nothing", r#"POST /v1/vector/c/update {"id":"a"}"#, 400, bad()),
        row("no vector", r#"POST /v1/vector/c/add {"id":"b"}"#, 400, bad()),
        row("dimension", r#"POST /v1/vector/c/add {"id":"b","vector":[1,2,3]}"#, 400, json!({"code":"dimension_mismatch","expected":2,"got":3})),
        row("empty", r#"POST /v1/vector/c/add {"id":"b","vector":[]}"#, 400, code("invalid_vector")),
        row("zero", r#"POST /v1/vector/c/add {"id":"b","vector":[0,0]}"#, 400, code("invalid_vector")),
        row("infinite", r#"POST /v1/vector/c/add {"id":"b","vector":[1e39,0]}"#, 400, code("invalid_vector")),
        row("beyond f64", r#"POST /v1/vector/c/add {"id":"b","vector":[1e999,0]}"#, 400, code("invalid_vector")),
        row("NaN", r#"POST /v1/vector/c/add {"id":"b","vector_base64":"AADAfwAAgD8="}"#, 400, code("invalid_vector")),
        row("not numbers", r#"POST /v1/vector/c/add {"id":"b","vector":["1",2]}"#, 400, bad()),
        row("both forms", r#"POST /v1/vector/c/add {"id":"b","vector":[1,2],"vector_base64":"AACAPwAAAEA="}"#, 400, bad()),
        row("meta no object", r#"POST /v1/vector/c/add {"id":"b","vector":[1,2],"meta":[1]}"#, 400, bad()),
        row("meta too large", format!("POST /v1/vector/c/add {{\"id\":\"b\",\"vector\":[1,2],\"meta\":{{\"x\":\"{}\"}}}}", "x".repeat(70_000)), 413, json!({"limit_bytes":65536})),
        row("empty id", r#"POST /v1/vector/c/add {"id":"","vector":[1,2]}"#, 400, bad()),
        row("longest id", format!("POST /v1/vector/c/add {{\"id\":\"{}\",\"vector\":[1,2]}}", "i".repeat(512)), 200, Value::Null),
        row("longer id", format!("POST /v1/vector/c/add {{\"id\":\"{}\",\"vector\":[1,2]}}", "i".repeat(513)), 400, bad()),
        row("typo", r#"POST /v1/vector/c/add {"id":"b","vec":[1,2]}"#, 400, bad()),
        row("no collection", r#"POST /v1/vector/none/add {"id":"b","vector":[1,2]}"#, 404, code("collection_not_found")),
        row("items", r#"POST /v1/vector/c/upsert {"items":[{"id":"x","vector":[1,1]},{"id":"y","vector":[1,2]},{"id":"a","vector":[2,0]}]}"#, 200, json!({"results":[{"id":"x","created":true},{"id":"y","created":true},{"id":"a","created":false}],"revision":9})),
        row("items are atomic", r#"POST /v1/vector/c/add {"items":[{"id":"n1","vector":[1,1]},{"id":"x","vector":[1,2]}]}"#, 409, json!({"code":"already_exists","op":1})),
        row("none of them", "GET /v1/vector/c/get?id=n1", 404, code("vector_not_found")),
        row("an item that is none", r#"POST /v1/vector/c/upsert {"items":[{"id":"x","vector":[1,1]},{"vector":[1,1]}]}"#, 400, json!({"code":"invalid_argument","op":1})),
        row("bad id in a list", r#"POST /v1/vector/c/upsert {"items":[{"id":"x","vector":[1,1]},{"id":"","vector":[1,1]}]}"#, 400, json!({"code":"invalid_argument","op":1})),
        row("bad number in a list", r#"POST /v1/vector/c/upsert {"items":[{"id":"x","vector":[1,1]},{"id":"y","vector":[1e39,0]}]}"#, 400, json!({"code":"invalid_vector","op":1})),
        row("no vector in a list", r#"POST /v1/vector/c/upsert {"items":[{"id":"x","vector":[1,1]},{"id":"y"}]}"#, 400, json!({"code":"invalid_argument","op":1})),
        row("nothing to update in a list", r#"POST /v1/vector/c/update {"items":[{"id":"x"}]}"#, 400, json!({"code":"invalid_argument","op":0})),
        row("the first fault counts", r#"POST /v1/vector/c/upsert {"items":[{"id":"x","vector":[1,1]},{"id":"y","vector":[true,1]},{"id":"","vector":[1,1]}]}"#, 400, json!({"code":"invalid_argument","op":1})),
        row("what is no item first", r#"POST /v1/vector/c/upsert {"items":[{"id":"","vector":[1,1]},{"id":"y","vector":[1,1]},{"id":"z","vec":[1,1]}]}"#, 400, json!({"code":"invalid_argument","op":2})),
        row("item and bad items", r#"POST /v1/vector/c/add {"id":"q","items":[{"id":""}]}"#, 400, json!({"detail":"give one item or items, not both"})),
        row("item and items", r#"POST /v1/vector/c/add {"id":"q","items":[]}"#, 400, bad()),
        row("delete one", r#"POST /v1/vector/c/delete {"id":"x"}"#, 200, json!({"id":"x","deleted":true,"revision":10})),
        row("delete absent", r#"POST /v1/vector/c/delete {"id":"x"}"#, 404, code("vector_not_found")),
        row("delete several", r#"POST /v1/vector/c/delete {"ids":["y","x","zz"]}"#, 200, json!({"deleted":1,"missing":["x","zz"],"revision":11})),
        row("named twice", r#"POST /v1/vector/c/delete {"ids":["none","none"]}"#, 200, json!({"deleted":0,"missing":["none"]})),
        row("an array is no body", r#"POST /v1/vector/d [2,"l2"]"#, 400, bad()),
        row("delete which?", r#"POST /v1/vector/c/delete {}"#, 400, bad()),
        row("get without id", "GET /v1/vector/c/get", 400, bad()),
        row("info", "GET /v1/vector/c", 200, json!({"count":2,"index":{"kind":"exact","indexed":2,"pending":0},"revision":11})),
        row("all", "GET /v1/vector", 200, json!({"collections":[{"collection":"c"}]})),
        row("none", "GET /v1/vector/none", 404, code("collection_not_found")),
        row("drop under a condition", r#"DELETE /v1/vector/c {"if_revision":99}"#, 400, bad()),
        row("drop", "DELETE /v1/vector/c", 200, json!({"deleted":true,"count":2,"revision":12})),
        row("dropped", "DELETE /v1/vector/c", 404, code("collection_not_found")),
        row("anew with another shape", r#"POST /v1/vector/c {"dim":3,"metric":"dot"}"#, 201, json!({"dim":3,"count":0})),
    ]).await;
}

/// Bodies above 64 KiB are parsed aside, and are answered like others.
#[tokio::test]
async fn large_bodies_are_answered_like_small_ones() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/c {"dim":2,"metric":"l2"}"#).await;
    let space = " ".repeat(70_000);
    let items = |last: &str| {
        let items: String = (0..4000).map(|n| format!("{{\"id\":\"{n}\",\"vector\":[{n},0.5]}},")).collect();
        format!("POST /v1/vector/c/upsert {{\"items\":[{items}{last}]}}")
    };
    let ops = |last: &str| {
        let ops: String = (0..900)
            .map(|n| {
                format!("{{\"op\":\"vector_upsert\",\"collection\":\"c\",\"id\":\"b{n}\",\"vector\":[-{n},0.5]}},")
            })
            .collect();
        format!("POST /v1/batch {{{space}\"ops\":[{ops}{last}]}}")
    };
    let at = |place: usize| json!({"code":"invalid_argument","op":place});
    check(
        c,
        vec![
            row("no item", items(r#"{"id":"x","vec":[1,1]}"#), 400, at(4000)),
            row("no numbers", items(r#"{"id":"x","vector":["1",1]}"#), 400, at(4000)),
            row("dimension", items(r#"{"id":"x","vector":[1]}"#), 400, json!({"code":"dimension_mismatch","op":4000})),
            row("items", items(r#"{"id":"x","vector_base64":"AACAPwAAAEA="}"#), 200, json!({"revision":4002})),
            row("no op", ops(r#"{"op":"put","key":"k","val":1}"#), 400, at(900)),
            row("no key", ops(r#"{"op":"put","value":1}"#), 400, at(900)),
            row("ops", ops(r#"{"op":"put","key":"k","value":1}"#), 200, json!({"last_revision":4903})),
            row(
                "search",
                format!("POST /v1/vector/c/search {{{space}\"vector\":[7,0.5],\"k\":1}}"),
                200,
                json!({"hits":[{"id":"7","score":0.0}]}),
            ),
            row(
                "searches",
                format!(
                    "POST /v1/vector/c/search {{{space}\"queries\":[{{\"vector\":[-7,0.5],\"k\":1}},{{\"id\":\"x\",\"k\":1}}]}}"
                ),
                200,
                json!({"results":[{"hits":[{"id":"b7"}]},{"hits":[{"id":"x"}]}]}),
            ),
            row(
                "a search that is none",
                format!("POST /v1/vector/c/search {{{space}\"queries\":[{{\"k\":1}}]}}"),
                400,
                json!({"op":0}),
            ),
            row("value", format!("PUT /v1/state/k {{{space}\"value\":2}}"), 200, json!({"revision":4904})),
            row("no JSON", format!("PUT /v1/state/k {{{space}\"value\":}}"), 400, code("invalid_argument")),
            row("k", "GET /v1/state/k", 200, json!({"value":2})),
        ],
    )
    .await;
    // A page whose numbers are written aside too.
    ok(c, r#"POST /v1/vector/wide {"dim":4096,"metric":"l2"}"#).await;
    let wide: Vec<String> =
        (1..=4).map(|n| format!("{{\"id\":\"{n}\",\"vector\":[{}]}}", vec![n.to_string(); 4096].join(","))).collect();
    ok(c, &format!("POST /v1/vector/wide/upsert {{\"items\":[{}]}}", wide.join(","))).await;
    let page = ok(c, "GET /v1/vector/wide/list?include_vector=true").await;
    let found =
        ok(c, &format!("POST /v1/vector/wide/search {{\"id\":\"1\",\"k\":4,\"include_vector\":true{space}}}")).await;
    for list in [&page["items"], &found["hits"]] {
        let firsts: Vec<_> = list.as_array().unwrap().iter().map(|item| (&item["id"], &item["vector"][4095])).collect();
        assert_eq!(json!(firsts), json!([["1", 1.0], ["2", 2.0], ["3", 3.0], ["4", 4.0]]));
    }
}

#[tokio::test]
async fn searches() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let bad = || code("invalid_argument");
    ok(c, r#"POST /v1/vector/c {"dim":2,"metric":"l2"}"#).await;
    let items: Vec<String> = (0..20)
        .map(|n| {
            format!(
                "{{\"id\":\"{n:02}\",\"vector\":[{n},0],\"meta\":{{\"n\":{n},\"even\":{},\"tags\":[\"t{}\"]}}}}",
                n % 2 == 0,
                n % 3
            )
        })
        .collect();
    ok(c, &format!("POST /v1/vector/c/add {{\"items\":[{}]}}", items.join(","))).await;
    ok(c, r#"POST /v1/vector/turns {"dim":3,"metric":"cosine"}"#).await;
    ok(c, r#"POST /v1/vector/turns/add {"items":[{"id":"d","vector":[1,2,3]},{"id":"c","vector":[-0.3,-0.6,-0.9]},{"id":"b","vector":[2,4,6]},{"id":"a","vector":[0.1,0.2,0.3]}]}"#).await;
    ok(c, r#"POST /v1/vector/wide {"dim":101,"metric":"l2"}"#).await;
    ok(c, &format!("POST /v1/vector/wide/add {{\"id\":\"00\",\"vector\":{}}}", json!(vec![0; 101]))).await;
    let search = |body: &str| format!("POST /v1/vector/c/search {body}");
    let hits = |list: &[(&str, f64)]| json!({"hits": list.iter().map(|(id, score)| json!({"id":id,"score":score})).collect::<Vec<_>>()});
    check(c, vec![
        row("best first, ties by id", search(r#"{"vector":[4.5,0],"k":2}"#), 200, hits(&[("04", -0.5), ("05", -0.5)])),
        row("itself scores zero", search(r#"{"id":"07","k":1}"#), 200, hits(&[("07", 0.0)])),
        row("offset", search(r#"{"vector":[0,0],"k":2,"offset":3}"#), 200, hits(&[("03", -3.0), ("04", -4.0)])),
        row("min_score", search(r#"{"vector":[0,0],"k":9,"min_score":-1}"#), 200, hits(&[("00", 0.0), ("01", -1.0)])),
        row("filter", search(r#"{"vector":[0,0],"k":2,"filters":{"n":{"$gte":7},"even":true}}"#), 200, hits(&[("08", -8.0), ("10", -10.0)])),
        row("min(k, matches)", search(r#"{"vector":[0,0],"k":9,"filters":{"n":{"$in":[3,4]}}}"#), 200, hits(&[("03", -3.0), ("04", -4.0)])),
        row("no match", search(r#"{"vector":[0,0],"filters":{"n":"x"}}"#), 200, json!({"hits":[]})),
        row("meta and vector", search(r#"{"vector":[3,0],"k":1,"include_meta":true,"include_vector":true}"#), 200, json!({"hits":[{"id":"03","meta":{"n":3},"vector":[3.0,0.0]}]})),
        row("base64", search(r#"{"vector_base64":"AACAQAAAAAA=","k":1}"#), 200, hits(&[("04", 0.0)])),
        row("exact and ef", search(r#"{"vector":[1,0],"k":1,"exact":true,"ef":100}"#), 200, hits(&[("01", 0.0)])),
        row("queries", search(r#"{"queries":[{"vector":[0,0],"k":1},{"id":"09","k":1}]}"#), 200, json!({"results":[{"hits":[{"id":"00"}]},{"hits":[{"id":"09"}]}]})),
        row("groups", search(r#"{"vector":[0,0],"k":2,"group_by":"tags","group_size":2}"#), 200, json!({"groups":[{"value":"t0","hits":[{"id":"00"},{"id":"03"}]},{"value":"t1","hits":[{"id":"01"},{"id":"04"}]}]})),
        row("itself and its multiples, by id", "POST /v1/vector/turns/search {\"id\":\"d\"}", 200, json!({"hits":[{"id":"a","score":1.0},{"id":"b","score":1.0},{"id":"d","score":1.0},{"id":"c","score":-1.0}]})),
        row("k 0", search(r#"{"vector":[0,0],"k":0}"#), 400, bad()),
        row("k too large", search(r#"{"vector":[0,0],"k":1001}"#), 400, bad()),
        row("dimension", search(r#"{"vector":[0]}"#), 400, json!({"code":"dimension_mismatch","expected":2,"got":1})),
        row("infinite", search(r#"{"vector":[1e39,0]}"#), 400, code("invalid_vector")),
        row("no query", search(r#"{"k":1}"#), 400, bad()),
        row("two queries", search(r#"{"vector":[0,0],"id":"00"}"#), 400, bad()),
        row("absent id", search(r#"{"id":"zz"}"#), 404, code("vector_not_found")),
        row("a condition named twice", search(r#"{"vector":[0,0],"filters":{"n":{"$gt":1},"n":{"$lt":9}}}"#), 400, bad()),
        row("no filter", search(r#"{"vector":[0,0],"k":1,"filters":null}"#), 200, hits(&[("00", 0.0)])),
        row("not a number", search(r#"{"vector":[NaN,0]}"#), 400, code("invalid_vector")),
        row("not a number to add", r#"POST /v1/vector/c/add {"id":"nan","vector":[-Infinity,0]}"#, 400, code("invalid_vector")),
        row("unknown operator", search(r#"{"vector":[0,0],"filters":{"n":{"$regex":"x"}}}"#), 400, bad()),
        row("operator inside a value", search(r#"{"vector":[0,0],"filters":{"n":{"x":{"$gt":1}}}}"#), 400, bad()),
        row("typo", search(r#"{"vector":[0,0],"top":3}"#), 400, bad()),
        row("query in queries is bad", search(r#"{"queries":[{"vector":[0,0]},{"vector":[0]}]}"#), 400, json!({"code":"dimension_mismatch"})),
        row("groups with too many numbers", r#"POST /v1/vector/wide/search {"id":"00","k":1000,"group_by":"n","group_size":100,"include_vector":true}"#, 400, bad()),
        row("as many groups without them", r#"POST /v1/vector/wide/search {"id":"00","k":1000,"group_by":"n","group_size":100}"#, 200, json!({"groups":[]})),
        row("group_size alone", search(r#"{"vector":[0,0],"group_size":2}"#), 400, bad()),
        row("no collection", r#"POST /v1/vector/none/search {"vector":[0,0]}"#, 404, code("collection_not_found")),
        row("count", "POST /v1/vector/c/count {}", 200, json!({"count":20})),
        row("count some", r#"POST /v1/vector/c/count {"filters":{"even":true}}"#, 200, json!({"count":10})),
        row("count bad", r#"POST /v1/vector/c/count {"filter":{}}"#, 400, bad()),
        row("delete by filter", r#"POST /v1/vector/c/delete {"filters":{"even":true}}"#, 200, json!({"deleted":10})),
        row("they are gone", search(r#"{"vector":[0,0],"k":3}"#), 200, hits(&[("01", -1.0), ("03", -3.0), ("05", -5.0)])),
        row("delete none", r#"POST /v1/vector/c/delete {"filters":{"even":true}}"#, 200, json!({"deleted":0})),
    ]).await;
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = ok(c, &format!("GET /v1/vector/c/list?limit=3&include_vector=true{cursor}")).await;
        seen.extend(
            page["items"]
                .as_array()
                .unwrap()
                .iter()
                .map(|i| (i["id"].as_str().unwrap().to_owned(), i["vector"][0].as_f64().unwrap())),
        );
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, (0..20).filter(|n| n % 2 == 1).map(|n| (format!("{n:02}"), f64::from(n))).collect::<Vec<_>>());
}

/// Each writes all of its vector's metadata again, to the log too.
#[tokio::test]
async fn updates_of_much_metadata_come_in_smaller_batches() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":1,"metric":"l2"}"#).await;
    let text = "x".repeat(60_000);
    let items: Vec<Value> =
        (0..150).map(|n| json!({"id": n.to_string(), "vector": [1], "meta": {"text": text}})).collect();
    ok(c, &format!("POST /v1/vector/v/upsert {}", json!({ "items": items }))).await;
    let touch = |count: usize| {
        let items: Vec<Value> = (0..count).map(|n| json!({"id": n.to_string(), "meta": {"seen": true}})).collect();
        format!("POST /v1/vector/v/update {}", json!({ "items": items }))
    };
    let of_one: Vec<Value> = (0..200).map(|n| json!({"id": "0", "meta": {"n": n}})).collect();
    let again = format!("POST /v1/vector/v/update {}", json!({ "items": of_one }));
    check(
        c,
        vec![
            row("too much", touch(150), 413, json!({"code":"payload_too_large","limit_bytes":8 << 20})),
            row("too much of one", again, 413, json!({"code":"payload_too_large"})),
            row("half of it", touch(75), 200, json!({})),
            row("done to those", r#"POST /v1/vector/v/count {"filters":{"seen":true}}"#, 200, json!({"count":75})),
        ],
    )
    .await;
}

/// Many vectors take long to apply, and keys are read meanwhile; of the vectors everybody sees all or none. Only a change of
/// metadata alone may be seen by a search or a count under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_of_many_vectors_is_seen_whole_or_not_at_all() {
    const MANY: usize = 900;
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":2,"metric":"l2"}"#).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers = ["list", "search", "scan", "count", "info"].map(|way| {
        let (mut c, stop) = (server.client(), std::sync::Arc::clone(&stop));
        tokio::spawn(async move {
            let mut looks = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let line = match way {
                    "list" => "GET /v1/vector/v/list?limit=1000",
                    "search" => r#"POST /v1/vector/v/search {"vector":[0,0],"k":1000,"include_vector":true}"#,
                    "scan" => r#"POST /v1/vector/v/search {"vector":[0,0],"k":1000,"include_vector":true,"filters":{"n":{"$gte":0}}}"#,
                    "count" => r#"POST /v1/vector/v/count {"filters":{"odd":1}}"#,
                    _ => "GET /v1/vector/v",
                };
                let answer = ok(&mut c, line).await;
                looks += 1;
                let (count, rounds) = if let Some(count) = answer["count"].as_u64() {
                    (count as usize, usize::from(count > 0))
                } else {
                    let seen = answer[if way == "list" { "items" } else { "hits" }].as_array().unwrap();
                    let round = |item: &Value| if way == "list" { item["meta"]["n"].as_i64() } else { item["vector"][0].as_f64().map(|n| n as i64) };
                    let rounds: std::collections::BTreeSet<_> = seen.iter().map(round).collect();
                    (seen.len(), rounds.len())
                };
                assert!(matches!((count, rounds), (0, 0) | (MANY, 1)), "{way}: {count} vectors of {rounds} rounds");
            }
            looks
        })
    });
    let ids: Vec<String> = (0..MANY).map(|id| format!("{id:03}")).collect();
    let mut odd = 0;
    for n in 0..60 {
        let ways = ["items", "metadata", "batch", "items", "delete"];
        let way = ways[n % ways.len()];
        odd = if way == "metadata" { odd } else { n % 2 };
        let meta = json!({"n": n, "odd": odd});
        let each = |item: &dyn Fn(&String) -> Value| ids.iter().map(item).collect::<Vec<_>>();
        let line = match way {
            "items" => format!(
                "POST /v1/vector/v/upsert {}",
                json!({"items": each(&|id| json!({"id": id, "vector": [n, 1], "meta": meta}))})
            ),
            "metadata" => {
                format!("POST /v1/vector/v/update {}", json!({"items": each(&|id| json!({"id": id, "meta": meta}))}))
            }
            "batch" => {
                let mut ops = each(
                    &|id| json!({"op": "vector_upsert", "collection": "v", "id": id, "vector": [n, 1], "meta": meta}),
                );
                ops.push(json!({"op": "put", "key": "k", "value": n}));
                format!("POST /v1/batch {}", json!({ "ops": ops }))
            }
            _ => format!("POST /v1/vector/v/delete {}", json!({ "ids": ids })),
        };
        ok(c, &line).await;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for reader in readers {
        assert!(reader.await.unwrap() > 3);
    }
}

#[tokio::test]
async fn extreme_vectors_are_scored_and_not_lost() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    for metric in ["cosine", "dot", "l2"] {
        ok(c, &format!("POST /v1/vector/{metric} {{\"dim\":2,\"metric\":\"{metric}\"}}")).await;
        for (id, vector) in
            [("big", "[3e38,3e38]"), ("tiny", "[1e-45,1e-45]"), ("one", "[1,1]"), ("mixed", "[1e30,-1e-30]")]
        {
            ok(c, &format!("POST /v1/vector/{metric}/add {{\"id\":\"{id}\",\"vector\":{vector}}}")).await;
        }
        let found = ok(c, &format!("POST /v1/vector/{metric}/search {{\"vector\":[2e38,2e38],\"k\":4}}")).await;
        let scores: Vec<f64> = found["hits"].as_array().unwrap().iter().map(|h| h["score"].as_f64().unwrap()).collect();
        assert_eq!(scores.len(), 4, "{metric}: {found}");
        assert!(scores.iter().all(|s| s.is_finite()) && scores.is_sorted_by(|a, b| a >= b), "{metric}: {found}");
        if metric == "cosine" {
            assert!(scores[..3].iter().all(|s| (s - 1.0).abs() < 1e-6), "{found}");
        }
    }
    // Distances whose squares are too small for 32 bits.
    ok(c, r#"POST /v1/vector/near {"dim":1,"metric":"l2"}"#).await;
    for (id, number) in [("a", "1.31e-22"), ("b", "1.29e-22"), ("c", "1e-30"), ("d", "1e-38")] {
        ok(c, &format!("POST /v1/vector/near/add {{\"id\":\"{id}\",\"vector\":[{number}]}}")).await;
    }
    let found = ok(c, r#"POST /v1/vector/near/search {"id":"c","k":4}"#).await;
    let ids: Vec<&str> = found["hits"].as_array().unwrap().iter().map(|h| h["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["c", "d", "b", "a"], "{found}");
    let last = found["hits"][3]["score"].as_f64().unwrap();
    assert!((last + 1.31e-22).abs() < 1e-27, "{found}");
    // The count's revision is the collection's, with a filter and without.
    ok(c, r#"PUT /v1/state/later {"value":1}"#).await;
    let revision = ok(c, "GET /v1/vector/near").await["revision"].clone();
    for filter in ["{}", r#"{"filters":{}}"#, r#"{"filters":{"x":1}}"#] {
        assert_eq!(ok(c, &format!("POST /v1/vector/near/count {filter}")).await["revision"], revision, "{filter}");
    }
}

#[tokio::test]
async fn events_publish_and_history() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let bad = || code("invalid_argument");
    check(c, vec![
        row("publish", r#"POST /v1/events {"type":"progress","data":{"p":1},"key":"job:1","meta":{"job_id":"1","tags":["x"]}}"#, 201, json!({"revision":1})),
        row("without data", r#"POST /v1/events {"type":"a.b-c_1"}"#, 201, json!({"revision":2})),
        row("ephemeral", r#"POST /v1/events {"type":"tick","ephemeral":true}"#, 201, json!({"revision":2})),
        row("server's own type", r#"POST /v1/events {"type":"state_updated"}"#, 400, bad()),
        row("bad type", r#"POST /v1/events {"type":"Progress"}"#, 400, bad()),
        row("no type", r#"POST /v1/events {"data":1}"#, 400, bad()),
        row("typo", r#"POST /v1/events {"type":"a","payload":1}"#, 400, bad()),
        row("bad key", r#"POST /v1/events {"type":"a","key":""}"#, 400, bad()),
        row("put", r#"PUT /v1/state/k {"value":1}"#, 201, json!({"revision":3})),
    ]).await;
    let get = async |c: &mut Client, query: &str, headers: &[(&str, &str)]| {
        let mut all = vec![("accept", "application/json")];
        all.extend_from_slice(headers);
        c.send("GET".parse().unwrap(), &format!("/v1/events{query}"), &all, "").await.unwrap()
    };
    let revisions = |answer: &kiss_vdb::client::Answer| -> Vec<u64> {
        answer.success().unwrap()["events"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["revision"].as_u64().unwrap())
            .collect()
    };
    for (query, expected, next) in [
        ("?since=0", vec![1, 2, 3], 3),
        ("?since=1", vec![2, 3], 3),
        ("?since=3", vec![], 3),
        ("", vec![], 3),
        ("?since=0&limit=1", vec![1], 1),
        ("?since=1&limit=1", vec![2], 2),
        ("?since=0&key=job:1", vec![1], 3),
        ("?since=0&key=job:1&key=k", vec![1, 3], 3),
        ("?since=0&prefix=job", vec![1], 3),
        ("?since=0&types=state_updated,progress", vec![1, 3], 3),
        ("?since=0&job_id=1", vec![1], 3),
        ("?since=0&tag=x&tag=y", vec![1], 3),
        ("?since=0&tag=y", vec![], 3),
        ("?since=0&collection=c", vec![], 3),
        ("?since=2020-01-01T00:00:00Z", vec![1, 2, 3], 3),
        ("?since=2100-01-01T00:00:00%2B01:00", vec![], 3),
    ] {
        let answer = get(c, query, &[]).await;
        assert_eq!(revisions(&answer), expected, "{query}");
        let body = answer.json().unwrap();
        assert!(contains(&body, &json!({"next_since":next,"head":3,"oldest":1})), "{query}: {body}");
    }
    let first = get(c, "?since=0&limit=1", &[]).await.json().unwrap();
    assert!(contains(
        &first["events"][0],
        &json!({"type":"progress","key":"job:1","data":{"p":1},"meta":{"job_id":"1","tags":["x"]}})
    ));
    assert_eq!(revisions(&get(c, "?since=0", &[("last-event-id", "2")]).await), [3], "Last-Event-ID beats since");
    for query in [
        "?since=x",
        "?since=-1",
        "?since=99999999999999999999",
        "?since=9",
        "?limit=0",
        "?limit=1001",
        "?wait_ms=60001",
        "?types=Bad",
        "?kez=1",
        "?key=",
        "?snapshot=true",
    ] {
        assert_eq!(get(c, query, &[]).await.status, 400, "{query}");
    }
    assert_eq!(get(c, "", &[("last-event-id", "abc")]).await.status, 400);
    for query in ["?heartbeat_ms=999", "?heartbeat_ms=60001", "?limit=5", "?snapshot=2", "?include_vector=x"] {
        let answer = c.send("GET".parse().unwrap(), &format!("/v1/events{query}"), &[], "").await.unwrap();
        assert_eq!(answer.status, 400, "{query}");
    }
    for (accept, is_json) in
        [("application/json;q=0, text/event-stream", false), ("text/event-stream;q=0.5, application/json", true)]
    {
        let answer = c.send("HEAD".parse().unwrap(), "/v1/events", &[("accept", accept)], "").await.unwrap();
        assert_eq!(answer.headers["content-type"] == "application/json", is_json, "{accept}");
    }
    // A long poll is answered by the event it waits for, and by nothing when there is none.
    let started = std::time::Instant::now();
    assert_eq!(revisions(&get(c, "?since=3&wait_ms=200", &[]).await), [0; 0]);
    assert!(started.elapsed() >= common::Duration::from_millis(200));
    let target = server.target.clone();
    let poll = tokio::spawn(async move {
        let mut c = Client::new(&target);
        c.send("GET".parse().unwrap(), "/v1/events?since=3&wait_ms=30000&key=k", &[("accept", "application/json")], "")
            .await
            .unwrap()
    });
    ok(c, r#"PUT /v1/state/other {"value":1}"#).await;
    ok(c, r#"PUT /v1/state/k {"value":2}"#).await;
    assert_eq!(revisions(&poll.await.unwrap()), [5]);
}

#[tokio::test]
async fn a_key_guards_everything_but_health_and_preflights() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::try_start_in(dir.path(), &["--cors-origins", "https://app.example"], Some("s3cret")).unwrap();
    let open = kiss_vdb::client::Target::new(&server.target.url(), None).unwrap();
    let c = &mut Client::new(&open);
    assert_eq!(call(c, "GET /v1/health").await.status, 200);
    for line in [
        "GET /v1/state",
        "PUT /v1/state/a {\"value\":1}",
        "GET /v1/events",
        "GET /v1/metrics",
        "GET /docs",
        "GET /nope",
    ] {
        let answer = call(c, line).await;
        assert_eq!(answer.status, 401, "{line}");
        assert_eq!(answer.json().unwrap()["code"], "unauthorized");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
    assert_eq!(call(c, "GET /").await.status, 200, "the page that asks for the key");
    for wrong in ["Bearer s3cre", "Bearer s3crett", "Bearer ", "Basic s3cret", "s3cret"] {
        let answer = c.send("GET".parse().unwrap(), "/v1/state", &[("authorization", wrong)], "").await.unwrap();
        assert_eq!(answer.status, 401, "{wrong}");
    }
    assert_eq!(call(&mut server.client(), "GET /v1/state").await.status, 200);
    let preflight = [
        ("origin", "https://app.example"),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "authorization,if-match"),
    ];
    let answer = c.send("OPTIONS".parse().unwrap(), "/v1/state/a", &preflight, "").await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["access-control-allow-origin"], "https://app.example");
    let foreign = [("origin", "https://evil.example"), ("access-control-request-method", "PUT")];
    let answer = c.send("OPTIONS".parse().unwrap(), "/v1/state/a", &foreign, "").await.unwrap();
    assert!(answer.headers.get("access-control-allow-origin").is_none());

    let bare =
        Server::try_start_in(tempfile::tempdir().unwrap().path(), &["--rate-limit", "1"], Some("s3cret")).unwrap();
    let open = kiss_vdb::client::Target::new(&bare.target.url(), None).unwrap();
    let c = &mut Client::new(&open);
    for path in ["/v1/state/a", "/v1/state", "/v1/admin/backup"] {
        let answer = c.send("OPTIONS".parse().unwrap(), path, &preflight, "").await.unwrap();
        assert!([405, 429].contains(&answer.status.as_u16()), "{path}: {}", answer.status);
    }
    assert_eq!(call(c, "GET /v1/state").await.status, 429, "it has asked too much");
    for path in ["/v1/health", "/", "/console/app.js"].repeat(2) {
        assert_eq!(call(c, &format!("GET {path}")).await.status, 200, "{path} is told all the same");
    }
}

#[tokio::test]
async fn admin_pages_and_metrics() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    assert!(
        server.banner.contains("http://127.0.0.1:") && server.banner.contains("durability always"),
        "{}",
        server.banner
    );
    ok(c, r#"PUT /v1/state/a {"value":1}"#).await;
    let health = ok(c, "GET /v1/health").await;
    assert!(contains(&health, &json!({"status":"ok","revision":1,"oldest":1,"durability":"always"})), "{health}");
    let snapshot = ok(c, "POST /v1/admin/snapshot").await;
    assert!(snapshot["revision"] == 1 && snapshot["bytes"].as_u64().unwrap() > 0 && snapshot["took_ms"].is_u64());
    let metrics = String::from_utf8(call(c, "GET /v1/metrics").await.body.to_vec()).unwrap();
    for name in [
        "kiss_revision 1",
        "kiss_keys 1",
        "kiss_http_requests_total{route=\"/v1/state/{key}\",method=\"PUT\",status=\"201\"} 1",
        "kiss_fsync_duration_seconds_count",
        "# TYPE kiss_http_requests_total counter",
    ] {
        assert!(metrics.contains(name), "{name} is not in\n{metrics}");
    }
    let accept = [("accept", "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3")];
    let metrics = c.send("GET".parse().unwrap(), "/v1/metrics", &accept, "").await.unwrap();
    assert!(metrics.headers["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    assert!(String::from_utf8_lossy(&metrics.body).ends_with("# EOF\n"));
    for (path, content_type) in [
        ("/", "text/html; charset=utf-8"),
        ("/docs", "text/html; charset=utf-8"),
        ("/openapi.yaml", "application/yaml; charset=utf-8"),
    ] {
        let answer = call(c, &format!("GET {path}")).await;
        assert_eq!(answer.status, 200, "{path}");
        assert_eq!(answer.headers["content-type"], content_type);
    }
    let named = [("x-request-id", "mine-1")];
    let answer = c.send("GET".parse().unwrap(), "/v1/state/a", &named, "").await.unwrap();
    assert_eq!(answer.headers["x-request-id"], "mine-1");
    assert!(!call(c, "GET /v1/state/a").await.headers.contains_key("x-request-id"), "only where it tells something");
    let head = c.send("HEAD".parse().unwrap(), "/v1/state/a", &[], "").await.unwrap();
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    assert_eq!(head.headers["etag"], "\"1\"");
}

#[tokio::test]
async fn a_memory_budget_refuses_growth_and_lets_go() {
    let server = Server::start(&["--max-memory-mb", "1"]);
    let c = &mut server.client();
    let value = "x".repeat(100_000);
    let mut refused = None;
    for n in 0..20 {
        let answer = call(c, &format!("PUT /v1/state/k{n} {{\"value\":\"{value}\"}}")).await;
        if answer.status == 507 {
            assert_eq!(answer.json().unwrap()["code"], "storage_full");
            refused = Some(n);
            break;
        }
        assert_eq!(answer.status, 201);
    }
    assert_eq!(refused, Some(10));
    assert_eq!(call(c, "GET /v1/state/k1").await.status, 200);
    assert_eq!(call(c, "POST /v1/vector/v {\"dim\":8,\"metric\":\"dot\"}").await.status, 507);
    ok(c, "DELETE /v1/state/k1").await;
    assert_eq!(call(c, &format!("PUT /v1/state/k11 {{\"value\":\"{value}\"}}")).await.status, 201);
    assert_eq!(call(c, "PUT /v1/state/k2 {\"value\":1}").await.status, 200, "what shrinks may be written");

    // Vectors: what deletes make free is free, and metadata that grows is counted.
    let server = Server::start(&["--max-memory-mb", "1"]);
    let c = &mut server.client();
    ok(c, "POST /v1/vector/v {\"dim\":1000,\"metric\":\"dot\"}").await;
    let vector = format!("[{}1]", "0,".repeat(999));
    let add = |n: usize| format!("POST /v1/vector/v/upsert {{\"id\":\"{n}\",\"vector\":{vector}}}");
    let mut count = 0;
    while call(c, &add(count)).await.status == 200 {
        count += 1;
    }
    assert!((100..260).contains(&count), "{count} vectors of 4 KB fit");
    let meta = format!("POST /v1/vector/v/update {{\"id\":\"0\",\"meta\":{{\"x\":\"{}\"}}}}", "x".repeat(60_000));
    assert_eq!(call(c, &meta).await.status, 507, "metadata grows too");
    for n in 0..count {
        ok(c, &format!("POST /v1/vector/v/delete {{\"id\":\"{n}\"}}")).await;
    }
    assert_eq!(call(c, &add(0)).await.status, 200, "there is room again");
}

/// A small request must not become a record of gigabytes.
#[tokio::test]
async fn what_a_batch_would_write_is_bounded() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, &format!("PUT /v1/state/big {{\"value\":{{\"x\":\"{}\"}}}}", "x".repeat(1 << 20))).await;
    let ops: Vec<String> =
        (0..1000).map(|n| format!("{{\"op\":\"patch\",\"key\":\"big\",\"patch\":{{\"n\":{n}}}}}")).collect();
    let answer = call(c, &format!("POST /v1/batch {{\"ops\":[{}]}}", ops.join(","))).await;
    assert_eq!(answer.status, 413);
    assert!(contains(&answer.json().unwrap(), &json!({"code":"payload_too_large"})));
    assert_eq!(ok(c, "GET /v1/health").await["revision"], 1, "nothing of it was written");
}

/// The contract as published names exactly the routes there are.
#[test]
fn openapi_names_every_route() {
    let documents = yaml_rust2::YamlLoader::load_from_str(kiss_vdb::api::docs::OPENAPI).unwrap();
    let mut documented: Vec<(String, String)> = Vec::new();
    for (path, methods) in documents[0]["paths"].as_hash().unwrap() {
        for (method, _) in methods.as_hash().unwrap() {
            let method = method.as_str().unwrap();
            if method != "parameters" {
                documented.push((method.to_uppercase(), path.as_str().unwrap().to_owned()));
            }
        }
    }
    let mut routes: Vec<_> = kiss_vdb::api::ROUTES.iter().map(|(m, p)| ((*m).to_owned(), (*p).to_owned())).collect();
    documented.sort();
    routes.sort();
    assert_eq!(documented, routes);
}

/// Whoever started the server waits for this word: systemd, with `Type=notify`.
#[test]
fn systemd_is_told_when_requests_are_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let _server = Server::start_with(&dir.path().join("data"), &[], Some(("NOTIFY_SOCKET", path.to_str().unwrap())));
    let mut word = [0; 64];
    let length = socket.recv(&mut word).expect("READY comes");
    assert_eq!(&word[..length], b"READY=1\n");
}

/// The line and the answer carry the same name.
#[tokio::test]
async fn slow_requests_are_logged_under_the_name_their_answer_carries() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut command = std::process::Command::new(common::BINARY);
    command.args(["serve", "--port", "0", "--slow-request-ms", "1", "--data-dir"]).arg(dir.path().join("data"));
    command.stderr(std::fs::File::create(&log).unwrap());
    let (server, url) = common::serving(command);
    let c = &mut Client::new(&kiss_vdb::client::Target::new(&url, None).unwrap());
    let large = format!(r#"PUT /v1/state/large {{"value":"{}"}}"#, "x".repeat(8 << 20));
    let answer = call(c, &large).await;
    let name = answer.headers["x-request-id"].to_str().unwrap().to_owned();
    drop(server);
    let text = std::fs::read_to_string(&log).unwrap();
    let line = text.lines().find(|line| line.contains("slow request")).unwrap_or_else(|| panic!("no line in {text}"));
    assert!(line.contains(&name) && line.contains("/v1/state/{key}") && line.contains("status=201"), "{line}");
}

/// A condition that is overlooked writes what its sender did not want.
#[tokio::test]
async fn conditions_in_headers_are_refused_where_they_are_not_looked_at() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":2,"metric":"l2"}"#).await;
    for (path, body) in [
        ("/v1/events", r#"{"type":"log"}"#),
        ("/v1/batch", r#"{"ops":[{"op":"put","key":"a","value":1}]}"#),
        ("/v1/vector/v/upsert", r#"{"id":"1","vector":[1,2]}"#),
    ] {
        for header in ["if-match", "if-none-match"] {
            let headers = [("content-type", "application/json"), (header, "\"9\"")];
            let answer = c.send("POST".parse().unwrap(), path, &headers, body).await.unwrap();
            assert_eq!(answer.status, 400, "{path} {header}");
        }
    }
    assert_eq!(ok(c, "GET /v1/health").await["revision"], 1, "nothing was written");
}
