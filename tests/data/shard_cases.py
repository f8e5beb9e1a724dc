"""Images as WebDataset's tar files and as parquet files of `datasets`."""

import io
import json
import tarfile

import pytest


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
