//! The best n candidates of a scan, in a bounded heap whose root is the worst kept.

use super::{Slot, VectorId};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A scored slot. Ordered so that a better candidate is smaller: higher score first, then lower id.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Higher is better; never NaN.
    pub score: f32,
    /// Breaks ties.
    pub id: VectorId,
    /// Where it is.
    pub slot: Slot,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        other.score.total_cmp(&self.score).then_with(|| self.id.cmp(&other.id))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// Keeps the best `limit` candidates that reach `min_score`. O(log limit) for each one kept, O(1) for each one not.
#[derive(Clone, Debug)]
pub struct TopK {
    heap: BinaryHeap<Candidate>,
    limit: usize,
    floor: f32,
}

impl TopK {
    /// Keeps at most `limit`, none below `min_score`.
    #[must_use]
    pub fn new(limit: usize, min_score: Option<f32>) -> Self {
        Self { heap: BinaryHeap::new(), limit, floor: min_score.unwrap_or(f32::NEG_INFINITY) }
    }

    /// Offers a candidate; its id is looked at only when its score may enter.
    pub fn offer(&mut self, score: f32, slot: Slot, id: &VectorId) {
        if score < self.floor || self.limit == 0 {
            return;
        }
        if self.heap.len() < self.limit {
            self.heap.push(Candidate { score, id: id.clone(), slot });
            return;
        }
        let Some(mut worst) = self.heap.peek_mut() else { return };
        if score > worst.score || (score == worst.score && *id < worst.id) {
            *worst = Candidate { score, id: id.clone(), slot };
        }
    }

    /// Whether a slot is kept already.
    #[must_use]
    pub fn holds(&self, slot: Slot) -> bool {
        self.heap.iter().any(|c| c.slot == slot)
    }

    /// Forgets all but the best, and keeps one from now on.
    pub fn keep_one(&mut self) {
        self.limit = self.limit.min(1);
        let best = self.heap.drain().min();
        self.heap.extend(best);
    }

    /// What is kept, in no order.
    pub fn kept(&self) -> impl ExactSizeIterator<Item = &Candidate> {
        self.heap.iter()
    }

    /// Forgets what scores lower.
    pub fn drop_below(&mut self, min_score: Option<f32>) {
        if let Some(floor) = min_score {
            self.heap.retain(|c| c.score >= floor);
        }
    }

    /// The best one's score and id.
    #[must_use]
    pub fn best(&self) -> Option<&Candidate> {
        self.heap.iter().min()
    }

    /// Takes in what another part of the scan kept.
    pub fn add(&mut self, other: Self) {
        for candidate in other.heap {
            self.offer(candidate.score, candidate.slot, &candidate.id);
        }
    }

    /// Best first.
    #[must_use]
    pub fn into_sorted(self) -> Vec<Candidate> {
        self.heap.into_sorted_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_best_and_breaks_ties_by_id() {
        let mut top = TopK::new(3, Some(0.0));
        for (at, (score, id)) in
            [(0.5, "d"), (0.9, "c"), (0.5, "b"), (-1.0, "x"), (0.5, "a"), (0.1, "e")].into_iter().enumerate()
        {
            top.offer(score, Slot(at as u32), &VectorId::new(id).unwrap());
        }
        let ids: Vec<_> = top.into_sorted().into_iter().map(|c| c.id.as_str().to_owned()).collect();
        assert_eq!(ids, ["c", "a", "b"]);
    }
}
