"""Conversations as rows hold them: lists of messages, in whatever words their roles and fields are named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_llm.datamodules.examples.records import RecordError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

_OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}


@dataclass(frozen=True)
class MessageReader:
    """Reads the messages of a row.

    Attributes:
        role_field: Where a message says who speaks; ``from`` in ShareGPT's form.
        content_field: Where it says what; ``value`` in ShareGPT's form.
        role_names: Which of ``system``, ``user``, ``assistant``, ``tool`` other names stand for, beside the usual
            ones (``human``, ``gpt``, ``function``, ...).

    Example:
        >>> reader = MessageReader(role_field="from", content_field="value")
        >>> reader([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "conversations", "row 0")
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """

    role_field: str = "role"
    content_field: str = "content"
    role_names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse roles that no template knows."""
        wrong = sorted(set(self.role_names.values()) - set(ROLES))
        if wrong:
            raise ValueError(f"`role_names` maps to {', '.join(ROLES)}, but got {', '.join(map(repr, wrong))}.")

    def __call__(self, value: Any, column: str, row: str, *, text_is: str | None = None) -> list[Message]:
        """The messages in a column, with ``role`` and ``content``; fields that are None are left out.

        Args:
            value: A list of messages, or JSON of one.
            column: For messages of errors.
            row: Likewise.
            text_is: Whose message a text that is no JSON list is; None refuses it.

        Raises:
            RecordError: If there is no message, or one cannot be read.
        """
        value = _from_json(value)
        if isinstance(value, str) and text_is is not None:
            value = [{self.role_field: text_is, self.content_field: value}]
        if isinstance(value, Mapping):  # one message
            value = [value]
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise RecordError(
                f"{row}: column {column!r} should hold a list of messages, but holds {str(value)[:60]!r}. Mend the "
                f"row, or leave it out."
            )
        return [
            self._message(message, f"{row}: message {number} of {column!r}") for number, message in enumerate(value)
        ]

    def _message(self, message: Any, name: str) -> Message:
        if not isinstance(message, Mapping) or self.role_field not in message:
            shown = sorted(message) if isinstance(message, Mapping) else repr(message)[:60]
            raise RecordError(
                f"{name} should have the fields {self.role_field!r} and {self.content_field!r}, but has {shown}. Name "
                f"them with role_field=... and content_field=..."
            )
        said = str(message[self.role_field])
        role = self.role_names.get(said) or _OTHER_NAMES.get(said.lower(), said.lower())
        if role not in ROLES:
            raise RecordError(
                f"{name} is by {said!r}, but roles are {', '.join(ROLES)}. Say which it is: "
                f"role_names={{{said!r}: 'assistant'}}, for instance."
            )
        content = message.get(self.content_field)
        if content is not None and not isinstance(content, (str, list)):
            raise RecordError(f"{name} should hold a text, but holds {type(content).__name__} ({str(content)[:40]!r}).")
        own = (self.role_field, self.content_field)
        others = _without_none({key: value for key, value in message.items() if key not in own})
        if content is None and not others.get("tool_calls"):
            raise RecordError(f"{name} has no {self.content_field!r}. Give it a text, '' if it says nothing.")
        return {"role": role, **({} if content is None else {"content": content}), **others}


def _from_json(value: Any) -> Any:
    """A list that stands in a text, as csv files hold it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except ValueError:
            return value
        return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else value
    return value


def tools_of(value: Any, column: str, row: str) -> list[dict[str, Any]] | None:
    """Tools that an assistant may call, each described by a JSON schema; None where there are none.

    Raises:
        RecordError: If the column holds something else.
    """
    value = _from_json(value)
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise RecordError(
            f"{row}: column {column!r} should hold a list of tools, each a JSON schema, or JSON of one, but holds "
            f"{str(value)[:60]!r}."
        )
    return [_without_none(tool) for tool in value]


def _without_none(value: Any) -> Any:
    """Parquet fills in what one row's schema lacks and another's has."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value
