//! See `kiss_vdb::fuzz::filter`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiss_vdb::fuzz::filter(bytes));
