//! What the server counts, in Prometheus' words: base units, no label whose values clients choose.

use crate::vector::plan::Way;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// A request's route (as in the route table, never the path), method and status.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RequestLabels {
    /// `/v1/state/{key}`, say.
    pub route: String,
    /// `GET`, say.
    pub method: String,
    /// `200`, say.
    pub status: u16,
}

/// The way a search was answered.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct PlanLabels {
    /// `graph`, say; see [`crate::vector::plan::Way`].
    pub plan: &'static str,
}

/// Counters and histograms. Gauges are read off the engine when asked for.
#[derive(Debug)]
pub struct Metrics {
    /// Requests answered.
    pub requests: Family<RequestLabels, Counter>,
    /// From the head of a request to the head of its answer.
    pub request_seconds: Family<RequestLabels, Histogram, fn() -> Histogram>,
    /// One write and fdatasync of a commit batch.
    pub fsync_seconds: Histogram,
    /// Records in a commit batch.
    pub batch_records: Histogram,
    /// Searches run.
    pub searches: Counter,
    /// One search.
    pub search_seconds: Histogram,
    /// Searches by the way they were answered.
    pub search_plans: Family<PlanLabels, Counter>,
    /// From an event's time to the moment a level stream takes it, of about one in sixty-four.
    pub delivery_lag_seconds: Histogram,
    /// Connections refused for `max_connections`: their 503 belongs to no route.
    pub connections_refused: Counter,
    /// Snapshots taken.
    pub snapshots: Counter,
    /// Snapshots that failed.
    pub snapshot_failures: Counter,
}

fn seconds() -> Histogram {
    // 20 µs to 10 s in steps of 2: one bucket wide is the precision that alerts need.
    Histogram::new(exponential_buckets(20e-6, 2.0, 20))
}

impl Default for Metrics {
    fn default() -> Self {
        // Born with zeros, so that a rate sees the first search.
        let search_plans = Family::<PlanLabels, Counter>::default();
        for way in Way::ALL {
            search_plans.get_or_create(&PlanLabels { plan: way.as_str() }).inc_by(0);
        }
        Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(seconds),
            fsync_seconds: seconds(),
            batch_records: Histogram::new(exponential_buckets(1.0, 2.0, 13)),
            searches: Counter::default(),
            search_seconds: seconds(),
            search_plans,
            // Events carry milliseconds.
            delivery_lag_seconds: Histogram::new(exponential_buckets(1e-3, 2.0, 14)),
            connections_refused: Counter::default(),
            snapshots: Counter::default(),
            snapshot_failures: Counter::default(),
        }
    }
}

impl Metrics {
    /// Registers everything under `kiss_`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("kiss");
        registry.register("http_requests", "Requests answered", self.requests.clone());
        registry.register("http_request_duration_seconds", "From request to answer", self.request_seconds.clone());
        registry.register(
            "fsync_duration_seconds",
            "One write and fdatasync of a commit batch",
            self.fsync_seconds.clone(),
        );
        registry.register("commit_batch_records", "Records in a commit batch", self.batch_records.clone());
        registry.register("searches", "Vector searches run", self.searches.clone());
        registry.register("search_duration_seconds", "One vector search", self.search_seconds.clone());
        registry.register("search_plans", "Vector searches by the way they were answered", self.search_plans.clone());
        registry.register(
            "stream_delivery_lag_seconds",
            "From an event's time to a level stream taking it, sampled",
            self.delivery_lag_seconds.clone(),
        );
        registry.register(
            "connections_refused",
            "Connections refused beyond max_connections",
            self.connections_refused.clone(),
        );
        registry.register("snapshots", "Snapshots taken", self.snapshots.clone());
        registry.register("snapshot_failures", "Snapshots that failed", self.snapshot_failures.clone());
    }
}
