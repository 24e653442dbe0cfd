"""The accuracy picture of a run on the Hub, beside the card that shows it."""

from __future__ import annotations

import json
import re
import sys
import warnings
from io import BytesIO

import pytest
from PIL import Image

from lpt_peft.cli import main
from lpt_peft.errors import InputError
from lpt_peft.hub import pictures
from tests.checkpoint.adapters import tiny_adapter
from tests.hub.conftest import REPO
from tests.hub.runs import write_run
from tests.hub.test_card_sections import section
from tests.hub.test_pictures import png

FILES = {".gitattributes", "config.json", "prompts.safetensors", "README.md", "accuracy.png"}


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run"


def files_of(local, revision="main"):
    return {path: file.content for path, file in local.hub.repositories[REPO].at(revision).files.items()}


def pushed(*words):
    """Push; the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["push", *map(str, words)]) == 0
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_a_run_is_pushed_with_its_picture_in_one_commit(local, run):
    assert pushed(run, REPO) == []
    repository = local.hub.repositories[REPO]
    assert len(repository.history) == 2
    files = files_of(local)
    assert files.keys() == FILES
    image = Image.open(BytesIO(files["accuracy.png"]))
    assert image.text == {"Source": "lpt_peft"}  # no date, no version
    assert image.width == 1200
    card = files["README.md"].decode()
    assert section(card, "Results").count("](accuracy.png)") == 1
    assert "95 % interval" in section(card, "Classes")
    assert "settings have the defaults of lpt_peft" in section(card, "Recipe")
    assert pushed(run, REPO) == []
    assert len(repository.history) == 2


def test_later_results_replace_the_picture_but_not_the_card(local, run):
    pushed(run, REPO)
    before = files_of(local)
    write_run(run, seed=1)
    (warning,) = pushed(run, REPO)
    assert re.search("README.md, which stays as it is and may describe earlier prompts. Delete it on the Hub", warning)
    after = files_of(local)
    assert after["README.md"] == before["README.md"]
    assert after["accuracy.png"] != before["accuracy.png"]


def test_a_card_of_the_user_stays_and_does_not_show_the_picture(local, run):
    repository = local.hub.create(REPO, "hf_write", private=False)
    repository.put({"README.md": b"# accuracy.png"})
    (warning,) = pushed(run, REPO)
    assert "stays as it is and does not show accuracy.png. Add to it: ![Accuracy of each class" in warning
    assert files_of(local)["README.md"] == b"# accuracy.png"
    assert files_of(local).keys() == FILES
    repository.put({"README.md": b"# places\n\n![all](accuracy.png)"})
    (warning,) = pushed(run, REPO)
    assert "may describe earlier prompts" in warning


@pytest.mark.parametrize("content", [png(), b"", b"text", b"\x89PNG\r\n\x1a\n" * 10])
def test_another_picture_of_that_name_stays(local, run, content):
    local.hub.create(REPO, "hf_write", private=False).put({"accuracy.png": content})
    (warning,) = pushed(run, REPO)
    assert "that lpt_peft did not write: it stays, and the new picture was not uploaded. Rename that file" in warning
    files = files_of(local)
    assert files["accuracy.png"] == content
    assert "accuracy.png" not in files["README.md"].decode()
    assert "95 % interval" in files["README.md"].decode()


def test_a_picture_that_is_larger_than_any_of_ours_stays(local, run, monkeypatch):
    pushed(run, REPO)
    monkeypatch.setattr(pictures, "_MAX_BYTES", len(files_of(local)["accuracy.png"]) - 1)
    monkeypatch.setattr(pictures, "check_pictures", lambda found: found)
    kept = pictures.kept_files(pictures.HubLocation(repo_id=REPO), {"accuracy.png"}, {"accuracy.png": png()})
    assert kept.pictures == {"accuracy.png"}


@pytest.mark.parametrize("path", ["accuracy.png", "README.md"])
def test_nothing_is_committed_if_a_file_cannot_be_read(local, run, path):
    pushed(run, REPO)
    before = local.hub.repositories[REPO].refs["main"]
    write_run(run, seed=1)
    with local.fault("HEAD", f"/{path}$", 403, 10**6) as fault:
        assert main(["push", str(run), REPO]) == 1
        assert fault.met
    assert local.hub.repositories[REPO].refs["main"] == before


def test_a_subfolder_has_its_own_picture(local, run):
    assert pushed(run, REPO, "--subfolder", "a b/c") == []
    files = files_of(local)
    assert {name for name in files if name.startswith("a b/")} == {
        f"a b/c/{name}" for name in ("accuracy.png", "config.json", "prompts.safetensors")
    }
    assert "](a%20b/c/accuracy.png)" in files["README.md"].decode()
    assert pushed(run, REPO, "--subfolder", "a b/c") == []
    (warning,) = pushed(run, REPO, "--subfolder", "d")
    assert "does not show d/accuracy.png" in warning
    assert files_of(local)["a b/c/accuracy.png"] == files["a b/c/accuracy.png"]


def test_a_branch_and_a_pull_request(local, run):
    assert pushed(run, REPO, "--revision", "v2") == []
    assert files_of(local, "v2").keys() == FILES
    assert "accuracy.png" not in files_of(local)
    assert pushed(run, REPO, "--create-pr") == []
    assert "accuracy.png" not in files_of(local)
    assert files_of(local, "refs/pr/1").keys() == FILES


def test_without_matplotlib_the_card_has_no_picture(local, run, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (warning,) = pushed(run, REPO)
    assert 'The card has no picture of the accuracy. The pictures need matplotlib: pip install "lpt_peft[' in warning
    card = files_of(local)["README.md"].decode()
    assert "accuracy.png" not in card
    assert "95 % interval" in card
    assert files_of(local).keys() == FILES - {"accuracy.png"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "results.json"),
        ('{"rows": []}', "lack the split"),
        (None, "describe other prompts"),
    ],
)
def test_results_that_cannot_be_used_are_named(local, run, text, reason):
    results = json.loads((run / "results.json").read_text())
    results["test"]["few"] = 0.5
    (run / "results.json").write_text(json.dumps(results) if text is None else text)
    (warning,) = pushed(run, REPO)
    assert "The card shows no details and no picture of" in warning
    assert reason in warning
    files = files_of(local)
    assert files.keys() == FILES - {"accuracy.png"}
    assert "accuracy on the test split" in files["README.md"].decode()


def test_the_folder_of_the_prompts_alone_has_no_picture(local, run):
    assert pushed(run / "prompts", REPO) == []
    assert files_of(local).keys() == FILES - {"accuracy.png"}


def test_only_a_validation_split(local, run):
    write_run(run, split="validation")
    assert pushed(run, REPO) == []
    assert "| validation images |" in files_of(local)["README.md"].decode()
    assert "accuracy.png" in files_of(local)


def test_pictures_from_python(local):
    adapter = tiny_adapter()
    for bad in ({"a.jpg": png()}, {"a.png": b"text"}):
        with pytest.raises(InputError, match="pictures: "):
            adapter.push_to_hub(REPO, pictures=bad)
    assert local.requests == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = adapter.push_to_hub(REPO, pictures={"shift.png": png(), "accuracy.png": png(1)})
        assert adapter.push_to_hub(REPO, pictures={"shift.png": png(), "accuracy.png": png(1)}).oid == first.oid
    card = files_of(local)["README.md"].decode()
    assert "](shift.png)" in section(card, "Results")
    with pytest.warns(UserWarning, match="does not show more.png") as caught:
        adapter.push_to_hub(REPO, pictures={"more.png": png(2)})
    assert len(caught) == 1
    assert files_of(local).keys() == FILES | {"shift.png", "more.png"}
