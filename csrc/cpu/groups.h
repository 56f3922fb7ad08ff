// SPDX-License-Identifier: Apache-2.0
// How a span of pixels is walked: in groups of two quads; a quad is 4 * width pixels, what one Philox call on all lanes
// yields; two at a time (philox.h says why).
#pragma once

#include <cstdint>
#include <cstring>

#include "berdiff/arguments.h"
#include "cpu/lanes_portable.h"

namespace berdiff {

constexpr int quads = 2;

template <class L>
constexpr int quad_size = 4 * L::width;

template <class L>
constexpr int group_size = quads * quad_size<L>;

template <class L>
using GroupU = typename L::U[quads][4];

template <class L>
using GroupF = typename L::F[quads][4];

// The Philox words of the group that starts at `pixel` (a multiple of the group's size), in pixel order.
template <class L>
BERDIFF_FN void group_words(const PhiloxRow& row, const PhiloxKeys<L>& keys, std::int64_t pixel, GroupU<L>& words) {
    typename L::U blocks[quads];
    BERDIFF_UNROLL
    for (int q = 0; q < quads; ++q) {
        const std::uint32_t first = static_cast<std::uint32_t>((pixel + q * quad_size<L>) >> 2);
        blocks[q] = L::iadd(L::u(first), L::blocks());
    }
    philox4x32<L, quads>(row, keys, blocks, words);
    BERDIFF_UNROLL
    for (int q = 0; q < quads; ++q) L::to_pixels(words[q]);
}

// A cursor over one array of a span. The last, partial group goes through a padded copy, so that a kernel
// only ever sees whole groups and never touches memory that is not its own.
template <class L, class T>
struct In {
    const T* at;
    T padded[group_size<L>];

    explicit BERDIFF_FN In(const void* data, std::int64_t offset) : at(static_cast<const T*>(data) + offset) {}
    // The next group, as masks or as floats.
    template <class V>
    BERDIFF_FN void load(int live, V (&x)[quads][4]) {
        const T* p = at;
        if (live < group_size<L>) {
            std::memset(static_cast<void*>(padded), 0, sizeof padded);
            std::memcpy(static_cast<void*>(padded), at, live * sizeof(T));
            p = padded;
        }
        BERDIFF_UNROLL
        for (int q = 0; q < quads; ++q) L::load(p + q * quad_size<L>, x[q]);
        at += live;
    }
};

template <class L, class T>
struct Out {
    T* at;
    T padded[group_size<L>];

    explicit BERDIFF_FN Out(void* data, std::int64_t offset) : at(static_cast<T*>(data) + offset) {}
    // Masks become `one` or zero; floats, with no `one` given, are stored as they are.
    template <class V, class... One>
    BERDIFF_FN void store(int live, const V (&x)[quads][4], One... one) {
        T* p = live == group_size<L> ? at : padded;
        BERDIFF_UNROLL
        for (int q = 0; q < quads; ++q) L::store(p + q * quad_size<L>, x[q], one...);
        if (live < group_size<L>) std::memcpy(at, padded, live * sizeof(T));
        at += live;
    }
};

// body(pixel, live) for each group of [begin, end); live is how many of its pixels there are.
template <class L, class Body>
BERDIFF_FN void for_each_group(std::int64_t begin, std::int64_t end, Body&& body) {
    std::int64_t pixel = begin;
    for (; pixel + group_size<L> <= end; pixel += group_size<L>) body(pixel, group_size<L>);
    if (pixel < end) body(pixel, static_cast<int>(end - pixel));
}

// Masks differ only in the width of their elements: zero has no bit set but perhaps a float's sign.
template <class Body>
BERDIFF_FN void with_mask_type(Type type, Body&& body) {
    switch (type) {
        case Type::u8: body(std::uint8_t{}); break;
        case Type::f32: body(std::uint32_t{}); break;
        default: body(std::uint16_t{}); break;
    }
}

template <class Body>
BERDIFF_FN void with_logit_type(Type type, Body&& body) {
    switch (type) {
        case Type::f16: body(Half{}); break;
        case Type::bf16: body(BFloat16{}); break;
        default: body(float{}); break;
    }
}

}  // namespace berdiff
