"""The gradient of an update's D2R networks on a GPU with whole networks in a launch, forward and backward.

Two launches forward, {actor at obs, actor at next_obs} and {critics at the actions taken, critics at the actor's,
targets}, for the second needs the actions that the first gives; two backward, {critics at the actor's actions} and
{critics at those taken, actor}, likewise; and the gradients of all weights at the end. What could be in either launch
is where it fills the device: at MT10, tiles of 2, 6, 2 and 3 members are 1, 2, 1 and 1 for a multiprocessor of 132, and
4, 4, 4 and 1 would be 2, 2, 2 and 1. `d2r_fast.learning.layered` does the same layer by layer.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2r_fast.learning.parameters import FlatParameters, aligned
from d2r_fast.nets.agent import N_CRITICS, Agent
from d2r_fast.nets.d2r import RouteChoice, RoutedNetwork
from d2r_fast.ops.contract import launcher
from d2r_fast.ops.layer_gradients import Product, Rows, Sum

_forward, _backward = (launcher("whole_network", way) for way in ("forward", "backward"))
_modules_gradient = launcher("weight_gradient", "weight_gradient_at")
_gradient_table, _network_gradient = (launcher("network_gradient", f) for f in ("gradient_table", "network_gradient"))

# The members, in the order of their numbers.
ACTOR_NOW, ACTOR_NEXT, TAKEN, FROZEN, TARGETS = 0, 1, 2, 2 + N_CRITICS, 2 + 2 * N_CRITICS
N_MEMBERS = 2 + 3 * N_CRITICS
# Which of them go back, in the order of their gradients.
BACK = (*range(FROZEN, TARGETS), *range(TAKEN, FROZEN), ACTOR_NOW)
TRAINED = (ACTOR_NOW, *range(TAKEN, FROZEN))


class Member(NamedTuple):
    """Network `number` of `net` over the rows x[set_of_rows]."""

    net: RoutedNetwork
    number: int
    set_of_rows: int


def members_of(agent: Agent) -> list[Member]:
    """x[0] is obs with the action taken, x[1] obs with the actor's, x[2] next_obs with the actor's."""
    actor, critics, targets = agent.actor.net, agent.critics.net, agent.target_critics.net
    networks: list[tuple[Any, int, int]] = [
        (actor, 1, 1),
        (actor, 1, 2),
        (critics, N_CRITICS, 0),
        (critics, N_CRITICS, 1),
        (targets, N_CRITICS, 2),
    ]
    return [Member(net, number, at) for net, n_nets, at in networks for number in range(n_nets)]


class Places:
    """Parts of a buffer, one behind another."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, n: int) -> int:
        begin, self.size = self.size, self.size + aligned(n)
        return begin


class Layout:
    """Where everything of an update's networks lies, for batches of as many rows; made once.

    lines   [N_MEMBERS,columns] of `d2r_fast.kernels.whole_network`, on the device
    table   of all trained layers' gradients but the modules'
    modules [G,4] of these: a trained member, which of the members that go back it is, where its gradients go
    q, target_q  where in what the heads give these begin: [E,2B], [E,B]; the actor's [2B,2A] comes first
    """

    def __init__(self, agent: Agent, flat: FlatParameters, x: Tensor, sampled: bool):
        kernels: Any = import_module("d2r_fast.kernels.whole_network")  # late, for it needs Triton

        self.members = members_of(agent)
        net, n_rows = self.members[TAKEN].net, x.shape[1]
        cfg: Any = net.cfg
        n_hidden, hidden, width = len(cfg.route_widths), cfg.base_width, cfg.module_width
        routes = {f"route{i}": n for i, n in enumerate((*cfg.route_widths, cfg.n_logits))}
        kept_widths = {"base0": hidden, "base1": hidden, "scaled": hidden, "opened": hidden, **routes}
        kept_widths["mixed"] = width
        d_z_widths = {"base0": hidden, "base1": hidden, "task": hidden, **routes, "module0": width}
        n_outs = [member.net.head.weight.shape[-2] for member in self.members]

        outs = Places()
        outs.take(2 * n_rows * n_outs[ACTOR_NOW])
        self.q, self.target_q = outs.take(N_CRITICS * 2 * n_rows), outs.take(N_CRITICS * n_rows)
        self.n_outs = outs.size
        out_at = [0, n_rows * n_outs[ACTOR_NOW]]
        out_at += [self.q + (2 * e + way) * n_rows for way in (0, 1) for e in range(N_CRITICS)]
        out_at += [self.target_q + e * n_rows for e in range(N_CRITICS)]

        kept, d_z = Places(), Places()
        lines = []
        self._kept: list[dict[str, int]] = []
        self._d_z: dict[int, dict[str, int]] = {}
        for number, member in enumerate(self.members):
            n_in, critic = member.net.n_in, number - TAKEN
            of_kept = {name: kept.take(n_rows * n) for name, n in kept_widths.items()}
            of_d_z: dict[str, int] = {}
            if number in BACK:
                of_d_z = {name: d_z.take(n_rows * n) for name, n in d_z_widths.items()}
                of_d_z["head"] = d_z.take(n_rows * n_outs[number])
                self._d_z[number] = of_d_z
            self._kept.append(of_kept)
            choice, choice_at = kernels.GREEDY, 0
            if number == ACTOR_NOW:
                choice = kernels.GIVEN
            elif number in range(TAKEN, FROZEN):
                choice, choice_at = kernels.SAMPLED if sampled else kernels.GIVEN, critic
            layers = member.net.layers()
            begins = [
                int(p.storage_offset()) + member.number * p[0].numel()
                for name in kernels.layer_names(n_hidden)
                for p in layers[name]
            ]
            goes_back = number in BACK
            lines.append(
                [
                    *(member.set_of_rows * x.stride(0), n_in, out_at[number], n_outs[number]),
                    *(choice, choice_at * n_rows, out_at[number] - self.q),
                    (number - FROZEN) * n_rows * n_in if number in range(FROZEN, TARGETS) else -1,
                    *(BACK.index(number) if goes_back else 0, number, *begins),
                    *(of_kept[name] for name in kernels.kept_names(n_hidden)),
                    *(of_d_z.get(name, 0) for name in kernels.gradient_names(n_hidden)),
                ]
            )
        self.n_kept, self.n_d_z = kept.size, d_z.size
        self.lines = torch.tensor(lines).to(x.device)
        self.back_lines = torch.tensor([lines[number] for number in BACK]).to(x.device)
        sizes = cfg, net.n_tasks, net.n_in, n_outs[ACTOR_NOW] // 2
        self.launches = [kernels.whole_launch(*sizes, backward=backward) for backward in (False, True)]
        self.table = self._gradient_table(flat, x)
        modules = [(self.members[n], n, self.members[n].net.layers()["modules"]) for n in TRAINED]
        self.modules = torch.tensor(
            [
                [number, BACK.index(number), *(flat.place(p) + member.number * p[0].numel() for p in parameters)]
                for member, number, parameters in modules
            ]
        ).to(x.device)

    def _gradient_table(self, flat: FlatParameters, x: Tensor) -> Any:
        net, n_rows = self.members[ACTOR_NOW].net, x.shape[1]
        n_hidden = len(net.route) - 1
        reads = {"base1": "base0", "module0": "opened", "head": "mixed", "route0": "scaled"}
        reads |= {f"route{i}": f"route{i - 1}" for i in range(1, n_hidden + 1)}
        gradients: list[Any] = []
        for number in TRAINED:
            member, kept, d_z = self.members[number], self._kept[number], self._d_z[number]
            for name, parameters in member.net.layers().items():
                if name == "modules":  # whose gradient is a launch of its own
                    continue
                n_out, n_in = parameters[0].shape[-2:]
                to_weight, to_bias = (flat.place(p) + member.number * p[0].numel() for p in parameters)
                rows = Rows(False, d_z[name], n_out)
                gradients.append(Sum(rows, 0, n_rows, to_bias, 1))
                if name == "task":  # its product with the one-hot tasks: of rows in task order, a sum a task
                    n = n_rows // n_in
                    gradients += [Sum(rows, t * n, n, to_weight + t, n_in) for t in range(n_in)]
                elif name == "base0":
                    at = int(x.storage_offset()) + member.set_of_rows * x.stride(0)
                    gradients.append(Product(rows, True, at, x.stride(1), n_in, to_weight))
                else:
                    gradients.append(Product(rows, False, kept[reads[name]], n_in, n_in, to_weight))
        return _gradient_table(x, [gradients], net.cfg.precision, n_rows)


class WholeNetworks:
    """All networks of one update over rows x [3,B,O+A] of tasks [B]: forward in two launches, and back in two."""

    def __init__(self, layout: Layout, flat: FlatParameters, x: Tensor, task: Tensor, normal: Tensor):
        self._layout, self._flat, self._x, self._task, self._normal = layout, flat, x, task, normal
        self._cfg: Any = layout.members[0].net.cfg
        n_rows, n, k, width = len(task), self._cfg.n_modules, self._cfg.top_k, self._cfg.module_width
        self._kept, self._outs, self._logp = (
            x.new_empty(layout.n_kept),
            x.new_empty(layout.n_outs),
            x.new_empty(len(normal)),
        )
        index = torch.empty(N_MEMBERS, n_rows, n, k, dtype=torch.int32, device=x.device)
        gate, flow = torch.empty_like(index, dtype=x.dtype), torch.empty_like(index, dtype=torch.bool)
        self._routes = index, gate, flow, index.new_empty(N_MEMBERS, n_rows)
        self._h = x.new_empty(N_MEMBERS, n, n_rows, width)
        self._opened = torch.empty_like(self._h, dtype=torch.bool)

    def act(self, given: Tensor) -> Tensor:
        """Write the actor's actions into x, at obs along the routes given [1,B,N,K] and at next_obs; returns their log
        probabilities [2B]."""
        self._run(ACTOR_NOW, TAKEN, None, None, given, self._normal)
        return self._logp

    def judge(self, critics: RouteChoice, uniform: Tensor | None, route_temp: Tensor) -> tuple[Tensor, Tensor]:
        """The critics' values [E,2B] of the actions taken and of the actor's, and the targets' [E,B] at next_obs. At
        the actions taken they run along sampled or given routes: by `critics`, or by uniform noise [E,B,R] and the
        tasks' temperatures [T]."""
        temperature, noise = (critics.temperature, critics.noise) if uniform is None else (route_temp, uniform)
        self._run(TAKEN, N_MEMBERS, temperature, noise, critics.index, None, uniform is not None)
        layout, n_rows = self._layout, len(self._task)
        q = self._outs[layout.q :][: N_CRITICS * 2 * n_rows].view(N_CRITICS, 2 * n_rows)
        return q, self._outs[layout.target_q :][: N_CRITICS * n_rows].view(N_CRITICS, n_rows)

    def go_back(self, d_q: Tensor, d_logp: Tensor) -> None:
        """From d_q [E,2B] and d_logp [B] to the flat gradient of all weights and biases."""
        layout, flat, cfg, like, n_rows = self._layout, self._flat, self._cfg, self._x, len(self._task)
        d_z = like.new_empty(layout.n_d_z)
        d_gate = like.new_empty(len(BACK), n_rows, cfg.n_modules, cfg.top_k)
        to_relu = like.new_empty(len(BACK), cfg.n_modules, n_rows, cfg.module_width)
        to_residual = torch.empty_like(to_relu) if cfg.residual else like.new_empty(0)
        d_x = like.new_empty(N_CRITICS, n_rows, layout.members[TAKEN].net.n_in)
        rest = self._kept, self._routes, self._h, self._opened, d_z, d_x, d_gate, to_relu, to_residual
        frozen, trained = layout.back_lines[:N_CRITICS], layout.back_lines[N_CRITICS:]
        own = flat.all, layout.launches[1]
        _backward(self._x, d_q, self._outs, None, None, own[0], frozen, self._task, *rest, own[1])
        _backward(self._x, d_q, self._outs, self._normal, d_logp, own[0], trained, self._task, *rest, own[1])
        index, gate, _, active = self._routes
        if cfg.n_modules > 1:
            _modules_gradient(
                *(to_relu, self._opened, self._h, index, gate, active, cfg.precision, layout.modules, flat.gradient)
            )
        # What its d_out stands for lies in d_z.
        _network_gradient(flat.gradient, layout.table, [(self._kept, self._x, d_z, d_z)])

    def _run(
        self, first: int, last: int, temperature: Any, noise: Any, given: Any, normal: Any, uniform: bool = False
    ) -> None:
        layout, cfg = self._layout, self._cfg
        _forward(
            *(self._x, self._flat.all, layout.lines[first:last], self._task, temperature, noise, given, normal),
            *(self._kept, self._outs, self._logp, self._routes, self._h, self._opened),
            *(uniform, cfg.resrouting and layout.members[0].net.training, layout.launches[0]),
        )
