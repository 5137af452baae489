//! See `kiss_vdb::fuzz::snapshot_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiss_vdb::fuzz::snapshot_file(bytes));
