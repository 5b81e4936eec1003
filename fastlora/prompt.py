"""From a row of data to the exact text a model is given, and from that text to token ids.

    prompt = [system turn] + user turn + opening of the assistant's turn + assistant_prefix

The turns are written by the tokenizer's own chat template. Without a chat template the user turn is used as plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING

import jinja2

from fastlora.errors import FastloraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ASSISTANT, _SYSTEM = "fastlorauserturn", "fastloraassistantturn", "fastlorasystemturn"
"""Stand-ins for the contents of turns: no white space for a template to trim, in no template's own text."""


class PromptError(FastloraError):
    """A prompt that cannot be built; the message names the setting to change."""


def fill_template(template: str, fields: Mapping[str, object]) -> str:
    """`template` with each {name} replaced by str(fields[name]); `{{` and `}}` are literal braces.

    Raises PromptError for a field that the row does not have, and for braces that are not a field.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise PromptError(f"{template!r}: {error}; write literal braces doubled, {{{{ and }}}}") from None
    for name in names:
        if not name:
            raise PromptError(f"{template!r} has an empty field {{}}; write literal braces doubled, as in \\boxed{{{{}}}}")
        if name not in fields:
            raise PromptError(f"{template!r} asks for the field {{{name}}}; this row has {', '.join(sorted(fields))}")
    return template.format_map(fields)


def chat_renderer(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> Callable[[str], str]:
    """The function user text -> prompt text up to and including the opening of the assistant's turn.

    system_prompt None gives a prompt without any system turn, also where the template adds a default one when the conversation
    does not start with a system message (SmolLM2, Qwen2.5); "" gives an empty system turn.
    Raises PromptError if the template refuses the system turn, or if its default one cannot be told apart.
    """
    if tokenizer.chat_template is None:
        if system_prompt is not None:
            raise PromptError("data.system_prompt is set, but the tokenizer has no chat template; put it into data.user_template")
        return lambda user: user
    if system_prompt is not None:
        return lambda user: _render(tokenizer, [("system", system_prompt), ("user", user)])
    head, kept = _default_head(tokenizer)

    def render(user: str) -> str:
        text = _render(tokenizer, [("user", user)])
        if not text.startswith(head):
            raise PromptError(f"the chat template opens a conversation with {head!r} or not, depending on what the user says")
        return kept + text.removeprefix(head)

    return render


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts: a chat template has written its special tokens; plain text gets the tokenizer's own."""
    if not prompts:
        return []
    return tokenizer(list(prompts), add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def _default_head(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(what the template writes before the first user turn, the part of it that is no system turn).

    Templates add a default system turn to the first turn only, so the user turn of a *second* exchange shows where the first
    one begins: it is what a conversation gains when that turn is appended. What stands before it stays if an explicit system
    turn would come after it (the bos token, `[gMASK]<sop>`); otherwise it holds a system turn, and only a bos token stays.
    """
    first = _render(tokenizer, [("user", _USER)])
    exchange = [("user", _USER), ("assistant", _ASSISTANT)]
    # Only what follows the assistant's words is compared: Qwen3 rewrites earlier assistant turns when one is appended.
    closing = _render(tokenizer, exchange, open_assistant=False).rpartition(_ASSISTANT)[2]
    turn = _render(tokenizer, [*exchange, ("user", _USER)]).rpartition(_ASSISTANT)[2].removeprefix(closing)
    if _USER not in turn or not first.endswith(turn):
        raise PromptError(
            "the chat template writes a first user turn differently from a later one, so its default system turn cannot be "
            "told apart; set data.system_prompt"
        )
    head, bos = first.removesuffix(turn), tokenizer.bos_token or ""
    if head in ("", bos):
        return head, head
    try:
        with_system = _render(tokenizer, [("system", _SYSTEM), ("user", _USER)])
    except PromptError:
        return head, head  # a template that refuses system turns has no default one
    if with_system.startswith(head):
        return head, head
    opens_with_bos = head.startswith(bos) and not turn.startswith(bos)  # SmolLM2's bos is also the opening of every turn
    return head, bos if opens_with_bos else ""


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], open_assistant: bool = True) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_assistant)
    except jinja2.TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise PromptError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from error
