"""Time the PyTorch code of RAE's authors on one GPU, compiled by torch.compile: training steps and sampling.

    PYTHONPATH=AUTHORS/src python -m launch.bench.authors [--only=train,sample] [--batch=64] [--steps=10]

Compare it with `--mode=benchmark` (docs/benchmark.md). AUTHORS is a checkout of their code. DiT^DH-XL on DINOv2-B,
256 px, bfloat16 as in their trainer: the encoder in TensorFloat-32 without autocast, clipped gradients, fused AdamW, an
average of the weights, their compiled `encode` and `forward`. Sampling: 49 Euler steps with AutoGuidance by DiT^DH-S.
Weights and data are random. The last line printed is one JSON object.
"""

import copy
import json
import statistics

from launch.bench import harness

GRID, CHANNELS, CLASSES = 16, 768, 1000
TRUNKS = {"xl": (1152, 28, 16), "s": (384, 12, 6), "tiny": (96, 2, 2)}  # width, depth, heads; tiny is for a trial
HEAD = (2048, 2, 16)


def main():
    """Time each program and print its results."""
    programs = {"train": _trainer, "sample": _sampler}
    parser = harness.parser(__doc__)
    parser.add_argument("--only", default="train,sample", help="programs, separated by commas: train, sample")
    parser.add_argument("--size", choices=TRUNKS, default="xl", help="size of the DiT")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--steps", type=int, default=10, help="timed training steps; sampling is timed twice")
    args = parser.parse_args()
    names = args.only.split(",")
    if not programs.keys() >= set(names):
        parser.error(f"--only={args.only} cannot work: choose from {', '.join(programs)}")
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {"batch": args.batch, "torch": torch.__version__}
    results["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for name in names:
        run = programs[name](args.size, args.batch, device)
        results[name] = _measure(run, args.steps if name == "train" else 2, args.batch, device)
        print(name, json.dumps(results[name]), flush=True)
    harness.print_json(results)


def _measure(run, count, batch, device):
    """Return the seconds of the first call, which compiles, and of `count` later calls."""
    import torch

    (first,) = harness.wall_times(run, 1)
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without earlier programs and the compilation
    seconds = harness.wall_times(run, count)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        **{"first_seconds": first, "seconds_median": median, "seconds_min": min(seconds)},
        **{"images_per_second": batch / median, "device_peak_bytes": peak},
    }


def _model(size, device):
    """Return a DiT^DH without zeros: weights that start at zero become random too."""
    import torch
    from stage2.models.DDT import DiTwDDTHead

    sizes = zip(TRUNKS[size], HEAD, strict=True)
    widths, depths, heads = (list(pair) for pair in sizes)
    shapes = {"input_size": GRID, "in_channels": CHANNELS, "num_classes": CLASSES}
    model = DiTwDDTHead(**shapes, hidden_size=widths, depth=depths, num_heads=heads)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def _encoder(device):
    """Return a function: images [B, 3, 256, 256] -> latents [B, C, h, w], as their RAE.encode computes them."""
    import torch
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=518, patch_size=14)).to(device).eval()
    mean, std = (torch.full((1, 3, 1, 1), value, device=device) for value in (0.45, 0.225))
    shift, scale = torch.zeros(CHANNELS, GRID, GRID, device=device), torch.ones(CHANNELS, GRID, GRID, device=device)

    @torch.no_grad()
    def encode(images):
        images = torch.nn.functional.interpolate(images, size=(224, 224), mode="bicubic", align_corners=False)
        tokens = encoder((images - mean) / std, output_hidden_states=True).last_hidden_state[:, 5:]
        latents = tokens.transpose(1, 2).view(len(images), CHANNELS, GRID, GRID)
        return (latents - shift) / torch.sqrt(scale + 1e-5)

    return torch.compile(encode)


def _trainer(size, batch, device):
    """Return a function that runs one training step."""
    import torch
    from stage2.transport import create_transport

    encode = _encoder(device)
    model = _model(size, device)
    model.forward = torch.compile(model.forward)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    transport = create_transport(time_dist_shift=(GRID * GRID * CHANNELS / 4096) ** 0.5)
    images = torch.rand(batch, 3, 256, 256, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)

    def step():
        latents = encode(images)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = transport.training_losses(model, latents, {"y": labels})["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        # One by one, as in their code.
        for averaged, parameter in zip(average.parameters(), model.parameters(), strict=True):
            averaged.mul_(0.9995).add_(parameter.data, alpha=1 - 0.9995)
        return loss.item()  # they read the loss in every step

    return step


def _sampler(size, batch, device):
    """Return a function that samples one batch of latents."""
    import torch

    model, guide = (_model(of, device).eval() for of in (size, "s" if size == "xl" else size))
    model.forward, guide.forward = torch.compile(model.forward), torch.compile(guide.forward)
    shift = (GRID * GRID * CHANNELS / 4096) ** 0.5
    times = 1 - torch.linspace(0, 0.999, 50, device=device)
    times = shift * times / (1 + (shift - 1) * times)
    labels = torch.randint(CLASSES, (batch,), device=device)

    @torch.no_grad()
    def sample():
        x = torch.randn(batch, CHANNELS, GRID, GRID, device=device)
        with torch.autocast(device, torch.bfloat16):
            for t, next_t in zip(times[:-1], times[1:], strict=True):
                velocity = model.forward_with_autoguidance(x, t.expand(batch), labels, 1.42, guide.forward)
                x = x + (next_t - t) * velocity
        return x.sum().item()

    return sample


if __name__ == "__main__":
    main()
