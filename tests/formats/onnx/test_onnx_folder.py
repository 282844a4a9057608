"""ONNX folders opened as they are: what is read beside the model, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from nybble.convert.convert import convert
from nybble.devices.onnxruntime import runtime
from nybble.devices.onnxruntime.providers import PROVIDERS
from nybble.errors import FormatError, NotFoundError, NybbleError, UnsupportedError
from nybble.formats.onnx.folder import describe_decoder, is_onnx, open_onnx_folder
from support.conversions import model_file
from support.onnx_decoders import LAYERS, make_decoder, save_decoder
from support.random_checkpoints import LLAMA

DATA = Path(__file__).parents[2] / "data" / "onnxruntime"


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "model"
    shutil.copytree(DATA / "llama-int4-cpu", target)
    return target


def change(folder: Path, edit) -> None:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def test_a_builders_folder(folder):
    checkpoint = open_onnx_folder(folder)
    assert (checkpoint.format, checkpoint.name, checkpoint.source) == ("onnx", "model", folder)
    config = checkpoint.config
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("llama", 98, 32)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 2, 1)
    assert (config.head_dim, config.max_position_embeddings) == (16, 64)
    assert not checkpoint.tensors
    assert checkpoint.metadata["onnx.weight_bytes"] > 30_000
    tokenizer = checkpoint.tokenizer.build()
    ids = tokenizer.encode("Hi there", add_special=False)
    assert tokenizer.decode(ids) == "Hi there" and tokenizer.eos_ids == {2}
    assert checkpoint.chat_template.startswith("{% for m in messages %}")
    file = open_onnx_folder(folder / "model.onnx")
    assert file.config == config


def test_a_config_beside_it_is_better(folder):
    values = {
        "model_type": "llama", "vocab_size": 98, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 5000.0,
        "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    assert open_onnx_folder(folder).config.rope.theta == 5000.0
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "of_tomorrow"}))
    assert open_onnx_folder(folder).config.architecture == "llama"  # genai_config.json's


def test_end_tokens_and_sampling_of_genai_config(folder):
    def edit(config):
        config["model"]["eos_token_id"] = [2, 40]
        config["search"].update(do_sample=True, temperature=0.3)

    change(folder, edit)
    checkpoint = open_onnx_folder(folder)
    assert checkpoint.tokenizer.build().eos_ids == {2, 40}
    assert checkpoint.metadata["huggingface.generation_config"]["temperature"] == 0.3


def test_a_plain_export(tmp_path):
    folder = save_decoder(tmp_path / "plain")
    checkpoint = open_onnx_folder(folder)
    assert checkpoint.tokenizer is None and checkpoint.config.num_hidden_layers == LAYERS
    nested = save_decoder(tmp_path / "web" / "onnx")
    shutil.copy(DATA / "llama-int4-cpu" / "tokenizer.json", nested.parent)
    assert open_onnx_folder(nested.parent).tokenizer is not None
    save_decoder(tmp_path / "two", "a.onnx")
    save_decoder(tmp_path / "two", "b.onnx")
    with pytest.raises(NotFoundError, match=r"name one of its files: a\.onnx, b\.onnx"):
        open_onnx_folder(tmp_path / "two")
    assert is_onnx(folder) and is_onnx(folder / "model.onnx") and not is_onnx(tmp_path)
    with pytest.raises(NotFoundError, match=r"holds no \*\.onnx"):
        open_onnx_folder(tmp_path)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda c: c["model"]["decoder"].update(filename="../model.onnx"), FormatError, "out of the folder"),
        (lambda c: c["model"]["decoder"].update(filename="C:\\model.onnx"), FormatError, "out of the folder"),
        (lambda c: c["model"]["decoder"].update(filename="no.onnx"), NotFoundError, "names it"),
        (lambda c: c["model"]["decoder"].update(pipeline=[{}]), UnsupportedError, "one decoder"),
        (lambda c: c["model"].update(vision={}), UnsupportedError, "one decoder"),
        (lambda c: c["model"].update(decoder=3), FormatError, "must be a mapping"),
        (lambda c: c["model"]["decoder"].update(sliding_window={"x": 4}), UnsupportedError, "slide"),
        (lambda c: c["model"]["decoder"].update(num_key_value_heads="x"), None, ""),
        (lambda c: c["model"]["decoder"].update(head_size=10**9), FormatError, "makes no sense"),
        (lambda c: c["model"]["decoder"]["inputs"].update(past_key_names="p.%d"), UnsupportedError, "p.0"),
        (lambda c: c["model"]["decoder"]["inputs"].update(past_value_names="%d"), FormatError, "lacks the"),
        (lambda c: c["model"]["decoder"]["inputs"].update(past_names="p.%d"), UnsupportedError, "together"),
        (lambda c: c["model"]["decoder"]["inputs"].update(input_ids="x"), UnsupportedError, "input_ids"),
        (lambda c: c["model"]["decoder"]["outputs"].update(logits="x"), FormatError, "no output x"),
        (lambda c: c["search"].update(past_present_share_buffer="yes"), FormatError, "true or false"),
    ],
)  # fmt: skip
def test_a_bad_genai_config(folder, edit, error, message):
    change(folder, edit)
    if error is None:
        describe_decoder(folder)
    else:
        with pytest.raises(error, match=message):
            describe_decoder(folder)


def external(folder: Path, **entries: str) -> None:
    """Give every tensor with external data other entries."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            for entry in tensor.external_data:
                entry.value = entries.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "location",
    ["../model.onnx.data", "/etc/passwd", "C:/x", "", "a/../../x", "\\\\host\\x", "gone.data", "."],
)
def test_external_data_stays_in_the_folder(folder, location):
    external(folder, location=location)
    with pytest.raises((FormatError, NotFoundError)):
        open_onnx_folder(folder)


def test_external_data_is_there_whole(folder):
    external(folder, offset="999999999")
    with pytest.raises(FormatError, match="are not in the file, which has"):
        open_onnx_folder(folder)
    external(folder, offset="x")
    with pytest.raises(FormatError, match="whole numbers"):
        open_onnx_folder(folder)


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symbolic links")
def test_a_link_out_of_the_folder(folder):
    data = folder / "model.onnx.data"
    shutil.move(data, folder.parent / "elsewhere")
    data.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(FormatError, match="link"):
        open_onnx_folder(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"GGUF" + b"\x00" * 64, b"\x08\x0a" * 9])
def test_no_onnx_model(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(FormatError, match="is no ONNX model"):
        open_onnx_folder(tmp_path)


def test_inputs_that_nobody_fills(tmp_path):
    with pytest.raises(UnsupportedError, match="does not know how to fill the input encoder_states"):
        open_onnx_folder(save_decoder(tmp_path / "a", extra_input="encoder_states"))
    model = make_decoder()
    kept = [value for value in model.graph.input if not value.name.startswith("past")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="key/value caches"):
        open_onnx_folder(tmp_path / "model.onnx")


def test_fixed_lengths(tmp_path):
    model = make_decoder()
    past = next(value for value in model.graph.input if value.name == "past_key_values.0.key")
    past.type.tensor_type.shape.dim[2].dim_value = 16
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="fixed length of 16"):
        open_onnx_folder(tmp_path / "model.onnx")


def paths(value, path=()):
    """Every place in a JSON value."""
    if path:
        yield path
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield from paths(item, (*path, key))


STRANGE = (None, -1, 0, 10**12, 1.5, True, "", "x", "%d", "%s%d", [], [None], {}, {"x": None}, [{"cpu": 3}])


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_any_value_anywhere_in_genai_config(folder, strange):
    """A hostile config is refused with an error of nybble's, or does no harm."""
    onnxruntime = pytest.importorskip("onnxruntime")
    original = json.loads((folder / "genai_config.json").read_text())

    for path in paths(original):
        config = json.loads(json.dumps(original))
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = strange
        (folder / "genai_config.json").write_text(json.dumps(config))
        try:
            open_onnx_folder(folder)
            decoder = describe_decoder(folder)
            section = runtime.session_section(decoder.genai, "f")
            runtime.wanted_provider(section)
            for provider in PROVIDERS.values():
                runtime.provider_options_of(section, provider, {}, "f")
                runtime.session_options(onnxruntime, section, {}, provider, threads=1, where="f")
        except NybbleError as error:
            assert len(str(error)) < 2000


def test_the_matrix_of_tied_embeddings_counts_once(tmp_path: Path) -> None:
    config = replace(LLAMA, tie_word_embeddings=True)
    convert(model_file(tmp_path / "x.gguf", config), tmp_path / "x", to="onnx-cpu-int4", allow_lossy=True)
    stored = sum(path.stat().st_size for path in (tmp_path / "x").glob("model.onnx*"))
    counted = describe_decoder(tmp_path / "x").weight_bytes
    assert 0.9 * stored < counted <= stored
