"""Sizes at which a network acts and a run trains in a second."""

from d2r_fast.config import EnvConfig, EvalConfig, RunConfig
from d2r_fast.nets.care import CareConfig
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.film import FilmConfig
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.nets.moore import MooreConfig
from d2r_fast.nets.multi_head import MultiHeadConfig
from d2r_fast.nets.paco import PacoConfig
from d2r_fast.nets.soft_modules import SoftModulesConfig

WIDTHS = {"embedding_width": 8, "encoder_widths": (10, 9), "widths": (8, 7)}
# The networks without routes.
NETS = (
    MlpConfig(widths=(6, 5)),
    MultiHeadConfig(widths=(6, 5)),
    SoftModulesConfig(n_layers=3, n_modules=2, module_width=4, base_widths=(6, 5), gating_widths=(5, 3)),
    PacoConfig(n_sets=3, widths=(6, 5)),
    MooreConfig(n_experts=3, widths=(6, 5)),
    CareConfig(n_experts=3, temperature=0.7, **WIDTHS),
    FilmConfig(**WIDTHS),
)
NET = NetConfig(n_modules=4, top_k=2, module_width=8, base_width=16, route_widths=(8,))

# Ten chunks, the first two of them warm-up; the replay's 30 rows a task come round three times.
RUN = RunConfig(
    name="tiny",
    device="cpu",
    env=EnvConfig(tasks="reach,drawer-close", envs_per_task=2, episode_length=5),
    net=NET,
    eval=EvalConfig(every_chunks=3, episodes=1, envs_per_task=1),
    total_steps=80,
    warmup_steps=20,
    chunk_steps=10,
    updates_per_step=0.5,
    batch_size=8,
    replay_capacity=60,
    checkpoint_every_chunks=2,
)
