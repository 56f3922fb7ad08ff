// SPDX-License-Identifier: Apache-2.0
// A grid of CUDA threads on one CPU thread, for tests. Blocks run one after another. The threads of a block are fibers:
// each runs until it waits for the others or returns, then the next one does, in ascending or in descending order. So
// whatever a kernel leaves to chance comes out wrong in one of the two orders.
//
// Stricter than a GPU: a barrier must be reached by all threads of its block, a shuffle by all of its warp, at one and
// the same place in the source, and a thread that has returned reaches neither. Where that fails the process ends with
// words.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Every __shared__ variable of the module lies in one section, whose limits the linker knows.
extern "C" {
extern __attribute__((visibility("hidden"))) unsigned char __start_emulated_shared[];
extern __attribute__((visibility("hidden"))) unsigned char __stop_emulated_shared[];
}

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace berdiff::emulated {

// What a test may choose; kernels have to give the same for every choice.
struct Settings {
    bool reversed = false;                  // the order of threads and blocks
    std::int64_t most_blocks = 0x7fffffff;  // a grid is cut to so many, so that kernels have to walk in its strides
    int reciprocal_error = 0;               // units in the last place by which the approximate reciprocal is off
};

inline Settings settings;

struct Place {
    const char* file;
    int line;
    bool operator==(const Place& other) const { return file == other.file && line == other.line; }
};

class Block {
public:
    // The grid's kernel with its arguments.
    using Body = void (*)(const void*);

    static Block& instance() {
        static Block block;
        return block;
    }

    void run_grid(Body body, const void* argument, unsigned blocks, unsigned threads) {
        const std::lock_guard<std::mutex> one_at_a_time(mutex_);
        body_ = body;
        argument_ = argument;
        gridDim.x = blocks;
        blockDim.x = threads;
        threads_.assign(threads, {});
        for (unsigned i = 0; i < blocks; ++i) {
            blockIdx.x = settings.reversed ? blocks - 1 - i : i;
            run();
        }
    }

    void barrier(Place place) { wait(State::at_barrier, place); }

    template <class T>
    T from_lane_below(T x, int distance, Place place) {
        static_assert(sizeof(T) <= sizeof(std::uint64_t), "lanes hand over a word");
        const unsigned me = threadIdx.x;
        // Two words in turn: a lane that is one shuffle ahead must not write what another has yet to read.
        const int turn = threads_[me].turn ^= 1;
        std::memcpy(&threads_[me].words[turn], &x, sizeof x);
        wait(State::at_shuffle, place);
        if (me % warp + distance < warp) std::memcpy(&x, &threads_[me + distance].words[turn], sizeof x);
        return x;
    }

private:
    static constexpr unsigned warp = 32;
    static constexpr std::size_t stack_bytes = 256 << 10;

    enum class State { fresh, ready, at_barrier, at_shuffle, returned };

    struct Fiber {
        ucontext_t context = {};
        std::unique_ptr<char[]> stack{new char[stack_bytes]};
        void* fake_stack = nullptr;  // the sanitizer's
    };

    struct Thread {
        State state;
        Place place;
        Fiber* fiber;
        int turn;
        std::uint64_t words[2];
    };

    unsigned thread_at(unsigned position) const {
        return settings.reversed ? static_cast<unsigned>(threads_.size()) - 1 - position : position;
    }

    void run() {
        forget_shared_memory();
        for (Thread& t : threads_) t = {};
        for (;;) {
            for (position_ = 0; position_ < threads_.size(); ++position_) {
                const unsigned i = thread_at(position_);
                Thread& t = threads_[i];
                if (t.state == State::fresh) t.fiber = take_fiber();
                if (t.state == State::fresh || t.state == State::ready) resume(i, *t.fiber);
            }
            const auto count = std::count_if(threads_.begin(), threads_.end(),
                                             [](const Thread& t) { return t.state == State::returned; });
            if (count == static_cast<std::ptrdiff_t>(threads_.size())) return;
            bool moved = release(0, threads_.size(), State::at_barrier);
            for (std::size_t w = 0; w < threads_.size(); w += warp)
                moved |= release(w, std::min(w + warp, threads_.size()), State::at_shuffle);
            if (!moved) fail();
        }
    }

    bool release(std::size_t first, std::size_t last, State state) {
        for (std::size_t i = first; i < last; ++i)
            if (threads_[i].state != state || !(threads_[i].place == threads_[first].place)) return false;
        for (std::size_t i = first; i < last; ++i) threads_[i].state = State::ready;
        return true;
    }

    // A kernel that reads what its block has not written must not find what another block or zeroed memory left there.
#if defined(__SANITIZE_ADDRESS__)
    __attribute__((no_sanitize_address))
#endif
    static void forget_shared_memory() {
        volatile unsigned char* const end = __stop_emulated_shared;
        for (volatile unsigned char* p = __start_emulated_shared; p != end; ++p) *p = 0xff;
    }

    [[noreturn]] void fail() const {
        std::fprintf(stderr, "emulated CUDA: in block %u of %u not all threads reach the same place:", blockIdx.x,
                     gridDim.x);
        for (std::size_t i = 0, first = 0; i < threads_.size(); ++i) {
            const Thread &a = threads_[first], &b = threads_[i];
            const bool last = i + 1 == threads_.size();
            const bool differs = a.state != b.state || !(a.place == b.place);
            if (differs) describe(std::exchange(first, i), i);
            if (last) describe(first, i + 1);
        }
        std::fprintf(stderr, "\n");
        std::fflush(stderr);
        std::abort();
    }

    void describe(std::size_t first, std::size_t end) const {
        const Thread& t = threads_[first];
        std::fprintf(stderr, " threads %zu to %zu ", first, end - 1);
        if (t.state == State::returned)
            std::fprintf(stderr, "have returned;");
        else
            std::fprintf(stderr, "are at the %s of %s:%d;", t.state == State::at_barrier ? "barrier" : "shuffle",
                         t.place.file, t.place.line);
    }

    // ------------------------------------------------------------------ switching

    Fiber* take_fiber() {
        if (idle_.empty()) {
            fibers_.push_back(std::make_unique<Fiber>());
            prepare(*fibers_.back());
            idle_.push_back(fibers_.back().get());
        }
        Fiber* const f = idle_.back();
        idle_.pop_back();
        return f;
    }

    static void prepare(Fiber& f) {
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = stack_bytes;
        f.context.uc_link = nullptr;
        makecontext(&f.context, &Block::enter, 0);
    }

    void resume(unsigned i, Fiber& f) {
        threadIdx.x = i;
        current_ = &f;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fake_stack_, f.stack.get(), stack_bytes);
#endif
        swapcontext(&scheduler_, &f.context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
    }

    void back_to_scheduler(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&f.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
        swapcontext(&f.context, &scheduler_);
        arrived(f);
    }

    void arrived(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(f.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#else
        static_cast<void>(f);
#endif
    }

    void wait(State state, Place place) {
        const unsigned me = threadIdx.x;
        threads_[me].state = state;
        threads_[me].place = place;
        back_to_scheduler(*threads_[me].fiber);
    }

    // A fiber whose thread returns goes on with the next thread: a kernel without barriers needs a single fiber.
    static void enter() {
        Block& b = instance();
        Fiber& mine = *b.current_;
        b.arrived(mine);
        for (;;) {
            b.body_(b.argument_);
            b.threads_[threadIdx.x].state = State::returned;
            if (b.position_ + 1 < b.threads_.size()) {
                const unsigned next = b.thread_at(b.position_ + 1);
                if (b.threads_[next].state == State::fresh) {
                    ++b.position_;
                    threadIdx.x = next;
                    b.threads_[next].fiber = &mine;
                    continue;
                }
            }
            b.idle_.push_back(&mine);
            b.back_to_scheduler(mine);
        }
    }

    std::mutex mutex_;
    Body body_ = nullptr;
    const void* argument_ = nullptr;
    std::vector<Thread> threads_;
    std::size_t position_ = 0;  // in the order of the threads
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Fiber*> idle_;
    Fiber* current_ = nullptr;
    ucontext_t scheduler_ = {};
    void* fake_stack_ = nullptr;
    const void* scheduler_stack_ = nullptr;
    std::size_t scheduler_stack_bytes_ = 0;
};

}  // namespace berdiff::emulated
