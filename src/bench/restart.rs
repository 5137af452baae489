//! How long a server takes to its first answer: with nothing, with what a crash left (the log), with what a stop left (a
//! snapshot). And what it weighs then.

use super::load::Tally;
use super::{Bench, MIB, Row, key, rounded};
use anyhow::{Context, ensure};
use hyper::Method;
use serde_json::{Value, json};
use std::time::Duration;

/// Starts with nothing; they take milliseconds.
const EMPTY_STARTS: usize = 5;
/// A server gives back what its start took within this time.
const SETTLE: Duration = Duration::from_secs(2);

impl Bench<'_> {
    /// Ends servers of our own, one by order and one by SIGKILL, and starts others in their place.
    pub(super) fn restart(&mut self) -> anyhow::Result<()> {
        ensure!(self.server.is_some(), "restart kills the server it measures, so it starts its own: leave out --url");
        let mut tally = Tally::new();
        for _ in 0..EMPTY_STARTS {
            self.stop_server()?;
            let took = self.start_anew()?;
            tally.record(took);
            tally.elapsed += took;
        }
        std::thread::sleep(SETTLE);
        let empty = self.resident_bytes()?.context("a server of our own")?;
        let binary = std::env::current_exe()?.metadata()?.len();
        let mut row = Row::new("start, empty", tally);
        row.more.push(("mib_resident", rounded(empty as f64 / MIB, 1)));
        row.more.push(("mib_binary", rounded(binary as f64 / MIB, 1)));
        self.add(row);

        self.prefill()?;
        let written = self.health()?["revision"].clone();
        std::thread::sleep(SETTLE);
        let full = self.resident_bytes()?.context("a server of our own")?;
        self.server.take().context("a server of our own")?.crash();
        let took = self.start_again()?;
        let mut row = self.started("start after kill -9", took, &written)?;
        let each = full.saturating_sub(empty) as f64 / self.args.keys as f64;
        row.more.push(("bytes_a_key_written", rounded(each, 0)));
        self.add(row);

        self.stop_server()?;
        let took = self.start_again()?;
        let row = self.started("start after a stop", took, &written)?;
        self.add(row);
        Ok(())
    }

    fn stop_server(&mut self) -> anyhow::Result<()> {
        self.server.take().context("a server of our own")?.stop()
    }

    /// What a start took; a fault where it lacks something.
    fn started(&mut self, name: &str, took: Duration, written: &Value) -> anyhow::Result<Row> {
        let found = self.health()?["revision"].clone();
        let last = format!("/v1/state/{}", key(self.args.keys - 1));
        let is_there = self.calls([(Method::GET, last, String::new())].into_iter()).is_ok();
        if found.as_u64() < written.as_u64() || !is_there {
            self.faults.push(format!("{name}: revision {found} where {written} was answered"));
        }
        let resident = self.resident_bytes()?.context("a server of our own")?;
        let mut tally = Tally::new();
        tally.record(took);
        tally.elapsed = took;
        let mut row = Row::new(name, tally);
        row.more.push(("keys", json!(self.args.keys)));
        row.more.push(("mib_resident", rounded(resident as f64 / MIB, 1)));
        Ok(row)
    }
}
