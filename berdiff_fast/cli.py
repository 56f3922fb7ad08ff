# SPDX-License-Identifier: Apache-2.0
"""The command ``berdiff-fast``: arguments in, calls, words out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from berdiff_fast import __version__, demo, info, training, words
from berdiff_fast.backends.select import BACKENDS
from berdiff_fast.files import write_text
from berdiff_fast.schedule import METHODS, SPACINGS

_EPILOG = """\
examples:
  berdiff-fast demo
  berdiff-fast sample ct.nii.gz --center 214 130 --slices 80 96 --output masks
  berdiff-fast COMMAND --help                          more of each

exit status: 0 done; 1 an error, in one line on stderr (--debug shows where); 2 wrong usage; 130 interrupted by Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="berdiff-fast",
        description="Bernoulli diffusion for segmentation, fast.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"berdiff-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "demo",
        help="draw masks for a few CT slices with the bundled model and write one PNG",
        epilog="example: berdiff-fast demo --output demo.png --seed 7",
    )
    command.add_argument("--output", default="demo.png", help="the picture (default: %(default)s)")
    command.add_argument("--data", help="HDF5 file of slices with raters' masks (default: procedural slices)")
    command.add_argument("--slices", type=int, default=3, help="how many slices (default: %(default)s)")
    command.add_argument("-n", "--n", type=int, default=16, help="masks per slice (default: %(default)s)")
    command.add_argument("--steps", type=int, default=10, help="sampling steps (default: %(default)s)")
    command.add_argument("--seed", type=int, default=7, help="seed of the masks (default: %(default)s)")
    command.add_argument("--backend", default="auto", choices=["auto", *sorted(BACKENDS)])
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_demo)

    command = commands.add_parser("info", help="versions, backends, and why each missing one is missing")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=lambda options: info.main(["--json"] if options.json else []))

    _add_sample(commands)
    _add_report(commands)
    _add_import(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_bench(commands)

    command = commands.add_parser(
        "completion",
        help="print what makes a shell complete this command",
        epilog='example: eval "$(berdiff-fast completion bash)"',
    )
    command.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    command.set_defaults(run=_completion)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"berdiff-fast {options.command}: {words.line(error)}", file=sys.stderr)
        return 1


_SAMPLE_EPILOG = """\
INPUT is a NIfTI (.nii, .nii.gz), NRRD, MetaImage (.mha) or DICOM file, a folder with a DICOM series, a picture
(.png, .tif, .jpg), a NumPy (.npy) or an HDF5 file (dataset "image").

examples:
  berdiff-fast sample ct.nii.gz --output masks --center 214 130 --slices 80 96 --seed 7 --report
  berdiff-fast sample dicom/ --output masks --roi 150 278 90 218
  berdiff-fast sample slice.png --model runs/lidc/model.safetensors --n 32 --output masks

Written are n masks, their mean and their disagreement (entropy, in bits) on the grid of INPUT, as NIfTI for DICOM, with
DICOM segmentations beside; summary.json has sizes and how it was done. The bundled model lidc was trained on 128 x 128
cuts with a nodule in the middle: give it a --center or --center-mm. Slices, rows, columns and masks are counted from 0.
Not a medical device. More: docs/scans.md
"""


def _add_sample(commands: Any) -> None:
    command = commands.add_parser(
        "sample",
        help="draw masks of a scan or a picture, on its own grid; the same command again goes on after an interruption",
        epilog=_SAMPLE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("input", help="a file, or a folder with a DICOM series")
    command.add_argument("--output", required=True, help="the folder of results")
    command.add_argument("--model", default="lidc", help="a bundled model or a file (default: %(default)s)")
    command.add_argument("-n", "--n", type=int, default=16, help="masks (default: %(default)s)")
    command.add_argument("--steps", type=int, default=10, help="sampling steps (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    command.add_argument("--method", default="ddim", choices=METHODS, help="(default: %(default)s)")
    command.add_argument("--spacing", choices=SPACINGS, help="of timesteps (default: the model's)")
    command.add_argument(
        "--plane", default="axial", choices=["axial", "coronal", "sagittal"], help="(default: %(default)s)"
    )
    command.add_argument(
        "--slices", type=int, nargs=2, metavar=("FIRST", "END"), help="only from FIRST to before END, counted from 0"
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--center", type=float, nargs=2, metavar=("ROW", "COLUMN"), help="pixel in the middle of a cut")
    where.add_argument(
        "--center-mm",
        type=float,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="the same by its place in the patient, in mm to the left, back and head (LPS, as DICOM has it; of a point "
        "in RAS, as NIfTI has it, give -X -Y Z)",
    )
    where.add_argument(
        "--roi", type=int, nargs=4, metavar=("ROW", "END", "COLUMN", "END"), help="rows and columns to keep to"
    )
    command.add_argument("--overlap", type=float, default=0.25, help="of tiles (default: %(default)s)")
    command.add_argument(
        "--modes",
        nargs="+",
        metavar="CLASS",
        help="of a model with a mode prior: only masks of these size classes, or: non-empty",
    )
    command.add_argument("--series", metavar="UID", help="of a DICOM folder that holds several")
    command.add_argument(
        "--raters",
        nargs="+",
        default=[],
        metavar="FILE",
        help="masks to compare with, on the same grid, DICOM SEG or RTSTRUCT (FILE#NAME: one of several structures)",
    )
    command.add_argument("--report", action="store_true", help="also write report.html, to look at")
    command.add_argument("--anonymize", action="store_true", help="name no file in report.html and summary.json")
    command.add_argument("--winograd", action="store_true", help="faster on a CPU, for a digit less")
    command.add_argument("--max-batch", type=int, metavar="MASKS", help="per call of the network")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace earlier results")
    command.add_argument("--quiet", action="store_true", help="no progress bar, no words but errors")
    command.add_argument("--json", action="store_true", help="print the summary as JSON")
    command.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> int:
    from berdiff_fast import results, scans
    from berdiff_fast.imaging import volumes
    from berdiff_fast.io import raters as raters_io
    from berdiff_fast.model import load

    device = _device(options.device)
    volume = volumes.read(options.input, series=options.series)
    if options.series is not None and volume.format != "dicom":
        raise ValueError(f"series: {options.input} is not a DICOM folder")
    theirs = raters_io.read(options.raters, volume)
    raters = results.check_raters(theirs, volume)
    model = load(options.model).to(device)
    given: dict[str, Any] = dict(
        seed=options.seed,
        plane=options.plane,
        slices=options.slices and tuple(options.slices),
        center=options.center and tuple(options.center),
        center_mm=options.center_mm and tuple(options.center_mm),
        roi=options.roi and tuple(options.roi),
        overlap=options.overlap,
        method=options.method,
        spacing=options.spacing,
        max_batch=options.max_batch,
        prepare="winograd" if options.winograd else True,
    )
    if options.modes is not None:
        asked = options.modes
        given["modes"] = asked[0] if not asked[0].isdecimal() else [int(w) if w.isdecimal() else w for w in asked]
    with (
        words.silence("berdiff_fast.hints", options.quiet),
        results.folder(options.output, volume, options.n, raters=theirs, overwrite=options.overwrite) as work,
    ):
        sampled = scans.sample_volume(
            model, volume, options.n, options.steps, work=work, progress=not options.quiet, **given
        )
        told = results.provenance(
            volume,
            sampled,
            options.model,
            scans.fingerprint(model),
            device,
            options.series,
            theirs,
            anonymize=options.anonymize,
        )
        summary = results.write(
            sampled,
            options.output,
            work,
            provenance=told,
            raters=raters,
            report=options.report,
            anonymize=options.anonymize,
        )
    if options.json:
        print(json.dumps(summary))
    elif not options.quiet:
        print(words.shown(results.as_text(summary, options.output), lines=True))
    return 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto, or one that torch can use here, got {name!r} ({reason})") from None
    return name


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="write report.html, to look at, for results of sample",
        epilog="example: berdiff-fast report masks/ --raters reader1.nii.gz reader2.nii.gz",
    )
    command.add_argument("folder", help="of results")
    command.add_argument("--input", metavar="FILE", help="the scan, if it is no longer where it was")
    command.add_argument("--raters", nargs="+", default=[], metavar="FILE", help="masks to compare with (see sample)")
    command.add_argument("--anonymize", action="store_true", help="name no file, in a report to be passed on")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from berdiff_fast import results

    written = results.report_again(options.folder, options.input, options.raters, anonymize=options.anonymize)
    print(words.shown(str(written)))
    return 0


def _add_train(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train a model on an HDF5 file of slices with raters' masks; the same command again resumes",
        epilog="example: berdiff-fast train --config lidc --train-data train.h5 --val-data val.h5 --output runs/lidc\n"
        "several GPUs: accelerate launch -m berdiff_fast.cli train ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from berdiff_fast.training import config

    config.add_arguments(command)
    command.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    training.require()
    from berdiff_fast.training import config, loop

    run = config.from_arguments(options)
    path = loop.train(run)
    if not run.quiet:
        print(words.shown(str(path)))
    training.leave()
    return 0


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="compare a model's masks with the raters' on an HDF5 file, beside simple yardsticks",
        epilog="example: berdiff-fast evaluate --model lidc --data val.h5 --output results --slices 200\n"
        "several GPUs: accelerate launch -m berdiff_fast.cli evaluate ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--model", required=True, help="a bundled model, a directory or a .safetensors file")
    command.add_argument("--data", required=True, help="HDF5 file of slices with raters' masks")
    command.add_argument("--output", required=True, help="folder for the table, the summary and the picture")
    command.add_argument("--slices", type=int, help="how many slices, drawn by the seed (default: all)")
    # Under torchrun --n is ambiguous: its own options are matched by their beginnings.
    command.add_argument(
        "-n", "--n", "--samples", dest="n", type=int, default=16, help="masks per slice (default: %(default)s)"
    )
    command.add_argument("--steps", type=int, default=10, help="sampling steps (default: %(default)s)")
    command.add_argument("--method", default="ddim", choices=METHODS, help="sampler (default: %(default)s)")
    command.add_argument("--leave-one-out", action="store_true", help="the leave-one-out shift of the logits")
    command.add_argument("--spacing", choices=SPACINGS, help="of timesteps (default: the model's own)")
    command.add_argument("--seed", type=int, default=0, help="of masks and choice of slices (default: %(default)s)")
    command.add_argument("--batch", type=int, default=8, help="slices at a time (default: %(default)s)")
    command.add_argument("--table", default="csv", choices=["csv", "parquet"], help="(default: %(default)s)")
    command.add_argument("--save-masks", action="store_true", help="keep all masks in masks.h5")
    command.add_argument("--device", default="auto", choices=["auto", "cpu"], help="(default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print the summary as JSON")
    command.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    training.require()
    from accelerate import PartialState

    from berdiff_fast.data.hdf5 import RaterDataset
    from berdiff_fast.model import load
    from berdiff_fast.training import evaluate

    state = PartialState(cpu=training.on_cpu(options.device))
    model = load(options.model).to(state.device)
    summary = evaluate.evaluate(
        model,
        RaterDataset(options.data),
        options.output,
        count=options.slices,
        n=options.n,
        steps=options.steps,
        method=options.method,
        leave_one_out=options.leave_one_out,
        spacing=options.spacing or model.spacing,
        seed=options.seed,
        batch=options.batch,
        table=options.table,
        save_masks=options.save_masks,
        name=Path(options.model).name,  # without folders
    )
    if state.is_main_process:
        print(json.dumps(summary) if options.json else evaluate.as_text(summary))
    training.leave()
    return 0


_BENCH_EPILOG = """\
examples:
  berdiff-fast bench --quick                       under five minutes on a laptop
  berdiff-fast bench --output bench/               everything; writes bench.json, bench.md and bench.png
  berdiff-fast bench --only call                   cases whose name or group contains a word
  berdiff-fast bench --from bench/bench.json --update README.md
"""


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="time kernels and whole calls against plain PyTorch on this machine",
        description="Every contender's result is checked before it is timed, and they are timed in turns.",
        epilog=_BENCH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--output", default="bench", help="folder for JSON, table and picture (default: %(default)s)")
    command.add_argument("--append", action="store_true", help="keep the other cases of an earlier run of this day")
    command.add_argument("--quick", action="store_true", help="leave out what takes minutes on a laptop")
    command.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    command.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with one of these words")
    command.add_argument(
        "--contenders", nargs="+", default=[], metavar="WORD", help="these, and what they are compared with"
    )
    command.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(default: %(default)s)")
    command.add_argument(
        "--published", metavar="CHECKOUT", help="a checkout of the published code, which is run and timed too"
    )
    command.add_argument("--from", dest="source", metavar="JSON", help="measure nothing, take what was measured before")
    command.add_argument(
        "--update", nargs="+", default=[], metavar="FILE", help="Markdown files with places for tables to fill"
    )
    command.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    import torch

    from berdiff_fast.bench import cases, report
    from berdiff_fast.bench.runner import Settings

    if options.source:
        measured = json.loads(Path(options.source).read_text(encoding="utf-8"))
    else:
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = [
            case
            for case in cases.registry(
                device, quick=options.quick, compile=options.compile and not options.quick, published=options.published
            )
            if not options.only or any(w in f"{case.group} {case.name}" for w in options.only)
        ]
        if not chosen:
            raise ValueError(f"only: no case has one of {options.only} in its name or group")
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        settings = Settings(device, seconds=10.0 if options.quick else 60.0, contenders=options.contenders)
        file = folder / "bench.json"
        former = json.loads(file.read_text(encoding="utf-8")) if options.append and file.is_file() else None
        measured = report.measure(chosen, settings, file, former=former)
        write_text(folder / "bench.md", report.tables(measured))
        try:
            report.plot(measured, folder / "bench.png")
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)
        print(f"written: {words.shown(str(folder))}")
    for path in options.update:
        if not report.update(path, measured):
            raise ValueError(f"update: {path} has no place for a table, such as <!-- bench: call --> <!-- /bench -->")
    return 0


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise ImportError('shtab is needed for this, and missing: pip install "berdiff_fast[completion]"') from None
    print(shtab.complete(build_parser(), options.shell))
    return 0


def _demo(options: argparse.Namespace) -> int:
    result = demo.run(
        options.output,
        data=options.data,
        slices=options.slices,
        n=options.n,
        steps=options.steps,
        seed=options.seed,
        backend=options.backend,
    )
    if options.json:
        numbers = ("seconds", "network_seconds", "step_seconds", "backend", "ged", "majority_ged")
        print(json.dumps({**{name: getattr(result, name) for name in numbers}, "picture": str(result.picture)}))
        return 0
    drawn, size = options.slices * options.n, " x ".join(map(str, result.masks.shape[-2:]))
    print(f"{drawn} masks ({options.n} for each of {options.slices} slices of {size}) in {options.steps} steps")
    print(f"  whole call    {result.seconds:8.2f} s")
    print(f"  network       {result.network_seconds:8.2f} s  ({result.network_seconds / result.seconds:.1%})")
    print(f"  step kernel   {result.step_seconds:8.4f} s  ({result.step_seconds / result.seconds:.2%})")
    print(f"  backend       {result.backend}")
    print(f"  GED           {result.ged:8.3f}    (the raters' majority instead: {result.majority_ged:.3f})")
    print(f"picture: {words.shown(str(result.picture))}")
    return 0


_IMPORT_EPILOG = """\
layouts (--layout auto tells them apart):
  slices   PATIENT/NODULE/{images,mask-0,mask-1,...}/slice-N.png
  cimd     CASE/{image_N.jpg,label0_.jpg,label1_.jpg,...}
  berdiff  {train,val,test}/{images/PATIENT/z-105.0_c0.png,gt/PATIENT/z-105.0_c0_l0.png,...}
  plain    {images,masks_0,masks_1,...}/NAME.png

examples:
  berdiff-fast import LIDC-slices data/lidc
  berdiff-fast import tree data/mine --split 80/10/10 --seed 3 --on-error skip
  berdiff-fast import tree data/mine --split-file data/lidc/splits.json
  berdiff-fast import tree data/mine --size 128 128 --crop
  berdiff-fast import ct data/ct --layout plain --window -1000 400 --patient-pattern '(?P<patient>[^-]+)-'

Nothing is written unless everything is. Hounsfield units are lost: images become 8 bits. More: docs/data.md
"""


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "import",
        help="turn a tree of PNG, JPEG, TIFF or NPY files into HDF5 files for training, split by patient",
        epilog=_IMPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", help="the tree's root")
    command.add_argument("output", help="the folder to write")
    command.add_argument("--layout", default="auto", help="auto, slices, cimd, berdiff or plain (default: %(default)s)")
    command.add_argument("--split", help="train/val/test in per cent (default: the tree's own splits, else 70/10/20)")
    command.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    command.add_argument("--split-file", metavar="JSON", help="the splits.json of another import, instead")
    command.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="in pixels (default: of the first slice)"
    )
    fit = command.add_mutually_exclusive_group()
    fit.add_argument("--resize", dest="fit", action="store_const", const="resize", help="resize slices to --size")
    fit.add_argument("--crop", dest="fit", action="store_const", const="crop", help="cut --size out of their middle")
    command.add_argument("--raters", type=int, metavar="R", help="masks per slice (default: as many as are found)")
    command.add_argument("--missing-mask", default="error", help="error or empty (default: %(default)s)")
    command.add_argument(
        "--on-error", default="stop", help="stop, or skip slices with a bad file (default: %(default)s)"
    )
    command.add_argument("--threshold", type=float, metavar="SHARE", help="of masks (default: 0.5 for JPEG, else none)")
    command.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="become 0 and 255 (default: each slice's range)"
    )
    command.add_argument(
        "--patient-pattern", metavar="REGEX", help="finds the patient in a plain tree's names (default: up to a '_')"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    command.add_argument("--no-preview", dest="preview", action="store_false", help="do not write preview.png")
    command.add_argument("--quiet", action="store_true", help="no progress bar, no words but errors")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_import, fit="exact")


def _import(options: argparse.Namespace) -> int:
    # Imported here: no other command reads files of pictures.
    from berdiff_fast.data import importers

    names = ("split_file", "size", "fit", "raters", "missing_mask", "on_error", "threshold", "window", "overwrite")
    given = {name: getattr(options, name) for name in (*names, "preview")}
    if options.patient_pattern is not None:
        given["patient_pattern"] = options.patient_pattern
    report = importers.import_tree(
        options.source,
        options.output,
        options.layout,
        options.split,
        options.seed,
        progress=not options.quiet,
        **given,
    )
    if options.json:
        print(report.to_json(), end="")
    elif not options.quiet:
        print(words.shown(report.to_text(), lines=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
