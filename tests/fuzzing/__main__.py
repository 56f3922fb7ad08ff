# SPDX-License-Identifier: Apache-2.0
"""The command: ``PYTHONPATH=tests python -m fuzzing --seconds 60``."""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

from fuzzing.readers import READERS
from fuzzing.run import Outcome, judge, load_libraries, make, shrink, sound


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzzing", description="Every reader, fed with damaged files.")
    parser.add_argument("--seconds", type=float, default=60, help="to go on for (default: %(default)s)")
    parser.add_argument("--mutants", type=int, help="how many of each reader, however long it takes")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=READERS, metavar="READER", help=", ".join(READERS))
    parser.add_argument("--again", metavar="SEED:READER:NUMBER", help="one mutant, by its name")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="folder for what is wrong (%(default)s)")
    options = parser.parse_args()
    load_libraries()
    if options.again:
        seed, reader, number = options.again.split(":")
        return 1 if report(make(int(seed), reader, int(number)), options.found) else 0

    readers = options.only or [*READERS]
    for reader in readers:
        for mutant in sound(reader):
            outcome = judge(mutant)
            if outcome.kind != READERS[reader].known:
                print(f"{mutant.name}: a sound file is {outcome.kind} {outcome.fault}", file=sys.stderr)
                return 1

    started, number = time.monotonic(), options.first
    counts: dict[str, collections.Counter[str]] = {reader: collections.Counter() for reader in readers}
    worst: dict[str, tuple[float, int]] = dict.fromkeys(readers, (0.0, 0))
    ended = False
    while not ended:
        for reader in readers:
            ended = time.monotonic() - started > options.seconds if options.mutants is None else False
            if ended:
                break
            mutant = make(options.seed, reader, number)
            outcome = judge(mutant)
            counts[reader][outcome.kind] += 1
            worst[reader] = (max(worst[reader][0], outcome.seconds), max(worst[reader][1], outcome.memory))
            if outcome.kind == "wrong":
                report(mutant, options.found, outcome)
        number += 1
        ended = ended or (options.mutants is not None and number >= options.first + options.mutants)

    print(f"{'reader':<16}{'mutants':>8}{'read':>8}{'refused':>9}{'wrong':>7}{'most s':>8}{'most MB':>9}")
    for reader, count in counts.items():
        seconds, memory = worst[reader]
        row = f"{count.total():>8}{count['read']:>8}{count['refused']:>9}{count['wrong']:>7}"
        print(f"{reader:<16}{row}{seconds:>8.1f}{memory / 1e6:>9.0f}")
    total = sum((count for count in counts.values()), collections.Counter())
    print(
        f"seed {options.seed}, numbers {options.first} to {number - 1}: {total.total()} mutants, {total['read']} read, "
        f"{total['refused']} refused, {total['wrong']} wrong, in {time.monotonic() - started:.0f} s"
    )
    return 1 if total["wrong"] else 0


def report(mutant, folder: Path, outcome: Outcome | None = None) -> bool:
    """Print what is wrong with a mutant and keep a small one; whether something is."""
    outcome = outcome or judge(mutant)
    if outcome.kind != "wrong":
        print(f"{mutant.name}: {outcome.kind}")
        return False
    small = shrink(mutant, outcome)
    path = folder / mutant.reader / mutant.seed.name / mutant.name.replace(":", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(small.data)
    path.with_name(path.name + ".txt").write_text(outcome.fault, errors="replace")
    print(f"{mutant.name} ({mutant.seed.name}, {path}): {outcome.fault.splitlines()[0]}", flush=True)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
