"""Parts of the recognition: operators on known arrays, quantized weights, rotary tables."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from nybble.checkpoint.config import RopeConfig
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.onnx.external_data import ExternalFiles, initializer
from nybble.formats.onnx.proto import attributes
from nybble.formats.onnx.recognise import numeric, weights
from nybble.formats.onnx.recognise.elementwise import cap_of, gate_of
from nybble.formats.onnx.recognise.rope import recover, recover_longrope, rows_of
from nybble.formats.onnx.recognise.values import Term, Weight
from nybble.graph.rotary import rotary_frequencies

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
TensorProto = onnx.TensorProto


# -- ONNX's own operator tests ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    chosen = []
    for case in found:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].domain == "" and nodes[0].op_type in numeric.OPERATORS:
            chosen.append(case)
    return chosen


KINDS = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}


@pytest.mark.slow
def test_operators_on_known_arrays_pass_onnxs_own_tests(cases):
    """Every case whose types a mask or table may have; values as float32 and int64."""
    ran: dict[str, int] = {}
    for case in cases:
        node = case.model.graph.node[0]
        for data in case.data_sets:
            given, expected = ([np.asarray(item) for item in part] for part in data)
            arrays = [*given, *expected]
            plain = all(array.dtype.name in PLAIN for array in arrays)
            if not plain or skipped(case, node):
                continue
            inputs: list[np.ndarray | None] = []
            rest = iter(given)
            for name in node.input:
                array = next(rest) if name else None
                inputs.append(None if array is None else array.astype(KINDS[array.dtype.kind]))
            values = attributes(node, case.name)
            if "value" in values:
                values["value_array"] = onnx.numpy_helper.to_array(values["value"])
            values["outputs"] = len(node.output)
            found = numeric.OPERATORS[node.op_type](inputs, values)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.shape == theirs.shape, case.name
                tolerance = 2e-3 if theirs.dtype == np.float16 else 2e-5
                np.testing.assert_allclose(
                    ours.astype(np.float64), theirs.astype(np.float64), rtol=tolerance, atol=1e-6,
                    err_msg=case.name,
                )  # fmt: skip
            ran[node.op_type] = ran.get(node.op_type, 0) + 1
    missing = set(numeric.OPERATORS) - set(ran) - {"Cast", "Size"}
    assert not missing
    assert sum(ran.values()) > 250


PLAIN = {"float32", "float16", "float64", "int32", "int64", "bool", "uint8", "int8", "int16", "uint32"}


def skipped(case, node) -> bool:
    """What is refused, or what wraps around in types that are widened here."""
    values = attributes(node, case.name)
    if node.op_type == "CumSum":
        return bool(values.get("reverse") or values.get("exclusive"))
    if node.op_type == "GatherND":
        return bool(values.get("batch_dims"))
    if node.op_type == "Mod":
        return bool(values.get("fmod")) or "uint" in case.name
    if node.op_type in ("ReduceMax", "ReduceMin", "ReduceMean") and "empty_set" in case.name:
        return True
    if node.op_type == "Cast":
        return values["to"] not in (1, 7, 9)
    return "uint" in case.name


@pytest.mark.parametrize(
    ("operator", "inputs", "values"),
    [
        ("Range", [0, 2**40, 1], {}),
        ("Range", [0, 5, 0], {}),
        ("ConstantOfShape", [[2**20, 2**20]], {}),
        ("Expand", [[1], [2**20, 2**20]], {}),
        ("Tile", [[1], [2**40]], {}),
        ("Gather", [[1, 2], [5]], {}),
        ("Reshape", [[1, 2], [3, -1]], {}),
        ("Slice", [[1, 2], [0], [1], [0], [0]], {}),
        ("Slice", [[1, 2], [0], [1], [3]], {}),
        ("Div", [[1], [0]], {}),
        ("MatMul", [[[1, 2]], [[1, 2]]], {}),
        ("Trilu", [[[1, 2]], 2**40], {}),
        ("Cast", [[1]], {"to": 8}),
    ],
)
def test_what_makes_no_sense_or_is_too_large_is_refused(operator, inputs, values):
    arrays = [np.asarray(value, np.int64) for value in inputs]
    with pytest.raises((FormatError, UnsupportedError)):
        numeric.OPERATORS[operator](arrays, {"outputs": 1, **values})


# -- quantized weights against ONNX Runtime -----------------------------------------------------------


def run(node, inputs: dict[str, object], opset: int = 21) -> np.ndarray:
    """One node with constant inputs in ONNX Runtime."""
    stored = [v if isinstance(v, TensorProto) else onnx.numpy_helper.from_array(v) for v in inputs.values()]
    for tensor, name in zip(stored, inputs, strict=True):
        tensor.name = name
    out = onnx.helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "g", [], [out], stored)
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {})[0]
    return found


def weight(array: np.ndarray | TensorProto) -> Weight:
    tensor = array if isinstance(array, TensorProto) else onnx.numpy_helper.from_array(array, "w")
    return weights.weight_of(initializer(tensor, ExternalFiles(None)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("columns", "block"), [(64, 32), (48, 32), (80, 16), (576, 128), (40, 128), (33, 16)]
)
@pytest.mark.parametrize("zero", ["none", "packed"])
def test_matmul_n_bits_holds_the_weights_that_the_runtime_multiplies_by(bits, columns, block, zero):
    if bits == 4 and columns % 2:
        pytest.skip("a group of one code is no whole byte")
    random = np.random.default_rng(columns + bits)
    rows, groups = 24, -(-columns // block)
    inputs = {
        "a": np.eye(columns, dtype=np.float32),
        "b": random.integers(0, 256, (rows, groups, block * bits // 8)).astype(np.uint8),
        "s": random.standard_normal((rows, groups)).astype(np.float32),
    }
    points = None
    if zero == "packed":
        points = random.integers(0, 256, (rows, -(-groups * bits // 8))).astype(np.uint8)
        inputs["z"] = points
    node = onnx.helper.make_node(
        "MatMulNBits",
        list(inputs),
        ["out"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
    )
    expected = run(node, inputs).T
    stored = weights.matmul_nbits(
        weight(inputs["b"]), weight(inputs["s"]), None if points is None else weight(points),
        rows=rows, columns=columns, bits=bits, block=block,
    )  # fmt: skip
    tensor = weights.to_tensor("w", stored)
    assert tensor.shape == (rows, columns)
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-6, atol=1e-7)
    part = weights.to_tensor("w", stored.rows(5, 11))
    np.testing.assert_array_equal(part.dequantize(), tensor.dequantize()[5:11])
    joined = weights.to_tensor("w", weights.join_rows([stored.rows(0, 5), stored.rows(5, rows)]))
    np.testing.assert_array_equal(joined.data, tensor.data)


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8", "UINT8"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("zero", [False, True])
def test_blocked_dequantize_linear_is_exact(kind, axis, zero):
    random = np.random.default_rng(axis)
    shape, scale_shape = (64, 32), (4, 32) if axis == 0 else (64, 2)
    low, high = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-128, 128), "UINT8": (0, 256)}[kind]
    data_type = getattr(TensorProto, kind)

    def stored(name, dims):
        return onnx.helper.make_tensor(name, data_type, dims, random.integers(low, high, dims).reshape(-1))

    inputs = {"x": stored("x", shape), "s": random.standard_normal(scale_shape).astype(np.float32)}
    if zero:
        inputs["z"] = stored("z", scale_shape)
    node = onnx.helper.make_node("DequantizeLinear", list(inputs), ["out"], axis=axis, block_size=16)
    found = weights.dequantize_linear(
        weight(inputs["x"]), weight(inputs["s"]), weight(inputs["z"]) if zero else None, axis=axis, block=16
    )
    tensor = weights.to_tensor("w", found.transposed() if axis == 0 else found)
    expected = run(node, inputs)
    np.testing.assert_array_equal(tensor.dequantize(), expected.T if axis == 0 else expected)


@pytest.mark.parametrize("scales", ["one", "rows", "columns"])
def test_plain_dequantize_linear_is_exact(scales):
    random = np.random.default_rng(0)
    codes = random.integers(-128, 128, (32, 48)).astype(np.int8)
    scale = random.standard_normal({"one": (), "rows": (32,), "columns": (48,)}[scales]).astype(np.float32)
    axis = 0 if scales == "rows" else 1
    node = onnx.helper.make_node("DequantizeLinear", ["x", "s"], ["out"], axis=axis)
    expected = run(node, {"x": codes, "s": scale})
    found = weights.dequantize_linear(weight(codes), weight(scale), None, axis=axis, block=0)
    if found.axis == 0:  # a scale for each column: the usual form of a MatMul's weight
        np.testing.assert_array_equal(weights.to_tensor("w", found.transposed()).dequantize(), expected.T)
    else:
        np.testing.assert_array_equal(weights.to_tensor("w", found).dequantize(), expected)


@pytest.mark.parametrize("packing", ["u8", "INT4", "UINT4"])
def test_gather_block_quantized_holds_the_rows_that_the_runtime_gathers(packing):
    random = np.random.default_rng(1)
    rows, columns, block = 10, 64, 32
    scales = random.standard_normal((rows, 2)).astype(np.float32)
    data: object
    if packing == "u8":
        data = random.integers(0, 256, (rows, columns // 2)).astype(np.uint8)
        found = weights.matmul_nbits(
            weight(data), weight(scales), None, rows=rows, columns=columns, bits=4, block=block
        )
    else:
        low = -8 if packing == "INT4" else 0
        codes = random.integers(low, low + 16, rows * columns)
        data = onnx.helper.make_tensor("d", getattr(TensorProto, packing), (rows, columns), codes)
        found = weights.dequantize_linear(weight(data), weight(scales), None, axis=1, block=block)
    node = onnx.helper.make_node(
        "GatherBlockQuantized",
        ["d", "i", "s"],
        ["out"],
        domain="com.microsoft",
        block_size=block,
        quantize_axis=1,
    )
    expected = run(node, {"d": data, "i": np.arange(rows), "s": scales})
    np.testing.assert_allclose(weights.to_tensor("w", found).dequantize(), expected, rtol=1e-6)


def test_zero_points_that_are_floats():
    codes = np.arange(64, dtype=np.uint8).reshape(4, 1, 16)
    scales = np.ones((4, 1), np.float32)
    sizes = {"rows": 4, "columns": 32, "bits": 4, "block": 32}
    whole = weights.matmul_nbits(
        weight(codes), weight(scales), weight(np.full((4, 1), 7, np.float32)), **sizes
    )
    assert weights.to_tensor("w", whole).encoding.name == "int4_g32_f32_z"
    with pytest.raises(UnsupportedError, match="whole numbers"):
        weights.matmul_nbits(weight(codes), weight(scales), weight(np.full((4, 1), 7.5, np.float32)), **sizes)


@pytest.mark.parametrize("change", [{"rows": 5}, {"columns": 64}, {"bits": 8}, {"block": 16}, {"bits": 5}])
def test_quantized_sizes_that_do_not_fit_are_refused(change):
    codes, scales = np.zeros((4, 1, 16), np.uint8), np.ones((4, 1), np.float32)
    sizes = {"rows": 4, "columns": 32, "bits": 4, "block": 32, **change}
    with pytest.raises((FormatError, UnsupportedError)):
        weights.matmul_nbits(weight(codes), weight(scales), None, **sizes)


# -- rotary tables -----------------------------------------------------------------------------------

LLAMA3 = {"kind": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("precision", [np.float32, np.float16])
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(10000.0, 64),
        RopeConfig(500000.0, 128),
        RopeConfig(1000000.0, 256),
        RopeConfig(12345.0, 32),
        RopeConfig(10000.0, 24),
        RopeConfig(10000.0, 64, kind="linear", factor=8.0),
        RopeConfig(1000000.0, 128, kind="linear", factor=4.0),
        RopeConfig(500000.0, 64, original_max_position_embeddings=8192, **LLAMA3),
        RopeConfig(10000.0, 64, attention_factor=1.19),
    ],
)
def test_tables_give_their_config_back(rope, precision):
    cos, sin = tables(rope, 1, 4096, precision)
    found = recover(rows_of(cos, sin, 0, range(1, 2048)))
    ours = rotary_frequencies(found, 1)
    theirs = rotary_frequencies(rope, 1)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6 if precision == np.float32 else 2e-3)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6 if precision == np.float32 else 1e-3)
    if precision == np.float32:
        assert (found.theta, found.kind, found.factor) == (rope.theta, rope.kind, rope.factor)


def tables(rope: RopeConfig, length: int, rows: int, precision=np.float32):
    frequencies, factor = rotary_frequencies(rope, length)
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies
    return (np.cos(angles) * factor).astype(precision), (np.sin(angles) * factor).astype(precision)


@pytest.mark.parametrize("precision", [np.float32, np.float16])
def test_longrope_tables_give_both_factor_sets_back(precision):
    random = np.random.default_rng(0)
    short = tuple(np.round(1 + np.sort(random.random(48)), 2).tolist())
    long = tuple(np.round(1 + 60 * np.sort(random.random(48)), 2).tolist())
    rope = RopeConfig(
        10000.0, 96, kind="longrope", factor=32.0, original_max_position_embeddings=4096,
        short_factor=short, long_factor=long,
    )  # fmt: skip
    rows = [rows_of(*tables(rope, length, 8192, precision), 0, range(1, 4096)) for length in (1, 5000)]
    found = recover_longrope(*rows, 4096, 131072)
    assert found.attention_factor is None and found.factor == 32.0
    if precision == np.float32:
        assert (found.short_factor, found.long_factor) == (short, long)
    for length in (1, 5000):
        ours, theirs = rotary_frequencies(found, length), rotary_frequencies(rope, length)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6 if precision == np.float32 else 1e-2)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-6)


def test_a_hint_is_taken_only_where_it_fits():
    rope = RopeConfig(10000.0, 64, kind="yarn", factor=4.0, original_max_position_embeddings=4096)
    rows = rows_of(*tables(rope, 1, 4096), 0, range(1, 2048))
    assert recover(rows, [rope]) == rope
    other = recover(rows, [RopeConfig(20000.0, 64)])
    np.testing.assert_allclose(rotary_frequencies(other, 1)[0], rotary_frequencies(rope, 1)[0], rtol=1e-5)


@pytest.mark.parametrize("damage", ["angle", "size", "nan"])
def test_tables_that_are_no_rotation_are_refused(damage):
    cos, sin = tables(RopeConfig(10000.0, 64), 1, 256)
    if damage == "angle":
        cos[200:], sin[200:] = cos[:56].copy(), sin[:56].copy()
    elif damage == "size":
        cos[100:] *= 1.01
    else:
        sin[17] = np.nan
    with pytest.raises(UnsupportedError, match="rotary tables"):
        recover(rows_of(cos, sin, 0, range(1, 256)))


# -- chains of elementwise operators -------------------------------------------------------------------


def term(operator: str, *args: Term, **values: object) -> Term:
    return Term(operator, args, (1, 4, 8), "n", dict(values))


def test_activations_are_found_by_their_values():
    gate, up = term("linear"), term("linear")
    half = term("scale", gate, factor=0.5)
    cube = term("power", gate, factor=3.0)
    inner = term("scale", term("add", gate, term("scale", cube, factor=0.044715)), factor=(2 / np.pi) ** 0.5)
    tanh = term("mul", half, term("shift", term("Tanh", inner), factor=1.0))
    erf = term("mul", half, term("shift", term("Erf", term("scale", gate, factor=0.5**0.5)), factor=1.0))
    silu = term("div", gate, term("shift", term("Exp", term("scale", gate, factor=-1.0)), factor=1.0))
    for chain, name in ((tanh, "gelu_pytorch_tanh"), (erf, "gelu"), (silu, "silu")):
        found = gate_of(term("mul", up, chain))
        assert found is not None and found[0] == name and found[1] is gate and found[2] is up
    assert gate_of(term("mul", up, term("Tanh", gate))) is None
    assert gate_of(term("mul", up, gate)) is None
    assert gate_of(term("mul", gate, term("Sigmoid", gate))) is None


def test_soft_caps_are_found_by_their_values():
    x = term("linear")
    capped = term("scale", term("Tanh", term("scale", x, factor=1 / 30)), factor=30.0)
    assert cap_of(capped) == (x, 1.0, 30.0)
    assert cap_of(term("scale", x, factor=0.25)) == (x, 0.25, None)
    assert cap_of(x) == (x, 1.0, None)
    assert cap_of(term("shift", x, factor=1.0)) is None
    assert cap_of(term("Sigmoid", x)) is None
