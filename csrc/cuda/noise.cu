// SPDX-License-Identifier: Apache-2.0
// Op `noise`: masks from B(1/2), and the forward process.
#include "cuda/chunks.cuh"
#include "cuda/launch.h"

namespace berdiff::cuda {
namespace {

using L = ScalarLanes;

__global__ void noise_kernel(NoiseArguments a) {
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

}  // namespace

void noise(const NoiseArguments& a, void* stream) {
    launch(noise_kernel, a, a.rows.rows, a.rows.pixels, stream, "CUDA kernel initial_noise");
}

void q_sample(const QSampleArguments& a, void* stream) {
    launch(q_sample_kernel, a, a.rows.rows, a.rows.pixels, stream, "CUDA kernel q_sample");
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
