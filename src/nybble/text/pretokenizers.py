r"""Pre-tokenizers: how byte-level BPE models cut text before merging, by GGUF's name for them.

``tokenizer.ggml.pre`` names one row of ``PRE_TOKENIZERS``. A row's patterns are applied one after
another; each isolates its matches inside the pieces that the one before it left. They are written
for Oniguruma, the engine of `tokenizers`; most are those of the models' own tokenizer.json. Names,
flags and the patterns of models without a tokenizer.json: ``src/llama-vocab.cpp`` of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.errors import UnsupportedError


def _ranges(listed: str) -> str:
    """A character class of code points given in hexadecimal: ``"41-5A 61"`` is ``[A-Za]``."""
    ends = (part.split("-") for part in listed.split())
    return "[" + "".join("-".join(rf"\x{{{end}}}" for end in pair) for pair in ends) + "]"


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Words cut where case changes: any capitals, then small letters; or capitals alone.
_CASED_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
_CAPITAL_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
_SLASH_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_GPT4O = (
    rf"{_CASED_WORD}{_CONTRACTION}?|{_CAPITAL_WORD}{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_SLASH_PUNCTUATION}|{_SPACES}"
)
_TEKKEN = rf"{_CASED_WORD}|{_CAPITAL_WORD}|\p{{N}}|{_SLASH_PUNCTUATION}|{_SPACES}"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK_CJK = _ranges("4E00-9FA5 3040-309F 30A0-30FF") + "+"
_DEEPSEEK_WORD = rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
# Cased letters as DeepSeek-LLM's tokenizer.json lists them.
_DEEPSEEK_LETTERS = _ranges(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA "
    "1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 "
    "1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC "
    "1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 "
    "213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B "
    "A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_DEEPSEEK_PUNCTUATION = _ranges("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_DEEPSEEK_HAN = _ranges("4E00-9FA5 800-4E00 AC00-D7FF") + "+"
# Scripts without spaces between words, as AFMoE's and Youtu's tokenizers list them.
_ASIAN_SCRIPTS = _ranges(
    "4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E00-E7F E80-EFF "
    "1780-17FF 1000-109F AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
)
_HANGUL, _BOPOMOFO = _ranges("AC00-D7A3 3131-318E"), _ranges("3105-312F")
_WIDE_PUNCTUATION = _ranges("FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F")
_NOT_LIST_PUNCTUATION = r" ?[^(\s|.,!?…。，、।۔،)]+"
_LINES = r"[^\n]+|[\n]+"
_HAN_FREE_UPPER = rf"[{_UPPER}&&[^\p{{Han}}]]"
_HAN_FREE_LOWER = rf"[{_LOWER}&&[^\p{{Han}}]]"
_BLANK_CASCADE = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text. Flags are the defaults that the name implies in GGUF."""

    patterns: tuple[str, ...]
    byte_level: bool = True
    """Pieces are spelled in GPT-2's byte alphabet; else as they are, with ``<0xE4>`` fallback."""
    ignore_merges: bool = False
    """A piece that is a token as a whole becomes that token, whatever the merges say."""
    add_bos: bool = False
    add_sep: bool = False
    space_mark: bool = False
    """Spaces become ``▁`` first."""
    drop_matches: bool = False
    """Matches are thrown away instead of kept."""


def _same(names: str, row: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), row)


_DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", _GPT2))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **_same(
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo"
        " jais trillion granite-docling exaone4",
        PreTokenizer((_GPT2,)),
    ),
    **_same("jina-v1-en jina-v2-code roberta-bpe", PreTokenizer((_GPT2,), add_sep=True)),
    **_same(
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        _DIGITS_THEN_GPT2,
    ),
    **_same(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **_same("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3,))),
    **_same(
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer((_QWEN2,)),
    ),
    "qwen35": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "ufakzeka": PreTokenizer((rf"{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACES}",)),
    "laguna": PreTokenizer((_LINES, _QWEN2)),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_PUNCTUATION}|{_SPACES}"), ignore_merges=True
    ),
    "jais-2": PreTokenizer(
        (
            rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|\s*[\r\n]+"
            rf"|{_BLANK_CASCADE}|\s{{1,2}}(?!\S)|\s{{1}}",
        )
    ),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_DEEPSEEK_LETTERS}+",
            rf"\s?{_DEEPSEEK_PUNCTUATION}+",
            r"\s+$",
            _DEEPSEEK_HAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}")),
    **_same(
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        PreTokenizer((r"\p{N}{1,3}", _DEEPSEEK_CJK, _DEEPSEEK3)),
    ),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            _DEEPSEEK_CJK,
            rf"{_DEEPSEEK_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "youtu": PreTokenizer(
        (
            rf"{_HANGUL}+|{_WIDE_PUNCTUATION}+|{_BOPOMOFO}+|{_DEEPSEEK_CJK}",
            rf"{_CASED_WORD}{_CONTRACTION}?|{_CAPITAL_WORD}{_CONTRACTION}?"
            rf"|\p{{N}}|{_SLASH_PUNCTUATION}|{_SPACES}",
        ),
        ignore_merges=True,
    ),
    "afmoe": PreTokenizer(
        (
            # Digits in threes, counted from the right.
            r"\p{Nd}{1,3}(?=(?:\p{Nd}{3})*(?!\p{Nd}))",
            _ASIAN_SCRIPTS + "+",
            _DEEPSEEK3,
        )
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "poro-chat": PreTokenizer((_NOT_LIST_PUNCTUATION,)),
    "bloom": PreTokenizer((_NOT_LIST_PUNCTUATION,)),
    "gpt3-finnish": PreTokenizer((_NOT_LIST_PUNCTUATION,)),
    "viking": PreTokenizer((_NOT_LIST_PUNCTUATION, r"\p{N}")),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    **_same("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
    "granite-embed-multi-97m": PreTokenizer((_GPT4O,), ignore_merges=True),
    **_same("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    "kimi-k2": PreTokenizer(
        (
            r"\p{Han}+"
            rf"|[^\r\n\p{{L}}\p{{N}}]?{_HAN_FREE_UPPER}*{_HAN_FREE_LOWER}+{_CONTRACTION}?"
            rf"|[^\r\n\p{{L}}\p{{N}}]?{_HAN_FREE_UPPER}+{_HAN_FREE_LOWER}*{_CONTRACTION}?"
            rf"|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}",
        )
    ),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    **_same(
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(
            (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    "seed-coder": PreTokenizer(
        (rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    ),
    "exaone-moe": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    **_same(
        "gemma4 granite-embed-multi-311m",
        PreTokenizer((_LINES,), byte_level=False, space_mark=True, add_bos=True),
    ),
    "sarvam-moe": PreTokenizer((_LINES,), byte_level=False, space_mark=True),
    "whitespace": PreTokenizer((r"\s+",), byte_level=False, drop_matches=True),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The row of this name; UnsupportedError that lists the known names for any other."""
    row = PRE_TOKENIZERS.get(name)
    if row is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedError(
            f"unknown pre-tokenizer {name!r} (tokenizer.ggml.pre); text would be cut in the wrong places. "
            f"Known: {known}"
        )
    return row
