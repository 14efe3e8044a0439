import logging

import pytest

from baton.gateway.backend import Disaggregation, PrefillPath
from baton.gateway.handovers import NUM_SUSPICIOUS, HandOverWatch


@pytest.fixture
def watch() -> HandOverWatch:
    made = HandOverWatch()
    made.fleet_changed(has_pair=True)
    return made


def test_without_a_pair_nothing_is_expected() -> None:
    watch = HandOverWatch()
    for _ in range(2 * NUM_SUSPICIOUS):
        watch.served(PrefillPath.LOCAL)
    view = watch.view()
    assert view.state is Disaggregation.NOT_EXPECTED
    assert (view.num_remote_prefills, view.num_local_prefills) == (0, 2 * NUM_SUSPICIOUS)


def test_a_hand_over_is_a_sign_of_life(watch: HandOverWatch) -> None:
    assert watch.view().state is Disaggregation.UNKNOWN
    watch.served(PrefillPath.NONE)
    assert watch.view().state is Disaggregation.UNKNOWN
    watch.served(PrefillPath.REMOTE)
    watch.served(PrefillPath.LOCAL)
    assert watch.view().state is Disaggregation.HAPPENING


def test_many_requests_without_one_are_warned_of_once_until_it_happens(
    watch: HandOverWatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> int:
        return sum(record.levelno == logging.WARNING for record in caplog.records)

    watch.served(PrefillPath.REMOTE)
    for _ in range(NUM_SUSPICIOUS - 1):
        watch.served(PrefillPath.LOCAL)
    assert (watch.view().state, warnings()) == (Disaggregation.HAPPENING, 0)
    for _ in range(2 * NUM_SUSPICIOUS):
        watch.served(PrefillPath.LOCAL)
    assert (watch.view().state, warnings()) == (Disaggregation.MISSING, 1)
    watch.served(PrefillPath.REMOTE)
    assert watch.view().state is Disaggregation.HAPPENING
    for _ in range(NUM_SUSPICIOUS):
        watch.served(PrefillPath.LOCAL)
    assert warnings() == 2


def test_a_pair_that_comes_back_starts_anew(watch: HandOverWatch) -> None:
    for _ in range(NUM_SUSPICIOUS):
        watch.served(PrefillPath.LOCAL)
    watch.fleet_changed(has_pair=False)
    assert watch.view().state is Disaggregation.NOT_EXPECTED
    watch.fleet_changed(has_pair=True)
    assert watch.view().state is Disaggregation.UNKNOWN
