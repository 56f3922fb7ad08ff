// SPDX-License-Identifier: Apache-2.0
// berdiff_fast._cuda
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/ops.h"
#include "cuda/launch.h"

using namespace berdiff;

namespace {

struct CudaBackend {
    static void initial_noise(const InitialNoiseArguments& a, std::int64_t stream) {
        cuda::initial_noise(a, pointer(stream));
    }
    static void q_sample(const QSampleArguments& a, std::int64_t stream) { cuda::q_sample(a, pointer(stream)); }
    static void sample_step(const SampleStepArguments& a, std::int64_t stream) {
        cuda::sample_step(a, pointer(stream));
    }
    static void posterior(const PosteriorArguments& a, std::int64_t stream) { cuda::posterior(a, pointer(stream)); }
    static void overlap(const OverlapArguments& a, std::int64_t stream) { cuda::overlap(a, pointer(stream)); }
    static void diffusion_loss(const DiffusionLossArguments& a, std::int64_t stream) {
        cuda::diffusion_loss(a, pointer(stream));
    }

private:
    static void* pointer(std::int64_t stream) { return reinterpret_cast<void*>(stream); }
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of berdiff_fast; call them through berdiff_fast.ops.";
    define_ops<CudaBackend>(m);
    m.def("device_count", &cuda::device_count);
    m.def("locate_chunk", [](std::int64_t index, std::int64_t pixels) {
        std::int64_t out[4];
        cuda::locate_chunk(index, pixels, out);
        return pybind11::make_tuple(out[0], out[1], out[2], out[3]);
    });
    m.attr("architectures") = BERDIFF_CUDA_ARCHITECTURES;
#if defined(BERDIFF_EMULATE_CUDA)
    m.attr("emulated") = true;
    m.def(
        "emulate",
        [](bool reversed, std::int64_t most_blocks, int reciprocal_error) {
            emulated::settings = {reversed, most_blocks, reciprocal_error};
        },
        pybind11::kw_only(), pybind11::arg("reversed") = false, pybind11::arg("most_blocks") = 0x7fffffff,
        pybind11::arg("reciprocal_error") = 0);
#else
    m.attr("emulated") = false;
#endif
}
