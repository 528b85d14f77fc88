"""Analyse a float detector before it is compressed: the distributions of its tensors, and which ops INT8 costs most."""

from __future__ import annotations

from collections.abc import Sequence

from act_pipeline.cli.flags import Parser, add_config, add_devices, add_opt, load_config_of


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    add_config(
        parser,
        "the config that tools/compress.py takes; Global and QuantPost are read",
        "--config_path",
    )
    parser.add_argument(
        "--output_dir", default="output/analysis", help="folder of analysis.json and the plots; default: %(default)s"
    )
    add_devices(parser, "where to run")
    add_opt(parser, "set keys of the config: QuantPost.algo=mse Global.model_dir=output/my_rtdetr")
    parser.add_argument("--images", type=int, help="calibration images; default: those of QuantPost")
    parser.add_argument("--no_sensitivity", action="store_true", help="only the distributions")
    parser.add_argument(
        "--sensitivity_images",
        type=int,
        default=8,
        help="images that sensitivities are measured on; default: %(default)s",
    )
    parser.add_argument(
        "--map_images", type=int, default=0, help="measure each op's mAP too, on so many images; default: %(default)s"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; default: %(default)s")
    parser.add_argument(
        "--executor", default="local", choices=["local", "ray"], help="where the workers are; default: %(default)s"
    )
    parser.add_argument("--ray_address", help="of the cluster, for --executor ray: auto, HOST:PORT or ray://HOST:PORT")
    arguments = parser.parse(argv)

    from act_pipeline.analysis.analyze import analyze
    from act_pipeline.analysis.table import analysis_table

    result = analyze(
        load_config_of(arguments),
        arguments.output_dir,
        device=arguments.devices,
        images=arguments.images,
        sensitivity=not arguments.no_sensitivity,
        sensitivity_images=arguments.sensitivity_images,
        map_images=arguments.map_images,
        workers=arguments.workers,
        executor=arguments.executor,
        ray_address=arguments.ray_address,
    )
    print(analysis_table(result.record))
    print(f"analysis.json and {len(result.plots)} plots: {result.directory}")
    return 0
