"""Turns PA_OPS_* environment variables into typed settings; no other module of pa_ops reads the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pa_ops.errors import InvalidArgument
from pa_ops.selection import AUTO, Policy

VARIABLES = (
    "PA_OPS_HOME",
    "PA_OPS_BACKEND",
    "PA_OPS_DISABLE",
    "PA_OPS_CHECKED",
    "PA_OPS_NO_JIT",
    "PA_OPS_BATCH_INVARIANT",
    "PA_OPS_DEBUG",
    "PA_OPS_SM",
)
# The mapping of bytes below os.environ. Every operator call reads the settings, and eight look-ups through os.environ
# cost 6 us, through this 0.3 us.
RAW: dict[bytes, bytes] = vars(os.environ)["_data"]
KEYS = tuple(map(os.fsencode, VARIABLES))
_ON = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}


@dataclass(frozen=True)
class Settings:
    """The settings of one moment.

    home: folder of built products, in place of the search; backend, disabled: see selection.Policy; checked: read
    values that live on the device; no_jit: never build on first use; batch_invariant: see selection.Policy; debug:
    print each decision to stderr; sm: what `explain` and `select` answer for when no device is named, before the GPU
    that is here.
    """

    home: Path | None = None
    backend: str = AUTO
    disabled: frozenset[str] = field(default_factory=frozenset)
    checked: bool = False
    no_jit: bool = False
    batch_invariant: bool = False
    debug: bool = False
    sm: int | None = None

    def policy(self, backend: str = AUTO, *, source: str = "backend=") -> Policy:
        """The overrides in force: `backend` where it is not "auto", else PA_OPS_BACKEND; PA_OPS_DISABLE always."""
        if backend == AUTO:
            backend, source = self.backend, "PA_OPS_BACKEND"
        return Policy(backend, source, self.disabled, self.batch_invariant)


def settings() -> Settings:
    """The environment as it is now; raises InvalidArgument naming a variable whose value means nothing."""
    return settings_of(tuple(map(RAW.get, KEYS)))


@contextmanager
def homed(folder: str | Path) -> Iterator[None]:
    """A block in which PA_OPS_HOME is `folder`, whatever it was."""
    before = os.environ.get("PA_OPS_HOME")
    os.environ["PA_OPS_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["PA_OPS_HOME"]
        if before is not None:
            os.environ["PA_OPS_HOME"] = before


@lru_cache(maxsize=64)
def settings_of(values: tuple[bytes | None, ...]) -> Settings:
    """The settings that the variables' `values`, in the order of KEYS, say."""
    raw = {name: os.fsdecode(value or b"").strip() for name, value in zip(VARIABLES, values, strict=True)}
    return Settings(
        home=Path(raw["PA_OPS_HOME"]).expanduser() if raw["PA_OPS_HOME"] else None,
        backend=raw["PA_OPS_BACKEND"] or AUTO,
        disabled=frozenset(word.strip() for word in raw["PA_OPS_DISABLE"].split(",") if word.strip()),
        checked=_flag("PA_OPS_CHECKED", raw),
        no_jit=_flag("PA_OPS_NO_JIT", raw),
        batch_invariant=_flag("PA_OPS_BATCH_INVARIANT", raw),
        debug=_flag("PA_OPS_DEBUG", raw),
        sm=_sm(raw["PA_OPS_SM"]),
    )


def _flag(name: str, raw: dict[str, str]) -> bool:
    value = raw[name].lower()
    if value and value not in _ON:
        raise InvalidArgument(name, "must be one of " + ", ".join(_ON), repr(raw[name]))
    return _ON.get(value, False)


def _sm(value: str) -> int | None:
    if not value:
        return None
    digits = value.removeprefix("sm_")
    if not digits.isdecimal():
        raise InvalidArgument("PA_OPS_SM", "must be an SM number such as 90", repr(value))
    return int(digits)
