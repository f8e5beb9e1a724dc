"""The sections of configs/small.py for the DiT, its sampler and its guidance; this file is not a config."""


def dit(train):
    """Return the section of the DiT; `train` holds the keys that all stages have."""
    train.init = ""  # weights to start from, named as `weights` is, or the workdir of a run; '': random weights
    # Distribution of the training times, before the shift. One of 'logit_normal', 'uniform'.
    train.time = "logit_normal"
    train.time_mean = 1.0  # logit_normal: mean of the logits
    train.time_std = 1.5  # logit_normal: standard deviation of the logits
    train.label_dropout = 0.1  # probability that a label is replaced by the null label
    train.more_ema_decays = ()  # decays of further averages of the parameters
    train.base_weight = 1.0  # weight of the loss of the base output (base_depth), next to the loss of the output
    train.microbatches = 1  # number of parts of a batch whose gradients are computed in turn and summed: less memory
    return {
        **sizes(),
        # Average of the parameters that is used. 0: the average by ema_decay; n: the average by the n-th of
        # more_ema_decays.
        "average": 0,
        "path": "linear",  # path between data and noise. One of 'linear', 'cosine', 'vp'.
        # Output of the model. data_in_velocity: data, with the loss of the velocity that they mean, and no time below
        # 0.05 as divisor (RAEv2). One of 'velocity', 'noise', 'data', 'data_in_velocity'.
        "prediction": "velocity",
        # Factor that moves times towards noise, in training and sampling. 0: sqrt(h w D / 4096), by the dimension
        # of the latent; 1: no shift.
        "time_shift": 0.0,
        "train": train,
    }


def sizes():
    """Return the keys of the network."""
    return {
        # Weights if this run does not train them: 'small', a folder, a published file or a hub id; '': none.
        "weights": "small",
        "width": 96,  # channels of a token in the trunk
        "depth": 4,  # number of blocks of the trunk
        "num_heads": 3,  # number of attention heads of the trunk
        "head_width": 128,  # channels of a token in the wide head
        "head_depth": 2,  # number of blocks of the wide head; 0: a plain DiT
        "head_num_heads": 4,  # number of attention heads of the wide head
        # Way in which time and label reach the trunk. One of 'adaln', 'in_context' (RAEv2: as tokens).
        "conditioning": "adaln",
        "time_tokens": 4,  # in_context: number of tokens of the time
        "label_tokens": 8,  # in_context: number of tokens of the label
        "base_depth": 0,  # blocks of the trunk before the base output, which internal guidance needs; 0: none
        "patch_size": 1,  # height and width of a patch of the latent; 2 makes 256 tokens of 32x32 VAE latents
        "qk_norm": False,  # normalise queries and keys
        "class_conditional": True,  # condition on the class; False: every label is the null label
    }


def few_step(train):
    """Return the section of the student that samples in few steps; its network is the DiT's with a second time."""
    train.init = ""  # weights to start from, named as `weights` is, or the workdir of a run; '': the DiT's
    train.label_dropout = 0.1  # probability that a label is replaced by the null label, for the teacher too
    train.microbatches = 1  # number of parts of a batch whose gradients are computed in turn and summed: less memory
    return {
        # Weights if this run does not train them: a folder, a published file or a hub id; '': none.
        "weights": "",
        # What the student learns: means of the velocity of the DiT ('distillation'), or of that of data and noise
        # ('finetuning'), or steps between points of the DiT's trajectories, before the others ('trajectories'). One of
        # 'distillation', 'finetuning', 'trajectories'.
        "objective": "distillation",
        "guided": True,  # distillation, trajectories: the DiT's velocity with config.guidance
        "trajectories": {
            "points": 16,  # points of a trajectory, of Euler steps
            "pairs": 8,  # pairs of points of each trajectory that the student learns from at a time
        },
        # Derivative along the trajectory. One of 'differences' (central; published), 'jvp' (exact).
        "derivative": "differences",
        "difference": 5e-3,  # differences: half the interval of time
        "equal_times": 0.5,  # fraction of the images whose interval is empty: they learn the velocity itself
        # Power of an image's error by which its gradient is divided, so that large errors do not dominate. 1: as
        # published, with which the training of small students was less stable; 0: the square error.
        "balance": 0.5,
        "train": train,
    }


def sampler():
    """Return the section of the sampler."""
    return {
        # Solver. One of 'euler', 'heun', 'adaptive' (needs diffrax), 'sde' (Euler-Maruyama), 'mean_velocity' (by the
        # few-step student, without guidance and shift).
        "method": "euler",
        "num_steps": 50,  # number of steps
        # Times of the steps. One of 'plain', 'published' (num_steps points, so one step less; the last is near data).
        "grid": "plain",
        "reuse": 1,  # euler, DiT^DH: number of steps that use one output of the trunk
        "refresh": (),  # steps, from 0, that compute the trunk's output again, instead of every `reuse`-th step
        "rtol": 1e-3,  # adaptive: relative tolerance
        "atol": 1e-6,  # adaptive: absolute tolerance
        # sde: diffusion coefficient. One of 'constant', 'score_based', 'sigma', 'linear', 'decreasing',
        # 'increasing_decreasing'.
        "diffusion": "sigma",
        "last_step": "mean",  # sde: kind of the last step. One of 'mean', 'tweedie', 'euler', 'none'.
        "last_step_size": 0.04,  # sde: time at which the last step starts, before the shift
    }


def guidance():
    """Return the section of the guidance."""
    return {
        # Guidance. One of 'none', 'cfg' (classifier-free), 'autoguidance' (by a weaker model, config.guidance.dit),
        # 'internal' (by the DiT's own base output), 'internal_cfg' (both, internal guidance by guidance.internal).
        "method": "cfg",
        "scale": 2.5,  # scale of the guidance; 1: none
        "t_min": 0.0,  # least time at which the guidance acts
        "t_max": 1.0,  # largest time at which the guidance acts
        # internal_cfg: scale and interval of the internal guidance. The keys above are those of the other.
        "internal": {
            "scale": 1.78,  # scale; 1: none
            "t_min": 0.1,  # least time at which it acts
            "t_max": 1.0,  # largest time at which it acts
        },
        "dit": {**sizes(), "weights": ""},
    }
