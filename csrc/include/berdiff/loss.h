// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the training loss (docs/math.md, "Loss") on any kind of lanes: bits and slope of one pixel. Nobody
// is promised its bits: multiply and add are fused where the lanes can, and two instruction sets may differ in a last
// place.
#pragma once

#include <cstdint>

#include "berdiff/portability.h"
#include "berdiff/scalar.h"

namespace berdiff {

// What is known of a pixel's timestep and epsilon: six columns of NoiseSchedule.loss_table, the last two times the
// weight of the KL term, which `curvature` carries into the slope.
template <class L>
struct alignas(sizeof(typename L::F) * 4) LossCase {
    typename L::F total, ratio, over, under, p_over, p_under, curvature;
};

template <class L>
struct LossRow {
    LossCase<L> zero, one;
    typename L::F bce_weight;
};

// Columns of NoiseSchedule.loss_table: a case for epsilon = 0, one for epsilon = 1, and the weights of the two terms.
constexpr int loss_case_columns = 6;
constexpr int loss_kl_weight = 2 * loss_case_columns;
constexpr int loss_bce_weight = loss_kl_weight + 1;
constexpr int loss_columns = loss_bce_weight + 1;

BERDIFF_FN LossCase<ScalarLanes> loss_case(const double* c, double kl_weight) {
    return {static_cast<float>(c[0]),
            static_cast<float>(c[1]),
            static_cast<float>(c[2]),
            static_cast<float>(c[3]),
            static_cast<float>(kl_weight * c[4]),
            static_cast<float>(kl_weight * c[5]),
            static_cast<float>(-kl_weight * c[2] * c[3])};
}

// Weights are divided by the number of pixels that count: the loss of a mask is their mean.
BERDIFF_FN LossRow<ScalarLanes> loss_row(const double* columns, std::int64_t pixels) {
    const double kl_weight = columns[loss_kl_weight] / static_cast<double>(pixels);
    return {loss_case(columns, kl_weight), loss_case(columns + loss_case_columns, kl_weight),
            static_cast<float>(columns[loss_bce_weight] / static_cast<double>(pixels))};
}

template <class L>
BERDIFF_FN LossCase<L> spread(const LossCase<ScalarLanes>& c) {
    return {L::f(c.total),  L::f(c.ratio),   L::f(c.over),     L::f(c.under),
            L::f(c.p_over), L::f(c.p_under), L::f(c.curvature)};
}

template <class L>
BERDIFF_FN LossRow<L> spread(const LossRow<ScalarLanes>& row) {
    return {spread<L>(row.zero), spread<L>(row.one), L::f(row.bce_weight)};
}

template <class L>
BERDIFF_FN LossCase<L> select(typename L::U mask, const LossCase<L>& yes, const LossCase<L>& no) {
    return {L::select(mask, yes.total, no.total),        L::select(mask, yes.ratio, no.ratio),
            L::select(mask, yes.over, no.over),          L::select(mask, yes.under, no.under),
            L::select(mask, yes.p_over, no.p_over),      L::select(mask, yes.p_under, no.p_under),
            L::select(mask, yes.curvature, no.curvature)};
}

template <class L>
BERDIFF_FN typename L::F absolute(typename L::F x) {
    return L::from_bits(L::band(L::bits(x), L::u(0x7fffffffu)));
}

// exp(-|x|), for |x| up to 87, to 1.2e-7 of itself: a confident pixel's slope is proportional to it. NaN gives NaN.
template <class L>
BERDIFF_FN typename L::F exp_minus_abs(typename L::F x) {
    using F = typename L::F;
    const F a = L::max(L::f(-87.0f), L::from_bits(L::bor(L::bits(x), L::u(0x80000000u))));  // a NaN takes the second
    // 1.5 * 2^23 leaves no fraction in t, and 127 makes its low bits the exponent of 2^n. ln 2 comes in two parts, of
    // which the first times n is exact.
    const F t = L::madd(a, L::f(0x1.715476p+0f), L::f(0x1.8000fep+23f));
    const F n = L::sub(t, L::f(0x1.8000fep+23f));
    const F f = L::madd(n, L::f(-0x1.0bfbe8p-15f), L::madd(n, L::f(-0x1.62ep-1f), a));
    F p = L::f(0x1.6a243ap-10f);
    p = L::madd(p, f, L::f(0x1.1239e0p-7f));
    p = L::madd(p, f, L::f(0x1.5558f2p-5f));
    p = L::madd(p, f, L::f(0x1.555492p-3f));
    p = L::madd(p, f, L::f(0x1.fffffcp-2f));
    p = L::add(L::madd(L::mul(f, f), p, f), L::f(1.0f));
    return L::mul(p, L::from_bits(L::template shift_left<23>(L::bits(t))));
}

// (r - log(1 + r)) / r^2 for 1 + r from sqrt(1/2) to sqrt(2): the polynomial of least maximal relative error, 5e-8.
template <class L>
BERDIFF_FN typename L::F log_remainder(typename L::F r) {
    typename L::F p = L::f(0x1.3e96acp-4f);
    p = L::madd(p, r, L::f(-0x1.05ae0ap-3f));
    p = L::madd(p, r, L::f(0x1.0c9352p-3f));
    p = L::madd(p, r, L::f(-0x1.22bcb0p-3f));
    p = L::madd(p, r, L::f(0x1.5485dcp-3f));
    p = L::madd(p, r, L::f(-0x1.99a22ep-3f));
    p = L::madd(p, r, L::f(0x1.00020ap-2f));
    p = L::madd(p, r, L::f(-0x1.555550p-2f));
    return L::madd(p, r, L::f(0x1.fffffep-2f));
}

// x - log(1 + x) >= 0, given both ways: x is what is exact near 0 and 1 + x what is exact near -1.
template <class L>
BERDIFF_FN typename L::F log_gap(typename L::F x, typename L::F one_plus_x) {
    using F = typename L::F;
    using U = typename L::U;
    // 1 + x = 2^k (1 + r); where k = 0, r is x, and what is left is r^2 times the polynomial: nothing cancels.
    const U t = L::iadd(L::bits(one_plus_x), L::u(0u - 0x3f3504f3u));
    const F k = L::to_float(L::band(t, L::u(0xff800000u)));  // times 2^23
    const F m = L::from_bits(L::iadd(L::band(t, L::u(0x007fffffu)), L::u(0x3f3504f3u)));
    const F r = L::select(L::less(absolute<L>(k), L::f(0.5f)), x, L::sub(m, L::f(1.0f)));
    return L::madd(L::mul(r, r), log_remainder<L>(r), L::madd(k, L::f(-0x1.62e430p-24f), L::sub(x, r)));
}

// A pixel goes through three stages. A vector unit takes a whole group of pixels through each before the next, since
// one pixel is a long chain of dependent operations (csrc/cpu/loss.h).

// First, what the network says: the probability of what is so, of what is not, and the BCE in nats.
template <class L>
struct Belief {
    typename L::F right, wrong, bce;
};

// z is the logit of what is so: that of epsilon, its sign turned where epsilon = 0.
template <class L>
BERDIFF_FN Belief<L> belief(typename L::F z) {
    using F = typename L::F;
    using U = typename L::U;
    const F small = exp_minus_abs<L>(z);
    const F most = L::reciprocal(L::add(L::f(1.0f), small));
    const F rest = L::mul(small, most);
    const U believed = L::less(L::f(0.0f), z);
    // log(1 + exp(-z)) = max(-z, 0) + log(1 + small), and 1 + small = 2 (1 + r) from sqrt(2) on.
    const U upper = L::less(L::f(0x1.a8279ap-2f), small);
    const F r = L::select(upper, L::madd(small, L::f(0.5f), L::f(-0.5f)), small);
    const F log2 = L::from_bits(L::band(upper, L::u(0x3f317218u)));
    const F above = L::max(L::f(0.0f), L::sub(L::f(0.0f), z));  // NaN where z is
    const F bce = L::add(L::add(log2, above), L::sub(r, L::mul(L::mul(r, r), log_remainder<L>(r))));
    return {L::select(believed, most, rest), L::select(believed, rest, most), bce};
}

// Then what follows from it: predicted over true probability of both outcomes, the one that became likelier and the
// other one, as x and as 1 + x; and minus the derivative of the loss by z.
template <class L>
struct Consequence {
    typename L::F over, ratio_over, under, ratio_under, slope;
};

template <class L>
BERDIFF_FN Consequence<L> consequence(typename L::F right, typename L::F wrong, const LossCase<L>& c,
                                      typename L::F bce_weight) {
    using F = typename L::F;
    const F one = L::f(1.0f);
    const F D = L::madd(c.total, wrong, right);
    const F N = L::madd(c.ratio, wrong, right);
    const F per_D = L::reciprocal(D);
    const F share = L::mul(wrong, per_D);
    const F over = L::mul(share, c.over), under = L::mul(share, c.under);
    const F ratio_over = L::add(one, over);
    const F ratio_under = L::select(L::less(under, L::f(-0.5f)), L::mul(N, per_D), L::add(one, under));
    const F per_product = L::reciprocal(L::mul(L::mul(ratio_over, D), N));
    const F curvature = L::mul(L::mul(c.curvature, right), L::mul(share, per_product));
    return {over, ratio_over, under, ratio_under, L::mul(wrong, L::add(bce_weight, curvature))};
}

// Last, the bits: KL = p_over (x - log(1 + x)) + p_under (x - log(1 + x)), for the mean of the two x is 0.
template <class L>
BERDIFF_FN typename L::F loss_bits(const Consequence<L>& q, typename L::F bce, const LossCase<L>& c,
                                   typename L::F bce_weight) {
    return L::madd(c.p_over, log_gap<L>(q.over, q.ratio_over),
                   L::madd(c.p_under, log_gap<L>(q.under, q.ratio_under), L::mul(bce_weight, bce)));
}

}  // namespace berdiff
