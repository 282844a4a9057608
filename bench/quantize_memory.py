"""Peak memory and time of quantizing a Phi-3-mini-shaped model of random weights, calibration included.

    python bench/quantize_memory.py FOLDER VOCABULARY.gguf --recipe int4-awq [--layers 32] [--windows 64]

VOCABULARY is any GGUF of the Phi-3 family: its tokenizer is taken. The work runs in a process of its own;
the peak is the largest resident set that the kernel saw, pages of mapped files included (they are given
back after every layer; "anonymous" is without them, at its largest). FOLDER needs room for the model (7.6 GB
with 32 layers) and twice its result; all of it is deleted again. CPU seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from convert_memory import make_folder

from nybble.loading import read_checkpoint

RUN = """
import json, resource, sys, time
import nybble
from nybble.quantize.quantize import CalibrationOptions
source, target, recipe, windows, window = sys.argv[1:6]
started = time.perf_counter()
anonymous = 0
def watch(progress):
    global anonymous
    with open("/proc/self/status") as file:
        rows = dict(line.split(":", 1) for line in file)
    anonymous = max(anonymous, int(rows["RssAnon"].split()[0]) * 1024)
    print(f"layer {progress.layer} of {progress.num_layers}: {time.perf_counter() - started:.0f} s,"
          f" anonymous {anonymous / 1e9:.2f} GB", file=sys.stderr)
calibration = CalibrationOptions(windows=int(windows), window=int(window))
report = nybble.quantize(source, target, recipe, calibration=calibration, progress=watch)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "seconds": round(time.perf_counter() - started),
    "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
    "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    "anonymous_gb": round(anonymous / 1e9, 2),
    "output_gb": round(report.nbytes / 1e9, 2),
    "bits_per_weight": round(report.bits_per_weight, 2),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and time of quantizing Phi-3 shapes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--recipe", nargs="+", default=["int4-awq"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    arguments = parser.parse_args()
    source = arguments.folder / f"phi3-{arguments.layers}"
    if not source.exists():
        make_folder(source, arguments.layers, read_checkpoint(arguments.vocabulary).tokenizer)
    for recipe in arguments.recipe:
        target = arguments.folder / f"{recipe}-{arguments.layers}"
        numbers = [str(arguments.windows), str(arguments.window)]
        command = [sys.executable, "-c", RUN, str(source), str(target), recipe, *numbers]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(recipe, done.stdout.splitlines()[-1], flush=True)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
