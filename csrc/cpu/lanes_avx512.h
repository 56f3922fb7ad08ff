// SPDX-License-Identifier: Apache-2.0
// Sixteen lanes: AVX-512 F and DQ. BERDIFF_EMULATE_AVX512 takes the intrinsics from SIMDe, so that the same
// source can be tested on a CPU without them (tests/test_avx512_emulated.py).
#pragma once

#if defined(BERDIFF_EMULATE_AVX512)
#include "cpu/emulated_avx512.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "cpu/bits_avx2.h"
#include "cpu/lanes_portable.h"

namespace berdiff {

struct Avx512Lanes : Avx2Bits {
    using F = __m512;
    using U = __m512i;
    static constexpr int width = 16;

    static BERDIFF_FN F f(float x) { return _mm512_set1_ps(x); }
    static BERDIFF_FN U u(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }

    static BERDIFF_FN F add(F a, F b) { return _mm512_add_ps(a, b); }
    static BERDIFF_FN F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static BERDIFF_FN F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static BERDIFF_FN F div(F a, F b) { return _mm512_div_ps(a, b); }
    static BERDIFF_FN F madd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static BERDIFF_FN F reciprocal(F x) { return div(f(1.0f), x); }
    static BERDIFF_FN F min(F a, F b) { return _mm512_min_ps(a, b); }
    static BERDIFF_FN F max(F a, F b) { return _mm512_max_ps(a, b); }
    static BERDIFF_FN U bits(F x) { return _mm512_castps_si512(x); }
    static BERDIFF_FN F from_bits(U x) { return _mm512_castsi512_ps(x); }
    static BERDIFF_FN U less(F a, F b) { return ones(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)); }
    static BERDIFF_FN U unordered(F a, F b) { return ones(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q)); }
    static BERDIFF_FN F to_float(U x) { return _mm512_cvtepi32_ps(x); }

    static BERDIFF_FN U iadd(U a, U b) { return _mm512_add_epi32(a, b); }
    static BERDIFF_FN U bxor(U a, U b) { return _mm512_xor_si512(a, b); }
    static BERDIFF_FN U band(U a, U b) { return _mm512_and_si512(a, b); }
    static BERDIFF_FN U bor(U a, U b) { return _mm512_or_si512(a, b); }
    static BERDIFF_FN F select(U mask, F yes, F no) {
        return from_bits(_mm512_ternarylogic_epi32(mask, bits(yes), bits(no), 0xca));
    }
    template <int n>
    static BERDIFF_FN U shift_left(U a) {
        return _mm512_slli_epi32(a, n);
    }
    template <int n>
    static BERDIFF_FN U shift_right(U a) {
        return _mm512_srli_epi32(a, n);
    }
    static BERDIFF_FN U top_bit_clear(U a) { return ones(_mm512_cmpgt_epi32_mask(a, u(~0u))); }
    static BERDIFF_FN bool any(U mask) { return nonzero(mask) != 0; }

    // Philox (philox.h). The multiplier takes even lanes, so the odd ones of each register travel in another.
    struct Wide {
        U even, odd;
    };
    static BERDIFF_FN Wide widen(U a) { return {a, _mm512_srli_epi64(a, 32)}; }
    static BERDIFF_FN U narrow(Wide a) { return _mm512_mask_blend_epi32(0xaaaa, a.even, _mm512_slli_epi64(a.odd, 32)); }
    static BERDIFF_FN Wide multiply(Wide a, std::uint32_t b) {
        return {_mm512_mul_epu32(a.even, u(b)), _mm512_mul_epu32(a.odd, u(b))};
    }
    static BERDIFF_FN Wide high(Wide product) {
        return {_mm512_srli_epi64(product.even, 32), _mm512_srli_epi64(product.odd, 32)};
    }
    static BERDIFF_FN Wide low(Wide product) { return product; }
    static BERDIFF_FN Wide xor3(Wide a, Wide b, U c) {
        return {_mm512_ternarylogic_epi32(a.even, b.even, c, 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, c, 0x96)};
    }

    // Lane 4 q + j computes block 4 j + q: transposing the four words within each quarter orders the pixels.
    static BERDIFF_FN U blocks() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }
    static BERDIFF_FN void to_pixels(U (&w)[4]) {
        const U a = _mm512_unpacklo_epi32(w[0], w[1]);
        const U b = _mm512_unpackhi_epi32(w[0], w[1]);
        const U c = _mm512_unpacklo_epi32(w[2], w[3]);
        const U d = _mm512_unpackhi_epi32(w[2], w[3]);
        w[0] = _mm512_unpacklo_epi64(a, c);
        w[1] = _mm512_unpackhi_epi64(a, c);
        w[2] = _mm512_unpacklo_epi64(b, d);
        w[3] = _mm512_unpackhi_epi64(b, d);
    }

    static BERDIFF_FN void load(const std::uint8_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * j));
            mask[j] = ones(nonzero(_mm512_cvtepu8_epi32(bytes)));
        }
    }
    static BERDIFF_FN void load(const std::uint16_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) mask[j] = ones(nonzero(band(load16(p + 16 * j), u(0x7fffu))));
    }
    static BERDIFF_FN void load(const std::uint32_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) mask[j] = ones(nonzero(band(_mm512_loadu_si512(p + 16 * j), u(0x7fffffffu))));
    }
    static BERDIFF_FN void load(const float* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) x[j] = _mm512_loadu_ps(p + 16 * j);
    }
    static BERDIFF_FN void load(const BFloat16* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) x[j] = from_bits(shift_left<16>(load16(p + 16 * j)));
    }
    static BERDIFF_FN void load(const Half* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j)
            x[j] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * j)));
    }

    static BERDIFF_FN void store(std::uint8_t* p, const U (&m)[4], std::uint32_t one) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * j), _mm512_cvtepi32_epi8(band(m[j], u(one))));
    }
    static BERDIFF_FN void store(std::uint16_t* p, const U (&m)[4], std::uint32_t one) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * j), _mm512_cvtepi32_epi16(band(m[j], u(one))));
    }
    static BERDIFF_FN void store(std::uint32_t* p, const U (&m)[4], std::uint32_t one) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) _mm512_storeu_si512(p + 16 * j, band(m[j], u(one)));
    }
    static BERDIFF_FN void store(float* p, const F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) _mm512_storeu_ps(p + 16 * j, x[j]);
    }
    static BERDIFF_FN void store(BFloat16* p, const F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * j),
                                _mm512_cvtepi32_epi16(bfloat16_bits<Avx512Lanes>(x[j])));
    }

private:
    static BERDIFF_FN U ones(__mmask16 mask) { return _mm512_movm_epi32(mask); }
    static BERDIFF_FN __mmask16 nonzero(U x) { return _mm512_test_epi32_mask(x, x); }
    template <class T>
    static BERDIFF_FN U load16(const T* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
};

}  // namespace berdiff
