"""The table of docs/scale.md: DiT^DH-XL and its decoder compiled for TPUs that are not here, one after the other.

    python launch/compile_table.py [--folder=runs/compiled] [--only=NAME ...] [--timeout=SECONDS]

Each row is a run of `python -m rae_jax.main --mode=compile`, which takes minutes; what it found is kept in the folder
as NAME.json, and not compiled again by the next call. Prints a Markdown table of the rows that are there. Exit
status 1: a row is missing, does not fit or takes more than 90 % of the memory.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
XL, XL_512, DECODER = (f"--config=configs/{name}.py" for name in ("dit_xl", "dit_xl_512", "decoder_xl"))
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
}
GIB = 2**30


def main():
    """Compile what the folder lacks, then print what it has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/compiled"))
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--timeout", type=float, help="seconds after which a row is given up")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if not (args.folder / f"{name}.json").exists():
            _compile(name, args.folder, args.timeout)
    found = {name: json.loads(path.read_text()) for name in ROWS if (path := args.folder / f"{name}.json").exists()}
    print("\n".join(table(found)))
    fine = [name in found and found[name]["peak_bytes"] <= 0.9 * found[name]["hbm_bytes"] for name in args.only]
    sys.exit(int(not all(fine)))


def _compile(name, folder, timeout):
    topology, arguments = ROWS[name]
    command = [sys.executable, "-m", "rae_jax.main", "--mode=compile", f"--topology={topology}", *arguments]
    command.append("--config.dtype=bfloat16")
    print(f"{name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout)
        (result,) = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        print(f"{name}: nothing found ({type(error).__name__})", file=sys.stderr, flush=True)
        return
    written = folder / f"{name}.json.part"
    written.write_text(json.dumps(result, indent=1))
    written.rename(folder / f"{name}.json")


def table(found):
    """Lines of Markdown from {name: what the command found}."""
    lines = [
        "| program | mesh (data x fsdp) | images | peak, GiB | TFLOP | of the model's | sent, GiB | compiled in |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        slices = f"{row['num_slices']} slices of " if row["num_slices"] > 1 else ""
        latents = " from latents" if name == "latents" else ""
        px = " at 512 px" if name in ("512px", "decoder") else ""
        what = f"{row['program']} {row['stage']}{latents}{px}, {slices}{row['topology']}, batch {row['batch_size']}"
        if row["remat"] != "dots":
            what += f", remat={row['remat']}"
        mesh, gib = row["mesh"], {key: f"{row[f'{key}_bytes'] / GIB:.2f}" for key in ("peak", "hbm")}
        cells = [what, f"{mesh['data']} x {mesh['fsdp']}", f"{row['batch_size'] // (mesh['data'] * mesh['fsdp'])}"]
        if not row["fits"]:
            cells += [f"{gib['peak']} of {gib['hbm']}: does not fit", "", "", "", ""]
        else:
            cells += [f"{gib['peak']} of {gib['hbm']}", f"{row['flops'] / 1e12:.2f}", f"{row['flops_ratio']:.3f}"]
            cells += [f"{row['collective_bytes'] / GIB:.2f}", f"{row['compile_seconds']:.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
