//! Running searches: which way, over what, and the best scored again.
//!
//! A search takes no lock while it walks the graph. It holds its number (see [`SearchTicket`]), which keeps every slot it
//! may meet from being reused, and asks each slot near enough whether it was visible at the search's revision. The tail of
//! vectors not yet linked was noted when it began; those it has not met on its walk it scans.

use super::collections::SharedCollection;
use crate::error::Rejection;
use crate::revision::Revision;
use crate::vector::codes::Probe;
use crate::vector::collection::{Collection, Groups, Query, Scan, SearchNumber};
use crate::vector::filter::Filter;
use crate::vector::graph::{Graph, Scratch, kept_by_halves};
use crate::vector::meta_index::{MetaIndex, select};
use crate::vector::plan::{self, Way};
use crate::vector::topk::{Candidate, TopK};
use crate::vector::{Hit, VectorId};
use rayon::prelude::*;
use roaring::RoaringBitmap;
use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Work done under one hold of the collection's lock, in numbers multiplied: about a hundred microseconds.
const SLICE_COST: usize = 1 << 20;
/// Rows in a slice at most, however cheap they are.
const SLICE_ROWS_MAX: usize = 4096;
/// Searches cheaper than this run where they are: handing them to other threads would take longer.
const INLINE_COST: usize = 1 << 19;
/// Metadata objects taken under one hold of the lock.
const SLICE_METAS: usize = 64;
/// Numbers of graph rows compared in the time of one multiplied.
const CODES_PER_NUMBER: usize = 4;
/// Candidates scored again beyond a quarter more than there are hits: what rounding may have put behind. Measured: twelve
/// for ten hits lose no recall that forty find.
const SPARE: usize = 4;
/// Of what was scored again, so many are looked at for their rounding.
const ROUNDINGS: usize = 64;
/// Standard deviations of rounding to reckon with: about as far as ten hits are apart.
const DEVIATIONS: f32 = 1.5;
/// Numbers scored as they were sent where the graph's bytes do not tell apart what lies near a query: a millisecond.
const EXACT_INSTEAD: usize = 1 << 23;
/// The same where what lies near a query lies equally near: a tenth of a millisecond. A walk among more leaves open which of its
/// equals come.
const EXACT_FOR_EQUALS: usize = 1 << 20;
/// Hits up to which matches are scanned in the graph's rows.
const SCANNED_MAX: usize = 512;
/// A search that had to scan a tail longer than this links some of it, which takes milliseconds: else, on a machine busy with
/// searches, the tail would slow them all down for ever.
const HELP_FROM: usize = 4096;
/// A search that takes longer is given up: it keeps slots of deleted vectors from being reused, and threads from others.
pub(super) const SEARCH_TIME_MAX: Duration = Duration::from_secs(10);
/// Vectors up to which a filtered search is cheap whatever its filter matches.
const INLINE_VECTORS: usize = 100_000;

/// One search, valid for its collection.
#[derive(Clone, Debug)]
pub struct Search {
    /// What to look near.
    pub query: Query,
    /// Whose numbers these are, and of which revision, where they are a stored vector's: it is looked at wherever the walk leads.
    pub stored: Option<(VectorId, Revision)>,
    /// Which vectors count.
    pub filter: Option<Filter>,
    /// Hits wanted, 1 to `K_MAX`.
    pub k: usize,
    /// Hits to leave out at the front.
    pub offset: usize,
    /// Leaves out what scores lower.
    pub min_score: Option<f32>,
    /// Hits carry their numbers.
    pub include_vector: bool,
    /// Score everything with the numbers as sent.
    pub is_exact: bool,
    /// Candidates a walk keeps; more find more.
    pub ef: Option<usize>,
    /// Keep the best `size` hits for each value at this metadata path; `k` then counts groups.
    pub group: Option<Grouping>,
}

/// How hits are grouped.
#[derive(Clone, Debug)]
pub struct Grouping {
    /// A dotted path into the metadata.
    pub path: Vec<Box<str>>,
    /// Hits kept in each group.
    pub size: usize,
}

/// What a search found.
#[derive(Clone, Debug)]
pub enum Found {
    /// Best first.
    Hits(Vec<Hit>),
    /// Groups in the order of their best hit, with the value they share.
    Groups(Vec<(serde_json::Value, Vec<Hit>)>),
}

/// How a search was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The way in the end.
    pub way: Way,
    /// The way that was tried before and given up, the last of them.
    pub given_up: Option<Way>,
    /// Candidates kept by a walk.
    pub ef: usize,
    /// Live vectors.
    pub vectors: usize,
    /// Those of them that satisfy the filter; all without one.
    pub matches: usize,
    /// Rows compared with the query.
    pub scored: usize,
    /// Slots whose links were followed.
    pub expanded: usize,
    /// Vectors not yet linked, which were scanned.
    pub tail: usize,
}

/// A search's answer.
#[derive(Clone, Debug)]
pub struct SearchAnswer {
    /// The hits.
    pub found: Found,
    /// How they were found.
    pub plan: Plan,
}

/// The right to search at one revision. Dropping it lets the slots go.
#[derive(Debug)]
pub struct SearchTicket {
    pub(super) collection: Arc<SharedCollection>,
    pub(super) at: Revision,
    pub(super) number: SearchNumber,
    /// When it is given up.
    pub(super) until: Instant,
    /// The graph and its tail when the search began.
    pub(super) graph: Option<(Arc<Graph>, Vec<u32>)>,
    /// How many vectors were live then.
    pub(super) vectors: usize,
    /// Effort of searches that do not say, as it was then.
    pub(super) usual_effort: usize,
    /// Everything live then, where a search needs it. Its slots are not reused before the ticket is dropped.
    pub(super) live: Option<RoaringBitmap>,
}

impl Drop for SearchTicket {
    fn drop(&mut self) {
        self.collection.end_search(self.number);
    }
}

thread_local! {
    /// Memory of searches, one for each thread that runs them.
    static SCRATCH: RefCell<(Probe, Scratch)> = RefCell::default();
}

impl Search {
    /// Looks near what the stored vector it began with is now.
    pub fn renew(&mut self, collection: &Collection) -> Result<(), Rejection> {
        let Some((id, revision)) = &mut self.stored else { return Ok(()) };
        let item =
            collection.get(id.as_str(), false).ok_or_else(|| Rejection::VectorNotFound(id.as_str().to_owned()))?;
        if item.revision != *revision {
            *revision = item.revision;
            let numbers = collection.get(id.as_str(), true).and_then(|item| item.vector).unwrap_or_default();
            self.query = Query::new(collection.spec(), &numbers);
        }
        Ok(())
    }

    fn effort(&self, usual: usize) -> usize {
        let effort = plan::effort(self.ef, usual, self.offset + self.k);
        // What is scored again must have been followed, unless less was asked for.
        if self.ef.is_none() { effort.max(needed(self)) } else { effort }
    }

    /// Whether it may look at live slots one by one, among so many vectors.
    pub(super) fn needs_live(&self, usual_effort: usize, vectors: usize) -> bool {
        self.filter.is_some() || plan::choose(self.effort(usual_effort), vectors, vectors) == Way::Scan
    }
}

impl SearchTicket {
    /// Whether these searches take no longer than handing them to other threads would.
    #[must_use]
    pub fn is_cheap(&self, searches: &[Search]) -> bool {
        !self.has_long_tail() && self.cost(searches) < INLINE_COST
    }

    fn has_long_tail(&self) -> bool {
        self.graph.as_ref().is_some_and(|(_, tail)| tail.len() > HELP_FROM)
    }

    /// What these searches cost, about, in numbers multiplied.
    fn cost(&self, searches: &[Search]) -> usize {
        let dim = self.collection.spec().dim;
        let (slots, text_bytes, not_indexed_bytes) = self.collection.read(|c| {
            let not_indexed_bytes = self.live.as_ref().map_or(0, |live| c.not_indexed_bytes(live));
            (c.slot_count(), c.text_bytes_average(), not_indexed_bytes)
        });
        // Parsing a byte of metadata costs as much as some tens of numbers.
        const META_BYTE_COST: usize = 32;
        const CONDITION_COST: usize = 8;
        const RANGE_VALUES: usize = 4096;
        let one = |search: &Search| match &self.graph {
            _ if search.group.is_some() => slots * (dim + (text_bytes + 16) * META_BYTE_COST),
            Some((_, tail)) if !search.is_exact => {
                let is_long = search.filter.is_some() && slots > INLINE_VECTORS;
                let walked = if is_long { slots } else { search.effort(self.usual_effort) * 32 };
                (walked + tail.len()).min(slots) * dim / CODES_PER_NUMBER
            }
            _ => slots * dim,
        };
        let parsed = |search: &Search| match &search.filter {
            Some(filter) => {
                let parsed = if filter.is_indexable() { not_indexed_bytes } else { slots * (text_bytes + 16) };
                // Each byte may be a value that each condition looks at.
                let looked_at = META_BYTE_COST + filter.conditions() * CONDITION_COST;
                // In the index, a range over many values is many sets.
                let in_index = filter.conditions() * slots.min(RANGE_VALUES);
                parsed.saturating_mul(looked_at).saturating_add(in_index)
            }
            None => 0,
        };
        searches.iter().map(|search| one(search) + parsed(search)).fold(0, usize::saturating_add)
    }

    /// What was found, unless it took too long.
    fn in_time<T>(&self, found: T) -> Result<T, Rejection> {
        let what = "it took longer than 10 s and was given up; narrow the filter, or ask for less at once";
        if self.is_over() { Err(Rejection::Overloaded(what)) } else { Ok(found) }
    }

    /// Whether it is given up: what is found from here on is not looked at.
    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Runs the searches; several threads when it is worth it.
    pub fn run(&self, searches: &[Search]) -> Result<Vec<SearchAnswer>, Rejection> {
        let is_cheap = || self.is_cheap(searches);
        // Those that look at everything do so together, in one pass over memory.
        let (together, alone): (Vec<_>, Vec<_>) =
            searches.iter().enumerate().partition(|(_, search)| self.looks_at_everything(search));
        let mut answers: Vec<(usize, SearchAnswer)> = match alone.as_slice() {
            [] => Vec::new(),
            [(at, search)] => vec![(*at, self.run_one(search))],
            _ if is_cheap() => alone.iter().map(|(at, search)| (*at, self.run_one(search))).collect(),
            // Those that are not begun in time are left out, and all are refused.
            _ => {
                let in_time = |(at, search): &(usize, &Search)| (!self.is_over()).then(|| (*at, self.run_one(search)));
                alone.par_iter().filter_map(in_time).collect()
            }
        };
        if !together.is_empty() {
            let (places, searches): (Vec<usize>, Vec<&Search>) = together.into_iter().unzip();
            answers.extend(places.into_iter().zip(self.scan_everything(&searches, is_cheap())));
        }
        if self.has_long_tail() {
            self.collection.help();
        }
        answers.sort_unstable_by_key(|(at, _)| *at);
        self.in_time(answers.into_iter().map(|(_, answer)| answer).collect())
    }

    fn looks_at_everything(&self, search: &Search) -> bool {
        search.filter.is_none() && (search.is_exact || search.group.is_some() || self.graph.is_none())
    }

    fn new_scan(search: &Search) -> Scan {
        let wanted = search.offset + search.k;
        let groups =
            search.group.as_ref().map(|grouping| Groups::new(&grouping.path, search.min_score, wanted, grouping.size));
        Scan { query: search.query.clone(), top: TopK::new(wanted, search.min_score), groups }
    }

    /// O(vectors x dim) for each, all in one pass.
    fn scan_everything(&self, searches: &[&Search], is_cheap: bool) -> Vec<SearchAnswer> {
        let (slots, vectors) = (self.collection.read(Collection::slot_count), self.vectors);
        let rows = (SLICE_COST / (self.collection.spec().dim * searches.len() + 1)).clamp(16, SLICE_ROWS_MAX);
        let rows = if searches.iter().any(|search| search.group.is_some()) { self.grouped_rows(rows) } else { rows };
        let slices: Vec<_> = (0..slots).step_by(rows).map(|start| start..(start + rows).min(slots)).collect();
        let scan_slice = |mut scans: Vec<Scan>, slice: std::ops::Range<usize>| {
            if !self.is_over() {
                self.collection.read(|c| c.scan(slice, self.at, &mut scans));
                scans.iter_mut().for_each(|scan| scan.take_in(|| self.is_over()));
            }
            scans
        };
        let merge = |a: Vec<Scan>, b: Vec<Scan>| a.into_iter().zip(b).map(|(a, b)| merge_scans(a, b)).collect();
        let pass = |scans: Vec<Scan>| {
            if is_cheap {
                slices.iter().cloned().fold(scans, scan_slice)
            } else {
                slices.par_iter().cloned().fold(|| scans.clone(), scan_slice).reduce(|| scans.clone(), merge)
            }
        };
        let mut scans = pass(searches.iter().map(|search| Self::new_scan(search)).collect());
        let (places, again): (Vec<usize>, Vec<Scan>) = (searches.iter().zip(&scans).enumerate())
            .filter_map(|(place, (search, scan))| Some((place, second_pass(search, scan)?)))
            .unzip();
        if !again.is_empty() {
            places.into_iter().zip(pass(again)).for_each(|(place, scan)| scans[place] = scan);
        }
        let plan = Plan {
            way: Way::Exact,
            given_up: None,
            ef: 0,
            vectors,
            matches: vectors,
            scored: slots,
            expanded: 0,
            tail: 0,
        };
        let answer = |(search, scan): (&&Search, Scan)| SearchAnswer { found: self.finish(search, scan), plan };
        searches.iter().zip(scans).map(answer).collect()
    }

    /// Rows of a slice whose metadata is parsed: few where that is much, so that all threads have some.
    fn grouped_rows(&self, rows: usize) -> usize {
        (SLICE_COST / (self.collection.read(Collection::text_bytes_average) + 16)).clamp(16, rows)
    }

    /// The slots that were live when the search began and satisfy a filter.
    fn select(&self, filter: &Filter) -> RoaringBitmap {
        let Some(live) = &self.live else { return RoaringBitmap::new() };
        // What is not in the index is noted first: a slot indexed meanwhile is then looked at here all the same.
        let unindexed = self.collection.read(|c| c.not_indexed(live));
        let nothing = MetaIndex::default();
        let selection = select(filter, &|look| {
            self.collection.read(|c| look(if self.is_over() { &nothing } else { c.meta_index() }));
        });
        let mut slots = selection.slots & live;
        if !unindexed.is_empty() {
            slots -= &unindexed;
        }
        if !selection.is_exact {
            slots = self.check(&slots, filter);
        }
        if !unindexed.is_empty() {
            slots |= self.check(&unindexed, filter);
        }
        slots
    }

    /// Those slots whose metadata, parsed, satisfies a filter.
    fn check(&self, slots: &RoaringBitmap, filter: &Filter) -> RoaringBitmap {
        let slots = slots_of(slots);
        let check = |slice: &[u32]| -> Vec<u32> {
            let metas = self.collection.read(|c| c.metas_at(slice, self.at));
            let each = slice.iter().zip(metas);
            each.filter(|(_, meta)| !self.is_over() && filter.matches(&meta.parse())).map(|(&slot, _)| slot).collect()
        };
        let kept: Vec<Vec<u32>> = if slots.len() <= 4 * SLICE_METAS {
            slots.chunks(SLICE_METAS).map(check).collect()
        } else {
            slots.par_chunks(SLICE_METAS).map(check).collect()
        };
        RoaringBitmap::from_sorted_iter(kept.into_iter().flatten()).unwrap_or_default()
    }

    /// How many vectors satisfied a filter when this began.
    pub fn count_matching(&self, filter: &Filter) -> Result<usize, Rejection> {
        self.in_time(usize::try_from(self.select(filter).len()).unwrap_or(usize::MAX))
    }

    /// The ids of the vectors that satisfied a filter when this began and are still there.
    pub fn ids_matching(&self, filter: &Filter) -> Result<Vec<VectorId>, Rejection> {
        let slots = self.in_time(slots_of(&self.select(filter)))?;
        let ids = slots.chunks(SLICE_ROWS_MAX).flat_map(|slice| self.collection.read(|c| c.ids_of(slice)));
        Ok(ids.collect())
    }

    fn run_one(&self, search: &Search) -> SearchAnswer {
        let selected = match &search.filter {
            Some(filter) => Some(self.select(filter)),
            None => self.live.clone(),
        };
        let vectors = self.vectors;
        let matches = selected.as_ref().map_or(vectors, |s| usize::try_from(s.len()).unwrap_or(usize::MAX));
        let wanted = search.offset + search.k;
        let needed = needed(search);
        let ef = search.effort(self.usual_effort);
        let mut plan = Plan { way: Way::Exact, given_up: None, ef, vectors, matches, scored: 0, expanded: 0, tail: 0 };
        let graph = self.graph.as_ref().filter(|_| !search.is_exact && search.group.is_none());
        let (graph, tail) = match (graph, &selected) {
            (Some(graph), _) => graph,
            (None, Some(selected)) => return self.scan_selected(search, selected, plan),
            (None, None) => return self.scan_everything(&[search], false).remove(0),
        };
        plan.way = plan::choose(ef, matches, vectors);
        if plan.way == Way::Scan && wanted > SCANNED_MAX {
            // A pool of thousands is slower than a heap over all scores.
            plan.way = Way::Exact;
        }
        let found = SCRATCH.with_borrow_mut(|(probe, scratch)| {
            probe.of_query(graph.metric(), search.query.numbers(), graph.centre());
            if plan.way == Way::Exact || !probe.is_fit() {
                return None;
            }
            if plan.way != Way::Scan {
                let is_done = self.walk(search, selected.as_ref(), graph, tail, probe, scratch, &mut plan);
                if !is_done && plan.way == Way::Graph {
                    // Few matches where the query lies: look for them among neighbours of neighbours.
                    plan.given_up = Some(plan.way);
                    plan.way = Way::TwoHop;
                    self.walk(search, selected.as_ref(), graph, tail, probe, scratch, &mut plan);
                }
                if scratch.found().take(wanted).count() < wanted.min(matches) {
                    // Too dear, or the links did not lead to enough.
                    plan.given_up = Some(plan.way);
                    plan.way = Way::Scan;
                }
            }
            if plan.way == Way::Scan {
                // Looking at everything takes other threads: not while this thread's memory is lent.
                let selected = selected.as_ref()?;
                let slots = slots_of(selected);
                plan.scored += graph.scan(probe, wanted, &slots, scratch).scored;
            }
            // The rows of the graph are rounded: the best are scored again with the numbers as sent. Where the rounding is more
            // than what lies between hits and the rest, more of them; where it is more than all that was found lies apart,
            // everything, unless that is much.
            let found: Vec<(u32, f32)> = scratch.found_distances().collect();
            let mut rescored = needed.min(ef).min(found.len());
            let is_full = scratch.is_full();
            let numbers = matches * self.collection.spec().dim;
            let by_id = plan.way == Way::Scan || numbers <= EXACT_FOR_EQUALS;
            let tells_apart =
                |scan: &Scan, rescored| tells_apart(graph, probe, wanted, scan, &found, rescored, is_full, by_id);
            let mut scan = self.rescore(search, &found[..rescored]);
            // Whoever asks for so little effort gets it.
            let is_meagre = plan.way != Way::Scan && ef < needed;
            let mut is_clear = is_meagre || tells_apart(&scan, rescored);
            if !is_clear && rescored < found.len() {
                rescored = found.len();
                scan = self.rescore(search, &found);
                is_clear = tells_apart(&scan, rescored);
            }
            // The matches of a scan were all looked at; whatever it takes, equals come by id.
            let must_be_exact = || plan.way == Way::Scan && has_equals(&nearest(graph, &scan), wanted);
            if !is_clear && (numbers <= EXACT_INSTEAD || must_be_exact()) {
                plan.given_up = Some(plan.way);
                return None;
            }
            scan.top.drop_below(search.min_score);
            Some(SearchAnswer { found: self.finish(search, scan), plan })
        });
        found.unwrap_or_else(|| {
            let plan = Plan { way: Way::Exact, ..plan };
            match &selected {
                Some(selected) => self.scan_selected(search, selected, plan),
                None => {
                    let mut all = self.scan_everything(&[search], false).remove(0);
                    all.plan.given_up = plan.given_up;
                    all
                }
            }
        })
    }

    /// Scores what was found with the numbers as sent.
    fn rescore(&self, search: &Search, found: &[(u32, f32)]) -> Scan {
        let slots: Vec<u32> = found.iter().map(|&(slot, _)| slot).collect();
        // All of them, whatever their score: how much rounding there is shows in each.
        let mut scan = Self::new_scan(search);
        scan.top = TopK::new(found.len(), None);
        for slice in slots.chunks(SLICE_METAS) {
            self.collection.read(|c| c.scan_slots(slice, self.at, &mut scan));
        }
        scan
    }

    /// Walks the graph, then scans what of the tail the walk has not met. False when it was given up; then nothing is found.
    #[expect(clippy::too_many_arguments, reason = "the parts of one search, taken apart by its caller")]
    fn walk(
        &self,
        search: &Search,
        selected: Option<&RoaringBitmap>,
        graph: &Graph,
        tail: &[u32],
        probe: &Probe,
        scratch: &mut Scratch,
        plan: &mut Plan,
    ) -> bool {
        let is_visible = |slot| graph.nodes().is_visible(slot, self.at);
        let (wanted, needed) = (search.offset + search.k, needed(search));
        // Whoever asks for so little effort gets it.
        let (kept, wanted) = if plan.ef < needed { (needed, 0) } else { (kept_by_halves(wanted), wanted) };
        let effort = match (selected, plan.way) {
            (Some(selected), _) if search.filter.is_some() => {
                let is_selected = |slot| selected.contains(slot);
                let budget = plan::budget(plan.way, plan.ef, plan.matches);
                graph.search(probe, plan.ef, kept, wanted, budget, plan.way == Way::TwoHop, is_selected, scratch)
            }
            _ => graph.search(probe, plan.ef, kept, wanted, usize::MAX, false, is_visible, scratch),
        };
        let stored = search.stored.as_ref().and_then(|(id, _)| self.collection.read(|c| c.slot_of(id)));
        let unseen: Vec<u32> = tail.iter().copied().chain(stored).filter(|&slot| scratch.is_new(slot)).collect();
        let more = match selected {
            Some(selected) => graph.scan_more(probe, &unseen, |slot| selected.contains(slot), scratch),
            None => graph.scan_more(probe, &unseen, is_visible, scratch),
        };
        plan.scored += effort.scored + more.scored;
        plan.expanded += effort.expanded;
        plan.tail = tail.len();
        if effort.is_over_budget {
            scratch.forget();
        }
        !effort.is_over_budget
    }

    /// Scores what is selected with the numbers as sent.
    fn scan_selected(&self, search: &Search, selected: &RoaringBitmap, plan: Plan) -> SearchAnswer {
        let slots = slots_of(selected);
        let rows = (SLICE_COST / self.collection.spec().dim).clamp(16, SLICE_ROWS_MAX);
        let rows = if search.group.is_some() { self.grouped_rows(rows) } else { rows };
        let scan_slice = |mut scan: Scan, slice: &[u32]| {
            if !self.is_over() {
                self.collection.read(|c| c.scan_slots(slice, self.at, &mut scan));
                scan.take_in(|| self.is_over());
            }
            scan
        };
        let pass = |scan: Scan| {
            if slots.len() * self.collection.spec().dim < INLINE_COST {
                slots.chunks(rows).fold(scan, scan_slice)
            } else {
                slots.par_chunks(rows).fold(|| scan.clone(), scan_slice).reduce(|| scan.clone(), merge_scans)
            }
        };
        let mut scan = pass(Self::new_scan(search));
        if let Some(again) = second_pass(search, &scan) {
            scan = pass(again);
        }
        SearchAnswer { found: self.finish(search, scan), plan: Plan { scored: slots.len(), ..plan } }
    }

    fn finish(&self, search: &Search, scan: Scan) -> Found {
        let Some(groups) = scan.groups else {
            let best = scan.top.into_sorted();
            let wanted = best.get(search.offset..).unwrap_or_default();
            return Found::Hits(self.hits(search, &wanted[..wanted.len().min(search.k)]));
        };
        let wanted = groups.into_sorted().skip(search.offset).take(search.k);
        Found::Groups(wanted.map(|(value, top)| (value, self.hits(search, &top.into_sorted()))).collect())
    }

    /// A few under one hold of the lock: their numbers may have to come from disk.
    fn hits(&self, search: &Search, found: &[Candidate]) -> Vec<Hit> {
        let at_a_time = if search.include_vector { self.collection.rows_at_a_time() } else { SLICE_METAS };
        let mut hits = Vec::with_capacity(found.len());
        for some in found.chunks(at_a_time) {
            let hit = |inner: &Collection, c: &Candidate| inner.hit(c.slot, c.score, search.include_vector, self.at);
            self.collection.read(|inner| hits.extend(some.iter().map(|c| hit(inner, c))));
        }
        hits
    }
}

/// Candidates that are scored again.
fn needed(search: &Search) -> usize {
    let wanted = search.offset + search.k;
    wanted + wanted / 4 + SPARE
}

/// Whether what was found but not `rescored`, or not even kept as the pool was full, can be no hit. The rounding of what is not
/// known is taken to be like that of what was scored again, or as large as steps and digits let expect: what is common to all of
/// them (that of the query, say) moves nobody. Where equals are to come `by_id`, what was left out must not be one.
#[expect(clippy::too_many_arguments, reason = "the parts of one search, taken apart by its caller")]
fn tells_apart(
    graph: &Graph,
    probe: &Probe,
    wanted: usize,
    scan: &Scan,
    found: &[(u32, f32)],
    rescored: usize,
    is_full: bool,
    by_id: bool,
) -> bool {
    let next = match found.get(rescored) {
        Some(&(_, distance)) => distance,
        None if is_full => found.last().map_or(f32::MAX, |&(_, distance)| distance),
        None => return true,
    };
    let kept = nearest(graph, scan);
    if by_id && has_equals(&kept, wanted) {
        // Others, left out, may be as near, and come first by their id.
        return false;
    }
    let Some(&(_, last)) = wanted.checked_sub(1).and_then(|last| kept.get(last)) else {
        // Some died meanwhile.
        return true;
    };
    if last <= 0.0 && !probe.is_by_products() {
        // Nothing is nearer.
        return true;
    }
    // Of very many some tell as much.
    let distance_of = |slot| kept.iter().find(|&&(other, _)| other == slot).map(|&(_, distance)| distance);
    let mut alike = found[..rescored].iter().rev().take_while(|&&(_, rounded)| rounded == next).take(ROUNDINGS);
    if alike.clone().count() > 1 && alike.all(|&(slot, _)| distance_of(slot) == Some(last)) {
        // What is left out lies as far as the last hit: copies of it, and none is nearer.
        return true;
    }
    let some = kept.len() / ROUNDINGS + 1;
    let (mut least, mut most, mut expected) = (f32::MAX, f32::MIN, 0.0_f32);
    for &(slot, distance) in kept.iter().step_by(some) {
        let Some((_, rounded)) = found.iter().find(|&&(other, _)| other == slot) else { continue };
        (least, most) = (least.min(rounded - distance), most.max(rounded - distance));
        expected = expected.max(probe.rounding(last, graph.nodes().figures(slot)));
    }
    let tolerance = 4.0 * f32::EPSILON * next.abs();
    // Where none is off the bytes are exact.
    let is_exact = -tolerance <= least && most <= tolerance;
    // In the middle, and from there as far as any of them is off, or may be.
    let (common, spread) = ((least + most) / 2.0, (most - least) / 2.0);
    let spread = if is_exact { spread } else { spread.max(DEVIATIONS * expected) };
    last + common + spread <= next + tolerance
}

/// What was scored again, the nearest first.
fn nearest(graph: &Graph, scan: &Scan) -> Vec<(u32, f32)> {
    let mut kept: Vec<(u32, f32)> =
        scan.top.kept().map(|c| (c.slot.0, Probe::distance_of(graph.metric(), c.score))).collect();
    kept.sort_unstable_by(|a, b| a.1.total_cmp(&b.1));
    kept
}

/// Whether the last hit and the next candidate are equally near.
fn has_equals(kept: &[(u32, f32)], wanted: usize) -> bool {
    wanted.checked_sub(1).is_some_and(|last| kept.get(last..last + 2).is_some_and(|pair| pair[0].1 == pair[1].1))
}

/// All slots of a bitmap.
fn slots_of(bitmap: &RoaringBitmap) -> Vec<u32> {
    let mut slots = vec![0; usize::try_from(bitmap.len()).unwrap_or(usize::MAX)];
    // Many at a time: a third of the time of one by one.
    let filled = bitmap.iter().next_many(&mut slots).len();
    slots.truncate(filled);
    slots
}

/// What finds the vectors of each group, where the first pass had to forget some.
fn second_pass(search: &Search, first: &Scan) -> Option<Scan> {
    let groups = first.groups.as_ref().zip(search.group.as_ref());
    let groups = groups.and_then(|(groups, grouping)| groups.clone().emptied(grouping.size))?;
    Some(Scan { groups: Some(groups), ..SearchTicket::new_scan(search) })
}

fn merge_scans(mut a: Scan, b: Scan) -> Scan {
    a.top.add(b.top);
    Scan { groups: a.groups.zip(b.groups).map(|(a, b)| a.merge(b)), ..a }
}
