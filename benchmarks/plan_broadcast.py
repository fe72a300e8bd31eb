"""The latency of sending a step's plan to the other tensor-parallel ranks: from rank 0's broadcast until the last rank
has unpacked the batch and could copy it to its device.

    python benchmarks/plan_broadcast.py --sequences 64 --ranks 3 --context 4096

Real processes and the engine's own channel; batches of one row and of five rows for each sequence, with block tables
for that much context. All processes are on this machine, so that one clock times both ends. There is no model: between
two plans nothing runs. "packing" is rank 0's work before, for itself and for the others alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import zmq

from pilotfish.engine.execution.batch import Span, pack
from pilotfish.engine.ranks.channel import PassChannel, PassReader
from pilotfish.engine.ranks.wire import Welcome

BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3, help="those that the plan is given to, beside rank 0")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096, help="tokens of each sequence")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--interval", type=float, default=0.01, help="seconds between two plans")
    parser.add_argument("--listen", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.listen:
        _listen(*args.listen)
        return
    for rows in (1, 5):
        _measure(args, rows)


def _measure(args: argparse.Namespace, rows: int) -> None:
    spans = _spans(args.sequences, args.context, rows)
    with tempfile.TemporaryDirectory(prefix="pilotfish-") as directory:
        channel = PassChannel(f"ipc://{directory}/passes")
        done: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        done.bind(f"ipc://{directory}/done")
        command = [sys.executable, __file__, "--listen", directory, channel.key.hex()]
        listeners = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(args.ranks)]
        try:
            channel.wait_for(args.ranks, lambda: None)
            packing, given, sending = [], [], []
            for number in range(1, args.steps + 1):
                time.sleep(args.interval)
                start = time.perf_counter()
                host = pack(spans, BLOCK_SIZE)
                packed = time.perf_counter()
                channel.broadcast(0, number, host)
                sent = time.perf_counter()
                heard = [json.loads(done.recv()) for _ in listeners]
                assert all(report["rows"] == len(spans) * rows and report["number"] == number for report in heard)
                packing.append(packed - start)
                sending.append(sent - packed)
                given.append(max(report["time"] for report in heard) - packed)
        finally:
            for listener in listeners:
                listener.terminate()
                listener.wait()
            channel.close()
            done.close(linger=0)
    size = f"{host.buffer.nbytes:,} bytes"
    print(f"{args.sequences} sequences of {args.context} tokens, {rows} row(s) each, to {args.ranks} ranks: {size}")
    for what, seconds in (("packing", packing), ("in the call that sends", sending), ("until the last has it", given)):
        found = sorted(1000 * each for each in seconds)
        p99 = found[int(0.99 * (len(found) - 1))]
        print(f"  {what:24} least {found[0]:.3f}  median {statistics.median(found):.3f}  p99 {p99:.3f} ms")


def _spans(sequences: int, context: int, rows: int) -> list[Span]:
    blocks = -(-context // BLOCK_SIZE)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(sequences)]
    return [Span(list(range(rows)), context - rows, table, logit_rows=rows) for table in tables]


def _listen(directory: str, key: str) -> None:
    """Receive plans as a rank does, and report when each was unpacked."""
    welcome = Welcome(bytes.fromhex(key), f"ipc://{directory}/passes", "", 0)
    done: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    done.connect(f"ipc://{directory}/done")
    reader = PassReader(welcome)
    while True:
        header, host = reader.next_pass(BLOCK_SIZE)
        now = time.perf_counter()
        done.send(json.dumps({"number": header.number, "rows": host.shape.rows, "time": now}).encode())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
