"""Several completions of one prompt in one batch: python examples/choices.py [MODEL]"""

import sys

import nybble

with nybble.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2") as model:
    reply = model.complete("My favourite animal is", n=3, max_tokens=16, seed=1, stop=["."])
    for choice in reply.choices:
        print(f"{choice.index}: {choice.text.strip()!r} ({choice.finish_reason})")
