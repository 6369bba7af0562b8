//! The vectors of x86-64: AVX2 with FMA and F16C, and AVX-512, also with its unit for bf16.

use super::{
    isa::{Isa, Task, dot},
    line::LANES,
};
use std::{arch::x86_64::*, mem::transmute};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn avx2<T: Task>(task: T) -> T::Out {
    task.run(Avx2(()))
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn avx512<T: Task>(task: T) -> T::Out {
    task.run(Avx512::<false>(()))
}

#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn avx512bf16<T: Task>(task: T) -> T::Out {
    task.run(Avx512::<true>(()))
}

/// Whether AMD made the processor.
pub(super) fn is_amd() -> bool {
    let id = __cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

/// Made only where AVX2, FMA and F16C are enabled.
#[derive(Clone, Copy)]
struct Avx2(());

/// Made only where AVX-512 F is enabled, and AVX-512 BF16 if `BF16`.
#[derive(Clone, Copy)]
struct Avx512<const BF16: bool>(());

impl Isa for Avx2 {
    type Lanes = [__m256; 2];

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> [__m256; 2] {
        let from = values.as_ptr();
        // SAFETY: AVX is there, as `Avx2` is; the two loads of 8 values cover the array of 16 and need no alignment.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    fn store(self, [low, high]: [__m256; 2], to: &mut [f32; LANES]) {
        let to = to.as_mut_ptr();
        // SAFETY: AVX is there, as `Avx2` is; the two stores of 8 values cover the array of 16 and need no alignment.
        unsafe {
            _mm256_storeu_ps(to, low);
            _mm256_storeu_ps(to.add(8), high);
        }
    }

    #[inline(always)]
    fn mul_add(self, [low, high]: [__m256; 2], x: f32, sum: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: AVX and FMA are there, as `Avx2` is.
        unsafe {
            let x = _mm256_set1_ps(x);
            [_mm256_fmadd_ps(low, x, sum[0]), _mm256_fmadd_ps(high, x, sum[1])]
        }
    }

    #[inline(always)]
    fn brains(self, pairs: &[u16; 2 * LANES], value: usize) -> [__m256; 2] {
        let from = pairs.as_ptr().cast::<__m256i>();
        // SAFETY: AVX2 is there, as `Avx2` is; the two loads of 16 values cover the array of 32 and need no alignment.
        let [low, high] = unsafe {
            let (low, high) = (_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1)));
            if value == 0 {
                [_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)]
            } else {
                let mask = _mm256_set1_epi32(!0xffff);
                [_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)]
            }
        };
        // SAFETY: AVX is there, as `Avx2` is.
        unsafe { [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)] }
    }

    #[inline(always)]
    fn halves(self, bits: &[u16; LANES]) -> [__m256; 2] {
        let from = bits.as_ptr().cast::<__m128i>();
        // SAFETY: F16C is there, as `Avx2` is; the two loads of 8 values cover the array of 16 and need no alignment.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))] }
    }

    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        // SAFETY: SSE is part of the baseline, and a prefetch of any address does no harm.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}

impl<const BF16: bool> Isa for Avx512<BF16> {
    type Lanes = __m512;

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> __m512 {
        // SAFETY: AVX-512 F is there, as `Avx512` is; the load of 16 values is the array and needs no alignment.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, lanes: __m512, to: &mut [f32; LANES]) {
        // SAFETY: AVX-512 F is there, as `Avx512` is; the store of 16 values is the array and needs no alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), lanes) }
    }

    #[inline(always)]
    fn mul_add(self, lanes: __m512, x: f32, sum: __m512) -> __m512 {
        // SAFETY: AVX-512 F is there, as `Avx512` is.
        unsafe { _mm512_fmadd_ps(lanes, _mm512_set1_ps(x), sum) }
    }

    #[inline(always)]
    fn brains(self, pairs: &[u16; 2 * LANES], value: usize) -> __m512 {
        // SAFETY: AVX-512 F is there, as `Avx512` is; the load of 32 values is the array and needs no alignment.
        unsafe {
            let pairs = _mm512_loadu_si512(pairs.as_ptr().cast());
            let lanes = if value == 0 { _mm512_slli_epi32::<16>(pairs) } else { _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)) };
            _mm512_castsi512_ps(lanes)
        }
    }

    #[inline(always)]
    fn halves(self, bits: &[u16; LANES]) -> __m512 {
        // SAFETY: AVX-512 F is there, as `Avx512` is; the load of 16 values is the array and needs no alignment.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bits.as_ptr().cast())) }
    }

    #[inline(always)]
    fn dot(self, pairs: __m512, x: f32, sum: __m512) -> __m512 {
        if !BF16 {
            return dot(self, pairs, x, sum);
        }
        // SAFETY: AVX-512 F and BF16 are there, as `Avx512::<true>` is; both types are 64 bytes without invalid values.
        unsafe { _mm512_dpbf16_ps(sum, transmute::<__m512, __m512bh>(pairs), transmute::<__m512, __m512bh>(_mm512_set1_ps(x))) }
    }

    #[inline(always)]
    fn couple(self, first: __m512, second: __m512) -> __m512 {
        // SAFETY: AVX-512 F is there, as `Avx512` is.
        unsafe {
            let first = _mm512_srli_epi32::<16>(_mm512_castps_si512(first));
            let second = _mm512_and_si512(_mm512_castps_si512(second), _mm512_set1_epi32(!0xffff));
            _mm512_castsi512_ps(_mm512_or_si512(first, second))
        }
    }

    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        // SAFETY: SSE is part of the baseline, and a prefetch of any address does no harm.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}
