"""Turns the key=value words of a command line into a problem, the device it is asked of, and the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from pa_ops.capability import Capability
from pa_ops.errors import InvalidArgument
from pa_ops.problem import Problem
from pa_ops.selection import AUTO

SHORT = {"kv": "max_k", "heads": "num_heads", "kv_heads": "num_kv_heads", "dv": "head_dim_v", "page": "page_size"}
YES_NO = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
_FIELDS = {field.name: str(field.type) for field in fields(Problem) if field.name != "op"}
_OWN = ("sm", "card", "backend")


@dataclass(frozen=True)
class Question:
    """What `pa-ops explain` and `build --model` are told: a problem, an SM (None: this device), a card's name."""

    problem: Problem
    sm: int | None = None
    card: str = ""
    backend: str = AUTO

    @property
    def capability(self) -> Capability | None:
        """The device that was named; None where none was."""
        return None if self.sm is None else Capability.of_sm(self.sm, card=self.card)


def question(op: str, words: Sequence[str]) -> Question:
    """What the words spell; bf16 where they name no dtype. Raises InvalidArgument naming the word."""
    given: dict[str, object] = {"dtype": "bf16"}
    for word in words:
        key, separator, value = word.partition("=")
        key = SHORT.get(key, key)
        if not separator or not value:
            raise InvalidArgument("facts", "must be key=value words", repr(word))
        given[key] = _value(key, value, word)
    if "head_dim" not in given:
        raise InvalidArgument("head_dim", "must be told, head_dim=128 say", "nothing")
    own = {key: given.pop(key) for key in _OWN if key in given}
    return Question(Problem(op=op, **given), **own)  # type: ignore[arg-type]


def _value(key: str, value: str, word: str) -> object:
    if key == "sm":
        return _number(key, value.removeprefix("sm_"))
    if key in _OWN:
        return value
    if key not in _FIELDS:
        raise InvalidArgument(key, f"must be one of {', '.join((*_FIELDS, *_OWN, *SHORT))}", repr(word))
    if "int" in _FIELDS[key]:
        return _number(key, value)
    if _FIELDS[key] != "bool":
        return value
    if value not in YES_NO:
        raise InvalidArgument(key, "must be yes or no", repr(value))
    return YES_NO[value]


def _number(key: str, value: str) -> int:
    if not value.isdecimal():
        raise InvalidArgument(key, "must be an integer", repr(value))
    return int(value)
