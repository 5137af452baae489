//! A bit of everything, one command after the other, and what it was told: the oracle of the lab.
//!
//! The oracle is a naive model of keys and vectors, kept for every revision at which a record ended. Recovery may end at none
//! but these, so half a batch shows at once. What the log then tells to streams is compared record by record.

use super::{Random, Recorder, Step};
use crate::config::{Config, Resolved};
use crate::engine::command::{Command, Committed, Condition, EventType, Key, Op, Value, VectorWrite};
use crate::engine::linker::Background;
use crate::engine::recovery::{Recovered, recover};
use crate::engine::snapshot::{Pace, tidy};
use crate::engine::state::State;
use crate::engine::{Engine, Paths, Threads};
use crate::error::Rejection;
use crate::revision::Revision;
use crate::vector::{CollectionName, CollectionSpec, Metric, Vector, VectorId, VectorMeta};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Small: segments of the smallest size, and old ones go.
pub const MAX_LOG_BYTES: u64 = 16 << 10;
const DIM: usize = 3;
/// Nothing here takes longer, unless it hangs.
const DEADLINE: Duration = Duration::from_secs(20);

/// Keys and vectors as anybody could read them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    keys: BTreeMap<String, (serde_json::Value, u64)>,
    collections: BTreeMap<String, Vectors>,
}

/// By id: the bits of the numbers, metadata, revision.
type Vectors = BTreeMap<String, (Vec<u32>, String, u64)>;

impl Model {
    /// What a state shows.
    pub fn of(state: &State) -> Self {
        let json = |value: &Value| match value {
            Value::Json(text) => serde_json::from_str(text).unwrap(),
            Value::Bytes(_) => serde_json::Value::Null,
        };
        // At the beginning of time nothing has expired.
        let keys = state.range("", None, 0).map(|(k, e)| (k.as_str().to_owned(), (json(&e.value), e.revision.0)));
        let vectors = |items: Vec<crate::vector::collection::Item>| {
            let bits = |numbers: Vec<f32>| numbers.into_iter().map(f32::to_bits).collect();
            items
                .into_iter()
                .map(|i| {
                    let numbers = bits(i.vector.unwrap());
                    (i.id.as_str().to_owned(), (numbers, i.meta.text().to_owned(), i.revision.0))
                })
                .collect()
        };
        let collections = state
            .collections()
            .iter()
            .map(|(name, c)| (name.as_str().to_owned(), vectors(c.list(None, usize::MAX, true, || ()).0)));
        Self { keys: keys.collect(), collections: collections.collect() }
    }

    /// The bytes of every vector.
    pub fn rows(&self) -> Vec<Vec<u8>> {
        let vectors = self.collections.values().flat_map(BTreeMap::values);
        vectors.map(|(bits, ..)| bits.iter().flat_map(|b| b.to_le_bytes()).collect()).collect()
    }

    fn change(&mut self, change: &Change, revision: u64) {
        match change {
            Change::Put { key, value, .. } => drop(self.keys.insert(key.clone(), (value.clone(), revision))),
            Change::Patch { key, n } => {
                let (value, at) = self.keys.entry(key.clone()).or_insert((serde_json::json!({}), revision));
                value["patched"] = serde_json::json!(n);
                *at = revision;
            }
            Change::Delete { key } => drop(self.keys.remove(key)),
            Change::Event => {}
            Change::Create { collection } => drop(self.collections.insert(collection.clone(), BTreeMap::new())),
            Change::Drop { collection } => drop(self.collections.remove(collection)),
            Change::Vector { collection, id, numbers, meta } => {
                let bits = numbers.iter().map(|n| n.to_bits()).collect();
                // Where its creation was refused there is none.
                if let Some(vectors) = self.collections.get_mut(collection) {
                    vectors.insert(id.clone(), (bits, meta.clone(), revision));
                }
            }
            Change::RemoveVector { collection, id } => {
                if let Some(vectors) = self.collections.get_mut(collection) {
                    vectors.remove(id);
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Put { key: String, value: serde_json::Value, ttl_ms: Option<u64> },
    Patch { key: String, n: u64 },
    Delete { key: String },
    Event,
    Create { collection: String },
    Drop { collection: String },
    Vector { collection: String, id: String, numbers: Vec<f32>, meta: String },
    RemoveVector { collection: String, id: String },
}

impl Change {
    fn op(&self) -> Op {
        let key = |key: &str| Key::new(key).unwrap();
        let name = |name: &str| CollectionName::new(name).unwrap();
        let id = |id: &str| VectorId::new(id).unwrap();
        match self {
            Self::Put { key: k, value, ttl_ms } => Op::Put {
                key: key(k),
                value: Value::Json(value.to_string().into()),
                ttl_ms: *ttl_ms,
                labels: None,
                condition: Condition::default(),
            },
            Self::Patch { key: k, n } => Op::Patch {
                key: key(k),
                patch: format!("{{\"patched\":{n}}}").into(),
                ttl_ms: None,
                condition: Condition::default(),
            },
            Self::Delete { key: k } => Op::Delete { key: key(k), condition: Condition::default() },
            Self::Event => Op::Event {
                event_type: EventType::new("progress").unwrap(),
                key: None,
                data: Some("{\"done\":1}".into()),
                labels: None,
            },
            Self::Create { collection } => Op::CreateCollection {
                collection: name(collection),
                spec: CollectionSpec::new(DIM, Metric::Cosine).unwrap(),
            },
            Self::Drop { collection } => Op::DeleteCollection { collection: name(collection) },
            Self::Vector { collection, id: i, numbers, meta } => Op::WriteVector {
                write: VectorWrite::Upsert,
                collection: name(collection),
                id: id(i),
                vector: Some(Vector::new(numbers.clone()).unwrap()),
                meta: Some(VectorMeta::new(meta).unwrap()),
                if_revision: None,
            },
            Self::RemoveVector { collection, id: i } => {
                Op::DeleteVector { collection: name(collection), id: id(i), if_revision: None }
            }
        }
    }
}

/// What was told, and so what must be there.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    /// By the revision of the last event of a record: everything as of then.
    pub models: BTreeMap<u64, Model>,
    /// Each record as streams were given it, by its first revision.
    pub records: BTreeMap<u64, String>,
    /// For each answered command its last revision; zero where it was refused.
    pub answers: Vec<u64>,
    /// What may be there beyond the newest model: the command that was told neither yes nor no.
    pub in_doubt: BTreeMap<u64, Model>,
    /// Rejections, in the order they came.
    pub rejections: Vec<Rejection>,
}

impl Oracle {
    /// What was acknowledged last.
    pub fn newest(&self) -> (u64, &Model) {
        self.models.last_key_value().map(|(&at, model)| (at, model)).unwrap()
    }
}

/// How a workload runs.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub seed: u64,
    pub fsync: &'static str,
    /// Wait for keys to expire and for the sync of the `interval` mode: not where it is run hundreds of times.
    pub waits: bool,
}

/// The engine's settings in the lab.
pub fn config(dir: &Path, fsync: &str) -> Config {
    let flags = [
        ("data_dir", dir.to_str().unwrap().to_owned()),
        ("fsync", fsync.to_owned()),
        ("snapshot_interval", "0".to_owned()),
    ];
    let mut config = Resolved::collect(Some("/dev/null".into()), |_| None, flags).unwrap().build().unwrap();
    config.max_log_bytes = MAX_LOG_BYTES;
    config
}

/// Recovers as a start would, and stops there: no thread goes on to change anything.
pub fn recovered(dir: &Path) -> Result<Recovered, crate::error::Error> {
    recover(Some(&Paths::below(dir)), MAX_LOG_BYTES, &Background::new())
}

/// What a log tells to somebody who asks for all of it.
pub fn history(log: &crate::engine::wal::Log, head: Revision) -> Result<Vec<(u64, String)>, crate::error::Error> {
    let history = log.read_after(log.oldest().prev(), head, usize::MAX)?.expect("from the oldest on");
    Ok(history.records.iter().map(|r| (r.first_revision.0, format!("{r:?}"))).collect())
}

/// A future's result, without a runtime of many threads.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(DEADLINE, future).await.expect("it hangs") })
}

/// One write after a recovery.
pub fn put(key: &str) -> Command {
    Command::one(Change::Put { key: key.to_owned(), value: serde_json::json!(key), ttl_ms: None }.op())
}

struct Driver<'a> {
    settings: Settings,
    engine: Engine,
    recorder: &'a Arc<Recorder>,
    random: Random,
    oracle: Oracle,
    next: u64,
}

/// Opens an engine in `dir`, runs the workload, stops in order. `Err` when it does not start.
pub fn run(dir: &Path, settings: Settings, recorder: &Arc<Recorder>) -> Result<Oracle, crate::error::Error> {
    let (engine, threads) = Engine::open(&config(dir, settings.fsync))?;
    let mut oracle = Oracle::default();
    oracle.models.insert(0, Model::default());
    let mut driver = Driver { settings, engine, recorder, random: Random(settings.seed), oracle, next: 0 };
    driver.run();
    let oracle = driver.oracle;
    drop(driver.engine);
    stop(threads);
    Ok(oracle)
}

/// Stops in order, within the deadline.
pub fn stop(threads: Threads) {
    let started = Instant::now();
    threads.stop();
    assert!(started.elapsed() < DEADLINE, "it hangs");
}

impl Driver<'_> {
    fn run(&mut self) {
        self.create("v");
        for round in 0..3 {
            for _ in 0..7 {
                self.one();
            }
            let some = (0..3 + self.random.below(3)).map(|_| self.change()).collect();
            self.commit(some);
            self.create("w");
            self.vectors("w");
            self.vectors("v");
            if round != 1 {
                self.snapshot();
                self.one();
            }
            if round == 1 {
                self.expire();
            }
            self.drop_collection("w");
            if round == 0 {
                self.tidy();
            }
        }
        self.settle();
        self.one();
        self.recover_from_full();
    }

    /// Where a write was refused for want of space, they go on by themselves.
    fn recover_from_full(&mut self) {
        if !matches!(self.oracle.rejections.last(), Some(Rejection::StorageFull(_))) {
            return;
        }
        let started = Instant::now();
        let refused = self.oracle.rejections.len();
        loop {
            let value = serde_json::json!("after the full disk");
            self.commit(vec![Change::Put { key: "k0".into(), value, ttl_ms: None }]);
            if self.oracle.rejections.len() == refused {
                return;
            }
            self.oracle.rejections.truncate(refused);
            assert!(started.elapsed() < DEADLINE, "writes do not go on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn key(&mut self) -> String {
        format!("k{}", self.random.below(6))
    }

    fn change(&mut self) -> Change {
        self.next += 1;
        let n = self.next;
        let key = self.key();
        match self.random.below(8) {
            0 | 1 if self.oracle.newest().1.keys.get(&key).is_some_and(|(value, _)| value.is_object()) => {
                Change::Patch { key, n }
            }
            2 => Change::Event,
            _ => {
                let padding = "p".repeat(self.random.below(700));
                Change::Put { key, value: serde_json::json!({ "n": n, "padding": padding }), ttl_ms: None }
            }
        }
    }

    fn one(&mut self) {
        let key = self.key();
        let change = if self.random.below(5) == 0 && self.oracle.newest().1.keys.contains_key(&key) {
            Change::Delete { key }
        } else {
            self.change()
        };
        self.commit(vec![change]);
    }

    fn create(&mut self, collection: &str) {
        self.commit(vec![Change::Create { collection: collection.to_owned() }]);
    }

    fn drop_collection(&mut self, collection: &str) {
        self.commit(vec![Change::Drop { collection: collection.to_owned() }]);
    }

    /// Several in one batch with a key, and one deleted.
    fn vectors(&mut self, collection: &str) {
        let mut changes = vec![self.change()];
        for _ in 0..3 {
            self.next += 1;
            let numbers = (0..DIM).map(|_| 1.0 + self.random.below(1000) as f32).collect();
            let id = format!("i{}", self.random.below(5));
            let meta = format!("{{\"n\":{}}}", self.next);
            changes.push(Change::Vector { collection: collection.to_owned(), id, numbers, meta });
        }
        self.commit(changes);
        let id = self.oracle.newest().1.collections.get(collection).and_then(|c| c.keys().next().cloned());
        if let Some(id) = id {
            self.commit(vec![Change::RemoveVector { collection: collection.to_owned(), id }]);
        }
    }

    fn commit(&mut self, changes: Vec<Change>) {
        let ops: Vec<Op> = changes.iter().map(Change::op).collect();
        let command = if ops.len() == 1 { Command::one(ops.into_iter().next().unwrap()) } else { Command::batch(ops) };
        let applied = |model: &Model, first: u64| {
            let mut model = model.clone();
            changes.iter().zip(first..).for_each(|(change, revision)| model.change(change, revision));
            model
        };
        match wait(self.engine.submit(command)) {
            Ok(Committed { first_revision, last_revision, .. }) => {
                let (before, model) = self.oracle.newest();
                assert!(first_revision.0 > before, "revision {first_revision} after {before}");
                assert_eq!(last_revision.0, first_revision.0 + changes.len() as u64 - 1);
                let model = applied(model, first_revision.0);
                self.oracle.models.insert(last_revision.0, model);
                self.oracle.answers.push(last_revision.0);
                self.remember(Revision(before));
            }
            Err(rejection) => {
                if rejection == Rejection::Poisoned && self.oracle.in_doubt.is_empty() {
                    let (before, model) = self.oracle.newest();
                    let doubt = applied(model, before + 1);
                    self.oracle.in_doubt.insert(before + changes.len() as u64, doubt);
                }
                self.oracle.answers.push(0);
                self.oracle.rejections.push(rejection);
            }
        }
    }

    /// What streams are told of the newest record.
    fn remember(&mut self, before: Revision) {
        let read = || self.engine.log().read_after(before, self.engine.head(), usize::MAX);
        // Where failing is what is tried, reading may fail too: once.
        let history = read().or_else(|_| read()).unwrap();
        for record in history.map(|h| h.records).unwrap_or_default() {
            self.oracle.records.insert(record.first_revision.0, format!("{record:?}"));
        }
    }

    fn expire(&mut self) {
        if !self.settings.waits {
            return;
        }
        let value = serde_json::json!("soon gone");
        self.commit(vec![Change::Put { key: "ttl".into(), value, ttl_ms: Some(5) }]);
        let (before, model) = self.oracle.newest();
        let mut model = model.clone();
        model.keys.remove("ttl");
        let started = Instant::now();
        while self.engine.head().0 == before {
            assert!(started.elapsed() < DEADLINE, "the key does not expire");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.oracle.models.insert(self.engine.head().0, model);
        self.remember(Revision(before));
    }

    fn snapshot(&mut self) {
        if let Ok(taken) = self.engine.snapshot(Pace::Fast) {
            self.recorder.note(Step::Kept(taken.revision.0));
        }
    }

    fn tidy(&mut self) {
        tidy(self.engine.inner());
    }

    /// Waits for the sync of the `interval` mode. The mark that follows it tells.
    fn settle(&mut self) {
        if !self.settings.waits || self.settings.fsync != "interval" {
            return;
        }
        let head = self.engine.head().0;
        let started = Instant::now();
        let is_marked = |steps: &[Step]| {
            let last = steps.iter().rposition(|step| matches!(step, Step::Applied(_))).unwrap();
            steps[last..].iter().any(|step| matches!(step, Step::Write { bytes, .. } if bytes.len() == 32))
        };
        while !is_marked(&self.recorder.steps()) {
            assert!(started.elapsed() < DEADLINE, "nothing is synced");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.recorder.note(Step::Kept(head));
    }
}
