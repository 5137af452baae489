//! What strangers send: each must be refused or bounded, and the server must go on as if nothing had been. What would break is
//! somebody else's request.
//!
//! Inputs that only a limit of an endpoint refuses stand in the tables of `tests/http.rs`. What takes a minute of waiting runs with
//! `KISS_LONG=1`.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{BINARY, Duration, Server, call, ok, timeout};
use kiss_vdb::client::{Client, Target};
use serde_json::json;
use std::process::Command;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn connect(target: &Target) -> TcpStream {
    TcpStream::connect(target.url().strip_prefix("http://").unwrap()).await.unwrap()
}

/// What the server says to these bytes until it closes, or has been silent for a while. Whether it closed.
async fn say(target: &Target, bytes: &[u8]) -> (String, bool) {
    let mut socket = connect(target).await;
    // It may close before all is sent.
    socket.write_all(bytes).await.ok();
    let mut answer = Vec::new();
    loop {
        match timeout(Duration::from_secs(1), socket.read_buf(&mut answer)).await {
            Ok(Ok(0) | Err(_)) => return (String::from_utf8_lossy(&answer).into_owned(), true),
            Ok(Ok(_)) => {}
            Err(_) => return (String::from_utf8_lossy(&answer).into_owned(), false),
        }
    }
}

async fn wait_for_connections(c: &mut Client, are_enough: impl Fn(f64) -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let metrics = String::from_utf8_lossy(&call(c, "GET /v1/metrics").await.body).into_owned();
        let open = metrics.lines().find_map(|line| line.strip_prefix("kiss_connections ")).unwrap();
        if are_enough(open.parse().unwrap()) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{open} connections");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Requests that two readers could take for different ones must not be answered as if they were clear: a second request hidden in
/// the first would pass a proxy unseen.
#[tokio::test]
async fn requests_that_can_be_read_in_two_ways_are_refused() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let hidden = "PUT /v1/state/hidden HTTP/1.1\r\nhost: h\r\ncontent-length: 11\r\n\r\n{\"value\":1}";
    let with = |headers: &str, body: &str| format!("POST /v1/events HTTP/1.1\r\nhost: h\r\n{headers}\r\n\r\n{body}");
    let rows = [
        ("length and chunks", with("content-length: 4\r\ntransfer-encoding: chunked", &format!("0\r\n\r\n{hidden}"))),
        ("chunks and length", with("transfer-encoding: chunked\r\ncontent-length: 4", &format!("0\r\n\r\n{hidden}"))),
        ("two lengths", with("content-length: 0\r\ncontent-length: 5", hidden)),
        ("a list of lengths", with("content-length: 0, 5", hidden)),
        ("a length with a sign", with("content-length: +0", hidden)),
        ("a negative length", with("content-length: -1", hidden)),
        ("a length beyond 64 bits", with("content-length: 18446744073709551616", hidden)),
        ("a length in hexadecimal", with("content-length: 0x0", hidden)),
        ("a space before the colon", with("transfer-encoding : chunked", &format!("0\r\n\r\n{hidden}"))),
        ("chunked not last", with("transfer-encoding: chunked, identity", &format!("0\r\n\r\n{hidden}"))),
        ("a coding nobody knows", with("transfer-encoding: xchunked", &format!("0\r\n\r\n{hidden}"))),
        ("a folded header", with("transfer-encoding:\r\n chunked", &format!("0\r\n\r\n{hidden}"))),
        ("a chunk size beyond 64 bits", with("transfer-encoding: chunked", &format!("10000000000000000\r\n{hidden}"))),
        ("a chunk size that is none", with("transfer-encoding: chunked", &format!("xyz\r\n{hidden}"))),
        ("a zero byte in a header", with("x: a\0b\r\ncontent-length: 0", hidden)),
        ("a bare carriage return", with("x: a\rcontent-length: 0", hidden)),
        ("two hosts", format!("GET /v1/health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n{hidden}")),
        ("no version", format!("GET /v1/health\r\n\r\n{hidden}")),
        ("a version nobody knows", format!("GET /v1/health HTTP/9.9\r\nhost: h\r\n\r\n{hidden}")),
    ];
    for (name, request) in rows {
        let (answer, _) = say(&server.target, request.as_bytes()).await;
        let is_refused = answer.is_empty() || answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 4");
        assert!(is_refused, "{name}: {answer}");
        let found = call(c, "GET /v1/state/hidden").await.status;
        // After two readable hosts the next request is one of its own, which is no trick.
        if name != "two hosts" {
            assert_eq!(found, 404, "{name}: the hidden request was taken: {answer}");
        }
        call(c, "DELETE /v1/state/hidden").await;
    }
    // What is no request is told why, and behind what was answered before.
    for (name, request) in [
        ("a space in the address", "GET /v1/state/a b HTTP/1.1\r\nhost: h\r\n\r\n"),
        ("a byte that has to be encoded", "GET /v1/state/a<b HTTP/1.1\r\nhost: h\r\n\r\n"),
        ("a name with a space", "GET /v1/health HTTP/1.1\r\nho st: h\r\n\r\n"),
        ("TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03"),
    ] {
        let before = "GET /v1/health HTTP/1.1\r\nhost: h\r\n\r\n";
        let (answer, is_closed) = say(&server.target, format!("{before}{request}").as_bytes()).await;
        let refusal = answer.split_once("HTTP/1.1 400").unwrap_or_else(|| panic!("{name}: {answer}")).1;
        assert!(answer.starts_with("HTTP/1.1 200") && is_closed, "{name}: {answer}");
        assert!(
            refusal.contains("problem+json") && refusal.contains("\"code\":\"invalid_argument\""),
            "{name}: {answer}"
        );
    }
    // Nobody unpacks it.
    let packed = "PUT /v1/state/a HTTP/1.1\r\nhost: h\r\nconnection: close\r\ntransfer-encoding: gzip, chunked\r\n\r\n1\r\n1\r\n0\r\n\r\n";
    let (answer, _) = say(&server.target, packed.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 415"), "{answer}");
}

/// A body that ends early must not be taken for a whole one.
#[tokio::test]
async fn bodies_cut_short_write_nothing() {
    let server = Server::start(&[]);
    let chunked = "PUT /v1/state/a HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n";
    let plain = "PUT /v1/state/a HTTP/1.1\r\nhost: h\r\ncontent-type: text/plain\r\ncontent-length: 100\r\n\r\n";
    for request in [
        format!("{chunked}b\r\n{{\"value\":1}}\r\n"),
        format!("{chunked}b\r\n{{\"value\":1}}"),
        format!("{chunked}ff\r\n{{\"value\":1}}\r\n0\r\n\r\n"),
        format!("{plain}only this"),
    ] {
        let mut socket = connect(&server.target).await;
        socket.write_all(request.as_bytes()).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(5), socket.read_to_string(&mut answer)).await.expect("it is answered").ok();
        assert!(!answer.starts_with("HTTP/1.1 2"), "{request}: {answer}");
    }
    assert_eq!(ok(&mut server.client(), "GET /v1/health").await["revision"], 0, "nothing was written");
}

#[tokio::test]
async fn heads_have_a_size_and_names_in_paths_are_names() {
    let server = Server::start(&[]);
    let long = |n: usize| "x".repeat(n);
    let rows = [
        ("a head of 300 KiB", format!("GET /v1/health HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n", long(300 << 10))),
        ("500 headers", format!("GET /v1/health HTTP/1.1\r\nhost: h\r\n{}\r\n", "a: b\r\n".repeat(500))),
        ("an address of 100 KiB", format!("GET /v1/state/{} HTTP/1.1\r\nhost: h\r\n\r\n", long(100 << 10))),
        ("a method of 10 KiB", format!("{} / HTTP/1.1\r\nhost: h\r\n\r\n", long(10 << 10))),
        ("no request at all", "\0\u{1}\u{2}\r\n\r\n".into()),
        ("TLS to a plain port", "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0".into()),
    ];
    for (name, request) in rows {
        let (answer, _) = say(&server.target, request.as_bytes()).await;
        assert!(!answer.starts_with("HTTP/1.1 2"), "{name}: {answer}");
    }
    let c = &mut server.client();
    for (path, status) in [
        ("/v1/state/%00", 400),
        ("/v1/state/a%0ab", 400),
        ("/v1/state/%ff", 400),
        ("/v1/state/%c0%af", 400),
        ("/v1/state/%ed%a0%80", 400),
        ("/v1/state/..%2F..%2Fetc%2Fpasswd", 404),
        ("/v1/state/../../etc/passwd", 404),
        ("/v1/vector/..", 400),
        ("/v1/vector/%2e%2e", 400),
        ("/v1/vector/..%2Flog", 400),
        ("/v1/vector/a%00b", 400),
        ("/v1/vector/.hidden", 400),
        ("/v1/vector/a%5Cb", 400),
        ("/console/../v1/state", 404),
        ("//v1/state", 404),
        ("/v1/state/", 400),
    ] {
        let answer = c.send("GET".parse().unwrap(), path, &[], "").await.unwrap();
        assert_eq!(answer.status.as_u16(), status, "{path}: {}", String::from_utf8_lossy(&answer.body));
    }
    // What looks like a way out of the data directory is a key like any other, and no file.
    ok(c, r#"PUT /v1/state/..%2F..%2Fescape {"value":1}"#).await;
    assert_eq!(ok(c, "GET /v1/state").await["items"][0]["key"], "../../escape");
    assert!(!server.dir.join("../../escape").exists());
}

/// Deep, long and odd JSON costs its sender a 400 and the server nothing.
#[tokio::test]
async fn json_bombs_are_refused_at_once() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"POST /v1/vector/v {"dim":2,"metric":"cosine"}"#).await;
    ok(c, r#"POST /v1/vector/v/add {"id":"a","vector":[1,2],"meta":{"n":1}}"#).await;
    let deep = |open: &str, close: &str, n: usize| format!("{}{}", open.repeat(n), close.repeat(n));
    let filter = |text: &str| format!("{{\"vector\":[1,2],\"filters\":{text}}}");
    let wide: Vec<_> = (0..2000).map(|n| format!("{{\"n\":{n}}}")).collect();
    let rows = [
        ("a million brackets", "PUT", "/v1/state/a", format!("{{\"value\":{}}}", deep("[", "]", 1_000_000))),
        ("a million that never close", "PUT", "/v1/state/a", format!("{{\"value\":{}", "[".repeat(1_000_000))),
        ("deep objects", "PUT", "/v1/state/a", format!("{{\"value\":{}1{}}}", "{\"a\":".repeat(200), "}".repeat(200))),
        ("a deep patch", "PATCH", "/v1/state/a", format!("{}1{}", "{\"a\":".repeat(200), "}".repeat(200))),
        ("a number no float holds", "POST", "/v1/vector/v/add", r#"{"id":"x","vector":[1e39,1]}"#.into()),
        ("not a number", "POST", "/v1/vector/v/add", r#"{"id":"x","vector":[NaN,1]}"#.into()),
        ("infinity", "POST", "/v1/vector/v/add", r#"{"id":"x","vector":[1e400,1]}"#.into()),
        ("NaN in base64", "POST", "/v1/vector/v/add", r#"{"id":"x","vector_base64":"AADAfwAAgD8="}"#.into()),
        ("half a float", "POST", "/v1/vector/v/add", r#"{"id":"x","vector_base64":"AAAA"}"#.into()),
        ("nothing at all", "POST", "/v1/vector/v/add", r#"{"id":"x","vector":[0,0]}"#.into()),
        ("k 0", "POST", "/v1/vector/v/search", r#"{"vector":[1,2],"k":0}"#.into()),
        ("k 1001", "POST", "/v1/vector/v/search", r#"{"vector":[1,2],"k":1001}"#.into()),
        ("k negative", "POST", "/v1/vector/v/search", r#"{"vector":[1,2],"k":-1}"#.into()),
        ("k beyond 64 bits", "POST", "/v1/vector/v/search", r#"{"vector":[1,2],"k":99999999999999999999}"#.into()),
        ("k and a half", "POST", "/v1/vector/v/search", r#"{"vector":[1,2],"k":1.5}"#.into()),
        ("offset", "POST", "/v1/vector/v/search", r#"{"vector":[1,2],"offset":18446744073709551615}"#.into()),
        ("dim 0", "POST", "/v1/vector/w", r#"{"dim":0,"metric":"l2"}"#.into()),
        ("dim 8193", "POST", "/v1/vector/w", r#"{"dim":8193,"metric":"l2"}"#.into()),
        ("dim negative", "POST", "/v1/vector/w", r#"{"dim":-3,"metric":"l2"}"#.into()),
        ("a deep filter", "POST", "/v1/vector/v/search", filter(&deep("{\"$not\":", "}", 60).replace(":}", ":{}}"))),
        ("a wide filter", "POST", "/v1/vector/v/search", filter(&format!("{{\"$or\":[{}]}}", wide.join(",")))),
        (
            "a long list",
            "POST",
            "/v1/vector/v/search",
            filter(&format!("{{\"n\":{{\"$in\":{:?}}}}}", (0..5000).collect::<Vec<_>>())),
        ),
        ("an unknown operator", "POST", "/v1/vector/v/search", filter(r#"{"n":{"$where":"1"}}"#)),
        ("a path of dots", "POST", "/v1/vector/v/search", filter(&format!("{{\"{}\":1}}", "a.".repeat(5000)))),
    ];
    for (name, method, path, body) in rows {
        let answer = timeout(Duration::from_secs(5), c.call(method.parse().unwrap(), path, body)).await;
        let answer = answer.unwrap_or_else(|_| panic!("{name}: no answer in time")).unwrap();
        assert_eq!(answer.status, 400, "{name}: {}", String::from_utf8_lossy(&answer.body));
    }
    // A number that no float holds is fine where it is only kept.
    ok(c, r#"PUT /v1/state/n {"value":1e999}"#).await;
    let raw = call(c, "GET /v1/state/n?raw=true").await;
    assert_eq!(&raw.body[..], b"1e999");
}

/// Collections cost memory before they hold anything: a million of them is a budget's affair.
#[tokio::test]
async fn collections_and_keys_without_end_meet_the_budget() {
    let server = Server::start(&["--max-memory-mb", "2"]);
    let c = &mut server.client();
    let mut made = 0;
    while call(c, &format!("POST /v1/vector/c{made} {{\"dim\":1,\"metric\":\"l2\"}}")).await.status == 201 {
        made += 1;
        assert!(made < 1000, "2 MiB hold no thousand collections");
    }
    let refused = call(c, &format!("POST /v1/vector/c{made} {{\"dim\":1,\"metric\":\"l2\"}}")).await;
    assert_eq!((refused.status.as_u16(), &refused.json().unwrap()["code"]), (507, &json!("storage_full")));
    ok(c, "DELETE /v1/vector/c0").await;
    let mut keys = 0;
    while call(c, &format!("PUT /v1/state/k{keys} {{\"value\":{{\"n\":{keys}}}}}")).await.status == 201 {
        keys += 1;
        assert!(keys < 100_000, "2 MiB hold no hundred thousand keys");
    }
    assert_eq!(call(c, &format!("PUT /v1/state/k{keys} {{\"value\":1}}")).await.status, 507);
    assert_eq!(call(c, "GET /v1/state/k0").await.status, 200);
    ok(c, "DELETE /v1/state/k0").await;
    assert_eq!(call(c, &format!("PUT /v1/state/k{keys} {{\"value\":1}}")).await.status, 201, "there is room again");
}

/// More connections than files: the rest is refused, those inside go on, and afterwards all is as before.
#[tokio::test]
async fn more_connections_than_files_are_refused_and_nobody_else_notices() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    let serve = format!("ulimit -n 256 && exec {BINARY} serve --port 0 --data-dir {}", dir.path().display());
    command.args(["-c", &serve]).env("RUST_LOG", "error");
    let (_server, url) = common::serving(command);
    let target = Target::new(&url, None).unwrap();
    let inside = &mut Client::new(&target);
    ok(inside, r#"PUT /v1/state/a {"value":1}"#).await;
    // Collections hold files open: they end before connections and the log have none.
    for n in 0.. {
        let answer = call(inside, &format!("POST /v1/vector/c{n} {{\"dim\":1,\"metric\":\"l2\"}}")).await;
        if answer.status == 507 {
            assert_eq!(n, 32, "an eighth of 256");
            break;
        }
    }
    let mut held = Vec::new();
    let mut refused = 0;
    for _ in 0..400 {
        let mut socket = connect(&target).await;
        socket.write_all(b"GET /v1/health HTTP/1.1\r\nhost: h\r\n\r\n").await.ok();
        let mut answer = [0; 12];
        match timeout(Duration::from_secs(5), socket.read_exact(&mut answer)).await {
            Ok(Ok(_)) if &answer == b"HTTP/1.1 200" => held.push(socket),
            _ => refused += 1,
        }
    }
    assert!(refused > 200, "{refused} of 400 refused with 256 files");
    assert!(held.len() > 40, "{} served", held.len());
    ok(inside, r#"PUT /v1/state/a {"value":2}"#).await;
    drop(held);
    for _ in 0..100 {
        let answer = Client::new(&target).call("GET".parse().unwrap(), "/v1/health", "").await;
        if answer.is_ok_and(|answer| answer.status == 200) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("new connections are refused though the others are gone");
}

/// A flood of connections that are refused must not take the files that the log's next segment needs.
#[tokio::test]
async fn a_flood_of_connections_leaves_the_log_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    let serve =
        format!("ulimit -n 400 && exec {BINARY} serve --port 0 --max-log-mb 8 --max-connections-per-address 10");
    command.args(["-c", &format!("{serve} --data-dir {}", dir.path().display())]).env("RUST_LOG", "error");
    let (_server, url) = common::serving(command);
    let target = Target::new(&url, None).unwrap();
    let c = &mut Client::new(&target);
    ok(c, r#"PUT /v1/state/a {"value":1}"#).await;
    let flood = tokio::spawn(async move {
        let mut held = Vec::new();
        for _ in 0..2000 {
            held.push(connect(&target).await);
            if held.len() > 600 {
                held.remove(0);
            }
        }
    });
    let filler = format!(r#"{{"type":"log","data":"{}"}}"#, "x".repeat(256 << 10));
    let mut written = 0;
    while !flood.is_finished() || written < 40 {
        ok(c, &format!("POST /v1/events {filler}")).await;
        written += 1;
    }
    assert_eq!(ok(c, "GET /v1/health").await["status"], "ok", "segments followed each other meanwhile");
}

/// Hundreds who send a byte now and then keep nobody waiting; with `KISS_LONG` they are seen to be cut off.
#[tokio::test]
async fn slow_heads_bodies_and_readers_are_borne_and_then_cut() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"PUT /v1/state/a {"value":1}"#).await;
    let mut slow = Vec::new();
    for n in 0..300 {
        let mut socket = connect(&server.target).await;
        let part: &[u8] = match n % 3 {
            0 => b"GET /v1/health HTTP/1.1\r\nhost: h\r\nx: ",
            1 => b"PUT /v1/state/slow HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n{",
            _ => b"G",
        };
        socket.write_all(part).await.unwrap();
        slow.push(socket);
    }
    // Who is about to speak HTTP/2, and who does but asks for nothing.
    let mut silent = Vec::new();
    for part in [&b"PRI * HTTP/2.0\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"] {
        let mut socket = connect(&server.target).await;
        socket.write_all(part).await.unwrap();
        silent.push(socket);
    }
    // A stream whose reader never reads.
    let mut stuck = connect(&server.target).await;
    stuck.write_all(b"GET /v1/events?since=0 HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
    // Another takes a little now and then, through a window smaller than what is sent at a time.
    let little = tokio::net::TcpSocket::new_v4().unwrap();
    little.set_recv_buffer_size(8192).unwrap();
    let address = server.target.url().strip_prefix("http://").unwrap().parse().unwrap();
    let mut little = little.connect(address).await.unwrap();
    little.write_all(b"GET /v1/events?since=0 HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
    let filler = format!(r#"{{"type":"log","data":"{}"}}"#, "x".repeat(1 << 20));
    for _ in 0..12 {
        ok(c, &format!("POST /v1/events {filler}")).await;
    }
    timeout(Duration::from_secs(2), ok(c, "GET /v1/state/a")).await.expect("others are served meanwhile");
    if std::env::var("KISS_LONG").is_err() {
        return;
    }
    let deadline = std::time::Instant::now() + Duration::from_secs(100);
    let mut open = slow.len();
    while open > 0 && std::time::Instant::now() < deadline {
        // They go on sending a byte at a time: that must not count as life.
        for socket in &mut slow {
            socket.write_all(b"a").await.ok();
        }
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(250)).await;
            little.read_exact(&mut [0; 500]).await.expect("whoever takes something is not cut");
        }
        open = 0;
        for socket in &slow {
            // Behind what it was told first comes the end.
            let mut told = [0; 4096];
            let closed = loop {
                match socket.try_read(&mut told) {
                    Ok(0) => break true,
                    Ok(_) => {}
                    Err(error) => break error.kind() != std::io::ErrorKind::WouldBlock,
                }
            };
            open += usize::from(!closed);
        }
    }
    assert_eq!(open, 0, "slow senders still have their connection");
    for mut socket in silent {
        let mut told = Vec::new();
        let ended = socket.read_to_end(&mut told);
        timeout(Duration::from_secs(30), ended).await.expect("one that asks for nothing is still connected").ok();
    }
    loop {
        let metrics = call(c, "GET /v1/metrics").await;
        if String::from_utf8_lossy(&metrics.body).contains("kiss_streams 1.0") {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "the stuck reader is not cut");
        little.read_exact(&mut [0; 500]).await.expect("whoever takes something is not cut");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Who asks for much and reads nothing would otherwise fill the memory: a page of 32 MiB for each connection.
#[tokio::test]
async fn large_answers_that_nobody_reads_are_bounded_and_small_ones_pass() {
    let server = Server::start(&[]);
    let c = &mut server.client();
    let value = "x".repeat(1 << 20);
    for n in 0..32 {
        ok(c, &format!(r#"PUT /v1/state/large/{n} {{"value":"{value}"}}"#)).await;
    }
    let page = "GET /v1/state?prefix=large/";
    // As the loop of our own answers, and as hyper does.
    for rest in [
        " HTTP/1.1\r\nhost: h\r\n\r\n",
        " HTTP/1.0\r\n\r\n",
        " HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        let mut readers = Vec::new();
        let mut answer = call(c, page).await;
        while answer.status == 200 {
            assert!(readers.len() < 9, "256 MiB are eight pages: {rest:?}");
            let mut socket = connect(&server.target).await;
            socket.write_all(format!("{page}{rest}").as_bytes()).await.unwrap();
            // Its first bytes tell that it is made.
            socket.read_exact(&mut [0; 12]).await.unwrap();
            readers.push(socket);
            answer = call(c, page).await;
        }
        assert!(readers.len() > 5, "{} readers had a page", readers.len());
        assert_eq!((answer.status.as_u16(), &answer.json().unwrap()["code"]), (503, &json!("overloaded")));
        assert_eq!(answer.headers["retry-after"], "1");
        // A value in JSON is sent from where it is, and takes no memory.
        assert_eq!(ok(c, "GET /v1/state/large/1").await["value"], value);
        ok(c, "GET /v1/state?prefix=large/&keys_only=true").await;
        ok(c, r#"PUT /v1/state/small {"value":{}}"#).await;
        ok(c, r#"PATCH /v1/state/small {"a":1}"#).await;
        ok(c, r#"POST /v1/batch {"ops":[{"op":"patch","key":"small","patch":{"b":2}}]}"#).await;
        drop(readers);
        while call(c, page).await.status == 503 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // What one search would carry has a limit of its own: few vectors stand in the answer to each of many queries.
    ok(c, r#"POST /v1/vector/v {"dim":2,"metric":"l2"}"#).await;
    let text = "x".repeat(60_000);
    for n in 0..20 {
        ok(c, &format!(r#"POST /v1/vector/v/add {{"id":"{n}","vector":[{n},1],"meta":{{"t":"{text}"}}}}"#)).await;
    }
    let query = r#"{"vector":[1,1],"k":20,"include_meta":true}"#;
    let queries =
        |count: usize| format!(r#"POST /v1/vector/v/search {{"queries":[{}]}}"#, vec![query; count].join(","));
    ok(c, &queries(10)).await;
    let refused = call(c, &queries(120)).await;
    assert_eq!(refused.status, 400, "{:?}", refused.json());
}

/// However a request is cut into packets, and whatever came before it on its connection, it is answered the same.
#[tokio::test]
async fn requests_in_pieces_and_in_a_row_are_answered_in_order() {
    let server = Server::start(&[]);
    ok(&mut server.client(), r#"PUT /v1/state/a {"value":1}"#).await;
    let put = "PUT /v1/state/b HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{\"value\":2}";
    for at in 0..put.len() {
        let mut socket = connect(&server.target).await;
        socket.set_nodelay(true).unwrap();
        socket.write_all(&put.as_bytes()[..at]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
        socket.write_all(&put.as_bytes()[at..]).await.unwrap();
        let mut answer = [0; 15];
        timeout(Duration::from_secs(5), socket.read_exact(&mut answer)).await.expect("it is answered").unwrap();
        assert_eq!(
            String::from_utf8_lossy(&answer),
            if at == 0 { "HTTP/1.1 201 Cre" } else { "HTTP/1.1 200 OK" }[..15],
            "cut at {at}"
        );
    }
    // What comes whole, what does not, what is refused, and a stream at last: one packet.
    let chunked = "PUT /v1/state/c HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nb\r\n{\"value\":3}\r\n0\r\n\r\n";
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: h\r\n\r\n");
    let big = format!(
        "PUT /v1/state/d HTTP/1.1\r\nhost: h\r\ncontent-type: text/plain\r\ncontent-length: 100000\r\n\r\n{}",
        "x".repeat(100_000)
    );
    for other in ["", chunked, &big] {
        let row =
            [&get("/v1/state/a"), put, &get("/v1/state/none"), other, &get("/v1/state/b"), &get("/v1/events?since=0")]
                .concat();
        let (answer, is_closed) = say(&server.target, row.as_bytes()).await;
        let statuses: Vec<&str> = answer.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
        let expected = if other.is_empty() {
            &["200", "200", "404", "200", "200"][..]
        } else {
            &["200", "200", "404", "2xx", "200", "200"]
        };
        assert!(statuses.iter().zip(expected).all(|(a, b)| a == b || *b == "2xx" && a.starts_with('2')), "{answer}");
        assert_eq!(statuses.len(), expected.len(), "{answer}");
        assert!(answer.contains("text/event-stream") && answer.contains("\nid: 1\n") && !is_closed, "{answer}");
    }
    let (answer, is_closed) =
        say(&server.target, get("/v1/state/a").replace("host", "connection: close\r\nhost").as_bytes()).await;
    assert!(answer.contains("connection: close") && answer.ends_with('}') && is_closed, "{answer}");
}

/// Who sends its requests and then closes its side is answered all the same, but a long poll does not outlive it.
#[tokio::test]
async fn an_end_behind_requests_takes_none_of_them_back() {
    let server = Server::start(&[]);
    let put = |n| {
        format!("PUT /v1/state/row:{n} HTTP/1.1\r\nhost: h\r\ncontent-type: text/plain\r\ncontent-length: 1\r\n\r\nx")
    };
    for count in [1, 10] {
        let mut socket = connect(&server.target).await;
        socket.write_all((0..count).map(put).collect::<String>().as_bytes()).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(5), socket.read_to_string(&mut answer)).await.expect("it ends").unwrap();
        assert_eq!(answer.matches("HTTP/1.1 20").count(), count, "{answer}");
    }
    let mut gone = connect(&server.target).await;
    gone.write_all(b"GET /v1/events?since=99&wait_ms=60000 HTTP/1.1\r\nhost: h\r\naccept: application/json\r\n\r\n")
        .await
        .unwrap();
    gone.shutdown().await.unwrap();
    timeout(Duration::from_secs(10), gone.read_to_end(&mut Vec::new())).await.expect("it ends").unwrap();
}

/// One or two bytes and an end, which could still become another protocol, cost nothing once they are gone.
#[tokio::test]
async fn connections_that_said_next_to_nothing_are_let_go() {
    let server = Server::start(&[]);
    for _ in 0..500 {
        connect(&server.target).await.write_all(b"P").await.unwrap();
    }
    let mut late = connect(&server.target).await;
    late.write_all(b"PR").await.unwrap();
    let c = &mut server.client();
    wait_for_connections(c, |open| open <= 2.0).await;
    // Who is only slow is still understood.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    late.write_all(b"OPFIND / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(Duration::from_secs(5), late.read_to_string(&mut answer)).await.expect("it ends").unwrap();
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
}

/// What was begun before a stop is answered, whoever is about to take it over at that moment.
#[tokio::test]
async fn half_requests_at_a_stop_are_answered_once_they_are_whole() {
    let server = Server::start(&[]);
    let head = "PUT /v1/state/a HTTP/1.1\r\nhost: h\r\ncontent-type: text/plain\r\ncontent-length: 10\r\n\r\nhalf ";
    let mut begun = Vec::new();
    for _ in 0..12 {
        let mut socket = connect(&server.target).await;
        socket.write_all(head.as_bytes()).await.unwrap();
        begun.push(socket);
    }
    wait_for_connections(&mut server.client(), |open| open >= 13.0).await;
    // And until what they said is read.
    tokio::time::sleep(Duration::from_secs(1)).await;
    server.signal(rustix::process::Signal::TERM);
    // Until it has heard of it.
    while TcpStream::connect(server.target.url().strip_prefix("http://").unwrap()).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // One half at once, the other when it has become hyper's.
    for (n, socket) in begun.iter_mut().enumerate() {
        if n == 6 {
            tokio::time::sleep(Duration::from_millis(1500)).await;
        }
        socket.write_all(b"whole").await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(5), socket.read_to_string(&mut answer)).await.expect("it ends").ok();
        assert!(answer.starts_with("HTTP/1.1 20") && answer.contains("connection: close"), "{n}: {answer:?}");
    }
    assert!(server.stop());
}

/// A request that had come before the stop is answered, though its connection hears of both at once.
#[tokio::test]
async fn requests_that_have_come_at_a_stop_are_answered() {
    use rustix::process::Signal;
    let server = Server::start(&[]);
    let get = b"GET /v1/health HTTP/1.1\r\nhost: h\r\n\r\n";
    let mut sockets = Vec::new();
    for _ in 0..32 {
        let mut socket = connect(&server.target).await;
        socket.write_all(get).await.unwrap();
        assert!(socket.read(&mut [0; 4096]).await.unwrap() > 0);
        sockets.push(socket);
    }
    server.signal(Signal::STOP);
    for socket in &mut sockets {
        socket.write_all(get).await.unwrap();
    }
    server.signal(Signal::TERM);
    server.signal(Signal::CONT);
    for (n, socket) in sockets.iter_mut().enumerate() {
        let mut answer = String::new();
        timeout(Duration::from_secs(5), socket.read_to_string(&mut answer)).await.expect("it ends").ok();
        assert!(answer.starts_with("HTTP/1.1 "), "{n}: {answer:?}");
    }
    assert!(server.stop());
}

/// Room for bodies is for those that are read: a long poll that announces one must not keep others from theirs.
#[tokio::test]
async fn bodies_that_nobody_reads_take_no_room() {
    let server = Server::start(&[]);
    let poll = b"GET /v1/events?wait_ms=60000 HTTP/1.1\r\nhost: h\r\naccept: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut polls = Vec::new();
    for _ in 0..8 {
        let mut socket = connect(&server.target).await;
        socket.write_all(poll).await.unwrap();
        polls.push(socket);
    }
    let c = &mut server.client();
    wait_for_connections(c, |open| open >= 9.0).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let large = "x".repeat(100_000);
    let put = format!(r#"PUT /v1/state/large {{"value":"{large}"}}"#);
    timeout(Duration::from_secs(4), ok(c, &put)).await.expect("it does not wait for them");
}

/// Whoever is refused by the head alone keeps the answer, and the connection where its body is short; else it is told.
#[tokio::test]
async fn a_refusal_before_the_body_costs_no_answer_and_no_connection() {
    let server = Server::start(&[]);
    let head = |fields: &str| format!("PUT /v1/state/a?no=1 HTTP/1.1\r\nhost: h\r\n{fields}\r\n\r\n");
    let then = "GET /v1/health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
    let long = "x".repeat(300_000);
    for (name, fields, parts, goes_on) in [
        ("chunks", "transfer-encoding: chunked", &["4\r\n", "null\r\n0\r\n\r\n", then][..], true),
        ("a length", "content-length: 65536", &[&long[..100], &long[..65436], then], true),
        ("long", "content-length: 300000", &[&long[..100]], false),
        ("long chunks", "transfer-encoding: chunked", &["20000\r\n", &long[..0x20000], "\r\n"], false),
        ("asks first", "content-length: 4\r\nexpect: 100-continue", &[], false),
    ] {
        let mut socket = connect(&server.target).await;
        for part in [&head(fields)[..]].iter().chain(parts) {
            // It may be closed already.
            socket.write_all(part.as_bytes()).await.ok();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut answer = Vec::new();
        timeout(Duration::from_secs(5), socket.read_to_end(&mut answer)).await.expect("it ends").ok();
        let answer = String::from_utf8(answer).unwrap();
        let (refusal, rest) = answer.split_once("\r\n\r\n").unwrap();
        assert!(refusal.starts_with("HTTP/1.1 400"), "{name}: {answer}");
        assert_eq!(refusal.contains("connection: close"), !goes_on, "{name}: {answer}");
        assert_eq!(rest.contains("\"status\":\"ok\""), goes_on, "{name}: {answer}");
    }
    // Whoever asks first and is let in keeps the connection too.
    let mut socket = connect(&server.target).await;
    let head = "PUT /v1/state/a HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut go_on = [0; 25];
    timeout(Duration::from_secs(5), socket.read_exact(&mut go_on)).await.expect("it is asked").unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    socket.write_all(format!("b\r\n{{\"value\":1}}\r\n0\r\n\r\n{then}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(Duration::from_secs(5), socket.read_to_string(&mut answer)).await.expect("it ends").unwrap();
    assert!(answer.starts_with("HTTP/1.1 201") && answer.contains("\"status\":\"ok\""), "{answer}");
}

/// Many who have begun a request and say no more hold up no connection that comes after them.
#[tokio::test]
async fn half_requests_keep_no_new_connection_waiting() {
    let server = Server::start(&[]);
    let mut slow = Vec::new();
    for part in [
        "GET /v1/health HTTP/1.1\r\nhost",
        "GET /v1/events HTTP/1.1\r\nhost",
        "PUT /v1/state/a HTTP/1.1\r\ncontent-length: 9\r\n\r\n1",
        // The end of a line that does not come, and what is refused to a client that goes on: behind each of these the next waited 60 and
        // 30 seconds.
        "\r\n",
        "GET /v1/health no request\r\n\r\n",
        "GET /v1/events no request\r\n\r\n",
    ]
    .repeat(100)
    {
        let mut socket = connect(&server.target).await;
        socket.write_all(part.as_bytes()).await.unwrap();
        slow.push(socket);
    }
    for path in ["/v1/health", "/v1/events?since=0"] {
        let mut socket = connect(&server.target).await;
        socket.write_all(format!("GET {path} HTTP/1.1\r\nhost: h\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = [0; 15];
        // Behind all of them it would be half a minute: each may keep its place for a second, and there are eight.
        timeout(Duration::from_secs(5), socket.read_exact(&mut answer)).await.expect("it waits behind them").unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
    }
}

/// An HTTP/2 frame.
#[expect(clippy::big_endian_bytes, reason = "that is how HTTP/2 sends numbers")]
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A field of an HTTP/2 head, in full (RFC 7541, 6.2.2).
fn field(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    [vec![0], text(name), text(value)].concat()
}

/// A body that its client gives up is none that has ended: what came of it must not be taken for all of it, least of all where nothing came
/// and the condition stands in it. A reset without an error is what proxies and clients send for that.
#[tokio::test]
async fn http2_bodies_cut_by_a_reset_write_nothing() {
    // Kinds and flags (RFC 9113, 6).
    let (data, headers, rst_stream, settings) = (0, 1, 3, 4);
    let (end_stream, end_headers) = (1, 4);
    let server = Server::start(&[]);
    let c = &mut server.client();
    ok(c, r#"PUT /v1/state/kept {"value":1}"#).await;
    let mut socket = connect(&server.target).await;
    socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    socket.write_all(&frame(settings, 0, 0, b"")).await.unwrap();
    let rows = [
        ("PUT", "/v1/state/cut", Some("100000"), "the beginning"),
        ("PUT", "/v1/state/cut", None, "the beginning"),
        ("PUT", "/v1/state/cut", None, ""),
        ("DELETE", "/v1/state/kept", Some("17"), ""),
        ("DELETE", "/v1/state/kept", None, ""),
    ];
    for (n, (method, path, length, body)) in rows.into_iter().enumerate() {
        let stream = 2 * u32::try_from(n).unwrap() + 1;
        let mut head = [
            (":method", method),
            (":path", path),
            (":scheme", "http"),
            (":authority", "h"),
            ("content-type", "text/plain"),
        ]
        .map(|(name, value)| field(name, value))
        .concat();
        head.extend(length.map(|length| field("content-length", length)).unwrap_or_default());
        let mut frames = frame(headers, end_headers, stream, &head);
        if !body.is_empty() {
            frames.extend(frame(data, 0, stream, body.as_bytes()));
        }
        socket.write_all(&frames).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket.write_all(&frame(rst_stream, 0, stream, &[0; 4])).await.unwrap();
    }
    // One that is whole, behind them: they are over then, and the frames are as they should be.
    let head = [
        (":method", "PUT"),
        (":path", "/v1/state/whole"),
        (":scheme", "http"),
        (":authority", "h"),
        ("content-type", "text/plain"),
    ]
    .map(|(name, value)| field(name, value))
    .concat();
    let stream = 2 * u32::try_from(rows.len()).unwrap() + 1;
    let mut frames = frame(headers, end_headers, stream, &head);
    frames.extend(frame(data, end_stream, stream, b"all of it"));
    socket.write_all(&frames).await.unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while call(c, "GET /v1/state/whole").await.status != 200 {
        assert!(std::time::Instant::now() < deadline, "the whole one was not written");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(call(c, "GET /v1/state/cut").await.status, 404);
    assert_eq!(call(c, "GET /v1/state/kept").await.status, 200);
}

/// A small value of bytes must cost about as much memory as it is long, not as much as the buffer it came in.
#[tokio::test]
async fn small_bodies_do_not_keep_the_buffers_they_came_in() {
    const VALUES: u64 = 4000;
    let server = Server::start(&["--fsync", "never"]);
    let resident_kib = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let mut socket = connect(&server.target).await;
    let mut put = async |number: u64| {
        let head = format!("PUT /v1/state/raw:{number} HTTP/1.1\r\nhost: localhost\r\n");
        let request = format!("{head}content-type: text/x\r\ncontent-length: 100\r\n\r\n{}", "v".repeat(100));
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            assert!(socket.read_buf(&mut answer).await.unwrap() > 0);
        }
        assert!(answer.starts_with(b"HTTP/1.1 201"), "{}", String::from_utf8_lossy(&answer));
    };
    put(VALUES).await;
    let before = resident_kib();
    for number in 0..VALUES {
        put(number).await;
    }
    // The server may have given back what its start had left.
    let each = resident_kib().saturating_sub(before) * 1024 / VALUES;
    assert!(each < 3000, "{each} bytes for each value of 100");
}
