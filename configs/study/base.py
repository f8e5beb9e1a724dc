"""Settings that all experiments share: changes to configs/small.py, sizes, and weights that several experiments use.

    python -m launch.study [--only=width,noise] [--size=fast|full|large]

An experiment is a file in this folder, whose get_config() returns plain data:

    title, claim     the paper's claim, in words
    paper            [(description, number)] from the paper
    config           {key: value} that changes RUN for all runs of the experiment
    foundations      {name: {'config': ..., 'kind': ...}}: runs made once, with seed 0; '@name' stands for their weights
    variants         {name: {key: value}}: one run for each variant and seed
    sizes            {size: {key: value}} that changes SIZES
    measure          measurements of each run, see launch/study/measure.py
    generators       {name: {key: value}}: measure the run's weights with each of these changes; default: unchanged
    generators_of    {variant: generators}: more of them for one variant
    compare          [{'says', 'metric', 'lower', 'higher'}]: the claim is that all of `lower` are below all of `higher`
    columns          metrics in the table
    columns_of_generators   metrics in a second table, with a row for each variant and generator
    plots            [{'y', 'x', 'series', ...}], see launch/study/plots.py
    note             how to read the numbers

Keys are the keys of configs/small.py without `config.`. Later entries override earlier ones, in this order: RUN,
config, SIZES, sizes, variant.
"""

# Short runs of the small job. `@main`: the weights of the main foundation.
RUN = {
    **{f"{part}.weights": "@main" for part in ("encoder", "judge", "decoder", "statistics", "dit")},
    "stages": (),
    "unroll": False,  # compiles in half the time
    "log_every": 10,
    "checkpoint.every": 200,
    "checkpoint.keep": 1,
    "data.num_heldout": 1_000,
    "decoder.train.num_steps": 400,
    "decoder.train.warmup_steps": 50,
    "decoder.train.ema_decay": 0.98,
    "decoder.train.adversarial_weight": 0.0,
    "discriminator.layers": (1,),  # exists in the shallowest encoder too
    "dit.width": 64,
    "dit.num_heads": 2,
    "dit.train.num_steps": 500,
    "dit.train.warmup_steps": 50,
    "dit.train.ema_decay": 0.98,
    "sampler.num_steps": 25,
    "guidance.method": "none",
    "evaluate.num_images": 300,
    "evaluate.batch_size": 100,
    "evaluate.probe": False,
}

SIZES = {
    # Seconds, for the tests.
    "fast": {
        "data.num_train": 256,
        "data.num_heldout": 64,
        "encoder.train.num_steps": 4,
        "encoder.train.batch_size": 8,
        "decoder.train.num_steps": 4,
        "decoder.train.batch_size": 8,
        "statistics.batch_size": 64,
        "dit.width": 16,
        "dit.depth": 1,
        "dit.num_heads": 1,
        "dit.head_width": 16,
        "dit.head_depth": 1,
        "dit.head_num_heads": 1,
        "dit.train.num_steps": 4,
        "dit.train.batch_size": 8,
        "dit.train.optimizer": "adamw",
        "sampler.num_steps": 2,
        "evaluate.num_images": 32,
        "evaluate.batch_size": 32,
    },
    # Minutes on a CPU core: the size of docs/study.md.
    "full": {},
    # Hours on a GPU; never tried.
    "large": {
        "unroll": True,
        "checkpoint.every": 2_000,
        "data.num_heldout": 10_000,
        "encoder.train.num_steps": 20_000,
        "decoder.train.num_steps": 20_000,
        "decoder.train.batch_size": 128,
        "decoder.train.ema_decay": 0.998,
        "dit.train.num_steps": 40_000,
        "dit.train.batch_size": 256,
        "dit.train.ema_decay": 0.9995,
        "sampler.num_steps": 50,
        "evaluate.num_images": 10_000,
        "evaluate.batch_size": 500,
    },
}

# A decoder trained from scratch. With Muon it learns more than the mean colour of each patch within 100 steps, with
# AdamW within 500.
DECODER = {"decoder.train.num_steps": 400, "decoder.train.optimizer": "muon", "decoder.train.learning_rate": 5e-3}

FOUNDATIONS = {
    # On shapes these are the weights in the package; on other data they are trained first.
    "main": {
        "config": {
            "stages": ("encoder", "judge", "decoder", "statistics", "dit"),
            "encoder.train.num_steps": 2_000,
            "judge.train.num_steps": 1_500,
            **DECODER,
            "decoder.train.num_steps": 1_000,
            "dit.width": 96,
            "dit.num_heads": 3,
            "dit.train.num_steps": 4_000,
            "dit.train.ema_decay": 0.998,
        },
    },
    # A DiT after short training: its latents are inaccurate, and it is the weak model of AutoGuidance.
    "weak": {"config": {"stages": ("dit",), "dit.width": 96, "dit.num_heads": 3, "dit.train.num_steps": 300}},
    # Sixteen copies of one image.
    "image": {"kind": "image", "config": {}},
}

# The sizes of the main DiT, for experiments that only sample from it.
MAIN_DIT = {"dit.width": 96, "dit.num_heads": 3}


def kept_every(steps):
    """Return keys that keep a checkpoint every `steps` steps, to measure all of them."""
    return {"checkpoint.every": steps, "checkpoint.keep_every": steps}
