# SPDX-License-Identifier: Apache-2.0
"""How each kind of file is read: by the call that its users make, and what has to hold where it is read.

What is raised is judged in ``run``. An ``AssertionError`` from here is a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fuzzing import mutate
from fuzzing.corpus import FOLDER
from fuzzing.mutate import Mutator, any_bytes, fields, header_of
from fuzzing.mutate_libraries import dicom_elements, hdf5_objects


@dataclass(frozen=True)
class Reader:
    """A way to read.

    Attributes:
        seeds: patterns of files in the corpus. A mutant lies where its seed lay, beside copies of the others there.
        read: takes the mutant's path; raises what the reader raises.
        mutators: of bytes, and of what the format says.
        raises: what it may raise, beside ValueError and OSError.
        named: whether the message has to name the file, or the folder that it is in.
        known: what comes of the seeds themselves.
    """

    seeds: tuple[str, ...]
    read: Callable[[Path], None]
    mutators: tuple[Mutator, ...]
    raises: tuple[type[Exception], ...] = ()
    named: bool = True
    known: str = "read"

    def files(self) -> list[Path]:
        return sorted(path for pattern in self.seeds for path in FOLDER.glob(pattern) if path.is_file())


# ---------------------------------------------------------------------- scans


def volume(path: Path) -> None:
    """Read, and masks written on its grid lie there."""
    from berdiff_fast.imaging import volumes

    read = volumes.read(path)
    check(read)
    if read.format in ("nifti", "nrrd", "metaimage", "dicom"):
        mask = read.array > np.median(read.array)
        written = path.parent / ("written" + {"nrrd": ".nrrd", "metaimage": ".mha"}.get(read.format, ".nii.gz"))
        volumes.write(written, mask, read)
        again = volumes.read(written)
        check(again)
        assert np.array_equal(again.array != 0, mask), "a mask came back with other voxels"
        assert again.spacing is None or read.spacing is not None, "a spacing was made up"
        if read.spacing is not None:
            assert again.spacing is not None, "the spacing was lost"
            sizes = np.array(read.array.shape[::-1]) - 1
            for corner in np.ndindex(2, 2, 2):
                here, there = (v.origin + v.direction @ (v.spacing * (corner * sizes)) for v in (read, again))
                scale = max(1.0, np.abs(here).max() * 1e-3)
                assert np.abs(here - there).max() < 0.02 * scale * max(1.0, *read.spacing), "a mask lies elsewhere"


def check(read) -> None:
    assert read.array.ndim == 3, "not three dimensions"
    assert read.array.size, "empty"
    assert read.array.dtype.kind in "biuf", "no numbers"
    assert read.array.dtype.isnative, "foreign order of bytes"
    assert np.isfinite(read.array).all(), "not finite"
    assert read.spacing is None or all(0 < x < np.inf for x in read.spacing), "no spacing"
    assert np.isfinite(read.origin).all(), "no origin"
    assert np.abs(read.direction.T @ read.direction - np.eye(3)).max() < 1e-2, "no rotation"
    read.fingerprint()


def series(path: Path) -> None:
    from berdiff_fast.imaging import volumes

    check(volumes.read(path.parent))


def rater(path: Path) -> None:
    from berdiff_fast.imaging import volumes
    from berdiff_fast.io import raters

    scan = volumes.read(FOLDER / "dicom" / "series")
    (found,) = raters.read([path], scan)
    assert found.array.shape == scan.array.shape, "a rater of another shape"


def imported(path: Path) -> None:
    """A tree of pictures, one of which is the mutant, as an image and as a mask."""
    import shutil

    from berdiff_fast.data.hdf5 import RaterDataset
    from berdiff_fast.data.importers import import_tree

    tree, output = tree_of(path, 2), path.parent.parent / "imported"
    for folder, patient in (("images", "P-0000"), ("masks_0", "P-0001")):
        (tree / folder / f"{patient}.npy").unlink()
        shutil.copy(path, tree / folder / f"{patient}{path.suffix}")
    import_tree(tree, output, layout="plain", threshold=0.5, progress=False)
    for file in output.glob("*.h5"):
        for image, masks in RaterDataset(file):
            assert image.ndim == 3, "an image of another shape"
            assert masks.ndim == 4, "masks of another shape"


def lidc(path: Path) -> None:
    """A CT series with its reading, one of which is the mutant."""
    from berdiff_fast.data.hdf5 import RaterDataset
    from berdiff_fast.data.importers import import_tcia

    output = path.parent.parent / "imported"
    import_tcia(path.parent, output, size=(16, 16), progress=False)
    for file in output.glob("*.h5"):
        for image, masks in RaterDataset(file):
            assert image.shape == (1, 16, 16), "an image of another shape"
            assert masks.any(), "a slice in which nobody marked anything"


def tree_of(path: Path, patients: int) -> Path:
    """A sound tree beside the mutant's folder."""
    tree = path.parent.parent / "tree"
    for folder in ("images", "masks_0"):
        (tree / folder).mkdir(parents=True)
        for number in range(patients):
            np.save(tree / folder / f"P-{number:04d}.npy", np.eye(14, 18, dtype=np.uint8) * 255)
    return tree


# ---------------------------------------------------------------------- data and models


def slices(path: Path) -> None:
    from berdiff_fast.data.hdf5 import RaterDataset, check_disjoint

    for in_memory in (False, True):
        data = RaterDataset(path, in_memory=in_memory)
        for index in range(min(len(data), 4)):
            image, masks = data[index]
            assert image.ndim == 3, "an image of another shape"
            assert masks.ndim == 4, "masks of another shape"
            data.describe(index)
        try:
            check_disjoint(data, RaterDataset(FOLDER / "hdf5" / "plain.h5"))
        except ValueError as error:
            if "are in both" not in str(error):
                raise


def model(path: Path) -> None:
    import torch

    import berdiff_fast as bf

    loaded = bf.load(path)
    weights = safe_tensors(FOLDER / "models" / "model.safetensors")
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, weights[name]), f"{name} is another, and nothing was said"


def safe_tensors(path: Path):
    import safetensors.torch

    return safetensors.torch.load_file(path)


def checkpoint(path: Path) -> None:
    """The newest that can be read is one of those that were written."""
    import torch

    from berdiff_fast.training import checkpoints

    found = checkpoints.newest(path.parent)
    if found is not None and '"sha256' in found.path.read_bytes().decode("latin-1").replace("\\", ""):
        for name, value in safe_tensors(FOLDER / "checkpoints" / found.path.name).items():
            assert torch.equal(value, found.tensors[name]), f"{name} is another, and nothing was said"


def official(path: Path) -> None:
    import torch

    from berdiff_fast.network.official import read_state_dict

    assert all(isinstance(value, torch.Tensor) for value in read_state_dict(path).values()), "no tensors"


# ---------------------------------------------------------------------- texts and results


def config(path: Path) -> None:
    from berdiff_fast import cli

    words = ["--config", str(path), "--train-data", "data.h5", "--output", "run"]
    cli.command("train").parse("berdiff-fast train", words).checked()


def splits(path: Path) -> None:
    from berdiff_fast.data.importers import import_tree

    output = path.parent.parent / "imported"
    import_tree(tree_of(path, 5), output, layout="plain", split_file=path, threshold=0.5, progress=False)


def report(path: Path) -> None:
    """A report of results, one of whose files is the mutant; nothing but the report is written."""
    from berdiff_fast.scans import results

    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    try:
        results.report_again(path.parent)
    finally:
        after = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.name != "report.html"}
        assert before == after, "files of results changed"


def overwrite(path: Path) -> None:
    """Results are replaced, or stay as they were."""
    from berdiff_fast import cli

    folder = path.parent
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    words = ["--debug", "sample", str(folder / "scan.npy"), "--output", str(folder), "--n", "2", "--steps", "2"]
    words += ["--model", str(FOLDER / "models" / "model.safetensors"), "--device", "cpu", "--quiet", "--overwrite"]
    try:
        cli.main(words)
    except Exception:
        assert before == {file.name: file.read_bytes() for file in folder.iterdir()}, "results changed"
        raise
    for name in ("mask_000.npy", "mask_001.npy"):
        assert (folder / name).read_bytes() == (FOLDER / "results" / name).read_bytes(), "other masks"


def unfinished(path: Path) -> None:
    """What is done of unfinished work is what was done."""
    from berdiff_fast.scans.store import Store

    store = Store(path.parent, (FOLDER / "unfinished" / "plan.json").read_text(), (1, 3, 8, 8), 0)
    whole = np.load(FOLDER / "unfinished" / "bits.npy")
    for index in range(3):
        expected = whole[:, index] if index in store.done else np.zeros_like(whole[:, index])
        assert np.array_equal(store.bits[:, index], expected), "other bits, and nothing was said"
    store.put(2, whole[:, 2])


def measured(path: Path) -> None:
    """Tables of what ``bench`` measured before."""
    from berdiff_fast import cli

    cli.main(["--debug", "bench", "--from", str(path), "--output", str(path.parent / "bench")])


# ---------------------------------------------------------------------- all of them

_NIFTI_1 = fields(
    (0, "<i"), *((k, "<h") for k in range(40, 56, 2)), *((k, "<h") for k in (68, 70, 72, 74, 252, 254)),
    *((k, "<f") for k in (*range(76, 108, 4), 108, 112, 116, *range(256, 328, 4))), (123, "<B"), (344, "<I"),
)  # fmt: skip
_NIFTI_2 = fields(
    (0, "<i"), (12, "<h"), (14, "<h"), *((k, "<q") for k in range(16, 80, 8)), (168, "<q"),
    *((k, "<d") for k in (*range(104, 168, 8), 176, 184, *range(352, 496, 8))), *((k, "<i") for k in (344, 348, 500)),
)  # fmt: skip
_NIFTI_BIG = fields(
    (0, ">i"), *((k, ">h") for k in range(40, 56, 2)), *((k, ">h") for k in (70, 72, 252, 254)),
    *((k, ">f") for k in (*range(76, 108, 4), 108, 112, 116, *range(256, 328, 4))),
)  # fmt: skip

_NRRD = mutate.text_fields(
    ": ",
    (
        "spacings: 1 1 2", "axis mins: 0 0 0", "space: scanner-xyz", "space units: \"m\" \"m\" \"m\"", "byte skip: 4",
        "byte skip: -1", "line skip: 1", "data file: /etc/passwd", "data file: LIST", "data file: v%03d.raw 1 4 1",
        "centers: cell cell cell", "measurement frame: (1,0,0) (0,1,0) (0,0,1)", "key:=value", "# note",
        "encoding: gzip",
        "encoding: bzip2", "type: block", "block size: 4", "kinds: vector domain domain", "thicknesses: 1 1 1",
        "sample units: HU", "old min: 0", "content: x", "number: 480", "min: 1", "old max: nan", "endian: big",
    ),
)  # fmt: skip
_META = mutate.text_fields(
    " = ",
    (
        "NDims = 100", "ElementSize = 1 1 1", "ElementNumberOfChannels = 3", "HeaderSize = -1", "HeaderSize = 10",
        "ElementDataFile = /etc/passwd", "ElementDataFile = LIST 2D", "ElementDataFile = s%d.raw 1 4 1",
        "Modality = MET_MOD_CT",
        "CompressedData = True", "CompressedDataSize = 10", "BinaryData = False", "ElementByteOrderMSB = True",
        "Position = 1 2 3", "Orientation = 0 1 0 1 0 0 0 0 1", "ElementType = MET_FLOAT_ARRAY", "DistanceUnits = m",
        "ElementMin = nan", "Comment = x", "ObjectType = Tube", "ObjectSubType = HFieldDeformation",
        "ID = 99999999999",
        "SequenceID = 1 2 3", "Color = 1 2", "ElementToIntensityFunctionSlope = 2",
        "AnatomicalOrientation = ??????????????",
    ),
)  # fmt: skip


READERS: dict[str, Reader] = {
    "nifti": Reader(("nifti/scan.nii",), volume, (header_of(352), _NIFTI_1, _NIFTI_1)),
    "nifti-2": Reader(("nifti/two.nii",), volume, (header_of(540), _NIFTI_2, _NIFTI_2)),
    "nifti-big": Reader(("nifti/big.nii",), volume, (header_of(352), _NIFTI_BIG)),
    "nifti-gz": Reader(("nifti/scan.nii.gz",), volume, (any_bytes, mutate.inside_gzip(_NIFTI_1))),
    "nrrd": Reader(("nrrd/*.nrrd", "nrrd/*.nhdr"), volume, (header_of(260), _NRRD, _NRRD)),
    "metaimage": Reader(("metaimage/*.mha", "metaimage/*.mhd"), volume, (header_of(310), _META, _META)),
    "dicom": Reader(("dicom/one/*.dcm",), volume, (header_of(1000), dicom_elements, dicom_elements)),
    "dicom-series": Reader(("dicom/series/*.dcm",), series, (header_of(1000), dicom_elements)),
    "dicom-enhanced": Reader(("dicom/enhanced/*.dcm",), volume, (header_of(2700), dicom_elements, dicom_elements)),
    "dicom-masks": Reader(("dicom/masks/*.dcm",), rater, (header_of(4300), dicom_elements, dicom_elements)),
    "lidc": Reader(("lidc/*.xml",), lidc, (any_bytes, mutate.xml_elements, mutate.xml_elements), named=False),
    "lidc-ct": Reader(("lidc/*-002.dcm",), lidc, (header_of(700), dicom_elements), named=False),
    "png": Reader(("pictures/*.png",), volume, (any_bytes, mutate.png_chunks, mutate.png_chunks)),
    "jpeg": Reader(("pictures/*.jpg",), volume, (any_bytes, mutate.jpeg_segments)),
    "tiff": Reader(("pictures/*.tif",), volume, (any_bytes, mutate.tiff_entries, mutate.tiff_entries)),
    "npy": Reader(("numpy/[gv]*.npy",), volume, (header_of(128), mutate.npy_header)),
    "npz": Reader(("numpy/archive.npy",), volume, (any_bytes, mutate.zip_members(header_of(128))), known="refused"),
    "hdf5-scan": Reader(("hdf5/*.h5",), volume, (header_of(4000), hdf5_objects)),
    "hdf5-slices": Reader(("hdf5/*.h5",), slices, (header_of(8000), hdf5_objects, hdf5_objects)),
    "import": Reader(("pictures/grey.*", "numpy/grey.npy"), imported, (any_bytes,), named=False),
    "model": Reader(
        ("models/model.safetensors",), model, (header_of(6000), mutate.safetensors_header, mutate.safetensors_header)
    ),
    "checkpoint": Reader(
        ("checkpoints/step-00000002.safetensors",), checkpoint, (header_of(2500), mutate.safetensors_header)
    ),
    "official-zip": Reader(
        ("official/zip.pt",), official, (any_bytes, mutate.zip_members(any_bytes), mutate.zip_members(any_bytes))
    ),
    "official": Reader(("official/legacy.pt", "official/plain.safetensors"), official, (any_bytes,)),
    "config": Reader(("texts/config.yaml",), config, (any_bytes, mutate.yaml_text, mutate.yaml_text), (TypeError,)),
    "splits": Reader(("texts/splits.json",), splits, (any_bytes, mutate.json_text)),
    "report": Reader(("results/summary.json",), report, (any_bytes, mutate.json_text, mutate.json_text)),
    "report-masks": Reader(("results/m*.npy", "results/scan.npy"), report, (header_of(128), mutate.npy_header)),
    "overwrite": Reader(("results/summary.json",), overwrite, (any_bytes, mutate.json_text, mutate.json_text)),
    "unfinished": Reader(("unfinished/*",), unfinished, (any_bytes,)),
    "measured": Reader(("texts/bench.json",), measured, (any_bytes, mutate.json_text)),
}
