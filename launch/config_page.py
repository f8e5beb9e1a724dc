"""Write docs/config.md: every config key with its default, its meaning and its choices.

    python -m launch.config_page

Defaults are the values of configs/small.py, meanings and choices the comments there and in configs/diffusion.py: the
comment of a key is the lines above the key and the text behind it; what follows "One of" or "Any of" are the choices.
"""

import ast
import re
import tokenize
from pathlib import Path

from configs import diffusion, small
from rae_jax.config import keys as config_keys

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
# Section of the config -> functions and names of configs/small.py and configs/diffusion.py that hold its keys.
SECTIONS = {
    "": ("get_config",),
    "mesh": ("get_config.mesh",),
    "data": ("_data",),
    "data.fields": ("_data.fields",),
    "data.tfds": ("_data.tfds",),
    "encoder": ("_VIT", "_encoder"),
    "encoder.train": ("_encoder_train",),
    "judge": ("_judge",),
    "decoder": ("_decoder",),
    "decoder.train": ("_decoder",),
    "lpips": ("get_config.lpips",),
    "discriminator": ("_discriminator",),
    "discriminator.backbone": ("_VIT",),
    "discriminator.augment": ("_discriminator.augment",),
    "statistics": ("get_config.statistics",),
    "dit": ("sizes", "dit"),
    "dit.train": ("dit",),
    "few_step": ("few_step",),
    "few_step.trajectories": ("few_step.trajectories",),
    "few_step.train": ("few_step",),
    "STAGE.train": ("_train",),
    "sampler": ("sampler",),
    "guidance": ("guidance",),
    "guidance.internal": ("guidance.internal",),
    "guidance.dit": ("sizes",),
    "evaluate": ("_evaluate",),
    "checkpoint": ("_checkpoint",),
    "health": ("_health",),
}
_HEAD = """\
# Config keys

<!-- Made by `python -m launch.config_page` from the comments of configs/small.py. Edit those, and run it again. -->

Every key of a config. The default is the value of `configs/small.py`; the full-size recipes start from
`configs/dit_b.py`, and `WORKDIR/config.json` holds all values of a run. A key is set on the command line by
`--config.KEY=VALUE`; a tuple is quoted for the shell: `--config.stages="('statistics','dit')"`. A misspelt key, a wrong
type or an impossible value stops the command with a message that names the key."""


def page():
    """Text of docs/config.md."""
    sources = (Path(module.__file__).read_text() for module in (small, diffusion))
    comments = {place: keys for source in sources for place, keys in _comments(source).items()}
    defaults = config_keys.flatten(small.get_config().to_dict())
    text = [_HEAD]
    for section, places in SECTIONS.items():
        title = f"`{section}`" if section else "The run"
        text += [f"\n## {title}\n", "| key | default | meaning | choices |", "| --- | --- | --- | --- |"]
        for key, comment in [item for place in places for item in comments[place].items()]:
            if values := _defaults(section, key, defaults):
                text.append(_row(f"{section}.{key}" if section else key, values, comment))
    return "\n".join(text) + "\n"


def _defaults(section, key, defaults):
    """{stage: default} of a key that every stage's `train` has, {'': default} of any other; {} for no key."""
    if section == "STAGE.train":
        return {stage: defaults[f"{stage}.train.{key}"] for stage in config_keys.TRAINED}
    name = f"{section}.{key}" if section else key
    return {"": defaults[name]} if name in defaults else {}


def _row(name, values, comment):
    meaning, _, choices = re.sub(" (One|Any) of ", "\n", comment).partition("\n")
    given = {str(value) for value in values.values()}
    shown = [_shown(value) + (f" ({stage})" if len(given) > 1 else "") for stage, value in values.items()]
    meaning = meaning if re.match(r"\w+:", meaning) else meaning[:1].upper() + meaning[1:]
    cells = (f"`{name}`", ", ".join(shown if len(given) > 1 else shown[:1]), _coded(meaning), _coded(choices))
    return f"| {' | '.join(cells)} |"


def _shown(value):
    return f"`{value}`" if value and isinstance(value, str) else f"`{value!r}`"


def _coded(text):
    """The text with quoted values as code, without its full stop."""
    return re.sub(r"(?<!\w)'([^' ]*)'", lambda quoted: _shown(quoted[1]), text.rstrip("."))


def _comments(source):
    """{function or name, with nested keys behind a dot: {key: comment}} of a config's source, in its order."""
    behind, above, found = {}, {}, {}  # comments by line
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else behind)[token.start[0]] = token.string.removeprefix("# ")

    def note(place, key, line):
        first = line
        while first - 1 in above:
            first -= 1
        words = [above[number] for number in range(first, line)] + [behind.get(line, "")]
        found.setdefault(place, {})[key] = " ".join(words).strip()

    def visit(node, place):
        match node:
            case ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]) if not place:
                place = name
            case ast.Assign(targets=[ast.Attribute(attr=key)]):
                note(place, key, node.lineno)
                place = f"{place}.{key}"
            case ast.Dict():
                for key, value in zip(node.keys, node.values, strict=True):
                    if key is not None:
                        note(place, key.value, key.lineno)
                        visit(value, f"{place}.{key.value}")
                return
        for child in ast.iter_child_nodes(node):
            visit(child, place)

    visit(ast.parse(source), "")
    return found


def main():
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
