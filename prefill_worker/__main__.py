"""`python -m baton.prefill_worker` = `baton prefill-worker`."""

from baton.cli import prefill_worker

if __name__ == "__main__":
    prefill_worker(prog_name="baton prefill-worker")
