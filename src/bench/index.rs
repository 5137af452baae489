//! The vector index in this process: no server, no HTTP, one searching thread. What it is worth is told beside hnswlib by
//! `benches/peers.py`, which reads the lines that `--json` prints.

use super::BenchArgs;
use super::dataset::{Dataset, count_found, uniform};
use crate::engine::collections::SharedCollection;
use crate::engine::linker::Background;
use crate::engine::search::{Found, Search};
use crate::revision::Revision;
use crate::vector::collection::{Collection, Query};
use crate::vector::distance::kernels;
use crate::vector::filter::Filter;
use crate::vector::graph::Scratch;
use crate::vector::plan::EF_DEFAULT;
use crate::vector::validate::Report;
use crate::vector::{CollectionSpec, Metric, VectorId, VectorMeta};
use anyhow::ensure;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// Efforts measured unless `--ef` says which.
const EFFORTS: [u32; 12] = [10, 15, 20, 30, 40, 64, 80, 100, 150, 200, 300, 400];
/// Each effort is measured so often, in turns.
const ROUNDS: usize = 5;

/// Turnovers of `churn`, and the steps of one.
const TURNOVERS: usize = 10;
const CHURN_STEPS: usize = 100;

struct Measured {
    recall: f64,
    per_second: f64,
    scored: f64,
}

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

    /// Links everything, on every core.
    fn link_all(&self) {
        std::thread::scope(|scope| {
            for _ in 0..threads() {
                scope.spawn(|| {
                    let mut scratch = Scratch::default();
                    while !self.is_linked() {
                        if !self.collection.work_once(&mut scratch) {
                            // Another thread makes the next jobs.
                            std::thread::yield_now();
                        }
                    }
                });
            }
        });
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

    fn is_linked(&self) -> bool {
        self.collection.read(|c| c.graph().is_some() && c.graph_counts().linked == c.len())
    }

    /// As a client's write would find it, and nearly linked.
    fn has_room(&self) -> bool {
        self.collection.has_room() && self.collection.read(|c| c.graph_counts().tail < CHURN_STEPS)
    }

    /// Fails when the graph is not what it should be.
    fn sound(&self) -> anyhow::Result<Option<Report>> {
        let report = self.collection.validate();
        ensure!(report.as_ref().is_none_or(Report::is_sound), "the graph is not sound: {report:?}");
        Ok(report)
    }

    /// The nearest by looking at everything.
    fn truth(&self, dataset: &Dataset, filter: Option<&Filter>) -> Vec<Vec<i32>> {
        let exact = |query| {
            let search = Search { is_exact: true, ..self.search(dataset.queries.row(query), 1, filter) };
            // The cast: rows are counted in far fewer.
            self.run(search).0.into_iter().map(|row| row as i32).collect()
        };
        (0..dataset.queries.len()).map(exact).collect()
    }

    /// All queries, one after another.
    fn measure(&self, dataset: &Dataset, truth: &[Vec<i32>], ef: u32, filter: Option<&Filter>) -> Measured {
        let (mut found, mut of, mut scored) = (0, 0, 0);
        let started = Instant::now();
        for (query, truth) in truth.iter().enumerate() {
            let (ids, rows) = self.run(self.search(dataset.queries.row(query), ef, filter));
            let (f, o) = count_found(truth, 10, &ids);
            (found, of, scored) = (found + f, of + o, scored + rows);
        }
        let seconds = started.elapsed().as_secs_f64();
        let queries = truth.len() as f64;
        Measured { recall: found as f64 / of as f64, per_second: queries / seconds, scored: scored as f64 / queries }
    }

    fn search(&self, numbers: &[f32], ef: u32, filter: Option<&Filter>) -> Search {
        Search {
            query: Query::new(self.spec, numbers),
            stored: None,
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
        let answer = ticket.run(&searches).expect("one search ends in time").remove(0);
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

fn print(args: &BenchArgs, line: &Value) {
    if args.json {
        println!("{line}");
    } else {
        let members = line.as_object().into_iter().flatten();
        let text: Vec<String> = members.map(|(name, value)| format!("{name} {value}")).collect();
        println!("{}", text.join("  "));
    }
}

/// Prints a line for the build, and one for each filter asked for, each effort and each round.
pub(super) fn run(dataset: &Dataset, args: &BenchArgs) -> anyhow::Result<()> {
    let rows = dataset.base.len();
    let mut index = Index::new(dataset)?;
    let resident = resident_bytes();
    let started = Instant::now();
    for row in 0..rows {
        index.put(dataset, row)?;
    }
    let stored = started.elapsed().as_secs_f64();
    index.link_all();
    let seconds = started.elapsed().as_secs_f64();
    index.settle(|| false);
    let settled = started.elapsed().as_secs_f64();
    let grown = resident_bytes().saturating_sub(resident);
    let (memory, report) = (index.collection.read(Collection::memory_bytes), index.sound()?);
    print(
        args,
        &json!({
            "step": "index.build", "dataset": dataset.name, "vectors": rows, "seconds": round(seconds, 3),
            "store_seconds": round(stored, 3), "settled_seconds": round(settled, 3),
            "per_second": round(rows as f64 / seconds, 0), "threads": threads(),
            "links_each": report.map(|r| round(r.links as f64 / r.linked.max(1) as f64, 1)),
            "memory_bytes": memory, "resident_grown_bytes": grown,
        }),
    );
    let efforts = if args.ef.is_empty() { EFFORTS.to_vec() } else { args.ef.clone() };
    for case in dataset.cases(&args.filter)? {
        let filter = case.filter.as_ref().map(Filter::parse).transpose()?;
        let truth: Vec<Vec<i32>> = match &case.truth {
            Some(truth) => (0..truth.len()).map(|query| truth.row(query).to_vec()).collect(),
            None => index.truth(dataset, filter.as_ref()),
        };
        for _ in 0..ROUNDS {
            for &ef in &efforts {
                let measured = index.measure(dataset, &truth, ef, filter.as_ref());
                let mut line = json!({
                    "step": "index.search", "ef": ef, "recall": round(measured.recall, 4),
                    "qps": round(measured.per_second, 0), "scored": round(measured.scored, 0),
                });
                if case.filter.is_some() {
                    line["filter"] = json!(case.name);
                }
                print(args, &line);
            }
        }
    }
    let queries: Vec<usize> = (0..dataset.queries.len()).collect();
    let all = |threads: usize| -> anyhow::Result<f64> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let search =
            |&query: &usize| index.run(index.search(dataset.queries.row(query), EF_DEFAULT as u32, None)).0.len();
        // Once to fill the caches.
        pool.install(|| queries.par_iter().map(search).sum::<usize>());
        let started = Instant::now();
        pool.install(|| queries.par_iter().map(search).sum::<usize>());
        Ok(queries.len() as f64 / started.elapsed().as_secs_f64())
    };
    let (one, many) = (all(1)?, all(threads())?);
    print(
        args,
        &json!({
            "step": "index.parallel", "threads": threads(), "qps": round(many, 0), "qps_of_one": round(one, 0),
            "ratio": round(many / one, 2),
        }),
    );
    Ok(())
}

/// Half of the vectors are in. Ten times all of them leave and others come: one by one at random, then cluster by cluster.
/// Prints recall and memory beside those of an index freshly made of the same vectors.
pub(super) fn churn(dataset: &Dataset, args: &BenchArgs) -> anyhow::Result<()> {
    let rows = dataset.base.len();
    for clustered in [false, true] {
        let mut index = Index::new(dataset)?;
        let mut state = 7;
        let mut live: Vec<usize> = (0..rows / 2).collect();
        let mut away: Vec<usize> = (rows / 2..rows).collect();
        for &row in &live {
            index.put(dataset, row)?;
        }
        index.settle(|| false);
        for turnover in 0..=TURNOVERS {
            if turnover > 0 {
                let step = (rows / 2 / CHURN_STEPS).max(1);
                for _ in 0..CHURN_STEPS {
                    let leaving = pick(dataset, &mut live, step, clustered, &mut state);
                    let coming = pick(dataset, &mut away, step, clustered, &mut state);
                    for &row in &leaving {
                        index.delete(row)?;
                    }
                    for &row in &coming {
                        index.put(dataset, row)?;
                    }
                    live.extend(coming);
                    away.extend(leaving);
                    index.settle(|| index.has_room());
                }
            }
            if turnover != 0 && turnover != 1 && turnover != TURNOVERS {
                continue;
            }
            index.settle(|| false);
            index.sound()?;
            let mut fresh = Index::new(dataset)?;
            live.sort_unstable();
            for &row in &live {
                fresh.put(dataset, row)?;
            }
            fresh.settle(|| false);
            let truth = fresh.truth(dataset, None);
            let efforts = if args.ef.is_empty() { vec![EF_DEFAULT as u32] } else { args.ef.clone() };
            for ef in efforts {
                let [ours, new] = [&index, &fresh].map(|i| i.measure(dataset, &truth, ef, None));
                let [bytes, new_bytes] = [&index, &fresh].map(|i| i.collection.read(Collection::memory_bytes));
                print(
                    args,
                    &json!({
                        "step": "churn", "clustered": clustered, "turnovers": turnover, "ef": ef,
                        "recall": round(ours.recall, 4), "recall_fresh": round(new.recall, 4),
                        "qps": round(ours.per_second, 0), "qps_fresh": round(new.per_second, 0),
                        "memory_ratio": round(bytes as f64 / new_bytes as f64, 3),
                    }),
                );
            }
        }
    }
    Ok(())
}

/// Takes rows out of a list: any, or one and those nearest to it.
fn pick(dataset: &Dataset, from: &mut Vec<usize>, count: usize, clustered: bool, state: &mut u64) -> Vec<usize> {
    let mut any = |below: usize| (f64::from(uniform(state).abs()) * below as f64) as usize % below.max(1);
    if !clustered {
        return (0..count.min(from.len())).map(|_| from.swap_remove(any(from.len()))).collect();
    }
    let centre = dataset.base.row(from[any(from.len())]);
    let l2 = kernels().l2_squared;
    let mut near: Vec<(f32, usize)> =
        from.par_iter().enumerate().map(|(at, &row)| (l2(centre, dataset.base.row(row)), at)).collect();
    near.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let mut places: Vec<usize> = near.iter().take(count).map(|&(_, at)| at).collect();
    places.sort_unstable();
    places.into_iter().rev().map(|at| from.swap_remove(at)).collect()
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
