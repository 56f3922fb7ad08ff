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
