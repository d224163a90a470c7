"""What a QEMU takes or refuses, whimbrel takes or refuses too, but for the differences that have a reason."""

import pytest

from whimbrel_testing.wrong import Side, all_cases

from .conftest import BINARIES, ask_all

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

BY_NAME = {case.name: case for case in all_cases()}


@pytest.fixture(scope="module")
def answers(binaries):
    streams = {name: case.data() for name, case in BY_NAME.items()}
    return {version: ask_all(path, streams) for version, path in binaries.items()}


@pytest.mark.parametrize("version", BINARIES)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_real_qemu_does_what_the_table_says(answers, name, version):
    answer = answers[version][name]
    assert answer.took_it == (Side(version) in BY_NAME[name].qemu), answer


def test_both_qemus_say_why_they_refuse(answers):
    """A control: they refused the streams, and did not fail to start."""
    for version, by_name in answers.items():
        for name, answer in by_name.items():
            if not answer.took_it:
                assert answer.said, (version, name)
