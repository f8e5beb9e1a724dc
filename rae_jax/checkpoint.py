"""Checkpoints of a stage: its whole state and the position of its data iterator, through Orbax."""

import jax
import orbax.checkpoint as ocp
from etils import epath

from rae_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one stage in `folder`/STEP; a context manager that ends with every write finished."""

    def __init__(self, folder, *, keep):
        self._folder = epath.Path(folder).resolve()  # Orbax takes absolute paths alone
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    @property
    def latest(self):
        """Newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def latest_path(self):
        """Folder of the newest one."""
        return self._folder / str(self.latest)

    def save(self, step, state, iterator):
        """Write in the background; the state is copied first, the iterator's position is the one consumed.

        That position is a few numbers that hold for every process, so that another number of them can go on.
        """
        parts = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(iterator.get_state())}
        self._manager.save(step, args=ocp.args.Composite(**parts))

    def restore(self, step, abstract_state, iterator):
        """The state, placed as `abstract_state` says; `iterator` is moved to its position.

        Raises UserError where the checkpoint's position is missing, or that of other data.
        """
        parts = {"state": ocp.args.StandardRestore(abstract_state), "data": ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
        except FileNotFoundError as error:
            raise UserError(
                f"{self._folder / str(step)} is not a whole checkpoint ({error}): remove that folder to go on from "
                f"the one before, or take another --workdir"
            ) from error
        iterator.set_state(restored["data"])
        return restored["state"]


def latest_step(folder):
    """Newest whole checkpoint's step in a stage's folder, or None; creates nothing."""
    folder = epath.Path(folder)
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.is_dir() else None


def restore_entries(folder, step, abstract):
    """Some top-level entries of a stage's state; `abstract` holds just those, with shapes and shardings."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(
            item=abstract, restore_args=jax.tree.map(_restore_arg, abstract), partial_restore=True
        )
        # Orbax takes absolute paths alone here.
        return checkpointer.restore(epath.Path(folder).resolve() / str(step) / "state", args=args)


def _restore_arg(leaf):
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
