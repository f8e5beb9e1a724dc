"""Images as WebDataset's tar files and as parquet files of `datasets`."""

import io
import json
import tarfile

import numpy as np
import pytest
from brought_cases import SIZE, png
from PIL import Image

from rae_jax.data import sources

PNGS = [png(seed) for seed in range(8)]


def open_tar(path, **options):
    """The source of tar files."""
    return sources.webdataset(
        **{"path": str(path), "heldout_path": str(path), "split": "train", "image_size": SIZE, **options}
    )


def open_parquet(path, **options):
    """The source of parquet files."""
    return sources.parquet(
        **{"path": str(path), "heldout_path": str(path), "split": "train", "image_size": SIZE, **options}
    )


def samples(*, first=0, count=4, **members):
    """{name: content} of samples with an image and further members; `{}` in a content is the number of the sample."""
    found = {}
    for n in range(first, first + count):
        found[f"{n:06d}.png"] = PNGS[n]
        found |= {f"{n:06d}.{extension}": text.replace("{}", str(n)) for extension, text in members.items()}
    return found


def pixels_of(source):
    """The pixels of all images of a source."""
    return np.stack([source[i]["image"] for i in range(len(source))])


def expected(count):
    """The pixels of the first PNGS."""
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in PNGS[:count]])


def write_tar(path, members):
    """Write {name: bytes or text} to a tar file, in this order."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def write_parquet(path, rows, *, class_names=None, rows_per_group=3, compression="snappy"):
    """Write [{column: value}] as `datasets` does: images as {bytes, path}, names of classes in the schema."""
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'parquet'")
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    if class_names:
        features = {"label": {"names": list(class_names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows_per_group, compression=compression)
    return str(path)
