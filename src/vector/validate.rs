//! Looks for faults in a graph: for tests and `kiss-vdb check`.

use super::codes::Probe;
use super::graph::{Graph, Scratch};
use super::nodes::LINKS_MAX;
use rayon::prelude::*;

/// What was counted, and what is wrong. Everything after `links` should be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Live linked slots.
    pub linked: usize,
    /// Links of all of them.
    pub links: usize,
    /// Slots with a link to themselves or two to the same slot.
    pub doubled: Vec<u32>,
    /// Slots with a link to one that is free or was never linked.
    pub dangling: Vec<u32>,
    /// Slots that no walk from the entry points reaches.
    pub unreachable: Vec<u32>,
    /// Slots that a search for their own vector does not find, nor anything as near.
    pub lost: Vec<u32>,
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let Self { linked: _, links: _, doubled, dangling, unreachable, lost } = self;
        [doubled, dangling, unreachable, lost].into_iter().all(Vec::is_empty)
    }
}

/// Checks the links of all `linked` slots. `may_be_linked` tells which slots links may lead to. O(links + searches).
#[must_use]
pub fn validate(graph: &Graph, linked: &[u32], slots: usize, may_be_linked: impl Fn(u32) -> bool) -> Report {
    let mut report = Report { linked: linked.len(), ..Report::default() };
    let mut targets = Vec::with_capacity(LINKS_MAX);
    for &slot in linked {
        targets.clear();
        targets.extend(graph.nodes().neighbours(slot));
        report.links += targets.len();
        if targets.iter().any(|&to| to as usize >= slots || !may_be_linked(to)) {
            report.dangling.push(slot);
        }
        targets.sort_unstable();
        if targets.contains(&slot) || targets.windows(2).any(|pair| pair[0] == pair[1]) {
            report.doubled.push(slot);
        }
    }
    let reached = graph.reach(|| false).unwrap_or_default();
    report.unreachable = linked.iter().copied().filter(|&slot| !reached[slot as usize]).collect();
    report.lost = linked
        .par_iter()
        .copied()
        .map_init(<(Probe, Scratch)>::default, |(probe, scratch), slot| {
            (slot, finds_itself(graph, slot, probe, scratch))
        })
        .filter(|(_, is_found)| !is_found)
        .map(|(slot, _)| slot)
        .collect();
    report
}

fn finds_itself(graph: &Graph, slot: u32, probe: &mut Probe, scratch: &mut Scratch) -> bool {
    probe.of_row(graph.nodes(), slot);
    graph.finds(slot, probe, scratch)
}
