"""Small models of every task, and files of them under the names of the authors' code, for tests."""

import torch

from alpro_stream.model.alpro import ModelConfig, build_model
from alpro_stream.model.reference_names import to_reference

NUM_ENTITIES, NUM_ANSWERS = 5, 3
TASKS = ("prompter", "pretrain", "retrieval", "question_answering")


SIZES = {
    "video": {"image_size": 32, "num_frames": 2, "width": 64, "depth": 2, "num_heads": 1},
    "text": {
        "width": 64,
        "num_layers": 1,
        "num_multimodal_layers": 2,
        "num_heads": 1,
        "intermediate_size": 96,
        "max_positions": 16,
    },
    "projection_size": 8,
}


def model_config(video=None, text=None, **top):
    """Heads of attention are 64 long, as the reader of foreign files takes them to be."""
    changed = {"video": {**SIZES["video"], **(video or {})}, "text": {**SIZES["text"], **(text or {})}}
    return ModelConfig.model_validate({**SIZES, **changed, **top})


def make_model(task, vocab_size, config=None, seed=0):
    """A model whose parameters are all random numbers: no two are equal, and none is 0."""
    torch.manual_seed(seed)
    lists = {"num_entities": NUM_ENTITIES if task == "pretrain" else 0}
    lists["num_answers"] = NUM_ANSWERS if task == "question_answering" else 0
    model = build_model(task, config or model_config(), vocab_size, **lists)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.1)
    return model.eval()


def parameters_of(model):
    """A copy that does not change with the model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def their_tensors(model, task):
    """The model's parameters as the authors' code would save them."""
    num_lower = model.config.text.num_layers
    if task != "prompter":
        return to_reference(model.state_dict(), task, num_lower)
    # A prompter of theirs is a whole model, most of which is never used, with the prompt bank.
    whole = make_model("retrieval", model.vocab_size, model.config, seed=9)
    whole.dual.load_state_dict(model.state_dict())
    bank = dict.fromkeys(("video_prompt_feat", "image_prompt_feat"), torch.ones(5, model.config.projection_size))
    return to_reference(whole.state_dict(), "retrieval", num_lower) | bank


def assert_equal_parameters(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
