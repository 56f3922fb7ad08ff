// SPDX-License-Identifier: Apache-2.0
// Masks as bits, with AVX2. AVX-512 F and DQ can neither compare bytes nor count bits, so its lanes use this too.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "berdiff/portability.h"

namespace berdiff {

struct Avx2Bits {
    // 64 elements as bits: one where an element is not zero.
    static BERDIFF_FN std::uint64_t nonzero_bits(const std::uint8_t* p) {
        return ~(zero_bytes(load(p)) | static_cast<std::uint64_t>(zero_bytes(load(p + 32))) << 32);
    }
    static BERDIFF_FN std::uint64_t nonzero_bits(const std::uint16_t* p) {
        return ~(zero_words(p) | static_cast<std::uint64_t>(zero_words(p + 32)) << 32);
    }
    static BERDIFF_FN std::uint64_t nonzero_bits(const std::uint32_t* p) {
        const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
        std::uint64_t bits = 0;
        BERDIFF_UNROLL
        for (int j = 0; j < 8; ++j) {
            const __m256i x = _mm256_cmpgt_epi32(_mm256_and_si256(load(p + 8 * j), no_sign), _mm256_setzero_si256());
            bits |= static_cast<std::uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x))) << 8 * j;
        }
        return bits;
    }

    // How many bits a and b have in common. A byte of `sums` holds 31 additions of at most 8.
    template <int words>
    static BERDIFF_FN std::int64_t common_bits(const std::uint64_t* a, const std::uint64_t* b) {
        static_assert(words % 4 == 0 && words / 4 <= 31);
        const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                                0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
        const __m256i low = _mm256_set1_epi8(0x0f);
        __m256i sums = _mm256_setzero_si256();
        BERDIFF_UNROLL
        for (int i = 0; i < words; i += 4) {
            const __m256i x = _mm256_and_si256(load(a + i), load(b + i));
            const __m256i lower = _mm256_shuffle_epi8(counts, _mm256_and_si256(x, low));
            const __m256i upper = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
            sums = _mm256_add_epi8(sums, _mm256_add_epi8(lower, upper));
        }
        const __m256i quarters = _mm256_sad_epu8(sums, _mm256_setzero_si256());
        const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256(quarters, 1));
        return _mm_cvtsi128_si64(_mm_add_epi64(halves, _mm_unpackhi_epi64(halves, halves)));
    }

private:
    template <class T>
    static BERDIFF_FN __m256i load(const T* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static BERDIFF_FN std::uint32_t zero_bytes(__m256i x) {
        return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_setzero_si256())));
    }
    // Of 32 floats of 16 bits, whose sign does not count.
    static BERDIFF_FN std::uint32_t zero_words(const std::uint16_t* p) {
        const __m256i no_sign = _mm256_set1_epi16(0x7fff), zero = _mm256_setzero_si256();
        const __m256i first = _mm256_cmpeq_epi16(_mm256_and_si256(load(p), no_sign), zero);
        const __m256i second = _mm256_cmpeq_epi16(_mm256_and_si256(load(p + 16), no_sign), zero);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xd8);
        return static_cast<std::uint32_t>(_mm256_movemask_epi8(packed));
    }
};

}  // namespace berdiff
