// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al., SC 2011) on any kind of lanes.
#pragma once

#include <cstdint>

#include "berdiff/portability.h"

namespace berdiff {

// Fourth counter word: what a draw is for (docs/draw.md).
constexpr std::uint32_t stream_initial_noise = 0;
constexpr std::uint32_t stream_sampling_step = 1;
constexpr std::uint32_t stream_training_noise = 2;

// What does not change along a mask: the key (its image's seed) and three words of the counter.
struct PhiloxRow {
    std::uint32_t key0, key1;
    std::uint32_t sample, tag, stream;
};

// The keys of the ten rounds, spread over the lanes once for a whole span of pixels.
template <class L>
struct PhiloxKeys {
    typename L::U k0[10], k1[10];

    explicit BERDIFF_FN PhiloxKeys(const PhiloxRow& row) {
        BERDIFF_UNROLL
        for (std::uint32_t round = 0; round < 10; ++round) {
            k0[round] = L::u(row.key0 + round * 0x9E3779B9u);
            k1[round] = L::u(row.key1 + round * 0xBB67AE85u);
        }
    }
};

// words[i][w] receives word w of the block whose number stands in the same lane of blocks[i]. The ten rounds of one
// block are a chain of dependent operations: a second block beside it keeps the processor's units busy.
//
// The rounds run on L::Wide, the layout in which the lanes multiply. Vector units take the lower halves of 64-bit lanes
// and leave 64-bit products: the lower half is already in place as the low word, the upper half is one shift away, and
// what else stands in upper halves is never looked at.
template <class L, int count>
BERDIFF_FN void philox4x32(const PhiloxRow& row, const PhiloxKeys<L>& keys, const typename L::U (&blocks)[count],
                           typename L::U (&words)[count][4]) {
    using Wide = typename L::Wide;
    Wide c0[count], c1[count], c2[count], c3[count];
    BERDIFF_UNROLL
    for (int i = 0; i < count; ++i) {
        c0[i] = L::widen(blocks[i]);
        c1[i] = L::widen(L::u(row.sample));
        c2[i] = L::widen(L::u(row.tag));
        c3[i] = L::widen(L::u(row.stream));
    }
    BERDIFF_UNROLL
    for (int round = 0; round < 10; ++round) {
        BERDIFF_UNROLL
        for (int i = 0; i < count; ++i) {
            const auto product0 = L::multiply(c0[i], 0xD2511F53u);
            const auto product1 = L::multiply(c2[i], 0xCD9E8D57u);
            c0[i] = L::xor3(L::high(product1), c1[i], keys.k0[round]);
            c1[i] = L::low(product1);
            c2[i] = L::xor3(L::high(product0), c3[i], keys.k1[round]);
            c3[i] = L::low(product0);
        }
    }
    BERDIFF_UNROLL
    for (int i = 0; i < count; ++i) {
        words[i][0] = L::narrow(c0[i]);
        words[i][1] = L::narrow(c1[i]);
        words[i][2] = L::narrow(c2[i]);
        words[i][3] = L::narrow(c3[i]);
    }
}

// The upper 24 bits of a word as a float in [0, 1): exact.
template <class L>
BERDIFF_FN typename L::F uniform(typename L::U word) {
    return L::mul(L::to_float(L::template shift_right<8>(word)), L::f(0x1p-24f));
}

}  // namespace berdiff
