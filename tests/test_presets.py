"""Configurations as JSON and back, what is refused on the way in, and the presets' own numbers."""

import dataclasses
import json

import pytest

from d2r_fast.config import RunConfig
from d2r_fast.config_json import config_from_json, config_to_json, load_config
from d2r_fast.envs import ALL_TASKS, MT10, MultiTaskEnvs
from d2r_fast.nets.agent import Actor
from d2r_fast.nets.kinds import NET_CONFIGS
from d2r_fast.presets import PRESETS, with_net


def changed(**changes) -> str:
    """The default configuration's JSON with the fields at dotted paths replaced."""
    raw = json.loads(config_to_json(RunConfig()))
    for path, value in changes.items():
        *parts, last = path.split(".")
        inner = raw
        for part in parts:
            inner = inner[part]
        inner[last] = value
    return json.dumps(raw)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    cfg = PRESETS[name][1]
    text = config_to_json(cfg)
    json.loads(text, parse_constant=pytest.fail)  # nor NaN nor infinity, which JSON does not have
    again = config_from_json(text, "here")
    assert again == cfg
    assert all(type(v) is type(getattr(cfg.net, k)) for k, v in dataclasses.asdict(again.net).items())
    assert type(again.sac.gamma) is float


def test_a_configuration_from_before_there_was_a_choice_is_of_d2r():
    raw = json.loads(config_to_json(RunConfig()))
    assert raw["net"].pop("kind") == "d2r"
    assert config_from_json(json.dumps(raw), "here") == RunConfig()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ({"kind": "hard-modules"}, "expected d2r, mlp, multi-head, .*, got 'hard-modules'"),
        ({"kind": ["mlp"]}, "got \\['mlp'\\]"),
        ({"kind": "mlp", "top_k": 2}, "top_k"),
        ({"kind": "moore", "n_experts": 500}, "net.n_experts: expected at most the last of widths"),
        ({"kind": "care", "temperature": "1"}, "expected float, got '1'"),
        (["mlp"], "expected a JSON object, got \\['mlp'\\]"),
    ],
)
def test_a_network_that_cannot_be_is_refused(net, message):
    raw = json.loads(config_to_json(RunConfig())) | {"net": net}
    with pytest.raises(ValueError, match=f"^here: not a run configuration: .*{message}"):
        config_from_json(json.dumps(raw), "here")


def test_fields_of_every_kind_survive_json():
    text = changed(
        **{"name": "other", "seed": 7, "device": "cpu", "deterministic": True, "updates_per_step": 0.3},
        **{"env.tasks": "reach,push", "env.episode_length": 5, "net.route_widths": [3, 2, 1], "net.residual": False},
        **{"sac.gamma": 0.9, "sac.init_alpha": 0.5, "eval.episodes": 8},
    )
    cfg = config_from_json(text, "here")
    assert (cfg.name, cfg.seed, cfg.device, cfg.deterministic) == ("other", 7, "cpu", True)
    assert (cfg.task_names, cfg.net.route_widths, cfg.net.residual) == (("reach", "push"), (3, 2, 1), False)
    assert (cfg.updates_per_step, cfg.sac.gamma, cfg.eval.episodes) == (0.3, 0.9, 8)
    assert config_to_json(cfg) == json.dumps(json.loads(text), indent=2) + "\n"


def test_fields_left_out_take_their_defaults():
    assert config_from_json("{}", "here") == RunConfig()


def test_whole_numbers_do_for_floats():
    cfg = config_from_json(changed(**{"sac.gamma": 1, "updates_per_step": 2}), "here")
    assert (cfg.sac.gamma, type(cfg.sac.gamma)) == (1.0, float)
    assert (cfg.updates_per_step, type(cfg.updates_per_step)) == (2.0, float)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("batch_size", 1.5, r"expected int\b.* @ \$\.batch_size"),
        ("seed", 3.0, r"expected int\b.* @ \$\.seed"),
        ("batch_size", "3", r"expected int\b.* @ \$\.batch_size"),
        ("batch_size", True, r"expected int\b.* @ \$\.batch_size"),
        ("batch_size", None, r"expected int\b.* @ \$\.batch_size"),
        ("net.top_k", True, r"expected int\b.* @ \$\.net\.top_k"),
        ("net.route_widths", [64, 1.5], r"expected int\b.* @ \$\.net\.route_widths\[1\]"),
        ("net.route_widths", "64", r"expected int\b.* @ \$\.net\.route_widths\[0\]"),
        ("net.route_widths", 64, r"expected tuple @ \$\.net\.route_widths"),
        ("net.residual", 1, r"expected bool\b.* @ \$\.net\.residual"),
        ("net.residual", "false", r"expected bool\b.* @ \$\.net\.residual"),
        ("sac.gamma", "0.9", r"expected float\b.* @ \$\.sac\.gamma"),
        ("sac.gamma", True, r"expected float\b.* @ \$\.sac\.gamma"),
        ("sac.gamma", None, r"expected float\b.* @ \$\.sac\.gamma"),
        ("env.tasks", ["reach", "push"], r"expected str\b.* @ \$\.env\.tasks"),
        ("env.tasks", 10, r"expected str\b.* @ \$\.env\.tasks"),
        ("env", None, r"@ \$\.env"),
        ("device", "gpu", r"gpu.*'auto', 'cpu', 'cuda'.*@ \$\.device"),
        ("batchsize", 256, r"extra fields found \(batchsize\) @ \$"),
        ("net.modules", 4, r"extra fields found \(modules\) @ \$\.net"),
    ],
)
def test_a_wrong_field_is_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message) as raised:
        config_from_json(changed(**{path: value}), "dir/config.json")
    assert str(raised.value).startswith("dir/config.json: not a run configuration: ")


def test_every_wrong_field_is_told_at_once():
    with pytest.raises(ValueError, match=r"\$\.seed.*\$\.net\.top_k|\$\.net\.top_k.*\$\.seed"):
        config_from_json(changed(**{"seed": "1", "net.top_k": 2.0}), "here")


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("net.top_k", 17, r"net\.top_k: expected 1\.\.n_modules=16, got 17"),
        ("batch_size", 1281, "batch_size: expected a multiple of the 10 tasks, got 1281"),
        ("env.tasks", "reach,foo", 'unknown task "foo" at position 2'),
        ("updates_per_step", float("inf"), "updates_per_step: expected a finite number over 0, got inf"),
    ],
)
def test_a_value_out_of_range_is_refused(path, value, message):
    with pytest.raises(ValueError, match=f"^here: not a run configuration: {message}"):
        config_from_json(changed(**{path: value}), "here")


@pytest.mark.parametrize("text, kind", [("[1]", "list"), ("3", "int"), ("null", "NoneType"), ('"quick"', "str")])
def test_json_that_is_no_object_is_refused(text, kind):
    with pytest.raises(ValueError, match=f"^here: not a run configuration: expected a JSON object, got {kind}$"):
        config_from_json(text, "here")


@pytest.mark.parametrize("text", ["", "{", "{'seed': 1}"])
def test_what_is_not_json_is_told_so(text):
    with pytest.raises(ValueError, match=r"^here: not JSON: .*line 1 column"):
        config_from_json(text, "here")


def test_load_config_by_name_and_by_path(tmp_path):
    assert load_config("quick") is PRESETS["quick"][1]
    path = tmp_path / "config.json"
    path.write_text(changed(seed=5))
    assert load_config(str(path)) == RunConfig(seed=5)
    for wrong in ("quik", str(tmp_path), str(tmp_path / "none.json")):
        with pytest.raises(ValueError, match=r"expected a preset \(mt10-rand, .*, mt50-film\) or the path of a config"):
            load_config(wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_tasks_exist(name):
    cfg = PRESETS[name][1]
    assert set(cfg.task_names) <= set(ALL_TASKS)
    assert cfg.n_tasks == len(set(cfg.task_names)) >= 1
    assert cfg.name == name


def test_mt10_rand_is_the_published_setting():
    """Section 7 of the algorithm's specification; learning rates, network and clip from sections 1 and 6."""
    cfg = PRESETS["mt10-rand"][1]
    assert cfg.task_names == MT10
    assert (cfg.total_steps, cfg.warmup_steps, cfg.chunk_steps) == (7_500 * 200, 20 * 200, 200)
    assert cfg.updates_per_step == 200 / 200
    assert (cfg.batch_size, cfg.replay_capacity) == (1280, 1_000_000)
    assert (cfg.env.envs_per_task, cfg.env.episode_length, cfg.env.reward_scale) == (1, 200, 0.1)
    assert (cfg.eval.every_chunks * cfg.chunk_steps, cfg.eval.episodes) == (50 * 200, 32)
    sac = cfg.sac
    assert (sac.actor_lr, sac.critic_lr, sac.alpha_lr) == (3e-4, 3e-4, 1e-4)
    assert (sac.gamma, sac.target_rate, sac.max_grad_norm, sac.max_task_loss) == (0.99, 0.005, 1.0, 3000.0)
    net = cfg.net
    assert (net.n_modules, net.top_k, net.module_width, net.base_width) == (16, 2, 128, 400)
    assert (net.route_widths, net.residual, net.resrouting) == ((256, 256), True, True)
    actor = Actor(MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, cfg.n_tasks, net)
    # The published count of 684,250 includes its actor's 10 route temperatures, which are the agent's here (dev 5).
    assert sum(p.numel() for p in actor.parameters()) + cfg.n_tasks == 684_250


# How each code trains: rate of alpha, largest alpha, task weights, eps of Adam, clipping, losses left out, order.
METHODS = {
    "mlp": (3e-4, None, False, 1e-8, 1.0, None, "alpha_first"),
    "multi-head": (3e-4, None, False, 1e-8, 1.0, None, "alpha_first"),
    "soft-modules": (3e-4, None, True, 1e-8, 1.0, None, "alpha_first"),
    "paco": (1e-4, 1.0, False, 1e-7, None, 3000.0, "joint"),
    "moore": (1e-4, None, False, 1e-8, None, None, "actor_first"),
    "care": (3e-4, None, False, 1e-8, None, None, "critics_first"),
    "film": (3e-4, None, False, 1e-8, None, None, "critics_first"),
}


@pytest.mark.parametrize("kind", NET_CONFIGS)
@pytest.mark.parametrize("suite", ["mt10", "mt50"])
def test_a_method_trains_as_its_code_does_in_the_setting_of_d2r(suite, kind):
    ours, d2r = PRESETS[f"{suite}-{'rand' if kind == 'd2r' else kind}"][1], PRESETS[f"{suite}-rand"][1]
    assert ours.net.kind == kind
    assert dataclasses.replace(ours, name=d2r.name, net=d2r.net, sac=d2r.sac) == d2r
    sac = ours.sac
    if kind in METHODS:
        told = (sac.alpha_lr, sac.max_alpha, sac.task_weights, sac.adam_eps, sac.max_grad_norm, sac.max_task_loss)
        assert (*told, sac.order) == METHODS[kind]
        assert sac.clip_alpha == (sac.order != "alpha_first") and sac.reset_extreme == (kind == "paco")


@pytest.mark.parametrize("kind", NET_CONFIGS)
def test_a_network_comes_in_the_sizes_that_suit_the_run(kind):
    for name in ("mt10-rand", "mt50-rand", "quick"):
        cfg = PRESETS[name][1]
        other = with_net(cfg, kind)
        assert dataclasses.replace(other, net=cfg.net) == cfg
        if name != "quick":
            assert other.net == PRESETS[f"{name[:4]}-{'rand' if kind == 'd2r' else kind}"][1].net
        else:
            actor = Actor(MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, cfg.n_tasks, other.net)
            assert 50_000 < sum(p.numel() for p in actor.parameters()) < 90_000
    assert with_net(RunConfig(net=PRESETS["quick"][1].net), "d2r").net == PRESETS["quick"][1].net  # it has it already


@pytest.mark.parametrize("preset", ["quick", "mt10-small"])
def test_networks_of_a_small_preset_have_equal_sizes(preset):
    """Within a fifth of D2R's parameters an actor; of mt10-small within a hundredth."""
    cfg = PRESETS[preset][1]
    counts = {
        kind: sum(p.numel() for p in with_net(cfg, kind).net.make(39, 8, cfg.n_tasks, 1, "actor").parameters())
        for kind in NET_CONFIGS
    }
    assert len(set(counts.values())) > 1
    most = 0.2 if preset == "quick" else 0.01
    assert all(abs(count / counts["d2r"] - 1) < most for count in counts.values()), counts
