"""What a folder holds: a shard set, a run, a checkpoint or an exported model."""

from pathlib import Path
from typing import Any

from alpro_launch.checkpoint_view import checkpoint_view, is_run, run_view
from alpro_sharding.ledger import LEDGER_FOLDER, overview
from alpro_stream.errors import ConfigError, ShardError
from alpro_stream.model.folder import CONFIG_FILE, read_description
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.shards.layout import DATASET_FILE, DatasetInfo, index_path, load_dataset_info, tar_path
from alpro_stream.shards.storage import file_digest
from alpro_stream.train.checkpoint import STATE_FILE, complete_checkpoints, latest_checkpoint


def inspect(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """A plain description.

    Args:
        path: folder of a split, a run, a checkpoint or an exported model.
        verify: read all shards and compare their digests.

    Raises:
        ConfigError: it is none of these.
        ShardError: with `verify`, a shard is not what its data set says.
    """
    if (path / DATASET_FILE).is_file():
        return _dataset(path, verify)
    if (path / STATE_FILE).is_file():
        return _checkpoint(latest_checkpoint(path))
    if complete_checkpoints(path):
        return {"run": str(path), **run_view(path), **_checkpoint(latest_checkpoint(path))}
    if is_run(path):
        return {"run": str(path), **run_view(path)}
    if (path / CONFIG_FILE).is_file():
        return _model(path)
    if (path / LEDGER_FOLDER).is_dir():
        return _shard_set(path, verify)
    if path.is_dir():
        # Tars of another tool; of anything else the message says what is missing, and which splits there are.
        return _dataset(path, verify)
    raise ConfigError(f"{path} is neither a shard folder nor a run nor a checkpoint nor an exported model")


def _shard_set(path: Path, verify: bool) -> dict[str, Any]:
    splits = sorted(found.parent for found in path.glob(f"*/{DATASET_FILE}"))
    if verify:
        for split in splits:
            _verify(split, load_dataset_info(split))
    digests = {split.name: load_dataset_info(split).digest for split in splits}
    return {"shard_set": str(path), **overview(path), "digests": digests, "verified": verify}


def _dataset(path: Path, verify: bool) -> dict[str, Any]:
    info = load_dataset_info(path)
    if verify:
        _verify(path, info)
    return {
        "dataset": str(path),
        "split": info.split,
        "digest": info.digest,
        "verified": verify,
        "num_samples": info.num_samples,
        "num_captions": info.num_captions,
        "num_questions": info.num_questions,
        "num_bytes": info.num_bytes,
        "shards": {shard.name: shard.num_samples for shard in info.shards},
        "options": info.options,
    }


def _verify(path: Path, info: DatasetInfo) -> None:
    if not (path / DATASET_FILE).is_file():
        raise ConfigError(
            f"{path} has no {DATASET_FILE}, so there are no digests to compare its tars with; `alpro shard` with "
            "in_place=true writes one"
        )
    for shard in info.shards:
        for file, expected in (
            (tar_path(path, shard.name), shard.sha256),
            (index_path(path, shard.name), shard.index_sha256),
        ):
            if not file.is_file() or file_digest(file) != expected:
                raise ShardError(
                    f"{file} is missing or damaged: its digest is not the one in {DATASET_FILE}; remove it and run its "
                    "`alpro shard` again"
                )


def _checkpoint(path: Path) -> dict[str, Any]:
    return {**checkpoint_view(path), **_description(path)}


def _model(path: Path) -> dict[str, Any]:
    return {"model_folder": str(path), "weights_sha256": file_digest(path / WEIGHTS_FILE), **_description(path)}


def _description(path: Path) -> dict[str, Any]:
    """What config.json says, with the lists as their lengths."""
    description = read_description(path)
    return {
        **description.model_dump(mode="json", exclude={"entities", "answers", "format_version"}),
        "num_entities": len(description.entities),
        "num_answers": len(description.answers),
    }
