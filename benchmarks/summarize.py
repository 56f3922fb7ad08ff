#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns a pytest-benchmark JSON of the CPU kernels into a Markdown table, with ratios within that one run.

python benchmarks/summarize.py benchmarks/results/cpu.json
"""

from __future__ import annotations

import json
import sys


def main(path: str) -> None:
    with open(path) as file:
        run = json.load(file)
    info = run["machine_info"]
    cases = {b["name"].removeprefix("test_"): b for b in run["benchmarks"]}
    isas = [name for name in ("avx512", "avx2", "portable") if f"step[float32-float32-{name}]" in cases]
    best = f"step[float32-float32-{isas[0]}]"
    ours = cases[best]["stats"]["median"]
    print(f"{info['cpu']}, {info['platform']}, torch {info['packages']['torch']}, {run['datetime'][:10]}\n")
    print(f"| case | median | ns a pixel | spread (IQR) | time over that of {best} |")
    print("|---|---|---|---|---|")
    for name, case in cases.items():
        stats, pixels = case["stats"], case["extra_info"]["pixels"]
        per_pixel = f"{stats['median'] / pixels * 1e9:.2f}" if pixels else ""
        ratio = f"{stats['median'] / ours:.2f}" if pixels else ""
        spread = stats["iqr"] / stats["median"]
        print(f"| {name} | {stats['median'] * 1e6:.1f} us | {per_pixel} | {spread:.0%} | {ratio} |")
    for op, case in (("step", "ratios"), ("loss, forward and backward", "loss_ratios")):
        for name, ratio in cases.get(case, {"extra_info": {"ratios": {}}})["extra_info"]["ratios"].items():
            print(f"\n{op}, against {name}, taken in turns: {ratio:.2f} times as fast")
    for name, case in cases.items():
        if "ratio" in case["extra_info"]:
            print(f"\nGED and HM-IoU, {name}, against as published: {case['extra_info']['ratio']:.0f} times as fast")


if __name__ == "__main__":
    main(sys.argv[1])
