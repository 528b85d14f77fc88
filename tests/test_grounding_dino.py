"""GroundingDINO: the prompt, the inputs made from it, and classes from tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from inference_fixtures import SHARED, make_tiny_data, write_reader

import act_pipeline  # noqa: F401 - before paddle
from act_pipeline.cli.main import main
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import constant_inputs, fit_reader
from act_pipeline.engines import create_engine
from act_pipeline.engines.arrays import InputCheck
from act_pipeline.evaluation import evaluate
from act_pipeline.execution.finite_checks import _is_finite
from act_pipeline.families.grounding_dino import token_means
from act_pipeline.families.interface import PostProcess
from act_pipeline.families.prompt import Prompt, make_prompt
from act_pipeline.families.registry import Decoder, decoder_of, family_named
from act_pipeline.families.wordpiece import Vocabulary
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers.import_model import import_onnx, write_prompt

WHERE = Path("model")
TEXT = "red blood cell . white blood cell . platelet ."
IDS = [101, 1067, 1037, 1042, 1012, 1076, 1037, 1042, 1012, 1064, 1012, 102]
PHRASES = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}
TOKENS = {"RBC": (1, 2, 3), "WBC": (5, 6, 7), "Platelets": (9,)}
SHAPES = {
    "image": (1, 3, 320, 320), "input_ids": (1, 20), "token_type_ids": (1, 20), "attention_mask": (1, 20),
    "pixel_mask": (1, 320, 320),
}  # fmt: skip
DTYPES = {**dict.fromkeys(SHAPES, "int64"), "image": "float32"}


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        ".",
        "-",
        "red",
        "blood",
        "cell",
        "##s",
        "plate",
        "##let",
        "cafe",
        "中",
    ]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("Red BLOOD cells.", ["red", "blood", "cell", "##s", "."]),
        ("platelet-cell", ["plate", "##let", "-", "cell"]),
        ("cellx red", ["[UNK]", "red"]),  # a word with an unknown piece is unknown as a whole
        ("café\tred\x00", ["cafe", "red"]),
        ("中red", ["中", "red"]),
        ("red" * 40, ["[UNK]"]),
        ("", []),
    ],
)
def test_wordpiece(vocab: Path, text: str, pieces: list[str]) -> None:
    lines = vocab.read_text(encoding="utf-8").split("\n")
    vocabulary = Vocabulary.read(vocab)
    assert vocabulary.encode(text) == [lines.index(piece) for piece in ("[CLS]", *pieces, "[SEP]")]


def test_wordpiece_is_berts(vocab: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")  # of the extra for Hugging Face's tests
    ids = {piece: index for index, piece in enumerate(vocab.read_text(encoding="utf-8").split("\n"))}
    reference = tokenizers.BertWordPieceTokenizer(vocab=ids, lowercase=True)
    for text in ("Red blood-cells . platelet!", "Cafés $red ^ cell_s", "中中 red", "cell's"):
        assert Vocabulary.read(vocab).encode(text) == reference.encode(text).ids, text


@pytest.mark.parametrize("content, message", [(b"red\nblood", r"has no \[CLS\]"), (b"\xff\xfe", "no text in UTF-8")])
def test_a_vocabulary_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Vocabulary.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        Vocabulary.read(tmp_path / "none.txt")


def test_ids_of_a_text_give_the_tokens_of_its_phrases() -> None:
    prompt = make_prompt(TEXT, PHRASES, input_ids=[*IDS, *[0] * 8], length=20)
    assert prompt == Prompt(TEXT, tuple(IDS), TOKENS)
    assert make_prompt(TEXT, TOKENS, input_ids=IDS) == prompt
    assert make_prompt(TEXT, input_ids=IDS).classes == dict(zip(PHRASES.values(), TOKENS.values()))


def test_a_vocabulary_gives_the_tokens_of_phrases(vocab: Path) -> None:
    prompt = make_prompt("Platelets . red blood cell", ["red blood cell", "platelets"], vocab=vocab)
    assert prompt.text == "Platelets . red blood cell ."
    assert prompt.input_ids == (2, 10, 11, 9, 4, 6, 7, 8, 4, 3)
    assert prompt.classes == {"red blood cell": (5, 6, 7), "platelets": (1, 2, 3)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 11}, "has 12 tokens, expected at most the 11"),
        ({"classes": {"RBC": "red blod cell"}}, "'red blod cell', which is none of the prompt's.*did you mean"),
        ({"classes": {"RBC": [1, 12]}}, r"the class RBC is \[1, 12\], expected positions of tokens from 0 to 11"),
        ({"classes": {"RBC": []}}, "expected positions of tokens"),
        ({"input_ids": IDS[:9]}, "has 3 phrases, but its token ids have 2"),
        ({"input_ids": ["red"]}, "expected a list of token ids"),
        ({"input_ids": [0, 0]}, "has padding only"),
        ({"input_ids": None}, r"no token ids; give the vocab.txt .*--vocab, vocab=.*--input_ids, input_ids="),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_prompt(TEXT, **{"input_ids": IDS, **arguments})
    assert "\n" not in str(error.value)


def test_the_inputs_of_a_prompt_are_padded_to_the_models_length() -> None:
    made = make_prompt(TEXT, PHRASES, input_ids=IDS).inputs(SHAPES, {**DTYPES, "attention_mask": "bool"}, WHERE)
    assert {name: (array.shape, array.dtype.name) for name, array in made.items()} == {
        "input_ids": ((1, 20), "int64"), "token_type_ids": ((1, 20), "int64"), "attention_mask": ((1, 20), "bool"),
        "pixel_mask": ((1, 320, 320), "int64"),
    }  # fmt: skip
    assert made["input_ids"].tolist() == [IDS + [0] * 8]
    assert made["attention_mask"].astype(int).tolist() == [[1] * 12 + [0] * 8]
    assert not made["token_type_ids"].any() and made["pixel_mask"].all()


def test_a_prompt_longer_than_the_model_takes_is_refused() -> None:
    with pytest.raises(UserError, match="model: the prompt has 12 tokens, expected at most the 8"):
        make_prompt(TEXT, PHRASES, input_ids=IDS).inputs({**SHAPES, "input_ids": (1, 8)}, DTYPES, WHERE)


def test_the_section_of_infer_cfg_is_read_as_it_was_written() -> None:
    prompt = make_prompt(TEXT, PHRASES, input_ids=IDS)
    content = yaml.safe_load(yaml.safe_dump({"prompt": prompt.section(), "label_list": list(PHRASES)}, sort_keys=False))
    assert Prompt.of(content, "infer_cfg.yml") == prompt
    assert PostProcess.of(content, "infer_cfg.yml").class_tokens == tuple(TOKENS.values())
    assert Prompt.of({}, "infer_cfg.yml") is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": "red"}, "prompt is 'red', expected a mapping with text, input_ids, classes"),
        ({"prompt": {"text": TEXT, "input_ids": IDS}}, "prompt is .*expected a mapping with"),
        ({"prompt": {"text": TEXT, "input_ids": IDS, "classes": {"a": [1]}, "clases": 1}}, "prompt.clases is not"),
        ({"prompt": {"text": TEXT, "input_ids": IDS, "classes": ["a"]}}, r"prompt.classes is \['a'\]"),
        ({"prompt": {"text": TEXT, "input_ids": IDS, "classes": {"a": [99]}}}, r"prompt.classes.a is \[99\]"),
        (
            {"prompt": {"text": TEXT, "input_ids": IDS, "classes": {"a": [1]}}, "label_list": ["b"]},
            "prompt.classes are a, but label_list has b",
        ),
    ],
)
def test_a_section_edited_wrongly_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"infer_cfg.yml: {message}"):
        Prompt.of(change, "infer_cfg.yml")


def outputs_of(queries: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (2, queries, tokens)).astype(np.float32)
    logits[..., len(IDS) :] = -np.inf
    return {"logits": logits, "pred_boxes": rng.uniform(0.2, 0.6, (2, queries, 4)).astype(np.float32)}


def test_the_best_pairs_of_query_and_class() -> None:
    outputs = outputs_of(50, 32)
    inputs = {
        "image": np.zeros((2, 3, 100, 200), np.float32), "im_shape": np.array([[100, 200]] * 2, np.float32),
        "scale_factor": np.array([[0.5, 2.0], [1.0, 1.0]], np.float32),
    }  # fmt: skip
    post = PostProcess(score_threshold=0, keep_top_k=100, class_tokens=tuple(TOKENS.values()))
    found = Decoder(family_named("grounding_dino", ""), post, WHERE)(outputs, inputs)
    assert found["bbox_num"].tolist() == [100, 100]
    for image in range(2):
        scale_y, scale_x = inputs["scale_factor"][image]
        expected = []
        for query in range(50):
            for index, tokens in enumerate(TOKENS.values()):
                score = np.mean([1 / (1 + np.exp(-float(outputs["logits"][image, query, token]))) for token in tokens])
                x, y, w, h = outputs["pred_boxes"][image, query].astype(float)
                box = [(x - w / 2) * 200, (y - h / 2) * 100, (x + w / 2) * 200, (y + h / 2) * 100]
                box = np.clip(box, 0, [200, 100, 200, 100]) / [scale_x, scale_y, scale_x, scale_y]
                expected.append([index, score, *box])
        expected.sort(key=lambda row: -row[1])
        np.testing.assert_allclose(found["bbox"][image * 100 : image * 100 + 100], expected[:100], rtol=1e-4, atol=1e-3)


def test_thousands_of_classes_are_one_product() -> None:
    classes = tuple(tuple(range(start, start + 2)) for start in range(0, 2406, 2))
    means = token_means(classes, 2410)
    assert means.shape == (2410, 1203)
    assert (means.sum(0) == 1).all() and (np.nonzero(means[:, 7])[0] == [14, 15]).all()


def test_outputs_alone_select_no_classes() -> None:
    with pytest.raises(UserError, match="no section prompt"):
        Decoder(family_named("grounding_dino", ""), PostProcess(), WHERE)(
            outputs_of(5, 32), {"image": np.zeros((2, 3, 8, 8))}
        )
    with pytest.raises(UserError, match="token 40, but the model scores 0 to 31"):
        token_means(((40,),), 32)


def test_infer_cfg_selects_the_family(tmp_path: Path) -> None:
    prompt = make_prompt(TEXT, PHRASES, input_ids=IDS)
    content = {"arch": "grounding_dino", "prompt": prompt.section(), "label_list": list(PHRASES)}
    (tmp_path / "infer_cfg.yml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    shapes = {"logits": (1, 100, 32), "pred_boxes": (1, 100, 4)}
    decoder = decoder_of(InferenceModel(tmp_path), shapes)
    assert decoder.family.name == "grounding_dino"
    assert decoder.post.class_tokens == tuple(TOKENS.values())
    assert "(9,)" in decoder.key  # another prompt makes another evaluation


def test_inputs_keep_the_models_dtypes() -> None:
    check = InputCheck(WHERE, {"image": (-1, 1), "ids": (-1, 2)}, dtypes={"ids": "int64"})
    made = check({"image": np.zeros((1, 1)), "ids": np.array([[1 << 40, 3]])})
    assert made["image"].dtype == np.float32 and made["ids"].dtype == np.int64
    assert made["ids"][0, 0] == 1 << 40  # float32 would not hold it


def test_only_columns_of_minus_infinity_are_finite_outputs() -> None:
    logits = outputs_of(5, 32)["logits"]
    assert _is_finite(logits)
    for bad in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[0, 2, 3] = bad
        assert not _is_finite(broken)
    assert not _is_finite(np.full((1, 5, 4), -np.inf))
    assert _is_finite(np.zeros((0, 6))) and _is_finite(np.float32(1)) and not _is_finite(np.array([np.nan, 1]))


DISC, SQUARE = [101, 5, 1012, 6, 7, 1012, 102], [101, 6, 7, 1012, 5, 1012, 102]


def text_model(folder: Path) -> InferenceModel:
    """Write a model whose logit of a token is (token id modulo 16 - 8) + the mean of the image; one box."""
    import paddle

    folder.mkdir()
    with static_mode():
        program, scope = paddle.static.Program(), paddle.static.Scope()
        with paddle.static.program_guard(program), paddle.static.scope_guard(scope), paddle.utils.unique_name.guard():
            image = paddle.static.data("image", [-1, 3, 32, 32])
            ids = paddle.static.data("input_ids", [-1, 8], "int64")
            mask = paddle.static.data("attention_mask", [-1, 8], "bool")
            mean = paddle.mean(image, axis=[1, 2, 3]).reshape([-1, 1]) * 0.001
            logits = paddle.where(mask, paddle.cast(ids % 16, "float32") - 8 + mean, paddle.full([1], -np.inf))
            half = paddle.create_parameter([1], "float32", default_initializer=paddle.nn.initializer.Constant(0.5))
            boxes = paddle.tile(mean.reshape([-1, 1, 1]) * 0 + half, [1, 1, 4])
            executor = paddle.static.Executor(paddle.CPUPlace())
            outputs = [logits.reshape([-1, 1, 8]), boxes]
            scope.var(half.name).get_tensor().set(np.array([0.5], np.float32), paddle.CPUPlace())
        graph = StaticGraph(program, ["image", "input_ids", "attention_mask"], outputs, scope, executor)
        return graph.save(folder)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader.load(write_reader(tmp_path / "reader.yml", make_tiny_data(tmp_path / "data", 3).parent))


def test_every_batch_has_the_tokens_and_another_prompt_gives_other_classes(tmp_path: Path, reader: Reader) -> None:
    model = text_model(tmp_path / "model")
    assert inspect_model(model).input_dtypes == {"image": "float32", "input_ids": "int64", "attention_mask": "bool"}
    prints, scores = [], []
    for text, ids, names in (
        ("disc . a square .", DISC, ["disc", "square"]),
        ("a square . disc .", SQUARE, ["square", "disc"]),
    ):
        write_prompt(model, make_prompt(text, {"disc": "disc", "square": "a square"}, input_ids=ids))
        content = model.infer_cfg()
        content["prompt"]["classes"] = {name: content["prompt"]["classes"][name] for name in names}
        model.infer_cfg_path.write_text(yaml.safe_dump({**content, "label_list": names}, sort_keys=False))
        fitted = fit_reader(model, reader).reader
        batches = [*fitted.loader("eval", batch_size=2), fitted.preprocess(tmp_path / "data" / "images" / "0.png")]
        assert [batch["input_ids"].tolist() for batch in batches] == [[[*ids, 0]] * 2, [[*ids, 0]], [[*ids, 0]]]
        assert all(batch["input_ids"].dtype == np.int64 and batch["attention_mask"].dtype == bool for batch in batches)
        engine = create_engine("paddle", model, "fp32", "CPU", 1)
        found = engine.run(batches[0])
        engine.close()
        assert found["bbox_num"].tolist() == [2, 2]
        prints.append(fitted.fingerprint())
        scores.append({names[int(row[0])]: float(row[1]) for row in found["bbox"][:2]})
    assert prints[0] != prints[1]
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0]["disc"] < scores[0]["square"] < 0.5


def test_the_command_gives_another_prompt(
    tmp_path: Path, float_model: InferenceModel, capfd: pytest.CaptureFixture[str]
) -> None:
    model = text_model(tmp_path / "model")
    write_prompt(model, make_prompt("disc . a square .", input_ids=DISC))
    change = ["import", "--model_dir", str(model.directory), "--prompt", "a square . disc"]
    ids = ["--input_ids", ",".join(map(str, SQUARE))]
    assert main([*change, *ids, "--class_phrase", "Disc=disc", "Square=a square"]) == 0
    assert "the prompt is 'a square . disc .', the classes are Disc, Square" in capfd.readouterr().out
    described = model.infer_cfg()
    assert described["label_list"] == ["Disc", "Square"]
    assert described["prompt"] == {
        "text": "a square . disc .", "input_ids": SQUARE, "classes": {"Disc": [4], "Square": [1, 2]},
    }  # fmt: skip
    too_long = ["--input_ids", "101,5,5,5,5,5,1012,6,1012,102"]
    for arguments, words in (
        (change, "has no token ids"),
        ([*change, *too_long], "expected at most the 8"),
        (["import", "--model_dir", str(float_model.directory), "--prompt", "disc"], "takes no text"),
        (["import", "--model_dir", str(tmp_path / "none"), "--prompt", "disc"], "none does not exist"),
    ):
        assert main(arguments) == 2
        line = capfd.readouterr().err
        assert line.count("\n") == 1 and words in line
    assert model.infer_cfg() == described


def test_fewer_classes_than_phrases(tmp_path: Path) -> None:
    model = text_model(tmp_path / "model")
    write_prompt(model, make_prompt("disc . a square .", {"square": "a square"}, input_ids=DISC))
    decoder = decoder_of(model, {"logits": (-1, 1, 8), "boxes": (-1, 1, 4)})
    assert decoder.post.class_tokens == ((3, 4),) and decoder.post.num_classes == 1


def test_a_text_model_without_a_prompt_is_refused(tmp_path: Path, reader: Reader) -> None:
    model = text_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"takes text \(input_ids\), but no infer_cfg.yml .* prompt"):
        fit_reader(model, reader)


def test_a_model_without_text_takes_no_prompt(float_model: InferenceModel) -> None:
    assert constant_inputs(float_model) == {}
    with pytest.raises(UserError, match="takes no text"):
        write_prompt(float_model, make_prompt(TEXT, PHRASES, input_ids=IDS))


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="needs ../shared/models beside the repository")
@pytest.mark.slow
def test_a_trained_model_finds_blood_cells_by_text(tmp_path: Path) -> None:
    path = SHARED / "models" / "open_vocabulary" / "groundingdino_bccd.onnx"
    with pytest.raises(UserError, match="expected at most the 20"):
        import_onnx(
            path, tmp_path / "long", prompt=make_prompt(TEXT, TOKENS, input_ids=[*IDS[:10], *[1064] * 10, *IDS[10:]])
        )
    made = import_onnx(path, tmp_path / "made", fixed_batch=True, prompt=make_prompt(TEXT, PHRASES, input_ids=IDS))
    assert made.max_difference < 1e-4
    # The masks and position biases of the windows are not stored: 41 MB with them, 31.3 MB in the ONNX file.
    assert made.model.bytes < 34e6
    data = write_reader(tmp_path / "r.yml", SHARED / "data" / "bccd", "annotations/instances_test.json", 320)
    text = data.read_text().replace(
        "mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none",
        "mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]",
    )
    data.write_text(text)
    reader = fit_reader(made.model, Reader.load(data)).reader
    first = next(iter(reader.loader("eval", batch_size=1)))
    engine = create_engine("openvino", made.model, "fp32", "CPU", 2)
    found = engine.run(first)
    assert evaluate(engine, reader, "eval", limit=12, progress=False).map > 0.4
    # Another order of the phrases finds the same cells, as other classes.
    other = [101, 1064, 1012, 1076, 1037, 1042, 1012, 1067, 1037, 1042, 1012, 102]
    text = "platelet . white blood cell . red blood cell ."
    write_prompt(made.model, make_prompt(text, dict(reversed(PHRASES.items())), input_ids=other))
    again = create_engine("openvino", made.model, "fp32", "CPU", 2).run({**first, **constant_inputs(made.model)})
    sure = [out["bbox"][out["bbox"][:, 1] > 0.5] for out in (found, again)]
    assert len(sure[0]) > 3 and abs(len(sure[0]) - len(sure[1])) <= 2
    assert sorted(sure[0][:3, 0]) == sorted(2 - sure[1][:3, 0])
