"""Find the stream of domains behind a name, an environment or a dataset."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from sam_gym import ENVIRONMENTS
from sam_gym.data import DATASETS
from sam_gym.data.streams import STREAMS, Stream, dataset_stream, make_stream
from sam_gym.utils.registry import unknown_name


def find_stream(where: str | Stream | gym.Env[Any, Any]) -> Stream:
    """Find a stream by its name, or that of an environment or its id, such as "SamContinual-v0".

    A dataset, or an environment over a dataset, is a stream of one domain.

    Raises:
        ValueError: the id or name is unknown, or the environment has no images of its own.
    """
    if isinstance(where, Stream):
        return where
    if isinstance(where, str):
        if where in STREAMS.names():
            return make_stream(where)
        if where in DATASETS:
            return dataset_stream(where)
        if where not in gym.registry:
            raise unknown_name("stream", where, [*STREAMS.names(), *DATASETS, *ENVIRONMENTS])
        where = gym.make(where)
        try:
            return find_stream(where)
        finally:
            where.close()
    stream = getattr(where.unwrapped, "stream", None)
    if isinstance(stream, Stream):
        return stream
    config: Any = getattr(getattr(where.unwrapped, "core", None), "config", None)
    if not hasattr(config, "dataset"):
        raise ValueError(f"{where} has neither a stream of domains nor a dataset.")
    return dataset_stream(config.dataset, config.data, **config.options_of(config.dataset))
