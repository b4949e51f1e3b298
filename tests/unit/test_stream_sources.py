import pytest
from pydantic import ValidationError

from alpro_stream.errors import PlanError, ShardError
from alpro_stream.shards.layout import load_dataset_info, save_dataset_info
from alpro_stream.stream.plan import SourceShape
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.testing.shards import write_dataset


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    directory = tmp_path_factory.mktemp("both")
    write_dataset(directory, video_shards=[3, 2], image_shards=[4], size=16)
    return directory


def opened(*configs):
    return [(source.name, source.kind, source.shape) for source in open_sources([SourceConfig(**c) for c in configs])]


def test_a_data_set_gives_a_source_of_each_kind(both):
    assert opened({"path": both, "weight": 2}) == [
        ("video", "video", SourceShape("video", (3, 2), 2)),
        ("image", "image", SourceShape("image", (4,), 2)),
    ]


def test_names(both):
    named = [name for name, *_ in opened({"path": both, "name": "web"}, {"path": both, "name": "x", "kind": "image"})]
    assert named == ["web-video", "web-image", "x"]


def test_sources_of_one_name_are_refused(both):
    with pytest.raises(PlanError, match="two sources are named 'video'; give each its own"):
        opened({"path": both}, {"path": both, "kind": "video"})


def test_a_kind_that_is_not_there(tmp_path):
    write_dataset(tmp_path, video_shards=[2], size=16)
    with pytest.raises(PlanError, match="has no image shards, only video"):
        opened({"path": tmp_path, "kind": "image"})


def test_the_size_of_stored_frames(both, tmp_path):
    (source, _) = open_sources([SourceConfig(path=both)])
    assert source.stored_size == 16
    write_dataset(tmp_path, video_shards=[2], size=16)
    save_dataset_info(tmp_path, load_dataset_info(tmp_path).model_copy(update={"options": {}}))
    (source,) = open_sources([SourceConfig(path=tmp_path)])
    with pytest.raises(ShardError, match=r"no options\.frames\.size"):
        _ = source.stored_size


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_weights_are_positive_numbers(both, weight):
    with pytest.raises(ValidationError):
        SourceConfig(path=both, weight=weight)
