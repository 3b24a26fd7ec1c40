"""Collectives of ranks on one machine through shared memory (mmdist/native/collectives.c): microseconds, not gloo's
milliseconds, and the same bits on every rank.

The segment is an anonymous file of rank 0's (memfd), which the others open through /proc: nothing can be left behind.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from mmdist.native.build import Native

SUM_F32, SUM_BF16, MAX_F32 = range(3)  # Kind in collectives.c
SPIN_US = 100  # where each rank has a core of its own
T = TypeVar("T")


class LostPeer(RuntimeError):
    """Another rank has died or does not come; what it says itself is the cause."""


class ShmCollectives:
    """mmdist.collectives.distributed.Collectives for CPU tensors."""

    name = "shm"

    def __init__(
        self, native: Native, segment: mmap.mmap, rank: int, pidfds: list[int], *, spin_us: int, timeout_s: float
    ):
        """segment: of create_segment, which all have mapped. pidfds: of all ranks, by which their ends are noticed; -1
        for those not watched. spin_us: 0 where ranks are more than cores."""
        self.rank, self.size, self.timeout_s = rank, len(pidfds), timeout_s
        pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._reduce = native.declare("mmdist_shm_all_reduce", number, pointer, pointer, count, number)
        self._gather = native.declare("mmdist_shm_all_gather", number, pointer, pointer, pointer, count, count)
        self._broadcast = native.declare("mmdist_shm_broadcast", number, pointer, pointer, count)
        self._barrier = native.declare("mmdist_shm_barrier", number, pointer)
        self._segment = ctypes.c_char.from_buffer(segment)  # keeps it mapped
        self._memory = ctypes.create_string_buffer(native.declare("mmdist_shm_comm_bytes", count, number)(self.size))
        self._comm = ctypes.addressof(self._memory)
        attach = native.declare("mmdist_shm_attach", None, pointer, pointer, number, number, pointer, count, count)
        fds = (number * self.size)(*pidfds)
        address = ctypes.addressof(self._segment)
        attach(self._comm, address, rank, self.size, fds, spin_us * 1000, int(timeout_s * 1000))

    def all_sum(self, x: torch.Tensor) -> None:
        """In place: in the order of the ranks, bfloat16 in float32 and rounded once."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self._all_reduce(x, SUM_F32 if x.dtype == torch.float32 else SUM_BF16)
        else:
            x.copy_(self._stacked(x).sum(0, dtype=x.dtype))

    def all_max(self, x: torch.Tensor) -> None:
        if x.dtype == torch.float32:
            self._all_reduce(x, MAX_F32)
        else:
            x.copy_(self._stacked(x).amax(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        rows, columns = x.shape[:-1], x.shape[-1]
        out = x.new_empty(*rows, columns * self.size)
        row_bytes = columns * x.itemsize
        self._check(self._gather(self._comm, x.data_ptr(), out.data_ptr(), rows.numel(), row_bytes))
        return out

    def broadcast(self, x: torch.Tensor) -> None:
        flat = x.contiguous()
        self._check(self._broadcast(self._comm, flat.data_ptr(), flat.nbytes))
        if flat is not x:
            x.copy_(flat)

    def device_group(self, device: torch.device) -> None:
        return None

    def broadcast_bytes(self, data: bytes) -> bytes:
        length = ctypes.c_int64(len(data))
        self._check(self._broadcast(self._comm, ctypes.addressof(length), ctypes.sizeof(length)))
        if self.rank == 0:
            buffer = ctypes.create_string_buffer(data, len(data))
        else:
            buffer = ctypes.create_string_buffer(length.value)
        self._check(self._broadcast(self._comm, ctypes.addressof(buffer), length.value))
        return buffer.raw

    def barrier(self) -> None:
        self._check(self._barrier(self._comm))

    def _all_reduce(self, x: torch.Tensor, kind: int) -> None:
        flat = x.contiguous()
        self._check(self._reduce(self._comm, flat.data_ptr(), flat.numel(), kind))
        if flat is not x:
            x.copy_(flat)

    def _stacked(self, x: torch.Tensor) -> torch.Tensor:
        """(size, *x.shape): all ranks' values, for dtypes without a native sum."""
        return self.all_gather(x.reshape(1, -1)).view(self.size, *x.shape)

    def _check(self, code: int) -> None:
        if code > 0:
            raise LostPeer(f"rank {code - 1} has died")
        if code < 0:
            raise LostPeer(f"rank {-1 - code} did not come within {self.timeout_s:g} s (launcher.timeout_s)")


def create_segment(native: Native, size: int) -> int:
    """The file descriptor of a new segment for `size` ranks."""
    return checked(native.declare("mmdist_shm_create", ctypes.c_int, ctypes.c_int)(size))


def watch(native: Native, pid: int) -> int:
    """A file descriptor that tells when the process has ended."""
    return checked(native.declare("mmdist_shm_watch", ctypes.c_int, ctypes.c_int)(pid))


def checked(code: int) -> int:
    if code < 0:
        raise OSError(-code, os.strerror(-code))
    return code


class NoShm(Exception):
    """Why the ranks cannot share memory; the same on every rank."""


@dataclass
class Seat:
    """What a rank tells the others before they share memory."""

    pid: int
    cores: set[int]
    fd: int = -1  # of rank 0's segment
    inode: int = -1  # the segment's


def open_shm(native: Native | None, *, rank: int, size: int, local_size: int, timeout_s: float) -> ShmCollectives:
    """The ranks of the default process group meet in a new segment; NoShm on all of them where one cannot."""

    def take_seat() -> Seat:
        if local_size != size:
            raise NoShm(f"{size} ranks on several machines")
        seat = Seat(os.getpid(), os.sched_getaffinity(0))
        if native is None:
            raise NoShm("there is no native library")
        if rank == 0:
            seat.fd = create_segment(native, size)
            seat.inode = os.fstat(seat.fd).st_ino
        return seat

    def join() -> ShmCollectives:
        assert native is not None
        pidfds = [-1 if i == rank else watch(native, other.pid) for i, other in enumerate(seats)]
        segment = map_segment(seats[0])
        spin_us = SPIN_US if len(set().union(*(other.cores for other in seats))) >= size else 0
        return ShmCollectives(native, segment, rank, pidfds, spin_us=spin_us, timeout_s=timeout_s)

    seat = together(take_seat, size)
    seats: list[Seat] = exchange(seat, size)
    joined = together(join, size)
    if rank == 0:
        os.close(seat.fd)
    return joined


def probe_shm(native: Native) -> None:
    """NoShm or OSError where processes of this machine could not share a segment; asked by one alone."""
    fd = create_segment(native, 1)
    try:
        map_segment(Seat(os.getpid(), set(), fd, os.fstat(fd).st_ino)).close()
        os.close(watch(native, os.getpid()))
    finally:
        os.close(fd)


def map_segment(first: Seat) -> mmap.mmap:
    fd = os.open(f"/proc/{first.pid}/fd/{first.fd}", os.O_RDWR)
    try:
        if os.fstat(fd).st_ino != first.inode:
            raise NoShm("the ranks see different processes")
        return mmap.mmap(fd, 0)
    finally:
        os.close(fd)


def together(step: Callable[[], T], size: int) -> T:
    """step() on every rank; NoShm on all of them where it fails on one."""
    result, problem = None, None
    try:
        result = step()
    except (NoShm, OSError) as error:
        problem = str(error)
    problems = exchange(problem, size)
    for rank, found in enumerate(problems):
        if found is not None:
            raise NoShm(f"rank {rank}: {found}")
    assert result is not None
    return result


def exchange(value: T, size: int) -> list[T]:
    """Every rank's value, in the order of the ranks."""
    values: list = [None] * size
    dist.all_gather_object(values, value)
    return values
