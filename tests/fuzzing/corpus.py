# SPDX-License-Identifier: Apache-2.0
"""Makes ``tests/corpus``, the sound files that mutants are made of: small, synthetic, one for each way to read.

    PYTHONPATH=tests python -m fuzzing.corpus

The files are kept in the repository, so that the seed of a mutant means the same bytes for everybody.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent.parent / "corpus"

SHAPE = (4, 10, 12)


def main() -> None:
    for path in FOLDER.iterdir() if FOLDER.is_dir() else ():
        if path.name != "found":  # mutants that something was wrong with stay
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for make in (nifti, text_headers, dicom, lidc, pictures, hdf5, weights, texts, results):
        make()
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes in {FOLDER}")


def folder(name: str) -> Path:
    path = FOLDER / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def a_scan(dtype: type = np.int16):
    import scans

    return scans.scan("oblique", SHAPE, dtype)


def nifti() -> None:
    import nibabel as nib

    from berdiff_fast.imaging import volumes

    scan, where = a_scan(), folder("nifti")
    volumes.write(where / "scan.nii", scan.array, scan)
    plain = (where / "scan.nii").read_bytes()
    (where / "scan.nii.gz").write_bytes(gzip.compress(plain, mtime=0))
    affine = nib.load(where / "scan.nii").affine
    two = nib.Nifti2Image(scan.array.transpose(2, 1, 0).astype("f4"), affine)
    two.header["scl_slope"], two.header["scl_inter"] = 2, -3
    nib.save(two, where / "two.nii")
    big = nib.Nifti1Image(scan.array.transpose(2, 1, 0), affine, nib.Nifti1Header(endianness=">"))
    nib.save(big, where / "big.nii")


def text_headers() -> None:
    from berdiff_fast.imaging import volumes

    scan = a_scan()
    where = folder("nrrd")
    fields = (
        "type: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 12 10 4\n"
        "space directions: (0.9,0,0) (0,0.6,0) (0,0,3)\nkinds: domain domain domain\nendian: little\n"
        "space origin: (5.5,-7.25,100.125)\n"
    )
    data = scan.array.astype("<i2").tobytes()
    (where / "plain.nrrd").write_bytes(b"NRRD0005\n" + f"{fields}encoding: raw\n\n".encode() + data)
    volumes.write(where / "packed.nrrd", scan.array, scan)
    (where / "ascii.nrrd").write_bytes(
        b"NRRD0004\n" + f"{fields}encoding: ascii\n\n".encode() + " ".join(map(str, scan.array.flat)).encode() + b"\n"
    )
    (where / "detached.nhdr").write_bytes(b"NRRD0004\n" + f"{fields}encoding: raw\ndata file: voxels.raw\n\n".encode())
    (where / "voxels.raw").write_bytes(data)

    where = folder("metaimage")
    volumes.write(where / "packed.mha", scan.array, scan)
    fields = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 5.5 -7.25 100.125\nCenterOfRotation = 0 0 0\n"
        "AnatomicalOrientation = RAI\nElementSpacing = 0.9 0.6 3\nDimSize = 12 10 4\nElementType = MET_SHORT\n"
    )
    (where / "plain.mha").write_bytes(f"{fields}ElementDataFile = LOCAL\n".encode() + data)
    (where / "detached.mhd").write_bytes(f"{fields}ElementDataFile = voxels.raw\n".encode())
    (where / "list.mhd").write_bytes(f"{fields}ElementDataFile = LIST\n".encode() + b"voxels.raw\n" * 4)
    (where / "voxels.raw").write_bytes(data)


def dicom() -> None:
    import pydicom
    import scans
    from PIL import Image
    from pydicom.dataset import Dataset
    from pydicom.encaps import encapsulate
    from pydicom.sequence import Sequence
    from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

    from berdiff_fast.imaging import volumes

    scan, where = a_scan(np.int32), folder("dicom")
    scans.write_series(where / "series", scan)
    scans.write_enhanced(where / "enhanced" / "enhanced.dcm", scan)
    first = sorted((where / "series").iterdir())[0]
    one = folder("dicom/one")
    shutil.copy(first, one / "plain.dcm")

    def compressed(name: str, syntax: str, frame: bytes | None) -> None:
        file = pydicom.dcmread(first)
        if frame is None:
            file.compress(syntax)
        else:
            if syntax == JPEGBaseline8Bit:
                file.BitsAllocated, file.BitsStored, file.HighBit = 8, 8, 7
            file.PixelData = encapsulate([frame])
            file["PixelData"].is_undefined_length = True
            file.file_meta.TransferSyntaxUID = syntax
        file.save_as(one / name, enforce_file_format=True)

    def encoded(array: np.ndarray, kind: str, **options) -> bytes:
        memory = io.BytesIO()
        Image.fromarray(array).save(memory, kind, **options)
        return memory.getvalue()

    pixels = pydicom.dcmread(first).pixel_array
    compressed("rle.dcm", RLELossless, None)
    compressed("jpeg.dcm", JPEGBaseline8Bit, encoded((pixels // 8).astype(np.uint8), "JPEG"))
    compressed("jpeg2000.dcm", JPEG2000Lossless, encoded(pixels, "JPEG2000", no_jp2=True))

    volume = volumes.read(where / "series")
    masks = folder("dicom/masks")
    marked = scan.array > 0
    volumes.write_segmentation(masks / "binary.dcm", {"one": marked}, volume)
    volumes.write_segmentation(masks / "fractional.dcm", {"mean": marked * 0.8}, volume, fractional=True)
    source = pydicom.dcmread(volume.instances[0])
    file = pydicom.dcmread(masks / "binary.dcm")
    contours = Dataset()
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
        contours[keyword] = source[keyword]
    contours.file_meta = file.file_meta
    contours.file_meta.MediaStorageSOPClassUID = contours.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    region, item, contour = Dataset(), Dataset(), Dataset()
    region.ROINumber, region.ROIName = 1, "nodule"
    contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
    axes = volume.direction * volume.spacing
    contour.ContourData = [
        f"{x:.10g}" for xy in ((2, 2), (7, 2), (7, 6), (2, 6)) for x in axes @ (*xy, 1) + np.array(volume.origin)
    ]
    item.ReferencedROINumber, item.ContourSequence = 1, Sequence([contour])
    contours.StructureSetROISequence, contours.ROIContourSequence = Sequence([region]), Sequence([item])
    contours.save_as(masks / "contours.dcm", enforce_file_format=True)


def lidc() -> None:
    """A CT series of four slices, and a reading of it."""
    import tcia_cases as cases

    where = folder("lidc")
    cases.write_series(where, 4, size=(20, 24))
    sessions = ([cases.box("a", (1, 2), 6, 8, 5, 4)], [cases.box("b", (2,), 6, 8, 4, 5), cases.non_nodule(3)])
    cases.write_xml(where / "069.xml", cases.reading(*sessions))


def pictures() -> None:
    import tifffile
    from PIL import Image

    where = folder("pictures")
    grey = np.random.default_rng(0).integers(0, 256, (14, 18)).astype(np.uint8)
    deep = (grey.astype(np.uint16) << 7) + 3
    Image.fromarray(grey).save(where / "grey.png")
    Image.fromarray(deep).save(where / "deep.png")
    Image.fromarray(np.repeat(grey[..., None], 3, -1)).save(where / "colours.png")
    (where / "deep-colours.png").write_bytes(png(np.repeat(deep[..., None], 3, -1), 2))
    (where / "deep-alpha.png").write_bytes(png(np.stack([deep, np.full_like(deep, 65535)], -1), 4))
    Image.fromarray(grey).quantize(16).convert("L").convert("P").save(where / "palette.png")
    Image.fromarray(grey).save(where / "grey.jpg", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(grey).save(where / "turned.jpg", exif=turned)
    Image.fromarray(grey).save(where / "grey.tif")
    Image.fromarray(deep).save(where / "packed.tif", compression="tiff_lzw")
    tifffile.imwrite(where / "half.tif", grey.astype(np.float16))
    planes = np.repeat(deep[None], 3, 0)
    tifffile.imwrite(where / "planes.tif", planes, photometric="rgb", planarconfig="separate")
    tifffile.imwrite(where / "big.tif", grey, bigtiff=True, tile=(16, 16))

    where = folder("numpy")
    np.save(where / "grey.npy", grey)
    np.save(where / "volume.npy", np.asfortranarray(a_scan(np.float32).array))
    np.savez(where / "archive.npz", grey)
    (where / "archive.npz").rename(where / "archive.npy")


def png(array: np.ndarray, colour: int) -> bytes:
    """(H, W, C) of 16 bits, which Pillow does not write."""
    import zlib

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def hdf5() -> None:
    import h5py

    where = folder("hdf5")
    random = np.random.default_rng(0)
    for name, options in (("packed.h5", dict(compression="gzip")), ("plain.h5", {})):
        with h5py.File(where / name, "w") as file:
            image = random.integers(0, 256, (3, 12, 12)).astype(np.uint8)
            mask = random.integers(0, 2, (3, 2, 12, 12)).astype(np.uint8)
            chunks = dict(chunks=(1, 12, 12)) if options else {}
            file.create_dataset("image", data=image, **options, **chunks)
            file.create_dataset("mask", data=mask, **options)
            for key in ("patient_id", "nodule", "slice"):
                file[key] = np.arange(3)
            file.attrs["source"] = "synthetic"


def weights() -> None:
    import safetensors.torch

    import berdiff_fast as bf
    from berdiff_fast.training import checkpoints
    from berdiff_fast.training.config import TrainConfig

    where = folder("models")
    torch.manual_seed(0)
    network = bf.UNet(
        model_channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=4, num_heads=1
    )
    preprocessing = bf.Preprocessing("window", (-1000, 400), size=(16, 16))
    bf.BerDiff(network, preprocessing=preprocessing).save(where / "model.safetensors")

    tiny = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(tiny.parameters())
    folder("checkpoints")
    for step in (1, 2):
        tiny(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        config = TrainConfig(train_data="data.h5", output="run")
        checkpoints.save(FOLDER / "checkpoints", step, config, tiny, tiny, optimizer, {"best_ged": 0.5, "best_step": 1})

    where = folder("official")
    state = {name: value.detach().clone() for name, value in tiny.state_dict().items()} | {"step": torch.arange(3)}
    torch.save(state, where / "zip.pt")
    torch.save(state, where / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, where / "plain.safetensors")


def texts() -> None:
    where = folder("texts")
    (where / "config.yaml").write_text(
        "model_channels: 32\nchannel_mult: [1, 1]\nattention_resolutions: []\nsteps: 10\nbatch_size: 2\n"
        "learning_rate: 1e-3\nwindow: [-1000, 400]\nschedule: cosine2\ntimesteps: 1000\nflip: true\nrotate: 0.0\n"
        "crop: 0\nprecision: fp32\nspacing: trailing\nseed: 0\nvalidation_steps: 10\ndropout: 0.0\nnorm_groups: 8\n"
        "patch_size: 1\nema_decay: 0.9\n"
    )
    splits = {"format": 1, "train": ["P-0000", "P-0001", "P-0002"], "val": ["P-0003"], "test": ["P-0004"]}
    (where / "splits.json").write_text(json.dumps(splits, indent=1))
    measured = json.loads(next((FOLDER.parents[1] / "benchmarks" / "results").glob("bench-h200-*.json")).read_bytes())
    measured["cases"] = measured["cases"][:1]
    (where / "bench.json").write_text(json.dumps(measured))


def results() -> None:
    """What ``sample`` leaves, of a small volume."""
    from berdiff_fast import cli

    where = folder("results")
    np.save(where / "scan.npy", np.random.default_rng(1).integers(-1000, 400, (2, 16, 16)).astype(np.int16))
    words = ["sample", str(where / "scan.npy"), "--output", str(where), "--n", "2", "--steps", "2", "--quiet"]
    status = cli.main([*words, "--model", str(FOLDER / "models" / "model.safetensors"), "--device", "cpu"])
    assert status == 0

    from berdiff_fast.scans.store import Store

    store = Store(folder("unfinished"), '{"what": "a plan"}', (1, 3, 8, 8), 0)
    bits = np.random.default_rng(2).integers(1, 256, (3, 1, 8, 8)).astype(np.uint8)
    for index in range(3):
        store.put(index, bits[index])
    assert (where / "summary.json").is_file()


if __name__ == "__main__":
    main()
