"""What other code bases gain: their own losses and matchers beside ours through the adapters, in one run.

"detr_fast" is an adapter in its mode "compat", which computes the code base's numbers. "transformers", "rfdetr" and
names of solvers are the installed packages. "definition" is the code base's loss as plain PyTorch and SciPy, layer by
layer, as the adapters' tests have it, where the code base is no package; not on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import adapters_matching, adapters_repositories, adapters_transformers, matching_union
from benchmarks.harness import Benchmark, Options


def benchmarks(options: Options) -> Iterator[Benchmark]:
    yield from adapters_transformers.benchmarks(options)
    yield from adapters_repositories.benchmarks(options)
    yield from adapters_matching.benchmarks(options)
    yield from matching_union.benchmarks(options)
