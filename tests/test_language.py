"""Texts that can be translated word by word: how docstrings begin, and words that have a plainer one."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPENINGS = re.compile(r'"""(What|Of|Those|Whether|Where|Whoever) ')
PLAINER = {
    "mend(?:s|ed|ing)?": "fix",
    "anew": "again",
    "whoever": "callers, users",
    "beside": "next to, compared with, besides",
}
WORDS = re.compile(rf"\b({'|'.join(PLAINER)})\b", re.IGNORECASE)
CODE = ("rae_jax", "configs", "launch", "tests")
PLACES = (*CODE, "docs", "colab", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
NO_TEXT = (".png", ".safetensors", ".pyc", ".npz")


def _lines(*places):
    """(file:line, text) of all text files of these places; of notebooks the cells, without outputs."""
    for place in places:
        for path in [ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*")):
            if path.is_file() and path.suffix not in NO_TEXT and path != Path(__file__):  # which names the words
                text = path.read_text()
                if path.suffix == ".ipynb":
                    text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
                for number, line in enumerate(text.splitlines(), 1):
                    yield f"{path.relative_to(ROOT)}:{number}", line


def test_a_docstring_begins_with_a_verb_or_a_noun():
    found = [f"{place}: {line.strip()}" for place, line in _lines(*CODE) if OPENINGS.search(line)]
    assert not found, "begin with a verb, or with the noun that is returned:\n" + "\n".join(found)


def test_plain_words():
    hits = [(place, word) for place, line in _lines(*PLACES) for word in WORDS.findall(line)]
    plainer = {word: next(p for w, p in PLAINER.items() if re.fullmatch(w, word, re.IGNORECASE)) for _, word in hits}
    found = [f"{place}: {word}: write {plainer[word]}" for place, word in hits]
    assert not found, "words that have a plainer one:\n" + "\n".join(found)


def test_what_must_be_found_is_found():
    assert OPENINGS.search('    """Whether a key is known."""') and not OPENINGS.search('"""Whatever"""')
    text = (
        "Mend it, and it is mended beside the others; besides, amend nothing, however anewed. Whoever reads this anew"
    )
    assert WORDS.findall(text) == ["Mend", "mended", "beside", "Whoever", "anew"]
    assert len({place.split(":")[0] for place, _ in _lines(*PLACES)}) > 100
