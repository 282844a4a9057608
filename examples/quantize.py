"""Make a model smaller and see what it cost: python examples/quantize.py [MODEL] [RECIPE]"""

import sys
import tempfile
from pathlib import Path

import nybble

TEXT = Path(__file__).resolve().parent.parent / "README.md"  # any text that the model should do well on

if __name__ == "__main__":  # evaluation starts a process for every model
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    recipe = sys.argv[2] if len(sys.argv) > 2 else "q4_k_m"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{recipe}.gguf"
        report = nybble.quantize(model, target, recipe)
        print(f"{recipe}: {report.bits_per_weight:.2f} bits a weight")
        found = nybble.evaluate([model, target], text=TEXT, window=256, speed=False)
        quality = found.models[1].quality
        print(f"KL divergence {quality.kld.value:.4f} nats, same best token {quality.top1.value:.1%}")
