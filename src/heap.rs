//! The allocator: mimalloc. Allocations here are small, many and cross threads (a value is allocated by a request and freed by the
//! writer): measured faster and leaner than the system's allocator on that.
//!
//! Called directly rather than through the crate `mimalloc`, which asks for an alignment with every call: that path searches for a
//! block that happens to fit and takes a larger one where the first does not. A small durable write allocates two dozen times,
//! and this was a thirtieth of its instructions.

use crate::turns::{self, Turn};
use libmimalloc_sys::{
    mi_collect, mi_free, mi_malloc, mi_malloc_aligned, mi_option_set, mi_option_t, mi_realloc, mi_realloc_aligned,
    mi_thread_init, mi_zalloc, mi_zalloc_aligned,
};
use std::alloc::{GlobalAlloc, Layout};
use std::time::Duration;

/// How every block is aligned that is at least so large; smaller ones are aligned to their size (`MI_MAX_ALIGN_SIZE`).
const ALIGNED: usize = 16;
/// mimalloc's option of how many milliseconds free memory is kept; the crate has no name for it.
const PURGE_DELAY: mi_option_t = 15;
/// A day.
const LONG_MS: libc::c_long = 86_400_000;
/// How often memory that is free goes back to the system.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct Heap;

/// Whether any block of that size is aligned as wanted.
fn is_aligned(size: usize, layout: Layout) -> bool {
    layout.align() <= ALIGNED && layout.align() <= size
}

// SAFETY: mimalloc's blocks are of the size asked for, aligned as `is_aligned` says or as asked for, and freed by it alone, by any
// thread; none of its functions unwinds.
unsafe impl GlobalAlloc for Heap {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_aligned(layout.size(), layout) {
            // SAFETY: has no requirements.
            return unsafe { mi_malloc(layout.size()) }.cast();
        }
        // SAFETY: a layout's alignment is a power of two.
        unsafe { mi_malloc_aligned(layout.size(), layout.align()) }.cast()
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_aligned(layout.size(), layout) {
            // SAFETY: has no requirements.
            return unsafe { mi_zalloc(layout.size()) }.cast();
        }
        // SAFETY: a layout's alignment is a power of two.
        unsafe { mi_zalloc_aligned(layout.size(), layout.align()) }.cast()
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, _: Layout) {
        // SAFETY: the caller's block is one of ours.
        unsafe { mi_free(block.cast()) };
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if is_aligned(size, layout) {
            // SAFETY: the caller's block is one of ours.
            return unsafe { mi_realloc(block.cast(), size) }.cast();
        }
        // SAFETY: the same, and a layout's alignment is a power of two.
        unsafe { mi_realloc_aligned(block.cast(), size, layout.align()) }.cast()
    }
}

/// Gives memory back: what this thread has free, and whatever is free that belongs to no thread. The allocator does so by itself only
/// while memory comes and goes; after a recovery or a bulk load, which use and free much, nothing may come for long.
pub fn give_back() {
    // SAFETY: touches what is not allocated only, and may be called at any time by any thread.
    unsafe { mi_collect(true) };
}

/// From now on memory goes back on a thread of its own, and until the end on no other: tens of megabytes take milliseconds, and nobody
/// is to wait for it. By itself the allocator has whoever frees a page do it, now and then: also the writer. To be called before
/// there are other threads.
pub fn keep_giving_back() -> std::io::Result<()> {
    // SAFETY: the option takes any number, and nobody else reads it now.
    unsafe { mi_option_set(PURGE_DELAY, LONG_MS) };
    let run = || {
        // What is asked of a thread that has never allocated is not done.
        // SAFETY: may be called at any time.
        unsafe { mi_thread_init() };
        turns::take(Turn::Behind);
        loop {
            std::thread::sleep(GIVE_BACK_EVERY);
            give_back();
        }
    };
    std::thread::Builder::new().name("memory".into()).spawn(run).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a page is in memory.
    fn is_resident(page: usize) -> bool {
        let mut is_resident = 0;
        // SAFETY: the call looks at no memory of ours but the byte that it writes.
        let result = unsafe { libc::mincore(page as *mut _, 1, &raw mut is_resident) };
        result == 0 && is_resident & 1 == 1
    }

    #[test]
    fn free_memory_goes_back_by_itself() {
        const BYTES: usize = 1 << 20;
        const PAGE: usize = 4096;
        // A second is what mimalloc has for the option that is meant, and for no other. Nobody else sets it.
        // SAFETY: reads a number.
        assert_eq!(unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) }, 1000);
        keep_giving_back().unwrap();
        let layout = Layout::from_size_align(BYTES, PAGE).unwrap();
        let in_a_thread = move || {
            // SAFETY: the size is not zero; each block is written within its size and freed once.
            let blocks: Vec<usize> = (0..64)
                .map(|_| unsafe {
                    let block = Heap.alloc(layout);
                    block.write_bytes(1, BYTES);
                    block.expose_provenance()
                })
                .collect();
            assert!(blocks.iter().all(|block| is_resident(*block)));
            for block in &blocks {
                // SAFETY: as above.
                unsafe { Heap.dealloc(std::ptr::with_exposed_provenance_mut(*block), layout) };
            }
            blocks
        };
        let blocks = std::thread::spawn(in_a_thread).join().unwrap();
        let began = std::time::Instant::now();
        // Other tests may have taken some of it.
        while blocks.iter().filter(|block| is_resident(**block)).count() > blocks.len() / 2 {
            assert!(began.elapsed() < Duration::from_secs(60), "still there");
            std::thread::sleep(GIVE_BACK_EVERY / 10);
        }
    }

    #[test]
    fn blocks_are_aligned_as_asked_for_and_keep_their_bytes() {
        for align in [1, 2, 4, 8, 16, 32, 64, 4096] {
            let mut blocks = Vec::new();
            for size in (1..=300).chain([1000, 4096, 70_000, 2 << 20]) {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: the sizes are not zero; each block is resized and freed once, with the layout it has.
                unsafe {
                    let block = Heap.alloc(layout);
                    block.write_bytes(7, size);
                    let zeroed = Heap.alloc_zeroed(layout);
                    let shrunk = Heap.alloc(layout);
                    shrunk.write_bytes(9, size);
                    assert!([block, zeroed, shrunk].iter().all(|block| block.addr() % align == 0), "{size} by {align}");
                    let larger = Heap.realloc(block, layout, 2 * size);
                    let smaller = Heap.realloc(shrunk, layout, size.div_ceil(3));
                    assert!([larger, smaller].iter().all(|block| block.addr() % align == 0), "{size} by {align}");
                    assert!(std::slice::from_raw_parts(larger, size).iter().all(|byte| *byte == 7));
                    assert!(std::slice::from_raw_parts(smaller, size.div_ceil(3)).iter().all(|byte| *byte == 9));
                    assert!(std::slice::from_raw_parts(zeroed, size).iter().all(|byte| *byte == 0));
                    blocks.push((zeroed, layout));
                    blocks.push((larger, Layout::from_size_align(2 * size, align).unwrap()));
                    blocks.push((smaller, Layout::from_size_align(size.div_ceil(3), align).unwrap()));
                }
            }
            // SAFETY: as above.
            blocks.into_iter().for_each(|(block, layout)| unsafe { Heap.dealloc(block, layout) });
        }
    }
}
