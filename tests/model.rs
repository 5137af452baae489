//! The engine against a naive model: random commands, restarts and snapshots in between, every answer compared.
//!
//! What would break: a rule of keys, batches, conditions or vectors that holds in the handler but not after recovery.
#![allow(missing_docs, clippy::unwrap_used)]

use kiss_vdb::config::Resolved;
use kiss_vdb::engine::Engine;
use kiss_vdb::engine::command::{Command, Condition, Key, Op, Outcome, Value, VectorSelection, VectorWrite};
use kiss_vdb::engine::json::compact;
use kiss_vdb::engine::search::{Found, Search};
use kiss_vdb::engine::snapshot::Pace;
use kiss_vdb::error::Rejection;
use kiss_vdb::revision::Revision;
use kiss_vdb::vector::collection::Query;
use kiss_vdb::vector::filter::Filter;
use kiss_vdb::vector::{CollectionName, CollectionSpec, Metric, Vector, VectorId, VectorMeta};
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::path::Path;

const DIM: usize = 3;

/// A step of a history.
#[derive(Clone, Debug)]
enum Step {
    Batch(Vec<Change>),
    Create(usize, usize),
    Drop(usize),
    DeleteMatching(usize, u8),
    Search(usize, [i8; DIM], usize, Option<u8>),
    Snapshot,
    /// Ends the engine in order and opens the directory again.
    Restart,
    /// Copies the directory as it is, as a power cut would leave it, and goes on with the copy.
    Crash,
}

#[derive(Clone, Debug)]
enum Change {
    Put(u8, i16, Option<bool>),
    Patch(u8, u8, Option<i16>),
    Delete(u8),
    Write(VectorWrite, usize, u8, Option<[i8; DIM]>, Option<u8>),
    Remove(usize, u8),
}

fn change() -> impl Strategy<Value = Change> {
    let numbers =
        || prop::array::uniform3(-9i8..9).prop_filter("cosine needs a direction", |v| v.iter().any(|&n| n != 0));
    prop_oneof![
        4 => (0..12u8, any::<i16>(), prop::option::weighted(0.3, any::<bool>())).prop_map(|(k, v, c)| Change::Put(k, v, c)),
        3 => (0..12u8, 0..3u8, prop::option::of(any::<i16>())).prop_map(|(k, f, v)| Change::Patch(k, f, v)),
        2 => (0..12u8).prop_map(Change::Delete),
        6 => (0..3usize, 0..3usize, 0..20u8, numbers(), prop::option::of(0..4u8)).prop_map(|(w, c, id, v, m)| {
            let write = [VectorWrite::Add, VectorWrite::Upsert, VectorWrite::Update][w];
            Change::Write(write, c, id, Some(v), m)
        }),
        2 => (0..3usize, 0..20u8, 0..4u8).prop_map(|(c, id, m)| Change::Write(VectorWrite::Update, c, id, None, Some(m))),
        2 => (0..3usize, 0..20u8).prop_map(|(c, id)| Change::Remove(c, id)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => change().prop_map(|c| Step::Batch(vec![c])),
        6 => prop::collection::vec(change(), 2..6).prop_map(Step::Batch),
        3 => (0..3usize, 0..3usize).prop_map(|(c, m)| Step::Create(c, m)),
        1 => (0..3usize).prop_map(Step::Drop),
        1 => (0..3usize, 0..4u8).prop_map(|(c, m)| Step::DeleteMatching(c, m)),
        6 => (0..3usize, prop::array::uniform3(1i8..9), 1..25usize, prop::option::of(0..4u8)).prop_map(|(c, q, k, f)| Step::Search(c, q, k, f)),
        1 => Just(Step::Snapshot),
        1 => Just(Step::Restart),
        1 => Just(Step::Crash),
    ]
}

#[derive(Clone, Debug, PartialEq)]
struct ModelEntry {
    value: Json,
    revision: u64,
    created: u64,
}

#[derive(Clone, Debug, PartialEq)]
struct ModelVector {
    numbers: Vec<f32>,
    meta: Json,
    revision: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    keys: BTreeMap<String, ModelEntry>,
    collections: BTreeMap<usize, (Metric3, BTreeMap<String, ModelVector>)>,
    revision: u64,
}

/// `Metric` by number, so that the model needs nothing of the engine's ordering.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Metric3(usize);

impl Metric3 {
    fn real(self) -> Metric {
        [Metric::Cosine, Metric::Dot, Metric::L2][self.0]
    }

    fn score(self, a: &[f32], b: &[f32]) -> f64 {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        match self.0 {
            0 => dot(a, b) / (dot(a, a) * dot(b, b)).sqrt(),
            1 => dot(a, b),
            _ => -a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>().sqrt(),
        }
    }
}

fn key(k: u8) -> String {
    format!("k{k}")
}

impl Model {
    /// Applies one change or says with which kind of rejection it is refused.
    fn change(&mut self, change: &Change) -> Result<(), &'static str> {
        let next = self.revision + 1;
        match change {
            Change::Put(k, v, condition) => {
                let exists = self.keys.contains_key(&key(*k));
                if condition.is_some_and(|absent| absent == exists) {
                    return Err("conflict");
                }
                let created = self.keys.get(&key(*k)).map_or(next, |e| e.created);
                self.keys.insert(key(*k), ModelEntry { value: json!({ "v": v }), revision: next, created });
            }
            Change::Patch(k, field, v) => {
                let created = self.keys.get(&key(*k)).map_or(next, |e| e.created);
                let mut value = self.keys.get(&key(*k)).map_or(json!({}), |e| e.value.clone());
                let object = value.as_object_mut().unwrap();
                match v {
                    Some(v) => drop(object.insert(format!("f{field}"), json!(v))),
                    None => drop(object.remove(&format!("f{field}"))),
                }
                self.keys.insert(key(*k), ModelEntry { value, revision: next, created });
            }
            Change::Delete(k) => drop(self.keys.remove(&key(*k)).ok_or("no key")?),
            Change::Write(write, c, id, numbers, meta) => {
                let (_, vectors) = self.collections.get_mut(c).ok_or("no collection")?;
                let id = format!("v{id}");
                let old = vectors.get(&id).cloned();
                let fresh = || json!({ "m": meta });
                let vector = match (write, old) {
                    (VectorWrite::Add, Some(_)) => return Err("exists"),
                    (VectorWrite::Update, None) => return Err("no vector"),
                    (VectorWrite::Update, Some(old)) => ModelVector {
                        numbers: numbers.map_or(old.numbers, |n| n.map(f32::from).to_vec()),
                        meta: meta.map_or(old.meta, |_| fresh()),
                        revision: next,
                    },
                    _ => ModelVector {
                        numbers: numbers.unwrap().map(f32::from).to_vec(),
                        meta: if meta.is_some() { fresh() } else { json!({}) },
                        revision: next,
                    },
                };
                vectors.insert(id, vector);
            }
            Change::Remove(c, id) => {
                let (_, vectors) = self.collections.get_mut(c).ok_or("no collection")?;
                vectors.remove(&format!("v{id}")).ok_or("no vector")?;
            }
        }
        self.revision = next;
        Ok(())
    }
}

fn op(change: &Change, model: &Model) -> Op {
    let meta = |m: &Option<u8>| m.map(|m| VectorMeta::new(&format!("{{\"m\":{m}}}")).unwrap());
    match change {
        Change::Put(k, v, condition) => {
            let absent = condition.map(|absent| {
                if absent { Revision(0) } else { Revision(model.keys.get(&key(*k)).map_or(u64::MAX, |e| e.revision)) }
            });
            Op::Put {
                key: Key::new(&key(*k)).unwrap(),
                value: Value::Json(format!("{{\"v\":{v}}}").into()),
                ttl_ms: None,
                labels: None,
                condition: Condition { if_revision: absent, ..Condition::default() },
            }
        }
        Change::Patch(k, field, v) => Op::Patch {
            key: Key::new(&key(*k)).unwrap(),
            patch: compact(&json!({ format!("f{field}"): v }).to_string()).into(),
            ttl_ms: None,
            condition: Condition::default(),
        },
        Change::Delete(k) => Op::Delete { key: Key::new(&key(*k)).unwrap(), condition: Condition::default() },
        Change::Write(write, c, id, numbers, m) => Op::WriteVector {
            write: *write,
            collection: name(*c),
            id: VectorId::new(&format!("v{id}")).unwrap(),
            vector: numbers.map(|n| Vector::new(n.map(f32::from).to_vec()).unwrap()),
            meta: meta(m),
            if_revision: None,
        },
        Change::Remove(c, id) => {
            Op::DeleteVector { collection: name(*c), id: VectorId::new(&format!("v{id}")).unwrap(), if_revision: None }
        }
    }
}

fn name(c: usize) -> CollectionName {
    CollectionName::new(&format!("c{c}")).unwrap()
}

fn kind(rejection: &Rejection) -> &'static str {
    match rejection {
        Rejection::RevisionConflict { .. } | Rejection::ConflictWithin { .. } => "conflict",
        Rejection::KeyNotFound(_) => "no key",
        Rejection::CollectionNotFound(_) => "no collection",
        Rejection::VectorNotFound(_) => "no vector",
        Rejection::AlreadyExists(_) => "exists",
        Rejection::InBatch { rejection, .. } => kind(rejection),
        other => panic!("{other}"),
    }
}

struct Running {
    engine: Engine,
    threads: kiss_vdb::engine::Threads,
}

fn open(dir: &Path) -> Running {
    let flags =
        [("data_dir", dir.to_str().unwrap().to_owned()), ("snapshot_interval", "0".into()), ("max_log_mb", "8".into())];
    let config = Resolved::collect(Some("/dev/null".into()), |_| None, flags).unwrap().build().unwrap();
    let (engine, threads) = Engine::open(&config).unwrap();
    Running { engine, threads }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

/// Everything the engine shows, in the model's words.
fn image(engine: &Engine) -> Model {
    let (entries, has_more, revision) = engine.list("", None, 1000);
    assert!(!has_more);
    let entry = |(k, e): (Key, std::sync::Arc<kiss_vdb::engine::codec::Entry>)| {
        let Value::Json(text) = &e.value else { panic!("bytes") };
        let entry = ModelEntry {
            value: serde_json::from_str(text).unwrap(),
            revision: e.revision.0,
            created: e.created_revision.0,
        };
        (k.as_str().to_owned(), entry)
    };
    let collections = engine.collections().into_iter().map(|(name, shared)| {
        let metric = [Metric::Cosine, Metric::Dot, Metric::L2].iter().position(|m| *m == shared.spec().metric).unwrap();
        let (items, _) = shared.list(None, 1000, true, || ());
        let vector = |item: kiss_vdb::vector::collection::Item| {
            let meta = serde_json::from_str(item.meta.text()).unwrap();
            (
                item.id.as_str().to_owned(),
                ModelVector { numbers: item.vector.unwrap(), meta, revision: item.revision.0 },
            )
        };
        (name[1..].parse().unwrap(), (Metric3(metric), items.into_iter().map(vector).collect()))
    });
    Model { keys: entries.into_iter().map(entry).collect(), collections: collections.collect(), revision: revision.0 }
}

async fn play(steps: Vec<Step>) {
    let mut dir = tempfile::tempdir().unwrap();
    let mut running = open(dir.path());
    let mut model = Model::default();
    for step in steps {
        match &step {
            Step::Batch(changes) => {
                let mut after = model.clone();
                let mut ops = Vec::new();
                let mut expected = Ok(());
                for change in changes {
                    ops.push(op(change, &after));
                    if expected.is_ok() {
                        expected = after.change(change);
                    }
                }
                let command = if ops.len() == 1 { Command::one(ops.remove(0)) } else { Command::batch(ops) };
                match (running.engine.submit(command).await, expected) {
                    (Ok(committed), Ok(())) => {
                        assert_eq!(committed.first_revision.0, model.revision + 1);
                        assert_eq!(committed.last_revision.0, after.revision);
                        model = after;
                    }
                    (Err(rejection), Err(expected)) => assert_eq!(kind(&rejection), expected, "{step:?}"),
                    (got, expected) => panic!("{step:?}: {got:?}, expected {expected:?}"),
                }
            }
            Step::Create(c, metric) => {
                let spec = CollectionSpec::new(DIM, Metric3(*metric).real()).unwrap();
                let result =
                    running.engine.submit(Command::one(Op::CreateCollection { collection: name(*c), spec })).await;
                match model.collections.get(c) {
                    Some((existing, _)) if existing.0 != *metric => assert_eq!(kind(&result.unwrap_err()), "exists"),
                    Some(_) => {
                        assert!(matches!(result.unwrap().outcomes[0], Outcome::Collection { created: false, .. }))
                    }
                    None => {
                        result.unwrap();
                        model.revision += 1;
                        model.collections.insert(*c, (Metric3(*metric), BTreeMap::new()));
                    }
                }
            }
            Step::Drop(c) => {
                let result = running.engine.submit(Command::one(Op::DeleteCollection { collection: name(*c) })).await;
                match model.collections.remove(c) {
                    None => assert_eq!(kind(&result.unwrap_err()), "no collection"),
                    Some((_, vectors)) => {
                        model.revision += 1;
                        assert!(
                            matches!(result.unwrap().outcomes[0], Outcome::CollectionDeleted { count, .. } if count == vectors.len())
                        );
                    }
                }
            }
            Step::DeleteMatching(c, m) => {
                let Some((_, vectors)) = model.collections.get_mut(c) else { continue };
                let filter = Filter::parse(&json!({ "m": m })).unwrap();
                let (ticket, at) = running.engine.begin_match(name(*c).as_str()).unwrap();
                let ids = ticket.ids_matching(&filter).unwrap();
                let selection = VectorSelection { ids, filter: Some((filter, at)), deleted_before: 0 };
                let result =
                    running.engine.submit(Command::one(Op::DeleteVectors { collection: name(*c), selection })).await;
                let before = vectors.len();
                vectors.retain(|_, v| v.meta["m"] != json!(m));
                let gone = before - vectors.len();
                model.revision += gone as u64;
                assert!(
                    matches!(result.unwrap().outcomes[0], Outcome::VectorsDeleted { deleted, .. } if deleted == gone)
                );
            }
            Step::Search(c, query, k, filter) => {
                let Some((metric, vectors)) = model.collections.get(c) else { continue };
                let query = query.map(f32::from);
                let filter = filter.map(|m| json!({ "m": m }));
                let wanted = |v: &ModelVector| filter.as_ref().is_none_or(|f| v.meta["m"] == f["m"]);
                let mut naive: Vec<(f64, &str)> = vectors
                    .iter()
                    .filter(|(_, v)| wanted(v))
                    .map(|(id, v)| (metric.score(&query, &v.numbers), id.as_str()))
                    .collect();
                naive.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
                naive.truncate(*k);
                let search = |spec| Search {
                    query: Query::new(spec, &query),
                    stored: None,
                    filter: filter.as_ref().map(|f| Filter::parse(f).unwrap()),
                    k: *k,
                    offset: 0,
                    min_score: None,
                    include_vector: true,
                    is_exact: false,
                    ef: None,
                    group: None,
                };
                let (found, at, _) =
                    running.engine.search(name(*c).as_str(), |c| Ok(vec![search(c.spec())])).await.unwrap();
                assert_eq!(at.0, model.revision);
                let Found::Hits(hits) = &found[0].found else { panic!("groups") };
                assert_eq!(hits.len(), naive.len(), "min(k, matches)");
                for (hit, (score, _)) in hits.iter().zip(&naive) {
                    assert!(
                        (f64::from(hit.score) - score).abs() < 1e-4 * (1.0 + score.abs()),
                        "{hit:?}, expected {score}"
                    );
                    let real = &vectors[hit.id.as_str()];
                    assert_eq!(
                        (hit.vector.as_deref(), serde_json::from_str::<Json>(hit.meta.text()).unwrap()),
                        (Some(&real.numbers[..]), real.meta.clone())
                    );
                }
            }
            Step::Snapshot => drop(running.engine.snapshot(Pace::Fast).unwrap()),
            Step::Restart => {
                running.threads.stop();
                running = open(dir.path());
                assert_eq!(image(&running.engine), model, "after a restart");
            }
            Step::Crash => {
                let copied = tempfile::tempdir().unwrap();
                copy(dir.path(), copied.path());
                running.threads.stop();
                dir = copied;
                running = open(dir.path());
                assert_eq!(image(&running.engine), model, "after a crash");
            }
        }
    }
    assert_eq!(image(&running.engine), model);
    running.threads.stop();
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("KISS_MODEL_CASES").ok().and_then(|c| c.parse().ok()).unwrap_or(40),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_engine_does_what_a_naive_model_does(steps in prop::collection::vec(step(), 1..120)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(steps));
    }
}
