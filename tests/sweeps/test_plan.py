"""What a sweep consists of: every combination once, each checked as `d2r train` checks it, before anything starts."""

import pytest
import tiny

from d2r_fast.config_json import config_to_json
from d2r_fast.nets.soft_modules import SoftModulesConfig
from d2r_fast.presets import PRESETS, with_net
from d2r_fast.sweeps.plan import Grid, Setting, parse_nets, parse_seeds, parse_setting, plan_runs


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(config_to_json(tiny.RUN))
    return str(path)


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", (0, 1, 2, 3)), ("7", (7,)), ("0,2-3, 9", (0, 2, 3, 9)), ("4294967295", (2**32 - 1,))]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "0-", "0,,1", "4294967296", "0-4294967295", "1.5", "٣"])
def test_bad_seeds_are_one_line(text):
    with pytest.raises(ValueError, match=r"^--seeds: expected .* got ") as caught:
        parse_seeds(text)
    assert "\n" not in str(caught.value)


def test_what_is_asked_for_twice_is_refused(preset):
    with pytest.raises(ValueError, match=r"^--seeds: expected each value once, got 2 twice$"):
        parse_seeds("0-3,2")
    with pytest.raises(ValueError, match=r"^--nets: expected each value once, got mlp twice$"):
        parse_nets("mlp,d2r,mlp")
    with pytest.raises(ValueError, match=r"^--set net.top_k: expected each value once, got 1 twice$"):
        parse_setting("net.top-k=1,1")
    with pytest.raises(ValueError, match=r"^--set: expected each value once, got net.top_k twice$"):
        plan_runs(Grid(preset, (0,), settings=(Setting("net.top_k", ("1",)), Setting("net.top_k", ("2",)))))
    with pytest.raises(ValueError, match=r"^sac.gamma=0.90-seed0: .* got sac.gamma=0.9-seed0 again$"):
        plan_runs(Grid(preset, (0,), settings=(Setting("sac.gamma", ("0.9", "0.90")),)))


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("net.top_k=1,2,4", Setting("net.top_k", ("1", "2", "4"))),
        ("--net.top-k=1", Setting("net.top_k", ("1",))),
        ("env.tasks=reach,push;door-open", Setting("env.tasks", ("reach,push", "door-open"))),
        ("net.route_widths=8 8, 16", Setting("net.route_widths", ("8 8", "16"))),
    ],
)
def test_settings(text, setting):
    assert parse_setting(text) == setting


@pytest.mark.parametrize("text", ["", "net.top_k", "net.top_k=", "=1,2", "net.top_k=1,,2", "seed=1,2"])
def test_bad_settings_are_one_line(text):
    with pytest.raises(ValueError, match=r"^--set: expected .* got ") as caught:
        parse_setting(text)
    assert "\n" not in str(caught.value)


def test_every_combination_is_a_run(preset):
    settings = (Setting("net.top_k", ("1", "2")), Setting("sac.gamma", ("0.9",)))
    runs = plan_runs(Grid(preset, (0, 3), settings=settings, overrides=("--total-steps", "40")))
    assert [run.name for run in runs] == [
        "net.top_k=1-sac.gamma=0.9-seed0",
        "net.top_k=2-sac.gamma=0.9-seed0",
        "net.top_k=1-sac.gamma=0.9-seed3",
        "net.top_k=2-sac.gamma=0.9-seed3",
    ]
    assert [(run.cfg.net.top_k, run.cfg.sac.gamma, run.cfg.seed) for run in runs] == [
        *[(1, 0.9, 0), (2, 0.9, 0), (1, 0.9, 3), (2, 0.9, 3)]
    ]
    assert {run.cfg.total_steps for run in runs} == {40}
    assert {run.cfg.env for run in runs} == {tiny.RUN.env}


def test_networks_come_as_train_makes_them():
    quick = PRESETS["quick"][1]
    runs = plan_runs(Grid("quick", (0,), nets=("d2r", "soft-modules")))
    assert [run.name for run in runs] == ["d2r-seed0", "soft-modules-seed0"]
    assert [run.cfg for run in runs] == [quick, with_net(quick, SoftModulesConfig.kind)]
    (alone,) = plan_runs(Grid("quick", (0,), net="soft-modules"))
    assert alone == ("seed0", with_net(quick, SoftModulesConfig.kind))


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        (Setting("net.resrouting", ("false",)), "net.resrouting=false-seed0", False),
        (Setting("net.resrouting", ("True",)), "net.resrouting=True-seed0", True),
        (Setting("net.route_widths", ("8 9",)), "net.route_widths=8_9-seed0", (8, 9)),
        (Setting("sac.max_grad_norm", ("None",)), "sac.max_grad_norm=None-seed0", None),
        (Setting("env.tasks", ("reach,push",)), "env.tasks=reach_push-seed0", "reach,push"),
        (Setting("total_steps", ("40",)), "total_steps=40-seed0", 40),
        (Setting("overlap", ("false",)), "overlap=false-seed0", False),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_values_of_every_kind(preset, setting, name, value):
    (run,) = plan_runs(Grid(preset, (0,), settings=(setting,)))
    found = run.cfg
    for part in setting.field.split("."):
        found = getattr(found, part)
    assert (run.name, found) == (name, value)


def test_values_that_names_cannot_tell_apart_are_refused(preset):
    with pytest.raises(ValueError, match=r"^net.route_widths=8_8-seed0: .* got net.route_widths=8_8-seed0 again$"):
        plan_runs(Grid(preset, (0,), settings=(Setting("net.route_widths", ("8 8", "8\t8")),)))


SET = "settings"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"preset": "quik"}, "'quik': expected a preset (mt10-rand,"),
        ({"nets": ("d2r", "resnet")}, "--net: expected one of d2r, mlp,"),
        ({"net": "mlp", "nets": ("d2r",)}, "--net: expected either it or --nets, got both"),
        ({"overrides": ("--seed", "1")}, "--seed: expected the seeds as --seeds"),
        ({"overrides": ("--seed=1",)}, "--seed: expected the seeds as --seeds"),
        ({"overrides": ("--totl-steps", "5")}, "Unrecognized options: --totl-steps, 5"),
        ({"overrides": ("--total-steps", "many")}, "Error parsing --total-steps: invalid literal"),
        ({"overrides": ("--total-steps",)}, "Missing value for argument '--total-steps'. Expected 1 values."),
        ({"overrides": ("--batch-size", "7")}, "batch_size: expected a multiple of the 2 tasks, got 7"),
        ({SET: (Setting("net.topk", ("1",)),)}, "--set net.topk: expected a setting of a run with network d2r (net."),
        ({SET: (Setting("nett.top_k", ("1",)),)}, "--set nett.top_k: expected a setting of a run with network d2r (n"),
        ({SET: (Setting("net", ("1",)),)}, "--set net: expected one of its settings (net.backend,"),
        ({SET: (Setting("net.residual", ("on",)),)}, "--set net.residual: expected true or false, got 'on'"),
        ({SET: (Setting("net.top_k", ("x",)),)}, "net.top_k=x-seed0: Error parsing --net.top-k: invalid literal"),
        ({SET: (Setting("net.top_k", ("9",)),)}, "net.top_k=9-seed0: Error parsing net: net.top_k: expected 1..n_mod"),
        ({SET: (Setting("net.top_k", ("1",)),), "nets": ("d2r", "mlp")}, "--set net.top_k: expected a setting of"),
        ({SET: (Setting("chunk_steps", ("7",)),)}, "chunk_steps=7-seed0: Error parsing RunConfig: chunk_steps: exp"),
        ({SET: (Setting("sac.order", ("x",)),)}, "sac.order=x-seed0: invalid choice 'x' for argument '--sac.order'."),
    ],
    ids=str,
)
def test_what_train_refuses_is_one_line(preset, asked, said, capsys):
    with pytest.raises(ValueError) as caught:
        plan_runs(Grid(**({"preset": preset, "seeds": (0,)} | asked)))
    text = str(caught.value)
    assert said in text
    assert "\n" not in text
    assert capsys.readouterr() == ("", "")
