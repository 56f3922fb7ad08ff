// SPDX-License-Identifier: Apache-2.0
// Op `diffusion_loss`: bits of every mask, and their gradient by the logits, in one pass.
#pragma once

#include "cpu/groups.h"
#include "cpu/kernels.h"

namespace berdiff {

static_assert(loss_tile == tile, "a span's sum is one partial sum");

// A pixel costs far more than a branch on the type of its group: one kernel serves them all.
template <class L>
BERDIFF_FN void load_group(const ConstMask& mask, std::int64_t offset, int live, GroupU<L>& bits) {
    with_mask_type(mask.type, [&](auto type) { In<L, decltype(type)>(mask.data, offset).load(live, bits); });
}

// Ones where a pixel counts: it is there, and not ignored.
template <class L>
BERDIFF_FN void load_counted(const DiffusionLossArguments& a, std::int64_t offset, int live, GroupU<L>& counted) {
    std::uint8_t ones[group_size<L>];
    std::memset(ones, 1, sizeof ones);
    In<L, std::uint8_t>(ones, 0).load(live, counted);
    if (a.ignore.data == nullptr) return;
    GroupU<L> ignored;
    load_group<L>(a.ignore, offset, live, ignored);
    for (int q = 0; q < quads; ++q)
        for (int j = 0; j < 4; ++j) counted[q][j] = L::band(counted[q][j], L::bxor(ignored[q][j], L::u(~0u)));
}

template <class L>
void diffusion_loss_span(const DiffusionLossArguments& a, std::int64_t row, std::int64_t begin, std::int64_t end) {
    using U = typename L::U;
    const LossRow<L> constants = spread<L>(a.row(row));
    const U sign = L::u(0x80000000u);
    double sums[4 * L::width] = {};
    for_each_group<L>(begin, end, [&](std::int64_t pixel, int live) {
        const std::int64_t offset = row * a.pixels + pixel;
        GroupU<L> epsilon, truth, counted;
        GroupF<L> bits, slope;
        load_group<L>(a.y_t, offset, live, epsilon);
        load_group<L>(a.y_0, offset, live, truth);
        with_logit_type(a.logits_type, [&](auto type) { In<L, decltype(type)>(a.logits, offset).load(live, slope); });
        for (int q = 0; q < quads; ++q) {
            for (int j = 0; j < 4; ++j) {
                epsilon[q][j] = L::bxor(epsilon[q][j], truth[q][j]);
                if (!a.predicts_y0) truth[q][j] = epsilon[q][j];
            }
        }
        Belief<L> beliefs[quads][4];
        for (int q = 0; q < quads; ++q) {
            for (int j = 0; j < 4; ++j) {
                const U turn = L::bxor(L::band(truth[q][j], sign), sign);
                beliefs[q][j] = belief<L>(L::from_bits(L::bxor(L::bits(slope[q][j]), turn)));
            }
        }
        Consequence<L> consequences[quads][4];
        for (int q = 0; q < quads; ++q) {
            for (int j = 0; j < 4; ++j) {
                const LossCase<L> c = select<L>(epsilon[q][j], constants.one, constants.zero);
                consequences[q][j] = consequence<L>(beliefs[q][j].right, beliefs[q][j].wrong, c, constants.bce_weight);
                slope[q][j] = L::from_bits(L::bxor(L::bits(consequences[q][j].slope), L::band(truth[q][j], sign)));
            }
        }
        for (int q = 0; q < quads; ++q) {
            for (int j = 0; j < 4; ++j) {
                const LossCase<L> c = select<L>(epsilon[q][j], constants.one, constants.zero);
                bits[q][j] = loss_bits<L>(consequences[q][j], beliefs[q][j].bce, c, constants.bce_weight);
            }
        }
        if (live < group_size<L> || a.ignore.data != nullptr) {
            load_counted<L>(a, offset, live, counted);
            for (int q = 0; q < quads; ++q) {
                for (int j = 0; j < 4; ++j) {
                    bits[q][j] = L::from_bits(L::band(L::bits(bits[q][j]), counted[q][j]));
                    slope[q][j] = L::from_bits(L::band(L::bits(slope[q][j]), counted[q][j]));
                }
            }
        }
        if (a.gradient_type == Type::f32)
            Out<L, float>(a.gradient, offset).store(live, slope);
        else
            Out<L, BFloat16>(a.gradient, offset).store(live, slope);
        float group[4 * L::width];
        for (int j = 0; j < 4; ++j) bits[0][j] = L::add(bits[0][j], bits[1][j]);
        L::store(group, bits[0]);
        for (int i = 0; i < 4 * L::width; ++i) sums[i] += group[i];
    });
    double sum = 0;
    for (const double s : sums) sum += s;
    a.partial[row * a.tiles_per_row() + begin / loss_tile] = sum;
}

}  // namespace berdiff
