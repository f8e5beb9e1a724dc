"""Compile DiT^DH-XL, its decoder and RAEv2 ahead of time for TPUs, and print the table of docs/scale.md.

    python -m launch.bench.compile_table [--folder=runs/compiled] [--only NAME ...] [--timeout=SECONDS]

Each row is a run of `python -m rae_jax.main --mode=compile`, which takes minutes. The folder keeps the result as
NAME.json; the next call does not compile this row again. Prints a Markdown table of the results in the folder. The exit
status is 1 when a row is missing, does not fit, or needs more than 90 % of the memory.
"""

import json
import subprocess
import sys
from pathlib import Path

from launch.bench import harness

ROOT = Path(__file__).parents[2]
XL, XL_512, DECODER, RAEV2 = (
    f"--config=configs/{name}.py" for name in ("dit_xl", "dit_xl_512", "decoder_xl", "raev2_xl")
)
MF_RAE, FLOAT32 = "--config=configs/mf_rae_xl.py", "--config.dtype=float32"
TRAIN, SAMPLE = "--program=train", "--program=sample"
GUIDE = {"width": 384, "depth": 12, "num_heads": 6, "head_width": 2048, "head_depth": 2, "head_num_heads": 16}
AUTOGUIDANCE = [
    *("--config.guidance.method=autoguidance", "--config.guidance.scale=1.5", "--config.guidance.dit.weights=unread"),
    *(f"--config.guidance.dit.{key}={value}" for key, value in GUIDE.items()),
]
FOUR_SLICES = [
    *("--num_slices=4", "--config.dit.train.batch_size=4096"),
    *(f"--config.{part}.batch_size=1024" for part in ("evaluate", "statistics")),
]
SETTINGS = ["--config.attention=xla", "--config.remat=dots", "--config.unroll=False"]  # of all rows that set no other
ROWS = {  # name: (topology, arguments)
    "latents": ("v6e:4x4", [XL, TRAIN, "--config.data.latents=unread", "--config.dit.train.batch_size=256"]),
    "v6e_8x8": ("v6e:8x8", [XL, TRAIN]),
    "v5e_16x16": ("v5e:16x16", [XL, TRAIN]),
    "v5e_4x4": ("v5e:4x4", [XL, TRAIN, "--config.remat=full"]),
    "v5p_4x4x4": ("v5p:4x4x4", [XL, TRAIN]),
    "tpu7x_4x4x4": ("tpu7x:4x4x4", [XL, TRAIN]),
    "512px": ("v6e:8x8", [XL_512, TRAIN]),
    "sample": ("v6e:2x4", [XL, SAMPLE, *AUTOGUIDANCE]),
    "decoder": ("v5e:8x8", [DECODER, TRAIN, "--config.data.image_size=512", "--config.encoder.input_size=448"]),
    "slices": ("v5e:16x16", [XL, TRAIN, *FOUR_SLICES]),
    **{
        f"raev2_{kind}_{sizes}": (f"{kind}:{sizes}", [RAEV2, TRAIN])
        for kind, sizes in (("v6e", "8x8"), ("v5e", "16x16"), ("v5p", "4x4x4"))
    },
    "raev2_sample": ("v6e:2x4", [RAEV2, SAMPLE]),
    "mf_rae": ("v6e:8x8", [MF_RAE, TRAIN, FLOAT32]),
    "mf_rae_jvp": ("v6e:8x8", [MF_RAE, TRAIN, "--config.few_step.derivative=jvp"]),
    "mf_rae_trajectories": ("v6e:8x8", [MF_RAE, TRAIN, "--config.few_step.objective=trajectories"]),
    "mf_rae_sample": ("v6e:2x4", [MF_RAE, SAMPLE]),
}
HEADER = ["program", "mesh (data x fsdp)", "images", "peak, GiB", "TFLOP", "of the model's", "sent, GiB", "compiled in"]
GIB = 2**30


def main():
    """Compile the rows that are missing in the folder, then print the table."""
    parser = harness.parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/compiled"), help="keeps the results")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows to compile; default: all")
    parser.add_argument("--timeout", type=float, help="seconds after which the compilation of a row is stopped")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if not (args.folder / f"{name}.json").exists():
            _compile(name, args.folder, args.timeout)
    found = {name: json.loads(path.read_text()) for name in ROWS if (path := args.folder / f"{name}.json").exists()}
    print("\n".join(table(found)))
    fits = [name in found and found[name]["peak_bytes"] <= 0.9 * found[name]["hbm_bytes"] for name in args.only]
    sys.exit(int(not all(fits)))


def arguments(name):
    """Return the arguments of `python -m rae_jax.main` that compile a row."""
    topology, (config, *others) = ROWS[name]
    return [config, *SETTINGS, "--config.dtype=bfloat16", *others, "--mode=compile", f"--topology={topology}"]


def _compile(name, folder, timeout):
    command = [sys.executable, "-m", "rae_jax.main", *arguments(name)]
    print(f"{name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout)
        (result,) = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        print(f"{name}: no result ({type(error).__name__})", file=sys.stderr, flush=True)
        return
    written = folder / f"{name}.json.part"
    written.write_text(json.dumps(result, indent=1))
    written.rename(folder / f"{name}.json")


def table(found):
    """Return the lines of the Markdown table. `found`: {name: result of --mode=compile}."""
    return harness.markdown_table(HEADER, [_cells(name, row) for name, row in found.items()])


def _cells(name, row):
    slices = f"{row['num_slices']} slices of " if row["num_slices"] > 1 else ""
    latents = " from latents" if name == "latents" else ""
    px = " at 512 px" if name in ("512px", "decoder") else ""
    network = f"{row['config']} " if name.startswith(("raev2", "mf_rae")) else ""
    kind = {"mf_rae": " (differences, float32)", "mf_rae_jvp": " (jvp)", "mf_rae_trajectories": " (trajectories)"}
    what = f"{row['program']} {network}{row['stage']}{latents}{px}{kind.get(name, '')}"
    program = f"{what}, {slices}{row['topology']}, batch {row['batch_size']}"
    if row["remat"] != "dots":
        program += f", remat={row['remat']}"
    data, fsdp = row["mesh"]["data"], row["mesh"]["fsdp"]
    cells = [program, f"{data} x {fsdp}", f"{row['batch_size'] // (data * fsdp)}"]
    memory = f"{row['peak_bytes'] / GIB:.2f} of {row['hbm_bytes'] / GIB:.2f}"
    if not row["fits"]:
        return [*cells, f"{memory}: does not fit", "", "", "", ""]
    cells += [memory, f"{row['flops'] / 1e12:.2f}", f"{row['flops_ratio']:.3f}"]
    return [*cells, f"{row['collective_bytes'] / GIB:.2f}", f"{row['compile_seconds']:.0f} s"]


if __name__ == "__main__":
    main()
