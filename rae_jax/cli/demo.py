"""--mode=demo: a local web page."""

import importlib.util
import itertools

from rae_jax.build import part_weights, sampler
from rae_jax.cli import results
from rae_jax.config.keys import GENERATORS, drawing_from, generator
from rae_jax.errors import UserError
from rae_jax.ui import demo_model


def run(config, workdir, mesh, flags):
    """Serve a page of sampling trajectories, reconstructions and interpolations until SIGINT or SIGTERM."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("--mode=demo needs gradio: pip install -e '.[demo]'")
    from rae_jax.ui import demo_page  # only this mode needs gradio, whose import takes seconds

    demo_page.refuse_more_processes()
    generators = [part for part in GENERATORS if _is_shown(config, part, workdir)]
    sampling = [part_weights.parts_of_sampling(drawing_from(config, part)) for part in generators]
    names = dict.fromkeys(["encoder", "decoder", *itertools.chain(*sampling)])
    trained = part_weights.has_checkpoints(config, workdir)
    page = demo_page.build_page(
        demo_model.DemoModel(config, part_weights.load_all(config, names, workdir, mesh)),
        title=f"rae_jax: {config.name}",
        weights=f"weights of {workdir}" if trained else "weights that the config names",
        class_names=results.class_names(config, workdir) if generators else (),
        held_out=results.held_out(config),
        image_size=config.data.image_size,
        scale=config.guidance.scale if sampler.is_guided(drawing_from(config, "dit")) else 1.0,
    )
    demo_page.serve(page, host=flags.host, port=flags.port)


def _is_shown(config, part, workdir):
    """Return whether a generator is shown: the config's, and the other one if the run trained it.

    Other weights that the config names may be a large download, or may not fit: nothing else needs them.
    """
    if part == generator(config):
        return part_weights.has_part(config, part)
    return part in config.stages and part_weights.is_trained(part, workdir)
