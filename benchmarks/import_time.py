"""What `import lightning_prune` costs beside `import lightning.pytorch`, which it needs anyway.

    python benchmarks/import_time.py            # 10 runs of each, in turns
    python benchmarks/import_time.py --runs 30

Each import is timed in a fresh interpreter, in turns, after one of each that only warms the disk; in CPU time, so that
other work on the machine disturbs little. Prints the medians, their ratio,
and the modules of ours and of others that lightning alone does not import.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

TIME = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
MODULES = "import sys; import {}; print(*sorted(sys.modules))"
NAMES = ("lightning.pytorch", "lightning_prune")


def output(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="of each (default: 10)")
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(runs + 1):
        for name in NAMES:
            seconds = float(output(TIME.format(name)))
            if turn:
                times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        print(f"import {name:18} {median:.3f} s   (from {min(times[name]):.3f} to {max(times[name]):.3f})")
    ratios = [ours / theirs for theirs, ours in zip(*times.values(), strict=True)]
    print(f"ratio {medians[NAMES[1]] / medians[NAMES[0]]:.3f}, median of turns {statistics.median(ratios):.3f}")
    base, ours = (set(output(MODULES.format(name)).split()) for name in NAMES)
    more = ours - base
    others = sorted(name for name in more if not name.startswith("lightning_prune"))
    print(f"{len(more) - len(others)} modules of ours, {len(others)} others: {', '.join(others)}")


if __name__ == "__main__":
    main()
