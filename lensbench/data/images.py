"""Labelled images in four splits: scikit-learn's digits, a folder of folders, or a Hugging Face dataset.

A spec names a set of images: ``digits`` (1797 images of 8 x 8 pixels, part of scikit-learn), ``folder:PATH`` (with a folder
for each class) or ``hf:NAME[/CONFIG][@SPLIT][#IMAGE,LABEL]``. Every image is one document, the unit that intervals resample.
Classes without numbers are numbered in the order of their names; names that are all whole numbers are sorted as numbers.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedConfig

from lensbench.data.corpus import SPLITS
from lensbench.data.samples import fingerprint_of
from lensbench.errors import LensbenchError
from lensbench.runtime.environment import needs
from lensbench.runtime.texts import open_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


SPECS = "digits, folder:PATH or hf:NAME[/CONFIG][@SPLIT][#IMAGE,LABEL]"


Prepare = Callable[[Sequence[Image.Image]], NDArray[np.float32]]
"""Makes the pixels that a model reads, float32 ``[n, C, H, W]``, from pictures"""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images and their splits; an image is read when it is needed."""

    spec: str
    checksum: str
    """SHA-256 (hex) over contents and labels of all images, independent of their order"""
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    """int64 [N]: index into ``classes``"""
    classes: tuple[str, ...]
    splits: dict[str, NDArray[np.int64]]
    """Indices of the images of each of ``SPLITS``"""
    read: Callable[[int], Image.Image]
    """Reads the image of this index"""


@dataclass(frozen=True, eq=False)
class Images:
    """S images as :class:`lensbench.data.samples.Samples`: one scored position each, and the class is the target."""

    of: ImageSet
    rows: NDArray[np.int64]
    """int64 [S]: their indices in the set"""
    prepare: Prepare
    labels: NDArray[np.int64]
    """int64 [S]: classes, in the numbering of the model that reads them"""
    valid: NDArray[np.bool_] = field(init=False)
    documents: NDArray[np.int64] = field(init=False)
    sequence: NDArray[np.int64] = field(init=False)
    next_bytes: NDArray[np.int32] = field(init=False)
    positions_read: int = 1

    def __post_init__(self) -> None:
        count = len(self.rows)
        made = {"valid": np.ones((count, 1), dtype=np.bool_), "documents": np.arange(count, dtype=np.int64)}
        made |= {"sequence": np.zeros(count, dtype=np.int64), "next_bytes": np.zeros((count, 1), dtype=np.int32)}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def document_names(self) -> tuple[str, ...]:
        """Names of the images"""
        return tuple(self.of.names[k] for k in self.rows)

    @property
    def clusters(self) -> NDArray[np.int64]:
        """int64 [S]: every image is its own cluster"""
        return self.documents

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the names and classes of the images, and of those that the set holds"""
        return fingerprint_of((self.rows, self.labels), (self.of.checksum, *self.document_names))

    def __len__(self) -> int:
        return len(self.rows)

    def scored(self, rows: slice) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Pixels ``[s, C, H, W]`` of some images, and for each its number (from 0) and its place, 0."""
        pixels = self.prepare([self.of.read(int(k)) for k in self.rows[rows]])
        return pixels, np.arange(len(pixels)), np.zeros(len(pixels), dtype=np.int64)

    def targets(self, rows: slice) -> NDArray[np.int64]:
        """The classes of some images, ``[s]``."""
        return self.labels[rows]

    def take(self, rows: NDArray[np.int64]) -> "Images":
        """The images with these indices."""
        return Images(self.of, self.rows[rows], self.prepare, self.labels[rows])

    def spread(self, count: int) -> "Images":
        """``count`` images, or all if there are fewer, evenly spread over their order."""
        return self.take(np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)))


# Reading
def load_images(
    spec: str, *, parts: Sequence[int], seed: int, max_images: int | None = None, needed: Sequence[str] = SPLITS
) -> ImageSet:
    """The images of ``spec``, split at random into ``parts`` images each, or in that proportion if their number differs.

    Of files with the same content only the first is kept; the same image in another format is another file. Raises
    :class:`LensbenchError` where such files have different labels, for a spec that cannot be read, and where one of the
    ``needed`` splits has fewer than two images.
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        names, labels, classes, contents, read = _digits()
    elif kind == "folder" and rest:
        names, labels, classes, contents, read = _folder(Path(rest), max_images)
    elif kind == "hf" and rest:
        names, labels, classes, contents, read = _hub(spec, max_images)
    else:
        raise LensbenchError(f"unknown images {spec!r}: they are {SPECS}")
    first: dict[str, int] = {}
    for k, content in enumerate(contents):
        if labels[first.setdefault(content, k)] != labels[k]:
            one = first[content]
            raise LensbenchError(
                f"{spec} has the same image twice, once as {classes[labels[one]]!r} ({names[one]}) and once as "
                f"{classes[labels[k]]!r} ({names[k]}): take out one of them"
            )
    kept = np.array(sorted(first.values()), dtype=np.int64)
    if max_images is not None:
        kept = np.sort(np.random.default_rng([seed, 1]).permutation(kept)[:max_images])
    checksum = hashlib.sha256("\n".join(sorted(f"{contents[k]} {classes[labels[k]]}" for k in kept)).encode())
    order = np.random.default_rng(seed).permutation(kept)
    sizes = part_sizes(parts, len(kept))
    ends = np.cumsum(sizes)
    splits = {s: np.sort(order[end - n : end]) for s, n, end in zip(SPLITS, sizes, ends, strict=True)}
    for split in needed:
        if len(splits[split]) < 2:
            raise LensbenchError(
                f"{spec} has {len(kept)} different images: too few for a {split} split ({list(parts)})"
            )
    return ImageSet(spec, checksum.hexdigest(), names, labels, classes, splits, read)


def part_sizes(parts: Sequence[int], count: int) -> list[int]:
    """``parts`` if they sum to ``count``, else whole numbers in the same proportion that do."""
    ends = np.round(np.cumsum(parts) * (count / sum(parts))).astype(int)
    return [int(n) for n in np.diff(ends, prepend=0)]


_Read = tuple[tuple[str, ...], NDArray[np.int64], tuple[str, ...], list[str], Callable[[int], Image.Image]]


def _digits() -> _Read:
    from sklearn.datasets import load_digits

    found = load_digits()
    # 17 shades become 17 of 256: all stay distinct.
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    names = tuple(f"digits-{k:04d}" for k in range(len(pixels)))
    labels, classes = found.target.astype(np.int64), tuple(str(k) for k in range(10))
    return names, labels, classes, [_digest(p.tobytes()) for p in pixels], lambda k: Image.fromarray(pixels[k], "L")


def _folder(folder: Path, max_images: int | None) -> _Read:
    if not folder.is_dir():
        raise LensbenchError(f"there is no folder of images {folder}")
    folders = {p.name: p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    inside = [folders[name] for name in in_order(folders)]
    found = [(p, k) for k, of in enumerate(inside) for p in sorted(of.rglob("*")) if p.suffix.lower() in SUFFIXES]
    if len({k for _, k in found}) < 2:
        raise LensbenchError(
            f"folder {folder} holds images of {len({k for _, k in found})} classes: lensbench needs at least two, "
            f"each in a folder of its own ({', '.join(SUFFIXES)})"
        )
    if max_images is not None and len(found) > max_images:
        found = [found[k] for k in np.sort(np.random.default_rng(0).permutation(len(found))[:max_images])]
    for path, _ in found:
        try:
            with open_file(path, str(path)) as file, Image.open(file) as picture:  # a pipe may never end
                picture.verify()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise LensbenchError(f"{path} is not an image that can be read: {error}") from error
    # Without slashes: images of one class are not one cluster.
    names = tuple(str(p.relative_to(folder)).replace("/", ":").replace("\\", ":") for p, _ in found)
    contents = [_digest(path.read_bytes()) for path, _ in found]
    labels = np.array([k for _, k in found], dtype=np.int64)
    return names, labels, tuple(p.name for p in inside), contents, lambda k: _opened(found[k][0], found[k][0])


def _path_and_config(name: str) -> tuple[str, str | None]:
    """A data set's name or folder, and its config: ``ORG/NAME[/CONFIG]``, or a path, ``FOLDER[/CONFIG]``, of any depth."""
    if Path(name).is_dir():
        return name, None
    folder, _, config = name.rpartition("/")
    if name.startswith(("/", "./", "../")):  # a path, which no name on the hub looks like
        return (folder, config) if config and Path(folder).is_dir() else (name, None)
    place = name.split("/")
    return ("/".join(place[:2]), "/".join(place[2:]) or None) if len(place) > 1 else (name, None)


def _hub(spec: str, max_images: int | None) -> _Read:
    needs("hub", "datasets")
    from datasets import ClassLabel, load_dataset
    from datasets import Image as ImageFeature

    name, _, columns = spec.removeprefix("hf:").partition("#")
    name, _, split = name.partition("@")
    path, config = _path_and_config(name)
    try:
        table = load_dataset(path, config, split=split or "train")
    except Exception as error:  # the hub's client raises what its transport does
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LensbenchError(f"{spec} cannot be loaded: {reason}") from error
    features = table.features
    of_images = [n for n, f in features.items() if isinstance(f, ImageFeature)]
    of_labels = [n for n, f in features.items() if isinstance(f, ClassLabel)]
    pictured, labelled = [*columns.split(","), ""][:2] if columns else ("", "")
    pictured, labelled = pictured or next(iter(of_images), ""), labelled or next(iter(of_labels), "")
    for what, column, known in (("images", pictured, of_images), ("labels", labelled, list(features))):
        if column not in known:
            raise LensbenchError(
                f"{spec} has no column of {what} {column!r}; it has {', '.join(features)}: name them with #"
            )
    if max_images is not None and len(table) > max_images:
        table = table.select(np.sort(np.random.default_rng(0).permutation(len(table))[:max_images]))
    raw = table.cast_column(pictured, ImageFeature(decode=False))
    values = raw[labelled]
    feature = features[labelled]
    classes = tuple(feature.names) if isinstance(feature, ClassLabel) else tuple(in_order({str(v) for v in values}))
    labels = np.array(
        [int(v) if isinstance(feature, ClassLabel) else classes.index(str(v)) for v in values], dtype=np.int64
    )
    if (labels < 0).any():
        raise LensbenchError(f"{spec} has images without a label in {labelled!r}: take another split of it with @")

    def content(k: int) -> bytes:
        kept = raw[k][pictured]
        return kept["bytes"] if kept["bytes"] is not None else Path(kept["path"]).read_bytes()

    names = tuple(f"{path.replace('/', ':')}-{k:07d}" for k in range(len(raw)))
    contents = [_digest(content(k)) for k in range(len(raw))]
    return names, labels, classes, contents, lambda k: _opened(BytesIO(content(k)), names[k])


def _opened(file: Any, name: object) -> Image.Image:
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LensbenchError(f"{name} is not an image that can be read: {error}") from error


def in_order(classes: Iterable[str]) -> list[str]:
    """The names of classes, sorted; as numbers if all are whole numbers, so that 2 comes before 10."""
    return sorted(classes, key=int if all(c.isdecimal() for c in classes) else None)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Pixels for models
def plain_pixels(pictures: Iterable[Image.Image], *, channels: int, height: int, width: int) -> NDArray[np.float32]:
    """Pixels ``[n, C, H, W]`` from -1 to 1; pictures of another size are resized (bilinear). One channel means grey."""
    mode = "L" if channels == 1 else "RGB"
    made = []
    for picture in pictures:
        seen = picture.convert(mode)
        if seen.size != (width, height):
            seen = seen.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(seen, dtype=np.float32).reshape(height, width, channels) / 127.5 - 1
        made.append(pixels.transpose(2, 0, 1))
    return np.stack(made)


def processed_pixels(pictures: Iterable[Image.Image], *, processor: Any, channels: int) -> NDArray[np.float32]:
    """Pixels ``[n, C, H, W]`` as the image processor of a pretrained model makes them."""
    mode = "L" if channels == 1 else "RGB"
    pixels = processor(images=[p.convert(mode) for p in pictures], return_tensors="np")["pixel_values"]
    return np.asarray(pixels, dtype=np.float32)


def labels_for(who: str, config: PreTrainedConfig, classes: Sequence[str]) -> NDArray[np.int64]:
    """The number that a model has for each class of a data set, int64 [classes].

    Classes are matched by order if both have the same names in the same order, or if the model has no names and the same
    number of classes. Otherwise they are matched by the model's full name, else by a synonym (names of ImageNet are lists
    of synonyms). If a model has no names and all classes are named by numbers of the model, these numbers are used.

    Raises :class:`LensbenchError` where the model does not have a class, where a name belongs to several classes (ImageNet
    has two ``crane``), and where two classes would have one number.
    """
    names = {int(k): str(v) for k, v in (config.id2label or {}).items()}
    of_model = [names[k].strip().lower() for k in sorted(names)]
    wanted = [c.strip().lower() for c in classes]
    in_its_order = np.arange(len(classes), dtype=np.int64)
    if wanted == of_model:
        return in_its_order
    if all(name == f"LABEL_{number}" for number, name in names.items()) and not set(wanted) <= set(of_model):
        numbers = [int(c) for c in wanted if c.isdecimal() and int(c) in names]
        if len(set(numbers)) == len(wanted):
            return np.array(numbers, dtype=np.int64)
        if len(names) == len(classes):
            return in_its_order
    known: dict[str, set[int]] = {}
    synonyms: dict[str, set[int]] = {}
    for number, name in zip(sorted(names), of_model, strict=True):
        known.setdefault(name, set()).add(number)
        for word in name.split(","):
            synonyms.setdefault(word.strip(), set()).add(number)
    found = []
    for name, word in zip(classes, wanted, strict=True):
        meant = known.get(word) or synonyms.get(word) or set()
        if not meant:
            raise LensbenchError(
                f"{who} has no class {name!r}: it has {len(names)} ({', '.join(list(names.values())[:3])}, ...), the "
                f"images have {len(classes)}; give images whose classes are named as the model's are"
            )
        if len(meant) > 1:
            raise LensbenchError(
                f"{name!r} is the name of {len(meant)} of the classes of {who} ({', '.join(map(str, sorted(meant)))}): "
                "name that class of the images with the model's whole name, or give all classes in the model's order"
            )
        found.append(meant.pop())
    for number in found:
        if found.count(number) > 1:
            both = " and ".join(repr(c) for c, n in zip(classes, found, strict=True) if n == number)
            raise LensbenchError(f"{both} are one class of {who} ({names[number]!r}): give them one name")
    return np.array(found, dtype=np.int64)


# Training
@dataclass(frozen=True)
class TrainingImages:
    """The train split in memory, and batches of it: random images, each moved by up to ``shift`` pixels in each direction.

    Pixels that move in from the edge are black (-1). A batch is a function of seed and step.
    """

    pixels: NDArray[np.float32]
    """float32 [N, C, H, W]"""
    labels: NDArray[np.int64]
    batch: int
    seed: int
    shift: int

    @classmethod
    def of(cls, images: Images, *, batch: int, seed: int, shift: int) -> "TrainingImages":
        """The training images of ``images``, with all pixels read into memory."""
        pixels = np.concatenate([images.scored(slice(k, k + 256))[0] for k in range(0, len(images), 256)])
        return cls(pixels, images.labels, batch, seed, shift)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Pixels ``[batch, C, H, W]`` and classes ``[batch]`` of a step."""
        rng = np.random.default_rng([self.seed, step])
        rows = rng.integers(0, len(self.pixels), self.batch)
        moves = rng.integers(-self.shift, self.shift + 1, (self.batch, 2))
        moved = np.stack([moved_by(self.pixels[k], *move) for k, move in zip(rows, moves, strict=True)])
        return torch.from_numpy(moved), torch.from_numpy(self.labels[rows])


def moved_by(pixels: NDArray[np.float32], down: int, right: int) -> NDArray[np.float32]:
    """An image ``[C, H, W]`` moved by these numbers of pixels, black at the edges that become free."""
    _, height, width = pixels.shape
    moved = np.full_like(pixels, -1)
    rows, columns = (slice(max(0, n), size + min(0, n)) for n, size in ((down, height), (right, width)))
    sources = (slice(max(0, -n), size - max(0, n)) for n, size in ((down, height), (right, width)))
    moved[:, rows, columns] = pixels[:, *sources]
    return moved


def pixels_of_size(*, channels: int, height: int, width: int) -> Prepare:
    """:func:`plain_pixels` for images of one size."""
    return partial(plain_pixels, channels=channels, height=height, width=width)
