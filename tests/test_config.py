"""Settings: the defaults are the published run, and every wrong value is refused where it is made, by name."""

import dataclasses

import pytest

from d2r_fast.config import EnvConfig, EvalConfig, RunConfig, SacConfig
from d2r_fast.envs.metaworld import MT10
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.mlp import MlpConfig

NAN = float("nan")


def test_defaults_are_the_published_mt10_run():
    run = RunConfig()
    assert run.net == NetConfig(
        n_modules=16,
        top_k=2,
        module_width=128,
        base_width=400,
        route_widths=(256, 256),
        residual=True,
        resrouting=True,
        dynamic_depth=True,
    )
    assert run.net.n_logits == 136
    assert run.sac == SacConfig(
        gamma=0.99,
        target_rate=0.005,
        actor_lr=3e-4,
        critic_lr=3e-4,
        alpha_lr=1e-4,
        init_alpha=1.0,
        max_grad_norm=1.0,
        max_task_loss=3000.0,
        route_balancing=True,
        actor_routes="replayed",
    )
    assert run.env == EnvConfig(tasks="MT10", envs_per_task=1, episode_length=200, reward_scale=0.1)
    assert run.task_names == MT10 and run.n_tasks == 10
    assert run.eval.every_chunks * run.chunk_steps == 50 * 200 and run.eval.episodes == 32
    assert run.total_steps == 7_500 * 200 == 1_500_000
    assert run.warmup_steps == 20 * 200
    assert run.chunk_steps == 200 and run.updates_per_step == 1
    assert run.batch_size == 1280 == 128 * run.n_tasks
    assert run.replay_capacity == 1_000_000
    assert run.bootstrap_at_time_limit  # ours; the published code stores the time limit as terminal


@pytest.mark.parametrize("n", [1, 2, 16, 32])
def test_n_logits_has_i_of_them_for_route_i(n):
    assert NetConfig(n_modules=n, top_k=1).n_logits == sum(range(1, n + 1))


@pytest.mark.parametrize("config", [NetConfig, SacConfig, EnvConfig, EvalConfig, RunConfig])
def test_settings_are_keywords_and_cannot_be_changed(config):
    made = config()
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, getattr(made, name))
    with pytest.raises(TypeError):
        config(getattr(made, name))
    with pytest.raises(TypeError, match="unheard_of"):
        config(unheard_of=1)
    assert made == config() and hash(made) == hash(config())


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (NetConfig, {"n_modules": 32, "top_k": 32}),
        (NetConfig, {"n_modules": 1, "top_k": 1, "module_width": 1, "base_width": 1, "route_widths": (1,)}),
        (SacConfig, {"gamma": 0.0, "target_rate": 1.0, "init_alpha": 1.0}),
        (SacConfig, {"gamma": 1.0, "target_rate": 1e-9, "init_alpha": 1e-9, "actor_lr": 1e-12}),
        (SacConfig, {"max_alpha": None, "max_grad_norm": None, "max_task_loss": None, "task_weights": False}),
        (EnvConfig, {"envs_per_task": 1, "episode_length": 1, "reward_scale": 1e-9}),
        (EnvConfig, {"episode_length": 500}),
        (EvalConfig, {"every_chunks": 1, "episodes": 1, "envs_per_task": 1}),
        (EvalConfig, {"episodes": 8, "envs_per_task": 8}),
        (RunConfig, {"name": "a-B_3.x", "seed": 2**32 - 1}),
        (RunConfig, {"total_steps": 200, "warmup_steps": 200, "batch_size": 10, "replay_capacity": 2000}),
        (RunConfig, {"env": EnvConfig(tasks="reach", envs_per_task=25), "batch_size": 7, "updates_per_step": 0.01}),
    ],
)
def test_the_limits_themselves_are_allowed(config, settings):
    made = config(**settings)
    assert {name: getattr(made, name) for name in settings} == settings


WRONG = [
    (NetConfig, {"n_modules": 0}, "net.n_modules", "1..32", "0"),
    (NetConfig, {"n_modules": 33}, "net.n_modules", "1..32", "33"),
    (NetConfig, {"top_k": 0}, "net.top_k", "1..n_modules=16", "0"),
    (NetConfig, {"n_modules": 4, "top_k": 5}, "net.top_k", "1..n_modules=4", "5"),
    (NetConfig, {"module_width": 0}, "net.module_width", "at least 1", "0"),
    (NetConfig, {"base_width": -3}, "net.base_width", "at least 1", "-3"),
    (NetConfig, {"route_widths": ()}, "net.route_widths", "one or more positive widths", "()"),
    (NetConfig, {"route_widths": (64, 0)}, "net.route_widths", "one or more positive widths", "(64, 0)"),
    (SacConfig, {"gamma": -0.1}, "sac.gamma", "0..1", "-0.1"),
    (SacConfig, {"gamma": 1.01}, "sac.gamma", "0..1", "1.01"),
    (SacConfig, {"gamma": NAN}, "sac.gamma", "0..1", "nan"),
    (SacConfig, {"target_rate": 0.0}, "sac.target_rate", "within (0, 1]", "0.0"),
    (SacConfig, {"target_rate": 1.5}, "sac.target_rate", "within (0, 1]", "1.5"),
    (SacConfig, {"init_alpha": 0.0}, "sac.init_alpha", "within (0, 1]", "0.0"),
    (SacConfig, {"init_alpha": 2.0}, "sac.init_alpha", "within (0, 1]", "2.0"),
    (SacConfig, {"actor_lr": 0.0}, "sac.actor_lr", "a finite number over 0", "0.0"),
    (SacConfig, {"critic_lr": -1.0}, "sac.critic_lr", "a finite number over 0", "-1.0"),
    (SacConfig, {"alpha_lr": NAN}, "sac.alpha_lr", "a finite number over 0", "nan"),
    (SacConfig, {"max_grad_norm": 0.0}, "sac.max_grad_norm", "a finite number over 0", "0.0"),
    (SacConfig, {"max_task_loss": -5.0}, "sac.max_task_loss", "a finite number over 0", "-5.0"),
    (SacConfig, {"adam_eps": 0.0}, "sac.adam_eps", "a finite number over 0", "0.0"),
    (SacConfig, {"max_alpha": 0.0}, "sac.max_alpha", "a finite number over 0", "0.0"),
    (SacConfig, {"max_alpha": 0.5}, "sac.init_alpha", "at most max_alpha=0.5", "1.0"),
    (SacConfig, {"actor_lr": float("inf")}, "sac.actor_lr", "a finite number over 0", "inf"),
    (EnvConfig, {"envs_per_task": 0}, "env.envs_per_task", "at least 1", "0"),
    (EnvConfig, {"episode_length": 0}, "env.episode_length", "1..500", "0"),
    (EnvConfig, {"episode_length": 501}, "env.episode_length", "1..500", "501"),
    (EnvConfig, {"reward_scale": 0.0}, "env.reward_scale", "more than 0", "0.0"),
    (EvalConfig, {"every_chunks": 0}, "eval.every_chunks", "at least 1", "0"),
    (EvalConfig, {"episodes": 0}, "eval.episodes", "at least 1", "0"),
    (EvalConfig, {"envs_per_task": -1}, "eval.envs_per_task", "at least 1", "-1"),
    (EvalConfig, {"episodes": 9}, "eval.episodes", "a multiple of eval.envs_per_task=8", "9"),
    (RunConfig, {"name": ""}, "name", "letters, digits, '-', '_' or '.'", "''"),
    (RunConfig, {"name": "a/b"}, "name", "letters, digits, '-', '_' or '.'", "'a/b'"),
    (RunConfig, {"name": "a b"}, "name", "letters, digits, '-', '_' or '.'", "'a b'"),
    (RunConfig, {"seed": -1}, "seed", "0..2**32-1", "-1"),
    (RunConfig, {"seed": 2**32}, "seed", "0..2**32-1", "4294967296"),
    (RunConfig, {"total_steps": 0}, "total_steps", "at least 1", "0"),
    (RunConfig, {"warmup_steps": 0}, "warmup_steps", "at least 1", "0"),
    (RunConfig, {"chunk_steps": 0}, "chunk_steps", "at least 1", "0"),
    (RunConfig, {"batch_size": 0}, "batch_size", "at least 1", "0"),
    (RunConfig, {"checkpoint_every_chunks": 0}, "checkpoint_every_chunks", "at least 1", "0"),
    (RunConfig, {"updates_per_step": 0.0}, "updates_per_step", "a finite number over 0", "0.0"),
    (
        RunConfig,
        {"env": EnvConfig(envs_per_task=3)},
        "chunk_steps",
        "a multiple of env.envs_per_task=3",
        "200",
    ),
    (RunConfig, {"total_steps": 300}, "total_steps", "a multiple of chunk_steps=200", "300"),
    (RunConfig, {"warmup_steps": 100}, "warmup_steps", "a multiple of chunk_steps=200", "100"),
    (RunConfig, {"batch_size": 1281}, "batch_size", "a multiple of the 10 tasks", "1281"),
    (RunConfig, {"replay_capacity": 1999}, "replay_capacity", "at least chunk_steps x tasks = 2000", "1999"),
    (RunConfig, {"replay_capacity": -1}, "replay_capacity", "at least chunk_steps x tasks = 2000", "-1"),
]


@pytest.mark.parametrize(
    ("config", "settings", "field", "expectation", "got"), WRONG, ids=[f"{case[2]}={case[4]}" for case in WRONG]
)
def test_a_wrong_value_is_refused_by_name(config, settings, field, expectation, got):
    with pytest.raises(ValueError) as refused:
        config(**settings)
    message = str(refused.value)
    assert message == f"{field}: expected {expectation}, got {got}"


def test_settings_of_a_method_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"sac\.max_task_loss: expected None with order 'actor_first', .* got 3000\.0"):
        SacConfig(order="actor_first")
    with pytest.raises(ValueError, match=r"sac\.reset_extreme: expected False without max_task_loss, .* got True"):
        SacConfig(reset_extreme=True, max_task_loss=None)
    with pytest.raises(ValueError, match=r"sac\.reset_extreme: expected False with network d2r, .* got True"):
        RunConfig(sac=SacConfig(reset_extreme=True))


@pytest.mark.parametrize("settings", [{"route_balancing": False}, {"actor_routes": "greedy"}])
def test_a_network_without_routes_refuses_settings_of_routes(settings):
    sac = SacConfig(**settings)
    assert RunConfig(sac=sac).sac == sac
    expected = (
        r"sac\.route_balancing, sac\.actor_routes: expected the defaults with network mlp, .* got (True|False), '.*'"
    )
    with pytest.raises(ValueError, match=expected):
        RunConfig(sac=sac, net=MlpConfig())


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("", "no task named"),
        ("reach,puhs", 'unknown task "puhs" at position 2, did you mean "push"'),
        ("reach,reach", "reach"),
        ("reach,", 'unknown task "" at position 2'),
    ],
)
def test_unknown_tasks_are_refused_with_the_run(tasks, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(env=EnvConfig(tasks=tasks))


def test_tasks_are_counted_from_their_list():
    run = RunConfig(env=EnvConfig(tasks="push, Reach-v3"), batch_size=4)
    assert run.task_names == ("push", "reach") and run.n_tasks == 2
