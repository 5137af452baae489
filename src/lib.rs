//! KISS VDB: keys, events, streams and vectors in one binary, one log, one total order.
//!
//! The log is the database. Every change is one durable record; keys, events and vectors are what you get by applying
//! those records; a stream is a cursor over them; recovery is the same apply again.

pub mod api;
pub mod bench;
pub mod check;
pub mod cli;
pub mod client;
pub mod config;
pub mod demo;
pub mod disk;
pub mod engine;
pub mod error;
pub mod faults;
#[cfg(feature = "lab")]
pub mod fuzz;
pub mod heap;
pub mod keys;
#[cfg(test)]
mod lab;
pub mod logging;
pub mod npy;
pub mod revision;
pub mod turns;
pub mod vector;
pub mod wire;

/// The version in `Cargo.toml`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
