"""Peak memory and time a layer of a calibration, with and without Hessians, and those of the whole model.

    python bench/calibrate_memory.py MODEL.gguf --windows 128 --window 512 [--hessian] [--layers 2]

Runs the first ``--layers`` layers of a model over random tokens, which cost what real ones do, in this
process. The peak is the largest resident set that the kernel saw, pages of the mapped model included
(VmHWM); anonymous is what is not of a file. Time grows in proportion to layers; memory does not, except
for the pages of the file, which the system takes back when it needs them. With ``--as-layers 32`` the
time is that of so many.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from time import perf_counter

import numpy as np
from harness import process_memory

from nybble.formats.mapping import release_pages
from nybble.loading import read_checkpoint
from nybble.quantize.layer_runner import LayerRunner


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and time a layer of a calibration.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--as-layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fast")
    parser.add_argument("--hessian", action="store_true")
    parser.add_argument("--two-runs", action="store_true", help="collect and advance apart, as quantizers do")
    arguments = parser.parse_args()
    checkpoint = read_checkpoint(arguments.model)
    shape = arguments.windows, arguments.window
    windows = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, shape)
    options = {"threads": arguments.threads, "precision": arguments.precision}
    seconds, anonymous = [], 0
    with LayerRunner(checkpoint, list(windows), **options) as runner:
        for layer in range(min(arguments.layers, runner.num_layers)):
            started = perf_counter()
            found = runner.collect(layer, hessian=arguments.hessian, advance=not arguments.two_runs)
            anonymous = max(anonymous, process_memory(os.getpid())["RssAnon"])
            del found
            if arguments.two_runs:
                runner.advance(layer)
            release_pages()
            seconds.append(perf_counter() - started)
    result = {
        "model": arguments.model.name,
        "tokens": windows.size,
        "hessian": arguments.hessian,
        "seconds_a_layer": round(float(np.mean(seconds)), 2),
        "tokens_a_second_and_layer": round(windows.size / float(np.mean(seconds))),
        "minutes_as_layers": round(float(np.mean(seconds)) * arguments.as_layers / 60, 1),
        "peak_gb": round(process_memory(os.getpid())["VmHWM"] / 1e9, 2),
        "anonymous_gb": round(anonymous / 1e9, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
