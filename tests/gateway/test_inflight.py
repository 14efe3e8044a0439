"""When a refused client should come back."""

from baton.errors import BatonError, Cause
from baton.gateway.inflight import InFlight


class Answer:
    error: BatonError | None = None

    def fail(self, error: BatonError) -> None:
        self.error = error


def test_at_the_rate_at_which_answers_end() -> None:
    inflight = InFlight()
    answers = [Answer() for _ in range(40)]
    for answer in answers:
        inflight.begin(answer)
    assert inflight.retry_after_s(Cause.OVERLOADED, 0) == 1, "nothing is known yet"
    for number, answer in enumerate(answers[:20]):
        inflight.end(answer, now_s=2.0 * number)
        inflight.end(answer, now_s=99.0)  # counts once
    assert len(inflight) == 20
    assert inflight.retry_after_s(Cause.OVERLOADED, 40) == 20  # ten of them, each after 2 s
    for number, answer in enumerate(answers[20:39]):
        inflight.end(answer, now_s=40 + 0.1 * number)
    assert inflight.retry_after_s(Cause.NO_ROOM, 60) == 1


def test_idle_time_is_no_rate() -> None:
    inflight = InFlight()
    for start_s in (0.0, 1000.0):
        answers = [Answer() for _ in range(10)]
        for answer in answers:
            inflight.begin(answer)
        for number, answer in enumerate(answers[:9]):
            inflight.end(answer, start_s + number)
        assert inflight.retry_after_s(Cause.OVERLOADED, start_s + 10) == 1
        inflight.end(answers[9], start_s + 9)


def test_when_no_worker_is_up_as_long_as_it_has_lasted() -> None:
    inflight = InFlight()
    waits = [inflight.retry_after_s(Cause.NO_WORKER, now_s) for now_s in (100, 105, 130, 999)]
    assert waits == [1, 5, 30, 60]
    answer = Answer()
    inflight.begin(answer)
    inflight.end(answer, 1000)
    assert inflight.retry_after_s(Cause.NO_WORKER, 1001) == 1


def test_while_draining_until_it_is_over() -> None:
    inflight = InFlight()
    inflight.drains_until(30)
    assert inflight.retry_after_s(Cause.DRAINING, 10) == 20
    assert inflight.retry_after_s(Cause.DRAINING, 31) == 1


def test_all_fail_together() -> None:
    inflight, answers = InFlight(), [Answer(), Answer()]
    for answer in answers:
        inflight.begin(answer)
    error = BatonError(Cause.DRAINING, "over")
    inflight.fail_all(error)
    assert [answer.error for answer in answers] == [error, error]
