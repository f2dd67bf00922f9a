"""All benches one after another, each in a process of its own, then one table of their checks.

    python -m bench.run_all --quick --data idx:DIR --out build/bench

Each bench leaves OUT/NAME.json (NAME_quick.json with --quick), the micro benches OUT/micro.json. Exit code: 0 where
every bench ran, 1 where one did not, and with --check 8 where one missed a target.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
BENCHES = (
    "startup",
    "step",
    "training",
    "memory",
    "lines",
    "peers",
    "highres",
    "cache",
    "cache_vs_recompute",
    "overlap",
    "reliability",
    "head_kinds",
    "heads",
    "accuracy",
)


class Row(NamedTuple):
    bench: str
    name: str
    value: str
    target: str = "-"
    ok: str = "-"  # yes, no, or - where there is no target or nothing could be measured


def default_data() -> str:
    """NF_DATA_FASHION, a folder or a whole idx:DIR, where it is set; else the generated images."""
    found = os.environ.get("NF_DATA_FASHION")
    if not found:
        return "synthetic:2000"
    return found if found.startswith("idx:") else f"idx:{found}"


def run(command: Sequence[str], result: Path) -> dict[str, Any] | None:
    """The JSON document that a command writes to `result`; None where it failed."""
    result.unlink(missing_ok=True)  # or an earlier run's would pass for this one's
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode
    return json.loads(result.read_text(encoding="utf-8")) if code == 0 and result.exists() else None


def check_rows(bench: str, document: dict[str, Any]) -> list[Row]:
    """A row for each check of a bench."""
    said = {True: "yes", False: "no", None: "-"}
    return [
        Row(bench, name, "-" if c["value"] is None else f"{c['value']:g}", c["target"], said[c["ok"]])
        for name, c in document["checks"].items()
    ]


def micro_rows(document: dict[str, Any]) -> list[Row]:
    """A row for each case of pytest-benchmark's document: its median."""
    cases = document["benchmarks"]
    return [Row("micro", c["name"].removeprefix("test_"), f"{1e3 * c['stats']['median']:.4g} ms") for c in cases]


def run_benches(quick: bool, data: str, out: Path) -> list[Row]:
    """Runs all; a bench that failed has one row that says so."""
    rows = []
    for bench in (*BENCHES, "micro"):
        if bench == "micro":
            result = out / "micro.json"
            command = ["pytest", "bench/test_micro.py", "-q", f"--benchmark-json={result}"]
        else:
            result = out / f"{bench}{'_quick' if quick else ''}.json"
            command = [f"bench.bench_{bench}", *["--quick"] * quick, "--json", str(result), "--data", data]
        print(f"== {bench}: python -m {' '.join(command)}", flush=True)
        document = run(command, result)
        if document is None:
            rows.append(Row(bench, "the whole bench", "did not run", ok="no"))
        else:
            rows += micro_rows(document) if bench == "micro" else check_rows(bench, document)
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [Row("bench", "name", "value", "target", "ok"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all benches, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute for each bench on two cores")
    parser.add_argument("--data", default=default_data(), help="cifar10:DIR, idx:DIR, synthetic:N, ...")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of the results")
    parser.add_argument("--check", action="store_true", help="exit with 8 where a target is missed")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = run_benches(args.quick, args.data, out)
    print(table(rows))
    if any(row.value == "did not run" for row in rows):
        return 1
    return 8 if args.check and any(row.ok == "no" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
