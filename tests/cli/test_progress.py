"""The estimate: figures as QEMU gives them, from a model of a migration that knows when it will end."""

import pytest
from hypothesis import given, settings, strategies as st

from whimbrel_cli.progress import Estimator

PAGE = 4096
TICK = 0.1
STEPS = 20  # of the model in one tick


def model(*, total, rate, dirty, downtime=0.3):
    """query-migrate every TICK seconds of a precopy: `total` pages, sent and written at pages/s. Ends with completed."""
    sent, number, left, fresh, seen = 0.0, 1, float(total), 0.0, 0
    while True:
        yield {
            "status": "active",
            "ram": {
                "page-size": PAGE,
                "total": total * PAGE,
                "remaining": int(left) * PAGE,
                "normal": int(sent),
                "duplicate": 0,
                "transferred": int(sent) * PAGE,
                "dirty-sync-count": number,
                "dirty-pages-rate": seen,
            },
        }
        for _ in range(STEPS):
            step = min(left, rate * TICK / STEPS)
            sent, left = sent + step, left - step
            fresh = min(total, fresh + dirty * TICK / STEPS)
            if left <= 0 and fresh <= rate * downtime:
                yield {"status": "completed", "total-time": 1, "ram": {}}
                return
            if left <= 0:
                left, fresh, number, seen = fresh, 0.0, number + 1, int(dirty)


def readings(answers, limit=4000):
    estimator = Estimator()
    for tick, answer in zip(range(limit), answers, strict=False):
        yield tick * TICK, estimator.feed(answer, tick * TICK)


@given(
    total=st.integers(100, 50_000),
    rate=st.integers(50, 20_000),
    share=st.floats(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_the_bar_never_runs_backwards_and_is_full_at_the_end_only(total, rate, share):
    before = 0.0
    for _, reading in readings(model(total=total, rate=rate, dirty=rate * share), limit=600):
        assert before <= reading.fraction <= 1
        assert (reading.fraction == 1) == (reading.status == "completed")
        before = reading.fraction


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_end_lies_in_the_range_once_the_dirty_rate_is_known(share):
    seen = list(readings(model(total=20_000, rate=1000, dirty=1000 * share)))
    end = seen[-1][0]
    later = [(now, r) for now, r in seen if r.number >= 2 and r.eta_range and r.remaining]
    assert later
    inside = [r.eta_range[0] <= end - now <= r.eta_range[1] for now, r in later]
    assert sum(inside) > 0.8 * len(inside)


def test_re_dirtied_memory_counts_as_work_to_come():
    """20 ticks, 2 s, into the second pass: what is left and what was written meanwhile, over 1 - r."""
    calm, busy = (
        [r for _, r in readings(model(total=20_000, rate=1000, dirty=d)) if r.number == 2]
        for d in (400, 700)
    )
    assert calm[20].eta == pytest.approx(
        (calm[20].remaining / PAGE + 400 * 2 - 400 * 0.3) / 1000 / 0.6, rel=0.1
    )
    assert busy[20].eta == pytest.approx(
        (busy[20].remaining / PAGE + 700 * 2 - 700 * 0.3) / 1000 / 0.3, rel=0.1
    )


def test_a_machine_that_writes_faster_than_it_is_sent_has_no_end_and_a_factor():
    *_, (_, last) = readings(model(total=20_000, rate=1000, dirty=2500), limit=1500)
    assert last.excess == pytest.approx(2.5, rel=0.05)
    assert last.eta is None
    assert last.fraction < 1


def test_no_factor_for_one_that_converges():
    assert all(r.excess is None for _, r in readings(model(total=20_000, rate=1000, dirty=850)))


def test_a_stall_is_since_less_was_left_than_ever():
    estimator = Estimator()
    for tick, answer in zip(range(1500), model(total=20_000, rate=1000, dirty=2500), strict=False):
        estimator.feed(answer, tick * TICK)
    assert estimator.stalled_for(1500 * TICK) == pytest.approx(1500 * TICK - 40, abs=25)


def test_an_answer_without_figures_is_a_reading_too():
    reading = Estimator().feed({"status": "setup"}, 0.0)
    assert (reading.status, reading.total, reading.eta, reading.fraction) == ("setup", 0, None, 0)
