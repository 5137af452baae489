//! Rows of one byte a number, and how near two of them are.
//!
//! Each row is scaled by its own largest number to -119..=119 and stored with 136 added, because the widest
//! instructions multiply unsigned by signed bytes (scalar quantisation as in LVQ, Aguerrebere et al. 2023, with one
//! scale for each vector). With `scale` and `square` beside the bytes the distance of what two rows stand for
//! is exact; only the rounding to bytes is lost, and the best candidates are scored again with the numbers as sent.
//!
//! The high and the low halves of the bytes lie apart (two levels of one code, as in LVQ's two-level form). The high ones alone,
//! sixteen steps a number, tell distances roughly for half of the memory; `rough_square` and `rough_error` make these right on average
//! and tell how far off they are. A search walks by them and scores what it found by both.
//!
//! Smaller is nearer:
//! - `l2`: the squared distance. A centre, the mean of some of the vectors, is taken off all of them first: distances stay
//!   what they are, and the bytes tell apart what lies close together far from zero (places of one city, say).
//! - `cosine`: the squared distance of the unit vectors, which orders as cosine does.
//! - `dot`: minus twice the inner product for queries, the squared distance between rows, and for some of their links the product
//!   as well ([`Probe::go_by_products`]; as ip-NSW+, Liu et al. 2020). Lifted to one length by a further coordinate (Bachrach et
//!   al. 2014) the longest vectors, which are most answers, were outliers that few links led to: of 6,000 x 96 whose lengths differ
//!   by a quarter, a search found one answer in twelve.

use super::Metric;
use super::distance::{BIAS, STEPS, Steps, kernels};
use super::graph::SQUARE_MAX;
use super::nodes::{Figures, Nodes};

/// Writes the bytes of a row and returns its figures. `centre` is taken off first; empty for none.
pub fn encode(metric: Metric, numbers: &[f32], centre: &[f32], code: &mut [u8]) -> Figures {
    if centre.is_empty() {
        return encode_centred(metric, numbers, code);
    }
    let numbers: Vec<f32> = numbers.iter().zip(centre).map(|(n, centre)| n - centre).collect();
    encode_centred(metric, &numbers, code)
}

fn encode_centred(metric: Metric, numbers: &[f32], code: &mut [u8]) -> Figures {
    let Steps { largest, squares, rough_squares, rough_errors } = (kernels().to_steps)(numbers, code);
    if largest == 0.0 {
        return Figures::default();
    }
    // The casts: at most DIM_MAX times 2 * STEPS squared, and f32 keeps seven digits of it.
    let [squares, rough_squares, rough_errors] =
        [squares as f32, rough_squares as f32 / 4.0, rough_errors as f32 / 4.0];
    let scale = match metric {
        Metric::Cosine => 1.0 / squares.sqrt(),
        Metric::L2 | Metric::Dot => largest / STEPS,
    };
    let square = |steps: f32| scale * scale * steps;
    Figures {
        scale,
        square: if metric == Metric::Cosine { 1.0 } else { square(squares) },
        rough_error: square(rough_errors),
        rough_square: square(rough_squares - rough_errors),
    }
}

/// Rows compared by one call of a kernel.
pub const GROUP: usize = 16;
const NO_ROWS: [&[u8]; GROUP] = [&[]; GROUP];

/// What rows are compared with: the bytes of a query or of another row, signed.
#[derive(Clone, Debug, Default)]
pub struct Probe {
    code: Vec<i8>,
    /// Room for the bytes of a row.
    bytes: Vec<u8>,
    /// Sum of the bytes: what an offset of the stored ones adds to every inner product.
    sum: i32,
    figures: Figures,
    /// Squared length of what the bytes stand for, also where the figures say none.
    square: f32,
    /// 1 for distances, 0 where only the inner product counts.
    weight: f32,
}

impl Probe {
    /// For a query of these numbers, among rows that the same centre was taken off.
    pub fn of_query(&mut self, metric: Metric, numbers: &[f32], centre: &[f32]) {
        let mut code = vec![0; numbers.len()];
        let figures = encode(metric, numbers, centre, &mut code);
        self.set(&code, figures);
        if metric == Metric::Dot {
            self.go_by_products();
        }
    }

    /// For a row, to compare it with other rows.
    pub fn of_row(&mut self, nodes: &Nodes, slot: u32) {
        let mut code = std::mem::take(&mut self.bytes);
        code.resize(nodes.dim(), 0);
        (kernels().join)(nodes.high(slot), nodes.low(slot), &mut code);
        self.set(&code, nodes.figures(slot));
        self.bytes = code;
    }

    /// From here on nearer is what has the larger inner product.
    pub fn go_by_products(&mut self) {
        self.weight = 0.0;
        // Beyond f32 it would be no number times nothing.
        self.figures.square = 0.0;
    }

    fn set(&mut self, code: &[u8], figures: Figures) {
        self.code.clear();
        self.code.extend(code.iter().map(|&byte| byte.wrapping_sub(BIAS as u8).cast_signed()));
        self.sum = self.code.iter().map(|&step| i32::from(step)).sum();
        self.figures = figures;
        self.square = figures.square;
        self.weight = 1.0;
    }

    /// The distances of rows, never NaN.
    pub fn distances(&self, nodes: &Nodes, slots: &[u32], scratch: &mut Distances) {
        scratch.keys.clear();
        for slots in slots.chunks(GROUP) {
            let dots = self.dots(nodes, slots);
            scratch.keys.extend(slots.iter().zip(dots).map(|(&slot, dot)| self.key_of(nodes.figures(slot), dot)));
        }
    }

    /// The distances of rows as far as the high halves of their bytes tell, never NaN.
    pub fn rough_distances(&self, nodes: &Nodes, slots: &[u32], scratch: &mut Distances) {
        scratch.keys.clear();
        for slots in slots.chunks(GROUP) {
            let (mut highs, mut dots, mut figures) = (NO_ROWS, [0; GROUP], [(0.0, 0.0); GROUP]);
            for ((high, figures), &slot) in highs.iter_mut().zip(&mut figures).zip(slots) {
                *high = nodes.high(slot);
                let Figures { scale, rough_square, .. } = nodes.figures(slot);
                *figures = (scale, rough_square);
            }
            (kernels().half_dots)(&self.code, &highs[..slots.len()], &mut dots[..slots.len()]);
            // For a whole group, whose keys are then worked out together.
            let mut keys = [0.0; GROUP];
            for ((key, (scale, square)), dot) in keys.iter_mut().zip(figures).zip(dots) {
                // Twice the steps, see `rough_twice`. The cast: f32 keeps seven digits.
                let twice = 32 * dot + (15 - 2 * BIAS) * self.sum;
                *key = self.key(scale, square, twice as f32 / 2.0);
            }
            scratch.keys.extend_from_slice(&keys[..slots.len()]);
        }
    }

    /// Whether f32 holds what it is compared by, as [`Graph::is_unfit`](super::graph::Graph::is_unfit) says of rows: else all would
    /// lie as far as each other.
    #[must_use]
    pub fn is_fit(&self) -> bool {
        self.square <= SQUARE_MAX && self.figures.square <= SQUARE_MAX
    }

    /// The distance of one row.
    #[must_use]
    pub fn distance(&self, nodes: &Nodes, slot: u32) -> f32 {
        self.key_of(nodes.figures(slot), self.dots(nodes, &[slot])[0])
    }

    /// Inner products of up to [`GROUP`] rows, in steps.
    #[inline]
    fn dots(&self, nodes: &Nodes, slots: &[u32]) -> [i32; GROUP] {
        let (mut highs, mut lows, mut dots) = (NO_ROWS, NO_ROWS, [0; GROUP]);
        for ((high, low), &slot) in highs.iter_mut().zip(&mut lows).zip(slots) {
            (*high, *low) = (nodes.high(slot), nodes.low(slot));
        }
        let count = slots.len();
        (kernels().whole_dots)(&self.code, &highs[..count], &lows[..count], &mut dots[..count]);
        dots.map(|dot| dot - BIAS * self.sum)
    }

    #[inline]
    fn key_of(&self, row: Figures, dot: i32) -> f32 {
        // The cast: f32 keeps seven digits, more than the bytes do.
        self.key(row.scale, row.square, dot as f32)
    }

    #[inline]
    fn key(&self, scale: f32, square: f32, dot: f32) -> f32 {
        let product = self.figures.scale * scale * dot;
        let key = self.weight * (self.figures.square + square) - 2.0 * product;
        // Beyond f32 nothing is near; the smaller of a NaN and a number is the number.
        key.min(f32::MAX)
    }

    /// By how much a rough distance is off, as a standard deviation, for rows of this [`Figures::rough_error`]: as if what is lost
    /// of a row pointed anywhere.
    #[must_use]
    pub fn roughness(&self, distance: f32, error: f32) -> f32 {
        let square = if self.weight == 0.0 { self.square } else { distance.max(0.0) };
        // Each by itself: their product may be beyond f32.
        2.0 * square.sqrt() * (error / self.code.len() as f32).sqrt()
    }

    /// By how much the distance of a row with such figures is off, as a standard deviation, around what all rows near by have in
    /// common: each number of both is off by up to half a step, and f32 by the last digits of the squares it takes apart.
    #[must_use]
    pub fn rounding(&self, distance: f32, row: Figures) -> f32 {
        /// Of what is spread evenly over one step, in steps.
        const VARIANCE: f32 = 1.0 / 12.0;
        let variances = [self.figures.scale, row.scale].map(|scale| VARIANCE * scale * scale);
        if self.weight == 0.0 {
            // A row's error counts as far as the query goes, and the other way round.
            return 2.0 * (self.square * variances[1] + row.square * variances[0]).sqrt();
        }
        let (variance, dim) = (variances[0] + variances[1], self.code.len() as f32);
        let of_steps = (4.0 * distance.max(0.0) * variance + 2.0 * dim * variance * variance).sqrt();
        of_steps + 2.0 * f32::EPSILON * (self.figures.square + row.square)
    }

    /// Distances up to this are rounding: the rows are equal. No product says so.
    #[must_use]
    pub fn equal(&self) -> f32 {
        if self.weight == 0.0 { f32::NEG_INFINITY } else { 8.0 * f32::EPSILON * self.figures.square }
    }

    /// Whether it goes by products.
    #[must_use]
    pub fn is_by_products(&self) -> bool {
        self.weight == 0.0
    }

    /// The distance that a score computed with the numbers as sent stands for.
    #[must_use]
    pub fn distance_of(metric: Metric, score: f32) -> f32 {
        match metric {
            Metric::Cosine => 2.0 - 2.0 * score,
            Metric::L2 => score * score,
            Metric::Dot => -2.0 * score,
        }
    }
}

/// Room for the distances of one step.
#[derive(Debug, Default)]
pub struct Distances {
    /// One for each slot asked for.
    pub keys: Vec<f32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::revision::Revision;

    /// What a search concludes from high halves rests on both: that they are right on average, and how far off they are.
    #[test]
    fn rough_distances_are_right_on_average_and_as_far_off_as_they_say() {
        const DIM: usize = 200;
        // No whole number of groups.
        const ROWS: u32 = 2003;
        // Xorshift (Marsaglia 2003).
        let mut state = 88_172_645_463_325_252_u64;
        let mut number = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut row = || (0..DIM).map(|_| number() * number()).collect::<Vec<f32>>();
        for metric in [Metric::Cosine, Metric::L2, Metric::Dot] {
            let nodes = Nodes::new(DIM);
            nodes.reserve(ROWS as usize).unwrap();
            let mut code = vec![0; DIM];
            for slot in 0..ROWS {
                let figures = encode(metric, &row(), &[], &mut code);
                // SAFETY: nobody else has these nodes.
                unsafe { nodes.write(slot, Revision(1), Revision(u64::MAX), &code, figures) };
            }
            let mut probe = Probe::default();
            probe.of_query(metric, &row(), &[]);
            let (slots, mut rough, mut whole): (Vec<u32>, _, _) =
                ((0..ROWS).collect(), Distances::default(), Distances::default());
            probe.rough_distances(&nodes, &slots, &mut rough);
            probe.distances(&nodes, &slots, &mut whole);
            let mut one = Distances::default();
            for (&slot, (rough, whole)) in slots.iter().zip(rough.keys.iter().zip(&whole.keys)) {
                probe.rough_distances(&nodes, &[slot], &mut one);
                assert_eq!(one.keys, [*rough], "{metric:?} {slot}: by itself as in a group");
                assert_eq!(probe.distance(&nodes, slot), *whole, "{metric:?} {slot}: by itself as in a group");
            }
            let errors: Vec<f32> = rough
                .keys
                .iter()
                .zip(&whole.keys)
                .zip(slots)
                .map(|((rough, whole), slot)| {
                    (rough - whole) / probe.roughness(*whole, nodes.figures(slot).rough_error)
                })
                .collect();
            let mean = errors.iter().sum::<f32>() / ROWS as f32;
            let deviation = (errors.iter().map(|e| e * e).sum::<f32>() / ROWS as f32).sqrt();
            assert!(mean.abs() < 0.4, "{metric:?}: off by {mean} deviations on average");
            assert!((0.7..1.3).contains(&deviation), "{metric:?}: {deviation} times as far off as they say");
        }
    }
}
