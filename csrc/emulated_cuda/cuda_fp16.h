// SPDX-License-Identifier: Apache-2.0
// CUDA on a CPU, for tests: what csrc/cuda uses of it and no more. Found in place of CUDA's own header of this name
// where BERDIFF_EMULATE_CUDA is set, and the kernels compile as C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulated_cuda/fibers.h"

#define __host__
#define __device__
#define __global__ static
#define __shared__ static __attribute__((section("emulated_shared")))
#define __launch_bounds__(...)

// ---------------------------------------------------------------------- words and floats

namespace berdiff::emulated {

// A GPU faults where a CPU may not.
template <class T>
void check_alignment(const T* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % alignof(T) == 0) return;
    std::fprintf(stderr, "emulated CUDA: a word of %zu bytes at an address that is not a multiple of %zu\n", sizeof(T),
                 alignof(T));
    std::abort();
}

template <class Word>
struct Words {
    Words() = default;
    Words(const Words&) = default;
    Words& operator=(const Words&) {
        check_alignment(static_cast<const Word*>(this));
        return *this;
    }
};

}  // namespace berdiff::emulated

struct alignas(8) uint2 : berdiff::emulated::Words<uint2> {
    unsigned x, y;
};
struct alignas(16) uint4 : berdiff::emulated::Words<uint4> {
    unsigned x, y, z, w;
};
static_assert(sizeof(uint2) == 8 && sizeof(uint4) == 16);

template <class T>
T __ldg(const T* p) {
    berdiff::emulated::check_alignment(p);
    return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned x) {
    float out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}
inline unsigned __float_as_uint(float x) {
    unsigned out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

struct __half {
    unsigned short bits;
};
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline float __half2float(__half h) {
    const unsigned sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 0x3ffu;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint(static_cast<float>(fraction) * 0x1p-24f));
    return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}

namespace berdiff::emulated {

// PTX rcp.approx.ftz: subnormal numbers count as zero, and the result may be off in its last place.
inline float reciprocal(float x) {
    const auto flush = [](float a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; };
    const float out = flush(1.0f / flush(x));
    if (settings.reciprocal_error == 0 || out == 0 || !std::isfinite(out)) return out;
    return __uint_as_float(__float_as_uint(out) + static_cast<unsigned>(settings.reciprocal_error));
}

}  // namespace berdiff::emulated

// ---------------------------------------------------------------------- threads that meet

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    berdiff::emulated::Block::instance().barrier({file, line});
}

template <class T>
T __shfl_down_sync(unsigned lanes, T x, int distance, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
    if (lanes != 0xffffffffu) {
        std::fprintf(stderr, "emulated CUDA: a shuffle of %s:%d without all lanes, which nothing here knows\n", file,
                     line);
        std::abort();
    }
    return berdiff::emulated::Block::instance().from_lane_below(x, distance, {file, line});
}

// Fibers are never interrupted.
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
    const unsigned long long before = *p;
    *p += x;
    return before;
}

// ---------------------------------------------------------------------- the runtime

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

// On the caller's thread; it returns when the grid has run.
template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments), const Arguments& a) {
    using namespace berdiff::emulated;
    const dim3 grid = config->gridDim, block = config->blockDim;
    if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
    if (block.x < 1 || block.x > 1024 || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
    struct Call {
        void (*kernel)(Arguments);
        const Arguments* a;
    } const call = {kernel, &a};
    const auto body = [](const void* c) { static_cast<const Call*>(c)->kernel(*static_cast<const Call*>(c)->a); };
    const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(grid.x, settings.most_blocks));
    Block::instance().run_grid(body, &call, blocks, block.x);
    return cudaSuccess;
}
