"""Remote runs of experts on the wire: a request's and an answer's bytes. Pure; sizes are bounded; nothing is pickled.

All numbers are little-endian. A request, the body of `POST /packs/NAME/run`:

    magic "CMRQ", u8 version, u8 dtype, u8 activation, u8 flags (1: gated, 2: summed), 8 bytes of the pack's identity,
    u16 layer, u16 rows N, u16 uses U, u16 width H,
    u16[U] expert, u16[U] row, f32[U] gate, u8[U] form, then x, (N, H) of dtype

and its answer:

    magic "CMRA", u8 version, u8 dtype, u16 rows R, u16 width H, u16 experts that the node had to read first,
    u32 microseconds at the node, then y, (R, H) of dtype

Use i is expert `expert[i]` in the form with that index in the manifest, on row `row[i]` of x: y[i] is its output times
`gate[i]`, rounded to the dtype as torch rounds. Of a summed request, y[j] is the sum of those of row j's uses, in any
order: an answer as small as the question. The identity is the beginning of the SHA-256 of the pack's manifest.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comoe.kernels.native import ACTIVATIONS
from comoe.types import DTYPE_BYTES, HostileMessage

VERSION = 3
IDENTITY_BYTES = 8
REQUEST_MAGIC, ANSWER_MAGIC = b"CMRQ", b"CMRA"
REQUEST_HEAD = struct.Struct("<4sBBBB8sHHHH")
ANSWER_HEAD = struct.Struct("<4sBBHHHI")
USE_BYTES = 2 + 2 + 4 + 1
GATED, SUMMED = 1, 2
DTYPES = tuple(DTYPE_BYTES)
ACTS = tuple(ACTIVATIONS)

MAX_USES = 256
MAX_BYTES = 1 << 20
"""No message is larger."""
MAX_MICROSECONDS = (1 << 32) - 1

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Uses:
    """Which experts run on which rows: four arrays (U,), see the module."""

    expert: npt.NDArray[np.uint16]
    row: npt.NDArray[np.uint16]
    gate: Floats
    form: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.expert)


@dataclass(frozen=True, slots=True, eq=False)
class RunRequest:
    """What a device asks for: `x` (N, H) is float32 here and of `dtype` on the wire; `summed`: outputs by row, not by
    use."""

    identity: bytes
    layer: int
    dtype: str
    activation: str
    gated: bool
    uses: Uses
    x: Floats
    summed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of its answer."""
        rows, width = self.x.shape
        return (rows if self.summed else len(self.uses)), width


@dataclass(frozen=True, slots=True, eq=False)
class RunAnswer:
    """`y` (R, H) is float32 here and of `dtype` on the wire; `seconds` is the time that the node took, `read` how many
    experts were not in its memory."""

    dtype: str
    y: Floats
    seconds: float
    read: int = 0


def encode_request(request: RunRequest) -> bytes:
    """The bytes of a request. Raises HostileMessage where a node would refuse it."""
    uses, (rows, width) = request.uses, request.x.shape
    _check_sizes(rows, len(uses), width, request.dtype, summed=request.summed)
    flags = GATED * request.gated + SUMMED * request.summed
    codes = (DTYPES.index(request.dtype), ACTS.index(request.activation), flags)
    head = REQUEST_HEAD.pack(REQUEST_MAGIC, VERSION, *codes, request.identity, request.layer, rows, len(uses), width)
    arrays = [uses.expert.astype("<u2"), uses.row.astype("<u2"), uses.gate.astype("<f4"), uses.form.astype("u1")]
    return b"".join([head, *(array.tobytes() for array in arrays), to_wire(request.x, request.dtype)])


def fits(request: RunRequest) -> bool:
    """Whether a node would take a request of such sizes."""
    try:
        _check_sizes(len(request.x), len(request.uses), request.x.shape[1], request.dtype, summed=request.summed)
    except HostileMessage:
        return False
    return True


def decode_request(data: bytes) -> RunRequest:
    """The request that `data` is. Raises HostileMessage for anything else."""
    if len(data) < REQUEST_HEAD.size:
        raise HostileMessage(f"{len(data)} bytes are no request to run experts.")
    magic, version, code, act, flags, identity, layer, rows, num, width = REQUEST_HEAD.unpack_from(data)
    _check_head(magic == REQUEST_MAGIC, version, code)
    if act >= len(ACTS) or flags > GATED + SUMMED:
        raise HostileMessage("a request to run experts names an activation, or a flag, that there is not.")
    dtype = DTYPES[code]
    _check_sizes(rows, num, width, dtype, summed=bool(flags & SUMMED))
    at = REQUEST_HEAD.size
    _check_length(data, at + USE_BYTES * num + rows * width * DTYPE_BYTES[dtype])
    expert = np.frombuffer(data, "<u2", num, at).astype(np.uint16)
    row = np.frombuffer(data, "<u2", num, at + 2 * num).astype(np.uint16)
    gate = np.frombuffer(data, "<f4", num, at + 4 * num).astype(np.float32)
    form = np.frombuffer(data, "u1", num, at + 8 * num).copy()
    if int(row.max()) >= rows or not np.isfinite(gate).all():
        raise HostileMessage("a request to run experts has a use without a row, or a gate that is no number.")
    x = from_wire(data, at + USE_BYTES * num, (rows, width), dtype)
    uses = Uses(expert, row, gate, form)
    return RunRequest(identity, layer, dtype, ACTS[act], bool(flags & GATED), uses, x, bool(flags & SUMMED))


def encode_answer(answer: RunAnswer) -> bytes:
    """The bytes of an answer."""
    rows, width = answer.y.shape
    _check_sizes(1, rows, width, answer.dtype)
    microseconds = min(MAX_MICROSECONDS, max(0, round(1e6 * answer.seconds)))
    head = ANSWER_HEAD.pack(ANSWER_MAGIC, VERSION, DTYPES.index(answer.dtype), rows, width, answer.read, microseconds)
    return head + to_wire(answer.y, answer.dtype)


def decode_answer(data: bytes) -> RunAnswer:
    """The answer that `data` is. Raises HostileMessage for anything else."""
    if len(data) < ANSWER_HEAD.size:
        raise HostileMessage(f"{len(data)} bytes are no answer of experts.")
    magic, version, code, rows, width, read, microseconds = ANSWER_HEAD.unpack_from(data)
    _check_head(magic == ANSWER_MAGIC, version, code)
    _check_sizes(1, rows, width, DTYPES[code])
    _check_length(data, ANSWER_HEAD.size + rows * width * DTYPE_BYTES[DTYPES[code]])
    y = from_wire(data, ANSWER_HEAD.size, (rows, width), DTYPES[code])
    return RunAnswer(DTYPES[code], y, microseconds / 1e6, read)


def to_wire(x: Floats, dtype: str) -> bytes:
    """`x` rounded to `dtype`, to the nearest and of two equally near to the even one."""
    if dtype == "float32":
        return x.astype("<f4").tobytes()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype("<f2").tobytes()
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    rounded[np.isnan(x)] = 0x7FC0
    return rounded.tobytes()


def from_wire(data: bytes, at: int, shape: tuple[int, int], dtype: str) -> Floats:
    """Numbers of `dtype` from byte `at` of `data` as float32, in memory of their own."""
    count = shape[0] * shape[1]
    if dtype == "bfloat16":
        halves = np.frombuffer(data, "<u2", count, at).astype(np.uint32) << 16
        return halves.view(np.float32).reshape(shape)
    return np.frombuffer(data, "<f4" if dtype == "float32" else "<f2", count, at).astype(np.float32).reshape(shape)


def _check_head(magic: bool, version: int, dtype: int) -> None:
    if not magic:
        raise HostileMessage("these bytes are no message about experts.")
    if version != VERSION:
        raise HostileMessage(f"a message has version {version}, this comoe speaks {VERSION}: use the same comoe.")
    if dtype >= len(DTYPES):
        raise HostileMessage("a message has a dtype that there is not.")


def _check_sizes(rows: int, uses: int, width: int, dtype: str, *, summed: bool = False) -> None:
    """What is asked and what is answered, both bounded."""
    nbytes = REQUEST_HEAD.size + USE_BYTES * uses + (rows if summed else max(rows, uses)) * width * DTYPE_BYTES[dtype]
    if not (0 < uses <= MAX_USES and 0 < rows <= uses and 0 < width < 1 << 16 and nbytes <= MAX_BYTES):
        raise HostileMessage(
            f"{uses} uses of {rows} rows of {width} numbers are none, or more than a message may hold."
        )


def _check_length(data: bytes, nbytes: int) -> None:
    if len(data) != nbytes:
        raise HostileMessage(f"a message has {len(data)} bytes, its head says {nbytes}.")
