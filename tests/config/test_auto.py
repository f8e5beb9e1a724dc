"""The settings that 'auto' stands for: by platform and dtype, and by memory."""

import types

import pytest
from conftest import one_device, tiny

from configs import decoder_xl, dit_xl, dit_xl_512, small
from rae_jax.build import command_line_weights, models
from rae_jax.config import auto, checks, command_flag, run_config
from rae_jax.errors import UserError
from rae_jax.profiling import compile_ahead, fitting


def _device(platform, kind="", capability=""):
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


DEVICES = {
    "H200": _device("gpu", "NVIDIA H200", "9.0"),
    "A100": _device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
    "MI300X": _device("gpu", "AMD Instinct MI300X", "gfx942"),
    "v6e": _device("tpu", "TPU v6 lite"),
    "cpu": _device("cpu", "cpu"),
}


@pytest.mark.parametrize(
    "device, module, dtype, expected",
    [
        ("H200", dit_xl, "bfloat16", ("cudnn", "none", True)),  # the fastest of docs/benchmark.md
        ("H200", decoder_xl, "bfloat16", ("cudnn", "none", True)),
        ("H200", dit_xl, "float32", ("xla", "none", True)),
        ("A100", dit_xl, "bfloat16", ("xla", "none", True)),
        ("MI300X", dit_xl, "bfloat16", ("xla", "none", True)),
        ("v6e", dit_xl, "bfloat16", ("xla", "none", True)),
        ("v6e", dit_xl_512, "bfloat16", ("flash", "none", True)),
        ("cpu", dit_xl, "float32", ("xla", "dots", False)),
    ],
)
def test_the_first_choice_is_the_fastest_and_the_last_one_rematerialises_all(device, module, dtype, expected):
    config = module.get_config()
    config.dtype = dtype
    options = auto.options(config, DEVICES[device])
    assert auto.of(options[0]) == expected and auto.of(options[-1]).remat == "full"
    assert not any(map(auto.is_open, options)) and len(options) == len({auto.of(o) for o in options})
    assert {o.name for o in options} == {config.name}


def test_cudnn_is_not_chosen_for_heads_that_it_cannot_compute():
    config = dit_xl.get_config()
    config.dtype, config.dit.num_heads = "bfloat16", 96
    assert auto.settled(config, DEVICES["H200"]).attention == "xla"


def test_values_of_the_user_stay(monkeypatch):
    command = ["main", "--config=dit_xl", "--config.unroll=False", "--config.remat=full"]
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=command)
    command_flag.parser(flag, command_line_weights.complete, values)(command)
    (option,) = auto.options(values.config, DEVICES["A100"])
    assert auto.of(option) == ("xla", "full", False)
    checks.check(values.config, one_device(), trains=False)
    config = dit_xl.get_config()
    config.unroll = "perhaps"
    with pytest.raises(UserError, match="config.unroll='perhaps' cannot work: choose one of True, False, 'auto'"):
        checks.check(config, one_device(), trains=False)


def test_unroll_takes_every_kind_of_value_in_every_config():
    for module in (dit_xl, small):
        config = module.get_config()
        for config.unroll in (True, False, "auto"):
            checks.check(config, one_device(), trains=False)
        config.update({"attention": "xla", "remat": "dots", "unroll": False})
        assert not auto.is_open(config) and models.dit(config).unroll is False
    found = run_config.complete({"unroll": False})
    found.unroll = "auto"
    assert auto.is_open(found)


@pytest.mark.slow
def test_a_stage_gets_the_first_choice_that_fits(monkeypatch, capfd):
    """Measured by the compiler on this machine, with a limit between the memory of two choices."""
    config, mesh = tiny(), one_device()
    config.dit.depth, config.dit.train.batch_size = 4, 64
    config.update({"attention": "auto", "remat": "auto", "unroll": "auto"})
    settings = (
        {"attention": "xla", "remat": "none", "unroll": False},
        {"attention": "xla", "remat": "full", "unroll": False},
    )
    monkeypatch.setattr(auto, "choices", lambda *_: [auto.Choice(**values) for values in settings])
    sizes = [fitting._needed(option, "dit", mesh) for option in auto.options(config, mesh.devices.flat[0])]
    assert sizes[0] > 1.1 * sizes[1]
    for limit, chosen in ((0, 0), (sizes[0], 0), ((sizes[0] + sizes[1]) / 2, 1), (1000, 1)):
        monkeypatch.setattr(fitting, "memory_of", lambda device, limit=limit: limit / fitting.MARGIN)
        found = fitting.fitted(config, "dit", mesh)
        assert auto.of(found)._asdict() == settings[chosen]
        said = capfd.readouterr().err
        assert said.startswith(f"dit: {auto.of(found)} on cpu, float32") and said.count("\n") == 1
    assert fitting.fitted(found, "dit", mesh) is found and capfd.readouterr().err == ""
    assert compile_ahead.training_program(found, mesh, "dit").batch_size == 64
