// SPDX-License-Identifier: Apache-2.0
// berdiff_fast._cpu
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/ops.h"
#include "cpu/backend.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace berdiff;

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of berdiff_fast; call them through berdiff_fast.ops.";
    define_ops<CpuBackend>(m);
    m.def("group_norm_silu", [](Pointer out, Pointer x, std::int64_t channels, Pointer other,
                                std::int64_t other_channels, Pointer weight, Pointer bias, std::int64_t images,
                                std::int64_t pixels, std::int64_t groups, double eps, bool silu, std::int64_t threads) {
        GroupNormSiluArguments a = {};
        a.images = images;
        a.pixels = pixels;
        a.groups = groups;
        a.sources[0] = {reinterpret_cast<const float*>(x), channels};
        a.sources[1] = {reinterpret_cast<const float*>(other), other_channels};
        a.weight = reinterpret_cast<const float*>(weight);
        a.bias = reinterpret_cast<const float*>(bias);
        a.eps = eps;
        a.silu = silu;
        a.out = reinterpret_cast<float*>(out);
        py::gil_scoped_release release;
        CpuBackend::group_norm_silu(a, threads);
    });
    m.attr("winograd_panel") = winograd_panel;
    m.def("winograd", [](Pointer out, Pointer x, Pointer weight, Pointer bias, Pointer residual, std::int64_t images,
                         std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t outputs,
                         bool upsample, std::int64_t threads) {
        WinogradArguments a = {};
        a.images = images;
        a.height = height;
        a.width = width;
        a.channels = channels;
        a.outputs = outputs;
        a.x = reinterpret_cast<const float*>(x);
        a.weight = reinterpret_cast<const float*>(weight);
        a.bias = reinterpret_cast<const float*>(bias);
        a.residual = reinterpret_cast<const float*>(residual);
        a.out = reinterpret_cast<float*>(out);
        a.upsample = upsample;
        py::gil_scoped_release release;
        CpuBackend::winograd(a, threads);
    });
    m.def("available_isas", &available_isas);
    m.def("set_isa", &set_isa);
    m.def("isa", [] { return kernels().name; });
    m.def("set_pool", [](Pointer parallel) { set_pool(reinterpret_cast<Parallel>(parallel)); });
#if defined(BERDIFF_EMULATE_AVX512)
    m.attr("emulates_avx512") = true;
#else
    m.attr("emulates_avx512") = false;
#endif

    // For tests of the index arithmetic, on the code that the kernels themselves run.
    m.def("words", [](Pointer out, std::uint64_t seed, std::uint32_t sample, std::uint32_t tag, std::uint32_t stream,
                      std::uint32_t first_block, std::int64_t blocks) {
        const PhiloxRow row = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32), sample, tag,
                               stream};
        kernels().words(row, first_block, blocks, reinterpret_cast<std::uint32_t*>(out));
    });
}
