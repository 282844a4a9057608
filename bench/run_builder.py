"""onnxruntime-genai's model builder, with the one repair that it needs for Gemma 3 beside transformers 5.

    python bench/run_builder.py -i FOLDER -o OUTPUT -p int4 -e cpu -c CACHE

Transformers 5 gives the rotary parameters of Gemma 3 by kind of layer; the builder (0.18) looks for them
in one place and stops with ``KeyError: 'rope_type'``. Here it finds those of the global layers where it
looks, and the frequency of the local ones under the name of older configs. Nothing else is changed.
"""

from __future__ import annotations

import runpy
from typing import Any

import onnxruntime_genai.models  # noqa: F401  (puts the builder's own modules on the path)
from builders import base

original = base.Model.make_rope_init


def make_rope_init(self: Any, config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict) and "full_attention" in parameters:
        config.rope_local_base_freq = parameters["sliding_attention"]["rope_theta"]
        self.rope_attrs["theta"] = parameters["full_attention"]["rope_theta"]
        config.rope_parameters = dict(parameters["full_attention"])
    original(self, config)


if __name__ == "__main__":
    base.Model.make_rope_init = make_rope_init
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
