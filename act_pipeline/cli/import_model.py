"""Import a detector of another format as a float model that can be compressed.

An ONNX file (compared with ONNX Runtime), a folder of Paddle 3 or of Hugging Face's RT-DETR, or a checkpoint of
lyuwenyu/RT-DETR. With --model_dir and --prompt: give an imported model, float or INT8, another prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from act_pipeline.cli.flags import Parser
from act_pipeline.core.errors import UserError

if TYPE_CHECKING:
    from act_pipeline.core.artifacts import InferenceModel
    from act_pipeline.families.prompt import Prompt


def _shapes(texts: Sequence[str]) -> dict[str, list[int]]:
    """Return input name -> shape of ``NAME:1,3,640,640``; the name may be left out."""
    found = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        numbers = sizes.strip("[] ").split(",")
        if not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
            raise UserError(f"--input_shape is {text!r}, expected NAME:SIZES such as images:1,3,640,640")
        found[name.strip()] = [int(number) for number in numbers]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--onnx", metavar="FILE", help="an ONNX file of any detector")
    source.add_argument(
        "--hf", metavar="DIR", help="a folder with config.json and model.safetensors of RT-DETR or RT-DETRv2"
    )
    source.add_argument("--paddle3", metavar="DIR", help="a folder of Paddle 3 or PaddleX 3, with inference.json")
    source.add_argument("--pth", metavar="FILE", help="a checkpoint of lyuwenyu/RT-DETR; needs -c")
    source.add_argument("--model_dir", metavar="DIR", help="an imported model, float or INT8, to give another --prompt")
    parser.add_argument("-c", "--config", metavar="YAML", help="with --pth: PaddleDetection's config of the model")
    parser.add_argument(
        "-o", "--opt", action="extend", nargs="*", default=[], metavar="KEY=VALUE", help="with -c: config overrides"
    )
    parser.add_argument(
        "--input_shape",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME:SIZES",
        help="shapes of inputs whose height, width or length is open: images:1,3,640,640",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="the folder to write; default: output_inference/<name of the file>"
    )
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="with --onnx: the detector family (docs/import.md); default: by the outputs",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="with --onnx or --model_dir, for GroundingDINO: phrases separated by dots, 'a cat . a dog .'",
    )
    parser.add_argument("--vocab", metavar="FILE", help="with --prompt: the vocab.txt of its BERT tokenizer")
    parser.add_argument("--input_ids", metavar="N,N,...", help="with --prompt: its token ids, instead of --vocab")
    parser.add_argument(
        "--class_phrase",
        action="extend",
        nargs="+",
        default=[],
        metavar="CLASS=PHRASE",
        help="with --prompt: the classes of the data set by their phrases; default: every phrase is a class",
    )
    parser.add_argument(
        "--freeze",
        choices=["pixel_mask", "prompt"],
        help="with --prompt: make the mask of the pixels, or all of the prompt's inputs, constants of the model, which "
        "is faster; with 'prompt', another prompt needs another import",
    )
    parser.add_argument(
        "--mask_decoder",
        metavar="DIR",
        help="with --onnx, for the image encoder of a Segment Anything: the folder of its imported mask decoder",
    )
    parser.add_argument(
        "--images", metavar="DIR", help="pictures to compare on; default: scenes of the built-in sample"
    )
    parser.add_argument("--fixed_batch", action="store_true", help="keep the file's batch size instead of opening it")
    parser.add_argument(
        "--paddle3_python",
        metavar="PATH",
        help="with --paddle3: a Python with paddlepaddle 3.0 to 3.2 and paddle2onnx 2; default: one is installed",
    )
    arguments = parser.parse(argv)
    through_onnx = arguments.onnx is not None or arguments.paddle3 is not None
    if not through_onnx:
        _refuse(arguments, "--onnx and --paddle3", input_shape="--input_shape", images="--images",
                fixed_batch="--fixed_batch")  # fmt: skip
    if arguments.onnx is None:
        _refuse(arguments, "--onnx", family="--family", freeze="--freeze", mask_decoder="--mask_decoder")
    if arguments.model_dir is not None:
        _refuse(arguments, "an import", output="--output")
        if arguments.prompt is None:
            raise UserError("--model_dir needs --prompt: what the model is to look for from now on")
    elif arguments.onnx is None:
        _refuse(arguments, "--onnx and --model_dir", prompt="--prompt")
    if arguments.prompt is None:
        _refuse(arguments, "--prompt", vocab="--vocab", input_ids="--input_ids", class_phrase="--class_phrase",
                freeze="--freeze")  # fmt: skip
    if arguments.paddle3 is None:
        _refuse(arguments, "--paddle3", paddle3_python="--paddle3_python")
    if arguments.pth is None:
        _refuse(arguments, "--pth", config="-c", opt="-o")
    elif arguments.config is None:
        raise UserError(
            "--pth needs -c: PaddleDetection's config of the model, such as configs/rtdetr/rtdetr_r18vd_6x_coco.yml"
        )
    if arguments.model_dir is not None:
        print(_another_prompt(arguments))
    else:
        print(_through_onnx(arguments) if through_onnx else _rtdetr(arguments))
    return 0


def _through_onnx(arguments: argparse.Namespace) -> str:
    """Import an ONNX file or a model of Paddle 3, and return what was made."""
    from act_pipeline.importers import import_onnx, import_paddle3

    output, images, fixed_batch = arguments.output, arguments.images, arguments.fixed_batch
    shapes = _shapes(arguments.input_shape)
    if arguments.onnx is not None:
        return import_onnx(
            arguments.onnx,
            output,
            input_shape=shapes,
            images=images,
            fixed_batch=fixed_batch,
            family=arguments.family,
            prompt=None if arguments.prompt is None else _prompt(arguments, arguments.onnx),
            freeze=arguments.freeze,
            mask_decoder=arguments.mask_decoder,
        ).summary()
    return import_paddle3(
        arguments.paddle3,
        output,
        python=arguments.paddle3_python,
        input_shape=shapes,
        images=images,
        fixed_batch=fixed_batch,
    ).summary()


def _another_prompt(arguments: argparse.Namespace) -> str:
    """Give an imported model another prompt, and return what it looks for."""
    from act_pipeline.core.artifacts import InferenceModel
    from act_pipeline.importers.import_model import write_prompt

    model = InferenceModel.load(arguments.model_dir)
    prompt = _prompt(arguments, model)
    write_prompt(model, prompt)
    return f"{model.infer_cfg_path}: the prompt is {prompt.text!r}, the classes are {', '.join(prompt.classes)}"


def _prompt(arguments: argparse.Namespace, model: str | InferenceModel) -> Prompt:
    """Return the prompt that the flags give.

    Args:
        arguments: the flags; ``--prompt`` is among them.
        model: the ONNX file or the imported model that is to take it.

    Raises:
        UserError: the flags are wrong, or the model takes no text.
    """
    from act_pipeline.families.prompt import make_prompt
    from act_pipeline.importers.import_model import require_text

    classes = {}
    for text in arguments.class_phrase:
        name, equals, phrase = text.partition("=")
        if not (name.strip() and equals and phrase.strip()):
            raise UserError(f"--class_phrase is {text!r}, expected CLASS=PHRASE such as 'RBC=red blood cell'")
        classes[name.strip()] = phrase.strip()
    ids = None
    if arguments.input_ids is not None:
        numbers = arguments.input_ids.split(",")
        if not all(number.strip().isdigit() for number in numbers):
            raise UserError(f"--input_ids is {arguments.input_ids!r}, expected numbers such as 101,1037,1012,102")
        ids = [int(number) for number in numbers]
    vocab = None if arguments.vocab is None else Path(arguments.vocab)
    try:
        return make_prompt(arguments.prompt, classes or None, input_ids=ids, vocab=vocab)
    except UserError:
        require_text(model)  # where the model takes no text, its tokens are not what is wrong
        raise


def _rtdetr(arguments: argparse.Namespace) -> str:
    """Import an RT-DETR by its weights, and return what was made in one line."""
    from act_pipeline.importers import import_hugging_face, import_torch_checkpoint

    source = Path(arguments.hf or arguments.pth)
    output = arguments.output or Path("output_inference", source.resolve().stem)
    if arguments.hf is not None:
        model = import_hugging_face(source, output, flag="--output")
    else:
        model = import_torch_checkpoint(source, arguments.config, output, overrides=arguments.opt, flag="--output")
    return f"imported {model.directory}: {model.bytes / 1e6:.2f} MB, an RT-DETR with its post-process"


def _refuse(arguments: argparse.Namespace, source: str, **flags: str) -> None:
    """Raise a UserError if a flag was given that only ``source`` takes."""
    for name, flag in flags.items():
        if getattr(arguments, name):
            raise UserError(f"{flag} goes with {source} only; leave it out")
