"""What may happen in a schedule, and what did."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stats:
    """What a run exercised."""

    num_imports: int = 0
    num_prefixes: int = 0  # fetched by hash, at least in part
    num_bytes: int = 0
    num_early_frames: int = 0  # of layers whose step was still running
    num_failed_fetches: int = 0
    num_breaks: int = 0  # crashes, cuts and pauses: each may look like the loss of a worker
    num_corrupted: int = 0
    num_events: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    migrations: Counter[str] = field(default_factory=Counter)
    leases: Counter[str] = field(default_factory=Counter)  # events, as metrics count them
    num_migrated_bytes: int = 0
    num_strikes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What may happen in a schedule.

    is_calm: nothing breaks, there is room, nobody gives up; then it is known exactly which way
    each request takes and how much is computed for it (`SimFleet.check_economy`).
    is_restless: whoever can move to another decode worker does, again and again.
    move_strike: (message, "source" | "target", "crash" | "cut" | "pause"): what happens to the
    worker that a request leaves, or goes to, at the first such message about its migration.
    """

    is_calm: bool = False
    is_restless: bool = False
    move_strike: tuple[str, str, str] | None = None
    num_corrupt: int = 0  # frames to corrupt in any case
    strike: tuple[str, str] | None = None  # (step, "crash" or "pause"): whoever passes it first
    fault_window_ms: float = 150.0


# Where `strike` may be: messages that a worker or a gateway gets or is about to send, and a fetch's
# steps.
_MESSAGES = (
    *("Submit", "Bind", "Rebind", "ComputeLocally", "Abort", "Release"),
    *("Queued", "Admitted", "Progress", "NoRoom", "Bound", "Imported", "KvFailed", "LeaseLost"),
    "TokenChunk",
)
STEPS = (
    *_MESSAGES,
    *("attach", "frame sent", "frame", "fetched"),
    *(f"gateway {name}" for name in _MESSAGES),
)
DISTURBANCES = ("flip", "truncate", "lose", "duplicate", "swap", "replay")
RESTLESS = Plan(is_restless=True)
CALM = Plan(is_calm=True, fault_window_ms=0.0)
