// SPDX-License-Identifier: Apache-2.0
// Eight lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/bits_avx2.h"
#include "cpu/lanes_portable.h"

namespace berdiff {

struct Avx2Lanes : Avx2Bits {
    using F = __m256;
    using U = __m256i;
    static constexpr int width = 8;

    static BERDIFF_FN F f(float x) { return _mm256_set1_ps(x); }
    static BERDIFF_FN U u(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }

    static BERDIFF_FN F add(F a, F b) { return _mm256_add_ps(a, b); }
    static BERDIFF_FN F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static BERDIFF_FN F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static BERDIFF_FN F div(F a, F b) { return _mm256_div_ps(a, b); }
    static BERDIFF_FN F madd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static BERDIFF_FN F reciprocal(F x) { return div(f(1.0f), x); }
    static BERDIFF_FN F min(F a, F b) { return _mm256_min_ps(a, b); }
    static BERDIFF_FN F max(F a, F b) { return _mm256_max_ps(a, b); }
    static BERDIFF_FN U bits(F x) { return _mm256_castps_si256(x); }
    static BERDIFF_FN F from_bits(U x) { return _mm256_castsi256_ps(x); }
    static BERDIFF_FN U less(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
    static BERDIFF_FN U unordered(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
    static BERDIFF_FN F to_float(U x) { return _mm256_cvtepi32_ps(x); }

    static BERDIFF_FN U iadd(U a, U b) { return _mm256_add_epi32(a, b); }
    static BERDIFF_FN U bxor(U a, U b) { return _mm256_xor_si256(a, b); }
    static BERDIFF_FN U band(U a, U b) { return _mm256_and_si256(a, b); }
    static BERDIFF_FN U bor(U a, U b) { return _mm256_or_si256(a, b); }
    static BERDIFF_FN F select(U mask, F yes, F no) { return _mm256_blendv_ps(no, yes, from_bits(mask)); }
    template <int n>
    static BERDIFF_FN U shift_left(U a) {
        return _mm256_slli_epi32(a, n);
    }
    template <int n>
    static BERDIFF_FN U shift_right(U a) {
        return _mm256_srli_epi32(a, n);
    }
    static BERDIFF_FN U top_bit_clear(U a) { return _mm256_cmpgt_epi32(a, u(~0u)); }
    static BERDIFF_FN bool any(U mask) { return _mm256_movemask_epi8(mask) != 0; }

    // Philox (philox.h). There are too few registers for the layout of AVX-512: words stay packed, the odd lanes come
    // down to the multiplier, and their high words go back up.
    using Wide = U;
    struct Product {
        U high, low;
    };
    static BERDIFF_FN Wide widen(U a) { return a; }
    static BERDIFF_FN U narrow(Wide a) { return a; }
    static BERDIFF_FN Product multiply(Wide a, std::uint32_t b) {
        const U even = _mm256_mul_epu32(a, u(b));
        const U odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), u(b));
        return {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa), _mm256_mullo_epi32(a, u(b))};
    }
    static BERDIFF_FN Wide high(Product p) { return p.high; }
    static BERDIFF_FN Wide low(Product p) { return p.low; }
    static BERDIFF_FN Wide xor3(Wide a, Wide b, U c) { return bxor(bxor(a, b), c); }

    // Lane 4 h + j computes block 2 j + h: transposing the four words within each half then puts pixels in order.
    static BERDIFF_FN U blocks() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }
    static BERDIFF_FN void to_pixels(U (&w)[4]) {
        const U a = _mm256_unpacklo_epi32(w[0], w[1]);
        const U b = _mm256_unpackhi_epi32(w[0], w[1]);
        const U c = _mm256_unpacklo_epi32(w[2], w[3]);
        const U d = _mm256_unpackhi_epi32(w[2], w[3]);
        w[0] = _mm256_unpacklo_epi64(a, c);
        w[1] = _mm256_unpackhi_epi64(a, c);
        w[2] = _mm256_unpacklo_epi64(b, d);
        w[3] = _mm256_unpackhi_epi64(b, d);
    }

    static BERDIFF_FN void load(const std::uint8_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * j));
            mask[j] = _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
        }
    }
    static BERDIFF_FN void load(const std::uint16_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) mask[j] = _mm256_cmpgt_epi32(band(load16(p + 8 * j), u(0x7fffu)), u(0));
    }
    static BERDIFF_FN void load(const std::uint32_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) {
            const U x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * j));
            mask[j] = _mm256_cmpgt_epi32(band(x, u(0x7fffffffu)), u(0));
        }
    }
    static BERDIFF_FN void load(const float* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) x[j] = _mm256_loadu_ps(p + 8 * j);
    }
    static BERDIFF_FN void load(const BFloat16* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) x[j] = from_bits(shift_left<16>(load16(p + 8 * j)));
    }
    static BERDIFF_FN void load(const Half* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j)
            x[j] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * j)));
    }

    static BERDIFF_FN void store(std::uint8_t* p, const U (&m)[4], std::uint32_t one) {
        const U packed = _mm256_packs_epi16(_mm256_packs_epi32(m[0], m[1]), _mm256_packs_epi32(m[2], m[3]));
        const U ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), band(ordered, _mm256_set1_epi8(static_cast<char>(one))));
    }
    static BERDIFF_FN void store(std::uint16_t* p, const U (&m)[4], std::uint32_t one) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; j += 2) {
            const U ordered = _mm256_permute4x64_epi64(_mm256_packs_epi32(m[j], m[j + 1]), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * j),
                                band(ordered, _mm256_set1_epi16(static_cast<short>(one))));
        }
    }
    static BERDIFF_FN void store(std::uint32_t* p, const U (&m)[4], std::uint32_t one) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * j), band(m[j], u(one)));
    }
    static BERDIFF_FN void store(float* p, const F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) _mm256_storeu_ps(p + 8 * j, x[j]);
    }
    static BERDIFF_FN void store(BFloat16* p, const F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; j += 2) {
            const U packed = _mm256_packus_epi32(bfloat16_bits<Avx2Lanes>(x[j]), bfloat16_bits<Avx2Lanes>(x[j + 1]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * j), _mm256_permute4x64_epi64(packed, 0xd8));
        }
    }

private:
    template <class T>
    static BERDIFF_FN U load16(const T* p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
};

}  // namespace berdiff
