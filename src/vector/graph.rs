//! The graph index: how a search finds the nearest of a million vectors by looking at two thousand.
//!
//! Each slot has up to [`LINKS_MAX`] links to others near it. A search starts at a sample of slots, always expands the
//! nearest it knows and not yet expanded, scores where the links lead, and ends when the nearest `ef` are all expanded.
//! One flat graph, no levels: in hundreds of dimensions the levels of HNSW find nothing that a sample of entry points
//! does not (Munyampirwa et al. 2024, "Down with the Hierarchy").
//!
//! - **Linking** a slot is a search for its neighbourhood, from which those are kept that no nearer kept one makes
//!   superfluous (the robust pruning of Vamana, Subramanya et al. 2019), and a link back from each.
//! - **Deleting** leaves a slot as a way-point until a repair pass over all slots has replaced the links to it by links to
//!   what it led to (FreshDiskANN, Singh et al. 2021; one for one as in IP-DiskANN, Xu et al. 2025); then nothing leads to
//!   it, and it can be used again.
//! - **Filters**: way-points again, or with fewer matches neighbours' neighbours (ACORN, Patel et al. 2024), of each only two: what
//!   does not match is replaced by about as many links as it takes away.
//!
//! Evidence, on 60,000 MiniLM vectors of 384 numbers, one thread, recall@10; the whole in `docs/experiments.md`:
//!
//! ```text
//! slack of pruning      1.0     1.05    1.1     1.2     1.3        candidates (slack 1.2)   60     100    200
//! rows scored at 0.95   970     900     960     1,040   1,110      rows scored at 0.95   1,160  1,040    980
//! recall at ef 200      0.994   0.996   0.995   0.992   0.989      vectors/s linked      4.9 k  4.1 k  3.6 k
//! ```
//!
//! - One byte a number and the best twelve scored again: 0.9553, with forty 0.9554. The rounding costs nothing.
//! - Walking by half of each byte: recall 0.9545 at ef 28, 0.9543 by whole ones; 1.2 to 1.4 times the searches, as the rows of 60,000
//!   are 15 MB rather than 27. The halves in one row: 1.15 times. Of 2,000 searches at ef 20 so many had to go once more by whole rows
//!   that nearly all did (12.5 k/s); with 36 spots kept, and 20 expanded, 7 had to (20 to 22 k/s).
//! - Half of the vectors match (f50), at recall 0.95: way-points 6.4 k/s; all matches among neighbours' neighbours 7.3 k; two new ones
//!   of each 9.8 k, one 9.7 k; none about 7 k. At 90 % way-points are level, at 22 % two-hop does half as many again.
//! - Half as many entry points: 50 to 60 rows less for each search, of 354 for a quick one; the same recall.
//! - Prefetching links as a spot enters the front of the pool, and rows before they are scored: 10 to 20 % faster; into the second
//!   level of cache rather than the first: 1.4 to 1.5 times at ef 20 to 100. The rows of the spot that is probably next: slower.
//! - Distances of a group of 16 worked out together, and all compared with the pool's limit before any branch: a scan of 6,288 rows
//!   8.2 to 9.3 k/s, walks 2 to 4 %, linking level.
//! - A place in the pool sought from its end in strides rather than by bisection: 6 to 10 % faster at ef 20 to 100.
//! - Beside hnswlib (M 16, efConstruction 200) in one run: 4.4 and 4.9 times its searches at recall 0.95 and 0.99, built 1.9 times as
//!   fast; Fashion-MNIST (784, L2) 4.1 and 4.5 times, 5 times.
//! - Ten turnovers of all vectors: 0.002 less recall than a fresh graph, 1.05 times its memory.
//!
//! Invariants
//! - A link leads to a slot whose row is written; once a repair pass is over, to none that the pass condemned.
//! - Links of a slot that others may link to change under its stripe lock; they are read without any.
//! - Which slots are entry points depends on their numbers, beyond the first.
//!
//! Deliberately absent: threads, ids, metadata, the decision what to search how (`plan.rs`).

use super::Metric;
use super::codes::{Distances, GROUP, Probe};
use super::nodes::{LINKS_MAX, Nodes, ROUGH_DIM};
use super::plan::{self, EF_DEFAULT, EFFORTS, MEASURED_HITS, Way};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

/// Candidates a new slot's links are chosen from. Vectors a second into the graph against recall: 60 loses a point of
/// recall at equal effort, 200 halves the rate for half a point.
const LINK_EF: usize = 100;
/// A candidate is superfluous when a kept one is nearer to it than its distance to the slot divided by this (both
/// squared). 1.05 squared: at 1.2, usual for disks, the longest links crowd out near ones and a search for recall 0.95
/// scores a third more rows; at 1.0 hard queries miss.
const SLACK: f32 = 1.05 * 1.05;
/// Under dot, links chosen by distance; the rest are by inner products.
const NEAR_LINKS: usize = LINKS_MAX / 2 + 1;
/// Entry points are between this many and twice as many. More cost every search: at twice as many a quick search of
/// Fashion-MNIST spends a third of its scores on them. That none of a small cluster is among them, lost vectors bear,
/// which are looked for.
const ENTRIES: usize = 32;
/// Locks for the links of slots; more than any machine has cores, so that two threads rarely meet.
const STRIPES: usize = 1024;
/// Way-points a search may hold for each result it wants. Bounds the pool when nearly nothing is accepted.
const POOL_PER_RESULT: usize = 16;
/// Kept candidates compared at a time while pruning: the nearest ones rule out most.
const PRUNE_GROUP: usize = 8;
/// Standard deviations of what the high halves are off by, that must lie between the last hit and what was left out. The best
/// of thousands are those that are off most to their side: at 1.5, where what is off decides, a quarter of the hits was missed.
const MARGIN: f32 = 3.0;
/// A walk by high halves that did not tell enough counts so many times one that did, as it costs two.
const IN_VAIN_COST: u32 = 16;
/// Above this count walks go by whole rows; each takes one off.
const IN_VAIN_MAX: u32 = 256;
/// Candidates a scan by whole rows keeps beyond twice what is wanted.
const SPARE: usize = 4;
/// Matches taken, not yet met, among the neighbours of a neighbour that does not match: its place among the links is then taken
/// by them. More find a little more for each spot expanded, and score far more rows for it.
const MATCHES_PER_HOP: usize = 2;
/// Of the candidates of a new slot, so many must be the nearest; for those further out it is enough to be near.
const LINK_WANTED: usize = 40;
/// Largest squared length of a row: sums of a few of them are still finite.
pub const SQUARE_MAX: f32 = f32::MAX / 16.0;
/// Slots that are one piece of a pass: milliseconds.
const PASS_SLOTS: usize = 64;
/// Slots whose links are followed, some tens of microseconds, before it is asked whether to go on.
const REACH_SLOTS: usize = 1024;

/// A graph over the slots of one collection.
#[derive(Debug)]
pub struct Graph {
    metric: Metric,
    nodes: Nodes,
    stripes: Box<[Mutex<()>]>,
    /// Where searches start; replaced as a whole, so a search holds the lock only to clone the `Arc`.
    entries: RwLock<Arc<Vec<u32>>>,
    /// Entry points are the slots whose hash has none of these bits.
    entry_mask: AtomicU32,
    /// Taken off all rows and queries; empty for none.
    centre: Box<[f32]>,
    /// A row's squared length does not fit f32: distances between rows mean nothing.
    is_unfit: AtomicBool,
    /// Whether the high halves of its rows tell enough: see [`IN_VAIN_COST`].
    in_vain: AtomicU32,
}

/// One place in a search's pool.
#[derive(Clone, Copy, Debug)]
struct Spot {
    key: f32,
    /// The slot with [`EXPANDED`] and [`WAY_POINT`].
    tag: u32,
}

/// The links of this spot have been followed.
const EXPANDED: u32 = 1 << 31;
/// This spot leads on, but is no result.
const WAY_POINT: u32 = 1 << 30;

impl Spot {
    fn slot(self) -> u32 {
        self.tag & !(EXPANDED | WAY_POINT)
    }

    fn is_result(self) -> bool {
        self.tag & WAY_POINT == 0
    }
}

/// The nearest spots so far, nearest first: at most `ef` results and the way-points among them.
#[derive(Debug, Default)]
struct Pool {
    spots: Vec<Spot>,
    results: usize,
    ef: usize,
}

impl Pool {
    fn begin(&mut self, ef: usize) {
        self.spots.clear();
        self.results = 0;
        self.ef = ef;
    }

    /// Whether what comes now takes another's place.
    #[inline]
    fn is_full(&self) -> bool {
        self.results >= self.ef || self.spots.len() >= self.ef * POOL_PER_RESULT
    }

    /// What is nearer than this would be kept.
    #[inline]
    fn limit(&self) -> f32 {
        self.spots.last().filter(|_| self.is_full()).map_or(f32::INFINITY, |last| last.key)
    }

    /// Results before a place.
    fn results_before(&self, at: usize) -> usize {
        self.spots[..at].iter().filter(|spot| spot.is_result()).count()
    }

    /// Puts an admitted spot in its place and drops what falls out at the end.
    #[inline]
    fn insert(&mut self, key: f32, slot: u32, is_result: bool) -> usize {
        // From the end, in strides: most are barely admitted, and of these steps none waits for the one before, as in a bisection.
        let mut at = self.spots.len();
        for stride in [64, 8, 1] {
            while at >= stride && self.spots[at - stride].key > key {
                at -= stride;
            }
        }
        self.spots.insert(at, Spot { key, tag: if is_result { slot } else { slot | WAY_POINT } });
        self.results += usize::from(is_result);
        while self.results > self.ef
            || self.spots.len() > self.ef * POOL_PER_RESULT
            || (self.results == self.ef && self.spots.last().is_some_and(|s| !s.is_result()))
        {
            let dropped = self.spots.pop().expect("the pool holds results");
            self.results -= usize::from(dropped.is_result());
        }
        at
    }
}

/// The places of a group's keys, of at most [`GROUP`], that are below a limit. As a rule few are, so all are compared at once and
/// there is a branch for each of these rather than for each key.
#[inline]
fn below(keys: &[f32], limit: f32) -> impl Iterator<Item = usize> + use<> {
    let mask = |keys: &[f32]| {
        keys.iter().enumerate().fold(0_u32, |mask, (place, &key)| mask | u32::from(key < limit) << place)
    };
    // The compiler compares a whole group by a few instructions.
    let mut left = <&[f32; GROUP]>::try_from(keys).map_or_else(|_| mask(keys), |group| mask(group));
    std::iter::from_fn(move || {
        let place = (left != 0).then(|| left.trailing_zeros() as usize)?;
        left &= left - 1;
        Some(place)
    })
}

/// Memory of a search or a link, kept for the next: no allocation while searching.
#[derive(Debug, Default)]
pub struct Scratch {
    /// By slot: the search that last saw it. A byte, so that it stays in the cache; cleared every 255 searches.
    visited: Vec<u8>,
    epoch: u8,
    pool: Pool,
    fresh: Vec<u32>,
    failing: Vec<u32>,
    distances: Distances,
    probe: Probe,
    other: Probe,
    chosen: Vec<u32>,
    list: Vec<(f32, u32)>,
    /// Walks pass this one by, as if it were not there.
    hidden: Option<u32>,
    /// Whether walks are to be given up; of a thread that has a core so rarely that others would wait for it.
    stop: Option<Arc<AtomicBool>>,
    is_given_up: bool,
}

/// What a search looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// Rows compared with the query.
    pub scored: usize,
    /// Slots whose links were followed.
    pub expanded: usize,
    /// It would have cost more than its budget and was given up.
    pub is_over_budget: bool,
}

impl Scratch {
    /// For a thread that gives up what it does once `stop` is set.
    #[must_use]
    pub fn stopped_by(stop: Arc<AtomicBool>) -> Self {
        Self { stop: Some(stop), ..Self::default() }
    }

    /// Whether what is done with it is to be given up.
    #[must_use]
    pub fn must_stop(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    fn begin(&mut self, slots: usize, ef: usize) {
        if self.visited.len() < slots {
            self.visited.resize(slots, 0);
        }
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.visited.fill(0);
            self.epoch = 1;
        }
        self.pool.begin(ef);
        if let Some(slot) = self.hidden {
            self.is_new(slot);
        }
    }

    /// Whether a slot is met for the first time. One beyond the table was reserved after this search began: not for it.
    #[inline]
    pub fn is_new(&mut self, slot: u32) -> bool {
        match self.visited.get_mut(slot as usize) {
            Some(seen) if *seen != self.epoch => {
                *seen = self.epoch;
                true
            }
            _ => false,
        }
    }

    /// The results, nearest first.
    pub fn found(&self) -> impl Iterator<Item = u32> + '_ {
        self.pool.spots.iter().filter(|spot| spot.is_result()).map(|spot| spot.slot())
    }

    /// The results with their distances, nearest first.
    pub fn found_distances(&self) -> impl Iterator<Item = (u32, f32)> + '_ {
        self.pool.spots.iter().filter(|spot| spot.is_result()).map(|spot| (spot.slot(), spot.key))
    }

    /// Whether there may be results that were not kept: they are hardly nearer than the last that was.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.pool.results >= self.pool.ef
    }

    /// Forgets what was found.
    pub fn forget(&mut self) {
        let ef = self.pool.ef;
        self.pool.begin(ef);
    }
}

/// Candidates to keep by the high halves of rows, which put them less well in order, for the nearest `wanted`. With as few as a
/// search of little effort follows, half of the searches would go by whole rows after all.
#[must_use]
pub fn kept_by_halves(wanted: usize) -> usize {
    const SPARE: usize = 16;
    // Of very many, fewer are as near as the last.
    const MORE_MAX: usize = 512;
    wanted + wanted.min(MORE_MAX) + SPARE
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn hash(slot: u32) -> u32 {
    let mut z = u64::from(slot).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    // The cast takes the low half.
    (z ^ (z >> 31)) as u32
}

impl Graph {
    /// An empty graph. `centre` is about where its vectors lie, see `codes.rs`; empty for none.
    #[must_use]
    pub fn new(metric: Metric, dim: usize, centre: Vec<f32>) -> Self {
        Self {
            metric,
            nodes: Nodes::new(dim),
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            entries: RwLock::new(Arc::new(Vec::new())),
            entry_mask: AtomicU32::new(0),
            centre: centre.into(),
            is_unfit: AtomicBool::new(false),
            in_vain: AtomicU32::new(0),
        }
    }

    /// The rows and links.
    #[must_use]
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// What is taken off all rows and queries; empty for none.
    #[must_use]
    pub fn centre(&self) -> &[f32] {
        &self.centre
    }

    /// Notes what a row was coded to. One whose squared length is beyond f32, or so small that f32 has no digits for it,
    /// makes the graph unfit for searches for as long as it exists: they stay exact.
    pub fn note_figures(&self, figures: super::nodes::Figures) {
        let is_normal = figures.square == 0.0 && figures.scale == 0.0 || figures.square.is_normal();
        if (!is_normal || figures.square > SQUARE_MAX) && !self.is_unfit.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                dim = self.nodes.dim(),
                "a vector's squared length is beyond f32: searches of its collection look at everything until it is gone and the server starts again"
            );
        }
    }

    /// Whether searches must not use it.
    #[must_use]
    pub fn is_unfit(&self) -> bool {
        self.is_unfit.load(Ordering::Relaxed)
    }

    /// Searches from the entry points. `is_result` is asked for slots near enough to matter; others lead on. With
    /// `two_hop` only results are scored: from a neighbour that is none, its neighbours are looked at instead, which finds
    /// matches that lie scattered with far fewer scores. Follows the links of the nearest `ef` results. Gives up when it has scored
    /// `budget` rows. The results are then in `scratch`.
    ///
    /// Goes by the high halves of rows first, and keeps the nearest `kept` by these. Where they do not tell the nearest `wanted` from
    /// what was left out, once more by whole rows; with 0 wanted what was found will do.
    #[expect(clippy::too_many_arguments, reason = "what a search is, in one place")]
    #[inline]
    pub fn search(
        &self,
        probe: &Probe,
        ef: usize,
        kept: usize,
        wanted: usize,
        budget: usize,
        two_hop: bool,
        is_result: impl Fn(u32) -> bool,
        scratch: &mut Scratch,
    ) -> Effort {
        let is_rough = self.goes_rough();
        let mut effort = self.walk(probe, is_rough, ef, kept, budget, two_hop, &is_result, scratch);
        if is_rough && !effort.is_over_budget && !scratch.is_given_up && !self.refine(probe, wanted, scratch) {
            let again = self.walk(probe, false, ef, kept, budget, two_hop, &is_result, scratch);
            effort =
                Effort { scored: effort.scored + again.scored, expanded: effort.expanded + again.expanded, ..again };
        }
        effort
    }

    #[expect(clippy::too_many_arguments, reason = "as above")]
    #[inline]
    fn walk(
        &self,
        probe: &Probe,
        is_rough: bool,
        ef: usize,
        kept: usize,
        budget: usize,
        two_hop: bool,
        is_result: &impl Fn(u32) -> bool,
        scratch: &mut Scratch,
    ) -> Effort {
        scratch.begin(self.nodes.capacity(), if is_rough { kept.max(ef) } else { ef });
        let mut effort = Effort::default();
        let entries = Arc::clone(&self.entries.read());
        scratch.fresh.clear();
        for &slot in entries.iter() {
            if scratch.is_new(slot) {
                scratch.fresh.push(slot);
            }
        }
        self.score(probe, is_rough, is_result, scratch, &mut effort);
        let mut next = 0;
        while let Some(spot) = scratch.pool.spots.get(next) {
            if spot.tag & EXPANDED != 0 {
                next += 1;
                continue;
            }
            if next >= ef && scratch.pool.results_before(next) >= ef {
                break;
            }
            if effort.scored > budget {
                effort.is_over_budget = true;
                break;
            }
            if scratch.must_stop() {
                scratch.is_given_up = true;
                break;
            }
            let slot = spot.slot();
            scratch.pool.spots[next].tag |= EXPANDED;
            effort.expanded += 1;
            scratch.fresh.clear();
            scratch.failing.clear();
            for to in self.nodes.neighbours(slot) {
                if !scratch.is_new(to) {
                    continue;
                }
                if !two_hop || is_result(to) {
                    self.prefetch(to, is_rough);
                    scratch.fresh.push(to);
                } else {
                    self.nodes.prefetch_links(to);
                    scratch.failing.push(to);
                }
            }
            for at in 0..scratch.failing.len() {
                let mut left = MATCHES_PER_HOP;
                for to in self.nodes.neighbours(scratch.failing[at]) {
                    if is_result(to) && scratch.is_new(to) {
                        self.prefetch(to, is_rough);
                        scratch.fresh.push(to);
                        left -= 1;
                        if left == 0 {
                            break;
                        }
                    }
                }
            }
            // While the rows arrive, so may the links that are probably followed next.
            if let Some(spot) = scratch.pool.spots.get(next + 1) {
                self.nodes.prefetch_links(spot.slot());
            }
            next = self.score(probe, is_rough, is_result, scratch, &mut effort).min(next + 1);
        }
        effort
    }

    /// Whether to go by the high halves of rows first; asked once for each search, which it counts.
    fn goes_rough(&self) -> bool {
        if self.nodes.dim() < ROUGH_DIM {
            return false;
        }
        let in_vain = self.in_vain.load(Ordering::Relaxed);
        if in_vain > 0 {
            // Counted by several threads at once it may be off by a few.
            self.in_vain.store(in_vain - 1, Ordering::Relaxed);
        }
        in_vain <= IN_VAIN_MAX
    }

    /// Scores what was found by the high halves of rows by whole ones. False when more than what was found might belong to
    /// the nearest `wanted`.
    fn refine(&self, probe: &Probe, wanted: usize, scratch: &mut Scratch) -> bool {
        let pool = &mut scratch.pool;
        let is_full = pool.is_full();
        let Some(left_out) = pool.spots.last().map(|spot| spot.key) else { return true };
        pool.spots.retain(|spot| spot.is_result());
        let (mut errors, mut squares) = (0.0, 0.0);
        for spots in pool.spots.chunks_mut(GROUP) {
            scratch.fresh.clear();
            scratch.fresh.extend(spots.iter().map(|spot| spot.slot()));
            for &slot in &scratch.fresh {
                self.nodes.prefetch_row(slot);
            }
            probe.distances(&self.nodes, &scratch.fresh, &mut scratch.distances);
            for (spot, &key) in spots.iter_mut().zip(&scratch.distances.keys) {
                errors += self.nodes.figures(spot.slot()).rough_error;
                squares += (spot.key - key).powi(2);
                spot.key = key;
            }
        }
        pool.spots.sort_unstable_by(|a, b| a.key.total_cmp(&b.key));
        let Some(last) = wanted.checked_sub(1).and_then(|last| pool.spots.get(last)) else { return true };
        let count = pool.spots.len() as f32;
        // As far off as their halves let expect, or as they were: what was found may be less off than what was left out.
        let deviation = probe.roughness(left_out, errors / count).max((squares / count).sqrt());
        let is_clear = !is_full || last.key + MARGIN * deviation <= left_out;
        if !is_clear {
            self.in_vain.fetch_add(IN_VAIN_COST, Ordering::Relaxed);
        }
        is_clear
    }

    #[inline]
    fn prefetch(&self, slot: u32, is_rough: bool) {
        if is_rough { self.nodes.prefetch_high(slot) } else { self.nodes.prefetch_row(slot) }
    }

    #[inline]
    fn distances(&self, probe: &Probe, is_rough: bool, slots: &[u32], distances: &mut Distances) {
        if is_rough {
            probe.rough_distances(&self.nodes, slots, distances);
        } else {
            probe.distances(&self.nodes, slots, distances);
        }
    }

    /// Scores what is fresh and takes it into the pool; returns the first place that changed.
    #[inline]
    fn score(
        &self,
        probe: &Probe,
        is_rough: bool,
        is_result: &impl Fn(u32) -> bool,
        scratch: &mut Scratch,
        effort: &mut Effort,
    ) -> usize {
        self.distances(probe, is_rough, &scratch.fresh, &mut scratch.distances);
        effort.scored += scratch.fresh.len();
        let mut first = usize::MAX;
        for (slots, keys) in scratch.fresh.chunks(GROUP).zip(scratch.distances.keys.chunks(GROUP)) {
            for place in below(keys, scratch.pool.limit()) {
                let (slot, key) = (slots[place], keys[place]);
                if key < scratch.pool.limit() {
                    let at = scratch.pool.insert(key, slot, is_result(slot));
                    if at <= first {
                        // So far the next to be expanded.
                        first = at;
                        self.nodes.prefetch_links(slot);
                    }
                }
            }
        }
        first
    }

    /// Scores every given slot. The nearest `wanted` and some more are then in `scratch`.
    pub fn scan(&self, probe: &Probe, wanted: usize, slots: &[u32], scratch: &mut Scratch) -> Effort {
        let is_rough = self.goes_rough();
        scratch.pool.begin(if is_rough { kept_by_halves(wanted) } else { 2 * wanted + SPARE });
        let mut effort = self.scan_by(probe, is_rough, slots, |_| true, scratch);
        if is_rough && !self.refine(probe, wanted, scratch) {
            scratch.forget();
            effort.scored += self.scan_more(probe, slots, |_| true, scratch).scored;
        }
        effort
    }

    /// Adds slots to what a search or scan has found.
    pub fn scan_more(
        &self,
        probe: &Probe,
        slots: &[u32],
        is_result: impl Fn(u32) -> bool,
        scratch: &mut Scratch,
    ) -> Effort {
        self.scan_by(probe, false, slots, is_result, scratch)
    }

    #[inline]
    fn scan_by(
        &self,
        probe: &Probe,
        is_rough: bool,
        slots: &[u32],
        is_result: impl Fn(u32) -> bool,
        scratch: &mut Scratch,
    ) -> Effort {
        // Rows are fetched one group ahead.
        let mut groups = slots.chunks(GROUP).peekable();
        while let Some(group) = groups.next() {
            for &slot in groups.peek().copied().unwrap_or_default() {
                self.prefetch(slot, is_rough);
            }
            self.distances(probe, is_rough, group, &mut scratch.distances);
            for place in below(&scratch.distances.keys, scratch.pool.limit()) {
                let (slot, key) = (group[place], scratch.distances.keys[place]);
                if key < scratch.pool.limit() && is_result(slot) {
                    scratch.pool.insert(key, slot, true);
                }
            }
        }
        Effort { scored: slots.len(), ..Effort::default() }
    }

    /// Links a slot whose row is written. False when it died meanwhile and was left out, `None` when it was given up. Several
    /// threads may link different slots.
    pub fn link(&self, slot: u32, scratch: &mut Scratch) -> Option<bool> {
        if !self.nodes.is_live(slot) {
            return Some(false);
        }
        scratch.is_given_up = false;
        let mut probe = std::mem::take(&mut scratch.probe);
        let mut list = std::mem::take(&mut scratch.list);
        probe.of_row(&self.nodes, slot);
        let is_candidate = |other| other != slot && self.nodes.is_live(other);
        self.search(&probe, LINK_EF, LINK_EF, LINK_WANTED, usize::MAX, false, is_candidate, scratch);
        list.clear();
        list.extend(scratch.found_distances().map(|(slot, distance)| (distance, slot)));
        scratch.chosen.clear();
        self.prune(&list, &probe, scratch);
        if self.metric == Metric::Dot {
            // Long vectors are near to nobody, but what most are looked for: links by products as well.
            probe.go_by_products();
            self.search(&probe, LINK_EF, LINK_EF, LINK_WANTED, usize::MAX, false, is_candidate, scratch);
            list.clear();
            list.extend(scratch.found_distances().map(|(slot, distance)| (distance, slot)));
            self.prune(&list, &probe, scratch);
        }
        if !scratch.is_given_up {
            let chosen = std::mem::take(&mut scratch.chosen);
            self.nodes.set_links(slot, &chosen);
            for (place, &from) in chosen.iter().enumerate() {
                // Whoever looks for this vector comes to the nearest, as the search above did: from there it must go on.
                if !self.link_back(from, slot, &mut probe, &mut list, scratch) && place == 0 {
                    self.insert_between(from, slot);
                }
            }
            scratch.chosen = chosen;
            self.consider_entry(slot);
        }
        scratch.list = list;
        scratch.probe = probe;
        (!scratch.is_given_up).then_some(true)
    }

    /// Adds a link from an older slot to a new one; false when the older has better ones.
    fn link_back(
        &self,
        from: u32,
        to: u32,
        probe: &mut Probe,
        list: &mut Vec<(f32, u32)>,
        scratch: &mut Scratch,
    ) -> bool {
        let _guard = self.stripe(from);
        if self.nodes.push_link(from, to) {
            return true;
        }
        probe.of_row(&self.nodes, from);
        scratch.fresh.clear();
        scratch.fresh.extend(self.nodes.neighbours(from));
        scratch.fresh.push(to);
        self.sorted_by_distance(probe, list, scratch);
        if list.partition_point(|&(distance, _)| distance <= probe.equal()) > LINKS_MAX / 2 {
            // Among equals there is nothing to choose, and those given up would be found by nobody.
            return false;
        }
        scratch.chosen.clear();
        self.prune(list, probe, scratch);
        if self.metric == Metric::Dot {
            probe.go_by_products();
            self.sorted_by_distance(probe, list, scratch);
            self.prune(list, probe, scratch);
        }
        self.nodes.set_links(from, &scratch.chosen);
        scratch.chosen.contains(&to)
    }

    /// Looks for a linked slot by its own row, as a search of default effort would. If that fails, or if no links led there
    /// when it was last looked ([`Graph::reach`]) and none does now, the nearest it came to gets a link there. Returns whether
    /// the slot had been lost; `None` when it was given up.
    pub fn find_again(&self, slot: u32, was_reached: bool, scratch: &mut Scratch) -> Option<bool> {
        scratch.is_given_up = false;
        let mut probe = std::mem::take(&mut scratch.probe);
        probe.of_row(&self.nodes, slot);
        let is_lost = !self.finds(slot, &probe, scratch) || (!was_reached && scratch.is_new(slot));
        scratch.probe = probe;
        if scratch.is_given_up {
            return None;
        }
        if is_lost {
            // One with room costs no other link.
            let near: Vec<u32> = scratch.found().take(EF_DEFAULT / 2).collect();
            let has_room = |&from: &u32| {
                let _guard = self.stripe(from);
                self.nodes.push_link(from, slot)
            };
            if !near.iter().any(has_room) {
                // All of them were expanded, so any will do: others that are lost here should not take the same.
                match near.get(hash(slot) as usize % near.len().max(1)) {
                    Some(&from) => self.insert_between(from, slot),
                    None => self.consider_entry(slot),
                }
            }
        }
        Some(is_lost)
    }

    /// Whether a search of default effort for the row of a slot finds it, or one as near.
    pub fn finds(&self, slot: u32, probe: &Probe, scratch: &mut Scratch) -> bool {
        let is_result = |slot| self.nodes.is_live(slot);
        let is_first = |scratch: &Scratch| {
            let best = scratch.found_distances().next();
            best.is_some_and(|(best, distance)| best == slot || distance <= probe.distance(&self.nodes, slot))
        };
        self.search(probe, EF_DEFAULT, EF_DEFAULT, 1, usize::MAX, false, is_result, scratch);
        if is_first(scratch) {
            return true;
        }
        // Among many alike the high halves may have left it out.
        self.walk(probe, false, EF_DEFAULT, EF_DEFAULT, usize::MAX, false, &is_result, scratch);
        is_first(scratch)
    }

    /// Of the hits nearest to a slot, as the largest of [`EFFORTS`] finds them, how many as near each smaller one finds; and how many there are.
    /// The slot is hidden meanwhile: its own links lead to just these, and no query has such. `None` where it was given up.
    pub fn found_by_effort(&self, slot: u32, scratch: &mut Scratch) -> Option<([usize; EFFORTS.len() - 1], usize)> {
        scratch.is_given_up = false;
        let mut probe = std::mem::take(&mut scratch.probe);
        probe.of_row(&self.nodes, slot);
        if self.metric == Metric::Dot {
            probe.go_by_products();
        }
        let is_result = |other| self.nodes.is_live(other);
        scratch.hidden = Some(slot);
        let nearest = |usual, scratch: &mut Scratch| {
            let (ef, kept) = (plan::effort(None, usual, MEASURED_HITS), kept_by_halves(MEASURED_HITS));
            let budget = plan::budget(Way::Graph, ef, usize::MAX);
            self.search(&probe, ef, kept, MEASURED_HITS, budget, false, is_result, scratch);
            scratch.found_distances().take(MEASURED_HITS).map(|(_, distance)| distance).collect::<Vec<_>>()
        };
        let [efforts @ .., most] = EFFORTS;
        let all = nearest(most, scratch);
        // By distance: of copies any will do.
        let farthest = all.last().copied().unwrap_or_default();
        // Where one finds all of them, so do larger ones.
        let mut found = [all.len(); EFFORTS.len() - 1];
        for (usual, found) in efforts.into_iter().zip(&mut found) {
            let hits = nearest(usual, scratch);
            *found = hits.iter().filter(|&&distance| distance <= farthest).count();
            if *found == all.len() {
                break;
            }
        }
        scratch.hidden = None;
        scratch.probe = probe;
        (!scratch.is_given_up).then_some((found, all.len()))
    }

    /// Adds a link, if need be in place of the last; what that led to is then reached through `slot`.
    fn insert_between(&self, from: u32, slot: u32) {
        let given_up = {
            let _guard = self.stripe(from);
            if self.nodes.push_link(from, slot) { None } else { self.nodes.replace_last_link(from, slot) }
        };
        if let Some(given_up) = given_up.filter(|&to| to != slot && self.nodes.is_live(to)) {
            let _guard = self.stripe(slot);
            if !self.nodes.neighbours(slot).any(|to| to == given_up) && !self.nodes.push_link(slot, given_up) {
                self.nodes.replace_last_link(slot, given_up);
            }
        }
    }

    fn stripe(&self, slot: u32) -> parking_lot::MutexGuard<'_, ()> {
        self.stripes[slot as usize % STRIPES].lock()
    }

    /// Fills `list` with what is fresh, nearest first.
    fn sorted_by_distance(&self, probe: &Probe, list: &mut Vec<(f32, u32)>, scratch: &mut Scratch) {
        for &slot in &scratch.fresh {
            self.nodes.prefetch_row(slot);
        }
        probe.distances(&self.nodes, &scratch.fresh, &mut scratch.distances);
        list.clear();
        list.extend(scratch.distances.keys.iter().copied().zip(scratch.fresh.iter().copied()));
        list.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    }

    /// From candidates sorted by distance, adds to the chosen those that no nearer one of them makes superfluous. At a distance
    /// up to `probe.equal()` rounding is all there is between two rows.
    fn prune(&self, list: &[(f32, u32)], probe: &Probe, scratch: &mut Scratch) {
        let mut chosen = std::mem::take(&mut scratch.chosen);
        let before = chosen.len();
        let links_max = if self.metric == Metric::Dot && !probe.is_by_products() { NEAR_LINKS } else { LINKS_MAX };
        let mut equals = 0;
        for &(distance, slot) in list {
            if chosen.len() >= links_max {
                break;
            }
            if distance <= probe.equal() {
                // One equal makes all others superfluous, and a crowd of equals would fall apart. Half of the links hold it
                // together, the others lead out of it.
                equals += 1;
                if equals <= links_max / 2 {
                    chosen.push(slot);
                }
                continue;
            }
            // What was chosen by another notion of nearness makes nothing superfluous.
            let is_chosen = chosen[..before].contains(&slot);
            if !is_chosen && !self.is_superfluous(distance, slot, &chosen[before..], probe.is_by_products(), scratch) {
                chosen.push(slot);
            }
        }
        scratch.chosen = chosen;
    }

    /// Whether one of `chosen` is so near to a candidate that the way to it leads through there.
    fn is_superfluous(
        &self,
        distance: f32,
        slot: u32,
        chosen: &[u32],
        by_products: bool,
        scratch: &mut Scratch,
    ) -> bool {
        if chosen.is_empty() {
            return false;
        }
        scratch.other.of_row(&self.nodes, slot);
        // Of products, which may be negative, no multiple is an allowance.
        let mut slack = SLACK;
        if by_products {
            scratch.other.go_by_products();
            slack = 1.0;
        }
        chosen.chunks(PRUNE_GROUP).any(|group| {
            scratch.other.distances(&self.nodes, group, &mut scratch.distances);
            scratch.distances.keys.iter().any(|&between| slack * between <= distance)
        })
    }

    fn consider_entry(&self, slot: u32) {
        let is_entry = |mask| hash(slot) & mask == 0;
        let is_first = || self.entries.read().is_empty();
        if !is_entry(self.entry_mask.load(Ordering::Relaxed)) && !is_first() {
            return;
        }
        let mut entries = self.entries.write();
        let list = Arc::make_mut(&mut entries);
        if list.contains(&slot) {
            return;
        }
        list.push(slot);
        while list.len() > 2 * ENTRIES {
            let mask = self.entry_mask.load(Ordering::Relaxed) << 1 | 1;
            self.entry_mask.store(mask, Ordering::Relaxed);
            list.retain(|&slot| hash(slot) & mask == 0);
        }
    }

    /// Chooses the entry points anew from all live linked slots, while nobody links.
    pub fn choose_entries(&self, linked: &[u32]) {
        let mut mask = 0;
        while linked.iter().filter(|&&slot| hash(slot) & mask == 0).take(2 * ENTRIES + 1).count() > 2 * ENTRIES {
            mask = mask << 1 | 1;
        }
        let mut chosen: Vec<u32> = linked.iter().copied().filter(|&slot| hash(slot) & mask == 0).collect();
        if chosen.is_empty() {
            chosen.extend(linked.first());
        }
        let mut entries = self.entries.write();
        self.entry_mask.store(mask, Ordering::Relaxed);
        *entries = Arc::new(chosen);
    }

    /// Replaces a slot's links to condemned slots by links to where those lead.
    pub fn repair(&self, slot: u32, is_condemned: impl Fn(u32) -> bool, scratch: &mut Scratch) {
        let leads_on = |gone: u32, visit: &mut dyn FnMut(u32)| self.nodes.neighbours(gone).for_each(visit);
        self.repair_with(slot, is_condemned, leads_on, scratch);
    }

    /// As [`Graph::repair`], where `leads_on` tells where a condemned slot leads.
    pub fn repair_with(
        &self,
        slot: u32,
        is_condemned: impl Fn(u32) -> bool,
        leads_on: impl Fn(u32, &mut dyn FnMut(u32)),
        scratch: &mut Scratch,
    ) {
        // The lock first: while a list is sorted anew, a reader may see a link twice and miss another.
        let _guard = self.stripe(slot);
        if !self.nodes.neighbours(slot).any(&is_condemned) {
            return;
        }
        scratch.begin(self.nodes.capacity(), 0);
        let mut kept = std::mem::take(&mut scratch.chosen);
        kept.clear();
        scratch.failing.clear();
        scratch.is_new(slot);
        for to in self.nodes.neighbours(slot) {
            if is_condemned(to) {
                scratch.failing.push(to);
            } else if scratch.is_new(to) {
                kept.push(to);
            }
        }
        scratch.fresh.clear();
        let gone = std::mem::take(&mut scratch.failing);
        for &gone in &gone {
            leads_on(gone, &mut |to| {
                if !is_condemned(to) && self.nodes.is_live(to) && scratch.is_new(to) {
                    scratch.fresh.push(to);
                }
            });
        }
        let mut probe = std::mem::take(&mut scratch.probe);
        let mut list = std::mem::take(&mut scratch.list);
        probe.of_row(&self.nodes, slot);
        self.sorted_by_distance(&probe, &mut list, scratch);
        let room = kept.len() + gone.len();
        for &(distance, candidate) in &list {
            if kept.len() >= room.min(LINKS_MAX) {
                break;
            }
            if !self.is_superfluous(distance, candidate, &kept, false, scratch) {
                kept.push(candidate);
            }
        }
        self.nodes.set_links(slot, &kept);
        scratch.failing = gone;
        scratch.probe = probe;
        scratch.list = list;
        scratch.chosen = kept;
    }

    /// What a walk over the links from the entry points reaches, as one flag for each slot there is room for; `None` when it had to
    /// stop, which it asks after each [`REACH_SLOTS`].
    pub fn reach(&self, must_stop: impl Fn() -> bool) -> Option<Vec<bool>> {
        let mut reached = vec![false; self.nodes.capacity()];
        let mut followed = 0;
        let mut waiting: Vec<u32> = self.entries.read().to_vec();
        // One that was linked meanwhile may lie beyond.
        for &slot in &waiting {
            if let Some(seen) = reached.get_mut(slot as usize) {
                *seen = true;
            }
        }
        while let Some(slot) = waiting.pop() {
            followed += 1;
            if followed % REACH_SLOTS == 0 && must_stop() {
                return None;
            }
            for to in self.nodes.neighbours(slot) {
                if let Some(seen) = reached.get_mut(to as usize)
                    && !*seen
                {
                    *seen = true;
                    waiting.push(to);
                }
            }
        }
        Some(reached)
    }

    /// The metric it compares by.
    #[must_use]
    pub fn metric(&self) -> Metric {
        self.metric
    }
}

/// Pieces of work over many slots or places, taken by as many threads as there are cores.
#[derive(Debug)]
pub struct Pass {
    end: usize,
    next: AtomicUsize,
}

impl Pass {
    /// Over `slots` slots.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self { end: slots, next: AtomicUsize::new(0) }
    }

    /// The next piece, if there is one.
    fn claim(&self) -> Option<std::ops::Range<usize>> {
        let start = self.next.fetch_add(PASS_SLOTS, Ordering::Relaxed);
        (start < self.end).then(|| start..(start + PASS_SLOTS).min(self.end))
    }

    /// Does all pieces here and now, on a thread for each core, each with memory of its own; they take this thread's
    /// priority.
    pub fn run<M: Default>(&self, work: impl Fn(std::ops::Range<usize>, &mut M) + Sync) {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut memory = M::default();
                    while let Some(piece) = self.claim() {
                        work(piece, &mut memory);
                    }
                });
            }
        });
    }
}

/// The slots that a repair pass removes every link to.
#[derive(Debug)]
pub struct Repair {
    /// By slot.
    condemned: Vec<u64>,
    /// The condemned slots.
    pub slots: Vec<u32>,
}

impl Repair {
    /// Condemns slots. No link to them may be made from here on: they are dead, and whoever was linking when they died
    /// has ended.
    #[must_use]
    pub fn new(slots: Vec<u32>, end: usize) -> Self {
        let mut condemned = vec![0; end.div_ceil(64)];
        for &slot in &slots {
            condemned[slot as usize / 64] |= 1 << (slot % 64);
        }
        Self { condemned, slots }
    }

    /// Whether a slot is condemned.
    #[must_use]
    pub fn is_condemned(&self, slot: u32) -> bool {
        self.condemned.get(slot as usize / 64).is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a pool admits of a group must not depend on comparing it with one limit first.
    #[test]
    fn a_group_at_once_leaves_what_one_by_one_leaves() {
        // Few values, so that many are equal to the limit.
        let key = |n: u32| match n.wrapping_mul(2_654_435_761) >> 27 {
            0 => f32::MAX,
            1 => f32::MIN,
            n => (n % 11) as f32 - 3.0,
        };
        for (ef, count) in (0..6).flat_map(|ef| (0..120).map(move |count| (ef, count))) {
            let is_result = |n: u32| n.is_multiple_of(7) || ef % 2 == 0;
            let [mut at_once, mut one_by_one] = [Pool { ef, ..Pool::default() }, Pool { ef, ..Pool::default() }];
            let slots: Vec<u32> = (0..count).collect();
            for slots in slots.chunks(GROUP) {
                let keys: Vec<f32> = slots.iter().map(|&slot| key(slot + 1000 * count)).collect();
                for place in below(&keys, at_once.limit()) {
                    if keys[place] < at_once.limit() {
                        at_once.insert(keys[place], slots[place], is_result(slots[place]));
                    }
                }
                for (&slot, &key) in slots.iter().zip(&keys) {
                    if !one_by_one.is_full() || one_by_one.spots.last().is_none_or(|last| key < last.key) {
                        one_by_one.insert(key, slot, is_result(slot));
                    }
                }
                let left = |pool: &Pool| pool.spots.iter().map(|spot| (spot.key, spot.tag)).collect::<Vec<_>>();
                assert_eq!(left(&at_once), left(&one_by_one), "ef {ef}, {count}");
            }
        }
    }
}
