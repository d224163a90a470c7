"""The apps in their own processes: what they are asked, what they answer, and that they end."""

import pytest

from whimbrel_testing.harness import AppError, AppGone, AppOptions, Pair
from whimbrel_testing.stress import StressConfig

CONFIG = StressConfig(ram=1 << 20, rate=1e6)


@pytest.fixture
def pair():
    with Pair(CONFIG) as pair:
        yield pair


def test_options_survive_the_command_line():
    options = AppOptions(
        config=CONFIG, directory="/tmp/x", settings={"max-bandwidth": 0}, fence=True
    )
    assert AppOptions.decode(options.encode()) == options


def test_a_machine_moves_there_and_back(pair):
    pair.source.call("boot")
    here, there = pair.source, pair.destination
    for _ in range(2):
        address = there.call("incoming", uri="tcp:127.0.0.1:0")["addresses"][0]
        here.call("migrate", uri=address)
        assert here.call("wait")["outcome"] == "completed"
        assert there.call("wait")["outcome"] == "completed"
        assert there.call("ticked")["felt_downtime"] > 0
        assert pair.running() == [there.role]
        here, there = there, here
    proof = pair.source.call("verify")
    assert proof["holds"], proof["text"]
    assert pair.violations() == []
    assert pair.source.call("report")["generation"] == 2


def test_damage_in_another_process_is_told(pair):
    pair.source.call("boot")
    with open(f"{pair.directory}/serial.log", "ab") as log:
        log.write(b"not a line\n")
    pair.source.call("stop")
    proof = pair.source.call("verify")
    assert not proof["holds"]
    assert "of the serial log is damaged" in proof["text"]


def test_a_refusal_comes_as_an_error_with_its_type(pair):
    with pytest.raises(AppError) as caught:
        pair.source.call("migrate", uri="nothing-like-a-uri")
    assert caught.value.type == "UriError"
    with pytest.raises(AppError, match="starts the machine while source-"):
        pair.source.call("start")
        pair.destination.call("start")
    assert len(pair.violations()) == 1


def test_a_killed_app_is_gone_for_everybody_who_waits(pair):
    answer = pair.source.ask("wait_nothing_such")
    with pytest.raises(AppError):
        answer()
    pair.source.call("boot")
    waiting = pair.source.ask("ticked", timeout=50)
    waiting()
    pair.source.kill()
    with pytest.raises(AppGone, match="source ended before it answered report"):
        pair.source.call("report")
    with pytest.raises(AppGone):
        pair.source.wait_event(lambda event: False)
    assert pair.running() == []
    assert pair.violations() == []


def test_they_end_with_who_controls_them(pair):
    pair.source.call("boot")
    processes = [pair.source._process, pair.destination._process]
    pair.close()
    assert [process.returncode for process in processes] == [0, 0]
