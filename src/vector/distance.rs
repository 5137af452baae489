//! Inner product and squared Euclidean distance of two rows of f32, and their rounding to bytes, by the widest instructions the
//! machine has.
//!
//! Each kernel has four independent accumulators so that the adds of one step do not wait for those of the step before
//! (a fused multiply-add takes four cycles, two start each cycle). The scalar twin sums in sixteen lanes: it is the
//! fallback and what the tests hold the others against. Results differ between kernels in the last bits, because the
//! order of additions differs; on one machine they are reproducible. Norms, rounding to bytes and taking these apart are the scalar
//! code, compiled again for wider instructions, and the same everywhere.
//!
//! `unsafe` stands here for these instructions; ARCHITECTURE.md lists where else.

use std::sync::OnceLock;

type Kernel = fn(&[f32], &[f32]) -> f32;
/// For each row of half-bytes, its inner product with a query of signed bytes.
type HalfKernel = fn(&[i8], &[&[u8]], &mut [i32]);
/// The same for rows whose high and low halves are given.
type WholeKernel = fn(&[i8], &[&[u8]], &[&[u8]], &mut [i32]);

/// Added to a signed step to store it unsigned. Nothing is then in the middle of its high half, so that numbers about zero, often
/// most of them, are not all off to the same side where only that half is looked at.
pub const BIAS: i32 = 136;
/// Largest step, so that bytes are 17 to 255.
pub const STEPS: f32 = 119.0;

/// A row rounded to steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Steps {
    /// The largest number, which is [`STEPS`] steps.
    pub largest: f32,
    /// Sum of the squares of the steps.
    pub squares: i32,
    /// Four times the sum of the squares of what their high halves stand for: of [`rough_twice`].
    pub rough_squares: i32,
    /// Four times the sum of the squares of what those are off by.
    pub rough_errors: i32,
}

/// Twice the steps that the high half of a stored byte stands for, the middle of sixteen: the low half is between 0 and 15.
#[inline(always)]
fn rough_twice(byte: u8) -> i32 {
    2 * (i32::from(byte & 0xf0) - BIAS) + 15
}

/// The kernels chosen for this machine.
pub struct Kernels {
    /// Which instructions: `avx512`, `avx2`, `neon` or `scalar`.
    pub name: &'static str,
    /// Inner product. Both slices have the same length.
    pub dot: Kernel,
    /// Squared Euclidean distance. Both slices have the same length.
    pub l2_squared: Kernel,
    /// Inner products of a query of signed bytes with rows of half-bytes (see [`split`]), all for as many numbers; one for
    /// each row.
    pub half_dots: HalfKernel,
    /// Inner products of such a query with whole rows, given as what [`split`] took apart: high halves, low halves.
    pub whole_dots: WholeKernel,
    /// Sum of the squares.
    pub squares_f64: fn(&[f32]) -> f64,
    /// Rounds a row to steps, each stored with [`BIAS`] added.
    pub to_steps: fn(&[f32], &mut [u8]) -> Steps,
    /// [`split`].
    pub split: fn(&[u8], &mut [u8], &mut [u8]),
    /// [`join`].
    pub join: fn(&[u8], &[u8], &mut [u8]),
}

/// The kernels for this machine, detected once.
pub fn kernels() -> &'static Kernels {
    static CHOSEN: OnceLock<Kernels> = OnceLock::new();
    // The last of the supported ones is the widest.
    CHOSEN.get_or_init(|| supported().pop().unwrap_or(SCALAR))
}

const SCALAR: Kernels = Kernels {
    name: "scalar",
    dot: dot_scalar,
    l2_squared: l2_scalar,
    half_dots: half_dots_scalar,
    whole_dots: |query, highs, lows, out| whole_by_halves(half_dots_scalar, query, highs, lows, out),
    squares_f64: squares_f64_scalar,
    to_steps: to_steps_scalar,
    split,
    join,
};

/// Every kernel set this machine can run, narrowest first.
pub fn supported() -> Vec<Kernels> {
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(unused_mut, reason = "scalar only"))]
    let mut sets = vec![SCALAR];
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            sets.push(Kernels {
                name: "avx2",
                dot: x86::dot_avx2_checked,
                l2_squared: x86::l2_avx2_checked,
                half_dots: x86::half_dots_avx2_checked,
                whole_dots: |query, highs, lows, out| {
                    whole_by_halves(x86::half_dots_avx2_checked, query, highs, lows, out);
                },
                squares_f64: x86::squares_f64_avx2_checked,
                to_steps: x86::to_steps_avx2_checked,
                split: x86::split_avx2_checked,
                join: x86::join_avx2_checked,
            });
        }
        if std::arch::is_x86_feature_detected!("avx512f") {
            let has_vnni = std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512vnni")
                && std::arch::is_x86_feature_detected!("avx2");
            let narrower = sets.last().unwrap_or(&SCALAR);
            let (half_dots, whole_dots) = if has_vnni {
                (x86::half_dots_vnni_checked as HalfKernel, x86::whole_dots_vnni_checked as WholeKernel)
            } else {
                (narrower.half_dots, narrower.whole_dots)
            };
            sets.push(Kernels {
                name: "avx512",
                dot: x86::dot_avx512_checked,
                l2_squared: x86::l2_avx512_checked,
                half_dots,
                whole_dots,
                squares_f64: x86::squares_f64_avx512_checked,
                to_steps: x86::to_steps_avx512_checked,
                split: x86::split_avx512_checked,
                join: x86::join_avx512_checked,
            });
        }
    }
    #[cfg(target_arch = "aarch64")]
    sets.push(Kernels { name: "neon", dot: neon::dot_checked, l2_squared: neon::l2_checked, ..SCALAR });
    sets
}

const LANES: usize = 16;

fn scalar(a: &[f32], b: &[f32], step: impl Fn(f32, f32) -> f32) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut lanes = [0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += step(x[lane], y[lane]);
        }
    }
    for (lane, (&x, &y)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] += step(x, y);
    }
    lanes.iter().sum()
}

fn dot_scalar(a: &[f32], b: &[f32]) -> f32 {
    scalar(a, b, |x, y| x * y)
}

fn l2_scalar(a: &[f32], b: &[f32]) -> f32 {
    scalar(a, b, |x, y| (x - y) * (x - y))
}

/// Numbers whose half-bytes lie side by side: a block's first half in the low, its second in the high half of the bytes. With 64
/// bytes to a block the widest registers take both apart by one mask and one shift.
const BLOCK: usize = 128;

/// Bytes that half-bytes of so many numbers take.
#[must_use]
pub const fn half_bytes(dim: usize) -> usize {
    dim.div_ceil(2)
}

/// Takes the bytes of a row apart into their high halves, which alone tell roughly how near it is, and their low halves.
#[inline(always)]
pub fn split(code: &[u8], high: &mut [u8], low: &mut [u8]) {
    let halves = high.chunks_mut(BLOCK / 2).zip(low.chunks_mut(BLOCK / 2));
    for (block, (high, low)) in code.chunks(BLOCK).zip(halves) {
        let (first, second) = block.split_at(block.len().div_ceil(2));
        for ((high, low), &byte) in high.iter_mut().zip(&mut *low).zip(first) {
            (*high, *low) = (byte >> 4, byte & 0x0f);
        }
        for ((high, low), &byte) in high.iter_mut().zip(&mut *low).zip(second) {
            *high |= byte & 0xf0;
            *low |= byte << 4;
        }
    }
}

/// Puts together what [`split`] took apart.
#[inline(always)]
pub fn join(high: &[u8], low: &[u8], code: &mut [u8]) {
    let halves = high.chunks(BLOCK / 2).zip(low.chunks(BLOCK / 2));
    for (block, (high, low)) in code.chunks_mut(BLOCK).zip(halves) {
        let (first, second) = block.split_at_mut(block.len().div_ceil(2));
        for ((byte, &high), &low) in first.iter_mut().zip(high).zip(low) {
            *byte = high << 4 | low & 0x0f;
        }
        for ((byte, &high), &low) in second.iter_mut().zip(high).zip(low) {
            *byte = high & 0xf0 | low >> 4;
        }
    }
}

fn half_dots_scalar(query: &[i8], rows: &[&[u8]], out: &mut [i32]) {
    assert_eq!(rows.len(), out.len());
    for (row, out) in rows.iter().zip(out) {
        assert_eq!(row.len(), half_bytes(query.len()));
        let dot_of_block = |(query, row): (&[i8], &[u8])| {
            let (first, second) = query.split_at(row.len());
            half_dot(first, second, row)
        };
        *out = query.chunks(BLOCK).zip(row.chunks(BLOCK / 2)).map(dot_of_block).sum();
    }
}

/// Whole rows where products of whole bytes would not fit the widest instructions there are: one half after the other.
fn whole_by_halves(half_dots: HalfKernel, query: &[i8], highs: &[&[u8]], lows: &[&[u8]], out: &mut [i32]) {
    const GROUP: usize = 16;
    half_dots(query, highs, out);
    for (out, lows) in out.chunks_mut(GROUP).zip(lows.chunks(GROUP)) {
        let mut low_dots = [0; GROUP];
        half_dots(query, lows, &mut low_dots[..lows.len()]);
        for (out, low) in out.iter_mut().zip(low_dots) {
            *out = 16 * *out + low;
        }
    }
}

/// The low halves with the first of a query's block, the high ones with the second.
fn half_dot(first: &[i8], second: &[i8], row: &[u8]) -> i32 {
    let low: i32 = row.iter().zip(first).map(|(&u, &q)| i32::from(u & 0x0f) * i32::from(q)).sum();
    let high: i32 = row.iter().zip(second).map(|(&u, &q)| i32::from(u >> 4) * i32::from(q)).sum();
    low + high
}

/// Asks the processor to fetch a cache line, as far as its second level. A processor waits for few lines at a time in its first
/// level, two dozen where this was measured, and a walk asks for a hundred at once: with the hint for the first level it stood
/// still at every such burst, and searches were a third slower.
#[inline]
pub fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint; it cannot fault whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The same for all lines of some numbers, at once.
pub fn prefetch_numbers(numbers: &[f32]) {
    const LINE_NUMBERS: usize = 64 / size_of::<f32>();
    numbers.iter().step_by(LINE_NUMBERS).for_each(|number| prefetch(std::ptr::from_ref(number).cast()));
}

/// Inner product in f64: for rows whose f32 sum overflows, and for norms.
#[must_use]
pub fn dot_f64(a: &[f32], b: &[f32]) -> f64 {
    sum_f64(a, b, |x, y| x * y)
}

/// Squared Euclidean distance in f64, for rows whose f32 sum overflows.
#[must_use]
pub fn l2_squared_f64(a: &[f32], b: &[f32]) -> f64 {
    sum_f64(a, b, |x, y| (x - y).powi(2))
}

/// Adds up in eight sums, side by side: in one, each addition would wait for the one before.
#[inline(always)]
fn sum_f64(a: &[f32], b: &[f32], term: impl Fn(f64, f64) -> f64) -> f64 {
    const SUMS: usize = 8;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<SUMS>(), b.as_chunks::<SUMS>());
    let mut sums = [0.0; SUMS];
    for (a, b) in a.iter().zip(b) {
        for (sum, (&x, &y)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += term(x.into(), y.into());
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(&x, &y)| term(x.into(), y.into()));
    rest.chain(sums).sum()
}

#[inline(always)]
fn squares_f64_scalar(numbers: &[f32]) -> f64 {
    sum_f64(numbers, numbers, |x, y| x * y)
}

#[inline(always)]
fn to_steps_scalar(numbers: &[f32], code: &mut [u8]) -> Steps {
    let largest = largest(numbers);
    let inverse = STEPS / largest;
    if largest == 0.0 {
        code.fill(BIAS as u8);
        return Steps { largest, squares: 0, rough_squares: 0, rough_errors: 0 };
    } else if inverse.is_finite() {
        round(numbers.iter().map(|n| n * inverse), code);
    } else {
        // So small that its inverse is infinite.
        round(numbers.iter().map(|n| n / largest * STEPS), code);
    }
    let squares = code.iter().map(|&byte| (i32::from(byte) - BIAS).pow(2)).sum();
    let rough_squares = code.iter().map(|&byte| rough_twice(byte).pow(2)).sum();
    let rough_errors = code.iter().map(|&byte| (2 * i32::from(byte & 0x0f) - 15).pow(2)).sum();
    Steps { largest, squares, rough_squares, rough_errors }
}

/// The largest of their sizes; several side by side, as one comparison would wait for the one before.
#[inline(always)]
fn largest(numbers: &[f32]) -> f32 {
    let (chunks, rest) = numbers.as_chunks::<LANES>();
    let mut largest = [0f32; LANES];
    for chunk in chunks {
        for (largest, n) in largest.iter_mut().zip(chunk) {
            *largest = largest.max(n.abs());
        }
    }
    rest.iter().chain(&largest).fold(0f32, |m, n| m.max(n.abs()))
}

/// Rounds to steps. Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the float: one instruction for many
/// numbers at once, where a call to round is one for each.
#[inline(always)]
fn round(steps: impl Iterator<Item = f32>, code: &mut [u8]) {
    const MAGIC: f32 = 12_582_912.0;
    for (code, step) in code.iter_mut().zip(steps) {
        // The cast keeps the low byte: the step with its offset.
        *code = ((step + MAGIC).to_bits().wrapping_add(BIAS as u32)) as u8;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::BLOCK;
    use std::arch::x86_64::*;

    /// Declares a kernel over `$lanes` floats a register: four registers a step, then one, then the masked or scalar rest.
    macro_rules! checked {
        ($checked:ident, $kernel:ident, $feature:literal) => {
            pub fn $checked(a: &[f32], b: &[f32]) -> f32 {
                assert_eq!(a.len(), b.len());
                // SAFETY: `supported` lists this function only after detecting its CPU features; lengths are equal.
                unsafe { $kernel(a, b) }
            }
        };
    }
    checked!(dot_avx512_checked, dot_avx512, "avx512f");
    checked!(l2_avx512_checked, l2_avx512, "avx512f");
    checked!(dot_avx2_checked, dot_avx2, "avx2,fma");
    checked!(l2_avx2_checked, l2_avx2, "avx2,fma");

    /// The scalar code, compiled for these instructions.
    macro_rules! widened {
        ($squares:ident, $to_steps:ident, $split:ident, $join:ident, $feature:literal) => {
            pub fn $squares(numbers: &[f32]) -> f64 {
                #[target_feature(enable = $feature)]
                fn wide(numbers: &[f32]) -> f64 {
                    super::squares_f64_scalar(numbers)
                }
                // SAFETY: `supported` lists this function only after detecting its CPU features.
                unsafe { wide(numbers) }
            }

            pub fn $to_steps(numbers: &[f32], code: &mut [u8]) -> super::Steps {
                #[target_feature(enable = $feature)]
                fn wide(numbers: &[f32], code: &mut [u8]) -> super::Steps {
                    super::to_steps_scalar(numbers, code)
                }
                // SAFETY: `supported` lists this function only after detecting its CPU features.
                unsafe { wide(numbers, code) }
            }

            pub fn $split(code: &[u8], high: &mut [u8], low: &mut [u8]) {
                #[target_feature(enable = $feature)]
                fn wide(code: &[u8], high: &mut [u8], low: &mut [u8]) {
                    super::split(code, high, low);
                }
                // SAFETY: `supported` lists this function only after detecting its CPU features.
                unsafe { wide(code, high, low) }
            }

            pub fn $join(high: &[u8], low: &[u8], code: &mut [u8]) {
                #[target_feature(enable = $feature)]
                fn wide(high: &[u8], low: &[u8], code: &mut [u8]) {
                    super::join(high, low, code);
                }
                // SAFETY: `supported` lists this function only after detecting its CPU features.
                unsafe { wide(high, low, code) }
            }
        };
    }
    widened!(squares_f64_avx512_checked, to_steps_avx512_checked, split_avx512_checked, join_avx512_checked, "avx512f");
    widened!(squares_f64_avx2_checked, to_steps_avx2_checked, split_avx2_checked, join_avx2_checked, "avx2,fma");

    /// # Safety
    /// The CPU has AVX-512F and `a.len() == b.len()`.
    #[target_feature(enable = "avx512f")]
    unsafe fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [_mm512_setzero_ps(); 4];
        let mut at = 0;
        while at + 64 <= a.len() {
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `at + 64 <= len` of both slices, so the 16 floats from `at + 16 * lane` are inside.
                let (x, y) = unsafe {
                    (_mm512_loadu_ps(a.as_ptr().add(at + 16 * lane)), _mm512_loadu_ps(b.as_ptr().add(at + 16 * lane)))
                };
                *sum = _mm512_fmadd_ps(x, y, *sum);
            }
            at += 64;
        }
        while at < a.len() {
            let mask = tail_mask(a.len() - at);
            // SAFETY: masked-off lanes are not read, the others lie below `len`.
            let (x, y) = unsafe {
                (_mm512_maskz_loadu_ps(mask, a.as_ptr().add(at)), _mm512_maskz_loadu_ps(mask, b.as_ptr().add(at)))
            };
            sums[0] = _mm512_fmadd_ps(x, y, sums[0]);
            at += 16;
        }
        reduce_avx512(sums)
    }

    /// # Safety
    /// The CPU has AVX-512F and `a.len() == b.len()`.
    #[target_feature(enable = "avx512f")]
    unsafe fn l2_avx512(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [_mm512_setzero_ps(); 4];
        let mut at = 0;
        while at + 64 <= a.len() {
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: as in `dot_avx512`.
                let (x, y) = unsafe {
                    (_mm512_loadu_ps(a.as_ptr().add(at + 16 * lane)), _mm512_loadu_ps(b.as_ptr().add(at + 16 * lane)))
                };
                let d = _mm512_sub_ps(x, y);
                *sum = _mm512_fmadd_ps(d, d, *sum);
            }
            at += 64;
        }
        while at < a.len() {
            let mask = tail_mask(a.len() - at);
            // SAFETY: masked-off lanes are not read, the others lie below `len`.
            let (x, y) = unsafe {
                (_mm512_maskz_loadu_ps(mask, a.as_ptr().add(at)), _mm512_maskz_loadu_ps(mask, b.as_ptr().add(at)))
            };
            let d = _mm512_sub_ps(x, y);
            sums[0] = _mm512_fmadd_ps(d, d, sums[0]);
            at += 16;
        }
        reduce_avx512(sums)
    }

    pub fn half_dots_vnni_checked(query: &[i8], rows: &[&[u8]], out: &mut [i32]) {
        assert_eq!(rows.len(), out.len());
        assert!(rows.iter().all(|row| row.len() == super::half_bytes(query.len())));
        // SAFETY: `supported` lists this function only after detecting its CPU features; lengths fit.
        unsafe { half_dots_vnni(query, rows, out) }
    }

    /// Four rows at a time share the loads of the query, and their sums are folded together.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VNNI; each row holds half-bytes for the whole query, and there are as many sums as rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2")]
    unsafe fn half_dots_vnni(query: &[i8], rows: &[&[u8]], out: &mut [i32]) {
        let (fours, rest) = rows.as_chunks::<4>();
        let (out_fours, out_rest) = out.as_chunks_mut::<4>();
        for (rows, out) in fours.iter().zip(out_fours) {
            // SAFETY: as this function's.
            *out = unsafe { four_dots_vnni(query, rows) };
        }
        if let [first, ..] = *rest {
            // The missing rows repeat the first: cheaper than another kernel.
            let mut rows = [first; 4];
            rows[..rest.len()].copy_from_slice(rest);
            // SAFETY: as this function's.
            let sums = unsafe { four_dots_vnni(query, &rows) };
            out_rest.copy_from_slice(&sums[..rest.len()]);
        }
    }

    /// # Safety
    /// As [`half_dots_vnni`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2")]
    unsafe fn four_dots_vnni(query: &[i8], rows: &[&[u8]; 4]) -> [i32; 4] {
        let low_half = _mm512_set1_epi8(0x0f);
        let mut sums = [_mm512_setzero_si512(); 4];
        let mut at = 0;
        while at + BLOCK <= query.len() {
            // SAFETY: `at + BLOCK <= len` of the query, and a row has a byte for every two.
            unsafe {
                let first = _mm512_loadu_si512(query.as_ptr().add(at).cast());
                let second = _mm512_loadu_si512(query.as_ptr().add(at + BLOCK / 2).cast());
                for (sum, row) in sums.iter_mut().zip(rows) {
                    let halves = _mm512_loadu_si512(row.as_ptr().add(at / 2).cast());
                    *sum = _mm512_dpbusd_epi32(*sum, _mm512_and_si512(halves, low_half), first);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(halves), low_half);
                    *sum = _mm512_dpbusd_epi32(*sum, high, second);
                }
            }
            at += BLOCK;
        }
        if at < query.len() {
            let (mask, first, second) = last_block(query, at);
            // SAFETY: masked-off bytes are not read; the others are those of a row for what is left of the query.
            unsafe {
                for (sum, row) in sums.iter_mut().zip(rows) {
                    let halves = _mm512_maskz_loadu_epi8(mask, row.as_ptr().add(at / 2).cast());
                    *sum = _mm512_dpbusd_epi32(*sum, _mm512_and_si512(halves, low_half), first);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(halves), low_half);
                    *sum = _mm512_dpbusd_epi32(*sum, high, second);
                }
            }
        }
        fold_four(sums)
    }

    pub fn whole_dots_vnni_checked(query: &[i8], highs: &[&[u8]], lows: &[&[u8]], out: &mut [i32]) {
        assert!(highs.len() == out.len() && lows.len() == out.len());
        assert!(highs.iter().chain(lows).all(|row| row.len() == super::half_bytes(query.len())));
        // SAFETY: `supported` lists this function only after detecting its CPU features; lengths fit.
        unsafe { whole_dots_vnni(query, highs, lows, out) }
    }

    /// As [`half_dots_vnni`].
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VNNI; each row holds half-bytes for the whole query, and there are as many high and low ones
    /// and sums.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2")]
    unsafe fn whole_dots_vnni(query: &[i8], highs: &[&[u8]], lows: &[&[u8]], out: &mut [i32]) {
        let ((high_fours, high_rest), (low_fours, low_rest)) = (highs.as_chunks::<4>(), lows.as_chunks::<4>());
        let (out_fours, out_rest) = out.as_chunks_mut::<4>();
        for ((highs, lows), out) in high_fours.iter().zip(low_fours).zip(out_fours) {
            // SAFETY: as this function's.
            *out = unsafe { four_whole_dots_vnni(query, highs, lows) };
        }
        if let ([high, ..], [low, ..]) = (high_rest, low_rest) {
            let (mut highs, mut lows) = ([*high; 4], [*low; 4]);
            highs[..high_rest.len()].copy_from_slice(high_rest);
            lows[..low_rest.len()].copy_from_slice(low_rest);
            // SAFETY: as this function's.
            let sums = unsafe { four_whole_dots_vnni(query, &highs, &lows) };
            out_rest.copy_from_slice(&sums[..out_rest.len()]);
        }
    }

    /// # Safety
    /// As [`whole_dots_vnni`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2")]
    unsafe fn four_whole_dots_vnni(query: &[i8], highs: &[&[u8]; 4], lows: &[&[u8]; 4]) -> [i32; 4] {
        /// Where the bits of the first are set those of the second, else those of the third.
        const SELECT: i32 = 0xca;
        let low_half = _mm512_set1_epi8(0x0f);
        let add = |sum, high, low, first, second| {
            let first_bytes = _mm512_ternarylogic_epi64::<SELECT>(low_half, low, _mm512_slli_epi16::<4>(high));
            let second_bytes = _mm512_ternarylogic_epi64::<SELECT>(low_half, _mm512_srli_epi16::<4>(low), high);
            _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, first_bytes, first), second_bytes, second)
        };
        let mut sums = [_mm512_setzero_si512(); 4];
        let mut at = 0;
        while at + BLOCK <= query.len() {
            // SAFETY: `at + BLOCK <= len` of the query, and a row has a byte for every two.
            unsafe {
                let first = _mm512_loadu_si512(query.as_ptr().add(at).cast());
                let second = _mm512_loadu_si512(query.as_ptr().add(at + BLOCK / 2).cast());
                for ((sum, high), low) in sums.iter_mut().zip(highs).zip(lows) {
                    let high = _mm512_loadu_si512(high.as_ptr().add(at / 2).cast());
                    let low = _mm512_loadu_si512(low.as_ptr().add(at / 2).cast());
                    *sum = add(*sum, high, low, first, second);
                }
            }
            at += BLOCK;
        }
        if at < query.len() {
            let (mask, first, second) = last_block(query, at);
            // SAFETY: masked-off bytes are not read; the others are those of a row for what is left of the query.
            unsafe {
                for ((sum, high), low) in sums.iter_mut().zip(highs).zip(lows) {
                    let high = _mm512_maskz_loadu_epi8(mask, high.as_ptr().add(at / 2).cast());
                    let low = _mm512_maskz_loadu_epi8(mask, low.as_ptr().add(at / 2).cast());
                    *sum = add(*sum, high, low, first, second);
                }
            }
        }
        fold_four(sums)
    }

    /// What is left of a query from `at` on, less than a block: the mask of a row's bytes for it, its first and its second half.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn last_block(query: &[i8], at: usize) -> (__mmask64, __m512i, __m512i) {
        let (first, second) = query[at..].split_at((query.len() - at).div_ceil(2));
        let mask = |bytes: usize| if bytes == 0 { 0 } else { !0u64 >> (64 - bytes) };
        // SAFETY: masked-off bytes are not read; the others are those of the slices.
        unsafe {
            let load = |half: &[i8]| _mm512_maskz_loadu_epi8(mask(half.len()), half.as_ptr());
            (mask(first.len()), load(first), load(second))
        }
    }

    /// The sum of the lanes of each of four.
    #[inline]
    #[target_feature(enable = "avx512f,avx2")]
    fn fold_four(sums: [__m512i; 4]) -> [i32; 4] {
        let halves = sums.map(|s| _mm256_add_epi32(_mm512_castsi512_si256(s), _mm512_extracti64x4_epi64::<1>(s)));
        let pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(halves[0], halves[1]), _mm256_hadd_epi32(halves[2], halves[3]));
        let folded = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
        let mut out = [0; 4];
        // SAFETY: `out` is 16 bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), folded) };
        out
    }

    pub fn half_dots_avx2_checked(query: &[i8], rows: &[&[u8]], out: &mut [i32]) {
        assert_eq!(rows.len(), out.len());
        for (row, out) in rows.iter().zip(out) {
            assert_eq!(row.len(), super::half_bytes(query.len()));
            *out = query
                .chunks(BLOCK)
                .zip(row.chunks(BLOCK / 2))
                // SAFETY: `supported` lists this function only after detecting its CPU features; a chunk of the row has half as
                // many bytes, rounded up, as one of the query.
                .map(|(query, row)| unsafe { half_dot_of_block_avx2(query, row) })
                .sum();
        }
    }

    /// Products of two half-bytes and bytes fit 16 bits, so multiply-and-add of bytes does not saturate.
    ///
    /// # Safety
    /// The CPU has AVX2 and `row.len() == query.len().div_ceil(2)`.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn half_dot_of_block_avx2(query: &[i8], row: &[u8]) -> i32 {
        let (first, second) = query.split_at(row.len());
        let (low_half, ones) = (_mm256_set1_epi8(0x0f), _mm256_set1_epi16(1));
        let mut sum = _mm256_setzero_si256();
        let mut at = 0;
        while at + 32 <= second.len() {
            // SAFETY: `at + 32 <= len` of the second half of the query, which is the shortest of the three.
            let (halves, q, r) = unsafe {
                (
                    _mm256_loadu_si256(row.as_ptr().add(at).cast()),
                    _mm256_loadu_si256(first.as_ptr().add(at).cast()),
                    _mm256_loadu_si256(second.as_ptr().add(at).cast()),
                )
            };
            let low = _mm256_maddubs_epi16(_mm256_and_si256(halves, low_half), q);
            let high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(halves), low_half), r);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(low, high), ones));
            at += 32;
        }
        let half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
        let pair = _mm_add_epi32(half, _mm_shuffle_epi32::<0b01_00_11_10>(half));
        let one = _mm_add_epi32(pair, _mm_shuffle_epi32::<0b00_00_00_01>(pair));
        _mm_cvtsi128_si32(one) + super::half_dot(&first[at..], &second[at..], &row[at..])
    }

    fn tail_mask(left: usize) -> __mmask16 {
        if left >= 16 { !0 } else { (1u16 << left) - 1 }
    }

    #[target_feature(enable = "avx512f")]
    fn reduce_avx512(sums: [__m512; 4]) -> f32 {
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])))
    }

    /// # Safety
    /// The CPU has AVX2 and FMA and `a.len() == b.len()`.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [_mm256_setzero_ps(); 4];
        let mut at = 0;
        while at + 32 <= a.len() {
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `at + 32 <= len` of both slices, so the 8 floats from `at + 8 * lane` are inside.
                let (x, y) = unsafe {
                    (_mm256_loadu_ps(a.as_ptr().add(at + 8 * lane)), _mm256_loadu_ps(b.as_ptr().add(at + 8 * lane)))
                };
                *sum = _mm256_fmadd_ps(x, y, *sum);
            }
            at += 32;
        }
        reduce_avx2(sums) + super::dot_scalar(&a[at..], &b[at..])
    }

    /// # Safety
    /// The CPU has AVX2 and FMA and `a.len() == b.len()`.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn l2_avx2(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [_mm256_setzero_ps(); 4];
        let mut at = 0;
        while at + 32 <= a.len() {
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: as in `dot_avx2`.
                let (x, y) = unsafe {
                    (_mm256_loadu_ps(a.as_ptr().add(at + 8 * lane)), _mm256_loadu_ps(b.as_ptr().add(at + 8 * lane)))
                };
                let d = _mm256_sub_ps(x, y);
                *sum = _mm256_fmadd_ps(d, d, *sum);
            }
            at += 32;
        }
        reduce_avx2(sums) + super::l2_scalar(&a[at..], &b[at..])
    }

    #[target_feature(enable = "avx2,fma")]
    fn reduce_avx2(sums: [__m256; 4]) -> f32 {
        let sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
        let half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
        let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    pub fn dot_checked(a: &[f32], b: &[f32]) -> f32 {
        run(a, b, |x, y, sum| {
            // SAFETY: NEON is part of every aarch64 target this builds for.
            unsafe { vfmaq_f32(sum, x, y) }
        }) + super::dot_scalar(&a[a.len() / 16 * 16..], &b[a.len() / 16 * 16..])
    }

    pub fn l2_checked(a: &[f32], b: &[f32]) -> f32 {
        run(a, b, |x, y, sum| {
            // SAFETY: NEON is part of every aarch64 target this builds for.
            unsafe {
                let d = vsubq_f32(x, y);
                vfmaq_f32(sum, d, d)
            }
        }) + super::l2_scalar(&a[a.len() / 16 * 16..], &b[a.len() / 16 * 16..])
    }

    #[inline(always)]
    fn run(a: &[f32], b: &[f32], step: impl Fn(float32x4_t, float32x4_t, float32x4_t) -> float32x4_t) -> f32 {
        assert_eq!(a.len(), b.len());
        // SAFETY: NEON is part of every aarch64 target; each load of 4 floats lies below `at + 16 <= len`.
        unsafe {
            let mut sums = [vdupq_n_f32(0.0); 4];
            let mut at = 0;
            while at + 16 <= a.len() {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum =
                        step(vld1q_f32(a.as_ptr().add(at + 4 * lane)), vld1q_f32(b.as_ptr().add(at + 4 * lane)), *sum);
                }
                at += 16;
            }
            vaddvq_f32(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3])))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that mishandles its tail, or a lane, would differ from the scalar twin at some length.
    #[test]
    fn every_kernel_agrees_with_its_scalar_twin_at_every_length() {
        let number = |seed: usize| ((seed * 2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
        for length in (1..=200).chain([255, 256, 257, 383, 384, 385, 784, 1536, 8192]) {
            let a: Vec<f32> = (0..length).map(number).collect();
            let b: Vec<f32> = (0..length).map(|i| number(i + 7777)).collect();
            let scale: f64 = dot_f64(&a, &a).sqrt() * dot_f64(&b, &b).sqrt() + 1.0;
            for set in supported() {
                let dot = f64::from((set.dot)(&a, &b));
                let l2 = f64::from((set.l2_squared)(&a, &b));
                assert!((dot - dot_f64(&a, &b)).abs() < 1e-5 * scale, "{} dot at {length}", set.name);
                assert!((l2 - l2_squared_f64(&a, &b)).abs() < 1e-5 * scale, "{} l2 at {length}", set.name);
            }
        }
    }

    #[test]
    fn norms_and_rounding_are_the_same_with_all_instructions() {
        let number = |seed: usize| ((seed * 2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
        for length in (1..=200).chain([383, 384, 385, 784, 8192]) {
            for scale in [1.0, 0.0, 1e30, 1e-41] {
                let numbers: Vec<f32> = (0..length).map(|i| number(i) * scale).collect();
                let mut expected = vec![0; length];
                let steps = to_steps_scalar(&numbers, &mut expected);
                for set in supported() {
                    let mut code = vec![0; length];
                    assert_eq!((set.to_steps)(&numbers, &mut code), steps, "{} at {length}", set.name);
                    assert_eq!(code, expected, "{} at {length}", set.name);
                    let squares = (set.squares_f64)(&numbers);
                    assert_eq!(squares.to_bits(), squares_f64_scalar(&numbers).to_bits(), "{} at {length}", set.name);
                }
            }
        }
    }

    #[test]
    fn every_kernel_of_half_bytes_equals_its_scalar_twin_at_every_length() {
        let byte = |seed: usize| ((seed * 2_654_435_761) >> 7) as u8;
        for length in (1..=300).chain([383, 384, 385, 784, 8192]) {
            let query: Vec<i8> =
                (0..length).map(|i| if length % 3 == 0 { -127 } else { byte(i).cast_signed() }).collect();
            for count in (0..10).chain([17]) {
                let codes: Vec<Vec<u8>> = (0..count)
                    .map(|row| {
                        (0..length).map(|i| if length % 5 == 0 { 255 } else { byte(i + 7777 * (row + 1)) }).collect()
                    })
                    .collect();
                let (mut high, mut low) = (Vec::new(), Vec::new());
                for code in &codes {
                    let (mut h, mut l, mut joined) =
                        (vec![0; half_bytes(length)], vec![0; half_bytes(length)], vec![0; length]);
                    split(code, &mut h, &mut l);
                    join(&h, &l, &mut joined);
                    assert_eq!(&joined, code, "taken apart and put together at {length}");
                    high.push(h);
                    low.push(l);
                }
                let expected: Vec<i32> = codes
                    .iter()
                    .map(|code| code.iter().zip(&query).map(|(&u, &q)| i32::from(u) * i32::from(q)).sum())
                    .collect();
                for set in supported() {
                    let [highs, lows] =
                        [&high, &low].map(|halves| halves.iter().map(Vec::as_slice).collect::<Vec<&[u8]>>());
                    let dots = |rows: &[&[u8]]| {
                        let mut sums = vec![0; count];
                        (set.half_dots)(&query, rows, &mut sums);
                        sums
                    };
                    let sums: Vec<i32> =
                        dots(&highs).iter().zip(dots(&lows)).map(|(high, low)| 16 * high + low).collect();
                    assert_eq!(sums, expected, "{} at {length}, half by half", set.name);
                    let mut sums = vec![0; count];
                    (set.whole_dots)(&query, &highs, &lows, &mut sums);
                    assert_eq!(sums, expected, "{} at {length}, whole", set.name);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "left == right")]
    fn lengths_that_differ_are_a_bug_not_a_wild_read() {
        (kernels().dot)(&[1.0, 2.0], &[1.0]);
    }
}
