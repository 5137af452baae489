//! The command line, as the built program against a real server: what it prints, and what it ends with.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{BINARY, Server, call, ok};
use kiss_vdb::client::Client;
use kiss_vdb::engine::restore::restore;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn program(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .args(arguments)
        .env("KISS_URL", url)
        .env_remove("API_KEY")
        .env_remove("KISS_CA_CERT")
        .env_remove("NO_COLOR");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn finish(mut child: Child, input: &[u8]) -> Ran {
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A program that does not read its stdin is no failure.
    let writer = std::thread::spawn(move || stdin.write_all(&input).ok());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn run(url: &str, arguments: &[&str]) -> Ran {
    finish(program(url, arguments).spawn().unwrap(), b"")
}

fn run_ok(url: &str, arguments: &[&str]) -> String {
    let ran = run(url, arguments);
    assert_eq!(ran.code, 0, "{arguments:?}: {ran:?}");
    ran.out
}

/// Waits until something holds.
fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn every_command_prints_and_ends_as_documented() {
    let server = Server::start(&[]);
    let url = server.target.url();
    let dir = tempfile::tempdir().unwrap();
    let logo = dir.path().join("logo");
    std::fs::write(&logo, [0, 159, 146, 150]).unwrap();
    let logo = logo.to_str().unwrap();
    // Arguments, stdin, exit code, stdout, what stderr holds.
    let table: &[(&[&str], &str, i32, &str, &str)] = &[
        (&["put", "job:1", r#"{"n":1.50}"#, "--job-id", "1", "--tag", "a"], "", 0, "revision 1 created\n", ""),
        (&["put", "job:1", r#"{"n":1.50}"#, "--if-revision", "9"], "", 4, "", "expected revision 9"),
        (&["put", "job:1", "hello"], "", 2, "", "--string"),
        (&["put", "job:1"], "", 2, "", "required"),
        (&["get", "job:1"], "", 0, "{\"n\":1.50}\n", ""),
        (
            &["get", "job:1", "--json"],
            "",
            0,
            "{\"key\":\"job:1\",\"value\":{\"n\":1.50},\"revision\":1,\"created_revision\":1,\"meta\":{\"job_id\":\"1\",\"tags\":[\"a\"]}}\n",
            "",
        ),
        (&["get", "nothing"], "", 3, "", "there is no key \"nothing\""),
        (&["get", "nothing", "--json"], "", 3, "", "\"code\":\"key_not_found\""),
        (&["patch", "job:1", r#"{"m":null,"k":2}"#], "", 0, "revision 2\n", ""),
        (&["put", "text", "-", "--string"], "good\nmorning", 0, "revision 3 created\n", ""),
        (&["get", "text", "--raw"], "", 0, "\"good\\nmorning\"", ""),
        (&["put", "a/b c?d", "-5"], "", 0, "revision 4 created\n", ""),
        (
            &["put", "logo", "--file", logo, "--content-type", "image/png", "--ttl", "1h"],
            "",
            0,
            "revision 5 created\n",
            "",
        ),
        (&["put", "logo", "--file", logo], "", 2, "", "--content-type"),
        (&["put", "logo", "1", "--ttl", "soon"], "", 2, "", "not a time"),
        (
            &["list"],
            "",
            0,
            "a/b c?d\t-5\njob:1\t{\"n\":1.50,\"k\":2}\nlogo\t<4 bytes of image/png>\ntext\t\"good\\nmorning\"\n",
            "",
        ),
        (&["list", "--keys-only", "--limit", "2"], "", 0, "a/b c?d\njob:1\n", ""),
        (
            &["list", "job:", "--json", "--keys-only"],
            "",
            0,
            "{\"key\":\"job:1\",\"revision\":2,\"created_revision\":1,\"meta\":{\"job_id\":\"1\",\"tags\":[\"a\"]}}\n",
            "",
        ),
        (&["del", "a/b c?d", "--if-revision", "3"], "", 4, "", "expected revision 3"),
        (&["del", "a/b c?d"], "", 0, "revision 6 deleted\n", ""),
        (&["del", "a/b c?d"], "", 3, "", "there is no key"),
        (&["publish", "progress", r#"{"done":1}"#, "--key", "job:1", "--job-id", "1"], "", 0, "revision 7\n", ""),
        (&["publish", "Progress"], "", 2, "", "an event type is"),
        (&["upsert", "docs", "a", "[1,2,3]"], "", 3, "", "there is no such collection; kiss-vdb import makes one"),
        (&["upsert", "docs", "a", "[1,2,3]", "--json"], "", 3, "", "\"code\":\"collection_not_found\""),
        (&["put", "", "1"], "", 2, "", "a key is 1 to 1024 bytes"),
        (&["get", ""], "", 2, "", "a key is 1 to 1024 bytes"),
        (&["del", ""], "", 2, "", "a key is 1 to 1024 bytes"),
        (&["patch", "", "{}"], "", 2, "", "a key is 1 to 1024 bytes"),
        (&["watch", "--key", ""], "", 2, "", "a key is 1 to 1024 bytes"),
        (
            &["put", "j", "{\"value\":1}", "--content-type", "application/JSON; x=y"],
            "",
            2,
            "",
            "JSON is stored as a value",
        ),
        (&["put", "j", "1", "--content-type", ""], "", 2, "", "JSON is stored as a value"),
        (&["put", "j", "1", "--content-type", "a\nb"], "", 2, "", "a type is a line of ASCII"),
        (&["get", "j", "--api-key", "a\nb"], "", 2, "", "the key is a line of ASCII"),
        (&["get", "j"], "", 3, "", "there is no key"),
        (&["search", "", "--id", "a"], "", 2, "", "a collection name is"),
        (&["export", "vectors", "a/b"], "", 2, "", "a collection name is"),
        (&["import", "-"], "{\"key\":\"a\"}\n", 2, "", "stdin: row 1: a key's row has value"),
        (
            &["import", "-", "--collection", "docs"],
            "{\"collection\":\"docs\",\"dim\":3,\"metric\":\"cosine\"}\n",
            0,
            "1 rows",
            "",
        ),
        (
            &["upsert", "docs", "a", "[1,2,3]", "--meta", r#"{"lang":"es"}"#, "--json"],
            "",
            0,
            "{\"id\":\"a\",\"revision\":9,\"created\":true}\n",
            "",
        ),
        (&["upsert", "docs", "b", "-"], "[-1,2,3]", 0, "revision 10 created\n", ""),
        (&["upsert", "docs", "b", "[1]"], "", 2, "", "the vector has 1 numbers"),
        (&["search", "docs", "--vector", "[-1,2,3]", "-k", "1"], "", 0, "1.000000\tb\n", ""),
        (
            &["search", "docs", "--id", "b", "--filter", r#"{"lang":"es"}"#, "--include-meta", "--explain"],
            "",
            0,
            "0.857143\ta\t{\"lang\":\"es\"}\n",
            "\"matches\":1",
        ),
        (&["search", "docs"], "", 2, "", "required"),
        (
            &["watch", "--since", "5", "--count", "2"],
            "",
            0,
            "6\tstate_deleted\ta/b c?d\t\"deleted\"\n7\tprogress\tjob:1\t{\"done\":1}\n",
            "",
        ),
        (
            &["watch", "--since", "0", "--type", "progress", "--job-id", "1", "--count", "1", "--json"],
            "",
            0,
            "{\"ts\":",
            "",
        ),
        (
            &["watch", "--key", "text", "--snapshot", "--count", "2", "--json"],
            "",
            0,
            "{\"type\":\"snapshot\",\"key\":\"text\",\"value\":\"good\\nmorning\",\"revision\":3,\"created_revision\":3}\n{\"type\":\"snapshot_end\"",
            "",
        ),
        (&["watch", "--since", "999", "--count", "1"], "", 0, "10\treset\t\"future\"\n", ""),
        (&["watch", "--since", "yesterday"], "", 2, "", "since is a revision or a time"),
        (
            &["export", "vectors", "docs"],
            "",
            0,
            "{\"collection\":\"docs\",\"dim\":3,\"metric\":\"cosine\"}\n{\"collection\":\"docs\",\"id\":\"a\",\"vector\":[1.0,2.0,3.0],\"meta\":{\"lang\":\"es\"},\"revision\":9}\n",
            "",
        ),
        (&["export", "all", "docs"], "", 2, "", "export vectors COLLECTION"),
        (&["top", "--json", "--count", "1"], "", 0, "{\"failed\":0.0", ""),
        (&["top"], "", 2, "", "needs a terminal"),
        (&["get", "x", "--url", "example.org:9917"], "", 2, "", "the URL is http://host:port or https://host:port"),
        (&["get", "x", "--url", "http://me@127.0.0.1:1"], "", 2, "", "the URL is http"),
        (&["get", "x", "--url", "http://127.0.0.1:1/v1"], "", 2, "", "the URL is http"),
        (&["get", "x", "--url", "https://127.0.0.1:1", "--ca-cert", "/nowhere"], "", 2, "", "cannot read /nowhere"),
        (&["get", "x", "--url", "https://127.0.0.1:1", "--ca-cert", logo], "", 2, "", "holds no certificate"),
        (&["get", "x", "--url", "https://127.0.0.1:1"], "", 6, "", "cannot connect to https://127.0.0.1:1"),
        (&["get", "x", "--url", "http://127.0.0.1:1"], "", 6, "", "cannot connect to http://127.0.0.1:1"),
        (&["no-such-verb"], "", 2, "", "unrecognized"),
    ];
    for (arguments, input, code, out, err) in table {
        let ran = finish(program(&url, arguments).spawn().unwrap(), input.as_bytes());
        assert_eq!(ran.code, *code, "{arguments:?}: {ran:?}");
        // What goes on after an answer that differs from run to run is not compared.
        let is_whole = out.is_empty() || out.ends_with('\n') && ran.out.lines().count() == out.lines().count();
        assert!(if is_whole { ran.out == *out } else { ran.out.starts_with(out) }, "{arguments:?}: {ran:?}");
        assert!(
            ran.err.contains(err)
                && (*code == 0 || ran.err.starts_with("kiss-vdb: ") || *code == 2 || ran.err.starts_with('{')),
            "{arguments:?}: {ran:?}"
        );
        assert!(!err.is_empty() || ran.err.is_empty(), "{arguments:?}: {ran:?}");
    }
    // The server does not wait for the rest of it; whether its answer can still be read is a matter of luck.
    let ran =
        finish(program(&url, &["put", "large", "-", "--content-type", "a/b"]).spawn().unwrap(), &vec![0; 40 << 20]);
    let (hung_up, refused) = (ran.err.contains("MAX_BODY_MB"), ran.err.contains("is larger than 33554432 bytes"));
    assert!(ran.code == 1 && hung_up || ran.code == 2 && refused, "{ran:?}");
    let bytes = program(&url, &["get", "logo"]).output().unwrap().stdout;
    assert_eq!(bytes, [0, 159, 146, 150]);
}

#[test]
fn a_key_that_is_missing_or_wrong_is_told_apart_from_other_failures() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::try_start_in(dir.path(), &[], Some("secret")).unwrap();
    let url = server.target.url();
    for (name, arguments, key, code) in [
        ("none", vec!["put", "a", "1"], None, 5),
        ("wrong", vec!["put", "a", "1", "--api-key", "guess"], None, 5),
        ("wrong, streaming", vec!["watch", "--api-key", "guess"], None, 5),
        ("wrong, backup", vec!["backup", "never", "--api-key", "guess"], None, 5),
        ("flag", vec!["put", "a", "1", "--api-key", "secret"], None, 0),
        ("variable", vec!["put", "a", "1"], Some("secret"), 0),
    ] {
        let mut command = program(&url, &arguments);
        command.envs(key.map(|key| ("API_KEY", key))).current_dir(dir.path());
        let ran = finish(command.spawn().unwrap(), b"");
        assert_eq!(ran.code, code, "{name}: {ran:?}");
        let says = if name == "none" {
            "this server needs a key: give it by --api-key"
        } else {
            "this server does not know the key"
        };
        assert!(code == 0 || ran.err.starts_with(&format!("kiss-vdb: {says}")), "{name}: {ran:?}");
        assert!(!ran.err.contains("Bearer"), "{name}: {ran:?}");
    }
    assert!(!dir.path().join("never").exists() && !dir.path().join("never.part").exists());
}

/// A script that follows a server must not lose an event, nor see one twice, because the server was restarted.
#[test]
fn watch_goes_on_across_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &[]);
    let url = server.target.url();
    let port = url.rsplit(':').next().unwrap().to_owned();
    let mut child = program(&url, &["watch", "--prefix", "n", "--count", "40", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // The first event shows that the stream is open.
    let mut seen = Vec::new();
    let mut written = 0;
    while seen.is_empty() {
        let stream_is_open = || server_streams(&url) > 0;
        wait_for("the stream opens", stream_is_open);
        run_ok(&url, &["put", "n0", "0"]);
        written += 1;
        seen.push(lines.next().unwrap().unwrap());
    }
    let mut server = server;
    for round in 0..3 {
        for _ in 0..6 {
            run_ok(&url, &["put", &format!("n{written}"), &written.to_string()]);
            written += 1;
        }
        if round == 1 {
            assert!(server.stop());
        } else {
            server.kill();
        }
        server = Server::start_in(dir.path(), &["--port", &port]);
        for _ in 0..7 {
            run_ok(&url, &["put", &format!("n{written}"), &written.to_string()]);
            written += 1;
        }
    }
    assert_eq!(written, 40);
    seen.extend(lines.map(Result::unwrap));
    let values: Vec<u64> =
        seen.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()["value"].as_u64().unwrap()).collect();
    assert_eq!(values, (0..40).collect::<Vec<_>>());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(err.contains("coming back after revision") && err.contains("back, after revision"), "{err}");
}

fn server_streams(url: &str) -> u64 {
    let line = run_ok(url, &["top", "--json", "--count", "1"]);
    serde_json::from_str::<Value>(&line).unwrap()["streams"].as_f64().unwrap() as u64
}

#[test]
fn a_reader_that_goes_away_ends_a_command_quietly() {
    let server = Server::start(&["--ephemeral"]);
    let url = server.target.url();
    let rows: String = (0..20_000).map(|n| format!("{{\"key\":\"key-{n:06}\",\"value\":\"{n:0100}\"}}\n")).collect();
    let ran = finish(program(&url, &["import", "-", "--batch", "1000", "--json"]).spawn().unwrap(), rows.as_bytes());
    assert_eq!(ran.code, 0, "{ran:?}");
    for arguments in [&["list"][..], &["list", "--json"], &["export"], &["watch", "--since", "0"], &["man"]] {
        let mut child = program(&url, arguments).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "{arguments:?}");
        drop(out);
        let ran = finish(child, b"");
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{arguments:?}");
    }
}

#[test]
fn ctrl_c_ends_with_130_and_leaves_no_part_of_a_file() {
    let server = Server::start(&["--ephemeral"]);
    let url = server.target.url();
    let child = program(&url, &["watch"]).spawn().unwrap();
    wait_for("the stream opens", || server_streams(&url) > 0);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    let ran = finish(child, b"");
    assert_eq!((ran.code, ran.err.as_str()), (130, "kiss-vdb: interrupted\n"));
}

/// `watch | head` that ends with the next event only is a process left behind for each use on a quiet server.
#[test]
fn watch_shows_values_as_they_were_sent() {
    let server = Server::start(&["--ephemeral"]);
    let url = server.target.url();
    let value = r#"{"title":"t","b":1.50,"a":12345678901234567890123}"#;
    run_ok(&url, &["put", "ord", value]);
    assert_eq!(
        run_ok(&url, &["watch", "--key", "ord", "--since", "0", "--count", "1"]),
        format!("1\tstate_updated\tord\t{value}\n")
    );
}

#[test]
fn an_address_that_cannot_be_had_is_told_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let server = Server::start(&["--ephemeral"]);
    let port = server.target.url().rsplit(':').next().unwrap().to_owned();
    for (address, port, cure) in [
        ("127.0.0.1", port.as_str(), "is another server using the port?"),
        ("192.0.2.1", "0", "this machine has no such address; choose another with --bind-addr"),
    ] {
        let ran = Command::new(BINARY)
            .args(["serve", "--bind-addr", address, "--port", port, "--allow-open", "--data-dir"])
            .arg(&data)
            .output()
            .unwrap();
        let err = String::from_utf8(ran.stderr).unwrap();
        assert!(!ran.status.success() && err.contains(cure), "{err}");
        assert!(!data.exists(), "{err}");
    }
}

#[test]
fn watch_ends_when_its_reader_goes_though_nothing_happens() {
    let server = Server::start(&["--ephemeral"]);
    let url = server.target.url();
    for arguments in [&["watch"][..], &["watch", "--json", "--key", "never"]] {
        let mut child = program(&url, arguments).spawn().unwrap();
        wait_for("the stream opens", || server_streams(&url) > 0);
        drop(child.stdout.take());
        let mut ended = None;
        wait_for("watch ends", || {
            ended = child.try_wait().unwrap();
            ended.is_some()
        });
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((ended.unwrap().code(), err.as_str()), (Some(0), ""), "{arguments:?}");
        wait_for("the stream closes", || server_streams(&url) == 0);
    }
}

/// Runs a command on a terminal of 80 columns and 24 lines, and returns what that was sent.
fn on_terminal(url: &str, command: &str) -> (Option<i32>, String) {
    let line = format!("stty cols 80 rows 24; exec {BINARY} {command}");
    let output = Command::new("script")
        .args(["-qefc", &line, "/dev/null"])
        .env("KISS_URL", url)
        .env("TERM", "xterm")
        .env_remove("API_KEY")
        .stdin(Stdio::null())
        .output()
        .expect("script of util-linux is installed");
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// An empty list of events on a server that has just been busy says that nothing happened.
#[test]
fn top_begins_with_the_newest_events_of_before_it() {
    let server = Server::start(&[]);
    let url = server.target.url();
    // No two have a letter in the same place: only what differs from the screen before is sent.
    let keys = ["alpha", "bravo", "quest"];
    for key in keys {
        run_ok(&url, &["publish", "old", "--key", key]);
    }
    let (code, shown) = on_terminal(&url, "top --count 2");
    assert_eq!(code, Some(0), "{shown}");
    for key in keys {
        assert!(shown.contains(key), "{key}: {shown:?}");
    }
    // The fourth line of events, the eighteenth of the screen, is drawn empty and stays so: nothing is there twice.
    assert!(shown.contains("\u{1b}[18;1H│\u{1b}[18;80H") && !shown.contains("\u{1b}[18;2H"), "{shown:?}");
    assert!(!shown.contains("reset"), "{shown:?}");
}

/// Certificates of one kind each, made anew for every run.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Makes NAME.cert and NAME.key, signed by itself, and returns their paths.
    fn make(&self, name: &str, extensions: &str, days: &str) -> [String; 2] {
        let at = |ending: &str| self.0.path().join(format!("{name}.{ending}")).to_str().unwrap().to_owned();
        let (cert, key, request, config) = (at("cert"), at("key"), at("request"), at("config"));
        std::fs::write(&config, extensions).unwrap();
        let openssl = |arguments: &[&str]| {
            let output = Command::new("openssl").args(arguments).output().expect("openssl is installed");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        let curve = "ec_paramgen_curve:prime256v1";
        let subject = format!("/CN={name}");
        openssl(&[
            "req", "-newkey", "ec", "-pkeyopt", curve, "-nodes", "-subj", &subject, "-keyout", &key, "-out", &request,
        ]);
        openssl(&[
            "x509", "-req", "-in", &request, "-signkey", &key, "-days", days, "-extfile", &config, "-out", &cert,
        ]);
        [cert, key]
    }
}

fn https(dir: &Path, [cert, key]: &[String; 2]) -> (Server, String) {
    let server = Server::start_in(dir, &["--tls-cert", cert, "--tls-key", key]);
    let url = server.banner.split_whitespace().find(|word| word.starts_with("https://")).unwrap().to_owned();
    (server, url)
}

/// What would break is every command against a server with TLS; and, worse, one that trusts anybody.
#[test]
fn https_is_spoken_by_every_command_and_only_with_a_server_that_is_trusted() {
    let certificates = Certificates::new();
    let mine = "subjectAltName=IP:127.0.0.1\nbasicConstraints=critical,CA:FALSE\n";
    let good = certificates.make("good", mine, "1");
    let other = certificates.make("other", mine, "1");
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (server, url) = https(&dir.path().join("good"), &good);
    let with = |arguments: &[&str], ca: &str, input: &str| {
        let mut command = program(&url, arguments);
        command.env("KISS_CA_CERT", ca);
        finish(command.spawn().unwrap(), input.as_bytes())
    };
    let rows = "{\"collection\":\"docs\",\"dim\":2,\"metric\":\"l2\"}\n{\"key\":\"b\",\"value\":2}\n";
    let (backup, restored, exported) = (at("b.backup"), at("restored"), at("rows"));
    for (arguments, input, out) in [
        (&["put", "a", "1"][..], "", "revision 1 created\n"),
        (&["get", "a"], "", "1\n"),
        (&["patch", "a", "2"], "", "revision 2\n"),
        (&["publish", "progress"], "", "revision 3\n"),
        (&["watch", "--since", "1", "--count", "1"], "", "2\tstate_updated\ta\t2\n"),
        (&["import", "-", "--in-flight", "1"], rows, "2 rows"),
        (&["upsert", "docs", "v", "[1,2]"], "", "revision 6 created\n"),
        (&["search", "docs", "--id", "v"], "", ""),
        (&["list", "--keys-only"], "", "a\nb\n"),
        (&["export", "state", "--output", &exported], "", ""),
        (&["top", "--json", "--count", "1"], "", "{\"failed\":0.0"),
        (&["backup", &backup], "", &format!("{backup}: revision 6")),
        (&["del", "a"], "", "revision 7 deleted\n"),
    ] {
        let ran = with(arguments, &good[0], input);
        assert!(ran.code == 0 && ran.out.starts_with(out), "{arguments:?}: {ran:?}");
    }
    run_ok("", &["restore", &backup, &restored]);
    let (_, shown) = on_terminal(&url, &format!("top --count 1 --ca-cert {}", good[0]));
    assert!(shown.contains("progress") && shown.contains("https://127.0.0.1"), "{shown:?}");

    let plain = Server::start(&["--ephemeral"]);
    let foreign = certificates.make("foreign", &mine.replace("IP:127.0.0.1", "DNS:db.example"), "1");
    let (foreign_server, foreign_url) = https(&dir.path().join("foreign"), &foreign);
    let ended = certificates.make("ended", mine, "0");
    let (ended_server, ended_url) = https(&dir.path().join("ended"), &ended);
    wait_for("the certificate ends", || {
        run(&ended_url, &["get", "a", "--ca-cert", &ended[0]]).err.contains("ended on")
    });
    let authority = certificates.make("authority", &mine.replace("FALSE", "TRUE"), "1");
    let (authority_server, authority_url) = https(&dir.path().join("authority"), &authority);
    for (name, url, ca, says) in [
        ("own certificate, system's trust", url.as_str(), "", "comes from nobody this machine trusts"),
        ("another's", &url, &other[0], "was not made with"),
        ("another name", &foreign_url, &foreign[0], "is for db.example, not for 127.0.0.1"),
        ("too old", &ended_url, &ended[0], "ended on 20"),
        ("an authority's", &authority_url, &authority[0], "CA:FALSE"),
        (
            "https to a plain port",
            &plain.target.url().replace("http", "https"),
            &good[0],
            "the URL begins with http://",
        ),
        ("http to a TLS port", &url.replace("https", "http"), "", "the URL begins with https://"),
    ] {
        for arguments in [&["get", "a"][..], &["watch"], &["backup", "never"], &["top", "--json", "--count", "1"]] {
            let mut command = program(url, arguments);
            // No certificate of this machine's may make a difference.
            command.env("KISS_CA_CERT", ca).env("SSL_CERT_FILE", &other[0]).current_dir(dir.path());
            let ran = finish(command.spawn().unwrap(), b"");
            assert!(ran.code == 6 && ran.out.is_empty() && ran.err.contains(says), "{name}: {arguments:?}: {ran:?}");
            assert_eq!(ran.err.lines().count(), 1, "{name}: {ran:?}");
        }
    }
    assert!(!dir.path().join("never").exists());
    // With the system's trust alone, when that holds the certificate.
    let mut command = program(&url, &["get", "b"]);
    command.env("SSL_CERT_FILE", &good[0]).env_remove("KISS_CA_CERT");
    let ran = finish(command.spawn().unwrap(), b"");
    assert_eq!((ran.code, ran.out.as_str()), (0, "2\n"), "{ran:?}");
    for server in [server, foreign_server, ended_server, authority_server, plain] {
        server.kill();
    }
}

/// An answer of somebody else's server is not a missing key.
#[test]
fn a_server_of_another_kind_is_named_as_such() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answers = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            BufReader::new(&stream).lines().find(|line| line.as_ref().unwrap().is_empty()).unwrap().unwrap();
            let page = "<html>\n<h1>Not Found</h1>\n</html>";
            let head = format!("HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n", page.len());
            stream.write_all(format!("{head}{page}").as_bytes()).unwrap();
        }
    });
    for arguments in [&["get", "a"][..], &["get", "a", "--json"]] {
        let ran = run(&url, arguments);
        let says = "kiss-vdb: 404 Not Found: that is no answer of KISS VDB; is the URL right? (--url, else KISS_URL)\n";
        assert_eq!((ran.code, ran.err.as_str()), (1, says));
    }
    answers.join().unwrap();
}

/// Every file in the directory, with its bytes.
fn files_below(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        }
        files.insert(path.display().to_string(), std::fs::read(&path).unwrap_or_default());
    }
    files
}

/// A folder named by mistake must not be called damaged, which asks for a backup; nor be changed.
#[test]
fn a_directory_of_somebody_else_is_refused_as_such_and_left_alone() {
    for (name, folders, file, is_foreign) in [
        ("logs", &["log"][..], "log/access.log", true),
        ("a left-over of another program", &["log"], "log/upload.tmp", true),
        ("snapshots", &["log", "snapshots"], "snapshots/disk.snap", true),
        ("drawings", &["log", "vectors", "vectors/icons"], "vectors/icons/a.svg", true),
        ("a file in place of a folder", &[], "log", true),
        ("damage", &["log"], "log/00000000000000000001.log", false),
    ] {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path();
        folders.iter().for_each(|folder| std::fs::create_dir(dir.join(folder)).unwrap());
        std::fs::write(dir.join(file), "somebody's").unwrap();
        let before = files_below(dir);
        let mut refusals = vec![Server::refuses_to_start(dir, &[])];
        if file != "log" {
            let ran = run("", &["check", dir.to_str().unwrap()]);
            assert_eq!(ran.code, 1, "{name}: {ran:?}");
            refusals.push(ran.err);
        }
        for refusal in refusals {
            assert_eq!(refusal.contains("is not a data directory of KISS VDB"), is_foreign, "{name}: {refusal}");
            assert_eq!(refusal.contains("is damaged at"), !is_foreign, "{name}: {refusal}");
            assert!(refusal.contains(dir.join(file).parent().unwrap().to_str().unwrap()), "{name}: {refusal}");
        }
        assert!(!is_foreign || files_below(dir) == before, "{name}");
    }
    let dir = tempfile::tempdir().unwrap();
    for (path, says) in [(dir.path().join("none"), "there is no directory"), (dir.path().into(), "holds no folder log")]
    {
        let ran = run("", &["check", path.to_str().unwrap()]);
        assert!(ran.code == 1 && ran.err.contains(says), "{ran:?}");
    }
}

/// A server that does not start has to say which setting, which file, and what to do.
#[test]
fn settings_that_name_files_are_refused_with_the_setting_the_path_and_the_cure() {
    let certificates = Certificates::new();
    let [cert, key] = &certificates.make("one", "basicConstraints=CA:FALSE\n", "1");
    let [_, other] = &certificates.make("two", "basicConstraints=CA:FALSE\n", "1");
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().to_str().unwrap();
    let odd = dir.path().join("odd.toml");
    std::fs::write(&odd, "[[key]]\nname = \"a\"\nsecret = \"hidden\"\n").unwrap();
    let odd = odd.to_str().unwrap();
    for (flags, says) in [
        (&["--tls-cert", cert][..], ["tls_cert = ", cert, "tls_key (TLS_KEY, --tls-key) is not: HTTPS needs both"]),
        (&["--tls-key", key], ["tls_key = ", key, "tls_cert (TLS_CERT, --tls-cert) is not: HTTPS needs both"]),
        (
            &["--tls-cert", "/nowhere", "--tls-key", key],
            ["tls_cert = \"/nowhere\" cannot be read", "No such file", "name a file"],
        ),
        (
            &["--tls-cert", cert, "--tls-key", "/nowhere"],
            ["tls_key = \"/nowhere\" cannot be read", "No such file", "name a file"],
        ),
        (&["--tls-cert", cert, "--tls-key", here], ["tls_key = ", here, "Is a directory"]),
        (&["--tls-cert", cert, "--tls-key", other], ["tls_key = ", other, "is not the key of the certificate"]),
        (&["--tls-cert", key, "--tls-key", key], ["tls_cert = ", key, "holds no certificate"]),
        (&["--tls-cert", cert, "--tls-key", cert], ["tls_key = ", cert, "holds no private key"]),
        (&["--keys-file", "/nowhere"], ["KEYS_FILE", "/nowhere", "kiss-vdb keys create makes one"]),
        (&["--keys-file", here], ["KEYS_FILE", here, "Is a directory"]),
        (&["--keys-file", odd], ["KEYS_FILE", odd, "line 3 (unknown field `secret`"]),
    ] {
        let said = Server::refuses_to_start(&dir.path().join("data"), flags);
        let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("kiss-vdb: ")).collect();
        assert!(lines.len() == 1 && said.ends_with(&format!("{}\n", lines[0])), "{flags:?}: {said}");
        assert!(says.iter().all(|part| lines[0].contains(part)), "{flags:?}: {said}");
        assert!(!said.contains("hidden"), "{said}");
    }
}

/// Through a pipe there is no file to check afterwards: what came is checked on its way, or the next restore is a surprise.
#[test]
fn a_backup_goes_through_pipes_and_a_broken_one_is_refused() {
    let server = Server::start(&[]);
    let url = server.target.url();
    let rows: String = (0..2000).map(|n| format!("{{\"key\":\"k{n:04}\",\"value\":\"{n:0200}\"}}\n")).collect();
    assert_eq!(finish(program(&url, &["import", "-"]).spawn().unwrap(), rows.as_bytes()).code, 0);
    let exported = run_ok(&url, &["export"]);
    let dir = tempfile::tempdir().unwrap();
    let taken = program(&url, &["backup", "-", "--json"]).current_dir(dir.path()).output().unwrap();
    let bytes = &taken.stdout;
    let contents: Value = serde_json::from_slice(&taken.stderr).unwrap();
    assert_eq!((contents["keys"].as_u64(), contents["bytes"].as_u64()), (Some(2000), Some(bytes.len() as u64)));
    let target = dir.path().join("data");
    let restore =
        |bytes: &[u8]| finish(program("", &["restore", "-", target.to_str().unwrap()]).spawn().unwrap(), bytes);
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 1;
    let cases = [
        ("cut", &bytes[..bytes.len() - 1]),
        ("empty", b""),
        ("flipped", &flipped),
        ("of another kind", b"<html></html>"),
    ];
    for (name, broken) in cases {
        let ran = restore(broken);
        assert!(ran.code == 1 && ran.err.starts_with("kiss-vdb: stdin is damaged at offset"), "{name}: {ran:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{name}");
        // The same as an answer: to stdout it has gone, so the exit code has to tell.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let other = format!("http://{}", listener.local_addr().unwrap());
        let broken = broken.to_vec();
        let answer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            BufReader::new(&stream).lines().find(|line| line.as_ref().unwrap().is_empty()).unwrap().unwrap();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", broken.len());
            // It may have hung up by then.
            stream.write_all(&[head.as_bytes(), &broken].concat()).ok();
        });
        let ran = program(&other, &["backup", "-"]).output().unwrap();
        let err = String::from_utf8(ran.stderr).unwrap();
        assert!(ran.status.code() == Some(1) && err.contains("what the server sent is damaged at"), "{name}: {err}");
        answer.join().unwrap();
    }
    // Whatever it is called: it can be read but once.
    let named = program("", &["restore", "/dev/stdin", dir.path().join("named").to_str().unwrap()]).spawn().unwrap();
    assert_eq!(finish(named, bytes).code, 0);
    std::fs::remove_dir_all(dir.path().join("named")).unwrap();
    let ran = restore(bytes);
    assert_eq!(ran.code, 0, "{ran:?}");
    let restored = Server::start_in(&target, &[]);
    assert_eq!(run_ok(&restored.target.url(), &["export"]), exported);
    let ran = restore(bytes);
    assert!(ran.code == 1 && ran.err.contains("is not empty"), "{ran:?}");
    let (code, shown) = on_terminal(&url, "backup -");
    assert!(code == Some(2) && shown.contains("nothing for a terminal"), "{shown}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "what was kept beside it is gone");
}

/// Tells it to stop, and waits until it has begun to.
fn begin_stop(server: &Server) {
    server.signal(rustix::process::Signal::TERM);
    let address = server.target.url();
    let deadline = Instant::now() + DEADLINE;
    while std::net::TcpStream::connect(address.strip_prefix("http://").unwrap()).is_ok() {
        assert!(Instant::now() < deadline, "it still listens");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(100));
}

/// What a stop cuts short must not look like a whole backup, neither to the program nor to curl. Neither reads on before the
/// stop, and what lies between holds much less than there is.
#[tokio::test]
async fn a_backup_that_is_given_up_is_no_whole_answer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_in(dir.path(), &[]);
    let value = "v".repeat(1 << 20);
    for n in 0..64 {
        ok(&mut server.client(), &format!("PUT /v1/state/large:{n} {{\"value\":\"{value}\"}}")).await;
    }
    let mut taker = program(&server.target.url(), &["backup", "-"]).spawn().unwrap();
    taker.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    begin_stop(&server);
    let ran = taker.wait_with_output().unwrap();
    let err = String::from_utf8(ran.stderr).unwrap();
    assert!(ran.status.code() == Some(1) && err.contains("the server was stopping"), "{err}");
    assert!(server.stop());

    let server = Server::start_in(dir.path(), &[]);
    let mut socket = std::net::TcpStream::connect(server.target.url().strip_prefix("http://").unwrap()).unwrap();
    socket.write_all(b"GET /v1/admin/backup HTTP/1.1\r\nhost: h\r\n\r\n").unwrap();
    socket.read_exact(&mut [0]).unwrap();
    // Only one is taken at a time, and HEAD takes none.
    for (line, status) in [("GET /v1/admin/backup", 503), ("HEAD /v1/admin/backup", 200)] {
        assert_eq!(call(&mut server.client(), line).await.status, status, "{line}");
    }
    begin_stop(&server);
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).ok();
    let end = String::from_utf8_lossy(&answer[answer.len() - 100..]).into_owned();
    assert!(end.contains("the server was stopping") && !end.ends_with("\r\n0\r\n\r\n"), "{end:?}");
    assert!(server.stop());
}

/// Everything but revisions, which a second server gives anew.
fn without_revisions(export: &str) -> Vec<Value> {
    let mut rows: Vec<Value> = export.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for row in &mut rows {
        row.as_object_mut().unwrap().retain(|name, _| !matches!(name.as_str(), "revision" | "created_revision"));
        if let Some(at) = row.get("expires_at_ms").and_then(Value::as_u64) {
            // It goes over as what is left of it: within a minute.
            row["expires_at_ms"] = json!(at / 60_000 / 60);
        }
    }
    rows
}

#[test]
fn what_is_exported_is_imported_as_it_was() {
    let (one, two) = (Server::start(&[]), Server::start(&["--ephemeral"]));
    let (from, to) = (one.target.url(), two.target.url());
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    run_ok(&from, &["put", "a", r#"{"n":1.50e3,"deep":[[null]]}"#, "--job-id", "1", "--tag", "x", "--ttl", "36h"]);
    run_ok(&from, &["put", "null", "null"]);
    let bytes = path("bytes");
    std::fs::write(&bytes, (0..=255).collect::<Vec<u8>>()).unwrap();
    run_ok(&from, &["put", "b", "--file", &bytes, "--content-type", "application/x-test"]);
    // Numbers that do not survive a careless way through text.
    let numbers: Vec<f32> =
        (0..700 * 3).map(|n| f32::from_bits(0x3f80_0000 + n * 7919) * if n % 2 == 0 { 1e-30 } else { -1.0 }).collect();
    let values: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (700, 3), }\n";
    let npy = [&b"\x93NUMPY\x01\x00"[..], &(dict.len() as u16).to_le_bytes(), dict.as_bytes(), &values].concat();
    std::fs::write(path("v.npy"), npy).unwrap();
    let ran = run(&from, &["import", &path("v.npy"), "--collection", "docs"]);
    assert!(ran.code == 3 && ran.err.contains("collection \"docs\": ") && ran.err.contains("--metric"), "{ran:?}");
    run_ok(&from, &["import", &path("v.npy"), "--collection", "docs", "--metric", "l2", "--ids", "v-"]);
    run_ok(&from, &["upsert", "docs", "v-5", "[1,2,3]", "--meta", r#"{"lang":"es","tags":["t"]}"#]);
    let fvecs: Vec<u8> = values.chunks(12).flat_map(|row| [&3i32.to_le_bytes()[..], row].concat()).collect();
    std::fs::write(path("v.fvecs"), fvecs).unwrap();
    run_ok(&from, &["import", &path("v.fvecs"), "--collection", "fv", "--metric", "dot", "--first-id", "100"]);
    for (collection, id, at) in [("docs", "v-699", 699), ("fv", "100", 0)] {
        let rows = run_ok(&from, &["export", "vectors", collection]);
        let row = rows.lines().find(|row| row.contains(&format!("\"id\":\"{id}\""))).unwrap();
        let row: Value = serde_json::from_str(row).unwrap();
        let found: Vec<f32> = serde_json::from_value(row["vector"].clone()).unwrap();
        assert_eq!(found, numbers[at * 3..at * 3 + 3], "{collection}");
    }
    // Values of which a batch holds none: in base64 larger than a body may be, and as large as one that is put may be.
    std::fs::write(&bytes, vec![0xa5; 25 << 20]).unwrap();
    let put = [
        "put",
        "large/a b",
        "--file",
        &bytes,
        "--content-type",
        "image/x",
        "--job-id",
        "7",
        "--tag",
        "x&y",
        "--tag",
        "z",
    ];
    run_ok(&from, &[&put[..], &["--ttl", "36h"]].concat());
    std::fs::write(&bytes, vec![b'a'; (32 << 20) - r#"{"value":""}"#.len()]).unwrap();
    run_ok(&from, &["put", "large/json", "--string", "--file", &bytes]);
    run_ok(&from, &["export", "--output", &path("all.ndjson")]);
    assert_eq!(run(&from, &["export", "--output", &path("all.ndjson")]).code, 2, "an existing file must stay");
    run_ok(&to, &["import", &path("all.ndjson"), "--batch", "7"]);
    let (there, here) = (run_ok(&to, &["export"]), run_ok(&from, &["export"]));
    assert_eq!(without_revisions(&there), without_revisions(&here));
    assert_eq!(here, std::fs::read_to_string(path("all.ndjson")).unwrap());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "no note of progress stays behind: {left:?}");
}

/// What was under way when a bad row was read is in the server, so it counts.
#[test]
fn an_import_that_meets_a_bad_row_says_how_far_it_came() {
    let server = Server::start(&[]);
    let url = server.target.url();
    let dir = tempfile::tempdir().unwrap();
    let rows = |numbers: std::ops::Range<u32>| -> String {
        numbers.map(|n| format!("{{\"key\":\"im/{n:03}\",\"value\":{n}}}\n")).collect()
    };
    let path = dir.path().join("im.ndjson");
    let path = path.to_str().unwrap();
    std::fs::write(path, format!("{}oops\n{}", rows(0..250), rows(250..400))).unwrap();
    let ran = run(&url, &["import", path]);
    assert!(
        ran.code == 2 && ran.err.contains("im.ndjson: row 251") && ran.err.contains("200 rows are acknowledged"),
        "{ran:?}"
    );
    std::fs::write(path, format!("{}{{\"key\":\"im/x\"}}\n{}", rows(0..250), rows(250..400))).unwrap();
    let ran = run(&url, &["import", path, "--resume"]);
    assert!(ran.err.contains("has changed"), "another file is not gone on with: {ran:?}");
    let note = dir.path().join("im.ndjson.import");
    std::fs::remove_file(&note).unwrap();
    let ran = run(&url, &["import", path, "--skip", "9999"]);
    assert!(ran.code == 1 && !note.exists(), "nothing was acknowledged, so nothing is noted: {ran:?}");
    let left = format!("{}{}", rows(0..250), rows(250..400));
    let ran = finish(program(&url, &["import", "-", "--skip", "200"]).spawn().unwrap(), left.as_bytes());
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(run_ok(&url, &["list", "im/", "--keys-only", "--limit", "1000"]).lines().count(), 400);
}

/// A resume that began too late would leave a hole that nobody is told of.
#[test]
fn an_import_that_failed_goes_on_where_it_was() {
    let server = Server::start(&["--ephemeral"]);
    let url = server.target.url();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rows.ndjson");
    let path = file.to_str().unwrap();
    let row = |n: u32, value: &str| format!("{{\"key\":\"k{n:05}\",\"value\":{value}}}\n");
    let rows = |value: &str| -> String { (0..5000).map(|n| row(n, if n == 3333 { value } else { "1" })).collect() };
    std::fs::write(&file, rows("x")).unwrap();
    let ran = run(&url, &["import", path, "--batch", "10"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.err.contains("row 3334") && ran.err.contains("--resume goes on"), "{ran:?}");
    let note: Value = serde_json::from_slice(&std::fs::read(dir.path().join("rows.ndjson.import")).unwrap()).unwrap();
    let acknowledged = note["rows"].as_u64().unwrap();
    assert!((1..=3333).contains(&acknowledged), "{note}");
    assert!(run_ok(&url, &["list", "--keys-only"]).lines().count() as u64 >= acknowledged);
    std::fs::write(&file, rows("22")).unwrap();
    let ran = run(&url, &["import", path, "--resume"]);
    assert!(ran.code == 1 && ran.err.contains("has changed"), "{ran:?}");
    std::fs::write(&file, rows("2")).unwrap();
    let left: Value = serde_json::from_str(&run_ok(&url, &["import", path, "--resume", "--json"])).unwrap();
    assert_eq!(left["rows"], 5000 - acknowledged);
    assert_eq!(run_ok(&url, &["list", "--keys-only"]).lines().count(), 5000);
    assert_eq!(run_ok(&url, &["get", "k03333"]), "2\n");
    let ran = run(&url, &["import", path, "--resume"]);
    assert!(ran.code == 1 && ran.err.contains("nothing to go on from"), "{ran:?}");
}

/// The state at a revision, by applying history one event after another.
#[derive(Default)]
struct Model {
    keys: BTreeMap<String, (Value, u64)>,
    vectors: BTreeMap<(String, String), (Value, Value, u64)>,
    collections: BTreeMap<String, Value>,
}

impl Model {
    fn apply(&mut self, event: &Value) {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let revision = event["revision"].as_u64().unwrap();
        match event["type"].as_str().unwrap() {
            "state_updated" => drop(self.keys.insert(text("key"), (event["value"].clone(), revision))),
            "state_deleted" => drop(self.keys.remove(&text("key"))),
            "vector_added" | "vector_updated" => {
                let place = (text("collection"), text("id"));
                let old = self.vectors.get(&place).map(|v| v.0.clone());
                let vector = event.get("vector").cloned().or(old).unwrap();
                let meta = event.get("meta").cloned().unwrap_or(json!({}));
                self.vectors.insert(place, (vector, meta, revision));
            }
            "vector_deleted" => drop(self.vectors.remove(&(text("collection"), text("id")))),
            "collection_created" => drop(self.collections.insert(text("collection"), event["dim"].clone())),
            "collection_deleted" => {
                self.collections.remove(&text("collection"));
                self.vectors.retain(|(collection, _), _| *collection != text("collection"));
            }
            other => panic!("{other}"),
        }
    }

    fn of_export(export: &str) -> Self {
        let mut model = Self::default();
        for row in export.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
            let text = |name: &str| row[name].as_str().unwrap_or_default().to_owned();
            let revision = row["revision"].as_u64();
            if row.get("key").is_some() {
                model.keys.insert(text("key"), (row["value"].clone(), revision.unwrap()));
            } else if row.get("id").is_some() {
                let place = (text("collection"), text("id"));
                model.vectors.insert(place, (row["vector"].clone(), row["meta"].clone(), revision.unwrap()));
            } else {
                model.collections.insert(text("collection"), row["dim"].clone());
            }
        }
        model
    }
}

/// Writes of every kind until told to stop.
async fn write_on(mut client: Client, seed: u64, stop: Arc<AtomicBool>, count: Arc<AtomicU64>) {
    let mut state = seed;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    while !stop.load(Ordering::Relaxed) {
        let (key, id, n) = (random(12_000), random(4000), random(1_000_000));
        let line = match random(20) {
            0..8 => format!("PUT /v1/state/k{key} {{\"value\":{n}}}"),
            8..11 => format!("DELETE /v1/state/k{key}"),
            11..14 => {
                format!("POST /v1/vector/docs/upsert {{\"id\":\"v{id}\",\"vector\":[{n},1,2],\"meta\":{{\"n\":{n}}}}}")
            }
            14..16 => format!("POST /v1/vector/docs/update {{\"id\":\"v{id}\",\"meta\":{{\"n\":{n}}}}}"),
            16..18 => format!("POST /v1/vector/docs/delete {{\"id\":\"v{id}\"}}"),
            18 => format!("POST /v1/vector/other {{\"dim\":{},\"metric\":\"dot\"}}", 1 + seed),
            _ if random(4) == 0 => "DELETE /v1/vector/other ".to_owned(),
            _ => format!(
                "POST /v1/vector/other/upsert {{\"id\":\"v{id}\",\"vector\":[{n}{}]}}",
                ",1".repeat(seed as usize)
            ),
        };
        // Refusals are part of it: what is not there cannot be deleted.
        call(&mut client, &line).await;
        count.fetch_add(1, Ordering::Relaxed);
    }
}

fn restore_and_export(backup: &Path, dir: &Path) -> (String, Server) {
    run_ok("", &["restore", backup.to_str().unwrap(), dir.to_str().unwrap()]);
    let server = Server::start_in(dir, &[]);
    (run_ok(&server.target.url(), &["export"]), server)
}

/// A backup that mixed revisions would be found out months later.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_is_the_state_of_one_revision() {
    let server = Server::start(&[]);
    let url = server.target.url();
    let mut client = server.client();
    ok(&mut client, r#"POST /v1/vector/docs {"dim":3,"metric":"cosine"}"#).await;
    // More than the sockets between server and client hold: a backup then waits for its reader while others write.
    let mut rows: String = (0..10_000).map(|n| format!("{{\"key\":\"k{n}\",\"value\":\"{n:>1000}\"}}\n")).collect();
    rows.extend(
        (0..3000).map(|n| {
            format!("{{\"collection\":\"docs\",\"id\":\"v{n}\",\"vector\":[{n},2,1],\"meta\":{{\"n\":{n}}}}}\n")
        }),
    );
    let ran = finish(program(&url, &["import", "-", "--batch", "1000"]).spawn().unwrap(), rows.as_bytes());
    assert_eq!(ran.code, 0, "{ran:?}");
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers: Vec<_> = (0..4)
        .map(|seed| tokio::spawn(write_on(server.client(), seed, Arc::clone(&stop), Arc::clone(&count))))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let mut backups = Vec::new();
    // Four of them, and on until one has records that were written meanwhile: a walk takes milliseconds, in which a busy
    // machine may not commit anything.
    let written_meanwhile =
        |backups: &[(PathBuf, Value)]| backups.iter().any(|(_, contents)| contents["records"].as_u64().unwrap() > 0);
    while backups.len() < 4 || (backups.len() < 100 && !written_meanwhile(&backups)) {
        let before = count.load(Ordering::Relaxed);
        while count.load(Ordering::Relaxed) < before + 50 {
            tokio::task::yield_now().await;
        }
        let path = dir.path().join(format!("{}.backup", backups.len()));
        let line = run_ok(&url, &["backup", path.to_str().unwrap(), "--json"]);
        backups.push((path, serde_json::from_str::<Value>(&line).unwrap()));
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    assert!(written_meanwhile(&backups), "{backups:?}");
    // The last is the one with records, unless one of the first four is.
    backups.drain(3..backups.len() - 1);
    let mut model = Model::default();
    let mut since = 0;
    for (path, contents) in &backups {
        let revision = contents["revision"].as_u64().unwrap();
        while since < revision {
            let query = format!("/v1/events?since={since}&limit={}&include_vector=true", (revision - since).min(1000));
            let page =
                client.send("GET".parse().unwrap(), &query, &[("accept", "application/json")], "").await.unwrap();
            let page = page.success().unwrap();
            let events = page["events"].as_array().unwrap();
            events.iter().for_each(|event| model.apply(event));
            since = events.last().unwrap()["revision"].as_u64().unwrap();
        }
        let (export, restored) = restore_and_export(path, &path.with_extension("data"));
        let found = Model::of_export(&export);
        assert_eq!(found.keys, model.keys, "{contents}");
        assert_eq!(found.collections, model.collections, "{contents}");
        // As f32: the log's JSON and the export's may write a number differently.
        let vectors = |model: &Model| -> Vec<_> {
            let numbers = |value: &Value| serde_json::from_value::<Vec<f32>>(value.clone()).unwrap();
            model.vectors.iter().map(|(place, v)| (place.clone(), numbers(&v.0), v.1.clone(), v.2)).collect()
        };
        assert_eq!(vectors(&found), vectors(&model), "{contents}");
        assert!(restored.stop());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_is_what_it_was_and_never_hands_out_a_revision_again() {
    let one = Server::start(&[]);
    let url = one.target.url();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    run_ok(&url, &["put", "a", r#"{"n":1.50}"#, "--job-id", "1", "--tag", "x"]);
    run_ok(&url, &["patch", "a", r#"{"m":1}"#]);
    run_ok(&url, &["put", "ttl", "1", "--ttl", "7d"]);
    run_ok(&url, &["put", "short", "1", "--ttl", "1ms"]);
    let rows = "{\"collection\":\"docs\",\"dim\":2,\"metric\":\"cosine\"}\n{\"collection\":\"docs\",\"id\":\"a\",\"vector\":[1e-30,0.1],\"meta\":{\"x\":1.50}}\n{\"collection\":\"empty\",\"dim\":5,\"metric\":\"l2\"}\n";
    assert_eq!(finish(program(&url, &["import", "-"]).spawn().unwrap(), rows.as_bytes()).code, 0);
    wait_for("the short key ends", || !run_ok(&url, &["list", "--keys-only"]).contains("short"));
    let put_once = |client: Client| async move {
        let mut client = client;
        let headers = [("content-type", "application/json"), ("idempotency-key", "once")];
        let answer = client.send("PUT".parse().unwrap(), "/v1/state/once", &headers, "{\"value\":1}").await;
        answer.unwrap().success().unwrap()
    };
    let answered = put_once(one.client()).await;
    let backup = path("b.backup");
    let backup = backup.to_str().unwrap();
    let contents: Value = serde_json::from_str(&run_ok(&url, &["backup", backup, "--json"])).unwrap();
    assert_eq!(run(&url, &["backup", backup]).code, 2, "an existing backup must stay");
    run_ok(&url, &["backup", backup, "--force"]);
    let head = contents["revision"].as_u64().unwrap();
    let exported = run_ok(&url, &["export"]);
    let later = run_ok(&url, &["put", "later", "1"]);
    let data = path("data");
    let (export, two) = restore_and_export(Path::new(backup), &data);
    assert_eq!(export, exported, "revisions, deadlines and numbers included");
    let url = two.target.url();
    for (since, expected) in [
        ("1".to_owned(), "compacted"),
        // Seen on the original after the backup.
        (later.trim_start_matches("revision ").split_whitespace().next().unwrap().to_owned(), "lost"),
        ((head + 1_000_000).to_string(), "lost"),
        ((head + (1 << 41)).to_string(), "future"),
    ] {
        let line = run_ok(&url, &["watch", "--since", &since, "--count", "1", "--json"]);
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((event["type"].as_str(), event["reason"].as_str()), (Some("reset"), Some(expected)), "{since}");
    }
    let next: Value = serde_json::from_str(&run_ok(&url, &["put", "a", "2", "--if-revision", "2", "--json"])).unwrap();
    assert_eq!(
        next["revision"].as_u64().unwrap(),
        (1 << 40) + 1,
        "beyond what the original may have written: {head} {next}"
    );
    assert_eq!(put_once(two.client()).await, answered, "a retry is told what the original was told");
    // Who had seen exactly what is in the backup goes on.
    let line = run_ok(&url, &["watch", "--since", &head.to_string(), "--count", "1"]);
    assert_eq!(line, format!("{}\tstate_updated\ta\t2\n", next["revision"]));
    // What is restored is a database like any other.
    two.kill();
    let two = Server::start_in(&data, &[]);
    assert_eq!(run_ok(&two.target.url(), &["get", "a"]), "2\n");
    let ran = run("", &["restore", backup, data.to_str().unwrap()]);
    assert!(ran.code == 1 && ran.err.contains("is not empty"), "{ran:?}");
    assert_eq!(run_ok(&two.target.url(), &["get", "a"]), "2\n");
}

#[test]
fn a_damaged_backup_is_refused_and_leaves_nothing() {
    let server = Server::start(&["--ephemeral"]);
    let url = server.target.url();
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..40)
        .map(|n| {
            format!(
                "{{\"key\":\"k{n}\",\"value\":{n}}}\n{{\"collection\":\"docs\",\"id\":\"v{n}\",\"vector\":[{n},1]}}\n"
            )
        })
        .collect();
    assert_eq!(finish(program(&url, &["import", "-", "--metric", "l2"]).spawn().unwrap(), rows.as_bytes()).code, 0);
    let whole = dir.path().join("whole");
    run_ok(&url, &["backup", whole.to_str().unwrap()]);
    let bytes = std::fs::read(&whole).unwrap();
    let (damaged, target) = (dir.path().join("damaged"), dir.path().join("data"));
    let refuse = |name: &str, bytes: &[u8]| {
        std::fs::write(&damaged, bytes).unwrap();
        let error = restore(&damaged, &target, |_, _| true).unwrap_err().to_string();
        assert!(error.contains("is damaged at offset"), "{name}: {error}");
        assert!(!target.exists(), "{name}");
    };
    for cut in 0..bytes.len() {
        refuse(&format!("cut at {cut}"), &bytes[..cut]);
    }
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        refuse(&format!("bit of byte {at}"), &flipped);
    }
    refuse("goes on", &[&bytes[..], b"x"].concat());
    // The same through the program, into a directory that is there and stays.
    std::fs::create_dir(&target).unwrap();
    std::fs::write(&damaged, &bytes[..bytes.len() - 1]).unwrap();
    let ran = run("", &["restore", damaged.to_str().unwrap(), target.to_str().unwrap()]);
    assert!(ran.code == 1 && ran.err.contains("is damaged at offset"), "{ran:?}");
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
    run_ok("", &["restore", whole.to_str().unwrap(), target.to_str().unwrap()]);
}

/// A backup of a key `k`, in a folder for what is made of it.
fn backup_of_a_key() -> (tempfile::TempDir, PathBuf) {
    let server = Server::start(&["--ephemeral"]);
    let url = server.target.url();
    run_ok(&url, &["put", "k", "1"]);
    let dir = tempfile::tempdir().unwrap();
    let backup = dir.path().join("backup");
    run_ok(&url, &["backup", backup.to_str().unwrap()]);
    (dir, backup)
}

/// A backup takes minutes to check, in which somebody may begin to use the directory.
#[test]
fn a_restore_leaves_alone_what_others_made_meanwhile() {
    let (dir, backup) = backup_of_a_key();
    let data = dir.path().join("data");
    let other = RefCell::new(None);
    let begin_other = |_, _| {
        other.borrow_mut().get_or_insert_with(|| {
            let other = Server::start_in(&data, &[]);
            run_ok(&other.target.url(), &["put", "own", "1"]);
            other
        });
        true
    };
    let refused = restore(&backup, &data, begin_other).unwrap_err().to_string();
    assert!(refused.contains("in use by another server or a restore"), "{refused}");
    // It ends first, and only what it left is there.
    drop(other.into_inner());
    let ended = |_, _| {
        if !data.join("log").exists() {
            let other = Server::start_in(&data, &[]);
            run_ok(&other.target.url(), &["put", "own", "2"]);
        }
        true
    };
    assert_eq!(run_ok(&Server::start_in(&data, &[]).target.url(), &["get", "own"]), "1\n");
    std::fs::remove_dir_all(&data).unwrap();
    let refused = restore(&backup, &data, ended).unwrap_err().to_string();
    assert!(refused.contains("is not empty"), "{refused}");
    assert_eq!(run_ok(&Server::start_in(&data, &[]).target.url(), &["get", "own"]), "2\n");
}

/// A machine that starts its server by itself must not serve half of a backup as if it were all.
#[test]
fn no_server_starts_on_half_of_a_restore() {
    let (dir, backup) = backup_of_a_key();
    let (data, half) = (dir.path().join("data"), dir.path().join("half"));
    let starts = Cell::new(0);
    restore(&backup, &data, |_, _| {
        // As it is if the restore is killed now: its files, and nobody who holds the lock.
        if data.exists() {
            std::fs::create_dir(&half).unwrap();
            for entry in std::fs::read_dir(&data).unwrap().map(Result::unwrap) {
                let to = half.join(entry.file_name());
                if entry.file_type().unwrap().is_dir() { std::fs::create_dir(to) } else { std::fs::write(to, "") }
                    .unwrap();
            }
            assert!(Server::try_start_in(&half, &[], None).is_none(), "a server starts on half of it");
            let ran = run("", &["serve", "--port", "0", "--data-dir", half.to_str().unwrap()]);
            assert!(ran.code == 1 && ran.err.contains("empty it and restore again"), "{ran:?}");
            std::fs::remove_dir_all(&half).unwrap();
            starts.set(starts.get() + 1);
        }
        true
    })
    .unwrap();
    assert!(starts.get() > 0);
    assert_eq!(run_ok(&Server::start_in(&data, &[]).target.url(), &["get", "k"]), "1\n");
}

#[test]
fn completions_and_the_manual_know_every_verb() {
    let verbs = [
        "get", "put", "patch", "del", "list", "watch", "publish", "search", "upsert", "export", "import", "backup",
        "restore", "top", "serve", "check",
    ];
    for arguments in
        [&["completions", "bash"][..], &["completions", "zsh"], &["completions", "fish"], &["man"], &["--help"]]
    {
        let text = run_ok("", arguments);
        for verb in verbs {
            assert!(text.contains(verb), "{arguments:?} without {verb}");
        }
    }
    // One page for all: it sends nobody to pages that are not there.
    assert!(!run_ok("", &["man"]).contains("kiss\\-vdb\\-get(1)"));
    assert_eq!(run("", &["completions", "tcsh"]).code, 2);
    assert_eq!(run("", &["list", "--limit", "0"]).code, 2);
    for verb in verbs {
        let help = run_ok("", &[verb, "--help"]);
        let is_ours = !matches!(verb, "serve" | "check");
        assert!(!is_ours || help.contains("Example"), "{verb}: {help}");
    }
    // A script that a shell cannot read is worse than none.
    let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
    bash.stdin.take().unwrap().write_all(run_ok("", &["completions", "bash"]).as_bytes()).unwrap();
    assert!(bash.wait().unwrap().success());
}

/// Whoever looks up a line finds what it means only if it is still written like that.
#[test]
fn the_log_lines_that_operations_md_explains_are_in_the_source() {
    fn append(dir: &Path, all: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                append(&entry, all);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                all.push_str(&std::fs::read_to_string(&entry).unwrap());
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut source = String::new();
    append(&root.join("src"), &mut source);
    let manual = std::fs::read_to_string(root.join("docs/operations.md")).unwrap();
    let table = manual.lines().skip_while(|line| !line.starts_with("| line | level |")).skip(2);
    let rows: Vec<&str> = table.take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 30, "{}", rows.len());
    for row in rows {
        let lines = row.split(" | ").next().unwrap();
        for line in lines.split('`').skip(1).step_by(2) {
            assert!(source.contains(&format!("\"{line}")), "no such line: {line}");
        }
    }
}

/// Names of the rows of a small run, each of which must have measured something.
fn bench(arguments: &[&str]) -> (Vec<String>, Value) {
    let small = [
        "bench",
        "--json",
        "--seconds",
        "0.2",
        "--keys",
        "2000",
        "--streams",
        "10",
        "--missed",
        "50",
        "-n",
        "300",
        "--dim",
        "8",
    ];
    let report: Value = serde_json::from_str(&run_ok("", &[&small[..], arguments].concat())).unwrap();
    assert_eq!((&report["is_complete"], &report["faults"]), (&json!(true), &json!([])), "{report}");
    let rows = report["phases"].as_array().unwrap();
    assert!(rows.iter().all(|row| row["requests"].as_u64() > Some(0)), "{report}");
    (rows.iter().map(|row| row["phase"].as_str().unwrap().to_owned()).collect(), report)
}

#[test]
fn bench_measures_what_it_is_asked_for_and_the_usual_unasked() {
    let (rows, report) = bench(&[]);
    let usual = ["fsync", "put", "get", "patch", "batch", "list", "upsert of 100", "search", "10 streams", "publish"];
    assert_eq!(rows, usual);
    assert!(report["phases"][1]["syncs_per_request"].as_f64().is_some_and(|syncs| syncs > 0.0 && syncs <= 1.0));

    let (rows, report) = bench(&["--only", "sends,streams,storm,snapshots,restart,put", "--bare"]);
    let asked = [
        "10 sends",
        "10 streams",
        "publish",
        "writes alone",
        "writes beside it",
        "storm of 10",
        "writes alone",
        "writes beside it",
        "snapshots of 2000",
        "start, empty",
        "start after kill -9",
        "start after a stop",
        "put",
        "put bare",
    ];
    assert_eq!(rows, asked);
    for ratio in ["put / bare put", "writes' p99 beside storm / alone", "writes' p99 beside snapshots / alone"] {
        assert!(report["ratios"][ratio].as_f64().is_some_and(|ratio| ratio > 0.0), "{report}");
    }

    let ran = run("", &["bench", "--only", "restart", "--url", "http://127.0.0.1:9"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.err.contains("leave out --url"), "{ran:?}");
}
