"""How ranks notice that one of them is gone, and end with one message instead of waiting for it forever."""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from tqdm import tqdm

CONSEQUENCE = "all ranks end here, the last checkpoint is whole (d2r train --resume goes on from it)"
MEETING = timedelta(minutes=5)  # between the first rank that is there and the last
TICK = 1.0  # seconds between two signs of life
LOST_AFTER = 15  # ticks of one's own without a sign of another's: a machine that slept slept for both
SURELY_LOST_AFTER = 4  # where a connection has broken as well


def restarts() -> int:
    """How often the launcher has started all ranks anew (`torchrun --max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launcher_keeps_store() -> bool:
    """Whether the store of what ranks know of each other lives in the launcher; without one, in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meeting_place(rank: int | None = None) -> dist.Store:
    """A connection of its own to the store in which ranks meet. rank: of who may be the one that keeps it.

    The launcher's still knows what ranks said before they were started anew. They must not meet those again: some of
    them would wait at addresses that nobody listens at any more.
    """
    keep = rank == 0 and not launcher_keeps_store()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=keep, timeout=MEETING)
    return dist.PrefixStore(f"d2r/{restarts()}", store)


class Watch:
    """A thread that counts up in the launcher's store, and looks whether all others do.

    Ticks are counted, not seconds: a process that was stopped for a while with all others suspects nobody. The store is
    spoken to over a connection of the thread's own, for the main thread may wait in a collective call for as long as
    the rank that it waits for is gone.
    """

    def __init__(self, rank: int, count: int):
        self._rank, self._count = rank, count
        self._store = meeting_place()
        self._store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._store.add(f"beat/{rank}", 1)
        if rank == 0:
            self._store.set("failure", "")
        self._keys = ["failure", *(f"beat/{other}" for other in range(count))]
        self._store.wait(self._keys, MEETING)
        self._last: list[bytes] = []  # what the keys held
        self._still = [0] * count  # ticks since each of the others gave a sign
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def tell(self, message: str) -> bool:
        """Let all know why the run ends. Returns whether this is the first such word, the one for the user."""
        try:
            first = self._store.compare_set("failure", "", message) == message.encode()
        except RuntimeError:  # the store is gone, with the launcher or rank 0 that kept it: nobody can ask who is first
            return self._rank == (0 if launcher_keeps_store() else 1)
        self._closing.set()
        self._let_others_know()
        return first

    def _let_others_know(self) -> None:
        """Without a launcher the store ends with rank 0, which waits until the others have seen why the run ends."""
        with suppress(RuntimeError):
            if self._rank > 0 or launcher_keeps_store():
                self._store.set(f"left/{self._rank}", "")
                return
            for _ in range(SURELY_LOST_AFTER * 4):
                if self._store.check([f"left/{other}" for other in range(1, self._count)]):
                    return
                time.sleep(TICK / 4)

    def leave(self, reason: str) -> None:
        """End this process: talking to the others has failed. Told by one of them, naming who is gone."""
        begin = time.monotonic()
        while time.monotonic() - begin < (SURELY_LOST_AFTER + 2) * TICK and self._thread.is_alive():
            time.sleep(TICK / 4)
            lost = [other for other in range(self._count) if self._still[other] >= SURELY_LOST_AFTER]
            if lost:
                self._end(self._lost(lost[0]))
        self._end(f"rank {self._rank} of {self._count}: lost the others ({reason})")

    def close(self) -> None:
        """This rank leaves as it should."""
        self._closing.set()
        self._thread.join(LOST_AFTER * TICK)

    def _run(self) -> None:
        while not self._closing.wait(TICK):
            try:
                self._look()
            except RuntimeError as error:
                if not self._closing.is_set():
                    reason = str(error).splitlines()[0]
                    keeper = "the launcher" if launcher_keeps_store() else f"rank 0 of {self._count}"
                    self._end(f"{keeper}, which keeps what ranks know of each other, is gone ({reason}); {CONSEQUENCE}")
                return

    def _look(self) -> None:
        self._store.add(f"beat/{self._rank}", 1)
        failure, *beats = self._store.multi_get(self._keys)
        if failure and not self._closing.is_set():
            self._exit()  # whoever wrote it has told the user
        if self._last:
            for other, (before, now) in enumerate(zip(self._last, beats, strict=True)):
                self._still[other] = self._still[other] + 1 if before == now else 0
        self._last = beats
        lost = next((other for other in range(self._count) if self._still[other] >= LOST_AFTER), None)
        if lost is not None and not self._closing.is_set():
            self._end(self._lost(lost))

    def _lost(self, other: int) -> str:
        who = self._store.get(f"who/{other}").decode()
        return (
            f"rank {other} of {self._count} ({who}) gave no sign of life for {self._still[other] * TICK:.0f} s; "
            + CONSEQUENCE
        )

    def _end(self, message: str) -> None:
        if self.tell(message):
            tqdm.write(f"d2r train: {message}", file=sys.stderr)  # a line of its own, whatever the bar shows
        self._exit()

    def _exit(self) -> None:
        """At once: the main thread may wait for what never comes, and cannot be woken."""
        self._let_others_know()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
