"""Stages that start from given weights: what is taken over, what is not, and what is said about it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_device, random_like, tiny
from flax import traverse_util

from rae_jax.build import fine_tuning, models, objectives, part_weights, published_weights, saved_config
from rae_jax.config import inputs
from rae_jax.errors import UserError
from rae_jax.models import autoencoder
from rae_jax.runtime import checkpoint, sharding
from rae_jax.weights import safetensors_tree

NAMES = ("cat", "dog", "hen")


def _flat(tree):
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def _config(stage, source="", **changes):
    config = tiny()
    config[stage].train.init = str(source)
    config.update_from_flattened_dict(changes)
    return config


def _begun(config, stage, names=tuple("0123456789")):
    """Return (parameters before the stage begins, the state after)."""
    init, _ = objectives.init_and_step(config, stage)
    mesh, shapes = one_device(), jax.eval_shape(init, jax.random.key(1))
    state = random_like(shapes, seed=5, scale=1.0)
    state["opt_state"] = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["opt_state"])
    state["step"] = np.int32(0)
    state = jax.device_put(state, sharding.shardings(shapes, mesh))
    fresh = state["params"]["encoder"] if stage == "encoder" else state["params"]
    before = _flat(fresh)
    return before, fine_tuning.begin(config, stage, mesh, names)(state)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder of random weights as convert writes it, {part: weights}."""
    folder, config = tmp_path_factory.mktemp("converted"), tiny()
    parts = random_like({p: part_weights.shapes(config, p) for p in ("encoder", "decoder", "dit")}, seed=3, scale=0.2)
    for part, tree in parts.items():
        safetensors_tree.write(folder / f"{part}.safetensors", tree)
    saved_config.write(config, folder, parts)
    return folder, parts


def test_the_file_of_a_part_is_as_good_as_its_folder(converted, tmp_path):
    """A file of this name with the names of the released files is read as one of these."""
    folder, parts = converted
    _, state = _begun(_config("dit", folder / "dit.safetensors", **{"data.num_classes": 4}), "dit", "abcd")
    np.testing.assert_array_equal(state["params"]["label_embed"]["table"][:4], parts["dit"]["label_embed"]["table"][:4])
    (released,) = published_weights.write_released(tiny(), {"decoder": parts["decoder"]}, tmp_path, pickled=False)
    for path in (folder / "decoder.safetensors", released.rename(tmp_path / "decoder.safetensors")):
        config = tiny()
        config.decoder.weights, config.stages = str(path), ()
        found = part_weights.load(config, "decoder", None, one_device())
        np.testing.assert_allclose(found["cls_token"], parts["decoder"]["cls_token"], rtol=1e-6)


@pytest.mark.parametrize("stage", ["encoder", "decoder", "dit"])
def test_parameters_and_averages_are_the_given_ones_and_moments_are_zero(converted, capfd, stage):
    folder, parts = converted
    _, state = _begun(_config(stage, folder), stage)
    wanted = _flat(parts[stage])
    for params in (state["params"], state["ema_params"], *state.get("more_ema_params", ())):
        found = _flat(params["encoder"] if stage == "encoder" else params)
        assert found.keys() == wanted.keys()
        for path, value in wanted.items():
            np.testing.assert_array_equal(found[path], value)
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert moments and not any(bool(leaf.any()) for leaf in moments)
    assert int(state["step"]) == 0
    new = {"encoder": "the heads for pixels and classes", "decoder": "the discriminator"}.get(stage)
    said = f"; not taken over: {new}" if new else ""
    assert capfd.readouterr().err == f"{stage}: starts from the weights of {folder}{said}\n"


def test_a_workdir_s_average_is_taken_and_its_classes_match_by_name(tmp_path, capfd):
    theirs = tiny()
    theirs.data.num_classes, theirs.stages = 3, ("dit",)
    init, _ = objectives.init_and_step(theirs, "dit")
    state = random_like(jax.eval_shape(init, jax.random.key(0)), seed=1, scale=0.5)
    state["step"] = np.int32(6)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(theirs.to_json())))
    inputs.record(tmp_path, data={"num_images": 9, "names": "x", "class_names": list(NAMES)})
    with checkpoint.Checkpoints(tmp_path / "checkpoints" / "dit", keep=1) as checkpoints:
        checkpoints.save(6, jax.tree.map(jnp.asarray, state), type("Data", (), {"get_state": lambda self: {}})())
    ours = _config("dit", tmp_path, **{"data.num_classes": 4})
    _, begun = _begun(ours, "dit", ("hen", "owl", "cat", "elk"))
    table, average = (np.asarray(tree["label_embed"]["table"]) for tree in (begun["params"], state["ema_params"]))
    np.testing.assert_array_equal(table, average[[2, 3, 0, 3, 3]])
    assert "not taken over: 2 of 4 classes, which start as the null label (owl, elk)" in capfd.readouterr().err


@pytest.mark.parametrize("count, rows, new", [(4, [0, 1, 2, 3, 10], None), (12, [*range(10), 10, 10, 10], "2 of 12")])
def test_without_names_classes_match_by_number(converted, capfd, count, rows, new):
    folder, parts = converted
    config = _config("dit", folder, **{"data.num_classes": count})
    _, state = _begun(config, "dit", [f"class {i}" for i in range(count)])
    np.testing.assert_array_equal(state["params"]["label_embed"]["table"], parts["dit"]["label_embed"]["table"][rows])
    said = f"; not taken over: {new} classes, which start as the null label (class 10, class 11)" if new else ""
    assert capfd.readouterr().err == f"dit: starts from the weights of {folder}{said}\n"


def test_labels_that_are_not_used_are_the_null_label(converted):
    folder, parts = converted
    _, state = _begun(_config("dit", folder, **{"dit.class_conditional": False, "guidance.method": "none"}), "dit")
    null = parts["dit"]["label_embed"]["table"][10:]
    np.testing.assert_array_equal(state["params"]["label_embed"]["table"], null)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_released_file_of_another_number_of_classes(converted, tmp_path, pickled):
    if pickled:
        pytest.importorskip("torch")
    parts = {"dit": converted[1]["dit"]}
    (file,) = published_weights.write_released(tiny(), parts, tmp_path, pickled=pickled)
    config = _config("dit", file, **{"data.num_classes": 3})
    _, state = _begun(config, "dit", NAMES)
    found, wanted = _flat(state["params"]), _flat(parts["dit"])
    np.testing.assert_array_equal(found.pop("label_embed/table"), wanted.pop("label_embed/table")[[0, 1, 2, 10]])
    for path, value in found.items():
        np.testing.assert_allclose(value, wanted[path], rtol=1e-6)


@pytest.mark.parametrize("changes", [{"data.image_size": 64}, {"dit.class_conditional": False}], ids=str)
def test_a_released_dit_for_another_grid_and_without_classes(converted, tmp_path, changes):
    dit = converted[1]["dit"]
    (file,) = published_weights.write_released(tiny(), {"dit": dit}, tmp_path, pickled=False)
    config = _config("dit", file, **{**changes, "guidance.method": "none"})
    fine_tuning.check(config, tmp_path, one_device())
    _, state = _begun(config, "dit")
    found, wanted = _flat(state["params"]), _flat(dit)
    if "dit.class_conditional" in changes:
        wanted["label_embed/table"] = wanted["label_embed/table"][10:]
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-6)


def test_a_run_of_another_machine_s_kernel_is_a_start(converted, tmp_path):
    folder, _ = converted
    shutil.copytree(folder, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": "cudnn", "dtype": "bfloat16"}))
    fine_tuning.check(_config("dit", tmp_path / "theirs"), tmp_path, one_device())


def test_a_released_decoder_for_another_grid_and_other_patches(converted, tmp_path, capfd):
    """Its table of positions is of its own grid; ours are computed."""
    decoder = converted[1]["decoder"]
    (file,) = published_weights.write_released(tiny(), {"decoder": decoder}, tmp_path, pickled=False)
    config = _config("decoder", file, **{"data.image_size": 64})
    config.stages = ("decoder",)
    _, state = _begun(config, "decoder")
    for path, value in _flat(state["params"]).items():
        np.testing.assert_allclose(value, _flat(decoder)[path], rtol=1e-6)
    assert "not taken over: positions of latents (8, 8, 16)" in capfd.readouterr().err
    config.update_from_flattened_dict({"data.image_size": 32, "encoder.patch_size": 8, "decoder.patch_size": 8})
    fresh, state = _begun(config, "decoder")
    found = _flat(state["params"])
    for path, value in found.items():
        wanted = fresh if path.startswith("pred/") else _flat(decoder)
        np.testing.assert_allclose(value, wanted[path], rtol=1e-6)
    assert "not taken over: pred/bias, pred/kernel" in capfd.readouterr().err


def test_an_encoder_s_table_of_positions_is_resized_as_the_encoder_itself_resizes_it(converted):
    folder, parts = converted
    config = _config("encoder", folder, **{"data.image_size": 48})
    _, state = _begun(config, "encoder")
    images = jax.random.uniform(jax.random.key(0), (2, 48, 48, 3))
    theirs = tiny()
    theirs.data.image_size, theirs.encoder.position_size = 48, 32
    found = models.autoencoder(config).encode(state["params"]["encoder"], images)
    wanted = models.autoencoder(theirs).encode(parts["encoder"], images)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert isinstance(models.autoencoder(config), autoencoder.Autoencoder)


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("dit", {"dit.width": 32}, "these weights have 'condition_proj/bias'"),
        ("dit", {"dit.head_depth": 0}, "these weights (have|lack) '.*': they are of another model than config.dit"),
        ("dit", {"dit.qk_norm": True}, "these weights lack 'head/attention/k_norm/scale'"),
        ("decoder", {"decoder.depth": 2}, "'blocks/.*' has shape .* in these weights, and .* by config.decoder"),
    ],
)
def test_weights_of_another_model_are_refused_before_training(converted, tmp_path, stage, changes, message):
    config = _config(stage, converted[0], **changes)
    with pytest.raises(UserError, match=f"config.{stage}.train.init='.*': {message}"):
        fine_tuning.check(config, tmp_path, one_device())
    with pytest.raises(UserError, match=f"config.{stage}.train.init='.*': {message}"):
        _begun(config, stage)


def test_weights_that_do_not_exist_are_named_once(tmp_path):
    config = _config("dit", tmp_path / "nowhere.pt")
    with pytest.raises(UserError) as error:
        fine_tuning.check(config, tmp_path, one_device())
    path = tmp_path / "nowhere.pt"
    wanted = f"config.dit.train.init='{path}': the file {path} does not exist: name another file, a folder, or a hub id"
    assert str(error.value) == wanted
    (tmp_path / "checkpoints" / "dit" / "6").mkdir(parents=True)
    (tmp_path / "checkpoints" / "dit" / "6" / "_CHECKPOINT_METADATA").write_text("{}")
    fine_tuning.check(config, tmp_path, one_device())  # it has begun: they are not read again


def test_other_settings_of_the_weights_are_said(converted, capfd):
    _begun(_config("dit", converted[0], **{"dit.prediction": "data"}), "dit")
    assert "not taken over: config.dit.prediction='velocity'" in capfd.readouterr().err


def test_weights_that_a_stage_ignores_are_said(capfd):
    config = _config("dit")
    fresh, state = _begun(config, "dit")
    assert all((_flat(state["params"])[path] == value).all() for path, value in fresh.items())
    wanted = "dit: starts from random weights, config.dit.weights is for runs without this stage; config.dit.train.init"
    assert wanted in capfd.readouterr().err
    config.dit.weights = ""
    _begun(config, "dit")
    assert capfd.readouterr().err == ""
