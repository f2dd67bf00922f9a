"""The tables of the README and of docs/reliability.md from the result files, so that no figure is typed by hand.

python -m bench.tables            writes them between the markers <!-- table: NAME --> and <!-- end: NAME -->
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import bench_lines, bench_peers

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def points(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def accuracy() -> str:
    """Mean and standard deviation over the seeds, whole network (best exit in brackets)."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for suffix, budget in (("", "60 %"), ("_two_units", "76 %, batch 128")):
        for data in ("fashion", "cifar10"):
            for row in load(f"accuracy{suffix}_{data}")["rows"]:
                key = (row["arm"], "none" if row["arm"] == "backpropagation" else budget)
                found.setdefault(key, {}).setdefault(data, []).append(row)
    lines = [
        "| training | budget | units / blocks, batches | Fashion-MNIST, % | CIFAR-10, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (arm, budget), sets in found.items():
        first = sets["fashion"][0]
        batches = ", ".join(map(str, dict.fromkeys(first["batches"])))
        cells = [
            points([r["accuracy"] for r in sets[d]])
            + ("" if first["units"] == 1 else f" ({100 * statistics.mean(r['best_exit'] for r in sets[d]):.1f})")
            for d in ("fashion", "cifar10")
        ]
        shape = f"{first['units']} / {first['blocks']}, {batches}"
        lines.append(f"| {arm} | {budget} | {shape} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def speed_and_memory() -> str:
    """Medians over the rounds; ratios are taken round by round."""
    document = load("training")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        found.setdefault((row["case"], row["arm"]), []).append(row)
    budget = document["arguments"]["share"]
    base = {r["round"]: r["epoch_seconds"] for r in found["equal", "backpropagation"]}
    lines = ["| training | batches | s an epoch | to backpropagation | peak, MB |", "| --- | --- | --- | --- | --- |"]
    for (case, arm), rows in found.items():
        ratio = statistics.median(r["epoch_seconds"] / base[r["round"]] for r in rows)
        name = f"{arm}, largest batch in the budget" if case == "largest" else arm
        batches = ", ".join(map(str, dict.fromkeys(rows[0]["batches"])))
        seconds = statistics.median(r["epoch_seconds"] for r in rows)
        lines.append(f"| {name} | {batches} | {seconds:.2f} | {ratio:.2f} | {rows[0]['peak'] / 1e6:.1f} |")
    memory = load("memory")
    ran = [r for r in memory["rows"] if r["feasible"]]
    worst = max(abs(r["predicted"] / r["peak"] - 1) for r in ran)
    over = sum(r["peak"] > r["budget"] for r in memory["rows"])
    units = load("lines")["rows"]
    far = sum(abs(r["off"]) > bench_lines.OFF for r in units)
    below, above = -min(r["off"] for r in units), max(r["off"] for r in units)
    lines.append("")
    lines.append(
        f"The budget is {budget:.0%} of backpropagation's peak at batch 128. Of {len(memory['rows'])} other runs "
        f"(6 budgets, 2 models,\n2 strategies) {over} went over their budget; "
        f"the predicted peak was off by at most {worst:.3%}.\nWhat the planner starts from, sums over the lines of "
        f"stages, is more than 5 % from the peak of a whole step for {far} of {len(units)} units\n(10 networks, "
        f"6 batches): at most {above:.1%} above it and {below:.4%} below."
    )
    return "\n".join(lines)


def cache() -> str:
    """Medians over the rounds, a part for each kind of shuffle."""
    rows = load("cache")["rows"]
    lines = [
        "| cache | shuffled by | write, GB/s | of fio | CPU s/GB | cold read, GB/s | of fio | CPU s/GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(r["candidate"] for r in rows):
        mine = [r for r in rows if r["candidate"] == name]
        cells = []
        for column, form in (("gb_s", ".2f"), ("of_fio", ".0%"), ("cpu_s_gb", ".2f")):
            for phase in ("write", "read"):
                found = [r[f"{phase}_{column}"] for r in mine if f"{phase}_{column}" in r]
                cells.append(format(statistics.median(found), form) if found else "-")
        if "write_gb_s" in mine[0]:
            write, read = cells[0::2], cells[1::2]
            lines.append("| " + " | ".join((name, mine[0]["shuffle"], *write, *read)) + " |")
    overlap = load("overlap")["rows"]
    lines += [
        "",
        "| I/O beside computing | direction | compute / I/O | hidden | left after the last batch, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in overlap:
        left = f"{1e3 * r['exposed']:.1f}" if r["direction"] == "write" else "-"
        lines.append(f"| {r['case']} | {r['direction']} | {r['ratio']:g} | {r['hidden']:.0%} | {left} |")
    return "\n".join(lines)


def head_kinds() -> str:
    """vgg16, four units trained together: means over the seeds, the last exit with its standard deviation."""
    rows = [
        r for r in load("head_kinds")["rows"] if (r["model"], r["mode"]) == ("vgg16", "together") and r["units"] != 2
    ]
    columns = {
        "CIFAR-10": ("cifar10", 8000),
        "CIFAR-10, longer": ("cifar10", 12000),
        "Fashion-MNIST": ("fashion", 8000),
    }
    lines = [
        "| head | " + " | ".join(f"{name}, % | n" for name in columns) + " | MFLOPs | weights | of the step |",
        "|" + " --- |" * (2 * len(columns) + 4),
    ]
    for kind in dict.fromkeys(r["kind"] for r in rows):
        cells = []
        for place in columns.values():
            mine = [r for r in rows if (r["kind"], (r["data"], r["images"])) == (kind, place)]
            exits = [points(list(column)) for column in zip(*(r["exits"] for r in mine), strict=True)]
            means = [e.partition(" ")[0] for e in exits[:-1] if place[0] == "cifar10"] if mine else ["-"]
            last = exits[-1:] if len(mine) > 1 else [e.partition(" ")[0] for e in exits[-1:]]
            cells += [" ".join(means + last), str(len(mine))]
        costs = [r for r in rows if r["kind"] == kind]
        share = statistics.median(r["head_share"] for r in costs)
        cost = [f"{sum(costs[0]['head_flops']) / 1e6:.2f}", f"{sum(costs[0]['head_parameters']):,}", f"{share:.0%}"]
        lines.append("| " + " | ".join([kind, *cells, *cost]) + " |")
    return "\n".join(lines)


def peers() -> str:
    """The runs of bench_peers with the first seed, but for those that repeat another; ratios over all seeds."""
    every = load("peers")["rows"]
    rows = [r for r in every if "same_as" not in r and r["seed"] == 0]
    goal = bench_peers.reference(rows, rows[0])
    lines = [
        "| budget | training | batches | s an epoch | s to the accuracy | accuracy, % | peak, MB | of the budget |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        budget = row["budget_bytes"]
        name = "none" if budget is None else f"{row['budget']}, {budget / 1e6:.1f} MB"
        cells = [name, row["arm"], "does not fit", "", "", "", "", ""]
        if row["fits"]:
            reached = bench_peers.seconds_to(row, goal)
            cells[2:] = [
                ", ".join(map(str, dict.fromkeys(row["batches"]))) + bench_peers.parts(row),
                f"{row['epoch_seconds']:.2f}", "-" if reached is None else f"{reached:.1f}",
                f"{100 * row['accuracy']:.1f}", f"{row['peak'] / 1e6:.1f}",
                "-" if budget is None else f"{row['peak'] / budget:.2f}",
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *ratios([r for r in every if r["fits"]])])


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Times of an image, seed by seed: median, least and largest."""
    seeds = [[r for r in rows if r["seed"] == seed] for seed in dict.fromkeys(r["seed"] for r in rows)]
    lines = []
    for of, against, target in (
        (bench_peers.equal_batch, "backpropagation's at the same batch, under budgets that this one exceeds", 1.05),
        (bench_peers.same_budget, "checkpointing's under the same budget", 0.85),
    ):
        found = [value for value in map(of, seeds) if value is not None]
        spread = f"{min(found):.2f} to {max(found):.2f}, {len(found)} seeds"
        lines.append(
            f"* An image takes `windows` {statistics.median(found):.2f} of {against} ({spread}; target {target})."
        )
    return lines


def step() -> str:
    """Ratios of CPU time to a plain loop, medians of the rounds."""
    rows = load("step")["rows"]
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = ["| step | " + " | ".join(models) + " |", "|" + " --- |" * (len(models) + 1)]
    for name in dict.fromkeys(r["step"] for r in rows):
        of = {r["model"]: f"{r['ratio']:.2f}" for r in rows if r["step"] == name}
        lines.append("| " + " | ".join([name, *(of[m] for m in models)]) + " |")
    return "\n".join(lines)


def promises() -> str:
    """What the tests of reliability have reached, by promise."""
    rows = sorted(load("reliability_figures").values(), key=lambda r: (int(r["promise"][1:]), r["what"]))
    lines = ["| promise | what the tests did | reached | commit | date |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        done = f"{r['reached']:,}/{r['of']:,}"
        lines.append(f"| {r['promise']} | {r['what']} | {done} | {r['commit']} | {r['date']} |")
    return "\n".join(lines)


def reliability() -> str:
    """A changed byte, a kill while a good checkpoint is replaced, a full disk, and the milliseconds of a save."""
    rows = load("reliability")["rows"]
    lines = [
        "| writer | bytes changed: error, silently wrong, no effect | kills: old, new, neither | full disk leaves | "
        "ms a save, 1, 16, 64 MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        if r["what"] != "changed byte":
            continue
        mine = [q for q in rows if q.get("candidate") == r["candidate"]]
        (kill,) = [q for q in mine if q["what"] == "kill" and q["by"] == "strace"]
        (full,) = [q for q in mine if q["what"] == "full disk"]
        times = " ".join(f"{q['median_ms']:.0f}" for q in mine if q["what"] == "commit")
        lines.append(
            f"| {r['candidate']} | {r['error']:,}, {r['wrong']:,}, {r['no effect']:,} | "
            f"{kill['old']}, {kill['new']}, {kill['lost'] + kill['wrong']} | {full['left']} | {times} |"
        )
    return "\n".join(lines)


TABLES = {
    "accuracy": accuracy,
    "speed and memory": speed_and_memory,
    "step": step,
    "peers": peers,
    "cache": cache,
    "head kinds": head_kinds,
}


OF_RELIABILITY = {"promises": promises, "reliability": reliability}
PAGES = {"README.md": TABLES, "docs/reliability.md": OF_RELIABILITY}  # page -> its tables


def filled(text: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """A page with its tables made from the result files."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end: {name} -->)", re.DOTALL)
        assert pattern.search(text), f"the page has no markers for {name}"
        table = make()
        text = pattern.sub(lambda match, table=table: match[1] + table + match[2], text)
    return text


if __name__ == "__main__":
    for page, tables in PAGES.items():
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
        print("\n\n".join(make() for make in tables.values()))
