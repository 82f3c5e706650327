"""A Soft Modularization network in plain PyTorch, and what it takes to run it on d2r_fast's operations.

    python examples/soft_modules.py                 # the published deep network, 1,280 rows of MT10
    python examples/soft_modules.py --help          # other sizes

`SoftModules` is written as its authors write it: a list of linear layers, mixed row by row. `FastSoftModules` is the
same network with the same parameters and two methods overridden. Printed is how far outputs and gradients of the two
lie apart in float64, how much of that float32 loses (gradients most: where a ReLU's input is near 0, rounding opens or
shuts it), and how long forward and backward take.
"""

import copy
import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from d2r_fast.ops.module_levels import level_gates, module_levels


@dataclass(frozen=True)
class Args:
    rows: int = 1280
    """Rows of a batch, as many of every task."""
    tasks: int = 10
    levels: int = 4
    """Levels of modules."""
    modules: int = 4
    """Modules a level."""
    width: int = 128
    """Width of a module."""
    hidden: int = 400
    """Width of the base."""
    gating: int = 256
    """Width of the layers before the gates."""
    repeats: int = 20
    """How often each network is timed."""


class SoftModules(nn.Module):
    """obs [B,39], task [B] -> [B,8], in plain PyTorch."""

    def __init__(self, args: Args, n_obs: int = 39, n_out: int = 8):
        super().__init__()
        n, self.n_modules = args.modules, args.modules
        self.base = nn.Sequential(nn.Linear(n_obs, args.hidden), nn.ReLU(), nn.Linear(args.hidden, args.hidden))
        self.task = nn.Linear(args.tasks, args.hidden)
        self.gating = nn.Sequential(nn.Linear(args.hidden, args.gating), nn.ReLU(), nn.Linear(args.gating, args.gating))
        self.gates = nn.ModuleList(nn.Linear(args.gating, n * n) for _ in range(args.levels - 1))
        self.last_gate = nn.Linear(args.gating, n)
        self.conditions = nn.ModuleList(nn.Linear(i * n * n, args.gating) for i in range(1, args.levels))
        self.levels = nn.ModuleList(
            nn.ModuleList(nn.Linear(args.hidden if level == 0 else args.width, args.width) for _ in range(n))
            for level in range(args.levels)
        )
        self.head = nn.Linear(args.width, n_out)

    def forward(self, obs: Tensor, task: Tensor) -> Tensor:
        f = self.base(obs)
        onehot = nn.functional.one_hot(task, self.task.in_features).to(obs.dtype)
        gates = self.all_gates(self.gating((f * self.task(onehot)).relu()))
        return self.head(self.run_modules(f.relu(), gates))

    def all_gates(self, c: Tensor) -> list[Tensor]:
        """c [B,G] -> the weights [B,targets,N] of every mix; a mix's depend on those before it."""
        n = self.n_modules
        gates = [self.gates[0](c.relu()).view(-1, n, n).softmax(-1)]
        for condition, gate in zip(self.conditions, [*self.gates[1:], self.last_gate], strict=True):
            earlier = torch.cat([p.flatten(1) for p in gates], -1)
            gates.append(gate((condition(earlier) * c).relu()).view(len(c), -1, n).softmax(-1))
        return gates

    def run_modules(self, u: Tensor, gates: list[Tensor]) -> Tensor:
        """u [B,H] -> [B,D]: every module reads a mix of the level before it."""
        outputs = torch.stack([module(u) for module in self.levels[0]], 1)  # [B,N,D]
        for level, p in zip(self.levels[1:], gates, strict=False):
            mixed = [(p[:, j, :, None] * outputs).sum(1).relu() for j in range(self.n_modules)]
            outputs = torch.stack([module(x) for module, x in zip(level, mixed, strict=True)], 1)
        return (gates[-1][:, 0, :, None] * outputs).sum(1).relu()


class FastSoftModules(SoftModules):
    """The same on d2r_fast: its operations take E networks at once, here one, so weights get an axis in front."""

    def all_gates(self, c: Tensor) -> Tensor:  # type: ignore[override]  # [1,B,all gates], as module_levels takes them
        layers = [self.gates[0]]
        for condition, gate in zip(self.conditions, [*self.gates[1:], self.last_gate], strict=True):
            layers += [condition, gate]
        return level_gates(c[None], self.n_modules, [p[None] for layer in layers for p in (layer.weight, layer.bias)])

    def run_modules(self, u: Tensor, gates: Tensor) -> Tensor:  # type: ignore[override]
        parameters = []
        for level in self.levels:
            parameters.append(torch.stack([module.weight for module in level])[None])  # [1,N,out,in]
            parameters.append(torch.stack([module.bias for module in level])[None])  # [1,N,out]
        return module_levels(u[None], gates, parameters)[0]


def run(net: SoftModules, rows: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The output and the gradient of every parameter."""
    obs, task, cotangent = rows
    out = net(obs, task)
    return [out.detach(), *torch.autograd.grad(out, list(net.parameters()), cotangent)]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference in any of them, in units of its largest number."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def main(args: Args) -> None:
    torch.manual_seed(0)
    plain, fast = SoftModules(args), FastSoftModules(args)
    fast.load_state_dict(plain.state_dict())
    rows = (torch.randn(args.rows, 39), torch.arange(args.rows) % args.tasks, torch.randn(args.rows, 8))

    in_double = tuple(value.double() if value.is_floating_point() else value for value in rows)
    exact = run(copy.deepcopy(plain).double(), in_double)
    apart = distance(run(copy.deepcopy(fast).double(), in_double), exact)
    print(f"{args.levels} levels of {args.modules} modules of {args.width}, {args.rows} rows")
    print(f"float64    output and gradients of {len(exact) - 1} parameters differ by {apart:.1e} of the largest number")
    assert apart < 1e-9, "the two compute something else"

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, fast, rows = plain.to(device), fast.to(device), tuple(value.to(device) for value in rows)
    for name, net in (("plain", plain), ("d2r_fast", fast)):
        lost = distance([value.cpu() for value in run(net, rows)], exact)
        print(f"float32    {name} on {device}: {lost:.1e} from float64")

    def seconds(net: SoftModules) -> float:
        begin = time.perf_counter()
        run(net, rows)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    times = [(seconds(plain), seconds(fast)) for _ in range(args.repeats)]  # in turn, for both to meet the same machine
    a, b = (statistics.median(of_one) * 1e3 for of_one in zip(*times, strict=True))
    print(f"time       forward and backward: plain PyTorch {a:.2f} ms, d2r_fast {b:.2f} ms, {a / b:.2f} x as fast")


if __name__ == "__main__":
    main(tyro.cli(Args))
