"""What a person sees: a bar on a terminal, plain lines elsewhere, never the data's escape codes."""

import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time

import pytest

from mainrun.console import clock, evaluation, lines, printable

PROGRAM = """
import time
from mainrun.console import Console

console = Console(total_steps=200)
console.show("run_started", 0, {"name": "tiny", "parameters": 12345, "device": "cpu"})
console.show("evaluation", 0, {"val/loss": 4.5, "val/loss_stderr": 0.1})
for step in range(1, 201):
    if step in (101, 201):
        time.sleep(0.12)
    loss = {"train/loss": 3.21449, "perf/tokens_per_second": 12345.4}
    console.show("train_step", step, loss)
    if step == 100:
        console.show("samples", step, {"texts": ["[bold]a[/bold]\\x1b[31m\\nb " + "x" * 300]})
        console.show("warning", None, {"message": "low disk \\x1b[2J"})
print("the result")
console.close()
"""


def in_a_pipe() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"},
    )  # fmt: skip


def on_a_terminal(program: str = PROGRAM) -> tuple[str, str]:
    """What a terminal of 100 columns shows of stderr, and what a file gets of stdout."""
    main, terminal = pty.openpty()
    os.set_blocking(main, False)
    shape = "import fcntl, struct, termios; "
    shape += "fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack('HHHH', 30, 100, 0, 0))\n"
    process = subprocess.Popen(
        [sys.executable, "-c", shape + textwrap.dedent(program)],
        stderr=terminal,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(terminal)
    shown = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([main], [], [], 0.1)[0]:
            try:
                chunk = os.read(main, 65536)
            except OSError:  # the last writer has closed
                break
            if not chunk:
                break
            shown += chunk
    os.close(main)
    assert process.stdout is not None
    with process:
        return shown.decode(), process.stdout.read()


def test_without_a_terminal_there_are_plain_lines_and_the_result_alone_is_on_stdout():
    done = in_a_pipe()
    assert done.stdout == "the result\n"
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    shown = done.stderr.splitlines()
    assert shown[:2] == [
        "tiny: 12,345 parameters, cpu",
        "evaluation at step 0: val/loss 4.500 nats/char ± 0.100",
    ]
    assert shown[2] == "step 1/200  loss 3.214  12,345 tokens/s"
    assert r"warning: low disk \x1b[2J" in shown
    assert re.fullmatch(r"step 191/200  loss 3\.214  12,345 tokens/s  00:0\d left", shown[-2])
    assert shown[-1] == "step 200/200  loss 3.214  12,345 tokens/s"


def test_a_plain_training_line_comes_each_twentieth_of_the_run():
    steps = [int(n) for n in re.findall(r"^step (\d+)/200", in_a_pipe().stderr, re.MULTILINE)]
    assert steps == [*range(1, 200, 10), 200]


def test_on_a_terminal_a_bar_shows_step_loss_speed_and_time_left_below_the_lines():
    shown, result = on_a_terminal()
    assert result == "the result\n"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"step 101/200 +[━╸╺ ]+ loss 3\.214 +12,345 tokens/s +00:0\d left", plain)
    assert "step 200/200" in plain.splitlines()[-1]
    assert "evaluation at step 0: val/loss 4.500 nats/char ± 0.100\r\n" in plain
    assert "\x1b[?25l" in shown  # the cursor is hidden
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # and given back


def test_text_of_the_data_cannot_drive_the_terminal():
    shown, _ = on_a_terminal()
    assert "\x1b[31m\n" not in shown
    assert "sample at step 100: [bold]a[/bold]\\x1b[31m\\nb xxx" in re.sub(r"\r\n", "", shown)
    assert printable("a\x1b]0;t\x07\u202eb\t\udcff") == r"a\x1b]0;t\x07\u202eb\t\udcff"
    assert printable("naïve 東京 🙂") == "naïve 東京 🙂"


def test_a_terminal_that_goes_away_does_not_end_the_run():
    program = PROGRAM.replace("for step", "import os\nos.close(2)\nfor step", 1)
    assert on_a_terminal(program)[1] == "the result\n"
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (piped.returncode, piped.stdout) == (0.0, "the result\n")


def test_an_evaluation_is_told_with_its_units():
    fields = {
        "val/loss": 1.9341, "val/loss_stderr": 0.0123, "val/nats_per_token": 2.712,
        "val/bits_per_byte": 1.984,
    }  # fmt: skip
    assert evaluation(fields) == (
        "val/loss 1.934 nats/char ± 0.012 (2.71 nats/token, 1.98 bits/byte)"
    )
    assert evaluation({"val/loss": float("nan")}) == "val/loss nan nats/char"


def test_events_are_told_in_words(subtests: pytest.Subtests):
    cases = [
        ("checkpoint", 7, {"best": False, "path": "p/7"}, ["checkpoint at step 7: p/7"]),
        ("checkpoint", 7, {"best": True}, ["checkpoint at step 7: saved (the best so far)"]),
        ("resumed", 7, {"overrides": ["a.b=1"]}, ["resumed at step 7, a.b=1"]),
        ("tracking_started", None, {"wandb": "disabled"}, []),
        ("of_tomorrow", 3, {"n": 1, "who": "x"}, ["of tomorrow at step 3: n 1, who x"]),
        ("finished", None, {}, []),
    ]
    for event, step, fields, expected in cases:
        with subtests.test(event=event, step=step, fields=fields):
            assert lines(event, step, fields) == expected


def test_time_left_is_a_clock(subtests: pytest.Subtests):
    cases = [
        (-1.0, "00:00"),
        (41.4, "00:41"),
        (59.6, "01:00"),
        (3723.0, "1:02:03"),
        (180000.0, "2 d 02:00:00"),
    ]
    for seconds, expected in cases:
        with subtests.test(seconds=seconds):
            assert clock(seconds) == expected
