//! The graph index behind searches, against brute force: random writes and searches with filters from several threads,
//! restarts, torn graph files, churn. Collections get a graph from a few vectors on, so that every rule is met often.
//!
//! What would break: a vector not found right after its write, a deleted one found, fewer than min(k, matches) hits, a
//! link to a freed slot, recall that decays.
#![allow(missing_docs, clippy::unwrap_used)]

use kiss_vdb::engine::collections::SharedCollection;
use kiss_vdb::engine::linker::Background;
use kiss_vdb::engine::search::{Found, Search, SearchAnswer};
use kiss_vdb::revision::Revision;
use kiss_vdb::vector::collection::Query;
use kiss_vdb::vector::filter::Filter;
use kiss_vdb::vector::graph::Scratch;
use kiss_vdb::vector::plan::Way;
use kiss_vdb::vector::{CollectionSpec, Hit, Metric, VectorId, VectorMeta};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const DIM: usize = 16;

/// Always the same numbers: SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Near one of `clusters` centres, which are the same for all.
    fn vector(&mut self, dim: usize, clusters: usize) -> Vec<f32> {
        let mut centre = Random(self.below(clusters) as u64 + 1_000_000);
        (0..dim).map(|_| centre.number() * 2.0 + self.number() * 0.8).collect()
    }
}

/// A collection with its writer's revisions and what should be in it.
struct Live {
    collection: Arc<SharedCollection>,
    spec: CollectionSpec,
    /// Of searches that do not say; else what the collection finds to be enough.
    ef: Option<usize>,
    revision: u64,
    model: BTreeMap<String, (Vec<f32>, Value)>,
}

/// The least effort of searches that do not say, with ten hits: for what is told of walks where the data would ask for a scan.
const WALKED: usize = 53;

impl Live {
    fn open(dir: Option<&Path>, metric: Metric, dim: usize) -> Self {
        let spec = CollectionSpec::new(dim, metric).unwrap();
        let background = Background::with_graph_from(64);
        let collection = SharedCollection::open(dir, spec, Revision(1), &background).unwrap();
        Self { collection, spec, ef: None, revision: 1, model: BTreeMap::new() }
    }

    fn put(&mut self, id: &str, numbers: Vec<f32>, meta: Value) {
        self.revision += 1;
        self.collection.reserve(1).unwrap();
        let text = VectorMeta::new(&meta.to_string()).unwrap();
        self.collection.put(&VectorId::new(id).unwrap(), &numbers, &text, Revision(self.revision));
        self.model.insert(id.to_owned(), (numbers, meta));
    }

    fn set_meta(&mut self, id: &str, meta: Value) {
        if let Some(entry) = self.model.get_mut(id) {
            self.revision += 1;
            let text = VectorMeta::new(&meta.to_string()).unwrap();
            self.collection.set_meta(&VectorId::new(id).unwrap(), &text, Revision(self.revision));
            entry.1 = meta;
        }
    }

    fn delete(&mut self, id: &str) {
        if self.model.remove(id).is_some() {
            self.revision += 1;
            self.collection.delete(&VectorId::new(id).unwrap(), Revision(self.revision));
        }
    }

    fn work(&self, pieces: usize) {
        let mut scratch = Scratch::default();
        for _ in 0..pieces {
            if !self.collection.work_once(&mut scratch) {
                return;
            }
        }
    }

    fn search(
        &self,
        numbers: &[f32],
        k: usize,
        filter: Option<&Value>,
        is_exact: bool,
        ef: Option<usize>,
    ) -> SearchAnswer {
        let searches = [Search {
            query: Query::new(self.spec, numbers),
            stored: None,
            filter: filter.map(|f| Filter::parse(f).unwrap()),
            k,
            offset: 0,
            min_score: None,
            include_vector: true,
            is_exact,
            ef: ef.or(self.ef),
            group: None,
        }];
        self.collection.begin_search(Revision(self.revision), &searches).run(&searches).unwrap().remove(0)
    }

    /// Scores of what matches, best first.
    fn truth(&self, query: &[f32], filter: Option<&Value>) -> Vec<(f64, &str)> {
        let filter = filter.map(|f| Filter::parse(f).unwrap());
        let matching = self.model.iter().filter(|(_, (_, meta))| filter.as_ref().is_none_or(|f| f.matches(meta)));
        let mut scores: Vec<_> =
            matching.map(|(id, (numbers, _))| (score(self.spec.metric, query, numbers), id.as_str())).collect();
        scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        scores
    }

    /// Checks one search against the model; returns how many of the k best it found, and k.
    fn check(&self, query: &[f32], k: usize, filter: Option<&Value>, is_exact: bool) -> (usize, usize) {
        let answer = self.search(query, k, filter, is_exact, None);
        let hits = hits(&answer);
        let truth = self.truth(query, filter);
        let wanted = k.min(truth.len());
        assert_eq!(hits.len(), wanted, "min(k, matches) of {} vectors: {:?}", self.model.len(), answer.plan);
        assert_eq!(answer.plan.matches, truth.len(), "{:?}", answer.plan);
        let ids: BTreeSet<&str> = hits.iter().map(|hit| hit.id.as_str()).collect();
        assert_eq!(ids.len(), hits.len(), "the same vector twice: {:?}", answer.plan);
        let by_id: BTreeMap<&str, f64> = truth.iter().map(|&(score, id)| (id, score)).collect();
        for pair in hits.windows(2) {
            assert!(pair[0].score >= pair[1].score, "best first");
        }
        for hit in hits {
            let expected = by_id.get(hit.id.as_str()).unwrap_or_else(|| panic!("{hit:?} is gone or does not match"));
            assert!((f64::from(hit.score) - expected).abs() < 1e-3 * (1.0 + expected.abs()), "{hit:?}: {expected}");
            assert_eq!(hit.vector.as_deref(), Some(&self.model[hit.id.as_str()].0[..]));
        }
        // By score: among equals any will do.
        let floor = truth.get(wanted.wrapping_sub(1)).map_or(f64::MAX, |last| last.0 - 1e-6 * (1.0 + last.0.abs()));
        let found = hits.iter().filter(|hit| by_id[hit.id.as_str()] >= floor).count();
        if is_exact {
            assert_eq!(found, wanted, "exact");
        }
        (found, wanted)
    }

    /// Part of the ten nearest that searches find, over many queries.
    fn recall(&self, random: &mut Random, clusters: usize, filter: Option<&Value>) -> f64 {
        let (mut found, mut of) = (0, 0);
        for _ in 0..200 {
            let (f, o) = self.check(&random.vector(self.spec.dim, clusters), 10, filter, false);
            (found, of) = (found + f, of + o);
        }
        if of == 0 { 1.0 } else { found as f64 / of as f64 }
    }

    fn assert_sound(&self) {
        self.collection.settle();
        let report = self.collection.validate().expect("there is a graph");
        assert!(report.is_sound(), "{}", format!("{report:?}").chars().take(300).collect::<String>());
    }
}

fn hits(answer: &SearchAnswer) -> &[Hit] {
    let Found::Hits(hits) = &answer.found else { panic!("groups") };
    hits
}

fn score(metric: Metric, a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    match metric {
        Metric::Dot => dot(a, b),
        Metric::Cosine => dot(a, b) / (dot(a, a) * dot(b, b)).sqrt(),
        Metric::L2 => -a.iter().zip(b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum::<f64>().sqrt(),
    }
}

const METRICS: [Metric; 3] = [Metric::Cosine, Metric::Dot, Metric::L2];

fn meta(random: &mut Random) -> Value {
    json!({ "n": random.below(100), "tags": [random.below(5), random.below(5)], "on": random.below(2) == 0 })
}

fn filters() -> Vec<Option<Value>> {
    vec![
        None,
        Some(json!({ "n": { "$lt": 90 } })),
        Some(json!({ "on": true })),
        Some(json!({ "n": { "$gte": 90 }, "on": true })),
        Some(json!({ "tags": 3 })),
        Some(json!({ "n": 7 })),
        Some(json!({ "n": { "$gt": 1000 } })),
        Some(json!({ "tags.1": 2 })),
    ]
}

/// A step of a history.
#[derive(Clone, Debug)]
enum Step {
    Put(u16),
    Delete(u16),
    SetMeta(u16),
    DeleteMany(u16),
    Work(u8),
    Search {
        k: usize,
        filter: usize,
        is_exact: bool,
    },
    /// What a restart does: the files are written, closed and opened again.
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        30 => (0..600u16).prop_map(Step::Put),
        8 => (0..600u16).prop_map(Step::Delete),
        3 => (0..600u16).prop_map(Step::SetMeta),
        1 => (0..600u16).prop_map(Step::DeleteMany),
        20 => (0..12u8).prop_map(Step::Work),
        10 => (1..40usize, 0..8usize, any::<bool>())
            .prop_map(|(k, filter, is_exact)| Step::Search { k, filter, is_exact }),
        1 => Just(Step::Reopen),
    ]
}

fn run(steps: &[Step], metric: Metric, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(seed);
    let mut live = Live::open(Some(dir.path()), metric, DIM);
    // Enough that there is a graph, and that one step meets it.
    for id in 0..300 {
        live.put(&format!("v{id}"), random.vector(DIM, 12), meta(&mut random));
    }
    for step in steps {
        match step {
            Step::Put(id) => live.put(&format!("v{id}"), random.vector(DIM, 12), meta(&mut random)),
            Step::Delete(id) => live.delete(&format!("v{id}")),
            Step::SetMeta(id) => live.set_meta(&format!("v{id}"), meta(&mut random)),
            Step::DeleteMany(from) => (*from..from + 150).for_each(|id| live.delete(&format!("v{id}"))),
            Step::Work(pieces) => live.work(usize::from(*pieces)),
            Step::Search { k, filter, is_exact } => {
                live.check(&random.vector(DIM, 12), *k, filters()[*filter].as_ref(), *is_exact);
            }
            Step::Reopen => {
                let head = Revision(live.revision);
                live.collection.checkpoint(|| head, || Ok(())).unwrap();
                let (model, revision) = (std::mem::take(&mut live.model), live.revision);
                drop(live);
                live = Live { model, revision, ..Live::open(Some(dir.path()), metric, DIM) };
            }
        }
    }
    live.work(usize::MAX);
    if live.collection.read(|c| c.graph().is_some()) {
        live.assert_sound();
    }
    for filter in filters() {
        live.check(&random.vector(DIM, 12), 10, filter.as_ref(), false);
        live.check(&random.vector(DIM, 12), 10, filter.as_ref(), true);
    }
}

#[test]
fn any_history_of_writes_and_searches_agrees_with_brute_force() {
    let cases = std::env::var("KISS_GRAPH_CASES").map_or(60, |n| n.parse().unwrap());
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    proptest!(config, |(steps in prop::collection::vec(step(), 50..400), metric in 0..3usize, seed: u64)| {
        run(&steps, METRICS[metric], seed);
    });
}

#[test]
fn recall_holds_for_every_metric_and_filter_on_clustered_data() {
    for metric in METRICS {
        let mut random = Random(5);
        let mut live = Live::open(None, metric, 32);
        for id in 0..6000 {
            live.put(&format!("v{id}"), random.vector(32, 40), meta(&mut random));
        }
        live.work(usize::MAX);
        live.assert_sound();
        let counts = live.collection.read(|c| c.graph_counts());
        assert_eq!((counts.linked, counts.tail, counts.garbage), (6000, 0, 0));
        for filter in filters() {
            let recall = live.recall(&mut random, 40, filter.as_ref());
            assert!(recall >= 0.95, "{metric:?} {filter:?}: recall {recall}");
        }
        let way = live.search(&random.vector(32, 40), 10, None, false, None).plan.way;
        assert_eq!(way.as_str(), "graph", "the walk is what was measured");
    }
}

/// One byte a number has no steps left for what lies close together far from zero, and the longest vectors, which are most
/// answers under dot, lie apart from all others.
#[test]
fn recall_holds_far_from_zero_and_for_vectors_of_differing_lengths() {
    let place = |random: &mut Random| vec![40.4168 + random.number() * 0.1, -3.7038 + random.number() * 0.1];
    let raw_units = |random: &mut Random| (-1..4).map(|power| random.number() * 10f32.powi(power)).collect();
    let steady = |random: &mut Random| (0..16).map(|_| 1000.0 + random.number() * 0.01).collect();
    let any_length = |random: &mut Random| {
        let length = (random.number() + random.number()).exp();
        (0..24).map(|_| (random.number() + random.number() + random.number()) * length).collect()
    };
    type Make<'a> = &'a dyn Fn(&mut Random) -> Vec<f32>;
    let positive = |random: &mut Random| (0..16).map(|_| (1.0 + random.number()).abs()).collect();
    let sets: [(&str, Metric, Make<'_>); 5] = [
        ("places of a city", Metric::L2, &place),
        ("columns in raw units", Metric::L2, &raw_units),
        ("little around a large mean", Metric::L2, &steady),
        ("lengths from 1/7 to 7", Metric::Dot, &any_length),
        ("nothing below zero", Metric::Dot, &positive),
    ];
    for (name, metric, make) in sets {
        let mut random = Random(7);
        let mut live = Live::open(None, metric, make(&mut random).len());
        for id in 0..6000 {
            live.put(&format!("v{id}"), make(&mut random), meta(&mut random));
        }
        live.work(usize::MAX);
        live.assert_sound();
        for filter in [None, Some(json!({ "on": true }))] {
            let (mut found, mut of) = (0, 0);
            for _ in 0..200 {
                let (f, o) = live.check(&make(&mut random), 10, filter.as_ref(), false);
                (found, of) = (found + f, of + o);
            }
            assert!(of > 0 && found as f64 >= 0.95 * of as f64, "{name} {filter:?}: {found} of {of}");
        }
        if metric == Metric::Dot {
            let way = live.search(&make(&mut random), 10, None, false, None).plan.way;
            assert_eq!(way.as_str(), "graph", "the walk is what was measured");
        }
    }
}

/// Where nothing is near anything a walk finds little unless it follows much. Who tries a server with random numbers does not say how much:
/// the collection notices by its own vectors. Where they are like embeddings it stays as it was, unless each stands there many times.
#[test]
fn searches_that_do_not_say_find_enough_whatever_the_data() {
    let noise = |random: &mut Random, dim: usize| (0..dim).map(|_| (0..4).map(|_| random.number()).sum()).collect();
    // Few numbers make up the many of an embedding.
    let mut mixing = Random(99);
    let mixed: Vec<Vec<f32>> = (0..16).map(|_| noise(&mut mixing, 128)).collect();
    let embedding = |random: &mut Random| {
        let few: Vec<f32> = noise(random, mixed.len());
        (0..128).map(|at| few.iter().zip(&mixed).map(|(number, row)| number * row[at]).sum()).collect::<Vec<f32>>()
    };
    let measured = |metric: Metric, make: &dyn Fn(&mut Random) -> Vec<f32>, copies: usize| {
        let mut random = Random(13);
        let mut live = Live::open(None, metric, make(&mut Random(1)).len());
        let mut numbers = Vec::new();
        // With copies too many for looking at all of them for the sake of the order among equals.
        for id in 0..if copies > 1 { 9000 } else { 5000 } {
            if id % copies == 0 {
                numbers = make(&mut random);
            }
            live.put(&format!("v{id}"), numbers.clone(), json!({}));
        }
        live.work(usize::MAX);
        let (mut found, mut of, mut walked) = (0, 0, 0);
        for _ in 0..100 {
            let query = make(&mut random);
            let (f, o) = live.check(&query, 10, None, false);
            (found, of) = (found + f, of + o);
            let floor = live.truth(&query, None)[9].0 - 1e-4;
            let answer = live.search(&query, 10, None, false, Some(48));
            walked += hits(&answer).iter().filter(|hit| f64::from(hit.score) >= floor).count();
        }
        let plan = live.search(&make(&mut random), 10, None, false, None).plan;
        eprintln!("{metric:?} {copies}: {found} and with little effort {walked} of {of}, {plan:?}");
        (found as f64 / of as f64, walked as f64 / of as f64, plan)
    };
    for metric in [Metric::Cosine, Metric::L2, Metric::Dot] {
        let (recall, with_little, _) = measured(metric, &|random| noise(random, 256), 1);
        assert!(recall >= 0.95 && with_little < 0.9, "{metric:?}: {recall}, with little effort {with_little}");
    }
    let (recall, with_little, plan) = measured(Metric::Cosine, &|random| noise(random, 48), 1);
    assert!(recall >= 0.95 && plan.way == Way::Graph, "{recall}, with little effort {with_little}: {plan:?}");
    let (recall, _, plan) = measured(Metric::Cosine, &embedding, 1);
    assert!(recall >= 0.95 && plan.ef == WALKED, "{recall}, {plan:?}");
    // A walk that keeps 53 keeps the copies of one.
    let (recall, with_little, _) = measured(Metric::Cosine, &embedding, 50);
    assert!(recall >= 0.95 && with_little < 0.9, "{recall}, with little effort {with_little}");
}

/// Small vectors among large ones: seen from their common centre they are all the same to a byte, and to the last digits of f32.
/// With few hits asked for, these do not show it: a stored vector was not found by a search for itself.
#[test]
fn a_vector_finds_itself_among_others_of_any_scale() {
    for dim in [1, 2, 16, 160] {
        for spread in [1e2, 1e4, 1e8] {
            let make = |random: &mut Random| {
                let scale = spread_of(random, spread);
                (0..dim).map(|_| random.number() * scale).collect::<Vec<f32>>()
            };
            let mut random = Random(11);
            let mut live = Live::open(None, Metric::L2, dim);
            for id in 0..2500 {
                live.put(&format!("v{id}"), make(&mut random), json!({}));
            }
            live.work(usize::MAX);
            for id in 0..250 {
                let numbers = live.model[&format!("v{id}")].0.clone();
                for k in [1, 3] {
                    let answer = live.search(&numbers, k, None, false, None);
                    let best = &hits(&answer)[0];
                    assert!(best.score == 0.0, "{dim} numbers, {spread}, k {k}: {best:?} for v{id}, {:?}", answer.plan);
                }
            }
        }
    }
}

/// Searches near a vector that is stored more often than a walk keeps: its copies are no reason to look at everything.
#[test]
fn copies_of_a_vector_near_a_query_cost_no_scan() {
    // Too many numbers for looking at all of them for the sake of the order among copies.
    const DIM: usize = 180;
    for metric in [Metric::L2, Metric::Cosine, Metric::Dot] {
        let mut random = Random(5);
        let mut live = Live::open(None, metric, DIM);
        let copied: Vec<f32> = random.vector(DIM, 5).iter().map(|number| number * 1.5).collect();
        for id in 0..6000 {
            let numbers = if id % 20 == 0 { copied.clone() } else { random.vector(DIM, 5) };
            live.put(&format!("v{id}"), numbers, json!({}));
        }
        live.work(usize::MAX);
        for _ in 0..20 {
            let query: Vec<f32> = copied.iter().map(|number| number + 0.02 * random.number()).collect();
            let answer = live.search(&query, 10, None, false, None);
            assert_eq!(answer.plan.way.as_str(), "graph", "{metric:?} {:?}", answer.plan);
            let best = live.truth(&query, None)[0].0;
            assert!(
                hits(&answer).iter().all(|hit| (f64::from(hit.score) - best).abs() < 1e-3 * best.abs()),
                "{metric:?}"
            );
        }
    }
}

/// Who pages through copies of a vector would miss some and meet others twice.
#[test]
fn equals_come_by_id() {
    for (metric, dim) in
        [(Metric::L2, 4), (Metric::Cosine, 16), (Metric::Dot, 16), (Metric::L2, 160), (Metric::Dot, 160)]
    {
        let mut random = Random(7);
        let mut live = Live::open(None, metric, dim);
        let copied = random.vector(dim, 5);
        let whole = vec![1.0; dim];
        for id in (0..4000).rev() {
            let (numbers, of) = match id % 80 {
                0 => (copied.clone(), "copies"),
                1 => (whole.clone(), "whole"),
                // Ones and zeros, which the graph's bytes say exactly: many are as far as others.
                2 => ((0..dim).map(|_| random.below(2) as f32).collect(), "bits"),
                _ => (random.vector(dim, 5), "other"),
            };
            live.put(&format!("v{id}"), numbers, json!({"of": of}));
        }
        live.work(usize::MAX);
        for (query, of) in [(&copied, "copies"), (&whole, "whole"), (&whole, "bits")] {
            let filter = json!({"of": of});
            for (k, filter) in [1, 3, 10, 30].into_iter().flat_map(|k| [(k, Some(&filter)), (k, None)]) {
                let all = live.search(query, k, filter, true, None);
                let some = live.search(query, k, filter, false, None);
                let ids =
                    |answer: &SearchAnswer| hits(answer)[..k].iter().map(|hit| hit.id.clone()).collect::<Vec<_>>();
                assert_eq!(ids(&some), ids(&all), "{metric:?} {dim} {of} {k} {:?}", some.plan);
            }
        }
    }
}

/// Few links lead to the long ones among vectors that all lie in directions of their own: whose neighbours are asked for by id is found
/// all the same.
#[test]
fn a_stored_vector_is_found_by_its_id_wherever_the_walk_leads() {
    const DIM: usize = 128;
    let mut random = Random(3);
    let mut live = Live::open(None, Metric::L2, DIM);
    for id in 0..4000 {
        let scale = spread_of(&mut random, 8.0);
        let numbers = (0..DIM).map(|_| (random.number() + random.number() + random.number()) * scale).collect();
        live.put(&format!("v{id}"), numbers, json!({}));
    }
    live.work(usize::MAX);
    let mut missed = 0;
    for (id, (numbers, _)) in live.model.iter().take(500) {
        let mut search = Search { ef: Some(WALKED), ..search(live.spec, numbers, 1) };
        let run = |search: &Search| {
            let searches = [search.clone()];
            let answer =
                live.collection.begin_search(Revision(live.revision), &searches).run(&searches).unwrap().remove(0);
            assert_eq!(answer.plan.way.as_str(), "graph", "the walk is what may miss it");
            hits(&answer)[0].id.as_str() == id
        };
        missed += usize::from(!run(&search));
        search.stored = Some((VectorId::new(id).unwrap(), Revision::ZERO));
        assert!(run(&search), "{id}");
    }
    assert!(missed > 0, "the walk found all of them by itself");
}

/// From one to `spread`, each order of magnitude alike.
fn spread_of(random: &mut Random, spread: f32) -> f32 {
    spread.powf((random.number() + 1.0) / 2.0)
}

/// From 128 numbers on walks go by half of each byte first: sixteen steps from the smallest to the largest number of a row.
/// Here they tell hardly anything, and whole rows must be what decides: by halves alone recall was 0.46 to 0.83.
#[test]
fn recall_holds_where_sixteen_steps_a_number_tell_nothing() {
    const DIM: usize = 160;
    let crowd = |random: &mut Random, spread: f32| {
        let mut centre = Random(random.below(20) as u64 + 1_000_000);
        (0..DIM).map(|_| centre.number() + random.number() * spread).collect::<Vec<f32>>()
    };
    let crowds = |random: &mut Random| crowd(random, 0.03);
    let quiet = |random: &mut Random| crowd(random, 0.8);
    let loud = |random: &mut Random| {
        let mut numbers = crowd(random, 0.8);
        // Others in each, so that no centre takes them off.
        for _ in 0..3 {
            numbers[random.below(DIM)] = 60.0 * random.number();
        }
        numbers
    };
    // Many zeros, as activations have, and queries that are all on their other side.
    let positive = |random: &mut Random| crowd(random, 0.8).into_iter().map(|n| n.max(0.0)).collect::<Vec<f32>>();
    let negative = |random: &mut Random| crowd(random, 0.8).into_iter().map(|n| n.min(0.0)).collect::<Vec<f32>>();
    type Make<'a> = &'a dyn Fn(&mut Random) -> Vec<f32>;
    let sets: [(&str, Metric, Make<'_>, Make<'_>, f64); 7] = [
        ("many zeros", Metric::Cosine, &positive, &quiet, 0.95),
        ("many zeros", Metric::Dot, &positive, &quiet, 0.95),
        ("many zeros", Metric::Dot, &positive, &negative, 0.95),
        ("crowds", Metric::L2, &crowds, &crowds, 0.95),
        ("crowds", Metric::Cosine, &crowds, &crowds, 0.95),
        ("loud numbers", Metric::L2, &loud, &loud, 0.95),
        // Queries unlike the vectors, whose links go by what is loud: 0.86, by whole rows as well.
        ("loud numbers", Metric::Dot, &loud, &quiet, 0.8),
    ];
    for (name, metric, make, ask, floor) in sets {
        let mut random = Random(13);
        let mut live = Live::open(None, metric, DIM);
        for id in 0..6000 {
            live.put(&format!("v{id}"), make(&mut random), meta(&mut random));
        }
        live.work(usize::MAX);
        live.assert_sound();
        live.ef = Some(WALKED);
        let way = live.search(&ask(&mut random), 10, None, false, None).plan.way;
        assert_eq!(way.as_str(), "graph", "the walk is what is measured");
        for filter in [None, Some(json!({ "on": true })), Some(json!({ "n": 7 }))] {
            let (mut found, mut of) = (0, 0);
            for _ in 0..200 {
                let (f, o) = live.check(&ask(&mut random), 10, filter.as_ref(), false);
                (found, of) = (found + f, of + o);
            }
            let recall = found as f64 / of as f64;
            eprintln!("{name} {metric:?} {filter:?}: {recall}");
            assert!(recall >= floor, "{name} {metric:?} {filter:?}: recall {recall}");
        }
    }
}

/// All vectors leave and others come, ten times; then as clusters, where whole regions empty and fill.
#[test]
fn churn_leaves_recall_and_memory_as_a_fresh_build_has_them() {
    const COUNT: usize = 2000;
    for by_cluster in [false, true] {
        let mut random = Random(11);
        let mut live = Live::open(None, Metric::L2, DIM);
        let mut next = 0;
        let mut put = |live: &mut Live, random: &mut Random, cluster: usize| {
            let mut centre = Random(cluster as u64 + 1_000_000);
            let numbers: Vec<f32> = (0..DIM).map(|_| centre.number() * 2.0 + random.number() * 0.8).collect();
            live.put(&format!("c{cluster}-{next}"), numbers, meta(random));
            next += 1;
        };
        for n in 0..COUNT {
            put(&mut live, &mut random, n % 20);
        }
        live.work(usize::MAX);
        for turnover in 0..10 {
            let ids: Vec<String> = live.model.keys().cloned().collect();
            for (n, id) in ids.iter().enumerate() {
                live.delete(id);
                let cluster = if by_cluster { n * 20 / COUNT + 20 * (turnover % 2) } else { random.below(20) };
                put(&mut live, &mut random, cluster);
                if n % 8 == 0 {
                    live.work(2);
                }
                while !live.collection.has_room() {
                    live.work(1);
                }
            }
        }
        live.work(usize::MAX);
        live.assert_sound();
        let slots = live.collection.read(|c| c.slot_count());
        assert!(slots <= COUNT + COUNT / 5 + 2048, "{slots} slots for {COUNT} vectors");
        let mut fresh = Live::open(None, Metric::L2, DIM);
        for (id, (numbers, meta)) in &live.model {
            fresh.put(id, numbers.clone(), meta.clone());
        }
        fresh.work(usize::MAX);
        let recall = [&live, &fresh].map(|l| l.recall(&mut Random(99), 40, None));
        assert!(recall[0] >= recall[1] - 0.01, "after churn {}, fresh {}", recall[0], recall[1]);
    }
}

/// Four threads write their own ids, two link, two search; every answer is checked for what it may hold.
#[test]
fn writers_linkers_and_searchers_at_once_lose_nothing() {
    let spec = CollectionSpec::new(DIM, Metric::Cosine).unwrap();
    let collection = SharedCollection::open(None, spec, Revision(1), &Background::with_graph_from(64)).unwrap();
    // The engine gives out revisions under its state lock, which searches hold to begin.
    let state = parking_lot::RwLock::new(1u64);
    let (stop, searched) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let (collection, state) = (&collection, &state);
                scope.spawn(move || {
                    let mut random = Random(writer);
                    let mut alive: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
                    for round in 0..1500 {
                        let number = random.below(400);
                        let id = VectorId::new(&format!("w{writer}-{number}")).unwrap();
                        let numbers = random.vector(DIM, 12);
                        let mut revision = state.write();
                        *revision += 1;
                        if random.below(3) == 0 {
                            collection.delete(&id, Revision(*revision));
                            alive.remove(&number);
                        } else {
                            collection.reserve(1).unwrap();
                            collection.put(&id, &numbers, &VectorMeta::empty(), Revision(*revision));
                            alive.insert(number, numbers.clone());
                        }
                        drop(revision);
                        if round % 5 == 0 {
                            // What was just written is found by the first search after it, what was deleted is not.
                            let searches = [search(spec, &numbers, 3)];
                            let ticket = {
                                let revision = state.read();
                                collection.begin_search(Revision(*revision), &searches)
                            };
                            let answer = ticket.run(&searches).unwrap().remove(0);
                            let is_found = hits(&answer).iter().any(|hit| hit.id == id);
                            let equal = hits(&answer).iter().filter(|hit| hit.score > 0.999_999).count();
                            assert!(is_found == alive.contains_key(&number) || equal >= 3, "{id:?} {:?}", answer.plan);
                        }
                    }
                    alive.len()
                })
            })
            .collect();
        for _ in 0..2 {
            scope.spawn(|| {
                let mut scratch = Scratch::default();
                while !stop.load(Ordering::Relaxed) {
                    if !collection.work_once(&mut scratch) {
                        std::thread::yield_now();
                    }
                }
            });
            scope.spawn(|| {
                let mut random = Random(77);
                while !stop.load(Ordering::Relaxed) {
                    let searches = [search(spec, &random.vector(DIM, 12), 10)];
                    let (ticket, live) = {
                        let revision = state.read();
                        (collection.begin_search(Revision(*revision), &searches), collection.read(|c| c.len()))
                    };
                    let answer = ticket.run(&searches).unwrap().remove(0);
                    assert_eq!(hits(&answer).len(), live.min(10), "{:?}", answer.plan);
                    for hit in hits(&answer) {
                        let own = score(Metric::Cosine, hit.vector.as_ref().unwrap(), searches[0].query.numbers());
                        assert!((own - f64::from(hit.score)).abs() < 1e-4, "a row changed under a search");
                    }
                    searched.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let alive: usize = writers.into_iter().map(|writer| writer.join().unwrap()).sum();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(collection.read(|c| c.len()), alive);
    });
    collection.settle();
    let report = collection.validate().unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert!(searched.load(Ordering::Relaxed) > 0);
}

fn search(spec: CollectionSpec, numbers: &[f32], k: usize) -> Search {
    Search {
        query: Query::new(spec, numbers),
        stored: None,
        filter: None,
        k,
        offset: 0,
        min_score: None,
        include_vector: true,
        is_exact: false,
        ef: None,
        group: None,
    }
}

/// Cut anywhere, with any byte changed, of another collection, missing: the graph is made anew and every answer holds.
#[test]
fn a_damaged_graph_file_costs_time_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(3);
    let mut live = Live::open(Some(dir.path()), Metric::Cosine, DIM);
    for id in 0..500 {
        live.put(&format!("v{id}"), random.vector(DIM, 12), meta(&mut random));
    }
    live.work(usize::MAX);
    let head = Revision(live.revision);
    live.collection.checkpoint(|| head, || Ok(())).unwrap();
    let path = SharedCollection::dir_below(dir.path(), Revision(1)).join("graph.bin");
    let whole = std::fs::read(&path).unwrap();
    let (model, revision) = (std::mem::take(&mut live.model), live.revision);
    drop(live);
    let reopen = |pieces: usize| {
        let live = Live { model: model.clone(), revision, ..Live::open(Some(dir.path()), Metric::Cosine, DIM) };
        live.work(pieces);
        live
    };
    let adopted = |live: &Live| live.collection.read(|c| c.graph_counts().linked);
    // Whole, it is taken as it is by the first piece of work.
    let live = reopen(1);
    assert_eq!(adopted(&live), 500);
    live.work(usize::MAX);
    live.assert_sound();
    drop(live);
    for n in 0..40 {
        let mut damaged = whole.clone();
        match n {
            0 => damaged.clear(),
            1..20 => damaged.truncate(random.below(whole.len())),
            _ => {
                let at = random.below(whole.len());
                damaged[at] ^= 1 << random.below(8);
            }
        }
        std::fs::write(&path, &damaged).unwrap();
        let live = reopen(1);
        assert_eq!(adopted(&live), 0, "a damaged file must not be trusted");
        live.check(&random.vector(DIM, 12), 10, None, false);
        live.work(usize::MAX);
        live.assert_sound();
        live.check(&random.vector(DIM, 12), 10, None, false);
    }
    std::fs::remove_file(&path).unwrap();
    reopen(usize::MAX).assert_sound();
}

/// The file knows vectors that are gone or were replaced, and lacks new ones.
#[test]
fn an_old_graph_file_is_repaired_around_what_changed() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(4);
    let mut live = Live::open(Some(dir.path()), Metric::L2, DIM);
    for id in 0..800 {
        live.put(&format!("v{id}"), random.vector(DIM, 12), meta(&mut random));
    }
    live.work(usize::MAX);
    let checkpoint = |live: &Live| live.collection.checkpoint(|| Revision(live.revision), || Ok(())).unwrap();
    checkpoint(&live);
    let path = SharedCollection::dir_below(dir.path(), Revision(1)).join("graph.bin");
    let old = std::fs::read(&path).unwrap();
    for id in (0..800).step_by(3) {
        live.delete(&format!("v{id}"));
    }
    live.work(usize::MAX);
    for id in 0..400 {
        live.put(&format!("w{id}"), random.vector(DIM, 12), meta(&mut random));
    }
    live.set_meta("v1", json!({ "n": 1 }));
    live.work(usize::MAX);
    checkpoint(&live);
    std::fs::write(&path, &old).unwrap();
    let (model, revision) = (std::mem::take(&mut live.model), live.revision);
    drop(live);
    let live = Live { model, revision, ..Live::open(Some(dir.path()), Metric::L2, DIM) };
    live.work(1);
    let linked = live.collection.read(|c| c.graph_counts().linked);
    assert_eq!(linked, 533, "those that were neither deleted nor replaced, changed metadata included");
    live.recall(&mut random, 12, None);
    live.work(usize::MAX);
    live.assert_sound();
    assert!(live.recall(&mut random, 12, None) >= 0.95);
}

/// A whole cluster dies and has not been repaired around: walks towards it end among way-points, and what is left is
/// found by looking at everything, on rayon's threads, whoever else searches there.
#[test]
fn a_walk_that_ends_among_the_dead_falls_back_to_looking_at_everything() {
    const WIDE: usize = 256;
    let mut random = Random(1);
    let mut live = Live::open(None, Metric::L2, WIDE);
    let around =
        |random: &mut Random, centre: f32| -> Vec<f32> { (0..WIDE).map(|_| centre + random.number()).collect() };
    for id in 0..3800 {
        live.put(&format!("a{id}"), around(&mut random, 10.0), json!({}));
    }
    for id in 0..1500 {
        live.put(&format!("b{id}"), around(&mut random, 0.0), json!({}));
    }
    live.work(usize::MAX);
    (0..1500).for_each(|id| live.delete(&format!("b{id}")));
    live.ef = Some(WALKED);
    let queries: Vec<Vec<f32>> = (0..40).map(|_| around(&mut random, 0.0)).collect();
    let plan = live.search(&queries[0], 10, None, false, None).plan;
    assert!(plan.given_up.is_some(), "otherwise this tests nothing: {plan:?}");
    live.check(&queries[0], 10, None, false);
    let (answers, answered) = std::sync::mpsc::channel();
    for query in &queries {
        let searches = [Search { ef: live.ef, ..search(live.spec, query, 10) }];
        let ticket = live.collection.begin_search(Revision(live.revision), &searches);
        let answers = answers.clone();
        rayon::spawn(move || answers.send(hits(&ticket.run(&searches).unwrap()[0]).len()).unwrap());
    }
    drop(answers);
    assert_eq!(answered.iter().collect::<Vec<_>>(), vec![10; queries.len()]);
}

#[test]
fn a_crowd_of_equal_vectors_neither_falls_apart_nor_hides_the_others() {
    for metric in METRICS {
        let mut random = Random(1);
        let mut live = Live::open(None, metric, DIM);
        let same = random.vector(DIM, 12);
        for id in 0..4000 {
            let numbers = if id % 2 == 0 { same.clone() } else { random.vector(DIM, 12) };
            live.put(&format!("v{id}"), numbers, json!({}));
        }
        live.work(usize::MAX);
        live.assert_sound();
        let (found, of) = live.check(&same, 30, None, false);
        assert_eq!(found, of, "{metric:?}");
        assert!(live.recall(&mut random, 12, None) >= 0.95, "{metric:?}");
    }
}

#[test]
fn vectors_too_long_or_short_for_f32_distances_are_searched_exactly() {
    for metric in METRICS {
        for by in [1e-25, 1e-12, 1.0, 1e15, 1e20] {
            let mut random = Random(5);
            let mut live = Live::open(None, metric, DIM);
            let mut scaled = || random.vector(DIM, 12).into_iter().map(|n| n * by).collect::<Vec<f32>>();
            for id in 0..1500 {
                live.put(&format!("v{id}"), scaled(), json!({}));
            }
            live.work(usize::MAX);
            let mut same = 0;
            for far in [1.0, 1e5].into_iter().cycle().take(20) {
                let query: Vec<f32> = scaled().into_iter().map(|n| n * far).collect();
                let [walked, exact] = [false, true].map(|is_exact| live.search(&query, 10, None, is_exact, None));
                same += hits(&walked).iter().filter(|hit| hits(&exact).iter().any(|h| h.id == hit.id)).count();
            }
            assert!(same >= 190, "{metric:?} x {by:e}: {same} of 200");
        }
    }
}

/// What a client sends is 64 KiB at most; the index over it must not become a hundred times as much.
#[test]
fn metadata_of_thousands_of_fields_is_filtered_without_an_index() {
    let mut live = Live::open(None, Metric::L2, 4);
    let fields: serde_json::Map<_, _> = (0..3500).map(|n| (format!("f{n}"), json!(1))).collect();
    for n in 0..4 {
        live.put(&format!("flat{n}"), vec![1.0; 4], Value::Object(fields.clone()));
        live.put(&format!("deep{n}"), vec![1.0; 4], json!({ format!("{n}{}", "x".repeat(20_000)): fields }));
        live.put(&format!("list{n}"), vec![1.0; 4], json!({ "tags": (0..5000).collect::<Vec<_>>() }));
    }
    live.work(usize::MAX);
    let bytes = live.collection.read(|c| c.meta_index().memory_bytes());
    assert!(bytes < 100_000, "{bytes} bytes of index");
    for filter in [json!({ "f7": 1 }), json!({ "tags": 4999 }), json!({ "f7": { "$exists": false } })] {
        live.check(&[0.0; 4], 10, Some(&filter), false);
    }
    live.set_meta("flat0", json!({ "f7": 2 }));
    live.check(&[0.0; 4], 10, Some(&json!({ "f7": 1 })), false);
    live.work(usize::MAX);
    live.check(&[0.0; 4], 10, Some(&json!({ "f7": 2 })), false);
}

/// Metadata changes in one field while another is counted: no vector may be missing from the count.
#[test]
fn a_filter_never_misses_a_vector_whose_other_metadata_changes() {
    let mut random = Random(1);
    let mut live = Live::open(None, Metric::L2, DIM);
    for id in 0..500 {
        live.put(&format!("v{id}"), random.vector(DIM, 4), json!({ "lang": "es", "n": 0 }));
    }
    live.work(usize::MAX);
    let (collection, stop, revision) = (&live.collection, AtomicBool::new(false), AtomicU64::new(live.revision));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let at = revision.load(Ordering::Relaxed) + 1;
                let meta = VectorMeta::new(&json!({ "lang": "es", "n": n }).to_string()).unwrap();
                collection.set_meta(&VectorId::new(&format!("v{}", n % 500)).unwrap(), &meta, Revision(at));
                revision.store(at, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            let mut scratch = Scratch::default();
            while !stop.load(Ordering::Relaxed) {
                collection.work_once(&mut scratch);
            }
        });
        let filter = Filter::parse(&json!({ "lang": "es" })).unwrap();
        let counts: BTreeSet<usize> = (0..3000)
            .map(|_| {
                collection.begin_match(Revision(revision.load(Ordering::Relaxed))).count_matching(&filter).unwrap()
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(counts, BTreeSet::from([500]));
    });
}

/// Of metadata that changes while a search runs it sees what there was: in its filter, in groups and in what it shows.
#[test]
fn a_search_sees_metadata_as_it_was_when_it_began() {
    let mut random = Random(1);
    let mut live = Live::open(None, Metric::L2, DIM);
    for id in 0..300 {
        live.put(&format!("v{id}"), random.vector(DIM, 4), json!({ "state": "a", "n": id }));
    }
    live.work(usize::MAX);
    let filter = |filter: Value| Filter::parse(&filter).unwrap();
    let query = random.vector(DIM, 4);
    let of_a = json!({ "state": "a" });
    for is_exact in [false, true] {
        let searches = [Search { filter: Some(filter(of_a.clone())), is_exact, ..search(live.spec, &query, 300) }];
        let before = live.collection.begin_search(Revision(live.revision), &searches);
        // Once before the index has taken the change over, once after, and changed twice.
        for id in 0..100 {
            live.set_meta(&format!("v{id}"), json!({ "state": "b", "n": 1000 - id }));
        }
        let between = live.collection.begin_search(Revision(live.revision), &searches);
        for id in 50..100 {
            live.set_meta(&format!("v{id}"), json!({ "state": "c", "n": -id }));
        }
        for work in [0, usize::MAX] {
            live.work(work);
            for (ticket, wanted) in [(&before, 300), (&between, 200)] {
                assert_eq!(ticket.count_matching(&filter(of_a.clone())).unwrap(), wanted);
                let answer = ticket.run(&searches).unwrap().remove(0);
                assert_eq!(hits(&answer).len(), wanted);
                assert!(hits(&answer).iter().all(|hit| hit.meta.text().contains("\"a\"")));
            }
            // Whatever a vector is, it is one of these.
            for always in [
                json!({ "state": { "$in": ["a", "b", "c"] } }),
                json!({ "$or": [{ "state": "a" }, { "state": { "$ne": "a" } }] }),
                json!({ "n": { "$gte": -100 } }),
            ] {
                assert_eq!(between.count_matching(&filter(always)).unwrap(), 300);
            }
        }
        drop((before, between));
        live.work(usize::MAX);
        let unindexed = live.collection.read(|c| c.not_indexed(c.live()).len());
        assert_eq!(unindexed, 0, "what waited for the searches is indexed behind them");
        (0..100).for_each(|id| live.set_meta(&format!("v{id}"), json!({ "state": "a", "n": id })));
        live.work(usize::MAX);
        live.check(&query, 10, Some(&of_a), false);
    }
}

/// A collection in which nothing happened needs nothing of the log but what comes behind.
#[test]
fn a_snapshot_needs_of_a_quiet_collection_only_what_came_since() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = Live::open(Some(dir.path()), Metric::L2, 2);
    live.put("a", vec![1.0, 2.0], json!({}));
    let checkpoint = |live: &Live, at| live.collection.checkpoint(|| Revision(at), || Ok(())).unwrap();
    let told = |live: &Live| live.collection.read(|c| (c.checkpoint().0, c.behind().map(|revision| revision.0)));
    assert_eq!(told(&live), (1, Some(1)));
    assert!(checkpoint(&live, 2));
    assert_eq!(told(&live), (2, None));
    assert!(!checkpoint(&live, 50), "nothing to write");
    live.revision = 50;
    live.put("a", vec![2.0, 2.0], json!({}));
    assert_eq!(told(&live), (2, Some(50)), "the log may have been shortened up to 50");
    assert!(checkpoint(&live, 51));
    assert_eq!(told(&live), (51, None));
}

/// The budget counts what there is, after background work and restarts too.
#[test]
fn what_vectors_are_charged_is_what_the_collection_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(2);
    let mut live = Live::open(Some(dir.path()), Metric::L2, DIM);
    let is_true =
        |live: &Live| assert_eq!(live.collection.charged_bytes(), live.collection.read(|c| c.charged_bytes()));
    for id in 0..800 {
        live.put(&format!("v{id}"), random.vector(DIM, 4), meta(&mut random));
    }
    is_true(&live);
    live.work(usize::MAX);
    is_true(&live);
    let full = live.collection.charged_bytes();
    (0..600).for_each(|id| live.delete(&format!("v{id}")));
    live.work(usize::MAX);
    is_true(&live);
    assert!(live.collection.charged_bytes() < full / 2);
    live.collection.checkpoint(|| Revision(live.revision), || Ok(())).unwrap();
    drop(live);
    let live = Live::open(Some(dir.path()), Metric::L2, DIM);
    is_true(&live);
    live.work(usize::MAX);
    is_true(&live);
}

/// As of a linker that has no core: another does what it has in its hands, from where it came to.
#[test]
fn what_is_given_up_is_done_by_another() {
    let spec = CollectionSpec::new(DIM, Metric::L2).unwrap();
    let background = Background::with_graph_from(64);
    let collection = SharedCollection::open(None, spec, Revision(1), &background).unwrap();
    let mut random = Random(3);
    let mut revision = 1;
    let mut put = |n: u64| {
        revision += 1;
        collection.reserve(1).unwrap();
        let id = VectorId::new(&format!("v{n}")).unwrap();
        collection.put(&id, &random.vector(DIM, 12), &VectorMeta::empty(), Revision(revision));
    };
    let stop = Arc::new(AtomicBool::new(true));
    let (mut stopped, mut scratch) = (Scratch::stopped_by(Arc::clone(&stop)), Scratch::default());
    let mut given_up = 0;
    let mut work = || {
        while let Some(job) = background.take_job(|_| true) {
            if let Some(rest) = job.run(&mut stopped) {
                given_up += 1;
                assert!(rest.run(&mut scratch).is_none());
            }
        }
        collection.work_once(&mut scratch)
    };
    (0..2500).for_each(&mut put);
    while work() {}
    // Dead slots, repairs and a search for what was lost meanwhile.
    (0..1000).for_each(&mut put);
    while work() {}
    assert!(given_up > 20, "{given_up}");
    let (counts, vectors) = collection.read(|c| (c.graph_counts(), c.len()));
    assert_eq!((counts.linked, counts.tail, vectors), (2500, 0, 2500));
    collection.settle();
    let found = collection.validate().unwrap();
    assert!(found.is_sound(), "{found:?}");
}

/// In the relaxed modes dead slots cannot be reused before the log is synced; writes must not wait for that.
#[test]
fn replacing_one_vector_for_ever_neither_stalls_nor_grows() {
    for durable in [u64::MAX, 1] {
        let spec = CollectionSpec::new(DIM, Metric::L2).unwrap();
        let background = Background::with_graph_from(64);
        background.durable.store(durable, Ordering::Relaxed);
        let collection = SharedCollection::open(None, spec, Revision(1), &background).unwrap();
        let mut random = Random(9);
        let mut scratch = Scratch::default();
        for n in 0..9000u64 {
            assert!(collection.has_room(), "write {n} would wait, durable {durable}");
            collection.reserve(1).unwrap();
            let id = VectorId::new(&format!("v{}", n % 100)).unwrap();
            collection.put(&id, &random.vector(DIM, 4), &VectorMeta::empty(), Revision(n + 2));
            while collection.work_once(&mut scratch) {}
        }
        let slots = collection.read(|c| c.slot_count());
        assert!(durable == 1 || slots < 1000, "{slots} slots for 100 vectors");
    }
}
