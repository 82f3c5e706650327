"""Every setting of a run, checked where it is made. Letters in the docstrings are the paper's."""

import math
from dataclasses import dataclass, field
from typing import Literal

from d2r_fast.envs.fidelity_table import EngineChoice, choose_engines
from d2r_fast.envs.metaworld import Goals, parse_tasks
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.settings import NetConfigBase, require


@dataclass(frozen=True, kw_only=True)
class SacConfig:
    """The multi-task SAC update."""

    gamma: float = 0.99
    """Discount."""
    target_rate: float = 0.005
    """Share of the critics that the target critics take over at each update."""
    actor_lr: float = 3e-4
    """Adam step of the actor."""
    critic_lr: float = 3e-4
    """Adam step of both critics."""
    alpha_lr: float = 1e-4
    """Adam step of the tasks' log alpha."""
    init_alpha: float = 1.0
    """Entropy coefficient of every task at the start, in (0, 1]."""
    max_alpha: float | None = 1.0
    """Largest entropy coefficient of a task; None: no limit. 1 in the published D2R and PaCo, none in the others."""
    task_weights: bool = True
    """Weigh a task's actor and critic losses by T softmax(-log alpha), as D2R and Soft Modules; the others do not."""
    adam_eps: float = 1e-8
    """Added to the root in Adam's step; 1e-7 in PaCo, 1e-5 in the JAX port of all methods but D2R."""
    max_grad_norm: float | None = 1.0
    """Gradient norm that the actor, each critic and log alpha are clipped to, each for itself; None: no limit, as PaCo,
    MOORE and mtrl."""
    clip_alpha: bool = True
    """Whether log alpha's gradient is clipped too, as D2R does; Soft Modules' code clips the networks' alone."""
    max_task_loss: float | None = 3000.0
    """A task whose summed loss exceeds this is left out of the update, as in D2R and PaCo; None: no limit."""
    order: Literal["joint", "alpha_first", "critics_first", "actor_first"] = "joint"
    """Who makes its step when; each loss sees what those before have become. joint: all at once (D2R, PaCo).
    alpha_first: log alpha, then the networks (Soft-Module e6d7c8a, for its perceptrons too). critics_first: critics,
    then actor and log alpha (mtrl e282c3f). actor_first: actor and log alpha, then the critics (MOORE a7550c5)."""
    reset_extreme: bool = False
    """PaCo (paco-mtrl b63387f): after the step, the task weights of a task that was left out become a random mean of
    the other tasks'. Here those of the actor and of both critics, by the same shares; Adam's moments stay."""
    route_balancing: bool = True
    """D2R's route temperatures, T softmax(-log alpha). False: 1 for every task."""
    actor_routes: Literal["replayed", "sampled", "greedy"] = "replayed"
    """Along which routes D2R's actor learns: those that it acted on, as published, or ones chosen anew, by sampling or
    greedily."""

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, f"sac.gamma: expected 0..1, got {self.gamma}")
        require(0 < self.target_rate <= 1, f"sac.target_rate: expected within (0, 1], got {self.target_rate}")
        require(0 < self.init_alpha <= 1, f"sac.init_alpha: expected within (0, 1], got {self.init_alpha}")
        for name in ("actor_lr", "critic_lr", "alpha_lr", "adam_eps", "max_alpha", "max_grad_norm", "max_task_loss"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"sac.{name}: expected a finite number over 0, got {value}")
        require(
            self.order == "joint" or self.max_task_loss is None,
            f"sac.max_task_loss: expected None with order {self.order!r}, which has no task's losses all at once, "
            f"got {self.max_task_loss}",
        )
        require(
            not self.reset_extreme or self.max_task_loss is not None,
            "sac.reset_extreme: expected False without max_task_loss, which says what is extreme, got True",
        )
        require(
            self.max_alpha is None or self.init_alpha <= self.max_alpha,
            f"sac.init_alpha: expected at most max_alpha={self.max_alpha}, got {self.init_alpha}",
        )

    @property
    def chooses_routes_as_published(self) -> bool:
        """Whether the settings that only a network with routes has a use for are left as they are."""
        return self.route_balancing and self.actor_routes == "replayed"

    @property
    def max_log_alpha(self) -> float:
        """Infinite without a limit, as the next two."""
        return math.inf if self.max_alpha is None else math.log(self.max_alpha)

    @property
    def norm_limit(self) -> float:
        return math.inf if self.max_grad_norm is None else self.max_grad_norm

    @property
    def loss_limit(self) -> float:
        return math.inf if self.max_task_loss is None else self.max_task_loss


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The environments that training collects from."""

    tasks: str = "MT10"
    """MT10, MT25, MT50, MT1-<task>, or a comma-separated list such as `reach,door-close`."""
    engine: EngineChoice = "auto"
    """What simulates: the engine that the fidelity table names for each task, or one for all."""
    goals: Goals = "random"
    """Goals drawn from the continuous range, from the package's 50 of a seed, or one a task."""
    envs_per_task: int = 1
    """n, environments a task."""
    episode_length: int = 200
    """Steps after which an episode is cut off."""
    reward_scale: float = 0.1
    """Rewards are multiplied by this before they are stored; evaluation reports them unscaled."""

    def __post_init__(self) -> None:
        require(self.envs_per_task >= 1, f"env.envs_per_task: expected at least 1, got {self.envs_per_task}")
        require(1 <= self.episode_length <= 500, f"env.episode_length: expected 1..500, got {self.episode_length}")
        require(self.reward_scale > 0, f"env.reward_scale: expected more than 0, got {self.reward_scale}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation: greedy routes, mean action, success at any step, on environments of its own."""

    every_chunks: int = 50
    """Evaluate after this many chunks, and at the end."""
    episodes: int = 32
    """Episodes a task."""
    envs_per_task: int = 8
    """Environments a task; `episodes` must be a multiple of it."""

    def __post_init__(self) -> None:
        for name in ("every_chunks", "episodes", "envs_per_task"):
            require(getattr(self, name) >= 1, f"eval.{name}: expected at least 1, got {getattr(self, name)}")
        require(
            self.episodes % self.envs_per_task == 0,
            f"eval.episodes: expected a multiple of eval.envs_per_task={self.envs_per_task}, got {self.episodes}",
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Weights & Biases, beside metrics.jsonl and TensorBoard, which every run writes. It changes no number of a run."""

    wandb: Literal["off", "offline", "online"] = "off"
    """offline writes to the run directory, for `wandb sync`; online sends at once, and needs a login."""
    project: str = "d2r_fast"
    """Project there."""
    group: str | None = None
    """Group there, for seeds of one experiment, say."""

    def __post_init__(self) -> None:
        require(self.project != "", "log.project: expected a name, got ''")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole: the file config.json of a run directory is this and nothing else."""

    name: str = "run"
    """What the run directory is called after."""
    seed: int = 0
    """Seeds networks, noise, replay draws and environments."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner and the replay live; auto takes a GPU where there is one."""
    deterministic: bool = False
    """Same seed, same machine: identical metrics, also across a stop at a checkpoint and a resume. Collecting and
    learning then take turns."""
    cuda_graph: bool = True
    """On a GPU, replay an update, and acting, as one captured graph each; False launches their kernels one by one."""
    overlap: bool = True
    """Collect the next chunk while the learner makes the updates of the last one, with parameters at most one chunk
    old, as published. False, or `deterministic`: they take turns. The ratio is exact either way; bitwise equal runs are
    promised by `deterministic` alone."""
    env: EnvConfig = field(default_factory=EnvConfig)
    net: NetConfigBase = field(default_factory=NetConfig)
    sac: SacConfig = field(default_factory=SacConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    total_steps: int = 1_500_000
    """Environment steps of each task, after the warm-up."""
    warmup_steps: int = 4_000
    """Environment steps of each task before the first update."""
    chunk_steps: int = 200
    """Environment steps of each task between two exchanges of parameters."""
    updates_per_step: float = 1.0
    """Ratio: updates per environment step of each task."""
    batch_size: int = 1280
    """B, rows an update, the same number of every task."""
    replay_capacity: int = 1_000_000
    """Transitions kept, over all tasks."""
    bootstrap_at_time_limit: bool = True
    """False stores the time limit as a terminal state, as the published code does."""
    checkpoint_every_chunks: int = 250
    """Save after this many chunks, and at the end; the last three are kept."""
    checkpoint_replay: bool = True
    """Save the replay too; without it a resumed run starts with another warm-up."""

    def __post_init__(self) -> None:
        require(
            self.name != "" and all(c.isalnum() or c in "-_." for c in self.name),
            f"name: expected letters, digits, '-', '_' or '.', got {self.name!r}",
        )
        require(0 <= self.seed < 2**32, f"seed: expected 0..2**32-1, got {self.seed}")
        for name in ("total_steps", "warmup_steps", "chunk_steps", "batch_size", "checkpoint_every_chunks"):
            require(getattr(self, name) >= 1, f"{name}: expected at least 1, got {getattr(self, name)}")
        require(
            0 < self.updates_per_step < float("inf"),
            f"updates_per_step: expected a finite number over 0, got {self.updates_per_step}",
        )
        n = self.env.envs_per_task
        require(
            self.chunk_steps % n == 0,
            f"chunk_steps: expected a multiple of env.envs_per_task={n}, got {self.chunk_steps}",
        )
        for name in ("total_steps", "warmup_steps"):
            require(
                getattr(self, name) % self.chunk_steps == 0,
                f"{name}: expected a multiple of chunk_steps={self.chunk_steps}, got {getattr(self, name)}",
            )
        choose_engines(self.task_names, self.env.engine, self.env.goals)  # refuses goals that an engine does not have
        require(
            self.net.route_shape[0] > 0 or self.sac.chooses_routes_as_published,
            f"sac.route_balancing, sac.actor_routes: expected the defaults with network {self.net.kind}, which chooses "
            f"no routes, got {self.sac.route_balancing}, {self.sac.actor_routes!r}",
        )
        require(
            not self.sac.reset_extreme or self.net.has_task_weights,
            f"sac.reset_extreme: expected False with network {self.net.kind}, which has no task weights, got True",
        )
        n_tasks = self.n_tasks
        require(
            self.batch_size % n_tasks == 0,
            f"batch_size: expected a multiple of the {n_tasks} tasks, got {self.batch_size}",
        )
        require(
            self.replay_capacity // n_tasks >= self.chunk_steps,
            f"replay_capacity: expected at least chunk_steps x tasks = {self.chunk_steps * n_tasks}, "
            f"got {self.replay_capacity}",
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The T tasks in order. ValueError where `env.tasks` names one that does not exist."""
        return parse_tasks(self.env.tasks)

    @property
    def n_tasks(self) -> int:
        """T."""
        return len(self.task_names)
