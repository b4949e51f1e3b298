"""Work of a GPU beside the step: what is asked of PyTorch, as there is no GPU; `tests/gpu` sees that it helps."""

import torch

from alpro_stream.stream.beside import Beside


def test_on_a_cpu_nothing_is_done():
    beside, tensor = Beside(torch.device("cpu")), torch.ones(2)
    with beside.entered():
        tensor += 1
    beside.wait()
    beside.lend(tensor)
    assert tensor.tolist() == [2, 2]


class Calls(list):
    """Notes what is called on something that stands for a stream, an event or a tensor."""

    def __init__(self, device=None, **options):
        self.device = device

    def __getattr__(self, name):
        return lambda *arguments: self.append((name, *arguments))


def test_on_a_gpu_the_host_waits_and_the_memory_is_kept_for_the_stream_of_the_step(monkeypatch):
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Calls)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of the step on {device}")
    beside, tensor = Beside(torch.device("cuda:1")), Calls(torch.device("cuda:1"))
    assert beside.entered().stream is beside._stream
    assert beside._stream.device == torch.device("cuda:1")
    beside.wait()
    assert beside._done == [("record", beside._stream), ("synchronize",)]
    beside.lend(tensor)
    assert tensor == [("record_stream", "the stream of the step on cuda:1")]
