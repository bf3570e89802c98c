"""How long a CT of many DICOM files takes to read, in time and CPU time, and how much memory, beside SimpleITK.

COMMAND
    python -m medplib_jax.benchmarks.scan_reading [--slices 300] [--side 512] [--rounds 5]

Each reading is a process of its own; its import is not counted. Rounds take turns. Needs the extra `dicom`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_MEASURE = """
import json, resource, sys, time
{imports}
before, began, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
{read}
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([seconds, cpu, grown / 1024, int(values.astype("int64").sum())]))
"""
READERS = {
    "medplib_jax": _MEASURE.format(
        imports="import pydicom\nfrom medplib_jax.volumes.read import read_scan",
        read="values = read_scan(sys.argv[1]).values",
    ),
    "SimpleITK": _MEASURE.format(
        imports="import SimpleITK as sitk",
        read="reader = sitk.ImageSeriesReader()\n"
        "reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(sys.argv[1]))\n"
        "image = reader.Execute()\n"
        "values = sitk.GetArrayViewFromImage(image)",
    ),
}


def write_series(folder: Path, slices: int, side: int) -> None:
    """A CT series of int16, one file per slice."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for number in range(slices):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{number:04d}.dcm"
        data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.Modality, data.PatientID, data.InstanceNumber = "CT", "1", number + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, float(number)], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [0.7, 0.7], 1
        data.Rows = data.Columns = side
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleIntercept, data.RescaleSlope = -1024, 1
        data.PixelData = np.random.default_rng(number).integers(0, 3000, (side, side), np.int16).tobytes()
        data.save_as(path)


def measure(slices: int, side: int, rounds: int) -> dict[str, float]:
    """Medians of each reader's seconds, CPU seconds and MiB, and ratios. ValueError when they read different values."""
    found: dict[str, list[list[float]]] = {name: [] for name in READERS}
    with tempfile.TemporaryDirectory() as folder:
        write_series(Path(folder), slices, side)
        for turn in range(rounds + 1):  # the first one fills the disk's cache
            for name, program in READERS.items():
                done = subprocess.run(
                    [sys.executable, "-c", program, folder], capture_output=True, text=True, check=True
                )
                if turn:
                    found[name].append(json.loads(done.stdout))
    sums = {sample[-1] for samples in found.values() for sample in samples}
    if len(sums) > 1:
        raise ValueError(f"the readers' values add up to {sorted(sums)}")
    figures = {
        f"{name}.{what}": statistics.median(sample[place] for sample in samples)
        for place, what in enumerate(("seconds", "cpu_seconds", "mebibytes"))
        for name, samples in found.items()
    }
    ratios = {
        f"{what}_over_simpleitk": figures[f"medplib_jax.{what}"] / figures[f"SimpleITK.{what}"]
        for what in ("seconds", "cpu_seconds")
    }
    return figures | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    for name, value in measure(**vars(parser.parse_args())).items():
        print(f"{name:28} {value:.3f}")


if __name__ == "__main__":
    main()
