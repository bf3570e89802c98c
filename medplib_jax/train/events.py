"""TensorBoard's event files, for scalars alone.

A file is a row of TFRecords (length, its checksum, content, its checksum), each an `Event` of TensorFlow's event.proto.
Packages that write them import PyTorch or TensorFlow where these are installed: two seconds of every start.
"""

import functools
import socket
import struct
import time
from collections.abc import Mapping

from etils import epath

VERSION = b"brain.Event:2"
START = 1  # the state of a session from whose step on earlier files do not count


class EventFile:
    """A new file in `folder`. An event is with the operating system when its call returns.

    TensorBoard forgets what earlier files of the folder say of `first_step` and later ones.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}").open("wb")
        self._write(_bytes(3, VERSION))
        self._write(_varint(2, first_step) + _bytes(7, _varint(1, START)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        values = (_bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in scalars.items())
        self._write(_varint(2, step) + _bytes(5, b"".join(values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, fields: bytes) -> None:
        event = _double(1, time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def _varint(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _base128(value)


def _double(field: int, value: float) -> bytes:
    return struct.pack("<Bd", field << 3 | 1, value)


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _base128(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return struct.pack("<Bf", field << 3 | 5, value)


def _base128(value: int) -> bytes:
    """Seven bits per byte, lowest first; all but the last have the eighth bit."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _checksum(content: bytes) -> bytes:
    """The masked CRC-32C of a TFRecord."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _crc32c_table()[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    """CRC-32C (Castagnoli) of each byte."""

    def entry(crc: int) -> int:
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
        return crc

    return tuple(map(entry, range(256)))
