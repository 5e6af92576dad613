"""Model cards and exports: a trained model in a folder that can be given away, and what its user should know.

A card is Markdown with the YAML front matter of the Hugging Face hub. It tells counts, never paths or the ids of
slides and cases, and says of every figure on how many cases it rests, and of what was not tested that it was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nested_ats import ImageModel, inspect_model, load_model, save_model
from nested_ats.checkpoint import CONFIG, WEIGHTS, ModelInfo
from nested_ats.config import AnyConfig, EncoderConfig, PatchConfig
from nested_ats.networks.encoders import Choice, read_choice
from nested_ats.networks.hub import RANDOM
from nested_ats.networks.presets import PRESETS, Preset
from nested_ats.targets import Classes, MultiLabel, Target
from pipeline.data.manifest import SPLITS
from pipeline.errors import UsageError
from pipeline.files import make_folder, write_atomic
from pipeline.results.report import describe_metrics, evaluated
from pipeline.results.settings import Settings, prediction_settings
from pipeline.results.thresholds import Thresholds
from pipeline.runs import read_metrics, read_run
from pipeline.units import shown

README = "README.md"
_FEW = 100  # cases, below which an interval is so wide that this is said

Metrics = Mapping[str, Any]


def export_model(
    run: Path, folder: Path, predictions: Sequence[Path] = (), *, name: str = "", trust_encoder: bool = False
) -> Path:
    """Write the model of a finished run with its card into a folder, as `nested_ats.load_model` reads it.

    Parameters
    ----------
    run
        The folder of the run.
    folder
        The folder to write: ``model.safetensors``, ``config.json`` and ``README.md``. It is new or empty, or holds an
        earlier export, which is replaced.
    predictions
        Folders of evaluated predictions of this model, whose figures the card has.
    name
        The model's name; by default that of the run's folder.
    trust_encoder
        Whether the encoder is imported where it is code of the user's.

    Raises
    ------
    UsageError
        `run` has not finished, `folder` holds something else or cannot be written, or predictions are not evaluated
        or of another model.
    nested_ats.ModelFileError
        The model is damaged.
    """
    card = model_card(run, predictions, name=name, trust_encoder=trust_encoder)
    make_folder(folder)
    others = [path.name for path in folder.iterdir() if path.name not in (README, CONFIG, WEIGHTS)]
    if others:
        raise UsageError(f"{folder}: holds other files, such as {min(others)}; choose another --out")
    source = Path(prediction_settings(run, trust_encoder=trust_encoder).model)
    model, _ = load_model(source, expect=ImageModel, trust_encoder=trust_encoder)
    model.config = _without_paths(model.config)
    save_model(folder, model)
    write_atomic(folder / README, card)
    return folder


def model_card(run: Path, predictions: Sequence[Path] = (), *, name: str = "", trust_encoder: bool = False) -> str:
    """Return the card of a finished run's model; parameters and errors are those of `export_model`."""
    about, settings = read_run(run), prediction_settings(run, trust_encoder=trust_encoder)
    info = inspect_model(Path(settings.model), trust_encoder=trust_encoder)
    figures = [evaluated([run], folder) for folder in predictions]
    name = name or run.absolute().name
    choice = read_choice(info.config.encoder)
    front = yaml.safe_dump(_front_matter(name, info.target, choice, figures), sort_keys=False, allow_unicode=True)
    epochs = read_metrics(run)
    parts = [
        f"---\n{front}---\n",
        f"# {name}\n",
        *_answers(info.target),
        *_network(info, choice, settings),
        *_data(about, info.target),
        *_training(about, epochs),
        *_figures(figures),
        *_limits(about, info, choice, figures, settings.temperature, settings.thresholds),
        *_use(info),
    ]
    return "\n".join(parts)


def _without_paths(config: Any) -> Any:
    """Return a configuration that names the file of the encoder's first weights, and not where it was."""
    choice = read_choice(config.encoder)
    if choice.weights in (None, RANDOM):
        return config
    return replace(config, encoder=choice._replace(weights=Path(choice.weights or "").name).plain)


def _front_matter(name: str, target: Target, choice: Choice, figures: Sequence[Metrics]) -> dict[str, Any]:
    task = "image-classification" if isinstance(target, Classes | MultiLabel) else "other"
    front: dict[str, Any] = {"library_name": "nested-ats", "license": "unknown"}
    if task != "other":
        front["pipeline_tag"] = task
    front["tags"] = ["nested-attention-sampling", "multiple-instance-learning", "gigapixel-images"]
    preset = PRESETS.get(choice.name)
    if preset:
        front["base_model"] = preset.repository
    results = [
        {
            "task": {"type": task},
            "dataset": {"type": "private", "name": f"{metrics['cases']} cases of {_split(metrics)}"},
            "metrics": [
                {"type": each, "name": each.replace("_", " "), "value": round(metrics[each]["value"], 4)}
                for each in metrics["measures"]
                if metrics[each]["value"] is not None
            ],
        }
        for metrics in figures
    ]
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    return front


def _split(metrics: Metrics) -> str:
    return f"split {metrics['split']}" if metrics["split"] else "no split"


def _answers(target: Target) -> Iterator[str]:
    yield (
        "A model that answers one question about a gigapixel image and was trained on one label an image, by "
        "[attention sampling](https://arxiv.org/abs/1905.03711).\n"
    )
    yield f"**It answers** ({target.kind}): {', '.join(target.names)}.\n"


def _network(info: ModelInfo, choice: Choice, settings: Settings) -> Iterator[str]:
    config: AnyConfig = info.config
    yield "## What it looks at\n"
    yield f"- kind `{config.kind}`, {info.in_channels} channels; levels at downsample {_levels(config)}"
    scale = "the finest level of each image, whatever its pixels measure"
    yield f"- downsample 1 is {f'{shown(config.mpp)} per pixel' if config.mpp else scale}"
    if isinstance(config, PatchConfig):
        patches = f"patches of {config.patch_size} pixels at downsample {config.patch_downsample:g}"
        yield f"- {patches}; prior: {config.prior}"
    yield f"- encoder `{choice.name}`, trained parts: {config.trainable}"
    yield f"- pixels off the image or without data are {settings.background:g} on a scale from 0 to 1"
    if settings.channels:
        yield f"- channels, in this order: {', '.join(map(str, settings.channels))}"
    yield ""


def _levels(config: EncoderConfig) -> str:
    return ", ".join(f"{downsample:g}" for downsample in config.downsamples)


def _data(about: Mapping[str, Any], target: Target) -> Iterator[str]:
    """Count the slides of each split, by class where there are any."""
    yield "## Data\n"
    rows = about["entries"]
    named = about["config"]["target"].get("column", "label") if isinstance(target, Classes) else None
    classes = target.names if isinstance(target, Classes) else ()
    head = ["split", "slides", "cases", *classes]
    yield f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
    for split in SPLITS:
        own = [row for row in rows if row["split"] == split]
        if own:
            cases = len({row["case_id"] or row["slide_id"] for row in own})
            labels = Counter({**row.get("extra", {}), "label": row["label"]}.get(named or "", "") for row in own)
            slides = sum(len(row.get("slides") or [row]) for row in own)
            cells = [split, slides, cases, *(labels[label] for label in classes)]
            yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def _training(about: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    train = about["config"]["train"]
    yield "## Training\n"
    yield (
        f"{len(epochs)} epochs of steps of {train['batch_size']} slides, learning rate {train['learning_rate']:g} "
        f"({train['schedule']}), seed {about['config']['seed']}; "
        f"{', '.join(f'{name} {version}' for name, version in about['versions'].items())}.\n"
    )
    if epochs and epochs[-1].get("verdict"):
        yield f"**Warning of the training**: {epochs[-1]['verdict']}\n"


def _figures(figures: Sequence[Metrics]) -> Iterator[str]:
    yield "## Figures\n"
    if not figures:
        yield "**None.** The model was not evaluated on images that it has not seen, or figures were not given.\n"
    for metrics in figures:
        yield f"{_split(metrics)}, {metrics['cases']} cases; intervals of 95 % over cases:\n"
        yield "| | |\n|---|---|"
        yield from (f"| {name} | {value} |" for name, value in describe_metrics(dict(metrics)))
        yield ""
        if metrics["verdict"]:
            yield f"**Warning**: {metrics['verdict']}\n"


def _limits(
    about: Mapping[str, Any],
    info: ModelInfo,
    choice: Choice,
    figures: Sequence[Metrics],
    temperature: float | None,
    thresholds: Thresholds,
) -> Iterator[str]:
    yield "## Limits: what was not tested\n"
    yield from (f"- {line}" for line in _untested(figures))
    if temperature:
        yield (
            f"- Figures are of calibrated probabilities, of logits divided by {temperature:.4g}; loading the model "
            "does not do that."
        )
    if info.config.mpp is None:
        yield "- The model knows no scale: other scanners or magnifications than those of its data may mislead it."
    if about["config"]["model"].get("prior", "none") == "tissue":
        yield "- Tissue is found by its colour: faint stainings, ink and folds may be missed or taken for it."
    if thresholds:
        chosen = ", ".join(f"{name} from a probability of {value:.3f} on" for name, value in thresholds.items())
        yield f"- It answers {chosen}, as was chosen on validation slides; loading the model does not do that."
    yield "- Nothing here is a medical device, and no figure above stands for a clinical study."
    preset: Preset | None = PRESETS.get(choice.name)
    if preset:
        yield (
            f"- The weights contain those of {choice.name}; its licence, at {preset.page}, decides whether they may "
            "be given on, and to whom."
        )
    yield "- The licence of this model is not chosen: who publishes it sets `license` above.\n"


def _untested(figures: Sequence[Metrics]) -> Iterator[str]:
    if not figures:
        yield "How good its answers are on images that it has not seen."
    for metrics in figures:
        where = _split(metrics)
        if metrics["seen_included"] and sum(metrics["seen"].values()):
            yield f"The figures of {where} count images that the training has seen: they are too good."
        if metrics["cases"] < _FEW:
            yield f"The figures of {where} rest on {metrics['cases']} cases; mind their intervals."
        if metrics["failed"]:
            yield f"{metrics['failed']} images of {where} could not be answered and are in no figure."
        tested = zip(metrics.get("classes", ()), metrics.get("confusion", ()), strict=True)
        absent = [name for name, row in tested if not sum(row)]
        if absent:
            yield f"No image of {where} is of {', '.join(absent)}: nothing is known of these."
    yield (
        "Images of other sites, scanners, stainings or sensors than those of the data above: an interval tells of "
        "chance among cases like these, not of a change of place."
    )
    if not any(metrics.get("by") for metrics in figures):
        yield "Groups of people or places: no figure is broken down by them."


def _use(info: ModelInfo) -> Iterator[str]:
    yield "## Use\n"
    trust = ", trust_encoder=True" if ":" in info.config.encoder_name else ""
    yield (
        "```python\n"
        "from pathlib import Path\n"
        "from nested_ats import ImageModel, load_model\n\n"
        f'model, names = load_model(Path("."), expect=ImageModel{trust})  # checks every bit, and unpickles nothing\n'
        "```\n"
    )
    yield f"SHA-256 of the description and weights in the run that it is from: `{info.sha256}`.\n"
