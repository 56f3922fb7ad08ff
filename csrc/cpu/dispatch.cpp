// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"

#if defined(BERDIFF_X86)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace berdiff {
namespace {

long process() {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 1;  // no fork
#endif
}

#if defined(BERDIFF_X86)
// Not every compiler's __builtin_cpu_supports knows this one.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<const Kernels*> find_available() {
    std::vector<const Kernels*> found = {portable_kernels()};
#if defined(BERDIFF_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) found.push_back(avx2_kernels());
#if defined(BERDIFF_EMULATE_AVX512)
    found.push_back(avx512_kernels());
#else
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) found.push_back(avx512_kernels());
#endif
#endif
    return found;
}

const std::vector<const Kernels*>& available() {
    static const std::vector<const Kernels*> found = find_available();
    return found;
}

std::atomic<const Kernels*> chosen{nullptr};

std::atomic<Parallel> pool{nullptr};
std::atomic<long> pool_process{0};

// Calls part(0), ..., part(count - 1), each once, on some of the threads.
void in_parallel(std::int64_t count, int threads, const std::function<void(std::int64_t)>& part) {
    struct Shared {
        const std::function<void(std::int64_t)>& part;
        const std::int64_t count;
        std::atomic<std::int64_t> next;
    } shared{part, count, {0}};
    const auto run = [](void* argument) {
        Shared& s = *static_cast<Shared*>(argument);
        for (std::int64_t i; (i = s.next.fetch_add(1)) < s.count;) s.part(i);
    };
    const Parallel parallel = pool.load(std::memory_order_relaxed);
    // The pool's threads are not there in the child of a fork.
    if (count > 1 && parallel && pool_process.load(std::memory_order_relaxed) == process()) {
        // All its threads, even if there are fewer parts: those that were left out would end, and have to be made
        // again.
        parallel(run, &shared, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(count));  // nothing may throw while threads run
    for (std::int64_t i = 1; i < count; ++i) {
        try {
            others.emplace_back(run, &shared);
        } catch (const std::system_error&) {
            break;  // No thread to be had: those that are there do the rest.
        }
    }
    run(&shared);
    for (std::thread& other : others) other.join();
}

}  // namespace

void set_pool(Parallel parallel) {
    pool_process = process();
    pool = parallel;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.emplace_back(k->name);
    return names;
}

void set_isa(const std::string& name) {
    if (name == "auto") {
        chosen = available().back();
        return;
    }
    for (const Kernels* k : available()) {
        if (name == k->name) {
            chosen = k;
            return;
        }
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available on this CPU");
}

const Kernels& kernels() {
    const Kernels* k = chosen.load(std::memory_order_relaxed);
    return k ? *k : *available().back();
}

void for_each_tile(std::int64_t rows, std::int64_t pixels, int threads,
                   const std::function<void(std::int64_t, std::int64_t, std::int64_t)>& kernel,
                   std::int64_t pixels_per_tile, std::int64_t pixels_per_thread) {
    if (rows == 0 || pixels == 0) return;
    const std::int64_t tiles_per_row = (pixels + pixels_per_tile - 1) / pixels_per_tile;
    const std::int64_t tiles = rows * tiles_per_row;
    const auto work = [=, &kernel](std::int64_t first, std::int64_t last) {
        std::int64_t row = first / tiles_per_row;
        std::int64_t begin = first % tiles_per_row * pixels_per_tile;
        for (; first < last; ++first) {
            const std::int64_t end = std::min(begin + pixels_per_tile, pixels);
            kernel(row, begin, end);
            begin = end;
            if (begin == pixels) {
                begin = 0;
                ++row;
            }
        }
    };
    const std::int64_t worth = std::max<std::int64_t>(1, rows * pixels / pixels_per_thread);
    const std::int64_t count = std::min({static_cast<std::int64_t>(threads), worth, tiles});
    in_parallel(count, threads, [&](std::int64_t i) { work(tiles * i / count, tiles * (i + 1) / count); });
}

}  // namespace berdiff
