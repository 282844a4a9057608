"""A float32 Hugging Face folder with a model's function, its weights moved off the grid they lie on.

    python bench/make_off_grid.py MODEL FOLDER [--deviation 0.3] [--seed 0]

A model that was quantized once lies on a coarse grid, and quantizing it to the same one again costs next
to nothing: it tells nothing about a quantizer. Here the input features of the layers' linears are scaled by
log-normal factors, and the inverse is folded into what comes before (``nybble.quantize.folding``), so
that the function stays. The embedding, and an output matrix of its own, cannot be scaled so and stay as
they are. The factors are the same for the same seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from quantize_methods import off_grid

import nybble
from nybble.formats.huggingface.writer import write_huggingface_folder
from nybble.loading import read_checkpoint
from nybble.models import build_graph
from nybble.quantize.folding import plan_folding


def make(model: str, folder: Path, deviation: float, seed: int) -> None:
    """Writes the folder, which must not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source, made = Path(scratch) / "source", Path(scratch) / "made"
        nybble.convert(model, source, to="safetensors", encoding="f32")
        (source / "nybble.json").unlink()  # what GGUF carried must not help whoever reads the folder
        checkpoint = read_checkpoint(source)
        made.mkdir()
        moved = off_grid(checkpoint, plan_folding(build_graph(checkpoint)), deviation, seed)
        write_huggingface_folder(moved, made)
        made.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model, moved off its grid, as float32 safetensors.")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--deviation", type=float, default=0.3, help="standard deviation of the factors' logarithms"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed moves it in another way")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        raise SystemExit(f"{arguments.folder} exists")
    make(arguments.model, arguments.folder, arguments.deviation, arguments.seed)


if __name__ == "__main__":
    main()
