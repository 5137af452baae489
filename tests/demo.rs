//! The two demos, run as a newcomer runs them: the program itself and the script in curl.
//!
//! They check their own claims; what is checked here is that they say so, fail when they should, and leave nothing behind.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// A server on a free port, killed when dropped.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(dir: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiss-vdb"));
        command.current_dir(dir).args(["serve", "--port", "0", "--data-dir", "data"]).env_remove("API_KEY");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut banner = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut banner).unwrap();
        let url = banner.split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_owned();
        Self { child, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn demo(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiss-vdb"));
    command.args(["demo", "--fast"]).current_dir(dir).env("TMPDIR", dir);
    command
}

fn script(url: &str) -> Output {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/demo.sh");
    Command::new("bash").arg(path).env("KISS_URL", url).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Whether a demo's server still runs on a directory below this one.
fn servers_below(dir: &Path) -> usize {
    let name = dir.to_str().unwrap().as_bytes();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let arguments = processes.filter_map(|p| std::fs::read(p.path().join("cmdline")).ok());
    arguments.filter(|line| line.windows(name.len()).any(|part| part == name)).count()
}

#[test]
fn the_demo_holds_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    // Settings of the user's own server must not reach the demo's.
    let output = demo(dir.path()).env("API_KEY", "secret").env("EPHEMERAL", "true").output().unwrap();
    let shown = text(&output);
    assert!(output.status.success(), "{shown}");
    for fact in [
        "told 409 with expected 7 and actual 8",
        "\"reason\":\"expired\"",
        "When a massive star runs out of fuel",
        "all 50 missed orders came: ids ",
        "SIGKILL",
        "vectors are there, at their revisions",
        "none missing, none twice, none reused",
        "14 claims checked",
    ] {
        assert!(shown.contains(fact), "no {fact:?} in:\n{shown}");
    }
    assert!(!shown.contains('\x1b'), "colour although this is no terminal");
    let wide: Vec<_> = shown.lines().filter(|line| line.chars().count() > 100).collect();
    assert!(wide.is_empty(), "lines of more than 100 columns: {wide:#?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "its directory is still there");
    assert_eq!(servers_below(dir.path()), 0, "its server still runs");
}

#[test]
fn an_interrupted_demo_fails_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = demo(dir.path()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("━━ 1")), "act 1 never began");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    // Read on, so that the demo never waits for this reader.
    assert!(lines.all(|line| line.is_ok()));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("interrupted"), "{}", text(&output));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "its directory is still there");
    assert_eq!(servers_below(dir.path()), 0, "its server still runs");
}

#[test]
fn the_script_holds_twice_and_fails_without_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    for round in ["first", "second"] {
        let output = script(&server.url);
        assert!(output.status.success(), "{round}: {}", text(&output));
        assert!(text(&output).contains("All steps did what they say"), "{round}: {}", text(&output));
    }
    let url = server.url.clone();
    drop(server);
    let output = script(&url);
    assert!(!output.status.success() && text(&output).contains("no server at"), "{}", text(&output));
}
