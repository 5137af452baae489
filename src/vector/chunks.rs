//! A list that grows without moving what it holds: a `Vec` of a million slots would copy all of them when it doubles, and
//! the writer would stand still meanwhile.

use std::ops::{Index, IndexMut};

/// Items of a full chunk.
const CHUNK_ITEMS: usize = 1 << 12;

/// Items in the order they were pushed.
#[derive(Debug)]
pub struct Chunks<T>(Vec<Vec<T>>);

impl<T> Chunks<T> {
    /// Empty.
    #[must_use]
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// How many there are. All chunks but the last are full.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.last().map_or(0, |last| (self.0.len() - 1) * CHUNK_ITEMS + last.len())
    }

    /// The item at a place, if there is one.
    #[must_use]
    pub fn get(&self, at: usize) -> Option<&T> {
        self.0.get(at / CHUNK_ITEMS)?.get(at % CHUNK_ITEMS)
    }

    /// Appends an item.
    pub fn push(&mut self, item: T) {
        match self.0.last_mut() {
            Some(last) if last.len() < CHUNK_ITEMS => last.push(item),
            first => {
                // A collection of a few vectors shall not pay for a chunk: the first grows, the others are made whole.
                let mut chunk = Vec::with_capacity(if first.is_some() { CHUNK_ITEMS } else { 1 });
                chunk.push(item);
                self.0.push(chunk);
            }
        }
    }

    /// Drops all items from a place on.
    pub fn truncate(&mut self, len: usize) {
        self.0.truncate(len.div_ceil(CHUNK_ITEMS));
        if let Some(last) = self.0.last_mut() {
            last.truncate((len - 1) % CHUNK_ITEMS + 1);
        }
    }

    /// All items in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.0.iter().flatten()
    }
}

impl<T> Index<usize> for Chunks<T> {
    type Output = T;

    #[inline]
    fn index(&self, at: usize) -> &T {
        &self.0[at / CHUNK_ITEMS][at % CHUNK_ITEMS]
    }
}

impl<T> IndexMut<usize> for Chunks<T> {
    #[inline]
    fn index_mut(&mut self, at: usize) -> &mut T {
        &mut self.0[at / CHUNK_ITEMS][at % CHUNK_ITEMS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_vec_across_chunks() {
        for len in [0, 1, 2, CHUNK_ITEMS - 1, CHUNK_ITEMS, CHUNK_ITEMS + 1, 3 * CHUNK_ITEMS] {
            let mut chunks = Chunks::new();
            for item in 0..3 * CHUNK_ITEMS + 5 {
                assert_eq!(chunks.len(), item);
                chunks.push(item);
            }
            chunks[7] = 7;
            chunks.truncate(len);
            assert_eq!(chunks.len(), len);
            assert_eq!(chunks.get(len), None);
            assert!(chunks.iter().copied().eq(0..len));
            assert!((0..len).all(|at| chunks[at] == at && chunks.get(at) == Some(&at)));
            chunks.push(len);
            assert_eq!((chunks.len(), chunks[len]), (len + 1, len));
        }
    }
}
