import math
import random
from itertools import pairwise
from statistics import mean, pstdev

import pytest

from baton.benchmarks.arrivals import offsets


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 8.0])
def test_the_rate_is_exact_and_gaps_vary_as_asked(burstiness: float) -> None:
    times = offsets(4000, 50.0, burstiness, random.Random(1))
    assert times[-1] == pytest.approx(80.0)
    assert times == sorted(times)
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    # A gamma distribution's coefficient of variation is 1 / √shape.
    assert pstdev(gaps) / mean(gaps) == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


def test_an_infinite_rate_is_at_once() -> None:
    assert offsets(3, float("inf"), 1.0, random.Random(0)) == [0.0, 0.0, 0.0]
