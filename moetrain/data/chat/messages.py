"""A row's messages in one shape: OpenAI's, whatever the row had. What is wrong with a row, in words.

Two shapes are read: ``{"role", "content"}`` and ShareGPT's ``{"from", "value"}``. Messages are counted from
0, as rows are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moetrain.errors import quoted

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_FIRST = ("system", "developer")
_RESULTS = ("tool", "function")
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "assistant",
}
_TRAIN = ("train", "weight")  # both say whether a message trains; no template sees them
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, as transformers takes them

Message = dict[str, object]


class RowError(Exception):
    """Why a row cannot be used: words that follow the names of its file and its row."""


@dataclass(frozen=True)
class Conversation:
    """``trains``: what each message itself says about whether it trains; None where it says nothing."""

    messages: tuple[Message, ...]
    tools: list[object] | None
    trains: tuple[bool | None, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(str(message["role"]) for message in self.messages)

    @property
    def plain(self) -> list[object]:
        """All that a template gets, as plain JSON."""
        return [list(self.messages), self.tools]

    def with_plain(self, plain: object) -> Conversation:
        """The same conversation with other words: ``plain`` is shaped as :attr:`plain` is."""
        assert isinstance(plain, list)
        return replace(self, messages=tuple(plain[0]), tools=plain[1])


def conversation(messages: object, tools: object, system: object = None) -> Conversation:
    """The conversation of a row's values. Raises RowError. ``system``: a text that stands before them."""
    found, trains = [], []
    for number, given in enumerate(_listed(messages)):
        message, wish = _message(given, f"message {number}")
        found.append(message)
        trains.append(wish)
    if isinstance(system, str) and system.strip():
        found.insert(0, {"role": "system", "content": system})
        trains.insert(0, None)
    return Conversation(tuple(found), _tools(tools), tuple(trains))


def check_order(roles: Sequence[str], key: str = "data") -> None:
    """Raise RowError unless a user's turn comes first, after a system's, and no role follows itself.

    A tool's turns follow the assistant's, several of them if need be. ``key``: where the option stands.
    """
    before = ""
    for number, role in enumerate(roles):
        wrong = None
        if role in _FIRST:
            wrong = None if before in ("", *_FIRST) else "stands after the first turn"
        elif role in _RESULTS:
            wrong = None if before in ("assistant", *_RESULTS) else "follows no assistant's turn"
        elif before in ("", *_FIRST) and role == "assistant":
            wrong = "answers no user"
        elif before == role:
            wrong = f"follows another {role}'s"
        if wrong:
            raise RowError(f"message {number} ({role}) {wrong}; {key}.check_order=false takes any order")
        before = role


def _listed(messages: object) -> list[object]:
    if not isinstance(messages, list):
        raise RowError(f"its messages are {_kind(messages)}, not a list")
    if not messages:
        raise RowError("it has no messages (an empty list)")
    return messages


def _message(given: object, where: str) -> tuple[Message, bool | None]:
    if not isinstance(given, dict):
        raise RowError(f"{where} is {_kind(given)}, not an object with role and content")
    message: Message = {str(name): value for name, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    role = message.get("role")
    if role is None:
        raise RowError(f"{where} has no role (it has: {', '.join(sorted(map(str, given))) or 'nothing'})")
    if role not in ROLES:
        raise RowError(f"{where} has the role {quoted(role)}; known: {', '.join(ROLES)}")
    wish = _wish(message, where)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where)
    message["content"] = _content(message, where)
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message, wish


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker, value = message.pop("from"), message.pop("value", None)
    role = _SHAREGPT.get(str(speaker))
    if role is None:
        raise RowError(f"{where} is from {quoted(speaker)}; known: {', '.join(sorted(_SHAREGPT))}")
    if speaker == "function_call":
        return message | {
            "role": role,
            "tool_calls": [{"type": "function", "function": _parsed(value, where)}],
        }
    return message | {"role": role} | ({} if value is None else {"content": value})


def _parsed(value: object, where: str) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise RowError(f"{where} is a function_call that is no JSON: {quoted(value)}") from None


def _wish(message: Message, where: str) -> bool | None:
    wishes = {name: message.pop(name) for name in _TRAIN if name in message}
    for name, value in wishes.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(f"{where}: {name!r} is {quoted(value)}; it is true or false, or 1 or 0")
    if len(set(map(bool, wishes.values()))) > 1:
        raise RowError(f"{where}: 'train' and 'weight' say different things")
    return next(map(bool, wishes.values()), None)


def _content(message: Message, where: str) -> str:
    """Text parts are put together as they are; a message that calls tools, or only thinks, may have none."""
    content = message.get("content")
    if content is None:
        if "tool_calls" in message:
            return ""
        raise RowError(f"{where} ({message['role']}) has no content (null)")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{where}: its content is {_kind(content)}, not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise RowError(f"{where}: its content has a part of the kind {quoted(kind)}; only text is read")
        texts.append(text)
    return "".join(texts)


def _calls(calls: object, where: str) -> list[object]:
    """With arguments as objects: templates write them as JSON themselves."""
    if not isinstance(calls, list):
        raise RowError(f"{where}: tool_calls is {_kind(calls)}, not a list")
    found: list[object] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: a tool call names no function: {quoted(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        function = function | {"arguments": {} if arguments is None else arguments}
        found.append({"type": "function", **call, "function": function} if "function" in call else function)
    return found


def called(messages: Sequence[Message]) -> list[tuple[int, str]]:
    """(number of the message, name of the function) of every tool call."""
    found = []
    for number, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        assert isinstance(calls, list)
        for call in calls:
            found.append((number, str(call.get("function", call)["name"])))
    return found


def _tools(tools: object) -> list[object] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RowError("its tools are text that is no JSON") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("its tools are not a list of objects")
    return tools


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
