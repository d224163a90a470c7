"""The estimate: figures as QEMU gives them, from a model of a migration that knows when it will end."""

import pytest
from hypothesis import given, settings, strategies as st

from whimbrel_cli.progress import Estimator, outlook

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


COUNT = st.integers(0, 1 << 45)


@st.composite
def answers(draw):
    """What a monitor may answer, in any order: figures that no model would give, members that come and go."""
    answer = {
        "status": draw(
            st.sampled_from(["setup", "active", "device", "postcopy-active", "cancelling"])
        )
    }
    for member in ("total-time", "expected-downtime"):
        if draw(st.booleans()):
            answer[member] = draw(st.integers(0, 1 << 40))
    if draw(st.integers(0, 5)):
        names = ("total", "remaining", "transferred", "normal", "duplicate", "dirty-pages-rate")
        answer["ram"] = {name: draw(COUNT) for name in names}
        answer["ram"]["dirty-sync-count"] = draw(st.integers(0, 9))
    if draw(st.booleans()):
        total = draw(COUNT)
        answer["disk"] = {"total": total, "remaining": draw(st.integers(0, total))}
    return answer


@given(st.lists(st.tuples(answers(), st.floats(0, 30)), max_size=30))
@settings(deadline=None, max_examples=300)
def test_whatever_is_answered_the_figures_make_sense(sequence):
    estimator, now, before = Estimator(), 0.0, 0.0
    for answer, step in sequence:
        now += step
        reading = estimator.feed(answer, now)
        assert before <= reading.fraction <= 0.99
        before = reading.fraction
        assert (reading.eta is None) == (reading.eta_range is None)
        if reading.eta_range is not None:
            low, high = reading.eta_range
            assert 0 <= low <= reading.eta <= high
        assert reading.excess is None or reading.excess >= 0.95
        assert 0 <= estimator.stalled_for(now) <= now


def test_one_who_looks_in_late_is_not_told_that_it_is_nearly_done():
    """Before there is a rate, nobody knows how much will come again."""
    late = [
        {
            "status": "active",
            "ram": {
                "page-size": PAGE,
                "total": 20_000 * PAGE,
                "remaining": (4000 - 250 * i) * PAGE,
                "normal": 100_000 + 250 * i,
                "transferred": 1,
                "dirty-sync-count": 7,
                "dirty-pages-rate": 1000,
            },
        }
        for i in range(10)
    ]
    estimator = Estimator()
    seen = [estimator.feed(answer, i / 4) for i, answer in enumerate(late)]
    assert {r.fraction for r in seen} == {0.0}
    assert seen[-1].excess == pytest.approx(1.0)


def test_passes_that_begin_with_less_and_less_are_progress():
    """Each longer than the patience that one without progress gets, and each ending with next to nothing left."""
    estimator, now = Estimator(), 0.0
    for number, size in enumerate([1000, 500, 250, 125], start=1):
        for left in range(size, 0, -1):
            ram = {"dirty-sync-count": number, "remaining": left * PAGE, "total": 1000 * PAGE}
            estimator.feed({"status": "active", "ram": ram}, now)
            assert estimator.stalled_for(now) < 1
            now += 0.1


def test_a_link_that_hangs_in_the_first_pass_is_a_stall():
    estimator = Estimator()
    ram = {"dirty-sync-count": 1, "remaining": 10 * PAGE, "total": 1000 * PAGE}
    for now in range(20):
        estimator.feed({"status": "active", "ram": ram}, float(now))
    assert estimator.stalled_for(19.0) == 19


def test_disks_are_work_like_memory():
    """Block migration sends them before the first page of memory."""
    ram = {"total": 100 * PAGE, "remaining": 100 * PAGE, "dirty-sync-count": 1}
    estimator = Estimator()
    for tick in range(5):
        disk = {"total": 100 * PAGE, "remaining": (100 - 20 * tick) * PAGE}
        reading = estimator.feed({"status": "active", "ram": ram, "disk": disk}, float(tick))
    assert (reading.remaining, reading.total) == (120 * PAGE, 200 * PAGE)
    assert reading.throughput == 20 * PAGE
    assert reading.fraction == pytest.approx(80 / (200 + 10))
    assert reading.eta == pytest.approx((120 + 10) / 20)
    reading = estimator.feed({"status": "completed", "ram": {**ram, "remaining": 0}}, 5.0)
    assert (reading.disk.remaining, reading.disk.total, reading.fraction) == (0, 100 * PAGE, 1)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_switchover_is_forecast_and_the_downtime_within_its_limit(share):
    seen = list(readings(model(total=20_000, rate=1000, dirty=1000 * share)))
    end = seen[-1][0]
    later = [(now, r) for now, r in seen if r.number >= 2 and r.switchover is not None]
    assert later
    for _, r in later:
        assert r.switchover + r.downtime == pytest.approx(r.eta)
        assert 0 <= r.downtime <= 0.3
    near = [abs(r.switchover - (end - now)) < 0.15 * (end - now) + 1 for now, r in later]
    assert sum(near) > 0.8 * len(near)


def single(share, number=4, **changes):
    """One answer: 8 MiB left, 16 MiB/s sent, that share of it written."""
    ram = {
        "page-size": PAGE,
        "total": 64 << 20,
        "remaining": 8 << 20,
        "mbps": 16 * 1.048576 * 8,
        "dirty-sync-count": number,
        "dirty-pages-rate": int(4096 * share),
    }
    return {"status": "active", "expected-downtime": 900, "ram": ram, **changes}


def test_one_look_is_enough_for_an_outlook():
    """0.5 s for what is left, then a quarter of it: 0.125 s, which is less than 0.3."""
    found = outlook(single(0.25), 0.3)
    assert found.switchover == pytest.approx(0.5)
    assert found.downtime == pytest.approx(0.125)
    assert found.excess == pytest.approx(0.25)


@pytest.mark.parametrize("share", [0.97, 1.4])
def test_an_outlook_of_one_that_does_not_converge(share):
    found = outlook(single(share), 0.3)
    assert found.switchover is None
    assert found.excess == pytest.approx(share, abs=0.04)
    assert found.downtime == 0.9


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"status": "setup"},
        single(0.5, number=1),
        single(1.4, number=2),
        single(0.5, status="completed"),
        single(0.5, ram={"dirty-sync-count": 5, "mbps": -1, "remaining": 5}),
    ],
)
def test_no_outlook_before_anything_is_known(answer):
    assert outlook(answer, 0.3) is None
