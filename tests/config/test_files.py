"""Configs by name and by path: the file that is loaded, and the sources that are refused."""

import sys
from pathlib import Path

import pytest

import rae_jax
from configs import dit_xl, small
from rae_jax.config import command_flag
from rae_jax.config import files as config_files

ROOT = Path(__file__).parents[2]
NAMES = ["decoder_b", "decoder_l", "decoder_xl", "decoder_xl_dinov2_l", "decoder_xl_dinov2_s"]
NAMES += ["dit_b", "dit_l", "dit_s", "dit_xl", "dit_xl_512", "mf_rae_xl", "own_data"]
NAMES += ["plain_dit_xl", "quickstart", "raev2_decoder_k23", "raev2_decoder_k7", "raev2_xl", "sdvae_dit_xl", "small"]
OWN = """
from configs import small


def get_config(name="mine"):
    c = small.get_config()
    c.name = name
    return c
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_config_of_the_checkout_has_a_name(elsewhere):
    assert config_files.names() == NAMES  # encoders.py and study/ hold no config of a run
    for name in NAMES:
        assert config_files.find(name).resolve() == ROOT / "configs" / f"{name}.py"
    assert config_files.load("dit_xl").to_dict() == dit_xl.get_config().to_dict()


def test_a_file_is_found_by_its_path(elsewhere):
    by_path = config_files.load(ROOT / "configs" / "dit_xl.py")
    assert by_path.to_dict() == dit_xl.get_config().to_dict()
    (elsewhere / "dit_xl").write_text(OWN)  # a file of any suffix, which wins over a config of its name
    assert config_files.load("dit_xl").name == "mine"


def test_a_config_of_a_user_imports_the_shipped_ones(elsewhere):
    (elsewhere / "mine.py").write_text(OWN)
    assert config_files.load("mine.py").name == "mine"
    parsed = command_flag.FlagParser().parse("mine.py:other")
    assert parsed.name == "other" and parsed.is_locked
    assert {**parsed.to_dict(), "name": "small"} == small.get_config().to_dict()


def test_neighbours_are_imported_before_the_shipped_ones(elsewhere):
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "mine.py").write_text(OWN)
    changed = (ROOT / "configs" / "small.py").read_text().replace("c.seed = 0", "c.seed = 5")
    (elsewhere / "configs" / "small.py").write_text(changed)
    assert config_files.load("configs/mine.py").seed == 5
    assert config_files.load("quickstart").seed == 0


def test_a_package_configs_of_another_project_is_neither_used_nor_lost(elsewhere, monkeypatch):
    (elsewhere / "configs").mkdir()
    for name in ("__init__", "dit_b"):
        (elsewhere / "configs" / f"{name}.py").write_text("raise ValueError('not ours')")
    monkeypatch.syspath_prepend(elsewhere)
    (elsewhere / "mine.py").write_text("from configs import dit_xl\nget_config = dit_xl.get_config\n")
    assert config_files.load("mine.py").name == "dit_xl"
    loaded, path = sys.modules["configs.small"], list(sys.path)
    assert config_files.load("dit_xl").name == "dit_xl"
    assert sys.modules["configs.small"] is loaded and sys.path == path


@pytest.mark.parametrize(
    "source, message",
    [
        ("dit_x1", "neither a file nor the name of a config; did you mean dit_xl or dit_xl_512 or dit_s?"),
        ("configs/own-data.py", "did you mean own_data?"),
        ("zzz", f"choose from {', '.join(NAMES)}"),
        ("encoders", "neither a file nor the name of a config"),
        ("none.py", "get_config() must return a ConfigDict"),
        ("values.json", "name a Python file with get_config()"),
        ("missing.py", "No such file or directory: 'nothing.txt'"),
    ],
)
def test_a_source_that_is_no_config_is_refused(elsewhere, source, message):
    (elsewhere / "none.py").write_text("x = 1\n")
    (elsewhere / "values.json").write_text("{}")
    (elsewhere / "missing.py").write_text("open('nothing.txt')\n")
    with pytest.raises(rae_jax.UserError) as error:
        config_files.load(source)
    assert str(error.value).startswith(f"cannot load the config {source}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_load_rae_and_load_dit_take_names():
    for load, name, near in ((rae_jax.load_rae, "decoder-xl", "decoder_xl"), (rae_jax.load_dit, "smal", "small")):
        with pytest.raises(rae_jax.UserError, match=f"source='{name}' is neither .* nor a config: did you mean {near}"):
            load(name)
    assert rae_jax.load_rae("quickstart").config.name == "quickstart"
