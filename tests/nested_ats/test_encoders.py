"""Encoders of ours and by import path; and told where they look."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nested_ats import (
    ArrayImage,
    EncoderError,
    ModelFileError,
    load_model,
    save_model,
)
from nested_ats.networks.builtin import ENCODERS
from nested_ats.networks.encoders import build_encoder


def _with_features(module, features):
    module.features = features
    return module


@pytest.fixture(autouse=True)
def more_strangers(strangers):
    """Some that are no encoders."""
    strangers.number = 3
    strangers.not_a_module = lambda **_: object()
    strangers.a_map = lambda in_channels: nn.Conv2d(in_channels, 4, 3)
    strangers.lacking = lambda in_channels: {}["weights"]
    strangers.boasting = lambda in_channels: _with_features(strangers.Small(in_channels=in_channels, width=7), 5)
    strangers.picky = lambda in_channels: nn.Sequential(nn.Flatten(), nn.Linear(10, 4))


@pytest.mark.parametrize("name", [name for name, each in ENCODERS.items() if not each.raw])  # of pixels
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_ours_take_any_number_of_channels(name, channels, build, image):
    model = build(channels, encoder=name, patch_size=max(ENCODERS[name].smallest_patch, 28))
    output = model([image(channels)], torch.tensor([1]))
    assert output.logits.shape == (1, 2)
    assert output.features.shape == (1, model.features)
    output.logits.sum().backward()
    for parameter in model.encoder.parameters():
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "convolutions", "shortcuts", "widths"),
    [("resnet", 7, 2, [32, 64, 128]), ("resnet8", 7, 3, [32]), ("resnet16", 15, 3, [32, 64, 128, 256])],
)
def test_resnets_have_the_layers_that_they_are_named_after(name, convolutions, shortcuts, widths):
    """Counted as the field does: convolutions on the longest path, and the head."""
    encoder, features, *_ = build_encoder(name, in_channels=3, channels=32, patch_size=100)
    kernels = [layer.kernel_size[0] for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert sum(kernel > 1 for kernel in kernels) == convolutions
    assert sum(kernel == 1 for kernel in kernels) == shortcuts
    found = [layer.out_channels for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert list(dict.fromkeys(found)) == widths
    assert features == widths[-1]
    if name == "resnet8":  # H.3 and the authors' code: strides 1, 2, 2, 2
        shape = encoder.layers[:-2](torch.zeros(1, 3, 104, 104)).shape
        assert shape == (1, 32, 13, 13)


def test_ilse_is_the_published_network():
    """Their table for colon cancer, in its order, on the same weights; the last two layers are those of Deep MIL."""
    encoder, features, *_ = build_encoder({"name": "ilse", "dropout": 0.5}, in_channels=3, patch_size=27)
    assert features == 512
    mine = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    theirs = nn.Sequential(
        nn.Conv2d(3, 36, 4, stride=1, padding=0), nn.ReLU(), nn.MaxPool2d(2, 2),
        nn.Conv2d(36, 48, 3, stride=1, padding=0), nn.ReLU(), nn.MaxPool2d(2, 2),
        nn.Flatten(), nn.LazyLinear(512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5),
    )  # fmt: skip
    patches = torch.rand(2, 3, 27, 27, generator=torch.Generator().manual_seed(0))
    theirs(patches)
    for layer, other in zip(mine, [each for each in theirs if hasattr(each, "weight")], strict=True):
        other.load_state_dict(layer.state_dict())
    outputs = []
    for network in (encoder, theirs):
        torch.manual_seed(7)
        outputs.append(network.train()(patches))
    torch.testing.assert_close(outputs[0], outputs[1])
    smaller, width, *_ = build_encoder({"name": "ilse", "features": 64}, in_channels=1, patch_size=40)
    assert width == 64
    assert smaller(torch.zeros(2, 1, 40, 40)).shape == (2, 64)


def test_unknown_options_are_refused(build):
    """The message does not name our function."""
    with pytest.raises(EncoderError, match=r"encoder: lenet cannot be built with \{'depth': 3\}: got an") as caught:
        build(encoder={"name": "lenet", "depth": 3})
    assert "()" not in str(caught.value)


def test_a_mapping_of_a_name_alone_is_that_name(config):
    assert config(encoder={"name": "resnet"}) == config(encoder="resnet")
    assert config(encoder={"name": "lenet", "weights": Path("w")}).encoder == {"name": "lenet", "weights": "w"}


@pytest.mark.parametrize(
    "encoder", [{}, {"weights": "w"}, {"name": 3}, {"name": "lenet", "weights": 3}, {"name": "lenet", 3: 4}, None]
)
def test_what_names_no_encoder_is_refused(encoder, config):
    with pytest.raises(ValueError, match="^encoder: "):
        config(encoder=encoder)


def test_weights_of_ones_own(tmp_path, build):
    """It works for our own encoders and imported ones; a trained model does not need the file again."""
    source = build(encoder="resnet")
    torch.save(source.encoder.state_dict(), tmp_path / "w.pth")
    model = build(encoder={"name": "resnet", "weights": str(tmp_path / "w.pth")})
    assert torch.equal(model.encoder.layers[0].weight, source.encoder.layers[0].weight)
    save_model(tmp_path / "m", model, classes=["a", "b"])
    (tmp_path / "w.pth").unlink()
    loaded, _ = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert torch.equal(loaded.encoder.layers[0].weight, source.encoder.layers[0].weight)
    with pytest.raises(ModelFileError, match=r"w\.pth: no such file"):
        build(encoder={"name": "resnet", "weights": str(tmp_path / "w.pth")})


class TestImportPath:
    def test_width_is_found_by_trial(self, strangers, build, image):
        model = build(4, encoder={"name": "strangers:Small", "width": 6})
        assert model.features == 6
        assert model.encoder.norm.num_batches_tracked == 0  # the trial taught it nothing
        assert model.encoder.training
        assert model([image(4)], torch.tensor([0])).features.shape == (1, 6)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("strangers:Missing", "cannot import"),
            ("no_such_package.module:factory", "cannot import"),
            ("strangers:number", "cannot be called"),
            ("strangers:not_a_module", r"not a torch\.nn\.Module"),
            ("strangers:a_map", r"not to \(2, features\)"),
            ("strangers:lacking", r"cannot be built with \{\}: 'weights'"),
            ("strangers:boasting", "says that it has 5 features, and gives 7"),
            ("strangers:picky", r"does not take patches of shape \(2, 3, 27, 27\)"),
        ],
    )
    def test_what_is_no_encoder_is_refused(self, strangers, name, message, build):
        with pytest.raises(EncoderError, match=message):
            build(encoder=name)

    @pytest.mark.parametrize("name", ["vgg", "UNI", "timm", "a b:c", "os:", ":system", "../x:y", ""])
    def test_names_of_another_form_are_refused(self, name, config):
        with pytest.raises(ValueError, match="encoder: must be one of"):
            config(encoder=name)

    def test_weights_are_read_here(self, strangers, tmp_path, build):
        """The factory makes the network; it is not told of them."""
        torch.save(build(encoder="strangers:Small").encoder.state_dict(), tmp_path / "w.pth")
        torch.manual_seed(9)
        model = build(encoder={"name": "strangers:Small", "weights": str(tmp_path / "w.pth")})
        assert torch.equal(model.encoder.norm.weight, torch.load(tmp_path / "w.pth")["norm.weight"])

    def test_a_checkpoint_imports_nothing_unless_trusted(self, strangers, tmp_path, monkeypatch, build, image):
        model = build(encoder="strangers:Small").eval()
        save_model(tmp_path / "m", model, classes=["a", "b"])
        monkeypatch.delitem(sys.modules, "strangers")
        (tmp_path / "strangers.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModelFileError, match="trust_encoder=True"):
            load_model(tmp_path / "m")
        monkeypatch.setitem(sys.modules, "strangers", strangers)
        loaded, _ = load_model(tmp_path / "m", trust_encoder=True)
        keys = torch.tensor([3])
        assert torch.equal(loaded.eval()([image()], keys).logits, model([image()], keys).logits)


class TestLocation:
    def test_the_feature_knows_where_its_patch_lies(self, build):
        flat = ArrayImage(torch.full((3, 60, 80), 0.5), levels=3)
        centers = torch.tensor([[[0.0, 0.0], [30.0, 40.0], [60.0, 80.0]]], dtype=torch.float64)
        plain, located = build(), build(location=True)
        one, two = plain.encode([flat], centers)[0, 1:2], located.encode([flat], centers)[0]
        assert torch.equal(one, plain.encode([flat], centers)[0, 1:2])
        torch.testing.assert_close(two.norm(dim=-1), torch.ones(3))
        with torch.no_grad():  # read the two numbers themselves
            located.locate.weight.zero_()
            located.locate.bias.zero_()
            located.locate.weight[0, -2] = located.locate.weight[1, -1] = 1.0
            located.locate.bias[2] = 1.0
        corner, middle, other = located.encode([flat], centers)[0]
        assert middle[:3].tolist() == [0, 0, 1]
        torch.testing.assert_close(corner[:3], torch.tensor([-1.0, -1.0, 1.0]) / 3**0.5)
        torch.testing.assert_close(other[:3], torch.ones(3) / 3**0.5)

    def test_files_and_batches(self, tmp_path, build, image):
        model = build(location=True, encoder={"name": "ilse", "features": 16}, trainable=1)
        save_model(tmp_path / "m", model, classes=["a", "b"])
        loaded, _ = load_model(tmp_path / "m")
        assert loaded.config == model.config
        images, keys = [image(), image(height=33, width=41)], torch.tensor([1, 2])
        together = loaded(images, keys)
        assert torch.equal(together.logits, model(images, keys).logits)
        torch.testing.assert_close(together.logits[1:], model(images[1:], keys[1:]).logits, atol=1e-5, rtol=1e-5)
