"""The MLflow UI in a real browser: scripts/docs/ui_tour.py."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from support.commands import run_command

PHOTOGRAPHS = ["1-experiments", "2-runs", "3-charts", "4-compared", "5-run", "6-picture"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Chromium and its driver")
def test_ui_shows_what_a_sweep_has_recorded(tmp_path: Path):
    done = run_command(sys.executable, "scripts/docs/ui_tour.py", "--out", str(tmp_path / "tour"), timeout=1800)
    assert done.code == 0, done.err
    assert sorted(path.stem for path in (tmp_path / "tour").glob("*.png")) == PHOTOGRAPHS
    for name in PHOTOGRAPHS:
        image = Image.open(tmp_path / "tour" / f"{name}.png")
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50  # something is drawn
