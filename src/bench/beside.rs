//! Writers alone, then the same writers beside something that must not hold them up: streams that all come back at once, or
//! snapshots.

use super::load::{Load, Tally};
use super::streams::{self, StreamLoad};
use super::{Bench, MIB, Row, puts, rounded};
use crate::client::Client;
use anyhow::anyhow;
use hyper::Method;
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Writes beside a storm: connections, writes a second, keys.
const STORM_WRITERS: usize = 8;
const STORM_WRITES_PER_SECOND: f64 = 2000.0;
const STORM_KEYS: u64 = 1000;
/// How often the server's memory is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What was measured.
struct Beside<T> {
    /// What `other` found.
    other: T,
    /// Most that the server held, beyond what it held before, in bytes; and what it held before.
    grown: Option<(u64, u64)>,
}

impl Bench<'_> {
    /// All streams come back at once.
    pub(super) fn storm(&mut self) -> anyhow::Result<()> {
        self.refresh_server()?;
        let args = self.args;
        let load = StreamLoad {
            endpoint: self.endpoint.clone(),
            streams: args.streams,
            threads: 1,
            publishers: args.publishers,
            rate: f64::INFINITY,
            events: args.missed,
            resume_after: Some(streams::revision_of_a_write(&self.endpoint)?),
            stuck: 0,
            peer: streams::Peer::Kiss,
            value_bytes: args.value_size,
            own_keys: false,
        };
        load.publish_all()?;
        let writes = |bench: &Self| Load {
            connections: STORM_WRITERS,
            rate: Some(STORM_WRITES_PER_SECOND),
            ..bench.load(&bench.endpoint, puts(bench.endpoint.clone(), STORM_KEYS, args.value_size))
        };
        let beside = self.beside("storm", writes, |_| load.storm())?;
        let (tally, faults) = beside.other;
        let mut row = Row::new(format!("storm of {}", args.streams), tally);
        row.more.extend(beside.grown.map(|(grown, _)| ("mib_more_at_peak", rounded(grown as f64 / MIB, 1))));
        row.more.push(("lost", json!(faults.lost)));
        if !faults.is_none() {
            self.faults.push(format!("storm: {faults:?}"));
        }
        self.add(row);
        Ok(())
    }

    /// One snapshot after the other, asked for.
    pub(super) fn snapshots(&mut self) -> anyhow::Result<()> {
        self.refresh_server()?;
        self.prefill()?;
        let args = self.args;
        let writes =
            |bench: &Self| bench.load(&bench.endpoint, puts(bench.endpoint.clone(), args.keys, args.value_size));
        let target = self.target.clone();
        let beside = self.beside("snapshots", writes, |is_over| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (mut client, mut tally, start) = (Client::new(&target), Tally::new(), Instant::now());
            while !is_over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                runtime.block_on(client.call(Method::POST, "/v1/admin/snapshot", ""))?.success()?;
                tally.record(begun.elapsed());
                tally.elapsed = start.elapsed();
            }
            Ok(tally)
        })?;
        let mut row = Row::new(format!("snapshots of {}", args.keys), beside.other);
        if let Some((grown, before)) = beside.grown {
            row.more.push(("mib_before", rounded(before as f64 / MIB, 1)));
            row.more.push(("mib_more_at_peak", rounded(grown as f64 / MIB, 1)));
        }
        self.add(row);
        Ok(())
    }

    /// Runs the writers alone, then beside `other`, which is told when they are done. Adds a row of each and the ratio of their p99.
    fn beside<T: Send>(
        &mut self,
        name: &str,
        writes: impl Fn(&Self) -> Load,
        other: impl FnOnce(&AtomicBool) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<Beside<T>> {
        let alone = writes(self).run("writes alone")?;
        let before = self.resident_bytes()?;
        let [are_written, is_over] = [const { AtomicBool::new(false) }; 2];
        let (beside, other, peak) = std::thread::scope(|scope| {
            let other = scope.spawn(|| other(&are_written));
            let (server, is_over) = (self.server.as_ref(), &is_over);
            let peak = scope.spawn(move || {
                let mut peak = 0;
                while !is_over.load(Ordering::Relaxed) {
                    peak = peak.max(server.and_then(|server| server.resident_bytes().ok()).unwrap_or(0));
                    std::thread::sleep(LOOK_EVERY);
                }
                peak
            });
            let beside = writes(self).run(&format!("writes beside {name}"));
            are_written.store(true, Ordering::Relaxed);
            let other = other.join().map_err(|_| anyhow!("the thread of the {name} panicked"));
            is_over.store(true, Ordering::Relaxed);
            (beside, other, peak.join().unwrap_or(0))
        });
        let beside = beside?;
        self.ratios.push((format!("writes' p99 beside {name} / alone"), beside.micros(0.99) / alone.micros(0.99)));
        self.add(Row::new("writes alone", alone));
        self.add(Row::new("writes beside it", beside));
        Ok(Beside { other: other??, grown: before.map(|before| (peak.saturating_sub(before), before)) })
    }
}
