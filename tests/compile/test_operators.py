"""The kernels that serve steady calls without Python: what they launch, refuse, leave to Python and let go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pa_ops.generator.layout import Layout

pytestmark = pytest.mark.compile
HERE = Path(__file__).parent
SCRIPT = HERE / "operators_script.py"
SCENES = [
    line.split()[1].partition("(")[0]
    for mark, line in zip(SCRIPT.read_text().splitlines(), SCRIPT.read_text().splitlines()[1:], strict=False)
    if mark == "@scene"
]


MAKERS = ("directly", "by the interface")


@pytest.fixture(scope="module")
def told(product: Layout, driver: Path) -> dict[tuple[str, str], str]:
    """What went wrong in each scene by each maker, in processes in which the driver is a stand-in."""
    paths = os.pathsep.join(map(str, (HERE.parent, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": paths}
    command = [sys.executable, str(SCRIPT), str(product.root.parent), *MAKERS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {(maker, scene): wrong for maker, scene, wrong in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("scene", SCENES)
def test_kernels_without_python(scene: str, maker: str, told: dict[tuple[str, str], str]) -> None:
    assert told[maker, scene] == "", told[maker, scene]
