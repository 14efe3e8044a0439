"""`python -m baton.decode_worker` = `baton decode-worker`."""

from baton.cli import decode_worker

if __name__ == "__main__":
    decode_worker(prog_name="baton decode-worker")
