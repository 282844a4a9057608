"""Recipes: what their files may say, which rule counts, and what takes the place of what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.tensor import Tensor
from nybble.convert.rules import is_matrix
from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.onnx.targets import TARGETS
from nybble.quantize.matrices import check_encoding
from nybble.quantize.recipe import (
    FALLBACKS,
    KEEP,
    LEAST_GROUP,
    METHODS,
    Recipe,
    Rule,
    dividing,
    fitted_to,
    in_layers,
    parse_recipe,
    read_recipe,
    recipe_names,
)
from support.mix_models import MODELS, empty_model
from support.random_checkpoints import FAMILIES, LLAMA, random_checkpoint

UP, DOWN, V = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def parsed(text: str) -> Recipe:
    return parse_recipe(text.encode(), "mine", "mine.toml")


def matrix(columns: int, name: str = UP, rows: int = 4) -> Tensor:
    return Tensor(name, (rows, columns), encoding("f32"), np.zeros(rows * columns * 4, np.uint8))


# -- files ---------------------------------------------------------------------------------------------


def test_what_a_file_says() -> None:
    recipe = parsed(
        """
        description = "mine"
        to = "safetensors"
        encoding = "int4_g64_f16"
        method = "awq+gptq"
        quantization = "gptq"

        [[rules]]
        tensors = ["output", "*.v_proj.weight"]
        encoding = "keep"

        [[rules]]
        tensors = "*.down_proj.weight"
        layers = "first-12"
        query_groups = 4
        importance = true
        encoding = "int8_g64_f16"
        """
    )
    assert recipe == Recipe(
        "mine",
        "mine",
        "safetensors",
        "int4_g64_f16",
        "awq+gptq",
        (
            Rule(("output", "*.v_proj.weight"), KEEP),
            Rule(("*.down_proj.weight",), "int8_g64_f16", "first-12", 4, True),
        ),
        "gptq",
    )


def test_only_the_encoding_must_be_said() -> None:
    assert parsed('encoding = "q8_0"') == Recipe("mine", "", "gguf", "q8_0", "rtn", (), None)


RULE = 'encoding = "q8_0"\n[[rules]]\ntensors = ["*"]\nencoding = "q4_0"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encoding =", r"^mine\.toml: is no TOML: "),
        ("", r"^mine\.toml: encoding is a text, and it is missing$"),
        ("encoding = 4", r"^mine\.toml: encoding is a text$"),
        ('encoding = "q9_9"', r"^mine\.toml: .*q9_9"),
        ('encoding = "q8_0"\nname = "x"', r"^mine\.toml: unknown: name; known: description, encoding, "),
        ('encoding = "q8_0"\ndescription = 1', r"^mine\.toml: description is a text"),
        ('encoding = "q8_0"\nto = ["gguf"]', r"^mine\.toml: to is a text"),
        (
            'encoding = "q8_0"\nto = "ggml"',
            r"^mine\.toml: to is one of gguf, safetensors, onnx, .*, not 'ggml'",
        ),
        ('encoding = "q8_0"\nmethod = "best"', r"^mine\.toml: method is one of rtn, awq, .*, not 'best'"),
        (
            'encoding = "q8_0"\nquantization = "hqq"',
            r"^mine\.toml: quantization is one of awq, .*, not 'hqq'",
        ),
        ('encoding = "q8_0"\nrules = 5', r"^mine\.toml: rules is a list of tables: \[\[rules\]\]"),
        ('encoding = "q8_0"\n[rules]\ntensors = ["*"]', r"^mine\.toml: rules is a list of tables"),
        ('encoding = "q8_0"\nrules = ["a"]', r"^mine\.toml: rule 1: is a table"),
        (RULE + "[[rules]]", r"^mine\.toml: rule 2: tensors is a list of patterns of names"),
        (RULE + '[[rules]]\ntensors = ["*"]', r"^mine\.toml: rule 2: encoding is a text, and it is missing"),
        (RULE + '[[rules]]\nencoding = "q4_0"\ntensors = []', r"^mine\.toml: rule 2: tensors is a list"),
        (RULE + '[[rules]]\nencoding = "q4_0"\ntensors = [1]', r"^mine\.toml: rule 2: tensors is a list"),
        (RULE + 'layers = "last"', r"rule 1: layers is first-K or one of first-eighth, .*, not 'last'"),
        (RULE + 'layers = "first-0"', r"rule 1: layers is first-K .*, not 'first-0'"),
        (RULE + "layers = 3", r"rule 1: layers is first-K .*, not 3"),
        (RULE + "query_groups = 0", r"rule 1: query_groups is a whole number from 1 on, not 0"),
        (RULE + "query_groups = true", r"rule 1: query_groups is a whole number from 1 on, not True"),
        (RULE + "query_groups = 1.5", r"rule 1: query_groups is a whole number from 1 on, not 1\.5"),
        (RULE + 'importance = "yes"', r"rule 1: importance is true or false, not 'yes'"),
        (RULE + "layer = 1", r"rule 1: unknown: layer; known: encoding, importance, layers, "),
        (RULE.replace("q4_0", "q0_4"), r"^mine\.toml: rule 1: .*q0_4"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parsed(text)


def test_lists_in_lists() -> None:
    with pytest.raises(FormatError, match=r"^mine\.toml: "):
        parsed('encoding = "q8_0"\ndescription = ' + "[" * 100_000)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_recipe_or_a_format_error(data: bytes) -> None:
    try:
        parse_recipe(b'encoding = "q8_0"\n' + data, "x", "x.toml")
    except FormatError as error:
        assert str(error).startswith("x.toml: ")


JSON_LIKE = st.recursive(
    st.booleans() | st.integers(-3, 99) | st.sampled_from(["q4_0", "keep", "*", "middle", "first-2", "x"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(
    st.dictionaries(
        st.sampled_from(["tensors", "layers", "encoding", "query_groups", "importance"]), JSON_LIKE
    )
)
def test_a_rule_of_anything_is_a_rule_or_a_format_error(values: Mapping[str, object]) -> None:
    def toml(value: object) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(map(toml, value)) + "]"
        return str(value).lower() if isinstance(value, bool) else repr(value)

    text = 'encoding = "q8_0"\n[[rules]]\n' + "".join(
        f"{key} = {toml(value)}\n" for key, value in values.items()
    )
    try:
        (rule,) = parsed(text).rules
    except FormatError as error:
        assert str(error).startswith("mine.toml: rule 1: ")
    else:
        assert rule.tensors and rule.query_groups >= 1
        rule.fits(UP, layer=0, config=LLAMA, importance=False)


def test_recipes_by_name_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('description = "é"\nencoding = "q5_1"\n', encoding="utf-8")
    recipe = read_recipe(str(path))
    assert (recipe.name, recipe.description, recipe.encoding) == ("own", "é", "q5_1")
    path.write_bytes(b'description = "\xe9"\nencoding = "q5_1"\n')
    with pytest.raises(FormatError, match=r"own\.toml: is no TOML: "):
        read_recipe(str(path))
    with pytest.raises(NotFoundError, match=r"other\.toml: no such recipe"):
        read_recipe(str(tmp_path / "other.toml"))
    for name in ("q4_k_x", "", "../recipes/q4_k_m", "q4_k_m\n", "Q9_0"):
        with pytest.raises(NotFoundError, match=r"unknown recipe .*; known: bf16, .*; or a file, NAME\.toml"):
            read_recipe(name)


def test_recipes_have_the_names_that_llama_cpp_takes() -> None:
    for name, expected in {"Q4_K_M": "q4_k_m", "Q3_K": "q3_k_m", "q4_k": "q4_k_m", "Q5_K": "q5_k_m"}.items():
        assert read_recipe(name) == read_recipe(expected) and read_recipe(name).name == expected


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name and recipe.method in METHODS
    assert recipe.description and recipe.description.strip() == recipe.description
    assert recipe.to in ("gguf", "safetensors", *TARGETS)
    for kind in {recipe.encoding, *(rule.encoding for rule in recipe.rules)} - {KEEP}:
        if encoding(kind).block_size > 1:
            check_encoding(kind)
    # Each rule can count: none before it takes everything that it is for.
    for number, rule in enumerate(recipe.rules):
        for earlier in recipe.rules[:number]:
            always = earlier.layers is None and earlier.query_groups == 1 and earlier.importance is None
            assert not (always and set(rule.tensors) <= set(earlier.tensors)), rule


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_fit_every_family(name: str) -> None:
    recipe = read_recipe(name)
    for config in FAMILIES.values():
        check_that_it_fits(recipe, empty_model(config))


def check_that_it_fits(recipe: Recipe, checkpoint: Checkpoint) -> None:
    found = recipe.encodings_for(checkpoint, to=recipe.to, packing=recipe.quantization)
    for tensor in found:
        shape = checkpoint.tensors[tensor].shape
        assert len(shape) == 2 and shape[1] % encoding(found[tensor]).block_size == 0
    in_layers = [
        name for name, tensor in checkpoint.tensors.items() if is_matrix(tensor) and ".layers." in name
    ]
    assert set(in_layers) <= set(found)


# -- rules ---------------------------------------------------------------------------------------------


def test_the_first_rule_that_fits_counts() -> None:
    recipe = parsed(
        'encoding = "q8_0"\n'
        '[[rules]]\ntensors = ["*.mlp.*"]\nlayers = "first-1"\nencoding = "q5_0"\n'
        '[[rules]]\ntensors = ["*.up_proj.weight", "*.v_proj.weight"]\nencoding = "keep"\n'
    )
    found = recipe.encodings_for(random_checkpoint(LLAMA))
    assert found[UP] == found[DOWN] == "q5_0"
    assert V not in found and UP.replace("0", "1") not in found
    assert found[DOWN.replace("0", "1")] == found[OUTPUT] == found[EMBEDDING] == "q8_0"
    assert not any(name.endswith("norm.weight") for name in found)


def test_output_and_embedding() -> None:
    recipe = parsed(
        'encoding = "q8_0"\n[[rules]]\ntensors = ["output"]\nencoding = "q4_0"\n'
        '[[rules]]\ntensors = ["embedding"]\nencoding = "q5_0"\n'
    )
    found = recipe.encodings_for(random_checkpoint(LLAMA))
    assert (found[OUTPUT], found[EMBEDDING]) == ("q4_0", "q5_0")
    found = recipe.encodings_for(random_checkpoint(replace(LLAMA, tie_word_embeddings=True)))
    assert OUTPUT not in found and found[EMBEDDING] == "q4_0"


def test_conditions_of_heads_and_importance() -> None:
    rule = Rule(("*.v_proj.weight",), "q8_0", query_groups=2)
    assert LLAMA.num_attention_heads == 2 * LLAMA.num_key_value_heads
    assert rule.fits(V, layer=0, config=LLAMA, importance=False)
    assert not rule.fits(UP, layer=0, config=LLAMA, importance=False)
    assert not rule.fits(V, layer=0, config=replace(LLAMA, num_key_value_heads=4), importance=False)
    for wanted in (True, False):
        rule = Rule(("*",), "q8_0", importance=wanted)
        for given_one in (True, False):
            assert rule.fits(V, layer=0, config=LLAMA, importance=given_one) == (wanted == given_one)
    recipe = Recipe("x", "", "gguf", "q4_0", rules=(Rule(("*",), "q8_0", importance=True),))
    checkpoint = random_checkpoint(LLAMA)
    assert set(recipe.encodings_for(checkpoint).values()) == {"q4_0"}
    assert set(recipe.encodings_for(checkpoint, importance=True).values()) == {"q8_0"}


def test_a_condition_of_layers_is_for_layers_only() -> None:
    rule = Rule(("*", "output", "embedding"), "q8_0", "first-9999")
    assert rule.fits(UP, layer=2, config=LLAMA, importance=False)
    assert not rule.fits("output", layer=None, config=LLAMA, importance=False)


@given(st.integers(1, 200), st.integers(1, 250))
def test_layers(count: int, first: int) -> None:
    config = replace(LLAMA, num_hidden_layers=count)

    def chosen(which: str) -> set[int]:
        return {layer for layer in range(count) if in_layers(which, layer, config)}

    everything = set(range(count))
    assert chosen(f"first-{first}") == set(range(min(first, count)))
    assert chosen("first-eighth") == set(range(int(count / 8)))
    assert chosen("first-sixteenth") == set(range(int(count / 16)))
    ends = set(range(int(count / 8))) | set(range(int(7 * count / 8), count))
    assert chosen("middle") == everything - ends
    # use_more_bits of llama-quant.cpp
    assert chosen("more-bits") == ends | {i for i in everything - ends if (i - count // 8) % 3 == 2}


def test_names_come_before_rules_and_may_be_of_anything() -> None:
    checkpoint = random_checkpoint(LLAMA)
    norm = "model.norm.weight"
    named = {UP: "q6_k", DOWN: KEEP, norm: "f16"}
    found = read_recipe("q4_0").encodings_for(checkpoint, named=named)
    assert (found[UP], found[norm], DOWN in found) == ("q6_k", "f16", False)
    assert found[V] == "q4_0"


# -- what takes the place of what does not fit -------------------------------------------------------------


def test_fallbacks_are_those_of_llama_cpp() -> None:
    checkpoint = empty_model(MODELS["llama-narrow"])  # rows of 96 and 512
    found = read_recipe("q4_k_m").encodings_for(checkpoint)
    assert found[V] == "q8_0"  # q6_k's
    assert found[UP] == "q5_0"
    assert found[DOWN] == "q6_k"
    assert (found[OUTPUT], found[EMBEDDING]) == ("q8_0", "q5_0")


@pytest.mark.parametrize(("name", "other"), FALLBACKS.items())
def test_types_of_256_have_one_of_32_in_their_place(name: str, other: str) -> None:
    assert encoding(name).block_size == 256 and encoding(other).block_size == 32
    assert dividing(name, matrix(512)) == name
    assert dividing(name, matrix(96)) == other
    assert dividing(name, matrix(96, OUTPUT), output=True) == "q8_0"
    assert dividing(name, matrix(40)) == "f16"


def test_types_of_32_become_float16() -> None:
    for name in ("q4_0", "q8_0", "iq4_nl", "mxfp4"):
        assert dividing(name, matrix(64)) == name
        assert dividing(name, matrix(33)) == "f16"


@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, 64, 128, 256]), st.booleans(), st.integers(1, 600)
)
def test_groups_are_halved_until_they_divide(bits: int, size: int, zero_point: bool, columns: int) -> None:
    name = f"int{bits}_g{size}_f16" + "_z" * zero_point
    fitting = [group for group in (256, 128, 64, 32, 16) if group <= size and columns % group == 0]
    if not fitting:
        with pytest.raises(
            UnsupportedError, match=f"{UP}: rows of {columns} are no multiple of .* name another"
        ):
            dividing(name, matrix(columns))
        return
    form, wanted = affine_format(dividing(name, matrix(columns))), affine_format(name)
    assert form is not None and wanted is not None and form.group_size == fitting[0] >= LEAST_GROUP
    assert replace(form, group_size=size) == wanted


def test_awq_and_gptq_have_one_group_size() -> None:
    config = replace(LLAMA, hidden_size=128, head_dim=32, intermediate_size=96)
    checkpoint = random_checkpoint(config)
    recipe = read_recipe("int4-awq")
    plain = recipe.encodings_for(checkpoint, to="safetensors")
    assert (plain[UP], plain[DOWN]) == ("int4_g128_f16_z", "int4_g32_f16_z")
    for packing in ("awq", "gptq"):
        found = recipe.encodings_for(checkpoint, to="safetensors", packing=packing)
        assert set(found) == set(plain) and set(found.values()) == {"int4_g32_f16_z"}
    named = {V: "f16", DOWN: "int4_g48_f16_z"}
    found = recipe.encodings_for(checkpoint, to="safetensors", packing="awq", named=named)
    assert found.pop(V) == "f16"
    assert set(found.values()) == {"int4_g16_f16_z"}  # divides 128 and 48
    assert set(recipe.encodings_for(checkpoint, packing="awq", named={V: "keep"}, to="safetensors"))


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("int4_g128_f16", "gguf", "q4_0"),
        ("int4_g128_f16_z", "gguf", "q4_1"),
        ("int8_g128_f16", "gguf", "q8_0"),
        ("int3_g128_f16", "gguf", "q3_k"),
        ("int2_g128_f16", "gguf", "q2_k"),
        ("int4_g32_f16_z", "onnx-cpu-int4", "int4_g32_f32_z"),
        ("int4_g32_f32", "onnx-dml-int4", "int4_g32_f16"),
        ("int4_g32_f16", "onnx", "int4_g32_f32"),
        ("int4_g32_bf16", "safetensors", "int4_g32_bf16"),
        ("q4_k", "onnx-cpu-int4", "q4_k"),
        ("f16", "gguf", "f16"),
    ],
)
def test_integers_become_what_the_target_has(name: str, to: str, expected: str) -> None:
    assert fitted_to(name, to) == expected


def test_integers_in_gguf_fit_rows_of_any_length() -> None:
    recipe = Recipe("x", "", "safetensors", "int3_g128_f16")
    checkpoint: Checkpoint = random_checkpoint(LLAMA)  # rows of 64 and 96
    found = recipe.encodings_for(checkpoint, to="gguf")
    assert found.pop(OUTPUT) == "q8_0"
    assert set(found.values()) == {"q4_0"}  # in place of q3_k
