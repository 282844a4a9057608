"""Random small transformers models, their checkpoints, and runs of a session against them.

Needs torch and transformers: the oracle that the model families are checked with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import transformers

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.devices.base import BatchItem, Session
from nybble.formats.huggingface.config import read_config

VOCABULARY = 101
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit."""


def random_model(model_type: str, seed: int = 0, **switches: object) -> torch.nn.Module:
    """A model of the family with every parameter random, norm weights and biases included."""
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **switches})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            # Large enough that attention is far from uniform and activations are bent.
            values *= 1.5 / parameter.shape[1] ** 0.5
        elif name.endswith("norm.weight"):
            values = values * 0.3 + (0.0 if model_type.startswith("gemma") else 1.0)
        else:
            values *= 0.3
        parameter.data.copy_(values)
    return model


def checkpoint_of(model: torch.nn.Module) -> Checkpoint:
    """The model's weights and config as a Checkpoint, float32."""
    config = read_config(model.config.to_dict())
    f32 = encoding("f32")
    tensors = {
        name: Tensor(name, tuple(value.shape), f32, value.numpy().reshape(-1).view(np.uint8))
        for name, value in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    return Checkpoint(config, tensors)


def tokens(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


@torch.no_grad()
def oracle(model: torch.nn.Module, ids: Sequence[int]) -> np.ndarray:
    """transformers' logits of the whole sequence at once: (length, vocab_size)."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def chunks(ids: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of chunks of these sizes, the last size repeated."""
    begin = 0
    for index in range(len(ids)):
        end = min(begin + sizes[min(index, len(sizes) - 1)], len(ids))
        yield begin, end
        begin = end
        if begin == len(ids):
            return


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    worst = np.abs(actual - expected).max() / np.abs(expected).max()
    assert worst < TOLERANCE, f"largest difference of logits: {worst:.2e} of the largest logit"


def check_all_ways(session: Session, model: torch.nn.Module, length: int = 40) -> None:
    """Whole prompt, chunks, token by token, and two ragged sequences in one batch.

    With LongRoPE a chunk is compared with transformers on everything up to the chunk's end, for
    that decides the rotation of all of it.
    """
    ids, other_ids = tokens(length), tokens(length // 2, seed=2)
    whole = {len(i): oracle(model, i) for i in (ids, other_ids)}
    parameters = model.config.rope_parameters or {}
    long = parameters.get("rope_type") == "longrope"

    def expected(sequence: Sequence[int], begin: int, end: int) -> np.ndarray:
        return oracle(model, sequence[:end])[begin:] if long else whole[len(sequence)][begin:end]

    for sizes in ([length], [7, 5], [1]):
        sequence = session.new_sequence()
        for begin, end in chunks(ids, sizes):
            logits = session.forward([BatchItem(sequence, ids[begin:end], "all")])
            assert_close(logits, expected(ids, begin, end))
        assert sequence.tokens == ids
    one, other = session.new_sequence(), session.new_sequence()
    steps = zip(chunks(ids, [11, 1, 6]), chunks(other_ids, [3, 5, 1]), strict=False)
    for (begin, end), (other_begin, other_end) in steps:
        first = BatchItem(one, ids[begin:end], "last")
        second = BatchItem(other, other_ids[other_begin:other_end], "all")
        rows = expected(ids, end - 1, end), expected(other_ids, other_begin, other_end)
        assert_close(session.forward([first, second]), np.concatenate(rows))
