"""The whole job at small scale, from scratch: encoder, judge, decoder, statistics, DiT^DH on 32x32 shapes.

    python -m rae_jax.main --config=configs/small.py --workdir=runs/small

This config made the weights that ship with the package. Every other config starts from this config.
The comment of a key stands above the key or behind it. docs/config.md is made from these comments: after a change, run
`python -m launch.config_page`.
"""

from ml_collections import ConfigDict, FieldReference

from configs import diffusion


def get_config():
    """Return every key with its value in the small job."""
    c = ConfigDict()
    c.name = "small"  # name of the config; results are written to `eval/NAME.json`
    c.seed = 0  # seed of the initial weights, of all noise and of the order of the data
    # Type of matrix products; parameters, moments and losses are float32 in either case. One of 'float32', 'bfloat16'.
    c.dtype = "float32"
    # Stages that the run trains, in this order; a part whose stage is not in the list has its weights from the key
    # `weights`. Any of 'encoder', 'judge', 'decoder', 'statistics', 'dit', 'few_step'.
    c.stages = ("encoder", "judge", "decoder", "statistics", "dit")
    c.log_every = 20  # steps between two rows of metrics
    c.wandb = ""  # project of Weights & Biases to which the metrics are also sent; '': none
    # Unroll the blocks over depth instead of scanning them: faster steps, slower compilation. In the full-size configs
    # unroll, remat and attention are 'auto': chosen for the devices and their memory (docs/scale.md).
    c.unroll = FieldReference(True, field_type=object)
    # Rematerialisation: activations that the backward pass computes again to save memory. none: no activation. dots:
    # all except the result of attention and the products with kernels; the product after attention is computed again
    # too. full: all, with a third more work. One of 'none', 'dots', 'full', 'auto'.
    c.remat = "none"
    # Kernel of the attention. One of 'xla', 'cudnn' (NVIDIA Hopper and newer, bfloat16), 'flash' (TPU, for a thousand
    # tokens and more), 'auto'.
    c.attention = "xla"
    # Folder that keeps compiled programs for the next start, and that hosts may share; '': a folder in ~/.cache;
    # 'none': no program is kept.
    c.compilation_cache = ""
    c.mesh = {
        # Devices along the axis that splits the batch. -1: all devices that the other axes leave.
        "data": -1,
        # Devices along the axis that splits the batch and every kernel, optimiser moment and average. -1: all devices
        # that the other axes leave; if `data` is -1 too, at most 16 devices, and `data` takes the others.
        "fsdp": 1,
        "tensor": 1,  # devices along the axis that splits heads and hidden channels of the blocks
    }
    c.checkpoint = _checkpoint()
    c.health = _health()
    c.data = _data()
    c.encoder = _encoder()
    c.judge = _judge()
    c.decoder = _decoder()
    c.lpips = {
        # LPIPS' VGG16, for the decoder's loss and as a metric: a file, a folder, a hub id, or one file of a hub id,
        # 'ID:FILE'; '': no LPIPS.
        "vgg": "",
        "linear": "",  # LPIPS' weights of VGG16's features, named as `vgg` is
    }
    c.discriminator = _discriminator()
    c.statistics = {
        # Statistics if this run does not compute them: 'small', a folder, a published file or a hub id; 'none': no
        # normalisation.
        "weights": "small",
        "batch_size": 256,  # images at a time, on all devices
    }
    c.dit = diffusion.dit(_train(num_steps=18_000, batch_size=16, learning_rate=5e-3, clip_norm=1.0, optimizer="muon"))
    c.few_step = diffusion.few_step(
        _train(num_steps=1_000, batch_size=16, learning_rate=1e-3, clip_norm=1.0, ema_decay=0.99)
    )
    c.sampler = diffusion.sampler()
    c.guidance = diffusion.guidance()
    c.evaluate = _evaluate()
    return c


def _checkpoint():
    return {
        "every": 500,  # steps between two checkpoints
        "keep": 2,  # number of the newest checkpoints that are kept
        "keep_every": 0,  # checkpoints at multiples of this number of steps are never deleted; 0: none
        "best": "",  # metric of evaluations in training, such as 'fd', by which the best checkpoint is kept; '': none
        "best_is": "lowest",  # best value of the metric `best`. One of 'lowest', 'highest'.
        # Reaction to a checkpoint that cannot be written: report it and retry after a pause, or stop. One of
        # 'continue', 'stop'.
        "on_error": "continue",
    }


def _health():
    return {
        # Updates in a row that may be skipped because they are not finite, with the memory of a second state; 0: none.
        "skip": 0,
        "spike": 10.0,  # a loss this number of interquartile ranges above recent losses is reported; 0: never
        # A step that takes this number of times as long as usual, and at least half a minute, is reported; 0: never.
        "stalled": 20.0,
        "heartbeat": 10.0,  # seconds between two updates of heartbeat.json; 0: none, and no report of slow steps
    }


def _evaluate():
    return {
        "every": 0,  # steps of the decoder's and the DiT's training between two evaluations; 0: only at the end
        "num_images": 1000,  # number of images that an evaluation generates
        "batch_size": 256,  # images at a time, on all devices
        "probe": True,  # train linear probes on the encoder's features at the end
        "shipped": False,  # evaluate the shipped weights as well
        # FID's InceptionV3, named as lpips.vgg is; '': no FID, sFID, Inception Score, precision and recall.
        "inception": "",
        # Images that generated images are compared with: a folder of images or an .npz in ADM's format (`arr_0`:
        # images; `mu`, `sigma`, `mu_s`, `sigma_s`: moments for FID and sFID, if present); '': the held-out images.
        "reference": "",
    }


def _data():
    return {
        # Kind of data set. One of 'shapes' (drawn, nothing to download), 'image_folder', 'array_record' (packed by
        # rae_jax.data.pack), 'tfds', 'webdataset' (tar files), 'parquet' (needs pyarrow).
        "source": "shapes",
        # Place of the data set (docs/data.md). image_folder: a folder of class folders, a .zip archive or a list.
        # webdataset, parquet: a folder of shards, or a pattern. array_record: the packed folder. tfds: its data_dir.
        "path": "",
        # Images for evaluation, named as in `path`; '': every 20th image of `path`. Not for array_record and tfds.
        "heldout_path": "",
        "heldout_labels": "",  # file with the labels of a flat `heldout_path` (docs/data.md); '': none
        "fields": {
            "image": "",  # parquet: column of the images; '': the usual name, here and below
            "label": "",  # webdataset: extension, such as 'cls', or 'json.KEY'; parquet: column
            "caption": "",  # webdataset: extension, such as 'txt', or 'json.KEY'; parquet: column
        },
        "tfds": {
            "name": "",  # name of the data set, such as 'imagenet2012'
            "split": "train",  # split for training
            "heldout_split": "validation",  # split for evaluation
        },
        "latents": "",  # folder of rae_jax.pack_latents, for training the DiT; '': the training step encodes images
        # Reaction to an image that cannot be read: stop and name it, or report it and use another image. One of
        # 'stop', 'skip'.
        "on_error": "stop",
        "image_size": 32,  # height and width in pixels
        "num_classes": 10,  # number of classes; it must equal the data set's
        "num_train": 50_000,  # shapes: number of training images
        "num_heldout": 2_000,  # shapes: number of held-out images
        "num_threads": 2,  # threads that read images, in this process or in each worker; 0: the main thread reads
        "num_workers": 0,  # processes that read images; 0: this process reads
    }


_VIT = {
    # Architecture, see configs/encoders.py. One of 'small' (encoder only), 'dino', 'dinov2', 'siglip2', 'mae',
    # 'dinov3', 'sd_vae' (encoder only), 'encoder' (discriminator only: the encoder itself; the other keys have no
    # effect).
    "family": "small",
    # Weights if this run does not train them: 'small' (encoder only), a folder, a published file or a hub id; '': none.
    "weights": "small",
    "width": 64,  # channels of a token
    "depth": 6,  # number of blocks
    "num_heads": 2,  # number of attention heads
    "mlp": "gelu",  # kind of MLP. One of 'gelu', 'gelu_tanh', 'swiglu'.
    "mlp_ratio": 4.0,  # hidden size of the MLP over width
    "patch_size": 4,  # height and width of a patch in pixels
    "input_size": 0,  # size to which images are resized before they are encoded; 0: not resized
    "position_size": 0,  # image size that the table of positions is for; 0: the encoder's input size
    "num_registers": 4,  # number of register tokens
    "mean": (0.5, 0.5, 0.5),  # mean of the colours, subtracted from the encoder's input
    "std": (0.25, 0.25, 0.25),  # standard deviation of the colours, by which the encoder's input is divided
}


def _encoder():
    return {
        **_VIT,
        "layers": (),  # blocks, from 0, whose tokens are averaged into the latent; (): the last block
        "widths": (),  # sd_vae: channels of the levels, the finest level first
        "train": _encoder_train(),
    }


def _discriminator():
    return {
        "backbone": {**_VIT, "family": "encoder", "weights": ""},
        "layers": (1, 3),  # blocks of the backbone, from 0, each with a discriminator head for its tokens
        "loss": "hinge",  # loss of the discriminator. One of 'hinge', 'vanilla'.
        "augment": {
            "prob": 1.0,  # probability of each kind of augmentation
            "cutout": 0.0,  # side of the square that is erased, as a fraction of the image's side
        },
    }


def _encoder_train():
    train = _train(num_steps=4_000, batch_size=64, learning_rate=2e-3, clip_norm=1.0)
    train.init = ""  # weights to start from, named as `weights` is, or the workdir of a run; '': random weights
    train.noise_tau = 0.3  # largest standard deviation of the noise that is added to latents
    train.detail = 4.0  # factor by which a patch's differences from its mean colour are magnified in the target
    train.label_weight = 1.0  # weight of the classification loss
    return train


def _judge():
    return {
        # Weights if this run does not train them: 'small' or a folder; '': no judge and no agreement.
        "weights": "small",
        "widths": (32, 64, 128),  # channels of the levels
        "train": _train(num_steps=2_000, batch_size=64, learning_rate=2e-3),
    }


def _decoder():
    train = _train(num_steps=4_000, batch_size=16, learning_rate=2e-3)
    train.init = ""  # weights to start from, named as `weights` is, or the workdir of a run; '': random weights
    train.noise_tau = 0.3  # largest standard deviation of the noise that is added to latents
    train.lpips_weight = 0.0  # weight of the LPIPS loss; 0: no LPIPS in the loss
    train.discriminator_start = 2_800  # first step of the discriminator's updates
    train.adversarial_start = 3_000  # first step of the adversarial loss
    train.adversarial_weight = 0.75  # weight of the adversarial loss; 0: neither discriminator nor backbone
    return {
        # Weights if this run does not train them: 'small', a folder, a published file or a hub id; '': none.
        "weights": "small",
        "width": 96,  # channels of a token
        "depth": 4,  # number of blocks
        "num_heads": 3,  # number of attention heads
        "hidden": 384,  # hidden channels of the MLP
        "patch_size": 4,  # height and width in pixels of the patch that one token becomes
        "grid_size": 0,  # tokens along a side, to which latents of another size are resized; 0: not resized
        # Output of the last layer: images in the encoder's normalisation, or in [0, 1] (RAEv2). One of 'normalised',
        # 'image'.
        "output": "normalised",
        "train": train,
    }


def _train(*, num_steps, batch_size, learning_rate, clip_norm=0.0, ema_decay=0.998, optimizer="adamw", **extra):
    return ConfigDict(
        {
            # Unit of num_steps, warmup_steps and all keys that end in _start. One of 'step', 'epoch' (of the data set).
            "unit": "step",
            "num_steps": num_steps,  # length of the training
            "batch_size": batch_size,  # images of a step, on all devices
            "learning_rate": learning_rate,  # learning rate after the warm-up
            "final_learning_rate": learning_rate / 100,  # learning rate at the last step
            "warmup_steps": 200,  # length of the linear warm-up; 0: none
            # Optimiser. One of 'adamw', 'muon' (Muon for the kernels of the blocks, AdamW for the rest), 'muon_all'
            # (RAEv2: Muon for all matrices except patch embeddings, with the coefficients of Polar Express).
            "optimizer": optimizer,
            "decay_start": 0,  # start of the decay; between the warm-up and this start the learning rate is constant
            "decay_end": 0,  # end of the decay, after which the learning rate is constant; 0: the last step
            "decay": "cosine",  # shape of the decay. One of 'cosine', 'linear'.
            "b1": 0.9,  # decay of the first moment
            "b2": 0.95,  # decay of the second moment
            "weight_decay": 0.0,  # weight decay
            "clip_norm": clip_norm,  # norm to which gradients are clipped; 0: no clipping
            "ema_decay": ema_decay,  # decay of the average of the parameters
            # Crop of training images. One of 'centre', 'random' (after a resize to 1.5 times the size).
            "crop": "centre",
            "flip": False,  # flip training images horizontally at random
            **extra,
        }
    )
