"""Which characters of a rendered conversation train.

Where a template marks its answers (``{% generation %}``), those; else what a turn adds to the text of the
turns before it and of the beginning of its answer. That is what a model generates, if the three texts nest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moetrain.data.chat.messages import Conversation, Message, RowError, called
from moetrain.data.chat.settings import TrainOn
from moetrain.data.chat.template import ChatTemplate, Rendered
from moetrain.data.chat.words import Span
from moetrain.errors import UserError, quoted


class Example(NamedTuple):
    """A rendered text and the characters of it that train."""

    text: str
    trained: tuple[Span, ...]


def examples(given: Conversation, template: ChatTemplate, train_on: TrainOn) -> Iterator[Example]:
    """The texts of a conversation, one but for ``each``.

    Raises RowError where the row is at fault, and UserError where the template writes a turn in another way
    once others follow: no row with several turns could then be used.
    """
    chosen = _chosen(given, train_on, template.key)
    if train_on is TrainOn.each:
        for number in chosen:
            part = given.messages[: number + 1]
            yield _example(part, given.tools, template, [number])
    elif train_on is TrainOn.all:
        text = _whole(given.messages, given.tools, template).text
        yield Example(text, ((0, len(text)),))
    else:
        yield _example(given.messages, given.tools, template, chosen)


def _chosen(given: Conversation, train_on: TrainOn, key: str) -> list[int]:
    """The numbers of the messages that train: a message's own word, or else the setting."""
    if train_on is TrainOn.all:
        if any(wish is not None for wish in given.trains):
            raise RowError(f"a message says whether it trains, and {key}.train_on=all trains all of the text")
        return list(range(len(given.messages)))
    answers = [number for number, role in enumerate(given.roles) if role == "assistant"]
    if train_on is TrainOn.last:
        answers = answers[-1:]
    chosen = [
        number
        for number, wish in enumerate(given.trains)
        if (wish if wish is not None else number in answers)
    ]
    if not chosen:
        raise RowError("no message of it trains")
    return chosen


def _whole(messages: Sequence[Message], tools: list[object] | None, template: ChatTemplate) -> Rendered:
    """Raises RowError for tool calls that the template passes over: the model would learn to say nothing."""
    full = template.render(messages, tools)
    for number, name in called(messages):
        if name not in full.text:
            raise RowError(
                f"message {number} calls the tool {quoted(name)}, which the chat template does not write"
            )
    return full


def _example(
    messages: Sequence[Message], tools: list[object] | None, template: ChatTemplate, chosen: Sequence[int]
) -> Example:
    full = _whole(messages, tools, template)
    if template.marks_turns:
        spans = _marked(messages, full, chosen)
    else:
        spans = [_added(messages, tools, template, full.text, number) for number in chosen]
    kept = tuple(span for span in spans if span[0] < span[1])
    if not kept:
        raise RowError("the chat template writes nothing for the messages that train")
    return Example(full.text, kept)


def _marked(messages: Sequence[Message], full: Rendered, chosen: Sequence[int]) -> list[Span]:
    """The marks of the chosen messages; they stand for the assistant's messages one after the other."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    others = sorted(set(chosen) - set(answers))
    if others:
        raise RowError(
            f"message {others[0]} ({messages[others[0]]['role']}) is to train, and the chat template marks "
            "only what the assistant generates"
        )
    if chosen == answers:
        return list(full.spans)
    if len(full.spans) != len(answers):
        raise RowError(
            f"the chat template marks {len(full.spans)} texts for {len(answers)} turns of the assistant, so "
            "that one turn cannot be told from another"
        )
    return [span for span, number in zip(full.spans, answers, strict=True) if number in chosen]


def _added(
    messages: Sequence[Message],
    tools: list[object] | None,
    template: ChatTemplate,
    full: str,
    number: int,
) -> Span:
    """What message ``number`` adds to the text."""
    answers = messages[number]["role"] == "assistant"
    before = template.render(messages[:number], tools, prompt=answers).text if number or answers else ""
    upto = full if number == len(messages) - 1 else template.render(messages[: number + 1], tools).text
    if not upto.startswith(before):
        what = "the beginning of an answer (add_generation_prompt)" if answers else "the messages before it"
        raise UserError(
            f"{template.label} does not write message {number} after {what}: {_parting(before, upto)}; give "
            f"{_marked_template(template)}, or {template.key}.template_args that fit"
        )
    if not full.startswith(upto):
        raise UserError(
            f"{template.label} writes message {number}, or one before it, in another way once others follow: "
            f"{_parting(upto, full)}; set {template.key}.train_on=last or each, or give "
            f"{_marked_template(template)}"
        )
    return len(before), len(upto)


def _marked_template(template: ChatTemplate) -> str:
    return "a template with {% generation %} marks " + f"({template.key}.chat_template)"


def _parting(first: str, second: str) -> str:
    """Where two texts part, and how each goes on."""
    pairs = zip(first, second, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    ways = [quoted(text[place : place + 40]) if place < len(text) else "its end" for text in (first, second)]
    return f"from character {place} on, {ways[0]} or {ways[1]}"
