"""What `requirements/install.py` says while pip or uv is at work, and when that fails."""

import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "install", Path(__file__).parent.parent / "requirements" / "install.py"
)
assert spec is not None
assert spec.loader is not None
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

PIP = b"""Collecting jaxlib==0.11.2
  Downloading jaxlib-0.11.2-cp312-cp312-manylinux_2_27_x86_64.whl.metadata (1.3 kB)
  Downloading jaxlib-0.11.2-cp312-cp312-manylinux_2_27_x86_64.whl (81.5 MB)
  Using cached wadler_lindig-0.1.8-py3-none-any.whl (500 kB)
Ignoring colorama: markers 'sys_platform == "win32"' don't match your environment
"""
UV = b"""Resolved 97 packages in 636ms
Downloading jaxlib (80.9MiB)
 Downloaded jaxlib
Downloading jax (1.1MiB)
"""


@pytest.mark.parametrize(("said", "lines"), [(PIP, 4), (UV, 4)], ids=["pip", "uv"])
def test_megabytes_are_read_off_what_the_installer_says(said, lines):
    output = setup.Output()
    output.read(io.BytesIO(said))
    assert len(output.lines) == lines
    assert output.megabytes == pytest.approx(82.0, abs=0.01)


WHEN_TOLD = """
import pathlib, sys, time
print("Downloading a.whl (3.5 MB)", flush=True)
site = pathlib.Path(sys.argv[1], "lib/python3.13/site-packages")
(site / "a.dist-info").mkdir(parents=True)
for _ in range(1000):
    if (site / "go on").exists():
        break
    time.sleep(0.01)
"""


def test_who_reads_no_terminal_hears_of_packages_megabytes_and_seconds(
    tmp_path, monkeypatch, capsys
):
    said = []

    def say(line):
        said.append(line)
        if "in place" in line:
            (tmp_path / "lib/python3.13/site-packages/go on").touch()

    monkeypatch.setattr(setup, "REPORT_SECONDS", 0.01)
    monkeypatch.setattr(setup, "say", say)
    setup.run([sys.executable, "-c", WHEN_TOLD, str(tmp_path)], "cpu.txt", tmp_path)
    assert said[0] == "installing cpu.txt ..."
    reports = [line for line in said if "in place" in line]
    pattern = r"cpu.txt: \d+ s, 4 MB fetched, 1 package in place"
    assert len(reports) >= 2
    assert re.fullmatch(pattern, reports[0])
    assert re.fullmatch(pattern.replace("cpu.txt:", "installed cpu.txt in"), said[-1])


def test_what_cannot_be_installed_is_told_with_its_last_lines_and_a_remedy(tmp_path, capsys):
    code = "print('ERROR: no matching distribution'); raise SystemExit(3)"
    with pytest.raises(SystemExit) as stopped:
        setup.run([sys.executable, "-c", code], "cpu.txt", tmp_path)
    assert stopped.value.code == 1
    *_, reason, line = capsys.readouterr().err.splitlines()
    assert reason == "    ERROR: no matching distribution"
    assert line.startswith("setup: cpu.txt could not be installed: ")
    assert "ended with 3; " in line
    assert "PIP_INDEX_URL" in line
