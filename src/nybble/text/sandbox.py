"""The Jinja2 environment in which chat templates run: no way out, and no way to run for ever.

Jinja2's immutable sandbox keeps templates away from Python's internals. On top of it, the syntax
tree of a template is rewritten before compilation so that every loop pass, macro call, literal,
slice and concatenation is charged to a ``Budget``; calls, operators and filters are charged where
the sandbox hands them to us. Filters and methods are the ones listed here and no others.
"""

from __future__ import annotations

import json
import re
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from nybble.errors import TemplateError
from nybble.text.budget import Budget, binary_size, method_size

_FILTERS = (  # noqa: SIM905 - a list of words
    "abs batch capitalize center count d default dictsort e escape filesizeformat first float forceescape"
    " format groupby indent int items join last length list lower map max min reject rejectattr replace"
    " reverse round safe select selectattr slice sort string striptags sum title trim truncate unique upper"
    " wordcount wordwrap"
).split()
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        [
            "capitalize",
            "casefold",
            "center",
            "count",
            "endswith",
            "expandtabs",
            "find",
            "format",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "isidentifier",
            "islower",
            "isnumeric",
            "isprintable",
            "isspace",
            "istitle",
            "isupper",
            "join",
            "ljust",
            "lower",
            "lstrip",
            "partition",
            "removeprefix",
            "removesuffix",
            "replace",
            "rfind",
            "rindex",
            "rjust",
            "rpartition",
            "rsplit",
            "rstrip",
            "split",
            "splitlines",
            "startswith",
            "strip",
            "swapcase",
            "title",
            "upper",
            "zfill",
        ]
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(("bit_length", "is_integer")),
    float: frozenset(("is_integer",)),
}
# Names with a space: no template can spell them.
_STEP, _MADE, _TEXT = "nybble step", "nybble made", "nybble text"
_MAX_DIGITS = 4300


class _Instrument(NodeTransformer):
    """Rewrites a syntax tree so that it pays for what it does."""

    def __init__(self, environment: TemplateEnvironment) -> None:
        self._environment = environment

    def _filter(self, node: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)

    def _step(self, node: nodes.Node) -> nodes.Filter:
        size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        line = node.lineno
        return self._filter(nodes.Const(True, lineno=line), _STEP, nodes.Const(size, lineno=line))

    def _repeated(self, node: Any) -> nodes.Node:
        step = self._step(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _repeated

    def visit_For(self, node: nodes.For) -> nodes.Node:
        step = self._step(node)
        self._repeated(node)
        if node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._filter(part, _TEXT) for part in node.nodes]
        return self._filter(node, _MADE)

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(node, _MADE)

    visit_List = visit_Dict = _made

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._made(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        kind = type(node).__name__.lower()
        raise TemplateError(
            f"chat template, line {node.lineno}: {kind} is not allowed, there is nothing to load"
        )

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


class GenerationExtension(Extension):
    """``{% generation %}``: marks the assistant's words for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja2's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment. ``use`` sets the budget of the current thread."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would compute before there is a budget
            extensions=[LoopControlExtension, GenerationExtension],
            finalize=pass_context(lambda _, value: self.budget.to_text(value)),
        )
        self._local = threading.local()
        self.filters = {name: self._charged(name, FILTERS[name]) for name in _FILTERS}
        self.filters["tojson"] = self._charged("tojson", self._to_json)
        self.filters[_STEP] = pass_context(lambda _, value, chars: self._take_step(value, chars))
        self.filters[_MADE] = pass_context(lambda _, value: self.budget.made(value))
        self.filters[_TEXT] = pass_context(lambda _, value: self.budget.to_text(value))
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    @property
    def budget(self) -> Budget:
        """The budget of the rendering in this thread."""
        return self._local.budget  # type: ignore[no-any-return]

    def use(self, budget: Budget) -> None:
        """Charges what this thread renders from now on to ``budget``."""
        self._local.budget = budget

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _Instrument(self).visit(template)
        template.set_environment(self)
        return template

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.spend(binary_size(operator, left, right))
        return self.budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.spend()
        method = getattr(__obj, "__wrapped__", __obj) if isinstance(__obj, types.FunctionType) else __obj
        owner = getattr(method, "__self__", None)
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        if kind is not None:
            name = method.__name__
            if name not in _METHODS[kind]:
                raise SecurityError(f"{kind.__name__}.{name}() is not allowed")
            if isinstance(owner, str):
                if name == "join" and args and isinstance(args[0], Iterator):
                    args = (list(args[0]), *args[1:])
                budget.spend(method_size(owner, name, [*args, *kwargs.values()]))
        elif not __self._is_ours(__obj):
            raise SecurityError(f"calling a {type(__obj).__name__} is not allowed")
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def _is_ours(self, callee: Any) -> bool:
        """Globals, macros, and objects of Jinja2's runtime (loops, cyclers, block references)."""
        if isinstance(callee, Undefined) or any(callee is known for known in self.globals.values()):
            return True
        owner = getattr(callee, "__self__", callee)
        return type(owner).__module__ in ("jinja2.runtime", "jinja2.utils")

    def _take_step(self, value: object, chars: int) -> object:
        self.budget.spend(chars)
        return value

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that weighs its arguments first and its result after."""
        kind = getattr(function, "jinja_pass_arg", None)

        @pass_context
        def charged(context: Context, *args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            given = tuple(
                list(budget.count_items(item)) if isinstance(item, Iterator) else item for item in args
            )
            chars = budget.weigh([*given, *kwargs.values()])
            budget.spend(chars + _filter_size(name, given, kwargs))
            first: tuple[Any, ...] = ()
            if kind is not None:
                first = ({"context": context, "eval_context": context.eval_ctx}.get(kind.name, self),)
            result = function(*first, *given, **kwargs)
            if isinstance(result, Iterator):
                return budget.count_items(result)
            return budget.made(result)

        return charged

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        pieces = []
        for piece in encoder.iterencode(value):
            self.budget.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)


def _filter_size(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Characters that a filter may make beyond what its arguments hold; refuses huge numbers."""
    value = args[0] if args else ""
    rest = [*args[1:], *kwargs.values()]
    numbers = [item for item in rest if isinstance(item, int)]
    if name in ("batch", "slice", "round", "tojson", "truncate", "wordwrap", "center", "indent") and any(
        abs(number) > 100_000 for number in numbers
    ):
        raise TemplateError(f"the chat template calls the filter {name} with a number that is too large")
    text = value if isinstance(value, str) else ""
    if name == "indent":
        width = max([*numbers, *(len(item) for item in rest if isinstance(item, str)), 4])
        return (text.count("\n") + 1) * width
    if name == "replace":
        return method_size(text, "replace", rest) if text else 0
    if name == "join":
        glue = max((len(item) for item in rest if isinstance(item, str)), default=0)
        return glue * (len(value) if hasattr(value, "__len__") else 0)
    if name == "wordwrap":
        return len(text) * (1 + max((len(item) for item in rest if isinstance(item, str)), default=1))
    if name == "format":
        return binary_size("%", text, kwargs or tuple(args[1:]))
    if name == "tojson":
        if any(isinstance(item, str) and len(item) > 100 for item in rest) or any(n > 100 for n in numbers):
            raise TemplateError("the chat template calls tojson with an indent that is too large")
        return 0
    if name == "int" and len(text) > _MAX_DIGITS:
        raise TemplateError("the chat template reads a number that is too long")
    if name == "sum" and any(not isinstance(item, (int, float, str)) for item in rest):
        raise TemplateError("the chat template sums something that is not numbers")
    return max(numbers, default=0) if name in ("batch", "slice", "center") else 0


def _raise_exception(message: object = "") -> None:
    raise TemplateError(f"the chat template refuses these messages: {message}")


def _strftime_now(pattern: object) -> str:
    if not isinstance(pattern, str) or len(pattern) > 200 or re.search(r"\d{3,}", pattern):
        raise TemplateError(f"the chat template asks for the time in a strange format: {pattern!r:.100}")
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=1)
def environment() -> TemplateEnvironment:
    """The environment that all templates share; compiled templates hold on to it."""
    return TemplateEnvironment()


def plain_data(value: object, where: str, depth: int = 0) -> Any:
    """A copy made of plain dicts, lists, strings and numbers: nothing else enters a template."""
    if depth > 100:
        raise TemplateError(f"{where} is nested more than 100 levels deep")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain_data(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return [plain_data(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise TemplateError(
        f"{where} is a {type(value).__name__}; templates take strings, numbers, lists and dicts"
    )
