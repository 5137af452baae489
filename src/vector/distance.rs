//! Inner product and squared Euclidean distance of two rows of f32, by the widest instructions the machine has.
//!
//! Each kernel has four independent accumulators so that the adds of one step do not wait for those of the step before
//! (a fused multiply-add takes four cycles, two start each cycle). The scalar twin sums in sixteen lanes: it is the
//! fallback and what the tests hold the others against. Results differ between kernels in the last bits, because the
//! order of additions differs; on one machine they are reproducible.
//!
//! `unsafe` stands here and in `storage.rs` only.

use std::sync::OnceLock;

type Kernel = fn(&[f32], &[f32]) -> f32;

/// The kernels chosen for this machine.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Which instructions: `avx512`, `avx2`, `neon` or `scalar`.
    pub name: &'static str,
    /// Inner product. Both slices have the same length.
    pub dot: Kernel,
    /// Squared Euclidean distance. Both slices have the same length.
    pub l2_squared: Kernel,
}

/// The kernels for this machine, detected once.
pub fn kernels() -> Kernels {
    static CHOSEN: OnceLock<Kernels> = OnceLock::new();
    // The last of the supported ones is the widest.
    *CHOSEN.get_or_init(|| supported().pop().unwrap_or(SCALAR))
}

const SCALAR: Kernels = Kernels { name: "scalar", dot: dot_scalar, l2_squared: l2_scalar };

/// Every kernel set this machine can run, narrowest first.
pub fn supported() -> Vec<Kernels> {
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(unused_mut, reason = "scalar only"))]
    let mut sets = vec![SCALAR];
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            sets.push(Kernels { name: "avx2", dot: x86::dot_avx2_checked, l2_squared: x86::l2_avx2_checked });
        }
        if std::arch::is_x86_feature_detected!("avx512f") {
            sets.push(Kernels { name: "avx512", dot: x86::dot_avx512_checked, l2_squared: x86::l2_avx512_checked });
        }
    }
    #[cfg(target_arch = "aarch64")]
    sets.push(Kernels { name: "neon", dot: neon::dot_checked, l2_squared: neon::l2_checked });
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

/// Inner product in f64: for rows whose f32 sum overflows, and for norms.
#[must_use]
pub fn dot_f64(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

/// Squared Euclidean distance in f64, for rows whose f32 sum overflows.
#[must_use]
pub fn l2_squared_f64(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
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
    #[should_panic(expected = "left == right")]
    fn lengths_that_differ_are_a_bug_not_a_wild_read() {
        (kernels().dot)(&[1.0, 2.0], &[1.0]);
    }
}
