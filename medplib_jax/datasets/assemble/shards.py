"""The TFDS dataset `mecovqa` on disk: its features, one ArrayRecord shard, and the metadata around all shards.

No TensorFlow.

Layout: OUT/mecovqa/CONFIG/VERSION/mecovqa-SPLIT.array_record-00000-of-00007, dataset_info.json, features.json.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from medplib_jax.datasets.files import Folder

DATASET, VERSION = "mecovqa", "1.0.0"
CONFIGS = {
    "complex": "Questions about whole medical images.",
    "region": "Questions about a region that is given as a mask.",
    "grounding": "Questions whose answer holds <SEG> and a mask.",
    "zeroshot": "Grounding on modalities left out of the training; one split each.",
}
_HOMEPAGE = "https://github.com/ShawnHuang497/MedPLIB"
_DESCRIPTION = "MeCoVQA on images of SA-Med2D-20M, assembled by medplib_jax. "


@functools.cache
def features():
    """FeaturesDict of an example.

    `masks` and `mask_names` belong together; the names stand in the conversations' <mask> and <region>.
    """
    from tensorflow_datasets import features as tfds_features

    text = tfds_features.Text
    return tfds_features.FeaturesDict(
        {
            "id": text(doc="annotation file # index of the record"),
            "image": tfds_features.Image(shape=(None, None, 3)),
            "image_name": text(),
            "conversations": tfds_features.Sequence({"from": text(), "value": text()}),
            "answer_type": text(doc="open, closed or empty"),
            "modality": text(),
            "patient": text(doc="whose image it is, as far as the records say; empty when they do not"),
            "structure": text(doc="what is asked about, as far as the records say"),
            "volume": text(doc="whose slice the image is, as JSON; empty when the records do not say"),
            "spacing": text(doc="[mm between rows, mm between columns] as JSON; empty when the records do not say"),
            "masks": tfds_features.Sequence(tfds_features.Image(shape=(None, None, 1), encoding_format="png")),
            "mask_names": tfds_features.Sequence(text()),
            "mask_labels": tfds_features.Sequence(text(), doc="what each mask marks; empty when unknown"),
        }
    )


def serialize(example: dict[str, Any]) -> bytes:
    """The example as tf.train.Example, the same bytes in every process.

    `features().serialize_example` does not promise that.
    """
    return _serializer().get_tf_example(features().encode_example(example)).SerializeToString(deterministic=True)


@functools.cache
def _serializer():
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    return ExampleSerializer(features().get_serialized_info())


class ShardWriter:
    """Writes examples to one file, which is there when all of them are.

    As a context manager: an exception leaves no file.
    """

    def __init__(self, path: str):
        from array_record.python.array_record_module import ArrayRecordWriter

        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._path, self._temporary = path, f"{path}.{os.getpid()}.tmp"
        self._writer = ArrayRecordWriter(
            self._temporary, "group_size:1"
        )  # one record a group: random access reads no neighbours

    def write(self, example: dict[str, Any]) -> None:
        self._writer.write(serialize(example))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        self._writer.close()
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            os.remove(self._temporary)


def dataset_folder(out: str, config: str) -> str:
    return os.path.join(out, DATASET, config, VERSION)


def publish(folder: Folder, config: str, shards: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    """Makes the dataset folder of a config from (file, number of examples) of each split's shards, and returns it.

    Files are linked.
    """
    import tensorflow_datasets as tfds

    place, splits = dataset_folder(folder.path, config), []
    folder.clear(os.path.relpath(place, folder.path))  # the library takes shards of earlier runs for further splits
    for split, files in shards.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=place, dataset_name=DATASET, split=split, filetype_suffix="array_record"
        )
        for i, (path, _) in enumerate(files):
            target = str(template.sharded_filepath(shard_index=i, num_shards=len(files)))
            folder.link(path, os.path.relpath(target, folder.path))
        size = sum(os.path.getsize(path) for path, _ in files)
        splits.append(tfds.core.SplitInfo(split, [count for _, count in files], size, filename_template=template))
    for name in ("dataset_info.json", "features.json"):
        folder.claim(os.path.relpath(os.path.join(place, name), folder.path))
    tfds.folder_dataset.write_metadata(
        data_dir=place,
        features=features(),
        split_infos=splits,
        check_data=False,
        description=_DESCRIPTION + CONFIGS[config],
        homepage=_HOMEPAGE,
    )
    return place
