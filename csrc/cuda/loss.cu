// SPDX-License-Identifier: Apache-2.0
// Op `diffusion_loss`: bits of every mask, and their gradient by the logits, in one pass. A block takes a tile of a row
// and leaves its sum; a second, small kernel adds up the tiles of each row. Both add in an order that the shape alone
// fixes.
#include "cuda/chunks.cuh"
#include "cuda/launch.h"

namespace berdiff::cuda {
namespace {

using L = ScalarLanes;

// Four pixels of float32 are one 16-byte word, and the words of neighbouring threads are neighbours.
constexpr int quad = 4;
constexpr int warp = 32;
static_assert(loss_tile % (quad * threads_per_block) == 0, "every thread takes whole quads");

template <class T>
__device__ T sum_of_warp(T x) {
#pragma unroll
    for (int distance = warp / 2; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
    return x;
}

__device__ void store_gradient(const DiffusionLossArguments& a, const Chunk& c, const float (&slope)[quad]) {
    if (a.gradient_type == Type::f32) {
        alignas(16) float x[quad];
#pragma unroll
        for (int i = 0; i < quad; ++i) x[i] = slope[i];
        store_elements(static_cast<float*>(a.gradient) + c.offset, c.live, x);
    } else {
        alignas(16) std::uint16_t x[quad];
#pragma unroll
        for (int i = 0; i < quad; ++i) x[i] = static_cast<std::uint16_t>(bfloat16_bits<L>(slope[i]));
        store_elements(static_cast<std::uint16_t*>(a.gradient) + c.offset, c.live, x);
    }
}

// The gradient of a few pixels; returns the sum of their bits.
__device__ float loss_of_quad(const DiffusionLossArguments& a, const Chunk& c, const LossRow<L>& row) {
    constexpr std::uint32_t sign = 0x80000000u;
    std::uint32_t y_t[quad], y_0[quad], ignored[quad] = {};
    float z[quad], bits[quad];
    load_mask(a.y_t, c, y_t);
    load_mask(a.y_0, c, y_0);
    load_logits(a.logits, a.logits_type, c, z);
    if (a.ignore.data) load_mask(a.ignore, c, ignored);
#pragma unroll
    for (int i = 0; i < quad; ++i) {
        const std::uint32_t epsilon = y_t[i] ^ y_0[i];
        const std::uint32_t truth = (a.predicts_y0 ? y_0[i] : epsilon) & sign;
        const LossCase<L> known = epsilon ? row.one : row.zero;
        const Belief<L> b = belief<L>(L::from_bits(L::bits(z[i]) ^ truth ^ sign));
        const Consequence<L> q = consequence<L>(b.right, b.wrong, known, row.bce_weight);
        const bool counts = i < c.live && !ignored[i];
        bits[i] = counts ? loss_bits<L>(q, b.bce, known, row.bce_weight) : 0.0f;
        z[i] = counts ? L::from_bits(L::bits(q.slope) ^ truth) : 0.0f;
    }
    store_gradient(a, c, z);
    return (bits[0] + bits[1]) + (bits[2] + bits[3]);
}

__global__ void __launch_bounds__(threads_per_block) diffusion_loss_kernel(DiffusionLossArguments a) {
    __shared__ LossRow<L> constants;
    __shared__ float sums[threads_per_block / warp];
    const std::int64_t tiles_per_row = a.tiles_per_row();
    for (std::int64_t tile = blockIdx.x; tile < a.rows * tiles_per_row; tile += gridDim.x) {
        const std::int64_t row = tile / tiles_per_row;
        const std::int64_t first = (tile - row * tiles_per_row) * loss_tile;
        if (threadIdx.x == 0) constants = a.row(row);
        __syncthreads();
        float sum = 0;
#pragma unroll 1
        for (int i = 0; i < loss_tile; i += quad * threads_per_block) {
            const std::int64_t pixel = first + i + quad * static_cast<int>(threadIdx.x);
            const std::int64_t rest = a.pixels - pixel;
            if (rest <= 0) break;
            const Chunk c = {row, pixel, row * a.pixels + pixel, rest < quad ? static_cast<int>(rest) : quad};
            sum += loss_of_quad(a, c, constants);
        }
        sum = sum_of_warp(sum);
        if (threadIdx.x % warp == 0) sums[threadIdx.x / warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            double total = 0;
            for (const float s : sums) total += s;
            a.partial[tile] = total;
        }
    }
}

// A warp for each row.
__global__ void diffusion_loss_value_kernel(DiffusionLossArguments a) {
    const std::int64_t tiles_per_row = a.tiles_per_row();
    for (std::int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        double sum = 0;
        for (std::int64_t tile = threadIdx.x; tile < tiles_per_row; tile += warp)
            sum += a.partial[row * tiles_per_row + tile];
        sum = sum_of_warp(sum);
        if (threadIdx.x == 0) a.value[row] = static_cast<float>(sum);
    }
}

}  // namespace

void diffusion_loss(const DiffusionLossArguments& a, void* stream) {
    const std::int64_t tiles = a.rows * a.tiles_per_row();
    if (tiles == 0) return;
    launch_blocks(diffusion_loss_kernel, a, tiles, threads_per_block, stream, "CUDA kernel diffusion_loss");
    launch_blocks(diffusion_loss_value_kernel, a, a.rows, warp, stream, "CUDA kernel diffusion_loss, second stage");
}

}  // namespace berdiff::cuda
