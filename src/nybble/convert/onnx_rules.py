"""What an ONNX target holds: floats of its element type, and integers in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.checkpoint.encodings import Encoding, encoding
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.forms import FormName
from nybble.checkpoint.tensor import Tensor
from nybble.convert.relation import INTEGERS
from nybble.convert.rules import EMBEDDING, OUTPUT, affine_candidates, affine_nearest, is_block, is_matrix
from nybble.errors import ConversionError
from nybble.graph.onnx.target import Method, Target
from nybble.graph.onnx.weights import block_size, written_encoding


@dataclass(frozen=True)
class OnnxRules:
    """An ONNX target.

    ``prescribes``: the target was asked for by its name, and so was what its encodings lose. Integers
    stay integers of as many bits wherever that is exact, whatever the target makes of floats.
    """

    target: Target
    method: str | None = None
    prescribes: bool = True
    form: FormName = "onnx"
    tied: bool = False
    """Whether the embedding is the output matrix too, and becomes what that becomes."""

    @property
    def name(self) -> str:
        """As in the table of targets; ``onnx`` where nothing is prescribed."""
        return self.target.name if self.prescribes else "onnx"

    def required(self, tensor: Tensor) -> str | None:
        if tensor.encoding.name in INTEGERS:
            return None
        if is_block(tensor.encoding) and affine_format(tensor.encoding.name) is None:
            return None
        gathered = tensor.name == EMBEDDING and not self.tied
        if gathered and self.target.provider == "cpu" and tensor.encoding.name in ("f16", "bf16"):
            return tensor.encoding.name  # half the bytes of what activations are
        if not is_matrix(tensor) or gathered:
            return self.target.element_type if not is_block(tensor.encoding) else None
        method: Method | None = "rtn" if self.method else None
        outer = tensor.name in (EMBEDDING, OUTPUT)
        try:
            return written_encoding(tensor, self.target, method, output=outer).name
        except ValueError as error:
            raise ConversionError(f"{error}; nothing was written") from error

    def holds(self, tensor: Tensor, row: Encoding) -> bool:
        form = affine_format(row.name)
        if form is None:
            return row.name == self.target.element_type or row.name in INTEGERS
        if not is_matrix(tensor) or form.bits == 3 or form.scale != self.target.element_type:
            return False
        return block_size(form) == form.group_size

    def exact(self, tensor: Tensor) -> Sequence[str]:
        candidates = affine_candidates(tensor, (self.target.element_type,)) if is_matrix(tensor) else ()
        # Blocks do not become floats of eight times the size unless somebody asks for it.
        floats = () if candidates and self.target.weights == "float" and not self.prescribes else ("f32",)
        return (*candidates, *(name for name in floats if not candidates))

    def nearest(self, tensor: Tensor) -> str:
        if not is_matrix(tensor) or (self.target.weights == "float" and self.prescribes):
            return self.target.element_type
        if self.target.weights == "int4" and not (self.method or self.target.method):
            raise ConversionError(
                f"{tensor.name} is {tensor.encoding.name}, but {self.target.name} wants weights that are int4"
                " already (an AWQ checkpoint, for example); nothing was written\nchoices:\n"
                "  --method rtn       round to nearest, which loses more\n"
                f"  another command    nybble quantize MODEL OUTPUT --recipe {self.target.name}: by AWQ"
            )
        for name in affine_nearest(tensor, self.target.element_type):
            if tensor.shape[-1] % encoding(name).block_size == 0:
                return name
        return self.target.element_type
