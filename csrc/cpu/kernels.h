// SPDX-License-Identifier: Apache-2.0
// The CPU kernels as the rest of the module sees them: one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "berdiff/arguments.h"

namespace berdiff {

// A kernel works on pixels [begin, end) of one row; begin is a multiple of `tile`, so that a Philox block is never
// shared by two calls.
constexpr std::int64_t tile = 4096;

struct Kernels {
    const char* name;
    void (*initial_noise)(const InitialNoiseArguments&, std::int64_t row, std::int64_t begin, std::int64_t end);
    void (*q_sample)(const QSampleArguments&, std::int64_t row, std::int64_t begin, std::int64_t end);
    void (*sample_step)(const SampleStepArguments&, std::int64_t row, std::int64_t begin, std::int64_t end);
    // The posterior draws nothing: its tensors are one row of `size` pixels.
    void (*posterior)(const PosteriorArguments&, std::int64_t row, std::int64_t begin, std::int64_t end);
    void (*diffusion_loss)(const DiffusionLossArguments&, std::int64_t row, std::int64_t begin, std::int64_t end);
    // Words of blocks [first_block, first_block + blocks), for tests of the index arithmetic.
    void (*words)(const PhiloxRow&, std::uint32_t first_block, std::int64_t blocks, std::uint32_t* out);
    // Adds to what other calls found; any span of pixels whose beginning is a multiple of `tile`.
    void (*overlap)(const OverlapArguments&, std::int64_t image, std::int64_t begin, std::int64_t end);
    // Both take any span of pixels. The first adds to `sums`, the second wants what `group_norm_factors` makes of them.
    void (*group_norm_sums)(const GroupNormSiluArguments&, std::int64_t image, std::int64_t begin, std::int64_t end,
                            double* sums);
    void (*group_norm_apply)(const GroupNormSiluArguments&, std::int64_t image, std::int64_t begin, std::int64_t end,
                             const float* scale, const float* shift);
    // At most `winograd_block` tiles at a time.
    void (*winograd_tiles)(const WinogradArguments&, std::int64_t begin, std::int64_t end, float* scratch);
};

// Null where the instruction set was not compiled.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace berdiff
