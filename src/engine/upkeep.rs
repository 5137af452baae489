//! What keeps one collection up: jobs for linkers, what they report, repairs, measurements, memory made ready. The threads are those
//! of [`super::linker`], the locks those of [`super::collections`].

use super::collections::SharedCollection;
use super::linker::TAIL_MAX;
use crate::vector::Metric;
use crate::vector::collection::{Collection, SearchNumber};
use crate::vector::graph::{Graph, Repair, Scratch};
use crate::vector::plan::{self, Way};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Slots linked as one piece of work: a few milliseconds.
const LINK_SLOTS: usize = 16;
/// Dead linked slots before a repair pass begins, at least, and as a part of the linked ones: a pass looks at all links, and
/// one that condemns more repairs several links of a slot at once.
const REPAIR_FROM: usize = 128;
const REPAIR_PART: usize = 32;
/// The usual effort is measured anew when vectors that make this part of a graph were linked; while more than a smaller part of it wait to
/// be, when only this part was linked before.
const MEASURED_PART: usize = 4;
const WAITING_PART: usize = 16;
/// Slots that are one job of that: some milliseconds.
const MEASURED_SLOTS: usize = 8;
/// Lost slots are looked for when this part of the graph has changed, in so many passes at most.
const SEARCH_PARTY_PART: u64 = 16;
const SEARCH_PARTIES: usize = 3;
/// Slots that are one job of a repair or a search party: milliseconds.
const WALK_SLOTS: usize = 64;
/// Jobs a collection has out at a time: enough that no linker waits for the next.
const JOBS_OUT: usize = 32;
/// Dead slots freed under one hold of the lock.
const RECLAIM_SLOTS: usize = 32;
/// Repaired slots moved under one hold of the lock.
const REPAIRED_SLOTS: usize = 256;
/// Rows added up under one hold of the lock.
const CENTRE_ROWS: usize = 16;
/// Rows whose memory is made ready under one hold of the lock and before the core is offered, in bytes (where each page has to
/// come from a host, 50 us), and how much is made ready ahead of the writer, of rows and of the graph: so many bytes, and no more
/// than a part of what the collection has.
const POPULATED_BYTES: usize = 16 << 10;
const AHEAD_BYTES: usize = 4 << 20;
const AHEAD_PART: usize = 16;

/// Where the background work on a collection stands.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    /// The graph file has yet to be looked at.
    has_to_load: bool,
    /// Rows of slots below this have their memory.
    populated: usize,
    /// Slots below this have their memory in the graph, or a linker has the job to get it.
    graph_populated: usize,
    /// Jobs that linkers have and have not reported.
    jobs_out: usize,
    pub(super) repair: Option<(Arc<Repair>, Walk)>,
    search_party: Option<SearchParty>,
    /// Changes of the graph when lost slots were last looked for.
    searched_at: u64,
    /// Vectors linked since the usual effort was last measured; never before this process did.
    linked_since: Option<usize>,
    measurement: Option<Measurement>,
}

impl Upkeep {
    /// Before anything is done.
    pub(super) fn begin(has_to_load: bool) -> Self {
        Self { has_to_load, ..Self::default() }
    }
}

/// Of the usual effort: slots not looked at yet, how many are not done, and what was found so far.
#[derive(Debug)]
struct Measurement {
    slots: Vec<u32>,
    left: usize,
    measured: Measured,
}

/// All slots there were when it began, piece by piece.
#[derive(Debug)]
pub(super) struct Walk {
    next: usize,
    done: usize,
    end: usize,
}

impl Walk {
    fn over(slots: usize) -> Self {
        Self { next: 0, done: 0, end: slots }
    }

    fn claim(&mut self) -> Option<std::ops::Range<usize>> {
        let piece = self.next..(self.next + WALK_SLOTS).min(self.end);
        self.next = piece.end;
        (!piece.is_empty()).then_some(piece)
    }
}

/// Looks for every slot, and makes those findable that are not. Old links are given up for better ones, and now and then
/// the last that led somewhere is among them.
#[derive(Debug)]
struct SearchParty {
    walk: Walk,
    reached: Reached,
    found: usize,
    /// A party that found some is followed by another, but not for ever.
    parties_left: usize,
}

/// By slot, whether links led there when a search party set out.
#[derive(Debug)]
enum Reached {
    Unknown,
    /// A job is out that finds it.
    Sought,
    Known(Arc<[bool]>),
}

/// Work on a graph that takes no lock which writes or searches wait for, slot by slot, and what came of it so far.
#[derive(Debug)]
enum Piece {
    Populate(std::ops::Range<usize>),
    Link(Vec<(u32, bool)>),
    /// Of so many slots.
    Repair(Arc<Repair>, usize),
    /// Some nanoseconds a link, all of them.
    Reach,
    /// Of so many slots; those that were lost.
    Find(Arc<[bool]>, usize, usize),
    /// Of so many slots; what searches near them find.
    Measure(usize, Measured),
}

/// Hits found by each effort but the largest, and by that.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Measured {
    found: [usize; plan::EFFORTS.len() - 1],
    of: usize,
}

impl Measured {
    fn add(&mut self, more: Self) {
        self.found.iter_mut().zip(more.found).for_each(|(sum, found)| *sum += found);
        self.of += more.of;
    }
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Done {
    /// Memory, made ready.
    Populated,
    /// Slots, and whether each was linked.
    Linked(Vec<(u32, bool)>),
    /// So many slots looked at.
    Repaired(usize),
    /// Whether links lead to each slot.
    Reached(Vec<bool>),
    /// So many slots looked at, and found to be lost.
    Found(usize, usize),
    /// So many slots looked at, and what searches near them found.
    Measured(usize, Measured),
}

/// A piece of work for a linker. While it is out, its number keeps the slots it may meet from being reused.
#[derive(Debug)]
pub struct Job {
    collection: Arc<SharedCollection>,
    graph: Arc<Graph>,
    number: SearchNumber,
    piece: Piece,
    /// Slots it has yet to come to, last first.
    left: Vec<u32>,
}

impl Job {
    /// Whether it makes memory ready, which links wait for.
    pub fn is_populating(&self) -> bool {
        matches!(self.piece, Piece::Populate(_))
    }

    /// Whether it is a few slots that links wait for, or their turn.
    fn is_short(&self) -> bool {
        matches!(self.piece, Piece::Link(_) | Piece::Repair(..) | Piece::Find(..))
    }

    /// Does it and reports. Where it is to be given up ([`Scratch::stopped_by`]), gives what is left of it for another to do.
    pub fn run(mut self, scratch: &mut Scratch) -> Option<Self> {
        let graph = &*self.graph;
        while let Some(slot) = self.left.pop() {
            let is_done = match &mut self.piece {
                // These come without slots.
                Piece::Populate(_) | Piece::Reach => true,
                Piece::Link(linked) => {
                    // A quarter of a millisecond each. Idle priority alone does not have it give way: beside a bulk load the p99 of
                    // sixteen connections' key writes was 1.0 to 1.2 ms without this, 0.84 to 1.05 with it.
                    std::thread::yield_now();
                    let is_linked = graph.link(slot, scratch);
                    linked.extend(is_linked.map(|is_linked| (slot, is_linked)));
                    is_linked.is_some()
                }
                Piece::Repair(repair, _) => {
                    if !repair.is_condemned(slot) {
                        graph.repair(slot, |slot| repair.is_condemned(slot), scratch);
                    }
                    true
                }
                Piece::Find(reached, _, lost) if graph.nodes().is_live(slot) => {
                    let was_reached = reached.get(slot as usize).is_none_or(|&reached| reached);
                    let was_lost = graph.find_again(slot, was_reached, scratch);
                    *lost += usize::from(was_lost == Some(true));
                    was_lost.is_some()
                }
                Piece::Find(..) => true,
                Piece::Measure(_, measured) if graph.nodes().is_live(slot) => {
                    // A millisecond each; as with links.
                    std::thread::yield_now();
                    let found = graph.found_by_effort(slot, scratch);
                    if let Some((found, of)) = found {
                        measured.add(Measured { found, of });
                    }
                    found.is_some()
                }
                Piece::Measure(..) => true,
            };
            if is_done {
                self.collection.slots_done.fetch_add(1, Ordering::Relaxed);
            } else {
                self.left.push(slot);
            }
            if !self.left.is_empty() && scratch.must_stop() {
                return Some(self);
            }
        }
        let done = match self.piece {
            Piece::Populate(slots) => {
                graph.nodes().populate(slots);
                Done::Populated
            }
            Piece::Link(linked) => Done::Linked(linked),
            Piece::Repair(_, count) => Done::Repaired(count),
            Piece::Reach => match graph.reach(|| {
                // A linker that comes this far has a core.
                self.collection.slots_done.fetch_add(1, Ordering::Relaxed);
                scratch.must_stop()
            }) {
                Some(reached) => Done::Reached(reached),
                None => return Some(self),
            },
            Piece::Find(_, count, lost) => Done::Found(count, lost),
            Piece::Measure(count, measured) => Done::Measured(count, measured),
        };
        self.collection.jobs_out.fetch_sub(1, Ordering::Relaxed);
        self.collection.done.lock().push((self.number, done));
        self.collection.wake();
        None
    }
}

impl SharedCollection {
    /// Does what is due, on the upkeep thread, and asks to be called again if there may be more.
    pub fn work(&self) {
        self.is_queued.store(false, Ordering::Release);
        if self.keep_up() {
            self.wake();
        }
    }

    /// Does a linker's job that this collection's tail waits for, if there is one.
    pub fn help(&self) {
        thread_local! {
            static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default();
        }
        let will_do = |job: &Job| job.is_short() && std::ptr::eq(&*job.collection, self);
        if let Some(job) = self.background.take_job(will_do) {
            SCRATCH.with_borrow_mut(|scratch| job.run(scratch));
        }
    }

    /// Slots that jobs have come to the end of: whether linkers get on. `None` while they have nothing to do.
    pub fn slots_done(&self) -> Option<u64> {
        (self.jobs_out.load(Ordering::Relaxed) > 0).then(|| self.slots_done.load(Ordering::Relaxed))
    }

    /// Does what is due, or a linker's job; false when there is neither. For tests and measurements without threads.
    pub fn work_once(&self, scratch: &mut Scratch) -> bool {
        if self.keep_up() {
            return true;
        }
        let job = self.background.take_job(|_| true);
        let has_job = job.is_some();
        job.and_then(|job| job.run(scratch));
        has_job
    }

    fn keep_up(&self) -> bool {
        let Some(mut upkeep) = self.upkeep.try_lock() else { return false };
        let has_taken = self.take_results(&mut upkeep);
        let has_moved = self.move_slots(&mut upkeep);
        self.hand_out(&mut upkeep) || has_moved || has_taken
    }

    fn take_results(&self, upkeep: &mut Upkeep) -> bool {
        let done = std::mem::take(&mut *self.done.lock());
        let has_some = !done.is_empty();
        let mut linked = Vec::new();
        for (number, done) in done {
            upkeep.jobs_out -= 1;
            self.end_search(number);
            match done {
                Done::Populated => {}
                Done::Linked(slots) => linked.extend(slots),
                Done::Repaired(count) => {
                    if let Some((repair, walk)) = &mut upkeep.repair {
                        walk.done += count;
                        if walk.done == walk.end {
                            self.end_repair(repair);
                            upkeep.repair = None;
                        }
                    }
                }
                Done::Reached(reached) => {
                    if let Some(party) = &mut upkeep.search_party {
                        party.reached = Reached::Known(reached.into());
                    }
                }
                Done::Found(count, lost) => {
                    if let Some(party) = &mut upkeep.search_party {
                        party.walk.done += count;
                        party.found += lost;
                        if party.walk.done == party.walk.end {
                            let (found, left) = (party.found, party.parties_left);
                            tracing::debug!(found, "looked for lost vectors");
                            upkeep.search_party = (found > 0 && left > 1).then(|| self.search_party(left - 1));
                        }
                    }
                }
                Done::Measured(count, measured) => {
                    if let Some(measurement) = &mut upkeep.measurement {
                        measurement.measured.add(measured);
                        measurement.left -= count;
                        if measurement.left == 0 {
                            self.end_measurement(measurement.measured);
                            upkeep.measurement = None;
                        }
                    }
                }
            }
        }
        upkeep.linked_since = upkeep.linked_since.map(|since| since + linked.len());
        if !linked.is_empty() {
            self.write(|inner, horizon| inner.finish_links(&linked, horizon));
        }
        has_some
    }

    /// Makes rows' memory ready for what a bulk load writes next. Getting it from the kernel and clearing it was a third of what
    /// the writer did, and key writes waited for it.
    fn populate(&self, upkeep: &mut Upkeep) -> bool {
        let row_bytes = self.spec.dim * size_of::<f32>();
        let piece = POPULATED_BYTES.div_ceil(row_bytes);
        let (counts, slots, capacity) = self.read(|c| (c.graph_counts(), c.slot_count(), c.capacity()));
        let ahead = (AHEAD_BYTES / row_bytes).min(slots / AHEAD_PART);
        let start = upkeep.populated.max(slots);
        let populated = start..start + piece;
        if !counts.is_full || populated.end > slots + ahead {
            return false;
        }
        if populated.end > capacity && self.reserve(ahead).is_err() {
            // Whoever needs the room is told why there is none.
            return false;
        }
        self.read(|c| c.populate(populated.clone()));
        upkeep.populated = populated.end;
        true
    }

    /// Slots whose memory in the graph is to be made ready for a bulk load. A linker's work: it comes in huge pages, and one that
    /// has to come from a host takes 5 ms to clear: at idle priority the core is given away meanwhile.
    fn graph_to_populate(&self, upkeep: &mut Upkeep, graph: &Graph) -> Option<std::ops::Range<usize>> {
        let (counts, slots) = self.read(|c| (c.graph_counts(), c.slot_count()));
        let ahead = (AHEAD_BYTES / graph.nodes().bytes_of(1)).min(slots / AHEAD_PART);
        let start = upkeep.graph_populated.max(slots);
        let end = (start + ahead / 4).min(graph.nodes().capacity());
        if !counts.is_full || start >= end || end > slots + ahead {
            return None;
        }
        upkeep.graph_populated = end;
        Some(start..end)
    }

    /// Work under the collection's lock, a slice of it.
    fn move_slots(&self, upkeep: &mut Upkeep) -> bool {
        if upkeep.has_to_load {
            upkeep.has_to_load = false;
            self.load_graph();
            return true;
        }
        let (has_graph, vectors, counts) = self.read(|c| (c.graph().is_some(), c.len(), c.graph_counts()));
        if !has_graph && vectors >= self.background.graph_from {
            let graph = Arc::new(Graph::new(self.spec.metric, self.spec.dim, self.centre()));
            if let Err(error) = self.write(|inner, _| inner.start_graph(graph)) {
                tracing::warn!(%error, "no memory for a graph; searches stay exact");
                return false;
            }
            return true;
        }
        let has_populated = self.populate(upkeep);
        if counts.uncoded > 0 {
            self.write(|inner, _| inner.code_some());
            return true;
        }
        if has_graph {
            self.tail_limit.fetch_min(counts.tail.max(TAIL_MAX), Ordering::Relaxed);
        }
        let changes = counts.changes - upkeep.searched_at;
        if upkeep.search_party.is_none() && counts.tail == 0 && changes > counts.linked as u64 / SEARCH_PARTY_PART {
            upkeep.searched_at = counts.changes;
            upkeep.search_party = Some(self.search_party(SEARCH_PARTIES));
        }
        let has_moved = self.read(Collection::has_upkeep)
            && self.write(|inner, horizon| {
                inner.forget_replaced(horizon);
                let has_more = inner.index_some();
                inner.reclaim(RECLAIM_SLOTS, horizon) || has_more
            });
        has_populated || has_moved
    }

    /// Gives linkers what they can do, a little ahead. A repair begins when no job is out: whoever chose a link to a slot
    /// before it was condemned has then made it.
    fn hand_out(&self, upkeep: &mut Upkeep) -> bool {
        let Some(graph) = self.read(|c| c.graph().cloned()) else { return false };
        let counts = self.read(Collection::graph_counts);
        if upkeep.repair.is_none() && counts.buried >= REPAIR_FROM.max(counts.linked / REPAIR_PART) {
            if upkeep.jobs_out > 0 {
                return false;
            }
            upkeep.repair = Some(self.begin_repair(&graph));
        }
        let mut has_handed_out = false;
        while upkeep.jobs_out < JOBS_OUT {
            // Before the slots are looked at: from here on none that is live now is reused.
            let number = self.begin();
            let Some((piece, mut left)) = self.next_piece(upkeep, &graph) else {
                self.end_search(number);
                break;
            };
            upkeep.jobs_out += 1;
            self.jobs_out.fetch_add(1, Ordering::Relaxed);
            has_handed_out = true;
            left.reverse();
            let collection = self.me.upgrade().expect("whoever calls holds it");
            self.background.give_job(Job { collection, graph: Arc::clone(&graph), number, piece, left });
        }
        has_handed_out
    }

    /// The next piece of work, and its slots.
    fn next_piece(&self, upkeep: &mut Upkeep, graph: &Graph) -> Option<(Piece, Vec<u32>)> {
        if let Some(slots) = self.graph_to_populate(upkeep, graph) {
            return Some((Piece::Populate(slots), Vec::new()));
        }
        if let Some((repair, walk)) = &mut upkeep.repair
            && let Some(piece) = walk.claim()
        {
            let count = piece.len();
            // The cast: slots are counted in u32.
            return Some((Piece::Repair(Arc::clone(repair), count), piece.map(|slot| slot as u32).collect()));
        }
        if let Some(slots) = self.to_measure(upkeep) {
            return Some((Piece::Measure(slots.len(), Measured::default()), slots));
        }
        let slots = self.inner.write().claim_links(LINK_SLOTS);
        if !slots.is_empty() {
            return Some((Piece::Link(Vec::with_capacity(slots.len())), slots));
        }
        let party = upkeep.search_party.as_mut()?;
        match &party.reached {
            Reached::Unknown => {
                party.reached = Reached::Sought;
                Some((Piece::Reach, Vec::new()))
            }
            Reached::Sought => None,
            Reached::Known(reached) => {
                let piece = party.walk.claim()?;
                let slots = self.read(|c| c.linked_slots(piece.clone())).into_iter().map(|(slot, _)| slot).collect();
                Some((Piece::Find(Arc::clone(reached), piece.len(), 0), slots))
            }
        }
    }

    /// Slots to measure the usual effort by, when it is time.
    fn to_measure(&self, upkeep: &mut Upkeep) -> Option<Vec<u32>> {
        if upkeep.measurement.is_none() {
            let counts = self.read(Collection::graph_counts);
            let is_growing = counts.tail > counts.linked / WAITING_PART;
            let part = counts.linked / MEASURED_PART * if is_growing { MEASURED_PART - 1 } else { 1 };
            // Where searches look at all vectors anyway, there is nothing to measure.
            let is_walked = plan::choose(plan::EF_DEFAULT, counts.linked, counts.linked) == Way::Graph;
            if !is_walked || upkeep.linked_since.is_some_and(|since| since <= part) {
                return None;
            }
            let slots = self.read(|c| c.sample_linked(plan::MEASURED_VECTORS));
            if slots.is_empty() {
                return None;
            }
            upkeep.linked_since = Some(0);
            upkeep.measurement = Some(Measurement { left: slots.len(), slots, measured: Measured::default() });
        }
        let slots = &mut upkeep.measurement.as_mut()?.slots;
        let slots = slots.split_off(slots.len().saturating_sub(MEASURED_SLOTS));
        (!slots.is_empty()).then_some(slots)
    }

    fn end_measurement(&self, Measured { found, of }: Measured) {
        if of == 0 {
            // All of them have gone meanwhile.
            return;
        }
        let present = self.usual_effort.load(Ordering::Relaxed);
        let usual = plan::usual_effort(&found, of, present);
        tracing::debug!(?found, of, usual, "measured what searches find");
        self.usual_effort.store(usual, Ordering::Relaxed);
    }

    fn begin_repair(&self, graph: &Graph) -> (Arc<Repair>, Walk) {
        let (condemned, slots) = {
            let mut inner = self.inner.write();
            (inner.take_buried(), inner.slot_count())
        };
        graph.choose_entries(&self.linked_slots());
        (Arc::new(Repair::new(condemned, slots)), Walk::over(slots))
    }

    fn end_repair(&self, repair: &Repair) {
        for slots in repair.slots.chunks(REPAIRED_SLOTS) {
            self.write(|inner, horizon| inner.finish_repair(slots, horizon));
        }
    }

    /// About where the vectors lie, for the bytes of a graph of them: the mean of some, where distances allow for it; else empty.
    /// The rows are read a few at a time, as they may have to come from disk.
    pub(super) fn centre(&self) -> Vec<f32> {
        if self.spec.metric != Metric::L2 {
            return Vec::new();
        }
        let slots = self.read(Collection::sample);
        let mut sums = vec![0f64; self.spec.dim];
        for some in slots.chunks(CENTRE_ROWS) {
            self.read(|c| c.add_rows(some, &mut sums));
        }
        // The cast: a mean of numbers that fit fits. A slot that changed hands meanwhile lies where others do.
        sums.into_iter().map(|sum| (sum / slots.len().max(1) as f64) as f32).collect()
    }

    fn search_party(&self, parties_left: usize) -> SearchParty {
        let walk = Walk::over(self.read(Collection::slot_count));
        SearchParty { walk, reached: Reached::Unknown, found: 0, parties_left }
    }

    /// Does all background work there is, on this thread, and looks for lost vectors whether it is time or not: for tests and
    /// `kiss-vdb check`.
    pub fn settle(&self) {
        let mut scratch = Scratch::default();
        while self.work_once(&mut scratch) {}
        let party = self.search_party(SEARCH_PARTIES);
        self.upkeep.lock().search_party = Some(party);
        while self.work_once(&mut scratch) {}
    }
}
