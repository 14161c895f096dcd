"""Programs wait briefly for their threads where another process has a core, and only there."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import distributed, threads

ROOT = Path(__file__).parent.parent
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return os.environ


@pytest.mark.parametrize("busy, wanted", [(0.0, None), (0.2, None), (1.0, threads.SHORT)])
def test_waits_are_short_beside_a_busy_core_alone(environment, monkeypatch, busy, wanted):
    monkeypatch.setattr(threads, "missing_cores", lambda: busy)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that what is set here goes away again
    monkeypatch.delenv("GOMP_SPINCOUNT")
    threads.spin_briefly_beside_others()
    assert environment.get("GOMP_SPINCOUNT") == wanted


@pytest.mark.parametrize("name, value", [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")])
def test_what_the_user_has_set_wins(environment, monkeypatch, name, value):
    monkeypatch.setattr(threads, "missing_cores", lambda: 2.0)
    monkeypatch.setenv(name, value)
    threads.spin_briefly_beside_others()
    assert {name: environment.get(name) for name in NAMES if name in environment} == {name: value}


@pytest.mark.parametrize("may_use, missing", [(4, 2.5), (1, 0.0)])
def test_missing_cores_are_counted(monkeypatch, may_use, missing):
    """In a second the machine was idle for 1.5."""
    clock, idle = iter([10.0, 11.0]), iter([100.0, 101.5])
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(threads, "idle_seconds", lambda: next(idle))
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(may_use))
    assert threads.missing_cores() == pytest.approx(missing)


def test_the_next_item_is_made_while_one_is_in_use_and_no_more():
    made, another = [], threading.Event()

    def items():
        for i in range(4):
            made.append(i)
            (i == 1) and another.set()
            yield i
        raise OSError("cut")

    found = threads.one_ahead(items())
    assert next(found) == 0 and another.wait(60) and made == [0, 1]
    with pytest.raises(OSError, match="cut"):
        for item in found:
            assert len(made) <= item + 2


def test_a_system_that_does_not_tell_counts_as_free(monkeypatch):
    def nothing():
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(threads, "idle_seconds", nothing)
    assert threads.missing_cores() == 0.0


@pytest.mark.parametrize("program", ["train.py", "sample.py", "-m toy.experiments"])
def test_programs_ask_before_torch_is_loaded(program, tmp_path):
    """Each one, started as a user does, with an engine.threads that says what was loaded."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.abc, importlib.util\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('torch', 'engine.threads'):\n"
        "            print('loads', name, file=sys.stderr)\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    done = subprocess.run(
        [sys.executable, *program.split(), "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    loads = [line for line in done.stderr.splitlines() if line.startswith("loads")]
    assert done.returncode == 0 and loads[:2] == ["loads engine.threads", "loads torch"], loads


def test_items_are_worked_on_ahead_and_come_in_order():
    """As many ahead as there are threads; a failure comes with its own item."""
    taken = []

    def items():
        for n in range(9):
            taken.append(n)
            yield n

    found = threads.ahead(lambda n: 1 / (n - 5), items(), 3)
    assert next(found)[1].result() == -0.2 and taken == [0, 1, 2, 3]
    rest = [(n, future.exception() or future.result()) for n, future in found]
    assert [n for n, _ in rest] == list(range(1, 9))
    assert [type(value) for _, value in rest].index(ZeroDivisionError) == 4


def test_batches_ahead_are_the_same_and_are_read_in_this_process():
    """Another process would hand them over in /dev/shm, which may be small."""
    read, run = [], SimpleNamespace(micro_batch=2, workers=0)
    alone = SimpleNamespace(rank=0, ranks=1, device=torch.device("cpu"))

    class Numbers:
        def batch(self, step, size):
            return range(step * size, step * size + size)

        def __getitems__(self, indices):
            read.append(os.getpid())
            return {"z_v": torch.tensor(indices)}

    for run.workers in (0, 2):
        found = distributed.micro_batches(Numbers(), 4, run, alone, 1, 2)
        values = [batch["z_v"].tolist() for batch in found]
        assert values == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert read == [os.getpid()] * 8
