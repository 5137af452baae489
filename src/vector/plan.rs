//! How a search is answered: by looking at everything, at all matches of its filter, or by walking the graph.
//!
//! The cheapest by an estimate that was fitted to measurements (`docs/benchmarks.md`); its unit is one row of the graph
//! scored in a scan, about 10 ns at 384 numbers. Whatever is chosen, a walk that turns out dearer than looking at all
//! matches is given up for that, and so is one that finds fewer than there are.

/// Effort of a search that does not say: recall@10 of 0.95 and more on the data sets measured.
pub const EF_DEFAULT: usize = 64;
/// Largest effort a search may ask for.
pub const EF_MAX: usize = 10_000;
/// From so many vectors on a collection gets a graph. Below, an exact scan takes less than a walk.
pub const GRAPH_FROM: usize = 4096;
/// Rows a walk scores for each spot of its pool.
const SCORED_PER_EF: f64 = 26.0;
/// What a row costs a walk, where it comes out of order, in rows of a scan.
const WALK_ROW_COST: f64 = 2.5;
/// What looking at the neighbours of neighbours costs for each match scored, in rows of a scan.
const TWO_HOP_ROW_COST: f64 = 6.0;

/// The ways to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// All that matches, scored with the numbers as sent.
    Exact,
    /// All that matches, scored in the graph's rows; the best again with the numbers as sent.
    Scan,
    /// A walk of the graph; what does not match leads on.
    Graph,
    /// A walk of the graph that scores only matches, through neighbours of neighbours.
    TwoHop,
}

impl Way {
    /// The contract's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Scan => "scan",
            Self::Graph => "graph",
            Self::TwoHop => "two_hop",
        }
    }
}

/// The effort for so many hits: what was asked for, but never less than the hits.
#[must_use]
pub fn effort(asked: Option<usize>, hits: usize) -> usize {
    asked.unwrap_or_else(|| EF_DEFAULT.max(hits + hits / 2)).max(hits)
}

/// Chooses among `matches` of `count` live vectors.
#[must_use]
pub fn choose(effort: usize, matches: usize, count: usize) -> Way {
    let share = matches as f64 / count.max(1) as f64;
    let scan = matches as f64;
    // To meet one match a walk scores 1/share rows; beyond that it goes on until its pool is full of matches.
    let walk = effort as f64 * SCORED_PER_EF * WALK_ROW_COST / share.sqrt().max(1e-6);
    let two_hop = effort as f64 * SCORED_PER_EF * TWO_HOP_ROW_COST;
    if scan <= walk.min(two_hop) {
        Way::Scan
    } else if walk <= two_hop {
        Way::Graph
    } else {
        Way::TwoHop
    }
}
