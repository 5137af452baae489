//! What the graph keeps of each slot: a row of one byte for each number, the figures that go with it, when the slot
//! was born and died, and its links. Addressed by slot, never moved, in anonymous memory.
//!
//! The high halves of a row's bytes take `dim / 2` bytes in whole cache lines; the low halves, which a search wants of few rows,
//! `dim / 2` bytes elsewhere, or below [`ROUGH_DIM`] numbers, where it wants all, behind the high ones; a trailer of
//! [`TRAILER_BYTES`] lies where the last of these lines has room, else elsewhere, two to a line; links take [`LINKS_BYTES`]. All
//! lie in chunks of [`CHUNK_SLOTS`] slots that are mapped when first needed. A chunk that fills half a huge page or more asks for such:
//! a search reads a few hundred rows in no order, and with small pages it would wait for the page table as long as for the row.
//!
//! Who may write what, and when
//! - A row is written by [`Nodes::write`] while no link leads to its slot and no search may know it: readers need no
//!   lock. That is the caller's promise, and why `write` is `unsafe`.
//! - Links and the revisions in the trailer are atomic: they change while searches read them.
//!
//! `unsafe` stands here and where `write` is called; ARCHITECTURE.md lists where else.

use super::distance::{half_bytes, kernels, prefetch};
use crate::error::Error;
use crate::revision::Revision;
use memmap2::{MmapOptions, MmapRaw};
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Slots in a chunk. A chunk of links is 12 MiB, and memory that is not touched costs nothing.
pub const CHUNK_SLOTS: usize = 1 << 16;
/// Chunks a collection may have: 2^28 vectors.
const CHUNKS_MAX: usize = 1 << 12;
/// From so many numbers on rows are longer than three cache lines, and the rounding of each evens out: walks and scans go by
/// the high halves of rows first.
pub const ROUGH_DIM: usize = 128;
/// A huge page. A chunk that room for so much was asked for takes such: a small graph would take four for a tenth of their bytes.
/// Room is asked for twice what is needed, so that half of one is filled then.
const HUGE_BYTES: usize = 2 << 20;
/// High halves and links start at cache lines.
const LINE_BYTES: usize = 64;
/// Most links of a slot: with their count they fill [`LINKS_BYTES`].
pub const LINKS_MAX: usize = LINKS_BYTES / size_of::<u32>() - 1;
/// Count and links of a slot: whole cache lines.
pub const LINKS_BYTES: usize = 192;
/// Figures and revisions that go with a row.
const TRAILER_BYTES: usize = size_of::<Trailer>();

/// The figures that make a row's bytes comparable; see `codes.rs`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Figures {
    /// What one step of the bytes is worth.
    pub scale: f32,
    /// Squared length of what the bytes stand for.
    pub square: f32,
    /// Squared length of what their high halves are off by.
    pub rough_error: f32,
    /// Squared length of what the high halves stand for, less that error: with it the distances they tell are right on average.
    pub rough_square: f32,
}

#[repr(C)]
struct Trailer {
    born: AtomicU64,
    died: AtomicU64,
    figures: Figures,
}

/// The memory. All methods take `&self`; see the module's text for who may call what.
#[derive(Debug)]
pub struct Nodes {
    dim: usize,
    /// Where in its row a trailer lies, unless trailers lie apart.
    trailer_at: usize,
    /// Bytes from one trailer to the next where they lie apart, else 0.
    trailer_stride: usize,
    /// Bytes from one row's high halves to the next.
    stride: usize,
    /// Bytes from one row's low halves to the next where they lie apart, else 0.
    low_stride: usize,
    highs: Box<[OnceLock<MmapRaw>]>,
    lows: Box<[OnceLock<MmapRaw>]>,
    trailers: Box<[OnceLock<MmapRaw>]>,
    links: Box<[OnceLock<MmapRaw>]>,
    /// Slots there is room for.
    capacity: AtomicUsize,
    /// Slots that room was asked for, at most.
    reserved: AtomicUsize,
}

impl Nodes {
    /// Nothing is allocated yet.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        let half = half_bytes(dim);
        let (bytes, low_stride) = if dim < ROUGH_DIM { (2 * half, 0) } else { (half, half) };
        let trailer_at = bytes.next_multiple_of(align_of::<Trailer>());
        let stride = bytes.next_multiple_of(LINE_BYTES);
        let trailer_stride = if trailer_at + TRAILER_BYTES <= stride { 0 } else { TRAILER_BYTES };
        let table = |stride: usize| (0..CHUNKS_MAX).filter(|_| stride > 0).map(|_| OnceLock::new()).collect();
        let [highs, lows, trailers, links] = [stride, low_stride, trailer_stride, LINKS_BYTES].map(table);
        let (capacity, reserved) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { dim, trailer_at, trailer_stride, stride, low_stride, highs, lows, trailers, links, capacity, reserved }
    }

    /// Bytes that so many slots take, in whole pages.
    #[must_use]
    pub fn bytes_of(&self, slots: usize) -> usize {
        let last = slots % CHUNK_SLOTS;
        let of_table = |(_, bytes): (_, usize)| {
            let page = if last * bytes < HUGE_BYTES / 2 { 1 } else { HUGE_BYTES };
            (slots - last) * bytes + (last * bytes).next_multiple_of(page).min(CHUNK_SLOTS * bytes)
        };
        self.tables().map(of_table).sum()
    }

    /// Bytes of where the memory is noted, however many slots there are.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        self.tables().map(|(chunks, _)| size_of_val(chunks)).sum()
    }

    /// Those in use, each with the bytes that a slot takes there.
    fn tables(&self) -> impl Iterator<Item = (&[OnceLock<MmapRaw>], usize)> {
        let tables: [(&[_], _); 4] = [
            (&self.highs, self.stride),
            (&self.lows, self.low_stride),
            (&self.trailers, self.trailer_stride),
            (&self.links, LINKS_BYTES),
        ];
        tables.into_iter().filter(|&(_, bytes)| bytes > 0)
    }

    /// Makes room for slots below `slots`. Must be called before one of them is named to any other method.
    pub fn reserve(&self, slots: usize) -> Result<(), Error> {
        let no_room = |detail: String| {
            Error::io("cannot get memory for", Path::new("the vector index"))(std::io::Error::other(detail))
        };
        let before = self.reserved.load(Ordering::Acquire);
        if slots <= before {
            return Ok(());
        }
        for chunk in before.saturating_sub(1) / CHUNK_SLOTS..slots.div_ceil(CHUNK_SLOTS) {
            if chunk >= CHUNKS_MAX {
                return Err(no_room(format!("a collection holds at most {} vectors", CHUNKS_MAX * CHUNK_SLOTS)));
            }
            let room = (slots - chunk * CHUNK_SLOTS).min(CHUNK_SLOTS);
            for (table, bytes) in self.tables() {
                if table[chunk].get().is_none() {
                    let map = MmapOptions::new().len(bytes * CHUNK_SLOTS).map_anon();
                    // Another thread may have been first; then this one is unmapped again.
                    drop(table[chunk].set(map.map_err(|e| no_room(e.to_string()))?.into()));
                }
                if room * bytes >= HUGE_BYTES {
                    ask_for_huge_pages(table[chunk].get().expect("it was just mapped"));
                }
            }
            self.capacity.fetch_max((chunk + 1) * CHUNK_SLOTS, Ordering::Release);
        }
        self.reserved.fetch_max(slots, Ordering::Release);
        Ok(())
    }

    /// Has the memory of some slots given to this process now, rather than when it is first written.
    pub fn populate(&self, mut slots: Range<usize>) {
        while !slots.is_empty() {
            let (chunk, first) = (slots.start / CHUNK_SLOTS, slots.start % CHUNK_SLOTS);
            let count = slots.len().min(CHUNK_SLOTS - first);
            for (table, bytes) in self.tables() {
                let Some(map) = table.get(chunk).and_then(OnceLock::get) else { return };
                populate(|advice| map.advise_range(advice, first * bytes, count * bytes));
            }
            slots.start += count;
        }
    }

    /// Slots there is room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity.load(Ordering::Acquire)
    }

    #[inline]
    fn place(table: &[OnceLock<MmapRaw>], slot: u32, bytes: usize) -> *mut u8 {
        let slot = slot as usize;
        let chunk = table[slot / CHUNK_SLOTS].get().expect("room is reserved before a slot is used");
        // In bounds: a chunk has CHUNK_SLOTS places of `bytes`.
        chunk.as_mut_ptr().wrapping_add(slot % CHUNK_SLOTS * bytes)
    }

    /// Numbers in a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The high halves of a row's bytes.
    #[inline]
    #[must_use]
    pub fn high(&self, slot: u32) -> &[u8] {
        let high = Self::place(&self.highs, slot, self.stride);
        // SAFETY: `place` is the start of `stride` mapped bytes, more than these, that live as long as `self`; whoever writes them
        // has promised that nobody reads them meanwhile (`Nodes::write`).
        unsafe { std::slice::from_raw_parts(high, half_bytes(self.dim)) }
    }

    /// The low halves of a row's bytes.
    #[inline]
    #[must_use]
    pub fn low(&self, slot: u32) -> &[u8] {
        // SAFETY: so many bytes are mapped there; the rest as for `high`.
        unsafe { std::slice::from_raw_parts(self.low_place(slot), half_bytes(self.dim)) }
    }

    #[inline]
    fn low_place(&self, slot: u32) -> *mut u8 {
        if self.low_stride == 0 {
            Self::place(&self.highs, slot, self.stride).wrapping_add(half_bytes(self.dim))
        } else {
            Self::place(&self.lows, slot, self.low_stride)
        }
    }

    #[inline]
    fn trailer(&self, slot: u32) -> *mut Trailer {
        let trailer = if self.trailer_stride == 0 {
            Self::place(&self.highs, slot, self.stride).wrapping_add(self.trailer_at)
        } else {
            Self::place(&self.trailers, slot, self.trailer_stride)
        };
        // Aligned: rows start at cache lines and chunks at pages; where a trailer lies is a multiple of its alignment.
        #[expect(clippy::cast_ptr_alignment, reason = "see above")]
        let trailer = trailer.cast::<Trailer>();
        trailer
    }

    /// The figures of a row.
    #[inline]
    #[must_use]
    pub fn figures(&self, slot: u32) -> Figures {
        // SAFETY: mapped and aligned (see `trailer`); written under the same promise as the bytes.
        unsafe { (&raw const (*self.trailer(slot)).figures).read() }
    }

    fn revisions(&self, slot: u32) -> (&AtomicU64, &AtomicU64) {
        let trailer = self.trailer(slot);
        // SAFETY: mapped and aligned (see `trailer`); both are only ever accessed as atomics.
        unsafe { (&(*trailer).born, &(*trailer).died) }
    }

    /// Whether a slot is visible at a revision.
    #[must_use]
    pub fn is_visible(&self, slot: u32, at: Revision) -> bool {
        let (born, died) = self.revisions(slot);
        born.load(Ordering::Relaxed) <= at.0 && at.0 < died.load(Ordering::Relaxed)
    }

    /// Whether a slot has not died.
    #[must_use]
    pub fn is_live(&self, slot: u32) -> bool {
        self.revisions(slot).1.load(Ordering::Relaxed) == u64::MAX
    }

    /// The revision a slot's vector was written at.
    #[must_use]
    pub fn born(&self, slot: u32) -> Revision {
        Revision(self.revisions(slot).0.load(Ordering::Relaxed))
    }

    /// From `at` on the slot is not visible any more.
    pub fn bury(&self, slot: u32, at: Revision) {
        self.revisions(slot).1.store(at.0, Ordering::Relaxed);
    }

    /// Fills a slot with the bytes of a row and its figures.
    ///
    /// # Safety
    /// No link leads to the slot, it is in no list a search or linker has or will get before this returns, and none that
    /// could have learned of an earlier tenant is still running.
    pub unsafe fn write(&self, slot: u32, born: Revision, died: Revision, code: &[u8], figures: Figures) {
        assert_eq!(code.len(), self.dim);
        let (high, low) = (Self::place(&self.highs, slot, self.stride), self.low_place(slot));
        // SAFETY: mapped (see `high` and `low`), and nobody else looks at them: this function's contract.
        let (high, low) = unsafe {
            let half = |at| std::slice::from_raw_parts_mut(at, half_bytes(self.dim));
            (half(high), half(low))
        };
        (kernels().split)(code, high, low);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.trailer(slot)).figures).write(figures) };
        let (b, d) = self.revisions(slot);
        b.store(born.0, Ordering::Relaxed);
        d.store(died.0, Ordering::Relaxed);
    }

    /// Count and places of a slot's links.
    fn links(&self, slot: u32) -> &[AtomicU32; LINKS_MAX + 1] {
        let start = Self::place(&self.links, slot, LINKS_BYTES);
        // SAFETY: LINKS_BYTES mapped bytes at a cache line (chunks begin at pages), only ever accessed as atomics; zeroed memory is no links.
        unsafe { &*start.cast() }
    }

    /// Where a slot's links lead. While another thread changes them the list may mix old and new ones; each was a link
    /// of this slot at some time. The acquire pairs with the release in [`Nodes::set_links`]: who sees a link sees the
    /// row it leads to.
    pub fn neighbours(&self, slot: u32) -> impl ExactSizeIterator<Item = u32> + '_ {
        let (count, places) = self.links(slot).split_first().expect("the count is always there");
        let count = (count.load(Ordering::Acquire) as usize).min(LINKS_MAX);
        places[..count].iter().map(|place| place.load(Ordering::Acquire))
    }

    /// Replaces a slot's links. One thread at a time for each slot.
    pub fn set_links(&self, slot: u32, to: &[u32]) {
        let (count, places) = self.links(slot).split_first().expect("the count is always there");
        for (place, &to) in places.iter().zip(to) {
            place.store(to, Ordering::Release);
        }
        count.store(to.len().min(LINKS_MAX) as u32, Ordering::Release);
    }

    /// Appends a link where there is room. One thread at a time for each slot.
    pub fn push_link(&self, slot: u32, to: u32) -> bool {
        let (count, places) = self.links(slot).split_first().expect("the count is always there");
        let at = count.load(Ordering::Relaxed) as usize;
        if at >= LINKS_MAX {
            return false;
        }
        places[at].store(to, Ordering::Release);
        count.store(at as u32 + 1, Ordering::Release);
        true
    }

    /// Replaces a slot's last link by another and returns where it led. One thread at a time for each slot.
    pub fn replace_last_link(&self, slot: u32, to: u32) -> Option<u32> {
        let (count, places) = self.links(slot).split_first().expect("the count is always there");
        let last = (count.load(Ordering::Relaxed) as usize).min(LINKS_MAX).checked_sub(1)?;
        Some(places[last].swap(to, Ordering::AcqRel))
    }

    /// Asks the processor to fetch the high halves of a row and what goes with it.
    #[inline]
    pub fn prefetch_high(&self, slot: u32) {
        let high = Self::place(&self.highs, slot, self.stride);
        for line in (0..self.stride).step_by(LINE_BYTES) {
            prefetch(high.wrapping_add(line));
        }
        if self.trailer_stride > 0 {
            prefetch(self.trailer(slot).cast());
        }
    }

    /// Asks the processor to fetch a whole row.
    #[inline]
    pub fn prefetch_row(&self, slot: u32) {
        self.prefetch_high(slot);
        if self.low_stride > 0 {
            let low = self.low_place(slot);
            for at in (0..self.low_stride).step_by(LINE_BYTES) {
                prefetch(low.wrapping_add(at));
            }
        }
    }

    /// Asks the processor to fetch a slot's links.
    #[inline]
    pub fn prefetch_links(&self, slot: u32) {
        let links = Self::place(&self.links, slot, LINKS_BYTES);
        for line in (0..LINKS_BYTES).step_by(LINE_BYTES) {
            prefetch(links.wrapping_add(line));
        }
    }
}

/// A hint: without it, whoever writes first waits for the memory.
pub fn populate(advise: impl FnOnce(memmap2::Advice) -> std::io::Result<()>) {
    #[cfg(target_os = "linux")]
    if let Err(error) = advise(memmap2::Advice::PopulateWrite) {
        tracing::debug!(%error, "memory is not populated ahead");
    }
    #[cfg(not(target_os = "linux"))]
    drop(advise);
}

/// A hint: without huge pages a search is slower, not wrong.
fn ask_for_huge_pages(map: &MmapRaw) {
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, "no huge pages for the vector index");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = map;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_graph_counts_its_bytes_and_a_large_one_its_pages() {
        let nodes = Nodes::new(384);
        let slot = 192 + 192 + TRAILER_BYTES + LINKS_BYTES;
        assert_eq!(nodes.bytes_of(0), 0);
        assert_eq!(nodes.table_bytes(), 4 * CHUNKS_MAX * size_of::<OnceLock<MmapRaw>>());
        assert_eq!(nodes.bytes_of(3000), 3000 * slot);
        // Three parts begin a fourth page, the trailers fill half of their first.
        assert_eq!(nodes.bytes_of(33_000), (3 * 4 + 1) * HUGE_BYTES);
        assert_eq!(nodes.bytes_of(CHUNK_SLOTS), CHUNK_SLOTS * slot);
        assert_eq!(nodes.bytes_of(CHUNK_SLOTS + 10), (CHUNK_SLOTS + 10) * slot);
        // Whose chunks are no whole pages.
        let nodes = Nodes::new(130);
        assert_eq!(nodes.bytes_of(CHUNK_SLOTS - 1), nodes.bytes_of(CHUNK_SLOTS));
    }

    #[test]
    fn room_grows_by_chunks_and_what_was_written_stays() {
        let nodes = Nodes::new(16);
        let code = [0x75; 16];
        for slots in [1, 100, CHUNK_SLOTS, CHUNK_SLOTS - 5, CHUNK_SLOTS + 1] {
            nodes.reserve(slots).unwrap();
            assert!(nodes.capacity() >= slots, "{slots}");
            let last = u32::try_from(slots - 1).unwrap();
            // SAFETY: nobody else has these nodes.
            unsafe { nodes.write(last, Revision(1), Revision(u64::MAX), &code, Figures::default()) };
        }
        assert_eq!(nodes.capacity(), 2 * CHUNK_SLOTS);
        for slot in [0, 99, CHUNK_SLOTS - 6, CHUNK_SLOTS - 1, CHUNK_SLOTS] {
            assert_eq!(nodes.high(u32::try_from(slot).unwrap())[0], 0x77, "{slot}");
        }
    }
}
