"""`python -m tests.integration.gpus_run GPUS ARGS…`: a run on a local Ray that believes it has so many GPUs, and a CPU
for each beside those of the agents."""

import sys

import ray

from pipeline import __main__


def main() -> None:
    gpus, *arguments = sys.argv[1:]
    init = ray.init
    ray.init = lambda **options: init(
        **options | {"num_gpus": int(gpus), "num_cpus": max(options["num_cpus"], int(gpus) + 2)}
    )
    sys.argv = ["berth", "run", *arguments]
    __main__.main()


if __name__ == "__main__":
    main()
