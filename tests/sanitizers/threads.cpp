// SPDX-License-Identifier: Apache-2.0
// Every CPU kernel on several threads, without Python: what a sanitizer of threads has to see. Results on several
// threads are compared with those on one. Arrays are on the heap and of exact size, so that a sanitizer of addresses
// sees where they end.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "berdiff/arguments.h"
#include "cpu/backend.h"
#include "cpu/dispatch.h"

using namespace berdiff;

namespace {

// As GOMP_parallel does: function(argument) on a team of threads, the caller's among them.
void team(void (*function)(void*), void* argument, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(function, argument);
    function(argument);
    for (std::thread& other : others) other.join();
}

int comparisons = 0, wrong = 0;

template <class T>
void compare(const char* what, const std::vector<T>& expected, const std::vector<T>& got) {
    ++comparisons;
    bool same = expected.size() == got.size();
    for (std::size_t i = 0; same && i < got.size(); ++i)
        same = expected[i] == got[i] || (expected[i] != expected[i] && got[i] != got[i]);
    if (!same) {
        ++wrong;
        std::printf("%s differs between numbers of threads\n", what);
    }
}

// Calls op(threads, out) for one thread and for several.
template <class T>
void on_threads(const char* what, std::size_t size, const std::function<void(int, std::vector<T>&)>& op) {
    std::vector<T> expected(size);
    op(1, expected);
    for (const int threads : {2, 5}) {
        std::vector<T> got(size);
        op(threads, got);
        compare(what, expected, got);
    }
}

struct Inputs {
    std::int64_t rows, pixels;
    std::vector<std::uint8_t> y;
    std::vector<float> logits, flip;
    std::vector<std::int64_t> seeds, t;
    std::vector<float> coefficients = {0.1f, 0.2f, 1.0f, 1.0f};

    Inputs(std::int64_t rows, std::int64_t pixels) : rows(rows), pixels(pixels) {
        std::mt19937 random(7);
        const auto size = static_cast<std::size_t>(rows * pixels);
        y.resize(size);
        logits.resize(size);
        for (std::size_t i = 0; i < size; ++i) {
            y[i] = random() & 1;
            logits[i] = static_cast<float>(random()) / 1e9f - 2;
        }
        // Every thread may set the flag.
        logits.front() = logits.back() = logits[size / 2] = std::numeric_limits<float>::quiet_NaN();
        for (std::int64_t r = 0; r < rows; ++r) {
            seeds.push_back(r * 1000003);
            t.push_back(1 + r);
            flip.insert(flip.end(), {0.25f, 0.5f});
        }
    }
    Rows of_rows() const { return {rows, pixels, 1, 0, 0, seeds.data(), 1}; }
    std::size_t size() const { return y.size(); }
};

template <class T>
constexpr Type type_of = std::is_same_v<T, float> ? Type::f32 : Type::u8;

template <class T>
void draws(const Inputs& in) {
    on_threads<T>("noise", in.size(), [&](int threads, std::vector<T>& out) {
        InitialNoiseArguments a = {};
        a.rows = in.of_rows();
        a.out = {out.data(), type_of<T>};
        CpuBackend::initial_noise(a, threads);
    });
    on_threads<T>("q_sample", in.size(), [&](int threads, std::vector<T>& out) {
        QSampleArguments a = {};
        a.rows = in.of_rows();
        a.y_0 = {in.y.data(), Type::u8};
        a.t = in.t.data();
        a.flip = in.flip.data();
        a.out = {out.data(), type_of<T>};
        CpuBackend::q_sample(a, threads);
    });
    on_threads<T>("step", in.size(), [&](int threads, std::vector<T>& out) {
        std::int32_t nan_flag = 0;
        SampleStepArguments a = {};
        a.rows = in.of_rows();
        a.y_t = {in.y.data(), Type::u8};
        a.logits = in.logits.data();
        a.logits_type = Type::f32;
        a.coefficients = in.coefficients.data();
        a.timestep = 5;
        a.nan_flag = &nan_flag;
        a.out = {out.data(), type_of<T>};
        CpuBackend::sample_step(a, threads);
        wrong += nan_flag != 1;
    });
}

void posterior(const Inputs& in) {
    on_threads<float>("posterior", in.size(), [&](int threads, std::vector<float>& out) {
        PosteriorArguments a = {};
        a.size = static_cast<std::int64_t>(in.size());
        a.y_t = {in.y.data(), Type::u8};
        a.logits = in.logits.data();
        a.logits_type = Type::f32;
        a.coefficients = in.coefficients.data();
        a.out = out.data();
        CpuBackend::posterior(a, threads);
    });
}

void loss(const Inputs& in) {
    on_threads<float>("loss", in.size() + static_cast<std::size_t>(in.rows), [&](int threads, std::vector<float>& out) {
        DiffusionLossArguments a = {};
        a.rows = in.rows;
        a.pixels = in.pixels;
        a.logits = in.logits.data();
        a.logits_type = Type::f32;
        a.y_t = a.y_0 = {in.y.data(), Type::u8};
        const std::vector<double> columns(static_cast<std::size_t>(in.rows * loss_columns), 0.5);
        std::vector<double> partial(static_cast<std::size_t>(in.rows * a.tiles_per_row()));
        a.columns = columns.data();
        a.gradient = out.data();
        a.gradient_type = Type::f32;
        a.partial = partial.data();
        a.value = out.data() + in.size();
        CpuBackend::diffusion_loss(a, threads);
    });
}

// The masks are halves of one tensor: half of the rows against the other.
void overlap(const Inputs& in) {
    const std::int64_t half = in.rows / 2;
    if (half == 0) return;
    const auto squared = static_cast<std::size_t>(4 * half * half);
    on_threads<std::int64_t>("overlap", squared, [&](int threads, std::vector<std::int64_t>& out) {
        OverlapArguments a = {};
        a.images = 1;
        a.pixels = in.pixels;
        a.a_masks = a.b_masks = half;
        a.a = {in.y.data(), Type::u8};
        a.b = {in.y.data() + half * in.pixels, Type::u8};
        a.out = out.data();
        CpuBackend::overlap(a, threads);
    });
}

void group_norm(std::int64_t images, std::int64_t pixels) {
    constexpr std::int64_t channels = 48, other = 16;
    std::mt19937 random(3);
    const auto numbers = [&](std::int64_t size) {
        std::vector<float> found(static_cast<std::size_t>(size));
        for (float& x : found) x = static_cast<float>(random()) / 1e9f - 2;
        return found;
    };
    const auto x = numbers(images * pixels * channels), second = numbers(images * pixels * other);
    const auto weight = numbers(channels + other), bias = numbers(channels + other);
    const auto size = static_cast<std::size_t>(images * pixels * (channels + other));
    on_threads<float>("group_norm", size, [&](int threads, std::vector<float>& out) {
        GroupNormSiluArguments a = {};
        a.images = images;
        a.pixels = pixels;
        a.groups = 8;
        a.sources[0] = {x.data(), channels};
        a.sources[1] = {second.data(), other};
        a.weight = weight.data();
        a.bias = bias.data();
        a.eps = 1e-5;
        a.silu = true;
        a.out = out.data();
        CpuBackend::group_norm_silu(a, threads);
    });
}

void winograd(std::int64_t images, std::int64_t height, int upsample) {
    constexpr std::int64_t channels = 32, outputs = 80;
    const std::int64_t source = upsample ? height / 2 : height;
    std::mt19937 random(4);
    const auto numbers = [&](std::int64_t size) {
        std::vector<float> found(static_cast<std::size_t>(size));
        for (float& x : found) x = static_cast<float>(random()) / 1e9f - 2;
        return found;
    };
    WinogradArguments a = {};
    a.images = images;
    a.height = a.width = height;
    a.channels = channels;
    a.outputs = outputs;
    a.upsample = upsample;
    const auto x = numbers(images * source * source * channels), bias = numbers(outputs);
    const auto weight = numbers(36 * a.panels() * channels * winograd_panel);
    a.x = x.data();
    a.weight = weight.data();
    a.bias = bias.data();
    const auto size = static_cast<std::size_t>(images * height * height * outputs);
    on_threads<float>("winograd", size, [&](int threads, std::vector<float>& out) {
        WinogradArguments b = a;
        b.out = out.data();
        CpuBackend::winograd(b, threads);
    });
}

// Calls at once, while another thread changes where they run.
void callers() {
    std::vector<std::thread> at_once;
    std::atomic<int> off{0};
    for (int k = 0; k < 3; ++k) {
        at_once.emplace_back([&off, k] {
            const Inputs in(4, 40000);
            std::vector<float> expected, out(in.size());
            for (int i = 0; i < 6; ++i) {
                InitialNoiseArguments a = {};
                a.rows = in.of_rows();
                a.rows.first_sample = k;
                a.out = {out.data(), Type::f32};
                CpuBackend::initial_noise(a, 1 + i % 3);
                if (i == 0) expected = out;
                off += expected != out;
            }
        });
    }
    const std::vector<std::string> isas = available_isas();
    for (int i = 0; i < 20; ++i) {
        set_isa(isas[static_cast<std::size_t>(i) % isas.size()]);
        set_pool(i % 2 ? team : nullptr);
    }
    for (std::thread& caller : at_once) caller.join();
    wrong += off;
    ++comparisons;
}

}  // namespace

int main() {
    for (const std::string& isa : available_isas()) {
        set_isa(isa);
        for (const Parallel pool : {Parallel(nullptr), Parallel(team)}) {
            set_pool(pool);
            // Whole tiles, a part of one at the end, rows of less than a tile, and a single pixel beyond a tile.
            for (const auto& [rows, pixels] : std::vector<std::pair<std::int64_t, std::int64_t>>{
                     {3, 50001}, {16, 16384}, {2, 70000}, {4096, 35}, {33, 4097}}) {
                const Inputs in(rows, pixels);
                draws<std::uint8_t>(in);
                draws<float>(in);
                posterior(in);
                loss(in);
                if (rows <= 16) overlap(in);
            }
            for (const std::int64_t images : {1, 7}) group_norm(images, 5000 / images);
            for (const int upsample : {0, 1}) winograd(2, 22, upsample);
        }
    }
    callers();
    std::printf("%d comparisons, %d wrong\n", comparisons, wrong);
    return wrong == 0 ? 0 : 1;
}
