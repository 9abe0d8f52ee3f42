"""`esper doctor`: every check passes here, every one can fail, and none hides what the others say."""

import os
import subprocess
import sys

import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F

from esper.kasmina.banks import Bank
from esper.kasmina.optim import RowOptimizer
from esper.leyline.actions import SiteKind
from esper.leyline.errors import EsperError
from esper.scripts import doctor, self_test
from esper.tolaria import checkpoints
from esper.tolaria.governor import Governor
from helpers.command import ENVIRONMENT, full_from, in_process, snapshot

TWO = {"cpu": "cpu", "cpu:0": "Accelerator 9000"}
"""A second device, which computes as the first one does unless a test sees to it."""


def test_every_check_passes_here(home, capsys):
    code, out, err = in_process(capsys, "doctor")
    assert (code, err) == (0, "")
    for check in doctor.CHECKS:
        assert f"│ {check} " in out
    assert "FAILED" not in out
    assert torch.__version__ in out
    assert "bit for bit: cpu yes, with 1 thread and with 2 " in out
    # It leaves nothing behind, and the threads as it wants them.
    assert snapshot(home) == {}
    assert torch.get_num_threads() == 1


def only(monkeypatch, *names):
    """Leave the other checks out."""
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in names})


def test_a_damaged_data_file(capsys, monkeypatch):
    def fail(**_):
        raise EOFError

    only(monkeypatch, "data", "device", "disk")
    monkeypatch.setattr(sklearn.datasets, "load_digits", fail)
    code, out, _ = in_process(capsys, "doctor")
    assert code == 2
    assert out.count("FAILED") == 1
    assert "FAILED: digits data file" in out
    # The other checks are made all the same.
    assert "takes and syncs" in out


def test_a_full_disk(capsys, monkeypatch):
    only(monkeypatch, "checkpoint", "run store", "disk")
    full_from(monkeypatch, 1)
    code, out, _ = in_process(capsys, "doctor")
    assert code == 2
    assert out.count("FAILED") == out.count("No space left on device") >= 2


# Whatever goes wrong in a check is one line of the table.


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (EsperError("rows differ [/b]"), "FAILED: rows differ [/b]"),
        (
            RuntimeError("\nCUDA error: no kernel image\nCompile with [red]"),
            "FAILED: RuntimeError: CUDA error: no kernel",
        ),
        (MemoryError(), "FAILED: MemoryError "),
        (OSError(28, "No space left on device"), "FAILED: OSError: [Errno 28] No space left on device"),
        (ImportError("libcuda.so.1: cannot open"), "FAILED: ImportError: libcuda.so.1: cannot open"),
    ],
)
def test_nothing_escapes(capsys, monkeypatch, error, said):
    def broken():
        raise error

    monkeypatch.setattr(doctor, "CHECKS", {"first": broken, "last": lambda: "seen"})
    code, out, err = in_process(capsys, "doctor")
    assert (code, err) == (2, "")
    (line,) = (line for line in out.splitlines() if "first" in line)
    assert said in line
    assert "│ last  │ seen " in out


def test_ctrl_c_ends_it(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "CHECKS", {"first": stopped})
    assert in_process(capsys, "doctor")[0] == 130


@pytest.mark.parametrize("error", ["ImportError('libtorch.so: cannot open\\nshared object')", "OSError('bad library')"])
def test_a_torch_that_cannot_be_loaded(home, error):
    (home / "torch.py").write_text(f"raise {error}\n")
    paths = os.pathsep.join([str(home), *sys.path])
    command = [sys.executable, "-m", "esper.scripts.main", "doctor"]
    run = subprocess.run(command, env={**ENVIRONMENT, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("esper: doctor: cannot load what Esper needs: ")
    assert run.stderr.endswith("; install Esper again\n")
    assert len(run.stderr.splitlines()) == 1


# Each self-test sees a fault in what it tries out.


def fails(test, said):
    with pytest.raises(EsperError) as caught:
        test()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [1e-6, float("nan")])
@pytest.mark.parametrize("row", range(3))
def test_a_row_that_is_no_plain_module(monkeypatch, wrong, row):
    whole = self_test.export_row
    monkeypatch.setattr(self_test, "export_row", lambda p, at: lambda x: whole(p, at)(x) + wrong * (at == row))
    fails(self_test.row_layers, "rows differ from plain modules by ")


def test_a_governor_that_sees_nothing(monkeypatch):
    judge = Governor.judge

    def blind(self, *losses, finite_R, **more):
        return judge(self, *(loss_R.nan_to_num(1.0) for loss_R in losses), finite_R=finite_R | True, **more)

    monkeypatch.setattr(Governor, "judge", blind)
    fails(self_test.rollback, "row 3 failed, and the governor caught none")


def test_a_governor_that_sees_ghosts(monkeypatch):
    judge = Governor.judge
    first = torch.tensor([0])

    def frightened(self, *losses, finite_R, **more):
        return judge(self, *losses, finite_R=finite_R.index_fill(0, first, False), **more)

    monkeypatch.setattr(Governor, "judge", frightened)
    fails(self_test.rollback, "row 3 failed, and the governor caught [0, 3]")


def comes_back_as_it_is(bank, back_N, roll_back):
    """Nothing is restored."""


def comes_back_as_another(bank, back_N, roll_back):
    bank.kept[back_N, 0] += 1e-6
    roll_back(bank, back_N)


def harms_its_neighbour(bank, back_N, roll_back):
    roll_back(bank, back_N)
    bank.theta.detach()[back_N.roll(1), 0] += 1e-6


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (comes_back_as_it_is, "did not come back as it was"),
        (comes_back_as_another, "did not come back as it was"),
        (harms_its_neighbour, "changed another one"),
    ],
)
def test_a_rollback_that_goes_wrong(monkeypatch, harm, said):
    roll_back = Bank.roll_back
    monkeypatch.setattr(Bank, "roll_back", lambda bank, back_N: harm(bank, back_N, roll_back))
    fails(self_test.rollback, said)


def test_checkpoints_whose_damage_is_not_found(monkeypatch):
    monkeypatch.setattr(checkpoints, "digest", lambda data: "0")
    fails(self_test.checkpoint, "a damaged checkpoint was not found")


def test_an_episode_that_goes_on_elsewhere_in_its_data(monkeypatch):
    restore = self_test.restore_episode

    def forgetful(episode, facts, files):
        restore(episode, facts, files)
        episode.trainer.update = 0

    monkeypatch.setattr(self_test, "restore_episode", forgetful)
    fails(self_test.checkpoint, "an episode that goes on does something else")


def test_checkpoints_that_are_not_what_was_written(monkeypatch):
    write = checkpoints._write
    monkeypatch.setattr(checkpoints, "_write", lambda path, data: write(path, data[:-1]))
    fails(self_test.checkpoint, "is not used: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_device_that_multiplies_wrongly(monkeypatch, dtype, wrong):
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: matmul(a, b) + wrong * (a.dtype == dtype))
    fails(self_test.device, "cpu: matrix product wrong by ")


@pytest.mark.parametrize("spoil", [lambda y: y.roll(1, 0), lambda y: y * torch.nan], ids=["moved", "nan"])
def test_a_device_that_convolves_wrongly_in_single_precision(monkeypatch, spoil):
    conv2d = F.conv2d

    def spoiled(x, *args, **how):
        y = conv2d(x, *args, **how)
        return spoil(y) if x.dtype == torch.float32 else y

    monkeypatch.setattr(F, "conv2d", spoiled)
    fails(self_test.device, "cpu: update wrong by ")


def test_an_update_that_is_left_out(monkeypatch):
    step = RowOptimizer.step

    def lazy(self, banks, *others):
        made = banks[0].theta.dtype.itemsize > 4
        return step(self, banks, *others) if made else [bank.row_N < 0 for bank in banks]

    monkeypatch.setattr(RowOptimizer, "step", lazy)
    fails(self_test.device, "cpu: update wrong by 1.0e+00")


def test_every_device_is_tried(monkeypatch):
    monkeypatch.setattr(self_test, "_devices", lambda: TWO)
    assert self_test.device() == "products and updates are right on cpu, Accelerator 9000"
    updated = self_test._updated
    monkeypatch.setattr(self_test, "_updated", lambda where, dtype: updated(where, dtype) * (1 + (where == "cpu:0")))
    fails(self_test.device, "Accelerator 9000: update wrong by 1.0e+00")


@pytest.mark.parametrize("shapes", [{SiteKind.VECTOR: (24,)}, {SiteKind.IMAGE: (2, 8, 8)}], ids=["vector", "image"])
@pytest.mark.parametrize("threads", [1, 2])
def test_updates_that_are_not_repeated(monkeypatch, shapes, threads):
    step, made = RowOptimizer.step, []

    def restless(self, banks, grads, rates, active):
        made.append(torch.get_num_threads())
        share = 1 + 0.001 * len(made) * (made[-1] == threads)
        return step(self, banks, grads, [rate * share for rate in rates], active)

    monkeypatch.setattr(self_test, "SHAPES", shapes)
    monkeypatch.setattr(RowOptimizer, "step", restless)
    fails(self_test.kernels, f"give other bits on the cpu with {threads} threads")
    assert set(made) == set(range(1, threads + 1))
    assert torch.get_num_threads() == 1


def test_an_accelerator_that_does_not_repeat_is_told(monkeypatch):
    monkeypatch.setattr(self_test, "_devices", lambda: TWO)
    monkeypatch.setattr(self_test, "_repeats", lambda where, threads: True)
    assert self_test.kernels().endswith("cpu yes, with 1 thread and with 2; Accelerator 9000 yes")
    monkeypatch.setattr(self_test, "_repeats", lambda where, threads: where == "cpu")
    assert self_test.kernels().endswith("cpu yes, with 1 thread and with 2; Accelerator 9000 no")


@pytest.mark.parametrize("kind", list(self_test.SHAPES))
def test_everything_is_on_the_device_that_is_meant(monkeypatch, kind):
    made = []
    monkeypatch.setattr(self_test, "Episode", lambda config, task, *_, **__: made.append((config.device, task)))
    self_test._episode(kind, "meta")
    ((device, task),) = made
    assert device == "meta"
    assert {t.device.type for t in (task.data.train.x, task.data.train.y, task.data.reward_validation.x)} == {"meta"}
