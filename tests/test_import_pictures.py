"""What an imported model is compared on: pictures, prepared as for its family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_import_onnx import detector, saved

from act_pipeline.cli.main import main
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record
from act_pipeline.data.builtin_sample import make_scene
from act_pipeline.families import grounding_dino, rtdetr, sam, yolo
from act_pipeline.importers.onnx import verify
from act_pipeline.importers.onnx.pictures import Pictures, preparation_of
from act_pipeline.importers.onnx.read import read_onnx

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")
# Blue, green and red.
COLOUR = (51, 102, 204)


def test_a_picture_is_prepared_as_for_the_family() -> None:
    picture = np.full((10, 20, 3), COLOUR, np.uint8)
    red_first = np.array(COLOUR[::-1]) / 255
    centred = preparation_of(yolo.FAMILY)(picture, (40, 40))
    assert centred.shape == (3, 40, 40) and centred.dtype == np.float32
    np.testing.assert_allclose(centred[:, 20, 20], red_first, rtol=1e-6)
    np.testing.assert_allclose(centred[:, [0, 9, 30, 39]], 114 / 255, rtol=1e-6)
    np.testing.assert_allclose(centred[:, 10:30], np.tile(red_first[:, None, None], (1, 20, 40)), rtol=1e-6)
    for family in (rtdetr.FAMILY, None):
        np.testing.assert_allclose(preparation_of(family)(picture, (40, 30))[:, 0, 0], red_first, rtol=1e-6)
    np.testing.assert_allclose(
        preparation_of(sam.FAMILY)(picture, (8, 8))[:, 0, 0], (red_first - 0.5) / 0.25, rtol=1e-5
    )
    expected = (red_first - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(preparation_of(grounding_dino.FAMILY)(picture, (8, 8))[:, 0, 0], expected, rtol=1e-5)
    pixels = preparation_of(yolo.FAMILY)(picture, (40, 40), "uint8")
    assert pixels.dtype == np.uint8 and pixels[:, 20, 20].tolist() == list(COLOUR[::-1])


def test_without_images_the_comparison_is_on_scenes_of_the_sample(tmp_path: Path) -> None:
    source = read_onnx(saved(detector(), tmp_path), None, None)
    reference = verify.Reference(source, Pictures.of(None))
    prepare = preparation_of(yolo.FAMILY)  # the detector's outputs are those of a YOLO
    for index, sample in enumerate(reference.samples):
        scene = make_scene("val", 0, index, 64).image
        np.testing.assert_array_equal(sample["images"], prepare(scene, (16, 16))[None])
    assert len({sample["images"].tobytes() for sample in reference.samples}) == 3
    assert reference.compared_on == "3 scenes of the built-in sample (ratio kept, centred on grey)"


def test_what_was_compared_on_is_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    path, made = saved(detector(batch=2), tmp_path), tmp_path / "made"
    arguments = ["import", "--onnx", str(path), "--output", str(made)]
    assert main(arguments) == 0
    words = "on 6 scenes of the built-in sample (ratio kept, centred on grey)"
    assert words in capsys.readouterr().out
    assert read_record(made / "import.json", "act_pipeline.import/1")["compared_on"] == words.removeprefix("on ")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    cv2.imwrite(str(pictures / "a.png"), np.full((10, 20, 3), COLOUR, np.uint8))
    assert main([*arguments, "--images", str(pictures)]) == 0
    assert f"on 6 pictures of {pictures} (ratio kept, centred on grey)\n" in capsys.readouterr().out


def test_pictures_that_do_not_exist_are_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--onnx", "there_is_none.onnx", "--images", str(tmp_path)]) == 2
    assert "holds no pictures" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="a.png is no picture that OpenCV can read"):
        Pictures.of(tmp_path).take(0, 64)
