"""The parts that a mode takes, whoever makes them: which they are, and {name: weights} of them."""

import contextlib

from rae_jax.build import perceptual_networks, stages
from rae_jax.errors import UserError


def load(config, workdir, mesh, step=None):
    """{name: weights} of all that an evaluation takes. Raises UserError where some are not there."""
    names = (*_evaluated(config), *perceptual_networks.named(config))
    found = {name: stages.load(config, name, workdir, mesh, step=step) for name in names}
    return {**found, **guide(config, mesh)}


def find(config, mesh):
    """Raise UserError where weights cannot be had that an evaluation takes and no stage makes; before all is trained.

    Networks that judge images have a `find` of their own, in perception. Nothing is looked for where neither decoder
    nor DiT is trained: who trains an encoder alone may have no decoder of its latents yet.
    """
    if not {"decoder", "dit"} & set(config.stages):
        return
    for name in _evaluated(config):
        if name not in config.stages:
            with _naming(f"config.{name}.weights", config[name].weights):
                stages.load(config, name, "", mesh)
    with _naming("config.guidance.dit.weights", config.guidance.dit.weights):
        guide(config, mesh)


def shipped(config, mesh):
    """{name: weights} as the config names them, whatever the run's workdir holds."""
    with config.unlocked():
        untrained = config.copy_and_resolve_references()
    untrained.stages = ()
    return load(untrained, "", mesh)


def guide(config, mesh):
    """{'guide': AutoGuidance's weak model}, where it is asked for."""
    return {"guide": stages.load_guide(config, mesh)} if config.guidance.method == "autoguidance" else {}


def there(config, name):
    """Whether the run has, or will have, this part."""
    if name in perceptual_networks.PARTS:
        return name in perceptual_networks.named(config)
    return name in config.stages or bool(config[name].weights)


def _evaluated(config):
    """The judge may be missing; without a DiT nothing is generated, and statistics may be."""
    optional = ("judge", "dit") if there(config, "dit") else ("judge", "dit", "statistics")
    return [name for name in stages.FROZEN if name not in optional or there(config, name)]


@contextlib.contextmanager
def _naming(key, weights):
    """What is wrong with weights begins with the key that names them."""
    try:
        yield
    except UserError as error:
        if str(error).startswith("config."):
            raise
        raise UserError(f"{key}={weights!r}: {error}") from error
