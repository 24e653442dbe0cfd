"""examples/predict_with_ray.py on a local Ray of two CPUs, against `Classifier` in this process."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lpt_peft import Classifier
from lpt_peft.errors import ConfigError, InputError, StateError
from lpt_peft.inference.items import ItemReader
from lpt_peft.inference.run_backbone import RunBackbone
from tests.clients.example_processes import load_example
from tests.inference.sample import adapter_of, pictures, write_run

ray = pytest.importorskip("ray", reason="ray is not installed, or has no wheel for this Python")
psutil = pytest.importorskip("psutil")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray.data")

IMAGES, DAMAGED = 22, 7


@pytest.fixture(scope="module")
def example():
    module = load_example("predict_with_ray")
    ray.cloudpickle.register_pickle_by_value(module)  # as for a script, which workers cannot import
    yield module
    ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module")
def cluster():
    """Ray with two CPUs; checks at the end that none of its processes is left."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets below it need a short path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # a token would be written to the home folder
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        small = {"include_dashboard": False, "object_store_memory": 2**28, "log_to_driver": False}
        ray.init("local", num_cpus=2, _temp_dir=folder, **small)
        yield
        ray.shutdown()
    deadline = time.monotonic() + 30
    while (left := ray_processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left


def ray_processes(folder):
    found = psutil.process_iter(["cmdline"])
    return [process.info["cmdline"] for process in found if folder in " ".join(process.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    described = {"backbone": "test_vit", "pretrained": False, "img_size": 32}
    model = adapter_of("group", RunBackbone(**described).build())
    return write_run(tmp_path_factory.mktemp("run"), model, **described)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, picture in enumerate(pictures(IMAGES)):
        picture.save(folder / f"{number:02}.png")
    (folder / f"{DAMAGED:02}.png").write_bytes(b"no image")
    return folder


def settings_of(example, run, images, output, **changes):
    values = {"part_size": 8, "batch_size": 4, "show": 3, "num_cpus": 0.5, **changes}
    return example.Settings(model=str(run), images=str(images), output=output, **values)


def assert_rows(rows, expected):
    """Check rows of an output file against predictions of `Classifier`."""
    assert len(rows) == len(expected)
    for row, prediction in zip(rows, expected, strict=True):
        assert row["image"] == prediction.image
        assert row.get("error") == prediction.error
        if prediction.error is not None:
            assert not row.get("classes")
            continue
        assert [entry["label"] for entry in row["classes"]] == list(prediction.labels)
        assert [entry["class"] for entry in row["classes"]] == list(prediction.label_names)
        assert [entry["probability"] for entry in row["classes"]] == pytest.approx(prediction.probabilities, abs=1e-5)


@pytest.mark.slow
def test_folder_with_a_damaged_image_on_two_actors_of_which_a_process_dies(
    example, cluster, run, photos, tmp_path, capsys, monkeypatch
):
    marker = tmp_path / "died"

    class DiesOnce(example.Predict):
        def __call__(self, batch):
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return super().__call__(batch)
            os._exit(1)

    monkeypatch.setattr(example, "PROGRESS_SECONDS", 0)
    settings = settings_of(example, run, photos, tmp_path / "out", actors=2)
    assert example.main(settings, DiesOnce) == {"images": IMAGES, "unreadable": 1, "skipped": 0}
    assert marker.exists()
    printed = capsys.readouterr().err
    assert f"{IMAGES} images, 1 of them unreadable; 0 skipped" in printed
    assert f"{IMAGES} of {IMAGES} images, 1 unreadable, " in printed
    assert "warning" not in printed

    expected = Classifier.from_pretrained(run)(sorted(photos.iterdir()), show=3)
    assert expected[DAMAGED].error is not None
    names = [f"part-{number:06}.parquet" for number in range(3)]
    assert sorted(path.name for path in settings.output.iterdir()) == ["inputs.jsonl", "job.json", *names]
    files = [pq.read_table(settings.output / name).to_pylist() for name in names]
    assert [len(rows) for rows in files] == [8, 8, 6]
    assert_rows([row for rows in files for row in rows], expected)


@pytest.mark.slow
def test_parquet_to_jsonl_continues_an_interrupted_job(example, cluster, run, photos, tmp_path):
    paths = sorted(photos.iterdir())
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths[:9]]
    pq.write_table(pa.table({"image": images, "label": [0] * 9}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": "b"}]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": [paths[10].read_bytes(), None]}), tmp_path / "c.parquet")
    settings = settings_of(example, run, tmp_path / "*.parquet", tmp_path / "out", format="jsonl")
    classifier = Classifier.from_pretrained(run)
    assert [part.rows for part in example.open_job(settings, classifier)] == [9, 1, 2]
    existing = settings.output / "part-000001.jsonl"
    existing.write_text("written before the interruption")

    assert example.main(settings) == {"images": 11, "unreadable": 2, "skipped": 1}
    assert existing.read_text() == "written before the interruption"
    first, last = ((settings.output / f"part-00000{number}.jsonl").read_text().splitlines() for number in (0, 2))
    given = [replace(prediction, image=prediction.image.split("/")[-1]) for prediction in classifier(paths[:9], show=3)]
    given[DAMAGED] = replace(classifier(b"no image")[0], image=paths[DAMAGED].name)
    assert_rows([json.loads(line) for line in first], given)
    [known] = classifier(paths[10], show=3)
    source = str(tmp_path / "c.parquet")
    unknown = replace(classifier(b"")[0], image=f"{source}#1")
    assert_rows([json.loads(line) for line in last], [replace(known, image=f"{source}#0"), unknown])


def test_a_list_is_divided_once_and_relative_paths_are_of_this_folder(example, run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"00.png\nmissing.png\r\n\n\xff.png\n03.png\n")
    settings = settings_of(example, run, listed, tmp_path / "out", part_size=3)
    classifier = Classifier.from_pretrained(run)
    parts = example.open_job(settings, classifier)
    assert [part.rows for part in parts] == [3, 1]
    listed.write_text("")
    monkeypatch.chdir(tmp_path)
    assert example.open_job(settings, classifier) == parts
    columns = {"reader": ItemReader(classifier.transform), "column": ""}
    [first], [second] = (
        example.read_part({name: np.array([value]) for name, value in asdict(part).items()}, **columns)
        for part in parts
    )
    assert first["image"] == [str(photos / "00.png"), str(photos / "missing.png"), str(photos) + "/\\xff.png"]
    assert first["error"] == ["", "No such file or directory", "No such file or directory"]
    assert (first["position"].tolist(), second["part"].tolist()) == ([0, 1, 2], [1])
    assert second["error"] == [""]
    assert torch.equal(torch.tensor(second["pixels"][0]), ItemReader(classifier.transform)[photos / "03.png"][0])


def test_a_chunk_without_a_readable_image(example, run, photos, tmp_path):
    settings = settings_of(example, run, tmp_path / "list.txt", tmp_path / "out")
    Path(settings.images).write_text("missing.png\n")
    actor = example.Predict(settings)
    [part] = example.open_job(settings, actor.classifier)
    fields = {name: np.array([value]) for name, value in asdict(part).items()}
    [chunk] = example.read_part(fields, ItemReader(actor.classifier.transform), "")
    table = actor({name: np.asarray(values) for name, values in chunk.items()})
    assert table.schema == example.ROW
    assert table.to_pylist()[0]["error"] == "No such file or directory"


def test_another_job_in_the_same_folder_is_an_error(example, run, photos, tmp_path):
    settings = settings_of(example, run, photos, tmp_path / "out")
    classifier = Classifier.from_pretrained(run)
    example.open_job(settings, classifier)
    with torch.no_grad():
        classifier.model.head.weight.mul_(2)
    with pytest.raises(
        ConfigError, match=r"show was 3, head was '.*Choose another output folder, or delete this folder"
    ):
        example.open_job(replace(settings, show=2), classifier)


def test_errors_name_the_cure(example, run, photos, tmp_path):
    def refuses(error, message, **changes):
        settings = settings_of(example, run, changes.pop("images", photos), tmp_path / "out", **changes)
        with pytest.raises(error, match=message):
            example.main(settings)
        assert not (tmp_path / "out" / "job.json").exists()

    refuses(ConfigError, "actors=0 must be at least 1", actors=0)
    refuses(InputError, "does not exist: give a folder, a list, or a pattern of Parquet", images=tmp_path / "nowhere")
    refuses(InputError, r"No file matches .*x\.parquet: check the path", images=tmp_path / "x.parquet")
    (tmp_path / "empty.txt").write_text("\n")
    refuses(InputError, r"empty\.txt has no image: check the path", images=tmp_path / "empty.txt")
    pq.write_table(pa.table({"jpg": [b""]}), tmp_path / "a.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1, but no Parquet file")
    refuses(InputError, r"damaged\.parquet cannot be read as Parquet: .*Repair", images=tmp_path / "damaged.parquet")
    refuses(InputError, "has the columns jpg: give --column NAME", images=tmp_path / "a.parquet")


def test_missing_and_repeated_rows_are_errors(example, run, tmp_path):
    settings = settings_of(example, run, "list", tmp_path)
    part = example.Part(number=0, source="", begin=0, rows=2)

    def table(*positions):
        rows = [{"part": 0, "position": position, "image": "a", "error": "b"} for position in positions]
        return pa.Table.from_pylist(rows, schema=example.ROW)

    with pytest.raises(StateError, match="Rows of 1 parts are missing: run the command again"):
        example.write_parts(settings, [part], iter([table(0)]))
    with pytest.raises(StateError, match="Rows of part 0 are repeated: run the command again"):
        example.write_parts(settings, [part], iter([table(0), table(0)]))
    assert not list(tmp_path.iterdir())
    assert example.write_parts(settings, [part], iter([table(1), table(0)])) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["part-000000.parquet"]


def test_a_cluster_that_is_too_small_is_reported(example, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    example.warn_of_resources(settings_of(example, run, "list", tmp_path, actors=2, num_gpus=0.5))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "need 1 GPUs, and the cluster has 0. Ray waits until it grows: give fewer --actors" in lines[0]
