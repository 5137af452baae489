//! The exact scan against the machine's memory bandwidth: how much of what the memory can deliver does a search use?
//!
//! `cargo bench --bench scan` fills a collection larger than any cache, reads its bytes as fast as they can be summed,
//! then searches it, in turns, on the same threads, and prints gigabytes a second of both.
#![allow(missing_docs, clippy::unwrap_used)]

use kiss_vdb::engine::collections::SharedCollection;
use kiss_vdb::engine::linker::Background;
use kiss_vdb::engine::search::Search;
use kiss_vdb::revision::Revision;
use kiss_vdb::vector::collection::Query;
use kiss_vdb::vector::{CollectionSpec, Metric, VectorId, VectorMeta};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

const DIM: usize = 384;
const ROWS: usize = 300_000;
const ROUNDS: usize = 15;

/// Sums in independent lanes, so that the adds do not wait for each other and only memory can be the limit.
fn sum(numbers: &[f32]) -> f32 {
    let mut lanes = [0f32; 64];
    for chunk in numbers.as_chunks::<64>().0 {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane += number;
        }
    }
    lanes.iter().sum()
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn main() {
    let plain: Vec<f32> = (0..ROWS * DIM).map(|n| (n % 977) as f32 / 977.0 - 0.5).collect();
    let bytes = (plain.len() * size_of::<f32>()) as f64;
    for metric in [Metric::Dot, Metric::Cosine, Metric::L2] {
        let spec = CollectionSpec::new(DIM, metric).unwrap();
        let collection = SharedCollection::open(None, spec, Revision(1), &Background::new()).unwrap();
        for (row, numbers) in plain.chunks(DIM).enumerate() {
            collection.reserve(1).unwrap();
            let id = VectorId::new(&format!("{row}")).unwrap();
            collection.put(&id, numbers, &VectorMeta::empty(), Revision(2 + row as u64));
        }
        let search = Search {
            query: Query::new(spec, &plain[..DIM]),
            stored: None,
            filter: None,
            k: 10,
            offset: 0,
            min_score: None,
            include_vector: false,
            is_exact: true,
            ef: None,
            group: None,
        };
        let (mut reading, mut searching) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let started = Instant::now();
            black_box(plain.par_chunks(1 << 18).map(sum).sum::<f32>());
            reading.push(started.elapsed().as_secs_f64());
            let started = Instant::now();
            let ticket = collection.begin_search(Revision(u64::MAX - 1), &[]);
            black_box(ticket.run(std::slice::from_ref(&search)).expect("in time"));
            searching.push(started.elapsed().as_secs_f64());
        }
        let (read, searched) = (bytes / median(reading) / 1e9, bytes / median(searching) / 1e9);
        println!(
            "{:>6} {ROWS} x {DIM} on {} threads: memory {read:.1} GB/s, exact scan {searched:.1} GB/s, ratio {:.2}",
            metric.as_str(),
            rayon::current_num_threads(),
            searched / read
        );
    }
}
