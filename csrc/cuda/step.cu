// SPDX-License-Identifier: Apache-2.0
// Op `step`: the next mask of a sampling step, or the probability it is drawn from.
#include "cuda/chunks.cuh"
#include "cuda/launch.h"

namespace berdiff::cuda {
namespace {

using L = ScalarLanes;

__device__ Coefficients read(const float* c) { return {c[0], c[1], c[2], c[3]}; }

template <bool threshold>
__global__ void step_kernel(StepArguments a) {
    const Coefficients coefficients = read(a.coefficients);
    bool nan = false;
    for_each_chunk(a.rows.rows, a.rows.pixels, [&](const Chunk& c) {
        std::uint32_t mask[chunk], words[chunk];
        float z[chunk];
        load_mask(a.y_t, c, mask);
        load_logits(a.logits, a.logits_type, c, z);
        if constexpr (!threshold) chunk_words(a.rows.philox(c.row, a.timestep, stream_sampling_step), c.pixel, words);
#pragma unroll
        for (int i = 0; i < chunk; ++i) {
            nan |= L::unordered(z[i], z[i]) != 0;
            const float logit = a.predicts_y0 ? epsilon_logit<L>(z[i], mask[i]) : z[i];
            if constexpr (threshold) {
                mask[i] ^= L::less(0.0f, logit);
            } else {
                const FlipOdds<L> odds = flip_odds<L>(logit, coefficients);
                mask[i] ^= L::less(L::mul(uniform<L>(words[i]), odds.denominator), odds.numerator);
            }
        }
        store_mask(a.out, c, mask);
    });
    // Every thread that finds a NaN writes the same value.
    if (nan) *a.nan_flag = 1;
}

__global__ void posterior_kernel(PosteriorArguments a) {
    const Coefficients coefficients = read(a.coefficients);
    for_each_chunk(1, a.size, [&](const Chunk& c) {
        std::uint32_t mask[chunk];
        float z[chunk];
        alignas(16) std::uint32_t mean[chunk];
        load_mask(a.y_t, c, mask);
        load_logits(a.logits, a.logits_type, c, z);
#pragma unroll
        for (int i = 0; i < chunk; ++i) {
            const float logit = a.predicts_y0 ? epsilon_logit<L>(z[i], mask[i]) : z[i];
            mean[i] = L::bits(posterior_mean<L>(logit, mask[i], coefficients));
        }
        store_elements(reinterpret_cast<std::uint32_t*>(a.out) + c.offset, c.live, mean);
    });
}

}  // namespace

void step(const StepArguments& a, void* stream) {
    launch(a.threshold ? step_kernel<true> : step_kernel<false>, a, a.rows.rows, a.rows.pixels, stream,
           "CUDA kernel sample_step");
}

void posterior(const PosteriorArguments& a, void* stream) {
    launch(posterior_kernel, a, 1, a.size, stream, "CUDA kernel posterior");
}

}  // namespace berdiff::cuda
