"""Child processes of the server: started clean, tied to it by one inherited socket.

module name -> `Child`: the process and the `Link` to it.
"""

import asyncio
import ctypes
import gc
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashformer.serve.server.wire import Channel, Link, Message

_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Child:
    """A running child. Its socket is the only way to it, and its end is the end of the socket."""

    process: subprocess.Popen[bytes]
    link: Link

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self.process.pid

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self.link.close()
        if self.process.poll() is None:
            self.process.kill()

    async def reap(self) -> int:
        """Its exit status, after it has ended."""
        while (status := self.process.poll()) is None:
            await asyncio.sleep(0.005)
        return status


async def start_child(
    module: str,
    arguments: Sequence[str],
    on_message: Callable[[Message], None],
    on_lost: Callable[[], None],
) -> Child:
    """Run `python -m module FD ARGUMENTS` with one end of a new socket pair as FD.

    To be called in the main thread: the child dies with the thread that started it.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        # A new session: Ctrl-C on the terminal reaches the server alone, which then ends the child.
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), *arguments],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    loop = asyncio.get_running_loop()
    _, link = await loop.create_connection(lambda: Link(on_message, on_lost), sock=ours)
    return Child(process, link)


def open_channel(descriptor: int, wakers: Sequence[int] = ()) -> Channel:
    """In the child: the channel to the parent, with whose end this process ends as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return Channel(socket.socket(fileno=descriptor), wakers)


def return_memory() -> None:
    """Give freed memory back to the system, where the C library would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def settle() -> None:
    """Take what a loaded process holds as there for good, and give the rest back.

    A full search for garbage then looks at the requests since, not at every module and template:
    it takes less than a millisecond of the event loop or a step.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # from which Python counts how much is old
    return_memory()


def limit_memory(nbytes: int) -> None:
    """In the child: let allocations beyond `nbytes` fail instead of filling the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
