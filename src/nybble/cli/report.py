"""A reply as a line of timings and as JSON: what ``run`` and ``chat`` tell besides the text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.generate.logprobs import TokenLogprob
    from nybble.generate.reply import Choice, Reply


def timing_line(reply: Reply) -> str:
    """Load, prefill and decode on one line."""
    usage, timings = reply.usage, reply.timings
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    return (
        f"load {timings.load:.2f} s"
        f" · prefill {usage.prompt_tokens} tokens{cached} in {timings.prefill:.2f} s"
        f" ({timings.prefill_tokens_per_second:.1f} tokens/s)"
        f" · decode {timings.decode_tokens} tokens in {timings.decode:.2f} s"
        f" ({timings.decode_tokens_per_second:.1f} tokens/s)"
        f" · {reply.finish_reason}"
    )


def reply_json(reply: Reply, model: str) -> dict[str, Any]:
    """The object that ``nybble run --json`` prints.

    The first choice's fields are at the top; ``choices`` is there only when several were asked for.
    """
    usage, timings = reply.usage, reply.timings
    value: dict[str, Any] = {
        "model": model,
        **_choice_json(reply.choices[0]),
        "seed": reply.seed,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "total_tokens": usage.total_tokens,
        },
        "timings": {
            "load_seconds": timings.load,
            "prefill_seconds": timings.prefill,
            "decode_seconds": timings.decode,
            "prefill_tokens": timings.prefill_tokens,
            "decode_tokens": timings.decode_tokens,
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        },
    }
    if len(reply.choices) > 1:
        value["choices"] = [_choice_json(choice) for choice in reply.choices]
    return value


def _choice_json(choice: Choice) -> dict[str, Any]:
    value: dict[str, Any] = {
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "stop": choice.stop,
    }
    if choice.logprobs is not None:
        value["logprobs"] = [_logprob_json(entry) for entry in choice.logprobs]
    return value


def _finite(value: float) -> float | None:
    # JSON has no infinity; a token that a filter forbade has log-probability -inf.
    return value if math.isfinite(value) else None


def _logprob_json(entry: TokenLogprob) -> dict[str, Any]:
    return {
        "token": entry.token,
        "logprob": _finite(entry.logprob),
        "top": [{"token": token, "logprob": _finite(logprob)} for token, logprob in entry.top],
    }
