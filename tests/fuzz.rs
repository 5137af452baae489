//! Replays what the fuzzers found worth keeping: inputs that once reached a new place in a decoder, and every one that broke it.
#![cfg(feature = "lab")]
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

#[test]
fn corpora_are_answered_without_a_panic() {
    type Target = (&'static str, fn(&[u8]));
    let targets: [Target; 4] = [
        ("record", kiss_vdb::fuzz::record),
        ("snapshot_file", kiss_vdb::fuzz::snapshot_file),
        ("filter", kiss_vdb::fuzz::filter),
        ("query", kiss_vdb::fuzz::query),
    ];
    for (name, run) in targets {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut count = 0;
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            run(&std::fs::read(path).unwrap());
            count += 1;
        }
        assert!(count > 10, "{name} has a corpus of {count}");
    }
}
