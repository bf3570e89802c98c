"""What clients send as scans: their names decide nothing, archives cannot leave their folder or fill the disk."""

import io
import zipfile

import pytest

from medplib_jax.serve import uploads
from medplib_jax.serve.refusals import Refused
from medplib_jax.serve.uploads import unpack
from medplib_jax.volumes.read import read_scan


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def received(tmp_path, *contents: bytes):
    folder = tmp_path / "scan"
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / str(number)).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\x1f\x8b\x08", "0.nii.gz"),
        (b"\0" * 344 + b"n+1\0", "0.nii"),
        (b"NRRD0004\n", "0.nrrd"),
        (b"ObjectType = Image\n", "0.mha"),
        (b"\0" * 128 + b"DICM", "0"),
    ],
)
def test_the_content_says_what_a_file_is(tmp_path, start, name):
    folder = received(tmp_path, start)
    unpack(folder)
    assert [path.name for path in folder.iterdir()] == [name]


def test_an_archive_stays_in_its_folder(tmp_path):
    folder = received(
        tmp_path, archive(**{"../../out.nii": b"1", "/etc/x": b"2", "Doe^John.dcm": b"3", "a/b.nii.gz": b"4"})
    )
    unpack(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["0-0.nii", "0-1", "0-2", "0-3.nii.gz"]
    assert [path.name for path in tmp_path.iterdir()] == ["scan"]


def test_an_archive_that_grows_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UNPACKED", 2**21)
    folder = received(tmp_path, archive(a=b"\0" * 2**20, b=b"\0" * (2**20 + 1)))
    with pytest.raises(Refused) as found:
        unpack(folder)
    assert found.value.status == 413 and sum(p.stat().st_size for p in folder.glob("0-*")) <= 2**21


def test_an_archive_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_FILES", 3)
    with pytest.raises(Refused) as found:
        unpack(received(tmp_path, archive(**{str(k): b"" for k in range(4)})))
    assert found.value.status == 413


def test_the_archives_of_a_form_share_their_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UNPACKED", 2**21)
    half = archive(a=b"\0" * (2**20 + 1))
    folder = received(tmp_path, half, half)
    with pytest.raises(Refused) as found:
        unpack(folder)
    assert found.value.status == 413 and sum(p.stat().st_size for p in folder.glob("*-*")) <= 2**21


METAIMAGE = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
NRRD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n"


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_header_names_no_other_file(tmp_path, suffix, zipped):
    (tmp_path / "secret").write_bytes(b"password")
    start, line = (METAIMAGE, "ElementDataFile = ") if suffix[1] == "m" else (NRRD, "data file: ")
    content = f"{start}{line}{tmp_path}/secret\n".encode()
    folder = received(tmp_path, archive(**{f"a{suffix}": content}) if zipped else content)
    with pytest.raises(Refused, match="names another file") as found:
        unpack(folder)
        print(read_scan(str(folder)).values.tobytes())
    assert found.value.status == 400


@pytest.mark.parametrize("content", [f"{METAIMAGE}ElementDataFile = LOCAL\npassword", f"{NRRD}\npassword"])
def test_voxels_behind_their_header_are_read(tmp_path, content):
    folder = received(tmp_path, content.encode())
    unpack(folder)
    assert read_scan(str(folder)).values.tobytes(order="F") == b"password"


@pytest.mark.parametrize("contents", [[], [b""], [b"PK\x03\x04 and nothing more"], [archive(a=b"x" * 99)[:-30]]])
def test_nothing_and_broken_archives_are_refused(tmp_path, contents):
    with pytest.raises(Refused) as found:
        unpack(received(tmp_path, *contents))
    assert found.value.status == 400
