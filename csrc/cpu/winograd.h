// SPDX-License-Identifier: Apache-2.0
// A 3 x 3 convolution by Winograd's F(4 x 4, 3 x 3) (Lavin & Gray, arXiv 1509.09308), channels last: 36 products for
// 16 pixels instead of 144. A block of output tiles at a time goes through three stages, in cache: 6 x 6 input pixels
// of every channel are transformed, 36 matrix products take channels to channels, and 4 x 4 output pixels come back.
#pragma once

#include <cstdint>

#include "berdiff/arguments.h"
#include "cpu/kernels.h"

namespace berdiff {

// The transforms work on this many channels at a time, in plain loops that compilers turn into vectors.
constexpr std::int64_t winograd_span = 16;

// B^T d, for six vectors a stride apart.
BERDIFF_FN void winograd_input(const float* __restrict d, std::int64_t stride, float* __restrict out,
                               std::int64_t out_stride) {
    for (std::int64_t i = 0; i < winograd_span; ++i) {
        const float d0 = d[i], d1 = d[i + stride], d2 = d[i + 2 * stride];
        const float d3 = d[i + 3 * stride], d4 = d[i + 4 * stride], d5 = d[i + 5 * stride];
        out[i] = 4.0f * d0 - 5.0f * d2 + d4;
        out[i + out_stride] = d3 + d4 - 4.0f * (d1 + d2);
        out[i + 2 * out_stride] = d4 - d3 + 4.0f * (d1 - d2);
        out[i + 3 * out_stride] = 2.0f * (d3 - d1) + (d4 - d2);
        out[i + 4 * out_stride] = 2.0f * (d1 - d3) + (d4 - d2);
        out[i + 5 * out_stride] = 4.0f * d1 - 5.0f * d3 + d5;
    }
}

// A^T m, for six vectors a stride apart.
BERDIFF_FN void winograd_output(const float* __restrict m, std::int64_t stride, float* __restrict out,
                                std::int64_t out_stride) {
    for (std::int64_t i = 0; i < winograd_span; ++i) {
        const float a = m[i + stride] + m[i + 2 * stride], b = m[i + stride] - m[i + 2 * stride];
        const float c = m[i + 3 * stride] + m[i + 4 * stride], d = m[i + 3 * stride] - m[i + 4 * stride];
        out[i] = m[i] + a + c;
        out[i + out_stride] = b + 2.0f * d;
        out[i + 2 * out_stride] = a + 4.0f * c;
        out[i + 3 * out_stride] = b + 8.0f * d + m[i + 5 * stride];
    }
}

// out (rows, n) = v (rows, depth) times a panel (depth, winograd_panel), of which 4 * width columns are taken.
template <class L, int rows>
BERDIFF_FN void winograd_product(const float* v, std::int64_t depth, const float* panel, float* out, std::int64_t n) {
    using F = typename L::F;
    F sums[rows][4];
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < 4; ++j) sums[r][j] = L::f(0.0f);
    for (std::int64_t k = 0; k < depth; ++k, panel += winograd_panel) {
        F b[4];
        L::load(panel, b);
        BERDIFF_UNROLL
        for (int r = 0; r < rows; ++r) {
            const F a = L::f(v[r * depth + k]);
            BERDIFF_UNROLL
            for (int j = 0; j < 4; ++j) sums[r][j] = L::madd(a, b[j], sums[r][j]);
        }
    }
    for (int r = 0; r < rows; ++r) L::store(out + r * n, sums[r]);
}

// Output tiles [begin, end) of all images, in rows; scratch has winograd_scratch(a) floats.
template <class L>
void winograd_tiles(const WinogradArguments& a, std::int64_t begin, std::int64_t end, float* scratch) {
    constexpr int rows = L::width >= 16 ? 6 : 3;  // as many sums as there are registers for
    constexpr std::int64_t columns = 4 * L::width;
    const std::int64_t across = (a.width + 3) / 4, per_image = across * ((a.height + 3) / 4);
    const std::int64_t count = end - begin, room = winograd_block;
    const std::int64_t source_height = a.height >> a.upsample, source_width = a.width >> a.upsample;
    const std::int64_t wide = a.panels() * winograd_panel;
    float* const v = scratch;                           // (36, room, channels)
    float* const m = scratch + 36 * room * a.channels;  // (36, room, wide)

    for (std::int64_t t = 0; t < count; ++t) {
        const std::int64_t image = (begin + t) / per_image, tile = (begin + t) % per_image;
        const std::int64_t top = tile / across * 4 - 1, left = tile % across * 4 - 1;
        const float* const x = a.x + image * source_height * source_width * a.channels;
        for (std::int64_t c = 0; c < a.channels; c += winograd_span) {
            float d[6][6][winograd_span], half[6][6][winograd_span];
            for (std::int64_t i = 0; i < 6; ++i) {
                for (std::int64_t j = 0; j < 6; ++j) {
                    const std::int64_t row = top + i, column = left + j;
                    const bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
                    const float* const pixel =
                        x + ((row >> a.upsample) * source_width + (column >> a.upsample)) * a.channels + c;
                    for (std::int64_t k = 0; k < winograd_span; ++k) d[i][j][k] = inside ? pixel[k] : 0.0f;
                }
            }
            for (std::int64_t j = 0; j < 6; ++j)
                winograd_input(d[0][j], 6 * winograd_span, half[0][j], 6 * winograd_span);
            for (std::int64_t i = 0; i < 6; ++i)
                winograd_input(half[i][0], winograd_span, v + (6 * i * room + t) * a.channels + c, room * a.channels);
        }
    }
    // Rows that fill up the last group of a product are computed on what lies there; nobody reads them.
    for (std::int64_t e = 0; e < 36; ++e) {
        for (std::int64_t n = 0; n < a.outputs; n += columns) {
            const float* const panel =
                a.weight + (e * a.panels() + n / winograd_panel) * a.channels * winograd_panel + n % winograd_panel;
            for (std::int64_t t = 0; t < count; t += rows)
                winograd_product<L, rows>(v + (e * room + t) * a.channels, a.channels, panel,
                                          m + (e * room + t) * wide + n, wide);
        }
    }
    for (std::int64_t t = 0; t < count; ++t) {
        const std::int64_t image = (begin + t) / per_image, tile = (begin + t) % per_image;
        const std::int64_t top = tile / across * 4, left = tile % across * 4;
        const std::int64_t height = a.height - top < 4 ? a.height - top : 4;
        const std::int64_t width = a.width - left < 4 ? a.width - left : 4;
        for (std::int64_t o = 0; o < a.outputs; o += winograd_span) {
            float half[4][6][winograd_span], pixels[4][4][winograd_span];
            for (std::int64_t j = 0; j < 6; ++j)
                winograd_output(m + (j * room + t) * wide + o, 6 * room * wide, half[0][j], 6 * winograd_span);
            for (std::int64_t i = 0; i < 4; ++i)
                winograd_output(half[i][0], winograd_span, pixels[i][0], winograd_span);
            for (std::int64_t i = 0; i < height; ++i) {
                for (std::int64_t j = 0; j < width; ++j) {
                    const std::int64_t at = ((image * a.height + top + i) * a.width + left + j) * a.outputs + o;
                    for (std::int64_t k = 0; k < winograd_span; ++k) {
                        const float y = pixels[i][j][k] + a.bias[o + k];
                        a.out[at + k] = a.residual ? y + a.residual[at + k] : y;
                    }
                }
            }
        }
    }
}

}  // namespace berdiff
