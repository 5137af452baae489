//! How a search is answered: by looking at everything, at all matches of its filter, or by walking the graph.
//!
//! The cheapest by an estimate that was fitted to measurements (`docs/experiments.md`); its unit is one row of the graph
//! scored in a scan, 13 to 18 ns at 384 numbers. Whatever is chosen, a walk that turns out dearer than looking at all
//! matches is given up for that, and so is one that finds fewer than there are.

use std::cmp::Ordering;

/// Effort of a search that does not say, where the data are like embeddings: recall@10 of 0.97 and more on those measured.
pub const EF_DEFAULT: usize = 48;
/// Efforts such a search may come to where they are not: what is near to nothing is found by following more. A collection measures by
/// its own vectors which of them is enough (see [`usual_effort`]).
pub const EFFORTS: [usize; 5] = [EF_DEFAULT, 2 * EF_DEFAULT, 4 * EF_DEFAULT, 8 * EF_DEFAULT, 16 * EF_DEFAULT];
/// Hits that are compared for that.
pub const MEASURED_HITS: usize = 10;
/// Vectors that are searched near for that: with fewer it would be chance.
pub const MEASURED_VECTORS: usize = 128;
/// The share of hits that is enough. With so many vectors, embeddings are three standard deviations above it at the least of efforts.
const ENOUGH: f64 = 0.95;
/// What a change of the effort has to gain or lose at least: measured again, the same data would have another.
const MARGIN: f64 = 0.01;
/// Largest effort a search may ask for.
pub const EF_MAX: usize = 10_000;
/// From so many vectors on a collection gets a graph. Below, the exact scan takes about as long as a walk, and is exact.
pub const GRAPH_FROM: usize = 2048;
/// Rows a walk scores for each spot it follows.
const SCORED_PER_EF: f64 = 26.0;
/// What a row costs a walk, where it comes out of order, in rows of a scan.
const WALK_ROW_COST: f64 = 2.6;
/// What such a row costs when matches are looked for among neighbours of neighbours too, times the root of the share that matches:
/// with fewer of them more links are looked at for each.
const TWO_HOP_ROW_COST: f64 = 3.1;

/// A walk with a filter is begun when it may score so many times the rows expected: one that is given up was for nothing.
const WALK_ROOM: f64 = 1.5;
/// A scan of matches misses none: it may be so many times as dear as looking for them.
const SCAN_WORTH: f64 = 1.5;

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
    /// Each of them.
    pub const ALL: [Self; 4] = [Self::Exact, Self::Scan, Self::Graph, Self::TwoHop];

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

/// The effort for so many hits: what was asked for, else what is usual for the collection, but never less than the hits.
#[must_use]
pub fn effort(asked: Option<usize>, usual: usize, hits: usize) -> usize {
    asked.unwrap_or(usual + hits / 2).max(hits)
}

/// The least of [`EFFORTS`] that finds enough, where `present` is the usual one so far: `found` says for each but the last how many it found
/// of the `of` that the last does.
#[must_use]
pub fn usual_effort(found: &[usize; EFFORTS.len() - 1], of: usize, present: usize) -> usize {
    let is_enough = |&(&effort, &found): &(&usize, &usize)| {
        let margin = match effort.cmp(&present) {
            Ordering::Less => MARGIN,
            Ordering::Equal => -MARGIN,
            Ordering::Greater => 0.0,
        };
        found as f64 >= (ENOUGH + margin) * of as f64
    };
    let [.., most] = EFFORTS;
    EFFORTS.iter().zip(found).find(is_enough).map_or(most, |(&effort, _)| effort)
}

/// Rows a walk with a filter may score before another way is taken. Most that succeed score far fewer; one whose query
/// lies far from all matches would go on for long. After a walk through everything comes one through matches, then a scan
/// of all of them.
#[must_use]
pub fn budget(way: Way, effort: usize, matches: usize) -> usize {
    match way {
        // Four times what a walk without a filter scores for each spot is more than nine in ten need.
        Way::Graph => (matches / 4).min(effort * 65),
        _ => matches / 4,
    }
}

/// Chooses among `matches` of `count` live vectors.
#[must_use]
pub fn choose(effort: usize, matches: usize, count: usize) -> Way {
    let share = (matches as f64 / count.max(1) as f64).max(1e-9);
    let scan = matches as f64;
    let scored = effort as f64 * SCORED_PER_EF;
    let walk = scored * WALK_ROW_COST / share;
    let two_hop = scored * TWO_HOP_ROW_COST / share.sqrt();
    let (way, expected) = if walk <= two_hop { (Way::Graph, scored / share) } else { (Way::TwoHop, scored) };
    let has_room = matches == count || WALK_ROOM * expected <= budget(way, effort, matches) as f64;
    if has_room && scan > walk.min(SCAN_WORTH * two_hop) { way } else { Way::Scan }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_effort_is_the_least_that_finds_enough() {
        let usual = |found, present| usual_effort(&found, 640, present);
        assert_eq!(usual([608, 640, 640, 640], EF_DEFAULT), EF_DEFAULT);
        assert_eq!(usual([100, 200, 300, 400], EF_DEFAULT), 16 * EF_DEFAULT);
        assert_eq!(usual([100, 200, 608, 630], EF_DEFAULT), 4 * EF_DEFAULT);
        // About as good as it was: as it was.
        assert_eq!(usual([602, 630, 640, 640], EF_DEFAULT), EF_DEFAULT);
        assert_eq!(usual([601, 630, 640, 640], EF_DEFAULT), 2 * EF_DEFAULT);
        assert_eq!(usual([614, 630, 640, 640], 2 * EF_DEFAULT), 2 * EF_DEFAULT);
        assert_eq!(usual([615, 630, 640, 640], 2 * EF_DEFAULT), EF_DEFAULT);
    }

    #[test]
    fn few_matches_are_scanned_and_many_are_walked_to() {
        let way = |matches, count| choose(effort(None, EF_DEFAULT, 10), matches, count);
        assert_eq!(way(60_000, 60_000), Way::Graph);
        assert_eq!(way(48_933, 60_000), Way::Graph);
        assert_eq!(way(29_428, 60_000), Way::TwoHop);
        assert_eq!(way(6288, 60_000), Way::Scan);
        assert_eq!(way(56, 60_000), Way::Scan);
        assert_eq!(way(0, 60_000), Way::Scan);
        assert_eq!(way(100_000, 1_000_000), Way::TwoHop);
        assert_eq!(way(900_000, 1_000_000), Way::Graph);
        assert_eq!(way(2500, 2500), Way::Scan);
        assert_eq!(way(13_191, 60_000), Way::Scan, "a little dearer than a walk, but it misses nothing");
        assert_eq!(choose(100, 10_000, 10_000), Way::Graph);
        // Walks that would be given up, were they begun.
        assert_eq!(way(5210, 6500), Way::Scan);
        assert_eq!(way(7811, 13_000), Way::Scan);
        // A thousand hits of few vectors: no walk is cheaper than looking at all.
        assert_eq!(choose(effort(None, EF_DEFAULT, 1000), 60_000, 60_000), Way::Scan);
    }
}
