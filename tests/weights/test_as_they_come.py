"""Files of every kind as others write them: in half precision, by names of wrapped models, with NaN and Inf."""

import file_cases
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rae_jax.errors import UserError
from rae_jax.weights import hub, safetensors_tree

HALVES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


def _wrapped(arrays):
    """By the names of a DistributedDataParallel of a compiled model, a part of which is compiled as well."""
    names = {name: f"module._orig_mod.{name.replace('.', '._orig_mod.', 1)}" for name in arrays}
    return {names[name]: array for name, array in arrays.items()}


def _refused(name, path, monkeypatch):
    with pytest.raises(UserError) as refusal:
        file_cases.load(name, path, monkeypatch)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def _assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == np.float32
        np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize("name", file_cases.ALL)
def test_wrapped_models_in_half_precision_are_read(tmp_path, monkeypatch, name):
    """As the file with the same numbers in float32, by the model's own names."""
    for dtype in HALVES:
        halves = {key: array.astype(dtype) for key, array in file_cases.arrays(name).items()}
        singles = {key: array.astype(np.float32) for key, array in halves.items()} | file_cases.constants(name)
        save_file(singles, tmp_path / "float32.safetensors")
        save_file(_wrapped(halves), tmp_path / "half.safetensors")
        expected = file_cases.load(name, tmp_path / "float32.safetensors", monkeypatch)
        _assert_equal(file_cases.load(name, tmp_path / "half.safetensors", monkeypatch), expected)


@pytest.mark.parametrize("name", file_cases.ALL)
def test_torch_files_of_wrapped_models_in_half_precision_are_read(tmp_path, monkeypatch, name):
    torch = pytest.importorskip("torch")
    tensors = {key: torch.tensor(array) for key, array in file_cases.arrays(name).items()}
    for dtype in (torch.float16, torch.bfloat16):
        halves = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        singles = {key: tensor.float().numpy() for key, tensor in halves.items()} | file_cases.constants(name)
        save_file(singles, tmp_path / "float32.safetensors")
        torch.save({"epoch": 3, "model": _wrapped(halves)}, tmp_path / "half.pt")
        expected = file_cases.load(name, tmp_path / "float32.safetensors", monkeypatch)
        _assert_equal(file_cases.load(name, tmp_path / "half.pt", monkeypatch), expected)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *HALVES], ids=str)
@pytest.mark.parametrize("name", file_cases.WITH_CONSTANTS)
def test_constants_of_another_model_are_refused_in_every_precision(tmp_path, monkeypatch, name, dtype):
    for key, value in file_cases.constants(name).items():
        changed = {**file_cases.arrays(name), key: 1.03 * value}
        save_file({key: array.astype(dtype) for key, array in changed.items()}, tmp_path / "file.safetensors")
        message = _refused(name, tmp_path / "file.safetensors", monkeypatch)
        assert f"{key!r} has other values than this project computes" in message


@pytest.mark.parametrize("name", file_cases.ALL)
def test_values_that_are_not_finite_are_refused(tmp_path, monkeypatch, name):
    unused = ("decoder.", "post_quant", "text_model.", *file_cases.constants(name))
    learned = [key for key in sorted(file_cases.arrays(name)) if not key.startswith(unused)]
    key = next(key for key in learned if key.endswith((".bias", "mean", "var", "lin0.model.1.weight")))
    for dtype, value in ((np.float32, np.nan), (np.float16, np.inf), (jnp.bfloat16, -np.inf)):
        array = file_cases.arrays(name)[key].astype(dtype)
        array.flat[-1] = value
        save_file({**file_cases.arrays(name), key: array}, tmp_path / "file.safetensors")
        short = key.removeprefix("vision_model.").removeprefix("vit.")
        assert f"{short!r} holds NaN or Inf" in _refused(name, tmp_path / "file.safetensors", monkeypatch)


def test_our_own_files_in_half_precision_are_read(tmp_path):
    for dtype in HALVES:
        tree = {"a": {"kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3).astype(dtype)}}
        safetensors_tree.write(tmp_path / "file.safetensors", tree)
        found = safetensors_tree.read(tmp_path / "file.safetensors", {"a": {"kernel": np.zeros((2, 3), np.float32)}})
        _assert_equal(found["a"], {"kernel": tree["a"]["kernel"].astype(np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_our_own_files_that_are_not_finite_are_refused(tmp_path, value):
    tree = {"a": {"kernel": np.array([1, value], np.float32)}, "b": np.ones(3, np.float32)}
    safetensors_tree.write(tmp_path / "file.safetensors", tree)
    with pytest.raises(UserError, match="file.safetensors: 'a/kernel' holds NaN or Inf"):
        safetensors_tree.read(tmp_path / "file.safetensors", tree)


def test_types_that_numpy_lacks_are_named(tmp_path):
    """A tensor that is not read may have any type."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_tensors

    path = tmp_path / "file.safetensors"
    save_tensors({"a/b": torch.ones(2, dtype=torch.float8_e4m3fn), "c": torch.ones(2)}, path)
    tensors = hub.open_checkpoint(str(path))
    np.testing.assert_array_equal(tensors["c"].read(), np.ones(2))
    with pytest.raises(UserError, match="'a/b' has the type F8_E4M3: write it as F32, F16 or BF16"):
        tensors["a/b"].read()
    with pytest.raises(UserError, match="'a/b' has the type F8_E4M3: write it as F32, F16 or BF16"):
        safetensors_tree.read(path, {"a": {"b": np.ones(2)}, "c": np.ones(2)})


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_names_of_wrappers_are_removed(tmp_path, prefix):
    for counter in ({}, {"n_averaged": np.ones((), np.int64)}):  # AveragedModel has it
        save_file(
            {f"{prefix}a.weight": np.ones(2), f"{prefix}module.b": np.ones(3), **counter}, tmp_path / "x.safetensors"
        )
        found = hub.open_checkpoint(str(tmp_path / "x.safetensors"))
        assert {name: tensor.shape for name, tensor in found.items()} == {"a.weight": (2,), "module.b": (3,)}


@pytest.mark.parametrize(
    "names",
    [
        ("module.a", "b"),  # not of every name
        ("_orig_mod.a", "b"),
        ("a._orig_mod.b", "a.b"),  # two tensors would get one name
        ("module.a._orig_mod", "module_b"),
    ],
)
def test_other_names_stay(tmp_path, names):
    save_file({name: np.ones(2) for name in names}, tmp_path / "x.safetensors")
    assert set(hub.open_checkpoint(str(tmp_path / "x.safetensors"))) == set(names)


def test_the_wrappers_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    half_compiled = torch.nn.Sequential(torch.compile(model[0]), model[1])
    wrapped = {
        "compiled": torch.compile(model),
        "parallel": torch.nn.DataParallel(torch.compile(model)),
        "averaged": torch.optim.swa_utils.AveragedModel(model),
        "part": half_compiled,
    }
    for name, module in wrapped.items():
        assert module.state_dict().keys() != expected.keys()
        for place in ("ema", "model", "state_dict", None):
            content = {place: module.state_dict(), "step": 3} if place else module.state_dict()
            torch.save(content, tmp_path / f"{name}.pt")
            found = hub.open_checkpoint(str(tmp_path / f"{name}.pt"))
            assert found.keys() == expected.keys(), (name, place)
            for key, value in expected.items():
                np.testing.assert_array_equal(found[key].read(), value)
