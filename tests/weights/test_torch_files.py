"""Torch files as training programs write them: other objects next to the tensors, of which none runs code."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import types
import zipfile

import numpy as np
import pytest

from rae_jax.errors import UserError
from rae_jax.weights import hub

torch = pytest.importorskip("torch")
# What a training checkpoint holds besides weights.
EXTRAS = {
    "args": argparse.Namespace(lr=1e-4, out=pathlib.PurePath("a"), nested=argparse.Namespace(betas=(0.9, 0.95))),
    "best": np.float64(0.5),
    "steps": {np.int64(3): np.bool_(True)},
    "rng": ("MT19937", np.arange(3, dtype=np.uint32), 624),
    "path": pathlib.Path("/data/x"),
    "metrics": collections.defaultdict(list, {"loss": [1.0, np.float32(2.0)]}),
    "counts": collections.Counter("ab"),
    "version": torch.__version__,
    "simple": types.SimpleNamespace(a=1),
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
    "none": None,
}
ARRAY = np.arange(1, 7, dtype=np.float32).reshape(2, 3)


def _tensors(path):
    return {name: tensor.read() for name, tensor in hub.open_checkpoint(str(path)).items()}


def _refused(path):
    with pytest.raises(UserError) as refusal:
        hub.open_checkpoint(str(path))
    message = str(refusal.value)
    assert "\n" not in message and str(path) in message
    return message


def _assert_is_array(path):
    found = _tensors(path)
    assert found.keys() == {"a.weight"}
    np.testing.assert_array_equal(found["a.weight"], ARRAY)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["ema", "model", "state_dict", None])
def test_a_training_checkpoint_with_other_objects_is_read(tmp_path, key, zipped):
    state = collections.OrderedDict({"a.weight": torch.tensor(ARRAY)})
    content = {**EXTRAS, key: state} if key else {**EXTRAS, **state}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    _assert_is_array(tmp_path / "file.pt")


@pytest.mark.parametrize("numpy, paths", [("numpy.core", "pathlib"), ("numpy._core", "pathlib._local")])
def test_the_names_of_old_and_new_versions_are_read(tmp_path, numpy, paths):
    """NumPy 1 and 2, Python 3.12 and 3.13."""
    torch.save({**EXTRAS, "model": {"a.weight": torch.tensor(ARRAY)}}, tmp_path / "ours.pt")
    with zipfile.ZipFile(tmp_path / "ours.pt") as ours, zipfile.ZipFile(tmp_path / "file.pt", "w") as theirs:
        for name in ours.namelist():
            content = ours.read(name)
            if name.endswith("data.pkl"):
                content = re.sub(rb"cnumpy\._?core\.", f"c{numpy}.".encode(), content)
                content = re.sub(rb"cpathlib(\._local)?\n", f"c{paths}\n".encode(), content)
                assert f"c{numpy}.multiarray\nscalar\n".encode() in content
                assert f"c{paths}\nPosixPath\n".encode() in content
            theirs.writestr(name, content)
    _assert_is_array(tmp_path / "file.pt")


@pytest.mark.parametrize("other", [argparse.Namespace(a=1), 0.9999, np.float64(0.9999), {}, {"decay": 0.9}, None, "no"])
def test_a_name_of_weights_without_tensors_does_not_confuse(tmp_path, other):
    torch.save({"ema": other, "model": {"a.weight": torch.tensor(ARRAY)}}, tmp_path / "file.pt")
    _assert_is_array(tmp_path / "file.pt")
    torch.save({"model": other, "a.weight": torch.tensor(ARRAY)}, tmp_path / "file.pt")
    _assert_is_array(tmp_path / "file.pt")


def test_entries_that_are_not_tensors_are_left_out(tmp_path):
    state = {"a.weight": torch.nn.Parameter(torch.tensor(ARRAY)), "b": 3, "c": None, "d": "x", 7: torch.ones(1)}
    torch.save({"model": {**state, "e": np.float32(1), "f": [1]}}, tmp_path / "file.pt")
    _assert_is_array(tmp_path / "file.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": np.ones(3)}, torch.ones(3), {}, {"model": {}}, 3])
def test_a_file_without_a_dict_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "file.pt")
    assert "holds no dict of tensors: save the state dict" in _refused(tmp_path / "file.pt")


class Trainer:
    """An object of a training program."""


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_are_named(tmp_path, zipped):
    content = {"model": {"a.weight": torch.tensor(ARRAY)}, "args": argparse.Namespace(trainer=Trainer())}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    message = _refused(tmp_path / "file.pt")
    assert f"holds an object of {__name__}.Trainer" in message and "torch.save(model.state_dict(), FILE)" in message


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "file.pt")
    assert "holds an object of torch.nn.modules.linear.Linear" in _refused(tmp_path / "file.pt")


class _Call:
    """Pickled, it is a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["value", "in the namespace", "in the weights", "as a key"])
@pytest.mark.parametrize("function, name", [(open, "io.open"), (os.open, "posix.open"), (exec, "exec")])
def test_a_file_that_asks_for_a_call_is_refused_and_calls_nothing(tmp_path, function, name, place):
    created = tmp_path / "created"
    arguments = {
        "io.open": (str(created), "w"),
        "posix.open": (str(created), os.O_CREAT),
        "exec": (f"open({str(created)!r}, 'w')",),
    }
    call = _Call(function, *arguments[name])
    content = {"model": {"a.weight": torch.tensor(ARRAY)}}
    match place:
        case "value":
            content["args"] = call
        case "in the namespace":
            content["args"] = argparse.Namespace(a=[call])
        case "in the weights":
            content["model"]["b"] = call
        case "as a key":
            content[call] = 1
    torch.save(content, tmp_path / "file.pt")
    assert f"holds an object of {name}, which could run code" in _refused(tmp_path / "file.pt")
    assert not created.exists()
    pickle.loads(pickle.dumps(call))  # elsewhere it calls
    assert created.exists()


def test_a_torch_that_runs_the_code_of_files_is_refused(tmp_path, monkeypatch):
    torch.save({"a.weight": torch.tensor(ARRAY)}, tmp_path / "file.pt")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cu124"))
    assert "needs torch 2.6 or newer, not 2.5.1+cu124: upgrade it, or put" in _refused(tmp_path / "file.pt")
