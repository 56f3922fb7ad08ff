// SPDX-License-Identifier: Apache-2.0
// berdiff_fast._cpu
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <numeric>

#include "bindings/ops.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace berdiff;

namespace {

struct CpuBackend {
    template <class Arguments>
    using Kernel = void (*)(const Arguments&, std::int64_t, std::int64_t, std::int64_t);

    template <class Arguments>
    static void run(Kernel<Arguments> kernel, const Arguments& a, std::int64_t rows, std::int64_t pixels,
                    std::int64_t threads) {
        for_each_tile(
            rows, pixels, static_cast<int>(threads),
            [&, kernel](std::int64_t row, std::int64_t begin, std::int64_t end) { kernel(a, row, begin, end); });
    }

    static void noise(const NoiseArguments& a, std::int64_t threads) {
        run(kernels().noise, a, a.rows.rows, a.rows.pixels, threads);
    }
    static void q_sample(const QSampleArguments& a, std::int64_t threads) {
        run(kernels().q_sample, a, a.rows.rows, a.rows.pixels, threads);
    }
    static void step(const StepArguments& a, std::int64_t threads) {
        run(kernels().step, a, a.rows.rows, a.rows.pixels, threads);
    }
    static void posterior(const PosteriorArguments& a, std::int64_t threads) {
        run(kernels().posterior, a, 1, a.size, threads);
    }
    static void overlap(const OverlapArguments& a, std::int64_t threads) {
        // A call adds up to `masks` squared counts to the output: rather few calls with many pixels.
        const auto kernel = kernels().overlap;
        for_each_tile(
            a.images, a.pixels, static_cast<int>(threads),
            [&, kernel](std::int64_t image, std::int64_t begin, std::int64_t end) { kernel(a, image, begin, end); },
            16 * tile);
    }
    static void loss(const LossArguments& a, std::int64_t threads) {
        run(kernels().loss, a, a.rows, a.pixels, threads);
        const double* partial = a.partial;
        for (std::int64_t row = 0; row < a.rows; ++row, partial += a.tiles_per_row())
            a.value[row] = static_cast<float>(std::accumulate(partial, partial + a.tiles_per_row(), 0.0));
    }
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of berdiff_fast; call them through berdiff_fast.ops.";
    define_ops<CpuBackend>(m);
    m.def("available_isas", &available_isas);
    m.def("set_isa", &set_isa);
    m.def("isa", [] { return kernels().name; });
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
