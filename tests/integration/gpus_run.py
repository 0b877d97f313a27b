"""`python -m tests.integration.gpus_run GPUS ARGS…`: a run on a local Ray that believes it has so many GPUs."""

import sys

import ray

from pipeline import __main__


def main() -> None:
    gpus, *arguments = sys.argv[1:]
    init = ray.init
    ray.init = lambda **options: init(**options | {"num_gpus": int(gpus)})
    sys.argv = ["berth", "run", *arguments]
    __main__.main()


if __name__ == "__main__":
    main()
