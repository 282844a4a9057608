"""Decodes tokens on one execution provider and tells where nodes ran; the checks run it in another Python.

    python decode.py FOLDER PROVIDER --tokens 64 --output RESULT.json [--follow CPU_RESULT.json]

With ``--follow`` the tokens of another run are fed, so that every step has the same input and can be
compared by itself. Needs NumPy, onnx and an ONNX Runtime package; nybble's native core is not used.
The output holds the tokens, for each step the best token and the two largest logits, the logits of the
last step, and the placement of nodes from ONNX Runtime's own profile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nybble.devices.base import BatchItem
from nybble.devices.onnxruntime import compile_session
from nybble.devices.onnxruntime.placement import placement_of_profile
from nybble.formats.onnx.folder import open_onnx_folder


def decode(session, prompt: list[int], count: int, follow: list[int] | None) -> dict[str, object]:
    """Greedy tokens after a prompt that is run in two parts, a fork half way, and what each step saw."""
    sequence = session.new_sequence()
    half = len(prompt) // 2
    session.forward([BatchItem(sequence, prompt[:half], "none")])
    logits = session.forward([BatchItem(sequence, prompt[half:], "last")])[-1]
    tokens, best, top, seconds = [], [], [], []
    for step in range(count):
        order = np.argsort(logits)[-2:][::-1]
        best.append(int(order[0]))
        top.append([float(logits[i]) for i in order])
        tokens.append(best[-1] if follow is None else follow[step])
        if step == count // 2:
            old, sequence = sequence, sequence.fork()  # copies the cache on the device
            old.close()
        started = time.perf_counter()
        logits = session.forward([BatchItem(sequence, tokens[-1:], "last")])[-1]
        seconds.append(time.perf_counter() - started)
        if step % 8 == 0:
            print(f"step {step} of {count}: {seconds[-1]:.2f} s", flush=True)
    # Cut back and run again: the same logits must come out.
    sequence.truncate(len(prompt) + count - 4)
    again = session.forward([BatchItem(sequence, tokens[-4:], "last")])[-1]
    return {
        "tokens": tokens,
        "best": best,
        "top": top,
        "last": [float(x) for x in logits],
        "again_difference": float(np.abs(again - logits).max()),
        "largest": float(np.abs(logits).max()),
        "tokens_per_second": count / sum(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode on one provider.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("provider")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=json.loads, default=[1, 5, 33, 17, 9, 40, 23, 11, 8, 30])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--follow", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    follow = json.loads(arguments.follow.read_text())["tokens"] if arguments.follow else None
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        session = compile_session(
            open_onnx_folder(arguments.folder),
            provider=arguments.provider,
            threads=arguments.threads,
            session_options={"enable_profiling": True, "profile_file_prefix": str(Path(folder) / "run")},
        )
        loaded = time.perf_counter() - started
        print(f"loaded in {loaded:.1f} s: {session.reason}", flush=True)
        found = decode(session, arguments.prompt, arguments.tokens, follow)
        profile = Path(session.decoder.end_profiling())
        events = json.loads(profile.read_text())
        profile.unlink()
    found |= {
        "provider": session.provider,
        "reason": session.reason,
        "onnxruntime": __import__("onnxruntime").__version__,
        "load_seconds": loaded,
        "placement": placement_of_profile(events),
        "planned": {ep: dict(operators) for ep, operators in session.placement.items()},
    }
    arguments.output.write_text(json.dumps(found))
    print("done", flush=True)
    sys.stdout.flush()
    os._exit(0)  # drivers of software GPUs may hang when they are unloaded


if __name__ == "__main__":
    main()
