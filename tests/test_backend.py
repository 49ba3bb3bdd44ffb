"""How batches are cut, and what is said of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mainrun.data import cache
from mainrun.errors import UserError
from mainrun.training import backend


def test_a_cpu_takes_micro_batches_of_a_thousand_tokens(subtests: pytest.Subtests) -> None:
    cases = [
        (64, 128, 1, 8),  # 1,024 tokens each
        (64, 128, 16, 16),
        (8, 128, 1, 1),
        (12, 256, 1, 3),
        (7, 512, 1, 7),  # no divisor fits: single sequences
        (4, 4096, 1, 4),  # one sequence is more than that
        (4, 4096, 4, 4),
    ]
    for batch_size, context_length, at_least, expected in cases:
        with subtests.test(
            batch_size=batch_size,
            context_length=context_length,
            at_least=at_least,
            expected=expected,
        ):
            assert backend.micro_batches(batch_size, context_length, at_least=at_least) == expected


@pytest.mark.slow
def test_peak_memory_is_the_processs_own_and_not_its_parents() -> None:
    program = "from mainrun.training import backend; print(backend.peak_memory_bytes())"
    ballast = bytearray(os.urandom(1)) * (2**30)  # the parent's, while the child runs
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 50 * 2**20 < int(done.stdout) < len(ballast)


@pytest.mark.slow
def test_a_device_that_is_asked_for_and_absent_is_an_error_and_no_run_on_the_cpu() -> None:
    program = "from mainrun.training import backend; backend.prepare()"
    for platform in ("cuda", "no-such-platform"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": platform},
        )  # fmt: skip
        if platform == "cuda" and done.returncode == 0:
            pytest.skip("this machine has a GPU")
        assert f"UserError: JAX_PLATFORMS={platform}, but JAX has no such device" in done.stderr


def test_matplotlib_has_its_folder_among_the_caches_and_none_in_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPLCONFIGDIR")
    backend.prepare()
    assert os.environ["MPLCONFIGDIR"] == str(cache.folder() / "matplotlib")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    backend.prepare()
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path)


def test_a_user_without_a_home_hears_of_the_variable_that_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "MAINRUN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # of whom the list of users knows nothing
    with pytest.raises(UserError, match="MAINRUN_CACHE_DIR"):
        cache.folder()
