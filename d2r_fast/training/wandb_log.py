"""A run's numbers for Weights & Biases, whose own process writes or sends them: training waits for none of it."""

import queue
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2r_fast.config import LogConfig

if TYPE_CHECKING:
    import wandb

# Records that may wait: far more than come about while a network is gone for a moment.
MOST_WAITING = 1000
# Seconds to reach the server at the start, and to send what is left at the end.
BEGIN_WITHIN, END_WITHIN = 30, 60


def check_wandb(cfg: LogConfig) -> None:
    """ValueError unless there is what `cfg` needs here: the package and, online, a key to log in with."""
    if cfg.wandb == "off":
        return
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"log.wandb: expected 'off' where the package wandb cannot be imported, got {cfg.wandb!r} ({error}); "
            "pip install 'd2r_fast[wandb]'"
        ) from error
    wandb.setup(wandb.Settings(silent=True))
    if cfg.wandb == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "log.wandb: expected a login for 'online', found none; `wandb login` and WANDB_API_KEY give one, "
            "'offline' needs none"
        )


class WandbLog:
    """Numbers of one run for Weights & Biases, under the run's own id there, also after a resume.

    where  the run's page, or the directory that `wandb sync` takes

    A thread hands over what `write` is given. Whatever fails from then on is one warning, and the end of it there.
    OSError: the run could not be begun, the server not reached in particular.
    """

    def __init__(self, cfg: LogConfig, run_dir: Path, run_id: str, settings: dict[str, Any]):
        self._run = _begin(cfg, run_dir, run_id, settings)
        self.where = (self._run.url if cfg.wandb == "online" else None) or str(Path(self._run.dir).parent)
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._given_up = threading.Event()
        self._exit_code = 0
        self._thread = threading.Thread(target=self._hand_over, name="wandb", daemon=True)
        self._thread.start()

    def write(self, steps: int, numbers: dict[str, float]) -> None:
        """`numbers` by name after `steps` environment steps a task; those of the same steps make one row."""
        if not self._given_up.is_set():
            try:
                self._waiting.put_nowait((steps, numbers))
            except queue.Full:
                self._give_up(f"it has not taken the last {MOST_WAITING} records")

    def close(self) -> None:
        """Finish the run there: as a failed one where an error is on its way up. Waits about a minute at most."""
        self._exit_code = int(sys.exc_info()[0] is not None)
        if not self._given_up.is_set():
            with suppress(queue.Full):
                self._waiting.put(None, timeout=END_WITHIN)
            self._thread.join(END_WITHIN + 5)
            if self._thread.is_alive():
                self._give_up(f"it has not ended within {END_WITHIN} s")
        if self._given_up.is_set():
            # Otherwise it would be asked to end, and waited for, when the interpreter exits.
            end = threading.Thread(target=_abandon, daemon=True)
            end.start()
            end.join(2)

    def _hand_over(self) -> None:
        try:
            while (item := self._waiting.get()) is not None and not self._given_up.is_set():
                steps, numbers = item
                self._run.log(numbers, step=steps)
            self._run.finish(self._exit_code)
        except Exception as error:  # of whatever kind: training goes on
            self._give_up(_one_line(error))

    def _give_up(self, why: str) -> None:
        if not self._given_up.is_set():
            self._given_up.set()
            message = f"log.wandb: {why}; the run goes on without it, and metrics.jsonl has every number"
            warnings.warn(message, stacklevel=3)


def _abandon() -> None:
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown()


def _begin(cfg: LogConfig, run_dir: Path, run_id: str, settings: dict[str, Any]) -> "wandb.Run":
    import wandb

    try:
        return wandb.init(
            project=cfg.project,
            group=cfg.group,
            name=run_dir.resolve().name,
            id=run_id,
            resume="allow",
            mode="online" if cfg.wandb == "online" else "offline",
            dir=run_dir,
            config=settings,
            settings=wandb.Settings(
                console="off",  # the terminal is the progress bar's
                silent=True,
                disable_git=True,
                disable_code=True,
                init_timeout=BEGIN_WITHIN,
                finish_timeout=END_WITHIN,
            ),
        )
    except Exception as error:
        raise OSError(f"log.wandb: {_one_line(error)}; `--log.wandb offline` needs no server") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
