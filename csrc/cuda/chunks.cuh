// SPDX-License-Identifier: Apache-2.0
// How a grid walks the rows: every thread takes chunks of 16 pixels, four Philox blocks, so that byte masks move in
// 16-byte words. All indices are 64-bit.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "berdiff/arguments.h"
#include "berdiff/draw.h"
#include "berdiff/philox.h"
#include "berdiff/scalar.h"

namespace berdiff::cuda {

constexpr int chunk = 16;
constexpr int threads_per_block = 256;

struct Chunk {
    std::int64_t row, pixel, offset;  // the chunk's row, its first pixel there, and that pixel's place in memory
    int live;                         // how many of its pixels there are
};

__host__ __device__ inline std::int64_t chunks_per_row(std::int64_t pixels) { return (pixels + chunk - 1) / chunk; }

__host__ __device__ inline Chunk locate(std::int64_t index, std::int64_t pixels) {
    const std::int64_t per_row = chunks_per_row(pixels);
    const std::int64_t row = index / per_row;
    const std::int64_t pixel = (index - row * per_row) * chunk;
    const std::int64_t rest = pixels - pixel;
    return {row, pixel, row * pixels + pixel, rest < chunk ? static_cast<int>(rest) : chunk};
}

// body(chunk) for every chunk of every row, grid-stride.
template <class Body>
__device__ void for_each_chunk(std::int64_t rows, std::int64_t pixels, Body&& body) {
    const std::int64_t total = rows * chunks_per_row(pixels);
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride)
        body(locate(i, pixels));
}

__device__ inline void chunk_words(const PhiloxRow& row, std::int64_t pixel, std::uint32_t (&words)[chunk]) {
    const PhiloxKeys<ScalarLanes> keys(row);
    std::uint32_t blocks[chunk / 4], quads[chunk / 4][4];
#pragma unroll
    for (int b = 0; b < chunk / 4; ++b) blocks[b] = static_cast<std::uint32_t>(pixel >> 2) + b;
    philox4x32<ScalarLanes, chunk / 4>(row, keys, blocks, quads);
#pragma unroll
    for (int i = 0; i < chunk; ++i) words[i] = quads[i / 4][i % 4];
}

// The widest word that moves so many bytes: 16, or all of them where they are fewer.
template <int bytes>
using Word = std::conditional_t<bytes % 16 == 0, uint4, std::conditional_t<bytes % 8 == 0, uint2, std::uint32_t>>;

// The elements of a chunk (a whole one, or its first few), in wide words where they are all there and aligned.
template <class T, int n>
__device__ void load_elements(const T* p, int live, T (&x)[n]) {
    using W = Word<static_cast<int>(n * sizeof(T))>;
    if (live == n && reinterpret_cast<std::uintptr_t>(p) % sizeof(W) == 0) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(x) / sizeof(W)); ++i)
            reinterpret_cast<W*>(x)[i] = __ldg(reinterpret_cast<const W*>(p) + i);
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = i < live ? p[i] : T(0);
    }
}

template <class T, int n>
__device__ void store_elements(T* p, int live, const T (&x)[n]) {
    using W = Word<static_cast<int>(n * sizeof(T))>;
    if (live == n && reinterpret_cast<std::uintptr_t>(p) % sizeof(W) == 0) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(x) / sizeof(W)); ++i)
            reinterpret_cast<W*>(p)[i] = reinterpret_cast<const W*>(x)[i];
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (i < live) p[i] = x[i];
    }
}

template <class T, int n>
__device__ void load_bits(const void* data, const Chunk& c, std::uint32_t value_bits, std::uint32_t (&mask)[n]) {
    alignas(16) T x[n];
    load_elements(static_cast<const T*>(data) + c.offset, c.live, x);
#pragma unroll
    for (int i = 0; i < n; ++i) mask[i] = x[i] & value_bits ? ~0u : 0u;
}

// All threads take the same branch, so one kernel serves every type of mask.
template <int n>
__device__ void load_mask(const ConstMask& mask, const Chunk& c, std::uint32_t (&bits)[n]) {
    switch (mask.type) {
        case Type::u8: load_bits<std::uint8_t>(mask.data, c, 0xffu, bits); break;
        case Type::f32: load_bits<std::uint32_t>(mask.data, c, 0x7fffffffu, bits); break;
        default: load_bits<std::uint16_t>(mask.data, c, 0x7fffu, bits); break;
    }
}

template <class T>
__device__ void store_bits(void* data, const Chunk& c, std::uint32_t one, const std::uint32_t (&mask)[chunk]) {
    alignas(16) T x[chunk];
#pragma unroll
    for (int i = 0; i < chunk; ++i) x[i] = static_cast<T>(mask[i] & one);
    store_elements(static_cast<T*>(data) + c.offset, c.live, x);
}

__device__ inline void store_mask(const Mask& mask, const Chunk& c, const std::uint32_t (&bits)[chunk]) {
    const std::uint32_t one = one_bits(mask.type);
    switch (mask.type) {
        case Type::u8: store_bits<std::uint8_t>(mask.data, c, one, bits); break;
        case Type::f32: store_bits<std::uint32_t>(mask.data, c, one, bits); break;
        default: store_bits<std::uint16_t>(mask.data, c, one, bits); break;
    }
}

template <int n>
__device__ void load_logits(const void* data, Type type, const Chunk& c, float (&z)[n]) {
    if (type == Type::f32) {
        alignas(16) std::uint32_t x[n];
        load_elements(static_cast<const std::uint32_t*>(data) + c.offset, c.live, x);
#pragma unroll
        for (int i = 0; i < n; ++i) z[i] = __uint_as_float(x[i]);
        return;
    }
    alignas(16) std::uint16_t x[n];
    load_elements(static_cast<const std::uint16_t*>(data) + c.offset, c.live, x);
#pragma unroll
    for (int i = 0; i < n; ++i)
        z[i] = type == Type::bf16 ? __uint_as_float(static_cast<std::uint32_t>(x[i]) << 16)
                                  : __half2float(__ushort_as_half(x[i]));
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Every launch of the module: a grid of `blocks`, or as many as there can be, since kernels walk in its strides;
// nothing where there are none. A call and not <<<>>>, so that a C++ compiler takes it too (csrc/emulated_cuda).
template <class Arguments>
void launch_blocks(void (*kernel)(Arguments), const Arguments& a, std::int64_t blocks, int threads, void* stream,
                   const char* what) {
    if (blocks == 0) return;
    const std::int64_t most = 0x7fffffff;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks < most ? blocks : most));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, a), what);
}

// A thread for every chunk.
template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& a, std::int64_t rows, std::int64_t pixels, void* stream,
            const char* what) {
    const std::int64_t chunks = rows * chunks_per_row(pixels);
    launch_blocks(kernel, a, (chunks + threads_per_block - 1) / threads_per_block, threads_per_block, stream, what);
}

}  // namespace berdiff::cuda
