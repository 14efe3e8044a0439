"""When requests are sent."""

import math
import random


def offsets(num: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds from the start, ascending, for `num` requests.

    Gaps are gamma distributed with shape `burstiness`: 1 = Poisson, less = burstier, more = more
    even. As in vLLM all are then scaled so that the last comes at `num` / `rate`, which makes the
    rate that of this run and not only of its mean. An infinite rate is everything at once.
    """
    if math.isinf(rate):
        return [0.0] * num
    at, times = 0.0, []
    for _ in range(num):
        at += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
        times.append(at)
    scale = num / rate / at if at > 0 else 1.0
    return [time * scale for time in times]
