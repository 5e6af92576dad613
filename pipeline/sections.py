"""The sections of a configuration but for the model's, which lives beside the model: every key with its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

ChannelCount = Annotated[int, Field(ge=1, le=65535)]
ChannelNumber = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """Part of a configuration, which refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def whole(path: Path) -> Path:
    """Make a path mean the same to workers, which may run in other folders."""
    return path.expanduser().absolute()


WholePath = Annotated[Path, AfterValidator(whole)]
# bfloat16 autocasts the networks' forward pass, and the rest stays float32 (see `pipeline.runs.autocast`).
Precision = Literal["float32", "bfloat16"]


class ClassesTarget(Section):
    """One class of several."""

    kind: Literal["classes"] = "classes"
    column: str = "label"  # the column of the table that names the class


class OrdinalTarget(Section):
    """One class of several in an order, such as a grade."""

    kind: Literal["ordinal"] = "ordinal"
    column: str = "label"  # the column of the table that names the grade
    order: tuple[str, ...] | None = None  # grades from the lowest to the highest; numbers have their own order


class MultiLabelTarget(Section):
    """Several labels, each there or not."""

    kind: Literal["multilabel"] = "multilabel"
    columns: tuple[str, ...] = Field(min_length=1)  # one for each label, with 0, 1, or nothing where it is not known


class RegressionTarget(Section):
    """A number."""

    kind: Literal["regression"] = "regression"
    column: str = "label"  # the column of the table that holds it


class CoxTarget(Section):
    """How long until an event, by the risk of it: Cox's proportional hazards."""

    kind: Literal["cox"] = "cox"
    time: str = "time"  # the column of the time until the event or the last look, above 0
    event: str = "event"  # the column that is 1 where the event was seen, and 0 where it was not


class SurvivalTarget(Section):
    """How long until an event, by the probability to get through each interval of time."""

    kind: Literal["survival"] = "survival"
    time: str = "time"  # as above
    event: str = "event"  # as above
    intervals: int = Field(default=4, ge=1, le=100)  # as many, with equally many events of training slides in each
    times: tuple[float, ...] | None = None  # or the ends of the intervals, increasing


def by_kind(usual: str) -> Discriminator:
    """Tell by the key `kind`, or the usual one, which keys are meant, so that errors are about those alone."""

    def kind(value: Any) -> str:
        return str(value.get("kind", usual) if isinstance(value, dict) else getattr(value, "kind", usual))

    return Discriminator(kind)


AnyTarget = Annotated[
    Annotated[ClassesTarget, Tag("classes")]
    | Annotated[OrdinalTarget, Tag("ordinal")]
    | Annotated[MultiLabelTarget, Tag("multilabel")]
    | Annotated[RegressionTarget, Tag("regression")]
    | Annotated[CoxTarget, Tag("cox")]
    | Annotated[SurvivalTarget, Tag("survival")],
    by_kind("classes"),
]


# Measures of classes and grades; of numbers; of times until an event. A target has some of them.
BestBy = Literal[
    "loss",
    "accuracy",
    "balanced_accuracy",
    "auc",
    "quadratic_kappa",
    "mae",
    "r2",
    "pearson",
    "spearman",
    "concordance",
]


class AugmentConfig(Section):
    """How slides are changed at random, anew in every epoch; by default not at all."""

    brightness: float = Field(default=0.0, ge=0, le=1)  # largest shift of the values, as a share of their range
    contrast: float = Field(default=0.0, ge=0, lt=1)  # largest relative change of their distance from mid-range
    hed: float = Field(default=0.0, ge=0, le=1)  # largest change of the amounts of hematoxylin, eosin and DAB
    translation: float = Field(default=0.0, ge=0, le=0.5)  # largest shift, as a share of the image's side; in whole
    # pixels of the coarsest level that the model reads
    jitter: float = Field(default=0.0, ge=0, le=0.5)  # largest shift of each drawn patch, as a share of its side
    warp: float = Field(default=0.0, ge=0, le=0.5)  # how much each drawn patch is turned, stretched and sheared: the
    # largest change of the entries of its linear map; 0.15 turns by up to 9 degrees
    flip: bool = False  # one of the 8 symmetries of the square: mirror images and quarter turns


class TrainConfig(Section):
    """How the model is trained."""

    epochs: int = Field(default=30, ge=1)  # how often the training slides are passed over
    batch_size: int = Field(default=16, ge=1)  # slides a step, over all workers together
    parts: int = Field(default=1, ge=1)  # gradient accumulation: each worker computes its slides of a step in so many
    # micro-batches, with the same gradient; more need less memory, and while one waits for pixels another computes
    precision: Precision = "float32"  # what the networks compute in
    augment: AugmentConfig = AugmentConfig()  # random changes of the training slides
    learning_rate: float = Field(default=1e-3, gt=0)  # Adam's learning rate (paper, appendix H)
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine lets the learning rate fall to 0 at the last step
    warmup: float = Field(default=0.02, ge=0, lt=1)  # share of the training in which the learning rate rises
    clip: float = Field(default=1.0, ge=0)  # largest norm of a step's gradient; 0 allows any
    weight_decay: float = Field(default=0.0, ge=0)  # decoupled weight decay (AdamW)
    average: float = Field(default=0.98, ge=0, lt=1)  # weights are averaged over steps (EMA), and the average is
    # kept: a step leaves this share of it; 0 keeps the last weights
    entropy_weight: float = Field(default=0.01, ge=0)  # lambda of the paper's equation 21
    entropy_fade: float = Field(default=0.5, ge=0, le=1)  # share of the training in which it fades; 0: it stays
    early_samples: int = Field(default=4, ge=1)  # factor on the samples of every level early in the training
    early_share: float = Field(default=0.2, ge=0, le=1)  # share of the training that is early
    class_weights: Literal["none", "balanced"] = "none"  # balanced weights a class by its inverse prior
    sampling: Literal["all", "balanced"] = "all"  # an epoch has each slide once, or a step as many of each class
    best_by: BestBy = "loss"  # the epoch is kept that has the best of these on the validation slides, of equal ones
    # the first: the loss, or a measure of the target (accuracy, balanced_accuracy, auc, quadratic_kappa; mae, r2,
    # pearson, spearman; concordance)
    patience: int = Field(default=0, ge=0)  # epochs without a better validation after which training stops; 0: never
    # A function of yours that gets the metrics of each epoch as a dictionary, for a tracker of experiments.
    tracker: str | None = Field(default=None, pattern=r"^[\w.]+:[\w.]+$")
    checkpoint_minutes: float = Field(
        default=5.0, gt=0
    )  # at most this much work is lost; every epoch ends with a checkpoint, too


class CacheConfig(Section):
    """Where chunks of slides at URLs are kept, for later epochs and runs and for other processes of the machine."""

    folder: WholePath  # it is made where it is not there
    gigabytes: float = Field(default=10.0, gt=0)  # the most that it holds; the least recently used chunks are dropped


class FeaturesConfig(Section):
    """Where the features that a frozen encoder makes of patches are kept, for later epochs, runs and commands."""

    folder: WholePath | None = None  # it is made where it is not there; none means one in the user's cache folder
    gigabytes: float = Field(default=10.0, gt=0)  # the most that it holds; slides that are not in use are dropped


class DataConfig(Section):
    """How slides are read."""

    background: float = Field(default=0.0, ge=0, le=1)  # value of pixels off the slide or without data: 1 is white
    validation: float = Field(default=0.0, ge=0, lt=1)  # share of slides held out, where the manifest has no split
    test: float = Field(default=0.2, ge=0, lt=1)  # share of slides to test on, where the manifest has no split
    # Which channels the model sees, by name or number from 0, as in [B04, B03, B02]; or how many slides must have,
    # all of which are seen: by default as many as most of them have.
    channels: ChannelCount | tuple[ChannelNumber | str, ...] | None = None
    assume_mpp: float | None = Field(
        default=None, gt=0, lt=1000
    )  # micrometres per pixel of slides of which neither their file nor the manifest tells it
    # auto: mean and std of the model are those of each channel over the valid pixels of the training slides (as
    # nested-ats stats has them), measured once before the training and kept by the model. None: as the model says.
    normalize: Literal["auto"] | None = None
    # What is one sample: a slide, or a case with all slides of one case_id, whose cells are then one population.
    unit: Literal["slide", "case"] = "slide"
    cache: CacheConfig | None = None  # keeps chunks that are fetched from URLs; there is none by default
    features: FeaturesConfig | None = FeaturesConfig()  # keeps features of patches of a frozen encoder

    @property
    def opening(self) -> dict[str, Any]:
        """How slides are opened; see `pipeline.data.slides.Opening`."""
        return {
            "background": self.background,
            "cache": self.cache,
            "assume_mpp": self.assume_mpp,
            "channels": self.chosen,
        }

    @property
    def chosen(self) -> tuple[int | str, ...] | None:
        """Names or numbers of the channels that the model sees; None where it sees all of them."""
        return self.channels if isinstance(self.channels, tuple) else None

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> Self:
        if self.channels == ():
            raise ValueError("channels must name at least one")
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave slides to train on")
        return self


class PredictConfig(Section):
    """How slides are classified."""

    draws: int = Field(default=4, ge=1)  # independent draws, averaged; their scatter is the interval
    target_error: float | None = Field(default=None, gt=0)  # drawing stops before that at this expected error
    exact: bool = False  # encode every patch of the opened regions instead of drawing among them
    precision: Precision = "float32"  # what the networks compute in
