"""Records and files broken at random, in every way that has been met; each must be refused, or only noted."""

import io
import os
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (40, 56)
REFUSED, NOTED = "refused", "noted"


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(rng, channels=3):
    return rng.integers(0, 256, (*SIZE, channels), np.uint8)


def header(width: int, height: int) -> bytes:
    """A PNG that claims this size and has no pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def flipped(rng, content: bytes) -> bytes:
    broken = bytearray(content)
    place = rng.integers(50, len(broken) - 20)  # within the pixels
    broken[place] ^= 1 << rng.integers(8)
    return bytes(broken)


def animation(rng) -> bytes:
    return saved(Image.fromarray(noise(rng)), "GIF", save_all=True, append_images=[Image.fromarray(noise(rng))])


def cut(rng, content: bytes) -> bytes:
    return content[: int(len(content) * rng.uniform(0.02, 0.95))]


def rotated(rng) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(2, 9))
    return saved(Image.fromarray(noise(rng)), "PNG", exif=exif)


# files, of the picture or of the mask
BROKEN_FILES = {
    "truncated": lambda rng: png(noise(rng))[: rng.integers(8, 2000)],
    "truncated in another format": lambda rng: cut(
        rng, saved(Image.fromarray(noise(rng)), pick(rng, ("JPEG", "GIF", "TIFF", "BMP", "WEBP")))
    ),
    "truncated animation": lambda rng: cut(rng, animation(rng)[:2000]),  # within the first frame
    "bit flipped": lambda rng: flipped(rng, png(noise(rng))),
    "zero bytes": lambda rng: b"",
    "zeros": lambda rng: bytes(int(rng.integers(1, 3000))),
    "random bytes": lambda rng: rng.bytes(int(rng.integers(1, 3000))),
    "text": lambda rng: b"<html>404 Not Found</html>",
    "huge": lambda rng: header(int(rng.integers(20_000, 2**31)), int(rng.integers(20_000, 2**31))),
    "no pixels": lambda rng: header(*SIZE),
    "floating point": lambda rng: saved(Image.fromarray(noise(rng)[..., 0].astype(np.float32)), "TIFF"),
}
ODD_PICTURES = {
    "16-bit": lambda rng: png(rng.integers(0, 65536, SIZE, np.uint16)),
    "CMYK": lambda rng: saved(Image.fromarray(noise(rng)).convert("CMYK"), "JPEG"),
    "palette": lambda rng: saved(Image.fromarray(noise(rng)).convert("P"), "PNG"),
    "RGBA": lambda rng: png(noise(rng, 4)),
    "grey with alpha": lambda rng: png(noise(rng, 2)),
    "rotated": rotated,
    "animated": lambda rng: animation(rng),
    "sliver": lambda rng: png(rng.integers(0, 256, (1, int(rng.integers(2, 4000)), 3), np.uint8)),
    "speck": lambda rng: png(rng.integers(0, 256, (3, 2, 3), np.uint8)),
}
BROKEN_MASKS = {
    "other size": lambda rng: png(np.ones((SIZE[1], SIZE[0]), np.uint8)),
    "turned by EXIF": lambda rng: rotated_mask(rng),
}
ODD_MASKS = {
    "RGBA": lambda rng: png(np.full((*SIZE, 4), 255, np.uint8)),
    "16-bit": lambda rng: png(np.ones(SIZE, np.uint16)),
    "palette": lambda rng: saved(
        Image.new("RGB", SIZE[::-1], (128, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"
    ),
}
JUNK = (None, True, 3.5, 7, [], {}, [[]], [None], {"a": 1}, float("nan"), [1, "x"])
PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "images/../../../etc/passwd",
    "..",
    ".",
    "/",
    "//etc//passwd",
    "~/secret.png",
    "images/",
    "link.png",
    "folder/secret.png",
    "file:///etc/passwd",
    "http://example.org/a.png",
    "a\0b.png",
    "x" * 5000,
    "images/" + "../" * 50 + "etc/passwd",
    "C:\\secret.png",
    "half \ud800.png",
)


def rotated_mask(rng) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3  # the size stays
    return saved(Image.fromarray(np.ones(SIZE, np.uint8) * 255), "PNG", exif=exif)


def pick(rng, items):
    return items[rng.integers(len(items))]


class Faults:
    """Makes records number 0, 1, ... below `folder`, each broken in its own way with files of its own."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self._rng = folder, np.random.default_rng(seed)
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        secret = folder.parent / "secret"
        secret.mkdir(exist_ok=True)
        (secret / "secret.png").write_bytes(png(noise(self._rng)))
        os.symlink(secret / "secret.png", folder / "link.png")
        os.symlink(secret, folder / "folder")

    def good(self, index: int) -> dict:
        """A record without fault, with a picture, a region and a mask of its own."""
        image, mask = f"images/{index}.png", f"masks/{index}.png"
        (self.folder / image).write_bytes(png(noise(self._rng)))
        shape = np.zeros(SIZE, np.uint8)
        shape[5:30, 8:40] = 255
        (self.folder / mask).write_bytes(png(shape))
        turns = [
            {"from": "human", "value": f"<image>\nSegment <region>{mask}</region>."},
            {"from": "gpt", "value": f"It is <SEG>.<mask>{mask}</mask>"},
        ]
        return {"image": image, "conversations": turns, "answer_type": "open"}

    def broken(self, index: int) -> tuple[object, str, str]:
        """(record, REFUSED or NOTED, which fault)."""
        record = self.good(index)
        kind = pick(self._rng, ("picture", "odd picture", "mask", "odd mask", "path", "type", "text"))
        return {
            "picture": self._file,
            "odd picture": self._file,
            "mask": self._file,
            "odd mask": self._file,
            "path": self._path,
            "type": self._type,
            "text": self._text,
        }[kind](record, kind)

    def _file(self, record, kind):
        tables = {
            "picture": BROKEN_FILES,
            "odd picture": ODD_PICTURES,
            "mask": BROKEN_FILES | BROKEN_MASKS,
            "odd mask": ODD_MASKS,
        }
        name = pick(self._rng, list(tables[kind]))
        content = tables[kind][name](self._rng)
        reference = record["image"] if "picture" in kind else record["image"].replace("images", "masks")
        (self.folder / reference).write_bytes(content)
        if kind == "odd picture":  # its masks would be of another size
            record["conversations"] = [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cyst."},
            ]
        return record, NOTED if kind.startswith("odd") else REFUSED, f"{kind}: {name}"

    def _path(self, record, kind):
        path, where = pick(self._rng, PATHS), int(self._rng.integers(3))
        if where == 0:
            record["image"] = path
        else:
            turn, tag = record["conversations"][where - 1], ("region", "mask")[where - 1]
            turn["value"] = f"{turn['value'].split('<' + tag)[0]}<{tag}>{path}</{tag}>"
        return record, REFUSED, f"path: {path[:30]!r} in {('image', 'region', 'mask')[where]}"

    def _type(self, record, kind):
        junk = pick(self._rng, JUNK)
        turns = record["conversations"]
        turn = turns[self._rng.integers(2)]
        where = pick(self._rng, ("record", "image", "conversations", "turn", "from", "value", "answer_type"))
        if where == "record":
            record = junk
        elif where == "turn":
            turns[turns.index(turn)] = junk
        elif where in ("from", "value"):
            turn[where] = {"not": "text"} if junk in (3.5, 7) else junk  # a number is an answer, too
        elif where != "answer_type" or junk is not None:
            record[where] = junk
        else:
            del record["conversations"]
        return record, REFUSED, f"type: {where} is {junk!r}"

    def _text(self, record, kind):
        question, answer = record["conversations"]
        faults = {
            "empty answer": lambda: answer.update(value=" "),
            "empty question": lambda: question.update(value=""),
            "no answer": lambda: record["conversations"].pop(),
            "two answers": lambda: record["conversations"].append(answer),
            "unknown role": lambda: answer.update({"from": "assistant"}),
            "mask not closed": lambda: answer.update(value=answer["value"].replace("</mask>", "")),
            "region not closed": lambda: question.update(value=question["value"].replace("</region>", "")),
            "no mask": lambda: answer.update(value="It is <SEG>."),
            "no <SEG>": lambda: answer.update(value=answer["value"].replace("<SEG>", "")),
            "two <image>": lambda: question.update(value="<image>" + question["value"]),
            "half a surrogate pair": lambda: question.update(value=question["value"] + "\udc00"),
            "too long": lambda: question.update(value=question["value"] + " why" * 2000),
            "region outside": lambda: question.update(value="<image>\nWhat is in <region>box:0,0,999,999</region>?"),
            "region without numbers": lambda: question.update(
                value="<image>\nWhat is in <region>point:nan,1</region>?"
            ),
        }
        name = pick(self._rng, list(faults))
        faults[name]()
        return record, REFUSED, f"text: {name}"
