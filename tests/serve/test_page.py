"""The commands of docs/how-to/serve.md, as printed except for the port, and their output."""

from __future__ import annotations

import json
import re
import signal
import subprocess

from PIL import Image

from lpt_peft.backbones.bundled.glyph_vit import glyph_vit
from tests.inference.digit_models import digit_adapter
from tests.serve.server import ROOT, Process, photo

PAGE = (ROOT / "docs" / "how-to" / "serve.md").read_text("utf-8")
LABELS = {"cars": ["sedan", "van", "truck"], "birds": ["owl", "wren", "crow", "gull"], "fish": ["cod", "eel", "ray"]}
PORT = "8000"


def write_runs(folder):
    """Prompts of three runs, and a photo."""
    for seed, (name, labels) in enumerate(LABELS.items()):
        adapter = digit_adapter("group", seed=seed, classes=len(labels), temperature=1.5, build=glyph_vit)
        adapter.save_pretrained(folder / "runs" / name / "prompts", label_names=labels)
    (folder / "photo.png").write_bytes(photo(0))
    Image.open(folder / "photo.png").save(folder / "photo.jpg", quality=95)


def rounded(text):
    """The JSON of an answer, with probabilities to two digits, and without what depends on versions of libraries."""
    content = json.loads(text, parse_float=lambda value: round(float(value), 2))
    for key in content.keys() & {"version", "digest"}:
        content[key] = len(content[key])
    if "bytes" in content:
        content["bytes"] = sorted(content["bytes"])
    return content


def test_the_commands_of_the_page(tmp_path):
    start, *commands = re.findall(r"^```sh\n(.*?)^```\n+```(?:text|json)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(commands) >= 5
    write_runs(tmp_path)
    assert start[0].startswith("python examples/serve.py ")
    assert start[1] == f"cars, birds: http://127.0.0.1:{PORT}\n"
    with Process(*start[0].split()[2:], folder=tmp_path) as server:
        for command, output in commands:
            words = ["sh", "-e", "-c", command.replace(f":{PORT}/", f":{server.port}/")]
            done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
            assert done.returncode == 0, done.stderr
            assert rounded(done.stdout) == rounded(output), command
        assert server.stop() == (-signal.SIGTERM, "")
