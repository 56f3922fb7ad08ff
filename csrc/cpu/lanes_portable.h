// SPDX-License-Identifier: Apache-2.0
// One lane and how it meets memory; any C++ compiler.
#pragma once

#include <cstdint>

#include "berdiff/scalar.h"

namespace berdiff {

// Elements as they lie in memory. Distinct types, so that overloads can tell the 16-bit floats apart.
struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

struct PortableLanes : ScalarLanes {
    // The vectors of a group of 4 * width pixels hold them in order; the lane that computes Philox block
    // `blocks()[lane]` gives the words that `to_pixels` then brings into that order.
    static BERDIFF_FN U blocks() { return 0; }
    static BERDIFF_FN void to_pixels(U (&)[4]) {}

    static BERDIFF_FN void load(const std::uint8_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) mask[j] = p[j] ? ~0u : 0u;
    }
    static BERDIFF_FN void load(const std::uint16_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) mask[j] = p[j] & 0x7fffu ? ~0u : 0u;
    }
    static BERDIFF_FN void load(const std::uint32_t* p, U (&mask)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) mask[j] = p[j] & 0x7fffffffu ? ~0u : 0u;
    }
    static BERDIFF_FN void load(const float* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) x[j] = p[j];
    }
    static BERDIFF_FN void load(const BFloat16* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) x[j] = from_bits(static_cast<U>(p[j].bits) << 16);
    }
    static BERDIFF_FN void load(const Half* p, F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) x[j] = half_to_float(p[j].bits);
    }
    template <class T>
    static BERDIFF_FN void store(T* p, const U (&mask)[4], std::uint32_t one) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) p[j] = static_cast<T>(mask[j] & one);
    }
    static BERDIFF_FN void store(float* p, const F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) p[j] = x[j];
    }
    static BERDIFF_FN void store(BFloat16* p, const F (&x)[4]) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) p[j].bits = static_cast<std::uint16_t>(bfloat16_bits<PortableLanes>(x[j]));
    }

    // 64 elements of a mask as bits: one where an element is not zero; and how many bits two lists have in common.
    static BERDIFF_FN std::uint64_t nonzero_bits(const std::uint8_t* p) {
        std::uint64_t bits = 0;
        for (int i = 0; i < 64; i += 8) {
            std::uint64_t x = 0;
            BERDIFF_UNROLL
            for (int j = 0; j < 8; ++j) x |= static_cast<std::uint64_t>(p[i + j]) << 8 * j;
            // The top bit of each byte says whether any is set; the product moves the eight of them side by side.
            x = (((x & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu) | x) >> 7 & 0x0101010101010101u;
            bits |= (x * 0x0102040810204080u >> 56) << i;
        }
        return bits;
    }
    template <class T>
    static BERDIFF_FN std::uint64_t nonzero_bits(const T* p) {
        const T no_sign = static_cast<T>(~(std::uint64_t{1} << (8 * sizeof(T) - 1)));
        std::uint64_t bits = 0;
        for (int i = 0; i < 64; ++i) bits |= static_cast<std::uint64_t>((p[i] & no_sign) != 0) << i;
        return bits;
    }
    template <int words>
    static BERDIFF_FN std::int64_t common_bits(const std::uint64_t* a, const std::uint64_t* b) {
        std::uint64_t sum = 0;
        for (int i = 0; i < words; ++i) {
            std::uint64_t x = a[i] & b[i];
            x -= x >> 1 & 0x5555555555555555u;
            x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
            x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
            sum += x * 0x0101010101010101u >> 56;
        }
        return static_cast<std::int64_t>(sum);
    }

private:
    static BERDIFF_FN F half_to_float(std::uint32_t half) {
        const U sign = (half & 0x8000u) << 16;
        const U rest = (half & 0x7fffu) << 13;
        const U rebias = 112u << 23;
        if (rest >= 0x7c00u << 13) return from_bits(sign | 0x7f800000u | rest);  // infinity, NaN
        if (rest >= 0x0400u << 13) return from_bits(sign | (rest + rebias));
        // Zero and subnormal: an exact difference of normal numbers, whatever the CPU does to subnormal ones.
        const U smallest_normal = rebias + (1u << 23);
        return from_bits(sign | bits(from_bits(rest + smallest_normal) - from_bits(smallest_normal)));
    }
};

}  // namespace berdiff
