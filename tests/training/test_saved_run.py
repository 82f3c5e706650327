"""Going on from what lies in a run directory: the right run's, whole; otherwise one line that says what is wrong."""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch

from d2r_fast import cli
from d2r_fast.config import EvalConfig, RunConfig
from d2r_fast.training.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from d2r_fast.training.claim import Claim, read_run_id
from d2r_fast.training.saved_run import first_change
from d2r_fast.training.trainer import Trainer

# Six chunks, the first two of them warm-up; checkpoints after 20, 40 and 60 steps, the replay full from 30 on.
CFG = dataclasses.replace(tiny.RUN, deterministic=True, total_steps=40)
# Runs of checkpoint formats 1 and 2, recorded by earlier versions: a checkpoint after 80 of 100 steps; metrics go on to
# 100. After the first, runs got an identity and Adam's state its names; after the second, modules moved into rooms.
DATA = Path(__file__).parents[1] / "data"
OLD = DATA / "format1"

pytestmark = pytest.mark.usefixtures("restore_torch_switches")


class Outcome(NamedTuple):
    code: int
    err: list[str]  # lines, but for the progress bar's


def d2r(*args: object) -> Outcome:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = cli.main([str(arg) for arg in args])
    lines = err.getvalue().replace("\r", "\n").splitlines()
    return Outcome(code, [line for line in lines if line.strip() and "%|" not in line])


def evaluate(path: Path) -> Outcome:
    outcome = d2r("eval", path, "--episodes", "1", "--envs-per-task", "1")
    return outcome._replace(err=[line for line in outcome.err if line.startswith("d2r ")])


def train(cfg: RunConfig, run_dir: Path) -> Path:
    assert Trainer(cfg, run_dir, show_progress=False).run()
    return run_dir


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(CFG, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run, of a network of other widths."""
    net = dataclasses.replace(CFG.net, module_width=6)
    return train(dataclasses.replace(CFG, net=net), tmp_path_factory.mktemp("other") / "run")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def metrics(run_dir: Path) -> list[dict]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, at: int = 3000) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_refused(run_dir: Path, message: str, *command: object) -> str:
    """The command ends with one line, which has `message`, and leaves the directory as it was; returns the line."""
    before = contents(run_dir)
    outcome = d2r(*command)
    assert outcome.code == 1
    assert len(outcome.err) == 1
    assert message in outcome.err[0]
    assert contents(run_dir) == before
    return outcome.err[0]


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run, whole):
    newest = checkpoint_files(run)[-1]
    flip(newest)
    damaged = newest.read_bytes()
    outcome = evaluate(run)
    assert outcome.code == 0
    assert outcome.err == [
        f"d2r eval: {newest}: damaged: its checksum is not that of its content; evaluating step-0000000040.pt"
    ]
    outcome = d2r("train", "--resume", run)
    assert outcome.code == 0
    assert outcome.err == [
        f"d2r train: {newest}: damaged: its checksum is not that of its content; going on from step-0000000040.pt, "
        "the damaged file is kept as step-0000000060.pt.discarded"
    ]
    assert metrics(run) == metrics(whole)
    assert newest.with_name("step-0000000060.pt.discarded").read_bytes() == damaged
    assert load_checkpoint(newest)["steps"] == 60


def test_damaged_checkpoints_alone_are_refused_and_kept(run):
    for path in checkpoint_files(run):
        flip(path)
    for command in (("train", "--resume", run), ("eval", run)):
        assert_refused(run, "step-0000000060.pt: damaged: its checksum is not that of its content; so are", *command)


def test_a_run_goes_on_from_the_checkpoint_that_is_named(run, whole):
    last = load_checkpoint(checkpoint_files(run)[-1])
    outcome = d2r("train", "--resume", run / "checkpoints" / "step-0000000020.pt")
    assert outcome.code == 0
    assert outcome.err == [
        f"d2r train: {run}: going on from step-0000000020.pt; later checkpoints are kept as "
        "step-0000000040.pt.discarded, step-0000000060.pt.discarded"
    ]
    assert metrics(run) == metrics(whole)
    assert names(run) == sorted([*names(whole), "step-0000000040.pt.discarded", "step-0000000060.pt.discarded"])
    assert (run / "metrics.discarded.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()[
        load_checkpoint(checkpoint_files(whole)[0])["metrics_length"] :
    ]
    again = load_checkpoint(checkpoint_files(run)[-1])
    assert all(torch.equal(again["agent"][name], value) for name, value in last["agent"].items())


def test_a_named_checkpoint_that_is_damaged_is_refused_and_a_good_one_named(run):
    flip(checkpoint_files(run)[-1])
    flip(checkpoint_files(run)[1])
    for command in (("train", "--resume"), ("eval",)):
        message = f"; the newest good one beside it is {checkpoint_files(run)[0]}"
        assert_refused(run, message, *command, checkpoint_files(run)[-1])


def test_a_checkpoint_outside_a_run_is_not_resumed(run, tmp_path):
    alone = shutil.copy(checkpoint_files(run)[-1], tmp_path / "best.pt")
    assert_refused(run, "--resume: expected a run directory or a checkpoint in one, got", "train", "--resume", alone)
    assert evaluate(alone).code == 0


def test_a_checkpoint_of_another_run_is_refused(run, other):
    shutil.copy(checkpoint_files(other)[-1], run / "checkpoints")
    message = (
        f"step-0000000060.pt: it is of another run, {read_run_id(other)[:8]}; {run} is of run {read_run_id(run)[:8]} "
        f"(net.module_width is 6 in the checkpoint and 8 in the directory); if it belongs here, remove {run / 'run_id'}"
    )
    for command in (("train", "--resume", run), ("eval", run)):
        assert_refused(run, message, *command)


def test_a_checkpoint_of_a_run_with_the_same_settings_is_refused_too(run, tmp_path):
    again = train(CFG, tmp_path / "again")
    shutil.copy(checkpoint_files(again)[-1], run / "checkpoints")
    assert_refused(run, "step-0000000060.pt: it is of another run, ", "train", "--resume", run)
    (run / "run_id").unlink()  # as the message says
    (run / "metrics.jsonl").unlink()
    assert d2r("train", "--resume", run).code == 0
    assert read_run_id(run) == read_run_id(again)


def test_a_checkpoint_under_another_name_is_refused(run):
    checkpoint_files(run)[0].rename(run / "checkpoints" / "step-0000000070.pt")
    assert_refused(run, "steps: expected those that the file is named after, got 20", "train", "--resume", run)


def test_a_run_that_lost_its_identity_and_configuration_gets_them_back(run, whole):
    (run / "run_id").unlink()
    (run / "config.json").unlink()
    outcome = d2r("train", "--resume", run)
    assert outcome.code == 0
    assert outcome.err == [
        f"d2r train: {run / name}: missing; written anew from the checkpoint" for name in ("config.json", "run_id")
    ]
    assert read_run_id(run) == read_run_id(whole) == load_checkpoint(checkpoint_files(run)[-1])["run_id"]


@pytest.mark.parametrize("name", ["format1", "format2"])
def test_an_old_run_goes_on(tmp_path, name):
    old = DATA / name
    run = shutil.copytree(old, tmp_path / "run")
    assert evaluate(run).code == 0
    assert contents(run) == contents(old)
    outcome = d2r("train", "--resume", run)
    assert (outcome.code, outcome.err) == (0, [])
    assert [path.name for path in checkpoint_files(run)] == ["step-0000000080.pt", "step-0000000100.pt"]
    before, after = metrics(old), metrics(run)
    assert [(r["kind"], r["steps"], r["updates"]) for r in after] == [
        (r["kind"], r["steps"], r["updates"]) for r in before
    ]
    kept = load_checkpoint(checkpoint_files(old)[0])["metrics_length"]
    assert (run / "metrics.jsonl").read_bytes()[:kept] == (old / "metrics.jsonl").read_bytes()[:kept]
    assert load_checkpoint(checkpoint_files(run)[-1])["run_id"] == read_run_id(run)
    # A checkpoint of format 1 has no identity, and still is its own.
    assert d2r("train", "--resume", checkpoint_files(run)[0]).code == 0


def test_a_checkpoint_of_format_1_of_another_network_is_refused(tmp_path, other):
    run = shutil.copytree(OLD, tmp_path / "run")
    shutil.copy(other / "config.json", run)
    message = f"it is of another run than {run / 'config.json'}: name is format1 in the checkpoint and tiny in"
    for command in (("train", "--resume", run), ("eval", run)):
        assert_refused(run, message, *command)
    settings = json.loads((OLD / "config.json").read_text())
    settings["net"]["module_width"] = 6
    (run / "config.json").write_text(json.dumps(settings))
    assert_refused(run, ": net.module_width is 8 in the checkpoint and 6 in the directory", "train", "--resume", run)


def test_a_run_of_another_network_is_told_by_its_kind():
    other = dataclasses.replace(CFG, net=tiny.NETS[0])
    assert first_change(CFG, other) == ("net.kind", "d2r", "mlp")
    assert first_change(CFG, dataclasses.replace(CFG, eval=EvalConfig(), total_steps=80)) is None


def test_another_config_json_is_told_of_and_kept(run, whole):
    (run / "checkpoints" / "step-0000000060.pt").unlink()
    (run / "config.json").write_bytes(b"\xff{")
    outcome = d2r("train", "--resume", run)
    assert outcome.code == 0
    assert outcome.err == [
        f"d2r train: {run / 'config.json'}: not what the checkpoint holds, which counts; kept as config.discarded.json"
    ]
    assert (run / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert (run / "config.discarded.json").read_bytes() == b"\xff{"
    assert metrics(run) == metrics(whole)


def test_damaged_metrics_are_told_before_training_and_can_be_left_out(run):
    (run / "checkpoints" / "step-0000000060.pt").unlink()
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace(":", ";", 1), *lines[2:]]))
    assert_refused(run, f"d2r train: {path}, line 2: not JSON: ", "train", "--resume", run)
    path.rename(run / "metrics.damaged.jsonl")  # as the message says
    outcome = d2r("train", "--resume", run)
    assert outcome.code == 0
    assert outcome.err == [f"d2r train: {path}: missing; records begin after 40 steps a task"]
    assert [record["steps"] for record in metrics(run)] == [50, 60, 60]
    assert d2r("train", "--resume", run, "--total-steps", "50").code == 0


def test_a_second_process_is_refused_and_evaluation_is_not(run):
    claim = Claim(run)
    assert_refused(run, f"d2r train: {run}: process ", "train", "--resume", run)
    assert evaluate(run) == Outcome(0, [])
    claim.release()
    assert d2r("train", "--resume", run).code == 0


def test_two_that_begin_in_one_directory(tmp_path):
    trainer = Trainer(CFG, tmp_path / "run", show_progress=False)
    with pytest.raises(BlockingIOError, match="trains here"):
        Trainer(CFG, tmp_path / "run", show_progress=False)
    assert trainer.run()
    with pytest.raises(FileExistsError, match=r"has the checkpoints of a run; to go on from it: --resume"):
        Trainer(CFG, tmp_path / "run", show_progress=False)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(run, whole):
    for path in checkpoint_files(run)[1:]:
        path.unlink()
    checkpoint_files(run)[0].rename(run / "checkpoints" / "step-0000000020.pt.tmp")
    logged = (run / "metrics.jsonl").read_bytes()
    outcome = d2r("train", "--resume", run)
    assert outcome.code == 0
    assert outcome.err == [f"d2r train: {run}: stopped before its first checkpoint; training begins again"]
    assert metrics(run) == metrics(whole)
    assert names(run) == names(whole)
    assert (run / "metrics.discarded.jsonl").read_bytes() == logged


def test_discarded_checkpoints_are_no_reason_to_begin_again(run):
    for path in checkpoint_files(run):
        path.rename(path.with_name(path.name + ".discarded"))
    assert_refused(run, "expected a checkpoint file, or a run directory with checkpoints", "train", "--resume", run)


def test_what_a_killed_start_left_is_no_run(tmp_path, whole):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_id").write_text("")
    (run / "config.json.tmp").write_text("{")
    assert d2r("train", whole / "config.json", "--run-dir", run).code == 0
    assert metrics(run) == metrics(whole)


NAN = float("nan")


def set_to(*path: Any) -> Callable[[dict], None]:
    """Put the last of `path` where the others lead."""

    def change(state: dict) -> None:
        *outer, last, value = path
        for key in outer:
            state = state[key]
        state[last] = value

    return change


def remove(*path: Any) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        *outer, last = path
        for key in outer:
            state = state[key]
        del state[last]

    return change


def in_place(*path: Any) -> Callable[[dict], None]:
    """Put the last of `path` into a tensor: the keys that lead to it, the place in it, the value."""

    def change(state: dict) -> None:
        *outer, place, value = path
        for key in outer:
            state = state[key]
        state[place] = value

    return change


FIRST = "actor.net.base.0.weight"
ROUTE = ("replay", "rows", "route")
WRONG = {
    "config-missing": (remove("config"), "config: expected str, but it is missing"),
    "config-type": (set_to("config", {}), "config: expected str, got dict {}"),
    "config-text": (set_to("config", "{"), "config: not JSON: "),
    "config-field": (
        set_to("config", '{"seed": "1"}'),
        "config: not a run configuration: expected int, got '1' @ $.seed",
    ),
    "steps-missing": (remove("steps"), "steps: expected int, but it is missing"),
    "steps-type": (set_to("steps", 60.0), "steps: expected int, got float 60.0"),
    "chunks_ended": (set_to("chunks_ended", 4), "steps: expected 40 or 50, as chunks_ended says, got 60"),
    "chunks_ended-type": (set_to("chunks_ended", None), "chunks_ended: expected int, got NoneType None"),
    "evaluations": (set_to("evaluations", -1), "evaluations: expected a count from 0 on, got -1"),
    "env_epoch": (set_to("env_epoch", True), "env_epoch: expected int, got bool True"),
    "evaluation_due": (set_to("evaluation_due", 0), "evaluation_due: expected bool, got int 0"),
    "collected": (set_to("collected", []), "collected: expected dict, got list []"),
    "collected-value": (
        set_to("collected", "episodes", [2]),
        "collected['episodes']: expected 2 numbers, got list [2]",
    ),
    "metrics_length": (set_to("metrics_length", "9"), "metrics_length: expected int, got str '9'"),
    "metrics_sha256": (remove("metrics_sha256"), "metrics_sha256: expected str, but it is missing"),
    "run_id": (set_to("run_id", 7), "run_id: expected str, got int 7"),
    "agent-missing": (remove("agent"), "agent: expected dict, but it is missing"),
    "agent-type": (set_to("agent", torch.ones(2)), "agent: expected dict, got float32 [2]"),
    "agent-tensor-missing": (remove("agent", FIRST), f"agent: missing '{FIRST}'"),
    "agent-tensor-more": (set_to("agent", "x", torch.ones(1)), "agent: unexpected 'x'"),
    "agent-shape": (
        set_to("agent", FIRST, torch.ones(1, 8, 39)),
        f"agent['{FIRST}']: expected float32 [1, 16, 39], got",
    ),
    "agent-nan": (
        in_place("agent", FIRST, (0, 1, 2), NAN),
        f"holds a number that is not finite: {FIRST}[0, 1, 2] is nan",
    ),
    "learner": (set_to("learner", 1), "learner: expected dict, got int 1"),
    "updates": (set_to("learner", "updates", "20"), "updates: expected int, got str '20'"),
    "generator": (
        set_to("learner", "generator", [1]),
        "generator: expected the state of a random stream, got list [1]",
    ),
    "generator-size": (set_to("acting_generator", torch.ones(9).byte()), "generator: expected the state of a random"),
    "generator-missing": (remove("acting_generator"), "generator: expected the state of a random stream, got NoneType"),
    "optimiser": (remove("learner", "optimiser"), "optimiser: expected dict, but it is missing"),
    "optimiser-step": (set_to("learner", "optimiser", "step", []), "step: expected int, got list []"),
    "moments": (set_to("learner", "optimiser", "first", 1), "optimiser.first: expected "),
    "moments-missing": (remove("learner", "optimiser", "second"), "optimiser.second: expected "),
    "moment-missing": (remove("learner", "optimiser", "first", FIRST), f"optimiser.first: missing '{FIRST}'"),
    "moment-more": (set_to("learner", "optimiser", "second", "x", torch.ones(3)), "optimiser.second: unexpected 'x'"),
    "moment-shape": (
        set_to("learner", "optimiser", "first", FIRST, torch.ones(3)),
        f"optimiser.first['{FIRST}']: expected float32 [1, 16, 39], got",
    ),
    "moment-nan": (
        in_place("learner", "optimiser", "second", FIRST, (0, 1, 2), float("inf")),
        f"holds a number that is not finite: {FIRST}: Adam's second moment[0, 1, 2] is inf",
    ),
    "replay": (set_to("replay", "no"), "replay: expected dict, got str 'no'"),
    "replay-none": (set_to("replay", None), "replay: expected dict, got NoneType None"),
    "replay-size": (
        set_to("replay", "size", 31),
        "saved replay: obs is [2, 30, 39] (next row 0), which does not fit 30",
    ),
    "replay-head": (set_to("replay", "head", 31), "saved replay: obs is [2, 30, 39] (next row 31), which does not fit"),
    "replay-head-type": (set_to("replay", "head", [0]), "head: expected int, got list [0]"),
    "rows": (remove("replay", "rows"), "rows: expected dict, but it is missing"),
    "rows-field": (remove("replay", "rows", "reward"), "reward: expected Tensor, but it is missing"),
    "rows-dtype": (
        set_to("replay", "rows", "terminal", torch.zeros(2, 30)),
        "saved replay: terminal: expected bool [2, 30], got float32 [2, 30]",
    ),
    "rows-infinite": (
        in_place("replay", "rows", "obs", (1, 5, 7), -float("inf")),
        "holds a number that is not finite: replay obs[1, 5, 7] is -inf",
    ),
    "route-above": (
        in_place(*ROUTE, (1, 5, 2, 0), 3),
        "saved replay, rows from 0: route[1,5,2,0]: route 3 reads distinct modules of 0..2, got 3",
    ),
    "route-twice": (
        in_place(*ROUTE, (0, 29, 3), torch.tensor([2, 2])),
        "saved replay, rows from 0: route[0,29,3,1]: route 4 reads distinct modules of 0..3, got 2 again",
    ),
    "route-first": (
        in_place(*ROUTE, (0, 0, 0, 0), 1),
        "saved replay, rows from 0: route[0,0,0,0]: route 1 reads distinct modules of 0..0, got 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(run, case):
    """Also in a file whose checksum is right."""
    change, message = WRONG[case]
    path = checkpoint_files(run)[-1]
    state = load_checkpoint(path)
    change(state)
    save_checkpoint(run, 60, state)
    line = assert_refused(run, message, "train", "--resume", run)
    assert line.startswith(f"d2r train: {path}: ")


@pytest.mark.parametrize("case", [name for name in WRONG if name.startswith(("config", "steps", "agent", "run_id"))])
def test_evaluation_names_a_wrong_field_too(run, case):
    change, message = WRONG[case]
    state = load_checkpoint(checkpoint_files(run)[-1])
    change(state)
    save_checkpoint(run, 60, state)
    assert_refused(run, message, "eval", run)
