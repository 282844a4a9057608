"""What the model thinks comes next, from its logits: python examples/next_token.py [MODEL]"""

import sys

import numpy as np

import nybble

with nybble.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2") as model:
    tokens = model.tokenizer.encode("The capital of France is")
    logits = model.logits(tokens)[-1].astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    for token in np.argsort(-probabilities)[:5]:
        print(f"{probabilities[token]:6.1%}  {model.tokenizer.decode([token])!r}")
