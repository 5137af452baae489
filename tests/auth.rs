//! Who may do what: what would break is that somebody sees or changes what is not theirs.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{BINARY, Duration, Server, call, ok, timeout};
use kiss_vdb::client::{Client, Target};
use serde_json::json;
use std::path::Path;
use std::process::Command;

/// `kiss-vdb keys …`; what it prints.
fn keys(file: &Path, arguments: &[&str]) -> String {
    let output = Command::new(BINARY).arg("keys").args(arguments).arg("--file").arg(file).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn with_key(server: &Server, secret: &str) -> Client {
    Client::new(&target(server, secret))
}

fn target(server: &Server, secret: &str) -> Target {
    Target::new(&server.target.url(), Some(secret.to_owned())).unwrap()
}

/// A server with the keys `root` (admin), `worker` (read and write below `jobs/` and in `docs`) and `reader` (reads all).
struct Setup {
    server: Server,
    file: std::path::PathBuf,
    root: String,
    worker: String,
    reader: String,
    writer: String,
    _dir: tempfile::TempDir,
}

async fn setup(arguments: &[&str]) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.toml");
    let root = keys(&file, &["create", "root", "--rights", "admin"]);
    let worker = keys(&file, &["create", "worker", "--prefix", "jobs/", "--collection", "docs", "--expires", "1d"]);
    let reader = keys(&file, &["create", "reader", "--rights", "read"]);
    let writer = keys(&file, &["create", "writer", "--rights", "write"]);
    let mut all = vec!["--keys-file", file.to_str().unwrap()];
    all.extend(arguments);
    let server = Server::start_in(&dir.path().join("data"), &all);
    assert!(server.banner.contains("key needed"), "{}", server.banner);
    let c = &mut with_key(&server, &root);
    for line in [
        r#"PUT /v1/state/jobs/1 {"value":{"n":1}}"#,
        r#"PUT /v1/state/other {"value":2}"#,
        r#"POST /v1/vector/docs {"dim":2,"metric":"l2"}"#,
        r#"POST /v1/vector/secret {"dim":2,"metric":"l2"}"#,
        r#"POST /v1/vector/secret/add {"id":"s","vector":[1,2]}"#,
    ] {
        ok(c, line).await;
    }
    Setup { server, file, root, worker, reader, writer, _dir: dir }
}

#[tokio::test]
async fn each_key_does_what_its_rights_and_limits_say() {
    let s = setup(&[]).await;
    let mut clients = [&s.root, &s.worker, &s.reader].map(|secret| with_key(&s.server, secret));
    // Status for root, worker, reader.
    let rows: &[(&str, [u16; 3])] = &[
        ("GET /v1/state/jobs/1", [200, 200, 200]),
        ("GET /v1/state/other", [200, 403, 200]),
        ("GET /v1/state/jobs", [404, 403, 404]),
        ("GET /v1/state", [200, 403, 200]),
        ("GET /v1/state?prefix=jobs/", [200, 200, 200]),
        ("GET /v1/state?prefix=job", [200, 403, 200]),
        (r#"PUT /v1/state/jobs/2 {"value":1}"#, [201, 200, 403]),
        (r#"PUT /v1/state/other {"value":1}"#, [200, 403, 403]),
        (r#"PATCH /v1/state/jobs/1 {"m":1}"#, [200, 200, 403]),
        (r#"PATCH /v1/state/other {"m":1}"#, [200, 403, 403]),
        ("DELETE /v1/state/jobs/2", [200, 404, 403]),
        ("DELETE /v1/state/jobs%2Fx", [404, 404, 403]),
        (r#"POST /v1/events {"type":"log","key":"jobs/1"}"#, [201, 201, 403]),
        (r#"POST /v1/events {"type":"log","key":"other"}"#, [201, 403, 403]),
        (r#"POST /v1/events {"type":"log"}"#, [201, 403, 403]),
        (r#"POST /v1/events {"type":"log","ephemeral":true}"#, [201, 403, 403]),
        (r#"POST /v1/events {"type":"log","key":"jobs/1","ephemeral":true}"#, [201, 201, 403]),
        (r#"POST /v1/batch {"ops":[{"op":"put","key":"jobs/3","value":1}]}"#, [200, 200, 403]),
        (r#"POST /v1/vector/docs/upsert {"id":"a","vector":[1,2]}"#, [200, 200, 403]),
        (r#"POST /v1/vector/secret/upsert {"id":"a","vector":[1,2]}"#, [200, 403, 403]),
        (r#"POST /v1/vector/docs/search {"vector":[1,2]}"#, [200, 200, 200]),
        (r#"POST /v1/vector/secret/search {"id":"s"}"#, [200, 403, 200]),
        ("GET /v1/vector/secret", [200, 403, 200]),
        ("GET /v1/vector/secret/get?id=s", [200, 403, 200]),
        ("GET /v1/vector/secret/list", [200, 403, 200]),
        ("POST /v1/vector/secret/count {}", [200, 403, 200]),
        (r#"POST /v1/vector/secret/delete {"filters":{"x":1}}"#, [200, 403, 403]),
        (r#"POST /v1/vector/new {"dim":2,"metric":"l2"}"#, [201, 403, 403]),
        ("DELETE /v1/vector/new", [200, 403, 403]),
        ("GET /v1/metrics", [200, 403, 200]),
        ("POST /v1/admin/snapshot", [200, 403, 403]),
        ("GET /docs", [200, 200, 200]),
    ];
    for (line, statuses) in rows {
        for (client, status) in clients.iter_mut().zip(statuses) {
            let answer = call(client, line).await;
            assert_eq!(answer.status.as_u16(), *status, "{line}: {}", String::from_utf8_lossy(&answer.body));
            if *status == 403 {
                assert_eq!(answer.json().unwrap()["code"], "forbidden", "{line}");
            }
        }
    }
    // Who may only write is not told what is there, question by question.
    let writer = &mut with_key(&s.server, &s.writer);
    for (line, status) in [
        ("GET /v1/state/other", 403),
        ("GET /v1/vector", 403),
        (r#"PATCH /v1/state/other {"m":1}"#, 403),
        (r#"POST /v1/vector/docs/delete {"filters":{"x":1}}"#, 403),
        (r#"POST /v1/vector/docs/delete {"id":"x"}"#, 404),
        (r#"PUT /v1/state/other {"value":1}"#, 200),
    ] {
        assert_eq!(call(writer, line).await.status, status, "{line}");
    }
    let [_, worker, _] = &mut clients;
    let listed = ok(worker, "GET /v1/vector").await;
    assert_eq!(listed["collections"].as_array().unwrap().len(), 1, "{listed}");
    // A batch is refused whole, and says by which operation.
    let batch = r#"POST /v1/batch {"ops":[{"op":"put","key":"jobs/9","value":1},{"op":"delete","key":"other"}]}"#;
    let answer = call(worker, batch).await;
    assert_eq!((answer.status.as_u16(), &answer.json().unwrap()["op"]), (403, &json!(1)));
    assert_eq!(call(worker, "GET /v1/state/jobs/9").await.status, 404);
}

#[tokio::test]
async fn streams_snapshots_and_history_show_what_a_key_may_read_and_no_more() {
    let s = setup(&[]).await;
    let worker = target(&s.server, &s.worker);
    let c = &mut Client::new(&worker);
    for (query, status) in [
        ("?key=other", 403),
        ("?prefix=", 403),
        ("?prefix=jobs/&key=other", 403),
        ("?collection=secret", 403),
        ("?prefix=jobs/1&limit=1", 200),
    ] {
        let line = [("accept", "application/json")];
        let answer = c.send("GET".parse().unwrap(), &format!("/v1/events{query}"), &line, "").await.unwrap();
        assert_eq!(answer.status.as_u16(), status, "{query}: {}", String::from_utf8_lossy(&answer.body));
    }
    let history = c.send("GET".parse().unwrap(), "/v1/events?since=0", &[("accept", "application/json")], "").await;
    let history = history.unwrap().success().unwrap();
    let seen: Vec<_> = history["events"].as_array().unwrap().iter().map(|e| e["revision"].as_u64().unwrap()).collect();
    assert_eq!(seen, [1, 3], "jobs/1 and the collection docs, by replay: {history}");
    let mut stream = worker.events("?snapshot=true", None).await.unwrap();
    let mut rows = Vec::new();
    loop {
        let event = stream.next_event().await.unwrap().unwrap();
        rows.push(event.event.clone());
        if event.event == "snapshot_end" {
            break;
        }
        assert_eq!(event.json().unwrap()["key"], "jobs/1");
    }
    assert_eq!(rows, ["snapshot", "snapshot_end"]);
    let root = &mut with_key(&s.server, &s.root);
    for line in [
        r#"PUT /v1/state/other {"value":3}"#,
        r#"POST /v1/events {"type":"log","data":"for everybody"}"#,
        r#"POST /v1/vector/secret/upsert {"id":"s","vector":[1,2]}"#,
        r#"POST /v1/vector/docs/upsert {"id":"d","vector":[1,2]}"#,
        r#"PUT /v1/state/jobs/1 {"value":3}"#,
    ] {
        ok(root, line).await;
    }
    for expected in ["vector_added", "state_updated"] {
        let event = timeout(Duration::from_secs(5), stream.next_event()).await.unwrap().unwrap().unwrap();
        assert_eq!(event.event, expected, "{}", event.data);
    }
}

#[tokio::test]
async fn a_changed_key_file_is_taken_over_and_revoked_streams_end() {
    let s = setup(&[]).await;
    let mut kept = target(&s.server, &s.reader).events("", None).await.unwrap();
    let mut ended = target(&s.server, &s.worker).events("", None).await.unwrap();
    keys(&s.file, &["revoke", "worker"]);
    let late = keys(&s.file, &["create", "late"]);
    let end = async { while ended.next_frame().await.unwrap().is_some() {} };
    timeout(Duration::from_secs(10), end).await.expect("the stream of a revoked key ends, and cleanly");
    assert_eq!(call(&mut with_key(&s.server, &s.worker), "GET /v1/state/jobs/1").await.status, 401);
    ok(&mut with_key(&s.server, &late), r#"PUT /v1/state/other {"value":1}"#).await;
    let event = timeout(Duration::from_secs(5), kept.next_event()).await.unwrap().unwrap().unwrap();
    assert_eq!(event.event, "state_updated", "streams of other keys go on");
    // A file that cannot be used changes nothing.
    std::fs::write(&s.file, "[[key]]\nname = 1").unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    ok(&mut with_key(&s.server, &late), "GET /v1/state/other").await;
}

/// A poll that waits must not be told what was written after its key was gone.
#[tokio::test]
async fn a_long_poll_ends_with_its_key() {
    let s = setup(&[]).await;
    let mut c = with_key(&s.server, &s.worker);
    let poll = tokio::spawn(async move {
        let json = [("accept", "application/json")];
        c.send("GET".parse().unwrap(), "/v1/events?prefix=jobs/&wait_ms=30000", &json, "").await.unwrap()
    });
    let root = &mut with_key(&s.server, &s.root);
    while !String::from_utf8_lossy(&call(root, "GET /v1/metrics").await.body).contains("kiss_streams 1.0") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    keys(&s.file, &["revoke", "worker"]);
    let answer = timeout(Duration::from_secs(10), poll).await.expect("it ends at once").unwrap();
    assert_eq!(answer.status, 401, "{}", String::from_utf8_lossy(&answer.body));
}

/// Two who change the file at once must not undo each other.
#[test]
fn keys_made_at_once_are_all_there() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.toml");
    std::thread::scope(|scope| {
        for n in 0..8 {
            let file = &file;
            scope.spawn(move || keys(file, &["create", &format!("k{n}")]));
        }
    });
    assert_eq!(keys(&file, &["list"]).lines().count(), 8);
    let odd = Command::new(BINARY)
        .args(["keys", "create", "x", "--expires", "1e300d", "--file"])
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(odd.status.code(), Some(1), "{}", String::from_utf8_lossy(&odd.stderr));
    // A key that nobody was shown is none.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut unseen = Command::new(BINARY);
    unseen.args(["keys", "create", "unseen", "--file"]).arg(&file).stdout(full);
    assert_eq!(unseen.status().unwrap().code(), Some(1));
    assert_eq!(keys(&file, &["list"]).lines().count(), 8);
}

#[tokio::test]
async fn keys_expire_and_what_is_shown_is_never_the_secret() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.toml");
    let secret = keys(&file, &["create", "short", "--expires", "0.05m"]);
    let listed = keys(&file, &["list"]);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(listed.contains("short · read,write · everything · expires"), "{listed}");
    assert!(!listed.contains(&secret) && !text.contains(&secret) && text.contains("sha256"));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let server = Server::start_in(&dir.path().join("data"), &["--keys-file", file.to_str().unwrap()]);
    let mut stream = target(&server, &secret).events("", None).await.unwrap();
    let end = async { while stream.next_frame().await.unwrap().is_some() {} };
    timeout(Duration::from_secs(10), end).await.expect("the stream ends with its key");
    assert_eq!(call(&mut with_key(&server, &secret), "GET /v1/state").await.status, 401);
}

#[tokio::test]
async fn a_token_opens_streams_alone_and_only_what_its_key_reaches() {
    let s = setup(&[]).await;
    let c = &mut with_key(&s.server, &s.worker);
    let open = &mut Client::new(&Target::new(&s.server.target.url(), None).unwrap());
    let token = async |c: &mut Client, body: &str| {
        let answer = call(c, &format!("POST /v1/token {body}")).await;
        assert_eq!(answer.status, 201, "{}", String::from_utf8_lossy(&answer.body));
        let answer = answer.json().unwrap();
        (answer["token"].as_str().unwrap().to_owned(), answer["expires_at_ms"].as_u64().unwrap())
    };
    for (body, status) in [
        (r#"{"prefixes":["other"]}"#, 403),
        (r#"{"collections":["*"]}"#, 403),
        (r#"{"ttl_ms":1}"#, 400),
        (r#"{"ttl_ms":999999999999}"#, 400),
        (r#"{"ttl":5000}"#, 400),
    ] {
        assert_eq!(call(c, &format!("POST /v1/token {body}")).await.status.as_u16(), status, "{body}");
    }
    assert_eq!(call(open, "POST /v1/token {}").await.status, 401);
    let (all, _) = token(c, "").await;
    let (narrow, _) = token(c, r#"{"prefixes":["jobs/1"],"ttl_ms":3000}"#).await;
    // Nothing else takes it, nor a token as a key, nor a token for a token.
    for line in [
        format!("GET /v1/state/jobs/1?access_token={all}"),
        format!("POST /v1/events?access_token={all} {{\"type\":\"log\",\"key\":\"jobs/1\"}}"),
        format!("POST /v1/token?access_token={all} {{}}"),
    ] {
        assert_eq!(call(open, &line).await.status, 401, "{line}");
    }
    assert_eq!(call(&mut with_key(&s.server, &all), "GET /v1/state/jobs/1").await.status, 401);
    let (payload, signature) = all.split_once('.').unwrap();
    for forged in [format!("{payload}."), format!("{payload}x.{signature}"), format!("{payload}.{}", "A".repeat(43))] {
        let answer = call(open, &format!("GET /v1/events?access_token={forged}")).await;
        assert_eq!(answer.status, 401, "{forged}");
    }
    assert_eq!(call(open, &format!("HEAD /v1/events?access_token={all}")).await.status, 200, "as GET is");
    let url = Target::new(&s.server.target.url(), None).unwrap();
    let mut wide = url.events(&format!("?since=0&access_token={all}"), None).await.unwrap();
    assert_eq!(wide.next_event().await.unwrap().unwrap().json().unwrap()["key"], "jobs/1");
    let mut short = url.events(&format!("?since=0&access_token={narrow}"), None).await.unwrap();
    let end = async { while short.next_frame().await.unwrap().is_some() {} };
    timeout(Duration::from_secs(10), end).await.expect("the stream ends with its token");
    assert_eq!(call(open, &format!("GET /v1/events?access_token={narrow}")).await.status, 401);
    // Its key gone, a token is worth nothing.
    keys(&s.file, &["revoke", "worker"]);
    let end = async { while wide.next_frame().await.unwrap().is_some() {} };
    timeout(Duration::from_secs(10), end).await.expect("the stream of a token ends with its key");
    assert_eq!(call(open, &format!("GET /v1/events?access_token={all}")).await.status, 401);
}

/// A page that has only the key learns here what to show and to offer.
#[tokio::test]
async fn a_token_comes_with_what_its_key_may_do() {
    let s = setup(&[]).await;
    let grant = async |secret: &str, body: &str| {
        let mut answer = ok(&mut with_key(&s.server, secret), &format!("POST /v1/token {body}")).await;
        answer["grant"].take()
    };
    let mut worker = grant(&s.worker, "{}").await;
    let end = worker.as_object_mut().unwrap().remove("expires_at_ms").unwrap().as_u64().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    assert!((1..=86_402_000).contains(&(u128::from(end) - now)), "the key ends within a day: {end}, {now}");
    let reach = json!({"name": "worker", "rights": ["read", "write"], "prefixes": ["jobs/"], "collections": ["docs"]});
    assert_eq!(worker, reach);
    let narrow = grant(&s.worker, r#"{"prefixes":["jobs/1"]}"#).await;
    assert_eq!(narrow["prefixes"], json!(["jobs/"]), "the key's, not the token's");
    assert_eq!(grant(&s.reader, "").await, json!({"name": "reader", "rights": ["read"]}));
    assert_eq!(grant(&s.root, "").await, json!({"name": "root", "rights": ["admin"]}));
    let open = Server::start(&[]);
    assert!(ok(&mut open.client(), "POST /v1/token {}").await.get("grant").is_none(), "nobody is limited there");
}

#[tokio::test]
async fn a_token_holds_across_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::try_start_in(dir.path(), &[], Some("k")).unwrap();
    let answer = ok(&mut server.client(), "POST /v1/token {}").await;
    let query = format!("?access_token={}", answer["token"].as_str().unwrap());
    server.kill();
    let server = Server::try_start_in(dir.path(), &[], Some("k")).unwrap();
    let url = Target::new(&server.target.url(), None).unwrap();
    url.events(&query, None).await.expect("the same key, the same token");
    server.kill();
    let server = Server::try_start_in(dir.path(), &[], Some("another")).unwrap();
    let url = Target::new(&server.target.url(), None).unwrap();
    assert!(url.events(&query, None).await.is_err(), "another key");
}

#[tokio::test]
async fn pages_of_strangers_cannot_write_to_an_open_server() {
    let server = Server::start(&["--cors-origins", "https://app.example", "--allowed-hosts", "db.example"]);
    let c = &mut server.client();
    let own = format!("http://{}", server.target.url().strip_prefix("http://").unwrap());
    let rows = [
        ("PUT", vec![("origin", "https://evil.example")], 403),
        ("PUT", vec![("origin", "null")], 403),
        ("PUT", vec![("origin", "https://app.example")], 200),
        ("PUT", vec![("origin", own.as_str())], 200),
        ("PUT", vec![], 200),
        ("GET", vec![("origin", "https://evil.example")], 200),
        ("GET", vec![("host", "evil.example:9917")], 403),
        ("GET", vec![("host", "127.0.0.1.evil.example")], 403),
        ("GET", vec![("host", "db.example")], 200),
        ("GET", vec![("host", "localhost:1")], 200),
        // Parts of a page: a picture or an object of another site's, which would tell whether the key is there.
        ("GET", vec![("sec-fetch-site", "cross-site"), ("sec-fetch-dest", "object")], 403),
        ("GET", vec![("sec-fetch-site", "cross-site"), ("referer", "https://evil.example/")], 403),
        ("GET", vec![("sec-fetch-site", "cross-site"), ("referer", "https://app.example/a/b")], 200),
        ("GET", vec![("sec-fetch-site", "same-site"), ("sec-fetch-dest", "image")], 200),
        // Nor a window that is opened: a download leaves it readable.
        ("GET", vec![("sec-fetch-site", "cross-site"), ("sec-fetch-dest", "document")], 403),
        ("GET", vec![("sec-fetch-site", "cross-site"), ("origin", "https://evil.example")], 200),
    ];
    ok(c, r#"PUT /v1/state/a {"value":1}"#).await;
    for (method, headers, status) in rows {
        let body = if method == "PUT" { r#"{"value":1}"# } else { "" };
        let answer = c.send(method.parse().unwrap(), "/v1/state/a", &headers, body).await.unwrap();
        assert_eq!(answer.status.as_u16(), status, "{method} {headers:?}: {}", String::from_utf8_lossy(&answer.body));
    }
    // A backup costs, whoever looks at it.
    for headers in
        [[("origin", "https://evil.example"); 2], [("sec-fetch-site", "cross-site"), ("sec-fetch-dest", "document")]]
    {
        let answer = c.send("GET".parse().unwrap(), "/v1/admin/backup", &headers, "").await.unwrap();
        assert_eq!(answer.status, 403, "{headers:?}");
    }
}

#[tokio::test]
async fn limits_by_client_are_429_and_let_go() {
    let s = setup(&["--rate-limit", "5", "--max-streams-per-client", "2"]).await;
    let worker = target(&s.server, &s.worker);
    let c = &mut Client::new(&worker);
    let mut limited = None;
    for _ in 0..20 {
        let answer = call(c, "GET /v1/state/jobs/1").await;
        if answer.status == 429 {
            limited = Some(answer);
            break;
        }
    }
    let limited = limited.expect("20 requests at once are more than 5 a second");
    assert_eq!(limited.json().unwrap()["code"], "rate_limited");
    let wait: u64 = limited.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=2).contains(&wait));
    ok(&mut with_key(&s.server, &s.reader), "GET /v1/state/other").await;
    tokio::time::sleep(Duration::from_secs(wait)).await;
    ok(c, "GET /v1/state/jobs/1").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let first = worker.events("", None).await.unwrap();
    let _second = worker.events("", None).await.unwrap();
    let refused = worker.events("", None).await.expect_err("a third stream").to_string();
    assert!(refused.contains("429"), "{refused}");
    // What ends any other client's request for good ends an EventSource for good, too: it is told when to come back instead.
    let event_source = [("accept", "text/event-stream"), ("cache-control", "no-cache")];
    let told = c.send("GET".parse().unwrap(), "/v1/events", &event_source, "").await.unwrap();
    assert_eq!((told.status.as_u16(), &told.headers["content-type"]), (200, &"text/event-stream".parse().unwrap()));
    let text = String::from_utf8(told.body.to_vec()).unwrap();
    let retry_ms: u64 = text.strip_prefix("retry: ").unwrap().split('\n').next().unwrap().parse().unwrap();
    assert!((1000..5000).contains(&retry_ms) && text.ends_with("\n: 429 Too Many Requests\n\n"), "{text}");
    drop(first);
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        if worker.events("", None).await.is_ok() {
            return;
        }
    }
    panic!("the place of a stream that ended is not given back");
}

/// What a new connection is told, which may be before it has asked: a client of HTTP would be confused.
async fn told(server: &Server) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let authority = server.target.url().strip_prefix("http://").unwrap().to_owned();
    let mut socket = tokio::net::TcpStream::connect(authority).await.unwrap();
    socket.write_all(b"GET /v1/health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await.ok();
    let mut answer = Vec::new();
    timeout(Duration::from_secs(5), socket.read_to_end(&mut answer)).await.expect("it is answered and closed").ok();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn connections_of_one_address_are_limited() {
    let server = Server::start(&["--max-connections-per-address", "3"]);
    let mut clients: Vec<_> = (0..3).map(|_| server.client()).collect();
    for c in &mut clients {
        ok(c, "GET /v1/health").await;
    }
    assert!(told(&server).await.starts_with("HTTP/1.1 429 "), "the fourth");
    clients.pop();
    for _ in 0..100 {
        if told(&server).await.starts_with("HTTP/1.1 200 ") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the place of a connection that ended is not given back");
}

/// Refusals and what is done to the server are told in JSON; secrets, tokens and queries are not.
#[tokio::test]
async fn the_audit_tells_who_and_what_and_no_secret() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut command = Command::new(BINARY);
    command.args(["serve", "--port", "0", "--data-dir"]).arg(dir.path().join("data")).env("API_KEY", "s3cret");
    command.env("RUST_LOG", "trace").stderr(std::fs::File::create(&log).unwrap());
    let (server, url) = common::serving(command);
    let open = &mut Client::new(&Target::new(&url, Some("wr0ng".into())).unwrap());
    assert_eq!(call(open, "GET /v1/state?prefix=qu3ry").await.status, 401);
    assert_eq!(call(open, "GET /v1/events?access_token=t0ken").await.status, 401);
    let c = &mut Client::new(&Target::new(&url, Some("s3cret".into())).unwrap());
    ok(c, "POST /v1/admin/snapshot").await;
    ok(c, "GET /v1/state?prefix=qu3ry").await;
    drop(server);
    let text = std::fs::read_to_string(&log).unwrap();
    for hidden in ["s3cret", "wr0ng", "qu3ry", "t0ken"] {
        assert!(!text.contains(hidden), "{hidden} is in the log");
    }
    let lines: Vec<serde_json::Value> =
        text.lines().filter(|l| l.contains("\"audit\"")).map(|l| serde_json::from_str(l).unwrap()).collect();
    let told: Vec<_> = lines.iter().map(|l| (l["fields"]["action"].as_str(), l["fields"]["route"].as_str())).collect();
    assert_eq!(
        told,
        [
            (Some("refused"), Some("/v1/state")),
            (Some("refused"), Some("/v1/events")),
            (Some("admin"), Some("/v1/admin/snapshot"))
        ],
        "{text}"
    );
}

/// What would break is a browser or client that speaks HTTPS, and a renewed certificate that needs a restart.
#[test]
fn tls_serves_both_protocols_and_takes_over_a_new_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let make = |name: &str| {
        let subject = format!("/CN={name}");
        let output = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"])
            .args(["-subj", &subject, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&cert)
            .output()
            .expect("openssl is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    make("first");
    let (cert_text, key_text) = (cert.to_str().unwrap().to_owned(), key.to_str().unwrap().to_owned());
    let server = Server::start_in(&dir.path().join("data"), &["--tls-cert", &cert_text, "--tls-key", &key_text]);
    let url = server.banner.split_whitespace().find(|w| w.starts_with("https://")).unwrap().to_owned();
    let curl = |arguments: &[&str]| {
        let output =
            Command::new("curl").args(["-s", "--max-time", "5", "--cacert", &cert_text]).args(arguments).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    for (version, shown) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let body = r#"{"value":1}"#;
        let got = curl(&[
            version,
            "-w",
            " %{http_version} %{http_code}",
            "-X",
            "PUT",
            "-d",
            body,
            &format!("{url}/v1/state/a"),
        ]);
        assert!(got.starts_with(r#"{"key":"a""#) && got.contains(&format!(" {shown} 20")), "{got}");
        let stream = curl(&[version, "-N", "--max-time", "1", &format!("{url}/v1/events?since=0")]);
        assert!(stream.starts_with("retry: 1000\nid: 0\n\nevent: state_updated\n"), "{stream}");
    }
    // Refused before it is read: closed at once, the connection would be reset and the answer lost.
    let large = dir.path().join("large");
    std::fs::write(&large, vec![b'x'; 5 << 20]).unwrap();
    let upload = format!("@{}", large.display());
    let nowhere = format!("{url}/nowhere");
    for _ in 0..10 {
        let got = curl(&["--http1.1", "-H", "Expect:", "-w", " %{http_code}", "--data-binary", &upload, &nowhere]);
        assert!(got.contains("route_not_found") && got.ends_with(" 404"), "{got:?}");
    }
    make("second");
    let authority = url.strip_prefix("https://").unwrap().to_owned();
    let is_new = || {
        let script =
            format!("openssl s_client -connect {authority} </dev/null 2>/dev/null | openssl x509 -noout -subject");
        let shown = Command::new("sh").args(["-c", &script]).output().unwrap();
        String::from_utf8_lossy(&shown.stdout).contains("second")
    };
    for _ in 0..150 {
        if is_new() {
            assert!(curl(&[&format!("{url}/v1/health")]).contains("\"ok\""));
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("the new certificate is not taken over");
}
