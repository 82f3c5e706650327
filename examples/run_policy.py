"""A trained policy in plain PyTorch: nothing here needs d2r_fast, once its files are there.

    d2r export runs/quick-seed0-...                                  # writes policy.safetensors and policy.json there
    python examples/run_policy.py runs/quick-seed0-.../policy        # success on Meta-World's own environments

Needs torch, safetensors, and for the episodes gymnasium and metaworld. `Policy` is all of D2R's network for acting.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Policy(nn.Module):
    """obs [B,39], task [B] -> action [B,4]: greedy routes, mean action."""

    def __init__(self, prefix: str):
        super().__init__()
        sizes = json.loads(Path(f"{prefix}.json").read_text())
        if sizes.get("format") != "d2r_fast policy 1" or sizes["network"]["kind"] != "d2r":
            raise ValueError(f"{prefix}.json: expected what d2r export writes for network d2r")
        self.tasks, net = sizes["tasks"], sizes["network"]
        self.n_modules, self.top_k, self.residual = net["n_modules"], net["top_k"], net["residual"]
        self.dynamic_depth = net.get("dynamic_depth", True)
        self.n_route_layers = len(net["route_widths"]) + 1
        for name, value in load_file(f"{prefix}.safetensors").items():
            self.register_buffer(name.replace(".", "_"), value[0])  # of the one network that an actor is

    def layer(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))

    @torch.no_grad()
    def forward(self, obs: Tensor, task: Tensor) -> Tensor:
        f = self.layer("base_1", self.layer("base_0", obs).relu())
        logits = f * self.layer("task", nn.functional.one_hot(task, len(self.tasks)).to(f.dtype))
        for i in range(self.n_route_layers):
            logits = self.layer(f"route_{i}", logits.relu() if i > 0 else logits)

        modules = [self.layer("module0", f.relu()).relu()]
        for i, of_route in enumerate(logits.split(list(range(1, self.n_modules + 1)), -1), start=1):
            score = of_route.clone()
            if not self.dynamic_depth:  # the module below is always one of them
                score[:, -1] = torch.inf
            index = score.topk(min(self.top_k, i), -1).indices  # route i chooses among the i modules below it
            gate = of_route.gather(-1, index).softmax(-1)
            sources = torch.stack(modules, 1)[torch.arange(len(obs))[:, None], index]  # [B,K,D]
            x = (gate[..., None] * sources).sum(1)
            if i < self.n_modules:
                h = nn.functional.linear(x, self.module_weight[i - 1], self.module_bias[i - 1]).relu()
                modules.append(h + x if self.residual else h)
        return self.layer("head", x).chunk(2, -1)[0].tanh()


def play(policy: Policy, episodes: int, steps: int) -> dict[str, float]:
    """The share of episodes in which each task succeeded, on the environments of the package metaworld."""
    import gymnasium
    import metaworld  # noqa: F401  (registers them)

    success = {}
    for k, task in enumerate(policy.tasks):
        env = gymnasium.make("Meta-World/MT1", env_name=f"{task}-v3", max_episode_steps=steps)
        succeeded = 0
        for episode in range(episodes):
            obs, _ = env.reset(seed=episode)
            done = won = False
            while not done:
                rows = torch.as_tensor(obs[:39], dtype=torch.float32)[None]
                obs, _, terminated, truncated, info = env.step(policy(rows, torch.tensor([k]))[0].numpy())
                won |= info["success"] > 0
                done = terminated or truncated
            succeeded += won
        env.close()
        success[task] = succeeded / episodes
        print(f"{task:<28} {success[task]:.2f} of {episodes} episodes of {steps} steps", flush=True)
    return success


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="what d2r export was given, or RUN/policy")
    parser.add_argument("--episodes", type=int, default=5, help="of each task (default 5)")
    parser.add_argument("--steps", type=int, default=200, help="of an episode (default 200)")
    options = parser.parse_args()
    play(Policy(options.prefix), options.episodes, options.steps)
