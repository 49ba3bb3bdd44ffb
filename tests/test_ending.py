"""What the end of a container means, in words."""

import pytest

from mainrun.ending import ending_of


def test_every_exit_code_has_a_kind_and_a_sentence(subtests: pytest.Subtests):
    cases = [(0, "finished"), (1, "failed"), (2, "refused"), (75, "stopped"), (143, "stopped"),
             (137, "killed"), (7, "failed")]  # fmt: skip
    for code, kind in cases:
        with subtests.test(code=code, kind=kind):
            found = ending_of(code, [])
            assert (found.kind, found.exit_code) == (kind, code)
            assert found.sentence
            assert found.remedy or code == 0


def test_the_reason_is_the_commands_own_last_word():
    log = [
        "mainrun: failed: the disk is full",
        'task: Failed to run task "train": exit status 1',
    ]
    assert ending_of(1, log).sentence == "the disk is full"


def test_out_of_memory_is_told_from_a_kill():
    found = ending_of(137, [], out_of_memory=True, memory_bytes=3 * 2**30)
    assert found.kind == "out_of_memory"
    assert "3.0 GiB" in found.sentence
    assert "training.batch_size" in found.remedy


def test_a_finished_run_is_finished_also_where_a_child_was_out_of_memory():
    assert ending_of(0, [], out_of_memory=True, memory_bytes=1).kind == "finished"
