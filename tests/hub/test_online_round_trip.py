"""Push, pull, wrap: what comes back is what went up, and nothing else went up."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.checkpoint import encode
from lpt_peft.errors import ConfigError, HubConflictError, HubNotFoundError, InputError, PromptFileNotFoundError
from lpt_peft.hub import push_files, read_prompts
from tests.conftest import tiny_vit
from tests.hub.conftest import IMAGES, REPO, adapter_of, transformers_vit

ROOT = Path(__file__).parents[2]
NAMES = {"config.json", "prompts.safetensors", "README.md", ".gitattributes"}  # the last one is the Hub's own


def files_of(local, branch="main", repo=REPO):
    return {path: file.content for path, file in local.hub.repositories[repo].at(branch).files.items()}


def transformers_adapter():
    adapter = LongTailPromptAdapter.wrap(transformers_vit(), 4, prompt_length=2, pool_size=3)
    adapter.phase = "group"
    return adapter.eval()


def test_push_then_a_fresh_process_gives_the_same_logits(local, tmp_path):
    adapters = {"timm": adapter_of()}
    with contextlib.suppress(ImportError):  # said by the test below
        adapters["transformers"] = transformers_adapter()
    for name, adapter in adapters.items():
        info = adapter.push_to_hub(f"me/{name}", label_names=list("abcdefg")[: adapter.prompt_config.num_classes])
        assert info.oid == local.hub.repositories[f"me/{name}"].refs["main"]
    program = (
        "import sys, torch\n"
        "from lpt_peft import LongTailPromptAdapter\n"
        "from tests.conftest import tiny_vit\n"
        "from tests.hub.conftest import IMAGES, transformers_vit\n"
        "for name in sys.argv[2:]:\n"
        "    vit = tiny_vit() if name == 'timm' else transformers_vit()\n"
        "    adapter = LongTailPromptAdapter.from_pretrained('me/' + name, vit)\n"
        "    assert adapter.metadata.label_names[0] == 'a'\n"
        "    torch.save(adapter(IMAGES).detach(), sys.argv[1] + '/' + name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "other")}
    command = [sys.executable, "-c", program, tmp_path, *adapters]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for name, adapter in adapters.items():
        assert torch.equal(torch.load(tmp_path / name), adapter(IMAGES)), name


def test_only_prompts_travel_and_the_bytes_are_counted(local):
    adapter = adapter_of()
    config, weights = encode(adapter)
    adapter.push_to_hub(REPO)
    files = files_of(local)
    assert files.keys() == NAMES
    assert (files["config.json"], files["prompts.safetensors"]) == (config, weights)
    uploads = [request for request in local.requests if request.method == "PUT"]
    assert [len(request.body) for request in uploads] == [len(weights)]
    total = sum(len(request.body) for request in local.requests)
    # The weights once; the small files base64, the card twice (once to be checked); samples and JSON around them.
    assert total < len(weights) + 2 * len(config) + 3 * len(files["README.md"]) + 6000
    backbone = sum(p.numel() * 4 for p in tiny_vit().parameters())
    assert len(weights) < backbone
    names = set(json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])) - {"__metadata__"}
    assert names == set(adapter.prompt_config.tensor_shapes)

    before = local.sent
    LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())
    assert local.sent - before == len(config) + len(weights)
    before = local.sent
    LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())
    assert local.sent == before  # from the cache


def test_one_atomic_commit_and_none_where_nothing_changed(local):
    adapter = adapter_of()
    first = adapter.push_to_hub(REPO, commit_message="first")
    again = adapter.push_to_hub(REPO)
    assert again.oid == first.oid
    assert [commit.message for commit in local.hub.repositories[REPO].history] == ["first", "initial commit"]
    adapter_of(seed=1).push_to_hub(REPO, commit_message="second")
    history = local.hub.repositories[REPO].history
    assert [commit.message for commit in history] == ["second", "first", "initial commit"]
    assert history[0].files["README.md"] == history[1].files["README.md"]


def test_a_readme_and_other_files_stay(local):
    local.hub.create(REPO, "hf_write", private=False).put({"README.md": b"# mine", "notes.txt": b"keep"})
    adapter_of().push_to_hub(REPO)
    files = files_of(local)
    assert (files["README.md"], files["notes.txt"]) == (b"# mine", b"keep")
    assert files.keys() == NAMES | {"notes.txt"}


def test_a_name_without_owner_is_the_accounts(local):
    adapter = adapter_of()
    assert "/me/tiny/commit/" in adapter.push_to_hub("tiny").commit_url
    assert 'from_pretrained("me/tiny"' in files_of(local, repo="me/tiny")["README.md"].decode()


def test_private_is_of_a_new_repository(local):
    adapter = adapter_of()
    adapter.push_to_hub(REPO, private=True)
    assert local.hub.repositories[REPO].private
    adapter.push_to_hub(REPO, private=False)
    assert local.hub.repositories[REPO].private
    assert read_prompts(REPO, token="hf_read").config["prompt"]["phase"] == "group"


def test_a_pull_request(local):
    adapter = adapter_of()
    local.hub.create("stranger/theirs", "hf_stranger", private=False)
    info = adapter.push_to_hub("stranger/theirs", create_pr=True)
    assert info.pr_url.endswith("/stranger/theirs/discussions/1")
    assert files_of(local, repo="stranger/theirs").keys() == {".gitattributes"}
    assert files_of(local, "refs/pr/1", "stranger/theirs").keys() == NAMES
    twin = LongTailPromptAdapter.from_pretrained("stranger/theirs", tiny_vit(), revision="refs/pr/1")
    assert torch.equal(twin(IMAGES), adapter(IMAGES))
    with pytest.raises(ConfigError, match="leave revision= out"):
        adapter.push_to_hub("stranger/theirs", create_pr=True, revision="dev")


def test_branches_tags_and_commits(local):
    one, two = adapter_of(1), adapter_of(2)
    first = one.push_to_hub(REPO)
    two.push_to_hub(REPO, revision="dev")
    two.push_to_hub(REPO, revision="dev")  # the branch is there already
    huggingface_hub.HfApi().create_tag(REPO, tag="v1")
    for revision, adapter in ((None, one), ("main", one), ("dev", two), ("v1", one), (first.oid, one)):
        twin = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), revision=revision)
        assert torch.equal(twin(IMAGES), adapter(IMAGES)), revision


def test_several_prompt_files_in_one_repository(local, tmp_path):
    adapters = {"a": adapter_of(1), "b/c": adapter_of(2)}
    for subfolder, adapter in adapters.items():
        adapter.push_to_hub(REPO, subfolder=subfolder)
    assert files_of(local).keys() == {
        *("a/config.json", "a/prompts.safetensors", "b/c/config.json", "b/c/prompts.safetensors"),
        *(".gitattributes", "README.md"),
    }
    assert 'subfolder="a"' in files_of(local)["README.md"].decode()
    for subfolder, adapter in adapters.items():
        twin = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), subfolder=subfolder)
        assert torch.equal(twin(IMAGES), adapter(IMAGES))
    adapters["a"].save_pretrained(tmp_path / "x" / "a")
    assert read_prompts(tmp_path / "x", subfolder="a").prompt_config == adapters["a"].prompt_config
    for wrong in ("/a", "a/", "../a", "a//b", "a/./b", "a\\b", ""):
        with pytest.raises(ConfigError, match="inside the repository"):
            read_prompts(REPO, subfolder=wrong)
        with pytest.raises(ConfigError, match="inside the repository"):
            adapters["a"].push_to_hub(REPO, subfolder=wrong)


def test_a_folder_of_that_name_comes_first(local, tmp_path, monkeypatch):
    adapter_of(1).push_to_hub(REPO)
    requests = len(local.requests)
    monkeypatch.chdir(tmp_path)
    adapter_of(2).save_pretrained(REPO)
    assert torch.equal(LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())(IMAGES), adapter_of(2)(IMAGES))
    with pytest.raises(PromptFileNotFoundError, match="nothing"):
        read_prompts(Path("me/nothing"))
    with pytest.raises(PromptFileNotFoundError, match="nothing"):
        read_prompts("./me/nothing")
    with pytest.raises(ConfigError, match=r"revision='v1' is of a repository"):
        read_prompts(REPO, revision="v1")
    assert len(local.requests) == requests


def test_a_push_between_two_downloads_never_mixes_commits(local):
    one, two = adapter_of(1), adapter_of(2)
    one.push_to_hub(REPO)
    repository = local.hub.repositories[REPO]
    config, weights = encode(two)

    def push_once(request):
        if request.path.endswith("/prompts.safetensors") and repository.at("main").message != "other":
            repository.put({"config.json": config, "prompts.safetensors": weights}, "other")

    local.before = push_once
    twin = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())
    assert repository.at("main").message == "other"
    assert torch.equal(twin(IMAGES), one(IMAGES))
    assert torch.equal(LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())(IMAGES), two(IMAGES))


def test_a_push_between_look_and_download_of_the_config(local):
    one, two = adapter_of(1), adapter_of(2)
    one.push_to_hub(REPO)
    repository = local.hub.repositories[REPO]
    pair = dict(zip(("config.json", "prompts.safetensors"), encode(two), strict=True))
    seen = []

    def push_after_the_first_look(request):
        seen.append(request)
        if len(seen) == 2:
            repository.put(pair, "other")

    local.before = push_after_the_first_look
    assert torch.equal(LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())(IMAGES), two(IMAGES))


def test_a_repository_that_changes_all_the_time_is_given_up(local):
    adapter_of(1).push_to_hub(REPO)
    repository = local.hub.repositories[REPO]
    local.before = lambda request: repository.put({"notes.txt": os.urandom(8)})
    with pytest.raises(ConnectionError, match="changed 3 times"):
        read_prompts(REPO)


def test_a_lost_race_says_so_and_overwrites_nothing(local):
    adapter_of(1).push_to_hub(REPO)
    repository = local.hub.repositories[REPO]

    def push_before_the_commit(request):
        if "/commit/" in request.path:
            repository.put({"notes.txt": b"theirs"}, "other")

    local.before = push_before_the_commit
    with pytest.raises(HubConflictError, match="someone else pushed meanwhile"):
        adapter_of(2).push_to_hub(REPO)
    assert repository.at("main").message == "other"
    assert files_of(local)["config.json"] == encode(adapter_of(1))[0]


def test_what_cannot_be_saved_is_not_sent(local):
    adapter = adapter_of()
    with pytest.raises(InputError, match="class_counts"):
        adapter.push_to_hub(REPO, class_counts=[1])
    broken = copy.deepcopy(adapter)
    broken.pool.keys.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN"):
        broken.push_to_hub(REPO)
    config, weights = encode(adapter)
    with pytest.raises(ValueError, match="strict JSON"):
        push_files(config[:-5], weights, REPO)
    assert local.requests == []


def test_the_record_of_a_pull(local):
    adapter_of().push_to_hub(REPO)
    local.requests.clear()
    read_prompts(REPO)
    asked = [request for request in local.requests if not request.host.startswith("localhost")]
    assert {request.path.rpartition("/")[2] for request in asked} == {"config.json", "prompts.safetensors"}
    assert {request.method for request in local.requests} == {"HEAD", "GET"}
    assert all("lpt_peft" in request.headers["user-agent"] for request in asked)


def test_old_downloads_are_of_the_content_they_say(local, tmp_path):
    """A cache entry that went bad on disk is noticed and mended."""
    adapter = adapter_of()
    adapter.push_to_hub(REPO)
    read_prompts(REPO, cache_dir=tmp_path / "mine")
    for name in ("config.json", "prompts.safetensors"):
        (path,) = (tmp_path / "mine").rglob(name)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.resolve().write_bytes(data)
        assert read_prompts(REPO, cache_dir=tmp_path / "mine").prompt_config == adapter.prompt_config
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(files_of(local)[name]).digest()


def test_missing(local):
    adapter_of().push_to_hub(REPO)
    with pytest.raises(HubNotFoundError, match=r"no such repository.*private.*hf auth login"):
        read_prompts("me/nothing")
    with pytest.raises(HubNotFoundError, match="no such revision"):
        read_prompts(REPO, revision="v9")
    with pytest.raises(HubNotFoundError, match=r"config\.json of me/places-lt.*no such file.*subfolder="):
        read_prompts(REPO, subfolder="nowhere")


def test_a_transformers_backbone(local, tmp_path):
    try:
        adapter = transformers_adapter()
    except ImportError as error:
        pytest.skip(f"no transformers for this client: {error}")
    adapter.push_to_hub(REPO)
    assert files_of(local).keys() == NAMES
    assert "transformers" in files_of(local)["README.md"].decode()
    twin = LongTailPromptAdapter.from_pretrained(REPO, transformers_vit())
    assert torch.equal(twin(IMAGES), adapter(IMAGES))
    with pytest.raises(ConfigError, match=r"names no Hub repository of its weights.*from_pretrained\(folder, vit\)"):
        LongTailPromptAdapter.from_pretrained(REPO)


def test_load_prompts_from_the_hub(local):
    adapter_of(2).push_to_hub(REPO)
    adapter_of(3, phase="shared").push_to_hub(REPO, revision="first-phase")
    adapter = adapter_of(1)
    adapter.load_prompts(REPO)
    assert torch.equal(adapter(IMAGES), adapter_of(2)(IMAGES))
    adapter.load_prompts(REPO, part="shared", revision="first-phase")
    assert adapter.phase == "group"
    assert torch.equal(adapter.shared.prompts, adapter_of(3).shared.prompts)
    assert torch.equal(adapter.pool.prompts, adapter_of(2).pool.prompts)


def test_a_pull_request_is_no_branch_to_be_made(local):
    adapter = adapter_of()
    adapter.push_to_hub(REPO)
    with contextlib.suppress(Exception):  # whether there is such a pull request is not the question here
        adapter.push_to_hub(REPO, revision="refs/pr/1")
    assert not [request for request in local.requests if "/branch/" in request.path]


def test_one_tag_as_a_text(local):
    adapter_of().push_to_hub(REPO, tags="birds")
    assert "\n- birds\n" in files_of(local)["README.md"].decode()


@pytest.mark.parametrize("timeout", ["3", float("nan"), 0, -1, True, float("inf")])
def test_a_timeout_that_is_none(local, timeout):
    with pytest.raises(ConfigError, match="timeout="):
        adapter_of().push_to_hub(REPO, timeout=timeout)
    assert local.requests == []


def test_ctrl_c_says_that_the_push_may_still_arrive(local, monkeypatch):
    original = threading.Thread.join

    def interrupted(thread, seconds=None):
        original(thread, seconds)
        if thread.name == "lpt_peft push":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt, match="may still do what it was asked"):
        adapter_of().push_to_hub(REPO)
