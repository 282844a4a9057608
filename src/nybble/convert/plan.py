"""What becomes of each tensor, decided before anything is written.

A tensor keeps its encoding where the target can hold it. Otherwise it gets one that holds the same
values, if there is one. Otherwise nothing is done, and the error says which tensors those are and
what the choices are: to allow the loss, or to name an encoding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import Encoding, encoding
from nybble.checkpoint.forms import Change
from nybble.checkpoint.tensor import Tensor
from nybble.convert.choice import Choice
from nybble.convert.onnx_rules import OnnxRules
from nybble.convert.relation import INTEGERS, Relation, relation, relation_of
from nybble.convert.rules import Rules, bits_of, is_block, is_matrix, known_encodings
from nybble.errors import ConversionError, NybbleError

_SHOWN = 3  # names of tensors in a message


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: what it is and what it becomes."""

    tensor: Tensor
    """In the target's form, in its old encoding."""
    target: Encoding
    relation: Relation
    asked: bool = False
    """An explicit encoding names it: any loss is agreed to."""
    change: Change | None = None
    """What the target's form did to it."""

    @property
    def nbytes(self) -> int:
        """Encoded size in the target's file."""
        return self.target.stored_bytes(math.prod(self.tensor.shape))

    @property
    def lossy(self) -> bool:
        """Whether values may change."""
        return self.relation.kind == "lossy" or (self.change is not None and not self.change.exact)


def make_plan(
    checkpoint: Checkpoint,
    rules: Rules,
    choice: Choice,
    changes: Mapping[str, Change] | None = None,
    preferred: Mapping[str, str] | None = None,
    *,
    made: Collection[str] = (),
) -> list[TensorPlan]:
    """The plan for every tensor of a checkpoint that is in the target's form.

    ``changes`` are what the form did to tensors, ``preferred`` encodings that they had before an earlier
    conversion: taken wherever that is exact and the caller names no other. ``made`` are names of tensors
    with values that a quantizer has just rounded: that the form rounds them once more, in float32, needs
    nobody's leave.

    Data is read only where it decides: whether scales fit, whether values survive. No tensor is
    planned to be lossy unless ``choice`` names its encoding or allows loss.

    Raises:
        ConversionError: tensors without an exact place, or an encoding that the target cannot hold.
        UnsupportedError: an encoding that does not exist.
    """
    _check_patterns(checkpoint.tensors, choice)
    if isinstance(rules, OnnxRules):
        rules = replace(rules, tied=checkpoint.config.tie_word_embeddings)
    same = _same_for_all(checkpoint.tensors.values(), rules, choice)
    plans, problems = [], []
    for tensor in checkpoint.tensors.values():
        change = (changes or {}).get(tensor.name)
        planned = _preferred(tensor, rules, choice, preferred or {}) or _plan_one(tensor, rules, choice, same)
        plan = TensorPlan(tensor, planned[0], planned[1], planned[2], change)
        lossy = plan.relation.kind == "lossy" if tensor.name in made else plan.lossy
        if plan.relation.kind == "refused" or (lossy and not (plan.asked or choice.allow_lossy)):
            problems.append(plan)
        plans.append(plan)
    if problems:
        raise ConversionError(_explain(problems, plans, rules))
    return plans


def _plan_one(
    tensor: Tensor, rules: Rules, choice: Choice, same: str | None
) -> tuple[Encoding, Relation, bool]:
    """Target encoding, relation, and whether the caller asked for it."""
    named = choice.named(tensor.name)
    required = rules.required(tensor)
    if tensor.encoding.name in INTEGERS:
        return tensor.encoding, _held(tensor, rules), False
    if named is not None:
        return _explicit(tensor, rules, named)
    if required is not None:
        target = encoding(required)
        return target, _general(tensor, target), rules.prescribes
    if choice.encoding is not None and is_matrix(tensor):
        return _explicit(tensor, rules, choice.encoding)
    if rules.holds(tensor, tensor.encoding):
        return tensor.encoding, Relation("exact", "kept"), False
    if same is not None and _must_become_plain(tensor, rules, choice):
        return encoding(same), Relation("exact", _how_plain(tensor, same)), False
    for name in rules.exact(tensor):
        target = encoding(name)
        if tensor.shape[-1] % target.block_size or not rules.holds(tensor, target):
            continue
        found = relation_of(tensor, target)
        if found.kind == "exact":
            return target, found, False
    target = encoding(rules.nearest(tensor))
    found = relation(tensor.encoding, target, tensor.shape[-1])
    if found.how == "transcoded":
        found = relation_of(tensor, target)
    return target, found, rules.prescribes


def _preferred(
    tensor: Tensor, rules: Rules, choice: Choice, preferred: Mapping[str, str]
) -> tuple[Encoding, Relation, bool] | None:
    """Back to an earlier encoding, if that is exact."""
    name = preferred.get(tensor.name)
    if name is None or choice.encoding is not None or choice.named(tensor.name) is not None:
        return None
    target = encoding(name)
    if not rules.holds(tensor, target) or tensor.shape[-1] % target.block_size:
        return None
    found = relation_of(tensor, target)
    return (target, found, False) if found.kind == "exact" else None


def _explicit(tensor: Tensor, rules: Rules, name: str) -> tuple[Encoding, Relation, bool]:
    """The encoding that the caller named."""
    target = encoding(name)
    if not rules.holds(tensor, target):
        reason = f"{rules.name} cannot hold {'it' if is_matrix(tensor) else 'a vector'} as {name}"
        return target, Relation("refused", "", reason=reason), True
    return target, _general(tensor, target), True


def _general(tensor: Tensor, target: Encoding) -> Relation:
    """The relation, without reading weights unless codes and scales could be moved."""
    found = relation(tensor.encoding, target, tensor.shape[-1] if tensor.shape else None)
    if found.how == "transcoded" or (found.by_data and not is_matrix(tensor)):
        return relation_of(tensor, target)
    return found


def _held(tensor: Tensor, rules: Rules) -> Relation:
    """Integers stay, or there is no place for them."""
    if rules.form == "gguf":
        return Relation("refused", "", reason="GGUF has no place for a permutation of a linear's inputs")
    return Relation("exact", "kept")


def _check_patterns(names: Iterable[str], choice: Choice) -> None:
    known = list(names)
    for pattern in choice.encodings:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ConversionError(f"no tensor's name matches {pattern!r}; names are like {known[-1]}")


def _must_become_plain(tensor: Tensor, rules: Rules, choice: Choice) -> bool:
    return (
        is_matrix(tensor)
        and choice.named(tensor.name) is None
        and rules.required(tensor) is None
        and not rules.holds(tensor, tensor.encoding)
        and all(not is_block(encoding(name)) for name in rules.exact(tensor) or ("q8_0",))
    )


def _how_plain(tensor: Tensor, name: str) -> str:
    return relation(tensor.encoding, encoding(name)).how


def _same_for_all(tensors: Iterable[Tensor], rules: Rules, choice: Choice) -> str | None:
    """The smallest plain encoding that holds every matrix that must become plain, or None.

    One for all: a model of which some matrices are f16 and others f32 by accident helps nobody.
    """
    if choice.encoding is not None:
        return None
    waiting = [tensor for tensor in tensors if _must_become_plain(tensor, rules, choice)]
    if not waiting:
        return None
    for name in rules.exact(waiting[0]):
        target = encoding(name)
        if all(relation_of(tensor, target).kind == "exact" for tensor in waiting):
            return name
    return None


def planned_size(plans: Iterable[TensorPlan]) -> int:
    """Bytes of all tensors in the target."""
    return sum(plan.nbytes for plan in plans)


# -- the error -----------------------------------------------------------------------------------------


def _explain(problems: Sequence[TensorPlan], plans: Sequence[TensorPlan], rules: Rules) -> str:
    """Which tensors, grouped, and what can be done about them."""
    lines = [
        f"{len(problems)} of {len(plans)} tensors have no exact place in {rules.name}; nothing was written"
    ]
    groups: dict[tuple[str, str], list[TensorPlan]] = {}
    for plan in problems:
        groups.setdefault((plan.tensor.encoding.name, _why(plan)), []).append(plan)
    for (source, why), members in groups.items():
        names = ", ".join(plan.tensor.name for plan in members[:_SHOWN])
        more = ", ..." if len(members) > _SHOWN else ""
        lines.append(f"  {source:<12} {len(members):>4} tensors  {why}\n      {names}{more}")
    lines.append("choices:")
    lines += _choices(problems, plans, rules)
    return "\n".join(lines)


def _why(plan: TensorPlan) -> str:
    if plan.relation.kind == "refused":
        return plan.relation.reason
    if plan.change is not None and not plan.change.exact:
        return f"{plan.change.what} loses up to {plan.change.max_error:.2g} in float32"
    because = f": {plan.relation.reason}" if plan.relation.reason else ""
    return f"would be {plan.relation.how} as {plan.target.name}{because}"


def _choices(problems: Sequence[TensorPlan], plans: Sequence[TensorPlan], rules: Rules) -> list[str]:
    lines = []
    if all(plan.relation.kind != "refused" for plan in problems):
        targets = sorted({plan.target.name for plan in problems})
        lines.append(f"  --allow-lossy      they become {', '.join(targets)}; the report shows the errors")
    matrices = [plan.tensor for plan in problems if is_matrix(plan.tensor)]
    if matrices:
        names = [n for n in known_encodings(rules, matrices[0]) if _possible(matrices, n)]
        for name in names[:1] if "f32" in names else []:
            size = sum(
                encoding(name).stored_bytes(math.prod(p.tensor.shape)) if is_matrix(p.tensor) else p.nbytes
                for p in plans
            )
            lines.append(f"  --encoding {name:<8} exact: {size / 1e9:.2f} GB in all")
        rest = [name for name in names if name != "f32"]
        if rest:
            lines.append(f"  --encoding NAME    made anew from the values: {', '.join(rest)}")
    if any(bits_of(plan.tensor.encoding) < 16 for plan in problems):
        lines.append("  another target     see docs/conversion.md for what fits where")
    return lines


def _possible(tensors: Sequence[Tensor], name: str) -> bool:
    try:
        return all(relation(t.encoding, encoding(name), t.shape[-1]).kind != "refused" for t in tensors)
    except NybbleError:
        return False
