// SPDX-License-Identifier: Apache-2.0
#include "cpu/group_norm.h"
#include "cpu/kernels.h"
#include "cpu/lanes_avx2.h"
#include "cpu/loss.h"
#include "cpu/noise.h"
#include "cpu/overlap.h"
#include "cpu/step.h"
#include "cpu/winograd.h"

namespace berdiff {

const Kernels* avx2_kernels() {
    using L = Avx2Lanes;
    static const Kernels kernels = {
        "avx2",        noise_span<L>,   q_sample_span<L>,   step_span<L>,        posterior_span<L>, loss_span<L>,
        words_span<L>, overlap_span<L>, group_norm_sums<L>, group_norm_apply<L>, winograd_tiles<L>};
    return &kernels;
}

}  // namespace berdiff
