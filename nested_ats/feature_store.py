"""Features of patches are kept and used again, since those of a frozen encoder never change.

Notable: a name tells everything that decides a feature, so that nothing has to be thrown away when something changes.
It joins the image's identity and a digest of the encoder: its configuration, every bit of its state, the code of its
modules, the precision that it runs in and the kind of device. Images without an identity, encoders whose code cannot
be read, and weights of another type than float32 have no name: their features are computed anew each time.

Shape letters: N patches, W values a patch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nested_ats.reading import Reading

_FORMAT = 1  # raise it when the same pixels, weights and code of an encoder come to give other numbers


class FeatureStore(Protocol):
    """Rows of numbers by name and place. It must be thread safe and may forget: lost rows are computed again."""

    def get(self, name: str, places: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Look rows up.

        Parameters
        ----------
        name
            The image and encoder that the rows belong to.
        places
            (N, 2) int64, y and x.
        width
            W, the same for all rows of this name.

        Returns
        -------
        rows, found
            (N, W) float32, as they were put, and (N,) bool: which were found. The others' values mean nothing.
        """
        ...

    def put(self, name: str, places: Tensor, rows: Tensor) -> None:
        """Keep (N, W) float32 rows of (N, 2) distinct places if there is room."""
        ...


def recall(
    store: FeatureStore,
    names: Sequence[str | None],
    boxes: Tensor,
    width: int,
    device: torch.device,
    encode: Callable[[list[int], list[Tensor]], Reading[list[Tensor]]],
) -> Reading[Tensor]:
    """Look up the rows of patches; encode those that are missing, each once, and store them.

    Parameters
    ----------
    store
        Is asked by as many reads as there are images, and put to by others.
    names
        B of them, of the images in the store; None for one whose patches cannot be kept.
    boxes
        (B, n, 4) int64: first y and x, height and width of patches in pixels of their level; they may repeat.
    width, device
        Numbers in a row, and where the rows are wanted.
    encode
        Given the numbers of images, and the distinct (P, 4) boxes wanted of each, gives the (P, width) rows of each.

    Returns
    -------
    (B, n, width) float32
    """
    each = [rows.unique(dim=0, return_inverse=True) for rows in boxes.cpu()]
    wanted = [own for own, _ in each]

    def look(name: str | None, own: Tensor) -> tuple[Tensor, Tensor]:
        if name is None:
            return torch.empty(len(own), width), torch.zeros(len(own), dtype=torch.bool)
        return store.get(name, own[:, :2], width)

    looked = yield [partial(look, name, own) for name, own in zip(names, wanted, strict=True)]
    tables = [rows.to(device, copy=True) for rows, _ in looked]
    missing = {row: wanted[row][~found] for row, (_, found) in enumerate(looked) if not found.all()}
    if missing:
        encoded = yield from encode(list(missing), list(missing.values()))
        puts = []
        for row, rows in zip(missing, encoded, strict=True):
            tables[row][~looked[row][1].to(device)] = rows
            if (name := names[row]) is not None:
                puts.append(partial(store.put, name, missing[row][:, :2], rows.cpu()))
        yield puts
    return torch.stack([table[places.to(device)] for table, (_, places) in zip(tables, each, strict=True)])


class EncoderName:
    """Name an encoder by all that decides the features it computes.

    Tensors are hashed when a name is first asked for; those that torch's count of changes in place tells have changed
    are hashed again.

    Parameters
    ----------
    settings
        Plain values that say how the encoder was built and how its pixels are prepared.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = json.dumps([_FORMAT, settings], sort_keys=True, default=str)
        self._known: dict[str, tuple[Tensor, tuple[Any, ...], bytes]] = {}  # tensors, state of change, and digest
        self._digest: str | None = None

    def __call__(self, encoder: nn.Module, device: torch.device) -> str | None:
        """Name the features computed now on a device; None where something that decides them is unknown."""
        found = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
        if not (list(found) == list(self._known) and all(starmap(self._is_known, found.items()))):
            anew = {n: (t, _change_marks(t), _hash_tensor(t)) for n, t in found.items() if not self._is_known(n, t)}
            known = {name: anew[name] if name in anew else self._known[name] for name in found}
            self._digest = self._hash(encoder, {name: own for name, (_, _, own) in known.items()})
            self._known = known  # last, since another thread may look at it
        if self._digest is None:
            return None
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else "as it is"
        return f"{self._digest}/{device.type}/{cast}"

    def _is_known(self, name: str, tensor: Tensor) -> bool:
        """Whether this is the very tensor that was hashed under this name, unchanged."""
        known = self._known.get(name)
        return known is not None and known[0] is tensor and known[1] == _change_marks(tensor)

    def _hash(self, encoder: nn.Module, digests: Mapping[str, bytes]) -> str | None:
        code = _code_digests(encoder)
        if code is None:
            return None
        digest = hashlib.sha256(f"{self._settings}\n{code}\n".encode())
        for name, own in digests.items():
            digest.update(f"{name}\n".encode() + own)
        return digest.hexdigest()


def _change_marks(tensor: Tensor) -> tuple[Any, ...]:
    """Values that change when a tensor is changed in place or gets other memory."""
    return (None if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype)


def _hash_tensor(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _code_digests(encoder: nn.Module) -> list[str] | None:
    """Digests of the files that define the encoder's modules except torch's; None where one cannot be read."""
    files = set()
    for kind in {base for module in encoder.modules() for base in type(module).__mro__}:
        home = kind.__module__
        if kind is object or home.startswith("torch.nn."):
            continue
        if home.partition(".")[0] == "torch":  # a compiled or traced module has no file
            return None
        try:
            files.add(Path(inspect.getsourcefile(kind) or ""))
        except (OSError, TypeError):
            return None
    try:
        return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    except OSError:
        return None
