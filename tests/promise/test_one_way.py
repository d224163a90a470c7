"""Without a way back completed means that every byte was accepted, and says so; nobody guesses beyond that."""

from whimbrel_testing.pacing import Direction, Link, Trigger

VMDESCRIPTION = b'{"page_size"'


def test_a_command_that_took_everything_and_then_failed_may_have_passed_it_on(world):
    world.source.call("migrate", uri="exec:cat > /dev/null; exit 3")
    result = world.ends(world.source, "unknown", "OutcomeUnknown")
    assert "status 3" in result["error"]["message"]
    world.runs_nowhere()
    world.source.call("resolve", run_here=True)
    world.runs_only_at(world.source)


def test_a_command_that_ends_early_leaves_the_machine_at_the_source(world):
    world.source.call("migrate", uri="exec:head -c 100000 > /dev/null")
    world.ends(world.source, "failed")
    world.runs_only_at(world.source)


def test_into_a_file_and_out_of_it_again(world, tmp_path):
    file = tmp_path / "machine"
    world.source.call("migrate", uri=f"exec:cat > {file}")
    assert not world.ends(world.source, "completed")["acknowledged"]
    world.runs_nowhere()
    assert world.source.call("query")["x-acknowledged"] is False
    world.destination.call("incoming", uri=f"exec:cat {file}")
    world.ends(world.destination, "completed")
    world.runs_only_at(world.destination)


def test_half_a_file_never_starts(world, tmp_path):
    file = tmp_path / "machine"
    world.source.call("migrate", uri=f"exec:cat > {file}")
    world.ends(world.source, "completed")
    data = file.read_bytes()
    for size in (
        0,
        3,
        1000,
        len(data) // 2,
        data.rindex(VMDESCRIPTION) - 6,
    ):  # the last: all but EOF
        file.write_bytes(data[:size])
        world.destination.call("incoming", uri=f"exec:cat {file}")
        world.ends(world.destination, "failed")
        world.runs_nowhere()
    file.write_bytes(data)
    world.destination.call("incoming", uri=f"exec:cat {file}")
    world.ends(world.destination, "completed")
    world.runs_only_at(world.destination)


def test_a_link_that_ends_without_an_answer_being_possible_is_no_proof(world):
    """return-path=off on a direct connection: the destination closes when it runs the machine, and when it died."""
    world.source.call("set", **{"return-path": False})
    trigger = Trigger(Direction.FORWARD, VMDESCRIPTION, do=Link.reset)
    with world.go(triggers=[trigger], direct=True):
        result = world.source.call("wait", timeout=20)
        world.ends(world.destination, "completed")
    # The last bytes were accepted, or lost on the way: either way it is not here that the machine runs.
    assert result["outcome"] in ("completed", "unknown"), result
    world.runs_only_at(world.destination)
