"""The fingerprint of the sources that decide a product: what it covers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pa_ops import sources


def neighbours(path: Path) -> set[str]:
    """The files of the generator that one of them imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {f"{node.module}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_what_renders_a_source_is_covered() -> None:
    assert neighbours(sources.generator_folder() / "render.py") <= {*sources.RENDERING}


@pytest.mark.parametrize("name", sources.RENDERING)
def test_another_renderer_is_another_fingerprint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources.fingerprint()
    for path in sources.generator_folder().iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sources, "generator_folder", lambda: tmp_path)
    assert sources.fingerprint() == before
    (tmp_path / name).write_text("# another\n", encoding="utf-8")
    assert sources.fingerprint() != before
