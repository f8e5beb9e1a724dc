"""Reading of a stage's checkpoints without a writer: the existing steps, and parts of their state."""

import jax
import orbax.checkpoint as ocp
from etils import epath

from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint_manifest, processes


class DamagedCheckpoint(UserError):
    """A checkpoint that was complete when it was written and is damaged now; `path` names it."""

    def __init__(self, path, reason):
        super().__init__(f"the checkpoint {path} is damaged ({reason}): move it away, and run --mode=train again")
        self.path, self.reason = path, reason


def steps(folder):
    """Return the steps of the finished checkpoints in a stage's folder, in order; create nothing."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(int(path.name) for path in found if ocp.utils.is_checkpoint_finalized(path))


def latest_step(folder):
    """Return the step of the newest finished checkpoint in a stage's folder, or None; create nothing.

    All processes must call it and get the first process's answer: the others may see new files later than the first.
    """
    newest = int(processes.agreed(max(steps(folder) if jax.process_index() == 0 else (), default=-1)))
    return None if newest < 0 else newest


def restore_entries(folder, step, abstract):
    """Return the top-level entries of a stage's state that `abstract` holds, which has their shapes and shardings.

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
    """Return the data iterator's position in a checkpoint, as `BatchIterator.get_state` returned it.

    None if an earlier version wrote the checkpoint.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(absolute(folder) / str(step) / "data")
    except FileNotFoundError:
        return None


def absolute(path):
    """Return the absolute path that Orbax needs. A bucket's path is absolute; `resolve` would make it a local one."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.resolve()


def inside(folder):
    """Return the paths in a folder; an empty list if it does not exist, because buckets have no empty folders."""
    return list(folder.iterdir()) if folder.is_dir() else []


def is_unfinished(path):
    """Return whether a path is a checkpoint whose write has not finished."""
    if ".orbax-checkpoint-tmp" in path.name:
        return True
    return path.name.isdecimal() and not ocp.utils.is_checkpoint_finalized(path)


def _restore_arg(leaf):
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
