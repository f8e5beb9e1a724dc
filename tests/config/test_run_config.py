"""The config.json of a run: the keys with which the run may be resumed, and with which its weights may be used."""

import functools
import json

import pytest
from conftest import tiny

from rae_jax.config import inputs, run_config, scopes
from rae_jax.config.keys import STAGES, flatten
from rae_jax.errors import UserError

DATA = {"num_images": 96, "names": "abc", "class_names": ["a", "b"]}


@pytest.fixture
def run(tmp_path):
    """A function (config) -> the workdir of a run of it, which has checkpoints."""

    def start(config):
        run_config.save(config, tmp_path)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        return tmp_path

    return start


def _with(config, key, value):
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({key: value})
    return config


def _changed(value):
    return "another value" if isinstance(value, str) else value * 2 + 1 if isinstance(value, int | float) else (7, 7)


@pytest.mark.parametrize("stages", [STAGES, ("decoder",), ("dit",)])
@pytest.mark.parametrize("results", [None, (scopes.MODEL,)])
def test_a_run_accepts_the_keys_on_which_its_results_do_not_depend(run, stages, results):
    config = _with(tiny(), "stages", stages)
    workdir, results = run(config), results or stages
    for key, value in flatten(json.loads(config.to_json())).items():
        changed = _with(config, key, _changed(value))
        unused = key.removesuffix(".weights") in config.stages
        if scopes.of(key) & set(results) and not unused and key != "stages":
            with pytest.raises(UserError, match=f"holds a run with config.{key}=.*, not "):
                run_config.check(changed, workdir, *results)
        elif key != "stages":
            run_config.check(changed, workdir, *results)


def test_places_of_data_and_weights_may_change_once_the_run_has_recorded_what_they_hold(run):
    config = _with(_with(tiny(), "stages", ("dit",)), "data.path", "/old/images")
    workdir, moved = run(config), _with(_with(config, "data.path", "/new/images"), "encoder.weights", "/new/encoder")
    with pytest.raises(UserError, match="holds a run with config.data.path='/old/images', not '/new/images'"):
        run_config.check(moved, workdir, "dit")
    inputs.record(workdir, data=DATA, weights={"encoder": "1234"})
    run_config.check(moved, workdir, "dit")
    with pytest.raises(UserError, match="holds a run with config.data.path='/old/images', not ''"):
        run_config.check(_with(config, "data.path", ""), workdir, "dit")
    inputs.compare_data(workdir, DATA, "config.data.path='/new/images'")
    for key, value in {"num_images": 95, "names": "abd", "class_names": ["a", "c"]}.items():
        with pytest.raises(
            UserError, match="on other data than config.data.path='/new/images': 96 images of 2 classes"
        ):
            inputs.compare_data(workdir, {**DATA, key: value}, "config.data.path='/new/images'")
    (workdir / "one").mkdir()
    inputs.record(workdir / "one", data={**DATA, "class_names": [""]})
    inputs.compare_data(workdir / "one", {**DATA, "class_names": ["images"]}, "the name of an only class")
    given = {"encoder": "config.encoder.weights='/new/encoder'", "lpips": "config.lpips.vgg=''"}
    inputs.compare_weights(workdir, {"encoder": "1234", "lpips": "5"}, given)
    with pytest.raises(UserError, match=r"other weights than config.encoder.weights='/new/encoder' .*1234, not 99"):
        inputs.compare_weights(workdir, {"encoder": "99"}, given)
    inputs.record(workdir, weights={"lpips": "5"})
    assert inputs.read(workdir) == {"data": DATA, "weights": {"encoder": "1234", "lpips": "5"}}


def test_a_run_goes_on_with_keys_that_a_later_version_brought(run):
    config = tiny()
    workdir = run(config)
    saved = json.loads((workdir / "config.json").read_text())
    del saved["data"]["on_error"], saved["dit"]["qk_norm"]
    (workdir / "config.json").write_text(json.dumps(saved))
    run_config.check(config, workdir, *STAGES)
    assert run_config.complete(run_config.read_json(workdir / "config.json")).to_dict() == config.to_dict()
    saved["a_key_of_tomorrow"] = 1
    (workdir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="config.a_key_of_tomorrow=1, not None"):
        run_config.check(config, workdir, *STAGES)
    (workdir / "config.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="config.json is truncated or not JSON"):
        run_config.check(config, workdir, *STAGES)


def test_a_run_keeps_what_it_computed_where_a_later_default_differs(run):
    config = _with(tiny(), "stages", ("few_step",))
    assert config.few_step.balance == 0.5
    workdir = run(config)
    saved = json.loads((workdir / "config.json").read_text())
    del saved["few_step"]["balance"]
    (workdir / "config.json").write_text(json.dumps(saved))
    assert run_config.complete(saved).few_step.balance == 1.0
    run_config.check(_with(config, "few_step.balance", 1.0), workdir, "few_step")
    run_config.check(config, workdir, "dit")
    with pytest.raises(UserError, match="holds a run with config.few_step.balance=1.0, not 0.5"):
        run_config.check(config, workdir, "few_step")
    del saved["few_step"]  # older than the stage, which it now gets
    (workdir / "config.json").write_text(json.dumps(saved))
    assert run_config.complete(saved).few_step.balance == 0.5
    run_config.check(config, workdir, "few_step")


def test_every_key_has_a_rule_of_its_own():
    for key in flatten(tiny().to_dict()):
        found = [rule for rule, _ in scopes.RULES if scopes.re.fullmatch(rule, key)]
        assert found != [".*"], f"{key}: add a rule to scopes.RULES"
    assert functools.reduce(frozenset.union, map(scopes.of, flatten(tiny().to_dict()))) == scopes.of("anything else")
