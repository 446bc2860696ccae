"""A worker's process for tests: one lifeline, and commands on stdin, each answered by a line.

hold SESSION   use the arena           write TEXT     put text at its start
read BYTES     read from its start     close          close the lifeline, and stay
fork           start a child that outlives us and does nothing; it answers itself, with its process id
"""

import os
import signal
import sys

from saltern.client.lifeline import Lifeline, Mapping


def main() -> None:
    """Attach and obey until stdin ends."""
    path, name, *rest = sys.argv[1:]
    lifeline = Lifeline(
        path, engine="engine", name=bytes.fromhex(name), rank=0, world_size=1, outlives_socket="outlives" in rest
    )
    lifeline.start()
    mapping: Mapping | None = None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        answer = "ok"
        if command == "hold":
            mapping = lifeline.hold(bytes.fromhex(argument), timeout=30.0)
            answer = "ok" if mapping else "none"
        elif command == "fork":
            if os.fork():
                continue
            print(os.getpid(), flush=True)
            signal.pause()
        elif command == "close":
            if mapping:
                mapping.release()
            lifeline.close()
        elif mapping is not None and command == "write":
            mapping.buffer[: len(argument)] = argument.encode()
        elif mapping is not None and command == "read":
            answer = bytes(mapping.buffer[: int(argument)]).decode()
        else:
            answer = f"what is {line!r}?"
        print(answer, flush=True)


if __name__ == "__main__":
    main()
