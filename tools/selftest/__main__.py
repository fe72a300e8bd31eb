"""The process of one group of checks: `python -m pilotfish.tools.selftest`, started by `tools.selftest.run`."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

import msgspec

from pilotfish.errors import ConfigError, ModelError
from pilotfish.tools.selftest.run import (
    ENVIRONMENT,
    RESTART,
    Described,
    Done,
    Ended,
    GroupRun,
    Message,
    Refused,
    Started,
)


def main() -> int:
    # Anything that libraries print goes to standard error, so that standard output has messages alone.
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    faulthandler.enable()
    run = msgspec.json.decode(sys.stdin.buffer.readline(), type=GroupRun)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    encoder = msgspec.json.Encoder()

    def send(message: Message) -> None:
        messages.write(encoder.encode(message) + b"\n")
        messages.flush()

    # Imported here, so that a crash on import, of a CUDA library say, is reported like any other.
    from pilotfish.tools.selftest.groups import describe_here, device_is_lost, run_group

    try:
        if run.group == ENVIRONMENT:
            send(Described(describe_here(run.test)))
            send(Ended())
            return 0
        for result in run_group(run.test, run.group, run.done, lambda name: send(Started(name))):
            send(Done(result))
            if result.verdict == "failed" and device_is_lost():
                return RESTART
    except (ConfigError, ModelError) as error:
        send(Refused(str(error), isinstance(error, ConfigError)))
    send(Ended())
    return 0


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
