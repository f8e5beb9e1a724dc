"""A short run of tests/stress/fuzz.py, and tests of the faults that it has found."""

import zipfile

import numpy as np
import pytest
from stress import fuzz, fuzz_shards

from rae_jax.data import sources, stores
from rae_jax.errors import UserError
from rae_jax.weights import hub


def test_damaged_files_and_wrong_configs_are_accepted_or_rejected_in_one_line(tmp_path):
    for tally in (fuzz.images(120, 1), fuzz.files(60, 1, tmp_path), fuzz.configs(40, 1, tmp_path / "run")):
        assert tally.wrong == [] and tally.rejected > 10


def test_damaged_archives_are_accepted_or_rejected_in_one_line(tmp_path):
    tally = fuzz_shards.shards(500, 1, tmp_path / "archives")
    assert tally.wrong == [] and tally.rejected > 100 and tally.accepted > 10


@pytest.mark.parametrize(
    "member, content", [("byteorder", b"littl "), (".data/serialization_id", b"\x84\xff"), ("data.pkl", b"}")]
)
def test_garbled_members_of_a_torch_file(tmp_path, member, content):
    torch = pytest.importorskip("torch")
    torch.save({"var": torch.ones(3)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "file.pt", "w") as garbled:
        for name in whole.namelist():
            garbled.writestr(name, content if name.endswith(member) else whole.read(name))
    try:
        for tensor in hub.open_checkpoint(str(tmp_path / "file.pt")).values():
            np.testing.assert_array_equal(tensor.read(), np.ones(3))
    except UserError as error:
        assert "is not a whole file of tensors" in str(error)


def test_a_zip_bomb_is_rejected(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(21):
            archive.writestr(f"a/{number}.png", bytes(100_000))
    how = {"path": str(tmp_path / "bomb.zip"), "heldout_path": "", "split": "train", "image_size": 16}
    assert (tmp_path / "bomb.zip").stat().st_size < 10_000
    with pytest.raises(UserError, match="cannot identify image"):
        sources.image_folder(**how)[0]
    monkeypatch.setattr(stores, "LARGEST_IMAGE", 99_999)
    with pytest.raises(UserError, match="bomb.zip:a/1.png .its unpacked size is 100000 bytes"):
        sources.image_folder(**how)[0]


def _cached_file(folder, name, content):
    """Write a file in the layout of the hub's cache; return its path."""
    blob = folder / "blobs" / name
    blob.parent.mkdir(parents=True)
    blob.write_bytes(content)
    path = folder / "snapshots" / "main" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.symlink_to(blob)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9",  # sha256sum
        "95d09f2b10159347eece71399a7e2e907ea3df4f",  # git hash-object
    ],
)
def test_downloads_from_the_hub_are_checked_against_their_hash(tmp_path, name):
    path = _cached_file(tmp_path / "whole", name, b"hello world")
    assert hub._verified(path) == path
    path = _cached_file(tmp_path / "garbled", name, b"hello worle")
    with pytest.raises(UserError, match="model.safetensors is not as the hub has it"):
        hub._verified(path)
    assert not path.exists() and not (tmp_path / "garbled" / "blobs" / name).exists()


def test_a_file_without_a_published_hash_is_accepted(tmp_path):
    path = _cached_file(tmp_path, "other", b"hello world")
    assert hub._verified(path) == path
