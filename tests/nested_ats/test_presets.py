"""Published encoders: what we build is what their authors' cards describe, down to the number of parameters."""

from __future__ import annotations

import re

import pytest
import torch

from nested_ats import (
    ArrayImage,
    CNNConfig,
    EncoderError,
    LevelConfig,
    ModelConfig,
    NestedATS,
    load_model,
    save_model,
)
from nested_ats.networks.encoders import build_encoder
from nested_ats.networks.presets import PRESETS

# As published: in the cards, and as counted by others who have the weights.
PARAMETERS = {
    "uni": 303_350_784,
    "uni2-h": 681_394_176,
    "virchow": 631_229_184,
    "virchow2": 631_239_424,
    "h-optimus-0": 1_134_774_272,
    "h-optimus-1": 1_134_774_272,
    "prov-gigapath": 1_134_953_984,
    "phikon": 85_798_656,
    "phikon-v2": 303_351_808,
    "hibou-b": 85_741_056,
    "hibou-l": 303_659_264,
}
# Names and shapes of parameters that tell the architecture.
SHAPES = {
    "uni": {"blocks.23.ls1.gamma": (1024,), "pos_embed": (1, 197, 1024)},
    "uni2-h": {"reg_token": (1, 8, 1536), "pos_embed": (1, 256, 1536), "blocks.23.mlp.fc1.weight": (8192, 1536)},
    "virchow": {"backbone.blocks.31.mlp.fc2.weight": (1280, 3416), "backbone.pos_embed": (1, 257, 1280)},
    "virchow2": {"backbone.reg_token": (1, 4, 1280)},
    "h-optimus-0": {"reg_token": (1, 4, 1536), "pos_embed": (1, 256, 1536), "blocks.39.ls2.gamma": (1536,)},
    "prov-gigapath": {"patch_embed.proj.weight": (1536, 3, 16, 16), "pos_embed": (1, 197, 1536)},
    "hibou-b": {"backbone.embeddings.register_tokens": (1, 4, 768)},
    "kaiko-l14": {"pos_embed": (1, 1369, 1024), "reg_token": (1, 4, 1024)},
}
BUILT = [name for name, preset in PRESETS.items() if preset.library]
SMALLER = {
    "timm": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "transformers": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3},
}


@pytest.fixture(autouse=True)
def libraries(timm, transformers):
    """Both, for every test."""


def small(name: str, **entries) -> dict:
    """A shrunken copy of a preset."""
    return {"name": name, **SMALLER[PRESETS[name].library], **entries}


def build(encoder, in_channels=3, **options) -> NestedATS:
    torch.manual_seed(0)
    levels = (LevelConfig(downsample=8, samples=2, stride=4),)
    config = ModelConfig(**{"levels": levels, "patch_size": 224, "encoder": encoder, **options})
    return NestedATS(config, in_channels=in_channels, classes=2).eval()


def answer(model) -> torch.Tensor:
    pixels = torch.rand(3, 256, 300, generator=torch.Generator().manual_seed(1))
    return model.eval()([ArrayImage(pixels, levels=4)], torch.tensor([1])).logits


@pytest.mark.parametrize("name", BUILT)
def test_the_whole_architecture(name):
    with torch.device("meta"):
        built = build_encoder({"name": name, "weights": "random"}, in_channels=3, patch_size=224)
    state = built.module.state_dict()
    assert built.features == PRESETS[name].features
    if name in PARAMETERS:
        assert sum(value.numel() for value in built.module.parameters()) == PARAMETERS[name]
    for key, shape in SHAPES.get(name, {}).items():  # type: ignore[attr-defined]
        assert state[key].shape == shape
    assert (built.mean, built.std) == (PRESETS[name].mean, PRESETS[name].std)


@pytest.mark.parametrize("name", BUILT)
def test_a_small_copy_works_and_needs_its_weights_once(name, hub, tmp_path):
    """A download in the cache becomes a model that is loaded without it."""
    preset = PRESETS[name]
    with pytest.raises(EncoderError, match=f"hf download {preset.repository}"):
        build(small(name))
    torch.manual_seed(3)
    source = build_encoder(small(name, weights="random"), in_channels=3, patch_size=224).module
    weights = getattr(source, "backbone", source).state_dict()
    torch.save(weights, hub(preset.repository, "pytorch_model.bin"))
    model = build(small(name), trainable="none")
    assert torch.equal(next(iter(model.encoder.parameters())), next(iter(source.parameters())))
    assert (model.config.mean, model.config.std) == (preset.mean, preset.std)
    save_model(tmp_path / "m", model, classes=["a", "b"])
    hub(preset.repository, "pytorch_model.bin").unlink()
    loaded, _ = load_model(tmp_path / "m")
    assert loaded.config == model.config
    torch.testing.assert_close(answer(loaded), answer(model))
    assert answer(model).isfinite().all()


# From the names that transformers has now to those of the files that were published.
RENAMED = (
    (r"^layers\.", "encoder.layer."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.down_proj", "mlp.weights_out"),
)
VIT_RENAMED = ((r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"))


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "hibou-b", "hibou-l"])
def test_weights_with_the_names_of_the_published_files(name, tmp_path):
    source = build_encoder(small(name, weights="random"), in_channels=3, patch_size=224).module.eval()
    state = source.backbone.state_dict()
    for key in [key for key in state if "gate_proj" in key]:  # was one matrix with up_proj
        parts = [state.pop(key), state.pop(key.replace("gate", "up"))]
        state[key.replace("gate_proj", "weights_in")] = torch.cat(parts)
    for pattern, old in RENAMED + (VIT_RENAMED if name == "phikon" else ()):
        state = {re.sub(pattern, old, key): value for key, value in state.items()}
    assert ("encoder.layer.1.mlp.weights_in.bias" in state) == name.startswith("hibou")
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = build_encoder(small(name, weights=str(tmp_path)), in_channels=3, patch_size=224).module.eval()
    patches = torch.rand(2, 3, 224, 224)
    torch.testing.assert_close(found(patches), source(patches))


def test_the_feature_of_virchow2_is_its_class_token_and_the_mean_without_registers():
    encoder = build_encoder(small("virchow2", weights="random"), in_channels=3, patch_size=224).module.eval()
    patches = torch.rand(2, 3, 224, 224)
    tokens = encoder.backbone.forward_features(patches)
    assert tokens.shape == (2, 1 + 4 + 256, 48)
    torch.testing.assert_close(encoder(patches), torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], -1))


@pytest.mark.parametrize("name", [name for name in BUILT if PRESETS[name].step])
def test_position_embeddings_are_interpolated_where_the_card_allows(name):
    side = PRESETS[name].step * 16
    assert side != 224 or PRESETS[name].step == 14
    if side < 112:
        side = 112
    assert answer(build(small(name, weights="random"), patch_size=side)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "patch_size", "message"),
    [
        ("uni", 64, "uni takes patches of 224 pixels, or another multiple of 16 from 112 up, not 64"),
        ("uni", 230, "not 230"),
        ("h-optimus-0", 256, "h-optimus-0 takes patches of 224 pixels, not 256"),
        ("phikon", 112, "224 pixels"),
        ("conch", 224, "448 pixels"),
    ],
)
def test_patches_of_other_sizes_are_refused(name, patch_size, message):
    with pytest.raises(ValueError, match=f"^patch_size: .*{message}"):
        ModelConfig(levels=(LevelConfig(downsample=8, samples=2, stride=4),), patch_size=patch_size, encoder=name)


def test_whole_images_are_refused():
    with pytest.raises(ValueError, match="^encoder: uni takes patches, not whole images"):
        CNNConfig(encoder="uni")


def test_other_channels_are_refused():
    with pytest.raises(EncoderError, match="uni is made for 3 channels, the images have 4"):
        build({"name": "uni", "weights": "random"}, in_channels=4)


@pytest.mark.parametrize(
    ("name", "package", "size"), [("conch", "github.com/mahmoodlab/CONCH", 448), ("ctranspath", "ConvStem", 224)]
)
def test_what_needs_its_authors_package_says_which(name, package, size):
    with pytest.raises(
        EncoderError, match=rf"{package}.*package\.module:function.*patch_size: {size}, mean: \[0\.48"
    ):
        build(name, patch_size=size)


def test_missing_weights_say_what_to_do(hub):
    with pytest.raises(EncoderError) as caught:
        build("uni")
    for step in (
        "https://huggingface.co/MahmoodLab/UNI",
        "`hf download MahmoodLab/UNI`",
        "`hf auth login`",
        "model.encoder.weights",
    ):
        assert step in str(caught.value)


def test_the_cache_of_a_repository_named_in_small_letters(hub):
    """The code on UNI's card writes it so."""
    source = build_encoder(small("uni", weights="random"), in_channels=3, patch_size=224).module
    torch.save(source.state_dict(), hub("MahmoodLab/uni", "pytorch_model.bin"))
    assert torch.equal(build(small("uni")).encoder.pos_embed, source.pos_embed)


def test_every_preset_is_whole():
    for name, preset in PRESETS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert preset.page.startswith("https://")
        assert bool(preset.library) != bool(preset.needs)
        assert preset.takes(preset.pixels)
