"""Masks in pyramids are labels as OME-Zarr has them, are found again, and leave the pyramid as sound as it was."""

import json

import numpy as np
import pytest
import tifffile
import zarr

from storage import (
    ConversionError,
    CorruptImageError,
    MissingImageError,
    NotAPyramidError,
    Slide,
    convert,
    read_label,
    validate,
    write_label,
    write_pyramid,
)
from storage.format.levels import coarsened

from .test_foreign import write_foreign

MADE_OF = {"mask": "a"}


@pytest.fixture
def pyramid(tmp_path, textured, small):
    write_pyramid(tmp_path / "p.ome.zarr", textured((3, 150, 200)), options=small, mpp=0.5)
    return tmp_path / "p.ome.zarr"


@pytest.fixture
def mask():
    mask = np.zeros((38, 50), np.bool_)
    mask[10:20, 5:30] = True
    return mask


def put(place, mask, made_of=MADE_OF, name="tissue"):
    write_label(place, name, mask, downsample=4, made_of=made_of)


def test_it_is_found_again_where_it_was_made_of_the_same(pyramid, mask):
    put(pyramid, mask)
    np.testing.assert_array_equal(read_label(pyramid, "tissue", MADE_OF, mask.shape), mask)
    assert read_label(pyramid, "tissue", {"mask": "b"}, mask.shape) is None
    assert read_label(pyramid, "tissue", MADE_OF, (99, 99)) is None
    with pytest.raises(MissingImageError):
        read_label(pyramid, "valid", MADE_OF, mask.shape)


def test_the_pyramid_stays_what_it_was(pyramid, mask):
    before = {path: path.read_bytes() for path in pyramid.rglob("*") if path.is_file()}
    put(pyramid, mask)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert validate(pyramid, full=True) == []
    assert validate(pyramid) == []


def test_it_lies_over_its_image_and_has_as_many_levels(pyramid, mask):
    put(pyramid, mask)
    with Slide(pyramid) as image, Slide(pyramid / "labels" / "tissue") as label:
        assert len(label.levels) == len(image.levels)
        assert label.mpp == 2.0
        first = image.levels[0]
        assert (label.levels[0].scale_yx, label.levels[0].translation_yx) == coarsened(
            4, first.scale_yx, first.translation_yx
        )
        assert label.shape_yx == image.levels[2].shape_yx
        coarser = label.read(1, (0, 0, *label.levels[1].shape_yx))[0]
    assert set(np.unique(coarser)) == {0, 1}
    assert coarser[5:10, 3:15].all()


def test_others_read_it(pyramid, mask):
    put(pyramid, mask)
    put(pyramid, ~mask, name="valid")
    group = zarr.open_group(pyramid, mode="r", use_consolidated=False)
    np.testing.assert_array_equal(group["labels/tissue/0"][0], mask)
    np.testing.assert_array_equal(zarr.open_group(pyramid / "labels" / "valid", mode="r")["0"][0], ~mask)
    from ome_zarr_models.v05 import ImageLabel, Labels

    listed = Labels.from_zarr(zarr.open_group(pyramid / "labels", mode="r"))
    assert listed.attributes.ome.labels == ["tissue", "valid"]
    model = ImageLabel.from_zarr(zarr.open_group(pyramid / "labels" / "tissue", mode="r"))
    assert model.attributes.ome.image_label.source.image == "../../"


def test_ome_zarr_py_shows_it_on_its_image(pyramid, mask):
    """As napari does, whose reader this is."""
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Label, Reader

    put(pyramid, mask)
    [node] = [node for node in Reader(parse_url(pyramid))() if node.load(Label)]
    np.testing.assert_array_equal(np.asarray(node.data[0])[0], mask)
    assert node.metadata["coordinateTransformations"][0][0]["scale"] == [1.0, 2.0, 2.0]
    assert "contrast_limits" not in node.metadata  # no image, which a viewer would blend


def test_another_mask_replaces_it_and_the_same_one_does_not(pyramid, mask):
    put(pyramid, mask)
    root = pyramid / "labels" / "tissue" / "zarr.json"
    stamp = root.stat().st_mtime_ns
    put(pyramid, mask)
    assert root.stat().st_mtime_ns == stamp
    put(pyramid, ~mask, {"mask": "b"})
    np.testing.assert_array_equal(read_label(pyramid, "tissue", {"mask": "b"}, mask.shape), ~mask)
    assert json.loads((pyramid / "labels" / "zarr.json").read_text())["attributes"]["ome"]["labels"] == ["tissue"]
    assert validate(pyramid, full=True) == []


def test_labels_of_others_stay(pyramid, mask):
    group = zarr.open_group(
        pyramid / "labels", mode="w", attributes={"ome": {"version": "0.5", "labels": ["nuclei"]}}
    )
    group.create_array("nuclei/0", data=np.ones((1, 9, 9), np.uint8))
    put(pyramid, mask)
    assert dict(zarr.open_group(pyramid / "labels").attrs)["ome"]["labels"] == ["nuclei", "tissue"]
    assert validate(pyramid, full=True) == []
    with pytest.raises(ConversionError, match="holds labels/nuclei/"):
        write_pyramid(pyramid, np.zeros((1, 9, 9), np.uint8), overwrite=True)
    group.create_group("valid")
    with pytest.raises(ConversionError, match=r"labels/valid: is not of this package and stays"):
        put(pyramid, mask, name="valid")


@pytest.mark.parametrize("full", [False, True])
def test_validate_names_what_is_wrong_with_it(pyramid, mask, full):
    put(pyramid, mask)
    shard = pyramid / "labels" / "tissue" / "0" / "c" / "0" / "0" / "0"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1])
    [problem] = validate(pyramid, full=full)
    assert problem.message.startswith("labels/tissue: 0/c/0/0/0 holds")
    shard.write_bytes(sound)
    (pyramid / "labels" / "tissue" / "zarr.json").unlink()
    [problem] = validate(pyramid, full=full)
    assert "labels/tissue: no zarr.json here" in problem.message
    (pyramid / "labels" / "zarr.json").write_text("{")
    assert any(problem.what == "stray" for problem in validate(pyramid, full=full))
    with pytest.raises(CorruptImageError, match=r"labels/zarr\.json is damaged"):
        put(pyramid, mask, name="valid")
    with pytest.raises(ConversionError, match="labels/tissue: exists and is not a sound pyramid; remove it"):
        put(pyramid, mask)


def test_a_conversion_may_replace_a_pyramid_with_it(tmp_path, tiff, small, mask):
    path, _ = tiff(150, 200)
    convert(path, tmp_path / "p.ome.zarr", options=small)
    put(tmp_path / "p.ome.zarr", mask)
    convert(path, tmp_path / "p.ome.zarr", options=small)  # it is there already
    assert (tmp_path / "p.ome.zarr" / "labels").exists()
    other, _ = tiff(150, 200, name="other.tif", compression="lzw")
    convert(other, tmp_path / "p.ome.zarr", options=small, overwrite=True)
    assert not (tmp_path / "p.ome.zarr" / "labels").exists()
    assert validate(tmp_path / "p.ome.zarr", source=other) == []


def test_what_cannot_hold_it_is_named(tmp_path, pyramid, mask, textured):
    write_foreign(tmp_path / "foreign.zarr", textured((3, 150, 200)), axes="cyx", version="0.5")
    with pytest.raises(NotAPyramidError, match=r"foreign\.zarr: was not written by this package"):
        put(tmp_path / "foreign.zarr", mask)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (pyramid / "labels").symlink_to(elsewhere)
    with pytest.raises(ConversionError, match="labels: is a link, which is not written to"):
        put(pyramid, mask)
    assert not list(elsewhere.iterdir())


def test_a_pyramid_that_cannot_be_written_to_stays_sound(pyramid, mask):
    (pyramid / "labels").write_text("in the way, as a disk that is read-only would be")
    with pytest.raises(ConversionError, match=r"labels/tissue: cannot be written \(File exists: .*labels\)"):
        put(pyramid, mask)
    (pyramid / "labels").unlink()
    assert validate(pyramid) == []


def test_in_an_object_store(s3, mask, textured, small):
    place = f"{s3.url}/p.ome.zarr"
    write_pyramid(place, textured((3, 150, 200)), options=small)
    put(place, mask)
    np.testing.assert_array_equal(read_label(place, "tissue", MADE_OF, mask.shape), mask)
    put(place, ~mask, {"mask": "b"})
    np.testing.assert_array_equal(read_label(place, "tissue", {"mask": "b"}, mask.shape), ~mask)
    assert validate(place, full=True) == []
    write_pyramid(place, textured((3, 150, 200), seed=1), options=small, overwrite=True)
    with pytest.raises(NotAPyramidError):
        read_label(place, "tissue", MADE_OF, mask.shape)


def test_a_mask_file_may_be_a_label(tmp_path, pyramid, mask):
    """It is a pyramid, which whatever reads images reads."""
    put(pyramid, mask)
    tifffile.imwrite(tmp_path / "m.tif", mask.astype(np.uint8))
    with Slide(pyramid / "labels" / "tissue") as label, Slide(tmp_path / "m.tif") as image:
        np.testing.assert_array_equal(label.read(0, (0, 0, 38, 50)), image.read(0, (0, 0, 38, 50)))
