"""A folder of your own images, one subfolder per class, at 32 px: trains every stage in minutes on two CPU cores.

    python -m rae_jax.main --config=configs/own_data.py --workdir=runs/mine \
        --config.data.path=FOLDER --config.data.num_classes=N

docs/own_data.md says how to check that the data is read as intended, and shows what a run writes.
"""

from configs import small


def get_config():
    """The small job on images of a folder, with stages that take a few minutes together."""
    c = small.get_config()
    c.name = "own_data"
    c.data.source = "image_folder"
    c.checkpoint.every = 200
    c.evaluate.update({"num_images": 200, "probe": False})
    c.encoder.train.update({"num_steps": 300})
    c.judge.train.update({"num_steps": 200})
    c.decoder.train.update({"num_steps": 500, "discriminator_start": 350, "adversarial_start": 400})
    c.dit.train.update({"num_steps": 800, "flip": True})
    for stage in (c.encoder, c.judge, c.decoder, c.dit):
        stage.train.update({"warmup_steps": 50, "ema_decay": 0.99})
    return c
