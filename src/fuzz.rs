//! What the fuzz targets call, and what `cargo test` replays their corpora through: decoders must answer any bytes with a value or
//! an error, and what they took must come out again as it went in.
//!
//! Only with the feature `lab`. `fuzz/` has the targets.

use crate::api::events;
use crate::api::extract::Params;
use crate::engine::codec::{decode_record, encode_record};
use crate::engine::snapshot;
use crate::revision::Revision;
use crate::vector::filter::Filter;
use serde_json::{Map, Value};

/// A record's payload behind one byte that says how many events it has.
pub fn record(bytes: &[u8]) {
    let Some((count, payload)) = bytes.split_first() else { return };
    let Ok(record) = decode_record(Revision(7), u32::from(*count), payload) else { return };
    let mut again = Vec::new();
    encode_record(&record, &mut again);
    // Flags are read leniently and written strictly, so that the bytes may differ once, and the record never.
    let decoded = decode_record(Revision(7), u32::from(*count), &again);
    assert_eq!(decoded.as_ref().ok(), Some(&record));
}

/// A snapshot file. Its checksums are made right first, or nothing behind them would ever be reached.
pub fn snapshot_file(bytes: &[u8]) {
    let mut file = b"KISSSNAP".to_vec();
    file.extend_from_slice(&2u32.to_le_bytes());
    let mut rest = bytes;
    let mut revision = None;
    while let Some((length, after)) = rest.split_at_checked(2) {
        let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
        let (block, after) = after.split_at(length.min(after.len()));
        revision = revision.or_else(|| Some(u64::from_le_bytes(block.get(..8)?.try_into().ok()?)));
        file.extend_from_slice(&u32::try_from(block.len()).unwrap_or(0).to_le_bytes());
        file.extend_from_slice(&crc32c::crc32c(block).to_le_bytes());
        file.extend_from_slice(block);
        rest = after;
    }
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
    let path = dir.path().join(format!("{:020}.snap", revision.unwrap_or(0)));
    if std::fs::write(&path, file).is_ok()
        && let Ok(snapshot) = snapshot::read(&path)
    {
        assert!(snapshot.entries.is_sorted_by(|(a, _), (b, _)| a < b), "keys in order");
        assert!(snapshot.revision.0 == revision.unwrap_or(0), "under the name of its revision");
    }
}

/// A filter over metadata, and what it makes of some.
pub fn filter(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return };
    let Ok(filter) = Filter::parse(&value) else { return };
    let sample = serde_json::json!({"lang":"es","n":7,"x":1.5,"ok":true,"none":null,"tags":["a","b",3],"a":{"b":{"c":"d"}},"t":"2026-01-31"});
    for meta in [sample, Value::Object(Map::new())] {
        let matched = filter.matches(&meta);
        // The same question in other words.
        let negated = Filter::parse(&serde_json::json!({ "$not": value }));
        if let Ok(negated) = negated {
            assert_eq!(negated.matches(&meta), !matched, "not not");
        }
    }
}

/// A query string of `/v1/events`.
pub fn query(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(uri) = format!("/v1/events?{text}").parse() else { return };
    if let Ok(params) = Params::parse(&uri, events::PARAMS)
        && let Ok(filter) = events::filter(&params)
    {
        assert!(filter.terms() <= crate::engine::feed::FILTER_TERMS_MAX, "a filter is bounded");
    }
}
