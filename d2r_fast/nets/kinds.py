"""The networks to choose from, by name."""

from d2r_fast.nets.care import CareConfig
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.film import FilmConfig
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.nets.moore import MooreConfig
from d2r_fast.nets.multi_head import MultiHeadConfig
from d2r_fast.nets.paco import PacoConfig
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.nets.soft_modules import SoftModulesConfig

_ALL: tuple[type[NetConfigBase], ...] = (
    NetConfig,
    MlpConfig,
    MultiHeadConfig,
    SoftModulesConfig,
    PacoConfig,
    MooreConfig,
    CareConfig,
    FilmConfig,
)
NET_CONFIGS = {cfg.kind: cfg for cfg in _ALL}
