// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the draw contract, version 1 (docs/draw.md), on any kind of lanes. Every operation is a
// correctly rounded float32 operation in the order written here; nothing is fused and no library function is
// called, so every backend computes the same bits.
#pragma once

#include <cstdint>

#include "berdiff/portability.h"

namespace berdiff {

// The four numbers of a sampling step (docs/math.md): flip <=> u (R + S E) < P + Q E.
struct Coefficients {
    float P, Q, R, S;
};

// E = exp(-z) = 2^w, w = -z log2(e); z clamped to [-64, 64] where neither E nor a product with it over- or underflows.
// Relative error below 2.1e-7 for |z| <= 1, 6e-7 for |z| <= 8 and 3.7e-6 everywhere. A NaN counts as 64.
template <class L>
BERDIFF_FN typename L::F exp_negative(typename L::F z) {
    using F = typename L::F;
    const F w = L::mul(L::max(L::min(z, L::f(64.0f)), L::f(-64.0f)), L::f(-0x1.715476p+0f));
    // Adding 1.5 * 2^23 leaves no fraction: t holds round(w) in its low bits, and f is what was rounded off.
    const F t = L::add(w, L::f(0x1.8p+23f));
    const F f = L::sub(w, L::sub(t, L::f(0x1.8p+23f)));
    // 2^f on [-1/2, 1/2]: the polynomial of least maximal relative error with constant term 1.
    F p = L::f(0x1.5bb9e6p-10f);
    p = L::add(L::mul(p, f), L::f(0x1.3ceab4p-7f));
    p = L::add(L::mul(p, f), L::f(0x1.c6b754p-5f));
    p = L::add(L::mul(p, f), L::f(0x1.ebf9bcp-3f));
    p = L::add(L::mul(p, f), L::f(0x1.62e42ap-1f));
    p = L::add(L::mul(p, f), L::f(1.0f));
    // Times 2^round(w), by adding to the exponent; the shift drops everything of t but its low bits.
    return L::from_bits(L::iadd(L::bits(p), L::template shift_left<23>(L::bits(t))));
}

// Numerator and denominator of the probability to flip a bit, given the logit z of epsilon.
template <class L>
struct FlipOdds {
    typename L::F numerator, denominator;
};

template <class L>
BERDIFF_FN FlipOdds<L> flip_odds(typename L::F z, const Coefficients& c) {
    const typename L::F e = exp_negative<L>(z);
    return {L::add(L::f(c.P), L::mul(L::f(c.Q), e)), L::add(L::f(c.R), L::mul(L::f(c.S), e))};
}

// The logit of epsilon = y_t xor y_0 from the logit of y_0: the sign turns where y_t = 1.
template <class L>
BERDIFF_FN typename L::F epsilon_logit(typename L::F z, typename L::U y_t) {
    return L::from_bits(L::bxor(L::bits(z), L::band(y_t, L::u(0x80000000u))));
}

// P(y_{t-1} = 1) from the logit of epsilon, a NaN giving NaN.
template <class L>
BERDIFF_FN typename L::F posterior_mean(typename L::F z, typename L::U y_t, const Coefficients& c) {
    const FlipOdds<L> odds = flip_odds<L>(z, c);
    const typename L::F flip = L::div(odds.numerator, odds.denominator);
    const typename L::F mean = L::select(y_t, L::sub(L::f(1.0f), flip), flip);
    return L::select(L::unordered(z, z), z, mean);
}

}  // namespace berdiff
