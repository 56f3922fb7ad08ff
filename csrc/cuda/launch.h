// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels as the binding sees them; the stream is a cudaStream_t. Each throws std::runtime_error with CUDA's
// own words when a launch fails, on a machine without a driver too.
#pragma once

#include "berdiff/arguments.h"

namespace berdiff::cuda {

void initial_noise(const InitialNoiseArguments&, void* stream);
void q_sample(const QSampleArguments&, void* stream);
void sample_step(const SampleStepArguments&, void* stream);
void posterior(const PosteriorArguments&, void* stream);
void overlap(const OverlapArguments&, void* stream);
void diffusion_loss(const DiffusionLossArguments&, void* stream);

// Row, first pixel, place in memory and size of a chunk: for tests of the index arithmetic, which is the kernels' own.
void locate_chunk(std::int64_t index, std::int64_t pixels, std::int64_t (&out)[4]);

// Devices that the linked-in runtime sees, or why it sees none.
int device_count();

}  // namespace berdiff::cuda
