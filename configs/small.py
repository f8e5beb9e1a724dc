"""The whole job at small scale, from nothing: encoder, judge, decoder, statistics, DiT^DH on 32x32 shapes.

    python -m rae_jax.main --config=configs/small.py --workdir=runs/small

The weights that ship with the package were made by this config. Every other config starts from this one.
"""

from ml_collections import ConfigDict


def get_config():
    """Every key there is, with the values of the small job."""
    c = ConfigDict()
    c.name = "small"  # eval/NAME.json
    c.seed = 0
    c.dtype = "float32"  # of matrix products: 'float32' or 'bfloat16'; parameters stay float32
    c.stages = ("encoder", "judge", "decoder", "statistics", "dit")
    c.log_every = 20
    c.wandb = ""  # a project of Weights & Biases that is shown the metrics as well; '': none
    c.unroll = True  # unroll blocks over depth: faster on CPU, slower to compile
    # What of each block a backward pass computes again, to keep less: 'none'; 'dots', all but attention's result and
    # the products with kernels, save the one after attention; 'full', all, which is a third more work.
    c.remat = "none"
    # By XLA; 'cudnn': on NVIDIA Hopper and newer, in bfloat16; 'flash': on TPU, for a thousand tokens and more.
    c.attention = "xla"

    # Where compiled programs are kept for the next start: '': in ~/.cache; a folder, which hosts may share; 'none'.
    c.compilation_cache = ""
    # Devices: data splits the batch; fsdp does, too, and every kernel, optimiser moment and average; tensor splits the
    # heads and hidden channels of blocks. -1: those that others leave; of two, fsdp takes at most 16, data the rest.
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    c.checkpoint = _checkpoint()
    c.health = _health()
    c.data = _data()
    c.encoder = _encoder()
    c.judge = _judge()
    c.decoder = _decoder()
    # LPIPS, for the decoder's loss and as a metric: weights of VGG16 and of its features; a file, a folder, a hub id or
    # one file of it, 'ID:FILE'; '': none.
    c.lpips = ConfigDict({"vgg": "", "linear": ""})
    c.discriminator = _discriminator()
    c.statistics = ConfigDict({"weights": "small", "batch_size": 256})  # weights 'none': latents stay as they are
    c.dit = _dit()
    c.sampler = _sampler()
    c.guidance = _guidance()
    c.evaluate = _evaluate()
    return c


def _checkpoint():
    return ConfigDict(
        {
            "every": 500,  # steps
            "keep": 2,  # the newest ones
            "keep_every": 0,  # and those of every so many-th step; 0: none
            "best": "",  # and the best one by this metric of config.evaluate.every, 'fd' or 'psnr' say; '': none
            "best_is": "lowest",  # or 'highest'
            "on_error": "continue",  # at one that cannot be written: reported, tried again after a pause; or 'stop'
        }
    )


def _health():
    return ConfigDict(
        {
            "skip": 0,  # updates in a row that may be left out as they are not finite; takes a second state's memory
            "spike": 10.0,  # a loss so many interquartile ranges above the recent ones is reported; 0: none
            "stalled": 20.0,  # a step that takes so many times as long as usual, and half a minute, is; 0: none
            "heartbeat": 10.0,  # seconds between two writings of heartbeat.json; 0: none, and no look at stalled steps
        }
    )


def _evaluate():
    return ConfigDict(
        {
            "every": 0,  # steps of the decoder's and the DiT's training between two evaluations; 0: only at the end
            "num_images": 1000,  # how many are generated
            "batch_size": 256,
            "probe": True,  # linear probes of the encoder
            "shipped": False,  # of the shipped weights as well
            # FID's InceptionV3, named as LPIPS' weights are; '': no FID, sFID, Inception Score, precision and recall.
            "inception": "",
            # What generated images are compared with: an .npz as ADM's (arr_0: images; mu, sigma, mu_s, sigma_s: the
            # moments that FID and sFID take, where they are there), or a folder of images; '': the held-out images.
            "reference": "",
        }
    )


def _data():
    return ConfigDict(
        {
            "source": "shapes",  # or 'image_folder', 'array_record' (packed by rae_jax.data.pack), 'tfds'
            # image_folder: a folder with one subfolder of images per class, a .zip archive of such, or a list with a
            # line `IMAGE LABEL` for each; array_record: what was packed; tfds: its data_dir ('': TFDS' own)
            "path": "",
            "heldout_path": "",  # image_folder: the same for evaluation; empty: every 20th image of path
            "tfds": {"name": "", "split": "train", "heldout_split": "validation"},
            "latents": "",  # the DiT trains from what rae_jax.pack_latents put there; '': the encoder runs in its step
            "on_error": "stop",  # at an image that cannot be read; or 'skip': reported, another one in its place
            "image_size": 32,
            "num_classes": 10,
            "num_train": 50_000,  # shapes: how many there are
            "num_heldout": 2_000,
            "num_threads": 2,  # that read images, in this process or in each worker; 0: none besides the main one
            "num_workers": 0,  # processes that read images; 0: only this one
        }
    )


_VIT = {
    "family": "small",  # 'dino', 'dinov2', 'siglip2', 'mae', 'dinov3', 'sd_vae': see configs/encoders.py
    "weights": "small",  # if the stage is not run: 'small' or a folder; a hub id or a folder of a published one
    "width": 64,
    "depth": 6,
    "num_heads": 2,
    "mlp": "gelu",  # or 'gelu_tanh', 'swiglu'
    "mlp_ratio": 4.0,  # hidden size over width
    "patch_size": 4,
    "input_size": 0,  # images are resized to this before they are encoded; 0: as they are
    "position_size": 0,  # the image size that the table of positions is for; 0: the encoder's input
    "num_registers": 4,
    "mean": (0.5, 0.5, 0.5),  # of the encoder's input
    "std": (0.25, 0.25, 0.25),
}


def _encoder():
    return ConfigDict(
        {
            **_VIT,
            "layers": (),  # blocks, from 0, whose tokens are averaged into the latent; none: the last
            "widths": (),  # sd_vae: channels of its levels, the finest first
            "train": _encoder_train(),
        }
    )


def _discriminator():
    return ConfigDict(
        {
            # The frozen transformer whose tokens are judged: 'encoder' is the encoder itself, and the other keys do not
            # matter; or a published family with the encoder's keys.
            "backbone": {**_VIT, "family": "encoder", "weights": ""},
            "layers": (1, 3),  # the backbone's blocks whose tokens are judged, from 0; a head for each
            "loss": "hinge",  # or 'vanilla'
            "augment": {"prob": 1.0, "cutout": 0.0},  # probability of each kind; wiped-out square, as a part of a side
        }
    )


def _encoder_train():
    train = _train(num_steps=4_000, batch_size=64, learning_rate=2e-3, clip_norm=1.0)
    train.noise_tau = 0.3
    train.detail = 4.0  # how much a patch's differences from its mean colour are magnified before they are asked for
    train.label_weight = 1.0
    return train


def _judge():
    return ConfigDict(
        {
            "weights": "small",  # '': no judge, and none of its metrics
            "widths": (32, 64, 128),
            "train": _train(num_steps=2_000, batch_size=64, learning_rate=2e-3),
        }
    )


def _decoder():
    train = _train(num_steps=4_000, batch_size=16, learning_rate=2e-3)
    train.noise_tau = 0.3
    train.lpips_weight = 0.0
    train.discriminator_start = 2_800  # of the discriminator's updates
    train.adversarial_start = 3_000  # from then on the decoder tries to fool it
    train.adversarial_weight = 0.75  # 0: no discriminator, and no backbone is loaded
    return ConfigDict(
        {
            "weights": "small",  # if the stage is not run: 'small', a folder, a published file, a hub id, or none
            "width": 96,
            "depth": 4,
            "num_heads": 3,
            "hidden": 384,
            "patch_size": 4,
            "grid_size": 0,  # tokens a side, to which latents of another size are resized; 0: as the latents are
            "train": train,
        }
    )


def _dit():
    train = _train(num_steps=18_000, batch_size=16, learning_rate=5e-3, clip_norm=1.0, optimizer="muon")
    train.time = "logit_normal"  # distribution of training times before the shift; or 'uniform'
    train.time_mean = 1.0
    train.time_std = 1.5
    train.label_dropout = 0.1
    train.more_ema_decays = ()  # of further averages beside ema_decay's
    train.microbatches = 1  # a batch's gradient is summed over so many parts of it: less memory
    sizes = _dit_sizes()
    # average: whose weights are used. 0: ema_decay's; n: those of the n-th of more_ema_decays.
    # time_shift: the factor that moves times, of training and sampling, towards noise. 0: sqrt(h w D / 4096), by the
    # latent's dimension; 1: none.
    how = {"average": 0, "path": "linear", "prediction": "velocity", "time_shift": 0.0}
    return ConfigDict({**sizes, **how, "train": train})


def _dit_sizes():
    return {
        "weights": "small",
        "width": 96,
        "depth": 4,
        "num_heads": 3,
        "head_width": 128,
        "head_depth": 2,  # 0: a plain DiT, without the wide head
        "head_num_heads": 4,
        "patch_size": 1,  # of the latent, a side; 2 makes 256 tokens of 32x32 VAE latents
        "qk_norm": False,  # normalise queries and keys
        "class_conditional": True,  # False: every label is the null one
    }


def _sampler():
    return ConfigDict(
        {
            "method": "euler",  # or 'heun', 'adaptive' (needs diffrax), 'sde' (Euler-Maruyama)
            "num_steps": 50,
            "grid": "plain",  # or 'published': num_steps points, so one step less, that end just before data
            "reuse": 1,  # euler on DiT^DH: steps for which one output of the trunk serves
            "refresh": (),  # instead of every `reuse`-th: the steps, from 0, that make the trunk's output anew
            "rtol": 1e-3,  # of the adaptive solver
            "atol": 1e-6,
            "diffusion": "sigma",  # sde: or 'constant', 'score_based', 'linear', 'decreasing', 'increasing_decreasing'
            "last_step": "mean",  # sde: or 'tweedie', 'euler', 'none'
            "last_step_size": 0.04,  # sde: where the last step starts, before the shift
        }
    )


def _guidance():
    return ConfigDict(
        {
            "method": "cfg",  # or 'none', 'autoguidance'
            "scale": 2.5,
            "t_min": 0.0,
            "t_max": 1.0,
            "dit": {**_dit_sizes(), "weights": ""},  # autoguidance: the weak model
        }
    )


def _train(*, num_steps, batch_size, learning_rate, clip_norm=0.0, ema_decay=0.998, optimizer="adamw", **extra):
    return ConfigDict(
        {
            "unit": "step",  # of num_steps, warmup_steps and what ends in _start: 'step', or 'epoch' of the data set
            "num_steps": num_steps,
            "batch_size": batch_size,  # global
            "learning_rate": learning_rate,
            "final_learning_rate": learning_rate / 100,
            "warmup_steps": 200,
            "optimizer": optimizer,  # or 'muon': the blocks' kernels by Muon, the rest by AdamW
            "decay_start": 0,  # constant between the warm-up and then
            "decay": "cosine",  # or 'linear', down to the last step
            "b1": 0.9,
            "b2": 0.95,
            "weight_decay": 0.0,
            "clip_norm": clip_norm,  # 0: no clipping
            "ema_decay": ema_decay,
            "crop": "centre",  # or 'random', after a resize to 1.5 times the size
            "flip": False,  # random horizontal flips
            **extra,
        }
    )
