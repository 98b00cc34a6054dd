"""Turns the console script `pa-ops` into pa_ops.cli, without the seconds that torch takes where nothing needs it."""

from __future__ import annotations

import gc
import sys
from importlib.util import find_spec, module_from_spec

WITH_TORCH = "bench"
SHORT = ("list", "explain", "report")  # over in a second: looking for cycles is a tenth of it, and finds none


def enter_bare(name: str) -> None:
    """Makes a package's modules importable without running its __init__, which for pa_ops registers the operators."""
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.modules[name] = module_from_spec(spec)


def main() -> int:
    """Run one command; the console script's entry point."""
    if sys.argv[1:2] and sys.argv[1] in SHORT:
        gc.disable()
    if WITH_TORCH not in sys.argv[1:2]:
        enter_bare("pa_ops")
    from pa_ops.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
