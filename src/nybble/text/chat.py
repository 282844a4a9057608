"""Chat templates: a conversation to the text that the model was trained on.

Templates are Jinja2 as transformers defines them
(https://huggingface.co/docs/transformers/chat_templating), run in a sandbox with limits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nybble.errors import NotFoundError, TemplateError
from nybble.text.budget import Budget, Limits

if TYPE_CHECKING:
    from jinja2 import Template

_PROBE = "nybble-probe-text"


class ChatTemplate:
    """A chat template.

    ``source`` is Jinja2. ``bos_token`` and ``eos_token`` are the texts of those tokens; a template
    that wants them writes them itself, so encode its output with ``add_special=False``.
    ``variables`` are further constants of the model that the template may use.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        limits: Limits | None = None,
        **variables: object,
    ) -> None:
        self.source = source
        self.limits = limits or Limits()
        self._constants = {"bos_token": bos_token, "eos_token": eos_token, **variables}

    @classmethod
    def named(cls, name: str, *, bos_token: str = "", eos_token: str = "") -> ChatTemplate:
        """One of nybble's own templates, for models whose file has none. NotFoundError lists them."""
        from nybble.text.named_templates import TEMPLATES

        source = TEMPLATES.get(name)
        if source is None:
            known = ", ".join(sorted(TEMPLATES))
            raise NotFoundError(f"there is no chat template named {name!r}; known: {known}")
        return cls(source, bos_token=bos_token, eos_token=eos_token)

    @staticmethod
    def missing(model: str = "this model") -> TemplateError:
        """The error to raise for a chat with a model that has no template."""
        from nybble.text.named_templates import TEMPLATES

        known = ", ".join(sorted(TEMPLATES))
        return TemplateError(
            f"{model} has no chat template, so it was probably not trained to chat. Give it a raw prompt "
            f"(generate, or `nybble run --raw`), or choose a template by name: {known}"
        )

    def render(
        self,
        messages: Iterable[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        documents: Sequence[Mapping[str, object]] | None = None,
        **variables: object,
    ) -> str:
        """The conversation as text.

        A message is a dict with ``role`` and ``content`` (a string, or a list of parts such as
        ``{"type": "text", "text": "Hi"}``) and what the template knows besides (``tool_calls``,
        ``name``, ...). Arguments of tool calls may be an object or its JSON. ``tools`` are JSON
        schemas of functions. ``add_generation_prompt`` ends the text where the assistant speaks.

        TemplateError: the template is invalid, refuses the messages, is not safe to run, or takes
        too long or makes too much text.
        """
        from nybble.text.sandbox import plain_data

        given = plain_data(messages, "messages")
        for i, message in enumerate(given):
            if not isinstance(message, dict) or "role" not in message:
                raise TemplateError(
                    f"messages[{i}] must be a dict with role and content, not {message!r:.80}"
                )
        rest = {
            "tools": plain_data(tools, "tools"),
            "documents": plain_data(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
            **{name: plain_data(value, name) for name, value in variables.items()},
        }
        given = [self._with_content(message, i) for i, message in enumerate(given)]
        if not any(message.get("tool_calls") for message in given):
            return self._run(given, rest)
        # Templates disagree about arguments: most want the object, older ones its JSON text.
        try:
            return self._run([_with_arguments(message, as_text=False) for message in given], rest)
        except TemplateError as first:
            try:
                return self._run([_with_arguments(message, as_text=True) for message in given], rest)
            except TemplateError:
                raise first from None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template itself understands content that is a list of parts."""
        parts = [{"type": "text", "text": _PROBE}]
        text = self._try_run([{"role": "user", "content": parts}])
        return text is not None and _PROBE in text and "'type'" not in text and '"type"' not in text

    @cached_property
    def takes_strings(self) -> bool:
        """Whether the template understands content that is a string; nearly all do."""
        text = self._try_run([{"role": "user", "content": _PROBE}])
        return text is None or _PROBE in text or not self.takes_parts

    def _with_content(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        """The message with its content in the form that the template takes."""
        content = message.get("content")
        if isinstance(content, list) and not self.takes_parts:
            texts = []
            for part in content:
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    texts.append(part["text"])
                elif isinstance(part, str):
                    texts.append(part)
                else:
                    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                    raise TemplateError(
                        f"messages[{index}] has a part of type {kind!r}; this model takes text"
                    )
            return {**message, "content": "".join(texts)}
        if isinstance(content, str) and "type" in self.source and not self.takes_strings:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _try_run(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._run(messages, {"tools": None, "documents": None, "add_generation_prompt": True})
        except TemplateError:
            return None

    @cached_property
    def _template(self) -> Template:
        import jinja2

        from nybble.text.sandbox import environment

        if len(self.source) > self.limits.source_chars:
            raise TemplateError(
                f"the chat template has {len(self.source)} characters; "
                f"the limit is {self.limits.source_chars}"
            )
        try:
            return environment().from_string(self.source)
        except TemplateError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is invalid, line {error.lineno}: {error.message}"
            ) from None
        except (RecursionError, MemoryError, SyntaxError, ValueError, AssertionError) as error:
            raise TemplateError(f"the chat template is too deeply nested or malformed: {error}") from None

    def _run(self, messages: list[dict[str, Any]], rest: Mapping[str, Any]) -> str:
        import jinja2
        from jinja2.exceptions import SecurityError

        from nybble.text.sandbox import environment

        template = self._template
        budget = Budget(self.limits)
        size = budget.weigh([messages, *rest.values()])
        environment().use(Budget(self.limits, size))
        try:
            pieces = []
            left = self.limits.output_chars + size
            for piece in template.generate({**self._constants, "messages": messages, **rest}):
                left -= len(piece)
                if left < 0:
                    raise TemplateError(
                        f"the chat template writes more than {self.limits.output_chars} characters"
                    )
                pieces.append(piece)
            return "".join(pieces)
        except TemplateError:
            raise
        except SecurityError as error:
            raise TemplateError(f"the chat template does something that is not safe: {error}") from None
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template failed: {error.message}") from None
        except RecursionError:
            raise TemplateError("the chat template calls itself without end") from None
        except (MemoryError, OverflowError) as error:
            raise TemplateError(f"the chat template asks for too much: {error}") from None
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _with_arguments(message: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """The message with the arguments of its tool calls as JSON text or as objects."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, as_text) for call in calls]}


def _call_with_arguments(call: Any, as_text: bool) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_arguments(call["function"], as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, dict):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
    return call
