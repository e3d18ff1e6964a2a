"""Time and memory of an export of a rack of 100 million parameters, beside those of reading and writing its weights.

    python -m benchmarks.export [--rounds N] [--check]

- time: of the whole command `stackwise export` (wall clock), Python and all imports with it, and of a process that
  reads the same file with the library of the format and writes it again, likewise with its imports.
- memory: the peak of resident memory over what is resident before the first byte of the rack is read, by the bytes of
  its weights; of the library likewise. Pages of files that are mapped into memory count.

The rack is verified before it is exported, and what is written gets a manifest: the command reads 400 MB three times
and writes them once, onto the disk; the library does each once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.table import Line, report, take_turns

BLOCKS, D_MODEL, HIDDEN, HEADS, VOCAB = (2,) * 7, 768, 2048, 12, 257
_MEASURED = """
import sys
from pathlib import Path
from benchmarks.memory import peak, reset_peak
how, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if how == "export":
    from stackwise.artifacts.manifest import publish, read
    from stackwise.growth.racks import KIND
    from stackwise.huggingface.exporting import export_rack
    base = reset_peak()
    rack = read(source, KIND)
    with publish(target, kind="export", params={}) as draft:
        export_rack(rack, draft.directory, name="rack")
else:
    from safetensors.torch import load_file, save_file
    target.mkdir()
    base = reset_peak()
    save_file(load_file(source / "model.safetensors"), target / "model.safetensors")
print(peak() - base)
"""


def make_rack(directory: Path) -> Path:
    """A rack of random weights; runs in a process of its own, whose memory it takes along."""
    from stackwise.artifacts.manifest import publish
    from stackwise.config.data import TokenizerParams
    from stackwise.config.model import AttentionParams, MLPParams, ModelParams
    from stackwise.data.tokenizer import build_tokenizer, save_tokenizer
    from stackwise.growth.init import initialize
    from stackwise.growth.racks import KIND, facts_of, save_rack
    from stackwise.model.rack import Rack, RackShape

    model = ModelParams(d_model=D_MODEL, attention=AttentionParams(n_heads=HEADS), mlp=MLPParams(hidden=HIDDEN))
    rack = Rack(RackShape.of(model, BLOCKS, VOCAB))
    initialize(rack, name="rack", seed=0)
    tokenizer = build_tokenizer(TokenizerParams(type="byte", vocab_size=None), lambda: iter(()))
    save_tokenizer(tokenizer, directory / "tokenizer")
    with publish(directory / "rack", kind=KIND, params={}) as draft:
        save_rack(draft.directory, rack, directory / "tokenizer")
        draft.facts |= facts_of(rack, objective="clm", causal=True, seq_len=1024)
    return directory / "rack"


def seconds(directory: Path, how: str) -> float:
    """Of a whole process."""
    rack, out = str(directory / "rack"), str(directory / f"out-{how}")
    if how == "export":
        words = ["-m", "workflow.command", "export", "--model", rack, "--out", out, "--force"]
    else:
        code = (
            "import sys; from safetensors.torch import load_file, save_file; "
            "save_file(load_file(sys.argv[1]), sys.argv[2])"
        )
        words = ["-c", code, f"{rack}/model.safetensors", f"{out}.safetensors"]
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def memory(directory: Path, how: str) -> int:
    """Peak over base of a process (bytes)."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        words = [sys.executable, "-c", _MEASURED, how, str(directory / "rack"), f"{place}/out"]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_rack(arguments.make)
        return
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        subprocess.run([sys.executable, "-m", "benchmarks.export", "--make", place], check=True)
        size = (directory / "rack/model.safetensors").stat().st_size
        print(f"{size / 4e6:.1f} M parameters, {size / 1e6:.0f} MB")
        ways = ("export", "library")
        times = take_turns({how: partial(seconds, directory, how) for how in ways}, arguments.rounds)
        peaks = {how: memory(directory, how) for how in ways}
    spent = {how: median(values) for how, values in times.items()}
    lines = [
        Line("export, seconds", f"{spent['export']:.2f} s", spent["export"], at_most=5.0),
        Line("  beside reading and writing the file", f"{spent['library']:.2f} s", spent["export"] / spent["library"]),
        Line("export, peak memory by bytes of weights", _mb(peaks["export"]), peaks["export"] / size, at_most=1.2),
        Line("  reading and writing the file", _mb(peaks["library"]), peaks["library"] / size),
    ]
    sys.exit(report(lines, check=arguments.check))


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
