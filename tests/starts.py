"""The start of a run's pools without Serve: replicas that say what a test wants of them."""

import warnings
from types import SimpleNamespace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from pipeline import pools


def deployed(monkeypatch, config, describe, longest=0, on_node=2):
    """`pools.deploy` on two made-up GPUs.

    Args:
        describe: (pool, spec) → numerics and capacity of a replica; raises where it does not start.
        longest: tokens of the longest row.
        on_node: GPUs of the largest node.

    Returns:
        what is served; pool and spec of each start; what was said.
    """
    tried, said = [], []

    def start(config, found, spec, app, ledger):
        tried.append((found[0], spec))
        answer = SimpleNamespace(result=lambda told=describe(found[0], spec): told)
        return SimpleNamespace(describe=SimpleNamespace(remote=lambda: answer))

    monkeypatch.setattr(pools, "_start", start)
    monkeypatch.setattr(pools.ray, "cluster_resources", lambda: {"GPU": 2})
    monkeypatch.setattr(pools, "largest_node", lambda: on_node)
    monkeypatch.setattr(pools.serve, "start", lambda **_: None)
    monkeypatch.setattr(pools.serve, "delete", lambda _: None)
    served = pools.deploy(config, "app", "ledger", said.append, lambda: longest)
    assert len(said) == len(tried) - 1
    return served, tried, said
