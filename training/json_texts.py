"""JSON files whose texts stay what they are: `datasets` takes a part of a file that holds dates alone for dates."""

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pyarrow as pa
import pyarrow.json as paj
from datasets import DatasetBuilder, Features, Value
from datasets.builder import Key
from datasets.packaged_modules.json.json import Json, JsonConfig
from datasets.utils.file_utils import readline
from datasets.utils.json import get_json_field_paths_from_feature, json_encode_fields_in_json_lines


class JsonTexts(Json):
    """
    The reader of `datasets` for features that are known: columns of texts are read as such, and what stands in one
    and is no text is written as JSON.
    """

    @classmethod
    def like(cls, builder: DatasetBuilder, features: Features) -> "JsonTexts":
        """A reader of what `builder` reads."""
        # where and what it reads has names of its own
        options = {field.name: getattr(builder.config, field.name) for field in fields(JsonConfig)}
        named = ("name", "version", "data_dir", "data_files", "description", "features")
        return cls(
            dataset_name=builder.dataset_name,
            config_name=builder.config.name,
            hash=f"texts-{builder.hash}",
            base_path=builder.base_path,
            repo_id=builder.repo_id,
            data_files=builder.config.data_files,
            features=features,
            **{name: value for name, value in options.items() if name not in named},
        )

    def _generate_tables(self, base_files, files_iterables, original_files, allow_full_read=True):
        for shard, files in enumerate(files_iterables):
            for file in files:
                for number, lines in enumerate(self._read_parts(file)):
                    try:
                        table = self._parse(lines)
                    except (pa.ArrowInvalid, ValueError):
                        if number:
                            raise
                        # neither objects, one a line, nor a list of them; and errors are told as ever
                        yield from super()._generate_tables([base_files[shard]], [[file]], [original_files[shard]])
                        break
                    # a field that the first part has not is none of the dataset's
                    known = [name for name in table.column_names if name in self.info.features]
                    yield Key(shard, number), self._cast_table(table.select(known))

    def _read_parts(self, file: str) -> Iterator[bytes]:
        """Objects, one a line, some lines at a time."""
        with open(file, "rb") as opened:
            part = self._read_lines(opened).removeprefix(codecs.BOM_UTF8)
            if self.config.field is not None or part.lstrip().startswith(b"["):
                found = json.loads(part + self._in_utf8(opened.read()))
                rows = found if self.config.field is None else found[self.config.field]
                yield _to_lines([row if isinstance(row, dict) else {"text": row} for row in rows])
                return
            while part:
                yield part
                part = self._read_lines(opened)

    def _read_lines(self, opened: Any) -> bytes:
        part = opened.read(self.config.chunksize)
        if not part:
            return b""
        try:
            return self._in_utf8(part + opened.readline())
        # of some compressed files in a stream
        except (AttributeError, io.UnsupportedOperation):
            return self._in_utf8(part + readline(opened))

    def _in_utf8(self, part: bytes) -> bytes:
        if self.config.encoding == "utf-8":
            return part
        return part.decode(self.config.encoding, errors=self.config.encoding_errors or "strict").encode()

    def _parse(self, lines: bytes) -> pa.Table:
        texts = [name for name, feature in self.info.features.items() if feature == Value("string")]
        if paths := get_json_field_paths_from_feature(self.info.features):
            lines = json_encode_fields_in_json_lines(lines, paths)
        try:
            return _read(lines, texts)
        except pa.ArrowInvalid:
            rows = [json.loads(line) for line in lines.splitlines() if line.strip()]
        for row in rows:
            row |= {name: json.dumps(row[name]) for name in texts if not isinstance(row.get(name), str | None)}
        return _read(_to_lines(rows), texts)


def _read(lines: bytes, texts: list[str]) -> pa.Table:
    schema = pa.schema(dict.fromkeys(texts, pa.string()))
    return paj.read_json(
        io.BytesIO(lines),
        parse_options=paj.ParseOptions(explicit_schema=schema),
        read_options=paj.ReadOptions(block_size=max(len(lines), 1)),
    )


def _to_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()
