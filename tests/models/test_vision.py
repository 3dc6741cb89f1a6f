"""Image classifiers on the same path as language models: their streams, and a suite of them from end to end."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.commands import csv_bytes, refused, run
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from lensbench.data.images import Images, load_images, pixels_of_size
from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.models import FAMILIES, build, count_parameters
from lensbench.models.vision import IsotropicCNNForImageClassification
from lensbench.probes import gradient_alignment
from lensbench.probes.gradient_alignment import states_and_gradients
from lensbench.probes.registry import PROBES
from lensbench.probes.subject import Subject
from lensbench.results.folder import read_run
from lensbench.streams.stream import ResidualStream

SHAPE = {"vocab_size": 5, "d_model": 16, "layers": 3, "heads": 2, "context": 8, "channels": 1}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
VISION = [name for name, family in FAMILIES.items() if family.images]


def randomised(model):
    """Gains and biases away from one and zero, so that no norm passes for another."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p += 0.3 * torch.randn_like(p)
    return model.eval()


def images(model, count=4):
    config = getattr(model.config, "vision_config", model.config)
    shape = config.num_channels, config.image_size, config.image_size
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


ISOTROPIC = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, num_labels=5)),
    "beit": lambda: BeitForImageClassification(BeitConfig(**SMALL, num_labels=5)),
    "clip": lambda: CLIPForImageClassification(CLIPConfig(vision_config=SMALL, num_labels=5)),
    "siglip": lambda: SiglipForImageClassification(SiglipConfig(vision_config=SMALL, num_labels=5)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL, num_labels=5)),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(image_size=32, hidden_sizes=[12] * 3, depths=[1] * 3, num_stages=3, num_labels=5)
    ),
}


@pytest.mark.parametrize("kind", ISOTROPIC)
def test_any_classifier_of_one_width_is_read_out_at_its_last_state_as_it_does_itself(kind):
    model = randomised(ISOTROPIC[kind]())
    stream, x = ResidualStream(model), images(model)
    states, logits = stream.forward(x)
    assert len(states) == stream.layers + 1 == 4
    assert states.shape[1:] == (4, stream.d_model)
    with torch.no_grad():
        own = model(x).logits
    torch.testing.assert_close(logits, own)
    torch.testing.assert_close(stream.readout(states[-1]), own, rtol=1e-4, atol=1e-5)
    rows = torch.tensor([2, 0])
    some, read = stream.at(x, rows, torch.zeros_like(rows))
    torch.testing.assert_close(some, states[:, rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read, own[rows], rtol=1e-5, atol=1e-5)
    assert stream.at(x, rows, rows * 0, read_out=False)[1].shape == (0, 5)


def test_the_logit_lens_of_a_vit_is_its_own_norm_and_head_on_the_class_token_of_every_layer():
    model = randomised(ISOTROPIC["vit"]())
    stream, x = ResidualStream(model), images(model)
    with torch.no_grad():
        reported = model(x, output_hidden_states=True).hidden_states
        states, _ = stream.forward(x)
        for mine, theirs in zip(states, reported, strict=True):
            torch.testing.assert_close(
                stream.readout(mine), model.classifier(model.vit.layernorm(theirs)[:, 0]), rtol=1e-4, atol=1e-5
            )


def test_where_a_model_averages_normalised_positions_the_state_is_that_average():
    model = randomised(ISOTROPIC["siglip"]())
    stream, x = ResidualStream(model), images(model)
    inner = model.vision_model
    with torch.no_grad():
        reported = inner(x, output_hidden_states=True).hidden_states
        states, _ = stream.forward(x)
        torch.testing.assert_close(states[1], inner.post_layernorm(reported[1]).mean(1), rtol=1e-4, atol=1e-5)


def test_a_network_whose_stages_change_width_is_refused_with_what_would_work(tmp_path):
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    )
    with pytest.raises(LensbenchError, match=r"change the width of its states \(8, 16\).*ViT.*cnn-residual"):
        ResidualStream(model)
    model.save_pretrained(tmp_path / "resnet")
    result = run("run", "vision", "--model", f"path:{tmp_path}/resnet", "--out", tmp_path / "out")
    refused(result, "change the width")


@pytest.mark.parametrize("family", VISION)
def test_families_have_the_stated_size_and_seed_and_come_back_from_a_folder(family, tmp_path):
    model = build(family, parameters=20_400, **SHAPE)
    assert abs(count_parameters(model) - 20_400) <= 204
    same, other = build(family, parameters=20_400, **SHAPE), build(family, parameters=20_400, seed=1, **SHAPE)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    model.eval().save_pretrained(tmp_path / family)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / family).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(x).logits, again(x).logits)
    setting = "patch_size" if family == "vit" else "stride"
    with pytest.raises(LensbenchError, match="do not divide images of 8"):
        build(family, parameters=20_400, **SHAPE, **{setting: 3})


def test_the_two_cnns_differ_in_their_skips_alone():
    one, other = (build(f, parameters=20_400, **SHAPE) for f in ("cnn-residual", "cnn-plain"))
    assert isinstance(one, IsotropicCNNForImageClassification)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        h, plain = (m(x, output_hidden_states=True).hidden_states for m in (one, other))
    torch.testing.assert_close(h[0], plain[0])
    torch.testing.assert_close(h[1] - h[0], plain[1])


def test_gradients_are_autograds_of_the_whole_state_of_each_image():
    model = build("cnn-residual", parameters=20_400, **SHAPE).eval()
    stream, x, classes = ResidualStream(model), torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 4])
    states, descent = states_and_gradients(stream, x, classes)
    with torch.no_grad():
        h = model(x, output_hidden_states=True).hidden_states
    at = h[1].clone().requires_grad_()
    after = at
    for block in model.blocks[1:]:
        after = block(after)
    F.cross_entropy(model.classifier(model.norm(after.mean((2, 3)))), classes, reduction="sum").backward()
    torch.testing.assert_close(states[1], h[1].flatten(1)[:, None])
    torch.testing.assert_close(descent[1], -at.grad.flatten(1)[:, None], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", VISION)
def test_a_model_in_half_precision_is_read_at_the_states_it_computes(family):
    model = build(family, parameters=20_400, **SHAPE).eval()
    x = images(model)
    whole = ResidualStream(model).forward(x)[0]
    half = ResidualStream(model.bfloat16()).forward(x)[0]
    torch.testing.assert_close(half.float(), whole, rtol=0.05, atol=0.05)


def test_an_image_that_would_be_alone_in_the_last_batch_is_not_its_own_null(monkeypatch):
    monkeypatch.setattr(gradient_alignment, "IMAGES_AT_ONCE", 4)
    stream = ResidualStream(build("cnn-residual", parameters=20_400, **SHAPE).eval())
    pictures = load_images("digits", parts=(900, 350, 150, 397), seed=0)
    rows = pictures.splits["eval"][:5]
    some = Images(pictures, rows, pixels_of_size(channels=1, height=8, width=8), pictures.labels[rows] % 5)

    def measured(samples):
        maps = AffineMaps.identity(stream.d_model)
        subject = Subject(stream, samples, [0], maps, False, lambda split: None, maps, maps)
        return PROBES["gradient_alignment"].measure(subject)

    found = measured(some)
    aligned, null = (found.top[:, [q == f"gradient_alignment{end}" for q in found.quantity]] for end in ("", "_null"))
    assert aligned.shape == null.shape == (5, stream.layers)
    assert (np.abs(aligned - null) > 1e-6).all()
    alone = measured(some.take(np.array([0])))
    assert "no second prediction" in alone.reason


SUITE = """
name = "tiny"
question = "Does it run?"
seeds = [0, 1]
threads = 1
probes = ["accuracy", "representation", "matched_transfer", "gradient_alignment", "block_paths"]
[images]
spec = "digits"
[training]
tokens = 3200
batch = 32
[fit]
ridges = [0.001, 0.1, 10.0]
pads = [0.0, 0.5]
rotations = 2
pair_rotations = 1
refits = 1
refine_passes = 1
[evaluate]
draws = 100
[[claims]]
model = "res"
against = "plain"
[[models]]
name = "res"
family = "cnn-residual"
d_model = 16
layers = 3
parameters = 20_400
training = { learning_rate = 0.01 }
[[models]]
name = "plain"
family = "cnn-plain"
d_model = 16
layers = 3
parameters = 20_400
training = { learning_rate = 0.01 }
[[models]]
name = "vit"
family = "vit"
d_model = 16
layers = 3
heads = 2
parameters = 20_400
training = { learning_rate = 0.01 }
[[models]]
name = "res+rotated"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    (folder / "tiny.toml").write_text(SUITE)
    result = run("run", folder / "tiny.toml", "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.mark.run
def test_models_of_images_are_computed_at_once_too(finished, tmp_path):
    folder, _ = finished
    result = run("run", folder / "tiny.toml", "--out", tmp_path / "out", "--workers", "2")
    assert result.exit_code == 0, result.output
    assert csv_bytes(tmp_path / "out") == csv_bytes(folder / "out")


@pytest.mark.run
def test_a_suite_of_images_gives_the_same_tables_as_one_of_text(finished):
    folder, result = finished
    found = read_run(folder / "out")
    models = found.tables["models.csv"]
    assert len(models) == 8
    assert (models["clusters"] == 128).all()  # images are joined into groups at random
    assert (models["scored_tokens"] == 397).all()
    assert models["bits_per_byte"].isna().all()
    assert (models["vocab_size"] == 10).all()
    assert found.manifest.corpus.documents == {"train": 900, "fit": 350, "dev": 150, "eval": 397}
    assert len(found.tables["transfer.csv"]) == 8 * 16
    assert set(found.tables["baselines.csv"]["tokenizer"]) == {"images"}
    assert {"accuracy_by_layer.png", "plane.png", "probes.png"} <= {
        p.name for p in (folder / "out" / "figures").iterdir()
    }
    assert "nats/image" in result.output
    assert "bits/byte" not in result.output
    assert "accuracy" in result.output
    frequencies = found.tables["baselines.csv"].set_index("baseline").loc["class frequencies", "ce"]
    assert frequencies == pytest.approx(np.log(10), abs=0.05)


@pytest.mark.run
def test_accuracies_are_those_of_the_saved_model(finished):
    from lensbench.data.images import load_images, plain_pixels

    folder, _ = finished
    (stage,) = (folder / "out" / "stages").glob("train-res-seed0*")
    model = AutoModelForImageClassification.from_pretrained(stage).eval()
    digits = load_images("digits", parts=(900, 350, 150, 397), seed=0)
    rows = digits.splits["eval"]
    pixels = torch.from_numpy(plain_pixels([digits.read(k) for k in rows], channels=1, height=8, width=8))
    with torch.no_grad():
        logits = model(pixels).logits
    right = (logits.argmax(-1).numpy() == digits.labels[rows]).mean()
    table = pd.read_csv(folder / "out" / "probes.csv")
    told = table[(table["quantity"] == "accuracy") & (table["model"] == "res") & (table["seed"] == "0")]["value"].item()
    assert told == pytest.approx(right)
    ce = F.cross_entropy(logits, torch.from_numpy(digits.labels[rows])).item()
    models = read_run(folder / "out").tables["models.csv"].astype({"seed": str}).set_index(["model", "seed"])
    assert models.loc[("res", "0"), "ce"] == pytest.approx(ce, rel=1e-4)


@pytest.mark.run
def test_the_claim_is_paired_by_seed_and_everything_stands_on_one_ruler(finished):
    folder, _ = finished
    result = run("compare", folder / "out", "--out", folder / "compared.csv")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(folder / "compared.csv")
    claims = table[table["kind"] == "claim"]
    assert set(claims["index"]) == {"shared_consistency", "gain_visibility"}
    assert claims["paired"].all()
    assert table[table["index"] == "bits_per_byte"]["value"].isna().all()
    result = run("ruler", folder / "out", "--out", folder / "ruler.png")
    assert result.exit_code == 0
    assert (folder / "ruler.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.run
@pytest.mark.usefixtures("no_figures")
def test_a_pretrained_classifier_gets_images_as_its_own_processor_makes_them(finished, tmp_path):
    folder, _ = finished
    model = ViTForImageClassification(ViTConfig(**{**SMALL, "num_labels": 10, "num_channels": 3}))
    model.save_pretrained(tmp_path / "mine")
    plain = run("run", folder / "tiny.toml", "--model", f"path:{tmp_path}/mine", "--out", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    assert "without an image processor" in plain.output, plain.output
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.9] * 3).save_pretrained(
        tmp_path / "mine"
    )
    own = run("run", folder / "tiny.toml", "--model", f"path:{tmp_path}/mine", "--out", tmp_path / "own")
    assert own.exit_code == 0, own.output
    assert "without an image processor" not in own.output, own.output
    one, other = (pd.read_csv(tmp_path / name / "models.csv")["ce"].item() for name in ("plain", "own"))
    assert one != other
    assert json.loads((tmp_path / "own" / "manifest.json").read_text())["tokenizers"].keys() == {"mine"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('spec = "digits"', 'spec = "digit"', "unknown images 'digit'"),
        ('probes = ["accuracy"', 'probes = ["few_shot"', "probe 'few_shot' reads text"),
        ('family = "vit"', 'family = "gpt"', "family gpt reads text, and the suite has [images]"),
        ("batch = 32", "batch = 32\nlength = 64", "training.length is 64: of images there is nothing to choose"),
        ("[training]", '[corpus]\nspec = "stdlib"\n[training]', "cannot have [corpus]"),
        ("layers = 3\nparameters", "layers = 3\nheads = 2\nparameters", "has no attention"),
        ('spec = "digits"', 'spec = "digits"\nparts = [900, 0, 150, 397]', "fit, dev and eval must have at least 1"),
        ('spec = "digits"', 'spec = "digits"\nshift = 8', "moved out of sight"),
    ],
)
def test_a_suite_of_images_that_cannot_run_is_refused_in_one_line(old, new, told, tmp_path):
    (tmp_path / "s.toml").write_text(SUITE.replace(old, new, 1))
    refused(run("run", tmp_path / "s.toml", "--out", tmp_path / "out"), told)


def test_a_model_of_images_is_refused_in_a_suite_of_text(tmp_path):
    content = SUITE.replace('[images]\nspec = "digits"\n', "").replace("probes = [", "# probes = [")
    (tmp_path / "s.toml").write_text(content)
    refused(run("run", tmp_path / "s.toml", "--out", tmp_path / "out"), "sees images, and the suite has no [images]")
