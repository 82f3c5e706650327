"""FiLM: an encoder whose layers are scaled and shifted by the task, before a multilayer perceptron that reads the
task's embedding too.

As the JAX port (rainx0r/metaworld-algorithms 30c9991), whose sizes these are. Initial values: mtrl, the published code
(facebookresearch/mtrl e282c3f).

dev   paper, mtrl                                       port, and here
1     paper: a scale and a shift for every feature      one scale and one shift a layer; so does mtrl
2     paper: ReLU behind them                           before them; so does mtrl
3     mtrl: scales and shifts join before the torso     the embedding does
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2r_fast.nets.layers import EnsembleLinear, Table, TaskRows, in_turn, linear_layers, multiply_adds, xavier
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase, Role


@dataclass(frozen=True, kw_only=True)
class FilmConfig(NetConfigBase):
    """Sizes of one FiLM network; actor and critics share them."""

    kind: ClassVar[str] = "film"

    embedding_width: int = 50
    """C, width of a task's embedding and of what the encoder gives."""
    encoder_widths: tuple[int, ...] = (50, 50)
    """D_e, hidden widths of the encoder and of the network of scales and shifts."""
    widths: tuple[int, ...] = (400, 400, 400)
    """D, hidden widths behind the encoder."""

    def __post_init__(self) -> None:
        self.require_positive("embedding_width", "encoder_widths", "widths")

    @property
    def widest(self) -> int:
        return max(2 * self.embedding_width, *self.encoder_widths, *self.widths)

    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> "Film":
        return Film(n_in, n_out, n_tasks, n_nets, self)


class Film(UnroutedNetwork):
    """E FiLM networks."""

    def __init__(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, cfg: FilmConfig):
        super().__init__(n_in, n_tasks, n_nets, cfg)
        width, inner = cfg.embedding_width, cfg.encoder_widths
        self.embedding = Table(n_nets, n_tasks, width)
        self.film = linear_layers(n_nets, (width, *inner, 2 * (len(inner) + 1)), cfg, xavier)
        self.encoder = linear_layers(n_nets, (n_in, *inner, width), cfg, xavier)
        self.torso = linear_layers(n_nets, (2 * width, *cfg.widths), cfg, xavier)
        self.head = EnsembleLinear(n_nets, cfg.widths[-1], n_out, cfg, xavier)

    def equations(self, x: Tensor, rows: TaskRows) -> Tensor:
        h = self.embedding.weight.relu()  # [E,T,C]
        numbers = rows.pick(in_turn(self.film, h))  # [E,B,2 (L_e+1)]
        gammas, betas = numbers[..., 0::2], numbers[..., 1::2]
        *hidden, last = self.encoder
        for i, layer in enumerate(hidden):
            x = gammas[..., i, None] * layer(x, relu=True) + betas[..., i, None]  # [E,B,D_e]
        v = gammas[..., -1:] * last(x) + betas[..., -1:]  # [E,B,C]
        x = torch.cat([v, rows.pick(h)], -1)  # [E,B,2C]
        return in_turn([*self.torso, self.head], x)  # [E,B,o]

    @property
    def multiply_adds(self) -> int:
        return multiply_adds(*self.encoder, *self.torso, self.head)
