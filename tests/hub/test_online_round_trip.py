"""Push, pull, wrap: the prompts come back unchanged, and nothing else is uploaded."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch

from lpt_peft import LongTailPromptAdapter
from lpt_peft.errors import ConfigError, HubConflictError, HubNotFoundError, InputError, PromptFileNotFoundError
from lpt_peft.hub import push, read_prompts
from tests.checkpoint.adapters import IMAGES, tiny_adapter, tiny_content, tiny_encoded
from tests.conftest import tiny_vit
from tests.hub.conftest import REPO, transformers_vit

ROOT = Path(__file__).parents[2]
NAMES = {"config.json", "prompts.safetensors", "README.md", ".gitattributes"}  # the last one is the Hub's own


def files_of(local, branch="main", repo=REPO):
    return {path: file.content for path, file in local.hub.repositories[repo].at(branch).files.items()}


def transformers_adapter():
    adapter = LongTailPromptAdapter.wrap(transformers_vit(), 4, prompt_length=2, pool_size=3)
    adapter.phase = "group"
    return adapter.eval()


def test_push_then_a_fresh_process_gives_the_same_logits(local, tmp_path):
    adapters = {"timm": tiny_adapter()}
    with contextlib.suppress(ImportError):  # reported by the test below
        adapters["transformers"] = transformers_adapter()
    for name, adapter in adapters.items():
        info = adapter.push_to_hub(f"me/{name}", label_names=list("abcdefg")[: adapter.prompt_config.num_classes])
        assert info.oid == local.hub.repositories[f"me/{name}"].refs["main"]
    program = (
        "import sys, torch\n"
        "from lpt_peft import LongTailPromptAdapter\n"
        "from tests.conftest import tiny_vit\n"
        "from tests.checkpoint.adapters import IMAGES\n"
        "from tests.hub.conftest import transformers_vit\n"
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
    adapter = tiny_adapter()
    weights, config, _ = tiny_encoded()
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
    assert names == {*adapter.prompt_config.tensor_shapes, "pool.usage"}

    before = local.sent
    LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())
    assert local.sent - before == len(weights)
    before = local.sent
    LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())
    assert local.sent == before  # from the cache


def test_one_atomic_commit_and_none_where_nothing_changed(local):
    adapter = tiny_adapter()
    first = adapter.push_to_hub(REPO, commit_message="first")
    again = adapter.push_to_hub(REPO)
    assert again.oid == first.oid
    assert [commit.message for commit in local.hub.repositories[REPO].history] == ["first", "initial commit"]
    tiny_adapter(seed=1).push_to_hub(REPO, commit_message="second")
    history = local.hub.repositories[REPO].history
    assert [commit.message for commit in history] == ["second", "first", "initial commit"]
    assert history[0].files["README.md"] == history[1].files["README.md"]


def test_a_readme_and_other_files_stay(local):
    local.hub.create(REPO, "hf_write", private=False).put({"README.md": b"# text", "notes.txt": b"keep"})
    tiny_adapter().push_to_hub(REPO)
    files = files_of(local)
    assert (files["README.md"], files["notes.txt"]) == (b"# text", b"keep")
    assert files.keys() == NAMES | {"notes.txt"}


def test_a_name_without_owner_is_the_accounts(local):
    adapter = tiny_adapter()
    assert "/me/tiny/commit/" in adapter.push_to_hub("tiny").commit_url
    assert 'from_pretrained("me/tiny"' in files_of(local, repo="me/tiny")["README.md"].decode()


def test_private_is_of_a_new_repository(local):
    adapter = tiny_adapter()
    adapter.push_to_hub(REPO, private=True)
    assert local.hub.repositories[REPO].private
    adapter.push_to_hub(REPO, private=False)
    assert local.hub.repositories[REPO].private
    assert read_prompts(REPO, token="hf_read").phase == "group"


def test_a_pull_request(local):
    adapter = tiny_adapter()
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
    first, second = tiny_adapter(seed=1), tiny_adapter(seed=2)
    commit = first.push_to_hub(REPO)
    second.push_to_hub(REPO, revision="dev")
    second.push_to_hub(REPO, revision="dev")  # the branch exists
    huggingface_hub.HfApi().create_tag(REPO, tag="v1")
    for revision, adapter in ((None, first), ("main", first), ("dev", second), ("v1", first), (commit.oid, first)):
        twin = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), revision=revision)
        assert torch.equal(twin(IMAGES), adapter(IMAGES)), revision


def test_several_prompt_files_in_one_repository(local, tmp_path):
    adapters = {"a": tiny_adapter(seed=1), "b/c": tiny_adapter(seed=2)}
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
    assert read_prompts(tmp_path / "x", subfolder="a").config == adapters["a"].prompt_config
    for wrong in ("/a", "a/", "../a", "a//b", "a/./b", "a\\b", ""):
        with pytest.raises(ConfigError, match="inside the folder or repository"):
            read_prompts(REPO, subfolder=wrong)
        with pytest.raises(ConfigError, match="inside the folder or repository"):
            adapters["a"].push_to_hub(REPO, subfolder=wrong)


def test_a_folder_of_that_name_comes_first(local, tmp_path, monkeypatch):
    tiny_adapter(seed=1).push_to_hub(REPO)
    requests = len(local.requests)
    monkeypatch.chdir(tmp_path)
    tiny_adapter(seed=2).save_pretrained(REPO)
    assert torch.equal(LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())(IMAGES), tiny_adapter(seed=2)(IMAGES))
    with pytest.raises(PromptFileNotFoundError, match="nothing"):
        read_prompts(Path("me/nothing"))
    with pytest.raises(PromptFileNotFoundError, match="nothing"):
        read_prompts("./me/nothing")
    with pytest.raises(ConfigError, match=r"revision='v1' is for repositories"):
        read_prompts(REPO, revision="v1")
    assert len(local.requests) == requests


def push_as_another_user(local, at_request):
    """Replace the prompts of the repository before the given request is answered."""
    repository = local.hub.repositories[REPO]
    requests = []

    def before(request):
        requests.append(request)
        if len(requests) == at_request:
            repository.put({"prompts.safetensors": tiny_encoded(2).weights}, "other")

    local.before = before
    return requests


def test_a_push_during_a_download_gives_the_old_prompts_or_the_new(local):
    tiny_adapter(seed=1).push_to_hub(REPO)
    read_prompts(REPO, cache_dir=None)
    requests = push_as_another_user(local, 10**6)
    read_prompts(REPO, force_download=True)
    expected = [tiny_adapter(seed=seed)(IMAGES) for seed in (1, 2)]
    pushed = 0
    for at_request in range(1, len(requests) + 1):
        local.hub.repositories[REPO].put({"prompts.safetensors": tiny_encoded(1).weights}, "back")
        push_as_another_user(local, at_request)
        adapter = LongTailPromptAdapter.from_pretrained(REPO, tiny_vit(), force_download=True)
        assert any(torch.equal(adapter(IMAGES), logits) for logits in expected)
        local.before = lambda request: None
        new = files_of(local)["prompts.safetensors"] == tiny_encoded(2).weights
        assert torch.equal(LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())(IMAGES), expected[new])
        pushed += new
    assert pushed >= 3  # between any two of the requests: size, metadata, download


FOREIGN = b'{"model_type": "vit", "architectures": ["ViTForImageClassification"]}'


@pytest.mark.parametrize("subfolder", [None, "a/b"])
@pytest.mark.parametrize("revision", [None, "main", "dev", "new"])
def test_the_config_of_another_library_is_never_overwritten(local, subfolder, revision):
    prefix = f"{subfolder}/" if subfolder else ""
    repository = local.hub.create(REPO, "hf_write", private=False)
    repository.put({prefix + "config.json": FOREIGN, prefix + "model.safetensors": b"theirs"})
    repository.refs["dev"] = repository.refs["main"]
    before = dict(repository.refs)
    with pytest.raises(HubConflictError, match='does not belong to a prompt file.*subfolder="prompts"'):
        tiny_adapter().push_to_hub(REPO, subfolder=subfolder, revision=revision)
    assert repository.refs == before  # no commit, and no branch
    tiny_adapter().push_to_hub(REPO, subfolder="prompts", revision=revision)  # as the message says
    assert files_of(local, revision or "main")[prefix + "config.json"] == FOREIGN
    loaded = read_prompts(REPO, subfolder="prompts", revision=revision)
    assert loaded.config == tiny_adapter().prompt_config


def test_the_config_of_another_library_on_one_branch_alone(local):
    tiny_adapter().push_to_hub(REPO)
    repository = local.hub.repositories[REPO]
    repository.refs["vit"] = repository.refs["main"]
    repository.put({"config.json": FOREIGN}, branch="vit")
    with pytest.raises(HubConflictError, match="does not belong to a prompt file"):
        tiny_adapter(seed=1).push_to_hub(REPO, revision="vit")
    tiny_adapter(seed=1).push_to_hub(REPO)
    tiny_adapter(seed=1).push_to_hub(REPO, revision="other")  # a branch that begins as main


def test_pull_requests_and_the_config_of_another_library(local):
    theirs = local.hub.create("stranger/theirs", "hf_stranger", private=False)
    theirs.put({"config.json": FOREIGN})
    with pytest.raises(HubConflictError, match="does not belong to a prompt file"):
        tiny_adapter().push_to_hub("stranger/theirs", create_pr=True)
    assert set(theirs.refs) == {"main"}
    tiny_adapter().push_to_hub("stranger/theirs", create_pr=True, subfolder="prompts")
    theirs.refs["refs/pr/7"] = theirs.refs["main"]
    with pytest.raises(HubConflictError, match="does not belong to a prompt file"):
        tiny_adapter().push_to_hub("stranger/theirs", revision="refs/pr/7", token="hf_stranger")


@pytest.mark.parametrize(
    "copy", [b'{"format": "lpt_peft-prompts"}', b'{"format": "lpt_peft-prompts", "format_version": 1}']
)
def test_an_older_copy_of_a_prompt_file_is_replaced(local, copy):
    local.hub.create(REPO, "hf_write", private=False).put({"config.json": copy})
    tiny_adapter().push_to_hub(REPO)
    assert files_of(local)["config.json"] == tiny_encoded().copy


@pytest.mark.parametrize("copy", [None, FOREIGN, b"{"])
def test_loading_does_not_ask_for_the_copy(local, copy):
    tiny_adapter().push_to_hub(REPO)
    repository = local.hub.repositories[REPO]
    head = repository.at("main")
    files = {name: file for name, file in head.files.items() if name != "config.json"}
    repository.refs["main"] = repository.add(files, "without", head.oid).oid
    if copy is not None:
        repository.put({"config.json": copy})
    local.requests.clear()
    assert torch.equal(LongTailPromptAdapter.from_pretrained(REPO, tiny_vit())(IMAGES), tiny_adapter()(IMAGES))
    assert not any("config.json" in request.path for request in local.requests)


def test_a_lost_race_says_so_and_overwrites_nothing(local):
    tiny_adapter(seed=1).push_to_hub(REPO)
    repository = local.hub.repositories[REPO]

    def push_before_the_commit(request):
        if "/commit/" in request.path:
            repository.put({"notes.txt": b"theirs"}, "other")

    local.before = push_before_the_commit
    with pytest.raises(HubConflictError, match="another user pushed meanwhile"):
        tiny_adapter(seed=2).push_to_hub(REPO)
    assert repository.at("main").message == "other"
    assert files_of(local)["prompts.safetensors"] == tiny_encoded(1).weights


def test_what_cannot_be_saved_is_not_sent(local):
    adapter = tiny_adapter()
    with pytest.raises(InputError, match="class_counts"):
        adapter.push_to_hub(REPO, class_counts=[1])
    broken = copy.deepcopy(adapter)
    broken.pool.keys.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN"):
        broken.push_to_hub(REPO)
    with pytest.raises(InputError, match="library_version"):
        push(replace(tiny_content(), library_version=""), REPO)
    assert local.requests == []


def test_the_record_of_a_pull(local):
    tiny_adapter().push_to_hub(REPO)
    local.requests.clear()
    read_prompts(REPO)
    asked = [request for request in local.requests if not request.host.startswith("localhost")]
    assert {request.path.rpartition("/")[2] for request in asked} == {"prompts.safetensors"}
    assert {request.method for request in local.requests} == {"HEAD", "GET"}
    assert all("lpt_peft" in request.headers["user-agent"] for request in asked)


def test_a_damaged_cache_entry_is_downloaded_again(local, tmp_path):
    adapter = tiny_adapter()
    adapter.push_to_hub(REPO)
    read_prompts(REPO, cache_dir=tmp_path / "cache")
    for name in ("prompts.safetensors",):
        (path,) = (tmp_path / "cache").rglob(name)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.resolve().write_bytes(data)
        assert read_prompts(REPO, cache_dir=tmp_path / "cache").config == adapter.prompt_config
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(files_of(local)[name]).digest()


def test_missing(local):
    tiny_adapter().push_to_hub(REPO)
    with pytest.raises(HubNotFoundError, match=r"repository does not exist.*private.*hf auth login"):
        read_prompts("me/nothing")
    with pytest.raises(HubNotFoundError, match="revision does not exist"):
        read_prompts(REPO, revision="v9")
    with pytest.raises(HubNotFoundError, match=r"prompts\.safetensors of me/places-lt.*does not exist.*subfolder="):
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
    tiny_adapter(seed=2).push_to_hub(REPO)
    tiny_adapter(seed=3, phase="shared").push_to_hub(REPO, revision="first-phase")
    adapter = tiny_adapter(seed=1)
    adapter.load_prompts(REPO)
    assert torch.equal(adapter(IMAGES), tiny_adapter(seed=2)(IMAGES))
    adapter.load_prompts(REPO, part="shared", revision="first-phase")
    assert adapter.phase == "group"
    assert torch.equal(adapter.shared.prompts, tiny_adapter(seed=3).shared.prompts)
    assert torch.equal(adapter.pool.prompts, tiny_adapter(seed=2).pool.prompts)


def test_a_pull_request_is_not_created_as_a_branch(local):
    adapter = tiny_adapter()
    adapter.push_to_hub(REPO)
    with contextlib.suppress(Exception):  # the Hub may refuse it
        adapter.push_to_hub(REPO, revision="refs/pr/1")
    assert not [request for request in local.requests if "/branch/" in request.path]


def test_one_tag_as_a_text(local):
    tiny_adapter().push_to_hub(REPO, tags="birds")
    assert "\n- birds\n" in files_of(local)["README.md"].decode()


@pytest.mark.parametrize("timeout", ["3", float("nan"), 0, -1, True, float("inf")])
def test_an_invalid_timeout(local, timeout):
    with pytest.raises(ConfigError, match="timeout="):
        tiny_adapter().push_to_hub(REPO, timeout=timeout)
    assert local.requests == []


def test_ctrl_c_reports_that_the_push_may_still_take_effect(local, monkeypatch):
    original = threading.Thread.join

    def interrupted(thread, seconds=None):
        original(thread, seconds)
        if thread.name == "lpt_peft push":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt, match="may still take effect"):
        tiny_adapter().push_to_hub(REPO)
