// SPDX-License-Identifier: Apache-2.0
// The ops as Python calls them: pointers, sizes and type numbers, the same for the CPU and the CUDA module.
// berdiff_fast/backends/native.py makes these calls with tensors that berdiff_fast/ops has checked.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "berdiff/arguments.h"

namespace berdiff {

using Pointer = std::uintptr_t;

inline const std::int64_t* integers(Pointer p) { return reinterpret_cast<const std::int64_t*>(p); }

// Backend::op(arguments, context): the context is the number of threads on a CPU and the stream on a GPU.
template <class Backend>
void define_ops(pybind11::module_& m) {
    namespace py = pybind11;

    m.def("initial_noise", [](Pointer out, int out_type, Pointer seeds, std::int64_t seed_columns, std::int64_t rows,
                              std::int64_t pixels, std::int64_t samples_per_image, std::int64_t first_row,
                              std::int64_t first_sample, std::int64_t context) {
        InitialNoiseArguments a = {};
        a.rows = {rows, pixels, samples_per_image, first_row, first_sample, integers(seeds), seed_columns};
        a.out = {reinterpret_cast<void*>(out), static_cast<Type>(out_type)};
        py::gil_scoped_release release;
        Backend::initial_noise(a, context);
    });

    m.def("q_sample",
          [](Pointer out, int out_type, Pointer y_0, int y_type, Pointer t, Pointer flip, Pointer seeds,
             std::int64_t seed_columns, std::int64_t rows, std::int64_t pixels, std::int64_t samples_per_image,
             std::int64_t first_row, std::int64_t first_sample, std::int64_t context) {
              QSampleArguments a = {};
              a.rows = {rows, pixels, samples_per_image, first_row, first_sample, integers(seeds), seed_columns};
              a.y_0 = {reinterpret_cast<const void*>(y_0), static_cast<Type>(y_type)};
              a.t = integers(t);
              a.flip = reinterpret_cast<const float*>(flip);
              a.out = {reinterpret_cast<void*>(out), static_cast<Type>(out_type)};
              py::gil_scoped_release release;
              Backend::q_sample(a, context);
          });

    m.def("sample_step",
          [](Pointer out, int out_type, Pointer y_t, int y_type, Pointer logits, int logits_type, Pointer coefficients,
             Pointer nan_flag, std::uint32_t timestep, bool predicts_y0, bool threshold, Pointer seeds,
             std::int64_t seed_columns, std::int64_t rows, std::int64_t pixels, std::int64_t samples_per_image,
             std::int64_t first_row, std::int64_t first_sample, std::int64_t context) {
              SampleStepArguments a = {};
              a.rows = {rows, pixels, samples_per_image, first_row, first_sample, integers(seeds), seed_columns};
              a.y_t = {reinterpret_cast<const void*>(y_t), static_cast<Type>(y_type)};
              a.logits = reinterpret_cast<const void*>(logits);
              a.logits_type = static_cast<Type>(logits_type);
              a.coefficients = reinterpret_cast<const float*>(coefficients);
              a.timestep = timestep;
              a.predicts_y0 = predicts_y0;
              a.threshold = threshold;
              a.nan_flag = reinterpret_cast<std::int32_t*>(nan_flag);
              a.out = {reinterpret_cast<void*>(out), static_cast<Type>(out_type)};
              py::gil_scoped_release release;
              Backend::sample_step(a, context);
          });

    m.def("posterior", [](Pointer out, Pointer y_t, int y_type, Pointer logits, int logits_type, Pointer coefficients,
                          bool predicts_y0, std::int64_t size, std::int64_t context) {
        PosteriorArguments a = {};
        a.size = size;
        a.y_t = {reinterpret_cast<const void*>(y_t), static_cast<Type>(y_type)};
        a.logits = reinterpret_cast<const void*>(logits);
        a.logits_type = static_cast<Type>(logits_type);
        a.coefficients = reinterpret_cast<const float*>(coefficients);
        a.predicts_y0 = predicts_y0;
        a.out = reinterpret_cast<float*>(out);
        py::gil_scoped_release release;
        Backend::posterior(a, context);
    });

    m.def("overlap", [](Pointer out, Pointer a_data, int a_type, std::int64_t a_masks, Pointer b_data, int b_type,
                        std::int64_t b_masks, std::int64_t images, std::int64_t pixels, std::int64_t context) {
        OverlapArguments a = {};
        a.images = images;
        a.pixels = pixels;
        a.a_masks = a_masks;
        a.b_masks = b_masks;
        a.a = {reinterpret_cast<const void*>(a_data), static_cast<Type>(a_type)};
        a.b = {reinterpret_cast<const void*>(b_data), static_cast<Type>(b_type)};
        a.out = reinterpret_cast<std::int64_t*>(out);
        py::gil_scoped_release release;
        Backend::overlap(a, context);
    });

    m.attr("loss_tile") = loss_tile;
    m.def("diffusion_loss",
          [](Pointer value, Pointer gradient, int gradient_type, Pointer partial, Pointer logits, int logits_type,
             Pointer y_t, int y_t_type, Pointer y_0, int y_0_type, Pointer ignore, int ignore_type, Pointer columns,
             Pointer kept, bool predicts_y0, std::int64_t rows, std::int64_t pixels, std::int64_t context) {
              DiffusionLossArguments a = {};
              a.rows = rows;
              a.pixels = pixels;
              a.logits = reinterpret_cast<const void*>(logits);
              a.logits_type = static_cast<Type>(logits_type);
              a.y_t = {reinterpret_cast<const void*>(y_t), static_cast<Type>(y_t_type)};
              a.y_0 = {reinterpret_cast<const void*>(y_0), static_cast<Type>(y_0_type)};
              a.ignore = {reinterpret_cast<const void*>(ignore), static_cast<Type>(ignore_type)};
              a.columns = reinterpret_cast<const double*>(columns);
              a.kept = integers(kept);
              a.predicts_y0 = predicts_y0;
              a.gradient = reinterpret_cast<void*>(gradient);
              a.gradient_type = static_cast<Type>(gradient_type);
              a.partial = reinterpret_cast<double*>(partial);
              a.value = reinterpret_cast<float*>(value);
              py::gil_scoped_release release;
              Backend::diffusion_loss(a, context);
          });
}

}  // namespace berdiff
