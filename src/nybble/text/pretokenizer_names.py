"""Which row of the table of pre-tokenizers a tokenizer.json is: GGUF can only name one.

First by structure: the steps of tokenizer.json as patterns, compared with the rows'. Where nothing is
the same, by behaviour: the row that cuts ``PROBE`` into the same pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from nybble.errors import UnsupportedError
from nybble.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from nybble.text.tokenizer_json import split_steps

# Of the names of one row, the one to write: what most files with it are.
_PREFERRED = ("gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3", "gpt-4o", "dbrx", "bailingmoe")
_GPT2 = PRE_TOKENIZERS["gpt-2"].patterns[0]

PROBE = (
    "Hello WORLD it's I'LL don'T we'Re camelCase HTTPServer x1y2 1234567 12 3 100000 1,234.56 x+=1; a->b::c"
    "\n  indented\tline\r\n\n\n   \n \t trailing   spaces  \n\nünïcode Ünï ΑΒγδ ЖЗИйк भाषा हिन्दी ไทยภาษา "
    "العربية עברית 中文字かなカナ 한국어ㄱㄴ ㄅㄆ 👩‍💻🚀❤️ «quoted» “double” ‘single’ … — – ，。！？：；、 "
    "<div class=\"a\">text</div> {'k': [1, 2]} https://example.org/a?b=c#d e\u0301a\u0308 ½²Ⅷ٣٤٥६७ "
    "$5 €6 ^~|`@#%&*()_+=[]{}\\ <sentinel:12> IMGIMGABCZ end.//\r\n/x ...!!!\n??\n\n a\u00a0b\u3000c "
    "'s 'S ' s x's! it'sx I'REally a  12 b   345\n(a)(b) 100000000 aaa bbb"
    + " " * 40
    + "z"
    + " " * 9
    + "\n"
    + "\n" * 5
    + "12345678\n last "
)
"""A text on which no two rows with different patterns agree."""


def flat_steps(component: object) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer in order, Sequences opened."""
    if not isinstance(component, dict):
        return
    if component.get("type") == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders", "processors"):
            for step in component.get(key) or ():
                yield from flat_steps(step)
    else:
        yield component


def pre_tokenizer_name(pre_tokenizer: object, *, ignore_merges: bool) -> tuple[str, bool]:
    """GGUF's name for the byte-level pre-tokenizer of a tokenizer.json, and whether the row of that
    name has the same ``ignore_merges``.

    UnsupportedError: no row cuts text like this one; the message shows its steps and the known names.
    """
    patterns = _patterns(pre_tokenizer)
    same = [] if patterns is None else [row for row in _rows() if row.patterns == patterns]
    if not same:
        cuts = cut(pre_tokenizer)
        same = [row for row, known in _known_cuts().items() if known == cuts]
    if not same:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        steps = json.dumps(list(flat_steps(pre_tokenizer)), ensure_ascii=False)
        raise UnsupportedError(
            f"GGUF has no name for the pre-tokenizer of this tokenizer.json: {steps:.600}. Known: {known}"
        )
    row = next((row for row in same if row.ignore_merges == ignore_merges), same[0])
    return _rows()[row], row.ignore_merges == ignore_merges


@lru_cache(maxsize=1)
def _rows() -> Mapping[PreTokenizer, str]:
    """The byte-level rows, each with the name to write. Those of encoders (``add_sep``) repeat others."""
    names: dict[PreTokenizer, str] = {}
    for name in (*_PREFERRED, *PRE_TOKENIZERS):
        row = PRE_TOKENIZERS[name]
        if row.byte_level and not row.add_sep:
            names.setdefault(row, name)
    return names


@lru_cache(maxsize=1)
def _known_cuts() -> Mapping[PreTokenizer, tuple[int, ...]]:
    return {row: cut({"type": "Sequence", "pretokenizers": split_steps(row)}) for row in _rows()}


def cut(pre_tokenizer: object, text: str = PROBE) -> tuple[int, ...]:
    """Where each piece of a text ends; character offsets. UnsupportedError for a part that is not known."""
    import tokenizers

    description = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer}
    model = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        runner = tokenizers.Tokenizer.from_str(json.dumps({**description, "model": model}))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UnsupportedError(f"the pre-tokenizer of this tokenizer.json is not known: {error}") from error
    if runner.pre_tokenizer is None:
        return (len(text),)
    return tuple(end for _, (_, end) in runner.pre_tokenizer.pre_tokenize_str(text))


def _patterns(pre_tokenizer: object) -> tuple[str, ...] | None:
    """The steps as patterns whose matches are isolated; None where one is something else."""
    patterns: list[str] = []
    ended = False
    for step in flat_steps(pre_tokenizer):
        kind = step.get("type")
        if ended:
            return None
        if kind == "ByteLevel":
            ended = True
            if step.get("use_regex", True):
                patterns.append(_GPT2)
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = (step.get("pattern") or {}).get("Regex")
            if not isinstance(pattern, str):
                return None
            patterns.append(pattern)
        else:
            return None
    return tuple(patterns) if ended else None
