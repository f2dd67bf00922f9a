"""Writes the golden files of this version into a new folder: a run of three commits with a block and a cache.

python make.py FOLDER       once for each version of a format; what was written before stays as it is
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nf_engine import checkpoint
from nf_engine.manifest import FileEntry, Position
from nf_engine.run_folder import NewFile, RunFolder
from nf_engine.storage import ActivationCache, CacheGeometry


def block() -> dict[str, torch.Tensor]:
    """One tensor of each dtype that a block has."""
    return {
        "unit0.body.0.weight": (torch.arange(24.0) / 8).view(2, 3, 4),
        "unit0.body.1.num_batches_tracked": torch.tensor(7),
        "unit0.head.weight": torch.tensor([1.5, -2.0]).bfloat16(),
        "unit0.head.bias": torch.tensor([0.1]).half(),
        "scores": torch.tensor([[0.5, 1.25]], dtype=torch.float64),
    }


def main(path: Path) -> None:
    training = {**block(), "unit0.optimizer.0.step": torch.tensor(3.0), "losses": torch.tensor([2.5])}
    del training["scores"]
    with RunFolder(path) as run:
        first = [NewFile("config", b"lr = 0.1\n"), NewFile("plan", b"{}\n"), NewFile("profile", b"{}\n")]
        first.append(NewFile("initial", checkpoint.to_bytes({"stage0.weight": torch.arange(3.0)}, {})))
        run.begin("c" * 64, "d" * 64, {"torch": "2.13.0", "device": "cpu"}, first)
        run.add_metrics({"block": 0, "epoch": 0, "loss": 2.5})
        run.commit(Position(0, 1, 2), [NewFile("train", checkpoint.to_bytes(training, {"format": "nf-block/1"}))])
        g = CacheGeometry(sample_shape=(2, 3), dtype="fp32", samples=5, chunk_bytes=128)
        with ActivationCache.create(path, "x001-g0003.nfc", g, block=1, generation=3) as cache:
            cache.append(torch.arange(30.0).view(5, 2, 3), torch.tensor([0, 1, 2, -1, 4]), torch.arange(5) + 100)
            record = cache.finish()
        listed = FileEntry(record.name, "cache", 1, g.file_bytes, record.table_sha256)
        made = NewFile("block", checkpoint.to_bytes(block(), {"format": "nf-block/1"}), 0)
        run.commit(Position(1), [made], there=[listed], drop=["train"])
    (path / "LOCK").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
