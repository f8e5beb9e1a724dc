"""--mode=reconstruct: image files, encoded and decoded."""

from etils import epath

from rae_jax.build import part_weights, perceptual_networks
from rae_jax.cli import results
from rae_jax.errors import UserError
from rae_jax.inference import image_grid, reconstruct
from rae_jax.runtime import processes


def run(config, workdir, mesh, flags):
    """Write pairs of images as PNG files, a picture of the first pairs, and metrics."""
    if flags.images is None:
        raise UserError("--mode=reconstruct needs --images=PATH: name an image or a folder of images")
    names = ("encoder", "decoder", *perceptual_networks.named(config))
    parts = part_weights.load_all(config, names, workdir, mesh)
    results.remember(config, workdir)
    folder = workdir / "samples" / "reconstructed"
    found, picture = reconstruct.reconstruct(config, parts, epath.Path(flags.images), mesh, folder)
    results.write(workdir, "reconstruct.json", found)
    if processes.is_first():
        image_grid.save(workdir / "samples" / "reconstructed.png", picture)
        print(f"picture: {workdir / 'samples' / 'reconstructed.png'}")
        print(f"images:  {folder}")
