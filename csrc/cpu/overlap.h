// SPDX-License-Identifier: Apache-2.0
// Op `overlap`: how many pixels any two masks of an image share. Masks become bits, 64 pixels a word; what two of them
// share is the number of bits in their conjunction.
#pragma once

#include <cstring>

#include "cpu/groups.h"
#include "cpu/kernels.h"

namespace berdiff {

// Masks are compared in groups, a tile of pixels at a time: two groups of packed tiles stay in the first-level cache,
// and no memory has to be had for them, however many masks there are.
constexpr int masks_per_group = 32;
constexpr int words_per_tile = tile / 64;

// A tile of pixels of a group of masks. Most masks of most images leave most tiles empty; only the others are compared.
struct PackedGroup {
    alignas(32) std::uint64_t bits[masks_per_group][words_per_tile];
    int marked[masks_per_group];  // which masks have a pixel in this tile
    int count;
};

// Whether there is any pixel in [0, live) of a mask, and where.
template <class L, class T>
BERDIFF_FN bool pack(const T* p, std::int64_t live, std::uint64_t (&bits)[words_per_tile]) {
    const std::int64_t whole = live / 64;
    std::uint64_t any = 0;
    for (std::int64_t i = 0; i < whole; ++i) any |= bits[i] = L::nonzero_bits(p + 64 * i);
    if (live == tile) return any != 0;
    T padded[64] = {};
    std::memcpy(padded, p + 64 * whole, (live % 64) * sizeof(T));
    any |= bits[whole] = L::nonzero_bits(padded);
    for (std::int64_t i = whole + 1; i < words_per_tile; ++i) bits[i] = 0;
    return any != 0;
}

template <class L>
void pack_group(const OverlapArguments& a, std::int64_t image, std::int64_t first, std::int64_t begin, std::int64_t end,
                PackedGroup& group) {
    group.count = 0;
    for (int i = 0; i < masks_per_group && first + i < a.masks(); ++i) {
        std::int64_t offset = begin;
        const ConstMask mask = a.mask(image, first + i, offset);
        with_mask_type(mask.type, [&](auto type) {
            using T = decltype(type);
            if (pack<L>(static_cast<const T*>(mask.data) + offset, end - begin, group.bits[i]))
                group.marked[group.count++] = i;
        });
    }
}

// Adds what the pixels [begin, end) of an image contribute to its square of `out`.
template <class L>
void overlap_span(const OverlapArguments& a, std::int64_t image, std::int64_t begin, std::int64_t end) {
    const std::int64_t masks = a.masks();
    std::int64_t* const out = a.out + image * masks * masks;
    PackedGroup rows, others;
    for (std::int64_t row = 0; row < masks; row += masks_per_group) {
        for (std::int64_t column = row; column < masks; column += masks_per_group) {
            const PackedGroup& columns = column == row ? rows : others;
            std::int64_t shared[masks_per_group][masks_per_group] = {};
            for (std::int64_t at = begin; at < end; at += tile) {
                const std::int64_t stop = at + tile < end ? at + tile : end;
                pack_group<L>(a, image, row, at, stop, rows);
                if (column != row) pack_group<L>(a, image, column, at, stop, others);
                for (int i = 0; i < rows.count; ++i) {
                    for (int j = column == row ? i : 0; j < columns.count; ++j) {
                        const int r = rows.marked[i], c = columns.marked[j];
                        shared[r][c] += L::template common_bits<words_per_tile>(rows.bits[r], columns.bits[c]);
                    }
                }
            }
            // Other threads may be adding theirs. Sums of integers do not depend on the order.
            const auto add = [&](std::int64_t i, std::int64_t j, std::int64_t pixels) {
                __atomic_fetch_add(out + i * masks + j, pixels, __ATOMIC_RELAXED);
            };
            for (int r = 0; r < masks_per_group; ++r) {
                for (int c = 0; c < masks_per_group; ++c) {
                    if (shared[r][c] == 0) continue;
                    add(row + r, column + c, shared[r][c]);
                    if (row + r != column + c) add(column + c, row + r, shared[r][c]);
                }
            }
        }
    }
}

}  // namespace berdiff
