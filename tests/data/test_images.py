"""Images: what is read, how it is split, what models are fed with, and refusals that a user can act on."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig

from lensbench.data.images import (
    Images,
    TrainingImages,
    labels_for,
    load_images,
    moved_by,
    part_sizes,
    pixels_of_size,
    plain_pixels,
)
from lensbench.errors import LensbenchError

PARTS = (900, 350, 150, 397)


def test_digits_are_scikit_learns_and_every_image_is_in_one_split():
    digits, found = load_digits(), load_images("digits", parts=PARTS, seed=0)
    assert [len(found.splits[s]) for s in ("train", "fit", "dev", "eval")] == list(PARTS)
    assert sorted(np.concatenate(list(found.splits.values()))) == list(range(1797))
    pixels = plain_pixels([found.read(k) for k in range(1797)], channels=1, height=8, width=8)
    np.testing.assert_allclose(pixels[:, 0], digits.images / 8 - 1, atol=0.5 / 127)
    np.testing.assert_array_equal(found.labels, digits.target)
    other = load_images("digits", parts=PARTS, seed=1)
    assert other.checksum == found.checksum
    assert set(other.splits["eval"]) != set(found.splits["eval"])


@given(st.lists(st.integers(1, 1000), min_size=4, max_size=4), st.integers(4, 5000))
def test_parts_sum_to_what_there_is_and_keep_their_proportion(parts, count):
    sizes = part_sizes(parts, count)
    assert sum(sizes) == count
    assert part_sizes(parts, sum(parts)) == parts
    assert all(abs(n - count * p / sum(parts)) <= 1 for n, p in zip(sizes, parts, strict=True))


def write_folder(folder, classes=("cat", "dog"), each=12, size=(20, 10)):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(each):
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
                folder / name / f"{k}.png"
            )
    return folder


def test_a_folder_of_folders_is_read_and_the_same_picture_twice_counts_once(tmp_path):
    folder = write_folder(tmp_path / "pets")
    (folder / "dog" / "copy.png").write_bytes((folder / "dog" / "3.png").read_bytes())
    (folder / "dog" / "notes.txt").write_text("no picture")
    found = load_images(f"folder:{folder}", parts=(6, 6, 6, 6), seed=0)
    assert found.classes == ("cat", "dog")
    assert sum(map(len, found.splits.values())) == 24
    rows = found.splits["eval"]
    images = Images(found, rows, pixels_of_size(channels=3, height=16, width=16), found.labels[rows])
    pixels, row, at = images.scored(slice(2, 5))
    assert pixels.shape == (3, 3, 16, 16)
    assert pixels.dtype == np.float32
    assert abs(pixels).max() <= 1
    assert row.tolist() == [0, 1, 2]
    assert not at.any()
    assert images.targets(slice(2, 5)).tolist() == [int("dog" in found.names[k]) for k in rows[2:5]]
    assert len(set(images.clusters)) == len(rows), "images of one class are not one cluster"


def test_images_that_cannot_be_used_are_refused_with_what_would_be_right(tmp_path):
    def refused(spec, match, parts=(6, 6, 6, 6)):
        with pytest.raises(LensbenchError, match=match):
            load_images(spec, parts=parts, seed=0)

    refused("didgits", "unknown images 'didgits'.*digits, folder:PATH")
    refused(f"folder:{tmp_path}/none", "there is no folder")
    refused(f"folder:{write_folder(tmp_path / 'one', classes=('cat',))}", "each in a folder of its own")
    refused(f"folder:{write_folder(tmp_path / 'few', each=2)}", "4 different images: too few", (2, 1, 1, 400))
    broken = write_folder(tmp_path / "broken")
    (broken / "cat" / "5.png").write_bytes(b"\x89PNG but no more")
    refused(f"folder:{broken}", "5.png is not an image")
    piped = write_folder(tmp_path / "piped")
    os.mkfifo(piped / "cat" / "zz.png")  # it would be waited for without end
    refused(f"folder:{piped}", "zz.png is no file but a folder, pipe or device")


def test_classes_are_matched_by_name_and_by_order_where_a_model_has_no_names():
    named = ViTConfig(id2label={0: "tabby, house cat", 1: "Dog", 2: "fish"})
    assert labels_for("m", named, ("dog", "house cat")).tolist() == [1, 0]
    assert labels_for("m", ViTConfig(num_labels=3), ("a", "b", "c")).tolist() == [0, 1, 2]
    with pytest.raises(LensbenchError, match="m has no class 'cow'"):
        labels_for("m", named, ("cow",))
    with pytest.raises(LensbenchError, match="has no class 'a'"):
        labels_for("m", ViTConfig(num_labels=4), ("a", "b", "c"))


def test_classes_named_by_numbers_are_in_the_order_of_numbers_and_are_a_nameless_models_numbers(tmp_path):
    folder = write_folder(tmp_path / "numbered", classes=tuple(str(k) for k in range(12)), each=2)
    found = load_images(f"folder:{folder}", parts=(6, 6, 6, 6), seed=0)
    assert found.classes == tuple(str(k) for k in range(12))
    assert all(int(name.split(":")[0]) == label for name, label in zip(found.names, found.labels, strict=True))
    nameless = ViTConfig(num_labels=12)
    assert labels_for("m", nameless, found.classes).tolist() == list(range(12))
    assert labels_for("m", nameless, ("11", "2", "7")).tolist() == [11, 2, 7]
    assert labels_for("m", nameless, ("LABEL_3", "LABEL_10")).tolist() == [3, 10]
    # From 1 on they are none of the model's numbers: by order, which is theirs as numbers.
    assert labels_for("m", nameless, [str(k) for k in range(1, 13)]).tolist() == list(range(12))


def test_an_ambiguous_name_of_a_class_is_refused_and_equal_lists_of_names_are_not():
    imagenet = {0: "crane", 1: "crane", 2: "sunglass", 3: "sunglasses, dark glasses, sunglass", 4: "maillot, tank suit"}
    model = ViTConfig(id2label=imagenet)
    assert labels_for("m", model, tuple(imagenet.values())).tolist() == [0, 1, 2, 3, 4]
    assert labels_for("m", model, ("sunglasses, dark glasses, sunglass", "sunglass", "tank suit")).tolist() == [3, 2, 4]
    with pytest.raises(LensbenchError, match=r"'Crane' is the name of 2 of the classes of m \(0, 1\)"):
        labels_for("m", model, ("Crane", "maillot"))
    with pytest.raises(LensbenchError, match="'maillot' and 'tank suit' are one class of m"):
        labels_for("m", model, ("maillot", "sunglass", "tank suit"))


def test_the_same_image_under_two_labels_is_refused(tmp_path):
    folder = write_folder(tmp_path / "pets")
    (folder / "cat" / "copy.png").write_bytes((folder / "dog" / "3.png").read_bytes())
    with pytest.raises(LensbenchError, match=r"twice, once as 'cat' \(cat:copy.png\) and once as 'dog' \(dog:3.png\)"):
        load_images(f"folder:{folder}", parts=(6, 6, 6, 6), seed=0)


@settings(max_examples=50)
@given(st.integers(-3, 3), st.integers(-3, 3))
def test_a_moved_image_is_the_image_at_another_place_and_black_elsewhere(down, right):
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 5, 6)).astype(np.float32)
    moved = moved_by(pixels, down, right)
    padded = np.pad(pixels, ((0, 0), (3, 3), (3, 3)), constant_values=-1)
    np.testing.assert_array_equal(moved, padded[:, 3 - down : 8 - down, 3 - right : 9 - right])


def test_training_batches_depend_on_seed_and_step_alone_and_hold_no_other_split():
    found = load_images("digits", parts=PARTS, seed=0)
    rows = found.splits["train"]
    images = Images(found, rows, pixels_of_size(channels=1, height=8, width=8), found.labels[rows])
    batches = TrainingImages.of(images, batch=16, seed=3, shift=1)
    first = batches(5)
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(5), strict=True))
    assert not torch.equal(first[0], batches(6)[0])
    whole = images.scored(slice(None))[0]
    still = TrainingImages(batches.pixels, batches.labels, 16, 3, 0)(5)
    for pixels, label in zip(*still, strict=True):
        at = np.flatnonzero((whole == pixels.numpy()).all((1, 2, 3)))
        assert len(at)
        assert label in images.labels[at]


def test_a_data_set_of_the_hub_is_read_by_its_image_and_label_columns(monkeypatch):
    import datasets

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(24)]
    labels = [k % 2 for k in range(24)]
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), "tag": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict({"img": pictures, "kind": labels, "tag": ["a", "b", "c"] * 8}, features=features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or table)
    found = load_images("hf:org/pets/small@test", parts=(6, 6, 6, 6), seed=0)
    assert asked == [(("org/pets", "small"), {"split": "test"})]
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == labels
    np.testing.assert_array_equal(np.asarray(found.read(7)), np.asarray(pictures[7]))
    tagged = load_images("hf:org/pets#img,tag", parts=(6, 6, 6, 6), seed=0)
    assert tagged.classes == ("a", "b", "c")
    assert tagged.labels[4] == 1
    with pytest.raises(LensbenchError, match="no column of labels 'name'; it has img, kind, tag"):
        load_images("hf:org/pets#img,name", parts=(6, 6, 6, 6), seed=0)


def test_a_local_data_set_may_lie_at_any_depth(tmp_path, monkeypatch):
    import datasets

    asked = []

    def ask(*args, **_):
        asked.append(args)
        raise OSError("nothing was loaded")

    monkeypatch.setattr(datasets, "load_dataset", ask)
    deep = tmp_path / "a" / "b" / "pets"
    deep.mkdir(parents=True)
    for name in (f"{deep}", f"{deep}/small", f"{tmp_path}/none/b", "org/pets", "org/pets/small", "digits"):
        with pytest.raises(LensbenchError, match="nothing was loaded"):
            load_images(f"hf:{name}@train", parts=(6, 6, 6, 6), seed=0)
    assert asked == [
        (str(deep), None),
        (str(deep), "small"),
        (f"{tmp_path}/none/b", None),
        ("org/pets", None),
        ("org/pets", "small"),
        ("digits", None),
    ]
