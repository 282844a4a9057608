"""nybble's models in EleutherAI's lm-evaluation-harness: multiple choice, perplexity and generation tasks.

    python -m nybble.evaluate.harness --model_args pretrained=smollm2 --tasks capitals \\
        --include_path examples/tasks

takes the arguments of ``lm_eval``, with ``--model nybble --device cpu`` unless others are named. In Python,
``lm_eval.simple_evaluate(model=NybbleLM("smollm2"), ...)``. Needs ``pip install nybble[evaluate]``.

Scores follow the harness's own Hugging Face backend: a continuation's log-probability is that of the
tokens which the whole text has more than its context alone, and text may name special tokens.
Source: https://github.com/EleutherAI/lm-evaluation-harness, ``docs/model_guide.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import nybble
from nybble.devices.base import BatchItem
from nybble.evaluate.measures import log_likelihoods
from nybble.generate.prompt import encode_text
from nybble.model import Model
from nybble.text.chat import ChatTemplate

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        f"tasks need lm-evaluation-harness, which cannot be imported ({error}): pip install nybble[evaluate]"
    ) from error

MAX_ANSWER = 256
"""Tokens of an answer where a task does not say how many."""
PLAIN = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Options of answers where a task does not say otherwise: greedy, whatever the model's file recommends."""
_PASSED_ON = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_PIECE_BYTES = 48 << 20  # logits that are held at a time


@register_model("nybble")
class NybbleLM(LM):
    """A model for the harness.

    Args:
        pretrained: as ``nybble.load``, or a model that is loaded already.
        device: where to run; None: ``cpu``.
        max_length: most tokens of context and answer; None: what the model allows.
        max_gen_toks: tokens of an answer where a task does not say.
        options: further ones of ``nybble.load``: ``threads``, ``precision``, ``kv_cache``, ...
        batch_size, max_batch_size: not used; texts that begin alike share what was computed instead.
    """

    def __init__(
        self,
        pretrained: str | Model,
        *,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_ANSWER,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, Model):
            self.model = pretrained
        else:
            self.model = nybble.load(pretrained, device=device or "cpu", context_length=max_length, **options)
        self.name = "nybble" if isinstance(pretrained, Model) else pretrained
        self.max_length = min(max_length or self.model.context_length, self.model.context_length)
        self.max_gen_toks = max_gen_toks
        self._sequence = self.model.session.new_sequence()

    # -- likelihoods -------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability in nats, and whether greedy decoding says it."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        # In this order neighbours share the longest beginnings.
        order = sorted(range(len(pairs)), key=lambda i: (pairs[i][0] + pairs[i][1], i))
        for i in self._with_progress(order, disable_tqdm, "log-likelihoods"):
            results[i] = self._score(*pairs[i])
            self.cache_hook.add_partial("loglikelihood", requests[i].args, results[i])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each text: log-probability in nats, in windows as long as the model allows."""
        results = []
        for request in self._with_progress(requests, disable_tqdm, "rolling log-likelihoods"):
            (text,) = request.args
            tokens = self.model.tokenizer.encode(text, add_special=False)
            windows = utils.get_rolling_token_windows(
                token_list=tokens, prefix_token=self._begin[0], max_seq_len=self.max_length, context_len=1
            )
            pairs = map(utils.make_disjoint_window, windows)
            result = sum((self._score(context, targets)[0] for context, targets in pairs), 0.0)
            results.append(result)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and those that follow it; spaces between belong to the continuation."""
        tokenizer = self.model.tokenizer
        if not context:
            return self._begin, tokenizer.encode(continuation, add_special=False)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = encode_text(tokenizer, context)
        whole = encode_text(tokenizer, context + continuation)
        return (before or self._begin), whole[len(before) :]

    @property
    def _begin(self) -> list[int]:
        """What stands before a text that has nothing before it: the begin token, or else an end token."""
        tokenizer = self.model.tokenizer
        for token in (tokenizer.bos_id, tokenizer.eos_id, *sorted(tokenizer.eos_ids)):
            if token is not None:
                return [token]
        return [0]

    def _score(self, context: Sequence[int], targets: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of targets after a context, of which the beginning is cut off if it is too long."""
        if not targets:
            return 0.0, True
        inputs = [*context, *targets][-(self.max_length + 1) :][:-1]
        count = min(len(targets), len(inputs))
        kept = targets[-count:]
        sequence = self._sequence
        shared = _shared(sequence.tokens, inputs[: len(inputs) - count])
        sequence.truncate(shared)
        silent = inputs[shared : len(inputs) - count]
        if silent:
            self.model.session.forward([BatchItem(sequence, silent, "none")])
        rest = inputs[len(inputs) - count :]
        rows = max(1, _PIECE_BYTES // (4 * self.model.session.vocab_size))
        total, greedy = 0.0, True
        for start in range(0, count, rows):
            logits = self.model.session.forward([BatchItem(sequence, rest[start : start + rows], "all")])
            found, best = log_likelihoods(logits, kept[start : start + rows])
            total += float(np.sum(found))
            greedy = greedy and bool(best.all())
        return total, greedy

    # -- answers -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, options)."""
        results = []
        for request in self._with_progress(requests, disable_tqdm, "answers"):
            context, options = request.args
            text = self._generate(context, dict(options))
            results.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def _generate(self, context: str, given: dict[str, Any]) -> str:
        until = given.pop("until", None) or ()
        most = int(given.pop("max_gen_toks", self.max_gen_toks))
        sampled = given.pop("do_sample", None)
        options = {**PLAIN, **{name: given.pop(name) for name in _PASSED_ON if given.get(name) is not None}}
        given = {name: value for name, value in given.items() if value is not None}
        if given:
            raise ValueError(
                f"nybble has no option for {', '.join(sorted(given))} of this task's generation_kwargs"
            )
        if sampled is False:
            options["temperature"] = 0.0
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"an answer of {most} tokens leaves no room for a context in {self.max_length}")
        tokens = encode_text(self.model.tokenizer, context)[-room:] or self._begin
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        return self.model.complete(tokens, max_tokens=most, stop=stop, **options).text

    # -- chat --------------------------------------------------------------------------------------

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, by the model's template."""
        tokenizer = self.model.tokenizer
        template = ChatTemplate(
            self._template(), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source where one is asked for."""
        return self._template() if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return self.name.replace("/", "__")

    def _template(self) -> str:
        checkpoint = self.model.checkpoint
        if checkpoint is None or checkpoint.chat_template is None:
            raise ChatTemplate.missing(self.name)
        return checkpoint.chat_template

    @staticmethod
    def _with_progress(items: Sequence[Any], disable: bool, what: str) -> Iterable[Any]:
        from tqdm import tqdm

        bar: Iterable[Any] = tqdm(items, disable=disable or not sys.stderr.isatty(), desc=what)
        return bar


def _shared(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    count = 0
    for one, two in zip(held, wanted, strict=False):
        if one != two:
            break
        count += 1
    return count


def main() -> None:
    """The ``lm_eval`` command with this model, on the CPU unless ``--device`` names another device."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = _completed(sys.argv[1:])
    cli_evaluate()


def _completed(words: Sequence[str]) -> list[str]:
    """The command's words, with a model and a device where they choose none (lm_eval's own is ``cuda:0``)."""
    result = list(words)
    options = {word.partition("=")[0] for word in words}
    runs = bool(words) and (words[0] == "run" or words[0].startswith("-"))
    if runs and not options & {"--config", "-C", "--help", "-h"}:
        if not options & {"--model", "-M", "-m"}:
            result += ["--model", "nybble"]
        if "--device" not in options:
            result += ["--device", "cpu"]
    return result


if __name__ == "__main__":
    main()
