"""Prune every model of a zoo and check the result, beside torch-pruning.

    python benchmarks/zoo.py torchvision|timm|transformers|scaling [--only GLOB] [--no-tp] [--no-exact] [--csv FILE]

Each model runs in a process of its own, on one thread; each group of checks in a fork of that, with a time limit.
``scaling`` is three families of 1, 10 and 100 million parameters, to see what a parameter and a layer cost.
The columns:

    build, dense   the model can be built, and run as it is
    groups         `find_groups` finds something to prune
    prune          `prune_neurons` removes half of the neurons
    forward        the pruned model runs in evaluation mode
    shapes         its outputs have the shapes they had
    train, step    a forward in training mode, a training step
    lower          fewer parameters, fewer MACs
    memory         peak memory of `find_groups` was measured
    exact          with ``exact_only``, random weights and double precision the outputs are those of the masked model
    tp_*           torch-pruning: half of each layer but the last ones; whether the result runs, and its shapes
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm import tqdm
from zoo_checks import Options, columns, run_one
from zoo_models import ZOOS

Row = dict[str, Any]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", nargs="?", choices=sorted(ZOOS))
    parser.add_argument("--one", nargs=2, metavar=("ZOO", "MODEL"), help="run one model here, print one line of JSON")
    parser.add_argument("--list", action="store_true", help="print the names of the models and stop")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only models of this name")
    parser.add_argument("--no-tp", dest="tp", action="store_false", help="leave out torch-pruning")
    parser.add_argument("--no-exact", dest="exact", action="store_false", help="leave out the masked twin")
    parser.add_argument("--dense", action="store_true", help="check the models themselves only: nothing is pruned")
    parser.add_argument("--timeout", type=float, default=Options.timeout, help="seconds for each group of checks")
    parser.add_argument("--tp-timeout", type=float, default=Options.tp_timeout, help="seconds for torch-pruning")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all numbers there, after each model")
    args = parser.parse_args()
    exact = args.exact and args.zoo != "scaling"  # that is about time
    options = Options(args.timeout, args.tp_timeout, exact, args.tp, args.dense)
    if args.one:
        print(json.dumps(run_one(*args.one, options)))
        return
    if args.zoo is None:
        parser.error("which zoo?")
    names = [name for name in ZOOS[args.zoo]() if fnmatchcase(name, args.only)]
    if args.list:
        print("\n".join(names))
        return
    rows: list[Row] = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(names), desc=args.zoo, disable=None) as bar:
        for row in pool.map(lambda name: run_apart(args.zoo, name, options), names):
            rows.append(row)
            bar.write(progress(row, options, f"{len(rows)}/{len(names)}"))
            bar.update()
            if args.csv:
                write_csv(args.csv, rows)
    print_table(rows, options, scaling=args.zoo == "scaling")
    print_summary(rows, options)


def run_apart(zoo: str, name: str, options: Options) -> Row:
    """Run one model in its own process."""
    command = [sys.executable, __file__, "--one", zoo, name]
    command += [f"--timeout={options.timeout}", f"--tp-timeout={options.tp_timeout}"]
    command += ["--dense"] * options.dense + ["--no-tp"] * (not options.tp) + ["--no-exact"] * (not options.exact)
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | _ENVIRONMENT,
        start_new_session=True,  # so that its forks can be ended with it
    )
    row: Row = {"zoo": zoo, "model": name}
    try:
        out, err = child.communicate(timeout=6 * options.timeout + options.tp_timeout)  # the build and five phases
    except subprocess.TimeoutExpired:
        return row | {"build": "FAIL: took too long"}
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        return row | {"build": f"FAIL: {(err.strip().splitlines() or [f'exit code {child.returncode}'])[-1]}"}
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------------- report


def is_ok(row: Row, column: str) -> bool:
    return row.get(column) == "ok"


def failures(row: Row, options: Options) -> list[str]:
    return [f"{column} {row[column]}" for column in columns(options) if not is_ok(row, column) and column in row]


def ours(row: Row) -> float:
    return row["groups_s"] + row["prune_s"]  # type: ignore[no-any-return]


def progress(row: Row, options: Options, count: str) -> str:
    spent = f"{ours(row):.2f} s" if is_ok(row, "prune") else ""
    return f"{count} {row['model']} {spent} {'; '.join(failures(row, options)) or 'ok'}"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_table(rows: Sequence[Row], options: Options, *, scaling: bool) -> None:
    checks = columns(options)
    numbers: dict[str, Any] = {
        "M params": lambda r: number(r["params"] / 1e6),
        "forward s": lambda r: number(r["forward_s"]),
    }
    if not options.dense:
        numbers |= {
            "left": lambda r: number(r["params_after"] / r["params"]) if "params_after" in r else "",
            "groups s": lambda r: number(r.get("groups_s")),
            "prune s": lambda r: number(r.get("prune_s")),
            "forward MB": lambda r: number(r.get("forward_mb"), 0),
            "groups MB": lambda r: number(r.get("groups_mb"), 0),
        }
    if options.tp and not options.dense:
        numbers["tp s"] = lambda r: number(r.get("tp_s"))
    if scaling:
        numbers |= {
            "layers": lambda r: str(r["layers"]),
            "s/M params": lambda r: number(ours(r) / r["params"] * 1e6, 3) if is_ok(r, "prune") else "",
            "ms/layer": lambda r: number(ours(r) / r["layers"] * 1e3, 1) if is_ok(r, "prune") else "",
        }
    head = ["model", *checks, *numbers]
    body = [
        [
            row["model"],
            *(str(row.get(column, "-")).partition(":")[0] for column in checks),
            *(show(row) if is_ok(row, "dense") else "" for show in numbers.values()),
        ]
        for row in rows
    ]
    print()
    if sys.stdout.isatty() and _print_rich(head, body):
        return
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    for line in (head, *body):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rich(head: Sequence[str], body: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(*head)
    for line in body:
        table.add_row(*(f"[red]{cell}" if cell == "FAIL" else cell for cell in line))
    Console().print(table)
    return True


def print_summary(rows: Sequence[Row], options: Options) -> None:
    failed = [f"{row['model']}: {failure}" for row in rows for failure in failures(row, options)]
    print("\n" + "\n".join([*failed, ""] if failed else []))
    for column in columns(options):
        print(f"{column:12}{sum(is_ok(row, column) for row in rows)} of {len(rows)}")
    done = [row for row in rows if is_ok(row, "prune")]
    if done:
        slowest = max(done, key=ours)
        print(f"longest      {ours(slowest):.2f} s (find_groups + prune_neurons, {slowest['model']})")
    if options.tp and done:
        both = [row for row in done if "tp_s" in row]
        late = [row for row in done if "took longer" in row.get("tp_prune", "")]
        for title, time in (("find_groups + prune_neurons", ours), ("prune_neurons", lambda row: row["prune_s"])):
            _print_ratio(f"{title} / torch-pruning", [time(row) / row["tp_s"] for row in both])
            if late:
                ratios = [time(row) / row.get("tp_s", options.tp_timeout) for row in (*both, *late)]
                _print_ratio(f"  its {len(late)} timeouts counted as {options.tp_timeout:g} s", ratios)


def _print_ratio(title: str, ratios: Sequence[float]) -> None:
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{title}: {mean:.2f} (geometric mean of {len(ratios)})")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
