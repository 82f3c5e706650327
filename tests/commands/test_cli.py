"""The command line: what each command does, and that wrong input is told before anything is made."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch

from d2r_fast import cli
from d2r_fast.cli import COMMANDS
from d2r_fast.config_json import config_to_json, load_config
from d2r_fast.nets.kinds import NET_CONFIGS
from d2r_fast.nets.moore import MooreConfig
from d2r_fast.presets import PRESETS
from d2r_fast.training.checkpoint import checkpoint_files, find_checkpoint

TINY = dataclasses.replace(
    tiny.RUN,
    deterministic=True,
    env=dataclasses.replace(tiny.RUN.env, envs_per_task=1),
    eval=dataclasses.replace(tiny.RUN.eval, every_chunks=2),
    total_steps=20,
    warmup_steps=10,
    chunk_steps=5,
    replay_capacity=100,
)
# The same sizes on top of a preset.
OVERRIDES = shlex.split("""
    --env.tasks reach,drawer-close --env.envs-per-task 1 --env.episode-length 5 --device cpu --deterministic
    --net.n-modules 4 --net.top-k 2 --net.module-width 8 --net.base-width 16 --net.route-widths 8
    --eval.every-chunks 2 --eval.episodes 1 --eval.envs-per-task 1 --updates-per-step 0.5
    --total-steps 20 --warmup-steps 10 --chunk-steps 5 --batch-size 8 --replay-capacity 100
    --checkpoint-every-chunks 2
""")

PRESET_NAMES = ", ".join(PRESETS)

pytestmark = pytest.mark.usefixtures("restore_torch_switches")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def d2r(*args: str) -> Outcome:
    """Run a command here. White space is evened out in `err`, for long lines are wrapped."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(args))
        except SystemExit as leaving:
            assert isinstance(leaving.code, int)
            code = leaving.code
    return Outcome(code, out.getvalue(), " ".join(err.getvalue().split()))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in an empty folder, where it shows what a command creates."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a configuration that trains in a second, so that input accepted by mistake does not train for hours."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.json"
    path.write_text(config_to_json(TINY))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    return run_dir, d2r("train", "quick", *OVERRIDES, "--run-dir", str(run_dir))


@pytest.fixture
def run(trained: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of the trained run to work on."""
    return shutil.copytree(trained[0], tmp_path / "run")


def metrics(run_dir: Path) -> list[dict]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, folders too."""
    return {str(path.relative_to(folder)): b"" if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def test_train(trained):
    run_dir, outcome = trained
    assert outcome.code == 0
    assert "Traceback" not in outcome.err
    assert {path.name for path in run_dir.iterdir()} == {
        *(
            "config.json",
            "metrics.jsonl",
            "tensorboard",
            "checkpoints",
            "learning_curve.png",
            "module_use.png",
            "report.html",
            "run_id",
            "sessions.jsonl",
        )
    }
    cfg = load_config(str(run_dir / "config.json"))
    assert cfg.task_names == ("reach", "drawer-close")
    assert (cfg.net.route_widths, cfg.total_steps, cfg.deterministic) == ((8,), 20, True)
    assert cfg.sac == PRESETS["quick"][1].sac
    assert [(r["kind"], r["steps"]) for r in metrics(run_dir)] == [
        *[("train", 5), ("train", 10), ("eval", 10), ("train", 15), ("train", 20), ("eval", 20)],
        *[("train", 25), ("train", 30), ("eval", 30)],
    ]


def test_train_tells_where_everything_is(trained):
    run_dir, outcome = trained
    lines = outcome.out.splitlines()
    assert f"run        {run_dir}" in lines
    (network,) = (line for line in lines if line.startswith("network "))
    assert re.fullmatch(
        r"network    d2r, [\d,]+ parameters \(each of 2 critics [\d,]+\), at most 0\.00 M multiply-adds a row", network
    )
    assert "tasks      reach, drawer-close; 1 environments each" in lines
    # 100 rows of 39 + 4 + 1 + 39 floats, a flag and 4 x 2 route bytes are 0.03 MiB.
    assert "replay     100 transitions, 0 MiB on cpu" in lines
    assert "evaluation after 30 steps a task and 10 updates:" in lines
    last = metrics(run_dir)[-1]
    for task, success in zip(("reach", "drawer-close"), last["success"], strict=True):
        assert any(line.split()[:2] == [task, f"{success:.2f}"] for line in lines)
    named = {
        line.split()[1].rstrip(",")
        for line in lines
        if line.startswith(("checkpoint ", "metrics ", "picture ", "report "))
    }
    assert named == {
        str(run_dir / name)
        for name in (
            "checkpoints/step-0000000030.pt",
            "metrics.jsonl",
            "learning_curve.png",
            "module_use.png",
            "report.html",
        )
    }
    assert any(line.startswith("finished after") for line in lines)
    (idle,) = (line for line in lines if line.startswith("idle "))
    assert re.fullmatch(r"idle       learner \d+%, collector \d+% \(waiting for the other, since the warm-up\)", idle)


def test_training_from_a_runs_config_repeats_it(trained, tmp_path):
    run_dir, _ = trained
    assert d2r("train", str(run_dir / "config.json")).code == 0
    (made,) = tmp_path.glob("*/*")  # without --run-dir: runs/NAME-seedSEED-TIME
    assert made.parent.name == "runs"
    assert made.name.startswith("quick-seed0-2")
    assert metrics(made) == metrics(run_dir)
    assert (made / "config.json").read_bytes() == (run_dir / "config.json").read_bytes()


def test_overrides_come_on_top_of_a_config_file(trained, tmp_path):
    outcome = d2r("train", str(trained[0] / "config.json"), "--seed", "3", "--total-steps=5", "--run-dir=other")
    assert outcome.code == 0
    cfg = load_config(str(tmp_path / "other" / "config.json"))
    assert (cfg.seed, cfg.total_steps, cfg.batch_size) == (3, 5, 8)
    pairs = list(zip(metrics(tmp_path / "other"), metrics(trained[0]), strict=False))
    assert pairs[0][0]["scaled_return"] != pairs[0][1]["scaled_return"]


def test_another_network_in_one_word(tiny_json, tmp_path):
    widths = ["--net.n-experts", "2", "--net.widths", "8", "8", "--net.norm-epsilon", "1e-8"]
    outcome = d2r("train", tiny_json, "--net", "moore", *widths, "--total-steps", "5", "--run-dir", "run")
    assert outcome.code == 0, outcome.err
    assert load_config("run/config.json").net == MooreConfig(n_experts=2, widths=(8, 8), norm_epsilon=1e-8)
    assert (tmp_path / "run" / "learning_curve.png").exists() and not (tmp_path / "run" / "module_use.png").exists()
    assert any(line.startswith("network    moore, ") for line in outcome.out.splitlines())
    again = d2r("train", "--resume", "run", "--net.widths", "8", "9")
    assert "--resume: net.widths cannot change, the saved run has (8, 8)" in again.err


def test_resume_goes_on(run):
    before = metrics(run)
    assert d2r("train", "--resume", str(run), "--total-steps", "25").code == 0
    after = metrics(run)
    assert after[: len(before)] == before
    assert [(r["kind"], r["steps"]) for r in after[len(before) :]] == [("train", 35), ("eval", 35)]
    assert load_config(str(run / "config.json")).total_steps == 25


def test_resume_works_from_inside_the_run(run, monkeypatch):
    monkeypatch.chdir(run)
    outcome = d2r("train", "--resume", ".")
    assert (outcome.code, "finished" in outcome.out) == (0, True)


def test_diverging_training_is_one_line_and_no_traceback(tiny_json, tmp_path):
    outcome = d2r("train", tiny_json, "--env.reward-scale", "1e30", "--run-dir", "run")
    assert outcome.code == 1
    assert "d2r train: updates 1..2: loss/critic[0] is inf; training has diverged" in outcome.err
    assert [path.name for path in checkpoint_files(tmp_path / "run")] == ["step-0000000010.pt"]


def record_of(path: str) -> dict:
    """A result without its clock and its command, which names the file."""
    record = json.loads(Path(path).read_text())
    assert record.pop("seconds") > 0
    assert record.pop("command").endswith(f"--json {path}")
    return record


def test_eval_of_a_run_and_of_a_checkpoint_file(run):
    options = ("--episodes", "2", "--envs-per-task", "2")
    newest = find_checkpoint(run)
    outcome = d2r("eval", str(run), *options, "--json", "a.json")
    assert outcome.code == 0
    record = record_of("a.json")
    assert record["checkpoint"] == str(newest)
    protocol = {"name": "fast", "episodes": 2, "episode_length": 5, "engine": "auto", "goals": "random"}
    assert protocol.items() <= record["protocol"].items()
    assert (record["steps"], record["seed"]) == (30, 0)
    assert record["tasks"] == ["reach", "drawer-close"]
    assert record["mean_success"] == sum(record["success"]) / 2
    assert [len(use) for use in record["module_use"]] == [4, 4]
    lines = outcome.out.splitlines()
    assert lines[:2] == [f"{newest}: 30 steps a task", record["protocol"]["text"]]
    assert lines[1] == "fast protocol: 5 steps, random goals, 2 episodes a task (auto)"
    for k, task in enumerate(record["tasks"]):
        low, high = record["success_interval"][k]
        row = [task, f"{record['success'][k]:.2f}", f"{low:.2f}", "to", f"{high:.2f}"]
        assert [*row, f"{record['episode_return'][k]:.0f}"] in [line.split() for line in lines]

    assert d2r("eval", str(newest), *options, "--json", "b.json").code == 0
    assert record_of("b.json") == record
    assert d2r("eval", str(newest), *options, "--seed", "1", "--json", "c.json").code == 0
    assert record_of("c.json")["episode_return"] != record["episode_return"]

    earlier = checkpoint_files(run)[0]
    assert d2r("eval", str(earlier), *options, "--json", "d.json").code == 0
    assert record_of("d.json")["steps"] == 10


def test_eval_protocols(run):
    """Each with its own settings, whatever the run was trained with."""
    for protocol, length, goals, engine in [
        ("published", 200, "random", "auto"),
        ("official", 500, "official", "official"),
    ]:
        outcome = d2r("eval", str(run), "--protocol", protocol, "--episodes", "1", "--json", "result.json")
        assert outcome.code == 0
        record = record_of("result.json")
        settings = {"name": protocol, "episodes": 1, "episode_length": length, "engine": engine, "goals": goals}
        assert settings.items() <= record["protocol"].items()
        assert f"{protocol} protocol: {length} steps" in outcome.out
        assert "1 episodes a task instead of" in outcome.out
        assert len(record["success"]) == len(record["success_interval"]) == 2
        assert ("module_use" in record) == (protocol == "published")


def test_eval_of_the_scripted_experts():
    arguments = ("--experts", "drawer-close", "--protocol", "official", "--episodes", "2", "--json", "experts.json")
    outcome = d2r("eval", *arguments)
    assert outcome.code == 0
    assert outcome.out.splitlines()[0] == "scripted experts"
    record = record_of("experts.json")
    assert (record["policy"], record["tasks"], record["success"]) == ("scripted experts", ["drawer-close"], [1.0])


def test_fidelity(tmp_path):
    arguments = ("--tasks", "drawer-close", "--episodes", "2", "--envs-per-task", "1")
    outcome = d2r("fidelity", *arguments, "--json", "report.json", "--markdown", "report.md")
    assert outcome.code == 0
    assert "1 of 1 tasks ok" in outcome.out
    assert outcome.out.strip() == (tmp_path / "report.md").read_text().strip()
    record = json.loads((tmp_path / "report.json").read_text())
    assert [(row["task"], row["verdict"], row["pairs"]) for row in record["tasks"]] == [("drawer-close", "ok", 2)]
    assert record["command"] == f"d2r fidelity {' '.join(arguments)} --json report.json --markdown report.md"
    assert (record["ok"], record["episodes"], record["envs_per_task"]) == (True, 2, 1)


def test_fidelity_of_a_wrong_engine_is_a_failure():
    with pytest.warns(UserWarning, match="EnvPool differs"):
        outcome = d2r("fidelity", *shlex.split("--tasks shelf-place --engine envpool --episodes 2 --envs-per-task 1"))
    assert outcome.code == 1
    assert "| shelf-place | **drifts**" in outcome.out


def test_paths_that_cannot_be_written_are_one_line(run, tiny_json, tmp_path):
    outcome = d2r("eval", "run", "--episodes", "1", "--envs-per-task", "1", "--json", ".")
    assert (outcome.code, outcome.err) == (1, "d2r eval: [Errno 21] Is a directory: '.'")
    outcome = d2r("fidelity", "--markdown", "none/report.md")
    assert outcome == (1, "", "d2r fidelity: [Errno 2] No such file or directory: 'none/report.md'")
    (tmp_path / "file").write_text("")
    outcome = d2r("train", tiny_json, "--run-dir", "file/run")
    assert (outcome.code, outcome.err) == (1, "d2r train: [Errno 20] Not a directory: 'file/run'")


def test_eval_only_reads(run):
    before = contents(run)
    assert d2r("eval", str(run), "--episodes", "1", "--envs-per-task", "1").code == 0
    assert contents(run) == before


def test_presets():
    outcome = d2r("presets")
    assert (outcome.code, outcome.err) == (0, "")
    for name, (purpose, cfg) in PRESETS.items():
        assert any(line.split()[0] == name and line.endswith(purpose) for line in outcome.out.splitlines())
        assert f"{cfg.n_tasks} tasks, {cfg.batch_size} rows an update, {cfg.total_steps:,} steps a task" in outcome.out
    assert "n_modules 16, top_k 2, module_width 128, base_width 400, route_widths (256, 256)" in outcome.out
    assert "moore, 2,181,500 parameters (each of 2 critics 2,050,750), 2.02 M multiply-adds a row" in outcome.out


def test_info():
    outcome = d2r("info")
    assert (outcome.code, outcome.err) == (0, "")
    told = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert told["torch"] == torch.__version__
    assert told["envpool"][0].isdigit()
    states = dict(line.split(maxsplit=2)[1:] for line in outcome.out.splitlines() if line.startswith("backend"))
    assert states["reference:"] == "ready"
    assert states["cpp:"].startswith("ready (")
    assert states["triton:"].startswith(("ready", "needs"))
    networks = {line.split()[1].rstrip(",") for line in outcome.out.splitlines() if line.startswith("network")}
    assert networks == set(NET_CONFIGS)
    assert ("none" in told["gpu"]) == (not torch.cuda.is_available())


# Only what Python, torch and numpy bring can be imported.
CORE_ONLY = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extra}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
{code}
"""
EXTRA = ("cattrs", "envpool", "gymnasium", "matplotlib", "metaworld", "mujoco", "psutil", "tensorboard", "tqdm", "tyro")


def without_the_extra(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CORE_ONLY.format(extra=EXTRA, code=code)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_the_training_extra_it_says_what_to_install():
    for command in ("train", "eval", "import", "export", "fidelity"):
        done = without_the_extra(f"from d2r_fast.cli import main; sys.exit(main(['{command}']))")
        assert done.returncode == 1
        assert re.fullmatch(
            rf"d2r {command} needs the training extra \(\w+ is not installed\): pip install 'd2r_fast\[train\]'\n",
            done.stderr,
        )


@pytest.mark.parametrize("command", ["info", "presets"])
def test_what_the_core_can_tell_needs_no_training_extra(command):
    done = without_the_extra(f"from d2r_fast.cli import main; sys.exit(main(['{command}']))")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_network_needs_no_training_extra():
    done = without_the_extra(
        "import torch, d2r_fast as d; "
        "net = d.RoutedNetwork(39, 8, 2, 1, d.NetConfig(n_modules=3, module_width=8)); "
        "net(torch.randn(4, 39), torch.arange(4) % 2)[0].sum().backward()"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_who_stops_reading_is_not_an_error():
    """As `d2r presets | head -1`, whose reader may leave before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "d2r_fast", "presets"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_help():
    outcome = d2r("--help")
    assert outcome.code == 0
    assert all(f"d2r {command}" in outcome.out for command in COMMANDS)
    fields = d2r("train", "quick", "--help")
    assert fields.code == 0
    assert all(name in fields.out for name in ("--net.top-k", "--updates-per-step", "--env.tasks", "--eval.episodes"))


@pytest.mark.parametrize(
    "args, message",
    [
        (
            "trian",
            f"unknown command 'trian': expected {', '.join(COMMANDS)}",
        ),
        ("train", f"expected a preset ({PRESET_NAMES}), a config.json or --resume RUN first"),
        ("train --seed 1", "expected a preset"),
        ("train quik", f"'quik': expected a preset ({PRESET_NAMES}) or the path of a config.json"),
        ("train none/config.json", f"expected a preset ({PRESET_NAMES}) or the path of a config.json"),
        ("train TINY --bathc-size 8", "Unrecognized options: --bathc-size, 8"),
        ("train TINY --env.envs-per-tsk 3", "Perhaps you meant: --env.envs-per-task INT"),
        ("train TINY --batch-size 1.5", "Error parsing --batch-size: invalid literal for int() with base 10: '1.5'"),
        ("train TINY --batch-size 7", "batch_size: expected a multiple of the 2 tasks, got 7"),
        ("train TINY --env.tasks reach,drawer-clsoe", 'unknown task "drawer-clsoe" at position 2, did you mean'),
        ("train TINY --env.tasks MT10", "batch_size: expected a multiple of the 10 tasks, got 8"),
        ("train TINY --device gpu", "Expected one of ('auto', 'cpu', 'cuda')"),
        ("train TINY --seed -1", "seed: expected 0..2**32-1, got -1"),
        ("train TINY --net.top-k 5", "net.top_k: expected 1..n_modules=4, got 5"),
        ("train TINY --env.envs-per-task 2", "chunk_steps: expected a multiple of env.envs_per_task=2, got 5"),
        ("train TINY --total-steps 21", "total_steps: expected a multiple of chunk_steps=5, got 21"),
        ("train TINY --replay-capacity 9", "replay_capacity: expected at least chunk_steps x tasks = 10, got 9"),
        ("train TINY --replay-capacity 10000000000000", "replay_capacity: 10,000,000,000,000 transitions need"),
        ("train TINY --updates-per-step 0", "updates_per_step: expected "),
        ("train TINY --updates-per-step inf", "updates_per_step: expected a finite number over 0, got inf"),
        ("train TINY --name a/b", "name: expected letters, digits, '-', '_' or '.', got 'a/b'"),
        ("train TINY --run-dir", "--run-dir: expected a value behind it"),
        ("train --resume", "--resume: expected a value behind it"),
        ("train TINY --net", "--net: expected a value behind it"),
        (
            "train TINY --net hard-modules",
            "--net: expected one of d2r, mlp, multi-head, soft-modules, paco, moore, ",
        ),
        ("train TINY --net mlp --net.top-k 1", "Unrecognized options: --net.top-k"),
        ("train --resume none", "none: expected a checkpoint file, or a run directory with checkpoints/step-*.pt"),
        ("train --resume .", "expected a checkpoint file, or a run directory with checkpoints/step-*.pt"),
        ("eval", "expected a run directory, a checkpoint or --experts TASKS, one of them"),
        ("eval RUN --experts MT10", "expected a run directory, a checkpoint or --experts TASKS, one of them"),
        ("eval RUN --episodes 3 --envs-per-task 2", "episodes: expected a multiple of envs_per_task=2, got 3"),
        ("eval RUN --protocol official --envs-per-task 8", "the official protocol has one environment a task, got 8"),
        ("eval RUN --episodes 0", "episodes: expected at least 1, got 0"),
        ("eval RUN --seed -1", "seed: expected 0..2**31-51, got -1"),
        ("eval RUN --protocol oficial", "Expected one of ('fast', 'published', 'official')"),
        ("eval --experts MT10", "--experts: expected --protocol published or official; fast takes its settings from"),
        ("eval --experts raech --protocol official", 'unknown task "raech" at position 1, did you mean "reach"'),
        ("fidelity --episodes 1", "episodes: expected at least 2, since drift shows from the second on, got 1"),
        ("fidelity --tasks raech", 'unknown task "raech" at position 1, did you mean "reach"'),
        ("fidelity --task reach", "Unrecognized options: --task"),
        ("eval none", "none: expected a checkpoint file, or a run directory with checkpoints/step-*.pt"),
        ("eval none --episode 3", "Unrecognized options: --episode"),
    ],
)
def test_wrong_input_is_told_and_nothing_is_made(tiny_json, trained, tmp_path, args, message):
    outcome = d2r(*args.replace("TINY", tiny_json).replace("RUN", str(trained[0])).split())
    assert outcome.code in (1, 2)
    assert message in outcome.err
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_the_usage_is_shown():
    outcome = d2r()
    assert (outcome.code, outcome.out) == (2, cli.USAGE)


def test_a_gpu_that_is_asked_for_is_used_or_missed(tiny_json, tmp_path):
    outcome = d2r("train", tiny_json, "--device", "cuda", "--no-deterministic", "--run-dir", "run")
    if torch.cuda.is_available():
        assert outcome.code == 0
        assert "device     cuda" in outcome.out
    else:
        assert outcome.code == 1
        assert "device: expected a GPU for 'cuda', but torch" in outcome.err
        assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(run, tiny_json, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name in ("run", "full", "file"):
        outcome = d2r("train", tiny_json, "--run-dir", name)
        assert outcome.code == 1
        assert f"--run-dir: {name} exists and is not empty; to go on from it: --resume {name}" in outcome.err
    assert contents(tmp_path) == before


def test_an_empty_folder_is_taken(tiny_json, tmp_path):
    (tmp_path / "empty").mkdir()
    assert d2r("train", tiny_json, "--total-steps", "5", "--run-dir", "empty").code == 0
    assert (tmp_path / "empty" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        ("--seed 1", "seed cannot change, the saved run has 0"),
        ("--batch-size 16", "batch_size cannot change, the saved run has 8; a resumed run may change"),
        ("--net.top-k 1", "net.top_k cannot change, the saved run has 2;"),
        ("--env.tasks reach,push", "env.tasks cannot change, the saved run has reach,drawer-close"),
        ("--no-deterministic", "deterministic cannot change, the saved run has True"),
        ("--total-steps 21", "total_steps: expected a multiple of chunk_steps=5, got 21"),
        ("--totalsteps 25", "Unrecognized options: --totalsteps"),
        ("--run-dir other", "Unrecognized options: --run-dir"),
    ],
)
def test_resume_refuses_what_the_saved_state_was_not_made_with(run, tmp_path, args, message):
    before = contents(tmp_path)
    outcome = d2r("train", "--resume", "run", *args.split())
    assert outcome.code in (1, 2)
    assert message in outcome.err
    assert outcome.out == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"name": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b"[" * 100_000, "not a run configuration: nested too deeply"),
        (b'{"net":' * 100_000, "not a run configuration: nested too deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"", "not JSON: Expecting value"),
        (b"\0" * 1000, "not JSON: Expecting value"),
        (b'{"net": {"top_k": [2]}}', "not a run configuration: expected int, got [2] @ $.net.top_k"),
    ],
    ids=["no UTF-8", "list of lists", "objects in objects", "digits", "empty", "zeros", "type"],
)
def test_a_damaged_configuration_is_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    outcome = d2r("train", "config.json", "--run-dir", "run")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"d2r train: config.json: {message}")
    assert not (tmp_path / "run").exists()
