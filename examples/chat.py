"""A streamed conversation that reuses what it computed: python examples/chat.py [MODEL]"""

import sys

import nybble

QUESTIONS = ["What is the capital of France?", "And of Italy?"]

with nybble.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2") as model:
    messages = []
    for question in QUESTIONS:
        print(f"> {question}")
        messages.append({"role": "user", "content": question})
        stream = model.stream_chat(messages, temperature=0, max_tokens=60)
        for piece in stream:
            print(piece, end="", flush=True)
        reply = stream.reply
        messages.append({"role": "assistant", "content": reply.text})
        usage = reply.usage
        print(f"\n  [{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached,")
        print(f"   {reply.timings.decode_tokens_per_second:.0f} tokens a second]")
