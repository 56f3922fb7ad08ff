# SPDX-License-Identifier: Apache-2.0
"""The kernels: what they compute, on what, and what they refuse. Everything else is a backend.

A file has all of an op: its public function, its checks (which are the fake, too), its kernel, its schema.

Every op is registered with ``torch.library`` under ``torch.ops.berdiff_fast``, works on a CPU and on an NVIDIA GPU,
with FakeTensor and under ``torch.compile(fullgraph=True)``. Those that draw give equal bits on every backend
(docs/draw.md); the loss does not promise bits.

**Rows.** The first dimension of a mask tensor counts masks. Row r of a call is mask number ``first_row + r`` of a batch
in which every image has ``samples_per_image`` masks, so it belongs to image ``(first_row + r) // samples_per_image``,
takes that image's seed, and is sample number ``first_sample + (first_row + r) % samples_per_image`` of it. Where
seeds are (B, 2), their second column is added to the sample number of each image: device data, so that a captured
CUDA graph draws any samples, and, with a row of seeds per mask, a call any selection of them. It is not checked: sums
wrap at 2^32.
The other dimensions, (K, *spatial), are flattened; pixel i of them takes word ``i & 3`` of Philox block ``i >> 2``.

**Masks** are bool, uint8 (0/1), float32, float16 or bfloat16 (0.0/1.0; any other value than zero counts as one).
**Logits** are float32, float16 or bfloat16. Tensors that are not contiguous are copied.
"""

from berdiff_fast.backends.select import BackendUnavailableError
from berdiff_fast.ops._checks import LOGIT_DTYPES, MASK_DTYPES, PREDICTIONS
from berdiff_fast.ops.draw import initial_noise, posterior, q_sample, sample_step
from berdiff_fast.ops.group_norm import group_norm_silu
from berdiff_fast.ops.loss import diffusion_loss
from berdiff_fast.ops.overlap import overlap
from berdiff_fast.ops.winograd import winograd, winograd_weight

__all__ = [
    "LOGIT_DTYPES",
    "MASK_DTYPES",
    "PREDICTIONS",
    "BackendUnavailableError",
    "diffusion_loss",
    "group_norm_silu",
    "initial_noise",
    "overlap",
    "posterior",
    "q_sample",
    "sample_step",
    "winograd",
    "winograd_weight",
]
