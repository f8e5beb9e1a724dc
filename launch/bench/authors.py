"""The code of RAE's authors in PyTorch, compiled by torch.compile, on one GPU: a step of training, and sampling.

    PYTHONPATH=AUTHORS/src python launch/bench_authors.py [--only=train,sample] [--batch=64] [--steps=10]

The other side of `--mode=benchmark` (docs/benchmark.md); it times theirs alone. DiT^DH-XL on DINOv2-B, 256 px, bfloat16
as their trainer has it: the encoder in TensorFloat-32 outside autocast, gradients clipped, fused AdamW, an average of
the weights; their compiled `encode` and `forward`. Sampling: 49 Euler steps with AutoGuidance by DiT^DH-S. Weights and
data are random. AUTHORS is a checkout of their code. The last line printed is one JSON object.
"""

import argparse
import copy
import json
import statistics
import time

import torch
from stage2.models.DDT import DiTwDDTHead
from stage2.transport import create_transport
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

GRID, CHANNELS, CLASSES = 16, 768, 1000
TRUNKS = {"xl": (1152, 28, 16), "s": (384, 12, 6), "tiny": (96, 2, 2)}  # the last one to try the script
HEAD = (2048, 2, 16)


def main():
    """Time what is asked for, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="train,sample")
    parser.add_argument("--size", choices=TRUNKS, default="xl")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {"batch": args.batch, "torch": torch.__version__}
    results["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    runs = {"train": (_trainer, args.steps), "sample": (_sampler, 2)}
    names = args.only.split(",")
    if not runs.keys() >= set(names):
        parser.error(f"--only={args.only}: choose from {', '.join(runs)}")
    for name in names:
        run, steps = runs[name]
        results[name] = _timed(run(args, device), steps, args.batch, device)
        print(name, json.dumps(results[name]), flush=True)
    print(json.dumps(results))


def _timed(run, steps, batch, device):
    """Seconds of a step, the first ones, which compile, apart."""
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of what came before, and of compiling
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        **{"first_seconds": first, "seconds_median": median, "seconds_min": min(seconds)},
        **{"images_per_second": batch / median, "device_peak_bytes": peak},
    }


def _model(size, device):
    """A DiT^DH whose zeros are drawn as well: so that nothing is multiplied by them."""
    sizes = zip(TRUNKS[size], HEAD, strict=True)
    widths, depths, heads = (list(pair) for pair in sizes)
    shapes = {"input_size": GRID, "in_channels": CHANNELS, "num_classes": CLASSES}
    model = DiTwDDTHead(**shapes, hidden_size=widths, depth=depths, num_heads=heads)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def _encoder(device):
    """Images [B, 3, 256, 256] -> latents [B, C, h, w], as their RAE.encode computes them."""
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


def _trainer(args, device):
    encode = _encoder(device)
    model = _model(args.size, device)
    model.forward = torch.compile(model.forward)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    transport = create_transport(time_dist_shift=(GRID * GRID * CHANNELS / 4096) ** 0.5)
    images = torch.rand(args.batch, 3, 256, 256, device=device)
    labels = torch.randint(CLASSES, (args.batch,), device=device)

    def step():
        latents = encode(images)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = transport.training_losses(model, latents, {"y": labels})["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for averaged, parameter in zip(average.parameters(), model.parameters(), strict=True):  # one by one, as theirs
            averaged.mul_(0.9995).add_(parameter.data, alpha=1 - 0.9995)
        return loss.item()  # they read it in every step

    return step


def _sampler(args, device):
    model, guide = (_model(size, device).eval() for size in (args.size, "s" if args.size == "xl" else args.size))
    model.forward, guide.forward = torch.compile(model.forward), torch.compile(guide.forward)
    shift = (GRID * GRID * CHANNELS / 4096) ** 0.5
    times = 1 - torch.linspace(0, 0.999, 50, device=device)
    times = shift * times / (1 + (shift - 1) * times)
    labels = torch.randint(CLASSES, (args.batch,), device=device)

    @torch.no_grad()
    def sample():
        x = torch.randn(args.batch, CHANNELS, GRID, GRID, device=device)
        with torch.autocast(device, torch.bfloat16):
            for t, following in zip(times[:-1], times[1:], strict=True):
                velocity = model.forward_with_autoguidance(x, t.expand(args.batch), labels, 1.42, guide.forward)
                x = x + (following - t) * velocity
        return x.sum().item()

    return sample


if __name__ == "__main__":
    main()
