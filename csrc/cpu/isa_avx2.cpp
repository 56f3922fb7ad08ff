// SPDX-License-Identifier: Apache-2.0
#include "cpu/draw.h"
#include "cpu/group_norm.h"
#include "cpu/kernels.h"
#include "cpu/lanes_avx2.h"
#include "cpu/loss.h"
#include "cpu/overlap.h"
#include "cpu/winograd.h"

namespace berdiff {

const Kernels* avx2_kernels() {
    using L = Avx2Lanes;
    static const Kernels kernels = {"avx2",
                                    initial_noise_span<L>,
                                    q_sample_span<L>,
                                    sample_step_span<L>,
                                    posterior_span<L>,
                                    diffusion_loss_span<L>,
                                    words_span<L>,
                                    overlap_span<L>,
                                    group_norm_sums<L>,
                                    group_norm_apply<L>,
                                    winograd_tiles<L>};
    return &kernels;
}

}  // namespace berdiff
