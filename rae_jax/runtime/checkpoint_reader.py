"""Checkpoints of a stage, read without a writer: which exist, and parts of their state."""

import jax
import orbax.checkpoint as ocp
from etils import epath

from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint_manifest, processes


class DamagedCheckpoint(UserError):
    """A checkpoint that was whole when it was written, and no longer is; `path` names it."""

    def __init__(self, path, reason):
        super().__init__(f"the checkpoint {path} is damaged ({reason}): move it away, and --mode=train makes it again")
        self.path, self.reason = path, reason


def steps(folder):
    """Steps of the finished checkpoints in a stage's folder, in order; creates nothing."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(int(path.name) for path in found if ocp.utils.is_checkpoint_finalized(path))


def latest_step(folder):
    """Newest finished checkpoint's step in a stage's folder, or None; creates nothing.

    To be called by all processes: the first one's answer is all others', who may see what it has written later.
    """
    newest = int(processes.agreed(max(steps(folder) if jax.process_index() == 0 else (), default=-1)))
    return None if newest < 0 else newest


def restore_entries(folder, step, abstract):
    """Some top-level entries of a stage's state; `abstract` holds just those, with shapes and shardings.

    Raises DamagedCheckpoint.
    """
    path = absolute(folder) / str(step)
    reason = checkpoint_manifest.damage(path) if jax.process_index() == 0 else None
    if processes.agreed(reason is not None):
        raise DamagedCheckpoint(path, reason or "see the first process")
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(
            item=abstract, restore_args=jax.tree.map(_restore_arg, abstract), partial_restore=True
        )
        return checkpointer.restore(path / "state", args=args)


def position(folder, step):
    """That of the data iterator when a checkpoint was written, as `BatchIterator.get_state` gives it; None where an
    earlier version wrote it."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(absolute(folder) / str(step) / "data")
    except FileNotFoundError:
        return None


def absolute(path):
    """A path as Orbax takes it: a local one absolute. A bucket's is, and would become a local one by `resolve`."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.resolve()


def inside(folder):
    """The paths in a folder; none in one that is empty, which buckets do not have."""
    return list(folder.iterdir()) if folder.is_dir() else []


def is_unfinished(path):
    if ".orbax-checkpoint-tmp" in path.name:
        return True
    return path.name.isdecimal() and not ocp.utils.is_checkpoint_finalized(path)


def _restore_arg(leaf):
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
