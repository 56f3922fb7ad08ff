// SPDX-License-Identifier: Apache-2.0
// Op `overlap`: how many pixels any two masks of an image share.
#include "cuda/chunks.cuh"
#include "cuda/launch.h"

namespace berdiff::cuda {
namespace {

// A block packs a span of pixels of one or two groups of masks into bits, and compares each with each.
constexpr int masks_per_group = 32;
constexpr int span = 4096;
constexpr int words_per_span = span / 32;
constexpr int warps = threads_per_block / 32;

// A word more than there are pixels for: threads of a warp read the same word of 32 masks, from 32 banks.
using PackedGroup = std::uint32_t[masks_per_group][words_per_span + 1];

__host__ __device__ inline std::int64_t groups(const OverlapArguments& a) {
    return (a.masks() + masks_per_group - 1) / masks_per_group;
}

__host__ __device__ inline std::int64_t spans(const OverlapArguments& a) { return (a.pixels + span - 1) / span; }

__host__ __device__ inline std::int64_t pairs_of_groups(const OverlapArguments& a) {
    return groups(a) * (groups(a) + 1) / 2;
}

__device__ void pack(const OverlapArguments& a, std::int64_t image, std::int64_t first, std::int64_t begin,
                     PackedGroup& packed) {
    constexpr int chunks = span / chunk;
    for (int i = threadIdx.x; i < masks_per_group * chunks; i += threads_per_block) {
        const int mask = i / chunks, part = i % chunks;
        const std::int64_t rest = a.pixels - begin - part * chunk;
        std::uint32_t bits = 0;
        if (first + mask < a.masks() && rest > 0) {
            Chunk c = {0, 0, begin + part * chunk, rest < chunk ? static_cast<int>(rest) : chunk};
            const ConstMask source = a.mask(image, first + mask, c.offset);
            std::uint32_t pixels[chunk];
            load_mask(source, c, pixels);
#pragma unroll
            for (int j = 0; j < chunk; ++j) bits |= (pixels[j] & 1u) << j;
        }
        reinterpret_cast<std::uint16_t*>(packed[mask])[part] = static_cast<std::uint16_t>(bits);
    }
}

__device__ void add(std::int64_t* out, int pixels) {
    // Sums of integers do not depend on the order.
    atomicAdd(reinterpret_cast<unsigned long long*>(out), static_cast<unsigned long long>(pixels));
}

__global__ void __launch_bounds__(threads_per_block) overlap_kernel(OverlapArguments a) {
    __shared__ PackedGroup row_bits, column_bits;
    const std::int64_t total = a.images * spans(a) * pairs_of_groups(a);
    for (std::int64_t work = blockIdx.x; work < total; work += gridDim.x) {
        std::int64_t row = 0, column = work % pairs_of_groups(a);
        while (column >= groups(a) - row) column -= groups(a) - row++;
        column += row;
        const std::int64_t image = work / pairs_of_groups(a) / spans(a);
        const std::int64_t begin = work / pairs_of_groups(a) % spans(a) * span;
        const bool same = row == column;
        pack(a, image, row * masks_per_group, begin, row_bits);
        if (!same) pack(a, image, column * masks_per_group, begin, column_bits);
        __syncthreads();

        // A thread has one column and every eighth row.
        const PackedGroup& columns = same ? row_bits : column_bits;
        const std::uint32_t* const mine = columns[threadIdx.x % 32];
        const int warp = threadIdx.x / 32;
        int shared[masks_per_group / warps] = {};
        for (int word = 0; word < words_per_span; ++word) {
#pragma unroll
            for (int i = 0; i < masks_per_group / warps; ++i)
                shared[i] += __popc(mine[word] & row_bits[warp + i * warps][word]);
        }
        // Masks that do not exist have no pixels and add nothing.
        std::int64_t* const out = a.out + image * a.masks() * a.masks();
        const std::int64_t c = column * masks_per_group + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < masks_per_group / warps; ++i) {
            const std::int64_t r = row * masks_per_group + warp + i * warps;
            if (shared[i] == 0) continue;
            add(out + r * a.masks() + c, shared[i]);
            if (!same) add(out + c * a.masks() + r, shared[i]);
        }
        __syncthreads();
    }
}

}  // namespace

void overlap(const OverlapArguments& a, void* stream) {
    launch_blocks(overlap_kernel, a, a.images * spans(a) * pairs_of_groups(a), threads_per_block, stream,
                  "CUDA kernel overlap");
}

}  // namespace berdiff::cuda
