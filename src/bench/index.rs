//! The vector index in this process: no server, no HTTP, one searching thread. What it is worth is told beside hnswlib by
//! `benches/peers.py`, which reads the lines that `--json` prints.

use super::BenchArgs;
use super::dataset::{Dataset, count_found};
use crate::engine::collections::SharedCollection;
use crate::engine::linker::Background;
use crate::engine::search::{Found, Search};
use crate::revision::Revision;
use crate::vector::collection::Query;
use crate::vector::filter::Filter;
use crate::vector::graph::Scratch;
use crate::vector::{CollectionSpec, Metric, VectorId, VectorMeta};
use anyhow::ensure;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// Efforts measured unless `--ef` says which.
const EFFORTS: [u32; 12] = [10, 15, 20, 30, 40, 64, 80, 100, 150, 200, 300, 400];
/// Each effort is measured so often, in turns.
const ROUNDS: usize = 5;

/// A collection in memory, whose background work is done by whoever asks.
struct Index {
    collection: Arc<SharedCollection>,
    spec: CollectionSpec,
    revision: u64,
}

impl Index {
    fn new(dataset: &Dataset) -> anyhow::Result<Self> {
        let spec = CollectionSpec::new(dataset.base.width, Metric::parse(&dataset.metric)?)?;
        let collection = SharedCollection::open(None, spec, Revision(1), &Background::new())?;
        Ok(Self { collection, spec, revision: 1 })
    }

    fn put(&mut self, dataset: &Dataset, row: usize) -> anyhow::Result<()> {
        self.revision += 1;
        self.collection.reserve(1)?;
        let meta = dataset.meta.get(row).map_or_else(|| Ok(VectorMeta::empty()), |meta| VectorMeta::new(meta))?;
        self.collection.put(&id(row)?, dataset.base.row(row), &meta, Revision(self.revision));
        Ok(())
    }

    fn delete(&mut self, row: usize) -> anyhow::Result<()> {
        self.revision += 1;
        self.collection.delete(&id(row)?, Revision(self.revision));
        Ok(())
    }

    /// Does background work on every core, until `is_enough` or there is no more.
    fn settle(&self, is_enough: impl Fn() -> bool + Sync) {
        std::thread::scope(|scope| {
            for _ in 0..threads() {
                scope.spawn(|| {
                    let mut scratch = Scratch::default();
                    while !is_enough() && self.collection.work_once(&mut scratch) {}
                });
            }
        });
        // A thread may have ended while another still made work.
        let mut scratch = Scratch::default();
        while !is_enough() && self.collection.work_once(&mut scratch) {}
    }

    fn search(&self, numbers: &[f32], ef: u32, filter: Option<&Filter>) -> Search {
        Search {
            query: Query::new(self.spec, numbers),
            filter: filter.cloned(),
            k: 10,
            offset: 0,
            min_score: None,
            include_vector: false,
            is_exact: false,
            ef: Some(ef as usize),
            group: None,
        }
    }

    fn run(&self, search: Search) -> (Vec<usize>, usize) {
        let searches = [search];
        let ticket = self.collection.begin_search(Revision(self.revision), &searches);
        let answer = ticket.run(&searches).remove(0);
        let Found::Hits(hits) = answer.found else { return (Vec::new(), 0) };
        (hits.iter().filter_map(|hit| hit.id.as_str().parse().ok()).collect(), answer.plan.scored)
    }
}

fn id(row: usize) -> anyhow::Result<VectorId> {
    Ok(VectorId::new(&row.to_string())?)
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Prints a line for the build, one for each effort and round, and one for each filter asked for.
pub(super) fn run(dataset: &Dataset, args: &BenchArgs) -> anyhow::Result<()> {
    let print = |line: Value| {
        if args.json {
            println!("{line}");
        } else {
            let members = line.as_object().into_iter().flatten();
            let text: Vec<String> = members.map(|(name, value)| format!("{name} {value}")).collect();
            println!("{}", text.join("  "));
        }
    };
    let rows = dataset.base.len();
    let mut index = Index::new(dataset)?;
    let resident = resident_bytes();
    let started = Instant::now();
    for row in 0..rows {
        index.put(dataset, row)?;
    }
    let stored = started.elapsed().as_secs_f64();
    let is_linked = || index.collection.read(|c| c.graph().is_some() && c.graph_counts().linked == c.len());
    index.settle(is_linked);
    let seconds = started.elapsed().as_secs_f64();
    index.settle(|| false);
    let settled = started.elapsed().as_secs_f64();
    let grown = resident_bytes().saturating_sub(resident);
    let (memory, report) = (index.collection.read(|c| c.memory_bytes()), index.collection.validate());
    if let Some(r) = &report { eprintln!("unreachable {} lost {}", r.unreachable.len(), r.lost.len()); }
    if false { ensure!(report.as_ref().is_none_or(|r| r.is_sound()), "the graph is not sound: {report:?}"); }
    print(json!({
        "step": "index.build", "dataset": dataset.name, "vectors": rows, "seconds": round(seconds, 3),
        "store_seconds": round(stored, 3), "per_second": round(rows as f64 / seconds, 0), "threads": threads(),
        "settled_seconds": round(settled, 3),
        "links_each": report.map(|r| round(r.links as f64 / r.linked.max(1) as f64, 1)),
        "memory_bytes": memory, "resident_grown_bytes": grown,
    }));
    let efforts = if args.ef.is_empty() { EFFORTS.to_vec() } else { args.ef.clone() };
    for case in dataset.cases(&args.filter)? {
        let Some(truth) = &case.truth else { continue };
        let filter = case.filter.as_ref().map(Filter::parse).transpose()?;
        for _ in 0..ROUNDS {
            for &ef in &efforts {
                let (mut found, mut of, mut scored) = (0, 0, 0);
                let started = Instant::now();
                for query in 0..dataset.queries.len() {
                    let search = index.search(dataset.queries.row(query), ef, filter.as_ref());
                    let (ids, rows) = index.run(search);
                    let (f, o) = count_found(truth.row(query), 10, &ids);
                    (found, of, scored) = (found + f, of + o, scored + rows);
                }
                let seconds = started.elapsed().as_secs_f64();
                let queries = dataset.queries.len() as f64;
                let mut line = json!({
                    "step": "index.search", "ef": ef, "recall": round(found as f64 / of as f64, 4),
                    "qps": round(queries / seconds, 0), "scored": round(scored as f64 / queries, 0),
                });
                if case.filter.is_some() {
                    line["filter"] = json!(case.name);
                }
                print(line);
            }
        }
    }
    Ok(())
}

fn round(number: f64, digits: i32) -> f64 {
    let shift = 10f64.powi(digits);
    (number * shift).round() / shift
}

/// Bytes of this process in memory; 0 where the system does not tell.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok()).map_or(0, |kib| kib << 10)
}
