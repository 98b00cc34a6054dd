"""Turns the progress of a build into calls that a display may answer."""

from __future__ import annotations

from .plan import Plan


class Listener:
    """Hears how a build gets on; this one stays silent."""

    def waiting(self, owner: str) -> None:
        """Another build holds the lock."""

    def planned(self, plan: Plan) -> None:
        """The work of a target is known."""

    def progressed(self, done: int, failed: int) -> None:
        """Instances compiled and failed so far."""
