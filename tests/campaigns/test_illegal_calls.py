"""A few hundred illegal and odd calls, and what their campaign makes of processes that die, hang or complain."""

import textwrap

import pytest
from campaigns import illegal_calls

SEED = 11


def test_no_call_crashes_hangs_or_goes_wrong_without_an_error():
    counts = illegal_calls.campaign(300, SEED)
    assert counts.clean, "\n".join([str(counts), *counts.findings])
    assert counts.calls == 300 and counts.tried > 1000


def worker(body):
    """A stand-in for run_calls.py: `body` says what call `number` does on backend b."""
    return textwrap.dedent("""
        import argparse, json, os, signal, time
        parser = argparse.ArgumentParser()
        for name in ("seed", "first", "count"):
            parser.add_argument(f"--{name}", type=int)
        parser.add_argument("--skip")
        a = parser.parse_args()
        skip = json.loads(a.skip)
        def tell(**line):
            print(json.dumps(line), flush=True)
        for number in range(a.first, a.first + a.count):
            if "b" not in skip.get(str(number), []):
                tell(start=number, on="b", call="f(x)")
                BODY
            tell(done=number, tried=1)
        """).replace("BODY", body)


@pytest.mark.parametrize(
    ("body", "kind", "finding"),
    [
        ("number == 3 and os.kill(os.getpid(), signal.SIGSEGV)", "crashes", "crash 3 on b: signal 11 | f(x)"),
        (
            "number == 3 and os.kill(os.getpid(), signal.SIGPROF)",
            "hangs",
            "hang 3 on b: does not come to an end | f(x)",
        ),
        ("number == 3 and time.sleep(60)", "hangs", "hang 3 on b: does not come to an end | f(x)"),
        ("if number == 3: raise OSError('no')", "lost", "lost 3 on b: the campaign itself failed: OSError: no"),
        (
            "number == 3 and tell(number=3, on='b', kind='accepted', message='no error', call='f(x)')",
            "silent",
            "accepted 3 on b: no error | f(x)",
        ),
    ],
    ids=["crash", "endless", "waiting", "own_fault", "silent"],
)
def test_what_happens_to_one_call_is_counted_and_the_others_still_run(monkeypatch, tmp_path, body, kind, finding):
    script = tmp_path / "worker.py"
    script.write_text(worker(body))
    monkeypatch.setattr(illegal_calls, "WORKER", script)
    if "sleep" in body:
        monkeypatch.setattr(illegal_calls, "PATIENCE", 5)
    counts = illegal_calls.campaign(6)
    assert counts.findings == [finding]
    assert {
        name: getattr(counts, name) for name in ("lost", "crashes", "hangs", "silent") if getattr(counts, name)
    } == {kind: 1}
    assert counts.calls == (5 if kind == "lost" else 6) and not counts.clean


def test_a_process_that_dies_after_its_last_call_has_crashed(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(worker("pass") + "os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(illegal_calls, "WORKER", script)
    counts = illegal_calls.campaign(6)
    assert counts.crashes == 1 and counts.calls == 6
    assert counts.findings == ["crash behind 5: the process ended with -11: nothing said"]


def test_all_calls_are_lost_where_no_process_starts(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("raise ImportError('no torch')")
    monkeypatch.setattr(illegal_calls, "WORKER", script)
    counts = illegal_calls.campaign(6)
    assert counts.lost == 6 and not counts.clean
    assert counts.findings == ["lost 0 and what follows: the process does not start: ImportError: no torch"]


def test_nothing_wrong_is_nothing_found(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(worker("pass"))
    monkeypatch.setattr(illegal_calls, "WORKER", script)
    counts = illegal_calls.campaign(6)
    assert counts.clean and counts.calls == counts.tried == 6 and not counts.findings
