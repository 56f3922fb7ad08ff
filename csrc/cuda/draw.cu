// SPDX-License-Identifier: Apache-2.0
// The ops that draw: `initial_noise` (masks from B(1/2)), `q_sample` (the forward process), `sample_step` (the next
// mask of a sampling step) and `posterior` (the probability that it is drawn from).
#include "cuda/chunks.cuh"
#include "cuda/launch.h"

namespace berdiff::cuda {
namespace {

using L = ScalarLanes;

__global__ void initial_noise_kernel(InitialNoiseArguments a) {
    for_each_chunk(a.rows.rows, a.rows.pixels, [&](const Chunk& c) {
        std::uint32_t words[chunk];
        chunk_words(a.rows.philox(c.row, 0, stream_initial_noise), c.pixel, words);
#pragma unroll
        for (int i = 0; i < chunk; ++i) words[i] = L::top_bit_clear(words[i]);
        store_mask(a.out, c, words);
    });
}

__global__ void q_sample_kernel(QSampleArguments a) {
    for_each_chunk(a.rows.rows, a.rows.pixels, [&](const Chunk& c) {
        std::uint32_t words[chunk], mask[chunk];
        load_mask(a.y_0, c, mask);
        chunk_words(a.rows.philox(c.row, static_cast<std::uint32_t>(a.t[c.row]), stream_training_noise), c.pixel,
                    words);
        const float flip_zero = a.flip[2 * c.row];
        const float flip_one = a.flip[2 * c.row + 1];
#pragma unroll
        for (int i = 0; i < chunk; ++i)
            mask[i] ^= L::less(uniform<L>(words[i]), L::select(mask[i], flip_one, flip_zero));
        store_mask(a.out, c, mask);
    });
}

__device__ Coefficients read(const float* c) { return {c[0], c[1], c[2], c[3]}; }

template <bool threshold>
__global__ void sample_step_kernel(SampleStepArguments a) {
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

void initial_noise(const InitialNoiseArguments& a, void* stream) {
    launch(initial_noise_kernel, a, a.rows.rows, a.rows.pixels, stream, "CUDA kernel initial_noise");
}

void q_sample(const QSampleArguments& a, void* stream) {
    launch(q_sample_kernel, a, a.rows.rows, a.rows.pixels, stream, "CUDA kernel q_sample");
}

void sample_step(const SampleStepArguments& a, void* stream) {
    launch(a.threshold ? sample_step_kernel<true> : sample_step_kernel<false>, a, a.rows.rows, a.rows.pixels, stream,
           "CUDA kernel sample_step");
}

void posterior(const PosteriorArguments& a, void* stream) {
    launch(posterior_kernel, a, 1, a.size, stream, "CUDA kernel posterior");
}

void locate_chunk(std::int64_t index, std::int64_t pixels, std::int64_t (&out)[4]) {
    const Chunk c = locate(index, pixels);
    out[0] = c.row;
    out[1] = c.pixel;
    out[2] = c.offset;
    out[3] = c.live;
}

int device_count() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "CUDA runtime");
    return count;
}

}  // namespace berdiff::cuda
