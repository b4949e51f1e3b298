"""How a corpus is read: its format, which column is which field, where its media are, and its splits."""

import difflib
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from alpro_stream.config import Config
from alpro_stream.manifest.columns import FIELDS
from alpro_stream.manifest.places import SCHEMES, holds_user, is_address, scheme_of
from alpro_stream.manifest.rows import SPLIT_NAME

Format = Literal[
    "jsonl",
    "csv",
    "tsv",
    "parquet",
    "webvid",
    "cc3m",
    "msrvtt",
    "didemo",
    "msvd",
    "msrvtt_qa",
    "msvd_qa",
    "alpro",
    "lavis",
    "folder",
    "webdataset",
]


class ManifestConfig(Config):
    """How a manifest is read; see docs/manifests.md for every format."""

    format: Format | None = None
    """The format; null: by the suffix, or what a folder holds."""
    columns: dict[str, str | list[str]] = Field(default_factory=dict)
    """Our field (id, media, captions, split, kind, start_s, end_s, question, answer, license) -> a column of the file,
    a template such as "{page_dir}/{videoid}.mp4" (``{line}`` is the number of the row), or a list of these: all of
    them for captions, the first that is not empty for other fields."""
    media_root: str | None = None
    """Folder or address that relative media paths start from; null: the manifest's folder."""
    split: str = Field(default="train", pattern=f"^{SPLIT_NAME.pattern}$")
    """Split of the rows that name none."""
    splits: dict[str, str] = Field(default_factory=dict)
    """Split -> text file with the ids of its rows, one a line; rows in none of the files keep their split."""

    @field_validator("columns")
    @classmethod
    def _only_known_fields(cls, columns: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        for field, columns_of_field in columns.items():
            if field not in FIELDS:
                nearest = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known fields: {', '.join(FIELDS)}"
                raise ValueError(f"unknown field {field!r}; {hint}")
            if not columns_of_field:
                raise ValueError(f"no column for {field!r}; name one, or leave the field out")
        return columns

    @field_validator("splits")
    @classmethod
    def _only_split_names(cls, splits: dict[str, str]) -> dict[str, str]:
        for name in splits:
            if not SPLIT_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a split; expected letters, digits, '-' or '_'")
        return splits

    # Of the model and not of the field, because errors of a field repeat its value, which may hold a password.
    @model_validator(mode="after")
    def _only_known_addresses(self) -> Self:
        root = self.media_root
        if root is not None and is_address(root):
            if holds_user(root):
                raise ValueError("media_root holds a user name or password; give credentials in the environment")
            if scheme_of(root) not in SCHEMES:
                known = ", ".join(SCHEMES)
                raise ValueError(
                    f"media_root is {root!r}; expected a folder, or an address that begins with {known} and ://"
                )
        return self
