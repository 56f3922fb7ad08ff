// SPDX-License-Identifier: Apache-2.0
// What the Python side hands to a kernel, the same for CPU and CUDA. Pointers address contiguous memory.
#pragma once

#include <cstdint>

#include "berdiff/draw.h"
#include "berdiff/loss.h"
#include "berdiff/philox.h"
#include "berdiff/portability.h"

namespace berdiff {

// Element types, numbered as in berdiff_fast/backends/native.py. Masks may have any of them, logits a float.
enum class Type : int { u8 = 0, f16 = 1, bf16 = 2, f32 = 3 };

// The rows of a call are masks, one after another. Row r is mask number first_row + r of a batch in which each
// image has samples_per_image masks; sample indices start at first_sample, plus an image's own first one where it has
// one.
struct Rows {
    std::int64_t rows, pixels;
    std::int64_t samples_per_image, first_row, first_sample;
    const std::int64_t* seeds;  // seed_columns per image: its seed and, in the second, its first sample
    std::int64_t seed_columns;

    BERDIFF_FN PhiloxRow philox(std::int64_t row, std::uint32_t tag, std::uint32_t stream) const {
        const std::int64_t mask = first_row + row;
        const std::int64_t* of_image = seeds + mask / samples_per_image * seed_columns;
        const std::uint64_t seed = static_cast<std::uint64_t>(of_image[0]);
        const std::int64_t first = first_sample + (seed_columns > 1 ? of_image[1] : 0);
        return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                static_cast<std::uint32_t>(first + mask % samples_per_image), tag, stream};
    }
};

struct Mask {
    void* data;
    Type type;
};

struct ConstMask {
    const void* data;
    Type type;
};

struct InitialNoiseArguments {
    Rows rows;
    Mask out;
};

struct QSampleArguments {
    Rows rows;
    ConstMask y_0;
    const std::int64_t* t;  // one per row
    const float* flip;      // two per row: the probability to flip a 0, and a 1
    Mask out;
};

struct SampleStepArguments {
    Rows rows;
    ConstMask y_t;
    const void* logits;
    Type logits_type;
    const float* coefficients;  // P, Q, R, S
    std::uint32_t timestep;
    bool predicts_y0;
    bool threshold;
    std::int32_t* nan_flag;
    Mask out;
};

struct PosteriorArguments {
    std::int64_t size;
    ConstMask y_t;
    const void* logits;
    Type logits_type;
    const float* coefficients;
    bool predicts_y0;
    float* out;
};

// The masks of an image: those of a, then those of b. `out` is a square of counts per image and zero at first: a kernel
// adds what it finds.
struct OverlapArguments {
    std::int64_t images, pixels;
    std::int64_t a_masks, b_masks;
    ConstMask a, b;
    std::int64_t* out;

    BERDIFF_FN std::int64_t masks() const { return a_masks + b_masks; }
    // The tensor that mask number `index` of an image is in; its first pixel there is added to `offset`.
    BERDIFF_FN ConstMask mask(std::int64_t image, std::int64_t index, std::int64_t& offset) const {
        const bool in_a = index < a_masks;
        offset += (in_a ? image * a_masks + index : image * b_masks + index - a_masks) * pixels;
        return in_a ? a : b;
    }
};

// Pixels whose losses are added up together; a mask's value is the sum over its tiles, in their order.
constexpr std::int64_t loss_tile = 4096;

struct DiffusionLossArguments {
    std::int64_t rows, pixels;
    const void* logits;
    Type logits_type;
    ConstMask y_t, y_0, ignore;  // ignore may be null
    const double* columns;       // of NoiseSchedule.loss_table, for each row
    const std::int64_t* kept;    // pixels that count, for each row; null where all do
    bool predicts_y0;
    void* gradient;
    Type gradient_type;  // f32 or bf16
    double* partial;     // for each tile of each row
    float* value;        // for each row

    BERDIFF_FN std::int64_t tiles_per_row() const { return (pixels + loss_tile - 1) / loss_tile; }
    BERDIFF_FN LossRow<ScalarLanes> row(std::int64_t r) const {
        const std::int64_t count = kept ? kept[r] : pixels;
        return loss_row(columns + loss_columns * r, count > 0 ? count : 1);
    }
};

// A tensor (images, pixels, channels).
struct GroupNormSource {
    const float* data;
    std::int64_t channels;
};

// The channels of the first source and after them those of the second, which may have none; `out` has them all.
struct GroupNormSiluArguments {
    std::int64_t images, pixels, groups;
    GroupNormSource sources[2];
    const float* weight;
    const float* bias;
    double eps;
    bool silu;
    float* out;

    std::int64_t channels() const { return sources[0].channels + sources[1].channels; }
};

// Columns of a panel of transformed weights, and output tiles that go through the stages together.
constexpr std::int64_t winograd_panel = 64, winograd_block = 24;

// Channels last; channels and outputs are multiples of 16. Height and width are those of the output, whose source is
// half as high and wide where it is to be repeated first.
struct WinogradArguments {
    std::int64_t images, height, width, channels, outputs;
    const float* x;
    const float* weight;  // (36, panels, channels, winograd_panel)
    const float* bias;
    const float* residual;  // added to the result; may be null, and may be `out`
    float* out;
    int upsample;  // 1 to repeat every pixel twice along both axes

    std::int64_t panels() const { return (outputs + winograd_panel - 1) / winograd_panel; }
    std::int64_t tiles() const { return images * ((height + 3) / 4) * ((width + 3) / 4); }
    std::int64_t scratch() const { return 36 * winograd_block * (channels + panels() * winograd_panel); }
};

// The number 1 in a mask of each type.
BERDIFF_FN std::uint32_t one_bits(Type type) {
    switch (type) {
        case Type::f32: return 0x3f800000u;
        case Type::f16: return 0x3c00u;
        case Type::bf16: return 0x3f80u;
        default: return 1u;
    }
}

}  // namespace berdiff
