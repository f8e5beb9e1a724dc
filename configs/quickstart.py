"""Look at the shipped weights, then train decoder and DiT^DH from scratch for a few minutes with the same code.

    bash launch/quickstart.sh [WORKDIR]

Needs the shipped weights, and its time has not been measured yet; eval/quickstart.json holds both results side by side.
"""

from configs import small


def get_config():
    """The small job on the shipped encoder, judge and statistics, with shorter stages."""
    c = small.get_config()
    c.name = "quickstart"
    c.stages = ("decoder", "dit")
    c.log_every = 10
    c.checkpoint.every = 200
    c.evaluate.update({"num_images": 500, "probe": False, "shipped": True})
    c.decoder.train.update({"num_steps": 300, "discriminator_start": 200, "adversarial_start": 250})
    c.decoder.train.update({"warmup_steps": 50, "ema_decay": 0.99})
    c.dit.train.update({"num_steps": 400, "warmup_steps": 50, "ema_decay": 0.99})
    return c
