//! The order of effects of a write, as text: what a reviewer reads, and what must not change by accident.
//!
//! The engine tells each effect as a trace event on the target `kiss_vdb::effects`; the script is what was told.
#![allow(missing_docs, clippy::unwrap_used)]

use kiss_vdb::config::Resolved;
use kiss_vdb::engine::Engine;
use kiss_vdb::engine::command::{Command, Condition, Key, Op, Value, VectorWrite};
use kiss_vdb::vector::{CollectionName, CollectionSpec, Metric, Vector, VectorId};
use std::fmt::Write;
use std::sync::{Arc, Mutex};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

#[derive(Clone, Default)]
struct Script(Arc<Mutex<String>>);

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            write!(self.0, "{value:?}").unwrap();
        } else {
            write!(self.0, " {}={value:?}", field.name()).unwrap();
        }
    }
}

impl<S: tracing::Subscriber> Layer<S> for Script {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == "kiss_vdb::effects" {
            let mut line = Line(String::new());
            event.record(&mut line);
            writeln!(self.0.lock().unwrap(), "{}", line.0).unwrap();
        }
    }
}

fn put(key: &str, if_revision: Option<u64>) -> Command {
    let condition = Condition { if_revision: if_revision.map(kiss_vdb::revision::Revision), ..Condition::default() };
    Command::one(Op::Put {
        key: Key::new(key).unwrap(),
        value: Value::Json("1".into()),
        ttl_ms: None,
        labels: None,
        condition,
    })
}

/// What is told of a batch of a key and a vector. Whether two commands meet in one is up to chance, so several try; all go to
/// the same places, and the numbers are left out.
async fn with_a_vector(engine: &Engine, told: impl Fn() -> String) -> String {
    let collection = CollectionName::new("v").unwrap();
    let spec = CollectionSpec { dim: 2, metric: Metric::L2 };
    engine.submit(Command::one(Op::CreateCollection { collection: collection.clone(), spec })).await.unwrap();
    for _ in 0..10_000 {
        let vector = Op::WriteVector {
            write: VectorWrite::Upsert,
            collection: collection.clone(),
            id: VectorId::new("a").unwrap(),
            vector: Some(Vector::new(vec![1.0, 2.0]).unwrap()),
            meta: None,
            if_revision: None,
        };
        told();
        let (vector, key) = tokio::join!(engine.submit(Command::one(vector)), engine.submit(put("e", None)));
        key.and(vector).unwrap();
        let told = told();
        if told.contains("records=2") {
            return told.lines().fold(String::new(), |text, line| {
                let line = if line.starts_with("apply") { "apply" } else { line };
                text + line + "\n"
            });
        }
    }
    panic!("a key and a vector never met in a batch")
}

#[tokio::test]
async fn effects_of_a_write_come_in_the_order_of_the_design() {
    let script = Script::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(script.clone())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let open = |fsync: &str| {
        let flags = [
            ("data_dir", dir.path().to_str().unwrap().to_owned()),
            ("fsync", fsync.to_owned()),
            ("snapshot_interval", "0".into()),
        ];
        Engine::open(&Resolved::collect(Some("/dev/null".into()), |_| None, flags).unwrap().build().unwrap()).unwrap()
    };
    let (engine, threads) = open("always");
    let told = || std::mem::take(&mut *script.0.lock().unwrap());
    told();
    let mut whole = String::new();
    for (name, command) in [
        ("a put", put("a", None)),
        ("a put that is refused", put("a", Some(0))),
        ("a batch", Command::batch(vec![put("b", None).ops.remove(0), put("c", None).ops.remove(0)])),
    ] {
        engine.submit(command).await.ok();
        write!(whole, "# {name}\n{}", told()).unwrap();
    }
    threads.stop();
    // Without the snapshot of the orderly stop, recovery has to apply the log.
    std::fs::remove_dir_all(dir.path().join("snapshots")).unwrap();
    told();
    let (engine, threads) = open("never");
    write!(whole, "# recovery\n{}", told()).unwrap();
    engine.submit(put("d", None)).await.unwrap();
    write!(whole, "# a put without fsync\n{}", told()).unwrap();
    threads.stop();
    let (engine, threads) = open("always");
    write!(whole, "# a key in a batch with a vector\n{}", with_a_vector(&engine, told).await).unwrap();
    threads.stop();
    assert_eq!(whole, include_str!("order.golden.txt"), "\n{whole}");
}
