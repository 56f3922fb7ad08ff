// SPDX-License-Identifier: Apache-2.0
// The ops on a CPU: arguments that were checked, cut into tiles for threads. No Python here, so that a program can run
// them by itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "berdiff/arguments.h"
#include "cpu/dispatch.h"

namespace berdiff {

// Mean and variance of the groups, as the factors by which `group_norm_apply` normalises: C scales, then C shifts.
inline void group_norm_factors(const GroupNormSiluArguments& a, std::int64_t image, const double* sums,
                               float* factors) {
    const std::int64_t channels = a.channels(), size = channels / a.groups;
    const double pixels = static_cast<double>(a.pixels);
    const auto channel_mean = [&](std::int64_t c) {
        const bool second = c >= a.sources[0].channels;
        const GroupNormSource& source = a.sources[second];
        const std::int64_t inside = second ? c - a.sources[0].channels : c;
        return source.data[image * a.pixels * source.channels + inside] + sums[c] / pixels;
    };
    for (std::int64_t begin = 0; begin < channels; begin += size) {
        double mean = 0, squares = 0;
        for (std::int64_t c = begin; c < begin + size; ++c) mean += channel_mean(c) / static_cast<double>(size);
        for (std::int64_t c = begin; c < begin + size; ++c) {
            const double off = channel_mean(c) - mean;
            squares += sums[channels + c] - sums[c] * sums[c] / pixels + pixels * off * off;
        }
        const double deviation = std::sqrt(squares / (pixels * static_cast<double>(size)) + a.eps);
        for (std::int64_t c = begin; c < begin + size; ++c) {
            const double scale = a.weight[c] / deviation;
            factors[c] = static_cast<float>(scale);
            factors[channels + c] = static_cast<float>(a.bias[c] - mean * scale);
        }
    }
}

struct CpuBackend {
    template <class Arguments>
    using Kernel = void (*)(const Arguments&, std::int64_t, std::int64_t, std::int64_t);

    template <class Arguments>
    static void run(Kernel<Arguments> kernel, const Arguments& a, std::int64_t rows, std::int64_t pixels,
                    std::int64_t threads) {
        for_each_tile(
            rows, pixels, static_cast<int>(threads),
            [&, kernel](std::int64_t row, std::int64_t begin, std::int64_t end) { kernel(a, row, begin, end); });
    }

    static void initial_noise(const InitialNoiseArguments& a, std::int64_t threads) {
        run(kernels().initial_noise, a, a.rows.rows, a.rows.pixels, threads);
    }
    static void q_sample(const QSampleArguments& a, std::int64_t threads) {
        run(kernels().q_sample, a, a.rows.rows, a.rows.pixels, threads);
    }
    static void sample_step(const SampleStepArguments& a, std::int64_t threads) {
        run(kernels().sample_step, a, a.rows.rows, a.rows.pixels, threads);
    }
    static void posterior(const PosteriorArguments& a, std::int64_t threads) {
        run(kernels().posterior, a, 1, a.size, threads);
    }
    static void overlap(const OverlapArguments& a, std::int64_t threads) {
        // A call adds up to `masks` squared counts to the output: rather few calls with many pixels.
        const auto kernel = kernels().overlap;
        for_each_tile(
            a.images, a.pixels, static_cast<int>(threads),
            [&, kernel](std::int64_t image, std::int64_t begin, std::int64_t end) { kernel(a, image, begin, end); },
            16 * tile);
    }
    static void group_norm_silu(const GroupNormSiluArguments& a, std::int64_t threads) {
        // Sums are taken over spans of fixed size and added up in their order, so that a result depends neither on the
        // number of threads nor on the other images.
        constexpr std::int64_t span = 1024;
        const Kernels& k = kernels();
        const std::size_t numbers = 2 * static_cast<std::size_t>(a.channels());
        const std::int64_t spans = (a.pixels + span - 1) / span;
        const std::int64_t pixels_per_thread = std::max<std::int64_t>(1, 65536 / a.channels());
        const auto sums = [&](std::int64_t image, std::int64_t begin, std::int64_t end, double* out) {
            k.group_norm_sums(a, image, begin, end, out + numbers * static_cast<std::size_t>(begin / span));
        };
        const auto factors = [&](std::int64_t image, double* of_spans, float* out) {
            for (std::size_t i = numbers; i < numbers * static_cast<std::size_t>(spans); ++i)
                of_spans[i % numbers] += of_spans[i];
            group_norm_factors(a, image, of_spans, out);
        };
        const auto apply = [&](std::int64_t image, std::int64_t begin, std::int64_t end, const float* in) {
            k.group_norm_apply(a, image, begin, end, in, in + a.channels());
        };
        const std::size_t at_once = a.images >= threads ? static_cast<std::size_t>(a.images) : 1;
        std::vector<double> all_sums(at_once * numbers * static_cast<std::size_t>(spans));
        std::vector<float> all_factors(at_once * numbers);
        if (a.images >= threads) {
            // An image by one thread, in whose cache much of it still is when it comes to the second pass.
            for_each_tile(
                a.images, a.pixels, static_cast<int>(threads),
                [&](std::int64_t image, std::int64_t begin, std::int64_t end) {
                    const std::size_t i = static_cast<std::size_t>(image);
                    double* const of_spans = all_sums.data() + i * numbers * static_cast<std::size_t>(spans);
                    float* const of_image = all_factors.data() + i * numbers;
                    for (std::int64_t p = begin; p < end; p += span) sums(image, p, std::min(p + span, end), of_spans);
                    factors(image, of_spans, of_image);
                    apply(image, begin, end, of_image);
                },
                a.pixels, pixels_per_thread);
            return;
        }
        for (std::int64_t image = 0; image < a.images; ++image) {
            std::fill(all_sums.begin(), all_sums.end(), 0.0);
            for_each_tile(
                1, a.pixels, static_cast<int>(threads),
                [&](std::int64_t, std::int64_t begin, std::int64_t end) { sums(image, begin, end, all_sums.data()); },
                span, pixels_per_thread);
            factors(image, all_sums.data(), all_factors.data());
            for_each_tile(
                1, a.pixels, static_cast<int>(threads),
                [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                    apply(image, begin, end, all_factors.data());
                },
                span, pixels_per_thread);
        }
    }
    static void winograd(const WinogradArguments& a, std::int64_t threads) {
        const auto kernel = kernels().winograd_tiles;
        // A tile is worth some thousand pixels of other kernels.
        const std::int64_t tiles_per_thread = std::max<std::int64_t>(1, 1000000 / (a.channels * a.outputs * 18));
        for_each_tile(
            1, a.tiles(), static_cast<int>(threads),
            [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                thread_local std::vector<float> scratch;
                scratch.resize(static_cast<std::size_t>(a.scratch()));
                kernel(a, begin, end, scratch.data());
            },
            winograd_block, tiles_per_thread);
    }
    static void diffusion_loss(const DiffusionLossArguments& a, std::int64_t threads) {
        run(kernels().diffusion_loss, a, a.rows, a.pixels, threads);
        const double* partial = a.partial;
        for (std::int64_t row = 0; row < a.rows; ++row, partial += a.tiles_per_row())
            a.value[row] = static_cast<float>(std::accumulate(partial, partial + a.tiles_per_row(), 0.0));
    }
};

}  // namespace berdiff
