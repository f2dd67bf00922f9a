"""Predictions of a finished model: for image files, for a data set, and against its copy on disk.

What the command line prints, as JSON takes it. Images are (N, C, H, W), resized or padded to the model's own size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf_engine.data import fit_to
from nf_engine.errors import DataError, MissingExtraError
from nf_engine.exits import EarlyExitModel, evaluate
from nf_engine.export import load
from nf_engine.sources import load_split

SHOWN = 10  # predictions in the output for a data set


def classify_files(model: EarlyExitModel, files: Sequence[Path], policy: str) -> dict[str, Any]:
    """Class, probability and exit of each file.

    Raises:
        DataError: a file is no image, or the model takes float images.
        MissingExtraError: Pillow is not installed.
    """
    if model.facts["input_dtype"] != "uint8":
        raise DataError(
            "the model was trained on float images, files hold bytes; scale them and call predict() in Python"
        )
    batch = torch.stack([_read_image(file, model.facts["input_shape"]) for file in files])
    return {"predictions": _predictions(model, batch, [str(f) for f in files], policy)}


def classify_split(model: EarlyExitModel, spec: str, limit: int | None, policy: str) -> dict[str, Any]:
    """Scores on the test split, or the training split where there is no other, and the first predictions.

    Args:
        spec: as for `sources.load_split`.
        limit: first images only.

    Raises:
        DataError: the images are not the model's, and it takes no squares to which they could be brought.
    """
    training, test = load_split(spec)
    data, shape = training if test is None else test, tuple(model.facts["input_shape"])
    if data.shape != shape:
        channels, height, width = shape
        if height != width:
            raise DataError(f"{spec} has images {data.shape}, the model takes {shape}; resize them first")
        data = fit_to(data, size=width, channels=channels)
    data = data.subset(torch.arange(min(limit or len(data), len(data))))
    result = evaluate(model, data, policy=policy)
    first, labels = data.batch(torch.arange(min(SHOWN, len(data))))
    rows = _predictions(model, first, range(len(first)), policy)
    return {
        "split": "train" if test is None else "test",
        **dataclasses.asdict(result),
        "predictions": [{**row, "label": label} for row, label in zip(rows, labels.tolist(), strict=True)],
    }


def _predictions(model: EarlyExitModel, images: Tensor, names: Sequence[object], policy: str) -> list[dict[str, Any]]:
    result = model.predict(images, policy=policy)
    top = result.probabilities.amax(1).tolist()
    rows = zip(names, result.labels.tolist(), top, result.exits.tolist(), strict=True)
    return [{"image": i, "prediction": k, "probability": p, "exit": e} for i, k, p, e in rows]


def _read_image(file: Path, shape: Sequence[int]) -> Tensor:
    """One file as (C, H, W) uint8, resized to the model's input."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("reading image files needs Pillow; install nf-engine[images]") from None
    channels, height, width = shape
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB").resize((width, height)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: expected an image that Pillow reads, found {error}") from None
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)


def difference(model: EarlyExitModel, written: Path) -> float:
    """The largest difference of the logits of the model and of its copy on disk, over random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, *model.facts["input_shape"]), generator=generator, dtype=torch.uint8)
    if model.facts["input_dtype"] != "uint8":
        images = images / 255
    copy = load(written) if written.is_dir() else torch.export.load(written).module()
    with torch.no_grad():
        return float((copy(images) - model(images)).abs().max())
