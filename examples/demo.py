"""Demo: a VGG-11 at a quarter of its width learns scanned digits inside 75 % of what backpropagation needs.

Plan, train, choose an exit, export it, load it back and classify images that no step before has seen.
Run it with `make demo`; it takes about a minute on two cores and writes to a temporary folder.
"""

import tempfile
from pathlib import Path

import torch

import nf_engine
from nf_engine.data import fit_to, load_split
from nf_engine.export import export_pt2, save_pretrained
from nf_engine.models import build
from nf_engine.records import format_bytes

SHARE = 0.75  # of backpropagation's peak at the same batch; the first of the eight stages alone needs 0.69
BATCH = 64
EPOCHS = 8


def digits():
    """1,437 training and 360 test images, 8x8 gray, enlarged to the (3, 32, 32) that the model reads."""
    train, test = load_split("digits")
    return fit_to(train, size=32, channels=3), fit_to(test, size=32, channels=3)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    train, test = digits()
    model = build("vgg11", classes=10, width=0.25)

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
    print("labels     ", *labels.tolist())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
