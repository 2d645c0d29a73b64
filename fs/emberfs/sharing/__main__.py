"""The server of a store, as a process: `python -m emberfs.sharing DIRECTORY LOCK`, started by `starting.NewServer`.

LOCK is the number of the open lock file that it inherits. Orders come on standard input, answers go to standard output.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec

from ..embedded import StoreConfig
from ..messages import Done
from ..portal import Portal
from ..runtime import AsyncioRuntime
from ..stop import Stop
from ..transport.codec import encode_failure
from .ownership import Ownership
from .server import SharingServer
from .starting import Answer, Order

log = logging.getLogger("emberline.sharing")


def main() -> None:
    """From the first line of the order to the last client."""
    directory, lock_file = Path(sys.argv[1]), int(sys.argv[2])
    if os.fork():
        os._exit(0)  # Whoever started us needs no child to look after.
    logging.basicConfig(format=f"%(asctime)s {os.getpid()} %(levelname)s %(message)s", level=logging.INFO)
    _say(Answer())
    line = sys.stdin.buffer.readline()
    if not line:
        return
    ownership = Ownership.inherited(directory, lock_file)
    runtime = AsyncioRuntime()
    try:
        _serve(ownership, runtime, msgspec.json.decode(line, type=Order))
    except Exception:
        log.exception("the server of %s ends", directory)
        raise SystemExit(1) from None
    finally:
        runtime.stop()
        ownership.close()


def _serve(ownership: Ownership, runtime: AsyncioRuntime, order: Order) -> None:
    portal = Portal(runtime)
    stop = Stop()
    server = SharingServer(ownership, runtime, msgspec.json.decode(order.settings, type=StoreConfig), on_idle=stop.set)
    try:
        portal.run(server.start(order.left))
    except Exception as error:
        _say(Answer(failure=encode_failure(error, Done())))
        raise
    _say(Answer(serves=True))
    _let_go_of_starter()
    log.info("serving %s", ownership.directory)
    while not stop.wait(3600.0):
        pass
    log.info("leaving %s", ownership.directory)
    portal.run(server.close())


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def _let_go_of_starter() -> None:
    """It reads no further, and may end before us."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    main()
