# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for one architecture, without a GPU; prints a JSON report on its last line.

python tests/compile_triton.py 90
"""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from berdiff_fast.backends import triton as kernels

ROWS = {"samples_per_image": "i32", "first_row": "i64", "first_sample": "i64"}
SHAPE = {"pixels": "i64", "chunks_per_row": "i64"}


def both(dtype: str) -> dict[str, str]:
    """Two tensors, concatenated by channel."""
    return {"x": f"*{dtype}", "other": f"*{dtype}", "count": "i32", "other_count": "i32"}


COMBINATIONS = {
    "noise_kernel": [({"out": f"*{m}", "seeds": "*i64", **SHAPE, **ROWS}, {}) for m in ("u8", "fp32", "bf16", "fp16")],
    "q_sample_kernel": [
        (
            {"out": f"*{m}", "y_0": f"*{m}", "t": "*i64", "flip": "*fp32", "seeds": "*i64", **SHAPE, **ROWS},
            {},
        )
        for m in ("u8", "fp32", "bf16", "fp16")
    ],
    "step_kernel": [
        (
            {
                "out": f"*{out}",
                "y_t": f"*{y}",
                "logits": f"*{z}",
                "coefficients": "*fp32",
                "nan_flag": "*i32",
                "seeds": "*i64",
                "timestep": "i32",
                **SHAPE,
                **ROWS,
            },
            {"PREDICTS_Y0": y0, "THRESHOLD": threshold},
        )
        for out, y, z in (
            ("u8", "u8", "fp32"),
            ("fp32", "fp32", "fp32"),
            ("bf16", "bf16", "bf16"),
            ("u8", "bf16", "bf16"),
            ("fp16", "fp16", "fp16"),
        )
        for y0, threshold in ((False, False), (True, False), (False, True))
    ],
    "posterior_kernel": [
        (
            {"out": "*fp32", "y_t": f"*{y}", "logits": f"*{z}", "coefficients": "*fp32", **SHAPE},
            {"PREDICTS_Y0": y0},
        )
        for y, z in (("u8", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"))
        for y0 in (False, True)
    ],
    "overlap_kernel": [
        (
            {
                "out": "*i64",
                "a": f"*{a}",
                "b": f"*{b}",
                "a_masks": "i32",
                "b_masks": "i32",
                "pixels": "i64",
                "spans": "i64",
            },
            kernels.OVERLAP_SIZES,
        )
        for a, b in (("u8", "u8"), ("fp32", "fp32"), ("bf16", "u8"), ("fp16", "fp16"))
    ],
    "loss_kernel": [
        (
            {
                **{"gradient": f"*{g}", "logits": f"*{z}", "y_t": f"*{y}", "y_0": f"*{y}", "ignore": "*u8"},
                **{"columns": "*fp64", "kept": "*i64", "partial": "*fp32", **SHAPE},
            },
            {"PREDICTS_Y0": y0, "IGNORES": ignores, **({} if ignores else {"ignore": None, "kept": None})},
        )
        for g, z, y in (("fp32", "fp32", "u8"), ("bf16", "bf16", "bf16"), ("fp32", "fp16", "fp16"))
        for y0, ignores in ((False, False), (True, True))
    ],
    "group_norm_sums_kernel": [
        (
            {"sums": "*fp32", **both(z), "pixels": "i64", "spans": "i64"},
            {**kernels.GROUP_NORM_SIZES, "STEPS": kernels.GROUP_NORM_STEPS},
        )
        for z in ("fp32", "bf16", "fp16")
    ],
    "group_norm_factors_kernel": [
        (
            {
                **{"factors": "*fp32", "sums": "*fp32", **both(z), "weight": "*fp32", "bias": "*fp32"},
                **{"pixels": "i64", "spans": "i64", "groups": "i32", "eps": "fp32"},
            },
            {"SIZE": size},
        )
        for z, size in (("fp32", 4), ("bf16", 32), ("fp16", 1))
    ],
    "group_norm_apply_kernel": [
        (
            {"out": f"*{z}", "factors": "*fp32", **both(z), "pixels": "i64", "spans": "i64"},
            {"SILU": silu, **kernels.GROUP_NORM_SIZES},
        )
        for z, silu in (("fp32", True), ("bf16", True), ("bf16", False), ("fp16", True))
    ],
    "loss_value_kernel": [({"value": "*fp32", "partial": "*fp32", "chunks_per_row": "i64"}, {"BLOCK": 128})],
}


def main() -> None:
    architecture = int(sys.argv[1])
    report = {}
    for name, combinations in COMBINATIONS.items():
        kernel = getattr(kernels, name)
        for types, constants in combinations:
            if "BLOCKS" in kernel.arg_names:
                constants = {**constants, "BLOCKS": kernels.BLOCKS}
            signature = {a: "constexpr" if a in constants else types[a] for a in kernel.arg_names}
            source = ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(kernel.arg_names.index(a),): v for a, v in constants.items()},
            )
            compiled = triton.compile(
                source, target=GPUTarget("cuda", architecture, 32), options=dict(kernels.LAUNCH_OPTIONS)
            )
            ptx = compiled.asm["ptx"]
            label = f"{name}:{','.join(types.values())}:{constants}"
            report[label] = {
                "cubin_bytes": len(compiled.asm["cubin"]),
                "target": re.search(r"\.target (sm_\d+)", ptx).group(1),
                "flushes": ".ftz" in ptx,
                "divides": "div.rn.f32" in ptx,
                "fused": len(re.findall(r"\bfma\.rn(\.ftz)?\.f32", ptx)),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
