"""The device that computes, and what makes it repeat itself."""

import os

import torch

from stackwise.config.compute import ComputeParams
from stackwise.errors import UserError


def choose(compute: ComputeParams, *, where: str = "params.yaml: compute.device =") -> torch.device:
    """The device that computes.

    Args:
        compute: names it, or asks for the best one.
        where: how a message calls what names it.

    Raises:
        UserError: this machine does not have it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d, there in available.items() if there) if compute.device == "auto" else compute.device
    if not available[name]:
        there = ", ".join(d for d, yes in available.items() if yes)
        raise UserError(f"{where} {name}: not found on this machine, which has {there}; set it to auto")
    return torch.device(name)


def set_up(compute: ComputeParams, *, threads: int, seed: int) -> torch.device:
    """Choose the device and set threads, seed and determinism for this process.

    Raises:
        UserError: `compute.device` names a device that this machine does not have.
    """
    device = choose(compute)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # Filling fresh memory finds reads of uninitialized values, of which there are none, and costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device
