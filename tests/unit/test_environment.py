"""Environment variables: typed, checked, and read in one file only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from core_rows import ROOT

from pa_ops.environment import VARIABLES, Settings, homed, settings
from pa_ops.errors import InvalidArgument


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_nothing_set_means_the_defaults() -> None:
    assert settings() == Settings()


def test_every_variable_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {
        "PA_OPS_HOME": str(tmp_path),
        "PA_OPS_BACKEND": "flash_sm80",
        "PA_OPS_DISABLE": " flash, decode ,",
        "PA_OPS_CHECKED": "1",
        "PA_OPS_NO_JIT": "true",
        "PA_OPS_BATCH_INVARIANT": "on",
        "PA_OPS_DEBUG": "YES",
        "PA_OPS_SM": "sm_86",
    }
    assert values.keys() == set(VARIABLES)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    disabled = frozenset({"flash", "decode"})
    assert settings() == Settings(tmp_path, "flash_sm80", disabled, True, True, True, True, 86)


def test_a_change_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settings().checked
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    assert settings().checked
    monkeypatch.setenv("PA_OPS_CHECKED", "0")
    assert not settings().checked


@pytest.mark.parametrize(("name", "value"), [("PA_OPS_CHECKED", "maybe"), ("PA_OPS_SM", "hopper")])
def test_a_value_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument, match=f"^{name}: .*{value}"):
        settings()


def test_the_argument_is_stronger_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_BACKEND", "decode")
    assert settings().policy().backend == "decode"
    assert settings().policy().backend_source == "PA_OPS_BACKEND"
    assert settings().policy("flash").backend == "flash"
    assert settings().policy("flash").backend_source == "backend="


@pytest.mark.parametrize("before", [None, "/elsewhere"])
def test_a_block_has_a_home_of_its_own(before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PA_OPS_HOME", raising=False)
    if before is not None:
        monkeypatch.setenv("PA_OPS_HOME", before)
    with pytest.raises(KeyError), homed(tmp_path):
        assert settings().home == tmp_path
        raise KeyError
    assert settings().home == (None if before is None else Path(before))


def test_no_other_module_of_the_package_reads_the_environment() -> None:
    readers = [
        path.name
        for path in sorted((ROOT / "pa_ops").glob("*.py"))
        if re.search(r"\bos\.(environ|getenv)\b|from os import", path.read_text(encoding="utf-8"))
    ]
    assert readers == ["environment.py"]
