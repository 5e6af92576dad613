"""Which part of an encoder is trained: all, none, its last stages, or small matrices beside its attention (LoRA).

What is not trained has ``requires_grad = False`` and stays in evaluation mode. All batch normalisation of an encoder
that is trained in part stays there too: it uses its saved statistics, not those of the few patches of one worker.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nested_ats.errors import EncoderError

Trainable = Literal["all", "none"] | int | dict[str, int]

LORA = "lora"


def check_trainable(trainable: Any) -> None:
    """Raise ValueError if ``trainable`` has no allowed value."""
    if isinstance(trainable, dict):
        if trainable.keys() != {LORA} or not _positive(trainable[LORA]):
            raise ValueError("trainable: as a mapping it must be {lora: r}, with the rank r of the matrices")
    elif not _positive(trainable) and trainable not in ("all", "none"):
        raise ValueError(
            "trainable: must be all, none, the number of the encoder's last stages to train, or {lora: r}"
        )


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def freeze(encoder: nn.Module, trainable: Trainable) -> list[nn.Module]:
    """Freeze the parts of an encoder that are not trained.

    Parameters
    ----------
    encoder
        Any encoder.
    trainable
        ``all``; ``none``; n: the last n stages are trained; or ``{lora: r}``: matrices of rank r are put beside every
        linear layer of its attention, in place, and trained (Hu et al. 2021, with alpha = r). The stages are the
        encoder's children in the order in which it registered them, containers opened, those without parameters not
        counted.

    Returns
    -------
    The parts that must stay in evaluation mode: the frozen ones and batch normalisation.

    Raises
    ------
    EncoderError
        The encoder has fewer than n stages or no attention for the matrices, or peft is not installed.
    """
    if trainable == "all":
        return []
    encoder.requires_grad_(requires_grad=False)
    if isinstance(trainable, dict):
        _add_lora(encoder, trainable[LORA])
        return [encoder]
    if trainable == "none":
        return [encoder]
    inside = encoder
    while len(children := list(inside.children())) == 1:  # wrappers
        inside = children[0]
    stages = _stages(inside)
    counted = [place for place, stage in enumerate(stages) if any(True for _ in stage.parameters())]
    if trainable > len(counted):
        raise EncoderError(f"trainable: the encoder has {len(counted)} stages, fewer than {trainable}")
    first = counted[-trainable]
    for stage in stages[first:]:
        stage.requires_grad_(requires_grad=True)
    fixed = [part for stage in stages[first:] for part in stage.modules() if isinstance(part, _BatchNorm)]
    return [*stages[:first], *fixed]


def _stages(module: nn.Module) -> list[nn.Module]:
    stages: list[nn.Module] = []
    for child in module.children():
        inner = list(child.children())
        container = isinstance(child, nn.Sequential | nn.ModuleList) or len(inner) == 1
        bare = not any(True for _ in child.parameters(recurse=False))
        stages += _stages(child) if inner and container and bare else [child]
    return stages


def _add_lora(encoder: nn.Module, rank: int) -> None:
    """Put trainable matrices of a rank beside the linear layers of an encoder's attention."""
    names = [
        name
        for name, part in encoder.named_modules()
        if isinstance(part, nn.Linear) and any("attn" in step or "attention" in step for step in name.split("."))
    ]
    if not names:
        raise EncoderError("trainable: lora is for the attention of transformers, and the encoder has none")
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise EncoderError(
            f"trainable: lora needs peft, which cannot be imported ({error}); pip install peft, or nested-ats[lora]"
        ) from error
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names), encoder)


def batch_statistics(module: nn.Module) -> list[str]:
    """Names of the layers that now normalise by the statistics of the batch."""
    return [name for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.training]
