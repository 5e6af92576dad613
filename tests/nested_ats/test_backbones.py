"""Encoders of timm and transformers, the real ones: from files of this machine, and never from anywhere else."""

from __future__ import annotations

import json
import socket
import sys

import pytest
import torch
from safetensors.torch import save_file

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
from nested_ats.models.kinds import bring_up_to_date
from nested_ats.networks.encoders import build_encoder

LEVELS = (LevelConfig(downsample=4, samples=3, stride=4),)
VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
TINY = {
    "model_type": "dinov2",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def build(encoder, in_channels: int = 3, **options) -> NestedATS:
    torch.manual_seed(0)
    config = ModelConfig(**{"levels": LEVELS, "patch_size": 32, "encoder": encoder, **options})
    return NestedATS(config, in_channels=in_channels, classes=2).eval()


def answer(model) -> torch.Tensor:
    pixels = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(1))
    return model.eval()([ArrayImage(pixels, levels=3)], torch.tensor([1])).logits


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))


@pytest.fixture
def vit(timm):
    torch.manual_seed(5)
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT).eval()


@pytest.fixture
def tiny(transformers):
    torch.manual_seed(5)
    fields = {key: value for key, value in TINY.items() if key != "model_type"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**fields)).eval()


def saved_and_loaded(model, tmp_path):
    save_model(tmp_path / "trained", model, classes=["a", "b"])
    return load_model(tmp_path / "trained")[0]


class TestTimm:
    def test_weights_of_a_file(self, vit, tmp_path):
        """Without the classifier; and a trained model is whole in its folder: the file is not asked for again."""
        save_file(vit.state_dict(), tmp_path / "w.safetensors")
        model = build({"name": "timm/vit_tiny_patch16_224", "weights": str(tmp_path / "w.safetensors"), **VIT})
        patches = torch.rand(2, 3, 32, 32)
        right = vit.forward_head(vit.forward_features(patches), pre_logits=True)
        torch.testing.assert_close(model.encoder(patches), right)
        assert model.features == 24
        right = answer(model)
        (tmp_path / "w.safetensors").unlink()
        loaded = saved_and_loaded(model, tmp_path)
        torch.testing.assert_close(answer(loaded), right)
        assert loaded.config == model.config

    @pytest.mark.parametrize("nested", [None, "state_dict", "model"])
    @pytest.mark.parametrize("old", [False, True])
    def test_pickled_weights(self, vit, tmp_path, nested, old):
        """Foundation models of pathology come with such files; a folder of the hub works too."""
        path = tmp_path / "the weights" / "pytorch_model.bin"
        path.parent.mkdir()
        weights = vit.state_dict()
        torch.save({nested: weights} if nested else weights, path, _use_new_zipfile_serialization=not old)
        for place in (path, path.parent):
            model = build({"name": "timm/vit_tiny_patch16_224", "weights": str(place), **VIT})
            assert torch.equal(model.encoder.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)

    def test_of_a_pickle_nothing_but_tensors_is_read(self, vit, tmp_path):
        encoder = {"name": "timm/vit_tiny_patch16_224", "weights": str(tmp_path / "w.bin"), **VIT}
        torch.save({"state_dict": vit.state_dict(), "run": slice(1)}, tmp_path / "w.bin")
        with pytest.raises(ModelFileError, match="holds more than weights"):
            build(encoder)
        torch.save([1, 2], tmp_path / "w.bin")
        with pytest.raises(ModelFileError, match="no state of a network"):
            build(encoder)

    def test_the_cache_is_looked_into(self, timm, vit, hub):
        encoder = {"name": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", **VIT}
        with pytest.raises(EncoderError, match=r"`hf download timm/vit_tiny_patch16_224\.augreg_in21k_ft_in1k`"):
            build(encoder)
        save_file(vit.state_dict(), hub("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors"))
        assert torch.equal(build(encoder).encoder.cls_token, vit.cls_token)
        # The name without a tag means the weights that timm would take; the channels are normalised as theirs.
        model = build({"name": "timm/vit_tiny_patch16_224", **VIT})
        assert torch.equal(model.encoder.cls_token, vit.cls_token)
        assert (model.config.mean, model.config.std) == ((0.5,) * 3, (0.5,) * 3)

    def test_weights_in_parts(self, vit, tmp_path):
        weights = list(vit.state_dict().items())
        save_file(dict(weights[:9]), tmp_path / "model-00001-of-00002.safetensors")
        save_file(dict(weights[9:]), tmp_path / "model-00002-of-00002.safetensors")
        model = build({"name": "timm/vit_tiny_patch16_224", "weights": tmp_path, **VIT})
        assert torch.equal(model.encoder.norm.weight, vit.norm.weight)

    def test_weights_that_do_not_fit(self, vit, tmp_path):
        encoder = {"name": "timm/vit_tiny_patch16_224", "weights": str(tmp_path / "w.safetensors"), **VIT}
        with pytest.raises(ModelFileError, match=r"w\.safetensors: no such file"):
            build(encoder)
        with pytest.raises(ModelFileError, match=r"holds no model\.safetensors or pytorch_model\.bin"):
            build({**encoder, "weights": str(tmp_path)})
        save_file({"norm.bias": torch.zeros(24)}, tmp_path / "w.safetensors")
        with pytest.raises(EncoderError, match="lacks"):
            build(encoder)
        save_file(vit.state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(EncoderError, match="do not fit"):
            build({**encoder, "embed_dim": 36})

    @pytest.mark.parametrize(
        "encoder",
        [
            "timm/hf-hub:a/b",
            "timm/local-dir:/x",
            "timm/resnet19",
            {"name": "timm/test_vit", "weights": "random", "pretrained_cfg": {}},
            "timm/",
        ],
    )
    def test_what_would_download_is_refused(self, timm, hub, encoder):
        with pytest.raises(
            EncoderError, match=r"timm has no architecture|timm/test_vit cannot be built .*nothing is downloaded"
        ):
            build(encoder)

    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
    def test_random_weights(self, timm, name):
        options = {"dynamic_img_size": True} if name == "test_vit" else {}
        model = build({"name": f"timm/{name}", "weights": "random", **options}, in_channels=3)
        assert answer(model).isfinite().all()


class TestTransformers:
    def test_weights_of_a_folder(self, tiny, tmp_path):
        """A trained model is loaded without the folder, since its description has the architecture."""
        tiny.save_pretrained(tmp_path / "here")
        (tmp_path / "here" / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
        )
        model = build({"name": "transformers", "weights": str(tmp_path / "here")})
        patches = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(model.encoder(patches), tiny(pixel_values=patches).pooler_output)
        assert (model.config.mean, model.config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        right = answer(model)
        (tmp_path / "here").rename(tmp_path / "gone")
        loaded = saved_and_loaded(model, tmp_path)
        torch.testing.assert_close(answer(loaded), right)
        assert loaded.config == model.config
        assert loaded.config.encoder["architecture"]["hidden_size"] == 24

    @pytest.mark.parametrize("pickled", [False, True])
    def test_the_cache_is_looked_into(self, tiny, hub, pickled):
        with pytest.raises(EncoderError, match=r"https://huggingface\.co/owner/name, run `hf download owner/name`"):
            build("transformers/owner/name")
        weights = tiny.state_dict()
        if pickled:
            torch.save(weights, hub("owner/name", "pytorch_model.bin"))
        else:
            save_file(weights, hub("owner/name", "model.safetensors"))
        hub("owner/name", "config.json").write_text(json.dumps({**TINY, "auto_map": {"AutoModel": "evil.Model"}}))
        model = build("transformers/owner/name")
        assert torch.equal(model.encoder.backbone.layernorm.weight, tiny.layernorm.weight)
        patches = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(model.encoder(patches), tiny(pixel_values=patches).pooler_output)
        assert "auto_map" not in model.config.encoder["architecture"]

    def test_half_precision_becomes_single(self, tiny, tmp_path):
        tiny.half().save_pretrained(tmp_path)
        model = build({"name": "transformers", "weights": str(tmp_path)})
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_a_pooling_layer_that_the_weights_lack(self, transformers, tmp_path):
        """transformers would fill it up with random weights."""
        fields = {key: value for key, value in TINY.items() if key != "model_type"}
        vit = transformers.ViTModel(transformers.ViTConfig(**fields, intermediate_size=48), add_pooling_layer=False)
        vit.eval().save_pretrained(tmp_path)
        encoder = {"name": "transformers", "weights": str(tmp_path)}
        with pytest.raises(EncoderError, match=r"lacks 2 weights.*pooler.*add_pooling_layer"):
            build(encoder)
        model = build({**encoder, "add_pooling_layer": False})
        patches = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(model.encoder(patches), vit(pixel_values=patches).last_hidden_state[:, 0])
        (tmp_path / "model.safetensors").unlink()
        torch.testing.assert_close(answer(saved_and_loaded(model, tmp_path)), answer(model))

    def test_a_map_is_averaged(self, transformers, tmp_path):
        net = transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
        )
        net.save_pretrained(tmp_path)
        model = build({"name": "transformers", "weights": str(tmp_path)})
        assert model.features == 12
        assert answer(model).isfinite().all()

    def test_what_cannot_be_built(self, tiny, transformers, tmp_path):
        with pytest.raises(EncoderError, match="the weights of transformers are not on this machine"):
            build("transformers")
        with pytest.raises(EncoderError, match=r"no folder with a config\.json"):
            build({"name": "transformers", "weights": str(tmp_path)})
        tiny.save_pretrained(tmp_path)
        with pytest.raises(EncoderError, match="made for 3 channels"):
            build({"name": "transformers", "weights": str(tmp_path)}, in_channels=2)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
        with pytest.raises(EncoderError, match="transformers cannot build its model"):
            build({"name": "transformers", "weights": str(tmp_path)})
        (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 36}))
        with pytest.raises(EncoderError, match=str(tmp_path)):
            build({"name": "transformers", "weights": str(tmp_path)})

    def test_architecture_alone(self, transformers):
        model = build({"name": "transformers", "weights": "random", "architecture": TINY})
        assert model.features == 24
        with pytest.raises(EncoderError, match="needs its architecture"):
            build({"name": "transformers", "weights": "random"})


def test_features_have_one_name_wherever_the_weights_came_from(tiny, tmp_path):
    """A prediction, which knows only the model's folder, must find the features that a training has kept."""

    def kept_as(model) -> str | None:
        return model._encoder_name(model.encoder, torch.device("cpu"))

    tiny.save_pretrained(tmp_path / "here")
    model = build({"name": "transformers", "weights": str(tmp_path / "here")}, trainable="none")
    assert kept_as(model) == kept_as(saved_and_loaded(model, tmp_path))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = build({"name": "transformers", "weights": str(tmp_path / "there")}, trainable="none")
    assert kept_as(model) == kept_as(moved)
    with torch.no_grad():
        moved.encoder.backbone.layernorm.bias += 1e-6
    assert kept_as(model) != kept_as(moved)


@pytest.mark.parametrize("name", ["timm/resnet18", "transformers/a/b", "uni", "phikon"])
def test_a_missing_library_is_named_with_its_installation(monkeypatch, name):
    library = {"uni": "timm", "phikon": "transformers"}.get(name, name.partition("/")[0])
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EncoderError, match=rf"pip install {library}, or nested-ats\[{library}\]"):
        build(name, patch_size=224)


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("nested_ats.networks.backbones.importlib.import_module", fail)
    with pytest.raises(EncoderError, match=r"torchvision::nms.*a torchvision that belongs to this torch: "):
        build("timm/resnet18")


class TestModelsOfBefore:
    """Their encoder's options stood in ``encoder_options``, and were called otherwise."""

    def description(self, folder, **entries) -> None:
        said = json.loads((folder / "config.json").read_text())
        del said["sha256"]
        said |= {"classes": said.pop("target")["classes"], "format": "nested-ats/1", "model": said["model"] | entries}
        (folder / "config.json").write_text(json.dumps(said))

    def test_timm(self, timm, tmp_path):
        model = build({"name": "timm/vit_tiny_patch16_224", "weights": "random", **VIT})
        save_model(tmp_path / "m", model, classes=["a", "b"])
        options = {"name": "vit_tiny_patch16_224", "checkpoint": "gone.safetensors", **VIT}
        self.description(tmp_path / "m", encoder="timm", encoder_options=options, attention="residual", scale=8.0)
        loaded, _ = load_model(tmp_path / "m")
        torch.testing.assert_close(answer(loaded), answer(model))
        weights = {"weights": "gone.safetensors"}
        assert loaded.config.encoder == {"name": "timm/vit_tiny_patch16_224", **weights, **VIT}

    def test_transformers(self, tiny, tmp_path):
        """The folder that they named is read as it was then; where it is gone, that is said."""
        tiny.save_pretrained(tmp_path / "here")
        model = build({"name": "transformers", "weights": str(tmp_path / "here")})
        save_model(tmp_path / "m", model, classes=["a", "b"])
        options = {"path": str(tmp_path / "here")}
        self.description(
            tmp_path / "m", encoder="transformers", encoder_options=options, attention="residual", scale=8.0
        )
        loaded, _ = load_model(tmp_path / "m")
        torch.testing.assert_close(answer(loaded), answer(model))
        assert loaded.config == model.config  # and saved again it is whole
        (tmp_path / "here").rename(tmp_path / "gone")
        with pytest.raises(EncoderError, match=r"here: no folder with a config\.json"):
            load_model(tmp_path / "m")

    @pytest.mark.parametrize(
        ("before", "now"),
        [
            ({"encoder_options": {}}, {}),
            ({"baseline": "none"}, {}),
            ({"encoder": "ilse", "encoder_options": {"features": 9}}, {"encoder": {"name": "ilse", "features": 9}}),
            (
                {"kind": "cnn", "encoder_options": {"stem": 3}},
                {"kind": "cnn", "encoder": {"name": "resnet16", "stem": 3}},
            ),
            (
                {"encoder": "timm", "encoder_options": {"name": "resnet18"}},
                {"encoder": {"name": "timm/resnet18", "weights": "random"}},
            ),
            (
                {"encoder": "mobilenet_v2", "encoder_options": {"weights": "w.pth"}},
                {"encoder": {"name": "mobilenet_v2", "weights": "w.pth"}},
            ),
        ],
    )
    def test_as_they_are_written_now(self, before, now):
        assert bring_up_to_date(before) == now

    def test_what_is_gone_says_so(self):
        with pytest.raises(ValueError, match="^baseline: .* leave it out"):
            bring_up_to_date({"baseline": "constant"})


class TestMobileNet:
    @pytest.fixture
    def weights(self, data):
        return str(data / "weights" / "mobilenet_v2-b0353104.pth")

    @pytest.mark.data
    def test_the_real_weights(self, torchvision, weights, tmp_path):
        """Torchvision's give the features of torchvision's network, of pixels normalised as ImageNet's."""
        model = build({"name": "mobilenet_v2", "weights": weights}, trainable="none", patch_size=64)
        assert model.features == 1280
        assert model.config.mean == (0.485, 0.456, 0.406)
        assert model.config.std == (0.229, 0.224, 0.225)
        theirs = torchvision.models.mobilenet_v2().eval()
        theirs.load_state_dict(torch.load(weights))
        patches = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model.encoder(patches), theirs.features(patches).mean((-2, -1)))
        torch.testing.assert_close(answer(saved_and_loaded(model, tmp_path)), answer(model))
        random = build("mobilenet_v2", trainable="none", patch_size=64)
        assert random.config.mean == 0.5
        assert not torch.allclose(random.encoder.features[0][0].weight, model.encoder.features[0][0].weight)

    @pytest.mark.data
    def test_values_of_ones_own_come_first(self, weights):
        model = build({"name": "mobilenet_v2", "weights": weights}, mean=0.7, patch_size=64)
        assert (model.config.mean, model.config.std) == (0.7, (0.229, 0.224, 0.225))


def test_two_channels_are_not_normalised_by_three(timm):
    built = build_encoder(
        {"name": "timm/test_resnet", "weights": "random"}, in_channels=2, patch_size=32, pretrained=False
    )
    assert built.mean is built.std is None
