// SPDX-License-Identifier: Apache-2.0
// Op `noise`: masks from B(1/2), and the forward process, which flips the bits of a clean mask.
#pragma once

#include "cpu/groups.h"

namespace berdiff {

template <class L>
void noise_span(const NoiseArguments& a, std::int64_t row, std::int64_t begin, std::int64_t end) {
    const PhiloxRow random = a.rows.philox(row, 0, stream_initial_noise);
    const PhiloxKeys<L> keys(random);
    const std::uint32_t one = one_bits(a.out.type);
    with_mask_type(a.out.type, [&](auto out_type) {
        Out<L, decltype(out_type)> out(a.out.data, row * a.rows.pixels + begin);
        for_each_group<L>(begin, end, [&](std::int64_t pixel, int live) {
            GroupU<L> words;
            group_words<L>(random, keys, pixel, words);
            // u < 1/2 is a clear top bit.
            for (auto& quad : words)
                for (auto& word : quad) word = L::top_bit_clear(word);
            out.store(live, words, one);
        });
    });
}

template <class L>
void q_sample_span(const QSampleArguments& a, std::int64_t row, std::int64_t begin, std::int64_t end) {
    using F = typename L::F;
    const PhiloxRow random = a.rows.philox(row, static_cast<std::uint32_t>(a.t[row]), stream_training_noise);
    const PhiloxKeys<L> keys(random);
    const F flip_zero = L::f(a.flip[2 * row]);
    const F flip_one = L::f(a.flip[2 * row + 1]);
    const std::uint32_t one = one_bits(a.out.type);
    with_mask_type(a.y_0.type, [&](auto y_type) {
        with_mask_type(a.out.type, [&](auto out_type) {
            const std::int64_t offset = row * a.rows.pixels + begin;
            In<L, decltype(y_type)> y_0(a.y_0.data, offset);
            Out<L, decltype(out_type)> out(a.out.data, offset);
            for_each_group<L>(begin, end, [&](std::int64_t pixel, int live) {
                GroupU<L> words, mask;
                y_0.load(live, mask);
                group_words<L>(random, keys, pixel, words);
                BERDIFF_UNROLL
                for (int q = 0; q < quads; ++q) {
                    BERDIFF_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const F p = L::select(mask[q][j], flip_one, flip_zero);
                        mask[q][j] = L::bxor(mask[q][j], L::less(uniform<L>(words[q][j]), p));
                    }
                }
                out.store(live, mask, one);
            });
        });
    });
}

template <class L>
void words_span(const PhiloxRow& row, std::uint32_t first_block, std::int64_t blocks, std::uint32_t* out) {
    const PhiloxKeys<L> keys(row);
    Out<L, std::uint32_t> cursor(out, 0);
    const std::int64_t begin = static_cast<std::int64_t>(first_block) * 4;
    for_each_group<L>(begin, begin + 4 * blocks, [&](std::int64_t pixel, int live) {
        GroupU<L> words;
        group_words<L>(row, keys, pixel, words);
        cursor.store(live, words, ~0u);
    });
}

}  // namespace berdiff
