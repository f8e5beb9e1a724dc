"""Evaluate the shipped weights, then train decoder and DiT^DH from scratch for a few minutes with the same code.

    bash launch/quickstart.sh [WORKDIR]

eval/quickstart.json has both results: the names of the trained weights' metrics begin with `trained_`.
"""

from configs import small


def get_config():
    """The small job on the shipped encoder, judge and statistics, with shorter stages."""
    c = small.get_config()
    c.name = "quickstart"
    c.stages = ("decoder", "dit")
    c.checkpoint.every = 200
    c.data.num_heldout = 1_000
    c.evaluate.update({"num_images": 300, "probe": False, "shipped": True})
    c.decoder.train.update({"num_steps": 900, "discriminator_start": 700, "adversarial_start": 750})
    c.dit.train.update({"num_steps": 1_200})
    for stage in (c.decoder, c.dit):
        stage.train.update({"warmup_steps": 50, "ema_decay": 0.99})
    return c
