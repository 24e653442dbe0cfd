"""Checks the prose: words and phrases that plain English avoids, each with what to write instead.

    python .ci/check_words.py            # the package, tests, examples, docs and settings
    python .ci/check_words.py FILE ...   # these files

A space in a phrase also matches an underscore (test names) and a line break, with or without "# ". Only the first
letter may be a capital, so "is none" does not match `is None`. Where a word is right, for example in a quotation, put
"words: allow" in a comment on that line.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ["lpt_peft", "tests", "examples", "docs", ".github", "Makefile", "pyproject.toml", ".pre-commit-config.yaml"]
ENDINGS = {"", ".cff", ".md", ".py", ".sh", ".toml", ".yaml", ".yml"}
ALLOW = "words: allow"

WORDS = {
    "(un)?learnt": "trained",
    "storeys?": "layer",
    "whole numbers?": "integer",
    "told|tells?": "given, configured; reports, states",
    r"(?<!there\s)(is|are|was|were) none": "is invalid, is missing",
    "company": "compatibility",
    "(break|breaks|broke|broken) off": "interrupted, stopped",
    "dear|dearer": "expensive",
    "(go|goes|going|went|gone) on": "resume, continue",
    "be it|if need be": "either; if necessary (or: created if missing)",
    "(an|some)other one|(this|that|which|the other) one": "name the noun",
    "(is|are|was|were|be) asked|asks? of": "is called, is queried; requires",
    "knows? (nothing|of|no)": "does not depend on, does not use",
    "for ever": "forever, indefinitely",
    "costs? points|in silence|without a word": "silently lowers accuracy; silently",
    "wish|wishes|wished|granted": "option, request; accepted",
    "anew": "again, from scratch",
    "mend|mends|mended|mending": "fix",
    "the very": "the, the same",
    "of (its|their) own": "its own, separate",
    "all the same": "anyway, still",
    "is there already|are there already": "exists, existing",
    "somebody|whoever|bystanders?|standstill": "someone, another user; frozen state",
    "lest|thereof|therein|whereof|thereby": "so that ... not; in it",
    "ha(s|ve) no say": "does not affect",
    "(train|training|validation|test) parts?": "split",
    "wanted|mine": "expected, required; own",
    r"for one in|(?<!than\s)(?<!least\s)(?<!only\s)one(?=[.,;:)\[]|\s=\s)": "name the noun or the variable",
}


def hits(text: str) -> list[tuple[int, str, str]]:
    """Line number, phrase found and suggestion, in order."""
    lines = text.splitlines()
    found = []
    for phrase, instead in WORDS.items():
        pattern = phrase.replace(" ", r"(?:_|\s+(?:#\s+)?)")
        for match in re.finditer(rf"(?<![a-z])(?:{pattern})(?![a-z])", text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            if match[0][1:].islower() and ALLOW not in lines[line - 1]:
                found.append((line, " ".join(match[0].split()), instead))
    return sorted(found)


def files() -> list[Path]:
    """All text files of the project whose prose is ours."""
    places = [ROOT / place for place in PLACES] + [*ROOT.glob("*.md"), *ROOT.glob("*.cff")]
    found = [path for place in places for path in ([place] if place.is_file() else place.rglob("*"))]
    skipped = {"_build", "__pycache__"}
    return sorted(path for path in found if path.is_file() and path.suffix in ENDINGS and not skipped & {*path.parts})


if __name__ == "__main__":
    total = 0
    for path in [Path(name) for name in sys.argv[1:]] or files():
        for line, word, instead in hits(path.read_text(encoding="utf-8")):
            print(f'{os.path.relpath(path)}:{line}: "{word}": write {instead}')
            total += 1
    sys.exit(f"{total} to rewrite" if total else 0)
