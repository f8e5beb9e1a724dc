"""Packing of shards: labels and captions are kept, and damage is named."""

import json

import numpy as np
import pytest
from brought_cases import SIZE, labels_of
from shard_cases import (
    PNGS,
    expected,
    open_parquet,
    open_tar,
    pixels_of,
    samples,
    write_parquet,
    write_tar,
)

from rae_jax.data import pack, packed_images, sources
from rae_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_kept")


def test_captions_and_labels_are_kept_in_packs(tmp_path):
    write_tar(tmp_path / "0.tar", samples(count=3, cls="{}", json='{"caption": ["one", "zwei — {}"]}'))
    rows = [{"image": {"bytes": PNGS[n], "path": None}, "label": n, "caption": f"bär {n}"} for n in range(3)]
    form = {"image_size": SIZE, "crop": "centre", "encoding": "png", "quality": 95, "on_error": "stop"}
    form |= {"images_per_shard": 2, "num_workers": 1}
    cases = {"tar": (open_tar(tmp_path / "0.tar"), lambda n: ["one", f"zwei — {n}"])}
    cases["parquet"] = (open_parquet(write_parquet(tmp_path / "0.parquet", rows)), lambda n: [f"bär {n}"])
    for kind, (source, captions) in cases.items():
        pack.pack({"train": source}, tmp_path / kind, **form)
        packed = packed_images.PackedImages(path=tmp_path / kind, split="train", image_size=SIZE)
        assert [packed.captions(n) for n in range(3)] == [captions(n) for n in range(3)] and labels_of(packed) == [
            0,
            1,
            2,
        ]
        np.testing.assert_array_equal(pixels_of(packed), expected(3))


def test_a_caption_that_cannot_be_read_is_skipped_or_named_by_packing(tmp_path):
    members = {
        "0.png": PNGS[0],
        "0.cls": "0",
        "0.json": '{"caption": "a"}',
        "1.png": PNGS[1],
        "1.cls": "0",
        "1.json": "{",
    }
    write_tar(tmp_path / "0.tar", members)
    form = {"image_size": SIZE, "crop": "centre", "encoding": "png", "quality": 95, "images_per_shard": 2}
    parts = {"train": open_tar(tmp_path / "0.tar")}
    with pytest.raises(UserError, match="0.tar:1 "):
        pack.pack(parts, tmp_path / "stop", **form, num_workers=1, on_error="stop")
    index = pack.pack(parts, tmp_path / "skip", **form, num_workers=1, on_error="skip")
    assert index["splits"]["train"][0]["num_images"] == 1


def test_packing_is_not_resumed_with_other_labels(tmp_path):
    members = samples(cls="{}") | {f"{n:06d}.json": json.dumps({"label": 3 - n}) for n in range(4)}
    write_tar(tmp_path / "0.tar", dict(sorted(members.items())))  # the same classes in another order
    form = {"image_size": SIZE, "crop": "centre", "encoding": "png", "quality": 95, "images_per_shard": 2}
    form |= {"num_workers": 1, "on_error": "stop"}
    pack.pack({"train": open_tar(tmp_path / "0.tar")}, tmp_path / "packed", **form)
    others = open_tar(tmp_path / "0.tar", fields={**sources.NO_FIELDS, "label": "json.label"})
    with pytest.raises(UserError, match="holds shards of other data or with other options"):
        pack.pack({"train": others}, tmp_path / "packed", **form)
    request = json.loads((tmp_path / "packed" / "request.json").read_text())
    del request["labels"]  # as an older version wrote it
    (tmp_path / "packed" / "request.json").write_text(json.dumps(request))
    pack.pack({"train": open_tar(tmp_path / "0.tar")}, tmp_path / "packed", **form)
