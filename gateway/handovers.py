"""Does disaggregation really happen? A fleet with both roles in which every request is prefilled
where it decodes looks healthy and is not what was set up.

A pure counter; the gateway tells it how each request ended and who is up.
"""

import logging

from baton.gateway.backend import Disaggregation, HandOvers, PrefillPath

log = logging.getLogger(__name__)

NUM_SUSPICIOUS = 50  # requests in a row without a hand-over


class HandOverWatch:
    """Tell it of every request of a client that got tokens."""

    def __init__(self) -> None:
        self._num_remote = 0
        self._num_local = 0
        self._num_in_a_row = 0  # local ones, while a pair was up
        self._has_pair = False
        self._was_remote = False  # since a pair is up

    def fleet_changed(self, has_pair: bool) -> None:
        """has_pair: a prefill worker and another worker that may decode for it are up."""
        if has_pair != self._has_pair:
            self._has_pair = has_pair
            self._num_in_a_row, self._was_remote = 0, False

    def served(self, path: PrefillPath) -> None:
        if path is PrefillPath.REMOTE:
            self._num_remote += 1
            self._num_in_a_row, self._was_remote = 0, True
        elif path is PrefillPath.LOCAL:
            self._num_local += 1
            self._num_in_a_row += self._has_pair
            if self._num_in_a_row == NUM_SUSPICIOUS:
                log.warning(
                    "no hand-over in the last %d requests, though prefill and decode workers are "
                    "up: all were prefilled where they decode",
                    NUM_SUSPICIOUS,
                )

    def view(self) -> HandOvers:
        return HandOvers(self._state(), self._num_remote, self._num_local)

    def _state(self) -> Disaggregation:
        if not self._has_pair:
            return Disaggregation.NOT_EXPECTED
        if self._num_in_a_row >= NUM_SUSPICIOUS:
            return Disaggregation.MISSING
        return Disaggregation.HAPPENING if self._was_remote else Disaggregation.UNKNOWN
