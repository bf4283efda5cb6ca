"""TensorFlow Datasets without TensorFlow: read through `as_data_source`, write as array_record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from slm_jax.data.sources import (
    Document,
    Source,
    Split,
    checked_text,
    open_source,
    split_documents,
)
from slm_jax.errors import UserError

# What datasets call their splits, ours first. "test" is left alone: it is not for development.
_SPLITS: dict[str, Split] = {"train": "train", "valid": "valid", "validation": "valid"}


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A prepared TFDS data set with random access (array_record or parquet).

    Nothing is downloaded. The split "train" is read, and "valid" or "validation" is held out where
    there is one; else the held-out documents come from "train" (`sources.split_documents`).

    Attributes:
      name: "NAME", "NAME/CONFIG:VERSION" below TFDS_DATA_DIR (default ~/tensorflow_datasets), or
        the folder that holds dataset_info.json.
      text_field: the feature that holds the text.
    """

    name: str
    text_field: str

    @functools.cached_property
    def _builder(self) -> Any:
        folder = Path(self.name).expanduser()
        if _is_prepared(folder):
            return tfds.builder_from_directory(folder)
        try:
            builder = tfds.builder(self.name)
        except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
            raise UserError(
                f"source='tfds:{self.name}': neither a data set of TFDS nor a folder with a "
                "dataset_info.json: check the name or the path"
            ) from error
        if not _is_prepared(builder.data_path):
            raise UserError(
                f"source='tfds:{self.name}': not prepared in {builder.data_path}: run "
                f"tfds.builder({self.name!r}, file_format='array_record').download_and_prepare()"
            )
        return builder

    def _splits(self) -> list[tuple[str, Split]]:
        names = self._builder.info.splits.keys()
        if "train" not in names:
            raise UserError(f"source='tfds:{self.name}': no split train, only {', '.join(names)}")
        return [(name, split) for name, split in _SPLITS.items() if name in names]

    def sha256(self) -> str:
        """Hash of the files of examples and of the name of the text feature."""
        total = hashlib.sha256(self.text_field.encode())
        files = sorted(p for p in Path(self._builder.data_path).iterdir() if p.suffix != ".json")
        for path in files:  # the .json files hold descriptions, dates and sizes
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"\n{path.name} {digest}".encode())
        return total.hexdigest()

    def documents(self) -> Iterator[Document]:
        """One document an example, in the order of the files."""
        splits = self._splits()
        own = any(split == "valid" for _, split in splits)
        for name, split in splits:
            where = f"source='tfds:{self.name}' split {name}"
            try:
                examples = self._builder.as_data_source(split=name)
            except NotImplementedError as error:
                raise UserError(
                    f"{where}: not stored for random access: prepare it again with "
                    "file_format='array_record'"
                ) from error
            for i in range(len(examples)):
                text = checked_text(examples[i], self.text_field, f"{where} example {i}")
                yield Document(text, split if own else None)


def write_tfds(
    source: str, data_dir: str | Path, *, text_field: str = "text", valid_fraction: float = 0.1
) -> Path:
    """Writes a corpus as a TFDS data set of array_record files with splits "train" and "valid".

    Args:
      source: what `sources.open_source` takes.
      data_dir: where to write.
      text_field: the field that holds the text, in the source and in what is written.
      valid_fraction: how much to hold out (`sources.split_documents`).

    Returns:
      The folder to name as "tfds:FOLDER".

    Raises:
      UserError: `data_dir` already has such a data set, or what the source raises.
    """
    builder = _builder_class()(
        opened=open_source(source, text_field),
        text_field=text_field,
        valid_fraction=valid_fraction,
        data_dir=str(data_dir),
        file_format="array_record",
    )
    if _is_prepared(builder.data_path):
        raise UserError(
            f"data_dir={str(data_dir)!r} already holds {builder.data_path}: remove that folder or "
            "choose another"
        )
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # two lines of "Downloading"
        builder.download_and_prepare()
    return Path(builder.data_path)


def _is_prepared(folder: Any) -> bool:
    return (Path(folder) / "dataset_info.json").is_file()  # builder.is_prepared() logs a warning


@functools.cache
def _builder_class() -> type:
    # Out of TFDS's registry: a class is there once only, and nobody looks this one up by its name.
    with tfds.core.registered.skip_registration():

        class SlmCorpus(tfds.core.GeneratorBasedBuilder):
            """Documents of any source of slm_jax."""

            VERSION = tfds.core.Version("1.0.0")
            # Nothing is downloaded. Looking for checksums beside this file would also import
            # importlib_resources, which TFDS 4.9.10 needs here but does not depend on.
            url_infos = None

            def __init__(
                self, *, opened: Source, text_field: str, valid_fraction: float, **options: Any
            ):
                self._opened = opened
                self._text_field = text_field
                self._valid_fraction = valid_fraction
                super().__init__(**options)

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({self._text_field: tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
                return {
                    "train": self._generate_examples("train"),
                    "valid": self._generate_examples("valid"),
                }

            def _generate_examples(self, wanted: Split) -> Iterator[tuple[int, dict[str, str]]]:
                documents = split_documents(self._opened, self._valid_fraction)
                for i, (split, text) in enumerate(documents):
                    if split == wanted:
                        yield i, {self._text_field: text}

    return SlmCorpus
