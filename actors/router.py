"""Serve's request router that sends a call to its lease's home.

A session id is `home row`, with the home's replica id as the replica names itself (`unique id@node`). A call whose home
is gone, or not known to this process yet, goes where its session hashes to, and that replica refuses it (NotHome):
served there it would take room that others were promised. Its agent then asks for another home. Choosing a replica asks
nobody and never raises: a request whose router raises hangs.

Serve's router interface is alpha in Ray 2.60; the loop that fulfils requests is that of Serve's consistent-hash router.
"""

from __future__ import annotations

from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


def session_id(home: str | None, row_id: str) -> str:
    """What a call to `home` carries; None leaves the choice to the hash."""
    return f"{home or ''} {row_id}"


class HomeRouter(ConsistentHashRouter):
    """Name it in a deployment's RequestRouterConfig, with `num_fallback_replicas: 0`."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The home alone, where it lives."""
        if pending_request is not None:
            home = pending_request.metadata.session_id.partition(" ")[0].partition("@")[0]
            found = self._replicas.get(ReplicaID(home, self._deployment_id))
            if found is not None:
                pending_request.routing_context.should_backoff = True
                return [[found]]
        return await super().choose_replicas(candidate_replicas, pending_request)
