"""Everything that an update changes as a few long buffers, of which the networks' parameters are views."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2r_fast.nets.agent import N_CRITICS, Agent

PARTS = ("actor", "critics", "alpha")
ALIGNMENT = 16  # numbers: every parameter begins at a multiple of 64 bytes in float32


class Part(NamedTuple):
    """One owner's stretch of the buffers.

    begin, end  of it
    networks    their numbers: the rows of its gradient norms
    segments    as `FlatParameters.segments`, counted from where it begins and from its first network
    """

    begin: int
    end: int
    networks: range
    segments: Tensor


class FlatParameters:
    """Moves an agent's parameters into flat buffers; its modules, their names and state_dict stay as they are.

    Not for an agent that is moved to another device or dtype afterwards, which would give it parameters of its own.

    values    [n] actor, critics, log alpha, in this order, each parameter aligned, with zeros between them
    targets   [m] the target critics, laid out as the critics within `values`
    all       [n+m] both: one allocation, so that a place in it says where a parameter lies
    gradient  [n] laid out as `values`; `gradients` gives the views
    segments  [S,3] int64 on the CPU: begin, end and network of every run of one network's numbers; network 0 is the
              actor, then each critic, then log alpha
    parts     "actor", "critics" and "alpha"
    """

    def __init__(self, agent: Agent):
        self.agent = agent
        groups = [(list(agent.actor.parameters()), 1), (list(agent.critics.parameters()), N_CRITICS)]
        groups.append(([agent.log_alpha], 1))
        runs: list[tuple[int, int, int]] = []
        places: list[tuple[nn.Parameter, int]] = []
        begins: list[int] = []
        at = network = 0
        for parameters, n_nets in groups:
            begins.append(at)
            for parameter in parameters:
                places.append((parameter, at))
                per_net = parameter.numel() // n_nets
                runs += [(at + e * per_net, at + (e + 1) * per_net, network + e) for e in range(n_nets)]
                at = aligned(at + parameter.numel())
            network += n_nets
        self.n_networks = network
        self.segments = torch.tensor([run for run in runs if run[0] < run[1]], dtype=torch.int64)
        self.targets_begin, targets_end = begins[1], begins[2]
        ends, firsts = [*begins[1:], at], [0, 1, 1 + N_CRITICS, network]
        self.parts = {
            name: self._part(begin, end, range(*numbers))
            for name, begin, end, numbers in zip(PARTS, begins, ends, pairwise(firsts), strict=True)
        }
        first_of_critics = len(groups[0][0])
        target_places = [
            (parameter, at + place - self.targets_begin)
            for parameter, (_, place) in zip(agent.target_critics.parameters(), places[first_of_critics:], strict=False)
        ]
        self.all = _moved(places + target_places, at + targets_end - self.targets_begin)
        self.values, self.targets = self.all[:at], self.all[at:]
        self.gradient = torch.zeros_like(self.values)
        self._places: dict[Tensor, int] = dict(places)

    def _part(self, begin: int, end: int, networks: range) -> Part:
        own = (self.segments[:, 2] >= networks.start) & (self.segments[:, 2] < networks.stop)
        return Part(begin, end, networks, self.segments[own] - torch.tensor([begin, begin, networks.start]))

    def gradients(self, parameters: list[Tensor]) -> list[Tensor]:
        """Where the gradients of these parameters go: views of `gradient`."""
        return [self.view(self.gradient, parameter) for parameter in parameters]

    def place(self, parameter: Tensor) -> int:
        """Where a parameter's numbers begin in a buffer laid out as `values`."""
        return self._places[parameter]

    def operands(self, precision: str, own: slice) -> Tensor:
        """What products take weights from, laid out as `all`: that; in bf16 a copy of its part `own`, rounded once
        instead of in every tile, which then reads half. Made anew in each call: parameters change in between."""
        if precision != "bf16":
            return self.all
        rounded = torch.empty_like(self.all, dtype=torch.bfloat16)
        rounded[own] = self.all[own]
        return rounded

    def view(self, buffer: Tensor, parameter: Tensor) -> Tensor:
        """What belongs to a parameter in a buffer laid out as `values`."""
        begin = self.place(parameter)
        return buffer[begin : begin + parameter.numel()].view(parameter.shape)


def aligned(at: int) -> int:
    """The next place at which a parameter may begin."""
    return -(-at // ALIGNMENT) * ALIGNMENT


def _moved(places: list[tuple[nn.Parameter, int]], size: int) -> Tensor:
    """A buffer that holds the parameters' values at their places, and is where they live from now on."""
    like = places[0][0]
    buffer = torch.zeros(size, dtype=like.dtype, device=like.device)
    for parameter, begin in places:
        view = buffer[begin : begin + parameter.numel()].view(parameter.shape)
        view.copy_(parameter.detach())
        parameter.data = view
    return buffer
