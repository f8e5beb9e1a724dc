"""docs/config.md is made from the comments of configs/small.py, and says of each key what it means and may be."""

import pytest

from configs import small
from launch import config_page
from rae_jax.config import checks
from rae_jax.config import keys as config_keys


def _rows():
    """{key: cells} of the page."""
    cells = [line.strip("| ").split(" | ") for line in config_page.page().splitlines() if line.startswith("| `")]
    return {key.strip("`"): rest for key, *rest in cells}


def test_the_page_is_current():
    assert config_page.PAGE.read_text() == config_page.page(), "run python -m launch.config_page"


def test_every_key_has_a_meaning():
    rows = _rows()
    keys = config_keys.flatten(small.get_config().to_dict())
    shared = [key.removeprefix("STAGE.") for key in rows if key.startswith("STAGE.")]
    named = {key for key in rows if not key.startswith("STAGE.")}
    named |= {f"{stage}.{key}" for stage in config_keys.TRAINED for key in shared}
    assert named == set(keys)
    assert all(cells[1] for cells in rows.values())


@pytest.mark.parametrize("table, prefix", [("CHOICES", ""), ("TRAIN_CHOICES", "STAGE.train.")])
def test_every_choice_is_named(table, prefix):
    rows = _rows()
    for key, choices in getattr(checks, table).items():
        missing = [choice for choice in choices if f"`{choice}`" not in " ".join(rows[f"{prefix}{key}"][1:])]
        assert not missing, (key, missing)
