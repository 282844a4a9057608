"""Tokens that end a generation, found by name: files often tell only one of them.

Names and exceptions follow ``llama_vocab`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

END_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
# Padding, repository and file marks of fill-in-the-middle models: text after them is a new document.
# At most one of each kind counts, and a key of the file takes precedence over the name.
FILL_PAD_NAMES = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")
FILL_REPOSITORY_NAMES = ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")
FILL_FILE_NAMES = ("<|file_sep|>",)
KNOWN_ENDS = frozenset((*END_NAMES, *FILL_PAD_NAMES, *FILL_REPOSITORY_NAMES, *FILL_FILE_NAMES))
# gpt-oss: structure that readers of the answer need, so it stays text.
ALWAYS_TEXT = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def end_tokens(ids: Mapping[str, int], given: Iterable[int | None]) -> frozenset[int]:
    """Ids of all tokens that end a generation.

    ``ids`` maps token texts to ids; ``given`` holds the ids that the file itself names (None:
    absent).
    """
    found = {ids[name] for name in END_NAMES if name in ids}
    found.update(token_id for token_id in given if token_id is not None)
    # In the Harmony format <|end|> closes a message, not the answer.
    harmony = {"<|return|>", "<|call|>", "<|end|>"} <= ids.keys()
    solar = {"<|flush|>", "<|end|>"} <= ids.keys() and ("<|call|>" in ids or "<|calls|>" in ids)
    if harmony or solar:
        found.discard(ids["<|end|>"])
    if "<|tool_response>" in ids and "</s>" in ids:
        found.discard(ids["</s>"])
    return frozenset(found)


def first_of(ids: Mapping[str, int], names: Iterable[str]) -> int | None:
    """Id of the first of these names that is a token."""
    return next((ids[name] for name in names if name in ids), None)
