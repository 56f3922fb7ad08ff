// SPDX-License-Identifier: Apache-2.0
// One lane: the arithmetic of the draw contract on plain numbers, for portable C++ and for CUDA threads.
// The AVX2 and AVX-512 lanes (csrc/cpu/lanes_*.h) offer the same names on vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "berdiff/portability.h"

#if defined(BERDIFF_EMULATE_CUDA)
#include <cuda_fp16.h>  // of csrc/emulated_cuda: the GPU's branch below, for tests on a CPU
#endif

namespace berdiff {

struct ScalarLanes {
    using F = float;
    using U = std::uint32_t;  // as a mask: all ones or zero
    static constexpr int width = 1;

    static BERDIFF_FN F f(float x) { return x; }
    static BERDIFF_FN U u(std::uint32_t x) { return x; }

    // Correctly rounded and never contracted: the intrinsics forbid it on a GPU, -ffp-contract=off on a CPU.
#if defined(__CUDA_ARCH__) || defined(BERDIFF_EMULATE_CUDA)
    static BERDIFF_FN F add(F a, F b) { return __fadd_rn(a, b); }
    static BERDIFF_FN F sub(F a, F b) { return __fsub_rn(a, b); }
    static BERDIFF_FN F mul(F a, F b) { return __fmul_rn(a, b); }
    static BERDIFF_FN F div(F a, F b) { return __fdiv_rn(a, b); }
    // For what the contract does not cover: fused, and within a unit in the last place of 1 / x.
    static BERDIFF_FN F madd(F a, F b, F c) { return __fmaf_rn(a, b, c); }
#if defined(BERDIFF_EMULATE_CUDA)
    static BERDIFF_FN F reciprocal(F x) { return emulated::reciprocal(x); }
#else
    static BERDIFF_FN F reciprocal(F x) {
        F out;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
        return out;
    }
#endif
    static BERDIFF_FN F select(U mask, F yes, F no) { return mask ? yes : no; }
    static BERDIFF_FN U bits(F x) { return __float_as_uint(x); }
    static BERDIFF_FN F from_bits(U x) { return __uint_as_float(x); }
#else
    static BERDIFF_FN F add(F a, F b) { return a + b; }
    static BERDIFF_FN F sub(F a, F b) { return a - b; }
    static BERDIFF_FN F mul(F a, F b) { return a * b; }
    static BERDIFF_FN F div(F a, F b) { return a / b; }
    static BERDIFF_FN F madd(F a, F b, F c) { return a * b + c; }
    static BERDIFF_FN F reciprocal(F x) { return 1.0f / x; }
    // By bits: the loss takes half the time that it takes with a conditional operator.
    static BERDIFF_FN F select(U mask, F yes, F no) { return from_bits((bits(yes) & mask) | (bits(no) & ~mask)); }
    static BERDIFF_FN U bits(F x) {
        U out;
        std::memcpy(&out, &x, sizeof out);
        return out;
    }
    static BERDIFF_FN F from_bits(U x) {
        F out;
        std::memcpy(&out, &x, sizeof out);
        return out;
    }
#endif

    // Philox (philox.h): one lane needs no other layout.
    using Wide = U;
    static BERDIFF_FN Wide widen(U a) { return a; }
    static BERDIFF_FN U narrow(Wide a) { return a; }
    static BERDIFF_FN std::uint64_t multiply(Wide a, std::uint32_t b) { return static_cast<std::uint64_t>(a) * b; }
    static BERDIFF_FN Wide high(std::uint64_t product) { return static_cast<U>(product >> 32); }
    static BERDIFF_FN Wide low(std::uint64_t product) { return static_cast<U>(product); }
    static BERDIFF_FN Wide xor3(Wide a, Wide b, U c) { return a ^ b ^ c; }

    // A NaN takes the second operand, as in minps and maxps.
    static BERDIFF_FN F min(F a, F b) { return a < b ? a : b; }
    static BERDIFF_FN F max(F a, F b) { return a > b ? a : b; }
    static BERDIFF_FN U less(F a, F b) { return a < b ? ~0u : 0u; }
    static BERDIFF_FN U unordered(F a, F b) { return a != a || b != b ? ~0u : 0u; }
    static BERDIFF_FN F to_float(U x) { return static_cast<F>(static_cast<std::int32_t>(x)); }

    static BERDIFF_FN U iadd(U a, U b) { return a + b; }
    static BERDIFF_FN U bxor(U a, U b) { return a ^ b; }
    static BERDIFF_FN U band(U a, U b) { return a & b; }
    static BERDIFF_FN U bor(U a, U b) { return a | b; }
    template <int n>
    static BERDIFF_FN U shift_left(U a) {
        return a << n;
    }
    template <int n>
    static BERDIFF_FN U shift_right(U a) {
        return a >> n;
    }
    static BERDIFF_FN U top_bit_clear(U a) { return a >> 31 ? 0u : ~0u; }
    static BERDIFF_FN bool any(U mask) { return mask != 0; }
};

// The upper 16 bits of what rounds to the nearest bfloat16, a tie to the even one; NaN stays NaN.
template <class L>
BERDIFF_FN typename L::U bfloat16_bits(typename L::F x) {
    using U = typename L::U;
    const U odd = L::band(L::template shift_right<16>(L::bits(x)), L::u(1));
    const U rounded = L::iadd(L::bits(x), L::iadd(odd, L::u(0x7fffu)));
    const typename L::F quiet = L::from_bits(L::u(0x7fc00000u));
    return L::template shift_right<16>(L::bits(L::select(L::unordered(x, x), quiet, L::from_bits(rounded))));
}

}  // namespace berdiff
