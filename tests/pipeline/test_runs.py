"""The folder of a run: its state is whole or refused, and what is no file of it is refused at once."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from safetensors.torch import load, save

from nested_ats import checkpoint
from pipeline.config import plain
from pipeline.errors import UsageError
from pipeline.files import write_atomic
from pipeline.results.settings import prediction_settings
from pipeline.runs import METRICS, MODEL, RUN, STATE, Position, load_state, read_metrics, read_run, save_state
from pipeline.training.mirror import Mirror


def network(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def run(tmp_path):
    (tmp_path / METRICS).write_text('{"epoch": 1, "cross_entropy": 0.5}\n')
    save_state(tmp_path, *network(0), Position(1, 2), torch.arange(5.0), {"steps": torch.tensor(7)}, "abc")  # type: ignore[call-arg]
    return tmp_path


def restored(folder):
    """Turn a loaded state into comparable values."""
    model, optimizer = network(1)
    position, totals, kept, metrics = load_state(folder, model, optimizer, "abc")
    assert kept == {"steps": torch.tensor(7)}
    moments = {i: {k: v.tolist() for k, v in state.items()} for i, state in optimizer.state_dict()["state"].items()}
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    return position, totals.tolist(), metrics, moments, weights


def test_a_state_gives_back_what_was_saved(run):
    position, totals, metrics, moments, weights = restored(run)
    assert (position, totals, json.loads(metrics)["epoch"]) == (Position(1, 2), [0, 1, 2, 3, 4], 1)
    model, optimizer = network(0)
    assert weights == {name: value.tolist() for name, value in model.state_dict().items()}
    assert moments[1]["exp_avg"] == optimizer.state_dict()["state"][1]["exp_avg"].tolist()


def test_a_flipped_bit_of_a_state_is_refused(run):
    """Wherever it is: nothing but the checksum would notice one in the weights."""
    whole, draws = (run / STATE).read_bytes(), random.Random(0)
    places = [*range(8), *(draws.randrange(8, len(whole)) for _ in range(1500))]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << draws.randrange(8)
        (run / STATE).write_bytes(changed)
        with pytest.raises(UsageError, match=r"state\.safetensors: not a state of this run .*damaged.*--overwrite"):
            restored(run)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_state_cut_short_is_refused(run, length):
    (run / STATE).write_bytes((run / STATE).read_bytes()[:length])
    with pytest.raises(UsageError, match="damaged"):
        restored(run)


def test_a_state_without_a_checksum_is_one_of_before_and_goes_on(run):
    expected = restored(run)
    data = (run / STATE).read_bytes()
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    del about["sha256"]
    (run / STATE).write_bytes(save(load(data), metadata=about))
    assert restored(run) == expected
    (run / STATE).write_bytes(save(load(data), metadata=about | {"sha257": "0"}))
    with pytest.raises(UsageError, match="damaged"):
        restored(run)


def test_a_damaged_state_never_replaces_its_copy(run, s3):
    """It says that it has come further than the copy has."""
    write_atomic(run / RUN, json.dumps({"fingerprint": "abc"}))
    write_atomic(run / "config.yaml", "")
    url = f"{s3.url}/runs/flipped"
    Mirror(url, run).claim(overwrite=False)
    good = s3.objects("runs/flipped")[STATE]
    assert b'"step":"2"' in good
    (run / STATE).write_bytes(good.replace(b'"step":"2"', b'"step":"6"'))
    again = Mirror(url, run)
    again.check("abc", overwrite=False)
    again.claim(overwrite=False)
    assert s3.objects("runs/flipped")[STATE] == good
    (run / RUN).unlink()  # and the folder takes what the copy has
    again.fetch("abc")
    assert (run / STATE).read_bytes() == good


READ = {
    RUN: read_run,
    METRICS: read_metrics,
    STATE: restored,
    f"{MODEL}/config.json": prediction_settings,
    f"{MODEL}/model.safetensors": prediction_settings,
}


@pytest.mark.parametrize("name", READ)
class TestWhatIsNoFile:
    @pytest.fixture
    def full(self, run, config):
        write_atomic(
            run / RUN,
            json.dumps(
                {"fingerprint": "f", "classes": ["a", "b"], "channels": 1, "versions": {}, "entries": []}
                | {"config": plain(config)}
            ),
        )
        model = checkpoint.build_model(config.model, in_channels=1, classes=2)  # type: ignore[attr-defined]
        checkpoint.save_model(run / MODEL, model, classes=["a", "b"])
        return run

    def test_a_pipe_is_refused_at_once(self, full, name):
        READ[name](full)
        (full / name).unlink()
        os.mkfifo(full / name)
        with pytest.raises(Exception, match=f"{name}: .*a pipe, a device or a folder") as caught:
            READ[name](full)
        assert type(caught.value).__name__ in ("UsageError", "ModelFileError")

    def test_a_link_that_leads_out_is_refused(self, full, name):
        (full / name).rename(full.parent / "elsewhere")
        (full / name).symlink_to(full.parent / "elsewhere")
        with pytest.raises(Exception, match=f"{name}: .*leads out of its folder") as caught:
            READ[name](full)
        assert type(caught.value).__name__ in ("UsageError", "ModelFileError")

    def test_a_link_to_the_run_is_followed(self, full, name, tmp_path_factory):
        link = tmp_path_factory.mktemp("link") / "run"
        link.symlink_to(full)
        READ[name](link)


def test_a_model_elsewhere_is_not_that_of_the_run(finished, tmp_path):
    (tmp_path / RUN).write_bytes((finished / RUN).read_bytes())
    with pytest.raises(UsageError, match="training has not finished"):
        prediction_settings(tmp_path)
    (tmp_path / MODEL).symlink_to(finished / MODEL)
    with pytest.raises(UsageError, match="model: a link that leads out of its run"):
        prediction_settings(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": None}, r"\(config: "),
        ({"config": {"train": {"epochs": "many"}}}, r"\(config\.train\.epochs: "),
        ({"config": {"model": {"kind": "none"}}}, r"\(config\.model: "),
        ({"entries": 3}, r"\(entries: "),
        ({"entries": [{"slide_id": 7}]}, r"\(entries\.0\."),
        ({"target": None}, r"\(target: "),
        ({"target": {}}, r"\(target: .*describes no target"),
        ({"target": {"kind": "classes", "classes": {}}}, r"\(target: "),
        ({"target": {"kind": "classes", "classes": ["a", "a"]}}, r"\(target: .*different names"),
        ({"target": {"kind": "regression", "mean": 0.0, "std": 0.0}}, r"\(target: .*positive"),
        ({"channels": -1}, r"\(channels: "),
        ({"channels": 10**400}, r"\(channels: "),
        ({"fingerprint": ["x"]}, r"\(fingerprint: "),
    ],
)
def test_a_tampered_run_is_one_clear_error(finished, tmp_path, change, reason):
    (tmp_path / RUN).write_text(json.dumps(json.loads((finished / RUN).read_text()) | change))
    with pytest.raises(UsageError, match=rf"{RUN}: .*{reason}") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "null", '{"config": NaN', "\ud800", "1" * 5000])
def test_what_is_no_run_is_one_clear_error(tmp_path, text):
    (tmp_path / RUN).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=f"{RUN}: not "):
        read_run(tmp_path)


def test_an_older_run_gets_the_defaults_of_newer_keys(finished, tmp_path):
    about = json.loads((finished / RUN).read_text())
    del about["config"]["data"]["channels"], about["config"]["predict"]["precision"]
    for entry in about["entries"]:
        del entry["extra"]
    (tmp_path / RUN).write_text(json.dumps(about))
    assert read_run(tmp_path) == read_run(finished)
