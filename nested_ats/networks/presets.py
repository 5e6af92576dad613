"""Published encoders of histology by plain name: facts from their authors' model cards, and no weights.

A preset knows the library and the arguments that build the architecture, what its patches must look like, and where
its licence is accepted. Tests check the names and number of parameters and the width of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Colour = tuple[float, float, float]

IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
_HALF: Colour = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published encoder.

    Attributes
    ----------
    library
        ``timm`` or ``transformers``; empty where neither has the architecture, and `needs` says what to do.
    repository
        Repository on the Hugging Face hub.
    architecture
        Architecture of timm, or the ``model_type`` of transformers.
    options
        Arguments of the architecture.
    features
        D, the width of the features.
    pixels
        Side of the patches that it was made for.
    step
        Patches may have other sides that are multiples of this, from half of `pixels` up: the position embeddings
        are interpolated, as the card allows. 0: `pixels` alone.
    mpp
        Micrometres per pixel of the patches that it was trained on.
    mean, std
        Mean and spread of each channel, in [0, 1].
    pooling
        What becomes the feature: the class ``token``, or the ``token and mean`` of the patches' tokens.
    needs
        The package that builds it, and how; empty where `library` does.
    at
        Page of the licence, where it is not that of `repository`.
    """

    repository: str
    features: int
    library: Literal["timm", "transformers", ""] = "timm"
    architecture: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    pixels: int = 224
    step: int = 0
    mpp: tuple[float, ...] = (0.5,)
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    pooling: Literal["token", "token and mean"] = "token"
    needs: str = ""
    at: str = ""

    @property
    def page(self) -> str:
        """Where the licence is read and accepted."""
        return self.at or f"https://huggingface.co/{self.repository}"

    def takes(self, patch_size: int) -> bool:
        """Whether patches may have a side of this many pixels."""
        other = self.step and patch_size % self.step == 0 and 2 * patch_size >= self.pixels
        return patch_size == self.pixels or bool(other)


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
_VIRCHOW = {
    "img_size": 224,
    "init_values": 1e-5,
    "mlp_ratio": 5.3375,
    "global_pool": "",
    "dynamic_img_size": True,
    **_SWIGLU,
}
_OPTIMUS: dict[str, Any] = {
    "architecture": "vit_giant_patch14_reg4_dinov2",
    "options": {"img_size": 224, "init_values": 1e-5, "global_pool": "token", "dynamic_img_size": False},
    "features": 1536,
    "mean": (0.707223, 0.578729, 0.703617),
    "std": (0.211883, 0.230117, 0.177517),
}
_HIBOU: dict[str, Any] = {
    "library": "transformers",
    "architecture": "dinov2_with_registers",
    "step": 14,
    "mean": (0.7068, 0.5755, 0.722),
    "std": (0.195, 0.2316, 0.1816),
}
_DINOV2 = {"image_size": 224, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "qkv_bias": True}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}


def _kaiko(architecture: str, features: int, step: int, side: int = 224) -> Preset:
    return Preset(
        repository=f"1aurent/{architecture}.kaiko_ai_towards_large_pathology_fms",
        architecture=architecture,
        options={"img_size": side, "dynamic_img_size": True},
        features=features,
        step=step,
        mpp=(0.25, 0.5, 1.0, 2.0),
        mean=_HALF,
        std=_HALF,
    )


PRESETS: dict[str, Preset] = {
    "uni": Preset(
        repository="MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        options={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
        features=1024,
        step=16,
    ),
    "uni2-h": Preset(
        repository="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        options={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        features=1536,
        step=14,
    ),
    "virchow": Preset(
        repository="paige-ai/Virchow",
        architecture="vit_huge_patch14_224",
        options=_VIRCHOW,
        features=2560,
        step=14,
        pooling="token and mean",
    ),
    "virchow2": Preset(
        repository="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        options={**_VIRCHOW, "reg_tokens": 4},
        features=2560,
        step=14,
        mpp=(0.25, 0.5, 1.0, 2.0),
        pooling="token and mean",
    ),
    "h-optimus-0": Preset(repository="bioptimus/H-optimus-0", **_OPTIMUS),
    "h-optimus-1": Preset(repository="bioptimus/H-optimus-1", **_OPTIMUS),
    "prov-gigapath": Preset(
        repository="prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        options={
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
        },
        features=1536,
    ),
    "phikon": Preset(
        repository="owkin/phikon",
        library="transformers",
        architecture="vit",
        options={**_BASE, "intermediate_size": 3072, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-12},
        features=768,
    ),
    "phikon-v2": Preset(
        repository="owkin/phikon-v2",
        library="transformers",
        architecture="dinov2",
        options={**_LARGE, **_DINOV2, "patch_size": 16},
        features=1024,
        step=16,
    ),
    "hibou-b": Preset(
        repository="histai/hibou-b",
        options={**_BASE, **_DINOV2, "patch_size": 14, "num_register_tokens": 4, "use_swiglu_ffn": True},
        features=768,
        **_HIBOU,
    ),
    "hibou-l": Preset(
        repository="histai/hibou-L",
        options={**_LARGE, **_DINOV2, "patch_size": 14, "num_register_tokens": 4, "use_swiglu_ffn": True},
        features=1024,
        **_HIBOU,
    ),
    "kaiko-s16": _kaiko("vit_small_patch16_224", 384, 16),
    "kaiko-s8": _kaiko("vit_small_patch8_224", 384, 8),
    "kaiko-b16": _kaiko("vit_base_patch16_224", 768, 16),
    "kaiko-b8": _kaiko("vit_base_patch8_224", 768, 8),
    "kaiko-l14": _kaiko("vit_large_patch14_reg4_dinov2", 1024, 14, side=518),
    "conch": Preset(
        repository="MahmoodLab/CONCH",
        library="",
        features=512,
        pixels=448,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        needs="its authors' package: pip install git+https://github.com/mahmoodlab/CONCH",
    ),
    "ctranspath": Preset(
        repository="Xiyue-Wang/TransPath",
        library="",
        features=768,
        mpp=(1.0,),
        needs="its authors' changed timm 0.5.4 (timm-0.5.4.tar, or timm_ctp) and the ConvStem of their ctran.py",
        at="https://github.com/Xiyue-Wang/TransPath",
    ),
}
