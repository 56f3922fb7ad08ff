// SPDX-License-Identifier: Apache-2.0
// Op `group_norm_silu`, channels last. Plain loops over the channels of a pixel, which every compiler makes vectors of:
// there is nothing here that lanes would do better.
#pragma once

#include <cstdint>

#include "berdiff/arguments.h"
#include "berdiff/draw.h"
#include "cpu/kernels.h"

namespace berdiff {

// Adds to sums[0 .. C) what the channels differ from the image's first pixel, and to sums[C .. 2 C) the squares of it:
// taking a value of the channel itself away keeps the variance exact where the mean is large.
template <class L>
void group_norm_sums(const GroupNormSiluArguments& a, std::int64_t image, std::int64_t begin, std::int64_t end,
                     double* sums) {
    constexpr std::int64_t pixels = 32, channels = 64;  // summed in float32, on the stack
    double* const squares = sums + a.channels();
    std::int64_t base = 0;
    for (const GroupNormSource& source : a.sources) {
        const float* const first = source.data + image * a.pixels * source.channels;
        for (std::int64_t pixel = begin; pixel < end; pixel += pixels) {
            const std::int64_t last = end - pixel < pixels ? end : pixel + pixels;
            for (std::int64_t c = 0; c < source.channels; c += channels) {
                const std::int64_t count = source.channels - c < channels ? source.channels - c : channels;
                float sum[channels] = {}, square[channels] = {};
                for (std::int64_t p = pixel; p < last; ++p) {
                    const float* const x = first + p * source.channels + c;
                    for (std::int64_t i = 0; i < count; ++i) {
                        const float d = x[i] - first[c + i];
                        sum[i] += d;
                        square[i] += d * d;
                    }
                }
                for (std::int64_t i = 0; i < count; ++i) {
                    sums[base + c + i] += sum[i];
                    squares[base + c + i] += square[i];
                }
            }
        }
        base += source.channels;
    }
}

// y = x scale + shift, then y sigmoid(y).
template <class L>
void group_norm_apply(const GroupNormSiluArguments& a, std::int64_t image, std::int64_t begin, std::int64_t end,
                      const float* scale, const float* shift) {
    std::int64_t base = 0;
    for (const GroupNormSource& source : a.sources) {
        const float* x = source.data + (image * a.pixels + begin) * source.channels;
        float* out = a.out + (image * a.pixels + begin) * a.channels() + base;
        const float* const s = scale + base;
        const float* const h = shift + base;
        const std::int64_t count = source.channels;
        for (std::int64_t pixel = begin; pixel < end; ++pixel, x += count, out += a.channels()) {
            if (a.silu) {
                for (std::int64_t c = 0; c < count; ++c) {
                    const float y = x[c] * s[c] + h[c];
                    out[c] = y / (1.0f + exp_negative<ScalarLanes>(y));
                }
            } else {
                for (std::int64_t c = 0; c < count; ++c) out[c] = x[c] * s[c] + h[c];
            }
        }
        base += count;
    }
}

}  // namespace berdiff
