"""Which part of an encoder is trained; what is not is left as it is."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from nested_ats import EncoderError, load_model, save_model
from nested_ats.networks.trainable import batch_statistics, freeze

VIT = {
    "name": "timm/vit_tiny_patch16_224",
    "weights": "random",
    "img_size": 32,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 2,
}


class TestTrainable:
    def test_frozen_whole(self, strangers, build, image):
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
    def test_the_last_stages_are_trained(self, encoder, n, trained, build, image):
        model = build(encoder=encoder, trainable=n)
        model([image()], torch.tensor([1])).logits.sum().backward()
        got = {".".join(k.split(".")[:2]) for k, p in model.encoder.named_parameters() if p.grad is not None}
        assert got == trained
        assert not model.encoder.layers[0].training
        assert model.encoder.layers[-1].training
        model.eval().train()
        assert not model.encoder.layers[0].training

    def test_a_stage_of_one_block_is_that_block(self, strangers):
        """The ResNets of timm have such a Sequential of a single block of several layers, inside a wrapper."""
        block = nn.Sequential(strangers.Small(in_channels=3))
        wrapped = nn.Sequential(nn.ModuleDict({"stem": nn.Conv2d(3, 3, 1), "stage": block, "norm": nn.Identity()}))
        frozen = freeze(wrapped, 1)
        assert [p.requires_grad for p in wrapped.parameters()] == [False] * 2 + [True] * 4
        assert frozen == [wrapped[0]["stem"], block[0].norm]

    def test_forward_is_the_same_however_much_is_trained(self, build, image):
        keys = torch.tensor([4])
        outputs = [build(encoder="resnet", trainable=t)([image()], keys).logits for t in ("all", "none", 2)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])

    @pytest.mark.parametrize(
        "value", ["some", 0, -1, True, {}, {"lora": 0}, {"lora": True}, {"rank": 4}, {"lora": 4, "alpha": 8}]
    )
    def test_other_values_are_refused(self, value, config):
        with pytest.raises(ValueError, match="trainable"):
            config(trainable=value)

    def test_more_stages_than_there_are(self, build):
        with pytest.raises(EncoderError, match="has 3 stages"):
            build(trainable=4)

    @pytest.mark.parametrize("trainable", ["none", 1])
    def test_a_training_step_leaves_the_frozen_parts_as_they_are(self, strangers, trainable, build, image):
        """Two stages, each with batch statistics; with 1 the last is trained, and its statistics stay."""
        strangers.Two = lambda in_channels: nn.Sequential(
            nn.Sequential(nn.Conv2d(in_channels, 6, 5), nn.BatchNorm2d(6), nn.Dropout(0.5)),
            strangers.Small(in_channels=6),
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
        assert not any(name.startswith("encoder.0") or "running" in name or "num_batches" in name for name in changed)
        frozen = model.encoder if trainable == "none" else model.encoder[0]
        assert all(p.grad is None for p in frozen.parameters())

    @pytest.mark.parametrize(("trainable", "layers"), [("all", 2), ("none", 0), (1, 0), (2, 0)])
    def test_layers_that_normalise_by_the_batch(self, strangers, trainable, layers, build):
        strangers.Two = lambda in_channels: nn.Sequential(
            nn.Sequential(nn.Conv2d(in_channels, 6, 5), nn.BatchNorm2d(6)), strangers.Small(in_channels=6)
        )
        assert len(batch_statistics(build(encoder="strangers:Two", trainable=trainable).eval().train())) == layers

    def test_a_patch_has_one_feature_whatever_it_is_batched_with_where_the_last_stages_are_trained(self, build):
        model = build(encoder="mobilenet_v2", trainable=2, patch_size=32).train()
        patches = torch.rand(4, 3, 32, 32)
        torch.testing.assert_close(model.encoder(patches)[:1], model.encoder(patches[:1]))


class TestLora:
    """Low-rank matrices beside the attention of a transformer, by peft."""

    @pytest.fixture(autouse=True)
    def libraries(self, timm, transformers):
        """Peft imports transformers."""

    def test_what_is_trained_and_what_is_not(self, tmp_path, build, image):
        model = build(encoder=VIT, patch_size=32, trainable={"lora": 3})
        plain = build(encoder=VIT, patch_size=32, trainable="none")
        trained = [name for name, p in model.encoder.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 2 * 2  # two blocks, qkv and proj, A and B
        assert all("lora_" in name and ".attn." in name for name in trained)
        assert {min(p.shape) for p in model.encoder.parameters() if p.requires_grad} == {3}
        patches = torch.rand(2, 3, 32, 32)
        with torch.no_grad():  # B begins at zero: nothing is changed at first
            weights = {name.replace(".base_layer", ""): value for name, value in model.encoder.state_dict().items()}
            plain.encoder.load_state_dict({k: v for k, v in weights.items() if "lora_" not in k})
            assert torch.equal(model.encoder(patches), plain.encoder(patches))

        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()
        for key in range(2):
            model([image(), image(height=50)], torch.tensor([key, 5])).logits.square().sum().backward()
            optimizer.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
        assert {name for name in changed if name.startswith("encoder.")} == {f"encoder.{name}" for name in trained}

        save_model(tmp_path / "m", model, classes=["a", "b"])
        loaded, _ = load_model(tmp_path / "m")
        keys = torch.tensor([3])
        assert loaded.config.trainable == {"lora": 3}
        assert torch.equal(loaded.eval()([image()], keys).logits, model.eval()([image()], keys).logits)

    def test_an_encoder_of_transformers(self, build, image):
        fields = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
        encoder = {
            "name": "transformers",
            "weights": "random",
            "architecture": {"model_type": "dinov2", "patch_size": 8, **fields},
        }
        model = build(encoder=encoder, patch_size=32, trainable={"lora": 2}).train()
        model([image()], torch.tensor([1])).logits.square().sum().backward()
        trained = {name for name, p in model.encoder.named_parameters() if p.grad is not None}
        assert len(trained) == 2 * 4 * 2  # two blocks; queries, keys, values and output; A and B

    def test_an_encoder_without_attention(self, build):
        with pytest.raises(EncoderError, match="attention of transformers"):
            build(trainable={"lora": 2})

    def test_without_peft(self, monkeypatch, build):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(EncoderError, match=r"pip install peft, or nested-ats\[lora\]"):
            build(encoder=VIT, patch_size=32, trainable={"lora": 2})
