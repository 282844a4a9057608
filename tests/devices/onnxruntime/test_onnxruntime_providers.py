"""Which provider runs a model, and what is said where one is missing or leaves work to the CPU."""

from __future__ import annotations

import dataclasses
import types

import pytest

from devices.onnxruntime.conftest import DATA
from nybble import devices
from nybble.devices.onnxruntime import probe, providers, runtime
from nybble.devices.onnxruntime.placement import placement_of_profile, strays
from nybble.devices.onnxruntime.report import report
from nybble.errors import DeviceError, UnsupportedError
from nybble.formats.onnx.decoder_io import CachePort
from nybble.formats.onnx.folder import open_onnx_folder


def fake(*eps: str):
    return types.SimpleNamespace(__version__="1.99", get_available_providers=lambda: list(eps))


CPU, CUDA, DML = "CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider"


def test_a_missing_provider_names_its_package():
    with pytest.raises(DeviceError, match=r"no CUDAExecutionProvider .*pip install onnxruntime-gpu"):
        providers.require(fake(CPU), providers.PROVIDERS["cuda"])
    checkpoint = open_onnx_folder(DATA / "llama-int4-cpu")
    for name in ("cuda", "dml", "webgpu", "openvino", "qnn"):
        if name not in providers.available(providers.import_runtime()):
            with pytest.raises(DeviceError, match=f"pip install {providers.PROVIDERS[name].package}"):
                devices.compile(checkpoint, device=f"onnxruntime:{name}")


def test_a_missing_runtime(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r'pip install "nybble\[onnx\]"'):
        providers.import_runtime()
    assert report()[0] is False


def test_unknown_names():
    checkpoint = open_onnx_folder(DATA / "llama-int4-cpu")
    with pytest.raises(DeviceError, match="unknown device onnxruntime:gpu; there are onnxruntime:cpu,"):
        devices.compile(checkpoint, device="onnxruntime:gpu")
    with pytest.raises(DeviceError, match="reference has no providers"):
        devices.compile(checkpoint, device="reference:cpu")
    with pytest.raises(DeviceError, match="has no option 'precision'"):
        devices.compile(checkpoint, device="onnxruntime:cpu", precision="f32")


def test_auto_takes_what_the_folder_was_made_for():
    assert providers.choose(fake(CPU)).names == ("cpu",)
    assert "onnxruntime-gpu" in providers.choose(fake(CPU)).reason
    assert providers.choose(fake(DML, CUDA, CPU)).names == ("cuda", "dml", "cpu")
    assert providers.choose(fake(DML, CUDA, CPU), "dml").names == ("dml", "cuda", "cpu")
    assert providers.choose(fake(CPU), "dml").names == ("cpu",)


def test_auto_runs_and_says_why():
    session = devices.compile(open_onnx_folder(DATA / "llama-int4-cpu"), device="onnxruntime", threads=1)
    assert session.provider in providers.PROVIDERS and session.reason


def test_work_that_went_to_the_cpu_is_found():
    placement = {CUDA: {"MatMulNBits": 3}, CPU: {"Gather": 2, "Cast": 1, "GroupQueryAttention": 1}}
    assert strays(placement, CUDA) == {"GroupQueryAttention": 1}
    part = types.SimpleNamespace(ep_name=CPU, get_nodes=lambda: [types.SimpleNamespace(op_type="MatMul")])
    session = types.SimpleNamespace(get_provider_graph_assignment_info=lambda: [part])
    dml = providers.PROVIDERS["dml"]
    with pytest.raises(DeviceError, match=r"would run on the CPU: 1 MatMul; .* allow_cpu_fallback=True"):
        runtime.checked_placement(session, dml, allow_cpu_fallback=False, where="model.onnx")
    assert runtime.checked_placement(session, dml, allow_cpu_fallback=True, where="") == {CPU: {"MatMul": 1}}
    with pytest.raises(DeviceError, match="cannot tell which nodes run"):
        runtime.checked_placement(object(), dml, allow_cpu_fallback=False, where="")


def test_placement_from_a_profile():
    def node(name: str, provider: str) -> dict:
        return {"cat": "Node", "name": name, "args": {"provider": provider, "op_name": "MatMul"}}

    events = [
        node("a_kernel_time", DML),
        node("a_kernel_time", DML),
        node("b_kernel_time", CPU),
        {"cat": "Session"},
    ]
    assert placement_of_profile(events) == {DML: {"MatMul": 1}, CPU: {"MatMul": 1}}


def test_a_provider_that_does_not_start_is_an_error():
    made = types.SimpleNamespace(get_providers=lambda: [CPU])
    broken = types.SimpleNamespace(InferenceSession=lambda *a, **k: made)
    with pytest.raises(DeviceError, match="could not start CUDAExecutionProvider and fell back to CPU"):
        runtime.make_session(broken, DATA, providers.PROVIDERS["cuda"], None, {})


def test_options_of_the_folder_and_of_the_caller():
    section = {"provider_options": [{"cuda": {"enable_cuda_graph": "1", "arena": "x"}}, {"dml": {"a": 1}}]}
    assert runtime.wanted_provider(section) == "cuda"
    cuda = providers.PROVIDERS["cuda"]
    assert runtime.provider_options_of(section, cuda, {"arena": 2}, "f") == {"arena": "2"}
    assert runtime.provider_options_of(section, providers.PROVIDERS["dml"], {}, "f") == {
        "device_id": "0",
        "a": "1",
    }


def test_the_number_of_a_device():
    assert (runtime.device_id({}), runtime.device_id({"device_id": "2"})) == (0, 2)
    with pytest.raises(DeviceError, match="must be a whole number, not 'GPU'"):
        runtime.device_id({"device_id": "GPU"})


@pytest.mark.parametrize(
    "key", ["custom_ops_library", "session.model_external_initializers_file_folder_path", "enable_profiling"]
)
def test_a_folder_cannot_load_code_or_reach_other_files(folder, key):
    path = folder(
        "llama-int4-cpu", lambda c: c["model"]["decoder"]["session_options"].update({key: "/tmp/x.so"})
    )
    with pytest.raises(UnsupportedError, match=f"session option {key} could load code"):
        devices.compile(open_onnx_folder(path), device="onnxruntime:cpu")
    section = {"provider_options": [{"qnn": {"backend_path": "evil.dll"}}]}
    with pytest.raises(UnsupportedError, match="backend_path"):
        runtime.provider_options_of(section, providers.PROVIDERS["qnn"], {}, "f")
    given = {"backend_path": "QnnHtp.dll"}
    assert runtime.provider_options_of(section, providers.PROVIDERS["qnn"], given, "f") == given


def test_attention_is_tried_before_it_is_used(monkeypatch):
    checkpoint = open_onnx_folder(DATA / "llama-int4-cpu")
    here = providers.import_runtime()
    cache = CachePort("p", "q", "float32", heads=3, width=16)
    assert probe.attends_to_prompts(here, providers.PROVIDERS["cpu"], {}, cache)
    assert probe.attends_to_prompts(
        here, providers.PROVIDERS["cpu"], {}, dataclasses.replace(cache, dtype="float16")
    )
    right = probe._reference
    monkeypatch.setattr(probe, "_reference", lambda q, k, v, heads: right(q, k, 1.2 * v, heads))
    assert not probe.attends_to_prompts(here, providers.PROVIDERS["cpu"], {}, cache)
    probed = dataclasses.replace(providers.PROVIDERS["cpu"], probed=True)
    monkeypatch.setattr(providers, "PROVIDERS", {"cpu": probed})
    session = devices.compile(checkpoint, device="onnxruntime:cpu", threads=1)
    assert session.runs == "one" and "token by token" in session.reason


def test_the_report():
    available, _, facts = report()
    assert available and facts["providers"]["onnxruntime:cpu"] == ""
    assert (
        "onnxruntime-gpu" in facts["providers"]["onnxruntime:cuda"]
        or not facts["providers"]["onnxruntime:cuda"]
    )
