//! A real server for tests: the built binary on a free port, talked to over HTTP.
#![allow(dead_code, unused_imports, missing_docs, clippy::unwrap_used)]

use kiss_vdb::client::{Answer, Client, Target};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;
#[allow(unused_imports)]
pub use tokio::time::{Duration, timeout};

pub const BINARY: &str = env!("CARGO_BIN_EXE_kiss-vdb");

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    pub target: Target,
    pub banner: String,
    pub dir: PathBuf,
    _temporary: Option<TempDir>,
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.arg("serve").args(arguments);
    if !arguments.contains(&"--port") {
        command.args(["--port", "0"]);
    }
    for (name, _) in std::env::vars() {
        if kiss_vdb::config::SETTINGS.iter().any(|s| s.env == name) {
            command.env_remove(name);
        }
    }
    command.env("RUST_LOG", "warn").current_dir(std::env::temp_dir());
    command
}

impl Server {
    /// On a new directory that goes with the server.
    pub fn start(arguments: &[&str]) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let mut server = Self::start_in(temporary.path(), arguments);
        server._temporary = Some(temporary);
        server
    }

    pub fn start_in(dir: &Path, arguments: &[&str]) -> Self {
        Self::try_start_in(dir, arguments, None).expect("the server starts")
    }

    /// None when it ended instead of starting.
    pub fn try_start_in(dir: &Path, arguments: &[&str], key: Option<&str>) -> Option<Self> {
        Self::launch(dir, arguments, key.map(|key| ("API_KEY", key)), key)
    }

    /// With one more variable in its environment.
    pub fn start_with(dir: &Path, arguments: &[&str], variable: Option<(&str, &str)>) -> Self {
        Self::launch(dir, arguments, variable, None).expect("the server starts")
    }

    fn launch(dir: &Path, arguments: &[&str], variable: Option<(&str, &str)>, key: Option<&str>) -> Option<Self> {
        let mut command = command(arguments);
        command.args(["--data-dir", dir.to_str().unwrap()]).stdout(Stdio::piped());
        command.envs(variable);
        let mut child = command.spawn().unwrap();
        let mut banner = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut banner).unwrap();
        if banner.is_empty() {
            child.wait().unwrap();
            return None;
        }
        // A server with TLS is for other clients.
        let url = banner.split_whitespace().find(|w| w.starts_with("http://")).unwrap_or("http://127.0.0.1:0");
        let target = Target::new(url, key.map(str::to_owned)).unwrap();
        Some(Self { child, target, banner: banner.clone(), dir: dir.to_owned(), _temporary: None })
    }

    /// Runs the program and returns what it printed on stderr; it must fail.
    pub fn refuses_to_start(dir: &Path, arguments: &[&str]) -> String {
        let output = command(arguments).args(["--data-dir", dir.to_str().unwrap()]).output().unwrap();
        assert!(!output.status.success(), "it started");
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn client(&self) -> Client {
        Client::new(&self.target)
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; returns whether it ended with success.
    pub fn stop(mut self) -> bool {
        self.signal(rustix::process::Signal::TERM);
        self.child.wait().unwrap().success()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A process of a test's own making; killed when dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Starts a command that serves, and waits until it does. Returns where.
pub fn serving(mut command: Command) -> (Process, String) {
    let mut child = Process(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut banner = String::new();
    BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut banner).unwrap();
    let url = banner.split_whitespace().find(|w| w.starts_with("http://")).expect("the banner names the URL");
    (child, url.to_owned())
}

/// `GET /path`, `PUT /path body` and so on, as one line; JSON where there is a body.
pub async fn call(client: &mut Client, line: &str) -> Answer {
    let mut parts = line.splitn(3, ' ');
    let method = parts.next().unwrap().parse().unwrap();
    let path = parts.next().unwrap();
    client.call(method, path, parts.next().unwrap_or_default().to_owned()).await.unwrap()
}

/// As `call`; the answer must be a success.
pub async fn ok(client: &mut Client, line: &str) -> serde_json::Value {
    let answer = call(client, line).await;
    answer.success().unwrap_or_else(|e| panic!("{line}: {e}"))
}

/// Whether every member of `part` is in `whole` with the same value; arrays compare element by element.
pub fn contains(whole: &serde_json::Value, part: &serde_json::Value) -> bool {
    use serde_json::Value::{Array, Object};
    match (whole, part) {
        (Object(w), Object(p)) => p.iter().all(|(name, value)| w.get(name).is_some_and(|v| contains(v, value))),
        (Array(w), Array(p)) => w.len() == p.len() && w.iter().zip(p).all(|(w, p)| contains(w, p)),
        _ => whole == part,
    }
}
