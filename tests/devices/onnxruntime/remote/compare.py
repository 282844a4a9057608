"""Compares what ``decode.py`` found on a provider with what it found on the CPU; fails where they differ.

    python compare.py CPU.json PROVIDER.json

The best token must be the CPU's at every step where the CPU's two best differ by more than 0.1, cutting
a sequence back and running it again must give the same logits, and the profile must show the heavy
operators on the provider: a fallback to the CPU answers correctly and proves nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nybble.devices.onnxruntime.placement import strays
from nybble.devices.onnxruntime.providers import PROVIDERS

MARGIN = 0.1
"""Difference of the two best logits from which on they must come in the same order."""
REPEAT = 0.02
"""Largest difference of repeated logits, relative to the largest: other kernels, another order of sums."""


def main() -> None:
    cpu, other = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    provider = PROVIDERS[other["provider"]]
    if provider.name == "cpu" or cpu["provider"] != "cpu":
        raise SystemExit("the first file must be the CPU's, the second another provider's")
    gaps = [first - second for first, second in cpu["top"]]
    steps = list(zip(cpu["best"], other["best"], gaps, strict=True))
    sure = [step for step in steps if step[2] > MARGIN]
    wrong = [step for step in sure if step[0] != step[1]]
    last = max(abs(a - b) for a, b in zip(cpu["last"], other["last"], strict=True))
    placed = other["placement"].get(provider.ep, {})
    moved = strays(other["placement"], provider.ep)
    attention = [op for op in placed if "Attention" in op]
    products = [op for op in placed if op.startswith(("MatMul", "Gemm", "DmlFused"))]
    print(f"onnxruntime {other['onnxruntime']}, {provider.ep}; the CPU's: onnxruntime {cpu['onnxruntime']}")
    print(f"reason: {other['reason']}")
    for ep, operators in sorted(other["placement"].items()):
        print(f"  {ep}: " + ", ".join(f"{count} {op}" for op, count in sorted(operators.items())))
    print(f"steps: {len(steps)}, of which the CPU is sure: {len(sure)}, of these different: {len(wrong)}")
    print(f"equal tokens: {sum(a == b for a, b, _ in steps)} of {len(steps)}")
    print(f"last logits: largest difference {last:.3g}, largest logit {cpu['largest']:.3g}")
    print(f"run again after cutting back: largest difference {other['again_difference']:.3g}")
    print(f"decode: {other['tokens_per_second']:.1f} tokens/s (CPU: {cpu['tokens_per_second']:.1f})")
    problems = []
    if wrong:
        problems.append(f"{len(wrong)} tokens differ although the CPU's best two are {MARGIN} apart: {wrong}")
    if moved:
        problems.append(f"heavy operators ran on another provider: {moved}")
    if not attention or not products:
        problems.append(f"no attention or no matrix products on {provider.ep}: {sorted(placed)}")
    if other["again_difference"] > REPEAT * other["largest"]:
        problems.append("running again after cutting back gives other logits")
    if problems:
        raise SystemExit("FAILED: " + "; ".join(problems))
    print("passed")


if __name__ == "__main__":
    main()
