"""The layers of a decoder, read off the terms that its logits are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from nybble.errors import UnsupportedError
from nybble.formats.onnx.recognise import elementwise
from nybble.formats.onnx.recognise.probe import RUN_INSTEAD
from nybble.formats.onnx.recognise.values import Stored, Term, Weight

MAX_LAYERS = 4096


@dataclass(frozen=True)
class Projection:
    """Rows ``begin .. end`` of a linear's weight and bias."""

    linear: Term
    begin: int
    end: int

    @property
    def weight(self) -> Stored:
        """(out_features, in_features)."""
        stored: Stored = self.linear.values["weight"]
        return stored.rows(self.begin, self.end)

    @property
    def bias(self) -> Weight | None:
        """(out_features,)."""
        stored: Weight | None = self.linear.values["bias"]
        return None if stored is None else stored.rows(self.begin, self.end)

    @property
    def input(self) -> Term:
        """What it is applied to."""
        return self.linear.args[0]


@dataclass(frozen=True)
class Norm:
    """RMS norm's weight and eps."""

    weight: Weight
    eps: float


@dataclass
class Block:
    """One layer."""

    attention: Term
    q: Projection
    k: Projection
    v: Projection
    rotary: tuple[Term | None, Term | None]
    """The terms that rotate q and k, where there are such."""
    q_norm: Norm | None
    k_norm: Norm | None
    output: Projection
    gate: Projection
    up: Projection
    down: Projection
    activation: str
    input_norm: Norm
    mlp_norm: Norm
    after_attention: Norm | None
    after_mlp: Norm | None
    scales: tuple[float, float]
    """What multiplies each half before it is added."""


@dataclass
class Decoder:
    """A whole model."""

    embedding: Stored
    embedding_scale: float
    blocks: list[Block]
    final_norm: Norm
    head: Projection
    logit_scale: float
    logit_softcap: float | None
    linears: list[Term] = field(default_factory=list)


def strange(term: Term, wanted: str) -> UnsupportedError:
    """The error for a term that is not where models have it."""
    return UnsupportedError(
        f"node {term.node}: found {term.operator} where {wanted} is expected; {RUN_INSTEAD}"
    )


def read_decoder(logits: Term) -> Decoder:
    """The model whose logits these are.

    Raises:
        UnsupportedError: some part of it is no decoder that nybble knows; the message names the node.
    """
    found = elementwise.cap_of(logits)
    if found is None:
        raise strange(logits, "logits of a linear layer")
    head_term, logit_scale, softcap = found
    head = _projection(_rows(head_term), "the output projection")
    norm_term = _rows(head.input)
    final = _norm(norm_term, "the final norm")
    x = _rows(norm_term.args[0])
    blocks: list[Block] = []
    while True:
        base, scale = _unscaled(x)
        if base.operator == "embedding" or (
            base.operator == "slice" and base.args[0].operator == "embedding"
        ):
            break
        if len(blocks) >= MAX_LAYERS:
            raise UnsupportedError(f"more than {MAX_LAYERS} layers")
        block, x = _block(x)
        blocks.append(block)
    stored: Stored
    if base.operator == "slice":
        stored = base.args[0].values["weight"].columns(base.values["begin"], base.values["end"])
    else:
        stored = base.values["weight"]
    blocks.reverse()
    if not blocks:
        raise strange(x, "a layer")
    linears = [head.linear]
    for block in blocks:
        linears += [part.linear for part in (block.q, block.k, block.v, block.output)]
        linears += [part.linear for part in (block.gate, block.up, block.down)]
    return Decoder(stored, scale, blocks, final, head, logit_scale, softcap, linears)


def _rows(term: Term) -> Term:
    """Without the choice of rows (only the last token's logits)."""
    return term.args[0] if term.operator == "select_rows" else term


def _unscaled(term: Term) -> tuple[Term, float]:
    if term.operator == "scale":
        return term.args[0], float(term.values["factor"])
    return term, 1.0


def _norm(term: Term, what: str) -> Norm:
    if term.operator != "rms_norm" or term.values["group"] != term.width:
        raise strange(term, what)
    return Norm(term.values["weight"], term.values["eps"])


def _projection(term: Term, what: str) -> Projection:
    if term.operator == "linear":
        return Projection(term, 0, term.width)
    if term.operator == "slice" and term.args[0].operator == "linear":
        return Projection(term.args[0], term.values["begin"], term.values["end"])
    raise strange(term, what)


def _half(x: Term) -> tuple[Term, Term, Term]:
    """Residual, branch, and the branch's linear layer, of a sum."""
    if x.operator != "add":
        raise strange(x, "the sum of a residual and a layer's half")
    problem: UnsupportedError | None = None
    for residual, branch in (x.args[::-1], x.args):
        try:
            linear = _after(branch)[2]
            start = _start(linear)
        except UnsupportedError as error:
            problem = problem or error
            continue
        if start is residual:
            return residual, branch, linear
    raise problem or strange(x, "a residual that the layer's half starts from")


def _after(branch: Term) -> tuple[float, Norm | None, Term]:
    """Scale, norm and linear layer at the end of a branch."""
    term, scale = _unscaled(branch)
    norm = None
    if term.operator == "rms_norm":
        norm = _norm(term, "a norm")
        term = term.args[0]
    if term.operator != "linear":
        raise strange(term, "a linear layer at the end of a layer's half")
    return scale, norm, term


def _start(linear: Term) -> Term:
    """What the first norm of a branch is applied to."""
    source = linear.args[0]
    if source.operator == "attention":
        first = _heads_source(source.args[0])[0]
    else:
        gate = elementwise.gate_of(source)
        if gate is None:
            raise strange(source, "attention or a gated activation")
        first = _projection(gate[1], "the gate projection")
    _norm(first.input, "a norm at the start of a layer's half")
    return first.input.args[0]


def _heads_source(term: Term) -> tuple[Projection, Norm | None, Term | None]:
    """Projection, norm over heads and rotation that make q or k."""
    rotary, norm = None, None
    if term.operator == "rotary":
        rotary, term = term, term.args[0]
    if term.operator == "rms_norm":
        norm, term = Norm(term.values["weight"], term.values["eps"]), term.args[0]
    return _projection(term, "a projection of q, k or v"), norm, rotary


def _block(x: Term) -> tuple[Block, Term]:
    """The layer that ends in x, and what it starts from."""
    middle, branch, down = _half(x)
    mlp_scale, after_mlp, _ = _after(branch)
    gate = elementwise.gate_of(down.args[0])
    if gate is None:
        raise strange(down.args[0], "a gated activation")
    activation, gate_term, up_term = gate
    gate_part, up_part = (
        _projection(gate_term, "the gate projection"),
        _projection(up_term, "the up projection"),
    )
    if up_part.input is not gate_part.input:
        raise strange(up_part.linear, "gate and up of the same input")
    start, branch, output = _half(middle)
    attention = output.args[0]
    if attention.operator != "attention":
        raise strange(attention, "attention")
    scale, after_attention, _ = _after(branch)
    q, q_norm, q_rotary = _heads_source(attention.args[0])
    k, k_norm, k_rotary = _heads_source(attention.args[1])
    v, v_norm, v_rotary = _heads_source(attention.args[2])
    if v_norm is not None or v_rotary is not None or not (q.input is k.input is v.input):
        raise strange(v.linear, "values that are a projection of what q and k are made of")
    if (q_norm is None) != (k_norm is None):
        raise strange(attention, "norms on both q and k or on neither")
    for norm in (attention.args[0], attention.args[1]):
        inner = norm.args[0] if norm.operator == "rotary" else norm
        if inner.operator == "rms_norm" and inner.values["group"] != attention.values["head_dim"]:
            raise strange(inner, "a norm over each head")
    block = Block(
        attention=attention, q=q, k=k, v=v, rotary=(q_rotary, k_rotary), q_norm=q_norm, k_norm=k_norm,
        output=_projection(output, "the output projection"), gate=gate_part, up=up_part,
        down=_projection(down, "the down projection"), activation=activation,
        input_norm=_norm(q.input, "a norm"), mlp_norm=_norm(gate_part.input, "a norm"),
        after_attention=after_attention, after_mlp=after_mlp, scales=(scale, mlp_scale),
    )  # fmt: skip
    return block, start
