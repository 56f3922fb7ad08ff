// SPDX-License-Identifier: Apache-2.0
// Function qualifiers that let one header serve the CPU compilers and nvcc.
#pragma once

#if defined(__CUDACC__)
#define BERDIFF_FN __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define BERDIFF_FN __forceinline
#else
// always_inline is correctness, not taste: the same templates are compiled once per instruction set,
// and an out-of-line copy could be merged by the linker with one the running CPU cannot execute.
#define BERDIFF_FN inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(__clang__)
#define BERDIFF_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define BERDIFF_UNROLL _Pragma("GCC unroll 16")
#else
#define BERDIFF_UNROLL
#endif
