// SPDX-License-Identifier: Apache-2.0
// AVX-512 by SIMDe (MIT licence, not part of this repository), for tests on a CPU without it: the lanes' own source is
// compiled, every intrinsic replaced. What SIMDe 0.7.4 lacks is added here from AVX2 halves.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

namespace berdiff::emulated {

static inline __m512 join(__m256 low, __m256 high) {
    simde__m512_private r;
    r.m256[0] = simde__m256_from_private(simde__m256_to_private(low));
    r.m256[1] = simde__m256_from_private(simde__m256_to_private(high));
    return simde__m512_from_private(r);
}

static inline __m512i join(__m256i low, __m256i high) {
    simde__m512i_private r;
    r.m256i[0] = low;
    r.m256i[1] = high;
    return simde__m512i_from_private(r);
}

static inline __m256i half(__m512i x, int i) { return simde__m512i_to_private(x).m256i[i]; }

static inline __m512 cvtepi32_ps(__m512i x) {
    return join(_mm256_cvtepi32_ps(half(x, 0)), _mm256_cvtepi32_ps(half(x, 1)));
}
static inline __m512i cvtepu8_epi32(__m128i x) {
    return join(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}
static inline __m512i cvtepu16_epi32(__m256i x) {
    return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}
static inline __m512 cvtph_ps(__m256i x) {
    return join(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
static inline __m128i cvtepi32_epi8(__m512i x) {
    alignas(16) unsigned char out[16];
    for (int i = 0; i < 16; ++i) out[i] = static_cast<unsigned char>(simde__m512i_to_private(x).u32[i]);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(out));
}
static inline __m256i cvtepi32_epi16(__m512i x) {
    alignas(32) unsigned short out[16];
    for (int i = 0; i < 16; ++i) out[i] = static_cast<unsigned short>(simde__m512i_to_private(x).u32[i]);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(out));
}

}  // namespace berdiff::emulated

#define _mm512_cvtepi32_ps berdiff::emulated::cvtepi32_ps
#define _mm512_cvtepu8_epi32 berdiff::emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 berdiff::emulated::cvtepu16_epi32
#define _mm512_cvtph_ps berdiff::emulated::cvtph_ps
#define _mm512_cvtepi32_epi8 berdiff::emulated::cvtepi32_epi8
#define _mm512_cvtepi32_epi16 berdiff::emulated::cvtepi32_epi16
