"""A group of checks in a process of its own: `python -m pilotfish.tools.selftest`, started by `tools.selftest.run`."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

import msgspec

from pilotfish.errors import ConfigError, ModelError
from pilotfish.tools.selftest.run import ENVIRONMENT, RESTART, Described, Done, Ended, Launch, Message, Refused, Started


def main() -> int:
    # What libraries print is no message: it goes to standard error.
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    faulthandler.enable()
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    encoder = msgspec.json.Encoder()

    def send(message: Message) -> None:
        messages.write(encoder.encode(message) + b"\n")
        messages.flush()

    # Imported here: a crash on import, of a CUDA library say, is then told like any other.
    from pilotfish.tools.selftest.environment import read_environment
    from pilotfish.tools.selftest.groups import device_is_lost, run_group
    from pilotfish.tools.selftest.subject import Subject

    try:
        if launch.group == ENVIRONMENT:
            subject = Subject(launch.job)
            subject.check()
            send(Described(read_environment(subject.platform)))
            send(Ended())
            return 0
        for result in run_group(launch.job, launch.group, launch.done, lambda name: send(Started(name))):
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
