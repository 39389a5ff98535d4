"""Where a pack is, a folder or an address. The client of addresses is imported when one is given."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comoe.net.address import Access, is_url
from comoe.net.remote_run import Node, manifest_hash
from comoe.store.manifest import Manifest
from comoe.store.pack import Pack

if TYPE_CHECKING:
    from comoe.net.nodes import EdgeNodes


def open_pack(where: str | Path, source: Path | None = None, access: Access | None = None) -> Pack:
    """The pack in a folder or behind a URL. Raises PackError, RemoteUnavailable, UsageError."""
    if not is_url(str(where)):
        return Pack(Path(where), source=source)
    from comoe.net.remote import RemotePack

    return RemotePack(str(where), access or Access(), source)


def folder_of(where: str, access: Access) -> Path:
    """The folder of a pack; of one behind a URL a mirror of its manifest and small files: what planning needs.

    Without a link it is as it was seen last. Raises RemoteUnavailable, PackError, UsageError.
    """
    if not is_url(where):
        return Path(where)
    from comoe.net.remote import describe

    return describe(where, access)


def reading_of(where: str, access: Access, manifest: Manifest) -> tuple[float, float] | None:
    """Bytes per second and seconds of round trip of the link to a pack: as said, or measured now; None of a folder, of
    which nothing is said."""
    if access.link is not None or not is_url(where):
        return access.link
    from comoe.net.origin import Origin

    return Origin(where, access).measured(manifest)


def open_nodes(nodes: Sequence[Node], pack: Pack, link: tuple[float, float] | None) -> "EdgeNodes":
    """Edge nodes that may serve a pack; one behind a URL is read from them, too, and its link may be gone for a moment.

    No more comes from them than `link` carries: bytes per second, seconds of round trip; together with the pack's own
    where that was opened with a link. Raises RemoteUnavailable, UsageError.
    """
    from comoe.net.nodes import EdgeNodes
    from comoe.net.origin import throttle_of
    from comoe.net.remote import RemotePack

    throttle = (pack.throttle if isinstance(pack, RemotePack) else None) or throttle_of(link)
    found = EdgeNodes(nodes, manifest_hash(pack.folder), throttle, awaited=pack.remote)
    if isinstance(pack, RemotePack):
        pack.nodes = found
    return found
