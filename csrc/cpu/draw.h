// SPDX-License-Identifier: Apache-2.0
// The ops that draw: `initial_noise` (masks from B(1/2)), `q_sample` (the forward process, which flips the bits of a
// clean mask), `sample_step` (the next mask of a sampling step) and `posterior` (the probability that it is drawn
// from).
#pragma once

#include "cpu/groups.h"

namespace berdiff {

template <class L>
void initial_noise_span(const InitialNoiseArguments& a, std::int64_t row, std::int64_t begin, std::int64_t end) {
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

// Logits of y_0 become logits of epsilon.
template <class L>
BERDIFF_FN void to_epsilon(GroupF<L>& z, const GroupU<L>& mask) {
    BERDIFF_UNROLL
    for (int q = 0; q < quads; ++q) {
        BERDIFF_UNROLL
        for (int j = 0; j < 4; ++j) z[q][j] = epsilon_logit<L>(z[q][j], mask[q][j]);
    }
}

template <class L, class Y, class Z, class O, bool threshold>
void sample_step_span_of(const SampleStepArguments& a, std::int64_t row, std::int64_t begin, std::int64_t end) {
    using U = typename L::U;
    const PhiloxRow random = a.rows.philox(row, a.timestep, stream_sampling_step);
    const PhiloxKeys<L> keys(random);
    const Coefficients c = {a.coefficients[0], a.coefficients[1], a.coefficients[2], a.coefficients[3]};
    const std::uint32_t one = one_bits(a.out.type);
    const std::int64_t offset = row * a.rows.pixels + begin;
    In<L, Y> y_t(a.y_t.data, offset);
    In<L, Z> logits(a.logits, offset);
    Out<L, O> out(a.out.data, offset);
    U nan = L::u(0);
    for_each_group<L>(begin, end, [&](std::int64_t pixel, int live) {
        GroupU<L> mask, words;
        GroupF<L> z;
        y_t.load(live, mask);
        logits.load(live, z);
        if (a.predicts_y0) to_epsilon<L>(z, mask);
        if constexpr (!threshold) group_words<L>(random, keys, pixel, words);
        BERDIFF_UNROLL
        for (int q = 0; q < quads; ++q) {
            nan = L::bor(nan, L::bor(L::unordered(z[q][0], z[q][1]), L::unordered(z[q][2], z[q][3])));
            BERDIFF_UNROLL
            for (int j = 0; j < 4; ++j) {
                U flip;
                if constexpr (threshold) {
                    flip = L::less(L::f(0.0f), z[q][j]);
                } else {
                    const FlipOdds<L> odds = flip_odds<L>(z[q][j], c);
                    flip = L::less(L::mul(uniform<L>(words[q][j]), odds.denominator), odds.numerator);
                }
                mask[q][j] = L::bxor(mask[q][j], flip);
            }
        }
        out.store(live, mask, one);
    });
    // Every thread that finds a NaN writes the same value.
    if (L::any(nan)) __atomic_store_n(a.nan_flag, 1, __ATOMIC_RELAXED);
}

template <class L>
void sample_step_span(const SampleStepArguments& a, std::int64_t row, std::int64_t begin, std::int64_t end) {
    with_mask_type(a.y_t.type, [&](auto y) {
        with_logit_type(a.logits_type, [&](auto z) {
            with_mask_type(a.out.type, [&](auto o) {
                using Y = decltype(y);
                using Z = decltype(z);
                using O = decltype(o);
                if (a.threshold)
                    sample_step_span_of<L, Y, Z, O, true>(a, row, begin, end);
                else
                    sample_step_span_of<L, Y, Z, O, false>(a, row, begin, end);
            });
        });
    });
}

template <class L>
void posterior_span(const PosteriorArguments& a, std::int64_t, std::int64_t begin, std::int64_t end) {
    const Coefficients c = {a.coefficients[0], a.coefficients[1], a.coefficients[2], a.coefficients[3]};
    with_mask_type(a.y_t.type, [&](auto y_type) {
        with_logit_type(a.logits_type, [&](auto z_type) {
            In<L, decltype(y_type)> y_t(a.y_t.data, begin);
            In<L, decltype(z_type)> logits(a.logits, begin);
            Out<L, float> out(a.out, begin);
            for_each_group<L>(begin, end, [&](std::int64_t, int live) {
                GroupU<L> mask;
                GroupF<L> z;
                y_t.load(live, mask);
                logits.load(live, z);
                if (a.predicts_y0) to_epsilon<L>(z, mask);
                BERDIFF_UNROLL
                for (int q = 0; q < quads; ++q) {
                    BERDIFF_UNROLL
                    for (int j = 0; j < 4; ++j) z[q][j] = posterior_mean<L>(z[q][j], mask[q][j], c);
                }
                out.store(live, z);
            });
        });
    });
}

// The words themselves, for tests.
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
