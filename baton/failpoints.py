"""Named places where a test may make a process die, stop or fail. Absent unless asked for: an empty
`Failpoints` does nothing, and there is no global one.

    --failpoint bind:2=kill      the second Bind that arrives kills the process
    --failpoint bind:+2=kill     the second one after SIGUSR1: a gateway's own probe of a new route
                                 passes these places too, and is not what a test means
    --failpoint bind:+1=stop,token:+1=stop    the second of them from the second SIGUSR1 on
"""

import logging
import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from baton.errors import BatonError, Cause

log = logging.getLogger(__name__)

_SPEC = re.compile(r"([a-z-]+):(\+?)([1-9][0-9]*)=(kill|stop|error)")

NAMES = frozenset(
    (
        "submit",  # step 3: Submit has arrived
        "admitted",  # step 3: Admitted is about to be sent
        "progress",  # step 3: Progress is about to be sent
        "bind",  # step 4: Bind has arrived
        "bound",  # step 4: Bound is about to be sent
        "attach",  # step 5, P: a fetch was opened
        "frame-sent",  # step 5, P: the consumer has taken a frame
        "frame",  # step 5, D: a frame was verified and written
        "sampled",  # step 6, P: first tokens are about to be sent
        "fetched",  # step 7, D: everything has arrived
        "imported",  # step 7, D: Imported is about to be sent
        "token",  # step 8, D: tokens are about to be sent
        "done",  # step 7, P: the consumer says that it has verified everything
        "release",  # step 8, P: Release has arrived
        "pool",  # pooling workers: a call has arrived
        "pooled",  # pooling workers: it is about to be answered
        "engine-step",  # anywhere: a step is about to run
    )
)


class _Action(StrEnum):
    KILL = "kill"
    STOP = "stop"
    ERROR = "error"


@dataclass(slots=True)
class _Failpoint:
    hits_left: int
    action: _Action
    is_counting: bool


class Failpoints:
    """Those of one process, counted down as they are passed. Not thread-safe beyond the GIL."""

    def __init__(self, specs: Iterable[str] = ()) -> None:
        """
        Args:
            specs: NAME:COUNT=kill|stop|error each, a name once; COUNT counts from 1, with a +
                before it from the call of `count` whose turn it is.

        Raises:
            ValueError: a spec is malformed or names no failpoint.
        """
        self._armed: dict[str, _Failpoint] = {}
        for spec in specs:
            match = _SPEC.fullmatch(spec)
            if match is None or match[1] not in NAMES:
                raise ValueError(f"no failpoint {spec!r}; names: {', '.join(sorted(NAMES))}")
            self._armed[match[1]] = _Failpoint(
                int(match[3]), _Action(match[4]), is_counting=not match[2]
            )

    def __bool__(self) -> bool:
        return bool(self._armed)

    def count(self) -> None:
        """The next failpoint that waits for it counts from now on."""
        failpoint = next((one for one in self._armed.values() if not one.is_counting), None)
        if failpoint is not None:
            failpoint.is_counting = True

    def hit(self, name: str) -> None:
        """
        Raises:
            BatonError: STEP_FAILED, where the failpoint says `error`: a worker fails, so others
                may be asked, and no client gets a 500.
        """
        armed = self._armed.get(name) if self._armed else None
        if armed is None or not armed.is_counting:
            return
        armed.hits_left -= 1
        if armed.hits_left > 0:
            return
        del self._armed[name]
        log.warning("failpoint %s: %s", name, armed.action)
        if armed.action is _Action.ERROR:
            raise BatonError(Cause.STEP_FAILED, f"failpoint {name}")
        os.kill(os.getpid(), signal.SIGKILL if armed.action is _Action.KILL else signal.SIGSTOP)
