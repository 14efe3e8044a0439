"""Replay one schedule with its trace, or search many for a failure.

python -m tests.sim --seed 17
python -m tests.sim --count 10000 --jobs 2
"""

import argparse
import sys
import time
import traceback

from tests.sim.fleet import SimFleet
from tests.sim.plan import RESTLESS
from tests.sim.search import search


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one, with its trace")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--restless", action="store_true", help="requests move all the time")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    plan = RESTLESS if args.restless else None
    if args.seed is not None:
        try:
            stats = SimFleet(args.seed, plan, trace=print).run()
        except AssertionError:
            traceback.print_exc(file=sys.stdout)
            return 1
        print(stats)
        return 0
    started = time.monotonic()
    result = search(range(args.first, args.first + args.count), args.jobs, plan)
    print(f"{args.count} schedules in {time.monotonic() - started:.1f} s")
    print(result.stats)
    for seed, error in result.failures[:20]:
        print(f"seed {seed}: {error}")
    print(f"{len(result.failures)} failures")
    return 1 if result.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
