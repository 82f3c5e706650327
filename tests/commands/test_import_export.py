"""`d2r import` and `d2r export`: published checkpoints in and out, policies out, and what is wrong with a file."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_cli import Outcome, contents, d2r, empty_folder  # noqa: F401  (a fixture)

from d2r_fast import NetConfig, RoutedNetwork
from d2r_fast.config_json import load_config
from d2r_fast.nets.agent import Agent
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.nets.published import load_published, published_sizes, to_published
from d2r_fast.training.checkpoint import find_checkpoint, load_checkpoint
from d2r_fast.training.imported import begin_run

NET = NetConfig(n_modules=5, top_k=2, module_width=8, base_width=12, route_widths=(10, 9))
T = 2
RUN = dataclasses.replace(tiny.RUN, net=NET)
# A run as short as `tiny.RUN`, for `d2r import` to make.
SHORT = (
    *("--env.tasks", "reach,drawer-close", "--env.envs-per-task", "2", "--env.episode-length", "5", "--device", "cpu"),
    *("--eval.every-chunks", "3", "--eval.episodes", "1", "--eval.envs-per-task", "1", "--total-steps", "40"),
    *("--warmup-steps", "20", "--chunk-steps", "10", "--updates-per-step", "0.5", "--batch-size", "8"),
    *("--replay-capacity", "60", "--checkpoint-every-chunks", "2"),
)

pytestmark = pytest.mark.usefixtures("restore_torch_switches")


def agent_of(net=NET, n_tasks=T) -> Agent:
    agent = Agent(39, 4, n_tasks, net)
    agent.route_temp.copy_(torch.rand(n_tasks) + 0.5)
    return agent


def saved(agent: Agent) -> list[str]:
    """Its published files in this folder: actor, two critics."""
    nets = to_published(agent.actor.net.state_dict(), agent.route_temp)
    nets += to_published(agent.critics.net.state_dict(), agent.route_temp)
    names = ["model_pf_best.pth", "model_qf1_best.pth", "model_qf2_best.pth"]
    for name, net in zip(names, nets, strict=True):
        torch.save(net, name)
    return names


def test_published_files_come_in_and_go_out_as_they_were():
    agent = agent_of()
    files = saved(agent)
    outcome = d2r("import", *files, *SHORT, "--run-dir", "run")
    assert outcome.code == 0, outcome.err
    assert f"critics    {files[1]}, {files[2]}" in outcome.out.splitlines()
    assert load_config("run/config.json").net == NET
    held = load_checkpoint(find_checkpoint(Path("run")))["agent"]
    expected = agent.state_dict() | {
        name.replace("critics", "target_critics", 1): value
        for name, value in agent.state_dict().items()
        if name.startswith("critics")
    }
    assert expected.keys() == held.keys()
    assert all(torch.equal(value, held[name]) for name, value in expected.items())

    outcome = d2r("export", "run", "--published", "--out", "again")
    assert outcome.code == 0, outcome.err
    for ours, theirs in zip(("again-pf.pth", "again-qf1.pth", "again-qf2.pth"), files, strict=True):
        a, b = torch.load(ours), torch.load(theirs)
        assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    assert {path.name for path in Path().glob("again*")} == {"again-pf.pth", "again-qf1.pth", "again-qf2.pth"}


def test_an_imported_run_is_evaluated_and_gone_on_with():
    outcome = d2r("import", saved(agent_of())[0], *SHORT, "--run-dir", "run")
    assert outcome.code == 0, outcome.err
    assert "critics    fresh ones: no file of theirs was given" in outcome.out.splitlines()
    before = contents(Path("run"))
    outcome = d2r("eval", "run", "--episodes", "1", "--envs-per-task", "1", "--json", "result.json")
    assert outcome.code == 0, outcome.err
    assert json.loads(Path("result.json").read_text())["tasks"] == ["reach", "drawer-close"]
    assert contents(Path("run")) == before
    outcome = d2r("train", "--resume", "run")
    assert outcome.code == 0, outcome.err
    assert find_checkpoint(Path("run")).name == "step-0000000060.pt"


def test_the_golden_networks_parameters_are_taken():
    """The parameters that the published code was recorded with: in, and the same actions out."""
    golden = np.load(Path(__file__).parents[1] / "golden" / "network_greedy_eval.npz")
    parameters = {name[6:]: torch.from_numpy(golden[name]) for name in golden.files if name.startswith("param/")}
    torch.save(parameters, "pf.pth")
    outcome = d2r("import", "pf.pth", "--env.tasks", "reach,push,door-open", "--run-dir", "run")
    assert outcome.code == 0, outcome.err
    cfg = load_config("run/config.json")
    agent = Agent(39, 4, 3, cfg.net)
    agent.load_state_dict(load_checkpoint(find_checkpoint(Path("run")))["agent"])
    obs, task = torch.from_numpy(golden["obs_and_task"][:, :39]).float(), torch.from_numpy(golden["task_index"])
    with torch.no_grad():
        action, _ = agent.actor.eval().act_greedily(obs, task)
    torch.testing.assert_close(action, torch.from_numpy(golden["out"][:, :4]).tanh().float())


def test_a_policy_goes_out():
    """As safetensors that load into the network, and a JSON that says what is in them."""
    agent = agent_of()
    begin_run(Path("run"), RUN, agent)
    before = contents(Path("run"))
    outcome = d2r("export", "run")
    assert outcome.code == 0, outcome.err
    assert contents(Path("run")).keys() - before.keys() == {"policy.safetensors", "policy.json"}
    sizes = json.loads(Path("run/policy.json").read_text())
    assert sizes["network"] == {"kind": "d2r", **dataclasses.asdict(NET), "route_widths": [10, 9]}
    assert (sizes["observation"], sizes["action"], sizes["tasks"]) == (39, 4, ["reach", "drawer-close"])
    assert (sizes["steps"], sizes["log_std_range"]) == (0, [-20, 2])
    net = RoutedNetwork(39, 8, T, 1, NET)
    net.load_state_dict(load_file("run/policy.safetensors"))
    assert all(torch.equal(value, agent.actor.net.state_dict()[name]) for name, value in net.state_dict().items())

    assert d2r("export", str(find_checkpoint(Path("run"))), "--out", "other").code == 0
    assert Path("other.json").read_bytes() == Path("run/policy.json").read_bytes()


def test_any_networks_policy_goes_out_but_only_d2rs_as_published():
    begin_run(Path("run"), dataclasses.replace(RUN, net=MlpConfig(widths=(6,))), agent_of(MlpConfig(widths=(6,))))
    assert d2r("export", "run").code == 0
    assert json.loads(Path("run/policy.json").read_text())["network"]["kind"] == "mlp"
    outcome = d2r("export", "run", "--published")
    assert outcome[::2] == (1, "d2r export: --published: expected a run of network d2r, got mlp")
    fixed = dataclasses.replace(NET, dynamic_depth=False)
    begin_run(Path("fixed"), dataclasses.replace(RUN, net=fixed), agent_of(fixed))
    outcome = d2r("export", "fixed", "--published")
    assert outcome.code == 1 and "--published: expected net.dynamic_depth True" in outcome.err
    assert not list(Path().glob("*/*.pth"))


def file(value: object) -> str:
    """A file that is none of a network."""
    if isinstance(value, bytes):
        Path("a.pth").write_bytes(value)
    else:
        torch.save(value, "a.pth")
    return "a.pth"


def actor(**changes: torch.Tensor | None) -> str:
    """An actor's file with parameters changed, or without them."""
    path = saved(agent_of())[0]
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    torch.save({name: value for name, value in (torch.load(path) | changes).items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "none.pth", r"\[Errno 2\] No such file or directory: 'none.pth'"),
        (lambda: file(b"text"), r"a.pth: expected a state dict of a published D2R network, .* not readable as one"),
        (lambda: file(b""), r"a.pth: expected a state dict .* not readable as one"),
        (lambda: file([1]), r"a.pth: expected a state dict .*, got list"),
        (lambda: file({}), r"a.pth: expected a state dict .*, got no parameter"),
        (lambda: file({"a": 1}), r"a.pth: expected a state dict .*, got int under 'a'"),
        (lambda: file({"a": torch.ones(1)}), r"a.pth: not a parameter of the published network: 'a'"),
        (lambda: actor(last__bias=None), r"model_pf_best.pth: .*: nothing given for head.bias"),
        (
            lambda: actor(last__bias=torch.zeros(7)),
            r"model_pf_best.pth: published parameters: head.bias is \[7\], where the layers around it expect \[8\]",
        ),
        (
            lambda: actor(base__fc1__weight=torch.zeros(12)),
            r"model_pf_best.pth: published parameters: base.fc1.weight is \[12\], as of no layer",
        ),
        (
            lambda: actor(depth_route_net__module_fcs__0__weight=torch.tensor(1.0)),
            r"model_pf_best.pth: published parameters: depth_route_net.module_fcs.0.weight is \[\], as of no layer",
        ),
        (
            lambda: actor(last__bias=torch.full((8,), torch.nan)),
            r"model_pf_best.pth: holds a number that is not finite: last.bias\[0\] is nan",
        ),
        (
            lambda: actor(gumbel_temperature=torch.zeros(2)),
            r"model_pf_best.pth: gumbel_temperature: expected 2 positive numbers",
        ),
        (
            lambda: saved(agent_of())[1],
            r"expected the file of one actor, and those of two critics or none, got 0 and 1",
        ),
        (lambda: saved(agent_of(n_tasks=3))[0], r"model_pf_best.pth: is of 3 tasks: expected as many names, got"),
    ],
)
def test_a_bad_file_is_told_in_one_line(make, message):
    outcome = d2r("import", make(), *SHORT, "--run-dir", "run")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert outcome.err.startswith("d2r import: ")
    assert re.search(message, outcome.err), outcome.err
    assert not Path("run").exists()


def test_files_that_are_no_agent_are_refused():
    files = saved(agent_of())
    shutil.copy(files[1], "one.pth")
    shutil.copy(saved(agent_of(dataclasses.replace(NET, base_width=13)))[1], "wide.pth")
    saved(agent_of())
    outcome = d2r("import", files[0], "one.pth", "wide.pth", *SHORT)
    assert outcome.err == f"d2r import: wide.pth: expected base_width 12 like {files[0]}, got 13"
    outcome = d2r("import", files[0], "one.pth", *SHORT)
    assert "expected the file of one actor, and those of two critics or none, got 1 and 1" in outcome.err
    torch.save(to_published(RoutedNetwork(39, 3, T, 1, NET).state_dict(), torch.ones(T))[0], "odd.pth")
    outcome = d2r("import", "odd.pth", *SHORT)
    assert (
        "odd.pth: reads 39 numbers and gives 3: expected an actor, which reads 39 and gives 8, or a critic"
        in outcome.err
    )
    outcome = d2r("import", files[0], *SHORT, "--net.module-width", "9")
    assert f"{files[0]}: is of other sizes than --net asks for" in outcome.err
    Path("full").mkdir()
    Path("full/file").write_text("")
    outcome = d2r("import", files[0], *SHORT, "--run-dir", "full")
    assert outcome.err == "d2r import: --run-dir: full exists and is not empty"
    torch.save(to_published(RoutedNetwork(39, 8, 7, 1, NET).state_dict(), torch.ones(7))[0], "seven.pth")
    assert (
        d2r("import", "seven.pth").err == "d2r import: seven.pth: is of 7 tasks: expected --env.tasks with their names"
    )


@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("n_nets", [1, 2])
def test_names_there_and_back(n, n_nets):
    cfg = NetConfig(n_modules=n, top_k=min(2, n), module_width=8, base_width=12, route_widths=(10, 9, 7))
    net = RoutedNetwork(5, 3, T, n_nets, cfg)
    published = to_published(net.state_dict(), torch.ones(T))
    assert len(published) == n_nets
    again = load_published(*published)
    assert again.keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.items())
    assert published_sizes(published[0]) == (5, 3, T, cfg)


def test_help():
    for command in ("import", "export"):
        outcome: Outcome = d2r(command, "--help")
        assert outcome.code == 0 and f"d2r {command}" in outcome.out
    assert d2r("import").code == 2


@pytest.fixture
def exported(tmp_path) -> Path:
    """A directory with the policy of a run that has just begun."""
    begin_run(tmp_path / "run", RUN, agent_of())
    (tmp_path / "agent").mkdir()
    assert d2r("export", "run", "--out", "agent/policy").code == 0
    shutil.rmtree("run")
    return Path("agent")


def test_an_exported_policy_is_read_like_a_run(exported, tmp_path):
    assert {path.name for path in exported.iterdir()} == {"policy.json", "policy.safetensors"}
    outcome = d2r("eval", "agent", "--episodes", "8", "--json", "result.json")
    assert outcome.code == 0, outcome.err
    assert f"{exported}/policy.safetensors: 0 steps a task" in outcome.out
    assert json.loads(Path("result.json").read_text())["tasks"] == ["reach", "drawer-close"]
    again = d2r("export", "agent", "--out", "again")
    assert again.code == 0, again.err
    for ending in ("safetensors", "json"):
        assert Path(f"again.{ending}").read_bytes() == (exported / f"policy.{ending}").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "policy.json: expected what d2r export writes, 'd2r_fast policy 1'"),
        ({"config": None}, "policy.json: config: not a run configuration"),
        ({"steps": -1}, "policy.json: steps: expected a count from 0 on, got -1"),
        ("weights", "policy.safetensors: the policy"),
        ("cut", "policy.safetensors: "),
        ("resume", "expected a checkpoint file, or a run directory with checkpoints"),
    ],
    ids=str,
)
def test_a_policy_that_is_none_is_refused_in_a_line(exported, change, message):
    description, weights = exported / "policy.json", exported / "policy.safetensors"
    command = ["eval", "agent", "--episodes", "8"]
    if isinstance(change, dict):
        description.write_text(json.dumps(json.loads(description.read_text()) | change))
    elif change == "weights":
        parameters = load_file(weights)
        parameters.pop("base.0.weight")
        save_file(parameters, weights)
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        command = ["train", "--resume", "agent"]
    outcome = d2r(*command)
    assert outcome.code == 1
    assert message in outcome.err
    assert outcome.err.startswith(f"d2r {command[0]}: ")
