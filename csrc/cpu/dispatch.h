// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs, and on how many threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace berdiff {

// Compiled and executable here, best last.
std::vector<std::string> available_isas();
// "auto" takes the best one. Throws std::invalid_argument for one that is not available.
void set_isa(const std::string& name);
const Kernels& kernels();

// OpenMP's entry for compilers, GOMP_parallel: calls function(argument) on every thread of a team of `threads`.
using Parallel = void (*)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);

// Run on this pool's threads from now on in this process; nullptr: start threads at every call. Torch's pool is the one
// to take: its threads spin for a while after each of torch's operations, on the processors that others would need.
void set_pool(Parallel parallel);

// Calls kernel(row, begin, end) for every tile of every row, on at most `threads` threads, fewer when the work is
// small: `pixels_per_thread` is about 60 microseconds' worth, below which another one costs more than it brings.
void for_each_tile(std::int64_t rows, std::int64_t pixels, int threads,
                   const std::function<void(std::int64_t row, std::int64_t begin, std::int64_t end)>& kernel,
                   std::int64_t pixels_per_tile = tile, std::int64_t pixels_per_thread = 65536);

}  // namespace berdiff
