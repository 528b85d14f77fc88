"""The compression config: ``config.load_config``, with Paddle's classes that it names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from act_pipeline.config import load_config
from tests.fuzz.harness import Target
from tests.fuzz.mutate import ODD_NUMBERS, odd_values, trees, yaml_files

ROOT = Path(__file__).resolve().parents[3]
FILES = (
    "configs/sample.yml",
    "configs/sample_qat_dis.yml",
    "configs/sample_ptq.yml",
    "configs/act/rtdetr_r18vd_qat_dis.yaml",
)


def _examples(folder: Path) -> st.SearchStrategy[Any]:
    import paddle

    texts = [(ROOT / name).read_text(encoding="utf-8") for name in FILES]
    files = yaml_files(texts).map(lambda content: (content, ()))
    classes = {
        (place, name): list(inspect.signature(found.__init__).parameters)[1:]
        for place, module in (
            ("learning_rate", paddle.optimizer.lr),
            ("optimizer_builder.optimizer", paddle.optimizer),
            ("optimizer_builder.regularizer", paddle.regularizer),
            ("optimizer_builder.grad_clip", paddle.nn),
        )
        for name, found in vars(module).items()
        if inspect.isclass(found) and (module is not paddle.nn or name.startswith("Clip"))
    }
    arguments = st.one_of(
        st.sampled_from(ODD_NUMBERS), st.floats(0, 1), st.integers(0, 100), st.lists(st.integers(0, 9)), odd_values()
    )

    @st.composite
    def named_class(draw: st.DrawFn) -> str:
        place, name = draw(st.sampled_from(sorted(classes)))
        chosen = draw(st.lists(st.sampled_from(classes[place, name] or ["type"]), unique=True))
        body = {"type": name, **{argument: draw(arguments) for argument in chosen}}
        return f"TrainConfig.{place}={_flow(body)}"

    overrides = st.one_of(
        named_class(),
        st.builds(
            "{}={}".format,
            st.sampled_from(
                [
                    "TrainConfig.train_iter",
                    "Global.input_list",
                    "Distillation.node",
                    "a.b",
                    "TrainConfig",
                    "SmoothQuant",
                ]
            ),
            trees([1, {"a": [1, 2]}, [["a"], ["b"]]]).map(_flow),
        ),
        st.text(max_size=30),
    )
    valid = texts[1].encode()
    return st.one_of(files, st.tuples(st.just(valid), st.lists(overrides, min_size=1, max_size=2).map(tuple)))


def _flow(value: Any) -> str:
    import json

    return json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")


def _read(folder: Path, example: tuple[bytes, tuple[str, ...]]) -> None:
    content, overrides = example
    path = folder / "config.yml"
    path.write_bytes(content)
    config = load_config(path, overrides)
    config.as_dict()
    config.smooth_quant.alphas  # noqa: B018  (a property that reads)
    config.quant_post.images  # noqa: B018  (a property that reads)
    if config.trains:
        config.to_act()


CONFIG = Target("config", _examples, _read)
