"""Which decoder a configuration names."""

import sys
from contextlib import closing

import pytest
import torch

from alpro_stream.config import validate
from alpro_stream.errors import ConfigError
from alpro_stream.stream.decode import DecodeConfig, build_decoder, decoder_name
from alpro_stream.stream.workers import TurboWorkers


def test_mixed_needs_a_gpu():
    with pytest.raises(ConfigError, match=r"stream\.decode\.device is mixed, but no GPU"):
        build_decoder(DecodeConfig(device="mixed"), 48, 4, device_id=None)


@pytest.mark.parametrize("backend", ["auto", "libjpeg-turbo"])
def test_on_a_cpu_it_is_libjpeg_turbo_where_dali_is_not_installed_too(backend, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nvidia.dali") or name == "alpro_stream.stream.dali"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # an import of it fails
    for device_id in (None, 0):
        with closing(build_decoder(DecodeConfig(backend=backend), 48, 4, device_id)) as decoder:
            assert isinstance(decoder, TurboWorkers)
            assert decoder.device == torch.device("cpu")
            assert not decoder.needs_trial
    with pytest.raises(ConfigError, match="NVIDIA DALI is not installed"):
        build_decoder(DecodeConfig(backend="dali"), 48, 4, None)


def test_libjpeg_turbo_on_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"backend=libjpeg-turbo works on \w+ CPU only; set device=cpu or"):
        validate(DecodeConfig, {"device": "mixed", "backend": "libjpeg-turbo"}, "run.yaml")


def test_the_name_tells_decoders_apart_by_their_pixels():
    names = {
        decoder_name(DecodeConfig(device="cpu", backend="libjpeg-turbo")),
        decoder_name(DecodeConfig(device="cpu", backend="dali")),
        decoder_name(DecodeConfig(device="mixed", backend="dali")),
    }
    assert len(names) == 3
    assert decoder_name(DecodeConfig(device="cpu")) == "libjpeg-turbo-cpu"
    assert decoder_name(DecodeConfig(device="mixed")) == "dali-mixed"
    assert decoder_name(DecodeConfig(num_workers=1)) == decoder_name(DecodeConfig(num_workers=8))
