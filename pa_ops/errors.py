"""Turns a refusal into an exception whose text says what was asked, which rule it met, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class PaOpsError(ValueError):
    """The root of every error that this package raises on purpose."""


class InvalidArgument(PaOpsError):
    """An argument breaks a rule; `argument`, `rule` and `got` are kept apart so that callers can test them."""

    def __init__(self, argument: str, rule: str, got: object) -> None:
        self.argument = argument
        self.rule = rule
        self.got = got
        super().__init__(f"{argument}: {rule}; got {got}")

    def __reduce__(self) -> tuple[type[InvalidArgument], tuple[str, str, object]]:
        return type(self), (self.argument, self.rule, self.got)


class NoInstance(PaOpsError):
    """No kernel may serve a problem on a device; the text lists every gate beside the actual value and the way out."""


class BuildError(PaOpsError):
    """A compiler or linker failed; holds the instance, the command and the tool's own words."""

    def __init__(self, instance: str, command: str | Sequence[str], output: str) -> None:
        self.instance = instance
        self.command = command if isinstance(command, str) else " ".join(command)
        self.output = output
        super().__init__(f"{instance}: the build failed\ncommand: {self.command}\n{output.rstrip()}")

    def __reduce__(self) -> tuple[type[BuildError], tuple[str, str, str]]:
        return type(self), (self.instance, self.command, self.output)
