"""Continue a text: python examples/generate.py [MODEL]"""

import sys

import nybble

with nybble.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2") as model:
    print(model.generate("The three primary colours are", max_tokens=24, temperature=0))
