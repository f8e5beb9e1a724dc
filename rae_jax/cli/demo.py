"""--mode=demo: a local web page."""

import importlib.util

from rae_jax.build import part_weights, sampler
from rae_jax.cli import results
from rae_jax.config.keys import generator
from rae_jax.errors import UserError
from rae_jax.ui import demo_model


def run(config, workdir, mesh, flags):
    """Serve a page of sampling trajectories, reconstructions and interpolations until SIGINT or SIGTERM."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("--mode=demo needs gradio: pip install -e '.[demo]'")
    from rae_jax.ui import demo_page  # only this mode needs gradio, whose import takes seconds

    demo_page.refuse_more_processes()
    sampled = part_weights.has_part(config, generator(config))
    names = ("encoder", *(part_weights.parts_of_sampling(config) if sampled else ("decoder",)))
    trained = part_weights.has_checkpoints(config, workdir)
    page = demo_page.build_page(
        demo_model.DemoModel(config, part_weights.load_all(config, names, workdir, mesh)),
        title=f"rae_jax: {config.name}",
        weights=f"weights of {workdir}" if trained else "weights that the config names",
        class_names=results.class_names(config, workdir) if sampled else (),
        held_out=results.held_out(config),
        image_size=config.data.image_size,
        scale=config.guidance.scale if sampler.is_guided(config) else 1.0,
    )
    demo_page.serve(page, host=flags.host, port=flags.port)
