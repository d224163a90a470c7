"""The level follows what the sender waits for. No clock: the seconds are given."""

from whimbrel_zstd.pace import PATIENCE, START, STEPS, WINDOW, Pace

SIZE = 1 << 20


def windows(pace, number, held_up, ratio=2.0):
    """So many windows in which the link took this part of the time; the levels after each."""
    levels = []
    for _ in range(number):
        pace.account(WINDOW * (1 - held_up), WINDOW * held_up * 1.01, SIZE, round(SIZE / ratio))
        levels.append(pace.level)
    return levels


def test_a_slow_link_raises_it_step_by_step_to_the_hardest():
    assert windows(Pace(), 15, 0.9) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 12, 12, 12]


def test_a_fast_link_lowers_it_to_the_easiest():
    assert windows(Pace(), 6, 0.05) == [-1, -3, -5, -7, -7, -7]


def test_where_both_take_their_time_it_stays():
    assert set(windows(Pace(), 10, 0.3)) == {START}


def test_what_does_not_get_smaller_is_not_compressed_harder():
    pace = Pace()
    assert windows(pace, 2, 0.1) == [-1, -3]
    assert windows(pace, 2 + PATIENCE, 0.9, ratio=1.05)[-1] == START, (
        "below it nothing is known yet"
    )


def test_less_than_a_window_decides_nothing():
    pace = Pace()
    for _ in range(9):
        pace.account(0, WINDOW / 10, SIZE, SIZE // 2)
        assert pace.level == START
    pace.account(0, WINDOW / 5, SIZE, SIZE // 2)
    assert pace.level > START


def test_a_level_that_was_too_slow_is_left_alone_for_a_while():
    pace = Pace()
    assert windows(pace, 2, 0.9) == [2, 3]
    assert windows(pace, 1, 0.1) == [2]
    levels = windows(pace, PATIENCE + 1, 0.9)
    assert levels[: PATIENCE - 1] == [2] * (PATIENCE - 1)
    assert levels[PATIENCE] > 2


def test_levels_that_were_left_before_the_link_was_full_are_tried_again_at_once():
    pace = Pace()
    assert windows(pace, 3, 0.1) == [-1, -3, -5]
    assert windows(pace, 5, 0.9) == [-3, -1, 1, 2, 3]


def test_it_never_leaves_the_steps():
    pace = Pace()
    for n in range(200):
        assert set(windows(pace, 1, (n * 37 % 100) / 100)) <= set(STEPS)
