"""SAC in one file, after CleanRL's: one Meta-World task through Gymnasium, with an actor of routed modules.

    python examples/sac_routed.py --task drawer-close             # about ten minutes on a CPU
    python examples/sac_routed.py --help                          # every setting

What is d2r_fast's: the environments (an id that it registers), the modules and the choice of routes. All else is plain
PyTorch. It prints how many of the last episodes succeeded, and how many modules ran.
"""

import time
from collections import deque
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import d2r_fast.envs.vector_env  # noqa: F401  (registers the ids)
from d2r_fast import count_active, select_routes
from d2r_fast.nn import RoutedModules


@dataclass
class Args:
    seed: int = 1
    """seed of the experiment"""
    task: str = "drawer-close"
    """a task of Meta-World, as d2r_fast names them"""
    num_envs: int = 4
    """environments that step together"""
    episode_steps: int = 150
    """length of an episode"""
    total_timesteps: int = 100_000
    """environment steps in all"""
    learning_starts: int = 5_000
    """environment steps before the first update, with random actions"""
    updates_per_iteration: int = 2
    """updates for each step of all environments"""
    buffer_size: int = 200_000
    """transitions kept"""
    batch_size: int = 256
    """rows of an update"""
    gamma: float = 0.98
    """the discount factor gamma"""
    tau: float = 0.005
    """share of the critics that their targets take over in an update"""
    learning_rate: float = 1e-3
    """of actor, critics and entropy coefficient"""
    reward_scale: float = 0.1
    """rewards are multiplied by this"""
    num_modules: int = 6
    """modules of the actor"""
    sources: int = 2
    """what a module reads: that many of the modules before it"""
    module_width: int = 64
    """width of a module"""
    report_every: int = 5_000
    """environment steps between two lines of print"""


class RoutedActor(nn.Module):
    """A tanh-squashed normal policy. Which modules an observation runs through, the observation itself decides."""

    def __init__(self, n_obs: int, n_actions: int, args: Args):
        super().__init__()
        width, self.sources = args.module_width, args.sources
        n_choices = (
            args.num_modules * (args.num_modules + 1) // 2
        )  # module i chooses among i earlier ones, so does the end
        self.base = nn.Sequential(nn.Linear(n_obs, 128), nn.ReLU(), nn.Linear(128, width), nn.ReLU())
        self.choose = nn.Sequential(nn.Linear(n_obs, 64), nn.ReLU(), nn.Linear(64, n_choices))
        self.routed = RoutedModules(args.num_modules, width)
        self.mean, self.log_std = nn.Linear(width, n_actions), nn.Linear(width, n_actions)

    def forward(self, obs: Tensor, explore: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """obs [B,O] -> mean and standard deviation [B,A] before the tanh, and how many modules each row ran [B].

        explore: draw the routes, instead of taking the likeliest
        """
        logits = self.choose(obs)[None]  # [1,B,choices]: for one network
        if explore:
            noise = -torch.empty_like(logits).exponential_().log()  # standard Gumbel
            routes = select_routes(logits, self.sources, "sampled", torch.ones(len(obs)), noise)
        else:
            routes = select_routes(logits, self.sources)
        y = self.routed(self.base(obs), routes)
        std = self.log_std(y).clamp(-10, 2).exp()
        return self.mean(y), std, count_active(routes.active[0], self.routed.n_modules)

    def get_action(self, obs: Tensor, explore: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """An action [B,A], its log probability [B], and how many modules each row ran [B]."""
        mean, std, active = self(obs, explore)
        normal = torch.distributions.Normal(mean, std)
        raw = normal.rsample()
        action = raw.tanh()
        log_prob = normal.log_prob(raw) - torch.log(1 - action.square() + 1e-6)
        return action, log_prob.sum(1), active


class SoftQNetwork(nn.Module):
    """obs [B,O], action [B,A] -> value [B]."""

    def __init__(self, n_obs: int, n_actions: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_obs + n_actions, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
        )

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.layers(torch.cat([obs, action], 1))[:, 0]


class ReplayBuffer:
    """The last transitions, as rows of one array: obs, action, reward, next obs. No state here is terminal."""

    def __init__(self, size: int, n_obs: int, n_actions: int):
        self.rows = np.zeros((size, 2 * n_obs + n_actions + 1), np.float32)
        self.ends = np.cumsum([n_obs, n_actions, 1])
        self.added = 0

    def add(self, *columns: np.ndarray) -> None:
        for row in np.concatenate(columns, 1):
            self.rows[self.added % len(self.rows)] = row
            self.added += 1

    def sample(self, batch_size: int) -> list[Tensor]:
        picked = np.random.randint(min(self.added, len(self.rows)), size=batch_size)  # noqa: NPY002 (seeded globally)
        return [torch.from_numpy(part) for part in np.split(self.rows[picked], self.ends, 1)]


def main(args: Args) -> float:
    """Train; returns the share of the last episodes that succeeded."""
    np.random.seed(args.seed)  # noqa: NPY002
    torch.manual_seed(args.seed)
    envs = gym.make_vec(
        "d2r_fast/MetaWorld-v0", num_envs=args.num_envs, tasks=args.task, max_episode_steps=args.episode_steps
    )
    n_obs, n_actions = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    actor = RoutedActor(n_obs, n_actions, args)
    qf1, qf2, qf1_target, qf2_target = (SoftQNetwork(n_obs, n_actions) for _ in range(4))
    qf1_target.load_state_dict(qf1.state_dict())
    qf2_target.load_state_dict(qf2.state_dict())
    log_alpha = torch.full((1,), -5.0, requires_grad=True)
    target_entropy = -float(n_actions)
    q_optimizer = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=args.learning_rate)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate)
    a_optimizer = torch.optim.Adam([log_alpha], lr=args.learning_rate)
    rb = ReplayBuffer(args.buffer_size, n_obs, n_actions)

    begin = time.time()
    succeeded = np.zeros(args.num_envs, bool)  # at any step of the episode so far
    episodes: deque[float] = deque(maxlen=40)
    modules_run = float("nan")
    obs, _ = envs.reset(seed=args.seed)
    for global_step in range(args.num_envs, args.total_timesteps + 1, args.num_envs):
        if global_step <= args.learning_starts:
            actions = envs.action_space.sample()
        else:
            with torch.no_grad():
                chosen, _, active = actor.get_action(torch.from_numpy(obs), explore=True)
            actions, modules_run = chosen.numpy(), active.double().mean().item()

        next_obs, rewards, _, truncations, infos = envs.step(actions)
        true_next, success = next_obs.copy(), np.zeros(args.num_envs)
        if "success" in infos:  # of environments whose episode goes on
            success += infos["success"]
        if "final_info" in infos:  # of those that began another
            success += infos["final_info"]["success"]
            true_next[truncations] = np.stack(infos["final_obs"][truncations])
        succeeded |= success > 0
        episodes.extend(succeeded[truncations].astype(float))
        succeeded[truncations] = False
        rb.add(obs, actions, args.reward_scale * rewards[:, None], true_next)
        obs = next_obs

        for _ in range(args.updates_per_iteration if global_step > args.learning_starts else 0):
            b_obs, b_actions, b_rewards, b_next_obs = rb.sample(args.batch_size)
            alpha = log_alpha.detach().exp()
            with torch.no_grad():
                next_actions, next_log_pi, _ = actor.get_action(b_next_obs)
                next_q = torch.min(qf1_target(b_next_obs, next_actions), qf2_target(b_next_obs, next_actions))
                target = b_rewards[:, 0] + args.gamma * (next_q - alpha * next_log_pi)
            qf_loss = F.mse_loss(qf1(b_obs, b_actions), target) + F.mse_loss(qf2(b_obs, b_actions), target)
            q_optimizer.zero_grad()
            qf_loss.backward()
            q_optimizer.step()

            pi, log_pi, _ = actor.get_action(b_obs, explore=True)
            actor_loss = (alpha * log_pi - torch.min(qf1(b_obs, pi), qf2(b_obs, pi))).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_optimizer.step()

            alpha_loss = -log_alpha * (log_pi.detach().mean() + target_entropy)
            a_optimizer.zero_grad()
            alpha_loss.backward()
            a_optimizer.step()

            with torch.no_grad():
                for online, target_net in ((qf1, qf1_target), (qf2, qf2_target)):
                    for p, p_target in zip(online.parameters(), target_net.parameters(), strict=True):
                        p_target.lerp_(p, args.tau)

        if global_step % args.report_every < args.num_envs:
            print(
                f"step {global_step:,}: success {np.mean(episodes) if episodes else float('nan'):.2f} of the last "
                f"{len(episodes)} episodes, {modules_run:.1f} of {args.num_modules} modules ran, "
                f"alpha {log_alpha.exp().item():.4f}, {global_step / (time.time() - begin):.0f} steps/s",
                flush=True,
            )
    envs.close()
    return float(np.mean(episodes)) if episodes else float("nan")


if __name__ == "__main__":
    main(tyro.cli(Args))
