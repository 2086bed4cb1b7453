# SPDX-License-Identifier: Apache-2.0
"""Two tables: ``python -m benchmarks.compare BEFORE.json AFTER.json`` shows what became slower beyond the spread.

Compared is the speed-up over eager, which another hour's clock does not move, not the time. A row counts as slower
(faster) if it lost (gained) more than its own p20–p80 spread in both runs together, and at least 5 %. Exit code 1: some
row is slower, or is gone, or fails.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Row, load

LEAST = 0.05
Key = tuple[str, ...]


def key(row: Row) -> Key:
    """What makes two rows the same."""
    return (row.op, row.case, row.dtype, row.direction, row.device, row.frozen)


def spread(row: Row) -> float:
    """p20–p80 of our times, over the median."""
    ours: dict[str, Any] = row.times_s["ours"]
    return float((ours["p80"] - ours["p20"]) / ours["median"])


def verdict(before: Row, after: Row | None) -> tuple[str, str]:
    """``"slower"``, ``"faster"`` or ``"same"``, and the numbers."""
    if after is None:
        return "slower", "the row is gone"
    if after.failure:
        return "slower", after.failure
    if before.failure or "eager" not in before.speedup or "eager" not in after.speedup:
        return "same", "nothing to compare with"
    a, b = before.speedup["eager"], after.speedup["eager"]
    allowed = max(LEAST, spread(before) + spread(after))
    told = f"{a:.2f} × eager, then {b:.2f} (spread {allowed:.0%})"
    return (
        "slower" if b < a * (1 - allowed) else "faster" if b > a * (1 + allowed) else "same"
    ), told


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="also rows that are the same")
    args = parser.parse_args(argv)
    try:
        old, new = ({key(r): r for r in load(p).rows} for p in (args.before, args.after))
    except ValueError as error:
        parser.error(str(error))
    counts = dict.fromkeys(("slower", "faster", "same"), 0)
    for k, row in old.items():
        word, told = verdict(row, new.get(k))
        counts[word] += 1
        if word != "same" or args.all:
            print(f"{word:<7} {' '.join(filter(None, k))}: {told}")
    added = len(new.keys() - old.keys())
    print(", ".join(f"{n} {word}" for word, n in counts.items()) + f", {added} new")
    return int(counts["slower"] > 0)


if __name__ == "__main__":
    sys.exit(main())
