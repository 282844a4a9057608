"""Runs in an interpreter that has llama_cpp: what llama.cpp's own linears read, as llama-imatrix sees it.

Usage: python llama_cpp_imatrix.py MODEL WINDOWS OUT. WINDOWS is a .npy of token ids (windows, tokens); OUT
becomes an .npz with the sum of squares by GGUF name of the weight.

llama-imatrix itself is not in the package; as it does, this asks for every matrix product through the
callback of the scheduler and sums the squares of its second operand.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp
import numpy as np

MUL_MAT = None


class Tensor(ctypes.Structure):
    """ggml_tensor, as ggml.h has it."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def main() -> None:
    path, windows, out = sys.argv[1], np.load(sys.argv[2]), sys.argv[3]
    sums: dict[str, np.ndarray] = {}

    def wanted(tensor: Tensor) -> str | None:
        if not tensor.src[0] or not tensor.src[1]:
            return None
        name = tensor.src[0].contents.name.decode()
        known = name.startswith("blk.") or name in ("output.weight", "token_embd.weight")
        is_matrix = tensor.src[1].contents.type == 0 and tensor.src[1].contents.ne[1] >= 16
        same = tensor.src[0].contents.ne[0] == tensor.src[1].contents.ne[0]
        return name if known and is_matrix and same and name.endswith(".weight") else None

    @llama_cpp.ggml_backend_sched_eval_callback
    def look(pointer: int, ask: bool, _: int) -> bool:
        tensor = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
        name = wanted(tensor)
        if ask or name is None:
            return name is not None if ask else True
        x = tensor.src[1].contents
        count = x.ne[0] * x.ne[1]
        values = np.ctypeslib.as_array(ctypes.cast(x.data, ctypes.POINTER(ctypes.c_float)), (count,))
        rows = values.reshape(x.ne[1], x.ne[0]).astype(np.float64)
        sums[name] = sums.get(name, 0) + (rows**2).sum(0)
        return True

    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = windows.shape[1]
    params.n_threads = params.n_threads_batch = 2
    params.cb_eval = look
    context = llama_cpp.llama_init_from_model(model, params)
    for window in windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_batch_free(batch)
    np.savez(out, **sums)


main()
