"""The training loop: take a chunk, make the updates it pays for, evaluate, log, save; and go on after a stop."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from d2r_fast.config import RunConfig
from d2r_fast.config_json import config_to_json
from d2r_fast.envs import MultiTaskEnvs, WorkerError, make_envs
from d2r_fast.evaluation.play import evaluate
from d2r_fast.learning.finite import first_not_finite
from d2r_fast.learning.learner import Learner, restore_generator
from d2r_fast.learning.replay import Replay
from d2r_fast.learning.saved_state import count, field
from d2r_fast.training import seeds
from d2r_fast.training.agents import choose_device, load_agent, make_agent, require_finite
from d2r_fast.training.checkpoint import checkpoint_files, checkpoint_path, located, save_checkpoint
from d2r_fast.training.claim import Claim
from d2r_fast.training.collector import Chunk, Collector
from d2r_fast.training.metrics import MetricsLog, check_metrics
from d2r_fast.training.overlap import ChunkFeed
from d2r_fast.training.progress import Progress, Waits
from d2r_fast.training.ranks import Alone, Share
from d2r_fast.training.saved_run import check_state, open_run
from d2r_fast.training.saved_shares import load_replay, load_share, ranks_of, remove_old_shares, save_share
from d2r_fast.training.wandb_log import check_wandb

# The progress bar moves once in this many updates, and a stop waits for as many at most, on a GPU for twice as many.
UPDATES_AT_ONCE = 10
# Seconds: Ctrl-C reaches ranks from the terminal, and from the launcher, which passes it on.
PASSED_ON_WITHIN = 5.0


class Collected(NamedTuple):
    """What a chunk told of a rank's environments, as `Chunk` has it."""

    success: list[list[float]]
    episode_return: list[list[float]]
    active_modules: list[float] | None

    @classmethod
    def of(cls, chunk: Chunk) -> "Collected":
        active = chunk.active_modules
        return cls(chunk.success, chunk.episode_return, None if active is None else active.tolist())


def _collected(ranks: list[Collected]) -> dict[str, list[float] | list[int]]:
    """A chunk's part of its log record, from what all ranks collected of it."""
    success, returns = (
        [[value for rank in of_ranks for value in rank] for of_ranks in zip(*every, strict=True)]  # by task
        for every in ([one.success for one in ranks], [one.episode_return for one in ranks])
    )
    record: dict[str, list[float] | list[int]] = {"episodes": [len(s) for s in success]}
    active = [one.active_modules for one in ranks if one.active_modules is not None]
    if active:
        record["active_modules"] = np.mean(active, 0).tolist()
    if all(success):  # every task had an episode end in this chunk
        record["success"] = [float(np.mean(s)) for s in success]
        record["scaled_return"] = [float(np.mean(r)) for r in returns]
    return record


class Trainer:
    """One run in one directory, in which no other process trains. Steps are counted per task, the warm-up's included.
    Several processes that make one run have a trainer each; steps are then those of all of them.

    Counters alone say what comes next: updates owed for steps taken, the end of a chunk, or another chunk. So a run
    can stop between any two updates and go on from there. Steps count when their chunk is added to the replay, between
    two updates; a chunk under way at a stop is dropped.
    """

    def __init__(
        self,
        cfg: RunConfig,
        run_dir: Path,
        resume: dict[str, Any] | None = None,
        show_progress: bool = True,
        claim: Claim | None = None,
        ranks: Alone | None = None,
    ):
        """resume: what `load_checkpoint` gave, for `run_dir` to go on from; without it the run begins there.
        claim: on `run_dir`, where the caller has one already; released by `close`.
        ranks: the processes that make this run together; all are given the same of all else, but for the claim, which
        is the first's, as is all that stands in `run_dir` except the shares of checkpoints.

        Whatever is wrong with the configuration, the device, the memory or what is to be resumed is raised before
        anything is written: ValueError, MemoryError, or BlockingIOError where another process trains in `run_dir`.
        What lies there that the run does not go on from is kept as *.discarded*.
        """
        self.cfg, self.run_dir, self.tasks = cfg, run_dir, cfg.task_names
        self._ranks = ranks or Alone()
        self._share = Share(cfg, self._ranks.count)
        self.device = choose_device(cfg.device)
        cfg.net.check_runs_on(self.device)
        if self._ranks.first:
            check_wandb(cfg.log)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
            torch.use_deterministic_algorithms(True)
            # Every buffer is written before it is read, so filling fresh memory with NaN would only cost time.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.agent = make_agent(cfg, self.device)
        self.replay = Replay(
            len(self.tasks),
            self._share.replay_capacity,
            MultiTaskEnvs.obs_size,
            MultiTaskEnvs.action_size,
            cfg.net.route_shape,
            self.device,
        )
        self.learner = Learner(
            self.agent, self.replay, cfg, self._seed(seeds.LEARNER), self._ranks.shares, self._share.batch_size
        )
        self._acting_generator = torch.Generator(self.device).manual_seed(self._seed(seeds.ACTING))
        self.steps = 0
        self._chunks_ended = 0
        self._evaluations = 0
        self._env_epoch = 0
        self._evaluation_due = False
        self._collected: dict[str, Any] = {}  # what the last chunk's collection adds to its log record
        if resume is not None:
            self._load(resume)
        self._saved_at: tuple[int, int] | None = None
        self._collector = Collector(
            self._make_envs(),
            self.agent,
            self.device,
            self._acting_generator,
            not cfg.bootstrap_at_time_limit,
            cfg.cuda_graph,
        )
        self._feed = ChunkFeed(
            self._collector, cfg.chunk_steps // cfg.env.envs_per_task, cfg.overlap and not cfg.deterministic
        )
        self._opened: tuple[Claim, MetricsLog] | None = None  # the first rank's
        try:
            if self._ranks.first:
                self._opened = open_run(run_dir, cfg, resume, claim, self.device, self._ranks.count)
            self._run_id = self._ranks.from_first(self._opened[0].id if self._opened else None)
        except BaseException:
            self._feed.close()
            raise
        total_updates = int(cfg.total_steps * Fraction(str(cfg.updates_per_step)))
        self._progress = Progress(self.tasks, total_updates, self.learner.updates, show_progress and self._ranks.first)
        self._stop_requested = False
        self._asked_at = 0.0
        self._failure: WorkerError | None = None

    @property
    def finished(self) -> bool:
        return self._chunks_ended * self.cfg.chunk_steps >= self._last_step

    @property
    def _last_step(self) -> int:
        return self.cfg.warmup_steps + self.cfg.total_steps

    @property
    def idle(self) -> Waits | None:
        """How long learner and collector waited for each other since the warm-up; None before there were updates."""
        return self._progress.waits if self._progress.waits.wall > 0 else None

    @property
    def wandb(self) -> str | None:
        """Where Weights & Biases has the run: its page, or the directory that `wandb sync` takes. None: nowhere."""
        log = self._opened[1].wandb if self._opened else None
        return log.where if log else None

    def run(self) -> bool:
        """Train to the end, or until SIGINT or SIGTERM; saves either way. Returns whether the run is finished. Ranks
        stop together, when one of them is asked to or has a WorkerError, which they then all raise.

        WorkerError: a process that simulates failed; what there was before is saved. OSError: a file could not be
        written; the run can go on from its last checkpoint. FloatingPointError: something that the run holds, or was
        given by a simulation, is not finite. The message says what, and which checkpoint was saved before; nothing is
        saved from then on.
        """
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self._ranks.any(self.replay.size == 0 and self.steps > 0):
                self._attempt(self._refill_replay)
            self._attempt(self._evaluate_if_due)  # a worker may have failed in it
            while not (self.finished or self._ranks.any(self._stop_requested or self._failure is not None)):
                self._attempt(self.advance)
            self._save()
            failures = self._ranks.gather(self._failure and str(self._failure))
            if (failure := next(filter(None, failures), None)) is not None:
                raise WorkerError(f"{failure}; saved, to go on: d2r train --resume {self.run_dir}") from self._failure
        except FloatingPointError as error:
            saved = checkpoint_files(self.run_dir)
            kept = f"{saved[-1]} was saved before it" if saved else "no checkpoint was saved before it"
            raise FloatingPointError(f"{error}; {kept}") from error
        finally:
            self.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.finished

    def _attempt(self, step: Callable[[], None]) -> None:
        """A step of the run. A worker that failed in it is told of once all ranks have stopped, and saved."""
        try:
            step()
        except WorkerError as error:
            self._failure = error

    def advance(self) -> None:
        """Do what the counters say comes next: a few updates, or the end of a chunk, or another chunk."""
        owed = self._updates_owed()
        if owed > 0:
            with self._progress.phase("learn"):
                self.learner.run(min(owed, UPDATES_AT_ONCE))
                if owed <= UPDATES_AT_ONCE:
                    self.learner.wait()
            self._progress.show(self.learner.updates)
            self._feed.raise_if_failed()
        elif self.steps > self._chunks_ended * self.cfg.chunk_steps:
            self._end_chunk()
        else:
            self._take_chunk()

    def settle(self) -> None:
        """Wait for the chunk under way: no thread of this run is at work until the next `advance`."""
        self._feed.settle()

    def close(self) -> None:
        """End the collector's thread and the environments, close the log and let others into the directory.

        `run` does it, however it ends.
        """
        with ExitStack() as closing:  # does all of it, even if something fails
            if self._opened is not None:
                for part in self._opened:
                    closing.callback(part.release if isinstance(part, Claim) else part.close)
            closing.callback(self._progress.close)
            closing.callback(self._feed.close)

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._stop_requested and (self._ranks.count == 1 or now - self._asked_at > PASSED_ON_WITHIN):
            raise KeyboardInterrupt  # asked twice: at once, without saving
        if self._stop_requested:
            return
        self._stop_requested, self._asked_at = True, now
        self._feed.stop()
        if self._ranks.first:
            self._progress.write(f"{signal.Signals(number).name}: saving and leaving (again: leave at once, unsaved)")

    def _updates_owed(self) -> int:
        """Updates that the steps so far have paid for and that are not made."""
        # As a fraction, because 100 * 0.29 is 28.999... in floats, which would be an update too few.
        paid = int((self.steps - self.cfg.warmup_steps) * Fraction(str(self.cfg.updates_per_step)))
        return max(0, paid - self.learner.updates)

    def _seed(self, stream: int, epoch: int = 0) -> int:
        return seeds.stream_seed(self.cfg.seed, stream, epoch, self._ranks.rank)

    def _make_envs(self) -> MultiTaskEnvs:
        env = self.cfg.env
        seed = self._seed(seeds.TRAIN_ENVS, self._env_epoch)
        return make_envs(
            self.tasks, self._share.envs_per_task, env.episode_length, seed, env.reward_scale, env.engine, env.goals
        )

    def _add_chunk(self, another: bool, counts: bool) -> Chunk | None:
        """Move a chunk from the feed to the replay; None if a stop came first, to this rank or another."""
        begin = time.perf_counter()
        chunk = self._feed.take(another, lambda have: not self._ranks.any(not have))
        if chunk is not None:
            self._progress.chunk_taken(time.perf_counter() - begin, chunk.seconds, counts)
            self.replay.add(chunk.staging.rows_on(self.device))
        return chunk

    def _take_chunk(self) -> None:
        with self._progress.phase("collect"):
            another = self.steps + self.cfg.chunk_steps < self._last_step
            chunk = self._add_chunk(another, counts=self.steps > self.cfg.warmup_steps)
        if chunk is None:
            return
        self.steps += self.cfg.chunk_steps
        self._progress.steps_taken(self.cfg.chunk_steps * len(self.tasks))
        self._collected = _collected(self._ranks.gather(Collected.of(chunk)))

    def _refill_replay(self) -> None:
        """After a resume without a saved replay: another warm-up, whose steps do not count."""
        for _ in range(self.cfg.warmup_steps // self.cfg.chunk_steps):
            if self._add_chunk(another=True, counts=False) is None:
                return

    def _end_chunk(self) -> None:
        self._chunks_ended += 1
        counts = {"steps": self.steps, "updates": self.learner.updates}
        record = {"kind": "train", **counts, **self._collected, **self.learner.take_metrics()}
        if self.cfg.net.route_shape[0] > 0:
            record["policy/route_temp"] = self.agent.route_temp.tolist()
        self._write(record, self._progress.times() | self._progress.rates(self.learner.updates))
        self._evaluation_due = self._chunks_ended % self.cfg.eval.every_chunks == 0 or self.finished
        self._evaluate_if_due()
        if self._chunks_ended % self.cfg.checkpoint_every_chunks == 0:
            self._save()
            if self.cfg.deterministic and not self.finished:
                # EnvPool's state cannot be saved. New environments here make a resumed run see what this one sees.
                self._env_epoch += 1
                self._collector.replace_envs(self._make_envs())

    def _evaluate_if_due(self) -> None:
        if not self._evaluation_due:
            return
        failure: WorkerError | None = None
        if self._ranks.first:
            try:
                self._evaluate()
            except WorkerError as error:
                failure = error
        if self._ranks.any(failure is not None):  # then none goes on as if there had been an evaluation
            raise failure or WorkerError("the evaluation, which the first rank makes, failed")
        self._evaluations += 1
        self._evaluation_due = False

    def _evaluate(self) -> None:
        with self._progress.phase("evaluate"):
            seed = seeds.stream_seed(self.cfg.seed, seeds.EVAL_ENVS, self._evaluations)
            env = self.cfg.env
            result = evaluate(self.agent, self.tasks, env.episode_length, self.cfg.eval, seed, env.engine, env.goals)
        counts = {"steps": self.steps, "updates": self.learner.updates}
        record = {"kind": "eval", **counts, "mean_success": result.mean_success, **result._asdict()}
        self._write(record, self._progress.times())
        self._progress.evaluated(result.success)

    def _write(self, record: dict[str, Any], times: dict[str, float]) -> None:
        if self._opened is not None:
            self._opened[1].write({**record, "time": times})

    def _save(self) -> None:
        self._require_finite()
        if self._saved_at == (self.steps, self.learner.updates):
            return
        with self._progress.phase("save"):
            state = self._state()
            if not self._ranks.first:
                save_share(self.run_dir, state, self._ranks.rank)
            self._ranks.any(False)  # all shares are on the disk
            if self._ranks.first:
                save_checkpoint(self.run_dir, self.steps, state)
                remove_old_shares(self.run_dir, state, checkpoint_files(self.run_dir))
        self._saved_at = (self.steps, self.learner.updates)

    def _require_finite(self) -> None:
        """FloatingPointError unless all that a checkpoint is made of is finite."""
        self.learner.require_finite()
        if (bad := first_not_finite(self.replay.tensors())) is not None:
            raise FloatingPointError(f"after {self.steps} steps a task: {bad}")

    def _state(self) -> dict[str, Any]:
        return {
            "config": config_to_json(self.cfg),
            "agent": self.agent.state_dict(),
            "learner": self.learner.state_dict(),
            "replay": self.replay.state_dict() if self.cfg.checkpoint_replay else None,
            "acting_generator": self._feed.generator_state(),
            "steps": self.steps,
            "chunks_ended": self._chunks_ended,
            "evaluations": self._evaluations,
            "env_epoch": self._env_epoch + 1,
            "evaluation_due": self._evaluation_due,
            "collected": self._collected,
            "run_id": self._run_id,
            "ranks": self._ranks.count,
            **(self._opened[1].state_dict() if self._opened else {}),
        }

    def _load(self, state: dict[str, Any]) -> None:
        """ValueError, naming the file: something in it is missing, of another type or size, or of another run."""
        rank, n_ranks = self._ranks.rank, self._ranks.count
        with located(checkpoint_path(self.run_dir, count(state, "steps"))):
            check_state(self.run_dir, state, self.cfg)
            load_agent(self.agent, state)
            self.learner.load_state_dict(field(state, "learner", dict))
            if state["replay"] is not None:
                load_replay(self.replay, self.run_dir, state, rank, n_ranks)
            if rank == 0:
                restore_generator(self._acting_generator, state.get("acting_generator"))
            elif ranks_of(state) == n_ranks:
                share = load_share(self.run_dir, state, rank)
                restore_generator(self._acting_generator, share.get("acting_generator"))
                restore_generator(self.learner.generator, share.get("generator"))
            else:  # another number of ranks draws other numbers; the saved streams are not a rank's own
                for stream, generator in (
                    (seeds.ACTING, self._acting_generator),
                    (seeds.LEARNER, self.learner.generator),
                ):
                    generator.manual_seed(self._seed(stream, state["env_epoch"]))
            require_finite({**self.learner.tensors(), **self.replay.tensors()})
        if self._ranks.first:
            check_metrics(self.run_dir, len(self.tasks), state["metrics_length"], state.get("metrics_sha256"))
        self.steps, self._chunks_ended = state["steps"], state["chunks_ended"]
        self._evaluations, self._env_epoch = state["evaluations"], state["env_epoch"]
        self._evaluation_due = state.get("evaluation_due", False)
        self._collected = state["collected"]
