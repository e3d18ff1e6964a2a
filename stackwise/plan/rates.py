"""How long operations take: by the public figures of a device, or at a rate that somebody has measured."""

from dataclasses import dataclass

from stackwise.errors import UserError

UTILISATION = 0.4
"""Share of a device's peak that training reaches, unless somebody knows better: what large models are reported to train
at (Chowdhery et al. 2022, PaLM, table 3: 21 to 46 %)."""


@dataclass(frozen=True)
class Accelerator:
    """What computes."""

    flops: float
    """Peak of dense bf16 products with fp32 sums (operations per second)."""
    memory: float | None
    """Of its own (bytes); None: it uses that of the machine."""


ACCELERATORS = {
    "cpu": Accelerator(4e11, None),
    "rtx-4090": Accelerator(165.2e12, 24e9),
    "l40s": Accelerator(362e12, 48e9),
    "a100-40": Accelerator(312e12, 40e9),
    "a100-80": Accelerator(312e12, 80e9),
    "h100": Accelerator(989e12, 80e9),
    "h200": Accelerator(989e12, 141e9),
}
"""The makers' data sheets, without sparsity; `cpu`: two cores with bf16 instructions, as measured for this project."""


def accelerator(name: str) -> Accelerator:
    """The one of a name.

    Raises:
        UserError: it is not known here.
    """
    if name not in ACCELERATORS:
        raise UserError(
            f"--device = {name}: not known; expected one of {', '.join(ACCELERATORS)}, or give --rate, operations per "
            "second that were measured"
        )
    return ACCELERATORS[name]


def rate_of(name: str, utilisation: float = UTILISATION) -> float:
    """Operations per second that training reaches on a device.

    Args:
        name: a key of `ACCELERATORS`.
        utilisation: share of the peak, in (0, 1].

    Raises:
        UserError: the device is not known, or the share is none.
    """
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation = {utilisation:g}: expected a share above 0, at most 1")
    return utilisation * accelerator(name).flops
