"""Folders of tars that other tools wrote, read where they are."""

import io
import json
import tarfile

import pytest
import webdataset
from object_server import FileServer, running
from shard_files import make_sample, write_dataset, write_shard

from alpro_sharding import ShardConfig
from alpro_sharding.index_in_place import index_in_place
from alpro_stream.config import validate
from alpro_stream.errors import SampleError, ShardError
from alpro_stream.media import FetchConfig
from alpro_stream.shards import CachedFiles, ShardReader, describe_tars, load_dataset_info
from alpro_stream.shards.cache import CacheConfig, ShardCache

VIDEO, JPEG = b"not a real video", b"\xff\xd8 not a real picture"
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def write_tar(path, members, **options):
    """Members are (name, contents) or (name, type of a member without contents)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, dict):
                data = json.dumps(data).encode()
            if data in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
                info.type, info.linkname, data = data, "/etc/passwd", b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, medium="mp4", data=VIDEO, **metadata):
    members = [(f"{key}.{medium}", data + key.encode()), (f"{key}.txt", f"caption of {key}".encode())]
    return [*members, (f"{key}.json", metadata)] if metadata else members


def contents(shards):
    """Key, captions and media of every sample."""
    return [
        (metadata.key, metadata.captions, shards.read(shard.name, slot, shards.media_members(shard.name, slot)))
        for shard in shards.info.shards
        for slot in range(shard.num_samples)
        for metadata in [shards.metadata(shard.name, slot)]
    ]


def names(path):
    return sorted(found.relative_to(path) for found in path.rglob("*"))


@pytest.mark.parametrize("format_", FORMATS)
def test_a_folder_of_tars_is_a_data_set(tmp_path, format_):
    long = "/".join(["part"] * 18) + "/" + "n" * 80
    keys = [["000000", "clip-1", "über"], [long, "./b/000010"]]
    for number, keys_of_tar in enumerate(keys):
        members = [member for key in keys_of_tar for member in sample(key)]
        write_tar(tmp_path / f"0000{1 - number}.tar", members, format=format_)
    (tmp_path / "00000_stats.json").write_text("{}")
    before = names(tmp_path)
    info = load_dataset_info(tmp_path)
    assert [(shard.name, shard.kind, shard.num_samples) for shard in info.shards] == [
        ("00000", "video", 2),
        ("00001", "video", 3),
    ]
    assert info.options == {"payload": "video", "in_place": True}
    assert (info.split, info.num_captions, info.num_questions) == (tmp_path.name, 5, 0)
    shards = ShardReader(tmp_path)
    assert contents(shards) == [
        (key.rpartition("/")[2], (f"caption of {key}",), [VIDEO + key.encode()]) for key in keys[1] + keys[0]
    ]
    assert shards.metadata("00000", 0).id == long
    assert names(tmp_path) == before


def test_samples_have_the_slots_that_indexing_in_place_gives_them(tmp_path):
    members = [*sample("a"), ("b.mp4", VIDEO), *sample("c d"), ("e.txt", b"no medium"), *sample("f", url="http://x/f")]
    members += [("g.mp4", VIDEO), ("g.txt", b"\xff"), ("h.mp4", VIDEO), ("h.json", {"caption": ["one", "two"]})]
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", [("x.mp4", VIDEO)])
    write_tar(tmp_path / "2.tar", sample("k"))
    found, loose = contents(ShardReader(tmp_path)), load_dataset_info(tmp_path)
    assert [key for key, *_ in found] == ["a", "f", "h", "k"]
    options = {"manifest": str(tmp_path), "out": str(tmp_path), "in_place": True, "payload": "video"}
    index_in_place(validate(ShardConfig, {**options, "entities": {"tagger": "pattern"}}, "test"))
    written = load_dataset_info(tmp_path)
    assert contents(ShardReader(tmp_path)) == found
    unlike = {"sha256", "split"}
    for one, other in zip(loose.shards, written.shards, strict=True):
        assert one.model_dump(exclude=unlike) == other.model_dump(exclude=unlike)
    assert loose.options == written.options


def test_what_the_webdataset_package_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "000000.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"s{number}", "mp4": VIDEO, "txt": f"text {number}", "json": {"duration": 1}})
    shards = ShardReader(tmp_path)
    assert contents(shards) == [(f"s{number}", (f"text {number}",), [VIDEO]) for number in range(3)]
    assert shards.counts("000000").tolist() == [[1, 0]] * 3


def test_images_are_one_frame_each(tmp_path):
    fields = {"caption": "of json", "url": "https://user:secret@x/1.jpg?token=1", "sha256": "ab", "license": None}
    members = [*sample("000000000", "jpg", JPEG, **fields), ("1.JPG", JPEG), ("1.json", {"caption": "one"})]
    write_tar(tmp_path / "00000.tar", members)
    shards = ShardReader(tmp_path)
    assert shards.info.options == {"payload": "frames", "in_place": True}
    assert contents(shards) == [
        ("000000000", ("caption of 000000000",), [JPEG + b"000000000"]),
        ("1", ("one",), [JPEG]),
    ]
    metadata = shards.metadata("00000", 0)
    assert (metadata.kind, metadata.qa, metadata.frame_timestamps_s) == ("image", (), ())
    assert metadata.source == {"media": "https://x/1.jpg", "sha256": "ab"}
    assert shards.metadata("00000", 1).source == {}


def test_tars_of_both_kinds_are_sources_of_both(tmp_path):
    write_tar(tmp_path / "0.tar", sample("a", "jpg", JPEG))
    write_tar(tmp_path / "1.tar", sample("b", "webm"))
    info = load_dataset_info(tmp_path)
    assert ([shard.kind for shard in info.shards], info.options["payload"]) == (["image", "video"], "video")
    write_tar(tmp_path / "1.tar", sample("b", "webm") + sample("c", "jpg", JPEG))
    with pytest.raises(ShardError, match=r"1\.tar holds videos and images"):
        load_dataset_info(tmp_path)


def test_a_picture_beside_a_video_is_no_frame(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", JPEG), *sample("a", "MOV"), ("a.png", JPEG), ("a.wav", b"sound")])
    shards = ShardReader(tmp_path)
    assert [member.name for member in shards.media_members("0", 0)] == ["a.MOV"]
    assert shards.frame_members("0", 0) == ()


def test_media_of_our_own_samples(tmp_path):
    write_dataset(tmp_path, video_000000=[make_sample("a", 11)])
    shards = ShardReader(tmp_path)
    members = shards.media_members("video-000000", 0)
    assert [member.extension for member in members] == [f"{number:03d}.jpg" for number in range(11)]
    assert members == shards.frame_members("video-000000", 0)


@pytest.mark.parametrize(
    "order",
    [["a.mp4", "b.mp4", "a.txt", "b.txt"], ["a.mp4", "a.txt", "b.mp4", "b.txt", "a.json"], ["a.mp4", "b.mp4"] * 2],
)
def test_members_of_a_sample_that_lie_apart_are_never_paired(tmp_path, order):
    write_tar(tmp_path / "0.tar", [*sample("z"), *((name, b'{"caption": "x"}') for name in order)])
    with pytest.raises(ShardError, match=r"0\.tar: members of a sample must follow each other, .* 'a' lie apart"):
        load_dataset_info(tmp_path)


@pytest.mark.parametrize("twice", ["a.mp4", "a.txt", "a.TXT"])
def test_a_sample_with_a_name_twice_is_left_out(tmp_path, twice, caplog):
    write_tar(tmp_path / "0.tar", [*sample("a"), (twice, b"which?"), *sample("b")])
    assert contents(ShardReader(tmp_path)) == [("b", ("caption of b",), [VIDEO + b"b"])]
    assert "1 samples in 1 tars; 1 left out, such as 'a' of 0.tar: 0.tar holds a." in caplog.text


@pytest.mark.parametrize(
    "type_", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_what_is_no_file_is_never_followed(tmp_path, type_):
    members = [("a.mp4", type_), ("a.txt", b"caption"), *sample("b"), ("c.mp4", VIDEO), ("c.txt", type_)]
    write_tar(tmp_path / "0.tar", [*members, ("d.x", type_), *sample("e")])
    assert [key for key, *_ in contents(ShardReader(tmp_path))] == ["b", "e"]


def test_an_index_that_names_what_is_no_file_gives_nothing(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.mp4", tarfile.SYMTYPE), ("a.txt", b"caption"), *sample("b")])
    shards = ShardReader(tmp_path)
    (tmp_path / "0.idx").write_text("v1.2 1\nmp4 512 0 a.mp4 txt 1024 7 a.txt\n")
    with pytest.raises(SampleError, match=r"^0:0 a: .* something there that is no file \(type b'2'\)"):
        shards.read("0", 0, shards.media_members("0", 0))


def test_names_of_members_open_nothing(tmp_path):
    keys = ["/etc/passwd", "../../a", "/b", "x/../c"]
    extra = [
        (".hidden.mp4", VIDEO),
        ("README", b"x"),
        ("no-extension", b"x"),
        ("._d.mp4", VIDEO),
        ("dir/.e.mp4", VIDEO),
    ]
    write_tar(tmp_path / "0.tar", [*(member for key in keys for member in sample(key)), *extra])
    before = names(tmp_path)
    found = contents(ShardReader(tmp_path))
    assert [(key, media) for key, _, media in found] == [
        (key.rpartition("/")[2], [VIDEO + key.encode()]) for key in keys
    ]
    assert not any("/" in key for key, *_ in found)
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
def test_compressed_tars_are_refused(tmp_path, name):
    write_tar(tmp_path / "1.tar", sample("a"))
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        tar.add(tmp_path / "1.tar", "a.mp4")
    for _ in range(2):  # beside a plain one, whose samples alone would be another data set; and alone
        with pytest.raises(ShardError, match=rf"{name} is compressed \(gzip\).*; unpack it to a plain .tar"):
            load_dataset_info(tmp_path)
        (tmp_path / "1.tar").unlink(missing_ok=True)


def test_a_name_that_is_not_that_of_a_shard_is_refused(tmp_path):
    write_tar(tmp_path / "0.TAR", sample("a"))
    with pytest.raises(ShardError, match=r"0\.TAR: the name of a shard ends in \.tar; rename it"):
        load_dataset_info(tmp_path)


def test_a_tar_that_is_not_whole_is_refused(tmp_path):
    path = write_tar(tmp_path / "0.tar", sample("a") + sample("b"))
    data = path.read_bytes()
    for size in (0, 100, 1024, 1100, 2048, 3072, 4000, 4096):
        path.write_bytes(data[:size])
        with pytest.raises(ShardError, match=r"0\.tar is cut off .*; fetch or write it again"):
            load_dataset_info(tmp_path)


def test_nothing_that_can_be_used_is_an_error(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.txt", b"x")])
    with pytest.raises(ShardError, match=r"no tar of .* such as 'a' of 0.tar: no video or image .*; expected KEY.mp4"):
        load_dataset_info(tmp_path)


def test_our_own_shards_without_a_description_are_no_other_tools(tmp_path):
    write_shard(tmp_path / "train")
    write_shard(tmp_path / "train", "video-000001")
    with pytest.raises(ShardError, match="its sharding did not finish"):
        load_dataset_info(tmp_path / "train")


def test_the_digest_follows_names_members_and_texts(tmp_path):
    digests = set()
    for number, members in enumerate(
        [sample("a"), sample("b"), sample("a", caption="x"), [("a.mp4", b"x"), *sample("c")]]
    ):
        for folder in ("one", "two"):
            write_tar(tmp_path / str(number) / folder / "0.tar", members)
        (one,), (two,) = (describe_tars(tmp_path / str(number) / folder).shards for folder in ("one", "two"))
        assert one == two
        digests.add(one.sha256)
    text = [("a.mp4", VIDEO + b"a"), ("a.txt", b"another of a")]
    digests.add(describe_tars(write_tar(tmp_path / "5" / "0.tar", text).parent).shards[0].sha256)
    assert len(digests) == 5


def test_texts_that_were_damaged_later_name_the_sample(tmp_path):
    path = write_tar(tmp_path / "0.tar", sample("a") + sample("b"))
    info, shards = load_dataset_info(tmp_path), ShardReader(tmp_path)
    assert len(shards.index("0")) == 2
    data = path.read_bytes()
    for damage in (b"\xff", b" "):
        path.write_bytes(data.replace(b"caption of a", damage.ljust(12)))
        with pytest.raises(SampleError, match=r"^0:0 a: no caption can be read") as caught:
            shards.metadata("0", 0)
        assert caught.value.cause == "metadata"
        assert shards.metadata("0", 1).captions == ("caption of b",)
    assert shards.counts("0").tolist() == [[1, 0], [1, 0]]
    with pytest.raises(ShardError, match=r"has 1 samples, but dataset.json says 2"):
        ShardReader(tmp_path, info).index("0")


def test_shards_behind_an_address_are_read_through_the_cache(tmp_path):
    write_dataset(tmp_path / "train")
    local = ShardReader(tmp_path / "train")
    files = {f"/data/{path.name}": path.read_bytes() for path in (tmp_path / "train").iterdir()}
    with running(FileServer(files)) as server:
        place = f"{server.address}/data"
        info = load_dataset_info(place)
        assert info == local.info
        cache = ShardCache(CacheConfig(folder=tmp_path / "cache", max_bytes=1 << 30), FetchConfig())
        shards = ShardReader(place, info, CachedFiles(place, cache))
        assert contents(shards) == contents(local)
        assert shards.counts("video-000000").tolist() == [[2, 1]] * 3
        assert len(server.requests) == 3
        shards.close()
        cache.close()


def test_tars_behind_an_address_need_a_description(tmp_path):
    files = {"/data/0.tar": write_tar(tmp_path / "0.tar", sample("a")).read_bytes()}
    with running(FileServer(files)) as server, pytest.raises(ShardError) as caught:
        load_dataset_info(f"{server.address}/data?token=secret", FetchConfig(attempts=1))
    assert "need the dataset.json" in str(caught.value)
    assert "in_place=true" in str(caught.value)
    assert "secret" not in str(caught.value)
