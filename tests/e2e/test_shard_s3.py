"""Sharding media from a real S3 server behind a network that throttles, cuts and stalls."""

import shutil
from contextlib import ExitStack

import pytest
from media_files import constant_rate, write_image, write_video
from object_server import CREDENTIALS, FaultProxy, answer, cut, reset, running, s3_server, silence, stall
from shard_runs import config_of, contents, failures_of, samples_of, times_of_tars, write_manifest

from alpro_sharding import shard

pytest.importorskip("moto.server")

CLIPS = tuple(f"clip {number}.mp4" for number in range(7))
LATE, PICTURE = "late.mp4", "picture.png"
FETCH = {"timeout_s": 2.0, "attempts": 12, "backoff_s": 0.05}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for number, name in enumerate((*CLIPS, LATE)):
        write_video(folder / name, constant_rate(20 + number, 5))
    write_image(folder / PICTURE)
    return folder


@pytest.fixture(scope="module")
def proxy(media):
    """The network in front of the server, which has everything but the late clip, and a Ray whose workers know it."""
    ray = pytest.importorskip("ray")
    objects = {f"some folder/{name}": (media / name).read_bytes() for name in (*CLIPS, PICTURE)}
    with ExitStack() as stack:
        port = stack.enter_context(s3_server({"corpus": objects}))
        proxy = stack.enter_context(running(FaultProxy(port)))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.address, "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=80 << 20)
        stack.callback(ray.shutdown)
        yield proxy


def upload(proxy, name, data):
    import botocore.session

    client = botocore.session.Session().create_client("s3", endpoint_url=f"http://127.0.0.1:{proxy.port}")
    client.put_object(Bucket="corpus", Key=f"some folder/{name}", Body=data)


def delete(proxy, name):
    import botocore.session

    client = botocore.session.Session().create_client("s3", endpoint_url=f"http://127.0.0.1:{proxy.port}")
    client.delete_object(Bucket="corpus", Key=f"some folder/{name}")


def manifest_of(folder, root):
    folder.mkdir(exist_ok=True)
    names = (*CLIPS[:3], LATE, *CLIPS[3:], PICTURE)
    rows = [{"id": name.partition(".")[0], "media": f"{root}{name}", "captions": ["a dog"]} for name in names]
    return write_manifest(folder / "manifest.jsonl", *rows)


def without_place(samples):
    for metadata, _ in samples:
        del metadata.source["media"]
    return samples


def test_faults_of_the_network_do_not_show_in_the_shards(proxy, media, tmp_path):
    upload(proxy, LATE, (media / LATE).read_bytes())
    local, remote = tmp_path / "local/out", tmp_path / "remote/out"
    shard(config_of(manifest_of(tmp_path / "a", f"{media}/"), local))
    throttled = answer(503, b"<Error><Code>SlowDown</Code></Error>", Retry_After="0")
    proxy.requests.clear()
    proxy.faults[:] = [
        throttled,
        reset(700),
        cut(900),
        stall(500),
        answer(500),
        cut(0),
        throttled,
        reset(0),
        silence(3),
    ]
    summary = shard(config_of(manifest_of(tmp_path / "b", "s3://corpus/some folder/"), remote, fetch=FETCH))
    assert not proxy.faults
    assert len(proxy.requests) >= 9 + 9
    assert any(asked for _, asked in proxy.requests), "nothing was continued where it was cut"
    assert (summary.num_samples, summary.num_failures) == (9, 0)
    read, expected = samples_of(remote / "train"), samples_of(local / "train")
    assert read[0][0].source["media"] == "s3://corpus/some folder/clip 0.mp4"
    assert without_place(read) == without_place(expected)


def test_an_object_that_is_missing_is_a_failure_until_it_appears(proxy, media, tmp_path):
    manifest = manifest_of(tmp_path / "a", "s3://corpus/some folder/")
    upload(proxy, LATE, (media / LATE).read_bytes())
    there, out = tmp_path / "there/out", tmp_path / "late/out"
    shard(config_of(manifest, there, fetch=FETCH))
    delete(proxy, LATE)
    config = config_of(manifest, out, fetch=FETCH)
    assert shard(config).num_samples == 8
    (failure,) = failures_of(out)
    assert (failure["line"], failure["id"], failure["stage"]) == (4, "late", "fetch")
    assert "missing" in failure["reason"]
    assert "404" in failure["reason"]
    times = times_of_tars(out)

    upload(proxy, LATE, (media / LATE).read_bytes())
    proxy.requests.clear()
    shard(config, retry_failed=True)
    assert contents(out) == contents(there)
    changed = {name for name, time in times_of_tars(out).items() if times[name] != time}
    assert changed == {"train/video-000001.tar"}
    assert {path for path, _ in proxy.requests} == {"/corpus/some%20folder/late.mp4"}, (
        "more was fetched than was missing"
    )


def test_a_server_that_stays_away_costs_its_rows_only(proxy, media, tmp_path):
    local = manifest_of(tmp_path / "a", f"{media}/")
    nobody = "http://127.0.0.1:9/clip.mp4"
    shutil.copy(media / CLIPS[0], tmp_path / "a/clip.mp4")
    rows = [
        {"id": "near", "media": "clip.mp4", "captions": ["a dog"]},
        {"id": "far", "media": nobody, "captions": ["a dog"]},
        {"id": "silent", "media": "s3://corpus/some folder/clip 1.mp4", "captions": ["a dog"]},
    ]
    write_manifest(local, *rows)
    proxy.faults[:] = [stall(10)] * 2
    fetch = {"timeout_s": 0.5, "attempts": 2, "backoff_s": 0.05}
    assert shard(config_of(local, tmp_path / "out", fetch=fetch, samples_per_shard=3)).num_samples == 1
    reasons = {failure["id"]: (failure["stage"], failure["reason"]) for failure in failures_of(tmp_path / "out")}
    assert {name: stage for name, (stage, _) in reasons.items()} == {"far": "fetch", "silent": "fetch"}
    assert "at the last of 2 attempts" in reasons["silent"][1]
    assert nobody not in reasons["far"][1]
