//! Log lines: to stderr, by a thread of their own.
//!
//! A pipe whose reader has stalled would otherwise hold up requests, and the stop. So lines wait in a queue of [`LINES_MAX`], and more
//! are dropped and counted.

use crate::config::Config;
use anyhow::{Context, ensure};
use std::io::IsTerminal;
use std::sync::OnceLock;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Where lines go that tell who was refused, and who acted on the server: JSON, whatever the other lines are.
pub const AUDIT: &str = "audit";
/// Lines that wait to be written: some megabytes.
const LINES_MAX: usize = 16_384;

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Lines that were dropped since the start.
#[must_use]
pub fn dropped_lines() -> u64 {
    DROPPED.get().map_or(0, |dropped| dropped.dropped_lines() as u64)
}

/// Begins to log as configured. What it gives ends the thread when it is dropped, once everything is written.
pub fn start(config: &Config) -> anyhow::Result<WorkerGuard> {
    let not_a_filter = || format!("log_level = {:?} (RUST_LOG) is not a tracing filter such as info", config.log_level);
    // A word that is no level is a module, of which everything is logged, and of all others nothing: so a mistyped level would be.
    let is_meant = |part: &str| {
        let part = part.trim();
        part.contains('=') || part.starts_with("kiss_vdb") || part.parse::<LevelFilter>().is_ok()
    };
    ensure!(
        config.log_level.split(',').any(is_meant),
        "log_level = {:?} (RUST_LOG) names no level: write info, or hyper=info for a module",
        config.log_level
    );
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log_level).with_context(not_a_filter)?;
    let stderr = NonBlockingBuilder::default().buffered_lines_limit(LINES_MAX).thread_name("log");
    let (stderr, thread) = stderr.finish(std::io::stderr());
    DROPPED.get_or_init(|| stderr.error_counter());
    let lines = tracing_subscriber::fmt::layer().with_writer(stderr.clone());
    let lines = if config.log_json {
        lines.json().boxed()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).with_target(false).boxed()
    };
    // The audit is for machines, and not a matter of levels.
    let is_audit = filter_fn(|meta| meta.target() == AUDIT);
    let audit = tracing_subscriber::fmt::layer().json().with_writer(stderr).with_filter(is_audit.clone());
    tracing_subscriber::registry().with(lines.with_filter(is_audit.not()).with_filter(filter)).with(audit).init();
    Ok(thread)
}
