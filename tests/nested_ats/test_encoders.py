"""Encoders: by name, by import path, from libraries that are not there; frozen, and told where they look.

timm and transformers are not installed where the tests run (timm needs torchvision): stand-ins take their place in
`sys.modules` and hold what our code relies on.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nested_ats import (
    ArrayImage,
    EncoderError,
    LevelConfig,
    ModelConfig,
    ModelFileError,
    NestedATS,
    load_model,
    save_model,
)
from nested_ats.encoders import ENCODERS, build_encoder, freeze

LEVELS = (LevelConfig(downsample=4, samples=3, stride=4),)


def config(**options) -> ModelConfig:
    return ModelConfig(**{"levels": LEVELS, "patch_size": 27, **options})


def build(in_channels: int = 3, **options) -> NestedATS:
    torch.manual_seed(0)
    return NestedATS(config(**options), in_channels=in_channels, classes=2)


def image(channels: int = 3, height: int = 60, width: int = 80) -> ArrayImage:
    return ArrayImage(torch.rand(channels, height, width, generator=torch.Generator().manual_seed(1)), levels=3)


class Small(nn.Module):
    """A stranger's encoder, without `.features`, with batch statistics."""

    def __init__(self, *, in_channels: int, width: int = 5) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, width, 3)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, patches):
        return self.norm(self.convolution(patches)).mean((-2, -1))


def _with_features(module, features):
    module.features = features
    return module


@pytest.fixture
def strangers(monkeypatch):
    """Module of encoders that can be imported as ``strangers``."""
    module = ModuleType("strangers")
    module.Small = Small
    module.number = 3
    module.not_a_module = lambda **_: object()
    module.a_map = lambda in_channels: nn.Conv2d(in_channels, 4, 3)
    module.lacking = lambda in_channels: {}["weights"]
    module.boasting = lambda in_channels: _with_features(Small(in_channels=in_channels, width=7), 5)
    module.picky = lambda in_channels: nn.Sequential(nn.Flatten(), nn.Linear(10, 4))
    monkeypatch.setitem(sys.modules, "strangers", module)
    return module


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_ours_take_any_number_of_channels(name, channels):
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
    encoder, features = build_encoder(name, in_channels=3, channels=32, patch_size=100, options={})
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
    encoder, features = build_encoder("ilse", in_channels=3, channels=32, patch_size=27, options={"dropout": 0.5})
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
    smaller, width = build_encoder("ilse", in_channels=1, channels=32, patch_size=40, options={"features": 64})
    assert width == 64
    assert smaller(torch.zeros(2, 1, 40, 40)).shape == (2, 64)


def test_unknown_options_are_refused():
    with pytest.raises(EncoderError, match=r"encoder_options: lenet .*depth"):
        build(encoder_options={"depth": 3})


class TestImportPath:
    def test_width_is_found_by_trial(self, strangers):
        model = build(4, encoder="strangers:Small", encoder_options={"width": 6})
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
    def test_what_is_no_encoder_is_refused(self, strangers, name, message):
        with pytest.raises(EncoderError, match=message):
            build(encoder=name)

    @pytest.mark.parametrize("name", ["vgg", "a b:c", "os:", ":system", "../x:y", ""])
    def test_names_of_another_form_are_refused(self, name):
        with pytest.raises(ValueError, match="encoder: must be one of"):
            config(encoder=name)

    def test_a_checkpoint_imports_nothing_unless_trusted(self, strangers, tmp_path, monkeypatch):
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


class TestLibraries:
    @pytest.fixture
    def timm(self, monkeypatch):
        module = ModuleType("timm")
        module.asked = []

        def create_model(name, *, pretrained, in_chans, num_classes, **options):
            module.asked.append((name, pretrained, in_chans, num_classes, options))
            return Small(in_channels=in_chans, width=7)

        module.create_model = create_model
        monkeypatch.setitem(sys.modules, "timm", module)
        return module

    def test_timm_reads_a_local_checkpoint_and_downloads_nothing(self, timm, tmp_path):
        source = Small(in_channels=3, width=7)
        weights = {**source.state_dict(), "fc.weight": torch.zeros(2)}  # the classifier's is not used
        save_file(weights, tmp_path / "w.safetensors")
        options = {"name": "resnet18", "checkpoint": str(tmp_path / "w.safetensors"), "drop_rate": 0.1}
        model = build(encoder="timm", encoder_options=options)
        assert timm.asked == [("resnet18", False, 3, 0, {"drop_rate": 0.1})]
        assert torch.equal(model.encoder.convolution.weight, source.convolution.weight)
        # A trained model is whole in its folder: the file it started from is not asked for again.
        save_model(tmp_path / "m", model, classes=["a", "b"])
        (tmp_path / "w.safetensors").unlink()
        loaded, _ = load_model(tmp_path / "m")
        assert torch.equal(loaded.encoder.convolution.weight, source.convolution.weight)

    @pytest.mark.parametrize("options", [{"name": "hf-hub:a/b"}, {"name": "x", "pretrained_cfg": {}}, {}])
    def test_timm_refuses_what_would_download(self, timm, options):
        with pytest.raises(EncoderError, match="encoder_options"):
            build(encoder="timm", encoder_options=options)
        assert not timm.asked

    def test_weights_that_do_not_fit(self, timm, tmp_path):
        options = {"name": "x", "checkpoint": str(tmp_path / "w.safetensors")}
        with pytest.raises(ModelFileError, match="no such file"):
            build(encoder="timm", encoder_options=options)
        save_file({"norm.bias": torch.zeros(7)}, tmp_path / "w.safetensors")
        with pytest.raises(EncoderError, match="lacks"):
            build(encoder="timm", encoder_options=options)
        save_file(Small(in_channels=1, width=7).state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(EncoderError, match="do not fit"):
            build(encoder="timm", encoder_options=options)

    @pytest.mark.parametrize(("name", "option"), [("timm", "name"), ("transformers", "path")])
    def test_what_an_encoder_cannot_do_without_is_named(self, name, option):
        with pytest.raises(
            EncoderError, match=rf"^encoder_options: {name} needs {option}, .*such as|^.*a local folder"
        ):
            build(encoder=name)

    def test_a_wrong_option_is_named_without_our_function(self, timm):
        for name, options in {"timm": {"name": "x", "in_channels": 3}, "lenet": {"depth": 3}}.items():
            with pytest.raises(EncoderError, match=r"cannot be built with \{.*\}: got (an|multiple)") as caught:
                build(encoder=name, encoder_options=options)
            assert "()" not in str(caught.value)

    @pytest.mark.parametrize("nested", [None, "state_dict", "model"])
    @pytest.mark.parametrize("old", [False, True])
    def test_pickled_weights_are_read(self, timm, tmp_path, nested, old):
        """As those that pathology's foundation models come with."""
        source, path = Small(in_channels=3, width=7), tmp_path / "the weights" / "pytorch_model.bin"
        path.parent.mkdir()
        weights = source.state_dict()
        torch.save({nested: weights} if nested else weights, path, _use_new_zipfile_serialization=not old)
        model = build(encoder="timm", encoder_options={"name": "vit", "checkpoint": str(path)})
        assert torch.equal(model.encoder.convolution.weight, source.convolution.weight)

    def test_of_a_pickle_nothing_but_tensors_is_read(self, timm, tmp_path):
        torch.save({"state_dict": Small(in_channels=3, width=7).state_dict(), "run": slice(1)}, tmp_path / "w.bin")
        with pytest.raises(ModelFileError, match="weights alone"):
            build(encoder="timm", encoder_options={"name": "vit", "checkpoint": str(tmp_path / "w.bin")})
        torch.save([1, 2], tmp_path / "w.bin")
        with pytest.raises(ModelFileError, match="no state of a network"):
            build(encoder="timm", encoder_options={"name": "vit", "checkpoint": str(tmp_path / "w.bin")})

    @pytest.mark.parametrize("name", ["timm", "transformers"])
    def test_a_missing_library_is_named_with_its_installation(self, monkeypatch, tmp_path, name):
        monkeypatch.setitem(sys.modules, name, None)
        (tmp_path / "config.json").write_text("{}")
        options = {"timm": {"name": "resnet18"}, "transformers": {"path": str(tmp_path)}}[name]
        with pytest.raises(EncoderError, match=f"pip install {name}"):
            build(encoder=name, encoder_options=options)

    @pytest.fixture
    def transformers(self, monkeypatch):
        module = ModuleType("transformers")
        module.asked = []

        class Backbone(Small):
            def __init__(self, settings):
                super().__init__(in_channels=settings.num_channels, width=7)
                self.output = settings.output

            def forward(self, pixel_values):
                pooled = super().forward(pixel_values)
                if self.output == "pooled":
                    return SimpleNamespace(pooler_output=pooled[..., None, None], last_hidden_state=None)
                hidden = torch.stack([pooled, pooled * 0], 1) if self.output == "tokens" else pooled[..., None, None]
                return SimpleNamespace(last_hidden_state=hidden)

        def read(path, **options):
            assert options == {"local_files_only": True, "trust_remote_code": False}
            with open(f"{path}/config.json") as file:
                return SimpleNamespace(**json.load(file))

        def weights(path, *, config, use_safetensors, output_loading_info, **options):
            assert use_safetensors
            assert output_loading_info
            assert options == {"local_files_only": True, "trust_remote_code": False}
            module.asked.append(path)
            missing = {"pooler.weight"} if config.output == "random" else set()
            return Backbone(config), {"missing_keys": missing}

        module.AutoConfig = SimpleNamespace(from_pretrained=read)
        module.AutoModel = SimpleNamespace(
            from_pretrained=weights, from_config=lambda config, trust_remote_code: Backbone(config)
        )
        monkeypatch.setitem(sys.modules, "transformers", module)
        return module

    @pytest.mark.parametrize("output", ["pooled", "tokens", "map"])
    def test_transformers_reads_a_local_folder(self, transformers, tmp_path, output):
        (tmp_path / "config.json").write_text(json.dumps({"num_channels": 3, "output": output}))
        model = build(encoder="transformers", encoder_options={"path": str(tmp_path)})
        assert model.features == 7
        save_model(tmp_path / "m", model, classes=["a", "b"])
        load_model(tmp_path / "m")
        assert transformers.asked == [str(tmp_path)]  # weights once, not on loading
        with pytest.raises(EncoderError, match="made for 3 channels"):
            build(2, encoder="transformers", encoder_options={"path": str(tmp_path)})
        with pytest.raises(EncoderError, match="nothing is downloaded"):
            build(encoder="transformers", encoder_options={"path": "google/vit"})

    def test_transformers_names_pickled_weights(self, transformers, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"num_channels": 3, "output": "pooled"}))
        torch.save({}, tmp_path / "pytorch_model.bin")
        options = {"path": str(tmp_path)}
        with pytest.raises(
            EncoderError, match=r"pytorch_model\.bin: .*convert it once and use .*/model\.safetensors"
        ):
            build(encoder="transformers", encoder_options=options)
        assert not transformers.asked
        save_file({}, tmp_path / "model.safetensors")
        build(encoder="transformers", encoder_options=options)

    def test_transformers_would_fill_up_with_random_weights(self, transformers, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"num_channels": 3, "output": "random"}))
        with pytest.raises(EncoderError, match=r"lacks 1 weights.*pooler\.weight.*add_pooling_layer"):
            build(encoder="transformers", encoder_options={"path": str(tmp_path)})


class TestTrainable:
    def test_frozen_whole(self, strangers):
        model = build(encoder="strangers:Small", trainable="none", location=True)
        model.train()
        assert model.training
        assert not model.encoder.training
        before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
        model([image()], torch.tensor([1])).logits.sum().backward()
        assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
        assert all(torch.equal(before[name], value) for name, value in model.encoder.state_dict().items())
        for part in (model.attention, model.locate, model.head):
            assert all(p.grad is not None for p in part.parameters())

    @pytest.mark.parametrize(
        ("encoder", "n", "trained"),
        [
            ("lenet", 1, {"layers.6"}),
            ("lenet", 2, {"layers.3", "layers.6"}),
            ("resnet", 1, {"layers.5"}),
            ("ilse", 2, {"layers.7", "layers.10"}),
        ],
    )
    def test_the_last_stages_are_trained(self, encoder, n, trained):
        model = build(encoder=encoder, trainable=n)
        model([image()], torch.tensor([1])).logits.sum().backward()
        got = {".".join(k.split(".")[:2]) for k, p in model.encoder.named_parameters() if p.grad is not None}
        assert got == trained
        assert not model.encoder.layers[0].training
        assert model.encoder.layers[-1].training
        model.eval().train()
        assert not model.encoder.layers[0].training

    def test_a_stage_of_one_block_is_that_block(self):
        """As in the ResNets of timm: a Sequential of a single block of several layers, inside a wrapper."""
        block = nn.Sequential(Small(in_channels=3))
        wrapped = nn.Sequential(nn.ModuleDict({"stem": nn.Conv2d(3, 3, 1), "stage": block, "norm": nn.Identity()}))
        frozen = freeze(wrapped, 1)
        assert [p.requires_grad for p in wrapped.parameters()] == [False] * 2 + [True] * 4
        assert frozen == [wrapped[0]["stem"]]

    def test_forward_is_the_same_however_much_is_trained(self):
        keys = torch.tensor([4])
        outputs = [build(encoder="resnet", trainable=t)([image()], keys).logits for t in ("all", "none", 2)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])

    @pytest.mark.parametrize("value", ["some", 0, -1, True])
    def test_other_values_are_refused(self, value):
        with pytest.raises(ValueError, match="trainable"):
            config(trainable=value)

    def test_more_stages_than_there_are(self):
        with pytest.raises(EncoderError, match="has 3 stages"):
            build(trainable=4)

    @pytest.mark.parametrize("trainable", ["none", 1])
    def test_a_training_step_leaves_the_frozen_parts_as_they_are(self, strangers, trainable):
        """Two stages, each with batch statistics; with 1 the last is trained, its statistics with it."""
        strangers.Two = lambda in_channels: nn.Sequential(
            nn.Sequential(nn.Conv2d(in_channels, 6, 5), nn.BatchNorm2d(6), nn.Dropout(0.5)), Small(in_channels=6)
        )
        model = build(encoder="strangers:Two", trainable=trainable)
        model.eval()
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for key in range(2):
            model([image(), image(height=33)], torch.tensor([key, 5])).logits.square().sum().backward()
            optimizer.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
        parts = {".".join(name.split(".")[:2]) for name in changed}
        assert {"head.weight", "head.bias", "attention.0"} == parts - {"encoder.1"}
        assert ("encoder.1" in parts) == (trainable == 1)
        assert not any(name.startswith("encoder.0") for name in changed)
        frozen = model.encoder if trainable == "none" else model.encoder[0]
        assert all(p.grad is None for p in frozen.parameters())


class TestLocation:
    def test_the_feature_knows_where_its_patch_lies(self):
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

    def test_files_and_batches(self, tmp_path):
        model = build(location=True, encoder="ilse", trainable=1, encoder_options={"features": 16})
        save_model(tmp_path / "m", model, classes=["a", "b"])
        loaded, _ = load_model(tmp_path / "m")
        assert loaded.config == model.config
        images, keys = [image(), image(height=33, width=41)], torch.tensor([1, 2])
        together = loaded(images, keys)
        assert torch.equal(together.logits, model(images, keys).logits)
        torch.testing.assert_close(together.logits[1:], model(images[1:], keys[1:]).logits, atol=1e-5, rtol=1e-5)
