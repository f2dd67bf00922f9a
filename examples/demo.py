"""Demo: a VGG-11 at a quarter of its width learns scanned digits inside 75 % of what backpropagation needs.

Plan, train, choose an exit, export it, load it back and classify images that no step before has seen; then the same
training again, killed by kill -9 and started a second time.
Run it with `make demo`; it takes about a minute on two cores and writes to a temporary folder.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import nf_engine
from nf_engine.data import fit_to
from nf_engine.export import export_pt2, save_pretrained
from nf_engine.models import build
from nf_engine.records import format_bytes
from nf_engine.sources import load_split

SHARE = 0.75  # of backpropagation's peak at the same batch; the first of the eight stages alone needs 0.69
BATCH = 64
EPOCHS = 8


def digits():
    """1,437 training and 360 test images, 8x8 gray, enlarged to the (3, 32, 32) that the model reads."""
    train, test = load_split("digits")
    return fit_to(train, size=32, channels=3), fit_to(test, size=32, channels=3)


def network():
    torch.manual_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return build("vgg11", classes=10, width=0.25)


def train_again(folder: Path, plan: Path) -> None:
    """What the process that is killed runs: the training of part 2, which commits every second."""
    made = nf_engine.Plan.load(plan)
    fields = {"memory_budget": made.budget, "batch_size": BATCH, "epochs": EPOCHS, "val_fraction": 0.1}
    nf_engine.train(network(), digits()[0], plan=made, output_dir=folder, checkpoint_minutes=1 / 60, progress="none",
                    **fields)  # fmt: skip


def killed_and_resumed(folder: Path, plan: Path) -> dict:
    """Starts the training, kills it in the middle of a block, starts it again; its last manifest."""
    command = [sys.executable, __file__, str(folder), str(plan)]
    process = subprocess.Popen(command)
    while not (position := manifest(folder)["position"])["step"]:
        time.sleep(0.05)
        assert process.poll() is None, "the training ended before it could be killed"
    process.kill()  # SIGKILL: nothing in the process can react to it
    process.wait()
    print(f"killed; its last commit: block {position['block'] + 1}, epoch {position['epoch']}, step {position['step']}")
    subprocess.run(command, check=True)
    return manifest(folder)


def manifest(folder: Path) -> dict:
    path = folder / "MANIFEST.json"
    return json.loads(path.read_text()) if path.exists() else {"position": {"step": 0}}


def weights(found: dict) -> list[str]:
    """SHA-256 of the weights of each block, its head and the scores of its exits."""
    return [entry["sha256"] for entry in found["files"] if entry["role"] == "block"]


def main(folder: Path) -> None:
    model = network()
    train, test = digits()

    print("== 1. What would backpropagation need? A plan without a limit says it; nothing is trained yet.")
    free = nf_engine.plan(model, train.shape, samples=len(train), batch_size=BATCH)
    needed = free.bounds.backpropagation
    budget = int(SHARE * needed)
    print(f"backpropagation at batch {free.bounds.batch}: {format_bytes(needed)}; our budget: {format_bytes(budget)}\n")

    print("== 2. Plan and train inside the budget.")
    fields = {"memory_budget": budget, "batch_size": BATCH, "epochs": EPOCHS, "val_fraction": 0.1}
    run = nf_engine.train(model, train, output_dir=folder / "run", progress="lines", **fields)
    peak = max(block.allocated for block in run.memory)
    print(f"peak {format_bytes(peak)} of {format_bytes(budget)}: {peak / budget:.0%} of the budget, "
          f"{peak / needed:.0%} of backpropagation\n")  # fmt: skip

    print("== 3. Every local classifier is an exit; the smallest one that is accurate enough is chosen.")
    print(run.table(), "\n")

    print("== 4. Export the chosen exit, load it back, classify the test images.")
    chosen = run.model.truncate(run.best_exit)
    saved = save_pretrained(chosen, folder / "model")
    program = export_pt2(chosen, folder / "model.pt2")
    print(f"{saved.name}/ (safetensors) and {program.name} (torch.export, {format_bytes(program.stat().st_size)})")
    loaded = nf_engine.load(saved)
    result = nf_engine.evaluate(loaded, test)
    print(f"test accuracy {result.accuracy:.2%} of {result.samples} images, {result.images_per_second:,.0f} images/s")
    images, labels = test.batch(torch.arange(10))
    print("predictions", *loaded.predict(images).labels.tolist())
    print("labels     ", *labels.tolist(), "\n")

    print("== 5. The same training again, killed by kill -9; the same command goes on.")
    last = killed_and_resumed(folder / "killed", folder / "run" / "plan.json")
    once, twice = weights(manifest(folder / "run")), weights(last)
    for block, (a, b) in enumerate(zip(once, twice, strict=True), 1):
        print(f"block {block}: sha256 of weights and scores {a[:16]} without the kill, {b[:16]} with it")
    assert once == twice, "a resumed training ends with the same bits"


if __name__ == "__main__" and len(sys.argv) == 3:
    train_again(Path(sys.argv[1]), Path(sys.argv[2]))
elif __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
