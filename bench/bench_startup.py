"""What a user waits for before training: the import, the help of the command line, and a plan without a device.

    python -m bench.bench_startup --json bench/results/startup.json

Each figure is a fresh process, the candidates in turn; --data is not used.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

from bench.timing import arguments, check, finish

TORCH = "import torch"
PACKAGE = "import torch, nf_engine"
ENGINE = "import torch, nf_engine; nf_engine.train"


def seconds(code: str) -> float:
    """Seconds that some lines take inside a fresh process, the start of Python left out."""
    script = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def planned(model: str, strategy: str) -> float:
    """Seconds of nf_engine.plan for a model at 32 pixels, imports left out."""
    script = (
        "import torch, nf_engine.engine as e, time; torch.set_num_threads(2); t = time.perf_counter(); "
        f"e.plan({model!r}, (3, 32, 32), partition={strategy!r}, memory_budget='300MiB', device_memory='1GiB'); "
        "print(time.perf_counter() - t)"
    )
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    repeats = 3 if args.quick else 7
    rows: list[dict[str, Any]] = []
    for number in range(repeats):
        rows += [
            {"what": "import torch", "round": number, "seconds": seconds(TORCH)},
            {"what": "import torch, nf_engine", "round": number, "seconds": seconds(PACKAGE)},
            {"what": "import torch, nf_engine.train", "round": number, "seconds": seconds(ENGINE)},
        ]
    script = "import sys; from nf_engine.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode
    for model in ("vgg16", "resnet18"):
        for strategy in ("windows", "layerwise"):
            for number in range(1 if args.quick else 3):
                rows.append({"what": f"plan {model} {strategy}", "round": number, "seconds": planned(model, strategy)})
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["what"], []).append(row["seconds"])
    medians = {what: statistics.median(values) for what, values in found.items()}
    for what, value in medians.items():
        print(f"{what:<32}{value:>8.2f} s, median of {len(found[what])}")
    beyond = medians["import torch, nf_engine"] - medians["import torch"]
    finish(
        args,
        rows,
        {
            "import nf_engine beyond torch, s": check(beyond, "<= 0.3"),
            "--help imports torch": check(imported, "== 0"),
            "profile and plan of vgg16 without a device, s": check(
                max(medians["plan vgg16 windows"], medians["plan vgg16 layerwise"]), "<= 10"
            ),
        },
    )


if __name__ == "__main__":
    main()
